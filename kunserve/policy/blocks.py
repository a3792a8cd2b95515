"""Which KV blocks are free, cached or in use (design section 3, permanent slots).

A block id never changes its meaning: block id = slot * slot_blocks + index. Of each slot, a
prefix is usable; it grows and shrinks at its tail, by whole pages, while ids stay:

    slot 0                                    slot 1
    [0 .......... usable)[ not backed ..... ) [S ...... S + usable)[ not backed ... 2S)
    |page 0|page 1|page 2|                    |page S/b|...         b = blocks_per_page

Every usable block is in exactly one state:

    free         no content worth keeping
    cached       unreferenced, but full and named by a hash: evictable, least recently used first
    referenced   in the block table of one request, or of several that share a full block

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


class BlockPool:
    """Owner of all block states of one group. Every operation is O(log pages) per block.

    Args:
        slot_blocks: S, the ids of each slot; a multiple of `blocks_per_page`.
        blocks_per_page: blocks of one layer in one physical page.
        usable_blocks: how many blocks of each slot are backed by memory, from its index 0.

    Raises:
        AccountingError: S is not whole pages, or a slot has more usable blocks than ids.
    """

    def __init__(
        self, slot_blocks: int, blocks_per_page: int, usable_blocks: Mapping[SlotId, int]
    ) -> None:
        if blocks_per_page < 1 or slot_blocks < 1 or slot_blocks % blocks_per_page:
            raise AccountingError(
                f"a slot of {slot_blocks} blocks is not whole pages of {blocks_per_page} blocks"
            )
        self._slot_blocks = slot_blocks
        self._blocks_per_page = blocks_per_page
        self._usable_blocks: dict[SlotId, int] = {}
        self._total_blocks = 0
        self._free_blocks = 0
        # Pages are numbered through all slots: page = block id // blocks_per_page. Bit i of a
        # mask stands for block page * blocks_per_page + i.
        self._usable_masks: dict[int, int] = {}
        self._free_masks: dict[int, int] = {}
        # (rank, page), at least one true entry for every page with free blocks; entries whose
        # rank is out of date are dropped when they come up.
        self._page_heap: list[tuple[int, int]] = []
        self._references: dict[BlockId, int] = {}
        self._evictable: OrderedDict[BlockId, None] = OrderedDict()
        self._block_of_hash: dict[bytes, BlockId] = {}
        self._hash_of_block: dict[BlockId, bytes] = {}
        for slot, blocks in sorted(usable_blocks.items()):
            self.add_range(slot, blocks)

    # ------------------------------------------------------------ counts

    @property
    def total_blocks(self) -> int:
        """Usable blocks of all slots."""
        return self._total_blocks

    @property
    def free_blocks(self) -> int:
        """Blocks without content."""
        return self._free_blocks

    @property
    def cached_blocks(self) -> int:
        """Unreferenced blocks that keep their content until they are evicted."""
        return len(self._evictable)

    @property
    def available_blocks(self) -> int:
        """What can be allocated now: free and cached blocks."""
        return self._free_blocks + len(self._evictable)

    @property
    def referenced_blocks(self) -> int:
        """Blocks in use, shared ones counted once."""
        return len(self._references)

    def usable_blocks(self, slot: SlotId) -> int:
        """Length of the slot's usable prefix."""
        return self._usable_blocks.get(slot, 0)

    # ------------------------------------------------------------ ranges

    def add_range(self, slot: SlotId, usable_blocks: int) -> None:
        """Grow the usable prefix of `slot` to `usable_blocks`; the new blocks are free.

        Its counterpart, taking back pages at a tail that hold only free or cached blocks, comes
        with restore: it clears their bits in both masks, evicting what is cached there.

        Raises:
            AccountingError: the slot would shrink or run over its ids.
        """
        old = self.usable_blocks(slot)
        if not old <= usable_blocks <= self._slot_blocks:
            raise AccountingError(
                f"slot {slot} cannot go from {old} to {usable_blocks} usable blocks "
                f"(it has {self._slot_blocks} ids and only grows here)"
            )
        first_page = slot * self._slot_blocks // self._blocks_per_page
        for number in range(
            old // self._blocks_per_page, -(-usable_blocks // self._blocks_per_page)
        ):
            start = number * self._blocks_per_page
            low, high = max(0, old - start), min(self._blocks_per_page, usable_blocks - start)
            new_mask = (1 << high) - (1 << low)
            page = first_page + number
            self._usable_masks[page] = self._usable_masks.get(page, 0) | new_mask
            self._set_free_mask(page, self._free_masks.get(page, 0) | new_mask)
        self._usable_blocks[slot] = usable_blocks
        self._total_blocks += usable_blocks - old
        self._free_blocks += usable_blocks - old

    # ------------------------------------------------------------ allocation

    def allocate(self, num_blocks: int, near: BlockId | None = None) -> tuple[BlockId, ...]:
        """Take `num_blocks` blocks with one reference each, for a request that ends in `near`.

        Raises:
            AccountingError: fewer are available; the caller makes room first.
        """
        if num_blocks > self.available_blocks:
            raise AccountingError(
                f"{num_blocks} blocks asked for, {self.available_blocks} available"
            )
        blocks: list[BlockId] = []
        page = None if near is None else near // self._blocks_per_page
        for _ in range(num_blocks):
            block = self._take_free(page) if self._free_blocks else self._evict()
            self._references[block] = 1
            blocks.append(block)
            page = block // self._blocks_per_page
        return tuple(blocks)

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
            if block in self._hash_of_block:
                self._evictable[block] = None
            else:
                page, index = divmod(block, self._blocks_per_page)
                self._set_free_mask(page, self._free_masks[page] | 1 << index)
                self._free_blocks += 1

    def _take_free(self, page: int | None) -> BlockId:
        if page is None or not self._free_masks.get(page):
            page = self._best_page()
        mask = self._free_masks[page]
        lowest = mask & -mask
        self._set_free_mask(page, mask ^ lowest)
        self._free_blocks -= 1
        return BlockId(page * self._blocks_per_page + lowest.bit_length() - 1)

    def _evict(self) -> BlockId:
        block, _ = self._evictable.popitem(last=False)
        del self._block_of_hash[self._hash_of_block.pop(block)]
        return block

    # ------------------------------------------------------------ pages

    def _rank(self, page: int) -> int:
        """Free blocks of a partly used page; above all of those for an empty page; 0 when full.

        Cached blocks count as used: filling up around them keeps them longer.
        """
        mask = self._free_masks[page]
        return self._blocks_per_page + 1 if mask == self._usable_masks[page] else mask.bit_count()

    def _set_free_mask(self, page: int, mask: int) -> None:
        self._free_masks[page] = mask
        if mask:
            heappush(self._page_heap, (self._rank(page), page))
        if len(self._page_heap) > 4 * len(self._free_masks) + 64:
            self._page_heap = [(self._rank(p), p) for p, m in self._free_masks.items() if m]
            heapify(self._page_heap)

    def _best_page(self) -> int:
        """Page of least rank, then lowest, with a free block; there is one."""
        while True:
            rank, page = self._page_heap[0]
            if rank == self._rank(page):
                return page
            heappop(self._page_heap)

    # ------------------------------------------------------------ prefix cache

    def lookup(self, hashes: Iterable[bytes]) -> tuple[BlockId, ...]:
        """Blocks of the longest prefix of `hashes` that is cached or in use. Takes nothing."""
        blocks: list[BlockId] = []
        for digest in hashes:
            block = self._block_of_hash.get(digest)
            if block is None:
                break
            blocks.append(block)
        return tuple(blocks)

    def count_unreferenced(self, blocks: Iterable[BlockId]) -> int:
        """How many of them are only cached: sharing those makes fewer blocks available."""
        return sum(block not in self._references for block in blocks)

    def share(self, blocks: Iterable[BlockId]) -> None:
        """Add a reference to each of these blocks, which `lookup` gave.

        Raises:
            AccountingError: a block is free; its content is gone.
        """
        for block in blocks:
            references = self._references.get(block, 0)
            if references == 0:
                if block not in self._evictable:
                    raise AccountingError(f"block {block} is shared, but it is free")
                del self._evictable[block]
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

    def is_writable(self, block: BlockId) -> bool:
        """One reference and no name: only then may a request write into the block."""
        return self._references.get(block) == 1 and block not in self._hash_of_block

    # ------------------------------------------------------------ laws

    def check(self, owners: Iterable[Sequence[BlockId]] | None = None) -> None:
        """Check that every usable block is in exactly one state, and the counts agree.

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
        free = self._blocks_of(self._free_masks)
        if len(free) != self._free_blocks:
            raise AccountingError(f"{self._free_blocks} blocks counted as free, found {len(free)}")
        states = Counter([*free, *self._evictable, *self._references])
        if states != Counter(self._blocks_of(self._usable_masks)):
            raise AccountingError("a block is in two states, in none, or not usable")
        if len(states) != self._total_blocks:
            raise AccountingError(f"{self._total_blocks} blocks in all, found {len(states)}")
        self._check_names(set(free))
        self._check_heap()

    def _ref(self, block: BlockId) -> int:
        return self._references.get(block, 0)

    def _blocks_of(self, masks: Mapping[int, int]) -> list[BlockId]:
        return [
            BlockId(page * self._blocks_per_page + index)
            for page, mask in masks.items()
            for index in range(self._blocks_per_page)
            if mask >> index & 1
        ]

    def _check_names(self, free: set[BlockId]) -> None:
        if {block: digest for digest, block in self._block_of_hash.items()} != self._hash_of_block:
            raise AccountingError("names of blocks and blocks of names differ")
        if free & self._hash_of_block.keys():
            raise AccountingError("a free block still has a name")
        if self._evictable.keys() - self._hash_of_block.keys():
            raise AccountingError("a cached block has no name")

    def _check_heap(self) -> None:
        entries = set(self._page_heap)
        lost = [
            p for p, mask in self._free_masks.items() if mask and (self._rank(p), p) not in entries
        ]
        if lost:
            raise AccountingError(f"pages {lost[:8]} have free blocks that allocation cannot find")
