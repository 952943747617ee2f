"""Device, precision and environment: the facts about the machine that a run needs and a record keeps."""

import ctypes
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from common.cores import usable_cores
from common.terminal import UserError

import numpy as np
import torch

ALL_THREADS = min(torch.get_num_threads(), usable_cores())  # torch's number follows affinity and $OMP_NUM_THREADS


def pick_device(name: str) -> torch.device:
    """The device that --device names. Raises UserError if it is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, works in available.items() if works)
    if not available[name]:
        raise UserError(f"--device {name}: is not available here; use --device cpu")
    if name == "cpu":
        keep_freed_memory()
    return torch.device(name)


def to_device(batch: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """A batch from the host on `device`. A GPU takes it from pinned memory, so that the program need not wait."""
    if torch.device(device).type == "cuda":
        return batch.pin_memory().to(device, non_blocking=True)
    return batch.to(device)


def keep_freed_memory():
    """Let glibc's malloc keep freed memory for the next step. By default it returns large blocks to the system, which
    then has to clear every page anew: up to a fifth of a training step. Other C libraries are left alone."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc; TypeError on Windows
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX: numbers of malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)


def set_threads(threads: int | str = "auto", auto_threads: int | None = None):
    """Let torch compute with this number of threads.

    threads: --threads, a number or "auto". auto_threads: what "auto" means, the script's AUTO_THREADS. None stands for
    all cores that this process may use. "auto" never exceeds those, nor $OMP_NUM_THREADS.
    """
    if threads == "auto":
        threads = ALL_THREADS if auto_threads is None else min(auto_threads, ALL_THREADS)
    torch.set_num_threads(threads)


def seed_at(seed: int, place: int) -> int:
    """A 32-bit seed that is a function of (seed, place), where place is an epoch or a step. torch's CPU generator
    ignores the higher bits of a seed."""
    return ((seed << 24) + (seed >> 8) * 2_654_435_761 + place) % 2**32


CPU_LIMITS = {  # environment variables that keep libraries from instructions of the CPU: values that allow bfloat16
    "ATEN_CPU_CAPABILITY": r"avx512.*|amx.*",
    "ONEDNN_MAX_CPU_ISA": r"avx512_core_(bf16|fp16|amx).*|avx10.*|all|default",
    "MKL_ENABLE_INSTRUCTIONS": r"avx512.*|avx10.*",
}


def cpu_limits() -> dict:
    """The environment variables of CPU_LIMITS that are set."""
    return {name: os.environ[name] for name in CPU_LIMITS if os.environ.get(name)}


def native_bf16(device: torch.device) -> bool:
    """Does the hardware multiply bfloat16 itself, and no environment variable forbid it?"""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if any(not re.fullmatch(CPU_LIMITS[name], value.lower()) for name, value in cpu_limits().items()):
        return False
    checks = (getattr(torch.cpu, f"_is_{kind}_supported", lambda: False) for kind in ("amx_tile", "avx512_bf16"))
    return device.type == "cpu" and any(check() for check in checks)


def environment(device: torch.device, script: str, argv: list[str] | None = None) -> dict:
    """The command, the code, the versions and the machine, for the record of a bench, a sweep or an analysis.

    argv: the arguments of `script`; None: from the command line.
    """
    words = sys.argv[1:] if argv is None else [str(word) for word in argv]
    path = os.path.relpath(Path(script).resolve(), Path(__file__).resolve().parent.parent)
    return {"command": [Path(path).as_posix(), *words], **facts(device, script)}


def facts(device: torch.device, script: str, git: dict | None = None) -> dict:
    """The code, the versions and the machine, for a record. git: the state when a resumed run started."""
    hardware = {"type": device.type, "name": platform.processor() or platform.machine(), "memory_gb": None}
    cpuinfo = Path("/proc/cpuinfo")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware["name"] = properties.name
    elif cpuinfo.exists():
        hardware["name"] = next(iter(re.findall(r"model name\s*: (.*)", cpuinfo.read_text())), hardware["name"])
    if memory := memory_bytes(device):
        hardware["memory_gb"] = round(memory / 2**30, 1)
    hardware |= {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "native_bf16": native_bf16(device)}
    if cpu_limits():
        hardware["limits"] = cpu_limits()
    return {
        "git": git_state(Path(script).resolve().parent, git),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": hardware,
    }


def git_state(folder: Path, began: dict | None = None, own: list[str] | None = None) -> dict | None:
    """{"commit", "dirty"}: dirty if one of the paths `own` of `folder` differs from the commit; by default the folder
    itself and common/. None outside a git repository.

    A resumed run keeps the commit at which it began. It is dirty if it was dirty then or has changed since.
    """

    def git(*words):
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    own = own or [".", os.path.relpath(Path(__file__).parent, folder)]
    try:
        commit, dirty = (began["commit"], began.get("dirty")) if began else (git("rev-parse", "HEAD"), False)
        changed = git("status", "--porcelain", "--", *own) or git("diff", "--name-only", commit, "--", *own)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "dirty": bool(dirty or changed)}


def memory_bytes(device: torch.device) -> int | None:
    """The memory of a GPU, or of the machine. None if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows
        return None


def peak_memory_mb(device):
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))
