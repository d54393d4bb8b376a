"""Recipes, overrides and names of every kind of nonsense: each ends in a recipe or in one clear message, quickly."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from faults.judged_command import Ended, ended, limited_memory, smoe_train
from faults.scenario import Outcome, Scale
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from smoe_train.config import Layered, apply_overrides, read_layers
from smoe_train.recipe import check_recipe, find_recipe, load_recipe, shipped_recipes

TRIES: Mapping[Scale, int] = {"short": 300, "commit": 10_000, "nightly": 100_000}
# What takes several times as long as checking values is done with each so many tries.
FILE_EVERY = 5
TWICE_EVERY = 20
COMMAND_EVERY = 50
SECONDS = 5.0
MORE_MEMORY_BYTES = 4 << 30


@dataclass(frozen=True)
class Attempt:
    """What a user gives.

    Attributes:
        text: Contents of the recipe file, or None to name a shipped recipe.
        tree: Values of a recipe, in place of ``text``.
        name: The recipe argument where there is neither.
        overrides: ``key.path=value`` texts.
    """

    text: bytes | None = None
    tree: dict[str, Any] | None = None
    name: str = "demo"
    overrides: tuple[str, ...] = ()


def run(scale: Scale, folder: Path) -> list[Outcome]:
    """Tries recipes of random values, files of damaged text, and overrides and names.

    A recipe that is accepted must also come through being written and read again unchanged; nothing is ever written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kinds: list[tuple[str, str, st.SearchStrategy[Attempt], float]] = [
        ("recipe of wrong keys, types and values", "D3", changed_recipes(), 0.4),
        ("recipe file of damaged or unusual YAML", "D3", damaged_files(), 0.25),
        ("overrides and recipe names", "D4", overrides_and_names(), 0.35),
    ]
    before = os.getcwd()
    os.chdir(folder)
    ask(Attempt())  # which imports torch and transformers
    try:
        with limited_memory(MORE_MEMORY_BYTES):
            found = [_try(kind, number, attempts, int(TRIES[scale] * share)) for kind, number, attempts, share in kinds]
            return [*found, _try_special_files()]
    finally:
        os.chdir(before)


def _try(kind: str, catalogue: str, attempts: st.SearchStrategy[Attempt], tries: int) -> Outcome:
    judge = _Judge()

    @settings(
        max_examples=tries,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(attempts)
    def attempt_all(attempt: Attempt) -> None:
        judge.attempt(attempt)

    attempt_all()
    return judge.outcome(kind, catalogue)


def _try_special_files() -> Outcome:
    judge = _Judge()
    for text in special_files():
        judge.attempt(Attempt(text))
    return judge.outcome("recipe file that is a bomb, asks for code or extends itself", "E8")


class _Judge:
    """Makes attempts and keeps account of them."""

    def __init__(self) -> None:
        self.tried = 0
        self.slowest_seconds = 0.0
        self.failures: list[str] = []

    def attempt(self, attempt: Attempt) -> None:
        ends = [load(attempt, self.tried % FILE_EVERY == 0, self.tried % TWICE_EVERY == 0)]
        if self.tried % COMMAND_EVERY == 0:
            ends.append(ask(attempt))
        self.tried += 1
        self.slowest_seconds = max(self.slowest_seconds, *(end.seconds for end in ends))
        complaints = [complaint for end in ends if (complaint := end.complaint(seconds=SECONDS)) is not None]
        if complaints:
            self.failures.append(f"{complaints[0]}; from {attempt!r}"[:2000])

    def outcome(self, kind: str, catalogue: str) -> Outcome:
        left = sorted(path.name for path in Path().iterdir() if path.name != "recipe.yaml")
        if left:
            self.failures.append(f"files were written: {left[:5]}")
        return Outcome(
            kind,
            catalogue,
            self.tried,
            max(0, self.tried - len(self.failures)),
            plain_deepspeed="has no recipes",
            failures=tuple(self.failures[:20]),
            measured={"slowest_seconds": self.slowest_seconds},
        )


def load(attempt: Attempt, from_file: bool, twice: bool) -> Ended:
    """Reads and checks the recipe as every command does, and says how that ends as the command line would.

    Args:
        attempt: What to read.
        from_file: Whether to write values down first.
        twice: Whether to read also what an accepted recipe is written down as.
    """
    return ended(lambda: _load(attempt, from_file, twice))


def _load(attempt: Attempt, from_file: bool, twice: bool) -> None:
    if attempt.text is None and attempt.tree is None:
        find_recipe(attempt.name)
    if attempt.tree is not None and not from_file:
        recipe = check_recipe(Layered(attempt.tree), "run", 2)
    elif attempt.overrides and not from_file:
        recipe = check_recipe(apply_overrides(_shipped(attempt.name), attempt.overrides), "run", 2)
    else:
        recipe = load_recipe(_argument(attempt), attempt.overrides, 2)
    if twice:
        Path("recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        again = load_recipe("recipe.yaml", (), 2, resolved=True)
        assert again == recipe, "what is written down reads as another recipe"


def ask(attempt: Attempt) -> Ended:
    """Gives the recipe to the command line, which then works out the layout and the cost of the model."""
    # What begins with a dash would be an option of the command.
    return smoe_train("validate", "--nproc", "2", "--json", "--", _argument(attempt), *attempt.overrides)


def _argument(attempt: Attempt) -> str:
    text = attempt.text if attempt.tree is None else _dumped(attempt.tree)
    if text is None:
        return attempt.name
    Path("recipe.yaml").write_bytes(text)
    return "recipe.yaml"


@functools.lru_cache
def _shipped(name: str) -> Layered:
    return read_layers(find_recipe(name), lambda parent, folder: find_recipe(str(folder / parent)))


# What is tried

ODD_TEXTS = [
    "", " ", "\t", "\0", "\x1b[31mred\x1b[0m", "a\nerror: b", "\r", "\u202egnp.exe", "\ud800", "\U0010ffff", "\ufeff",
    "~", "null", "${seed}", "${oc.env:HOME}", "${", "\\${seed}", "???", "1e5", "1_000", "0x10", "190:20:30", ".inf",
    "-.nan", "no", "on", "2001-12-14", "../../x", "/etc/passwd", "-rf", "~root", "a" * 300, "*a", "..", ".", "a/b",
    "CON", "!!python/object/apply:os.system [id]", "%s%n", "{0.__class__}", "'; rm -rf x", "$(id)", "`id`", "C:\\x",
]  # fmt: skip
texts = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=12))
numbers = st.one_of(
    st.integers(-3, 40),
    st.integers(-(2**70), 2**70),
    st.sampled_from([10**9, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 10**18, 10**400]),
    st.floats(),
    st.sampled_from([0.0, -0.0, 1e-320, 1e308, 0.5, 1.0, 1e5, -1.0]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
SOME_KEYS = [
    "model", "moe", "router", "type", "source", "path", "top_k", "curriculum", "training", "extends", "base", "layers",
]  # fmt: skip
keys = st.one_of(st.sampled_from(SOME_KEYS), texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=4)),
    max_leaves=8,
)


