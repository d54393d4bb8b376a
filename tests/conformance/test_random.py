"""The random control against HyperRouter: equal scale gives equal routing, and equal weights give equal bits."""

import math

import pytest
import torch
from support.router_cases import assign, context, initialised, run, tokens

from smoe_train.model import LocalExpertBank, StackedExperts
from smoe_train.model.initialise import KeyedDraw
from smoe_train.model.moe import MoeLayer
from smoe_train.routing.hyper_router import HyperRouterConfig
from smoe_train.routing.random_router import RandomRouterConfig
from smoe_train.routing.smoe_dropout import SmoeDropoutConfig


def first(options, seed=0, d_model=16, num_experts=8):
    return initialised(options, seed, d_model, num_experts)[0]


def layer_of(router, kind="gelu"):
    def make(ids):
        return StackedExperts(ids, router.shape.d_model, 24, kind, 0.3, 0.3)

    layer = MoeLayer(router, LocalExpertBank(router.shape.num_experts, make))
    layer.bank.experts.initialise(KeyedDraw(0, "experts"))
    return layer


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize(
    ("options", "generated_bias"), [(RandomRouterConfig(bias_std=1.0), True), (SmoeDropoutConfig(), False)], ids=str
)
def test_hyper_router_with_a_frozen_embedding_is_a_frozen_router(kind, options, generated_bias):
    """Invariant 4: W and b copied from H(e): identical outputs and expert gradients over 12 SGD steps, to the bit.

    Router and trunk both see it: an embedding that is trained leaves the frozen router behind at once.
    """
    hyper = first(HyperRouterConfig(hypernet_std=0.15, generated_bias=generated_bias))
    frozen = first(options, seed=5)
    with torch.no_grad():
        weight, bias = hyper.weight_and_bias()
        frozen.weight.copy_(weight)
        if generated_bias:
            frozen.bias.copy_(bias)
    hyper.embedding.requires_grad_(False)
    layers = [layer_of(hyper, kind), layer_of(frozen, kind)]
    optimizers = [torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.05) for layer in layers]

    def step(number):
        x = [tokens(19, seed=number, scale=1.0).requires_grad_() for _ in layers]
        for layer, inputs, optimizer in zip(layers, x, optimizers, strict=True):
            optimizer.zero_grad()
            merged = run(layer, inputs, context(3, step=number))
            (merged.out_TD.square().mean() + sum(merged.losses.values())).backward()
        return x

    for number in range(12):
        one, other = step(number)
        assert torch.equal(one.grad, other.grad)
        for p, q in zip(layers[0].bank.parameters(), layers[1].bank.parameters(), strict=True):
            assert p.grad.abs().max() > 0
            assert torch.equal(p.grad, q.grad)
        for optimizer in optimizers:
            optimizer.step()
        outs = [run(layer, inputs, context(3)).out_TD for layer, inputs in zip(layers, (one, other), strict=True)]
        assert torch.equal(*outs)
    hyper.embedding.requires_grad_(True)
    torch.optim.SGD([hyper.embedding], lr=0.5).step()  # no gradient yet: still the same
    assert torch.equal(run(layers[0], one, context(3)).out_TD, outs[1])
    step(12)
    torch.optim.SGD([hyper.embedding], lr=0.5).step()
    assert not torch.equal(run(layers[0], one, context(3)).out_TD, outs[1])


@pytest.mark.parametrize("std", [0.02, 0.072, 0.3])
def test_scale(std):
    """Invariant 17: weights and bias within 10 % of what is asked for (the bias, 16 values, over many seeds)."""
    routers = [first(RandomRouterConfig(router_std=std, bias_std=std), seed, 256, 16) for seed in range(40)]
    for router in routers:
        assert router.weight.std().item() == pytest.approx(std, rel=0.1)
    assert torch.stack([router.bias for router in routers]).std().item() == pytest.approx(std, rel=0.1)
    assert first(RandomRouterConfig()).bias is None


def initial_entropy(options, x, seeds=4):
    """The mean entropy of the full softmax and the mean largest probability, over seeds."""
    entropy, largest = [], []
    for seed in range(seeds):
        merged = run(layer_of(first(options, seed, 256, 16)), x, context(2))
        entropy.append(float(merged.stats["entropy"] / merged.stats["tokens"]))
        largest.append(assign(first(options, seed, 256, 16), x, context(16)).weights_TK[:, 0].mean().item())
    return sum(entropy) / seeds, sum(largest) / seeds


# Section 1.3 of the notes for unit-variance tokens: deviation, entropy over 16 experts, mean largest probability.
GOLDEN = [(0.02, 2.73, 0.11), (0.072, 2.25, 0.28)]


@pytest.mark.parametrize(("std", "entropy", "largest"), GOLDEN)
def test_at_equal_scale_hyper_router_and_the_control_start_alike(std, entropy, largest):
    """Invariant 17: initial entropies are those of the notes' table, and equal between the two at equal scale."""
    x = tokens(400, scale=1.0, d_model=256)
    control = initial_entropy(RandomRouterConfig(router_std=std, bias_std=std), x)
    generated = initial_entropy(HyperRouterConfig(target_router_std=std), x)
    assert control == pytest.approx((entropy, largest), rel=0.06)
    assert generated == pytest.approx((entropy, largest), rel=0.06)
    assert generated[0] == pytest.approx(control[0], rel=0.03)


# Section 1.3 of the notes, as released: deviations of weights and logits, entropy over 16 experts, largest probability.
RELEASED = [
    (HyperRouterConfig(), (0.072, 1.15, 2.25, 0.28)),
    (HyperRouterConfig(hyper_hidden=64), (0.035, 0.55, 2.63, 0.15)),
    (SmoeDropoutConfig(), (0.020, 0.32, 2.73, 0.11)),
    (RandomRouterConfig(router_std=0.02), (0.020, 0.32, 2.73, 0.11)),
]


@pytest.mark.parametrize(("options", "expected"), RELEASED, ids=["hyper 256", "hyper 64", "frozen", "random"])
def test_released_initialisations_start_as_the_notes_say(options, expected):
    """Invariant 17, table 1.3: d_model 256, unit-variance tokens, no rescaling; means over 24 seeds."""
    x, rows = tokens(200, scale=1.0, d_model=256), []
    for seed in range(24):
        router = first(options, seed, 256, 16)
        logits = assign(router, x, context()).logits_TE.detach()
        p = torch.softmax(logits, dim=1)
        squares = router.weight_and_bias()[0].square().mean(), logits.square().mean()
        rows.append([float(one.detach()) for one in (*squares, -(p * p.log()).sum(1).mean(), p.amax(1).mean())])
    weight, logit, entropy, largest = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    assert (math.sqrt(weight), math.sqrt(logit), largest) == pytest.approx((*expected[:2], expected[3]), rel=0.06)
    assert entropy == pytest.approx(expected[2], rel=0.015)


def test_the_default_scale_is_that_of_the_released_hyper_router():
    """Invariant 17: 0.02^2 sqrt(256 * 256 / 2) = 0.0724 for d_model 256, and what is drawn by default agrees."""
    assert RandomRouterConfig().router_std == pytest.approx(0.02**2 * math.sqrt(256 * 256 / 2), rel=0.01)
    squares = [
        first(HyperRouterConfig(), seed, 256, 16).weight_and_bias()[0].square().mean().item() for seed in range(20)
    ]
    assert RandomRouterConfig().router_std == pytest.approx(math.sqrt(sum(squares) / 20), rel=0.1)
