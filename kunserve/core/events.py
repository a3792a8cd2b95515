"""Events that reach the controller and commands that leave it.

Both worlds run the same loop (design section 2):

    for command in controller.handle(event, now_ns):
        world.perform(command)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kunserve.core.decision import DecisionNote
from kunserve.core.ids import Epoch, GroupId, InstanceId, RequestId
from kunserve.core.memory import PartRuns
from kunserve.core.migration import MigrationOrder, MigrationRecord, MigrationReport
from kunserve.core.request import Request, TokenOutput
from kunserve.core.step import GroupLoad
from kunserve.core.transition import (
    PeerAddress,
    TransitionOrder,
    TransitionRecord,
    TransitionReport,
)

# ---------------------------------------------------------------- events


@dataclass(frozen=True)
class InstanceReady:
    """An instance has loaded all parts and can be a whole instance: after its start, or again after
    a `Reset`. Capacity in blocks of its KVCache; `num_pages` physical pages in all. `parts`: where
    they lie, for peers. `costs`: constants of its cost model, in the order of its fields, in
    nanoseconds. `address` is None where instances have no links (a cluster of one)."""

    instance: InstanceId
    incarnation: int
    total_blocks: int
    num_pages: int = 0
    parts: tuple[PartRuns, ...] = ()
    costs: tuple[float, ...] = ()
    address: PeerAddress | None = None


@dataclass(frozen=True)
class InstanceLost:
    """An instance process is gone, or the supervisor has killed it for `reason`."""

    instance: InstanceId
    incarnation: int
    reason: str


@dataclass(frozen=True)
class RequestSubmitted:
    """A client's request, tokenised and checked by the front."""

    request: Request


@dataclass(frozen=True)
class RequestAborted:
    """The client went away, or its stop string matched: no more tokens are wanted."""

    request_id: RequestId


@dataclass(frozen=True)
class StepTiming:
    """Totals since the instance started: steps done, time in the executor, time in the scheduler
    and the codec around it. The share of the latter is the overhead of Python per step."""

    steps: int = 0
    execute_ns: int = 0
    schedule_ns: int = 0


@dataclass(frozen=True)
class GroupReport:
    """What a leader sends after a step, before one with which requests start, and between steps
    when leases came or went. When idle it sends a Heartbeat.

    `started`: requests that left the queue for the running set for the first time under this
    lease, said before their first step is computed. `refused`: requests that end without another
    token, with kind and reason: INVALID if the scheduler could not take it, FAILED if its row
    failed.
    """

    instance: InstanceId
    incarnation: int
    group: GroupId
    epoch: Epoch
    step: int
    outputs: tuple[TokenOutput, ...]
    started: tuple[RequestId, ...]
    load: GroupLoad
    refused: tuple[tuple[RequestId, RefusalKind, str], ...] = ()
    timing: StepTiming = StepTiming()


@dataclass(frozen=True)
class Heartbeat:
    """An instance lives and makes progress: sent when idle, and while a long step gets on.
    `pages`: its physical pages by kind of owner. `timing`: of all that it computes, whatever its
    place in a group."""

    instance: InstanceId
    incarnation: int
    pages: tuple[tuple[str, int], ...] = ()
    timing: StepTiming = StepTiming()


@dataclass(frozen=True)
class DrainRequested:
    """Take no new requests; those admitted run to their end."""


@dataclass(frozen=True)
class ClockTicked:
    """Time passed: look at deadlines."""


class WishKind(Enum):
    """What an operator asks of the layout."""

    LAYOUT = "layout"
    DROP = "drop"
    RESTORE = "restore"


@dataclass(frozen=True)
class LayoutWished:
    """Somebody wants another layout; answered once by `AnswerWish`. `groups`, for LAYOUT: a
    partition of all instances that serve. DROP: one group of all; RESTORE: whole instances.
    `why` goes into the log."""

    wish: int
    kind: WishKind
    groups: tuple[tuple[InstanceId, ...], ...] = ()
    why: str = "operator"


@dataclass(frozen=True)
class InstanceDrainWished:
    """Take one instance out of service: it gets no new requests, and when the last one has ended
    it is in no group. Answered once by `AnswerWish`, when the drain has begun."""

    wish: int
    instance: InstanceId


@dataclass(frozen=True)
class PolicySwitched:
    """An operator lets the policy drop parameters, or forbids it. Answered once by
    `AnswerWish`."""

    wish: int
    may_drop: bool


Event = (
    InstanceReady
    | InstanceLost
    | RequestSubmitted
    | RequestAborted
    | GroupReport
    | Heartbeat
    | DrainRequested
    | ClockTicked
    | LayoutWished
    | InstanceDrainWished
    | PolicySwitched
    | TransitionReport
    | MigrationReport
)

# ---------------------------------------------------------------- commands


class RefusalKind(Enum):
    """Why a request is refused, so that HTTP can say it in its own codes. FAILED: the server
    could not compute it (logits that are not finite)."""

    INVALID = "invalid"
    QUEUE_FULL = "queue_full"
    UNAVAILABLE = "unavailable"
    FAILED = "failed"


@dataclass(frozen=True)
class FormGroup:
    """Tell an instance that it leads `group` at `epoch` (a whole instance, a group of one)."""

    instance: InstanceId
    group: GroupId
    epoch: Epoch


@dataclass(frozen=True)
class LeaseRequest:
    """Hand a request to the scheduler of `group` at `epoch`."""

    instance: InstanceId
    group: GroupId
    epoch: Epoch
    request: Request


@dataclass(frozen=True)
class RevokeLease:
    """Take a request back: the scheduler frees its blocks and forgets it."""

    instance: InstanceId
    group: GroupId
    epoch: Epoch
    request_id: RequestId


@dataclass(frozen=True)
class DeliverTokens:
    """Accepted tokens of one request, in order, for the client's stream."""

    request_id: RequestId
    outputs: tuple[TokenOutput, ...]


@dataclass(frozen=True)
class RefuseRequest:
    """A request is turned away; nothing was computed for the client beyond what it has seen."""

    request_id: RequestId
    kind: RefusalKind
    message: str


@dataclass(frozen=True)
class StartInstance:
    """Start an instance process again after a loss."""

    instance: InstanceId
    incarnation: int


@dataclass(frozen=True)
class KillInstance:
    """End an instance that broke a deadline, so that it counts as dead."""

    instance: InstanceId
    incarnation: int
    reason: str


@dataclass(frozen=True)
class DrainComplete:
    """No request is left; the front may end."""


@dataclass(frozen=True)
class AnswerWish:
    """The layout is as wished, or will not be and `message` says why."""

    wish: int
    granted: bool
    message: str


@dataclass(frozen=True)
class LogTransition:
    """A record for the log: at COMMIT or ABORTED, and again at the end (DONE or BROKEN)."""

    record: TransitionRecord


@dataclass(frozen=True)
class NoteDecision:
    """What the overload policy decided, or what came of it, for the log and metrics."""

    note: DecisionNote


@dataclass(frozen=True)
class LogMigration:
    """A record for the log, when a migration is over."""

    record: MigrationRecord


@dataclass(frozen=True)
class LogRedispatch:
    """Requests that waited at `instance` are dispatched again."""

    instance: InstanceId
    request_ids: tuple[RequestId, ...]


Command = (
    FormGroup
    | LeaseRequest
    | RevokeLease
    | DeliverTokens
    | RefuseRequest
    | StartInstance
    | KillInstance
    | DrainComplete
    | AnswerWish
    | LogTransition
    | NoteDecision
    | LogMigration
    | LogRedispatch
    | TransitionOrder
    | MigrationOrder
)
