"""Readers of rows on made-up files: the traps of real sets, and damage, each named with file and row."""

import csv
import gzip
import io
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoe_train.data.reading import rows
from smoe_train.data.reading.rows import hub_files, read_csv, read_lines, read_rows, read_tsv, row_format, text_of
from smoe_train.data.source import StoredFile
from smoe_train.errors import DataError

REAL = Path(os.environ.get("SMOE_TRAIN_DATA", Path(__file__).parents[5] / "shared" / "data"))


def write(path, data):
    path.write_bytes(data)
    return path


def stored(data):
    return StoredFile("made-up.tsv", len(data), lambda: io.BytesIO(data))


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_tsv_rows_are_what_stands_between_tabs():
    data = b'index\ttext\n0\t"open quote, never closed\n1\t a film . \n'
    assert list(read_tsv(stored(data))) == [
        (2, {"index": "0", "text": '"open quote, never closed'}),
        (3, {"index": "1", "text": " a film . "}),
    ]


def test_tsv_without_header_gets_its_columns_from_the_caller():
    assert list(read_tsv(stored(b"gj04\t1\t\tText.\n"), columns=["origin", "label", "mark", "text"])) == [
        (1, {"origin": "gj04", "label": "1", "mark": "", "text": "Text."})
    ]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [b"", b"\n", b"\n\n"])
def test_bom_crlf_and_blank_lines_at_the_end_make_no_difference(end, bom, last):
    data = bom + b"Quality\t#1 String\n1\tcaf\xc3\xa9\n0\tb" + last
    rows = list(read_tsv(stored(data.replace(b"\n", end)), required=["Quality", "#1 String"]))
    assert rows == [(2, {"Quality": "1", "#1 String": "café"}), (3, {"Quality": "0", "#1 String": "b"})]


@given(
    st.lists(
        st.lists(
            st.text(st.characters(exclude_characters="\t\r\n\0", exclude_categories=["Cs"])), min_size=2, max_size=2
        ).filter(any),
        min_size=1,
    )
)
def test_tsv_rows_agree_with_the_csv_module(table):
    """As Python's csv reads it with QUOTE_NONE, and as it was written."""
    text = "".join("\t".join(row) + "\n" for row in table)
    found = [list(row.values()) for _, row in read_tsv(stored(b"x\ty\n" + text.encode()))]
    assert found == table
    # splitlines() of other line ends is not how csv reads a file opened with newline="\n".
    lines = [line + "\n" for line in text.split("\n")[:-1]]
    assert list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)) == table


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a\tb\n1\n", r"line 2: has 1 columns instead of 2 \(a, b\): too few tabs"),
        (b"a\tb\n1\t2\n1\t2\t3\n", r"line 3: has 3 columns instead of 2 \(a, b\): too many tabs"),
        (b"a\tb\n1\t2\n\n3\t4\n", "line 3: is blank, but rows follow"),
        (b"a\tb\n1\t\x002\n", "line 2: has a NUL byte at byte 3 of the line"),
        (b"a\tb\n1\t2\n1\tcaf\xe9\n", r"line 3: is not valid UTF-8: .*byte 0xe9 at byte 6 of the line"),
        (b"1\t2\n", r"line 1: the header lacks 'a' \(it has '1', '2'\); add the header"),
        (b"a\ta\n", "line 1: the header names a column twice"),
        (b"", r"is empty \(0 bytes\)"),
    ],
)
def test_damaged_tsv_is_an_error_with_file_and_row(data, message):
    with pytest.raises(DataError, match=rf"made-up\.tsv: {message}"):
        list(read_tsv(stored(data), required=["a"]))


def test_short_rows_may_be_left_out_if_the_caller_counts_them():
    left_out = []
    found = read_tsv(stored(b"a\tb\n1\n2\t3\n4\n"), on_short_row=lambda row, why: left_out.append((row, why)))
    assert list(found) == [(3, {"a": "2", "b": "3"})]
    assert [row for row, _ in left_out] == [2, 4]
    assert all("too few tabs" in why for _, why in left_out)


