"""WikiText-2 and WikiText-103 (arXiv 1609.07843): good and featured articles of Wikipedia, as tokens or as raw text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from smoe_train.data.reading.archives import is_zip, open_members
from smoe_train.data.reading.documents import divided, in_chunks
from smoe_train.data.reading.download import Published, fetch, location
from smoe_train.data.reading.rows import Row, hub_files, read_rows, text_of
from smoe_train.data.reading.wiki_articles import Scan, scan
from smoe_train.data.source import (
    SPLITS,
    Corpus,
    SourceConfig,
    Split,
    SplitName,
    StoredFile,
    TextSource,
    register_source,
)
from smoe_train.data.sources.hub import read_hub
from smoe_train.data.stores.build_once import build_once
from smoe_train.errors import DataError

HUB = "Salesforce/wikitext"
REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
HUB_SPLITS: dict[SplitName, str] = {"train": "train", "valid": "validation", "test": "test"}
SMERITY = "https://wikitext.smerity.com"
FACE = "https://huggingface.co/datasets"
REMEDIES: dict[SplitName, str] = {
    "train": "set data.path to the archive, a folder of its files, or the training text",
    "valid": "set data.valid_path to the file, or data.valid_fraction=0.05 to cut it from the training text",
    "test": "set data.test_path to the file, data.test_fraction=0.05 to cut it from the training text, or "
    "data.test=false",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Edition:
    """One of the four published texts.

    Attributes:
        archive: Its zip archive.
        lines: Lines of each split.
        sha1: Digest of each split's file.
    """

    archive: Published
    lines: dict[SplitName, int]
    sha1: dict[SplitName, str]


LINES_2: dict[SplitName, int] = {"train": 36_718, "valid": 3_760, "test": 4_358}
LINES_103: dict[SplitName, int] = {"train": 1_801_350, "valid": 3_760, "test": 4_358}
# Digests of the files as in gluon-nlp's data/corpora/wikitext.py; the raw valid and test texts of both are the same.
EDITIONS = {
    "wikitext-2-v1": Edition(
        Published(
            "wikitext-2-v1.zip",
            (f"{SMERITY}/wikitext-2-v1.zip",),
            "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
            num_bytes=4_475_746,
        ),
        LINES_2,
        {
            "train": "863f29c46ef9d167fff4940ec821195882fe29d1",
            "valid": "0418625c8b4da6e4b5c7a0b9e78d4ae8f7ee5422",
            "test": "c7b8ce0aa086fb34dab808c5c49224211eb2b172",
        },
    ),
    "wikitext-2-raw-v1": Edition(
        Published(
            "wikitext-2-raw-v1.zip",
            (f"{SMERITY}/wikitext-2-raw-v1.zip", f"{FACE}/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip"),
            "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
            num_bytes=4_721_645,
        ),
        LINES_2,
        {
            "train": "d33faf256327882db0edc7c67cd098d1051a2112",
            "valid": "db78d4db83700cba1b1bf4a9381087043db2876d",
            "test": "6f1fe2054a940eebfc76b284b09680763b37f5ea",
        },
    ),
    "wikitext-103-v1": Edition(
        Published(
            "wikitext-103-v1.zip",
            (f"{SMERITY}/wikitext-103-v1.zip",),
            "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
            num_bytes=190_229_076,
        ),
        LINES_103,
        {
            "train": "b7497e2dfe77e72cfef5e3dbc61b7b53712ac211",
            "valid": "c326ac59dc587676d58c422eb8a03e119582f92b",
            "test": "8a5befc548865cec54ed4273cf87dbbad60d1e47",
        },
    ),
    "wikitext-103-raw-v1": Edition(
        Published(
            "wikitext-103-raw-v1.zip",
            (
                f"{SMERITY}/wikitext-103-raw-v1.zip",
                f"{FACE}/mattdangerw/wikitext-103-raw/resolve/main/wikitext-103-raw-v1.zip",
            ),
            "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
            num_bytes=191_984_949,
        ),
        LINES_103,
        {
            "train": "3d06627c15e834408cfee91293f862c11c1cc9ef",
            "valid": "db78d4db83700cba1b1bf4a9381087043db2876d",
            "test": "6f1fe2054a940eebfc76b284b09680763b37f5ea",
        },
    ),
}


class WikitextConfig(SourceConfig):
    """Options of WikiText; each article is a document, and perplexity is reported per word of the original text."""

    source: Literal["wikitext"] = "wikitext"
    name: Literal["wikitext-2", "wikitext-103"]
    """Which of the two; validation and test texts are the same articles."""
    raw: bool = False
    """False for the tokens of the published figures (rare words are ``<unk>``), true for the text before that."""
    path: Path | None = None
    """The zip archive, a folder with ``wiki.train.tokens`` (``.raw``) and so on, a folder of the hub's parquet files,
    or one file with the training text; without it the text is downloaded once."""
    valid_path: Path | None = None
    """The file with the validation text, if ``path`` holds none or another one is meant."""
    test_path: Path | None = None
    """The file with the test text, if ``path`` holds none or another one is meant."""
    valid_fraction: float | None = Field(None, gt=0.0, lt=1.0)
    """Share of the training text that validates instead, in whole articles, if ``path`` holds no validation text."""
    test_fraction: float | None = Field(None, gt=0.0, lt=1.0)
    """Share of the training text that tests instead (its end), if ``path`` holds no test text."""
    test: bool = True
    """Whether there is a test split; false if ``path`` holds none."""
    allow_piece: bool = False
    """Whether a text may have fewer (or more) lines than the published one."""

    @property
    def edition(self) -> str:
        """Its name on the hub: ``wikitext-2-raw-v1``."""
        return f"{self.name}-raw-v1" if self.raw else f"{self.name}-v1"

    @property
    def suffix(self) -> str:
        """How its files end."""
        return "raw" if self.raw else "tokens"

    @model_validator(mode="after")
    def _settings_have_effect(self) -> WikitextConfig:
        pieces = ("valid_path", "test_path", "valid_fraction", "test_fraction", "allow_piece")
        chosen = [name for name in pieces if getattr(self, name)]
        if self.path is None and chosen:
            raise ValueError(f"{', '.join(chosen)}: has no effect on the downloaded text, which is whole; set path too")
        for split in ("valid", "test"):
            if getattr(self, f"{split}_path") is not None and getattr(self, f"{split}_fraction") is not None:
                raise ValueError(f"{split}_path and {split}_fraction exclude each other; remove either")
        if not self.test and (self.test_path is not None or self.test_fraction is not None):
            raise ValueError("test_path and test_fraction have no effect with test: false; remove either")
        if (self.valid_fraction or 0.0) + (self.test_fraction or 0.0) >= 1.0:
            raise ValueError("valid_fraction + test_fraction must be below 1, the rest is for training")
        return self


@dataclass(frozen=True)
class _Text:
    """The text of one split: where it lies, and how to read it."""

    name: str
    paths: tuple[Path, ...]
    read: Callable[[], Iterator[bytes]]


@register_source("wikitext", WikitextConfig)
class WikitextSource(TextSource):
    """WikiText in any of the forms in which it is passed on, always byte for byte as in the original archive."""

    config: WikitextConfig

    def files(self, cache: Path) -> Sequence[Path]:
        """Returns the files that are read, or those that will be downloaded."""
        if self.config.path is None:
            rebuilt = list(_rebuilt(cache, self.config).values())
            archive = location(EDITIONS[self.config.edition].archive, cache)
            return rebuilt if all(path.is_file() for path in rebuilt) else [archive]
        return [path for text in self._local().values() for path in text.paths]

    def load(self, cache: Path) -> Corpus:
        """Downloads the text if no path is set, finds its articles, and compares it with the published one."""
        config = self.config
        texts = self._local() if config.path is not None else self._downloaded(cache)
        splits: dict[SplitName, Split] = {}
        for name, text in texts.items():
            found = scan(text.name, text.read())
            self._check(name, text.name, found)
            place = partial(_place, text.name)
            splits[name] = Split(found.num_bytes, text.read, found.article_ends, place)
        if config.valid_fraction is not None or config.test_fraction is not None:
            parts = divided(
                texts["train"].name, splits["train"], config.valid_fraction or 0.0, config.test_fraction or 0.0
            )
            splits = {**splits, **parts}
        return Corpus.read("wikitext", splits, per_word=True)

    def _check(self, split: SplitName, name: str, found: Scan) -> None:
        edition = EDITIONS[self.config.edition]
        if found.sha1 == edition.sha1[split]:
            return
        if self.config.path is None:
            raise DataError(f"{name}: is not the published text (sha1 {found.sha1}); remove it and prepare it again")
        lines = edition.lines[split]
        if found.num_lines != lines and not self.config.allow_piece:
            raise DataError(
                f"{name}: has {found.num_lines:,} lines; the {split} split of {self.config.edition} has {lines:,}. "
                "If a piece is meant, set data.allow_piece=true"
            )
        logger.warning("%s: is not byte for byte the published %s text (sha1 %s)", name, split, found.sha1)

    def _local(self) -> dict[SplitName, _Text]:
        config = self.config
        assert config.path is not None
        path = config.path.expanduser()
        found = _texts_at(path, config)
        for name, other in (("valid", config.valid_path), ("test", config.test_path)):
            if other is not None:
                found[name] = _single(other.expanduser(), f"data.{name}_path")  # type: ignore[index]
        for split, share in (("valid", config.valid_fraction), ("test", config.test_fraction)):
            if share is not None and split in found:
                raise DataError(f"{path}: holds a {split} text, so data.{split}_fraction has no effect; remove it")
        if not config.test:
            found.pop("test", None)
        given: dict[SplitName, bool] = {
            "train": False,
            "valid": config.valid_fraction is not None,
            "test": config.test_fraction is not None or not config.test,
        }
        for split in SPLITS:
            if split not in found and not given[split]:
                raise DataError(
                    f"{path}: holds no {split} text of {config.edition} (wiki.{split}.{config.suffix}); "
                    f"{REMEDIES[split]}"
                )
        used = [one for text in found.values() for one in text.paths if not is_zip(one)]
        if len({one.resolve() for one in used}) < len(used):
            raise DataError(f"{path}: one file serves two splits; give each its own")
        return {split: found[split] for split in SPLITS if split in found}

    def _downloaded(self, cache: Path) -> dict[SplitName, _Text]:
        """Takes the text from the hub, or from a mirror of the archive; both are checked against the same digests."""
        config = self.config
        archive = EDITIONS[config.edition].archive
        rebuilt = _rebuilt(cache, config)
        if not location(archive, cache).is_file():
            try:
                folder = rebuilt["train"].parent
                build_once(folder, partial(_rebuild, config), lambda _: all(one.is_file() for one in rebuilt.values()))
            except DataError as error:
                logger.warning("%s; trying the archive", error)
                try:
                    fetch(archive, cache, "set data.path to it")
                except DataError as second:
                    raise DataError(f"{error}. Nor could the archive be had: {second}") from second
        if all(one.is_file() for one in rebuilt.values()):
            texts = {split: _single(one, "data.path") for split, one in rebuilt.items()}
        else:
            texts = _texts_at(fetch(archive, cache, "set data.path to it"), config)
        return {split: text for split, text in texts.items() if split != "test" or config.test}


def _place(name: str, offset: int) -> str:
    return f"{name}, byte {offset:,}"


def _texts_at(path: Path, config: WikitextConfig) -> dict[SplitName, _Text]:
    """Returns the texts of the edition that lie at ``path``, by split."""
    if path.is_file() and not is_zip(path):
        return {"train": _single(path, "data.path")}
    if not path.exists():
        raise DataError(
            f"{path}: there is no such file or folder; set data.path to {config.edition}.zip, to a folder with "
            f"wiki.train.{config.suffix}, or leave it out to download the text"
        )
    texts: dict[SplitName, _Text] = {}
    for split in SPLITS:
        name = f"wiki.{split}.{config.suffix}"
        members = open_members(path, f"*{name}")
        members = {key: file for key, file in members.items() if key.rpartition("/")[2] == name}
        if len(members) > 1:  # a folder with several editions side by side
            homes = (config.edition, config.edition.removesuffix("-v1"))
            members = {key: file for key, file in members.items() if any(home in key.split("/") for home in homes)}
        if len(members) > 1:
            raise DataError(f"{path}: holds {name} more than once ({', '.join(members)}); name one folder")
        for key, file in members.items():
            texts[split] = _Text(file.name, (path if is_zip(path) else path / key,), file.chunks)
    if texts or path.is_file():
        return texts
    parquet = hub_files(path, config.edition)
    for split, hub_name in HUB_SPLITS.items():
        if hub_name in parquet:
            paths = tuple(parquet[hub_name])
            texts[split] = _Text(str(paths[0]), paths, partial(_parquet_lines, paths))
    return texts


def _single(path: Path, key: str) -> _Text:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; set {key} to a text or parquet file")
    if path.suffix == ".parquet":
        return _Text(str(path), (path,), partial(_parquet_lines, (path,)))
    file = StoredFile.at(path)
    return _Text(file.name, (path,), file.chunks)


def _parquet_lines(paths: Sequence[Path]) -> Iterator[bytes]:
    return in_chunks(line for path in paths for line in lines_of_rows(str(path), read_rows(path, columns=["text"])))


def lines_of_rows(name: str, rows: Iterator[tuple[int, Row]]) -> Iterator[bytes]:
    """Yields the lines of the original file, of which the hub keeps one a row, but blank ones as ``""``."""
    return ((text_of(f"{name}: row {number}", row, "text") or " \n").encode() for number, row in rows)


def _rebuilt(cache: Path, config: WikitextConfig) -> dict[SplitName, Path]:
    folder = cache / "downloads" / f"{config.edition}-hub"
    return {split: folder / f"wiki.{split}.{config.suffix}" for split in SPLITS}


def _rebuild(config: WikitextConfig, folder: Path) -> None:
    for split, hub_name in HUB_SPLITS.items():
        path = folder / f"wiki.{split}.{config.suffix}"
        with path.open("wb") as file:
            rows = read_hub(HUB, config.edition, hub_name, REVISION)
            file.writelines(in_chunks(lines_of_rows(f"{HUB}, split {hub_name}", rows)))
        found = scan(str(path), StoredFile.at(path).chunks())
        if found.sha1 != EDITIONS[config.edition].sha1[split]:
            raise DataError(
                f"{HUB} ({config.edition}), split {hub_name}: gives {found.num_bytes:,} bytes with sha1 {found.sha1}, "
                "not the published text"
            )
