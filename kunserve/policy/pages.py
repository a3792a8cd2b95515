"""Pages: who owns each physical page of an instance, how its memory is split at start, and how
KV blocks are named (design section 3, paper mechanism 3).

    physical    0                                                        num_pages
                | embedding | layer 0 | layer 1 | ... | kv l0 | kv l1 | ... | free |
    one page    | block 0 | block 1 | ... | block blocks_per_page - 1 |   of ONE layer

A page never changes its number; only its owner changes, and with it the virtual address where the
arena maps it. This module counts; `kunserve.policy.memory` moves pages here and in the arena
together.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from types import MappingProxyType
from typing import ClassVar, NewType

from kunserve.core.errors import AccountingError, ConfigError, LayoutError
from kunserve.core.ids import BlockId, SlotId
from kunserve.core.layout import Part, PartKind
from kunserve.core.memory import KvExtent, PageRun
from kunserve.core.model import ModelSpec

HOST_GRANULARITY_BYTES = 4096
HOST_TARGET_PAGE_BYTES = 192 * 1024
MAX_SLOTS = 16

TransferId = NewType("TransferId", int)
"""Identity of one transfer of weights or KV, unique for the life of an instance process."""

# ---------------------------------------------------------------- geometry


@dataclass(frozen=True)
class PageGeometry:
    """Size of a page, in bytes and in KV blocks of one layer.

    A page holds whole blocks, and the device can map it: page_bytes is a multiple of both.
    """

    page_bytes: int
    block_bytes: int

    def __post_init__(self) -> None:
        if self.block_bytes <= 0 or self.page_bytes <= 0 or self.page_bytes % self.block_bytes:
            raise ConfigError(
                f"a page of {self.page_bytes} B does not hold whole blocks of {self.block_bytes} B"
            )

    @classmethod
    def fit(
        cls,
        block_bytes: int,
        *,
        granularity_bytes: int = HOST_GRANULARITY_BYTES,
        target_bytes: int = HOST_TARGET_PAGE_BYTES,
    ) -> PageGeometry:
        """k * lcm(granularity, block) with the largest k within `target_bytes`, at least k = 1.

        Args:
            block_bytes: K and V of one block of tokens in one layer.
            granularity_bytes: smallest unit that the device maps.
            target_bytes: wanted page size: bigger pages cost fewer driver calls, smaller ones
                waste less.

        Raises:
            ConfigError: a size is not positive.
        """
        if block_bytes <= 0 or granularity_bytes <= 0:
            raise ConfigError(
                f"block of {block_bytes} B, granularity of {granularity_bytes} B: both must be "
                "positive"
            )
        unit_bytes = math.lcm(granularity_bytes, block_bytes)
        return cls(max(1, target_bytes // unit_bytes) * unit_bytes, block_bytes)

    @property
    def blocks_per_page(self) -> int:
        """KV blocks of one layer in one page."""
        return self.page_bytes // self.block_bytes

    def pages_for(self, nbytes: int) -> int:
        """Whole pages that hold `nbytes`."""
        return -(-nbytes // self.page_bytes)


# ---------------------------------------------------------------- owners


class OwnerKind(Enum):
    """What a page can be used for."""

    FREE = "free"
    PART = "part"
    KV = "kv"
    INCOMING = "incoming"
    QUARANTINED = "quarantined"
    ESCROW = "escrow"


@dataclass(frozen=True)
class FreePages:
    """Nobody's. Kept sorted by page, not by the order of arrival."""

    kind: ClassVar[OwnerKind] = OwnerKind.FREE


@dataclass(frozen=True)
class PartPages:
    """The slab of a held part: page i backs bytes [i, i + 1) * page_bytes of the slab."""

    part: Part
    kind: ClassVar[OwnerKind] = OwnerKind.PART


@dataclass(frozen=True)
class KvPages:
    """KV of one layer, all slots. Its pages are named by range page and may have gaps: range page
    r backs block ids [r, r + 1) * blocks_per_page."""

    layer: int
    kind: ClassVar[OwnerKind] = OwnerKind.KV


@dataclass(frozen=True)
class IncomingPages:
    """A part on its way in: the pages of its future slab, in order."""

    part: Part
    transfer: TransferId
    kind: ClassVar[OwnerKind] = OwnerKind.INCOMING


@dataclass(frozen=True)
class QuarantinedPages:
    """A transfer that missed its deadline may still write here (links.md, rule 3)."""

    transfer: TransferId
    kind: ClassVar[OwnerKind] = OwnerKind.QUARANTINED


@dataclass(frozen=True)
class EscrowPages:
    """Set aside so that an exchange never lacks its first page of credit."""

    kind: ClassVar[OwnerKind] = OwnerKind.ESCROW


