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
from kunserve.core.memory import PageRun, runs_of
from kunserve.policy.blocks import BlockPool
from kunserve.policy.prefix import ROOT_HASH, block_hash, block_hashes

SLOT_BLOCKS = 64


def make_pool(*usable_blocks: int, blocks_per_page: int = 4) -> BlockPool:
    """Slot i has usable_blocks[i] of 64 blocks."""
    usable = {SlotId(slot): blocks for slot, blocks in enumerate(usable_blocks)}
    return BlockPool(SLOT_BLOCKS, blocks_per_page, usable)


def runs(*pages: int) -> tuple[PageRun, ...]:
    return runs_of(pages)


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


def test_pages_that_are_added_are_free() -> None:
    pool = make_pool(6)
    held = pool.allocate(6)
    pool.add_pages(runs(2, 240))
    assert pool.allocate(5) == ids(8, 9, 10, 11, 960)
    assert (pool.total_blocks, pool.available_blocks) == (14, 3)
    pool.check([held, ids(8, 9, 10, 11, 960)])


def test_a_pool_of_pages() -> None:
    pool = BlockPool(SLOT_BLOCKS, 4, pages=(PageRun(0, 2), PageRun(16, 1)))
    assert pool.allocate(12) == ids(0, 1, 2, 3, 4, 5, 6, 7, 64, 65, 66, 67)
    assert (pool.pages_in_use(), pool.blocks_per_page) == ((0, 1, 16), 4)


def test_ranges_that_cannot_be_are_refused() -> None:
    pool = make_pool(8)
    with pytest.raises(AccountingError, match="64 ids"):
        make_pool(65)
    with pytest.raises(AccountingError, match="whole pages"):
        BlockPool(10, 4, {})
    for wrong in (runs(1), (PageRun(4, 2), PageRun(5, 1))):
        with pytest.raises(AccountingError, match="here already"):
            pool.add_pages(wrong)
    assert pool.total_blocks == 8
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


# ---------------------------------------------------------------- pages come and go


def named(pool: BlockPool, count: int, start: int = 0) -> tuple[BlockId, ...]:
    """Blocks in use that have names."""
    blocks = pool.allocate(count)
    for number, block in enumerate(blocks):
        assert pool.register(block, bytes([start + number]))
    return blocks


def test_closed_pages_keep_only_what_is_in_use_until_it_is_released() -> None:
    pool = make_pool(12)
    used = pool.allocate(2)
    cached = named(pool, 4)  # blocks 2..5
    pool.release(cached[:2])
    pool.close_pages(runs(0))
    assert (pool.total_blocks, pool.open_blocks, pool.backed_blocks) == (10, 8, 12)
    assert pool.lookup([bytes([0])]) == ()
    assert pool.closed_pages() == runs(0)
    pool.check([used, cached[2:]])
    assert set(pool.allocate(6)) == set(range(6, 12))
    assert pool.available_blocks == 0
    pool.release(used)
    assert (pool.total_blocks, pool.available_blocks) == (8, 0)
    pool.reopen_pages(runs(0))
    assert (pool.total_blocks, pool.free_blocks) == (12, 4)
    pool.check()


def test_a_name_in_a_closed_page_ends_with_its_last_reference() -> None:
    pool = make_pool(8)
    blocks = named(pool, 1)
    pool.close_pages(runs(0))
    assert pool.lookup([bytes([0])]) == ()
    pool.release(blocks)
    pool.check([])
    pool.reopen_pages(runs(0))
    assert (pool.cached_blocks, pool.free_blocks) == (0, 8)


