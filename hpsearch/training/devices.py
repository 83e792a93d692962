"""Cores, GPUs and memory of this machine."""

import ctypes
import sys

import joblib
import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def count_cores() -> int:
    """The processor cores that this process may use, by its affinity and by its container's quota."""
    return int(joblib.cpu_count())


def list_devices() -> list[str]:
    """The GPUs of this machine, else its CPU."""
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]


def default_workers() -> int:
    """One worker per GPU, else per core."""
    devices = list_devices()
    return count_cores() if devices == ["cpu"] else len(devices)


def tune_malloc() -> None:
    """Let this process keep the memory of freed tensors for the next ones, where Linux's C library is glibc.

    By default large blocks go back to the system after each use, and each of their pages is cleared again at the next:
    on two busy cores a fifth of a CNN's step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most that older versions take
        mallopt(_M_TRIM_THRESHOLD, 2**30)
