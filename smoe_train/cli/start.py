"""Where a run starts: decided once, before anything is written, for every way of launching it."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smoe_train.checkpoint import Checkpoint
from smoe_train.checkpoint.folders import CHECKPOINTS, is_step_name
from smoe_train.checkpoint.manifest import NewerFormatError
from smoe_train.cli.progress_bars import shown
from smoe_train.cli.run_folder import create, store_of
from smoe_train.data import ExampleStore, Tokenizer, save_tokenizer
from smoe_train.durable import put_back
from smoe_train.errors import CheckpointError, DataError, LaunchError, RecipeError
from smoe_train.evaluation.results import RESULTS
from smoe_train.recipe import RECIPE, TOKENIZER, Recipe, flat, load_recipe
from smoe_train.reporting import METRICS, ROUTING, check_sinks
from smoe_train.training.state import TrainState

if TYPE_CHECKING:
    from smoe_train.assembly import AnyStore


@dataclass(frozen=True)
class Start:
    """A run about to be started or continued.

    Attributes:
        recipe: What it runs.
        run_folder: Where it writes.
        checkpoint: What it continues from, or None to start anew; workers verify it.
        abandoned: Checkpoints in the run folder of another timeline than that one's, which are set aside.
        changes: Settings that differ from those it was started with.
        tokenizer: The tokenizer of its data.
        reports: Whether its best checkpoint is evaluated at the end.
    """

    recipe: Recipe
    run_folder: Path
    checkpoint: Checkpoint | None
    abandoned: tuple[Path, ...]
    changes: tuple[str, ...]
    tokenizer: Tokenizer
    reports: bool = False

    @property
    def finished(self) -> bool:
        """Whether there is no step left to train, and nothing to report."""
        if self.checkpoint is None or self.checkpoint.step < self.recipe.training.max_steps:
            return False
        if TrainState.from_json(self.checkpoint.state["train"]).validated_step != self.checkpoint.step:
            return False  # stopped in the middle of its last validation
        return not self.reports or (self.run_folder / RESULTS).is_file()

    def nothing_to_do(self) -> str:
        """Returns what to tell about a finished run."""
        step = self.checkpoint.step if self.checkpoint is not None else 0
        return (
            f"run {self.run_folder}: is at step {step} of {self.recipe.training.max_steps}; nothing to do, "
            "a larger training.max_steps goes on"
        )


def decide(recipe: Recipe, run_folder: Path, resume: str, world_size: int) -> Start:
    """Checks everything that can be checked without a worker; writes nothing but the token store in the cache.

    Args:
        recipe: What to run.
        run_folder: Where.
        resume: ``auto``, ``never``, or the path of a checkpoint.
        world_size: Number of processes.

    Raises:
        SmoeError: Data, checkpoint, recipe and run folder do not fit together.
    """
    from smoe_train.assembly import build_batches, check_identity, pretrained_weights

    try:
        holds_run = (run_folder / RECIPE).exists()
    except OSError as error:  # a name that is too long, a link to itself, a dead mount
        raise LaunchError(f"{run_folder}: cannot be used: {error.strerror}; choose another --output-dir") from error
    if resume == "never" and holds_run:
        raise LaunchError(
            f"{run_folder}: holds a run already; continue it with --resume auto, choose another name=..., or remove it"
        )
    checkpoint = _starting_point(run_folder, resume, recipe.training.max_steps)
    check_sinks(recipe.reporting)
    store = _prepare(recipe, _kept_tokenizer(recipe, run_folder) if checkpoint is not None else None)
    tokenizer = store.tokenizer()
    build_batches(recipe, store, 0, world_size)
    if checkpoint is None:
        pretrained_weights(recipe, tokenizer.fingerprint)
        return Start(recipe, run_folder, None, (), (), tokenizer)
    check_identity(recipe, store, checkpoint)
    kept = store_of(run_folder)
    if resume == "auto":
        abandoned: tuple[Path, ...] = ()
    elif kept.holds(checkpoint) and is_step_name(checkpoint.path.name):
        abandoned = tuple(kept.later_than(checkpoint.step))
    else:  # none of those in the folder belongs to the timeline that begins here
        abandoned = tuple(path for path in kept.complete() if path.resolve() != checkpoint.path.resolve())
    # Another run's last checkpoint leaves nothing to train here, and so no best checkpoint to evaluate.
    reports = isinstance(store, ExampleStore) and len(store.splits) > 1 and kept.holds(checkpoint)
    return Start(recipe, run_folder, checkpoint, abandoned, _changes(recipe, run_folder), tokenizer, reports)


def begin(start: Start) -> None:
    """Writes the run folder as decided and says what is special about it; the caller holds its lock.

    Raises:
        LaunchError: The folder cannot be written.
    """
    for path in start.abandoned:
        aside = store_of(start.run_folder).set_aside(path)
        _say(f"{path.name} does not lead to where this run goes on from; it is now {aside.name}")
    if start.abandoned:
        _keep_records(start.run_folder)
    create(start.run_folder, start.recipe, keep_old=bool(start.changes))
    try:
        # They are of a shorter training: without new ones, the run would pass for finished.
        (start.run_folder / RESULTS).unlink(missing_ok=True)
        save_tokenizer(start.tokenizer, start.run_folder / TOKENIZER)
    except OSError as error:
        raise LaunchError(f"{start.run_folder}: cannot be written: {error.strerror}") from error
    for change in start.changes:
        _say(f"changed since the run was started: {change}")


def _keep_records(run_folder: Path) -> None:
    """Copies the records of a future that is given up: the run's own files go on from the checkpoint."""
    number = 1
    while any((run_folder / f"{Path(name).stem}.before-{number}.jsonl").exists() for name in (METRICS, ROUTING)):
        number += 1
    for name in (METRICS, ROUTING):
        if (run_folder / name).is_file():
            copy = run_folder / f"{Path(name).stem}.before-{number}.jsonl"
            shutil.copy2(run_folder / name, copy)
            _say(f"{name} as it was is kept as {copy.name}")


