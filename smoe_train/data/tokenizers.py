"""Text to token ids and back: the tokenizer contract, the table of tokenizers, and the byte tokenizer."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from smoe_train.config import StrictModel
from smoe_train.registry import Registry

TokenArray = npt.NDArray[np.unsignedinteger]
TokenDtype = Literal["uint8", "uint16", "uint32"]
T = TypeVar("T", bound="type[Tokenizer]")


class TokenizerConfig(StrictModel):
    """Options of one tokenizer; subclasses add a ``type`` literal, the tag of the recipe's union."""

    type: str


class Tokenizer(ABC):
    """Turns bytes into token ids below ``vocab_size`` and back; constructed with its options, then immutable."""

    def __init__(self, config: TokenizerConfig) -> None:
        self.config = config

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of different ids."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of all that decides which ids a text becomes."""

    @abstractmethod
    def encode(self, chunks: Iterable[bytes]) -> Iterator[TokenArray]:
        """Yields the ids of a text as 1-D arrays of `dtype`.

        Where the text is cut into chunks makes no difference to the ids; a character may lie in two chunks.
        """

    @abstractmethod
    def encode_text(self, text: str) -> list[int]:
        """Returns the ids of a short text, such as a prompt."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of some ids; what is no valid UTF-8 becomes U+FFFD."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes what is needed to encode and decode without the training run into an existing folder."""

    @property
    def dtype(self) -> TokenDtype:
        """The smallest type that holds every id."""
        if self.vocab_size <= 1 << 8:
            return "uint8"
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class TokenizerEntry:
    """A tokenizer: its class and the class of its options."""

    tokenizer: type[Tokenizer]
    config: type[TokenizerConfig]


TOKENIZERS: Registry[TokenizerEntry] = Registry("tokenizer")


def register_tokenizer(name: str, config: type[TokenizerConfig]) -> Callable[[T], T]:
    """Returns a class decorator that adds a tokenizer under ``name``, the value of its ``type`` in recipes."""

    def add(tokenizer: T) -> T:
        TOKENIZERS.register(name)(TokenizerEntry(tokenizer, config))
        return tokenizer

    return add


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Returns the tokenizer that the options belong to."""
    return TOKENIZERS.get(config.type).tokenizer(config)


class BytesConfig(TokenizerConfig):
    """The byte tokenizer has no options."""

    type: Literal["bytes"] = "bytes"


@register_tokenizer("bytes", BytesConfig)
class BytesTokenizer(Tokenizer):
    """Every byte is a token: 256 ids, no special ones, any input is valid."""

    config: BytesConfig

    @property
    def vocab_size(self) -> int:
        """256."""
        return 256

    @property
    def fingerprint(self) -> str:
        """The same for every byte tokenizer."""
        return hashlib.sha256(b"bytes").hexdigest()

    def encode(self, chunks: Iterable[bytes]) -> Iterator[TokenArray]:
        """Yields views of the chunks, uint8."""
        return (np.frombuffer(chunk, dtype=np.uint8) for chunk in chunks)

    def encode_text(self, text: str) -> list[int]:
        """Returns the UTF-8 bytes; bytes that the command line could not decode come back as they were."""
        return list(text.encode("utf-8", "surrogateescape"))

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the bytes read as UTF-8."""
        return bytes(ids).decode("utf-8", "replace")

    def save(self, folder: Path) -> None:
        """Writes the options, which are all there is, to ``bytes_tokenizer.json``."""
        (folder / "bytes_tokenizer.json").write_text(self.config.model_dump_json() + "\n", encoding="utf-8")
