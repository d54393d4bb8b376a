"""Which parameters are trained and which are decayed."""

from pathlib import Path

import pytest
import torch
from support.tiny import tiny_recipe
from torch import nn

from smoe_train.assembly import build_model
from smoe_train.training.config import OptimizerConfig
from smoe_train.training.optimizer import make_optimizer, parameter_groups

CONFIG = OptimizerConfig(weight_decay=0.3, beta1=0.8, beta2=0.9, epsilon=1e-5)


def model(**options):
    moe = {"layers": [0], "router": {"type": "top_k", "bias": True}, **options.pop("moe", {})}
    return build_model(tiny_recipe(Path("unused"), model={"moe": moe, **options}), 32)


def named_groups(network):
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = parameter_groups(network, CONFIG)
    return {group["name"]: sorted(names[id(parameter)] for parameter in group["params"]) for group in groups}


def test_the_groups_of_a_model_by_name():
    groups = named_groups(model(positions="learned"))
    matrices = [
        *(f"model.layers.{layer}.attention.{name}.weight" for layer in (0, 1) for name in attention_matrices()),
        *(f"model.layers.1.feed_forward.{name}.weight" for name in ("w_in", "w_out")),
        *(f"model.layers.0.moe.bank.experts.{name}" for name in ("w_in", "w_out")),
        "model.layers.0.moe.router.weight",
    ]
    assert groups["decayed"] == sorted(matrices)
    kept = groups["not_decayed"]
    for name in (
        "model.embed_tokens.weight",
        "model.embed_positions.weight",
        "model.norm.weight",
        "model.layers.0.moe.bank.experts.b_in",
        "model.layers.0.moe.bank.experts.b_out",
        "model.layers.0.moe.router.bias",
        "model.layers.1.feed_forward.w_in.bias",
    ):
        assert name in kept


def attention_matrices():
    return [
        name.removesuffix(".weight")
        for name, parameter in model().model.layers[0].attention.named_parameters()
        if parameter.dim() == 2
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"moe": {"layers": "all", "router": {"type": "hyper_router", "hyper_hidden": 8}}},
        {"moe": {"router": {"type": "hyper_router", "hyper_hidden": 8, "hypernet_scope": "model"}}},
        {"tie_embeddings": False, "positions": "learned", "norm": "rms_norm"},
        {"feed_forward": "swiglu", "norm_position": "post"},
        {"moe": {"layers": []}},
    ],
)
def test_every_trained_parameter_is_in_one_group_and_no_frozen_one(options):
    network = model(**options)
    grouped = [name for names in named_groups(network).values() for name in names]
    assert sorted(grouped) == sorted(name for name, p in network.named_parameters() if p.requires_grad)
    assert not [name for name in grouped if "hypernet" in name]


def test_a_hypernetwork_is_in_no_group_but_its_embedding_is():
    network = model(moe={"router": {"type": "hyper_router", "hyper_hidden": 8}})
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen
    groups = named_groups(network)
    assert not frozen & {name for names in groups.values() for name in names}
    router = [name for name, p in network.named_parameters() if ".router." in name and p.requires_grad]
    assert len(router) == 1
    assert router[0] in groups["not_decayed"]


def test_a_group_without_parameters_is_left_out():
    assert [group["name"] for group in parameter_groups(nn.Linear(2, 2, bias=False), CONFIG)] == ["decayed"]
    assert [group["name"] for group in parameter_groups(nn.LayerNorm(2), CONFIG)] == ["not_decayed"]


def test_the_optimizer_is_adamw_by_hand():
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0]]))
        layer.bias.fill_(0.5)
    optimizer = make_optimizer(parameter_groups(layer, CONFIG), CONFIG)
    weight, bias = layer.weight.detach().double().clone(), layer.bias.detach().double().clone()
    moments = {}
    for step in (1, 2, 3):
        gradients = {"weight": torch.tensor([[0.1 * step, -0.2]]), "bias": torch.tensor([0.3])}
        layer.weight.grad, layer.bias.grad = gradients["weight"].clone(), gradients["bias"].clone()
        rate = 0.01 * step
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        for name, value, decay in (("weight", weight, 0.3), ("bias", bias, 0.0)):
            g = gradients[name].double()
            m, v = moments.get(name, (torch.zeros_like(g), torch.zeros_like(g)))
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
            moments[name] = (m, v)
            value.mul_(1 - rate * decay)
            value.sub_(rate * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-5))
    torch.testing.assert_close(layer.weight.double(), weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(layer.bias.double(), bias, rtol=1e-5, atol=1e-7)
