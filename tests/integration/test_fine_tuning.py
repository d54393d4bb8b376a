"""From a pretraining run to a fine-tuned classifier, by the commands a user types; and what a wrong start leads to."""

import json
import shutil
from unittest import mock

import pytest
import yaml
from support.tiny import classification, tiny_recipe, write_examples, write_text

from smoe_train.checkpoint import Checkpoint
from smoe_train.cli.app import main
from smoe_train.data import load_tokenizer
from smoe_train.recipe import load_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fine-tuning")


@pytest.fixture(scope="module")
def pretrained(folder):
    """A finished language-model run whose tokenizer was learnt from its text."""
    text = write_text(folder / "words.txt")
    words = text.read_text(encoding="utf-8").replace(" of ", "\n")
    text.write_text(words, encoding="utf-8")
    recipe = tiny_recipe(
        text,
        tokenizer={"type": "sentencepiece", "vocab_size": 300},
        training={"max_steps": 3},
        parallel={"engine": "local"},
    )
    (folder / "pretraining.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert smoe_train(folder, "train", folder / "pretraining.yaml", "name=pretrained") == 0
    return folder / "runs" / "pretrained"


@pytest.fixture(scope="module")
def recipe(folder):
    """A fine-tuning recipe without a model section."""
    values = {
        "version": 1,
        **classification(write_examples(folder / "examples")),
        "training": {"max_steps": 4, "sequence_length": 16, "micro_batch_size": 4, "global_batch_size": 8},
        "learning_rate": {"peak": 0.01},
        "evaluation": {"every_steps": 2},
        "checkpoint": {"every_steps": 2},
        "parallel": {"engine": "local"},
    }
    path = folder / "fine-tuning.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def smoe_train(folder, *arguments):
    """Runs the command in this process and returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["smoe-train", *map(str, arguments)])
        patch.chdir(folder)
        patch.setenv("SMOE_TRAIN_CACHE", str(folder / "cache"))
        with pytest.raises(SystemExit) as stopped:
            main()
    return stopped.value.code or 0


def weights(checkpoint, prefix="weight/model."):
    opened = Checkpoint.open(checkpoint)
    return {name: opened.tensor(name) for name in opened.tensors if name.startswith(prefix)}


def test_a_run_is_fine_tuned_reported_and_resumed_without_it(folder, pretrained, recipe, capsys):
    assert smoe_train(folder, "train", recipe, f"initialise.path={pretrained}", "name=tuned") == 0
    run = folder / "runs" / "tuned"
    results = json.loads((run / "results.json").read_text())
    assert (results["task"], results["split"], results["examples"]) == ("labelled", "dev", 20)
    assert set(results["metrics"]) == set(results["constant"]) == {"accuracy"}
    assert results["selection"]["step"] == results["step"]
    assert len((run / "predictions" / "dev.tsv").read_text().splitlines()) == 21
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["split"] for record in records].count("dev") == 1
    assert [record["step"] for record in records if record["split"] == "selection"] == [2, 4]

    before, after = load_recipe(str(pretrained / "recipe.yaml")), load_recipe(str(run / "recipe.yaml"))
    assert after.model.moe == before.model.moe
    assert after.model.max_sequence_length == before.training.sequence_length
    tokenizers = [load_tokenizer(path / "tokenizer") for path in (pretrained, run, run / "checkpoints/step-00000004")]
    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == 1

    # The recipe of a run has taken up the model; another run from the same weights must have it too.
    assert smoe_train(folder, "train", run / "recipe.yaml", "name=heads", "model.num_heads=4") == 2
    assert "model.num_heads: 4, but the weights of initialise.path belong to a model with 2" in capsys.readouterr().err

    # What the run started from may go: its own folder is enough to go on.
    aside = folder / "aside"
    shutil.move(pretrained, aside)
    try:
        capsys.readouterr()
        assert smoe_train(folder, "train", run / "recipe.yaml", "training.max_steps=6") == 0
        assert "changed since the run was started: training.max_steps: 4 -> 6" in capsys.readouterr().err
        assert json.loads((run / "results.json").read_text())["selection"]["step"] <= 6
        assert smoe_train(folder, "train", recipe, f"initialise.path={pretrained}", "name=other") == 2
        assert "is neither a run folder, nor a complete checkpoint, nor an exported folder" in capsys.readouterr().err
    finally:
        shutil.move(aside, pretrained)


def test_weights_are_those_of_the_run_and_of_its_export(folder, pretrained, recipe):
    """With a learning rate of nearly 0, what is saved after a step is what the run started with."""
    assert smoe_train(folder, "checkpoint", "export", pretrained, folder / "exported") == 0
    still = ("learning_rate.peak=1e-30", "training.max_steps=1", "optimizer.weight_decay=0", "training.self_test=false")
    starts = {"from_run": pretrained, "from_export": folder / "exported"}
    expected = weights(pretrained / "checkpoints" / "step-00000003")
    for name, start in starts.items():
        assert smoe_train(folder, "train", recipe, f"initialise.path={start}", f"name={name}", *still) == 0
        found = weights(folder / "runs" / name / "checkpoints" / "step-00000001")
        assert found.keys() == expected.keys()
        assert all(found[key].equal(value) for key, value in expected.items())
    options = ("initialise.router=new", "model.moe.router.type=top_k", "initialise.freeze=[experts]")
    assert smoe_train(folder, "train", recipe, f"initialise.path={pretrained}", "name=new", *options, *still) == 0
    found = weights(folder / "runs" / "new" / "checkpoints" / "step-00000001")
    shared = {key for key in expected if ".moe.router." not in key}
    assert shared == {key for key in found if ".moe.router." not in key}
    assert all(found[key].equal(expected[key]) for key in shared)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.d_model=32",
            "model.d_model: 32, but the weights of initialise.path belong to a model with 16; leave it",
        ),
        ("model.moe.router.type=top_k", "or start with new routers: initialise.router=new"),
        ("tokenizer.type=bytes", "was trained with another tokenizer"),
        ("training.sequence_length=17", "model.max_sequence_length: 16 is less than training.sequence_length 17"),
        ("task.type=language_modelling", "language_modelling does not fit data.source labelled, which holds labelled"),
        ("task.pooling=first", "first has seen one token only if task.attention is causal"),
        ("initialise.checkpoint=newest", "names no checkpoint; say latest or best"),
        ("initialise.path=17", "initialise.path"),
    ],
)
def test_what_does_not_fit_the_weights_is_refused(override, message, folder, pretrained, recipe, capsys):
    assert smoe_train(folder, "train", recipe, f"initialise.path={pretrained}", "name=refused", override) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "runs" / "refused").exists(), "nothing is left behind"


def test_a_longer_run_that_breaks_off_before_its_report_is_not_finished(folder, recipe, capsys):
    command = ("train", recipe, "name=longer", "training.self_test=false")
    results = folder / "runs" / "longer" / "results.json"
    assert smoe_train(folder, *command, "training.max_steps=2") == 0
    assert results.is_file()
    crash = mock.patch("smoe_train.cli.worker.report_task", side_effect=OSError("the disk is gone"))
    with crash, pytest.raises(OSError, match="the disk is gone"):
        smoe_train(folder, *command, "training.max_steps=4")
    assert not results.exists(), "those were the figures of a shorter training"
    assert smoe_train(folder, *command, "training.max_steps=4") == 0
    assert results.is_file()
    last = folder / "runs" / "longer" / "checkpoints" / "step-00000004"
    capsys.readouterr()
    assert smoe_train(folder, *command[:2], "name=copy", "training.max_steps=4", "--resume", last) == 0
    assert "nothing to do" in capsys.readouterr().err, "there is no best checkpoint to evaluate in that folder"


def test_a_run_without_anything_to_report_is_finished_all_the_same(folder, recipe, capsys):
    alone = ("name=alone", "training.self_test=false", "training.max_steps=1", "data.splits=[train]")
    assert smoe_train(folder, "train", recipe, *alone) == 0
    assert not (folder / "runs" / "alone" / "results.json").exists()
    capsys.readouterr()
    assert smoe_train(folder, "train", recipe, *alone) == 0
    assert "nothing to do" in capsys.readouterr().err


def test_other_labels_are_other_data(folder, recipe, capsys):
    examples = write_examples(folder / "relabelled")
    command = ("train", recipe, "name=labels", "training.self_test=false", f"data.path={examples}")
    assert smoe_train(folder, *command, "training.max_steps=1") == 0
    rows = [json.loads(line) for line in (examples / "train.jsonl").read_text().splitlines()]
    rows[3]["label"] = 1 - rows[3]["label"]
    (examples / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert smoe_train(folder, *command, "training.max_steps=2") == 2
    assert "data (sha256 of its training labels): " in capsys.readouterr().err


def test_a_damaged_checkpoint_is_no_start(folder, pretrained, recipe, capsys):
    copy = folder / "damaged"
    shutil.copytree(pretrained, copy)
    with (copy / "checkpoints" / "step-00000003" / "shared.safetensors").open("r+b") as file:
        file.seek(200)
        file.write(b"\xff")
    assert smoe_train(folder, "train", recipe, f"initialise.path={copy}", "name=from_damaged") == 2
    assert "shared.safetensors has another SHA-256 than when it was written" in capsys.readouterr().err


def test_a_checkpoint_without_a_tokenizer_is_no_start(folder, pretrained, recipe, capsys):
    copy = folder / "without"
    shutil.copytree(pretrained, copy)
    shutil.rmtree(copy / "checkpoints" / "step-00000003" / "tokenizer")
    for start in (copy, copy / "checkpoints" / "step-00000003"):
        assert smoe_train(folder, "train", recipe, f"initialise.path={start}", "name=from_without") == 2
        assert "holds no tokenizer; it is damaged, or of an earlier version" in capsys.readouterr().err


def test_commands_for_text_refuse_a_classifier(folder, pretrained, recipe, capsys):
    assert smoe_train(folder, "train", recipe, "name=scratch", "training.max_steps=1") == 0
    capsys.readouterr()
    assert smoe_train(folder, "generate", folder / "runs" / "scratch", "--prompt", "a") == 2
    assert "a classifier; this command needs a language model" in capsys.readouterr().err
