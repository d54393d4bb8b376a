"""Memory and all-to-all traffic of one rank, from sizes alone; pure arithmetic with its formulas stated."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from smoe_train.parallel.topology import ParallelConfig

LARGEST_BUCKET = 5 * 10**8  # elements; DeepSpeed allocates its buckets whole, so small models get smaller ones


@dataclass(frozen=True)
class Footprint:
    """What one rank needs.

    Attributes:
        weights_bytes: Model weights.
        gradients_bytes: Their gradients; ZeRO 2 partitions them.
        optimizer_bytes: fp32 moments, and fp32 masters of bf16 weights; ZeRO 1 and 2 partition them. Under ZeRO the
            masters exist for fp32 weights too.
        reduction_buffer_bytes: DeepSpeed's buffer for gradients on their way to other ranks, under ZeRO 1 and 2.
        all_to_all_bytes_per_step: Sent by one rank in one optimizer step over all MoE layers, if routing is balanced:
            tokens there and back, and their gradients.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    reduction_buffer_bytes: int
    all_to_all_bytes_per_step: int

    @property
    def model_state_bytes(self) -> int:
        """Weights, gradients, optimizer state and buffer together; activations come on top."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.reduction_buffer_bytes

    def to_json(self) -> dict[str, int]:
        """Returns the figures by name."""
        return {**asdict(self), "model_state_bytes": self.model_state_bytes}


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
    return Footprint(
        weights_bytes=(whole + frozen) * element,
        gradients_bytes=(partitioned if zero >= 2 else whole) * element,
        optimizer_bytes=(partitioned if zero else whole) * states,
        reduction_buffer_bytes=min(LARGEST_BUCKET, whole) * element if zero else 0,
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
