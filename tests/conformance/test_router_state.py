"""Precision, state and noise of every policy: fp32 arithmetic, nothing hidden, nothing left behind."""

import copy

import pytest
import torch
from support.router_cases import CASES, NUM_EXPERTS, assign, context, every_router, run, tokens

JITTER_CASES = [case for case in CASES if "jitter" in type(case.options).model_fields and not case.changes]


def quiet(case):
    """The case without jitter."""
    return case.with_options(jitter=0.0)


@every_router
def test_bf16_inputs_and_weights_leave_the_arithmetic_in_fp32(case):
    """Ids and scores are those of fp32 arithmetic on the same rounded values, with and without autocast."""
    case = quiet(case)
    routers = case.routers().bfloat16()
    rounded = copy.deepcopy(routers).float()
    x = tokens(200, scale=4.0).bfloat16()
    for low, high in zip(routers, rounded, strict=True):
        expected = assign(high, x.float(), context(4))
        result = assign(low, x, context(4))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = assign(low, x, context(4))
            cast_fp32_weights = assign(high, x, context(4))
        for got in (result, cast, cast_fp32_weights):
            assert got.logits_TE.dtype == got.weights_TK.dtype == torch.float32
            assert torch.equal(got.expert_ids_TK, expected.expert_ids_TK)
            torch.testing.assert_close(got.logits_TE, expected.logits_TE, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(got.weights_TK, expected.weights_TK, atol=1e-6, rtol=1e-6)
        # What bf16 arithmetic would give is visibly different, so the comparison above can fail.
        assert (expected.logits_TE.bfloat16().float() - expected.logits_TE).abs().max() > 1e-4


@every_router
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_a_bf16_layer_runs_and_its_losses_are_fp32(case, kind):
    """The whole layer in bf16 and under autocast: finite, bf16 outputs near those of fp32."""
    layer = case.layer(kind, d_ff=16)
    x = tokens(40, scale=1.0).bfloat16()
    low = copy.deepcopy(layer).bfloat16()
    exact = copy.deepcopy(low).float()
    expected = run(exact, x.float(), context())
    merged = run(low, x, context())
    assert merged.out_TD.dtype == torch.bfloat16
    torch.testing.assert_close(merged.out_TD.float(), expected.out_TD, atol=0.1, rtol=0.05)
    for name, loss in merged.losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected.losses[name], atol=1e-5, rtol=1e-5)
    (merged.out_TD.float().square().sum() + sum(merged.losses.values())).backward()
    assert all(p.grad.isfinite().all() for p in low.parameters() if p.requires_grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(layer, x.float(), context())
    for name, loss in cast.losses.items():
        assert loss.dtype == torch.float32, name
    torch.testing.assert_close(cast.out_TD.float(), expected.out_TD, atol=0.2, rtol=0.1)


@every_router
def test_state_dict_round_trip(case):
    """Everything that decides the routing is in the state dict, before and after forward passes."""
    source, target = case.routers(seed=0), case.routers(seed=9)
    x, ctx = tokens(), context()
    for router in (*source, *target):
        assign(router, x, ctx)
    keys = set(source.state_dict())
    target.load_state_dict(source.state_dict(), strict=True)
    for one, other in zip(source, target, strict=True):
        assert torch.equal(assign(one, x, ctx).weights_TK, assign(other, x, ctx).weights_TK)
    assert set(target.state_dict()) == keys


@every_router
def test_forward_and_evaluation_leave_the_state_alone(case):
    """No parameter or buffer changes outside the optimizer and `after_step`, in training or in evaluation."""
    layer, x = case.layer(), tokens()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    run(layer, x, context()).out_TD.sum().backward()
    layer.eval()
    with torch.no_grad():
        for top_k in (1, 2, NUM_EXPERTS):
            run(layer, x, context(top_k, training=False))
    with torch.inference_mode():
        run(layer, x, context(training=False))
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@every_router
def test_training_and_evaluation_mode_route_alike_without_noise(case):
    """Invariant 2: without noise, train() and eval(), with and without gradients, give the same bits."""
    routers = quiet(case).routers()
    for router in routers:
        expected = assign(router, tokens(), context())
        router.eval()
        with_grad = assign(router, tokens(), context(training=False))
        with torch.no_grad():
            cached = [assign(router, tokens(), context(training=False)) for _ in range(2)]
        for got in (with_grad, *cached):
            assert torch.equal(got.logits_TE, expected.logits_TE)
            assert torch.equal(got.weights_TK, expected.weights_TK)


@every_router
def test_deepcopy_is_independent(case):
    """Invariant: a copy works after forward passes in both modes, and training it leaves the original alone."""
    routers = case.routers()
    x, ctx = tokens(), context()
    before = [assign(router, x, ctx).logits_TE.detach() for router in routers]
    routers.eval()
    with torch.no_grad():
        for router in routers:
            assign(router, x, context(training=False))
    twins = copy.deepcopy(routers)
    twins.train()
    routers.train()
    with torch.no_grad():
        for parameter in twins.parameters():
            parameter.add_(1.0)
    for router, twin, logits in zip(routers, twins, before, strict=True):
        assert torch.equal(assign(router, x, ctx).logits_TE, logits)
        assert not torch.equal(assign(twin, x, ctx).logits_TE, logits)


@pytest.mark.parametrize("case", JITTER_CASES, ids=str)
def test_jitter_is_a_function_of_seed_step_layer_and_token(case):
    """Noise: absent at 0 and in evaluation, bounded, the same wherever the token lies, different between keys."""
    router = case.with_options(jitter=0.3).routers()[0]
    still = case.routers()[0]
    x = tokens()
    plain = assign(still, x, context()).logits_TE
    assert torch.equal(assign(router, x, context(training=False)).logits_TE, plain)
    noisy = assign(router, x, context()).logits_TE
    assert not torch.equal(noisy, plain)
    assert torch.equal(assign(router, x, context()).logits_TE, noisy)
    for change in ({"seed": 6}, {"step": 4}, {"layer": 1}, {"token_index_T": torch.arange(23) + 1}):
        assert not torch.equal(assign(router, x, context(**change)).logits_TE, noisy), change
    # Tokens 10..22 on another rank: same global index, same noise (a wrong key would differ in every value).
    part = assign(router, x[10:], context(token_index_T=torch.arange(10, 23))).logits_TE
    torch.testing.assert_close(part, noisy[10:], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("case", JITTER_CASES, ids=str)
def test_jitter_stays_within_its_bounds(case):
    """The input is multiplied by values in [1 - j, 1 + j): the recovered factors fill the range."""
    router = case.with_options(jitter=0.3).routers()[0]
    factor = router._jittered(torch.ones(500, 16), context())
    assert factor.min() >= 0.7
    assert factor.max() <= 1.3
    assert factor.min() < 0.71
    assert factor.max() > 1.29
    assert abs(float(factor.mean()) - 1) < 0.01
    assert len(factor.unique()) > 7900
