"""Tokenizers on disk: saved whole beside the data and the models that they belong to, and learnt once.

A saved tokenizer is a flat folder: ``smoe_tokenizer.json`` says what it is, the other files are the tokenizer's own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from smoe_train.bounded import MAX_JSON_BYTES, read_bounded
from smoe_train.config import StrictModel
from smoe_train.data.stores.build_once import build_once
from smoe_train.data.tokenizer import TOKENIZERS, Tokenizer, TokenizerConfig, TrainingText
from smoe_train.data.tokenizers.pieces import placed
from smoe_train.durable import flush
from smoe_train.errors import DataError
from smoe_train.registry import UnknownNameError

RECORD = "smoe_tokenizer.json"
FOLDER = "tokenizer"

# A record cannot point out of its folder.
FlatName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class TokenizerRecord(StrictModel):
    """The contents of ``smoe_tokenizer.json``."""

    type: str
    fingerprint: str
    vocab_size: int = Field(gt=0)
    config: dict[str, Any]
    files: list[FlatName]


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a tokenizer to ``folder``, which is complete or as it was whatever happens.

    Args:
        tokenizer: What to save.
        folder: Is created with its parents; an empty one, or one of a saved tokenizer, is replaced.

    Raises:
        DataError: The folder holds something else.
        OSError: The folder cannot be written.
    """
    check_replaceable(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        tokenizer.save(partial)
        record = TokenizerRecord(
            type=tokenizer.config.type,
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            config=tokenizer.config.model_dump(mode="json"),
            files=sorted(path.name for path in partial.iterdir()),
        )
        (partial / RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        for path in [*partial.iterdir(), partial]:
            flush(path)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(folder: Path) -> None:
    """Makes sure that saving to ``folder`` destroys nothing but a saved tokenizer.

    Raises:
        DataError: It holds something else.
    """
    if folder.exists() and not (folder / RECORD).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: holds something other than a tokenizer; choose another folder")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Returns the tokenizer that `save_tokenizer` wrote, after making sure that it is the same.

    Raises:
        DataError: It is absent, incomplete or damaged, or this version makes another tokenizer of it.
    """
    record = read_record(folder)
    try:
        entry = TOKENIZERS.get(record.type)
        config = entry.config.model_validate_json(json.dumps(record.config))
    except (UnknownNameError, ValidationError) as error:
        reason = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else error
        raise DataError(f"{folder / RECORD}: cannot be used by this version: {reason}") from error
    tokenizer = entry.tokenizer.load(folder, config)
    if (tokenizer.fingerprint, tokenizer.vocab_size) != (record.fingerprint, record.vocab_size):
        raise DataError(
            f"{folder}: is damaged or was changed: its files make a tokenizer of {tokenizer.vocab_size:,} ids with "
            f"fingerprint {tokenizer.fingerprint[:16]}, and {RECORD} says {record.vocab_size:,} ids with fingerprint "
            f"{record.fingerprint[:16]}; restore the folder, or save the tokenizer again"
        )
    return tokenizer


def read_record(folder: Path) -> TokenizerRecord:
    """Returns what a saved tokenizer's record says, after checking that its files are there.

    Raises:
        DataError: There is no saved tokenizer, or it is damaged or incomplete.
    """
    try:
        record = TokenizerRecord.model_validate_json(read_bounded(folder / RECORD, MAX_JSON_BYTES))
    except OSError as error:
        raise DataError(f"{folder}: holds no saved tokenizer: {RECORD}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DataError(f"{folder / RECORD}: is damaged: {first['msg']}; restore it") from error
    for name in record.files:
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: is missing from the saved tokenizer; restore it")
    return record


def tokenizer_files(folder: Path) -> list[str]:
    """Returns the names of all files of a saved tokenizer, none of them in a subfolder.

    Raises:
        DataError: There is no saved tokenizer, or it is damaged or incomplete.
    """
    return [RECORD, *read_record(folder).files]


def find_saved(path: Path) -> Path:
    """Returns the folder of the saved tokenizer at ``path``, or inside it as runs and checkpoints have it.

    Raises:
        DataError: There is none.
    """
    path = path.expanduser()
    for folder in (path, path / FOLDER):
        if (folder / RECORD).is_file():
            return folder
    raise DataError(
        f"{path}: holds no saved tokenizer (neither {RECORD} nor {FOLDER}/{RECORD}); give a folder that "
        "`smoe-train tokenizer train` wrote, a run folder or a checkpoint"
    )


def learnt_once(config: TokenizerConfig, text: TrainingText, learn: Callable[[], Tokenizer]) -> Tokenizer:
    """Returns the tokenizer that ``learn`` makes of a text, made by one process and read from the cache by all.

    Raises:
        DataError: It cannot be learnt, or the cache cannot be written.
    """
    folder = _learnt_folder(config, text.fingerprint, text.cache)
    with placed(text.split, "train split"):
        build_once(folder, lambda empty: save_tokenizer(learn(), empty), lambda found: _load(found) is not None)
    return load_tokenizer(folder)


def ready_tokenizer(config: TokenizerConfig, fingerprint: str, cache: Path) -> Tokenizer | None:
    """Returns a tokenizer without reading the training text, or None if it has yet to be learnt from that.

    Args:
        config: Its options.
        fingerprint: Digest of the data, as in `TrainingText`.
        cache: Where learnt tokenizers are kept.

    Raises:
        DataError: A file that the options name is missing or damaged.
    """
    if not config.learns():
        return TOKENIZERS.get(config.type).tokenizer.build(config, None)
    return _load(_learnt_folder(config, fingerprint, cache))


def _learnt_folder(config: TokenizerConfig, fingerprint: str, cache: Path) -> Path:
    learner = TOKENIZERS.get(config.type).tokenizer.learner()
    key = hashlib.sha256(f"{config.model_dump_json()}\n{fingerprint}\n{learner}".encode()).hexdigest()
    return cache / "tokenizers" / f"{config.type}-{key[:32]}"


def _load(folder: Path) -> Tokenizer | None:
    try:
        return load_tokenizer(folder)
    except DataError:
        return None
