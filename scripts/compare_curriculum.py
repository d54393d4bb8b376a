"""Trains adaptive gating on SST-2 in plain and in easy-first order, and writes how soon each gets to the same loss.

Every arm is trained beside the plain one: two runs that differ in one setting start together, each on a core of its
own, and the cores are swapped from seed to seed. Ratios are within such a pair, as other work on the machine slows
both. Time is that of the training steps, with the making of orders and without validation and saving.

In a pair the equal loss is the lowest held-out loss (on training rows kept apart) that both runs get to; a run is there
at the first validation that is as low. The first epoch is the same in both orders, so the ratio of its times tells how
far times can be trusted. Finished pairs are not trained again; a pair that was interrupted starts anew.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

RECIPE = "papers/adaptive/sst2"
PLAIN = "plain"

# The paper's model, made so small that a run lasts minutes on one core. A model of this size keeps nearly all tokens at
# two experts if its router starts as narrow as usual; with this deviation the shares are nearer to the paper's.
ROUTER_STD = 0.2
MODEL = (
    "model.d_model=128",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.dropout=0.2",
    "model.moe.num_experts=8",
    "model.moe.d_ff=512",
    f"model.moe.router.base.init_std={ROUTER_STD}",
    "tokenizer.vocab_size=4000",
)
SETTINGS = (
    "training.sequence_length=64",
    "learning_rate.warmup_steps=30",
    "checkpoint.keep_last=1",
    "parallel.engine=local",
)
RANKS = 8  # as many as the paper's; runs here have one, and what several would wait is worked out
SELECTION_FRACTION, MOST_SELECTED = 0.1, 1000  # the recipe's, which has the defaults

NOTE = re.compile(r"^epoch \d+: .*median ([\d.]+), .*deviation within a batch ([\d.]+) \(([\d.]+) if shuffled\)", re.M)


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        label: What the row is called.
        overrides: What differs from the plain order.
        reorders: Whether that is the order from the second epoch on, and nothing in the first.
    """

    label: str
    overrides: tuple[str, ...]
    reorders: bool = False


ARMS = (
    Arm("easy first, mean_ratio", ("curriculum.order={by: mean_ratio}",), reorders=True),
    Arm("top_k, k = 2", (f"model.moe.router={{type: top_k, softmax: before_top_k, init_std: {ROUTER_STD}}}",)),
    Arm("easy first, cosine", ("curriculum.order={by: cosine}",), reorders=True),
    Arm("sorted by length in windows of 16", ("task.length_window=16",)),
)


@dataclass(frozen=True)
class Batching:
    """The batches of a run's last epoch.

    Attributes:
        padded: Tokens with padding over real ones.
        busiest_tokens: Tokens of the busiest rank over their mean, had each step been shared out to `RANKS` ranks.
        busiest_rows: The same of expert rows, where these were counted by sample, as ordered and if shuffled.
    """

    padded: float
    busiest_tokens: float
    busiest_rows: tuple[float, float] | None = None


@dataclass(frozen=True)
class Course:
    """How a run went.

    Attributes:
        step_seconds: Of each training step.
        held_out: Steps done and held-out loss, at each validation.
        expert_rows: Steps done and token-expert pairs computed until then, at each reading.
        dev_accuracy: Of the checkpoint that was best on held-out rows.
        batching: What its batches were like.
    """

    step_seconds: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...]
    expert_rows: tuple[tuple[int, float], ...]
    dev_accuracy: float
    batching: Batching

    @property
    def best(self) -> float:
        """Lowest held-out loss."""
        return min(loss for _, loss in self.held_out)

    def steps_to(self, loss: float) -> int | None:
        """Returns the steps done at the first validation with at most this loss; None if there is none."""
        return next((step for step, found in self.held_out if found <= loss), None)

    def seconds(self, steps: int | None = None) -> float:
        """Returns the time of the first steps, or of all."""
        return sum(self.step_seconds[:steps])

    def rows(self, steps: int | None = None) -> float:
        """Returns the expert rows of the first steps, or of all; these steps must end with a reading."""
        return self.expert_rows[-1][1] if steps is None else dict(self.expert_rows)[steps]


