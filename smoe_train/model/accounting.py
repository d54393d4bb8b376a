"""Counting parameters without allocating them: total, active, trainable, frozen, and what experts hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch

from smoe_train.model.causal_lm import SmoeForCausalLM
from smoe_train.model.feed_forward import StackedExperts
from smoe_train.model.smoe_config import SmoeConfig
from smoe_train.model.transformer import SmoeModel


@dataclass(frozen=True)
class ParameterCensus:
    """Numbers of parameters of a model.

    Attributes:
        total: All parameters; tied embeddings count once.
        active: Those that one token uses: everything but the experts it does not visit.
        trainable: Those that are trained.
        frozen: Those that are not (HyperRouter's hypernetworks, random routers, what the recipe freezes).
        experts: Those in experts.
        routers: Those in routers.
    """

    total: int
    active: int
    trainable: int
    frozen: int
    experts: int
    routers: int

    def to_json(self) -> dict[str, int]:
        """Returns the counts by name."""
        return asdict(self)


def census(config: SmoeConfig, freeze: Iterable[str] = (), language_model: bool = True) -> ParameterCensus:
    """Counts the parameters of a configuration on torch's meta device.

    Args:
        config: The architecture.
        freeze: Parts that are not trained; see `SmoePreTrainedModel.freeze`.
        language_model: Whether to count a language model's head; that of a classifier is too small to count.
    """
    with torch.device("meta"):
        model = SmoeForCausalLM(config) if language_model else SmoeModel(config)
    model.tie_weights()
    model.freeze(freeze)
    parameters = {id(parameter): parameter for parameter in model.parameters()}.values()
    total = sum(parameter.numel() for parameter in parameters)
    frozen = sum(parameter.numel() for parameter in parameters if not parameter.requires_grad)
    experts = sum(
        parameter.numel()
        for module in model.modules()
        if isinstance(module, StackedExperts)
        for parameter in module.parameters()
    )
    routers = sum(p.numel() for router in model.routers().values() for p in router.parameters())
    idle = experts * (config.num_experts - config.num_experts_per_tok) // config.num_experts
    return ParameterCensus(total, total - idle, total - frozen, frozen, experts, routers)


def forward_flops(
    config: SmoeConfig, experts_per_token: float, sequence_length: int, language_model: bool = True
) -> float:
    """Returns the FLOPs of a forward pass for one token: two for each multiplication in a matrix product.

    It is linear in the experts: with a share f of tokens that visit two experts and the rest one,
    ``F(1 + f) = F(1) + f * (F(2) - F(1))``. A training step takes about three times as many.

    Args:
        config: The architecture.
        experts_per_token: Mean over tokens and MoE layers, ``experts_per_token`` of routing.jsonl.
        sequence_length: Attention is counted over all of it, as if no position were masked.
        language_model: Whether each token has logits; a classifier has a few for a whole sequence, which do not count.
    """
    width, moe_layers = config.d_model, len(config.moe_layers)
    matrices = 3 if config.feed_forward == "swiglu" else 2
    attention = 4 * width * width + 2 * sequence_length * width
    dense = matrices * width * config.d_ff
    # A router is counted as one linear layer; what a hypernetwork generates is generated once a pass.
    moe = width * config.num_experts + experts_per_token * matrices * width * config.d_ff_expert
    head = width * config.vocab_size if language_model else 0
    return 2.0 * (config.num_layers * attention + (config.num_layers - moe_layers) * dense + moe_layers * moe + head)
