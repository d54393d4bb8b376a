"""The recipe's task section: what a run is trained on, and what it starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from smoe_train.config import StrictModel

FreezablePart = Literal["embeddings", "experts", "router"]


class LanguageModellingConfig(StrictModel):
    """Next-token prediction on running text."""

    type: Literal["language_modelling"] = "language_modelling"
    packing: Literal["blocks", "documents", "best_fit"] = "blocks"
    """How text becomes sequences. ``blocks``: consecutive pieces of the text, whatever they hold. ``documents``: the
    same pieces, but a token sees its own document alone, and positions begin anew in each. ``best_fit``: as
    ``documents``, but whole documents are packed so that as few as possible are cut (arXiv 2404.10830)."""


class SequenceClassificationConfig(StrictModel):
    """One class or one number for each example of a labelled data set."""

    type: Literal["sequence_classification"] = "sequence_classification"
    attention: Literal["causal", "bidirectional"] = "causal"
    """Whether a token sees only those before it, as in pretraining, or all of the example."""
    pooling: Literal["last", "first", "mean", "max"] = "mean"
    """How the hidden states of an example become one vector: that of the last or first token, the mean, or maximum."""
    dropout: float = Field(0.1, ge=0.0, lt=1.0)
    """Dropout on that vector in training."""
    length_window: int = Field(16, ge=1)
    """Batches whose examples are sorted by length among each other, so that little is padded; 1 sorts nothing. It rests
    where curriculum.order says which examples stand together."""
    selection_fraction: float = Field(0.1, gt=0.0, lt=1.0)
    """Share of the training examples that are not trained on but choose the best checkpoint (by a hash of their place):
    the dev split is evaluated once, at the end."""
    selection_examples: int = Field(1000, ge=1)
    """Most examples that choose the best checkpoint."""


TaskConfig = Annotated[LanguageModellingConfig | SequenceClassificationConfig, Field(discriminator="type")]


class InitialiseConfig(StrictModel):
    """What the weights are before step 0."""

    path: Path | None = None
    """A run, one of its checkpoints, or an exported folder, whose weights, model section and tokenizer the run starts
    with; random weights if not given. The head of a classifier is always new."""
    checkpoint: Literal["best", "latest"] = "best"
    """Which checkpoint of a run."""
    router: Literal["load", "new"] = "load"
    """Whether routers are loaded too, or start anew, as they must where the routing policy is another one."""
    freeze: tuple[FreezablePart, ...] = ()
    """Parts that are not trained: ``router``, ``experts``, ``embeddings`` (and a language model's head that is tied to
    them)."""
