"""Numbers that are not finite, spikes and collapsed routers, on one of two ranks that share the experts."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from faults.lives import Life, begin_run, train_rank
from faults.runs import LIFE_SECONDS, TIMES, WORLD_SIZE, newest_step
from faults.scenario import Outcome, Scale
from faults.spoilt import (
    PLACES,
    POISONED_RANK,
    Fault,
    change_assignments,
    change_objective,
    during,
    poison,
    times,
)
from support.tiny import tiny_recipe, write_text

from smoe_train.checkpoint import Checkpoint
from smoe_train.checkpoint.folders import CHECKPOINTS, complete_checkpoints
from smoe_train.cli import worker
from smoe_train.config import merge
from smoe_train.recipe import Recipe
from smoe_train.reporting import METRICS, read_records
from smoe_train.training.trainer import Trainer

MAX_STEPS = 8
RANDOM_TRIES = {"short": 0, "commit": 0, "nightly": 200}
CLEAN = "undisturbed"

PLAIN_DEEPSPEED = (
    "fp32 with ZeRO 0: the weights are NaN from then on, the run ends with exit code 0 and `latest` names a checkpoint "
    "full of NaN; no module and no rank is named (tried by hand with 0.19.8)"
)


@dataclass
class Tally:
    """What the tries of one line came to."""

    fault: str
    catalogue: str = "C5"
    plain_deepspeed: str = "trains on: it looks at neither losses nor routers"
    tried: int = 0
    failures: list[str] = field(default_factory=list)

    def note(self, name: str, problems: Sequence[str]) -> None:
        """Counts a try."""
        self.tried += 1
        if problems:
            self.failures.append(f"{name}: {'; '.join(problems)}")

    def outcome(self) -> Outcome:
        """Returns the line of the table."""
        return Outcome(
            self.fault,
            self.catalogue,
            self.tried,
            survived=self.tried - len(self.failures),
            plain_deepspeed=self.plain_deepspeed,
            failures=tuple(self.failures),
        )


def run(scale: Scale, folder: Path) -> list[Outcome]:
    """Spoils runs at five places and by random, makes them spike and collapse, and damages weights."""
    bench = Bench(folder)
    if scale == "short":
        return [_not_finite(bench, "skip", [Try("an expert's output", 5, math.nan, 1)]).outcome()]
    few = {"skip": 5, "rollback": 3, "stop": 2}  # at every commit; all places with each at night
    tallies = [
        _not_finite(bench, action, _every_place()[-count:] if scale == "commit" else _every_place())
        for action, count in few.items()
    ]
    tallies += [_persisting(bench), _damaged_weights(bench, scale), _spikes(bench), _collapses(bench)]
    if RANDOM_TRIES[scale]:
        tallies.append(_not_finite(bench, "any", _random_tries(RANDOM_TRIES[scale])))
    return [tally.outcome() for tally in tallies]


@dataclass(frozen=True)
class Try:
    """One number that is spoilt in one step on one rank."""

    place: str
    step: int
    value: float
    zero_stage: int

    @property
    def name(self) -> str:
        """How to find it again."""
        return f"{self.place} {self.value} in step {self.step}, ZeRO {self.zero_stage}"


@dataclass(frozen=True)
class Ended:
    """A launch that has come to its end."""

    folder: Path
    codes: list[int | None]
    output: str

    def problems(self, code: int, *said: str) -> list[str]:
        """Returns in which ways it did not end as promised: exit code, words, and what its checkpoints hold."""
        found = (
            [] if self.codes == [code] * WORLD_SIZE else [f"exit codes {self.codes}, not {code}: {self.output[-400:]}"]
        )
        flat = " ".join(self.output.split())
        found += [f"does not say {words!r}: {flat[-400:]}" for words in said if words not in flat]
        return found + [f"{path.name} holds numbers that are not finite" for path in self.unsound()]

    def unsound(self) -> Iterator[Path]:
        """Yields the checkpoints that hold weights or moments which are not finite."""
        for path in complete_checkpoints(self.folder / CHECKPOINTS):
            checkpoint = Checkpoint.open(path)
            checkpoint.verify()
            kept = [name for name in checkpoint.tensors if name.startswith(("weight/", "exp_avg"))]
            if not all(bool(checkpoint.tensor(name).isfinite().all()) for name in kept):
                yield path

    def steps(self) -> list[dict[str, Any]]:
        """Returns the training records."""
        return [one for one in read_records(self.folder / METRICS) if one["split"] == "train"]

    def state(self, step: int) -> Mapping[str, str]:
        """Returns the digests of a checkpoint's weights, moments and buffers, equal to no other's if it is missing."""
        for path in complete_checkpoints(self.folder / CHECKPOINTS):
            checkpoint = Checkpoint.open(path)
            if checkpoint.step == step:
                digests = checkpoint.tensor_sha256.items()
                return {name: digest for name, digest in digests if not name.startswith("random/")}
        return {"missing": str(self.folder)}


class Bench:
    """Runs of one small model, of which the undisturbed and the skipping ones are kept to compare others with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = write_text(folder / "corpus.txt")
        self._kept: dict[str, Ended] = {}
        self._numbers = itertools.count()

    def recipe(self, **sections: Any) -> Recipe:
        """Returns a recipe that saves every step."""
        values: dict[str, Any] = {
            "model": {"dropout": 0.1, "moe": {"router": {"type": "top_k"}}},
            "training": {"max_steps": MAX_STEPS},
            "parallel": {"expert_parallel_size": 2},
            "checkpoint": {"every_steps": 1, "keep_last": 100},
            "evaluation": {"every_steps": 100, "max_tokens": 100},
            "reporting": {"log_every_steps": 1},
        }
        return tiny_recipe(self.text, WORLD_SIZE, **merge(values, sections))

    def train(self, recipe: Recipe, fault: Fault | None, run_folder: Path | None = None) -> Ended:
        """Runs a recipe with a fault in it to its end, or goes on with one."""
        run_folder = run_folder or self.folder / f"run-{next(self._numbers)}"
        begin_run(recipe, run_folder)

        def work() -> int:
            build = worker.build_trainer  # type: ignore[attr-defined]

            def build_faulty(*arguments: Any, **options: Any) -> Trainer:
                trainer: Trainer = build(*arguments, **options)
                if fault is not None:
                    fault(trainer)
                return trainer

            worker.build_trainer = build_faulty  # type: ignore[attr-defined]
            worker.write_report = lambda run_folder: None  # its pictures take longer to draw than the run to train
            return train_rank(run_folder)

        output = run_folder / "output.txt"
        output.unlink(missing_ok=True)
        life = Life(WORLD_SIZE, work, output)
        if not life.wait(LIFE_SECONDS):
            life.kill()
            life.wait(LIFE_SECONDS)
        return Ended(run_folder, life.codes, output.read_text())

    def kept(self, name: str, recipe: Recipe, fault: Fault | None) -> Ended:
        """Returns a run that others are compared with; it is made once."""
        if name not in self._kept:
            self._kept[name] = self.train(recipe, fault)
        return self._kept[name]

    def differences(self, ended: Ended, reference: Ended, apart_from: int | None = None) -> list[str]:
        """Returns whether weights and moments at the end, or the record of a step but one, differ by a bit."""
        same = ended.state(MAX_STEPS) == reference.state(MAX_STEPS)
        found = [] if same else ["ends with other weights or moments than it should"]
        mine, theirs = (
            [_bits(record) for record in one.steps() if record["step"] != apart_from] for one in (ended, reference)
        )
        return found if mine == theirs else [*found, "its records are not those that they should be"]


