"""HyperRouter: generation, freezing, equivalence with a frozen linear router, sizes, initial scale and the cache."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from support.router_cases import assign, context, initialised, run, token_ids, tokens
from support.small_model import small_config, small_model, text

from smoe_train.model import LocalExpertBank, SmoeForCausalLM, StackedExperts
from smoe_train.model.accounting import census
from smoe_train.model.initialise import KeyedDraw
from smoe_train.model.moe import MoeLayer
from smoe_train.routing import RouterShape
from smoe_train.routing.hyper_router import HyperRouter, HyperRouterConfig
from smoe_train.routing.top_k import TopKConfig, TopKRouter


def hyper(seed=0, d_model=16, num_experts=8, **options):
    return initialised(HyperRouterConfig(**options), seed, d_model, num_experts)[0]


def layer_of(router, kind="gelu"):
    def make(ids):
        return StackedExperts(ids, router.shape.d_model, 24, kind, 0.3, 0.3)

    layer = MoeLayer(router, LocalExpertBank(router.shape.num_experts, make))
    layer.bank.experts.initialise(KeyedDraw(0, "experts"))
    return layer


def test_layout_of_the_generated_weights():
    """Invariant 3: theta has N(d+1) values; row j is W_j then b_j; scores are those of a plain linear layer."""
    router = hyper(hyper_hidden=20, hyper_dim=6)
    net, e = router.hypernet, router.embedding
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    hidden = torch.clamp(net.hidden_weight @ e + net.hidden_bias, min=0)
    theta = net.output_weight @ hidden + net.output_bias
    assert theta.numel() == 8 * 17
    weight, bias = router.weight_and_bias()
    for j in range(8):
        torch.testing.assert_close(weight[j], theta[j * 17 : j * 17 + 16])
        torch.testing.assert_close(bias[j], theta[j * 17 + 16])
    x = tokens()
    expected = F.linear(x, theta.view(8, 17)[:, :16], theta.view(8, 17)[:, 16])
    torch.testing.assert_close(assign(router, x, context()).logits_TE, expected, atol=1e-4, rtol=1e-6)


def test_layout_without_a_bias():
    router = hyper(generated_bias=False, hyper_hidden=20)
    weight, bias = router.weight_and_bias()
    assert bias is None
    hidden = F.relu(router.hypernet.hidden_weight @ router.embedding)
    torch.testing.assert_close(weight, (router.hypernet.output_weight @ hidden).view(8, 16))


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_freeze(scope):
    """Invariant 1: a training step leaves every hypernetwork bit and moves every embedding."""
    model = small_model(router={"type": "hyper_router", "hypernet_scope": scope, "hypernet_std": 0.2}).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(text(), labels=text()).loss.backward()
    optimizer.step()
    hypernets = [name for name in before if ".hypernet." in name]
    embeddings = [name for name in before if name.endswith("router.embedding")]
    assert len(hypernets) == (8 if scope == "layer" else 4)
    assert len(embeddings) == 2
    after = dict(model.named_parameters())
    for name in hypernets:
        assert not after[name].requires_grad
        assert after[name].grad is None
        assert torch.equal(after[name], before[name])
    for name in embeddings:
        assert after[name].grad.abs().max() > 0
        assert not torch.equal(after[name], before[name])


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_nothing_trains_the_hypernet_even_if_all_is_made_trainable(scope):
    """The released fine-tuning script does `requires_grad_(True)` and so trains it; here it gets no gradient."""
    model = small_model(router={"type": "hyper_router", "hypernet_scope": scope}).train()
    model.requires_grad_(True)
    model(text(), labels=text()).loss.backward()
    hypernets = [p for name, p in model.named_parameters() if ".hypernet." in name]
    assert hypernets
    assert all(p.grad is None for p in hypernets)
    model.model.layers[0].moe.router.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    before = [p.detach().clone() for p in hypernets]
    optimizer.step()  # an optimizer that holds them does not decay them either, as they have no gradient
    assert all(torch.equal(p, old) for p, old in zip(hypernets, before, strict=True))


def test_generation_is_deterministic_and_depends_on_the_embedding():
    """Invariant 2: equal parameters give equal bits in every mode and after a reload; another e another router."""
    router, other = hyper(0), hyper(1)
    weight, bias = router.weight_and_bias()
    router.eval()
    with torch.no_grad():
        cached_weight, cached_bias = router.weight_and_bias()
    assert torch.equal(weight, cached_weight)
    assert torch.equal(bias, cached_bias)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.weight_and_bias()[0], weight)
    with torch.no_grad():
        other.embedding.add_(0.1)
    assert not torch.equal(other.weight_and_bias()[0], weight)


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("generated_bias", [True, False])
def test_with_a_frozen_embedding_it_is_a_frozen_linear_router(kind, generated_bias):
    """Invariant 4: identical outputs and expert gradients over 10 SGD steps, inputs included."""
    router = hyper(hypernet_std=0.15, generated_bias=generated_bias)
    linear = TopKRouter(TopKConfig(bias=generated_bias), RouterShape(16, 8, 7))
    with torch.no_grad():
        weight, bias = router.weight_and_bias()
        linear.weight.copy_(weight)
        if generated_bias:
            linear.bias.copy_(bias)
    router.embedding.requires_grad_(False)
    linear.requires_grad_(False)
    one, other = layer_of(router, kind), layer_of(linear, kind)
    optimizers = [torch.optim.SGD(layer.bank.parameters(), lr=0.05) for layer in (one, other)]
    used = set()
    for step in range(12):
        x = [tokens(19, seed=step, scale=1.0).requires_grad_() for _ in range(2)]
        for layer, inputs, optimizer in zip((one, other), x, optimizers, strict=True):
            optimizer.zero_grad()
            merged = run(layer, inputs, context(3, step=step))
            (merged.out_TD.square().mean() + sum(merged.losses.values())).backward()
        assert torch.equal(x[0].grad, x[1].grad)
        for p, q in zip(one.bank.parameters(), other.bank.parameters(), strict=True):
            assert p.grad.abs().max() > 0
            assert torch.equal(p.grad, q.grad)
        for optimizer in optimizers:
            optimizer.step()
        used.update(assign(router, x[0], context(3)).expert_ids_TK.flatten().tolist())
        assert torch.equal(run(one, x[0], context(3)).out_TD, run(other, x[1], context(3)).out_TD)
    assert used == set(range(8))


def test_gradient_of_the_embedding_against_finite_differences():
    """dL/de goes through the whole generation: fp64 differences of the layer's output along each e_i."""
    layer = layer_of(hyper(hyper_dim=5, hyper_hidden=12, hypernet_std=0.5)).double()
    x = tokens(9, scale=1.0).double()
    e = layer.router.embedding

    def value():
        return run(layer, x, context(3)).out_TD.sin().sum()

    value().backward()
    for i in range(5):
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                e[i] += sign * 1e-6
                sides.append(value().item())
                e[i] -= sign * 1e-6
        assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(float(e.grad[i]), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("hyper_hidden", "frozen"), [(256, 1_122_576), (64, 283_728)])
