"""The model as transformers sees it: shapes of every option, losses, saving, generation, masks."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from support.small_model import VOCAB, small_config, small_model, text
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from smoe_train.data.batches.loader import IGNORED_LABEL
from smoe_train.model import (
    RankReduction,
    SmoeConfig,
    SmoeForCausalLM,
    SmoeModel,
    language_model_loss,
)
from smoe_train.model.attention import rotary_angles, rotate, visible_keys
from smoe_train.schedules import Knobs

ARCHITECTURES = [
    {"positions": positions, "norm_position": place, "norm": norm, "feed_forward": kind, "moe_layers": layers}
    for (positions, place), (norm, kind), layers in itertools.product(
        [("rotary", "pre"), ("learned", "post"), ("rotary", "post")],
        [("layer_norm", "relu"), ("rms_norm", "swiglu"), ("layer_norm", "gelu")],
        [[0, 1], [1], []],
    )
]
every_architecture = pytest.mark.parametrize(
    "options", ARCHITECTURES, ids=lambda o: "-".join(str(v).replace(" ", "") for v in o.values())
)


@every_architecture
def test_every_architecture_runs_and_trains(options):
    """Logits of the right shape, causal, with a gradient for every trainable parameter."""
    model = small_model(**options).train()
    ids = text(3, 14)
    output = model(ids, labels=ids)
    assert output.logits.shape == (3, 14, VOCAB)
    assert sorted(output.routing_stats) == list(options["moe_layers"])
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    changed = ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % VOCAB
    with torch.no_grad():
        model.eval()
        one, other = model(ids).logits, model(changed).logits
    torch.testing.assert_close(one[:, :9], other[:, :9], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(one[:, 9:], other[:, 9:], atol=1e-3)


@every_architecture
def test_every_architecture_generates_with_and_without_cache(options):
    """Logits from a cache, token by token and in chunks, are those of one pass; also behind left padding."""
    model = small_model(**options).eval()
    ids = text(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        for attention_mask in (None, mask):
            whole = model(ids, attention_mask=attention_mask).logits
            cache, parts = None, []
            for start, end in ((0, 4), (4, 5), (5, 6), (6, 9), (9, 10)):
                seen = None if attention_mask is None else attention_mask[:, :end]
                output = model(ids[:, start:end], attention_mask=seen, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                parts.append(output.logits)
            real = mask.bool() if attention_mask is not None else torch.ones_like(ids, dtype=torch.bool)
            torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], atol=2e-5, rtol=1e-4)


@every_architecture
def test_save_and_load(options, tmp_path):
    """save_pretrained, AutoConfig, AutoModel and AutoModelForCausalLM give back the same model."""
    model = small_model(**options, seed=11).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
        expected = model(text()).logits
        hidden = model.model(text()).last_hidden_state
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, SmoeConfig)
    assert config.to_dict()["router"] == model.config.router
    assert list(config.moe_layers) == options["moe_layers"]
    with torch.no_grad():
        for loader in (AutoModelForCausalLM, SmoeForCausalLM):
            loaded = loader.from_pretrained(tmp_path)
            assert type(loaded) is SmoeForCausalLM
            torch.testing.assert_close(loaded.eval()(text()).logits, expected, atol=1e-6, rtol=0)
        body = AutoModel.from_pretrained(tmp_path)
        assert type(body) is SmoeModel
        torch.testing.assert_close(body.eval()(text()).last_hidden_state, hidden, atol=1e-6, rtol=0)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_generation_behind_left_padding(positions):
    """A padded row of a batch continues as it does alone."""
    model = small_model(positions=positions).eval()
    ids = text(1, 6)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(ids, **options)[:, 6:]
    batch = torch.cat([torch.cat([torch.full((1, 3), 7), ids], 1), text(1, 9, seed=3)])
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    for use_cache in (True, False):
        continued = model.generate(batch, attention_mask=mask, use_cache=use_cache, **options)[:, 9:]
        assert torch.equal(continued[:1], alone)
        assert torch.equal(continued[1:], model.generate(batch[1:], **options)[:, 9:])


def test_generation_uses_the_knobs():
    model = small_model().eval()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    results = {k: model.generate(text(4, 4), knobs=Knobs(0, k), **options) for k in (1, 2, 4)}
    assert torch.equal(results[2], model.generate(text(4, 4), **options))
    assert not torch.equal(results[1], results[4])


def test_loss_is_that_of_transformers_labels():
    """labels[b, s] is what position s - 1 predicts; -100 is ignored; written out as a loop."""
    model = small_model(moe_layers=[]).eval()
    ids = text(2, 7)
    labels = ids.clone()
    labels[0, 3] = labels[1, 6] = IGNORED_LABEL
    output = model(ids, labels=labels)
    terms = [
        -math.log(float(torch.softmax(output.logits[b, s - 1].detach().double(), 0)[labels[b, s]]))
        for b in range(2)
        for s in range(1, 7)
        if labels[b, s] != IGNORED_LABEL
    ]
    assert len(terms) == 10
    assert output.loss.item() == pytest.approx(sum(terms) / 10, rel=1e-5)


def test_loss_includes_the_weighted_router_losses():
    """Task loss + coefficient * mean over the MoE layers of each router loss."""
    model = small_model(load_balance_coefficient=0.3, z_loss_coefficient=0.02).train()
    layers = {}
    for index, block in enumerate(model.model.layers):
        block.moe.register_forward_hook(lambda _m, _i, merged, index=index: layers.update({index: merged.losses}))
    ids = text()
    output = model(ids, labels=ids)
    assert sorted(layers) == [0, 1]
    balance, z = ((layers[0][name] + layers[1][name]).item() / 2 for name in ("load_balance_loss", "z_loss"))
    task = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert output.loss.item() == pytest.approx(task + 0.3 * balance + 0.02 * z, rel=1e-5)
    assert output.router_losses["load_balance_loss"].item() == pytest.approx(balance, rel=1e-6)
    assert output.router_losses["z_loss"].item() == pytest.approx(z, rel=1e-6)
    model.config.load_balance_coefficient = model.config.z_loss_coefficient = 0.0
    assert model(ids, labels=ids).loss.item() == pytest.approx(task, rel=1e-6)


def test_a_coefficient_reaches_the_router_only_when_positive():
    """Invariant 14 in the whole model: the router's gradient changes with the coefficient and only with it."""
    gradients = {}
    for coefficient in (0.0, 1.0):
        model = small_model(load_balance_coefficient=coefficient).train()
        model(text(), labels=text()).loss.backward()
        gradients[coefficient] = model.model.layers[1].moe.router.weight.grad
    plain = small_model(load_balance_coefficient=0.0).train()
    output = plain(text())
    shifted = F.pad(text()[:, 1:], (0, 1), value=IGNORED_LABEL)
    language_model_loss(output.logits, shifted).backward()
    task_alone = plain.model.layers[1].moe.router.weight.grad
    assert torch.equal(gradients[0.0], task_alone)
    assert (gradients[1.0] - task_alone).abs().max() > 1e-4


