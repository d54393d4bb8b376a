"""Runs that go on with other processes, expert-parallel sizes and ZeRO stages than those that saved them.

Weights, moments, buffers and what else a checkpoint keeps are read back through the engine and compared bit for bit;
the samples of each later step must be the same in the same places; losses must agree with those of the run that was not
moved. Where sums are taken in another order a router may decide otherwise between two experts that are nearly alike,
and then losses have no bound: the loads of all experts in every step are compared too, and must be the same.
"""

from __future__ import annotations

import contextlib
import io
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from faults.scenario import Outcome, Scale
from support.ranks import run_ranks
from support.tiny import classification, tiny_recipe, write_examples, write_text

from smoe_train import assembly
from smoe_train.checkpoint import Checkpoint
from smoe_train.checkpoint.folders import CHECKPOINTS, step_name
from smoe_train.checkpoint.model_state import collect
from smoe_train.checkpoint.reshard import files_of
from smoe_train.cli.reshape import reshard_checkpoint
from smoe_train.config import merge
from smoe_train.data import save_tokenizer
from smoe_train.errors import RunStoppedError
from smoe_train.parallel.topology import Topology
from smoe_train.recipe import RECIPE, TOKENIZER, Recipe

EXPERTS = 4
SAVED_AT = 4
STEPS = 20  # after that
LOSS_TOLERANCE = 1e-6  # relative
PLAIN_DEEPSPEED = (
    "refuses: `loaded state dict contains a parameter group that doesn't match`, or a ZeRORuntimeException about the "
    "data-parallel world size (0.19.8, its MoE layer)"
)


@dataclass(frozen=True, order=True)
class Layout:
    """How a run is spread: processes, ranks that share one set of experts, ZeRO stage."""

    world: int
    experts: int
    zero: int = 1

    def __str__(self) -> str:
        return f"{self.world} processes, experts over {self.experts}, ZeRO {self.zero}"


LEGAL = [(world, experts) for world, experts in product((1, 2, 4), repeat=2) if world % experts == 0]
Sections = dict[str, Any]
MakeRecipe = Callable[[Layout], Recipe]


@dataclass
class Course:
    """What a run did from its checkpoint on.

    Attributes:
        losses: Of each step.
        loads: Of each step, for all layers and experts.
        samples: Of each step, (place in the global batch, number of the sample), over all ranks.
        changed: Tensors that were not read back as they were saved; rank and name.
        missing: Tensors that no rank read back.
    """

    losses: dict[int, float] = field(default_factory=dict)
    loads: dict[int, Any] = field(default_factory=dict)
    samples: dict[int, set[tuple[int, int]]] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def run(scale: Scale, folder: Path) -> list[Outcome]:
    """Moves runs between topologies."""
    text = write_text(folder / "corpus.txt")
    plain = _recipes(text, {})
    layouts = [Layout(*one) for one in LEGAL]
    if scale == "short":
        there = [Layout(1, 1, 0), Layout(1, 1, 2)]
        what = "processes, expert-parallel size and ZeRO stage"
        return [_pairs(what, plain, [Layout(2, 2)], there, folder / "plain")]
    outcomes = [_pairs("processes and expert-parallel size", plain, layouts, layouts, folder / "plain")]
    stages = [Layout(world, experts, zero) for world, experts in LEGAL for zero in (0, 2)]
    if scale == "commit":
        sources, targets = [Layout(2, 2, 0), Layout(4, 2, 2)], [Layout(1, 1, 0), Layout(4, 4, 0), Layout(2, 1, 2)]
    else:
        sources = targets = stages + layouts
    outcomes.append(_pairs("ZeRO stage too", plain, sources, targets, folder / "stages"))
    outcomes.append(_chain(plain, folder / "chain"))
    outcomes.append(_commands(folder / "plain", folder / "resharded"))
    there = [Layout(1, 1), Layout(4, 2, 2)] if scale == "commit" else layouts
    recipes = {name: _recipes(text, sections) for name, sections in _histories(folder).items()}
    return outcomes + _with_histories(recipes, Layout(2, 2), there, folder / "histories")


