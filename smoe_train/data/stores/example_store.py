"""Labelled examples as token ids on disk, written once and memory-mapped afterwards; the sibling of `token_store`.

Of each split four little-endian files are kept: the ids of all texts one behind the other, where each text begins and
ends, the labels, and the rows' names. Texts are stored whole and without separators: how an example is put together
and cut to length is decided when it is read, so that one store serves every sequence length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import Field

from smoe_train.config import StrictModel
from smoe_train.data import progress
from smoe_train.data.batches.memory_map import ReopensMaps
from smoe_train.data.examples import EXAMPLE_SPLITS, TEST, Example, ExampleSplitName, LabelledCorpus, TaskInfo
from smoe_train.data.source import LabelledSource, SourceConfig, Split, build_source
from smoe_train.data.stores.saved_tokenizer import FOLDER as TOKENIZER_FOLDER
from smoe_train.data.stores.saved_tokenizer import save_tokenizer
from smoe_train.data.stores.store import DataRecord, Store, find_or_build
from smoe_train.data.stores.store_files import (
    FileRecord,
    check_sizes,
    map_array,
    read_record,
    write_arrays,
    write_record,
)
from smoe_train.data.stores.token_store import default_cache
from smoe_train.data.tokenizer import (
    TokenArray,
    Tokenizer,
    TokenizerConfig,
)
from smoe_train.errors import DataError

FORMAT_VERSION = 1
TEXTS_AT_ONCE = 4096

Integers = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]


class SplitRecord(StrictModel):
    """What a store's record says of one split."""

    examples: int = Field(gt=0)
    tokens: FileRecord
    offsets: FileRecord
    labels: FileRecord
    index: FileRecord


class ExampleStoreRecord(DataRecord):
    """The contents of ``store.json``."""

    task: TaskInfo
    pairs: bool
    skipped: dict[str, int]
    separator_ids: tuple[int, ...] = Field(min_length=1)
    splits: dict[ExampleSplitName, SplitRecord]

    def files(self) -> dict[str, FileRecord]:
        """Returns all files of all splits by name."""
        return {
            f"{split}.{kind}.bin": getattr(record, kind)
            for split, record in self.splits.items()
            for kind in ("tokens", "offsets", "labels", "index")
        }


@dataclass(frozen=True)
class ExampleSplit(ReopensMaps):
    """The examples of one split, memory-mapped.

    Attributes:
        texts: Ids of all texts, 1-D: the first text of row 0, its second, the first of row 1 ...
        offsets: int64 [2N + 1]; the first text of row i is ``texts[offsets[2i]:offsets[2i + 1]]``, the second follows.
        labels: float64 [N], class id or number; NaN where it is not published.
        index: int64 [N], what names each row in a submission.
        separator_ids: Ids behind each text.
        pairs: Whether there is a second text.
    """

    texts: TokenArray
    offsets: Integers
    labels: Numbers
    index: Integers
    separator_ids: tuple[int, ...]
    pairs: bool

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.labels)

    @property
    def smallest_max_tokens(self) -> int:
        """The shortest length to which an example can be cut: its separators and one token of each text."""
        return (len(self.separator_ids) + 1) * (2 if self.pairs else 1)

    def lengths(self, max_tokens: int) -> Integers:
        """Returns the number of tokens of each example as `tokens_of` puts it together, int64 [N]."""
        self._check(max_tokens)
        separators = len(self.separator_ids) * (2 if self.pairs else 1)
        whole: Integers = self.offsets[2::2] - self.offsets[:-1:2] + separators
        return np.minimum(whole, max_tokens)

    def tokens_of(self, row: int, max_tokens: int) -> Integers:
        """Returns one example as ids, int64: first text, separator, and for a pair second text, separator.

        One that is too long loses tokens from the end of its longer text, one by one and of equally long ones from
        the second, as ``longest_first`` of the Python tokenizers of transformers does; separators stay.

        Raises:
            DataError: ``max_tokens`` is below `smallest_max_tokens`.
        """
        self._check(max_tokens)
        start, middle, end = self.offsets[2 * row : 2 * row + 3].tolist()
        room = max_tokens - len(self.separator_ids) * (2 if self.pairs else 1)
        first, second = middle - start, end - middle
        if first + second > room:
            # Each text may fill its half (the first the odd token too) and what the other leaves of its own.
            first = min(first, max(room - room // 2, room - second))
            second = room - first
        parts: list[npt.ArrayLike] = [self.texts[start : start + first], self.separator_ids]
        if self.pairs:
            parts += [self.texts[middle : middle + second], self.separator_ids]
        return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])

    def _check(self, max_tokens: int) -> None:
        if max_tokens < self.smallest_max_tokens:
            raise DataError(
                f"{max_tokens} tokens are too few for an example, which needs at least {self.smallest_max_tokens} (its "
                "separators and one token of each text); set a larger sequence length"
            )


