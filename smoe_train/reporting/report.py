"""One page that sums up a run: figures, curves, routing health and what it ran on."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smoe_train.bounded import leading_out, read_bounded, read_json
from smoe_train.config import MAX_FILE_BYTES, read_values
from smoe_train.durable import write_file
from smoe_train.errors import RecipeError, RunFailedError, SmoeError
from smoe_train.reporting.charts import draw
from smoe_train.reporting.environment import ENVIRONMENT
from smoe_train.reporting.records import METRICS, ROUTING, by_rank_in_step, read_records
from smoe_train.reporting.sinks.console import duration

RECIPE = "recipe.yaml"
REPORT = "report"

CAPTIONS = {
    "loss": "Training loss at each step and its moving average; dashed lines are ordinary compressors on the same "
    "validation data. The vertical axis leaves out the first 5 % of the steps.",
    "task": "Scores of the task on held-out data.",
    "optimisation": "What the schedules did, and the size of the gradient.",
    "auxiliary_losses": "Averages over tokens and MoE layers. A load-balance loss of 1 is perfect balance.",
    "routing_health": "One line a layer, training batches only.",
    "expert_load": "Share of the routed tokens that each expert receives: white is the mean, red overloaded, blue "
    "underused, grey not recorded.",
}

KINDS: Mapping[str, type | tuple[type, ...]] = {"step": int, "split": str, "loss": (int, float), "tokens": (int, float)}

Records = Sequence[Mapping[str, Any]]


def write_report(run_folder: Path) -> Path:
    """Writes ``report/report.html``, which needs no other file, and its pictures as PNG beside it.

    Returns:
        Path of the page.

    Raises:
        SmoeError: The folder holds no run, or a run that has not recorded a step, or the report would lie elsewhere.
        RunFailedError: A record of the run is damaged.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    recipe_text, recipe = _recipe(run_folder)
    metrics = _records(run_folder / METRICS)
    if not metrics:
        raise SmoeError(f"{run_folder / METRICS}: records no step yet; train the run first, then write its report")
    if leading_out(run_folder, REPORT, f"{REPORT}/*"):
        raise SmoeError(f"{run_folder / REPORT}: leads out of the run folder; remove the link")
    surroundings = _surroundings(run_folder / ENVIRONMENT)
    baselines = {str(name): float(level) for name, level in (surroundings.get("baselines") or {}).items()}
    images = draw(metrics, _records(run_folder / ROUTING), baselines)

    folder = run_folder / REPORT
    folder.mkdir(exist_ok=True)
    for name, image in images.items():
        write_file(folder / f"{name}.png", image)
    pages = Environment(
        loader=PackageLoader("smoe_train.reporting"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    html = pages.get_template("report.html.j2").render(
        name=recipe.get("name") or run_folder.resolve().name,
        headline=headline(metrics),
        results=results(metrics, baselines),
        charts=[
            (name.replace("_", " "), base64.b64encode(image).decode(), CAPTIONS[name]) for name, image in images.items()
        ],
        environment=_flat(surroundings),
        recipe=recipe_text,
    )
    write_file(folder / "report.html", html.encode())
    return folder / "report.html"


NO_METRICS = frozenset({"step", "split", "top_k", "loss", "evaluated_examples", "tokens", "score"})


def headline(metrics: Records) -> list[tuple[str, str]]:
    """Returns the figures at the top of the page, as label and text."""
    train = [record for record in metrics if record["split"] == "train"]
    valid = _validations(metrics)
    figures: list[tuple[str, str]] = [("step", f"{max(record['step'] for record in metrics):,}")]
    unit = "" if is_downstream(metrics) else " (nats/token)"
    if train:
        figures.append((f"last training loss{unit}", _number(train[-1].get("loss"))))
    if valid:
        best = min(valid, key=_cost)
        figures.append((f"last validation loss{unit}", _number(valid[-1].get("loss"))))
        figures.append(
            (
                f"best validation{' score' if 'score' in best else ' loss'}, at step {best['step']:,}",
                _number(best.get("score", best.get("loss"))),
            )
        )
        further = [key for key in ("bits_per_byte", "perplexity", "word_perplexity") if key in best]
        figures += [(f"best validation {key.replace('_', ' ')}", _number(best[key])) for key in further]
    for record in metrics:
        if record["split"].startswith(("dev", "test")) and "score" in record:
            named = [(key, value) for key, value in record.items() if key not in NO_METRICS]
            figures += [(f"{record['split']} {name}", _number(value)) for name, value in named]
    if train and "tokens" in train[-1]:
        figures.append(("tokens seen", f"{train[-1]['tokens']:,}"))
    rate, seconds = speed(train)
    if rate is not None:
        figures.append(("tokens per second", f"{rate:,.0f}"))
    if seconds > 0:
        figures.append(("time in training steps", duration(seconds)))
    return figures


def is_downstream(metrics: Records) -> bool:
    """Returns whether the records are of a classifier, which has a score."""
    return any("score" in record for record in metrics)


def _cost(record: Mapping[str, Any]) -> float:
    return -_sortable(record["score"]) if "score" in record else _sortable(record.get("loss"))


def speed(train: Records) -> tuple[float | None, float]:
    """Returns tokens per second without the first step, which warms up, and the seconds of all training steps."""
    timed = [record for record in train if isinstance(record.get("step_seconds"), float)]
    tokens, seconds, total = 0, 0.0, 0.0
    previous: Mapping[str, Any] | None = None
    for record in timed:
        steps = record["step"] - (previous["step"] if previous else record["step"] - 1)
        total += record["step_seconds"] * steps
        if previous and "tokens" in record and "tokens" in previous:
            tokens += record["tokens"] - previous["tokens"]
            seconds += record["step_seconds"] * steps
        previous = record
    return (tokens / seconds if seconds > 0 else None), total


def results(metrics: Records, baselines: Mapping[str, float]) -> list[tuple[str, str]]:
    """Returns bits per byte of the run's best validation, its tests and the compressors, best first."""
    valid = [record["bits_per_byte"] for record in _validations(metrics) if "bits_per_byte" in record]
    tests = [r["bits_per_byte"] for r in metrics if r["split"] == "test" and "bits_per_byte" in r]
    rows = {f"{name} (compressor)": level for name, level in baselines.items()}
    if valid:
        rows["this run, best validation"] = min(valid, key=_sortable)
    if tests:
        rows["this run, last test"] = tests[-1]
    if not (valid or tests):
        return []
    return [(name, _number(level)) for name, level in sorted(rows.items(), key=lambda row: _sortable(row[1]))]


def _validations(metrics: Records) -> Records:
    """Returns the validations at the run's own top_k: further ones of a step, at others, are no result of the run."""
    series = by_rank_in_step(record for record in metrics if record["split"] in ("valid", "selection"))
    return series[0] if series else []


def _records(path: Path) -> list[dict[str, Any]]:
    """Reads records and refuses those that no run writes, before a chart stumbles over them."""
    records = read_records(path)
    for number, record in enumerate(records, start=1):
        wrong = [key for key, kind in KINDS.items() if key in record and not isinstance(record[key], kind)]
        wrong += [key for key, value in record.items() if isinstance(value, int) and abs(value) >= 1 << 63]
        wrong += [key for key in ("step", "split") if key not in record]
        if wrong:
            raise RunFailedError(f"{path}: record {number}: {wrong[0]!r} is not what a run writes; remove the line")
    return records


def _recipe(run_folder: Path) -> tuple[str, dict[str, Any]]:
    path = run_folder / RECIPE
    try:
        text = read_bounded(path, MAX_FILE_BYTES).decode()
        recipe = read_values(path)
    except OSError as error:
        raise SmoeError(
            f"{run_folder}: is not the folder of a run: {RECIPE} cannot be read ({error.strerror}); "
            "give the folder that `smoe-train train` wrote, such as runs/<name>"
        ) from error
    except (RecipeError, UnicodeDecodeError) as error:
        raise SmoeError(f"{path}: is damaged: {error}") from error
    return text, recipe


def _surroundings(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        surroundings = read_json(path)
    except (OSError, ValueError) as error:
        raise SmoeError(f"{path}: is damaged: {error}; delete it to write the report without it") from error
    return surroundings if isinstance(surroundings, dict) else {}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        elif value not in (None, "", []):
            rows.append((f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return rows


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "not recorded"


def _sortable(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not math.isnan(value) else math.inf
