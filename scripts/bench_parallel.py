"""Times training steps of expert-parallel processes beside one process, and counts what they send to each other.

Each row is a team of one or more processes of one thread, with what a recipe's run has: model, expert banks, engine and
AdamW of this package; tokens are random, as many a process in every team. Teams take turns, step by step, while the
others wait, so that a busy machine disturbs all alike; a ratio is the median over rounds of the ratio in a round. A
step lasts from its first rank's start to its last rank's end. With ``--clock cpu`` it is the processor time of the rank
that used most: what remains of the comparison on a busy machine, without the waiting of ranks for each other.

Part one: tokens a second against one process. Part two: a team whose tokens are sent to experts of the first rank more
and more often. Bytes are those of `smoe_train.parallel.traffic`; the minimum is what has to travel if a token is sent
once for each of its experts on other ranks and comes back as often, forward and backward.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
from collections import Counter
from typing import Any

from bench_rounds import add_whole_numbers, conclude, require_positive, show_goals, spread_of
from bench_teams import Contender, Step, teams_of

SPEED_GOAL, BYTES_GOAL = 1.5, 1.01
SKEWS = (0.0, 0.25, 0.5, 0.75, 1.0)  # from balanced to all tokens on the first rank
PHASES = ("forward", "backward", "update")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_whole_numbers(
        parser,
        {
            "ranks": 2,
            "tokens": 2048,
            "sequence-length": 256,
            "d-model": 256,
            "d-ff": 512,
            "layers": 4,
            "experts": 16,
            "top-k": 2,
            "vocabulary": 2048,
            "rounds": 9,
            "warmup": 3,
        },
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), action="append", help="may be given twice")
    parser.add_argument("--form", choices=("torch", "cpp"), default="cpp", help="of the experts; default cpp")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="default wall")
    parser.add_argument("--no-imbalance", action="store_true", help="leave part two out")
    options = parser.parse_args(arguments)
    require_positive(parser, options, "sizes and rounds must be at least 1")
    if options.tokens % options.sequence_length:
        parser.error(f"--sequence-length {options.sequence_length} does not divide --tokens {options.tokens}")
    if options.ranks < 2 or options.experts % options.ranks or options.top_k > options.experts // options.ranks:
        parser.error("--ranks must be at least 2, divide --experts, and leave each rank --top-k experts")
    options.precision = tuple(dict.fromkeys(options.precision or ("fp32", "bf16")))
    return options


def traffic_of(all_steps: list[list[Step]], row_bytes: int) -> dict[str, float]:
    """Returns bytes a step that one rank sent, and what it had to: means over ranks and steps.

    Args:
        all_steps: What the ranks said, by step.
        row_bytes: Bytes of a token.
    """
    ranks = len(all_steps[0])
    sent: Counter[str] = Counter()
    away = once = 0
    for steps in all_steps:
        for rank, step in enumerate(steps):
            sent += step.sent
            away += sum(step.slots) - step.slots[rank % len(step.slots)]
            once += sum(step.visits) - step.visits[rank % len(step.visits)]
    number = ranks * len(all_steps)
    minimum = 4 * away * row_bytes
    return {
        "sent_bytes": sent.total() / number,
        "minimum_bytes": minimum / number,
        "sent_over_minimum": sent.total() / minimum if minimum else 1.0,
        "once_a_rank_bytes": (2 * away + 2 * once) * row_bytes / number,
        "counts_bytes": sent["counts"] / number,
    }


def throughput(options: argparse.Namespace, precision: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns a row for each contender, and the goals."""
    from smoe_train.parallel.footprint import footprint

    ranks = options.ranks
    one = Contender(1, 1, None if precision == "fp32" else 1, precision)
    contenders = [one, Contender(ranks, ranks, 1, precision), Contender(ranks, 1, 1, precision)]
    if precision == "fp32":
        contenders.insert(1, Contender(ranks, ranks, 0, precision))
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    steps: dict[str, list[list[Step]]] = {contender.name: [] for contender in contenders}
    with teams_of(contenders, options) as teams:
        for number in range(options.warmup + options.rounds):
            shift = number % len(teams)
            for team in teams[shift:] + teams[:shift]:
                elapsed, said = team.step()
                if number >= options.warmup:
                    seconds[team.contender.name].append(elapsed)
                    steps[team.contender.name].append(said)
    element = 4 if precision == "fp32" else 2
    rows, goals = [], {}
    for contender in contenders:
        values, of_team = seconds[contender.name], steps[contender.name]
        ratios = [contender.ranks * a / b for a, b in zip(seconds[one.name], values, strict=True)]
        cost = footprint(
            contender.recipe(options).parallel, contender.ranks, 0, 0, 0,
            options.tokens, options.d_model, options.layers, options.top_k,
        )  # fmt: skip
        row = {
            "part": "throughput",
            "team": contender.name,
            "precision": precision,
            "median_ms": statistics.median(values) * 1e3,
            "spread": spread_of(values),
            "tokens_per_second": contender.ranks * options.tokens / statistics.median(values),
            "speed_of_one": statistics.median(ratios),
            **{
                f"{phase}_ms": statistics.median(max(step.phases[i] for step in each) for each in of_team) * 1e3
                for i, phase in enumerate(PHASES)
            },
            "cpu_ms": statistics.median(max(step.cpu for step in each) for each in of_team) * 1e3,
            "balanced_bytes": cost.all_to_all_bytes_per_step,
        }
        if contender.size > 1:
            row |= traffic_of(of_team, options.d_model * element)
            if contender.zero == 1:
                goals[f"{precision}_speed_of_one"] = {"value": round(row["speed_of_one"], 3), "goal": SPEED_GOAL}
                ratio = round(row["sent_over_minimum"], 5)
                goals[f"{precision}_bytes_over_minimum"] = {"value": ratio, "goal": BYTES_GOAL, "at_most": True}
        rows.append(row)
    return rows, goals


