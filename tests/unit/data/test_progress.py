import logging
from contextlib import contextmanager

import pytest

from smoe_train.data import progress


class Recorder:
    def __init__(self):
        self.tasks = []

    @contextmanager
    def task(self, description, total):
        self.tasks.append([description, total, 0])

        def advance(num_bytes):
            self.tasks[-1][2] += num_bytes

        yield advance


def test_progress_is_shown_where_the_caller_says():
    recorder = Recorder()
    before = progress.current()
    with progress.using(recorder):
        assert list(progress.reported([b"abc", b"de"], "reading", 5)) == [b"abc", b"de"]
    assert recorder.tasks == [["reading", 5, 5]]
    assert progress.current() is before


def test_the_log_gets_a_line_now_and_then(monkeypatch, caplog):
    clock = iter([0.0, 4.0, 10.0, 10.0, 13.0, 30.0, 30.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    caplog.set_level(logging.INFO)
    with progress.LoggedProgress().task("downloading", 8_000_000) as advance:
        for _ in range(4):
            advance(2_000_000)
    assert caplog.messages == ["downloading: 4.0 of 8.0 MB (50%)", "downloading: 8.0 of 8.0 MB (100%)"]


def test_without_a_total_only_the_amount_is_told(monkeypatch, caplog):
    monkeypatch.setattr(progress, "REPORT_EVERY_SECONDS", 0.0)
    caplog.set_level(logging.INFO)
    with progress.LoggedProgress().task("reading", None) as advance:
        advance(1_500_000)
    assert caplog.messages == ["reading: 1.5 MB"]


def test_the_old_reporter_is_back_after_an_error():
    before = progress.current()
    with pytest.raises(KeyError), progress.using(Recorder()):
        raise KeyError
    assert progress.current() is before
