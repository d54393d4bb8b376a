import pytest
from pydantic import ValidationError

from smoe_train.data import build_source
from smoe_train.data.sources.text import TextConfig
from smoe_train.errors import DataError


def contents(config, cache):
    return {name: b"".join(split.read()) for name, split in build_source(config).load(cache).splits.items()}


def write(path, data):
    path.write_bytes(data)
    return path


def test_a_file_is_cut_where_lines_begin_and_taken_as_it_is(tmp_path):
    data = b"\x00\xff\r\n" * 25
    path = write(tmp_path / "data.bin", data)
    assert contents(TextConfig(path=path), tmp_path) == {
        "train": data[:92],
        "valid": data[92:96],
        "test": data[96:],
    }
    assert contents(TextConfig(path=path, valid_fraction=0.3, test_fraction=0.0), tmp_path) == {
        "train": data[:72],
        "valid": data[72:],
    }
    assert contents(TextConfig(path=path, valid_fraction=0.28, test_fraction=0.0), tmp_path)["train"] == data[:72]


@pytest.mark.parametrize(
    ("text", "train"),
    [("word " * 21, "word " * 15), ("ä" * 51, "ä" * 36), ("x" * 100, "x" * 70)],
    ids=["words", "characters", "bytes"],
)
def test_a_text_without_lines_is_cut_where_words_or_characters_begin(text, train, tmp_path):
    path = write(tmp_path / "text", text.encode())
    parts = contents(TextConfig(path=path, valid_fraction=0.3, test_fraction=0.0), tmp_path)
    assert parts["train"].decode() == train
    assert b"".join(parts.values()).decode() == text


def test_a_folder_is_joined_by_name(tmp_path):
    write(tmp_path / "b.txt", b"2" * 50)
    write(tmp_path / "a.txt", b"1" * 50)
    write(tmp_path / "empty.txt", b"")
    write(tmp_path / "notes.md", b"no")
    (tmp_path / "sub.txt").mkdir()
    parts = contents(TextConfig(path=tmp_path), tmp_path)
    assert b"".join(parts.values()) == b"1" * 50 + b"2" * 50


def test_splits_may_be_files_of_their_own(tmp_path):
    train, valid, test = (write(tmp_path / f"{name}.txt", name.encode()) for name in ("train", "valid", "test"))
    config = TextConfig(path=train, valid_path=valid)
    assert contents(config, tmp_path) == {"train": b"train", "valid": b"valid"}
    config = TextConfig(path=train, valid_path=valid, test_path=test)
    assert contents(config, tmp_path) == {"train": b"train", "valid": b"valid", "test": b"test"}
    with pytest.raises(DataError, match="belongs to both the train and the valid split"):
        contents(TextConfig(path=tmp_path, valid_path=valid), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"valid_path": "v", "valid_fraction": 0.1}, "have no effect with valid_path"),
        ({"valid_path": "v", "test_fraction": 0.0}, "have no effect with valid_path"),
        ({"test_path": "t"}, "test_path needs valid_path"),
        ({"valid_fraction": 0.5, "test_fraction": 0.5}, "must be below 1"),
        ({"valid_fraction": 0.96}, "must be below 1"),
        ({"valid_fraction": 0.0}, "greater than 0"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        TextConfig.model_validate({"path": "p", **options}, strict=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "there is no such file or folder; set data.path"),
        ("folder", r"holds no \*.txt file"),
        ("empty.txt", r"holds no text \(0 bytes\)"),
        ("short.txt", "9 bytes are too few to cut off valid_fraction=0.05"),
    ],
)
def test_texts_that_cannot_be_used_are_errors(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "empty.txt", b"")
    write(tmp_path / "short.txt", b"too short")
    with pytest.raises(DataError, match=message):
        contents(TextConfig(path=tmp_path / name), tmp_path)


def test_an_empty_split_file_is_an_error(tmp_path):
    config = TextConfig(path=write(tmp_path / "a", b"abc"), valid_path=write(tmp_path / "b", b""))
    with pytest.raises(DataError, match="the valid split is empty"):
        contents(config, tmp_path)


def test_several_files_are_documents_and_one_is_not(tmp_path):
    for name in "abcd":
        write(tmp_path / f"{name}.txt", name.encode() * 10)
    folder = build_source(TextConfig(path=tmp_path, valid_fraction=0.25, test_fraction=0.25)).load(tmp_path)
    assert {name: split.document_ends.tolist() for name, split in folder.splits.items()} == {
        "train": [10, 20],
        "valid": [10],
        "test": [10],
    }
    assert folder.splits["valid"].place(3) == f"{tmp_path / 'c.txt'}, byte 3"
    single = build_source(TextConfig(path=tmp_path / "a.txt", valid_path=tmp_path / "b.txt")).load(tmp_path)
    assert {split.document_ends for split in single.splits.values()} == {None}
    mixed = build_source(TextConfig(path=tmp_path / "a.txt", valid_path=write_folder(tmp_path / "v"))).load(tmp_path)
    assert mixed.splits["train"].document_ends.tolist() == [10], "with documents in one split there are some in all"


def write_folder(folder):
    folder.mkdir()
    write(folder / "1.txt", b"one")
    write(folder / "2.txt", b"two")
    return folder


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    folder = write_folder(tmp_path / "home")
    (folder / "0.txt").symlink_to(write(tmp_path / "secret.txt", b"secret"))
    with pytest.raises(DataError, match=r"0\.txt: is a link out of .*home"):
        contents(TextConfig(path=folder), tmp_path)
