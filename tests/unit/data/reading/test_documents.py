import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoe_train.data.reading.documents import cut, divided, of_documents
from smoe_train.data.source import StoredFile, byte_range
from smoe_train.errors import DataError

DOCUMENTS = [b"first\n", b"", b"the second\n", b"3\n", b"fourth\n"]


def documents_of(split):
    data = b"".join(split.read())
    assert len(data) == split.num_bytes
    ends = split.document_ends.tolist()
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def test_documents_make_one_text_that_can_be_read_again_and_knows_their_places():
    split = of_documents("rows.jsonl", lambda: iter(DOCUMENTS))
    for _ in range(2):
        assert documents_of(split) == [document for document in DOCUMENTS if document]
    assert split.document_ends.dtype == np.int64
    assert [split.place(offset) for offset in (0, 5, 6, 17, 18)] == [
        "rows.jsonl: text 1, byte 0",
        "rows.jsonl: text 1, byte 5",
        "rows.jsonl: text 2, byte 0",
        "rows.jsonl: text 3, byte 0",
        "rows.jsonl: text 3, byte 1",
    ]


def test_no_documents_make_an_empty_text():
    split = of_documents("rows.jsonl", lambda: iter([b""]))
    assert (split.num_bytes, list(split.read()), split.document_ends.tolist()) == (0, [], [])


@given(st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=12), st.data())
def test_a_cut_has_the_bytes_and_ends_within_it(documents, data):
    text = b"".join(documents)
    start = data.draw(st.integers(0, len(text) - 1))
    stop = data.draw(st.integers(start + 1, len(text)))
    piece = cut(of_documents("made-up", lambda: iter(documents)), start, stop)
    assert b"".join(piece.read()) == text[start:stop]
    position, ends = 0, []
    for document in documents:
        position += len(document)
        if position > start:
            ends.append(min(position, stop) - start)
        if position >= stop:
            break
    assert piece.document_ends.tolist() == ends


def test_a_text_is_divided_between_documents():
    split = of_documents("made-up", lambda: iter([b"%02d" % i for i in range(20)]))
    parts = divided("made-up", split, 0.1, 0.25)
    assert {name: documents_of(part) for name, part in parts.items()} == {
        "train": [b"%02d" % i for i in range(13)],
        "valid": [b"%02d" % i for i in range(13, 15)],
        "test": [b"%02d" % i for i in range(15, 20)],
    }
    assert parts["valid"].place(3) == "made-up: text 15, byte 1"
    assert set(divided("made-up", split, 0.1, 0.0)) == {"train", "valid"}
    assert set(divided("made-up", split, 0.0, 0.1)) == {"train", "test"}


@pytest.mark.parametrize(("valid", "test"), [(0.05, 0.05), (0.9, 0.0), (0.0, 0.9), (0.2, 0.0)])
def test_too_few_documents_are_an_error(valid, test):
    split = of_documents("a.jsonl", lambda: iter([b"x" * 100, b"y" * 100] if valid < 0.9 and test < 0.9 else [b"x"]))
    with pytest.raises(DataError, match=r"a\.jsonl: its \d texts .* are too few"):
        divided("a.jsonl", split, valid, test)


def test_files_are_documents_if_asked_and_the_last_may_be_cut(tmp_path):
    files = []
    for name, size in {"a": 5, "empty": 0, "b": 3, "c": 4}.items():
        (tmp_path / name).write_bytes(name[:1].encode() * size)
        files.append(StoredFile.at(tmp_path / name))
    assert byte_range(files, 0, 12).document_ends is None
    assert documents_of(byte_range(files, 0, 12, documents=True)) == [b"aaaaa", b"bbb", b"cccc"]
    piece = byte_range(files, 4, 10, documents=True)
    assert documents_of(piece) == [b"a", b"bbb", b"cc"]
    assert documents_of(byte_range(files, 5, 8, documents=True)) == [b"bbb"]
    assert [piece.place(offset) for offset in (0, 1, 5)] == [
        f"{tmp_path / 'a'}, byte 4",
        f"{tmp_path / 'b'}, byte 0",
        f"{tmp_path / 'c'}, byte 1",
    ]
