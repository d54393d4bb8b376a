"""A transformer block: attention, then a dense or mixture-of-experts feed-forward, normalised before or after."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smoe_train.model.attention import Attention
from smoe_train.model.feed_forward import FeedForward
from smoe_train.model.moe import MoeLayer
from smoe_train.model.smoe_config import SmoeConfig
from smoe_train.routing import Context, Merged


def make_norm(config: SmoeConfig) -> nn.Module:
    """Returns a normalisation of the configured kind."""
    return nn.RMSNorm(config.d_model, eps=1e-6) if config.norm == "rms_norm" else nn.LayerNorm(config.d_model)


class Block(nn.Module):
    """One layer of the model.

    Args:
        config: The architecture.
        layer: Index of the layer.
        moe: The layer's mixture of experts, or None for a dense feed-forward.
    """

    def __init__(self, config: SmoeConfig, layer: int, moe: MoeLayer | None) -> None:
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.dropout = config.dropout
        self.attention_norm = make_norm(config)
        self.attention = Attention(config.d_model, config.num_heads, layer, config.causal)
        self.feed_forward_norm = make_norm(config)
        self.moe = moe
        kind: Any = config.feed_forward
        self.feed_forward = FeedForward(config.d_model, config.d_ff, kind) if moe is None else None
        self.recompute_attention = False
        self.recompute_feed_forward = False
        self.compiled_attend: Any = None
        self.compiled_feed: Any = None

    def forward(
        self,
        x_BSD: Tensor,
        token_ids_BS: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        allowed: Tensor | None,
        context: Context,
        cache: Any = None,
    ) -> tuple[Tensor, Merged | None]:
        """Returns the block's output [B, S, D] and, from an MoE layer, its losses and stats."""
        # Only what training runs is compiled: with a cache, or in evaluation, shapes vary too much to be worth it.
        compiled = self.training and self.compiled_attend is not None
        attend = self.compiled_attend if compiled else self._attend
        feed = self.compiled_feed if compiled else self._feed
        if self.recompute_attention and self.training:
            x_BSD, inner_BSD = checkpoint(attend, x_BSD, rotation, allowed, use_reentrant=False)
        else:
            x_BSD, inner_BSD = attend(x_BSD, rotation, allowed, cache)
        merged = None
        if self.moe is not None:
            merged = self.moe(inner_BSD.reshape(-1, inner_BSD.shape[-1]), token_ids_BS.reshape(-1), context)
            y_BSD = merged.out_TD.view(inner_BSD.shape)
        else:
            recompute = self.recompute_feed_forward and self.training
            y_BSD = checkpoint(feed, inner_BSD, use_reentrant=False) if recompute else feed(inner_BSD)
        return self._add(x_BSD, y_BSD, self.feed_forward_norm), merged

    def compile_dense_parts(self) -> None:
        """Lets training run attention, norms and a dense feed-forward as torch compiles them; experts stay as they are.

        Layers of one shape share what is compiled.
        """
        self.compiled_attend, self.compiled_feed = torch.compile(self._attend), torch.compile(self._feed)

    def _attend(
        self, x_BSD: Tensor, rotation: tuple[Tensor, Tensor] | None, allowed: Tensor | None, cache: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the stream behind the attention, and what the feed-forward is given of it."""
        inner_BSD = self.attention_norm(x_BSD) if self.pre_norm else x_BSD
        x_BSD = self._add(x_BSD, self.attention(inner_BSD, rotation, allowed, cache), self.attention_norm)
        return x_BSD, self.feed_forward_norm(x_BSD) if self.pre_norm else x_BSD

    def _feed(self, inner_BSD: Tensor) -> Tensor:
        assert self.feed_forward is not None
        y_BSD: Tensor = self.feed_forward(inner_BSD)
        return y_BSD

    def _add(self, x_BSD: Tensor, y_BSD: Tensor, norm: nn.Module) -> Tensor:
        total_BSD = x_BSD + F.dropout(y_BSD, self.dropout, self.training)
        return total_BSD if self.pre_norm else norm(total_BSD)
