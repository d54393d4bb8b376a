"""The English that every CPython carries: documentation topics and the standard library's docstrings (about 2 MB).

It needs no download. It differs between Python versions (and between builds that leave modules out), so a loss on it
is comparable only under one fingerprint.
"""

from __future__ import annotations

import ast
import hashlib
import logging
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, model_validator

from smoe_train.data.source import (
    Corpus,
    SourceConfig,
    SplitName,
    TextSource,
    in_memory,
    register_source,
)
from smoe_train.errors import DataError

MIN_DOCSTRING_CHARACTERS = 40
# Far below the 1.7 MB of any full standard library, far above what a stripped one leaves.
ENOUGH_BYTES = 500_000
TEST_FOLDERS = {"test", "tests", "idle_test"}
STATEMENTS = (ast.stmt, ast.ExceptHandler, ast.match_case)

Kind = Literal["module", "class", "function"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DOCUMENTED: Mapping[type[ast.AST], Kind] = {
    ast.Module: "module",
    ast.ClassDef: "class",
    ast.FunctionDef: "function",
    ast.AsyncFunctionDef: "function",
}

logger = logging.getLogger(__name__)


class PydocsConfig(SourceConfig):
    """Options of Python's own documentation."""

    source: Literal["pydocs"] = "pydocs"
    valid_fraction: float = Field(0.05, gt=0.0, lt=1.0)
    """Share of the bytes that validate, in whole documents."""
    test_fraction: float = Field(0.05, ge=0.0, lt=1.0)
    """Share of the bytes that test, in whole documents; 0 for no test split."""

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self) -> PydocsConfig:
        if self.valid_fraction + self.test_fraction >= 1.0:
            raise ValueError("valid_fraction + test_fraction must be below 1, the rest is for training")
        return self


@register_source("pydocs", PydocsConfig)
class PydocsSource(TextSource):
    """``pydoc_data.topics`` by key, then docstrings of all standard modules but tests, by path.

    A document is one topic or one docstring of more than 40 characters, followed by a blank line. Splits are drawn by
    document, not cut from the end, because topics and docstrings are different kinds of text: see `assign_splits`.
    """

    config: PydocsConfig

    def files(self, cache: Path) -> Sequence[Path]:
        """Returns the standard library's modules (the topics are one of them)."""
        return standard_modules(standard_library())

    def load(self, cache: Path) -> Corpus:
        """Collects the documents and divides them; takes a few seconds."""
        documents = [*_topics(), *_standard_library_documents(standard_library())]
        shares: dict[SplitName, float] = {
            "valid": self.config.valid_fraction,
            "test": self.config.test_fraction,
        }
        names = assign_splits(documents, shares)
        texts: dict[SplitName, list[bytes]] = {"train": [], "valid": []}
        if self.config.test_fraction:
            texts["test"] = []
        for name, document in zip(names, documents, strict=True):
            texts[name].append(document)
        return Corpus.read("pydocs", {name: in_memory(b"".join(parts)) for name, parts in texts.items()})


def assign_splits(documents: Sequence[bytes], shares: dict[SplitName, float]) -> list[SplitName]:
    """Returns the split of each document.

    Documents are lined up by the sha256 of their text; the first ones go to ``valid`` until its share of the bytes is
    reached, the next to ``test``, all others to ``train``. So a share is met to within one document, equal documents
    never lie in two splits, and an added document moves no others but those at a boundary.

    Args:
        documents: The texts.
        shares: Fraction of all bytes for each split but ``train``.
    """
    digests = [hashlib.sha256(document).digest() for document in documents]
    sizes: dict[bytes, int] = {}
    for digest, document in zip(digests, documents, strict=True):
        sizes[digest] = sizes.get(digest, 0) + len(document)
    total = sum(sizes.values())
    chosen: dict[bytes, SplitName] = {}
    line = sorted(sizes, reverse=True)
    for name, share in shares.items():
        filled = 0
        while line and filled < share * total:
            digest = line.pop()
            chosen[digest] = name
            filled += sizes[digest]
    return [chosen.get(digest, "train") for digest in digests]


def standard_modules(root: Path) -> list[Path]:
    """Returns the source files of the standard library below ``root`` except tests, sorted by relative path."""
    found: list[Path] = []
    for entry in root.iterdir() if root.is_dir() else ():
        # Only names that belong to the library: site-packages lies in the same folder.
        if entry.stem not in sys.stdlib_module_names:
            continue
        if entry.is_file() and entry.suffix == ".py":
            found.append(entry)
        for folder, subfolders, names in os.walk(entry):
            subfolders[:] = [name for name in subfolders if name not in TEST_FOLDERS]
            found.extend(Path(folder, name) for name in names if name.endswith(".py"))
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def standard_library() -> Path:
    """Returns the folder of this Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def docstrings(source: bytes) -> Iterator[tuple[Kind, str]]:
    """Yields the cleaned docstrings of more than 40 characters in a module's source, from top to bottom.

    Each comes with what it documents. Source that this Python cannot parse has none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules are no concern of ours
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=True)
            if text is not None and len(text) > MIN_DOCSTRING_CHARACTERS:
                yield DOCUMENTED[type(node)], text
        # Expressions hold no definitions; passing them by makes this twice as fast as ast.walk.
        inner = [child for child in ast.iter_child_nodes(node) if isinstance(child, STATEMENTS)]
        waiting.extend(reversed(inner))


def _document(text: str) -> bytes:
    return text.strip("\n").encode("utf-8", "backslashreplace") + b"\n\n"


def _topics() -> list[bytes]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        logger.warning("this Python lacks pydoc_data.topics; the pydocs corpus is smaller than usual")
        return []
    return [_document(topics[key]) for key in sorted(topics)]


def _standard_library_documents(root: Path) -> list[bytes]:
    modules = [path.read_bytes() for path in standard_modules(root)]
    documents = [_document(text) for module in modules for _, text in docstrings(module)]
    if sum(map(len, documents)) >= ENOUGH_BYTES:
        return documents
    if sum(map(len, modules)) >= ENOUGH_BYTES:
        logger.warning(
            "the standard library in %s has no docstrings; the pydocs corpus uses its source code instead", root
        )
        return [module + b"\n\n" for module in modules if module]
    raise DataError(
        f"{root}: this Python's standard library has neither docstrings nor source (stripped or zipped), so there "
        "is no pydocs corpus; use another Python build, or data.source=text with data.path=<your text file>"
    )
