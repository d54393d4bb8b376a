"""What the tries of liveness share: one recipe, what comes of it undisturbed, and how tries are counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from faults.forked import Command, Fault
from faults.runs import Records, contest_recipe, records_of
from faults.scenario import Outcome

from smoe_train.reporting import METRICS, read_records

HANG_SECONDS = 4.0
RUN_SECONDS = 240.0
# Long enough to hold everything that is disturbed, and no longer: some hundred of these are run.
SMALL = {
    "training": {"max_steps": 8, "hang_seconds": HANG_SECONDS, "grace_seconds": 30.0},
    "evaluation": {"every_steps": 4, "max_tokens": 48},
}
NOTE = "reliability notes of this project, DeepSpeed 0.19.8: "


@dataclass
class Tally:
    """What the tries of one fault came to."""

    tried: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def judge(self, name: str, problems: Sequence[str]) -> None:
        """Counts one try."""
        self.tried += 1
        if problems:
            self.failures.append(f"{name}: {'; '.join(problems)}")

    def outcome(self, fault: str, catalogue: str, plain_deepspeed: str = "", **measured: float) -> Outcome:
        """Returns the line of the table."""
        survived = self.tried - len(self.failures)
        seconds, failures = tuple(self.seconds), tuple(self.failures)
        return Outcome(fault, catalogue, self.tried, survived, seconds, plain_deepspeed, failures, measured)


@dataclass(frozen=True)
class Bench:
    """The recipe that all commands run, and what comes of it undisturbed.

    Attributes:
        folder: Of all run folders.
        recipe: Its file.
        records: Metrics and routing records of the undisturbed run.
        seconds: How long that took.
        resumes: Whether to go on with each disturbed run, to compare every bit of it.
    """

    folder: Path
    recipe: Path
    records: tuple[Records, Records]
    seconds: float
    resumes: bool

    def command(self, name: str, *arguments: str, fault: Fault | None = None) -> Command:
        """Starts a run of its own, or goes on with it."""
        return Command(self.recipe, self.folder / name, *arguments, fault=fault)

    def finished(self, name: str) -> list[str]:
        """Goes on with a run to its end, and returns in which ways it is not the undisturbed one."""
        if not self.resumes:
            return []
        command = self.command(name)
        if not command.wait(RUN_SECONDS) or command.code != 0:
            command.end()
            return [f"resumed with {command.code}: {command.said[-300:]!r}"]
        return [] if records_of(self.folder / name) == self.records else ["its records differ after the resume"]


def undisturbed(folder: Path, resumes: bool) -> Bench:
    """Trains the recipe to its end; see `Bench`."""
    recipe = contest_recipe(folder, **SMALL)
    path = folder / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    command = Command(path, folder / "undisturbed")
    assert command.wait(RUN_SECONDS), f"the undisturbed run hangs: {command.said[-2000:]}"
    assert command.code == 0, command.said[-2000:]
    return Bench(folder, path, records_of(folder / "undisturbed"), command.ended - command.started, resumes)


def steps(run_folder: Path) -> int:
    """Returns the last step that a run has recorded."""
    if not (run_folder / METRICS).is_file():
        return 0
    return max((int(record["step"]) for record in read_records(run_folder / METRICS)), default=0)


def until_step(command: Command, step: int) -> bool:
    """Waits until a command has come to a step; returns whether it goes on from there."""
    return command.wait(RUN_SECONDS, lambda: command.step() >= step) and command.running()
