"""Runs that the fault suite disturbs, and the undisturbed one that each must equal bit for bit."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.lives import Life, begin_run, train_rank
from support.tiny import classification, tiny_recipe, write_examples, write_text

from smoe_train.checkpoint import Checkpoint
from smoe_train.checkpoint.folders import CHECKPOINTS, complete_checkpoints
from smoe_train.cli import worker
from smoe_train.config import merge
from smoe_train.recipe import Recipe
from smoe_train.reporting import METRICS, ROUTING, Journal, read_records

WORLD_SIZE = 2
LIFE_SECONDS = 120.0
SHOWN = 4  # differences of one run
WITNESS = "witness.json"
# Wall times differ from run to run; everything else must not.
TIMES = ("step_seconds", "seconds")

Records = list[tuple[tuple[str, Any], ...]]


@dataclass(frozen=True)
class Golden:
    """A run that nobody disturbed.

    Attributes:
        recipe: What it ran.
        records: Its metrics and its routing records, bit for bit.
        files: Size and SHA-256 of every checkpoint's files, by step.
        seconds: From the fork to the end.
        first_step_seconds: From the fork to the first recorded step.
        save_seconds: From the first file of a checkpoint to its commit.
    """

    recipe: Recipe
    records: tuple[Records, Records]
    files: Mapping[int, Any]
    seconds: float
    first_step_seconds: float
    save_seconds: float


def contest_recipe(folder: Path, **sections: Any) -> Recipe:
    """Everything random and everything scheduled at once: dropout, jitter, contests, k, lengths, loss weights."""
    values: dict[str, Any] = {
        "model": {
            "dropout": 0.1,
            "moe": {"router": {"type": "compete_smoe", "jitter": 0.2}, "load_balance_coefficient": 0.01},
        },
        "curriculum": {
            "competition": {"flip_rate": 0.4, "max_layers": 1, "warmup_steps": 5},
            "top_k": {"low": 2, "high": 4},
            "sequence_length": {"low": 8, "steps": 10},
            "loss_weights": {"load_balance_loss": {"first": 1.0, "last": 0.1}},
        },
        "training": {"max_steps": 16},
        "evaluation": {"every_steps": 6, "max_tokens": 100},
    }
    return _recipe(write_text(folder / "corpus.txt"), values, sections)


def stages_recipe(folder: Path, **sections: Any) -> Recipe:
    """A router whose second stage freezes part of it, with what it learned in the first."""
    values: dict[str, Any] = {
        "model": {"dropout": 0.1, "moe": {"router": {"type": "stable_moe", "stage_1_steps": 5}}},
        "training": {"max_steps": 16},
        "evaluation": {"every_steps": 6, "max_tokens": 100},
    }
    return _recipe(write_text(folder / "corpus.txt"), values, sections)


def easy_first_recipe(folder: Path, **sections: Any) -> Recipe:
    """A classifier whose later epochs go from easy to hard, as counted before and after each resume."""
    values = classification(write_examples(folder / "examples"), dropout=0.2, length_window=1)
    values["evaluation"] |= {"every_steps": 6}
    values |= {
        "model": {
            "dropout": 0.1,
            "moe": {
                "router": {
                    "type": "adaptive",
                    "base": {"type": "top_k", "init_std": 0.3, "jitter": 0.2},
                    "threshold": 0.15,
                }
            },
        },
        "curriculum": {"order": {"by": "mean_ratio"}},
        "training": {"max_steps": 16},
    }
    return _recipe(folder, values, sections)


def _recipe(data: Path, values: dict[str, Any], sections: dict[str, Any]) -> Recipe:
    frequent = {
        "parallel": {"expert_parallel_size": 2},
        "checkpoint": {"every_steps": 2, "keep_last": 2},
        "reporting": {"log_every_steps": 1},
    }
    return tiny_recipe(data, WORLD_SIZE, **merge(merge(values, frequent), sections))


def live(run_folder: Path) -> Life:
    """Starts the ranks of a run, which go on from its newest checkpoint; rank 0 leaves word in the witness file."""
    witness = run_folder / WITNESS
    witness.unlink(missing_ok=True)

    def work() -> int:
        worker.open_journal = _witnessed(worker.open_journal, witness)  # type: ignore[attr-defined]
        worker.write_report = lambda run_folder: None  # its pictures take longer to draw than the run to train
        return train_rank(run_folder)

    return Life(WORLD_SIZE, work, run_folder / "output.txt")


def witnessed(run_folder: Path) -> dict[str, float]:
    """Returns the step that a life went on from, and when it recorded its first step, as far as it came."""
    try:
        found: dict[str, float] = json.loads((run_folder / WITNESS).read_text())
    except (OSError, ValueError):
        return {}
    return found


def _witnessed(open_journal: Any, witness: Path) -> Any:
    def opened(recipe: Recipe, run_folder: Path, resume_from_step: int | None) -> Journal:
        word: dict[str, float] = {"step": resume_from_step or 0}
        _write(witness, word)
        journal: Journal = open_journal(recipe, run_folder, resume_from_step)
        metrics = journal.metrics

        def first(records: Any) -> None:
            metrics(records)
            if "first" not in word:
                word["first"] = time.monotonic()
                _write(witness, word)

        journal.metrics = first  # type: ignore[method-assign]
        return journal

    return opened


def _write(witness: Path, word: dict[str, float]) -> None:
    part = witness.with_suffix(".part")
    part.write_text(json.dumps(word))
    part.replace(witness)


def undisturbed(recipe: Recipe, run_folder: Path) -> Golden:
    """Trains a recipe to its end and keeps every checkpoint.

    Raises:
        AssertionError: It did not get there.
    """
    begin_run(replace_keep_last(recipe, 10_000), run_folder)
    life = live(run_folder)
    saves: list[float] = []
    began: dict[str, float] = {}

    def watch() -> bool:
        now, names = time.monotonic(), in_writing(run_folder)
        for name in names - began.keys():
            began[name] = now
        saves.extend(now - began.pop(name) for name in began.keys() - names)
        return False

    assert life.wait(LIFE_SECONDS, watch), "the undisturbed run hangs"
    seconds = time.monotonic() - life.started
    assert life.codes == [0] * WORLD_SIZE, (run_folder / "output.txt").read_text()[-2000:]
    files = {}
    for path in complete_checkpoints(run_folder / CHECKPOINTS):
        checkpoint = Checkpoint.open(path)
        files[checkpoint.step] = checkpoint.files
    first = witnessed(run_folder)["first"] - life.started
    return Golden(recipe, records_of(run_folder), files, seconds, first, sorted(saves)[len(saves) // 2])


def replace_keep_last(recipe: Recipe, keep_last: int) -> Recipe:
    """Returns a recipe that keeps so many checkpoints."""
    return recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"keep_last": keep_last})})


def in_writing(run_folder: Path) -> set[str]:
    """Returns the names of checkpoints that are being written, or that a kill left half written."""
    folder = run_folder / CHECKPOINTS
    return {path.name for path in folder.glob(".t*-*")} if folder.is_dir() else set()


def records_of(run_folder: Path) -> tuple[Records, Records]:
    """Returns metrics and routing records without times, floats as hexadecimal texts."""
    return _bits(run_folder / METRICS), _bits(run_folder / ROUTING)


def _bits(path: Path) -> Records:
    if not path.is_file():
        return []
    return [
        tuple((key, _hex(value)) for key, value in sorted(record.items()) if key not in TIMES)
        for record in read_records(path)
    ]


def _hex(value: Any) -> Any:
    if isinstance(value, float):
        return value.hex()
    return tuple(_hex(item) for item in value) if isinstance(value, list) else value


def differences(run_folder: Path, golden: Golden, finished: bool) -> list[str]:
    """Returns in which ways a run is not the undisturbed one, as far as it has come.

    Args:
        run_folder: Of the run, in which no process is left.
        golden: The undisturbed run.
        finished: Whether it should have come to the end.
    """
    found: list[str] = []
    for name, mine, theirs in zip(("metrics", "routing"), records_of(run_folder), golden.records, strict=True):
        expected = theirs if finished else theirs[: len(mine)]
        if mine != expected:
            place = next((n for n, pair in enumerate(zip(mine, expected, strict=False)) if pair[0] != pair[1]), None)
            text = f"record {place} differs" if place is not None else f"{len(mine)} records, not {len(expected)}"
            found.append(f"{name}: {text}")
    for path in complete_checkpoints(run_folder / CHECKPOINTS):
        checkpoint = Checkpoint.open(path)
        checkpoint.verify()
        if checkpoint.files != golden.files[checkpoint.step]:
            found.append(f"{path.name}: other tensors than the undisturbed run's")
    if finished:
        if newest_step(run_folder) != golden.recipe.training.max_steps:
            found.append(f"the newest checkpoint is of step {newest_step(run_folder)}")
        left = sorted(path.name for path in run_folder.rglob(".t*-*"))
        found += [f"leftovers: {', '.join(left)}"] if left else []
    return [*found[:SHOWN], f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else found


def newest_step(run_folder: Path) -> int:
    """Returns the step of the newest complete checkpoint, 0 if there is none."""
    paths = complete_checkpoints(run_folder / CHECKPOINTS) if (run_folder / CHECKPOINTS).is_dir() else []
    return Checkpoint.open(paths[0]).step if paths else 0
