"""StableMoE: two stages, what each loss trains, and that the frozen router is frozen to the bit."""

import copy
from itertools import pairwise

import pytest
import torch
from support.naive_stable_moe import naive_stable_moe
from support.router_cases import NUM_EXPERTS, RouterCase, context, tokens
from support.small_model import small_model, text

from smoe_train.model import SmoeForCausalLM
from smoe_train.routing import Assignment, RouterPlan, StepTotals
from smoe_train.routing.stable_moe import StableAssignment, StableMoeConfig
from smoe_train.schedules import Knobs
from smoe_train.training.config import OptimizerConfig
from smoe_train.training.engine import LocalEngine
from smoe_train.training.optimizer import make_optimizer, parameter_groups

SWITCH = 5
LENGTH = 6
KINDS = ["word", "bigram", "convolution"]
COEFFICIENTS = {"stable_balance_loss": 0.7, "distillation_loss": 0.3}
IDS = torch.tensor([3, 1, 4, 1, 5, 2, 6, 5, 3, 5, 0, 2])
FROZEN = ".router.distilled."

every_kind = pytest.mark.parametrize("distilled", KINDS)


def case(distilled="word", **options):
    return RouterCase(
        "stable_moe", (("distilled", distilled), ("stage_1_steps", SWITCH), ("distilled_dim", 5), *options.items())
    )


def at(stage, top_k=2, **changes):
    """A pass of the last step of stage 1 or the first of stage 2, over sequences of `LENGTH`."""
    return context(top_k, step=SWITCH - 1 if stage == 1 else SWITCH, sequence_length=LENGTH, **changes)


@every_kind
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("top_k", "padded"), [(1, False), (2, True), (3, False)])
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_fp64_against_loops(distilled, stage, top_k, padded, kind):
    """Outputs, losses and all gradients agree to fp64 rounding, with padding on the left, on the right and between."""
    layer = case(distilled).layer(kind).double()
    mask = [True] * 12 if not padded else [False, False, True, True, True, True, True, True, False, True, True, False]
    x = tokens(12, scale=2.0).double()
    leaves = {name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()}
    x_naive, x_fast = (x.clone().requires_grad_() for _ in range(2))
    router = {name.removeprefix("router."): v for name, v in leaves.items() if name.startswith("router.")}
    experts = {name.removeprefix("bank.experts."): v for name, v in leaves.items() if name.startswith("bank.")}
    expected = naive_stable_moe(x_naive, IDS.tolist(), router, experts, kind, distilled, stage, top_k, LENGTH, mask)
    merged = layer(x_fast, IDS, at(stage, top_k, token_mask_T=torch.tensor(mask) if padded else None))
    torch.testing.assert_close(merged.out_TD, expected.out_TD, atol=1e-9, rtol=1e-9)
    weights = torch.linspace(-1, 1, 12 * 16).view(12, 16).double()
    totals = [(out * weights).sum() for out in (expected.out_TD, merged.out_TD)]
    for name, coefficient in COEFFICIENTS.items():
        torch.testing.assert_close(merged.losses[name], getattr(expected, name), atol=1e-9, rtol=1e-9)
        totals[0] = totals[0] + coefficient * getattr(expected, name)
        totals[1] = totals[1] + coefficient * merged.losses[name]
    naive = torch.autograd.grad(totals[0], [x_naive, *leaves.values()], allow_unused=True)
    fast = torch.autograd.grad(totals[1], [x_fast, *layer.parameters()], allow_unused=True)
    for name, one, other in zip(["x", *leaves], naive, fast, strict=True):
        one = torch.zeros_like(other) if one is None else one
        torch.testing.assert_close(other, one, atol=1e-9, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    used = layer.router.assign(x, IDS, at(stage, top_k, token_mask_T=torch.tensor(mask))).expert_ids_TK
    assert [[i for i in row if i >= 0] for row in used.tolist()] == expected.ids


def test_the_balance_loss_by_hand():
    """Two experts of E = 2, three slots with weights .5, .6, .7 on the first, one with .9 on the second.

    |A| = 3, 1, n = 2: (1/2 * 1.8 - 1/2 * .9) / 4 slots = .1125; equal loads give exactly 0.
    """
    router = RouterCase("stable_moe").routers(num_experts=2)[0]
    weights = torch.tensor([[0.5], [0.6], [0.7], [0.9]])
    ids = torch.tensor([[0], [0], [0], [1]])

    def balance(ids, weights):
        logits = torch.zeros(4, 2)
        return router.losses(StableAssignment(ids, weights, logits, logits), context(1))["stable_balance_loss"]

    assert float(balance(ids, weights)) == pytest.approx(0.1125, rel=1e-6)
    assert float(balance(torch.tensor([[0], [1], [0], [1]]), weights)) == 0.0
    collapsed = balance(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1))
    assert float(collapsed) == pytest.approx(1.0)  # E - 1 at collapse with weights of 1


