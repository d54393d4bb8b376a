"""The recipe's performance section: in which form a step is computed. The forms differ in rounding only.

A resumed run is equal to an uninterrupted one to the bit if both have the same forms, and a note says which they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from smoe_train.config import StrictModel

if TYPE_CHECKING:
    from torch import nn

AttentionForm = Literal["sdpa", "matmul", "cpp", "auto"]
ExpertsForm = Literal["torch", "cpp", "auto"]
Recompute = Literal["none", "attention", "experts", "all"]  # what is computed again in the backward pass


class PerformanceConfig(StrictModel):
    """Forms of the parts of a step."""

    experts: ExpertsForm = "torch"
    """The experts on a CPU. ``torch``: PyTorch's operations. ``cpp``: an operator that is compiled at the first use on
    a machine (about 20 s; needs a C++ compiler), for fp32 and bf16; accelerators keep to PyTorch's grouped product.
    ``auto``: ``cpp`` where it can be compiled, and a note where not."""
    attention: AttentionForm = "sdpa"
    """``sdpa``: torch's kernels. ``cpp``: on a CPU an operator that is compiled with that of the experts, for attention
    without a mask (of padding, or of documents in a packed sequence); with one, and on accelerators, ``sdpa``.
    ``matmul``: two products and a softmax over all scores, which take memory with the square of the sequence and are
    rounded to bf16 in between. ``auto``: what is fastest by measurement: on a CPU ``cpp`` where it can be compiled and
    there is no mask; otherwise ``matmul`` in bf16 on a CPU up to 512 tokens, and ``sdpa`` for all else."""
    compile: bool = False
    """Whether attention, norms, dense feed-forwards and the loss are compiled by torch for training. The first step
    takes up to a minute longer; experts and routers stay as they are, since their shapes change in every step."""
    logits_chunk_tokens: int | None = Field(None, ge=1)
    """Tokens whose logits over the vocabulary exist at once when a language model's loss is computed; null for all of a
    micro-batch. A large vocabulary's logits and their gradients are then the largest tensors of a step."""


def apply_performance(model: nn.Module, config: PerformanceConfig, device_type: str) -> list[str]:
    """Switches a model to the configured forms; returns what there is to say of them.

    Args:
        model: As built.
        config: The recipe's section.
        device_type: Where the model is trained.

    Raises:
        LaunchError: A form was asked for that cannot be had on this machine.
    """
    notes = _fuse(model, config, device_type) + chunk_logits(model, config)
    return notes + _dense_parts(model, config)


def _dense_parts(model: nn.Module, config: PerformanceConfig) -> list[str]:
    from smoe_train.model.attention import Attention
    from smoe_train.model.block import Block
    from smoe_train.model.causal_lm import SmoeForCausalLM

    for module in model.modules():
        if isinstance(module, Attention):
            module.form = config.attention
        elif isinstance(module, Block) and config.compile:
            module.compile_dense_parts()
        elif isinstance(module, SmoeForCausalLM) and config.compile and config.logits_chunk_tokens is None:
            module.compile_loss()
    return ["attention, norms and dense feed-forwards: compiled by torch"] if config.compile else []


def chunk_logits(model: nn.Module, config: PerformanceConfig) -> list[str]:
    """Lets a language model compute its loss without the logits of all tokens, if configured; returns notes on it."""
    from smoe_train.model.causal_lm import SmoeForCausalLM

    if config.logits_chunk_tokens is None or not isinstance(model, SmoeForCausalLM):
        return []
    model.logits_chunk_tokens = config.logits_chunk_tokens
    return [f"loss: the logits of {config.logits_chunk_tokens} tokens at a time"]


def _fuse(model: nn.Module, config: PerformanceConfig, device_type: str) -> list[str]:
    from smoe_train.errors import LaunchError
    from smoe_train.kernels.build import load_kernels, why_not
    from smoe_train.model.attention import Attention
    from smoe_train.model.feed_forward import StackedExperts
    from smoe_train.routing import Router

    modules = list(model.modules())
    parts: dict[str, tuple[str, tuple[type[nn.Module], ...]]] = {
        "attention": (config.attention, (Attention,)),
        "experts": (config.experts, (StackedExperts, Router)),
    }
    notes = []
    for part, (form, kinds) in parts.items():
        fused = [module for module in modules if isinstance(module, kinds)]
        if form not in ("cpp", "auto") or device_type != "cpu" or not fused:
            continue
        missing = why_not() if form == "auto" else None
        if missing is None:
            try:
                load_kernels()
            except LaunchError as error:
                if form != "auto":
                    raise
                missing = str(error)
        if missing is not None:
            notes.append(f"{part}: PyTorch's operations, as {missing}")
            continue
        for module in fused:
            module.fused = True  # type: ignore[assignment]
        notes.append(f"{part}: the compiled operator")
    return notes
