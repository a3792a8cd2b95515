"""What answers overload, one object chosen at construction (design section 5).

The controller tells it what happens; it answers with commands, most of them wishes that the
coordinator carries out as it does an operator's. The base class does nothing: that is `recompute`,
where preemption in the scheduler is the whole answer, and `swap`, where the scheduler swaps.
"""

from __future__ import annotations

from collections.abc import Iterator

from kunserve.core.events import Command, WishKind
from kunserve.core.ids import InstanceId, RequestId
from kunserve.core.layout import Group
from kunserve.core.migration import MigrationReport
from kunserve.core.request import Request
from kunserve.core.transition import TransitionRecord
from kunserve.policy.book import Book, GroupRecord, RequestRecord
from kunserve.policy.coordinator import Coordinator
from kunserve.policy.migration import Migration
from kunserve.policy.planner import Wish

Commands = Iterator[Command]

OWN_WISH = -2
"""Number of every wish of a governor: nobody waits for its answer."""


class Governor:
    """Leaves the layout alone. Others override what they need.

    An operator's wish for a layout holds until the operator restores: meanwhile a governor changes
    nothing by itself.
    """

    def __init__(self, book: Book, coordinator: Coordinator) -> None:
        self._book = book
        self._coordinator = coordinator
        self._is_held = False
        self.may_drop = book.config.may_drop
        """False: no parameter is dropped any more (kill switch)."""

    @property
    def is_settled(self) -> bool:
        """If nothing came in any more, the layout would stay as it is."""
        return True

    def submitted(self, request: Request, group: GroupRecord | None, now_ns: int) -> Commands:
        """A request was taken in, and leased to `group` if there is one."""
        yield from ()

    def started(self, request_id: RequestId, now_ns: int) -> Commands:
        """A request left the queue."""
        yield from ()

    def finished(self, record: RequestRecord) -> None:
        """A request got its last token."""

    def reported(self, group: GroupRecord, now_ns: int) -> Commands:
        """A leader has reported its load."""
        yield from ()

    def tick(self, now_ns: int) -> Commands:
        """Time passed."""
        yield from ()

    def recorded(self, record: TransitionRecord, now_ns: int) -> None:
        """A transition has committed, or is over."""

    @property
    def migrations(self) -> tuple[Migration, ...]:
        """Migrations of requests under way."""
        return ()

    def take(self, report: MigrationReport, now_ns: int) -> Commands:
        """A member's answer about a migration."""
        yield from ()

    def settle(self, now_ns: int) -> Commands:
        """After every event: end what has lost its ground by it."""
        yield from ()

    def operator_wished(self, kind: WishKind) -> None:
        """An operator decides about the layout."""
        self._is_held = kind is not WishKind.RESTORE

    def switch(self, may_drop: bool) -> None:
        """The kill switch. What is dropped stays so until it can be restored."""
        self.may_drop = may_drop
        self._is_held = False

    def _wish(self, groups: Wish, why: str, now_ns: int, expected_requests: int = 0) -> Commands:
        kind = WishKind.LAYOUT
        yield from self._coordinator.wish(OWN_WISH, kind, groups, why, now_ns, expected_requests)

    def _partition(self, changed: dict[InstanceId, tuple[InstanceId, ...]]) -> Wish:
        """The layout of now, but for instances in `changed`, which go where that says."""
        kept = tuple(
            group.instances
            for group in self._book.layout.groups
            if not any(instance in changed for instance in group.instances)
        )
        return (*kept, *dict.fromkeys(changed.values()))

    def _is_eligible(self, record: GroupRecord) -> bool:
        """It serves, and none of its instances is to be taken out of service."""
        instances = self._book.instances
        draining = any(instances[i].is_draining for i in record.group.instances)
        return not draining and not record.is_frozen


class StaticPipelines(Governor):
    """Pairs of instances are pipelines from the start (vLLM with PP 2). An instance without a
    partner stays whole, and after a death the survivor waits for its partner."""

    RETRY_NS = 2_000_000_000
    """A wish that came to nothing is repeated after this."""

    def __init__(self, book: Book, coordinator: Coordinator) -> None:
        super().__init__(book, coordinator)
        self._next_ns = 0

    @property
    def is_settled(self) -> bool:
        """Who can be paired is."""
        return self._is_held or not self._pairs()

    def tick(self, now_ns: int) -> Commands:
        """Pair whole instances, by their numbers: 0 and 1, 2 and 3, ..."""
        if self._is_held or self._coordinator.is_busy or now_ns < self._next_ns:
            return
        pairs = self._pairs()
        if pairs:
            self._next_ns = now_ns + self.RETRY_NS
            yield from self._wish(self._partition(pairs), "static pipelines", now_ns)

    def _pairs(self) -> dict[InstanceId, tuple[InstanceId, ...]]:
        whole = {
            group.leader
            for group in map(self._record_of, self._book.layout.groups)
            if len(group.group.stages) == 1 and self._is_eligible(group)
        }
        pairs: dict[InstanceId, tuple[InstanceId, ...]] = {}
        for first in sorted(whole):
            second = InstanceId(first + 1)
            if first % 2 == 0 and second in whole:
                pairs |= dict.fromkeys((first, second), (first, second))
        return pairs

    def _record_of(self, group: Group) -> GroupRecord:
        return self._book.groups[group.id]