def _bits(record: Mapping[str, Any]) -> dict[str, str]:
    return {key: repr(value) for key, value in record.items() if key not in TIMES}


# Steps that are not finite


def _every_place() -> list[Try]:
    """Each place once, with NaN and infinity, early and late, under all ZeRO stages in turn."""
    return [
        Try(place, 2 + number, math.nan if number % 2 else math.inf, number % 3) for number, place in enumerate(PLACES)
    ]


def _random_tries(count: int) -> list[Try]:
    draw = random.Random(9)
    return [
        Try(
            draw.choice(list(PLACES)),
            draw.randint(2, MAX_STEPS - 1),
            draw.choice([math.nan, math.inf]),
            draw.randrange(3),
        )
        for _ in range(count)
    ]


def _not_finite(bench: Bench, action: str, tries: Sequence[Try]) -> Tally:
    what = {
        "skip": "skipped",
        "rollback": "gone back behind",
        "stop": "stopped at, then resumed",
        "any": "skipped, gone back behind or stopped at, in turn",
    }[action]
    tally = Tally(f"NaN or infinity on one rank of two at {len({one.place for one in tries})} places, {what}")
    tally.plain_deepspeed = PLAIN_DEEPSPEED
    actions = itertools.cycle(["skip", "rollback", "stop"] if action == "any" else [action])
    for one, how in zip(tries, actions, strict=False):
        tally.note(f"{how}, {one.name}", _one_not_finite(bench, how, one))
    return tally


