"""Every registered router in its default configuration and in the variants that its options offer, at a small size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smoe_train.model.expert_bank import LocalExpertBank
from smoe_train.model.feed_forward import StackedExperts
from smoe_train.model.initialise import KeyedDraw
from smoe_train.model.moe import MoeLayer
from smoe_train.routing import ROUTERS, Context, Router, RouterConfig, RouterShape

D_MODEL, NUM_EXPERTS, D_FF, TOP_K = 16, 8, 12, 2

# Option -> values other than the default; a policy gets those that its configuration has.
VARIANTS: dict[str, tuple[Any, ...]] = {
    "softmax": ("after_top_k", "before_top_k", "before_top_k_renormalised"),
    "jitter": (0.3,),
    "bias": (True,),
    "generated_bias": (False,),
    "hypernet_scope": ("model",),
    "hyper_dim": (5,),
    "target_router_std": (0.1,),
    "distilled": ("bigram", "convolution"),
    "bias_update": ("proportional",),
    "group": ("micro_batch",),
    "max_experts_per_token": (3,),
    "bias_std": (0.5,),
    "weights_from": ("sigmoid",),
    "balance_temperature": (1.0,),
    "projection_dim": (3,),
    "projection": ("none", "mlp"),
    "similarity": ("cka_rbf",),
    "gap": ("top2_renormalised",),
    "weights": ("renormalised",),
    "balance_tokens": ("all",),
    "target_top2_share": (0.3,),
    "base": (
        {"type": "hyper_router", "hyper_hidden": 8, "generated_bias": False, "hypernet_std": 0.3},
        {"type": "x_moe"},
        {"type": "compete_smoe"},
    ),
    "preset": ("v1",),
}


@dataclass(frozen=True)
class RouterCase:
    """A policy and how its options differ from the defaults."""

    name: str
    changes: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.changes)])

    @property
    def options(self) -> RouterConfig:
        return ROUTERS.get(self.name).config(type=self.name, **dict(self.changes))

    def with_options(self, **changes: Any) -> RouterCase:
        """The same case with further options; those that the policy does not have are left out."""
        known = ROUTERS.get(self.name).config.model_fields
        kept = {key: value for key, value in changes.items() if key in known}
        return replace(self, changes=tuple({**dict(self.changes), **kept}.items()))

    def routers(self, seed: int = 0, d_model: int = D_MODEL, num_experts: int = NUM_EXPERTS) -> nn.ModuleList:
        """Two layers' routers with initial values."""
        return initialised(self.options, seed, d_model, num_experts)

    def layer(self, kind: str = "relu", seed: int = 0, num_experts: int = NUM_EXPERTS, d_ff: int = D_FF) -> MoeLayer:
        """An MoE layer with experts in this process; its values are large enough for routing to matter."""
        routers = self.routers(seed, num_experts=num_experts)

        def make(ids: range) -> StackedExperts:
            return StackedExperts(ids, D_MODEL, d_ff, kind, 0.5, 0.5)

        layer = MoeLayer(routers[0], LocalExpertBank(num_experts, make))
        layer.bank.experts.initialise(KeyedDraw(seed, "experts"))
        with torch.no_grad():
            for name, parameter in layer.bank.experts.named_parameters():
                if name.startswith("b_"):
                    parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
        return layer


def initialised(options: RouterConfig, seed: int, d_model: int, num_experts: int, num_layers: int = 2) -> nn.ModuleList:
    """The routers of a model, initialised; a policy whose defaults do not run at this size fails here, by name."""
    policy = ROUTERS.get(options.type).router
    try:
        routers = policy.build(options, RouterShape(d_model, num_experts, 7), num_layers)
        for layer, router in enumerate(routers):
            router.initialise(KeyedDraw(seed, f"layers.{layer}.moe.router"))
    except Exception as error:
        pytest.fail(
            f"router {options.type!r} cannot be built at the conformance suite's size (d_model {d_model}, "
            f"{num_experts} experts) with {options}: {error!r}. Make its defaults fit small models."
        )
    return nn.ModuleList(routers)


def all_cases() -> list[RouterCase]:
    """Every policy, default first."""
    cases = []
    for name, entry in ROUTERS.items():
        cases.append(RouterCase(name))
        for option, values in VARIANTS.items():
            if option in entry.config.model_fields:
                default = entry.config.model_fields[option].default
                cases += [RouterCase(name, ((option, value),)) for value in values if value != default]
    return cases


