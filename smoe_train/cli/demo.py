"""``demo``: one real run on text that is on every machine, told from the launch to the result."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from smoe_train.checkpoint.folders import step_name
from smoe_train.cli.run_folder import store_of
from smoe_train.cli.train import TrainOptions, train
from smoe_train.recipe import Recipe, load_recipe
from smoe_train.reporting import METRICS, read_records, write_environment, write_report
from smoe_train.reporting.environment import ENVIRONMENT

RECIPE = "demo"
NPROC = 2

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip -9": lambda text: gzip.compress(text, 9),
    "bzip2 -9": lambda text: bz2.compress(text, 9),
    "xz -9e": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
}


def demo(output_dir: Path, overrides: tuple[str, ...]) -> int:
    """Trains the demo recipe, prints the result beside what compressors reach, and says what to try next.

    A demo that was interrupted is resumed; after a finished one the next gets a folder of its own.
    """
    recipe = load_recipe(RECIPE, overrides, NPROC)
    name = _next_name(recipe, output_dir)
    overrides = (*overrides, f"name={name}")
    run_folder = output_dir / name
    console = Console(stderr=True)
    console.print(f"[bold]smoe-train train {RECIPE} --nproc {NPROC} name={name}[/bold]\n{recipe.description}")
    started = time.monotonic()
    code = train(TrainOptions(RECIPE, overrides, NPROC, "auto", None, "auto", output_dir))
    if code:
        return code
    seconds = time.monotonic() - started
    levels = baselines(recipe)
    _add_to_report(run_folder, levels)
    _print_result(recipe, run_folder, levels, seconds)
    return 0


def _next_name(recipe: Recipe, output_dir: Path) -> str:
    names = [recipe.name, *(f"{recipe.name}-{number}" for number in range(2, 1000))]
    return next(name for name in names if not _finished(output_dir / name, recipe.training.max_steps))


def _finished(run_folder: Path, max_steps: int) -> bool:
    return any(path.name == step_name(max_steps) for path in store_of(run_folder).complete())


def _add_to_report(run_folder: Path, levels: dict[str, float]) -> None:
    """Draws what compressors reach into the report."""
    path = run_folder / ENVIRONMENT
    surroundings = json.loads(path.read_text(encoding="utf-8"))
    write_environment(run_folder, {**surroundings, "baselines": levels})
    write_report(run_folder)


def baselines(recipe: Recipe) -> dict[str, float]:
    """Returns the bits per byte that compressors need for the validation split alone."""
    from smoe_train.data import prepare

    last = recipe.evaluation.max_tokens
    text = prepare(recipe.data, recipe.tokenizer).tokens("valid")[: None if last is None else last + 1].tobytes()
    return {name: 8 * len(compress(text)) / len(text) for name, compress in COMPRESSORS.items()}


def _print_result(recipe: Recipe, run_folder: Path, levels: dict[str, float], seconds: float) -> None:
    top_k = (recipe.evaluation.top_k or (recipe.model.moe.top_k,))[0]
    records = [
        record
        for record in read_records(run_folder / METRICS)
        if record.get("split") == "valid" and record.get("top_k") == top_k
    ]
    best = min(float(record["bits_per_byte"]) for record in records)
    table = Table("", "bits per byte", title="validation text")
    table.add_row("this model, final", f"{float(records[-1]['bits_per_byte']):.3f}", style="bold")
    table.add_row("this model, best", f"{best:.3f}")
    for name, value in levels.items():
        table.add_row(name, f"{value:.3f}")
    Console().print(table)
    trained = recipe.training.max_steps * recipe.training.global_batch_size * recipe.training.sequence_length
    print(
        f"{trained:,} tokens; this command took {seconds:.0f} s, start-up and validation included\n"
        f"report: {run_folder / 'report' / 'report.html'}\n"
        "\nwhat to try next (smoe-train is in .venv/bin after `make demo`):\n"
        f"  smoe-train generate {run_folder} --prompt 'The with statement'\n"
        f"  smoe-train evaluate {run_folder} --top-k 1,2,4,8\n"
        f"  smoe-train train {RECIPE} --nproc {NPROC} name=demo-top-k model.moe.router.type=top_k\n"
        f"  smoe-train train {RECIPE} --nproc {NPROC} name=longer training.max_steps={3 * recipe.training.max_steps}\n"
        "  smoe-train recipes list"
    )
