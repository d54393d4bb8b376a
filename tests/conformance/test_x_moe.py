"""X-MoE: against loops over tokens in fp64, and invariant 12: cosines, the learned temperature, nothing rewritten."""

import copy
import math

import pytest
import torch
from support.naive_x_moe import naive_x_moe
from support.router_cases import NUM_EXPERTS, RouterCase, assign, context, initialised, run, tokens
from support.small_model import small_model, text

from smoe_train.model.initialise import KeyedDraw
from smoe_train.routing import RouterPlan, RouterShape
from smoe_train.routing.contract import Assignment
from smoe_train.routing.orthogonal import orthogonal
from smoe_train.routing.x_moe import XMoeConfig, XMoeRouter

COEFFICIENTS = {"load_balance_loss": 0.7, "z_loss": 0.3}
DEFAULT = RouterCase("x_moe")
FORMS = {
    "softmax": DEFAULT,
    "after_top_k": DEFAULT.with_options(softmax="after_top_k"),
    "renormalised": DEFAULT.with_options(softmax="before_top_k_renormalised", temperature_init=0.5),
    "sigmoid": DEFAULT.with_options(weights_from="sigmoid"),
    "tau0": DEFAULT.with_options(balance_temperature=1.5, projection_dim=3, init_std=0.3),
}
TAU0 = {"softmax": 0.3, "after_top_k": 0.3, "renormalised": 0.3, "sigmoid": 0.07, "tau0": 1.5}  # the paper's, or given
RULES = {
    "softmax": "before_top_k",
    "after_top_k": "after_top_k",
    "renormalised": "before_top_k_renormalised",
    "sigmoid": "sigmoid",
    "tau0": "before_top_k",
}


def router_of(d_model=16, num_experts=NUM_EXPERTS, **options):
    return initialised(XMoeConfig(**options), 0, d_model, num_experts)[0]