@dataclass(frozen=True)
class ExampleStore(Store):
    """The examples of one labelled corpus under one tokenizer.

    Attributes:
        folder: Where they lie.
        record: What they are.
    """

    folder: Path
    record: ExampleStoreRecord

    @classmethod
    def open(cls, folder: Path) -> ExampleStore:
        """Opens a store after checking its record and the size of every file.

        Raises:
            DataError: It is absent, incomplete, damaged, or of another format version.
        """
        record = read_record(ExampleStoreRecord, folder, "an example store", FORMAT_VERSION)
        check_sizes(folder, record.files())
        return cls(folder, record)

    @property
    def task(self) -> TaskInfo:
        """What is asked."""
        return self.record.task

    @property
    def splits(self) -> tuple[ExampleSplitName, ...]:
        """The splits there are."""
        return tuple(name for name in EXAMPLE_SPLITS if name in self.record.splits)

    def split(self, name: str) -> ExampleSplit:
        """Returns a split, memory-mapped.

        Raises:
            DataError: There is no such split.
        """
        if name not in self.record.splits:
            raise DataError(f"{self.record.source} has no {name} split; there are: {', '.join(self.splits)}")
        return ExampleSplit(
            texts=map_array(self.folder / f"{name}.tokens.bin", self.record.dtype),
            offsets=map_array(self.folder / f"{name}.offsets.bin", np.int64),
            labels=map_array(self.folder / f"{name}.labels.bin", np.float64),
            index=map_array(self.folder / f"{name}.index.bin", np.int64),
            separator_ids=self.record.separator_ids,
            pairs=self.record.pairs,
        )

    def files(self) -> dict[str, FileRecord]:
        """Returns the record of each file by name."""
        return self.record.files()

    def split_checksums(self) -> dict[str, str]:
        """Returns the digest of each split's tokens."""
        return {name: self.record.splits[name].tokens.sha256 for name in self.splits}


def prepare_examples(
    source_config: SourceConfig, tokenizer: TokenizerConfig | Tokenizer, cache_root: Path | None = None
) -> ExampleStore:
    """Returns the example store of a source, building it if it is not there yet; any number of processes may ask.

    Args:
        source_config: Options of a labelled source.
        tokenizer: Options of the tokenizer, or a ready one (a checkpoint's own, for evaluation). One that learns is
            given all texts of the training split, one a line.
        cache_root: The cache folder, if not `default_cache`.

    Raises:
        DataError: The examples cannot be had, or the cache cannot be written.
    """
    cache = default_cache() if cache_root is None else cache_root
    source = build_source(source_config)
    assert isinstance(source, LabelledSource), f"{source_config.source} holds running text"
    return find_or_build(
        source,
        lambda: source.load(cache),
        tokenizer,
        cache,
        training_text,
        lambda corpus, made: store_folder(corpus, made, cache),
        write_store,
        ExampleStore.open,
    )


def training_text(corpus: LabelledCorpus) -> Split:
    """Returns all texts of the training split, one a line, for a tokenizer to learn from."""
    rows = corpus.splits.get("train", ())

    def lines() -> Iterator[bytes]:
        for start in range(0, len(rows), TEXTS_AT_ONCE):
            texts = _texts(rows[start : start + TEXTS_AT_ONCE])
            yield "".join(" ".join(text.splitlines()) + "\n" for text in texts).encode()

    return Split(sum(map(len, lines())), lines)