def _one_not_finite(bench: Bench, action: str, one: Try) -> list[str]:
    parallel = {"parallel": {"zero_stage": one.zero_stage}}
    recipe = bench.recipe(**parallel, health={"non_finite": {"action": action}})
    fault = poison(one.place, one.value, {one.step})
    said = (
        f"step {one.step}: the loss or the gradient is not finite: first on rank {POISONED_RANK}, {PLACES[one.place]}"
    )
    if action == "stop":
        ended = bench.train(recipe, fault)
        found = ended.problems(1, said)
        if newest_step(ended.folder) != one.step - 1:
            found.append(f"the newest checkpoint is of step {newest_step(ended.folder)}, not {one.step - 1}")
        resumed = bench.train(recipe, None, ended.folder)
        clean = bench.kept(f"{CLEAN}, ZeRO {one.zero_stage}", bench.recipe(**parallel), None)
        return found + clean.problems(0) + resumed.problems(0) + bench.differences(resumed, clean)
    skipped = bench.kept(one.name, bench.recipe(**parallel), fault)
    if action == "skip":
        found = skipped.problems(0, said)
        if skipped.state(one.step) != skipped.state(one.step - 1):
            found.append("the step has changed weights, moments or routers")
        if skipped.state(one.step + 1) == skipped.state(one.step):
            found.append("the step after it has changed nothing")
        bad = [record["step"] for record in skipped.steps() if not math.isfinite(record["loss"])]
        marked = [record["step"] for record in skipped.steps() if record.get("skipped")]
        wrong = marked != [one.step] or not set(bad) <= {one.step}
        return [*found, f"skipped {marked}, not finite {bad}"] if wrong else found
    ended = bench.train(recipe, fault)
    return ended.problems(0, said, "going back to a checkpoint") + bench.differences(ended, skipped)


def _persisting(bench: Bench) -> Tally:
    """A fault in every step from one on: as many as the recipe allows, then the end; and it must not begin anew."""
    tally = Tally("NaN in every step from one on: the run ends after 3 in a row and is resumable")
    tally.plain_deepspeed = PLAIN_DEEPSPEED
    clean = bench.kept(f"{CLEAN}, ZeRO 1", bench.recipe(), None)
    for action in ("skip", "rollback"):
        recipe = bench.recipe(health={"non_finite": {"action": action}})
        ended = bench.train(recipe, poison("the loss", math.nan, {*range(5, 99)}))
        found = ended.problems(1, "step 7: the loss or the gradient is not finite, for the 3rd time in a row")
        resumed = bench.train(recipe, None, ended.folder)
        found += resumed.problems(0)
        if action == "skip" and resumed.state(4) != clean.state(4):
            found.append("differs before the fault")
        tally.note(action, found)
    return tally


