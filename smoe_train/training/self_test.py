"""The self-test before step 0: what each loss trains, what the optimizer holds, and that experts change.

Published code of these methods has had balance losses that added nothing, routers that no loss reached and experts that
the optimizer did not hold. Such a run trains, and is wrong. Each check returns one line for each thing that is wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smoe_train.data.batches.loader import MicroBatch
from smoe_train.errors import CheckFailedError
from smoe_train.model import SmoePreTrainedModel, StackedExperts
from smoe_train.model.moe import MoeLayer
from smoe_train.routing import Context
from smoe_train.routing.contract import same_on_one_rank
from smoe_train.schedules import Curriculum, Knobs
from smoe_train.training.objectives import MakeObjective

TASK = "task"
Captured = dict[int, tuple[Tensor, Tensor, Context]]


class GradientCheck(NamedTuple):
    """What `check_gradients` found wrong, and the losses that were 0 and could not be judged."""

    problems: list[str]
    not_judged: list[str]


def check_gradients(
    model: SmoePreTrainedModel,
    batch: MicroBatch,
    curriculum: Curriculum,
    objective: MakeObjective,
    sum_over_ranks: Callable[[Tensor], Tensor] = same_on_one_rank,
) -> GradientCheck:
    """Checks that every loss reaches the parameters it should, and of its own layer no others.

    Each MoE layer is run on the input that it has in a forward pass of the batch, alone, so that a loss cannot reach
    anything but this layer: its router's losses and a weighted sum of its outputs in place of the task. The policy is
    put into a state in which all its losses are at work (`Router.rehearsal`); one that is exactly 0 all the same, as
    SimSMoE's with too few shared tokens, is not judged. Then the task loss of the whole model is checked.
    All ranks must call this. Nothing is changed, no random number is drawn.

    Args:
        model: In any precision, inside an engine or not.
        batch: One micro-batch.
        curriculum: Where experts compete in some steps, such a step is checked too.
        objective: What the model is trained on.
        sum_over_ranks: Adds a tensor up over the ranks.
    """
    found, idle = list[str](), set[str]()
    first = replace(curriculum.knobs(0), competing_layers=frozenset())
    passes = {"": first}
    if curriculum.competition is not None:
        passes[" (competing)"] = replace(first, competing_layers=frozenset(curriculum.competition.layers))
    last = curriculum.knobs(curriculum.max_steps - 1)
    if any(router.frozen(last.step) for router in model.routers().values()):
        passes[" (last step)"] = replace(last, competing_layers=frozenset())
    was_training = model.training
    model.train()
    with _same_dropout(batch.input_ids_BS.device):
        for kind, knobs in passes.items():
            for layer, (x_TD, token_ids_T, context) in _layer_inputs(model, batch, objective, knobs).items():
                moe = model.moe_layers()[layer]
                messages, not_judged = _layer_problems(moe, x_TD, token_ids_T, context, sum_over_ranks)
                found += [f"layer {layer}{kind}: {message}" for message in messages]
                idle |= {f"{name} in layer {layer}{kind}" for name in not_judged}
        found += _task_problems(model, batch, objective, first)
    model.train(was_training)
    return GradientCheck(found, sorted(idle))


def check_optimizer_groups(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Checks that each trainable parameter is in exactly one optimizer group, and no other parameter in any."""
    held: dict[int, list[str]] = {}
    for group in groups:
        for parameter in group["params"]:
            held.setdefault(id(parameter), []).append(str(group.get("name", "unnamed")))
    found = []
    for name, parameter in model.named_parameters():
        where = held.pop(id(parameter), [])
        if parameter.requires_grad and len(where) != 1:
            found.append(f"{name} is trainable but in {len(where)} optimizer groups {where or ''}".rstrip())
        elif not parameter.requires_grad and where:
            found.append(f"{name} is frozen but in the optimizer group {where[0]}")
    return found + [f"the optimizer group {where[0]} holds a tensor that is no parameter" for where in held.values()]


def fingerprints(
    model: SmoePreTrainedModel, read_weight: Callable[[nn.Parameter], Tensor]
) -> dict[str, tuple[range, Tensor]]:
    """Returns by name the sum and the sum of squares of what is trained of this rank's experts, fp64 [E_local, 2].

    Args:
        model: The model.
        read_weight: Returns a parameter's weight; a collective under ZeRO, so all ranks must call this.
    """
    result: dict[str, tuple[range, Tensor]] = {}
    for path, module in model.named_modules():
        if isinstance(module, StackedExperts):
            for name, parameter in module.named_parameters():
                if not parameter.requires_grad:
                    continue
                values = read_weight(parameter).flatten(1).double()
                result[f"{path}.{name}"] = (module.expert_ids, torch.stack([values.sum(1), values.square().sum(1)], 1))
    return result


