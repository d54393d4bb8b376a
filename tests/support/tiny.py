"""A recipe that trains in a fraction of a second, on text made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from smoe_train.config import Layered, merge
from smoe_train.recipe import Recipe, check_recipe

WORDS = "router expert token gate layer batch step loss norm rank shard send merge plan sort score the of and to in is"


def write_text(path: Path, num_words: int = 6000) -> Path:
    """Writes words in an order that is neither constant nor random, so that there is something to learn."""
    choices = WORDS.split()
    state, words = 12345, []
    for _ in range(num_words):
        state = (1103515245 * state + 12345) % 2**31
        words.append(choices[(state >> 16) % len(choices)])
    path.write_text(" ".join(words), encoding="utf-8")
    return path


def tiny_recipe(text: Path, world_size: int | None = None, **sections: Any) -> Recipe:
    """Returns a tiny recipe; keyword arguments are merged over its sections."""
    values: dict[str, Any] = {
        "version": 1,
        "name": "tiny",
        "seed": 7,
        "data": {"source": "text", "path": str(text)},
        "model": {
            "d_model": 16,
            "num_layers": 2,
            "num_heads": 2,
            "moe": {"num_experts": 8, "d_ff": 16, "top_k": 2, "router": {"type": "hyper_router", "hyper_hidden": 8}},
        },
        "training": {"max_steps": 8, "sequence_length": 16, "micro_batch_size": 2, "global_batch_size": 8},
        "learning_rate": {"peak": 0.01},
        "evaluation": {"every_steps": 4, "max_tokens": 300},
        "checkpoint": {"every_steps": 2, "keep_last": 10},
        "reporting": {"log_every_steps": 3},
    }
    return check_recipe(Layered(merge(values, sections)), "tiny", world_size)


def write_examples(folder: Path, num_examples: int = 60) -> Path:
    """Writes a training and a dev split of word lists of unlike length; the class says which of two words is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    choices = WORDS.split()
    state = 99
    for split, count in (("train", num_examples), ("dev", 20)):
        rows = []
        for _ in range(count):
            state = (1103515245 * state + 12345) % 2**31
            length, label = 1 + (state >> 8) % 6, (state >> 20) % 2
            words = [choices[(state >> (3 * place)) % len(choices)] for place in range(length)]
            rows.append({"text": " ".join([*words, ("low", "high")[label]]), "label": label})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def classification(folder: Path, **task: Any) -> dict[str, Any]:
    """Returns the sections of a recipe that classifies what `write_examples` wrote."""
    return {
        "task": {"type": "sequence_classification", "dropout": 0.0, **task},
        "data": {"source": "labelled", "path": str(folder), "labels": ["low", "high"]},
        "evaluation": {"max_tokens": None},
    }
