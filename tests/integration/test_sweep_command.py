"""A sweep as a user runs it: stopped in its first run, continued by the same command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.tiny import tiny_recipe

from smoe_train.reporting import METRICS, read_records


def test_a_stopped_sweep_continues(tmp_path: Path, text: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    local = {"parallel": {"engine": "local"}, "training": {"max_steps": 60}, "checkpoint": {"every_steps": 30}}
    recipe.write_text(tiny_recipe(text, 1, **local).to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "smoe_train.cli.app", "train", str(recipe), "--sweep", "seed=1,2", "--json"]
    runs = tmp_path / "runs"
    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    metrics = runs / "tiny-seed-1" / METRICS
    while not metrics.exists() or '"step": 3,' not in metrics.read_text():
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=300)
    assert first.returncode == 75, err
    assert [run["state"] for run in json.loads(out)["runs"]] == ["stopped", "pending"]
    assert "the same command continues it" in err

    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert again.returncode == 0, again.stderr
    assert "resumed from" in again.stderr
    losses = []
    for seed in (1, 2):
        records = read_records(runs / f"tiny-seed-{seed}" / METRICS)
        assert [one["step"] for one in records if one["split"] == "train"] == list(range(1, 61))
        losses.append([one["loss"] for one in records if one["split"] == "valid"][-1])
    (group,) = json.loads(again.stdout)["groups"]
    last = group["figures"]["last_valid_loss"]
    assert (last["mean"], last["deviation"]) == pytest.approx((sum(losses) / 2, abs(losses[0] - losses[1]) / 2**0.5))
