"""Files of strangers are read only if they are files, and small; links out of a folder are found."""

import os

import pytest

from smoe_train.bounded import leading_out, read_bounded, read_json


def test_a_file_up_to_the_limit_is_read_whole(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bounded(tmp_path / "a", 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_bounded(tmp_path / "a", 4)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "device", "folder", "absent"):
        with pytest.raises(OSError):
            read_bounded(tmp_path / name, 10)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "", "\udcff"])
def test_what_is_no_json_is_a_value_error(tmp_path, text):
    (tmp_path / "a").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError):
        read_json(tmp_path / "a")


def test_links_that_lead_out_are_found(tmp_path):
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    (tmp_path / "run-other").mkdir()
    (folder / "inner").symlink_to("logs/rank-0.log")
    (folder / "logs" / "out").symlink_to(tmp_path / "run-other")  # begins with the same letters as the folder
    (folder / "loop").symlink_to("loop")
    (tmp_path / "linked").symlink_to("run")
    assert leading_out(folder, "*", "*/*") == [folder / "logs" / "out"]
    assert leading_out(tmp_path / "linked", "*/*") == [tmp_path / "linked" / "logs" / "out"]
