"""Objects that hold memory maps, made fit for worker processes."""

from __future__ import annotations

import mmap
from typing import Any, NamedTuple

import numpy as np


class MapAddress(NamedTuple):
    """Where the contents of a memory map lie."""

    filename: str
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]

    def open(self) -> np.memmap[Any, Any]:
        """Returns the map, read-only."""
        return np.memmap(self.filename, dtype=self.dtype, mode="r", offset=self.offset, shape=self.shape)


class ReopensMaps:
    """Base of classes whose memory maps are pickled as their addresses, not as their contents.

    Workers that are not forked get a copy of what they work on; without this it would hold the whole corpus.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {name: _address(value) for name, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        opened = {name: value.open() if isinstance(value, MapAddress) else value for name, value in state.items()}
        self.__dict__.update(opened)


def _address(value: Any) -> Any:
    # The base of a slice of a map is that map; only the whole map can be opened again by its name and offset.
    base: Any = getattr(value, "base", None)
    if isinstance(value, np.memmap) and isinstance(base, mmap.mmap):
        return MapAddress(str(value.filename), value.dtype, value.offset, value.shape)
    return value


__all__ = ["ReopensMaps"]
