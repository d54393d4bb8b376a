"""Teams of processes that take training steps when told to: one rank each, with what a recipe's run has."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from bench_rounds import ATTEMPTS, BUSY_SHARE, others_seconds

if TYPE_CHECKING:
    from torch import Tensor

    from smoe_train.recipe import Recipe


@dataclass(frozen=True)
class Contender:
    """A team's processes, and the sections of its recipe.

    Attributes:
        ranks: Processes.
        size: Expert-parallel size.
        zero: ZeRO stage; None for plain PyTorch in one process.
        precision: ``fp32`` or ``bf16``.
    """

    ranks: int
    size: int
    zero: int | None
    precision: str

    @property
    def name(self) -> str:
        """How its rows are called."""
        engine = "plain" if self.zero is None else f"zero_{self.zero}"
        kind = "" if self.ranks == 1 else "_expert_parallel" if self.size > 1 else "_data_parallel"
        return f"{self.ranks}{kind}_{engine}"

    def recipe(self, options: argparse.Namespace) -> Recipe:
        """Returns what the team trains."""
        from smoe_train.config import Layered
        from smoe_train.recipe import check_recipe

        parallel: dict[str, Any] = {"engine": "local"}
        if self.zero is not None:
            parallel = {"expert_parallel_size": self.size, "zero_stage": self.zero, "precision": self.precision}
        batch = options.tokens // options.sequence_length
        values = {
            "version": 1,
            "name": "bench-parallel",
            "data": {"source": "text", "path": "unused"},
            "model": {
                "d_model": options.d_model,
                "num_layers": options.layers,
                "feed_forward": "swiglu",
                "norm": "rms_norm",
                "moe": {"num_experts": options.experts, "d_ff": options.d_ff, "top_k": options.top_k},
            },
            "training": {
                "sequence_length": options.sequence_length,
                "micro_batch_size": batch,
                "global_batch_size": batch * self.ranks,
            },
            "parallel": parallel,
            "performance": {"experts": options.form},
        }
        return check_recipe(Layered(values), "bench-parallel", self.ranks)


@dataclass(frozen=True)
class Step:
    """One step of one rank.

    Attributes:
        start: Of the machine's clock, the same for all processes.
        end: The same.
        phases: Seconds of forward, backward and update.
        cpu: Seconds of processor time.
        sent: Bytes sent to other ranks, by kind.
        slots: Slots of this rank's tokens by the rank of the expert, over all layers.
        visits: Pairs of a token and a rank that it visits.
    """

    start: float
    end: float
    phases: tuple[float, ...]
    cpu: float
    sent: Counter[str]
    slots: list[int]
    visits: list[int]


class Member:
    """One rank of a team: holds its share of the model, and takes steps when told to."""

    def __init__(self, contender: Contender, options: argparse.Namespace, rank: int) -> None:
        import torch

        from smoe_train import assembly
        from smoe_train.assembly.build import build_engine
        from smoe_train.model.moe import MoeLayer
        from smoe_train.model.performance import apply_performance

        recipe = contender.recipe(options)
        self.options, self.rank, self.size = options, rank, contender.size
        process = assembly.start_process(recipe)
        model = assembly.build_model(recipe, options.vocabulary, assembly.expert_banks(recipe, process)).train()
        apply_performance(model, recipe.performance, "cpu")
        self.engine = build_engine(recipe, model, process)
        self.knobs = recipe.schedule().knobs(0)
        self.hot_share: float | None = None
        self.assigned: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(rank)
        for module in model.modules():
            if isinstance(module, MoeLayer):
                self._watch(module.router)

    def _watch(self, router: Any) -> None:
        """Keeps what a router decides, and decides in its place where tokens go if a share is set."""
        assign = router.assign

        def watched(*arguments: Any) -> Any:
            assignment = assign(*arguments)
            if self.hot_share is not None:
                assignment = replace(assignment, expert_ids_TK=self._steered(self.hot_share))
            self.assigned.append(assignment.expert_ids_TK)
            return assignment

        router.assign = watched

    def _steered(self, share: float) -> Tensor:
        """Returns experts of the first rank for a share of the tokens, and of the other ranks in turn for the rest."""
        import torch

        tokens, top_k, ranks = self.options.tokens, self.options.top_k, self.options.ranks
        local = self.options.experts // ranks
        order = torch.randperm(tokens, generator=self.generator)
        rank_T = torch.where(order < round(share * tokens), 0, 1 + order % (ranks - 1))
        local_TK = (torch.randint(local, (tokens, 1), generator=self.generator) + torch.arange(top_k)) % local
        expert_ids_TK: Tensor = rank_T.unsqueeze(1) * local + local_TK
        return expert_ids_TK

    def step(self, hot_share: float | None) -> Step:
        """Takes a step on fresh tokens."""
        import torch

        from smoe_train.parallel import traffic

        options, self.hot_share = self.options, hot_share
        shape = (options.tokens // options.sequence_length, options.sequence_length)
        ids_BS = torch.randint(0, options.vocabulary, shape, generator=self.generator)
        self.assigned.clear()
        traffic.bytes_sent.clear()
        cpu, times = time.process_time(), [time.perf_counter()]
        output = self.engine.forward(input_ids=ids_BS, labels=ids_BS, knobs=self.knobs)
        times.append(time.perf_counter())
        self.engine.backward(output.loss)
        times.append(time.perf_counter())
        self.engine.step(1e-5)  # routing stays what it is at first, nearly balanced
        times.append(time.perf_counter())
        cpu = time.process_time() - cpu
        phases = tuple(end - start for start, end in pairwise(times))
        rank_of = [ids_TK // (options.experts // self.size) for ids_TK in self.assigned]
        slots = [sum(int((ranks == r).sum()) for ranks in rank_of) for r in range(self.size)]
        visits = [sum(int((ranks == r).any(dim=1).sum()) for ranks in rank_of) for r in range(self.size)]
        return Step(times[0], times[-1], phases, cpu, traffic.bytes_sent.copy(), slots, visits)


def serve(contender: Contender, options: argparse.Namespace, rank: int, port: int, connection: Any) -> None:
    """Is one rank: takes steps until told to end."""
    import torch

    torch.set_num_threads(1)
    if contender.zero is not None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(contender.ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    member = Member(contender, options, rank)
    for hot_share in iter(connection.recv, "end"):
        connection.send(member.step(hot_share))
    os._exit(0)  # no destructors: process groups would wait for each other


class Team:
    """The processes of a contender."""

    def __init__(self, contender: Contender, options: argparse.Namespace) -> None:
        context = multiprocessing.get_context("fork")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.contender, self.clock = contender, options.clock
        self.connections, self.processes = [], []
        for rank in range(contender.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(contender, options, rank, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def step(self, hot_share: float | None = None) -> tuple[float, list[Step]]:
        """Takes a step; returns its seconds and what each rank has to say of it.

        On the wall clock a step during which other processes used the machine is taken again, a few times at most.
        """
        for _ in range(ATTEMPTS):
            others = others_seconds()
            for connection in self.connections:
                connection.send(hot_share)
            steps: list[Step] = [connection.recv() for connection in self.connections]
            if self.clock == "cpu":
                return max(step.cpu for step in steps), steps
            seconds = max(step.end for step in steps) - min(step.start for step in steps)
            others = others_seconds() - others - sum(step.cpu for step in steps)
            if others < BUSY_SHARE * seconds * (os.cpu_count() or 1):
                break
        return seconds, steps

    def end(self) -> None:
        """Ends the processes."""
        for connection, process in zip(self.connections, self.processes, strict=True):
            if process.is_alive():
                connection.send("end")
            process.join(10)
            process.kill()


@contextmanager
def teams_of(contenders: list[Contender], options: argparse.Namespace) -> Iterator[list[Team]]:
    """Starts teams for the time of the block."""
    teams: list[Team] = []
    try:
        teams.extend(Team(contender, options) for contender in contenders)
        yield teams
    finally:
        for team in teams:
            team.end()
