"""Pages: geometry, the ledger's laws under any sequence of moves, the split at start, block ids."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kunserve.config import parse_size
from kunserve.core.errors import AccountingError, ConfigError, LayoutError
from kunserve.core.ids import BlockId, SlotId
from kunserve.core.layout import Part, PartKind
from kunserve.core.memory import KvExtent, PageRun, pages_of, runs_of
from kunserve.core.model import ModelSpec
from kunserve.policy.pages import (
    ESCROW,
    FREE,
    LEGAL_MOVES,
    IncomingPages,
    KvPages,
    OwnedPage,
    Owner,
    OwnerKind,
    PageGeometry,
    PageLedger,
    PartPages,
    QuarantinedPages,
    SlotMap,
    TransferId,
    plan_memory,
)

EMBEDDING = Part(PartKind.EMBEDDING)
LAYERS = tuple(Part(PartKind.LAYER, index) for index in range(3))
KV = KvPages(0)
INCOMING = IncomingPages(LAYERS[2], TransferId(9))
MIB = 1 << 20


def small_spec(num_layers: int = 3) -> ModelSpec:
    return ModelSpec(
        architecture="LlamaForCausalLM",
        num_layers=num_layers,
        hidden_size=576,
        intermediate_size=1536,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        max_position=8192,
        tied_embeddings=True,
    )


# ---------------------------------------------------------------- geometry


def test_smollm2_page_holds_eight_blocks() -> None:
    block_bytes = 16 * small_spec().kv_bytes_per_token_layer
    geometry = PageGeometry.fit(block_bytes)
    assert block_bytes == 24_576
    assert geometry == PageGeometry(196_608, 24_576)
    assert geometry.blocks_per_page == 8


def test_page_is_one_unit_when_the_target_is_smaller() -> None:
    assert PageGeometry.fit(24_576, granularity_bytes=2 * MIB).page_bytes == 6 * MIB
    assert PageGeometry.fit(24_576, target_bytes=0).page_bytes == 24_576


@given(
    block=st.integers(1, 1 << 22),
    granularity=st.sampled_from([4096, 65536, 2 * MIB]),
    target=st.integers(0, 64 * MIB),
)
def test_page_is_the_largest_legal_one(block: int, granularity: int, target: int) -> None:
    geometry = PageGeometry.fit(block, granularity_bytes=granularity, target_bytes=target)
    page = geometry.page_bytes
    assert page % block == 0
    assert page % granularity == 0
    unit = PageGeometry.fit(block, granularity_bytes=granularity, target_bytes=0).page_bytes
    assert page == unit or page <= target
    assert page + unit > target
    assert geometry.blocks_per_page * block == page


@pytest.mark.parametrize(("nbytes", "pages"), [(0, 0), (1, 1), (196_608, 1), (196_609, 2)])
def test_pages_for_rounds_up(nbytes: int, pages: int) -> None:
    assert PageGeometry(196_608, 24_576).pages_for(nbytes) == pages


def test_page_without_whole_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="whole blocks"):
        PageGeometry(196_608, 20_000)
    with pytest.raises(ConfigError, match="positive"):
        PageGeometry.fit(0)


# ---------------------------------------------------------------- ledger, by example


def test_take_prefers_the_lowest_run_that_is_long_enough() -> None:
    ledger = PageLedger(20)
    ledger.take(PartPages(LAYERS[0]), 3)  # 0..3
    ledger.take(ESCROW, 2)  # 3..5
    ledger.take(PartPages(LAYERS[1]), 6)  # 5..11
    ledger.take(INCOMING, 1)  # 11..12
    ledger.give(PartPages(LAYERS[0]))
    ledger.give(PartPages(LAYERS[1]))
    assert ledger.runs(FREE) == (PageRun(0, 3), PageRun(5, 6), PageRun(12, 8))
    assert ledger.take(ESCROW, 4) == (PageRun(5, 4),)
    # None holds all 9: the longest first, so that they are few.
    assert ledger.take(ESCROW, 9) == (PageRun(0, 1), PageRun(12, 8))
    assert ledger.runs(ESCROW) == (PageRun(3, 6), PageRun(0, 1), PageRun(12, 8))
    assert ledger.runs(FREE) == (PageRun(1, 2), PageRun(9, 2))
    ledger.check()


def test_index_of_a_page_is_its_place_among_its_owners_pages() -> None:
    ledger = PageLedger(10)
    ledger.take(ESCROW, 2)
    ledger.take(INCOMING, 1)
    ledger.take(ESCROW, 3)
    assert [ledger.page_at(ESCROW, index) for index in range(5)] == [0, 1, 3, 4, 5]
    assert ledger.owner_of(4) == OwnedPage(ESCROW, 3)
    assert ledger.owner_of(2) == OwnedPage(INCOMING, 0)
    assert ledger.owner_of(9) == OwnedPage(FREE, 3)
    for missing in (-1, 5):
        with pytest.raises(AccountingError, match="no page"):
            ledger.page_at(ESCROW, missing)
    for missing in (-1, 10):
        with pytest.raises(AccountingError, match="no page"):
            ledger.owner_of(missing)


def test_pages_leave_from_the_tail() -> None:
    ledger = PageLedger(10)
    ledger.take(ESCROW, 2)
    ledger.take(INCOMING, 1)
    ledger.take(ESCROW, 2)
    assert ledger.give(ESCROW, 3) == (PageRun(1, 1), PageRun(3, 2))
    assert ledger.runs(ESCROW) == (PageRun(0, 1),)
    assert ledger.runs(FREE) == (PageRun(1, 1), PageRun(3, 7))


def test_kv_pages_come_and_go_in_any_order() -> None:
    ledger = PageLedger(10)
    assert ledger.place(0, [PageRun(4, 3)]) == (KvExtent(0, 4, 0, 3),)
    assert ledger.place(0, [PageRun(9, 1)]) == (KvExtent(0, 9, 3, 1),)
    assert ledger.remove(0, [PageRun(5, 1)]) == (KvExtent(0, 5, 1, 1),)
    assert ledger.extents(0) == (KvExtent(0, 4, 0, 1), KvExtent(0, 6, 2, 1), KvExtent(0, 9, 3, 1))
    assert ledger.extents(0, PageRun(5, 4)) == (KvExtent(0, 6, 2, 1),)
    assert ledger.runs(KV) == (PageRun(0, 1), PageRun(2, 2))
    # The same page comes back, and the three extents of 4..7 are one again.
    assert ledger.place(0, [PageRun(5, 1)]) == (KvExtent(0, 5, 1, 1),)
    assert ledger.extents(0) == (KvExtent(0, 4, 0, 3), KvExtent(0, 9, 3, 1))
    assert ledger.owner_of(2) == OwnedPage(KV, 6)
    assert ledger.page_at(KV, 6) == 2
    for missing in (3, 7):
        with pytest.raises(AccountingError, match="no page at range page"):
            ledger.page_at(KV, missing)
    ledger.check()


def test_one_free_run_backs_scattered_range_pages_and_the_other_way_round() -> None:
    ledger = PageLedger(8)
    scattered = [PageRun(6, 2), PageRun(1, 1), PageRun(7 + 1, 1)]
    assert ledger.place(0, scattered) == (KvExtent(0, 1, 0, 1), KvExtent(0, 6, 1, 3))
    ledger.place(1, [PageRun(0, 4)])
    ledger.remove(0, [PageRun(7, 1)])
    ledger.remove(1, [PageRun(0, 1), PageRun(3, 1)])
    assert ledger.runs(FREE) == (PageRun(2, 1), PageRun(4, 1), PageRun(7, 1))
    assert ledger.place(1, [PageRun(20, 3)]) == (
        KvExtent(1, 20, 2, 1),
        KvExtent(1, 21, 4, 1),
        KvExtent(1, 22, 7, 1),
    )
    ledger.check()


def test_arrivals_draw_on_escrow_and_departures_refill_it() -> None:
    ledger = PageLedger(6)
    ledger.take(ESCROW, 2)
    ledger.place(0, [PageRun(0, 4)])
    assert ledger.place(0, [PageRun(9, 1)], ESCROW) == (KvExtent(0, 9, 1, 1),)
    ledger.remove(0, [PageRun(2, 2)], ESCROW)
    assert ledger.runs(ESCROW) == (PageRun(0, 1), PageRun(4, 2))
    ledger.remove(0, [PageRun(0, 1)], QuarantinedPages(TransferId(3)))
    assert ledger.counts()[OwnerKind.QUARANTINED] == 1
    ledger.check()


def test_a_restored_part_keeps_the_order_of_its_pages() -> None:
    ledger = PageLedger(8)
    incoming = IncomingPages(LAYERS[0], TransferId(7))
    ledger.take(ESCROW, 2)
    ledger.place(0, [PageRun(30, 1)])
    ledger.give(ESCROW)
    runs = ledger.take(incoming, 6)
    assert runs == (PageRun(0, 1), PageRun(3, 5))
    assert ledger.transfer(incoming, PartPages(LAYERS[0])) == runs
    assert ledger.counts() == {
        OwnerKind.FREE: 1,
        OwnerKind.PART: 6,
        OwnerKind.KV: 1,
        OwnerKind.INCOMING: 0,
        OwnerKind.QUARANTINED: 0,
        OwnerKind.ESCROW: 0,
    }
    assert ledger.owners() == (FREE, KV, PartPages(LAYERS[0]))


def books(ledger: PageLedger) -> dict[Owner, tuple[object, ...]]:
    """What the ledger says about every owner."""
    return {
        owner: ledger.extents(owner.layer) if isinstance(owner, KvPages) else ledger.runs(owner)
        for owner in ledger.owners()
    }


def small_ledger() -> PageLedger:
    """3 pages of layer 0, KV at range pages 5..9 of layer 0, layer 1 incoming, 10 pages free."""
    ledger = PageLedger(20)
    ledger.take(PartPages(LAYERS[0]), 3)
    ledger.place(0, [PageRun(5, 4)])
    ledger.take(IncomingPages(LAYERS[1], TransferId(1)), 3)
    return ledger


@pytest.mark.parametrize(
    ("source", "target", "count"),
    [
        (FREE, FREE, 1),
        (KV, KvPages(1), 1),
        (FREE, KV, 1),
        (KV, FREE, 1),
        (PartPages(LAYERS[0]), KV, None),
        (FREE, QuarantinedPages(TransferId(0)), 1),
        (FREE, ESCROW, 0),
        (FREE, ESCROW, -1),
        (FREE, ESCROW, 100),
        (ESCROW, FREE, None),
        (PartPages(LAYERS[0]), FREE, 2),
        (IncomingPages(LAYERS[1], TransferId(1)), FREE, 1),
        (IncomingPages(LAYERS[1], TransferId(1)), PartPages(LAYERS[2]), None),
        (FREE, PartPages(LAYERS[0]), 1),
    ],
)
def test_illegal_moves_change_nothing(source: Owner, target: Owner, count: int | None) -> None:
    ledger = small_ledger()
    before = books(ledger)
    with pytest.raises(AccountingError):
        ledger.transfer(source, target, count)
    assert books(ledger) == before
    ledger.check()


@pytest.mark.parametrize(
    ("range_runs", "owner"),
    [
        ([], FREE),
        ([PageRun(0, 0)], FREE),
        ([PageRun(-1, 2)], FREE),
        ([PageRun(0, 2), PageRun(1, 1)], FREE),
        ([PageRun(0, 11)], FREE),
        ([PageRun(0, 1), PageRun(8, 2)], FREE),
        ([PageRun(5, 1)], PartPages(LAYERS[0])),
        ([PageRun(5, 1)], ESCROW),
        ([PageRun(5, 1)], KvPages(1)),
    ],
)
def test_illegal_places_change_nothing(range_runs: list[PageRun], owner: Owner) -> None:
    ledger = small_ledger()
    before = books(ledger)
    with pytest.raises(AccountingError):
        ledger.place(0, range_runs, owner)
    assert books(ledger) == before
    for target in (owner, PartPages(LAYERS[2])):
        if range_runs != [PageRun(5, 1)] or target.kind is OwnerKind.PART:
            with pytest.raises(AccountingError):
                ledger.remove(0, range_runs, target)
            assert books(ledger) == before
    ledger.check()


def test_check_finds_what_the_books_hide() -> None:
    def broken(**runs: list[PageRun]) -> PageLedger:
        ledger = PageLedger(10)
        ledger.take(ESCROW, 4)
        ledger._runs[ESCROW] = runs.get("escrow", [PageRun(0, 4)])
        ledger._runs[FREE] = runs.get("free", [PageRun(4, 6)])
        return ledger

    broken().check()
    with pytest.raises(AccountingError, match="owned twice"):
        broken(escrow=[PageRun(2, 4)], free=[PageRun(0, 2), PageRun(5, 4)]).check()
    with pytest.raises(AccountingError, match="lost"):
        broken(escrow=[PageRun(1, 4)], free=[PageRun(5, 6)]).check()
    with pytest.raises(AccountingError, match="booked"):
        broken(escrow=[PageRun(0, 3)], free=[PageRun(3, 7)]).check()
    longer = broken()
    longer.num_pages = 11
    with pytest.raises(AccountingError, match="runs end"):
        longer.check()
    with pytest.raises(AccountingError, match="not merged"):
        broken(free=[PageRun(4, 3), PageRun(7, 3)]).check()


@pytest.mark.parametrize(
    ("extents", "fault"),
    [
        ([KvExtent(0, 0, 0, 2), KvExtent(0, 2, 2, 2)], "not merged"),
        ([KvExtent(0, 5, 0, 2), KvExtent(0, 0, 2, 2)], "out of order"),
        ([KvExtent(0, 0, 0, 2), KvExtent(0, 1, 2, 2)], "overlap"),
        ([KvExtent(0, 0, 0, 3)], "booked"),
        ([KvExtent(0, 0, 1, 4)], "lost"),
    ],
)
def test_check_finds_broken_extents(extents: list[KvExtent], fault: str) -> None:
    ledger = PageLedger(10)
    ledger.place(0, [PageRun(0, 4)])
    ledger.check()
    ledger._extents[KV] = extents
    with pytest.raises(AccountingError, match=fault):
        ledger.check()


def test_a_ledger_of_24_gb_keeps_a_few_runs() -> None:
    """What it costs grows with runs, not with pages."""
    ledger = PageLedger(131_072)
    ledger.take(PartPages(EMBEDDING), 576)
    for index in range(50):
        ledger.take(PartPages(Part(PartKind.LAYER, index)), 72)
    for index in range(50):
        ledger.place(index, [PageRun(0, 2_500)])
    ledger.check()
    runs = [run for owner in ledger.owners() for run in ledger.runs(owner)]
    extents = [extent for index in range(50) for extent in ledger.extents(index)]
    assert (len(runs), len(extents)) == (1 + 1 + 50 + 50, 50)


# ---------------------------------------------------------------- ledger, by property

NUM_PAGES = 40
RANGE_PAGES = 24
KV_LAYERS = (0, 1)
OWNERS: tuple[Owner, ...] = (
    FREE,
    ESCROW,
    *(PartPages(part) for part in LAYERS),
    *(IncomingPages(part, TransferId(1)) for part in LAYERS[:2]),
    QuarantinedPages(TransferId(1)),
    QuarantinedPages(TransferId(2)),
    *(KvPages(layer) for layer in KV_LAYERS),
)
RANGE_RUNS = st.lists(
    st.builds(PageRun, st.integers(-1, RANGE_PAGES - 1), st.integers(0, 5)), max_size=3
)


class LedgerMachine(RuleBasedStateMachine):
    """A ledger beside a model of it: for each owner the list of its pages, one by one, and for KV
    of a layer the page behind each range page."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = PageLedger(NUM_PAGES)
        self.model: dict[Owner, list[int]] = {
            owner: [] for owner in OWNERS if not isinstance(owner, KvPages)
        }
        self.model[FREE] = list(range(NUM_PAGES))
        self.kv: dict[int, dict[int, int]] = {layer: {} for layer in KV_LAYERS}

    @rule(
        old=st.sampled_from(OWNERS),
        new=st.sampled_from(OWNERS),
        count=st.none() | st.integers(-1, 12),
    )
    def transfer(self, old: Owner, new: Owner, count: int | None) -> None:
        self._transfer(old, new, count)

    @precondition(lambda self: self.model[FREE])
    @rule(new=st.sampled_from(OWNERS[1:]), count=st.integers(1, 8))
    def take(self, new: Owner, count: int) -> None:
        self._transfer(FREE, new, count)

    @rule(old=st.sampled_from(OWNERS[1:]))
    def give_all(self, old: Owner) -> None:
        self._transfer(old, FREE, None)

    @rule(layer=st.sampled_from(KV_LAYERS), range_runs=RANGE_RUNS, old=st.sampled_from(OWNERS))
    def place_from_anybody(self, layer: int, range_runs: list[PageRun], old: Owner) -> None:
        self._place(layer, range_runs, old)

    @rule(
        layer=st.sampled_from(KV_LAYERS),
        start=st.integers(0, RANGE_PAGES - 1),
        count=st.integers(1, 6),
        old=st.sampled_from([FREE, FREE, ESCROW]),
    )
    def place(self, layer: int, start: int, count: int, old: Owner) -> None:
        self._place(layer, [PageRun(start, count)], old)

    @precondition(lambda self: any(self.kv.values()))
    @rule(data=st.data(), new=st.sampled_from([FREE, ESCROW, *OWNERS[-4:]]))
    def remove(self, data: st.DataObject, new: Owner) -> None:
        layer = data.draw(st.sampled_from([layer for layer in KV_LAYERS if self.kv[layer]]))
        pages = data.draw(st.sets(st.sampled_from(sorted(self.kv[layer])), min_size=1))
        extra = data.draw(st.sampled_from([0, 0, 0, 1]))  # sometimes a page that may be missing
        self._remove(layer, [PageRun(page, 1 + extra) for page in sorted(pages)], new)

    def _transfer(self, source: Owner, target: Owner, count: int | None) -> None:
        if isinstance(source, KvPages) or isinstance(target, KvPages):
            with pytest.raises(AccountingError, match="place and remove"):
                self.ledger.transfer(source, target, count)
            return
        wanted = len(self.model[source]) if count is None else count
        if not self._legal(source, target, wanted):
            with pytest.raises(AccountingError):
                self.ledger.transfer(source, target, count)
            return
        free_before = list(self.model[FREE])
        pages = pages_of(self.ledger.transfer(source, target, count))
        assert len(pages) == wanted
        self._take(source, pages, free_before)
        self.model[target] += pages

    def _take(self, source: Owner, pages: list[int], free_before: list[int]) -> None:
        if source == FREE:
            _assert_well_chosen(sorted(free_before), pages)
            self.model[FREE] = [page for page in free_before if page not in pages]
        else:
            assert pages == self.model[source][-len(pages) :]
            del self.model[source][-len(pages) :]

    def _place(self, layer: int, range_runs: list[PageRun], source: Owner) -> None:
        named = pages_of(range_runs)
        if (
            not _are_range_pages(range_runs)
            or source not in (FREE, ESCROW)
            or not 0 < len(named) <= len(self.model[source])
            or any(page in self.kv[layer] for page in named)
        ):
            with pytest.raises(AccountingError):
                self.ledger.place(layer, range_runs, source)
            return
        free_before = list(self.model[FREE])
        placed = _by_range_page(self.ledger.place(layer, range_runs, source))
        assert list(placed) == sorted(named)
        self._take(source, list(placed.values()), free_before)
        self.kv[layer].update(placed)

    def _remove(self, layer: int, range_runs: list[PageRun], target: Owner) -> None:
        named = pages_of(range_runs)
        if (
            not _are_range_pages(range_runs)
            or (OwnerKind.KV, target.kind) not in LEGAL_MOVES
            or any(page not in self.kv[layer] for page in named)
        ):
            with pytest.raises(AccountingError):
                self.ledger.remove(layer, range_runs, target)
            return
        removed = _by_range_page(self.ledger.remove(layer, range_runs, target))
        assert removed == {page: self.kv[layer].pop(page) for page in sorted(named)}
        self.model[target] += removed.values()

    def _legal(self, source: Owner, target: Owner, wanted: int) -> bool:
        available = len(self.model[source])
        if (source.kind, target.kind) not in LEGAL_MOVES or not 0 < wanted <= available:
            return False
        if isinstance(source, PartPages | IncomingPages) and wanted != available:
            return False
        if isinstance(target, PartPages):
            came_as_itself = not isinstance(source, IncomingPages) or source.part == target.part
            return not self.model[target] and came_as_itself
        return True

    @invariant()
    def laws_hold(self) -> None:
        self.ledger.check()
        assert sum(self.ledger.counts().values()) == NUM_PAGES

    @invariant()
    def ledger_equals_model(self) -> None:
        for owner, pages in self.model.items():
            expected = sorted(pages) if owner == FREE else pages
            assert pages_of(self.ledger.runs(owner)) == expected
            assert self.ledger.pages(owner) == len(pages)
        for layer, placed in self.kv.items():
            assert _by_range_page(self.ledger.extents(layer)) == placed
            assert self.ledger.pages(KvPages(layer)) == len(placed)
            window = PageRun(5, 7)
            assert _by_range_page(self.ledger.extents(layer, window)) == {
                page: placed[page] for page in sorted(placed) if page in window
            }
        some = {owner for owner, pages in self.model.items() if pages}
        some |= {KvPages(layer) for layer, placed in self.kv.items() if placed}
        assert set(self.ledger.owners()) == some