def _starting_point(run_folder: Path, resume: str, max_steps: int) -> Checkpoint | None:
    if resume == "never" or (resume == "auto" and not (run_folder / RECIPE).is_file()):
        return None
    if resume != "auto":
        if (Path(resume) / RECIPE).is_file():
            names = ", ".join(path.name for path in store_of(Path(resume)).complete()) or "it has none"
            raise CheckpointError(f"--resume {resume}: is a run folder; name one of its {CHECKPOINTS} ({names})")
        checkpoint = Checkpoint.open(Path(resume))
        checkpoint.verify()
        return checkpoint
    store = store_of(run_folder)
    put_back(store.folder)
    for path in store.complete():
        try:
            checkpoint = Checkpoint.open(path)
            if checkpoint.step >= max_steps:
                checkpoint.verify()  # no worker will: there is nothing left to do
            return checkpoint
        except NewerFormatError:
            raise
        except CheckpointError:
            continue
    leftovers = sorted(path.name for path in store.folder.glob("step-*"))
    if leftovers:
        raise CheckpointError(
            f"{run_folder}: has checkpoints but none is complete ({', '.join(leftovers)}); remove them to start again"
        )
    return None


def _kept_tokenizer(recipe: Recipe, run_folder: Path) -> Tokenizer | None:
    """Returns the tokenizer in the run folder, if the recipe describes it as it did when the run was begun."""
    from smoe_train.assembly import run_tokenizer

    try:
        before = load_recipe(str(run_folder / RECIPE), resolved=True).tokenizer
        return run_tokenizer(run_folder) if before == recipe.tokenizer else None
    except (RecipeError, DataError):
        return None


def _prepare(recipe: Recipe, tokenizer: Tokenizer | None) -> AnyStore:
    """Reads and tokenizes the data once, here, where a mistake ends in one message."""
    from smoe_train.assembly import prepare_data

    with shown():
        store = prepare_data(recipe, tokenizer)
    _say(f"data {recipe.data.source}: {_outline(store)}")
    return store


def _outline(store: AnyStore) -> str:
    if isinstance(store, ExampleStore):
        counts = ", ".join(f"{split} {len(store.split(split)):,}" for split in store.splits)
        skipped = "".join(f"; skipped {count:,}: {reason}" for reason, count in store.record.skipped.items())
        return f"{store.task.name}: examples {counts}{skipped}"
    return "tokens " + ", ".join(f"{split} {len(store.tokens(split)):,}" for split in store.splits)


def _changes(recipe: Recipe, run_folder: Path) -> tuple[str, ...]:
    """Returns which settings differ from the recipe that the run folder holds."""
    try:
        before = flat(load_recipe(str(run_folder / RECIPE), resolved=True).model_dump(mode="json"))
    except RecipeError:  # written by another version, or damaged; the checkpoint itself has been compared
        return (f"{RECIPE} of the run can no longer be read",) if (run_folder / RECIPE).is_file() else ()
    now = flat(recipe.model_dump(mode="json"))
    return tuple(
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr)
