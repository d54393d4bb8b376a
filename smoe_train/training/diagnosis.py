"""Finds out where a step first ceased to be finite, by running it once more and looking at everything."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smoe_train.checkpoint.rank_state import capture_random_state, restore_random_state
from smoe_train.model import StackedExperts
from smoe_train.parallel.dispatch_plan import DispatchPlan
from smoe_train.routing import Assignment, Router

FORWARD, BACKWARD = 0, 1
BEFORE_ALL, AFTER_ALL = -1, 2**31
NOT_LOOKED_AT = frozenset({"stats", "routing_stats"})  # figures, which nothing is computed from


class Finding(NamedTuple):
    """The first thing on one rank that was not finite.

    Attributes:
        order: When it was computed: micro-batch, `FORWARD` or `BACKWARD`, and place in that. Ranks compute the same
            things in the same order, so the least of their findings came first.
        text: What it is.
    """

    order: tuple[int, int, int]
    text: str


def find_non_finite(model: nn.Module, losses: Callable[[], Iterable[Tensor]]) -> Finding | None:
    """Runs the micro-batches of a step forward and backward again and returns what first was not finite on this rank.

    That is a weight, the output of a module (of experts: which), a router's logits or weights, the loss itself, the
    gradient at the output of a module, or the gradient of a parameter; None if this run was finite.

    Nothing changes: no gradient is added to parameters, hooks that an engine has on them do not run, and the global
    random-number generators of Python, numpy, torch and the device are put back. All ranks must call this, and each
    runs all micro-batches, whatever it finds: forward and backward passes exchange tokens.

    Args:
        model: The model itself, not an engine around it.
        losses: Runs the model on each micro-batch of the step and yields what is differentiated. It is consumed one by
            one, so that one micro-batch's activations are held at a time. It may set random-number generators to what
            they were.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    device = next(model.parameters()).device
    search = _Search(model)
    for name, parameter in model.named_parameters():
        search.look((FORWARD, BEFORE_ALL), f"the weight {name}", parameter.detach(), search.experts_of.get(name))
    with _random_state_kept(device), torch.enable_grad(), search.watching():
        for number, loss in enumerate(losses()):
            search.look((FORWARD, AFTER_ALL), "the loss, though the output of every module is finite", loss.detach())
            search.start_backward()
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, gradient in reversed(list(zip(parameters, gradients, strict=True))):
                if gradient is not None:
                    what = f"the gradient of the parameter {name}"
                    search.look((BACKWARD, AFTER_ALL), what, gradient, search.experts_of.get(name))
            search.start_forward(number + 1)
    return search.found


@contextlib.contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    before = capture_random_state(device)
    try:
        yield
    finally:
        restore_random_state(before, device)


def describe(findings: Sequence[Finding | None]) -> str:
    """Returns in a sentence what came first over all ranks.

    Args:
        findings: What `find_non_finite` returned on each rank, in rank order.
    """
    found = [(finding, rank) for rank, finding in enumerate(findings) if finding is not None]
    if not found:
        return (
            "computed again, the step was finite on all ranks, so it was a passing fault, of memory, an arithmetic "
            "unit or communication"
        )
    first, rank = min(found)
    others = [str(other) for finding, other in found if finding.order == first.order and other != rank]
    also = f" (at the same time on {', '.join(others)})" if others else ""
    if first.order[2] == BEFORE_ALL:
        return f"first on rank {rank}{also}, {first.text}, before anything was computed"
    when = f"in the {'backward' if first.order[1] == BACKWARD else 'forward'} pass of micro-batch {first.order[0]}"
    return f"first on rank {rank}{also}, {first.text}, {when}"


