"""The order from easy to hard, against the notes' numbers, hand computation and a slow reading of the paper."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from smoe_train.data.batches.curriculum_order import easy_first, spread_within_batches
from smoe_train.data.batches.loader import block_order

KINDS = ["cosine", "mean_ratio", "l2"]
every_kind = pytest.mark.parametrize("by", KINDS)


def order(rows, by, shuffled=None, window=None):
    rows = np.array(rows, dtype=np.float64)
    shuffled = np.arange(len(rows)) if shuffled is None else np.array(shuffled)
    return easy_first(rows, shuffled, by, window).tolist()


def slow_keys(rows, by):
    """The rule, sample by sample; rows without zero vectors."""
    means = [round(sum(row) / len(row), 9) for row in rows]  # equal ones are equal in whatever order they are added
    reference = rows[min(range(len(rows)), key=lambda i: means[i])]

    def similarity(row):
        dot = sum(a * b for a, b in zip(row, reference, strict=True))
        return dot / math.sqrt(sum(a * a for a in row) * sum(b * b for b in reference))

    return {
        "mean_ratio": means,
        "l2": [math.dist(row, reference) for row in rows],
        "cosine": [-similarity(row) for row in rows],
    }[by]


def test_the_example_of_the_notes():
    """A10: against [.01 .01 .01] a hard sample [.9 .9 .9] has similarity 1, an easy one [.02 0 .1] 0.68."""
    rows = [[0.02, 0.0, 0.1], [0.9, 0.9, 0.9], [0.01, 0.01, 0.01]]
    assert -slow_keys(rows, "cosine")[0] == pytest.approx(0.68, abs=0.005)
    assert order(rows, "cosine") == [1, 2, 0], "1 and 2 are equally similar, so they stay as shuffled"
    assert order(rows, "cosine", shuffled=[2, 0, 1]) == [2, 1, 0]
    assert order(rows, "mean_ratio") == [2, 0, 1]
    assert order(rows, "l2") == [2, 0, 1]


def test_the_kinds_differ_where_they_should():
    # Reference 0 (mean .2). 1 is near it, but harder in mean than 2, which is far off in one layer.
    rows = [[0.2, 0.2], [0.3, 0.3], [0.0, 0.5]]
    assert order(rows, "mean_ratio") == [0, 2, 1]
    assert order(rows, "l2") == [0, 1, 2]


@every_kind
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_keys_are_those_of_a_slow_reading_of_the_rule(by, data):
    samples, layers = data.draw(st.integers(1, 25)), data.draw(st.integers(1, 4))
    # Twentieths without 0: no zero vectors, and keys that differ do so by more than rounding.
    rows = data.draw(arrays(np.int64, (samples, layers), elements=st.integers(1, 20))) / 20.0
    shuffled = np.array(data.draw(st.permutations(range(samples))))
    found = easy_first(rows, shuffled, by)
    # The reference is the first of the easiest in the shuffled order.
    keys = dict(zip(shuffled.tolist(), slow_keys(rows[shuffled].tolist(), by), strict=True))
    place = {sample: i for i, sample in enumerate(shuffled.tolist())}
    assert found.tolist() == sorted(place, key=lambda sample: (round(keys[sample], 9), place[sample]))


@every_kind
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_it_is_a_permutation_and_a_function_of_its_arguments(by, data):
    """A9: no sample lost, none twice; the same for the same (seed, epoch, stats), which are not changed."""
    samples, layers = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 3))
    share = st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, 0.5, 1.0]))
    rows = data.draw(arrays(np.float64, (samples, layers), elements=share))
    unknown = data.draw(arrays(np.bool_, samples))
    rows[unknown] = np.nan
    window = data.draw(st.none() | st.integers(2, 50))
    seed, epoch = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 9))
    before = rows.copy()
    first = easy_first(rows, block_order(samples, seed, epoch), by, window)
    assert sorted(first.tolist()) == list(range(samples))
    assert first.dtype == np.int64
    again = easy_first(rows.copy(), block_order(samples, seed, epoch).copy(), by, window)
    assert first.tolist() == again.tolist()
    np.testing.assert_array_equal(rows, before)


@every_kind
def test_ties_keep_the_shuffled_order(by):
    shuffled = block_order(50, 3, 2)
    assert order([[0.3, 0.7]] * 50, by, shuffled) == shuffled.tolist()
    assert order([[0.0, 0.0]] * 50, by, shuffled) == shuffled.tolist(), "A10: zero vectors alone"


def test_equal_directions_tie_whatever_their_rounding():
    rng = np.random.default_rng(0)
    rows = np.outer(rng.uniform(0.01, 1.0, 500), [0.1, 0.7, 0.3])
    shuffled = block_order(500, 0, 0)
    assert order(rows, "cosine", shuffled) == shuffled.tolist()


def test_zero_vectors_come_first_and_the_reference_is_the_easiest_of_the_others():
    """A10: cosine with a reference that has no direction."""
    # Without 1 and 4, the reference is 3; 0 is parallel to it, 2 at right angles.
    rows = [[0.0, 0.8], [0.0, 0.0], [0.9, 0.0], [0.0, 0.1], [0.0, 0.0]]
    assert order(rows, "cosine", shuffled=[4, 3, 2, 1, 0]) == [4, 1, 3, 0, 2]
    assert order(rows, "l2", shuffled=[4, 3, 2, 1, 0]) == [4, 1, 3, 0, 2]


@every_kind
def test_samples_without_a_record_stand_where_an_average_one_would(by):
    nothing = [math.nan, math.nan]
    rows = [[0.1, 0.1], nothing, [0.9, 0.8], [0.2, 0.0], nothing]
    mean = [1.2 / 3, 0.9 / 3]
    filled = [row if row is not nothing else mean for row in rows]
    assert order(rows, by) == order(filled, by)
    assert order([nothing] * 6, by, shuffled=[3, 1, 5, 0, 2, 4]) == [3, 1, 5, 0, 2, 4], "no record: as shuffled"


def test_windows_are_ordered_each_by_itself():
    rows = [[0.9], [0.1], [0.8], [0.2], [0.7], [0.3], [0.5]]
    assert order(rows, "mean_ratio", window=3) == [1, 2, 0, 3, 5, 4, 6]
    shuffled = [6, 0, 1, 5, 2, 4, 3]
    assert order(rows, "mean_ratio", shuffled, 4) == [1, 5, 6, 0, 3, 4, 2]
    for by in KINDS:
        assert order(rows, by, shuffled, 7) == order(rows, by, shuffled, 100) == order(rows, by, shuffled)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(2, 6), st.integers(0, 10**6))
def test_variance_within_batches_is_at_most_that_of_any_shuffle(batches, size, seed):
    """A10, exactly: of all ways to cut numbers into sets of one size, sorted runs have the least variance within."""
    rng = np.random.default_rng(seed)
    rows = rng.beta(0.5, 1.5, (batches * size, 3))
    shuffled = rng.permutation(len(rows))
    ordered = easy_first(rows, shuffled, "mean_ratio")

    def within(one):
        return rows.mean(axis=1)[one].reshape(batches, size).var(axis=1).mean()

    assert within(ordered) <= within(shuffled) + 1e-15


@every_kind
def test_a_batch_has_samples_of_similar_difficulty(by):
    """A10 on a synthetic set: only one layer tells samples apart, so that direction tells difficulty too."""
    rng = np.random.default_rng(1)
    level = rng.uniform(0.0, 1.0, 512)
    rows = np.stack([np.full(512, 0.1), 0.9 * level], axis=1) + rng.uniform(0.0, 0.01, (512, 2))
    shuffled = block_order(512, 0, 1)
    ordered = easy_first(rows, shuffled, by)
    mean = rows.mean(axis=1)
    assert spread_within_batches(mean, ordered, 16) < 0.5 * spread_within_batches(mean, shuffled, 16)


def test_the_spread_by_hand():
    difficulty = np.array([0.0, 1.0, 1.0, 3.0, 5.0])
    # Batches of two, the first place taken: {0}, {1, 1}, {3, 5} with deviations 0, 0, 1.
    assert spread_within_batches(difficulty, np.arange(5), 2, 1) == pytest.approx(1 / 3)
    # {0, 1}, {1, 3}, {5}.
    assert spread_within_batches(difficulty, np.arange(5), 2) == pytest.approx((0.5 + 1.0 + 0.0) / 3)
    assert spread_within_batches(difficulty, np.array([2, 1, 0, 3, 4]), 5) == pytest.approx(difficulty.std())
