"""``train --sweep``: one ordinary run for each combination of some settings' values, then a table of the results.

Every run is a process of its own, started with the same command plus its settings and its name, so that none sees what
another left in memory, and each alone can be resumed, evaluated or reported on. Runs follow one another: they would
only share the machine. ``<output-dir>/<name>.sweep.json`` says how far the sweep is.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

import yaml
from filelock import FileLock, Timeout

from smoe_train.cli.launch import already_launched
from smoe_train.cli.launcher import LAUNCHER_PID
from smoe_train.cli.supervise import FORWARDED, POLL_SECONDS, kill_tree, signals_into
from smoe_train.cli.sweep_results import SweptRun, figures_of, labels_of, print_plan, print_results, to_json
from smoe_train.cli.train import TrainOptions
from smoe_train.config import Layered, apply_overrides
from smoe_train.durable import write_file
from smoe_train.errors import LaunchError, Problem, RecipeError, RunStoppedError, SmoeError
from smoe_train.recipe import RECIPE, Recipe, load_recipe

RunCommand = Callable[[Sequence[str]], int]

MAX_NAME = 100
# What ends a run with one of these would end the next one too: a mistake of the user, or a wish to stop. Any other
# failure, such as a loss that is not finite or a lack of memory, may be the combination's own.
ENDS_THE_SWEEP = frozenset({SmoeError.exit_code, RunStoppedError.exit_code, 130, 143})


@dataclass(frozen=True)
class Sweep:
    """What is to be run.

    Attributes:
        name: The recipe's name, which all runs' names begin with.
        options: The command that each run adds its settings to.
        runs: In the order in which they are run; the last swept key varies fastest.
    """

    name: str
    options: TrainOptions
    runs: list[SweptRun]

    @property
    def record(self) -> Path:
        """The file that says how far the sweep is."""
        return self.options.output_dir / f"{self.name}.sweep.json"

    def folder(self, run: SweptRun) -> Path:
        """Returns the folder of a run."""
        return self.options.output_dir / run.recipe.name

    def arguments(self, run: SweptRun) -> list[str]:
        """Returns the command of one run, to be put behind ``smoe-train``."""
        options = self.options
        # A checkpoint is where runs begin; one that has begun goes on from its own.
        begun = (self.folder(run) / RECIPE).is_file()
        arguments = ["train", options.recipe, *options.overrides, *run.overrides, f"name={run.recipe.name}"]
        arguments += ["--launcher", options.launcher, "--resume", "auto" if begun else options.resume]
        arguments += ["--output-dir", str(options.output_dir)]
        arguments += ["--max-restarts", str(options.max_restarts)] if options.max_restarts else []
        arguments += [] if options.nproc is None else ["--nproc", str(options.nproc)]
        return arguments + ([] if options.hostfile is None else ["--hostfile", str(options.hostfile)])


def train_all(
    options: TrainOptions,
    texts: Sequence[str],
    print_config: bool,
    dry_run: bool,
    as_json: bool,
    run_command: RunCommand | None = None,
) -> int:
    """Runs every combination, prints what came of it, and returns the exit code of the first failure, or 0.

    After a failure of the run itself the sweep goes on with the next combination; after a mistake of the user (exit
    code 2) or a request to stop (75, 130, 143) it ends, and the same command continues it.

    Args:
        options: The command without ``--sweep``.
        texts: ``key=a,b,c`` each.
        print_config: Refused, as there are several recipes.
        dry_run: Print the combinations only.
        as_json: Print JSON.
        run_command: What runs ``smoe-train`` with some arguments and returns its exit code; for tests.

    Raises:
        SmoeError: Some combinations cannot be run; nothing was started.
    """
    if not texts:
        raise LaunchError("--json: training has no result to print, a sweep has; add --sweep key=a,b,c")
    if print_config:
        raise LaunchError(
            "--print-config: a sweep has several recipes; use --dry-run, or give key=value for one of them"
        )
    planned = plan_sweep(options, texts)
    if dry_run:
        print_plan(planned.runs, planned.options.output_dir, as_json)
        return 0
    received: list[Signals] = []
    with _held(planned), signals_into(received):
        code = _run_all(planned, received, run_command or (lambda arguments: run_child(arguments, received)))
        print_results(planned.runs, as_json)
    return code


def plan_sweep(options: TrainOptions, texts: Sequence[str]) -> Sweep:
    """Returns the combinations, every one of them checked.

    Raises:
        RecipeError: Values or combinations are wrong; all mistakes are listed, those of a combination with its values.
        LaunchError: The runs cannot be started as asked.
    """
    if already_launched(os.environ):
        raise LaunchError("--sweep starts its runs itself; call it without torchrun or srun, with --nproc")
    world_size = options.plan().nproc
    values = read_values(texts, options.overrides)
    found: list[tuple[dict[str, str], Recipe]] = []
    problems: list[tuple[str, tuple[Problem, ...]]] = []
    combinations = [dict(zip(values, choice, strict=True)) for choice in itertools.product(*values.values())]
    for settings in combinations:
        overrides = [f"{key}={value}" for key, value in settings.items()]
        try:
            found.append((settings, load_recipe(options.recipe, [*options.overrides, *overrides], world_size)))
        except RecipeError as error:
            problems.append((" ".join(overrides), error.problems))
    if problems:
        raise RecipeError(_summed_up(problems, len(combinations)))
    name = found[0][1].name
    names = run_names(name, [settings for settings, _ in found])
    runs = [
        SweptRun(settings, recipe.model_copy(update={"name": run}))
        for (settings, recipe), run in zip(found, names, strict=True)
    ]
    planned = Sweep(name, options, runs)
    there = [planned.folder(run) for run in runs if (planned.folder(run) / RECIPE).exists()]
    if options.resume == "never" and there:
        listed = ", ".join(map(str, there))
        raise LaunchError(f"--resume never: there are runs already: {listed}; continue with auto, or remove them")
    return planned


def read_values(texts: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """Reads ``key=a,b,c`` texts; commas inside of brackets and quotes do not divide.

    Args:
        texts: What stands behind each ``--sweep``.
        overrides: Settings of all runs.

    Raises:
        RecipeError: A text is not of that form, or a key or value comes twice; all of them are listed.
    """
    found: dict[str, tuple[str, ...]] = {}
    problems: list[Problem] = []
    fixed = {text.partition("=")[0] for text in overrides}
    for text in texts:
        key, separator, listed = text.partition("=")
        values = _split(listed)
        where = "--sweep"
        if not separator or not key:
            problems.append(Problem(where, "", f"{text!r} is not of the form key.path=a,b,c"))
        elif not values:
            problems.append(Problem(where, key, f"cannot read the values {listed!r}; write a,b,c, with null for none"))
        elif key == "name":
            problems.append(Problem(where, key, "runs get their names from the values; sweep another key"))
        elif key in found or key in fixed:
            problems.append(Problem(where, key, "is set twice; give all its values in one --sweep"))
        else:
            problems += _repetitions(key, values)
            found[key] = values
    if problems:
        raise RecipeError(problems)
    return found


def run_names(name: str, combinations: Sequence[Mapping[str, str]]) -> list[str]:
    """Returns a name for each combination: ``name-key-value``, with as much of each key as tells it from the others.

    A name that cannot say its values, since they are long, have characters that names cannot have, or read like those
    of another combination, ends with a digest of them. It depends on nothing but the values.
    """
    labels = labels_of(list(combinations[0]))
    plain = ["-".join([name, *(f"{labels[key]}-{value}" for key, value in one.items())]) for one in combinations]
    names = []
    for settings, text in zip(combinations, plain, strict=True):
        usable = re.sub(r"[^A-Za-z0-9_.-]+", "_", text)
        if usable != text or len(text) > MAX_NAME or Counter(plain)[text] > 1:
            digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
            usable = f"{usable[: MAX_NAME - 9]}-{digest}"
        names.append(usable)
    return names


def run_child(arguments: Sequence[str], received: Sequence[Signals]) -> int:
    """Runs ``smoe-train`` in a process of its own, passes on every signal that comes, and returns its exit code.

    What it prints goes to standard error: standard output is for the results of the sweep.
    """
    command = [sys.executable, "-m", "smoe_train.cli.sweep", *arguments]
    environment = {**os.environ, LAUNCHER_PID: str(os.getpid())}
    before = len(received)
    # A session of its own, so that Ctrl-C reaches it once, from here; a second one breaks off its last checkpoint.
    child = subprocess.Popen(command, env=environment, start_new_session=True, stdout=2)
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = child.wait(POLL_SECONDS)
                return status if status >= 0 else 128 - status
            for number in received[before:]:
                child.send_signal(FORWARDED[number])
            before = len(received)
    finally:
        kill_tree(child)


def _run_all(planned: Sweep, received: Sequence[Signals], run_command: RunCommand) -> int:
    done_before = _done_before(planned)
    _say(f"sweep {planned.name}: {len(planned.runs)} runs, {len(done_before)} of them done")
    first_failure = 0
    for number, run in enumerate(planned.runs, start=1):
        what = f"sweep {planned.name}, run {number} of {len(planned.runs)}: {' '.join(run.overrides)}"
        if received:
            break
        if run.recipe.name in done_before:
            _say(f"{what}: is done")
            code = 0
        else:
            _say(what)
            run.state = "running"
            _write(planned)
            code = run_command(planned.arguments(run))
        run.exit_code = code
        run.state = "done" if code == 0 else "stopped" if code in ENDS_THE_SWEEP - {2} else "failed"
        if code == 0:
            run.figures = figures_of(planned.folder(run))
        _write(planned)
        first_failure = first_failure or code
        if code in ENDS_THE_SWEEP:
            break
    pending = sum(run.state in ("pending", "stopped") for run in planned.runs)
    if pending:
        _say(f"sweep {planned.name}: ended with {pending} runs to go; the same command continues it")
    return first_failure or (RunStoppedError.exit_code if pending else 0)


def _done_before(planned: Sweep) -> frozenset[str]:
    """Returns the runs that an earlier call has finished with exactly these recipes."""
    try:
        states = {run["run"]: run["state"] for run in json.loads(planned.record.read_bytes())["runs"]}
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or not ours: each run finds out for itself
        return frozenset()
    return frozenset(
        run.recipe.name
        for run in planned.runs
        if states.get(run.recipe.name) == "done" and _holds(planned.folder(run), run.recipe)
    )


def _holds(folder: Path, recipe: Recipe) -> bool:
    try:
        return load_recipe(str(folder / RECIPE)) == recipe
    except RecipeError:
        return False


def _write(planned: Sweep) -> None:
    record: dict[str, Any] = {
        "name": planned.name,
        "recipe": planned.options.recipe,
        "overrides": list(planned.options.overrides),
        **to_json(planned.runs),
    }
    try:
        write_file(planned.record, json.dumps(record, indent=1).encode() + b"\n")
    except OSError as error:
        raise LaunchError(
            f"{planned.record}: cannot be written: {error.strerror}; choose another --output-dir"
        ) from error


@contextlib.contextmanager
def _held(planned: Sweep) -> Iterator[None]:
    """Keeps a second sweep of the same name from writing to the same record."""
    lock = FileLock(planned.options.output_dir / f".{planned.name}.sweep.lock")
    try:
        planned.options.output_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise LaunchError(f"{planned.record}: another command is running this sweep; wait for it or stop it") from None
    except OSError as error:
        folder = planned.options.output_dir
        raise LaunchError(f"{folder}: cannot be written: {error.strerror}; choose another --output-dir") from error
    try:
        yield
    finally:
        lock.release()


def _split(listed: str) -> tuple[str, ...]:
    """Returns the texts of the values, divided as the items of a YAML list are; none if it is not one."""
    text = f"[{listed}]"
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return ()
    if not isinstance(node, yaml.SequenceNode):
        return ()
    return tuple(text[item.start_mark.index : item.end_mark.index].strip() for item in node.value)


def _repetitions(key: str, values: Sequence[str]) -> list[Problem]:
    """Returns a problem for each value that has come before, perhaps in other words (``1e-3``, ``0.001``)."""
    problems, seen = [], dict[str, str]()
    for value in values:
        read = json.dumps(apply_overrides(Layered({}), [f"{key}={value}"]).values, sort_keys=True, default=str)
        if read in seen:
            problems.append(Problem("--sweep", key, f"the values {seen[read]} and {value} are the same"))
        seen.setdefault(read, value)
    return problems


def _summed_up(problems: Sequence[tuple[str, tuple[Problem, ...]]], combinations: int) -> list[Problem]:
    """Returns the problems with the combination each belongs to; one that all share is listed once, without it."""
    counts = Counter(problem for _, found in problems for problem in set(found))
    shared = [problem for problem in problems[0][1] if counts[problem] == combinations]
    own = [
        Problem(f"{settings} ({problem.where})", problem.key, problem.message)
        for settings, found in problems
        for problem in found
        if problem not in shared
    ]
    return shared + own


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":  # one run of a sweep, which shall not outlive it
    from smoe_train.cli.app import main
    from smoe_train.cli.launcher import die_with_parent

    die_with_parent()
    main()
