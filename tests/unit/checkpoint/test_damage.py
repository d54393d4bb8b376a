"""Damaged checkpoints are described by what is lost: files, layers, experts, tensors, generators, steps."""

import json
import os
import shutil

import pytest
import torch

from smoe_train.checkpoint import Checkpoint
from smoe_train.checkpoint.damage import damaged_tensors, described, spans
from smoe_train.checkpoint.folders import MANIFEST
from smoe_train.checkpoint.store import CheckpointStore
from smoe_train.cli.run_folder import OneRank
from smoe_train.errors import CheckpointError

BANK = "model.layers.{}.moe.bank.experts"


def files(step):
    """Two layers of four experts in two files, what all share, and the generators of two ranks."""
    experts = {
        f"experts-0000{first}-0000{first + 1}.safetensors": {
            f"{kind}/{BANK.format(layer)}.{expert}.w_in": torch.full((5, 7), 100.0 * step + 10 * layer + expert)
            for kind in ("weight", "exp_avg")
            for layer in range(2)
            for expert in (first, first + 1)
        }
        for first in (0, 2)
    }
    shared = {f"weight/model.layers.{layer}.norm.weight": torch.full((8,), float(step)) for layer in range(2)}
    ranks = {
        f"rank-0000{rank}.safetensors": {f"random/{rank}/{name}": torch.arange(9) for name in ("torch", "numpy")}
        for rank in range(2)
    }
    return {"shared.safetensors": shared, **experts, **ranks}


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", OneRank(), keep_last=9)
    for step in (10, 20):
        store.save(step, files(step), {})
    return store


@pytest.fixture
def path(store):
    return store.folder / "step-00000020"


def places(path):
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    return {name: [8 + size + at for at in one["data_offsets"]] for name, one in header.items()}


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 8
    path.write_bytes(content)


def complaint(path):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path).verify()
    return str(caught.value)


def test_the_very_tensor_is_named(path):
    file = path / "experts-00002-00003.safetensors"
    begin, end = places(file)["exp_avg/model.layers.1.moe.bank.experts.3.w_in"]
    for position in (begin, end - 1):
        flip(file, position)
        assert complaint(path) == (
            f"{path}: damaged checkpoint: {file.name} has another SHA-256 than when it was written "
            "(damaged: layer 1 expert 3: exp_avg of w_in)"
        )
        flip(file, position)
    Checkpoint.open(path).verify()


def test_what_a_cut_has_taken_is_named_and_nothing_else(path):
    file = path / "experts-00000-00001.safetensors"
    found = places(file)
    (last, (begin, _)) = max(found.items(), key=lambda one: one[1])
    os.truncate(file, begin + 3)
    assert last == "weight/model.layers.1.moe.bank.experts.1.w_in"
    assert (
        f"instead of {sum(Checkpoint.open(path).files[file.name][:1])} (damaged: layer 1 expert 1: weight of w_in)"
        in (complaint(path))
    )


@pytest.mark.parametrize("damage", ["missing", "empty", "header", "huge header", "other json"])
def test_a_file_that_cannot_be_looked_into_is_named_with_all_it_held(path, damage):
    file = path / "experts-00002-00003.safetensors"
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "empty":
        os.truncate(file, 0)
    elif damage == "header":
        file.write_bytes(content[:8] + b"[" + content[9:])
    elif damage == "huge header":
        file.write_bytes(b"\xff" * 8 + content[8:])
    else:
        file.write_bytes((2).to_bytes(8, "little") + b"[]" + content[10:])
    text = complaint(path)
    assert file.name in text
    for layer in range(2):
        for expert in (2, 3):
            assert f"layer {layer} expert {expert}: exp_avg of w_in, weight of w_in" in text
    assert "expert 0" not in text


def test_a_header_alone_may_be_damaged(path):
    file = path / "shared.safetensors"
    content = file.read_bytes()
    assert content.count(b'"F32"') == 2
    file.write_bytes(content.replace(b'"F32"', b'"F64"'))
    assert "(its tensors are sound, its header is not)" in complaint(path)


def test_a_tensor_that_the_header_no_longer_names_is_lost(path):
    file = path / "shared.safetensors"
    file.write_bytes(file.read_bytes().replace(b"layers.0.norm", b"layers.7.norm"))
    assert "(damaged: weight of model.layers.0.norm.weight)" in complaint(path)


def test_generators_are_called_by_their_rank(path):
    (path / "rank-00001.safetensors").unlink()
    assert "rank-00001.safetensors is missing (it held the generators of rank 1)" in complaint(path)


@pytest.mark.parametrize("name", ["extra.bin", "tokenizer/added_tokens.json", "deep/down/x"])
def test_a_file_that_was_added_is_named(path, name):
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_text("{}")
    assert f"{name} was added to it; remove that file" in complaint(path)
    (path / name).unlink()
    Checkpoint.open(path).verify()


def test_a_link_that_was_added_is_named(path, tmp_path):
    (path / "link").symlink_to(tmp_path)
    assert "link was added" in complaint(path)


def test_hidden_files_of_the_file_system_are_no_damage(path):
    (path / ".nfs0001").write_text("x")
    (path / ".DS_Store").write_text("x")
    Checkpoint.open(path).verify()


def test_a_checkpoint_in_the_folder_of_another_step_is_refused(path):
    shutil.copytree(path, path.with_name("step-00000030"))
    with pytest.raises(CheckpointError, match=r"manifest.json: is of step 20, its folder is named after another one"):
        Checkpoint.open(path.with_name("step-00000030"))
    shutil.copytree(path, path.with_name("copy"))
    assert Checkpoint.open(path.with_name("copy")).step == 20, "any other name says nothing of a step"


def test_falling_back_says_how_many_steps_are_lost(store, path):
    flip(path / "shared.safetensors", -1)
    said = []
    assert store.newest_sound(said.append).step == 10
    assert len(said) == 1
    assert said[0].endswith("; resuming from the older step-00000010 instead: 10 steps are lost, and trained again")


def test_a_checkpoint_that_has_lost_its_manifest_is_missed(store, path):
    (path / MANIFEST).unlink()
    said = []
    assert store.newest_sound(said.append).step == 10
    assert "step-00000020: no complete checkpoint: it has no manifest.json; resuming from the older" in said[0]


def test_sizes_can_be_compared_without_reading(path):
    flip(path / "shared.safetensors", -1)
    Checkpoint.open(path).verify_sizes()
    os.truncate(path / "shared.safetensors", 40)
    with pytest.raises(CheckpointError, match=r"shared.safetensors has 40 bytes"):
        Checkpoint.open(path).verify_sizes()


def test_many_experts_are_summed_up():
    names = [f"weight/{BANK.format(layer)}.{expert}.w" for layer in (0, 2) for expert in (*range(4, 9), 11)]
    assert described(names) == "experts 4 to 8, 11 of layer 0, layer 2"
    assert described(["extra/sample_order/record", "weight/a", "weight/b", "weight/c", "weight/d", "lonely"]) == (
        "extra of sample_order/record, weight of a, weight of b, 3 more"
    )
    assert spans([3, 1, 2, 7, 2]) == "1 to 3, 7"


def test_no_memory_is_taken_for_a_header_that_claims_to_be_huge(tmp_path):
    (tmp_path / "x").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    assert damaged_tensors(tmp_path / "x", {"a": "0"}) is None
