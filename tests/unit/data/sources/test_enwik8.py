import hashlib
import io
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from support.file_server import serving

from smoe_train.data import BytesConfig, build_source, prepare
from smoe_train.data.reading import download
from smoe_train.data.reading.download import Published
from smoe_train.data.sources import enwik8, hub
from smoe_train.data.sources.enwik8 import Enwik8Config
from smoe_train.errors import DataError

SHARED = Path(os.environ.get("SMOE_TRAIN_DATA", Path(__file__).parents[5] / "shared" / "data"))
REAL = SHARED / "enwik8" / "enwik8.0-3000000"
TEXT = bytes(i * 7 % 251 for i in range(2000))


def contents(config, cache):
    return {name: b"".join(split.read()) for name, split in build_source(config).load(cache).splits.items()}


def piece(path, **sizes):
    return Enwik8Config(path=path, **{"train_bytes": 1500, "valid_bytes": 300, "test_bytes": 200, **sizes})


def zipped(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def raw(tmp_path):
    path = tmp_path / "enwik8.0-2000"
    path.write_bytes(TEXT)
    return path


@pytest.fixture
def whole_is_small(monkeypatch):
    """Pretends that TEXT is all of enwik8, split 1800 / 100 / 100."""
    small = replace(enwik8.ENWIK8, num_bytes=len(TEXT), md5=hashlib.md5(TEXT).hexdigest())
    monkeypatch.setattr(enwik8, "ENWIK8", small)
    return Enwik8Config(train_bytes=1800, valid_bytes=100, test_bytes=100)


EXPECTED = {"train": TEXT[:1500], "valid": TEXT[1500:1800], "test": TEXT[1800:]}


def test_the_default_split_is_that_of_the_literature():
    config = Enwik8Config()
    assert (config.train_bytes, config.valid_bytes, config.test_bytes) == (90_000_000, 5_000_000, 5_000_000)


def test_a_piece_is_split_by_offsets(raw, tmp_path):
    assert contents(piece(raw), tmp_path) == EXPECTED
    assert contents(piece(raw, train_bytes=10, test_bytes=0), tmp_path) == {"train": TEXT[:10], "valid": TEXT[10:310]}


@pytest.mark.parametrize("name", ["enwik8.zip", "renamed"])
def test_an_archive_is_read_like_the_file_in_it(tmp_path, name):
    path = zipped(tmp_path / name, enwik8=TEXT, notes=b"ignored")
    assert contents(piece(path), tmp_path) == EXPECTED


def test_a_piece_needs_split_sizes_and_the_error_gives_some(raw, tmp_path):
    with pytest.raises(
        DataError, match=r"has 2,000 bytes.*data\.train_bytes=1800 data\.valid_bytes=100 data\.test_bytes=100"
    ):
        contents(Enwik8Config(path=raw), tmp_path)
    with pytest.raises(DataError, match=r"has 2,000 bytes.*the splits ask for 2,001"):
        contents(piece(raw, train_bytes=1501), tmp_path)


def test_the_whole_file_must_be_the_published_one(raw, tmp_path, whole_is_small):
    config = whole_is_small.model_copy(update={"path": raw})
    assert contents(config, tmp_path)["test"] == TEXT[1900:]
    raw.write_bytes(TEXT[::-1])
    with pytest.raises(DataError, match="has enwik8's size but not its contents"):
        contents(config, tmp_path)


def test_a_longer_file_is_not_taken_for_enwik8(raw, tmp_path, whole_is_small):
    raw.write_bytes(TEXT + b"more")
    with pytest.raises(DataError, match="has 2,004 bytes"):
        contents(whole_is_small.model_copy(update={"path": raw}), tmp_path)


@pytest.mark.parametrize("name", ["data/enwik8", "ENWIK8", "enwik8/"])
def test_only_the_member_enwik8_is_read(tmp_path, name):
    path = zipped(tmp_path / "a.zip", **{name: TEXT if name[-1] != "/" else b""})
    with pytest.raises(DataError, match="holds no member named 'enwik8'"):
        contents(piece(path), tmp_path)


@pytest.mark.parametrize("name", ["../enwik8", "/enwik8"])
def test_an_archive_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    with pytest.raises(DataError, match="leads out of its folder"):
        contents(piece(zipped(tmp_path / "a.zip", enwik8=TEXT, **{name: TEXT})), tmp_path)


def test_a_member_larger_than_enwik8_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(enwik8, "ENWIK8", replace(enwik8.ENWIK8, num_bytes=1999))
    with pytest.raises(DataError, match=r"has 2,000 bytes \(at most 1,999\)"):
        contents(piece(zipped(tmp_path / "a.zip", enwik8=TEXT)), tmp_path)


def test_damaged_archives_are_errors(tmp_path):
    path = zipped(tmp_path / "a.zip", enwik8=os.urandom(5000))
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-30])
    with pytest.raises(DataError, match="is not a zip archive or is damaged"):
        contents(piece(path), tmp_path)
    data[2500] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match="cannot be read"):
        contents(piece(path, train_bytes=4500), tmp_path)


