"""The loop in one process: its record, its checkpoints, and that resuming it changes no bit."""

import json
import math
import signal
from dataclasses import replace

import pytest
import torch
from support.tiny import tiny_recipe

from smoe_train.assembly import build_trainer, open_journal
from smoe_train.checkpoint import writing
from smoe_train.checkpoint.manifest import Checkpoint
from smoe_train.config import merge
from smoe_train.errors import RunFailedError, RunStoppedError
from smoe_train.parallel.process import Process
from smoe_train.training.alarms import Alarm
from smoe_train.training.stop import StopRequest

STEPS = 7
UNTIMED = {"step_seconds"}


def recipe_of(text, **sections):
    base = {
        "parallel": {"engine": "local"},
        "training": {"max_steps": STEPS},
        "model": {"dropout": 0.1},
        "curriculum": {"top_k": {"low": 1, "high": 4}},
    }
    softmax = {"model": {"moe": {"router": {"softmax": "before_top_k"}}}}  # k = 1 leaves no gradient otherwise
    return tiny_recipe(text, 1, **merge(merge(base, softmax), sections))


def start(recipe, folder, checkpoint=None, stop=None):
    folder.mkdir(exist_ok=True)
    trainer = build_trainer(recipe, Process.alone(), folder, stop)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    trainer.journal = open_journal(recipe, folder, checkpoint.step if checkpoint is not None else None)
    return trainer


def train(trainer):
    try:
        return trainer.train()
    finally:
        trainer.journal.close()


def records(folder, split, name="metrics.jsonl"):
    """Returns the records of a split with floats in hexadecimal, without times."""
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [
        {key: value.hex() if isinstance(value, float) else value for key, value in line.items() if key not in UNTIMED}
        for line in lines
        if line["split"] == split
    ]


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer = start(recipe_of(text), folder)
    train(trainer)
    return folder, trainer


def test_every_step_is_recorded_once_with_what_it_was_run_with(whole, text):
    folder, _ = whole
    recipe = recipe_of(text)
    found = records(folder, "train")
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    assert [record["tokens"] for record in found] == [128 * step for step in range(1, STEPS + 1)]
    assert [record["top_k"] for record in found] == [recipe.schedule().knobs(step).top_k for step in range(STEPS)]
    assert len({record["top_k"] for record in found}) > 1
    # Cosine from 0.01 over 7 steps, by the formula.
    for step, record in enumerate(found):
        rate = 0.01 * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        assert float.fromhex(record["learning_rate"]) == pytest.approx(rate)
        loss = float.fromhex(record["loss"])
        assert float.fromhex(record["bits_per_byte"]) == pytest.approx(loss / math.log(2.0)), "a token is a byte"
        balance = float.fromhex(record["load_balance_loss"])
        assert float.fromhex(record["load_balance_loss_weighted"]) == pytest.approx(0.01 * balance)
        assert float.fromhex(record["gradient_norm"]) > 0.0


def test_it_learns(whole):
    losses = [float.fromhex(record["loss"]) for record in records(whole[0], "train")]
    assert losses[0] == pytest.approx(math.log(256), rel=0.05), "nothing is known at first"
    assert losses[-1] < losses[0] - 0.5


def test_validation_and_routing_are_recorded_when_due(whole):
    folder, trainer = whole
    valid = records(folder, "valid")
    assert [(record["step"], record["top_k"], record["evaluated_tokens"]) for record in valid] == [
        (4, 2, 300),
        (7, 2, 300),
    ]
    assert [record["tokens"] for record in valid] == [512, 896]
    routing = records(folder, "train", "routing.jsonl")
    assert {record["layer"] for record in routing} == {0, 1}
    assert sorted({record["step"] for record in routing}) == [2, 3, 4, 6, 7]
    best = min(valid, key=lambda record: float.fromhex(record["loss"]))
    assert trainer.state.best_step == best["step"]
    assert trainer.state.best_cost == float.fromhex(best["loss"])


