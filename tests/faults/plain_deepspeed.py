"""What plain DeepSpeed does at the same faults: a small mixture of experts trained and saved as its tutorial says.

`engine.save_checkpoint` and `engine.load_checkpoint`, nothing around them. `words` gives the last column of the table:
what was measured in this run, and for what takes too long or needs other machines, what was measured or read before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from faults.lives import Life
from faults.scenario import Outcome, Scale
from faults.suite import ModuleResult
from torch import Tensor, nn

from smoe_train.parallel.process import Process

D_MODEL, EXPERTS, STEPS, SAVE_EVERY = 32, 4, 6, 2
LIFE_SECONDS = 60.0
# A rank that waits for one that is gone has had its say by then.
SURVIVOR_SECONDS = 3.0
FLIPS = {"short": 4, "commit": 40, "nightly": 400}

# From the same loop on 2 ranks with 0.19.8 unless it says otherwise, when the goals of this suite were set.
MEASURED_BEFORE = {
    "A1": "16 kills left 11 runs with another loss curve: no random state is saved",
    "A2": "1 of 14 points leaves an empty `latest`, and resuming ends with an AssertionError",
    "A3": "`latest` names a checkpoint without the killed rank's experts; no resume, though an older one is whole",
    "A4": "an overwrite that is interrupted leaves a mixture of two runs, which loads without a word",
    "A5": "385 of 400 files with one bit flipped load without a word",
    "A6": "`basic_ios::clear: iostream error`, without the path or the room; files are never flushed",
    "A7": "without `latest` the run starts at step 0 after a warning, exit code 0",
    "B1": "losses after a resume differ: no random state is saved",
    "B6": "another world or expert-parallel size cannot be loaded",
    "C1": "torchrun ends 1.3 s later, the peers' lost connections mixed into the traceback",
    "C2": "not noticed in 45 s (30 min by default), and no rank is named",
    "C3": "the workers train on as orphans",
    "C4": "ends with exit code 1, nothing saved",
    "C5": "weights are NaN for ever after, exit code 0, and `latest` names a checkpoint of NaN",
    "C7": "a lock left by a killed build lets every later run on the machine hang",
    "C8": "both write",
    "C9": "an error after all processes have started",
    "C10": "waits 30 min",
    "E1": "the pickle runs, and training goes on",
    "E4": "`latest` is followed out of its folder",
}


class Net(nn.Module):
    """An embedding, a mixture of experts and a head."""

    def __init__(self, expert_parallel_size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, D_MODEL)
        expert = nn.Sequential(nn.Linear(D_MODEL, D_MODEL), nn.ReLU(), nn.Linear(D_MODEL, D_MODEL))
        self.moe = MoE(D_MODEL, expert, EXPERTS, ep_size=expert_parallel_size, k=1, noisy_gate_policy="RSample")
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(D_MODEL, 64)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.dropout(self.moe(self.embed(ids))[0]))  # type: ignore[no-any-return]


def build(expert_parallel_size: int, seed: int = 0) -> Any:
    """Returns an engine with AdamW and without ZeRO, in fp32."""
    Process.start()
    torch.manual_seed(seed)
    net = Net(expert_parallel_size)
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(net.parameters()), "name": "all"})
    engine, *_ = deepspeed.initialize(
        model=net,
        optimizer=torch.optim.AdamW(groups, lr=1e-2),
        config={"train_micro_batch_size_per_gpu": 4, "steps_per_print": 2**31},
    )
    torch.manual_seed(seed + 1 + engine.global_rank)
    return engine


def train(engine: Any, folder: Path, first: int = 0, poisoned: int = -1) -> list[str]:
    """Trains and saves as usual; returns the losses, bit for bit."""
    losses = []
    for step in range(first, STEPS):
        data = torch.Generator().manual_seed(100 * step + engine.global_rank)
        ids = torch.randint(0, 64, (4, 16), generator=data)
        loss = nn.functional.cross_entropy(engine(ids).flatten(0, 1), ids.roll(-1, 1).flatten())
        if step == poisoned and engine.global_rank == 1:
            loss = loss * float("nan")
        engine.backward(loss)
        engine.step()
        losses.append(loss.item().hex())
        if (step + 1) % SAVE_EVERY == 0:
            engine.save_checkpoint(str(folder), tag=f"s{step + 1}", client_state={"step": step + 1})
    return losses


def experts_of(engine: Any) -> list[str]:
    """Returns the bytes of this rank's experts as text."""
    tensors = [value for name, value in engine.module.named_parameters() if "deepspeed_experts" in name]
    return [value.detach().numpy().tobytes().hex() for value in tensors]


