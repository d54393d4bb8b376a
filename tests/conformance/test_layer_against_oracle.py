"""Every policy that scores with one matrix, with every kind of expert, against loops over tokens in fp64."""

import dataclasses

import pytest
import torch
from support.naive_moe import naive_hyper_router, naive_moe
from support.router_cases import CASES, NUM_EXPERTS, context, run, tokens

from smoe_train.routing.hyper_router import HyperRouter
from smoe_train.routing.softmax_top_k import SoftmaxTopKRouter

# Few hidden units, as the oracle's hypernetwork is a loop; larger weights, so that scores differ clearly.
LINEAR = [
    case.with_options(hyper_hidden=7, hypernet_std=0.3, init_std=0.3)
    for case in CASES
    if getattr(type(case.routers()[0]), "scores", None) is SoftmaxTopKRouter.scores
    and not getattr(case.options, "jitter", 0.0)
]
IDS = [str(case).split("-hyper_hidden")[0].split("-init_std")[0] for case in LINEAR]
COEFFICIENTS = {"load_balance_loss": 0.7, "z_loss": 0.3}


def naive_router(router, leaves):
    """The router's weight and bias from fp64 leaves, by formulas of the oracle where a policy generates them."""
    if isinstance(router, HyperRouter):
        prefix = "router.hypernet."
        net = {name.removeprefix(prefix): value for name, value in leaves.items() if name.startswith(prefix)}
        shape = router.shape
        return naive_hyper_router(
            leaves["router.embedding"], net, shape.num_experts, shape.d_model, router.config.generated_bias
        )
    return leaves["router.weight"], leaves.get("router.bias")


def naive_run(layer, x_TD, top_k, mask):
    """Outputs, losses and gradients of the oracle, all fp64, on a layer's values."""
    leaves = {name: value.detach().double().requires_grad_() for name, value in layer.state_dict().items()}
    x_TD = x_TD.detach().double().requires_grad_()
    experts = {name.removeprefix("bank.experts."): v for name, v in leaves.items() if name.startswith("bank.")}
    rule = layer.router.config.softmax
    result = naive_moe(x_TD, naive_router(layer.router, leaves), experts, layer.bank.experts.kind, top_k, rule, mask)
    total = (result.out_TD * torch.linspace(-1, 1, result.out_TD.numel()).view_as(result.out_TD).double()).sum()
    total = total + sum(COEFFICIENTS[name] * getattr(result, name) for name in COEFFICIENTS)
    names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(total, [x_TD, *(leaves[name] for name in names)], allow_unused=True)
    return result, dict(zip(["x", *names], gradients, strict=True))


def layer_run(layer, x_TD, top_k, mask):
    x_TD = x_TD.detach().clone().requires_grad_()
    mask_T = None if mask is None else torch.tensor(mask)
    merged = run(layer, x_TD, context(top_k, token_mask_T=mask_T))
    weights = torch.linspace(-1, 1, merged.out_TD.numel()).view_as(merged.out_TD).to(x_TD.dtype)
    total = (merged.out_TD * weights).sum() + sum(COEFFICIENTS[name] * merged.losses[name] for name in COEFFICIENTS)
    parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(total, [x_TD, *parameters.values()], allow_unused=True)
    return merged, dict(zip(["x", *parameters], gradients, strict=True))


def compare(layer, x_TD, top_k, mask, tolerance):
    expected, expected_gradients = naive_run(layer, x_TD, top_k, mask)
    merged, gradients = layer_run(layer, x_TD, top_k, mask)
    close = {"atol": tolerance, "rtol": tolerance}
    torch.testing.assert_close(merged.out_TD.double(), expected.out_TD, **close)
    for name in COEFFICIENTS:
        torch.testing.assert_close(merged.losses[name].double(), getattr(expected, name), **close, msg=name)
    for name, gradient in expected_gradients.items():
        if gradient is None:
            assert gradients[name] is None or (gradients[name] == 0).all(), name
            continue
        got = gradients[name].double()
        # Relative to the largest entry: a gradient's small entries are differences of large ones.
        scale = float(gradient.abs().max().clamp(min=1e-3))
        torch.testing.assert_close(
            got / scale, gradient / scale, **close, msg=lambda text, name=name: f"{name}: {text}"
        )
    counts = [sum(expert in ids for ids in expected.ids) for expert in range(NUM_EXPERTS)]
    assert merged.stats["slots_E"].tolist() == counts


@pytest.mark.parametrize("case", LINEAR, ids=IDS)
@pytest.mark.parametrize("kind", ["relu", "gelu", "swiglu"])
@pytest.mark.parametrize(("top_k", "padded"), [(1, False), (2, True), (3, False)])
def test_fp64(case, kind, top_k, padded):
    """Outputs, losses and all gradients agree to fp64 rounding, with empty slots and experts without tokens."""
    mask = [True, False, True, True, False, True] if padded else None
    compare(case.layer(kind).double(), tokens(6, scale=2.0).double(), top_k, mask, 1e-9)


@pytest.mark.parametrize("case", LINEAR, ids=IDS)
@pytest.mark.parametrize("kind", ["relu", "gelu", "swiglu"])
@pytest.mark.parametrize("d_ff", [6, 8], ids=["looped", "grouped"])
def test_fp32(case, kind, d_ff):
    """The same in fp32 to 1e-5, for both forms of the product."""
    mask = [True, True, False, True, True, True, False]
    compare(case.layer(kind, d_ff=d_ff), tokens(7, scale=1.0), 2, mask, 1e-5)


def test_the_comparison_can_fail():
    """A wrong gradient scale, a dropped bias and an unweighted slot are all noticed."""

    def wrong_scale(layer):
        layer.bank.experts.w_in.register_hook(lambda gradient: gradient * 1.001)

    def wrong_merge(layer):
        merge = layer.router.merge
        layer.router.merge = lambda a, y, c: merge(a, y * 1.0001, c)

    def wrong_order(layer):
        assign = layer.router.assign

        def flipped(*arguments):
            result = assign(*arguments)
            return dataclasses.replace(result, expert_ids_TK=result.expert_ids_TK.flip(1))

        layer.router.assign = flipped

    for mutate in (wrong_scale, wrong_merge, wrong_order):
        layer = LINEAR[0].layer("gelu").double()
        mutate(layer)
        with pytest.raises(AssertionError):
            compare(layer, tokens(6, scale=2.0).double(), 2, None, 1e-9)
