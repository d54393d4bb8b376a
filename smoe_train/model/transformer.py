"""SmoeModel, the transformer without a head, and what all heads share.

Shape suffixes: B batch, S sequence, T = B * S tokens, D d_model, V vocabulary, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, DynamicCache, PreTrainedModel
from transformers.utils import ModelOutput

from smoe_train.model.attention import rotary_angles, visible_keys
from smoe_train.model.block import Block, make_norm
from smoe_train.model.expert_bank import BankFactory, LocalExpertBank
from smoe_train.model.feed_forward import StackedExperts
from smoe_train.model.initialise import Initialisable, KeyedDraw, initial_names, initialise_module
from smoe_train.model.moe import MoeLayer
from smoe_train.model.performance import Recompute
from smoe_train.model.smoe_config import SmoeConfig
from smoe_train.routing import ROUTERS, Context, Router, RouterShape, StepTotals
from smoe_train.routing.contract import same_on_one_rank
from smoe_train.schedules import AFTER_TRAINING, Knobs

NO_LAYER = -1  # in the keys of step totals


@dataclass(frozen=True)
class RankReduction:
    """How routers see the other data-parallel ranks; the default is one rank alone.

    Attributes:
        sum_over_ranks: Adds a detached tensor up over the ranks.
        num_ranks: Number of ranks.
    """

    sum_over_ranks: Callable[[Tensor], Tensor] = same_on_one_rank
    num_ranks: int = 1


@dataclass
class SmoeOutput(ModelOutput):  # type: ignore[misc]
    """What the models return.

    Attributes:
        loss: Task loss plus weighted router losses, if labels were given.
        logits: [B, S, V], or the last hidden states' projection only for the positions asked for; None where the loss
            is computed without them.
        last_hidden_state: [B, S, D].
        past_key_values: The cache, if one is used.
        router_losses: Auxiliary losses by name, means over the MoE layers, without coefficients.
        routing_stats: Summable statistics of each MoE layer by layer index.
        experts_of_token: int64 [B, S], how many experts each token visited, by layer index.
        task_loss: The language model's loss without router losses, if labels or targets were given.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    router_losses: dict[str, Tensor] | None = None
    routing_stats: dict[int, Mapping[str, Tensor]] | None = None
    experts_of_token: dict[int, Tensor] | None = None
    task_loss: Tensor | None = None


class SmoePreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What all heads share: configuration, initial values keyed by name, and how ranks are seen."""

    config_class = SmoeConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]  # noqa: RUF012 - transformers reads it from the class
    _supports_sdpa = True
    supports_gradient_checkpointing = False
    _initial_names: dict[int, str] | None = None
    frozen_parts: frozenset[str] = frozenset()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # transformers takes a module whose own parameters are all loaded for loaded, and so one that has none, as a
        # router over a base. What initialises itself does so with all its parts: all of them count.
        if isinstance(module, Initialisable):
            is_custom_code = all(getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters())
        super()._initialize_weights(module, is_custom_code)

    def _init_weights(self, module: nn.Module) -> None:
        if self._initial_names is None:
            self._initial_names = initial_names(self)
        name = self._initial_names.get(id(module))
        if name is not None:  # otherwise a module around it has set its values
            name = name.removeprefix("model.")
            initialise_module(module, KeyedDraw(self.config.seed, name), self._linear_std(name))

    def _linear_std(self, name: str) -> float:
        is_output = name.endswith((".attention.out", ".feed_forward.w_out"))
        return output_std(self.config) if is_output else float(self.config.init_std)

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """Loads a model as transformers does and freezes again what the architecture freezes.

        Its loader replaces each parameter by a trainable one; an optimizer would then decay a frozen hypernetwork.
        """
        loaded = super().from_pretrained(*arguments, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        with torch.device("meta"):
            blank = dict(cls(model.config).named_parameters())
        for name, parameter in model.named_parameters():
            if name in blank and not blank[name].requires_grad:
                parameter.requires_grad_(False)
        return loaded

    def freeze(self, parts: Iterable[str]) -> None:
        """Excludes parts from training: ``router`` (which then adapts no more either), ``experts``, ``embeddings``."""
        self.frozen_parts = self.frozen_parts | set(parts)
        part = {Router: "router", StackedExperts: "experts", nn.Embedding: "embeddings"}
        # An embedding inside a router is the router's.
        of_routers = {id(below) for router in self.routers().values() for below in router.modules() if below != router}
        for module in self.modules():
            kinds = {name for kind, name in part.items() if isinstance(module, kind) and id(module) not in of_routers}
            if kinds & self.frozen_parts:
                module.requires_grad_(False)

    def recompute_activations(self, policy: Recompute = "all") -> None:
        """Chooses what is computed again in the backward pass instead of stored; ``experts`` are all feed-forwards."""
        for module in self.modules():
            if isinstance(module, Block):
                module.recompute_attention = policy in ("attention", "all")
                module.recompute_feed_forward = policy in ("experts", "all")
            elif isinstance(module, MoeLayer):
                module.recompute = policy in ("experts", "all")

    def moe_layers(self) -> dict[int, MoeLayer]:
        """Returns the MoE layers by layer index."""
        layers = self.get_submodule("model").layers if hasattr(self, "model") else self.layers
        return {index: block.moe for index, block in enumerate(layers) if block.moe is not None}

    def routers(self) -> dict[int, Router]:
        """Returns the router of each MoE layer by layer index."""
        return {index: moe.router for index, moe in self.moe_layers().items()}

    def looks_back(self) -> bool:
        """Returns whether a router needs earlier tokens, so that a cache of keys and values is not enough to go on."""
        return any(router.looks_back_tokens for router in self.routers().values())


def output_std(config: SmoeConfig) -> float:
    """Returns the initial deviation of sublayers' output projections: the residual stream starts at unit growth."""
    return float(config.init_std / math.sqrt(2 * config.num_layers))


