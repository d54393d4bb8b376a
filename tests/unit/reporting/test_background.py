import logging
import threading
import time

import pytest

from smoe_train.reporting.sinks import Background


class FakeSink:
    name = "fake"

    def __init__(self, **behaviour):
        self.behaviour = behaviour
        self.calls = []
        self.abandoned = False

    def _do(self, method, argument=None):
        self.calls.append((method, argument))
        self.behaviour.get(method, lambda: None)()

    def open(self):
        self._do("open")

    def metrics(self, records):
        self._do("metrics", records)

    def routing(self, records):
        self._do("routing", records)

    def note(self, text):
        self._do("note", text)

    def close(self):
        self._do("close")

    def patience_seconds(self):
        return self.behaviour.get("patience", lambda: 0.0)()

    def abandon(self):
        self.abandoned = True


def fail(error=RuntimeError):
    def raise_it():
        raise error("no such luck\nsecond line")

    return raise_it


def close(background, seconds=5.0):
    background.begin_close()
    background.end_close(time.monotonic() + seconds)


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_calls_arrive_in_order_and_as_copies(caplog):
    go = threading.Event()
    sink = FakeSink(open=go.wait)
    background = Background(sink)
    record = {"step": 1}
    background.metrics([record])
    record["step"] = 99
    background.note("hello")
    background.routing([{"layer": 2}])
    go.set()
    close(background)
    expected = [("metrics", [{"step": 1}]), ("note", "hello"), ("routing", [{"layer": 2}])]
    assert sink.calls == [("open", None), *expected, ("close", None)]
    assert warnings(caplog) == []


@pytest.mark.parametrize("method", ["open", "metrics", "close"])
@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_a_sink_that_raises_is_switched_off_with_one_warning(caplog, method, error):
    sink = FakeSink(**{method: fail(error)})
    background = Background(sink)
    for step in range(50):
        background.metrics([{"step": step}])
    close(background)
    background.metrics([{"step": 51}])
    assert len(warnings(caplog)) == 1
    assert f"{error.__name__}: no such luck." in warnings(caplog)[0]
    assert sink.calls[-1] == ("close", None)
    if method == "metrics":
        assert len(sink.calls) == 3


def test_a_sink_that_sleeps_holds_up_neither_the_run_nor_its_end(caplog):
    forever = threading.Event()
    sink = FakeSink(metrics=forever.wait)
    background = Background(sink, capacity=10)
    started = time.monotonic()
    for step in range(1000):
        background.metrics([{"step": step}])
    close(background, seconds=0.1)
    assert time.monotonic() - started < 1.0
    assert sink.abandoned
    assert len(warnings(caplog)) == 1
    forever.set()


def test_updates_that_do_not_fit_are_dropped_and_counted(caplog):
    go = threading.Event()
    sink = FakeSink(open=go.wait)
    background = Background(sink, capacity=10)
    for step in range(25):
        background.metrics([{"step": step}])
    go.set()
    close(background)
    assert [argument[0]["step"] for method, argument in sink.calls if method == "metrics"] == list(range(10))
    assert len(warnings(caplog)) == 1
    assert "15 updates were not passed on" in warnings(caplog)[0]


def test_an_unfinished_sink_is_waited_for_if_that_is_worth_it(caplog):
    sink = FakeSink(close=lambda: time.sleep(0.3), patience=lambda: 5.0)
    background = Background(sink)
    close(background, seconds=0.05)
    assert not sink.abandoned
    assert warnings(caplog) == []


def test_a_failing_question_about_patience_reaches_nobody(caplog):
    background = Background(FakeSink(close=lambda: time.sleep(0.3), patience=fail()))
    close(background, seconds=0.05)
    assert len(warnings(caplog)) == 1
