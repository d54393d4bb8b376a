"""Times one mixture-of-experts layer, forward and backward, beside what it competes with, in one process.

Rows: this package's layer (router, local expert bank, merge), a dense feed-forward network of equal active FLOPs, a
loop over a ModuleList of experts, and DeepSpeed's own MoE layer without dropping. The three mixtures hold the same
weights, and their outputs are compared before anything is timed. Rounds are interleaved and their order rotates, so
that a busy machine disturbs all rows alike; each ratio is the median over rounds of the ratio within a round. The
default clock is CPU time, which other programs disturb least. Figures describe this layer on this machine, and nothing
around it: no optimizer, no communication, random tokens, a router that is not trained and therefore nearly balanced.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import Tensor, nn

DENSE, OURS, LOOP, DEEPSPEED = "dense", "smoe_train", "module_list_loop", "deepspeed_dropless"
CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}
PRECISIONS = ("fp32", "bf16")
TOLERANCE = 1e-4

# Speed relative to the row named: 1 is as fast, 0.8 takes 1 / 0.8 of its time. Measured on the layer alone, with
# nothing around it that costs the same in every row.
GOALS = {
    ("fp32", DENSE): 0.80,
    ("fp32", LOOP): 1.0,
    ("fp32", DEEPSPEED): 1.0,
    ("bf16", DENSE): 0.65,
    ("bf16", LOOP): 1.0,
    ("bf16", DEEPSPEED): 1.0,
}


@dataclass(frozen=True)
class Row:
    """One layer in one precision.

    Attributes:
        layer: Which.
        precision: Dtype of weights and tokens.
        median_ms: Median time of forward and backward.
        spread: (third - first quartile) / median.
        speed_of_dense: Median over rounds of the dense row's time divided by this row's.
    """

    layer: str
    precision: str
    median_ms: float
    spread: float
    speed_of_dense: float


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("tokens", 2048),
        ("d-model", 256),
        ("d-ff", 512),
        ("experts", 16),
        ("top-k", 2),
        ("rounds", 15),
        ("warmup", 5),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--feed-forward", choices=("relu", "gelu", "swiglu"), default="swiglu", help="default swiglu")
    parser.add_argument("--precision", choices=PRECISIONS, action="append", help="may be given twice; default both")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="cpu", help="CPU time (default) or wall-clock time")
    options = parser.parse_args(arguments)
    if min(vars(options)[name] for name in ("tokens", "d_model", "d_ff", "rounds", "threads", "top_k")) < 1:
        parser.error("sizes, rounds and threads must be at least 1")
    if options.top_k > options.experts:
        parser.error(f"--top-k {options.top_k} exceeds --experts {options.experts}")
    options.precision = tuple(dict.fromkeys(options.precision or PRECISIONS))
    return options


def prepare_environment(threads: int) -> None:
    """Sets what must be set before torch is loaded; the same as the launcher sets for training."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20000")


