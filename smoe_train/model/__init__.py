"""The transformer: transformers-compatible models built from attention, feed-forward, routers and expert banks.

Only the recipe's section is imported at once; the models need transformers and come when they are used.
"""

from typing import TYPE_CHECKING

from smoe_train.lazy import lazy_attributes
from smoe_train.model.config import ModelConfig, MoeConfig

if TYPE_CHECKING:
    from smoe_train.model.causal_lm import SmoeForCausalLM, language_model_loss
    from smoe_train.model.classification import SmoeForSequenceClassification, classification_loss
    from smoe_train.model.expert_bank import BankFactory, LocalExpertBank
    from smoe_train.model.feed_forward import StackedExperts
    from smoe_train.model.smoe_config import SmoeConfig
    from smoe_train.model.transformer import (
        RankReduction,
        SmoeModel,
        SmoeOutput,
        SmoePreTrainedModel,
        weighted_router_loss,
    )

__getattr__ = lazy_attributes(
    __name__,
    {
        "causal_lm": ("SmoeForCausalLM", "language_model_loss"),
        "classification": ("SmoeForSequenceClassification", "classification_loss"),
        "expert_bank": ("BankFactory", "LocalExpertBank"),
        "feed_forward": ("StackedExperts",),
        "smoe_config": ("SmoeConfig",),
        "transformer": (
            "RankReduction",
            "SmoeModel",
            "SmoeOutput",
            "SmoePreTrainedModel",
            "weighted_router_loss",
        ),
    },
)

__all__ = [
    "BankFactory",
    "LocalExpertBank",
    "ModelConfig",
    "MoeConfig",
    "RankReduction",
    "SmoeConfig",
    "SmoeForCausalLM",
    "SmoeForSequenceClassification",
    "SmoeModel",
    "SmoeOutput",
    "SmoePreTrainedModel",
    "StackedExperts",
    "classification_loss",
    "language_model_loss",
    "weighted_router_loss",
]
