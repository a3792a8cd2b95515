"""Host memory of a simulated instance: KV that is really copied, one transfer after another.

What a copy reads must stand still as long as it lasts, and nobody may have a use for what it
writes: a target is poison until the end.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from random import Random
from typing import TypeAlias

from kunserve.core.actions import CopyKv
from kunserve.core.errors import AccountingError
from kunserve.core.ids import HostBlock
from kunserve.sim.memory import POISON, TableMapper
from kunserve.sim.timeline import SpanNs, Timeline

_Cells: TypeAlias = "array[int]"


class SimHostKv:
    """The host blocks of one instance process.

    Args:
        span: how long the copy of one block lasts, in all layers.
    """

    def __init__(
        self, mapper: TableMapper, num_layers: int, timeline: Timeline, rng: Random, span: SpanNs
    ) -> None:
        self._mapper = mapper
        self._num_layers = num_layers
        self._timeline = timeline
        self._rng = rng
        self._span = span
        self._host: dict[HostBlock, list[_Cells]] = {}
        self._sources: dict[int, list[list[_Cells]]] = {}
        self._busy_until_ns = 0

    def begin(self, order: CopyKv, at_end: Callable[[], None]) -> None:
        """Take an order; `at_end` runs when its time is over, and calls `end`."""
        self._sources[order.transfer] = self._read(order)
        if not order.to_host:
            poison = array("q", [POISON]) * self._mapper.pages.block_size
            for block in order.blocks:
                for layer in range(self._num_layers):
                    self._mapper.write_block(layer, block, poison)
        begin_ns = max(self._busy_until_ns, self._timeline.now_ns)
        self._busy_until_ns = begin_ns + self._span.draw(self._rng) * len(order.blocks)
        self._timeline.at(self._busy_until_ns, at_end)

    def end(self, order: CopyKv) -> None:
        """Write what was read.

        Raises:
            AccountingError: it has changed meanwhile.
        """
        contents = self._sources.pop(order.transfer)
        if self._read(order) != contents:
            raise AccountingError(f"somebody has written what copy {order.transfer} reads")
        for block, host_block, layers in zip(
            order.blocks, order.host_blocks, contents, strict=True
        ):
            if order.to_host:
                self._host[host_block] = layers
                continue
            for layer, cells in enumerate(layers):
                self._mapper.write_block(layer, block, cells)

    def _read(self, order: CopyKv) -> list[list[_Cells]]:
        if not order.to_host:
            return [self._host[host_block] for host_block in order.host_blocks]
        return [
            [self._mapper.read_block(layer, block) for layer in range(self._num_layers)]
            for block in order.blocks
        ]
