import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.example_stand_in import examples

from smoe_train.data.batches.loader import IGNORED_LABEL, EvaluationBatches, ExampleBatches
from smoe_train.errors import DataError


@settings(deadline=None)
@given(
    st.integers(2, 200),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 4),
    st.none() | st.integers(1, 250),
)
def test_evaluation_predicts_every_token_once_and_ranks_stay_in_lockstep(count, length, micro, world, max_tokens):
    tokens = np.random.default_rng(count).permutation(count).astype(np.uint16)
    predictable = min(count - 1, max_tokens or count)
    labels, indices, lengths = [], [], set()
    for rank in range(world):
        batches = EvaluationBatches(tokens, length, micro, rank, world, max_tokens)
        micro_batches = list(batches)
        assert batches.predicted_tokens == predictable
        lengths |= {len(batches), len(micro_batches)}
        for batch in micro_batches:
            assert batch.input_ids_BS.shape == batch.labels.shape == (micro, length)
            mask = batch.token_mask_BS
            assert ((batch.labels == IGNORED_LABEL) == ~mask).all()
            assert (batch.input_ids_BS[~mask] == 0).all()
            indices += batch.sample_index_B.tolist()
            place = {int(token): i for i, token in enumerate(tokens)}
            for token, label in zip(batch.input_ids_BS[mask].tolist(), batch.labels[mask].tolist(), strict=True):
                assert tokens[place[token] + 1] == label
                labels.append(label)
    assert sorted(labels) == sorted(tokens[1 : 1 + predictable].tolist())
    assert len(lengths) == 1
    assert sorted(indices) == list(range(len(indices)))


def test_one_token_has_nothing_to_predict():
    with pytest.raises(DataError, match="1 tokens"):
        EvaluationBatches(np.zeros(1, dtype=np.uint8), 8, 2)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=2, max_size=15),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 3),
    st.none() | st.integers(1, 60),
)
def test_evaluation_of_documents_predicts_all_but_their_first_tokens_once(lengths, length, micro, world, max_tokens):
    ends = np.cumsum(lengths)
    tokens = np.arange(int(ends[-1]), dtype=np.uint16)
    stop = min(len(tokens) - 1, max_tokens or len(tokens))
    expected = sorted(set(range(1, stop + 1)) - set(ends.tolist()))
    if not expected:
        with pytest.raises(DataError, match="one token each"):
            EvaluationBatches(tokens, length, micro, 0, world, max_tokens, ends)
        return
    span = length * micro * world
    turns = [sum(first < token <= first + span for token in expected) for first in range(0, stop, span)]
    labels, targets, real = [], 0.0, 0.0
    for rank in range(world):
        batches = EvaluationBatches(tokens, length, micro, rank, world, max_tokens, ends)
        assert batches.predicted_tokens == len(expected)
        for batch in batches:
            mask, known = batch.token_mask_BS, batch.labels != IGNORED_LABEL
            assert not (known & ~mask).any()
            assert (batch.labels[known] == batch.input_ids_BS[known] + 1).all()
            assert batch.has_padding or mask.all()
            labels += batch.labels[known].tolist()
            targets, real = targets + batch.targets_per_micro_batch, real + batch.tokens_per_micro_batch
            document_of = np.searchsorted(ends, batch.input_ids_BS.numpy(), side="right")
            for row in range(micro):
                numbers = batch.document_BS[row][mask[row]].numpy()
                assert (numbers == (document_of[row] - document_of[row, 0])[mask[row].numpy()]).all()
                assert (batch.document_BS[row][~mask[row]] == -1).all()
    assert sorted(labels) == expected
    assert real == pytest.approx(stop)
    assert targets == pytest.approx(sum(max(turn, 1) for turn in turns)), "never 0, which is a divisor"


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 4))
def test_evaluation_of_examples_has_each_once_in_lockstep(count, micro, world):
    samples = examples(count)
    found, indices, widths, targets = {}, [], [], 0.0
    for rank in range(world):
        batches = ExampleBatches(samples, micro, rank, world)
        micro_batches = list(batches)
        assert len(micro_batches) == len(batches) == -(-count // (micro * world))
        widths.append([batch.input_ids_BS.shape for batch in micro_batches])
        for batch in micro_batches:
            assert batch.has_padding
            targets += batch.targets_per_micro_batch
            indices += batch.sample_index_B.tolist()
            for row, block in enumerate(batch.block_B.tolist()):
                if block < 0:
                    assert not batch.token_mask_BS[row].any()
                    assert int(batch.labels[row]) == IGNORED_LABEL
                    continue
                assert block not in found
                found[block] = batch.input_ids_BS[row][batch.token_mask_BS[row]].tolist()
                assert int(batch.labels[row]) == block
    assert all(one == widths[0] for one in widths)
    assert found == {row: [row + 1] * min(int(samples.examples.sizes[row]), 40) for row in range(count)}
    assert len(set(indices)) == len(indices)
    assert targets == pytest.approx(count)
