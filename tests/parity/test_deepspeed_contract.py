"""What we rely on in DeepSpeed beyond its documented API; a new version that changes it fails here, with a reason."""

from __future__ import annotations

import inspect

import deepspeed
import deepspeed.ops
import pytest
from deepspeed.moe import utils as moe_utils
from deepspeed.moe.layer import MoE
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.utils import groups
from packaging.specifiers import SpecifierSet


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
