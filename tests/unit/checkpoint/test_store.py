"""The folder of checkpoints under faults: crashes at every call, flipped bits, lying pointers, failing ranks."""

import builtins
import json
import os
import pathlib
import shutil
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import smoe_train.checkpoint.manifest as manifest_module
import smoe_train.checkpoint.store as store_module
import smoe_train.checkpoint.writing as writing_module
from smoe_train import durable
from smoe_train.checkpoint.folders import MANIFEST, step_name
from smoe_train.checkpoint.manifest import Checkpoint, sha256
from smoe_train.checkpoint.store import CheckpointStore
from smoe_train.errors import CheckpointError, RunFailedError


class Alone:
    """One rank."""

    rank = 0

    def gather_objects(self, item):
        return [item]

    def broadcast_object(self, item):
        return item


class Together:
    """Ranks that are threads; each call is a meeting of all."""

    def __init__(self, world_size):
        self.world_size = world_size
        self.items = [None] * world_size
        self.barrier = threading.Barrier(world_size, timeout=10)

    def of_rank(self, rank):
        meeting = self

        class Peers:
            def __init__(self):
                self.rank = rank

            def gather_objects(self, item):
                meeting.items[rank] = item
                meeting.barrier.wait()
                items = list(meeting.items)
                meeting.barrier.wait()
                return items

            def broadcast_object(self, item):
                return self.gather_objects(item)[0]

        return Peers()


def files(value, rank=0):
    return {
        f"rank-{rank:05d}.safetensors": {f"a/{rank}": torch.full((3,), float(value)), f"b/{rank}": torch.arange(4)},
        f"more-{rank:05d}.safetensors": {f"c/{rank}": torch.full((2, 2), value, dtype=torch.bfloat16)},
    }


def store_in(folder, keep_last=100):
    return CheckpointStore(folder, Alone(), keep_last)


def save(store, step, best=False):
    return store.save(step, files(step), {"step": step}, best)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def newest(folder):
    warnings = []
    return store_in(folder).newest_sound(warnings.append), warnings


# What is written


def test_what_was_saved_comes_back(tmp_path):
    path = store_in(tmp_path / "new").save(7, files(7), {"tokens": 3, "loss": 0.1, "none": None})
    assert path == tmp_path / "new" / "step-00000007"
    checkpoint = Checkpoint.open(path)
    checkpoint.verify()
    assert (checkpoint.step, checkpoint.state) == (7, {"tokens": 3, "loss": 0.1, "none": None})
    assert torch.equal(checkpoint.tensor("a/0"), torch.full((3,), 7.0))
    assert checkpoint.tensor("c/0").dtype == torch.bfloat16
    assert names(tmp_path / "new") == ["latest", "step-00000007"]


