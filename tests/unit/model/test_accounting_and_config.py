"""Counting parameters, and what the model section refuses."""

import pytest
import torch
from support.small_model import small_config, small_model

from smoe_train.model import ModelConfig, MoeConfig, SmoeConfig, SmoeForCausalLM
from smoe_train.model.accounting import census, forward_flops
from smoe_train.routing.hyper_router import HyperRouterConfig
from smoe_train.routing.top_k import TopKConfig


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"feed_forward": "swiglu", "norm": "rms_norm", "tie_word_embeddings": False, "positions": "learned"},
        {"moe_layers": [1], "num_layers": 3},
        {"moe_layers": []},
        {"router": {"type": "hyper_router", "hyper_hidden": 8}, "num_experts_per_tok": 1},
        {"router": {"type": "hyper_router", "hypernet_scope": "model"}, "norm_position": "post"},
    ],
    ids=str,
)
def test_census_is_the_count_of_a_real_model(options):
    config = small_config(**options)
    model = SmoeForCausalLM(config)
    counted = census(config)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted.frozen == counted.total - counted.trainable
    assert counted.experts == sum(p.numel() for n, p in model.named_parameters() if ".bank." in n)
    assert counted.routers == sum(p.numel() for n, p in model.named_parameters() if ".router." in n)
    unused = config.num_experts - config.num_experts_per_tok
    one_expert = counted.experts // config.num_experts
    assert counted.active == counted.total - unused * one_expert


def test_census_by_hand():
    """d 16, 2 layers, 4 experts of width 12 with biases, top_k 2, tied embeddings of 29 tokens."""
    expert = 16 * 12 + 12 + 12 * 16 + 16
    layer = 4 * 16 * 16 + 2 * 2 * 16 + 4 * 16 + 4 * expert
    counted = census(small_config())
    assert counted.total == 29 * 16 + 2 * layer + 2 * 16
    assert counted.active == counted.total - 2 * 2 * expert
    assert (counted.experts, counted.routers, counted.frozen) == (8 * expert, 2 * 64, 0)
    assert counted.to_json()["total"] == counted.total


def test_census_of_a_classifier_with_frozen_parts():
    """Of 29 tokens by 16, no output layer for them, and no expert of width 12 with biases is trained."""
    config = small_config(tie_word_embeddings=False)
    experts = 2 * 4 * (16 * 12 + 12 + 12 * 16 + 16)
    counted = census(config, ("experts",), language_model=False)
    assert counted.total == census(config).total - 29 * 16
    assert (counted.frozen, counted.trainable) == (experts, counted.total - experts)
    for_text, for_classes = (forward_flops(config, 2, 10, language_model) for language_model in (True, False))
    assert for_text - for_classes == 2 * 16 * 29


def test_census_of_a_large_model_allocates_nothing():
    config = small_config(d_model=4096, num_heads=32, num_experts=256, d_ff_expert=8192, num_layers=8)
    assert census(config).total > 2e9


def problems(top_k_values=(2,), **options):
    return [key for key, _ in ModelConfig(**options).problems(frozenset(top_k_values), 10)]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"d_model": 30}, "num_heads"),
        ({"d_model": 24}, "num_heads"),  # head width 3 cannot rotate
        ({"positions": "learned", "rope_theta": 500.0}, "rope_theta"),
        ({"d_ff": 64}, "d_ff"),
        ({"moe": MoeConfig(layers=(0, 4))}, "moe.layers"),
        ({"moe": MoeConfig(layers=(1, 1))}, "moe.layers"),
        ({"moe": MoeConfig(layers=(-1,))}, "moe.layers"),
        ({"moe": MoeConfig(top_k=9)}, "moe.top_k"),
        ({"moe": MoeConfig(num_experts=4), "top_k_values": (2, 8)}, "moe.num_experts"),
        ({"moe": MoeConfig(top_k=1), "top_k_values": (1,)}, "moe.router"),
        ({"moe": MoeConfig(router=HyperRouterConfig()), "top_k_values": (1, 2)}, "moe.router"),
    ],
    ids=str,
)
def test_contradictions_are_named(options, key):
    assert problems(**options) == [key]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"d_model": 24, "positions": "learned"},
        {"d_ff": 64, "moe": MoeConfig(layers=(0,))},
        {"moe": MoeConfig(layers=()), "d_ff": 64},
        {"moe": MoeConfig(top_k=1, router=TopKConfig(softmax="before_top_k")), "top_k_values": (1,)},
        {"moe": MoeConfig(top_k=8), "top_k_values": (8, 4)},
    ],
    ids=str,
)
def test_sound_settings_pass(options):
    assert problems(**options) == []


def test_the_recipe_section_becomes_the_configuration():
    """Every field of the section arrives; what depends on others is resolved."""
    section = ModelConfig(
        d_model=64, num_layers=3, num_heads=4, feed_forward="swiglu", norm="rms_norm", norm_position="post",
        positions="learned", dropout=0.1, tie_embeddings=False, init_std=0.03,
        moe=MoeConfig(
            layers=(2, 0), num_experts=6, d_ff=48, top_k=3, load_balance_coefficient=0.5, z_loss_coefficient=0.25,
            router=HyperRouterConfig(hyper_hidden=9),
        ),
    )  # fmt: skip
    config = SmoeConfig.create(section, vocab_size=50, sequence_length=20, seed=4)
    for name in ("d_model", "num_layers", "num_heads", "feed_forward", "norm", "norm_position", "positions", "dropout"):
        assert getattr(config, name) == getattr(section, name), name
    assert (config.d_ff, config.max_sequence_length, config.vocab_size, config.seed) == (256, 20, 50, 4)
    assert list(config.moe_layers) == [0, 2]
    assert (config.num_experts, config.d_ff_expert, config.num_experts_per_tok) == (6, 48, 3)
    assert config.loss_coefficients() == {"load_balance_loss": 0.5, "z_loss": 0.25}
    assert config.router_options() == HyperRouterConfig(hyper_hidden=9)
    assert not config.tie_word_embeddings
    assert config.init_std == 0.03
    longer = SmoeConfig.create(ModelConfig(max_sequence_length=99, d_ff=7, moe=MoeConfig(layers=())), 50, 20, 0)
    assert (longer.max_sequence_length, longer.d_ff, list(longer.moe_layers)) == (99, 7, [])
    model = SmoeForCausalLM(config)
    assert model(torch.zeros(1, 4, dtype=torch.int64)).logits.shape == (1, 4, 50)


def test_routers_by_layer():
    model = small_model(num_layers=3, moe_layers=[0, 2])
    assert sorted(model.routers()) == sorted(model.model.routers()) == [0, 2]
    assert model.routers()[2] is model.model.layers[2].moe.router
    # A sibling of the bank: no parameter of the router lies below a name that says expert.
    assert not [n for n, _ in model.named_parameters() if "router" in n and "expert" in n]
