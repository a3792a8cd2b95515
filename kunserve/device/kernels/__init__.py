"""Attention, linear and layer kernels, one file per backend."""

from __future__ import annotations

from kunserve.device.kernels.base import (
    Batch,
    KernelArgumentError,
    KernelMemoryError,
    Kernels,
    KernelsNotBuiltError,
    LayerAddresses,
    LayerShape,
    PreparedBatch,
    PreparedLayer,
    RopeTable,
    UnknownKernelsError,
    UnsupportedCpuError,
)
from kunserve.device.kernels.cpu import CpuKernels

__all__ = [
    "Batch",
    "CpuKernels",
    "KernelArgumentError",
    "KernelMemoryError",
    "Kernels",
    "KernelsNotBuiltError",
    "LayerAddresses",
    "LayerShape",
    "PreparedBatch",
    "PreparedLayer",
    "RopeTable",
    "UnknownKernelsError",
    "UnsupportedCpuError",
    "create_kernels",
]


def create_kernels(name: str, threads: int) -> Kernels:
    """Kernels of the backend `name` on `threads` threads; the only backend is "cpu".

    Raises:
        UnknownKernelsError: no backend has this name. KernelsNotBuiltError, UnsupportedCpuError,
        KernelArgumentError, KernelMemoryError: see `CpuKernels`.
    """
    if name == "cpu":
        return CpuKernels(threads)
    raise UnknownKernelsError(f"no kernels are called {name!r}; known: cpu")
