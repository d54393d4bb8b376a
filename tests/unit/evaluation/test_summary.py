"""Means, spreads and averages by hand, over run folders made here."""

import json

import pytest
from support.glue_runs import make_run

from smoe_train.errors import DataError
from smoe_train.evaluation.results import TaskResult
from smoe_train.evaluation.summary import SCORED_TASKS, find_runs, summarise


def test_results_come_back_as_they_were_written(tmp_path):
    run = make_run(tmp_path, "m", "mnli", {"accuracy": 0.75}, mismatched=0.5, setting="small", seed=3)
    content = json.loads((run / "results.json").read_text())
    assert content == {
        "task": "mnli",
        "split": "dev",
        "examples": 100,
        "metrics": {"accuracy": 0.75},
        "score": 0.75,
        "constant": {"accuracy": 0.5},
        "others": [
            {
                "split": "dev_mismatched",
                "examples": 90,
                "metrics": {"accuracy": 0.5},
                "score": 0.5,
                "constant": {"accuracy": 0.5},
            }
        ],
        "selection": {"split": "selection", "score": 0.7, "step": 40},
        "run": "m",
        "seed": 3,
        "step": 40,
        "setting": "small",
    }
    found = TaskResult.read(run)
    assert [split.split for split in found.splits] == ["dev", "dev_mismatched"]
    assert (found.run, found.seed, found.step, found.setting, found.task) == ("m", 3, 40, "small", "mnli")


def test_seeds_are_put_together_and_other_recipes_are_not(tmp_path):
    scores = {1: (0.70, 0.80), 2: (0.74, 0.84), 3: (0.72, 0.88)}
    runs = [
        make_run(tmp_path, f"mrpc-{seed}", "mrpc", {"accuracy": acc, "f1": f1}, {"accuracy": 0.6, "f1": 0.8}, seed=seed)
        for seed, (acc, f1) in scores.items()
    ]
    other = make_run(
        tmp_path, "wider", "mrpc", {"accuracy": 0.9, "f1": 0.9}, recipe="learning_rate: {peak: 0.1}", seed=2
    )
    first, second = summarise([*runs, other]).groups
    assert first.runs == ("mrpc-1", "mrpc-2", "mrpc-3")
    assert second.runs == ("wider",)
    accuracy, f1 = first.metrics["accuracy"], first.metrics["f1"]
    # Deviations -.02 .02 0 and -.04 0 .04: squares .0008 and .0032 over n - 1 = 2.
    assert (accuracy.mean, accuracy.deviation, accuracy.n) == pytest.approx((0.72, 0.02, 3))
    assert (f1.mean, f1.deviation) == pytest.approx((0.84, 0.04))
    # Scores .75 .79 .80: mean .78, squares .0009 + .0001 + .0004.
    assert (first.score.mean, first.score.deviation) == pytest.approx((0.78, 0.0007**0.5))
    found = first.to_json()
    assert found["metrics"]["f1"]["difference"] == pytest.approx(0.04)
    assert found["score"]["constant"] == pytest.approx(0.7)
    assert found["score"]["difference"] == pytest.approx(0.08)
    assert (second.score.deviation, second.score.n) == (None, 1)


def test_the_average_is_over_tasks_with_mnli_as_one(tmp_path):
    runs = []
    for seed, shift in ((1, 0.0), (2, 0.03)):
        runs += [
            make_run(tmp_path, f"cola-{seed}", "cola", {"matthews": 0.1 + shift}, {"matthews": 0.0}, seed),
            make_run(tmp_path, f"mnli-{seed}", "mnli", {"accuracy": 0.6}, None, seed, mismatched=0.5 + shift),
            make_run(tmp_path, f"sst5-{seed}", "sst5", {"accuracy": 0.4}, None, seed),
        ]
    found = summarise(runs)
    assert [(group.task, group.split) for group in found.groups] == [
        ("cola", "dev"),
        ("mnli", "dev"),
        ("mnli", "dev_mismatched"),
        ("sst5", "dev"),
    ]
    (average,) = found.averages
    assert average.tasks == ("cola", "mnli")
    assert average.missing == ("sst2", "mrpc", "stsb", "qqp", "qnli", "rte", "wnli")
    # Seed 1: (.1 + .55) / 2 = .325; seed 2: (.13 + .565) / 2 = .3475.
    assert (average.score.mean, average.score.deviation, average.score.n) == pytest.approx(
        (0.33625, 0.0225 / 2**0.5, 2)
    )
    assert average.constant == 0.25
    assert average.to_json()["difference"] == pytest.approx(0.08625)


