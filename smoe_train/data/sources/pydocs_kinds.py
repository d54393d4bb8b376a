"""Labelled examples that every CPython carries: docstrings of the standard library, and what each documents.

They need no download, for trying classification on any machine. As with ``pydocs``, Python versions differ, so figures
compare only under one fingerprint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from smoe_train.data.examples import DEV, TRAIN, Example, LabelledCorpus, TaskInfo
from smoe_train.data.reading.labelled_source import cut, keep
from smoe_train.data.source import LabelledSource, SourceConfig, register_source
from smoe_train.data.sources import pydocs
from smoe_train.errors import DataError

TASK = TaskInfo("pydocs_kinds", "classification", pydocs.KINDS, ("accuracy",))
# Far below the nearly 500 module docstrings of any full standard library.
ENOUGH_EXAMPLES = 100


class PydocsKindsConfig(SourceConfig):
    """Options of Python's docstrings with labels."""

    source: Literal["pydocs_kinds"] = "pydocs_kinds"
    dev_fraction: float = Field(0.1, gt=0.0, lt=1.0)
    """Share of the examples that become the dev split, chosen by a hash of the texts."""


@register_source("pydocs_kinds", PydocsKindsConfig)
class PydocsKindsSource(LabelledSource):
    """Docstrings of more than 40 characters: does one document a module, a class or a function?

    Each text is there once, and not at all if it documents things of two kinds. Functions have ten times as many as
    modules, so of each kind as many are kept as the rarest has, chosen by a hash of the texts: always giving the same
    answer is right in a third of the cases. Rows are in the order of the modules' paths.
    """

    config: PydocsKindsConfig

    def files(self, cache: Path) -> Sequence[Path]:
        """Returns the standard library's modules."""
        return pydocs.standard_modules(pydocs.standard_library())

    def load(self, cache: Path) -> LabelledCorpus:
        """Collects the docstrings and divides them; takes a few seconds."""
        root = pydocs.standard_library()
        examples = labelled_docstrings([path.read_bytes() for path in pydocs.standard_modules(root)])
        by_kind = [[one for one in examples if one.label == kind] for kind in range(len(pydocs.KINDS))]
        fewest = min(map(len, by_kind))
        if fewest < ENOUGH_EXAMPLES:
            raise DataError(
                f"{root}: this Python's standard library has only {fewest} docstrings of some kind (stripped or "
                "zipped), so there is no pydocs_kinds corpus; use another Python build, or data.source=labelled"
            )
        kept = sorted((one for group in by_kind for one in keep(group, fewest)), key=lambda one: one.index)
        train, dev = cut(kept, self.config.dev_fraction)
        if not train or not dev:
            raise DataError(
                f"pydocs_kinds: data.dev_fraction={self.config.dev_fraction} leaves {len(train):,} training and "
                f"{len(dev):,} dev rows; change it"
            )
        return LabelledCorpus.create("pydocs_kinds", TASK, {TRAIN: train, DEV: dev}, {})


def labelled_docstrings(modules: Sequence[bytes]) -> list[Example]:
    """Returns the docstrings of modules with the id of what they document, each text of one kind once, in order.

    Args:
        modules: Their source.
    """
    kinds: dict[str, set[pydocs.Kind]] = {}
    for module in modules:
        for kind, text in pydocs.docstrings(module):
            # Lone surrogates, which an escape in a docstring can make, are no text that could be encoded.
            kinds.setdefault(text.encode("utf-8", "backslashreplace").decode(), set()).add(kind)
    clear = [(text, *found) for text, found in kinds.items() if len(found) == 1]
    return [Example(text, None, pydocs.KINDS.index(kind), index) for index, (text, kind) in enumerate(clear)]
