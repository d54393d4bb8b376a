"""Trains every routing policy on the same bytes with the same seeds and steps, and writes one table of the results.

Each row is a recipe under ``recipes/enwik8`` (or the baseline with overrides) made small by the overrides in `SIZE`, so
that the whole table takes about an hour on two cores. Runs are ordinary run folders: what is finished is not run again,
an interrupted table goes on where it stopped. Time a step is measured afterwards, in one process, interleaved over the
policies, on the trained models (a router's sharpness decides how many experts adaptive gating uses): CPU time on one
thread, relative to ``top_k`` within the round. Figures describe this small model on a piece of enwik8, nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smoe_train.training.trainer import Trainer

BASELINE = "top_k, k = 2"
SIZE = (
    "model.d_model=128",
    "model.num_heads=4",
    "model.moe.num_experts=8",
    "model.moe.d_ff=256",
    "training.sequence_length=256",
    "training.micro_batch_size=16",
    "training.global_batch_size=16",
    "learning_rate.peak=3e-3",
    "learning_rate.warmup_steps=40",
    "checkpoint.keep_last=1",
    "reporting.log_every_steps=50",
    "parallel.engine=local",
)


@dataclass(frozen=True)
class Policy:
    """One row of the table.

    Attributes:
        label: What the row is called.
        recipe: Short name of the recipe.
        overrides: What differs from the recipe besides `SIZE`.
        note: What a reader must know to compare the row.
    """

    label: str
    recipe: str
    overrides: tuple[str, ...] = ()
    note: str = ""


POLICIES = (
    Policy(BASELINE, "enwik8/top_k"),
    Policy(
        "top_k, k = 1",
        "enwik8/top_k",
        ("model.moe.top_k=1", "model.moe.router.softmax=before_top_k"),
        "half of the expert computation",
    ),
    Policy("hyper_router, std 0.02", "enwik8/hyper_router", (), "router weights start as wide as top_k's"),
    Policy(
        "hyper_router, released scale",
        "enwik8/hyper_router",
        ("model.moe.router.target_router_std=null",),
        "router weights start as the released code's do",
    ),
    Policy("random, std 0.02", "enwik8/random", ("model.moe.router.router_std=0.02",), "frozen router"),
    Policy("random, std 0.072", "enwik8/random", ("model.moe.router.router_std=0.072",), "frozen router"),
    Policy(
        "smoe_dropout, k = 2 to 8",
        "enwik8/smoe_dropout",
        ("curriculum.top_k={form: linear_increase, low: 2, high: 8}", "evaluation.top_k=[2]"),
        "frozen router; trained with 2.5 times the expert rows, evaluated with k = 2",
    ),
    Policy("x_moe", "enwik8/x_moe"),
    Policy("stable_moe", "enwik8/stable_moe", ("model.moe.router.stage_1_steps={tenth}",), "stage 2 after 10 %"),
    Policy("sigmoid", "enwik8/sigmoid", (), "bias balancing instead of a balance loss"),
    Policy("compete_smoe", "enwik8/compete_smoe"),
    Policy(
        "sim_smoe over top_k",
        "enwik8/sim_smoe",
        ("model.moe.router.frequency=0.5",),
        "frequency 0.5 instead of the paper's 16, at which hardly a pair is checked in so few steps",
    ),
    Policy("adaptive over top_k", "enwik8/adaptive", (), "threshold 0.1; probabilities of the full softmax as weights"),
    Policy(
        "adaptive, target share 0.3",
        "enwik8/adaptive",
        ("model.moe.router.target_top2_share=0.3",),
        "threshold follows the share; weights as above",
    ),
)


@dataclass(frozen=True)
class Result:
    """What a policy reached, over the seeds, and what it cost.

    Attributes:
        label: The policy.
        bits_per_byte: On the validation split, one value a seed.
        relative_seconds: Time of a training step relative to the baseline's, median over rounds; None if not measured.
        relative_spread: Quartiles of that.
        two_expert_share: Share of tokens that visited two or more experts.
        entropy: Mean entropy of the router's probabilities over ln E.
        load_max_over_mean: Load of the busiest expert over the mean, averaged over layers.
        note: What a reader must know.
    """

    label: str
    bits_per_byte: list[float]
    relative_seconds: float | None
    relative_spread: tuple[float, float] | None
    two_expert_share: float
    entropy: float
    load_max_over_mean: float
    note: str


def folder_of(policy: Policy, seed: int) -> str:
    """Returns the name of a run's folder."""
    words = "".join(letter if letter.isalnum() else "-" for letter in policy.label)
    return f"{'-'.join(part for part in words.split('-') if part)}-seed-{seed}"


