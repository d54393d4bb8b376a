"""``validate``: a recipe's layout and cost before anything runs; no accelerator is touched."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from smoe_train.parallel.footprint import Activations, Footprint, contest_bytes, footprint
from smoe_train.parallel.topology import Topology, valid_expert_parallel_sizes
from smoe_train.recipe import Recipe, load_recipe
from smoe_train.training.task_config import LanguageModellingConfig

if TYPE_CHECKING:
    from smoe_train.model import SmoeConfig

# The self-test of `validate` runs here alone; a run itself tests its own topology.
ONE_PROCESS = (
    "parallel.engine=local",
    "parallel.expert_parallel_size=1",
    "parallel.precision=fp32",
    "training.self_test=true",
    "curriculum.order=null",  # has no part in the first step
)


def validate(name_or_path: str, overrides: tuple[str, ...], nproc: int, self_test: bool, as_json: bool) -> None:
    """Prints the plan of a recipe on ``nproc`` processes, after a self-test if asked for.

    Raises:
        RecipeError: Something is wrong; every mistake is listed.
        CheckFailedError: The self-test found something that would train wrongly.
    """
    recipe = load_recipe(name_or_path, overrides, nproc)
    tested = None
    if self_test:
        one_micro_batch = f"training.global_batch_size={recipe.training.micro_batch_size}"
        tested = rehearse(load_recipe(name_or_path, (*overrides, *ONE_PROCESS, one_micro_batch)))
    if as_json:
        print(json.dumps(plan_of(recipe, nproc) | ({} if tested is None else {"self_test": tested}), indent=1))
        return
    show(recipe, nproc)
    if tested is not None:
        moe = f", the experts of {len(tested['moe_layers'])} layers change in the first step"
        print(
            f"self-test passed, in one process in fp32: {', '.join(tested['losses'])} train what they should and "
            f"nothing else, {tested['parameters_in_optimizer']} parameters are in one optimizer group each"
            f"{moe if tested['moe_layers'] else ''}"
        )
        if tested["not_judged"]:
            print(f"0 on this micro-batch, so not judged: {', '.join(tested['not_judged'])}")


def rehearse(recipe: Recipe) -> dict[str, Any]:
    """Runs the self-test and the first optimizer step of a recipe in this process and keeps nothing of it.

    Raises:
        CheckFailedError: Something would train wrongly.
        DataError: The data cannot be read.
    """
    from smoe_train.assembly import build_trainer, start_process

    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(recipe, start_process(recipe), Path(folder))
        trainer.rehearsal = True
        trainer.train()
        losses = {name for router in trainer.model.routers().values() for name in router.losses_of(router.config)}
        return {
            "losses": ["task", *sorted(losses)],
            "not_judged": trainer.not_judged,
            "parameters_in_optimizer": sum(parameter.requires_grad for parameter in trainer.model.parameters()),
            "moe_layers": list(trainer.model.routers()),
        }


def plan_of(recipe: Recipe, nproc: int) -> dict[str, Any]:
    """Returns layout, parameter counts, and memory and traffic of one rank."""
    from smoe_train.model import SmoeConfig
    from smoe_train.model.accounting import census, forward_flops

    training, moe, parallel = recipe.training, recipe.model.moe, recipe.parallel
    config = SmoeConfig.create(recipe.model, vocab_size_of(recipe), training.sequence_length, recipe.seed)
    language_model = isinstance(recipe.task, LanguageModellingConfig)
    counts = census(config, recipe.initialise.freeze, language_model)
    frozen_experts = counts.experts if "experts" in recipe.initialise.freeze else 0
    layers = recipe.model.moe_layers()
    topology = Topology.create(nproc, parallel.expert_parallel_size, moe.num_experts)
    k_values = recipe.schedule().top_k_values()
    most = max(k_values)
    visited = sorted(k_values | ({1} if moe.router.varies_experts() else set())) if layers else [0]
    tokens = training.global_batch_size * training.sequence_length // nproc
    accumulation_steps = training.global_batch_size // (training.micro_batch_size * nproc)
    cost: Footprint = footprint(
        parallel,
        nproc,
        counts.experts - frozen_experts,
        counts.trainable - (counts.experts - frozen_experts),
        counts.frozen - frozen_experts + frozen_experts // parallel.expert_parallel_size,
        tokens,
        recipe.model.d_model,
        len(layers),
        most,
        activations_of(recipe, config, most),
        accumulation_steps,
    )
    contest = {}
    if layers and moe.router.competes():
        element = 2 if parallel.precision == "bf16" else 4
        size = parallel.expert_parallel_size
        sent = contest_bytes(tokens, recipe.model.d_model, moe.num_experts, most, size, element)
        contest = {"contest_bytes_per_layer_and_step": sent}
    return {
        "name": recipe.name,
        "processes": nproc,
        "moe_layers": list(layers),
        "experts_of_rank": {rank: _span(topology.experts_of_rank(rank)) for rank in range(nproc)} if layers else {},
        "valid_expert_parallel_sizes": valid_expert_parallel_sizes(nproc, moe.num_experts) if layers else [1],
        "parameters": counts.to_json(),
        "tokens_per_step": training.global_batch_size * training.sequence_length,
        "accumulation_steps": accumulation_steps,
        "top_k_in_training": sorted(k_values),
        "forward_flops_per_token": {
            k: forward_flops(config, k, training.sequence_length, language_model) for k in visited
        },
        "curriculum": recipe.schedule().outline(),
        "bytes_per_rank": {**cost.to_json(), **contest},
    }


def activations_of(recipe: Recipe, config: SmoeConfig, top_k: int) -> Activations:
    """Returns what decides the activations of a micro-batch, with ``top_k`` the most experts a token."""
    model, training = recipe.model, recipe.training
    return Activations(
        tokens=training.micro_batch_size * training.sequence_length,
        d_model=model.d_model,
        layers=model.num_layers,
        moe_layers=len(model.moe_layers()),
        top_k=top_k,
        d_ff=config.d_ff,
        d_ff_expert=model.moe.d_ff,
        feed_forward=model.feed_forward,
        vocab_size=config.vocab_size if isinstance(recipe.task, LanguageModellingConfig) else 0,
        rotary=model.positions == "rotary",
        rms_norm=model.norm == "rms_norm",
        dropout=model.dropout > 0.0,
        recompute=training.activation_checkpointing,
        logits_chunk_tokens=recipe.performance.logits_chunk_tokens,
    )


def vocab_size_of(recipe: Recipe) -> int:
    """Returns the number of token ids; the data is prepared only where it alone decides it.

    Raises:
        DataError: A file of the tokenizer or the data cannot be had.
    """
    from smoe_train.data import build_tokenizer

    if not recipe.tokenizer.learns():
        return build_tokenizer(recipe.tokenizer).vocab_size
    nominal = recipe.tokenizer.nominal_vocab_size()
    if nominal is not None:
        return nominal
    from smoe_train.assembly import prepare_data

    return prepare_data(recipe).vocab_size


def _span(experts: range) -> list[int]:
    return [experts.start, experts.stop - 1]


def show(recipe: Recipe, nproc: int) -> None:
    """Prints the plan of a recipe that has been checked."""
    plan, console = plan_of(recipe, nproc), Console()
    parameters, cost = plan["parameters"], plan["bytes_per_rank"]
    table = Table("", "", title=f"{recipe.name}: valid", show_header=False)
    table.add_row("router", f"{recipe.model.moe.router.type}, k = {_ints(plan['top_k_in_training'])} in training")
    table.add_row("MoE layers", f"{_ints(plan['moe_layers']) or 'none'} of {recipe.model.num_layers} layers")
    for key in ("total", "active", "trainable", "frozen", "experts", "routers"):
        table.add_row(f"parameters, {key}", f"{parameters[key]:,}")
    for k, flops in plan["forward_flops_per_token"].items():
        visited = f", {k} expert{'s' * (k > 1)}" if k else ""
        table.add_row(f"forward FLOPs a token{visited}", f"{flops:,.0f}")
    table.add_row("processes", f"{plan['processes']}, expert-parallel size {recipe.parallel.expert_parallel_size}")
    table.add_row("valid expert-parallel sizes", _ints(plan["valid_expert_parallel_sizes"]))
    tokens = f"{plan['tokens_per_step']:,} in {plan['accumulation_steps']} micro-batch(es) a rank"
    table.add_row("tokens a step", tokens)
    for key, label in (
        ("weights_bytes", "weights"),
        ("gradients_bytes", "gradients"),
        ("optimizer_bytes", "optimizer state"),
        ("reduction_buffer_bytes", "gradient reduction buffer"),
        ("model_state_bytes", "all of these"),
        ("activation_bytes", "activations (estimate)"),
        ("peak_bytes", "at the peak (estimate)"),
    ):
        table.add_row(f"memory a rank, {label}", _size(cost[key]))
    table.add_row("all-to-all a rank and step, sent", _size(cost["all_to_all_bytes_per_step"]))
    if "contest_bytes_per_layer_and_step" in cost:
        sent = _size(cost["contest_bytes_per_layer_and_step"])
        table.add_row("a contest of one layer, a rank and step, sent", sent)
    console.print(table)
    if plan["curriculum"]:
        curriculum = Table(*plan["curriculum"][0], title="curriculum")
        for row in plan["curriculum"]:
            curriculum.add_row(*(f"{value:g}" for value in row.values()))
        console.print(curriculum)
    if plan["experts_of_rank"]:
        experts = Table("rank", "experts (global ids, in each MoE layer)")
        for rank, (first, last) in plan["experts_of_rank"].items():
            experts.add_row(str(rank), f"{first} to {last}" if last > first else str(first))
        console.print(experts)


def _ints(values: list[int]) -> str:
    if len(values) > 2 and values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(str(value) for value in values)


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
