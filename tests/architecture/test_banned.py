"""What no file of the package may ever call: it would run what a stranger has written, or write where he says.

ruff's rules S301, S307, S602 ... cover part of it; a line of ``noqa`` cannot lift these.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import smoe_train

PACKAGE = Path(smoe_train.__file__).parent
FILES = sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "scripts").glob("*.py")])

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.load_all", "yaml.unsafe_load",
    "yaml.full_load", "numpy.fromfile", "pandas.read_pickle", "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip
METHODS = {"extractall", "extract", "unpack_archive"}
# Call -> the keyword that must be there with this value.
REQUIRED = {"torch.load": ("weights_only", True)}
# Keywords that must not have this value, in any call.
FORBIDDEN = {"shell": True, "trust_remote_code": True, "allow_pickle": True, "weights_only": False}


def banned(source: str) -> Iterator[tuple[int, str]]:
    """Yields line and name of everything that is banned."""
    tree = ast.parse(source)
    names = {"np": "numpy", "pd": "pandas"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                if alias.name.split(".")[0] in MODULES:
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            if node.module.split(".")[0] in MODULES:
                yield node.lineno, node.module
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, dot, rest = ast.unparse(node.func).partition(".")
        name = f"{names.get(first, first)}{dot}{rest}"
        if name in CALLS or (dot and name.rpartition(".")[2] in METHODS):
            yield node.lineno, name
        given = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
        if name in REQUIRED and given.get(REQUIRED[name][0]) is not REQUIRED[name][1]:
            yield node.lineno, f"{name} without {REQUIRED[name][0]}={REQUIRED[name][1]}"
        for word, value in FORBIDDEN.items():
            if word in given and given[word] is value:
                yield node.lineno, f"{word}={value}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE.parent).as_posix())
def test_nothing_that_runs_what_a_stranger_wrote(path: Path) -> None:
    assert list(banned(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as harmless",
        "from pickle import loads",
        "def f():\n    from joblib import load",
        "eval('1')",
        "import os as o\no.system('id')",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "from yaml import load\nload(text)",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "from torch import load\nload(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "subprocess.run('id', shell=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "archive.extractall(folder)",
    ],
)
def test_the_list_catches_what_it_should(source: str) -> None:
    assert list(banned(source))


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('a')",
        "import torch\ntorch.load(path, weights_only=True)",
        "import yaml\nyaml.safe_load(text)",
        "model.eval()",
        "subprocess.run(['id'], shell=False)",
        "tensor.extract_something()",
    ],
)
def test_the_list_leaves_what_is_sound(source: str) -> None:
    assert not list(banned(source))
