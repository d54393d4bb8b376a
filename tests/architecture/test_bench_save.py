"""The benchmark of saves: its figures by hand, and one small run of it."""

from __future__ import annotations

import pytest
from support.scripts import loaded


def test_shares_and_slowdown_are_as_counted_by_hand():
    with loaded("bench_rounds"), loaded("bench_save") as bench:
        windows = [
            window
            for number, pace in enumerate((1.0, 3.0))  # the machine is three times slower in the second round
            for window in (
                bench.Window(bench.BACKGROUND, number, 0.2, [1.1 * pace, 1.1 * pace, pace], [True, True, False]),
                bench.Window(bench.WAITING, number, 4.0, [pace] * 3, [False] * 3),
                bench.Window(bench.NONE, number, 0.0, [pace] * 3, [False] * 3),
            )
        ]
        assert bench.slowdown_of(windows) == pytest.approx(0.1)
        background, waiting, none = bench.rows_of(windows[:3])
    assert (background.overlapped_steps, background.overlapped_step_seconds) == (2, 1.1)
    assert background.stall_share == pytest.approx(0.2 / 100.2)
    assert background.cost_share == pytest.approx(0.4 / 100.4)
    assert waiting.cost_share == pytest.approx(4 / 104)
    assert none.cost_share == 0.0


def test_a_small_run_measures_every_mode(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with loaded("bench_rounds"), loaded("bench_save") as bench:
        small = "--d-model 16 --layers 1 --experts 2 --d-ff 16 --sequence-length 16 --batch 2 --rounds 1 --window 3"
        result = bench.run(bench.parse([*small.split(), "--threads", "1"]))
    assert [row["mode"] for row in result["rows"]] == list(bench.MODES)
    assert all(row["step_seconds"] > 0 for row in result["rows"])
    assert result["settings"]["checkpoint_bytes"] > 10_000