class SmoeModel(SmoePreTrainedModel):
    """The transformer without a head.

    Args:
        config: The architecture.
        make_bank: Builds the expert bank of each MoE layer; experts in this process if not given.
    """

    def __init__(self, config: SmoeConfig, make_bank: BankFactory = LocalExpertBank) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.embed_positions = (
            nn.Embedding(config.max_sequence_length, config.d_model) if config.positions == "learned" else None
        )
        options = config.router_options()
        shape = RouterShape(config.d_model, config.num_experts, config.vocab_size)
        policy = ROUTERS.get(options.type).router
        routers = dict(
            zip(config.moe_layers, policy.build(options, shape, len(config.moe_layers)), strict=True)
            if config.moe_layers
            else ()
        )
        self.layers = nn.ModuleList(
            Block(config, layer, self._make_moe(routers[layer], make_bank) if layer in routers else None)
            for layer in range(config.num_layers)
        )
        self.norm = make_norm(config) if config.norm_position == "pre" else nn.Identity()
        self.ranks = RankReduction()
        self.post_init()

    def _make_moe(self, router: Router, make_bank: BankFactory) -> MoeLayer:
        config = self.config

        def make_experts(ids: range) -> StackedExperts:
            kind = config.feed_forward
            std = output_std(config)
            return StackedExperts(ids, config.d_model, config.d_ff_expert, kind, config.init_std, std)

        return MoeLayer(router, make_bank(config.num_experts, make_experts))

    def get_input_embeddings(self) -> nn.Module:
        """Returns the token embedding."""
        return self.embed_tokens

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        knobs: Knobs | None = None,
        sample_index: Tensor | None = None,
        step_totals: StepTotals | None = None,
        document_ids: Tensor | None = None,
        tokens_per_micro_batch: float | None = None,
        **_: Any,
    ) -> SmoeOutput:
        """Returns hidden states, router losses and routing stats.

        Args:
            input_ids: int64 [B, S].
            attention_mask: [B, past + S], nonzero for real tokens; padding is routed nowhere.
            position_ids: int64 [B, S]; counted from the mask if not given.
            past_key_values: A transformers cache of earlier tokens.
            use_cache: Whether to build a cache if none is given.
            knobs: What the step is run with; if not given, the configured k as after the end of training.
            sample_index: int64 [B], index of each sample within the global batch, the key of routing noise.
            step_totals: Sums over the step's micro-batches that router losses are functions of.
            document_ids: int64 [B, S], the number of the document that a token belongs to, rising; a token sees its own
                document alone, and positions begin anew in each. Not with a cache.
            tokens_per_micro_batch: Real tokens of the step, averaged over ranks and micro-batches, if it is known; it
                is counted for this pass otherwise, with a sum over the ranks.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if past and self.looks_back():
            raise ValueError(
                f"router {self.config.router_options().type} looks at earlier tokens, which a cache does not hold; "
                "pass the whole text, or generate with use_cache=False"
            )
        length = input_ids.shape[1]
        if position_ids is None:
            position_ids = _positions(input_ids, attention_mask, document_ids, past)
        allowed = visible_keys(attention_mask, document_ids, self.config.causal, length, past, input_ids.device)
        x_BSD = self.embed_tokens(input_ids)
        if self.embed_positions is not None:
            x_BSD = x_BSD + self.embed_positions(position_ids)
        x_BSD = F.dropout(x_BSD, self.config.dropout, self.training)
        rotation = None
        if self.config.positions == "rotary":
            width = self.config.d_model // self.config.num_heads
            rotation = rotary_angles(position_ids, width, self.config.rope_theta, x_BSD.dtype)
        mask_BS = attention_mask[:, past:] if attention_mask is not None else None
        knobs = knobs or Knobs(AFTER_TRAINING, self.config.num_experts_per_tok)
        contexts = self._contexts(input_ids, mask_BS, knobs, sample_index, step_totals, tokens_per_micro_batch)
        losses: dict[str, list[Tensor]] = {}
        stats: dict[int, Mapping[str, Tensor]] = {}
        experts_of_token: dict[int, Tensor] = {}
        for layer, block in enumerate(self.layers):
            x_BSD, merged = block(x_BSD, input_ids, rotation, allowed, contexts(layer), past_key_values)
            if merged is not None:
                stats[layer] = merged.stats
                experts_of_token[layer] = merged.experts_of_token_T.view(input_ids.shape)
                for name, value in merged.losses.items():
                    losses.setdefault(name, []).append(value)
        return SmoeOutput(
            last_hidden_state=self.norm(x_BSD),
            past_key_values=past_key_values,
            router_losses={name: torch.stack(values).mean() for name, values in losses.items()},
            routing_stats=stats,
            experts_of_token=experts_of_token,
        )

    def _contexts(
        self,
        input_ids: Tensor,
        mask_BS: Tensor | None,
        knobs: Knobs,
        sample_index: Tensor | None,
        step_totals: StepTotals | None,
        tokens_per_micro_batch: float | None,
    ) -> Callable[[int], Context]:
        """Returns the routing context of each layer; what does not depend on the layer is computed once."""
        batch, length = input_ids.shape
        if sample_index is None:
            sample_index = torch.arange(batch, device=input_ids.device)
        position = torch.arange(length, device=input_ids.device)
        token_index_T = (sample_index.unsqueeze(1) * length + position).reshape(-1)
        token_mask_T = mask_BS.reshape(-1).to(torch.bool) if mask_BS is not None else None
        tokens_per_rank = None
        if token_mask_T is not None and tokens_per_micro_batch is not None:
            tokens_per_rank = torch.full((), tokens_per_micro_batch, device=input_ids.device)
        elif token_mask_T is not None:
            real = token_mask_T.sum().to(torch.float32)
            if step_totals is None:
                tokens_per_rank = self.ranks.sum_over_ranks(real) / self.ranks.num_ranks
            else:
                total = step_totals.total((NO_LAYER, "tokens"), real, self.ranks.sum_over_ranks)
                tokens_per_rank = total / (self.ranks.num_ranks * step_totals.num_micro_batches)

        def context(layer: int) -> Context:
            return Context(
                step=knobs.step,
                layer=layer,
                top_k=knobs.top_k,
                training=self.training,
                seed=self.config.seed,
                threshold=knobs.threshold,
                competing=layer in knobs.competing_layers,
                sequence_length=length,
                token_mask_T=token_mask_T,
                token_index_T=token_index_T,
                tokens_per_rank=tokens_per_rank,
                sum_over_ranks=self.ranks.sum_over_ranks,
                num_ranks=self.ranks.num_ranks,
                step_totals=step_totals,
            )

        return context


def _positions(input_ids: Tensor, attention_mask: Tensor | None, document_BS: Tensor | None, past: int) -> Tensor:
    length = input_ids.shape[1]
    if document_BS is not None:
        place_S = torch.arange(length, device=input_ids.device)
        begins_BS = F.pad(document_BS[:, 1:] != document_BS[:, :-1], (1, 0), value=True)
        return place_S - torch.where(begins_BS, place_S, 0).cummax(dim=1).values
    if attention_mask is None:
        return torch.arange(past, past + length, device=input_ids.device).unsqueeze(0)
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, past : past + length]


def weighted_router_loss(
    losses: Mapping[str, Tensor], config: SmoeConfig, weights: Mapping[str, float]
) -> Tensor | float:
    """Returns the sum of the router losses times their coefficients: the one place where a coefficient is applied.

    Args:
        losses: By name, without coefficients.
        config: Holds the coefficients.
        weights: The curriculum's factors on them.
    """
    coefficients = {name: value * weights.get(name, 1.0) for name, value in config.loss_coefficients().items()}
    weighted = [coefficients[name] * value for name, value in losses.items() if coefficients[name] > 0.0]
    return torch.stack(weighted).sum() if weighted else 0.0


AutoConfig.register("smoe", SmoeConfig)
AutoModel.register(SmoeConfig, SmoeModel)
