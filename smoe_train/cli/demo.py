"""``demo``: one real run on text that is on every machine, told from the launch to the result."""

from __future__ import annotations

import bz2
import gzip
import lzma
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from smoe_train.cli.train import TrainOptions, train
from smoe_train.recipe import Recipe, load_recipe

RECIPE = "demo"
NPROC = 2

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip -9": lambda text: gzip.compress(text, 9),
    "bzip2 -9": lambda text: bz2.compress(text, 9),
    "xz -9e": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
}


def demo(output_dir: Path, overrides: tuple[str, ...]) -> int:
    """Trains the demo recipe, prints the result beside what compressors reach, and says what to try next."""
    recipe = load_recipe(RECIPE, overrides, NPROC)
    run_folder = output_dir / recipe.name
    console = Console(stderr=True)
    console.print(f"[bold]smoe-train train {RECIPE} --nproc {NPROC}[/bold]   ({recipe.description})")
    started = time.monotonic()
    code = train(TrainOptions(RECIPE, overrides, NPROC, "auto", None, "auto", output_dir))
    if code:
        return code
    _print_result(recipe, run_folder, time.monotonic() - started)
    return 0


def baselines(recipe: Recipe) -> dict[str, float]:
    """Returns the bits per byte that compressors need for the validation split alone."""
    from smoe_train.data import prepare

    text = prepare(recipe.data, recipe.tokenizer).tokens("valid").tobytes()
    return {name: 8 * len(compress(text)) / len(text) for name, compress in COMPRESSORS.items()}


def _print_result(recipe: Recipe, run_folder: Path, seconds: float) -> None:
    from smoe_train.reporting import METRICS, read_records

    records = [record for record in read_records(run_folder / METRICS) if record.get("split") == "valid"]
    best = min(float(record["bits_per_byte"]) for record in records)
    table = Table("bits per byte of the validation text", "", title="result")
    table.add_row("this model, final", f"{float(records[-1]['bits_per_byte']):.3f}")
    table.add_row("this model, best", f"{best:.3f}")
    for name, value in baselines(recipe).items():
        table.add_row(name, f"{value:.3f}")
    console = Console()
    console.print(table)
    print(f"took {seconds:.0f} s; report: {run_folder / 'report' / 'report.html'}")
    print(
        "\nwhat to try next:\n"
        f"  smoe-train generate {run_folder} --prompt 'The with statement'\n"
        f"  smoe-train evaluate {run_folder} --top-k 1,2,4,8\n"
        f"  smoe-train train {RECIPE} --nproc {NPROC} name=demo-top-k model.moe.router.type=top_k\n"
        f"  smoe-train train {RECIPE} --nproc {NPROC} training.max_steps={recipe.training.max_steps * 2} name=longer\n"
        "  smoe-train recipes list",
        file=sys.stdout,
    )