def check_expert_update(
    before: Mapping[str, tuple[range, Tensor]],
    after: Mapping[str, tuple[range, Tensor]],
    slots: Mapping[int, Tensor],
) -> list[str]:
    """Checks that every expert that received tokens in a step has changed in it.

    Args:
        before: `fingerprints` before the step.
        after: The same after it.
        slots: Slots that each expert received in the step over all ranks [E], by layer index.
    """
    found = []
    for name, (expert_ids, values) in before.items():
        layer = int(name.split(".layers.")[1].split(".")[0])
        same = (after[name][1] == values).all(dim=1).tolist()
        used = slots[layer].tolist()
        stuck = [expert for expert, unchanged in zip(expert_ids, same, strict=True) if unchanged and used[expert] > 0]
        if stuck:
            found.append(f"{name}: the first optimizer step left experts {stuck} as they were, though they had tokens")
    return found


def require(found: Sequence[str], any_rank: Callable[[bool], bool]) -> None:
    """Ends the run on all ranks if a check found something on any.

    Args:
        found: What is wrong on this rank.
        any_rank: Returns whether something holds on any rank; all ranks must call this.

    Raises:
        CheckFailedError: Something is wrong; the message lists it.
    """
    if any_rank(bool(found)):
        lines = "\n".join(f"  {one}" for one in found) or "  (found on another rank)"
        raise CheckFailedError(
            f"the self-test before training found what would train wrongly:\n{lines}\n"
            "this is a mistake in the program or in a policy of your own; training.self_test=false trains all the same"
        )


@contextlib.contextmanager
def _same_dropout(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        yield


def _layer_inputs(model: SmoePreTrainedModel, batch: MicroBatch, objective: MakeObjective, knobs: Knobs) -> Captured:
    """Returns what each MoE layer is called with in a forward pass without gradients."""
    captured: Captured = {}
    hooks = [
        moe.register_forward_pre_hook(lambda _, arguments, layer=layer: captured.update({layer: arguments}))
        for layer, moe in model.moe_layers().items()
    ]
    try:
        with torch.no_grad():
            objective(model, batch, knobs, None)
    finally:
        for hook in hooks:
            hook.remove()
    return captured


def _layer_problems(
    moe: MoeLayer, x_TD: Tensor, token_ids_T: Tensor, context: Context, sum_over_ranks: Callable[[Tensor], Tensor]
) -> tuple[list[str], list[str]]:
    x_TD = x_TD.detach()
    with torch.no_grad():
        stats = {name: sum_over_ranks(value) for name, value in sorted(moe(x_TD, token_ids_T, context).stats.items())}
    with moe.router.rehearsal(stats):
        merged = moe(x_TD, token_ids_T, context)
    weights = torch.linspace(-1.0, 1.0, merged.out_TD.numel(), device=x_TD.device).view_as(merged.out_TD)
    losses = {TASK: (merged.out_TD.float() * weights).sum(), **merged.losses}
    declared = moe.router.trained_by(context)
    reaching = moe.router.losses_reaching_experts(context) | {TASK}
    own = {name: p for name, p in moe.router.named_parameters() if p.requires_grad}
    experts = {name: p for name, p in moe.bank.experts.named_parameters() if p.requires_grad}
    found = [f"{name} is declared by the router but was not returned" for name in declared if name not in losses]
    declared = {name: frozenset(names) & own.keys() for name, names in declared.items()}  # without what is frozen
    if not own and not experts:
        return found, []
    idle: list[str] = []
    chooses = moe.router.shape.num_experts > 1  # with one expert there is nothing to learn
    for name, loss in losses.items():
        if not loss.requires_grad:
            if declared.get(name) or (name in reaching and experts):
                found.append(f"{name} has no gradient at all, but should train {sorted(declared.get(name, ()))}")
            continue
        at_work = bool(sum_over_ranks(loss.detach().abs().float()) > 0)
        parameters = [*own.values(), *experts.values()]
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        sizes = torch.stack([_size(gradient, loss) for gradient in gradients])
        reached = dict(zip([*own, *experts], (sum_over_ranks(sizes) > 0).tolist(), strict=True))
        missing = [one for one in own if one in declared.get(name, ()) and not reached[one]]
        missing += [f"the experts' {one}" for one in experts if name in reaching and not reached[one]]
        astray = [one for one in own if one not in declared.get(name, ()) and reached[one]]
        astray += [f"the experts' {one}" for one in experts if name not in reaching and reached[one]]
        if at_work and chooses:
            found += [f"{name} does not reach {one}, which it should train" for one in missing]
        elif missing:
            idle.append(name)
        found += [f"{name} reaches {one}, which it should not train" for one in astray]
    return found, idle


def _task_problems(model: SmoePreTrainedModel, batch: MicroBatch, objective: MakeObjective, knobs: Knobs) -> list[str]:
    loss = objective(model, batch, knobs, None).task
    # Routers and experts have been checked layer by layer.
    in_layers = {id(p) for m in model.modules() if isinstance(m, MoeLayer) for p in m.parameters()}
    checked = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in in_layers}
    gradients = torch.autograd.grad(loss, list(checked.values()), allow_unused=True)
    return [
        f"the task loss does not reach {name}"
        for name, gradient in zip(checked, gradients, strict=True)
        if float(_size(gradient, loss)) == 0.0
    ]


def _size(gradient: Tensor | None, like: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros((), dtype=torch.float32, device=like.device)
    return gradient.detach().abs().amax().float()


__all__ = ["check_expert_update", "check_gradients", "check_optimizer_groups", "fingerprints", "require"]
