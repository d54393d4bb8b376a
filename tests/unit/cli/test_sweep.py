"""``train --sweep``: which runs there are, in which order and under which names, what ends it, what it leaves."""

import json
import os
import signal
import stat
import threading
import time
from pathlib import Path

import pytest
from support.command import smoe_train, write_recipe

from smoe_train.cli import sweep as module
from smoe_train.cli.run_folder import RECIPE
from smoe_train.cli.supervise import signals_into
from smoe_train.cli.sweep import Sweep, plan_sweep, read_values, run_child, run_names, train_all
from smoe_train.cli.sweep_results import figures_of
from smoe_train.cli.train import TrainOptions
from smoe_train.errors import LaunchError, RecipeError, SmoeError
from smoe_train.recipe import load_recipe

RATES = "learning_rate.peak=1e-3,3e-3"
SEEDS = "seed=1,2,3"


@pytest.fixture
def recipe(tmp_path, text):
    return write_recipe(tmp_path, text)


@pytest.fixture
def options(recipe, tmp_path):
    return options_with(recipe, tmp_path)


def options_with(recipe, tmp_path, *overrides, resume="auto"):
    return TrainOptions(str(recipe), overrides, None, "auto", None, resume, tmp_path / "runs")


class Runs:
    """Stands in for the command: leaves what a finished run leaves, with a loss made from its settings."""

    def __init__(self, codes=()):
        self.codes = dict(codes)
        self.started = []

    def __call__(self, arguments):
        command, path, *rest = arguments
        assert command == "train"
        overrides = rest[: rest.index("--launcher")]
        folder = Path(rest[rest.index("--output-dir") + 1])
        recipe = load_recipe(path, overrides)
        self.started.append((recipe.name, rest[rest.index("--resume") + 1]))
        run = folder / recipe.name
        run.mkdir(parents=True, exist_ok=True)
        (run / RECIPE).write_text(recipe.to_yaml())
        loss = recipe.learning_rate.peak * 1000 + recipe.seed
        lines = [
            {"step": step, "split": "valid", "loss": loss + worse} for step, worse in ((4, 0.5), (8, 0.0), (9, 0.25))
        ]
        lines.insert(1, {"step": 4, "split": "valid", "loss": 0.0, "top_k": 1})  # of another top_k than the run's
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return self.codes.get(recipe.name, 0)


def run_all(options, texts, runs, as_json=False):
    return train_all(options, texts, False, False, as_json, runs)


def states(folder):
    return [(one["run"], one["state"], one["exit_code"]) for one in record(folder)["runs"]]


def record(folder):
    return json.loads((folder / "runs" / "tiny.sweep.json").read_text())


# Values


@pytest.mark.parametrize(
    ("listed", "values"),
    [
        ("1,2", ("1", "2")),
        (" 1e-3 , null", ("1e-3", "null")),
        ("[0],[1,2],{a: [1,2], b: 3}", ("[0]", "[1,2]", "{a: [1,2], b: 3}")),
        ("'a,b',c", ("'a,b'", "c")),
        ("data/x.txt,~/y.txt", ("data/x.txt", "~/y.txt")),
    ],
)
def test_commas_divide_values_except_in_brackets_and_quotes(listed, values):
    assert read_values([f"some.key={listed}"]) == {"some.key": values}


def test_all_wrong_sweeps_are_listed():
    with pytest.raises(RecipeError) as caught:
        read_values(["a", "b=", "c=1,,2", "d=[1", "name=x,y", "e=1,2", "e=3", "f=1", "g=1e-3,0.001"], ["f=2"])
    messages = [str(problem) for problem in caught.value.problems]
    assert [message.split(":")[1].strip() for message in messages[1:]] == ["b", "c", "d", "name", "e", "f", "g"]
    assert "'a' is not of the form" in messages[0]
    assert "the values 1e-3 and 0.001 are the same" in messages[-1]


def test_names_say_the_last_part_of_a_key_or_as_much_as_it_takes():
    assert run_names("rte", [{"learning_rate.peak": "1e-3", "seed": "1"}]) == ["rte-peak-1e-3-seed-1"]
    assert run_names("rte", [{"a.b.size": "1", "a.c.size": "2"}]) == ["rte-b.size-1-c.size-2"]


def test_names_that_cannot_say_their_values_stay_apart_and_do_not_depend_on_the_others():
    values = [{"k": "[1,2]"}, {"k": "[1_2]"}, {"k": "a/b"}, {"k": "x" * 200}, {"k": "x" * 201}, {"k": "1"}]
    names = run_names("r", values)
    assert len(set(names)) == len(values)
    assert all(len(name) <= 100 and set(name).isdisjoint("[],/") for name in names)
    assert names[-1] == "r-k-1"
    assert run_names("r", values[2:3]) == names[2:3]
    twins = [{"a": "1-b-2", "b": "3"}, {"a": "1", "b": "2-b-3"}]
    assert len(set(run_names("r", twins))) == 2


# Before anything starts