def test_csv_rows_have_the_line_on_which_they_begin():
    data = b'\xef\xbb\xbftext,label\r\n"two\nlines, ""quoted""",a\r\nplain,b\r\n\r\n"last",c'
    assert list(read_csv(stored(data), required=["text", "label"])) == [
        (2, {"text": 'two\nlines, "quoted"', "label": "a"}),
        (4, {"text": "plain", "label": "b"}),
        (6, {"text": "last", "label": "c"}),
    ]


def test_csv_fields_may_be_longer_than_the_csv_modules_limit():
    text = "x" * 200_000
    assert list(read_csv(stored(f"text\n{text}\n".encode()))) == [(2, {"text": text})]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'a,b\n1,2\n"open,3\n4,5\n', "line 3: is not valid CSV: unexpected end of data"),
        (b'a,b\n"x"y,2\n', "line 2: is not valid CSV"),
        (b"a,b\n1,2,3\n", r"line 2: has 3 columns instead of 2 \(a, b\)"),
        (b"b,c\n1,2\n", "line 1: the header lacks 'a'"),
        (b"a,b\n1,\xff\n", "line 2: is not valid UTF-8"),
        (b"a,b\n1,\0\n", "line 2: has a NUL byte"),
        (b"", "is empty"),
    ],
)
def test_damaged_csv_is_an_error_with_file_and_row(data, message):
    with pytest.raises(DataError, match=rf"made-up\.tsv: {message}"):
        list(read_csv(stored(data), required=["a"]))


def test_jsonl_rows_are_objects(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "caf\\u00e9", "n": 1}\r\n\n{"text": "b"}')
    assert list(read_rows(path, columns=["text"])) == [(1, {"text": "café", "n": 1}), (3, {"text": "b"})]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', "line 2: is not valid JSON"),
        (b'{"text": "a"}\n["text"]\n', r"line 2: holds \['text'\] instead of an object"),
        (b'[{"text": "a"}]', "line 1: holds .* each line must be one object"),
        (b'{"text": "a"}\n{"txt": "b"}\n', "line 2: lacks 'text'; there are: 'txt'"),
        (b'{"text": "\xff"}\n', "line 1: is not valid UTF-8"),
        (b"[" * 100_000, "line 1: is not valid JSON"),
        (b"", "is empty"),
    ],
)
def test_damaged_jsonl_is_an_error_with_file_and_row(tmp_path, data, message):
    with pytest.raises(DataError, match=rf"a\.jsonl: {message}"):
        list(read_rows(write(tmp_path / "a.jsonl", data), columns=["text"]))


def test_parquet_rows_are_numbered_from_one_and_only_wanted_columns_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "BATCH_ROWS", 2)
    path = parquet(tmp_path / "a.parquet", text=["a", "b", None], label=[0, 1, -1])
    assert list(read_rows(path)) == [
        (1, {"text": "a", "label": 0}),
        (2, {"text": "b", "label": 1}),
        (3, {"text": None, "label": -1}),
    ]
    assert list(read_rows(path, columns=["label"])) == [(1, {"label": 0}), (2, {"label": 1}), (3, {"label": -1})]
    with pytest.raises(DataError, match=r"a\.parquet: lacks column 'x'; there are: 'text', 'label'"):
        list(read_rows(path, columns=["x"]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-20],
        lambda data: b"<html>",
        lambda data: b"",
        lambda data: data[:4] + bytes(len(data) - 60) + data[-56:],
    ],
)
def test_damaged_parquet_is_an_error(tmp_path, damage):
    path = parquet(tmp_path / "a.parquet", text=[str(i) for i in range(1000)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"a\.parquet: after row 0: cannot be read"):
        list(read_rows(path))


def test_the_format_goes_by_the_name(tmp_path):
    names = ["a.jsonl", "a.JSON", "a.ndjson", "a.tsv", "a.csv", "a.parquet", "a.txt"]
    assert [row_format(name) for name in names] == ["jsonl", "jsonl", "jsonl", "tsv", "csv", "parquet", None]
    with pytest.raises(DataError, match=r"a\.txt: the name does not tell its format; allowed are \.jsonl"):
        read_rows(write(tmp_path / "a.txt", b"a"))
    assert list(read_rows(tmp_path / "a.txt", "csv")) == []
    assert list(read_rows(write(tmp_path / "a.tsv", b"a\tb\n1\t2\n"))) == [(2, {"a": "1", "b": "2"})]
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_rows(tmp_path / "absent.csv")


def test_a_file_that_is_not_rows_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 1 << 20)
    with pytest.raises(DataError, match="line 1: is longer than 1 MiB"):
        list(read_lines(write(tmp_path / "a.tsv", b"x" * 3_000_000)))