def test_checkpoints_are_written_when_due_and_hold_the_state(whole):
    _, trainer = whole
    store = trainer.store
    assert sorted(Checkpoint.open(path).step for path in store.complete()) == [2, 4, 6, 7]
    last = Checkpoint.open(store.find("latest"))
    last.verify()
    assert last.state["train"] == trainer.state.to_json()
    assert last.state["optimizer_steps"] == STEPS
    assert last.state["identity"] == trainer.identity
    assert (last.state["world_size"], last.state["expert_parallel_size"]) == (1, 1)
    assert Checkpoint.open(store.find("best")).step == trainer.state.best_step


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_resumed_run_is_the_uninterrupted_run_bit_by_bit(whole, text, tmp_path, step):
    """Invariant 10, second half: the k schedule, too, goes on from where it was, evaluations notwithstanding."""
    folder, trainer = whole
    checkpoint = Checkpoint.open(folder / "checkpoints" / f"step-{step:08d}")
    torch.manual_seed(99)
    again = start(recipe_of(text), tmp_path, checkpoint)
    train(again)
    for split in ("train", "valid"):
        expected = [record for record in records(folder, split) if record["step"] > step]
        assert records(tmp_path, split) == expected
    assert again.state == trainer.state
    same = Checkpoint.open(again.store.find("latest"))
    assert same.files == Checkpoint.open(trainer.store.find("latest")).files, "the same bytes at the end"


def test_a_stop_request_ends_the_run_with_a_checkpoint(whole, text, tmp_path):
    stop = StopRequest()
    trainer = start(recipe_of(text, checkpoint={"every_steps": 100}), tmp_path, stop=stop)
    real = trainer.task.objective

    def objective(forward, batch, knobs, totals):
        if knobs.step == 1:
            stop.signal = signal.SIGTERM
        return real(forward, batch, knobs, totals)

    trainer.task.objective = objective
    with pytest.raises(RunStoppedError, match="stopped by SIGTERM after step 2; the same command resumes the run"):
        train(trainer)
    (path,) = trainer.store.complete()
    checkpoint = Checkpoint.open(path)
    checkpoint.verify()
    assert checkpoint.step == 2
    assert [record["step"] for record in records(tmp_path, "train")] == [1, 2]

    again = start(recipe_of(text, checkpoint={"every_steps": 100}), tmp_path, checkpoint)
    train(again)
    assert records(tmp_path, "train") == records(whole[0], "train"), "one file, no step twice, none missing"


def test_a_request_in_the_last_step_leaves_its_validation_to_the_next_command(whole, text, tmp_path):
    stop = StopRequest()
    trainer = start(recipe_of(text), tmp_path, stop=stop)
    real = trainer.engine.step

    def step(*arguments, **options):
        if trainer.state.step == STEPS - 2:
            stop.signal = signal.SIGTERM  # seen in the next step, the last
        return real(*arguments, **options)

    trainer.engine.step = step
    with pytest.raises(RunStoppedError, match=f"after step {STEPS}"):
        train(trainer)
    assert [record["step"] for record in records(tmp_path, "valid")] == [4]
    again = start(recipe_of(text), tmp_path, trainer.store.newest_sound(pytest.fail))
    assert again.state.step == STEPS
    train(again)
    assert records(tmp_path, "valid") == records(whole[0], "valid")
    assert again.state == whole[1].state


def test_a_validation_is_broken_off_by_a_request_and_made_up_for(whole, text, tmp_path):
    stop = StopRequest()
    trainer = start(recipe_of(text), tmp_path, stop=stop)
    forwards = [0]

    def count(module, inputs):
        forwards[0] += not module.training
        if forwards[0] == 2:
            stop.signal = signal.SIGTERM

    trainer.model.register_forward_pre_hook(count)
    with pytest.raises(RunStoppedError, match="stopped by SIGTERM after step 4"):
        train(trainer)
    assert forwards[0] == 2, "the whole validation has more batches"
    assert records(tmp_path, "valid") == []
    again = start(recipe_of(text), tmp_path, trainer.store.newest_sound(pytest.fail))
    train(again)
    for split in ("train", "valid"):
        assert records(tmp_path, split) == records(whole[0], split)
        assert records(tmp_path, split, "routing.jsonl") == records(whole[0], split, "routing.jsonl")
    assert again.state == whole[1].state
    assert Checkpoint.open(again.store.find("best")).step == again.state.best_step


