"""``evaluate`` on a tiny trained run."""

import json
import math

import pytest
from support.command import smoe_train, write_recipe


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    recipe = write_recipe(folder, text, training={"max_steps": 4})
    found = smoe_train("train", recipe, "--output-dir", folder)
    assert found.code == 0, found.err
    return folder / "tiny"


def scores(run, *arguments):
    found = smoe_train("evaluate", run, "--json", *arguments)
    assert found.code == 0, found.err
    return json.loads(found.out)


def test_the_figures_are_those_of_training(run):
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["split"] == "valid"
    found = scores(run, "--max-tokens", "300")
    assert (found["step"], found["split"]) == (4, "valid")
    (score,) = found["scores"]
    assert score["loss"] == last["loss"]
    assert score["bits_per_byte"] == pytest.approx(score["loss"] / math.log(2.0))
    assert score["perplexity"] == pytest.approx(math.exp(score["loss"]))
    assert (score["top_k"], score["evaluated_tokens"]) == (2, 300)


def test_any_k_and_any_split(run):
    found = scores(run, "--top-k", "1, 2,8", "--split", "test")
    assert [score["top_k"] for score in found["scores"]] == [1, 2, 8]
    assert len({score["loss"] for score in found["scores"]}) == 3
    assert found["split"] == "test"


def test_a_checkpoint_of_the_run(run):
    found = scores(run / "checkpoints" / "step-00000002")
    assert found["step"] == 2
    assert found["scores"] != scores(run)["scores"]
    assert scores(run, "--checkpoint", "best")["step"] == 4


def test_the_table_shows_the_same(run):
    (score,) = scores(run)["scores"]
    table = smoe_train("evaluate", run).out
    assert f"{score['loss']:.4f}" in table
    assert "valid split, step 4" in table


def test_evaluating_writes_nothing(run):
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    scores(run)
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-k", "0"], "expected numbers from 1 to 8"),
        (["--top-k", "9"], "expected numbers from 1 to 8"),
        (["--top-k", "1,,2"], "expected numbers from 1 to 8"),
        (["--top-k", "two"], "expected numbers from 1 to 8"),
        (["--split", "tset"], "did you mean 'test'"),
        (["--checkpoint", "newest"], "say latest or best"),
        (["--nproc", "3"], "valid for 3 processes"),
        (["--max-tokens", "0"], "max-tokens"),
    ],
)
def test_mistakes(run, arguments, message):
    if "--nproc" in arguments:
        recipe = run / "recipe.yaml"
        before = recipe.read_text()
        recipe.write_text(before.replace("engine: local", "engine: deepspeed").replace("l_size: 1", "l_size: 2"))
    try:
        found = smoe_train("evaluate", run, *arguments)
    finally:
        if "--nproc" in arguments:
            recipe.write_text(before)
    assert found.code == 2
    assert message in found.err
