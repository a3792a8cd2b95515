"""An instance's memory as its member sees it: drop, exchange and restore, in pages.

    part slab   |0 1 2 ... part_pages - 1|            one range per part of the model
    layer KV    |slot 0     |slot 1     | ... |       one range per layer of the model
                 p p p . .   . p . p p         .      range pages; any of them backed, in any order

`MemoryBook` joins the ledger (who owns a physical page) and a `PageMapper` (what an address shows).
Each method moves pages in both together: when one refuses, the other is as it was. The real process
gives it an arena (`kunserve.worker.memory`), the simulator a table. Source: paper mechanism 3,
design section 3.

    drop       remap: parts and KV go, KV takes their pages over
    exchange   set_escrow; map_kv(arriving=True) and unmap_kv, page by page; set_escrow(0)
    restore    begin_incoming, finish_incoming; unmap_kv of tails, map_kv of KV that comes home
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Protocol

from kunserve.core.errors import AccountingError
from kunserve.core.ids import SlotId
from kunserve.core.layout import Part, PartKind
from kunserve.core.memory import KvExtent, PageRun, PartRuns
from kunserve.policy.pages import (
    ESCROW,
    FREE,
    IncomingPages,
    KvPages,
    MemoryPlan,
    Owner,
    OwnerKind,
    PageLedger,
    PartPages,
    QuarantinedPages,
    SlotMap,
    TransferId,
    merge_range_runs,
    physical_runs,
)
from kunserve.policy.remapping import Choice, LayerRun, ShownRun, choose_pages


class PageMapper(Protocol):
    """Shows physical pages at virtual addresses; contents stay in the physical pages.

    A method that refuses raises an error of its own kind and has changed nothing. The caller has
    ended all work on pages that it unmaps.
    """

    def map_part(self, part: Part, runs: Sequence[PageRun], slab_offset: int = 0) -> None:
        """Show physical `runs`, one after the other, from page `slab_offset` of the slab of `part`
        on, where a hole is."""
        ...

    def unmap_part(self, part: Part, num_pages: int, slab_offset: int = 0) -> None:
        """Put a hole over `num_pages` of the slab of `part`, which are all mapped."""
        ...

    def map_kv(self, layer: int, range_page: int, runs: Sequence[PageRun]) -> None:
        """Show physical `runs`, one after the other, from `range_page` of `layer` on."""
        ...

    def unmap_kv(self, layer: int, range_page: int, count: int) -> None:
        """Put a hole over `count` mapped range pages of `layer`."""
        ...

    def move_part_to_kv(
        self, part: Part, slab_offset: int, layer: int, range_page: int, count: int
    ) -> None:
        """Show what `count` pages of a slab show at range pages of `layer` instead, which are
        holes; the slab has a hole then. Where the device can, they fault no more."""
        ...

    def move_kv(
        self, layer: int, range_page: int, to_layer: int, to_range_page: int, count: int
    ) -> None:
        """The same from range pages of one layer to those of another one or the same."""
        ...

    def poison(self, run: PageRun) -> None:
        """Fill physical pages with NaN; never refuses."""
        ...

    def mapped_part(self, part: Part) -> tuple[PageRun, ...]:
        """What the slab of `part` shows from its start on, as few runs as it takes."""
        ...

    def mapped_kv(self, layer: int) -> tuple[KvExtent, ...]:
        """What the KV range of `layer` shows, by range page, as few extents as it takes."""
        ...


class MemoryBook:
    """Parts and KV of one instance: the ledger and the mapper in one.

    After construction every held part is mapped (contents undefined: the loader fills it), and
    `home_runs` of the own slot in each held layer. A part is held, incoming or neither.

    Escrow pages are credit that only arrivals of an exchange may draw on. They are refilled before
    anything else becomes free: while fewer than wanted are there, no page is free.

    Args:
        plan: the split of memory.
        slots: names of blocks, the same on every member of the partner domain.
        own_slot: this instance's permanent slot.
        poison: fill pages with NaN when they change owner, so that stale bytes show. Pages of a
            finished part keep what arrived, quarantined ones are left to those who still use them.

    Raises:
        AccountingError: plan and slots do not fit each other.
        Other errors: the mapper's.
    """

    def __init__(
        self,
        plan: MemoryPlan,
        slots: SlotMap,
        own_slot: SlotId,
        mapper: PageMapper,
        *,
        poison: bool = False,
    ) -> None:
        if slots.geometry != plan.geometry:
            raise AccountingError(
                f"page sizes differ: plan {plan.geometry}, slots {slots.geometry}"
            )
        self.plan = plan
        self.slots = slots
        self.own_slot = own_slot
        self.ledger = PageLedger(plan.num_pages)
        self._mapper = mapper
        self._poisons = poison
        self._escrow_target_pages = 0
        # A slot holds all that can ever be usable: pages beyond it would be wasted and stay free.
        kv_pages = min(plan.kv_pages_per_layer, slots.slot_pages)
        self.home_runs = runs_at(slots.slot_range(own_slot).start, kv_pages)
        """Range pages of the own slot that back each held layer of the whole instance."""
        for part in plan.held:
            self.hold_part(part)
        self.map_kv_many(dict.fromkeys(plan.held_layers, self.home_runs))

    # -- what is there

    def holds(self, part: Part) -> bool:
        """True while the pages of `part` are mapped at its slab."""
        return self.ledger.pages(PartPages(part)) > 0

    @property
    def held_parts(self) -> tuple[Part, ...]:
        """Parts that are held now, in the order of the model."""
        return tuple(part for part in self.plan.part_pages if self.holds(part))

    @property
    def held_layers(self) -> tuple[int, ...]:
        """Layers that are held now, ascending."""
        return tuple(part.index for part in self.held_parts if part.kind is PartKind.LAYER)

    @property
    def incoming_parts(self) -> tuple[Part, ...]:
        """Parts on their way in, in the order of the model."""
        coming = {owner.part for owner in self.ledger.owners() if isinstance(owner, IncomingPages)}
        return tuple(part for part in self.plan.part_pages if part in coming)

    def part_runs(self) -> tuple[PartRuns, ...]:
        """The physical pages of every held part, each in the order of its slab."""
        return tuple(PartRuns(part, self.ledger.runs(PartPages(part))) for part in self.held_parts)

    def kv_runs(self, layer: int) -> tuple[PageRun, ...]:
        """The mapped range pages of `layer`.

        Raises:
            AccountingError: the model has no such layer.
        """
        self._check_layer(layer)
        extents = self.ledger.extents(layer)
        return merge_range_runs(PageRun(extent.range_page, extent.count) for extent in extents)

    def kv_extents(self) -> tuple[KvExtent, ...]:
        """Where all KV lies, by layer and range page."""
        layers = range(self.plan.num_layers)
        return tuple(extent for layer in layers for extent in self.ledger.extents(layer))

    def physical_page(self, layer: int, range_page: int) -> int:
        """The physical page behind `range_page` of `layer`.

        Raises:
            AccountingError: that range page is not mapped.
        """
        return self.ledger.page_at(KvPages(layer), range_page)

    def complete_pages(self, within: PageRun | None = None) -> tuple[PageRun, ...]:
        """Range pages that are mapped in every held layer, none where no layer is held; `within`:
        of these range pages."""
        layers = self.held_layers
        if not layers:
            return ()
        complete = self.kv_runs(layers[0])
        for layer in layers[1:]:
            complete = _intersect(complete, self.kv_runs(layer))
        return complete if within is None else _intersect(complete, (within,))

    @property
    def free_pages(self) -> int:
        """Pages that anybody may take."""
        return self.ledger.free_pages

    @property
    def escrow_pages(self) -> int:
        """Pages that only arrivals may take, of the number that `set_escrow` asked for."""
        return self.ledger.pages(ESCROW)

    def counts(self) -> dict[OwnerKind, int]:
        """Pages by kind of owner; every kind is there."""
        return self.ledger.counts()

    # -- parts

    def hold_part(self, part: Part) -> None:
        """Map free pages at the slab of `part`; their contents are undefined.

        Raises:
            AccountingError: the part is held or incoming, or there are not enough free pages.
            Other errors: the mapper's; nothing was changed.
        """
        self._map_free_part(part, PartPages(part))

    def release_part(self, part: Part) -> int:
        """Drop `part`: unmap its slab. Returns the number of pages that nobody needs any more.

        Raises:
            AccountingError: the part is not held.
            Other errors: the mapper's; nothing was changed.
        """
        return self._leave_slab(part, FREE)

    def quarantine_part(self, part: Part, transfer: TransferId) -> int:
        """Drop `part` while `transfer` may still read its pages. Returns how many those are.

        Raises:
            AccountingError, other errors: as `release_part`.
        """
        return self._leave_slab(part, QuarantinedPages(transfer))

    def begin_incoming(self, part: Part, transfer: TransferId) -> tuple[PageRun, ...]:
        """Map free pages at the slab of `part`, which nobody reads yet; returns them in its order.

        Whoever brings the part in writes there, or into the pages themselves.

        Raises:
            AccountingError: the part is held or incoming, or there are not enough free pages.
            Other errors: the mapper's; nothing was changed.
        """
        return self._map_free_part(part, IncomingPages(part, transfer))

    def finish_incoming(self, part: Part) -> None:
        """All bytes of `part` have come and are right: it is held.

        Raises:
            AccountingError: the part is not incoming.
        """
        self.ledger.transfer(self._incoming(part), PartPages(part))

    def abort_incoming(self, part: Part) -> None:
        """Give up `part`: nobody writes its pages any more, they are free.

        Raises:
            AccountingError: the part is not incoming.
            Other errors: the mapper's; nothing was changed.
        """
        incoming = self._incoming(part)
        self._mapper.unmap_part(part, self._pages_of(part))
        self._free(incoming)

    def quarantine_incoming(self, part: Part) -> None:
        """Give up `part` while its transfer may still write its pages, until `end_quarantine`.

        Raises:
            AccountingError: the part is not incoming.
        """
        incoming = self._incoming(part)
        self._mapper.unmap_part(part, self._pages_of(part))
        self.ledger.transfer(incoming, QuarantinedPages(incoming.transfer))

    def end_quarantine(self, transfer: TransferId) -> int:
        """`transfer` is done, failed, or its peer is dead. Returns the number of its pages.

        Raises:
            AccountingError: no page is quarantined for it.
        """
        return self._free(QuarantinedPages(transfer))

    # -- KV

    def map_kv(self, layer: int, range_runs: Iterable[PageRun], *, arriving: bool = False) -> None:
        """`map_kv_many` of one layer."""
        self.map_kv_many({layer: range_runs}, arriving=arriving)

    def map_kv_many(
        self, wanted: Mapping[int, Iterable[PageRun]], *, arriving: bool = False
    ) -> None:
        """Map free pages at the range pages `wanted` of each layer; their contents are undefined.

        Layers need not be held: before a restore KV gathers where its layer comes to.

        Args:
            arriving: moved KV arrives; once no page is free, it is backed from escrow.

        Raises:
            AccountingError: no such layer or range page, one is named twice or mapped already, or
                there are not enough pages.
            Other errors: the mapper's; nothing was changed.
        """
        # The longest first, as long as free runs are long: each physical run costs a mapping.
        places = sorted(self._places(wanted), key=lambda place: -place[1].count)
        with ExitStack() as undo:
            for layer, run in places:
                for piece, source in self._sources(run, arriving):
                    self.ledger.place(layer, (piece,), source)
                    undo.callback(self.ledger.remove, layer, (piece,), source)
            for layer, run in places:
                runs = self._backing(layer, run)
                self._poison(runs)
                self._mapper.map_kv(layer, run.start, runs)
                undo.callback(self._mapper.unmap_kv, layer, run.start, run.count)
            undo.pop_all()

    def unmap_kv(self, layer: int, range_runs: Iterable[PageRun]) -> None:
        """`unmap_kv_many` of one layer."""
        self.unmap_kv_many({layer: range_runs})

    def unmap_kv_many(self, given: Mapping[int, Iterable[PageRun]]) -> None:
        """Unmap the range pages `given` of each layer. Their pages fill up escrow first, the others
        are free.

        Raises:
            AccountingError: no such layer or range page, or one is named twice or not mapped.
            Other errors: the mapper's; nothing was changed.
        """
        places = self._places(given)
        runs = self._leave_kv(places, FREE)
        self._poison(runs)
        self._refill_escrow()

    def quarantine_kv(
        self, layer: int, range_runs: Iterable[PageRun], transfer: TransferId
    ) -> None:
        """Unmap range pages that `transfer` may still use, until `end_quarantine`.

        Raises:
            AccountingError, other errors: as `unmap_kv_many`.
        """
        self._leave_kv(self._places({layer: range_runs}), QuarantinedPages(transfer))

    def release_all_kv(self) -> None:
        """Unmap all KV of all layers.

        Raises:
            Other errors: the mapper's; nothing was changed.
        """
        self.unmap_kv_many({layer: self.kv_runs(layer) for layer in range(self.plan.num_layers)})

    # -- all at once

    def remap(
        self,
        drop: Collection[Part],
        give: Mapping[int, Iterable[PageRun]],
        want: Mapping[int, Iterable[PageRun]],
    ) -> int:
        """`unmap_kv_many(give)`, `release_part` of `drop` and `map_kv_many(want)` in one: their
        pages go straight to `want` as far as they are needed there, the others become free.

        Moved pages fault no more at their new address where the mapper can do that: slabs have
        been touched everywhere, so they are taken before KV, and free pages come last.

        Returns:
            How many pages were moved. The others of `want` were free.

        Raises:
            AccountingError: a part is not held; no such layer or range page, one is named twice,
                given but not mapped or wanted but mapped (even if it is given, too); or there are
                not enough pages.
            Other errors: the mapper's; nothing was changed.
        """
        for part in drop:
            if not self.holds(part):
                raise AccountingError(f"{part} is not held")
        dropped = [part for part in self.plan.part_pages if part in drop]
        given, wanted = self._places(give), self._places(want)
        for layer, run in given:
            self._backing(layer, run)
        for layer, run in wanted:
            if self.ledger.extents(layer, run):
                raise AccountingError(f"not all of {run} of layer {layer} are holes")
        slabs = [shown for part in dropped for shown in self._slab_runs(part)]
        kv = [shown for layer, run in given for shown in self._kv_runs(layer, run)]
        free = [ShownRun(None, 0, run) for run in self.ledger.runs(FREE)]
        self._check_room(wanted, (*slabs, *kv))
        choice = choose_pages(wanted, (slabs, kv, free))
        with ExitStack() as undo:
            self._carry_out(choice, undo)
            for layer, run in given:
                self.ledger.remove(layer, (run,))
            for part in dropped:
                self.ledger.give(PartPages(part))
            if choice.moves:
                self.ledger.place_at(to for _, to in choice.moves)
            undo.pop_all()
        self._poison(shown.run for shown in (*slabs, *kv))
        self._poison(source.run for source, _ in choice.moves if source.place is None)
        self._refill_escrow()
        return choice.moved_pages

    def set_escrow(self, pages: int) -> None:
        """Keep `pages` pages in escrow from now on, taken from the free ones; 0 ends it.

        Raises:
            AccountingError: there are not enough free pages, or `pages` is negative.
        """
        missing = pages - self.escrow_pages
        if pages < 0 or missing > self.free_pages:
            raise AccountingError(
                f"{pages} pages of escrow wanted, {self.escrow_pages} there and "
                f"{self.free_pages} free"
            )
        if missing > 0:
            self.ledger.take(ESCROW, missing)
        elif missing < 0:
            self.ledger.give(ESCROW, -missing)
        self._escrow_target_pages = pages

    # -- laws

    def check(self) -> None:
        """The ledger's laws, those of parts and escrow, and that the mapper shows exactly what the
        ledger says.

        Raises:
            AccountingError: one of them is broken.
        """
        self.ledger.check()
        self._check_escrow()
        coming = [owner for owner in self.ledger.owners() if isinstance(owner, IncomingPages)]
        parts = [owner.part for owner in coming]
        if len(set(parts)) < len(parts) or any(self.holds(part) for part in parts):
            raise AccountingError(f"a part is held or incoming twice: {parts}, {self.held_parts}")
        owners: list[IncomingPages | PartPages] = [*coming, *map(PartPages, self.held_parts)]
        for owner in owners:
            if self.ledger.pages(owner) != self._pages_of(owner.part):
                raise AccountingError(f"only a piece of {owner} is there")
        owner_of = {owner.part: owner for owner in owners}
        for part in self.plan.part_pages:
            part_runs = self.ledger.runs(owner_of.get(part, PartPages(part)))
            _check_shown(str(part), self._mapper.mapped_part(part), part_runs)
        for layer in range(self.plan.num_layers):
            extents = self.ledger.extents(layer)
            _check_shown(f"KV of layer {layer}", self._mapper.mapped_kv(layer), extents)

    def _check_escrow(self) -> None:
        escrow, wanted = self.escrow_pages, self._escrow_target_pages
        if escrow > wanted or (escrow < wanted and self.free_pages):
            raise AccountingError(
                f"escrow of {escrow} pages, {wanted} wanted, {self.free_pages} free"
            )

    # -- internals

    def _pages_of(self, part: Part) -> int:
        pages = self.plan.part_pages.get(part)
        if pages is None:
            raise AccountingError(f"the model has no {part}")
        return pages

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.plan.num_layers:
            raise AccountingError(f"the model has no layer {layer}")

    def _check_absent(self, part: Part) -> None:
        if self.holds(part) or part in self.incoming_parts:
            raise AccountingError(f"{part} is held or incoming already")

    def _incoming(self, part: Part) -> IncomingPages:
        for owner in self.ledger.owners():
            if isinstance(owner, IncomingPages) and owner.part == part:
                return owner
        raise AccountingError(f"{part} is not incoming")

    def _map_free_part(self, part: Part, owner: PartPages | IncomingPages) -> tuple[PageRun, ...]:
        self._check_absent(part)
        with ExitStack() as undo:
            runs = self.ledger.take(owner, self._pages_of(part))
            undo.callback(self.ledger.give, owner)
            self._poison(runs)
            self._mapper.map_part(part, runs)
            undo.pop_all()
        return runs

    def _leave_slab(self, part: Part, target: Owner) -> int:
        if not self.holds(part):
            raise AccountingError(f"{part} is not held")
        pages = self._pages_of(part)
        self._mapper.unmap_part(part, pages)
        if target == FREE:
            return self._free(PartPages(part))
        self.ledger.transfer(PartPages(part), target)
        return pages

    def _free(self, owner: Owner) -> int:
        """All pages of `owner`, which are mapped nowhere, become free; returns their number."""
        pages = self.ledger.pages(owner)
        self._poison(self.ledger.give(owner))
        self._refill_escrow()
        return pages

    def _places(self, layer_runs: Mapping[int, Iterable[PageRun]]) -> list[LayerRun]:
        """Checked range pages, as few runs as they take."""
        places: list[LayerRun] = []
        for layer, range_runs in layer_runs.items():
            self._check_layer(layer)
            runs = merge_range_runs(range_runs)
            if runs and runs[-1].stop > self.slots.range_pages:
                raise AccountingError(f"{runs[-1]} is not inside {self.slots.range_pages} pages")
            places += [(layer, run) for run in runs]
        return places

    def _sources(self, run: PageRun, arriving: bool) -> list[tuple[PageRun, Owner]]:
        """Whose pages back which piece of `run`: free ones before those in escrow."""
        if not arriving:
            return [(run, FREE)]
        free = min(run.count, self.free_pages)
        pieces: tuple[tuple[PageRun, Owner], ...] = (
            (PageRun(run.start, free), FREE),
            (PageRun(run.start + free, run.count - free), ESCROW),
        )
        return [(piece, source) for piece, source in pieces if piece.count]

    def _backing(self, layer: int, run: PageRun) -> tuple[PageRun, ...]:
        """The physical pages behind `run`, all of which must be mapped."""
        runs = physical_runs(self.ledger.extents(layer, run))
        backed = sum(backing.count for backing in runs)
        if backed != run.count:
            raise AccountingError(f"only {backed} pages of {run} of layer {layer} are mapped")
        return runs

    def _leave_kv(self, places: Sequence[LayerRun], target: Owner) -> list[PageRun]:
        """Unmap `places` and give their pages to `target`; returns the pages."""
        backing = [self._backing(layer, run) for layer, run in places]
        with ExitStack() as undo:
            for (layer, run), runs in zip(places, backing, strict=True):
                self._mapper.unmap_kv(layer, run.start, run.count)
                undo.callback(self._mapper.map_kv, layer, run.start, runs)
            for layer, run in places:
                self.ledger.remove(layer, (run,), target)
            undo.pop_all()
        return [run for runs in backing for run in runs]

    def _slab_runs(self, part: Part) -> list[ShownRun]:
        """What the slab of a held part shows, in its order."""
        shown: list[ShownRun] = []
        at = 0
        for run in self.ledger.runs(PartPages(part)):
            shown.append(ShownRun(part, at, run))
            at += run.count
        return shown

    def _kv_runs(self, layer: int, within: PageRun) -> list[ShownRun]:
        """What range pages of `layer` show."""
        return [
            ShownRun(layer, extent.range_page, PageRun(extent.physical_page, extent.count))
            for extent in self.ledger.extents(layer, within)
        ]

    def _check_room(self, wanted: Sequence[LayerRun], leaving: Sequence[ShownRun]) -> None:
        """What leaves fills up escrow first, as everywhere."""
        pages = sum(run.count for _, run in wanted)
        missing = max(0, self._escrow_target_pages - self.escrow_pages)
        freed = sum(shown.run.count for shown in leaving)
        if pages > max(0, self.free_pages + freed - missing):
            raise AccountingError(
                f"{pages} pages wanted, {self.free_pages} free, {freed} become free, "
                f"{missing} of them for escrow"
            )

    def _carry_out(self, choice: Choice, undo: ExitStack) -> None:
        """In the mapper: what is left over goes first, which makes room for mappings."""
        for shown in choice.left:
            self._unmap_shown(shown, undo)
        for source, to in choice.moves:
            self._move(source, to, undo)

    def _unmap_shown(self, shown: ShownRun, undo: ExitStack) -> None:
        place, count, runs = shown.place, shown.run.count, (shown.run,)
        if isinstance(place, Part):
            self._mapper.unmap_part(place, count, shown.at)
            undo.callback(self._mapper.map_part, place, runs, shown.at)
        elif place is not None:
            self._mapper.unmap_kv(place, shown.at, count)
            undo.callback(self._mapper.map_kv, place, shown.at, runs)

    def _move(self, source: ShownRun, to: KvExtent, undo: ExitStack) -> None:
        """The way back shows the pages in both places before they leave `to`, as the way there
        does: the mapper has had all those states, so it cannot refuse them."""
        place, runs = source.place, (source.run,)
        if isinstance(place, Part):
            self._mapper.move_part_to_kv(place, source.at, to.layer, to.range_page, to.count)
        elif place is not None:
            self._mapper.move_kv(place, source.at, to.layer, to.range_page, to.count)
        else:
            self._mapper.map_kv(to.layer, to.range_page, runs)
        undo.callback(self._mapper.unmap_kv, to.layer, to.range_page, to.count)
        if isinstance(place, Part):
            undo.callback(self._mapper.map_part, place, runs, source.at)
        elif place is not None:
            undo.callback(self._mapper.map_kv, place, source.at, runs)

    def _refill_escrow(self) -> None:
        missing = min(self._escrow_target_pages - self.escrow_pages, self.free_pages)
        if missing > 0:
            self.ledger.take(ESCROW, missing)

    def _poison(self, runs: Iterable[PageRun]) -> None:
        if self._poisons:
            for run in runs:
                self._mapper.poison(run)


def runs_at(start: int, count: int) -> tuple[PageRun, ...]:
    """Pages [start, start + count) as runs: none when there is no page."""
    return (PageRun(start, count),) if count > 0 else ()


def _intersect(left: Sequence[PageRun], right: Sequence[PageRun]) -> tuple[PageRun, ...]:
    """Pages that are in both, of two ascending lists of runs."""
    shared: list[PageRun] = []
    at_left = at_right = 0
    while at_left < len(left) and at_right < len(right):
        first, second = left[at_left], right[at_right]
        start, stop = max(first.start, second.start), min(first.stop, second.stop)
        shared += runs_at(start, stop - start)
        if first.stop <= second.stop:
            at_left += 1
        else:
            at_right += 1
    return tuple(shared)


def _check_shown(name: str, mapped: tuple[object, ...], expected: tuple[object, ...]) -> None:
    if mapped != expected:
        raise AccountingError(f"{name}: the mapper shows {mapped}, the ledger says {expected}")
