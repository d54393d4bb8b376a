"""Damage to the files of a run's newest checkpoint: seen, named, and passed over aloud for the one before it.

Every damage is judged by what a resuming run asks first, the store. Some of them are also resumed from, to the end,
which must then be the undisturbed run's bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults.runs import (
    LIFE_SECONDS,
    WORLD_SIZE,
    Golden,
    begin_run,
    contest_recipe,
    differences,
    live,
    undisturbed,
    witnessed,
)
from faults.scenario import Outcome, Scale

from smoe_train.checkpoint.damage import EXPERT_TENSOR, described
from smoe_train.checkpoint.folders import CHECKPOINTS, MANIFEST, checkpoint_folders, step_name
from smoe_train.cli.run_folder import store_of
from smoe_train.errors import CheckpointError, printable

NEWEST, BEFORE = 10, 8
DAMAGES = {"short": 30, "commit": 500, "nightly": 10_000}
RESUMED = {"short": 1, "commit": 10, "nightly": 200}
PLAIN_DEEPSPEED = (
    "loads a file with a flipped bit in 385 of 400 tries without a word (0.19.8, measured apart from this suite); it "
    "never falls back"
)


@dataclass(frozen=True)
class Damage:
    """What was done to a checkpoint.

    Attributes:
        what: In words, to repeat it.
        names: What a message must say.
        harmless: Whether the checkpoint is still sound.
    """

    what: str
    names: tuple[str, ...] = ()
    harmless: bool = False


Kind = Callable[[Path, random.Random], Damage]


def run(scale: Scale, folder: Path) -> list[Outcome]:
    """Damages checkpoints of one run."""
    golden = undisturbed(contest_recipe(folder), folder / "undisturbed")
    base = _cut_off(folder / "undisturbed", folder / "base")
    outcomes = [
        _damages("files of the newest checkpoint damaged", "A5, B5", IN_FILES, DAMAGES[scale], base, folder / "files"),
        _damages(
            "`latest` and `best` damaged or missing", "A7", POINTERS, DAMAGES[scale] // 10, base, folder / "hints"
        ),
        _resumed(golden, base, RESUMED[scale], folder / "resumed"),
    ]
    if scale != "short":
        outcomes += [_several(base, folder / "several"), _other_formats(base, folder / "formats")]
    return outcomes


def _cut_off(source: Path, target: Path) -> Path:
    """Makes a run that ended at step `NEWEST` of one that went on."""
    shutil.copytree(source, target)
    for path in checkpoint_folders(target / CHECKPOINTS):
        if path.name > step_name(NEWEST):
            shutil.rmtree(path)
    (target / CHECKPOINTS / "latest").write_text(step_name(NEWEST) + "\n")
    (target / CHECKPOINTS / "best").write_text(step_name(6) + "\n")
    return target


def _damages(what: str, catalogue: str, kinds: Sequence[Kind], tries: int, base: Path, run_folder: Path) -> Outcome:
    draw, failures = random.Random(what), []
    for number in range(tries):
        shutil.copytree(base / CHECKPOINTS, run_folder / CHECKPOINTS)
        damage = kinds[number % len(kinds)](run_folder / CHECKPOINTS, draw)
        complaint = _judge(run_folder, damage)
        if complaint is not None:
            failures.append(f"try {number}, {damage.what}: {complaint}")
        shutil.rmtree(run_folder)
    return Outcome(
        what, catalogue, tries, tries - len(failures), plain_deepspeed=PLAIN_DEEPSPEED, failures=tuple(failures[:20])
    )


def _judge(run_folder: Path, damage: Damage) -> str | None:
    """Returns what is wrong with what a resuming run would do."""
    warnings: list[str] = []
    found = store_of(run_folder).newest_sound(warnings.append)
    step = None if found is None else found.step
    if damage.harmless:
        return None if (step, warnings) == (NEWEST, []) else f"chose step {step} and said {warnings}"
    if step != BEFORE or len(warnings) != 1:
        return f"chose step {step} and said {warnings}"
    fallback = f"resuming from the older {step_name(BEFORE)} instead: {NEWEST - BEFORE} steps are lost"
    missing = [text for text in (*damage.names, fallback) if text not in warnings[0]]
    return f"did not say {missing[0]!r}, but {warnings[0]}" if missing else None


def _resumed(golden: Golden, base: Path, tries: int, folder: Path) -> Outcome:
    """Resumes damaged runs to the end, two ranks each."""
    draw, failures, recovery = random.Random("resumed"), [], []
    for number in range(tries):
        run_folder = folder / str(number)
        shutil.copytree(base, run_folder)
        damage = IN_FILES[(7 * number) % len(IN_FILES)](run_folder / CHECKPOINTS, draw)
        (run_folder / "output.txt").unlink(missing_ok=True)
        begin_run(golden.recipe, run_folder)
        life = live(run_folder)
        ended = life.wait(LIFE_SECONDS)
        output = (run_folder / "output.txt").read_text()
        if not ended or life.codes != [0] * WORLD_SIZE:
            life.kill()
            life.wait(LIFE_SECONDS)
            problems = [f"ended with {life.codes}: {output[-500:]}"]
        else:
            recovery.append(witnessed(run_folder)["first"] - life.started)
            said = [text for text in damage.names if text not in output]
            problems = [f"did not say {text!r}" for text in said] + differences(run_folder, golden, finished=True)
        failures += [f"try {number}, {damage.what}: {'; '.join(problems)}"] if problems else []
        shutil.rmtree(run_folder)
    return Outcome(
        "resumed with a damaged newest checkpoint, to the end",
        "A5, A8",
        tries,
        tries - len(failures),
        recovery_seconds=tuple(recovery),
        plain_deepspeed=PLAIN_DEEPSPEED,
        failures=tuple(failures),
    )


def _several(base: Path, run_folder: Path) -> Outcome:
    """Damages the newest two, three ... checkpoints, and in the end all."""
    draw, failures = random.Random("several"), []
    steps = [int(path.name.removeprefix("step-")) for path in checkpoint_folders(base / CHECKPOINTS)]
    for count in range(2, len(steps) + 1):
        shutil.copytree(base / CHECKPOINTS, run_folder / CHECKPOINTS)
        for step in steps[:count]:
            _flip(run_folder / CHECKPOINTS / step_name(step) / "shared.safetensors", draw)
        warnings: list[str] = []
        try:
            found = store_of(run_folder).newest_sound(warnings.append)
            right = found is not None and count < len(steps) and found.step == steps[count] and len(warnings) == count
        except CheckpointError as error:
            right = count == len(steps) and all(step_name(step) in str(error) for step in steps)
        failures += [] if right else [f"the newest {count} damaged: said {warnings}"]
        shutil.rmtree(run_folder)
    tries = len(steps) - 1
    return Outcome(
        "the newest checkpoints all damaged: the first sound one is taken, or none if there is none",
        "A8",
        tries,
        tries - len(failures),
        plain_deepspeed=PLAIN_DEEPSPEED,
        failures=tuple(failures),
    )


def _other_formats(base: Path, run_folder: Path) -> Outcome:
    """Gives manifests other format numbers, with a SHA-256 that fits."""
    failures = []
    expected = {0: "damaged: format 0", 3: "made by a newer version", 99: "made by a newer version", -1: "damaged"}
    for number, text in expected.items():
        shutil.copytree(base / CHECKPOINTS, run_folder / CHECKPOINTS)
        _rewrite(run_folder / CHECKPOINTS / step_name(NEWEST) / MANIFEST, format=number)
        warnings: list[str] = []
        try:
            found = store_of(run_folder).newest_sound(warnings.append)
            right = number <= 0 and found is not None and found.step == BEFORE and text in warnings[0]
        except CheckpointError as error:
            right = number > 0 and text in str(error)
        failures += [] if right else [f"format {number}: said {warnings}"]
        shutil.rmtree(run_folder)
    return Outcome(
        "a checkpoint of a format that no version wrote, or only a newer one, for which nothing older is taken instead",
        "A10",
        len(expected),
        len(expected) - len(failures),
        failures=tuple(failures),
    )


# Kinds of damage


def _file(folder: Path, draw: random.Random) -> Path:
    """Returns any file of the newest checkpoint but its manifest."""
    checkpoint = folder / step_name(NEWEST)
    return draw.choice(sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST))


def _name(path: Path) -> str:
    return path.relative_to(next(one for one in path.parents if one.name.startswith("step-"))).as_posix()


def _flip(path: Path, draw: random.Random) -> tuple[int, int]:
    content = bytearray(path.read_bytes())
    position, bit = draw.randrange(len(content)), draw.randrange(8)
    content[position] ^= 1 << bit
    path.write_bytes(bytes(content))
    return position, bit


def _flipped_bit(folder: Path, draw: random.Random) -> Damage:
    path = _file(folder, draw)
    tensors = _places(path)
    position, bit = _flip(path, draw)
    hit = [name for name, (begin, end) in tensors.items() if begin <= position < end]
    # A flip within the header may leave all tensors what they were.
    words = [f"damaged: {described(hit)}"] if hit else []
    return Damage(f"bit {bit} of byte {position} of {_name(path)} flipped", (_name(path), *words))


def _places(path: Path) -> dict[str, tuple[int, int]]:
    """Returns where each tensor of a sound safetensors file lies."""
    if path.suffix != ".safetensors":
        return {}
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    return {
        name: (start + one["data_offsets"][0], start + one["data_offsets"][1])
        for name, one in header.items()
        if name != "__metadata__"
    }


def _flipped_expert_bit(folder: Path, draw: random.Random) -> Damage:
    path = draw.choice(sorted((folder / step_name(NEWEST)).glob("experts-*")))
    name, (begin, end) = draw.choice(sorted(_places(path).items()))
    content, position = bytearray(path.read_bytes()), draw.randrange(begin, end)
    content[position] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(content))
    match = EXPERT_TENSOR.match(name)
    assert match is not None
    expert = f"expert {match['expert']}: {match['kind']} of {match['name']}"
    return Damage(f"byte {position} of {path.name}, {name}, changed", (path.name, "layer ", expert))


def _cut(folder: Path, draw: random.Random) -> Damage:
    path = _file(folder, draw)
    size = draw.randrange(1, path.stat().st_size)
    lost = [name for name, (_, end) in _places(path).items() if end > size]
    os.truncate(path, size)
    experts = ("expert",) if any(EXPERT_TENSOR.match(name) for name in lost) else ()
    return Damage(f"{_name(path)} cut to {size} bytes", (_name(path), f"has {size} bytes", *experts))


def _emptied(folder: Path, draw: random.Random) -> Damage:
    path = _file(folder, draw)
    os.truncate(path, 0)
    return Damage(f"{_name(path)} emptied", (_name(path), "has 0 bytes", *_held(path)))


def _removed(folder: Path, draw: random.Random) -> Damage:
    path = _file(folder, draw)
    path.unlink()
    return Damage(f"{_name(path)} removed", (f"{_name(path)} is missing", *_held(path)))


def _held(path: Path) -> tuple[str, ...]:
    return ("it held", "expert") if path.name.startswith("experts-") else ()


def _longer(folder: Path, draw: random.Random) -> Damage:
    path = _file(folder, draw)
    with path.open("ab") as file:
        file.write(draw.randbytes(draw.randrange(1, 100)))
    return Damage(f"{_name(path)} made longer", (_name(path),))


def _swapped(folder: Path, draw: random.Random) -> Damage:
    """The generators' file of a rank may be the same in both; all others have changed."""
    names = ("shared.safetensors", "experts-00000-00003.safetensors", "experts-00004-00007.safetensors")
    name = draw.choice([one for one in names if (folder / step_name(NEWEST) / one).is_file()])
    shutil.copy(folder / step_name(BEFORE) / name, folder / step_name(NEWEST) / name)
    return Damage(f"{name} taken from step {BEFORE}", (name, "another SHA-256"))


