"""Self-attention in the configured form, with rotary positions and a key-value cache.

Shape suffixes: B batch, S sequence, D d_model, H heads, W head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_train import kernels
from smoe_train.model.performance import AttentionForm


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        d_model: D.
        num_heads: H.
        layer: Index of the layer, its place in a key-value cache.
        causal: Whether a token sees only itself and those before it.

    Attributes:
        form: How it is computed.
        fused: Whether the operator of `smoe_train.kernels`, which must be loaded, does it where it can.
    """

    def __init__(self, d_model: int, num_heads: int, layer: int, causal: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.layer = layer
        self.causal = causal
        self.form: AttentionForm = "sdpa"
        self.fused = False
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self, x_BSD: Tensor, rotation: tuple[Tensor, Tensor] | None, allowed: Tensor | None, cache: Any = None
    ) -> Tensor:
        """Returns the attended values [B, S, D].

        Args:
            x_BSD: Input.
            rotation: Cosine and sine of the rotary angles [B, S, W], or None.
            allowed: Boolean [B, 1, S, keys], True where a query may look; None if only causality restricts it.
            cache: A transformers cache to extend, or None.
        """
        batch, length, d_model = x_BSD.shape
        q, k, v = self.qkv(x_BSD).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        if self.fused and kernels.attends(q, k, v, allowed):
            y_BHSW = kernels.attend(q, k, v, self.causal)
        elif self.form == "matmul" or (self.form == "auto" and _matmul_is_faster(q)):
            y_BHSW = matmul_attention(q, k, v, allowed, self.causal)
        else:
            causal = self.causal and allowed is None
            y_BHSW = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal)
        y_BSD: Tensor = self.out(y_BHSW.transpose(1, 2).reshape(batch, length, d_model))
        return y_BSD


def matmul_attention(q_BHSW: Tensor, k_BHKW: Tensor, v_BHKW: Tensor, allowed: Tensor | None, causal: bool) -> Tensor:
    """Attention by two batched products and a softmax over the whole score matrix [B, H, S, keys].

    In bf16 scores and probabilities are rounded to bf16, which fused kernels keep in fp32.

    Args:
        q_BHSW: Queries.
        k_BHKW: Keys.
        v_BHKW: Values.
        allowed: Boolean, broadcast to the scores; True where a query may look; None if only causality restricts it.
        causal: Without ``allowed``: whether a token sees only itself and those before it.
    """
    scores = (q_BHSW * q_BHSW.shape[-1] ** -0.5) @ k_BHKW.transpose(-1, -2)
    if allowed is None and causal:
        length = q_BHSW.shape[2]
        allowed = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
    if allowed is not None:
        bias = torch.zeros(allowed.shape, dtype=scores.dtype, device=scores.device)
        scores = scores + bias.masked_fill(~allowed, float("-inf"))
    y_BHSW: Tensor = scores.softmax(dim=-1) @ v_BHKW
    return y_BHSW


MATMUL_ATTENTION_TOKENS = 512  # measured: on the CPU in bf16 two to three times as fast up to here, equal at 1,024


def _matmul_is_faster(q_BHSW: Tensor) -> bool:
    low = q_BHSW.dtype in (torch.bfloat16, torch.float16)
    return low and q_BHSW.device.type == "cpu" and q_BHSW.shape[2] <= MATMUL_ATTENTION_TOKENS


def rotary_angles(position_ids_BS: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine [B, S, W] of RoFormer's angles (arXiv 2104.09864), computed in fp32."""
    exponents = torch.arange(0, width, 2, device=position_ids_BS.device, dtype=torch.float32) / width
    angles = position_ids_BS.unsqueeze(-1).to(torch.float32) * theta**-exponents
    angles_BSW = torch.cat([angles, angles], dim=-1)
    return angles_BSW.cos().to(dtype), angles_BSW.sin().to(dtype)


def rotate(x_BHSW: Tensor, cos_BSW: Tensor, sin_BSW: Tensor) -> Tensor:
    """Turns each pair (w, w + W/2) of the head width by its angle."""
    first, second = x_BHSW.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x_BHSW * cos_BSW.unsqueeze(1) + turned * sin_BSW.unsqueeze(1)


def visible_keys(
    attention_mask: Tensor | None,
    document_BS: Tensor | None,
    causal: bool,
    length: int,
    past: int,
    device: torch.device,
) -> Tensor | None:
    """Returns which keys each query may see, boolean [B or 1, 1, S, keys], or None where the kernel needs no mask.

    Args:
        attention_mask: [B, past + length], nonzero for real tokens, or None.
        document_BS: [B, length], the number of each token's document; a token sees its own document alone. Or None.
        causal: Whether a token sees only itself and those before it.
        length: Queries.
        past: Keys that came before the first query.
        device: Where to build it.
    """
    if attention_mask is None and document_BS is None and (past == 0 or not causal):
        return None
    if attention_mask is None and document_BS is None and length == 1:
        return torch.ones(1, 1, 1, past + 1, dtype=torch.bool, device=device)
    queries = torch.arange(past, past + length, device=device).unsqueeze(1)
    keys = torch.arange(past + length, device=device).unsqueeze(0)
    itself = (keys == queries).view(1, 1, length, past + length)
    allowed = (keys <= queries if causal else torch.ones_like(keys == queries)).view(1, 1, length, past + length)
    if document_BS is not None:
        allowed = allowed & (document_BS.unsqueeze(2) == document_BS.unsqueeze(1)).unsqueeze(1)
    if attention_mask is not None:
        real = attention_mask.to(torch.bool)[:, None, None, : past + length]
        # A padding query sees itself: a row without any key would be NaN and spread through the values.
        allowed = (allowed & real) | itself
    return allowed
