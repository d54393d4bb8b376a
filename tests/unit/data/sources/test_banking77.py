import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from smoe_train.data import build_source
from smoe_train.data.examples import Example
from smoe_train.data.sources import hub
from smoe_train.data.sources.banking77 import INTENTS, Banking77Config
from smoe_train.errors import DataError
from tests.support.real_data import DATA, needs_real_data

# Ids on the hub, from the card of the data set: the second and the last but one of the alphabet without regard to case.
ROWS = [Example('Am I "old"\nenough, now?', None, 1, 0), Example("Where is it?", None, 51, 1)]
CSV = 'text,category\n"\nAm I ""old""\nenough, now?\n\n",age_limit\nWhere is it?,Refund_not_showing_up\n'


def load(path, **options):
    options.setdefault("allow_piece", True)
    return build_source(Banking77Config(path=path, **options)).load(path)


def test_quoted_fields_hold_line_ends_and_all_formats_agree(tmp_path):
    files = {
        "csv/train.csv": CSV,
        "crlf/train.csv": CSV.replace("now?\n\n", "now?\r\n\r\n").replace("limit\n", "limit\r\n"),
        "jsonl/train.jsonl": "".join(
            json.dumps({"text": one.first, "label": one.label, "label_text": INTENTS[one.label]}) + "\n" for one in ROWS
        ),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text, newline="")
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    table = pa.table({"text": [one.first for one in ROWS], "label": [one.label for one in ROWS]})
    pyarrow.parquet.write_table(table, tmp_path / "parquet" / "data" / "train-00000-of-00001.parquet")
    for name in ("csv", "crlf", "jsonl", "parquet"):
        assert load(tmp_path / name, splits=["train"]).splits == {"train": ROWS}, name


def test_the_test_split_is_reported_on_unless_dev_is_cut_from_train(tmp_path):
    (tmp_path / "train.csv").write_text(CSV)
    (tmp_path / "test.csv").write_text("text,category\nHow?,atm_support\n")
    assert load(tmp_path).splits == {"train": ROWS, "dev": [Example("How?", None, 3, 0)]}
    assert {name: len(rows) for name, rows in load(tmp_path, dev_fraction=0.5).splits.items()} == {
        "train": 1,
        "dev": 1,
        "test": 1,
    }


def test_without_path_rows_come_from_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "read_hub", lambda *asked: iter([(1, {"text": "/".join(map(str, asked)), "label": 76})]))
    splits = build_source(Banking77Config(allow_piece=True, revision="r1")).load(tmp_path).splits
    assert splits["train"] == [Example("legacy-datasets/banking77/None/train/r1", None, 76, 0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,category\nHow?,no_such_intent\n", r"line 2: the label 'no_such_intent' is none of banking77"),
        ("text,category\nHow?,77\n", r"line 2: the label '77' is none of banking77; .* or their ids 0 to 76"),
        ('text,category\n"a\nb",age_limit\nHow?\n', r"line 4: has 1 columns instead of 2"),
        ('text,category\n"a,age_limit\n', r"line 2: is not valid CSV"),
        ("How?,age_limit\nWho?,age_limit\n", r"line 2: has no column 'category' or 'label_text' or 'label'"),
        ("", "is empty"),
    ],
)
def test_bad_rows_are_named(tmp_path, text, message):
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(DataError, match=rf"train\.csv: {message}"):
        load(tmp_path, splits=["train"])


def test_categories_must_be_those_of_the_set(tmp_path):
    (tmp_path / "train.csv").write_text(CSV)
    path = tmp_path / "categories.json"
    path.write_text(json.dumps(INTENTS[::-1]))
    assert load(tmp_path, splits=["train"]).splits["train"] == ROWS
    for text, message in [(json.dumps(INTENTS[1:]), "'activate_my_card' is the first difference"), ("{", "is no JSON")]:
        path.write_text(text)
        with pytest.raises(DataError, match=rf"categories\.json: .*{message}"):
            load(tmp_path, splits=["train"])


@needs_real_data
def test_the_real_training_split_is_whole():
    splits = load(DATA / "banking77", dev_fraction=0.1, allow_piece=False).splits
    assert len(splits["train"]) + len(splits["dev"]) == 10_003
    assert len(splits["dev"]) == 1_000
    assert {one.label for one in splits["train"]} == set(range(77))
