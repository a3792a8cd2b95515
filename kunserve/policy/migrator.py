"""Migrations of one member, as source and as target (see `kunserve.core.migration`).

    source   offers full blocks of a request that runs on; stops it when it is told to; then, by the
             end of the migration, forgets it or lets it run on
    target   sets blocks aside, pulls into them, and takes the request in, or gives them back

A pull counts only if the source confirms afterwards that the request has never left its running set
in between: full blocks of a running request never change. So nothing is pinned at the source: a
request under migration is preempted and ends as any other, and that is its migration's end.

A pull that was given up may still write: blocks stay set aside until it has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kunserve.core.actions import Action, CancelPulls, PageCopy, Pull, SendFront
from kunserve.core.ids import BlockId, InstanceId, MigrationId, RequestId
from kunserve.core.migration import (
    ActivateRequest,
    BlocksOffered,
    BlocksPulled,
    EndMigration,
    MigrationEnded,
    MigrationOrder,
    MigrationRefused,
    OfferBlocks,
    PullBlocks,
    RequestsWithdrawn,
    SourceBlocks,
    SourcePage,
    StopRequest,
    WithdrawRequests,
)
from kunserve.core.transition import FrozenRequest
from kunserve.policy.memory import MemoryBook
from kunserve.policy.mover import MOST_ATTEMPTS
from kunserve.policy.scheduler import Scheduler


@dataclass
class _Outgoing:
    """A request that another instance copies. `stop_from`: the first entry that is asked for when
    it stops; None while it runs on."""

    request_id: RequestId
    stop_from: int | None = None
    has_stopped: bool = False


@dataclass
class _Incoming:
    """Blocks set aside, and the pulls into them that are under way: copies and attempts."""

    source: InstanceId
    pulls: dict[int, tuple[tuple[PageCopy, ...], int]] = field(default_factory=dict)
    is_over: bool = False


class Migrator:
    """What a member does for migrations. `scheduler` is that of the group which an order names, or
    None if this member leads no such group (any more).

    Args:
        new_transfer: gives numbers of pulls that nobody else uses.
    """

    def __init__(
        self,
        instance: InstanceId,
        incarnation: int,
        block_size: int,
        memory: MemoryBook,
        new_transfer: Callable[[], int],
    ) -> None:
        self._name = (instance, incarnation)
        self._block_size = block_size
        self._memory = memory
        self._blocks_per_page = memory.plan.geometry.blocks_per_page
        self._new_transfer = new_transfer
        self._outgoing: dict[MigrationId, _Outgoing] = {}
        self._incoming: dict[MigrationId, _Incoming] = {}
        self._actions: list[Action] = []
        self._orders: dict[type, Callable[[Any, Scheduler], None]] = {
            OfferBlocks: self._on_offer,
            StopRequest: self._on_stop,
            PullBlocks: self._on_pull,
            ActivateRequest: self._on_activate,
            WithdrawRequests: self._on_withdraw,
        }

    @property
    def is_busy(self) -> bool:
        """True while a migration touches this member: it votes for no other layout before."""
        return bool(self._outgoing or self._incoming)

    def take_actions(self) -> list[Action]:
        """What to do now, since the last call: after the report of what was sampled before."""
        actions, self._actions = self._actions, []
        return actions

    # ------------------------------------------------------------ orders

    def take(self, order: MigrationOrder, scheduler: Scheduler | None) -> None:
        """Follow an order of the front."""
        if isinstance(order, EndMigration):
            self._on_end(order, scheduler)
        elif scheduler is not None:
            self._orders[type(order)](order, scheduler)
        elif isinstance(order, WithdrawRequests):
            self._say(RequestsWithdrawn(*self._name, order.group, order.epoch, ()))
        elif not isinstance(order, ActivateRequest):
            self._refuse(order.migration, f"it does not lead group {order.group}")

    def step(self, scheduler: Scheduler | None) -> None:
        """Before anything is planned: stop what is to stop and is in no step, and say what has left
        the running set by itself."""
        for migration, outgoing in tuple(self._outgoing.items()):
            if scheduler is None or outgoing.has_stopped:
                continue
            if not scheduler.is_offered(outgoing.request_id):
                del self._outgoing[migration]
                self._refuse(migration, f"request {outgoing.request_id} runs here no more")
            elif outgoing.stop_from is not None:
                holding = scheduler.take_out(outgoing.request_id)
                if holding is not None:
                    outgoing.has_stopped = True
                    covered = -(-holding.computed_tokens // self._block_size)
                    self._offer(migration, holding, outgoing.stop_from, covered, is_stopped=True)

    def leave_group(self) -> None:
        """The scheduler is no more, and all that it held; pulls under way come to their end."""
        self._outgoing.clear()
        for migration in tuple(self._incoming):
            self._give_up(migration, None)

    def _say(self, message: Any) -> None:
        self._actions.append(SendFront(message))

    def _refuse(self, migration: MigrationId, reason: str) -> None:
        self._say(MigrationRefused(*self._name, migration, reason))

    def _on_end(self, order: EndMigration, scheduler: Scheduler | None) -> None:
        outgoing = self._outgoing.pop(order.migration, None)
        if outgoing is not None and scheduler is not None:
            scheduler.end_offer(outgoing.request_id)
            if order.has_moved:
                scheduler.give_away(outgoing.request_id)
            else:
                scheduler.put_back(outgoing.request_id)
        if order.migration in self._incoming:
            self._give_up(order.migration, scheduler)
        else:
            self._say(MigrationEnded(*self._name, order.migration))

    # ------------------------------------------------------------ the source

    def _on_offer(self, order: OfferBlocks, scheduler: Scheduler) -> None:
        known = self._outgoing.get(order.migration)
        if known is not None and not scheduler.is_offered(known.request_id):
            return  # the next step says so
        holding = scheduler.offer(order.request_id)
        if holding is None:
            self._refuse(order.migration, f"request {order.request_id} does not run here")
            return
        self._outgoing.setdefault(order.migration, _Outgoing(order.request_id))
        full = holding.computed_tokens // self._block_size
        self._offer(order.migration, holding, order.first, full)

    def _offer(
        self,
        migration: MigrationId,
        holding: FrozenRequest,
        first: int,
        end: int,
        is_stopped: bool = False,
    ) -> None:
        """Entries [first, end) of a table, and where they lie."""
        blocks = holding.block_table[first:end]
        pages = dict.fromkeys(block // self._blocks_per_page for block in blocks)
        layers = range(self._memory.plan.num_layers)
        places = tuple(
            SourcePage(page, tuple(self._memory.physical_page(layer, page) for layer in layers))
            for page in pages
        )
        offered = SourceBlocks(first, blocks, places)
        self._say(
            BlocksOffered(*self._name, migration, holding.computed_tokens, offered, is_stopped)
        )

    def _on_stop(self, order: StopRequest, scheduler: Scheduler) -> None:
        outgoing = self._outgoing.get(order.migration)
        if outgoing is not None:
            outgoing.stop_from = order.first

    def _on_withdraw(self, order: WithdrawRequests, scheduler: Scheduler) -> None:
        given = scheduler.withdraw(order.room_blocks, frozenset(order.keep))
        self._say(RequestsWithdrawn(*self._name, order.group, order.epoch, given))

    # ------------------------------------------------------------ the target

    def _on_pull(self, order: PullBlocks, scheduler: Scheduler) -> None:
        wanted = max(order.reserved_blocks, order.blocks.end)
        table = scheduler.reserve(order.migration, wanted)
        if table is None:
            self._refuse(order.migration, f"there is no room for {wanted} blocks")
            return
        incoming = self._incoming.setdefault(order.migration, _Incoming(order.source))
        targets = table[order.blocks.first : order.blocks.end]
        copies = self._copies(order.blocks, targets)
        if copies:
            self._pull(incoming, copies)
        else:
            self._say(BlocksPulled(*self._name, order.migration))

    def _copies(self, source: SourceBlocks, targets: tuple[BlockId, ...]) -> tuple[PageCopy, ...]:
        """Layer by layer; neighbours on both sides are one copy."""
        physical = {place.page: place.physical_pages for place in source.pages}
        runs = block_runs(source.blocks, targets, self._blocks_per_page)
        copies = []
        for layer in range(self._memory.plan.num_layers):
            for there, here, count in runs:
                page, first = divmod(here, self._blocks_per_page)
                remote_page, remote_first = divmod(there, self._blocks_per_page)
                copies.append(
                    PageCopy(
                        local_page=self._memory.physical_page(layer, page),
                        remote_page=physical[remote_page][layer],
                        first_block=first,
                        num_blocks=count,
                        shift_blocks=remote_first - first,
                    )
                )
        return tuple(copies)

    def _pull(self, incoming: _Incoming, copies: tuple[PageCopy, ...], attempts: int = 1) -> None:
        transfer = self._new_transfer()
        incoming.pulls[transfer] = (copies, attempts)
        self._actions.append(Pull(transfer, incoming.source, copies))

    def pulled(self, transfer: int, error: str | None, scheduler: Scheduler | None) -> bool:
        """A pull has ended: it writes nothing any more. False if it is none of a migration."""
        found = [m for m, incoming in self._incoming.items() if transfer in incoming.pulls]
        if not found:
            return False
        migration, incoming = found[0], self._incoming[found[0]]
        copies, attempts = incoming.pulls.pop(transfer)
        if incoming.is_over:
            self._end_if_still(migration, scheduler)
        elif error is None:
            self._say(BlocksPulled(*self._name, migration))
        elif attempts < MOST_ATTEMPTS:
            self._pull(incoming, copies, attempts + 1)
        else:
            self._refuse(migration, f"pulls from instance {incoming.source} fail: {error}")
        return True

    def _on_activate(self, order: ActivateRequest, scheduler: Scheduler) -> None:
        scheduler.take_in(order.migration, order.request, order.computed_tokens)
        del self._incoming[order.migration]

    def _give_up(self, migration: MigrationId, scheduler: Scheduler | None) -> None:
        incoming = self._incoming[migration]
        if incoming.pulls and not incoming.is_over:
            self._actions.append(CancelPulls())
        incoming.is_over = True
        self._end_if_still(migration, scheduler)

    def _end_if_still(self, migration: MigrationId, scheduler: Scheduler | None) -> None:
        """Give back what was set aside, once nothing is written there any more."""
        if self._incoming[migration].pulls:
            return
        del self._incoming[migration]
        if scheduler is not None:
            scheduler.release_reserved(migration)
        self._say(MigrationEnded(*self._name, migration))


def block_runs(
    sources: tuple[BlockId, ...], targets: tuple[BlockId, ...], blocks_per_page: int
) -> list[tuple[BlockId, BlockId, int]]:
    """Pairs of blocks as runs (source, target, count) that are consecutive on both sides, each
    inside one page of either."""
    runs: list[tuple[BlockId, BlockId, int]] = []
    for source, target in zip(sources, targets, strict=True):
        if runs:
            there, here, count = runs[-1]
            follows = (source, target) == (there + count, here + count)
            if follows and source % blocks_per_page and target % blocks_per_page:
                runs[-1] = (there, here, count + 1)
                continue
        runs.append((source, target, 1))
    return runs
