"""``train`` in one process: what it checks before it writes, what it leaves, how it goes on."""

import copy
import json
import shutil

import pytest
from support.command import smoe_train, write_recipe

from smoe_train.checkpoint.folders import MANIFEST
from smoe_train.checkpoint.manifest import Checkpoint, WrittenFile, manifest_text
from smoe_train.cli.run_folder import RECIPE, held, store_of
from smoe_train.recipe import load_recipe
from smoe_train.training.stop import StopRequest


@pytest.fixture
def recipe(tmp_path, text):
    return write_recipe(tmp_path, text)


def train(recipe, folder, *arguments, **options):
    return smoe_train("train", recipe, "--output-dir", folder, *arguments, **options)


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["split"], line["loss"].hex()) for line in lines]


def snapshot(folder):
    """Every file below a folder with its contents."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A run of 8 steps that was never interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    found = train(write_recipe(folder, text), folder / "runs", report=True)
    assert found.code == 0, found.err
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished / "runs" / "tiny", tmp_path / "runs" / "tiny")


def until(run, step):
    """Takes a copy back to when a step had just been saved and some later ones were recorded."""
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


# Nothing is written


def test_three_mistakes_are_three_messages_and_no_folder(recipe, tmp_path):
    found = train(
        recipe,
        tmp_path / "runs",
        "--nproc",
        "3",
        "training.max_step=5",
        "learning_rate.peak=fast",
        "parallel={engine: deepspeed, expert_parallel_size: 2}",
        "training.global_batch_size=6",
    )
    assert found.code == 2
    assert found.err.splitlines()[0] == "error: 3 problems in the recipe:"
    assert "training.max_step: unknown key; did you mean 'max_steps'?" in found.err
    assert "learning_rate.peak: input should be a valid number" in found.err
    assert "parallel.expert_parallel_size: expert_parallel_size 2 is impossible" in found.err
    assert not (tmp_path / "runs").exists()


def test_print_config_prints_the_resolved_recipe_only(recipe, tmp_path):
    found = train(recipe, tmp_path / "runs", "--print-config", "training.max_steps=3")
    assert found.code == 0
    (tmp_path / "printed.yaml").write_text(found.out)
    assert load_recipe(str(tmp_path / "printed.yaml")) == load_recipe(str(recipe), ["training.max_steps=3"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "launch"),
    [
        ([], "launch: in this process"),
        (["--nproc", "2", "parallel={engine: deepspeed}"], "--nproc-per-node 2"),
        (["--nproc", "2", "--launcher", "deepspeed", "parallel={engine: deepspeed}"], "deepspeed.launcher.launch"),
    ],
)
def test_a_dry_run_shows_the_plan_and_writes_nothing(recipe, tmp_path, arguments, launch):
    found = train(recipe, tmp_path / "runs", "--dry-run", *arguments)
    assert found.code == 0, found.err
    assert "tiny: valid" in found.out
    assert f"run folder: {tmp_path / 'runs' / 'tiny'}" in found.out
    assert launch in found.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.path=/nowhere/text.txt"], "there is no such file or folder"),
        (["--resume", "/nowhere/step-00000001"], "no complete checkpoint"),
        (["training.global_batch_size=20000"], "is not a multiple|too few for one global batch"),
        (["--launcher", "in_process", "--nproc", "2", "parallel={engine: deepspeed}"], "runs one worker"),
        (["--hostfile", "/nowhere/hosts"], "hosts"),
    ],
)
def test_other_mistakes_leave_no_run_that_could_be_resumed(recipe, tmp_path, arguments, message):
    found = train(recipe, tmp_path / "runs", *arguments)
    assert found.code == 2
    assert "Traceback" not in found.err
    assert any(part in found.err for part in message.split("|"))
    if "too few" not in message:
        assert not (tmp_path / "runs").exists()


# What a run leaves


def test_a_run_leaves_everything_that_is_needed_to_understand_it(finished):
    run = finished / "runs" / "tiny"
    assert load_recipe(str(run / RECIPE)) == load_recipe(str(finished / "tiny.yaml"))
    assert [step for step, split, _ in losses(run) if split == "train"] == list(range(1, 9))
    assert [step for step, split, _ in losses(run) if split == "valid"] == [4, 8]
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == [
        f"step-{step:08d}" for step in (2, 4, 6, 8)
    ]
    surroundings = json.loads((run / "environment.json").read_text())
    assert surroundings["topology"]["world_size"] == 1
    assert "torch" in json.dumps(surroundings)
    assert (run / "report" / "report.html").stat().st_size > 1000
    assert "rank 0 of 1 starts at step 0" in (run / "logs" / "rank-0.log").read_text()
    assert not list(run.rglob("*.tmp*"))


# Resuming


@pytest.mark.parametrize("step", [2, 6])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(finished, run, step):
    until(run, step)
    (run / "checkpoints" / ".tmp-step-00000007-x").mkdir()
    found = train(finished / "tiny.yaml", run.parent)
    assert found.code == 0, found.err
    assert losses(run) == losses(finished / "runs" / "tiny")
    assert f"starts at step {step}" in (run / "logs" / "rank-0.log").read_text()
    last = Checkpoint.open(run / "checkpoints" / "step-00000008")
    assert last.files == Checkpoint.open(finished / "runs" / "tiny" / "checkpoints" / "step-00000008").files
    assert not list((run / "checkpoints").glob(".*"))


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(finished, run):
    file = run / "checkpoints" / "step-00000008" / "shared.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    found = train(finished / "tiny.yaml", run.parent)
    assert found.code == 0
    assert "shared.safetensors has another SHA-256" in found.err
    assert "resuming from the older step-00000006 instead" in found.err
    assert losses(run) == losses(finished / "runs" / "tiny")


def test_a_complete_run_is_complete(finished, run):
    before = snapshot(run / "checkpoints")
    found = train(finished / "tiny.yaml", run.parent)
    assert found.code == 0, found.err
    assert losses(run) == losses(finished / "runs" / "tiny")
    assert snapshot(run / "checkpoints") == before


def test_a_complete_run_can_be_lengthened(finished, run):
    found = train(finished / "tiny.yaml", run.parent, "training.max_steps=10")
    assert found.code == 0, found.err
    assert [step for step, split, _ in losses(run) if split == "train"] == list(range(1, 11))
    assert losses(run)[:8] == losses(finished / "runs" / "tiny")[:8]
    assert load_recipe(str(run / RECIPE)).training.max_steps == 10


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.d_model=32", "  model.d_model: 16 in the checkpoint, 32 now"),
        ("model.moe.router.hyper_hidden=9", "  model.moe.router.hyper_hidden: 8 in the checkpoint, 9 now"),
        ("seed=8", "  seed: 7 in the checkpoint, 8 now"),
        ("training.sequence_length=8", "  training.sequence_length: 16 in the checkpoint, 8 now"),
        ("data.valid_fraction=0.2", "  data (sha256 of its training tokens): "),
    ],
)
@pytest.mark.parametrize("resume", ["auto", "path"])
def test_another_run_is_not_resumed_and_nothing_is_touched(finished, run, override, named, resume):
    until(run, 4)
    before = snapshot(run)
    where = "auto" if resume == "auto" else run / "checkpoints" / "step-00000002"
    found = train(finished / "tiny.yaml", run.parent, "--resume", where, override)
    assert found.code == 2
    assert "belongs to another run; use its recipe" in found.err
    assert named in found.err
    assert snapshot(run) == before


@pytest.mark.parametrize(
    ("lie", "named"),
    [
        (lambda state: state.pop("train"), "its state lacks train,"),
        (lambda state: state.pop("score_key"), "its state lacks score_key,"),
        (lambda state: state.pop("optimizer_steps"), "its state lacks optimizer_steps,"),
        (lambda state: state["train"]["alarms"].update(non_finite=5), "state of the alarms is none"),
    ],
)
def test_a_manifest_that_lies_is_refused_with_a_message(finished, run, lie, named):
    until(run, 4)
    path = run / "checkpoints" / "step-00000004"
    checkpoint = Checkpoint.open(path)
    state = copy.deepcopy(checkpoint.state)
    lie(state)
    kinds = {name: [t for t, file in checkpoint.tensors.items() if file == name] for name in checkpoint.files}
    digests = checkpoint.tensor_sha256
    files = {
        name: WrittenFile(*checkpoint.files[name], {tensor: digests[tensor] for tensor in held})
        for name, held in kinds.items()
    }
    (path / MANIFEST).write_text(manifest_text(4, state, files))
    found = train(finished / "tiny.yaml", run.parent, "--resume", path)
    assert found.code == 2, found.err
    assert named in found.err
    assert "Traceback" not in found.err


def test_rewinding_sets_the_abandoned_future_aside(finished, run):
    """After a return to step 2, `--resume auto` must not jump to a later step of the abandoned timeline."""
    found = train(
        finished / "tiny.yaml", run.parent, "--resume", run / "checkpoints" / "step-00000002", "training.max_steps=3"
    )
    assert found.code == 0, found.err
    assert "step-00000008 does not lead to where this run goes on from" in found.err
    assert "changed since the run was started: training.max_steps: 8 -> 3" in found.err
    names = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert names == ["step-00000002", "step-00000003"]
    assert len(list((run / "checkpoints").glob("abandoned-step-*"))) == 3
    assert load_recipe(str(run / "recipe.before-1.yaml")).training.max_steps == 8
    assert [step for step, split, _ in losses(run) if split == "train"] == [1, 2, 3]
    assert store_of(run).find("best").name == "step-00000003"
    given_up = [json.loads(line)["step"] for line in (run / "metrics.before-1.jsonl").read_text().splitlines()]
    assert max(given_up) == 8
    assert (run / "routing.before-1.jsonl").is_file()


def test_a_dry_run_finds_what_a_run_would_find(finished, run):
    """Data, checkpoints and the run's own recipe are looked at, and nothing is written to the run."""
    before = snapshot(run)
    found = train(finished / "tiny.yaml", run.parent, "--dry-run", "training.max_steps=10")
    assert found.code == 0, found.err
    assert "from step-00000008" in found.out
    assert "training.max_steps: 8 -> 10" in found.out
    assert train(finished / "tiny.yaml", run.parent, "--dry-run", "--resume", "nowhere").code == 2
    assert train(finished / "tiny.yaml", run.parent, "--dry-run", "data.path=nowhere.txt").code == 2
    assert snapshot(run) == before


