"""What every routing policy promises, whoever wrote it; the numbers are those of "Testable invariants" in the notes.

A new policy is tested by being registered. Options that `support.router_cases.VARIANTS` names are varied.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.router_cases import (
    CASES,
    NUM_EXPERTS,
    TOP_K,
    assign,
    context,
    every_router,
    every_router_with,
    holds,
    initialised,
    run,
    simplex,
    token_ids,
    tokens,
)

from smoe_train.model.config import ModelConfig, MoeConfig
from smoe_train.routing import EMPTY_SLOT, ROUTERS, RouterPlan

every_k = pytest.mark.parametrize("top_k", [1, 2, 5, NUM_EXPERTS])
SIMPLEX_CASES = [case for case in CASES if simplex(case.routers()[0])]
PLAIN_SOFTMAX_CASES = [case for case in CASES if getattr(case.options, "softmax", "") == "before_top_k"]


def plan(*top_k_values):
    return RouterPlan(frozenset(top_k_values), NUM_EXPERTS, 10**6)


def quiet(case):
    """The case without jitter, for comparisons in which tokens move to other places of the batch."""
    return case.with_options(jitter=0.0)


def test_every_registered_policy_has_a_case():
    assert {case.name for case in CASES} == set(ROUTERS.names())
    assert {"top_k", "hyper_router"} <= set(ROUTERS.names())


@every_router
@every_k
def test_shapes_dtypes_and_ids(case, top_k):
    """Invariant 5, first half: int64 ids in range, distinct within a token, best first; fp32 weights >= 0."""
    router = case.routers()[0]
    result = assign(router, tokens(), context(top_k))
    assert result.expert_ids_TK.dtype == torch.int64
    assert result.weights_TK.dtype == result.logits_TE.dtype == torch.float32
    assert result.logits_TE.shape == (23, NUM_EXPERTS)
    assert result.expert_ids_TK.shape == result.weights_TK.shape
    assert not holds(case, "k slots") or result.expert_ids_TK.shape == (23, top_k)
    for ids, weights, scores in zip(result.expert_ids_TK, result.weights_TK, result.logits_TE, strict=True):
        used = ids[ids != EMPTY_SLOT].tolist()
        assert used or not holds(case, "visited")
        assert all(0 <= i < NUM_EXPERTS for i in used)
        assert len(set(used)) == len(used)
        assert scores[used].tolist() == sorted(scores[used].tolist(), reverse=True)
        assert (weights >= 0).all()
        assert (weights[ids == EMPTY_SLOT] == 0).all()


@pytest.mark.parametrize("case", SIMPLEX_CASES, ids=str)
@every_k
def test_weights_sum_to_one(case, top_k):
    """Invariant 5: the weights of a token sum to 1."""
    weights_TK = assign(case.routers()[0], tokens(), context(top_k)).weights_TK
    torch.testing.assert_close(weights_TK.sum(1), torch.ones(23), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [n for n, e in ROUTERS.items() if "softmax" in e.config.model_fields])
@every_k
def test_softmax_over_the_selected_is_the_renormalised_full_softmax(name, top_k):
    """Invariant 5, second half; and the plain rule gives the full softmax's probabilities."""
    case = next(case for case in CASES if case.name == name)
    after, renormalised, plain = (
        assign(case.with_options(softmax=rule).routers()[0], tokens(), context(top_k))
        for rule in ("after_top_k", "before_top_k_renormalised", "before_top_k")
    )
    assert torch.equal(after.expert_ids_TK, renormalised.expert_ids_TK)
    torch.testing.assert_close(after.weights_TK, renormalised.weights_TK, atol=1e-6, rtol=0)
    expected = torch.softmax(plain.logits_TE.double(), 1).gather(1, plain.expert_ids_TK)
    torch.testing.assert_close(plain.weights_TK.double(), expected, atol=1e-6, rtol=0)


@every_router_with("ties")
@every_k
def test_ties_go_to_the_lower_expert(case, top_k):
    """A token of zeros scores every expert alike, whatever the router's weights (biases start at 0)."""
    case = case.with_options(generated_bias=False, bias_std=0.0)
    ids = assign(case.routers()[0], torch.zeros(3, 16), context(top_k)).expert_ids_TK
    assert ids.tolist() == [list(range(top_k))] * 3


