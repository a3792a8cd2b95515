"""The memory of a simulated instance: numbered pages with contents, and what addresses show.

    part slab    page i of the slab   -> physical page      tag (part, i) when it was loaded
    layer KV     range page           -> physical page      cells, one per position

Kernels find KV only through these tables, as real ones do, so reading or writing a hole raises.
Transfers go by physical page and check nothing, as RDMA does.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from kunserve.core.actions import PageCopy
from kunserve.core.errors import AccountingError
from kunserve.core.ids import BlockId
from kunserve.core.layout import Part
from kunserve.core.memory import KvExtent, PageRun, pages_of

POISON = -1
"""A cell that nobody has written since the page changed its owner."""

HOLE = -1
"""A page of a slab, of which others are mapped, that shows nothing."""

PageTag = tuple[Part, int]
"""Page `[1]` of the weights of part `[0]`."""


class PhysicalPages:
    """Contents of all physical pages: KV cells, and tags of weights.

    A page holds cells of `blocks_per_page` blocks of `block_size` positions.
    """

    def __init__(self, num_pages: int, blocks_per_page: int, block_size: int) -> None:
        self.blocks_per_page = blocks_per_page
        self.block_size = block_size
        self.cells = array("q", [POISON]) * (num_pages * blocks_per_page * block_size)
        self.tags: list[PageTag | None] = [None] * num_pages

    def cell_at(self, page: int, block: int) -> int:
        """Index of the first cell of a page's block."""
        return (page * self.blocks_per_page + block) * self.block_size

    def poison(self, page: int) -> None:
        """Nothing of the page is worth anything."""
        first, count = self.cell_at(page, 0), self.blocks_per_page * self.block_size
        self.cells[first : first + count] = array("q", [POISON]) * count
        self.tags[page] = None

    def copy_from(self, peer: PhysicalPages, copy: PageCopy) -> None:
        """Write blocks of a page with what a peer's page holds now, whatever that is."""
        here = self.cell_at(copy.local_page, copy.first_block)
        there = peer.cell_at(copy.remote_page, copy.remote_first_block)
        count = copy.num_blocks * self.block_size
        self.cells[here : here + count] = peer.cells[there : there + count]
        is_whole = copy.num_blocks == self.blocks_per_page
        self.tags[copy.local_page] = peer.tags[copy.remote_page] if is_whole else None

    def load(self, pages: Sequence[int], part: Part) -> None:
        """Write weights of `part`, as read from the file."""
        for index, page in enumerate(pages):
            self.poison(page)
            self.tags[page] = (part, index)

    def has_part(self, pages: Sequence[int], part: Part) -> bool:
        """True when all of `part` lies in `pages`, in order."""
        return all(self.tags[page] == (part, index) for index, page in enumerate(pages))