@dataclass(frozen=True)
class Pair:
    """An arm's run and the plain run beside it.

    Attributes:
        arm: Label of the arm.
        seed: Of both.
        plain: The run in plain order.
        run: The arm's.
        first_epoch_steps: Steps that lie in the first epoch.
        deviations: Deviation of difficulty within a batch, as ordered and if shuffled, at each ordering.
    """

    arm: str
    seed: int
    plain: Course
    run: Course
    first_epoch_steps: int
    deviations: tuple[tuple[float, float], ...] = ()

    def ratios(self) -> dict[str, float]:
        """Returns the arm's costs over those of the plain run: until their equal loss, and of the whole run."""
        loss = max(self.plain.best, self.run.best)
        ours, theirs = self.run.steps_to(loss), self.plain.steps_to(loss)
        # Times are means between readings, so only those that end within the epoch are its own.
        same = max(step for step, _ in self.run.expert_rows if step <= self.first_epoch_steps)
        assert ours is not None
        assert theirs is not None
        return {
            "time_to_equal_loss": self.run.seconds(ours) / self.plain.seconds(theirs),
            "steps_to_equal_loss": ours / theirs,
            "expert_rows_to_equal_loss": self.run.rows(ours) / self.plain.rows(theirs),
            "time": self.run.seconds() / self.plain.seconds(),
            "expert_rows": self.run.rows() / self.plain.rows(),
            "time_of_first_epoch": self.run.seconds(same) / self.plain.seconds(same),
        }


def trained_rows(rows: int) -> int:
    """Returns the rows that are left to train on."""
    return rows - min(MOST_SELECTED, max(1, round(rows * SELECTION_FRACTION)))


