"""Adaptive gating against a naive oracle, golden values, and the invariants A1 to A12 of the notes."""

import copy
import math

import pytest
import torch
from support.naive_adaptive import naive_adaptive
from support.naive_moe import naive_hyper_router
from support.router_cases import NUM_EXPERTS, RouterCase, assign, context, initialised, run, tokens
from support.small_model import small_config, small_model, text
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from smoe_train.errors import RecipeError
from smoe_train.model import SmoeForCausalLM
from smoe_train.model.accounting import forward_flops
from smoe_train.recipe import json_schema, load_recipe
from smoe_train.routing import EMPTY_SLOT, RouterPlan, StepTotals
from smoe_train.routing.adaptive import AdaptiveConfig, count_gaps, gap_quantile, gaps_to_best
from smoe_train.routing.hyper_router import HyperRouterConfig
from smoe_train.routing.top_k import TopKConfig, TopKRouter
from smoe_train.routing.x_moe import XMoeConfig
from smoe_train.schedules import Knobs

BASES = {
    "top_k": TopKConfig(init_std=0.3),
    "bias": TopKConfig(init_std=0.3, bias=True),
    "hyper_router": HyperRouterConfig(hyper_hidden=7, hypernet_std=0.3),
}
GOLDEN = torch.tensor([[0.5, 0.45, 0.03, 0.02], [0.6, 0.3, 0.05, 0.05], [0.25] * 4, [0.1, 0.7, 0.15, 0.05]])


def case(**options):
    return RouterCase("adaptive", tuple({"base": BASES["top_k"], **options}.items()))


def transparent(num_experts=4, dtype=torch.float64, **options):
    """A router whose scores are its input: the logarithms of probabilities give these probabilities."""
    router = initialised(AdaptiveConfig(**options), 0, num_experts, num_experts)[0].to(dtype)
    with torch.no_grad():
        router.base.weight.copy_(torch.eye(num_experts))
    return router


def routed(router, p_TE, **changes):
    return assign(router, p_TE.log().to(router.base.weight.dtype), context(**changes))


def two_experts(assignment):
    return (assignment.expert_ids_TK[:, 1] != EMPTY_SLOT).tolist()


# The oracle


def naive_base(router, leaves):
    base = router.base
    if isinstance(base, TopKRouter):
        return leaves["router.base.weight"], leaves.get("router.base.bias")
    prefix = "router.base.hypernet."
    net = {name.removeprefix(prefix): value for name, value in leaves.items() if name.startswith(prefix)}
    return naive_hyper_router(leaves["router.base.embedding"], net, NUM_EXPERTS, 16, True)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("gap", ["full", "top2_renormalised"])
@pytest.mark.parametrize(("weights", "balance_tokens"), [("raw", "top1_only"), ("renormalised", "all")])
@pytest.mark.parametrize(("top_k", "padded"), [(1, False), (2, True), (4, False)])
def test_outputs_losses_and_gradients_are_the_oracles(base, gap, weights, balance_tokens, top_k, padded):
    """fp64, to rounding; the tokens have one, two and more experts."""
    threshold = {"full": 0.25, "top2_renormalised": 0.5}[gap]
    options = {"threshold": threshold, "gap": gap, "weights": weights, "balance_tokens": balance_tokens}
    layer = case(base=BASES[base], **options).layer("gelu").double()
    real = [index % 4 != 3 for index in range(10)] if padded else [True] * 10
    x = tokens(10, scale=1.0).double().requires_grad_()
    merged = run(layer, x, context(top_k, token_mask_T=torch.tensor(real) if padded else None))

    leaves = {name: value.detach().clone().requires_grad_() for name, value in layer.state_dict().items()}
    experts = {name.removeprefix("bank.experts."): v for name, v in leaves.items() if name.startswith("bank.")}
    x_naive = x.detach().clone().requires_grad_()
    expected = naive_adaptive(
        x_naive, naive_base(layer.router, leaves), experts, "gelu", top_k, **options, real=real
    )  # fmt: skip
    sizes = {len(ids) for ids, is_real in zip(expected.ids, real, strict=True) if is_real}
    assert sizes >= {1}
    assert len(sizes) > 1 or top_k == 1
    assert merged.experts_of_token_T.tolist() == [len(ids) for ids in expected.ids]

    def total(result, losses):
        direction = torch.linspace(-1, 1, result.out_TD.numel(), dtype=torch.float64).view_as(result.out_TD)
        return (result.out_TD * direction).sum() + 0.7 * losses["load_balance_loss"] + 0.3 * losses["z_loss"]

    names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    got = torch.autograd.grad(
        total(merged, merged.losses), [x, *(layer.get_parameter(n) for n in names)], allow_unused=True
    )
    naive_total = total(expected, vars(expected))
    wanted = torch.autograd.grad(naive_total, [x_naive, *(leaves[name] for name in names)], allow_unused=True)
    close = {"atol": 1e-9, "rtol": 1e-9}
    torch.testing.assert_close(merged.out_TD, expected.out_TD, **close)
    for name in ("load_balance_loss", "z_loss"):
        torch.testing.assert_close(merged.losses[name], torch.as_tensor(getattr(expected, name)), **close)
    for name, one, other in zip(["x", *names], got, wanted, strict=True):
        if other is None:
            assert one is None or (one == 0).all(), name
        else:
            torch.testing.assert_close(one, other, **close, msg=lambda m, n=name: f"{n}: {m}")