Owner = FreePages | PartPages | KvPages | IncomingPages | QuarantinedPages | EscrowPages

FREE = FreePages()
ESCROW = EscrowPages()

LEGAL_MOVES: frozenset[tuple[OwnerKind, OwnerKind]] = frozenset(
    {
        (OwnerKind.FREE, OwnerKind.PART),  # loaded from a file at start
        (OwnerKind.FREE, OwnerKind.KV),  # growth
        (OwnerKind.FREE, OwnerKind.INCOMING),  # a restore begins
        (OwnerKind.FREE, OwnerKind.ESCROW),  # PREPARE
        (OwnerKind.PART, OwnerKind.FREE),  # drop
        (OwnerKind.PART, OwnerKind.QUARANTINED),  # a peer still reads what we dropped
        (OwnerKind.KV, OwnerKind.FREE),  # a tail is given up
        (OwnerKind.KV, OwnerKind.ESCROW),  # a page that left in an exchange keeps up the credit
        (OwnerKind.KV, OwnerKind.QUARANTINED),
        (OwnerKind.INCOMING, OwnerKind.PART),  # complete and checked
        (OwnerKind.INCOMING, OwnerKind.FREE),  # aborted
        (OwnerKind.INCOMING, OwnerKind.QUARANTINED),
        (OwnerKind.QUARANTINED, OwnerKind.FREE),  # done, failed, or the peer is dead
        (OwnerKind.ESCROW, OwnerKind.FREE),  # the exchange is over
        (OwnerKind.ESCROW, OwnerKind.KV),  # a page of moved KV arrives
    }
)

_WHOLE_KINDS = frozenset({OwnerKind.PART, OwnerKind.INCOMING})


@dataclass(frozen=True)
class OwnedPage:
    """One page as its owner sees it: `index` counts the owner's pages from 0, in their order; for
    KvPages it is the range page. Of KvPages, PartPages and IncomingPages it is so the position in
    the virtual range.
    """

    owner: Owner
    index: int


# ---------------------------------------------------------------- ledger


