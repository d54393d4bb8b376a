"""From a recipe to a trainer: model, engine, task and everything else that a run needs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from smoe_train.assembly.data import (
    TRAIN_AND_VALID,
    AnyStore,
    Batches,
    build_batches,
    identity,
    prepare_data,
    task_info,
    task_state,
    text_figures,
)
from smoe_train.checkpoint import (
    Checkpoint,
    CheckpointStore,
    CheckpointWeights,
    ExportedWeights,
    Weights,
    load_initial,
    seed_everything,
)
from smoe_train.checkpoint.folders import CHECKPOINTS
from smoe_train.data import ExampleStore, TaskInfo, Tokenizer, load_tokenizer, tokenizer_files
from smoe_train.data.batches.loader import EvaluationBatches, ExampleBatches, TrainBatches
from smoe_train.errors import CheckpointError, Problem, RecipeError
from smoe_train.model import (
    LocalExpertBank,
    RankReduction,
    SmoeConfig,
    SmoeForCausalLM,
    SmoeForSequenceClassification,
    SmoePreTrainedModel,
)
from smoe_train.model.expert_bank import BankFactory
from smoe_train.model.performance import apply_performance
from smoe_train.parallel.topology import Topology
from smoe_train.recipe import TOKENIZER, Pretrained, Recipe, find_pretrained, initial_checks
from smoe_train.reporting import Journal
from smoe_train.training.alarms import Alarms
from smoe_train.training.complexity import ComplexityRecorder, SampleOrder
from smoe_train.training.engine import Engine, LocalEngine
from smoe_train.training.heap import Heap
from smoe_train.training.optimizer import make_optimizer, parameter_groups
from smoe_train.training.saving import Saver
from smoe_train.training.self_test import check_optimizer_groups, require
from smoe_train.training.stop import StopRequest
from smoe_train.training.task import Classification, LanguageModelling, Task
from smoe_train.training.task_config import LanguageModellingConfig, SequenceClassificationConfig
from smoe_train.training.trainer import Trainer

if TYPE_CHECKING:
    from smoe_train.parallel.process import Process


def start_process(recipe: Recipe) -> Process:
    """Returns this process, joined to its peers if the recipe's engine works with peers."""
    from smoe_train.parallel.process import COLLECTIVE_TIMEOUT, FOREVER, Process

    if recipe.parallel.engine == "local":
        return Process.alone()
    # The watchdog, which knows more of a hang, must be the first to find it.
    hang_seconds = recipe.training.hang_seconds
    if hang_seconds is None or hang_seconds > FOREVER.total_seconds() / 2:
        return Process.start(FOREVER)
    return Process.start(max(COLLECTIVE_TIMEOUT, timedelta(seconds=2 * hang_seconds)))


def build_model(
    recipe: Recipe, vocab_size: int, make_bank: BankFactory = LocalExpertBank, task: TaskInfo | None = None
) -> SmoePreTrainedModel:
    """Returns the recipe's model with its initial values, which depend on the seed alone.

    Args:
        recipe: Describes it.
        vocab_size: Token ids of the tokenizer.
        make_bank: Builds the expert bank of each MoE layer.
        task: What is asked of a classifier; None for a language model.

    Raises:
        RecipeError: It does not fit into memory.
    """
    config = SmoeConfig.create(recipe.model, vocab_size, recipe.training.sequence_length, recipe.seed)
    try:
        if task is None:
            return SmoeForCausalLM(config, make_bank)
        section = recipe.task
        assert isinstance(section, SequenceClassificationConfig)
        config = config.for_classification(task.labels, recipe.causal(), section.pooling, section.dropout)
        return SmoeForSequenceClassification(config, make_bank)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "overflow" in str(error):
            problem = "does not fit into memory; `smoe-train validate` shows its size: make it smaller"
            raise RecipeError([Problem(recipe.name, "model", problem)]) from error
        raise


def pretrained_weights(recipe: Recipe, tokenizer: str) -> Pretrained | None:
    """Returns what lies at ``initialise.path``, if the recipe names it, without reading weights.

    Args:
        recipe: Names the weights.
        tokenizer: Fingerprint of the run's tokenizer.

    Raises:
        CheckpointError: There are none, or they belong to another tokenizer.
        RecipeError: The recipe describes another model; the resolved recipe of a run is not compared when it is read.
    """
    section = recipe.initialise
    if section.path is None:
        return None
    found = find_pretrained(section.path, section.checkpoint)
    problems = [Problem(recipe.name, key, message) for key, message, _ in initial_checks(recipe, found.model)]
    if problems:
        raise RecipeError(problems)
    theirs = load_tokenizer(found.tokenizer).fingerprint
    if theirs != tokenizer:
        raise CheckpointError(
            f"{found.folder}: was trained with another tokenizer (fingerprint {theirs[:16]}) than this run's "
            f"({tokenizer[:16]}), so its embeddings mean other tokens; leave the tokenizer out of the recipe"
        )
    return found


def load_pretrained(model: SmoePreTrainedModel, recipe: Recipe, tokenizer: str) -> None:
    """Loads what `pretrained_weights` finds, if anything, into a model.

    Args:
        model: As built.
        recipe: Names the weights.
        tokenizer: Fingerprint of the run's tokenizer.

    Raises:
        CheckpointError: There are none, or they belong to another model or another tokenizer.
        RecipeError: The recipe describes another model.
    """
    found = pretrained_weights(recipe, tokenizer)
    if found is None:
        return
    weights: Weights
    if found.is_checkpoint:
        checkpoint = Checkpoint.open(found.folder)
        checkpoint.verify()
        weights = CheckpointWeights(checkpoint)
    else:
        weights = ExportedWeights(found.folder)
    load_initial(model, weights, recipe.initialise.router == "new")


