"""From a recipe to a run: the one file that sees every room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smoe_train.checkpoint import Checkpoint, CheckpointStore, load_weights, seed_everything
from smoe_train.checkpoint.store import CHECKPOINTS
from smoe_train.data import SplitName, TokenStore, build_tokenizer, prepare
from smoe_train.data.loader import EvaluationBatches, TrainBatches
from smoe_train.errors import CheckpointError, DataError
from smoe_train.model import LocalExpertBank, RankReduction, SmoeConfig, SmoeForCausalLM
from smoe_train.model.expert_bank import BankFactory
from smoe_train.parallel.topology import Topology
from smoe_train.recipe import Recipe
from smoe_train.reporting import Journal
from smoe_train.schedules import Knobs
from smoe_train.training.complexity import ComplexityRecorder, SampleOrder
from smoe_train.training.engine import Engine, LocalEngine
from smoe_train.training.objectives import language_modelling
from smoe_train.training.optimizer import make_optimizer, parameter_groups
from smoe_train.training.self_test import check_optimizer_groups, require
from smoe_train.training.stop import StopRequest
from smoe_train.training.trainer import Trainer

if TYPE_CHECKING:
    from smoe_train.parallel.process import Process


def start_process(recipe: Recipe) -> Process:
    """Returns this process, joined to its peers if the recipe's engine works with peers."""
    from smoe_train.parallel.process import Process

    return Process.alone() if recipe.parallel.engine == "local" else Process.start()


def build_model(recipe: Recipe, vocab_size: int, make_bank: BankFactory = LocalExpertBank) -> SmoeForCausalLM:
    """Returns the recipe's model with its initial values, which depend on the seed alone."""
    config = SmoeConfig.create(recipe.model, vocab_size, recipe.training.sequence_length, recipe.seed)
    return SmoeForCausalLM(config, make_bank)


def expert_banks(recipe: Recipe, process: Process) -> BankFactory:
    """Returns what builds expert banks for this process: DeepSpeed's kind, or experts here alone."""
    if recipe.parallel.engine == "local" or not recipe.model.moe_layers():
        return LocalExpertBank
    from smoe_train.parallel.deepspeed_bank import DeepSpeedExpertBank

    size = recipe.parallel.expert_parallel_size
    topology = Topology.create(process.world_size, size, recipe.model.moe.num_experts)
    return lambda num_experts, make_experts: DeepSpeedExpertBank(topology, process.rank, make_experts)


def build_engine(recipe: Recipe, model: SmoeForCausalLM, process: Process) -> Engine:
    """Returns the recipe's engine around a model."""
    training = recipe.training
    accumulation_steps = training.global_batch_size // (training.micro_batch_size * process.world_size)
    groups = parameter_groups(model, recipe.optimizer)
    require(check_optimizer_groups(model, groups), process.any)
    optimizer = partial(make_optimizer, config=recipe.optimizer)
    if recipe.parallel.engine == "local":
        model.to(process.device)
        return LocalEngine(model, groups, optimizer, accumulation_steps, training.gradient_clipping)
    from smoe_train.parallel.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(
        model,
        groups,
        optimizer,
        recipe.parallel,
        process,
        training.micro_batch_size,
        accumulation_steps,
        training.gradient_clipping,
    )


def build_batches(
    recipe: Recipe, tokens: TokenStore, rank: int, world_size: int
) -> tuple[TrainBatches, EvaluationBatches]:
    """Returns the training and validation batches of a rank.

    Raises:
        DataError: A split is missing or too short for the recipe's batches, or so long that a curriculum over epochs
            has no effect.
    """
    training = recipe.training
    train = TrainBatches(
        tokens.tokens("train"),
        training.sequence_length,
        training.global_batch_size,
        training.micro_batch_size,
        recipe.seed,
        rank,
        world_size,
        recipe.loader.num_workers,
    )
    if recipe.curriculum.order is not None and train.first_step_of(1) >= training.max_steps:
        raise DataError(
            f"curriculum.order: has no effect: training.max_steps {training.max_steps} ends in the first epoch, and "
            f"only later ones are ordered; the {train.num_blocks:,} samples of the training split last "
            f"{train.first_step_of(1):,} steps. Train longer, use less data, or leave it out"
        )
    validation = EvaluationBatches(
        tokens.tokens("valid"),
        training.sequence_length,
        training.micro_batch_size,
        rank,
        world_size,
        recipe.evaluation.max_tokens,
    )
    return train, validation


def build_sample_order(
    recipe: Recipe, batches: TrainBatches, layers: Sequence[int], process: Process
) -> SampleOrder | None:
    """Returns what orders the samples of later epochs by difficulty, if the recipe asks for it."""
    if recipe.curriculum.order is None:
        return None
    recorder = ComplexityRecorder(batches.num_blocks, layers, process.device, process.sum)
    return SampleOrder(recipe.curriculum.order, batches, recorder, process.is_first, process.broadcast_object)


