"""Every module of the fault suite at its short scale."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import lives as _imports_everything  # noqa: F401 - once, for all that is forked
from faults import suite


@pytest.mark.parametrize("module", suite.MODULES)
def test_faults(module: str, tmp_path: Path) -> None:
    result = suite.run_module(module, "short", tmp_path)
    assert not result.error, result.error
    for outcome in result.outcomes:
        assert outcome.passed, (outcome.fault, outcome.survived, outcome.tried, *outcome.failures)
    assert result.outcomes
    not_tried = [f"{outcome.fault}: {outcome.skipped}" for outcome in result.outcomes if outcome.skipped]
    if not_tried:
        pytest.skip("; ".join(not_tried))
