"""Predictions as GLUE wants them spelled, and the archive of all eleven files."""

import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from support.glue_runs import make_run

from smoe_train.data.examples import TaskInfo
from smoe_train.errors import DataError, RunFailedError
from smoe_train.evaluation import submission
from smoe_train.evaluation.predictions import predictions_file, read_predictions, spell, write_predictions
from smoe_train.evaluation.submission import FILES, write_submission

RTE = TaskInfo("rte", "classification", ("entailment", "not_entailment"), ("accuracy",))
STSB = TaskInfo("stsb", "regression", (), ("pearson",), 0.0, 5.0)

# Rows of the published test sets (arXiv 1804.07461, table 1; the diagnostic set has 1,104).
ROWS = {
    "CoLA.tsv": 1063,
    "SST-2.tsv": 1821,
    "MRPC.tsv": 1725,
    "STS-B.tsv": 1379,
    "QQP.tsv": 390965,
    "MNLI-m.tsv": 9796,
    "MNLI-mm.tsv": 9847,
    "QNLI.tsv": 5463,
    "RTE.tsv": 3000,
    "WNLI.tsv": 146,
    "AX.tsv": 1104,
}


def test_predictions_are_spelled_by_name_or_within_the_range():
    assert spell(RTE, np.array([1.0, 0.0])) == ["not_entailment", "entailment"]
    assert spell(STSB, np.array([-0.3, 2.34567, 5.2, 5.0])) == ["0.000", "2.346", "5.000", "5.000"]


def test_a_file_of_predictions(tmp_path):
    path = predictions_file(tmp_path, "test")
    write_predictions(path, RTE, np.array([0, 7]), np.array([1.0, 0.0]))
    assert path == tmp_path / "predictions" / "test.tsv"
    assert path.read_bytes() == b"index\tprediction\n0\tnot_entailment\n7\tentailment\n"
    assert read_predictions(path) == [(0, "not_entailment"), (7, "entailment")]
    assert predictions_file(tmp_path, "test", "ax") == tmp_path / "predictions" / "ax" / "test.tsv"
    with pytest.raises(RunFailedError, match="cannot be written"):
        write_predictions(path / "below.tsv", RTE, np.array([0]), np.array([1.0]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "preds.tsv:1: expected the header"),
        (b"index prediction\n0\t1\n", "preds.tsv:1: expected the header"),
        (b"index\tprediction\n0\t1\n\n", "preds.tsv:3: expected a number, a tab and a prediction; found ''"),
        (b"index\tprediction\n0 1\n", "preds.tsv:2: expected a number"),
        (b"index\tprediction\nx\t1\n", "preds.tsv:2: expected a number"),
        (b"index\tprediction\n0\t\xff\n", "preds.tsv: cannot be read"),
    ],
)
def test_files_that_are_none(tmp_path, content, message):
    (tmp_path / "preds.tsv").write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)):
        read_predictions(tmp_path / "preds.tsv")


def predict(run, split, rows, other_task=None):
    path = predictions_file(run, split, other_task)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(["index\tprediction\n", *(f"{index}\t{text}\n" for index, text in rows)]))


@pytest.fixture
def small(monkeypatch):
    """The files of the archive with 3 rows each."""
    files = tuple(replace(file, rows=3) for file in FILES)
    monkeypatch.setattr(submission, "FILES", files)
    return files


def answers(file, reverse=False):
    names = file.info.labels or ("0.000", "2.500")
    rows = [(index, names[index % len(names)]) for index in range(file.rows)]
    return rows[::-1] if reverse else rows


def runs_of(folder, files, reverse=False):
    tasks = dict.fromkeys(file.task for file in files if file.task != "ax")
    runs = {task: make_run(folder, task, task, {"accuracy": 0.5}) for task in tasks}
    for file in files:
        run = runs["mnli" if file.task == "ax" else file.task]
        predict(run, file.split, answers(file, reverse), "ax" if file.task == "ax" else None)
    return runs


def test_the_whole_archive(tmp_path):
    assert {file.name: file.rows for file in FILES} == ROWS
    runs = list(runs_of(tmp_path, FILES, reverse=True).values())
    output = tmp_path / "submission.zip"
    write_submission(runs, output)
    with zipfile.ZipFile(output) as archive:
        assert archive.testzip() is None
        assert sorted(archive.namelist()) == sorted(ROWS)
        for file in FILES:
            lines = archive.read(file.name).decode().splitlines()
            assert lines == ["index\tprediction", *(f"{index}\t{text}" for index, text in answers(file))]


def test_what_is_missing_is_filled_only_if_that_was_said(tmp_path, small):
    runs = runs_of(tmp_path, small)
    given = [run for task, run in runs.items() if task in ("rte", "mnli")]
    output = tmp_path / "submission.zip"
    with pytest.raises(
        DataError, match=r"no run has predictions for CoLA.tsv \(test split of cola\), .*--fill-missing"
    ):
        write_submission(given, output)
    assert not output.exists()
    sources = write_submission(given, output, fill_missing=True)
    first = output.read_bytes()
    write_submission(given, output, fill_missing=True)
    assert output.read_bytes() == first, "equal predictions make an equal archive"
    filled = sorted(file.name for file, source in sources.items() if source is None)
    assert filled == sorted(ROWS.keys() - {"RTE.tsv", "MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"})
    with zipfile.ZipFile(output) as archive:
        assert archive.read("STS-B.tsv") == b"index\tprediction\n0\t2.701\n1\t2.701\n2\t2.701\n"
        assert archive.read("AX.tsv") == b"index\tprediction\n0\tentailment\n1\tneutral\n2\tcontradiction\n"


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("rte", [(0, "entailment")] * 2, "has 2 predictions, but test of rte has 3 rows"),
        ("rte", [(0, "entailment"), (1, "entailment"), (1, "entailment")], "index 2 is missing"),
        ("rte", [(0, "entailment"), (1, "1"), (2, "entailment")], "index 1 is answered with '1'; allowed for RTE.tsv"),
        ("stsb", [(0, "1.0"), (1, "5.2"), (2, "1.0")], "numbers from 0.0 to 5.0"),
        ("stsb", [(0, "1.0"), (1, "nan"), (2, "1.0")], "numbers from 0.0 to 5.0"),
        ("stsb", [(0, "1.0"), (1, "high"), (2, "1.0")], "numbers from 0.0 to 5.0"),
    ],
)
def test_predictions_that_the_archive_cannot_hold(tmp_path, small, task, rows, message):
    runs = runs_of(tmp_path, small)
    predict(runs[task], "test", rows)
    output = tmp_path / "submission.zip"
    output.write_bytes(b"of before")
    with pytest.raises(DataError, match=re.escape(message)):
        write_submission(list(runs.values()), output)
    assert output.read_bytes() == b"of before"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["submission.zip"]


def test_runs_that_do_not_fit_together(tmp_path, small):
    runs = list(runs_of(tmp_path, small).values())
    twin = make_run(tmp_path, "twin", "rte", {"accuracy": 0.5})
    predict(twin, "test", [(0, "entailment")])
    with pytest.raises(DataError, match=r"RTE\.tsv: several runs have predictions"):
        write_submission([*runs, twin], tmp_path / "submission.zip")
    other = make_run(tmp_path, "other", "sst5", {"accuracy": 0.5})
    with pytest.raises(DataError, match="is a run of sst5, which is no task of GLUE"):
        write_submission([*runs, other], tmp_path / "submission.zip")
    with pytest.raises(DataError, match="choose another --output"):
        write_submission(runs, tmp_path / "absent" / "submission.zip")
