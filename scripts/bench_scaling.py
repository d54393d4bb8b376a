"""Times training steps against experts, tokens, experts a token, layers and ranks, and writes the curves into the docs.

One axis at a time leaves the reference shape of `make bench-moe`. All points of an axis run interleaved in one process,
beside the dense twin of the reference shape, to which each time is relative. With ranks the tokens of a process stay
what they are, and the time is the CPU time of the slowest rank. The exponent is the slope of a straight line through
the logarithms. Writes the picture and the table of docs/performance.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench_rounds import CLOCKS, interleave, prepare_environment, spread_of, write_result

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- scaling: written by scripts/bench_scaling.py -->", "<!-- end of scaling -->"
AXES: dict[str, tuple[int, ...]] = {
    "experts": (8, 16, 32, 64, 128),
    "tokens": (256, 512, 1024, 2048, 4096, 8192),
    "top_k": (1, 2, 4, 8, 16),
    "num_layers": (1, 2, 4, 8),
    "ranks": (1, 2, 4),
}
TITLES = {
    "experts": "experts E",
    "tokens": "tokens a step",
    "top_k": "experts a token k",
    "num_layers": "layers",
    "ranks": "expert-parallel ranks",
}


@dataclass(frozen=True)
class Point:
    """One point of a curve.

    Attributes:
        axis: What varies.
        value: To what.
        precision: ``fp32`` or ``bf16``.
        median_ms: Median time of a step.
        spread: (third - first quartile) / median.
        time: Relative to the dense twin's of the reference shape; with ranks, to that of one rank.
    """

    axis: str
    value: int
    precision: str
    median_ms: float
    spread: float
    time: float


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=tuple(AXES), help="an axis; may be given several times")
    parser.add_argument("--precision", action="append", choices=("fp32", "bf16"), help="default both")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count, default 7")
    parser.add_argument("--warmup", type=int, default=4, help="rounds before them, default 4")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="cpu", help="CPU time (default) or wall-clock time")
    parser.add_argument("--write-docs", action="store_true", help="write docs/performance.md and its picture")
    options = parser.parse_args(arguments)
    options.only, options.precision = options.only or list(AXES), options.precision or ["fp32", "bf16"]
    return options


def shape_points(axis: str, precision: str, options: argparse.Namespace) -> list[Point]:
    """Returns the points of an axis of the model's shape."""
    import torch
    from bench_models import Shape, build, stepper

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def step(name: str, **change: int) -> Callable[[int], None]:
        shape = replace(Shape(), **change)  # type: ignore[arg-type]
        return stepper(build(shape, name), shape, dtype)

    steps = {"dense": step("dense"), **{str(value): step("smoe_train", **{axis: value}) for value in AXES[axis]}}
    seconds = interleave(steps, options.warmup, options.rounds, options.clock)
    return [
        point(axis, value, precision, seconds[str(value)][-options.rounds :], seconds["dense"][-options.rounds :])
        for value in AXES[axis]
    ]


def point(axis: str, value: int, precision: str, seconds: list[float], reference: list[float]) -> Point:
    """Returns a point from the seconds of its steps and those of what it is relative to, round by round."""
    time = statistics.median(a / b for a, b in zip(seconds, reference, strict=True))
    return Point(axis, value, precision, statistics.median(seconds) * 1e3, spread_of(seconds), time)


def rank_points(precision: str, options: argparse.Namespace) -> list[Point]:
    """Returns the CPU time of the slowest rank of teams of 1, 2 and 4 processes, with ZeRO 1."""
    import bench_parallel
    from bench_teams import Contender, teams_of

    from smoe_train import assembly  # noqa: F401 - once, for all processes

    team_options = bench_parallel.parse(["--clock", "cpu"])
    contenders = [Contender(ranks, ranks, 1, precision) for ranks in AXES["ranks"]]
    seconds: list[list[float]] = [[] for _ in contenders]
    with teams_of(contenders, team_options) as teams:
        for number in range(options.warmup + options.rounds):
            for values, team in zip(seconds, teams, strict=True):
                _, said = team.step()
                if number >= options.warmup:
                    values.append(max(step.cpu for step in said))
    return [
        point("ranks", ranks, precision, values, seconds[0])
        for ranks, values in zip(AXES["ranks"], seconds, strict=True)
    ]


