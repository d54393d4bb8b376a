"""SentencePiece: subwords learnt from the training split, or of a model file (Kudo & Richardson, arXiv 1808.06226)."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from smoe_train.bounded import read_bounded
from smoe_train.data.stores.saved_tokenizer import learnt_once
from smoe_train.data.tokenizer import Tokenizer, TokenizerConfig, TrainingText, register_tokenizer
from smoe_train.data.tokenizers.pieces import TextTokenizer, text_pieces, well_formed
from smoe_train.errors import DataError

MODEL = "sentencepiece.model"
MAX_MODEL_BYTES = 64 << 20
NEWLINE = "\n"
# SentencePiece writes spaces so, and would take this character for one.
SPACE_MARK = "\u2581"
# Sums over threads come out the same only for the same number of them.
LEARNING_THREADS = 4
SENTENCE_CHARACTERS = 2000
SENTENCE_BYTES = 4 * SENTENCE_CHARACTERS


class SentencePieceConfig(TokenizerConfig):
    """Options of SentencePiece."""

    type: Literal["sentencepiece"] = "sentencepiece"
    path: Path | None = None
    """Model file of SentencePiece; without it, a model is learnt from the training split."""
    vocab_size: int = Field(8000, gt=0)
    """Number of ids to learn, among them 256 bytes with ``byte_fallback``."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """How to learn: by byte-pair encoding (arXiv 1508.07909) or the unigram language model (arXiv 1804.10959)."""
    byte_fallback: bool = True
    """Whether a character that is not learnt becomes its UTF-8 bytes, so that nothing is lost; else ``<unk>``."""
    character_coverage: float = Field(0.9995, ge=0.98, le=1.0)
    """Share of the text's characters that are learnt, the most frequent first."""
    input_sentence_size: int = Field(200_000, gt=0)
    """Learn from so many lines at most, drawn evenly from the training split (parts of 2,000 characters, if longer)."""

    @model_validator(mode="after")
    def _learns_or_reads(self) -> SentencePieceConfig:
        fields = {name: field.default for name, field in type(self).model_fields.items() if name != "path"}
        idle = [name for name, default in fields.items() if getattr(self, name) != default]
        if self.path is not None and idle:
            raise ValueError(f"{', '.join(idle)}: no effect with path, whose model is learnt already; remove either")
        return self

    def learns(self) -> bool:
        """Returns whether no model is given."""
        return self.path is None

    def nominal_vocab_size(self) -> int:
        """Returns the size that is learnt."""
        return self.vocab_size


