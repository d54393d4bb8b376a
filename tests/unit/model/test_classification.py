"""The classifier: pooling, padding, attention in both directions, saving; and documents that do not see each other."""

import math

import pytest
import torch
from support.small_model import VOCAB, small_config, small_model
from transformers import AutoModelForSequenceClassification

from smoe_train.model import SmoeForSequenceClassification, StackedExperts
from smoe_train.model.classification import classification_loss, pool
from smoe_train.routing import Router
from smoe_train.schedules import Knobs

POOLINGS = ["last", "first", "mean", "max"]
LENGTHS = [5, 9, 1]


def classifier(labels=("no", "yes", "perhaps"), causal=False, pooling="mean", dropout=0.0, **changes):
    config = small_config(**changes).for_classification(labels, causal, pooling, dropout)
    return SmoeForSequenceClassification(config).eval()


def rows(width=12, left=False):
    """Three texts of unlike length, padded to one width."""
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(0, VOCAB, (length,), generator=generator) for length in LENGTHS]
    ids, mask = torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, width, dtype=torch.int64)
    for row, text in enumerate(texts):
        start = width - len(text) if left else 0
        ids[row, start : start + len(text)] = text
        mask[row, start : start + len(text)] = 1
    return texts, ids, mask


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_padding_on_either_side_changes_nothing(pooling, causal, positions):
    model = classifier(causal=causal, pooling=pooling, positions=positions, moe_layers=[0, 1]).double()
    texts, ids, mask = rows()
    alone = torch.cat([model(text[None]).logits for text in texts])
    assert alone.shape == (3, 3)
    _, left_ids, left_mask = rows(left=True)
    for padded_ids, padded_mask in ((ids, mask), (left_ids, left_mask), (ids + 7 * (1 - mask), mask)):
        found = model(padded_ids, padded_mask)
        torch.testing.assert_close(found.logits, alone, rtol=1e-9, atol=1e-9)
        visited = [stats["tokens"] for stats in found.routing_stats.values()]
        assert all(float(count) == sum(LENGTHS) for count in visited), "padding is routed nowhere"
        assert all((counts[padded_mask == 0] == 0).all() for counts in found.experts_of_token.values())


def test_router_losses_are_those_of_the_real_tokens():
    model = classifier(moe_layers=[0, 1], router={"type": "top_k", "init_std": 1.0}).double().train()
    _, ids, mask = rows()
    padded = model(ids, mask).router_losses
    wider = model(*rows(width=31)[1:]).router_losses
    given = model(ids, mask, tokens_per_micro_batch=float(sum(LENGTHS))).router_losses
    for name, value in padded.items():
        torch.testing.assert_close(wider[name], value, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(given[name], value, rtol=1e-6, atol=1e-9)


def test_attention_sees_what_it_is_configured_to_see():
    for causal in (True, False):
        model = classifier(causal=causal).double()
        ids = torch.arange(8)[None] % VOCAB
        other = ids.clone()
        other[0, -1] += 1
        first, second = (model.model(one).last_hidden_state for one in (ids, other))
        assert torch.equal(first[0, 0], second[0, 0]) == causal
        masked = model.model(ids, torch.ones_like(ids)).last_hidden_state
        torch.testing.assert_close(masked, first, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_against_a_loop(pooling):
    x = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1] * 6, [0] * 6])
    by_hand = {
        "last": lambda rows: rows[-1],
        "first": lambda rows: rows[0],
        "mean": lambda rows: sum(rows) / len(rows),
        "max": lambda rows: torch.stack(rows).max(dim=0).values,
    }
    found = pool(x, mask, pooling)
    for row in range(3):
        kept = [x[row, place] for place in range(6) if mask[row, place]]
        torch.testing.assert_close(found[row], by_hand[pooling](kept))
    assert (found[3] == 0.0).all(), "a row of padding alone is no NaN"
    torch.testing.assert_close(pool(x, None, pooling)[2], found[2])


def test_losses_by_hand():
    logits = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    first, second = -1.0 + math.log(math.e + 1.0), math.log(1.0 + math.exp(2.0))
    assert float(classification_loss(logits, torch.tensor([0, 0]))) == pytest.approx((first + second) / 2)
    numbers = torch.tensor([[1.0], [3.0]])
    assert float(classification_loss(numbers, torch.tensor([2.0, 5.0]))) == pytest.approx((1.0 + 4.0) / 2)


def test_the_loss_holds_the_weighted_router_losses():
    model = classifier(moe_layers=[0, 1], load_balance_coefficient=0.5)
    _, ids, mask = rows()
    labels = torch.tensor([0, 2, 1])
    output = model(ids, mask, labels=labels, knobs=Knobs(0, 2, loss_weights={"load_balance_loss": 0.5}))
    expected = classification_loss(output.logits, labels) + 0.25 * output.router_losses["load_balance_loss"]
    torch.testing.assert_close(output.loss, expected)


def test_a_number_is_the_output_of_a_regression():
    model = classifier(labels=())
    assert model(rows()[1], rows()[2]).logits.shape == (3, 1)
    assert model.config.problem_type == "regression"


def test_save_and_load(tmp_path):
    model = classifier(moe_layers=[1], pooling="max", causal=True, dropout=0.25)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.id2label == {0: "no", 1: "yes", 2: "perhaps"}
    _, ids, mask = rows()
    assert torch.equal(loaded(ids, mask).logits, model(ids, mask).logits)


def test_a_language_model_becomes_a_classifier_with_a_new_head(tmp_path):
    source = small_model(moe_layers=[0, 1])
    source.save_pretrained(tmp_path)
    config = source.config.for_classification(("a", "b"), True, "mean", 0.0)
    loaded = SmoeForSequenceClassification.from_pretrained(tmp_path, config=config)
    for name, value in source.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    fresh = SmoeForSequenceClassification(config)
    assert torch.equal(loaded.score.weight, fresh.score.weight)
    assert float(fresh.score.weight.detach().std()) > 0.0


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_packed_documents_are_as_if_each_were_alone(positions):
    model = small_model(positions=positions, moe_layers=[0, 1]).double().eval()
    ids = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 3 + [1] + [2] * 8])
    packed = model(ids, document_ids=documents).logits
    for row, lengths in enumerate([[5, 7], [3, 1, 8]]):
        for part, logits in zip(ids[row].split(lengths), packed[row].split(lengths), strict=True):
            torch.testing.assert_close(model(part[None]).logits[0], logits, rtol=1e-9, atol=1e-9)
    plain = model(ids).logits
    assert not torch.allclose(plain[0, 5:], packed[0, 5:]), "without documents the second sees the first"


@pytest.mark.parametrize("part", ["router", "experts", "embeddings"])
def test_freezing_excludes_a_part_and_nothing_else(part):
    model = classifier(moe_layers=[0, 1], positions="learned")
    model.freeze([part])
    kinds = {"router": Router, "experts": StackedExperts, "embeddings": torch.nn.Embedding}
    frozen = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, kinds[part])
        for parameter in module.parameters()
    }
    assert frozen
    assert all(parameter.requires_grad != (id(parameter) in frozen) for parameter in model.parameters())
    assert model.frozen_parts == {part}
    assert not classifier().frozen_parts


def test_an_embedding_inside_a_router_is_the_routers():
    router = {"type": "stable_moe", "distilled_dim": 4}
    model = classifier(moe_layers=[0, 1], router=router)
    model.freeze(["embeddings"])
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.embed_tokens.weight"]
    model = classifier(moe_layers=[0, 1], router=router)
    model.freeze(["router"])
    assert not model.model.layers[0].moe.router.distilled.embedding.weight.requires_grad
