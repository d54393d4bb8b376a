"""SmoeForSequenceClassification: one class or one number for a text or a pair of texts.

Shape suffixes: B batch, S sequence, D d_model, C outputs (classes, or 1 for regression).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from smoe_train.model.expert_bank import BankFactory, LocalExpertBank
from smoe_train.model.smoe_config import SmoeConfig
from smoe_train.model.transformer import SmoeModel, SmoeOutput, SmoePreTrainedModel, weighted_router_loss
from smoe_train.schedules import Knobs


class SmoeForSequenceClassification(SmoePreTrainedModel):
    """The transformer, a pooled vector of its last hidden states, and a linear head on it.

    ``config.causal`` chooses between causal and bidirectional attention, ``config.problem_type`` between classes and a
    number. The pooled vector is that of the last real token (``last``), of the first (``first``), or the ``mean`` or
    ``max`` over the real tokens. Padding is routed nowhere and is in no pooled vector and no loss.

    Args:
        config: The architecture; see `SmoeConfig.for_classification`.
        make_bank: Builds the expert bank of each MoE layer; experts in this process if not given.
    """

    def __init__(self, config: SmoeConfig, make_bank: BankFactory = LocalExpertBank) -> None:
        super().__init__(config)
        self.model = SmoeModel(config, make_bank)
        self.score = nn.Linear(config.d_model, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Returns the token embedding."""
        return self.model.embed_tokens

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        knobs: Knobs | None = None,
        **arguments: Any,
    ) -> SmoeOutput:
        """Returns logits [B, C] and, with labels, the loss.

        Args:
            input_ids: int64 [B, S].
            attention_mask: [B, S], nonzero for real tokens; padding may be on either side.
            labels: int64 [B] class ids, or floating [B] numbers. The loss then includes the weighted router losses.
            knobs: What the step is run with.
            arguments: See `SmoeModel.forward`.
        """
        output: SmoeOutput = self.model(input_ids, attention_mask, knobs=knobs, **{**arguments, "use_cache": False})
        assert output.last_hidden_state is not None
        pooled_BD = pool(output.last_hidden_state, attention_mask, self.config.pooling)
        output.logits = self.score(F.dropout(pooled_BD, self.config.classifier_dropout, self.training))
        if labels is not None:
            weights = knobs.loss_weights if knobs is not None else {}
            router_loss = weighted_router_loss(output.router_losses or {}, self.config, weights)
            output.loss = classification_loss(output.logits, labels) + router_loss
        return output


def pool(x_BSD: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """Returns one vector a sequence [B, D], zeros for a sequence without any real token.

    Args:
        x_BSD: Hidden states.
        attention_mask: [B, S], nonzero for real tokens; None if all are real.
        pooling: ``last``, ``first``, ``mean`` or ``max``.
    """
    if attention_mask is None:
        attention_mask = torch.ones(x_BSD.shape[:2], dtype=torch.bool, device=x_BSD.device)
    mask_BS = attention_mask.to(torch.bool)
    mask_BS1 = mask_BS.unsqueeze(2)
    if pooling == "mean":
        total_BD = x_BSD.masked_fill(~mask_BS1, 0.0).sum(dim=1)
        return total_BD / mask_BS.sum(dim=1, keepdim=True).clamp(min=1).to(x_BSD.dtype)
    if pooling == "max":
        lowest = torch.finfo(x_BSD.dtype).min
        return x_BSD.masked_fill(~mask_BS1, lowest).amax(dim=1).masked_fill(~mask_BS.any(dim=1, keepdim=True), 0.0)
    place_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
    if pooling == "last":
        chosen_B = torch.where(mask_BS, place_S, -1).amax(dim=1)
    else:
        chosen_B = torch.where(mask_BS, place_S, x_BSD.shape[1]).amin(dim=1)
    chosen_BS1 = (place_S == chosen_B.unsqueeze(1)).unsqueeze(2)
    return torch.where(chosen_BS1, x_BSD, 0.0).sum(dim=1)


def classification_loss(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Returns the mean cross-entropy in nats, or the mean squared error for floating labels (0-dim fp32).

    Args:
        logits_BC: Any floating dtype; the loss is computed in fp32.
        labels_B: int64 class ids, or numbers, for which C is 1.
    """
    if labels_B.is_floating_point():
        return F.mse_loss(logits_BC.squeeze(1).float(), labels_B.float())
    return F.cross_entropy(logits_BC.float(), labels_B)


AutoModelForSequenceClassification.register(SmoeConfig, SmoeForSequenceClassification)
