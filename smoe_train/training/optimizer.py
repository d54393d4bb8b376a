"""Optimizer groups and the optimizer itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from smoe_train.routing import Router
from smoe_train.training.config import OptimizerConfig


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Returns groups, ``decayed`` and ``not_decayed``, of all trainable parameters.

    Decayed are weight matrices: of linear layers, stacked experts and routers. Not decayed are biases (also the
    experts', which are stacked to two dimensions), norms, embeddings and routers' vectors. What routers freeze in the
    course of training is in groups of its own, marked ``late_frozen``, whose learning rate is then 0.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    late_frozen = {
        id(parameter) for module in model.modules() if isinstance(module, Router) for parameter in module.late_frozen()
    }
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_bias = name.rpartition(".")[2].startswith(("b_", "bias"))
        keep = parameter.dim() < 2 or is_bias or id(parameter) in embeddings
        groups.setdefault((id(parameter) in late_frozen, keep), []).append(parameter)
    return [
        {
            "name": ("late_frozen_" if late else "") + ("not_decayed" if keep else "decayed"),
            "params": parameters,
            "weight_decay": 0.0 if keep else config.weight_decay,
            "late_frozen": late,
        }
        for (late, keep), parameters in sorted(groups.items())
    ]


def make_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Returns the optimizer; its learning rate is set before each step."""
    return torch.optim.AdamW(
        groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.epsilon, weight_decay=0.0, fused=True
    )
