"""Optimizer groups and the optimizer itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from smoe_train.training.config import OptimizerConfig


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Returns the groups ``decayed`` and ``not_decayed`` of all trainable parameters.

    Decayed are weight matrices: of linear layers, stacked experts and routers. Not decayed are biases (also the
    experts', which are stacked to two dimensions), norms, embeddings and routers' vectors.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_bias = name.rpartition(".")[2].startswith(("b_", "bias"))
        keep = parameter.dim() < 2 or is_bias or id(parameter) in embeddings
        (not_decayed if keep else decayed).append(parameter)
    groups = [
        {"name": "decayed", "params": decayed, "weight_decay": config.weight_decay},
        {"name": "not_decayed", "params": not_decayed, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Returns the optimizer; its learning rate is set before each step."""
    return torch.optim.AdamW(
        groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.epsilon, weight_decay=0.0, fused=True
    )
