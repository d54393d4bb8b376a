"""The recipe's training, optimizer and evaluation sections."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from smoe_train.config import StrictModel

StatisticsScope = Literal["step", "micro_batch"]
ActivationCheckpointing = Literal["none", "attention", "experts", "all"]  # the model's `Recompute`; that loads torch


def _from_switch(value: Any) -> Any:
    """Returns the policy that a switch stands for, as recipes had it first."""
    return {True: "all", False: "none"}[value] if isinstance(value, bool) else value


class TrainingConfig(StrictModel):
    """Length and batch of training."""

    max_steps: int = Field(1000, ge=1)
    """Optimizer steps altogether."""
    max_seconds: float | None = Field(None, gt=0.0, le=1e8)
    """Seconds from the start of the command, restarts included, after which the run writes a checkpoint and stops,
    resumably (exit code 75); null for no limit. Leave a scheduler's limit room for one step and one checkpoint."""
    grace_seconds: float = Field(120.0, gt=0.0, le=1e8)
    """Seconds from a signal to stop within which the last checkpoint must be written; then the run is killed."""
    hang_seconds: float | None = Field(600.0, gt=0.0, le=1e8)
    """Seconds without any forward pass or save on a rank after which the run counts as hung: every rank's stacks are
    printed and it ends, resumably. Loading and reporting get 180 at least; null waits for ever."""
    sequence_length: int = Field(256, ge=1)
    """Tokens of one training sequence."""
    micro_batch_size: int = Field(8, ge=1)
    """Sequences that one process runs at once."""
    global_batch_size: int = Field(16, ge=1)
    """Sequences of one optimizer step over all processes; the rest is gradient accumulation."""
    gradient_clipping: float | None = Field(1.0, gt=0.0)
    """Largest global gradient norm; null for none."""
    router_statistics: StatisticsScope = "step"
    """What router losses that are no means over tokens (load balance) are computed over. ``step``: all micro-batches
    of the step, so that accumulation is exactly one big batch; with accumulation this costs a forward pass without
    gradients ahead of each step (about a third of its time). ``micro_batch``: each micro-batch over all ranks, as most
    frameworks do; a harder constraint the smaller it is (arXiv 2501.11873)."""
    self_test: bool = True
    """Before step 0, check on one micro-batch that each loss reaches the parameters it should and, of its layer, no
    others, that the optimizer holds each trainable parameter once, and after the first step that experts have changed.
    A few forward and backward passes of one micro-batch; changes nothing."""
    activation_checkpointing: Annotated[
        ActivationCheckpointing, BeforeValidator(_from_switch, bool | ActivationCheckpointing)
    ] = "none"
    """What is computed again in the backward pass instead of stored: ``attention``, ``experts`` (and dense feed-forward
    networks), ``all`` (both; also ``true``) or ``none`` (also ``false``). Routing is replayed, never made again."""


class OptimizerConfig(StrictModel):
    """The optimizer and what it decays."""

    type: Literal["adamw"] = "adamw"
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """Decay of the first moment."""
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    """Decay of the second moment."""
    epsilon: float = Field(1e-8, gt=0.0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0.0)
    """Decoupled weight decay of weight matrices; biases, norms, embeddings and routers' vectors are not decayed."""


class EvaluationConfig(StrictModel):
    """Validation during training."""

    every_steps: int = Field(250, ge=1)
    """Optimizer steps between validations; one is also made at the end."""
    max_tokens: int | None = Field(None, ge=1)
    """Tokens of the validation split to use; all of it if not given."""
    top_k: tuple[int, ...] = ()
    """Numbers of experts a token to validate with, the first choosing the best checkpoint; model.moe.top_k if empty."""
