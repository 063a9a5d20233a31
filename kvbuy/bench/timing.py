"""Stopwatches: wall time, medians with their range, and the peak of memory. Knows nothing of what is measured."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


class Stopwatch:
    """Times by name, of work that a device does too."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: dict[str, list[float]] = {}

    def lap(self, name: str, work: Callable[[], object]) -> None:
        """Do work, and note how long it took."""
        self.note(name, seconds(work, self.device))

    def note(self, name: str, taken: float) -> None:
        """Note a time taken elsewhere."""
        self.times.setdefault(name, []).append(taken)

    def medians(self) -> dict[str, float]:
        """The median of each name's times."""
        return {name: statistics.median(taken) for name, taken in self.times.items()}

    def spread(self) -> dict[str, tuple[float, float]]:
        """The lowest and the highest of each name's times."""
        return {name: (min(taken), max(taken)) for name, taken in self.times.items()}


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long work takes, until the device has done it too."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def median_seconds(work: Callable[[], object], device: torch.device, *, repeats: int) -> float:
    """The median of some repeats, after one that does not count."""
    work()
    return statistics.median(seconds(work, device) for _ in range(repeats))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def reset_peak(device: torch.device) -> None:
    """Let the peak of memory start from what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (PROCESS / "clear_refs").exists():
        (PROCESS / "clear_refs").write_text("5")  # Linux: the high-water mark of resident memory


def read_peak(device: torch.device) -> int | None:
    """The most memory in use since `reset_peak`, in bytes: the device's on CUDA, else the process's on Linux."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not (PROCESS / "clear_refs").exists():
        return None
    lines = (PROCESS / "status").read_text().splitlines()
    marks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return marks[0] if marks else None