def exponent(points: list[Point]) -> float:
    """Returns the slope of a straight line through the logarithms of values and times."""
    from math import log

    return statistics.linear_regression(
        [log(one.value) for one in points], [log(one.median_ms) for one in points]
    ).slope


def nanoseconds_per_parameter(points: list[Point]) -> float:
    """Returns what a stored expert parameter costs a step: the slope of time over experts."""
    from bench_models import Shape

    shape = Shape()
    of_expert = 3 * shape.d_model * shape.d_ff * shape.num_layers
    slope = statistics.linear_regression([one.value for one in points], [one.median_ms for one in points]).slope
    return slope * 1e6 / of_expert


def curves(points: list[Point]) -> dict[tuple[str, str], list[Point]]:
    """Returns the points of each axis and precision."""
    result: dict[tuple[str, str], list[Point]] = {}
    for one in points:
        result.setdefault((one.axis, one.precision), []).append(one)
    return result


def table_of(points: list[Point], clock: str, threads: int) -> str:
    """Returns the curves as Markdown."""
    lines = [
        f"{threads} thread{'s' if threads > 1 else ''} a process, {clock} time; relative to the dense twin of the",
        "reference shape, with ranks to one rank of the same tokens.",
        "",
        "| axis | precision | relative time of a step | exponent |",
        "|---|---|---|---|",
    ]
    for (axis, precision), of_curve in curves(points).items():
        times = ", ".join(f"{one.value}: {one.time:.2f}" for one in of_curve)
        lines.append(f"| {TITLES[axis]} | {precision} | {times} | {exponent(of_curve):.2f} |")
    per_parameter = [
        f"{precision} {nanoseconds_per_parameter(of_curve):.1f} ns"
        for (axis, precision), of_curve in curves(points).items()
        if axis == "experts"
    ]
    if per_parameter:
        lines += [
            "",
            f"A stored expert parameter costs a step, by the straight line over E: {', '.join(per_parameter)}.",
        ]
    return "\n".join(lines)


def draw(points: list[Point], target: Path) -> None:
    """Draws one panel an axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    axes = list(dict.fromkeys(one.axis for one in points))
    figure, panels = plt.subplots(1, len(axes), figsize=(3.2 * len(axes), 3.2), layout="constrained", squeeze=False)
    for axis, panel in zip(axes, panels[0], strict=True):
        for (of_axis, precision), of_curve in curves(points).items():
            if of_axis == axis:
                label = f"{precision}, exponent {exponent(of_curve):.2f}"
                panel.plot([one.value for one in of_curve], [one.time for one in of_curve], "o-", label=label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xticks(AXES[axis])
        for one_axis in (panel.xaxis, panel.yaxis):
            one_axis.set_major_formatter(ScalarFormatter())
            one_axis.set_minor_formatter(NullFormatter())
        panel.set_xlabel(TITLES[axis])
        panel.legend(fontsize=7)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("relative time of a step")
    figure.savefig(target, dpi=120)


def write_docs(points: list[Point], options: argparse.Namespace) -> None:
    """Writes the picture, and the table between its marks."""
    page = DOCS / "performance.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    table = table_of(points, options.clock, options.threads)
    page.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")
    draw(points, DOCS / "images" / "scaling.png")


def main() -> int:
    """Measures, prints, and writes what is asked for."""
    options = parse()
    prepare_environment(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    points: list[Point] = []
    if "ranks" in options.only:  # first: a fork must not inherit a running thread pool
        for precision in options.precision:
            print(f"ranks, {precision} ...", file=sys.stderr, flush=True)
            points += rank_points(precision, options)
    for axis in options.only:
        for precision in options.precision:
            if axis != "ranks":
                print(f"{axis}, {precision} ...", file=sys.stderr, flush=True)
                points += shape_points(axis, precision, options)
    points.sort(key=lambda one: list(AXES).index(one.axis))
    print(table_of(points, options.clock, options.threads))
    rows: list[dict[str, Any]] = [asdict(one) for one in points]
    write_result({"goals": {}, "rows": rows, "settings": {**vars(options), "torch": torch.__version__}})
    if options.write_docs:
        write_docs(points, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
