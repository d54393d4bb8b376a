import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.at_once import run_at_once

from smoe_train.data import BytesConfig, build_tokenizer, prepare_examples
from smoe_train.data.examples import Example, LabelledCorpus, TaskInfo
from smoe_train.data.sources.labelled import LabelledFilesConfig, LabelledFilesSource
from smoe_train.data.stores import known_corpora
from smoe_train.data.stores.example_store import ExampleSplit, ExampleStore, training_text, write_store
from smoe_train.data.tokenizers.word import WordConfig
from smoe_train.errors import DataError

PAIRS = TaskInfo("pairs", "classification", ("no", "yes"), ("accuracy",), submissions={"test": "PAIRS.tsv"})
ROWS = {
    "train": [Example("ab", "cde", 1, 7), Example("", "f", 0, 9)],
    "dev": [Example("gh", "", 0, 0)],
    "test": [Example("i", "jk", None, 3)],
}


@pytest.fixture
def bytes_tokenizer():
    return build_tokenizer(BytesConfig())


@pytest.fixture
def store(tmp_path, bytes_tokenizer):
    write_store(tmp_path, LabelledCorpus.create("made-up", PAIRS, ROWS, {"a.tsv: too few tabs": 2}), bytes_tokenizer)
    return ExampleStore.open(tmp_path)


def split_of(first, second, separator=(0,)):
    """A split of one example whose texts have these lengths: 1, 2, ... and 101, 102, ..."""
    texts = np.concatenate([np.arange(1, first + 1), np.arange(101, 101 + (second or 0))]).astype(np.uint16)
    offsets = np.array([0, first, first + (second or 0)])
    return ExampleSplit(texts, offsets, np.zeros(1), np.zeros(1, np.int64), separator, second is not None)


def test_a_store_holds_the_examples_split_by_split(store):
    assert store.splits == ("train", "dev", "test")
    assert store.task == PAIRS
    assert store.record.skipped == {"a.tsv: too few tabs": 2}
    train = store.split("train")
    assert len(train) == 2
    assert bytes(train.tokens_of(0, 100).tolist()) == b"ab\ncde\n"
    assert bytes(train.tokens_of(1, 100).tolist()) == b"\nf\n"
    assert train.lengths(100).tolist() == [7, 3]
    assert (train.labels.tolist(), train.index.tolist()) == ([1.0, 0.0], [7, 9])
    assert (train.labels.dtype, train.index.dtype) == (np.float64, np.int64)
    assert isinstance(train.texts, np.memmap)
    assert not train.texts.flags.writeable
    assert bytes(store.split("dev").tokens_of(0, 100).tolist()) == b"gh\n\n"
    assert np.isnan(store.split("test").labels).tolist() == [True]
    assert store.checksums()["train"] == hashlib.sha256(b"abcdef").hexdigest()
    assert set(store.checksums()) == {"corpus", "tokenizer", "train", "dev", "test"}
    assert store.tokenizer().decode([104, 105]) == "hi"
    store.verify()
    with pytest.raises(DataError, match="made-up has no dev_mismatched split; there are: train, dev, test"):
        store.split("dev_mismatched")


def test_single_texts_have_one_separator(tmp_path, bytes_tokenizer):
    rows = {"train": [Example("abc", None, 4.5, 0)], "dev": [Example("", None, 0.0, 0)]}
    task = TaskInfo("number", "regression", (), ("pearson",), high=5.0)
    write_store(tmp_path, LabelledCorpus.create("made-up", task, rows, {}), bytes_tokenizer)
    store = ExampleStore.open(tmp_path)
    assert bytes(store.split("train").tokens_of(0, 100).tolist()) == b"abc\n"
    assert bytes(store.split("train").tokens_of(0, 3).tolist()) == b"ab\n"
    assert store.split("train").labels.tolist() == [4.5]
    assert store.split("dev").tokens_of(0, 2).tolist() == [10]
    assert store.split("dev").lengths(2).tolist() == [1]


@pytest.mark.parametrize(
    ("first", "second", "max_tokens", "kept"),
    [
        (5, 5, 12, (5, 5)),  # nothing to cut
        (5, 5, 11, (5, 4)),  # equally long: the second gives first
        (5, 5, 10, (4, 4)),
        (2, 9, 8, (2, 4)),  # only the longer text is cut
        (9, 2, 8, (4, 2)),
        (9, 4, 9, (4, 3)),  # the longer one first, then both in turn
        (4, 9, 9, (4, 3)),
        (0, 9, 6, (0, 4)),
    ],
)
def test_the_longer_text_is_cut_first(first, second, max_tokens, kept):
    split = split_of(first, second)
    expected = [*range(1, kept[0] + 1), 0, *range(101, 101 + kept[1]), 0]
    assert split.tokens_of(0, max_tokens).tolist() == expected
    assert split.lengths(max_tokens).tolist() == [len(expected)]


@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 3), st.integers(0, 20))
def test_cutting_agrees_with_longest_first_of_transformers(first, second, separators, extra):
    # The loop of PreTrainedTokenizer.truncate_sequences: one token after another from the longer text.
    max_tokens = 2 * separators + 2 + extra
    one, two = list(range(1, first + 1)), list(range(101, 101 + second))
    while len(one) + len(two) + 2 * separators > max_tokens:
        (one if len(one) > len(two) else two).pop()
    split = split_of(first, second, (0,) * separators)
    assert split.tokens_of(0, max_tokens).tolist() == [*one, *[0] * separators, *two, *[0] * separators]
    assert split.lengths(max_tokens).tolist() == [len(one) + len(two) + 2 * separators]


