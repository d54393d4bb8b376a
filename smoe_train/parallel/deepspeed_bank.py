"""The expert bank under expert parallelism: dropless dispatch over DeepSpeed's process groups.

`DeepSpeedExpertBank` is the only class that subclasses a DeepSpeed MoE class. DeepSpeed's engine recognises expert
parameters by ``isinstance(module, MoE)`` and by two attributes on each parameter; everything else of its MoE layer
(gate, capacity, dispatch, its checkpoint files) is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn

from smoe_train.parallel.all_to_all import all_to_all, start_exchange
from smoe_train.parallel.contest import Choose, Contested, Respond, contest_here
from smoe_train.parallel.contest_exchange import Place, contest_across
from smoe_train.parallel.dispatch_plan import (
    DispatchPlan,
    count_slots,
    plan_blocks,
    plan_dispatch,
    returned_to_slot_order,
    row_multiple,
    to_expert_order,
)
from smoe_train.parallel.topology import Topology


class Agreed(NamedTuple):
    """What the ranks agree on.

    Attributes:
        send_rows: Rows for each rank of the group.
        receive_rows: Rows from each rank of the group.
        here: Order of the received rows by expert of this rank.
    """

    send_rows: list[int]
    receive_rows: list[int]
    here: DispatchPlan


class ExchangePlan:
    """How the tokens of one layer reach their experts and come back.

    Args:
        sent_PL: Rows for each of the L experts of the group's P ranks.
        received_PL: Where the other ranks' rows for this rank's experts arrive.
        work: To be waited for before these are read.
        home: Order of this rank's tokens by global expert.
        multiple: What each expert's rows are rounded up to.
    """

    def __init__(self, sent_PL: Tensor, received_PL: Tensor, work: Any, home: DispatchPlan, multiple: int) -> None:
        self.home = home
        self._counts = (sent_PL, received_PL)
        self._work = work
        self._multiple = multiple

    @cached_property
    def agreed(self) -> Agreed:
        """What the ranks agree on; waits for the others when it is first read, and the host for the device."""
        self._work.wait()
        sent_PL, received_PL = self._counts
        send_rows, receive_rows = torch.stack([sent_PL.sum(1), received_PL.sum(1)]).tolist()
        return Agreed(send_rows, receive_rows, plan_blocks(received_PL, sum(receive_rows), self._multiple))


class FrozenExpertBank(nn.Module):
    """Runs a layer's experts, each on the one rank of the expert-parallel group that holds it.

    Tokens are sorted by expert, sent to the experts' ranks in an all-to-all of uneven blocks, computed there, sent
    back and put into slot order on their home rank. No token is dropped. Ranks without tokens and experts without
    tokens take part with zero rows. Three collectives forward (counts, which travel while tokens are sorted and copied;
    rows there; rows back) and two backward; one host synchronisation: the split sizes.

    DeepSpeed's engine takes no notice of its experts, which must not be trained: ZeRO refuses a model whose MoE layers
    have nothing to train.

    Args:
        topology: Which rank holds which expert.
        rank: Global rank of this process.
        make_experts: Makes the stacked experts of a range of global ids.
    """

    def __init__(self, topology: Topology, rank: int, make_experts: Callable[[range], nn.Module]) -> None:
        nn.Module.__init__(self)  # of a subclass not MoE.__init__, which would build DeepSpeed's gate and experts
        self.topology = topology
        self.ep_size = topology.expert_parallel_size
        self.expert_group_name = f"ep_size_{self.ep_size}"
        self.num_experts = topology.num_experts
        self.num_local_experts = topology.experts_per_rank
        self.enable_expert_tensor_parallelism = False
        self.use_residual = False
        self.experts = make_experts(topology.experts_of_rank(rank))
        for parameter in self.experts.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = self.expert_group_name  # type: ignore[attr-defined]
        self._group: Any = None
        self._index = rank % self.ep_size  # among the ranks of the group, which are consecutive

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by DeepSpeed's engine: makes the expert-parallel groups once and remembers this layer's."""
        assert not use_data_before_expert_parallel_, "the topology numbers expert-parallel groups consecutively"
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(self.ep_size)
        self._group = groups._get_expert_parallel_group(self.expert_group_name)

    def plan(self, x_TD: Tensor, expert_ids_TK: Tensor) -> DispatchPlan | ExchangePlan:
        """Tells the other ranks who sends how many rows to whom, and sorts this rank's tokens meanwhile."""
        multiple = row_multiple(x_TD)
        if self.ep_size == 1:
            return plan_dispatch(expert_ids_TK, self.num_experts, multiple)
        counts = count_slots(expert_ids_TK, self.num_experts)
        sent_PL = counts[:-1].view(self.ep_size, self.num_local_experts)
        even = [1] * self.ep_size
        received_PL, work = start_exchange(sent_PL, even, even, self._group, "counts")
        home = plan_dispatch(expert_ids_TK, self.num_experts, counts=counts)
        return ExchangePlan(sent_PL, received_PL, work, home, multiple)

    def run(self, x_TD: Tensor, plan: DispatchPlan | ExchangePlan) -> Tensor:
        """Returns the uncombined outputs [T, K, D] of the assigned experts, zero in empty slots."""
        if isinstance(plan, DispatchPlan):
            return self._outputs(x_TD, plan)
        rows = to_expert_order(x_TD, plan.home)  # while the counts travel
        send_rows, receive_rows, here = plan.agreed
        rows = all_to_all(rows[: sum(send_rows)], send_rows, receive_rows, self._group, "tokens")
        outputs = self._outputs(rows, here).squeeze(1)
        returned = all_to_all(outputs, receive_rows, send_rows, self._group, "outputs")
        return returned_to_slot_order(returned, plan.home)

    def _outputs(self, x_TD: Tensor, plan: DispatchPlan) -> Tensor:
        y_TKD: Tensor = self.experts(x_TD, plan)
        return y_TKD

    def compete(
        self, x_TD: Tensor, respond: Respond, choose: Choose, chunk_tokens: int | None, recompute: bool
    ) -> Contested:
        """Runs every expert once on every token, see `smoe_train.parallel.contest_exchange`."""
        if self.ep_size == 1:
            return contest_here(self.experts, self.num_experts, x_TD, respond, choose, chunk_tokens, recompute)
        place = Place(self._group, self.ep_size, self._index, self.num_local_experts)
        return contest_across(self.experts, place, x_TD, respond, choose, chunk_tokens, recompute)

    def forward(self, x_TD: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """Plans and runs."""
        return self.run(x_TD, self.plan(x_TD, expert_ids_TK))


class DeepSpeedExpertBank(FrozenExpertBank, MoE):  # type: ignore[misc]
    """The bank whose experts are trained: DeepSpeed's engine reduces and shards them among the ranks that hold them."""
