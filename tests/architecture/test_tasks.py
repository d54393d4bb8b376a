"""The recipes of the twelve labelled sets: with each policy, from scratch and from pretrained weights, as they say."""

import re

import pytest

from smoe_train.checkpoint.folders import CHECKPOINTS, MANIFEST
from smoe_train.data import SOURCES, build_source
from smoe_train.data.reading.glue_tasks import GLUE_TASKS
from smoe_train.errors import RecipeError
from smoe_train.recipe import RECIPE, TOKENIZER, load_recipe, recipe_folder
from smoe_train.routing import ROUTERS

GLUE = ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
OTHERS = ["sst5", "imdb", "banking77"]
TASKS = [*(f"glue/{task}" for task in GLUE), *(f"classification/{task}" for task in OTHERS)]
FORMS = ["glue/rte", "glue/stsb", "classification/imdb"]  # classes, a number, sequences longer than in pretraining


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run of wikitext2/sentencepiece, as far as reading a recipe looks at it."""
    folder = tmp_path_factory.mktemp("runs") / "wikitext2-sentencepiece"
    checkpoint = folder / CHECKPOINTS / "step-00000800"
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST).touch()
    (checkpoint / TOKENIZER).mkdir()
    (folder / CHECKPOINTS / "best").write_text(checkpoint.name)
    (folder / RECIPE).write_text(load_recipe("wikitext2/sentencepiece").to_yaml())
    return folder


def combine(tmp_path, task, router, *overrides):
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: [{task}, routers/_{router}]\n")
    return load_recipe(str(path), overrides, 2)


def test_there_is_a_recipe_for_each_set():
    folders = ("glue", "classification")
    found = [path for folder in folders for path in (recipe_folder() / folder).glob("[!_]*.yaml")]
    assert sorted(f"{path.parent.name}/{path.stem}" for path in found) == sorted(TASKS)
    assert set(GLUE) == set(GLUE_TASKS) - {"ax"}, "which has no training split"


@pytest.mark.parametrize("name", TASKS)
def test_a_recipe_says_what_its_steps_are_in_epochs(name):
    """Of the published set without the rows that choose the checkpoint: a tenth of train, at most 1,000."""
    recipe = load_recipe(name, [], 1)
    task, training = name.rpartition("/")[2], recipe.training
    assert recipe.name == task
    published = GLUE_TASKS[task].rows if task in GLUE else SOURCES.get(task).source.published
    rows = published["train"]
    epochs = training.max_steps * training.global_batch_size / (rows - min(round(rows / 10), 1000))
    said = re.search(
        r"^# ([\d,]+) training examples, of which ([\d,]+) steps of (\d+) are ([\d.]+) epoch",
        (recipe_folder() / f"{name}.yaml").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert [int(said[place].replace(",", "")) for place in (1, 2, 3)] == [rows, training.max_steps, 32]
    assert float(said[4]) == pytest.approx(epochs, abs=0.05)
    assert training.global_batch_size == 32
    assert recipe.learning_rate.warmup_steps / training.max_steps == pytest.approx(0.06, abs=0.003)
    assert recipe.evaluation.every_steps * 10 == recipe.checkpoint.every_steps * 10 == training.max_steps
    assert build_source(recipe.data).config.path is None, "the hub, unless the user says otherwise"


@pytest.mark.parametrize("router", ROUTERS.names())
def test_every_set_goes_with_every_policy(router, tmp_path):
    for task in TASKS:
        recipe, plain = combine(tmp_path, task, router), load_recipe(task)
        assert recipe.model.moe.router.type == router
        assert (recipe.data, recipe.training, recipe.name) == (plain.data, plain.training, "mine")


@pytest.mark.parametrize("task", TASKS)
def test_a_pretrained_model_is_taken_up_whole(task, pretrained):
    recipe = load_recipe(task, [f"initialise.path={pretrained}"], 2)
    of_pretraining = load_recipe(str(pretrained / RECIPE), resolved=True)
    length = recipe.training.sequence_length
    assert length >= of_pretraining.training.sequence_length
    theirs = {**of_pretraining.model.model_dump(), "dropout": 0.1, "max_sequence_length": length}
    assert recipe.model.model_dump() == theirs
    assert recipe.tokenizer.type == "saved"
    assert recipe.tokenizer.path == pretrained / CHECKPOINTS / "step-00000800" / "tokenizer"


@pytest.mark.parametrize("router", ROUTERS.names())
def test_another_policy_needs_new_routers(router, tmp_path, pretrained):
    for task in FORMS:
        recipe = combine(tmp_path, task, router, f"initialise.path={pretrained}", "initialise.router=new")
        assert (recipe.model.moe.router.type, recipe.model.d_model) == (router, 192)
        if router == "hyper_router":  # that of the pretrained model: loaded with the rest, if wanted
            assert combine(tmp_path, task, router, f"initialise.path={pretrained}").initialise.router == "load"
            continue
        with pytest.raises(RecipeError, match=r"model\.moe\.router\.type: .*'hyper_router'.*initialise\.router=new"):
            combine(tmp_path, task, router, f"initialise.path={pretrained}")
