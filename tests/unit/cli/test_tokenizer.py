import json

import pytest
from support.small_tokenizers import TEXT
from typer.testing import CliRunner

from smoe_train.cli.app import app
from smoe_train.cli.validate import vocab_size_of
from smoe_train.data import load_tokenizer
from smoe_train.errors import DataError, LaunchError
from smoe_train.recipe import load_recipe


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMOE_TRAIN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def call(*arguments):
    result = CliRunner().invoke(app, ["tokenizer", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def write_recipe(folder, text, tokenizer):
    path, valid = folder / "recipe.yaml", folder / "valid.txt"
    valid.write_text("the cat\n")
    path.write_text(f"version: 1\ndata: {{source: text, path: {text}, valid_path: {valid}}}\ntokenizer: {tokenizer}\n")
    return path


def test_a_model_is_learnt_from_files_saved_and_shown(text, tmp_path):
    (tmp_path / "more.txt").write_text("zebra " * 50)
    folder = tmp_path / "new" / "tokenizer"
    options = ["--vocab-size", 400, "--model-type", "unigram", "--character-coverage", 1.0]
    inputs = ["--input", text, "--input", tmp_path / "more.txt"]
    printed = call("train", "--type", "sentencepiece", *inputs, *options, "--output", folder)
    assert f"tokenizer: {{type: saved, path: {folder}}}" in printed
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.config.model_type) == (400, "unigram")
    found = json.loads(call("show", folder, "--text", "the zebra\n☃", "--json"))
    assert (found["fingerprint"], found["vocab_size"]) == (tokenizer.fingerprint, 400)
    encoded = found["text"]
    assert (encoded["decoded"], encoded["lossless"]) == ("the zebra\n☃", True)
    assert encoded["bytes_per_token"] == 13 / len(encoded["ids"])
    assert "\n" in encoded["pieces"]


def test_words_are_learnt_from_the_training_split_of_a_recipe(text, tmp_path):
    recipe = write_recipe(tmp_path, text, "{type: bytes}")
    options = ["--recipe", recipe, "--max-size", 4, "--output", tmp_path / "words"]
    found = json.loads(call("train", "--type", "word", *options, "--json"))
    assert (found["type"], found["vocab_size"], found["folder"]) == ("word", 4, str(tmp_path / "words"))
    assert "word" in call("show", tmp_path / "words")


def test_a_recipe_says_by_itself_what_to_learn(text, tmp_path):
    recipe = write_recipe(tmp_path, text, "{type: sentencepiece, vocab_size: 390}")
    call("train", "--recipe", recipe, "--output", tmp_path / "new")
    learnt = load_tokenizer(tmp_path / "new")
    assert learnt.vocab_size == 390
    assert json.loads(call("show", recipe, "--json"))["fingerprint"] == learnt.fingerprint, "what a run of it uses"
    other = json.loads(call("show", recipe, "tokenizer.vocab_size=380", "--json"))
    assert other["vocab_size"] == 380


def test_the_table_shows_each_token(text, tmp_path):
    printed = call("show", write_recipe(tmp_path, text, "{type: bytes}"), "--text", "é[b]")
    assert "vocab_size: 256" in printed
    assert "5 tokens" in printed
    assert "1.00 bytes a token; decoding gives the text back" in printed
    words = write_recipe(tmp_path, text, "{type: word, max_size: 3}")
    assert r"gives another text: '<unk> <unk>\n'" in call("show", words, "--text", "q  q\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --input .* or --recipe"),
        (["--input", "TEXT", "--recipe", "RECIPE"], "give either --input .* or --recipe"),
        (["--input", "TEXT"], r"--input: needs --type \(sentencepiece, word\)"),
        (["--recipe", "RECIPE", "--vocab-size", "9"], "--vocab-size: needs --type"),
        (["--recipe", "RECIPE"], "its tokenizer bytes is not learnt"),
        (["--input", "TEXT", "--type", "bytes"], "--type bytes: is not learnt; choose one of sentencepiece, word"),
        (["--input", "TEXT", "--type", "saved"], "--type saved: is not learnt"),
        (
            ["--input", "TEXT", "--type", "word", "--vocab-size", "9"],
            "--vocab-size: has no effect with --type word, whose options are --max-size, --min-count",
        ),
        (
            ["--input", "TEXT", "--type", "sentencepiece", "--model-type", "wordpiece"],
            r"--model-type: input should be 'bpe' or 'unigram' \(got 'wordpiece'\)",
        ),
    ],
)
def test_arguments_that_make_no_sense_are_refused(text, tmp_path, arguments, message):
    names = {"TEXT": text, "RECIPE": write_recipe(tmp_path, text, "{type: bytes}")}
    with pytest.raises(LaunchError, match=message):
        call("train", *(names.get(one, one) for one in arguments), "--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_bad_input_and_output_are_refused_before_anything_is_written(text, tmp_path):
    (tmp_path / "empty.txt").touch()
    for name, message in {"missing.txt": "cannot be read: No such file", "empty.txt": "holds no text"}.items():
        with pytest.raises(DataError, match=message):
            call("train", "--type", "word", "--input", tmp_path / name, "--output", tmp_path / "new")
    with pytest.raises(DataError, match="holds something other than a tokenizer"):
        call("train", "--type", "word", "--input", text, "--output", tmp_path)
    with pytest.raises(LaunchError, match="cannot be written: Not a directory; choose another --output"):
        call("train", "--type", "word", "--input", text, "--output", text / "new")
    assert not (tmp_path / "new").exists()


def test_showing_what_is_no_tokenizer_is_refused(text, tmp_path):
    with pytest.raises(DataError, match="holds no saved tokenizer"):
        call("show", tmp_path)
    with pytest.raises(LaunchError, match="overrides go with a recipe"):
        call("show", tmp_path, "seed=1")


@pytest.mark.parametrize(
    ("tokenizer", "size"),
    [
        ("{type: sentencepiece, vocab_size: 5000}", 5000),  # more than this text yields: it is not read
        ("{type: word}", 2 + len(set(TEXT.split()))),
        ("{type: bytes}", 256),
    ],
)
def test_validate_knows_the_vocabulary_before_training(text, tmp_path, tokenizer, size):
    assert vocab_size_of(load_recipe(str(write_recipe(tmp_path, text, tokenizer)))) == size