def test_the_manifest_holds_sizes_and_sums(tmp_path):
    path = save(store_in(tmp_path), 1)
    manifest = json.loads((path / MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        assert entry == {"bytes": (path / name).stat().st_size, "sha256": sha256(path / name)}
    assert set(manifest["files"]) == set(names(path)) - {MANIFEST}
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_tensors_that_share_memory_or_have_gaps_can_be_saved(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    path = store_in(tmp_path).save(1, {"x.safetensors": {"t": base.t(), "s": base[:, 1]}}, {})
    checkpoint = Checkpoint.open(path)
    assert torch.equal(checkpoint.tensor("t"), base.t())
    assert torch.equal(checkpoint.tensor("s"), base[:, 1])


def test_a_missing_tensor_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no tensor 'weight/x'; it belongs to another model"):
        Checkpoint.open(save(store_in(tmp_path), 1)).tensor("weight/x")


def test_steps_sort_as_numbers(tmp_path):
    store = store_in(tmp_path)
    for step in (100_000_000, 99_999_999, 5):
        save(store, step)
    assert [path.name for path in store.complete()] == ["step-100000000", "step-99999999", "step-00000005"]
    assert step_name(5) == "step-00000005"


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    store = store_in(tmp_path / "absent")
    assert store.complete() == []
    assert store.newest_sound(pytest.fail) is None
    for which in ("latest", "best"):
        with pytest.raises(CheckpointError, match=f"holds no {which} checkpoint"):
            store.find(which)


def test_only_latest_and_best_can_be_asked_for(tmp_path):
    save(store_in(tmp_path), 1)
    with pytest.raises(CheckpointError, match="'newest' names no checkpoint; say latest or best"):
        store_in(tmp_path).find("newest")


# Crashes


class Crash(BaseException):
    """Stands for the death of the process: nothing that is meant for errors catches it."""


CALLS = [
    (os, "fsync"),
    (os, "open"),
    (os, "rename"),
    (os, "replace"),
    (os, "mkdir"),
    (pathlib.Path, "open"),
    (pathlib.Path, "rename"),
    (pathlib.Path, "replace"),
    (pathlib.Path, "mkdir"),
    (builtins, "open"),
    (shutil, "rmtree"),
    (writing_module, "save_file"),
    (writing_module, "sha256"),
]


def fail_at(patch, count, error, after):
    """Lets the ``count``-th file-system call of this test fail, before or after it has had its effect."""
    left = [count]
    inside = [False]

    def wrapped(call):
        def run(*arguments, **options):
            if inside[0] or left[0] < 0:
                return call(*arguments, **options)
            left[0] -= 1
            failing = left[0] < 0
            if failing and not after:
                raise error
            inside[0] = True  # Path.open calls open; count what the code under test calls
            try:
                result = call(*arguments, **options)
            finally:
                inside[0] = False
            if failing:
                raise error
            return result

        return run

    for home, name in CALLS:
        patch.setattr(home, name, wrapped(getattr(home, name)))
    return left


def crash_points(tmp_path, error, after, prepare):
    """Runs a save once for each file-system call in it, failing there; yields the folder after each."""
    prepare(tmp_path / "before")
    for count in range(200):
        folder = tmp_path / str(count)
        shutil.copytree(tmp_path / "before", folder)
        failed = False
        with pytest.MonkeyPatch.context() as patch:
            left = fail_at(patch, count, error, after)
            try:
                save(store_in(folder, keep_last=2), 30, best=True)
            except (Crash, RunFailedError):
                failed = True
        if left[0] >= 0:
            assert count > 15, "a save has more calls than that; is the fault injected at all?"
            assert not failed
            return
        yield folder
    pytest.fail("a save does not end")


def two_checkpoints(folder):
    store = store_in(folder, keep_last=2)
    save(store, 10, best=True)
    save(store, 20)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", [Crash(), OSError(28, "No space left on device")], ids=["killed", "disk full"])
def test_a_crash_anywhere_costs_no_earlier_checkpoint(tmp_path, error, after):
    for folder in crash_points(tmp_path, error, after, two_checkpoints):
        found, warnings = newest(folder)
        assert found is not None
        assert found.step in (20, 30)
        assert warnings == []
        assert float(found.tensor("a/0")[0]) == found.step
        for path in store_in(folder).complete():
            Checkpoint.open(path).verify()
        best = store_in(folder).find("best")
        assert best.name in ("step-00000010", "step-00000030")
        # A later save works and clears away what the crash has left.
        save(store_in(folder, keep_last=2), 40)
        assert newest(folder)[0].step == 40
        assert not [name for name in names(folder) if name.startswith(".")]
        assert [path.name for path in store_in(folder).complete()][:2] == ["step-00000040", f"step-000000{found.step}"]


def test_an_error_while_a_step_is_replaced_keeps_the_old_one(tmp_path):
    def prepare(folder):
        two_checkpoints(folder)
        save(store_in(folder), 30)

    for folder in crash_points(tmp_path, OSError(5, "Input/output error"), False, prepare):
        found, warnings = newest(folder)
        assert (found.step, warnings) == (30, [])


def test_a_failed_save_says_what_and_where_and_leaves_nothing(tmp_path, monkeypatch):
    two_checkpoints(tmp_path)
    before = names(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing_module, "save_file", full)
    with pytest.raises(RunFailedError, match=r"step-00000030: could not be written: rank 0: OSError: .*No space left"):
        save(store_in(tmp_path), 30)
    assert names(tmp_path) == before


# Damage


def damaged_copies(path):
    """Yields (what, how) for many kinds of damage to each file of a checkpoint."""
    for name in names(path):
        size = (path / name).stat().st_size
        for position in sorted({0, 1, 8, size // 3, size // 2, size - 2, size - 1}):
            for bit in (0, 5):
                yield name, lambda file, at=position, bit=bit: flip(file, at, bit)
        for length in sorted({0, 1, size // 2, size - 1}):
            yield name, lambda file, length=length: os.truncate(file, length)
        yield name, lambda file: file.write_bytes(file.read_bytes() + b"\0")
        yield name, lambda file: file.unlink()


def flip(file, position, bit):
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(bytes(content))


def test_every_damage_is_detected_and_named(tmp_path):
    original = save(store_in(tmp_path / "original"), 5)
    count = 0
    for name, damage in damaged_copies(original):
        shutil.copytree(original, tmp_path / "copy")
        damage(tmp_path / "copy" / name)
        with pytest.raises(CheckpointError) as caught:
            Checkpoint.open(tmp_path / "copy").verify()
        assert name in str(caught.value)
        shutil.rmtree(tmp_path / "copy")
        count += 1
    assert count > 50


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_single_bit_of_any_file_can_flip_unseen(tmp_path, data):
    path = tmp_path / "step-00000005"
    if not path.exists():
        save(store_in(tmp_path), 5)
    file = path / data.draw(st.sampled_from(names(path)))
    content = file.read_bytes()
    try:
        flip(file, data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7)))
        with pytest.raises(CheckpointError, match=file.name.replace(".", r"\.")):
            Checkpoint.open(path).verify()
    finally:
        file.write_bytes(content)


def test_all_damaged_files_are_named_together(tmp_path):
    path = save(store_in(tmp_path), 5)
    flip(path / "rank-00000.safetensors", 100, 0)
    (path / "more-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank-00000.* another SHA-256.*; more-00000.* is missing|more.*; rank"):
        Checkpoint.open(path).verify()


def test_an_unreadable_file_is_a_damaged_one(tmp_path, monkeypatch):
    two_checkpoints(tmp_path)
    real = manifest_module.sha256

    def bad_disk(path):
        if path.parent.name == "step-00000020":
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(manifest_module, "sha256", bad_disk)
    found, warnings = newest(tmp_path)
    assert found.step == 10
    assert "cannot be read: Input/output error" in warnings[0]


def rewritten(path, **changes):
    """Writes a manifest that says something else, with a sum that fits: what an attacker would do."""
    manifest = json.loads((path / MANIFEST).read_text())
    manifest |= changes
    manifest.pop("sha256")
    manifest["sha256"] = manifest_module._text_sha256(manifest_module._canonical(manifest))
    (path / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", ".hidden.safetensors", "x.pt", "x.safetensors\n"],
)
def test_a_manifest_cannot_name_files_elsewhere(tmp_path, name):
    path = save(store_in(tmp_path), 5)
    entry = {"bytes": 1, "sha256": "0" * 64}
    rewritten(path, files={name: entry}, tensors={})
    with pytest.raises(CheckpointError, match="names a file that no checkpoint may have"):
        Checkpoint.open(path)
    rewritten(path, files={}, tensors={"a/0": name})
    with pytest.raises(CheckpointError, match="names a file that no checkpoint may have"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 3},
        {"step": "x"},
        {"step": None},
        {"state": 3},
        {"state": None},
        {"files": []},
        {"files": {"a.safetensors": 3}},
        {"files": {"a.safetensors": {"bytes": 3}}},
        {"tensors": 3},
        {"tensors": {"a": ["x"]}},
    ],
)
def test_a_manifest_of_another_form_is_refused(tmp_path, changes):
    path = save(store_in(tmp_path), 5)
    rewritten(path, **changes)
    with pytest.raises(CheckpointError, match="manifest"):
        Checkpoint.open(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"{}", b"\xff", b"[" * 100_000, b'{"format": 1}'])
def test_a_manifest_that_is_none_is_refused(tmp_path, content):
    path = save(store_in(tmp_path), 5)
    (path / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match="manifest"):
        Checkpoint.open(path)


def test_symbolic_links_are_not_followed(tmp_path):
    sound = save(store_in(tmp_path / "elsewhere"), 5)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "step-00000005").symlink_to(sound)
    assert store_in(folder).complete() == []
    assert newest(folder)[0] is None

    path = save(store_in(folder), 6)
    shutil.move(path / "rank-00000.safetensors", tmp_path / "moved")
    (path / "rank-00000.safetensors").symlink_to(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors is missing"):
        Checkpoint.open(path).verify()

    path = save(store_in(folder), 7)
    shutil.move(path / MANIFEST, tmp_path / "manifest")
    (path / MANIFEST).symlink_to(tmp_path / "manifest")
    with pytest.raises(CheckpointError, match="symbolic link"):
        Checkpoint.open(path)


# Choosing


def test_the_newest_sound_checkpoint_is_chosen_with_a_warning(tmp_path):
    store = store_in(tmp_path)
    for step in (10, 20, 30):
        save(store, step)
    flip(tmp_path / "step-00000030" / "more-00000.safetensors", 70, 3)
    (tmp_path / "step-00000020" / MANIFEST).write_text("{}")
    found, warnings = newest(tmp_path)
    assert found.step == 10
    assert len(warnings) == 2
    assert "more-00000.safetensors has another SHA-256" in warnings[0]
    assert all("resuming from the older step-00000010 instead" in warning for warning in warnings)


def test_when_every_checkpoint_is_damaged_nothing_is_chosen(tmp_path):
    two_checkpoints(tmp_path)
    for step in (10, 20):
        flip(tmp_path / step_name(step) / "rank-00000.safetensors", 90, 3)
    with pytest.raises(CheckpointError, match=r"(?s)every checkpoint is damaged .*step-00000020.*step-00000010"):
        newest(tmp_path)


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path):
    two_checkpoints(tmp_path)
    (tmp_path / "step-00000020" / MANIFEST).unlink()
    (tmp_path / "step-00000099").mkdir()
    (tmp_path / "step-100").mkdir()
    (tmp_path / "step-00000101").write_text("a file")
    assert [path.name for path in store_in(tmp_path).complete()] == ["step-00000010"]
    assert newest(tmp_path)[0].step == 10


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"../elsewhere", b"/etc", b"step-00000099", b"step-1", b"a\0b"])
def test_pointers_are_never_trusted(tmp_path, content):
    folder = tmp_path / "run"
    two_checkpoints(folder)
    save(store_in(tmp_path / "elsewhere"), 99)
    for name in ("latest", "best"):
        (folder / name).write_bytes(content)
    assert store_in(folder).find("latest").name == "step-00000020"
    assert newest(folder)[0].step == 20
    with pytest.raises(CheckpointError, match="holds no best checkpoint"):
        store_in(folder).find("best")
    save(store_in(folder, keep_last=1), 30)
    assert [path.name for path in store_in(folder).complete()] == ["step-00000030"]


