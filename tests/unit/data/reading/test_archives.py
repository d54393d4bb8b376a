"""Folders and archives as named files; made-up ones that are damaged or hostile are refused and nothing is written."""

import io
import os
import stat
import struct
import tarfile
import zipfile

import pytest

from smoe_train.data.reading import archives
from smoe_train.data.reading.archives import inside, is_archive, open_members, read_members
from smoe_train.errors import DataError

FILES = {"set/b.txt": b"second\n", "set/a.txt": b"first\n", "set/deep/c.tsv": b"1\t2\n"}


def zipped(path, files=FILES, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tarred(path, files=FILES, mode="w:gz", *members):
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for member in members:
            archive.addfile(member)
    return path


def folder(path, files=FILES):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def everything(path):
    return list(read_members(path, lambda name: True))


@pytest.mark.parametrize("make", [lambda at: zipped(at / "a.zip"), lambda at: folder(at / "a")])
def test_folders_and_zips_are_named_files_in_order(tmp_path, make):
    path = make(tmp_path)
    members = open_members(path)
    assert list(members) == sorted(FILES)
    assert {name: b"".join(file.chunks()) for name, file in members.items()} == FILES
    assert {name: file.num_bytes for name, file in members.items()} == {key: len(data) for key, data in FILES.items()}
    assert list(open_members(path, "*.txt")) == ["set/a.txt", "set/b.txt"]
    assert everything(path) == sorted(FILES.items())


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tars_are_read_in_their_own_order_whatever_their_name(tmp_path, mode):
    path = tarred(tmp_path / "archive", mode=mode)
    assert is_archive(path)
    assert everything(path) == list(FILES.items())
    assert list(read_members(path, lambda name: name.endswith(".tsv"))) == [("set/deep/c.tsv", b"1\t2\n")]


def test_tars_with_a_leading_dot_have_the_same_names(tmp_path):
    path = tarred(tmp_path / "a.tar.gz", {f"./{name}": data for name, data in FILES.items()})
    assert dict(everything(path)) == FILES


def test_what_is_no_archive_says_so(tmp_path):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(b"<html>moved</html>")
    assert not is_archive(path)
    with pytest.raises(DataError, match="is neither a zip nor a tar archive"):
        everything(path)
    with pytest.raises(DataError, match="there is no such file or folder"):
        open_members(tmp_path / "absent.zip")


HOSTILE = ["../outside", "a/../../outside", "/etc/passwd", "..\\outside", "C:\\outside", "C:outside"]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("make", [zipped, tarred])
def test_members_that_lead_out_are_refused(tmp_path, name, make):
    path = make(tmp_path / "archive.zip" if make is zipped else tmp_path / "archive", FILES | {name: b"x"})
    with pytest.raises(DataError, match="leads out of its folder"):
        everything(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("target", ["../../etc/passwd", "/etc/passwd", "set/a.txt"])
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_a_tar_are_refused(tmp_path, kind, target):
    member = tarfile.TarInfo("set/link")
    member.type, member.linkname = kind, target
    with pytest.raises(DataError, match="the member 'set/link' is a link"):
        everything(tarred(tmp_path / "a", FILES, "w:gz", member))


def test_devices_in_a_tar_are_refused(tmp_path):
    member = tarfile.TarInfo("set/pipe")
    member.type = tarfile.FIFOTYPE
    with pytest.raises(DataError, match="is not a regular file"):
        everything(tarred(tmp_path / "a", FILES, "w", member))


def test_links_in_a_zip_are_refused(tmp_path):
    path = zipped(tmp_path / "a.zip")
    link = zipfile.ZipInfo("set/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="the member 'set/link' is a link"):
        open_members(path)


def test_links_out_of_a_folder_are_refused(tmp_path):
    home = folder(tmp_path / "home")
    (home / "within.txt").symlink_to("set/a.txt")
    assert b"".join(open_members(home, "within.txt")["within.txt"].chunks()) == b"first\n"
    (tmp_path / "secret.txt").write_bytes(b"secret")
    (home / "out.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(DataError, match=r"out\.txt: is a link out of .*home, to .*secret\.txt"):
        open_members(home)


def test_a_snapshot_of_the_hub_may_link_to_its_blobs_and_nowhere_else(tmp_path):
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "0123"
    blob = tmp_path / "datasets--a--b" / "blobs" / "feed"
    for one in (snapshot, blob.parent):
        one.mkdir(parents=True)
    blob.write_bytes(b"rows")
    (tmp_path / "other").write_bytes(b"rows")
    (snapshot / "train.parquet").symlink_to(blob)
    (snapshot / "test.parquet").symlink_to(tmp_path / "other")
    assert inside(snapshot, snapshot / "train.parquet") == snapshot / "train.parquet"
    with pytest.raises(DataError, match="is a link out"):
        inside(snapshot, snapshot / "test.parquet")


def test_encrypted_members_are_refused(tmp_path):
    path = zipped(tmp_path / "a.zip", {"a": b"data"})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the flags of the central directory
    path.write_bytes(data)
    with pytest.raises(DataError, match="'a' is encrypted"):
        open_members(path)


def test_two_members_of_one_name_are_refused(tmp_path):
    path = zipped(tmp_path / "a.zip", {"a": b"1"})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("a", b"2")
    with pytest.raises(DataError, match="has two members 'a'"):
        open_members(path)


@pytest.fixture
def little(monkeypatch):
    monkeypatch.setattr(archives, "MAX_HARMLESS_BYTES", 1000)


@pytest.mark.parametrize("make", [zipped, tarred])
def test_archives_that_unpack_to_hundreds_of_times_their_size_are_refused(tmp_path, little, make):
    path = make(tmp_path / ("a.zip" if make is zipped else "a"), {"zeros": bytes(3_000_000)})
    assert path.stat().st_size < 10_000
    with pytest.raises(DataError, match="200 times as much"):
        everything(path)


def test_a_zip_that_lies_about_its_size_is_damaged(tmp_path):
    path = zipped(tmp_path / "a.zip", {"zeros": bytes(3_000_000)})
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = struct.pack("<I", 5)  # the declared size in the central directory
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.zip:zeros: cannot be read: Bad CRC-32"):
        everything(path)


def test_a_tar_member_too_large_to_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_TAR_MEMBER_BYTES", 6)
    with pytest.raises(DataError, match=r"'set/b\.txt' has 7 bytes"):
        everything(tarred(tmp_path / "a"))


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.98])
def test_tars_that_are_cut_off_are_refused(tmp_path, mode, share):
    path = tarred(tmp_path / "a", {f"{i}": os.urandom(2000) for i in range(20)}, mode)
    data = path.read_bytes()
    # A plain tar is padded with zeros; what counts is that files are missing.
    size = data.rindex(b"19\0") + 600 if mode == "w" and share == 0.98 else int(len(data) * share)
    path.write_bytes(data[:size])
    with pytest.raises(DataError, match=r"is damaged|is cut off"):
        everything(path)


def test_a_tar_cut_between_two_members_is_refused(tmp_path):
    """tarfile itself takes it for whole."""
    path = tarred(tmp_path / "a", {"1": bytes(512), "2": b"2" * 512, "3": b"3" * 512}, "w")
    path.write_bytes(path.read_bytes()[: 4 * 512])
    with tarfile.open(path) as archive:
        assert archive.getnames() == ["1", "2"]
    with pytest.raises(DataError, match="the end of a tar archive is missing"):
        everything(path)


def test_damaged_zips_are_refused(tmp_path):
    path = zipped(tmp_path / "a.zip", {"a": os.urandom(5000)})
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-30])
    with pytest.raises(DataError, match="is not a zip archive or is damaged"):
        open_members(path)
    data[2500] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.zip:a: cannot be read"):
        everything(path)


def test_an_empty_file_is_no_archive(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(b"")
    with pytest.raises(DataError, match="is not a zip archive or is damaged"):
        open_members(path)
