import zipfile

import pyarrow as pa
import pyarrow.parquet
import pytest

from smoe_train.data import build_source
from smoe_train.data.examples import Example
from smoe_train.data.sources import hub
from smoe_train.data.sources.sst5 import Sst5Config, read_tree
from smoe_train.errors import DataError
from tests.support.real_data import DATA, needs_real_data

ROWS = [Example("A fine film ( really ) .", None, 4, 0), Example("Bad/dull", None, 0, 1)]
FASTTEXT = "__label__5\tA fine film ( really ) .\n__label__1\tBad/dull\n"
TREES = "(4 (3 (2 A) (3 (3 fine) (2 film))) (3 (2 (2 -LRB-) (2 (2 really) (2 -RRB-))) (2 .)))\n(0 (0 Bad\\/dull))\n"


def load(path, **options):
    options.setdefault("allow_piece", True)
    return build_source(Sst5Config(path=path, **options)).load(path)


def test_fasttext_trees_jsonl_csv_and_parquet_agree(tmp_path):
    jsonl = '{"text": "A fine film ( really ) .", "label": 4, "label_text": "very positive"}\n'
    files = {
        "fasttext/sst_train.txt": FASTTEXT,
        "crlf/train.txt": FASTTEXT.replace("\n", "\r\n"),
        "trees/train.txt": TREES,
        "jsonl/train.jsonl": jsonl + '{"text": "Bad/dull", "label": 0, "label_text": "very negative"}\n',
        "csv/train.csv": "label,text\nvery positive,A fine film ( really ) .\nvery negative,Bad/dull\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text, newline="")
    (tmp_path / "parquet").mkdir()
    table = pa.table({"text": [one.first for one in ROWS], "label": [one.label for one in ROWS]})
    pyarrow.parquet.write_table(table, tmp_path / "parquet" / "train-00000-of-00001.parquet")
    with zipfile.ZipFile(tmp_path / "trees.zip", "w") as archive:
        archive.writestr("trees/train.txt", TREES)
    for name in ("fasttext", "crlf", "trees", "jsonl", "csv", "parquet", "trees.zip"):
        assert load(tmp_path / name, splits=["train"]).splits == {"train": ROWS}, name


def test_without_path_rows_come_from_the_hub(tmp_path, monkeypatch):
    asked = []

    def read_hub(name, config, split, revision):
        asked.append((name, config, split, revision))
        yield 1, {"text": split, "label": 3}

    monkeypatch.setattr(hub, "read_hub", read_hub)
    splits = build_source(Sst5Config(allow_piece=True)).load(tmp_path).splits
    assert asked == [("SetFit/sst5", None, split, None) for split in ("train", "validation", "test")]
    assert splits["dev"] == [Example("validation", None, 3, 0)]
    assert splits["test"] == [Example("test", None, 3, 0)]


def test_a_piece_is_refused_unless_allowed(tmp_path):
    (tmp_path / "train.txt").write_text(FASTTEXT)
    with pytest.raises(DataError, match=r"has 2 rows, and the train split of sst5 has 8,544"):
        load(tmp_path, splits=["train"], allow_piece=False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("__label__6\tgood", "line 2: '__label__6.*neither a tree"),
        ("__label__0\tgood", "line 2: '__label__0.*neither a tree"),
        ("good", "line 2: 'good' is neither a tree"),
        ("(5 good)", "line 2: .* is not one tree"),
        ("(3 (2 good) (2 film)", "line 2: .* is not one tree"),
        ("(3 good) (2 film)", "line 2: .* is not one tree"),
        ("__label__4\tgo\0od", "line 2: has a NUL byte"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    (tmp_path / "train.txt").write_text(f"__label__4\tgood\n{line}\n")
    with pytest.raises(DataError, match=rf"train\.txt: {message}"):
        load(tmp_path, splits=["train"])


def test_a_tree_becomes_its_leaves_and_the_label_of_its_root():
    assert read_tree("x", "(3 (2 It) (4 (2 's) (4 fun)))") == {"label": 3, "text": "It 's fun"}


@needs_real_data
def test_real_splits_are_whole_and_both_forms_agree():
    fasttext = load(DATA / "sst5", splits=["train", "dev"], allow_piece=False).splits
    assert {name: len(rows) for name, rows in fasttext.items()} == {"train": 8_544, "dev": 1_101}
    assert {one.label for one in fasttext["train"]} == {0, 1, 2, 3, 4}
    assert load(DATA / "sst5" / "trees", splits=["dev"], allow_piece=False).splits["dev"] == fasttext["dev"]
