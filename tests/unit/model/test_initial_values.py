"""Initial values: keyed by seed and name, so independent of order, ranks and expert ranges; and never loaded over."""

import hashlib
import math

import pytest
import torch
from support.small_model import small_config, small_model
from torch import nn

from smoe_train.model import SmoeForCausalLM, StackedExperts
from smoe_train.model.initialise import KeyedDraw, initialise_module


def test_draws_are_keyed():
    draw = KeyedDraw(3, "a.b")
    first = draw.normal("w", (4, 5), 1.0)
    draw.normal("other", (100,), 1.0)
    torch.randn(7)
    assert torch.equal(draw.normal("w", (4, 5), 1.0), first)
    assert torch.equal(KeyedDraw(3, "a.b").normal("w", (4, 5), 2.0), 2.0 * first)
    for other in (KeyedDraw(4, "a.b").normal("w", (4, 5), 1.0), KeyedDraw(3, "a.c").normal("w", (4, 5), 1.0)):
        assert not torch.equal(other, first)
    assert not torch.equal(draw.normal("v", (4, 5), 1.0), first)
    digest = hashlib.sha256(b"3/a.b/w").digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    assert torch.equal(torch.empty(4, 5).normal_(0.0, 1.0, generator=generator), first)


def test_draws_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    KeyedDraw(0, "x").normal("w", (3,), 1.0)
    small_a = torch.get_rng_state()
    assert torch.equal(state, small_a)


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_experts_of_a_range_are_those_of_the_whole(kind):
    """Whoever holds expert i starts with the same values, and no two experts start alike."""

    def experts(ids):
        stacked = StackedExperts(ids, 8, 12, kind, 0.5, 0.25)
        stacked.initialise(KeyedDraw(1, "layers.0.moe.bank.experts"))
        return dict(stacked.named_parameters())

    whole = experts(range(6))
    for ids in (range(3), range(3, 6), range(5, 6), range(2, 4)):
        part = experts(ids)
        assert part.keys() == whole.keys()
        for name, value in part.items():
            assert torch.equal(value, whole[name][ids.start : ids.stop]), name
    for name, value in whole.items():
        if name.startswith("b_"):
            assert (value == 0).all()
            continue
        assert len({tuple(expert.flatten().tolist()) for expert in value}) == 6
        std = 0.25 if name == "w_out" else 0.5
        assert float(value.detach().std()) == pytest.approx(std, rel=0.15)


def test_the_model_does_not_depend_on_how_it_is_built():
    """Neither the global generator, nor other layers, nor the head around it change a layer's values."""
    torch.manual_seed(1)
    one = small_model(seed=5)
    torch.manual_seed(2)
    two = small_model(seed=5)
    deeper = small_model(seed=5, num_layers=3)
    body = type(one.model)(small_config(seed=5))
    for name, value in one.state_dict().items():
        assert torch.equal(two.state_dict()[name], value), name
        if name.startswith("model."):
            assert torch.equal(body.state_dict()[name.removeprefix("model.")], value), name
    names = [n for n in one.state_dict() if not n.endswith(("out.weight", "w_out"))]  # their scale follows the depth
    assert all(torch.equal(deeper.state_dict()[name], one.state_dict()[name]) for name in names)
    other = small_model(seed=6)
    assert not torch.equal(other.model.embed_tokens.weight, one.model.embed_tokens.weight)


def test_no_two_parameters_start_alike():
    state = small_model(num_layers=3, moe_layers=[0, 1], tie_word_embeddings=False).state_dict()
    drawn = {n: v for n, v in state.items() if v.numel() > 64 and float(v.std()) > 0}
    prefixes = {tuple(v.flatten()[:8].tolist()) for v in drawn.values()}
    assert len(prefixes) == len(drawn)


@pytest.mark.parametrize("tied", [True, False])
def test_scales(tied):
    """init_std everywhere, init_std / sqrt(2 L) for what writes into the residual stream; norms 1, biases 0."""
    model = SmoeForCausalLM(
        small_config(
            d_model=64,
            d_ff=96,
            d_ff_expert=80,
            num_layers=4,
            moe_layers=[1],
            init_std=0.05,
            positions="learned",
            vocab_size=200,
            tie_word_embeddings=tied,
            max_sequence_length=64,
        )
    )
    for name, value in model.named_parameters():
        value = value.detach()
        if "norm" in name and name.endswith("weight"):
            assert (value == 1).all(), name
        elif name.endswith("bias") or ".b_" in name:
            assert (value == 0).all(), name
        elif "router" not in name:
            writes = name.endswith(("attention.out.weight", "feed_forward.w_out.weight", "experts.w_out"))
            expected = 0.05 / math.sqrt(8) if writes else 0.05
            assert float(value.std()) == pytest.approx(expected, rel=0.08), name


def test_a_partly_loaded_router_keeps_what_was_loaded(tmp_path):
    """A checkpoint without the bias: the bias starts at 0, the weight stays the loaded one."""
    model = small_model(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    model.save_pretrained(tmp_path)
    config = small_config(seed=2, router={"type": "top_k", "bias": True, "init_std": 0.3})
    loaded = SmoeForCausalLM.from_pretrained(tmp_path, config=config)
    for router, source in zip(loaded.routers().values(), model.routers().values(), strict=True):
        assert torch.equal(router.weight, source.weight)
        assert (router.bias == 0).all()


def test_missing_experts_are_initialised_and_the_rest_kept(tmp_path):
    """A dense layer's checkpoint opened as MoE: what is missing gets its keyed values."""
    model = small_model(moe_layers=[0], seed=1)
    model.save_pretrained(tmp_path)
    loaded = SmoeForCausalLM.from_pretrained(tmp_path, config=small_config(moe_layers=[0, 1], seed=1))
    fresh = small_model(moe_layers=[0, 1], seed=1)
    for name, value in fresh.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_module_that_cannot_be_initialised_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    with pytest.raises(TypeError, match="Odd holds parameters"):
        initialise_module(Odd(), KeyedDraw(0, "odd"), 0.02)