def test_a_length_without_room_for_both_texts_is_refused():
    with pytest.raises(DataError, match="3 tokens are too few for an example, which needs at least 4"):
        split_of(5, 5).lengths(3)
    with pytest.raises(DataError, match="1 tokens are too few for an example, which needs at least 2"):
        split_of(5, None).tokens_of(0, 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"train": [Example("a", "b", None, 0)]}, "made-up: row 0 of the train split has no label"),
        ({"train": [Example("a", "b", 2, 0)]}, "the train split has the label 2; pairs has 0 to 1"),
        ({"train": [Example("a", "b", 0.5, 0)]}, "the train split has the label 0.5"),
        ({"train": [Example("a", "b", 0, 0), Example("a", None, 0, 1)]}, "some rows have a second text"),
    ],
)
def test_rows_that_do_not_fit_the_task_are_refused(tmp_path, bytes_tokenizer, rows, message):
    with pytest.raises(DataError, match=message):
        write_store(tmp_path, LabelledCorpus.create("made-up", PAIRS, rows, {}), bytes_tokenizer)


def test_damage_is_detected_and_named(store):
    path = store.folder / "train.labels.bin"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train\.labels\.bin: is damaged: sha256"):
        ExampleStore.open(store.folder).verify()
    path.write_bytes(data[:-8])
    with pytest.raises(DataError, match=r"train\.labels\.bin: has 8 bytes instead of 16"):
        ExampleStore.open(store.folder)
    path.unlink()
    with pytest.raises(DataError, match=r"train\.labels\.bin: is missing"):
        ExampleStore.open(store.folder)


def test_a_record_of_another_format_or_kind_is_refused(store):
    path = store.folder / "store.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"format_version": 99, "new": 1}))
    with pytest.raises(DataError, match="has format 99, this version reads 1"):
        ExampleStore.open(store.folder)
    path.write_text(json.dumps(record | {"splits": {"../train": record["splits"]["train"]}}))
    with pytest.raises(DataError, match="is damaged"):
        ExampleStore.open(store.folder)
    path.unlink()
    with pytest.raises(DataError, match="is not an example store"):
        ExampleStore.open(store.folder)


def test_a_tokenizer_learns_from_all_training_texts_one_a_line(tmp_path):
    rows = {"train": [Example("one\ntwo", "three", 1, 0), Example("four", "", 0, 1)], "dev": ROWS["dev"]}
    text = training_text(LabelledCorpus.create("made-up", PAIRS, rows, {}))
    assert b"".join(text.read()) == b"one two\nthree\nfour\n\n"
    assert text.num_bytes == 20


@pytest.fixture
def files(tmp_path):
    (tmp_path / "train.tsv").write_text("text\tlabel\nfine\tyes\nbad\tno\n")
    (tmp_path / "dev.tsv").write_text("text\tlabel\ngood\tyes\n")
    return LabelledFilesConfig(path=tmp_path, labels=["no", "yes"])


def test_unchanged_files_are_not_read_again_and_changed_ones_are(files, tmp_path, monkeypatch):
    monkeypatch.setattr(known_corpora, "SETTLING_NANOSECONDS", 0)
    cache = tmp_path / "cache"
    first = prepare_examples(files, BytesConfig(), cache)
    with monkeypatch.context() as patch:
        patch.setattr(LabelledFilesSource, "load", lambda *_: pytest.fail("was read again"))
        assert prepare_examples(files, BytesConfig(), cache) == first
        assert prepare_examples(files, build_tokenizer(BytesConfig()), cache) == first
    (tmp_path / "dev.tsv").write_text("text\tlabel\ngood\tno\n")
    second = prepare_examples(files, BytesConfig(), cache)
    assert second.folder != first.folder
    assert (first.split("dev").labels.tolist(), second.split("dev").labels.tolist()) == ([1.0], [0.0])


def test_a_store_that_was_cut_short_is_built_again(files, tmp_path):
    store = prepare_examples(files, BytesConfig(), tmp_path / "cache")
    (store.folder / "dev.index.bin").write_bytes(b"")
    assert prepare_examples(files, BytesConfig(), tmp_path / "cache").split("dev").index.tolist() == [0]


def prepare_and_check(config, cache):
    store = prepare_examples(config, BytesConfig(), cache)
    store.verify()
    assert len(store.split("train")) == 2


def test_processes_that_prepare_at_once_all_get_the_whole_store(files, tmp_path):
    cache = tmp_path / "cache"
    assert run_at_once(prepare_and_check, files, cache) == [0, 0, 0]
    assert len([path for path in (cache / "stores").iterdir() if path.is_dir()]) == 1


def test_bad_rows_leave_nothing_behind(files, tmp_path):
    (tmp_path / "dev.tsv").write_text("text\tlabel\ngood\tperhaps\n")
    with pytest.raises(DataError, match=r"dev\.tsv: line 2: the label 'perhaps'"):
        prepare_examples(files, BytesConfig(), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_tokenizer_that_learns_is_learnt_once(files, tmp_path, monkeypatch):
    monkeypatch.setattr(known_corpora, "SETTLING_NANOSECONDS", 0)
    store = prepare_examples(files, WordConfig(), tmp_path / "cache")
    words = store.tokenizer().decode(store.split("train").tokens_of(0, 10).tolist())
    assert words.split()[0] == "fine"
    monkeypatch.setattr(LabelledFilesSource, "load", lambda *_: pytest.fail("was read again"))
    assert prepare_examples(files, WordConfig(), tmp_path / "cache") == store