def test_a_path_to_nothing_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"there is no such file; set data\.path"):
        contents(piece(tmp_path / "absent"), tmp_path)


@pytest.fixture
def server(monkeypatch, whole_is_small):
    """Serves a small archive as if it were the published one; the hub has nothing."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("enwik8", TEXT)
    data = buffer.getvalue()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.0)

    def load_hub(name, config, split, revision):
        raise DataError("no hub")

    monkeypatch.setattr(hub, "load_hub", load_hub)
    with serving(**{"enwik8.zip": data}) as server:
        published = Published("enwik8.zip", [f"{server.url}/enwik8.zip"], hashlib.sha256(data).hexdigest())
        published = replace(published, num_bytes=len(data))
        monkeypatch.setattr(enwik8, "ENWIK8", replace(enwik8.ENWIK8, archive=published))
        yield server


def test_without_a_path_the_archive_is_downloaded_once(server, whole_is_small, tmp_path):
    for _ in range(2):
        assert contents(whole_is_small, tmp_path) == {
            "train": TEXT[:1800],
            "valid": TEXT[1800:1900],
            "test": TEXT[1900:],
        }
    assert len(server.requests) == 1


def test_a_damaged_download_in_the_cache_is_fetched_again(server, whole_is_small, tmp_path):
    contents(whole_is_small, tmp_path)
    archive = tmp_path / "downloads" / "enwik8.zip"
    archive.write_bytes(archive.read_bytes()[:-1])
    assert contents(whole_is_small, tmp_path)["train"] == TEXT[:1800]
    assert len(server.requests) == 2


def test_without_the_archive_the_hub_is_asked_and_its_text_checked(server, whole_is_small, tmp_path, monkeypatch):
    server.status, asked = 404, []
    text = "é" * 1000

    class Row:
        def iter(self, batch_size):
            yield {"text": [text]}

    def load_hub(*arguments):
        asked.append(arguments)
        return Row()

    monkeypatch.setattr(hub, "load_hub", load_hub)
    monkeypatch.setattr(enwik8, "ENWIK8", replace(enwik8.ENWIK8, md5=hashlib.md5(text.encode()).hexdigest()))
    for _ in range(2):
        assert b"".join(contents(whole_is_small, tmp_path).values()) == text.encode()
    assert asked == [("LTCB/enwik8", "enwik8-raw", "train", "refs/convert/parquet")]
    assert len(server.requests) == 1


def test_a_hub_with_another_text_is_refused_and_both_failures_are_told(server, whole_is_small, tmp_path, monkeypatch):
    server.status = 404

    class Row:
        def iter(self, batch_size):
            yield {"text": ["another"]}

    monkeypatch.setattr(hub, "load_hub", lambda *_: Row())
    with pytest.raises(DataError, match=r"HTTP 404.*set data\.path.*Nor from the hub: .*not its contents"):
        contents(whole_is_small, tmp_path)
    assert not [path for path in (tmp_path / "downloads").rglob("*") if path.suffix != ".lock"]


def test_an_unreachable_server_is_an_error_that_says_what_to_do(server, whole_is_small, tmp_path, monkeypatch):
    published = replace(enwik8.ENWIK8.archive, urls=["http://127.0.0.1:9/enwik8.zip"])
    monkeypatch.setattr(enwik8, "ENWIK8", replace(enwik8.ENWIK8, archive=published))
    message = r"cannot download http://127\.0\.0\.1:9/enwik8\.zip.*set data\.path.*data\.source=pydocs.*no hub"
    with pytest.raises(DataError, match=message):
        contents(whole_is_small, tmp_path)


def numbers_as_prep_enwik8_writes_them(data):
    """The line of Transformer-XL's prep_enwik8.py, word for word."""
    return " ".join([str(c) if c != ord("\n") else "\n" for c in data]).encode()


