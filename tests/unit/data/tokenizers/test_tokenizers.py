"""What every tokenizer promises; what is special about each is in a file of its own."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_tokenizers import TEXT, write_gpt2

from smoe_train.data import TOKENIZERS, BytesConfig, TrainingText, build_tokenizer, load_tokenizer, save_tokenizer
from smoe_train.data.source import in_memory
from smoe_train.data.stores.saved_tokenizer import RECORD, find_saved, ready_tokenizer, tokenizer_files
from smoe_train.data.tokenizers.saved import SavedConfig
from smoe_train.data.tokenizers.sentencepiece import SentencePieceConfig
from smoe_train.data.tokenizers.transformers import TransformersConfig
from smoe_train.data.tokenizers.word import WordConfig
from smoe_train.errors import DataError
from smoe_train.registry import UnknownNameError

KINDS = ("bytes", "word", "sentencepiece", "transformers")


@pytest.fixture(scope="module")
def all_tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    write_gpt2(folder / "gpt2")
    text = TrainingText(in_memory(TEXT.encode()), "made up", folder)
    configs = [
        BytesConfig(),
        WordConfig(),
        SentencePieceConfig(vocab_size=320),
        TransformersConfig(path=folder / "gpt2"),
    ]
    return {config.type: build_tokenizer(config, text) for config in configs}


@pytest.fixture(params=KINDS)
def tokenizer(all_tokenizers, request):
    return all_tokenizers[request.param]


def ids_of(tokenizer, chunks, ends=None):
    found = list(tokenizer.encode(chunks, None if ends is None else np.array(ends, dtype=np.int64)))
    assert all(ids.dtype == np.dtype(tokenizer.dtype) and ids.ndim == 1 for ids, _ in found)
    return [int(i) for ids, _ in found for i in ids], sum(ends_document for _, ends_document in found)


def test_every_tokenizer_is_tested_here():
    assert set(TOKENIZERS.names()) == {*KINDS, "saved"}


@given(st.data())
def test_ids_do_not_depend_on_chunks_and_documents_are_encoded_one_by_one(all_tokenizers, draw):
    tokenizer = all_tokenizers[draw.draw(st.sampled_from(KINDS))]
    line = st.text(st.sampled_from("the cat é漢🙂"), max_size=12).map(lambda text: text + "\n")
    documents = [text.encode() for text in draw.draw(st.lists(line, min_size=1, max_size=4))]
    data = b"".join(documents)
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=5)))
    chunks = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    mark = [] if tokenizer.end_of_document_id is None else [tokenizer.end_of_document_id]
    expected = [i for ids in tokenizer.encode_texts([text.decode() for text in documents]) for i in ids + mark]
    found, ends = ids_of(tokenizer, chunks, np.cumsum([len(text) for text in documents]))
    assert (found, ends) == (expected, len(documents))
    assert max(found) < tokenizer.vocab_size
    assert ids_of(tokenizer, chunks) == (tokenizer.encode_texts([data.decode()])[0], 0)


def test_a_saved_tokenizer_is_the_same_again(tokenizer, tmp_path):
    folder = tmp_path / "new" / "tokenizer"
    save_tokenizer(tokenizer, folder)
    assert sorted(tokenizer_files(folder)) == sorted(path.name for path in folder.iterdir())
    found = load_tokenizer(folder)
    assert found.config == tokenizer.config
    for name in ("fingerprint", "vocab_size", "separator_ids", "end_of_document_id", "unknown_id"):
        assert getattr(found, name) == getattr(tokenizer, name), name
    assert found.encode_texts(["the cat, naïve\n", ""]) == tokenizer.encode_texts(["the cat, naïve\n", ""])
    assert build_tokenizer(SavedConfig(path=folder)).fingerprint == tokenizer.fingerprint
    assert build_tokenizer(SavedConfig(path=folder.parent)).fingerprint == tokenizer.fingerprint, "as runs hold it"


def test_separators_are_ids_and_no_tokenizer_stumbles_over_nothing(tokenizer):
    assert tokenizer.separator_ids
    assert all(0 <= i < tokenizer.vocab_size for i in tokenizer.separator_ids)
    assert (tokenizer.encode_texts([]), tokenizer.encode_texts([""]), tokenizer.decode([])) == ([], [[]], "")
    assert ids_of(tokenizer, []) == ([], 0)


def test_arguments_and_json_that_hold_no_characters_are_no_reason_to_fail(tokenizer):
    assert tokenizer.encode_texts([b"\xff".decode("utf-8", "surrogateescape")])[0]
    assert tokenizer.encode_texts(["\ud83d"])[0], "half an emoji, as JSON may spell it"


def test_half_a_character_is_shown_as_a_replacement(all_tokenizers):
    tokenizer = all_tokenizers["bytes"]
    assert tokenizer.decode([0x41, 0xC3]) == "A\ufffd"
    assert tokenizer.encode_texts([b"\xff".decode("utf-8", "surrogateescape")]) == [[0xFF]]


@given(st.lists(st.binary(max_size=20), max_size=8))
def test_bytes_are_their_own_ids_wherever_the_text_is_cut(chunks):
    assert ids_of(build_tokenizer(BytesConfig()), chunks) == (list(b"".join(chunks)), 0)


@given(st.text())
def test_bytes_survive_the_round_trip(text):
    tokenizer = build_tokenizer(BytesConfig())
    assert tokenizer.decode(tokenizer.encode_texts([text])[0]) == text


@pytest.fixture
def saved(all_tokenizers, tmp_path):
    save_tokenizer(all_tokenizers["word"], tmp_path / "saved")
    return tmp_path / "saved"


def change_record(folder, **changes):
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(record | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / RECORD).unlink(), "holds no saved tokenizer"),
        (lambda folder: (folder / RECORD).write_text("{"), r"smoe_tokenizer\.json: is damaged"),
        (lambda folder: (folder / "vocabulary.txt").unlink(), r"vocabulary\.txt: is missing"),
        (lambda folder: (folder / "vocabulary.txt").write_text("other\nwords\n"), "4 ids with fingerprint"),
        (lambda folder: change_record(folder, fingerprint="0" * 64), r"says .* with fingerprint 0000000000000000"),
        (lambda folder: change_record(folder, type="wrod"), "cannot be used by this version: unknown tokenizer 'wrod'"),
        (lambda folder: change_record(folder, config={"type": "word", "hue": 1}), "Extra inputs are not permitted"),
        (lambda folder: change_record(folder, files=["../vocabulary.txt"]), r"smoe_tokenizer\.json: is damaged"),
    ],
)
def test_damage_to_a_saved_tokenizer_is_an_error(saved, damage, message):
    damage(saved)
    with pytest.raises(DataError, match=message):
        load_tokenizer(saved)


def test_saving_replaces_a_tokenizer_but_nothing_else(all_tokenizers, saved, tmp_path):
    save_tokenizer(all_tokenizers["bytes"], saved)
    assert tokenizer_files(saved) == [RECORD] == [path.name for path in saved.iterdir()]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="holds something other than a tokenizer"):
        save_tokenizer(all_tokenizers["bytes"], other)
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


def test_a_save_that_fails_leaves_what_was_there(all_tokenizers, saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def break_off(folder):
        (folder / "half").write_text("written")
        raise OSError("disk full")

    monkeypatch.setattr(all_tokenizers["bytes"], "save", break_off)
    with pytest.raises(OSError, match="disk full"):
        save_tokenizer(all_tokenizers["bytes"], saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no saved tokenizer .*tokenizer train"):
        find_saved(tmp_path)


def test_what_is_learnt_is_kept_by_text_and_options(tmp_path):
    reads = []

    def training_text(data):
        split = in_memory(data)
        text = TrainingText(split, hashlib.sha256(data).hexdigest(), tmp_path)
        object.__setattr__(split, "read", lambda read=split.read: reads.append(data) or read())
        return text

    first, second = training_text(b"a b b\n"), training_text(b"a c\n")
    assert ready_tokenizer(WordConfig(), first.fingerprint, tmp_path) is None
    learnt = build_tokenizer(WordConfig(), first)
    assert build_tokenizer(WordConfig(), first).fingerprint == learnt.fingerprint
    assert reads == [b"a b b\n"], "learnt once"
    ready = ready_tokenizer(WordConfig(), first.fingerprint, tmp_path)
    assert ready is not None
    assert ready.fingerprint == learnt.fingerprint
    assert build_tokenizer(WordConfig(), second).fingerprint != learnt.fingerprint
    assert build_tokenizer(WordConfig(min_count=2), first).vocab_size == 3
    assert ready_tokenizer(BytesConfig(), first.fingerprint, tmp_path).vocab_size == 256


def test_what_is_kept_and_damaged_is_learnt_again(tmp_path, caplog):
    text = TrainingText(in_memory(b"a b\n"), "text", tmp_path)
    learnt = build_tokenizer(WordConfig(), text)
    (path,) = tmp_path.glob("tokenizers/word-*/vocabulary.txt")
    path.write_text("x\n")
    assert build_tokenizer(WordConfig(), text).fingerprint == learnt.fingerprint
    assert "damaged or incomplete" in caplog.text


def test_learning_from_what_is_no_text_names_the_place(tmp_path):
    text = TrainingText(in_memory(b"good\nb\xe4d\n"), "latin-1", tmp_path)
    for config in (WordConfig(), SentencePieceConfig()):
        with pytest.raises(DataError, match=r"train split, byte 6: is not UTF-8 text.*tokenizer\.type=bytes"):
            build_tokenizer(config, text)


def test_unknown_tokenizers_are_refused_with_the_choices():
    with pytest.raises(UnknownNameError, match="unknown tokenizer 'byte'; did you mean 'bytes'"):
        TOKENIZERS.get("byte")
