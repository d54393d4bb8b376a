"""``data prepare``, ``verify`` and ``show``: a recipe's data before, and apart from, any training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, islice, pairwise
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from smoe_train.assembly import AnyStore, prepare_data
from smoe_train.cli.progress_bars import shown
from smoe_train.data import ExampleStore, Tokenizer, TokenStore, build_source, default_cache
from smoe_train.data.examples import LabelledCorpus
from smoe_train.data.source import Corpus, LabelledSource, TextSource
from smoe_train.data.stores import example_store, token_store
from smoe_train.data.stores.known_corpora import recall, take_stamp
from smoe_train.data.stores.saved_tokenizer import ready_tokenizer
from smoe_train.errors import DataError
from smoe_train.recipe import Recipe, load_recipe

END_OF_DOCUMENT = "⟨end of document⟩"
CUT = "⟨cut⟩"


def prepare(name_or_path: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Downloads, checks and tokenizes a recipe's data where that has not been done, and prints what there is.

    Raises:
        SmoeError: The recipe is wrong, or the data cannot be had.
    """
    recipe = load_recipe(name_or_path, overrides)
    with shown():
        store = prepare_data(recipe)
    summary = summary_of(store)
    if as_json:
        print(json.dumps(summary, indent=1))
    else:
        _print_summary(summary)


