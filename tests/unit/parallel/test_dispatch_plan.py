"""Sorting by expert against lists, gradients against finite differences, the grouped product against a loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.naive_moe import feed_forward

from smoe_train.model import LocalExpertBank, StackedExperts
from smoe_train.model.feed_forward import grouped_product
from smoe_train.model.initialise import KeyedDraw
from smoe_train.parallel.dispatch_plan import (
    count_slots,
    plan_blocks,
    plan_dispatch,
    row_multiple,
    to_expert_order,
    to_slot_order,
)

NUM_EXPERTS = 5


@st.composite
def id_tables(draw, max_tokens=9):
    slots = draw(st.integers(1, 4))
    row = st.lists(st.integers(-1, NUM_EXPERTS - 1), min_size=slots, max_size=slots)
    rows = draw(st.lists(row, max_size=max_tokens))
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), slots)


def naive_rows(ids_TK, multiple):
    """The sorted buffer as a list: (token, slot) of each row or None for filling, and each expert's rows."""
    rows, counts = [], []
    for expert in range(NUM_EXPERTS):
        mine = [(t, k) for t, ids in enumerate(ids_TK.tolist()) for k, i in enumerate(ids) if i == expert]
        mine += [None] * (-len(mine) % multiple)
        rows += mine
        counts.append(len(mine))
    return rows, counts


@given(id_tables(), st.sampled_from([1, 2, 32]))
def test_plan_is_the_sorted_list(ids_TK, multiple):
    plan = plan_dispatch(ids_TK, NUM_EXPERTS, multiple)
    rows, counts = naive_rows(ids_TK, multiple)
    assert plan.rows_per_expert_E.tolist() == counts
    assert plan.num_rows >= len(rows)
    assert torch.equal(plan.valid_TK, ids_TK >= 0)
    for row, owner in enumerate(rows):
        if owner is not None:
            assert plan.row_of_slot_TK[owner] == row
    behind = plan.row_of_slot_TK[ids_TK < 0]
    assert (behind >= len(rows)).all()  # empty slots own none of the experts' rows


@given(id_tables())
def test_counts_of_slots(ids_TK):
    ids = ids_TK.flatten().tolist()
    assert count_slots(ids_TK, NUM_EXPERTS).tolist() == [ids.count(i) for i in (*range(NUM_EXPERTS), -1)]


@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=4), st.sampled_from([1, 32]))
def test_blocks_in_order_need_no_sort(counts, multiple):
    """Tokens of three experts that come from up to four ranks, sorted by each of them."""
    ids = [expert for block in counts for expert, number in enumerate(block) for _ in range(number)]
    expected = plan_dispatch(torch.tensor(ids, dtype=torch.int64).unsqueeze(1), 3, multiple)
    found = plan_blocks(torch.tensor(counts), len(ids), multiple)
    assert torch.equal(found.row_of_slot_TK, expected.row_of_slot_TK)
    assert torch.equal(found.valid_TK, expected.valid_TK)
    assert torch.equal(found.rows_per_expert_E, expected.rows_per_expert_E)
    assert found.num_rows == expected.num_rows


@given(id_tables(), st.sampled_from([1, 2, 32]))
def test_expert_order_and_back(ids_TK, multiple):
    plan = plan_dispatch(ids_TK, NUM_EXPERTS, multiple)
    x_TD = 1.0 + torch.arange(3.0 * len(ids_TK)).view(-1, 3)
    sorted_RD = to_expert_order(x_TD, plan)
    rows, _ = naive_rows(ids_TK, multiple)
    assert sorted_RD.shape == (plan.num_rows, 3)
    for row, owner in enumerate(rows):
        expected = [0.0] * 3 if owner is None else x_TD[owner[0]].tolist()
        assert sorted_RD[row].tolist() == expected
    back_TKD = to_slot_order(sorted_RD, plan)
    assert back_TKD.shape == (*ids_TK.shape, 3)
    expected = torch.where((ids_TK >= 0).unsqueeze(-1), x_TD.unsqueeze(1), torch.zeros(()))
    assert torch.equal(back_TKD, expected)


TABLES = {
    "plain": [[0, 1], [4, 2], [1, 0]],
    "empty slots": [[0, -1], [-1, -1], [3, 0]],
    "one expert": [[2], [2], [2]],
    "all empty": [[-1, -1], [-1, -1]],
    "no tokens": [],
}
tables = pytest.mark.parametrize("ids", TABLES.values(), ids=TABLES)


def table(ids):
    return torch.tensor(ids, dtype=torch.int64).view(len(ids), -1 if ids else 2)


@tables
@pytest.mark.parametrize("multiple", [1, 4])
def test_gradients_of_both_gathers(ids, multiple):
    ids_TK = table(ids)
    plan = plan_dispatch(ids_TK, NUM_EXPERTS, multiple)
    x_TD = torch.randn(len(ids_TK), 3, dtype=torch.float64, requires_grad=True)
    y_RD = torch.randn(plan.num_rows, 3, dtype=torch.float64, requires_grad=True)
    used = sum(naive_rows(ids_TK, multiple)[1])
    if len(ids_TK):
        assert torch.autograd.gradcheck(lambda x: to_expert_order(x, plan)[:used], (x_TD,))
    if plan.num_rows:
        assert torch.autograd.gradcheck(lambda y: to_slot_order(y, plan), (y_RD,))
    to_expert_order(x_TD, plan)[:used].sum().backward()
    assert x_TD.grad.shape == x_TD.shape
    visits = (ids_TK >= 0).sum(1, keepdim=True).double()
    assert torch.equal(x_TD.grad, visits.expand_as(x_TD))


