"""``checkpoint export``: a checkpoint as a folder that transformers loads, with its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smoe_train.cli.run_folder import open_run
from smoe_train.durable import creating
from smoe_train.errors import LaunchError


def export(run: Path, folder: Path, which: str, as_json: bool) -> None:
    """Writes an exported folder, which is complete or absent whatever happens.

    It holds ``config.json`` and ``model.safetensors`` as ``save_pretrained`` writes them, in the precision of the fp32
    masters, and ``tokenizer/``. ``import smoe_train.model`` registers the classes with transformers.

    Args:
        run: A run folder, or one of its checkpoints.
        folder: Where to write; must not exist or be empty.
        which: ``latest`` or ``best``, for a run folder.
        as_json: Whether to print JSON.

    Raises:
        LaunchError: The folder holds something or cannot be written.
        CheckpointError: There is no such checkpoint, or it is damaged.
    """
    from smoe_train.assembly import build_model, checkpoint_task, checkpoint_tokenizer
    from smoe_train.checkpoint import load_weights
    from smoe_train.data import save_tokenizer
    from smoe_train.recipe import TOKENIZER

    _, recipe, checkpoint = open_run(run, which)
    tokenizer = checkpoint_tokenizer(checkpoint)
    model = build_model(recipe, tokenizer.vocab_size, task=checkpoint_task(checkpoint))
    load_weights(model, checkpoint)
    with new_folder(folder) as partial:
        model.save_pretrained(partial)
        save_tokenizer(tokenizer, partial / TOKENIZER)
    result = {"checkpoint": str(checkpoint.path), "step": checkpoint.step, "folder": str(folder)}
    print(json.dumps(result) if as_json else f"{folder}: step {checkpoint.step} of {recipe.name}")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder to write to; what a command writes is complete or absent whatever happens.

    Raises:
        LaunchError: ``folder`` holds something or cannot be written.
    """
    try:
        with creating(folder) as partial:
            yield partial
    except FileExistsError as error:
        raise LaunchError(f"{folder}: {error.strerror}; choose another one") from error
    except OSError as error:
        raise LaunchError(f"{folder}: cannot be written: {error.strerror}; choose another folder") from error
