"""Host memory of an instance for KV of preempted requests (`--policy swap`).

    layer KV      kv_base(0)  | b0 | b1 | b2 | ...          kv_base(1)  | b0 | b1 | ...
                                 ^ one block of one layer: block_bytes
    host memory   layer 0     | h0 | h1 | ... | h(n-1) |    layer 1     | h0 | h1 | ...

Neighbours on both sides go in one copy.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

from kunserve.core.actions import CopyKv
from kunserve.core.closing import Closing
from kunserve.core.errors import ConfigError
from kunserve.worker.blocks import BlockRun

_MAP_NORESERVE = 0x4000  # Linux on x86 and Arm; Python's mmap module lacks it before 3.13
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE


class HostKv(Closing):
    """A private anonymous range: its addresses are reserved at once, its memory is taken when a
    block is first written. What was taken stays until the end.

    Args:
        num_blocks: each for all layers.
        block_bytes: of one layer.
        kv_bases: address of block 0 of each layer.

    Raises:
        ConfigError: the system refuses so large a range.
    """

    def __init__(self, num_blocks: int, block_bytes: int, kv_bases: Sequence[int]) -> None:
        self._block_bytes = block_bytes
        self._kv_bases = tuple(kv_bases)
        layer_bytes = num_blocks * block_bytes
        nbytes = layer_bytes * len(self._kv_bases)
        try:
            self._range = mmap.mmap(-1, nbytes, flags=_FLAGS)
        except OSError as error:
            raise ConfigError(
                f"host memory of {nbytes} bytes was refused ({error}); lower --swap-space"
            ) from error
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._range))
        self._host_bases = tuple(first + n * layer_bytes for n in range(len(self._kv_bases)))

    def copy(self, order: CopyKv) -> int:
        """Make a copy; returns its bytes. All blocks must be mapped: addresses cannot be checked.
        The GIL is not held while bytes are copied."""
        copied_bytes = 0
        runs = runs_of_copy(order.blocks, order.host_blocks)
        for kv_base, host_base in zip(self._kv_bases, self._host_bases, strict=True):
            for run in runs:
                kv = kv_base + run.source * self._block_bytes
                host = host_base + run.target * self._block_bytes
                nbytes = run.count * self._block_bytes
                ctypes.memmove(*((host, kv) if order.to_host else (kv, host)), nbytes)
                copied_bytes += nbytes
        return copied_bytes

    def close(self) -> None:
        """Give the memory back. May be called twice."""
        self._range.close()


def runs_of_copy(sources: Sequence[int], targets: Sequence[int]) -> tuple[BlockRun, ...]:
    """The fewest copies of neighbours: source i goes to target i, and the two never overlap."""
    runs: list[BlockRun] = []
    for source, target in zip(sources, targets, strict=True):
        last = runs[-1] if runs else None
        if last and (source, target) == (last.source + last.count, last.target + last.count):
            runs[-1] = BlockRun(last.source, last.target, last.count + 1)
        else:
            runs.append(BlockRun(source, target, 1))
    return tuple(runs)
