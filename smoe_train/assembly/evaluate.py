"""From a checkpoint to figures: models for evaluation, and the splits of a task that are reported once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smoe_train.assembly.build import build_model, expert_banks
from smoe_train.assembly.data import TASK, examples_of
from smoe_train.checkpoint import Checkpoint, load_weights
from smoe_train.data import ExampleStore, TaskInfo, Tokenizer, load_tokenizer
from smoe_train.data.batches.loader import ExampleBatches
from smoe_train.errors import CheckpointError
from smoe_train.evaluation import ClassifierScore, evaluate_classifier
from smoe_train.evaluation.metrics import constant_baseline
from smoe_train.evaluation.predictions import predictions_file, write_predictions
from smoe_train.evaluation.results import SplitResult, TaskResult
from smoe_train.model import LocalExpertBank, RankReduction, SmoePreTrainedModel
from smoe_train.model.performance import chunk_logits
from smoe_train.recipe import Recipe, tokenizer_of
from smoe_train.schedules import Knobs

if TYPE_CHECKING:
    from smoe_train.parallel.process import Process


def checkpoint_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Returns the tokenizer that a checkpoint's model was trained with.

    Raises:
        CheckpointError: It has none.
        DataError: It is damaged.
    """
    return load_tokenizer(tokenizer_of(checkpoint.path))


def checkpoint_task(checkpoint: Checkpoint) -> TaskInfo | None:
    """Returns what a checkpoint's classifier was trained for; None for a language model."""
    saved = checkpoint.state.get(TASK)
    return None if saved is None else task_from_json(saved)


def task_from_json(values: dict[str, Any]) -> TaskInfo:
    """Returns what `dataclasses.asdict` and JSON have made of a `TaskInfo`."""
    return TaskInfo(**{**values, "labels": tuple(values["labels"]), "metrics": tuple(values["metrics"])})


def build_for_evaluation(recipe: Recipe, process: Process, checkpoint: Checkpoint) -> SmoePreTrainedModel:
    """Returns the model of a checkpoint in the recipe's precision, on this process's device, in evaluation mode.

    With more than one process the experts are spread as the recipe says; one process holds them all.
    """
    make_bank = expert_banks(recipe, process) if process.world_size > 1 else LocalExpertBank
    vocab_size = checkpoint_tokenizer(checkpoint).vocab_size
    model = build_model(recipe, vocab_size, make_bank, checkpoint_task(checkpoint))
    load_weights(model, checkpoint)
    for module in model.modules():
        if hasattr(module, "set_deepspeed_parallelism"):
            module.set_deepspeed_parallelism()
    model.model.ranks = RankReduction(process.sum, process.world_size)
    chunk_logits(model, recipe.performance)
    dtype = torch.bfloat16 if recipe.parallel.precision == "bf16" else torch.float32
    model.to(device=process.device, dtype=dtype)
    model.eval()
    return model


def evaluation_knobs(recipe: Recipe, checkpoint: Checkpoint, top_k: int) -> Knobs:
    """Returns what a checkpoint is run with outside training: schedules stand where they stood when it was written."""
    knobs = recipe.schedule().evaluation_knobs(checkpoint.step, top_k)
    return replace(knobs, threshold=checkpoint.state.get("threshold", knobs.threshold))


def score_examples(
    model: SmoePreTrainedModel,
    recipe: Recipe,
    store: ExampleStore,
    split: str,
    knobs: Sequence[Knobs],
    process: Process,
) -> list[ClassifierScore]:
    """Returns how a classifier does on a split, one score for each way to run it; all ranks call it.

    Raises:
        DataError: There is no such split.
    """
    samples = examples_of(store, split, recipe)
    batches = ExampleBatches(samples, recipe.training.micro_batch_size, process.rank, process.world_size)
    return evaluate_classifier(model, batches, knobs, store.task, samples.labels, process.device, process.sum)


def report_task(
    model: SmoePreTrainedModel,
    recipe: Recipe,
    store: ExampleStore,
    checkpoint: Checkpoint,
    run_folder: Path,
    process: Process,
) -> TaskResult | None:
    """Evaluates the checkpoint that was chosen on all splits but train, once; all ranks call it.

    Predictions of each split go to ``predictions/``.

    Args:
        model: Inside an engine or not; its weights become those of the checkpoint.
        recipe: The run's.
        store: The examples.
        checkpoint: Best on the slice of the training split that chooses.
        run_folder: Where to write.
        process: This process among its peers.

    Returns:
        On the first rank, the figures of the splits with labels; None if there is no such split.

    Raises:
        RunFailedError: The predictions cannot be written.
    """
    load_weights(model, checkpoint)
    top_k = (recipe.evaluation.top_k or (recipe.model.moe.top_k,))[0]
    knobs = evaluation_knobs(recipe, checkpoint, top_k)
    found = []
    for split in store.splits:
        if split == "train":
            continue
        (score,) = score_examples(model, recipe, store, split, [knobs], process)
        examples = store.split(split)
        if process.is_first:
            write_predictions(predictions_file(run_folder, split), store.task, examples.index, score.predictions)
        if score.metrics:
            constant = constant_baseline(store.task, store.split("train").labels, examples.labels)
            found.append(SplitResult(split, score.examples, score.metrics, score.score, constant))
    if not (process.is_first and found):
        return None
    chosen = {"split": "selection", "score": -checkpoint.state["train"]["best_cost"], "step": checkpoint.step}
    return TaskResult(store.task.name, tuple(found), recipe.name, recipe.seed, checkpoint.step, chosen)


def require_kind(recipe: Recipe, checkpoint: Checkpoint, classifier: bool) -> None:
    """Raises CheckpointError if a checkpoint's model is not of the kind that a command works on."""
    if (checkpoint_task(checkpoint) is not None) != classifier:
        kind = "a language model" if classifier else "a classifier"
        wanted = "a classifier; fine-tune it first" if classifier else "a language model"
        raise CheckpointError(f"{checkpoint.path}: is of run {recipe.name}, {kind}; this command needs {wanted}")
