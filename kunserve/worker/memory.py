"""An instance's memory on an arena: `MemoryBook` with real addresses behind it.

    part slab   |0 1 2 ... part_pages - 1|            one range per part of the model
    layer KV    |slot 0     |slot 1     | ... |       one range per layer of the model
    identity    |0 1 2 ... num_pages - 1|             every physical page, always

Ranges exist for every part and layer of the model, held or not, so that an address never changes.
Source: paper mechanism 3, design section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kunserve.core.closing import Closing
from kunserve.core.errors import AccountingError
from kunserve.core.ids import BlockId, SlotId
from kunserve.core.layout import Part
from kunserve.core.memory import KvExtent, PageRun
from kunserve.device.arena import Arena, ArenaError, VirtualRange
from kunserve.policy.memory import MemoryBook
from kunserve.policy.pages import MemoryPlan, SlotMap


class ArenaMapper:
    """The `PageMapper` of an arena: one slab per part of the model and one range per layer.

    Every arena call takes whole runs. None waits for work in flight: who changes memory has ended
    the work on those pages.

    Raises:
        ArenaOutOfMemoryError, MappingLimitError: a range was refused (see `Arena`).
    """

    def __init__(self, plan: MemoryPlan, slots: SlotMap, arena: Arena) -> None:
        page_bytes = plan.geometry.page_bytes
        self._arena = arena
        self._slabs = {
            part: arena.reserve(pages * page_bytes) for part, pages in plan.part_pages.items()
        }
        self._kv_ranges = tuple(arena.reserve(slots.range_bytes) for _ in range(plan.num_layers))

    def slab(self, part: Part) -> VirtualRange:
        """The slab of `part`, held or not.

        Raises:
            AccountingError: the model has no such part.
        """
        slab = self._slabs.get(part)
        if slab is None:
            raise AccountingError(f"the model has no {part}")
        return slab

    def kv_range(self, layer: int) -> VirtualRange:
        """The KV range of `layer`, held or not.

        Raises:
            AccountingError: the model has no such layer.
        """
        if not 0 <= layer < len(self._kv_ranges):
            raise AccountingError(f"the model has no layer {layer}")
        return self._kv_ranges[layer]

    # -- PageMapper; each refuses with ArenaError and changes nothing then

    def map_part(self, part: Part, runs: Sequence[PageRun], slab_offset: int = 0) -> None:
        """Show physical `runs` from page `slab_offset` of the slab of `part` on."""
        self._arena.map(self.slab(part), slab_offset, runs)

    def unmap_part(self, part: Part, num_pages: int, slab_offset: int = 0) -> None:
        """Put a hole over `num_pages` of the slab of `part`."""
        self._arena.unmap(self.slab(part), slab_offset, num_pages)

    def map_kv(self, layer: int, range_page: int, runs: Sequence[PageRun]) -> None:
        """Show physical `runs` from `range_page` of `layer` on."""
        self._arena.map(self.kv_range(layer), range_page, runs)

    def unmap_kv(self, layer: int, range_page: int, count: int) -> None:
        """Put a hole over `count` range pages of `layer`."""
        self._arena.unmap(self.kv_range(layer), range_page, count)

    def move_part_to_kv(
        self, part: Part, slab_offset: int, layer: int, range_page: int, count: int
    ) -> None:
        """Show `count` pages of the slab of `part` in the KV range of `layer` instead."""
        self._arena.remap(self.slab(part), slab_offset, self.kv_range(layer), range_page, count)

    def move_kv(
        self, layer: int, range_page: int, to_layer: int, to_range_page: int, count: int
    ) -> None:
        """Show `count` range pages of `layer` in the KV range of `to_layer` instead."""
        source, target = self.kv_range(layer), self.kv_range(to_layer)
        self._arena.remap(source, range_page, target, to_range_page, count)

    def poison(self, run: PageRun) -> None:
        """Fill physical pages with NaN."""
        self._arena.poison(run)

    def mapped_part(self, part: Part) -> tuple[PageRun, ...]:
        """What the slab of `part` shows, in its order.

        Raises:
            ArenaError: there is a hole in front of a mapped page.
        """
        mapped = self._arena.mapped_runs(self.slab(part))
        if mapped and mapped[-1].stop != sum(run.count for run in mapped):
            raise ArenaError(f"there is a hole inside the slab of {part}: {mapped}")
        return tuple(PageRun(run.start, run.count) for run in mapped)

    def mapped_kv(self, layer: int) -> tuple[KvExtent, ...]:
        """What the KV range of `layer` shows, by range page."""
        mapped = self._arena.mapped_runs(self.kv_range(layer))
        return tuple(KvExtent(layer, run.offset, run.start, run.count) for run in mapped)


class InstanceMemory(MemoryBook, Closing):
    """Parts and KV of one instance on the pages of one arena, which it closes with itself.

    Args:
        plan, slots, own_slot, poison: see `MemoryBook`.
        arena: of the plan's page size and number of pages.

    Raises:
        AccountingError: plan, slots and arena do not fit each other.
        ArenaError: a range or a mapping was refused (see `Arena`). So do all methods that map or
            unmap; nothing was changed then.
    """

    def __init__(
        self,
        plan: MemoryPlan,
        slots: SlotMap,
        own_slot: SlotId,
        arena: Arena,
        *,
        poison: bool = False,
    ) -> None:
        page_bytes = plan.geometry.page_bytes
        if (arena.page_bytes, arena.num_pages) != (page_bytes, plan.num_pages):
            raise AccountingError(
                f"plan of {plan.num_pages} pages of {page_bytes} bytes, arena of "
                f"{arena.num_pages} pages of {arena.page_bytes} bytes"
            )
        self.arena = arena
        self._ranges = ArenaMapper(plan, slots, arena)
        super().__init__(plan, slots, own_slot, self._ranges, poison=poison)

    # -- addresses, fixed for the life of the instance

    def part_address(self, part: Part) -> int:
        """Address of the slab of `part`, whether it is held now or not.

        Raises:
            AccountingError: the model has no such part.
        """
        return self._ranges.slab(part).address

    def kv_base(self, layer: int) -> int:
        """Address of block 0 of slot 0 in `layer`; block b lies b * block_bytes behind it.

        Raises:
            AccountingError: the model has no such layer.
        """
        return self._ranges.kv_range(layer).address

    @property
    def identity(self) -> VirtualRange:
        """Every physical page, in order: registered once, all transfers go through it."""
        return self.arena.identity

    def identity_address(self, physical_page: int, offset_bytes: int = 0) -> int:
        """Address of byte `offset_bytes` of `physical_page`, mapped elsewhere or not.

        Raises:
            ArenaError: no such page, or the offset is not inside one.
        """
        return self.arena.page_address(physical_page, offset_bytes)

    # -- bytes, without a copy; views must not outlive what they show

    def part_view(self, part: Part) -> NDArray[np.uint8]:
        """The slab of a held part, in bytes, up to the end of its last page.

        Raises:
            AccountingError: the part is not held now.
        """
        if not self.holds(part):
            raise AccountingError(f"{part} is not held")
        slab = self._ranges.slab(part)
        return self.arena.view(slab.address, slab.nbytes)

    def block_view(self, layer: int, block: BlockId) -> NDArray[np.uint8]:
        """K and V of `block` in `layer`, in bytes: [k|v][token][kv head][head dim].

        Raises:
            AccountingError: no such layer or block, or it is not backed now.
        """
        base, offset_bytes = self.kv_base(layer), self.slots.offset_bytes(block)
        self.physical_page(layer, block // self.slots.geometry.blocks_per_page)
        return self.arena.view(base + offset_bytes, self.slots.geometry.block_bytes)

    # -- end

    def close(self) -> None:
        """Close the arena: all addresses become invalid. May be called twice."""
        self.arena.close()
