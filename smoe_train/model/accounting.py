"""Counting parameters without allocating them: total, active, trainable, frozen, and what experts hold."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from smoe_train.model.feed_forward import StackedExperts
from smoe_train.model.smoe_config import SmoeConfig
from smoe_train.model.transformer import SmoeForCausalLM


@dataclass(frozen=True)
class ParameterCensus:
    """Numbers of parameters of a model.

    Attributes:
        total: All parameters; tied embeddings count once.
        active: Those that one token uses: everything but the experts it does not visit.
        trainable: Those that are trained.
        frozen: Those that are not (HyperRouter's hypernetworks).
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


def census(config: SmoeConfig) -> ParameterCensus:
    """Counts the parameters of a configuration on torch's meta device."""
    with torch.device("meta"):
        model = SmoeForCausalLM(config)
    model.tie_weights()
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