def imbalance(options: argparse.Namespace, precision: str) -> list[dict[str, Any]]:
    """Returns a row for each share of the tokens that the first rank's experts get; the first is the router's."""
    contender = Contender(options.ranks, options.ranks, 1, precision)
    shares = [None, *((1 + skew * (options.ranks - 1)) / options.ranks for skew in SKEWS)]
    seconds: list[list[float]] = [[] for _ in shares]
    steps: list[list[list[Step]]] = [[] for _ in shares]
    with teams_of([contender], options) as (team,):
        for number in range(options.warmup + options.rounds):
            for index in sorted(range(len(shares)), key=lambda i: (i + number) % len(shares)):
                elapsed, said = team.step(shares[index])
                if number >= options.warmup:
                    seconds[index].append(elapsed)
                    steps[index].append(said)
    rows = []
    for share, values, of_share in zip(shares, seconds, steps, strict=True):
        load = [sum(step.slots[rank] for each in of_share for step in each) for rank in range(options.ranks)]
        ratios = [b / a for a, b in zip(seconds[1], values, strict=True)]
        element = 4 if precision == "fp32" else 2
        rows.append(
            {
                "part": "imbalance",
                "precision": precision,
                "hot_share": share,
                "load_max_over_mean": max(load) * len(load) / sum(load),
                "median_ms": statistics.median(values) * 1e3,
                "time_of_balanced": statistics.median(ratios),
                "spread": spread_of(ratios),
                **traffic_of(of_share, options.d_model * element),
            }
        )
    return rows


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures everything and returns the result as JSON holds it."""
    import torch

    torch.set_num_threads(1)  # a fork must not inherit a running thread pool
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - ZeRO imports it late, which takes seconds

    from smoe_train import assembly  # noqa: F401 - once, for all processes
    from smoe_train.kernels.build import load_kernels

    if options.form == "cpp":
        load_kernels()
    rows: list[dict[str, Any]] = []
    goals: dict[str, Any] = {}
    for precision in options.precision:
        found, reached = throughput(options, precision)
        rows, goals = rows + found, goals | reached
        if not options.no_imbalance:
            rows += imbalance(options, precision)
    settings = {**vars(options), "torch": torch.__version__, "machine": platform.machine(), "cores": os.cpu_count()}
    return {"goals": goals, "rows": rows, "settings": settings}


def show(result: dict[str, Any]) -> None:
    """Prints the result as tables."""
    from rich.console import Console
    from rich.table import Table

    settings, console = result["settings"], Console()
    if not console.is_terminal:
        console.width = 160
    names = ("tokens", "d_model", "d_ff", "layers", "experts", "top_k")
    shape = ", ".join(f"{key} {settings[key]}" for key in names)
    console.print(f"{shape}; a process has {settings['tokens']} tokens; {settings['clock']} time", soft_wrap=True)
    table = Table("team", "precision", "ms", "spread", "of one", *PHASES, "cpu ms", "MB sent", "minimum", "once a rank")
    hot = Table("share of rank 0", "precision", "max / mean load", "ms", "of balanced", "spread", "MB sent", "minimum")
    for row in result["rows"]:
        time_cells = [f"{row['median_ms']:.0f}", f"{row['spread']:.0%}"]
        bytes_cells = [
            f"{row[name] / 1e6:.2f}" if name in row else "-"
            for name in ("sent_bytes", "minimum_bytes", "once_a_rank_bytes")
        ]
        if row["part"] == "throughput":
            phases = [f"{row[f'{phase}_ms']:.0f}" for phase in (*PHASES, "cpu")]
            speed = f"{row['speed_of_one']:.2f}"
            table.add_row(row["team"], row["precision"], *time_cells, speed, *phases, *bytes_cells)
        else:
            share = "router's" if row["hot_share"] is None else f"{row['hot_share']:.1%}"
            load, ratio = f"{row['load_max_over_mean']:.2f}", f"{row['time_of_balanced']:.2f}"
            hot.add_row(share, row["precision"], load, time_cells[0], ratio, time_cells[1], *bytes_cells[:2])
    console.print(table)
    if hot.row_count:
        console.print(hot)
    show_goals(result["goals"], console)


def main() -> int:
    """Measures, prints, and writes the file that BENCH_JSON names."""
    options = parse()
    return conclude(options, 1, run, show)


if __name__ == "__main__":
    sys.exit(main())