def build_layers(options: argparse.Namespace) -> dict[str, nn.Module]:
    """Returns the layers in fp32: three with the same router and experts, and the dense one."""
    import torch
    from deepspeed.moe.layer import MoE
    from torch import nn

    from smoe_train.model import LocalExpertBank, StackedExperts
    from smoe_train.model.feed_forward import FeedForward
    from smoe_train.model.initialise import KeyedDraw
    from smoe_train.model.moe import MoeLayer
    from smoe_train.routing import Context, RouterShape
    from smoe_train.routing.top_k import TopKConfig, TopKRouter

    d_model, d_ff, num_experts, kind = options.d_model, options.d_ff, options.experts, options.feed_forward

    class Ours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            router = TopKRouter(TopKConfig(), RouterShape(d_model, num_experts, vocab_size=256))
            router.initialise(KeyedDraw(0, "router"))
            bank = LocalExpertBank(
                num_experts, lambda ids: StackedExperts(ids, d_model, d_ff, kind, d_model**-0.5, d_ff**-0.5)
            )
            bank.experts.initialise(KeyedDraw(0, "experts"))
            self.moe = MoeLayer(router, bank)
            self.router, self.experts = router, bank.experts

        def forward(self, x_TD: Tensor) -> Tensor:
            ids_T = torch.zeros(x_TD.shape[0], dtype=torch.int64, device=x_TD.device)
            out: Tensor = self.moe(x_TD, ids_T, Context(step=0, layer=0, top_k=options.top_k, training=True)).out_TD
            return out

    class Loop(nn.Module):
        """What is written first: for each expert, find its tokens, run it on them, add the result in."""

        def __init__(self, ours: Ours) -> None:
            super().__init__()
            self.gate = nn.Linear(d_model, num_experts, bias=False)
            self.gate.load_state_dict({"weight": ours.router.weight.detach()})
            self.experts = nn.ModuleList(expert_of(ours.experts, index) for index in range(num_experts))

        def forward(self, x_TD: Tensor) -> Tensor:
            logits_TE = torch.nn.functional.linear(x_TD.float(), self.gate.weight.float())
            best_TK, ids_TK = torch.topk(logits_TE, options.top_k)
            weights_TK = torch.softmax(best_TK, dim=-1).to(x_TD.dtype)
            out_TD = torch.zeros_like(x_TD)
            for index, expert in enumerate(self.experts):
                token, slot = torch.where(ids_TK == index)
                out_TD.index_add_(0, token, expert(x_TD[token]) * weights_TK[token, slot].unsqueeze(1))
            return out_TD

    def expert_of(stacked: StackedExperts, index: int) -> FeedForward:
        expert = FeedForward(d_model, d_ff, kind)
        with torch.no_grad():
            for name, value in stacked.named_parameters():
                linear = getattr(expert, f"w_{name[2:]}")
                (linear.bias if name.startswith("b_") else linear.weight).copy_(value[index].t())
        return expert

    ours = Ours()
    loop = Loop(ours)
    theirs = MoE(
        d_model,
        expert_of(ours.experts, 0),
        num_experts,
        k=options.top_k,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    theirs.set_deepspeed_parallelism()
    theirs.deepspeed_moe.gate.wg.load_state_dict(loop.gate.state_dict())
    for own, expert in zip(loop.experts, theirs.deepspeed_moe.experts.deepspeed_experts, strict=True):
        expert.load_state_dict(own.state_dict())

    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = theirs

        def forward(self, x_TD: Tensor) -> Tensor:
            out: Tensor = self.moe(x_TD)[0]
            return out

    return {DENSE: FeedForward(d_model, options.top_k * d_ff, kind), OURS: ours, LOOP: loop, DEEPSPEED: Theirs()}


def check_agreement(layers: dict[str, nn.Module], x_TD: Tensor) -> float:
    """Returns the largest difference between the mixture layers' outputs, relative to the largest output.

    Raises:
        SystemExit: It is more than rounding: the layers would not do the same work.
    """
    import torch

    with torch.no_grad():
        outputs = {name: layer(x_TD) for name, layer in layers.items() if name != DENSE}
    expected = outputs[OURS]
    worst = max(float((value - expected).abs().max() / expected.abs().max()) for value in outputs.values())
    if not worst < TOLERANCE:
        raise SystemExit(f"the layers disagree by {worst:.1e} of the largest output; the comparison would be void")
    return worst


def measure(layers: dict[str, nn.Module], options: argparse.Namespace, dtype: torch.dtype) -> dict[str, list[float]]:
    """Returns each layer's seconds of forward and backward, round by round."""
    import torch

    clock, names = CLOCKS[options.clock], list(layers)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    generator = torch.Generator().manual_seed(1)
    for number in range(options.warmup + options.rounds):
        # Fresh tokens each round: with the same ones the experts' row counts would repeat, which no training does.
        x_TD, grad_TD = (torch.randn(options.tokens, options.d_model, generator=generator).to(dtype) for _ in range(2))
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            layers[name].zero_grad(set_to_none=True)
            leaf_TD = x_TD.clone().requires_grad_()
            start = clock()
            layers[name](leaf_TD).backward(grad_TD)
            elapsed = clock() - start
            if number >= options.warmup:
                seconds[name].append(elapsed)
    return seconds


def relative_speed(seconds: dict[str, list[float]], reference: str, name: str) -> float:
    """Returns the median over rounds of the reference's time divided by the named row's."""
    return statistics.median(a / b for a, b in zip(seconds[reference], seconds[name], strict=True))


def rows_of(seconds: dict[str, list[float]], precision: str) -> list[Row]:
    """Returns one row a layer."""
    rows = []
    for name, values in seconds.items():
        median = statistics.median(values)
        first, _, third = statistics.quantiles(values, n=4) if len(values) > 1 else (median,) * 3
        rows.append(Row(name, precision, median * 1e3, (third - first) / median, relative_speed(seconds, DENSE, name)))
    return rows


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures everything and returns the result as JSON holds it."""
    import torch

    from smoe_train.parallel.process import Process

    torch.set_num_threads(options.threads)
    process = Process.start()
    layers = build_layers(options)
    difference = check_agreement(layers, torch.randn(options.tokens, options.d_model))
    rows: list[Row] = []
    goals: dict[str, dict[str, float]] = {}
    for precision in options.precision:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        seconds = measure({name: layer.to(dtype) for name, layer in layers.items()}, options, dtype)
        rows += rows_of(seconds, precision)
        for (goal_precision, reference), goal in GOALS.items():
            if goal_precision == precision:
                value = relative_speed(seconds, reference, OURS)
                goals[f"{precision}_speed_of_{reference}"] = {"value": round(value, 3), "goal": goal}
    process.stop()
    settings = {**vars(options), "torch": torch.__version__, "machine": platform.machine(), "agreement": difference}
    return {"goals": goals, "rows": [asdict(row) for row in rows], "settings": settings}


def show(result: dict[str, Any]) -> None:
    """Prints the result as a table."""
    from rich.console import Console
    from rich.table import Table

    settings = result["settings"]
    console = Console()
    shape = ", ".join(f"{key} {settings[key]}" for key in ("tokens", "d_model", "d_ff", "experts", "top_k"))
    console.print(
        f"{shape}, {settings['feed_forward']}; {settings['threads']} thread(s), {settings['clock']} time",
        soft_wrap=True,
    )
    table = Table("layer", "precision", "ms, median", "spread", "speed of dense")
    for row in result["rows"]:
        cells = (f"{row['median_ms']:.1f}", f"{row['spread']:.0%}", f"{row['speed_of_dense']:.2f}")
        table.add_row(row["layer"], row["precision"], *cells)
    console.print(table)
    show_goals(result["goals"], console)


def show_goals(goals: dict[str, dict[str, float]], console: Console) -> None:
    """Prints for each goal what was reached."""
    for name, item in goals.items():
        verdict = "reached" if item["value"] >= item["goal"] else "missed"
        console.print(f"goal {name}: {item['value']:.2f} (at least {item['goal']:.2f}): {verdict}")


def write_result(result: dict[str, Any]) -> None:
    """Writes the file that BENCH_JSON names, if it does."""
    target = os.environ.get("BENCH_JSON")
    if target:
        Path(target).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Measures, prints, and writes the file that BENCH_JSON names."""
    options = parse()
    prepare_environment(options.threads)
    result = run(options)
    show(result)
    write_result(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