@register_tokenizer("sentencepiece", SentencePieceConfig)
class SentencePieceTokenizer(TextTokenizer):
    r"""Subwords of a SentencePiece model.

    What is learnt here loses nothing with ``byte_fallback``: text is not normalised, no space is added or removed,
    ``\n`` is a symbol of its own, and U+2581, by which SentencePiece writes spaces, is spelt in bytes. A model file
    does what it was learnt to do, and U+2581 is spelt in bytes if it has them.
    """

    def __init__(self, config: SentencePieceConfig, model: bytes, name: str) -> None:
        from sentencepiece import SentencePieceProcessor

        self.config = config
        self._model = model
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise DataError(
                f"{name}: is not a model of SentencePiece, or is damaged; fetch or learn it again"
            ) from error
        mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._mark_ids = mark if all(map(self._processor.is_byte, mark)) else None
        self._separators = self._find_separators(name)

    @classmethod
    def build(cls, config: TokenizerConfig, text: TrainingText | None) -> Tokenizer:
        """Reads the model file, or learns a model from the training split."""
        assert isinstance(config, SentencePieceConfig)
        if config.path is not None:
            return cls._read(config.path.expanduser(), config)
        assert text is not None, "there is nothing to learn from"
        return learnt_once(config, text, lambda: cls(config, learn(config, text), "the learnt model"))

    @classmethod
    def learner(cls) -> str:
        """The library, whose versions may learn different models."""
        return f"sentencepiece {importlib.metadata.version('sentencepiece')}"

    @property
    def vocab_size(self) -> int:
        """Pieces, bytes and special symbols."""
        return int(self._processor.get_piece_size())

    @property
    def fingerprint(self) -> str:
        """Digest of the model."""
        return hashlib.sha256(b"sentencepiece\n" + self._model).hexdigest()

    @property
    def separator_ids(self) -> tuple[int, ...]:
        """``</s>``; a newline for a model without it."""
        return self._separators

    @property
    def end_of_document_id(self) -> int | None:
        """``</s>``."""
        end = int(self._processor.eos_id())
        return end if end >= 0 else None

    @property
    def unknown_id(self) -> int:
        """``<unk>``."""
        return int(self._processor.unk_id())

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids; a text that spells symbols such as ``</s>`` gets those of its characters."""
        texts = [well_formed(text) for text in texts]
        if self._mark_ids is None or not any(SPACE_MARK in text for text in texts):
            encoded: list[list[int]] = self._processor.encode(texts)
            return encoded
        return [self._encode_marked(text.split(SPACE_MARK), self._mark_ids) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text; special symbols are not shown."""
        return str(self._processor.decode(list(ids)))

    def save(self, folder: Path) -> None:
        """Writes the model."""
        (folder / MODEL).write_bytes(self._model)

    @classmethod
    def load(cls, folder: Path, config: TokenizerConfig) -> Tokenizer:
        """Reads the model."""
        assert isinstance(config, SentencePieceConfig)
        return cls._read(folder / MODEL, config)

    @classmethod
    def _read(cls, path: Path, config: SentencePieceConfig) -> SentencePieceTokenizer:
        try:
            return cls(config, read_bounded(path, MAX_MODEL_BYTES), str(path))
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read: {error.strerror}; give a model file of SentencePiece, or leave the path out "
                "to learn one"
            ) from error

    def _encode_marked(self, parts: Sequence[str], mark_ids: Sequence[int]) -> list[int]:
        encoded: list[list[int]] = self._processor.encode(list(parts))
        for ids in encoded[1:]:
            ids[:0] = mark_ids
        return [i for ids in encoded for i in ids]

    def _find_separators(self, name: str) -> tuple[int, ...]:
        end = self.end_of_document_id
        found = (end,) if end is not None else tuple(self.encode_texts([NEWLINE])[0])
        if not found:
            raise DataError(f"{name}: has neither </s> nor a newline to separate texts by; use another model")
        return found


def learn(config: SentencePieceConfig, text: TrainingText) -> bytes:
    """Returns a model learnt from lines of a text: the same for the same text, options and library.

    Raises:
        DataError: The text has too few different pieces, or too many characters, for the size of the vocabulary.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    options: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "model_type": config.model_type,
        "byte_fallback": config.byte_fallback,
        "character_coverage": config.character_coverage,
        "user_defined_symbols": [NEWLINE],
        "unk_id": 0,
        "eos_id": 1,
        "bos_id": -1,
        "pad_id": -1,
        # Nothing is lost.
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        # SentencePiece's own sampling differs from run to run.
        "input_sentence_size": 0,
        "shuffle_input_sentence": False,
        "num_threads": LEARNING_THREADS,
        "max_sentence_length": SENTENCE_BYTES,
        "minloglevel": 2,
    }
    sample = _sample(_sentences(text), config.input_sentence_size)
    try:
        SentencePieceTrainer.train(sentence_iterator=iter(sample), model_writer=model, **options)
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip() or "the training split has no text"
        raise DataError(
            f"SentencePiece cannot learn {config.vocab_size:,} ids from {len(sample):,} lines: {reason}"
        ) from error
    return model.getvalue()


def _sentences(text: TrainingText) -> Iterator[str]:
    for piece, _ in text_pieces(text.split.read(), text.split.document_ends):
        for line in piece.split(NEWLINE):
            while len(line) > SENTENCE_CHARACTERS:
                cut = line.rfind(" ", 1, SENTENCE_CHARACTERS)
                cut = cut if cut > 0 else SENTENCE_CHARACTERS
                yield line[:cut]
                line = line[cut:]
            if line.strip():
                yield line


def _sample(sentences: Iterator[str], size: int) -> list[str]:
    """Returns an even sample (Vitter's algorithm R), the same for the same sentences, in their order."""
    drawn: list[tuple[int, str]] = []
    generator = random.Random(0)  # noqa: S311
    for number, sentence in enumerate(sentences):
        if number < size:
            drawn.append((number, sentence))
        elif (place := generator.randrange(number + 1)) < size:
            drawn[place] = (number, sentence)
    return [sentence for _, sentence in sorted(drawn)]