def test_parameter_census(hyper_hidden, frozen):
    """Invariant 16: 256 trained and 1,122,576 frozen a layer; hyper_hidden takes effect (it is dead as released)."""
    (router,) = HyperRouter.build(HyperRouterConfig(hyper_hidden=hyper_hidden), RouterShape(256, 16, 7), 1)
    assert sum(p.numel() for p in router.parameters() if not p.requires_grad) == frozen
    assert sum(p.numel() for p in router.parameters() if p.requires_grad) == 256
    config = small_config(
        d_model=256, num_experts=16, router={"type": "hyper_router", "hyper_hidden": hyper_hidden}, num_heads=8
    )
    counted = census(config)
    assert counted.frozen == 2 * frozen
    assert counted.routers == 2 * (frozen + 256)


@pytest.mark.parametrize("changes", [{"hyper_dim": 10}, {"generated_bias": False}], ids=str)
def test_sizes_follow_every_option(changes):
    router = hyper(hyper_hidden=4, **changes)
    hyper_dim = changes.get("hyper_dim", 16)
    outputs = 8 * (16 if changes.get("generated_bias") is False else 17)
    assert router.embedding.shape == (hyper_dim,)
    assert sum(p.numel() for p in router.hypernet.parameters()) == 4 * hyper_dim + 4 + 4 * outputs + outputs


def weight_stds(num_layers=4, seeds=6, **options):
    """Standard deviations of the generated weights at d_model 256 with 16 experts, one a layer and seed."""
    config = HyperRouterConfig(**options)
    routers = [router for seed in range(seeds) for router in initialised(config, seed, 256, 16, num_layers)]
    return torch.tensor([router.weight_and_bias()[0].std().item() for router in routers])


