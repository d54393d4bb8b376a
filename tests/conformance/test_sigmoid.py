"""The sigmoid router: a bias that balances the loads, decides selection alone, and survives bf16."""

import copy
from types import SimpleNamespace

import pytest
import torch
from support.naive_sigmoid import naive_sigmoid
from support.router_cases import NUM_EXPERTS, RouterCase, assign, context, run, tokens
from support.small_model import small_model, text

from smoe_train.checkpoint import load_initial
from smoe_train.model import SmoeForCausalLM
from smoe_train.routing import Context, RouterPlan
from smoe_train.routing.sigmoid import SigmoidConfig

COEFFICIENT = 0.7
BIAS = [0.3, -0.2, 0.0, 0.05, -0.4, 0.1, 0.0, -0.05]


def case(**options):
    return RouterCase("sigmoid", (("init_std", 0.1), *options.items()))


def with_bias(router, bias=BIAS):
    router.selection_bias.copy_(torch.tensor(bias))
    return router


def slots(*counts):
    return {"slots_E": torch.tensor([float(count) for count in counts])}


def plan(*top_k_values, max_steps=100):
    return RouterPlan(frozenset(top_k_values), NUM_EXPERTS, max_steps)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("top_k", "padded"), [(1, False), (2, True), (3, False)])
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_fp64_against_loops(normalise, top_k, padded, kind):
    """Outputs, the balance loss and all gradients agree to fp64 rounding, with a bias that changes the selection."""
    layer = case(normalise=normalise, scaling_factor=2.5).layer(kind).double()
    bias = with_bias(layer.router).selection_bias.double().tolist()
    mask = [True, False, True, True, False, True, True] if padded else [True] * 7
    x = tokens(7, scale=2.0).double()
    leaves = {name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()}
    x_naive, x_fast = (x.clone().requires_grad_() for _ in range(2))
    experts = {name.removeprefix("bank.experts."): v for name, v in leaves.items() if name.startswith("bank.")}
    expected = naive_sigmoid(x_naive, leaves["router.weight"], bias, experts, kind, top_k, normalise, 2.5, mask)
    ctx = context(top_k, token_mask_T=torch.tensor(mask))
    merged = run(layer, x_fast, ctx)
    torch.testing.assert_close(merged.out_TD, expected.out_TD, atol=1e-9, rtol=1e-9)
    balance = merged.losses["load_balance_loss"]
    torch.testing.assert_close(balance, expected.load_balance_loss, atol=1e-9, rtol=1e-9)
    weights = torch.linspace(-1, 1, 7 * 16).view(7, 16).double()
    naive_total = (expected.out_TD * weights).sum() + COEFFICIENT * expected.load_balance_loss
    fast_total = (merged.out_TD * weights).sum() + COEFFICIENT * balance
    naive = torch.autograd.grad(naive_total, [x_naive, *leaves.values()])
    fast = torch.autograd.grad(fast_total, [x_fast, *layer.parameters()])
    for name, one, other in zip(["x", *leaves], naive, fast, strict=True):
        torch.testing.assert_close(other, one, atol=1e-9, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    ids_TK = assign(layer.router, x, ctx).expert_ids_TK
    assert [[i for i in row if i >= 0] for row in ids_TK.tolist()] == expected.ids
    without = naive_sigmoid(x, leaves["router.weight"], [0.0] * 8, experts, kind, top_k, normalise, 2.5, mask)
    assert top_k == 1 or without.ids != expected.ids  # the bias matters here


def test_by_hand():
    """Scores .5 and .75 and .25: k = 2 weighs .75 and .5 as 3 : 2; a bias of .3 brings in .25, weighed 3 : 1."""
    router = case().routers(d_model=1, num_experts=3)[0]
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[0.0], [1.0], [-1.0]]))
    x = torch.log(torch.tensor([[3.0]]))
    result = assign(router, x, context(2))
    assert result.expert_ids_TK.tolist() == [[1, 0]]
    torch.testing.assert_close(result.weights_TK.detach(), torch.tensor([[0.6, 0.4]]))
    with_bias(router, [0.0, 0.0, 0.3])
    result = assign(router, x, context(2))
    assert result.expert_ids_TK.tolist() == [[1, 2]]
    torch.testing.assert_close(result.weights_TK.detach(), torch.tensor([[0.75, 0.25]]))
    torch.testing.assert_close(torch.softmax(result.logits_TE.detach(), 1), torch.tensor([[1 / 3, 0.5, 1 / 6]]))


