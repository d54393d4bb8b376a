"""Which files hold the splits of a labelled set: in a folder, a zip archive, the hub's layout, or by themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from smoe_train.data.examples import TRAIN
from smoe_train.data.reading.archives import inside, is_archive, open_members
from smoe_train.data.reading.rows import SUFFIXES, hub_files
from smoe_train.data.source import StoredFile
from smoe_train.errors import DataError

TEXT_SUFFIXES = tuple(suffix for suffix in SUFFIXES if suffix != ".parquet")


@dataclass(frozen=True)
class SplitFiles:
    """The files of one split, in the order of their rows.

    Attributes:
        files: What to read.
        paths: Where that lies on the disk: the files, or the archive that holds them.
        shared: Whether other splits have other rows of the same files.
    """

    files: tuple[StoredFile, ...]
    paths: tuple[Path, ...]
    shared: bool = False

    @classmethod
    def at(cls, *paths: Path) -> SplitFiles:
        """Returns plain files.

        Raises:
            DataError: One is not there.
        """
        paths = tuple(path.expanduser() for path in paths)
        for path in paths:
            if not path.is_file():
                raise DataError(f"{path}: there is no such file; correct the path")
        return cls(tuple(StoredFile.at(path) for path in paths), paths)

    @property
    def name(self) -> str:
        """What to call them in messages: the file, or the folder or archive of several."""
        if len(self.files) == 1:
            return self.files[0].name
        return str(self.paths[0] if len(self.paths) == 1 else self.paths[0].parent)


def find_splits(
    path: Path,
    folders: Sequence[str],
    stems: Mapping[str, Sequence[str]],
    suffixes: Sequence[str] = TEXT_SUFFIXES,
) -> dict[str, SplitFiles]:
    """Returns the files of each split that is there.

    Args:
        path: A folder, a zip archive, or a file of rows, which is taken for the training split.
        folders: Where in it to look, "" for itself; the first that holds a file of any split is taken.
        stems: By split, what its files may be called without suffix ("dev", "validation").
        suffixes: What their names may end in; parquet files (``train.parquet``, ``train-00000-of-00002.parquet``) are
            found besides.

    Raises:
        DataError: There is nothing at ``path``, or two files for one split.
    """
    path = path.expanduser()
    if path.is_file() and not is_archive(path):
        return {TRAIN: SplitFiles.at(path)}
    if not path.is_dir():
        members = open_members(path)
        return _first([_in_archive(path, members, folder, stems, suffixes) for folder in folders])
    return _first([_in_folder(path, path / folder, stems, suffixes) for folder in folders])


def _first(found: Sequence[dict[str, SplitFiles]]) -> dict[str, SplitFiles]:
    return next((splits for splits in found if splits), {})


def _in_archive(
    path: Path,
    members: Mapping[str, StoredFile],
    folder: str,
    stems: Mapping[str, Sequence[str]],
    suffixes: Sequence[str],
) -> dict[str, SplitFiles]:
    found: dict[str, list[tuple[str, SplitFiles]]] = {}
    for name, member in members.items():
        inner = PurePosixPath(name)
        split = _split_of(inner.name, stems, suffixes)
        if split is not None and str(inner.parent) == (folder or "."):
            found.setdefault(split, []).append((name, SplitFiles((member,), (path,))))
    return _only(path, found)


def _in_folder(
    path: Path, folder: Path, stems: Mapping[str, Sequence[str]], suffixes: Sequence[str]
) -> dict[str, SplitFiles]:
    if not folder.is_dir():
        return {}
    found: dict[str, list[tuple[str, SplitFiles]]] = {}
    for file in sorted(folder.iterdir()):
        split = _split_of(file.name, stems, suffixes)
        if split is not None and file.is_file():
            found.setdefault(split, []).append((file.name, SplitFiles.at(inside(path, file))))
    shards = hub_files(folder)
    for split, names in stems.items():
        for name in names:
            if name in shards:
                files = SplitFiles.at(*(inside(path, file) for file in shards[name]))
                found.setdefault(split, []).append((files.paths[0].name, files))
    return _only(folder, found)


def _split_of(name: str, stems: Mapping[str, Sequence[str]], suffixes: Sequence[str]) -> str | None:
    file = PurePosixPath(name)
    if file.suffix.lower() not in suffixes:
        return None
    return next((split for split, names in stems.items() if file.stem in names), None)


def _only(where: Path, found: Mapping[str, list[tuple[str, SplitFiles]]]) -> dict[str, SplitFiles]:
    for split, candidates in found.items():
        if len(candidates) > 1:
            names = " and ".join(name for name, _ in candidates)
            raise DataError(f"{where}: has {names} for the {split} split; say which one by data.{split}_path")
    return {split: candidates[0][1] for split, candidates in found.items()}
