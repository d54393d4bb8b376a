"""The recipe: the rooms' configurations side by side, checked against each other, with a published JSON Schema."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import Field

from smoe_train.checkpoint.config import CheckpointConfig
from smoe_train.config import COMMAND_LINE, Layered, StrictModel, apply_overrides, build, read_layers
from smoe_train.data import AnySourceConfig, AnyTokenizerConfig, BytesConfig, LoaderConfig
from smoe_train.data.sources.pydocs import PydocsConfig
from smoe_train.errors import Problem, RecipeError
from smoe_train.model.config import ModelConfig, MoeConfig
from smoe_train.parallel.topology import ParallelConfig, parallel_problems, topology_problem
from smoe_train.registry import suggest
from smoe_train.reporting.config import ReportingConfig
from smoe_train.routing import ROUTERS
from smoe_train.schedules import (
    CompetitionConfig,
    CompetitionSchedule,
    Curriculum,
    CurriculumConfig,
    LearningRateConfig,
)
from smoe_train.schedules.curriculum import LARGEST_MULTI_STEP
from smoe_train.training.config import EvaluationConfig, OptimizerConfig, TrainingConfig

# Options of the model that may change from one resume to the next, beside all coefficients of losses: weights and data
# stay what they are.
CHANGEABLE = frozenset({"model.dropout", "model.moe.top_k"})

# A recipe that extends another is another run: it has a name and a description of its own, or none.
NOT_INHERITED = frozenset({"name", "description"})

RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]


class Recipe(StrictModel):
    """A run, whole: nothing that changes its result is set anywhere else."""

    version: Literal[1]
    """Version of the recipe format."""
    name: RunName = "run"
    """Name of the run and of its folder; letters, digits, dots, dashes and underscores."""
    description: str = ""
    """What the recipe is for, in a sentence."""
    seed: int = Field(1234, ge=0, le=2**31 - 1)
    """Decides initial values, data order and every choice that looks random."""
    data: AnySourceConfig = PydocsConfig()
    """Where the text comes from; ``source`` chooses it."""
    tokenizer: AnyTokenizerConfig = BytesConfig()
    """How text becomes token ids; ``type`` chooses it."""
    loader: LoaderConfig = LoaderConfig()
    """How batches are brought to the model."""
    model: ModelConfig = ModelConfig()
    """The transformer."""
    curriculum: CurriculumConfig = CurriculumConfig()
    """What changes over training."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    learning_rate: LearningRateConfig = LearningRateConfig()
    """The learning rate over training."""
    training: TrainingConfig = TrainingConfig()
    """Length and batch."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Validation during training."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written and how many stay."""
    parallel: ParallelConfig = ParallelConfig()
    """How the run is spread over processes."""
    reporting: ReportingConfig = ReportingConfig()
    """Where figures are written."""

    def schedule(self) -> Curriculum:
        """Returns what maps steps to knobs."""
        competition = None
        if self.model.moe_layers() and self.model.moe.router.competes():
            config = self.curriculum.competition or CompetitionConfig()
            competition = CompetitionSchedule(config, self.seed, self.model.moe_layers())
        training = self.training
        return Curriculum(
            self.curriculum, self.model.moe.top_k, training.max_steps, training.sequence_length, competition
        )

    def to_yaml(self) -> str:
        """Returns the resolved recipe as YAML that loads to the same recipe."""
        # OmegaConf's dumper, unlike yaml's, quotes texts that its loader would take for numbers ("1e5").
        text: str = OmegaConf.to_yaml(OmegaConf.create(_literal(self.model_dump(mode="json"))))
        return text

    def identity(self) -> dict[str, Any]:
        """Returns by dotted key what a checkpoint cannot outlive: with another value it is another run's."""
        sections = {
            "seed": self.seed,
            "tokenizer": self.tokenizer.model_dump(mode="json"),
            "model": self.model.model_dump(mode="json"),
            "training": self.training.model_dump(mode="json", include={"sequence_length", "global_batch_size"}),
        }
        found = {key: value for key, value in flat(sections).items() if not _changeable(key)}
        if self.curriculum.order is not None:  # switched on or off in the middle of an epoch, samples would come twice
            found["curriculum.order (whether there is one)"] = True
        return found

    def with_defaults(self) -> Recipe:
        """Returns a recipe of the same kinds of router and tokenizer with every option at its default."""
        moe = MoeConfig(router=type(self.model.moe.router)(type=self.model.moe.router.type))
        tokenizer = type(self.tokenizer)(type=self.tokenizer.type)
        return Recipe(version=1, tokenizer=tokenizer, model=ModelConfig(moe=moe))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings as one, with dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        result |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return result


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), world_size: int | None = None) -> Recipe:
    """Reads, merges and checks a recipe.

    Args:
        name_or_path: A file, or the short name of a shipped recipe (``demo``, ``enwik8/hyper_router``).
        overrides: ``key.path=value`` texts.
        world_size: Processes it shall run on; the topology is checked if given.

    Raises:
        RecipeError: Something is wrong; every mistake is listed.
    """
    path = find_recipe(name_or_path)
    return check_recipe(
        apply_overrides(read_layers(path, _resolve_parent, NOT_INHERITED), overrides), path.stem, world_size
    )