def test_the_distillation_loss_by_hand():
    """Scores ln 3 and 0: probabilities 3/4 and 1/4; a token of each expert: (ln 4/3 + ln 4) / 2."""
    router = RouterCase("stable_moe").routers(num_experts=2)[0]
    logits = torch.log(torch.tensor([[3.0, 1.0], [3.0, 1.0]]))
    losses = router.losses(StableAssignment(torch.tensor([[0], [1]]), torch.ones(2, 1), logits, logits), context(1))
    expected = (torch.log(torch.tensor(4 / 3)) + torch.log(torch.tensor(4.0))) / 2
    torch.testing.assert_close(losses["distillation_loss"], expected)


def test_the_balance_loss_is_that_of_the_whole_step():
    """Two micro-batches with the step's totals: value and gradient are those of one batch."""
    router, x = case().routers()[0], tokens(24) + 4.0
    ids = torch.arange(24) % 7

    def loss_and_gradient(part, totals):
        ctx = at(1, step_totals=totals)
        result = router.assign(x[part], ids[part], ctx)
        loss = router.losses(result, ctx)["stable_balance_loss"]
        return loss.detach(), torch.autograd.grad(loss, router.centroids)[0]

    whole, gradient = loss_and_gradient(slice(0, 24), None)
    totals, halves = StepTotals(2), (slice(0, 12), slice(12, 24))
    for part in halves:
        loss_and_gradient(part, totals)
    totals.finish()
    parts = [loss_and_gradient(part, totals) for part in halves]
    torch.testing.assert_close(sum(loss for loss, _ in parts) / 2, whole)
    torch.testing.assert_close(sum(one for _, one in parts) / 2, gradient, atol=1e-6, rtol=1e-5)
    assert gradient.abs().max() > 1e-4


def test_descending_the_balance_loss_balances():
    """The sign is right: gradient steps on the loss alone even out the loads."""
    router, x = case().routers()[0], tokens(400) + 4.0
    ids, spreads = torch.arange(400) % 7, []
    for _ in range(60):
        merged_ids = router.assign(x, ids, context(step=0))
        spreads.append(float(torch.bincount(merged_ids.expert_ids_TK.flatten(), minlength=NUM_EXPERTS).float().std()))
        loss = router.losses(merged_ids, context(step=0))["stable_balance_loss"]
        gradient = torch.autograd.grad(loss, router.centroids)[0]
        with torch.no_grad():
            router.centroids.sub_(0.02 * gradient / gradient.norm())
    assert min(spreads[-5:]) < 0.5 * spreads[0]


@every_kind
def test_invariant_13_distillation_trains_the_distilled_router_alone(distilled):
    """No gradient to the tokens, the centroids or the experts; the other losses none to the distilled router."""
    layer = case(distilled).layer()
    x = tokens(12).requires_grad_()
    merged = layer(x, IDS, at(1))
    parameters = {"x": x, **dict(layer.named_parameters())}
    for loss, trains in (
        (merged.losses["distillation_loss"], True),
        (merged.losses["stable_balance_loss"] + merged.out_TD.square().sum(), False),
    ):
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            reached = gradient is not None and bool(gradient.abs().max() > 0)
            assert reached == (("distilled" in name) == trains), name


