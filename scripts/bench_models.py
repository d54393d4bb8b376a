"""The rows of the benchmarks: whole models that differ in the mixture-of-experts layer alone, and how each is stepped.

All but transformers' own models have this package's transformer around the layer, in the same initial state. Weights of
peers' layers are copies of this package's, so that their outputs can be compared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_train.model import LocalExpertBank, SmoeConfig, SmoeForCausalLM
from smoe_train.model.causal_lm import language_model_loss
from smoe_train.model.config import ModelConfig, MoeConfig
from smoe_train.model.feed_forward import FeedForward, FeedForwardKind, StackedExperts
from smoe_train.model.performance import PerformanceConfig, apply_performance
from smoe_train.routing import Context, Merged
from smoe_train.routing.compete_smoe import CompeteSmoeConfig
from smoe_train.routing.hyper_router import HyperRouterConfig
from smoe_train.routing.sim_smoe import SimSmoeConfig
from smoe_train.schedules import Knobs
from smoe_train.training.config import OptimizerConfig
from smoe_train.training.optimizer import make_optimizer, parameter_groups

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Shape:
    """What all rows have in common.

    Attributes:
        tokens: Of one step, in sequences of ``sequence_length``.
    """

    tokens: int = 2048
    sequence_length: int = 256
    d_model: int = 256
    num_heads: int = 8
    num_layers: int = 4
    d_ff: int = 512
    experts: int = 16
    top_k: int = 2
    feed_forward: FeedForwardKind = "swiglu"
    vocab_size: int = 2048

    def config(self, dense: bool = False, **moe: Any) -> SmoeConfig:
        """Returns our model's configuration, or that of its dense twin of equal active FLOPs."""
        section = MoeConfig(
            layers=() if dense else "all",
            num_experts=self.experts,
            d_ff=self.d_ff,
            top_k=self.top_k,
            load_balance_coefficient=0.0,
            **moe,
        )
        model = ModelConfig(
            d_model=self.d_model,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            d_ff=self.top_k * self.d_ff if dense else None,
            feed_forward=self.feed_forward,
            norm="rms_norm",
            tie_embeddings=False,
            moe=section,
        )
        return SmoeConfig.create(model, self.vocab_size, self.sequence_length, seed=0)


class PeerLayer(nn.Module):
    """A peer's layer where ours would be: takes its place in a block."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_TD: Tensor, token_ids_T: Tensor, context: Context) -> Merged:
        """Returns the layer's output as ours would come."""
        out: Any = self.layer(x_TD)
        return Merged(out, torch.zeros_like(token_ids_T), {}, {})


class Oracle(nn.Module):
    """Perfectly balanced experts on fixed segments: E sets of weights, batched products, no router, no dispatch."""

    def __init__(self, experts: StackedExperts, top_k: int) -> None:
        super().__init__()
        self.experts, self.top_k = experts, top_k

    def forward(self, x_TD: Tensor) -> Tensor:
        """Gives every expert T * K / E rows."""
        e, kind = self.experts, self.experts.kind
        x_ERD = x_TD.repeat(self.top_k, 1).view(len(e.expert_ids), -1, x_TD.shape[1])
        hidden = torch.bmm(x_ERD, e.w_in)
        if kind == "swiglu":
            y = torch.bmm(F.silu(torch.bmm(x_ERD, e.w_gate)) * hidden, e.w_out)
        else:
            act = F.relu if kind == "relu" else F.gelu
            y = torch.bmm(act(hidden + e.b_in.unsqueeze(1)), e.w_out) + e.b_out.unsqueeze(1)
        return y.view(self.top_k, *x_TD.shape).sum(0)


