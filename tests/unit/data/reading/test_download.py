"""Downloads from a server on this machine: resumed, checked, and never half there."""

import hashlib
import multiprocessing
import os
from contextlib import contextmanager

import pytest
from support.file_server import serving

from smoe_train.data import progress
from smoe_train.data.reading import download
from smoe_train.data.reading.download import Published, fetch, location
from smoe_train.errors import DataError

DATA = bytes(i * 7 % 251 for i in range(10_000))
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.0)
    with serving(**{"a.zip": DATA}) as server:
        yield server


@pytest.fixture
def file(server):
    return Published("a.zip", [f"{server.url}/a.zip"], DIGEST, num_bytes=len(DATA))


def left_over(cache):
    return sorted(path.name for path in (cache / "downloads").iterdir() if path.suffix != ".lock")


def get(file, cache):
    path = fetch(file, cache, "set data.path to it")
    assert path == location(file, cache)
    assert path.read_bytes() == DATA
    assert left_over(cache) == ["a.zip"]


def test_a_file_is_fetched_once_by_a_named_agent(server, file, tmp_path):
    get(file, tmp_path)
    get(file, tmp_path)
    ((path, asked_range, agent),) = server.requests
    assert (path, asked_range) == ("/a.zip", None)
    assert agent.startswith("smoe_train"), "some mirrors answer 403 to Python-urllib"


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_a_file_of_unknown_size_is_told_by_its_digest(server, tmp_path, algorithm):
    digest = hashlib.new(algorithm, DATA).hexdigest()
    get(Published("a.zip", [f"{server.url}/a.zip"], digest, algorithm), tmp_path)


def test_a_download_is_resumed_where_it_broke_off(server, file, tmp_path):
    server.break_after = 4_000
    get(file, tmp_path)
    assert [asked for _, asked, _ in server.requests] == [None, "bytes=4000-", "bytes=8000-"]


def test_a_later_call_resumes_what_an_earlier_one_left(server, file, tmp_path):
    part = tmp_path / "downloads" / "a.zip.part"
    part.parent.mkdir()
    part.write_bytes(DATA[:9_990])
    get(file, tmp_path)
    assert [asked for _, asked, _ in server.requests] == ["bytes=9990-"]


def test_a_complete_but_unnamed_download_needs_no_server(server, file, tmp_path):
    part = tmp_path / "downloads" / "a.zip.part"
    part.parent.mkdir()
    part.write_bytes(DATA)
    get(file, tmp_path)
    assert server.requests == []


def test_a_server_that_ignores_ranges_sends_all_again(server, file, tmp_path):
    part = tmp_path / "downloads" / "a.zip.part"
    part.parent.mkdir()
    part.write_bytes(DATA[:5_000])
    server.ranges = False
    get(file, tmp_path)
    assert [asked for _, asked, _ in server.requests] == ["bytes=5000-"]


@pytest.mark.parametrize("wrong", [b"x" * 5_000, DATA[:-1] + b"?", b"x" * 20_000])
def test_a_wrong_beginning_is_thrown_away_and_fetched_anew(server, file, tmp_path, wrong):
    part = tmp_path / "downloads" / "a.zip.part"
    part.parent.mkdir()
    part.write_bytes(wrong)
    get(file, tmp_path)


def test_a_beginning_longer_than_a_file_of_unknown_size_is_thrown_away(server, tmp_path):
    part = tmp_path / "downloads" / "a.zip.part"
    part.parent.mkdir()
    part.write_bytes(DATA + b"more")
    get(Published("a.zip", [f"{server.url}/a.zip"], DIGEST), tmp_path)
    assert [asked for _, asked, _ in server.requests] == ["bytes=10004-", None], "the server answers 416"