def test_data_too_short_for_a_batch_leaves_no_folder(finished, tmp_path):
    found = train(
        finished / "tiny.yaml", tmp_path / "new", "training.global_batch_size=4096", "training.micro_batch_size=2"
    )
    assert found.code == 2
    assert "too few for one global batch" in found.err
    assert not (tmp_path / "new").exists()


def test_never_is_for_new_runs(finished, run, tmp_path):
    before = snapshot(run)
    found = train(finished / "tiny.yaml", run.parent, "--resume", "never", "seed=3")
    assert found.code == 2
    assert "holds a run already" in found.err
    after = snapshot(run)
    assert {path for path in after if after[path] != before.get(path)} <= {
        path for path in after if path.name == ".lock"
    }
    fresh = train(finished / "tiny.yaml", tmp_path / "fresh", "--resume", "never", "training.max_steps=1")
    assert fresh.code == 0, fresh.err


def test_a_run_can_start_from_a_checkpoint_of_another(finished, tmp_path):
    start = finished / "runs" / "tiny" / "checkpoints" / "step-00000006"
    before = snapshot(start)
    found = train(finished / "tiny.yaml", tmp_path, "--resume", start, "name=branch")
    assert found.code == 0, found.err
    expected = [entry for entry in losses(finished / "runs" / "tiny") if entry[0] > 6]
    assert losses(tmp_path / "branch") == expected
    assert snapshot(start) == before


