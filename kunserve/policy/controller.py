"""The controller: the only coordinator of the cluster, pure (design sections 2 and 4).

    for command in controller.handle(event, now_ns):
        world.perform(command)

It owns every request: prompt, parameters, seed and the tokens delivered. Schedulers lease them at
(group, epoch); a token counts only if it is the next index at the leased epoch, so each token
reaches the client exactly once, whatever dies in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, get_args

from kunserve.core.errors import AccountingError
from kunserve.core.events import (
    AnswerWish,
    ClockTicked,
    Command,
    DeliverTokens,
    DrainComplete,
    DrainRequested,
    Event,
    FormGroup,
    GroupReport,
    Heartbeat,
    InstanceDrainWished,
    InstanceLost,
    InstanceReady,
    KillInstance,
    LayoutWished,
    LeaseRequest,
    LogTransition,
    PolicySwitched,
    RefusalKind,
    RefuseRequest,
    RequestAborted,
    RequestSubmitted,
    RevokeLease,
    StartInstance,
    StepTiming,
    WishKind,
)
from kunserve.core.ids import InstanceId, RequestId
from kunserve.core.layout import Layout, whole_instance
from kunserve.core.migration import MigrationReport
from kunserve.core.request import Request, TokenOutput
from kunserve.core.transition import PeerAddress, Peers, TransitionReport
from kunserve.policy.book import (
    SECOND_NS,
    Book,
    ControllerConfig,
    GroupRecord,
    InstanceRecord,
    InstanceState,
    RequestRecord,
)
from kunserve.policy.coordinator import Coordinator
from kunserve.policy.dispatcher import PrefixIndex, choose_group
from kunserve.policy.governors import create_governor
from kunserve.policy.migration import Migration
from kunserve.policy.prefix import block_hashes
from kunserve.policy.transition import State


class Controller:
    """Turns events into commands. No clock, no I/O: time is the `now_ns` of each event."""

    def __init__(self, config: ControllerConfig, now_ns: int) -> None:
        self._config = config
        self._book = Book(config, now_ns)
        self._coordinator = Coordinator(self._book, self._dispatch_parked)
        self._governor = create_governor(self._book, self._coordinator, self._dispatch, now_ns)
        self._instances = self._book.instances
        self._groups = self._book.groups
        self._requests = self._book.requests
        self._draining = False
        self._leaving: list[InstanceRecord] = []  # that drain, or have done so
        self._next_drain_split_ns = 0
        self._num_waiting = 0
        self._on_trial: RequestId | None = None  # see `_blame`
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
            LayoutWished: self._on_wish,
            InstanceDrainWished: self._on_drain_wish,
            PolicySwitched: self._on_switch,
        }
        self._handlers |= dict.fromkeys(get_args(TransitionReport), self._on_transition_report)
        self._handlers |= dict.fromkeys(get_args(MigrationReport), self._on_migration_report)

    # ------------------------------------------------------------ what others may read

    @property
    def layout(self) -> Layout:
        """Groups that serve now."""
        return self._book.layout

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
        return self._book.group_of(instance)

    @property
    def groups(self) -> tuple[GroupRecord, ...]:
        """All groups, in the order of the layout."""
        return tuple(self._groups[group.id] for group in self._book.layout.groups)

    @property
    def epoch(self) -> int:
        """The highest epoch given to a group."""
        return self._book.epoch

    def transition_state(self, instance: InstanceId) -> State | None:
        """The state of the transition that an instance takes part in, or None."""
        return self._coordinator.state_of(instance)

    @property
    def is_settled(self) -> bool:
        """If nothing came in any more, the policy would leave the layout as it is."""
        return self._governor.is_settled

    @property
    def may_drop(self) -> bool:
        """False: the kill switch forbids the policy to drop parameters."""
        return self._governor.may_drop

    @property
    def is_in_transition(self) -> bool:
        """True while the layout changes, or a wish waits for its turn."""
        return self._coordinator.is_busy

    @property
    def migrations(self) -> tuple[Migration, ...]:
        """Migrations of requests under way."""
        return self._governor.migrations

    # ------------------------------------------------------------ the one entry

    def handle(self, event: Event, now_ns: int) -> tuple[Command, ...]:
        """Take one event in and say what the world must do, in order."""
        commands = list(self._handlers[type(event)](event, now_ns))
        for command in commands:
            if isinstance(command, LogTransition):
                self._governor.recorded(command.record, now_ns)
        if self._trial_ended:
            commands.extend(self._next_trial())
        commands.extend(self._governor.settle(now_ns))
        for instance in self._leaving:
            if instance.state is InstanceState.READY:
                commands.extend(self._settle_drain(instance))
        if self._draining and not self._requests and isinstance(event, _MAY_END_DRAIN):
            commands.append(DrainComplete())
        return tuple(commands)

    def check(self) -> None:
        """Raise AccountingError if requests, groups and the layout disagree."""
        self._book.check()
        waiting = sum(not record.started for record in self._requests.values())
        if waiting != self._num_waiting:
            raise AccountingError(f"{waiting} requests wait, {self._num_waiting} were counted")

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
        group_id = self._requests[request.id].group
        group = self._groups[group_id] if group_id is not None else None
        yield from self._governor.submitted(request, group, now_ns)

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
        """Somebody takes requests, or will."""
        return any(
            record.state is not InstanceState.DEAD and not record.is_draining
            for record in self._instances.values()
        )

    def _dispatch(self, request_id: RequestId) -> Iterator[Command]:
        """Lease a request to the best group; without any group it stays parked in the front, and
        so does a suspect during the trial of another one. Groups that stand between two layouts,
        or that drain, take none."""
        candidates = [group for group in self._groups.values() if not group.is_frozen]
        if not candidates:
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
        snapshots = [group.snapshot(hashes) for group in candidates]
        group = self._groups[choose_group(snapshots, needed)]
        group.prefixes.insert(hashes)
        group.lease(request_id, needed)
        record.group = group.id
        yield LeaseRequest(group.leader, group.id, group.epoch, lease)

    def _dispatch_parked(self) -> Iterator[Command]:
        """Lease what waits in the front, by arrival."""
        for request_id in [r for r, record in self._requests.items() if record.group is None]:
            yield from self._dispatch(request_id)

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
        group.see(event.load)
        instance.timing = event.timing
        for request_id in event.started:
            if self._mark_started(request_id, group, now_ns):
                yield from self._governor.started(request_id, now_ns)
        for request_id, outputs in _by_request(event.outputs).items():
            try:
                accepted = self._accept(request_id, outputs, group)
            except AccountingError as error:  # its books are wrong: it costs that group, not all
                yield KillInstance(instance.id, instance.incarnation, str(error))
                return
            if accepted:
                yield DeliverTokens(request_id, accepted)
        for request_id, kind, message in event.refused:
            if request_id in group.requests:
                self._forget(request_id)
                yield RefuseRequest(request_id, kind, message)
        yield from self._governor.reported(group, now_ns)

    def _mark_started(self, request_id: RequestId, group: GroupRecord, now_ns: int) -> bool:
        """A request left the queue; False if it had before, or is leased elsewhere."""
        record = self._requests[request_id] if request_id in group.requests else None
        if record is None or record.started:
            return False
        record.started = True
        record.started_ns = now_ns
        self._num_waiting -= 1
        return True

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
            accepted.append(output if output.index else _with_queue_time(output, record))
            if output.finish is not None:
                self._governor.finished(record)
                self._forget(request_id)
                break
        return tuple(accepted)

    def _on_heartbeat(self, event: Heartbeat, now_ns: int) -> Iterator[Command]:
        instance = self._instances[event.instance]
        if event.incarnation == instance.incarnation:
            instance.last_heard_ns = now_ns
            instance.pages = dict(event.pages)
            instance.timing = event.timing
        yield from ()

    # ------------------------------------------------------------ instances

    def _on_ready(self, event: InstanceReady, now_ns: int) -> Iterator[Command]:
        instance = self._instances[event.instance]
        if event.incarnation != instance.incarnation:
            return
        if instance.state not in (InstanceState.STARTING, InstanceState.RESETTING):
            return  # the news of its end came before its last message
        if instance.state is InstanceState.STARTING:
            instance.ready_since_ns = now_ns
        instance.state = InstanceState.READY
        instance.total_blocks = event.total_blocks
        instance.num_pages = event.num_pages
        instance.costs = event.costs
        instance.address = event.address
        instance.parts = {held.part: held.runs for held in event.parts}
        instance.last_heard_ns = now_ns
        yield from self._introduce()
        group = whole_instance(
            self._book.new_group_id(),
            self._book.new_epoch(),
            instance.id,
            self._config.num_layers,
        )
        record = GroupRecord(group, event.total_blocks, PrefixIndex(event.total_blocks))
        self._book.replace_groups((), (record,))
        yield FormGroup(instance.id, group.id, group.epoch)
        yield from self._settle_drain(instance)
        yield from self._dispatch_parked()

    def _introduce(self) -> Iterator[Command]:
        """Tell every instance how to reach all that are alive."""
        alive = [record for record in self._instances.values() if record.is_alive]
        addresses: list[PeerAddress] = [r.address for r in alive if r.address is not None]
        for record in alive if addresses else ():
            others = tuple(a for a in addresses if a.instance != record.id)
            yield Peers(record.id, others)

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
        survivors, orphans = self._break_groups(instance.id)
        self._blame(orphans)
        yield from self._introduce()
        for survivor in survivors:
            yield from self._coordinator.reset(self._instances[survivor], now_ns)
        # Before the end of a transition leases what waits: these must not be leased again.
        for request_id in orphans:
            if self._requests[request_id].losses >= self._config.max_losses:
                yield from self._continue_elsewhere(request_id, event.reason)
        yield from self._coordinator.lost(instance.id, event.reason, now_ns)
        if not self._may_serve():
            orphans = list(self._requests)
        for request_id in orphans:
            yield from self._continue_elsewhere(request_id, event.reason)

    def _plan_restart(self, instance: InstanceRecord, now_ns: int) -> None:
        instance.pages = {}
        instance.timing = StepTiming()
        if instance.restarts_in_row >= self._config.max_restarts:
            instance.state = InstanceState.DEAD
            return
        backoff = self._config.restart_backoff_ns << instance.restarts_in_row
        instance.restarts_in_row += 1
        instance.restart_at_ns = now_ns + backoff
        instance.state = InstanceState.WAITING_RESTART

    def _break_groups(self, instance: InstanceId) -> tuple[list[InstanceId], list[RequestId]]:
        """A dead member breaks its whole group (paper, mechanism 8), and in the middle of an
        exchange all groups that take part. Returns the other members and the requests, in order
        of arrival."""
        lost = self._coordinator.groups_lost_with(instance)
        survivors: list[InstanceId] = []
        orphans: set[RequestId] = set()
        for group_id in lost:
            record = self._groups[group_id]
            survivors += [i for i in record.group.instances if i != instance]
            orphans |= record.requests
            self._book.replace_groups((record.group,), ())
        for request_id in orphans:
            self._requests[request_id].group = None
        return sorted(survivors), [r for r in self._requests if r in orphans]

    def _continue_elsewhere(self, request_id: RequestId, reason: str) -> Iterator[Command]:
        """Recompute from the front's copy on another group, or wait for a restart."""
        record = self._requests.get(request_id)
        if record is None or record.group is not None:
            return  # leased again already, with others that waited
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

    def _blame(self, orphans: list[RequestId]) -> None:
        """All requests of a lost group count a loss.

        An instance says which requests start before it computes them, but a crash can outrun the
        message, so any request leased to the group may be what ended it. A token clears its
        request. One more loss and it would be given up: then it is a suspect. Suspects are leased
        one at a time (a trial, until the next token), so that of many that were lost together
        only the one that ends instances is given up, and the rest get on. Beside one on trial,
        others become suspects at most: so none can hide behind the trials of others.
        """
        most = self._config.max_losses
        for request_id in orphans:
            record = self._requests[request_id]
            is_beside_trial = self._on_trial in orphans and request_id != self._on_trial
            record.losses = min(record.losses + 1, most - 1 if is_beside_trial else most)

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
            if instance.is_alive:
                silent_ns = now_ns - instance.last_heard_ns
                is_resetting = instance.state is InstanceState.RESETTING
                if silent_ns > self._config.heartbeat_timeout_ns:
                    reason = f"no heartbeat for {silent_ns / SECOND_NS:.1f} s"
                    yield KillInstance(instance.id, instance.incarnation, reason)
                elif is_resetting and now_ns > instance.reset_by_ns:
                    reason = "it did not become a whole instance again in time"
                    yield KillInstance(instance.id, instance.incarnation, reason)
            elif (
                instance.state is InstanceState.WAITING_RESTART and now_ns >= instance.restart_at_ns
            ):
                instance.incarnation += 1
                instance.state = InstanceState.STARTING
                instance.last_heard_ns = now_ns
                yield StartInstance(instance.id, instance.incarnation)
        yield from self._coordinator.tick(now_ns)
        yield from self._free_draining(now_ns)
        yield from self._governor.tick(now_ns)

    # ------------------------------------------------------------ layouts

    def _on_switch(self, event: PolicySwitched, now_ns: int) -> Iterator[Command]:
        self._governor.switch(event.may_drop)
        word = "may" if event.may_drop else "may not"
        yield AnswerWish(event.wish, True, f"the policy {word} drop parameters")

    def _on_wish(self, event: LayoutWished, now_ns: int) -> Iterator[Command]:
        self._governor.operator_wished(event.kind)
        yield from self._coordinator.wish(event.wish, event.kind, event.groups, event.why, now_ns)

    def _on_transition_report(self, event: TransitionReport, now_ns: int) -> Iterator[Command]:
        instance = self._instances[event.instance]
        if event.incarnation != instance.incarnation:
            return
        instance.last_heard_ns = now_ns
        yield from self._coordinator.take(event, now_ns)

    def _on_migration_report(self, event: MigrationReport, now_ns: int) -> Iterator[Command]:
        """No sign of life: it says nothing of steps, and comes as often as orders go out."""
        if event.incarnation == self._instances[event.instance].incarnation:
            yield from self._governor.take(event, now_ns)

    def _on_drain_wish(self, event: InstanceDrainWished, now_ns: int) -> Iterator[Command]:
        """An instance of a larger group becomes whole first; then it gets nothing new."""
        instance = self._instances.get(event.instance)
        others = [r for r in self._instances.values() if r is not instance and not r.is_draining]
        if instance is None or instance.state is not InstanceState.READY:
            yield AnswerWish(event.wish, False, f"instance {event.instance} is not serving")
            return
        if not any(record.state is InstanceState.READY for record in others):
            message = "it is the last instance that serves; end the server instead"
            yield AnswerWish(event.wish, False, message)
            return
        if self._coordinator.is_busy:
            yield AnswerWish(event.wish, False, "the layout is changing; try again afterwards")
            return
        if not instance.is_draining:
            self._leaving.append(instance)
        instance.is_draining = True
        yield AnswerWish(event.wish, True, f"instance {instance.id} is draining")
        yield from self._settle_drain(instance)
        yield from self._free_draining(now_ns)

    def _free_draining(self, now_ns: int) -> Iterator[Command]:
        """Split groups with an instance that drains, as soon as it is possible."""
        if self._coordinator.is_busy or now_ns < self._next_drain_split_ns:
            return
        groups = self._book.layout.groups
        draining = {i for i, record in self._instances.items() if record.is_draining}
        bound = sorted(i for g in groups if len(g.stages) > 1 for i in draining & {*g.instances})
        if bound:
            self._next_drain_split_ns = now_ns + self._config.answer_timeout_ns
            wish: list[tuple[InstanceId, ...]] = []
            for group in groups:
                has_draining = bool(draining & {*group.instances})
                wish += ((i,) for i in group.instances) if has_draining else (group.instances,)
            why = f"drain of instances {', '.join(map(str, bound))}"
            yield from self._coordinator.wish(-1, WishKind.LAYOUT, tuple(wish), why, now_ns)

    def _settle_drain(self, instance: InstanceRecord) -> Iterator[Command]:
        """A draining whole instance gets nothing new, and leaves the layout when it is empty."""
        group = self._book.group_of(instance.id)
        if not instance.is_draining or group is None or len(group.group.stages) > 1:
            return
        group.is_frozen = True
        if not group.requests and not self._coordinator.is_busy:
            self._book.replace_groups((group.group,), ())
            instance.state = InstanceState.DRAINED
        yield from ()

    def _on_drain(self, event: DrainRequested, now_ns: int) -> Iterator[Command]:
        self._draining = True
        yield from ()


_MAY_END_DRAIN = (DrainRequested, GroupReport, RequestAborted, InstanceLost)


def _with_queue_time(output: TokenOutput, record: RequestRecord) -> TokenOutput:
    if record.started_ns is None:
        return output
    return replace(output, queued_ns=record.started_ns - record.request.arrival_ns)


def _by_request(outputs: Sequence[TokenOutput]) -> dict[RequestId, list[TokenOutput]]:
    grouped: dict[RequestId, list[TokenOutput]] = {}
    for output in outputs:
        grouped.setdefault(output.request_id, []).append(output)
    return grouped