def test_pointers_that_are_folders_or_missing_are_survived(tmp_path):
    two_checkpoints(tmp_path)
    (tmp_path / "best").unlink()
    (tmp_path / "best").mkdir()
    (tmp_path / "latest").unlink()
    assert store_in(tmp_path).find("latest").name == "step-00000020"
    with pytest.raises(CheckpointError, match="holds no best checkpoint"):
        store_in(tmp_path).find("best")


# Keeping


def test_the_last_and_the_best_are_kept(tmp_path):
    store = store_in(tmp_path, keep_last=2)
    for step in range(1, 7):
        save(store, step, best=step == 2)
    assert [path.name for path in store.complete()] == ["step-00000006", "step-00000005", "step-00000002"]
    assert store.find("best").name == "step-00000002"
    assert (tmp_path / "latest").read_text() == "step-00000006\n"
    save(store, 7, best=True)
    assert [path.name for path in store.complete()] == ["step-00000007", "step-00000006"]


def test_the_checkpoint_just_written_is_kept_whatever_lies_behind_it(tmp_path):
    # A run that fell back from a damaged checkpoint passes a step before it again.
    store = store_in(tmp_path, keep_last=1)
    save(store, 10)
    flip(tmp_path / "step-00000010" / "rank-00000.safetensors", 90, 3)
    save(store, 9)
    found, warnings = newest(tmp_path)
    assert found.step == 9
    assert len(warnings) == 1
    save(store, 10)
    assert newest(tmp_path) == (Checkpoint.open(tmp_path / "step-00000010"), [])
    assert names(tmp_path) == ["latest", "step-00000010"]


