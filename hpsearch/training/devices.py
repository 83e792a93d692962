"""What a machine has for workers to compute with."""

import joblib
import torch


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
