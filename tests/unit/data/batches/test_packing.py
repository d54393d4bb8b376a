from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoe_train.data.batches.packing import PackedDocuments, pack_best_fit
from smoe_train.errors import DataError

lengths_of_documents = st.lists(st.integers(1, 30), min_size=1, max_size=40)


def split_of(lengths):
    """A split in which each token is its own position, and its document ends."""
    return np.arange(sum(lengths), dtype=np.uint16), np.cumsum(lengths)


def slow_best_fit(lengths, size):
    """Best-fit-decreasing as the paper words it: one piece at a time, looking at every bin; returns room by bin."""
    pieces = [piece for n in lengths for piece in [size] * (n // size) + [n % size] * (n % size > 0)]
    rooms = []
    for piece in sorted(pieces, reverse=True):
        fitting = [room for room in rooms if room >= piece]
        if fitting:
            rooms[rooms.index(min(fitting))] -= piece
        else:
            rooms.append(size - piece)
    return rooms


def bins_of(packing):
    """The pieces (start, stop) of each bin."""
    pieces = [(s, s + n) for s, n in zip(packing.start_P.tolist(), packing.length_P.tolist(), strict=True)]
    edges = packing.first_piece_of_bin.tolist()
    return [pieces[low:high] for low, high in pairwise(edges)]


@settings(deadline=None, max_examples=200)
@given(lengths_of_documents, st.integers(1, 20))
def test_best_fit_fills_bins_as_the_slow_algorithm_does_and_loses_nothing(lengths, size):
    ends = np.cumsum(lengths)
    bins = bins_of(pack_best_fit(ends, size))
    assert all(pieces == sorted(pieces) for pieces in bins)
    assert sorted(size - sum(stop - start for start, stop in pieces) for pieces in bins) == sorted(
        slow_best_fit(lengths, size)
    )
    expected = []
    for start, stop in pairwise([0, *ends.tolist()]):
        expected += [(first, min(first + size, stop)) for first in range(start, stop, size)]
    assert sorted(piece for pieces in bins for piece in pieces) == expected


def test_best_fit_by_hand():
    # 12 = 8 + 4. Long to short: 8 | 5 | 4, 4 (documents 0 and 3: together) | 3 joins 5 | 2 is alone.
    packing = pack_best_fit(np.cumsum([12, 3, 5, 4, 2]), 8)
    assert sorted(bins_of(packing)) == [[(0, 8)], [(8, 12), (20, 24)], [(12, 15), (15, 20)], [(24, 26)]]


def test_best_fit_cuts_only_documents_that_do_not_fit():
    lengths = np.random.default_rng(0).integers(1, 2049, 3000)
    packing = pack_best_fit(np.cumsum(lengths), 2048)
    assert len(packing.start_P) == 3000
    # No packing has fewer bins than the tokens fill, nor than there are documents above half a bin.
    fewest = max(-(-int(lengths.sum()) // 2048), int((lengths > 1024).sum()))
    assert len(packing.first_piece_of_bin) - 1 <= 1.01 * fewest


@settings(deadline=None, max_examples=150)
@given(lengths_of_documents, st.integers(1, 12), st.sampled_from(["cut", "best_fit"]), st.randoms())
def test_samples_hold_whole_numbers_of_documents_and_predict_within_them(lengths, size, fit, random):
    tokens, ends = split_of(lengths)
    document_of = np.searchsorted(ends, np.arange(len(tokens)), side="right")
    samples = PackedDocuments(tokens, ends, size, fit)
    assert samples.has_padding == (fit == "best_fit")
    seen, predicted = [], []
    blocks = list(range(len(samples)))
    random.shuffle(blocks)
    for start in range(0, len(blocks), 3):
        chosen = np.array(blocks[start : start + 3])
        rows = samples.read(chosen, samples.width(chosen))
        mask = rows.token_mask_BS
        assert rows.input_ids_BS.shape == (len(chosen), size)
        assert (rows.input_ids_BS[~mask] == 0).all()
        assert (rows.labels[~mask] == -100).all()
        assert (rows.document_BS[~mask] == -1).all()
        assert samples.counts(chosen) == (mask.sum(), (rows.labels != -100).sum())
        for row in range(len(chosen)):
            real = int(mask[row].sum())
            assert mask[row, :real].all(), "padding is at the end"
            ids = rows.input_ids_BS[row, :real].tolist()
            seen += ids
            for place, token in enumerate(ids):
                goes_on = token + 1 < len(tokens) and document_of[token + 1] == document_of[token]
                assert rows.labels[row, place] == (token + 1 if goes_on else -100)
                predicted += [token + 1] * bool(goes_on)
                new = place > 0 and document_of[token] != document_of[ids[place - 1]]
                assert rows.document_BS[row, place] == (rows.document_BS[row, place - 1] + new if place else 0)
            if fit == "cut":
                assert ids == list(range(chosen[row] * size, (chosen[row] + 1) * size))
    covered = len(tokens) if fit == "best_fit" else (len(tokens) - 1) // size * size
    assert sorted(seen) == list(range(covered))
    firsts = {0, *ends.tolist()}
    last = covered if fit == "best_fit" else covered + 1
    assert sorted(predicted) == [token for token in range(last) if token not in firsts]


def test_a_text_without_documents_cannot_be_packed():
    with pytest.raises(DataError, match="without known documents"):
        PackedDocuments(np.arange(5, dtype=np.uint8), None, 4, "cut")
