"""Times the loader alone beside the training steps that it feeds, and watches its memory over an epoch.

First a token store of several GB is made up in a temporary folder, dropped from the page cache (as far as the system
follows that advice), opened, and read for an epoch in each way to make samples of it, in a process of its own. Memory
is what this process holds by itself: pages of mapped files are the system's, who takes them back as needed. Then
batches of the demo recipe's shape are timed alone and beside a real training step of the demo's model (forward,
backward, AdamW) on the same batches, in interleaved rounds; each ratio is the median over rounds of tokens a second of
the loader over those of the steps. One process does the work of all the demo's ranks.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from bench_rounds import CLOCKS, conclude, require_positive, show_goals

if TYPE_CHECKING:
    from smoe_train.data import TokenStore
    from smoe_train.data.batches.loader import Samples, TrainBatches

MIN_RATIO = 50.0
MIN_FLATNESS = 0.98  # memory early in the epoch over the most later on
KINDS = ("blocks", "documents", "best_fit")
VOCABULARY = 256
CHUNK_TOKENS = 1 << 24
MEAN_DOCUMENT_TOKENS = 1000
LOADER_STEPS_PER_ROUND = 20
MEMORY_SAMPLES = 200

Result = TypeVar("Result")


@dataclass(frozen=True)
class EpochRow:
    """An epoch of the large store.

    Attributes:
        packing: How samples are made.
        samples: How many there are.
        open_ms: Time to open the store.
        prepare_s: Time to lay out samples; packing, in the case of ``best_fit``.
        first_batch_s: Time to the first batch, with the order of the whole epoch.
        tokens_per_second: Real tokens over the epoch, wall clock.
        memory_mb: Memory of the process after the first batch, above that before the store was opened.
        growth_mb: Most memory in the rest of the epoch above that of its first twentieth.
        flatness: Memory in the first twentieth over the most later on.
    """

    packing: str
    samples: int
    open_ms: float
    prepare_s: float
    first_batch_s: float
    tokens_per_second: float
    memory_mb: float
    growth_mb: float
    flatness: float


@dataclass(frozen=True)
class SpeedRow:
    """The loader alone.

    Attributes:
        samples: Their kind.
        tokens_per_second: Median over rounds, real tokens.
        ratio: Median over rounds of that over what the demo's training steps consume.
    """

    samples: str
    tokens_per_second: float
    ratio: float


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, meaning in (
        ("store-tokens", 2_000_000_000, "tokens of the large store, 2 bytes each"),
        ("sequence-length", 1024, "tokens of a sample of the large store"),
        ("batch", 64, "samples of a batch of the large store"),
        ("rounds", 9, "timed rounds"),
        ("warmup", 2, "rounds before them"),
        ("threads", 1, "threads of the training steps"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning}; default {default:,}")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="cpu", help="of the ratios: CPU time or wall clock")
    parser.add_argument(
        "--folder", type=Path, help="where to put the large store; default the system's for temporaries"
    )
    options = parser.parse_args(arguments)
    require_positive(parser, options, "sizes, rounds and threads must be at least 1")
    if options.store_tokens <= options.batch * options.sequence_length:
        parser.error("--store-tokens must be more than one batch")
    return options


@contextmanager
def large_store(options: argparse.Namespace) -> Iterator[Path]:
    """Yields the folder of a made-up token store, removed afterwards."""
    from smoe_train.data import BytesConfig, build_tokenizer, save_tokenizer
    from smoe_train.data.stores.split_writer import SplitRecord
    from smoe_train.data.stores.store_files import write_arrays, write_record
    from smoe_train.data.stores.token_store import FORMAT_VERSION, StoreRecord

    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="smoe-train-bench-", dir=options.folder) as name:
        folder, needed = Path(name), 2 * options.store_tokens
        free = shutil.disk_usage(folder).free
        if free < 2 * needed:
            sys.exit(f"{folder}: has {free:,} bytes free; the store needs {needed:,} and as many to spare (--folder)")
        lengths = generator.lognormal(np.log(MEAN_DOCUMENT_TOKENS) - 0.5, 1.0, options.store_tokens // 500)
        ends = np.cumsum(np.maximum(lengths, 1.0).astype(np.int64))
        ends = np.append(ends[ends < options.store_tokens], options.store_tokens)
        chunk = generator.integers(0, VOCABULARY, CHUNK_TOKENS, dtype=np.uint16).tobytes()
        with (folder / "train.bin").open("wb") as file:
            left = needed
            while left:
                left -= file.write(chunk[:left])
        tokenizer = build_tokenizer(BytesConfig(type="bytes"))
        save_tokenizer(tokenizer, folder / "tokenizer")
        split = SplitRecord(
            tokens=options.store_tokens,
            bytes=options.store_tokens,
            sha256="made up",
            documents=write_arrays(folder / "train.documents.bin", [ends]),
            words=None,
            unknown=None,
        )
        record = StoreRecord(
            format_version=FORMAT_VERSION,
            source="made up",
            corpus="made up",
            tokenizer=tokenizer.fingerprint,
            vocab_size=VOCABULARY,
            dtype="uint16",
            splits={"train": split},
        )
        write_record(folder, record)
        yield folder


def forget_cached_pages(folder: Path) -> None:
    """Asks the system to drop a folder's files from the page cache."""
    from smoe_train.durable import flush

    if hasattr(os, "posix_fadvise"):
        for path in folder.glob("*.bin"):
            flush(path)
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def own_memory() -> int:
    """Returns the bytes that this process holds beside pages of mapped files."""
    import psutil

    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def samples_of(store: TokenStore, packing: str, length: int) -> Samples:
    """Returns the samples of a store."""
    from smoe_train.data.batches.loader import FixedBlocks, PackedDocuments

    tokens = store.tokens("train")
    if packing == "blocks":
        return FixedBlocks(tokens, length)
    return PackedDocuments(
        tokens, store.document_ends("train"), length, "cut" if packing == "documents" else "best_fit"
    )