def test_a_server_that_always_breaks_off_at_one_place_is_given_up_and_what_came_is_kept(server, file, tmp_path):
    server.ranges, server.break_after = False, 6_000
    message = r"broke off after 6,000 of 10,000 bytes\. Fetch a\.zip \(10,000 bytes, sha256 .{64}\) elsewhere; set data"
    with pytest.raises(DataError, match=message):
        fetch(file, tmp_path, "set data.path to it")
    assert len(server.requests) == 2
    assert left_over(tmp_path) == ["a.zip.part"]
    server.ranges, server.break_after = True, None
    get(file, tmp_path)
    assert server.requests[-1][1] == "bytes=6000-"


@pytest.mark.parametrize("data", [b"<html>moved</html>", b"x" * 10_000, b"x" * 100_000, DATA[:-1] + b"?", b""])
def test_something_else_than_the_file_is_refused_and_not_kept(server, file, tmp_path, data):
    server.files["/a.zip"] = data
    with pytest.raises(DataError, match="that are not the published file"):
        fetch(file, tmp_path, "set data.path to it")
    assert not location(file, tmp_path).exists()
    server.files["/a.zip"] = DATA
    get(file, tmp_path)


def test_mirrors_are_tried_in_order_and_take_over_what_came(server, file, tmp_path):
    server.break_after, server.ranges = 3_000, False
    with pytest.raises(DataError):
        fetch(file, tmp_path, "")
    server.break_after, server.ranges = None, True
    server.requests.clear()
    get(Published("a.zip", [f"{server.url}/gone.zip", *file.urls], DIGEST, num_bytes=len(DATA)), tmp_path)
    assert [(path, asked) for path, asked, _ in server.requests] == [
        ("/gone.zip", "bytes=3000-"),
        ("/a.zip", "bytes=3000-"),
    ]


@pytest.mark.parametrize("status", [403, 500])
def test_all_failures_are_named(server, file, tmp_path, status):
    server.status = status
    both = Published("a.zip", [*file.urls, f"{server.url}/b.zip"], DIGEST, num_bytes=len(DATA))
    with pytest.raises(DataError, match=rf"/a\.zip: HTTP {status} .*; .*/b\.zip: HTTP {status} .*set data\.path to it"):
        fetch(both, tmp_path, "set data.path to it")
    assert left_over(tmp_path) == []


def test_without_a_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    file = Published("a.zip", ["http://127.0.0.1:9/a.zip"], DIGEST, num_bytes=len(DATA))
    with pytest.raises(
        DataError, match=rf"cannot download http://127\.0\.0\.1:9/a\.zip: .*refused.*{DIGEST}.*set data"
    ):
        fetch(file, tmp_path, "set data.path to it")


def test_a_damaged_file_in_the_cache_is_fetched_again(server, file, tmp_path, caplog):
    get(file, tmp_path)
    location(file, tmp_path).write_bytes(DATA[:-1])
    get(file, tmp_path)
    assert "is damaged; it is fetched again" in caplog.text


def test_a_cache_that_cannot_be_written_is_an_error(server, file, tmp_path):
    (tmp_path / "blocked").write_text("a file, not a folder")
    with pytest.raises(DataError, match=r"cannot be written.*SMOE_TRAIN_CACHE"):
        fetch(file, tmp_path / "blocked", "")


def test_progress_counts_every_byte_once_also_those_of_before(server, file, tmp_path):
    tasks = []

    class Recorder:
        @contextmanager
        def task(self, description, total):
            done = []
            tasks.append((description, total, done))
            yield done.append

    server.break_after = 6_000
    with progress.using(Recorder()):
        get(file, tmp_path)
    assert [(description, total, sum(done)) for description, total, done in tasks] == [
        ("downloading a.zip", 10_000, 6_000),
        ("downloading a.zip", 10_000, 10_000),
    ]


def fetch_together(file, cache, barrier):
    barrier.wait(20)
    assert fetch(file, cache, "").read_bytes() == DATA
    os._exit(0)


def test_processes_that_want_the_same_file_fetch_it_once(server, file, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    processes = [context.Process(target=fetch_together, args=(file, tmp_path, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(server.requests) == 1
