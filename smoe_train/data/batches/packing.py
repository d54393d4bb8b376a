"""Documents packed into samples, each of which attends to itself alone (a block-diagonal mask).

Shape suffixes: B samples of a micro-batch, J samples of a step's global batch, S tokens of a sample, P pieces of
documents.
"""

from __future__ import annotations

import bisect
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from smoe_train.data.batches.micro_batch import IGNORED_LABEL, Indices
from smoe_train.data.batches.samples import Rows, Samples
from smoe_train.data.source import Offsets
from smoe_train.data.tokenizer import TokenArray
from smoe_train.errors import DataError

Fit = Literal["cut", "best_fit"]


class Packing(NamedTuple):
    """Which piece of a text goes into which bin.

    Attributes:
        start_P: int64, the first token of each piece; pieces of a bin are neighbours, in the order of the text.
        length_P: int32, its tokens.
        first_piece_of_bin: int64 [bins + 1], where the pieces of each bin begin, and after the last their number.
    """

    start_P: Indices
    length_P: npt.NDArray[np.int32]
    first_piece_of_bin: Indices


class PackedDocuments(Samples):
    """Documents in samples of at most S tokens; nothing is predicted across the end of a document.

    With ``cut``, sample i is [i*S, (i+1)*S) of the text, as in `FixedBlocks`: a document goes on in the next sample
    without its beginning, and the tokens behind the last full sample are left out. With ``best_fit`` documents stay
    whole where they fit, see `pack_best_fit`; samples are filled up with padding, and no token is left out.

    Args:
        tokens: The split, 1-D, best a memory map.
        document_ends: Where each document ends, strictly ascending token offsets; the last is the number of tokens.
        sequence_length: S.
        fit: How documents come into samples.

    Raises:
        DataError: The split has no known documents.
    """

    def __init__(self, tokens: TokenArray, document_ends: Offsets | None, sequence_length: int, fit: Fit) -> None:
        if document_ends is None:
            raise DataError(
                "the training split is one text without known documents, which cannot be packed; set task.packing to "
                "blocks, or use a source with documents"
            )
        self.tokens = tokens
        self.document_ends = document_ends
        assert self.document_ends[-1] == len(tokens), f"{self.document_ends[-1]} of {len(tokens)} tokens in documents"
        self.sequence_length = sequence_length
        self.has_padding = fit == "best_fit"
        self._packing = pack_best_fit(self.document_ends, sequence_length) if fit == "best_fit" else None

    def __len__(self) -> int:
        """Number of samples."""
        if self._packing is None:
            return max(len(self.tokens) - 1, 0) // self.sequence_length
        return len(self._packing.first_piece_of_bin) - 1

    def counts(self, block_J: Indices) -> tuple[int, int]:
        """Returns the tokens of some samples, and those of them that are not the last of their document."""
        start_P, length_P, _ = self._pieces(block_J)
        tokens = int(length_P.sum())
        return tokens, tokens - int(self._closes(start_P + length_P).sum())

    def read(self, block_B: Indices, width: int) -> Rows:
        """Returns samples; padding is behind the documents."""
        start_P, length_P, count_B = self._pieces(block_B)
        number_P = _ranges(count_B)
        before_P = np.cumsum(length_P) - length_P  # tokens of all rows before the piece
        row_P = np.repeat(np.arange(len(block_B)), count_B)
        row_start_P = before_P[number_P == 0][row_P]
        within = _ranges(length_P)
        source = np.repeat(start_P, length_P) + within
        place = np.repeat(row_P * width + before_P - row_start_P, length_P) + within

        ids, document = np.zeros(len(block_B) * width, dtype=np.int64), np.full(len(block_B) * width, -1)
        labels = np.full(len(block_B) * width, IGNORED_LABEL)
        ids[place] = self.tokens[source]
        document[place] = np.repeat(number_P, length_P)
        labels[place] = self.tokens[np.minimum(source + 1, len(self.tokens) - 1)]
        last_P = place[before_P + length_P - 1]
        labels[last_P[self._closes(start_P + length_P)]] = IGNORED_LABEL
        shape = (len(block_B), width)
        return Rows(ids.reshape(shape), labels.reshape(shape), (document >= 0).reshape(shape), document.reshape(shape))

    def _closes(self, stop_P: Indices) -> npt.NDArray[np.bool_]:
        """Returns whether pieces that stop there are the last of their documents."""
        closes_P: npt.NDArray[np.bool_] = self.document_ends[np.searchsorted(self.document_ends, stop_P)] == stop_P
        return closes_P

    def _pieces(self, block_B: Indices) -> tuple[Indices, Indices, Indices]:
        """Returns start and length of all pieces of some samples, one sample behind the other, and their numbers."""
        if self._packing is not None:
            first_B, stop_B = (self._packing.first_piece_of_bin[block_B + shift] for shift in (0, 1))
            count_B = stop_B - first_B
            piece_P = np.repeat(first_B, count_B) + _ranges(count_B)
            return self._packing.start_P[piece_P], self._packing.length_P[piece_P].astype(np.int64), count_B
        first_B = block_B * self.sequence_length
        stop_B = first_B + self.sequence_length
        low_B = np.searchsorted(self.document_ends, first_B, side="right")
        count_B = np.searchsorted(self.document_ends, stop_B, side="left") - low_B + 1
        # A sample's pieces stop at the document ends inside it, the last one at the end of the sample.
        number_P = _ranges(count_B)
        stop_P = np.minimum(self.document_ends[np.repeat(low_B, count_B) + number_P], np.repeat(stop_B, count_B))
        start_P = np.where(number_P == 0, np.repeat(first_B, count_B), np.concatenate([[0], stop_P[:-1]]))
        return start_P, stop_P - start_P, count_B