@pytest.mark.parametrize(("hyper_hidden", "golden"), [(256, 0.072), (64, 0.036)])
def test_initial_scale_as_released(hyper_hidden, golden):
    """Section 1.3 of the notes: 0.072 for 256 hidden units, 0.036 for 64; 0.02 |h| with E|h|^2 = h d 0.02^2 / 2."""
    assert golden == pytest.approx(0.02 * math.sqrt(hyper_hidden * 256 * 0.02**2 / 2), rel=0.01)
    stds = weight_stds(hyper_hidden=hyper_hidden)
    assert float(stds.square().mean().sqrt()) == pytest.approx(golden, rel=0.06)


@pytest.mark.parametrize("target", [0.02, 0.072, 0.2])
def test_target_std_with_a_hypernet_a_layer(target):
    """Invariant 17: within 10 % in each layer and for each seed."""
    stds = weight_stds(2, 4, target_router_std=target)
    assert ((stds / target - 1).abs() < 0.1).all()
    assert len(stds) == 8


@pytest.mark.parametrize("target", [0.02, 0.2])
def test_target_std_with_one_hypernet(target):
    """Invariant 17: one network meets several embeddings, so the target holds in the mean over layers."""
    stds = weight_stds(6, 4, target_router_std=target, hypernet_scope="model")
    assert float(stds.square().mean().sqrt()) == pytest.approx(target, rel=0.1)
    assert ((stds / target - 1).abs() < 0.35).all()


def test_target_std_does_not_depend_on_the_hypernet_std():
    stds = weight_stds(1, 3, target_router_std=0.05, hypernet_std=0.5)
    assert ((stds / 0.05 - 1).abs() < 0.1).all()


def test_biases_of_the_hypernet_start_at_zero_and_the_embedding_at_unit_variance():
    router = hyper(d_model=256, num_experts=16)
    assert (router.hypernet.hidden_bias == 0).all()
    assert (router.hypernet.output_bias == 0).all()
    assert router.embedding.std().item() == pytest.approx(1.0, abs=0.15)
    assert router.hypernet.hidden_weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert router.hypernet.output_weight.std().item() == pytest.approx(0.02, rel=0.02)


class Counter:
    """Counts how often a hypernetwork generates."""

    def __init__(self, net):
        self.count = 0
        net.register_forward_hook(self)

    def __call__(self, *_):
        self.count += 1


def evaluate(router, x):
    with torch.no_grad():
        return router.assign(x, token_ids(len(x)), context(training=False)).logits_TE


def fresh(router, x):
    """What a router without a cache would say."""
    weight, bias = copy.deepcopy(router).train().weight_and_bias()
    return F.linear(x, weight, bias).detach()


def test_weights_are_generated_once_in_evaluation():
    router, x = hyper(), tokens()
    counter = Counter(router.hypernet)
    router.eval()
    for _ in range(5):
        evaluate(router, x)
    assert counter.count == 1
    router.train()
    assign(router, x, context())
    assign(router, x, context())
    assert counter.count == 3


def test_the_cache_never_carries_a_gradient():
    router, x = hyper(), tokens()
    router.eval()
    evaluate(router, x)
    assign(router, x, context(training=False)).weights_TK[:, 0].sum().backward()
    assert router.embedding.grad.abs().max() > 0


def change_in_place(router):
    with torch.no_grad():
        router.embedding.mul_(-2.0)


def change_the_network(router):
    with torch.no_grad():
        router.hypernet.output_weight.mul_(-2.0)


def load_other_values(router):
    router.load_state_dict(hyper(seed=8).state_dict())


def assign_other_values(router):
    router.load_state_dict({k: v.clone() for k, v in hyper(seed=8).state_dict().items()}, assign=True)


def change_behind_the_version(router):
    router.train()
    router.embedding.data.mul_(-2.0)  # as optimizers of data-parallel engines write; the version does not count it
    router.eval()


def change_precision(router):
    router.bfloat16()


def replace_the_parameter(router):
    router.embedding = torch.nn.Parameter(-2.0 * router.embedding.detach())


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        change_the_network,
        load_other_values,
        assign_other_values,
        change_behind_the_version,
        change_precision,
        replace_the_parameter,
    ],
    ids=lambda change: change.__name__,
)
def test_the_cache_is_never_stale(change):
    router, x = hyper(), tokens()
    router.eval()
    before = evaluate(router, x)
    change(router)
    after = evaluate(router, x)
    torch.testing.assert_close(after, fresh(router.float(), x), atol=1e-4, rtol=1e-4)
    assert (after - before).abs().max() > 1e-4