@every_router
def test_the_same_input_gives_the_same_result(case):
    """Determinism: bitwise, in one object and in two that were initialised alike; another seed is another router."""
    x, ctx = tokens(), context()
    router = case.routers()[0]
    first, again, twin = (assign(r, x, ctx) for r in (router, router, case.routers()[0]))
    for other in (again, twin):
        assert torch.equal(first.expert_ids_TK, other.expert_ids_TK)
        assert torch.equal(first.weights_TK, other.weights_TK)
        assert torch.equal(first.logits_TE, other.logits_TE)
    stranger = assign(case.routers(seed=1)[0], x, ctx)
    assert not torch.equal(first.logits_TE, stranger.logits_TE)


@every_router
def test_forward_draws_no_random_numbers(case):
    """Global generators decide nothing: neither state nor result depends on them."""
    layer, x = case.layer(), tokens()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = run(layer, x, context()).out_TD
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(run(layer, x, context()).out_TD, first)


@every_router_with("nested")
def test_selection_is_nested_in_k(case):
    """Invariant 8: TopK(k) is the beginning of TopK(k+1), and trying other k leaves no trace."""
    case = quiet(case)
    layer, x = case.layer(), tokens()
    state = copy.deepcopy(layer.state_dict())
    before = run(layer, x, context(2)).out_TD
    ids = {k: assign(layer.router, x, context(k)).expert_ids_TK for k in range(1, NUM_EXPERTS + 1)}
    for k in range(1, NUM_EXPERTS):
        assert torch.equal(ids[k + 1][:, :k], ids[k])
    run(layer, x, context(NUM_EXPERTS))
    assert torch.equal(run(layer, x, context(2)).out_TD, before)
    assert all(torch.equal(state[name], value) for name, value in layer.state_dict().items())


