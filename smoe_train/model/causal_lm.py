"""SmoeForCausalLM: the causal language model as a transformers model (save, load, AutoModel, generate).

Shape suffixes: B batch, S sequence, D d_model, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin

from smoe_train.data.batches.loader import IGNORED_LABEL
from smoe_train.model.chunked_loss import chunked_language_model_loss
from smoe_train.model.expert_bank import BankFactory, LocalExpertBank
from smoe_train.model.smoe_config import SmoeConfig
from smoe_train.model.transformer import SmoeModel, SmoeOutput, SmoePreTrainedModel, weighted_router_loss
from smoe_train.schedules import Knobs


class SmoeForCausalLM(SmoePreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The causal transformer with a language-model head.

    Args:
        config: The architecture.
        make_bank: Builds the expert bank of each MoE layer; experts in this process if not given.

    Attributes:
        logits_chunk_tokens: Tokens whose logits exist at once where a loss is asked for, and no logits are returned
            then; None for the logits of all.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - read from the class

    def __init__(self, config: SmoeConfig, make_bank: BankFactory = LocalExpertBank) -> None:
        super().__init__(config)
        self.model = SmoeModel(config, make_bank)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.logits_chunk_tokens: int | None = None
        self.compiled_loss: Any = None
        if self.looks_back():
            self.config.use_cache = False
            self.generation_config.use_cache = False
        self.post_init()

    def compile_loss(self) -> None:
        """Lets training run head and loss as torch compiles them; it then returns no logits."""
        self.compiled_loss = torch.compile(_summed_loss)

    def get_input_embeddings(self) -> nn.Module:
        """Returns the token embedding."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """Returns the language-model head."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        knobs: Knobs | None = None,
        targets: Tensor | None = None,
        num_targets: float | None = None,
        **arguments: Any,
    ) -> SmoeOutput:
        """Returns logits and, with labels or targets, the loss.

        Args:
            input_ids: int64 [B, S].
            attention_mask: [B, past + S], nonzero for real tokens.
            labels: int64 [B, S] as transformers has them: labels[b, s] is compared with the prediction made at
                s - 1; -100 is ignored. The ``loss`` of the output then includes the weighted router losses.
            logits_to_keep: Only the last positions' logits, or all if 0.
            knobs: What the step is run with; named here because ``generate`` passes on only what it finds named.
            targets: int64 [B, S], the token that follows each position; -100 is ignored. Asks for ``task_loss`` alone.
            num_targets: What that is divided by, see `language_model_loss`.
            arguments: See `SmoeModel.forward`.
        """
        output: SmoeOutput = self.model(input_ids, attention_mask, knobs=knobs, **arguments)
        hidden_BSD = output.last_hidden_state
        assert hidden_BSD is not None
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
        compiled = self.training and self.compiled_loss is not None
        if targets is None or not (compiled or self.logits_chunk_tokens is not None):
            output.logits = self.lm_head(hidden_BSD[:, -logits_to_keep:] if logits_to_keep else hidden_BSD)
        if targets is not None:
            task_loss = self._task_loss(hidden_BSD, output.logits, targets, num_targets)
            output.task_loss = task_loss
            if labels is not None:
                weights = knobs.loss_weights if knobs is not None else {}
                output.loss = task_loss + weighted_router_loss(output.router_losses or {}, self.config, weights)
        return output

    def _task_loss(
        self, hidden_BSD: Tensor, logits_BSV: Tensor | None, targets_BS: Tensor, num_targets: float | None
    ) -> Tensor:
        if logits_BSV is not None:
            return language_model_loss(logits_BSV, targets_BS, num_targets)
        weight_VD, chunk_tokens = self.lm_head.weight, self.logits_chunk_tokens
        if chunk_tokens is not None:
            hidden_TD, targets_T = hidden_BSD.flatten(0, 1), targets_BS.flatten()
            return chunked_language_model_loss(hidden_TD, weight_VD, targets_T, chunk_tokens, num_targets)
        total, count = self.compiled_loss(hidden_BSD, weight_VD, targets_BS)
        mean: Tensor = total / (count if num_targets is None else num_targets)
        return mean


def language_model_loss(logits_BSV: Tensor, labels_BS: Tensor, num_targets: float | None = None) -> Tensor:
    """Returns the cross-entropy in nats (0-dim fp32) over labels that are not -100, divided by their number.

    Args:
        logits_BSV: Any floating dtype; the loss is computed in fp32.
        labels_BS: int64, the token that follows each position.
        num_targets: What to divide by; the labels are counted if it is not given. Training gives the mean number of
            labels in a micro-batch of the step: the mean over micro-batches is then the mean over all labels.
    """
    logits_TV, labels_T = logits_BSV.flatten(0, 1).float(), labels_BS.flatten()
    if num_targets is None:
        return F.cross_entropy(logits_TV, labels_T, ignore_index=IGNORED_LABEL)
    return F.cross_entropy(logits_TV, labels_T, ignore_index=IGNORED_LABEL, reduction="sum") / num_targets


def _summed_loss(hidden_BSD: Tensor, weight_VD: Tensor, targets_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sum of `language_model_loss` and the number of labels in it."""
    logits_TV, targets_T = F.linear(hidden_BSD, weight_VD).flatten(0, 1).float(), targets_BS.flatten()
    total = F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED_LABEL, reduction="sum")
    return total, (targets_T != IGNORED_LABEL).sum()


AutoModelForCausalLM.register(SmoeConfig, SmoeForCausalLM)
