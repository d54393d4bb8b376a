"""The compiled experts against each token's expert in fp64, and against PyTorch's form with all its gradients."""

import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smoe_train.errors import LaunchError
from smoe_train.kernels import build, combine, run_experts, self_check
from smoe_train.model.feed_forward import StackedExperts
from smoe_train.parallel.dispatch_plan import plan_dispatch, plan_everyone, row_multiple

pytestmark = pytest.mark.compiler

D_MODEL, D_FF = 24, 40  # neither a multiple of a vector's 16 values
KINDS = ("relu", "gelu", "swiglu")
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module", autouse=True)
def kernel():
    """The operator, compiled if it is not there yet."""
    return build.load_kernels()


def stacked(kind, dtype, num_experts, d_model=D_MODEL, d_ff=D_FF):
    generator = torch.Generator().manual_seed(1)
    result = StackedExperts(range(num_experts), d_model, d_ff, kind, 0.1, 0.1)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return result.to(dtype)


def one_by_one(experts, x_TD, ids_TK):
    """Each slot on its own, in fp64."""
    w = {name: value.detach().double() for name, value in experts.named_parameters()}
    y_TKD = torch.zeros(*ids_TK.shape, x_TD.shape[1], dtype=torch.float64)
    for t, ids in enumerate(ids_TK.tolist()):
        for k, e in enumerate(ids):
            if e < 0:
                continue
            x = x_TD[t].double()
            if experts.kind == "swiglu":
                hidden = torch.nn.functional.silu(x @ w["w_gate"][e]) * (x @ w["w_in"][e])
                y_TKD[t, k] = hidden @ w["w_out"][e]
            else:
                act = torch.relu if experts.kind == "relu" else torch.nn.functional.gelu
                y_TKD[t, k] = act(x @ w["w_in"][e] + w["b_in"][e]) @ w["w_out"][e] + w["b_out"][e]
    return y_TKD


def run(experts, x_TD, plan, dy_TKD, fused):
    """Outputs and the gradients of tokens and weights."""
    experts.fused = fused
    x_TD = x_TD.clone().requires_grad_()
    y_TKD = experts(x_TD, plan)
    return [y_TKD, *torch.autograd.grad(y_TKD, [x_TD, *experts.parameters()], dy_TKD)]


def assert_close(found, expected, dtype):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        # By norms: where rounding flips the sign of a ReLU's input, a single gradient differs wholly.
        assert (one.double() - other.double()).norm() <= TOLERANCE[dtype] * (1e-3 + other.double().norm())


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(KINDS), st.sampled_from(DTYPES))
def test_it_is_each_expert_on_each_token(data, kind, dtype):
    num_experts = data.draw(st.integers(1, 6))
    slot = st.integers(-1, num_experts - 1)
    width = data.draw(st.integers(1, 3))
    rows = data.draw(st.lists(st.lists(slot, min_size=width, max_size=width), max_size=20))
    ids_TK = torch.tensor(rows, dtype=torch.int64).reshape(-1, width)
    experts = stacked(kind, dtype, num_experts)
    x_TD = torch.randn(len(ids_TK), D_MODEL, generator=torch.Generator().manual_seed(2)).to(dtype)
    plan = plan_dispatch(ids_TK, num_experts, row_multiple(x_TD))
    experts.fused = True
    y_TKD = experts(x_TD, plan)
    assert_close([y_TKD], [one_by_one(experts, x_TD, ids_TK)], dtype)
    assert (y_TKD[ids_TK < 0] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 33, 700], ids=lambda n: f"{n}_tokens")
