"""Checkpoints made of checkpoints: of other topologies, and the mean of several."""

import pytest
import torch

from smoe_train.checkpoint import Checkpoint
from smoe_train.checkpoint.average import AVERAGE_OF, average
from smoe_train.checkpoint.reshard import reshard
from smoe_train.checkpoint.store import CheckpointStore
from smoe_train.cli.run_folder import OneRank
from smoe_train.errors import CheckpointError
from smoe_train.parallel.topology import Topology

EXPERT = "model.layers.{}.moe.bank.experts.{}.w_in"
STATE = {"world_size": 2, "expert_parallel_size": 2, "optimizer_steps": 5, "identity": {"model.d_model": 4, "seed": 1}}


def contents(scale):
    """What two ranks of two experts each would write; every value is its expert's number times a scale."""
    files = {"shared.safetensors": {"weight/norm": torch.tensor([scale, 3.0]), "exp_avg/norm": torch.ones(2)}}
    files["shared.safetensors"] |= {"buffer/count": torch.tensor(int(scale)), "extra/order": torch.arange(3)}
    for first in (0, 2):
        files[f"experts-0000{first}-0000{first + 1}.safetensors"] = {
            f"{kind}/{EXPERT.format(layer, expert)}": torch.full((2, 3), scale * expert + layer)
            for kind in ("weight", "exp_avg", "exp_avg_sq")
            for layer in range(2)
            for expert in (first, first + 1)
        }
        rank = first // 2
        files[f"rank-0000{rank}.safetensors"] = {f"random/{rank}/torch": torch.arange(rank, rank + 5)}
    return files


@pytest.fixture
def make(tmp_path):
    store = CheckpointStore(tmp_path, OneRank(), keep_last=99)

    def save(step, scale=1.0, **changes):
        state = STATE | {"train": {"step": step, "tokens": 10 * step, "best_cost": 1.0, "best_step": 1}}
        return Checkpoint.open(store.save(step, contents(scale), state | changes))

    return save


@pytest.mark.parametrize(
    ("world_size", "size", "expected"),
    [
        (1, 1, {"experts-00000-00003": 24, "rank-00000": 1, "shared": 4}),
        (2, 1, {"experts-00000-00003": 24, "rank-00000": 1, "rank-00001": 1, "shared": 4}),
        (2, 2, {"experts-00000-00001": 12, "experts-00002-00003": 12, "rank-00000": 1, "rank-00001": 1, "shared": 4}),
        (
            4,
            4,
            {**{f"experts-0000{n}-0000{n}": 3 * 2 for n in range(4)}, "rank-00000": 1, "rank-00001": 1, "shared": 4},
        ),
    ],
)
def test_files_are_those_of_the_topology(make, world_size, size, expected):
    checkpoint = make(5)
    found = reshard(checkpoint, Topology.create(world_size, size, 4))
    assert {file.removesuffix(".safetensors"): len(tensors) for file, tensors in found.files.items()} == expected
    assert found.state == {**checkpoint.state, "world_size": world_size, "expert_parallel_size": size}
    moved = {name: value for tensors in found.files.values() for name, value in tensors.items()}
    assert moved.keys() == {name for name in checkpoint.tensors if world_size > 1 or not name.startswith("random/1/")}
    assert all(torch.equal(value, checkpoint.tensor(name)) for name, value in moved.items())
    for file, tensors in found.files.items():
        if file.startswith("experts-"):
            first, last = int(file[8:13]), int(file[14:19])
            assert {int(name.split(".experts.")[1].split(".")[0]) for name in tensors} == set(range(first, last + 1))


def test_there_and_back_again_is_the_same_checkpoint(make, tmp_path):
    first = make(5)
    there = reshard(first, Topology.create(4, 4, 4))
    store = CheckpointStore(tmp_path / "there", OneRank(), keep_last=1)
    back = reshard(Checkpoint.open(store.save(5, there.files, there.state)), Topology.create(2, 2, 4))
    store = CheckpointStore(tmp_path / "back", OneRank(), keep_last=1)
    again = Checkpoint.open(store.save(5, back.files, back.state))
    assert (again.tensor_sha256, again.tensors, again.state) == (first.tensor_sha256, first.tensors, first.state)


def test_the_mean_is_the_mean(make):
    """Expert 3 of layer 1 is 3 * scale + 1: 4, 7 and 19 for scales 1, 2 and 6, whose mean is 10."""
    found = average([make(5, 1.0), make(7, 2.0), make(6, 6.0)])
    tensors = {name: value for file in found.files.values() for name, value in file.items()}
    assert torch.equal(tensors[f"weight/{EXPERT.format(1, 3)}"], torch.full((2, 3), 10.0))
    assert torch.equal(tensors["weight/norm"], torch.tensor([3.0, 3.0]))
    assert tensors["buffer/count"] == 2, "the newest one's, which is of step 7"
    assert {name.split("/")[0] for name in tensors} == {"weight", "buffer"}, "no moments, no generators"
    assert found.files.keys() == {"shared.safetensors", "experts-00000-00003.safetensors"}
    assert (found.state["optimizer_steps"], found.state["world_size"], found.state["train"]["step"]) == (0, 1, 7)
    assert found.state["train"]["best_cost"] is None
    assert [one["step"] for one in found.state[AVERAGE_OF]] == [5, 7, 6]


def test_sums_are_taken_in_fp64(make):
    """In fp32, 2**24 + 1 is 2**24, and the mean of (2**24, 1, 1, 1) would lose all three ones."""
    found = average([make(step, scale) for step, scale in ((1, 2.0**24), (2, 1.0), (3, 1.0), (4, 1.0))])
    assert found.files["shared.safetensors"]["weight/norm"][0] == 2.0**22 + 0.75


def test_models_must_be_the_same(make):
    other = make(6, identity={"model.d_model": 8, "seed": 1})
    with pytest.raises(CheckpointError, match=r"step-00000005: is of another model .* model.d_model is 4, not 8"):
        average([make(5), other])
    average(
        [make(5), make(7, identity={"model.d_model": 4, "seed": 2})]
    )  # another seed is another path to average over


def test_tensors_must_be_the_same(make, tmp_path):
    fewer = contents(1.0)
    del fewer["shared.safetensors"]["weight/norm"]
    store = CheckpointStore(tmp_path / "other", OneRank(), keep_last=1)
    other = Checkpoint.open(store.save(5, fewer, make(5).state))
    with pytest.raises(CheckpointError, match="one of them has no weight/norm"):
        average([make(6), other])
    wider = contents(1.0)
    wider["shared.safetensors"]["weight/norm"] = torch.ones(3)
    other = Checkpoint.open(store.save(5, wider, make(5).state))
    with pytest.raises(CheckpointError, match=r"weight/norm has shape \(3,\), in .*step-00000006 \(2,\)"):
        average([make(6), other])
