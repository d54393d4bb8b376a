"""When freed memory is given back, and when it is kept."""

import os
import subprocess
import sys

import pytest

from smoe_train.training import heap
from smoe_train.training.heap import Heap, give_back, keep_freed_memory, resident_bytes

MIB = 2**20
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def tidied(sizes_mib, **options):
    """Returns after which of these readings a heap gave memory back."""
    trims, now = [], iter(sizes_mib)
    kept = Heap(resident=lambda: next(now) * MIB, trim=lambda: trims.append(True), **options)
    done = [kept.tidy() for _ in sizes_mib]
    assert len(trims) == sum(done)
    return [index for index, one in enumerate(done) if one]


def test_growth_by_a_quarter_is_given_back_and_what_is_left_counts_from_then_on():
    # 1000 is settled; 1251 is more than a quarter above; the next reading settles anew.
    assert tidied([1000, 1100, 1250, 1251, 1200, 1500, 1501]) == [3, 6]


def test_a_small_process_may_grow_by_a_fixed_amount():
    assert tidied([100, 228, 229]) == [2]


def test_memory_that_falls_is_the_new_measure():
    assert tidied([2000, 1000, 1200, 1260]) == [3]


def test_a_process_that_does_not_grow_or_cannot_be_measured_is_left_alone():
    assert tidied([500] * 9) == []
    assert tidied([0] * 9) == []


def test_freed_memory_is_kept_from_the_first_step_on_and_once(monkeypatch):
    calls = []
    monkeypatch.setattr(heap, "keep_freed_memory", lambda: calls.append("keep"))
    for reuses in (True, False):
        kept = Heap(reuses=reuses, trim=lambda: calls.append("trim"))
        kept.reuse_from_now()
        kept.reuse_from_now()
    assert calls == ["trim", "keep"]


@pytest.mark.parametrize("name", heap.USERS_SETTINGS)
def test_settings_of_the_user_are_left_alone(monkeypatch, name):
    monkeypatch.setenv(name, "")
    assert keep_freed_memory() is False


@needs_linux
def test_resident_memory_is_that_of_this_process():
    psutil = pytest.importorskip("psutil")
    assert resident_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)
    give_back()  # whatever the C library is


GAPS = """
import sys
from smoe_train.training.heap import give_back, resident_bytes
blocks = [bytearray(64 * 1024) for _ in range(4000)]   # 250 MiB, below the size that is mapped one by one
blocks = blocks[::100]                                 # what stays lies between gaps
before = resident_bytes()
give_back()
print(before - resident_bytes())
"""


@needs_linux
@pytest.mark.skipif(not hasattr(os, "confstr") or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="of glibc")
def test_gaps_are_given_back():
    ran = subprocess.run([sys.executable, "-c", GAPS], capture_output=True, text=True, check=True)
    assert int(ran.stdout) > 200 * MIB
