"""The recipe: the rooms' configurations side by side, with a published JSON Schema."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import Field

from smoe_train.checkpoint.config import CheckpointConfig
from smoe_train.config import StrictModel
from smoe_train.data import AnySourceConfig, AnyTokenizerConfig, BytesConfig, LoaderConfig
from smoe_train.data.sources.pydocs import PydocsConfig
from smoe_train.model.config import ModelConfig, MoeConfig
from smoe_train.model.performance import PerformanceConfig
from smoe_train.parallel.topology import ParallelConfig
from smoe_train.reporting.config import ReportingConfig
from smoe_train.schedules import (
    CompetitionConfig,
    CompetitionSchedule,
    Curriculum,
    CurriculumConfig,
    LearningRateConfig,
)
from smoe_train.training.config import EvaluationConfig, OptimizerConfig, TrainingConfig
from smoe_train.training.health_config import HealthConfig
from smoe_train.training.task_config import (
    InitialiseConfig,
    LanguageModellingConfig,
    SequenceClassificationConfig,
    TaskConfig,
)

# Options of the model that may change from one resume to the next, beside all coefficients of losses: weights and data
# stay what they are.
CHANGEABLE = frozenset({"model.dropout", "model.moe.top_k"})

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
    task: TaskConfig = LanguageModellingConfig()
    """What is learnt; ``type`` chooses it."""
    initialise: InitialiseConfig = InitialiseConfig()
    """What the weights are before step 0."""
    data: AnySourceConfig = PydocsConfig()
    """Where text or examples come from; ``source`` chooses it."""
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
    health: HealthConfig = HealthConfig()
    """What becomes of numerical faults, loss spikes and collapsed routers."""
    parallel: ParallelConfig = ParallelConfig()
    """How the run is spread over processes."""
    performance: PerformanceConfig = PerformanceConfig()
    """In which of several forms, equal up to rounding, a step is computed."""
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

    def causal(self) -> bool:
        """Returns whether a token must not depend on later ones."""
        return not isinstance(self.task, SequenceClassificationConfig) or self.task.attention == "causal"

    def loads_routers(self) -> bool:
        """Returns whether routers begin with the weights of another training."""
        return self.initialise.path is not None and self.initialise.router == "load"

    def to_yaml(self) -> str:
        """Returns the resolved recipe as YAML that loads to the same recipe."""
        # OmegaConf's dumper, unlike yaml's, quotes texts that its loader would take for numbers ("1e5").
        text: str = OmegaConf.to_yaml(OmegaConf.create(_literal(self.model_dump(mode="json"))))
        return text

    def identity(self) -> dict[str, Any]:
        """Returns by dotted key what a checkpoint cannot outlive: with another value it is another run's."""
        sections = {
            "seed": self.seed,
            "task": self.task.model_dump(mode="json"),
            "initialise": {"freeze": sorted(self.initialise.freeze)},
            "model": self.model.model_dump(mode="json"),
            "training": self.training.model_dump(mode="json", include={"sequence_length", "global_batch_size"}),
        }
        found = {key: value for key, value in flat(sections).items() if not changeable(key)}
        if self.curriculum.order is not None:  # switched on or off in the middle of an epoch, samples would come twice
            found["curriculum.order (whether there is one)"] = True
        return found

    def with_defaults(self) -> Recipe:
        """Returns a recipe of the same kinds of task and router with every option at its default."""
        moe = MoeConfig(router=type(self.model.moe.router)(type=self.model.moe.router.type))
        return Recipe(version=1, task=type(self.task)(), model=ModelConfig(moe=moe))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings as one, with dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        result |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return result


def changeable(key: str) -> bool:
    """Returns whether a setting may differ from that of the weights a run goes on with."""
    return key in CHANGEABLE or (key.startswith("model.moe.") and key.endswith("_coefficient"))


def _literal(value: Any) -> Any:
    """Writes ``${`` so that OmegaConf reads it as these characters."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    # Backslashes before it count as escaped ones.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema of recipes, for editors; ``extends`` is added, which is resolved before validation."""
    schema = Recipe.model_json_schema()
    schema["title"] = "smoe_train recipe"
    schema["properties"]["extends"] = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "Recipe to start from: a path relative to this file, or a shipped recipe's short name; "
        "or a list, of which later ones override earlier ones.",
    }
    schema.pop("required", None)  # an extending file may leave out what its parent sets
    return schema
