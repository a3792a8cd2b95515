"""Which KV blocks are free, cached or in use (design section 3, permanent slots).

A block id never changes its meaning: block id = slot * slot_blocks + index. Blocks come and go by
whole range pages (`kunserve.core.memory`), while ids stay:

    slot 0                                    slot 1
    [0 ......... open)[ not backed ........ ) [S ..... open)[ arriving )[ not backed . 2S)
    |page 0|page 1|page 2|                    |page S/b|...         b = blocks_per_page

    open       backed by all members: its blocks are allocated and counted
    closed     backed, but being emptied: nothing is allocated or found there any more
    neither    not backed, or not complete on all members yet (an exchange brings it)

Every block of an open page is in exactly one state:

    free         no content worth keeping
    cached       unreferenced, but full and named by a hash: evictable, least recently used first
    referenced   in the block table of one request, or of several that share a full block

In other pages a block is referenced or does not count: `total_blocks` shrinks when the last
reference goes. Open pages belong to homes, which are allocated from separately; a pool that is not
divided is one home, number 0.

Allocation keeps pages together, so that tails empty by themselves and can be given back: a
request fills its own page, then the page with the fewest free blocks, then the lowest empty page,
and in a page the lowest index. Only when nothing is free is a cached block evicted.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush

from kunserve.core.errors import AccountingError
from kunserve.core.ids import BlockId, SlotId
from kunserve.core.memory import PageRun, pages_of, runs_of


class _Home:
    """What is allocated together: open pages, their free and their cached blocks."""

    __slots__ = ("evictable", "free_blocks", "page_heap")

    def __init__(self) -> None:
        self.free_blocks = 0
        # (rank, page), at least one true entry for every page with free blocks; entries whose
        # rank is out of date, or whose page has left, are dropped when they come up.
        self.page_heap: list[tuple[int, int]] = []
        self.evictable: OrderedDict[BlockId, int] = OrderedDict()  # and when it was released

    @property
    def available_blocks(self) -> int:
        return self.free_blocks + len(self.evictable)


class BlockPool:
    """Owner of all block states of one group. Allocation is O(log pages) per block.

    Args:
        slot_blocks: S, the ids of each slot; a multiple of `blocks_per_page`.
        blocks_per_page: blocks of one layer in one physical page.
        usable_blocks: of each slot, how many blocks from its index 0 are backed by memory. The last
            page of a slot may be open in part only.
        pages: range pages that are backed in full.

    Raises:
        AccountingError: S is not whole pages, a slot has more usable blocks than ids, or a page is
            named twice.
    """

    def __init__(
        self,
        slot_blocks: int,
        blocks_per_page: int,
        usable_blocks: Mapping[SlotId, int] | None = None,
        pages: Iterable[PageRun] = (),
    ) -> None:
        if blocks_per_page < 1 or slot_blocks < 1 or slot_blocks % blocks_per_page:
            raise AccountingError(
                f"a slot of {slot_blocks} blocks is not whole pages of {blocks_per_page} blocks"
            )
        self._slot_blocks = slot_blocks
        self._blocks_per_page = blocks_per_page
        self._backed_blocks = 0
        self._open_blocks = 0
        self._outside_blocks = 0  # referenced, but not in an open page
        # Bit i of a mask stands for block page * blocks_per_page + i.
        self._usable_masks: dict[int, int] = {}  # of all pages, open or closed
        self._free_masks: dict[int, int] = {}  # of open pages, as is _home_of
        self._home_of: dict[int, _Home] = {}
        self._homes = [_Home()]
        self._is_divided = False
        self._references: dict[BlockId, int] = {}
        self._block_of_hash: dict[bytes, BlockId] = {}
        self._hash_of_block: dict[BlockId, bytes] = {}
        self._releases = 0  # stamps of cached blocks
        self._touched: set[BlockId] | None = None
        for slot, blocks in sorted((usable_blocks or {}).items()):
            self._add_prefix(slot, blocks)
        self.add_pages(pages)

    def _add_prefix(self, slot: SlotId, usable_blocks: int) -> None:
        if not 0 <= usable_blocks <= self._slot_blocks:
            raise AccountingError(
                f"slot {slot} cannot have {usable_blocks} usable blocks: "
                f"it has {self._slot_blocks} ids"
            )
        first_page = slot * self._slot_blocks // self._blocks_per_page
        for number in range(-(-usable_blocks // self._blocks_per_page)):
            blocks = min(self._blocks_per_page, usable_blocks - number * self._blocks_per_page)
            self._back(first_page + number, blocks)
            self._open(first_page + number, self._homes[0])

    # ------------------------------------------------------------ counts

    @property
    def blocks_per_page(self) -> int:
        """Blocks of one range page."""
        return self._blocks_per_page

    @property
    def total_blocks(self) -> int:
        """Free, cached and referenced blocks; the latter also where no page is open."""
        return self._open_blocks + self._outside_blocks

    @property
    def open_blocks(self) -> int:
        """Blocks of open pages."""
        return self._open_blocks

    @property
    def backed_blocks(self) -> int:
        """Blocks of open and closed pages."""
        return self._backed_blocks

    @property
    def free_blocks(self) -> int:
        """Blocks without content."""
        return sum(home.free_blocks for home in self._homes)

    @property
    def cached_blocks(self) -> int:
        """Unreferenced blocks that keep their content until they are evicted."""
        return sum(len(home.evictable) for home in self._homes)

    @property
    def available_blocks(self) -> int:
        """Free and cached blocks of all homes."""
        return sum(home.available_blocks for home in self._homes)

    @property
    def referenced_blocks(self) -> int:
        """Blocks in use, shared ones counted once."""
        return len(self._references)

    def available_in(self, home: int) -> int:
        """What can be allocated in `home` now: free and cached blocks."""
        return self._homes[home].available_blocks

    def pages_in_use(self) -> tuple[int, ...]:
        """Pages with a referenced block, ascending, open or not. O(referenced blocks)."""
        return tuple(sorted({block // self._blocks_per_page for block in self._references}))

    def used_pages_per_home(self) -> tuple[int, ...]:
        """How many pages of each home have a referenced block. O(referenced blocks)."""
        used = Counter(self._home_of.get(page) for page in self.pages_in_use())
        return tuple(used[home] for home in self._homes)

    def closed_pages(self) -> tuple[PageRun, ...]:
        """Pages that were closed and neither reopened nor removed since."""
        return runs_of(self._usable_masks.keys() - self._home_of.keys())

    def is_referenced(self, block: BlockId) -> bool:
        """True while a block table holds `block`."""
        return block in self._references

    def is_backed(self, page: int) -> bool:
        """True for a page that was added, open or closed."""
        return page in self._usable_masks

    def is_open(self, block: BlockId) -> bool:
        """True when the page of `block` is open."""
        return block // self._blocks_per_page in self._home_of

    def lies_in(self, block: BlockId, home: int) -> bool:
        """True when the page of `block` is open and belongs to `home`."""
        return self._home_of.get(block // self._blocks_per_page) is self._homes[home]

    # ------------------------------------------------------------ pages come and go

    def add_pages(self, runs: Iterable[PageRun]) -> None:
        """Open pages that are backed by all members now. Blocks that are referenced there stay so,
        the others are free. While the pool is divided, new pages are closed ones.

        Raises:
            AccountingError: a page is here already, or named twice. Nothing has changed then.
        """
        pages = pages_of(runs)
        known = sorted(self._usable_masks.keys() & set(pages))
        if known or len(set(pages)) != len(pages):
            raise AccountingError(f"pages {known[:8]} are added, but they are here already")
        for page in pages:
            self._back(page, self._blocks_per_page)
            if not self._is_divided:
                self._open(page, self._homes[0])

    def remove_pages(self, runs: Iterable[PageRun]) -> None:
        """Forget pages, open or closed, that no request uses. Cached blocks there are evicted.

        Raises:
            AccountingError: a page is not here, or a block of it is referenced. Nothing has
                changed then.
        """
        pages = set(pages_of(runs))
        self._refuse_strangers(pages, self._usable_masks, "removed, but not here")
        used = sorted(pages & set(self.pages_in_use()))
        if used:
            raise AccountingError(f"pages {used[:8]} are removed, but they are in use")
        for page in pages:
            if page in self._home_of:
                self._close(page)
            self._backed_blocks -= self._usable_masks.pop(page).bit_count()

    def close_pages(self, runs: Iterable[PageRun]) -> None:
        """Allocate and find nothing in these pages any more; what is cached there is evicted.
        Referenced blocks stay until they are released, and count as long.

        Raises:
            AccountingError: a page is not open. Nothing has changed then.
        """
        pages = set(pages_of(runs))
        self._refuse_strangers(pages, self._home_of, "closed, but not open")
        for page in pages:
            self._close(page)

    def reopen_pages(self, runs: Iterable[PageRun]) -> None:
        """Undo `close_pages` and `divide`: blocks without a reference are free, and there is one
        home.

        Raises:
            AccountingError: a page is not closed. Nothing has changed then.
        """
        pages = set(pages_of(runs))
        closed = self._usable_masks.keys() - self._home_of.keys()
        self._refuse_strangers(pages, closed, "reopened, but not closed")
        if self._is_divided:
            self._regroup(dict.fromkeys(self._home_of, 0), 1)
            self._is_divided = False
        for page in pages:
            self._open(page, self._homes[0])

    @staticmethod
    def _refuse_strangers(pages: set[int], known: Iterable[int], what: str) -> None:
        strangers = sorted(pages.difference(known))
        if strangers:
            raise AccountingError(f"pages {strangers[:8]} are {what}")

    def _back(self, page: int, blocks: int) -> None:
        self._usable_masks[page] = (1 << blocks) - 1
        self._backed_blocks += blocks

    def _open(self, page: int, home: _Home) -> None:
        usable = self._usable_masks[page]
        used = self._used_mask(page)
        self._home_of[page] = home
        self._open_blocks += usable.bit_count()
        self._outside_blocks -= used.bit_count()
        home.free_blocks += (usable & ~used).bit_count()
        self._set_free_mask(page, usable & ~used)

    def _close(self, page: int) -> None:
        home = self._home_of.pop(page)
        for block in self._blocks_of({page: self._usable_masks[page]}):
            if home.evictable.pop(block, None) is not None:
                self._forget_name(block)
        home.free_blocks -= self._free_masks.pop(page).bit_count()
        self._open_blocks -= self._usable_masks[page].bit_count()
        self._outside_blocks += self._used_mask(page).bit_count()

    def _used_mask(self, page: int) -> int:
        first = page * self._blocks_per_page
        return sum(
            1 << index
            for index in range(self._blocks_per_page)
            if BlockId(first + index) in self._references
        )

    # ------------------------------------------------------------ homes

    def capacity_of(self, runs: Iterable[PageRun]) -> int:
        """Blocks of those of these pages that are open."""
        return sum(
            self._usable_masks[page].bit_count()
            for page in set(pages_of(runs))
            if page in self._home_of
        )

    def divide(self, homes: Sequence[Iterable[PageRun]]) -> None:
        """From now on there are `len(homes)` homes; open pages outside of all are closed. Pages of
        a home that are not open are left alone. Undone by `reopen_pages`.

        Raises:
            AccountingError: the pool is divided already, there is no home, or two of them have a
                page in common. Nothing has changed then.
        """
        home_of_page: dict[int, int] = {}
        for number, runs in enumerate(homes):
            for page in set(pages_of(runs)):
                if home_of_page.setdefault(page, number) != number:
                    raise AccountingError(f"page {page} is in two homes")
        if self._is_divided or not homes:
            raise AccountingError("a pool is divided once, into at least one home")
        for page in self._home_of.keys() - home_of_page.keys():
            self._close(page)
        self._regroup(home_of_page, len(homes))
        self._is_divided = True

    def _regroup(self, home_of_page: Mapping[int, int], num_homes: int) -> None:
        cached = [item for home in self._homes for item in home.evictable.items()]
        self._homes = [_Home() for _ in range(num_homes)]
        for page in self._home_of:
            home = self._home_of[page] = self._homes[home_of_page[page]]
            home.free_blocks += self._free_masks[page].bit_count()
            self._set_free_mask(page, self._free_masks[page])
        for block, stamp in sorted(cached, key=lambda item: item[1]):
            self._home_of[block // self._blocks_per_page].evictable[block] = stamp

    # ------------------------------------------------------------ allocation

    def allocate(
        self, num_blocks: int, near: BlockId | None = None, home: int = 0
    ) -> tuple[BlockId, ...]:
        """Take `num_blocks` blocks of `home`, with one reference each, for a request that ends in
        `near`, which may lie elsewhere.

        Raises:
            AccountingError: fewer are available; the caller makes room first.
        """
        source = self._homes[home]
        if num_blocks > source.available_blocks:
            raise AccountingError(
                f"{num_blocks} blocks asked for, {source.available_blocks} available"
            )
        blocks: list[BlockId] = []
        page = None if near is None else near // self._blocks_per_page
        for _ in range(num_blocks):
            block = self._take_free(source, page) if source.free_blocks else self._evict(source)
            self._references[block] = 1
            blocks.append(block)
            page = block // self._blocks_per_page
        return tuple(blocks)

    def adopt(self, tables: Iterable[Sequence[BlockId]], pages: Iterable[PageRun] = ()) -> None:
        """Add `pages`, then a reference for each entry of `tables`, which another pool gave out.
        Tables may name blocks of pages that are not here yet: only `add_pages` makes the other
        blocks of such a page free.

        Raises:
            AccountingError: as `add_pages`.
        """
        self.add_pages(pages)
        for block, references in Counter(b for table in tables for b in table).items():
            if block not in self._references:
                self._occupy(block)
            self._references[block] = self._references.get(block, 0) + references

    def _occupy(self, block: BlockId) -> None:
        """An unreferenced block, wherever it lies, is about to be referenced."""
        page, index = divmod(block, self._blocks_per_page)
        home = self._home_of.get(page)
        if home is None:
            self._outside_blocks += 1
        elif home.evictable.pop(block, None) is None:
            self._set_free_mask(page, self._free_masks[page] & ~(1 << index))
            home.free_blocks -= 1

    def release(self, blocks: Sequence[BlockId]) -> None:
        """Drop one reference of each block of a request's table.

        Last block first: the tail of a prefix is evicted before its head, without which it could
        not be found.

        Raises:
            AccountingError: a block has no reference.
        """
        for block in reversed(blocks):
            references = self._references.get(block, 0)
            if references == 0:
                raise AccountingError(f"block {block} is released, but nobody holds it")
            if references > 1:
                self._references[block] = references - 1
                continue
            del self._references[block]
            if self._touched is not None:
                self._touched.add(block)
            self._vacate(block)

    def _vacate(self, block: BlockId) -> None:
        """A block lost its last reference: it is cached, free, or counts no more."""
        page, index = divmod(block, self._blocks_per_page)
        home = self._home_of.get(page)
        if home is None:
            self._outside_blocks -= 1
            self._forget_name(block)
        elif block in self._hash_of_block:
            self._releases += 1
            home.evictable[block] = self._releases
        else:
            self._set_free_mask(page, self._free_masks[page] | 1 << index)
            home.free_blocks += 1

    def _take_free(self, home: _Home, page: int | None) -> BlockId:
        if page is None or self._home_of.get(page) is not home or not self._free_masks[page]:
            page = self._best_page(home)
        mask = self._free_masks[page]
        lowest = mask & -mask
        self._set_free_mask(page, mask ^ lowest)
        home.free_blocks -= 1
        return BlockId(page * self._blocks_per_page + lowest.bit_length() - 1)

    def _evict(self, home: _Home) -> BlockId:
        block, _ = home.evictable.popitem(last=False)
        self._forget_name(block)
        return block

    # ------------------------------------------------------------ what changed since

    def watch(self) -> None:
        """Start a new record of blocks that lose their last reference."""
        self._touched = set()

    def touched(self) -> tuple[BlockId, ...]:
        """Blocks that were without a reference at some time since `watch`, ascending: their content
        may be another one. None of them if nobody watches."""
        return tuple(sorted(self._touched or ()))

    # ------------------------------------------------------------ pages by fullness

    def _rank(self, page: int) -> int:
        """Free blocks of a partly used page; above all of those for an empty page; 0 when full.

        Cached blocks count as used: filling up around them keeps them longer.
        """
        mask = self._free_masks[page]
        return self._blocks_per_page + 1 if mask == self._usable_masks[page] else mask.bit_count()

    def _set_free_mask(self, page: int, mask: int) -> None:
        self._free_masks[page] = mask
        home = self._home_of[page]
        if mask:
            heappush(home.page_heap, (self._rank(page), page))
        if len(home.page_heap) > 4 * len(self._free_masks) + 64:
            home.page_heap = [
                (self._rank(p), p)
                for p, m in self._free_masks.items()
                if m and self._home_of[p] is home
            ]
            heapify(home.page_heap)

    def _best_page(self, home: _Home) -> int:
        """Page of least rank, then lowest, with a free block; there is one."""
        while True:
            rank, page = home.page_heap[0]
            if self._home_of.get(page) is home and rank == self._rank(page):
                return page
            heappop(home.page_heap)

    # ------------------------------------------------------------ prefix cache

    def lookup(self, hashes: Iterable[bytes], home: int = 0) -> tuple[BlockId, ...]:
        """Blocks of the longest prefix of `hashes` that is cached or in use in `home`. Takes
        nothing."""
        blocks: list[BlockId] = []
        for digest in hashes:
            block = self._block_of_hash.get(digest)
            if block is None or not self.lies_in(block, home):
                break
            blocks.append(block)
        return tuple(blocks)

    def count_unreferenced(self, blocks: Iterable[BlockId]) -> int:
        """How many of them are only cached: sharing those makes fewer blocks available."""
        return sum(block not in self._references for block in blocks)

    def count_exclusive(self, blocks: Iterable[BlockId]) -> int:
        """How many of them one table alone holds: they are available when it gives them up."""
        return sum(self._references.get(block) == 1 for block in blocks)

    def share(self, blocks: Iterable[BlockId]) -> None:
        """Add a reference to each of these blocks, which are in use or which `lookup` gave.

        Raises:
            AccountingError: a block is free; its content is gone.
        """
        for block in blocks:
            references = self._references.get(block, 0)
            if references == 0:
                home = self._home_of.get(block // self._blocks_per_page)
                if home is None or block not in home.evictable:
                    raise AccountingError(f"block {block} is shared, but it is free")
                del home.evictable[block]
            self._references[block] = references + 1

    def register(self, block: BlockId, digest: bytes) -> bool:
        """Name the content of a full block whose step is done, so that others find it.

        False when another block has this content already; this one then stays unnamed, and is
        free once it is released.

        Raises:
            AccountingError: nobody holds the block, or it has another name: a full block's content
                never changes.
        """
        if block not in self._references:
            raise AccountingError(f"block {block} is registered, but nobody holds it")
        if self._hash_of_block.get(block, digest) != digest:
            raise AccountingError(f"block {block} changed its content while it was in use")
        if self._block_of_hash.setdefault(digest, block) != block:
            return False
        self._hash_of_block[block] = digest
        return True

    def rename(self, source: BlockId, target: BlockId) -> None:
        """The content of `source` is in `target` too: its name, if it has one, goes there.

        Raises:
            AccountingError: one of them is not in use, or `target` has a name.
        """
        if source not in self._references or target not in self._references:
            raise AccountingError(f"block {source} or {target} is renamed, but nobody holds it")
        if target in self._hash_of_block:
            raise AccountingError(f"block {target} has a name, it cannot take that of {source}")
        digest = self._hash_of_block.pop(source, None)
        if digest is not None:
            self._block_of_hash[digest] = target
            self._hash_of_block[target] = digest

    def _forget_name(self, block: BlockId) -> None:
        digest = self._hash_of_block.pop(block, None)
        if digest is not None:
            del self._block_of_hash[digest]

    def is_writable(self, block: BlockId) -> bool:
        """One reference and no name: only then may a request write into the block."""
        return self._references.get(block) == 1 and block not in self._hash_of_block

    # ------------------------------------------------------------ laws

    def check(self, owners: Iterable[Sequence[BlockId]] | None = None) -> None:
        """Check that every block is in exactly one state, and the counts agree.

        With `owners`, the block tables of all requests that hold blocks, the reference counts
        must be theirs as well. O(total blocks).

        Raises:
            AccountingError: a law is broken.
        """
        if owners is not None:
            held = Counter(block for table in owners for block in table)
            if held != self._references:
                wrong = sorted(b for b in held | self._references.keys() if held[b] != self._ref(b))
                raise AccountingError(f"reference counts differ from block tables at {wrong[:8]}")
        if not self._usable_masks.keys() >= self._home_of.keys() == self._free_masks.keys():
            raise AccountingError("a page is open in part of the books only")
        free = self._blocks_of(self._free_masks)
        cached = [block for home in self._homes for block in home.evictable]
        inside = [block for block in self._references if self.is_open(block)]
        states = Counter([*free, *cached, *inside])
        if sum(mask.bit_count() for mask in self._usable_masks.values()) != self._backed_blocks:
            raise AccountingError(f"{self._backed_blocks} backed blocks are not those of the pages")
        opened = self._blocks_of({page: self._usable_masks[page] for page in self._home_of})
        if states != Counter(opened):
            raise AccountingError("a block is in two states, in none, or not usable")
        if len(opened) != self._open_blocks:
            raise AccountingError(f"{self._open_blocks} blocks in open pages, found {len(opened)}")
        outside = len(self._references) - len(inside)
        if outside != self._outside_blocks:
            raise AccountingError(f"{self._outside_blocks} blocks elsewhere, found {outside}")
        self._check_homes(free)
        self._check_names(set(free), set(cached))

    def _ref(self, block: BlockId) -> int:
        return self._references.get(block, 0)

    def _blocks_of(self, masks: Mapping[int, int]) -> list[BlockId]:
        return [
            BlockId(page * self._blocks_per_page + index)
            for page, mask in masks.items()
            for index in range(self._blocks_per_page)
            if mask >> index & 1
        ]

    def _check_homes(self, free: Sequence[BlockId]) -> None:
        found = Counter(self._home_of[block // self._blocks_per_page] for block in free)
        for number, home in enumerate(self._homes):
            if found[home] != home.free_blocks:
                raise AccountingError(
                    f"{home.free_blocks} blocks counted as free in home {number}, "
                    f"found {found[home]}"
                )
            if not all(self.lies_in(block, number) for block in home.evictable):
                raise AccountingError(f"home {number} has a cached block of another home")
        if not set(self._home_of.values()) <= set(self._homes):
            raise AccountingError("a page belongs to a home that is none")
        entries = {home: set(home.page_heap) for home in self._homes}
        lost = [
            page
            for page, mask in self._free_masks.items()
            if mask and (self._rank(page), page) not in entries[self._home_of[page]]
        ]
        if lost:
            raise AccountingError(f"pages {lost[:8]} have free blocks that allocation cannot find")

    def _check_names(self, free: set[BlockId], cached: set[BlockId]) -> None:
        if {block: digest for digest, block in self._block_of_hash.items()} != self._hash_of_block:
            raise AccountingError("names of blocks and blocks of names differ")
        if free & self._hash_of_block.keys():
            raise AccountingError("a free block still has a name")
        if cached - self._hash_of_block.keys():
            raise AccountingError("a cached block has no name")
        if self._hash_of_block.keys() - cached - self._references.keys():
            raise AccountingError("a block that nobody holds or keeps has a name")
