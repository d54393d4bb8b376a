"""``generate`` on a tiny trained run."""

import json

import pytest
from support.command import smoe_train, write_recipe


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    recipe = write_recipe(folder, text, training={"max_steps": 2}, model={"positions": "learned"})
    found = smoe_train("train", recipe, "--output-dir", folder)
    assert found.code == 0, found.err
    return folder / "tiny"


def text_of(run, *arguments):
    found = smoe_train("generate", run, "--json", "--max-new-tokens", "8", *arguments)
    assert found.code == 0, found.err
    return json.loads(found.out)["text"]


def test_the_prompt_is_continued(run):
    text = text_of(run, "--prompt", "expert")
    assert text.startswith("expert")
    assert len(text.encode(errors="replace")) > len("expert")


def test_the_seed_decides(run):
    drawn = [text_of(run, "--prompt", "expert", "--seed", seed) for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]


def test_without_temperature_nothing_is_drawn(run):
    greedy = [text_of(run, "--prompt", "expert", "--temperature", "0", "--seed", seed) for seed in ("1", "2")]
    assert greedy[0] == greedy[1]


def test_plain_output_is_the_text(run):
    found = smoe_train("generate", run, "--prompt", "expert", "--max-new-tokens", "3", "--top-k", "1")
    assert found.code == 0
    assert found.out.startswith("expert")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "--prompt: is empty"),
        (["--prompt", "x", "--top-k", "9"], "--top-k 9: expected 1 to 8"),
        (["--prompt", "x", "--top-k", "0"], "--top-k 0: expected 1 to 8"),
        (["--prompt", "x", "--max-new-tokens", "16"], "exceed the 16 learned positions"),
        (["--prompt", "x", "--max-new-tokens", "0"], "max-new-tokens"),
        (["--prompt", "x", "--top-p", "1.5"], "top-p"),
        (["--prompt", "x", "--checkpoint", "newest"], "say latest or best"),
    ],
)
def test_mistakes(run, arguments, message):
    found = smoe_train("generate", run, *arguments)
    assert found.code == 2
    assert message in found.err
