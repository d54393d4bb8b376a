import json

import pytest
from pydantic import ValidationError

from smoe_train.data import build_source
from smoe_train.data.examples import Example
from smoe_train.data.reading.labelled_source import cut, keep
from smoe_train.data.sources import hub
from smoe_train.data.sources.labelled import LabelledFilesConfig
from smoe_train.errors import DataError

CLASSES = {"labels": ["no", "yes"]}


def load(path, **options):
    return build_source(LabelledFilesConfig(path=path, **options)).load(path)


def rows_of(number):
    return [Example(f"text {n}", None, n % 2, n) for n in range(number)]


def test_columns_classes_and_index_are_the_users(tmp_path):
    (tmp_path / "train.csv").write_text('q,a,verdict,no\n"Why,\nsir?",So.,yes,4\n')
    (tmp_path / "valid.tsv").write_text('q\ta\tverdict\tno\n"Why?\tSo."\t0\t5\n')
    (tmp_path / "test.jsonl").write_text('{"q": "Who?", "a": "I.", "no": 6}\n')
    columns = {"text": "q", "text2": "a", "label": "verdict", "index": "no"}
    corpus = load(tmp_path, task="answers", **columns, **CLASSES)
    assert corpus.splits == {
        "train": [Example("Why,\nsir?", "So.", 1, 4)],
        "dev": [Example('"Why?', 'So."', 0, 5)],
        "test": [Example("Who?", "I.", None, 6)],
    }
    assert (corpus.name, corpus.task.labels, corpus.task.metrics) == ("answers", ("no", "yes"), ("accuracy",))


def test_regression_takes_numbers_of_its_range(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\na,-1\nb,2.5\n")
    corpus = load(tmp_path / "train.csv", splits=["train"], low=-2.0, high=3.0)
    assert [one.label for one in corpus.splits["train"]] == [-1.0, 2.5]
    assert (corpus.task.kind, corpus.task.metrics, corpus.task.num_outputs) == (
        "regression",
        ("pearson", "spearman"),
        1,
    )
    with pytest.raises(
        DataError, match=r"line 3: the label '2.5' is none of labelled; allowed are numbers from -2 to 2"
    ):
        load(tmp_path / "train.csv", splits=["train"], low=-2.0, high=2.0)


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_classes_may_have_numbers_for_names_which_are_then_no_ids(tmp_path, form):
    stars = {"labels": [1, 2, 3], "splits": ["train"]}  # as YAML reads them
    rows = {
        "csv": ("text,label\n", "a,{}\n"),
        "jsonl": ("", '{{"text": "a", "label": {}}}\n'),
    }
    head, row = rows[form]
    path = tmp_path / f"train.{form}"
    path.write_text(head + row.format(1) + row.format(3))
    corpus = load(path, **stars)
    assert corpus.task.labels == ("1", "2", "3")
    assert [one.label for one in corpus.splits["train"]] == [0, 2]
    path.write_text(head + row.format(1) + row.format(0))
    with pytest.raises(DataError, match=r"the label '0' is none of labelled; allowed are 1, 2, 3$"):
        load(path, **stars)


def test_tsv_files_without_header(tmp_path):
    (tmp_path / "train.tsv").write_text("yes\tgood\nno\tbad\n")
    rows = load(tmp_path, columns=["label", "text"], splits=["train"], **CLASSES).splits["train"]
    assert rows == [Example("good", None, 1, 0), Example("bad", None, 0, 1)]
    (tmp_path / "other.csv").write_text("yes,good\n")
    with pytest.raises(DataError, match=r"other\.csv: is no TSV file, so data\.columns has no effect"):
        load(tmp_path / "other.csv", columns=["label", "text"], splits=["train"], **CLASSES)


def test_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "read_hub", lambda *asked: iter([(1, {"text": "/".join(map(str, asked)), "label": 1})]))
    options = {"hub": "me/set", "subset": "big", "revision": "r1", "dev_split": "validation", **CLASSES}
    splits = build_source(LabelledFilesConfig(**options)).load(tmp_path).splits
    assert splits == {
        "train": [Example("me/set/big/train/r1", None, 1, 0)],
        "dev": [Example("me/set/big/validation/r1", None, 1, 0)],
    }


