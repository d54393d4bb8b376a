"""What the benchmarks share: interleaved rounds in one process, ratios within a round, goals, and the result's file."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}
BUSY_SHARE = 0.08  # of the processors' time taken by other processes, above which a wall-clock step is measured again
ATTEMPTS = 5
Seconds = dict[str, list[float]]
Goals = dict[str, dict[str, float]]


def prepare_environment(threads: int, tuned: bool = True) -> None:
    """Sets what must be set before torch is loaded; by default the same as training sets.

    Args:
        threads: Of this process.
        tuned: Whether oneDNN and the C library keep what training lets them; otherwise their own defaults stay.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if tuned:
        from smoe_train.cli.launch import worker_environment
        from smoe_train.training.heap import keep_freed_memory

        os.environ.update(worker_environment(1, os.environ))
        keep_freed_memory()
    else:
        os.environ.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)


def add_whole_numbers(parser: argparse.ArgumentParser, defaults: Mapping[str, int]) -> None:
    """Adds an option for each name, with its default."""
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")


def require_positive(parser: argparse.ArgumentParser, options: argparse.Namespace, message: str) -> None:
    """Ends the program with a message where a whole number is less than 1; switches are none."""
    if min(value for value in vars(options).values() if type(value) is int) < 1:
        parser.error(message)


def conclude(
    options: argparse.Namespace,
    threads: int,
    run: Callable[[argparse.Namespace], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
) -> int:
    """Measures, prints, and writes the file that BENCH_JSON names; returns the exit code."""
    prepare_environment(threads)
    result = run(options)
    show(result)
    write_result(result)
    return 0


def interleave(steps: Mapping[str, Callable[[int], None]], warmup: int, rounds: int, clock: str) -> Seconds:
    """Returns the seconds of every step of every row, those of the warm-up first.

    Each round runs all rows once, beginning with another one each time. On the wall clock a step during which other
    processes used the machine is run again, a few times at most; on the CPU clock their effect is small.

    Args:
        steps: By row, what runs one step; it is given the round's number.
        warmup: Rounds before the ones that count.
        rounds: Rounds that count.
        clock: ``cpu`` or ``wall``.
    """
    names = list(steps)
    seconds: Seconds = {name: [] for name in names}
    for number in range(warmup + rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            for attempt in range(ATTEMPTS if clock == "wall" else 1):
                others = others_seconds()
                start = CLOCKS[clock]()
                steps[name](number)
                elapsed = CLOCKS[clock]() - start
                share = (others_seconds() - others) / (elapsed * (os.cpu_count() or 1))
                if share < BUSY_SHARE or attempt == ATTEMPTS - 1:
                    break
            seconds[name].append(elapsed)
    return seconds


def others_seconds() -> float:
    """Returns the processor seconds that all other processes have used since the machine was started."""
    import psutil

    all_times = psutil.cpu_times()
    used: float = sum(all_times) - all_times.idle - getattr(all_times, "iowait", 0.0) - getattr(all_times, "guest", 0.0)
    return used - time.process_time()


def speed_of(seconds: Seconds, name: str, reference: str, last: int) -> float:
    """Returns how fast a row is relative to another: the median, over the last rounds, of the ratio within a round."""
    pairs = zip(seconds[reference][-last:], seconds[name][-last:], strict=True)
    return statistics.median(a / b for a, b in pairs)


def spread_of(values: list[float]) -> float:
    """Returns (third - first quartile) / median."""
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4)
    return (third - first) / statistics.median(values)


def reached(goal: Mapping[str, float]) -> bool:
    """Returns whether a value is as high as its goal, or as low where lower is better."""
    return goal["value"] <= goal["goal"] if goal.get("at_most") else goal["value"] >= goal["goal"]


def show_goals(goals: Goals, console: Console) -> None:
    """Prints for each goal what was reached."""
    for name, goal in goals.items():
        bound = "at most" if goal.get("at_most") else "at least"
        verdict = "reached" if reached(goal) else "missed"
        console.print(f"goal {name}: {goal['value']:.3g} ({bound} {goal['goal']:.3g}): {verdict}", soft_wrap=True)


def write_result(result: dict[str, Any]) -> None:
    """Writes the file that BENCH_JSON names, if it does."""
    target = os.environ.get("BENCH_JSON")
    if target:
        Path(target).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
