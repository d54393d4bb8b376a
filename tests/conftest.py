"""What every test starts from: a cache of its own, no tracker, one thread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("SMOE_TRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("WANDB_MODE", "offline")
    patch.setenv("NO_COLOR", "1")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        patch.delenv(name, raising=False)
    torch.set_num_threads(1)
    yield
    patch.undo()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what compiles where there is no compiler."""
    if item.get_closest_marker("compiler") is not None:
        from smoe_train.kernels.build import why_not

        missing = why_not()
        if missing is not None:
            pytest.skip(missing)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of about 30 kB."""
    from support.tiny import write_text

    return write_text(tmp_path_factory.mktemp("text") / "corpus.txt")