def test_only_pages_without_references_are_removed_and_what_is_cached_goes() -> None:
    pool = make_pool(12)
    cached = named(pool, 4)
    (used,) = pool.allocate(1)
    pool.release(cached)
    with pytest.raises(AccountingError, match=r"\[1\] are removed, but they are in use"):
        pool.remove_pages(runs(0, 1))
    assert pool.cached_blocks == 4
    pool.remove_pages(runs(0, 2))
    assert (pool.total_blocks, pool.backed_blocks, pool.cached_blocks) == (4, 4, 0)
    assert pool.allocate(3) == ids(5, 6, 7)
    assert used == 4
    pool.add_pages(runs(0))
    assert pool.free_blocks == 4
    pool.check()


def test_pages_in_the_wrong_state_are_refused() -> None:
    pool = make_pool(8)
    pool.close_pages(runs(1))
    for call, match in (
        (pool.close_pages, "closed, but not open"),
        (pool.reopen_pages, "reopened, but not closed"),
        (pool.remove_pages, "removed, but not here"),
    ):
        with pytest.raises(AccountingError, match=match):
            call(runs(0, 1, 7))
    pool.check()
    assert (pool.open_blocks, pool.backed_blocks) == (4, 8)


def test_adopted_blocks_of_a_page_that_is_not_complete_are_not_allocated_around() -> None:
    pool = BlockPool(SLOT_BLOCKS, 4)
    tables = [ids(0, 1, 64), ids(0, 65)]
    pool.adopt(tables, runs(0))
    assert (pool.total_blocks, pool.open_blocks, pool.free_blocks) == (6, 4, 2)
    assert pool.pages_in_use() == (0, 16)
    pool.check(tables)
    pool.release(ids(65))
    assert pool.total_blocks == 5
    pool.add_pages(runs(16))
    assert (pool.total_blocks, pool.free_blocks) == (8, 5)
    assert pool.allocate(5, near=BlockId(64)) == ids(65, 66, 67, 2, 3)
    pool.check([ids(0, 1, 64), ids(0), ids(65, 66, 67, 2, 3)])


def test_touched_blocks_lost_their_last_reference_since_the_watch() -> None:
    pool = make_pool(8)
    a, b = named(pool, 3), pool.allocate(1)
    assert pool.touched() == ()
    pool.release(b)
    pool.watch()
    assert pool.touched() == ()
    pool.share(a[:1])
    pool.release(a)
    assert pool.touched() == a[1:]
    pool.share(a[1:2])  # it was nobody's for a while
    assert pool.touched() == a[1:]
    pool.watch()
    assert pool.touched() == ()


# ---------------------------------------------------------------- homes


def test_a_home_allocates_and_finds_only_in_its_pages() -> None:
    pool = make_pool(16)
    cached = named(pool, 5)
    pool.release(cached)
    pool.divide([runs(0), runs(1, 9)])  # page 9 is not open: left alone
    assert pool.closed_pages() == runs(2, 3)
    assert (pool.available_in(0), pool.available_in(1), pool.open_blocks) == (4, 4, 8)
    hashes = [bytes([number]) for number in range(5)]
    assert (pool.lookup(hashes, 0), pool.lookup(hashes[4:], 0)) == (cached[:4], ())
    assert pool.lookup(hashes[4:], 1) == cached[4:]
    with pytest.raises(AccountingError, match="5 blocks asked for, 4 available"):
        pool.allocate(5, home=1)
    assert pool.allocate(4, near=BlockId(0), home=1) == ids(5, 6, 7, 4)
    assert pool.allocate(1, home=0) == ids(3)
    assert pool.used_pages_per_home() == (1, 1)
    pool.check([ids(5, 6, 7, 4, 3)])
    pool.add_pages(runs(9))
    assert pool.closed_pages() == runs(2, 3, 9)
    pool.reopen_pages(runs(2, 9))
    assert (pool.open_blocks, pool.free_blocks, pool.cached_blocks) == (16, 8, 3)
    assert pool.closed_pages() == runs(3)
    pool.check()


