"""``glue summary`` and ``glue submission`` on run folders made here."""

import json
import zipfile

import pytest
from support.command import smoe_train
from support.glue_runs import make_run


@pytest.fixture
def runs(tmp_path):
    for seed, accuracy in ((1, 0.60), (2, 0.64)):
        make_run(tmp_path / "runs", f"rte-{seed}", "rte", {"accuracy": accuracy}, {"accuracy": 0.53}, seed)
    return tmp_path / "runs"


def test_the_summary_as_markdown(runs):
    """Mean 62 and deviations -2 2: sample standard deviation 2.83."""
    found = smoe_train("glue", "summary", runs, "--markdown")
    assert found.code == 0, found.err
    assert found.out.splitlines() == [
        "| setting | task | split | seeds | metrics | score | constant | gain |",
        "|---|---|---|---|---|---|---|---|",
        "| rte-1 | rte | dev | 2 | accuracy 62.00 ± 2.83 | 62.00 ± 2.83 | 53.00 | +9.00 |",
        "|  | GLUE average |  | 2 | 1 of 9 tasks | 62.00 ± 2.83 | 53.00 | +9.00 |",
        "",
        "GLUE average: without cola, sst2, mrpc, stsb, qqp, mnli, qnli, wnli",
    ]


def test_the_summary_as_a_table_and_as_json(runs):
    table = smoe_train("glue", "summary", runs, "--without-wnli").out
    assert "GLUE average" in table
    assert "without cola, sst2, mrpc, stsb, qqp, mnli, qnli\n" in table
    found = json.loads(smoe_train("glue", "summary", runs / "rte-1", runs / "rte-2", "--json").out)
    (group,) = found["groups"]
    assert (group["task"], group["runs"], group["seeds"]) == ("rte", ["rte-1", "rte-2"], [1, 2])
    assert group["metrics"]["accuracy"]["mean"] == pytest.approx(0.62)
    assert found["averages"][0]["missing"][0] == "cola"


def test_the_submission_says_what_it_was_made_of(runs, tmp_path):
    output = tmp_path / "glue.zip"
    found = smoe_train("glue", "submission", runs / "rte-1", "--output", output)
    assert found.code == 2
    assert "no run has predictions for CoLA.tsv" in found.err
    found = smoe_train("glue", "submission", runs / "rte-1", "--output", output, "--fill-missing")
    assert found.code == 0, found.err
    assert found.out.count("a constant, in its place") == 11
    assert f"wrote {output}" in found.out.replace("\n", "")
    assert len(zipfile.ZipFile(output).namelist()) == 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--json", "--markdown"], "give one of the two"), (["absent"], "neither it nor a folder in it has results.json")],
)
def test_mistakes(runs, arguments, message):
    found = smoe_train("glue", "summary", runs, *arguments)
    assert found.code == 2
    assert message in found.err
