import contextlib
import hashlib
import json
import os

import numpy as np
import pytest
from support.at_once import run_at_once

from smoe_train.data import (
    BytesConfig,
    Corpus,
    Split,
    Tokenizer,
    TokenStore,
    TrainingText,
    build_tokenizer,
    prepare,
    progress,
)
from smoe_train.data.source import in_memory
from smoe_train.data.sources.text import TextConfig, TextFilesSource
from smoe_train.data.stores import known_corpora
from smoe_train.data.stores.token_store import default_cache, write_store
from smoe_train.data.tokenizers.sentencepiece import SentencePieceConfig
from smoe_train.data.tokenizers.word import WordConfig
from smoe_train.errors import DataError

# Lines of 256 bytes, so that all borders of the splits are ends of lines.
TEXT = (bytes(byte for byte in range(256) if byte != 10) + b"\n") * 40


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return TextConfig(path=path, valid_fraction=0.1, test_fraction=0.2)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def settled(monkeypatch):
    """Fixtures are younger than the two seconds after which files count as settled."""
    monkeypatch.setattr(known_corpora, "SETTLING_NANOSECONDS", 0)


def test_a_store_holds_the_text_split_by_split(text, cache):
    store = prepare(text, BytesConfig(), cache)
    expected = {"train": TEXT[:7168], "valid": TEXT[7168:8192], "test": TEXT[8192:]}
    assert store.splits == ("train", "valid", "test")
    for name, data in expected.items():
        tokens = store.tokens(name)
        assert isinstance(tokens, np.memmap)
        assert (tokens.dtype, tokens.ndim, tokens.tobytes()) == (np.uint8, 1, data)
        assert not tokens.flags.writeable
        assert store.num_bytes(name) == len(data)
        assert store.checksums()[name] == hashlib.sha256(data).hexdigest()
    store.verify()
    record = json.loads((store.folder / "store.json").read_text())
    assert (record["source"], record["vocab_size"], record["dtype"]) == ("text", 256, "uint8")
    assert set(store.checksums()) == {"corpus", "tokenizer", "train", "valid", "test"}


class PairTokenizer(Tokenizer):
    """Two bytes of a document make one token; an odd one at its end is dropped."""

    vocab_size = 1 << 16
    fingerprint = "pairs"
    separator_ids = (0,)

    def __init__(self):
        self.config = BytesConfig()

    def encode(self, chunks, document_ends=None):
        data, start = b"".join(chunks), 0
        ends = [] if document_ends is None else document_ends.tolist()
        for end in ends or [len(data)]:
            even = start + (end - start) // 2 * 2
            yield np.frombuffer(data[start:even], dtype=">u2").astype(np.uint16), bool(ends)
            start = end

    def build(self, config, text): ...
    def encode_texts(self, texts): ...
    def decode(self, ids): ...
    def save(self, folder): ...
    def load(self, folder, config): ...


def test_tokens_and_bytes_are_counted_apart(tmp_path):
    corpus = Corpus.read("made-up", {"train": in_memory(b"\x01\x02\x03\x04\x05"), "valid": in_memory(b"\xff\xfe")})
    write_store(tmp_path, corpus, PairTokenizer())
    store = TokenStore.open(tmp_path)
    assert store.tokens("train").tolist() == [0x0102, 0x0304]
    assert store.tokens("valid").tolist() == [0xFFFE]
    assert (store.num_bytes("train"), store.num_bytes("valid")) == (5, 2)
    assert (tmp_path / "train.bin").read_bytes() == b"\x02\x01\x04\x03", "little-endian on every machine"
    assert store.vocab_size == 1 << 16
    assert (store.document_ends("train"), store.num_words("train")) == (None, None)
    for read in (store.tokens, store.num_bytes, store.num_words, store.document_ends):
        with pytest.raises(DataError, match="made-up has no test split; there are: train, valid"):
            read("test")


def split_of(*documents, place="byte {:,}".format):
    data = b"".join(documents)
    ends = np.cumsum([len(document) for document in documents])
    return Split(len(data), lambda: iter([data[:3], data[3:]]), ends, place)


def test_documents_end_where_their_tokens_end_and_those_without_tokens_are_left_out(tmp_path):
    corpus = Corpus.read("made-up", {"train": split_of(b"abc", b"d", b"ef", b"", b"ghij"), "valid": in_memory(b"xy")})
    write_store(tmp_path, corpus, PairTokenizer())
    store = TokenStore.open(tmp_path)
    ends = store.document_ends("train")
    assert isinstance(ends, np.memmap)
    assert (ends.dtype, ends.tolist()) == (np.int64, [1, 2, 4])
    assert store.tokens("train").tolist() == [0x6162, 0x6566, 0x6768, 0x696A]
    assert (tmp_path / "train.documents.bin").read_bytes() == b"".join(i.to_bytes(8, "little") for i in (1, 2, 4))
    assert store.document_ends("valid") is None
    data = bytearray(store.documents_path("train").read_bytes())
    data[0] ^= 1
    store.documents_path("train").write_bytes(data)
    with pytest.raises(DataError, match=r"train\.documents\.bin: is damaged"):
        store.verify()


