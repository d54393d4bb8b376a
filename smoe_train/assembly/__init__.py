"""From a recipe to a run: the one room that sees every other."""

from smoe_train.assembly.build import (
    build_engine,
    build_model,
    build_trainer,
    expert_banks,
    open_journal,
    pretrained_weights,
    run_tokenizer,
    start_process,
)
from smoe_train.assembly.data import (
    AnyStore,
    build_batches,
    check_identity,
    identity,
    prepare_data,
    text_batches,
    text_figures,
)
from smoe_train.assembly.evaluate import (
    build_for_evaluation,
    checkpoint_task,
    checkpoint_tokenizer,
    evaluation_knobs,
    report_task,
    require_kind,
    score_examples,
)

__all__ = [
    "AnyStore",
    "build_batches",
    "build_engine",
    "build_for_evaluation",
    "build_model",
    "build_trainer",
    "check_identity",
    "checkpoint_task",
    "checkpoint_tokenizer",
    "evaluation_knobs",
    "expert_banks",
    "identity",
    "open_journal",
    "prepare_data",
    "pretrained_weights",
    "report_task",
    "require_kind",
    "run_tokenizer",
    "score_examples",
    "start_process",
    "text_batches",
    "text_figures",
]