class _Search:
    """Looks at tensors as they are computed, until one is not finite."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found: Finding | None = None
        self.experts_of = {
            f"{path}.{name}": list(module.expert_ids)
            for path, module in model.named_modules()
            if isinstance(module, StackedExperts)
            for name, _ in module.named_parameters()
        }
        self.start_forward(0)

    def start_forward(self, micro_batch: int) -> None:
        self.micro_batch = micro_batch
        self.backward = False
        self.place = 0

    def start_backward(self) -> None:
        self.backward = True
        self.place = 0
        self.last_finite = "the loss"

    def look(
        self, order: tuple[int, int], what: str, values: Tensor, expert_ids: list[int] | None = None, low: bool = False
    ) -> bool:
        """Returns whether values are finite, and notes the first that are not.

        Args:
            order: Pass and place in it.
            what: What they are.
            values: Any tensor.
            expert_ids: The experts whose values stand one behind the other along the first dimension, if they do.
            low: Whether minus infinity is a value like others.
        """
        if self.found is not None or not values.is_floating_point():
            return True
        bad = values.isnan() | values.isposinf() if low else ~values.isfinite()
        count = int(bad.sum())
        if not count:
            return True
        if expert_ids is not None:
            named = [expert for expert, one in zip(expert_ids, bad, strict=True) if bool(one.any())]
            what += f" of {'expert' if len(named) == 1 else 'experts'} {', '.join(map(str, named))}"
        kind = "NaN" if bool(values.isnan().any()) else "infinite"
        self.found = Finding((self.micro_batch, *order), f"{what} ({count} of {bad.numel()} values, {kind})")
        return False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Looks at the outputs of all modules and at what routers decide, and at the gradients of both."""
        hooks, routers = [], []
        for path, module in self.model.named_modules():
            if isinstance(module, Router):  # their decisions are no modules' outputs
                routers.append(module)
                for method in ("assign", "settle"):
                    setattr(module, method, self._watched(path, getattr(module, method)))
            hooks.append(module.register_forward_hook(self._hook(path)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for router in routers:
                del router.assign, router.settle  # the instance's; the class's come back

    def _hook(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, arguments: Any, output: Any) -> None:
            if isinstance(module, StackedExperts):
                self._see_experts(path, module, arguments[1], output)
            else:
                self._see(f"the output of {path or 'the model'}", output)

        return look

    def _watched(self, path: str, decide: Callable[..., Assignment]) -> Callable[..., Assignment]:
        def watched(*arguments: Any, **named: Any) -> Assignment:
            decision = decide(*arguments, **named)
            self._see(f"the logits of {path}", decision.logits_TE, low=True)
            self._see(f"the weights of {path}", decision.weights_TK)
            return decision

        return watched

    def _see_experts(self, path: str, module: StackedExperts, plan: DispatchPlan, y_TKD: Tensor) -> None:
        if not self.backward and self.found is None:
            ends_E = torch.cumsum(plan.rows_per_expert_E, 0)
            expert_TK = torch.searchsorted(ends_E, plan.row_of_slot_TK, right=True)
            bad_TK = plan.valid_TK & ~y_TKD.detach().isfinite().all(dim=-1)
            bad = [module.expert_ids[index] for index in torch.unique(expert_TK[bad_TK]).tolist()]
            which = f" (experts {', '.join(map(str, bad))})" if bad else ""
            self._see(f"the output of {path}{which}", y_TKD)

    def _see(self, what: str, output: Any, low: bool = False) -> None:
        if self.backward:  # a recomputation of activations; what it computes has been seen
            return
        for label, values in _tensors(output):
            if hasattr(values, "_looked_at"):  # by a module inside, which has returned it as it is
                continue
            values._looked_at = True  # type: ignore[attr-defined]
            name = f"{what}, {label}" if label else what
            self.place += 1
            self.look((FORWARD, self.place), name, values.detach(), low=low)
            if values.requires_grad and values.is_floating_point():
                values.register_hook(lambda gradient, name=name: self._see_gradient(name, gradient))

    def _see_gradient(self, name: str, gradient: Tensor) -> None:
        self.place += 1
        what = f"the gradient at {name}, when that at {self.last_finite} was finite"
        if self.look((BACKWARD, self.place), what, gradient):
            self.last_finite = name


def _tensors(value: Any, label: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors in a module's output with their names in it."""
    if isinstance(value, Tensor):
        yield label, value
        return
    parts: Iterable[tuple[str, Any]] = ()
    if isinstance(value, Mapping):
        parts = value.items()
    elif is_dataclass(value):
        parts = [(field.name, getattr(value, field.name)) for field in fields(value)]
    elif isinstance(value, (tuple, list)):
        parts = [(label, part) for part in value]
    for name, part in parts:
        if name not in NOT_LOOKED_AT:
            yield from _tensors(part, str(name))


def _finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())
