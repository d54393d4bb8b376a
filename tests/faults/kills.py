"""SIGKILL at random instants, of all ranks and of one, until the run is at its end: no bit of it may differ."""

from __future__ import annotations

import os
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from faults.lives import Life
from faults.runs import (
    LIFE_SECONDS,
    WORLD_SIZE,
    Golden,
    begin_run,
    contest_recipe,
    differences,
    easy_first_recipe,
    in_writing,
    live,
    newest_step,
    undisturbed,
    witnessed,
)
from faults.scenario import Outcome, Scale

from smoe_train.errors import SmoeError

KILLS = {"short": 6, "commit": 40, "nightly": 2000}
SHARE_AIMED_AT_SAVES = 0.5
# What is left of a launch whose rank was killed must end by itself; a launcher would not wait as long.
SURVIVOR_SECONDS = 3.0
PLAIN_DEEPSPEED = (
    "its checkpoints hold no random state, so that losses differ after a resume; `latest` may name a checkpoint "
    "whose other ranks' experts are missing (0.19.8, `save_checkpoint`)"
)


@dataclass
class Tally:
    """What the kills of one kind came to."""

    tried: int = 0
    within_saves: int = 0
    while_starting: int = 0
    runs: int = 0
    most_resumes: int = 0
    recovery: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def run(scale: Scale, folder: Path) -> list[Outcome]:
    """Kills runs of two recipes, all their ranks or one of them."""
    kills = int(os.environ.get("SMOE_TRAIN_FAULTS_KILLS") or KILLS[scale])
    recipes = {"contest": contest_recipe, "easy-first": easy_first_recipe}
    if kills < 20:
        del recipes["easy-first"]  # the undisturbed run alone takes as long as some kills
    goldens = {}
    for name, make in recipes.items():
        (folder / name).mkdir()
        goldens[name] = undisturbed(make(folder / name), folder / name / "undisturbed")
    outcomes = []
    for kind, share in (("all ranks", 0.6), ("one rank", 0.4)):
        tally = Tally()
        for seed, (name, golden) in enumerate(goldens.items()):
            _storm(golden, folder / name, kind, round(kills * share / len(goldens)), seed, tally)
        outcomes.append(_outcome(kind, tally))
    return outcomes


def _outcome(kind: str, tally: Tally) -> Outcome:
    return Outcome(
        fault=f"SIGKILL of {kind} at a random instant, {tally.within_saves} of them within a save",
        catalogue="A1, B1, B3, B7, B8" if kind == "all ranks" else "A3",
        tried=tally.tried,
        survived=tally.tried - len(tally.failures),
        recovery_seconds=tuple(tally.recovery),
        plain_deepspeed=PLAIN_DEEPSPEED,
        failures=tuple(tally.failures),
        measured={
            "within_saves": tally.within_saves,
            "before_the_first_step": tally.while_starting,
            "runs_finished": tally.runs,
            "most_resumes_of_one_run": tally.most_resumes,
        },
    )


def _storm(golden: Golden, folder: Path, kind: str, kills: int, seed: int, tally: Tally) -> None:
    """Begins runs and kills them until so many kills are used up; the last run is left to finish."""
    random_source = random.Random(f"{kind} {seed}")
    end = tally.tried + kills
    while tally.tried < end:
        run_folder = folder / f"{kind.split()[0]}-{tally.runs}"
        before = tally.tried
        try:
            problems = _killed_run(golden, run_folder, kind, end, random_source, tally)
        except SmoeError as error:
            problems = [f"{type(error).__name__}: {error}"]
            tally.tried += tally.tried == before  # so that a run that cannot even begin is a failure, too
        if problems:
            where = f"{folder.name}, {kind}, seed {seed}, kills {before + 1} to {tally.tried} of this line"
            tally.failures.append(f"{where}: {'; '.join(problems)}")
        tally.runs += 1
        tally.most_resumes = max(tally.most_resumes, tally.tried - before)
        shutil.rmtree(run_folder)


def _killed_run(
    golden: Golden, run_folder: Path, kind: str, end: int, random_source: random.Random, tally: Tally
) -> list[str]:
    """Kills and resumes one run until it is at its end; returns what is not as promised, at its first sight."""
    committed, killed_at, hit = 0, None, True
    while hit and begin_run(golden.recipe, run_folder):
        leftovers = in_writing(run_folder)
        life = live(run_folder)
        hit = tally.tried < end and _kill(life, golden, run_folder, kind, committed, random_source)
        killed = life.killed
        ended = life.wait(SURVIVOR_SECONDS if hit else LIFE_SECONDS)
        if not ended:
            life.kill()
            life.wait(LIFE_SECONDS)
        word = witnessed(run_folder)
        if killed_at is not None and "first" in word:
            tally.recovery.append(word["first"] - killed_at)
        killed_at = killed
        if "step" in word and word["step"] != committed:
            return [f"resumed at step {word['step']:g}, but step {committed} was committed"]
        if newest_step(run_folder) < committed:
            return [f"step {committed} was committed, but the newest checkpoint is of step {newest_step(run_folder)}"]
        committed = newest_step(run_folder)
        if hit:
            tally.tried += 1
            tally.within_saves += bool(in_writing(run_folder) - leftovers)
            tally.while_starting += "first" not in word
        elif life.codes != [0] * WORLD_SIZE:
            codes = life.codes if ended else "a kill, after it had come to a halt"
            return [f"ended with {codes} after step {committed}: {(run_folder / 'output.txt').read_text()[-500:]}"]
        problems = differences(run_folder, golden, finished=not hit)
        if problems:
            return problems
    return ["is not finished after its end"] if begin_run(golden.recipe, run_folder) else []


def _kill(
    life: Life, golden: Golden, run_folder: Path, kind: str, committed: int, random_source: random.Random
) -> bool:
    """Kills at a random instant of what is left of the run, or of one of its next saves; returns whether it did.

    A run takes a few lives to its end this way.
    """
    victims = None if kind == "all ranks" else [random_source.randrange(WORLD_SIZE)]
    left = 1.0 - committed / golden.recipe.training.max_steps
    rest = golden.first_step_seconds + left * (golden.seconds - golden.first_step_seconds)
    if random_source.random() < SHARE_AIMED_AT_SAVES:
        known, number = in_writing(run_folder), random_source.randint(1, 3)

        def writing() -> bool:
            known.update(in_writing(run_folder))
            return len(known) >= wanted

        wanted = len(known) + number
        life.wait(LIFE_SECONDS, writing)
        time.sleep(random_source.uniform(0.0, golden.save_seconds))
    else:
        deadline = time.monotonic() + random_source.uniform(0.0, rest)
        life.wait(LIFE_SECONDS, lambda: time.monotonic() > deadline)
    if not life.running():
        return False
    life.kill(victims)
    return True
