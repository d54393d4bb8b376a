"""Memory and all-to-all traffic of one rank, from sizes alone; pure arithmetic with its formulas stated."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from smoe_train.parallel.topology import ParallelConfig

# Tensors of an expert's width that the backward pass needs: of gelu before and after, of a gate each step of the way.
HIDDEN = {"relu": 1, "gelu": 2, "swiglu": 4}
LOW_PRECISION_ROUTER_BYTES = 4  # of a value of the tokens that routers see, which compute in fp32
LOGITS_BYTES = 16  # of one logit: itself, its log-probability and both their gradients, in fp32

# Elements. DeepSpeed allocates its buckets whole, and copies the gradients of a group of parameters as a whole for its
# step: what is small costs more collectives, what is large memory.
LARGEST_BUCKET = 2**25
LARGEST_EXPERT_GROUP = 2**25


@dataclass(frozen=True)
class Footprint:
    """What one rank needs.

    Attributes:
        weights_bytes: Model weights.
        gradients_bytes: Their gradients; ZeRO 2 partitions them.
        optimizer_bytes: fp32 moments, and fp32 masters of bf16 weights; ZeRO 1 and 2 partition them. Under ZeRO the
            masters exist for fp32 weights too.
        reduction_buffer_bytes: DeepSpeed's buffer for gradients on their way to other ranks, under ZeRO 1 and 2.
        step_copies_bytes: Its copies of the gradients of one group in the optimizer step, flat and, of bf16, in fp32.
        activation_bytes: Activations of a micro-batch at their peak, see `Activations`.
        peak_bytes: The most that exists at once, an estimate: weights and optimizer state, and beside them either
            gradients and copies (the step), or the buffer and of gradients and activations the larger, since the ones
            come as the others go; with accumulation both, since gradients stay. Python, libraries and kernels come on
            top, and what the C library keeps of freed memory.
        all_to_all_bytes_per_step: Sent by one rank in one optimizer step over all MoE layers, if routing is balanced:
            tokens there and back, and their gradients.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    reduction_buffer_bytes: int
    step_copies_bytes: int
    activation_bytes: int
    peak_bytes: int
    all_to_all_bytes_per_step: int

    @property
    def model_state_bytes(self) -> int:
        """Weights, gradients, optimizer state and buffer together."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.reduction_buffer_bytes

    def to_json(self) -> dict[str, int]:
        """Returns the figures by name."""
        return {**asdict(self), "model_state_bytes": self.model_state_bytes}


@dataclass(frozen=True)
class Activations:
    """What decides how much of a forward pass is kept for the backward pass; attention by a fused kernel.

    Numbers of values a token, with D for ``d_model``, K for slots, F for the width of a network:

    - Attention: input, normed input, q, k and v, output (6 D), and rotated q and k (2 D). Computed again: input (D).
    - Feed-forward: input and normed input (2 D). Where the attention is computed again: normed input (D).
    - Dense network: `HIDDEN` F. Computed again: nothing.
    - Experts: sorted tokens and outputs (2 K D), `HIDDEN` K F, in bf16 the router's tokens in fp32. Computed again:
      outputs (K D).
    - Around the layers: input and output of the last norm (2 D). Every RMSNorm keeps one D more, and every dropout its
      mask (D; one for each sublayer and one for the embeddings).

    On top comes the larger of two moments: the loss, with `LOGITS_BYTES` a logit; and the backward pass of one layer,
    whose gradients are about as large as what was kept of its network (twice that where it is computed again first),
    beside the logits that the output holds on to. A contest of all experts, other forms of attention, rows that are
    added for bf16 and statistics are not counted.

    Attributes:
        tokens: Of a micro-batch.
        d_model: D.
        layers: Number of layers.
        moe_layers: Those with experts.
        top_k: K.
        d_ff: F of dense layers.
        d_ff_expert: F of experts.
        feed_forward: Their kind.
        vocab_size: Logits a token; 0 for a classifier.
        rotary: Whether queries and keys are rotated.
        rms_norm: Whether norms are RMSNorms.
        dropout: Whether there is dropout.
        recompute: What is computed again in the backward pass.
        logits_chunk_tokens: Tokens whose logits exist at once; None for all.
    """

    tokens: int
    d_model: int
    layers: int
    moe_layers: int
    top_k: int
    d_ff: int
    d_ff_expert: int
    feed_forward: Literal["relu", "gelu", "swiglu"]
    vocab_size: int
    rotary: bool = True
    rms_norm: bool = False
    dropout: bool = False
    recompute: Literal["none", "attention", "experts", "all"] = "none"
    logits_chunk_tokens: int | None = None

    def kept_bytes(self, element: int) -> int:
        """Returns what is kept of a forward pass before the logits, for activations of that many bytes a value."""
        width, dense_layers = self.d_model, self.layers - self.moe_layers
        norm = 1 if self.rms_norm else 0
        attention = width if self._again("attention") else self._attention()
        around = width * ((1 if self._again("attention") else 2 + norm) + self.dropout)  # of the feed-forward
        dense, experts = (0, 0) if self._again("experts") else (self._dense(), self._experts())
        routed = element * (experts + self.top_k * width) + (LOW_PRECISION_ROUTER_BYTES * width if element < 4 else 0)
        kept = self.layers * (attention + around) + dense_layers * dense + width * (2 + norm + self.dropout)
        return self.tokens * (element * kept + self.moe_layers * routed)

    def peak_bytes(self, element: int) -> int:
        """Returns the most that there is at once."""
        of_dense = self._dense() if self.moe_layers < self.layers else 0
        of_experts = self._experts() + self.top_k * self.d_model if self.moe_layers else 0
        gradients = max(of_dense, of_experts) * (2 if self._again("experts") else 1)
        working = max(gradients, self._attention() if self._again("attention") else 0)
        held = 0 if self.logits_chunk_tokens else self.vocab_size
        at_once = min(self.tokens, self.logits_chunk_tokens or self.tokens)
        moments = (LOGITS_BYTES * self.vocab_size * at_once, element * self.tokens * (working + held))
        return self.kept_bytes(element) + max(moments)

    def _again(self, part: str) -> bool:
        return self.recompute in (part, "all")

    def _attention(self) -> int:
        return self.d_model * (6 + (2 if self.rotary else 0) + self.rms_norm + self.dropout)

    def _dense(self) -> int:
        return HIDDEN[self.feed_forward] * self.d_ff

    def _experts(self) -> int:
        return self.top_k * (self.d_model + HIDDEN[self.feed_forward] * self.d_ff_expert)


def footprint(
    config: ParallelConfig,
    world_size: int,
    expert_parameters: int,
    other_trainable: int,
    frozen: int,
    tokens_per_rank_and_step: int,
    d_model: int,
    moe_layers: int,
    top_k: int,
    activations: Activations | None = None,
    accumulation_steps: int = 1,
) -> Footprint:
    """Returns what one rank needs.

    Args:
        config: The recipe's parallel section.
        world_size: Processes.
        expert_parameters: Parameters of all experts of all layers.
        other_trainable: Trainable parameters that every rank holds.
        frozen: Frozen parameters that every rank holds.
        tokens_per_rank_and_step: Tokens of one rank in one optimizer step.
        d_model: Width of a token.
        moe_layers: Number of MoE layers.
        top_k: Experts a token.
        activations: Of a micro-batch; none are counted if not given.
        accumulation_steps: Micro-batches of a step.
    """
    size = config.expert_parallel_size
    experts = expert_parameters // size
    element = 2 if config.precision == "bf16" else 4
    # Expert state is partitioned over the ranks that hold copies of the same experts, the rest over all ranks.
    expert_share = experts // (world_size // size)
    other_share = other_trainable // world_size
    partitioned = expert_share + other_share
    whole = experts + other_trainable
    zero = config.zero_stage if config.engine == "deepspeed" else 0
    states = 8 + (4 if zero else 0)
    weights, optimizer = (whole + frozen) * element, (partitioned if zero else whole) * states
    gradients = (partitioned if zero >= 2 else whole) * element
    buffer = min(LARGEST_BUCKET, whole) * element if zero else 0
    activation = activations.peak_bytes(element) if activations is not None else 0
    largest_group = max(other_share, min(LARGEST_EXPERT_GROUP, expert_share)) if zero else 0
    copies = largest_group * (element + (4 if config.precision == "bf16" else 0))
    coming_and_going = gradients + activation if accumulation_steps > 1 else max(gradients, activation)
    return Footprint(
        weights_bytes=weights,
        gradients_bytes=gradients,
        optimizer_bytes=optimizer,
        reduction_buffer_bytes=buffer,
        step_copies_bytes=copies,
        activation_bytes=activation,
        peak_bytes=weights + optimizer + max(gradients + copies, buffer + coming_and_going),
        all_to_all_bytes_per_step=(
            4 * tokens_per_rank_and_step * top_k * d_model * element * moe_layers * (size - 1) // size
        ),
    )


RESPONSE_BYTES, WINNER_BYTES = 4, 4  # fp32 and int32, whatever the precision


def contest_bytes(num_tokens: int, d_model: int, num_experts: int, top_k: int, size: int, element: int) -> int:
    """Returns what one rank sends for the contest of one layer, forward and backward, if winners are balanced.

    To each of the P - 1 other ranks, a token: its values, the responses of this rank's N / P experts to the other's
    token, and its K winners; and of K winners' outputs the share (P - 1) / P. All but the winners again as gradients.
    See `smoe_train.parallel.contest_exchange`. A recomputation adds at most the forward part again.

    Args:
        num_tokens: Tokens of one rank.
        d_model: D.
        num_experts: N.
        top_k: K.
        size: P, the expert-parallel size.
        element: Bytes of an activation.
    """
    others = size - 1
    rows = d_model * element
    both_ways = others * (rows + num_experts // size * RESPONSE_BYTES) * size + top_k * rows * others
    return num_tokens * (2 * both_ways // size + others * top_k * WINNER_BYTES)
