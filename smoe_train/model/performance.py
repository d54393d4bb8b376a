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
    from smoe_train.model.attention import Attention
    from smoe_train.model.feed_forward import StackedExperts
    from smoe_train.routing import Router

    kinds: dict[str, tuple[type[nn.Module], ...]] = {"attention": (Attention,), "experts": (StackedExperts, Router)}
    forms: dict[str, str] = {"attention": config.attention, "experts": config.experts}
    parts = {
        part: [module for module in model.modules() if isinstance(module, kinds[part])]
        for part, form in forms.items()
        if form in ("cpp", "auto") and device_type == "cpu"
    }
    parts = {part: modules for part, modules in parts.items() if modules}
    if not parts:
        return []
    missing = _missing_operators(required=any(forms[part] == "cpp" for part in parts))
    if missing is not None:
        return [f"{part}: PyTorch's operations, as {missing}" for part in parts]
    for modules in parts.values():
        for module in modules:
            module.fused = True  # type: ignore[assignment]
    return [f"{part}: the compiled operator" for part in parts]


def _missing_operators(required: bool) -> str | None:
    """Loads the compiled operators; returns why they cannot be had, which is an error where they are required."""
    from smoe_train.errors import LaunchError
    from smoe_train.kernels.build import load_kernels, why_not

    missing = None if required else why_not()
    if missing is None:
        try:
            load_kernels()
        except LaunchError as error:
            if required:
                raise
            missing = str(error)
    return missing
