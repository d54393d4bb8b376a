"""Rows of the Hugging Face hub, or of a folder in its layout, through the library ``datasets``."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from smoe_train.data.reading.rows import Row
from smoe_train.errors import DataError

BATCH_ROWS = 1000


def load_hub(name: str, config: str | None, split: str, revision: str | None) -> Any:
    """Returns a ``datasets.Dataset``, downloaded into the hub's own cache (HF_HOME); the one place that imports it.

    Raises:
        DataError: It cannot be had.
    """
    import datasets

    with _reported(name, config, split, revision), contextlib.nullcontext() if Path(name).is_dir() else _reachable():
        return datasets.load_dataset(name, config, split=split, revision=revision)


def read_hub(name: str, config: str | None, split: str, revision: str | None = None) -> Iterator[tuple[int, Row]]:
    """Yields each row of a split with its number from 1; class labels are their ids.

    Args:
        name: Id on the hub ("nyu-mll/glue"), or a folder in its layout.
        config: Name of the configuration, or None if there is only one.
        split: As the hub names it: ``train``, ``validation``, ``test``.
        revision: Commit, tag or branch; None for the newest.

    Raises:
        DataError: It cannot be had; the message says what to do without the hub.
    """
    dataset = load_hub(name, config, split, revision)
    number = 0
    with _reported(name, config, split, revision):
        for batch in dataset.iter(batch_size=BATCH_ROWS):
            columns = list(batch)
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield number, dict(zip(columns, values, strict=True))


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    """Has the library use its cache alone where the hub's name means nothing, instead of half a minute of attempts."""
    import datasets
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT)
    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if not getproxies():  # a proxy may know names that this machine does not
        try:
            socket.getaddrinfo(host.hostname, host.port or 443)
        except OSError:
            datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _reported(name: str, config: str | None, split: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # the library lets through whatever network, file system, arrow and data set raise
        where = f"{name}{f' ({config})' if config else ''}{f' at {revision}' if revision else ''}, split {split}"
        what = (str(error).strip().splitlines() or [""])[0]
        raise DataError(
            f"{where}: cannot be loaded from the hub: {type(error).__name__}: {what[:300]}; without the internet, set "
            "data.path to local files"
        ) from error
