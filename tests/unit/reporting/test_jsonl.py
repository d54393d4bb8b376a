import os
from pathlib import Path

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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device without room")
def test_a_full_disk_ends_the_run_with_a_reason(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    lines = JsonLines(tmp_path / "metrics.jsonl", None)
    with pytest.raises(RunFailedError, match=r"metrics\.jsonl: cannot be written: No space left on device"):
        lines.append([record(1)])


def test_a_missing_folder_ends_the_run_with_a_reason(tmp_path):
    with pytest.raises(RunFailedError, match="No such file"):
        JsonLines(tmp_path / "missing" / "metrics.jsonl", None)
