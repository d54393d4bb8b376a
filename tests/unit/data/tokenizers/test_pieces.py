import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoe_train.data.source import Split
from smoe_train.data.tokenizers import pieces
from smoe_train.data.tokenizers.pieces import NotTextError, placed, text_pieces, well_formed
from smoe_train.errors import DataError

NAMES = ("NEWLINE_AFTER_BYTES", "WHITESPACE_AFTER_BYTES", "LONGEST_BYTES")
SIZES = {name: getattr(pieces, name) for name in NAMES}
NEWLINE_AFTER, WHITESPACE_AFTER, LONGEST = SMALL = (3, 7, 12)


@pytest.fixture(scope="module", autouse=True)
def _small():
    with pytest.MonkeyPatch.context() as patch:
        for name, size in zip(NAMES, SMALL, strict=True):
            patch.setattr(pieces, name, size)
        yield


def slow_pieces(data: bytes, ends: list[int]) -> list[tuple[str, bool]]:
    """The rule, byte by byte."""
    found, start = [], 0
    for stop in range(1, len(data) + 1):
        size = stop - start
        newline = data[stop - 1 : stop] == b"\n" and NEWLINE_AFTER < size <= WHITESPACE_AFTER
        whitespace = data[stop : stop + 1].isspace() and WHITESPACE_AFTER <= size < LONGEST
        longest = size >= LONGEST and (stop == len(data) or data[stop] & 0xC0 != 0x80)
        if stop in ends or newline or whitespace or longest:
            found.append((data[start:stop].decode(), stop in ends))
            start = stop
    return found + ([(data[start:].decode(), False)] if start < len(data) else [])


texts = st.text(st.sampled_from("ab é漢🙂\n\t"), max_size=60)


@given(texts, st.data())
def test_cuts_follow_the_rule_however_the_text_is_read(text, draw):
    data = text.encode()
    places = [len(text[:i].encode()) for i in range(1, len(text))]
    ends = sorted(draw.draw(st.sets(st.sampled_from(places), max_size=4))) if places else []
    documents = [*ends, len(data)] if data and draw.draw(st.booleans()) else []
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=6)))
    chunks = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    found = list(text_pieces(chunks, np.array(documents, dtype=np.int64) if documents else None))
    assert found == slow_pieces(data, documents)


def test_documents_may_be_empty():
    assert list(text_pieces([b"ab"], np.array([0, 1, 1, 2]))) == [("", True), ("a", True), ("", True), ("b", True)]


@pytest.mark.parametrize(
    ("data", "ends", "offset"),
    [
        (b"abcdefghijklmnopqrstuvwxyz\xffabc", None, 26),
        ("aé".encode(), [2, 3], 1),
        (b"abc\xc3", None, 3),
        (b"\x80" * 40, None, 0),
        (b"ab\xed\xa0\x80", None, 2),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(data, ends, offset):
    with pytest.raises(NotTextError, match=f"byte {offset}: is not UTF-8 text") as error:
        list(text_pieces([data[i : i + 1] for i in range(len(data))], None if ends is None else np.array(ends)))
    assert error.value.offset == offset


def test_the_place_is_named_as_the_split_names_it():
    split = Split(3, lambda: iter([b"ab\xff"]), place="poem.txt, byte {}".format)
    message = r"set: train split, poem\.txt, byte 2: is not UTF-8 text.*bytes ff"
    with pytest.raises(DataError, match=message), placed(split, "set: train split"):
        list(text_pieces(split.read()))


def test_lone_surrogates_are_replaced():
    assert well_formed("a\udcffb\ud800") == "a���b���"
    assert well_formed("naïve 🙂") == "naïve 🙂"


def test_a_text_without_whitespace_comes_in_pieces_of_a_mebibyte(monkeypatch):
    for name, size in SIZES.items():
        monkeypatch.setattr(pieces, name, size)
    data = b"a" + "é".encode() * (1 << 20)
    found = text_pieces(data[i : i + 99_991] for i in range(0, len(data), 99_991))
    assert [len(text.encode()) for text, _ in found] == [(1 << 20) + 1, 1 << 20]