def test_dev_and_smaller_splits_are_chosen_by_a_hash_of_the_texts(tmp_path):
    rows = rows_of(100)
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"text": one.first, "label": one.label}) + "\n" for one in rows)
    )
    splits = load(tmp_path, dev_fraction=0.2, **CLASSES).splits
    train, dev = splits["train"], splits["dev"]
    assert (len(train), len(dev)) == (80, 20)
    assert sorted([*train, *dev], key=lambda one: one.index) == rows
    assert [one.index for one in dev] == sorted(one.index for one in dev)
    assert {one.label for one in dev} == {0, 1}
    smaller = load(tmp_path, dev_fraction=0.2, train_rows=10, dev_rows=5, **CLASSES).splits
    assert (len(smaller["train"]), len(smaller["dev"])) == (10, 5)
    assert set(smaller["train"]) < set(train)
    assert set(smaller["dev"]) < set(dev)
    with pytest.raises(DataError, match=r"data\.train_rows=81 is more than the 80 rows of the train split"):
        load(tmp_path, dev_fraction=0.2, train_rows=81, **CLASSES)
    with pytest.raises(DataError, match=r"has no test split, so data\.test_rows has no effect"):
        load(tmp_path, dev_fraction=0.2, test_rows=1, **CLASSES)
    with pytest.raises(DataError, match=r"dev_fraction=0.001 leaves 100 training and 0 dev rows"):
        load(tmp_path, dev_fraction=0.001, **CLASSES)


def test_the_choice_depends_on_the_texts_alone():
    rows = rows_of(50)
    _, dev = cut(rows, 0.3)
    _, again = cut(rows[::-1], 0.3)
    assert again == dev[::-1]
    assert len(dev) == 15
    assert keep(rows[::-1], 7) == keep(rows, 7)[::-1]
    assert set(keep(rows, 7)) < set(keep(rows, 8))


def test_equal_texts_never_lie_in_both_parts():
    rows = [Example(f"text {n // 4}", "x", n % 2, n) for n in range(80)]
    train, dev = cut(rows, 0.25)
    assert len(dev) == 20
    assert not {one.first for one in train} & {one.first for one in dev}


def test_dev_fraction_beside_a_dev_split_is_refused(tmp_path):
    for name in ("train", "dev"):
        (tmp_path / f"{name}.csv").write_text("text,label\na,yes\n")
    with pytest.raises(DataError, match=r"has a dev split, so data\.dev_fraction has no effect"):
        load(tmp_path, dev_fraction=0.5, **CLASSES)


def test_a_missing_train_or_dev_split_is_refused(tmp_path):
    (tmp_path / "test.csv").write_text("text,label\na,yes\n")
    with pytest.raises(DataError, match=r"has no train split at .* \(there are: test\); .* or data\.splits=\[test\]"):
        load(tmp_path, **CLASSES)
    (tmp_path / "train.csv").write_text("text,label\na,yes\n")
    with pytest.raises(DataError, match=r"has no dev split at .* \(there are: (train, test|test, train)\)"):
        load(tmp_path, **CLASSES)
    with pytest.raises(DataError, match=r"absent\.csv: there is no such file"):
        load(tmp_path, dev_path=tmp_path / "absent.csv", **CLASSES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either labels"),
        ({"low": 0.0}, "give either labels"),
        ({**CLASSES, "low": 0.0, "high": 1.0}, "give either labels"),
        ({**CLASSES, "low": 0.0}, "give either labels"),
        ({"low": 1.0, "high": 1.0}, "low must be below high"),
        ({"labels": ["a", "a"]}, "names a class twice"),
        ({"labels": [False, True]}, "is a truth value to YAML, as yes, no, on and off are; put quotation marks"),
        ({**CLASSES, "metrics": ["pearson"]}, "metric pearson does not fit"),
        ({"low": 0.0, "high": 1.0, "metrics": ["f1"]}, "metric f1 does not fit"),
        ({"labels": ["a", "b", "c"], "metrics": ["f1"]}, "f1 needs two classes"),
        ({**CLASSES, "hub": "me/set"}, "give either hub or path"),
        ({**CLASSES, "path": None}, "give either hub or path"),
        ({**CLASSES, "revision": "r"}, "revision is of the hub"),
        ({**CLASSES, "dev_split": "dev"}, "dev_split is of the hub"),
        ({**CLASSES, "task": "../evil"}, "should match pattern"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        LabelledFilesConfig.model_validate_json(json.dumps({"path": "x", **options}))
