"""The chunked loss against an fp64 loop over tokens, and that nothing of the size of all logits ever exists."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_model import VOCAB, small_model, text
from support.tiny import tiny_recipe
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smoe_train.assembly import build_model
from smoe_train.data.batches.loader import IGNORED_LABEL, EvaluationBatches, MicroBatch
from smoe_train.evaluation import TextFigures, evaluate_language_model
from smoe_train.model import language_model_loss
from smoe_train.model.chunked_loss import chunked_language_model_loss
from smoe_train.model.performance import PerformanceConfig, apply_performance
from smoe_train.schedules import Knobs
from smoe_train.training.objectives import language_modelling

# Norm of the error over the norm of the gradient. In bf16 it is that of the gradients of logits, rounded to 8 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3}


def one_by_one(hidden_TD, weight_VD, labels, num_targets):
    """Loss and gradients of hidden states and weight from the definition, a token at a time, in fp64."""
    hidden_TD, weight_VD = hidden_TD.detach().double(), weight_VD.detach().double()
    loss, d_hidden, d_weight = 0.0, torch.zeros_like(hidden_TD), torch.zeros_like(weight_VD)
    for t, label in enumerate(labels.tolist()):
        if label == IGNORED_LABEL:
            continue
        p_V = torch.softmax(weight_VD @ hidden_TD[t], 0)
        loss -= float(p_V[label].log()) / num_targets
        p_V[label] -= 1.0
        d_hidden[t] = weight_VD.T @ p_V / num_targets
        d_weight += torch.outer(p_V, hidden_TD[t]) / num_targets
    return loss, d_hidden, d_weight


def operands(dtype, num_tokens=23, d_model=12, vocab=37, ignored=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, d_model, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, d_model, generator=generator, dtype=torch.float64) * 0.5
    labels = torch.randint(0, vocab, (num_tokens,), generator=generator)
    labels[list(ignored)] = IGNORED_LABEL
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def assert_gradients(found, expected, dtype):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= TOLERANCE[dtype] * other.norm()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("num_targets", [None, 9.5])
# Chunks of 4: the second and third have no label at all. 23 and 40 hold all tokens, 7 and 4 do not divide them.
@pytest.mark.parametrize("ignored", [(), (0, 22), range(4, 12)], ids=["all", "ends", "chunks"])
@pytest.mark.parametrize("chunk", [1, 4, 7, 23, 40])
def test_loss_and_gradients_are_those_of_the_definition(dtype, num_targets, ignored, chunk):
    hidden, weight, labels = operands(dtype, ignored=ignored)
    loss = chunked_language_model_loss(hidden, weight, labels, chunk, num_targets)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected, *gradients = one_by_one(hidden, weight, labels, num_targets or 23 - len(ignored))
    assert loss.item() == pytest.approx(expected, rel={torch.bfloat16: 4e-3}.get(dtype, 1e-6))
    (0.25 * loss).backward()
    assert_gradients([4 * hidden.grad, 4 * weight.grad], gradients, dtype)
    with torch.no_grad():  # as in validation and when statistics are counted ahead
        assert torch.equal(chunked_language_model_loss(hidden, weight, labels, chunk, num_targets), loss)


@settings(max_examples=30, deadline=None)
@given(
    num_tokens=st.integers(1, 40),
    vocab=st.integers(2, 50),
    chunk=st.integers(1, 45),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_sizes(num_tokens, vocab, chunk, seed, data):
    ignored = data.draw(st.sets(st.integers(0, num_tokens - 1), max_size=num_tokens - 1))
    hidden, weight, labels = operands(torch.float64, num_tokens, 5, vocab, ignored, seed)
    loss = chunked_language_model_loss(hidden, weight, labels, chunk)
    expected, *gradients = one_by_one(hidden, weight, labels, num_tokens - len(ignored))
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert_gradients(torch.autograd.grad(loss, [hidden, weight]), gradients, torch.float64)


def test_bf16_is_as_exact_as_the_plain_form():
    """The loss is computed in fp32, and the weight's gradient does not lose bits with the number of chunks."""
    hidden, weight, labels = operands(torch.bfloat16, 512, 32, 64)
    expected, *gradients = one_by_one(hidden, weight, labels, 512)
    plain = language_model_loss((hidden @ weight.T).unsqueeze(0), labels.unsqueeze(0))
    found = chunked_language_model_loss(hidden, weight, labels, 4)
    assert found.item() == pytest.approx(plain.item(), rel=1e-6)
    assert found.item() == pytest.approx(expected, rel=2e-3)
    errors = [
        [float((one.double() - other).norm()) for one, other in zip(grads, gradients, strict=True)]
        for grads in (torch.autograd.grad(loss, [hidden, weight]) for loss in (found, plain))
    ]
    assert all(ours <= 1.25 * theirs for ours, theirs in zip(*errors, strict=True))


def test_a_frozen_weight_gets_no_gradient_and_hidden_states_still_do():
    hidden, weight, labels = operands(torch.float64)
    chunked_language_model_loss(hidden, weight.detach(), labels, 5).backward()
    assert_gradients([hidden.grad], one_by_one(hidden, weight, labels, 23)[1:2], torch.float64)
    hidden.grad = None
    chunked_language_model_loss(hidden.detach(), weight, labels, 5).backward()
    assert hidden.grad is None
    assert_gradients([weight.grad], one_by_one(hidden, weight, labels, 23)[2:], torch.float64)