CASES = all_cases()
every_router = pytest.mark.parametrize("case", CASES, ids=str)

# Properties that do not hold for a policy (or for one variant of it, by the name of its case) by its nature, and why;
# what holds instead is in the policy's own tests.
EXEMPT: dict[str, dict[str, str]] = {
    # every token has exactly k slots in its assignment
    "k slots": {
        "expert_choice": "a token has as many experts as chose it",
    },
    # equal scores go to the lower experts
    "ties": {
        "expert_choice": "equal tokens go to the experts in order of tokens",
    },
    # the experts at k are the first of those at k + 1
    "nested": {
        "expert_choice": "a higher k lets experts choose more tokens, not tokens the next expert",
    },
    # at k = E the output is the mixture by softmax(logits)
    "dense mixture": {
        "x_moe-weights_from=sigmoid": "weights are sigmoids",
        "adaptive": "uses all k slots only for tokens whose probabilities are close",
        "stable_moe": "weights are sigmoids",
        "expert_choice-max_experts_per_token=3": "never has more than three experts",
    },
    # every real token visits an expert
    "visited": {
        "expert_choice": "a token that no expert chose has none",
    },
    # a token's routing depends on no other token
    "token local": {
        "expert_choice": "experts choose among the tokens of a sequence",
    },
    # the task reaches every trainable parameter of the router at k >= 2, and there are some
    "trains": {
        "smoe_dropout": "its weights are frozen",
        "random": "its weights are frozen",
        "stable_moe": "the distilled router is trained by its own loss alone",
        "sim_smoe": "the projection head is trained by the similarity loss alone",
    },
    # the load-balance loss is E * sum f P with P of softmax(logits)
    "plain balance": {
        "x_moe": "P is a softmax at a temperature of its own",
        "sim_smoe-base={'type': 'x_moe'}": "has the loss of its base",
        "adaptive": "counts only tokens with one expert in f",
    },
    # some loss trains some parameter of the router
    "trained": {
        "smoe_dropout": "its weights are frozen",
        "random": "its weights are frozen",
    },
    # later tokens change nothing
    "causal": {
        "expert_choice": "experts choose among later tokens too",
    },
    # a cache of keys and values is enough to go on
    "cache": {
        "expert_choice": "experts choose among all tokens of a sequence",
        "stable_moe-distilled=bigram": "looks at the token before, which a cache does not hold",
        "stable_moe-distilled=convolution": "looks at four tokens before",
    },
}


def holds(case: RouterCase, of: str) -> bool:
    """Whether a property is promised for a case."""
    return EXEMPT[of].keys().isdisjoint({case.name, str(case)})


def every_router_with(of: str) -> Any:
    """Parametrises over the cases for which a property is promised."""
    return pytest.mark.parametrize("case", [case for case in CASES if holds(case, of)], ids=str)


def tokens(count: int = 23, seed: int = 0, scale: float = 8.0, d_model: int = D_MODEL) -> Tensor:
    """Tokens whose routers' scores differ clearly."""
    return scale * torch.randn(count, d_model, generator=torch.Generator().manual_seed(seed))


def token_ids(count: int) -> Tensor:
    """Vocabulary ids of the same tokens."""
    return torch.arange(count) % 7


def context(top_k: int = TOP_K, training: bool = True, **changes: Any) -> Context:
    """A training pass of step 3 in layer 0."""
    return Context(**{"step": 3, "layer": 0, "top_k": top_k, "training": training, "seed": 5, **changes})


def assign(router: Router, x_TD: Tensor, ctx: Context) -> Any:
    """Assigns tokens with their usual vocabulary ids."""
    return router.assign(x_TD, token_ids(len(x_TD)), ctx)


def run(layer: MoeLayer, x_TD: Tensor, ctx: Context) -> Any:
    """Runs a layer on tokens with their usual vocabulary ids."""
    return layer(x_TD, token_ids(len(x_TD)), ctx)


def simplex(router: Router) -> bool:
    """Whether the policy promises weights that sum to 1."""
    return getattr(router.config, "softmax", None) in ("after_top_k", "before_top_k_renormalised")