def test_cached_blocks_keep_their_age_through_homes() -> None:
    pool = make_pool(8)
    blocks = named(pool, 8)
    for block in (6, 1, 5, 2, 0, 7, 3, 4):
        pool.release(ids(block))
    pool.divide([runs(0), runs(1)])
    assert pool.allocate(2, home=1) == ids(6, 5)
    pool.reopen_pages(())
    assert pool.allocate(6) == ids(1, 2, 0, 7, 3, 4)
    assert len(blocks) == 8


def test_homes_that_cannot_be_are_refused() -> None:
    pool = make_pool(16)
    with pytest.raises(AccountingError, match="page 1 is in two homes"):
        pool.divide([runs(0, 1), runs(1)])
    with pytest.raises(AccountingError, match="at least one home"):
        pool.divide([])
    assert pool.open_blocks == 16
    pool.divide([runs(0)])
    with pytest.raises(AccountingError, match="divided once"):
        pool.divide([runs(0)])


def test_a_name_goes_with_its_content() -> None:
    pool = make_pool(8)
    (source,) = named(pool, 1)
    target, other = pool.allocate(2)
    pool.rename(source, target)
    assert pool.lookup([bytes([0])]) == (target,)
    pool.rename(other, source)  # no name: nothing goes
    for wrong in ((source, target), (source, BlockId(7))):
        with pytest.raises(AccountingError):
            pool.rename(*wrong)
    pool.check([(source, target, other)])


# ---------------------------------------------------------------- against a naive model


