"""The real world of the controller: processes, sockets and a clock, on one thread.

    for command in controller.handle(event, now_ns):
        world.perform(command)

HTTP and tokenising never run on this thread; it hands tokens over through callbacks that must
not block.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import get_args

import zmq

from kunserve.core.decision import DecisionNote, Shortage
from kunserve.core.errors import InstanceFailedError, KunserveError
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
    LogMigration,
    LogRedispatch,
    LogTransition,
    NoteDecision,
    PolicySwitched,
    RefusalKind,
    RefuseRequest,
    RequestAborted,
    RequestSubmitted,
    RevokeLease,
    StartInstance,
    WishKind,
)
from kunserve.core.ids import InstanceId, RequestId
from kunserve.core.migration import MigrationOrder, MigrationRecord, MigrationReport
from kunserve.core.request import Request
from kunserve.core.transition import (
    Fenced,
    TransitionOrder,
    TransitionRecord,
    TransitionReport,
)
from kunserve.policy.book import ControllerConfig
from kunserve.policy.controller import Controller
from kunserve.policy.scheduler import SchedulerConfig
from kunserve.runtime.codec import CodecError, LoadProgress, Shutdown, StartFailed
from kunserve.runtime.decision_log import describe_note
from kunserve.runtime.settings import InstanceSettings
from kunserve.runtime.status import ClusterView
from kunserve.runtime.supervisor import Supervisor
from kunserve.runtime.transition_log import describe, describe_migration
from kunserve.runtime.transport import FrontSocket
from kunserve.runtime.viewer import Viewer
from kunserve.worker.settings import EngineSettings

logger = logging.getLogger("kunserve.cluster")

TICK_S = 0.25
VIEW_INTERVAL_NS = 20_000_000
STALL_S = 0.5
STALL_GRACE_S = 1.0
"""A tick this late means that this process, or the machine, stood still. Messages of that time may
not have reached the inbox, so deadlines are looked at only after the grace (two heartbeats)."""
STOP_GRACE_S = 3.0

_ORDERS = (
    LeaseRequest,
    RevokeLease,
    FormGroup,
    *get_args(TransitionOrder),
    *get_args(MigrationOrder),
)
_REPORTS = (GroupReport, Heartbeat, *get_args(TransitionReport), *get_args(MigrationReport))

Sink = Callable[[DeliverTokens | RefuseRequest], None]
"""Takes what happens to one request. Called on the cluster's thread; must not block."""

OnAnswer = Callable[[bool, str], None]
"""Takes (granted, message) of a wish, once. Called on the cluster's thread; must not block."""


@dataclass(frozen=True)
class ClusterSettings:
    """What the cluster runs. `engine.slot` is replaced by each instance's own."""

    num_instances: int
    engine: EngineSettings
    scheduler: SchedulerConfig
    controller: ControllerConfig
    start_timeout_s: float
    log_level: str = "info"
    check_accounting: bool = False
    exchange: str = "coordinated"
    link_gbps: float | None = None
    profile_directory: str | None = None