def expert_banks(recipe: Recipe, process: Process) -> BankFactory:
    """Returns what builds expert banks for this process: DeepSpeed's kind, or experts here alone."""
    if recipe.parallel.engine == "local" or not recipe.model.moe_layers():
        return LocalExpertBank
    from smoe_train.parallel.deepspeed_bank import DeepSpeedExpertBank, FrozenExpertBank

    size = recipe.parallel.expert_parallel_size
    topology = Topology.create(process.world_size, size, recipe.model.moe.num_experts)
    bank = FrozenExpertBank if "experts" in recipe.initialise.freeze else DeepSpeedExpertBank
    return lambda num_experts, make_experts: bank(topology, process.rank, make_experts)


def build_engine(recipe: Recipe, model: SmoePreTrainedModel, process: Process) -> Engine:
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

    engine = DeepSpeedEngine(
        model,
        groups,
        optimizer,
        recipe.parallel,
        process,
        training.micro_batch_size,
        accumulation_steps,
        training.gradient_clipping,
    )
    process.share_timeout()
    return engine


def build_sample_order(
    recipe: Recipe, batches: TrainBatches, layers: Sequence[int], process: Process
) -> SampleOrder | None:
    """Returns what orders the samples of later epochs by difficulty, if the recipe asks for it."""
    if recipe.curriculum.order is None:
        return None
    recorder = ComplexityRecorder(batches.num_blocks, layers, process.device, process.sum)
    return SampleOrder(recipe.curriculum.order, batches, recorder, process.is_first, process.broadcast_object)


def run_tokenizer(run_folder: Path) -> Tokenizer | None:
    """Returns the tokenizer that a run folder holds since the run was begun, if it does."""
    folder = run_folder / TOKENIZER
    return load_tokenizer(folder) if folder.is_dir() else None


def build_trainer(
    recipe: Recipe,
    process: Process,
    run_folder: Path,
    stop: StopRequest | None = None,
    resumes: bool = False,
) -> Trainer:
    """Returns a trainer at step 0; its journal is added by `open_journal` once it is known where to start.

    Args:
        recipe: What to train.
        process: This process among its peers.
        run_folder: Where checkpoints go.
        stop: Whether the run was asked to stop.
        resumes: Whether a checkpoint of the run will be loaded, so that pretrained weights are not needed.
    """
    store = prepare_data(recipe, run_tokenizer(run_folder))
    training = recipe.training
    batches = build_batches(recipe, store, process.rank, process.world_size)
    seed_everything(recipe.seed, process.rank)
    model = build_model(recipe, store.vocab_size, expert_banks(recipe, process), task_info(store))
    if isinstance(recipe.task, LanguageModellingConfig) and recipe.task.packing != "blocks" and model.looks_back():
        message = f"router {recipe.model.moe.router.type} looks at earlier tokens, also across documents; use blocks"
        raise RecipeError([Problem(recipe.name, "task.packing", message)])
    if not resumes:
        load_pretrained(model, recipe, store.checksums()["tokenizer"])
    model.freeze(recipe.initialise.freeze)
    model.model.ranks = RankReduction(process.sum, process.world_size)
    model.recompute_activations(training.activation_checkpointing)
    notes = apply_performance(model, recipe.performance, process.device.type)
    engine = build_engine(recipe, model, process)
    stop = stop or StopRequest()
    checkpoints = CheckpointStore(run_folder / CHECKPOINTS, process, recipe.checkpoint.keep_last)
    trainer = Trainer(
        config=training,
        evaluation=recipe.evaluation,
        learning_rate=recipe.learning_rate,
        curriculum=recipe.schedule(),
        checkpoint_every=recipe.checkpoint.every_steps,
        log_every=recipe.reporting.log_every_steps,
        seed=recipe.seed,
        engine=engine,
        model=model,
        process=process,
        batches=batches.train,
        task=_build_task(model, store, batches, process, stop),
        store=checkpoints,
        saver=Saver(
            engine,
            process,
            checkpoints,
            recipe.parallel.expert_parallel_size,
            _files(run_folder / TOKENIZER),
            recipe.checkpoint.background,
            recipe.checkpoint.failures_allowed,
        ),
        alarms=Alarms(recipe.health),
        journal=None,
        identity=identity(recipe, store),
        score_key=[*(recipe.evaluation.top_k or (recipe.model.moe.top_k,)), batches.scored, batches.checksum],
        further_state=task_state(store),
        sample_order=build_sample_order(recipe, batches.train, sorted(model.routers()), process),
        stop=stop,
        notes=notes,
        heap=Heap(reuses=process.device.type == "cpu"),
    )
    trainer.saver.note, trainer.saver.best_ended = trainer.note, trainer.best_ended
    return trainer


def _files(tokenizer: Path) -> dict[str, bytes]:
    names = tokenizer_files(tokenizer) if tokenizer.is_dir() else []
    return {name: (tokenizer / name).read_bytes() for name in names}


def _build_task(
    model: SmoePreTrainedModel, store: AnyStore, batches: Batches, process: Process, stop: StopRequest
) -> Task:
    def stopping() -> bool:
        return process.any(stop.requested)

    if isinstance(store, ExampleStore):
        assert isinstance(batches.validation, ExampleBatches)
        samples = batches.validation.samples
        return Classification(
            model, batches.validation, store.task, samples.labels, process.device, process.sum, stopping
        )
    assert isinstance(batches.validation, EvaluationBatches)
    train, valid = (text_figures(store, split) for split in TRAIN_AND_VALID)
    return LanguageModelling(
        model, batches.validation, train.bytes_per_token, valid, process.device, process.sum, stopping
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
