import io
import re

import pytest
from rich.console import Console

from smoe_train.reporting.sinks import ConsoleSink
from smoe_train.reporting.sinks.console import Pace, duration


def train(step, **more):
    return {"step": step, "split": "train", "loss": 0.5, "tokens": 100 * step, "step_seconds": 0.25, **more}


def show(calls, *, terminal=False, width=80, **options):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=width)
    sink = ConsoleSink(**{"total_steps": 5, "log_every_steps": 2, **options}, console=console)
    sink.open()
    for method, argument in calls:
        getattr(sink, method)(argument)
    sink.close()
    return stream.getvalue()


def test_plain_lines_every_n_steps_and_at_the_end():
    lines = show([("metrics", [train(step) for step in range(1, 6)])]).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 2/5", "step 4/5", "step 5/5"]
    assert "loss 0.5000" in lines[0]
    assert "400 tokens/s" in lines[0]  # 100 tokens in a quarter of a second


def test_every_validation_has_a_line_with_whatever_it_measured():
    valid = {"step": 3, "split": "valid", "loss": 0.5, "bits_per_byte": 0.7, "accuracy": 0.25, "step_seconds": 1.0}
    text = show([("metrics", [valid])])
    assert text == "valid at step 3: loss 0.5000, bits/byte 0.7000, accuracy 0.2500\n"


def test_the_worst_layer_of_the_last_step_is_shown():
    loads = [
        {"step": step, "split": "train", "layer": layer, "load_max_over_mean": value}
        for step, layer, value in [(1, 0, 9.0), (2, 0, 1.5), (2, 1, 2.25)]
    ]
    assert "expert load 2.25x" in show([("routing", loads), ("metrics", [train(2)])])


def test_a_note_cannot_drive_the_terminal():
    assert show([("note", "a\x1b[2J[red]b")]) == "a\\x1b[2J[red]b\n"


@pytest.mark.parametrize(("width", "bar"), [(80, False), (130, True)])
def test_a_terminal_gets_the_figures_and_a_bar_if_there_is_room(width, bar):
    records = [train(step, bits_per_byte=0.7) for step in range(1, 5)]
    loads = [{"step": 4, "split": "train", "layer": 0, "load_max_over_mean": 1.5}]
    text = show([("routing", loads), ("metrics", records)], terminal=True, width=width)
    shown = " ".join(text.split())  # a narrow terminal breaks the line
    for figure in ("step 4/5", "loss 0.5000", "0.7000 bits/byte", "400 tokens/s", "expert load 1.50x", "ETA 00:00"):
        assert figure in shown
    assert ("━" in text) is bar


def test_no_color_is_heeded(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = show([("metrics", [train(4)]), ("note", "done")], terminal=True)
    assert "step 4/5" in text
    assert not re.search(r"\x1b\[[\d;]*3[0-8][;m]", text)


def test_a_resumed_run_has_no_rate_before_two_records():
    pace = Pace(total_steps=20, start_step=10)
    pace.add(train(11))
    assert pace.tokens_per_second is None
    pace.add(train(12))
    assert pace.tokens_per_second == 400


@pytest.mark.parametrize(("seconds", "text"), [(0, "00:00"), (59.6, "01:00"), (3723, "1:02:03")])
def test_durations(seconds, text):
    assert duration(seconds) == text
