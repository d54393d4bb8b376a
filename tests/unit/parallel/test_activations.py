"""What a forward pass keeps: by hand, and against what autograd says it keeps."""

import pytest
import torch
from support.small_model import small_model

from smoe_train.parallel.footprint import Activations

# 10 tokens of width 8, 3 layers of which 2 have experts of width 5, two a token; the dense one has width 12.
SHAPE = {
    "tokens": 10,
    "d_model": 8,
    "layers": 3,
    "moe_layers": 2,
    "top_k": 2,
    "d_ff": 12,
    "d_ff_expert": 5,
    "feed_forward": "gelu",
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    ("changes", "values_a_token"),
    [
        # A layer: 8 x 8 of attention, 2 x 8 around; dense 2 x 12; experts 2 x (2 x 8 + 2 x 5); at the end 2 x 8.
        ({}, 3 * (64 + 16) + 24 + 2 * 52 + 16),
        ({"feed_forward": "relu"}, 3 * (64 + 16) + 12 + 2 * 42 + 16),
        ({"feed_forward": "swiglu"}, 3 * (64 + 16) + 48 + 2 * 72 + 16),
        ({"rotary": False}, 3 * (48 + 16) + 24 + 2 * 52 + 16),
        ({"rms_norm": True}, 3 * (72 + 24) + 24 + 2 * 52 + 24),
        ({"dropout": True}, 3 * (72 + 24) + 24 + 2 * 52 + 24),
        # What is computed again: the attention keeps its input alone, and the feed-forward's norm is part of it.
        ({"recompute": "attention"}, 3 * (8 + 8) + 24 + 2 * 52 + 16),
        ({"recompute": "experts"}, 3 * (64 + 16) + 2 * 16 + 16),
        ({"recompute": "all"}, 3 * (8 + 8) + 2 * 16 + 16),
        ({"recompute": "all", "dropout": True, "rms_norm": True}, 3 * (8 + 16) + 2 * 16 + 32),
    ],
)
def test_what_is_kept_by_hand(changes, values_a_token):
    shape = Activations(**{**SHAPE, **changes})
    assert shape.kept_bytes(4) == 10 * 4 * values_a_token
    # In bf16 the routers of both MoE layers keep their tokens in fp32.
    assert shape.kept_bytes(2) == 10 * (2 * values_a_token + 2 * 4 * 8)


@pytest.mark.parametrize(
    ("changes", "on_top"),
    [
        ({}, 16 * 100 * 10),  # the loss: 16 bytes a logit
        ({"logits_chunk_tokens": 4}, 16 * 100 * 4),
        ({"logits_chunk_tokens": 1}, 10 * 4 * 52),  # the gradients of a layer's experts
        ({"logits_chunk_tokens": 1, "recompute": "experts"}, 10 * 4 * 2 * 52),  # which are computed again first
        ({"vocab_size": 1}, 10 * 4 * (52 + 1)),  # with the logits that the output holds
        ({"vocab_size": 0, "moe_layers": 0}, 10 * 4 * 24),
        ({"vocab_size": 0, "moe_layers": 0, "recompute": "attention"}, 10 * 4 * 64),
    ],
)
def test_the_moment_of_the_peak_by_hand(changes, on_top):
    shape = Activations(**{**SHAPE, **changes})
    assert shape.peak_bytes(4) - shape.kept_bytes(4) == on_top


@pytest.mark.parametrize("feed_forward", ["relu", "gelu", "swiglu"])
@pytest.mark.parametrize("recompute", ["none", "attention", "experts", "all"])
@pytest.mark.parametrize("rotary", [True, False])
def test_autograd_keeps_what_is_estimated(feed_forward, recompute, rotary):
    tokens, width, d_ff, vocabulary = (4, 32), 48, 80, 64
    model = small_model(
        d_model=width,
        num_heads=2,
        num_layers=3,
        d_ff=112,
        d_ff_expert=d_ff,
        moe_layers=[0, 2],
        num_experts=4,
        vocab_size=vocabulary,
        max_sequence_length=tokens[1],
        feed_forward=feed_forward,
        positions="rotary" if rotary else "learned",
    ).train()
    model.recompute_activations(recompute)
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held and tensor.shape[-1:] != (vocabulary,):
            kept[storage.data_ptr()] = storage  # alive, so that no other takes its place
        return tensor

    ids = torch.randint(0, vocabulary, tokens, generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(ids, labels=ids)
    found = sum(storage.nbytes() for storage in kept.values())
    shape = Activations(128, width, 3, 2, 2, 112, d_ff, feed_forward, vocabulary, rotary, recompute=recompute)
    estimate = shape.kept_bytes(4)
    assert output.loss.requires_grad
    assert estimate <= found <= 1.15 * estimate + 20_000  # indices and statistics of a few values a token
