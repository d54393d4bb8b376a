"""Where real data lies, for the tests that want some: SMOE_TRAIN_DATA, or ``../shared/data`` beside the project."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("SMOE_TRAIN_DATA") or ROOT.parent / "shared" / "data")

needs_real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data: {DATA} is no folder")