def check_recipe(layered: Layered, default_name: str, world_size: int | None = None) -> Recipe:
    """Turns merged values into a recipe; see `load_recipe`."""
    values = layered.values if "name" in layered.values else {**layered.values, "name": default_name}
    layered = Layered(values, layered.origins, layered.source)
    recipe, problems, dropped = build(Recipe, layered)
    if recipe is not None:
        for key, message, involved in cross_check(recipe, world_size):
            # A check that read a default in place of a wrong value would complain about what nobody wrote.
            if not any(_overlap(one, bad) for one in (key, *involved) for bad in dropped):
                overridden = any(layered.overridden(one) for one in (key, *involved))
                problems.append(Problem(COMMAND_LINE if overridden else layered.where(key), key, message))
    if problems or recipe is None:
        raise RecipeError(problems)
    return recipe


def cross_check(recipe: Recipe, world_size: int | None) -> list[tuple[str, str, tuple[str, ...]]]:
    """Returns (key, message, further keys read) for each contradiction between settings."""
    found: list[tuple[str, str, tuple[str, ...]]] = []
    training, model = recipe.training, recipe.model
    shape_keys = ("model.d_model", "model.num_heads", "model.num_layers", "model.moe", "curriculum")
    # A schedule that goes beyond the number of experts is reported once, where it is written.
    k_values = frozenset(k for k in recipe.schedule().top_k_values() if k <= model.moe.num_experts)
    found += [(f"model.{key}", message, shape_keys) for key, message in model.problems(k_values, training.max_steps)]
    found += _curriculum_checks(recipe)
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


def _curriculum_checks(recipe: Recipe) -> list[tuple[str, str, tuple[str, ...]]]:
    found: list[tuple[str, str, tuple[str, ...]]] = []
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


def _sample_checks(recipe: Recipe) -> list[tuple[str, str, tuple[str, ...]]]:
    found: list[tuple[str, str, tuple[str, ...]]] = []
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


def _top_k_checks(recipe: Recipe) -> list[tuple[str, str, tuple[str, ...]]]:
    found: list[tuple[str, str, tuple[str, ...]]] = []
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


def _topology_checks(recipe: Recipe, world_size: int) -> list[tuple[str, str, tuple[str, ...]]]:
    found: list[tuple[str, str, tuple[str, ...]]] = []
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
            f"training.micro_batch_size {training.micro_batch_size}"
        )
        found.append(("training.global_batch_size", message, ("training.micro_batch_size",)))
    return found


def _literal(value: Any) -> Any:
    """Writes ``${`` so that OmegaConf reads it as these characters."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return value.replace("${", r"\${") if isinstance(value, str) else value


def _changeable(key: str) -> bool:
    return key in CHANGEABLE or (key.startswith("model.moe.") and key.endswith("_coefficient"))


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def recipe_folder() -> Path:
    """Returns the folder of shipped recipes: inside the installed package, or beside it in a source tree."""
    package = Path(__file__).resolve().parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Returns the shipped recipes by short name; names that begin with an underscore are only to be extended."""
    folder = recipe_folder()
    paths = sorted(folder.rglob("*.yaml"))
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path for path in paths if not path.name.startswith("_")
    }


def find_recipe(name_or_path: str) -> Path:
    """Returns the file of a recipe, given as a path or as a shipped recipe's short name.

    Raises:
        RecipeError: There is no such file and no such name.
    """
    path = Path(os.path.expanduser(name_or_path))
    exists = _is_file(path)
    if path.suffix in (".yaml", ".yml") or exists:
        if exists:
            return path
        raise RecipeError([Problem(name_or_path, "", "there is no such file")])
    recipes = shipped_recipes()
    if name_or_path not in recipes:
        hint = suggest(name_or_path, sorted(recipes))
        raise RecipeError([Problem(name_or_path, "", f"no file and no shipped recipe of this name{hint}")])
    return recipes[name_or_path]


def _resolve_parent(name: str, folder: Path) -> Path:
    beside = folder / os.path.expanduser(name)
    if beside.suffix in (".yaml", ".yml"):
        if not _is_file(beside):
            raise RecipeError([Problem(name, "", f"there is no such file in {folder}")])
        return beside.resolve()
    shipped = recipe_folder() / f"{name}.yaml"
    return shipped if _is_file(shipped) else find_recipe(name)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have: too long, or with a NUL
        return False


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema of recipes, for editors; ``extends`` is added, which is resolved before validation."""
    schema = Recipe.model_json_schema()
    schema["title"] = "smoe_train recipe"
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "Recipe to start from: a path relative to this file, or a shipped recipe's short name.",
    }
    schema.pop("required", None)  # an extending file may leave out what its parent sets
    return schema
