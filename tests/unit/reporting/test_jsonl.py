import os
import resource
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoe_train.errors import RunFailedError
from smoe_train.reporting import read_records
from smoe_train.reporting.sinks import JsonLines


def record(step):
    return {"step": step, "split": "train", "loss": 1.0 / (step + 3)}


def write(path, steps, resume_from_step=None):
    lines = JsonLines(path, resume_from_step)
    lines.append([record(step) for step in steps])
    lines.close()
    return lines


@settings(max_examples=60, deadline=None)
@given(crash=st.integers(0, 10_000), checkpoint=st.integers(0, 20), second=st.integers(0, 10_000))
def test_crashes_at_any_byte_leave_the_uninterrupted_record(tmp_path_factory, crash, checkpoint, second):
    folder = tmp_path_factory.mktemp("run")
    path, whole = folder / "metrics.jsonl", folder / "whole.jsonl"
    write(whole, range(1, 21))
    expected = whole.read_bytes()
    offset_of_step = [0, *(sum(map(len, expected.splitlines(True)[:n])) for n in range(1, 21))]
    for cut in (crash, second):  # the checkpoint's own records are on the disk; what follows is torn anywhere
        write(path, range(checkpoint + 1, 21), checkpoint) if path.exists() else write(path, range(1, 21))
        keep = offset_of_step[checkpoint] + cut % (len(expected) - offset_of_step[checkpoint] + 1)
        os.truncate(path, keep)
    write(path, range(checkpoint + 1, 21), checkpoint)
    assert path.read_bytes() == expected
    assert [path.name for path in sorted(folder.iterdir())] == ["metrics.jsonl", "whole.jsonl"]


def test_resume_tells_the_last_step_it_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3])
    assert write(path, [], 2).last_step == 2
    assert write(path, [], 9).last_step == 2
    assert write(tmp_path / "new.jsonl", [], 9).last_step is None


def test_a_new_run_sets_an_old_record_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1])
    write(path, [2])
    lines = write(path, [3])
    assert lines.set_aside == tmp_path / "metrics.before-2.jsonl"
    found = {file.name: read_records(file)[0]["step"] for file in tmp_path.iterdir()}
    assert found == {"metrics.before-1.jsonl": 1, "metrics.before-2.jsonl": 2, "metrics.jsonl": 3}


@pytest.fixture
def no_room():
    """Returns a function that gives files of this process so many bytes of room, or all of it again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_room(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield set_room
    set_room(None)


def steps(path):
    return [one["step"] for one in read_records(path)]


def wait_for_next_try():
    time.sleep(0.2)


def test_records_that_a_full_disk_does_not_take_wait_and_follow_in_order(tmp_path, no_room, caplog):
    path = tmp_path / "metrics.jsonl"
    write(tmp_path / "whole.jsonl", range(1, 8))
    lines = JsonLines(path, None)
    lines.append([record(1)])
    no_room(path.stat().st_size + 10)  # a record is torn in its middle
    for step in range(2, 7):
        lines.append([record(step)])
    no_room(None)
    assert path.read_bytes() != path.read_bytes().rstrip(b"\n") + b"\n", "torn"
    assert steps(path) == [1]
    wait_for_next_try()
    lines.append([record(7)])
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    lines.close()
    assert [(one.levelname, "File too large" in one.getMessage()) for one in caplog.records if one.levelno > 20] == [
        ("WARNING", True)
    ]


def test_the_oldest_records_are_given_up_where_memory_ends(tmp_path, no_room, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, None, memory_bytes=1000)
    no_room(0)
    for step in range(1, 101):
        lines.append([record(step)])
    no_room(None)
    lines.close()
    kept = steps(path)
    assert kept == list(range(kept[0], 101))
    assert 10 < len(kept) < 30
    assert path.stat().st_size <= 1000
    assert f"{kept[0] - 1} older ones are lost" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("gone", ["file", "folder", "a folder in its place"])
def test_a_place_that_vanishes_and_comes_back_is_continued(tmp_path, gone):
    folder = tmp_path / "run"
    folder.mkdir()
    path, away = folder / "metrics.jsonl", tmp_path / "away"
    lines = JsonLines(path, None)
    lines.append([record(1)])
    (folder if gone == "folder" else path).rename(away)
    if gone != "folder":
        path.mkdir()
    lines.append([record(2)])
    if gone != "folder":
        path.rmdir()
    away.rename(folder if gone == "folder" else path)
    wait_for_next_try()
    lines.append([record(3)])
    lines.close()
    assert steps(path) == [1, 2, 3]


@pytest.mark.parametrize("full_from", [None, 4, 7])
def test_a_run_that_goes_back_writes_its_later_steps_again(tmp_path, no_room, full_from):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, None)
    for step in range(1, 9):
        if step == full_from:
            no_room(path.stat().st_size + 20)
        lines.append([record(step)])
    lines.append([{**record(5), "split": "test"}])
    lines.rewind(5)
    no_room(None)
    wait_for_next_try()
    lines.append([record(6)])
    lines.close()
    assert [(one["step"], one["split"]) for one in read_records(path)] == [
        *((step, "train") for step in range(1, 6)),
        (5, "test"),
        (6, "train"),
    ]


def test_a_file_that_somebody_removes_or_cuts_goes_on_with_whole_records(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, None)
    lines.append([record(1), record(2)])
    os.truncate(path, path.stat().st_size - 5)
    lines.append([record(3)])
    assert steps(path) == [1, 3]
    path.unlink()
    lines.append([record(4)])
    assert steps(path) == [4]
    assert [one.getMessage().count("was removed or cut") for one in caplog.records] == [1, 1]
    lines.close()


def test_what_is_lost_at_the_end_is_said(tmp_path, no_room, caplog):
    lines = JsonLines(tmp_path / "metrics.jsonl", None)
    no_room(0)
    lines.append([record(1), record(2)])
    lines.close()
    assert "2 records are lost" in caplog.records[-1].getMessage()


def test_a_record_that_cannot_be_opened_at_the_start_is_an_error(tmp_path):
    with pytest.raises(RunFailedError, match="No such file"):
        JsonLines(tmp_path / "missing" / "metrics.jsonl", None)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunFailedError, match="directory"):
        JsonLines(tmp_path / "metrics.jsonl", 3)
