"""What a micro-batch is trained on."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.tiny import tiny_recipe

from smoe_train.assembly import build_model
from smoe_train.data.batches.loader import MicroBatch
from smoe_train.schedules import Knobs
from smoe_train.training.objectives import language_modelling


@pytest.mark.parametrize(("balance", "z"), [(0.0, 0.0), (0.5, 0.0), (0.5, 0.25)])
def test_the_total_is_the_task_loss_plus_weighted_router_losses(balance, z):
    moe = {"load_balance_coefficient": balance, "z_loss_coefficient": z, "router": {"type": "top_k", "init_std": 1.0}}
    model = build_model(tiny_recipe(Path("unused"), model={"moe": moe}), 32)
    ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = MicroBatch.full(ids[:, :-1], ids[:, 1:], torch.arange(2))
    engine = SimpleNamespace(forward=model)
    found = language_modelling(engine.forward, batch, Knobs(0, 2), model.config)
    logits = found.output.logits.detach().double()
    task = -sum(float(torch.log_softmax(logits[b, s], dim=-1)[int(ids[b, s + 1])]) for b in range(2) for s in range(8))
    assert float(found.task) == pytest.approx(task / 16, rel=1e-6)
    losses = {name: float(value.detach()) for name, value in found.output.router_losses.items()}
    assert losses["load_balance_loss"] > 0.0
    assert losses["z_loss"] > 0.0
    expected = task / 16 + balance * losses["load_balance_loss"] + z * losses["z_loss"]
    assert math.isclose(float(found.total.detach()), expected, rel_tol=1e-6)


def outcome(knobs, **moe):
    """One micro-batch of a small model with both losses; the same for the same knobs."""
    coefficients = {"load_balance_coefficient": 0.5, "z_loss_coefficient": 0.25}
    moe = {**coefficients, "router": {"type": "top_k", "init_std": 1.0}, **moe}
    model = build_model(tiny_recipe(Path("unused"), model={"moe": moe}), 32)
    ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = MicroBatch.full(ids[:, :-1], ids[:, 1:], torch.arange(2))
    found = language_modelling(model, batch, knobs, model.config)
    found.total.backward()
    return found, model


def test_the_curriculum_multiplies_the_coefficients():
    plain, _ = outcome(Knobs(0, 2))
    losses = {name: float(value.detach()) for name, value in plain.output.router_losses.items()}
    found, model = outcome(Knobs(0, 2, loss_weights={"load_balance_loss": 0.5, "z_loss": 3.0}))
    expected = float(found.task) + 0.5 * 0.5 * losses["load_balance_loss"] + 3.0 * 0.25 * losses["z_loss"]
    assert float(found.total.detach()) == pytest.approx(expected, rel=1e-6)
    same = {name: float(value.detach()) for name, value in found.output.router_losses.items()}
    assert same == losses, "what is logged as the loss itself has no factor"
    # The same gradients as with coefficients that are so much larger.
    _, other = outcome(Knobs(0, 2), load_balance_coefficient=0.25, z_loss_coefficient=0.75)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad), name


def test_a_loss_without_a_factor_keeps_its_coefficient():
    plain, _ = outcome(Knobs(0, 2))
    balance = float(plain.output.router_losses["load_balance_loss"].detach())
    found, _ = outcome(Knobs(0, 2, loss_weights={"z_loss": 0.0}))
    assert float(found.total.detach()) == pytest.approx(float(found.task) + 0.5 * balance, rel=1e-6)


def test_shorter_sequences_see_no_token_before_their_part():
    full, _ = outcome(Knobs(0, 2))
    cut, _ = outcome(Knobs(0, 2, sequence_length=4))
    assert full.output.logits.shape == (2, 8, 32)
    assert cut.output.logits.shape == (4, 4, 32)
    logits = cut.output.logits.view(2, 8, 32)
    assert torch.allclose(logits[:, :4], full.output.logits[:, :4], atol=1e-5), "the first parts see what they saw"
    assert not torch.allclose(logits[:, 4:], full.output.logits[:, 4:], atol=1e-2)
    assert {tuple(experts.shape) for experts in cut.output.experts_of_token.values()} == {(4, 4)}
