"""Counts the bytes that contests send, over gloo ranks on this host.

Two plans do the same work: ``gather``, which this package uses (`smoe_train.parallel.contest_exchange`), and ``naive``,
which sends every token to every expert's rank and every output back. Counted is what one rank sends to others (see
`smoe_train.parallel.traffic`), in the forward and in the backward pass, a token; ``arithmetic`` is
`smoe_train.parallel.footprint.contest_bytes`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from smoe_train.model import StackedExperts
from smoe_train.model.initialise import KeyedDraw
from smoe_train.parallel import Topology, traffic
from smoe_train.parallel.contest_exchange import Place, contest_across
from smoe_train.parallel.deepspeed_bank import DeepSpeedExpertBank
from smoe_train.parallel.footprint import contest_bytes
from smoe_train.routing.selection import select_top_k


@dataclass(frozen=True)
class Case:
    """Sizes of one measurement: N experts, K winners, P ranks, D d_model, T tokens a rank, fp32."""

    num_experts: int
    top_k: int
    num_ranks: int
    d_model: int = 256
    num_tokens: int = 64


CASES = [Case(4, 2, 2), Case(4, 2, 4), Case(16, 2, 2), Case(16, 2, 4), Case(64, 8, 2), Case(64, 8, 4)]


def take_sent() -> int:
    """Returns the bytes that this rank has sent since the last call."""
    sent = traffic.bytes_sent.total()
    traffic.bytes_sent.clear()
    return sent


def measure(case: Case, rank: int) -> dict[str, list[int]]:
    """Returns the bytes that this rank sends, forward and backward, under both plans."""
    topology = Topology.create(case.num_ranks, case.num_ranks, case.num_experts)

    def make(ids: range) -> StackedExperts:
        experts = StackedExperts(ids, case.d_model, 16, "swiglu", 0.1, 0.1)
        experts.initialise(KeyedDraw(0, "experts"))
        return experts

    bank = DeepSpeedExpertBank(topology, rank, make)
    bank._group = dist.group.WORLD
    place = Place(dist.group.WORLD, case.num_ranks, rank, topology.experts_per_rank)
    result = {}
    x_TD = torch.randn(case.num_tokens, case.d_model, requires_grad=True)

    def respond(y_RD: Tensor) -> Tensor:
        return y_RD.square().mean(dim=-1)

    def choose(responses_TE: Tensor, part: slice) -> Tensor:
        return select_top_k(responses_TE, case.top_k)

    def gather() -> Tensor:
        responses_TE, _, y_TKD = contest_across(bank.experts, place, x_TD, respond, choose, None, False)
        return responses_TE.sum() + y_TKD.sum()

    def naive() -> Tensor:
        everyone_TE = torch.arange(case.num_experts).expand(case.num_tokens, -1)
        y_TED: Tensor = bank(x_TD, everyone_TE)
        responses_TE = respond(y_TED.flatten(0, 1)).view(everyone_TE.shape)
        winners_TK1 = choose(responses_TE, slice(None)).unsqueeze(2)
        return responses_TE.sum() + y_TED.gather(1, winners_TK1.expand(-1, -1, case.d_model)).sum()

    for plan in (gather, naive):
        total = plan()
        forward = take_sent()
        total.backward()
        result[plan.__name__] = [forward, take_sent()]
    return result


def _rank(case: Case, rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=case.num_ranks)
    torch.manual_seed(rank)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(measure(case, rank)), encoding="utf-8")
    dist.destroy_process_group()


def run(case: Case) -> dict[str, Any]:
    """Measures on forked ranks; returns means over the ranks, bytes a token."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_rank, args=(case, rank, folder)) for rank in range(case.num_ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        results = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(case.num_ranks)]
    row: dict[str, Any] = {"num_experts": case.num_experts, "top_k": case.top_k, "num_ranks": case.num_ranks}
    for plan in ("gather", "naive"):
        for index, direction in enumerate(("forward", "backward")):
            sent = sum(result[plan][index] for result in results)
            row[f"{plan}_{direction}"] = sent / (case.num_ranks * case.num_tokens)
    sizes = (case.d_model, case.num_experts, case.top_k, case.num_ranks, 4)
    row["gather_arithmetic"] = contest_bytes(case.num_tokens, *sizes) / case.num_tokens
    gathered = row["gather_forward"] + row["gather_backward"]
    row["ratio"] = (row["naive_forward"] + row["naive_backward"]) / gathered
    return row


def main() -> None:
    """Measures all cases and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print rows of JSON instead of a Markdown table")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    rows = [run(case) for case in CASES]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    print("| N | K | P | gather: forward + backward = sum | arithmetic | naive: forward + backward = sum | ratio |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        plans = []
        for plan in ("gather", "naive"):
            forward, backward = row[f"{plan}_forward"], row[f"{plan}_backward"]
            plans.append(f"{forward:,.0f} + {backward:,.0f} = {forward + backward:,.0f}")
        sizes = f"{row['num_experts']} | {row['top_k']} | {row['num_ranks']}"
        print(f"| {sizes} | {plans[0]} | {row['gather_arithmetic']:,.0f} | {plans[1]} | {row['ratio']:.1f} |")


if __name__ == "__main__":
    main()