def total_of(out_TD, losses):
    weights = torch.linspace(-1, 1, out_TD.numel(), dtype=out_TD.dtype).view_as(out_TD)
    return (out_TD * weights).sum() + sum(COEFFICIENTS[name] * losses[name] for name in COEFFICIENTS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_against_the_oracle(form, kind, top_k, padded):
    """Outputs, weights, losses and the gradients of tokens, experts and router agree to fp64 rounding."""
    layer = FORMS[form].layer(kind).double()
    x = tokens(6, scale=2.0).double().requires_grad_()
    mask = [True, False, True, True, False, True] if padded else [True] * 6
    ctx = context(top_k, token_mask_T=torch.tensor(mask) if padded else None)
    merged = run(layer, x, ctx)
    names = [name for name, _ in layer.named_parameters()]
    got = torch.autograd.grad(total_of(merged.out_TD, merged.losses), [x, *layer.parameters()], allow_unused=True)

    leaves = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    inputs = x.detach().clone().requires_grad_()
    experts = {name.removeprefix("bank.experts."): p for name, p in leaves.items() if name.startswith("bank.")}
    router = {name.removeprefix("router."): p for name, p in leaves.items() if name.startswith("router.")}
    expected = naive_x_moe(inputs, router, experts, kind, top_k, RULES[form], TAU0[form], mask)
    losses = {name: getattr(expected, name) for name in COEFFICIENTS}
    total = total_of(expected.out_TD, losses)
    wanted = torch.autograd.grad(total, [inputs, *leaves.values()], allow_unused=True)

    torch.testing.assert_close(merged.out_TD, expected.out_TD, atol=1e-9, rtol=1e-9)
    for name, value in losses.items():
        torch.testing.assert_close(merged.losses[name].double(), value, atol=1e-9, rtol=1e-9, msg=name)
    assignment = assign(layer.router, x, ctx)
    for token, (ids, weights) in enumerate(zip(expected.ids, expected.weights, strict=True)):
        used = len(ids)
        assert assignment.expert_ids_TK[token].tolist() == ids + [-1] * (top_k - used)
        if used:
            torch.testing.assert_close(assignment.weights_TK[token], torch.stack(weights), atol=1e-9, rtol=1e-9)
    for name, one, other in zip(["x", *names], got, wanted, strict=True):
        if other is None:
            assert one is None or (one == 0).all(), name
            continue
        scale = float(other.abs().max().clamp(min=1e-3))
        torch.testing.assert_close(one / scale, other / scale, atol=1e-9, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_scores_are_cosines(scale):
    """Invariant 12: in [-1, 1] for tokens and parameters of any size, and both ends are reached."""
    router = router_of()
    x = tokens(400, scale=scale)
    cosines = router.cosines(x, context())
    assert cosines.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(assign(router, x, context()).logits_TE, cosines / 0.07, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        # A token whose projection is an expert's embedding, and one that is its opposite.
        aligned = torch.linalg.lstsq(router.projection, router.embeddings[5].unsqueeze(1)).solution.T
    ends = router.cosines(torch.cat([scale * aligned, -scale * aligned]), context())[:, 5]
    torch.testing.assert_close(ends, torch.tensor([1.0, -1.0]), atol=1e-5, rtol=0)


def test_scores_do_not_depend_on_lengths():
    """Invariant 12: rescaling W x, or any single e_i, changes no logit; rescaling the temperature does."""
    router, x = router_of(), tokens()
    before = assign(router, x, context()).logits_TE
    with torch.no_grad():
        router.projection.mul_(37.0)
        assert torch.allclose(assign(router, x, context()).logits_TE, before, atol=1e-4)
        assert torch.allclose(assign(router, 0.01 * x, context()).logits_TE, before, atol=1e-4)
        for expert in range(NUM_EXPERTS):
            router.embeddings[expert].mul_(0.1 * (expert + 1))
        assert torch.allclose(assign(router, x, context()).logits_TE, before, atol=1e-4)
        router.log_temperature.add_(1.0)
    tau = 0.01 + 0.06 * math.e
    torch.testing.assert_close(assign(router, x, context()).logits_TE, before * 0.07 / tau, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("weights_from", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_temperature_is_positive_and_learned(weights_from, top_k):
    """Invariant 12: tau starts at 0.07, gets gradient from the task at any k, and no step takes it below 0.01."""
    layer = DEFAULT.with_options(weights_from=weights_from).layer()
    router = layer.router
    assert float(router.temperature(torch.float32).detach()) == pytest.approx(0.07, rel=1e-5)
    run(layer, tokens(scale=1.0), context(top_k)).out_TD.square().sum().backward()
    assert router.log_temperature.grad.abs() > 0
    for value in (-1e4, -50.0, 0.0, 5.0):
        with torch.no_grad():
            router.log_temperature.fill_(value)
        assert float(router.temperature(torch.float64).detach()) >= 0.01
        assert assign(router, tokens(), context()).logits_TE.isfinite().all()


def test_a_small_temperature_still_has_a_gradient():
    """A clamp would hold it at the floor for ever; here it comes back by gradient steps."""
    layer = DEFAULT.with_options(temperature_init=0.011).layer()
    result = assign(layer.router, tokens(), context())
    (gradient,) = torch.autograd.grad(layer.router.losses(result, context())["z_loss"], layer.router.log_temperature)
    assert gradient < 0  # a larger temperature makes the logits smaller


def test_the_balance_loss_does_not_train_the_temperature():
    """tau0 is fixed: exactly no gradient, while projection and embeddings get theirs; the z-loss reaches all."""
    router = router_of()
    losses = router.losses(assign(router, tokens(), context()), context())
    losses["load_balance_loss"].backward(retain_graph=True)
    assert router.log_temperature.grad is None
    assert all(p.grad.abs().max() > 0 for p in (router.projection, router.embeddings))
    losses["z_loss"].backward()
    assert router.log_temperature.grad.abs() > 0
    declared = router.trained_by(context())
    assert declared["load_balance_loss"] == {"projection", "embeddings"}
    assert declared["task"] == declared["z_loss"] == {"projection", "embeddings", "log_temperature"}


def cosine_assignment(router, ids, cosines):
    """An assignment as a policy over this router makes it: from logits alone."""
    ids = torch.tensor(ids)
    logits = torch.as_tensor(cosines, dtype=torch.float64) / router.temperature(torch.float64)
    return Assignment(ids, torch.ones(ids.shape, dtype=torch.float64), logits)


def test_values_of_the_balance_loss():
    """Invariant 14 for cosines: 1 at uniformity for any k; at collapse N softmax at tau0, which tends to N."""
    n = NUM_EXPERTS
    for top_k in (1, 2, n):
        router = router_of()
        ids = [[(token + slot) % n for slot in range(top_k)] for token in range(3 * n)]
        losses = router.losses(cosine_assignment(router, ids, [[0.0] * n] * (3 * n)), context(top_k))
        assert float(losses["load_balance_loss"].detach()) == pytest.approx(1.0, abs=1e-6)
    collapsed = [[-1.0] * 3 + [1.0] + [-1.0] * (n - 4)] * 5
    # e^(1/0.3) / (e^(1/0.3) + 7 e^(-1/0.3)) by hand: 28.0316 / (28.0316 + 7 * 0.0356740) = 0.991170.
    for options, expected in (
        ({}, 8 * 0.991170),
        ({"weights_from": "sigmoid"}, 8.0),
        ({"balance_temperature": 0.01}, 8.0),
        ({"balance_temperature": 1e6}, 1.0),
    ):
        router = router_of(**options)
        losses = router.losses(cosine_assignment(router, [[3]] * 5, collapsed), context(1))
        assert float(losses["load_balance_loss"].detach()) == pytest.approx(expected, rel=1e-5), options


def test_a_policy_over_this_one_has_the_same_losses():
    """From `scores` alone the same cosines come back, in value and, up to rounding, in gradient."""
    router, x = router_of().double(), tokens().double()
    own = assign(router, x, context())
    plain = Assignment(own.expert_ids_TK, own.weights_TK, router.scores(x, context()))
    parameters = list(router.parameters())
    for name, value in router.losses(own, context()).items():
        other = router.losses(plain, context())[name]
        torch.testing.assert_close(other, value, atol=1e-12, rtol=1e-12)
        gradients = [
            torch.autograd.grad(one, parameters, allow_unused=True, retain_graph=True) for one in (value, other)
        ]
        for one, two in zip(*gradients, strict=True):
            torch.testing.assert_close(two, torch.zeros_like(two) if one is None else one, atol=1e-12, rtol=1e-9)


def test_no_pass_changes_a_parameter():
    """Invariant 12: the published routers rewrite embeddings in the pass; here bits stay, with gradient and without."""
    model = small_model(router={"type": "x_moe"}).train()
    before = copy.deepcopy(model.state_dict())
    model(text(), labels=text()).loss.backward()
    with torch.no_grad():
        model.eval()(text())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {f"model.layers.0.moe.router.{name}" for name in ("projection", "embeddings", "log_temperature")} <= changed


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-8])
def test_tokens_of_zeros_are_finite(value):
    """Invariant 12: no direction, no preference: scores 0 (or a cosine), finite gradients, experts from the lowest."""
    layer = DEFAULT.layer()
    x = torch.full((3, 16), value).requires_grad_()
    merged = run(layer, x, context())
    result = assign(layer.router, x, context())
    assert result.logits_TE.isfinite().all()
    if value == 0.0:
        assert (result.logits_TE == 0).all()
        assert result.expert_ids_TK.tolist() == [[0, 1]] * 3
    (merged.out_TD.sum() + sum(merged.losses.values())).backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_sizes_and_initial_values():
    """d_e = N / 2 (16 for the paper's 32 experts); embeddings orthogonal of gain 0.1; the projection N(0, 0.02^2)."""
    router = router_of(d_model=256, num_experts=32)
    assert router.projection.shape == (16, 256)
    assert router.embeddings.shape == (32, 16)
    assert router.projection.std().item() == pytest.approx(0.02, rel=0.05)
    torch.testing.assert_close(router.embeddings.T @ router.embeddings, 0.01 * torch.eye(16), atol=1e-7, rtol=0)
    wide = router_of(projection_dim=20, embedding_gain=2.0).embeddings
    torch.testing.assert_close(wide @ wide.T, 4.0 * torch.eye(NUM_EXPERTS), atol=1e-5, rtol=0)
    assert router_of(num_experts=2).projection.shape == (2, 16), "in one dimension all cosines are 1 or -1"


def test_orthogonalisation_keeps_the_direction_of_what_is_orthogonal():
    """Q R with a positive diagonal is unique: columns that are orthogonal already are only normalised."""
    given = torch.tensor([[3.0, 0.0], [0.0, -2.0], [4.0, 0.0]])
    torch.testing.assert_close(orthogonal(given), torch.tensor([[0.6, 0.0], [0.0, -1.0], [0.8, 0.0]]))
    torch.testing.assert_close(orthogonal(given.T), orthogonal(given).T)


def test_it_can_be_built_without_values():
    """Loading a saved model builds it on the meta device first."""
    with torch.device("meta"):
        router = XMoeRouter(XMoeConfig(), RouterShape(16, 8, 7))
        router.initialise(KeyedDraw(0, "router"))
    assert router.embeddings.is_meta


def test_options_without_effect_or_gradient_are_refused():
    def problems(*top_k_values, **options):
        return XMoeConfig(**options).problems(RouterPlan(frozenset(top_k_values), 8, 10))

    assert not problems(1, 2)
    assert not problems(1, weights_from="sigmoid")
    assert "no gradient" in problems(1, softmax="after_top_k")[0]
    assert "no effect" in problems(2, softmax="after_top_k", weights_from="sigmoid")[0]
