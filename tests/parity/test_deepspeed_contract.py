"""What we rely on in DeepSpeed beyond its documented API; a new version that changes it fails here, with a reason."""

from __future__ import annotations

import inspect
import io
from datetime import timedelta
from pathlib import Path

import deepspeed
import deepspeed.ops
import pytest
import torch
from deepspeed.moe import utils as moe_utils
from deepspeed.moe.layer import MoE
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.utils import groups
from packaging.specifiers import SpecifierSet
from support.parallel_runs import recipe_for
from support.ranks import run_ranks
from torch.distributed import distributed_c10d

from smoe_train import assembly
from smoe_train.data import prepare
from smoe_train.parallel.process import FOREVER, Process
from smoe_train.recipe import Recipe


def test_the_version_is_in_the_tested_range() -> None:
    assert deepspeed.__version__.split("+")[0] in SpecifierSet(">=0.19.8,<0.20")


def test_experts_are_recognised_by_our_attributes() -> None:
    source = inspect.getsource(moe_utils.is_moe_param)
    assert "allreduce" in source
    assert "group_name" in inspect.getsource(moe_utils.split_params_into_different_moe_groups_for_optimizer)
    assert "isinstance(module, MoE)" in inspect.getsource(DeepSpeedEngine)
    assert "_create_process_groups" in inspect.getsource(MoE.set_deepspeed_parallelism)


@pytest.mark.parametrize(
    "name",
    [
        "_create_expert_and_data_parallel",
        "_get_expert_parallel_group",
        "_get_expert_parallel_group_dict",
        "_get_expert_data_parallel_group",
    ],
)
def test_groups_are_there(name: str) -> None:
    assert callable(getattr(groups, name))


def test_expert_parallel_groups_are_consecutive_ranks() -> None:
    """Our topology puts experts on ranks [i * size, (i + 1) * size)."""
    assert "expert_parallel_group = [0, 1], [2,3]" in inspect.getsource(groups._create_expert_and_data_parallel)


def test_zero_links_optimizer_states_where_we_relink_them() -> None:
    optimizer = stage_1_and_2.DeepSpeedZeroOptimizer
    assert callable(optimizer._lazy_init_hp_params_optimizer_state)
    assert "_hp_optimizer_states_linked" in inspect.getsource(optimizer)


def test_the_inference_operator_can_be_switched_off() -> None:
    assert isinstance(deepspeed.ops.__compatible_ops__, dict)


def lines_of_a_skipped_step(shown: bool) -> str:
    """Returns what DeepSpeed prints of a step that it skips, and of something else."""
    Process.start()
    logger, stream = deepspeed.utils.logging.logger, io.StringIO()
    logger.handlers[0].setStream(stream)
    if shown:
        logger.filters.clear()
    loss_scaler.LossScaler(1.0).update_scale(True)
    logger.warning("news")
    return stream.getvalue()


def test_the_line_of_a_skipped_step_is_not_shown() -> None:
    """The trainer says more of it; the filter goes by DeepSpeed's words."""
    assert "OVERFLOW!" in run_ranks(1, lines_of_a_skipped_step, True)[0]
    (lines,) = run_ranks(1, lines_of_a_skipped_step, False)
    assert "OVERFLOW!" not in lines
    assert "news" in lines


def timeouts_of_groups(recipe: Recipe, folder: Path) -> tuple[int, set[timedelta]]:
    """Trains and returns the number of groups and their timeouts; each has one backend, gloo, on a CPU."""
    process = assembly.start_process(recipe)
    assembly.build_trainer(recipe, process, folder).train()
    groups = list(distributed_c10d._world.pg_map)
    return len(groups), {group._get_backend(torch.device("cpu")).options._timeout for group in groups}


@pytest.mark.parametrize(
    ("hang_seconds", "expected"),
    [(None, FOREVER), (1e8, FOREVER), (7200.0, timedelta(hours=4)), (600.0, timedelta(minutes=30))],
)
def test_all_process_groups_wait_as_long_as_the_recipe_says(
    text: Path, tmp_path: Path, hang_seconds: float | None, expected: timedelta
) -> None:
    """`_set_pg_timeout` reaches the groups that DeepSpeed makes, and it makes none after its engine."""
    training = {"micro_batch_size": 2, "hang_seconds": hang_seconds, "max_steps": 1}
    recipe = recipe_for(text, 2, {"expert_parallel_size": 2}, training=training)
    prepare(recipe.data, recipe.tokenizer)
    for number, found in run_ranks(2, timeouts_of_groups, recipe, tmp_path):
        assert number > 2
        assert found == {expected}