def test_task_loss_is_fp32_whatever_the_logits():
    logits = torch.randn(2, 3, VOCAB)
    labels = text(2, 3)
    low = language_model_loss(logits.bfloat16(), labels)
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(language_model_loss(logits.bfloat16().float(), labels).item(), rel=1e-6)


def test_logits_to_keep():
    model = small_model().eval()
    whole = model(text()).logits
    assert torch.equal(model(text(), logits_to_keep=3).logits, whole[:, -3:])


def test_knobs_choose_k_and_the_configured_k_is_the_default():
    model = small_model(num_experts_per_tok=3).eval()
    outputs = {k: model(text(), knobs=Knobs(0, k)) for k in (1, 3, 4)}
    assert torch.equal(model(text()).logits, outputs[3].logits)
    for k, output in outputs.items():
        slots = output.routing_stats[0]["slots_E"]
        assert slots.sum() == k * 22


def test_a_threshold_reaches_adaptive_gating_below_another_policy():
    """As the curriculum sets it: below 0 one expert for every token, at 1 two, in between some of both."""
    adaptive = {"type": "adaptive", "threshold": 0.15, "base": {"type": "top_k", "init_std": 0.3}}
    model = small_model(router={"type": "sim_smoe", "base": adaptive}).train()
    visited = {}
    for threshold in (None, -1.0, 0.15, 1.0):
        counts = model(text(), knobs=Knobs(0, 2, threshold=threshold)).experts_of_token
        visited[threshold] = torch.stack([counts[0], counts[1]])
    assert (visited[-1.0] == 1).all()
    assert (visited[1.0] == 2).all()
    assert set(visited[0.15].unique().tolist()) == {1, 2}
    assert torch.equal(visited[None], visited[0.15])


