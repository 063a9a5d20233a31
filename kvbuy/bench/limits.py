"""What this machine could do at best: copy memory, read a file, copy to the device, multiply matrices."""

from pathlib import Path

import torch
from torch.nn.functional import linear

from kvbuy.bench.files import read_into
from kvbuy.bench.timing import median_seconds
from kvbuy.figures import Limits, Row

COPIED = 256 * 2**20  # bytes
SIDES = {"cuda": (4096, 8192)}  # of the square matrices, of which the best counts; else:
SMALL_SIDES = (512, 1024, 2048)
REPEATS = 5


def measure_limits(path: Path, *, device: torch.device, dtype: torch.dtype, row: Row) -> Limits:
    """Measure them, reading the artifact at `path`; `row` says how fast it was loaded."""
    size = path.stat().st_size
    buffer = memoryview(bytearray(size))
    read = size / 1e9 / median_seconds(lambda: read_into(path, buffer), device, repeats=REPEATS)
    across = copy_gbps(device) if device.type == "cuda" else None
    return Limits(
        memcpy_gbps=copy_gbps(torch.device("cpu")),
        read_gbps=read,
        host_to_device_gbps=across,
        matmul_tflops=_matmul_flops(device, dtype) / 1e12,
        load_gbps=row.kv_bytes / row.load_seconds / 1e9,
        load_share=row.file_bytes / row.load_seconds / 1e9 / min(read, across or read),
    )


def copy_gbps(device: torch.device) -> float:
    """Gigabytes a second from this machine's memory to a device's, pinned where that is another one."""
    source = torch.zeros(COPIED, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    work = median_seconds(lambda: target.copy_(source, non_blocking=True), device, repeats=REPEATS)
    return COPIED / 1e9 / work


def _matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate: a CPU without bfloat16 instructions is faster in float32, which its attention kernels use."""
    dtypes = {dtype, torch.float32} if device.type == "cpu" else {dtype}
    sides = SIDES.get(device.type, SMALL_SIDES)
    return max(_square_flops(side, device, kind) for side in sides for kind in dtypes)


def _square_flops(side: int, device: torch.device, dtype: torch.dtype) -> float:
    rows, weights = torch.randn(2, side, side, device=device).to(dtype)
    return 2 * side**3 / median_seconds(lambda: linear(rows, weights), device, repeats=REPEATS)
