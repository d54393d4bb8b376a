"""Activation checkpointing by policy: gradients stay the same to the bit, and what is stored falls as it should."""

import pytest
import torch
from support.small_model import small_model, text

from smoe_train.kernels.build import load_kernels
from smoe_train.model import StackedExperts
from smoe_train.schedules import Knobs

pytestmark = pytest.mark.compiler

POLICIES = ("none", "attention", "experts", "all")
D, F, D_FF, K, TOKENS, LAYERS = 16, 32, 48, 2, 4 * 24, 2
FP32 = 4


def model_of(form, **changes):
    model = small_model(d_model=D, d_ff_expert=F, d_ff=D_FF, feed_forward="swiglu", norm="rms_norm", **changes)
    if form == "cpp":
        load_kernels()
    for module in model.modules():
        if isinstance(module, StackedExperts):
            module.fused = form == "cpp"
    return model.train()


def run(model, policy):
    """Loss, gradients by name, and the bytes that the forward pass stores for the backward pass beside parameters."""
    model.recompute_activations(policy)
    model.zero_grad()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    stored = {}

    def pack(values):
        stored[values.untyped_storage().data_ptr()] = values  # held, so that no address is used twice
        return values

    torch.manual_seed(0)
    ids = text(4, 24)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values):
        loss = model(ids, labels=ids, knobs=Knobs(3, K)).loss
    num_bytes = sum(values.untyped_storage().nbytes() for place, values in stored.items() if place not in own)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}, num_bytes


@pytest.mark.parametrize(
    ("form", "layers"), [("torch", [0, 1]), ("torch", [1]), ("torch", []), ("cpp", [0, 1]), ("cpp", [1])], ids=str
)
@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_equal_to_the_bit(form, layers, norm_position, dtype):
    model = model_of(form, moe_layers=layers, norm_position=norm_position, dropout=0.1).to(dtype)
    loss, gradients, _ = run(model, "none")
    for policy in POLICIES[1:]:
        again, recomputed, _ = run(model, policy)
        assert torch.equal(loss, again)
        for name, gradient in gradients.items():
            assert torch.equal(recomputed[name], gradient), f"{policy}: {name}"


@pytest.mark.parametrize("form", ["torch", "cpp"])
def test_what_is_stored_falls_by_the_activations(form):
    model = model_of(form)
    stored = {policy: run(model, policy)[2] for policy in POLICIES}
    slots, fp32_layers = TOKENS * K, FP32 * LAYERS
    # torch: rows by expert, gate, its silu, the hidden values and their product. cpp: gate and hidden values.
    experts = slots * (D + 4 * F if form == "torch" else 2 * F) * fp32_layers
    assert experts <= stored["none"] - stored["experts"] < 1.1 * experts
    # Queries, keys and values, the first two also as they are turned, and what the output projection gets; the norm
    # around them stores what it likes.
    attention = TOKENS * 6 * D * fp32_layers
    assert attention <= stored["none"] - stored["attention"] < 2 * attention
    both = 2 * stored["none"] - stored["attention"] - stored["experts"]
    assert stored["none"] - stored["all"] == pytest.approx(both, rel=0.1)


def test_dense_networks_fall_under_experts():
    model = model_of("torch", moe_layers=[])
    stored = {policy: run(model, policy)[2] for policy in POLICIES}
    hidden = TOKENS * 4 * D_FF * FP32 * LAYERS
    assert hidden <= stored["none"] - stored["experts"] < 1.2 * hidden
    assert stored["all"] < min(stored["attention"], stored["experts"])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_runs_again_what_it_names_and_never_the_router(policy):
    model = model_of("torch", moe_layers=[1])
    block, dense = model.model.layers[1], model.model.layers[0]
    runs = {"attention": 0, "experts": 0, "dense": 0, "router": 0}

    def count(name):
        def add(*_):
            runs[name] += 1

        return add

    block.attention.register_forward_pre_hook(count("attention"))
    block.moe.bank.experts.register_forward_pre_hook(count("experts"))
    dense.feed_forward.register_forward_pre_hook(count("dense"))
    assign = block.moe.router.assign
    block.moe.router.assign = lambda *arguments: count("router")() or assign(*arguments)
    run(model, policy)
    again = {"none": (1, 1), "attention": (2, 1), "experts": (1, 2), "all": (2, 2)}[policy]
    assert runs == {"attention": again[0], "experts": again[1], "dense": again[1], "router": 1}
    model.eval()
    with torch.no_grad():
        model(text())
    assert set(runs.values()) <= {2, 3}, "each once more"