def _damaged_weights(bench: Bench, scale: Scale) -> Tally:
    """A weight of each expert of one rank becomes infinite in memory between two steps, as by flipped bits."""
    tally = Tally("weights in memory become infinite: named with their experts, never saved; a rollback repairs them")
    tally.plain_deepspeed = PLAIN_DEEPSPEED
    clean = bench.kept(f"{CLEAN}, ZeRO 1", bench.recipe(), None)
    name, when = "model.layers.1.moe.bank.experts.w_in", 5

    def damage(trainer: Trainer) -> None:
        if trainer.process.rank != POISONED_RANK:
            return
        done, now = [False], during(trainer, {when})

        def flip(module: Any, inputs: Any) -> None:
            if now() and not done[0]:
                done[0] = True
                with torch.no_grad():
                    module.get_parameter(name)[:, 0, 0] = math.inf  # of any: not each has tokens

        trainer.model.register_forward_pre_hook(flip)

    said = f"first on rank {POISONED_RANK}, the weight {name} of experts 4, 5, 6, 7 ("
    for zero_stage in (0, 1) if scale == "commit" else (0, 1, 2):
        parallel = {"parallel": {"zero_stage": zero_stage}}
        back = bench.recipe(**parallel, health={"non_finite": {"action": "rollback"}})
        ended = bench.train(back, damage)
        skipped = bench.kept(
            f"step {when} left out, ZeRO {zero_stage}", bench.recipe(**parallel), poison("the loss", math.nan, {when})
        )
        # The loss of the step that is left out is finite now.
        found = ended.problems(0, said) + bench.differences(ended, skipped, apart_from=when)
        tally.note(f"rollback, ZeRO {zero_stage}", found)
    stop = bench.train(bench.recipe(health={"non_finite": {"action": "stop"}}), damage)
    found = stop.problems(1, said)
    resumed = bench.train(bench.recipe(), None, stop.folder)
    tally.note("stop and resume", found + resumed.problems(0) + bench.differences(resumed, clean))
    return tally


# Alarms


def _spikes(bench: Bench) -> Tally:
    """Two steps whose loss, and with it the gradient, is five times as large."""
    tally = Tally("two steps with five times the loss: warned of, stopped at, or gone back behind")
    steps = {6, 7}

    def spike(trainer: Trainer) -> None:
        change_objective(trainer, lambda found: times(5.0, found), during(trainer, steps))

    for action in ("warn", "stop", "rollback"):
        options = {"action": action, "window_steps": 8, "in_a_row": 2}
        recipe = bench.recipe(health={"loss_spike": options}, reporting={"log_every_steps": 7})
        ended = bench.train(recipe, spike)
        found = ended.problems(3 if action == "stop" else 0, "step 7: the loss", "robust standard deviations above")
        if action == "rollback":
            left_out = bench.kept("steps 6 and 7 left out", bench.recipe(), poison("the loss", math.nan, steps))
            if ended.state(MAX_STEPS) != left_out.state(MAX_STEPS):
                found.append("ends with other weights than a run without these steps")
        if action != "stop" and ended.output.count("robust standard") != 1:
            found.append(f"says so {ended.output.count('robust standard')} times")
        tally.note(action, found)
    calm = bench.recipe(health={"loss_spike": {"action": "stop", "window_steps": 8, "in_a_row": 2}})
    tally.note("no spike, no alarm", bench.train(calm, None).problems(0))
    return tally


def _collapses(bench: Bench) -> Tally:
    """From one step on, one router sends every token to the same two experts."""
    tally = Tally("a router sends every token to two experts of eight: warned of, stopped at, or gone back behind")
    limits = {"patience_steps": 2, "dead_experts": 0.5, "imbalance": None, "entropy_below": None}
    said = "layer 1: experts 2, 3, 4, 5, 6, 7 of 8 have received no token, since step 3"

    def collapse(first: int, last: int) -> Fault:
        def install(trainer: Trainer) -> None:
            def same(found: Any) -> Any:
                experts = torch.arange(found.expert_ids_TK.shape[1]).expand_as(found.expert_ids_TK)
                return replace(found, expert_ids_TK=experts.contiguous())

            change_assignments(trainer.model.routers()[1], same, during(trainer, range(first, last + 1)))

        return install

    for action, last, code in (("warn", 99, 0), ("stop", 99, 3), ("rollback", 4, 0), ("rollback", 99, 3)):
        recipe = bench.recipe(health={"router_collapse": {"action": action, **limits}}, training={"max_steps": 12})
        ended = bench.train(recipe, collapse(3, last))
        end = ["3 rollbacks have not helped"] if (action, code) == ("rollback", 3) else []
        found = ended.problems(code, said, *end)
        if code == 0 and newest_step(ended.folder) != 12:
            found.append(f"ends at step {newest_step(ended.folder)}")
        tally.note(f"{action}, collapsed until step {last}", found)
    return tally
