"""What a run ran on: versions, source, machine, topology and data, without a single secret."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from smoe_train.durable import write_file
from smoe_train.errors import RunFailedError

ENVIRONMENT = "environment.json"

PACKAGES = (
    "smoe_train",
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "numpy",
    "wandb",
)

# An allow-list: a variable that is not known to be harmless is not recorded.
VARIABLES = frozenset(
    {
        "CUBLAS_WORKSPACE_CONFIG",
        "CUDA_DEVICE_ORDER",
        "CUDA_LAUNCH_BLOCKING",
        "CUDA_VISIBLE_DEVICES",
        "DS_ACCELERATOR",
        "GLOO_SOCKET_IFNAME",
        "HF_DATASETS_OFFLINE",
        "HF_HOME",
        "HF_HUB_OFFLINE",
        "KMP_AFFINITY",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "MKL_NUM_THREADS",
        "NCCL_ALGO",
        "NCCL_DEBUG",
        "NCCL_IB_DISABLE",
        "NCCL_P2P_DISABLE",
        "NCCL_PROTO",
        "NCCL_SOCKET_IFNAME",
        "NO_COLOR",
        "NVIDIA_TF32_OVERRIDE",
        "OMP_NUM_THREADS",
        "PYTHONHASHSEED",
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
        "RANK",
        "SLURM_ARRAY_TASK_ID",
        "SLURM_JOB_ID",
        "SLURM_JOB_NAME",
        "SLURM_NNODES",
        "SLURM_NODELIST",
        "SLURM_NTASKS",
        "SLURM_PROCID",
        "TOKENIZERS_PARALLELISM",
        "TORCH_EXTENSIONS_DIR",
        "TRANSFORMERS_OFFLINE",
        "WANDB_BASE_URL",
        "WANDB_DIR",
        "WANDB_ENTITY",
        "WANDB_MODE",
        "WANDB_PROJECT",
        "WORLD_SIZE",
    }
)
OWN_PREFIX = "SMOE_TRAIN_"
_SECRET_NAME = re.compile("KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
_CREDENTIALS_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")

GIT_SECONDS = 10.0


def environment(
    topology: Mapping[str, Any],
    data_checksums: Mapping[str, str],
    *,
    accelerators: Sequence[str] | None = None,
    baselines: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Describes this process's surroundings.

    Args:
        topology: World size, expert-parallel size and so on.
        data_checksums: Checksum of each data file, by name.
        accelerators: Names of the devices; those of torch, if it has been imported, unless given.
        baselines: Bits per byte of ordinary compressors on the validation data, by name, e.g. ``{"gzip -9": 2.51}``.

    Returns:
        Plain JSON values.
    """
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "source": _source(Path(__file__).resolve().parents[1]),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cores_usable": _usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "accelerators": _accelerators() if accelerators is None else list(accelerators),
        "variables": _variables(os.environ),
        "topology": dict(topology),
        "data_checksums": dict(data_checksums),
        "baselines": dict(baselines or {}),
    }


def write_environment(run_folder: Path, description: Mapping[str, Any]) -> Path:
    """Writes ``environment.json`` atomically and returns its path.

    Raises:
        RunFailedError: It cannot be written.
    """
    path = run_folder / ENVIRONMENT
    try:
        write_file(path, (json.dumps(description, indent=2, sort_keys=True) + "\n").encode())
    except OSError as error:
        raise RunFailedError(
            f"{path}: cannot be written: {error.strerror}; make room or give access, then run the same command again"
        ) from error
    return path


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _source(folder: Path) -> dict[str, Any] | None:
    """Returns commit and dirty flag of the source tree; None for a package that no repository tracks."""
    if _git(folder, "ls-files", "--error-unmatch", "errors.py") is None:
        return None
    changes = _git(folder, "status", "--porcelain")
    return {"commit": _git(folder, "rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=GIT_SECONDS,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _accelerators() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [str(torch.cuda.get_device_name(index)) for index in range(torch.cuda.device_count())]


def _variables(variables: Mapping[str, str]) -> dict[str, str]:
    return {
        name: _CREDENTIALS_IN_URL.sub("", value)
        for name, value in sorted(variables.items())
        if name in VARIABLES or (name.startswith(OWN_PREFIX) and not _SECRET_NAME.search(name))
    }