def _exchanged(folder: Path, draw: random.Random) -> Damage:
    first, second = sorted((folder / step_name(NEWEST)).glob("experts-*"))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    return Damage("two ranks' files of experts exchanged", (first.name, second.name, "expert"))


def _added(folder: Path, draw: random.Random) -> Damage:
    name = draw.choice(("extra.safetensors", "tokenizer/added_tokens.json", "model.pt", "sub/folder/x", "\x1b[2Jx"))
    path = folder / step_name(NEWEST) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"{}")
    return Damage(f"{name!r} added", (f"{printable(name)} was added",))


def _linked(folder: Path, draw: random.Random) -> Damage:
    path = _file(folder, draw)
    aside = folder / "elsewhere"
    path.rename(aside)
    path.symlink_to(aside)
    return Damage(f"{_name(path)} is a link to itself elsewhere", (_name(path),))


def _manifest(change: Callable[[Path, random.Random], str]) -> Kind:
    def damage(folder: Path, draw: random.Random) -> Damage:
        path = folder / step_name(NEWEST) / MANIFEST
        return Damage(f"{MANIFEST} {change(path, draw)}", (step_name(NEWEST), MANIFEST))

    return damage


def _flipped_manifest(path: Path, draw: random.Random) -> str:
    return "bit {1} of byte {0} flipped".format(*_flip(path, draw))