def test_gradients_are_those_of_autograd(kind, dtype, tokens):
    """With empty slots, an expert without tokens and, at 700 tokens, one that is cut into several tasks."""
    generator = torch.Generator().manual_seed(3)
    ids_TK = torch.randint(0, 4, (tokens, 2), generator=generator)
    ids_TK = torch.where(torch.rand(tokens, 2, generator=generator) < 0.6, torch.ones_like(ids_TK), ids_TK)
    ids_TK = torch.where(torch.rand(tokens, 2, generator=generator) < 0.2, torch.full_like(ids_TK, -1), ids_TK)
    ids_TK[ids_TK == 2] = 3
    x_TD, dy_TKD = (torch.randn(shape, generator=generator).to(dtype) for shape in ((tokens, 24), (tokens, 2, 24)))
    experts = stacked(kind, dtype, 5)
    plan = plan_dispatch(ids_TK, 5, row_multiple(x_TD))
    found = run(experts, x_TD, plan, dy_TKD, fused=True)
    for gradient in found[2:]:  # of experts without a token: exactly zero
        assert (gradient[2] == 0).all()
        assert (gradient[4] == 0).all()
    # The reference is PyTorch's form in fp64, from the same rounded values.
    reference = [
        value.to(dtype)
        for value in run(experts.double(), x_TD.double(), plan_dispatch(ids_TK, 5), dy_TKD.double(), fused=False)
    ]
    assert_close(found, reference, dtype)


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d_model", "d_ff"), [(64, 128), (33, 71), (96, 300), (160, 65)], ids=str)
def test_widths_of_whole_blocks_and_odd_ones(kind, dtype, d_model, d_ff):
    """Few experts, so that two threads share an expert, whose gradient is cut into parts of 256 columns."""
    generator = torch.Generator().manual_seed(6)
    ids_TK = torch.randint(0, 2, (300, 1), generator=generator)
    shapes = ((300, d_model), (300, 1, d_model))
    x_TD, dy_TKD = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    experts = stacked(kind, dtype, 2, d_model, d_ff)
    plan, before = plan_dispatch(ids_TK, 2, row_multiple(x_TD)), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(experts, x_TD, plan, dy_TKD, fused=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    reference = run(experts.double(), x_TD.double(), plan_dispatch(ids_TK, 2), dy_TKD.double(), fused=False)
    assert_close(results[0], [value.to(dtype) for value in reference], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everyone_on_everything(dtype):
    """A contest: each token visits all experts."""
    experts, generator = stacked("swiglu", dtype, 3), torch.Generator().manual_seed(4)
    x_TD, dy_TKD = (torch.randn(shape, generator=generator).to(dtype) for shape in ((50, 24), (50, 3, 24)))
    plan = plan_everyone(50, 3, x_TD.device)
    pair = [run(experts, x_TD, plan, dy_TKD, fused) for fused in (True, False)]
    assert_close(*pair, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(dtype):
    generator = torch.Generator().manual_seed(5)
    experts = stacked("swiglu", dtype, 4)
    ids_TK = torch.randint(0, 4, (600, 2), generator=generator)
    x_TD, dy_TKD = (torch.randn(shape, generator=generator).to(dtype) for shape in ((600, 24), (600, 2, 24)))
    plan, before = plan_dispatch(ids_TK, 4, row_multiple(x_TD)), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(run(experts, x_TD, plan, dy_TKD, fused=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_frozen_experts_pass_gradients_on():
    experts = stacked("gelu", torch.float32, 3).requires_grad_(False)
    x_TD = torch.randn(10, 24, requires_grad=True)
    plan = plan_dispatch(torch.randint(0, 3, (10, 2)), 3)
    gradients = []
    for experts.fused in (True, False):
        gradients.append(torch.autograd.grad(experts(x_TD, plan).square().sum(), x_TD)[0])
    assert_close(gradients[:1], gradients[1:], torch.float32)


def test_what_it_does_not_compute_is_left_to_pytorch():
    experts = stacked("gelu", torch.float64, 3)
    experts.fused = True
    plan = plan_dispatch(torch.tensor([[0], [2]]), 3)
    assert experts(torch.ones(2, 24, dtype=torch.float64), plan).dtype == torch.float64


def test_a_second_derivative_is_refused():
    """Rather than taken to be 0."""
    experts = stacked("swiglu", torch.float32, 3)
    experts.fused = True
    x_TD, y_TKD, weights_TK = (torch.randn(shape, requires_grad=True) for shape in ((10, 24), (10, 2, 24), (10, 2)))
    plan = plan_dispatch(torch.randint(0, 3, (10, 2)), 3)
    for result, origin in ((experts(x_TD, plan), x_TD), (combine(y_TKD, weights_TK), y_TKD)):
        (gradient,) = torch.autograd.grad(result.square().sum(), origin, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            gradient.square().sum().backward()


def test_what_does_not_fit_together_is_refused():
    experts = stacked("swiglu", torch.float32, 2)
    weights = [experts.w_gate, experts.w_in, experts.w_out]
    x_TD, row_TK, rows_E = torch.ones(3, 24), torch.tensor([[0], [1], [2]]), torch.tensor([2, 1])
    for message, arguments in {
        "an empty slot's row": (x_TD, row_TK - 1, rows_E),
        "expected .3, 24., not .2, 24.": (x_TD[:2], row_TK, rows_E),
        "expected .3, 24., not .3, 20.": (x_TD[:, :20], row_TK, rows_E),
        "the plan is for 3 experts": (x_TD, row_TK, torch.tensor([1, 1, 1])),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            run_experts(*arguments, "swiglu", *weights)
    with pytest.raises(RuntimeError, match="a weight for each slot"):
        combine(torch.ones(3, 2, 24), torch.ones(3, 1))


def test_biases_of_many_rows_keep_their_digits():
    """One by one, 20,000 equal gradients would be off by 1e-4."""
    experts, rows = stacked("relu", torch.float32, 1, 8, 8), 20_000
    plan = plan_dispatch(torch.zeros(rows, 1, dtype=torch.int64), 1)
    gradients = run(experts, torch.ones(rows, 8), plan, torch.full((rows, 1, 8), 0.1), fused=True)
    names = [name for name, _ in experts.named_parameters()]
    expected = torch.full((1, 8), float(torch.tensor(0.1)) * rows)
    torch.testing.assert_close(gradients[2 + names.index("b_out")], expected, rtol=5e-6, atol=0)


def test_operators_that_are_wrong_on_a_cpu_are_not_used(kernel, monkeypatch):
    monkeypatch.setattr(build, "_loaded", [])
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(build.attention, "register", lambda: None)
    right = self_check.run_experts
    monkeypatch.setattr(self_check, "run_experts", lambda *arguments: right(*arguments) * 1.001)
    with pytest.raises(LaunchError, match=r"something else .* experts in float32 are off by 1\.0e-03"):
        build.load_kernels()
    assert build._loaded == []


def test_without_a_compiler_there_is_a_message(tmp_path, monkeypatch, kernel):
    monkeypatch.setattr(build, "_loaded", [])
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(LaunchError, match=r"no C\+\+ compiler \(no-such-compiler\); install g\+\+.*experts=torch"):
        build.load_kernels()


def test_a_compiler_that_fails_is_a_message(tmp_path, monkeypatch, kernel):
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\necho 'g++ 12: fatal error: out of luck' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(build, "_loaded", [])
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(LaunchError, match=r"the compiler failed in .*cache.*use experts=torch"):
        build.load_kernels()


def test_a_build_that_was_broken_off_is_made_again(tmp_path, monkeypatch, kernel):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / kernel.parent.name
    folder.mkdir()
    (folder / kernel.name).write_bytes(b"half a library")
    (folder / "lock").touch()  # torch's own, which nobody would ever remove
    tried = []

    def copy(name, sources, build_directory, **options):
        tried.append(os.listdir(build_directory))
        shutil.copy(kernel, build_directory)

    monkeypatch.setattr("torch.utils.cpp_extension.load", copy)
    monkeypatch.setattr(build, "_loaded", [])
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(build.attention, "register", lambda: None)
    for _ in range(2):
        build._loaded.clear()
        assert build.load_kernels() == folder / kernel.name
    assert tried == [[]]