def test_lines_of_a_damaged_stream_are_an_error():
    data = gzip.compress(os.urandom(10_000).hex().encode() + b"\n")
    file = StoredFile("a.gz", 0, lambda: gzip.GzipFile(fileobj=io.BytesIO(data[:-500])))
    with pytest.raises(DataError, match=r"a\.gz: cannot be read: Compressed file ended"):
        list(read_lines(file))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"body": "x"}, "a: row 7: has no column 'text'; there are: 'body'"),
        ({"text": None}, "column 'text' holds None instead of a text"),
        ({"text": 3.5}, "column 'text' holds 3.5 instead of a text"),
        ({"text": "ab\ud800"}, "half a surrogate pair at character 3"),
        ({"text": "a\0"}, "has a NUL at character 2"),
    ],
)
def test_a_text_must_be_one(row, message):
    with pytest.raises(DataError, match=message):
        text_of("a: row 7", row, "text")


@pytest.mark.parametrize(
    ("names", "config", "expected"),
    [
        (
            ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"],
            None,
            {"train": 2, "test": 1},
        ),
        (["rte/train-00000-of-00001.parquet", "cola/train-00000-of-00001.parquet"], "rte", {"train": 1}),
        (["data/train-00000-of-00001.parquet", "README.md"], "rte", {"train": 1}),
        (
            ["rte/train/0000.parquet", "rte/train/0001.parquet", "rte/validation/0000.parquet"],
            "rte",
            {"train": 2, "validation": 1},
        ),
        (["test_matched.parquet", "train.parquet"], None, {"test_matched": 1, "train": 1}),
        (["notes.txt"], None, {}),
    ],
)
def test_splits_of_a_folder_in_the_layout_of_the_hub(tmp_path, names, config, expected):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = hub_files(tmp_path, config)
    assert {split: len(paths) for split, paths in found.items()} == expected
    assert all(paths == sorted(paths) for paths in found.values())


@pytest.mark.parametrize("names", [["train-00001-of-00002"], ["train-00000-of-00001", "train"]])
def test_shards_must_be_complete_and_of_one_kind(tmp_path, names):
    for name in names:
        (tmp_path / f"{name}.parquet").touch()
    with pytest.raises(DataError, match=r"the train split has . files for . shards"):
        hub_files(tmp_path)


def test_a_link_out_of_such_a_folder_is_refused(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "secret.parquet").touch()
    (tmp_path / "home" / "train.parquet").symlink_to(tmp_path / "secret.parquet")
    with pytest.raises(DataError, match="is a link out of"):
        hub_files(tmp_path / "home")


@pytest.mark.skipif(not (REAL / "glue_data").is_dir(), reason="the folder of real data is absent (SMOE_TRAIN_DATA)")
def test_real_files_have_the_published_rows():
    """Row counts of the GLUE paper's release; SST-2 has quotes that csv's default would swallow lines by."""
    glue = REAL / "glue_data"
    assert sum(1 for _ in read_tsv(glue / "SST-2" / "train.tsv", required=["sentence", "label"])) == 67_349
    assert sum(1 for _ in read_tsv(glue / "MRPC" / "train.tsv", required=["Quality", "#1 String"])) == 3_668
    assert sum(1 for _ in read_tsv(glue / "CoLA" / "train.tsv", columns=["origin", "label", "mark", "text"])) == 8_551
    assert sum(1 for _ in read_rows(glue / "RTE" / "train.tsv")) == 2_490
    assert sum(1 for _ in read_rows(REAL / "banking77" / "train.csv", columns=["text", "category"])) == 10_003
    (path,) = hub_files(REAL / "glue_hf_parquet" / "rte")["train"]
    assert sum(1 for _ in read_rows(path, columns=["sentence1", "label"])) == 2_490