def changed_recipes() -> st.SearchStrategy[Attempt]:
    """Shipped recipes with up to four values set to others, or keys misspelt, moved or taken out."""
    written = _written_trees()
    places = [_places_of(tree) for tree in written]

    @st.composite
    def draw(make: st.DrawFn) -> Attempt:
        which = make(st.integers(0, len(written) - 1))
        tree = copy.deepcopy(written[which])
        for _ in range(make(st.integers(1, 4))):
            block, key = _block(tree, make(st.sampled_from(places[which])))
            change = make(st.sampled_from(["value", "value", "number", "misspell", "remove", "move"]))
            if change == "value":
                block[key] = make(values)
            elif change == "number":
                block[key] = make(numbers)
            elif change == "misspell":
                block[make(texts) if make(st.booleans()) else f"{key}s"] = block.get(key)
            elif change == "remove":
                block.pop(key, None)
            else:
                tree[make(keys)] = block.pop(key, None)
        return Attempt(tree=tree)

    return draw()


def damaged_files() -> st.SearchStrategy[Attempt]:
    """Texts of shipped recipes with bytes changed, and pieces of YAML that do something special."""
    written = [yaml.safe_dump(tree).encode() for tree in _written_trees()]
    pieces = st.one_of(st.binary(max_size=4), st.sampled_from(PIECES))

    @st.composite
    def draw(make: st.DrawFn) -> Attempt:
        text = bytearray(make(st.sampled_from(written)))
        for _ in range(make(st.integers(1, 4))):
            place = make(st.integers(0, len(text)))
            if make(st.booleans()):  # at the beginning of a line, where most of YAML's signs mean something
                place = text.rfind(b"\n", 0, place) + 1
            text[place : place + make(st.integers(0, 6))] = make(pieces)
        return Attempt(bytes(text))

    return draw()


