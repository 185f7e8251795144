"""Measure how many operations per second a matrix product makes on this machine."""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch

SIZES = {"cpu": (2048, 1536, 1536), "cuda": (8192, 8192, 8192)}
REPEATS, BATCHES = 20, 7


def rate(dtype: torch.dtype, device: str) -> float:
    """Return the best of several medians: what other processes took away is left out."""
    rows, inner, columns = SIZES[device]
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(inner, columns, device=device).to(dtype)
    best = min(statistics.median(timed(a, b) for _ in range(REPEATS)) for _ in range(BATCHES))
    return 2 * rows * inner * columns / best


def timed(a: torch.Tensor, b: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.mm(a, b)
    if a.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    dtype, device, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    name = torch.cuda.get_device_name() if device == "cuda" else None
    print(json.dumps({"operations_per_second": rate(getattr(torch, dtype), device), "gpu": name}))


if __name__ == "__main__":
    main()
