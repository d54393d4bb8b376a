"""The compiled attention against PyTorch's in fp64, with all gradients, for lengths and widths of all sorts."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from smoe_train.kernels import attend, attends, load_kernels
from smoe_train.model.attention import Attention

pytestmark = pytest.mark.compiler

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module", autouse=True)
def kernel():
    """The operators, compiled if they are not there yet."""
    return load_kernels()


def heads(dtype, *shape, seed=0):
    """Queries, keys, values and the output's gradient, with the strides that projections give them."""
    batch, num_heads, length, width = shape
    generator = torch.Generator().manual_seed(seed)
    qkvg = torch.randn(batch, length, 4, num_heads, width, generator=generator).to(dtype)
    return qkvg.permute(2, 0, 3, 1, 4).unbind(0)


def with_gradients(form, q, k, v, dy):
    inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    y = form(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def reference(causal, q, k, v, dy):
    def form(*inputs):
        return F.scaled_dot_product_attention(*inputs, is_causal=causal)

    return with_gradients(form, *(tensor.double() for tensor in (q, k, v, dy)))


def assert_close(found, expected, dtype):
    scale = expected[0].norm()  # where one key alone is seen, gradients of scores are 0
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= TOLERANCE[dtype] * (scale + other.norm())


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 2, 31, 63, 64, 65, 100, 128, 129, 200]),
    st.sampled_from([2, 7, 8, 16, 31, 32, 33, 64, 80, 128]),
    st.booleans(),
    st.sampled_from(DTYPES),
)
def test_it_is_attention_and_its_gradients_are(batch, num_heads, length, width, causal, dtype):
    inputs = heads(dtype, batch, num_heads, length, width)
    found = with_gradients(lambda q, k, v: attend(q, k, v, causal), *inputs)
    assert_close(found, reference(causal, *inputs), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_any_size_do_not_overflow(dtype):
    q, k, v, dy = heads(dtype, 1, 2, 70, 32)
    found = with_gradients(lambda q, k, v: attend(q, k, v, True), q * 50, k * 50, v, dy)
    assert all(bool(torch.isfinite(one).all()) for one in found)
    assert_close(found[:1], reference(True, q * 50, k * 50, v, dy)[:1], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(dtype):
    inputs, before, results = heads(dtype, 2, 3, 150, 32), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(with_gradients(lambda q, k, v: attend(q, k, v, True), *inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_later_token_changes_nothing_before_it():
    q, k, v, _ = heads(torch.float32, 1, 1, 130, 32)
    before = attend(q, k, v, True)
    for tensor in (k, v):
        tensor[:, :, 100:] += 3.0
    after = attend(q, k, v, True)
    assert torch.equal(before[:, :, :100], after[:, :, :100])
    assert not torch.equal(before[:, :, 100:], after[:, :, 100:])


def test_the_derivative_is_that_of_the_function():
    """By torch's own checks of a custom operator: schema, derivative, and the shapes that the compiler is told."""
    q, k, v, _ = heads(torch.float32, 1, 2, 40, 16)
    inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    torch.library.opcheck(torch.ops.smoe_train.attention.default, (*inputs, True))


@pytest.mark.parametrize("fused", [True, False])
def test_what_has_a_mask_or_a_cache_is_left_to_pytorch(fused, monkeypatch):
    layer = Attention(32, 2, layer=0)
    layer.fused = fused
    x_BSD = torch.randn(2, 5, 32)
    asked = []
    monkeypatch.setattr("smoe_train.kernels.attend", lambda *arguments: asked.append(1) or attend(*arguments))
    allowed = torch.ones(5, 5, dtype=torch.bool).tril().view(1, 1, 5, 5)
    plain = layer(x_BSD, None, None)
    assert len(asked) == fused
    torch.testing.assert_close(layer(x_BSD, None, allowed), plain)
    assert len(asked) == fused
    q, keys = torch.ones(1, 1, 1, 8), torch.ones(1, 1, 5, 8)
    assert attends(q, q, q, None)
    assert not attends(q, keys, keys, None)
    assert not attends(q, q, q.bfloat16(), None)  # as autocast leaves them
    for other in (q.double(), q.to("meta")):
        assert not attends(other, other, other, None)


def test_a_second_derivative_is_refused():
    inputs = [tensor.detach().requires_grad_() for tensor in heads(torch.float32, 1, 1, 9, 8)[:3]]
    (gradient,) = torch.autograd.grad(attend(*inputs, True).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()


def test_saved_values_may_come_back_with_other_strides():
    """As a hook that keeps them elsewhere may give them."""
    q, k, v, dy = heads(torch.float32, 2, 2, 70, 16)
    expected = with_gradients(lambda *inputs: attend(*inputs, True), q, k, v, dy)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor, lambda tensor: tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    ):
        found = with_gradients(lambda *inputs: attend(*inputs, True), q, k, v, dy)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