@pytest.mark.parametrize("top_k", [1, 2, 5, NUM_EXPERTS])
def test_weights_sum_to_the_scaling_factor(top_k):
    """Invariant 5, also where every score of a token rounds to 0."""
    router = with_bias(case(scaling_factor=2.5).routers()[0])
    for x in (tokens(), -1e4 * torch.ones(3, 16) * router.weight.detach().sum(0).sign()):
        weights_TK = assign(router, x, context(top_k)).weights_TK
        torch.testing.assert_close(weights_TK.sum(1), torch.full((len(x),), 2.5))
        assert (weights_TK >= 0).all()


def test_the_bias_is_in_the_selection_and_not_in_the_weights():
    """A bias common to all changes no bit; with k = N no bias changes a weight; and none gets gradient."""
    router = case().routers()[0]
    plain = [assign(router, tokens(), context(k)) for k in (2, NUM_EXPERTS)]
    with_bias(router, [0.5] * 8)
    assert torch.equal(assign(router, tokens(), context(2)).expert_ids_TK, plain[0].expert_ids_TK)
    assert torch.equal(assign(router, tokens(), context(2)).weights_TK, plain[0].weights_TK)
    with_bias(router)
    biased = assign(router, tokens(), context(NUM_EXPERTS))
    sorted_weights = [r.weights_TK.gather(1, r.expert_ids_TK.argsort(dim=1)).detach() for r in (plain[1], biased)]
    torch.testing.assert_close(*sorted_weights)
    assert not torch.equal(assign(router, tokens(), context(2)).expert_ids_TK, plain[0].expert_ids_TK)
    assert not router.selection_bias.requires_grad
    assert [name for name, _ in router.named_parameters()] == ["weight"]


def test_one_update_by_hand():
    """Loads 7, 1, 4, 4 have the mean 4: by sign -u, +u, 0, 0; by size -3/4 u, +3/4 u, 0, 0."""
    for bias_update, expected in (("sign", [-0.01, 0.01, 0, 0]), ("proportional", [-0.0075, 0.0075, 0, 0])):
        router = case(bias_update=bias_update, bias_update_rate=0.01).routers(num_experts=4)[0]
        for times in (1, 2):
            router.after_step(slots(7, 1, 4, 4))
            torch.testing.assert_close(router.selection_bias, times * torch.tensor(expected))
        router.after_step(slots(0, 0, 0, 0))  # a step without tokens
        torch.testing.assert_close(router.selection_bias, 2 * torch.tensor(expected))


@pytest.mark.parametrize("bias_update", ["sign", "proportional"])
def test_the_bias_moves_skewed_loads_towards_balance(bias_update):
    """Tokens that share an offset prefer a few experts; 200 updates even the loads out without any gradient."""
    layer = case(bias_update=bias_update, bias_update_rate=0.01).layer()
    x = tokens(512, scale=1.0) + 2.0

    def violation(stats):  # the papers' MaxVio
        return float(stats["slots_E"].max() / stats["slots_E"].mean()) - 1.0

    violations = []
    with torch.no_grad():
        for _ in range(200):
            stats = run(layer, x, context()).stats
            violations.append(violation(stats))
            layer.router.after_step(stats)
    assert violations[0] > 1.0
    assert sum(violations[-10:]) / 10 < 0.2


def test_rate_zero_is_a_plain_sigmoid_router():
    router, twin = case(bias_update_rate=0.0).routers()[0], case().routers()[0]
    for one in (router, twin):
        one.after_step(slots(9, 1, 1, 1, 1, 1, 1, 1))
    assert torch.equal(router.selection_bias, torch.zeros(8))
    assert not torch.equal(twin.selection_bias, torch.zeros(8))
    scores_TE = torch.sigmoid(tokens() @ router.weight.T)
    expected = torch.sort(scores_TE, dim=1, descending=True, stable=True).indices[:, :2]
    assert torch.equal(assign(router, tokens(), context()).expert_ids_TK, expected)


