"""The rules of the house that can be read off the source: who may import whom, and how files are kept."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

import smoe_train

PACKAGE = Path(smoe_train.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [path.relative_to(PACKAGE).as_posix() for path in FILES]

# A room may import rooms of earlier rows; rooms of one row never import each other, except in the first.
ROWS = [
    {"errors", "config", "registry", "lazy", "durable", "bounded"},
    {"kernels"},
    {"routing", "data", "schedules", "parallel"},
    {"model"},
    {"reporting", "checkpoint", "evaluation"},
    {"training"},
    {"recipe"},
    {"assembly"},
    {"cli"},
]
ROW_OF = {room: number for number, row in enumerate(ROWS) for room in row}

# Module -> folders that may import it.
CONFINED = {
    "deepspeed": ("parallel/",),
    "torch.distributed": ("parallel/", "checkpoint/"),
    "datasets": ("data/sources/",),
    "wandb": ("reporting/",),
}
MAX_LINES = 420
HEAVY = {"torch", "deepspeed", "transformers", "datasets", "wandb", "matplotlib"}


def imported(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Yields every module that a file imports anywhere, also in functions, with its line.

    ``from a import b`` yields ``a.b``; ``a.b.c`` as an expression counts for ``torch.distributed``, which comes along
    with torch; the literal argument of ``import_module`` counts too.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed", node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "import_module",
            "__import__",
        ):
            yield from (
                (argument.value, node.lineno)
                for argument in node.args
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            )


def imports_of(name: str) -> list[tuple[str, int]]:
    path = PACKAGE / name
    parts = ("smoe_train", *PurePosixPath(name).parent.parts)
    return list(imported(ast.parse(path.read_text(encoding="utf-8"), str(path)), parts))


def room_of(name: str) -> str:
    return PurePosixPath(name).parts[0].removesuffix(".py")


def broken_direction(name: str, module: str) -> str | None:
    """Returns what is wrong with ``name`` importing ``module``, or None."""
    parts = module.split(".")
    if parts[0] != "smoe_train" or len(parts) < 2 or parts[1].startswith("__"):
        return None
    here, there = room_of(name), parts[1]
    if there not in ROW_OF:
        return f"{there} is no room"
    if here == there or ROW_OF[there] < ROW_OF[here] or ROW_OF[there] == ROW_OF[here] == 0:
        return None
    return f"{here} may not import {there}"


def broken_confinement(name: str, module: str) -> str | None:
    for confined, folders in CONFINED.items():
        if f"{module}.".startswith(f"{confined}.") and not name.startswith(folders):
            return f"{confined} belongs to {' and '.join(folders)}"
    return None


@pytest.mark.parametrize("name", [name for name in NAMES if name != "__init__.py"])
def test_imports_go_one_way(name):
    assert room_of(name) in ROW_OF, "a new room needs a place in ROWS"
    broken = [(line, broken_direction(name, module)) for module, line in imports_of(name)]
    assert [entry for entry in broken if entry[1]] == []


@pytest.mark.parametrize("name", NAMES)
def test_foreign_packages_stay_in_their_rooms(name):
    broken = [(line, broken_confinement(name, module)) for module, line in imports_of(name)]
    assert [entry for entry in broken if entry[1]] == []


def test_one_file_knows_wandb():
    assert len({name for name in NAMES for module, _ in imports_of(name) if module.split(".")[0] == "wandb"}) <= 1


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("routing/top_k.py", "from smoe_train.errors import SmoeError", []),
        ("routing/top_k.py", "from smoe_train import errors", []),
        ("routing/top_k.py", "def f():\n    from smoe_train.data import sources", ["routing may not import data"]),
        ("routing/top_k.py", "from ..model import moe", ["routing may not import model"]),
        ("routing/top_k.py", "from . import losses", []),
        ("model/__init__.py", "from .moe import Moe", []),
        ("model/moe.py", "import smoe_train.training", ["model may not import training"]),
        ("cli/app.py", "import smoe_train.assembly, smoe_train.extras", ["extras is no room"]),
        ("model/moe.py", "import importlib\nimportlib.import_module('smoe_train.cli')", ["model may not import cli"]),
        ("model/moe.py", "import torch\ntorch.distributed.barrier()", ["torch.distributed belongs to"]),
        ("model/moe.py", "from torch import distributed", ["torch.distributed belongs to"]),
        ("model/moe.py", "import torch.distributed as dist", ["torch.distributed belongs to"]),
        ("parallel/process.py", "import torch.distributed as dist\nimport deepspeed.comm", []),
        ("checkpoint/store.py", "import deepspeed", ["deepspeed belongs to parallel/"]),
        ("data/batches/loader.py", "from datasets import load_dataset", ["datasets belongs to data/sources/"]),
        ("data/sources/glue.py", "from datasets import load_dataset", []),
    ],
)
def test_the_rules_catch_what_they_should(name, source, expected):
    found = []
    for module, _ in imported(ast.parse(source), ("smoe_train", *PurePosixPath(name).parent.parts)):
        found += [fault for fault in (broken_direction(name, module), broken_confinement(name, module)) if fault]
    assert len(found) == len(expected)
    assert all(fault.startswith(start) for fault, start in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "program",
    [
        "import smoe_train",
        "from smoe_train.cli.app import main\nsys.argv = ['smoe-train', '--help']\ntry:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code",
    ],
    ids=["import", "help"],
)
def test_start_is_light(program):
    program = f"import sys\n{program}\nprint('loaded:', *sorted({HEAVY!r} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"


@pytest.mark.parametrize("name", NAMES)
def test_files_are_kept_in_order(name):
    assert PurePosixPath(name).stem not in {"utils", "util", "common", "helpers", "helper", "misc"}
    source = (PACKAGE / name).read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source)), "a module says in its docstring what it is for"
    assert source.count("\n") <= MAX_LINES, "split the file along what it does"


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("/__init__.py")])
def test_a_room_lists_what_it_exports(name):
    tree = ast.parse((PACKAGE / name).read_text(encoding="utf-8"))
    targets = [ast.unparse(node.targets[0]) for node in tree.body if isinstance(node, ast.Assign)]
    assert "__all__" in targets or not any(isinstance(node, ast.ImportFrom | ast.Import) for node in tree.body)
