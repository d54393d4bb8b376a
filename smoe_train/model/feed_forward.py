"""Feed-forward networks: one dense, and many experts stacked into 3-D weights that one grouped product serves.

Shape suffixes: T tokens, K slots a token, R rows sorted by expert, D d_model, F d_ff, E stacked experts.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_train import kernels
from smoe_train.model.initialise import Draw, set_values
from smoe_train.parallel.dispatch_plan import DispatchPlan, to_expert_order, to_slot_order

FeedForwardKind = Literal["relu", "gelu", "swiglu"]


def activate(kind: FeedForwardKind, hidden: Tensor, gate: Tensor | None) -> Tensor:
    """Applies the activation: ``relu(h)``, ``gelu(h)`` or ``silu(gate) * h``."""
    if kind == "swiglu":
        assert gate is not None
        return F.silu(gate) * hidden
    return F.relu(hidden) if kind == "relu" else F.gelu(hidden)


class FeedForward(nn.Module):
    """Dense network: two layers with bias (``relu``, ``gelu``), or gated without bias (``swiglu``)."""

    def __init__(self, d_model: int, d_ff: int, kind: FeedForwardKind) -> None:
        super().__init__()
        self.kind = kind
        bias = kind != "swiglu"
        self.w_in = nn.Linear(d_model, d_ff, bias=bias)
        self.w_gate = nn.Linear(d_model, d_ff, bias=False) if kind == "swiglu" else None
        self.w_out = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., D] to [..., D]."""
        gate = self.w_gate(x) if self.w_gate is not None else None
        y: Tensor = self.w_out(activate(self.kind, self.w_in(x), gate))
        return y


class StackedExperts(nn.Module):
    """Some of a layer's experts, their weights stacked along the first dimension.

    With ``fused`` set, and the operator of `smoe_train.kernels` loaded, that computes what it supports.

    Args:
        expert_ids: Global ids of the experts held here, in order; the key of their initial values.
        d_model: D.
        d_ff: F, hidden width of one expert.
        kind: ``relu`` and ``gelu``: ``act(x W_in + b_in) W_out + b_out``; ``swiglu``:
            ``(silu(x W_gate) * x W_in) W_out`` without biases.
        init_std: Standard deviation of the initial input weights.
        output_std: Standard deviation of the initial output weights.
    """

    def __init__(
        self, expert_ids: range, d_model: int, d_ff: int, kind: FeedForwardKind, init_std: float, output_std: float
    ) -> None:
        super().__init__()
        self.expert_ids = expert_ids
        self.kind = kind
        self.fused = False
        self._std = {"w_in": init_std, "w_gate": init_std, "w_out": output_std}
        num = len(expert_ids)
        self.w_in = nn.Parameter(torch.empty(num, d_model, d_ff))
        self.w_out = nn.Parameter(torch.empty(num, d_ff, d_model))
        if kind == "swiglu":
            self.w_gate = nn.Parameter(torch.empty(num, d_model, d_ff))
        else:
            self.b_in = nn.Parameter(torch.empty(num, d_ff))
            self.b_out = nn.Parameter(torch.empty(num, d_model))

    def initialise(self, draw: Draw) -> None:
        """Draws each expert from its own key (layer, global id): experts differ, whoever holds them."""
        for name, parameter in self.named_parameters():
            if name.startswith("b_"):
                set_values(parameter, torch.zeros(parameter.shape))
                continue
            shape = tuple(parameter.shape[1:])
            for expert, one in zip(self.expert_ids, parameter.detach().unbind(0), strict=True):
                set_values(one, draw.normal(f"{name}/{expert}", shape, self._std[name]))

    def forward(self, x_TD: Tensor, plan: DispatchPlan) -> Tensor:
        """Returns the uncombined outputs [T, K, D] of the planned experts on each token, zero in empty slots.

        Args:
            x_TD: Tokens.
            plan: Where each slot's token goes among the rows sorted by expert.
        """
        if self.fused and kernels.supports(x_TD, self.w_in):
            biased = (self.w_in, self.b_in, self.w_out, self.b_out) if self.kind != "swiglu" else ()
            weights = biased or (self.w_gate, self.w_in, self.w_out)
            return kernels.run_experts(x_TD, plan.row_of_slot_TK, plan.rows_per_expert_E, self.kind, *weights)
        return to_slot_order(self._run_rows(to_expert_order(x_TD, plan), plan.rows_to_run()), plan)

    def _run_rows(self, x_RD: Tensor, rows_per_expert_E: Tensor) -> Tensor:
        """Runs each expert on its rows, which are sorted by expert; int64 rows of each expert sum to R."""
        ends_E = torch.cumsum(rows_per_expert_E, 0)
        if self.kind == "swiglu":
            gate_RF = grouped_product(x_RD, self.w_gate, ends_E)
            hidden_RF = activate(self.kind, grouped_product(x_RD, self.w_in, ends_E), gate_RF)
            return grouped_product(hidden_RF, self.w_out, ends_E)
        expert_of_row_R = torch.searchsorted(ends_E, torch.arange(x_RD.shape[0], device=x_RD.device), right=True)
        hidden_RF = grouped_product(x_RD, self.w_in, ends_E) + self.b_in.index_select(0, expert_of_row_R)
        hidden_RF = activate(self.kind, hidden_RF, None)
        return grouped_product(hidden_RF, self.w_out, ends_E) + self.b_out.index_select(0, expert_of_row_R)


def grouped_product(x_RI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Multiplies each expert's rows by its matrix: [R, I] x [E, I, O] -> [R, O].

    Uses ``torch.nn.functional.grouped_mm`` where it applies (fp32, bf16, fp16 and rows of whole 16-byte units);
    otherwise a loop over unbound matrices, the only form that supports fp64.

    Args:
        x_RI: Rows sorted by expert.
        weight_EIO: Stacked matrices.
        ends_E: int64, end row of each expert; the last is R.
    """
    aligned = all(size * x_RI.element_size() % 16 == 0 for size in weight_EIO.shape[1:])
    if x_RI.dtype == torch.float64 or not aligned:
        return _looped_product(x_RI, weight_EIO, ends_E)
    product = F.grouped_mm(x_RI, weight_EIO, offs=ends_E.to(torch.int32))
    contiguous: Tensor = _ContiguousGradient.apply(product)  # type: ignore[no-untyped-call]
    return contiguous


def _looped_product(x_RI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    ends = ends_E.tolist()
    sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    # Unbinding once gives one stacked gradient; indexing would allocate a full-size gradient for every expert.
    pairs = zip(x_RI.split(sizes), weight_EIO.unbind(0), strict=True)
    return torch.cat([rows @ weight for rows, weight in pairs])


class _ContiguousGradient(torch.autograd.Function):
    """Identity whose gradient is contiguous: grouped_mm's backward refuses expanded gradients, as ``sum`` sends."""

    @staticmethod
    def forward(ctx: object, y: Tensor) -> Tensor:
        return y

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0].contiguous()
