"""Data: sources of text, tokenizers, token stores, batches.

To add a data set, write one file in ``sources/`` (a config with a ``source`` literal, a `Source` under
``@register_source``) and one recipe with ``data: {source: <name>, ...}``. Nothing else changes: the folder is searched,
and the recipe's union is built from what is found.

Only ``loader`` needs torch, so its names are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field

from smoe_train.data.batches.loader_config import LoaderConfig
from smoe_train.data.examples import Example, LabelledCorpus, TaskInfo
from smoe_train.data.source import (
    SOURCES,
    SPLITS,
    Corpus,
    LabelledSource,
    Source,
    SourceConfig,
    SourceEntry,
    Split,
    SplitName,
    TextSource,
    build_source,
    register_source,
)
from smoe_train.data.stores.example_store import ExampleStore, prepare_examples
from smoe_train.data.stores.saved_tokenizer import load_tokenizer, save_tokenizer, tokenizer_files
from smoe_train.data.stores.token_store import TokenStore, default_cache, prepare
from smoe_train.data.tokenizer import (
    TOKENIZERS,
    Tokenizer,
    TokenizerConfig,
    TokenizerEntry,
    TrainingText,
    build_tokenizer,
    register_tokenizer,
)
from smoe_train.data.tokenizers.bytes import BytesConfig
from smoe_train.lazy import lazy_attributes

SOURCES.discover("smoe_train.data.sources")
TOKENIZERS.discover("smoe_train.data.tokenizers")


def _tagged_union(configs: list[type[Any]], tag: str) -> Any:
    # pydantic refuses a discriminator on a union of one.
    return Annotated[Union[tuple(configs)], Field(discriminator=tag)] if len(configs) > 1 else configs[0]  # noqa: UP007


if TYPE_CHECKING:
    from smoe_train.data.batches.loader import IGNORED_LABEL, EvaluationBatches, MicroBatch, TrainBatches, block_order

    AnySourceConfig = SourceConfig
    AnyTokenizerConfig = TokenizerConfig
else:
    AnySourceConfig = _tagged_union([entry.config for _, entry in SOURCES.items()], "source")
    AnyTokenizerConfig = _tagged_union([entry.config for _, entry in TOKENIZERS.items()], "type")

__getattr__ = lazy_attributes(
    __name__, {"batches.loader": ("IGNORED_LABEL", "EvaluationBatches", "MicroBatch", "TrainBatches", "block_order")}
)

__all__ = [
    "IGNORED_LABEL",
    "SOURCES",
    "SPLITS",
    "TOKENIZERS",
    "AnySourceConfig",
    "AnyTokenizerConfig",
    "BytesConfig",
    "Corpus",
    "EvaluationBatches",
    "Example",
    "ExampleStore",
    "LabelledCorpus",
    "LabelledSource",
    "LoaderConfig",
    "MicroBatch",
    "Source",
    "SourceConfig",
    "SourceEntry",
    "Split",
    "SplitName",
    "TaskInfo",
    "TextSource",
    "TokenStore",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerEntry",
    "TrainBatches",
    "TrainingText",
    "block_order",
    "build_source",
    "build_tokenizer",
    "default_cache",
    "load_tokenizer",
    "prepare",
    "prepare_examples",
    "register_source",
    "register_tokenizer",
    "save_tokenizer",
    "tokenizer_files",
]