def test_checkpoints_without_a_manifest_are_not_started_over(finished, run):
    for path in (run / "checkpoints").glob("step-*/manifest.json"):
        path.unlink()
    before = snapshot(run)
    found = train(finished / "tiny.yaml", run.parent)
    assert found.code == 2
    assert "has checkpoints but none is complete (step-00000002, step-00000004" in found.err
    assert snapshot(run) == before


def test_a_run_that_is_being_trained_is_left_alone(finished, run):
    until(run, 4)
    with held(run):
        before = snapshot(run)
        found = train(finished / "tiny.yaml", run.parent, "training.max_steps=9")
        assert snapshot(run) == before
    assert found.code == 2
    assert "another command is training in this folder" in found.err


def test_a_stopped_run_ends_with_75_and_goes_on(finished, tmp_path, monkeypatch):
    asked = {"times": 0}

    def requested(self):
        asked["times"] += 1
        return asked["times"] >= 3

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "requested", property(requested))
        found = train(finished / "tiny.yaml", tmp_path)
    assert found.code == 75
    assert "the same command resumes the run" in found.err
    assert "error:" not in found.err
    assert losses(tmp_path / "tiny")[-1][0] < 8
    assert train(finished / "tiny.yaml", tmp_path).code == 0
    assert losses(tmp_path / "tiny") == losses(finished / "runs" / "tiny")


def test_a_run_that_fails_ends_with_1(recipe, tmp_path):
    found = train(recipe, tmp_path, "learning_rate.peak=1e300", "training.gradient_clipping=null")
    assert found.code == 1
    assert "error: step" in found.err
    assert "learning_rate.peak" in found.err
