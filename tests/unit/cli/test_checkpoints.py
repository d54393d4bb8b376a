"""``checkpoint list | show | verify | prune | average | reshard`` on a tiny trained run."""

import json
import shutil

import pytest
from filelock import FileLock
from support.command import smoe_train, write_recipe

from smoe_train.checkpoint import Checkpoint
from smoe_train.checkpoint.folders import MANIFEST


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    recipe = write_recipe(folder, text, training={"max_steps": 8}, evaluation={"every_steps": 3})
    found = smoe_train("train", recipe, "--output-dir", folder)
    assert found.code == 0, found.err
    return folder / "tiny"


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "tiny")


def result(*arguments):
    found = smoe_train("checkpoint", *arguments, "--json")
    assert found.code == 0, found.err
    return json.loads(found.out)


def failure(*arguments):
    found = smoe_train("checkpoint", *arguments)
    assert found.code == 2, (found.out, found.err)
    assert "Traceback" not in found.err
    return found.err


def path_of(run, step):
    return run / "checkpoints" / f"step-{step:08d}"


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def steps(run):
    return [row["step"] for row in result("list", run)]


# list and show


def test_list_says_what_there_is(run):
    rows = result("list", run)
    assert [row["step"] for row in rows] == [8, 6, 4, 3, 2]
    assert [row["marks"] for row in rows] == [["latest", "best"], [], [], [], []]
    assert all(row["problem"] is None and row["world_size"] == row["expert_parallel_size"] == 1 for row in rows)
    assert rows[1]["tokens"] == 6 * 8 * 16
    manifest = json.loads((path_of(run, 6) / MANIFEST).read_text())
    assert rows[1]["bytes"] == sum(one["bytes"] for one in manifest["files"].values())
    (path_of(run, 8) / MANIFEST).unlink()
    (path_of(run, 6) / "shared.safetensors").unlink()
    rows = result("list", run)
    assert [row["problem"] is None for row in rows] == [False, False, True, True, True]
    assert rows[0]["problem"].startswith("no complete checkpoint")
    assert (rows[0]["marks"], rows[1]["marks"]) == ([], ["latest"])
    table = smoe_train("checkpoint", "list", run).out
    assert "damaged, see below" in table
    assert "step 6: damaged checkpoint: shared.safetensors is missing" in table


