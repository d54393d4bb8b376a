"""Measures the memory of training on a CPU: its peak against the analytical minimum, its growth, and a large model.

``--peak`` trains three steps of each of some small models in fresh processes and compares the highest resident memory
with the estimate that ``smoe-train validate`` shows. Taken off is what the imports took, and what kernels and libraries
take, measured with a model of a few kilobytes. Building, steps and saving are told apart: each may be the highest.
Every model is trained twice: as training does, and with buffers given back to the system as soon as they are free,
which costs time and shows what is in use at once. The goal is for that; what training takes beyond it is free memory
that the C library keeps for the next step, in part in gaps that fit nothing.

``--growth`` trains a tiny model whose experts get another number of rows in every step, with validations, records,
health and checkpoints, and fits a line to resident memory, objects and open files.

``--billion`` trains the shipped recipe of a billion parameters with ``smoe-train train`` and reports the peak of that
process; it needs 20 GiB of memory, 13 GB of disk and some minutes, so it runs only if asked for.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_rounds import Goals, show_goals, write_result

from smoe_train.cli.launch import worker_environment

if TYPE_CHECKING:
    from rich.console import Console

    from smoe_train.recipe import Recipe
    from smoe_train.training.trainer import Trainer

MIB, GIB, STEPS = 2**20, 2**30, 3
PEAK_RATIO = 1.25  # of the steps, measured over analytical
GROWTH_SHARE = 0.02  # of what there is, over 10,000 steps
READINGS, WARM_UP = 10, 0.4  # readings of a run, and the share of its steps before they count: new shapes become rare
BILLION, BILLION_GIB = "scale/one_billion_e64", 20.0

GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}  # every larger buffer is mapped, and unmapped when freed
MODEL = {"d_model": 256, "num_layers": 4, "num_heads": 8, "moe": {"num_experts": 32, "d_ff": 512, "top_k": 2}}
TOY = {"d_model": 32, "num_layers": 1, "num_heads": 2, "moe": {"num_experts": 2, "d_ff": 32, "top_k": 2}}
TOY_TRAINING = {"sequence_length": 16, "micro_batch_size": 2}
LOCAL, BF16 = {"engine": "local"}, {"zero_stage": 1, "precision": "bf16"}
CONFIGURATIONS: dict[str, tuple[int, dict[str, Any]]] = {  # processes, and what is special
    "local fp32": (1, {"parallel": LOCAL}),
    "local fp32, swiglu": (1, {"parallel": LOCAL, "model": {"feed_forward": "swiglu"}}),
    "local fp32, recompute all": (1, {"parallel": LOCAL, "training": {"activation_checkpointing": "all"}}),
    "local fp32, 2 micro-batches": (1, {"parallel": LOCAL, "training": {"global_batch_size": 16}}),
    "ZeRO 0 fp32": (1, {"parallel": {"zero_stage": 0}}),
    "ZeRO 1 fp32": (1, {"parallel": {"zero_stage": 1}}),
    "ZeRO 2 fp32": (1, {"parallel": {"zero_stage": 2}}),
    "ZeRO 1 bf16": (1, {"parallel": BF16}),
    "ZeRO 1 bf16, recompute all": (1, {"parallel": BF16, "training": {"activation_checkpointing": "all"}}),
    "ZeRO 1 fp32, 2 processes, EP 2": (2, {"parallel": {"zero_stage": 1, "expert_parallel_size": 2}}),
}


@dataclass(frozen=True)
class Peak:
    """One configuration; of several processes the one that takes most.

    Attributes:
        name: Which.
        analytical_bytes: ``peak_bytes`` of the footprint.
        in_use_bytes: Highest of the steps where free buffers are given back.
        build_bytes: Highest resident memory of building model and engine, as training does.
        steps_bytes: Of the steps.
        save_bytes: Of saving a checkpoint that is waited for.
        runtime_bytes: Of a model of a few kilobytes; taken off the others.
        in_use_ratio: In use over analytical.
        ratio: Steps over analytical.
    """

    name: str
    analytical_bytes: int
    in_use_bytes: int
    build_bytes: int
    steps_bytes: int
    save_bytes: int
    runtime_bytes: int
    in_use_ratio: float
    ratio: float


@dataclass(frozen=True)
class Reading:
    """What a process holds at one step.

    Attributes:
        step: Optimizer steps taken.
        resident_bytes: Resident memory.
        objects: Python objects that the collector knows.
        open_files: File descriptors.
        seconds: Since the beginning.
    """

    step: int
    resident_bytes: int
    objects: int
    open_files: int
    seconds: float


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", action="store_true", help="peak against the analytical minimum")
    parser.add_argument("--growth", type=int, nargs="?", const=10_000, metavar="STEPS", help="default 10000 steps")
    parser.add_argument("--operators", action="store_true", help="growth with the compiled operators, not PyTorch's")
    parser.add_argument("--billion", action="store_true", help="a billion parameters within 20 GiB")
    parser.add_argument(
        "--only", action="append", metavar="NAME", choices=CONFIGURATIONS, help="of --peak, these alone"
    )
    parser.add_argument("--folder", type=Path, help="where runs are written; a temporary folder if not given")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.growth is not None and options.growth < 2 * READINGS:
        parser.error(f"--growth needs {2 * READINGS} steps at least")
    if not (options.peak or options.growth or options.billion or options.worker):
        options.peak, options.growth = True, 10_000
    return options


def line_through(readings: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Returns slope and value at 0 of the least-squares line through (x, y)."""
    count = len(readings)
    mean_x, mean_y = sum(x for x, _ in readings) / count, sum(y for _, y in readings) / count
    spread = sum((x - mean_x) ** 2 for x, _ in readings)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in readings) / spread
    return slope, mean_y - slope * mean_x


