"""From a recipe to data: stores, batches of a rank, and what a checkpoint must agree on with them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from smoe_train.checkpoint import Checkpoint
from smoe_train.checkpoint.average import AVERAGE_OF
from smoe_train.data import (
    SOURCES,
    ExampleStore,
    SplitName,
    TaskInfo,
    Tokenizer,
    TokenStore,
    prepare,
    prepare_examples,
)
from smoe_train.data.batches.loader import (
    EvaluationBatches,
    ExampleBatches,
    FixedBlocks,
    Indices,
    PackedDocuments,
    PaddedExamples,
    Samples,
    TrainBatches,
    block_order,
)
from smoe_train.errors import CheckpointError, DataError
from smoe_train.evaluation import TextFigures
from smoe_train.recipe import Recipe
from smoe_train.training.task_config import LanguageModellingConfig, SequenceClassificationConfig

AnyStore = TokenStore | ExampleStore

# The slice of the training split that chooses checkpoints is the same for every seed of a run: seeds compare training.
SELECTION_SEED = 20240

TASK = "classification"  # key of a checkpoint's state
RESUMED = ("train", "optimizer_steps", "score_key")  # keys of it that every version has written

TRAIN_AND_VALID: tuple[SplitName, SplitName] = ("train", "valid")


def prepare_data(recipe: Recipe, tokenizer: Tokenizer | None = None) -> AnyStore:
    """Returns the store of a recipe's data, built if it is not there yet; any number of processes may ask.

    Args:
        recipe: What to prepare.
        tokenizer: A tokenizer at hand, in place of the one that the recipe describes.

    Raises:
        DataError: The data cannot be had.
    """
    make = prepare_examples if SOURCES.get(recipe.data.source).labelled else prepare
    return make(recipe.data, tokenizer or recipe.tokenizer)


def task_state(store: AnyStore) -> dict[str, Any]:
    """Returns what a checkpoint's state says of a classifier's task."""
    return {TASK: asdict(store.task)} if isinstance(store, ExampleStore) else {}


def task_info(store: AnyStore) -> TaskInfo | None:
    """Returns what is asked of a classifier; None for text."""
    return store.task if isinstance(store, ExampleStore) else None


@dataclass(frozen=True)
class Batches:
    """The batches of one rank.

    Attributes:
        train: For training.
        validation: For validation in the course of it.
        scored: How many tokens or examples a validation scores, over all ranks.
        checksum: Of the data that validation uses.
    """

    train: TrainBatches
    validation: EvaluationBatches | ExampleBatches
    scored: int
    checksum: str


def build_batches(recipe: Recipe, store: AnyStore, rank: int, world_size: int) -> Batches:
    """Returns the training and validation batches of a rank.

    Raises:
        DataError: A split is missing or too short for the recipe's batches, or so long that a curriculum over epochs
            has no effect.
    """
    training, length_window = recipe.training, 1
    validation: EvaluationBatches | ExampleBatches
    if isinstance(store, ExampleStore):
        assert isinstance(recipe.task, SequenceClassificationConfig)
        chosen, rest = selection_rows(len(store.split("train")), recipe.task)
        samples: Samples = examples_of(store, "train", recipe, rest)
        slice_ = examples_of(store, "train", recipe, chosen)
        validation = ExampleBatches(slice_, training.micro_batch_size, rank, world_size)
        length_window = 1 if recipe.curriculum.order is not None else recipe.task.length_window
        scored, checksum = len(slice_), store.checksums()["train"]
    else:
        samples = _text_samples(store, recipe)
        validation = text_batches(store, "valid", recipe, rank, world_size, recipe.evaluation.max_tokens)
        scored, checksum = validation.predicted_tokens, store.checksums()["valid"]
    train = TrainBatches(
        samples,
        training.global_batch_size,
        training.micro_batch_size,
        recipe.seed,
        rank,
        world_size,
        recipe.loader.num_workers,
        length_window,
    )
    if recipe.curriculum.order is not None and train.first_step_of(1) >= training.max_steps:
        raise DataError(
            f"curriculum.order: has no effect: training.max_steps {training.max_steps} ends in the first epoch, and "
            f"only later ones are ordered; the {train.num_blocks:,} samples of the training split last "
            f"{train.first_step_of(1):,} steps. Train longer, use less data, or leave it out"
        )
    return Batches(train, validation, scored, checksum)


def selection_rows(num_examples: int, task: SequenceClassificationConfig) -> tuple[Indices, Indices]:
    """Returns the rows of the training split that choose checkpoints, and those that are trained on, both rising.

    Raises:
        DataError: There are too few examples for both.
    """
    count = min(task.selection_examples, max(1, round(num_examples * task.selection_fraction)))
    if count >= num_examples:
        raise DataError(
            f"the training split has {num_examples:,} examples; task.selection_fraction {task.selection_fraction} "
            "leaves none of them to train on"
        )
    order = block_order(num_examples, SELECTION_SEED, 0)
    return np.sort(order[:count]), np.sort(order[count:])


def examples_of(store: ExampleStore, split: str, recipe: Recipe, rows: Indices | None = None) -> PaddedExamples:
    """Returns examples of a split as the recipe's model takes them."""
    return PaddedExamples(store.split(split), recipe.training.sequence_length, store.task.kind, rows)


