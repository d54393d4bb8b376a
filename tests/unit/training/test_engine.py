"""The engine of one process, the reference for all others."""

from functools import partial

import pytest
import torch
from torch import nn

from smoe_train.training.config import OptimizerConfig
from smoe_train.training.engine import LocalEngine
from smoe_train.training.optimizer import make_optimizer, parameter_groups

CONFIG = OptimizerConfig(weight_decay=0.0)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1)).double()


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.0)


def engine(model, accumulation_steps=1, clip_norm=None, make=sgd):
    return LocalEngine(model, parameter_groups(model, CONFIG), make, accumulation_steps, clip_norm)


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 4, dtype=torch.float64, generator=generator)


def test_accumulation_equals_one_big_batch():
    # SGD, because Adam would hide a wrong scale of the gradients.
    whole, parts = network(), network()
    one, three = engine(whole), engine(parts, accumulation_steps=3)
    for _ in range(2):
        one.backward(one.forward(input=batch()).square().mean())
        one.step(0.1)
        for part in batch().split(4):
            three.backward(three.forward(input=part).square().mean())
        three.step(0.1)
    assert float(one.gradient_norm) == pytest.approx(float(three.gradient_norm), rel=1e-12)
    for left, right in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-14)


def gradients_of(model):
    loss = model(batch()).square().mean()
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("fraction", [0.25, 4.0, None])
def test_clipping_scales_the_whole_gradient_to_the_norm(fraction):
    model = network()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    gradients = gradients_of(model)
    norm = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    scale = 1.0 if fraction is None else min(1.0, fraction)
    clipping = engine(model, clip_norm=None if fraction is None else fraction * norm)
    clipping.backward(clipping.forward(input=batch()).square().mean())
    clipping.step(0.5)
    assert float(clipping.gradient_norm) == pytest.approx(norm), "the norm before clipping is what is recorded"
    for old, gradient, new in zip(before, gradients, model.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old - 0.5 * scale * gradient, rtol=1e-5, atol=1e-9)


def test_gradients_are_cleared_and_the_rate_is_the_steps():
    model = network()
    running = engine(model)
    running.backward(running.forward(input=batch()).square().mean())
    running.step(0.0)
    assert all(parameter.grad is None for parameter in model.parameters())
    for old, new in zip(network().parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new), "a rate of 0 moves nothing"


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_state_goes_to_another_engine(steps):
    adam = partial(make_optimizer, config=CONFIG)
    first = engine(network(), make=adam)

    def train(running, count):
        for _ in range(count):
            running.backward(running.forward(input=batch()).square().mean())
            running.step(0.05)

    train(first, steps)
    assert first.optimizer_steps() == steps
    saved = [first.read_state(parameter) for parameter in first.model.parameters()]
    assert all(set(state) == {"weight", *(("exp_avg", "exp_avg_sq") if steps else ())} for state in saved)
    second = engine(network(), make=adam)
    train(second, 2)
    second.start_loading(steps)
    for parameter, state in zip(second.model.parameters(), saved, strict=True):
        second.write_state(parameter, state)
    assert second.optimizer_steps() == steps
    train(first, 2)
    assert not torch.equal(saved[0]["weight"], next(first.model.parameters())), "what was read is a copy"
    train(second, 2)
    for left, right in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(left, right)