def test_the_comparison_with_the_oracle_can_fail():
    """Another threshold, another gap and another weight give other outputs."""
    x, layer = tokens(10, scale=1.0).double(), case(threshold=0.25).layer("gelu").double()
    out = run(layer, x, context()).out_TD
    for change in ({"threshold": 0.1}, {"gap": "top2_renormalised"}, {"weights": "renormalised"}):
        other = case(**{"threshold": 0.25, **change}).layer("gelu").double()
        assert (run(other, x, context()).out_TD - out).abs().max() > 1e-3, change


# Golden values


def test_golden_values():
    """A6 and section 4.10: who gets two experts, f, mean p and the balance loss 1.575."""
    router = transparent()
    assignment = routed(router, GOLDEN)
    assert two_experts(assignment) == [True, False, True, False]
    assert assignment.expert_ids_TK.tolist() == [[0, 1], [0, -1], [0, 1], [1, -1]]
    p = torch.softmax(assignment.logits_TE, 1)
    assert p.mean(0).tolist() == pytest.approx([0.3625, 0.425, 0.12, 0.0925], abs=1e-7)
    losses = router.losses(assignment, context())
    assert losses["load_balance_loss"].item() == pytest.approx(1.575, abs=1e-6)
    # All tokens counted: f = (3, 3, 0, 0) / 6, and 4 (.5 * .3625 + .5 * .425) is the same by chance of the example;
    # with k = 1 the third token counts too: f = (3, 1, 0, 0) / 4.
    alone = routed(router, GOLDEN, top_k=1)
    value = router.losses(alone, context(1))["load_balance_loss"]
    assert value.item() == pytest.approx(4 * (0.75 * 0.3625 + 0.25 * 0.425), abs=1e-6)


@pytest.mark.parametrize(("balance_tokens", "expected"), [("top1_only", 1.26), ("all", 4 * 2.03 / 6)])
def test_a6_which_tokens_f_counts(balance_tokens, expected):
    """A6 where it shows: by hand f = (1, 0, 0, 1) / 2 over tokens with one expert, (3, 2, 0, 1) / 6 over all slots.

    P = (.4, .3, .07, .23) over all tokens in both cases. First choices of all tokens would give 1.43, and P over the
    tokens with one expert 1.5.
    """
    p = torch.tensor([[0.5, 0.45, 0.03, 0.02], [0.6, 0.3, 0.05, 0.05], [0.05, 0.05, 0.1, 0.8], [0.45, 0.4, 0.1, 0.05]])
    router = transparent(balance_tokens=balance_tokens)
    assignment = routed(router, p)
    assert assignment.expert_ids_TK.tolist() == [[0, 1], [0, -1], [3, -1], [0, 1]]
    assert router.losses(assignment, context())["load_balance_loss"].item() == pytest.approx(expected, abs=1e-6)


def test_golden_renormalised_gaps():
    gaps = gaps_to_best(GOLDEN.double().sort(1, descending=True).values, "top2_renormalised")[:, 1]
    assert gaps.tolist() == pytest.approx([0.05263, 0.33333, 0.0, 0.64706], abs=1e-5)
    assert two_experts(routed(transparent(gap="top2_renormalised", threshold=0.334), GOLDEN)) == [True] * 3 + [False]
    assert two_experts(routed(transparent(gap="full", threshold=0.334), GOLDEN)) == [True] * 3 + [False]
    assert two_experts(routed(transparent(gap="top2_renormalised", threshold=0.06), GOLDEN)) == [True, False] * 2
    assert two_experts(routed(transparent(gap="full", threshold=0.04), GOLDEN)) == [False, False, True, False]


# Share of tokens with two experts among Gaussian logits of 16 experts at T = 0.1, section 4.6, to its two digits.
SHARES = [(0.02, 1.0, 1.0), (0.5, 0.96, 0.53), (1, 0.64, 0.31), (2, 0.28, 0.16), (3, 0.165, 0.11), (4, 0.11, 0.08)]


@pytest.mark.parametrize(("std", "full", "renormalised"), SHARES)
def test_shares_of_gaussian_logits(std, full, renormalised):
    logits = std * torch.randn(40000, 16, generator=torch.Generator().manual_seed(3))
    for gap, expected in (("full", full), ("top2_renormalised", renormalised)):
        router = transparent(16, torch.float32, gap=gap)
        share = (assign(router, logits, context()).expert_ids_TK[:, 1] != EMPTY_SLOT).double().mean()
        assert float(share) == pytest.approx(expected, abs=0.0125)