def test_leftovers_of_crashed_saves_are_removed(tmp_path):
    (tmp_path / ".tmp-step-00000003-abc").mkdir()
    (tmp_path / ".tmp-step-00000003-abc" / "rank-00000.safetensors").write_text("half")
    (tmp_path / ".tmp-latest-abc").write_text("step-0000")
    (tmp_path / ".trash-step-00000001-abc").mkdir()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine.txt").write_text("x")
    (tmp_path / ".tmp-link").symlink_to(tmp_path / "kept")
    (tmp_path / ".hidden").write_text("not ours")
    save(store_in(tmp_path), 5)
    assert names(tmp_path) == [".hidden", "kept", "latest", "step-00000005"]
    assert (tmp_path / "kept" / "mine.txt").exists(), "a link is removed, not what it points to"


# Ranks


def save_together(folder, world_size, step, write):
    """Saves with ranks in threads; returns each rank's outcome."""
    meeting, outcomes = Together(world_size), [None] * world_size

    def run(rank):
        store = CheckpointStore(folder, meeting.of_rank(rank), 3)
        try:
            outcomes[rank] = store.save(step, write(rank), {"rank": rank})
        except BaseException as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return outcomes


def test_ranks_write_one_checkpoint(tmp_path):
    outcomes = save_together(tmp_path, 2, 5, lambda rank: files(rank + 1, rank))
    assert outcomes == [tmp_path / "step-00000005"] * 2
    checkpoint = Checkpoint.open(outcomes[0])
    checkpoint.verify()
    assert checkpoint.state == {"rank": 0}
    assert [float(checkpoint.tensor(f"a/{rank}")[0]) for rank in range(2)] == [1.0, 2.0]
    assert len(checkpoint.files) == 4


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_one_failing_rank_fails_all_and_commits_nothing(tmp_path, failing):
    save_together(tmp_path, 3, 5, lambda rank: files(rank, rank))
    before = names(tmp_path)

    def write(rank):
        # A name in a folder that does not exist cannot be written.
        return {"no/such/folder.safetensors": {"x": torch.zeros(1)}} if rank == failing else files(rank, rank)

    outcomes = save_together(tmp_path, 3, 6, write)
    assert [type(outcome) for outcome in outcomes] == [RunFailedError] * 3
    assert all(f"step-00000006: could not be written: rank {failing}:" in str(outcome) for outcome in outcomes)
    assert names(tmp_path) == before
    assert newest(tmp_path)[0].step == 5


