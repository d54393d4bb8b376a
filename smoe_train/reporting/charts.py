"""The pictures of the report, drawn by matplotlib without a display."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from smoe_train.reporting.records import by_rank_in_step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from numpy.typing import NDArray

Records = Sequence[Mapping[str, Any]]

# Okabe and Ito's palette: told apart with every common colour blindness, and in grey.
BLUE, ORANGE, GREEN, PURPLE, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
CYCLE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY)
GREY, INK = "#8c8c8c", "#333333"
STYLE: Any = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
}
WIDTH_INCHES = 9.0
MOST_LAYERS = 12
MOST_COLUMNS = 160
FEW_POINTS = 30

ROUTING_PANELS = (
    ("load_max_over_mean", "busiest expert's load\n(multiple of the mean)"),
    ("entropy_normalised", "router entropy\n(1 = uniform)"),
    ("dead_experts", "dead experts\n(count)"),
    ("top1_margin", "top-1 margin\n(probability)"),
    ("dropped_share", "dropped tokens\n(share)"),
)
LEAST_TOP = {"dead_experts": 1.05, "dropped_share": 0.01}  # keeps a panel of zeros on a sensible scale


def draw(metrics: Records, routing: Records, baselines: Mapping[str, float]) -> dict[str, bytes]:
    """Draws every chart that the records have figures for.

    Returns:
        PNG images by name, in the order of the report.
    """
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no global state, no display, nothing left open

    train = [record for record in metrics if record["split"] == "train"]
    charts: dict[str, Callable[[Figure], bool]] = {
        "loss": lambda figure: _loss(figure, metrics, baselines),
        "task": lambda figure: _task(figure, metrics),
        "optimisation": lambda figure: _optimisation(figure, train),
        "auxiliary_losses": lambda figure: _auxiliary(figure, train),
        "routing_health": lambda figure: _routing_health(figure, routing),
        "expert_load": lambda figure: _expert_load(figure, routing),
    }
    images = {}
    with matplotlib.rc_context(STYLE):
        for name, chart in charts.items():
            figure = Figure()
            if chart(figure):
                image = io.BytesIO()
                figure.savefig(image, format="png", metadata={"Software": None})
                images[name] = image.getvalue()
    return images


def auxiliary_names(records: Records) -> list[str]:
    """Returns the auxiliary losses, known by their weighted twins (``load_balance_loss_weighted``)."""
    keys = {key for record in records for key in record}
    return sorted(key.removesuffix("_weighted") for key in keys if key.endswith("_weighted"))


def smoothed(values: NDArray[np.float64], half_life: float) -> NDArray[np.float64]:
    """Returns moving averages whose weights halve every ``half_life`` points to both sides, so that nothing lags.

    Points that are not finite count nowhere; each result is a true weighted mean of the others.
    """
    decay = 0.5 ** (1.0 / half_life)
    counts = np.isfinite(values)
    known = np.where(counts, values, 0.0)
    weight = _both_sides(counts.astype(np.float64), decay)
    result = np.full(len(values), np.nan)
    np.divide(_both_sides(known, decay), weight, out=result, where=weight > 0)
    return result


def _both_sides(values: NDArray[np.float64], decay: float) -> NDArray[np.float64]:
    result = -values  # which both passes count
    for span in (slice(None), slice(None, None, -1)):
        running, sums = 0.0, np.empty(len(values))
        for index, value in enumerate(values[span]):
            running = running * decay + value
            sums[index] = running
        result = result + sums[span]
    return result


def _series(records: Records, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    points = [(record["step"], record[key]) for record in records if isinstance(record.get(key), int | float)]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)


def _panels(figure: Figure, count: int, height_inches: float) -> list[Axes]:
    figure.set_size_inches(WIDTH_INCHES, 0.5 + height_inches * count)
    axes = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(_whole_numbers())
    return list(axes)


def _whole_numbers() -> MaxNLocator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=6, integer=True)


def _legend(axis: Axes) -> None:
    """Puts the legend beside the title, where it hides no data."""
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles, labels, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=6, borderaxespad=0.2)


def _marker(steps: NDArray[np.float64]) -> str:
    return "." if len(steps) <= FEW_POINTS else ""


def _loss(figure: Figure, metrics: Records, baselines: Mapping[str, float]) -> bool:
    in_bits = any("bits_per_byte" in record for record in metrics)
    per_token = not any("score" in record for record in metrics)
    key, unit = ("bits_per_byte", "bits per byte") if in_bits else ("loss", f"loss{' (nats per token)' * per_token}")
    curves = {name: curve for name, records in _curves(metrics) if len((curve := _series(records, key))[0])}
    if not curves:
        return False
    (axis,) = _panels(figure, 1, 4.2)
    shown: list[NDArray[np.float64]] = []
    if "train" in curves:
        steps, values = curves.pop("train")
        smooth = smoothed(values, max(1.0, len(values) / 150))
        axis.plot(steps, values, color=SKY, linewidth=0.7, alpha=0.55, label="train, each step")
        axis.plot(steps, smooth, color=BLUE, label="train, smoothed", marker=_marker(steps))
        shown.append(smooth[len(smooth) // 20 :])
    for (label, (steps, values)), color in zip(curves.items(), CYCLE[1:] * len(curves), strict=False):
        axis.plot(steps, values, color=color, marker="o", markersize=4, linewidth=1.3, label=label)
        shown.append(values)
    levels = baselines if in_bits else {}
    finite = np.concatenate([np.array(list(levels.values())), *shown])
    finite = finite[np.isfinite(finite)]
    if len(finite):
        low, high = float(finite.min()), float(finite.max())
        room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        axis.set_ylim(low - room, high + room)
    _baselines(axis, levels)
    axis.set_ylabel(unit)
    axis.set_title("Loss")
    _legend(axis)
    return True


def _curves(metrics: Records) -> list[tuple[str, Records]]:
    """Returns the records of each curve under its name: one a split, one a top_k where a split is scored at several."""
    curves: list[tuple[str, Records]] = []
    for split in dict.fromkeys(record["split"] for record in metrics):
        name = {"valid": "validation"}.get(split, split)
        series = by_rank_in_step(record for record in metrics if record["split"] == split)
        several = len(series) > 1 and split != "train"
        curves += [(f"{name}, top k {r[-1].get('top_k')}" if several else name, r) for r in series]
    return curves


def _baselines(axis: Axes, levels: Mapping[str, float]) -> None:
    low, high = axis.get_ylim()
    place = -math.inf
    for name, level in sorted(levels.items(), key=lambda item: item[1]):
        axis.axhline(level, color=INK, linewidth=0.9, linestyle=(0, (5, 4)))
        place = max(level, place + 0.05 * (high - low))  # labels of close levels do not overlap
        axis.annotate(
            f"{name}: {level:.3f}",
            (1.005, place),
            xycoords=("axes fraction", "data"),
            verticalalignment="center",
            fontsize=8.5,
            color=INK,
        )


def _task(figure: Figure, metrics: Records) -> bool:
    scored = [record for record in metrics if record["split"] != "train"]
    plain = {"step", "tokens", "step_seconds", "learning_rate", "top_k", "evaluated_tokens", "evaluated_examples"}
    plain |= {"loss", "bits_per_byte", "perplexity", "word_perplexity"}
    names = sorted(
        {
            key
            for record in scored
            for key, value in record.items()
            if key not in plain and not key.endswith(("_loss", "_weighted")) and isinstance(value, float)
        }
    )
    if not names:
        return False
    for axis, name in zip(_panels(figure, len(names), 2.0), names, strict=True):
        for (label, records), color in zip(_curves(scored), CYCLE * len(scored), strict=False):
            steps, values = _series(records, name)
            axis.plot(steps, values, color=color, marker="o", markersize=4, label=label)
        axis.set_ylabel(name.replace("_", " "))
        _legend(axis)
    figure.axes[0].set_title("Task metrics")
    return True


def _optimisation(figure: Figure, train: Records) -> bool:
    labels = {
        "learning_rate": "learning rate",
        "gradient_norm": "gradient norm",
        "top_k": "experts per\ntoken (top k)",
    }
    found = {key: curve for key in labels if len((curve := _series(train, key))[0])}
    if not found:
        return False
    for axis, (key, (steps, values)) in zip(_panels(figure, len(found), 1.7), found.items(), strict=True):
        style = "steps-post" if key == "top_k" else "default"
        axis.plot(steps, values, color=BLUE, drawstyle=style, linewidth=1.2, marker=_marker(steps))
        axis.set_ylabel(labels[key])
        if key == "gradient_norm" and np.all(values > 0) and values.max() > 20 * np.median(values):
            axis.set_yscale("log")
        if key == "learning_rate":
            axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        if key == "top_k":
            axis.yaxis.set_major_locator(_whole_numbers())
    figure.axes[0].set_title("Optimisation")
    return True


def _auxiliary(figure: Figure, train: Records) -> bool:
    names = auxiliary_names(train)
    if not names:
        return False
    axes = _panels(figure, 2, 2.2)
    for axis, suffix, label in zip(axes, ("", "_weighted"), ("raw", "weighted\n(added to the loss)"), strict=True):
        for index, name in enumerate(names):
            steps, values = _series(train, name + suffix)
            color = CYCLE[index % len(CYCLE)]
            axis.plot(steps, values, color=color, linewidth=1.2, marker=_marker(steps), label=name.replace("_", " "))
        axis.set_ylabel(label)
    axes[0].set_title("Auxiliary losses")
    _legend(axes[0])
    return True


def _routing_health(figure: Figure, routing: Records) -> bool:
    train = [record for record in routing if record["split"] == "train"]
    layers = sorted({record["layer"] for record in train})
    panels = [(key, label) for key, label in ROUTING_PANELS if any(record.get(key) is not None for record in train)]
    if not panels:
        return False
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    axes = _panels(figure, len(panels), 1.7)
    palette = ListedColormap(colormaps["viridis"](np.linspace(0.0, 0.88, 256)))  # what follows is too pale on white
    scale = Normalize(layers[0], max(layers[-1], layers[0] + 1))
    for axis, (key, label) in zip(axes, panels, strict=True):
        style = "steps-post" if key == "dead_experts" else "default"
        for layer in layers:
            steps, values = _series([r for r in train if r["layer"] == layer], key)
            color = palette(scale(layer))
            axis.plot(
                steps,
                values,
                color=color,
                linewidth=1.1,
                drawstyle=style,
                marker=_marker(steps),
                label=f"layer {layer}",
            )
        axis.set_ylabel(label, fontsize=9)
        if key == "dead_experts":
            axis.yaxis.set_major_locator(_whole_numbers())
        if key in LEAST_TOP:
            axis.set_ylim(0.0, max(LEAST_TOP[key], axis.get_ylim()[1]))
    axes[0].set_title("Routing health by layer")
    if len(layers) <= 6:
        _legend(axes[0])
    else:
        figure.colorbar(ScalarMappable(scale, palette), ax=axes, label="layer", pad=0.01, aspect=40)
    return True


def _expert_load(figure: Figure, routing: Records) -> bool:
    train = [record for record in routing if record["split"] == "train" and record.get("load")]
    layers = sorted({record["layer"] for record in train})
    if not layers:
        return False
    from matplotlib.colors import TwoSlopeNorm

    if len(layers) > MOST_LAYERS:
        layers = [layers[round(i * (len(layers) - 1) / (MOST_LAYERS - 1))] for i in range(MOST_LAYERS)]
    columns = 2 if len(layers) in (2, 4) else min(3, len(layers))
    rows = math.ceil(len(layers) / columns)
    figure.set_size_inches(WIDTH_INCHES, 0.7 + 2.3 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    mesh = None
    for axis, layer in zip(grid.flat, layers, strict=False):
        edges, loads = binned_load([record for record in train if record["layer"] == layer])
        experts = np.arange(loads.shape[0] + 1) - 0.5
        # Red is overloaded, blue underused; two octaves either way, white is the mean.
        mesh = axis.pcolormesh(
            edges, experts, np.log2(np.maximum(loads, 2.0**-4)), cmap="RdBu_r", norm=TwoSlopeNorm(0.0, -2.0, 2.0)
        )
        axis.set_facecolor("#d9d9d9")
        axis.grid(False)
        axis.set_title(f"layer {layer}", fontsize=9.5, fontweight="normal")
        axis.yaxis.set_major_locator(_whole_numbers())
        axis.xaxis.set_major_locator(_whole_numbers())
    for axis, above in zip(list(grid.flat)[len(layers) :], list(grid.flat)[len(layers) - columns :], strict=False):
        axis.set_visible(False)
        above.tick_params(labelbottom=True)
    figure.suptitle("Expert load over time", x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.supxlabel("step", fontsize=10, color=INK)
    figure.supylabel("expert", fontsize=10, color=INK)
    assert mesh is not None
    bar = figure.colorbar(mesh, ax=grid, ticks=[-2, -1, 0, 1, 2], pad=0.02, aspect=30, extend="both")
    bar.ax.set_yticklabels(["¼", "½", "1", "2", "4"])
    bar.set_label("load (multiple of the mean)")
    return True


def binned_load(records: Records) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Averages the loads of one layer over equal spans of steps.

    Returns:
        Edges of the spans in steps, ``[C + 1]``; load of each expert as a multiple of the mean, ``[E, C]``, NaN where a
        span holds no record.
    """
    steps = np.array([record["step"] for record in records], dtype=np.float64)
    load_RE = np.array([record["load"] for record in records], dtype=np.float64)
    columns = min(MOST_COLUMNS, len(np.unique(steps)))
    edges = np.linspace(steps.min() - 0.5, steps.max() + 0.5, columns + 1)
    column_R = np.clip(np.searchsorted(edges, steps, side="right") - 1, 0, columns - 1)
    total_CE = np.zeros((columns, load_RE.shape[1]))
    np.add.at(total_CE, column_R, load_RE)
    count_C1 = np.bincount(column_R, minlength=columns)[:, None]
    mean_CE = np.divide(total_CE, count_C1, out=np.full_like(total_CE, np.nan), where=count_C1 > 0)
    return edges, mean_CE.T * load_RE.shape[1]