def _recipes(text: Path, sections: Sections) -> MakeRecipe:
    def make(layout: Layout) -> Recipe:
        values: Sections = {
            "model": {"moe": {"num_experts": EXPERTS, "router": {"type": "top_k"}, "load_balance_coefficient": 0.01}},
            # Of 8 samples a step: one process accumulates two micro-batches, more have one each.
            "training": {
                "max_steps": SAVED_AT + STEPS,
                "micro_batch_size": 2 if layout.world == 4 else 4,
                "self_test": False,
            },
            "learning_rate": {"peak": 0.003},
            "evaluation": {"every_steps": 1000, "max_tokens": 100},
            "checkpoint": {"every_steps": SAVED_AT, "keep_last": 100},
            "reporting": {"log_every_steps": 1},
            "parallel": {"expert_parallel_size": layout.experts, "zero_stage": layout.zero},
        }
        return tiny_recipe(text, layout.world, **merge(values, sections))

    return make


def _histories(folder: Path) -> dict[str, Sections]:
    """Returns recipes whose routers, or whose order of samples, depend on all steps so far."""

    def router(**options: Any) -> Sections:
        return {"model": {"moe": {"router": options}}}

    similar = {"similarity_coefficient": 0.1, "frequency": 40, "frequency_unit": "tokens", "threshold": 0.0}
    easy_first = classification(write_examples(folder / "examples"), length_window=1)
    easy_first |= {"curriculum": {"order": {"by": "mean_ratio"}}}
    adaptive = {"type": "adaptive", "target_top2_share": 0.5, "base": {"type": "top_k", "init_std": 0.3}}
    return {
        "the bias of sigmoid routing": router(type="sigmoid", bias_update_rate=0.01),
        "the second stage of StableMoE": router(type="stable_moe", stage_1_steps=SAVED_AT + 2),
        "the counters of SimSMoE": router(type="sim_smoe", min_tokens=4, **similar),
        "the counted gaps of adaptive gating": router(**adaptive),
        "a competition schedule": router(type="compete_smoe")
        | {"curriculum": {"competition": {"flip_rate": 0.4, "max_layers": 1, "warmup_steps": 5}}},
        "samples ordered by what was counted": merge(easy_first, router(**adaptive)),
    }


def _pairs(
    what: str, recipes: MakeRecipe, sources: Sequence[Layout], targets: Sequence[Layout], folder: Path
) -> Outcome:
    """Moves a run from each source to each target."""
    straight = {source: _train(recipes, source, None, folder / f"from-{_name(source)}") for source in sources}
    saved = {source: folder / f"from-{_name(source)}" / CHECKPOINTS / step_name(SAVED_AT) for source in sources}
    moved: dict[tuple[Layout, Layout], Course] = {}
    for world, experts in dict.fromkeys((one.world, one.experts) for one in targets):
        alike = [one for one in targets if (one.world, one.experts) == (world, experts)]
        jobs = [(recipes(target), saved[source]) for target in alike for source in sources]
        courses = _launch(world, jobs, folder / f"to-{world}-{experts}")
        moved |= zip(((source, target) for target in alike for source in sources), courses, strict=True)
    return _outcome(what, {pair: (course, straight[pair[0]]) for pair, course in moved.items()})


def _with_histories(
    recipes: dict[str, MakeRecipe], source: Layout, targets: Sequence[Layout], folder: Path
) -> list[Outcome]:
    """Moves runs of several recipes from one source to each target, all recipes of a place in one launch."""
    straight = _launch(source.world, [(make(source), None) for make in recipes.values()], folder / "from")
    saved = [folder / "from" / str(number) / CHECKPOINTS / step_name(SAVED_AT) for number in range(len(recipes))]
    moved = {
        target: _launch(
            target.world,
            [(make(target), path) for make, path in zip(recipes.values(), saved, strict=True)],
            folder / _name(target),
        )
        for target in targets
    }
    return [
        _outcome(
            f"processes, with {name}",
            {(source, target): (courses[number], straight[number]) for target, courses in moved.items()},
        )
        for number, name in enumerate(recipes)
    ]


def _outcome(what: str, moved: Mapping[tuple[Layout, Layout], tuple[Course, Course]]) -> Outcome:
    failures, largest = [], 0.0
    for (source, target), (course, straight) in moved.items():
        problems, difference = _compare(course, straight)
        largest = max(largest, difference)
        failures += [f"{source} -> {target}: {'; '.join(problems)}"] if problems else []
    return Outcome(
        fault=f"resumed with other {what}",
        catalogue="B2, B5, B6, B7, B9",
        tried=len(moved),
        survived=len(moved) - len(failures),
        plain_deepspeed=PLAIN_DEEPSPEED,
        failures=tuple(failures),
        measured={"largest_relative_loss_difference": largest, "steps_compared": STEPS},
    )


