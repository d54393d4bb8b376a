"""Processes, expert-parallel groups, dispatch and DeepSpeed; the only room that imports deepspeed.

Importing the package imports none of it: `topology` and `dispatch_plan` are pure; `process`, `all_to_all`,
`deepspeed_bank` and `deepspeed_engine` are imported where processes run.
"""

from smoe_train.parallel.topology import ParallelConfig, Topology, valid_expert_parallel_sizes

__all__ = ["ParallelConfig", "Topology", "valid_expert_parallel_sizes"]
