"""Block pool and prefix hashes: by example, and against a naive model of every operation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kunserve.core.errors import AccountingError
from kunserve.core.ids import BlockId, SlotId
from kunserve.policy.blocks import BlockPool
from kunserve.policy.prefix import ROOT_HASH, block_hash, block_hashes

SLOT_BLOCKS = 64


def make_pool(*usable_blocks: int, blocks_per_page: int = 4) -> BlockPool:
    """Slot i has usable_blocks[i] of 64 blocks."""
    usable = {SlotId(slot): blocks for slot, blocks in enumerate(usable_blocks)}
    return BlockPool(SLOT_BLOCKS, blocks_per_page, usable)


def ids(*blocks: int) -> tuple[BlockId, ...]:
    return tuple(BlockId(block) for block in blocks)


# ---------------------------------------------------------------- hashes


def test_hashes_cover_full_blocks_and_everything_before_them() -> None:
    hashes = block_hashes(range(11), 4)
    assert len(hashes) == 2
    assert hashes[0] == block_hash(ROOT_HASH, (0, 1, 2, 3))
    assert hashes[1] == block_hash(hashes[0], (4, 5, 6, 7))
    assert block_hashes([9, 1, 2, 3, 4, 5, 6, 7], 4)[1] != hashes[1]


def test_hashes_extend_known_ones() -> None:
    tokens = list(range(40))
    known = block_hashes(tokens[:13], 4)
    assert block_hashes(tokens, 4, known) == block_hashes(tokens, 4)
    assert block_hashes(tokens[:13], 4, known) == known


def test_hash_is_of_little_endian_tokens_on_every_machine() -> None:
    expected = hashlib.sha256(b"parent" + bytes.fromhex("01000000 00000080")).digest()
    assert block_hash(b"parent", (1, 2**31)) == expected


# ---------------------------------------------------------------- allocation


def test_lowest_index_first_and_own_page_first() -> None:
    pool = make_pool(16)
    first = pool.allocate(2)
    second = pool.allocate(3)  # fills the partly used page, then the lowest empty one
    assert first == ids(0, 1)
    assert second == ids(2, 3, 4)
    third = pool.allocate(1, near=second[-1])
    assert third == ids(5)
    pool.release(first)
    assert pool.allocate(2, near=third[-1]) == ids(6, 7)  # its own page before fuller pages
    pool.check()


def test_fullest_partly_used_page_before_lower_ones() -> None:
    pool = make_pool(16)
    blocks = pool.allocate(16)
    pool.release(ids(1, 2, 3))  # page 0: 3 free
    pool.release(ids(10))  # page 2: 1 free
    pool.release(ids(12, 13, 14, 15))  # page 3: empty
    assert pool.allocate(5) == ids(10, 1, 2, 3, 12)
    assert len(blocks) == 16
    pool.check()


def test_slots_are_ranges_with_fixed_ids() -> None:
    pool = make_pool(4, 8)
    assert pool.total_blocks == 12
    assert pool.allocate(12) == ids(0, 1, 2, 3, 64, 65, 66, 67, 68, 69, 70, 71)
    pool.check()


def test_a_slot_grows_at_its_tail_even_inside_a_page() -> None:
    pool = make_pool(6)
    held = pool.allocate(6)
    pool.add_range(SlotId(0), 11)
    pool.add_range(SlotId(15), 3)
    assert pool.usable_blocks(SlotId(0)) == 11
    # page 1 is partly used; then the lowest empty pages, short ones included
    assert pool.allocate(8) == ids(6, 7, 8, 9, 10, 960, 961, 962)
    assert pool.available_blocks == 0
    pool.check([held, ids(6, 7, 8, 9, 10, 960, 961, 962)])


def test_ranges_that_cannot_be_are_refused() -> None:
    pool = make_pool(8)
    with pytest.raises(AccountingError, match="from 8 to 4"):
        pool.add_range(SlotId(0), 4)
    with pytest.raises(AccountingError, match="64 ids"):
        pool.add_range(SlotId(0), 65)
    with pytest.raises(AccountingError, match="whole pages"):
        BlockPool(10, 4, {})
    pool.check()


def test_more_than_available_is_refused_and_takes_nothing() -> None:
    pool = make_pool(4)
    with pytest.raises(AccountingError, match="5 blocks asked for, 4 available"):
        pool.allocate(5)
    assert pool.free_blocks == 4


# ---------------------------------------------------------------- prefix cache


def test_cached_blocks_are_found_shared_and_kept_after_release() -> None:
    pool = make_pool(16)
    hashes = block_hashes(range(12), 4)
    blocks = pool.allocate(3)
    for block, digest in zip(blocks, hashes, strict=True):
        assert pool.register(block, digest)
    assert pool.lookup(hashes) == blocks
    pool.release(blocks)
    assert (pool.free_blocks, pool.cached_blocks, pool.available_blocks) == (13, 3, 16)
    assert pool.count_unreferenced(blocks) == 3
    pool.share(blocks[:2])
    pool.share(blocks[:2])
    assert pool.count_unreferenced(blocks) == 1
    assert not pool.is_writable(blocks[0])
    pool.check([blocks[:2], blocks[:2]])


def test_free_blocks_before_cached_ones_then_least_recently_used() -> None:
    pool = make_pool(8)
    old, new = pool.allocate(2), pool.allocate(2)
    for block, digest in zip(old + new, block_hashes(range(16), 4), strict=True):
        pool.register(block, digest)
    pool.release(old)
    pool.release(new)
    assert pool.allocate(4) == ids(4, 5, 6, 7)  # no content is lost
    # the tail of the older prefix goes first, its head after it
    assert pool.allocate(3) == (old[1], old[0], new[1])
    assert pool.lookup(block_hashes(range(16), 4)) == ()
    pool.check()


def test_sharing_makes_a_block_recent_again() -> None:
    pool = make_pool(2, blocks_per_page=2)
    a, b = pool.allocate(2)
    pool.register(a, b"a")
    pool.register(b, b"b")
    pool.release((a,))
    pool.release((b,))
    pool.share((a,))
    pool.release((a,))
    assert pool.allocate(1) == (b,)


def test_the_second_block_with_the_same_content_stays_unnamed() -> None:
    pool = make_pool(8)
    first, second = pool.allocate(2)
    assert pool.register(first, b"same")
    assert not pool.register(second, b"same")
    pool.release((second,))
    assert (pool.free_blocks, pool.cached_blocks) == (7, 0)
    pool.release((first,))
    assert (pool.free_blocks, pool.cached_blocks) == (7, 1)
    pool.check([])


def test_lookup_stops_at_the_first_gap() -> None:
    pool = make_pool(8)
    blocks = pool.allocate(3)
    hashes = block_hashes(range(12), 4)
    pool.register(blocks[0], hashes[0])
    pool.register(blocks[2], hashes[2])
    assert pool.lookup(hashes) == blocks[:1]


def test_misuse_is_an_accounting_error() -> None:
    pool = make_pool(8)
    (block,) = pool.allocate(1)
    pool.register(block, b"x")
    with pytest.raises(AccountingError, match="changed its content"):
        pool.register(block, b"y")
    pool.release((block,))
    with pytest.raises(AccountingError, match="nobody holds it"):
        pool.release((block,))
    with pytest.raises(AccountingError, match="nobody holds it"):
        pool.register(BlockId(5), b"z")
    with pytest.raises(AccountingError, match="it is free"):
        pool.share(ids(5))


def test_check_compares_with_the_owners() -> None:
    pool = make_pool(8)
    blocks = pool.allocate(2)
    pool.check([blocks])
    for wrong in ([], [blocks, blocks], [blocks[:1]], [(*blocks, BlockId(7))]):
        with pytest.raises(AccountingError, match="reference counts"):
            pool.check(wrong)


# ---------------------------------------------------------------- against a naive model


@dataclass
class NaivePool:
    """The same rules over plain sets, searched from end to end each time."""

    page: int
    usable: set[int] = field(default_factory=set)
    references: dict[int, int] = field(default_factory=dict)
    names: dict[int, bytes] = field(default_factory=dict)
    lru: list[int] = field(default_factory=list)

    def free(self) -> set[int]:
        return self.usable - self.references.keys() - set(self.lru)

    def take(self, near: int | None) -> int:
        free = self.free()
        if not free:
            block = self.lru.pop(0)
            del self.names[block]
        else:
            own = {b for b in free if near is not None and b // self.page == near // self.page}
            block = min(own) if own else min(free, key=self.preference)
        self.references[block] = 1
        return block

    def preference(self, block: int) -> tuple[bool, int, int]:
        mates = {b for b in self.usable if b // self.page == block // self.page}
        free = len(mates & self.free())
        empty = free == len(mates)
        return (empty, 0 if empty else free, block)

    def release(self, block: int) -> None:
        self.references[block] -= 1
        if not self.references[block]:
            del self.references[block]
            if block in self.names:
                self.lru.append(block)


class PoolMachine(RuleBasedStateMachine):
    """Random tables of blocks, shared, named, released and evicted."""

    @initialize(page=st.sampled_from([1, 2, 4, 8]), sizes=st.lists(st.integers(0, 14), max_size=3))
    def build(self, page: int, sizes: list[int]) -> None:
        self.pool = make_pool(*sizes, blocks_per_page=page)
        self.naive = NaivePool(page)
        self.sizes = dict.fromkeys(range(4), 0)
        for slot, size in enumerate(sizes):
            self.note_growth(slot, size)
        self.tables: list[tuple[BlockId, ...]] = []

    def note_growth(self, slot: int, size: int) -> None:
        self.sizes[slot] = size
        self.naive.usable |= {slot * SLOT_BLOCKS + index for index in range(size)}

    @rule(slot=st.integers(0, 3), more=st.integers(0, 5))
    def grow(self, slot: int, more: int) -> None:
        size = min(SLOT_BLOCKS, self.sizes[slot] + more)
        self.pool.add_range(SlotId(slot), size)
        self.note_growth(slot, size)

    @rule(count=st.integers(0, 6), data=st.data())
    def allocate(self, count: int, data: st.DataObject) -> None:
        count = min(count, self.pool.available_blocks)
        tables = [None, *(table for table in self.tables if table)]
        table = data.draw(st.sampled_from(tables))
        near = table[-1] if table else None
        expected: list[int] = []
        for _ in range(count):
            expected.append(self.naive.take(expected[-1] if expected else near))
        blocks = self.pool.allocate(count, near)
        assert list(blocks) == expected
        self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), name=st.integers(0, 12))
    def register(self, data: st.DataObject, name: int) -> None:
        held = [block for table in self.tables for block in table]
        unnamed = [block for block in held if block not in self.naive.names]
        if not unnamed:
            return
        block = data.draw(st.sampled_from(unnamed))
        digest = bytes([name])
        is_new = digest not in self.naive.names.values()
        assert self.pool.register(block, digest) == is_new
        if is_new:
            self.naive.names[block] = digest

    @rule(names=st.lists(st.integers(0, 12), max_size=4, unique=True))
    def share(self, names: list[int]) -> None:
        blocks = self.pool.lookup([bytes([name]) for name in names])
        by_name = {digest: block for block, digest in self.naive.names.items()}
        found = [by_name.get(bytes([name])) for name in names]
        assert list(blocks) == found[: found.index(None) if None in found else len(found)]
        self.pool.share(blocks)
        for block in blocks:
            self.naive.references[block] = self.naive.references.get(block, 0) + 1
            if block in self.naive.lru:
                self.naive.lru.remove(block)
        self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        for block in reversed(table):
            self.naive.release(block)

    @invariant()
    def laws(self) -> None:
        if not hasattr(self, "pool"):
            return
        pool, naive = self.pool, self.naive
        pool.check(self.tables)
        assert pool.free_blocks == len(naive.free())
        assert pool.cached_blocks == len(naive.lru)
        assert pool.referenced_blocks == len(naive.references)
        assert pool.total_blocks == len(naive.usable)


PoolMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestPool = PoolMachine.TestCase
