"""Expert choice: exact capacity, equal loads, groups, and that it is not causal and says so."""

import math

import pytest
import torch
from support.naive_expert_choice import naive_expert_choice
from support.router_cases import NUM_EXPERTS, RouterCase, assign, context, run, tokens
from support.small_model import small_model, text
from support.tiny import tiny_recipe

from smoe_train.errors import RecipeError
from smoe_train.model.config import ModelConfig, MoeConfig
from smoe_train.routing import EMPTY_SLOT, ROUTERS, RouterPlan
from smoe_train.routing.expert_choice import ExpertChoiceConfig
from smoe_train.schedules import Knobs

LENGTH = 6


def case(**options):
    return RouterCase("expert_choice", (("init_std", 0.1), *options.items()))


def loads(ids_TK):
    return [int((ids_TK == expert).sum()) for expert in range(NUM_EXPERTS)]


@pytest.mark.parametrize("group", ["sequence", "micro_batch"])
@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize(("top_k", "padded"), [(1, False), (2, True), (3, False), (NUM_EXPERTS, True)])
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_fp64_against_loops(group, limit, top_k, padded, kind):
    """Outputs, the z-loss and all gradients agree to fp64 rounding; one group of three is half padding."""
    layer = case(group=group, max_experts_per_token=limit).layer(kind).double()
    count = 3 * LENGTH
    mask = [True] * count if not padded else [t not in (0, 1, 2, 7, 17) for t in range(count)]
    x = tokens(count, scale=2.0).double()
    leaves = {name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()}
    x_naive, x_fast = (x.clone().requires_grad_() for _ in range(2))
    experts = {name.removeprefix("bank.experts."): v for name, v in leaves.items() if name.startswith("bank.")}
    length = LENGTH if group == "sequence" else count
    expected = naive_expert_choice(x_naive, leaves["router.weight"], experts, kind, top_k, length, limit, mask)
    ctx = context(top_k, sequence_length=LENGTH, token_mask_T=torch.tensor(mask))
    merged = run(layer, x_fast, ctx)
    torch.testing.assert_close(merged.out_TD, expected.out_TD, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(merged.losses["z_loss"], expected.z_loss, atol=1e-9, rtol=1e-9)
    weights = torch.linspace(-1, 1, count * 16).view(count, 16).double()
    naive_total = (expected.out_TD * weights).sum() + 0.7 * expected.z_loss
    fast_total = (merged.out_TD * weights).sum() + 0.7 * merged.losses["z_loss"]
    naive = torch.autograd.grad(naive_total, [x_naive, *leaves.values()])
    fast = torch.autograd.grad(fast_total, [x_fast, *layer.parameters()])
    for name, one, other in zip(["x", *leaves], naive, fast, strict=True):
        torch.testing.assert_close(other, one, atol=1e-9, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    ids_TK = assign(layer.router, x, ctx).expert_ids_TK
    assert [[i for i in row if i >= 0] for row in ids_TK.tolist()] == expected.ids
    assert merged.experts_of_token_T.tolist() == [len(ids) for ids in expected.ids]


def test_by_hand():
    """Three tokens, two experts, k = 1: C = ceil(3 * 1 / 2) = 2.

    p of expert 0 is 3/4, 3/4, 1/4: expert 0 takes tokens 0 and 1; expert 1 takes token 2 (3/4) and, of the two with
    1/4, the earlier one.
    """
    router = case().routers(d_model=1, num_experts=2)[0]
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[0.5], [-0.5]]))
    x = math.log(3.0) * torch.tensor([[1.0], [1.0], [-1.0]])
    result = assign(router, x, context(1))
    assert result.expert_ids_TK.tolist() == [[0, 1], [0, EMPTY_SLOT], [1, EMPTY_SLOT]]
    torch.testing.assert_close(result.weights_TK.detach(), torch.tensor([[0.75, 0.25], [0.75, 0.0], [0.75, 0.0]]))