class Cluster:
    """Runs the controller and the instances. Methods may be called from any thread.

    Life: `start()`, `wait_ready()`, then requests, `drain()` if wanted, `stop()`.
    """

    def __init__(
        self,
        settings: ClusterSettings,
        on_progress: Callable[[InstanceId, str, float], None],
        on_view: Callable[[ClusterView], None] = lambda view: None,
    ) -> None:
        self._settings = settings
        self._on_progress = on_progress
        self._on_view = on_view
        self._controller = Controller(settings.controller, time.monotonic_ns())
        self._supervisor = Supervisor()
        self._sinks: dict[RequestId, Sink] = {}
        self._inbox: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)
        self._poller = zmq.Poller()
        self._pidfds: dict[int, InstanceId] = {}
        self._stopping = False
        self._served = False
        self._failure: BaseException | None = None
        self._last_words: dict[InstanceId, str] = {}
        self._start_deadlines_ns: dict[InstanceId, int] = {}
        self._all_ready = threading.Event()
        self._drained = threading.Event()
        self._ended = threading.Event()
        self._view = ClusterView()
        self._view_asked = False
        self._viewer = Viewer(self._controller, settings.controller)
        self._wishes: dict[int, OnAnswer] = {}
        self._wish_lock = threading.Lock()
        self._next_wish = 0
        self._stop_grace_s = STOP_GRACE_S

    # ------------------------------------------------------------ any thread

    @property
    def view(self) -> ClusterView:
        """The last snapshot, at most a tick old. Whoever asks often gets newer ones: the next is
        taken with the next message, but not more than one in `VIEW_INTERVAL_NS`."""
        self._view_asked = True
        return self._view

    @property
    def max_request_tokens(self) -> int:
        """Most tokens of one request."""
        return self._settings.engine.max_model_len

    @property
    def ended(self) -> threading.Event:
        """Set when the controller's thread has ended, by `stop` or by a failure."""
        return self._ended

    @property
    def drained(self) -> threading.Event:
        """Set when a drain is complete."""
        return self._drained

    def start(self) -> None:
        """Start the instances."""
        self._thread.start()

    def wait_ready(self) -> None:
        """Block until every instance is ready.

        Raises:
            InstanceFailedError: one of them could not start; the message is one line.
        """
        self._all_ready.wait()
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raise what ended the controller's thread, if anything did."""
        if isinstance(self._failure, KunserveError):
            raise self._failure
        if self._failure is not None:
            raise InstanceFailedError(f"the controller failed: {self._failure!r}")

    def submit(self, request: Request, sink: Sink) -> None:
        """Hand a request in; `sink` gets its tokens, or its refusal, last one final."""
        self._sinks[request.id] = sink
        self._post(RequestSubmitted(request))
        if self._ended.is_set():
            self._refuse_all()

    def abort(self, request_id: RequestId) -> None:
        """No more tokens of this request are wanted. Unknown ids are ignored."""
        self._sinks.pop(request_id, None)
        self._post(RequestAborted(request_id))

    def drain(self) -> None:
        """Take no new requests; `drained` is set when the last one has ended."""
        self._post(DrainRequested())

    def wish(
        self, kind: WishKind, groups: tuple[tuple[InstanceId, ...], ...], on_answer: OnAnswer
    ) -> None:
        """Ask for another layout; `groups` only for LAYOUT. `on_answer` is called at COMMIT, or
        when it is refused, and always, also when the cluster ends."""
        self._post_wish(lambda number: LayoutWished(number, kind, groups), on_answer)

    def wish_drain(self, instance: InstanceId, on_answer: OnAnswer) -> None:
        """Take an instance out of service; answered when its drain has begun or is refused."""
        self._post_wish(lambda number: InstanceDrainWished(number, instance), on_answer)

    def switch_policy(self, may_drop: bool, on_answer: OnAnswer) -> None:
        """Let the policy drop parameters, or forbid it."""
        self._post_wish(lambda number: PolicySwitched(number, may_drop), on_answer)

    def _post_wish(self, event: Callable[[int], Event], on_answer: OnAnswer) -> None:
        with self._wish_lock:
            number = self._next_wish
            self._next_wish += 1
            self._wishes[number] = on_answer
        self._post(event(number))
        if self._ended.is_set():
            self._refuse_all()

    def begin_stop(self, at_once: bool = False) -> None:
        """Refuse what still runs and end all instances, without waiting for it.

        Instances end by themselves, within moments; with `at_once` they are killed.
        """
        if at_once:
            self._stop_grace_s = 0.0
        self._post(None)

    def stop(self) -> None:
        """End all instances and the thread. Safe to call twice."""
        self.begin_stop()
        if self._thread.ident is not None:
            self._thread.join()

    def _post(self, event: Event | None) -> None:
        self._inbox.put(event)
        if not self._ended.is_set():
            os.eventfd_write(self._wake_fd, 1)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            with FrontSocket() as link:
                self._link = link
                self._poller.register(link.socket, zmq.POLLIN)
                self._poller.register(self._wake_fd, zmq.POLLIN)
                try:
                    for index in range(self._settings.num_instances):
                        self._start_instance(StartInstance(InstanceId(index), 0))
                    self._loop()
                finally:
                    try:
                        self._refuse_all()
                    finally:
                        self._stop_instances()
        except BaseException as error:  # shown by whoever waits for this thread
            self._failure = error
            if not isinstance(error, KunserveError):
                logger.exception("the controller failed")
        finally:
            self._ended.set()
            self._refuse_all()
            self._all_ready.set()
            self._drained.set()
            self._on_view(self._view)

    def _refuse_all(self) -> None:
        """The thread ends: nobody else will answer these requests."""
        for request_id in tuple(self._sinks):
            sink = self._sinks.pop(request_id, None)
            if sink is not None:
                message = "the server is shutting down"
                sink(RefuseRequest(request_id, RefusalKind.UNAVAILABLE, message))
        with self._wish_lock:
            wishes, self._wishes = self._wishes, {}
        for on_answer in wishes.values():
            on_answer(False, "the server is shutting down")

    def _loop(self) -> None:
        next_tick = time.monotonic()
        while not self._stopping:
            wait_ms = max(0, int((next_tick - time.monotonic()) * 1000) + 1)
            for fd, _ in self._poller.poll(wait_ms):
                if fd in self._pidfds:
                    self._on_exit(self._pidfds[fd])
            self._take_messages()
            self._take_inbox()
            late_s = time.monotonic() - next_tick
            if late_s < 0:
                if self._view_asked and self._view_age_ns() >= VIEW_INTERVAL_NS:
                    self._publish()
                continue
            stalled = late_s > STALL_S
            next_tick = time.monotonic() + (STALL_GRACE_S if stalled else TICK_S)
            if not stalled:
                self._check_start_deadlines()
                self._handle(ClockTicked())
            self._publish()

    def _take_inbox(self) -> None:
        try:
            os.eventfd_read(self._wake_fd)
        except BlockingIOError:
            return
        while True:
            try:
                event = self._inbox.get_nowait()
            except queue.Empty:
                return
            if event is None:
                self._stopping = True
                return
            self._handle(event)

    def _take_messages(self) -> None:
        try:
            for _, message in self._link.receive():
                self._take(message)
        except CodecError:
            logger.exception("a message of an instance was dropped")

    def _take(self, message: object) -> None:
        if isinstance(message, LoadProgress):
            self._on_progress(message.instance, message.activity, message.fraction)
        elif isinstance(message, StartFailed):
            self._last_words[message.instance] = message.message
        elif isinstance(message, InstanceReady):
            self._start_deadlines_ns.pop(message.instance, None)
            self._handle(message)
            self._on_progress(message.instance, "ready", 1.0)
            self._publish()
            if not self._start_deadlines_ns and not self._served:
                self._served = True
                self._all_ready.set()
        elif isinstance(message, _REPORTS):
            if isinstance(message, Fenced):
                self._publish()  # the last counts of a scheduler that may end now
            self._handle(message)
        else:
            raise CodecError(f"the front does not take {type(message).__name__}")

    def _handle(self, event: Event) -> None:
        for command in self._controller.handle(event, time.monotonic_ns()):
            self._perform(command)
        if isinstance(event, DrainRequested):
            self._publish()  # /health/ready says so at once
        if self._settings.check_accounting:
            self._controller.check()

    def _perform(self, command: Command) -> None:
        if isinstance(command, DeliverTokens):
            self._deliver(command)
        elif isinstance(command, _ORDERS):
            child = self._supervisor.child(command.instance)
            if child is not None:
                self._link.send(child.identity, command)
        elif isinstance(command, RefuseRequest):
            sink = self._sinks.pop(command.request_id, None)
            if sink is not None:
                sink(command)
        elif isinstance(command, StartInstance):
            self._start_instance(command)
        elif isinstance(command, KillInstance):
            logger.error("instance %d: %s; killing it", command.instance, command.reason)
            self._last_words[command.instance] = command.reason
            self._supervisor.kill(command.instance)
        elif isinstance(command, DrainComplete):
            self._drained.set()
        elif isinstance(command, AnswerWish):
            self._answer(command)
        elif isinstance(command, LogTransition):
            self._log_transition(command.record)
        elif isinstance(command, NoteDecision):
            self._log_decision(command.note)
        elif isinstance(command, LogMigration):
            self._log_migration(command.record)
        elif isinstance(command, LogRedispatch):
            number, instance = len(command.request_ids), command.instance
            logger.info("%d requests queued at instance %d are dispatched anew", number, instance)
            self._viewer.count_redispatched(number)

    def _log_transition(self, record: TransitionRecord) -> None:
        """COMMIT leaves its record at once; the line for people comes when all is over."""
        if record.outcome == "commit":
            epochs = ", ".join(str(group.epoch) for group in record.targets)
            logger.info("%s #%d: COMMIT, epoch %s", record.kind, record.id, epochs)
        else:
            logger.info("%s", describe(record))
        self._viewer.count(record)

    def _log_decision(self, note: DecisionNote) -> None:
        level = logging.WARNING if isinstance(note, Shortage) else logging.INFO
        logger.log(level, "%s", describe_note(note))
        self._viewer.note(note)

    def _log_migration(self, record: MigrationRecord) -> None:
        logger.info("%s", describe_migration(record))
        self._viewer.count_migration(record)

    def _answer(self, command: AnswerWish) -> None:
        self._publish()  # whoever is answered finds the layout of the answer
        with self._wish_lock:
            on_answer = self._wishes.pop(command.wish, None)
        if on_answer is not None:  # else a wish of the controller itself
            on_answer(command.granted, command.message)

    def _deliver(self, command: DeliverTokens) -> None:
        is_last = command.outputs[-1].finish is not None
        take = self._sinks.pop if is_last else self._sinks.get
        sink = take(command.request_id, None)
        if sink is not None:  # else the client has gone in this moment
            sink(command)

    # ------------------------------------------------------------ processes

    def _start_instance(self, command: StartInstance) -> None:
        settings = self._settings
        identity = f"{command.instance}#{command.incarnation}"
        child = self._supervisor.start(
            InstanceSettings(
                instance=command.instance,
                incarnation=command.incarnation,
                keys=self._link.admit(identity),
                engine=replace(settings.engine, slot=int(command.instance)),
                scheduler=settings.scheduler,
                log_level=settings.log_level,
                check_accounting=settings.check_accounting,
                exchange=settings.exchange,
                link_gbps=settings.link_gbps,
                profile_directory=settings.profile_directory,
            )
        )
        self._pidfds[child.pidfd] = command.instance
        self._poller.register(child.pidfd, zmq.POLLIN)
        timeout_ns = int(settings.start_timeout_s * 1e9)
        self._start_deadlines_ns[command.instance] = time.monotonic_ns() + timeout_ns

    def _on_exit(self, instance: InstanceId) -> None:
        child = self._supervisor.child(instance)
        assert child is not None
        self._take_messages()  # its last words may still be in the socket
        del self._pidfds[child.pidfd]
        self._poller.unregister(child.pidfd)
        self._link.dismiss(child.public_key)
        how = self._supervisor.reap(instance)
        reason = self._last_words.pop(instance, how)
        self._start_deadlines_ns.pop(instance, None)
        if not self._served:
            raise InstanceFailedError(f"instance {instance} failed to start: {reason}")
        logger.error("instance %d was lost: %s", instance, reason)
        self._handle(InstanceLost(instance, child.incarnation, reason))
        self._publish()

    def _check_start_deadlines(self) -> None:
        for instance, deadline_ns in self._start_deadlines_ns.items():
            if time.monotonic_ns() > deadline_ns:
                self._last_words[instance] = (
                    f"not ready after {self._settings.start_timeout_s:.0f} s (--start-timeout)"
                )
                self._supervisor.kill(instance)

    def _stop_instances(self) -> None:
        for child in self._supervisor.children:
            # One that still loads would read the message only after it.
            if child.instance in self._start_deadlines_ns or not self._link.send(
                child.identity, Shutdown()
            ):
                child.process.kill()
        self._supervisor.stop_all(self._stop_grace_s)

    # ------------------------------------------------------------ snapshot

    def _view_age_ns(self) -> int:
        return time.monotonic_ns() - self._view.at_ns

    def _publish(self) -> None:
        self._view_asked = False
        pids = {child.instance: child.process.pid for child in self._supervisor.children}
        self._view = self._viewer.view(pids, time.monotonic_ns(), time.thread_time_ns())
        self._on_view(self._view)
