"""The archive that gluebenchmark.com scores: eleven files of predictions for the test splits, one zip."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from smoe_train.data.examples import TaskInfo
from smoe_train.data.reading.glue_tasks import GLUE_TASKS, GlueName
from smoe_train.durable import replacing
from smoe_train.errors import DataError
from smoe_train.evaluation.predictions import Row, format_predictions, predictions_file, read_predictions
from smoe_train.evaluation.results import TaskResult

NO_DATE = (1980, 1, 1, 0, 0, 0)  # so that equal predictions give equal archives

# The commonest answer of each published training split, or its mean: placeholders, not results.
CONSTANTS: Mapping[GlueName, str] = {
    "cola": "1",
    "sst2": "1",
    "mrpc": "1",
    "stsb": "2.701",
    "qqp": "0",
    "mnli": "contradiction",
    "qnli": "not_entailment",
    "rte": "entailment",
    "wnli": "0",
    "ax": "contradiction",
}


@dataclass(frozen=True)
class SubmissionFile:
    """One file of the archive.

    Attributes:
        name: Its name.
        task: The task that it answers.
        split: The split of that task.
        rows: Rows of the published split, whose indices are 0, 1, 2 ...
    """

    name: str
    task: GlueName
    split: str
    rows: int

    @property
    def info(self) -> TaskInfo:
        """What may be answered."""
        return GLUE_TASKS[self.task].info


FILES = tuple(
    SubmissionFile(file, name, split, task.rows[split])
    for name, task in GLUE_TASKS.items()
    for split, file in task.info.submissions.items()
)


def write_submission(
    run_folders: Sequence[Path], output: Path, fill_missing: bool = False
) -> Mapping[SubmissionFile, Path | None]:
    """Writes the archive from the predictions in run folders, atomically.

    AX has no training split: it is answered by a run of MNLI.

    Args:
        run_folders: Fine-tuned runs; those of other tasks than GLUE's are refused.
        output: The archive.
        fill_missing: Whether a file that no run has predictions for is filled with a constant, since the site takes
            none but whole archives. Its score there is then no result of a model.

    Returns:
        The file of predictions that each file of the archive was made from, None for one that was filled.

    Raises:
        DataError: A file has no predictions, those of two runs, not the published number of rows, or an answer that is
            none of the task's; or the archive cannot be written.
    """
    sources = {file: _source(file, candidates) for file, candidates in _candidates(run_folders).items()}
    missing = [file for file, source in sources.items() if source is None]
    if missing and not fill_missing:
        raise DataError(
            "no run has predictions for "
            + ", ".join(f"{file.name} ({file.split} split of {file.task})" for file in missing)
            + "; gluebenchmark.com takes only archives with all eleven files. Add the runs, have one predict with "
            "`smoe-train evaluate RUN --task TASK --split SPLIT --write-predictions`, or fill what is missing with a "
            "constant by --fill-missing"
        )
    contents = {file: checked_rows(file, path) if path else _filling(file) for file, path in sources.items()}
    try:
        with replacing(output) as raw, zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
            for file, rows in contents.items():
                member = zipfile.ZipInfo(file.name, NO_DATE)
                member.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(member, format_predictions(rows))
    except OSError as error:
        raise DataError(f"{output}: cannot be written: {error.strerror}; choose another --output") from error
    return sources


def checked_rows(file: SubmissionFile, source: Path) -> list[Row]:
    """Returns the predictions in a file in the order of their index, if they are what the archive needs.

    Raises:
        DataError: They are not.
    """
    rows = sorted(read_predictions(source))
    if len(rows) != file.rows:
        raise DataError(
            f"{source}: has {len(rows):,} predictions, but {file.split} of {file.task} has {file.rows:,} rows; "
            "predict the whole split"
        )
    for expected, (index, answer) in enumerate(rows):
        if index != expected:
            raise DataError(f"{source}: index {expected} is missing; expected each from 0 to {file.rows - 1} once")
        if not _allowed(file.info, answer):
            allowed = ", ".join(file.info.labels) or f"numbers from {file.info.low} to {file.info.high}"
            raise DataError(f"{source}: index {index} is answered with {answer!r}; allowed for {file.name}: {allowed}")
    return rows


def _candidates(run_folders: Sequence[Path]) -> dict[SubmissionFile, list[Path]]:
    """Returns, for each file of the archive, the files of predictions for it."""
    found: dict[SubmissionFile, list[Path]] = {file: [] for file in FILES}
    for folder in run_folders:
        task = TaskResult.read(folder).task
        if task not in {file.task for file in FILES}:
            raise DataError(f"{folder}: is a run of {task}, which is no task of GLUE; leave it out")
        for file, sources in found.items():
            path = predictions_file(folder, file.split, None if file.task == task else file.task)
            if path.is_file():
                sources.append(path)
    return found


def _source(file: SubmissionFile, candidates: Sequence[Path]) -> Path | None:
    if len(candidates) > 1:
        listed = ", ".join(str(path) for path in candidates)
        raise DataError(f"{file.name}: several runs have predictions ({listed}); name the run to submit only")
    return candidates[0] if candidates else None


def _filling(file: SubmissionFile) -> list[Row]:
    return [(index, CONSTANTS[file.task]) for index in range(file.rows)]


def _allowed(task: TaskInfo, answer: str) -> bool:
    if task.kind == "classification":
        return answer in task.labels
    try:
        return task.low <= float(answer) <= task.high
    except ValueError:
        return False
