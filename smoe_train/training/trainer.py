"""The training loop, to be read from top to bottom: one trainer for every task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smoe_train.checkpoint import Checkpoint, CheckpointStore, collect, restore
from smoe_train.data.batches.loader import Indices, MicroBatch, TrainBatches
from smoe_train.errors import RunFailedError, RunStoppedError
from smoe_train.evaluation import StatSums
from smoe_train.model import SmoePreTrainedModel
from smoe_train.reporting import Journal
from smoe_train.routing import StepTotals
from smoe_train.schedules import Curriculum, Knobs, LearningRateConfig, learning_rate
from smoe_train.training import self_test
from smoe_train.training.complexity import SampleOrder
from smoe_train.training.config import EvaluationConfig, TrainingConfig
from smoe_train.training.engine import Engine
from smoe_train.training.meter import Meter, routing_records
from smoe_train.training.state import TrainState
from smoe_train.training.stop import StopRequest
from smoe_train.training.task import Task, Validation

if TYPE_CHECKING:
    from smoe_train.parallel.process import Process


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
        expert_parallel_size: Ranks that share one set of experts.
        engine: Runs, differentiates and updates the model.
        model: The model inside the engine.
        process: This process among its peers.
        batches: Training batches of this rank.
        task: What the run is trained and judged on.
        store: Where checkpoints go.
        journal: Where records go; None on all ranks but the first.
        identity: What a checkpoint must agree on to be resumed, saved with it.
        score_key: What a validation was measured on; costs with different keys are not compared.
        tokenizer: Files of the tokenizer, saved with each checkpoint.
        further_state: What else each checkpoint says of the run.
        sample_order: Orders each epoch but the first by difficulty; None leaves them shuffled.
        stop: Whether the run was asked to stop.
        state: Where training stands.
        rehearsal: Whether to stop after the first step, which is written nowhere: for the self-test alone.
        not_judged: Losses that were 0 in the self-test.
    """

    config: TrainingConfig
    evaluation: EvaluationConfig
    learning_rate: LearningRateConfig
    curriculum: Curriculum
    checkpoint_every: int
    log_every: int
    seed: int
    expert_parallel_size: int
    engine: Engine
    model: SmoePreTrainedModel
    process: Process
    batches: TrainBatches
    task: Task
    store: CheckpointStore
    journal: Journal | None
    identity: dict[str, Any]
    score_key: list[Any]
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)
    further_state: Mapping[str, Any] = field(default_factory=dict)
    sample_order: SampleOrder | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    state: TrainState = field(default_factory=TrainState)
    rehearsal: bool = False
    not_judged: list[str] = field(default_factory=list)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint: weights, optimizer, routers, generators and the position in the data."""
        restore(self.engine, checkpoint, self.process.rank, self.seed, self.process.device)
        self.state = TrainState.from_json(checkpoint.state["train"])
        if self.sample_order is not None:
            self.sample_order.restore(checkpoint)
        # What was best counts on only if it was measured alike and its checkpoint is one of this run's.
        comparable = checkpoint.state["score_key"] == self.score_key and self.store.holds(checkpoint)
        if not (comparable and self.store.restore_best(self.state.best_step)):
            self.state.best_cost, self.state.best_step = None, None

    def train(self) -> TrainState:
        """Trains to the last step and returns where training stands.

        Raises:
            RunFailedError: The loss or the gradient is not finite any more.
            RunStoppedError: The run was asked to stop and has written its checkpoint.
        """
        max_steps = self.config.max_steps
        state, engine = self.state, self.engine
        routers = self.model.routers().values()
        adapting = "router" not in self.model.frozen_parts and any(router.adapts() for router in routers)
        meter = Meter(self.process.world_size, self.process.sum, self.model.config.loss_coefficients())
        count_ahead = self._must_count_ahead()
        self.model.train()
        untrained = self._self_test() if self.config.self_test and state.step == 0 else None
        next_order = None if self.sample_order is None else self._order_samples
        for micro_batches in self.batches.steps(state.step, max_steps, next_order):
            knobs = self.curriculum.knobs(state.step)
            rate = learning_rate(self.learning_rate, state.step, max_steps)
            micro_batches = [batch.to(self.process.device) for batch in micro_batches]
            totals = self._count(micro_batches, knobs) if count_ahead else None
            for batch in micro_batches:
                objective = self.task.objective(engine.forward, batch, knobs, totals)
                engine.backward(objective.total)
                meter.add(objective)
                if self.sample_order is not None:
                    self.sample_order.recorder.add(batch, objective.output.experts_of_token or {})
            engine.step(rate, frozen=any(router.frozen(state.step) for router in routers))

            state.step += 1
            state.tokens += self.batches.tokens_of(state.step - 1)
            stats = meter.end_step(
                {
                    "step": state.step,
                    "tokens": state.tokens,
                    "learning_rate": rate,
                    "top_k": knobs.top_k,
                    "gradient_norm": engine.gradient_norm,
                },
                knobs.loss_weights,
            )
            if untrained is not None:
                self._require_expert_update(untrained, stats)
                untrained = None
            if adapting:
                self.adapt_routers(stats)
            if self.rehearsal:
                return state

            last = state.step == max_steps
            evaluate = last or state.step % self.evaluation.every_steps == 0
            save = last or state.step % self.checkpoint_every == 0
            stop = self.process.any(self.stop.requested)
            if evaluate or save or stop or state.step % self.log_every == 0:
                self._record(meter)
            improved = evaluate and self._validate()
            if save or improved or stop:
                self._save(improved)
            if stop and not last:
                raise RunStoppedError(f"stopped as asked after step {state.step}; the same command resumes the run")
            if evaluate or save:
                meter.pause()
        return state

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

    def _record(self, meter: Meter) -> None:
        """Reads the meter, writes the records, and refuses to go on without finite numbers."""
        steps, routing = meter.read()
        if self.journal is not None:
            self.journal.metrics(
                [{"split": "train", **record, **self.task.figures(record["loss"])} for record in steps]
            )
            self.journal.routing([{"step": self.state.step, "split": "train", **record} for record in routing])
        for record in steps:
            # A step may have a finite loss and a gradient that is not, which only its successors' losses would show.
            self._require_finite("training loss", record["loss"], record["step"])
            self._require_finite("gradient norm", record["gradient_norm"], record["step"])

    def _require_finite(self, name: str, value: float | None, step: int) -> None:
        if value is not None and not math.isfinite(value):  # DeepSpeed has no norm for a step that it skipped
            raise RunFailedError(
                f"step {step}: the {name} is {value}; no checkpoint was written since. "
                "Lower learning_rate.peak, or lengthen learning_rate.warmup_steps, and resume"
            )

    def _validate(self) -> bool:
        """Scores the validation split on all ranks; returns whether it is the best so far."""
        top_k_values = self.evaluation.top_k or (self.curriculum.top_k,)
        results = self.task.validate(
            [self.curriculum.evaluation_knobs(self.state.step, top_k) for top_k in top_k_values]
        )
        first = results[0]
        self._require_finite("validation loss", first.loss, self.state.step)
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
        """Writes a checkpoint together with the other ranks."""
        extra = self.sample_order.tensors() if self.sample_order is not None else {}
        files = collect(self.engine, self.process.rank, self.expert_parallel_size, self.process.device, extra)
        state = {
            "train": self.state.to_json(),
            "optimizer_steps": self.engine.optimizer_steps(),
            "world_size": self.process.world_size,
            "expert_parallel_size": self.expert_parallel_size,
            "identity": self.identity,
            "score_key": self.score_key,
            "threshold": self.curriculum.evaluation_knobs(self.state.step).threshold,
            **self.further_state,
        }
        path = self.store.save(self.state.step, files, state, best, self.tokenizer)
        if self.journal is not None:
            self.journal.note(f"checkpoint {path}{' (best so far)' if best else ''}")

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