def test_every_bad_combination_is_listed_and_nothing_starts(recipe, tmp_path):
    with pytest.raises(RecipeError) as caught:
        plan_sweep(options_with(recipe, tmp_path, "training.max_step=3"), ["model.moe.top_k=2,99", "seed=1,x"])
    shared, *own = [str(problem) for problem in caught.value.problems]
    assert "training.max_step: unknown key" in shared
    assert [one.partition(" (")[0] for one in own] == [
        "model.moe.top_k=2 seed=x",
        "model.moe.top_k=99 seed=1",
        "model.moe.top_k=99 seed=x",
        "model.moe.top_k=99 seed=x",
    ]
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_prints_every_run_and_writes_nothing(recipe, tmp_path):
    arguments = ["train", recipe, "--sweep", RATES, "--sweep", SEEDS, "--output-dir", tmp_path / "runs", "--dry-run"]
    printed = json.loads(smoe_train(*arguments, "--json").out)["runs"]
    assert [one["run"] for one in printed] == [
        f"tiny-peak-{rate}-seed-{seed}" for rate in ("1e-3", "3e-3") for seed in (1, 2, 3)
    ]
    assert not any(one["begun"] for one in printed)
    table = smoe_train(*arguments)
    assert table.code == 0
    assert "6 runs" in table.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json"], "--json: training has no result"),
        (["--sweep", SEEDS, "--print-config"], "--print-config: a sweep has several recipes"),
        (["--sweep", "seed=1,1"], "the values 1 and 1 are the same"),
        (["--sweep", SEEDS, "--launcher", "nothing"], "--launcher: 'nothing' is unknown"),
    ],
)
def test_options_that_do_not_go_together_are_refused(recipe, tmp_path, arguments, message):
    found = smoe_train("train", recipe, "--output-dir", tmp_path / "runs", *arguments)
    assert found.code == 2
    assert message in found.err
    assert not (tmp_path / "runs").exists()


def test_a_worker_of_somebody_elses_job_starts_no_sweep(options, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="call it without torchrun"):
        plan_sweep(options, [SEEDS])


def test_resume_never_refuses_runs_that_are_there(recipe, tmp_path, options):
    run_all(options, ["seed=1"], Runs())
    with pytest.raises(LaunchError, match="tiny-seed-1; continue with auto"):
        plan_sweep(options_with(recipe, tmp_path, resume="never"), [SEEDS])


def test_two_sweeps_of_one_name_do_not_run_at_once(options):
    def run(arguments):
        with pytest.raises(LaunchError, match="another command is running this sweep"):
            run_all(options, [SEEDS], Runs())
        return 0

    assert run_all(options, ["seed=1"], run) == 0


# Running


def test_runs_follow_one_another_and_are_compared_over_seeds(options, tmp_path, capsys):
    runs = Runs()
    assert run_all(options, [RATES, SEEDS], runs, as_json=True) == 0
    assert [name for name, _ in runs.started] == [
        f"tiny-peak-{rate}-seed-{seed}" for rate in ("1e-3", "3e-3") for seed in (1, 2, 3)
    ]
    printed = json.loads(capsys.readouterr().out)
    assert printed == {key: record(tmp_path)[key] for key in ("runs", "groups")}
    first, second = printed["groups"]
    assert second["settings"] == {"learning_rate.peak": "3e-3"}
    # Losses 1 + seed: best 2, 3, 4 (mean 3, sample deviation 1), at the end 0.25 more.
    assert first["figures"] == {
        "best_valid_loss": {"mean": 3.0, "deviation": 1.0, "n": 3},
        "last_valid_loss": {"mean": 3.25, "deviation": 1.0, "n": 3},
    }
    assert run_all(options, [RATES, SEEDS], runs) == 0
    table = capsys.readouterr().out
    assert "3.0000 ± 1.0000" in table
    assert "5.2500 ± 1.0000" in table
    assert "3 of 3" in table


def test_a_sweep_without_seeds_has_a_line_a_run(options, capsys):
    run_all(options, [RATES], Runs({"tiny-peak-3e-3": 1}))
    lines = [line for line in capsys.readouterr().out.splitlines() if "tiny-" in line]
    assert [("done" in line, "failed" in line) for line in lines] == [(True, False), (False, True)]
    assert "8.0000" in lines[0]  # 1 + the recipe's seed, 7
    assert "±" not in lines[0]


@pytest.mark.parametrize("code", [1, 3, 137])
def test_a_run_that_fails_by_itself_does_not_end_the_sweep(options, tmp_path, code):
    runs = Runs({"tiny-seed-2": code})
    assert run_all(options, [SEEDS], runs) == code
    assert states(tmp_path) == [
        ("tiny-seed-1", "done", 0),
        ("tiny-seed-2", "failed", code),
        ("tiny-seed-3", "done", 0),
    ]
    assert record(tmp_path)["groups"][0]["figures"]["best_valid_loss"]["mean"] == 10 + 2  # seeds 1 and 3, rate 0.01


