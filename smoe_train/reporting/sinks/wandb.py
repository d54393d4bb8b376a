"""Weights & Biases, used so that its absence costs a run nothing.

Which server state leads where: https://docs.wandb.ai/ref/python/init and github.com/wandb/wandb/issues/9865 (an offline
start right after a failed online one times out, which is why the server is asked first and torn down after a failure).
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import netrc
import os
import secrets
import ssl
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from smoe_train.durable import write_file
from smoe_train.reporting.config import WandbConfig
from smoe_train.reporting.records import Record, scalars_by_step

logger = logging.getLogger(__name__)

ID_FILE = "wandb_run_id"
INIT_SECONDS = 20.0
FILE_SECONDS = 0.7


class WandbSink:
    """Logs scalars to one W&B run that a resumed run continues.

    Args:
        run_folder: Holds the run's id in ``wandb_run_id`` and, unless `WANDB_DIR` says otherwise, W&B's files.
        config: Project, entity and mode.
        run_name: Display name.
        recipe: The resolved recipe, shown as the run's config.
        resumed: Whether to continue the run whose id is in the folder.
    """

    name = "wandb"

    def __init__(
        self, run_folder: Path, config: WandbConfig, *, run_name: str, recipe: Mapping[str, Any], resumed: bool
    ) -> None:
        self._folder = run_folder
        self._config = config
        self._run_name = run_name
        self._recipe = dict(recipe)
        self._resumed = resumed
        self._run: Any = None
        self._server: str | None = None

    def open(self) -> None:
        """Starts or continues the run; offline, with a warning, where online is wanted and does not work."""
        import wandb

        settings = _set_up(wandb)
        mode = self._mode(settings)
        if mode != "online":
            self._run = self._init(wandb, mode)
            return
        server = str(settings.base_url)
        problem = self._start_online(wandb, server, has_credentials(settings))
        if problem is not None:
            self._run = self._init(wandb, "offline")
            logger.warning(
                "wandb: %s %s. The run is recorded offline; upload it later with: wandb sync %s",
                server,
                problem,
                Path(self._run.dir).parent,
            )

    def metrics(self, records: Sequence[Record]) -> None:
        """Logs one row a step; ``step`` is a metric, because W&B's own counter cannot go back on resume."""
        for step, values in scalars_by_step(records).items():
            self._run.log({"step": step, **values})

    def routing(self, records: Sequence[Record]) -> None:
        """Logs the numbers per layer; the expert loads, which are lists, stay in ``routing.jsonl``."""
        self.metrics(records)

    def note(self, text: str) -> None:
        """Ignores notes: they are for the console."""

    def close(self) -> None:
        """Finishes the run, waiting for uploads as long as the configuration allows."""
        if self._run is not None:
            import wandb

            self._run.finish()
            wandb.teardown()  # only the end of wandb-core means that its file is complete

    def patience_seconds(self) -> float:
        """Returns the configured wait if the run is online and the server answers now, a little for a file, else 0."""
        if self._server is None:
            return FILE_SECONDS if self._run is not None else 0.0
        return self._config.finish_seconds if reachable(self._server, 0.5) else 0.0

    def abandon(self) -> None:
        """Ends wandb-core, for which W&B's exit hook would otherwise wait; what it wrote can still be synchronised."""
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if child.name().startswith("wandb-core"):
                    child.kill()
        # In a thread, because a start that hangs may hold W&B's lock. It takes the exit hook away.
        teardown = threading.Thread(target=_teardown, daemon=True)
        teardown.start()
        teardown.join(0.2)

    def _mode(self, settings: Any) -> str:
        if self._config.mode != "auto":
            return self._config.mode
        if os.environ.get("WANDB_MODE"):
            return os.environ["WANDB_MODE"]
        return "online" if has_credentials(settings) else "offline"

    def _start_online(self, wandb: Any, server: str, credentials: bool) -> str | None:
        if not credentials:  # asked first: wandb would prompt for a key and wait
            return "has no API key configured here; `wandb login` stores one"
        if not reachable(server, 3.0):
            return "does not answer"
        try:
            self._run = self._init(wandb, "online")
        except Exception as error:
            self.abandon()
            _set_up(wandb)
            return f"did not accept the run ({next(iter(str(error).splitlines()), type(error).__name__)})"
        self._server = server
        logger.info("wandb: %s", self._run.url)
        return None

    def _init(self, wandb: Any, mode: str) -> Any:
        run = wandb.init(
            project=self._config.project or os.environ.get("WANDB_PROJECT") or "smoe_train",
            entity=self._config.entity,
            id=self._run_id(),
            name=self._run_name,
            resume="allow",
            mode=mode,
            dir=os.environ.get("WANDB_DIR") or str(self._folder),
            config=self._recipe,
            settings=wandb.Settings(
                init_timeout=INIT_SECONDS,
                login_timeout=1.0,
                finish_timeout=self._config.finish_seconds,
                console="off",
                silent=True,
                disable_git=True,
                save_code=False,
            ),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def _run_id(self) -> str:
        path = self._folder / ID_FILE
        if self._resumed and path.exists():
            return path.read_text().strip()
        identifier = secrets.token_hex(4)
        write_file(path, f"{identifier}\n".encode())
        self._resumed = True  # a second attempt, offline, is the same run
        return identifier


def _set_up(wandb: Any) -> Any:
    # W&B's own telemetry asks a silent server and holds up the exit by 10 to 30 seconds. It starts for a set-up that is
    # online, or on an error; the switch for the second is not documented and may go away without harm.
    with contextlib.suppress(ImportError, AttributeError):
        importlib.import_module("wandb.analytics.opentelemetry.opentelemetry_proxy").disable()
    return wandb.setup(wandb.Settings(silent=True, mode="offline")).settings


def _teardown() -> None:
    wandb = sys.modules.get("wandb")
    with contextlib.suppress(Exception):  # the connection is dead, as intended
        if wandb is not None:
            wandb.teardown()


def has_credentials(settings: Any) -> bool:
    """Returns whether W&B would find a key without asking: in its settings, the environment or netrc."""
    if settings.api_key or settings.identity_token_file:
        return True
    hosts = {urllib.parse.urlsplit(str(settings.base_url)).netloc, "api.wandb.ai"}  # W&B accepts its old host too
    paths = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for path in paths:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if hosts & netrc.netrc(str(Path(path).expanduser())).hosts.keys():
                return True
    return False


def reachable(url: str, timeout_seconds: float) -> bool:
    """Returns whether a server answers at all, through the proxy if one is configured."""
    if not url.startswith(("http://", "https://")):
        return False
    try:
        urllib.request.urlopen(url, timeout=timeout_seconds).close()  # noqa: S310 - the scheme is checked above
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        # wandb has its own certificate settings: leave the verdict to it.
        return isinstance(error.reason, ssl.SSLError)
    except (OSError, ValueError):
        return False
    return True
