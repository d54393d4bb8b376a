"""The layer on an accelerator, whose dispatch plan has sizes that need no look at the data."""

from __future__ import annotations

import pytest
import torch

from smoe_train.model import LocalExpertBank, StackedExperts
from smoe_train.model.initialise import KeyedDraw

NO_DEVICE = not torch.accelerator.is_available()


@pytest.mark.gpu
@pytest.mark.skipif(NO_DEVICE, reason="torch finds no accelerator")
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bank_gives_on_the_accelerator_what_it_gives_on_the_cpu(kind: str, dtype: torch.dtype) -> None:
    """Outputs and gradients, with empty slots and an expert that nobody visits."""
    device = torch.accelerator.current_accelerator()
    assert device is not None

    def results(place: torch.device, number: torch.dtype) -> list[torch.Tensor]:
        bank = LocalExpertBank(8, lambda ids: StackedExperts(ids, 64, 128, kind, 0.2, 0.2))  # type: ignore[arg-type]
        bank.experts.initialise(KeyedDraw(1, "bank"))
        bank.to(device=place, dtype=number)
        generator = torch.Generator().manual_seed(0)
        x_TD = torch.randn(50, 64, generator=generator).to(place, number).requires_grad_()
        ids_TK = torch.randint(-1, 7, (50, 2), generator=generator).to(place)
        y_TKD = bank(x_TD, ids_TK)
        y_TKD.float().square().sum().backward()
        gradients = [parameter.grad for parameter in bank.parameters()]
        return [tensor.detach().float().cpu() for tensor in (y_TKD, x_TD.grad, *gradients) if tensor is not None]

    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    for there, here in zip(results(device, dtype), results(torch.device("cpu"), torch.float32), strict=True):
        assert (there - here).norm() <= tolerance * here.norm()