@every_router_with("dense mixture")
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_all_experts_is_the_dense_mixture(case, kind):
    """Invariant 7: k = N is sum_j softmax(s)_j E_j(x), and every expert receives gradient."""
    layer, x = quiet(case).layer(kind), tokens(scale=1.0)
    out = run(layer, x, context(NUM_EXPERTS)).out_TD
    p_TE = torch.softmax(assign(layer.router, x, context(NUM_EXPERTS)).logits_TE, 1)
    experts = layer.bank.experts
    hidden = torch.einsum("td,edf->tef", x, experts.w_in)
    if kind == "swiglu":
        hidden = F.silu(torch.einsum("td,edf->tef", x, experts.w_gate)) * hidden
        y_TED = torch.einsum("tef,efd->ted", hidden, experts.w_out)
    else:
        y_TED = torch.einsum("tef,efd->ted", F.gelu(hidden + experts.b_in), experts.w_out) + experts.b_out
    torch.testing.assert_close(out, (p_TE.unsqueeze(2) * y_TED).sum(1), atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    for parameter in experts.parameters():
        assert (parameter.grad.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("case", SIMPLEX_CASES, ids=str)
@pytest.mark.parametrize("kind", ["relu", "gelu", "swiglu"])
def test_identical_experts_make_routing_irrelevant(case, kind):
    """Invariant 9: with equal experts the output depends neither on the router nor on k."""
    x = tokens(scale=1.0)
    outs = []
    for seed, top_k in ((0, 1), (0, 3), (1, 2), (2, NUM_EXPERTS)):
        layer = case.layer(kind, seed)
        weights = case.layer(kind, 0).bank.experts.state_dict()
        layer.bank.experts.load_state_dict({k: v[:1].expand_as(v) for k, v in weights.items()})
        outs.append(run(layer, x, context(top_k)).out_TD)
    for other in outs[1:]:
        torch.testing.assert_close(other, outs[0], atol=1e-5, rtol=1e-5)


# Parameters and buffers that have a row for each expert, by their name in a router or in the base of one.
EXPERT_ROWS = ("weight", "bias", "embeddings", "centroids", "distilled.centroids", "bias_bits_E")


def rows_of_experts(router):
    """The tensors [E, ...] whose rows belong to experts, as views; empty for a policy that this test does not know."""
    core = router
    while hasattr(core, "base"):
        core = core.base
    named = {**dict(core.named_parameters()), **dict(core.named_buffers())}
    rows = [named[name] for name in EXPERT_ROWS if name in named]
    generating = [named[name] for name in ("hypernet.output_weight", "hypernet.output_bias") if name in named]
    return rows + [tensor.view(NUM_EXPERTS, -1, *tensor.shape[1:]) for tensor in generating]


def test_experts_can_be_permuted_in_every_policy():
    """The test below covers all shipped policies, those over a base included."""
    assert {case.name for case in CASES if rows_of_experts(case.routers()[0])} == set(ROUTERS.names())


@every_router
@pytest.mark.parametrize("step", [3, 10**7])
def test_permuting_experts_and_router_rows_together_changes_nothing(case, step):
    """Invariant 9, second half: who has which number does not matter, early (StableMoE's stage 1) and late.

    The permuted router is any whose scores are the permuted scores; experts move with them.
    """
    layer, x, ctx = quiet(case).layer(), tokens(scale=1.0), context(step=step)
    rows = rows_of_experts(layer.router)
    with torch.no_grad():
        for row in rows:  # a balancing bias starts at 0, which any permutation leaves as it is
            if row.dtype == torch.int32:
                row.view(torch.float32).copy_(torch.linspace(-0.3, 0.3, NUM_EXPERTS))
    assignment = assign(layer.router, x, ctx)
    y_TKD = layer.bank(x, assignment.expert_ids_TK)
    order = torch.tensor([3, 7, 0, 1, 6, 2, 5, 4])
    place = torch.argsort(order)
    permuted = copy.deepcopy(layer.bank)
    permuted.experts.load_state_dict({k: v[order] for k, v in layer.bank.experts.state_dict().items()})
    ids = torch.where(assignment.expert_ids_TK == EMPTY_SLOT, EMPTY_SLOT, place[assignment.expert_ids_TK])
    torch.testing.assert_close(permuted(x, ids), y_TKD, atol=1e-6, rtol=1e-6)
    if not rows:
        return
    before = run(layer, x, ctx)
    with torch.no_grad():
        for row in rows:
            row.copy_(row[order])
    layer.bank = permuted
    after = run(layer, x, ctx)
    torch.testing.assert_close(after.out_TD, before.out_TD, atol=1e-5, rtol=1e-5)
    for name, value in before.losses.items():
        torch.testing.assert_close(after.losses[name], value, atol=1e-5, rtol=1e-5, msg=name)
    assert torch.equal(after.stats["slots_E"], before.stats["slots_E"][order])
    permuted_ids = assign(layer.router, x, ctx).expert_ids_TK
    assert not torch.equal(permuted_ids, assignment.expert_ids_TK)


@every_router
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("d_ff", [10, 16])
def test_padding_invariance(case, kind, d_ff):
    """Invariant 18: appended pad tokens change no output, count, loss, stat or gradient, and are routed nowhere.

    d_ff 10 takes the looped product, 16 the grouped one; the pads hold huge values, which would show anywhere.
    """
    layer, x = case.layer(kind, d_ff=d_ff), tokens(scale=1.0)
    padded = torch.cat([x, torch.full((9, 16), 1e30)])
    mask = torch.arange(32) < 23
    results, gradients = [], []
    for values, ctx in (
        (x, context(token_index_T=torch.arange(23))),
        (padded, context(token_index_T=torch.arange(32), token_mask_T=mask)),
    ):
        layer.zero_grad()
        values = values.clone().requires_grad_()
        merged = run(layer, values, ctx)
        (merged.out_TD[:23].square().sum() + sum(merged.losses.values())).backward()
        gradients.append([values.grad[:23], *(p.grad for p in layer.parameters() if p.requires_grad)])
        results.append(merged)
    plain, with_pads = results
    torch.testing.assert_close(with_pads.out_TD[:23], plain.out_TD)
    assert (with_pads.out_TD[23:] == 0).all()
    assert plain.losses.keys() == with_pads.losses.keys()
    for name, value in plain.losses.items():
        torch.testing.assert_close(with_pads.losses[name], value, msg=name)
    for name, value in plain.stats.items():
        torch.testing.assert_close(with_pads.stats[name], value, msg=name)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)
    ctx = context(token_mask_T=mask)
    ids = assign(layer.router, padded, ctx).expert_ids_TK
    assert (ids[23:] == EMPTY_SLOT).all()
    assert not holds(case, "visited") or (ids[:23] != EMPTY_SLOT).any(1).all()


@every_router
def test_a_batch_of_padding_alone_is_harmless(case):
    """Ranks in evaluation may hold nothing else: zeros, finite losses, no counts, finite gradients."""
    layer, x = case.layer(), tokens(5)
    merged = run(layer, x, context(token_mask_T=torch.zeros(5, dtype=torch.bool)))
    assert (merged.out_TD == 0).all()
    assert all(value == 0 for value in merged.losses.values())
    assert all((value == 0).all() for value in merged.stats.values())
    (merged.out_TD.sum() + sum(merged.losses.values())).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@every_router
def test_one_token_and_no_token(case):
    """Decoding has one token, a rank may have none."""
    layer = case.layer()
    one = run(layer, tokens(1), context()).out_TD
    torch.testing.assert_close(run(quiet(case).layer(), tokens(4), context()).out_TD.shape, torch.Size([4, 16]))
    assert one.shape == (1, 16)
    merged = run(layer, tokens(0), context())
    assert merged.out_TD.shape == (0, 16)
    assert all(value.isfinite().all() for value in merged.losses.values())


@every_router_with("trains")
def test_every_trainable_parameter_gets_gradient_from_the_task(case):
    """At k >= 2 the task reaches the whole trainable router; what is frozen gets no gradient at all."""
    routers = case.routers()
    layer = case.layer()
    for router in routers:
        layer.router = router
        layer.zero_grad()
        run(layer, tokens(scale=1.0), context()).out_TD.square().sum().backward()
        trainable = {name: p for name, p in router.named_parameters() if p.requires_grad}
        assert trainable
        for name, parameter in trainable.items():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        assert all(p.grad is None for p in router.parameters() if not p.requires_grad)


def one_expert_gradients(case):
    # Gradients of cosines grow as vectors shrink; rounding would look like a gradient.
    layer = case.with_options(init_std=0.3, embedding_gain=1.0).layer(seed=3)
    result = run(layer, tokens(scale=1.0), context(1))
    weights = assign(layer.router, tokens(scale=1.0), context(1)).weights_TK
    result.out_TD.square().sum().backward()
    trained = [p.grad for p in layer.router.parameters() if p.requires_grad and p.grad is not None]
    return weights, trained


@pytest.mark.parametrize("case", SIMPLEX_CASES, ids=str)
def test_one_expert_with_normalised_weights_trains_no_router(case):
    """Invariant 6: g = 1 and no gradient; `problems` says so before training starts."""
    weights, gradients = one_expert_gradients(case)
    torch.testing.assert_close(weights, torch.ones(23, 1), atol=1e-7, rtol=0)
    # The renormalised rule reaches zero only up to rounding; p / p is 1, its derivative a difference of equals.
    assert all(float(gradient.abs().max()) < 1e-3 for gradient in gradients)
    if case.options.softmax == "after_top_k":
        assert all((gradient == 0).all() for gradient in gradients)
    assert bool(case.options.problems(plan(1))) == holds(case, "trained")
    assert bool(case.options.problems(plan(1, 4))) == holds(case, "trained")
    assert not case.options.problems(plan(2, 8))


@pytest.mark.parametrize("case", [case for case in PLAIN_SOFTMAX_CASES if holds(case, "trained")], ids=str)
def test_one_expert_with_the_full_softmax_trains_the_router(case):
    """Invariant 6: Switch's p1 carries gradient at k = 1, so nothing is wrong with it."""
    weights, gradients = one_expert_gradients(case)
    assert (weights < 1).all()
    assert gradients
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients)
    assert not case.options.problems(plan(1))


