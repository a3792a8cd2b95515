"""What the controller knows: instances, groups and requests.

Shared by the controller, which serves, and the coordinator, which changes layouts; nobody else
writes it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from kunserve.core.errors import AccountingError
from kunserve.core.events import StepTiming
from kunserve.core.ids import Epoch, GroupId, InstanceId, RequestId
from kunserve.core.layout import Group, Layout, Part
from kunserve.core.memory import PageRun
from kunserve.core.policy import PolicyName, Trigger
from kunserve.core.request import Request
from kunserve.core.step import GroupLoad
from kunserve.core.transition import PeerAddress
from kunserve.policy.dispatcher import GroupSnapshot, PrefixIndex

SECOND_NS = 1_000_000_000


@dataclass(frozen=True)
class ControllerConfig:
    """Numbers of the cluster. Durations in nanoseconds.

    `max_num_queued_reqs` bounds the requests that wait for their first step, over the cluster.
    A request under which `max_losses` instances in a row were lost is given up. A lost instance is
    started again after `restart_backoff_ns` (doubling), at most `max_restarts` times in a row
    without having served for `stable_ns`.

    `part_pages`, `slot_pages` and `blocks_per_page` are what layouts are planned with; a cluster
    whose `part_pages` is empty has whole instances only. A transition that gets no answer for
    `answer_timeout_ns` turns back or, after COMMIT, ends who does not answer; bringing parts in and
    moving blocks may take `long_timeout_ns`. An exchange that does not get on for
    `move_timeout_ns` ends whom it waits for.

    `policy` answers overload; `may_drop` and `may_restore` are its switches. With an SLO the gain
    of a drop is attainment. The last three are those of the schedulers: forecasts need them.
    """

    num_instances: int
    num_layers: int
    block_size: int
    max_model_len: int
    max_num_queued_reqs: int
    heartbeat_timeout_ns: int = 10 * SECOND_NS
    restart_backoff_ns: int = SECOND_NS
    stable_ns: int = 60 * SECOND_NS
    max_restarts: int = 3
    max_losses: int = 3
    part_pages: tuple[tuple[Part, int], ...] = ()
    slot_pages: int = 0
    blocks_per_page: int = 1
    page_bytes: int = 0
    answer_timeout_ns: int = 5 * SECOND_NS
    long_timeout_ns: int = 120 * SECOND_NS
    move_timeout_ns: int = 2 * SECOND_NS
    policy: PolicyName = PolicyName.RECOMPUTE
    trigger: Trigger = Trigger.GAIN
    may_drop: bool = True
    may_restore: bool = True
    slo_ttft_ns: int | None = None
    slo_tpot_ns: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    step_time_target_ns: int = 100_000_000


class InstanceState(Enum):
    """Life of an instance as the controller sees it."""

    STARTING = "starting"
    READY = "ready"
    RESETTING = "resetting"
    WAITING_RESTART = "waiting for restart"
    DRAINED = "drained"
    DEAD = "dead"


@dataclass
class InstanceRecord:
    """What the controller knows of one instance. `parts`: where they lie, and `pages` by kind of
    owner, by its last messages."""

    id: InstanceId
    incarnation: int = 0
    state: InstanceState = InstanceState.STARTING
    total_blocks: int = 0
    num_pages: int = 0
    costs: tuple[float, ...] = ()
    parts: dict[Part, tuple[PageRun, ...]] = field(default_factory=dict)
    pages: dict[str, int] = field(default_factory=dict)
    timing: StepTiming = field(default_factory=StepTiming)
    address: PeerAddress | None = None
    is_draining: bool = False
    last_heard_ns: int = 0
    ready_since_ns: int = 0
    restarts_in_row: int = 0
    restart_at_ns: int = 0
    reset_by_ns: int = 0

    @property
    def is_alive(self) -> bool:
        """A process that answers messages."""
        return self.state in (InstanceState.READY, InstanceState.RESETTING, InstanceState.DRAINED)


@dataclass
class GroupRecord:
    """A group's lease book: what was sent to its scheduler and what it said last.

    `leases_sent` numbers the leases; blocks of those the last report has not seen yet are kept
    in `unseen` as (lease number, blocks), so that dispatch counts them as queued: `unseen_blocks`
    is their sum. A frozen group gets no leases: it is between two layouts. `pages`: range pages of
    a group that an exchange has made, when that is over; those of a group that is a whole instance
    from its start are its own.
    """

    group: Group
    total_blocks: int
    prefixes: PrefixIndex
    is_frozen: bool = False
    pages: tuple[PageRun, ...] = ()
    load: GroupLoad | None = None
    leases_sent: int = 0
    unseen: deque[tuple[int, int]] = field(default_factory=deque)
    unseen_blocks: int = 0
    requests: set[RequestId] = field(default_factory=set)

    @property
    def id(self) -> GroupId:
        """Identity of the group."""
        return self.group.id

    @property
    def epoch(self) -> Epoch:
        """Version of its layout."""
        return self.group.epoch

    @property
    def leader(self) -> InstanceId:
        """Who schedules."""
        return self.group.leader

    def lease(self, request_id: RequestId, needed_blocks: int) -> None:
        """A lease is sent; the scheduler has not seen it yet."""
        self.expect(needed_blocks)
        self.requests.add(request_id)

    def expect(self, needed_blocks: int) -> None:
        """Something is sent that counts as a lease, and needs blocks."""
        self.leases_sent += 1
        self.unseen.append((self.leases_sent, needed_blocks))
        self.unseen_blocks += needed_blocks

    def see(self, load: GroupLoad) -> None:
        """The scheduler's newest report: leases that it has seen are in its own figures."""
        self.load = load
        while self.unseen and self.unseen[0][0] <= load.leases_seen:
            self.unseen_blocks -= self.unseen.popleft()[1]

    def snapshot(self, hashes: Sequence[bytes]) -> GroupSnapshot:
        """The group as dispatch sees it for a prompt with these block hashes."""
        free = self.load.available_blocks if self.load else self.total_blocks
        queued = self.load.queued_blocks if self.load else 0
        return GroupSnapshot(
            group=self.id,
            total_blocks=self.total_blocks,
            free_blocks=free,
            queued_blocks=queued + self.unseen_blocks,
            num_requests=len(self.requests),
            prefix_blocks=self.prefixes.prefix_blocks(hashes),
        )


