"""Damaged data, tokenizers and caches: the damage is refused in one message that names the file, or does no harm."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from faults.judged_command import Ended, ended, limited_memory, smoe_train
from faults.sample_data import Sample, samples
from faults.scenario import Outcome, Scale

from smoe_train.assembly import build_batches, prepare_data
from smoe_train.config import Layered
from smoe_train.recipe import Recipe, check_recipe

TRIES: Mapping[Scale, int] = {"short": 100, "commit": 2000, "nightly": 10_000}
CACHE_SHARE = 0.2
COMMAND_EVERY = 20
SECONDS = 5.0
MORE_MEMORY_BYTES = 4 << 30  # of addresses; Arrow's allocator alone sets one aside where it finds no room


def run(scale: Scale, folder: Path) -> list[Outcome]:
    """Damages data sets of every source and form, and what the cache holds of them."""
    in_cache = int(TRIES[scale] * CACHE_SHARE)
    samples()  # Arrow's allocator is there before memory is limited
    with limited_memory(MORE_MEMORY_BYTES), _no_warnings():
        return [_damaged_sources(TRIES[scale] - in_cache, folder), _damaged_caches(in_cache, folder)]


def _damaged_sources(tries: int, folder: Path) -> Outcome:
    """A run that is refused leaves nothing that another could take for data; one that is not can train."""
    failures: list[str] = []
    refused, every = 0, samples()
    for number in range(tries):
        draw = random.Random(number)
        sample = every[number % len(every)]
        place = _fresh(folder / "source")
        sample.write(place)
        damages = [_damage(place, draw) for _ in range(draw.randint(1, 2))]
        cache = _fresh(folder / "cache")
        with _cache_at(cache):
            end = _prepare(sample, place) if number % COMMAND_EVERY else _ask(sample, place, folder)
        refused += end.code == 2
        complaint = end.complaint(seconds=SECONDS) or _half_written(end, cache)
        # A sound file with too little in it is said to be so by the name of its split.
        if complaint is None and end.code == 2 and str(folder) not in end.err and " split " not in end.err:
            complaint = f"no file is named: {end.err[:300]!r}"
        if complaint is not None:
            failures.append(f"try {number}, {sample.name}, {' and '.join(damages)}: {complaint}"[:1500])
    return Outcome(
        "damaged data file or archive",
        "D1",
        tries,
        tries - len(failures),
        plain_deepspeed="reads no data",
        failures=tuple(failures[:20]),
        measured={"refused": refused},
    )


def _damaged_caches(tries: int, folder: Path) -> Outcome:
    """What is damaged in the cache is made again, or refused by name, at the latest by ``data verify``."""
    failures: list[str] = []
    made_again, every = 0, samples()
    place, sound = folder / "source", folder / "sound"
    expected: dict[str, str] = {}
    for number in range(tries):
        draw = random.Random(number)
        sample = every[number % len(every) if number % 10 == 0 else number // 10 * 10 % len(every)]
        if number % 10 == 0:
            sample.write(_fresh(place))
            with _cache_at(_fresh(sound)):
                expected = prepare_data(_recipe(sample, place)).checksums()
        cache = _fresh(folder / "cache")
        shutil.copytree(sound, cache, dirs_exist_ok=True)
        damage = _damage(cache, draw)
        found: dict[str, str] = {}

        def work(found: dict[str, str] = found, sample: Sample = sample) -> None:
            store = prepare_data(_recipe(sample, place))
            store.verify()
            found.update(store.checksums())

        with _cache_at(cache):
            end = ended(work)
        complaint = end.complaint(seconds=SECONDS)
        if complaint is None and end.code == 0 and found != expected:
            complaint = "the damage was not noticed"
        made_again += end.code == 0
        if complaint is not None:
            failures.append(f"try {number}, cache of {sample.name}, {damage}: {complaint}"[:1500])
    return Outcome(
        "damaged cache of tokens or tokenizer",
        "D2",
        tries,
        tries - len(failures),
        plain_deepspeed="keeps no data",
        failures=tuple(failures[:20]),
        measured={"made_again_or_harmless": made_again},
    )


def _recipe(sample: Sample, place: Path) -> Recipe:
    sections = sample.sections(place)
    training = {"sequence_length": 8, "micro_batch_size": 1, "global_batch_size": 1, "max_steps": 3}
    return check_recipe(Layered({**sections, "training": training}), "run", 1)


def _prepare(sample: Sample, place: Path) -> Ended:
    def work() -> None:
        recipe = _recipe(sample, place)
        store = prepare_data(recipe)
        store.verify()
        assert build_batches(recipe, store, 0, 1).train[0]

    return ended(work)


def _ask(sample: Sample, place: Path, folder: Path) -> Ended:
    (folder / "recipe.yaml").write_text(_recipe(sample, place).to_yaml(), encoding="utf-8")
    return smoe_train("data", "prepare", folder / "recipe.yaml", "--json")


def _half_written(end: Ended, cache: Path) -> str | None:
    stores = sorted(path.name for path in (cache / "stores").glob("*") if path.is_dir())
    if end.code == 2 and [name for name in stores if ".partial" in name]:
        return f"left {stores}"
    return None


# Damage


def _damage(folder: Path, draw: random.Random) -> str:
    """Damages one file below a folder and returns what was done."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    if not paths:
        return "nothing left to damage"
    path = draw.choice(paths)
    name = path.relative_to(folder)
    if draw.random() < 0.12:
        how = draw.choice(REPLACEMENTS)
        path.unlink()
        how(path)
        return f"{name}: {how.__name__}"
    how_changed = draw.choice(CHANGES)
    path.write_bytes(how_changed(path.read_bytes(), draw))
    return f"{name}: {how_changed.__name__}"


