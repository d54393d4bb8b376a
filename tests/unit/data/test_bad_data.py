"""Bad data and bad luck from the recipe to the cache: one message, and nothing half written.

That each reader names file and row is tested beside it; here the whole of ``data prepare`` is, with a bad file of every
kind, and what stays in the cache when the disk is full, may only be read, or the process dies.
"""

import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
import yaml
from support.command import smoe_train

from smoe_train.data import BytesConfig, prepare, prepare_examples
from smoe_train.data.sources.labelled import LabelledFilesConfig
from smoe_train.data.sources.text import TextConfig
from smoe_train.data.stores import example_store, known_corpora, token_store
from smoe_train.data.tokenizers.word import WordConfig
from smoe_train.errors import DataError

NOBODY = 65534
RTE = "index\tsentence1\tsentence2\tlabel\n0\tIt rained.\tIt was wet.\tentailment\n"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMOE_TRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"".join(f"line {number}\n".encode() for number in range(2000)))
    return TextConfig(path=tmp_path / "text.txt")


@pytest.fixture
def labelled(tmp_path):
    folder = tmp_path / "labelled"
    folder.mkdir()
    for name in ("train", "dev"):
        rows = "".join(f"this is row {number} of {name}\tyes\nand this is not\tno\n" for number in range(150))
        (folder / f"{name}.tsv").write_text(f"text\tlabel\n{rows}")
    return LabelledFilesConfig(path=folder, labels=["no", "yes"])


def make(config, cache, tokenizer=None):
    how = prepare_examples if isinstance(config, LabelledFilesConfig) else prepare
    return how(config, tokenizer or BytesConfig(), cache)