def test_a_commit_that_fails_on_the_first_rank_fails_all(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "write_text_durably", full)
    outcomes = save_together(tmp_path, 2, 6, lambda rank: files(rank, rank))
    assert [type(outcome) for outcome in outcomes] == [RunFailedError] * 2
    assert names(tmp_path) == []


def test_ranks_agree_on_what_to_resume_and_only_the_first_looks(tmp_path):
    two_checkpoints(tmp_path)
    meeting, found, warnings = Together(2), [None, None], []

    def run(rank):
        folder = tmp_path if rank == 0 else tmp_path / "not mounted"
        store = CheckpointStore(folder, meeting.of_rank(rank), 3)
        found[rank] = store.newest_sound(warnings.append)

    flip(tmp_path / "step-00000020" / "rank-00000.safetensors", 90, 3)
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [checkpoint.step for checkpoint in found] == [10, 10]
    assert len(warnings) == 1


def test_a_run_folder_that_is_gone_is_not_made_again(tmp_path):
    """It may be a disk that is gone, and its place one on another disk."""
    with pytest.raises(RunFailedError, match="No such file or directory"):
        save(store_in(tmp_path / "gone" / "checkpoints"), 1)
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "NFS"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_step_that_is_saved_again_is_never_gone(tmp_path, monkeypatch, exchange, after):
    """Also if it is the only checkpoint."""
    if not exchange:
        monkeypatch.setattr(durable, "_exchanged", lambda new, path: False)

    def one_checkpoint(folder):
        save(store_in(folder), 30)

    for folder in crash_points(tmp_path, Crash(), after, one_checkpoint):
        found, warnings = newest(folder)
        assert found is not None
        assert found.step == 30
        assert warnings == []
        found.verify()
        save(store_in(folder), 40)
        assert not [name for name in names(folder) if name.startswith(".")]


def test_a_pointer_that_cannot_be_written_makes_no_checkpoint_a_failed_one(tmp_path):
    store = store_in(tmp_path)
    (tmp_path / "latest").mkdir(parents=True)
    (tmp_path / "latest" / "in the way").touch()
    (tmp_path / "best").mkdir()
    store.begin(1, files(1), {}, best=True)
    saved = store.settle()
    assert saved.problem is None
    assert "latest: could not be written" in saved.warning
    (tmp_path / "best").rmdir()
    save(store, 2)
    assert store.find("best").name == "step-00000001", "the next save writes what could not be written"
