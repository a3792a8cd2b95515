"""What this machine can do at most: the limits that kernel figures are quoted against."""

from __future__ import annotations

from dataclasses import dataclass

from kunserve.device.kernels import CpuKernels

READ_BYTES = 384 << 20  # far more than a cache holds on most machines
READ_PASSES = 4
FMA_PASSES = 5


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """Limits of a number of threads together, best of several passes."""

    read_gb_per_s: float  # reads of main memory in the fastest known way, 10^9 bytes a second
    fma_gflop_per_s: float  # float32 multiply-adds in registers, two operations each


def measure_limits(threads: int) -> MachineLimits:
    """Measures read bandwidth and multiply-add rate of `threads` threads, with the pool and the
    instruction set that the kernels use.

    Takes about a second and 384 MiB.

    Raises:
        KernelsNotBuiltError, UnsupportedCpuError, KernelArgumentError, KernelMemoryError: see
        `CpuKernels`.
    """
    kernels = CpuKernels(threads)
    try:
        fma = kernels.measure_fma_gflop_per_s(FMA_PASSES)
        return MachineLimits(kernels.measure_read_gb_per_s(READ_BYTES, READ_PASSES), fma)
    finally:
        kernels.close()