def test_list_of_no_run(tmp_path):
    assert "is no run folder" in failure("list", tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert "holds no checkpoint yet" in smoe_train("checkpoint", "list", tmp_path).out


def test_show_says_what_is_in_one(run):
    found = result("show", run, "--tensors")
    assert (found["step"], found["format"], found["optimizer_steps" if False else "tokens"]) == (8, 2, 8 * 8 * 16)
    assert found["experts"] == {"layer 0": list(range(8)), "layer 1": list(range(8))}
    name = "weight/model.layers.1.moe.bank.experts.5.w_in"
    assert found["tensors"][name]["file"] == "experts-00000-00007.safetensors"
    assert found["tensors"][name]["sha256"] == Checkpoint.open(path_of(run, 8)).tensor_sha256[name]
    assert found["state"]["identity"]["seed"] == 7
    text = smoe_train("checkpoint", "show", path_of(run, 4)).out
    assert "layer 1: experts 0 to 7" in text
    assert "identity.model.d_model" in text
    assert "alarms" not in text
    assert result("show", run, "--checkpoint", "best")["step"] == 8


# verify


def test_verify_is_silent_about_nothing(run):
    assert [one["problem"] for one in result("verify", run, "--all")] == [None] * 5
    assert "sound, 4 files" in smoe_train("checkpoint", "verify", run).out
    flip(path_of(run, 6) / "experts-00000-00007.safetensors")
    assert result("verify", run)[0]["step"] == 8
    text = failure("verify", run, "--all")
    assert "1 of 5 checkpoints damaged" in text
    assert "experts-00000-00007.safetensors has another SHA-256 than when it was written (damaged: layer " in text
    assert "damaged: layer 1 expert 7: weight of w_out" in text
    assert "layer 1 expert 7" in failure("verify", path_of(run, 6))


def test_verify_of_a_run_looks_at_the_newest_even_without_a_manifest(run):
    (path_of(run, 8) / MANIFEST).unlink()
    assert "it has no manifest.json" in failure("verify", run)
    assert "is no run folder" in failure("verify", path_of(run, 6), "--all")


# prune


def test_prune_keeps_what_it_must(run):
    dry = result("prune", run, "--keep-last", "1", "--keep-every", "3", "--dry-run")
    assert len(dry["removed"]) == 2
    assert len(steps(run)) == 5
    done = result("prune", run, "--keep-last", "1", "--keep-every", "3")
    assert done["removed"] == dry["removed"]
    assert steps(run) == [8, 6, 3]
    assert not list((run / "checkpoints").glob(".t*"))
    assert (
        "step-00000008: kept, the newest that is sound"
        in smoe_train("checkpoint", "prune", run, "--keep-last", "1").out
    )
    assert steps(run) == [8]


def test_prune_never_removes_the_best(run):
    (run / "checkpoints" / "best").write_text("step-00000003\n")
    result("prune", run, "--keep-last", "1")
    assert steps(run) == [8, 3]


def test_prune_counts_sound_checkpoints_only(run):
    (run / "checkpoints" / "best").unlink()
    flip(path_of(run, 8) / "shared.safetensors")
    (path_of(run, 6) / MANIFEST).unlink()
    result("prune", run, "--keep-last", "2")
    assert steps(run) == [4, 3]


def test_prune_removes_nothing_if_nothing_is_sound(run):
    for step in (2, 3, 4, 6, 8):
        flip(path_of(run, step) / "shared.safetensors")
    assert "no checkpoint is sound, so none is removed" in failure("prune", run, "--keep-last", "1")
    assert len(steps(run)) == 5


def test_prune_waits_for_no_training_run(run):
    with FileLock(run / ".lock"):
        assert "another command" in failure("prune", run, "--keep-last", "1")
        result("prune", run, "--keep-last", "1", "--dry-run")
    assert len(steps(run)) == 5


# average and reshard


def test_an_average_can_be_used_like_a_run(run, tmp_path, text):
    output = tmp_path / "mean"
    found = result("average", path_of(run, 6), path_of(run, 8), "--output", output)
    assert (found["step"], len(found["average_of"])) == (8, 2)
    six, eight, mean = (Checkpoint.open(p) for p in (path_of(run, 6), path_of(run, 8), path_of(output, 8)))
    name = "weight/model.embed_tokens.weight"
    expected = ((six.tensor(name).double() + eight.tensor(name).double()) / 2).float()
    assert mean.tensor(name).equal(expected)
    assert smoe_train("evaluate", output, "--max-tokens", "100").code == 0
    assert smoe_train("checkpoint", "export", output, tmp_path / "exported").code == 0
    assert smoe_train("generate", output, "--prompt", "the", "--max-new-tokens", "2").code == 0
    values = {"initialise": {"path": str(output)}, "name": "next", "training": {"max_steps": 2}}
    (tmp_path / "next").mkdir()
    recipe = tmp_path / "next.yaml"
    data = f"data: {{source: text, path: {text}}}"
    recipe.write_text(
        f"version: 1\n{data}\ninitialise: {json.dumps(values['initialise'])}\nparallel: {{engine: local}}\n"
        "training: {max_steps: 2, sequence_length: 16, micro_batch_size: 2, global_batch_size: 4}\n"
    )
    found = smoe_train("train", recipe, "--output-dir", tmp_path / "next")
    assert found.code == 0, found.err


def test_an_average_is_not_resumed(run, tmp_path):
    result("average", path_of(run, 6), path_of(run, 8), "--output", tmp_path / "mean")
    found = smoe_train(
        "train", run / "recipe.yaml", "--output-dir", tmp_path / "new", "--resume", path_of(tmp_path / "mean", 8)
    )
    assert found.code == 2
    assert "is an average of checkpoints and holds no optimizer state" in found.err
    assert not (tmp_path / "new").exists()


def test_an_average_takes_two_different_checkpoints(run, tmp_path):
    assert "two or more checkpoints, each once" in failure("average", run, "--output", tmp_path / "mean")
    assert "two or more checkpoints, each once" in failure(
        "average", run, path_of(run, 8), "--output", tmp_path / "mean"
    )
    flip(path_of(run, 6) / "shared.safetensors")
    assert "damaged checkpoint" in failure("average", run, path_of(run, 6), "--output", tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_reshard_writes_what_can_be_resumed(run, tmp_path):
    output = tmp_path / "two"
    found = result(
        "reshard",
        run,
        "--world-size",
        "2",
        "--expert-parallel-size",
        "2",
        "--output",
        output,
        "parallel.engine=deepspeed",
    )
    names = ["experts-00000-00003", "experts-00004-00007", "rank-00000", "shared"]
    assert found["files"] == [*(f"{name}.safetensors" for name in names), "tokenizer/smoe_tokenizer.json"]
    assert found["resume"] == (
        f"smoe-train train {output / 'recipe.yaml'} --nproc 2 --resume {output / 'checkpoints' / 'step-00000008'}"
    )
    before, after = Checkpoint.open(path_of(run, 8)), Checkpoint.open(path_of(output, 8))
    assert after.tensor_sha256 == before.tensor_sha256
    assert (after.state["world_size"], after.state["expert_parallel_size"]) == (2, 2)
    dry = smoe_train(*found["resume"].split()[1:], "training.max_steps=10", "--output-dir", tmp_path, "--dry-run")
    assert dry.code == 0, dry.err
    assert "from step-00000008" in dry.out


@pytest.mark.parametrize(
    ("world_size", "size", "message"),
    [
        (4, 3, "expert_parallel_size 3 is impossible: it does not divide the 4 processes"),
        (6, 2, "training.global_batch_size: 8 is not a multiple of 12"),
        (2, 2, "parallel.engine: local runs in one process"),
    ],
)
def test_reshard_to_what_cannot_run_is_refused(run, tmp_path, world_size, size, message):
    arguments = ("--world-size", world_size, "--expert-parallel-size", size, "--output", tmp_path / "out")
    overrides = () if world_size == 2 else ("parallel.engine=deepspeed",)
    assert message in failure("reshard", run, *arguments, *overrides)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_not_written_to(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    arguments = ("--world-size", "1", "--expert-parallel-size", "1", "--output", tmp_path / "out")
    assert "exists and is not an empty folder" in failure("reshard", run, *arguments)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
