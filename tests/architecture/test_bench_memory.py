"""The benchmark of memory: its figures by hand, and one small run of each part that fits into a test."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from support.scripts import SCRIPTS, loaded


@pytest.fixture
def bench():
    with loaded("bench_rounds"), loaded("bench_memory") as module:
        yield module


def test_the_line_through_points_by_hand(bench):
    assert bench.line_through([(0.0, 1.0), (2.0, 5.0)]) == (2.0, 1.0)
    # Mean (1, 2); the slope is (1 x 2 + 0 + 1 x 1) / 2.
    assert bench.line_through([(0.0, 0.0), (1.0, 3.0), (2.0, 3.0)]) == (1.5, 0.5)


def readings(bench, *resident):
    return [bench.Reading(1000 * (index + 1), value, 50, 9, 0.0) for index, value in enumerate(resident)]


def test_growth_counts_once_new_shapes_are_rare_and_is_for_10_000_steps(bench):
    grown = readings(bench, 1, 1, 95, 100, 105)  # the first 2,000 of 5,000 steps do not count
    assert bench.growth_share(grown, "resident_bytes") == pytest.approx(5 * 10 / 100)
    assert bench.growth_share(grown, "objects") == 0.0


def test_goals_are_at_most(bench):
    grown = bench.growth_goals(readings(bench, 500, 500, 100, 101, 102))
    in_use = bench.peak_goals([bench.Peak("x", 100, 120, 1, 2, 3, 4, 1.2, 9.0)])
    reached = sys.modules["bench_rounds"].reached
    assert [reached(goal) for goal in grown.values()] == [False, True, True]
    assert [reached(goal) for goal in in_use.values()] == [True]


def test_every_row_is_shown(bench):
    from rich.console import Console

    peak = bench.Peak("one of them", 100 << 20, 120 << 20, 1 << 20, 2 << 20, 3 << 20, 4 << 20, 1.2, 0.02)
    rows = [{"part": "peak", **bench.asdict(peak)}]
    rows += [{"part": "growth", **bench.asdict(one)} for one in readings(bench, 7 << 20)]
    rows += [
        {"part": "billion", "name": "b", "peak_bytes": 3 << 30, "step_seconds": [1.0], "losses": [2.0], "seconds": 4}
    ]
    console = Console(record=True, width=120)
    bench.show({"rows": rows, "goals": bench.peak_goals([peak])}, console)
    text = console.export_text()
    for shown in ("one of them", "100", "120", "1.20", "7.0", "1,000", "3.00 GiB", "reached"):
        assert shown in text


def test_a_configuration_is_merged_section_by_section(bench):
    recipe = bench.recipe_of("x", 1, 3, {"model": {"feed_forward": "relu"}, "parallel": bench.LOCAL})
    assert (recipe.model.feed_forward, recipe.model.moe.num_experts) == ("relu", 32)
    for processes, special in bench.CONFIGURATIONS.values():
        assert bench.recipe_of("x", processes, 3, special).training.max_steps == 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_says_what_each_part_took_at_its_peak(tmp_path):
    with loaded("bench_rounds"), loaded("bench_memory") as bench:
        special = {"model": bench.TOY, "training": {**bench.TOY_TRAINING, "global_batch_size": 2}}
        task = {"processes": 1, "special": {**special, "parallel": bench.LOCAL}, "folder": str(tmp_path)}
    command = [sys.executable, str(SCRIPTS / "bench_memory.py"), "--worker", json.dumps(task)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(ran.stdout.splitlines()[-1])
    assert set(found) == {"build", "steps", "validation", "save", "analytical"}
    assert found["steps"] > found["analytical"] > 10_000
