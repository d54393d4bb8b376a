"""The promises about the demo, and the enwik8 recipes on a real piece; minutes, so only in `make test-slow`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smoe_train.reporting import METRICS, read_records

COMMAND = [sys.executable, "-m", "smoe_train.cli.app"]
DATA = os.environ.get("SMOE_TRAIN_DATA")


def last_bits_per_byte(run_folder: Path) -> float:
    return float(
        [record for record in read_records(run_folder / METRICS) if record["split"] == "valid"][-1]["bits_per_byte"]
    )


@pytest.mark.slow
def test_the_demo_beats_gzip_within_six_minutes(tmp_path: Path) -> None:
    environment = {**os.environ, "SMOE_TRAIN_CACHE": str(tmp_path / "cache")}
    started = time.monotonic()
    done = subprocess.run(
        [*COMMAND, "demo"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "gzip -9" in done.stdout
    assert (tmp_path / "runs" / "demo" / "report" / "report.html").is_file()
    assert last_bits_per_byte(tmp_path / "runs" / "demo") < 2.5
    assert time.monotonic() - started < 360


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="SMOE_TRAIN_DATA names no folder of real data")
@pytest.mark.parametrize("router", ["top_k", "hyper_router"])
@pytest.mark.parametrize("nproc", [1, 2])
def test_enwik8_recipes_learn_from_a_piece(tmp_path: Path, router: str, nproc: int) -> None:
    piece = Path(str(DATA)) / "enwik8" / "enwik8.0-3000000"
    sizes = ["data.train_bytes=2700000", "data.valid_bytes=150000", "data.test_bytes=150000"]
    short = ["training.max_steps=30", "learning_rate.warmup_steps=5", "evaluation.max_tokens=16384", "name=piece"]
    topology = ["--nproc", str(nproc), f"parallel.expert_parallel_size={nproc}"]
    arguments = ["train", f"enwik8/{router}", *topology, f"data.path={piece}", *sizes, *short]
    done = subprocess.run(
        [*COMMAND, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    assert last_bits_per_byte(tmp_path / "runs" / "piece") < 5.0  # 8 for a model that knows nothing
