"""Times what a checkpoint costs a run: saving in the background, saving while training waits, and not saving, in turn.

One run of the trainer is cut into windows of some steps; each begins with a save in the background, a save that is
waited for, or none, in an order that rotates, so that a busy machine disturbs all three alike. Figures are medians; the
slowdown is the median over rounds of the ratio to the steps without a save within a round. Reported are the stall (how
long training waits where it saves), the share of the wall time that this is at a save every 100 steps, and how much
longer the steps take that a save in the background overlaps. That thread hashes and writes on a core of the host: with
--threads as many as there are cores, training competes with it, as it does not on an accelerator; by default one core
is left to it.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_rounds import add_whole_numbers, conclude, require_positive

if TYPE_CHECKING:
    from smoe_train.training.trainer import Trainer

BACKGROUND, WAITING, NONE = "background", "waiting", "none"
MODES = (BACKGROUND, WAITING, NONE)
EVERY_STEPS = 100
# At most: of the wall time at a save every 100 steps; and of a step that a save overlaps.
STALL_SHARE, SLOWDOWN = 0.01, 0.05


@dataclass
class Window:
    """Steps from one place where a run may save to the next.

    Attributes:
        mode: How it saved there.
        round: Which of the rounds, in each of which every mode has its turn.
        stall_seconds: How long training waited for that.
        steps: Seconds of each later step.
        overlapped: Of each, whether a save was still under way when it began.
    """

    mode: str
    round: int
    stall_seconds: float
    steps: list[float] = field(default_factory=list)
    overlapped: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One way to save.

    Attributes:
        mode: Which.
        stall_seconds: Median time that training waits.
        step_seconds: Median time of a step that no save overlaps.
        overlapped_steps: Median number of steps that a save overlaps.
        overlapped_step_seconds: Median time of such a step.
        stall_share: Stall of the wall time at a save every 100 steps.
        cost_share: The same with what overlapped steps take longer.
    """

    mode: str
    stall_seconds: float
    step_seconds: float
    overlapped_steps: float
    overlapped_step_seconds: float
    stall_share: float
    cost_share: float


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_whole_numbers(
        parser,
        {
            "d-model": 256,
            "layers": 4,
            "experts": 8,
            "d-ff": 512,
            "sequence-length": 256,
            "batch": 8,
            "window": 8,
            "rounds": 5,
            "warmup": 3,
            "threads": max(1, (os.cpu_count() or 2) - 1),
        },
    )
    parser.add_argument("--folder", type=Path, help="where to save; a temporary folder if not given")
    options = parser.parse_args(arguments)
    require_positive(parser, options, "all numbers must be at least 1")
    return options


def build(options: argparse.Namespace, folder: Path, windows: int) -> Trainer:
    """Returns a trainer of one rank, on text made here."""
    from smoe_train.assembly import build_trainer, start_process
    from smoe_train.config import Layered
    from smoe_train.recipe import check_recipe

    text = folder / "corpus.txt"
    state, words = 1, []
    for _ in range(50_000):
        state = (1103515245 * state + 12345) % 2**31
        words.append(f"{state >> 16 & 0xFFF:x}")
    text.write_text(" ".join(words), encoding="utf-8")
    steps = options.warmup + windows * options.window
    values: dict[str, Any] = {
        "version": 1,
        "name": "bench-save",
        "data": {"source": "text", "path": str(text)},
        "model": {
            "d_model": options.d_model,
            "num_layers": options.layers,
            "num_heads": 4,
            "moe": {"num_experts": options.experts, "d_ff": options.d_ff, "top_k": 2},
        },
        "training": {
            "max_steps": steps,
            "sequence_length": options.sequence_length,
            "micro_batch_size": options.batch,
            "global_batch_size": options.batch,
            "self_test": False,
        },
        "learning_rate": {"peak": 1e-4},
        "evaluation": {"every_steps": steps, "max_tokens": options.sequence_length},
        "checkpoint": {"every_steps": 1, "keep_last": 1},
        "reporting": {"log_every_steps": options.window},
        "parallel": {"engine": "local"},
    }
    recipe = check_recipe(Layered(values), "bench-save", 1)
    return build_trainer(recipe, start_process(recipe), folder)