class Routed(nn.Module):
    """A trained router in front of a peer's experts."""

    def __init__(self, router: nn.Module, top_k: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(router.weight.detach().clone())  # type: ignore[operator]
        self.top_k = top_k

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns weights and ids [T, K]."""
        best_TK, ids_TK = torch.topk(F.linear(x_TD.float(), self.gate.float()), self.top_k)
        return torch.softmax(best_TK, dim=-1).to(x_TD.dtype), ids_TK


class Loop(Routed):
    """What is written first: for each expert, find its tokens, run it on them, add the result in."""

    def __init__(self, router: nn.Module, experts: StackedExperts, top_k: int) -> None:
        super().__init__(router, top_k)
        self.experts = nn.ModuleList(expert_of(experts, index) for index in range(len(experts.expert_ids)))

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TK, ids_TK = self.route(x_TD)
        out_TD = torch.zeros_like(x_TD)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(ids_TK == index)
            out_TD = out_TD.index_add(0, token, expert(x_TD[token]) * weights_TK[token, slot].unsqueeze(1))
        return out_TD


class AutoEpExperts(Routed):
    """DeepSpeed AutoEP's experts behind a plain sort and index_add: the layer, not AutoEP's engine."""

    def __init__(self, router: nn.Module, experts: StackedExperts, top_k: int) -> None:
        super().__init__(router, top_k)
        from deepspeed.moe.ep_experts import GroupedExperts

        num, d_model, d_ff = experts.w_in.shape
        self.experts = GroupedExperts(d_model, d_ff, num)
        with torch.no_grad():
            for theirs, ours in (("w1", experts.w_gate), ("w3", experts.w_in), ("w2", experts.w_out)):
                getattr(self.experts, theirs).copy_(ours.transpose(1, 2))

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TK, ids_TK = self.route(x_TD)
        order_N = torch.argsort(ids_TK.flatten(), stable=True)
        counts_E = torch.bincount(ids_TK.flatten(), minlength=self.experts.num_experts)
        token_N = order_N // self.top_k
        y_ND = self.experts(x_TD[token_N], counts_E) * weights_TK.flatten()[order_N].unsqueeze(1)
        return torch.zeros_like(x_TD).index_add(0, token_N, y_ND)


class DeepSpeedLayer(nn.Module):
    """DeepSpeed's own layer, without dropping or at capacity factor 1."""

    def __init__(self, router: nn.Module, experts: StackedExperts, top_k: int, drop_tokens: bool) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        num, d_model, _ = experts.w_in.shape
        self.moe = MoE(
            d_model,
            expert_of(experts, 0),
            num,
            k=top_k,
            drop_tokens=drop_tokens,
            capacity_factor=1.0,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        self.moe.set_deepspeed_parallelism()
        self.moe.deepspeed_moe.gate.wg.load_state_dict({"weight": router.weight.detach()})  # type: ignore[operator]
        for index, expert in enumerate(self.moe.deepspeed_moe.experts.deepspeed_experts):
            expert.load_state_dict(expert_of(experts, index).state_dict())

    def forward(self, x_TD: Tensor) -> Tensor:
        out: Tensor = self.moe(x_TD)[0]
        return out


class TransformersBlock(nn.Module):
    """Mixtral's block of transformers."""

    def __init__(self, router: nn.Module, experts: StackedExperts, top_k: int, form: str) -> None:
        super().__init__()
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        num, d_model, d_ff = experts.w_in.shape
        config = _mixtral(d_model, d_ff, num, top_k, form)
        self.block = MixtralSparseMoeBlock(config)
        with torch.no_grad():
            self.block.gate.weight.copy_(router.weight)
            gate_up = torch.cat([experts.w_gate, experts.w_in], dim=2)
            self.block.experts.gate_up_proj.copy_(gate_up.transpose(1, 2))
            self.block.experts.down_proj.copy_(experts.w_out.transpose(1, 2))

    def forward(self, x_TD: Tensor) -> Tensor:
        out = self.block(x_TD.unsqueeze(0))
        y: Tensor = out[0] if isinstance(out, tuple) else out
        return y.view_as(x_TD)


def _mixtral(d_model: int, d_ff: int, num_experts: int, top_k: int, form: str, **further: Any) -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
        experts_implementation=form,
        **further,
    )


def expert_of(stacked: StackedExperts, index: int) -> FeedForward:
    """Returns one of the stacked experts as a module of its own."""
    _, d_model, d_ff = stacked.w_in.shape
    expert = FeedForward(d_model, d_ff, stacked.kind)
    with torch.no_grad():
        for name, value in stacked.named_parameters():
            linear = getattr(expert, f"w_{name[2:]}")
            (linear.bias if name.startswith("b_") else linear.weight).copy_(value[index].t())
    return expert


PEERS: dict[str, Callable[[Any, StackedExperts, int], nn.Module]] = {
    "oracle": lambda router, experts, top_k: Oracle(experts, top_k),
    "module_list_loop": Loop,
    "deepspeed_dropless": lambda router, experts, k: DeepSpeedLayer(router, experts, k, drop_tokens=False),
    "deepspeed_capacity_1": lambda router, experts, k: DeepSpeedLayer(router, experts, k, drop_tokens=True),
    "deepspeed_autoep_experts": AutoEpExperts,
    "mixtral_block_eager": lambda router, experts, k: TransformersBlock(router, experts, k, "eager"),
    "mixtral_block_grouped": lambda router, experts, k: TransformersBlock(router, experts, k, "grouped_mm"),
}
SAME_RESULT = frozenset(PEERS) - {"oracle", "deepspeed_capacity_1"}
NEED_SWIGLU = frozenset({"deepspeed_autoep_experts", "mixtral_block_eager", "mixtral_block_grouped"})
WHOLE_MODELS = ("mixtral_eager", "mixtral_grouped", "olmoe_eager", "olmoe_grouped")
OURS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # options of the MoE section, and forms
    "smoe_train_torch": ({}, {"experts": "torch"}),
    "smoe_train": ({}, {"experts": "cpp"}),
    "smoe_train_attention": ({}, {"experts": "cpp", "attention": "auto"}),
    "smoe_train_compiled": ({}, {"experts": "cpp", "attention": "auto", "compile": True}),
    "policy_hyper_router": ({"router": HyperRouterConfig()}, {"experts": "cpp"}),
    "policy_sim_smoe": ({"router": SimSmoeConfig()}, {"experts": "cpp"}),
    "policy_compete_smoe": ({"router": CompeteSmoeConfig()}, {"experts": "cpp"}),
    "policy_all_experts": ({}, {"experts": "cpp"}),
}


FORMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense_attention": {"attention": "auto"},
    "dense_compiled": {"attention": "auto", "compile": True},
}


def knobs_of(name: str, shape: Shape) -> Callable[[int], Knobs] | None:
    """Returns what a row's steps are run with, where it is not the configured k.

    ``policy_compete_smoe`` competes in every layer of every step, and ``policy_all_experts`` sends every token to every
    expert, which is the work of a contest by its formula.
    """
    if name == "policy_all_experts":
        return lambda step: Knobs(step, shape.experts)
    if name == "policy_compete_smoe":
        return lambda step: Knobs(step, shape.top_k, competing_layers=frozenset(range(shape.num_layers)))
    return (lambda step: Knobs(step, shape.top_k)) if name.startswith("policy_") else None


def our_model(shape: Shape, moe: dict[str, Any], forms: dict[str, Any], dense: bool = False) -> SmoeForCausalLM:
    """Returns our model in the given forms."""
    model = SmoeForCausalLM(shape.config(dense, **moe), LocalExpertBank)
    apply_performance(model, PerformanceConfig(**forms), "cpu")
    return model


def peer_model(shape: Shape, name: str) -> SmoeForCausalLM:
    """Returns our transformer with a peer's layers in it, weights copied from ours."""
    model = our_model(shape, {}, {})
    for block in model.model.layers:
        ours: Any = block.moe
        block.moe = PeerLayer(PEERS[name](ours.router, ours.bank.experts, shape.top_k))
    return model


def whole_model(shape: Shape, name: str) -> nn.Module:
    """Returns one of transformers' models."""
    from transformers import MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM

    family, form = name.split("_")
    options = {
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_heads,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.sequence_length,
        "use_cache": False,
    }
    form = "grouped_mm" if form == "grouped" else form
    if family == "mixtral":
        config = _mixtral(shape.d_model, shape.d_ff, shape.experts, shape.top_k, form, **options)
        mixtral: nn.Module = MixtralForCausalLM(config)
        return mixtral
    config = OlmoeConfig(
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        experts_implementation=form,
        pad_token_id=None,
        **options,
    )
    olmoe: nn.Module = OlmoeForCausalLM(config)
    return olmoe


def build(shape: Shape, name: str) -> nn.Module:
    """Returns the row's model in fp32."""
    torch.manual_seed(0)
    if name.startswith("dense"):
        return our_model(shape, {}, FORMS.get(name, {}), dense=True)
    if name in OURS:
        return our_model(shape, *OURS[name])
    return peer_model(shape, name) if name in PEERS else whole_model(shape, name)