def growth_share(readings: Sequence[Reading], name: str) -> float:
    """Returns by which share of its mean a figure grows in 10,000 steps, once the run is warm."""
    warm = [one for one in readings if one.step > WARM_UP * readings[-1].step]
    values = [(float(one.step), float(getattr(one, name))) for one in warm]
    return line_through(values)[0] * 10_000 / (sum(value for _, value in values) / len(values))


def highest() -> int:
    """Returns the highest resident memory since the last call, and begins anew."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return int(status["VmHWM"].split()[0]) * 1024


def recipe_of(name: str, processes: int, steps: int, special: dict[str, dict[str, Any]]) -> Recipe:
    """Returns the recipe of a small run on CPython's documentation, with what is special about it."""
    from smoe_train.config import Layered
    from smoe_train.recipe import check_recipe

    values: dict[str, dict[str, Any]] = {
        "data": {"source": "pydocs"},
        "model": MODEL,
        "training": {
            "max_steps": steps,
            "sequence_length": 256,
            "micro_batch_size": 8,
            "global_batch_size": 8 * processes,
            "self_test": False,
        },
        "evaluation": {"every_steps": steps, "max_tokens": 2048 * processes},
        "checkpoint": {"every_steps": steps, "background": False},
    }
    merged = {key: {**values.get(key, {}), **special.get(key, {})} for key in values.keys() | special.keys()}
    return check_recipe(Layered({"version": 1, "name": name, **merged}), name, processes)


def trainer_of(recipe: Recipe, folder: Path) -> Trainer:
    """Returns a trainer of this process with a journal."""
    from smoe_train.assembly import build_trainer, open_journal, start_process

    process = start_process(recipe)
    trainer = build_trainer(recipe, process, folder)
    trainer.journal = open_journal(recipe, folder, None) if process.is_first else None
    return trainer


def work(task: dict[str, Any]) -> dict[str, int]:
    """Trains some steps in this process and returns the highest memory of each part, without that of the imports."""
    import smoe_train.assembly
    import smoe_train.reporting
    from smoe_train.training.heap import resident_bytes

    recipe = recipe_of("bench-memory", task["processes"], STEPS, task["special"])
    if recipe.parallel.engine == "deepspeed":
        import smoe_train.parallel.deepspeed_engine  # noqa: F401
    imported = resident_bytes()
    highest()
    trainer = trainer_of(recipe, Path(task["folder"]))
    found = {"build": highest() - imported}
    doing = "steps"

    def beat(phase: str | None = None) -> None:
        nonlocal doing
        begins = {"validate": "validation", "save": "save"}.get(phase or "", doing)
        if begins != doing:
            found[doing], doing = highest() - imported, begins

    trainer.beat = beat
    trainer.train()
    found[doing] = highest() - imported
    return found