def measure(trainer: Trainer, options: argparse.Namespace) -> list[Window]:
    """Trains, and returns what each window took; the warm-up and a last window without an end are left out."""
    windows: list[Window] = []
    began: list[tuple[float, bool]] = []
    save: Callable[..., None] = trainer.saver.save

    def beat(phase: str | None = None) -> None:
        if phase != "train":
            return
        now = time.perf_counter()
        if began and windows:
            started, overlapped = began[-1]
            windows[-1].steps.append(now - started)
            windows[-1].overlapped.append(overlapped)
        began.append((now, trainer.store.saving))

    def save_or_not(step: int, *arguments: Any) -> None:
        number, into = divmod(step - options.warmup, options.window)
        if number < 0 or into:
            return
        # What began before belongs to the window before; the step that ends here is not timed, for it holds the stall.
        turn = number // len(MODES)
        mode = MODES[(number + turn) % len(MODES)]
        trainer.saver.settle()
        trainer.saver.background = mode == BACKGROUND
        started = time.perf_counter()
        if mode != NONE:
            save(step, *arguments)
        windows.append(Window(mode, turn, time.perf_counter() - started))
        began.clear()

    trainer.beat = beat
    trainer.saver.save = save_or_not  # type: ignore[method-assign, assignment]
    trainer.train()
    return [window for window in windows if len(window.steps) >= options.window - 2]


def rows_of(windows: list[Window]) -> list[Row]:
    """Returns one row a mode."""
    base = statistics.median(seconds for window in windows if window.mode == NONE for seconds in window.steps)
    rows = []
    for mode in MODES:
        mine = [window for window in windows if window.mode == mode]
        pairs = [pair for window in mine for pair in zip(window.steps, window.overlapped, strict=True)]
        overlapped = [seconds for seconds, under_way in pairs if under_way]
        stall = statistics.median(window.stall_seconds for window in mine) if mode != NONE else 0.0
        count = statistics.median(sum(window.overlapped) for window in mine)
        slow = statistics.median(overlapped) if overlapped else 0.0
        cost = stall + count * max(0.0, slow - base)
        alone = statistics.median([seconds for seconds, under_way in pairs if not under_way] or [base])
        shares = (part / (EVERY_STEPS * base + part) for part in (stall, cost))
        rows.append(Row(mode, stall, alone, count, slow, *shares))
    return rows


def slowdown_of(windows: list[Window]) -> float:
    """Returns how much longer a step takes that a save in the background overlaps, 0 if no save is that long."""
    ratios = []
    for number in {window.round for window in windows}:
        saved, base = (
            [
                seconds
                for window in windows
                if (window.round, window.mode) == (number, mode)
                for seconds, under_way in zip(window.steps, window.overlapped, strict=True)
                if under_way == (mode == BACKGROUND)
            ]
            for mode in (BACKGROUND, NONE)
        )
        if saved and base:
            ratios.append(statistics.median(saved) / statistics.median(base) - 1)
    return statistics.median(ratios) if ratios else 0.0


def goals_of(rows: list[Row], slowdown: float) -> dict[str, dict[str, float]]:
    """Returns what was to be reached, at most, and what was."""
    saved = next(row for row in rows if row.mode == BACKGROUND)
    return {
        "background_stall_share_at_most": {"value": round(saved.stall_share, 5), "goal": STALL_SHARE},
        "overlapped_step_slowdown_at_most": {"value": round(slowdown, 4), "goal": SLOWDOWN},
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures everything and returns the result as JSON holds it."""
    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        os.environ.setdefault("SMOE_TRAIN_CACHE", str(folder / "cache"))
        trainer = build(options, folder, options.rounds * len(MODES))
        windows = measure(trainer, options)
        newest = trainer.store.complete()[0]
        size = sum(path.stat().st_size for path in newest.iterdir())
    rows = rows_of(windows)
    settings = {
        **{name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "checkpoint_bytes": size,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    return {"goals": goals_of(rows, slowdown_of(windows)), "rows": [asdict(row) for row in rows], "settings": settings}


def show(result: dict[str, Any]) -> None:
    """Prints the result as a table."""
    from rich.console import Console
    from rich.table import Table

    settings, console = result["settings"], Console()
    console.print(
        f"checkpoint of {settings['checkpoint_bytes'] / 1e6:.0f} MB, {settings['threads']} of {settings['cores']} "
        f"cores train; medians of {settings['rounds']} windows each",
        soft_wrap=True,
    )
    table = Table(
        "save", "stall, s", "step, s", "steps overlapped", "such a step, s", "stall, every 100", "cost, every 100"
    )
    for row in result["rows"]:
        overlapped = f"{row['overlapped_step_seconds']:.3f}" if row["overlapped_steps"] else "-"
        table.add_row(
            row["mode"],
            f"{row['stall_seconds']:.3f}",
            f"{row['step_seconds']:.3f}",
            f"{row['overlapped_steps']:.0f}",
            overlapped,
            f"{row['stall_share']:.2%}",
            f"{row['cost_share']:.2%}",
        )
    console.print(table)
    for name, item in result["goals"].items():
        verdict = "reached" if item["value"] <= item["goal"] else "missed"
        console.print(f"goal {name}: {item['value']:.2%} (at most {item['goal']:.0%}): {verdict}")


def main() -> int:
    """Measures, prints, and writes the file that BENCH_JSON names."""
    options = parse()
    return conclude(options, options.threads, run, show)


if __name__ == "__main__":
    sys.exit(main())
