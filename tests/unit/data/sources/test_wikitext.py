import hashlib
import io
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError
from support.file_server import serving

from smoe_train.data import build_source
from smoe_train.data.reading import download
from smoe_train.data.reading.download import Published
from smoe_train.data.sources import hub, wikitext
from smoe_train.data.sources.wikitext import EDITIONS, HUB, REVISION, WikitextConfig
from smoe_train.errors import DataError

SHARED = Path(os.environ.get("SMOE_TRAIN_DATA", Path(__file__).parents[5] / "shared" / "data"))
needs_real = pytest.mark.skipif(
    not (SHARED / "wikitext-2").is_dir(), reason="the folder of real data is absent (SMOE_TRAIN_DATA)"
)


def articles(*titles):
    return [
        f" \n = {title} = \n \n Text of {title} , with <unk> . \n \n = = Part = = \n \n".encode() for title in titles
    ]


TEXTS = {
    "train": b"".join(articles("A", "B", "C", "D")),
    "valid": b"".join(articles("E", "F")),
    "test": b"".join(articles("G")),
}
LINES = {"train": 28, "valid": 14, "test": 7}
HUB_NAMES = {"train": "train", "valid": "validation", "test": "test"}


def rows_of(text):
    """A text as the hub keeps it: one line a row with its line end, but blank lines empty."""
    return ["" if line == " \n" else line for line in text.decode().splitlines(keepends=True)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Pretends that TEXTS is WikiText-2, as tokens and raw."""
    assert {name: text.count(b"\n") for name, text in TEXTS.items()} == LINES
    sha1 = {name: hashlib.sha1(text).hexdigest() for name, text in TEXTS.items()}
    for edition in ("wikitext-2-v1", "wikitext-2-raw-v1"):
        monkeypatch.setitem(EDITIONS, edition, replace(EDITIONS[edition], lines=LINES, sha1=sha1))


def load(cache, **options):
    return build_source(WikitextConfig(name="wikitext-2", **options)).load(cache)


def contents(cache, **options):
    return {name: b"".join(split.read()) for name, split in load(cache, **options).splits.items()}


def write_folder(folder, suffix="tokens", texts=TEXTS):
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / f"wiki.{name}.{suffix}").write_bytes(text)
    return folder


def write_zip(path, suffix="tokens", texts=TEXTS):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("wikitext-2/", "")
        for name, text in texts.items():
            archive.writestr(f"wikitext-2/wiki.{name}.{suffix}", text)
    return path


def write_parquet(folder, texts=TEXTS, shards=1):
    folder.mkdir(parents=True)
    for name, text in texts.items():
        rows = rows_of(text)
        count = shards if name == "train" else 1
        for shard in range(count):
            part = rows[len(rows) * shard // count : len(rows) * (shard + 1) // count]
            path = folder / f"{HUB_NAMES[name]}-{shard:05d}-of-{count:05d}.parquet"
            pyarrow.parquet.write_table(pyarrow.table({"text": part}), path)
    return folder


def test_all_forms_give_the_same_bytes(tmp_path):
    forms = {
        "folder": write_folder(tmp_path / "a"),
        "folder above": write_folder(tmp_path / "b" / "wikitext-2").parent,
        "zip": write_zip(tmp_path / "wikitext-2-v1.zip"),
        "parquet": write_parquet(tmp_path / "c", shards=2),
        "parquet of several editions": write_parquet(tmp_path / "d" / "wikitext-2-v1").parent,
    }
    for form, path in forms.items():
        assert contents(tmp_path, path=path) == TEXTS, form
    corpora = [load(tmp_path, path=path) for path in forms.values()]
    assert len({corpus.fingerprint for corpus in corpora}) == 1
    assert {corpus.name for corpus in corpora} == {"wikitext"}, "by which a store is found again"


def test_raw_texts_are_other_files(tmp_path):
    folder = write_folder(tmp_path / "wikitext-2-raw", "raw")
    assert contents(tmp_path, path=folder, raw=True) == TEXTS
    with pytest.raises(DataError, match=r"holds no train text of wikitext-2-v1 \(wiki\.train\.tokens\)"):
        contents(tmp_path, path=folder)


def test_articles_are_documents_and_figures_are_per_word(tmp_path):
    corpus = load(tmp_path, path=write_folder(tmp_path / "a"))
    assert corpus.per_word
    ends = np.cumsum([len(article) for article in articles("A", "B", "C", "D")])
    assert corpus.splits["train"].document_ends.tolist() == ends.tolist()
    assert corpus.splits["valid"].place(3) == f"{tmp_path / 'a' / 'wiki.valid.tokens'}, byte 3"


def test_blank_lines_and_leading_spaces_of_hub_rows_are_rebuilt(tmp_path):
    assert rows_of(b" \n = A = \n \n")[:2] == ["", " = A = \n"]
    rebuilt = b"".join(wikitext.lines_of_rows("rows", enumerate([{"text": row} for row in rows_of(TEXTS["train"])], 1)))
    assert rebuilt == TEXTS["train"]


def test_several_editions_side_by_side_are_told_apart_by_their_folders(tmp_path):
    write_folder(tmp_path / "all" / "wikitext-2")
    write_folder(tmp_path / "all" / "wikitext-103", texts={"train": b" other \n", "valid": b" x \n", "test": b" y \n"})
    assert contents(tmp_path, path=tmp_path / "all") == TEXTS
    (tmp_path / "all" / "wikitext-2").rename(tmp_path / "all" / "unnamed")
    (tmp_path / "all" / "wikitext-103").rename(tmp_path / "all" / "unnamed-2")
    with pytest.raises(DataError, match="holds no train text"):
        contents(tmp_path, path=tmp_path / "all")


def test_missing_splits_need_a_setting(tmp_path):
    path = write_zip(tmp_path / "a.zip", texts={name: TEXTS[name] for name in ("train", "valid")})
    with pytest.raises(
        DataError, match=r"holds no test text.*data\.test_path.*data\.test_fraction=0\.05.*data\.test=false"
    ):
        contents(tmp_path, path=path)
    assert set(contents(tmp_path, path=path, test=False)) == {"train", "valid"}
    whole = write_folder(tmp_path / "whole")
    assert contents(tmp_path, path=path, test_path=whole / "wiki.test.tokens") == TEXTS
    assert set(contents(tmp_path, path=whole, test=False)) == {"train", "valid"}


def test_single_files_and_shares_of_them(tmp_path):
    whole = write_folder(tmp_path / "whole")
    paths = {"path": whole / "wiki.train.tokens", "valid_path": whole / "wiki.valid.tokens"}
    assert contents(tmp_path, **paths, test_path=whole / "wiki.test.tokens") == TEXTS
    with pytest.raises(DataError, match=r"holds no valid text.*data\.valid_path.*data\.valid_fraction=0\.05"):
        contents(tmp_path, path=paths["path"])
    a, b, c, d = articles("A", "B", "C", "D")
    shares = {"valid_fraction": 0.25, "test_fraction": 0.25}
    assert contents(tmp_path, path=paths["path"], **shares) == {"train": a + b, "valid": c, "test": d}
    assert contents(tmp_path, **paths, test_fraction=0.25) == {"train": a + b + c, "valid": TEXTS["valid"], "test": d}
    with pytest.raises(DataError, match=r"holds a valid text, so data\.valid_fraction has no effect"):
        contents(tmp_path, path=whole, valid_fraction=0.25)
    with pytest.raises(DataError, match="one file serves two splits"):
        contents(tmp_path, path=paths["path"], valid_path=paths["path"], test=False, allow_piece=True)
    with pytest.raises(DataError, match=r"there is no such file; set data\.valid_path"):
        contents(tmp_path, path=paths["path"], valid_path=tmp_path / "absent")


def test_a_piece_needs_a_setting_and_other_contents_are_told(tmp_path, caplog):
    folder = write_folder(tmp_path / "a", texts=TEXTS | {"train": b"".join(articles("A", "B", "C"))})
    with pytest.raises(
        DataError, match=r"wiki\.train\.tokens: has 21 lines; the train split .* has 28.*allow_piece=true"
    ):
        contents(tmp_path, path=folder)
    assert "is not byte for byte" not in caplog.text
    contents(tmp_path, path=folder, allow_piece=True)
    shuffled = b"".join(articles("D", "B", "C", "A"))
    (folder / "wiki.train.tokens").write_bytes(shuffled)
    caplog.clear()
    assert contents(tmp_path, path=folder)["train"] == shuffled
    assert "wiki.train.tokens: is not byte for byte the published train text" in caplog.text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: b"\xef\xbb\xbf" + text, r"wiki\.train\.tokens: line 1: begins with a byte order mark"),
        (lambda text: text.replace(b"\n", b"\r\n"), "line 2: ends with CRLF|line 1: ends with CRLF"),
        (lambda text: text.replace(b"<unk>", b"<un\0>", 1), "line 4: has a NUL byte"),
        (lambda text: text.replace(b"<unk>", b"\xff", 1), "line 4: is not valid UTF-8"),
        (lambda text: b"", "has 0 lines"),
    ],
)
def test_damaged_texts_are_errors_with_file_and_line(tmp_path, damage, message):
    folder = write_folder(tmp_path / "a", texts=TEXTS | {"train": damage(TEXTS["train"])})
    with pytest.raises(DataError, match=message):
        contents(tmp_path, path=folder)


def test_damaged_archives_and_rows_are_errors(tmp_path):
    path = write_zip(tmp_path / "a.zip")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="is not a zip archive or is damaged"):
        contents(tmp_path, path=path)
    with pytest.raises(DataError, match=r"there is no such file or folder; set data\.path to wikitext-2-v1\.zip"):
        contents(tmp_path, path=tmp_path / "absent")
    folder = write_parquet(tmp_path / "parquet", shards=2)
    (folder / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="number 00001 is missing"):
        contents(tmp_path, path=folder)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), folder / "train-00001-of-00002.parquet")
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet: row 2: column 'text' holds None"):
        contents(tmp_path, path=folder)


class FakeHub:
    """Stands in for the library: `load_hub` with the rows of TEXTS."""

    def __init__(self, texts):
        self.texts = texts
        self.asked = []

    def __call__(self, name, config, split, revision):
        self.asked.append((name, config, split, revision))
        if self.texts is None:
            raise DataError(f"{name}: cannot be loaded from the hub")
        text = next(self.texts[key] for key, hub_name in HUB_NAMES.items() if hub_name == split)

        class Rows:
            def iter(self, batch_size):
                rows = rows_of(text)
                for start in range(0, len(rows), 5):
                    yield {"text": rows[start : start + 5]}

        return Rows()


@pytest.fixture
def archive(monkeypatch):
    """Serves the archive as the published one."""
    buffer = io.BytesIO()
    write_zip(buffer)
    data = buffer.getvalue()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.0)
    with serving(**{"wikitext-2-v1.zip": data}) as server:
        url = f"{server.url}/wikitext-2-v1.zip"
        published = Published("wikitext-2-v1.zip", [url], hashlib.sha256(data).hexdigest(), num_bytes=len(data))
        monkeypatch.setitem(EDITIONS, "wikitext-2-v1", replace(EDITIONS["wikitext-2-v1"], archive=published))
        yield server


def test_without_a_path_the_text_is_rebuilt_from_the_hub_once(tmp_path, monkeypatch, archive):
    fake = FakeHub(TEXTS)
    monkeypatch.setattr(hub, "load_hub", fake)
    assert contents(tmp_path) == TEXTS
    assert fake.asked == [(HUB, "wikitext-2-v1", split, REVISION) for split in ("train", "validation", "test")]
    assert set(contents(tmp_path, test=False)) == {"train", "valid"}
    assert len(fake.asked) == 3
    assert archive.requests == []
    files = build_source(WikitextConfig(name="wikitext-2")).files(tmp_path)
    assert all(path.is_file() for path in files)


@pytest.mark.parametrize("texts", [None, TEXTS | {"test": b" other \n"}])
def test_without_the_hub_the_archive_is_downloaded(tmp_path, monkeypatch, archive, texts, caplog):
    fake = FakeHub(texts)
    monkeypatch.setattr(hub, "load_hub", fake)
    for _ in range(2):
        assert contents(tmp_path) == TEXTS
    assert "trying the archive" in caplog.text
    assert len(archive.requests) == 1
    assert len(fake.asked) == (1 if texts is None else 3), "with the archive at hand the hub is not asked again"
    (path,) = build_source(WikitextConfig(name="wikitext-2")).files(tmp_path)
    assert path.is_file()


def test_without_both_the_message_names_both_and_what_to_do(tmp_path, monkeypatch, archive):
    monkeypatch.setattr(hub, "load_hub", FakeHub(None))
    archive.status = 403
    with pytest.raises(DataError, match=r"from the hub.*archive.*HTTP 403.*sha256.*set data\.path to it"):
        contents(tmp_path)
    assert not [path for path in (tmp_path / "downloads").rglob("*") if path.suffix != ".lock"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"valid_fraction": 0.1, "allow_piece": True}, "valid_fraction, allow_piece: has no effect on the downloaded"),
        ({"path": "p", "valid_path": "v", "valid_fraction": 0.1}, "valid_path and valid_fraction exclude each other"),
        ({"path": "p", "test": False, "test_path": "t"}, "have no effect with test: false"),
        ({"path": "p", "valid_fraction": 0.5, "test_fraction": 0.5}, "must be below 1"),
        ({"name": "wikitext-3"}, "Input should be 'wikitext-2' or 'wikitext-103'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        WikitextConfig.model_validate({"name": "wikitext-2", **options}, strict=False)


@pytest.fixture
def real(monkeypatch):
    """The real digests again, which the autouse fixture replaced."""
    monkeypatch.undo()


def tokens(split):
    """WikiText's count: words, and one end of sentence a line."""
    return sum(len(line.split()) + 1 for line in b"".join(split.read()).splitlines())


@needs_real
def test_the_real_archive_has_the_published_size_and_articles(real, tmp_path):
    """Table 1 of arXiv 1609.07843: 600 and 60 articles."""
    path = SHARED / "wikitext-2" / "wikitext-2-v1.train-valid.zip"
    splits = load(tmp_path, path=path, test=False).splits
    train = b"".join(splits["train"].read())
    assert (train.count(b"\n"), len(train)) == (36_718, 10_797_148)
    assert {name: len(split.document_ends) for name, split in splits.items()} == {"train": 600, "valid": 60}
    assert (tokens(splits["train"]), tokens(splits["valid"])) == (2_088_628, 217_646)


@needs_real
@pytest.mark.parametrize(
    ("folder", "suffix"), [("wikitext-2", "tokens"), ("wikitext-103", "tokens"), ("wikitext-2-raw", "raw")]
)
def test_the_real_validation_texts_are_the_published_ones(real, tmp_path, caplog, folder, suffix):
    train = write_folder(tmp_path / "made-up", suffix, {"train": TEXTS["train"]}) / f"wiki.train.{suffix}"
    valid = SHARED / folder / f"wiki.valid.{suffix}"
    config = WikitextConfig(
        name=folder.removesuffix("-raw"),
        raw=suffix == "raw",
        path=train,
        valid_path=valid,
        test=False,
        allow_piece=True,
    )
    split = build_source(config).load(tmp_path).splits["valid"]
    assert len(split.document_ends) == 60
    assert tokens(split) == 217_646
    assert [record.args[0] for record in caplog.records] == [str(train)], "only the made-up text differs"
