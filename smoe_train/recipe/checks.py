"""Checks between the sections of a recipe: contradictions, and settings that would have no effect.

Each check yields (key, message, further keys that it has read).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smoe_train.config import StrictModel
from smoe_train.data import SOURCES
from smoe_train.parallel.topology import parallel_problems, topology_problem
from smoe_train.recipe.pretrained import options_of_training
from smoe_train.recipe.recipe import Recipe, changeable, flat
from smoe_train.registry import suggest
from smoe_train.routing import ROUTERS
from smoe_train.schedules import CompetitionConfig
from smoe_train.schedules.curriculum import LARGEST_MULTI_STEP
from smoe_train.training.config import TrainingConfig
from smoe_train.training.task_config import SequenceClassificationConfig

Found = list[tuple[str, str, tuple[str, ...]]]


def initial_checks(recipe: Recipe, model: Mapping[str, Any]) -> Found:
    """Returns where the model is another one than the weights at ``initialise.path`` belong to."""
    found: Found = []
    ours, theirs = flat(recipe.model.model_dump(mode="json")), flat({"model": model})
    named = ("initialise.path",)
    new_router = recipe.initialise.router == "new"
    router = recipe.model.moe.router.model_dump(mode="json")
    free = {f"model.moe.router.{name}" for name in options_of_training(router)}
    free |= {"model.max_sequence_length"} if recipe.model.positions == "rotary" else set()
    for name, value in ours.items():
        key = f"model.{name}"
        may_differ = changeable(key) or key in free or (new_router and key.startswith("model.moe.router."))
        if may_differ or theirs.get(key, value) == value:
            continue
        message = f"{value!r}, but the weights of initialise.path belong to a model with {theirs[key]!r}; leave it out"
        if key.startswith("model.moe.router."):
            message += ", or start with new routers: initialise.router=new"
        found.append((key, message, named))
    return found


def cross_check(recipe: Recipe, world_size: int | None) -> Found:
    """Returns (key, message, further keys read) for each contradiction between settings."""
    found: Found = []
    training, model = recipe.training, recipe.model
    shape_keys = ("model.d_model", "model.num_heads", "model.num_layers", "model.moe", "curriculum")
    # A schedule that goes beyond the number of experts is reported once, where it is written.
    k_values = frozenset(k for k in recipe.schedule().top_k_values() if k <= model.moe.num_experts)
    found += [
        (f"model.{key}", message, shape_keys)
        for key, message in model.problems(k_values, training.max_steps, recipe.causal(), recipe.loads_routers())
    ]
    found += _curriculum_checks(recipe) + _task_checks(recipe) + _health_checks(recipe)
    longest = model.max_sequence_length
    if longest is not None and longest < training.sequence_length:
        message = f"{longest} is less than training.sequence_length {training.sequence_length}"
        found.append(("model.max_sequence_length", message, ("training.sequence_length",)))
    excessive = [k for k in recipe.evaluation.top_k if not 1 <= k <= model.moe.num_experts]
    if excessive:
        message = f"{excessive} is outside 1 to num_experts {model.moe.num_experts}"
        found.append(("evaluation.top_k", message, ("model.moe.num_experts",)))
    if recipe.learning_rate.form == "constant" and recipe.learning_rate.final_fraction:
        found.append(("learning_rate.final_fraction", "has no effect with form: constant; leave it out", ()))
    if recipe.learning_rate.warmup_steps >= training.max_steps:
        message = f"{recipe.learning_rate.warmup_steps} leaves no step of training.max_steps {training.max_steps}"
        found.append(("learning_rate.warmup_steps", message, ("training.max_steps",)))
    return found + (_topology_checks(recipe, world_size) if world_size is not None else [])


def _task_checks(recipe: Recipe) -> Found:
    found: Found = []
    task, initialise, layers = recipe.task, recipe.initialise, recipe.model.moe_layers()
    labelled = SOURCES.get(recipe.data.source).labelled
    if labelled != isinstance(task, SequenceClassificationConfig):
        holds = "labelled examples" if labelled else "running text"
        wanted = "sequence_classification" if labelled else "language_modelling"
        message = f"{task.type} does not fit data.source {recipe.data.source}, which holds {holds}; use {wanted}"
        found.append(("task.type", message, ("data.source",)))
    if recipe.curriculum.sequence_length is not None and getattr(task, "packing", None) != "blocks":
        message = "needs blocks of text, which can be cut anywhere; use task.packing=blocks, or leave it out"
        found.append(("curriculum.sequence_length", message, ("task",)))
    if isinstance(task, SequenceClassificationConfig):
        if task.attention == "causal" and task.pooling == "first":
            message = "first has seen one token only if task.attention is causal; use last or mean"
            found.append(("task.pooling", message, ("task.attention",)))
        if recipe.evaluation.max_tokens is not None:
            message = "has no effect on classification; use task.selection_examples"
            found.append(("evaluation.max_tokens", message, ("task.type",)))
        if recipe.performance.logits_chunk_tokens is not None:
            message = "has no effect on classification, which has no logits over the vocabulary; leave it out"
            found.append(("performance.logits_chunk_tokens", message, ("task.type",)))
        default = SequenceClassificationConfig.model_fields["length_window"].default
        if recipe.curriculum.order is not None and task.length_window not in (1, default):
            message = "has no effect: curriculum.order says which examples stand together; leave it out"
            found.append(("task.length_window", message, ("curriculum.order",)))
    if initialise.path is None and (initialise.router, initialise.checkpoint) != ("load", "best"):
        found.append(
            ("initialise.path", "is missing: checkpoint and router say what to take from there", ("initialise",))
        )
    idle = [part for part in initialise.freeze if part != "embeddings" and not layers]
    if idle:
        found.append(("initialise.freeze", f"{', '.join(idle)}: the model has no MoE layer", ("model.moe.layers",)))
    if initialise.router == "new" and not layers:
        found.append(("initialise.router", "has no effect: the model has no MoE layer", ("model.moe.layers",)))
    return found


def _health_checks(recipe: Recipe) -> Found:
    found: Found = []
    health, max_steps = recipe.health, recipe.training.max_steps
    spike, collapse = health.loss_spike, health.router_collapse
    idle_with = {"non_finite": "stop", "loss_spike": "off", "router_collapse": "off"}
    changed = {name: _changed(getattr(health, name)) for name in idle_with}
    for name, action in idle_with.items():
        if getattr(health, name).action == action:
            message = f"has no effect with action: {action}; leave it out"
            found += [(f"health.{name}.{key}", message, (f"health.{name}.action",)) for key in changed[name]]
    if not recipe.model.moe_layers() and (changed["router_collapse"] or collapse.action not in ("warn", "off")):
        found.append(("health.router_collapse", "has no effect: the model has no MoE layer", ("model.moe.layers",)))
    if collapse.action != "off" and collapse.dead_experts is collapse.imbalance is collapse.entropy_below is None:
        message = "there is nothing to watch for: dead_experts, imbalance and entropy_below are null; use off"
        found.append(("health.router_collapse.action", message, ("health.router_collapse",)))
    kept = recipe.checkpoint.keep_last * recipe.checkpoint.every_steps
    if collapse.action == "rollback" and kept <= collapse.patience_steps + recipe.reporting.log_every_steps:
        message = (
            f"a collapse is known {collapse.patience_steps} steps after it began (patience_steps), but the checkpoints "
            f"that are kept reach {kept} steps back; raise checkpoint.keep_last or every_steps, or use stop"
        )
        found.append(("health.router_collapse.action", message, ("checkpoint", "reporting")))
    # Steps without an alarm; the defaults may exceed a short run.
    quiet = {("loss_spike", "window_steps"): spike.window_steps // 2 + spike.in_a_row - 1}
    quiet["router_collapse", "patience_steps"] = collapse.patience_steps - 1
    for (section, option), steps in quiet.items():
        if getattr(health, section).action != "off" and option in changed[section] and steps >= max_steps:
            message = f"there is no alarm before training.max_steps {max_steps}: use a smaller one, or action: off"
            found.append((f"health.{section}.{option}", message, ("training.max_steps",)))
    back = [name for name in idle_with if getattr(health, name).action == "rollback"]
    if back and min(recipe.checkpoint.every_steps, recipe.evaluation.every_steps) >= max_steps:
        message = "there is no checkpoint to go back to before training.max_steps; lower checkpoint.every_steps"
        read = ("checkpoint.every_steps", "evaluation.every_steps", "training.max_steps")
        found += [(f"health.{name}.action", message, read) for name in back]
    return found


def _changed(section: StrictModel) -> list[str]:
    """Returns the options of an alarm, beside its action, that are not at their defaults."""
    return [
        name
        for name, field in type(section).model_fields.items()
        if name != "action" and getattr(section, name) != field.default
    ]


def _curriculum_checks(recipe: Recipe) -> Found:
    found: Found = []
    model, training, curriculum = recipe.model, recipe.training, recipe.curriculum
    router, layers = model.moe.router, ("model.moe.layers",)
    named = ("model.moe.router", *layers)
    if not model.moe_layers():
        knobs = ("top_k", "threshold", "competition", "loss_weights", "order")
        idle = [key for key in knobs if getattr(curriculum, key)]
        found += [(f"curriculum.{key}", "has no effect: the model has no MoE layer", layers) for key in idle]
    else:
        if curriculum.threshold is not None and not router.has_threshold():
            message = f"has no effect: router {router.type} with these options has no threshold to schedule"
            found.append(("curriculum.threshold", message, named))
        if curriculum.competition is not None and not router.competes():
            found.append(("curriculum.competition", f"has no effect: router {router.type} has no contest", named))
        if router.competes():
            competition = curriculum.competition or CompetitionConfig()
            for key, message in competition.problems(len(model.moe_layers()), training.max_steps):
                involved = (*named, "model.num_layers", "curriculum.competition", "training.max_steps")
                found.append((f"curriculum.competition.{key}", message, involved))
        varies = router.varies_experts() or (curriculum.threshold is not None and router.has_threshold())
        if curriculum.order is not None and not varies:
            message = f"has no effect: router {router.type} with these options gives all tokens as many experts"
            found.append(("curriculum.order", message, named))
        if curriculum.order is not None and router.competes():
            message = "a contest gives all tokens k experts, so it would count samples of such steps as hard"
            found.append(("curriculum.order", f"{message}; use a router without contests", named))
        losses = sorted(ROUTERS.get(router.type).router.losses_of(router))
        moe = model.moe
        shared = {"load_balance_loss": moe.load_balance_coefficient, "z_loss": moe.z_loss_coefficient}
        coefficients = {**shared, **router.loss_coefficients()}
        for name in curriculum.loss_weights:
            if name not in losses:
                message = f"router {router.type} has no such loss{suggest(name, losses)}"
                found.append((f"curriculum.loss_weights.{name}", message, named))
            elif coefficients.get(name) == 0.0:
                message = "has no effect: it multiplies the coefficient of the loss, which is 0"
                found.append((f"curriculum.loss_weights.{name}", message, ("model.moe",)))
    for key, values in {"threshold": curriculum.threshold, **curriculum.loss_weights}.items():
        key = key if key == "threshold" else f"loss_weights.{key}"
        if values is None:
            continue
        if values.form == "exponential" and (values.first <= 0.0 or values.last <= 0.0):
            found.append((f"curriculum.{key}.form", "exponential needs first and last above 0", ()))
        if values.start_step >= training.max_steps:
            message = f"{values.start_step} is not before training.max_steps {training.max_steps}"
            found.append((f"curriculum.{key}.start_step", message, ("training.max_steps",)))
        if key != "threshold" and min(values.first, values.last) < 0.0:
            found.append((f"curriculum.{key}", "a factor on a coefficient cannot be negative", ()))
        if key == "threshold" and not -1.0 <= min(values.first, values.last) <= max(values.first, values.last) <= 1.0:
            found.append(("curriculum.threshold", "a gap of probabilities lies between -1 and 1", ()))
        elif key == "threshold" and max(values.first, values.last) < 0.0:
            message = "below 0 throughout, no token ever has a second expert; use top_k with k = 1"
            found.append(("curriculum.threshold", message, ()))
    return found + _sample_checks(recipe) + _top_k_checks(recipe)


def _sample_checks(recipe: Recipe) -> Found:
    found: Found = []
    training, order, length = recipe.training, recipe.curriculum.order, recipe.curriculum.sequence_length
    if order is not None and order.window_samples is not None and order.window_samples <= training.global_batch_size:
        message = (
            f"{order.window_samples} orders samples within a step only; "
            f"use more than training.global_batch_size {training.global_batch_size}"
        )
        found.append(("curriculum.order.window_samples", message, ("training.global_batch_size",)))
    if length is not None:
        full = training.sequence_length
        doublings = full // length.low
        if length.low >= full or full % length.low or doublings & (doublings - 1):
            message = f"training.sequence_length {full} is not {length.low} times a power of two above 1"
            found.append(("curriculum.sequence_length.low", message, ("training.sequence_length",)))
    return found


def _top_k_checks(recipe: Recipe) -> Found:
    found: Found = []
    schedule, num_experts = recipe.curriculum.top_k, recipe.model.moe.num_experts
    if schedule is None:
        return found
    if schedule.low > schedule.high:
        found.append(("curriculum.top_k.low", f"{schedule.low} exceeds high {schedule.high}", ()))
    elif schedule.high > num_experts:
        message = f"{schedule.high} exceeds model.moe.num_experts {num_experts}"
        found.append(("curriculum.top_k.high", message, ("model.moe.num_experts",)))
    if schedule.form.startswith("multi_step") and schedule.high > LARGEST_MULTI_STEP:
        message = f"{schedule.high} is never reached: multi_step goes through 1, 2, 4, 8, 16; use another form"
        found.append(("curriculum.top_k.high", message, ("curriculum.top_k.form",)))
    return found


def _topology_checks(recipe: Recipe, world_size: int) -> Found:
    found: Found = []
    training, parallel = recipe.training, recipe.parallel
    num_experts = recipe.model.moe.num_experts
    problem = topology_problem(world_size, parallel.expert_parallel_size, num_experts)
    if problem is not None and recipe.model.moe_layers():
        found.append(("parallel.expert_parallel_size", problem, ("model.moe.num_experts", "model.moe.layers")))
    elif not recipe.model.moe_layers() and parallel.expert_parallel_size > 1:
        found.append(("parallel.expert_parallel_size", "has no effect: the model has no MoE layer", ("model.moe",)))
    found += [(f"parallel.{key}", message, ("parallel",)) for key, message in parallel_problems(parallel, world_size)]
    together = world_size * training.micro_batch_size
    if training.global_batch_size % together:
        message = (
            f"{training.global_batch_size} is not a multiple of {together} = {world_size} processes x "
            f"training.micro_batch_size {training.micro_batch_size}; {_ways_to_share(training, world_size)}"
        )
        found.append(("training.global_batch_size", message, ("training.micro_batch_size",)))
    return found


def _ways_to_share(training: TrainingConfig, world_size: int) -> str:
    """Returns with which sizes of micro-batch, or on how many processes, the global batch can be had."""

    def divisors(number: int) -> str:
        return ", ".join(str(one) for one in range(1, min(number, 256) + 1) if number % one == 0)

    share, rest = divmod(training.global_batch_size, world_size)
    if rest == 0:
        return f"micro-batches of {divisors(share)} would do"
    return f"it can be shared by {divisors(training.global_batch_size)} processes"
