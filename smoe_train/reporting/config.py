"""What the recipe's ``reporting`` section may say."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from smoe_train.config import StrictModel


class WandbConfig(StrictModel):
    """Weights & Biases; its failure never ends or stalls a run."""

    project: str | None = None
    """Project; without it `WANDB_PROJECT`, else `smoe_train`."""

    entity: str | None = None
    """User or team; without it `WANDB_ENTITY`, else the account's default."""

    mode: Literal["auto", "online", "offline"] = "auto"
    """`auto` follows `WANDB_MODE`, else is online where an API key is configured and offline elsewhere. A server that
    cannot be reached makes `online` offline too: `wandb sync` uploads such a run later."""

    finish_seconds: Annotated[float, Field(gt=0)] = 30.0
    """How long the end of a run may wait for uploads while the server answers; about two seconds when it does not."""


class ReportingConfig(StrictModel):
    """Where the figures of a run go besides `metrics.jsonl` and `routing.jsonl`, which are always written."""

    log_every_steps: Annotated[int, Field(ge=1)] = 10
    """Steps between two lines on a console that is no terminal, and between two writes of the record."""

    wandb: WandbConfig | None = None
    """Also log to Weights & Biases."""

    tensorboard: bool = False
    """Also write TensorBoard event files into `tensorboard/` of the run folder."""
