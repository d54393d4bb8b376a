import logging
import time

import pytest

from smoe_train.errors import SmoeError
from smoe_train.reporting import METRICS, ROUTING, Journal, ReportingConfig, WandbConfig, read_records
from smoe_train.reporting import journal as journal_module


def journal(folder, resume_from_step=None, **config):
    return Journal(
        folder,
        ReportingConfig(**config),
        total_steps=10,
        run_name="test",
        recipe={"seed": 1},
        resume_from_step=resume_from_step,
    )


def train(*steps):
    return [{"step": step, "split": "train", "loss": float(step)} for step in steps]


def routed(*steps):
    return [{"step": s, "split": "train", "layer": layer, "load": [0.5, 0.5]} for s in steps for layer in (0, 1)]


def test_records_are_on_the_disk_when_a_call_returns_and_resume_continues_them(tmp_path):
    running = journal(tmp_path)
    running.metrics(train(1, 2, 3, 4))
    running.routing(routed(2, 4))
    assert [record["step"] for record in read_records(tmp_path / METRICS)] == [1, 2, 3, 4]
    running.close()
    with (tmp_path / METRICS).open("ab") as file:
        file.write(b'{"step": 5, "spl')
    with journal(tmp_path, resume_from_step=3) as resumed:
        resumed.metrics(train(4, 5))
        resumed.routing(routed(4))
    assert [record["step"] for record in read_records(tmp_path / METRICS)] == [1, 2, 3, 4, 5]
    assert [(r["step"], r["layer"]) for r in read_records(tmp_path / ROUTING)] == [(2, 0), (2, 1), (4, 0), (4, 1)]


def test_missing_steps_are_pointed_out_on_resume(tmp_path, capfd):
    with journal(tmp_path) as running:
        running.metrics(train(1, 2))
    journal(tmp_path, resume_from_step=5).close()
    assert "no records of steps 3 to 5" in capfd.readouterr().err.replace("\n", " ")


def test_everything_for_people_goes_to_standard_error(tmp_path, capfd):
    with journal(tmp_path, log_every_steps=1) as running:
        running.metrics(train(1))
        running.note("a note")
    out, err = capfd.readouterr()
    assert out == ""
    assert "step 1/10  loss 1.0000" in err
    assert "a note" in err


def test_writing_after_close_is_an_error(tmp_path):
    running = journal(tmp_path)
    running.close()
    running.close()
    with pytest.raises(ValueError, match="is closed"):
        running.metrics(train(1))


def test_whoever_watches_sees_what_a_sink_warns_of(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(journal_module, "WandbSink", BrokenWandb)
    with journal(tmp_path, wandb=WandbConfig()) as running:
        running.routing(routed(1))
    assert "warning: wandb failed and is switched off" in capfd.readouterr().err.replace("\n", " ")


class BrokenWandb:
    name = "wandb"

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        def method(*args):
            if name == "metrics":
                time.sleep(60)
            if name == "routing":
                raise OSError("disk quota exceeded")
            return 0.0

        return method


def test_a_broken_tracker_changes_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(journal_module, "WandbSink", BrokenWandb)
    started = time.monotonic()
    with journal(tmp_path, wandb=WandbConfig()) as running:
        for step in range(1, 11):
            running.routing(routed(step))
            running.metrics(train(step))
    assert time.monotonic() - started < 2.0
    assert len(read_records(tmp_path / METRICS)) == 10
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def test_tensorboard_holds_the_scalars(tmp_path):
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    running = journal(tmp_path, tensorboard=True)
    running.metrics(train(1, 2))
    deadline = time.monotonic() + 60  # the first import of torch may be slow; close() would not wait for it
    while not any((tmp_path / "tensorboard").glob("*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.close()
    events = loading.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0)]


def test_tensorboard_that_is_not_installed_is_a_mistake_in_the_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SmoeError, match=r"reporting\.tensorboard.*pip install"):
        journal(tmp_path, tensorboard=True)
    assert list(tmp_path.iterdir()) == []