def experts(kind, dtype, d_model=4, d_ff=6, std=0.7):
    stacked = StackedExperts(range(NUM_EXPERTS), d_model, d_ff, kind, std, std)
    stacked.initialise(KeyedDraw(0, "experts"))
    with torch.no_grad():
        for name, parameter in stacked.named_parameters():
            if name.startswith("b_"):
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
    return stacked.to(dtype)


@tables
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_gradients_of_stacked_experts(ids, kind):
    """fp64 differences for the tokens and for every weight, with empty slots and experts without tokens."""
    ids_TK = table(ids)
    if not len(ids_TK):
        return
    stacked = experts(kind, torch.float64)
    x_TD = torch.randn(len(ids_TK), 4, dtype=torch.float64, requires_grad=True)
    names, values = zip(*stacked.named_parameters(), strict=True)

    def outputs(x, *weights):
        def call(*arguments):
            return torch.func.functional_call(stacked, dict(zip(names, weights, strict=True)), arguments)

        return call(x, plan_dispatch(ids_TK, NUM_EXPERTS, row_multiple(x)))

    assert torch.autograd.gradcheck(outputs, (x_TD, *values), fast_mode=True)


@settings(max_examples=25, deadline=None)
@given(id_tables(), st.sampled_from(["relu", "gelu", "swiglu"]), st.sampled_from([5, 8]), st.booleans())
def test_stacked_experts_are_each_expert_on_each_token(ids_TK, kind, d_ff, low):
    """Outputs in slot order against one token at a time, for the looped (5) and grouped (8) form, fp32 and bf16."""
    dtype = torch.bfloat16 if low else torch.float32
    stacked = experts(kind, dtype, d_model=8, d_ff=d_ff, std=0.3)
    weights = {name: value.detach().double() for name, value in stacked.named_parameters()}
    x_TD = torch.randn(len(ids_TK), 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    y_TKD = LocalExpertBank(NUM_EXPERTS, lambda _: stacked)(x_TD, ids_TK)
    assert y_TKD.shape == (*ids_TK.shape, 8)
    assert y_TKD.dtype == dtype
    tolerance = 0.06 if low else 1e-5
    for t, ids in enumerate(ids_TK.tolist()):
        for k, expert in enumerate(ids):
            if expert < 0:
                assert (y_TKD[t, k] == 0).all()
                continue
            expected = feed_forward(x_TD[t].double(), expert, weights, kind)
            torch.testing.assert_close(y_TKD[t, k].double(), expected, atol=tolerance, rtol=tolerance)


@pytest.fixture
def poisoned_memory():
    """Memory that nobody wrote holds NaN, so that whatever reads it shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@tables
@pytest.mark.parametrize("kind", ["relu", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_undefined_row_reaches_a_gradient(ids, kind, dtype, poisoned_memory):
    """grouped_mm leaves rows behind the last expert's unwritten, in both directions; bf16 also has filling rows."""
    ids_TK = table(ids)
    stacked = experts(kind, dtype, d_model=16, d_ff=16)
    x_TD = torch.randn(len(ids_TK), 16).to(dtype).requires_grad_()
    y_TKD = stacked(x_TD, plan_dispatch(ids_TK, NUM_EXPERTS, row_multiple(x_TD)))
    y_TKD.float().square().sum().backward()
    assert y_TKD.isfinite().all()
    assert x_TD.grad.isfinite().all()
    assert (x_TD.grad[(ids_TK < 0).all(1)] == 0).all()
    idle = [expert for expert in range(NUM_EXPERTS) if not (ids_TK == expert).any()]
    for name, parameter in stacked.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad[idle] == 0).all(), name


def test_low_precision_rows_are_rounded_on_the_cpu():
    assert row_multiple(torch.zeros(1)) == row_multiple(torch.zeros(1, dtype=torch.float64)) == 1
    assert row_multiple(torch.zeros(1, dtype=torch.bfloat16)) == row_multiple(torch.zeros(1).half()) == 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("inner", "outer"), [(8, 16), (8, 5), (5, 8), (3, 7), (1, 1)])
@pytest.mark.parametrize("rows", [[3, 0, 5], [0, 0, 4], [6, 0, 0], [0, 0, 0], [1, 1, 1]], ids=str)
def test_grouped_product(dtype, inner, outer, rows):
    """Values and both gradients against one product an expert, for aligned and unaligned widths and zero rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(rows), inner, generator=generator).to(dtype).requires_grad_()
    w = torch.randn(3, inner, outer, generator=generator).to(dtype).requires_grad_()
    result = grouped_product(x, w, torch.tensor(rows).cumsum(0))
    assert result.dtype == dtype
    assert result.shape == (sum(rows), outer)
    upstream = torch.randn(sum(rows), outer, generator=generator).to(dtype)
    gradients = torch.autograd.grad((result * upstream).sum(), [x, w])
    one, many = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    expected = torch.cat([part @ many[e] for e, part in enumerate(one.split(rows))])
    exact = torch.autograd.grad((expected * upstream.double()).sum(), [one, many], allow_unused=True)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=tolerance)
    for got, wanted in zip(gradients, exact, strict=True):
        wanted = torch.zeros_like(got).double() if wanted is None else wanted
        torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=tolerance)


def test_grouped_product_accepts_expanded_gradients():
    """`sum` sends a gradient with stride 0, which grouped_mm's own backward refuses."""
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(2, 8, 8, requires_grad=True)
    grouped_product(x, w, torch.tensor([1, 4])).sum().backward()
    torch.testing.assert_close(x.grad[0], w[0].detach().sum(1))
