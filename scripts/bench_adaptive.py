"""Times training steps of adaptive gating by the share of tokens with two experts, beside top-1 and top-2 routing.

All rows are one model with the same initial weights: a step is forward, backward and AdamW at a learning rate of 0, so
that nothing moves and the share stays what the threshold makes it. For each share the threshold is the quantile of the
gaps that the model has on other batches; the share and the expert rows that came out are printed next to the time.
Rounds are interleaved and their order rotates; each ratio is the median over rounds of the ratio within a round, its
spread the distance of the quartiles of these ratios. The clock is CPU time unless told otherwise. One process: what
expert parallelism adds or saves is not measured.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bench_rounds import CLOCKS, add_whole_numbers, conclude, require_positive, show_goals

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from smoe_train.model import SmoeConfig, SmoeForCausalLM
    from smoe_train.schedules import Knobs

TOP_1, TOP_2 = "top_1", "top_2"
SHARES = (0.0, 0.2, 0.5, 1.0)

# Speed relative to the plain router with as many experts: what choosing may cost where it gains nothing.
GOALS = {(0.0, TOP_1): 0.90, (1.0, TOP_2): 0.95}


@dataclass(frozen=True)
class Row:
    """One way to route.

    Attributes:
        routing: Which.
        two_expert_share: Share of tokens with two experts, over all layers and timed batches.
        rows_of_top_2: Expert rows relative to two for every token.
        flops_of_top_2: FLOPs of the whole model relative to two experts for every token.
        time_of_top_1: Median over rounds of the time relative to one expert for every token.
        time_of_top_2: The same relative to two.
        spread: (third - first quartile) of the latter.
        median_ms: Median time of a step.
    """

    routing: str
    two_expert_share: float
    rows_of_top_2: float
    flops_of_top_2: float
    time_of_top_1: float
    time_of_top_2: float
    spread: float
    median_ms: float


@dataclass
class Contender:
    """A model with its optimizer, and what its steps are run with."""

    model: SmoeForCausalLM
    optimizer: torch.optim.Optimizer
    knobs: Knobs

    def step(self, ids_BS: Tensor) -> Mapping[int, Mapping[str, Tensor]]:
        """Takes one step that changes no weight; returns the routing statistics of each layer."""
        self.optimizer.zero_grad(set_to_none=True)
        output = self.model(ids_BS, labels=ids_BS, knobs=self.knobs)
        output.loss.backward()
        self.optimizer.step()
        return output.routing_stats or {}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_whole_numbers(
        parser,
        {
            "batch": 8,
            "sequence-length": 256,
            "d-model": 256,
            "d-ff": 512,
            "layers": 4,
            "experts": 16,
            "rounds": 15,
            "warmup": 3,
            "threads": 1,
        },
    )
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="cpu", help="CPU time (default) or wall-clock time")
    parser.add_argument("--markdown", action="store_true", help="print the ratios as a Markdown table")
    options = parser.parse_args(arguments)
    require_positive(parser, options, "sizes, rounds and threads must be at least 1")
    if options.experts < 2:
        parser.error("--experts must be at least 2")
    return options


def configuration(options: argparse.Namespace, router: dict[str, Any]) -> SmoeConfig:
    """Returns the model's configuration with a router."""
    from smoe_train.model import SmoeConfig

    return SmoeConfig(
        vocab_size=256,
        d_model=options.d_model,
        num_layers=options.layers,
        num_heads=max(options.d_model // 32, 1),
        max_sequence_length=options.sequence_length,
        moe_layers=list(range(options.layers)),
        num_experts=options.experts,
        d_ff_expert=options.d_ff,
        router=router,
        bos_token_id=None,
        eos_token_id=None,
    )


def batches(options: argparse.Namespace, count: int, seed: int) -> list[Tensor]:
    """Returns random token ids, a batch each."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shape = (options.batch, options.sequence_length)
    return [torch.randint(0, 256, shape, generator=generator) for _ in range(count)]


def gaps(model: SmoeForCausalLM, ids: list[Tensor]) -> Tensor:
    """Returns p_first - p_second of all tokens in all layers."""
    import torch

    from smoe_train.model.moe import MoeLayer
    from smoe_train.routing.adaptive import gaps_to_best

    found: list[Tensor] = []

    def collect(moe: MoeLayer, arguments: tuple[Any, ...]) -> None:
        p_TE = torch.softmax(moe.router.assign(*arguments).logits_TE, dim=-1)
        found.append(gaps_to_best(p_TE.topk(2).values, "full")[:, 1])

    hooks = [module.register_forward_pre_hook(collect) for module in model.modules() if isinstance(module, MoeLayer)]
    with torch.no_grad():
        for batch in ids:
            model(batch)
    for hook in hooks:
        hook.remove()
    return torch.cat(found)


def contenders(options: argparse.Namespace) -> dict[str, Contender]:
    """Returns the plain routers and adaptive gating at each share; all start from the same weights."""
    import torch

    from smoe_train.model import SmoeForCausalLM
    from smoe_train.schedules import Knobs

    def build(router: dict[str, Any]) -> tuple[SmoeForCausalLM, torch.optim.Optimizer]:
        model = SmoeForCausalLM(configuration(options, router)).train()
        return model, torch.optim.AdamW(model.parameters(), lr=0.0)

    plain = {"type": "top_k", "softmax": "before_top_k"}
    result = {name: Contender(*build(plain), Knobs(0, top_k)) for name, top_k in ((TOP_1, 1), (TOP_2, 2))}
    model, optimizer = build({"type": "adaptive"})
    quantiles = torch.tensor([share for share in SHARES if 0.0 < share < 1.0])
    sample = gaps(model, batches(options, 2, seed=1)).double().sort().values
    inner = sample[(quantiles * (len(sample) - 1)).long()].tolist()
    for share, threshold in zip(SHARES, [-1.0, *inner, 1.0], strict=True):
        result[adaptive(share)] = Contender(model, optimizer, Knobs(0, 2, threshold=threshold))
    return result


def adaptive(share: float) -> str:
    """Returns the name of a row of adaptive gating."""
    return f"adaptive_{share:.0%}"


def measure(options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Returns each row's seconds of a step, round by round, and its experts and two-expert tokens, both a token."""
    clock, rows = CLOCKS[options.clock], contenders(options)
    names = list(rows)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    counts: dict[str, list[float]] = {name: [0.0, 0.0, 0.0] for name in names}
    for number, ids_BS in enumerate(batches(options, options.warmup + options.rounds, seed=2)):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            stats = rows[name].step(ids_BS)
            elapsed = clock() - start
            if number < options.warmup:
                continue
            seconds[name].append(elapsed)
            for layer in stats.values():
                for index, key in enumerate(("slots_E", "two_expert_tokens", "tokens")):
                    counts[name][index] += float(layer[key].sum())
    return seconds, {name: [slots / tokens, two / tokens] for name, (slots, two, tokens) in counts.items()}


def ratios(seconds: dict[str, list[float]], name: str, reference: str) -> list[float]:
    """Returns a row's time relative to another's, round by round."""
    return [one / other for one, other in zip(seconds[name], seconds[reference], strict=True)]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures everything and returns the result as JSON holds it."""
    import torch

    from smoe_train.model.accounting import forward_flops

    torch.set_num_threads(options.threads)
    seconds, counts = measure(options)
    config = configuration(options, {"type": "top_k"})

    def flops(experts: float) -> float:
        return forward_flops(config, experts, options.sequence_length)

    rows = []
    for name, values in seconds.items():
        experts, share = counts[name]
        to_top_2 = ratios(seconds, name, TOP_2)
        first, _, third = statistics.quantiles(to_top_2, n=4) if len(to_top_2) > 1 else (1.0,) * 3
        rows.append(
            Row(
                routing=name,
                two_expert_share=share,
                rows_of_top_2=experts / 2,
                flops_of_top_2=flops(experts) / flops(2.0),
                time_of_top_1=statistics.median(ratios(seconds, name, TOP_1)),
                time_of_top_2=statistics.median(to_top_2),
                spread=third - first,
                median_ms=statistics.median(values) * 1e3,
            )
        )
    goals = {}
    for (share, reference), goal in GOALS.items():
        value = 1 / statistics.median(ratios(seconds, adaptive(share), reference))
        goals[f"{adaptive(share)}_speed_of_{reference}"] = {"value": round(value, 3), "goal": goal}
    settings = {**vars(options), "torch": torch.__version__, "machine": platform.machine()}
    return {"goals": goals, "rows": [asdict(row) for row in rows], "settings": settings}


def cells(row: dict[str, Any]) -> list[str]:
    """Returns a row as the table shows it, without its time in milliseconds."""
    share = f"{row['two_expert_share']:.0%}"
    names = ("rows_of_top_2", "flops_of_top_2", "time_of_top_2", "spread", "time_of_top_1")
    return [row["routing"], share, *(f"{row[name]:.2f}" for name in names)]


HEADINGS = ("routing", "two", "rows", "FLOPs", "time", "spread", "time to top_1")


def show(result: dict[str, Any]) -> None:
    """Prints the result as a table."""
    from rich.console import Console
    from rich.table import Table

    settings, console = result["settings"], Console()
    if settings["markdown"]:
        for line in (HEADINGS, ("---",) * len(HEADINGS), *map(cells, result["rows"])):
            print(f"| {' | '.join(line)} |")
        return
    names = ("batch", "sequence_length", "d_model", "d_ff", "layers", "experts", "threads")
    shape = ", ".join(f"{key} {settings[key]}" for key in names)
    console.print(f"{shape}; {settings['clock']} time; rows, FLOPs and time relative to top_2", soft_wrap=True)
    table = Table(*HEADINGS, "ms")
    for row in result["rows"]:
        table.add_row(*cells(row), f"{row['median_ms']:.0f}")
    console.print(table)
    show_goals(result["goals"], console)


def main() -> int:
    """Measures, prints, and writes the file that BENCH_JSON names."""
    options = parse()
    return conclude(options, options.threads, run, show)


if __name__ == "__main__":
    sys.exit(main())
