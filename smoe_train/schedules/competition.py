"""Which MoE layers let their experts compete at which step: a pure function of (seed, step, layer)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from pydantic import Field

from smoe_train.config import StrictModel

# Events are moved within windows of this many steps, so that a longer training never changes the steps before.
WINDOW_STEPS = 1024
# Share of the limit that coins may fill on average: beyond it, windows overflow and the last layers lose contests.
FULLEST = 0.9


class CompetitionConfig(StrictModel):
    """How often the experts of CompeteSMoE compete (arXiv 2505.13380)."""

    flip_rate: float = Field(0.07, ge=0.0, le=1.0)
    """Probability that a layer competes in a step (0.07 in the language models of the released code, 0.05 in its
    vision-language models)."""
    warmup_steps: int = Field(0, ge=0)
    """Steps at the start in which no layer competes (the released code: none in its language models, 5 % of training
    in its vision-language models)."""
    max_layers: int | None = Field(3, ge=1)
    """Most layers that compete in one step, which bounds its memory and time; what exceeds it moves to the nearest
    earlier step with room, else to a later one. null for no limit."""

    def problems(self, num_layers: int, max_steps: int) -> list[tuple[str, str]]:
        """Returns (key, message) for settings under which contests that are promised are not held.

        Args:
            num_layers: MoE layers.
            max_steps: Optimizer steps of training.
        """
        found = []
        promised = self.flip_rate * num_layers
        limit = self.max_layers
        if limit is not None and limit < num_layers and promised > FULLEST * limit:
            message = (
                f"{limit} leaves too little room for the {promised:g} contests a step that flip_rate "
                f"{self.flip_rate:g} promises in {num_layers} layers, so the last layers would hold fewer; raise it "
                f"to at least {math.ceil(promised / FULLEST)}, or use null"
            )
            found.append(("max_layers", message))
        if self.warmup_steps >= max_steps:
            found.append(("warmup_steps", f"{self.warmup_steps} leaves no step of training.max_steps {max_steps}"))
        return found


@dataclass(frozen=True)
class CompetitionSchedule:
    """The schedule of one run.

    A layer's coin is flipped for each step after the warm-up. Where more layers than allowed would compete, the later
    layers' events move to the nearest earlier step with room, else to the nearest later one, within a window of
    `WINDOW_STEPS` steps. The coins come from a counter-based generator keyed by (seed, layer, window): nothing is
    stored, any step can be asked for in any order, and a longer training leaves the steps before as they were.

    Source: arXiv 2505.13380, ``set_total_steps`` of the released code. Deviations: there the schedule is drawn without
    a seed at every start, is redrawn on resume, ends with the planned steps, and is broadcast by rank 0.

    Attributes:
        config: Rate, warm-up and limit.
        seed: Run seed.
        layers: Indices of the MoE layers.
    """

    config: CompetitionConfig
    seed: int
    layers: tuple[int, ...]

    def competing(self, step: int) -> frozenset[int]:
        """Returns the layers that compete in an optimizer step."""
        after = step - self.config.warmup_steps
        if after < 0 or not self.layers or self.config.flip_rate == 0.0:
            return frozenset()
        table = _window(self.config, self.seed, self.layers, after // WINDOW_STEPS)
        return frozenset(
            layer for layer, competes in zip(self.layers, table[:, after % WINDOW_STEPS], strict=True) if competes
        )


@lru_cache(maxsize=64)
def _window(
    config: CompetitionConfig, seed: int, layers: tuple[int, ...], window: int
) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """Returns who competes when in a window: bool [layers, WINDOW_STEPS]."""
    table = np.zeros((len(layers), WINDOW_STEPS), dtype=np.bool_)
    for place, layer in enumerate(layers):
        # Philox is counter-based; numpy guarantees the stream of `random_raw`, not that of its distributions.
        raw = np.random.Philox(np.random.SeedSequence([seed, layer, window])).random_raw(WINDOW_STEPS)
        table[place] = (raw >> np.uint64(11)) * 2.0**-53 < config.flip_rate
    limit = config.max_layers
    if limit is None or limit >= len(layers):
        return table
    used = np.zeros(WINDOW_STEPS, dtype=np.int64)
    for row in table:
        crowded = np.flatnonzero(row & (used >= limit))
        row[crowded] = False
        used += row
        for step in crowded:
            room = np.flatnonzero((used < limit) & ~row)
            if room.size == 0:
                break  # the rate times the layers exceeds the limit at every step: the limit decides
            earlier = room[room < step]
            target = earlier[-1] if earlier.size else room[0]
            row[target] = True
            used[target] += 1
    return table
