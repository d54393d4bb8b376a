"""Every policy inside a whole model: causality, padding, activation checkpointing, saving and generation."""

import copy

import pytest
import torch
from support.router_cases import every_router, every_router_with
from support.small_model import small_model, text

from smoe_train.model import SmoeForCausalLM
from smoe_train.schedules import Knobs


def model_of(case, **changes):
    case = case.with_options(hyper_hidden=16, hypernet_std=0.15, init_std=0.3)
    return small_model(router=case.options.model_dump(mode="json"), **changes)


# Policies with stages decide otherwise late in training: StableMoE from token ids alone.
early_and_late = pytest.mark.parametrize("step", [0, 10**7])


@every_router_with("causal")
@early_and_late
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_causality(case, top_k, step):
    """Invariant 19: changing later tokens changes no earlier logits."""
    model = model_of(case).eval()
    ids = text()
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 5) % 29
    knobs = Knobs(step, top_k)
    with torch.no_grad():
        one, other = model(ids, knobs=knobs).logits, model(changed, knobs=knobs).logits
    torch.testing.assert_close(one[:, :6], other[:, :6], atol=1e-5, rtol=1e-5)
    assert (one[:, 6:] - other[:, 6:]).abs().amax(-1).min() > 1e-3


@every_router
@early_and_late
def test_padding_invariance(case, step):
    """Invariant 18 through attention, positions and routing: pads on either side change no real token's logits."""
    model = model_of(case).eval()
    ids, knobs = text(), Knobs(step, 2)
    plain = model(ids, attention_mask=torch.ones_like(ids), knobs=knobs)
    for left in (False, True):
        pads = torch.full((2, 4), 3)
        padded = torch.cat([pads, ids] if left else [ids, pads], 1)
        mask = torch.cat([0 * pads, ids * 0 + 1] if left else [ids * 0 + 1, 0 * pads], 1)
        output = model(padded, attention_mask=mask, knobs=knobs)
        torch.testing.assert_close(output.logits[mask.bool()].view_as(plain.logits), plain.logits, atol=1e-5, rtol=1e-4)
        for name, value in plain.router_losses.items():
            torch.testing.assert_close(output.router_losses[name], value, atol=1e-6, rtol=1e-5, msg=name)
        for layer, stats in plain.routing_stats.items():
            for name, value in stats.items():
                torch.testing.assert_close(output.routing_stats[layer][name], value, atol=1e-4, rtol=1e-4, msg=name)


def gradients(model, ids, step):
    model.zero_grad()
    torch.manual_seed(0)
    output = model(ids, labels=ids, knobs=Knobs(step, 2))
    output.loss.backward()
    return output.loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@every_router
@pytest.mark.parametrize(("norm_position", "step"), [("pre", 4), ("post", 4), ("post", 10**7)])
def test_recomputed_activations_are_bit_identical(case, norm_position, step):
    """The recomputation routes as the forward pass did, with jitter and dropout on, in dense layers too."""
    case = case.with_options(jitter=0.3)
    model = model_of(case, norm_position=norm_position, dropout=0.1, moe_layers=[1], z_loss_coefficient=0.01).train()
    loss, stored = gradients(model, text(), step)
    calls, assignments = [], []
    moe = model.model.layers[1].moe
    assign = moe.router.assign
    moe.router.assign = lambda *arguments: assignments.append(1) or assign(*arguments)
    moe.bank.experts.register_forward_pre_hook(lambda *_: calls.append("experts"))
    model.recompute_activations()
    loss_again, recomputed = gradients(model, text(), step)
    assert calls == ["experts", "experts"]  # computed again in the backward pass, so the setting does something
    assert len(assignments) == 1  # but routed once
    assert torch.equal(loss, loss_again)
    assert stored.keys() == recomputed.keys()
    for name, gradient in stored.items():
        assert torch.equal(recomputed[name], gradient), name
    model.recompute_activations("none")
    calls.clear()
    gradients(model, text(), step)
    assert calls == ["experts"]
    if "jitter" in type(case.options).model_fields:
        assert not torch.equal(gradients(model, text(), step + 1)[0], loss)  # another step, other noise


@every_router
def test_saved_and_loaded_models_agree(case, tmp_path):
    """Every policy's parameters and options survive save_pretrained and from_pretrained."""
    model = model_of(case, seed=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)  # not the initial values, which a fresh model would have too
        expected = model(text()).logits
    model.save_pretrained(tmp_path)
    loaded = SmoeForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.router == model.config.router
    for name, parameter in model.named_parameters():
        assert loaded.get_parameter(name).requires_grad == parameter.requires_grad, name
    with torch.no_grad():
        torch.testing.assert_close(loaded(text()).logits, expected, atol=1e-6, rtol=0)


@every_router_with("cache")
def test_generation_with_cache_equals_without(case):
    """Greedy generation, one token at a time from a cache or from scratch."""
    model = model_of(case).eval()
    ids = text(2, 5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    assert cached.shape == (2, 11)


@every_router
@early_and_late
def test_evaluation_leaves_the_model_bit_identical(case, step):
    """Invariant 8 and 10: evaluating at other k perturbs nothing that training reads."""
    model = model_of(case).train()
    before = copy.deepcopy(model.state_dict())
    loss, _ = gradients(model, text(), step)
    model.eval()
    with torch.no_grad():
        for top_k in (1, 2, 4):
            model(text(seed=1), knobs=Knobs(9, top_k))
    model.train()
    assert torch.equal(gradients(model, text(), step)[0], loss)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@every_router
def test_deepcopied_models_agree_and_are_independent(case):
    model = model_of(case).eval()
    with torch.no_grad():
        expected = model(text()).logits
        twin = copy.deepcopy(model)
        assert torch.equal(twin(text()).logits, expected)
        for router in twin.routers().values():
            for parameter in router.parameters():
                parameter.mul_(-1.0)
        assert not torch.equal(twin(text()).logits, expected)
        assert torch.equal(model(text()).logits, expected)


@every_router
@early_and_late
def test_autocast_and_bf16_models_train_a_step(case, step):
    """Losses are finite and near fp32's; every trainable parameter's gradient is finite."""
    model = model_of(case).train()
    ids, knobs = text(3, 16), Knobs(step, 2)
    exact = model(ids, labels=ids, knobs=knobs).loss.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids, knobs=knobs).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(exact, rel=0.05)
    low = copy.deepcopy(model).bfloat16()
    low.zero_grad()
    loss = low(ids, labels=ids, knobs=knobs).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(exact, rel=0.05)
    for trained in (model, low):
        assert all(p.grad.isfinite().all() for p in trained.parameters() if p.requires_grad)


@every_router
def test_a_few_sgd_steps_reduce_the_loss(case):
    """The layer learns through the policy: 30 steps on one batch."""
    model = model_of(case).train()
    ids = text(4, 16)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        loss = model(ids, labels=ids, knobs=Knobs(step, 2)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