@pytest.mark.parametrize(("code", "state"), [(2, "failed"), (75, "stopped"), (130, "stopped"), (143, "stopped")])
def test_a_mistake_or_a_wish_to_stop_ends_the_sweep(options, tmp_path, code, state, capsys):
    assert run_all(options, [SEEDS], Runs({"tiny-seed-2": code})) == code
    assert states(tmp_path) == [
        ("tiny-seed-1", "done", 0),
        ("tiny-seed-2", state, code),
        ("tiny-seed-3", "pending", None),
    ]
    assert "the same command continues it" in capsys.readouterr().err


def test_the_same_command_continues_with_what_is_not_done(options, tmp_path):
    run_all(options, [SEEDS], Runs({"tiny-seed-2": 75}))
    again = Runs()
    assert run_all(options, [SEEDS], again) == 0
    assert [name for name, _ in again.started] == ["tiny-seed-2", "tiny-seed-3"]
    assert [state for _, state, _ in states(tmp_path)] == ["done"] * 3
    wider = Runs()
    assert run_all(options, ["seed=3,4,1"], wider) == 0
    assert [name for name, _ in wider.started] == ["tiny-seed-4"]


def test_a_run_that_is_done_is_asked_again_if_its_recipe_changed(recipe, tmp_path, options):
    run_all(options, ["seed=1"], Runs())
    longer = Runs()
    run_all(options_with(recipe, tmp_path, "training.max_steps=9"), ["seed=1"], longer)
    assert longer.started == [("tiny-seed-1", "auto")]


def test_a_checkpoint_is_where_runs_begin_not_where_they_go_on(recipe, tmp_path):
    options = options_with(recipe, tmp_path, resume="some/checkpoint")
    run_all(options, [SEEDS], first := Runs({"tiny-seed-2": 75}))
    run_all(options, [SEEDS], second := Runs())
    assert first.started == [("tiny-seed-1", "some/checkpoint"), ("tiny-seed-2", "some/checkpoint")]
    assert second.started == [("tiny-seed-2", "auto"), ("tiny-seed-3", "some/checkpoint")]


def test_a_signal_between_two_runs_ends_the_sweep(options, tmp_path):
    def run(arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return Runs()(arguments)

    assert run_all(options, [SEEDS], run) == 75
    assert [state for _, state, _ in states(tmp_path)] == ["done", "pending", "pending"]


def test_every_option_reaches_the_runs(recipe, tmp_path):
    options = TrainOptions(str(recipe), ("seed=5",), 2, "torchrun", Path("hosts"), "auto", tmp_path)
    run = plan_sweep(options_with(recipe, tmp_path, "seed=5"), ["learning_rate.peak=1e-3"]).runs[0]
    assert Sweep("tiny", options, [run]).arguments(run) == [
        *["train", str(recipe), "seed=5", "learning_rate.peak=1e-3", "name=tiny-peak-1e-3", "--launcher", "torchrun"],
        *["--resume", "auto", "--output-dir", str(tmp_path), "--nproc", "2", "--hostfile", "hosts"],
    ]


# The process of a run


def stand_in(folder, monkeypatch, body):
    """Puts a shell script in the place of Python for the processes that are started."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(module.sys, "executable", str(path))


def test_a_signal_reaches_the_run_which_ends_in_its_own_way(tmp_path, monkeypatch):
    ready = tmp_path / "ready"
    stand_in(tmp_path, monkeypatch, f"trap 'exit 75' TERM\ntouch {ready}\nwhile true; do sleep 0.05; done")

    def interrupt():
        deadline = time.monotonic() + 20
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGHUP)

    received = []
    with signals_into(received):
        thread = threading.Thread(target=interrupt)
        thread.start()
        assert run_child(["train"], received) == 75
        thread.join()
    assert received == [signal.SIGHUP]


def test_what_a_run_prints_stays_out_of_the_results(tmp_path, monkeypatch, capfd):
    stand_in(tmp_path, monkeypatch, 'echo "$@"\nexit 3')
    assert run_child(["train", "tiny"], []) == 3
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == "-m smoe_train.cli.sweep train tiny\n"


def test_a_run_that_is_killed_ends_with_128_and_the_signal(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "kill -9 $$")
    assert run_child(["train"], []) == 137


# Results


def test_results_of_fine_tuning_are_its_metrics(tmp_path):
    results = {
        "task": "mrpc",
        "split": "dev",
        "metrics": {"accuracy": 0.7, "f1": 0.8},
        "score": 0.75,
        "constant": {"accuracy": 0.6, "f1": 0.7},
        "selection": {"split": "selection", "score": 0.72, "step": 10},
        "examples": 408,
        "seed": 1,
        "run": "mrpc",
        "step": 10,
        "others": [
            {"split": "more", "examples": 3, "metrics": {"accuracy": 0.5}, "score": 0.5, "constant": {"accuracy": 0.4}}
        ],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    figures = {"accuracy": 0.7, "f1": 0.8, "score": 0.75, "constant": 0.65, "accuracy (more)": 0.5, "selection": 0.72}
    assert figures_of(tmp_path) == pytest.approx(figures)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(SmoeError, match=r"results\.json: is damaged"):
        figures_of(tmp_path)


def test_a_run_without_validation_has_no_figures(tmp_path):
    assert figures_of(tmp_path) == {}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 3.0}\n')
    assert figures_of(tmp_path) == {}