def test_a_second_backward_pass_is_refused():
    """Gradients are scaled in place: silently they would be scaled twice."""
    hidden, weight, labels = operands(torch.float64)
    loss = 0.5 * chunked_language_model_loss(hidden, weight, labels, 5)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def gradients_of(model, batch):
    model.zero_grad()
    found = language_modelling(model, batch, Knobs(0, 2), model.config)
    found.total.backward()
    return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def full(ids, labels):
    return MicroBatch.full(ids, labels, torch.arange(3))


def padded(ids, labels):
    """The second of three sequences ends early; one label of the step in three belongs to other micro-batches."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 4:] = False
    labels = labels.masked_fill(~mask, IGNORED_LABEL)
    count = float(mask.sum())
    return MicroBatch(ids * mask, labels, mask, torch.arange(3), torch.arange(3), count, 1.5 * count, has_padding=True)


def packed(ids, labels):
    document = (torch.arange(ids.shape[1]) >= 5).long().expand_as(ids)
    labels = labels.index_fill(1, torch.tensor([4]), IGNORED_LABEL)
    mask = torch.ones_like(ids, dtype=torch.bool)
    count = float(mask.sum())
    return MicroBatch(ids, labels, mask, torch.arange(3), torch.arange(3), count, count - 3.0, document)


@pytest.mark.parametrize("kind", [full, padded, packed])
@pytest.mark.parametrize("policy", ["none", "all"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_objective_is_the_same_without_logits(kind, policy, tied):
    """Divisors, ignored labels, router losses and the tied embedding, with recomputed activations or stored ones."""
    model = small_model(tie_word_embeddings=tied, z_loss_coefficient=0.02, norm_position="post").double().train()
    model.recompute_activations(policy)
    ids = text(3, 12)
    batch = kind(ids[:, :-1], ids[:, 1:])
    plain, expected = gradients_of(model, batch)
    assert apply_performance(model, PerformanceConfig(logits_chunk_tokens=4), "cpu")
    found, gradients = gradients_of(model, batch)
    assert plain.output.logits is not None
    assert found.output.logits is None
    assert found.task.item() == pytest.approx(plain.task.item(), rel=1e-6)  # the plain form's loss is in fp32
    assert found.total.item() == pytest.approx(plain.total.item(), rel=1e-6)
    assert gradients.keys() == expected.keys()
    assert ("lm_head.weight" in gradients) is not tied
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_labels_as_transformers_has_them():
    model = small_model(z_loss_coefficient=0.02).train()
    labels = text().masked_fill(text() % 5 == 0, IGNORED_LABEL)
    expected = model(text(), labels=labels)
    model.logits_chunk_tokens = 3
    found = model(text(), labels=labels)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert found.loss.item() != pytest.approx(found.task_loss.item(), rel=1e-4), "router losses are in it"
    assert model(text()).logits.shape == (2, 11, VOCAB), "without labels logits are what is asked for"


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() // leaf.element_size() for leaf in tree_leaves(result) if tensor(leaf)]
        self.elements = max([self.elements, *sizes])
        return result


def tensor(leaf):
    return isinstance(leaf, torch.Tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_as_large_as_all_logits(dtype):
    """With 1,024 words, 96 tokens and a width of 16 the weight is the largest but for logits: 1,024 x 96."""
    recipe = tiny_recipe(Path("unused"))
    largest = {}
    for chunk in (None, 8):
        model = build_model(recipe, 1024).to(dtype).train()
        model.logits_chunk_tokens = chunk
        ids = torch.randint(0, 1024, (6, 17), generator=torch.Generator().manual_seed(0))
        batch = MicroBatch.full(ids[:, :-1], ids[:, 1:], torch.arange(6))
        with Largest() as seen:
            language_modelling(model, batch, Knobs(0, 2), model.config).total.backward()
        with Largest() as seen_in_validation:
            batches = EvaluationBatches(np.arange(97, dtype=np.uint16), 16, 6)
            evaluate_language_model(model, batches, [Knobs(0, 2)], TextFigures(1.0), torch.device("cpu"))
        largest[chunk] = (seen.elements, seen_in_validation.elements)
    assert largest[None] == (1024 * 96, 1024 * 96)
    assert largest[8] == (1024 * 16, 1024 * 16)  # the weight itself, and its gradient


def test_validation_scores_are_the_same():
    model = build_model(tiny_recipe(Path("unused")), 32)
    tokens = np.random.default_rng(0).integers(0, 32, 46).astype(np.uint8)
    scores = []
    for chunk in (None, 5):
        model.logits_chunk_tokens = chunk
        batches = EvaluationBatches(tokens, 8, 4)  # the last holds padding
        scores += evaluate_language_model(model, batches, [Knobs(5, 2)], TextFigures(2.0), torch.device("cpu"))
    assert scores[1].tokens == scores[0].tokens == 45
    assert scores[1].loss == pytest.approx(scores[0].loss, rel=1e-6)
