"""Padded examples and packed documents train alike at any topology, and with micro-batches as with one batch."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.parallel_runs import assert_equal_runs, recipe_for, train
from support.ranks import run_ranks
from support.tiny import classification, write_examples, write_text

ROUTERS: dict[str, dict[str, Any]] = {
    "hyper_router": {"type": "hyper_router", "hyper_hidden": 8, "hypernet_std": 0.3},
    "adaptive": {"type": "adaptive", "threshold": 0.15, "base": {"type": "top_k", "init_std": 0.3}},
    "expert_choice": {"type": "expert_choice", "init_std": 0.3},
    "compete_smoe": {"type": "compete_smoe", "init_std": 0.3, "response": "l2norm", "diversity_coefficient": 0.3},
}


def moe(router: str) -> dict[str, Any]:
    # A balance loss that is felt: with 0.01 a wrong one would hide within the tolerance.
    felt = {} if router == "expert_choice" else {"load_balance_coefficient": 0.5}
    return {"moe": {"router": ROUTERS[router], "z_loss_coefficient": 0.1, **felt}}


def sections(folder: Path, router: str) -> dict[str, Any]:
    attention = "bidirectional" if router == "expert_choice" else "causal"
    return {**classification(folder, attention=attention, length_window=2), "model": moe(router)}


@pytest.mark.parametrize("router", ROUTERS)
def test_classification(router, tmp_path):
    found = sections(write_examples(tmp_path / "examples"), router)
    expected = train(recipe_for(tmp_path, 1, {"engine": "local"}, **found))
    losses = [record["loss"] for record in expected["losses"]]
    assert losses[-1] < losses[0]
    for world_size, expert_parallel_size, micro in ((2, 2, 4), (2, 1, 2), (4, 2, 1)):
        parallel = {"expert_parallel_size": expert_parallel_size}
        recipe = recipe_for(tmp_path, world_size, parallel, **found, training={"micro_batch_size": micro})
        assert_equal_runs(run_ranks(world_size, train, recipe), expected)


@pytest.mark.parametrize("packing", ["documents", "best_fit"])
def test_documents(packing, tmp_path):
    words = write_text(tmp_path / "words").read_text(encoding="utf-8").split()
    starts = [0, 3, 4, 40, 52, 61, *range(90, 5000, 17)]
    documents = [" ".join(words[a:b]) for a, b in pairwise(starts)]
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents), encoding="utf-8")
    found = {
        "data": {"source": "records", "path": str(file)},
        "task": {"type": "language_modelling", "packing": packing},
        "model": moe("hyper_router"),
    }
    expected = train(recipe_for(tmp_path, 1, {"engine": "local"}, **found))
    for world_size, micro in ((2, 4), (2, 1)):
        recipe = recipe_for(
            tmp_path, world_size, {"expert_parallel_size": 2}, **found, training={"micro_batch_size": micro}
        )
        assert_equal_runs(run_ranks(world_size, train, recipe), expected)


@pytest.mark.parametrize("parts", [("experts",), ("router",), ("router", "experts", "embeddings")])
def test_frozen_parts_stay_what_they_are(parts, tmp_path):
    found = sections(write_examples(tmp_path / "examples"), "hyper_router")
    found["initialise"] = {"freeze": list(parts)}
    expected = train(recipe_for(tmp_path, 1, {"engine": "local"}, **found))
    assert_equal_runs(run_ranks(2, train, recipe_for(tmp_path, 2, {"expert_parallel_size": 2}, **found)), expected)
    start = train(recipe_for(tmp_path, 1, {"engine": "local"}, **found, training={"max_steps": 1}))
    marks = {"router": ".moe.router.", "experts": ".experts.", "embeddings": "embed_tokens", "head": "score."}
    for part, mark in marks.items():
        own = [name for name in expected["weights"] if mark in name and "hypernet" not in name]
        assert own, part
        same = [expected["weights"][name].equal(start["weights"][name]) for name in own]
        assert all(same) if part in parts else not all(same), part


@pytest.mark.parametrize(("zero_stage", "expert_parallel_size"), [(0, 2), (2, 1)])
def test_frozen_experts_under_other_stages_of_zero(zero_stage, expert_parallel_size, tmp_path):
    """With clipping, whose norm must be over what is trained alone."""
    found = sections(write_examples(tmp_path / "examples"), "adaptive")
    found["initialise"] = {"freeze": ["experts"]}
    found["training"] = {"gradient_clipping": 0.5}
    expected = train(recipe_for(tmp_path, 1, {"engine": "local"}, **found))
    assert max(expected["norms"]) > 0.5, "there is something to clip"
    parallel = {"expert_parallel_size": expert_parallel_size, "zero_stage": zero_stage}
    assert_equal_runs(run_ranks(2, train, recipe_for(tmp_path, 2, parallel, **found)), expected)
