"""Tokenizers of the transformers library, from a folder or from the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from smoe_train.bounded import read_bounded
from smoe_train.data.tokenizer import Tokenizer, TokenizerConfig, TrainingText, register_tokenizer
from smoe_train.data.tokenizers.pieces import TextTokenizer, well_formed
from smoe_train.errors import DataError

# Of a model's folder, what a tokenizer is made from.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "tekken.json",
)
# Says what class the tokenizer has, where `tokenizer_config.json` does not.
MODEL_CONFIG = "config.json"
MAX_BYTES = 256 << 20

# Its ids are part of the fingerprint: a version of the library that splits otherwise makes another tokenizer.
PROBE = (
    "The Tokenizer's  2nd version: naïve café, 12,345.67\n\tfoo_bar(x) != [SEP] <|endoftext|> 東京 🙂 Ünïcödé @-@ don't"
)


class TransformersConfig(TokenizerConfig):
    """Options of a tokenizer of transformers."""

    type: Literal["transformers"] = "transformers"
    path: Path | None = None
    """Folder with the tokenizer's files. Without a configuration, ``vocab.json`` and ``merges.txt`` are taken for
    GPT-2's, ``vocab.txt`` for BERT's, which ignores case if no word in it has a capital."""
    name: str | None = None
    """Id on the hub, such as ``openai-community/gpt2``, instead of ``path``."""
    revision: str | None = None
    """Branch, tag or commit on the hub; needs ``name``."""

    @model_validator(mode="after")
    def _from_one_place(self) -> TransformersConfig:
        if (self.path is None) == (self.name is None):
            raise ValueError("needs either path (a folder) or name (an id on the hub)")
        if self.revision is not None and self.name is None:
            raise ValueError("revision has no effect without name; remove it")
        return self


@register_tokenizer("transformers", TransformersConfig)
class TransformersTokenizer(TextTokenizer):
    """Whatever the library makes of some files.

    Special tokens are never read out of a text: one that spells ``[SEP]`` gets the ids of its characters. Whether
    anything is lost is up to the tokenizer: GPT-2's loses nothing, BERT's loses case, spaces and newlines.
    """

    def __init__(self, config: TransformersConfig, files: Mapping[str, bytes], name: str) -> None:
        self.config = config
        self._files = dict(files)
        self._name = name
        self._tokenizer = _make(self._files, name)
        self._vocab_size = 1 + max(map(int, self._tokenizer.get_vocab().values()))
        self._separators = self._find_separators(name)
        probe = json.dumps([self._vocab_size, self.encode_texts([PROBE])[0]])
        digest = hashlib.sha256(f"transformers\n{probe}\n".encode())
        for file in sorted(self._files):
            digest.update(f"{file} {hashlib.sha256(self._files[file]).hexdigest()}\n".encode())
        self._fingerprint = digest.hexdigest()

    @classmethod
    def build(cls, config: TokenizerConfig, text: TrainingText | None) -> Tokenizer:
        """Reads the folder, or fetches the files from the hub (once; HF_HOME and HF_HUB_OFFLINE are respected)."""
        assert isinstance(config, TransformersConfig)
        return cls._read(config.path.expanduser() if config.path is not None else _fetch(config), config)

    @property
    def vocab_size(self) -> int:
        """The largest id that a text can have, plus one."""
        return self._vocab_size

    @property
    def fingerprint(self) -> str:
        """Digest of the files and of what this version of the library makes of them."""
        return self._fingerprint

    @property
    def separator_ids(self) -> tuple[int, ...]:
        """The separator token; the end-of-text token or a newline for a tokenizer without it."""
        return self._separators

    @property
    def end_of_document_id(self) -> int | None:
        """The end-of-text token; the separator token for a tokenizer without it."""
        end, separator = self._special("eos"), self._special("sep")
        return separator if end is None else end

    @property
    def unknown_id(self) -> int | None:
        """The unknown token, unless it has another meaning (GPT-2's is the end of text)."""
        unknown = self._special("unk")
        return None if unknown in (self._special("eos"), self._special("sep")) else unknown

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids, special tokens neither added nor recognised."""
        if not texts:
            return []
        try:
            encoded: list[list[int]] = self._tokenizer(
                [well_formed(text) for text in texts],
                add_special_tokens=False,
                split_special_tokens=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # a text may be longer than what the tokenizer's own model takes
            )["input_ids"]
        except Exception as error:  # the library raises bare ones where its files contradict each other
            raise DataError(f"{self._name}: cannot make tokens of a text: {error}; restore its files") from error
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text, special tokens spelt out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def save(self, folder: Path) -> None:
        """Writes the files as they were read."""
        for name, data in self._files.items():
            (folder / name).write_bytes(data)

    @classmethod
    def load(cls, folder: Path, config: TokenizerConfig) -> Tokenizer:
        """Reads the files."""
        assert isinstance(config, TransformersConfig)
        return cls._read(folder, config)

    @classmethod
    def _read(cls, folder: Path, config: TransformersConfig) -> TransformersTokenizer:
        try:
            found = {name: read_bounded(folder / name, MAX_BYTES) for name in FILES if (folder / name).is_file()}
            if not _names_class(found, folder) and (folder / MODEL_CONFIG).is_file():
                found[MODEL_CONFIG] = read_bounded(folder / MODEL_CONFIG, MAX_BYTES)
        except OSError as error:
            raise DataError(f"{folder}: cannot be read: {error.strerror}") from error
        if not found.keys() - {MODEL_CONFIG, "tokenizer_config.json", "special_tokens_map.json"}:
            raise DataError(f"{folder}: holds no tokenizer of transformers; it needs one of {', '.join(FILES)}")
        return cls(config, found, str(folder))

    def _special(self, kind: Literal["eos", "sep", "unk"]) -> int | None:
        found = getattr(self._tokenizer, f"{kind}_token_id", None)
        return None if found is None else int(found)

    def _find_separators(self, name: str) -> tuple[int, ...]:
        separator, end = self._special("sep"), self._special("eos")
        found = separator if separator is not None else end
        ids = (found,) if found is not None else tuple(self.encode_texts(["\n"])[0])
        if not ids:
            raise DataError(f"{name}: has neither a separator nor an end token, nor can it write a newline")
        return ids


def _names_class(files: Mapping[str, bytes], folder: Path) -> bool:
    try:
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{folder / 'tokenizer_config.json'}: is not valid JSON: {error}") from error
    return isinstance(config, dict) and "tokenizer_class" in config


def _make(files: Mapping[str, bytes], name: str) -> Any:
    import transformers

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for file, data in files.items():
            (folder / file).write_bytes(data)
        try:
            if MODEL_CONFIG in files or "tokenizer_config.json" in files:
                return transformers.AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
            if "tokenizer.json" in files:
                return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
            if {"vocab.json", "merges.txt"} <= files.keys():
                return transformers.GPT2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
            if "vocab.txt" in files:
                words = files["vocab.txt"].decode("utf-8").split("\n")
                lowercase = not any(word != word.lower() for word in words if not word.startswith("["))
                return transformers.BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=lowercase)
        except Exception as error:  # the library raises whatever its parsers do
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise DataError(f"{name}: transformers cannot make a tokenizer of {', '.join(files)}: {reason}") from error
    raise DataError(f"{name}: {', '.join(files)} alone make no tokenizer; add tokenizer.json or tokenizer_config.json")


def _fetch(config: TransformersConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    assert config.name is not None
    try:
        folder = snapshot_download(
            config.name, revision=config.revision, allow_patterns=[*FILES, MODEL_CONFIG], tqdm_class=None
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"cannot fetch the tokenizer {config.name!r} from the hub: {reason}. Fetch its files elsewhere and set "
            "tokenizer.path to their folder instead of tokenizer.name"
        ) from error
    return Path(folder)
