"""Scripts of the repository as modules, so that tests can call their functions."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import smoe_train

SCRIPTS = Path(smoe_train.__file__).parent.parent / "scripts"


@contextmanager
def loaded(name: str) -> Iterator[ModuleType]:
    """Loads ``scripts/<name>.py`` for the time of the block."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look their annotations up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]
