"""``data prepare``, ``verify`` and ``show``: what they print, and what they leave or find in the cache."""

import io
import json
import multiprocessing
import os

import pytest
import yaml
from rich.console import Console
from support.command import smoe_train

from smoe_train.cli.data import printable
from smoe_train.cli.progress_bars import shown
from smoe_train.data.progress import current
from smoe_train.data.stores import known_corpora, token_store

DOCUMENTS = ["Ein\x1b[31m Wort.", "zwei drei", "vier", "fünf", "sechs sieben", "acht"]
ROWS = [
    {"text": "good film", "text2": "it is good", "label": "yes"},
    {"text": "a bad film, far too long to be watched", "text2": "no", "label": "no"},
    {"text": "fair", "text2": "it is", "label": "yes"},
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMOE_TRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def settled(monkeypatch):
    """Fixtures are younger than the two seconds after which files count as settled."""
    monkeypatch.setattr(known_corpora, "SETTLING_NANOSECONDS", 0)


def write(path, **sections):
    path.write_text(yaml.safe_dump({"version": 1, **sections}))
    return path


@pytest.fixture
def plain(tmp_path, cache):
    """1,000 bytes of one text: 900 train, 50 validate, 50 test."""
    (tmp_path / "plain.txt").write_bytes(b"0123456789abcdef\n" * 50 + (b"x" * 49 + b"\n") * 3)
    return write(tmp_path / "plain.yaml", data={"source": "text", "path": str(tmp_path / "plain.txt")})


@pytest.fixture
def documents(tmp_path, cache):
    for name, rows in (("train", DOCUMENTS), ("valid", ["neun"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    data = {"source": "records", "path": str(tmp_path / "train.jsonl"), "valid_path": str(tmp_path / "valid.jsonl")}
    return write(tmp_path / "documents.yaml", data=data)


@pytest.fixture
def labelled(tmp_path, cache):
    for name, rows in (("train", ROWS), ("dev", ROWS[:2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": "labelled", "path": str(tmp_path), "text2": "text2", "labels": ["no", "yes"]}
    task = {"type": "sequence_classification"}
    return write(tmp_path / "labelled.yaml", data=data, task=task, training={"sequence_length": 24})


def data(command, recipe, *arguments):
    return smoe_train("data", command, recipe, *arguments)


def stores(cache):
    return sorted((cache / "stores").glob("*/")) if cache.exists() else []


# prepare


def test_prepare_counts_what_a_text_holds(plain, cache):
    found = json.loads(data("prepare", plain, "--json").out)
    counts = {name: (row["bytes"], row["tokens"]) for name, row in found["splits"].items()}
    assert counts == {"train": (900, 900), "valid": (50, 50), "test": (50, 50)}
    assert [str(path) for path in stores(cache)] == [found["store"]]
    table = data("prepare", plain)
    assert table.code == 0
    assert "text, tokenizer bytes with 256 ids" in table.out
    assert "1.00" in table.out


def test_prepare_counts_documents_and_words_that_the_vocabulary_lacks(documents):
    found = json.loads(data("prepare", documents, "tokenizer.type=word", "--json").out)
    train, valid = found["splits"]["train"], found["splits"]["valid"]
    assert (train["documents"], valid["documents"]) == (6, 1)
    assert (train["unknown"], valid["unknown"]) == (0, 1)  # "neun"


def test_prepare_counts_examples_and_their_labels(labelled):
    found = json.loads(data("prepare", labelled, "--json").out)
    train = found["splits"]["train"]
    # Bytes of the texts: 9 + 10, 38 + 2, 4 + 5.
    assert train == {"examples": 3, "tokens": 68, "longest": 40, "without_label": 0, "labels": {"no": 1, "yes": 2}}
    assert "yes: 2" in data("prepare", labelled).out


def test_what_is_prepared_is_not_made_again(plain, monkeypatch, settled):
    data("prepare", plain)
    monkeypatch.setattr(token_store, "write_store", lambda *_: pytest.fail("made again"))
    assert data("prepare", plain).code == 0


def test_data_that_is_not_there_ends_with_2(plain, cache):
    found = data("prepare", plain, "data.path=nowhere.txt")
    assert found.code == 2
    assert "there is no such file" in found.err
    assert not stores(cache)


def prepare_at_once(barrier, recipe, log):
    write_store = token_store.write_store

    def logged(*arguments):
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        write_store(*arguments)

    token_store.write_store = logged  # in this process alone
    barrier.wait(60)
    found = smoe_train("data", "prepare", recipe)
    os._exit(found.code)


def test_processes_that_prepare_at_once_make_one_store(plain, cache, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, log = context.Barrier(2), tmp_path / "log"
    processes = [context.Process(target=prepare_at_once, args=(barrier, plain, log)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(log.read_text().splitlines()) == 1
    assert len(stores(cache)) == 1
    assert data("verify", plain).code == 0


# verify


@pytest.mark.parametrize("kind", ["plain", "documents", "labelled"])
def test_verify_finds_a_sound_store(kind, request):
    recipe = request.getfixturevalue(kind)
    prepared = json.loads(data("prepare", recipe, "--json").out)
    found = json.loads(data("verify", recipe, "--json").out)
    assert (found["store"], found["sound"]) == (prepared["store"], True)
    assert found["checksums"]["corpus"] == prepared["corpus"]
    assert data("verify", recipe).out.startswith(f"{found['store']}: sound")


@pytest.mark.parametrize(("kind", "name"), [("plain", "train.bin"), ("labelled", "dev.labels.bin")])
def test_verify_finds_a_changed_byte(kind, name, request, cache):
    recipe = request.getfixturevalue(kind)
    data("prepare", recipe)
    path = stores(cache)[0] / name
    contents = bytearray(path.read_bytes())
    contents[5] ^= 1
    path.write_bytes(contents)
    found = data("verify", recipe)
    assert found.code == 2
    assert f"{path}: is damaged" in found.err
    assert "remove the folder and prepare the data again" in found.err


def test_verify_finds_a_missing_part(plain, cache):
    data("prepare", plain)
    (stores(cache)[0] / "valid.bin").unlink()
    found = data("verify", plain)
    assert found.code == 2
    assert f"{stores(cache)[0] / 'valid.bin'}: is missing" in found.err


def test_verify_prepares_nothing(plain, cache):
    assert "was not prepared" in (first := data("verify", plain)).err
    assert first.code == 2
    data("prepare", plain)
    before = stores(cache)
    assert data("verify", plain, "tokenizer.type=word").code == 2
    assert data("verify", plain, "data.test_fraction=0.1").code == 2
    assert stores(cache) == before


def test_verify_reads_the_files_themselves(plain, cache, settled):
    """What was remembered of the files is replaced, as if they had changed without a trace in their times."""
    data("prepare", plain)
    (entry,) = (cache / "known").iterdir()
    entry.write_text(json.dumps({"corpus": "0" * 64}))
    found = data("verify", plain)
    assert found.code == 2
    assert "the files hold something else than when they were first read" in found.err


# show


def test_show_prints_blocks_of_a_text_without_documents(plain):
    found = json.loads(data("show", plain, "--count", 2, "--json", "training.sequence_length=20").out)["samples"]
    assert [(one["first_token"], one["text"]) for one in found] == [
        (0, "0123456789abcdef\n012"),
        (20, "3456789abcdef\n012345"),
    ]
    last = json.loads(data("show", plain, "--split", "test", "--count", 9, "--json").out)["samples"]
    assert [one["tokens"] for one in last] == [50]


def test_show_marks_where_documents_end_and_where_they_are_cut(documents):
    lines = data("show", documents, "--count", 3, "training.sequence_length=12").out.splitlines()
    # 14 bytes and a line end, of which 12 are shown; the terminal is not told to write red.
    assert lines[:2] == ["tokens 0 to 15", "Ein\\x1b[31m Wor⟨cut⟩ 3 more tokens"]
    assert lines.count("⟨end of document⟩") == 2


def test_show_prints_examples_as_the_model_sees_them(labelled):
    found = json.loads(data("show", labelled, "--json").out)["samples"]
    assert [(one["label"], one["first"], one["second"]) for one in found] == [
        (row["label"], row["text"], row["text2"]) for row in ROWS
    ]
    # 24 tokens, of which 2 separate: of 38 + 2 bytes, the longer text keeps 20.
    assert "".join(found[1]["pieces"]) == "a bad film, far too \nno\n"
    assert (found[1]["tokens"], len(found[1]["ids"])) == (42, 24)
    text = data("show", labelled, "--count", 2).out
    assert "row 1, label no" in text
    assert "⟨cut⟩ 18 more tokens" in text
    assert text.count("⟨cut⟩") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "valid"], "--split: labelled has no valid split; there are: train, dev"),
        (["training.sequence_length=3"], "training.sequence_length: 3 is too short"),
    ],
)
def test_what_cannot_be_shown_ends_with_2(labelled, arguments, message):
    found = data("show", labelled, *arguments)
    assert found.code == 2
    assert message in found.err


def test_control_characters_are_not_obeyed():
    assert printable("a\tb\nc\x1b[2J\x07\u202eé") == "a\tb\nc\\x1b[2J\\x07\\u202eé"


# Bars


def test_a_terminal_gets_bars_and_nothing_else_does():
    log = current()
    with shown(Console(file=io.StringIO())):
        assert current() is log
    terminal = io.StringIO()
    with (
        shown(Console(file=terminal, force_terminal=True, width=120)),
        current().task("tokenizing [b]", 2_000_000) as advance,
    ):
        advance(500_000)
        advance(1_500_000)
    assert current() is log
    assert "tokenizing [b]" in terminal.getvalue()
    assert "2.0/2.0 MB" in terminal.getvalue()