@every_kind
def test_invariant_13_stage_2_depends_on_token_ids_alone(distilled):
    """The same ids with other hidden states: the same experts, other weights; in stage 1 the hidden states decide."""
    router = case(distilled).routers()[0]
    x, other = tokens(12), tokens(12, seed=1)
    one, two = (router.assign(values, IDS, at(2)) for values in (x, other))
    assert torch.equal(one.expert_ids_TK, two.expert_ids_TK)
    assert not torch.equal(one.weights_TK, two.weights_TK)
    assert not torch.equal(router.assign(x, IDS, at(1)).expert_ids_TK, router.assign(other, IDS, at(1)).expert_ids_TK)
    assert not torch.equal(router.assign(x, IDS.flip(0), at(2)).expert_ids_TK, one.expert_ids_TK)


def test_word_routing_is_a_table():
    """The same token visits the same experts wherever it stands."""
    ids_TK = case().routers()[0].assign(tokens(12), IDS, at(2)).expert_ids_TK
    for token in IDS.unique():
        assert len(ids_TK[token == IDS].unique(dim=0)) == 1


@pytest.mark.parametrize(("distilled", "reach"), [("word", 0), ("bigram", 1), ("convolution", 4)])
def test_who_looks_how_far_back(distilled, reach):
    """A change of token 5 of a long sequence reaches tokens 5 to 5 + reach of that sequence, and no other."""
    router = case(distilled).routers()[0]
    assert router.looks_back_tokens == reach
    ids = torch.arange(24) % 7
    changed = ids.clone()
    changed[5] = (changed[5] + 3) % 7
    ctx = context(step=SWITCH, sequence_length=12)
    before, after = (router.assign(tokens(24), one, ctx).logits_TE for one in (ids, changed))
    assert (before != after).any(1).nonzero().flatten().tolist() == list(range(5, 6 + reach))


@pytest.mark.parametrize("distilled", ["bigram", "convolution"])
def test_sequences_start_afresh_and_padding_does_not_leak(distilled):
    """The first tokens of a sequence see neither the sequence before nor what padding on the left holds."""
    router = case(distilled).routers()[0]
    alone = router.assign(tokens(6), IDS[6:], at(2)).logits_TE
    torch.testing.assert_close(router.assign(tokens(12), IDS, at(2)).logits_TE[6:], alone)
    mask = torch.tensor([False] * 3 + [True] * 6 + [False])
    padded = torch.cat([torch.tensor([1, 5, 2]), IDS[6:], torch.tensor([4])])
    ctx = context(step=SWITCH, sequence_length=10, token_mask_T=mask)
    torch.testing.assert_close(router.assign(tokens(10), padded, ctx).logits_TE[3:9], alone)


def test_the_losses_of_stage_2_are_exactly_zero():
    """Invariant 13; the keys stay, and frozen parameters take part with a gradient of exactly 0."""
    layer = case("convolution").layer()
    merged = layer(tokens(12), IDS, at(2))
    assert {name: float(value.detach()) for name, value in merged.losses.items()} == dict.fromkeys(COEFFICIENTS, 0.0)
    (merged.out_TD.sum() + sum(merged.losses.values())).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad == 0).all()) == ("distilled" in name), name


def local_engine(model, weight_decay):
    groups = parameter_groups(model, OptimizerConfig(weight_decay=weight_decay))
    return LocalEngine(model, groups, lambda g: make_optimizer(g, OptimizerConfig()), 1, None)


def test_invariant_13_stage_2_freezes_to_the_bit():
    """Adam's moments are full of stage 1 and the decay is large; not a bit of the frozen router changes."""
    model = small_model(router=case("convolution").options.model_dump(mode="json")).train()
    engine = local_engine(model, weight_decay=0.5)
    states = []
    for step in range(SWITCH + 4):
        engine.backward(model(text(), labels=text(), knobs=Knobs(step, 2)).loss)
        engine.step(0.01, frozen=any(router.frozen(step) for router in model.routers().values()))
        states.append({name: p.detach().clone() for name, p in model.named_parameters() if ".router." in name})
    for step, (before, after) in enumerate(pairwise(states), start=1):
        for name, value in after.items():
            frozen = FROZEN in name and step >= SWITCH
            assert torch.equal(before[name], value) == frozen, (step, name)
    moments = engine.read_state(model.get_parameter("model.layers.0.moe.router.distilled.centroids"))["exp_avg"]
    assert moments.abs().max() > 0


