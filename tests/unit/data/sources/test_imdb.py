import gzip
import io
import tarfile

import pytest
from pydantic import ValidationError

from smoe_train.data import build_source
from smoe_train.data.examples import Example
from smoe_train.data.reading import download
from smoe_train.data.sources import hub
from smoe_train.data.sources.imdb import ImdbConfig, without_breaks
from smoe_train.errors import DataError
from tests.support.real_data import DATA, needs_real_data

REVIEWS = {
    "aclImdb/train/neg/1_2.txt": b"Dull.<br /><br />Very dull.",
    "aclImdb/train/pos/0_9.txt": "Schön.".encode(),
    "aclImdb/train/unsup/3_0.txt": b"No label.",
    "aclImdb/test/pos/7_10.txt": b"Great.",
    "aclImdb/README": b"About.",
}
TRAIN = [Example("Dull. Very dull.", None, 0, 0), Example("Schön.", None, 1, 1)]


def load(path, **options):
    options.setdefault("allow_piece", True)
    return build_source(ImdbConfig(path=path, **options)).load(path.parent)


def tarred(path, files, *extra):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in reversed(files.items()):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for member in extra:
            archive.addfile(member)
    return path


def unpacked(folder):
    for name, data in REVIEWS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_archive_and_folder_agree_and_the_test_split_is_reported_on(tmp_path):
    archive = load(tarred(tmp_path / "aclImdb_v1.tar.gz", REVIEWS))
    assert archive.splits == {"train": TRAIN, "dev": [Example("Great.", None, 1, 0)]}
    folder = unpacked(tmp_path / "folder")
    assert load(folder).fingerprint == load(folder / "aclImdb").fingerprint == archive.fingerprint


def test_with_dev_fraction_the_test_split_stays_one(tmp_path):
    corpus = load(tarred(tmp_path / "aclImdb_v1.tar.gz", REVIEWS), dev_fraction=0.5)
    assert {name: len(rows) for name, rows in corpus.splits.items()} == {"train": 1, "dev": 1, "test": 1}


def test_the_files_that_are_read_are_known_without_reading_an_archive(tmp_path, monkeypatch):
    archive = tmp_path / "aclImdb_v1.tar.gz"
    archive.write_bytes(gzip.compress(b"not a tar archive at all"))
    assert build_source(ImdbConfig(path=archive)).files(tmp_path) == [archive]
    folder = unpacked(tmp_path / "folder")
    assert len(build_source(ImdbConfig(path=folder)).files(tmp_path)) == 3
    assert build_source(ImdbConfig(fetch="archive")).files(tmp_path) == [tmp_path / "downloads" / archive.name]


def test_rows_of_csv_and_jsonl(tmp_path):
    (tmp_path / "IMDB Dataset.csv").write_text(
        'review,sentiment\n"Dull.<br /><br />Very dull.",negative\nSchön.,positive\n'
    )
    (tmp_path / "train.jsonl").write_text(
        '{"text": "Dull.<br>Very dull.", "label": 0}\n{"text": "Schön.", "label": 1}\n'
    )
    for name in ("IMDB Dataset.csv", "train.jsonl"):
        assert load(tmp_path / name, splits=["train"]).splits["train"] == TRAIN


def test_the_hub_and_the_original_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "read_hub", lambda *asked: iter([(1, {"text": "/".join(map(str, asked)), "label": 1})]))
    splits = build_source(ImdbConfig(allow_piece=True)).load(tmp_path).splits
    assert splits["dev"] == [Example("stanfordnlp/imdb/None/test/None", None, 1, 0)]

    def fetch(file, cache, remedy):
        assert (file.algorithm, file.digest) == ("md5", "7c2ac02c03563afcf9b574c7e56c153a")
        download.location(file, cache).parent.mkdir()
        return tarred(download.location(file, cache), REVIEWS)

    monkeypatch.setattr(download, "fetch", fetch)
    assert build_source(ImdbConfig(fetch="archive", allow_piece=True)).load(tmp_path).splits["train"] == TRAIN
    with pytest.raises(ValidationError, match="fetch has no effect"):
        ImdbConfig(path=tmp_path, fetch="hub")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a<br /><br />b", "a b"),
        ("a <br/> <br> b", "a b"),
        ("a < b", "a < b"),
        ("a<br />", "a "),
        ("two  spaces", "two  spaces"),
    ],
)
def test_line_breaks_become_one_space(text, expected):
    assert without_breaks(text) == expected


def member(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (member("../evil.txt", tarfile.REGTYPE), "leads out of its folder"),
        (member("/evil.txt", tarfile.REGTYPE), "leads out of its folder"),
        (member("aclImdb/train/neg/9_1.txt", tarfile.SYMTYPE, "/etc/passwd"), "is a link"),
        (member("aclImdb/train/neg/9_1.txt", tarfile.LNKTYPE, "../../x"), "is a link"),
    ],
)
def test_archives_that_lead_out_are_refused(tmp_path, extra, message):
    with pytest.raises(DataError, match=rf"reviews\.tar\.gz: .*{message}"):
        load(tarred(tmp_path / "reviews.tar.gz", REVIEWS, extra))


def test_a_truncated_archive_is_refused(tmp_path):
    path = tarred(tmp_path / "reviews.tar.gz", REVIEWS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"reviews\.tar\.gz: is (damaged|cut off)"):
        load(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "is empty"), (b"a\0", "line 1: has a NUL byte"), (b"a\n\xff", "line 2: is not valid UTF-8")],
)
def test_bad_reviews_are_named(tmp_path, data, message):
    with pytest.raises(DataError, match=rf"reviews\.tar\.gz:aclImdb/train/neg/1_2\.txt: {message}"):
        load(tarred(tmp_path / "reviews.tar.gz", REVIEWS | {"aclImdb/train/neg/1_2.txt": data}))


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    folder = unpacked(tmp_path / "folder")
    (tmp_path / "secret").write_text("secret")
    (folder / "aclImdb/train/neg/2_1.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match="is a link out of"):
        load(folder)


@needs_real_data
def test_a_real_piece_needs_explicit_settings():
    path = DATA / "imdb" / "aclImdb_1000.tar.gz"
    splits = load(path, dev_fraction=0.2).splits
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 800, "dev": 200}
    assert {one.label for one in splits["dev"]} == {0, 1}
    assert not any("<br" in one.first for one in splits["train"])
    with pytest.raises(DataError, match=r"has 1,000 rows, and the train split of imdb has 25,000"):
        load(path, dev_fraction=0.2, allow_piece=False)
    with pytest.raises(DataError, match="imdb: has no dev split"):
        load(path)