def _compare(course: Course, straight: Course) -> tuple[list[str], float]:
    """Returns what is not as promised of a moved run, and the largest relative difference of its losses."""
    problems = [f"{name} has changed" for name in course.changed[:3]] + [f"{one} is lost" for one in course.missing[:3]]
    steps = range(SAVED_AT + 1, SAVED_AT + STEPS + 1)
    for step in steps:
        if course.samples[step] != straight.samples[step]:
            problems.append(f"step {step} has other samples")
            break
    for step in steps:
        if course.loads[step] != straight.loads[step]:
            problems.append(f"tokens go to other experts from step {step} on")
            break
    differences = {step: abs(course.losses[step] / straight.losses[step] - 1.0) for step in steps}
    largest = max(differences.values())
    if not largest <= LOSS_TOLERANCE:
        problems.append(f"losses differ by {largest:.1e} relative")
    return problems, largest


def _chain(recipes: MakeRecipe, folder: Path) -> Outcome:
    """Moves a run three times, five steps in each place, and back; and once more without any step in between."""
    layouts = [Layout(2, 2), Layout(1, 1), Layout(4, 4), Layout(2, 2)]
    straight = _train(recipes, layouts[0], None, folder / "0")
    source = folder / "0" / CHECKPOINTS / step_name(SAVED_AT)
    failures = []
    course = Course(losses=dict(straight.losses), loads=dict(straight.loads), samples=dict(straight.samples))
    for number, layout in enumerate(layouts[1:], start=1):
        last = number == len(layouts) - 1
        there = _train(recipes, layout, source, folder / str(number), None if last else SAVED_AT + 4 * number)
        course.losses |= there.losses
        course.loads |= there.loads
        course.samples |= there.samples
        course.changed += there.changed
        course.missing += there.missing
        source = folder / str(number) / CHECKPOINTS / step_name(SAVED_AT + 4 * number)
    problems, largest = _compare(course, straight)
    failures += [f"three moves: {'; '.join(problems)}"] if problems else []
    return Outcome(
        fault="moved from 2 processes to 1, 4 and 2, with 4 steps in each place",
        catalogue="B6",
        tried=len(layouts) - 1,
        survived=len(layouts) - 1 - bool(failures),
        plain_deepspeed=PLAIN_DEEPSPEED,
        failures=tuple(failures),
        measured={"largest_relative_loss_difference": largest},
    )


def _commands(saved: Path, folder: Path) -> Outcome:
    """Rewrites checkpoints by ``checkpoint reshard`` and compares bits and files with what such ranks write."""
    failures, tried = [], 0
    for source, (world, experts) in product(("2-2-1", "4-1-1"), LEGAL):
        run_folder, output = saved / f"from-{source}", folder / f"{source}-to-{world}-{experts}"
        tried += 1
        with contextlib.redirect_stdout(io.StringIO()):
            reshard_checkpoint(run_folder, "latest", world, experts, ("training.micro_batch_size=2",), output, True)
        before = Checkpoint.open(run_folder / CHECKPOINTS / step_name(SAVED_AT + STEPS))
        after = Checkpoint.open(output / CHECKPOINTS / before.path.name)
        there = Checkpoint.open(saved / f"from-{world}-{experts}-1" / CHECKPOINTS / before.path.name)
        names = {name for name in before.tensors if not name.startswith("random/")}
        if any(after.tensor_sha256.get(name) != before.tensor_sha256[name] for name in names):
            failures.append(f"{source} to {world}, {experts}: other bits")
        topology = Topology.create(world, experts, EXPERTS)
        mine, theirs = (files_of([n for n in one.tensors if n in names], topology).keys() for one in (after, there))
        held = {name: file for name, file in after.tensors.items() if name in names}
        if mine != theirs or held != {name: file for name, file in there.tensors.items() if name in names}:
            failures.append(f"{source} to {world}, {experts}: other files than such ranks write")
    return Outcome(
        fault="rewritten by `checkpoint reshard` for another topology",
        catalogue="B5, B6",
        tried=tried,
        survived=tried - len(failures),
        plain_deepspeed="has no such tool for its MoE layer",
        failures=tuple(failures),
    )