def removed(path: Path) -> None: ...


def folder_instead(path: Path) -> None:
    path.mkdir()


def pipe_instead(path: Path) -> None:
    os.mkfifo(path)


def dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def one_bit(data: bytes, draw: random.Random) -> bytes:
    if not data:
        return b"\1"
    place = draw.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]


def many_bits(data: bytes, draw: random.Random) -> bytes:
    for _ in range(20):
        data = one_bit(data, draw)
    return data


def bits_at_an_end(data: bytes, draw: random.Random) -> bytes:
    """Damages the first or last bytes, where formats have their headers."""
    size = min(64, len(data))
    if draw.random() < 0.5:
        return many_bits(data[:size], draw) + data[size:]
    return data[: len(data) - size] + one_bit(data[len(data) - size :], draw)


def cut_off(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def one_byte_short(data: bytes, draw: random.Random) -> bytes:
    return data[:-1]


def emptied(data: bytes, draw: random.Random) -> bytes:
    return b""


def longer(data: bytes, draw: random.Random) -> bytes:
    return data + draw.randbytes(draw.randint(1, 300))


def with_an_odd_piece(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data) + 1)
    return data[:place] + draw.choice(ODD) + data[place + draw.choice([0, 0, 1, 10]) :]


def noise(data: bytes, draw: random.Random) -> bytes:
    return draw.randbytes(min(len(data), 4000))


def without_a_line(data: bytes, draw: random.Random) -> bytes:
    rows = data.split(b"\n")
    del rows[draw.randrange(len(rows))]
    return b"\n".join(rows)


def without_a_separator(data: bytes, draw: random.Random) -> bytes:
    sign = draw.choice([b"\t", b",", b'"', b":", b"{", b"}", b"\n", b" ", b"(", b")"])
    places = [place for place in range(len(data)) if data[place : place + 1] == sign]
    if not places:
        return data[1:]
    place = draw.choice(places)
    return data[:place] + data[place + 1 :]


def crlf(data: bytes, draw: random.Random) -> bytes:
    return data.replace(b"\n", b"\r\n")


def zeros_inside(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data) + 1)
    return data[:place] + bytes(min(512, len(data) - place)) + data[place + 512 :]


def halves_exchanged(data: bytes, draw: random.Random) -> bytes:
    return data[len(data) // 2 :] + data[: len(data) // 2]


ODD = [
    b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\x85", b"\xe2\x80\xa8", b"\x1b[2J", b"\\ud800",
    b"1e999", b"NaN", b"-1", b"99999999999999999999", b"null", b"[" * 5000, b'{"a":' * 3000, b"9" * 5000, b'"', b"\t\t",
    b"\n\n", b"__label__9 x", b"((", b"))", b"<unk>", b" = = = \n", b"\\N", b"PK\x03\x04", b"\x1f\x8b", b"x" * 200_000,
]  # fmt: skip

CHANGES = (
    one_bit, many_bits, bits_at_an_end, bits_at_an_end, cut_off, one_byte_short, emptied, longer, with_an_odd_piece,
    with_an_odd_piece, noise, without_a_line, without_a_separator, crlf, zeros_inside, halves_exchanged,
)  # fmt: skip
REPLACEMENTS = (removed, folder_instead, pipe_instead, dangling_link, link_to_itself, link_to_a_device)


# Surroundings


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@contextlib.contextmanager
def _cache_at(folder: Path) -> Iterator[None]:
    before = os.environ.get("SMOE_TRAIN_CACHE")
    os.environ["SMOE_TRAIN_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["SMOE_TRAIN_CACHE"]
        else:
            os.environ["SMOE_TRAIN_CACHE"] = before


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Leaves out what the product says of stores that it makes again."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
