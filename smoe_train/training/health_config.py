"""The recipe's health section: what becomes of steps that are not finite, of loss spikes and of collapsed routers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from smoe_train.config import StrictModel

# YAML takes off, unquoted, for false.
AlarmAction = Annotated[
    Literal["off", "warn", "stop", "rollback"], BeforeValidator(lambda value: "off" if value is False else value)
]


class NonFiniteConfig(StrictModel):
    """A step whose loss or gradient is NaN or infinite on any rank; none is ever applied to the weights."""

    action: Literal["stop", "skip", "rollback"] = "skip"
    """``skip``: all ranks leave the step out, weights, moments and routers stay as they were. ``rollback``: go back to
    the last checkpoint and leave the step out on the way. ``stop``: end the run with exit code 1."""
    in_a_row: int = Field(3, ge=2)
    """Such steps in a row, with no finite one between them, that end the run; only for skip and rollback."""


class LossSpikeConfig(StrictModel):
    """The training loss rises far above what it was in the steps before."""

    action: AlarmAction = "warn"
    """``warn`` prints a line, ``stop`` ends the run with exit code 3, ``rollback`` goes back to the last checkpoint
    before the spike and leaves its steps out on the way. Losses are looked at when they are recorded."""
    threshold: float = Field(6.0, gt=0.0)
    """Robust standard deviations (1.4826 times the median absolute deviation) above the median."""
    window_steps: int = Field(128, ge=8)
    """Steps before that the median is taken over; there is no alarm before half of them are there."""
    in_a_row: int = Field(3, ge=1)
    """Steps in a row that lie above the threshold; a single one is a hard batch more often than a fault."""


class RouterCollapseConfig(StrictModel):
    """A router of some MoE layer uses its experts no more, by the figures of ``routing.jsonl``."""

    action: AlarmAction = "warn"
    """``warn`` prints a line, ``stop`` ends the run with exit code 3, ``rollback`` goes back to the last checkpoint
    before the collapse and leaves the steps since then out on the way."""
    patience_steps: int = Field(200, ge=1)
    """Steps for which one of the following has to hold without a break."""
    dead_experts: float | None = Field(0.25, gt=0.0, le=1.0)
    """Share of a layer's experts that have received no token for all of them; null switches it off."""
    imbalance: float | None = Field(0.9, gt=0.0, le=1.0)
    """How far the busiest expert's load lies on the way from balance (0) to every token going to it (1):
    (load_max_over_mean - 1) / (num_experts / experts_per_token - 1); null switches it off."""
    entropy_below: float | None = Field(0.001, gt=0.0, lt=1.0)
    """``entropy_normalised`` below which a router counts as saturated: it gives all probability to one expert, and
    hardly learns any more; null switches it off."""


class HealthConfig(StrictModel):
    """Numerical faults and alarms, and what they do."""

    non_finite: NonFiniteConfig = NonFiniteConfig()
    """Steps whose loss or gradient is NaN or infinite."""
    loss_spike: LossSpikeConfig = LossSpikeConfig()
    """Rises of the training loss."""
    router_collapse: RouterCollapseConfig = RouterCollapseConfig()
    """Routers that do not use their experts."""
