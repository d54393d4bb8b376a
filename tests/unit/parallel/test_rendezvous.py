"""Ranks that find each other, and what is said of those that do not: real stores, ports and processes."""

import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import psutil
import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousParameters, c10d_rendezvous_backend

from smoe_train.errors import LaunchError
from smoe_train.parallel.rendezvous import keep_torchrun_local, meet

SHORT = timedelta(seconds=1.5)


def environ(rank: int | str, world_size: int, port: int, address: str = "127.0.0.1") -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": address, "MASTER_PORT": str(port)}


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listening() -> set[str]:
    """Returns the addresses at which this process listens."""
    return {one.laddr.ip for one in psutil.Process().net_connections("tcp") if one.status == psutil.CONN_LISTEN}


def test_ranks_that_meet_share_a_store_on_the_loopback_interface(port):
    before = listening()
    with ThreadPoolExecutor(2) as threads:
        stores = list(threads.map(lambda rank: meet(environ(rank, 2, port), timedelta(seconds=20)), range(2)))
    assert listening() - before <= {"127.0.0.1"}
    stores[0].set("key", "value")
    assert stores[1].get("key") == b"value"


def test_missing_ranks_are_named(port):
    started = time.monotonic()
    with ThreadPoolExecutor(2) as threads:
        met = [threads.submit(meet, environ(rank, 4, port), SHORT) for rank in (0, 2)]
    assert time.monotonic() - started < 10
    for one, rank in zip(met, (0, 2), strict=True):
        with pytest.raises(LaunchError, match=rf"rank {rank}: 2 of 4 ranks are there; missing: 1, 3 after 2 s at "):
            one.result()


def test_nobody_at_the_address(port):
    with pytest.raises(LaunchError, match=rf"rank 1: nobody answered at MASTER_ADDR 127.0.0.1, MASTER_PORT {port}"):
        meet(environ(1, 2, port), SHORT)


def test_an_address_that_does_not_exist(port):
    with pytest.raises(LaunchError, match=r"rank 1: nobody answered at MASTER_ADDR nowhere\.invalid"):
        meet(environ(1, 2, port, "nowhere.invalid"), SHORT)


def test_a_port_that_is_taken(port):
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(LaunchError, match=re.escape(f"MASTER_PORT {port}: ") + ".*choose another port"):
            meet(environ(0, 2, port), SHORT)


def test_what_is_no_number():
    with pytest.raises(LaunchError, match="RANK: 'first' is not a number"):
        meet(environ("first", 2, 1), SHORT)


def test_torchruns_store_stays_on_this_machine(monkeypatch):
    """Guards the private name that is replaced: a torch that calls it otherwise fails here."""
    monkeypatch.setattr(c10d_rendezvous_backend, "TCPStore", dist.TCPStore)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0")
    keep_torchrun_local()
    parameters = RendezvousParameters("c10d", "localhost:0", "id", 1, 1, local_addr="127.0.0.1")
    before = listening()
    store = c10d_rendezvous_backend._create_tcp_store(parameters)
    store.set("key", "value")
    assert store.get("key") == b"value"
    assert listening() - before <= {"127.0.0.1"}


def test_the_store_would_be_open_otherwise():
    """The control: without the socket of ours, the same store listens to the network."""
    program = (
        "import psutil, torch.distributed as d\n"
        "store = d.TCPStore('localhost', 0, is_master=True, wait_for_workers=False)\n"
        "print(*[c.laddr.ip for c in psutil.Process().net_connections('tcp') if c.status == 'LISTEN'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() != ["127.0.0.1"]