def test_a_bias_that_is_frozen_after_some_steps():
    router = case(bias_frozen_after_steps=3, bias_update_rate=0.5).routers(num_experts=2)[0]
    seen = []
    for _ in range(5):
        router.after_step(slots(3, 1))
        seen.append(router.selection_bias.tolist())
    assert seen == [[-0.5, 0.5], [-1.0, 1.0], [-1.5, 1.5], [-1.5, 1.5], [-1.5, 1.5]]


def test_the_bias_stays_fp32_in_bf16_models():
    """0.001 added 1000 times is 1; in bf16 it would stop far before (0.25 + 0.001 is 0.25 there)."""
    router = case().routers(num_experts=2)[0].bfloat16()
    assert router.weight.dtype == torch.bfloat16
    for _ in range(1000):
        router.after_step(slots(3, 1))
    torch.testing.assert_close(router.selection_bias, torch.tensor([-1.0, 1.0]), atol=1e-4, rtol=0)
    before = router.selection_bias.clone()
    for cast in (router.half(), router.float(), router.to(torch.bfloat16), copy.deepcopy(router).double()):
        assert torch.equal(cast.selection_bias, before)


def test_the_state_is_saved(tmp_path):
    """The bias is in the state dict, and in exported models whatever dtype they are loaded in."""
    router, other = with_bias(case().routers()[0]), case().routers(seed=4)[0]
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.selection_bias, torch.tensor(BIAS))
    model = small_model(router=case().options.model_dump(mode="json")).eval()
    for one in model.routers().values():
        with_bias(one, BIAS[:4])
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = SmoeForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        for one in loaded.routers().values():
            assert one.weight.dtype == dtype
            assert torch.equal(one.selection_bias, torch.tensor(BIAS[:4]))
    with torch.no_grad():
        expected = model(text()).logits
        torch.testing.assert_close(SmoeForCausalLM.from_pretrained(tmp_path)(text()).logits, expected)


def test_nothing_but_after_step_moves_the_bias():
    layer = case().layer()
    run(layer, tokens(), context()).out_TD.sum().backward()
    layer.eval()
    run(layer, tokens(), Context(step=9, layer=0, top_k=1, training=False))
    assert not layer.router.bias_bits_E.any()
    assert int(layer.router.bias_updates) == 0


def test_a_loaded_bias_stays_and_its_steps_are_counted_anew():
    model = small_model(router={"type": "sigmoid"}, moe_layers=[0, 1])
    saved = model.state_dict()
    for router in model.routers().values():
        router.selection_bias.copy_(torch.tensor(BIAS[:4]))
        router.bias_updates.fill_(900)
    weights = SimpleNamespace(
        parameter=lambda name, parameter, owner: saved[name].clone(), buffer=lambda name: saved[name].clone()
    )
    load_initial(model, weights)
    for router in model.routers().values():
        assert torch.equal(router.selection_bias, torch.tensor(BIAS[:4]))
        assert int(router.bias_updates) == 0


def test_impossible_and_idle_options():
    assert SigmoidConfig().problems(plan(1))
    assert SigmoidConfig().problems(plan(1, 2))
    assert not SigmoidConfig().problems(plan(2))
    assert not SigmoidConfig(normalise=False).problems(plan(1))
    assert SigmoidConfig(bias_update_rate=0.0, bias_update="proportional").problems(plan(2))
    assert SigmoidConfig(bias_update_rate=0.0, bias_frozen_after_steps=5).problems(plan(2))
    assert SigmoidConfig(bias_frozen_after_steps=100).problems(plan(2, max_steps=100))
    assert not SigmoidConfig(bias_frozen_after_steps=99).problems(plan(2, max_steps=100))


def test_one_expert_without_normalisation_trains_the_router():
    """Invariant 6: s itself carries gradient at k = 1; the normalised weight is constant."""
    for normalise in (True, False):
        layer = case(normalise=normalise).layer()
        run(layer, tokens(scale=1.0), context(1)).out_TD.square().sum().backward()
        assert bool((layer.router.weight.grad == 0).all()) == normalise