@pytest.fixture
def number_folder(tmp_path):
    folder = tmp_path / "numbers"
    folder.mkdir()
    for name, data in EXPECTED.items():
        (folder / f"{name}.txt").write_bytes(numbers_as_prep_enwik8_writes_them(data))
    return folder


def test_a_folder_of_numbers_is_read_as_the_bytes_they_stand_for(number_folder, tmp_path, monkeypatch):
    assert contents(piece(number_folder), tmp_path) == EXPECTED
    monkeypatch.setattr(enwik8, "CHUNK_BYTES", 7)
    assert contents(piece(number_folder), tmp_path) == EXPECTED
    (number_folder / "test.txt").unlink()
    with pytest.raises(DataError, match=r"there is no test\.txt.*data\.test_bytes=0"):
        contents(piece(number_folder), tmp_path)
    assert set(contents(piece(number_folder, test_bytes=0), tmp_path)) == {"train", "valid"}


def test_a_whole_folder_of_numbers_must_be_the_published_text(number_folder, tmp_path, monkeypatch):
    small = replace(enwik8.ENWIK8, num_bytes=len(TEXT), md5=hashlib.md5(TEXT).hexdigest())
    monkeypatch.setattr(enwik8, "ENWIK8", small)
    assert contents(piece(number_folder), tmp_path) == EXPECTED
    path = number_folder / "test.txt"
    path.write_bytes(path.read_bytes().replace(b"7", b"8"))
    with pytest.raises(DataError, match="has enwik8's size but not its contents"):
        contents(piece(number_folder), tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"1 2 256 4", r"train\.txt: number 3 is '256'; only 0 to 255"),
        (b"1 2  4", r"number 3 is ''"),
        (b"1 2\n4", r"number 2 is '2\\n4'"),
        (b"\xef\xbb\xbf1 2", r"number 1 is"),
        (b"", r"number 1 is ''"),
    ],
)
def test_what_is_no_number_is_an_error_with_its_place(number_folder, tmp_path, data, message):
    (number_folder / "train.txt").write_bytes(data)
    with pytest.raises(DataError, match=message):
        contents(piece(number_folder), tmp_path)


def test_number_files_of_other_sizes_are_not_taken_for_the_splits(number_folder, tmp_path):
    message = r"if they are meant to be a piece.*data\.train_bytes=1500 data\.valid_bytes=300 data\.test_bytes=200"
    with pytest.raises(DataError, match=message):
        contents(piece(number_folder, train_bytes=1600), tmp_path)


@pytest.mark.skipif(not REAL.is_file(), reason="the folder of real data is absent (SMOE_TRAIN_DATA)")
def test_the_first_three_million_bytes_of_the_real_file(tmp_path):
    path = REAL
    config = Enwik8Config(path=path, train_bytes=2_700_000, valid_bytes=150_000, test_bytes=150_000)
    store = prepare(config, BytesConfig(), tmp_path)
    store.verify()
    data = path.read_bytes()
    assert data.startswith(b"<mediawiki xmlns=")
    assert store.tokens("valid").tobytes() == data[2_700_000:2_850_000]
    assert b"".join(store.tokens(name).tobytes() for name in store.splits) == data
