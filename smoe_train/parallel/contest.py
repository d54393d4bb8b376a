"""Contests: every expert runs once on every token, and of its outputs only the winners' stay. No communication.

Shape suffixes: T tokens, t tokens of a chunk, E experts, K winners a token, R rows sorted by expert, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from smoe_train.parallel.dispatch_plan import Experts, plan_everyone

Respond = Callable[[Tensor], Tensor]
Choose = Callable[[Tensor, slice], Tensor]
Contested = tuple[Tensor, Tensor, Tensor]  # responses [T, E], winners [T, K], their outputs [T, K, D]
Decision = TypeVar("Decision")


class Once(Generic[Decision]):
    """Makes a decision at the first call and returns the same from then on: a recomputation must not decide again.

    On an accelerator the outputs computed again may differ in the last bit, and with them who wins a close contest.
    """

    def __init__(self) -> None:
        self._made: list[Decision] = []

    def __call__(self, decide: Callable[[], Decision]) -> Decision:
        """Returns the decision."""
        if not self._made:
            with torch.no_grad():
                self._made.append(decide())
        return self._made[0]


def in_chunks(
    run: Callable[[Tensor, slice, Once[Decision]], Contested], x_TD: Tensor, chunk_tokens: int | None, recompute: bool
) -> Contested:
    """Runs a contest for some of the tokens at a time.

    Args:
        run: The contest for tokens [t, D], with which they are and what keeps its decision.
        x_TD: All tokens; if other ranks take part, they have the same number.
        chunk_tokens: Tokens at once; None for all.
        recompute: Whether each chunk's activations are computed again in the backward pass instead of stored.
    """
    num_tokens = x_TD.shape[0]
    size = max(num_tokens if chunk_tokens is None else min(chunk_tokens, num_tokens), 1)
    parts = []
    for start in range(0, max(num_tokens, 1), size):
        part = slice(start, min(start + size, num_tokens))
        arguments = (x_TD[part], part, Once[Decision]())
        parts.append(checkpoint(run, *arguments, use_reentrant=False) if recompute else run(*arguments))
    if len(parts) == 1:
        return parts[0]
    responses, winners, outputs = zip(*parts, strict=True)
    return torch.cat(responses), torch.cat(winners), torch.cat(outputs)


def run_all(experts: Experts, num_experts: int, x_TD: Tensor) -> Tensor:
    """Returns the outputs [T, E, D] of every expert on every token."""
    return experts(x_TD, plan_everyone(x_TD.shape[0], num_experts, x_TD.device))


def winners_outputs(y_TED: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """Returns the outputs [T, K, D] of the experts that are named, zero in empty slots."""
    num_tokens, num_experts, width = y_TED.shape
    token_T1 = torch.arange(num_tokens, device=y_TED.device).unsqueeze(1)
    row_TK = token_T1 * num_experts + expert_ids_TK.clamp(min=0)
    y_TKD = y_TED.flatten(0, 1).index_select(0, row_TK.flatten()).view(*row_TK.shape, width)
    zero = torch.zeros((), dtype=y_TKD.dtype, device=y_TKD.device)
    return torch.where((expert_ids_TK >= 0).unsqueeze(-1), y_TKD, zero)


def contest_here(
    experts: Experts,
    num_experts: int,
    x_TD: Tensor,
    respond: Respond,
    choose: Choose,
    chunk_tokens: int | None,
    recompute: bool,
) -> Contested:
    """Lets experts that are all in this process compete.

    Args:
        experts: Runs them as planned.
        num_experts: E.
        x_TD: Tokens.
        respond: Expert outputs [R, D] to responses [R].
        choose: Responses [T, E] of some of the tokens, and which these are, to winners [T, K].
        chunk_tokens: Tokens that are run at once; None for all.
        recompute: Whether activations are computed again in the backward pass instead of stored.
    """

    def run(x_tD: Tensor, part: slice, once: Once[Tensor]) -> Contested:
        y_tED = run_all(experts, num_experts, x_tD)
        responses_tE = respond(y_tED.flatten(0, 1)).view(y_tED.shape[:2])
        expert_ids_tK = once(lambda: choose(responses_tE.detach(), part))
        return responses_tE, expert_ids_tK, winners_outputs(y_tED, expert_ids_tK)

    return in_chunks(run, x_TD, chunk_tokens, recompute)