def test_sample_index_keys_the_jitter():
    """A sample's noise depends on its place in the global batch, not on the micro-batch that holds it."""
    model = small_model(router={"type": "top_k", "jitter": 0.5, "init_std": 0.3}).train()
    ids, index = text(4), torch.tensor([5, 6, 7, 8])
    whole = model(ids, sample_index=index).logits
    parts = [model(ids[rows], sample_index=index[rows]).logits for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(ids).logits, whole, atol=1e-3)
    assert torch.equal(model(ids, sample_index=torch.arange(4)).logits, model(ids).logits)


def test_ranks_average_to_the_whole_batch():
    """Router losses of two ranks, played one after the other, average to those of their concatenated batch."""
    model = small_model().eval()
    ids = text(4, 9)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    mask[3, 2:] = 0
    whole = model(ids, attention_mask=mask).router_losses
    halves = [(ids[:2], mask[:2]), (ids[2:], mask[2:])]
    recorded = [[], []]
    for rank, (part, real) in enumerate(halves):
        model.model.ranks = RankReduction(lambda value, rank=rank: recorded[rank].append(value) or value, 2)
        model(part, attention_mask=real)
    totals = [one + other for one, other in zip(*recorded, strict=True)]
    assert len(totals) == 3  # real tokens, and each layer's slots
    values = []
    for part, real in halves:
        replay = iter(totals)
        model.model.ranks = RankReduction(lambda value, replay=replay: next(replay), 2)
        values.append(model(part, attention_mask=real).router_losses)
    for name, value in whole.items():
        torch.testing.assert_close((values[0][name] + values[1][name]) / 2, value, atol=1e-6, rtol=1e-5)


def test_dropout_only_in_training():
    model = small_model(dropout=0.4)
    assert not torch.equal(model.train()(text()).logits, model(text()).logits)
    assert torch.equal(model.eval()(text()).logits, model(text()).logits)
    assert torch.equal(model(text()).logits, small_model().eval()(text()).logits)


def test_causal_mask_against_a_loop():
    """A query sees real keys up to itself, and itself always, so that no row is empty."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 1]])
    for past in (0, 2, 4):
        allowed = visible_keys(mask, None, True, 5 - past, past, torch.device("cpu"))
        assert allowed.shape == (2, 1, 5 - past, 5)
        for b, q, key in itertools.product(range(2), range(5 - past), range(5)):
            expected = key == past + q or (key < past + q and bool(mask[b, key]))
            assert bool(allowed[b, 0, q, key]) == expected
    assert visible_keys(None, None, True, 5, 0, torch.device("cpu")) is None
    without = visible_keys(None, None, True, 3, 2, torch.device("cpu"))
    assert without[0, 0].tolist() == [[key <= 2 + q for key in range(5)] for q in range(3)]
    assert visible_keys(None, None, True, 1, 4, torch.device("cpu")).all()


def test_rotation_is_by_position_times_frequency():
    """Each pair (w, w + W/2) is multiplied by exp(i p theta^(-2w/W)), as complex numbers."""
    positions = torch.tensor([[0, 3, 17]])
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    turned = rotate(x, *rotary_angles(positions, 8, 100.0, torch.float64))
    for s, p in enumerate(positions[0].tolist()):
        for w in range(4):
            pair = torch.complex(x[0, :, s, w], x[0, :, s, w + 4])
            expected = pair * torch.polar(
                torch.ones((), dtype=torch.float64), torch.tensor(p * 100.0 ** (-2 * w / 8)).double()
            )
            got = torch.complex(turned[0, :, s, w], turned[0, :, s, w + 4])
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_rotary_models_see_relative_positions_only():
    model = small_model(positions="rotary", moe_layers=[]).eval()
    ids = text(1, 8)
    shifted = model(ids, position_ids=torch.arange(8).unsqueeze(0) + 9).logits
    torch.testing.assert_close(shifted, model(ids).logits, atol=1e-4, rtol=1e-4)
    learned = small_model(positions="learned", moe_layers=[]).eval()
    assert not torch.allclose(learned(ids, position_ids=torch.arange(8).unsqueeze(0) + 9).logits, learned(ids).logits)


def test_rope_theta_takes_effect():
    one, other = (small_model(rope_theta=theta).eval()(text()).logits for theta in (10000.0, 10.0))
    assert not torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings(tied, tmp_path):
    model = small_model(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    loaded = SmoeForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    output = loaded(text(), labels=text())
    output.loss.backward()
    assert loaded.lm_head.weight.grad.abs().max() > 0


def test_transformers_names_of_sizes():
    config = small_config()
    assert config.hidden_size == 16
    assert config.num_hidden_layers == 2
    assert config.num_attention_heads == 2
    assert config.max_position_embeddings == 32
