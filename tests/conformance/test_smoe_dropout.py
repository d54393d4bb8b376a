"""SMoE-Dropout: a router that never moves, tokens that do, and k that grows."""

import copy

import pytest
import torch
from support.router_cases import RouterCase, assign, context, initialised, run, tokens
from support.small_model import small_model, text

from smoe_train.model import SmoeForCausalLM
from smoe_train.model.accounting import census
from smoe_train.routing import RouterPlan
from smoe_train.routing.smoe_dropout import SmoeDropoutConfig
from smoe_train.schedules import Curriculum, CurriculumConfig, Knobs

OPTIONS = {"type": "smoe_dropout", "router_std": 0.3}


def routes(model, ids):
    """The experts of each token of a batch, by layer."""
    found = {}
    hooks = []
    for layer, router in model.routers().items():
        plain = router.assign

        def assign_and_note(*arguments, layer=layer, plain=plain):
            found[layer] = plain(*arguments)
            return found[layer]

        router.assign = assign_and_note
        hooks.append((router, plain))
    with torch.no_grad():
        model(ids)
    for router, plain in hooks:
        router.assign = plain
    return {layer: result.expert_ids_TK.sort(dim=1).values for layer, result in found.items()}


def train(model, optimizer, steps, top_k_at):
    for step in range(steps):
        ids = text(4, 16, seed=step)
        optimizer.zero_grad()
        model(ids, labels=ids, knobs=Knobs(step, top_k_at(step))).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("load_balance_coefficient", [0.0, 0.5])
def test_the_router_never_moves_but_assignments_do(load_balance_coefficient):
    """Invariant 11: not a bit of W in 30 AdamW steps with weight decay; tokens of a fixed batch change experts."""
    model = small_model(router=OPTIONS, load_balance_coefficient=load_balance_coefficient).train()
    before = {layer: router.weight.detach().clone() for layer, router in model.routers().items()}
    first = routes(model, text(seed=99))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)  # it holds W, but has no gradient
    curriculum = Curriculum(CurriculumConfig.model_validate({"top_k": {"low": 2, "high": 4}}), 2, 30, 16)
    train(model, optimizer, 30, lambda step: curriculum.knobs(step).top_k)
    for layer, router in model.routers().items():
        assert router.weight.grad is None
        assert torch.equal(router.weight, before[layer])
    last = routes(model, text(seed=99))
    for layer in first:
        assert (first[layer] != last[layer]).any(dim=1).float().mean() > 0.05


def test_assignments_are_fixed_if_the_tokens_are():
    """The other side of invariant 11: with everything but the experts frozen, no token changes expert in layer 0."""
    model = small_model(router=OPTIONS).train()
    first = routes(model, text(seed=99))
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    train(model, torch.optim.SGD(experts, lr=0.5), 5, lambda step: 2)
    last = routes(model, text(seed=99))
    assert torch.equal(first[0], last[0])
    assert not torch.equal(first[1], last[1])  # its tokens come from layer 0's experts


def test_a_balance_coefficient_moves_the_tokens():
    """A router loss has no router to train: its gradient is that of the tokens, and layers below feel it."""
    router = initialised(SmoeDropoutConfig(router_std=0.3), 0, 16, 8)[0]
    x = tokens().requires_grad_()
    for name, loss in router.losses(assign(router, x, context()), context()).items():
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert gradient.abs().max() > 1e-5, name
    assert router.trained_by(context()) == {name: frozenset() for name in ("task", "load_balance_loss", "z_loss")}
    # Steps of the tokens along it balance a router that does not move.
    x = (tokens(200) + 4.0).requires_grad_()
    values = []
    for _ in range(40):
        loss = router.losses(assign(router, x, context()), context())["load_balance_loss"]
        (gradient,) = torch.autograd.grad(loss, x)
        values.append(loss.item())
        with torch.no_grad():
            x -= 0.05 * x.norm() / gradient.norm() * gradient
    assert values[0] > 1.05
    assert values[-1] < 1 + 0.7 * (values[0] - 1)


@pytest.mark.parametrize("name", ["smoe_dropout", "random"])
def test_nothing_trains_the_router_even_if_all_is_made_trainable(name):
    """Fine-tuning scripts do `requires_grad_(True)`; the weights enter the product detached."""
    model = small_model(router={"type": name, "router_std": 0.3}).train()
    model.requires_grad_(True)
    model(text(), labels=text()).loss.backward()
    assert all(router.weight.grad is None for router in model.routers().values())


@pytest.mark.parametrize("name", ["smoe_dropout", "random"])
def test_it_stays_frozen_in_copies_and_after_loading(name, tmp_path):
    model = small_model(router={"type": name})
    model.save_pretrained(tmp_path)
    for other in (SmoeForCausalLM.from_pretrained(tmp_path), copy.deepcopy(model)):
        for layer, router in other.routers().items():
            assert not router.weight.requires_grad
            assert torch.equal(router.weight, model.routers()[layer].weight)


def test_one_expert_is_allowed():
    """Invariant 6: at k = 1 the weight is 1; tokens get no gradient through the router, which has none to lose."""
    layer = RouterCase("smoe_dropout").layer()
    x = tokens(scale=1.0).requires_grad_()
    result = assign(layer.router, x, context(1))
    assert (result.weights_TK == 1).all()
    (gradient,) = torch.autograd.grad(result.weights_TK.sum(), x, allow_unused=True)
    assert gradient is None or (gradient == 0).all()
    assert not SmoeDropoutConfig().problems(RouterPlan(frozenset({1}), 8, 10))
    assert (run(layer, x, context(1)).out_TD != 0).any()


def test_scale_and_census():
    """Invariants 16 and 17: N(0, 0.02^2) within 10 %, no bias; E * D frozen values a layer and none trained."""
    router = initialised(SmoeDropoutConfig(), 0, 256, 16)[0]
    assert router.bias is None
    assert router.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert [(p.numel(), p.requires_grad) for p in router.parameters()] == [(16 * 256, False)]
    model = small_model(router={"type": "smoe_dropout"})
    assert (
        census(model.config).frozen == 2 * 4 * 16 == sum(p.numel() for p in model.parameters() if not p.requires_grad)
    )
