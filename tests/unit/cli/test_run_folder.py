"""The folder of a run: who may write to it, and which checkpoint a command means by it."""

import os
import re
import socket
import subprocess
import sys

import pytest
import torch

from smoe_train.checkpoint.store import CheckpointStore
from smoe_train.cli.run_folder import CHECKPOINTS, RECIPE, OneRank, create, held, open_run
from smoe_train.errors import CheckpointError, LaunchError
from smoe_train.recipe import load_recipe


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "demo"
    create(folder, load_recipe("demo"), keep_old=False)
    store = CheckpointStore(folder / CHECKPOINTS, OneRank(), 9)
    for step in (1, 2):
        store.save(step, {"shared.safetensors": {"x": torch.zeros(2)}}, {}, best=step == 1)
    return folder


def test_creating_writes_the_resolved_recipe_and_nothing_else(tmp_path):
    folder = tmp_path / "a" / "b"
    create(folder, load_recipe("demo"), keep_old=False)
    assert sorted(path.name for path in folder.iterdir()) == ["logs", RECIPE]
    assert load_recipe(str(folder / RECIPE)) == load_recipe("demo")


def test_an_existing_run_is_taken_up_and_its_recipe_kept(run):
    before = (run / RECIPE).read_text()
    for steps in (500, 600):
        create(run, load_recipe("demo", [f"training.max_steps={steps}"]), keep_old=True)
    assert load_recipe(str(run / RECIPE)).training.max_steps == 600
    assert (run / "recipe.before-1.yaml").read_text() == before
    assert load_recipe(str(run / "recipe.before-2.yaml")).training.max_steps == 500


def test_a_run_has_a_recipe_even_if_the_new_one_cannot_be_written(run):
    before = (run / RECIPE).read_bytes()
    (run / f".{RECIPE}.{os.getpid()}.tmp").mkdir()  # where the new one would be written
    with pytest.raises(LaunchError, match="cannot be written"):
        create(run, load_recipe("demo", ["training.max_steps=500"]), keep_old=True)
    assert (run / RECIPE).read_bytes() == (run / "recipe.before-1.yaml").read_bytes() == before


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        LaunchError, match=r"file/demo: cannot be written: Not a directory; choose another --output-dir"
    ):
        create(tmp_path / "file" / "demo", load_recipe("demo"), keep_old=False)
    with pytest.raises(LaunchError, match=r"file/demo: cannot be written"), held(tmp_path / "file" / "demo"):
        pytest.fail("held what cannot be written")


def test_one_command_at_a_time(tmp_path):
    with held(tmp_path / "run"):
        owner = f"another command is training in this folder (pid {os.getpid()} on {socket.gethostname()}, started 2"
        with pytest.raises(LaunchError, match=re.escape(owner)), held(tmp_path / "run"):
            pytest.fail("held twice")
        with held(tmp_path / "other"):
            pass
    with held(tmp_path / "run"):
        pass


def test_the_dead_hold_no_lock(tmp_path, capsys):
    program = (
        "import os, signal, sys; from pathlib import Path; from smoe_train.cli.run_folder import held\n"
        "with held(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "run")], check=False)
    assert done.returncode == -9
    assert (tmp_path / "run" / ".lock").exists()
    with held(tmp_path / "run"):
        assert "ended without cleaning up (pid " in capsys.readouterr().err
    with held(tmp_path / "run"):
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("which", "step"), [("latest", 2), ("best", 1)])
def test_a_run_means_one_of_its_checkpoints(run, which, step):
    folder, recipe, checkpoint = open_run(run, which)
    assert (folder, recipe.name, checkpoint.step) == (run, "demo", step)


def test_a_checkpoint_means_itself(run):
    folder, recipe, checkpoint = open_run(run / CHECKPOINTS / "step-00000001", "latest")
    assert (folder, recipe.name, checkpoint.step) == (run, "demo", 1)


def test_what_is_no_run_is_refused(run, tmp_path):
    for path in (tmp_path, tmp_path / "absent", run / CHECKPOINTS):
        with pytest.raises(CheckpointError, match="is neither a run folder nor a complete checkpoint"):
            open_run(path, "latest")
    (run / RECIPE).unlink()
    with pytest.raises(CheckpointError, match=r"the run's recipe\.yaml is missing"):
        open_run(run / CHECKPOINTS / "step-00000001", "latest")


def test_a_damaged_checkpoint_is_refused(run):
    file = run / CHECKPOINTS / "step-00000002" / "shared.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"damaged checkpoint: shared\.safetensors has"):
        open_run(run, "latest")


@pytest.mark.parametrize("name", ["metrics.jsonl", "logs", "checkpoints", "logs/rank-0.log"])
def test_a_run_folder_out_of_which_a_link_leads_is_not_written_to(name, tmp_path):
    run_folder, outside = tmp_path / "run", tmp_path / "outside"
    (run_folder / name).parent.mkdir(parents=True)
    outside.mkdir()
    (run_folder / name).symlink_to(outside)
    with pytest.raises(LaunchError, match="is a link out of the run folder"), held(run_folder):
        pass
    assert not any(outside.iterdir())


def test_a_run_folder_may_itself_be_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to("elsewhere")
    with held(tmp_path / "run"):
        pass