def pack_best_fit(document_ends: Offsets, sequence_length: int) -> Packing:
    """Packs documents into as few bins of S tokens as best-fit-decreasing finds, cutting only those that do not fit.

    A document longer than S is first cut into pieces of S tokens and a rest. Pieces are then taken from long to short,
    equal ones in the order of the text, and each goes into the fullest bin that has room for it, else into a new one.

    Pieces of equal length are placed together: the fullest bins with room r >= l each take r // l pieces of length l
    before another bin is fuller than they are, so a whole class of bins moves from room r to r mod l < r / 2 at once.
    That makes O(S log S) array operations beside sorting the pieces, for any number of documents.

    Source: Ding et al. 2024, arXiv 2404.10830, best-fit packing. Own: placing equal lengths together, which changes
    nothing but how ties between equally full bins fall.

    Args:
        document_ends: Strictly ascending token offsets.
        sequence_length: S.
    """
    size = sequence_length
    begin_D = np.concatenate([[0], document_ends[:-1]])
    length_D = document_ends - begin_D
    pieces_D = -(-length_D // size)
    start_P = np.repeat(begin_D, pieces_D) + size * _ranges(pieces_D)
    length_P = np.minimum(np.repeat(np.asarray(document_ends), pieces_D) - start_P, size).astype(np.int32)
    bin_P, num_bins = _best_fit_decreasing(length_P, size)
    order = np.argsort(bin_P, kind="stable")
    first_piece_of_bin = np.concatenate([[0], np.cumsum(np.bincount(bin_P, minlength=num_bins))])
    return Packing(start_P[order], length_P[order], first_piece_of_bin)


def _best_fit_decreasing(length_P: npt.NDArray[np.int32], size: int) -> tuple[Indices, int]:
    """Returns the bin of each piece, int64 [P], and the number of bins."""
    # 16-bit keys are sorted by radix.
    long_first = np.argsort((size - length_P).astype(np.uint16 if size < 1 << 16 else np.int32), kind="stable")
    of_length = np.bincount(length_P, minlength=size + 1)
    bin_P = np.empty(len(length_P), dtype=np.int64)
    bins_with: dict[int, Indices] = {}  # by room
    rooms: list[int] = []  # its keys, ascending
    num_bins, placed = 0, 0
    for length in range(size, 0, -1):
        stop = placed + int(of_length[length])
        while placed < stop:
            tightest = bisect.bisect_left(rooms, length)
            room = rooms.pop(tightest) if tightest < len(rooms) else size
            each = room // length
            wanted = -(-(stop - placed) // each)
            if room < size:
                bins = bins_with.pop(room)
            else:
                bins = np.arange(num_bins, num_bins + wanted)
                num_bins += wanted
            used, unused = bins[:wanted], bins[wanted:]
            taken = min(len(used) * each, stop - placed)
            bin_P[long_first[placed : placed + taken]] = np.repeat(used, each)[:taken]
            placed += taken
            last = taken - (len(used) - 1) * each  # the last bin may get fewer
            for left, some in ((room, unused), (room - each * length, used[:-1]), (room - last * length, used[-1:])):
                if left and len(some):
                    if left not in bins_with:
                        bisect.insort(rooms, left)
                    bins_with[left] = np.concatenate([bins_with[left], some]) if left in bins_with else some
    return bin_P, num_bins


def _ranges(count_P: Indices) -> Indices:
    """Returns 0 .. count - 1 for each count, one behind the other."""
    stop_P = np.cumsum(count_P)
    return np.arange(int(stop_P[-1]) if len(stop_P) else 0) - np.repeat(stop_P - count_P, count_P)


__all__ = ["Fit", "PackedDocuments", "pack_best_fit"]
