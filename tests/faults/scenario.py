"""What a module of the fault suite returns, and the scales it runs at.

A module has ``run(scale, folder) -> list[Outcome]``. It prints nothing, draws from fixed seeds, injects its faults for
real and writes below ``folder`` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# short: a few seconds a module, part of `make test`; commit: `make faults`; nightly: the big numbers.
Scale = Literal["short", "commit", "nightly"]


@dataclass(frozen=True)
class Outcome:
    """How often a run survived one kind of fault.

    Attributes:
        fault: A line of the table: "SIGKILL of all ranks at a random instant".
        catalogue: Its number in the fault catalogue: "A1".
        tried: How often the fault was injected.
        survived: How often everything was as promised.
        recovery_seconds: Of each try, where that makes sense.
        plain_deepspeed: What plain DeepSpeed does; "measured here: ..." only if this run measured it, else its source.
        failures: One line for each try that did not survive, which says how to repeat it.
        measured: Further figures by name.
        skipped: Why this machine could not try it; empty if it did.
    """

    fault: str
    catalogue: str
    tried: int
    survived: int
    recovery_seconds: tuple[float, ...] = ()
    plain_deepspeed: str = ""
    failures: tuple[str, ...] = ()
    measured: Mapping[str, float] = field(default_factory=dict)
    skipped: str = ""

    @property
    def passed(self) -> bool:
        """Whether the promise was kept every time, and was put to the test or has a reason why not."""
        if self.skipped:
            return self.tried == 0
        return self.survived == self.tried > 0 and not self.failures
