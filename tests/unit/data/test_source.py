import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from smoe_train.data import SOURCES, AnySourceConfig, AnyTokenizerConfig, BytesConfig, Corpus, Split
from smoe_train.data.source import StoredFile, byte_range, in_memory
from smoe_train.data.sources.text import TextConfig
from smoe_train.errors import DataError


@given(st.lists(st.binary(max_size=12), min_size=1, max_size=5), st.data())
def test_a_byte_range_is_a_slice_of_the_joined_files(tmp_path_factory, contents, data):
    folder = tmp_path_factory.mktemp("files")
    files = []
    for i, content in enumerate(contents):
        (folder / str(i)).write_bytes(content)
        files.append(StoredFile.at(folder / str(i)))
    joined = b"".join(contents)
    start = data.draw(st.integers(0, len(joined)))
    stop = data.draw(st.integers(start, len(joined)))
    split = byte_range(files, start, stop)
    assert split.num_bytes == stop - start
    for _ in range(2):
        assert b"".join(split.read()) == joined[start:stop]


def test_long_splits_come_in_chunks_of_a_mebibyte(tmp_path):
    data = bytes(1000) * 2500
    (tmp_path / "long").write_bytes(data)
    mebibyte = 1 << 20
    sizes = [mebibyte, mebibyte, len(data) - 2 * mebibyte]
    assert [len(chunk) for chunk in StoredFile.at(tmp_path / "long").chunks()] == sizes
    assert [len(chunk) for chunk in in_memory(data).read()] == sizes


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"0123456789")
    file = StoredFile.at(path)
    path.write_bytes(b"012345")
    with pytest.raises(DataError, match="ends 4 bytes early"):
        list(file.chunks())


def test_the_fingerprint_is_that_of_the_contents_and_of_the_boundaries():
    def fingerprint(train, valid, test=None):
        splits = {"train": in_memory(train), "valid": in_memory(valid)}
        return Corpus.read("made-up", splits | ({"test": in_memory(test)} if test else {})).fingerprint

    base = fingerprint(b"abc", b"def")
    assert base == fingerprint(b"abc", b"def")
    others = {fingerprint(b"abcd", b"ef"), fingerprint(b"abc", b"deg"), fingerprint(b"abc", b"d", b"ef")}
    assert len(others | {base}) == 4


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": in_memory(b"a")}, "the valid split is empty"),
        ({"train": in_memory(b""), "valid": in_memory(b"a")}, "the train split is empty"),
        ({"train": in_memory(b"a"), "valid": in_memory(b"a"), "test": in_memory(b"")}, "the test split is empty"),
        ({"train": Split(2, lambda: iter([b"a"])), "valid": in_memory(b"a")}, "1 bytes instead of 2"),
    ],
)
def test_a_corpus_must_have_what_it_says(splits, message):
    with pytest.raises(DataError, match=message):
        Corpus.read("made-up", splits)


def test_sources_are_found_by_folder_and_told_apart_by_their_tag():
    assert {"enwik8", "pydocs", "text"} <= set(SOURCES.names())
    for name, entry in SOURCES.items():
        assert entry.config.model_fields["source"].default == name
    adapter = TypeAdapter(AnySourceConfig)
    assert isinstance(adapter.validate_json('{"source": "text", "path": "a.txt"}'), TextConfig)
    with pytest.raises(ValidationError, match="does not match any of the expected tags"):
        adapter.validate_json('{"source": "enwik"}')
    assert TypeAdapter(AnyTokenizerConfig).validate_json('{"type": "bytes"}') == BytesConfig()


def test_the_package_loads_torch_only_with_the_loader():
    code = (
        "import sys, smoe_train.data as data; data.LoaderConfig(); assert 'torch' not in sys.modules; "
        "data.TrainBatches; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
