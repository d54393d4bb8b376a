"""Building the operators: once for each source, torch and kind of CPU, however many processes ask at the same time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from smoe_train.errors import LaunchError
from smoe_train.kernels import attention, self_check

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "attention.cpp", FOLDER / "experts.cpp")
HEADERS = (FOLDER / "products.h", FOLDER / "vectors_and_tasks.h")
LIBRARY = "smoe_train_kernels"
COMPLETE = "complete"  # the file that says that a build was not broken off

# What torch's vector classes ask for; without them they are plain loops. The plain name of the CPU's kind stays out:
# a cluster's file system may be shared by machines of different kinds.
VECTOR_FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}

_loaded: list[Path] = []


def load_kernels() -> Path:
    """Makes the operators of ``torch.ops.smoe_train`` available; returns their library.

    The first call on a machine compiles for about half a minute; later ones, and those of other processes, which wait
    meanwhile, load what it made. Every call of a new process compares the operators with PyTorch.

    Raises:
        LaunchError: There is no compiler, or it fails, or the operators are wrong on this CPU.
    """
    if _loaded:
        return _loaded[0]
    flags = _flags()
    folder = _cache() / f"{LIBRARY}_{_fingerprint(flags)}"
    library = folder / f"{LIBRARY}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder.with_suffix(".lock")):
            if not (folder / COMPLETE).exists():
                _build(folder, flags)
    except OSError as error:
        raise LaunchError(
            f"{folder}: cannot keep the compiled operators there: {error.strerror}; set TORCH_EXTENSIONS_DIR to a "
            "folder that can be written, or use performance.experts=torch and performance.attention=sdpa"
        ) from error
    torch.ops.load_library(str(library))
    attention.register()
    try:
        wrong = self_check.disagreement()
    except RuntimeError as error:  # oneDNN may be held to fewer instructions than torch (ONEDNN_MAX_CPU_ISA)
        wrong = str(error).splitlines()[0]
    if wrong is not None:
        raise LaunchError(
            f"the compiled operators compute something else than PyTorch on this CPU: {wrong}; "
            "use performance.experts=torch and performance.attention=sdpa, and please report it"
        )
    _loaded.append(library)
    return library


def why_not() -> str | None:
    """Returns what is missing to build the operators, or None."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler}); install g++, or set CXX"
    if shutil.which("ninja") is None and not _ninja_of_package():
        return "there is no ninja; pip install ninja"
    return None


def _build(folder: Path, flags: list[str]) -> None:
    missing = why_not()
    if missing is not None:
        raise LaunchError(
            f"performance: cpp needs to be compiled, and {missing}; or use experts=torch and attention=sdpa"
        )
    from torch.utils import cpp_extension

    for leftover in folder.iterdir():  # of a build that was broken off
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    said = io.StringIO()
    try:
        # The library registers its operators when it is loaded, which this does too.
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            cpp_extension.load(
                LIBRARY,
                [str(source) for source in SOURCES],
                extra_cflags=flags,
                build_directory=str(folder),
                is_python_module=False,
            )
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        lines = [line for line in str(error).splitlines() if "error" in line][:3]
        raise LaunchError(
            f"performance: cpp: the compiler failed in {folder}: {'; '.join(lines) or error}; "
            "use experts=torch and attention=sdpa, or give another compiler with CXX"
        ) from error
    (folder / COMPLETE).touch()


def _flags() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    vector = list(VECTOR_FLAGS.get(capability, []))
    if capability == "AVX512" and torch.cpu._is_avx512_bf16_supported():
        vector.append("-mavx512bf16")
    defined = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"] if vector else []
    return ["-O3", "-std=c++20", "-fopenmp", *vector, *(defined or ["-DCPU_CAPABILITY=DEFAULT"])]


def _fingerprint(flags: list[str]) -> str:
    texts = [source.read_text(encoding="utf-8") for source in (*SOURCES, *HEADERS)]
    key = [*texts, torch.__version__, platform.machine(), os.environ.get("CXX", ""), *flags]
    return hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]


def _cache() -> Path:
    from torch.utils import cpp_extension

    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(own) if own else Path(cpp_extension.get_default_build_root())


def _ninja_of_package() -> bool:
    from torch.utils import cpp_extension

    return bool(cpp_extension.is_ninja_available())


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Waits until no other process builds. The system lets go of the lock of a process that dies; torch's own stays."""
    with open(lock, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
