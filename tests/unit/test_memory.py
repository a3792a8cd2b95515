"""The memory book: ledger and mapper change together, whole or not at all, under any sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kunserve.core.errors import AccountingError
from kunserve.core.ids import SlotId
from kunserve.core.layout import Part, PartKind
from kunserve.core.memory import KvExtent, PageRun, PartRuns, pages_of, runs_of
from kunserve.policy.memory import MemoryBook, PageMapper
from kunserve.policy.pages import (
    ESCROW,
    FREE,
    IncomingPages,
    KvPages,
    MemoryPlan,
    OwnerKind,
    PageGeometry,
    PageLedger,
    PartPages,
    QuarantinedPages,
    SlotMap,
    TransferId,
)
from kunserve.policy.remapping import ShownRun, choose_pages

NUM_LAYERS = 4
EMBEDDING = Part(PartKind.EMBEDDING)
LAYERS = tuple(Part(PartKind.LAYER, index) for index in range(NUM_LAYERS))
PARTS = (EMBEDDING, *LAYERS)
GEOMETRY = PageGeometry(page_bytes=4096, block_bytes=2048)
PART_PAGES = {EMBEDDING: 5, **dict.fromkeys(LAYERS, 3)}
KV_PAGES, SPARE_PAGES = 4, 2
NUM_PAGES = 5 + NUM_LAYERS * (3 + KV_PAGES) + SPARE_PAGES
SLOTS = SlotMap.for_domain(GEOMETRY, num_slots=3, num_layers=NUM_LAYERS, member_pages=NUM_PAGES)
OWN_SLOT, OTHER_SLOT = SlotId(1), SlotId(2)
HOME = SLOTS.slot_range(OWN_SLOT).start
OTHER = SLOTS.slot_range(OTHER_SLOT).start
PLAN = MemoryPlan(GEOMETRY, NUM_LAYERS, NUM_PAGES, PART_PAGES, PARTS, KV_PAGES)
TRANSFER = TransferId(1)

POISON = "poison"
HOLE = -1


class RefusedError(Exception):
    """The mapper was told to refuse this call."""


class TableMapper:
    """A mapper on tables, page by page, that knows what each physical page holds."""

    def __init__(self) -> None:
        self.parts: dict[Part, list[int]] = {}
        self.kv: dict[int, dict[int, int]] = {}
        self.contents = dict.fromkeys(range(NUM_PAGES), "never written")
        self.calls: list[str] = []
        self.refused_call = 0
        """Counted from 1; 0: none. It refuses once, so that what was done can be undone."""

    def map_part(self, part: Part, runs: Sequence[PageRun], slab_offset: int = 0) -> None:
        pages, slab = pages_of(runs), list(self.parts.get(part, []))
        stop = slab_offset + len(pages)
        slab += [HOLE] * (stop - len(slab))
        assert set(slab[slab_offset:stop]) == {HOLE}, "the slab is not a hole"
        self._call(f"map {part}")
        slab[slab_offset:stop] = pages
        self.parts[part] = slab

    def unmap_part(self, part: Part, num_pages: int, slab_offset: int = 0) -> None:
        assert HOLE not in self._slab_pages(part, slab_offset, num_pages), "a hole is unmapped"
        self._call(f"unmap {part}")
        self._leave_slab(part, slab_offset, num_pages)

    def map_kv(self, layer: int, range_page: int, runs: Sequence[PageRun]) -> None:
        pages = dict(enumerate(pages_of(runs), start=range_page))
        shown = self.kv.setdefault(layer, {})
        assert not shown.keys() & pages.keys(), "the range is not a hole"
        self._call(f"map kv {layer}")
        shown.update(pages)

    def unmap_kv(self, layer: int, range_page: int, count: int) -> None:
        gone = range(range_page, range_page + count)
        assert count > 0
        assert self.kv[layer].keys() >= set(gone), "a hole is unmapped"
        self._call(f"unmap kv {layer}")
        for page in gone:
            del self.kv[layer][page]

    def move_part_to_kv(
        self, part: Part, slab_offset: int, layer: int, range_page: int, count: int
    ) -> None:
        pages = self._slab_pages(part, slab_offset, count)
        assert HOLE not in pages, "a hole is moved"
        self._call(f"move {count} of {part} to kv {layer}")
        self._leave_slab(part, slab_offset, count)
        self._show(layer, range_page, pages)

    def move_kv(
        self, layer: int, range_page: int, to_layer: int, to_range_page: int, count: int
    ) -> None:
        pages = [self.kv[layer][page] for page in range(range_page, range_page + count)]
        self._call(f"move {count} of kv {layer} to kv {to_layer}")
        self._show(to_layer, to_range_page, pages)
        for page in range(range_page, range_page + count):
            del self.kv[layer][page]

    def _slab_pages(self, part: Part, slab_offset: int, count: int) -> list[int]:
        pages = self.parts[part][slab_offset : slab_offset + count]
        assert len(pages) == count > 0
        return pages

    def _leave_slab(self, part: Part, slab_offset: int, count: int) -> None:
        slab = list(self.parts.pop(part))
        slab[slab_offset : slab_offset + count] = [HOLE] * count
        if set(slab) != {HOLE}:
            self.parts[part] = slab

    def _show(self, layer: int, range_page: int, physical: Sequence[int]) -> None:
        pages = dict(enumerate(physical, start=range_page))
        shown = self.kv.setdefault(layer, {})
        assert not shown.keys() & pages.keys(), "the range is not a hole"
        shown.update(pages)

    def poison(self, run: PageRun) -> None:
        for page in run:
            self.contents[page] = POISON

    def mapped_part(self, part: Part) -> tuple[PageRun, ...]:
        extents = merged(part.index, dict(enumerate(self.parts.get(part, []))))
        return tuple(PageRun(extent.physical_page, extent.count) for extent in extents)

    def mapped_kv(self, layer: int) -> tuple[KvExtent, ...]:
        return merged(layer, self.kv.get(layer, {}))

    def state(self) -> tuple[object, ...]:
        """What is shown where."""
        return dict(self.parts), {layer: dict(shown) for layer, shown in self.kv.items() if shown}

    def _call(self, name: str) -> None:
        self.calls.append(name)
        self.refused_call -= 1
        if self.refused_call == 0:
            raise RefusedError(name)


def merged(layer: int, shown: dict[int, int]) -> tuple[KvExtent, ...]:
    """Extents of a table of pages, built another way than in the ledger."""
    extents: list[KvExtent] = []
    for page in sorted(shown):
        last = extents[-1] if extents else None
        if last and (page - last.range_page, shown[page] - last.physical_page) == (
            last.count,
            last.count,
        ):
            extents[-1] = KvExtent(layer, last.range_page, last.physical_page, last.count + 1)
        else:
            extents.append(KvExtent(layer, page, shown[page], 1))
    return tuple(extents)


@pytest.fixture
def mapper() -> TableMapper:
    return TableMapper()


@pytest.fixture
def book(mapper: TableMapper) -> MemoryBook:
    return MemoryBook(PLAN, SLOTS, OWN_SLOT, mapper, poison=True)


def state(book: MemoryBook, mapper: TableMapper) -> tuple[object, ...]:
    """All that must be as before when a method refuses."""
    owners = {owner: book.ledger.runs(owner) for owner in sorted(book.ledger.owners(), key=repr)}
    return owners, book.kv_extents(), mapper.state()


# ---------------------------------------------------------------- by example


def test_a_book_starts_as_a_whole_instance(book: MemoryBook, mapper: TableMapper) -> None:
    book.check()
    as_mapper: PageMapper = mapper
    assert as_mapper.mapped_part(EMBEDDING) == (PageRun(0, 5),)
    assert book.held_parts == PARTS
    assert book.held_layers == (0, 1, 2, 3)
    assert book.part_runs()[:2] == (
        PartRuns(EMBEDDING, (PageRun(0, 5),)),
        PartRuns(LAYERS[0], (PageRun(5, 3),)),
    )
    assert book.home_runs == book.complete_pages() == (PageRun(HOME, KV_PAGES),)
    assert book.kv_extents()[0] == KvExtent(0, HOME, 17, KV_PAGES)
    assert book.physical_page(0, HOME + 2) == 19
    assert (book.free_pages, book.escrow_pages) == (SPARE_PAGES, 0)
    assert mapper.calls == [f"map {part}" for part in PARTS] + [f"map kv {i}" for i in range(4)]


def test_plan_and_slots_must_fit(mapper: TableMapper) -> None:
    other = SlotMap(PageGeometry(4096, 1024), 3, 64)
    with pytest.raises(AccountingError, match="page sizes differ"):
        MemoryBook(PLAN, other, OWN_SLOT, mapper)
    with pytest.raises(AccountingError, match="no slot 3"):
        MemoryBook(PLAN, SLOTS, SlotId(3), mapper)


def test_a_slot_backs_no_more_than_its_pages() -> None:
    slots = SlotMap(GEOMETRY, 3, 2 * GEOMETRY.blocks_per_page)
    book = MemoryBook(PLAN, slots, OWN_SLOT, TableMapper())
    assert book.complete_pages() == (PageRun(2, 2),)
    assert book.free_pages == SPARE_PAGES + NUM_LAYERS * (KV_PAGES - 2)
    book.check()


def test_a_drop_maps_in_runs(book: MemoryBook, mapper: TableMapper) -> None:
    mapper.calls.clear()
    dropped = sum(book.release_part(part) for part in LAYERS[2:])
    assert dropped == 6
    for layer in (2, 3):
        book.unmap_kv(layer, book.home_runs)
    assert book.free_pages == 6 + 2 * KV_PAGES + SPARE_PAGES == 16
    # 6 + 2 pages for each layer left, in two runs of its range. The longest come first, so that
    # they lie in one physical run each.
    runs = [PageRun(HOME + KV_PAGES, 2), PageRun(OTHER, 6)]
    book.map_kv_many({0: runs, 1: runs})
    assert mapper.calls[-4:] == ["map kv 0", "map kv 1", "map kv 0", "map kv 1"]
    assert len(mapper.calls) == 2 + 2 + 4
    assert len([extent for extent in book.kv_extents() if extent.range_page >= OTHER]) == 2
    assert book.free_pages == 0
    assert book.complete_pages() == (PageRun(HOME, KV_PAGES + 2), PageRun(OTHER, 6))
    assert book.complete_pages(PageRun(OTHER + 1, 2)) == (PageRun(OTHER + 1, 2),)
    book.check()


def test_a_remap_moves_what_it_can(book: MemoryBook, mapper: TableMapper) -> None:
    mapper.calls.clear()
    mapper.contents = dict.fromkeys(range(NUM_PAGES), "written")
    give = dict.fromkeys((2, 3), book.home_runs)
    runs = [PageRun(HOME + KV_PAGES, 2), PageRun(OTHER, 6)]
    assert book.remap(LAYERS[2:], give, {0: runs, 1: runs}) == 6 + 2 * KV_PAGES == 14
    assert book.free_pages == 0
    assert not set(LAYERS[2:]) & mapper.parts.keys()
    assert book.complete_pages() == (PageRun(HOME, KV_PAGES + 2), PageRun(OTHER, 6))
    shown = {mapper.kv[0][page] for page in range(OTHER, OTHER + 6)}
    assert shown == set(PageRun(11, 6)), "the longest wanted run gets the slabs"
    assert mapper.calls == [
        "move 3 of layer 2 to kv 0",
        "move 3 of layer 3 to kv 0",
        "move 4 of kv 2 to kv 1",
        "move 2 of kv 3 to kv 1",
        "move 2 of kv 3 to kv 0",
        "map kv 1",
    ]
    for layer in (0, 1):
        for page in (*range(HOME + KV_PAGES, HOME + KV_PAGES + 2), *range(OTHER, OTHER + 6)):
            assert mapper.contents[mapper.kv[layer][page]] == POISON
        assert {mapper.contents[mapper.kv[layer][page]] for page in range(HOME, HOME + 4)} == {
            "written"
        }
    book.check()


def test_a_remap_frees_what_nobody_wants(book: MemoryBook, mapper: TableMapper) -> None:
    mapper.calls.clear()
    runs = (PageRun(HOME, 1), PageRun(HOME + 2, 2))
    assert book.remap([LAYERS[1], EMBEDDING], {1: runs}, {0: [PageRun(OTHER, 4)]}) == 4
    assert mapper.calls == [
        "unmap embedding",
        "unmap layer 1",
        "unmap kv 1",
        "unmap kv 1",
        "move 4 of embedding to kv 0",
    ]
    assert book.held_parts == (LAYERS[0], *LAYERS[2:])
    assert book.free_pages == SPARE_PAGES + 5 + 3 + 3 - 4
    assert book.remap((), {}, {}) == 0
    assert book.remap((), {0: [PageRun(OTHER, 4)]}, {0: [PageRun(OTHER + 5, 4)]}) == 4
    assert mapper.calls[5:] == ["move 4 of kv 0 to kv 0"]
    book.check()


def test_a_remap_leaves_escrow_its_pages(book: MemoryBook, mapper: TableMapper) -> None:
    book.set_escrow(2)
    book.map_kv(0, [PageRun(OTHER, 2)], arriving=True)
    before = state(book, mapper)
    with pytest.raises(AccountingError, match="of them for escrow"):
        book.remap([LAYERS[3]], {}, {1: [PageRun(OTHER, 2)]})
    assert state(book, mapper) == before
    assert book.remap([LAYERS[3]], {}, {1: [PageRun(OTHER, 1)]}) == 1
    assert (book.free_pages, book.escrow_pages) == (0, 2)
    book.check()


@pytest.mark.parametrize(
    ("drop", "give", "want"),
    [
        ([Part(PartKind.HEAD)], {}, {}),
        ([LAYERS[0]], {}, {1: [PageRun(OTHER, 3 + SPARE_PAGES + 1)]}),
        ([LAYERS[0]], {1: [PageRun(OTHER, 1)]}, {}),
        ([LAYERS[0]], {1: [PageRun(HOME, 1), PageRun(HOME, 1)]}, {}),
        ([LAYERS[0]], {1: [PageRun(HOME, 1)]}, {1: [PageRun(HOME, 1)]}),
        ([LAYERS[0]], {}, {1: [PageRun(HOME + 3, 2)]}),
        ([LAYERS[0]], {}, {NUM_LAYERS: [PageRun(OTHER, 1)]}),
        ([LAYERS[0]], {}, {1: [PageRun(SLOTS.range_pages, 1)]}),
    ],
)
def test_a_remap_without_sense_changes_nothing(
    book: MemoryBook,
    mapper: TableMapper,
    drop: list[Part],
    give: dict[int, list[PageRun]],
    want: dict[int, list[PageRun]],
) -> None:
    before, calls = state(book, mapper), len(mapper.calls)
    with pytest.raises(AccountingError):
        book.remap(drop, give, want)
    assert state(book, mapper) == before
    assert len(mapper.calls) == calls


def test_chosen_pages_are_placed_or_nothing_is() -> None:
    ledger = PageLedger(20)
    ledger.place(0, [PageRun(3, 2)])  # pages 0 and 1
    ledger.place_at([KvExtent(1, 7, 10, 3), KvExtent(0, 9, 5, 2), KvExtent(1, 10, 13, 1)])
    assert ledger.extents(1) == (KvExtent(1, 7, 10, 4),)
    assert ledger.extents(0) == (KvExtent(0, 3, 0, 2), KvExtent(0, 9, 5, 2))
    assert ledger.runs(FREE) == (PageRun(2, 3), PageRun(7, 3), PageRun(14, 6))
    ledger.check()
    free = ledger.runs(FREE)
    for refused in (
        [],
        [KvExtent(0, 0, 14, 1), KvExtent(0, 1, 1, 1)],  # page 1 is owned
        [KvExtent(0, 0, 4, 2)],  # so is page 5
        [KvExtent(0, 0, 19, 2)],  # there is no page 20
        [KvExtent(0, 0, 14, 2), KvExtent(1, 0, 15, 1)],  # page 15 twice
        [KvExtent(0, 0, 14, 1), KvExtent(0, 0, 15, 1)],  # range page 0 twice
        [KvExtent(1, 0, 14, 1), KvExtent(0, 3, 15, 1)],  # range page 3 is there
        [KvExtent(1, 0, 14, 0)],
    ):
        with pytest.raises(AccountingError):
            ledger.place_at(refused)
        assert ledger.runs(FREE) == free
        ledger.check()


def test_pieces_are_long() -> None:
    """As long as whole runs fit, no wanted run is cut; all that is there can be used."""
    slabs = [ShownRun(LAYERS[at], 0, PageRun(100 * at, 72)) for at in range(3)]
    free = [ShownRun(None, 0, PageRun(400, 10)), ShownRun(None, 0, PageRun(500, 20))]
    wanted = [(0, PageRun(0, 20)), (1, PageRun(0, 72)), (2, PageRun(0, 80)), (3, PageRun(9, 50))]
    choice = choose_pages(wanted, (slabs, free))
    assert [(source.run.count, to.layer) for source, to in choice.moves] == [
        (72, 2),
        (8, 2),
        (72, 1),
        (50, 3),
        (14, 0),
        (6, 0),
    ]
    assert choice.moved_pages == 3 * 72
    assert choice.left == ()
    assert choose_pages([(0, PageRun(5, 15))], (slabs, free)).left[0].run.count == 57
    with pytest.raises(AccountingError, match="1 pages are wanted"):
        choose_pages([(0, PageRun(0, 247))], (slabs, free))


def test_complete_pages_are_backed_in_every_held_layer(book: MemoryBook) -> None:
    book.unmap_kv(0, [PageRun(HOME + 1, 1)])
    book.map_kv(0, [PageRun(OTHER, 1)])
    book.unmap_kv(3, [PageRun(HOME + 3, 1)])
    assert book.kv_runs(0) == (PageRun(HOME, 1), PageRun(HOME + 2, 2), PageRun(OTHER, 1))
    assert book.complete_pages() == (PageRun(HOME, 1), PageRun(HOME + 2, 1))
    book.release_part(LAYERS[0])  # a layer that is not held counts no more, though it has KV
    assert book.complete_pages() == (PageRun(HOME, 3),)
    for part in LAYERS[1:]:
        book.release_part(part)
    assert book.complete_pages() == ()
    book.check()


def test_drop_and_restore_return_to_the_same_counts(book: MemoryBook, mapper: TableMapper) -> None:
    before = book.counts()
    for cycle in range(3):
        for part in LAYERS[:2]:
            book.release_part(part)
        for layer in (0, 1):
            book.unmap_kv(layer, book.kv_runs(layer))
        for layer in (2, 3):
            book.map_kv(layer, [PageRun(OTHER + 3 * cycle, 7)])
        book.check()
        for layer in (2, 3):
            book.unmap_kv(layer, [PageRun(OTHER + 3 * cycle, 7)])
        for part in LAYERS[:2]:
            pages = pages_of(book.begin_incoming(part, TRANSFER))
            assert mapper.parts[part] == pages, "who brings it in writes to its slab"
            for page in pages:
                mapper.contents[page] = f"arrived {part}"
            book.map_kv(part.index, book.home_runs)  # gathered ahead of its layer
            book.check()
            book.finish_incoming(part)
            assert [mapper.contents[page] for page in mapper.parts[part]] == [f"arrived {part}"] * 3
        assert book.complete_pages() == book.home_runs
        assert book.counts() == before
        book.check()


def test_a_part_is_held_or_incoming_or_neither(book: MemoryBook) -> None:
    part = LAYERS[0]
    for absent in (book.abort_incoming, book.finish_incoming, book.quarantine_incoming):
        with pytest.raises(AccountingError, match="not incoming"):
            absent(part)
    with pytest.raises(AccountingError, match="held or incoming already"):
        book.begin_incoming(part, TRANSFER)
    assert book.release_part(part) == 3
    with pytest.raises(AccountingError, match="not held"):
        book.release_part(part)
    book.begin_incoming(part, TRANSFER)
    assert book.incoming_parts == (part,)
    with pytest.raises(AccountingError, match="held or incoming already"):
        book.begin_incoming(part, TransferId(2))
    with pytest.raises(AccountingError, match="held or incoming already"):
        book.hold_part(part)
    book.abort_incoming(part)
    book.hold_part(part)
    with pytest.raises(AccountingError, match="the model has no head"):
        book.hold_part(Part(PartKind.HEAD))
    book.check()


def test_quarantined_pages_belong_to_their_transfer(book: MemoryBook, mapper: TableMapper) -> None:
    book.release_part(LAYERS[0])
    incoming = pages_of(book.begin_incoming(LAYERS[0], TRANSFER))
    leaving = [book.physical_page(1, HOME + 1), *mapper.parts[LAYERS[2]]]
    for page in (*incoming, *leaving):
        mapper.contents[page] = "in use by a peer"
    book.quarantine_incoming(LAYERS[0])
    book.quarantine_kv(1, [PageRun(HOME + 1, 1)], TRANSFER)
    assert book.quarantine_part(LAYERS[2], TransferId(2)) == 3
    assert book.counts()[OwnerKind.QUARANTINED] == 7
    assert {mapper.contents[page] for page in (*incoming, *leaving)} == {"in use by a peer"}
    book.check()
    assert book.end_quarantine(TransferId(2)) == 3
    book.begin_incoming(LAYERS[0], TransferId(3))  # another try beside the quarantined pages
    assert book.end_quarantine(TRANSFER) == 4
    assert {mapper.contents[page] for page in (*incoming, *leaving)} == {POISON}
    with pytest.raises(AccountingError):
        book.end_quarantine(TRANSFER)
    book.check()


# ---------------------------------------------------------------- escrow


def test_only_arrivals_draw_on_escrow_and_what_leaves_refills_it(book: MemoryBook) -> None:
    book.set_escrow(2)
    assert (book.free_pages, book.escrow_pages) == (0, 2)
    with pytest.raises(AccountingError):
        book.map_kv(0, [PageRun(OTHER, 1)])
    book.map_kv(0, [PageRun(OTHER, 2)], arriving=True)
    assert (book.free_pages, book.escrow_pages) == (0, 0)
    with pytest.raises(AccountingError):
        book.map_kv(0, [PageRun(OTHER + 2, 1)], arriving=True)
    book.check()
    book.unmap_kv(3, [PageRun(HOME, 3)])
    assert (book.free_pages, book.escrow_pages) == (1, 2)
    book.map_kv(1, [PageRun(OTHER, 2)], arriving=True)  # a free page before one of escrow
    assert (book.free_pages, book.escrow_pages) == (0, 1)
    book.release_part(LAYERS[3])
    assert (book.free_pages, book.escrow_pages) == (2, 2)
    book.set_escrow(0)
    assert (book.free_pages, book.escrow_pages) == (4, 0)
    book.check()


def test_escrow_follows_what_is_asked_for(book: MemoryBook, mapper: TableMapper) -> None:
    book.set_escrow(2)
    book.set_escrow(1)
    assert (book.free_pages, book.escrow_pages) == (1, 1)
    before = state(book, mapper)
    for pages in (3, -1):
        with pytest.raises(AccountingError, match="of escrow wanted"):
            book.set_escrow(pages)
        assert state(book, mapper) == before
    book.map_kv(0, [PageRun(OTHER, 2)], arriving=True)
    with pytest.raises(AccountingError, match="of escrow wanted"):
        book.set_escrow(1)
    book.set_escrow(0)
    book.unmap_kv(0, [PageRun(OTHER, 2)])
    assert (book.free_pages, book.escrow_pages) == (2, 0)
    book.check()


def test_a_refused_arrival_returns_to_free_and_escrow(
    book: MemoryBook, mapper: TableMapper
) -> None:
    book.set_escrow(1)
    before = state(book, mapper)
    for refused_call in (1, 2):
        mapper.refused_call = refused_call
        with pytest.raises(RefusedError):
            book.map_kv_many({0: [PageRun(OTHER, 1)], 1: [PageRun(OTHER, 1)]}, arriving=True)
        assert state(book, mapper) == before
        book.check()


# ---------------------------------------------------------------- failures


FAR = SLOTS.range_pages


@pytest.mark.parametrize(
    "wanted",
    [
        {0: [PageRun(OTHER, SPARE_PAGES + 1)]},
        {0: [PageRun(OTHER, 1)], 1: [PageRun(OTHER, SPARE_PAGES)]},
        {0: [PageRun(OTHER, 1)], 1: [PageRun(HOME + 1, 1)]},
        {0: [PageRun(OTHER, 1), PageRun(OTHER, 1)]},
        {0: [PageRun(OTHER, 0)]},
        {0: [PageRun(-1, 1)]},
        {0: [PageRun(FAR - 1, 2)]},
        {NUM_LAYERS: [PageRun(OTHER, 1)]},
        {-1: [PageRun(OTHER, 1)]},
    ],
)
def test_kv_that_cannot_be_mapped_changes_nothing(
    book: MemoryBook, mapper: TableMapper, wanted: dict[int, list[PageRun]]
) -> None:
    before, calls = state(book, mapper), len(mapper.calls)
    with pytest.raises(AccountingError):
        book.map_kv_many(wanted)
    with pytest.raises(AccountingError):
        book.unmap_kv_many({2: [PageRun(HOME, 1)]} | wanted)
    assert state(book, mapper) == before
    assert len(mapper.calls) == calls
    book.check()


OPERATIONS: dict[str, Callable[[MemoryBook], object]] = {
    "hold": lambda book: book.hold_part(LAYERS[3]),
    "release": lambda book: book.release_part(EMBEDDING),
    "quarantine part": lambda book: book.quarantine_part(EMBEDDING, TRANSFER),
    "begin": lambda book: book.begin_incoming(LAYERS[3], TransferId(2)),
    "map": lambda book: book.map_kv_many(
        {layer: [PageRun(OTHER, 1), PageRun(OTHER + 4, 1)] for layer in range(2)}
    ),
    "unmap": lambda book: book.unmap_kv_many(
        {layer: [PageRun(HOME, 1), PageRun(HOME + 2, 1)] for layer in range(3)}
    ),
    "unmap middle": lambda book: book.unmap_kv(0, [PageRun(HOME + 1, 2)]),
    "quarantine kv": lambda book: book.quarantine_kv(
        1, [PageRun(HOME, 1), PageRun(HOME + 2, 1)], TRANSFER
    ),
    "remap": lambda book: book.remap(
        [EMBEDDING, LAYERS[1]],
        {2: [PageRun(HOME, 4)], 3: [PageRun(HOME + 1, 1), PageRun(HOME + 3, 1)]},
        {0: [PageRun(OTHER, 4), PageRun(OTHER + 5, 8)], 3: [PageRun(OTHER, 3)]},
    ),
    "remap little": lambda book: book.remap(
        [EMBEDDING, LAYERS[1]], {2: [PageRun(HOME + 1, 2)]}, {0: [PageRun(OTHER, 2)]}
    ),
    "release all": lambda book: book.release_all_kv(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_when_the_mapper_refuses_nothing_is_changed(name: str) -> None:
    refused_call = 0
    refused = True
    while refused:
        mapper = TableMapper()
        book = MemoryBook(PLAN, SLOTS, OWN_SLOT, mapper)
        for part in LAYERS[2:]:
            book.release_part(part)
        book.begin_incoming(LAYERS[2], TRANSFER)
        book.set_escrow(1)
        before, calls = state(book, mapper), len(mapper.calls)
        refused_call += 1
        mapper.refused_call = refused_call
        try:
            OPERATIONS[name](book)
            refused = False
        except RefusedError:
            assert state(book, mapper) == before
        book.check()
    assert refused_call == len(mapper.calls) - calls + 1 > 1
    assert state(book, mapper) != before


def test_check_sees_what_book_and_mapper_do_not_share(
    book: MemoryBook, mapper: TableMapper
) -> None:
    def assert_fault(
        fault: str, break_it: Callable[[], object], mend: Callable[[], object]
    ) -> None:
        book.check()
        break_it()
        with pytest.raises(AccountingError, match=fault):
            book.check()
        mend()
        book.check()

    ledger, kv = book.ledger, KvPages(0)
    assert kv in ledger.owners()
    assert_fault(
        "KV of layer 0: the mapper shows",
        lambda: ledger.place(0, [PageRun(OTHER, 1)]),
        lambda: ledger.remove(0, [PageRun(OTHER, 1)]),
    )
    assert_fault(
        "layer 1: the mapper shows",
        lambda: mapper.parts[LAYERS[1]].reverse(),
        lambda: mapper.parts[LAYERS[1]].reverse(),
    )
    assert_fault("escrow of 1", lambda: ledger.take(ESCROW, 1), lambda: ledger.give(ESCROW))
    incoming = IncomingPages(LAYERS[0], TRANSFER)
    assert_fault(
        "held or incoming twice", lambda: ledger.take(incoming, 2), lambda: ledger.give(incoming)
    )
    book.release_part(LAYERS[0])
    assert_fault("only a piece", lambda: ledger.take(incoming, 2), lambda: ledger.give(incoming))
    book.set_escrow(1)
    assert_fault("escrow of 0", lambda: ledger.give(ESCROW), lambda: ledger.take(ESCROW, 1))


# ---------------------------------------------------------------- by property


RANGE_RUNS = st.lists(
    st.builds(
        PageRun,
        st.sampled_from([HOME, OTHER]).flatmap(lambda at: st.integers(at, at + 8)),
        st.integers(1, 4),
    ),
    max_size=3,
).map(lambda runs: runs_of(pages_of(runs)))
SOME_PARTS = st.sampled_from(PARTS)
SOME_LAYERS = st.integers(0, NUM_LAYERS - 1)
SOME_TRANSFERS = st.sampled_from([TransferId(1), TransferId(2)])


class BookMachine(RuleBasedStateMachine):
    """Any sequence of calls, some of which the mapper refuses. What the book refuses changes
    nothing, and whoever gets a page finds it poisoned, unless it came with its contents."""

    @initialize()
    def open(self) -> None:
        self.mapper = TableMapper()
        self.book = MemoryBook(PLAN, SLOTS, OWN_SLOT, self.mapper, poison=True)
        self._write_all()

    @rule(part=SOME_PARTS, refused_call=st.integers(0, 1))
    def hold(self, part: Part, refused_call: int) -> None:
        if self._try(lambda: self.book.hold_part(part), refused_call):
            self._assert_poisoned(self.book.ledger.runs(PartPages(part)))

    @rule(part=SOME_PARTS, refused_call=st.integers(0, 1))
    def release(self, part: Part, refused_call: int) -> None:
        runs = self.book.ledger.runs(PartPages(part))
        if self._try(lambda: self.book.release_part(part), refused_call):
            self._assert_poisoned(runs)

    @rule(part=SOME_PARTS, transfer=SOME_TRANSFERS)
    def quarantine_part(self, part: Part, transfer: TransferId) -> None:
        runs = self.book.ledger.runs(PartPages(part))
        if self._try(lambda: self.book.quarantine_part(part, transfer)):
            self._assert_written(runs)

    @precondition(lambda self: len(self.book.held_parts) < len(PARTS))
    @rule(data=st.data(), transfer=SOME_TRANSFERS)
    def begin(self, data: st.DataObject, transfer: TransferId) -> None:
        part = data.draw(st.sampled_from(sorted(set(PARTS) - set(self.book.held_parts), key=str)))
        if self._try(lambda: self.book.begin_incoming(part, transfer)):
            self._assert_poisoned(self.book.ledger.runs(IncomingPages(part, transfer)))

    @precondition(lambda self: self.book.incoming_parts)
    @rule(
        data=st.data(),
        end=st.sampled_from(["finish", "finish", "abort", "quarantine"]),
        refused_call=st.integers(0, 1),
    )
    def end_incoming(self, data: st.DataObject, end: str, refused_call: int) -> None:
        self._write_all()
        part = data.draw(st.sampled_from(self.book.incoming_parts))
        if end == "abort":
            self._try(lambda: self.book.abort_incoming(part))
        elif end == "quarantine":
            self._try(lambda: self.book.quarantine_incoming(part))
        elif self._try(lambda: self.book.finish_incoming(part), refused_call):
            self._assert_written(self.book.ledger.runs(PartPages(part)))

    @rule(transfer=SOME_TRANSFERS)
    def end_quarantine(self, transfer: TransferId) -> None:
        runs = self.book.ledger.runs(QuarantinedPages(transfer))
        if self._try(lambda: self.book.end_quarantine(transfer)):
            self._assert_poisoned(runs)

    @rule(
        layers=st.sets(SOME_LAYERS, min_size=1),
        range_runs=RANGE_RUNS,
        arriving=st.booleans(),
        refused_call=st.integers(0, 4),
    )
    def map_kv(
        self, layers: set[int], range_runs: list[PageRun], arriving: bool, refused_call: int
    ) -> None:
        wanted = dict.fromkeys(layers, range_runs)
        if self._try(lambda: self.book.map_kv_many(wanted, arriving=arriving), refused_call):
            for layer in layers:
                for page in pages_of(range_runs):
                    physical = self.book.physical_page(layer, page)
                    self._assert_poisoned([PageRun(physical, 1)])

    @rule(data=st.data(), refused_call=st.integers(0, 3))
    def unmap_kv(self, data: st.DataObject, refused_call: int) -> None:
        given = {layer: self._some_pages(data, layer) for layer in data.draw(st.sets(SOME_LAYERS))}
        physical = [
            PageRun(self.book.physical_page(layer, page), 1)
            for layer, range_runs in given.items()
            for page in pages_of(range_runs)
        ]
        if self._try(lambda: self.book.unmap_kv_many(given), refused_call):
            self._assert_poisoned(physical)

    @rule(
        data=st.data(),
        layers=st.sets(SOME_LAYERS),
        range_runs=RANGE_RUNS,
        refused_call=st.integers(0, 6),
    )
    def remap(
        self, data: st.DataObject, layers: set[int], range_runs: list[PageRun], refused_call: int
    ) -> None:
        held = self.book.held_parts
        drop = data.draw(st.sets(st.sampled_from(held))) if held else set()
        given = {layer: self._some_pages(data, layer) for layer in data.draw(st.sets(SOME_LAYERS))}
        freed = {page for part in drop for page in pages_of(self.book.ledger.runs(PartPages(part)))}
        freed |= {
            self.book.physical_page(layer, page)
            for layer, runs in given.items()
            for page in pages_of(runs)
        }
        places = [(layer, page) for layer in layers for page in pages_of(range_runs)]
        moved: list[int] = []
        if self._try(
            lambda: moved.append(self.book.remap(drop, given, dict.fromkeys(layers, range_runs))),
            refused_call,
        ):
            physical = {self.book.physical_page(*place) for place in places}
            assert moved == [min(len(places), len(freed))] == [len(physical & freed)]
            self._assert_poisoned(runs_of(physical | freed))

    @rule(layer=SOME_LAYERS, range_runs=RANGE_RUNS)
    def unmap_pages_that_may_be_missing(self, layer: int, range_runs: list[PageRun]) -> None:
        self._try(lambda: self.book.unmap_kv(layer, range_runs))

    @rule(data=st.data(), layer=SOME_LAYERS, transfer=SOME_TRANSFERS)
    def quarantine_kv(self, data: st.DataObject, layer: int, transfer: TransferId) -> None:
        range_runs = self._some_pages(data, layer)
        physical = [
            PageRun(self.book.physical_page(layer, page), 1) for page in pages_of(range_runs)
        ]
        if self._try(lambda: self.book.quarantine_kv(layer, range_runs, transfer)):
            self._assert_written(physical)

    @rule(pages=st.integers(-1, 4))
    def set_escrow(self, pages: int) -> None:
        if self._try(lambda: self.book.set_escrow(pages)):
            assert self.book.escrow_pages == pages

    @rule()
    def become_whole_again(self) -> None:
        """From anywhere, once all transfers are done: the counts of the beginning."""
        book = self.book
        book.set_escrow(0)
        book.release_all_kv()
        for part in book.incoming_parts:
            book.abort_incoming(part)
        for owner in book.ledger.owners():
            if isinstance(owner, QuarantinedPages):
                book.end_quarantine(owner.transfer)
        for part in PARTS:
            if not book.holds(part):
                book.hold_part(part)
        book.map_kv_many(dict.fromkeys(range(NUM_LAYERS), book.home_runs))
        assert book.complete_pages() == book.home_runs
        assert book.free_pages == SPARE_PAGES

    @invariant()
    def laws_hold(self) -> None:
        self.book.check()
        free = pages_of(self.book.ledger.runs(FREE))
        assert not set(free) & set(self._mapped()), "a free page is mapped"
        self._write_all()

    def _try(self, operation: Callable[[], object], refused_call: int = 0) -> bool:
        """Whether it succeeded; if not, nothing may have changed."""
        before = state(self.book, self.mapper)
        self.mapper.refused_call = refused_call
        try:
            operation()
        except (AccountingError, RefusedError):
            assert state(self.book, self.mapper) == before
            return False
        finally:
            self.mapper.refused_call = 0
        return True

    def _some_pages(self, data: st.DataObject, layer: int) -> list[PageRun]:
        pages = pages_of(self.book.kv_runs(layer))
        return list(runs_of(data.draw(st.sets(st.sampled_from(pages))) if pages else ()))

    def _mapped(self) -> list[int]:
        kv = [page for shown in self.mapper.kv.values() for page in shown.values()]
        return kv + [page for pages in self.mapper.parts.values() for page in pages]

    def _write_all(self) -> None:
        """Somebody writes everywhere, even where nobody should."""
        self.mapper.contents = dict.fromkeys(range(NUM_PAGES), "written")

    def _assert_poisoned(self, runs: Sequence[PageRun]) -> None:
        assert {self.mapper.contents[page] for page in pages_of(runs)} <= {POISON}

    def _assert_written(self, runs: Sequence[PageRun]) -> None:
        assert {self.mapper.contents[page] for page in pages_of(runs)} <= {"written"}


BookMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestBookProperties = BookMachine.TestCase


@given(
    left=st.sets(st.integers(HOME, HOME + 9)),
    right=st.sets(st.integers(HOME, HOME + 9)),
)
@settings(deadline=None)
def test_complete_pages_are_the_common_ones(left: set[int], right: set[int]) -> None:
    book = MemoryBook(PLAN, SLOTS, OWN_SLOT, TableMapper())
    book.release_all_kv()
    for part in (EMBEDDING, *LAYERS[2:]):
        book.release_part(part)
    book.map_kv_many({0: runs_of(left), 1: runs_of(right)})
    assert book.complete_pages() == runs_of(left & right)
    book.check()
