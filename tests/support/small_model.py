"""A model of two layers that runs in milliseconds, for tests of the model room."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smoe_train.model import SmoeConfig, SmoeForCausalLM

VOCAB = 29


def small_config(**changes: Any) -> SmoeConfig:
    """Two MoE layers of four experts; keyword arguments replace fields."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "d_model": 16,
        "num_layers": 2,
        "num_heads": 2,
        "d_ff": 24,
        "max_sequence_length": 32,
        "moe_layers": [0, 1],
        "num_experts": 4,
        "d_ff_expert": 12,
        "num_experts_per_tok": 2,
        "init_std": 0.3,
        "router": {"type": "top_k", "init_std": 0.3},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return SmoeConfig(**{**values, **changes})


def small_model(**changes: Any) -> SmoeForCausalLM:
    """A model of `small_config`; large initial weights make every part visible in the logits."""
    return SmoeForCausalLM(small_config(**changes))


def text(batch: int = 2, length: int = 11, seed: int = 0) -> Tensor:
    """Token ids."""
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
