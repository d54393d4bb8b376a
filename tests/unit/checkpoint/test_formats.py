"""Checkpoints of earlier and of later versions.

``format_1`` was written by the last version that wrote this format, in the middle of a run of four steps; the losses
below are those that it recorded for the other two.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from support.tiny import tiny_recipe

from smoe_train import __version__, assembly
from smoe_train.checkpoint import Checkpoint
from smoe_train.checkpoint.folders import MANIFEST
from smoe_train.checkpoint.manifest import FORMAT, READABLE, NewerFormatError, manifest_text
from smoe_train.checkpoint.store import CheckpointStore
from smoe_train.cli.run_folder import OneRank
from smoe_train.errors import CheckpointError

FORMAT_1 = Path(__file__).parent / "format_1" / "step-00000002"
LOSSES = {3: 5.300436973571777, 4: 5.240445137023926}


class Records:
    def __init__(self):
        self.losses = {}

    def metrics(self, records):
        self.losses |= {record["step"]: record["loss"] for record in records if record["split"] == "train"}

    def routing(self, records):
        pass

    def note(self, text):
        pass


def test_every_format_that_is_read_has_a_checkpoint_here():
    assert sorted(READABLE) == [1, FORMAT]
    assert json.loads((FORMAT_1 / MANIFEST).read_text())["format"] == 1


def test_training_goes_on_from_format_1(tmp_path, text):
    moe = {"num_experts": 3, "d_ff": 8, "top_k": 2, "router": {"type": "sigmoid"}}
    recipe = tiny_recipe(
        text,
        1,
        model={"d_model": 8, "num_layers": 1, "moe": moe},
        parallel={"engine": "local"},
        training={"max_steps": 4},
        reporting={"log_every_steps": 1},
    )
    checkpoint = Checkpoint.open(FORMAT_1)
    checkpoint.verify()
    assert (checkpoint.format, checkpoint.version, checkpoint.tensor_sha256) == (1, "", {})
    assembly.check_identity(recipe, assembly.prepare_data(recipe), checkpoint)
    trainer = assembly.build_trainer(recipe, assembly.start_process(recipe), tmp_path, resumes=True)
    trainer.resume(checkpoint)
    trainer.journal = Records()
    trainer.train()
    assert trainer.journal.losses == pytest.approx(LOSSES, rel=1e-5)
    assert Checkpoint.open(tmp_path / "checkpoints" / "step-00000004").format == FORMAT


def test_a_damaged_file_of_format_1_is_named_with_what_it_held(tmp_path):
    path = tmp_path / FORMAT_1.name
    shutil.copytree(FORMAT_1, path)
    content = bytearray((path / "experts-00000-00002.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "experts-00000-00002.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"experts-00000-00002.* \(it held layer 0 expert 0: exp_avg of b_in"):
        Checkpoint.open(path).verify()


def rewritten(path, **changes):
    manifest = json.loads((path / MANIFEST).read_text()) | changes
    manifest.pop("sha256")
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    (path / MANIFEST).write_text(json.dumps(manifest | {"sha256": hashlib.sha256(text.encode()).hexdigest()}))


@pytest.fixture
def two(tmp_path):
    """A store with an older checkpoint and a newer one that a later version has written."""
    store = CheckpointStore(tmp_path, OneRank(), keep_last=9)
    paths = [store.save(step, {}, {}) for step in (1, 2)]
    rewritten(paths[1], format=FORMAT + 1, version="9.1")
    return store, paths[1]


def test_a_newer_format_says_which_version_to_get(two):
    with pytest.raises(NewerFormatError) as caught:
        Checkpoint.open(two[1])
    assert f"format {FORMAT + 1} was made by a newer version of smoe_train, 9.1" in str(caught.value)
    assert f"this one, {__version__}, reads formats 1 to {FORMAT}: update it" in str(caught.value)


def test_no_older_checkpoint_is_taken_for_one_of_a_newer_version(two):
    with pytest.raises(CheckpointError, match="made by a newer version"):
        two[0].newest_sound(pytest.fail)


@pytest.mark.parametrize("number", [0, -1])
def test_a_format_that_never_was_is_damage(two, number):
    rewritten(two[1], format=number)
    found = []
    assert two[0].newest_sound(found.append).step == 1
    assert f"damaged: format {number}" in found[0]


def test_a_flipped_format_is_damage_and_no_newer_version(two):
    text = (two[1] / MANIFEST).read_text()
    (two[1] / MANIFEST).write_text(text.replace(f'"format": {FORMAT + 1}', '"format": 7'))
    with pytest.raises(CheckpointError, match="damaged") as caught:
        Checkpoint.open(two[1])
    assert not isinstance(caught.value, NewerFormatError)


def test_a_manifest_says_who_wrote_it():
    assert json.loads(manifest_text(3, {}, {}))["version"] == __version__
