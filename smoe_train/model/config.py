"""The recipe's model section, and what follows from it: which layers are MoE, which settings have no effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from smoe_train.config import StrictModel
from smoe_train.model.feed_forward import FeedForwardKind
from smoe_train.routing import ROUTERS, AnyRouterConfig, RouterPlan
from smoe_train.routing.top_k import TopKConfig


class MoeConfig(StrictModel):
    """The mixture-of-experts layers."""

    layers: Literal["all"] | tuple[int, ...] = "all"
    """Indices of the layers whose feed-forward is a mixture of experts; an empty list gives the dense twin of a recipe,
    in which the other options of this section rest."""
    num_experts: int = Field(8, ge=1, le=1_000_000)
    """Routed experts a layer."""
    d_ff: int = Field(512, ge=1, le=1 << 24)
    """Hidden width of one expert."""
    top_k: int = Field(2, ge=1)
    """Experts a token in evaluation and inference, and in training unless curriculum.top_k schedules it."""
    load_balance_coefficient: float = Field(0.01, ge=0.0)
    """Weight of the load-balance loss (mean over MoE layers); 0 switches it off, its value is still logged."""
    z_loss_coefficient: float = Field(0.0, ge=0.0)
    """Weight of the router z-loss (mean over MoE layers); 0 switches it off, its value is still logged."""
    router: AnyRouterConfig = TopKConfig()
    """The routing policy; ``type`` chooses it (see ``smoe-train routers``)."""


class ModelConfig(StrictModel):
    """A transformer."""

    d_model: int = Field(256, ge=1, le=1 << 20)
    """Width of the residual stream."""
    num_layers: int = Field(4, ge=1, le=10_000)
    """Transformer blocks."""
    num_heads: int = Field(8, ge=1)
    """Attention heads; must divide d_model."""
    d_ff: int | None = Field(None, ge=1, le=1 << 24)
    """Hidden width of the feed-forward in layers that are not MoE; 4 * d_model if not given."""
    feed_forward: FeedForwardKind = "gelu"
    """Two layers with bias (``relu``, ``gelu``) or gated without (``swiglu``); for dense layers and experts alike."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """Kind of normalisation."""
    norm_position: Literal["pre", "post"] = "pre"
    """Normalise a sublayer's input (``pre``), or the sum of input and output (``post``, as Transformer-XL does)."""
    positions: Literal["learned", "rotary"] = "rotary"
    """Learned absolute positions, or rotary (arXiv 2104.09864)."""
    rope_theta: float = Field(10000.0, gt=0.0)
    """Base of the rotary frequencies; only with rotary positions."""
    max_sequence_length: int | None = Field(None, ge=1)
    """Longest sequence that the model is made for; training.sequence_length if not given."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on embeddings and on each sublayer's output in training."""
    tie_embeddings: bool = True
    """Whether input and output embeddings are one matrix."""
    init_std: float = Field(0.02, gt=0.0)
    """Standard deviation of initial weights; sublayers' output projections get init_std / sqrt(2 * num_layers)."""
    moe: MoeConfig = MoeConfig()
    """The mixture-of-experts layers."""

    def moe_layers(self) -> tuple[int, ...]:
        """Returns the indices of the MoE layers in order."""
        return tuple(range(self.num_layers)) if self.moe.layers == "all" else tuple(sorted(self.moe.layers))

    def problems(
        self, top_k_values: frozenset[int], max_steps: int, causal: bool = True, loaded: bool = False
    ) -> list[tuple[str, str]]:
        """Returns (key, message) for settings that contradict each other or have no effect.

        Args:
            top_k_values: Every k that training will use.
            max_steps: Optimizer steps of training.
            causal: Whether tokens must not depend on later ones.
            loaded: Whether routers begin with the weights of another training.
        """
        return [*self._shape_problems(), *self._moe_problems(top_k_values, max_steps, causal, loaded)]

    def _shape_problems(self) -> list[tuple[str, str]]:
        found = []
        if self.d_model % self.num_heads:
            found.append(("num_heads", f"{self.num_heads} does not divide d_model {self.d_model}"))
        elif self.positions == "rotary" and self.d_model // self.num_heads % 2:
            width = self.d_model // self.num_heads
            found.append(("num_heads", f"rotary positions need an even head width, not {width}; or use learned"))
        if self.positions == "learned" and self.rope_theta != ModelConfig.model_fields["rope_theta"].default:
            found.append(("rope_theta", "has no effect with learned positions; leave it out"))
        if self.d_ff is not None and len(self.moe_layers()) == self.num_layers:
            found.append(("d_ff", "has no effect when every layer is MoE; set moe.d_ff, or choose moe.layers"))
        return found

    def _moe_problems(
        self, top_k_values: frozenset[int], max_steps: int, causal: bool, loaded: bool
    ) -> list[tuple[str, str]]:
        moe, found = self.moe, []
        layers = self.moe_layers()
        if any(not 0 <= layer < self.num_layers for layer in layers) or len(set(layers)) < len(layers):
            found.append(("moe.layers", f"expected different indices from 0 to {self.num_layers - 1}, got {layers}"))
        if not layers:
            return found
        too_many = sorted(k for k in top_k_values | {moe.top_k} if k > moe.num_experts)
        if too_many:
            key = "moe.top_k" if moe.top_k in too_many else "moe.num_experts"
            found.append((key, f"k = {too_many[-1]} exceeds num_experts {moe.num_experts}"))
        possible = top_k_values or frozenset({moe.num_experts})  # none is, which has been said
        plan = RouterPlan(possible, moe.num_experts, max_steps, causal, loaded)
        found.extend(("moe.router", problem) for problem in moe.router.problems(plan))
        available = ROUTERS.get(moe.router.type).router.losses_of(moe.router)
        for loss, coefficient in (("load_balance_loss", "load_balance_coefficient"), ("z_loss", "z_loss_coefficient")):
            value, default = getattr(moe, coefficient), MoeConfig.model_fields[coefficient].default
            if loss not in available and value not in (0.0, default):
                found.append((f"moe.{coefficient}", f"has no effect: {moe.router.type} has no {loss}"))
        return found


def section_of(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the recipe's model section of an exported ``config.json``, the inverse of `SmoeConfig.create`."""
    same = [name for name in ModelConfig.model_fields if name in flat]
    layers = list(flat["moe_layers"])
    dense = len(layers) < flat["num_layers"]
    return {
        **{name: flat[name] for name in same if name != "d_ff"},
        **({"d_ff": flat["d_ff"]} if dense else {}),
        "tie_embeddings": flat["tie_word_embeddings"],
        "moe": {
            "layers": layers,
            "num_experts": flat["num_experts"],
            "d_ff": flat["d_ff_expert"],
            "top_k": flat["num_experts_per_tok"],
            "load_balance_coefficient": flat["load_balance_coefficient"],
            "z_loss_coefficient": flat["z_loss_coefficient"],
            "router": flat["router"],
        },
    }