@pytest.mark.parametrize("case", [case for case in SIMPLEX_CASES if holds(case, "trained")], ids=str)
def test_the_model_section_refuses_one_expert_with_normalised_weights(case):
    model = ModelConfig(moe=MoeConfig(top_k=1, router=case.options))
    keys = [key for key, _ in model.problems(frozenset({1}), 10)]
    assert "moe.router" in keys
    assert "moe.router" not in [key for key, _ in model.problems(frozenset({2}), 10)]


@every_router_with("token local")
def test_a_step_is_deterministic_for_the_micro_batch_that_holds_a_token(case):
    """Routing knows no neighbours: a token's experts do not depend on the other tokens of its micro-batch."""
    router = case.routers()[0]
    x = tokens()
    whole = assign(router, x, context(token_index_T=torch.arange(23)))
    for part in (slice(0, 11), slice(11, 23)):
        half = router.assign(x[part], token_ids(23)[part], context(token_index_T=torch.arange(23)[part]))
        assert torch.equal(half.expert_ids_TK, whole.expert_ids_TK[part])
        torch.testing.assert_close(half.weights_TK, whole.weights_TK[part], atol=1e-6, rtol=1e-5)


def test_a_policy_that_cannot_be_built_small_fails_by_name():
    """The promise of the suite: a new policy whose defaults do not fit is told so."""
    options = CASES[0].options
    with pytest.raises(pytest.fail.Exception, match=f"{options.type}.*Make its defaults fit small models"):
        initialised(options, 0, -1, NUM_EXPERTS)


def test_the_cases_use_more_than_one_expert_set():
    """The suite's tokens and routers are not degenerate: experts differ between tokens, all k are exercised."""
    for case in CASES:
        ids = assign(case.routers()[0], tokens(200), context(TOP_K)).expert_ids_TK
        assert len(ids.unique()) >= NUM_EXPERTS - 1, str(case)
