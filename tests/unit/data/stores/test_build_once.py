import errno
import multiprocessing
import os
import signal
import time

import pytest

from smoe_train.data.stores.build_once import build_once
from smoe_train.errors import DataError


def complete(folder):
    return (folder / "b").is_file()


def write_two(folder):
    (folder / "a").write_text("1")
    (folder / "b").write_text("2")


def test_a_folder_is_built_once(tmp_path):
    final = tmp_path / "deep" / "final"
    build_once(final, write_two, complete)
    assert sorted(path.name for path in final.iterdir()) == ["a", "b"]
    build_once(final, lambda folder: pytest.fail("built again"), complete)


def test_a_failed_build_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "a").write_text("1")
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        build_once(tmp_path / "final", fail, complete)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_full_disk_is_reported_with_what_to_do(tmp_path):
    def fail(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError, match="No space left on device; free some space, or set SMOE_TRAIN_CACHE"):
        build_once(tmp_path / "final", fail, complete)


def test_an_incomplete_folder_is_built_again_and_said_so(tmp_path, caplog):
    final = tmp_path / "final"
    final.mkdir()
    (final / "old").write_text("")
    build_once(final, write_two, complete)
    assert sorted(path.name for path in final.iterdir()) == ["a", "b"]
    assert "damaged or incomplete" in caplog.text


def killed_half_way(final):
    def build(folder):
        (folder / "a").write_text("1")
        os.kill(os.getpid(), signal.SIGKILL)

    build_once(final, build, complete)


def test_a_killed_build_is_invisible_and_does_not_block_the_next(tmp_path):
    final = tmp_path / "final"
    process = multiprocessing.get_context("fork").Process(target=killed_half_way, args=(final,))
    process.start()
    process.join(20)
    assert process.exitcode == -signal.SIGKILL
    assert not final.exists()
    assert (tmp_path / "final.partial" / "a").exists()
    build_once(final, write_two, complete)
    assert complete(final)
    assert not (tmp_path / "final.partial").exists()


def build_slowly(final, log, barrier):
    def build(folder):
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        (folder / "a").write_text("1")
        time.sleep(0.3)
        (folder / "b").write_text("2")

    barrier.wait(20)
    build_once(final, build, complete)
    assert complete(final)


def test_processes_that_want_the_same_folder_build_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, log = context.Barrier(3), tmp_path / "log"
    processes = [context.Process(target=build_slowly, args=(tmp_path / "final", log, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(log.read_text().splitlines()) == 1
