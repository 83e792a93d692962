"""CPU cores, GPUs and memory of this machine."""

import ctypes
import sys
from pathlib import Path

import joblib

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def count_cores() -> int:
    """Return the number of CPU cores that the CPU affinity and the container quota allow this process to use."""
    return int(joblib.cpu_count())


def share_cores(n_workers: int) -> int:
    """Return the threads of each of `n_workers` workers that share the cores of this machine."""
    return max(1, count_cores() // n_workers)


def list_devices() -> list[str]:
    """Return the GPUs of this machine, or its CPU if there is none."""
    import torch  # takes seconds

    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]


def default_workers() -> int:
    """Return the default number of workers: one per GPU, or one per core without a GPU."""
    devices = list_devices() if may_have_gpu() else ["cpu"]
    return count_cores() if devices == ["cpu"] else len(devices)


def may_have_gpu() -> bool:
    """Return whether there may be a GPU that torch can use; unlike torch, this takes no seconds to import."""
    try:
        return bool(ctypes.CDLL("libcuda.so.1"))
    except OSError:
        return any(Path(device).exists() for device in ("/dev/kfd", "/dev/dxg"))  # of AMD, and of both under WSL


def tune_malloc() -> None:
    """Let this process reuse the memory of freed tensors (Linux with glibc only).

    By default, glibc returns large blocks to the system after each use, and the kernel clears their pages at the next.
    On two busy cores this takes a fifth of a CNN's training step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, 2**25)  # the maximum of older versions
        mallopt(_M_TRIM_THRESHOLD, 2**30)