def test_wnli_may_be_left_out_of_the_average_but_stays_listed(tmp_path):
    runs = [
        make_run(tmp_path, task, task, {"accuracy": 0.56 if task == "wnli" else 0.8}, {"accuracy": 0.5})
        for task in SCORED_TASKS
    ]
    (whole,), (without,) = (summarise(runs, with_wnli).averages for with_wnli in (True, False))
    assert (whole.missing, without.missing) == ((), ())
    assert whole.score.mean == pytest.approx((8 * 0.8 + 0.56) / 9)
    assert without.score.mean == pytest.approx(0.8)
    assert "wnli" not in without.tasks
    assert "wnli" in {group.task for group in summarise(runs, with_wnli=False).groups}


def test_settings_by_text_have_an_average_each(tmp_path):
    runs = [
        make_run(
            tmp_path, f"{setting}-{task}-{seed}", task, {"accuracy": score}, None, seed, setting, recipe=f"x: {seed}"
        )
        for setting, score in (("top_k", 0.6), ("hyper_router", 0.7))
        for task in ("rte", "sst2")
        for seed in (1, 2)
    ]
    found = summarise(runs)
    assert [(group.setting, group.task, group.score.n) for group in found.groups] == [
        ("hyper_router", "sst2", 2),
        ("hyper_router", "rte", 2),
        ("top_k", "sst2", 2),
        ("top_k", "rte", 2),
    ]
    assert {one.setting: one.score.mean for one in found.averages} == pytest.approx({"hyper_router": 0.7, "top_k": 0.6})


def test_tasks_with_other_seeds_have_a_mean_but_no_spread(tmp_path):
    runs = [
        make_run(tmp_path, "a", "rte", {"accuracy": 0.6}, seed=1),
        make_run(tmp_path, "b", "rte", {"accuracy": 0.8}, seed=2),
        make_run(tmp_path, "c", "sst2", {"accuracy": 0.9}, seed=1),
    ]
    (average,) = summarise(runs).averages
    assert (average.score.mean, average.score.deviation, average.score.n) == (pytest.approx(0.8), None, 1)


def test_recipes_that_differ_have_no_average_and_it_is_said(tmp_path):
    runs = [make_run(tmp_path, name, "rte", {"accuracy": 0.6}, recipe=f"x: {name}") for name in ("a", "b")]
    found = summarise(runs)
    assert found.averages == ()
    assert found.notes == ("no GLUE average: rte has runs of several settings (a, b); name those of one setting only",)


def test_runs_are_found_by_folder_and_once(tmp_path):
    run = make_run(tmp_path / "runs", "b", "rte", {"accuracy": 0.6})
    make_run(tmp_path / "runs", "a", "rte", {"accuracy": 0.6})
    (tmp_path / "runs" / "pretraining").mkdir()
    assert [path.name for path in find_runs([tmp_path / "runs", run])] == ["a", "b"]
    with pytest.raises(DataError, match="neither it nor a folder in it has"):
        find_runs([tmp_path / "runs" / "pretraining"])


def spoilt(run, **changes):
    content = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**content, **changes}))
    return run


def test_mistakes(tmp_path):
    run = make_run(tmp_path, "a", "rte", {"accuracy": 0.6})
    with pytest.raises(DataError, match=r"runs a and b: both have task rte, seed 1 .* leave one out"):
        summarise([run, make_run(tmp_path, "b", "rte", {"accuracy": 0.6})])
    piece = spoilt(make_run(tmp_path, "c", "rte", {"accuracy": 0.6}, seed=2), examples=50)
    with pytest.raises(DataError, match=r"runs a and c: were evaluated on 100 and 50 examples of rte \(dev\)"):
        summarise([run, piece])
    (run / "recipe.yaml").unlink()
    with pytest.raises(DataError, match="name no setting"):
        summarise([run])
    for changes in ({"metrics": {}}, {"seed": "x"}, {"constant": None}, {"constant": {"f1": 0.5}}, {"others": 3}):
        with pytest.raises(DataError, match=r"results\.json: is damaged"):
            TaskResult.read(spoilt(make_run(tmp_path, str(changes), "rte", {"accuracy": 0.6}), **changes))
    with pytest.raises(DataError, match="only a fine-tuning run that has trained to its end has results"):
        TaskResult.read(tmp_path)
