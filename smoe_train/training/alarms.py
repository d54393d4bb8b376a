"""Alarms: what the records of training say of its health. Pure arithmetic, whose state is saved with checkpoints."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from smoe_train.errors import CheckpointError
from smoe_train.training.health_config import HealthConfig, RouterCollapseConfig

# The median absolute deviation of a normal distribution times this is its standard deviation.
MAD_TO_DEVIATION = 1.4826
# Nats (or squared error). Where the loss hardly varies, as on text that is known by heart, any rise is many deviations.
SMALLEST_DEVIATION = 0.01
# Rollbacks for one fault that come back to it before they are given up.
ROLLBACKS = 3

AlarmName = Literal["non_finite", "loss_spike", "router_collapse"]
Found = dict[str, tuple[int, str]]


@dataclass(frozen=True)
class Alarm:
    """Something that is wrong with training, and what the recipe wants done about it.

    Attributes:
        name: Which alarm.
        action: ``skip`` comes from steps that are not finite alone, ``warn`` from the other alarms alone.
        since: First step that is concerned. A rollback goes to a checkpoint before it.
        step: Last step that is concerned. A rollback leaves ``since`` to ``step`` out on the way back.
        message: What was seen, with the setting that judged it; without what to do next.
    """

    name: AlarmName
    action: Literal["warn", "skip", "stop", "rollback"]
    since: int
    step: int
    message: str


class Alarms:
    """Judges steps as they come; after a resume it goes on as if there had been none.

    Steps are counted from 1, as in the records. All ranks come to the same verdict if they are given the same records.

    Args:
        config: The recipe's ``health`` section.
    """

    def __init__(self, config: HealthConfig) -> None:
        self._config = config
        self._non_finite = self._last_non_finite = 0
        self.restore({})

    def judge_step(self, step: int, finite: bool) -> Alarm | None:
        """Judges a step before its update is applied; to be called once for each step that is computed.

        Args:
            step: The step, counted from 1.
            finite: Whether loss and gradient are finite on all ranks.

        Returns:
            None for a finite step; otherwise what to do, which is ``stop`` at the last of so many in a row. Finite
            steps on the way back to the one that failed do not end the row.
        """
        if finite:
            if step > self._last_non_finite:
                self._non_finite = 0
            return None
        config = self._config.non_finite
        self._non_finite += 1
        self._last_non_finite = max(step, self._last_non_finite)
        message = f"step {step}: the loss or the gradient is not finite"
        if config.action == "stop" or self._non_finite < config.in_a_row:
            return Alarm("non_finite", config.action, step, step, message)
        message += f", for the {_ordinal(self._non_finite)} time in a row (health.non_finite.in_a_row)"
        return Alarm("non_finite", "stop", step, step, message)

    def judge(self, steps: Sequence[Mapping[str, Any]], routing: Sequence[Mapping[str, Any]]) -> list[Alarm]:
        """Judges a window of records, as `smoe_train.training.meter.Meter.read` returns them.

        Args:
            steps: Records of the steps, in order; those with a true ``skipped`` were not applied and are passed over.
            routing: Routing records over these steps, one a MoE layer.

        Returns:
            The alarms that begin in this window: one goes on without being raised again until it has been over.
        """
        alarms = [alarm for record in steps if (alarm := self._judge_loss(record)) is not None]
        if steps and (alarm := self._judge_routing(steps[0]["step"] - 1, steps[-1]["step"], routing)) is not None:
            alarms.append(alarm)
        return alarms

    def to_json(self) -> dict[str, Any]:
        """Returns the state as JSON holds it; bounded by the window of losses and the number of experts."""
        return {
            "non_finite": [self._non_finite, self._last_non_finite],
            "losses": list(self._losses),
            "spike": list(self._spike),
            "layers": {str(layer): asdict(state) for layer, state in self._layers.items()},
            "rollbacks": {name: list(values) for name, values in self._rollbacks.items()},
        }

    def restore(self, values: Mapping[str, Any]) -> None:
        """Goes on from what `to_json` wrote; from the beginning if that is empty.

        Raises:
            CheckpointError: It is no state of alarms, whoever wrote it.
        """
        try:
            # As JSON: strict, tuples and numbered layers are made of nothing but themselves in Python.
            memory = TypeAdapter(_Memory).validate_json(json.dumps(dict(values)), strict=True)
        except ValidationError as error:
            raise CheckpointError(f"the checkpoint's state of the alarms is none: {error}; use another one") from error
        self._non_finite, self._last_non_finite = memory.non_finite
        self._losses: deque[float] = deque(memory.losses, maxlen=self._config.loss_spike.window_steps)
        self._spike, self._layers, self._rollbacks = memory.spike, memory.layers, memory.rollbacks

    def go_back(self, values: Mapping[str, Any]) -> None:
        """Restores the state of the checkpoint that a rollback went to, without forgetting what led to it."""
        counts = self._non_finite, self._last_non_finite, self._rollbacks
        self.restore(values)
        self._non_finite, self._last_non_finite, self._rollbacks = counts

    def _judge_loss(self, record: Mapping[str, Any]) -> Alarm | None:
        config, step, loss = self._config.loss_spike, record["step"], record["loss"]
        if config.action == "off" or record.get("skipped") or not math.isfinite(loss):
            return None
        usual = spread = 0.0
        above = False
        if 2 * len(self._losses) >= config.window_steps:
            usual, spread = robust_spread(self._losses)
            above = loss > usual + config.threshold * spread
        self._losses.append(loss)
        if not above:
            self._spike = ()
            self._over("loss_spike", step)
            return None
        first, count = self._spike or (step, 0)
        self._spike = (first, count + 1)
        if count + 1 != config.in_a_row:
            return None
        message = (
            f"step {step}: the loss {loss:.4g} is {(loss - usual) / spread:.1f} robust standard deviations above the "
            f"median {usual:.4g} of {len(self._losses) - 1} steps before, for the {_ordinal(config.in_a_row)} step in "
            "a row (health.loss_spike)"
        )
        return self._raised("loss_spike", config.action, first, step, message)

    def _judge_routing(self, before: int, step: int, records: Sequence[Mapping[str, Any]]) -> Alarm | None:
        config = self._config.router_collapse
        if config.action == "off":
            return None
        begun: Found = {}
        for record in records:
            if record["tokens"] and len(record["load"]) > 1:  # with one expert there is nothing to route
                layer = self._layers.setdefault(record["layer"], _Layer())
                found = layer.judge(record, before, step, config)
                begun |= {f"layer {record['layer']}: {text}": value for text, value in found.items()}
        if records and not any(layer.in_danger(config) for layer in self._layers.values()):
            self._over("router_collapse", step)
        if not begun:
            return None
        lines = [f"{where}, since step {since + 1} ({setting})" for where, (since, setting) in begun.items()]
        since = min(since for since, _ in begun.values()) + 1
        message = f"step {step}: routers have collapsed: {'; '.join(lines)}"
        return self._raised("router_collapse", config.action, since, step, message)

    def _raised(self, name: AlarmName, action: Any, since: int, step: int, message: str) -> Alarm:
        if action == "rollback":
            count = self._rollbacks.get(name, (0, 0))[0] + 1
            self._rollbacks[name] = (count, step)
            if count > ROLLBACKS:
                return Alarm(name, "stop", since, step, f"{message}; {ROLLBACKS} rollbacks have not helped")
        return Alarm(name, action, since, step, message)

    def _over(self, name: AlarmName, step: int) -> None:
        """Forgets the rollbacks for an alarm once training is past the steps that raised it and calm."""
        if name in self._rollbacks and step > self._rollbacks[name][1]:
            del self._rollbacks[name]


@dataclass
class _Layer:
    """What one MoE layer's router has done: steps after which an expert was idle, or after which something held.

    Attributes:
        idle_after: Of each expert; None for one that is not.
        holds_after: Of each condition but idle experts.
        collapsed: What an alarm has been raised for and is not over.
    """

    idle_after: list[int | None] = field(default_factory=list)
    holds_after: dict[str, int] = field(default_factory=dict)
    collapsed: list[str] = field(default_factory=list)

    def judge(self, record: Mapping[str, Any], before: int, step: int, config: RouterCollapseConfig) -> Found:
        """Takes in the record of steps ``before`` + 1 to ``step``; returns what has now held for long enough."""
        load, entropy = record["load"], record["entropy_normalised"]
        idle = self.idle_after if len(self.idle_after) == len(load) else [None] * len(load)
        self.idle_after = [
            None if share > 0.0 else before if after is None else after for share, after in zip(load, idle, strict=True)
        ]
        room = len(load) / max(record["experts_per_token"], 1e-9) - 1.0  # none where all experts see every token
        imbalance = (record["load_max_over_mean"] - 1.0) / room if room > 1e-6 else 0.0
        texts = {}
        if config.imbalance is not None and imbalance >= config.imbalance:
            texts["imbalance"] = f"one expert receives {max(load) * record['experts_per_token']:.0%} of the tokens"
        if config.entropy_below is not None and entropy < config.entropy_below:
            texts["entropy_below"] = f"its router's entropy is {entropy:.2g} of the highest"
        self.holds_after = {name: self.holds_after.get(name, before) for name in texts}
        long_ago = step - config.patience_steps
        found = {name: (texts[name], after) for name, after in self.holds_after.items() if after <= long_ago}
        dead = {expert: after for expert, after in self._idle().items() if after <= long_ago}
        if self._too_many(dead, config):
            found["dead_experts"] = (f"{_listed(dead)} of {len(load)} have received no token", max(dead.values()))
        new = [name for name in found if name not in self.collapsed]
        self.collapsed = list(found)
        return {found[name][0]: (found[name][1], f"health.router_collapse.{name}") for name in new}

    def in_danger(self, config: RouterCollapseConfig) -> bool:
        """Whether something holds that will be an alarm if it goes on."""
        return bool(self.holds_after) or self._too_many(self._idle(), config)

    def _idle(self) -> dict[int, int]:
        return {expert: after for expert, after in enumerate(self.idle_after) if after is not None}

    def _too_many(self, idle: Mapping[int, int], config: RouterCollapseConfig) -> bool:
        share = config.dead_experts
        return share is not None and len(idle) > 0 and len(idle) / len(self.idle_after) >= share


@dataclass
class _Memory:
    """The state of all alarms, as a checkpoint holds it.

    Attributes:
        non_finite: Steps in a row that were not finite, and the last of them.
        losses: The losses before, of the window.
        spike: The first step of a spike that goes on, and how many have followed.
        layers: Of each MoE layer.
        rollbacks: Of each alarm how often training was rolled back for it, and the last step that was about.
    """

    non_finite: tuple[int, int] = (0, 0)
    losses: list[FiniteFloat] = field(default_factory=list)
    spike: tuple[()] | tuple[int, int] = ()
    layers: dict[int, _Layer] = field(default_factory=dict)
    rollbacks: dict[AlarmName, tuple[int, int]] = field(default_factory=dict)


def robust_spread(values: Sequence[float] | deque[float]) -> tuple[float, float]:
    """Returns the median and, as a standard deviation, the median absolute deviation from it.

    The deviation is at least `SMALLEST_DEVIATION`. Window and threshold of the loss-spike alarm are those of
    OLMo-core's ``SkipStepOptimizer`` (128 steps, 6 deviations); in place of mean and standard deviation, which the
    outliers to be found inflate, stand median and MAD (the modified z-score of Iglewicz and Hoaglin, 1993).
    """
    middle = median(values)
    deviation = MAD_TO_DEVIATION * median(abs(value - middle) for value in values)
    return middle, max(deviation, SMALLEST_DEVIATION)


def _ordinal(number: int) -> str:
    suffix = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def _listed(experts: Iterable[int]) -> str:
    experts = list(experts)
    shown = ", ".join(map(str, experts[:8]))
    return f"{'expert' if len(experts) == 1 else 'experts'} {shown}{', ...' if len(experts) > 8 else ''}"
