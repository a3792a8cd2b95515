"""The controller: the only coordinator of the cluster, pure (design sections 2 and 4).

    for command in controller.handle(event, now_ns):
        world.perform(command)

It owns every request: prompt, parameters, seed and the tokens delivered. Schedulers lease them at
(group, epoch); a token counts only if it is the next index at the leased epoch, so each token
reaches the client exactly once, whatever dies in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from kunserve.core.errors import AccountingError
from kunserve.core.events import (
    ClockTicked,
    Command,
    DeliverTokens,
    DrainComplete,
    DrainRequested,
    Event,
    FormGroup,
    GroupReport,
    Heartbeat,
    InstanceLost,
    InstanceReady,
    KillInstance,
    LeaseRequest,
    RefusalKind,
    RefuseRequest,
    RequestAborted,
    RequestSubmitted,
    RevokeLease,
    StartInstance,
    StepTiming,
)
from kunserve.core.ids import Epoch, GroupId, InstanceId, RequestId
from kunserve.core.layout import Layout, whole_instance
from kunserve.core.request import Request, TokenOutput
from kunserve.core.step import GroupLoad
from kunserve.policy.dispatcher import GroupSnapshot, PrefixIndex, choose_group
from kunserve.policy.prefix import block_hashes

SECOND_NS = 1_000_000_000


@dataclass(frozen=True)
class ControllerConfig:
    """Numbers of the cluster. Durations in nanoseconds.

    `max_num_queued_reqs` bounds the requests that wait for their first step, over the cluster.
    A request under which `max_losses` instances in a row were lost is given up, see `_blamed`. A
    lost instance is started again after `restart_backoff_ns` (doubling), at most
    `max_restarts` times in a row without having served for `stable_ns`.
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


class InstanceState(Enum):
    """Life of an instance as the controller sees it."""

    STARTING = "starting"
    READY = "ready"
    WAITING_RESTART = "waiting for restart"
    DEAD = "dead"


@dataclass
class InstanceRecord:
    """What the controller knows of one instance."""

    id: InstanceId
    incarnation: int = 0
    state: InstanceState = InstanceState.STARTING
    total_blocks: int = 0
    last_heard_ns: int = 0
    ready_since_ns: int = 0
    restarts_in_row: int = 0
    restart_at_ns: int = 0


@dataclass
class GroupRecord:
    """A group's lease book: what was sent to its scheduler and what it said last.

    `leases_sent` numbers the leases; blocks of those the last report has not seen yet are kept
    in `unseen` as (lease number, blocks), so that dispatch counts them as queued.
    """

    id: GroupId
    epoch: Epoch
    leader: InstanceId
    total_blocks: int
    prefixes: PrefixIndex
    load: GroupLoad | None = None
    timing: StepTiming = field(default_factory=StepTiming)
    leases_sent: int = 0
    unseen: list[tuple[int, int]] = field(default_factory=list)
    requests: set[RequestId] = field(default_factory=set)

    def snapshot(self, hashes: Sequence[bytes]) -> GroupSnapshot:
        """The group as dispatch sees it for a prompt with these block hashes."""
        free = self.load.available_blocks if self.load else self.total_blocks
        queued = self.load.queued_blocks if self.load else 0
        return GroupSnapshot(
            group=self.id,
            total_blocks=self.total_blocks,
            free_blocks=free,
            queued_blocks=queued + sum(blocks for _, blocks in self.unseen),
            num_requests=len(self.requests),
            prefix_blocks=self.prefixes.prefix_blocks(hashes),
        )


@dataclass
class RequestRecord:
    """The front's copy of one request. `group` is None while no group can take it. `losses`: of
    instances in a row, without a token since."""

    request: Request
    outputs: list[int]
    group: GroupId | None = None
    started: bool = False
    losses: int = 0

    def lease(self) -> Request:
        """The request with all tokens the client has seen: what a new leader continues from."""
        return replace(self.request, output_token_ids=tuple(self.outputs))


