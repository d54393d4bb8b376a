"""What a micro-batch is trained on."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.tiny import tiny_recipe

from smoe_train.assembly import build_model
from smoe_train.data.loader import MicroBatch
from smoe_train.schedules import Knobs
from smoe_train.training.objectives import language_modelling


@pytest.mark.parametrize(("balance", "z"), [(0.0, 0.0), (0.5, 0.0), (0.5, 0.25)])
def test_the_total_is_the_task_loss_plus_weighted_router_losses(balance, z):
    moe = {"load_balance_coefficient": balance, "z_loss_coefficient": z, "router": {"type": "top_k", "init_std": 1.0}}
    model = build_model(tiny_recipe(Path("unused"), model={"moe": moe}), 32)
    ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = MicroBatch(ids[:, :-1], ids[:, 1:], torch.ones(2, 8, dtype=torch.bool), torch.arange(2), torch.arange(2))
    engine = SimpleNamespace(forward=model)
    found = language_modelling(engine, batch, Knobs(0, 2), model.config)
    logits = found.output.logits.detach().double()
    task = -sum(float(torch.log_softmax(logits[b, s], dim=-1)[int(ids[b, s + 1])]) for b in range(2) for s in range(8))
    assert float(found.task) == pytest.approx(task / 16, rel=1e-6)
    assert not found.task.requires_grad
    losses = {name: float(value.detach()) for name, value in found.output.router_losses.items()}
    assert losses["load_balance_loss"] > 0.0
    assert losses["z_loss"] > 0.0
    expected = task / 16 + balance * losses["load_balance_loss"] + z * losses["z_loss"]
    assert math.isclose(float(found.total.detach()), expected, rel_tol=1e-6)
