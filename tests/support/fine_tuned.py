"""A tiny run of MNLI on made-up rows, in the layout of the hub, with AX beside it."""

from __future__ import annotations

import json
import random
from pathlib import Path

from support.command import smoe_train, write_recipe

COUNTS = {
    "mnli/train": 60,
    "mnli/validation_matched": 13,
    "mnli/validation_mismatched": 9,
    "mnli/test_matched": 5,
    "mnli/test_mismatched": 4,
    "ax/test": 7,
}
COLOURS, ANIMALS = ("red", "blue", "green"), ("cat", "dog", "horse")


def write_mnli(folder: Path) -> Path:
    """Writes rows whose class is the colour of the premise; test rows have no label."""
    draw = random.Random(0)
    for name, count in COUNTS.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = []
        for index in range(count):
            label = draw.randrange(3)
            texts = {
                "premise": f"a {COLOURS[label]} {draw.choice(ANIMALS)}",
                "hypothesis": " ".join(draw.choices(ANIMALS, k=draw.randint(1, 4))),
            }
            rows.append({**texts, "label": -1 if "test" in name else label, "idx": index})
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def fine_tune(folder: Path) -> Path:
    """Trains a few steps and returns the run folder."""
    recipe = write_recipe(
        folder,
        folder,
        task={"type": "sequence_classification"},
        data={"source": "glue", "task": "mnli", "path": str(write_mnli(folder / "data")), "allow_piece": True},
        training={"max_steps": 6, "sequence_length": 32},
        evaluation={"every_steps": 3, "max_tokens": None},
    )
    found = smoe_train("train", recipe, "--output-dir", folder / "runs")
    assert found.code == 0, found.err
    return folder / "runs" / "tiny"
