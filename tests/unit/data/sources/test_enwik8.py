import http.server
import io
import os
import threading
import zipfile
from pathlib import Path

import pytest

from smoe_train.data import BytesConfig, build_source, prepare
from smoe_train.data.source import checksum
from smoe_train.data.sources import enwik8
from smoe_train.data.sources.enwik8 import Enwik8Config
from smoe_train.errors import DataError

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
    monkeypatch.setattr(enwik8, "FULL_BYTES", len(TEXT))
    monkeypatch.setattr(enwik8, "FULL_MD5", checksum([TEXT], "md5")[1])
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


@pytest.mark.parametrize("name", ["../enwik8", "/enwik8", "data/enwik8", "ENWIK8", "enwik8/"])
def test_only_the_member_enwik8_is_read(tmp_path, name):
    path = zipped(tmp_path / "a.zip", **{name: TEXT if name[-1] != "/" else b""})
    with pytest.raises(DataError, match="holds no member named 'enwik8'"):
        contents(piece(path), tmp_path)


def test_a_member_larger_than_enwik8_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(enwik8, "FULL_BYTES", 1999)
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
    with pytest.raises(DataError, match="there is no such file"):
        contents(piece(tmp_path), tmp_path)


@pytest.fixture
def server(monkeypatch, whole_is_small):
    """Serves a small archive as if it were the published one; ``served`` may be changed by the test."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("enwik8", TEXT)
    served = {"data": buffer.getvalue(), "requests": 0}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            served["requests"] += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(served["data"]) + served.get("missing", 0)))
            self.end_headers()
            self.wfile.write(served["data"])

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(enwik8, "URL", f"http://127.0.0.1:{httpd.server_port}/enwik8.zip")
        monkeypatch.setattr(enwik8, "ZIP_BYTES", len(served["data"]))
        monkeypatch.setattr(enwik8, "ZIP_SHA256", checksum([served["data"]])[1])
        yield served
        httpd.shutdown()
        thread.join()


def test_without_a_path_the_archive_is_downloaded_once(server, whole_is_small, tmp_path):
    for _ in range(2):
        assert contents(whole_is_small, tmp_path) == {
            "train": TEXT[:1800],
            "valid": TEXT[1800:1900],
            "test": TEXT[1900:],
        }
    assert server["requests"] == 1


def test_a_damaged_download_in_the_cache_is_fetched_again(server, whole_is_small, tmp_path):
    contents(whole_is_small, tmp_path)
    archive = tmp_path / "downloads" / "enwik8" / "enwik8.zip"
    archive.write_bytes(archive.read_bytes()[:-1])
    assert contents(whole_is_small, tmp_path)["train"] == TEXT[:1800]
    assert server["requests"] == 2


@pytest.mark.parametrize("data", [b"<html>moved</html>", b"x" * 100_000])
def test_something_else_than_the_archive_is_refused_and_not_kept(server, whole_is_small, tmp_path, data):
    server["data"] = data
    with pytest.raises(DataError, match=r"not the published archive\. Fetch enwik8\.zip .* set data\.path"):
        contents(whole_is_small, tmp_path)
    assert not list((tmp_path / "downloads").rglob("*.zip"))


def test_a_download_that_breaks_off_is_refused(server, whole_is_small, tmp_path):
    server["data"], server["missing"] = server["data"][:-10], 10
    with pytest.raises(DataError, match=r"set data\.path"):
        contents(whole_is_small, tmp_path)
    assert not list((tmp_path / "downloads").rglob("*.zip"))


def test_an_unreachable_server_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(enwik8, "URL", "http://127.0.0.1:9/enwik8.zip")
    message = (
        r"cannot download http://127\.0\.0\.1:9/enwik8\.zip.*36,445,475 bytes.*set data\.path.*data\.source=pydocs"
    )
    with pytest.raises(DataError, match=message):
        contents(Enwik8Config(), tmp_path)


@pytest.mark.skipif("SMOE_TRAIN_DATA" not in os.environ, reason="SMOE_TRAIN_DATA names no folder of real data")
def test_the_first_three_million_bytes_of_the_real_file(tmp_path):
    path = Path(os.environ["SMOE_TRAIN_DATA"]) / "enwik8" / "enwik8.0-3000000"
    config = Enwik8Config(path=path, train_bytes=2_700_000, valid_bytes=150_000, test_bytes=150_000)
    store = prepare(config, BytesConfig(), tmp_path)
    store.verify()
    data = path.read_bytes()
    assert data.startswith(b"<mediawiki xmlns=")
    assert store.tokens("valid").tobytes() == data[2_700_000:2_850_000]
    assert b"".join(store.tokens(name).tobytes() for name in store.splits) == data