def test_stages_follow_the_step_alone():
    """Training mode decides nothing; evaluation in stage 1 uses the learned routing, a call without knobs stage 2."""
    router = case().routers()[0]
    for stage in (1, 2):
        one, other = (router.assign(tokens(12), IDS, at(stage, training=training)) for training in (True, False))
        assert torch.equal(one.expert_ids_TK, other.expert_ids_TK)
        assert isinstance(one, StableAssignment) == (stage == 1)
        assert isinstance(one, Assignment)
    model = small_model(router=case().options.model_dump(mode="json")).eval()
    with torch.no_grad():
        plain = model(text()).logits
        assert torch.equal(plain, model(text(), knobs=Knobs(SWITCH, 2)).logits)
        assert not torch.equal(plain, model(text(), knobs=Knobs(SWITCH - 1, 2)).logits)


@pytest.mark.parametrize("top_k", [1, 2])
def test_one_expert_trains_the_centroids_in_both_stages(top_k):
    """The sigmoid carries gradient at k = 1, unlike a softmax over one expert."""
    for stage in (1, 2):
        layer = case().layer()
        layer(tokens(12, scale=1.0), IDS, at(stage, top_k)).out_TD.square().sum().backward()
        assert layer.router.centroids.grad.abs().max() > 1e-3
    assert not case().options.problems(RouterPlan(frozenset({top_k}), NUM_EXPERTS, SWITCH + 1))


def test_a_training_that_never_reaches_stage_2_is_refused():
    """Also by the default of 6000 steps in a shorter run."""
    options = StableMoeConfig()
    assert options.stage_1_steps == 6000
    assert not options.problems(RouterPlan(frozenset({2}), 8, 6001))
    (message,) = options.problems(RouterPlan(frozenset({2}), 8, 6000))
    assert "never reaches stage 2" in message


@pytest.mark.parametrize("shape", [(8, 16), (8, 5)])
def test_centroids_start_orthogonal(shape):
    """Rows of length 0.1 at right angles; with more experts than dimensions the columns are."""
    router = case(distilled_dim=shape[1]).routers()[0]
    matrix = (router.centroids if shape[1] == 16 else router.distilled.centroids).detach().double()
    assert tuple(matrix.shape) == shape
    gram = matrix @ matrix.T if shape[0] <= shape[1] else matrix.T @ matrix
    torch.testing.assert_close(gram, 0.01 * torch.eye(min(shape)).double(), atol=1e-8, rtol=1e-6)


@every_kind
def test_generation_sees_the_whole_text(distilled):
    """Generated token by token, each choice is that of a forward pass over the whole text."""
    model = small_model(router=case(distilled).options.model_dump(mode="json")).eval()
    ids = text(2, 5)
    mask = torch.ones_like(ids)  # otherwise transformers takes every 0 in the prompt for padding
    output = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert output.shape == (2, 11)
    with torch.no_grad():
        logits = model(output).logits
    assert torch.equal(logits[:, 4:10].argmax(-1), output[:, 5:])


@pytest.mark.parametrize("distilled", ["bigram", "convolution"])
def test_a_cache_is_refused_where_tokens_before_are_needed(distilled, tmp_path):
    model = small_model(router=case(distilled).options.model_dump(mode="json")).eval()
    with pytest.raises(ValueError, match="stable_moe looks at earlier tokens, which a cache does not hold"):
        model.generate(text(2, 5), max_new_tokens=3, use_cache=True, do_sample=False, pad_token_id=0)
    model.save_pretrained(tmp_path)
    loaded = SmoeForCausalLM.from_pretrained(tmp_path).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(text(2, 5), **options), model.generate(text(2, 5), **options))


def test_left_padded_generation_equals_generation_alone():
    """Prompts of different lengths in one batch, with a router that looks back."""
    model = small_model(router=case("convolution").options.model_dump(mode="json")).eval()
    ids = text(1, 5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(ids, **options)
    padded = torch.cat([torch.full((1, 3), 7), ids], 1)
    mask = (torch.arange(8) >= 3).long().unsqueeze(0)
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 3:], alone)


def test_other_routers_keep_their_cache():
    model = small_model()
    assert model.config.use_cache
    assert not model.looks_back()
    assert copy.deepcopy(model).generation_config.use_cache in (True, None)