def test_the_same_bytes_in_other_documents_are_another_corpus():
    valid = in_memory(b"valid")
    texts = [in_memory(b"abcd"), split_of(b"abcd"), split_of(b"ab", b"cd"), split_of(b"a", b"bcd")]
    assert len({Corpus.read("made-up", {"train": text, "valid": valid}).fingerprint for text in texts}) == 4


def test_words_are_counted_of_the_bytes_whatever_the_tokenizer(tmp_path):
    # Six words and two lines in train, cut inside the first word; two words and one unfinished line in valid.
    splits = {"train": split_of(b"a longer\n", b" b  c  d e \n"), "valid": in_memory("naïve x".encode())}
    corpus = Corpus.read("made-up", splits, per_word=True)
    text = TrainingText(splits["train"], corpus.fingerprint, tmp_path)
    for name, config in {"bytes": BytesConfig(), "word": WordConfig()}.items():
        folder = tmp_path / name
        folder.mkdir()
        write_store(folder, corpus, build_tokenizer(config, text))
        store = TokenStore.open(folder)
        assert (store.num_words("train"), store.num_words("valid")) == (8, 3)
        assert store.document_ends("train").tolist() == ([9, 21] if name == "bytes" else [3, 8])
        assert (store.record.splits["train"].unknown, store.record.splits["valid"].unknown) == (
            (None, None) if name == "bytes" else (0, 2)
        )


def test_what_is_no_text_is_named_by_the_place_that_the_source_gives_it(tmp_path):
    splits = {"train": split_of(b"good\n"), "valid": split_of(b"ok\n", b"b\xe4d", place="poems.txt, byte {}".format)}
    corpus = Corpus.read("made-up", splits)
    tokenizer = build_tokenizer(WordConfig(), TrainingText(splits["train"], corpus.fingerprint, tmp_path))
    (tmp_path / "store").mkdir()
    with pytest.raises(DataError, match=r"made-up: valid split, poems\.txt, byte 4: is not UTF-8 text.*convert"):
        write_store(tmp_path / "store", corpus, tokenizer)


def test_the_tokenizer_lies_in_the_store(tmp_path, cache):
    (tmp_path / "text.txt").write_text("a b c d\n" * 100)
    (tmp_path / "words.txt").write_text("c\nb\na\n")
    store = prepare(TextConfig(path=tmp_path / "text.txt"), WordConfig(path=tmp_path / "words.txt"), cache)
    (tmp_path / "words.txt").unlink()
    tokenizer = store.tokenizer()
    assert tokenizer.decode(store.tokens("train")[:5].tolist()) == "a b c <unk>\n"
    assert (tokenizer.vocab_size, store.vocab_size, store.checksums()["tokenizer"]) == (5, 5, tokenizer.fingerprint)
    assert prepare(TextConfig(path=tmp_path / "text.txt"), tokenizer, cache) == store, "a ready one will do as well"
    (store.folder / "tokenizer" / "vocabulary.txt").write_text("x\n")
    with pytest.raises(DataError, match="is damaged or was changed"):
        store.verify()
    (store.folder / "tokenizer" / "smoe_tokenizer.json").unlink()
    with pytest.raises(DataError, match="holds no saved tokenizer"):
        TokenStore.open(store.folder)


def test_learning_and_tokenizing_happen_once(tmp_path, cache, settled, monkeypatch):
    (tmp_path / "text.txt").write_text("a b c d\n" * 100)
    config = TextConfig(path=tmp_path / "text.txt")
    first = {kind: prepare(config, kind, cache) for kind in (WordConfig(), SentencePieceConfig(vocab_size=266))}
    assert {store.vocab_size for store in first.values()} == {6, 266}
    monkeypatch.setattr(TextFilesSource, "load", lambda *_: pytest.fail("was read again"))
    for kind, store in first.items():
        assert prepare(config, kind, cache) == store


def test_progress_is_reported_in_bytes_of_the_text(text, cache):
    reports = []

    class Recorder:
        @contextlib.contextmanager
        def task(self, description, total):
            reports.append([description, total, 0])
            yield lambda num_bytes: reports.__setitem__(-1, [*reports[-1][:2], reports[-1][2] + num_bytes])

    with progress.using(Recorder()):
        prepare(text, BytesConfig(), cache)
    assert reports == [
        ["tokenizing train", 7168, 7168],
        ["tokenizing valid", 1024, 1024],
        ["tokenizing test", 2048, 2048],
    ]


def test_a_text_too_short_for_one_token_is_refused(tmp_path):
    corpus = Corpus.read("made-up", {"train": in_memory(b"ab"), "valid": in_memory(b"c")})
    with pytest.raises(DataError, match="valid: the split has 1 bytes but not one token"):
        write_store(tmp_path, corpus, PairTokenizer())


