"""`--policy migrate`: balance memory by moving requests between whole instances, as Llumnix does.

Beside the controller, on the same book: `kunserve.policy.balance` says who should move, the
protocol of `kunserve.policy.migration` moves a running request. One that waits has no KV: its
instance gives it back, and it is dispatched again.

Groups in a transition, or of several stages, are left alone: nothing begins while the layout is
about to change, and what is under way ends then. An instance takes part in one migration at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from kunserve.core.events import KillInstance, LogMigration, LogRedispatch, RevokeLease
from kunserve.core.ids import GroupId, InstanceId, MigrationId, RequestId
from kunserve.core.migration import (
    ActivateRequest,
    BlocksOffered,
    BlocksPulled,
    EndMigration,
    MigrationEnded,
    MigrationRefused,
    MigrationReport,
    OfferBlocks,
    PullBlocks,
    RequestsWithdrawn,
    StopRequest,
    WithdrawRequests,
)
from kunserve.policy.balance import (
    REST_NS,
    InstanceRoom,
    RunningRequest,
    choose_pairs,
    choose_relief,
    choose_request,
)
from kunserve.policy.book import Book, GroupRecord, InstanceState, RequestRecord
from kunserve.policy.coordinator import Coordinator
from kunserve.policy.governor import Commands, Governor
from kunserve.policy.migration import Cue, Migration, Phase, Place
from kunserve.policy.prefix import block_hashes

DECIDE_INTERVAL_NS = 50_000_000
"""At most so often the rules are asked."""

PAUSE_NS = 200_000_000
"""An instance whose migration has just ended is in none for so long: what it reported before is out
of date."""

LAST_BLOCKS = 2
"""When no more than so many blocks have become full since they were asked for, the request stops:
what is left is small. It also stops when that is more than half of what was copied meanwhile: then
it writes about as fast as it is copied, and further stages would win little."""


class MigrateGovernor(Governor):
    """Decides on migrations of the groups in `book`, and carries them out.

    Args:
        dispatch: leases a request that no group has.
    """

    def __init__(
        self,
        book: Book,
        coordinator: Coordinator,
        dispatch: Callable[[RequestId], Commands],
    ) -> None:
        super().__init__(book, coordinator)
        self._dispatch = dispatch
        self._migrations: dict[MigrationId, Migration] = {}
        self._withdrawing: Place | None = None  # whose queue was asked to give requests back
        self._next_relief_ns = 0
        self._next_id = 0
        self._next_decision_ns = 0
        self._rests: dict[RequestId, int] = {}  # who was moved, and until when it stays
        self._pauses: dict[InstanceId, int] = {}
        self._entries: dict[Phase, Callable[[Migration, int], Commands]] = {
            Phase.OFFER: self._enter_offer,
            Phase.PULL: self._enter_pull,
            Phase.STOP: self._enter_stop,
            Phase.REST: self._enter_pull,
            Phase.CLEAR: self._enter_clear,
            Phase.DONE: self._enter_done,
            Phase.CANCELLED: self._enter_cancelled,
        }
        self._answers: dict[type, Callable[[Migration, Any, int], Commands]] = {
            BlocksOffered: self._on_offered,
            BlocksPulled: self._on_pulled,
            MigrationRefused: self._on_refused,
            MigrationEnded: self._on_ended,
        }

    @property
    def migrations(self) -> tuple[Migration, ...]:
        """Those under way."""
        return tuple(self._migrations.values())

    # ------------------------------------------------------------ what the controller calls

    def tick(self, now_ns: int) -> Commands:
        """Look at deadlines, then decide."""
        for migration in self.migrations:
            if now_ns > migration.deadline_ns:
                if migration.can_turn_back:
                    migration.reason = f"no answer in {migration.phase.value}"
                yield from self._signal(migration, Cue.LATE, now_ns)
        self._rests = {r: until_ns for r, until_ns in self._rests.items() if until_ns > now_ns}
        yield from self._decide(now_ns)

    def reported(self, group: GroupRecord, now_ns: int) -> Commands:
        """The load of a group is known anew."""
        yield from self._decide(now_ns)

    def settle(self, now_ns: int) -> Commands:
        """After every event: end what has lost its ground by it."""
        for migration in self.migrations:
            if migration.can_turn_back:
                reason = self._lost_ground(migration)
                if reason:
                    migration.reason = reason
                    yield from self._signal(migration, Cue.GROUNDLESS, now_ns)
            if migration.phase is Phase.CLEAR and not self._lives(migration.target):
                yield from self._signal(migration, Cue.TARGET_GONE, now_ns)
        if self._withdrawing is not None and not self._lives(self._withdrawing):
            self._withdrawing = None

    def take(self, report: MigrationReport, now_ns: int) -> Commands:
        """An answer of a member. What belongs to a migration that is over is dropped."""
        if isinstance(report, RequestsWithdrawn):
            yield from self._on_withdrawn(report, now_ns)
            return
        migration = self._migrations.get(report.migration)
        if migration is not None and report.instance in migration.instances:
            yield from self._answers[type(report)](migration, report, now_ns)

    # ------------------------------------------------------------ ground

    def _lives(self, place: Place) -> bool:
        record = self._book.instances[place.instance]
        return record.is_alive and record.incarnation == place.incarnation

    def _leads(self, place: Place) -> bool:
        """The instance still leads the group, and that is in no transition."""
        group = self._book.groups.get(place.group)
        return self._lives(place) and group is not None and group.epoch == place.epoch

    def _lost_ground(self, migration: Migration) -> str:
        """Why a migration cannot go on; empty if it can."""
        for place in (migration.source, migration.target):
            if not self._leads(place):
                return f"instance {place.instance} was lost, or is in another group"
        record = self._book.requests.get(migration.request_id)
        if record is None or record.group != migration.source.group:
            return "the request has ended"
        if self._coordinator.is_busy or self._book.groups[migration.target.group].is_frozen:
            return "the layout changes"
        return ""

    # ------------------------------------------------------------ decisions

    def _decide(self, now_ns: int) -> Commands:
        if self._coordinator.is_busy or now_ns < self._next_decision_ns:
            return
        self._next_decision_ns = now_ns + DECIDE_INTERVAL_NS
        groups = [group for group in self._book.groups.values() if self._may_take_part(group)]
        rooms = [self._room(group) for group in groups]
        yield from self._relieve(rooms, now_ns)
        moving = {i for migration in self.migrations for i in migration.instances}
        if self._withdrawing is not None:
            moving.add(self._withdrawing.instance)
        moving |= {i for i, until_ns in self._pauses.items() if now_ns < until_ns}
        free = [
            room
            for group, room in zip(groups, rooms, strict=True)
            if group.leader not in moving and group.load is not None
        ]
        for source, target in choose_pairs(free):
            request = choose_request(source, target, self._movable(source.group, now_ns))
            if request is not None:
                yield from self._begin(request.request_id, source.group, target.group, now_ns)

    def _may_take_part(self, group: GroupRecord) -> bool:
        record = self._book.instances[group.leader]
        is_whole = len(group.group.stages) == 1
        return is_whole and not group.is_frozen and record.state is InstanceState.READY

    def _room(self, group: GroupRecord) -> InstanceRoom:
        load, coming = group.load, group.unseen_blocks
        if load is None:
            return InstanceRoom(group.id, group.total_blocks, group.total_blocks - coming, 0, 0, 0)
        return InstanceRoom(
            group=group.id,
            total_blocks=load.total_blocks,
            free_blocks=load.available_blocks - coming,
            head_blocks=load.head_blocks,
            queued_blocks=load.queued_blocks,
            num_running=load.num_running,
        )

    def _movable(self, group: GroupId, now_ns: int) -> Iterator[RunningRequest]:
        """Requests that have begun to give tokens. Suspects stay: see `Controller._blame`."""
        for request_id in self._book.groups[group].requests:
            record = self._book.requests[request_id]
            is_resting = self._rests.get(request_id, 0) > now_ns
            if record.outputs and not record.losses and not is_resting:
                yield RunningRequest(
                    request_id=request_id,
                    blocks=self._blocks_for(_known_tokens(record)),
                    remaining_tokens=record.request.params.max_tokens - len(record.outputs),
                )

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._book.config.block_size)

    # ------------------------------------------------------------ queues

    def _relieve(self, rooms: list[InstanceRoom], now_ns: int) -> Commands:
        """Ask a blocked queue for what fits elsewhere. It knows best who waits: also requests that
        ran before and were preempted."""
        if self._withdrawing is not None or now_ns < self._next_relief_ns:
            return
        relief = choose_relief(rooms)
        if relief is None:
            return
        group = self._book.groups[relief.group]
        suspects = tuple(r for r in sorted(group.requests) if self._book.requests[r].losses)
        self._withdrawing = self._place(group)
        yield WithdrawRequests(group.leader, group.id, group.epoch, relief.room_blocks, suspects)

    def _on_withdrawn(self, report: RequestsWithdrawn, now_ns: int) -> Commands:
        """Its scheduler has forgotten them, and said all of their tokens before: dispatch anew."""
        self._withdrawing = None
        self._next_relief_ns = now_ns + (0 if report.request_ids else PAUSE_NS)
        group = self._book.groups.get(report.group)
        if group is None or group.epoch != report.epoch:
            return
        returned = [r for r in report.request_ids if r in group.requests]
        for request_id in returned:
            group.requests.discard(request_id)
            self._book.requests[request_id].group = None
            yield RevokeLease(group.leader, group.id, group.epoch, request_id)
        for request_id in returned:
            yield from self._dispatch(request_id)
        if returned:
            yield LogRedispatch(report.instance, tuple(returned))

    # ------------------------------------------------------------ a migration's life

    def _place(self, group: GroupRecord) -> Place:
        incarnation = self._book.instances[group.leader].incarnation
        return Place(group.leader, incarnation, group.id, group.epoch)

    def _begin(
        self, request_id: RequestId, source: GroupId, target: GroupId, now_ns: int
    ) -> Commands:
        groups = self._book.groups
        migration = Migration(
            id=MigrationId(self._next_id),
            request_id=request_id,
            source=self._place(groups[source]),
            target=self._place(groups[target]),
            begun_ns=now_ns,
        )
        self._next_id += 1
        self._migrations[migration.id] = migration
        self._rests[request_id] = now_ns + REST_NS
        yield from self._signal(migration, Cue.BEGIN, now_ns)

    def _signal(self, migration: Migration, cue: Cue, now_ns: int) -> Commands:
        """Follow the table, and do what the phase begins with."""
        before, config = migration.phase, self._book.config
        phase = migration.advance(cue, now_ns)
        is_long = phase in (Phase.PULL, Phase.CLEAR)
        timeout_ns = config.long_timeout_ns if is_long else config.answer_timeout_ns
        migration.deadline_ns = now_ns + timeout_ns
        if phase is before:
            yield self._kill_stuck(migration)
        else:
            yield from self._entries[phase](migration, now_ns)

    def _enter_offer(self, migration: Migration, now_ns: int) -> Commands:
        source = migration.source
        yield OfferBlocks(
            instance=source.instance,
            migration=migration.id,
            group=source.group,
            epoch=source.epoch,
            request_id=migration.request_id,
            first=migration.pulled_blocks,
        )

    def _on_offered(self, migration: Migration, report: BlocksOffered, now_ns: int) -> Commands:
        awaited = Phase.STOP if report.is_stopped else Phase.OFFER
        is_source = report.instance == migration.source.instance
        if migration.phase is not awaited or not is_source:
            return
        migration.offered = report.blocks
        migration.computed_tokens = report.computed_tokens
        known = _known_tokens(self._book.requests[migration.request_id])
        if report.is_stopped and report.computed_tokens >= known:
            migration.reason = f"the source has computed {report.computed_tokens} of {known} tokens"
            yield from self._signal(migration, Cue.REFUSED, now_ns)
        else:
            yield from self._signal(migration, Cue.ANSWERED, now_ns)

    def _enter_pull(self, migration: Migration, now_ns: int) -> Commands:
        """Room for all tokens so far and the next block; later stages grow by what they bring."""
        target, request = migration.target, self._book.requests[migration.request_id]
        reserved = self._blocks_for(_known_tokens(request)) + 1
        if migration.stages == 1:
            group = self._book.groups[target.group]
            group.expect(reserved)
        yield PullBlocks(
            instance=target.instance,
            migration=migration.id,
            group=target.group,
            epoch=target.epoch,
            source=migration.source.instance,
            reserved_blocks=reserved if migration.stages == 1 else 0,
            blocks=migration.offered,
        )

    def _on_pulled(self, migration: Migration, report: BlocksPulled, now_ns: int) -> Commands:
        if migration.phase not in (Phase.PULL, Phase.REST):
            return
        copied = len(migration.offered.blocks)
        migration.pulled_blocks = migration.offered.end
        known = _known_tokens(self._book.requests[migration.request_id])
        left = (known - 1) // self._book.config.block_size - migration.pulled_blocks
        pays = migration.phase is Phase.PULL and LAST_BLOCKS < left <= copied // 2
        cue = Cue.MUCH_LEFT if pays else Cue.ANSWERED
        yield from self._signal(migration, cue, now_ns)

    def _enter_stop(self, migration: Migration, now_ns: int) -> Commands:
        source = migration.source
        yield StopRequest(
            instance=source.instance,
            migration=migration.id,
            group=source.group,
            epoch=source.epoch,
            first=migration.pulled_blocks,
        )

    def _enter_done(self, migration: Migration, now_ns: int) -> Commands:
        """The lease moves: tokens of the request come from the target from now on."""
        source, target = migration.source, migration.target
        record, group = self._book.requests[migration.request_id], self._book.groups[target.group]
        self._book.groups[source.group].requests.discard(migration.request_id)
        group.requests.add(migration.request_id)
        record.group = target.group
        lease = record.lease()
        tokens = lease.prompt_token_ids + lease.output_token_ids
        group.prefixes.insert(block_hashes(tokens, self._book.config.block_size))
        yield ActivateRequest(
            instance=target.instance,
            migration=migration.id,
            group=target.group,
            epoch=target.epoch,
            request=lease,
            computed_tokens=migration.computed_tokens,
        )
        yield self._end(migration, source, has_moved=True)
        yield self._over(migration, now_ns)

    # ------------------------------------------------------------ failures

    def _on_refused(self, migration: Migration, report: MigrationRefused, now_ns: int) -> Commands:
        if migration.can_turn_back:
            migration.reason = f"instance {report.instance}: {report.reason}"
            yield from self._signal(migration, Cue.REFUSED, now_ns)

    def _on_ended(self, migration: Migration, report: MigrationEnded, now_ns: int) -> Commands:
        is_target = report.instance == migration.target.instance
        if is_target and migration.phase is Phase.CLEAR:
            yield from self._signal(migration, Cue.ANSWERED, now_ns)

    def _enter_clear(self, migration: Migration, now_ns: int) -> Commands:
        for place in (migration.source, migration.target):
            if self._lives(place):
                yield self._end(migration, place, has_moved=False)

    def _enter_cancelled(self, migration: Migration, now_ns: int) -> Commands:
        yield self._over(migration, now_ns)

    def _kill_stuck(self, migration: Migration) -> KillInstance:
        reason = f"a transfer of migration {migration.id} that was given up does not end"
        return KillInstance(migration.target.instance, migration.target.incarnation, reason)

    def _end(self, migration: Migration, place: Place, *, has_moved: bool) -> EndMigration:
        return EndMigration(place.instance, migration.id, place.group, place.epoch, has_moved)

    def _over(self, migration: Migration, now_ns: int) -> LogMigration:
        del self._migrations[migration.id]
        self._pauses |= dict.fromkeys(migration.instances, now_ns + PAUSE_NS)
        config = self._book.config
        block_bytes = config.page_bytes // config.blocks_per_page * config.num_layers
        return LogMigration(migration.record(block_bytes, now_ns))


def _known_tokens(record: RequestRecord) -> int:
    return len(record.request.prompt_token_ids) + len(record.outputs)