def _text_samples(store: TokenStore, recipe: Recipe) -> Samples:
    assert isinstance(recipe.task, LanguageModellingConfig)
    tokens, length = store.tokens("train"), recipe.training.sequence_length
    if recipe.task.packing == "blocks":
        return FixedBlocks(tokens, length)
    ends = store.document_ends("train")
    return PackedDocuments(tokens, ends, length, "best_fit" if recipe.task.packing == "best_fit" else "cut")


def text_batches(
    store: TokenStore, split: SplitName, recipe: Recipe, rank: int, world_size: int, max_tokens: int | None
) -> EvaluationBatches:
    """Returns the evaluation batches of a split of text; documents are apart if they are in training.

    Raises:
        DataError: There is no such split, or nothing in it to predict.
    """
    assert isinstance(recipe.task, LanguageModellingConfig)
    ends = None if recipe.task.packing == "blocks" else store.document_ends(split)
    if ends is None and recipe.task.packing != "blocks":
        raise DataError(
            f"the {split} split is one text without known documents, as task.packing {recipe.task.packing} needs; set "
            "it to blocks, or use a source with documents"
        )
    return EvaluationBatches(
        store.tokens(split),
        recipe.training.sequence_length,
        recipe.training.micro_batch_size,
        rank,
        world_size,
        max_tokens,
        ends,
    )


def text_figures(store: TokenStore, split: SplitName) -> TextFigures:
    """Returns what the tokens of a split stand for."""
    tokens, words = len(store.tokens(split)), store.num_words(split)
    return TextFigures(store.num_bytes(split) / tokens, None if words is None else tokens / words)


def identity(recipe: Recipe, store: AnyStore) -> dict[str, Any]:
    """Returns by key everything that a checkpoint must agree on to be resumed."""
    sums = store.checksums()
    more: dict[str, str] = {}
    if isinstance(store, ExampleStore):
        files = store.record.splits["train"]
        more["data (sha256 of its training labels)"] = files.labels.sha256
        more["data (sha256 of the places where its training texts end)"] = files.offsets.sha256
    elif getattr(recipe.task, "packing", "blocks") != "blocks":
        more["data (digest of its texts and documents)"] = sums["corpus"]
    return {
        **recipe.identity(),
        **more,
        "data (sha256 of its training tokens)": sums["train"],
        "tokenizer (fingerprint)": sums["tokenizer"],
    }


def check_identity(recipe: Recipe, store: AnyStore, checkpoint: Checkpoint) -> None:
    """Compares a checkpoint with the run that wants to resume from it.

    An option that the checkpoint does not know, since it is younger, must be at its default.

    Raises:
        CheckpointError: They differ; the message names each key with both values. Or the checkpoint's state lacks
            something that a run needs to go on.
    """
    if AVERAGE_OF in checkpoint.state:
        raise CheckpointError(
            f"{checkpoint.path}: is an average of checkpoints and holds no optimizer state, so no run can be resumed "
            "from it; begin a new one with its weights: initialise.path"
        )
    missing = [key for key in RESUMED if key not in checkpoint.state]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path}: its state lacks {' and '.join(missing)}, so no run can go on from it; use another one"
        )
    saved, expected = checkpoint.state.get("identity", {}), identity(recipe, store)
    known = {**recipe.with_defaults().identity(), **saved}
    different = [
        f"  {key}: {known.get(key)!r} in the checkpoint, {expected.get(key)!r} now"
        for key in sorted(expected.keys() | saved.keys())
        if expected.get(key) != known.get(key)
    ]
    if different:
        raise CheckpointError(
            f"{checkpoint.path}: belongs to another run; use its recipe, or start anew with another name:\n"
            + "\n".join(different)
        )
