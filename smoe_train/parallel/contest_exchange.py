"""Contests across the ranks of an expert-parallel group: tokens go to all ranks, responses and winners come back.

Each rank gathers the group's tokens, runs its experts on all of them, and sends back fp32 responses, one number for a
token and expert. Winners are chosen on a token's home rank, and only their outputs travel. Sending every token to every
expert's rank and every output back would move 2 N rows a token, N experts; this moves P + K, P ranks, and some numbers.
The ranks' work is equal whatever wins.

Shape suffixes: P ranks of the group, L experts of a rank, t tokens of a rank's chunk, U = P * t tokens of the group's,
K winners a token, D d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from smoe_train.parallel.all_to_all import all_to_all, exchange
from smoe_train.parallel.contest import Choose, Contested, Once, Respond, in_chunks, run_all
from smoe_train.parallel.dispatch_plan import DispatchPlan, Experts, plan_dispatch, returned_to_slot_order
from smoe_train.parallel.traffic import count_rows

# torch 2.13 has renamed it and warns about the name that earlier versions have.
_gather_into: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

TOKENS, RESPONSES, WINNERS, OUTPUTS = "contest_tokens", "contest_responses", "contest_winners", "contest_outputs"


@dataclass(frozen=True)
class Place:
    """Where this rank stands among those that share a set of experts.

    Attributes:
        group: Their process group.
        num_ranks: P.
        index: This rank's place in it; it holds the experts from ``index * experts_per_rank``.
        experts_per_rank: L.
    """

    group: Any
    num_ranks: int
    index: int
    experts_per_rank: int


@dataclass(frozen=True)
class ReturnPlan:
    """How the winners' outputs come home.

    Attributes:
        expert_ids_tK: int64 winners of this rank's tokens.
        home: Order of this rank's slots by the rank that holds the winner.
        send_rows: Rows for each rank of the group.
        receive_rows: Rows from each rank of the group.
        rows_to_send: int64, which of this rank's U * L output rows they are, in order.
    """

    expert_ids_tK: Tensor
    home: DispatchPlan
    send_rows: list[int]
    receive_rows: list[int]
    rows_to_send: Tensor


class _AllGather(torch.autograd.Function):
    """Rows of all ranks, in rank order; the backward pass adds up every rank's gradient of this rank's rows.

    Gradients travel in the dtype of the rows, as they do in the all-to-all, and are added up in fp32 in rank order:
    a reduce-scatter would move as many bytes, round at each addition in bf16, and choose the order itself.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, place: Place) -> Tensor:
        ctx.place = place
        return _gather(rows, place, TOKENS)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        num_ranks, (grad,) = ctx.place.num_ranks, grads
        even = [grad.shape[0] // num_ranks] * num_ranks
        received = exchange(grad, even, even, ctx.place.group, f"{TOKENS}_gradients")
        received = received.view(num_ranks, even[0], *grad.shape[1:])
        return received.sum(dim=0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(grad.dtype), None


def contest_across(
    experts: Experts,
    place: Place,
    x_TD: Tensor,
    respond: Respond,
    choose: Choose,
    chunk_tokens: int | None,
    recompute: bool,
) -> Contested:
    """Lets the experts of a group of ranks compete; all ranks call it with equally many tokens.

    Forward a chunk: one gather of tokens, an all-to-all of responses, a gather of winners (int32), the host's look at
    the split sizes, an all-to-all of outputs. Backward: the same without the gather of winners and the look. A
    recomputation repeats what the backward pass needs, with the winners and sizes of the forward pass.

    Args:
        experts: The experts of this rank.
        place: This rank's place in the group.
        x_TD: This rank's tokens.
        respond: Expert outputs [R, D] to responses [R].
        choose: Responses [T, E] of some of the tokens, and which these are, to winners [T, K].
        chunk_tokens: Tokens of a rank that are run at once; None for all.
        recompute: Whether activations are computed again in the backward pass instead of stored.
    """

    def run(x_tD: Tensor, part: slice, once: Once[ReturnPlan]) -> Contested:
        x_UD: Tensor = _AllGather.apply(x_tD, place)  # type: ignore[no-untyped-call]
        y_ULD = run_all(experts, place.experts_per_rank, x_UD)
        responses_tE = _responses_home(respond(y_ULD.flatten(0, 1)).view(y_ULD.shape[:2]), place)
        plan = once(lambda: _plan_return(choose(responses_tE.detach(), part), place))
        rows = y_ULD.flatten(0, 1).index_select(0, plan.rows_to_send)
        returned = all_to_all(rows, plan.send_rows, plan.receive_rows, place.group, OUTPUTS)
        return responses_tE, plan.expert_ids_tK, returned_to_slot_order(returned, plan.home)

    return in_chunks(run, x_TD, chunk_tokens, recompute)


def _gather(rows: Tensor, place: Place, kind: str) -> Tensor:
    count_rows(kind, rows, (place.num_ranks - 1) * rows.shape[0])
    gathered = rows.new_empty((place.num_ranks * rows.shape[0], *rows.shape[1:]))
    _gather_into(gathered, rows.contiguous(), group=place.group)
    return gathered


def _responses_home(responses_UL: Tensor, place: Place) -> Tensor:
    """Sends the responses of this rank's experts to the tokens' home ranks; returns those of all experts [t, E]."""
    num_tokens = responses_UL.shape[0] // place.num_ranks
    even = [num_tokens] * place.num_ranks
    received_UL = all_to_all(responses_UL, even, even, place.group, RESPONSES)
    received_PtL = received_UL.view(place.num_ranks, num_tokens, place.experts_per_rank)
    return received_PtL.transpose(0, 1).reshape(num_tokens, place.num_ranks * place.experts_per_rank)


def _plan_return(expert_ids_tK: Tensor, place: Place) -> ReturnPlan:
    """Tells all ranks who won, so that each knows what to send and what to expect."""
    # Floor division keeps empty slots, which are -1, negative: no rank's.
    home = plan_dispatch(expert_ids_tK // place.experts_per_rank, place.num_ranks)
    ids_UK = _gather(expert_ids_tK.to(torch.int32), place, WINNERS).to(torch.int64)
    is_here = (ids_UK // place.experts_per_rank == place.index).flatten()
    send = is_here.view(place.num_ranks, -1).sum(dim=1)
    send_rows, receive_rows = torch.stack([send, home.rows_per_expert_E]).tolist()
    top_k = ids_UK.shape[1]
    slot = torch.argsort((~is_here).to(torch.int8), stable=True)[: sum(send_rows)]
    local_expert = ids_UK.flatten()[slot] - place.index * place.experts_per_rank
    return ReturnPlan(
        expert_ids_tK, home, send_rows, receive_rows, slot // top_k * place.experts_per_rank + local_expert
    )