def check_agreement(shape: Shape, names: list[str]) -> float:
    """Returns the largest difference between the layers' outputs, relative to the largest output, in fp32.

    Raises:
        SystemExit: It is more than rounding: the layers would not do the same work.
    """
    block: Any = our_model(shape, {}, {"experts": "cpp", "attention": "cpp"}).model.layers[0]
    layer, attention = block.moe, block.attention
    layer.bank.experts.fused = attention.fused = False
    x_TD, ids_T = torch.randn(shape.tokens, shape.d_model), torch.zeros(shape.tokens, dtype=torch.int64)
    x_BSD = x_TD.view(-1, shape.sequence_length, shape.d_model)
    context = Context(step=0, layer=0, top_k=shape.top_k, training=True)
    with torch.no_grad():
        expected, attended = layer(x_TD, ids_T, context).out_TD, attention(x_BSD, None, None)
        layer.bank.experts.fused = attention.fused = True
        pairs = {"smoe_train_attention": (attention(x_BSD, None, None), attended)}
        pairs["smoe_train"] = (layer(x_TD, ids_T, context).out_TD, expected)
        for name in SAME_RESULT & set(names):
            pairs[name] = (PEERS[name](layer.router, layer.bank.experts, shape.top_k)(x_TD), expected)
    worst = 0.0
    for name, (value, reference) in pairs.items():
        difference = float((value - reference).abs().max() / reference.abs().max())
        if not difference < TOLERANCE:
            raise SystemExit(f"{name} disagrees by {difference:.1e} of the largest output; comparing would be void")
        worst = max(worst, difference)
    return worst


def stepper(
    model: nn.Module, shape: Shape, dtype: torch.dtype, knobs: Callable[[int], Knobs] | None = None
) -> Callable[[int], None]:
    """Returns what runs one training step: forward, backward and AdamW, on fresh random tokens each time.

    Args:
        model: In fp32; it is cast. Optimizer states have the weights' dtype.
        shape: Of the batch.
        dtype: Of weights and activations.
        knobs: What our model's step is run with, by round; None for the configured k.
    """
    model.to(dtype).train()
    ours = isinstance(model, SmoeForCausalLM)
    config = OptimizerConfig()
    groups = parameter_groups(model, config) if ours else [{"params": list(model.parameters()), "weight_decay": 0.1}]
    optimizer = make_optimizer(groups, config)
    for group in optimizer.param_groups:
        group["lr"] = 1e-5  # routing stays what it is at first, nearly balanced
    batch = shape.tokens // shape.sequence_length

    def step(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        size = (batch, shape.sequence_length + 1)
        text = torch.randint(0, shape.vocab_size, size, generator=generator)
        ids, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        if ours:
            loss = model(ids, targets=labels, knobs=None if knobs is None else knobs(number)).task_loss
        else:
            loss = language_model_loss(model(ids).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def adaptive_steppers(shape: Shape, shares: tuple[float, ...]) -> dict[str, Callable[[int], None]]:
    """Returns steps of adaptive gating of which a share of the tokens has one expert, the others two, by row.

    The threshold of each is the quantile of the gaps between the two best probabilities that the model has at first;
    its learning rate is small enough to leave them there.
    """
    from smoe_train.routing.adaptive import AdaptiveConfig, gaps_to_best

    steps = {}
    for share in shares:
        model = our_model(shape, {"router": AdaptiveConfig()}, {"experts": "cpp"})
        gaps: list[Tensor] = []

        def collect(moe: nn.Module, arguments: tuple[Any, ...], gaps: list[Tensor] = gaps) -> None:
            router: Any = moe.router
            p_TE = torch.softmax(router.assign(*arguments).logits_TE, dim=-1)
            gaps.append(gaps_to_best(p_TE.topk(2).values, "full")[:, 1])

        hooks = [block.moe.register_forward_pre_hook(collect) for block in model.model.layers]  # type: ignore[union-attr]
        with torch.no_grad():
            model.train()(torch.randint(0, shape.vocab_size, (shape.tokens // shape.sequence_length, 256)))
        for hook in hooks:
            hook.remove()
        threshold = float(torch.cat(gaps).double().quantile(1.0 - share))

        def knobs(number: int, threshold: float = threshold) -> Knobs:
            return Knobs(number, shape.top_k, threshold=threshold)

        steps[f"adaptive_{share:.0%}_top_1"] = stepper(model, shape, torch.float32, knobs)
    return steps
