"""An instance's memory: the ledger (who owns a page) and the arena (where it is mapped) in one.

    part slab   |0 1 2 ... part_pages - 1|            one range per part of the model
    layer KV    |slot 0     |slot 1     | ... |       one range per layer of the model
                 [0..n) mapped, then a hole

Ranges exist for every part and layer of the model, held or not, so that an address never changes.
Each method moves pages in the ledger and in the arena together: when one refuses, the other is as
it was. Source: paper mechanism 3, design section 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from kunserve.core.errors import AccountingError
from kunserve.core.ids import SlotId
from kunserve.core.layout import Part, PartKind
from kunserve.device.arena import (
    Arena,
    ArenaError,
    CompletionToken,
    MappedRun,
    VirtualRange,
    merge_runs,
)
from kunserve.policy.pages import (
    FREE,
    KvPages,
    MemoryPlan,
    Owner,
    PageLedger,
    PageRun,
    PartPages,
    SlotMap,
)


class InstanceMemory:
    """Parts and KV of one instance on the pages of one arena, which it closes with itself.

    After construction every held part has its slab (contents undefined: the loader fills it), and
    the own slot has `plan.kv_pages_per_layer` pages in each held layer.

    Args:
        plan: the split of memory; `arena` has its page size and number of pages.
        slots: names of blocks, the same on every member of the partner domain.
        own_slot: this instance's permanent slot.
        poison: fill pages with NaN whenever they change owner, so that stale bytes show.

    Raises:
        AccountingError: plan, slots and arena do not fit each other.
        ArenaError: a range or a mapping was refused (see `Arena`).
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
        _check_fit(plan, slots, own_slot, arena)
        self.plan = plan
        self.slots = slots
        self.own_slot = own_slot
        self.arena = arena
        self.ledger = PageLedger(plan.num_pages)
        self._poison = poison
        page_bytes = plan.geometry.page_bytes
        self._slabs = {
            part: arena.reserve(pages * page_bytes) for part, pages in plan.part_pages.items()
        }
        self._kv = tuple(arena.reserve(slots.range_bytes) for _ in range(plan.num_layers))
        for part in plan.held:
            self.hold_part(part)
        # A slot holds all that can ever be usable: pages beyond it would be wasted and stay free.
        kv_pages = min(plan.kv_pages_per_layer, slots.slot_pages)
        for layer in plan.held_layers:
            self.grow_kv(own_slot, layer, kv_pages)

    # -- addresses, fixed for the life of the instance

    def part_address(self, part: Part) -> int:
        """Address of the slab of `part`, whether it is held now or not.

        Raises:
            AccountingError: the model has no such part.
        """
        return self._slab(part).address

    def part_view(self, part: Part) -> NDArray[np.uint8]:
        """The slab of a held part, in bytes, up to the end of its last page.

        Raises:
            AccountingError: the part is not held now.
        """
        if not self.holds(part):
            raise AccountingError(f"{part} is not held")
        slab = self._slab(part)
        return self.arena.view(slab.address, slab.nbytes)

    def kv_base(self, layer: int) -> int:
        """Address of block 0 of slot 0 in `layer`; block b lies b * block_bytes behind it.

        Raises:
            AccountingError: the model has no such layer.
        """
        return self._kv_range(layer).address

    # -- what is there

    def holds(self, part: Part) -> bool:
        """True while the pages of `part` are mapped at its slab."""
        return self.ledger.pages(PartPages(part)) > 0

    @property
    def held_layers(self) -> tuple[int, ...]:
        """Layers that are held now, ascending."""
        parts = (part for part in self.plan.part_pages if part.kind is PartKind.LAYER)
        return tuple(part.index for part in parts if self.holds(part))

    def usable_blocks(self, slot: SlotId) -> int:
        """Blocks [0, n) of `slot` that are backed in every held layer of this instance."""
        pages = min(
            (self.ledger.pages(KvPages(layer, slot)) for layer in self.held_layers), default=0
        )
        return pages * self.plan.geometry.blocks_per_page

    # -- changes of owner

    def hold_part(self, part: Part) -> None:
        """Map free pages at the slab of `part`; their contents are undefined.

        Raises:
            AccountingError: the part is held already, or there are not enough free pages.
            ArenaError: the arena refused; nothing was changed.
        """
        slab = self._slab(part)
        self._map_free(PartPages(part), slab.num_pages, slab, 0)

    def release_part(self, part: Part, after: CompletionToken | None = None) -> int:
        """Drop `part`: unmap its slab. Returns the number of pages that are free by it.

        Raises:
            AccountingError: the part is not held.
            ArenaError: `after` is not done, or the arena refused; nothing was changed.
        """
        if not self.holds(part):
            raise AccountingError(f"{part} is not held")
        slab = self._slab(part)
        self._unmap_last(PartPages(part), slab.num_pages, slab, 0, after)
        return slab.num_pages

    def grow_kv(self, slot: SlotId, layer: int, pages: int) -> int:
        """Map `pages` free pages at the tail of `slot` in `layer`. Returns the slot's pages there.

        Raises:
            AccountingError: the slot would overflow, or there are not enough free pages.
            ArenaError: the arena refused; nothing was changed.
        """
        owner = KvPages(layer, slot)
        now = self.ledger.pages(owner)
        if pages <= 0 or now + pages > self.slots.slot_pages:
            raise AccountingError(
                f"{owner} has {now} pages of at most {self.slots.slot_pages}: cannot add {pages}"
            )
        target = self._kv_range(layer)
        self._map_free(owner, pages, target, self.slots.range_page(slot, now))
        return now + pages

    def shrink_kv(
        self, slot: SlotId, layer: int, pages: int, after: CompletionToken | None = None
    ) -> int:
        """Unmap the last `pages` pages of `slot` in `layer`. Returns the slot's pages there.

        Raises:
            AccountingError: the slot has fewer pages.
            ArenaError: `after` is not done, or the arena refused; nothing was changed.
        """
        owner = KvPages(layer, slot)
        left = self.ledger.pages(owner) - pages
        if pages <= 0 or left < 0:
            raise AccountingError(f"{owner} has {left + pages} pages: cannot remove {pages}")
        source = self._kv_range(layer)
        self._unmap_last(owner, pages, source, self.slots.range_page(slot, left), after)
        return left

    # -- laws and end

    def check(self) -> None:
        """The ledger's laws, and that the arena maps exactly what the ledger says, nowhere else.

        Raises:
            AccountingError: they disagree.
        """
        self.ledger.check()
        for part, slab in self._slabs.items():
            runs = self.ledger.runs(PartPages(part))
            if runs and sum(run.count for run in runs) != slab.num_pages:
                raise AccountingError(f"only a piece of {part} is held: {runs}")
            self._check_range(str(part), slab, _placed(0, runs))
        for layer, kv_range in enumerate(self._kv):
            expected: list[MappedRun] = []
            for slot in map(SlotId, range(self.slots.num_slots)):
                runs = self.ledger.runs(KvPages(layer, slot))
                expected += _placed(self.slots.range_page(slot, 0), runs)
            self._check_range(f"KV of layer {layer}", kv_range, expected)

    def close(self) -> None:
        """Close the arena: all addresses become invalid. May be called twice."""
        self.arena.close()

    def __enter__(self) -> InstanceMemory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- internals

    def _slab(self, part: Part) -> VirtualRange:
        slab = self._slabs.get(part)
        if slab is None:
            raise AccountingError(f"the model has no {part}")
        return slab

    def _kv_range(self, layer: int) -> VirtualRange:
        if not 0 <= layer < self.plan.num_layers:
            raise AccountingError(f"the model has no layer {layer}")
        return self._kv[layer]

    def _map_free(self, owner: Owner, pages: int, target: VirtualRange, page_offset: int) -> None:
        runs = self.ledger.take(owner, pages)
        self._poison_runs(runs)
        try:
            self.arena.map(target, page_offset, runs)
        except ArenaError:
            self.ledger.give(owner, pages)
            raise

    def _unmap_last(
        self,
        owner: Owner,
        pages: int,
        source: VirtualRange,
        page_offset: int,
        after: CompletionToken | None,
    ) -> None:
        self.arena.unmap(source, page_offset, pages, after)
        self._poison_runs(self.ledger.transfer(owner, FREE, pages))

    def _poison_runs(self, runs: Iterable[PageRun]) -> None:
        if self._poison:
            for run in runs:
                self.arena.poison(run)

    def _check_range(self, name: str, source: VirtualRange, expected: list[MappedRun]) -> None:
        mapped, expected = list(self.arena.mapped_runs(source)), merge_runs(expected)
        if mapped != expected:
            raise AccountingError(f"{name}: the arena maps {mapped}, the ledger says {expected}")


def _placed(page_offset: int, runs: Iterable[PageRun]) -> list[MappedRun]:
    """`runs` one after the other from `page_offset` on."""
    placed: list[MappedRun] = []
    for run in runs:
        placed.append(MappedRun(page_offset, run.start, run.count))
        page_offset += run.count
    return placed


def _check_fit(plan: MemoryPlan, slots: SlotMap, own_slot: SlotId, arena: Arena) -> None:
    if slots.geometry != plan.geometry or arena.page_bytes != plan.geometry.page_bytes:
        raise AccountingError(
            f"page sizes differ: plan {plan.geometry}, slots {slots.geometry}, arena "
            f"{arena.page_bytes} bytes"
        )
    if arena.num_pages != plan.num_pages:
        raise AccountingError(f"plan of {plan.num_pages} pages, arena of {arena.num_pages}")
    if not 0 <= own_slot < slots.num_slots:
        raise AccountingError(f"no slot {own_slot} among {slots.num_slots}")