@dataclass
class NaivePool:
    """The same rules over plain sets, searched from end to end each time."""

    page: int
    backed: dict[int, set[int]] = field(default_factory=dict)
    home: dict[int, int] = field(default_factory=dict)
    """Of each open page."""
    references: dict[int, int] = field(default_factory=dict)
    names: dict[int, bytes] = field(default_factory=dict)
    lru: list[int] = field(default_factory=list)

    def usable(self) -> set[int]:
        return {b for page in self.home for b in self.backed[page]}

    def home_of(self, block: int) -> int | None:
        return self.home.get(block // self.page)

    def free(self, home: int | None = None) -> set[int]:
        free = self.usable() - self.references.keys() - set(self.lru)
        return {b for b in free if home in (None, self.home_of(b))}

    def cached(self, home: int) -> list[int]:
        return [block for block in self.lru if self.home_of(block) == home]

    def take(self, near: int | None, home: int) -> int:
        free = self.free(home)
        if not free:
            block = self.cached(home)[0]
            self.forget(block)
        else:
            own = {b for b in free if near is not None and b // self.page == near // self.page}
            block = min(own) if own else min(free, key=self.preference)
        self.references[block] = 1
        return block

    def forget(self, block: int) -> None:
        self.lru.remove(block)
        del self.names[block]

    def preference(self, block: int) -> tuple[bool, int, int]:
        mates = self.backed[block // self.page]
        free = len(mates & self.free())
        empty = free == len(mates)
        return (empty, 0 if empty else free, block)

    def release(self, block: int) -> None:
        self.references[block] -= 1
        if self.references[block]:
            return
        del self.references[block]
        if self.home_of(block) is None:
            self.names.pop(block, None)
        elif block in self.names:
            self.lru.append(block)

    def close(self, page: int) -> None:
        del self.home[page]
        for block in [block for block in self.lru if block // self.page == page]:
            self.forget(block)


class PoolMachine(RuleBasedStateMachine):
    """Random tables of blocks, shared, named, released and evicted, in pages that come and go."""

    @initialize(page=st.sampled_from([1, 2, 4, 8]), sizes=st.lists(st.integers(0, 14), max_size=3))
    def build(self, page: int, sizes: list[int]) -> None:
        self.pool = make_pool(*sizes, blocks_per_page=page)
        self.naive = NaivePool(page)
        self.divided = 0
        for slot, size in enumerate(sizes):
            for index in range(size):
                block = slot * SLOT_BLOCKS + index
                self.naive.backed.setdefault(block // page, set()).add(block)
        self.naive.home = dict.fromkeys(self.naive.backed, 0)
        self.tables: list[tuple[BlockId, ...]] = []

    @rule(page=st.integers(0, 20))
    def add(self, page: int) -> None:
        naive = self.naive
        if page in naive.backed:
            with pytest.raises(AccountingError, match="here already"):
                self.pool.add_pages(runs(page))
            return
        self.pool.add_pages(runs(page))
        naive.backed[page] = set(range(page * naive.page, (page + 1) * naive.page))
        if not self.divided:
            naive.home[page] = 0

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        naive = self.naive
        used = {block // naive.page for block in naive.references}
        pages = [page for page in naive.backed if page not in used]
        if pages:
            page = data.draw(st.sampled_from(pages))
            self.pool.remove_pages(runs(page))
            if page in naive.home:
                naive.close(page)
            del naive.backed[page]

    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        if self.naive.home:
            page = data.draw(st.sampled_from(sorted(self.naive.home)))
            self.pool.close_pages(runs(page))
            self.naive.close(page)

    @rule(data=st.data())
    def reopen(self, data: st.DataObject) -> None:
        closed = sorted(self.naive.backed.keys() - self.naive.home.keys())
        pages = data.draw(st.lists(st.sampled_from(closed), unique=True)) if closed else []
        self.pool.reopen_pages(runs(*pages))
        self.divided = 0
        self.naive.home = dict.fromkeys([*self.naive.home, *pages], 0)

    @precondition(lambda self: not self.divided)
    @rule(data=st.data(), num_homes=st.integers(1, 3))
    def divide(self, data: st.DataObject, num_homes: int) -> None:
        home = {p: data.draw(st.integers(0, num_homes)) for p in self.naive.home}
        homes = [[page for page in home if home[page] == h] for h in range(num_homes)]
        self.pool.divide([runs(*pages) for pages in homes])
        self.divided = num_homes
        for page, number in home.items():
            if number == num_homes:
                self.naive.close(page)
            else:
                self.naive.home[page] = number

    @rule(blocks=st.lists(st.integers(0, 40), max_size=4, unique=True))
    def adopt(self, blocks: list[int]) -> None:
        """Whatever lies there. Cached blocks keep their name."""
        table = ids(*blocks)
        self.pool.adopt([table])
        for block in table:
            self.naive.references[block] = self.naive.references.get(block, 0) + 1
            if block in self.naive.lru:
                self.naive.lru.remove(block)
        self.tables.append(table)

    @rule(count=st.integers(0, 6), data=st.data())
    def allocate(self, count: int, data: st.DataObject) -> None:
        home = data.draw(st.integers(0, max(0, self.divided - 1)))
        count = min(count, self.pool.available_in(home))
        tables = [None, *(table for table in self.tables if table)]
        table = data.draw(st.sampled_from(tables))
        near = table[-1] if table else None
        expected: list[int] = []
        for _ in range(count):
            expected.append(self.naive.take(expected[-1] if expected else near, home))
        blocks = self.pool.allocate(count, near, home)
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

    @rule(names=st.lists(st.integers(0, 12), max_size=4, unique=True), data=st.data())
    def share(self, names: list[int], data: st.DataObject) -> None:
        home = data.draw(st.integers(0, max(0, self.divided - 1)))
        blocks = self.pool.lookup([bytes([name]) for name in names], home)
        by_name = {
            digest: block
            for block, digest in self.naive.names.items()
            if self.naive.home_of(block) == home
        }
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
        outside = [block for block in naive.references if naive.home_of(block) is None]
        assert pool.open_blocks == len(naive.usable())
        assert pool.total_blocks == len(naive.usable()) + len(outside)
        assert pool.backed_blocks == sum(map(len, naive.backed.values()))
        for home in range(max(1, self.divided)):
            assert pool.available_in(home) == len(naive.free(home)) + len(naive.cached(home))


PoolMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestPool = PoolMachine.TestCase
