"""The forms of a step: attention by products against torch's kernels, what is switched where, what cannot be had."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_model import small_config
from torch import nn

from smoe_train.errors import LaunchError
from smoe_train.kernels import build
from smoe_train.model import SmoeForCausalLM
from smoe_train.model.attention import Attention, matmul_attention, visible_keys
from smoe_train.model.block import Block
from smoe_train.model.feed_forward import StackedExperts
from smoe_train.model.performance import PerformanceConfig, apply_performance
from smoe_train.routing import Router


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(0, 4), st.booleans(), st.sampled_from(["none", "padding", "text"])
)
def test_matmul_attention_is_the_kernels(batch, length, past, causal, kind):
    """Also with a cache's earlier keys, padding and documents; fp64 leaves no room for another formula."""
    generator = torch.Generator().manual_seed(0)
    past = 0 if kind == "text" else past
    q = torch.randn(batch, 2, length, 4, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(batch, 2, past + length, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = document = None
    if kind == "padding":
        mask = torch.rand(batch, past + length, generator=generator) < 0.7
    elif kind == "text":
        document = (torch.rand(batch, length, generator=generator) < 0.3).cumsum(1)
    allowed = visible_keys(mask, document, causal, length, past, q.device)
    expected = nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, is_causal=causal and allowed is None
    )
    torch.testing.assert_close(matmul_attention(q, k, v, allowed, causal), expected)


@pytest.mark.parametrize(
    ("dtype", "length", "matmul"),
    [(torch.bfloat16, 8, True), (torch.bfloat16, 513, False), (torch.float32, 8, False)],
    ids=str,
)
def test_auto_attention_chooses_what_is_faster(dtype, length, matmul, monkeypatch):
    attention, called = Attention(8, 2, 0).to(dtype), []
    attention.form = "auto"

    def noted(*arguments):
        called.append(True)
        return matmul_attention(*arguments)

    monkeypatch.setattr("smoe_train.model.attention.matmul_attention", noted)
    attention(torch.zeros(1, length, 8, dtype=dtype), None, None)
    assert bool(called) == matmul


pytestmark = pytest.mark.compiler


def modules(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def test_by_default_everything_is_plain():
    model = SmoeForCausalLM(small_config())
    assert apply_performance(model, PerformanceConfig(), "cpu") == []
    assert not any(module.fused for module in modules(model, (StackedExperts, Router)))
    assert {module.form for module in modules(model, Attention)} == {"sdpa"}
    assert all(block.compiled_attend is None for block in modules(model, Block))


def test_each_form_is_switched_on_and_said():
    model = SmoeForCausalLM(small_config())
    forms = PerformanceConfig(experts="cpp", attention="matmul", compile=True)
    notes = apply_performance(model, forms, "cpu")
    assert len(notes) == 2
    assert all(module.fused for module in modules(model, (StackedExperts, Router)))
    assert {module.form for module in modules(model, Attention)} == {"matmul"}
    assert all(block.compiled_attend is not None for block in modules(model, Block))
    assert model.compiled_loss is not None


def test_an_accelerator_keeps_its_own_form_of_experts():
    model = SmoeForCausalLM(small_config())
    assert apply_performance(model, PerformanceConfig(experts="cpp"), "cuda") == []
    assert not any(module.fused for module in modules(model, StackedExperts))


def test_auto_says_why_there_is_no_operator(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = SmoeForCausalLM(small_config())
    (note,) = apply_performance(model, PerformanceConfig(experts="auto"), "cpu")
    assert "no C++ compiler (no-such-compiler)" in note
    assert not any(module.fused for module in modules(model, StackedExperts))
    monkeypatch.setattr(build, "_loaded", [])
    (tmp_path / "a-file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "a-file"))
    with pytest.raises(LaunchError, match="TORCH_EXTENSIONS_DIR"):
        apply_performance(model, PerformanceConfig(experts="cpp"), "cpu")
    monkeypatch.delenv("CXX")  # there is a compiler, but the operators cannot be had
    notes = apply_performance(model, PerformanceConfig(experts="auto", attention="auto"), "cpu")
    assert [note.split(":")[0] for note in notes] == ["attention", "experts"]
    assert all("TORCH_EXTENSIONS_DIR" in note for note in notes)
    assert not any(module.fused for module in modules(model, (StackedExperts, Attention, Router)))


@pytest.mark.parametrize(("form", "fused"), [("sdpa", False), ("matmul", False), ("cpp", True), ("auto", True)])
def test_attention_has_the_operator_where_asked_for(form, fused):
    model = SmoeForCausalLM(small_config())
    notes = apply_performance(model, PerformanceConfig(attention=form), "cpu")
    assert [module.fused for module in modules(model, Attention)] == [fused] * len(modules(model, Attention))
    assert notes == ["attention: the compiled operator"] * fused
    assert not any(module.fused for module in modules(model, StackedExperts))
    assert apply_performance(SmoeForCausalLM(small_config()), PerformanceConfig(attention=form), "cuda") == []