class Controller:
    """Turns events into commands. No clock, no I/O: time is the `now_ns` of each event."""

    def __init__(self, config: ControllerConfig, now_ns: int) -> None:
        self._config = config
        self._instances = {
            InstanceId(i): InstanceRecord(InstanceId(i), last_heard_ns=now_ns)
            for i in range(config.num_instances)
        }
        self._groups: dict[GroupId, GroupRecord] = {}
        self._requests: dict[RequestId, RequestRecord] = {}
        self._layout = Layout(config.num_layers, ())
        self._next_group = 0
        self._draining = False
        self._num_waiting = 0
        self._on_trial: RequestId | None = None  # see `_blamed`
        self._trial_ended = False
        self._handlers: dict[type, Callable[[Any, int], Iterator[Command]]] = {
            InstanceReady: self._on_ready,
            InstanceLost: self._on_lost,
            RequestSubmitted: self._on_submitted,
            RequestAborted: self._on_aborted,
            GroupReport: self._on_report,
            Heartbeat: self._on_heartbeat,
            DrainRequested: self._on_drain,
            ClockTicked: self._on_tick,
        }

    # ------------------------------------------------------------ what others may read

    @property
    def layout(self) -> Layout:
        """Groups that serve now."""
        return self._layout

    @property
    def draining(self) -> bool:
        """True once a drain was asked for."""
        return self._draining

    @property
    def num_requests(self) -> int:
        """Requests that the front owns."""
        return len(self._requests)

    @property
    def max_request_tokens(self) -> int:
        """Most tokens of one request: the model's context, or what the smallest whole instance
        holds. The same in every layout, or one request could block a restore for ever."""
        ready = [r.total_blocks for r in self._instances.values() if r.total_blocks]
        held = min(ready) * self._config.block_size if ready else self._config.max_model_len
        return min(self._config.max_model_len, held)

    def instances(self) -> tuple[InstanceRecord, ...]:
        """All instances, in order of id."""
        return tuple(self._instances.values())

    def group_record(self, instance: InstanceId) -> GroupRecord | None:
        """The lease book of the group that `instance` works in."""
        group = self._layout.group_of(instance)
        return self._groups[group.id] if group else None

    # ------------------------------------------------------------ the one entry

    def handle(self, event: Event, now_ns: int) -> tuple[Command, ...]:
        """Take one event in and say what the world must do, in order."""
        commands = list(self._handlers[type(event)](event, now_ns))
        if self._trial_ended:
            commands.extend(self._next_trial())
        if self._draining and not self._requests and isinstance(event, _MAY_END_DRAIN):
            commands.append(DrainComplete())
        return tuple(commands)

    def check(self) -> None:
        """Raise AccountingError if requests, groups and the layout disagree."""
        leased = {rid for group in self._groups.values() for rid in group.requests}
        expected = {rid for rid, record in self._requests.items() if record.group is not None}
        if leased != expected:
            raise AccountingError(f"lease books and requests differ: {leased ^ expected}")
        waiting = sum(not record.started for record in self._requests.values())
        if waiting != self._num_waiting:
            raise AccountingError(f"{waiting} requests wait, {self._num_waiting} were counted")
        if {group.id for group in self._layout.groups} != set(self._groups):
            raise AccountingError("layout and lease books name different groups")

    # ------------------------------------------------------------ requests

    def _on_submitted(self, event: RequestSubmitted, now_ns: int) -> Iterator[Command]:
        request = event.request
        if request.id in self._requests:
            raise AccountingError(f"request id {request.id} was submitted twice")
        refusal = self._refusal(request)
        if refusal is not None:
            yield refusal
            return
        self._requests[request.id] = RequestRecord(request, list(request.output_token_ids))
        self._num_waiting += 1
        yield from self._dispatch(request.id)

    def _refusal(self, request: Request) -> RefuseRequest | None:
        if self._draining:
            message = "the server is draining and takes no new requests"
            return RefuseRequest(request.id, RefusalKind.UNAVAILABLE, message)
        if not self._may_serve():
            message = "no instance is alive"
            return RefuseRequest(request.id, RefusalKind.UNAVAILABLE, message)
        needed = len(request.prompt_token_ids) + request.params.max_tokens
        if needed > self.max_request_tokens:
            message = (
                f"the request needs {needed} tokens ({len(request.prompt_token_ids)} in the prompt"
                f" and max_tokens {request.params.max_tokens}), at most "
                f"{self.max_request_tokens} fit one instance"
            )
            return RefuseRequest(request.id, RefusalKind.INVALID, message)
        if self._num_waiting >= self._config.max_num_queued_reqs:
            message = f"{self._num_waiting} requests are queued already (--max-num-queued-reqs)"
            return RefuseRequest(request.id, RefusalKind.QUEUE_FULL, message)
        return None

    def _may_serve(self) -> bool:
        return any(r.state is not InstanceState.DEAD for r in self._instances.values())

    def _dispatch(self, request_id: RequestId) -> Iterator[Command]:
        """Lease a request to the best group; without any group it stays parked in the front, and
        so does a suspect during the trial of another one."""
        if not self._groups:
            return
        record = self._requests[request_id]
        if self._is_suspect(record):
            if self._on_trial is not None:
                return
            self._on_trial = request_id
        lease = record.lease()
        tokens = lease.prompt_token_ids + lease.output_token_ids
        hashes = block_hashes(tokens, self._config.block_size)
        needed = -(-len(tokens) // self._config.block_size)
        snapshots = [group.snapshot(hashes) for group in self._groups.values()]
        group = self._groups[choose_group(snapshots, needed)]
        group.prefixes.insert(hashes)
        group.leases_sent += 1
        group.unseen.append((group.leases_sent, needed))
        group.requests.add(request_id)
        record.group = group.id
        yield LeaseRequest(group.leader, group.id, group.epoch, lease)

    def _on_aborted(self, event: RequestAborted, now_ns: int) -> Iterator[Command]:
        record = self._requests.get(event.request_id)
        if record is None:  # it ended while the abort was on its way
            return
        group = self._groups[record.group] if record.group is not None else None
        self._forget(event.request_id)
        if group is not None:
            yield RevokeLease(group.leader, group.id, group.epoch, event.request_id)

    def _forget(self, request_id: RequestId) -> None:
        record = self._requests.pop(request_id)
        self._end_trial(request_id)
        self._num_waiting -= not record.started
        if record.group is not None:
            self._groups[record.group].requests.discard(request_id)

    # ------------------------------------------------------------ reports

    def _on_report(self, event: GroupReport, now_ns: int) -> Iterator[Command]:
        instance = self._instances[event.instance]
        group = self._groups.get(event.group)
        if event.incarnation != instance.incarnation:
            return
        instance.last_heard_ns = now_ns
        if group is None or group.epoch != event.epoch:
            return
        group.load = event.load
        group.timing = event.timing
        group.unseen = [lease for lease in group.unseen if lease[0] > event.load.leases_seen]
        for request_id in event.started:
            self._mark_started(request_id, group)
        for request_id, outputs in _by_request(event.outputs).items():
            accepted = self._accept(request_id, outputs, group)
            if accepted:
                yield DeliverTokens(request_id, accepted)
        for request_id, kind, message in event.refused:
            if request_id in group.requests:
                self._forget(request_id)
                yield RefuseRequest(request_id, kind, message)

    def _mark_started(self, request_id: RequestId, group: GroupRecord) -> None:
        if request_id in group.requests and not self._requests[request_id].started:
            self._requests[request_id].started = True
            self._num_waiting -= 1

    def _accept(
        self, request_id: RequestId, outputs: list[TokenOutput], group: GroupRecord
    ) -> tuple[TokenOutput, ...]:
        """Keep what is next at the leased group; a token of a revoked lease is dropped."""
        if request_id not in group.requests:
            return ()
        record = self._requests[request_id]
        record.losses = 0
        self._end_trial(request_id)
        accepted: list[TokenOutput] = []
        for output in outputs:
            if output.index != len(record.outputs):
                raise AccountingError(
                    f"request {request_id}: token {output.index} came, "
                    f"{len(record.outputs)} was due at epoch {group.epoch}"
                )
            record.outputs.append(output.token_id)
            accepted.append(output)
            if output.finish is not None:
                self._forget(request_id)
                break
        return tuple(accepted)

    def _on_heartbeat(self, event: Heartbeat, now_ns: int) -> Iterator[Command]:
        instance = self._instances[event.instance]
        if event.incarnation == instance.incarnation:
            instance.last_heard_ns = now_ns
        yield from ()

    # ------------------------------------------------------------ instances

    def _on_ready(self, event: InstanceReady, now_ns: int) -> Iterator[Command]:
        instance = self._instances[event.instance]
        if event.incarnation != instance.incarnation:
            return
        if instance.state is not InstanceState.STARTING:
            return  # the news of its end came before its last message
        instance.state = InstanceState.READY
        instance.total_blocks = event.total_blocks
        instance.last_heard_ns = instance.ready_since_ns = now_ns
        # A group id is never reused, so the first epoch of every group is 0.
        group = whole_instance(
            GroupId(self._next_group), Epoch(0), instance.id, self._config.num_layers
        )
        self._next_group += 1
        self._groups[group.id] = GroupRecord(
            id=group.id,
            epoch=group.epoch,
            leader=group.leader,
            total_blocks=event.total_blocks,
            prefixes=PrefixIndex(event.total_blocks),
        )
        self._layout = replace(self._layout, groups=(*self._layout.groups, group))
        yield FormGroup(instance.id, group.id, group.epoch)
        for request_id in [r for r, record in self._requests.items() if record.group is None]:
            yield from self._dispatch(request_id)

    def _on_lost(self, event: InstanceLost, now_ns: int) -> Iterator[Command]:
        instance = self._instances[event.instance]
        if event.incarnation != instance.incarnation:
            return
        if instance.state in (InstanceState.WAITING_RESTART, InstanceState.DEAD):
            return
        if (
            instance.state is InstanceState.READY
            and now_ns - instance.ready_since_ns >= self._config.stable_ns
        ):
            instance.restarts_in_row = 0
        self._plan_restart(instance, now_ns)
        orphans = self._break_group(instance.id)
        for request_id in self._blamed(orphans):
            self._requests[request_id].losses += 1
        if not self._may_serve():
            orphans = list(self._requests)
        for request_id in orphans:
            yield from self._continue_elsewhere(request_id, event.reason)

    def _plan_restart(self, instance: InstanceRecord, now_ns: int) -> None:
        if instance.restarts_in_row >= self._config.max_restarts:
            instance.state = InstanceState.DEAD
            return
        backoff = self._config.restart_backoff_ns << instance.restarts_in_row
        instance.restarts_in_row += 1
        instance.restart_at_ns = now_ns + backoff
        instance.state = InstanceState.WAITING_RESTART

    def _break_group(self, instance: InstanceId) -> list[RequestId]:
        """A dead member breaks its whole group (paper, mechanism 8). Returns its requests, in
        order of arrival."""
        group = self._layout.group_of(instance)
        if group is None:
            return []
        record = self._groups.pop(group.id)
        remaining = tuple(g for g in self._layout.groups if g.id != group.id)
        self._layout = replace(self._layout, groups=remaining)
        for request_id in record.requests:
            self._requests[request_id].group = None
        return [r for r in self._requests if r in record.requests]

    def _continue_elsewhere(self, request_id: RequestId, reason: str) -> Iterator[Command]:
        """Recompute from the front's copy on another group, or wait for a restart."""
        record = self._requests[request_id]
        if self._may_serve() and record.losses < self._config.max_losses:
            yield from self._dispatch(request_id)
            return
        self._forget(request_id)
        if self._may_serve():
            message = f"{record.losses} instances in a row were lost under this request: {reason}"
        else:
            message = f"the last instance was lost: {reason}"
        yield RefuseRequest(request_id, RefusalKind.UNAVAILABLE, message)

    # ------------------------------------------------------------ who ends instances

    def _blamed(self, orphans: list[RequestId]) -> list[RequestId]:
        """Which requests of a lost group count a loss: all of them, or the one on trial alone.

        An instance says which requests start before it computes them, but a crash can outrun the
        message, so any request leased to the group may be what ended it. A token clears its
        request. One more loss and it would be given up: then it is a suspect. Suspects are leased
        one at a time (a trial, until the next token), so that of many that were lost together
        only the one that ends instances is given up, and the rest get on.
        """
        return [self._on_trial] if self._on_trial in orphans else orphans

    def _is_suspect(self, record: RequestRecord) -> bool:
        return 0 < record.losses >= self._config.max_losses - 1

    def _end_trial(self, request_id: RequestId) -> None:
        if self._on_trial == request_id:
            self._on_trial = None
            self._trial_ended = True

    def _next_trial(self) -> Iterator[Command]:
        """Lease the earliest suspect that waits for its trial."""
        self._trial_ended = False
        for request_id, record in self._requests.items():
            if record.group is None and self._is_suspect(record):
                yield from self._dispatch(request_id)
                return

    # ------------------------------------------------------------ time and drain

    def _on_tick(self, event: ClockTicked, now_ns: int) -> Iterator[Command]:
        for instance in self._instances.values():
            if instance.state is InstanceState.READY:
                silent_ns = now_ns - instance.last_heard_ns
                if silent_ns > self._config.heartbeat_timeout_ns:
                    reason = f"no heartbeat for {silent_ns / SECOND_NS:.1f} s"
                    yield KillInstance(instance.id, instance.incarnation, reason)
            elif (
                instance.state is InstanceState.WAITING_RESTART and now_ns >= instance.restart_at_ns
            ):
                instance.incarnation += 1
                instance.state = InstanceState.STARTING
                instance.last_heard_ns = now_ns
                yield StartInstance(instance.id, instance.incarnation)

    def _on_drain(self, event: DrainRequested, now_ns: int) -> Iterator[Command]:
        self._draining = True
        yield from ()


_MAY_END_DRAIN = (DrainRequested, GroupReport, RequestAborted, InstanceLost)


def _by_request(outputs: Sequence[TokenOutput]) -> dict[RequestId, list[TokenOutput]]:
    grouped: dict[RequestId, list[TokenOutput]] = {}
    for output in outputs:
        grouped.setdefault(output.request_id, []).append(output)
    return grouped