def test_a_text_that_changes_between_fingerprint_and_tokens_is_refused(tmp_path):
    versions = iter([b"first text", b"other text"])
    corpus = Corpus.read("made-up", {"train": Split(10, lambda: iter([next(versions)])), "valid": in_memory(b"valid")})
    with pytest.raises(DataError, match="changed while it was read"):
        write_store(tmp_path, corpus, build_tokenizer(BytesConfig()))


def test_an_unchanged_text_is_not_read_again(text, cache, settled, monkeypatch):
    first = prepare(text, BytesConfig(), cache)
    monkeypatch.setattr(TextFilesSource, "load", lambda *_: pytest.fail("was read again"))
    assert prepare(text, BytesConfig(), cache) == first


def test_a_text_replaced_with_size_and_time_preserved_gets_a_new_store(text, cache, settled):
    old = prepare(text, BytesConfig(), cache)
    times = text.path.stat()
    other = TEXT.replace(b"\x00", b"\x01")
    text.path.write_bytes(other)
    os.utime(text.path, ns=(times.st_atime_ns, times.st_mtime_ns))
    new = prepare(text, BytesConfig(), cache)
    assert new.folder != old.folder
    assert new.tokens("train").tobytes() == other[:7168]
    assert old.tokens("train").tobytes() == TEXT[:7168]


def test_a_text_changed_within_the_last_two_seconds_is_read_again(text, cache, monkeypatch):
    prepare(text, BytesConfig(), cache)
    loads = []
    load = TextFilesSource.load
    monkeypatch.setattr(TextFilesSource, "load", lambda self, cache: loads.append(1) or load(self, cache))
    prepare(text, BytesConfig(), cache)
    assert loads


def test_other_split_sizes_get_another_store(text, cache, settled):
    folders = {prepare(text, BytesConfig(), cache).folder}
    folders.add(prepare(text.model_copy(update={"valid_fraction": 0.2}), BytesConfig(), cache).folder)
    assert len(folders) == 2


def test_damage_is_detected_and_named(text, cache):
    store = prepare(text, BytesConfig(), cache)
    path = store.path("train")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    TokenStore.open(store.folder)
    with pytest.raises(DataError, match=r"train\.bin: is damaged: sha256"):
        store.verify()
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match=r"train\.bin: has 7,167 bytes instead of 7,168"):
        TokenStore.open(store.folder)
    path.unlink()
    with pytest.raises(DataError, match=r"is missing instead of 7,168"):
        TokenStore.open(store.folder)


@pytest.mark.parametrize(
    ("record", "message"),
    [("{", "is damaged"), ("{}", "is damaged: Field required"), (None, "is not a token store")],
)
def test_a_damaged_record_is_detected(text, cache, record, message):
    store = prepare(text, BytesConfig(), cache)
    path = store.folder / "store.json"
    if record is None:
        path.unlink()
    else:
        path.write_text(record)
    with pytest.raises(DataError, match=message):
        TokenStore.open(store.folder)


def test_a_record_cannot_point_outside_its_folder(text, cache):
    store = prepare(text, BytesConfig(), cache)
    path = store.folder / "store.json"
    path.write_text(path.read_text().replace('"train"', '"../train"'))
    with pytest.raises(DataError, match="is damaged"):
        TokenStore.open(store.folder)


def test_another_format_is_refused(text, cache):
    store = prepare(text, BytesConfig(), cache)
    path = store.folder / "store.json"
    path.write_text('{"format_version": 1, "source": "as of old"}')
    with pytest.raises(DataError, match="has format 1, this version reads 2"):
        TokenStore.open(store.folder)


def test_prepare_rebuilds_a_store_that_was_cut_short(text, cache, settled, caplog):
    store = prepare(text, BytesConfig(), cache)
    store.path("valid").write_bytes(b"")
    assert prepare(text, BytesConfig(), cache).tokens("valid").tobytes() == TEXT[7168:8192]
    assert "damaged or incomplete" in caplog.text


def prepare_and_check(text, cache):
    store = prepare(text, BytesConfig(), cache)
    store.verify()
    assert store.tokens("train").tobytes() == TEXT[:7168]


def test_processes_that_prepare_at_once_all_get_the_whole_store(text, cache):
    assert run_at_once(prepare_and_check, text, cache) == [0, 0, 0]
    assert len([path for path in (cache / "stores").iterdir() if path.is_dir()]) == 1


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SMOE_TRAIN_CACHE", str(tmp_path / "elsewhere"))
    assert default_cache() == tmp_path / "elsewhere"
    monkeypatch.delenv("SMOE_TRAIN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "smoe_train"


def test_a_cache_that_cannot_be_written_is_an_error(text, tmp_path):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, not a folder")
    with pytest.raises(DataError, match=r"cannot be written.*SMOE_TRAIN_CACHE"):
        prepare(text, BytesConfig(), blocked)
