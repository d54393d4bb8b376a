"""How ranks find each other: who is missing is said by name, and on one machine nothing listens to the network."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from smoe_train.errors import LaunchError

MEET_TIMEOUT = timedelta(seconds=120)


def meet(environ: Mapping[str, str], timeout: timedelta = MEET_TIMEOUT) -> Any:
    """Returns the store of the job that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe, all ranks being there.

    Raises:
        LaunchError: A variable is no number, rank 0 does not answer, its port is taken, or ranks are missing.
    """
    rank, world_size, port = (_number(environ, name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    address = environ["MASTER_ADDR"]
    where = f"MASTER_ADDR {address}, MASTER_PORT {port}"
    hosts = rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)  # else torchrun's agent does
    try:
        store = _host(address, port, timeout) if hosts else _store(address, port, timeout)
    except (dist.DistError, OSError) as error:
        reason = str(error).partition("\n")[0]
        if hosts:
            raise LaunchError(f"rank 0 cannot listen at {where}: {reason}; choose another port") from error
        raise LaunchError(
            f"rank {rank}: nobody answered at {where} within {timeout.total_seconds():.0f} s: {reason}; "
            "is rank 0 running, and are address and port the same on all ranks?"
        ) from error
    # torchrun keeps its store when it starts workers again; what earlier ones have left there must not count.
    attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"smoe_train/{attempt}", store)  # type: ignore[attr-defined]
    _wait_for_all(store, rank, world_size, where, timeout)
    return store


def _wait_for_all(store: Any, rank: int, world_size: int, where: str, timeout: timedelta) -> None:
    keys = [f"here/{each}" for each in range(world_size)]
    try:
        store.set(keys[rank], socket.gethostname())
        store.wait(keys, timeout)
    except dist.DistError as error:
        try:
            missing = [str(each) for each, key in enumerate(keys) if not store.check([key])]
        except dist.DistError:
            raise LaunchError(f"rank {rank}: rank 0 at {where} ended before all ranks had come") from error
        raise LaunchError(
            f"rank {rank}: {world_size - len(missing)} of {world_size} ranks are there; missing: {', '.join(missing)} "
            f"after {timeout.total_seconds():.0f} s at {where}; start them with the same address, port and WORLD_SIZE"
        ) from error


def _store(address: str, port: int, timeout: timedelta, **options: Any) -> Any:
    options |= {"timeout": timeout, "wait_for_workers": False}
    return dist.TCPStore(address, port, None, **options)  # type: ignore[attr-defined]


def _host(address: str, port: int, timeout: timedelta) -> Any:
    listening = loopback_socket(address, port)
    if listening is None:
        return _store(address, port, timeout, is_master=True)
    return _store(address, port, timeout, is_master=True, master_listen_fd=listening.detach())


def loopback_socket(address: str, port: int) -> socket.socket | None:
    """Returns a socket that listens at an address of this machine alone; None if the address is another."""
    if address not in ("127.0.0.1", "localhost"):
        return None
    listening = socket.socket()
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        listening.listen(4096)
    except OSError:
        listening.close()
        raise
    return listening


def keep_torchrun_local() -> None:
    """Makes the store of ``torchrun --standalone``, which anybody could write to, listen on the loopback interface.

    The second one, which it opens for its workers, is left away: rank 0 then opens it, see `meet`.
    """
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend as backend

    original = backend.TCPStore  # type: ignore[attr-defined]

    def store(host: str, port: int, **options: Any) -> Any:
        listening = loopback_socket(host, port) if options.get("is_master") else None
        if listening is not None:
            host, port = listening.getsockname()
            options["master_listen_fd"] = listening.detach()
        return original(host, port, **options)

    backend.TCPStore = store  # type: ignore[assignment, attr-defined]


def _number(environ: Mapping[str, str], name: str) -> int:
    if not environ[name].isdecimal():
        raise LaunchError(f"{name}: {environ[name]!r} is not a number; start workers with a launcher")
    return int(environ[name])