# A1 to A7


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize(("weights", "softmax"), [("raw", "before_top_k"), ("renormalised", "after_top_k")])
@pytest.mark.parametrize(("threshold", "top_k"), [(-0.01, 1), (1.0, 2), (1.0, 3)])
def test_a1_the_limits_are_bitwise_top_1_and_top_k(kind, weights, softmax, threshold, top_k):
    """A1: T < 0 is top-1, T >= 1 is top-k, with the same rule of weights: outputs, losses and gradients."""
    adaptive = case(threshold=threshold, weights=weights, balance_tokens="all").layer(kind, d_ff=16)
    plain = RouterCase("top_k", (("softmax", softmax), ("init_std", 0.3))).layer(kind, d_ff=16)
    results = []
    for layer, k in ((adaptive, max(top_k, 2)), (plain, top_k)):
        x = tokens(40, scale=1.0).requires_grad_()
        merged = run(layer, x, context(k))
        (merged.out_TD.square().sum() + sum(merged.losses.values())).backward()
        experts = [parameter.grad for parameter in layer.bank.parameters()]
        router = [parameter.grad for parameter in layer.router.parameters()]
        results.append([merged.out_TD, *merged.losses.values(), x.grad, *experts, *router])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("gap", ["full", "top2_renormalised"])
def test_a2_nested_in_threshold_and_k(gap):
    """A2: more experts with a larger T, in the same order; the first choice depends on neither T nor k."""
    x = tokens(300, scale=1.0)
    before = None
    for threshold in (-1.0, 0.0, 0.02, 0.1, 0.3, 0.7, 1.0):
        router = case(threshold=threshold, gap=gap).routers()[0]
        ids = assign(router, x, context(4)).expert_ids_TK
        if before is not None:
            used = before != EMPTY_SLOT
            assert torch.equal(ids[used], before[used])
            assert torch.equal(ids[:, 0], before[:, 0])
            assert 0.0 < threshold < 1.0 or threshold in (0.0, 1.0)
        for k in (1, 2, 3):
            assert torch.equal(assign(router, x, context(k)).expert_ids_TK, ids[:, :k])
        # Once an expert is left out, so are all worse ones.
        assert ((ids != EMPTY_SLOT).int().diff(dim=1) <= 0).all()
        before = ids
    assert (before != EMPTY_SLOT).all()


def test_a3_the_boundary_belongs_to_two_experts():
    """A3: gap == T gives two experts, the next smaller number does not; fp32 numbers, every token its own boundary."""
    logits = tokens(60, d_model=4, scale=1.0)
    p = torch.softmax(logits, 1)
    for token in range(60):
        best = p[token].sort(descending=True).values
        gap = best[0] - best[1]
        below = torch.nextafter(gap, torch.tensor(-1.0))
        at, under = (transparent(dtype=torch.float32, threshold=float(value)) for value in (gap, below))
        one = logits[token : token + 1]
        assert two_experts(assign(at, one, context())) == [True]
        assert two_experts(assign(under, one, context())) == [False]


def test_a3_decisions_in_fp32_under_bf16():
    """A3: rounding the probabilities to bf16 would decide otherwise for some tokens; it does for none."""
    router = case(threshold=0.1).routers()[0]
    x = tokens(2000, scale=1.0).bfloat16()
    expected = assign(copy.deepcopy(router).bfloat16().float(), x.float(), context())
    low = copy.deepcopy(router).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = assign(low, x, context())
    for got in (assign(low, x, context()), cast):
        assert torch.equal(got.expert_ids_TK, expected.expert_ids_TK)
    best = torch.softmax(expected.logits_TE, 1).bfloat16().sort(1, descending=True).values
    rounded = (best[:, 0] - best[:, 1] <= 0.1).tolist()
    assert rounded != two_experts(expected)


@pytest.mark.parametrize(("top_k", "padded"), [(2, False), (2, True), (4, False)])
def test_a4_rows_are_tokens_and_further_experts(top_k, padded):
    """A4: the experts are given T rows and one for each further expert; none for a slot that is not used."""
    layer = case(threshold=0.2).layer("gelu", d_ff=16)
    rows = []
    layer.bank.experts.register_forward_pre_hook(
        lambda _, given: rows.append((given[1].num_rows, int(given[1].rows_per_expert_E.sum())))
    )
    mask = torch.arange(50) % 5 != 0 if padded else torch.ones(50, dtype=torch.bool)
    merged = run(layer, tokens(50, scale=1.0), context(top_k, token_mask_T=mask if padded else None))
    of_token = merged.experts_of_token_T
    assert int((of_token == 1).sum()) > 0
    assert int((of_token == 2).sum()) > 0
    expected = int(mask.sum()) + sum(int((of_token > j).sum()) for j in range(1, top_k))
    assert rows == [(expected, expected)]
    assert int(merged.stats["slots_E"].sum()) == int(merged.stats["wanted_slots"]) == expected
    assert int(merged.stats["two_expert_tokens"]) == int((of_token >= 2).sum())
    assert (of_token[~mask] == 0).all()