def build_trainer(recipe: Recipe, process: Process, run_folder: Path, stop: StopRequest | None = None) -> Trainer:
    """Returns a trainer at step 0; its journal is added by `open_journal` once it is known where to start."""
    tokens = prepare(recipe.data, recipe.tokenizer)
    training = recipe.training
    batches, validation = build_batches(recipe, tokens, process.rank, process.world_size)
    seed_everything(recipe.seed, process.rank)
    model = build_model(recipe, tokens.record.vocab_size, expert_banks(recipe, process))
    model.model.ranks = RankReduction(process.sum, process.world_size)
    model.recompute_activations(training.activation_checkpointing)
    engine = build_engine(recipe, model, process)
    config, valid_sum = model.config, tokens.checksums()["valid"]
    return Trainer(
        config=training,
        evaluation=recipe.evaluation,
        learning_rate=recipe.learning_rate,
        curriculum=recipe.schedule(),
        checkpoint_every=recipe.checkpoint.every_steps,
        log_every=recipe.reporting.log_every_steps,
        seed=recipe.seed,
        expert_parallel_size=recipe.parallel.expert_parallel_size,
        engine=engine,
        model=model,
        process=process,
        batches=batches,
        validation=validation,
        bytes_per_token={"train": bytes_per_token(tokens, "train"), "valid": bytes_per_token(tokens, "valid")},
        objective=lambda engine, batch, knobs, totals: language_modelling(engine, batch, knobs, config, totals),
        store=CheckpointStore(run_folder / CHECKPOINTS, process, recipe.checkpoint.keep_last),
        journal=None,
        identity=identity(recipe, tokens),
        score_key=[*(recipe.evaluation.top_k or (recipe.model.moe.top_k,)), validation.predicted_tokens, valid_sum],
        sample_order=build_sample_order(recipe, batches, sorted(model.routers()), process),
        stop=stop or StopRequest(),
    )


def open_journal(recipe: Recipe, run_folder: Path, resume_from_step: int | None) -> Journal:
    """Returns the run's journal, continued after a step or begun anew."""
    return Journal(
        run_folder,
        recipe.reporting,
        total_steps=recipe.training.max_steps,
        run_name=recipe.name,
        recipe=recipe.model_dump(mode="json"),
        resume_from_step=resume_from_step,
    )


def build_for_evaluation(recipe: Recipe, process: Process, checkpoint: Checkpoint) -> SmoeForCausalLM:
    """Returns the model of a checkpoint in the recipe's precision, on this process's device, in evaluation mode.

    With more than one process the experts are spread as the recipe says; one process holds them all.
    """
    make_bank = expert_banks(recipe, process) if process.world_size > 1 else LocalExpertBank
    model = build_model(recipe, build_tokenizer(recipe.tokenizer).vocab_size, make_bank)
    load_weights(model, checkpoint)
    for module in model.modules():
        if hasattr(module, "set_deepspeed_parallelism"):
            module.set_deepspeed_parallelism()
    model.model.ranks = RankReduction(process.sum, process.world_size)
    dtype = torch.bfloat16 if recipe.parallel.precision == "bf16" else torch.float32
    model.to(device=process.device, dtype=dtype)
    model.eval()
    return model


def evaluation_knobs(recipe: Recipe, checkpoint: Checkpoint, top_k: int) -> Knobs:
    """Returns what a checkpoint is run with outside training: schedules stand where they stood when it was written."""
    knobs = recipe.schedule().evaluation_knobs(checkpoint.step, top_k)
    return replace(knobs, threshold=checkpoint.state.get("threshold", knobs.threshold))


def bytes_per_token(tokens: TokenStore, split: SplitName) -> float:
    """Returns how many bytes of text a token of a split stands for on average."""
    return tokens.num_bytes(split) / len(tokens.tokens(split))


def identity(recipe: Recipe, tokens: TokenStore) -> dict[str, Any]:
    """Returns by key everything that a checkpoint must agree on to be resumed."""
    return {**recipe.identity(), "data (sha256 of its training tokens)": tokens.checksums()["train"]}


def check_identity(recipe: Recipe, tokens: TokenStore, checkpoint: Checkpoint) -> None:
    """Compares a checkpoint with the run that wants to resume from it.

    An option that the checkpoint does not know, since it is younger, must be at its default.

    Raises:
        CheckpointError: They differ; the message names each key with both values.
    """
    saved, expected = checkpoint.state.get("identity", {}), identity(recipe, tokens)
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


__all__ = [
    "build_batches",
    "build_engine",
    "build_for_evaluation",
    "build_model",
    "build_trainer",
    "bytes_per_token",
    "check_identity",
    "evaluation_knobs",
    "expert_banks",
    "identity",
    "open_journal",
    "start_process",
]
