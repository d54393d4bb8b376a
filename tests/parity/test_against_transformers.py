"""Our layers against those of transformers with copied weights: Mixtral's sparse block, Llama's attention, losses."""

import pytest
import torch
from support.router_cases import context, run, tokens
from torch import nn
from transformers import LlamaConfig, MixtralConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

from smoe_train.model import LocalExpertBank, StackedExperts
from smoe_train.model.attention import Attention, rotary_angles, visible_keys
from smoe_train.model.initialise import KeyedDraw
from smoe_train.model.moe import MoeLayer
from smoe_train.routing import RouterShape
from smoe_train.routing.top_k import TopKConfig, TopKRouter

D_MODEL, D_FF, NUM_EXPERTS = 16, 20, 6
LEARNING_RATE = 0.05


def our_layer(softmax):
    router = TopKRouter(TopKConfig(softmax=softmax, init_std=0.5), RouterShape(D_MODEL, NUM_EXPERTS, 7))
    router.initialise(KeyedDraw(0, "router"))

    def make(ids):
        return StackedExperts(ids, D_MODEL, D_FF, "swiglu", 0.3, 0.3)

    layer = MoeLayer(router, LocalExpertBank(NUM_EXPERTS, make))
    layer.bank.experts.initialise(KeyedDraw(0, "experts"))
    return layer


def mixtral_block(layer, top_k):
    config = MixtralConfig(
        hidden_size=D_MODEL, intermediate_size=D_FF, num_local_experts=NUM_EXPERTS, num_experts_per_tok=top_k
    )
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config)
    for target, source in pairs(block, layer):
        with torch.no_grad():
            target.copy_(source)
    return block


def pairs(block, layer, part=lambda parameter: parameter):
    """(theirs, ours in their layout) for every parameter, or for what ``part`` takes of each, as its gradient."""
    experts = layer.bank.experts
    gate_up = torch.cat([part(experts.w_gate), part(experts.w_in)], dim=2).transpose(1, 2)
    return [
        (part(block.gate.weight), part(layer.router.weight)),
        (part(block.experts.gate_up_proj), gate_up),
        (part(block.experts.down_proj), part(experts.w_out).transpose(1, 2)),
    ]


def gradient(parameter):
    return parameter.grad