@dataclass
class RequestRecord:
    """The front's copy of one request. `group` is None while no group can take it. `losses`: of
    instances in a row, without a token since. `started_ns`: when it first left the queue."""

    request: Request
    outputs: list[int]
    group: GroupId | None = None
    started: bool = False
    losses: int = 0
    started_ns: int | None = None

    def lease(self) -> Request:
        """The request with all tokens the client has seen: what a new leader continues from."""
        return replace(self.request, output_token_ids=tuple(self.outputs))


class Book:
    """All records, and the few changes that concern more than one of them."""

    def __init__(self, config: ControllerConfig, now_ns: int) -> None:
        self.config = config
        self.instances = {
            InstanceId(i): InstanceRecord(InstanceId(i), last_heard_ns=now_ns)
            for i in range(config.num_instances)
        }
        self.groups: dict[GroupId, GroupRecord] = {}
        self.requests: dict[RequestId, RequestRecord] = {}
        self.layout = Layout(config.num_layers, ())
        self._next_group = 0
        self._next_epoch = 0

    # ------------------------------------------------------------ names

    def new_group_id(self) -> GroupId:
        """A group id that was never used."""
        self._next_group += 1
        return GroupId(self._next_group - 1)

    def new_epoch(self) -> Epoch:
        """An epoch above all others."""
        self._next_epoch += 1
        return Epoch(self._next_epoch - 1)

    @property
    def epoch(self) -> int:
        """The highest epoch that a group was given; -1 before the first."""
        return self._next_epoch - 1

    # ------------------------------------------------------------ layout

    def replace_groups(self, old: Iterable[Group], new: Iterable[GroupRecord]) -> None:
        """Take groups out of the layout and put others in, at once.

        Raises:
            LayoutError: the new layout breaks a law. Nothing has changed.
        """
        gone = {group.id for group in old}
        added = tuple(new)
        remaining = tuple(group for group in self.layout.groups if group.id not in gone)
        groups = (*remaining, *(record.group for record in added))
        self.layout = Layout(self.config.num_layers, tuple(sorted(groups, key=_first_instance)))
        for group_id in gone:
            self.groups.pop(group_id, None)
        for record in added:
            self.groups[record.id] = record

    def group_of(self, instance: InstanceId) -> GroupRecord | None:
        """The lease book of the group that `instance` works in."""
        group = self.layout.group_of(instance)
        return self.groups[group.id] if group else None

    # ------------------------------------------------------------ laws

    def check(self) -> None:
        """Raise AccountingError if requests, groups and the layout disagree."""
        leased = {rid for group in self.groups.values() for rid in group.requests}
        expected = {rid for rid, record in self.requests.items() if record.group is not None}
        if leased != expected:
            raise AccountingError(f"lease books and requests differ: {leased ^ expected}")
        for group in self.groups.values():
            wrong = [rid for rid in group.requests if self.requests[rid].group != group.id]
            if wrong:
                raise AccountingError(
                    f"{wrong} are in the book of group {group.id}, leased elsewhere"
                )
        if {group.id for group in self.layout.groups} != set(self.groups):
            raise AccountingError("layout and lease books name different groups")


def _first_instance(group: Group) -> InstanceId:
    return min(group.instances)
