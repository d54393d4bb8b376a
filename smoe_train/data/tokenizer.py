"""Text to token ids and back: the tokenizer contract and the table of tokenizers.

Each tokenizer is one file in ``tokenizers/``; `saved_tokenizer` keeps them on disk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from smoe_train.config import StrictModel
from smoe_train.data.source import Offsets, Split
from smoe_train.registry import Registry

TokenArray = npt.NDArray[np.unsignedinteger]
TokenDtype = Literal["uint8", "uint16", "uint32"]
T = TypeVar("T", bound="type[Tokenizer]")


class TokenizerConfig(StrictModel):
    """Options of one tokenizer; subclasses add a ``type`` literal, the tag of the recipe's union."""

    type: str

    def learns(self) -> bool:
        """Returns whether the tokenizer is made from the training split, for lack of a file that it is read from."""
        return False

    def nominal_vocab_size(self) -> int | None:
        """Returns the number of ids that learning ends with, or None where the text decides it."""
        return None


@dataclass(frozen=True)
class TrainingText:
    """The training split that a tokenizer may be made from.

    Attributes:
        split: Its text; of labelled data, all texts, one a line.
        fingerprint: Digest of the data that it belongs to.
        cache: Where what is learnt from it is kept.
    """

    split: Split
    fingerprint: str
    cache: Path


class Tokenizer(ABC):
    """Turns bytes into token ids below ``vocab_size`` and back; constructed with its options, then immutable."""

    config: TokenizerConfig

    @classmethod
    @abstractmethod
    def build(cls, config: TokenizerConfig, text: TrainingText | None) -> Tokenizer:
        """Returns the tokenizer that the options describe.

        Args:
            config: Its options.
            text: What to learn from where `TokenizerConfig.learns`; learnt once, then read from the cache.

        Raises:
            DataError: A file is missing or damaged, or there is not enough text.
        """

    @classmethod
    def learner(cls) -> str:
        """Returns the name and version of what learns; after a change of it, tokenizers are learnt anew."""
        return ""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of different ids."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of all that decides which ids a text becomes."""

    @property
    @abstractmethod
    def separator_ids(self) -> tuple[int, ...]:
        """Ids put behind each text of an example, between the two of a pair and at the end; never empty."""

    @property
    def end_of_document_id(self) -> int | None:
        """Id put behind each document of a text, or None if the tokenizer has none."""
        return None

    @property
    def unknown_id(self) -> int | None:
        """Id of what the vocabulary lacks, or None if it lacks nothing."""
        return None

    @abstractmethod
    def encode(
        self, chunks: Iterable[bytes], document_ends: Offsets | None = None
    ) -> Iterator[tuple[TokenArray, bool]]:
        """Yields the ids of a text as 1-D arrays of `dtype`, each with whether a document ends with it.

        Where the text is cut into chunks makes no difference to the ids; a character may lie in two chunks. Documents
        are encoded one by one, each followed by `end_of_document_id`.

        Args:
            chunks: The text.
            document_ends: Ascending byte offsets at which documents end; None takes the text for one document, whose
                end is not marked.

        Raises:
            DataError: The text is not valid UTF-8 and the tokenizer needs it to be; the message gives the byte offset.
        """

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of short texts, such as a prompt or the sentences of examples; nothing is added to them."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of some ids; what is no valid UTF-8 becomes U+FFFD."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes what `load` needs, beside the options, into an existing folder."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, config: TokenizerConfig) -> Tokenizer:
        """Returns the tokenizer that `save` wrote, whatever has become of the files it was first made from.

        Raises:
            DataError: A file is missing or damaged.
        """

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


def build_tokenizer(config: TokenizerConfig, text: TrainingText | None = None) -> Tokenizer:
    """Returns the tokenizer that the options describe; see `Tokenizer.build`."""
    return TOKENIZERS.get(config.type).tokenizer.build(config, text)