def test_a_complete_run_has_nothing_left_to_do(whole, text, tmp_path):
    _, trainer = whole
    again = start(recipe_of(text), tmp_path, Checkpoint.open(trainer.store.find("latest")))
    after = train(again)
    assert (after.step, after.tokens) == (trainer.state.step, trainer.state.tokens)
    assert after.best_step is None, "what was best in another folder has no checkpoint here"
    assert records(tmp_path, "train") == []
    assert again.store.complete() == []


def poison_loss(trainer, step):
    real = trainer.task.objective

    def objective(forward, batch, knobs, totals):
        found = real(forward, batch, knobs, totals)
        if knobs.step != step:
            return found
        return type(found)(found.total * float("nan"), found.task * float("nan"), found.output)

    trainer.task.objective = objective


def poison_gradient(trainer, step):
    """The loss stays finite; only the gradient overflows."""
    parameter = next(trainer.model.parameters())
    real = trainer.engine.step

    def engine_step(rate, **options):
        if trainer.state.step == step:
            parameter.grad[0, 0] = float("inf")
        return real(rate, **options)

    trainer.engine.step = engine_step


def poison_validation(trainer, step):
    """A weight that only validation looks at is no number."""
    real = trainer._record

    def record(meter):
        alarms = real(meter)
        if trainer.state.step == step + 1:
            with torch.no_grad():
                next(trainer.model.parameters()).fill_(float("nan"))
        return alarms

    trainer._record = record


STOP = {"health": {"non_finite": {"action": "stop"}}}
ROLLBACK = {"health": {"non_finite": {"action": "rollback"}}}
PASSING = "computed again, the step was finite on all ranks"


@pytest.mark.parametrize(
    ("poison", "step", "message"),
    [
        (poison_loss, 3, "step 4: the loss or the gradient is not finite: first on rank 0, the loss"),
        (poison_loss, 4, "step 5: the loss or the gradient is not finite: first on rank 0, the loss"),
        (poison_gradient, 3, f"step 4: the loss or the gradient is not finite: {PASSING}"),
        (poison_validation, 3, "step 4: the validation loss is nan"),
    ],
)
def test_what_is_not_finite_ends_the_run_and_is_never_saved(text, tmp_path, poison, step, message):
    trainer = start(recipe_of(text, **STOP), tmp_path)
    poison(trainer, step)
    with pytest.raises(RunFailedError, match=message) as caught:
        train(trainer)
    assert "learning_rate.peak" in str(caught.value)
    saved = sorted(Checkpoint.open(path).step for path in trainer.store.complete())
    assert saved == ([2] if step == 3 else [2, 4])
    for path in trainer.store.complete():
        checkpoint = Checkpoint.open(path)
        weights = [checkpoint.tensor(name) for name in checkpoint.tensors if name.startswith(("weight/", "exp_avg"))]
        assert all(torch.isfinite(value).all() for value in weights)
        assert math.isfinite(checkpoint.state["train"]["best_cost"] or 0.0)


def tensors_of(trainer, step):
    checkpoint = Checkpoint.open(trainer.store.folder / f"step-{step:08d}")
    return {name: digest for name, digest in checkpoint.tensor_sha256.items() if not name.startswith("random/")}


@pytest.mark.parametrize("poison", [poison_loss, poison_gradient])
def test_a_step_that_is_not_finite_changes_nothing_but_the_position(text, tmp_path, poison):
    every_step = {"checkpoint": {"every_steps": 1, "keep_last": 10}}
    trainer = start(recipe_of(text, **every_step), tmp_path)
    poison(trainer, 4)
    state = train(trainer)
    assert state.step == STEPS
    assert tensors_of(trainer, 5) == tensors_of(trainer, 4) != tensors_of(trainer, 6)
    assert trainer.engine.optimizer_steps() == STEPS - 1
    found = records(tmp_path, "train")
    assert [record["step"] for record in found if record.get("skipped")] == [5]
    assert all(math.isfinite(float.fromhex(record["loss"])) for record in found if record["step"] != 5)


def test_a_rollback_leaves_the_step_out_and_so_ends_where_skipping_does(text, tmp_path):
    skipped = start(recipe_of(text), tmp_path / "skip")
    poison_loss(skipped, 4)
    train(skipped)
    back = start(recipe_of(text, **ROLLBACK), tmp_path / "rollback")
    poison_loss(back, 4)
    state = train(back)
    assert state.left_out == [5]
    assert tensors_of(back, STEPS) == tensors_of(skipped, STEPS)
    for split in ("train", "valid"):
        assert records(tmp_path / "rollback", split) == records(tmp_path / "skip", split), "no step twice"


