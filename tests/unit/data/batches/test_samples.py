import pickle
from dataclasses import replace

import numpy as np
import pytest

from smoe_train.data.batches.samples import FixedBlocks, PaddedExamples
from smoe_train.data.stores.example_store import ExampleSplit
from smoe_train.errors import DataError

SEPARATOR = 9


def split_of(texts, labels):
    """A split of single texts, each given as its ids."""
    sizes = [size for text in texts for size in (len(text), 0)]
    return ExampleSplit(
        texts=np.array([token for text in texts for token in text], dtype=np.uint8),
        offsets=np.cumsum([0, *sizes]),
        labels=np.array(labels, dtype=np.float64),
        index=np.arange(len(texts)),
        separator_ids=(SEPARATOR,),
        pairs=False,
    )


EXAMPLES = split_of([[1, 2, 3], [4], [5] * 20, [6, 7]], [2, 0, 1, np.nan])


def test_examples_are_padded_on_the_right_and_cut_to_length():
    samples = PaddedExamples(EXAMPLES, 10, "classification")
    assert samples.lengths().tolist() == [4, 2, 10, 3]
    assert samples.width(np.array([0, 1])) == 8, "the next multiple of 8"
    assert samples.width(np.array([0, 2])) == 10, "no more than the sequence length"
    assert samples.counts(np.array([1, 2])) == (12, 2)
    rows = samples.read(np.array([1, 0, -1]), 8)
    assert rows.input_ids_BS.tolist() == [
        [4, SEPARATOR, 0, 0, 0, 0, 0, 0],
        [1, 2, 3, SEPARATOR, 0, 0, 0, 0],
        [0] * 8,
    ]
    assert rows.token_mask_BS.sum(axis=1).tolist() == [2, 4, 0]
    assert rows.labels.tolist() == [0, 2, -100]
    assert rows.labels.dtype == np.int64
    assert samples.read(np.array([3]), 8).labels.tolist() == [-100], "its label is not published"
    assert samples.read(np.array([2]), 10).input_ids_BS.tolist() == [[5] * 9 + [SEPARATOR]]


def test_numbers_keep_their_fractions_and_nan_says_that_there_is_none():
    samples = PaddedExamples(split_of([[1], [2], [3]], [0.25, 4.6, np.nan]), 8, "regression")
    labels = samples.read(np.array([1, 0, 2, -1]), 8).labels
    assert labels.dtype == np.float32
    assert np.array_equal(labels, np.array([4.6, 0.25, np.nan, np.nan], dtype=np.float32), equal_nan=True)


def test_pickled_examples_reopen_their_maps_instead_of_copying_them(tmp_path):
    split = split_of([[1, 2, 3], *[[4]] * 2000], [0.0] * 2001)
    maps = {}
    for name in ("texts", "offsets", "labels", "index"):
        array = getattr(split, name)
        array.tofile(tmp_path / name)
        maps[name] = np.memmap(tmp_path / name, dtype=array.dtype, mode="r")
    samples = PaddedExamples(replace(split, **maps), 8, "classification", rows=np.array([1, 0]))
    data = pickle.dumps(samples)
    assert len(data) < 2000
    assert pickle.loads(data).read(np.array([1]), 8).input_ids_BS[0, :4].tolist() == [1, 2, 3, SEPARATOR]


def test_chosen_rows_are_numbered_in_their_own_order():
    samples = PaddedExamples(EXAMPLES, 10, "classification", rows=np.array([2, 0]))
    assert len(samples) == 2
    assert samples.lengths().tolist() == [10, 4]
    assert samples.labels.tolist() == [1.0, 2.0]
    assert samples.read(np.array([1]), 8).input_ids_BS[0, :4].tolist() == [1, 2, 3, SEPARATOR]


def test_too_short_sequences_and_too_few_samples_are_errors():
    with pytest.raises(DataError, match=r"sequences of 1 tokens.*2 at least"):
        PaddedExamples(EXAMPLES, 1, "classification")
    samples = PaddedExamples(EXAMPLES, 8, "classification")
    samples.require(4)
    with pytest.raises(DataError, match=r"4 samples, too few for one global batch of 5"):
        samples.require(5)


def test_a_split_of_one_token_has_no_block():
    assert len(FixedBlocks(np.zeros(0, dtype=np.uint8), 4)) == 0
    assert len(FixedBlocks(np.zeros(4, dtype=np.uint8), 4)) == 0
    assert len(FixedBlocks(np.zeros(5, dtype=np.uint8), 4)) == 1