def words(scale: Scale, folder: Path) -> dict[str, str]:
    """Returns what plain DeepSpeed does, by number in the fault catalogue."""
    before = {number: f"{text} (measured before, 0.19.8)" for number, text in MEASURED_BEFORE.items()}
    return before | (measured(scale, folder) if scale != "short" else {})


def with_column(results: Sequence[ModuleResult], scale: Scale, folder: Path) -> list[ModuleResult]:
    """Returns results whose outcomes all have their last column."""
    column = words(scale, folder)
    return [
        dataclasses.replace(result, outcomes=tuple(fill(outcome, column) for outcome in result.outcomes))
        for result in results
    ]


def fill(outcome: Outcome, column: Mapping[str, str]) -> Outcome:
    """Returns an outcome with its last column: as measured now, else as its module says, else as known."""
    known = [column[number] for number in outcome.catalogue.replace(" ", "").split(",") if number in column]
    here = [text for text in known if text.startswith("measured here")]
    text = "; ".join(here) or outcome.plain_deepspeed or "; ".join(known)
    return dataclasses.replace(outcome, plain_deepspeed=text)


def measured(scale: Scale, folder: Path) -> dict[str, str]:
    """Returns what could be measured here and now, a few seconds' work."""
    version = deepspeed.__version__.split("+")[0]
    found: dict[str, str] = {}
    for measure in (_resume, _rank_killed, _torn_overwrite, _poisoned, _alone):
        place = folder / measure.__name__.strip("_")
        place.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(_NotMeasuredError):
            found |= measure(place, FLIPS[scale])
    return {number: f"measured here ({version}): {text}" for number, text in found.items()}


class _NotMeasuredError(Exception):
    """The loop did not get to the point that was to be measured."""


def _answers(folder: Path, world_size: int, work: Callable[[], Any], wait: float = LIFE_SECONDS) -> list[Any]:
    """Returns what each rank returned: a value, ``{"error": text}`` if it raised, None if it was killed or hung."""
    name = f"answer-{time.monotonic_ns()}"

    def answer() -> int:
        try:
            value = work()
        except Exception as error:
            value = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        (folder / f"{name}.{os.environ['RANK']}").write_text(json.dumps(value))
        return 0

    life = Life(world_size, answer, folder / "output.txt")
    if not life.wait(wait, life.failed):
        life.kill()
    if life.running():
        life.wait(SURVIVOR_SECONDS)
        life.kill()
        life.wait(SURVIVOR_SECONDS)
    files = [folder / f"{name}.{rank}" for rank in range(world_size)]
    return [json.loads(file.read_text()) if file.is_file() else None for file in files]


def _problem(answers: Sequence[Any]) -> str:
    """Returns the first rank's error without the paths of this run, which differ each time."""
    errors = [answer["error"] for answer in answers if isinstance(answer, dict) and "error" in answer]
    return re.sub(r"'/\S*/([^/]*)'", r"'\1'", errors[0])[:140] if errors else ""


def _need(condition: bool) -> None:
    if not condition:
        raise _NotMeasuredError


def _resume(folder: Path, flips: int) -> dict[str, str]:
    """Dropout and gate noise on both sides of a resume; then another expert-parallel size."""
    straight = _answers(folder, 2, lambda: train(build(2), folder))
    _need(not _problem(straight) and None not in straight)

    def resumed() -> list[str]:
        engine = build(2)
        _, state = engine.load_checkpoint(str(folder), tag="s4")
        return train(engine, folder / "again", state["step"])

    def other_size() -> None:
        build(1).load_checkpoint(str(folder), tag="s4")

    again = _answers(folder, 2, resumed)
    _need(not _problem(again) and None not in again)
    differ = sum(mine != theirs for mine, theirs in zip(again[0], straight[0][4:], strict=True))
    said = _problem(_answers(folder, 2, other_size)) or "no error"
    return {
        "B1": f"{differ} of {STEPS - 4} losses after a resume differ: no random state is saved",
        "B6": f"2 ranks, expert-parallel size 2 to 1: {said}",
    }


def _killed_at(step: int, engine: Any) -> None:
    """Lets rank 1 be killed before it writes its first file of a step."""
    if engine.global_rank != 1:
        return
    save = engine.checkpoint_engine.save

    def save_or_die(state: Any, path: Any) -> Any:
        if f"s{step}" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return save(state, path)

    engine.checkpoint_engine.save = save_or_die