def test_a5_raw_weights_are_probabilities():
    """A5: w = R; a token with one expert keeps a gradient to the router."""
    router = case(threshold=-1.0).routers()[0]
    result = assign(router, tokens(scale=1.0), context())
    p = torch.softmax(result.logits_TE, 1)
    assert torch.equal(result.weights_TK[:, 0], p.max(1).values)
    assert (result.weights_TK[:, 1] == 0).all()
    result.weights_TK[:, 0].sum().backward()
    assert router.base.weight.grad.abs().max() > 1e-2


def test_a5_renormalised_weights_sum_to_one():
    """A5: over the experts of each token; exactly 1 and exactly no gradient where there is one expert."""
    router = case(threshold=0.15, weights="renormalised").routers()[0]
    result = assign(router, tokens(200, scale=1.0), context(3))
    torch.testing.assert_close(result.weights_TK.sum(1), torch.ones(200), atol=1e-6, rtol=0)
    alone = (result.expert_ids_TK != EMPTY_SLOT).sum(1) == 1
    assert 0 < int(alone.sum()) < 200
    assert (result.weights_TK[alone, 0] == 1).all()
    p = torch.softmax(result.logits_TE.double(), 1).gather(1, result.expert_ids_TK.clamp(min=0))
    p = torch.where(result.expert_ids_TK == EMPTY_SLOT, 0.0, p)
    torch.testing.assert_close(result.weights_TK.double(), p / p.sum(1, keepdim=True), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(result.weights_TK[alone].sum(), router.base.weight, retain_graph=True)
    assert (gradient == 0).all()
    (gradient,) = torch.autograd.grad(result.weights_TK[~alone, 0].sum(), router.base.weight)
    assert gradient.abs().max() > 1e-3


def test_a6_without_a_token_with_one_expert_the_balance_loss_is_zero():
    """A6: exactly 0 with a gradient of exactly 0, where the loss over all tokens is above 1."""
    for balance_tokens, expected in (("top1_only", 0.0), ("all", None)):
        router = case(threshold=1.0, balance_tokens=balance_tokens).routers()[0]
        result = assign(router, tokens(scale=1.0), context())
        loss = router.losses(result, context())["load_balance_loss"]
        loss.backward()
        gradient = router.base.weight.grad
        assert gradient.isfinite().all()
        if expected is None:
            assert float(loss.detach()) > 1.0
            assert gradient.abs().max() > 0
        else:
            assert float(loss.detach()) == expected
            assert (gradient == 0).all()


def test_a6_one_at_uniformity():
    """A6: 1 when both f over the tokens with one expert and the mean probability are uniform; 0 for uniform p."""
    router = transparent()
    rotated = torch.stack([torch.tensor([0.7, 0.1, 0.1, 0.1]).roll(shift) for shift in range(4)])
    both = torch.cat([rotated, torch.full((3, 4), 0.25)])
    loss = router.losses(routed(router, both), context())["load_balance_loss"]
    assert loss.item() == pytest.approx(1.0, abs=1e-7)
    flat = router.losses(routed(router, torch.full((3, 4), 0.25)), context())["load_balance_loss"]
    assert flat.item() == 0.0


def test_a6_probabilities_of_all_tokens_carry_the_gradient():
    """A6: f counts tokens with one expert; P, and with it the gradient, takes in those with two."""
    router = transparent()
    x = GOLDEN.double().log().requires_grad_()
    result = assign(router, x, context())
    router.losses(result, context())["load_balance_loss"].backward()
    # d/ds of 4 / 4 * p . f is p * (f - p . f); the first token has two experts.
    p, f = GOLDEN.double(), torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64)
    expected = p * (f - (p * f).sum(1, keepdim=True))
    torch.testing.assert_close(x.grad, expected, atol=1e-7, rtol=0)
    assert expected[0].abs().max() > 0.01


def balance(router, x, **changes):
    ctx = context(**changes)
    loss = router.losses(assign(router, x, ctx), ctx)["load_balance_loss"]
    (gradient,) = torch.autograd.grad(loss, router.base.weight)
    return loss.detach(), gradient


