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


@pytest.mark.parametrize("over", [None, "sim_smoe"])
def test_a_router_that_looks_at_later_tokens_cannot_generate(text, tmp_path, over):
    router = {"type": "expert_choice", "allow_future_leak": True}
    router = router if over is None else {"type": over, "base": router, "frequency_unit": "tokens"}
    recipe = write_recipe(tmp_path, text, training={"max_steps": 1}, model={"moe": {"router": router}})
    assert smoe_train("train", recipe, "--output-dir", tmp_path).code == 0
    found = smoe_train("generate", tmp_path / "tiny", "--prompt", "expert")
    assert found.code == 2
    assert f"{over or 'expert_choice'} looks at later tokens" in found.err


def test_token_0_of_the_prompt_is_no_padding(run, monkeypatch):
    """Left to itself, transformers takes what equals the padding id for padding."""
    from smoe_train.model import SmoeForCausalLM

    masks = []
    generate = SmoeForCausalLM.generate
    monkeypatch.setattr(
        SmoeForCausalLM, "generate", lambda *a, **k: masks.append(k["attention_mask"]) or generate(*a, **k)
    )
    assert smoe_train("generate", run, "--prompt", "\0ab", "--max-new-tokens", "2").code == 0
    assert masks[0].tolist() == [[1, 1, 1]]


def test_a_router_that_looks_back_generates_without_a_cache(text, tmp_path):
    router = {"type": "stable_moe", "distilled": "convolution", "stage_1_steps": 1}
    recipe = write_recipe(tmp_path, text, training={"max_steps": 2}, model={"moe": {"router": router}})
    assert smoe_train("train", recipe, "--output-dir", tmp_path).code == 0
    assert text_of(tmp_path / "tiny", "--prompt", "expert").startswith("expert")