def _rank_killed(folder: Path, flips: int) -> dict[str, str]:
    def killed() -> list[str]:
        engine = build(2)
        _killed_at(4, engine)
        return train(engine, folder)

    _answers(folder, 2, killed, wait=SURVIVOR_SECONDS * 3)
    _need((folder / "s2").is_dir())
    whole = {path.name for path in (folder / "s2").iterdir()}
    missing = whole - {path.name for path in (folder / "s4").iterdir()} if (folder / "s4").is_dir() else whole
    latest = (folder / "latest").read_text()
    said = _problem(_answers(folder, 2, lambda: str(build(2).load_checkpoint(str(folder))[0]))) or "no error"
    there = (
        f"`latest` names {latest}, which lacks {len(missing)} of {len(whole)} files" if latest == "s4" else "kept s2"
    )
    return {"A3": f"{there}; resume: {said}; s2 is whole"}


def _torn_overwrite(folder: Path, flips: int) -> dict[str, str]:
    def saved(seed: int, dies: bool) -> list[str]:
        engine = build(2, seed)
        if dies:
            _killed_at(2, engine)
        train(engine, folder)
        return []

    def loaded() -> list[str]:
        engine = build(2, seed=9)
        engine.load_checkpoint(str(folder), tag="s2")
        return experts_of(engine)

    _need(not _problem(_answers(folder, 2, lambda: saved(0, False))))
    before = _answers(folder, 2, loaded)
    _answers(folder, 2, lambda: saved(1, True), wait=SURVIVOR_SECONDS * 3)
    after = _answers(folder, 2, loaded)
    said = _problem(after)
    if said:
        return {"A4": f"the next load ends with {said}"}
    _need(None not in after and None not in before)
    mixture = after[0] != before[0] and after[1] == before[1]
    return {"A4": "loads a mixture of two runs' experts without a word" if mixture else "no mixture was left"}


def _poisoned(folder: Path, flips: int) -> dict[str, str]:
    def poisoned() -> dict[str, Any]:
        engine = build(2)
        train(engine, folder, poisoned=2)
        finite = all(bool(value.isfinite().all()) for value in engine.module.parameters())
        return {"finite": finite}

    answers = _answers(folder, 2, poisoned)
    said = _problem(answers)
    if said:
        return {"C5": said}
    _need(None not in answers)
    weights = "stay finite" if all(answer["finite"] for answer in answers) else "are NaN for ever after"
    latest = (folder / "latest").read_text()
    return {"C5": f"fp32, no ZeRO: weights {weights}, exit code 0, `latest` names {latest} with them"}


def _alone(folder: Path, flips: int) -> dict[str, str]:
    """One rank: flipped bits, a pickle that runs, no ``latest``."""

    def work() -> dict[str, Any]:
        engine = build(1)
        train(engine, folder)
        silent = _flipped(engine, folder, flips)
        (folder / "latest").rename(folder / "latest.away")
        path, _ = engine.load_checkpoint(str(folder))
        canary = folder / "canary"
        model = next((folder / "s6").glob("mp_rank_*"))
        torch.save({"module": _Payload(canary)}, model)
        with contextlib.suppress(Exception):
            engine.load_checkpoint(str(folder), tag="s6")
        return {"silent": silent, "path": path, "ran": canary.exists()}

    answer = _answers(folder, 1, work)[0]
    _need(isinstance(answer, dict) and "silent" in answer)
    return {
        "A5": f"{answer['silent']} of {flips} checkpoints with one bit flipped load without a word",
        "A7": "without `latest` training starts at step 0, exit code 0" if answer["path"] is None else "loads anyway",
        "E1": "a pickle in a model file runs" if answer["ran"] else "a pickle in a model file does not run",
    }


class _Payload:
    """Leaves an empty file behind when it is unpickled, and does nothing else."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (self._canary,))


def _flipped(engine: Any, folder: Path, flips: int) -> int:
    """Returns how many of so many flips of one random bit in a random file pass unnoticed."""
    source, silent = random.Random(5), 0
    files = sorted(path for path in (folder / "s6").rglob("*") if path.is_file())
    for _ in range(flips):
        path = source.choice(files)
        whole = path.read_bytes()
        damaged, place = bytearray(whole), source.randrange(len(whole) * 8)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with contextlib.suppress(Exception):
            engine.load_checkpoint(str(folder), tag="s6")
            silent += 1
        path.write_bytes(whole)
    return silent
