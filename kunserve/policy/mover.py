"""Transfers of one member: KV of an exchange on page credit, KV gathered ahead of a split, parts.

The receiver pulls (links.md). A move of KV begins when there are pages for it, free ones or escrow;
its pages are mapped first, so that what arrives lies right at once. When it is there, source and
leader hear of it: the source gives its pages up, which is the credit for its own arrivals.

A transfer that is given up may still write: its pages are in quarantine until it has ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from kunserve.core.actions import (
    Action,
    CancelPulls,
    CheckPart,
    LoadPart,
    PageCopy,
    Pull,
    SendPeer,
)
from kunserve.core.errors import AccountingError
from kunserve.core.ids import InstanceId, TransitionId
from kunserve.core.layout import Part
from kunserve.core.memory import PageRun, pages_of, runs_of
from kunserve.core.transition import PageMove, PagesPulled, PartSource
from kunserve.policy.memory import MemoryBook
from kunserve.policy.pages import TransferId

MAP_BATCH_PAGES = 1024
"""Most pages that are mapped in one go: runs of neighbours cost one driver call."""

LEAVE_BATCH_MOVES = 32
"""So many moves that have left are unmapped in one go, unless their credit is needed before."""

MOST_ATTEMPTS = 3
"""Of one transfer: a link may be set up anew in between (links.md, rule 4)."""

Digest = Callable[[Sequence[tuple[int, int, int]]], str]
"""Hash of (physical page, first block, number of blocks), one after the other."""


class Mode(Enum):
    """What the moves are for."""

    IDLE = "idle"
    GATHER = "gather"
    EXCHANGE = "exchange"


@dataclass
class _KvPull:
    """A move in the pump."""

    move: PageMove
    copies: tuple[PageCopy, ...]
    attempts: int = 1


@dataclass
class _PartPull:
    """A part on its way in. `peer` None: from the file."""

    part: Part
    source: PartSource
    attempts: int = 1
    is_here: bool = False


class Mover:
    """Transfers of one instance, one transition at a time.

    Args:
        window_pages: most pages of moves that are handed to the pump at a time; None: no bound
            (the uncoordinated exchange).
        digest: hashes pages, to compare moves with their source; None: not compared.
    """

    def __init__(
        self,
        instance: InstanceId,
        memory: MemoryBook,
        window_pages: int | None,
        digest: Digest | None = None,
    ) -> None:
        self._instance = instance
        self._memory = memory
        self._blocks_per_page = memory.plan.geometry.blocks_per_page
        self._window_pages = window_pages
        self._digest = digest
        self._actions: list[Action] = []
        self._next_transfer = 0
        self._mode = Mode.IDLE
        self._transition = TransitionId(-1)
        self._leader = instance
        self._queue: deque[PageMove] = deque()
        self._mapped: deque[PageMove] = deque()  # their pages are there, nothing in them yet
        self._arrivals: dict[int, dict[int, int]] = {}  # layer -> range page -> physical, of those
        self._pulls: dict[int, _KvPull] = {}
        self._failed: list[PageMove] = []
        self._departures: dict[int, PageMove] = {}
        self._left: list[PageMove] = []  # acknowledged, still mapped here
        self._arrived: list[PageMove] = []  # not announced yet
        self._gathered: list[int] = []
        self._gains: deque[PartSource] = deque()
        self._parts: dict[int, _PartPull] = {}
        self._quarantined: set[int] = set()
        self._abandoned: dict[int, Part] = {}
        self.refusal = ""
        """Why parts cannot be brought in; empty while they can."""
        self.pulled_moves = 0
        self.pulled_pages = 0
        self.gained_pages = 0
        self.gained_from_file = 0

    # ------------------------------------------------------------ what others may read

    @property
    def has_quarantine(self) -> bool:
        """True while a transfer that was given up may still write."""
        return bool(self._quarantined or self._abandoned)

    @property
    def is_bringing(self) -> bool:
        """True while parts are on their way in."""
        return bool(self._gains or self._parts)

    @property
    def is_moving(self) -> bool:
        """True while KV is to be pulled, or to be given up."""
        return bool(self._queue or self._pulls or self._failed or self._departures or self._arrived)

    @property
    def gathered(self) -> tuple[int, ...]:
        """Moves that were pulled ahead."""
        return tuple(self._gathered)

    @property
    def waits_for(self) -> InstanceId | None:
        """Who must do something next for the exchange to get on here."""
        if self._failed:
            return self._failed[0].source
        for pull in self._pulls.values():
            return pull.move.source
        for move in self._departures.values():
            return move.target
        return None

    def take_actions(self) -> list[Action]:
        """What to do now, since the last call."""
        actions, self._actions = self._actions, []
        return actions

    # ------------------------------------------------------------ parts

    def bring(self, sources: Iterable[PartSource]) -> None:
        """Bring parts in: those with a peer from the front of the list, and from the file what has
        no peer, then whatever is left at its end, both at once."""
        self._gains = deque(s for s in sources if not self._memory.holds(s.part))
        self.refusal = ""
        self.gained_pages = self.gained_from_file = 0
        self._fill_parts()

    def _fill_parts(self) -> None:
        """One part from a peer and one from the file at a time, beside those being compared."""
        if self.refusal:
            return
        from_file = any(p.source.peer is None for p in self._parts.values())
        from_peer = any(p.source.peer is not None and not p.is_here for p in self._parts.values())
        if not from_peer:
            source = next((s for s in self._gains if s.peer is not None), None)
            if source is not None:
                self._gains.remove(source)
                self._begin_part(source)
        if not from_file and self._gains:
            source = next((s for s in self._gains if s.peer is None), self._gains[-1])
            self._gains.remove(source)
            self._begin_part(PartSource(source.part, None))

    def _begin_part(self, source: PartSource, attempts: int = 1) -> None:
        transfer = self.new_transfer()
        try:
            runs = self._memory.begin_incoming(source.part, TransferId(transfer))
        except AccountingError as error:
            self._gains.clear()
            self.refusal = str(error)
            return
        self._parts[transfer] = _PartPull(source.part, source, attempts)
        if source.peer is None:
            self._actions.append(LoadPart(transfer, source.part))
            return
        pairs = zip(pages_of(runs), pages_of(source.runs), strict=True)
        copies = tuple(PageCopy(here, there, 0, self._blocks_per_page) for here, there in pairs)
        self._actions.append(Pull(transfer, source.peer, copies, is_weights=True))

    def part_ready(self, transfer: int, error: str | None) -> None:
        """A part was read or compared; with an error it is brought in again, from the file."""
        if self._leave_quarantine(transfer):
            return
        pull = self._parts.pop(transfer)
        if error is None:
            self._memory.finish_incoming(pull.part)
            pages = self._memory.plan.part_pages[pull.part]
            self.gained_pages += pages
            self.gained_from_file += pages if pull.source.peer is None else 0
        else:
            self._memory.abort_incoming(pull.part)
            self._retry_part(pull, error)
        self._fill_parts()

    def _retry_part(self, pull: _PartPull, error: str) -> None:
        if pull.attempts >= MOST_ATTEMPTS:
            self._gains.clear()
            self.refusal = f"{pull.part} cannot be brought in: {error}"
            return
        self._begin_part(PartSource(pull.part, None), pull.attempts + 1)

    # ------------------------------------------------------------ KV

    def gather(self, transition: TransitionId, moves: Sequence[PageMove]) -> None:
        """Pull full blocks ahead, as far as free pages go; nobody is told until `Gathered`."""
        self._begin(Mode.GATHER, transition, moves)

    def exchange(
        self, transition: TransitionId, leader: InstanceId, moves: Sequence[PageMove]
    ) -> None:
        """Pull `moves` on credit; each is announced to its source and to the new leader."""
        self._leader = leader
        self._begin(Mode.EXCHANGE, transition, moves)

    def expect_departures(self, departures: Iterable[PageMove]) -> None:
        """Pages that others will pull from here: kept until they say that they have them."""
        self._departures = {move.number: move for move in departures}

    def _begin(self, mode: Mode, transition: TransitionId, moves: Sequence[PageMove]) -> None:
        if self._pulls or self._queue or self._mapped:
            raise AccountingError("moves of another transition are still under way")
        self._mode, self._transition = mode, transition
        self._queue = deque(moves)
        self._gathered.clear()
        self.pulled_moves = self.pulled_pages = 0
        self._fill()

    def _fill(self) -> None:
        """Hand moves to the pump as long as there is credit and room in the window."""
        if self._queue and not self._mapped:
            self._map_ahead()
        while self._mapped and self._has_room():
            move = self._mapped.popleft()
            self._pull(_KvPull(move, self._copies(move)))

    def _map_ahead(self) -> None:
        """Map the pages of the next moves, as far as credit goes.

        Taking credit early is safe: every mapped move can be pulled, so it ends, and any order of
        moves will do (`kunserve.policy.exchange`).
        """
        self._unmap_left()  # pages that have left are credit
        is_gather = self._mode is Mode.GATHER
        credit = self._memory.free_pages + (0 if is_gather else self._memory.escrow_pages)
        wanted: dict[int, set[int]] = {}
        pages = 0
        there: dict[int, set[int]] = {}
        while self._queue and pages < MAP_BATCH_PAGES:
            move = self._queue[0]
            for layer in move.layers:
                if layer not in there:
                    there[layer] = set(pages_of(self._memory.kv_runs(layer)))
            absent = [layer for layer in move.layers if move.page not in there[layer]]
            if pages + len(absent) > credit:
                if is_gather:
                    self._queue.clear()
                break
            self._mapped.append(self._queue.popleft())
            pages += len(absent)
            for layer in absent:
                wanted.setdefault(layer, set()).add(move.page)
        if wanted:
            runs = {layer: runs_of(given) for layer, given in wanted.items()}
            self._memory.map_kv_many(runs, arriving=not is_gather)
        # Looked up once for the batch: a move asks for as many pages as it has layers.
        self._arrivals = {layer: self._physical_pages(layer) for layer in there}

    def _physical_pages(self, layer: int) -> dict[int, int]:
        return {
            extent.range_page + offset: extent.physical_page + offset
            for extent in self._memory.ledger.extents(layer)
            for offset in range(extent.count)
        }

    def _has_room(self) -> bool:
        if self._window_pages is None or not self._pulls:
            return True
        pages = sum(len(pull.move.layers) for pull in self._pulls.values())
        return pages + len(self._mapped[0].layers) <= self._window_pages

    def _copies(self, move: PageMove) -> tuple[PageCopy, ...]:
        return tuple(
            PageCopy(self._arrivals[layer][move.page], remote, first, count)
            for layer, remote in zip(move.layers, move.physical_pages, strict=True)
            for first, count in _block_runs(move.block_mask)
        )

    def _pull(self, pull: _KvPull) -> None:
        transfer = self.new_transfer()
        self._pulls[transfer] = pull
        self._actions.append(Pull(transfer, pull.move.source, pull.copies))

    def pulled(self, transfer: int, error: str | None) -> None:
        """A pull has ended: no byte of it is written any more."""
        if self._leave_quarantine(transfer):
            return
        part = self._parts.get(transfer)
        if part is not None:
            if error is None:
                part.is_here = True
                self._actions.append(CheckPart(transfer, part.part))
                self._fill_parts()
            else:
                self.part_ready(transfer, error)
            return
        pull = self._pulls.pop(transfer)
        if error is not None:
            if pull.attempts < MOST_ATTEMPTS:
                self._pull(_KvPull(pull.move, pull.copies, pull.attempts + 1))
            elif self._mode is Mode.EXCHANGE:
                self._failed.append(pull.move)  # the front sees that nothing gets on
        else:
            self.pulled_moves += 1
            self.pulled_pages += len(pull.move.layers)
            if self._mode is Mode.GATHER:
                self._gathered.append(pull.move.number)
            else:
                self._arrived.append(pull.move)
        self._fill()

    def announce(self) -> PagesPulled | None:
        """Tell sources what has arrived; returns what the leader must hear, if that is this
        instance."""
        arrived, self._arrived = self._arrived, []
        if not arrived:
            return None
        by_source: dict[InstanceId, list[PageMove]] = {}
        for move in arrived:
            by_source.setdefault(move.source, []).append(move)
        for source, moves in by_source.items():
            if source != self._leader:
                self._actions.append(SendPeer(source, self._message(moves)))
        if self._leader == self._instance:
            return self._message(arrived)
        # To the leader all of them; to a leader that is a source as well, it says both.
        self._actions.append(SendPeer(self._leader, self._message(arrived)))
        return None

    def _message(self, moves: Sequence[PageMove]) -> PagesPulled:
        digests: tuple[str, ...] = ()
        if self._digest is not None:
            digests = tuple(self._digest(self._places(move)) for move in moves)
        return PagesPulled(
            sender=self._instance,
            transition=self._transition,
            moves=tuple(move.number for move in moves),
            pages=tuple(move.page for move in moves),
            digests=digests,
        )

    def _places(self, move: PageMove) -> list[tuple[int, int, int]]:
        return [
            (self._memory.physical_page(layer, move.page), first, count)
            for layer in move.layers
            for first, count in _block_runs(move.block_mask)
        ]

    def depart(self, message: PagesPulled) -> None:
        """A receiver has these pages: they are given up here, which is credit.

        Raises:
            AccountingError: what arrived is not what is here.
        """
        for index, number in enumerate(message.moves):
            move = self._departures.get(number)
            if move is None:
                continue  # it left another source; this instance is only the leader
            digest = message.digests[index] if message.digests else ""
            if digest and self._digest is not None and digest != self._digest(self._places(move)):
                raise AccountingError(f"{move} arrived changed at {message.sender}")
            del self._departures[number]
            self._left.append(move)
        if not self._departures or len(self._left) >= LEAVE_BATCH_MOVES:
            self._unmap_left()
        self._fill()

    def _unmap_left(self) -> None:
        pages: dict[int, set[int]] = {}
        for move in self._left:
            for layer in move.layers:
                pages.setdefault(layer, set()).add(move.page)
        self._left.clear()
        if pages:
            self._memory.unmap_kv_many({layer: runs_of(given) for layer, given in pages.items()})

    # ------------------------------------------------------------ giving up

    def give_up(self) -> None:
        """End everything: parts on their way in are given back, pages that may still be written go
        to quarantine. What has arrived stays where it is."""
        self._queue.clear()
        self._mapped.clear()
        self._left.clear()
        self._gains.clear()
        self._failed.clear()
        self._arrived.clear()
        self._gathered.clear()
        self._departures.clear()
        self.refusal = ""
        if self._pulls or self._parts:
            self._actions.append(CancelPulls())
        # A part stays at its slab until nobody reads or writes there any more.
        self._abandoned |= {transfer: pull.part for transfer, pull in self._parts.items()}
        for transfer, pull in self._pulls.items():
            for layer in pull.move.layers:
                run = (PageRun(pull.move.page, 1),)
                self._memory.quarantine_kv(layer, run, TransferId(transfer))
            self._quarantined.add(transfer)
        self._parts.clear()
        self._pulls.clear()
        self._mode = Mode.IDLE

    def _leave_quarantine(self, transfer: int) -> bool:
        if transfer in self._abandoned:
            self._memory.abort_incoming(self._abandoned.pop(transfer))
            return True
        if transfer not in self._quarantined:
            return False
        self._quarantined.remove(transfer)
        self._memory.end_quarantine(TransferId(transfer))
        return True

    def new_transfer(self) -> int:
        """A number that no transfer of this instance has had."""
        self._next_transfer += 1
        return self._next_transfer


def _block_runs(mask: int) -> list[tuple[int, int]]:
    """Runs of set bits, (first, count), ascending."""
    runs: list[tuple[int, int]] = []
    bit = 0
    while mask >> bit:
        if mask >> bit & 1:
            first = bit
            while mask >> bit & 1:
                bit += 1
            runs.append((first, bit - first))
        else:
            bit += 1
    return runs