@pytest.mark.parametrize("sizes", [(16, 16), (5, 27), (8, 8, 8, 8)], ids=str)
def test_a6_micro_batches_and_ranks_average_to_the_whole_batch(sizes):
    """A6: with the step's sums the mean over parts is the value and gradient of one batch; with own sums it is not."""
    router, x = case(threshold=0.15).routers()[0].double(), tokens(32, scale=1.0).double()
    whole = balance(router, x)
    per_part = torch.tensor(32 / len(sizes), dtype=torch.float64)
    totals = StepTotals(len(sizes))
    for part in x.split(sizes):
        balance(router, part, step_totals=totals, tokens_per_rank=per_part)
    totals.finish()
    parts = [balance(router, part, step_totals=totals, tokens_per_rank=per_part) for part in x.split(sizes)]
    own = [balance(router, part, tokens_per_rank=per_part) for part in x.split(sizes)]
    for index, expected in enumerate(whole):
        torch.testing.assert_close(torch.stack([part[index] for part in parts]).mean(0), expected)
        assert (torch.stack([part[index] for part in own]).mean(0) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("target", [None, 0.3])
def test_a7_padding_counts_nowhere(target):
    """A7: not in rows, f, P, experts of a token, shares or gap counts, whatever it holds."""
    layer = case(threshold=0.2, target_top2_share=target).layer("gelu", d_ff=16)
    x = tokens(30, scale=1.0)
    mask = torch.arange(60) % 2 == 0
    padded = torch.full((60, 16), 1e30)
    padded[mask] = x
    plain, other = run(layer, x, context()), run(layer, padded, context(token_mask_T=mask))
    assert torch.equal(other.experts_of_token_T[mask], plain.experts_of_token_T)
    assert (other.experts_of_token_T[~mask] == 0).all()
    assert ("gap_counts_N" in plain.stats) == (target is not None)
    for name, value in plain.stats.items():
        torch.testing.assert_close(other.stats[name], value, atol=1e-5, rtol=1e-6, msg=name)
    for name, value in plain.losses.items():
        torch.testing.assert_close(other.losses[name], value, msg=name)


# A8, A11, A12 and the rest


def model_of(**options):
    options = {"threshold": 0.15, **options}
    config = AdaptiveConfig(**{"base": TopKConfig(init_std=0.3), **options})
    return small_model(router=config.model_dump(mode="json"))


def test_a8_experts_of_each_token_for_the_complexity():
    """A8, the router's part: counts by layer, sequence and position, from which the shares in [0, 1] are made."""
    model = model_of()
    ids, mask = text(3, 12), torch.ones(3, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    seen = {}
    for layer, router in model.routers().items():
        plain = router.assign
        router.assign = lambda *given, plain=plain, layer=layer: seen.setdefault(layer, plain(*given))
    output = model(ids, attention_mask=mask)
    assert sorted(output.experts_of_token) == [0, 1]
    for layer, counts in output.experts_of_token.items():
        recount = (seen[layer].expert_ids_TK != EMPTY_SLOT).sum(1).view(3, 12)
        assert torch.equal(counts, recount)
        assert torch.equal(counts > 0, mask.bool())
        complexity = (counts >= 2).sum(1) / mask.sum(1)
        assert ((complexity >= 0) & (complexity <= 1)).all()
        assert 0 < int((counts >= 2).sum()) < int(mask.sum())
        assert int(output.routing_stats[layer]["two_expert_tokens"]) == int((counts >= 2).sum())


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("threshold", [-1.0, 0.15, 1.0])
def test_a12_flops_are_those_of_the_measured_rows(kind, threshold):
    """A12: F(1) + f2 (F(2) - F(1)) is what torch counts in a forward pass of the model."""
    config = small_config(
        num_layers=3,
        moe_layers=[0, 2],
        d_ff_expert=16,
        feed_forward=kind,
        router=AdaptiveConfig(threshold=threshold, base=TopKConfig(init_std=0.3)).model_dump(mode="json"),
    )
    model = SmoeForCausalLM(config).eval().double()  # in fp64 the experts run as products that torch's counter knows
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        output = model(text(3, 12))
    shares = [float(stats["two_expert_tokens"]) / 36 for stats in output.routing_stats.values()]
    share = sum(shares) / len(shares)
    assert share == {-1.0: 0.0, 1.0: 1.0}.get(threshold, share)
    assert threshold != 0.15 or 0.1 < share < 0.9
    one, two, counted = (forward_flops(config, value, 12) for value in (1.0, 2.0, 1.0 + share))
    assert counted == pytest.approx(one + share * (two - one), rel=1e-12)
    weighted_sums = 2 * 2 * 2 * 16  # of two slots in two layers, used or not: no expert's work
    assert counter.get_total_flops() == pytest.approx(36 * (counted + weighted_sums), rel=1e-12)


def test_a12_flops_by_hand():
    """d 16, experts 16 x 12, 4 experts, 2 layers, vocabulary 29, sequence 10: multiplications and additions."""
    attention = 2 * (4 * 16 * 16) + 2 * 2 * 10 * 16
    layer = attention + 2 * 4 * 16 + 1.25 * 2 * 2 * 16 * 12
    assert forward_flops(small_config(), 1.25, 10) == 2 * layer + 2 * 16 * 29
    dense = small_config(moe_layers=[1])
    assert forward_flops(dense, 1.25, 10) == layer + attention + 2 * 2 * 16 * 24 + 2 * 16 * 29


def test_the_same_seed_gives_the_same_masks():
    """Identical (seed, data) give identical masks in two models; another seed gives others."""
    counts = []
    for seed in (0, 0, 1):
        model = small_model(
            router=AdaptiveConfig(threshold=0.15, base=BASES["top_k"]).model_dump(mode="json"), seed=seed
        )
        counts.append(torch.stack(list(model(text()).experts_of_token.values())))
    assert torch.equal(counts[0], counts[1])
    assert not torch.equal(counts[0], counts[2])


def test_recomputed_activations_see_the_same_masks():
    """Recompute under checkpointing: each expert product of the backward pass has the forward pass's rows."""
    model = model_of(base=TopKConfig(init_std=0.3, jitter=0.2)).train()
    rows = []
    for block in model.model.layers:
        block.moe.bank.experts.register_forward_pre_hook(
            lambda _, given: rows.append(given[1].rows_per_expert_E.tolist())
        )
    model.recompute_activations()
    model(text(), labels=text(), knobs=Knobs(3, 2)).loss.backward()
    assert len(rows) == 4
    assert rows[:2] == rows[:1:-1]
    assert sum(rows[0]) < 2 * text().numel()


@pytest.mark.parametrize(("eval_router", "expected"), [("adaptive", None), ("top1", 1), ("top2", 2)])
def test_evaluation_honours_eval_router(eval_router, expected):
    """Outside training the option decides, never with more than k; in training it changes nothing."""
    router, x = case(threshold=0.15, eval_router=eval_router).routers()[0], tokens(100, scale=1.0)
    training = assign(router, x, context(3)).expert_ids_TK
    assert torch.equal(training, assign(case(threshold=0.15).routers()[0], x, context(3)).expert_ids_TK)
    result = assign(router, x, context(3, training=False))
    if expected is None:
        assert torch.equal(result.expert_ids_TK, training)
    else:
        plain = RouterCase("top_k", (("init_std", 0.3), ("softmax", "before_top_k"))).routers()[0]
        wanted = assign(plain, x, context(expected, training=False))
        assert torch.equal(result.expert_ids_TK, wanted.expert_ids_TK)
        assert torch.equal(result.weights_TK, wanted.weights_TK)
    assert assign(router, x, context(1, training=False)).expert_ids_TK.shape == (100, 1)
    stats = run(case(threshold=0.15, eval_router=eval_router).layer(), x, context(3, training=False)).stats
    assert ("threshold" in stats) == (expected is None)


def test_the_curriculum_overrides_the_threshold():
    x = tokens(100, scale=1.0)
    fixed = assign(case(threshold=0.3).routers()[0], x, context())
    scheduled = assign(case(threshold=0.05).routers()[0], x, context(threshold=0.3))
    assert torch.equal(scheduled.expert_ids_TK, fixed.expert_ids_TK)
    assert not torch.equal(assign(case(threshold=0.05).routers()[0], x, context()).expert_ids_TK, fixed.expert_ids_TK)
    stats = run(case(threshold=0.05).layer(), x, context(threshold=0.3)).stats
    assert float(stats["threshold"]) == pytest.approx(30.0)


def test_jitter_of_the_base_is_at_work():
    plain, noisy = (case(base=TopKConfig(init_std=0.3, jitter=jitter)).routers()[0] for jitter in (0.0, 0.3))
    x = tokens()
    assert not torch.equal(assign(noisy, x, context()).logits_TE, assign(plain, x, context()).logits_TE)
    still = assign(noisy, x, context(training=False)).logits_TE
    assert torch.equal(still, assign(plain, x, context(training=False)).logits_TE)


@pytest.mark.parametrize("base", ["top_k", "hyper_router"])
def test_the_base_starts_with_the_values_it_has_alone(base):
    """In a whole model too, where transformers passes over modules that hold no parameter themselves."""
    options = BASES[base].model_dump(mode="json")
    alone = small_model(router=options).state_dict()
    over = small_model(router={"type": "adaptive", "base": options}).state_dict()
    assert {name.replace("router.base.", "router."): value.sum() for name, value in over.items()} == {
        name: value.sum() for name, value in alone.items()
    }


def test_what_trains_the_router_is_said_truly():
    """Parameters of the base under their names here, from the task and both losses; frozen ones from nothing."""
    router = case(base=BASES["hyper_router"]).routers()[0]
    assert router.trained_by(context()) == dict.fromkeys(
        ["task", "load_balance_loss", "z_loss"], frozenset({"base.embedding"})
    )
    assert router.losses_reaching_experts(context()) == frozenset()


# target_top2_share


def step(router, x, sizes=None):
    """One optimizer step on given logits: statistics of the micro-batches added up, then `after_step`."""
    parts = x.split(sizes or [len(x)])
    stats = [
        router.merge(assign(router, part, context()), torch.zeros(len(part), 2, 4), context()).stats for part in parts
    ]
    router.after_step({name: sum(one[name] for one in stats) for name in stats[0]})


def share_of(router, x):
    return float((assign(router, x, context()).expert_ids_TK[:, 1] != EMPTY_SLOT).double().mean())


@pytest.mark.parametrize("gap", ["full", "top2_renormalised"])
@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("std", [0.02, 2.0])
def test_the_threshold_follows_the_target_share(gap, target, std):
    """After one step the share is the target on tokens alike, for flat and for sharp probabilities."""
    router = transparent(dtype=torch.float32, gap=gap, target_top2_share=target)
    batches = [std * tokens(8000, seed, 1.0, 4) for seed in range(4)]
    assert router.threshold(context()) == pytest.approx(0.1)  # nothing counted yet: the option
    step(router, batches[0])
    for batch in batches[1:]:
        assert share_of(router, batch) == pytest.approx(target, abs=0.02)
        step(router, batch)
    for _ in range(40):  # sharper from now on: what was counted before is forgotten
        step(router, 3 * batches[0])
    assert share_of(router, 3 * batches[1]) == pytest.approx(target, abs=0.02)


def test_the_gap_quantile_by_hand():
    """Three quarters of the tokens lie in one bin, a quarter in another: sin^2(45 degrees) = 1/2, sin^2(90) = 1."""
    gaps = torch.tensor([0.501, 0.501, 0.501, 1.0, 0.0])
    mask = torch.tensor([True] * 4 + [False])
    counts = count_gaps(gaps, mask)
    assert counts.sum() == 4
    assert counts[512] == 3
    assert counts[1023] == 1
    for share, position in ((0.75, 513), (0.375, 512.5), (0.999, 1023.996)):
        expected = math.sin(math.pi / 2 * position / 1024) ** 2
        assert float(gap_quantile(counts, share)) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gap_quantile(counts.long() << 20, 0.375), gap_quantile(counts, 0.375))


def test_gap_counts_add_up_and_change_after_a_step_alone():
    """Micro-batches and ranks: counts of parts are counts of the whole; no forward pass changes the buffer."""
    x = tokens(100, d_model=4, scale=1.0)
    whole, parts = (transparent(dtype=torch.float32, target_top2_share=0.3) for _ in range(2))
    step(whole, x)
    step(parts, x, [37, 63])
    assert torch.equal(whole.gap_counts_N, parts.gap_counts_N)
    before = whole.gap_counts_N.clone()
    for training in (True, False):
        whole.train(training)
        whole.merge(assign(whole, x, context(training=training)), torch.zeros(100, 2, 4), context(training=training))
    assert torch.equal(whole.gap_counts_N, before)
    step(whole, x)
    assert torch.equal(whole.gap_counts_N, before * 9 // 10 + before)
    assert torch.equal(copy.deepcopy(whole).bfloat16().gap_counts_N, whole.gap_counts_N)
    empty = transparent(dtype=torch.float32, target_top2_share=0.3)
    ctx = context(token_mask_T=torch.zeros(100, dtype=torch.bool))
    empty.after_step(empty.merge(assign(empty, x, ctx), torch.zeros(100, 2, 4), ctx).stats)
    assert float(empty.threshold(context())) == pytest.approx(0.1)


def test_only_a_target_share_costs_a_reduction_a_step():
    assert not case().routers()[0].adapts()
    assert case(target_top2_share=0.3).routers()[0].adapts()
    assert not AdaptiveConfig(target_top2_share=0.3).has_threshold()
    assert AdaptiveConfig().has_threshold()


def test_the_counts_are_saved_and_loaded(tmp_path):
    """With a model, and under a fresh one that initialises only what the file lacks."""
    model = model_of(target_top2_share=0.3)
    for router in model.routers().values():
        router.gap_counts_N.add_(torch.arange(1024))
    model.save_pretrained(tmp_path)
    loaded = SmoeForCausalLM.from_pretrained(tmp_path)
    for layer, router in loaded.routers().items():
        assert torch.equal(router.gap_counts_N, model.routers()[layer].gap_counts_N)
        assert torch.equal(router.base.weight, model.routers()[layer].base.weight)


# Options


def problems(*top_k_values, **options):
    return AdaptiveConfig(**options).problems(RouterPlan(frozenset(top_k_values), 8, 100))


@pytest.mark.parametrize(
    ("top_k_values", "options", "text"),
    [
        ((1,), {}, "no effect with k = 1"),
        ((1, 2), {"weights": "renormalised"}, "renormalised with k = 1"),
        ((2,), {"weights": "renormalised", "threshold": -0.1}, "renormalised with threshold: -0.1"),
        ((2,), {"base": TopKConfig(softmax="before_top_k")}, "base.softmax has no effect"),
        ((2,), {"base": XMoeConfig(softmax="after_top_k")}, "base.softmax has no effect"),
        ((1, 2), {"base": TopKConfig(softmax="before_top_k_renormalised")}, "base.softmax has no effect"),
    ],
)
def test_settings_without_effect_are_refused(top_k_values, options, text):
    (problem,) = problems(*top_k_values, **options)
    assert text in problem


@pytest.mark.parametrize(
    ("top_k_values", "options"),
    [
        ((2,), {}),
        ((1, 2), {}),
        ((2, 4), {"weights": "renormalised"}),
        ((2,), {"weights": "renormalised", "threshold": -0.1, "target_top2_share": 0.2}),
        ((2,), {"threshold": -1.0}),
        ((1, 2), {"base": XMoeConfig()}),
    ],
)
def test_sound_settings_pass(top_k_values, options):
    assert problems(*top_k_values, **options) == []


def test_other_bases_train():
    """Cosine scores as a base: the loss of its own form is taken over, and everything is finite."""
    layer = case(base=XMoeConfig(), threshold=0.05).layer()
    merged = run(layer, tokens(scale=1.0), context())
    (merged.out_TD.square().sum() + sum(merged.losses.values())).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert set(merged.losses) == {"load_balance_loss", "z_loss"}
    assert layer.router.trained_by(context())["load_balance_loss"] == frozenset({"base.projection", "base.embeddings"})


def recipe_problems(*overrides):
    try:
        load_recipe("smoke/adaptive", overrides)
    except RecipeError as error:
        return [f"{problem.key}: {problem.message}" for problem in error.problems]
    return []


def test_a_base_is_chosen_and_corrected_in_a_recipe(tmp_path):
    """Overrides in any order, a resolved recipe that loads to the same, errors that name the key within the base."""
    overrides = ["model.moe.router.base.hyper_hidden=32", "model.moe.router.base.type=hyper_router"]
    for given in (overrides, overrides[::-1], [*overrides, "model.moe.router.type=adaptive"]):
        recipe = load_recipe("smoke/top_k" if len(given) == 3 else "smoke/adaptive", given)
        assert recipe.model.moe.router == AdaptiveConfig(base=HyperRouterConfig(hyper_hidden=32))
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.to_yaml())
    assert load_recipe(str(resolved)) == recipe
    assert recipe.identity()["model.moe.router.base.hyper_hidden"] == 32
    (unknown,) = recipe_problems("model.moe.router.base.jiter=0.1")
    assert unknown.startswith("model.moe.router.base.jiter: unknown key; did you mean 'jitter'?")
    (wrong,) = recipe_problems("model.moe.router.base.type=adaptive")
    assert wrong.startswith("model.moe.router.base: unknown type 'adaptive'")
    (useless,) = recipe_problems("model.moe.router.base.softmax=before_top_k")
    assert useless.startswith("model.moe.router: base.softmax has no effect")


def test_a_schedule_of_the_threshold_needs_one():
    schedule = ("curriculum.threshold.first=0.3", "curriculum.threshold.last=0.1")
    assert recipe_problems(*schedule) == []
    (problem,) = recipe_problems(*schedule, "model.moe.router.target_top2_share=0.2")
    assert problem.startswith("curriculum.threshold: has no effect")


def test_the_schema_names_the_bases():
    schema = json_schema()["$defs"]["AdaptiveConfig"]["properties"]["base"]
    assert {"top_k", "hyper_router"} <= set(schema["discriminator"]["mapping"])
    assert "adaptive" not in schema["discriminator"]["mapping"]


def test_over_competing_experts_a_contest_has_k_winners_and_a_routed_pass_is_adaptive():
    """Contests are the base's, bit for bit; in routed passes the gap of the router's probabilities decides."""
    case = RouterCase("adaptive", (("base", {"type": "compete_smoe", "init_std": 0.3}), ("threshold", 0.3)))
    base = RouterCase("compete_smoe", (("init_std", 0.3),))
    assert case.options.competes()
    layer, alone = case.layer(), base.layer()
    x = tokens(scale=1.0)
    contested, expected = (run(one, x, context(competing=True)) for one in (layer, alone))
    assert torch.equal(contested.out_TD, expected.out_TD)
    assert contested.experts_of_token_T.tolist() == [2] * len(x)
    assert contested.losses.keys() == expected.losses.keys()
    for name, value in expected.losses.items():
        assert torch.equal(contested.losses[name], value), name
    routed = run(layer, x, context())
    assert sorted(set(routed.experts_of_token_T.tolist())) == [1, 2]
    assert routed.losses.keys() == expected.losses.keys()
    assert float(routed.losses["router_distillation_loss"]) == 0.0
    assert float(routed.losses["load_balance_loss"].detach()) > 0.0


def test_the_losses_of_a_base_with_scores_of_its_own_are_exact():
    """X-MoE's balance loss has its own temperature; adaptive gating leads no gradient into the learned one."""
    layer = RouterCase("adaptive", (("base", {"type": "x_moe"}), ("balance_tokens", "all"))).layer()
    loss = run(layer, tokens(scale=1.0), context()).losses["load_balance_loss"]
    parameters = dict(layer.router.base.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    found = dict(zip(parameters, gradients, strict=True))
    assert found["log_temperature"] is None
    assert found["projection"].abs().max() > 0