@pytest.mark.parametrize("top_k", [1, 2, 3, NUM_EXPERTS])
@pytest.mark.parametrize("length", [1, 5, 8, 12])
def test_every_expert_takes_exactly_its_capacity_in_every_sequence(top_k, length):
    """C = ceil(S k / E), by construction and whatever the scores are; k S slots in all where E divides."""
    router = case().routers()[0]
    x = tokens(4 * length) + 4.0  # a common offset makes some experts everyone's favourites
    ids_TK = assign(router, x, context(top_k, sequence_length=length)).expert_ids_TK
    for sequence in ids_TK.split(length):
        assert loads(sequence) == [math.ceil(length * top_k / NUM_EXPERTS)] * NUM_EXPERTS
    if length == 8:
        assert int((ids_TK != EMPTY_SLOT).sum()) == top_k * len(x)


def test_padding_has_no_capacity():
    """A sequence with 3 real tokens of 6 has the capacity of 3, and none of it goes to padding."""
    mask = torch.tensor([True] * 6 + [False, True, True, False, True, False] + [False] * 6)
    x = torch.where(mask.unsqueeze(1), tokens(18), 1e30)
    result = assign(case().routers()[0], x, context(3, sequence_length=LENGTH, token_mask_T=mask))
    first, second, third = result.expert_ids_TK.split(LENGTH)
    assert loads(first) == [math.ceil(18 / 8)] * 8
    assert loads(second) == [math.ceil(9 / 8)] * 8
    assert loads(third) == [0] * 8
    assert (result.expert_ids_TK[~mask] == EMPTY_SLOT).all()


def test_a_limit_keeps_the_likeliest_experts():
    """max_experts_per_token: the first slots of the unlimited list, and fewer columns."""
    x, ctx = tokens(24), context(4, sequence_length=12)
    free = assign(case().routers()[0], x, ctx)
    tight = assign(case(max_experts_per_token=3).routers()[0], x, ctx)
    assert tight.expert_ids_TK.shape == (24, 3)
    assert torch.equal(tight.expert_ids_TK, free.expert_ids_TK[:, :3])
    assert (free.expert_ids_TK[:, 3] != EMPTY_SLOT).any()


@pytest.mark.parametrize("group", ["sequence", "micro_batch"])
def test_micro_batches_of_whole_sequences(group):
    """Groups of sequences: cutting the batch changes no bit; groups of micro-batches: it changes the choice."""
    router, x = case(group=group).routers()[0], tokens(4 * LENGTH)
    ctx = context(sequence_length=LENGTH)
    whole = assign(router, x, ctx)
    parts = [assign(router, x[part], ctx) for part in (slice(0, 6), slice(6, 24))]
    ids_TK = torch.cat([part.expert_ids_TK for part in parts])
    assert torch.equal(ids_TK, whole.expert_ids_TK) == (group == "sequence")


def test_later_tokens_change_earlier_routing():
    """The leak that is refused by default: another ending, other experts and logits for the tokens before it."""
    model = small_model(router=case(init_std=0.3).options.model_dump(mode="json")).eval()
    ids = text()
    changed = ids.clone()
    changed[:, 8:] = (changed[:, 8:] + 5) % 29
    with torch.no_grad():
        one, other = (model(values, knobs=Knobs(0, 2)).logits[:, :8] for values in (ids, changed))
    assert (one - other).abs().max() > 1e-2
    assert not ROUTERS.get("expert_choice").router.causal


def test_a_causal_language_model_is_refused(tmp_path):
    """Unless the recipe says that the leak is understood; the message says what it means."""
    (message,) = ExpertChoiceConfig().problems(RouterPlan(frozenset({2}), 8, 10))
    assert "allow_future_leak" in message
    assert "not comparable" in message
    assert not ExpertChoiceConfig(allow_future_leak=True).problems(RouterPlan(frozenset({2}), 8, 10))
    model = {"moe": {"router": {"type": "expert_choice"}}}
    with pytest.raises(RecipeError, match="looks at later tokens"):
        tiny_recipe(tmp_path / "text", model=model)
    model["moe"]["router"]["allow_future_leak"] = True
    tiny_recipe(tmp_path / "text", model=model)


def test_a_limit_without_effect_is_refused():
    section = MoeConfig(num_experts=4, router={"type": "expert_choice", "allow_future_leak": True})
    assert not ModelConfig(moe=section).problems(frozenset({2}), 10)
    options = ExpertChoiceConfig(allow_future_leak=True, max_experts_per_token=4)
    assert options.problems(RouterPlan(frozenset({2}), 4, 10))
    assert not options.problems(RouterPlan(frozenset({2}), 5, 10))
