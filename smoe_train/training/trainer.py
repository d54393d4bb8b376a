"""The training loop, to be read from top to bottom: one trainer for every task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smoe_train.checkpoint import Checkpoint, CheckpointStore, restore
from smoe_train.checkpoint.folders import step_of
from smoe_train.checkpoint.rank_state import capture_random_state, restore_random_state
from smoe_train.data.batches.loader import Indices, MicroBatch, TrainBatches
from smoe_train.errors import CheckFailedError, RunFailedError, RunStoppedError
from smoe_train.evaluation import StatSums
from smoe_train.model import SmoePreTrainedModel
from smoe_train.parallel import traffic
from smoe_train.reporting import Journal
from smoe_train.routing import StepTotals
from smoe_train.schedules import Curriculum, Knobs, LearningRateConfig, learning_rate
from smoe_train.training import self_test
from smoe_train.training.alarms import Alarm, Alarms
from smoe_train.training.complexity import SampleOrder
from smoe_train.training.config import EvaluationConfig, TrainingConfig
from smoe_train.training.diagnosis import describe, find_non_finite
from smoe_train.training.engine import Engine
from smoe_train.training.heap import Heap
from smoe_train.training.meter import Meter, routing_records
from smoe_train.training.saving import Saver
from smoe_train.training.state import TrainState
from smoe_train.training.stop import StopRequest
from smoe_train.training.task import Interrupted, Task, Validation

if TYPE_CHECKING:
    from smoe_train.parallel.process import Process

CALMER = "Lower learning_rate.peak, or lengthen learning_rate.warmup_steps"


@dataclass
class Trainer:
    """Everything one run needs, and the loop over its steps.

    Attributes:
        config: Length and batch.
        evaluation: When and how to validate.
        learning_rate: The learning rate over training.
        curriculum: Maps steps to knobs.
        checkpoint_every: Steps between checkpoints.
        log_every: Steps between records being read from the device.
        seed: Run seed.
        engine: Runs, differentiates and updates the model.
        model: The model inside the engine.
        process: This process among its peers.
        batches: Training batches of this rank.
        task: What the run is trained and judged on.
        store: Where checkpoints are.
        saver: Writes them.
        alarms: Judge steps that are not finite, loss spikes and collapsed routers.
        journal: Where records go; None on all ranks but the first.
        identity: What a checkpoint must agree on to be resumed, saved with it.
        score_key: What a validation was measured on; costs with different keys are not compared.
        further_state: What else each checkpoint says of the run.
        sample_order: Orders each epoch but the first by difficulty; None leaves them shuffled.
        stop: Whether the run was asked to stop.
        beat: Told at every step, validation and save that this rank is alive.
        state: Where training stands.
        rehearsal: Whether to stop after the first step, which is written nowhere: for the self-test alone.
        not_judged: Losses that were 0 in the self-test.
        best_on_disk: Cost and step of the best validation whose checkpoint was written.
        notes: What is to be said of the run before it begins.
        heap: Decides what becomes of memory that a step has freed.
    """

    config: TrainingConfig
    evaluation: EvaluationConfig
    learning_rate: LearningRateConfig
    curriculum: Curriculum
    checkpoint_every: int
    log_every: int
    seed: int
    engine: Engine
    model: SmoePreTrainedModel
    process: Process
    batches: TrainBatches
    task: Task
    store: CheckpointStore
    saver: Saver
    alarms: Alarms
    journal: Journal | None
    identity: dict[str, Any]
    score_key: list[Any]
    further_state: Mapping[str, Any] = field(default_factory=dict)
    sample_order: SampleOrder | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    beat: Callable[[str], None] = field(default=lambda phase: None)
    state: TrainState = field(default_factory=TrainState)
    rehearsal: bool = False
    not_judged: list[str] = field(default_factory=list)
    best_on_disk: tuple[float | None, int | None] = (None, None)
    notes: list[str] = field(default_factory=list)
    heap: Heap = field(default_factory=Heap)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint: weights, optimizer, routers, generators and the position in the data."""
        restore(self.engine, checkpoint, self.process.rank, self.seed, self.process.device)
        self.state = TrainState.from_json(checkpoint.state["train"])
        self.alarms.restore(self.state.alarms)
        if self.sample_order is not None:
            self.sample_order.restore(checkpoint)
        # What was best counts on only if it was measured alike and its checkpoint is one of this run's.
        comparable = checkpoint.state["score_key"] == self.score_key and self.store.holds(checkpoint)
        if not (comparable and self.store.restore_best(self.state.best_step)):
            self.state.best_cost, self.state.best_step = None, None
        self.best_on_disk = (self.state.best_cost, self.state.best_step)

    def train(self) -> TrainState:
        """Trains to the last step and returns where training stands.

        Raises:
            RunFailedError: Steps are not finite, or checkpoints cannot be written, more often than the recipe allows.
            CheckFailedError: An alarm that is to end the run.
            RunStoppedError: The run was asked to stop and has written its checkpoint.
        """
        for text in self.notes:
            self.note(text)
        self.model.train()
        untrained = self._self_test() if self.config.self_test and self.state.step == 0 else None
        self._make_up_for_validation()
        while (alarm := self._train_from_here(untrained)) is not None:
            self._go_back(alarm)
            self._make_up_for_validation()
            untrained = None
        self.saver.settle(last=not self.rehearsal)
        self.store.restore_best(self.state.best_step)  # where its pointer could not be written
        return self.state

    def _train_from_here(self, untrained: dict[str, tuple[range, Tensor]] | None) -> Alarm | None:
        """Trains to the last step, or until an alarm that takes training back."""
        max_steps = self.config.max_steps
        state, engine = self.state, self.engine
        routers = self.model.routers().values()
        adapting = "router" not in self.model.frozen_parts and any(router.adapts() for router in routers)
        meter = Meter(self.process.world_size, self.process.sum, self.model.config.loss_coefficients())
        count_ahead = self._must_count_ahead()
        next_order = None if self.sample_order is None else self._order_samples
        for micro_batches in self.batches.steps(state.step, max_steps, next_order):
            self.beat("train")
            sent_before = traffic.bytes_sent.total()
            knobs = self.curriculum.knobs(state.step)
            rate = learning_rate(self.learning_rate, state.step, max_steps)
            micro_batches = [batch.to(self.process.device) for batch in micro_batches]
            generators = capture_random_state(self.process.device)
            totals = self._count(micro_batches, knobs) if count_ahead else None
            for batch in micro_batches:
                objective = self.task.objective(engine.forward, batch, knobs, totals)
                engine.backward(objective.total)
                meter.add(objective)
                if self.sample_order is not None:
                    self.sample_order.recorder.add(batch, objective.output.experts_of_token or {})
            stop, writing, not_finite = self.process.any_of(
                self.stop.requested, self.store.busy, not meter.step_is_finite()
            )
            left_out = state.step + 1 in state.left_out
            frozen = any(router.frozen(state.step) for router in routers)
            updated = engine.step(rate, frozen=frozen, refuse=left_out or not_finite)
            self.heap.reuse_from_now()

            state.step += 1
            state.tokens += self.batches.tokens_of(state.step - 1)
            facts = {
                "step": state.step,
                "tokens": state.tokens,
                "learning_rate": rate,
                "top_k": knobs.top_k,
                "gradient_norm": engine.gradient_norm if updated else math.nan,
            }
            sent = traffic.bytes_sent.total() - sent_before
            stats = meter.end_step(facts if updated else {**facts, "skipped": True}, knobs.loss_weights, sent)
            if updated and untrained is not None:
                self._require_expert_update(untrained, stats)
                untrained = None
            if updated and adapting:
                self.adapt_routers(stats)
            if self.rehearsal:
                return None

            fault = None if left_out else self.alarms.judge_step(state.step, finite=updated)
            save = state.step == max_steps or state.step % self.checkpoint_every == 0
            if fault or stop or save or self._validation_is_due() or state.step % self.log_every == 0:
                alarms = self._record(meter)
                self.heap.tidy()
                if fault is not None:
                    where = self._find_non_finite(micro_batches, knobs, totals, generators)
                    alarms = [replace(fault, message=f"{fault.message}: {where}"), *alarms]
                for alarm in alarms:
                    if self._raise(alarm):
                        return alarm
            if self.store.saving and not writing:
                self.saver.advance()
            if stop or save or self._validation_is_due():
                self._at_boundary(stop, save)
                meter.pause()
        return None

    def _make_up_for_validation(self) -> None:
        """Validates, and saves that it has, where the run was stopped in the middle of a validation."""
        step = self.state.step
        if step > 0 and self.state.validated_step != step and self._validation_is_due():
            if self.journal is not None:
                self.journal.rewind(step, validated=False)
            self._at_boundary(stop=False, save=True)

    def _validation_is_due(self) -> bool:
        return self.state.step == self.config.max_steps or self.state.step % self.evaluation.every_steps == 0

    def _at_boundary(self, stop: bool, save: bool) -> None:
        """Validates and saves after a step, as far as it is time to."""
        improved = False
        if self._validation_is_due() and not stop:
            self.saver.settle()  # what is best so far is known once it is on disk
            self.beat("validate")
            try:
                improved = self._validate()
            except Interrupted:
                stop = True
        if save or improved or stop:
            self.beat("save")
            self._save(improved)
        if stop:
            self.saver.settle(last=True)
            if self.state.step < self.config.max_steps or self.state.validated_step != self.state.step:
                raise RunStoppedError(
                    f"stopped {self.stop.reason} after step {self.state.step}; the same command resumes the run"
                )

    def _find_non_finite(
        self, micro_batches: list[MicroBatch], knobs: Knobs, totals: StepTotals | None, generators: dict[str, Tensor]
    ) -> str:
        """Returns what in the last step was not finite first, by running it again as it was."""

        def losses() -> Iterator[Tensor]:
            restore_random_state(generators, self.process.device)
            for batch in micro_batches:
                yield self.task.objective(self.model, batch, knobs, totals).total

        return describe(self.process.gather_objects(find_non_finite(self.model, losses)))

    def _raise(self, alarm: Alarm) -> bool:
        """Says what is wrong and returns whether training has to go back; all ranks call it.

        Raises:
            RunFailedError: Too many steps were not finite.
            CheckFailedError: Another alarm that is to end the run.
        """
        if alarm.action == "stop":
            self.saver.settle()
            if alarm.name == "non_finite":
                raise RunFailedError(f"{alarm.message}. {CALMER}")
            before = [path.name for path in self.store.complete() if step_of(path) < alarm.since]
            advice = f"resume it from {before[0]}, --resume PATH" if before else "there is no checkpoint from before"
            go_on = f"or go on all the same: health.{alarm.name}.action=warn"
            raise CheckFailedError(f"{alarm.message}; {advice}. {CALMER}, {go_on}")
        end = {"skip": "; weights and moments stay as they were", "rollback": "; going back to a checkpoint"}
        self.note(f"warning: {alarm.message}{end.get(alarm.action, '')}")
        return alarm.action == "rollback"

    def _go_back(self, alarm: Alarm) -> None:
        """Takes the run back to the newest sound checkpoint before an alarm, whose steps it then leaves out.

        Raises:
            RunFailedError: There is no such checkpoint.
        """
        self.saver.settle()
        checkpoint = self.store.newest_sound(self.note, at_most=alarm.since - 1)
        if checkpoint is None:
            raise RunFailedError(f"{alarm.message}; there is no checkpoint before it to go back to. {CALMER}")
        aside = self.store.set_aside_later(checkpoint.step)
        left_out, alarms = {*self.state.left_out, *range(alarm.since, alarm.step + 1)}, self.alarms.to_json()
        self.resume(checkpoint)
        self.alarms.restore(alarms)
        self.alarms.go_back(self.state.alarms)
        self.state.left_out = sorted({*self.state.left_out, *left_out})
        if self.journal is not None:
            self.journal.rewind(checkpoint.step)
        self.note(
            f"went back to {checkpoint.path.name}; on the way steps {alarm.since} to {alarm.step} change nothing"
            + "".join(f"; {path.name} is set aside" for path in aside)
        )

    def note(self, text: str) -> None:
        """Shows a line to whoever watches."""
        if self.journal is not None:
            self.journal.note(text)

    def _self_test(self) -> dict[str, tuple[range, Tensor]]:
        """Checks what each loss trains; returns the experts' fingerprints for the check after the first step."""
        batch = self.batches[0][0].to(self.process.device)
        found = self_test.check_gradients(self.model, batch, self.curriculum, self.task.objective, self.process.sum)
        self_test.require(found.problems, self.process.any)
        self.not_judged = found.not_judged
        return self_test.fingerprints(self.model, lambda parameter: self.engine.read_state(parameter)["weight"])

    def _require_expert_update(self, before: dict[str, tuple[range, Tensor]], stats: StatSums) -> None:
        after = self_test.fingerprints(self.model, lambda parameter: self.engine.read_state(parameter)["weight"])
        slots = {layer: self.process.sum(values["slots_E"]) for layer, values in stats.items()}
        self_test.require(self_test.check_expert_update(before, after, slots), self.process.any)

    def _order_samples(self, epoch: int) -> Indices:
        """Returns the order of the samples in an epoch that begins with the next step."""
        assert self.sample_order is not None
        order = self.sample_order.of_epoch(epoch)
        if self.journal is not None:
            self.journal.note(self.sample_order.note)
        return order

    def _must_count_ahead(self) -> bool:
        """Returns whether a router loss in use needs sums over micro-batches that are not there yet."""
        if self.config.router_statistics != "step" or self.batches.accumulation_steps == 1:
            return False
        coefficients = self.model.config.loss_coefficients()
        needing = {name for router in self.model.routers().values() for name in router.batch_losses_of(router.config)}
        return any(coefficients[name] > 0.0 for name in needing)

    def _count(self, micro_batches: list[MicroBatch], knobs: Knobs) -> StepTotals:
        """Runs the step's micro-batches without gradients for the sums that router losses are functions of."""
        totals = StepTotals(len(micro_batches))
        device = self.process.device
        # The dropout of this pass is that of the next: the same tokens take the same ways.
        with torch.no_grad(), torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            for batch in micro_batches:
                self.task.objective(self.engine.forward, batch, knobs, totals)
        totals.finish()
        return totals

    def _record(self, meter: Meter) -> list[Alarm]:
        """Reads the meter, writes the records and returns the alarms that they raise, on every rank the same."""
        steps, routing = meter.read()
        if self.journal is not None:
            self.journal.metrics(
                [{"split": "train", **record, **self.task.figures(record["loss"])} for record in steps]
            )
            self.journal.routing([{"step": self.state.step, "split": "train", **record} for record in routing])
        alarms: list[Alarm] = self.process.broadcast_object(self.alarms.judge(steps, routing))
        return alarms

    def _validate(self) -> bool:
        """Scores the validation split on all ranks; returns whether it is the best so far."""
        top_k_values = self.evaluation.top_k or (self.curriculum.top_k,)
        results = self.task.validate(
            [self.curriculum.evaluation_knobs(self.state.step, top_k) for top_k in top_k_values]
        )
        first = results[0]
        self.state.validated_step = self.state.step
        if not math.isfinite(first.loss):
            self.saver.settle()
            raise RunFailedError(
                f"step {self.state.step}: the validation loss is {first.loss}, though training is finite. {CALMER}, "
                "and resume from an older checkpoint: --resume PATH"
            )
        routing = routing_records(first.routing, first.top_k, self.process.sum)
        split = self.task.split
        if self.journal is not None:
            self.journal.metrics([self._validation_record(result) for result in results])
            self.journal.routing([{"step": self.state.step, "split": split, **record} for record in routing])
        if self.state.best_cost is not None and first.cost >= self.state.best_cost:
            return False
        self.state.best_cost, self.state.best_step = first.cost, self.state.step
        return True

    def _validation_record(self, result: Validation) -> dict[str, Any]:
        return {"step": self.state.step, "split": self.task.split, **result.record, "tokens": self.state.tokens}

    def _save(self, best: bool) -> None:
        """Starts to write a checkpoint together with the other ranks."""
        self.state.alarms = self.alarms.to_json()
        state = {
            "train": self.state.to_json(),
            "optimizer_steps": self.engine.optimizer_steps(),
            "world_size": self.process.world_size,
            "expert_parallel_size": self.saver.expert_parallel_size,
            "identity": self.identity,
            "score_key": self.score_key,
            "threshold": self.curriculum.evaluation_knobs(self.state.step).threshold,
            **self.further_state,
        }
        extra = self.sample_order.tensors() if self.sample_order is not None else {}
        self.saver.save(self.state.step, state, extra, best)

    def best_ended(self, saved: bool) -> None:
        """Takes notice of whether the best checkpoint is on disk; if it is not, the one before counts on."""
        if saved:
            self.best_on_disk = (self.state.best_cost, self.state.best_step)
        else:
            self.state.best_cost, self.state.best_step = self.best_on_disk

    def adapt_routers(self, stats: StatSums) -> None:
        """Gives routers that keep statistics the sums of the step over all ranks, in one reduction."""
        routers = self.model.routers()
        keys = [(layer, name) for layer in sorted(stats) for name in sorted(stats[layer])]
        flat = self.process.sum(torch.cat([stats[layer][name].reshape(-1).float() for layer, name in keys]))
        parts = flat.split([stats[layer][name].numel() for layer, name in keys])
        summed: dict[int, dict[str, Tensor]] = {}
        for (layer, name), part in zip(keys, parts, strict=True):
            summed.setdefault(layer, {})[name] = part.view(stats[layer][name].shape)
        with torch.no_grad():
            for layer, values in summed.items():
                routers[layer].after_step(values)