def epoch_row(options: argparse.Namespace, folder: Path, packing: str) -> EpochRow:
    """Opens the store and reads an epoch."""
    from smoe_train.data import TokenStore
    from smoe_train.data.batches.loader import TrainBatches

    forget_cached_pages(folder)
    before, start = own_memory(), time.perf_counter()
    store = TokenStore.open(folder)
    opened = time.perf_counter()
    samples = samples_of(store, packing, options.sequence_length)
    prepared = time.perf_counter()
    batches = TrainBatches(samples, options.batch, options.batch, seed=0)
    tokens = batches.tokens_of(0) if batches[0] else 0
    first = time.perf_counter()
    memory = [own_memory()]
    steps = batches.first_step_of(1)
    every = max(steps // MEMORY_SAMPLES, 1)
    for step, _ in enumerate(batches.steps(1, steps), start=1):
        tokens += batches.tokens_of(step)
        if step % every == 0:
            memory.append(own_memory())
    early, most = max(memory[: len(memory) // 20 + 1]), max(memory)
    return EpochRow(
        packing=packing,
        samples=batches.num_blocks,
        open_ms=1e3 * (opened - start),
        prepare_s=prepared - opened,
        first_batch_s=first - prepared,
        tokens_per_second=tokens / (time.perf_counter() - prepared),
        memory_mb=(memory[0] - before) / 1e6,
        growth_mb=(most - early) / 1e6,
        flatness=early / most,
    )


def in_new_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Returns what a function returns in a process that holds nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def made_up_examples() -> Samples:
    """Returns labelled single texts of about a sentence."""
    from smoe_train.data.batches.loader import PaddedExamples
    from smoe_train.data.stores.example_store import ExampleSplit

    generator = np.random.default_rng(1)
    sizes = np.clip(generator.lognormal(3.5, 0.7, 50_000), 1, 500).astype(np.int64)
    split = ExampleSplit(
        texts=generator.integers(0, VOCABULARY, int(sizes.sum()), dtype=np.uint16),
        offsets=np.append(0, np.repeat(np.cumsum(sizes), 2)),  # there are no second texts
        labels=generator.integers(0, 2, len(sizes)).astype(np.float64),
        index=np.arange(len(sizes)),
        separator_ids=(0,),
        pairs=False,
    )
    return PaddedExamples(split, 128, "classification")


def training_step(threads: int) -> tuple[Callable[[list[Any]], None], dict[str, int]]:
    """Returns a function that takes one step of the demo's model, and the shape of the demo's batches."""
    import torch

    from smoe_train.model import SmoeConfig, SmoeForCausalLM
    from smoe_train.recipe import load_recipe
    from smoe_train.schedules import Knobs
    from smoe_train.training.objectives import language_modelling

    torch.set_num_threads(threads)
    recipe = load_recipe("demo", ())
    config = SmoeConfig.create(recipe.model, VOCABULARY, recipe.training.sequence_length, recipe.seed)
    model = SmoeForCausalLM(config).train()
    optimizer, knobs = torch.optim.AdamW(model.parameters(), lr=1e-4), Knobs(0, recipe.model.moe.top_k)

    def take(micro_batches: list[Any]) -> None:
        optimizer.zero_grad(set_to_none=True)
        for batch in micro_batches:
            (language_modelling(model, batch, knobs, config).total / len(micro_batches)).backward()
        optimizer.step()

    training = recipe.training
    shape = {
        "sequence_length": training.sequence_length,
        "global_batch_size": training.global_batch_size,
        "micro_batch_size": training.micro_batch_size,
    }
    return take, shape


def speed_rows(options: argparse.Namespace, store: TokenStore) -> tuple[list[SpeedRow], dict[str, Any]]:
    """Times the loader beside training steps; returns a row for each kind of samples, and what the steps consume."""
    from smoe_train.data.batches.loader import FixedBlocks, PackedDocuments, TrainBatches

    take, shape = training_step(options.threads)
    length, sizes = shape["sequence_length"], (shape["global_batch_size"], shape["micro_batch_size"])
    tokens, ends = np.asarray(store.tokens("train")[:CHUNK_TOKENS]), store.document_ends("train")
    assert ends is not None
    tokens, ends = tokens[: ends[ends < len(tokens)][-1]], ends[ends < len(tokens)]
    kinds: dict[str, TrainBatches] = {
        "blocks": TrainBatches(FixedBlocks(tokens, length), *sizes, seed=0),
        "documents": TrainBatches(PackedDocuments(tokens, ends, length, "cut"), *sizes, seed=0),
        "best_fit": TrainBatches(PackedDocuments(tokens, ends, length, "best_fit"), *sizes, seed=0),
        "examples": TrainBatches(made_up_examples(), *sizes, seed=0, length_window=16),
    }
    clock, per_step = CLOCKS[options.clock], shape["global_batch_size"] * length
    speeds: dict[str, list[float]] = {name: [] for name in kinds}
    ratios: dict[str, list[float]] = {name: [] for name in kinds}
    consumed: list[float] = []
    for number in range(options.warmup + options.rounds):
        micro_batches = kinds["blocks"][number]
        start = clock()
        take(micro_batches)
        consumption = per_step / (clock() - start)
        first = number * LOADER_STEPS_PER_ROUND
        for name, batches in kinds.items():
            start, loaded = clock(), 0
            for step, _ in enumerate(batches.steps(first, first + LOADER_STEPS_PER_ROUND), start=first):
                loaded += batches.tokens_of(step)
            if number >= options.warmup:
                speeds[name].append(loaded / (clock() - start))
                ratios[name].append(speeds[name][-1] / consumption)
        if number >= options.warmup:
            consumed.append(consumption)
    rows = [SpeedRow(name, statistics.median(speeds[name]), statistics.median(ratios[name])) for name in kinds]
    return rows, {**shape, "training_tokens_per_second": statistics.median(consumed)}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures everything and returns the result as JSON holds it."""
    import torch

    from smoe_train.data import TokenStore

    with large_store(options) as folder:
        epochs = [in_new_process(epoch_row, options, folder, packing) for packing in KINDS]
        speeds, shape = speed_rows(options, TokenStore.open(folder))
    goals = {f"{row.samples}_over_training": {"value": round(row.ratio, 1), "goal": MIN_RATIO} for row in speeds}
    goals |= {f"{row.packing}_flatness": {"value": round(row.flatness, 3), "goal": MIN_FLATNESS} for row in epochs}
    settings = {key: value for key, value in vars(options).items() if key != "folder"}
    settings |= {"demo": shape, "torch": torch.__version__, "machine": platform.machine()}
    return {"goals": goals, "rows": [*map(asdict, epochs), *map(asdict, speeds)], "settings": settings}


def show(result: dict[str, Any]) -> None:
    """Prints the result as tables."""
    from rich.console import Console
    from rich.table import Table

    settings, console = result["settings"], Console()
    console.print(
        f"an epoch of {settings['store_tokens']:,} tokens ({2 * settings['store_tokens'] / 1e9:.1f} GB), batches of "
        f"{settings['batch']} x {settings['sequence_length']}",
        soft_wrap=True,
    )
    epochs = Table("packing", "samples", "open ms", "pack s", "first s", "tokens/s", "MB", "growth MB")
    speeds = Table("samples", "tokens/s", "over training")
    for row in result["rows"]:
        speed = f"{row['tokens_per_second'] / 1e6:.1f} M"
        if "packing" in row:
            times = (f"{row['open_ms']:.1f}", f"{row['prepare_s']:.2f}", f"{row['first_batch_s']:.2f}")
            memory = (f"{row['memory_mb']:.0f}", f"{row['growth_mb']:.1f}")
            epochs.add_row(row["packing"], f"{row['samples'] / 1e6:.2f} M", *times, speed, *memory)
        else:
            speeds.add_row(row["samples"], speed, f"{row['ratio']:,.0f}")
    console.print(epochs)
    demo = settings["demo"]
    console.print(
        f"batches of the demo ({demo['global_batch_size']} x {demo['sequence_length']}), of which its training steps "
        f"consume {demo['training_tokens_per_second']:,.0f} tokens/s; {settings['clock']} time, "
        f"{settings['threads']} thread(s)",
        soft_wrap=True,
    )
    console.print(speeds)
    show_goals(result["goals"], console)


def main() -> int:
    """Measures, prints, and writes the file that BENCH_JSON names."""
    options = parse()
    return conclude(options, options.threads, run, show)


if __name__ == "__main__":
    sys.exit(main())
