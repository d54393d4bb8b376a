import json
import subprocess
import sys
from importlib.metadata import version

import pytest

from smoe_train.errors import RunFailedError
from smoe_train.reporting import environment, write_environment
from smoe_train.reporting.environment import _source

CANARY = "canary-3f9c"


def test_no_secret_reaches_the_file(tmp_path, monkeypatch):
    names = (
        "WANDB_API_KEY HF_TOKEN HUGGING_FACE_HUB_TOKEN AWS_SECRET_ACCESS_KEY GITHUB_TOKEN HTTPS_PROXY "
        "SMOE_TRAIN_API_KEY SMOE_TRAIN_PASSWORD UNHEARD_OF"
    )
    for name in names.split():
        monkeypatch.setenv(name, CANARY)
    monkeypatch.setenv("WANDB_BASE_URL", f"https://user:{CANARY}@w.test:8080/x")
    monkeypatch.setenv("SMOE_TRAIN_SOMETHING", "seen")
    path = write_environment(tmp_path, environment({}, {}))
    assert CANARY not in path.read_text()
    variables = json.loads(path.read_text())["variables"]
    assert variables["WANDB_BASE_URL"] == "https://w.test:8080/x"
    assert variables["SMOE_TRAIN_SOMETHING"] == "seen"


def test_it_says_what_the_run_ran_on():
    found = environment({"world_size": 2}, {"a.txt": "sha256:00"}, accelerators=["X100"], baselines={"xz": 2.2})
    assert found["packages"]["numpy"] == version("numpy")
    assert found["topology"] == {"world_size": 2}
    assert found["data_checksums"] == {"a.txt": "sha256:00"}
    assert found["accelerators"] == ["X100"]
    assert found["baselines"] == {"xz": 2.2}
    assert found["cores"] >= found["cores_usable"] >= 1
    assert found["memory_bytes"] > 2**20
    assert json.loads(json.dumps(found)) == found


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@t.test"]
    done = subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_commit_and_dirty_flag_of_the_source(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "errors.py").write_text("")
    assert _source(package) is None
    git(tmp_path, "init", "-q")
    assert _source(package) is None  # lies in a repository that does not hold it, like a virtual environment
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "x")
    assert _source(package) == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (package / "errors.py").write_text("#")
    assert _source(package)["dirty"] is True


def test_torch_is_not_imported_for_it():
    code = (
        "import sys; from smoe_train.reporting import environment; environment({}, {}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_environment(tmp_path, {"a": 1})
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(RunFailedError, match="full"):
        write_environment(tmp_path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["environment.json"]