def analytical_bytes(processes: int, special: dict[str, Any]) -> int:
    """Returns the footprint's peak of one process; run where torch may be loaded."""
    from smoe_train.cli.validate import plan_of

    peak: int = plan_of(recipe_of("bench-memory", processes, STEPS, special), processes)["bytes_per_rank"]["peak_bytes"]
    return peak


def train_apart(task: dict[str, Any], environment: dict[str, str]) -> dict[str, int]:
    """Runs `work` in fresh processes; returns the most that any of them took of each part."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = {"WORLD_SIZE": str(task["processes"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, __file__, "--worker", json.dumps(task)]
    workers = [
        subprocess.Popen(
            command,
            env={**os.environ, **environment, **ranks, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
        )
        for rank in range(task["processes"])
    ]
    outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit(f"{task['special']}: a worker failed; see above")
    results = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {part: max(result[part] for result in results) for part in results[0]}


def measure_peak(name: str, folder: Path, runtimes: dict[str, int]) -> Peak:
    """Runs one configuration; ``runtimes`` remembers what kernels and libraries take in each kind of process."""
    processes, special = CONFIGURATIONS[name]

    def train(changes: dict[str, Any], environment: dict[str, str]) -> dict[str, int]:
        place = tempfile.mkdtemp(dir=folder)
        return train_apart({"processes": processes, "special": changes, "folder": place}, environment)

    kind = json.dumps([processes, special["parallel"]])
    if kind not in runtimes:
        batch = {**TOY_TRAINING, "global_batch_size": 2 * processes}
        toy = {"parallel": special["parallel"], "model": TOY, "training": batch}
        runtimes[kind] = train(toy, GIVEN_BACK)["steps"]
    runtime = runtimes[kind]
    found, in_use = train(special, {}), train(special, GIVEN_BACK)["steps"] - runtime
    build, steps, save = (found[part] - runtime for part in ("build", "steps", "save"))
    least = found["analytical"]
    return Peak(name, least, in_use, build, steps, save, runtime, round(in_use / least, 3), round(steps / least, 3))


def measure_growth(steps: int, folder: Path, operators: bool = False) -> list[Reading]:
    """Trains a tiny model in this process and returns what it held every tenth of the way."""
    from smoe_train.training.heap import resident_bytes

    tiny: dict[str, dict[str, Any]] = {
        "model": {
            "d_model": 32,
            "num_layers": 2,
            "num_heads": 2,
            "moe": {
                "num_experts": 4,
                "d_ff": 64,
                "top_k": 2,
                "router": {"type": "adaptive", "threshold": 0.1, "base": {"type": "top_k"}},
            },
        },
        "training": {"max_steps": steps, "sequence_length": 32, "micro_batch_size": 8, "global_batch_size": 8},
        "evaluation": {"every_steps": max(1, steps // 20), "max_tokens": 1024},
        "checkpoint": {"every_steps": max(1, steps // 50), "keep_last": 2},
        "parallel": LOCAL,
        "performance": {"experts": "cpp", "attention": "cpp"} if operators else {},
    }
    trainer = trainer_of(recipe_of("bench-growth", 1, steps, tiny), folder)
    readings: list[Reading] = []
    began = time.perf_counter()

    def read() -> None:
        gc.collect()
        files, seconds = len(os.listdir("/proc/self/fd")), time.perf_counter() - began
        readings.append(Reading(trainer.state.step, resident_bytes(), len(gc.get_objects()), files, seconds))

    def beat(phase: str | None = None) -> None:
        if phase == "train" and trainer.state.step and trainer.state.step % (steps // READINGS) == 0:
            read()

    trainer.beat = beat
    trainer.train()
    read()
    return readings


def measure_billion(folder: Path) -> dict[str, Any]:
    """Trains the shipped recipe in a process of its own and returns its peak."""
    command, began = Path(sys.executable).with_name("smoe-train"), time.perf_counter()
    process = subprocess.Popen([str(command), "train", BILLION, "--output-dir", str(folder)])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{BILLION}: exit code {process.returncode}; see above")
    metrics = next(folder.glob("*/metrics.jsonl")).read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, metrics) if record["split"] == "train"]
    return {
        "name": BILLION,
        "peak_bytes": usage.ru_maxrss * 1024,
        "steps": len(records),
        "step_seconds": [round(record["step_seconds"], 1) for record in records],
        "losses": [record["loss"] for record in records],
        "seconds": round(time.perf_counter() - began, 1),
    }


def peak_goals(rows: Sequence[Peak]) -> Goals:
    """Returns what was to be reached, and what was."""
    return {
        f"peak in use of {row.name}, over analytical": {"value": row.in_use_ratio, "goal": PEAK_RATIO, "at_most": True}
        for row in rows
    }


def growth_goals(readings: Sequence[Reading]) -> Goals:
    """Returns what was to be reached, and what was."""
    return {
        f"growth of {name.replace('_', ' ')} over 10,000 steps": {
            "value": round(growth_share(readings, name), 5),
            "goal": GROWTH_SHARE,
            "at_most": True,
        }
        for name in ("resident_bytes", "objects", "open_files")
    }


def tables(result: dict[str, Any]) -> Iterator[Any]:
    """Yields the result's tables."""
    from rich.table import Table

    if peaks := [row for row in result["rows"] if row["part"] == "peak"]:
        parts = ("analytical", "in_use", "build", "steps", "save")
        table = Table("MiB", "analytical", "in use", "ratio", "build", "steps", "save", "ratio")
        for row in peaks:
            sizes = [f"{row[f'{part}_bytes'] / MIB:,.0f}" for part in parts]
            table.add_row(row["name"], *sizes[:2], f"{row['in_use_ratio']:.2f}", *sizes[2:], f"{row['ratio']:.2f}")
        yield table
    if readings := [row for row in result["rows"] if row["part"] == "growth"]:
        table = Table("step", "resident, MiB", "objects", "open files", "s")
        for row in readings:
            figures = (f"{row['objects']:,}", str(row["open_files"]), f"{row['seconds']:.0f}")
            table.add_row(f"{row['step']:,}", f"{row['resident_bytes'] / MIB:.1f}", *figures)
        yield table
    for row in (row for row in result["rows"] if row["part"] == "billion"):
        yield (
            f"{row['name']}: peak {row['peak_bytes'] / GIB:.2f} GiB, steps of {row['step_seconds']} s, losses "
            f"{row['losses']}, {row['seconds']} s altogether"
        )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures what was asked for and returns the result as JSON holds it."""
    rows: list[dict[str, Any]] = []
    goals: Goals = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        os.environ.setdefault("SMOE_TRAIN_CACHE", str(folder / "cache"))
        if options.billion:  # before torch is loaded here: a child's peak includes what its parent was when it began
            billion = measure_billion(folder / "billion")
            rows.append({"part": "billion", **billion})
            value = round(billion["peak_bytes"] / GIB, 2)
            goals["peak of a billion parameters, GiB"] = {"value": value, "goal": BILLION_GIB, "at_most": True}
        if options.peak:
            runtimes: dict[str, int] = {}
            peaks = [measure_peak(name, folder, runtimes) for name in options.only or CONFIGURATIONS]
            rows += [{"part": "peak", **asdict(one)} for one in peaks]
            goals |= peak_goals(peaks)
        if options.growth:
            (folder / "growth").mkdir()
            readings = measure_growth(options.growth, folder / "growth", options.operators)
            rows += [{"part": "growth", **asdict(one)} for one in readings]
            goals |= growth_goals(readings)
    return {"goals": goals, "rows": rows, "settings": {"cores": os.cpu_count(), "python": sys.version.split()[0]}}


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the result."""
    for table in tables(result):
        console.print(table)
    show_goals(result["goals"], console)


def main() -> int:
    """Measures, prints, and writes the file that BENCH_JSON names."""
    options = parse()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.update(worker_environment(1, os.environ))  # before torch is loaded
    if options.worker is not None:
        task = json.loads(options.worker)
        found = work(task)  # first of all: what follows loads more
        print(json.dumps({**found, "analytical": analytical_bytes(task["processes"], task["special"])}))
        return 0
    result = run(options)
    from rich.console import Console

    show(result, Console())
    write_result(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
