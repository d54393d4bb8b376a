"""Times what is around the experts in a training step, each part in the forms there are, interleaved in one process.

Parts: what the trainer costs over a bare loop of the same step; the optimizer's forms; attention's; the loss's; what
recomputing activations costs; and adaptive gating's saving. The model is that of `make bench-moe`. In the trainer's
part every step of a real run (loader, journal, alarms, gradient clipping) alternates with one of a loop that has
nothing but model, loss, clipping and optimizer, on the same micro-batches; validation and checkpoints are not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_rounds import (
    CLOCKS,
    Goals,
    Seconds,
    interleave,
    prepare_environment,
    show_goals,
    speed_of,
    spread_of,
    write_result,
)

if TYPE_CHECKING:
    import torch

PARTS = ("trainer", "optimizer", "attention", "loss", "recompute", "adaptive")
OVERHEAD = 0.03
SHARES = (0.25, 0.5, 0.75)  # of tokens with one expert


@dataclass(frozen=True)
class Row:
    """One form of a part.

    Attributes:
        part: Which.
        form: Which.
        median_ms: Median time.
        spread: (third - first quartile) / median.
        time: Relative to the part's first form, median over rounds of the ratio within a round.
    """

    part: str
    form: str
    median_ms: float
    spread: float
    time: float


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PARTS, help="a part; may be given several times")
    parser.add_argument("--rounds", type=int, default=15, help="rounds that count, default 15")
    parser.add_argument("--warmup", type=int, default=4, help="rounds before them, default 4")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="cpu", help="CPU time (default) or wall-clock time")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.threads, options.warmup) < 1:
        parser.error("--rounds, --warmup and --threads must be at least 1")
    return options


def trainer_part(options: argparse.Namespace) -> Seconds:
    """Returns the seconds of steps of a real run and of a bare loop, which alternate."""
    from torch import nn

    from smoe_train.assembly.build import build_trainer, open_journal, start_process
    from smoe_train.model import weighted_router_loss
    from smoe_train.recipe import load_recipe

    steps, clock = options.warmup + options.rounds, CLOCKS[options.clock]
    seconds: Seconds = {"bare_loop": [], "trainer": []}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "recipe.yaml"
        source.write_text(json.dumps(reference_recipe(steps)), encoding="utf-8")
        recipe = load_recipe(str(source))
        process = start_process(recipe)
        trainer, bare = (build_trainer(recipe, process, Path(folder) / name) for name in ("run", "bare"))
        (Path(folder) / "run").mkdir(exist_ok=True)
        trainer.journal = open_journal(recipe, Path(folder) / "run", None)
        model = bare.model.train()
        optimizer: torch.optim.Optimizer = bare.engine._optimizer  # type: ignore[attr-defined]
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate.peak

        def bare_step(micro_batches: Any) -> None:
            for batch in micro_batches:
                output = model(batch.input_ids_BS, targets=batch.labels)
                loss = output.task_loss + weighted_router_loss(output.router_losses, model.config, {})
                (loss / len(micro_batches)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        batches_of = trainer.batches.steps

        def alternating(*arguments: Any) -> Iterator[Any]:
            """Gives the trainer its steps, each behind one of the bare loop; the loader's time is the trainer's."""
            start = clock()
            for micro_batches in batches_of(*arguments):
                loading = clock() - start
                start = clock()
                bare_step(micro_batches)
                seconds["bare_loop"].append(clock() - start)
                start = clock()
                yield micro_batches
                seconds["trainer"].append(loading + clock() - start)
                start = clock()

        trainer.batches.steps = alternating  # type: ignore[method-assign, assignment]
        trainer.train()
        trainer.journal.close()
        process.stop()
    # The last step has the closing validation and checkpoint in it.
    return {name: values[: steps - 1] for name, values in seconds.items()}


def reference_recipe(steps: int) -> dict[str, Any]:
    """Returns the reference shape as a recipe over the embedded corpus."""
    return {
        "version": 1,
        "name": "bench-step",
        "data": {"source": "pydocs"},
        "model": {
            "d_model": 256,
            "num_layers": 4,
            "num_heads": 8,
            "feed_forward": "swiglu",
            "norm": "rms_norm",
            "moe": {"num_experts": 16, "d_ff": 512, "top_k": 2},
        },
        "training": {
            "max_steps": steps,
            "sequence_length": 256,
            "micro_batch_size": 8,
            "global_batch_size": 8,
            "self_test": False,
        },
        "learning_rate": {"warmup_steps": 1},
        "evaluation": {"every_steps": steps, "max_tokens": 2048},
        "checkpoint": {"every_steps": steps},
        "parallel": {"engine": "local"},
        "performance": {"experts": "cpp"},
    }


def optimizer_part(options: argparse.Namespace) -> Seconds:
    """Returns the seconds of one AdamW step over the reference model, in fp32."""
    import torch
    from bench_models import Shape, build

    def form(**arguments: Any) -> Callable[[int], None]:
        parameters = gradients_of(build(Shape(), "smoe_train"))
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, **arguments)
        return lambda number: optimizer.step()

    def deepspeed() -> Callable[[int], None]:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam(gradients_of(build(Shape(), "smoe_train")), lr=1e-4, adamw_mode=True)
        return lambda number: optimizer.step()

    forms = {
        "fused": form(fused=True),
        "foreach": form(foreach=True),
        "for_loop": form(foreach=False),
        "deepspeed_cpu_adam": deepspeed(),
    }
    return interleave(forms, options.warmup, options.rounds, options.clock)


def gradients_of(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Returns the parameters of a model with random gradients."""
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def attention_part(options: argparse.Namespace) -> Seconds:
    """Returns the seconds of attention, forward and backward, over 2,048 tokens by precision, form and length."""
    import torch

    from smoe_train.kernels import load_kernels
    from smoe_train.model.attention import Attention
    from smoe_train.model.performance import AttentionForm

    load_kernels()

    def step(length: int, form: AttentionForm, dtype: torch.dtype) -> Callable[[int], None]:
        attention = Attention(256, 8, 0).to(dtype)
        attention.form, attention.fused = form, form == "cpp"
        x = torch.randn(2048 // length, length, 256).to(dtype).requires_grad_()
        gradient = torch.randn_like(x)
        return lambda number: attention(x, None, None).backward(gradient)

    forms: tuple[AttentionForm, ...] = ("sdpa", "matmul", "cpp")
    steps = {
        f"{precision}_{form}_{length}": step(length, form, dtype)
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        for length in (128, 256, 512, 1024)
        for form in forms
    }
    return interleave(steps, options.warmup, options.rounds, options.clock)


def loss_part(options: argparse.Namespace) -> Seconds:
    """Returns the seconds of head and loss, forward and backward, in fp32 over 2,048 tokens and 32,768 words."""
    import torch
    import torch.nn.functional as F

    from smoe_train.model.causal_lm import language_model_loss
    from smoe_train.model.chunked_loss import chunked_language_model_loss

    hidden = torch.randn(1, 2048, 256).requires_grad_()
    weight = (torch.randn(32768, 256) * 0.02).requires_grad_()
    labels = torch.randint(0, 32768, (1, 2048))

    def plain(number: int) -> None:
        language_model_loss(F.linear(hidden, weight), labels).backward()

    def chunked(tokens: int) -> Callable[[int], None]:
        return lambda number: chunked_language_model_loss(hidden[0], weight, labels[0], tokens).backward()

    steps = {"all_logits": plain, **{f"chunks_of_{tokens}": chunked(tokens) for tokens in (1024, 256, 64)}}
    return interleave(steps, options.warmup, options.rounds, options.clock)


def recompute_part(options: argparse.Namespace) -> Seconds:
    """Returns the seconds of whole steps, by what is computed again in the backward pass."""
    import torch
    from bench_models import Shape, our_model, stepper

    from smoe_train.model.performance import Recompute

    def step(policy: Recompute) -> Callable[[int], None]:
        model = our_model(Shape(), {}, {"experts": "cpp"})
        model.recompute_activations(policy)
        return stepper(model, Shape(), torch.float32)

    policies: tuple[Recompute, ...] = ("none", "attention", "experts", "all")
    return interleave({policy: step(policy) for policy in policies}, options.warmup, options.rounds, options.clock)


def adaptive_part(options: argparse.Namespace) -> Seconds:
    """Returns the seconds of whole steps with one and with two experts a token, and of adaptive gating in between."""
    import torch
    from bench_models import Shape, adaptive_steppers, our_model, stepper

    from smoe_train.routing.top_k import TopKConfig
    from smoe_train.schedules import Knobs

    def plain(top_k: int) -> Callable[[int], None]:
        model = our_model(Shape(), {"router": TopKConfig(softmax="before_top_k")}, {"experts": "cpp"})
        return stepper(model, Shape(), torch.float32, lambda number: Knobs(number, top_k))

    steps = {"top_2": plain(2), "top_1": plain(1), **adaptive_steppers(Shape(), SHARES)}
    return interleave(steps, options.warmup, options.rounds, options.clock)


MEASURE: dict[str, Callable[[argparse.Namespace], Seconds]] = {
    "trainer": trainer_part,
    "optimizer": optimizer_part,
    "attention": attention_part,
    "loss": loss_part,
    "recompute": recompute_part,
    "adaptive": adaptive_part,
}


def goals_of(part: str, seconds: Seconds, rounds: int) -> Goals:
    """Returns what a part is to reach."""
    if part == "trainer":
        overhead = 1 / speed_of(seconds, "trainer", "bare_loop", rounds) - 1
        return {"trainer_overhead": {"value": round(overhead, 4), "goal": OVERHEAD, "at_most": True}}
    if part == "optimizer":
        time = 1 / speed_of(seconds, "fused", "deepspeed_cpu_adam", rounds)
        return {"fused_adamw_time_of_deepspeed_cpu_adam": {"value": round(time, 3), "goal": 1.10, "at_most": True}}
    if part == "adaptive":
        return {
            f"adaptive_{share:.0%}_top_1_saving_reached": {
                "value": round(saving(seconds, f"adaptive_{share:.0%}_top_1", share, rounds), 3),
                "goal": 0.90,
            }
            for share in SHARES
        }
    return {}


def saving(seconds: Seconds, name: str, share: float, rounds: int) -> float:
    """Returns the saving over two experts a token, relative to p (t_2 - t_1), p the share of tokens with one."""
    parts = zip(*(seconds[row][-rounds:] for row in ("top_2", "top_1", name)), strict=True)
    found = [(two, one, between) for two, one, between in parts]
    whole = statistics.median(two - one for two, one, _ in found)
    saved = statistics.median(two - between for two, _, between in found)
    return float(saved / (share * whole))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures everything and returns the result as JSON holds it."""
    import torch

    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    goals: Goals = {}
    for part in options.only or PARTS:
        print(f"{part} ...", file=sys.stderr, flush=True)
        seconds = MEASURE[part](options)
        last = min(options.rounds, len(next(iter(seconds.values()))) - 1)
        first = next(iter(seconds))
        for form, values in seconds.items():
            time = 1 / speed_of(seconds, form, first, last)
            rows.append(Row(part, form, statistics.median(values[-last:]) * 1e3, spread_of(values[-last:]), time))
        goals |= goals_of(part, seconds, last)
    settings = {**vars(options), "torch": torch.__version__, "machine": platform.machine()}
    return {"goals": goals, "rows": [asdict(row) for row in rows], "settings": settings}


def main() -> int:
    """Measures, prints, and writes the file that BENCH_JSON names."""
    options = parse()
    prepare_environment(options.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    result = run(options)
    from rich.console import Console
    from rich.table import Table

    table = Table("part", "form", "ms, median", "spread", "time")
    for row in result["rows"]:
        table.add_row(row["part"], row["form"], f"{row['median_ms']:.1f}", f"{row['spread']:.0%}", f"{row['time']:.3f}")
    console = Console()
    console.print(f"{options.threads} thread(s), {options.clock} time; time relative to a part's first form")
    console.print(table)
    show_goals(result["goals"], console)
    write_result(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
