"""One suite for every memory arena, and for the instance's memory on top of it."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kunserve.core.errors import AccountingError
from kunserve.core.ids import BlockId, SlotId
from kunserve.core.layout import Part, PartKind
from kunserve.core.memory import PageRun, pages_of
from kunserve.core.model import ModelSpec
from kunserve.device import arena as arenas
from kunserve.device.arena import (
    Arena,
    ArenaError,
    ArenaOutOfMemoryError,
    ArenaUnavailableError,
    HostArena,
    MappedRun,
    MappingLimitError,
    VirtualRange,
    WorkInFlightError,
    create_arena,
    host,
)
from kunserve.policy.pages import (
    KvPages,
    PageGeometry,
    PartPages,
    SlotMap,
    TransferId,
    plan_memory,
)
from kunserve.worker.memory import InstanceMemory

BACKENDS = ("host", "cuda")
PAGE_BYTES = {"host": 12 * 1024, "cuda": 2 << 20}
NUM_PAGES = 24
TERABYTE = 1 << 40


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    try:
        create_arena(name, page_bytes=PAGE_BYTES[name], num_pages=1).close()
    except ArenaUnavailableError as error:
        pytest.skip(str(error))
    return name


@pytest.fixture
def arena(backend: str) -> Iterator[Arena]:
    with create_arena(backend, page_bytes=PAGE_BYTES[backend], num_pages=NUM_PAGES) as opened:
        label_pages(opened)
        yield opened


def label_pages(arena: Arena) -> None:
    """Page p holds p + 1 in every byte, so that no page looks like a hole."""
    for page in range(arena.num_pages):
        arena.view(arena.page_address(page), arena.page_bytes)[:] = page + 1


def labels(
    arena: Arena, source: VirtualRange, offset: int = 0, count: int | None = None
) -> list[int]:
    """The label in each page of a range, first and last byte agreeing; 0 for a hole."""
    count = source.num_pages - offset if count is None else count
    seen = arena.view(source.page_address(offset), count * arena.page_bytes)
    by_page = seen.reshape(count, arena.page_bytes)
    assert np.array_equal(by_page[:, 0], by_page[:, -1])
    return [int(label) for label in by_page[:, 0]]


def reserve(arena: Arena, pages: int) -> VirtualRange:
    return arena.reserve(pages * arena.page_bytes)


@dataclass
class Work:
    """A completion token that is done when the test says so."""

    finished: bool = False

    def done(self) -> bool:
        return self.finished

    def wait(self) -> None:
        raise AssertionError("the arena must not wait")


# ---------------------------------------------------------------- mapping


def test_content_follows_the_physical_page(arena: Arena) -> None:
    source, target = reserve(arena, 8), reserve(arena, 8)
    arena.map(source, 1, [PageRun(5, 2), PageRun(2, 1), PageRun(9, 1)])
    assert labels(arena, source) == [0, 6, 7, 3, 10, 0, 0, 0]
    arena.view(source.page_address(2), 1)[0] = 99
    arena.remap(source, 2, target, 5, 2)
    assert labels(arena, source) == [0, 6, 0, 0, 10, 0, 0, 0]
    assert arena.view(target.page_address(5), 2).tolist() == [99, 7]
    assert labels(arena, target, 6, 1) == [3]
    assert arena.view(arena.page_address(6), 1)[0] == 99
    assert arena.mapped_runs(target) == (MappedRun(5, 6, 1), MappedRun(6, 2, 1))


def test_remap_inside_one_range_and_back(arena: Arena) -> None:
    ring = reserve(arena, 10)
    arena.map(ring, 0, PageRun(0, 4))
    arena.remap(ring, 1, ring, 6, 3)
    assert labels(arena, ring) == [1, 0, 0, 0, 0, 0, 2, 3, 4, 0]
    arena.remap(ring, 6, ring, 1, 3)
    assert arena.mapped_runs(ring) == (MappedRun(0, 0, 4),)
    assert labels(arena, ring) == [1, 2, 3, 4, 0, 0, 0, 0, 0, 0]


def test_remap_of_several_runs(arena: Arena) -> None:
    source, target = reserve(arena, 8), reserve(arena, 12)
    arena.map(source, 1, [PageRun(5, 2), PageRun(2, 1), PageRun(9, 3)])
    arena.map(target, 2, PageRun(4, 1))
    arena.remap(source, 2, target, 3, 4)  # cuts the first run and the last one
    assert labels(arena, source) == [0, 6, 0, 0, 0, 0, 12, 0]
    assert labels(arena, target) == [0, 0, 5, 7, 3, 10, 11, 0, 0, 0, 0, 0]
    assert arena.view(source.page_address(2), 4 * arena.page_bytes).max() == 0
    arena.view(target.page_address(4), 1)[0] = 77
    assert arena.view(arena.page_address(2), 1)[0] == 77
    arena.view(source.page_address(3), 1)[0] = 55  # a hole belongs to nobody
    assert arena.view(arena.page_address(2), 1)[0] == 77


def test_unmapped_bytes_stay_in_their_page(arena: Arena) -> None:
    slab = reserve(arena, 3)
    arena.map(slab, 0, PageRun(4, 3))
    arena.unmap(slab, 1, 1)
    assert labels(arena, slab) == [5, 0, 7]
    assert arena.view(arena.page_address(5), 1)[0] == 6
    arena.map(slab, 1, PageRun(5, 1))
    assert labels(arena, slab) == [5, 6, 7]
    assert arena.mapped_runs(slab) == (MappedRun(0, 4, 3),)


def test_identity_shows_every_page_for_ever(arena: Arena) -> None:
    assert arena.identity.num_pages == arena.num_pages
    assert labels(arena, arena.identity) == list(range(1, NUM_PAGES + 1))
    assert arena.page_address(3, 17) == arena.identity.address + 3 * arena.page_bytes + 17
    with pytest.raises(ArenaError, match="never changes"):
        arena.unmap(arena.identity, 0, 1)
    with pytest.raises(ArenaError, match="no byte"):
        arena.page_address(NUM_PAGES)
    with pytest.raises(ArenaError, match="no byte"):
        arena.page_address(0, arena.page_bytes)


def test_holes_read_as_zeros(arena: Arena) -> None:
    kv = reserve(arena, 64)
    arena.map(kv, 10, PageRun(0, 2))
    assert labels(arena, kv) == [0] * 10 + [1, 2] + [0] * 52
    assert arena.view(kv.address, 10 * arena.page_bytes).max() == 0


def test_last_slot_of_a_terabyte_range(arena: Arena) -> None:
    slot_pages = TERABYTE // arena.page_bytes
    kv = arena.reserve(16 * slot_pages * arena.page_bytes)
    last = 15 * slot_pages
    arena.map(kv, last, PageRun(2, 1))
    arena.map(kv, kv.num_pages - 1, PageRun(7, 1))
    assert labels(arena, kv, last, 2) == [3, 0]
    assert labels(arena, kv, kv.num_pages - 2, 2) == [0, 8]
    assert kv.page_address(last) - kv.address > 14 * TERABYTE
    arena.unmap(kv, last, 1)
    assert arena.mapped_runs(kv) == (MappedRun(kv.num_pages - 1, 7, 1),)


def test_poisoned_pages_are_nan_wherever_they_are_mapped(arena: Arena) -> None:
    slab = reserve(arena, 4)
    arena.map(slab, 0, PageRun(6, 4))
    arena.poison(PageRun(7, 2))
    floats = arena.view(slab.address, slab.nbytes).view(np.float32).reshape(4, -1)
    assert np.isnan(floats).all(axis=1).tolist() == [False, True, True, False]
    assert labels(arena, slab)[::3] == [7, 10]


def test_ranges_are_whole_pages_and_do_not_touch(arena: Arena) -> None:
    ranges = [arena.reserve(1), arena.reserve(arena.page_bytes + 1), arena.identity]
    assert [r.num_pages for r in ranges] == [1, 2, NUM_PAGES]
    spans = sorted((r.address, r.address + r.nbytes) for r in ranges)
    assert all(low[1] < high[0] for low, high in pairwise(spans))


# ---------------------------------------------------------------- refusals


def test_unmap_waits_for_nobody(arena: Arena) -> None:
    slab, other = reserve(arena, 2), reserve(arena, 2)
    arena.map(slab, 0, PageRun(0, 2))
    work = Work()
    with pytest.raises(WorkInFlightError):
        arena.unmap(slab, 0, 2, after=work)
    with pytest.raises(WorkInFlightError):
        arena.remap(slab, 0, other, 0, 2, after=work)
    assert labels(arena, slab) == [1, 2]
    work.finished = True
    arena.unmap(slab, 0, 2, after=work)
    assert labels(arena, slab) == [0, 0]


def test_what_cannot_be_mapped_changes_nothing(arena: Arena) -> None:
    slab, other = reserve(arena, 4), reserve(arena, 4)
    arena.map(slab, 1, PageRun(3, 2))
    before = arena.mapped_runs(slab), arena.mapping_count
    foreign = VirtualRange(slab.address + 1, 4, arena.page_bytes)
    for refused in (
        lambda: arena.map(slab, 2, PageRun(8, 1)),  # mapped already
        lambda: arena.map(slab, 0, [PageRun(8, 1), PageRun(9, 1)]),  # the second one is
        lambda: arena.map(slab, 3, PageRun(8, 2)),  # beyond the range
        lambda: arena.map(slab, -1, PageRun(8, 1)),
        lambda: arena.map(slab, 3, PageRun(NUM_PAGES, 1)),  # no such page
        lambda: arena.map(slab, 3, PageRun(-1, 1)),
        lambda: arena.map(slab, 3, PageRun(2, 0)),
        lambda: arena.map(foreign, 0, PageRun(8, 1)),
        lambda: arena.unmap(slab, 0, 2),  # page 0 is a hole
        lambda: arena.unmap(slab, 1, 0),
        lambda: arena.unmap(slab, 2, 9),
        lambda: arena.remap(slab, 0, other, 0, 2),
        lambda: arena.remap(slab, 1, slab, 2, 2),  # onto itself
        lambda: arena.view(slab.address + slab.nbytes - 1, 2),
        lambda: arena.view(slab.address - 1, 1),
        lambda: arena.poison(PageRun(NUM_PAGES - 1, 2)),
        lambda: arena.reserve(0),
    ):
        with pytest.raises(ArenaError):
            refused()
    assert (arena.mapped_runs(slab), arena.mapping_count) == before
    assert labels(arena, slab) == [0, 4, 5, 0]


def test_closed_arena_refuses(backend: str) -> None:
    arena = create_arena(backend, page_bytes=PAGE_BYTES[backend], num_pages=2)
    slab = reserve(arena, 2)
    arena.close()
    arena.close()
    for refused in (
        lambda: arena.map(slab, 0, PageRun(0, 1)),
        lambda: arena.reserve(1),
        lambda: arena.view(slab.address, 1),
        lambda: arena.poison(PageRun(0, 1)),
        lambda: arena.mapped_runs(slab),
    ):
        with pytest.raises(ArenaError, match="closed"):
            refused()


def test_unknown_backend_is_named() -> None:
    with pytest.raises(ArenaUnavailableError, match=r"'tpu' is not available.*host"):
        create_arena("tpu", page_bytes=4096, num_pages=1)


def test_sizes_without_sense_are_refused(backend: str) -> None:
    for page_bytes, num_pages in ((100, 1), (0, 1), (PAGE_BYTES[backend], 0)):
        with pytest.raises(ArenaError, match="at least one page"):
            create_arena(backend, page_bytes=page_bytes, num_pages=num_pages)


def test_more_memory_than_there_is(backend: str) -> None:
    open_fds = os.listdir("/proc/self/fd")
    with pytest.raises(ArenaOutOfMemoryError, match="available"):
        create_arena(backend, page_bytes=PAGE_BYTES[backend], num_pages=1 << 34)
    assert len(os.listdir("/proc/self/fd")) == len(open_fds)


def test_more_addresses_than_there_are(arena: Arena) -> None:
    count = arena.mapping_count
    with pytest.raises(ArenaOutOfMemoryError, match="address space"):
        arena.reserve(1 << 60)
    assert arena.mapping_count == count


# ---------------------------------------------------------------- mappings are counted


def kernel_mappings(ranges: list[VirtualRange]) -> int:
    """VMAs in /proc/self/maps that touch the ranges or the guards behind them."""
    vmas = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = line.split(" ", 1)[0].split("-")
        vmas.append((int(low, 16), int(high, 16)))
    spans = [(r.address, r.address + r.nbytes + 1) for r in ranges]
    return sum(any(low < stop and start < high for start, stop in spans) for low, high in vmas)


class MappingMachine(RuleBasedStateMachine):
    """A host arena beside a plain list of what each page of two ranges shows."""

    PAGES = 12

    def __init__(self) -> None:
        super().__init__()
        self.arena = create_arena("host", page_bytes=4096, num_pages=NUM_PAGES)
        label_pages(self.arena)
        self.ranges = [reserve(self.arena, self.PAGES), reserve(self.arena, self.PAGES)]
        self.shown: list[list[int]] = [[0] * self.PAGES, [0] * self.PAGES]

    def teardown(self) -> None:
        self.arena.close()

    @rule(
        which=st.integers(0, 1),
        offset=st.integers(0, PAGES - 1),
        starts=st.lists(st.integers(0, NUM_PAGES - 3), min_size=1, max_size=3),
        count=st.integers(1, 3),
    )
    def map(self, which: int, offset: int, starts: list[int], count: int) -> None:
        runs = [PageRun(start, count) for start in starts]
        stop = offset + count * len(runs)
        if stop > self.PAGES or any(self.shown[which][offset:stop]):
            with pytest.raises(ArenaError):
                self.arena.map(self.ranges[which], offset, runs)
            return
        self.arena.map(self.ranges[which], offset, runs)
        self.shown[which][offset:stop] = [
            page + 1 for run in runs for page in range(run.start, run.stop)
        ]

    @rule(which=st.integers(0, 1), offset=st.integers(0, PAGES - 1), count=st.integers(1, 4))
    def unmap(self, which: int, offset: int, count: int) -> None:
        stop = offset + count
        if stop > self.PAGES or not all(self.shown[which][offset:stop]):
            with pytest.raises(ArenaError):
                self.arena.unmap(self.ranges[which], offset, count)
            return
        self.arena.unmap(self.ranges[which], offset, count)
        self.shown[which][offset:stop] = [0] * count

    @rule(
        old=st.integers(0, 1),
        old_offset=st.integers(0, PAGES - 1),
        new=st.integers(0, 1),
        new_offset=st.integers(0, PAGES - 1),
        count=st.integers(1, 4),
    )
    def remap(self, old: int, old_offset: int, new: int, new_offset: int, count: int) -> None:
        moved = self.shown[old][old_offset : old_offset + count]
        there = self.shown[new][new_offset : new_offset + count]
        args = (self.ranges[old], old_offset, self.ranges[new], new_offset, count)
        if len(moved) < count or len(there) < count or not all(moved) or any(there):
            with pytest.raises(ArenaError):
                self.arena.remap(*args)
            return
        self.arena.remap(*args)
        self.shown[old][old_offset : old_offset + count] = [0] * count
        self.shown[new][new_offset : new_offset + count] = moved

    @invariant()
    def content_is_right(self) -> None:
        assert [labels(self.arena, r) for r in self.ranges] == self.shown

    @invariant()
    def count_is_the_kernels(self) -> None:
        mappings = kernel_mappings([*self.ranges, self.arena.identity])
        assert self.arena.mapping_count == mappings


MappingMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestMappingCount = MappingMachine.TestCase


class FaultingMappingMachine(MappingMachine):
    """The same on a kernel that moves no page tables."""

    def __init__(self) -> None:
        super().__init__()
        assert isinstance(self.arena, HostArena)
        self.arena.moves_page_tables = False


FaultingMappingMachine.TestCase.settings = MappingMachine.TestCase.settings
TestMappingCountWithFaults = FaultingMappingMachine.TestCase


def host_arena(mapping_limit: int | None = None) -> Arena:
    return create_arena("host", page_bytes=4096, num_pages=NUM_PAGES, mapping_limit=mapping_limit)


def test_refusal_at_the_mapping_limit() -> None:
    with host_arena(mapping_limit=8) as arena:
        assert arena.mapping_limit == 8
        kv = reserve(arena, 8)  # identity + guard, hole + guard
        assert arena.mapping_count == 4
        arena.map(kv, 0, PageRun(0, 3))  # run + hole
        arena.map(kv, 4, PageRun(8, 1))  # run + hole
        assert arena.mapping_count == 7
        arena.map(kv, 3, PageRun(11, 1))  # fills the hole between them
        arena.unmap(kv, 3, 1)
        before = arena.mapped_runs(kv)
        with pytest.raises(MappingLimitError, match="2 more"):
            arena.unmap(kv, 1, 1)  # a hole inside a run: two more
        with pytest.raises(MappingLimitError):
            arena.map(kv, 6, PageRun(0, 1))
        with pytest.raises(MappingLimitError):
            arena.reserve(1)
        assert arena.mapped_runs(kv) == before
        assert arena.mapping_count == kernel_mappings([kv, arena.identity]) == 7
        arena.map(kv, 7, PageRun(0, 1))  # at the end: one more
        assert arena.mapping_count == 8


def test_refused_remap_leaves_both_ranges() -> None:
    with host_arena(mapping_limit=9) as arena:
        source, target = reserve(arena, 4), reserve(arena, 4)
        arena.map(source, 0, PageRun(0, 3))
        with pytest.raises(MappingLimitError):
            arena.remap(source, 1, target, 1, 1)
        assert arena.mapped_runs(source) == (MappedRun(0, 0, 3),)
        assert arena.mapped_runs(target) == ()


@pytest.mark.parametrize("moves", [True, False])
def test_remap_is_undone_as_it_was_done_at_the_limit(moves: bool) -> None:
    """`MemoryBook.remap` maps a moved piece at its source again and unmaps it at the target: no
    state on that way has more mappings than one on the way there."""
    with host_arena() as arena:
        assert isinstance(arena, HostArena)
        arena.moves_page_tables = arena.moves_page_tables and moves
        source, target = reserve(arena, 5), reserve(arena, 5)
        arena.map(source, 0, PageRun(0, 5))
        arena._limit = arena.mapping_count + 4  # a run between holes here, a hole in a run there
        arena.remap(source, 2, target, 2, 1)
        arena.map(source, 2, PageRun(2, 1))
        arena.unmap(target, 2, 1)
        assert arena.mapped_runs(source) == (MappedRun(0, 0, 5),)
        assert arena.mapping_count == kernel_mappings([source, target, arena.identity])


# ---------------------------------------------------------------- page tables


def faults_of_writes(arena: Arena, source: VirtualRange, offset: int, count: int) -> int:
    """Page faults of writing every byte of pages of a range."""
    view = arena.view(source.page_address(offset), count * arena.page_bytes)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    view.fill(3)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


@pytest.mark.parametrize("moves", [True, False])
def test_touched_pages_fault_no_more_after_a_remap(moves: bool) -> None:
    pages = 96
    with create_arena("host", page_bytes=64 * 1024, num_pages=pages) as arena:
        assert isinstance(arena, HostArena)
        if not arena.moves_page_tables:
            pytest.skip("this kernel moves no page tables of shared memory")
        arena.moves_page_tables = moves
        source, target = reserve(arena, pages), reserve(arena, 2 * pages)
        arena.map(source, 0, [PageRun(40, 56), PageRun(0, 40)])
        first = faults_of_writes(arena, source, 0, pages)
        assert first >= 16 * pages / 64  # some kernels map more than one system page by fault
        arena.remap(source, 0, target, 7, pages)
        again = faults_of_writes(arena, target, 7, pages)
        assert again <= 8 if moves else again >= first / 2
        assert labels(arena, arena.identity) == [3] * pages


def test_refused_move_of_page_tables_leaves_both_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    with host_arena() as arena:
        if not arena.moves_page_tables:
            pytest.skip("this kernel moves no page tables of shared memory")
        label_pages(arena)
        source, target = reserve(arena, 6), reserve(arena, 6)
        arena.map(source, 0, [PageRun(5, 2), PageRun(9, 1), PageRun(3, 2), PageRun(12, 1)])
        arena.map(target, 0, PageRun(0, 1))
        before = arena.mapped_runs(source), arena.mapped_runs(target), arena.mapping_count
        real, calls = host._move_page_tables, []

        def third_call_fails(*args: int) -> None:
            calls.append(args)
            if len(calls) == 3:
                raise OSError(errno.ENOMEM, "Cannot allocate memory")
            real(*args)

        monkeypatch.setattr(host, "_move_page_tables", third_call_fails)
        with pytest.raises(ArenaOutOfMemoryError):
            arena.remap(source, 1, target, 1, 5)
        monkeypatch.undo()
        after = arena.mapped_runs(source), arena.mapped_runs(target), arena.mapping_count
        assert after == before
        assert labels(arena, source) == [6, 7, 10, 4, 5, 13]
        assert labels(arena, target) == [1, 0, 0, 0, 0, 0]
        assert arena.mapping_count == kernel_mappings([source, target, arena.identity])
        arena.remap(source, 1, target, 1, 5)
        assert labels(arena, target) == [1, 7, 10, 4, 5, 13]


def test_a_kernel_that_moves_no_page_tables_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(source: int, target: int, nbytes: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(host, "_move_page_tables", refuse)
    host._say_it_faults.cache_clear()
    for _ in range(2):
        with host_arena() as arena:
            assert not arena.moves_page_tables
            label_pages(arena)
            source, target = reserve(arena, 4), reserve(arena, 4)
            arena.map(source, 0, [PageRun(5, 2), PageRun(2, 1)])
            arena.remap(source, 1, target, 2, 2)
            assert labels(arena, source) == [6, 0, 0, 0]
            assert labels(arena, target) == [0, 0, 7, 3]
    said = [record.getMessage() for record in caplog.records if "page tables" in record.message]
    assert len(said) == 1
    assert "Invalid argument" in said[0]


def test_no_other_thread_gets_into_the_gap() -> None:
    """Somebody maps and unmaps all the time; were the source or the target ever unmapped, one of
    those mappings would come to lie there, and be lost."""
    stop, faults = threading.Event(), []

    def map_and_unmap() -> None:
        size = 4096
        while not stop.is_set():
            blocks = [mmap.mmap(-1, size) for _ in range(8)]
            for block in blocks:
                block[:] = b"x" * size
            faults.extend(len(b) for b in blocks if b[:] != b"x" * size)
            for block in blocks:
                block.close()

    with host_arena() as arena:
        label_pages(arena)
        source, target = reserve(arena, 12), reserve(arena, 12)
        thread = threading.Thread(target=map_and_unmap)
        thread.start()
        try:
            arena.map(source, 0, [PageRun(5, 4), PageRun(0, 5), PageRun(20, 3)])
            for _ in range(500):
                arena.remap(source, 0, target, 0, 12)
                arena.remap(target, 3, source, 3, 6)
                arena.remap(target, 9, source, 9, 3)
                arena.remap(target, 0, source, 0, 3)
        finally:
            stop.set()
            thread.join()
        assert not faults
        assert labels(arena, source) == [6, 7, 8, 9, 1, 2, 3, 4, 5, 21, 22, 23]
        assert labels(arena, target) == [0] * 12
        assert arena.mapping_count == kernel_mappings([source, target, arena.identity])


def test_default_limit_leaves_room_for_others() -> None:
    allowed = int(Path("/proc/sys/vm/max_map_count").read_text())
    with host_arena() as arena:
        assert allowed // 2 <= arena.mapping_limit < allowed


def test_limit_too_small_for_the_identity_range_leaks_nothing() -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(MappingLimitError):
        host_arena(mapping_limit=1)
    assert len(os.listdir("/proc/self/fd")) == len(before)


# ---------------------------------------------------------------- failures of the system


def test_driver_failure_in_the_middle_restores_the_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    with host_arena() as arena:
        label_pages(arena)
        kv = reserve(arena, 6)
        arena.map(kv, 0, PageRun(0, 1))
        real, calls = host._mmap, []

        def third_call_fails(*args: int) -> int:
            calls.append(args)
            if len(calls) == 3:
                raise OSError(errno.ENOMEM, "Cannot allocate memory")
            return real(*args)

        monkeypatch.setattr(host, "_mmap", third_call_fails)
        with pytest.raises(ArenaOutOfMemoryError):
            arena.map(kv, 1, [PageRun(5, 1), PageRun(9, 1), PageRun(3, 1)])
        monkeypatch.undo()
        assert labels(arena, kv) == [1, 0, 0, 0, 0, 0]
        assert arena.mapped_runs(kv) == (MappedRun(0, 0, 1),)
        assert arena.mapping_count == kernel_mappings([kv, arena.identity])


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.ENOSPC])
def test_memory_gone_while_it_is_taken(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(code, os.strerror(code))

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(ArenaOutOfMemoryError, match="refused"):
        host_arena()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_close_leaves_nothing(backend: str) -> None:
    def state() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), maps.count("kunserve-arena")

    before = state()
    ranges = []
    with create_arena(backend, page_bytes=PAGE_BYTES[backend], num_pages=NUM_PAGES) as arena:
        for _ in range(5):
            ranges.append(arena.reserve(TERABYTE))
            arena.map(ranges[-1], 3, [PageRun(0, 1), PageRun(2, 2)])
        ranges.append(arena.identity)
        if backend == "host":
            assert state() == (before[0] + 1, 5 * 2 + 1)
    assert state() == before
    assert kernel_mappings(ranges) == 0


def test_exported_names() -> None:
    assert set(arenas.__all__) == {
        "Arena",
        "ArenaError",
        "ArenaOutOfMemoryError",
        "ArenaUnavailableError",
        "CompletionToken",
        "HostArena",
        "MappedRun",
        "MappingLimitError",
        "PageSpan",
        "VirtualRange",
        "WorkInFlightError",
        "create_arena",
        "merge_runs",
    }
    with host_arena() as arena:
        assert isinstance(arena, HostArena)


# ---------------------------------------------------------------- the instance's memory

NUM_LAYERS = 3
EMBEDDING = Part(PartKind.EMBEDDING)
LAYERS = tuple(Part(PartKind.LAYER, index) for index in range(NUM_LAYERS))
SPEC = ModelSpec(
    architecture="LlamaForCausalLM",
    num_layers=NUM_LAYERS,
    hidden_size=32,
    intermediate_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=128,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    max_position=256,
    tied_embeddings=True,
)
BLOCK_TOKENS = 16
KV_PAGES = 5
OWN_SLOT, OTHER_SLOT = SlotId(2), SlotId(15)


@pytest.fixture
def memory(backend: str) -> Iterator[InstanceMemory]:
    with open_memory(backend, poison=True) as opened:
        yield opened


def open_memory(backend: str, *, poison: bool, mapping_limit: int | None = None) -> InstanceMemory:
    block_bytes = BLOCK_TOKENS * SPEC.kv_bytes_per_token_layer
    granularity_bytes = 4096 if backend == "host" else PAGE_BYTES[backend]
    geometry = PageGeometry.fit(
        block_bytes, granularity_bytes=granularity_bytes, target_bytes=granularity_bytes
    )
    page_bytes = geometry.page_bytes
    part_bytes = {EMBEDDING: 3 * page_bytes - 1, **dict.fromkeys(LAYERS, page_bytes + 1)}
    plan = plan_memory(
        SPEC,
        part_bytes,
        SPEC.parts,
        geometry,
        kv_cache_memory_bytes=(KV_PAGES * NUM_LAYERS + 1) * page_bytes,
    )
    slots = SlotMap.for_domain(
        geometry, num_slots=16, num_layers=NUM_LAYERS, member_pages=plan.num_pages
    )
    arena = create_arena(
        backend, page_bytes=page_bytes, num_pages=plan.num_pages, mapping_limit=mapping_limit
    )
    return InstanceMemory(plan, slots, OWN_SLOT, arena, poison=poison)


def test_instance_starts_with_its_parts_and_its_own_slot(memory: InstanceMemory) -> None:
    memory.check()
    assert memory.held_layers == (0, 1, 2)
    own = memory.slots.slot_range(OWN_SLOT)
    assert memory.home_runs == (PageRun(own.start, KV_PAGES),)
    assert memory.complete_pages() == memory.complete_pages(own) == memory.home_runs
    assert memory.complete_pages(memory.slots.slot_range(OTHER_SLOT)) == ()
    assert memory.free_pages == memory.plan.free_pages == 1
    bases = [memory.kv_base(layer) for layer in range(NUM_LAYERS)]
    addresses = [*bases, *(memory.part_address(part) for part in SPEC.parts)]
    assert len(set(addresses)) == len(addresses)
    for part in SPEC.parts:
        slab = memory.part_view(part)
        assert len(slab) == memory.plan.part_pages[part] * memory.plan.geometry.page_bytes
        assert np.isnan(slab.view(np.float32)).all()


def test_blocks_lie_where_the_slot_map_says(memory: InstanceMemory) -> None:
    geometry = memory.plan.geometry
    last = memory.slots.block_id(OWN_SLOT, memory.plan.kv_blocks - 1)
    memory.block_view(1, last)[:] = 42
    address = memory.kv_base(1) + memory.slots.offset_bytes(last)
    assert (memory.arena.view(address, geometry.block_bytes) == 42).all()
    place = memory.slots.place(last)
    page = memory.physical_page(1, memory.slots.range_page(OWN_SLOT, place.page))
    offset_bytes = place.block_in_page * geometry.block_bytes
    physical = memory.arena.view(memory.identity_address(page, offset_bytes), geometry.block_bytes)
    assert (physical == 42).all()
    assert memory.identity.num_pages == memory.plan.num_pages
    assert memory.identity.address == memory.identity_address(0)
    with pytest.raises(AccountingError, match="no page"):
        memory.block_view(1, memory.slots.block_id(OTHER_SLOT, 0))
    with pytest.raises(AccountingError, match="no block"):
        memory.block_view(1, BlockId(memory.slots.num_blocks))


def test_dropped_part_becomes_kv_of_another_slot(memory: InstanceMemory) -> None:
    held = memory.part_view(LAYERS[0])
    held[:] = 7
    own = memory.block_view(1, memory.slots.block_id(OWN_SLOT, 0))
    own[:] = 9
    assert memory.release_part(LAYERS[2]) == 2
    memory.check()
    assert memory.held_layers == (0, 1)
    assert not memory.holds(LAYERS[2])
    start = memory.slots.slot_range(OTHER_SLOT).start
    memory.map_kv_many({layer: [PageRun(start, 1)] for layer in (0, 1)})
    memory.check()
    assert memory.complete_pages(memory.slots.slot_range(OTHER_SLOT)) == (PageRun(start, 1),)
    fresh = memory.block_view(0, memory.slots.block_id(OTHER_SLOT, 0))
    assert np.isnan(fresh.view(np.float32)).all()
    assert (held == 7).all()
    assert (own == 9).all()
    with pytest.raises(AccountingError, match="not held"):
        memory.part_view(LAYERS[2])


def test_dropped_parts_and_lost_kv_become_other_kv_at_once(memory: InstanceMemory) -> None:
    for page in range(memory.plan.num_pages):
        address = memory.identity_address(page)
        memory.arena.view(address, memory.plan.geometry.page_bytes)[:] = 7
    start = memory.slots.slot_range(OTHER_SLOT).start
    # 2 pages of the part, 5 of KV and one that is free; 3 + 4 of them move.
    want = {0: [PageRun(start, 3)], 1: [PageRun(start, 1), PageRun(start + 2, 3)]}
    assert memory.remap([LAYERS[2]], {2: memory.home_runs}, want) == 7
    memory.check()
    assert (memory.free_pages, memory.held_layers) == (1, (0, 1))
    assert memory.complete_pages(memory.slots.slot_range(OTHER_SLOT)) == (
        PageRun(start, 1),
        PageRun(start + 2, 1),
    )
    slot_base = OTHER_SLOT * memory.slots.slot_blocks
    per_page = memory.plan.geometry.blocks_per_page
    for layer, runs in want.items():
        for page in pages_of(runs):
            block = BlockId(slot_base + (page - start) * per_page)
            fresh = memory.block_view(layer, block)
            assert np.isnan(fresh.view(np.float32)).all()
            own = memory.block_view(layer, memory.slots.block_id(OWN_SLOT, 0))
            assert (own == 7).all()
    slab = memory.arena.view(memory.part_address(LAYERS[2]), memory.plan.geometry.page_bytes)
    assert not slab.any()
    memory.remap((), want, {})
    memory.hold_part(LAYERS[2])
    memory.map_kv(2, memory.home_runs)
    memory.check()


def test_pages_of_an_exchange_come_and_go_in_any_order(memory: InstanceMemory) -> None:
    per_page, first = memory.plan.geometry.blocks_per_page, memory.home_runs[0].start
    blocks = [BlockId((first + page) * per_page) for page in range(KV_PAGES)]
    for label, block in enumerate(blocks):
        memory.block_view(0, block)[:] = label + 1
    memory.unmap_kv(0, [PageRun(first + 3, 1), PageRun(first + 1, 1)])
    other = memory.slots.slot_range(OTHER_SLOT).start
    memory.map_kv(0, [PageRun(other + 2, 3)])
    memory.check()
    assert memory.kv_runs(0) == (
        PageRun(first, 1),
        PageRun(first + 2, 1),
        PageRun(first + 4, 1),
        PageRun(other + 2, 3),
    )
    assert memory.complete_pages() == memory.kv_runs(0)[:3]
    for label in (0, 2, 4):
        assert (memory.block_view(0, blocks[label]) == label + 1).all()
    for label in (1, 3):
        with pytest.raises(AccountingError, match="no page"):
            memory.block_view(0, blocks[label])
    page_bytes = memory.plan.geometry.page_bytes
    hole = memory.arena.view(memory.kv_base(0) + (first + 1) * page_bytes, page_bytes)
    assert not hole.any()


def test_a_part_arrives_through_the_identity_range(memory: InstanceMemory) -> None:
    address, transfer = memory.part_address(LAYERS[1]), TransferId(3)
    memory.release_part(LAYERS[1])
    # The pages that it left are taken, so that its new ones lie elsewhere and apart.
    memory.map_kv(0, [PageRun(0, 1)])
    memory.map_kv(0, [PageRun(2, 2)])
    memory.unmap_kv(0, [PageRun(0, 1), PageRun(3, 1)])
    pages = pages_of(memory.begin_incoming(LAYERS[1], transfer))
    assert not memory.holds(LAYERS[1])
    page_bytes = memory.plan.geometry.page_bytes
    for label, page in enumerate(pages):
        memory.arena.view(memory.identity_address(page), page_bytes)[:] = label + 1
    memory.check()
    memory.finish_incoming(LAYERS[1])
    memory.check()
    assert memory.part_address(LAYERS[1]) == address
    arrived = memory.part_view(LAYERS[1]).reshape(len(pages), page_bytes)
    assert (arrived == np.arange(1, len(pages) + 1, dtype=np.uint8)[:, None]).all()


def test_dropped_part_comes_back_at_its_address(memory: InstanceMemory) -> None:
    address, before = memory.part_address(LAYERS[1]), memory.counts()
    memory.release_part(LAYERS[1])
    memory.map_kv(0, [PageRun(0, 2)])
    memory.unmap_kv(0, [PageRun(0, 2)])
    memory.hold_part(LAYERS[1])
    memory.check()
    assert memory.part_address(LAYERS[1]) == address
    assert np.isnan(memory.part_view(LAYERS[1]).view(np.float32)).all()
    assert memory.complete_pages() == memory.home_runs
    assert memory.counts() == before


def test_refused_changes_leave_ledger_and_arena_agreeing(memory: InstanceMemory) -> None:
    def state() -> tuple[object, ...]:
        return memory.counts(), memory.kv_extents(), memory.part_runs()

    before, first = state(), memory.home_runs[0].start
    for refused in (
        lambda: memory.unmap_kv(0, [PageRun(first, KV_PAGES + 1)]),
        lambda: memory.unmap_kv(0, [PageRun(0, 1)]),
        lambda: memory.map_kv(0, [PageRun(0, 2)]),  # one page is free
        lambda: memory.map_kv(0, [PageRun(first, 1)]),
        lambda: memory.map_kv(0, [PageRun(0, 0)]),
        lambda: memory.map_kv(0, [PageRun(memory.slots.range_pages, 1)]),
        lambda: memory.map_kv(NUM_LAYERS, [PageRun(0, 1)]),
        lambda: memory.hold_part(LAYERS[0]),
        lambda: memory.finish_incoming(LAYERS[0]),
        lambda: memory.part_address(Part(PartKind.HEAD)),
        lambda: memory.kv_base(-1),
    ):
        with pytest.raises(AccountingError):
            refused()
        memory.check()
        assert state() == before


def test_arena_refusal_gives_the_pages_back() -> None:
    with open_memory("host", poison=False) as unlimited:
        needed = unlimited.arena.mapping_count
    with open_memory("host", poison=False, mapping_limit=needed) as memory:
        with pytest.raises(MappingLimitError):
            memory.map_kv(0, [PageRun(0, 1)])
        memory.check()
        assert memory.free_pages == 1
        middle = PageRun(memory.home_runs[0].start + 1, 1)
        with pytest.raises(MappingLimitError):  # a hole inside a run costs mappings, too
            memory.unmap_kv(0, [middle])
        memory.check()
        assert memory.complete_pages() == memory.home_runs


def test_check_sees_what_ledger_and_arena_do_not_share(memory: InstanceMemory) -> None:
    memory.ledger.place(0, [PageRun(0, 1)])
    with pytest.raises(AccountingError, match="KV of layer 0: the mapper shows"):
        memory.check()
    memory.ledger.remove(0, [PageRun(0, 1)])
    memory.check()
    runs = memory.ledger.give(PartPages(LAYERS[0]))
    with pytest.raises(AccountingError, match="layer 0: the mapper shows"):
        memory.check()
    assert memory.ledger.take(PartPages(LAYERS[0]), 2) == runs
    memory.check()


def test_check_sees_a_hole_in_a_slab(memory: InstanceMemory) -> None:
    slab = VirtualRange(memory.part_address(LAYERS[0]), 2, memory.plan.geometry.page_bytes)
    memory.arena.unmap(slab, 0, 1)
    with pytest.raises(ArenaError, match="hole inside the slab of layer 0"):
        memory.check()


def test_plan_and_arena_must_fit(backend: str) -> None:
    with open_memory(backend, poison=False) as memory:
        plan, slots = memory.plan, memory.slots
    page_bytes = plan.geometry.page_bytes
    for pages, size in ((plan.num_pages + 1, page_bytes), (plan.num_pages, 2 * page_bytes)):
        with (
            create_arena(backend, page_bytes=size, num_pages=pages) as arena,
            pytest.raises(AccountingError, match="arena of"),
        ):
            InstanceMemory(plan, slots, OWN_SLOT, arena)


@given(
    moves=st.lists(
        st.tuples(
            st.sampled_from(["drop", "hold", "map", "unmap"]),
            st.integers(0, NUM_LAYERS - 1),
            st.integers(0, 15),
            st.integers(1, 4),
        ),
        max_size=25,
    )
)
@settings(max_examples=25, deadline=None)
def test_any_moves_keep_ledger_and_arena_together(moves: list[tuple[str, int, int, int]]) -> None:
    with open_memory("host", poison=True) as memory:
        for name, layer, slot, pages in moves:
            before = memory.free_pages, memory.ledger.pages(KvPages(layer))
            try:
                gained = change(memory, name, layer, SlotId(slot), pages)
            except AccountingError:
                gained = 0
            memory.check()
            assert memory.free_pages == before[0] + gained
            in_kv = -gained if name in ("map", "unmap") else 0
            assert memory.ledger.pages(KvPages(layer)) == before[1] + in_kv


def change(memory: InstanceMemory, name: str, layer: int, slot: SlotId, pages: int) -> int:
    """Carry out one move; the number of free pages that it should have added."""
    if name == "drop":
        return memory.release_part(LAYERS[layer])
    if name == "hold":
        memory.hold_part(LAYERS[layer])
        return -memory.plan.part_pages[LAYERS[layer]]
    run = PageRun(memory.slots.slot_range(slot).start + pages % 3, pages)
    if name == "map":
        memory.map_kv(layer, [run])
        return -pages
    memory.unmap_kv(layer, [run])
    return pages