def verify(name_or_path: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Reads source and store anew, whatever is remembered of them, and compares both with the recorded digests.

    Raises:
        DataError: Something differs, or the data has not been prepared.
    """
    recipe = load_recipe(name_or_path, overrides)
    with shown():
        store = find_store(recipe)
        store.verify()
    if as_json:
        print(json.dumps({"store": str(store.folder), "checksums": store.checksums(), "sound": True}, indent=1))
        return
    print(f"{store.folder}: sound")
    for name, digest in store.checksums().items():
        print(f"  {name}: {digest}")


def show(name_or_path: str, overrides: tuple[str, ...], split: str, count: int, as_json: bool) -> None:
    """Prints the first samples of a split, decoded from the tokens that a model sees.

    Raises:
        SmoeError: The recipe is wrong, the data cannot be had, or there is no such split.
    """
    recipe = load_recipe(name_or_path, overrides)
    with shown():
        store = prepare_data(recipe)
    if split not in store.splits:
        raise DataError(f"--split: {store.record.source} has no {split} split; there are: {', '.join(store.splits)}")
    length, tokenizer = recipe.training.sequence_length, store.tokenizer()
    if isinstance(store, ExampleStore):
        made = _examples(store, split, tokenizer, length)
    else:
        made = _texts(store, split, tokenizer, length)
    samples = list(islice(made, count))
    if as_json:
        print(json.dumps({"split": split, "samples": samples}, indent=1))
        return
    for sample in samples:
        print(_example_text(sample) if isinstance(store, ExampleStore) else _text_text(sample))
        print()


def find_store(recipe: Recipe) -> AnyStore:
    """Returns the store of a recipe's data, found by reading the source itself; builds none.

    Raises:
        DataError: There is none, it is incomplete, or the same files hold another text than when they were first read.
    """
    cache, source = default_cache(), build_source(recipe.data)
    known = recall(take_stamp(source, cache), cache)
    assert isinstance(source, TextSource | LabelledSource)
    corpus: Corpus | LabelledCorpus = source.load(cache)
    if known is not None and known != corpus.fingerprint:
        raise DataError(
            f"{corpus.name}: the files hold something else than when they were first read, although size and times are "
            f"the same: digest {corpus.fingerprint} instead of {known}; restore the files"
        )
    tokenizer = ready_tokenizer(recipe.tokenizer, corpus.fingerprint, cache)
    if tokenizer is not None:
        if isinstance(corpus, Corpus):
            folder = token_store.store_folder(corpus.name, corpus.fingerprint, tokenizer, cache)
        else:
            folder = example_store.store_folder(corpus.fingerprint, tokenizer, cache)
        if folder.exists():
            return TokenStore.open(folder) if isinstance(corpus, Corpus) else ExampleStore.open(folder)
    raise DataError(
        f"{corpus.name}: {cache} has no store of this data with this tokenizer: it was not prepared, or its files have "
        "changed since; run `smoe-train data prepare`"
    )


def summary_of(store: AnyStore) -> dict[str, Any]:
    """Returns what a store holds, by split."""
    record = store.record
    found: dict[str, Any] = {
        "store": str(store.folder),
        "source": record.source,
        "corpus": record.corpus,
        "tokenizer": {
            "type": store.tokenizer().config.type,
            "vocab_size": record.vocab_size,
            "fingerprint": record.tokenizer,
        },
    }
    if isinstance(store, TokenStore):
        return found | {"splits": {name: _text_split(store, name) for name in store.splits}}
    return found | {
        "task": store.task.name,
        "splits": {name: _example_split(store, name) for name in store.splits},
        "skipped": dict(store.record.skipped),
    }


def _text_split(store: TokenStore, name: Any) -> dict[str, int | None]:
    ends = store.document_ends(name)
    return {
        "bytes": store.num_bytes(name),
        "words": store.num_words(name),
        "documents": None if ends is None else len(ends),
        "tokens": len(store.tokens(name)),
        "unknown": store.record.splits[name].unknown,
    }


def _example_split(store: ExampleStore, name: str) -> dict[str, Any]:
    split, task = store.split(name), store.task
    lengths, labels = np.diff(split.offsets[::2]), np.asarray(split.labels)
    published = labels[~np.isnan(labels)]
    found: dict[str, Any] = {
        "examples": len(split),
        "tokens": int(lengths.sum()),
        "longest": int(lengths.max()),
        "without_label": len(labels) - len(published),
    }
    if task.kind == "classification":
        counts = np.bincount(published.astype(np.int64), minlength=len(task.labels))
        return found | {"labels": dict(zip(task.labels, counts.tolist(), strict=True))}
    if not len(published):
        return found | {"labels": None}
    extent = {"low": published.min(), "mean": published.mean(), "high": published.max()}
    return found | {"labels": {name: round(float(value), 4) for name, value in extent.items()}}


def _print_summary(summary: dict[str, Any]) -> None:
    tokenizer, splits = summary["tokenizer"], summary["splits"]
    columns = [
        key for key in next(iter(splits.values())) if key != "labels" and any(row[key] for row in splits.values())
    ]
    table = Table("split", *(Column(key.replace("_", " "), justify="right") for key in columns))
    table.title = f"{summary['source']}, tokenizer {tokenizer['type']} with {tokenizer['vocab_size']:,} ids"
    table.add_column(
        "labels" if "task" in summary else "bytes a token", justify="left" if "task" in summary else "right"
    )
    for name, row in splits.items():
        last = _labels(row["labels"]) if "task" in summary else f"{row['bytes'] / row['tokens']:.2f}"
        table.add_row(name, *("-" if row[key] is None else f"{row[key]:,}" for key in columns), last)
    Console().print(table)
    for reason, rows in summary.get("skipped", {}).items():
        print(f"skipped, {reason}: {rows:,} row{'s' * (rows != 1)}")
    print(f"store: {summary['store']}")


def _labels(labels: dict[str, float] | None) -> str:
    """Returns the rows of each class (of many classes, of the rarest and the commonest), or the extent of a number."""
    if labels is None or not any(labels.values()):
        return "-"
    names = (
        list(labels) if len(labels) <= 6 else [min(labels, key=labels.__getitem__), max(labels, key=labels.__getitem__)]
    )
    lines = [f"{name}: {labels[name]:,}" for name in names]
    return "\n".join(lines if len(labels) <= 6 else [f"{len(labels)} classes, of which", *lines])


def _texts(store: TokenStore, split: Any, tokenizer: Tokenizer, length: int) -> Iterator[dict[str, Any]]:
    """Yields documents, cut to ``length`` tokens, or blocks of so many where the source knows no documents."""
    tokens, ends = store.tokens(split), store.document_ends(split)
    borders = range(0, len(tokens) + length, length) if ends is None else chain([0], map(int, ends))
    for start, end in pairwise(borders):
        stop = min(end, start + length, len(tokens))
        yield {
            "first_token": start,
            "tokens": min(end, len(tokens)) - start,
            "shown_tokens": stop - start,
            "text": tokenizer.decode(tokens[start:stop].tolist()),
            "ends_document": None if ends is None else stop == end,
        }


def _examples(store: ExampleStore, name: str, tokenizer: Tokenizer, length: int) -> Iterator[dict[str, Any]]:
    split, task = store.split(name), store.task
    if length < split.smallest_max_tokens:
        least = split.smallest_max_tokens
        raise DataError(f"training.sequence_length: {length} is too short for an example, which takes {least} or more")
    for row in range(len(split)):
        start, middle, end = split.offsets[2 * row : 2 * row + 3].tolist()
        label = float(split.labels[row])
        seen = split.tokens_of(row, length).tolist()
        separators = len(split.separator_ids) * (2 if split.pairs else 1)
        yield {
            "index": int(split.index[row]),
            "first": tokenizer.decode(split.texts[start:middle].tolist()),
            "second": tokenizer.decode(split.texts[middle:end].tolist()) if split.pairs else None,
            "label": None if np.isnan(label) else task.labels[int(label)] if task.labels else label,
            "tokens": end - start + separators,
            "pieces": [tokenizer.decode([one]) for one in seen],
            "ids": seen,
        }


def _text_text(sample: dict[str, Any]) -> str:
    rest = sample["tokens"] - sample["shown_tokens"]
    mark = f"{CUT} {rest:,} more tokens" if rest else END_OF_DOCUMENT if sample["ends_document"] else ""
    first, last = sample["first_token"], sample["first_token"] + sample["tokens"]
    return f"tokens {first:,} to {last:,}\n{printable(sample['text'])}{mark}"


def _example_text(sample: dict[str, Any]) -> str:
    texts = [printable(text) for text in (sample["first"], sample["second"]) if text is not None]
    pieces = "|".join(printable(piece).replace("\n", "\\n") for piece in sample["pieces"])
    cut = sample["tokens"] - len(sample["ids"])
    mark = f" {CUT} {cut:,} more tokens" if cut else ""
    label = "not published" if sample["label"] is None else sample["label"]
    return "\n".join([f"row {sample['index']}, label {label}", *texts, f"{len(sample['ids'])} tokens: {pieces}{mark}"])


def printable(text: str) -> str:
    """Returns a text whose control characters a terminal would not obey; newlines and tabs stay."""
    return "".join(one if one in "\n\t" or one.isprintable() else one.encode("unicode_escape").decode() for one in text)