class PageLedger:
    """The truth of who owns each physical page of one instance.

    KV of a layer is a set of extents, ordered by range page, with gaps: `place` and `remove` any
    of its range pages. Every other owner has an ordered list of runs; page index i of an owner is
    the i-th page of that list, pages join at its end and leave from its end (`transfer`). Costs
    grow with the number of runs, not with that of pages.

        KV of layer 0     range page   |4 5 6|   |9|        |20 21|       3 extents
                          physical     |7 8 9|   |2|        | 3  4|

    Every method either succeeds as a whole or raises AccountingError and changes nothing.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages <= 0:
            raise AccountingError(f"a ledger needs at least one page, got {num_pages}")
        self.num_pages = num_pages
        # No owner is listed without pages, except FREE, which is always there.
        self._runs: dict[Owner, list[PageRun]] = {FREE: [PageRun(0, num_pages)]}
        self._extents: dict[Owner, list[KvExtent]] = {}
        self._owned_pages: dict[Owner, int] = {FREE: num_pages}

    # -- moves between owners with a list of pages

    def take(self, owner: Owner, count: int) -> tuple[PageRun, ...]:
        """Append `count` free pages to the pages of `owner`; returns them in order.

        The lowest free run that holds all of them, else the longest free runs.

        Raises:
            AccountingError: not enough free pages, or not a legal owner for free pages.
        """
        return self.transfer(FREE, owner, count)

    def give(self, owner: Owner, count: int | None = None) -> tuple[PageRun, ...]:
        """Free the last `count` pages of `owner` (None: all of them); returns them in order.

        Raises:
            AccountingError: `owner` has fewer pages, or only a piece of a part was given.
        """
        return self.transfer(owner, FREE, count)

    def transfer(
        self, source: Owner, target: Owner, count: int | None = None
    ) -> tuple[PageRun, ...]:
        """Move the last `count` pages of `source` (None: all) to the end of `target`, in order.

        A part, held or incoming, moves as a whole, and an incoming part becomes only itself.

        Raises:
            AccountingError: the move is not in LEGAL_MOVES, `source` has fewer pages, `target` is
                a part that is already held, or one of the two is KV.
        """
        if isinstance(source, KvPages) or isinstance(target, KvPages):
            raise AccountingError("pages of KV have a place in a range: use place and remove")
        moved = self.pages(source) if count is None else count
        self._check_move(source, target, moved)
        runs = self._take(source, moved)
        self._put(target, runs)
        return tuple(runs)

    # -- moves to and from KV

    def place(
        self, layer: int, range_runs: Iterable[PageRun], source: Owner = FREE
    ) -> tuple[KvExtent, ...]:
        """Pages of `source` become KV of `layer` at `range_runs`; returns what lies where.

        Free pages are chosen as in `take`, escrow pages are the last ones.

        Raises:
            AccountingError: `source` has fewer pages or may not become KV, a range page is named
                twice or is there already, or there is nothing to place.
        """
        owner, wanted = KvPages(layer), merge_range_runs(range_runs)
        count = sum(run.count for run in wanted)
        self._check_move(source, owner, count)
        for run in wanted:
            present = self.extents(layer, run)
            if present:
                raise AccountingError(f"cannot place {run} of layer {layer}: {present[0]} is there")
        placed = _lay(layer, wanted, self._take(source, count))
        extents = self._extents.setdefault(owner, [])
        for extent in placed:
            _replace(extents, PageRun(extent.range_page, extent.count), (extent,))
        self._set_owned(owner, self.pages(owner) + count)
        return placed

    def place_at(self, extents: Iterable[KvExtent]) -> None:
        """Free pages that the caller has chosen become KV where `extents` say.

        Raises:
            AccountingError: a page is not free, a page or range page is named twice, a range page
                is there already, or there is nothing to place.
        """
        wanted: dict[int, list[KvExtent]] = {}
        for extent in extents:
            wanted.setdefault(extent.layer, []).append(extent)
        chosen = _chosen_runs(extent for placed in wanted.values() for extent in placed)
        self._check_free(chosen)
        for layer, placed in wanted.items():
            runs = merge_range_runs(PageRun(extent.range_page, extent.count) for extent in placed)
            self._check_move(FREE, KvPages(layer), sum(run.count for run in runs))
            for run in runs:
                present = self.extents(layer, run)
                if present:
                    raise AccountingError(
                        f"cannot place {run} of layer {layer}: {present[0]} is there"
                    )
        self._take_chosen(chosen)
        for layer, placed in wanted.items():
            owner = KvPages(layer)
            known = self._extents.setdefault(owner, [])
            for extent in placed:
                _replace(known, PageRun(extent.range_page, extent.count), (extent,))
            self._set_owned(owner, self.pages(owner) + sum(extent.count for extent in placed))

    def remove(
        self, layer: int, range_runs: Iterable[PageRun], target: Owner = FREE
    ) -> tuple[KvExtent, ...]:
        """KV pages of `layer` at `range_runs` become pages of `target`; returns what lay where.

        Raises:
            AccountingError: not all of them are there, KV may not become `target`, a range page is
                named twice, or there is nothing to remove.
        """
        owner, wanted = KvPages(layer), merge_range_runs(range_runs)
        count = sum(run.count for run in wanted)
        self._check_move(owner, target, count)
        for run in wanted:
            present = sum(extent.count for extent in self.extents(layer, run))
            if present != run.count:
                raise AccountingError(f"only {present} pages of {run} of layer {layer} are there")
        extents = self._extents[owner]
        removed = [extent for run in wanted for extent in _replace(extents, run, ())]
        self._set_owned(owner, self.pages(owner) - count)
        self._put(target, physical_runs(removed))
        return tuple(removed)

    # -- lookups

    @property
    def free_pages(self) -> int:
        """Number of pages that nobody owns."""
        return self._owned_pages[FREE]

    def pages(self, owner: Owner) -> int:
        """Number of pages of `owner`."""
        return self._owned_pages.get(owner, 0)

    def runs(self, owner: Owner) -> tuple[PageRun, ...]:
        """Physical pages of `owner` in order of their index (FREE: in order of the page)."""
        if isinstance(owner, KvPages):
            return physical_runs(self.extents(owner.layer))
        return tuple(self._runs.get(owner, ()))

    def extents(self, layer: int, within: PageRun | None = None) -> tuple[KvExtent, ...]:
        """Where KV of `layer` lies, by range page, as few extents as it takes; `within`: of these
        range pages, cut at their ends."""
        extents = self._extents.get(KvPages(layer), [])
        if within is None:
            return tuple(extents)
        low = max(0, bisect_right(extents, within.start, key=_range_page) - 1)
        high = bisect_left(extents, within.stop, key=_range_page)
        inside = (_cut(extent, within.start, within.stop) for extent in extents[low:high])
        return tuple(extent for extent in inside if extent.count > 0)

    def owners(self) -> tuple[Owner, ...]:
        """All owners of at least one page, FREE first."""
        return tuple(owner for owner, pages in self._owned_pages.items() if pages)

    def counts(self) -> dict[OwnerKind, int]:
        """Pages by kind of owner; every kind is there."""
        counts = dict.fromkeys(OwnerKind, 0)
        for owner, pages in self._owned_pages.items():
            counts[owner.kind] += pages
        return counts

    def page_at(self, owner: Owner, index: int) -> int:
        """The physical page that is page `index` of `owner` (of KV: range page `index`).

        Raises:
            AccountingError: `owner` has no such page.
        """
        if isinstance(owner, KvPages):
            found = self.extents(owner.layer, PageRun(index, 1))
            if found:
                return found[0].physical_page
            raise AccountingError(f"{owner} has no page at range page {index}")
        if not 0 <= index < self.pages(owner):
            raise AccountingError(f"{owner} has {self.pages(owner)} pages, no page {index}")
        at = 0
        for run in self._runs[owner]:
            if index < at + run.count:
                return run.start + index - at
            at += run.count
        raise AccountingError(f"{owner}: runs hold {at} pages, {self.pages(owner)} are booked")

    def owner_of(self, page: int) -> OwnedPage:
        """Who owns physical `page`. Looks through all runs: for diagnosis, not for a hot path.

        Raises:
            AccountingError: there is no such page.
        """
        for owner, runs in self._runs.items():
            at = 0
            for run in runs:
                if run.start <= page < run.stop:
                    return OwnedPage(owner, at + page - run.start)
                at += run.count
        for owner, extents in self._extents.items():
            for extent in extents:
                index = page - extent.physical_page
                if 0 <= index < extent.count:
                    return OwnedPage(owner, extent.range_page + index)
        raise AccountingError(f"no page {page} among {self.num_pages}")

    # -- laws

    def check(self) -> None:
        """Conservation: all owners' runs together tile 0..num_pages exactly once, and the sums
        that `pages` reports are those of the runs. Free runs and extents are in order and merged.

        Raises:
            AccountingError: a page is lost, owned twice or miscounted.
        """
        physical = {owner: list(runs) for owner, runs in self._runs.items()}
        for owner, extents in self._extents.items():
            physical[owner] = [PageRun(extent.physical_page, extent.count) for extent in extents]
            if any(_range_stop(low) > high.range_page for low, high in pairwise(extents)):
                raise AccountingError(f"{owner}: extents overlap or are out of order")
            if extents != _merge_extents(extents):
                raise AccountingError(f"{owner}: extents are not merged")
        for owner in physical.keys() | self._owned_pages.keys():
            listed = sum(run.count for run in physical.get(owner, ()))
            booked = self._owned_pages.get(owner, 0)
            if listed != booked or (booked == 0 and owner != FREE):
                raise AccountingError(f"{owner}: runs hold {listed} pages, {booked} are booked")
        free = self._runs[FREE]
        if any(low.stop >= high.start for low, high in pairwise(free)):
            raise AccountingError("free runs are out of order or not merged")
        at = 0
        for run in sorted(run for runs in physical.values() for run in runs):
            if run.count <= 0 or run.start != at:
                fault = "owned twice" if run.start < at else "lost"
                raise AccountingError(f"page {min(at, run.start)} is {fault} (next run: {run})")
            at = run.stop
        if at != self.num_pages:
            raise AccountingError(f"runs end at page {at} of {self.num_pages}")

    # -- internals

    def _check_move(self, source: Owner, target: Owner, moved: int) -> None:
        available = self.pages(source)
        if (source.kind, target.kind) not in LEGAL_MOVES:
            raise AccountingError(f"pages cannot move from {source} to {target}")
        if not 0 < moved <= available:
            raise AccountingError(
                f"cannot move {moved} pages from {source} to {target}: it has {available}"
            )
        if source.kind in _WHOLE_KINDS and moved != available:
            raise AccountingError(f"{source} moves as a whole: {moved} of {available} pages asked")
        if isinstance(target, PartPages) and self.pages(target):
            raise AccountingError(f"{target.part} is already held")
        if (
            isinstance(source, IncomingPages)
            and isinstance(target, PartPages)
            and source.part != target.part
        ):
            raise AccountingError(f"incoming {source.part} cannot become {target.part}")

    def _take(self, source: Owner, count: int) -> list[PageRun]:
        """Take `count` pages off `source`, which has that many and is not KV."""
        runs = self._take_free(count) if source == FREE else self._take_last(source, count)
        self._set_owned(source, self.pages(source) - count)
        return runs

    def _put(self, target: Owner, runs: Sequence[PageRun]) -> None:
        """Add `runs`, which nobody owns just now, to the pages of `target`, which is not KV."""
        self._set_owned(target, self.pages(target) + sum(run.count for run in runs))
        if target == FREE:
            self._add_free(runs)
        else:
            _append_runs(self._runs.setdefault(target, []), runs)

    def _set_owned(self, owner: Owner, pages: int) -> None:
        if pages or owner == FREE:
            self._owned_pages[owner] = pages
        else:
            del self._owned_pages[owner]
            self._runs.pop(owner, None)
            self._extents.pop(owner, None)

    def _take_free(self, count: int) -> list[PageRun]:
        free = self._runs[FREE]
        for position, run in enumerate(free):
            if run.count >= count:
                rest = PageRun(run.start + count, run.count - count)
                free[position : position + 1] = [rest] if rest.count else []
                return [PageRun(run.start, count)]
        # No free run is long enough: the longest ones, since each run costs a mapping.
        used: dict[int, int] = {}
        left = count
        for run in sorted(free, key=lambda run: (-run.count, run.start)):
            used[run.start] = min(left, run.count)
            left -= used[run.start]
            if left == 0:
                break
        free[:] = [
            PageRun(run.start + taken, run.count - taken)
            for run in free
            if (taken := used.get(run.start, 0)) < run.count
        ]
        return [PageRun(start, taken) for start, taken in sorted(used.items())]

    def _free_run_at(self, page: int) -> int:
        """Position of the last free run that begins at or before `page`; -1: none does."""
        return bisect_right(self._runs[FREE], page, key=_run_start) - 1

    def _check_free(self, chosen: Sequence[PageRun]) -> None:
        free = self._runs[FREE]
        if not chosen:
            raise AccountingError("there is nothing to place")
        for run in chosen:
            position = self._free_run_at(run.start)
            if position < 0 or free[position].stop < run.stop:
                raise AccountingError(f"not all of {run} is free")

    def _take_chosen(self, chosen: Sequence[PageRun]) -> None:
        """Take runs off the free ones, in which they are."""
        free = self._runs[FREE]
        for run in chosen:
            position = self._free_run_at(run.start)
            found = free[position]
            ends = (
                PageRun(found.start, run.start - found.start),
                PageRun(run.stop, found.stop - run.stop),
            )
            free[position : position + 1] = [end for end in ends if end.count]
        self._set_owned(FREE, self.free_pages - sum(run.count for run in chosen))

    def _take_last(self, source: Owner, count: int) -> list[PageRun]:
        runs = self._runs[source]
        taken: list[PageRun] = []
        left = count
        while left:
            run = runs.pop()
            used = min(left, run.count)
            if used < run.count:
                runs.append(PageRun(run.start, run.count - used))
            taken.append(PageRun(run.stop - used, used))
            left -= used
        taken.reverse()
        return taken

    def _add_free(self, runs: Iterable[PageRun]) -> None:
        free = self._runs[FREE]
        for run in runs:
            low = high = bisect_left(free, run)
            start, stop = run.start, run.stop
            if low > 0 and free[low - 1].stop == start:
                low -= 1
                start = free[low].start
            if high < len(free) and free[high].start == stop:
                stop = free[high].stop
                high += 1
            free[low:high] = [PageRun(start, stop - start)]


def merge_range_runs(runs: Iterable[PageRun]) -> tuple[PageRun, ...]:
    """`runs` of range pages, ascending, neighbours joined.

    Raises:
        AccountingError: a run is empty or begins below 0, or a page is in two runs.
    """
    merged: list[PageRun] = []
    for run in sorted(runs):
        if run.count <= 0 or run.start < 0:
            raise AccountingError(f"{run} is no run of range pages")
        if merged and merged[-1].stop > run.start:
            raise AccountingError(f"range page {run.start} is named twice")
        _append_runs(merged, (run,))
    return tuple(merged)


def physical_runs(extents: Iterable[KvExtent]) -> tuple[PageRun, ...]:
    """The physical pages of `extents`, in their order, as few runs as that takes."""
    runs: list[PageRun] = []
    _append_runs(runs, (PageRun(extent.physical_page, extent.count) for extent in extents))
    return tuple(runs)


def _chosen_runs(extents: Iterable[KvExtent]) -> tuple[PageRun, ...]:
    """The physical pages of `extents`, ascending, neighbours joined."""
    runs = sorted(PageRun(extent.physical_page, extent.count) for extent in extents)
    for low, high in pairwise(runs):
        if low.stop > high.start:
            raise AccountingError(f"physical page {high.start} is named twice")
    merged: list[PageRun] = []
    _append_runs(merged, runs)
    return tuple(merged)


def _run_start(run: PageRun) -> int:
    return run.start


def _append_runs(runs: list[PageRun], added: Iterable[PageRun]) -> None:
    for run in added:
        if runs and runs[-1].stop == run.start:
            runs[-1] = PageRun(runs[-1].start, runs[-1].count + run.count)
        else:
            runs.append(run)


# ---------------------------------------------------------------- extents of one layer


def _range_page(extent: KvExtent) -> int:
    return extent.range_page


def _range_stop(extent: KvExtent) -> int:
    return extent.range_page + extent.count


def _cut(extent: KvExtent, start: int, stop: int) -> KvExtent:
    """`extent` inside range pages [start, stop); its count is 0 or less when nothing is left."""
    first, last = max(extent.range_page, start), min(_range_stop(extent), stop)
    physical_page = extent.physical_page + first - extent.range_page
    return KvExtent(extent.layer, first, physical_page, last - first)


def _merge_extents(extents: Iterable[KvExtent]) -> list[KvExtent]:
    """`extents`, ordered by range page, without empty ones and each as long as it can be."""
    merged: list[KvExtent] = []
    for extent in extents:
        if extent.count <= 0:
            continue
        last = merged[-1] if merged else None
        if (
            last is not None
            and _range_stop(last) == extent.range_page
            and last.physical_page + last.count == extent.physical_page
        ):
            count = last.count + extent.count
            merged[-1] = KvExtent(last.layer, last.range_page, last.physical_page, count)
        else:
            merged.append(extent)
    return merged


def _replace(
    extents: list[KvExtent], run: PageRun, shown: Sequence[KvExtent]
) -> tuple[KvExtent, ...]:
    """Make range pages `run` lie in `shown`; returns what they lay in before."""
    # Neighbours that end or begin exactly at the edges take part: they may merge.
    low = bisect_left(extents, run.start, key=_range_page)
    if low > 0 and _range_stop(extents[low - 1]) >= run.start:
        low -= 1
    high = bisect_right(extents, run.stop, key=_range_page)
    window = extents[low:high]
    before = [_cut(extent, 0, run.start) for extent in window]
    behind = [_cut(extent, run.stop, _range_stop(extent)) for extent in window]
    extents[low:high] = _merge_extents([*before, *shown, *behind])
    inside = (_cut(extent, run.start, run.stop) for extent in window)
    return tuple(extent for extent in inside if extent.count > 0)


def _lay(
    layer: int, range_runs: Sequence[PageRun], physical: Sequence[PageRun]
) -> tuple[KvExtent, ...]:
    """Extents that lay `physical` pages along `range_runs`, which are as many, in order.

    range       |0 1 2 3|      |9 10|
    physical    |5 6| |8 9      10 11|      extents 0-1 in 5-6, 2-3 in 8-9, 9-10 in 10-11
    """
    extents: list[KvExtent] = []
    pages = iter(physical)
    source = PageRun(0, 0)
    for run in range_runs:
        at = run.start
        while at < run.stop:
            source = source if source.count else next(pages)
            count = min(source.count, run.stop - at)
            extents.append(KvExtent(layer, at, source.start, count))
            at += count
            source = PageRun(source.start + count, source.count - count)
    return tuple(extents)


# ---------------------------------------------------------------- the split at start


@dataclass(frozen=True)
class MemoryPlan:
    """How an instance's physical pages are split at start.

    `part_pages` covers every part of the model, held or not: a part that comes later needs an
    address from the start. `kv_pages_per_layer` backs the own slot in each held layer.
    """

    geometry: PageGeometry
    num_layers: int
    num_pages: int
    part_pages: Mapping[Part, int]
    held: tuple[Part, ...]
    kv_pages_per_layer: int

    @property
    def held_layers(self) -> tuple[int, ...]:
        """Indices of the layers that are held, ascending."""
        return tuple(part.index for part in self.held if part.kind is PartKind.LAYER)

    @property
    def kv_blocks(self) -> int:
        """Usable blocks: each is backed in every held layer."""
        return self.kv_pages_per_layer * self.geometry.blocks_per_page

    @property
    def free_pages(self) -> int:
        """Pages that are left over after an even split over the held layers."""
        weights = sum(self.part_pages[part] for part in self.held)
        return self.num_pages - weights - self.kv_pages_per_layer * len(self.held_layers)


def plan_memory(
    spec: ModelSpec,
    part_bytes: Mapping[Part, int],
    held: Collection[Part],
    geometry: PageGeometry,
    *,
    kv_cache_memory_bytes: int | None = None,
    memory_bytes: int | None = None,
) -> MemoryPlan:
    """Split an instance's memory into parts, each on whole pages, and KV, even over held layers.

    Args:
        part_bytes: size of the slab of every part of the model.
        held: the parts that this instance holds at start, at least one layer.
        kv_cache_memory_bytes: memory for KV, beside the weights.
        memory_bytes: memory for weights and KV together. Exactly one of the two is given.

    Raises:
        ConfigError: not exactly one of the two sizes, weights or one page of KV per held layer do
            not fit (the message names the minimum), or a page holds no whole number of tokens.
        LayoutError: `held` names a part that the model lacks, or no layer.
    """
    held = _held_parts(spec, part_bytes, held)
    if geometry.block_bytes % spec.kv_bytes_per_token_layer:
        raise ConfigError(
            f"a block of {geometry.block_bytes} B is no whole number of tokens of "
            f"{spec.kv_bytes_per_token_layer} B"
        )
    part_pages = {part: geometry.pages_for(part_bytes[part]) for part in spec.parts}
    weight_pages = sum(part_pages[part] for part in held)
    num_layers_held = sum(part.kind is PartKind.LAYER for part in held)
    if (kv_cache_memory_bytes is None) == (memory_bytes is None):
        raise ConfigError("give exactly one of kv_cache_memory_bytes and memory_bytes")
    if kv_cache_memory_bytes is not None:
        kv_pages = kv_cache_memory_bytes // geometry.page_bytes
        if kv_pages < num_layers_held:
            raise ConfigError(
                f"--kv-cache-memory-bytes {_size(kv_cache_memory_bytes)} is too small: one page of "
                f"KV per layer needs at least {_size_up(num_layers_held * geometry.page_bytes)}"
            )
    else:
        assert memory_bytes is not None
        kv_pages = memory_bytes // geometry.page_bytes - weight_pages
        if kv_pages < num_layers_held:
            weight_bytes = weight_pages * geometry.page_bytes
            minimum_bytes = weight_bytes + num_layers_held * geometry.page_bytes
            raise ConfigError(
                f"--memory-bytes {_size(memory_bytes)} is too small: weights of "
                f"{_size_up(weight_bytes)} and one page of KV per layer need at least "
                f"{_size_up(minimum_bytes)}"
            )
    return MemoryPlan(
        geometry=geometry,
        num_layers=spec.num_layers,
        num_pages=weight_pages + kv_pages,
        part_pages=MappingProxyType(part_pages),
        held=held,
        kv_pages_per_layer=kv_pages // num_layers_held,
    )


def _size(nbytes: int) -> str:
    """For people, rounded down."""
    unit_bytes, unit = _unit(nbytes)
    return f"{nbytes // unit_bytes} {unit}"


def _size_up(nbytes: int) -> str:
    """For people, rounded up: who asks for that much has enough."""
    unit_bytes, unit = _unit(nbytes)
    return f"{-(-nbytes // unit_bytes)} {unit}"


def _unit(nbytes: int) -> tuple[int, str]:
    if nbytes >= 1 << 20:
        return 1 << 20, "MiB"
    return (1 << 10, "KiB") if nbytes >= 1 << 10 else (1, "B")


def _held_parts(
    spec: ModelSpec, part_bytes: Mapping[Part, int], held: Collection[Part]
) -> tuple[Part, ...]:
    """`held` in the order of the model, checked."""
    for part in held:
        if part not in spec.parts:
            raise LayoutError(f"the model has no {part}")
    for part in spec.parts:
        if part_bytes.get(part, 0) <= 0:
            raise LayoutError(f"the size of {part} is not known")
    ordered = tuple(part for part in spec.parts if part in held)
    if not any(part.kind is PartKind.LAYER for part in ordered):
        raise LayoutError("an instance holds at least one layer")
    return ordered


# ---------------------------------------------------------------- permanent slots


@dataclass(frozen=True)
class BlockPlace:
    """A block inside its slot: `index` counts the slot's blocks; it is block `block_in_page` of
    page `page` of the slot."""

    slot: SlotId
    index: int
    page: int
    block_in_page: int


@dataclass(frozen=True)
class SlotMap:
    """Names of KV blocks, the same in every layer and on every member of a partner domain.

    block id = slot * slot_blocks + index, and the virtual range of each layer is laid out by id:

        slot 0                 slot 1                 ...      slot num_slots - 1
        |[0..n) mapped| hole  |[0..n) mapped| hole    |  ...  |[0..n) mapped| hole      |
        0                      slot_blocks                     (num_slots - 1) * slot_blocks

    Ids never shift: a merge maps pages into other members' slots, growth maps pages at tails. An
    exchange maps and unmaps any page of a slot; pages of the range are named by range page, which
    is block id // blocks_per_page.

    Raises:
        ConfigError: more than MAX_SLOTS slots, or a slot that is no whole number of pages.
    """

    geometry: PageGeometry
    num_slots: int
    slot_blocks: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_slots <= MAX_SLOTS:
            raise ConfigError(f"a partner domain has 1 to {MAX_SLOTS} slots, got {self.num_slots}")
        if self.slot_blocks <= 0 or self.slot_blocks % self.geometry.blocks_per_page:
            raise ConfigError(
                f"a slot of {self.slot_blocks} blocks is no whole number of pages of "
                f"{self.geometry.blocks_per_page} blocks"
            )

    @classmethod
    def for_domain(
        cls, geometry: PageGeometry, *, num_slots: int, num_layers: int, member_pages: int
    ) -> SlotMap:
        """Slots that no group of the domain can outgrow.

        Why this bound: a block is usable only when it is backed in all `num_layers` layers, each
        by the member that holds the layer. A group has at most min(num_slots, num_layers) members
        (a stage has at least one layer), so it owns at most members * member_pages pages; were all
        of them KV of one slot, each layer would have members * member_pages / num_layers of them.
        Parts take pages too, so that no group ever reaches it.

        Args:
            member_pages: pages of the largest member. Every member must be given the same
                arguments: block ids travel between them.
        """
        members = min(num_slots, num_layers)
        slot_pages = -(-members * member_pages // num_layers)
        return cls(geometry, num_slots, slot_pages * geometry.blocks_per_page)

    @property
    def slot_pages(self) -> int:
        """Pages of one slot in one layer."""
        return self.slot_blocks // self.geometry.blocks_per_page

    @property
    def num_blocks(self) -> int:
        """Block ids are 0..num_blocks - 1; most are never backed."""
        return self.num_slots * self.slot_blocks

    @property
    def range_pages(self) -> int:
        """Pages of the virtual range of one layer."""
        return self.num_slots * self.slot_pages

    @property
    def range_bytes(self) -> int:
        """Bytes of the virtual range of one layer: terabytes are usual, offsets need 64 bits."""
        return self.range_pages * self.geometry.page_bytes

    def block_id(self, slot: SlotId, index: int) -> BlockId:
        """The id of block `index` of `slot`.

        Raises:
            AccountingError: no such slot or index.
        """
        self._check_slot(slot)
        if not 0 <= index < self.slot_blocks:
            raise AccountingError(f"a slot has {self.slot_blocks} blocks, no block {index}")
        return BlockId(slot * self.slot_blocks + index)

    def place(self, block: BlockId) -> BlockPlace:
        """Slot, index and page of a block id; the inverse of `block_id`.

        Raises:
            AccountingError: no such block.
        """
        if not 0 <= block < self.num_blocks:
            raise AccountingError(f"no block {block} among {self.num_blocks}")
        slot, index = divmod(block, self.slot_blocks)
        page, block_in_page = divmod(index, self.geometry.blocks_per_page)
        return BlockPlace(SlotId(slot), index, page, block_in_page)

    def block_of_page(self, slot: SlotId, page: int) -> BlockId:
        """The id of the first block of page `page` of `slot`; the others of the page follow."""
        return self.block_id(slot, page * self.geometry.blocks_per_page)

    def range_page(self, slot: SlotId, page: int) -> int:
        """Where page `page` of `slot` lies in a layer's virtual range, in pages. `page` may be
        slot_pages, the end of the slot.

        Raises:
            AccountingError: no such slot or page.
        """
        self._check_slot(slot)
        if not 0 <= page <= self.slot_pages:
            raise AccountingError(f"a slot has {self.slot_pages} pages, no page {page}")
        return slot * self.slot_pages + page

    def slot_range(self, slot: SlotId) -> PageRun:
        """The range pages of `slot`.

        Raises:
            AccountingError: no such slot.
        """
        return PageRun(self.range_page(slot, 0), self.slot_pages)

    def slot_of_page(self, range_page: int) -> SlotId:
        """The slot that `range_page` belongs to.

        Raises:
            AccountingError: no such page.
        """
        if not 0 <= range_page < self.range_pages:
            raise AccountingError(f"no range page {range_page} among {self.range_pages}")
        return SlotId(range_page // self.slot_pages)

    def offset_bytes(self, block: BlockId) -> int:
        """Where `block` begins in a layer's virtual range, in bytes.

        Raises:
            AccountingError: no such block.
        """
        if not 0 <= block < self.num_blocks:
            raise AccountingError(f"no block {block} among {self.num_blocks}")
        return block * self.geometry.block_bytes

    def _check_slot(self, slot: SlotId) -> None:
        if not 0 <= slot < self.num_slots:
            raise AccountingError(f"no slot {slot} among {self.num_slots}")
