import json

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from smoe_train.data import build_source
from smoe_train.data.sources import hub
from smoe_train.data.sources.records import RecordsConfig
from smoe_train.errors import DataError

TEXTS = [f"text {i}" + ("\n" if i % 2 else "") for i in range(20)]
LINES = [f"text {i}\n".encode() for i in range(20)]


def corpus(config, cache):
    return build_source(config).load(cache)


def contents(config, cache):
    return {name: b"".join(split.read()) for name, split in corpus(config, cache).splits.items()}


def write(path, texts, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({column: texts, "id": list(range(len(texts)))}), path)
    elif path.suffix == ".csv":
        path.write_text(f"id,{column}\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(texts)))
    elif path.suffix == ".tsv":
        path.write_text(f"id\t{column}\n" + "".join(f"{i}\t{text.rstrip()}\n" for i, text in enumerate(texts)))
    else:
        path.write_text("".join(json.dumps({column: text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet"])
def test_rows_are_documents_whatever_the_format(tmp_path, name):
    path = write(tmp_path / name, TEXTS)
    found = corpus(RecordsConfig(path=path, valid_fraction=0.1, test_fraction=0.1), tmp_path)
    data = {split: b"".join(part.read()) for split, part in found.splits.items()}
    assert data == {"train": b"".join(LINES[:16]), "valid": b"".join(LINES[16:18]), "test": b"".join(LINES[18:])}
    assert found.splits["valid"].document_ends.tolist() == [8, 16]
    assert found.splits["test"].place(9) == f"{path}: text 20, byte 1"
    assert not found.per_word


def test_the_column_is_chosen_and_empty_texts_are_left_out(tmp_path):
    path = write(tmp_path / "a.jsonl", ["a", "", "b", "c"], column="body")
    config = RecordsConfig(path=path, column="body", valid_fraction=0.3, test_fraction=0.0)
    assert contents(config, tmp_path) == {"train": b"a\nb\n", "valid": b"c\n"}
    with pytest.raises(DataError, match=r"a\.jsonl: line 1: lacks 'text'; there are: 'body', 'id'"):
        contents(RecordsConfig(path=path), tmp_path)


def test_splits_may_be_files_of_their_own(tmp_path):
    paths = {
        key: write(tmp_path / f"{key}.{suffix}", [key])
        for key, suffix in {"path": "jsonl", "valid_path": "csv", "test_path": "parquet"}.items()
    }
    assert contents(RecordsConfig(**paths), tmp_path) == {
        "train": b"path\n",
        "valid": b"valid_path\n",
        "test": b"test_path\n",
    }
    config = RecordsConfig(path=paths["path"], valid_path=paths["path"])
    with pytest.raises(DataError, match="each file may serve once"):
        contents(config, tmp_path)


def test_a_folder_has_splits_by_the_names_of_its_files(tmp_path):
    folder = tmp_path / "set"
    for name, texts in {
        "train-00000-of-00002": ["a"],
        "train-00001-of-00002": ["b"],
        "validation-00000-of-00001": ["c"],
        "extra": ["d"],
    }.items():
        write(folder / "data" / f"{name}.parquet", texts)
    config = RecordsConfig(path=folder, valid_split="validation")
    assert contents(config, tmp_path) == {"train": b"a\nb\n", "valid": b"c\n"}
    assert len(build_source(config).files(tmp_path)) == 3
    cut = RecordsConfig(path=folder, valid_fraction=0.4, test_fraction=0.0)
    assert contents(cut, tmp_path) == {"train": b"a\n", "valid": b"b\n"}
    with pytest.raises(
        DataError, match=r"no files of a split 'dev' .*extra, train, validation\); set data\.valid_split"
    ):
        contents(RecordsConfig(path=folder, valid_split="dev"), tmp_path)
    with pytest.raises(DataError, match="each split may serve once"):
        contents(RecordsConfig(path=folder, valid_split="train"), tmp_path)


def test_a_folder_may_hold_several_subsets(tmp_path):
    write(tmp_path / "set" / "en" / "train.jsonl", ["a", "b", "c", "d"])
    write(tmp_path / "set" / "de" / "train.jsonl", ["x"])
    config = RecordsConfig(path=tmp_path / "set", subset="en", valid_fraction=0.25, test_fraction=0.25)
    assert contents(config, tmp_path) == {"train": b"a\nb\n", "valid": b"c\n", "test": b"d\n"}
    with pytest.raises(DataError, match=r"there is no folder 'fr' in it; correct data\.subset"):
        contents(RecordsConfig(path=tmp_path / "set", subset="fr"), tmp_path)


def test_the_hub_is_asked_for_splits_by_name(tmp_path, monkeypatch):
    asked = []

    class Rows:
        def __init__(self, texts):
            self.texts = texts

        def iter(self, batch_size):
            yield {"body": self.texts, "id": list(range(len(self.texts)))}

    def load_hub(name, config, split, revision):
        asked.append((name, config, split, revision))
        return Rows({"train": TEXTS, "validation": ["v"]}[split])

    monkeypatch.setattr(hub, "load_hub", load_hub)
    config = RecordsConfig(hub="a/b", subset="en", revision="v1", column="body", valid_split="validation")
    assert contents(config, tmp_path) == {"train": b"".join(LINES), "valid": b"v\n"}
    assert set(asked) == {("a/b", "en", "train", "v1"), ("a/b", "en", "validation", "v1")}
    assert build_source(config).files(tmp_path) is None
    cut = RecordsConfig(hub="a/b", column="body", valid_fraction=0.1, test_fraction=0.0)
    assert contents(cut, tmp_path)["valid"] == b"".join(LINES[18:])
    with pytest.raises(DataError, match="a/b, split train: row 1: has no column 'text'; there are: 'body', 'id'"):
        contents(RecordsConfig(hub="a/b"), tmp_path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": null}'], r"row 1: column 'text' holds None"),
        (['{"text": "a"}', '{"text": "\\ud800"}'], "row 2: column 'text' is not valid Unicode"),
        (['{"text": "a"}', '{"text": "a\\u0000"}'], "row 2: column 'text' has a NUL at character 2"),
        (['{"text": "a"}', "{"], "line 2: is not valid JSON"),
        (['{"text": "a"}'], r"its 1 texts \(2 bytes\) are too few"),
        (['{"text": ""}'], r"its 0 texts \(0 bytes\) are too few"),
        ([], "is empty"),
    ],
)
def test_rows_that_are_no_texts_are_errors_with_file_and_row(tmp_path, lines, message):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(DataError, match=rf"a\.jsonl: {message}"):
        contents(RecordsConfig(path=path), tmp_path)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (None, {}, r"absent\.jsonl: there is no such file or folder; set data\.path"),
        ("a.txt", {}, r"a\.txt: is no file of rows; set data\.path to a file that ends in \.jsonl"),
        (
            "a.jsonl",
            {"valid_split": "validation"},
            r"is no folder, so train_split, valid_split and subset have no effect",
        ),
        (
            "a.jsonl",
            {"valid_path": "nothing.csv"},
            r"nothing\.csv: there is no such file or folder; set data\.valid_path",
        ),
        ("", {"valid_path": "nothing.csv"}, "is a folder, so valid_path has no effect"),
        ("", {}, r"holds no files of a split 'train' \(by their names there are: none\)"),
    ],
)
def test_paths_that_do_not_fit_the_options_are_errors(tmp_path, make, options, message):
    home = tmp_path / "home"
    home.mkdir()
    if make:
        (home / make).write_text('{"text": "a"}\n')
    config = RecordsConfig.model_validate(
        {"path": home / ("absent.jsonl" if make is None else make), **options}, strict=False
    )
    with pytest.raises(DataError, match=message):
        contents(config, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "set either path .* or hub"),
        ({"path": "p", "hub": "a/b"}, "set either path .* or hub"),
        ({"path": "p", "revision": "r"}, "revision has no effect on local files"),
        ({"hub": "a/b", "valid_path": "p"}, "have no effect with hub"),
        ({"hub": "a/b", "test_split": "t"}, "test_split needs valid_split"),
        ({"path": "p", "test_path": "t"}, "test_path needs valid_path"),
        ({"path": "p", "valid_path": "v", "valid_split": "w"}, "valid_split and valid_path exclude each other"),
        (
            {"hub": "a/b", "valid_split": "v", "test_fraction": 0.1},
            "have no effect where the validation split is given",
        ),
        ({"path": "p", "valid_fraction": 0.5, "test_fraction": 0.5}, "must be below 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        RecordsConfig.model_validate(options, strict=False)
