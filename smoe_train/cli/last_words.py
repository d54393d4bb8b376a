"""What workers leave for the parent when they end: launchers turn every failure into exit code 1."""

from __future__ import annotations

import contextlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

from smoe_train.errors import RunStoppedError

LOGS = "logs"  # folder of a run that holds them, and what ranks log

# What a rank says that has lost its peers: the cause is elsewhere, whoever wrote first.
_LOST_PEER = re.compile(
    r"gloo/transport|Connection (closed|reset) by peer|Broken pipe|DistNetworkError|DistBackendError|"
    r"remote process exited or there was a network error"
)


@dataclass(frozen=True)
class WorkerError:
    """Why a worker ended.

    Attributes:
        time: When, in seconds since the epoch.
        rank: Its global rank.
        exit_code: What the command line shall end with.
        message: For the user; one or more lines.
        hung: Whether it made no progress any more.
    """

    time: float
    rank: int
    exit_code: int
    message: str
    hung: bool = False

    @property
    def stopped(self) -> bool:
        """Whether the worker ended as it was asked to."""
        return self.exit_code == RunStoppedError.exit_code and not self.hung

    @property
    def lost_peer(self) -> bool:
        """Whether it ended since a peer was gone."""
        return self.exit_code == 1 and _LOST_PEER.search(self.message) is not None


def write_worker_error(logs: Path, rank: int, exit_code: int, message: str, hung: bool = False) -> None:
    """Leaves word of why a worker ends.

    Args:
        logs: The run's ``logs`` folder.
        rank: Global rank of the worker.
        exit_code: What the command line shall end with.
        message: For the user; one or more lines.
        hung: Whether the worker made no progress any more.
    """
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / f"rank-{rank}.error.json"
    record = {"rank": rank, "exit_code": exit_code, "message": message, "time": time.time(), "hung": hung}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record), encoding="utf-8")
    temporary.replace(path)


def read_worker_errors(logs: Path) -> list[WorkerError]:
    """Returns what workers have left, the cause first: the earliest, unless it only tells of a lost peer."""
    errors = []
    for path in logs.glob("rank-*.error.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            errors.append(WorkerError(**json.loads(path.read_text(encoding="utf-8"))))
    return sorted(errors, key=lambda error: (error.lost_peer, error.time, error.rank))


def clear_logs(logs: Path) -> None:
    """Creates the folder and removes what the workers of an earlier launch have left."""
    logs.mkdir(parents=True, exist_ok=True)
    for pattern in ("rank-*.error.json", "rank-*.heartbeat", "rank-*.stacks"):
        for old in logs.glob(pattern):
            old.unlink()