def _cut_manifest(path: Path, draw: random.Random) -> str:
    size = draw.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"cut to {size} bytes"


def _without_manifest(path: Path, draw: random.Random) -> str:
    path.unlink()
    return "removed"


def _manifest_of_before(path: Path, draw: random.Random) -> str:
    shutil.copy(path.parent.with_name(step_name(BEFORE)) / MANIFEST, path)
    return f"taken from step {BEFORE}"


def _whole_folder_of_before(path: Path, draw: random.Random) -> str:
    shutil.rmtree(path.parent)
    shutil.copytree(path.parent.with_name(step_name(BEFORE)), path.parent)
    return f"and all files taken from step {BEFORE}"


def _rewrite(path: Path, **changes: object) -> None:
    """Changes a manifest and its own SHA-256 with it, as nobody but an attacker or another version would."""
    manifest = json.loads(path.read_text())
    manifest |= changes
    manifest.pop("sha256")
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(manifest, indent=1))


def _pointer(folder: Path, draw: random.Random) -> Damage:
    """Resuming asks neither `latest` nor `best`, so that nothing in them can mislead it."""
    path = folder / draw.choice(("latest", "best"))
    contents = (b"", b"\xff\xfe\0", b"../../elsewhere\n", b"step-99999999\n", b"/etc/passwd", draw.randbytes(40))
    which = draw.randrange(len(contents) + 2)
    if which >= len(contents):
        path.unlink()
    if which == len(contents):
        path.mkdir()
    if which < len(contents):
        path.write_bytes(contents[which])
    what = ("a folder", "missing")[which - len(contents)] if which >= len(contents) else repr(contents[which])
    return Damage(f"{path.name} is {what}", harmless=True)


IN_FILES: tuple[Kind, ...] = (
    _flipped_bit,
    _flipped_expert_bit,
    _cut,
    _flipped_bit,
    _emptied,
    _removed,
    _flipped_bit,
    _longer,
    _swapped,
    _flipped_expert_bit,
    _exchanged,
    _added,
    _flipped_bit,
    _linked,
    _manifest(_flipped_manifest),
    _manifest(_cut_manifest),
    _flipped_bit,
    _manifest(_without_manifest),
    _manifest(_manifest_of_before),
    _manifest(_whole_folder_of_before),
)
POINTERS: tuple[Kind, ...] = (_pointer,)