def command_of(policy: Policy, seed: int, options: argparse.Namespace) -> list[str]:
    """Returns the command that trains a policy with a seed; the same command goes on with an interrupted run."""
    overrides = [text.replace("{tenth}", str(options.steps // 10)) for text in policy.overrides]
    name = folder_of(policy, seed)
    return [
        *(sys.executable, "-m", "smoe_train.cli.app", "train", policy.recipe, *SIZE, *options.data, *overrides),
        *(f"name={name}", f"seed={seed}", f"training.max_steps={options.steps}"),
        *(f"evaluation.every_steps={options.steps}", f"checkpoint.every_steps={options.steps}"),
        *("--launcher", "in_process", "--output-dir", str(options.output_dir)),
    ]


def train(policy: Policy, seed: int, options: argparse.Namespace) -> None:
    """Trains one policy with one seed in a process of its own."""
    log = options.output_dir / f"{folder_of(policy, seed)}.log"
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(
            command_of(policy, seed, options), stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"}
        ).returncode
    if code:
        raise SystemExit(f"{policy.label}, seed {seed}: exit code {code}; see {log}")
    print(f"{policy.label}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)


def last_records(path: Path, split: str) -> list[dict[str, Any]]:
    """Returns the records of a split's last step."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    records = [record for record in records if record["split"] == split]
    return [record for record in records if record["step"] == records[-1]["step"]]


def summary(policy: Policy, times: dict[str, list[float]], options: argparse.Namespace) -> Result:
    """Returns a row from the run folders and the measured times."""
    runs = [options.output_dir / folder_of(policy, seed) for seed in options.seeds]
    bits = [last_records(run / "metrics.jsonl", "valid")[0]["bits_per_byte"] for run in runs]
    layers = [record for run in runs for record in last_records(run / "routing.jsonl", "valid")]

    def mean(key: str) -> float:
        return statistics.fmean(float(record[key]) for record in layers)

    ratios = sorted(times.get(policy.label, []))
    return Result(
        policy.label,
        bits,
        statistics.median(ratios) if ratios else None,
        (ratios[len(ratios) // 4], ratios[len(ratios) * 3 // 4]) if ratios else None,
        mean("two_expert_share"),
        mean("entropy_normalised"),
        mean("load_max_over_mean"),
        policy.note,
    )


def measure(policies: list[Policy], options: argparse.Namespace) -> dict[str, list[float]]:
    """Returns each policy's time of a training step over the baseline's, one value a round."""
    import torch

    torch.set_num_threads(1)
    trainers = {policy.label: _trained(policy, options) for policy in policies}
    ratios: dict[str, list[float]] = {label: [] for label in trainers}
    labels = list(trainers)
    for round_ in range(options.rounds + 1):
        order = labels[round_ % len(labels) :] + labels[: round_ % len(labels)]
        seconds = {label: _step_seconds(trainers[label], round_, options.steps_a_round) for label in order}
        if round_ > 0:  # the first warms up
            for label in labels:
                ratios[label].append(seconds[label] / seconds[BASELINE])
    return ratios


def _trained(policy: Policy, options: argparse.Namespace) -> Trainer:
    from smoe_train.assembly import build_trainer, start_process
    from smoe_train.checkpoint import Checkpoint
    from smoe_train.recipe import load_recipe

    run = options.output_dir / folder_of(policy, options.seeds[0])
    recipe = load_recipe(str(run / "recipe.yaml"))
    trainer = build_trainer(recipe, start_process(recipe), run)
    trainer.resume(Checkpoint.open(trainer.store.complete()[0]))
    trainer.model.train()
    return trainer


def _step_seconds(trainer: Trainer, round_: int, steps: int) -> float:
    from smoe_train.training.meter import Meter

    meter = Meter(1, trainer.process.sum, trainer.model.config.loss_coefficients())
    start = time.process_time()
    for offset in range(steps):
        # Steps near the end of training, so that schedules and the competition are those of the trained model.
        step = trainer.config.max_steps - 1 - (round_ * steps + offset) % (trainer.config.max_steps // 2)
        knobs = trainer.curriculum.knobs(step)
        for batch in trainer.batches[step]:
            objective = trainer.task.objective(trainer.engine.forward, batch, knobs, None)
            trainer.engine.backward(objective.total)
            meter.add(objective)
        trainer.engine.step(0.0)
        trainer.adapt_routers(meter.end_step({"top_k": knobs.top_k}, knobs.loss_weights))
    return (time.process_time() - start) / steps


def table(results: list[Result]) -> str:
    """Returns the results as a Markdown table, with each difference to the baseline beside its noise."""
    base = next(result for result in results if result.label == BASELINE)
    lines = [
        "| policy | bits per byte, mean ± s.d. | against top_k, seed by seed | time a step | tokens with 2+ experts "
        "| router entropy / ln E | busiest expert / mean | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        bits = result.bits_per_byte
        spread = statistics.stdev(bits) if len(bits) > 1 else math.nan
        seconds = "-" if result.relative_seconds is None else f"{result.relative_seconds:.2f}"
        if result.relative_spread is not None:
            seconds += f" ({result.relative_spread[0]:.2f} to {result.relative_spread[1]:.2f})"
        lines.append(
            f"| {result.label} | {statistics.fmean(bits):.4f} ± {spread:.4f} | {_difference(result, base)} | {seconds} "
            f"| {100 * result.two_expert_share:.0f} % | {result.entropy:.2f} | {result.load_max_over_mean:.2f} "
            f"| {result.note} |"
        )
    return "\n".join(lines) + "\n"


def _difference(result: Result, base: Result) -> str:
    """Returns the paired difference over seeds with a 95 % confidence interval (Student's t), and what it allows."""
    if result is base:
        return "-"
    differences = [one - other for one, other in zip(result.bits_per_byte, base.bits_per_byte, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return f"{mean:+.4f}"
    from scipy.stats import t

    half = float(t.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / math.sqrt(len(differences))
    verdict = "within the noise" if abs(mean) <= half else ("better" if mean < 0 else "worse")
    return f"{mean:+.4f} ± {half:.4f}, {verdict}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="overrides that name the data, e.g. data.path=FILE data.train_bytes=N")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of the timing; 0 measures no time")
    parser.add_argument("--steps-a-round", type=int, default=8)
    parser.add_argument("--only", nargs="+", default=[], help="parts of labels; all policies if not given")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/compare"))
    return parser.parse_args(arguments)


def main() -> int:
    """Trains what is missing, measures, and writes ``table.md`` and ``results.json`` into the output folder."""
    options = parse()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    policies = [
        p for p in POLICIES if p.label == BASELINE or not options.only or any(o in p.label for o in options.only)
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(train, policy, seed, options) for seed in options.seeds for policy in policies]
        for job in jobs:
            job.result()
    times = measure(policies, options) if options.rounds else {}
    results = [summary(policy, times, options) for policy in policies]
    text = table(results)
    (options.output_dir / "table.md").write_text(text, encoding="utf-8")
    values = [asdict(result) for result in results]
    (options.output_dir / "results.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