def test_the_cache_survives_inference_mode():
    """Weights cached as inference tensors serve under no_grad, and training afterwards works."""
    router, x = hyper().eval(), tokens()
    with torch.inference_mode():
        first = router.assign(x, token_ids(23), context(training=False)).logits_TE
    assert torch.equal(evaluate(router, x), first)
    router.train()
    assign(router, x, context()).weights_TK[:, 0].sum().backward()
    assert router.embedding.grad is not None


def test_a_cached_router_can_be_copied():
    router, x = hyper().eval(), tokens()
    expected = evaluate(router, x)
    twin = copy.deepcopy(router)
    assert torch.equal(evaluate(twin, x), expected)
    with torch.no_grad():
        twin.hypernet.output_weight.mul_(-1.0)
    assert not torch.equal(evaluate(twin, x), expected)
    assert torch.equal(evaluate(router, x), expected)


SHARED = {"type": "hyper_router", "hypernet_scope": "model", "hyper_hidden": 16, "hypernet_std": 0.15}


def test_one_hypernet_serves_all_layers():
    """Its parameters belong to the first MoE layer alone and are counted once; each layer has an embedding."""
    model = small_model(num_layers=3, moe_layers=[0, 2], router=SHARED)
    names = [name for name, _ in model.named_parameters() if "router" in name]
    assert sum("hypernet" in name for name in names) == 4
    assert all(name.startswith("model.layers.0.") for name in names if "hypernet" in name)
    assert sum(name.endswith("embedding") for name in names) == 2
    assert [name for name in model.state_dict() if "router" in name] == names
    first, last = model.routers().values()
    weights = [router.weight_and_bias()[0] for router in (first, last)]
    assert not torch.equal(*weights)
    assert torch.equal(last.weight_and_bias()[0], first.hypernet(last.embedding).view(4, 17)[:, :16])
    per_layer = census(small_config(num_layers=3, moe_layers=[0, 2], router={**SHARED, "hypernet_scope": "layer"}))
    shared = census(model.config)
    assert per_layer.frozen == 2 * shared.frozen == 2 * (16 * 16 + 16 + 68 * 16 + 68)
    assert shared.frozen == sum(p.numel() for p in model.parameters() if not p.requires_grad)


def test_the_shared_hypernet_survives_saving_copying_and_conversion(tmp_path):
    model = small_model(router=SHARED, seed=4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        expected = model(text()).logits
    model.save_pretrained(tmp_path)
    loaded = SmoeForCausalLM.from_pretrained(tmp_path).eval()
    twin = copy.deepcopy(model)
    for other in (loaded, twin):
        with torch.no_grad():
            assert torch.equal(other(text()).logits, expected)
            first, last = other.routers().values()
            before = last.weight_and_bias()[0].clone()
            first.hypernet.output_weight.mul_(2.0)  # shared within the copy ...
            assert torch.equal(last.weight_and_bias()[0], 2 * before)
    with torch.no_grad():
        assert torch.equal(model(text()).logits, expected)  # ... and with no one else
    double = copy.deepcopy(model).double()
    assert double(text()).logits.dtype == torch.float64
    torch.testing.assert_close(double(text()).logits.float(), expected, atol=1e-4, rtol=1e-4)


def test_embeddings_of_layers_differ_and_values_are_keyed():
    routers = initialised(HyperRouterConfig(hypernet_scope="model"), 0, 16, 8, 3)
    again = initialised(HyperRouterConfig(hypernet_scope="model"), 0, 16, 8, 3)
    embeddings = [router.embedding for router in routers]
    assert not torch.equal(embeddings[0], embeddings[1])
    assert not torch.equal(embeddings[1], embeddings[2])
    assert all(torch.equal(a, b) for a, b in zip(routers.parameters(), again.parameters(), strict=True))
    separate = initialised(HyperRouterConfig(), 0, 16, 8, 2)
    assert not torch.equal(separate[0].hypernet.output_weight, separate[1].hypernet.output_weight)


def test_a_bf16_hypernet_generates_in_fp32():
    """Generation, too, is fp32 arithmetic on the rounded values."""
    router = hyper(hypernet_std=0.2).bfloat16()
    weight, bias = router.weight_and_bias()
    assert weight.dtype == bias.dtype == torch.float32
    expected = copy.deepcopy(router).float().weight_and_bias()[0]
    assert torch.equal(weight, expected)
    assert not torch.equal(weight, weight.bfloat16().float())