def store_folder(corpus_fingerprint: str, tokenizer: Tokenizer, cache: Path) -> Path:
    """Returns where the store of a corpus and a tokenizer lies."""
    key = f"{FORMAT_VERSION} {corpus_fingerprint} {tokenizer.fingerprint}"
    return cache / "stores" / f"examples-{hashlib.sha256(key.encode()).hexdigest()[:32]}"


def write_store(folder: Path, corpus: LabelledCorpus, tokenizer: Tokenizer) -> None:
    """Writes all files of a store into an empty folder.

    Raises:
        DataError: A training or dev row has no label, a label is none of the task's, or only some rows are pairs.
    """
    pairs = {one.second is not None for rows in corpus.splits.values() for one in rows}
    if len(pairs) != 1:
        raise DataError(f"{corpus.name}: some rows have a second text and some have none; a task has one form")
    splits: dict[ExampleSplitName, SplitRecord] = {}
    for name in EXAMPLE_SPLITS:
        if name in corpus.splits:
            splits[name] = _write_split(folder, name, corpus, tokenizer)
    assert len(splits) == len(corpus.splits), f"{corpus.name} has splits of other names than {EXAMPLE_SPLITS}"
    save_tokenizer(tokenizer, folder / TOKENIZER_FOLDER)
    record = ExampleStoreRecord(
        format_version=FORMAT_VERSION,
        source=corpus.name,
        task=corpus.task,
        pairs=pairs.pop(),
        skipped=dict(corpus.skipped),
        corpus=corpus.fingerprint,
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        dtype=tokenizer.dtype,
        separator_ids=tokenizer.separator_ids,
        splits=splits,
    )
    write_record(folder, record)


def _write_split(folder: Path, name: ExampleSplitName, corpus: LabelledCorpus, tokenizer: Tokenizer) -> SplitRecord:
    rows = corpus.splits[name]
    labels = np.array([np.nan if one.label is None else one.label for one in rows], dtype=np.float64)
    _check_labels(name, labels, corpus)
    ends = [0]

    def ids() -> Iterator[TokenArray]:
        num_bytes = sum(len(text.encode()) for text in _texts(rows))
        with progress.current().task(f"tokenizing {name}", num_bytes) as advance:
            for start in range(0, len(rows), TEXTS_AT_ONCE):
                chunk = rows[start : start + TEXTS_AT_ONCE]
                texts = list(_texts(chunk))
                encoded = iter(tokenizer.encode_texts(texts))
                for one in chunk:
                    for text in (next(encoded), [] if one.second is None else next(encoded)):
                        ends.append(ends[-1] + len(text))
                        yield np.array(text, dtype=tokenizer.dtype)
                advance(sum(len(text.encode()) for text in texts))

    return SplitRecord(
        examples=len(rows),
        tokens=write_arrays(folder / f"{name}.tokens.bin", ids()),
        offsets=write_arrays(folder / f"{name}.offsets.bin", [np.array(ends, dtype=np.int64)]),
        labels=write_arrays(folder / f"{name}.labels.bin", [labels]),
        index=write_arrays(folder / f"{name}.index.bin", [np.array([one.index for one in rows], dtype=np.int64)]),
    )


def _texts(rows: Sequence[Example]) -> Iterator[str]:
    return (text for one in rows for text in (one.first, one.second) if text is not None)


def _check_labels(name: str, labels: Numbers, corpus: LabelledCorpus) -> None:
    task, published = corpus.task, labels[~np.isnan(labels)]
    if not name.startswith(TEST) and len(published) < len(labels):
        row = int(np.flatnonzero(np.isnan(labels))[0])
        raise DataError(f"{corpus.name}: row {row} of the {name} split has no label; only test rows may lack it")
    low, high = (task.low, task.high) if task.kind == "regression" else (0, len(task.labels) - 1)
    wrong = (published < low) | (published > high)
    if task.kind == "classification":
        wrong |= published != np.floor(published)
    if wrong.any():
        raise DataError(
            f"{corpus.name}: the {name} split has the label {published[wrong][0]:g}; {task.name} has {low} to {high}"
        )