def test_an_alarm_that_comes_late_sets_the_checkpoints_of_its_future_aside(text, tmp_path):
    trainer = start(recipe_of(text), tmp_path)
    real, raised = trainer.alarms.judge, []

    def judge(steps, routing):
        found = real(steps, routing)
        if steps[-1]["step"] >= 5 and not raised:
            raised.append(Alarm("loss_spike", "rollback", 3, 5, "a spike"))
            return raised
        return found

    trainer.alarms.judge = judge
    state = train(trainer)
    assert state.left_out == [3, 4, 5]
    assert [record["step"] for record in records(tmp_path, "train")] == list(range(1, STEPS + 1))
    assert [record["step"] for record in records(tmp_path, "train") if record.get("skipped")] == [3, 4, 5]
    assert tensors_of(trainer, 4) == tensors_of(trainer, 2)
    names = sorted(path.name.rpartition("-")[0] for path in trainer.store.folder.glob("abandoned-*"))
    assert names == ["abandoned-step-00000004"]


def test_without_a_checkpoint_to_go_back_to_the_run_ends(text, tmp_path):
    trainer = start(recipe_of(text, **ROLLBACK), tmp_path)
    poison_loss(trainer, 1)
    with pytest.raises(RunFailedError, match="there is no checkpoint before it to go back to"):
        train(trainer)


def test_too_many_steps_in_a_row_end_the_run(text, tmp_path):
    for recipe, name in ((recipe_of(text), "skip"), (recipe_of(text, **ROLLBACK), "rollback")):
        trainer = start(recipe, tmp_path / name)
        real = trainer.task.objective

        def objective(forward, batch, knobs, totals, real=real):
            found = real(forward, batch, knobs, totals)
            factor = float("inf") if knobs.step >= 3 else 1.0
            return type(found)(found.total * factor, found.task * factor, found.output)

        trainer.task.objective = objective
        with pytest.raises(RunFailedError, match="for the 3rd time in a row"):
            train(trainer)


def test_a_run_that_fell_back_after_failing_goes_on_from_before(whole, text, tmp_path):
    trainer = start(recipe_of(text, **STOP), tmp_path)
    poison_loss(trainer, 4)
    with pytest.raises(RunFailedError):
        train(trainer)
    again = start(recipe_of(text), tmp_path, trainer.store.newest_sound(pytest.fail))
    train(again)
    assert records(tmp_path, "train") == records(whole[0], "train")


def test_several_k_are_validated_and_the_first_chooses_the_best(text, tmp_path):
    trainer = start(recipe_of(text, training={"max_steps": 2}, evaluation={"top_k": [8, 1]}), tmp_path)
    train(trainer)
    valid = records(tmp_path, "valid")
    assert [record["top_k"] for record in valid] == [8, 1]
    assert trainer.state.best_cost == float.fromhex(valid[0]["loss"])


def test_a_worse_validation_is_not_the_best(text, tmp_path):
    trainer = start(recipe_of(text), tmp_path)
    trainer.state.best_cost, trainer.state.best_step = 0.0, 99
    train(trainer)
    assert (trainer.state.best_cost, trainer.state.best_step) == (0.0, 99)
    assert not (tmp_path / "checkpoints" / "best").exists()


def test_a_best_checkpoint_that_fails_leaves_the_one_before_the_best(text, tmp_path, monkeypatch):
    costs = iter([3.0, 2.0, 1.5, 2.95])
    trainer = start(recipe_of(text, training={"max_steps": 8}, evaluation={"every_steps": 2}), tmp_path)
    validate = trainer.task.validate
    trainer.task.validate = lambda knobs: [replace(one, cost=next(costs)) for one in validate(knobs)]
    write = writing.save_file

    def full(tensors, path):
        if "step-00000006" in str(path):
            raise OSError(28, "No space left on device")
        write(tensors, path)

    monkeypatch.setattr(writing, "save_file", full)
    state = train(trainer)
    assert (state.best_cost, state.best_step) == (2.0, 4)
    assert trainer.store.find("best").name == "step-00000004"