def _train(
    recipes: MakeRecipe, layout: Layout, source: Path | None, run_folder: Path, last: int | None = None
) -> Course:
    recipe = recipes(layout)
    run_folder.mkdir(parents=True)
    (run_folder / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
    save_tokenizer(assembly.prepare_data(recipe).tokenizer(), run_folder / TOKENIZER)
    return _launch(layout.world, [(recipe, source)], run_folder, last)[0]


def _launch(
    world: int, jobs: list[tuple[Recipe, Path | None]], run_folder: Path, last: int | None = None
) -> list[Course]:
    """Does several jobs in one launch, which alone takes longer than a job."""
    ranks = run_ranks(world, _work, jobs, run_folder, last, timeout=600.0)
    return [_together(courses, source) for courses, (_, source) in zip(zip(*ranks, strict=True), jobs, strict=True)]


def _together(courses: Iterable[tuple[Course, list[str]]], source: Path | None) -> Course:
    """Returns what all ranks did as one course."""
    parts = list(courses)
    whole = parts[0][0]
    for one, _ in parts[1:]:
        for step, samples in one.samples.items():
            whole.samples[step] |= samples
        whole.changed += one.changed
    if source is not None:
        held = {name for _, names in parts for name in names}
        wanted = {name for name in Checkpoint.open(source).tensors if not name.startswith("random/")}
        whole.missing = sorted(wanted - held)
    return whole


class _Records:
    """Stands for the journal, on every rank."""

    def __init__(self, course: Course) -> None:
        self._course = course

    def metrics(self, records: list[dict[str, Any]]) -> None:
        self._course.losses |= {record["step"]: record["loss"] for record in records if record["split"] == "train"}

    def routing(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            if record["split"] == "train":
                self._course.loads.setdefault(record["step"], {})[record["layer"]] = record["load"]

    def note(self, text: str) -> None:
        """Is told of checkpoints."""


def _work(jobs: list[tuple[Recipe, Path | None]], run_folder: Path, last: int | None) -> list[tuple[Course, list[str]]]:
    """What each rank does: for each job loads the checkpoint, reads it back, and trains to the end."""
    process, done = assembly.start_process(jobs[0][0]), []
    for recipe, source in jobs:
        course, held = Course(), []
        # Checkpoints of several jobs have no place in one folder.
        folder = run_folder if len(jobs) == 1 else run_folder / str(len(done))
        folder.mkdir(parents=True, exist_ok=True)
        trainer = assembly.build_trainer(recipe, process, folder, resumes=source is not None)
        if source is not None:
            checkpoint = Checkpoint.open(source)
            assembly.check_identity(recipe, assembly.prepare_data(recipe), checkpoint)
            trainer.resume(checkpoint)
            held = _read_back(trainer, recipe, checkpoint, course)
            if len(jobs) > 1:
                trainer.checkpoint_every = 10_000
        trainer.journal = _Records(course)  # type: ignore[assignment]
        _note_samples(trainer, course, last)
        with contextlib.suppress(RunStoppedError):
            trainer.train()
        trainer.engine.close()
        done.append((course, held))
    return done


def _read_back(trainer: Any, recipe: Recipe, checkpoint: Checkpoint, course: Course) -> list[str]:
    """Compares what this rank would save with what was loaded; returns the names of its tensors."""
    extra = trainer.sample_order.tensors() if trainer.sample_order is not None else {}
    size = recipe.parallel.expert_parallel_size
    files = collect(trainer.engine, trainer.process.rank, size, trainer.process.device, extra)
    tensors = {name: value for file in files.values() for name, value in file.items() if not name.startswith("random/")}
    for name, value in tensors.items():
        expected = checkpoint.tensor(name)
        if value.dtype != expected.dtype or not torch.equal(value, expected):
            course.changed.append(f"rank {trainer.process.rank}: {name}")
    return list(tensors)


def _note_samples(trainer: Any, course: Course, last: int | None) -> None:
    """Notes the samples of each step, and asks the run to stop in the last one."""
    objective = trainer.task.objective

    def noting(forward: Any, batch: Any, *arguments: Any) -> Any:
        places = zip(batch.sample_index_B.tolist(), batch.block_B.tolist(), strict=True)
        course.samples.setdefault(trainer.state.step + 1, set()).update(places)
        if trainer.state.step + 1 == last:
            trainer.stop.signal = signal.SIGTERM
        return objective(forward, batch, *arguments)

    trainer.task.objective = noting


def _name(layout: Layout) -> str:
    return f"{layout.world}-{layout.experts}-{layout.zero}"