def in_child(work):
    """Runs ``work`` in a process of its own and returns its exit code."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    return process.exitcode


def folders(cache):
    """Everything below the cache that a later command could take for data, or for a part of it."""
    found = cache.rglob("*") if cache.exists() else ()
    return sorted(str(path.relative_to(cache)) for path in found if path.is_file() and path.suffix != ".lock")


def tarred(path, *members):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


# Each makes bad files in a folder and returns the data section of a recipe, and what the message must name.


def truncated_tar(folder):
    path = tarred(folder / "aclImdb_v1.tar.gz", ("aclImdb/train/pos/0_9.txt", os.urandom(4000)))
    path.write_bytes(path.read_bytes()[:2000])
    return {"source": "imdb", "path": str(path), "allow_piece": True}, "aclImdb_v1.tar.gz"


def traversal_in_a_tar(folder):
    path = tarred(folder / "aclImdb_v1.tar.gz", ("aclImdb/train/pos/../../../../0_9.txt", b"Good."))
    return {"source": "imdb", "path": str(path), "allow_piece": True}, "aclImdb_v1.tar.gz"


def zip_bomb(folder):
    path = folder / "RTE.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("RTE/train.tsv", RTE.encode() + b"0" * 20_000_000)
        archive.writestr("RTE/dev.tsv", RTE)
    return {"source": "glue", "task": "rte", "path": str(path), "allow_piece": True}, "RTE.zip"


def wrong_checksum(folder):
    """As long as enwik8, but not enwik8."""
    path = folder / "enwik8"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    return {"source": "enwik8", "path": str(path)}, "enwik8"


def link_out_of_the_folder(folder):
    (folder / "RTE").mkdir()
    (folder / "elsewhere.tsv").write_text(RTE)
    (folder / "RTE" / "train.tsv").symlink_to(folder / "elsewhere.tsv")
    (folder / "RTE" / "dev.tsv").write_text(RTE)
    return {"source": "glue", "task": "rte", "path": str(folder / "RTE"), "allow_piece": True}, "train.tsv"


def rte(folder, train):
    (folder / "RTE").mkdir()
    (folder / "RTE" / "train.tsv").write_bytes(train if isinstance(train, bytes) else train.encode())
    (folder / "RTE" / "dev.tsv").write_text(RTE)
    return {"source": "glue", "task": "rte", "path": str(folder / "RTE"), "allow_piece": True}


def missing_header(folder):
    return rte(folder, RTE.partition("\n")[2]), "train.tsv"


def too_few_tabs(folder):
    return rte(folder, RTE + "1\tIt rained.\tIt was wet.\n"), "train.tsv: line 3"


def bad_label(folder):
    return rte(folder, RTE + "1\tIt rained.\tIt was wet.\tmaybe\n"), "train.tsv: line 3"


def nul_bytes(folder):
    return rte(folder, RTE + "1\tIt \0 rained.\tIt was wet.\tentailment\n"), "train.tsv: line 3"


def invalid_utf8(folder):
    return rte(folder, RTE.encode() + b"1\tIt \xff rained.\tIt was wet.\tentailment\n"), "train.tsv: line 3"


def empty_file(folder):
    return rte(folder, ""), "train.tsv"


def cut_json(folder):
    path = folder / "rows.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two')
    return {"source": "records", "path": str(path)}, "rows.jsonl: line 2"


def text_that_is_none(folder):
    path = folder / "text.txt"
    path.write_bytes(b"good text\n" * 100 + b"\xff\xfe" + b"good text\n" * 100)
    return {"source": "text", "path": str(path)}, "byte 1,000"


BAD = [
    truncated_tar,
    traversal_in_a_tar,
    zip_bomb,
    wrong_checksum,
    link_out_of_the_folder,
    missing_header,
    too_few_tabs,
    bad_label,
    nul_bytes,
    invalid_utf8,
    empty_file,
    cut_json,
    text_that_is_none,
]


@pytest.mark.parametrize("damage", BAD, ids=lambda damage: damage.__name__)
def test_bad_files_end_in_one_message_and_leave_nothing(damage, tmp_path, cache):
    data, named = damage(tmp_path)
    recipe = {"version": 1, "data": data, "tokenizer": {"type": "word"}}
    if data["source"] in ("glue", "imdb"):
        recipe["task"] = {"type": "sequence_classification"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = smoe_train("data", "prepare", tmp_path / "recipe.yaml")
    assert found.code == 2
    assert found.out == ""
    assert found.err.startswith("error: ")
    assert named in found.err
    assert "Traceback" not in found.err
    assert folders(cache) == []


# A full disk


def prepare_with_little_room(config, cache, limit, tokenizer):
    def work():
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # Python ignores the signal, so writing fails
        try:
            make(config, cache, tokenizer)
        except DataError as error:
            message = str(error)
            os._exit(0 if "cannot be written" in message and "free some space" in message else 3)
        except BaseException:
            os._exit(4)
        os._exit(5)

    return work


@pytest.mark.parametrize("limit", [10, 600, 3000])
@pytest.mark.parametrize("kind", ["text", "labelled"])
@pytest.mark.parametrize("tokenizer", [BytesConfig(), WordConfig()], ids=["bytes", "word"])
def test_a_full_disk_leaves_nothing_and_the_next_try_succeeds(kind, tokenizer, limit, tmp_path, request):
    """Every file of a store of a text of 18 kB, or of its tokenizer, is cut at some of these sizes."""
    config, cache = request.getfixturevalue(kind), tmp_path / "cache"
    assert in_child(prepare_with_little_room(config, cache, limit, tokenizer)) == 0
    assert not any(name.startswith("stores") for name in folders(cache))
    assert not any("partial" in str(path) for path in cache.rglob("*"))
    make(config, cache, tokenizer).verify()


# A cache that can only be read


@pytest.fixture
def open_folder():
    """A folder that every user can read, whatever the mode of pytest's own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_cache_that_can_only_be_read_serves_what_it_holds_and_nothing_else(open_folder, monkeypatch):
    monkeypatch.setattr(known_corpora, "SETTLING_NANOSECONDS", 0)
    (open_folder / "text.txt").write_bytes(b"text\n" * 100)
    config, cache = TextConfig(path=open_folder / "text.txt"), open_folder / "cache"
    expected = make(config, cache).checksums()
    before = folders(cache)
    for path in [cache, *(path for path in cache.rglob("*") if path.is_dir())]:
        path.chmod(0o555)

    def work():
        if os.geteuid() == 0:  # who may write everywhere
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        try:
            found = make(config, cache)
            found.verify()
            assert found.checksums() == expected
            with pytest.raises(DataError, match=r"cannot be written: .*Permission denied.*SMOE_TRAIN_CACHE"):
                make(config, cache, WordConfig())
        except BaseException as error:
            print(error)
            os._exit(1)
        os._exit(0)

    code = in_child(work)
    for path in [cache, *cache.rglob("*")]:
        path.chmod(0o755)
    assert code == 0
    assert folders(cache) == before


# A process that dies


@pytest.mark.parametrize(("kind", "module"), [("text", token_store), ("labelled", example_store)])
def test_a_killed_prepare_is_as_if_it_had_not_been(kind, module, tmp_path, request):
    """It dies with all tokens written and only the tokenizer and the record to come."""
    config, cache = request.getfixturevalue(kind), tmp_path / "cache"

    def work():
        module.save_tokenizer = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # in this process alone
        make(config, cache)

    assert in_child(work) == -signal.SIGKILL
    left = folders(cache)
    assert left
    assert all(".partial/" in name for name in left)
    store = make(config, cache)
    store.verify()
    assert store.checksums() == make(config, tmp_path / "another").checksums()
    assert not any(".partial" in name for name in folders(cache))


@pytest.mark.parametrize(("kind", "module"), [("text", token_store), ("labelled", example_store)])
def test_an_interrupted_prepare_cleans_up(kind, module, tmp_path, request, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_tokenizer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(request.getfixturevalue(kind), tmp_path / "cache")
    assert folders(tmp_path / "cache") == []


def test_a_record_that_was_lost_makes_the_store_anew(labelled, tmp_path, caplog):
    store = make(labelled, tmp_path / "cache")
    sums = store.checksums()
    (store.folder / "store.json").write_text(json.dumps({"format_version": 1}))
    assert make(labelled, tmp_path / "cache").checksums() == sums
    assert "damaged or incomplete" in caplog.text