def _by_range_page(extents: tuple[KvExtent, ...]) -> dict[int, int]:
    return {
        extent.range_page + index: extent.physical_page + index
        for extent in extents
        for index in range(extent.count)
    }


def _are_range_pages(runs: list[PageRun]) -> bool:
    pages = pages_of(runs)
    named_once = len(set(pages)) == len(pages)
    return named_once and all(run.start >= 0 and run.count > 0 for run in runs)


def _assert_well_chosen(free: list[int], pages: list[int]) -> None:
    """The lowest run that holds all, else the longest runs, the last one of them in part."""
    count, runs = len(pages), runs_of(free)
    long_enough = [run for run in runs if run.count >= count]
    if long_enough:
        start = long_enough[0].start
        assert pages == list(range(start, start + count))
        return
    longest_first = pages_of(sorted(runs, key=lambda run: (-run.count, run.start)))
    assert pages == sorted(longest_first[:count])


LedgerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLedgerProperties = LedgerMachine.TestCase


# ---------------------------------------------------------------- the split at start

GEOMETRY = PageGeometry(196_608, 24_576)
PART_BYTES = {
    EMBEDDING: 108 * MIB,
    **dict.fromkeys(LAYERS, 13 * MIB + MIB // 2),
}
EMBEDDING_PAGES, LAYER_PAGES = 576, 72
WEIGHT_PAGES = EMBEDDING_PAGES + 3 * LAYER_PAGES


def test_kv_memory_is_split_evenly_and_the_rest_is_free() -> None:
    spec = small_spec()
    plan = plan_memory(
        spec, PART_BYTES, spec.parts, GEOMETRY, kv_cache_memory_bytes=11 * 196_608 + 5
    )
    assert plan.num_pages == WEIGHT_PAGES + 11
    assert plan.part_pages == {EMBEDDING: EMBEDDING_PAGES, **dict.fromkeys(LAYERS, LAYER_PAGES)}
    assert plan.kv_pages_per_layer == 3
    assert plan.kv_blocks == 24
    assert plan.free_pages == 2
    assert plan.held == spec.parts
    assert plan.held_layers == (0, 1, 2)
    with pytest.raises(FrozenInstanceError):
        plan.num_pages = 1  # type: ignore[misc]


def test_total_memory_includes_the_weights() -> None:
    spec = small_spec()
    total_bytes = (WEIGHT_PAGES + 7) * 196_608
    plan = plan_memory(spec, PART_BYTES, spec.parts, GEOMETRY, memory_bytes=total_bytes)
    assert (plan.num_pages, plan.kv_pages_per_layer, plan.free_pages) == (WEIGHT_PAGES + 7, 2, 1)


def test_a_later_member_holds_some_parts_only() -> None:
    held = (LAYERS[2], LAYERS[1])
    plan = plan_memory(small_spec(), PART_BYTES, held, GEOMETRY, kv_cache_memory_bytes=10 * 196_608)
    assert plan.held == (LAYERS[1], LAYERS[2])
    assert plan.held_layers == (1, 2)
    assert plan.num_pages == 2 * LAYER_PAGES + 10
    assert plan.kv_pages_per_layer == 5
    assert plan.part_pages[EMBEDDING] == EMBEDDING_PAGES


def test_the_error_names_a_minimum_that_works() -> None:
    spec = small_spec()
    plan = partial(plan_memory, spec, PART_BYTES, spec.parts, GEOMETRY)

    minimum_kv_bytes = 3 * 196_608
    with pytest.raises(ConfigError, match=r"^--kv-cache-memory-bytes 575 KiB is too") as caught:
        plan(kv_cache_memory_bytes=minimum_kv_bytes - 1)
    named = named_minimum(caught.value)
    assert minimum_kv_bytes <= named < minimum_kv_bytes + 1024
    assert plan(kv_cache_memory_bytes=minimum_kv_bytes).kv_pages_per_layer == 1
    assert plan(kv_cache_memory_bytes=named).kv_pages_per_layer >= 1

    minimum_bytes = (WEIGHT_PAGES + 3) * 196_608
    with pytest.raises(ConfigError, match=r"^--memory-bytes \d+ MiB is too small") as caught:
        plan(memory_bytes=minimum_bytes - 1)
    assert f"weights of {-(-WEIGHT_PAGES * 196_608 // MIB)} MiB and" in str(caught.value)
    named = named_minimum(caught.value)
    assert minimum_bytes <= named < minimum_bytes + MIB
    assert plan(memory_bytes=minimum_bytes).kv_pages_per_layer == 1
    assert plan(memory_bytes=named).kv_pages_per_layer >= 1


def named_minimum(error: ConfigError) -> int:
    """The least size that the message names, as the flag would read it."""
    found = re.search(r"at least (\d+ \w+)$", str(error))
    assert found
    return parse_size(found.group(1))


@given(given_bytes=st.integers(1, 3 * 196_608 - 1))
def test_the_size_that_is_too_small_shows_as_less_than_the_minimum(given_bytes: int) -> None:
    spec = small_spec()
    with pytest.raises(ConfigError) as caught:
        plan_memory(spec, PART_BYTES, spec.parts, GEOMETRY, kv_cache_memory_bytes=given_bytes)
    found = re.match(r"--kv-cache-memory-bytes (\d+ \w+) is", str(caught.value))
    assert found
    assert given_bytes - 1024 < parse_size(found.group(1)) <= given_bytes


def test_a_plan_that_makes_no_sense_is_refused() -> None:
    spec = small_spec()
    with pytest.raises(ConfigError, match="exactly one"):
        plan_memory(spec, PART_BYTES, spec.parts, GEOMETRY)
    with pytest.raises(ConfigError, match="exactly one"):
        plan_memory(spec, PART_BYTES, spec.parts, GEOMETRY, kv_cache_memory_bytes=1, memory_bytes=1)
    with pytest.raises(ConfigError, match="whole number of tokens"):
        plan_memory(spec, PART_BYTES, spec.parts, PageGeometry(4096, 1024), memory_bytes=1 << 40)
    with pytest.raises(LayoutError, match="no layer 9"):
        plan_memory(spec, PART_BYTES, [Part(PartKind.LAYER, 9)], GEOMETRY, memory_bytes=1 << 40)
    with pytest.raises(LayoutError, match="at least one layer"):
        plan_memory(spec, PART_BYTES, [EMBEDDING], GEOMETRY, memory_bytes=1 << 40)
    known = {part: PART_BYTES[part] for part in (EMBEDDING, *LAYERS[:2])}
    with pytest.raises(LayoutError, match="size of layer 2"):
        plan_memory(spec, known, spec.parts, GEOMETRY, memory_bytes=1 << 40)


# ---------------------------------------------------------------- permanent slots


def test_slots_of_a_domain_hold_what_its_groups_can_hold() -> None:
    slots = SlotMap.for_domain(GEOMETRY, num_slots=16, num_layers=30, member_pages=131_072)
    assert slots.slot_pages == -(-16 * 131_072 // 30)
    assert slots.range_bytes > 1 << 37  # 16 slots of 13 GB each
    # A group has at most as many members as layers.
    few = SlotMap.for_domain(GEOMETRY, num_slots=16, num_layers=2, member_pages=100)
    assert few.slot_pages == 100


@given(
    num_slots=st.integers(1, 16),
    num_layers=st.integers(1, 80),
    member_pages=st.integers(1, 1 << 20),
    data=st.data(),
)
def test_block_ids_go_there_and_back(
    num_slots: int, num_layers: int, member_pages: int, data: st.DataObject
) -> None:
    slots = SlotMap.for_domain(
        GEOMETRY, num_slots=num_slots, num_layers=num_layers, member_pages=member_pages
    )
    block = BlockId(data.draw(st.integers(0, slots.num_blocks - 1)))
    place = slots.place(block)
    assert slots.block_id(place.slot, place.index) == block
    assert slots.block_of_page(place.slot, place.page) + place.block_in_page == block
    in_range_bytes = slots.range_page(place.slot, place.page) * GEOMETRY.page_bytes
    assert slots.offset_bytes(block) == in_range_bytes + place.block_in_page * 24_576
    assert slots.offset_bytes(block) + 24_576 <= slots.range_bytes


def test_last_block_of_the_last_slot_needs_64_bits() -> None:
    slots = SlotMap(GEOMETRY, 16, 8 * 524_288)
    last = slots.block_id(SlotId(15), slots.slot_blocks - 1)
    assert slots.offset_bytes(last) == slots.range_bytes - 24_576 > 1 << 40
    assert slots.range_page(SlotId(15), slots.slot_pages) == slots.range_pages


def test_range_pages_belong_to_slots() -> None:
    slots = SlotMap(GEOMETRY, 3, 16)
    assert slots.slot_range(SlotId(2)) == PageRun(4, 2)
    assert [slots.slot_of_page(page) for page in range(6)] == [0, 0, 1, 1, 2, 2]
    for page in (-1, 6):
        with pytest.raises(AccountingError, match="no range page"):
            slots.slot_of_page(page)
    with pytest.raises(AccountingError, match="no slot"):
        slots.slot_range(SlotId(3))


def test_ids_outside_are_refused() -> None:
    slots = SlotMap(GEOMETRY, 2, 16)
    for slot, index in ((2, 0), (-1, 0), (0, 16), (0, -1)):
        with pytest.raises(AccountingError):
            slots.block_id(SlotId(slot), index)
    for block in (-1, 32):
        with pytest.raises(AccountingError):
            slots.place(BlockId(block))
        with pytest.raises(AccountingError):
            slots.offset_bytes(BlockId(block))
    with pytest.raises(AccountingError):
        slots.range_page(SlotId(0), 3)
    with pytest.raises(ConfigError, match="slots"):
        SlotMap(GEOMETRY, 17, 16)
    with pytest.raises(ConfigError, match="whole number of pages"):
        SlotMap(GEOMETRY, 2, 12)
