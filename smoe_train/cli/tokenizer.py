"""``tokenizer train`` and ``show``: learn a tokenizer apart from any run, and look at one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from smoe_train.cli.progress_bars import shown
from smoe_train.data import (
    TOKENIZERS,
    SourceConfig,
    Tokenizer,
    TokenizerConfig,
    TrainingText,
    build_source,
    build_tokenizer,
    default_cache,
    load_tokenizer,
    save_tokenizer,
)
from smoe_train.data.source import Corpus, LabelledSource, StoredFile, TextSource, byte_range, checksum
from smoe_train.data.stores.saved_tokenizer import check_replaceable, find_saved
from smoe_train.errors import DataError, LaunchError
from smoe_train.recipe import load_recipe


def train(
    kind: str | None,
    inputs: Sequence[Path],
    recipe: str | None,
    settings: Mapping[str, Any],
    output: Path,
    as_json: bool,
) -> None:
    """Learns a tokenizer, saves it, and prints what it is.

    Args:
        kind: Its type; None for the recipe's.
        inputs: Files of text to learn from, or none for the training split of the recipe.
        recipe: A recipe, in place of the files.
        settings: Options of the type that were given.
        output: Folder to write.
        as_json: Whether to print JSON.

    Raises:
        LaunchError: The arguments contradict each other.
        SmoeError: The text cannot be had or does not suffice, or the folder cannot be written.
    """
    if bool(inputs) == (recipe is not None):
        raise LaunchError("give either --input (files of text) or --recipe (to learn from its training split)")
    check_replaceable(output)
    described = None if recipe is None else load_recipe(recipe)
    if kind is not None:
        config = _config(kind, settings)
    elif described is None or settings:
        given = " and ".join(map(_option, settings)) or "--input"
        raise LaunchError(f"{given}: needs --type ({', '.join(_learnable())}) to say what is learnt")
    else:
        config = described.tokenizer
        if not config.learns():
            raise LaunchError(f"--recipe {recipe}: its tokenizer {config.type} is not learnt; choose one by --type")
    with shown():
        text = _text_of_files(inputs) if described is None else _text_of(described.data)
        tokenizer = build_tokenizer(config, text)
    try:
        save_tokenizer(tokenizer, output)
    except OSError as error:
        raise LaunchError(f"{output}: cannot be written: {error.strerror}; choose another --output") from error
    found = {"folder": str(output), **describe(tokenizer)}
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print(f"wrote {output}: {config.type} with {tokenizer.vocab_size:,} ids; in a recipe:")
        print(f"tokenizer: {{type: saved, path: {output}}}")


def show(name_or_path: str, overrides: tuple[str, ...], text: str | None, as_json: bool) -> None:
    """Prints what a tokenizer is, and what it makes of a text.

    Args:
        name_or_path: Folder of a saved tokenizer, run or checkpoint; or a recipe, whose tokenizer is learnt if need be.
        overrides: ``key.path=value`` texts for the recipe.
        text: Text to encode, or None.
        as_json: Whether to print JSON.

    Raises:
        SmoeError: There is no tokenizer, or it cannot be read or learnt.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        if overrides:
            raise LaunchError(f"{' '.join(overrides)}: overrides go with a recipe, and {folder} is a folder")
        tokenizer = load_tokenizer(find_saved(folder))
    else:
        recipe = load_recipe(name_or_path, overrides)
        with shown():
            tokenizer = build_tokenizer(recipe.tokenizer, _text_of(recipe.data) if recipe.tokenizer.learns() else None)
    found = describe(tokenizer)
    if text is not None:
        found["text"] = _encoded(tokenizer, text)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    _print(found)


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns type, size, special ids, fingerprint and options of a tokenizer."""
    return {
        "type": tokenizer.config.type,
        "vocab_size": tokenizer.vocab_size,
        "separator_ids": list(tokenizer.separator_ids),
        "end_of_document_id": tokenizer.end_of_document_id,
        "unknown_id": tokenizer.unknown_id,
        "fingerprint": tokenizer.fingerprint,
        "config": tokenizer.config.model_dump(mode="json"),
    }


def _encoded(tokenizer: Tokenizer, text: str) -> dict[str, Any]:
    ids = tokenizer.encode_texts([text])[0]
    decoded = tokenizer.decode(ids)
    return {
        "ids": ids,
        "pieces": [tokenizer.decode([i]) for i in ids],
        "decoded": decoded,
        "lossless": decoded == text,
        "bytes_per_token": len(text.encode("utf-8", "surrogateescape")) / max(1, len(ids)),
    }


def _learnable() -> list[str]:
    return [name for name, entry in TOKENIZERS.items() if entry.config.learns is not TokenizerConfig.learns]


def _config(kind: str, settings: Mapping[str, Any]) -> TokenizerConfig:
    entry = TOKENIZERS.get(kind)
    if kind not in _learnable():
        raise LaunchError(f"--type {kind}: is not learnt; choose one of {', '.join(_learnable())}")
    allowed = [name for name in entry.config.model_fields if name not in ("type", "path")]
    for name in settings:
        if name not in allowed:
            choices = ", ".join(map(_option, allowed))
            raise LaunchError(f"{_option(name)}: has no effect with --type {kind}, whose options are {choices}")
    try:
        return entry.config.model_validate({"type": kind, **settings})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = _option(str(first["loc"][0])) if first["loc"] else "--type"
        raise LaunchError(f"{option}: {first['msg'][0].lower()}{first['msg'][1:]} (got {first['input']!r})") from error


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _text_of_files(paths: Sequence[Path]) -> TrainingText:
    files = [StoredFile.at(path) for path in paths]
    split = byte_range(files, 0, sum(file.num_bytes for file in files), documents=True)
    num_bytes, sha256 = checksum(split.read())
    if not num_bytes:
        raise DataError(f"--input {paths[0]}: holds no text (0 bytes)")
    return TrainingText(split, f"{sha256} in files of {[file.num_bytes for file in files]}", default_cache())


def _text_of(data: SourceConfig) -> TrainingText:
    from smoe_train.data.stores.example_store import training_text

    cache, source = default_cache(), build_source(data)
    assert isinstance(source, TextSource | LabelledSource)
    corpus = source.load(cache)
    split = corpus.splits["train"] if isinstance(corpus, Corpus) else training_text(corpus)
    return TrainingText(split, corpus.fingerprint, cache)


def _print(found: Mapping[str, Any]) -> None:
    console = Console()
    encoded = found.get("text")
    for name, value in found.items():
        if name != "text":
            console.print(f"{name}: {value}", markup=False, highlight=False)
    if encoded is None:
        return
    table = Table("id", "text", title=f"{len(encoded['ids'])} tokens")
    for i, piece in zip(encoded["ids"], encoded["pieces"], strict=True):
        table.add_row(str(i), repr(piece))
    console.print(table)
    outcome = "gives the text back" if encoded["lossless"] else f"gives another text: {encoded['decoded']!r}"
    console.print(f"{encoded['bytes_per_token']:.2f} bytes a token; decoding {outcome}", markup=False, highlight=False)