def steps_of(options: argparse.Namespace, epochs: int) -> int:
    """Returns the steps that lie within so many epochs whole."""
    return int(trained_rows(options.rows) * epochs // options.batch_size)


def folder_of(label: str, seed: int, beside: str) -> str:
    """Returns the name of a run's folder."""
    words = re.findall(r"[A-Za-z0-9_]+", label if label != PLAIN else f"{PLAIN} beside {beside}")
    return f"{'-'.join(words)}-seed-{seed}"


def initial_overrides(path: Path) -> list[str]:
    """Returns what makes the recipe's model and tokenizer those of the weights at a path, with new routers."""
    from smoe_train.recipe import find_pretrained, flat

    found = find_pretrained(path, "best")
    model = {key: value for key, value in flat({"model": found.model}).items() if ".router." not in key}
    return [
        *(f"{key}={json.dumps(value)}" for key, value in model.items()),
        f"tokenizer={{type: saved, path: {json.dumps(str(found.tokenizer.resolve()))}}}",
        f"initialise={{path: {json.dumps(str(path.resolve()))}, router: new}}",
        f"model.moe.router.base.init_std={ROUTER_STD}",
    ]


def command_of(name: str, overrides: Sequence[str], seed: int, options: argparse.Namespace) -> list[str]:
    """Returns the command of a run."""
    steps = steps_of(options, options.epochs)
    every = max(1, steps_of(options, 1) // options.validations)
    start = initial_overrides(options.initialise) if options.initialise else MODEL
    return [
        *(sys.executable, "-m", "smoe_train.cli.app", "train", RECIPE),
        *("curriculum.order=null", *start, *SETTINGS, *overrides, *options.data),
        *(f"data.train_rows={options.rows}", f"name={name}", f"seed={seed}", f"training.max_steps={steps}"),
        *(f"training.micro_batch_size={options.batch_size}", f"training.global_batch_size={options.batch_size}"),
        *(f"learning_rate.peak={options.learning_rate}", f"reporting.log_every_steps={every}"),
        *(f"evaluation.every_steps={every}", f"checkpoint.every_steps={steps}"),
        *("--launcher", "in_process", "--output-dir", str(options.output_dir)),
    ]


def train_pair(arm: Arm, seed: int, options: argparse.Namespace) -> None:
    """Trains an arm and the plain order at the same time; nothing if both are done."""
    names = {label: folder_of(label, seed, arm.label) for label in (PLAIN, arm.label)}
    folders = [options.output_dir / name for name in names.values()]
    if all((folder / "results.json").is_file() for folder in folders):
        return
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    cores = options.cores if options.seeds.index(seed) % 2 == 0 else options.cores[::-1]
    processes = []
    for (label, name), core in zip(names.items(), cores, strict=True):
        with (options.output_dir / f"{name}.log").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                command_of(name, () if label == PLAIN else arm.overrides, seed, options),
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        os.sched_setaffinity(process.pid, {core})
        processes.append((name, process))
    failed = [f"{name}: exit code {code}" for name, process in processes if (code := process.wait())]
    if failed:
        raise SystemExit(f"{'; '.join(failed)}; see the logs in {options.output_dir}")


def batches_of(run: Path) -> Batching:
    """Returns what a run's batches were like in its last epoch, by the order that its last checkpoint holds if any."""
    import numpy as np

    from smoe_train.assembly import build_batches, prepare_data, run_tokenizer
    from smoe_train.checkpoint import Checkpoint, read_extra
    from smoe_train.checkpoint.folders import CHECKPOINTS, find_checkpoint
    from smoe_train.recipe import load_recipe

    recipe = load_recipe(str(run / "recipe.yaml"))
    batches = build_batches(recipe, prepare_data(recipe, run_tokenizer(run)), 0, 1).train
    last = recipe.training.max_steps
    whole = range(batches.first_step_of(batches.epochs_of(last - 1)[-1]) + 1, last)
    lengths_N = batches.samples.lengths()

    def busiest(rows_N: Any) -> float:
        shares = [rows_N[batches.blocks_of(step)].reshape(-1, RANKS).sum(axis=0) for step in whole]
        return float(np.mean([share.max() / share.mean() for share in shares]))

    saved = read_extra(Checkpoint.open(find_checkpoint(run / CHECKPOINTS, "latest")), "sample_order/")
    rows = None
    if saved:
        *hard_LN, tokens_N = saved["counted"].numpy().T
        # Some samples were seen twice since the epoch's order was made, so shares are taken and not counts.
        rows_N = lengths_N * (len(hard_LN) + np.sum(hard_LN, axis=0) / np.maximum(tokens_N, 1))
        shuffled = busiest(rows_N)
        batches.orders = {int(saved["epoch"]): saved["order"].numpy()}
        rows = (busiest(rows_N), shuffled)
    padded = sum(batch.input_ids_BS.numel() for step in whole for batch in batches[step])
    return Batching(padded / sum(batches.tokens_of(step) for step in whole), busiest(lengths_N), rows)


def course_of(metrics: list[dict[str, Any]], routing: list[dict[str, Any]], batching: Batching) -> Course:
    """Returns a run's course from the records of its journals."""
    rows: dict[int, float] = {}
    for record in routing:
        if record["split"] == "train":
            rows[record["step"]] = rows.get(record["step"], 0.0) + record["tokens"] * record["experts_per_token"]
    steps = sorted(rows)
    return Course(
        tuple(record["step_seconds"] for record in metrics if record["split"] == "train"),
        tuple((record["step"], record["loss"]) for record in metrics if record["split"] == "selection"),
        tuple(zip(steps, accumulate(rows[step] for step in steps), strict=True)),
        next(record["accuracy"] for record in metrics if record["split"] == "dev"),
        batching,
    )


def read_pair(arm: Arm, seed: int, options: argparse.Namespace) -> Pair:
    """Returns a finished pair."""
    names = [folder_of(label, seed, arm.label) for label in (PLAIN, arm.label)]

    def course(name: str) -> Course:
        run = options.output_dir / name
        metrics, routing = (
            [json.loads(line) for line in (run / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()]
            for kind in ("metrics", "routing")
        )
        return course_of(metrics, routing, batches_of(run))

    log = (options.output_dir / f"{names[1]}.log").read_text(encoding="utf-8")
    deviations = tuple((float(ordered), float(shuffled)) for _, ordered, shuffled in NOTE.findall(log))
    pair = Pair(arm.label, seed, course(names[0]), course(names[1]), steps_of(options, 1), deviations)
    if arm.reorders and not same_start(pair):
        raise SystemExit(f"{' and '.join(names)}: differ in the first epoch, which both have in the same order")
    return pair


def same_start(pair: Pair) -> bool:
    """Returns whether both runs had the same losses in the first epoch."""
    early = [[one for one in run.held_out if one[0] <= pair.first_epoch_steps] for run in (pair.plain, pair.run)]
    return early[0] == early[1] != []


def middle(values: Sequence[float], digits: int = 2) -> str:
    """Returns the median, and where there are several values their range."""
    text = f"{statistics.median(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def verdict(ratios: Sequence[float], noise: Sequence[float]) -> str:
    """Says what ratios of times allow to say.

    Args:
        ratios: One a seed.
        noise: Ratios that would be 1 if times were exact.
    """
    error = max((abs(one - 1.0) for one in noise), default=0.0)
    if max(ratios) < 1.0 - error:
        return "less in every seed"
    if min(ratios) > 1.0 + error:
        return "more in every seed"
    return "no gain beyond the noise"


COSTS = {
    "time to equal loss": "time_to_equal_loss",
    "steps to it": "steps_to_equal_loss",
    "expert rows to it": "expert_rows_to_equal_loss",
    "time of the whole run": "time",
    "its expert rows": "expert_rows",
}


def table(pairs: Sequence[Pair]) -> str:
    """Returns the finished pairs as a Markdown table, an arm a column."""
    plain = {pair.seed: pair.plain for pair in reversed(pairs)}
    goal = statistics.median(run.best for run in plain.values())
    noise = [pair.ratios()["time_of_first_epoch"] for pair in pairs if pair.deviations]
    columns = {PLAIN: {**dict.fromkeys(COSTS, "1"), "which is": "", **_own(list(plain.values()), goal)}}
    for label in dict.fromkeys(pair.arm for pair in pairs):
        own = [pair for pair in pairs if pair.arm == label]
        ratios = [pair.ratios() for pair in own]
        columns[label] = {
            **{name: middle([one[key] for one in ratios]) for name, key in COSTS.items()},
            "which is": verdict([one["time_to_equal_loss"] for one in ratios], noise),
            **_own([pair.run for pair in own], goal),
        }
    first, *others = COSTS
    lines = [f"| | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    names = (first, "which is", *others, *_own(list(plain.values()), goal))
    lines += [f"| {name} | {' | '.join(column[name] for column in columns.values())} |" for name in names]
    seeds = len({pair.seed for pair in pairs})
    lines += ["", f"Median over {seeds} seed{'s' if seeds > 1 else ''} (lowest to highest); ratios to the plain run."]
    if noise:
        lines.append(f"Time of the first epoch, which is the same in both orders: {middle(noise)}.")
    for label in dict.fromkeys(pair.arm for pair in pairs if pair.deviations):
        own = [pair for pair in pairs if pair.arm == label]
        told = {"deviation of difficulty within a batch": [one for pair in own for one in pair.deviations]}
        rows = [pair.run.batching.busiest_rows for pair in own]
        told[f"expert rows of the busiest of {RANKS} ranks over their mean"] = [one for one in rows if one]
        for what, found in told.items():
            ordered, shuffled = (statistics.median(values) for values in zip(*found, strict=True))
            lines.append(f"{label}, {what}: {ordered:.4f}, {shuffled:.4f} if shuffled.")
    return "\n".join(lines) + "\n"


def _own(runs: Sequence[Course], goal: float) -> dict[str, str]:
    reached = [steps for run in runs if (steps := run.steps_to(goal)) is not None]
    when = f", steps {middle(reached, 0)}" if reached else ""
    return {
        "padded / real tokens": middle([run.batching.padded for run in runs]),
        f"busiest of {RANKS} ranks / mean": middle([run.batching.busiest_tokens for run in runs]),
        "lowest held-out loss": middle([run.best for run in runs], 4),
        f"gets to {goal:.4f}": f"{len(reached)} of {len(runs)}{when}",
        "dev accuracy": middle([run.dev_accuracy for run in runs], 3),
    }


def write(pairs: Sequence[Pair], output_dir: Path) -> str:
    """Writes ``table.md`` and ``results.json``; returns the table."""
    text = table(pairs)
    (output_dir / "table.md").write_text(text, encoding="utf-8")
    values = [{**asdict(pair), "ratios": pair.ratios()} for pair in pairs]
    (output_dir / "results.json").write_text(json.dumps(values) + "\n", encoding="utf-8")
    return text


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="overrides that name the data, e.g. data.path=glue_data")
    parser.add_argument("--rows", type=int, default=8000, help="to train on and to hold out from it (a tenth)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--validations", type=int, default=6, help="an epoch")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", default=[], help="parts of labels; all arms if not given")
    parser.add_argument(
        "--initialise", type=Path, help="run or exported model to start from, instead of random weights"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/compare-curriculum"), help="one for each setting")
    options = parser.parse_args(arguments)
    if options.epochs < 2:
        parser.error("--epochs must be at least 2: the first is in plain order in all arms")
    if options.batch_size % RANKS:
        parser.error(f"--batch-size must be a multiple of {RANKS}")
    options.cores = sorted(os.sched_getaffinity(0))[:2]
    if len(options.cores) < 2:
        parser.error("two cores are needed")
    return options


def main() -> int:
    """Trains what is missing, and writes the table after each pair."""
    options = parse()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    arms = [arm for arm in ARMS if not options.only or any(part in arm.label for part in options.only)]
    if not arms:
        raise SystemExit(f"--only names none of: {'; '.join(arm.label for arm in ARMS)}")
    pairs: list[Pair] = []
    for arm in arms:
        for seed in options.seeds:
            train_pair(arm, seed, options)
            pairs.append(read_pair(arm, seed, options))
            print(f"{arm.label}, seed {seed}: {pairs[-1].ratios()}", flush=True)
            text = write(pairs, options.output_dir)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