@pytest.mark.parametrize("softmax", ["after_top_k", "before_top_k_renormalised"])
@pytest.mark.parametrize("top_k", [2, 3, NUM_EXPERTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mixtral_block(softmax, top_k, dtype):
    """Outputs, gradients of inputs and weights, and weights after 5 steps of SGD.

    Their router computes probabilities in fp32 whatever the input, so fp64 agrees no better.
    """
    layer = our_layer(softmax).to(dtype)
    block = mixtral_block(layer, top_k).to(dtype)
    optimizers = [torch.optim.SGD(module.parameters(), lr=LEARNING_RATE) for module in (layer, block)]
    for step in range(5):
        x = tokens(26, seed=step, scale=1.0).to(dtype)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        out = run(layer, ours, context(top_k)).out_TD
        expected = block(theirs.view(2, 13, D_MODEL)).view(26, D_MODEL)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        for optimizer in optimizers:
            optimizer.zero_grad()
        target = tokens(26, seed=100 + step, scale=1.0).to(dtype)
        (out - target).square().mean().backward()
        (expected - target).square().mean().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)
        for their_gradient, our_gradient in pairs(block, layer, gradient):
            assert their_gradient.abs().max() > 1e-3
            torch.testing.assert_close(our_gradient, their_gradient, atol=1e-6, rtol=1e-4)
        for optimizer in optimizers:
            optimizer.step()
    for theirs, ours in pairs(block, layer):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_load_balance_loss(top_k, padded):
    """Theirs sums the shares over the k slots, so its optimum is k: it is k times ours, in value and gradient."""
    layer = our_layer("after_top_k")
    x = tokens(26, scale=1.0)
    mask = torch.ones(2, 13, dtype=torch.int64)
    if padded:
        mask[0, 9:] = mask[1, 3:] = 0
    ctx = context(top_k, token_mask_T=mask.view(-1).bool() if padded else None)
    ours = run(layer, x, ctx).losses["load_balance_loss"]
    logits = x @ layer.router.weight.T
    theirs = load_balancing_loss_func((logits,), NUM_EXPERTS, top_k, mask if padded else None)
    torch.testing.assert_close(top_k * ours, theirs)
    one, other = (torch.autograd.grad(loss, layer.router.weight)[0] for loss in (top_k * ours, theirs))
    assert other.abs().max() > 1e-3
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_load_balance_golden_values():
    """Three tokens, two experts, logits 0 or ln 3 apart: P = (3/4, 1/4) or (1/2, 1/2)."""
    router = TopKRouter(TopKConfig(bias=True), RouterShape(1, 2, 7))
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0], [0.0]]))
        router.bias.zero_()
    ln3 = 1.0986122886681098
    x = torch.tensor([[ln3], [ln3], [-ln3]])
    result = router.assign(x, torch.zeros(3, dtype=torch.int64), context(1))
    assert result.expert_ids_TK.flatten().tolist() == [0, 0, 1]
    losses = router.losses(result, context(1))
    # P = ((3/4 + 3/4 + 1/4) / 3, ...) = (7/12, 5/12); f = (2/3, 1/3); 2 * (14/36 + 5/36) = 19/18
    assert losses["load_balance_loss"].item() == pytest.approx(19 / 18, rel=1e-6)
    # logsumexp(ln 3, 0) = ln 4; logsumexp(-ln 3, 0) = ln 4/3: (2 * 1.386294^2 + 0.287682^2) / 3
    assert losses["z_loss"].item() == pytest.approx(1.3087950, rel=1e-6)
    both = router.assign(x, torch.zeros(3, dtype=torch.int64), context(2))
    assert router.losses(both, context(2))["load_balance_loss"].item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_llama_attention(padded):
    """Rotary attention with the same weights: outputs of real tokens and all gradients."""
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, attention_dropout=0.0
    )
    config._attn_implementation = "eager"
    theirs, ours = LlamaAttention(config, 0), Attention(32, 4, 0)
    nn.init.normal_(ours.qkv.weight, std=0.3)
    with torch.no_grad():
        q, k, v = ours.qkv.weight.chunk(3)
        for target, source in ((theirs.q_proj, q), (theirs.k_proj, k), (theirs.v_proj, v)):
            target.weight.copy_(source)
        theirs.o_proj.weight.copy_(ours.out.weight)
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 9, dtype=torch.int64)
    if padded:
        mask[0, :4] = 0
    positions = torch.arange(9).unsqueeze(0) + 3
    allowed = visible_keys(mask if padded else None, None, True, 9, 0, x.device)
    full = visible_keys(mask, None, True, 9, 0, x.device)
    additive = torch.zeros(full.shape).masked_fill(~full, torch.finfo(torch.float32).min)
    rotation = rotary_angles(positions.expand(2, 9), 8, config.rope_parameters["rope_theta"], x.dtype)
    their_rotation = LlamaRotaryEmbedding(config)(x, positions)
    for mine, other in zip(rotation, their_rotation, strict=True):
        torch.testing.assert_close(mine, other.expand_as(mine), atol=1e-6, rtol=1e-6)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    out = ours(inputs[0], rotation, allowed)
    expected, _ = theirs(inputs[1], their_rotation, additive)
    real = mask.bool()
    torch.testing.assert_close(out[real], expected[real], atol=1e-5, rtol=1e-5)
    for output in (out, expected):
        (output[real] * torch.linspace(-1, 1, output[real].numel()).view_as(output[real])).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-5, rtol=1e-4)
    their_gradients = torch.cat([m.weight.grad for m in (theirs.q_proj, theirs.k_proj, theirs.v_proj)])
    torch.testing.assert_close(ours.qkv.weight.grad, their_gradients, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.out.weight.grad, theirs.o_proj.weight.grad, atol=1e-5, rtol=1e-4)
