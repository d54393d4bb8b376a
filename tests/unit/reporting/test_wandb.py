import json
import os
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from smoe_train.reporting import METRICS, read_records
from smoe_train.reporting.sinks.wandb import ID_FILE, has_credentials, reachable

pytest.importorskip("wandb")

RUN = """
import json, logging, sys, time
from pathlib import Path
from smoe_train.reporting import Journal, ReportingConfig, WandbConfig, journal as journal_module

logging.basicConfig(level=logging.WARNING)
folder, mode, resume, wait = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), sys.argv[4] == "wait"
if wait:
    journal_module.CLOSE_SECONDS = 20.0  # a busy machine is no broken tracker
before = time.monotonic()
config = ReportingConfig(wandb=WandbConfig(mode=mode))
journal = Journal(folder, config, total_steps=9, run_name="r", recipe={"seed": 1}, resume_from_step=resume)
for step in range((resume or 0) + 1, 10):
    journal.metrics([{"step": step, "split": "train", "loss": 0.125 * step}])
added = time.monotonic() - before
deadline = time.monotonic() + 60
while wait and time.monotonic() < deadline and journal._sinks[-1]._waiting:
    time.sleep(0.05)
if wait:
    time.sleep(0.5)
before = time.monotonic()
journal.close()
print(json.dumps({"added": added + time.monotonic() - before, "closed_at": time.time()}))
"""


def run(folder, mode, *, resume=None, wait=True, **environment):
    folder.mkdir(exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "NETRC"))}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder), mode, json.dumps(resume), "wait" if wait else "close"],
        env={**clean, "NETRC": str(folder / "no-netrc"), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    result = json.loads(done.stdout)
    result["exit_seconds"] = time.time() - result["closed_at"]
    result["warnings"] = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert [record["step"] for record in read_records(folder / METRICS)] == list(range(1, 10))
    return result


def online(url):
    return {"WANDB_BASE_URL": url, "WANDB_API_KEY": "canary" + "0" * 34}


def test_an_unreachable_server_makes_the_run_offline_and_costs_no_time(tmp_path):
    folder = tmp_path / "run"
    first = run(folder, "online", **online("http://127.0.0.1:9"))
    assert first["exit_seconds"] < 2.0
    assert len(first["warnings"]) == 1
    assert "does not answer" in first["warnings"][0]
    identifier = (folder / ID_FILE).read_text().strip()

    resumed = run(folder, "auto", resume=4)  # has no key: offline is what was asked for, no warning
    assert resumed["warnings"] == []
    logs = list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(logs) == 2
    assert {log.name for log in logs} == {f"run-{identifier}.wandb"}
    assert all(b"train/loss" in log.read_bytes() for log in logs)


def test_a_server_that_never_answers_holds_up_neither_the_run_nor_its_end(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        result = run(tmp_path / "run", "online", wait=False, **online(url))
    assert result["added"] < 2.0
    assert result["exit_seconds"] < 2.0
    assert len(result["warnings"]) == 1


def settings(**values):
    return SimpleNamespace(**{"api_key": None, "identity_token_file": None, "base_url": "https://w.test", **values})


def test_credentials_are_found_without_asking(tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_credentials(settings())
    assert has_credentials(settings(api_key="k"))
    (tmp_path / "netrc").write_text("machine w.test login user password secret\n")
    assert has_credentials(settings())
    assert not has_credentials(settings(base_url="https://elsewhere.test"))


def test_any_answer_counts_as_reachable():
    def answer(server):
        connection, _ = server.accept()
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=(server,), daemon=True)
        thread.start()
        assert reachable(f"http://127.0.0.1:{server.getsockname()[1]}", 5.0)
        thread.join(5.0)
        assert not reachable(f"http://127.0.0.1:{server.getsockname()[1]}", 0.1)  # accepts, says nothing
    assert not reachable("http://127.0.0.1:9", 1.0)
    assert not reachable("file:///etc/passwd", 1.0)
