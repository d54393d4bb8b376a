"""A tokenizer that was saved: by ``smoe-train tokenizer train``, or beside a run's model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from smoe_train.data.stores.saved_tokenizer import find_saved, load_tokenizer
from smoe_train.data.tokenizer import Tokenizer, TokenizerConfig, TrainingText, register_tokenizer


class SavedConfig(TokenizerConfig):
    """Options of a saved tokenizer."""

    type: Literal["saved"] = "saved"
    path: Path
    """A folder that ``smoe-train tokenizer train`` wrote, or a run folder, checkpoint or export that holds one."""


@register_tokenizer("saved", SavedConfig)
class SavedTokenizer(Tokenizer):
    """Stands for whatever was saved, which `build` returns; it never exists itself."""

    @classmethod
    def build(cls, config: TokenizerConfig, text: TrainingText | None) -> Tokenizer:
        """Returns the tokenizer in the folder."""
        assert isinstance(config, SavedConfig)
        return load_tokenizer(find_saved(config.path))
