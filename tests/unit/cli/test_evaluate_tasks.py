"""``evaluate`` on a tiny fine-tuned run."""

import json
import shutil

import pytest
from support.command import smoe_train, write_recipe
from support.fine_tuned import COUNTS, fine_tune

from smoe_train.evaluation.predictions import read_predictions


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fine_tune(tmp_path_factory.mktemp("fine_tuned"))


def scores(path, *arguments):
    found = smoe_train("evaluate", path, "--json", *arguments)
    assert found.code == 0, found.err
    return json.loads(found.out)["scores"]


def test_the_figures_are_those_that_the_run_reported(run):
    reported = json.loads((run / "results.json").read_text())
    expected = [reported, *reported["others"]]
    assert [one["split"] for one in expected] == ["dev", "dev_mismatched"]
    found = scores(run)
    for one, row in zip(expected, found, strict=True):
        assert (row["task"], row["split"]) == ("mnli", one["split"])
        assert (row["accuracy"], row["score"]) == (one["metrics"]["accuracy"], one["score"])
        assert (row["evaluated_examples"], row["constant"]) == (one["examples"], one["constant"]["accuracy"])
        assert row["step"] == reported["step"], "the best checkpoint, as the run reports"
    assert [row["evaluated_examples"] for row in found] == [13, 9]


def test_named_tasks_that_fit_the_head(run):
    found = scores(run, "--task", "mnli_mismatched,mnli, ax", "--data", "allow_piece=true")
    assert [(row["task"], row["split"], row["evaluated_examples"]) for row in found] == [
        ("mnli", "dev_mismatched", 9),
        ("mnli", "dev", 13),
        ("ax", "test", 0),
    ]
    assert found[0]["accuracy"] == scores(run)[1]["accuracy"]
    assert "accuracy" not in found[2]
    assert "matthews" not in found[2]
    assert found[2]["constant"] is None


def test_any_k_any_split_any_checkpoint(run):
    found = scores(run, "--top-k", "1,8", "--split", "train")
    assert [(row["top_k"], row["split"], row["evaluated_examples"]) for row in found] == [
        (1, "train", 60),
        (8, "train", 60),
    ]
    assert found[0]["loss"] != found[1]["loss"]
    last, first = (scores(run, "--checkpoint", "latest")[0], scores(run / "checkpoints" / "step-00000002")[0])
    assert (last["step"], first["step"]) == (6, 2)


def test_a_folder_of_runs(run, text, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(run, tmp_path / name)
    (tmp_path / "pretraining").mkdir()
    write_recipe(tmp_path, text).rename(tmp_path / "pretraining" / "recipe.yaml")
    assert [row["split"] for row in scores(tmp_path)] == ["dev", "dev_mismatched"] * 2
    found = smoe_train("evaluate", tmp_path, "--task", "mnli")
    assert found.code == 2
    assert "holds 2 fine-tuned runs" in found.err


def test_predictions_are_written_if_that_was_asked(run, tmp_path):
    own = tmp_path / "run"
    shutil.copytree(run, own)
    before = {path.name: path.read_bytes() for path in (own / "predictions").iterdir()}
    assert sorted(before) == ["dev.tsv", "dev_mismatched.tsv", "test.tsv", "test_mismatched.tsv"]
    shutil.rmtree(own / "predictions")
    scores(own)
    assert not (own / "predictions").exists()
    scores(own, "--write-predictions")
    (row,) = scores(own, "--task", "ax", "--data", "allow_piece=true", "--write-predictions")
    assert row["predictions"] == str(own / "predictions" / "ax" / "test.tsv")
    scores(own, "--split", "test", "--write-predictions")
    written = {path.name: path.read_bytes() for path in (own / "predictions").glob("*.tsv")}
    assert written == before, "the same as the run wrote at its end"
    rows = read_predictions(own / "predictions" / "ax" / "test.tsv")
    assert [index for index, _ in rows] == list(range(COUNTS["ax/test"]))
    assert {answer for _, answer in rows} <= {"entailment", "neutral", "contradiction"}


def test_the_table(run):
    (row, _) = scores(run)
    table = smoe_train("evaluate", run).out
    assert f"{row['accuracy']:.4f}" in table
    assert "dev_mismatched" in table
    assert smoe_train("evaluate", run, "--split", "test").out.count(" none ") == 2, "there are no labels"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "mnil"], "unknown task 'mnil'; did you mean 'mnli'?"),
        (["--task", "mnli,rte"], "has no train split"),
        (["--task", "ax", "--split", "dev", "--data", "allow_piece=true"], "task ax has no split 'dev'"),
        (["--split", "valid"], "task mnli has no split 'valid'"),
        (["--task", "ax"], "has 7 rows"),
        (["--data", "pth=x"], "did you mean 'path'?"),
        (["--data", "path"], "is not an override"),
        (["--top-k", "9"], "expected numbers from 1 to 8"),
        (["--max-tokens", "5"], "a task is evaluated on whole splits"),
        (["--checkpoint", "newest"], "say latest or best"),
    ],
)
def test_mistakes(run, arguments, message):
    found = smoe_train("evaluate", run, *arguments, "--write-predictions")
    assert found.code == 2
    assert message in found.err


def test_a_task_that_asks_for_something_else(run, tmp_path):
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("sentence\tlabel\nfine\t1\nbad\t0\n")
    arguments = ["--task", "sst2", "--data", f"path={tmp_path}", "--data", "allow_piece=true"]
    found = smoe_train("evaluate", run, *arguments)
    assert found.code == 2
    assert "sst2 asks for 0, 1, and" in found.err
    assert "fine-tuned on mnli for entailment, neutral, contradiction" in found.err


def test_options_for_runs_of_the_other_kind(text, tmp_path):
    (tmp_path / "run").mkdir()
    write_recipe(tmp_path, text).rename(tmp_path / "run" / "recipe.yaml")
    for arguments in (["--task", "rte"], ["--data", "task=rte"], ["--write-predictions"]):
        found = smoe_train("evaluate", tmp_path / "run", *arguments)
        assert found.code == 2
        assert "are for fine-tuned runs" in found.err
    assert "is neither a run folder nor" in smoe_train("evaluate", tmp_path / "absent").err