PIECES = [
    b"\n", b": ", b"\t", b"&a ", b"*a", b"- ", b"? ", b"<<: *a\n", b"{", b"}", b"[", b"]", b"| ", b">\n", b"'", b'"',
    b"#", b"---\n", b"...\n", b"%YAML 1.1\n", b"%TAG ! tag:x,2000:\n", b"!!python/name:os.system ", b"!!set {a}",
    b"!!binary AA==", b"!!timestamp 2001-01-01", b"\xff\xfe", b"\xef\xbb\xbf", b"\0", b"\r\n", b"\x85", b"\xe2\x80\xa8",
    b"\x1b[2J", b"seed: 1\n", b"extends: recipe.yaml\n", b"extends: demo\n", b"extends: [demo, enwik8/top_k]\n",
    b"extends: /dev/zero\n", b"extends: ../../../etc/passwd\n", b'"a\\nb": 1\n', b"${oc.env:HOME}", b"1e400",
    b"1" * 5000, b"\xed\xa0\x80",
]  # fmt: skip


def special_files() -> Iterator[bytes]:
    """Yields bombs and other files of one kind."""
    levels = [b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [b"a%d: &a%d [%s]" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 10)) for i in range(1, 9)]
    yield b"version: 1\n" + b"\n".join(levels)
    yield b"version: 1\nm0: &m0 {a: 1}\n" + b"".join(
        b"m%d: &m%d {b%d: *m%d, c%d: *m%d}\n" % (i, i, i, i - 1, i, i - 1) for i in range(1, 60)
    )
    doubling = b"".join(b"a%d: ${a%d}${a%d}\n" % (i, i + 1, i + 1) for i in range(40))
    yield b"version: 1\ndescription: ${a0}\n" + doubling + b"a40: xxxxxxxx\n"
    yield b"version: 1\nmodel: " + b"[" * 3000 + b"]" * 3000
    yield b"version: 1\nmodel: " + b"{a: " * 3000 + b"1" + b"}" * 3000
    yield b"version: 1\n" + b"".join(b"  " * i + b"model:\n" for i in range(1500))
    yield b"version: 1\n" + b"".join(b"k%d: 1\n" % i for i in range(20_000))
    yield b"version: 1\ndescription: " + b"x" * 3_000_000
    yield b"version: 1\n#" + b"#" * 3_000_000
    yield b"version: 1\nmodel: !!python/object/apply:os.system ['touch canary']\n"
    yield b"version: 1\nmodel: !!python/object/new:subprocess.Popen [[touch, canary]]\n"
    yield b"version: 1\nextends: recipe.yaml\n"
    yield "version: 1".encode("utf-16")
    yield b""
    yield b"\0" * 1000
    yield bytes(range(256)) * 8


def overrides_and_names() -> st.SearchStrategy[Attempt]:
    """A shipped recipe with overrides of any form, or a name that is none."""
    named = [".".join(map(str, place)) for place in _places_of(_written_trees()[0])]
    shipped = sorted(shipped_recipes())
    shown = values.map(lambda value: _dumped(value, True).decode("utf-8", "surrogateescape").strip())
    overrides = st.one_of(
        texts,
        st.builds("{}={}".format, st.one_of(st.sampled_from(named), texts), st.one_of(texts, shown)),
        st.builds("name={}".format, texts),
        st.builds("{}[{}]={}".format, st.sampled_from(named), st.integers(-2, 10**9), texts),
    )
    some = st.lists(overrides, min_size=1, max_size=3).map(tuple)
    names = st.one_of(texts, st.builds("{}.yaml".format, texts), st.sampled_from(["/dev/zero", "/dev/stdin", "/", "."]))
    return st.one_of(
        st.builds(Attempt, name=st.sampled_from(shipped), overrides=some),
        st.builds(Attempt, name=names),
    ).filter(lambda attempt: attempt.name not in ("", "recipe.yaml"))


def _written_trees() -> list[dict[str, Any]]:
    """Returns the recipes of seconds as they are written, together with what they extend."""
    paths = [path for name, path in sorted(shipped_recipes().items()) if name.startswith("smoke/")]
    return [read_layers(path, lambda parent, folder: folder / parent).values for path in paths]


def _places_of(tree: dict[str, Any]) -> list[tuple[str, ...]]:
    """Returns where a recipe can say something, also what it leaves at its default."""
    return [*_places(check_recipe(Layered(tree), "run").model_dump(mode="json"))]


def _places(tree: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from _places(value, (*prefix, key))


def _block(tree: dict[str, Any], place: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """Returns the block at a place, as far as earlier changes have left it, and the key in it."""
    block = tree
    for key in place[:-1]:
        below = block.setdefault(key, {})
        if not isinstance(below, dict):
            return block, key
        block = below
    return block, place[-1]


def _dumped(value: Any, flow: bool = False) -> bytes:
    text = yaml.safe_dump(value, default_flow_style=True if flow else None, allow_unicode=True)
    return text.removesuffix("...\n").encode("utf-8", "surrogatepass")
