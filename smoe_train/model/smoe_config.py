"""SmoeConfig: the architecture as a transformers configuration, stored beside exported weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from smoe_train.model.config import ModelConfig
from smoe_train.routing import RouterConfig, router_config


@strict
class SmoeConfig(PreTrainedConfig):  # type: ignore[misc]
    """Configuration of all models; the fields are those of `ModelConfig`, flat and resolved.

    ``router`` holds the routing policy's options with their ``type``; ``seed`` keys the initial values. ``causal``,
    ``pooling``, ``classifier_dropout``, ``id2label`` and ``problem_type`` are those of a classifier.
    """

    model_type = "smoe"
    attribute_map = {  # noqa: RUF012 - transformers reads it from the class
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "max_position_embeddings": "max_sequence_length",
    }

    vocab_size: int = 256
    d_model: int = 256
    num_layers: int = 4
    num_heads: int = 8
    d_ff: int = 1024
    feed_forward: str = "gelu"
    norm: str = "layer_norm"
    norm_position: str = "pre"
    positions: str = "rotary"
    rope_theta: float = 10000.0
    max_sequence_length: int = 512
    dropout: float | int = 0.0
    init_std: float = 0.02
    tie_word_embeddings: bool = True
    moe_layers: list[int] | tuple[int, ...] = ()
    num_experts: int = 8
    d_ff_expert: int = 512
    num_experts_per_tok: int = 2
    load_balance_coefficient: float | int = 0.01
    z_loss_coefficient: float | int = 0.0
    router: dict[str, Any] | None = None
    seed: int = 0
    use_cache: bool = True
    causal: bool = True
    pooling: str = "last"
    classifier_dropout: float | int = 0.0

    @classmethod
    def create(cls, model: ModelConfig, vocab_size: int, sequence_length: int, seed: int) -> SmoeConfig:
        """Returns the configuration of a recipe's model.

        Args:
            model: The recipe's section.
            vocab_size: Token ids of the tokenizer.
            sequence_length: Tokens of a training sequence, the default of max_sequence_length.
            seed: Run seed.
        """
        return cls(
            vocab_size=vocab_size,
            d_model=model.d_model,
            num_layers=model.num_layers,
            num_heads=model.num_heads,
            d_ff=model.d_ff or 4 * model.d_model,
            feed_forward=model.feed_forward,
            norm=model.norm,
            norm_position=model.norm_position,
            positions=model.positions,
            rope_theta=model.rope_theta,
            max_sequence_length=model.max_sequence_length or sequence_length,
            dropout=model.dropout,
            init_std=model.init_std,
            tie_word_embeddings=model.tie_embeddings,
            moe_layers=list(model.moe_layers()),
            num_experts=model.moe.num_experts,
            d_ff_expert=model.moe.d_ff,
            num_experts_per_tok=model.moe.top_k,
            load_balance_coefficient=model.moe.load_balance_coefficient,
            z_loss_coefficient=model.moe.z_loss_coefficient,
            router=model.moe.router.model_dump(mode="json"),
            seed=seed,
            bos_token_id=None,
            eos_token_id=None,
        )

    def for_classification(
        self, labels: Sequence[str], causal: bool, pooling: str, classifier_dropout: float
    ) -> SmoeConfig:
        """Returns this configuration for `SmoeForSequenceClassification`.

        Args:
            labels: Names of the classes in the order of their ids; empty for regression.
            causal: Whether a token sees only itself and those before it.
            pooling: How a sequence becomes one vector.
            classifier_dropout: Dropout before the head in training.
        """
        values = self.to_dict()
        values |= {
            "causal": causal,
            "pooling": pooling,
            "classifier_dropout": classifier_dropout,
            "use_cache": False,
            "id2label": dict(enumerate(labels or ("value",))),
            "label2id": {label: i for i, label in enumerate(labels or ("value",))},
            "problem_type": "single_label_classification" if labels else "regression",
        }
        config: SmoeConfig = SmoeConfig.from_dict(values)
        return config

    def router_options(self) -> RouterConfig:
        """Returns the routing policy's options."""
        return router_config(dict(self.router or {"type": "top_k"}))

    def loss_coefficients(self) -> dict[str, float]:
        """Returns the coefficient of each auxiliary loss by name."""
        return {
            "load_balance_loss": self.load_balance_coefficient,
            "z_loss": self.z_loss_coefficient,
            **self.router_options().loss_coefficients(),
        }