class TableMapper:
    """The `PageMapper` of the simulator. `version` counts its changes."""

    def __init__(self, pages: PhysicalPages, num_layers: int) -> None:
        self.pages = pages
        self.version = 0
        self.parts: dict[Part, list[int]] = {}
        self.kv: list[dict[int, int]] = [{} for _ in range(num_layers)]

    # ------------------------------------------------------------ PageMapper

    def map_part(self, part: Part, runs: Sequence[PageRun], slab_offset: int = 0) -> None:
        """Show physical `runs` at the slab of `part`, where holes are."""
        pages, slab = pages_of(runs), list(self.parts.get(part, ()))
        stop = slab_offset + len(pages)
        slab += [HOLE] * (stop - len(slab))
        if any(page != HOLE for page in slab[slab_offset:stop]):
            raise AccountingError(f"the slab of {part} is no hole")
        self.version += 1
        slab[slab_offset:stop] = pages
        self.parts[part] = slab

    def unmap_part(self, part: Part, num_pages: int, slab_offset: int = 0) -> None:
        """Put a hole over mapped pages of the slab of `part`."""
        self._leave_slab(part, slab_offset, num_pages)
        self.version += 1

    def map_kv(self, layer: int, range_page: int, runs: Sequence[PageRun]) -> None:
        """Show physical `runs` from `range_page` on, where holes are."""
        shown = dict(enumerate(pages_of(runs), start=range_page))
        if self.kv[layer].keys() & shown.keys():
            raise AccountingError(f"layer {layer} has no hole at all of {list(shown)}")
        self.version += 1
        self.kv[layer].update(shown)

    def unmap_kv(self, layer: int, range_page: int, count: int) -> None:
        """Put a hole over mapped range pages."""
        gone = range(range_page, range_page + count)
        if not self.kv[layer].keys() >= set(gone):
            raise AccountingError(f"layer {layer} has a hole in {gone} already")
        self.version += 1
        for page in gone:
            del self.kv[layer][page]

    def move_part_to_kv(
        self, part: Part, slab_offset: int, layer: int, range_page: int, count: int
    ) -> None:
        """Show pages of the slab of `part` in `layer` instead, where holes are."""
        if self.kv[layer].keys() & set(range(range_page, range_page + count)):
            raise AccountingError(f"layer {layer} has no hole at {range_page}")
        pages = self._leave_slab(part, slab_offset, count)
        self.map_kv(layer, range_page, [PageRun(page, 1) for page in pages])

    def move_kv(
        self, layer: int, range_page: int, to_layer: int, to_range_page: int, count: int
    ) -> None:
        """Show range pages of `layer` in `to_layer` instead, where holes are."""
        shown = self.kv[layer]
        pages = [shown.get(page, HOLE) for page in range(range_page, range_page + count)]
        if HOLE in pages:
            raise AccountingError(f"layer {layer} has a hole at {range_page}")
        self.map_kv(to_layer, to_range_page, [PageRun(page, 1) for page in pages])
        self.unmap_kv(layer, range_page, count)

    def _leave_slab(self, part: Part, slab_offset: int, count: int) -> list[int]:
        slab = list(self.parts.get(part, ()))
        pages = slab[slab_offset : slab_offset + count]
        if len(pages) != count or HOLE in pages:
            raise AccountingError(f"pages of {part} are unmapped that are not mapped")
        slab[slab_offset : slab_offset + count] = [HOLE] * count
        if all(page == HOLE for page in slab):
            del self.parts[part]
        else:
            self.parts[part] = slab
        return pages

    def poison(self, run: PageRun) -> None:
        """Contents of these pages are gone."""
        for page in run:
            self.pages.poison(page)

    def mapped_part(self, part: Part) -> tuple[PageRun, ...]:
        """What the slab of `part` shows."""
        extents = _extents(0, enumerate(self.parts.get(part, ())))
        return tuple(PageRun(extent.physical_page, extent.count) for extent in extents)

    def mapped_kv(self, layer: int) -> tuple[KvExtent, ...]:
        """What the KV range of `layer` shows."""
        return tuple(_extents(layer, sorted(self.kv[layer].items())))

    # ------------------------------------------------------------ what kernels do

    def check_part(self, part: Part) -> None:
        """A kernel reads the weights of `part`.

        Raises:
            AccountingError: they are not all there.
        """
        pages = self.parts.get(part)
        if pages is None or not self.pages.has_part(pages, part):
            raise AccountingError(f"the weights of {part} are read, but they are not there")

    def first_cell(self, layer: int, block: BlockId) -> int:
        """Index of the first cell of `block` in `layer`.

        Raises:
            AccountingError: there is a hole.
        """
        page, index = divmod(block, self.pages.blocks_per_page)
        physical = self.kv[layer].get(page)
        if physical is None:
            raise AccountingError(f"KV of layer {layer} has a hole at block {block} (page {page})")
        return self.pages.cell_at(physical, index)

    def copy_block(self, layer: int, source: BlockId, target: BlockId) -> None:
        """KV of one block is copied to another one.

        Raises:
            AccountingError: there is a hole.
        """
        here, there = self.first_cell(layer, target), self.first_cell(layer, source)
        cells, count = self.pages.cells, self.pages.block_size
        cells[here : here + count] = cells[there : there + count]

    def read_block(self, layer: int, block: BlockId) -> array[int]:
        """KV of one block.

        Raises:
            AccountingError: there is a hole.
        """
        first = self.first_cell(layer, block)
        return self.pages.cells[first : first + self.pages.block_size]

    def write_block(self, layer: int, block: BlockId, cells: array[int]) -> None:
        """Write KV of one block.

        Raises:
            AccountingError: there is a hole.
        """
        first = self.first_cell(layer, block)
        self.pages.cells[first : first + self.pages.block_size] = cells


def _extents(layer: int, shown: Sequence[tuple[int, int]] | enumerate[int]) -> list[KvExtent]:
    extents: list[KvExtent] = []
    for page, physical in shown:
        last = extents[-1] if extents else None
        if (
            last is not None
            and page == last.range_page + last.count
            and physical == last.physical_page + last.count
        ):
            count = last.count + 1
            extents[-1] = KvExtent(layer, last.range_page, last.physical_page, count)
        else:
            extents.append(KvExtent(layer, page, physical, 1))
    return extents
