"""The simulated world: the production controller and members in virtual time.

    for command in controller.handle(event, now_ns):
        world.perform(command)

as in `kunserve.runtime.cluster`, with processes that are objects and links that delay. The laws of
`kunserve.sim.laws` hold after every event; after the last fault, every request ends and every
instance is ready or given up before a virtual deadline. The same scenario and seed give the same
trace, in any process.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any, get_args

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
    InstanceLost,
    KillInstance,
    LeaseRequest,
    LogMigration,
    LogRedispatch,
    LogTransition,
    NoteDecision,
    RefusalKind,
    RefuseRequest,
    RequestAborted,
    RequestSubmitted,
    RevokeLease,
    StartInstance,
)
from kunserve.core.ids import InstanceId, RequestId
from kunserve.core.migration import MigrationOrder
from kunserve.core.transition import PeerAddress, PeerMessage, Prepare, TransitionOrder
from kunserve.policy.book import InstanceRecord, InstanceState
from kunserve.policy.controller import Controller
from kunserve.sim.faults import (
    Crash,
    FailingPulls,
    Fault,
    Freeze,
    HangingPulls,
    LastWords,
    SlowPulls,
    SlowSteps,
    StuckStep,
    end_ns,
)
from kunserve.sim.instance import DownMessage, SimInstance, Spans, UpMessage
from kunserve.sim.laws import FrontFacts, LawBrokenError, Laws, StreamState
from kunserve.sim.memory import PhysicalPages
from kunserve.sim.scenario import Arrival, Scenario, Wish
from kunserve.sim.timeline import MILLISECOND_NS, SECOND_NS, Link, Timeline

TICK_NS = 250 * MILLISECOND_NS
LIVENESS_NS = 240 * SECOND_NS
"""After the last arrival or fault: detection, the longest backoff, loading, and all the work."""
SETTLE_NS = SECOND_NS
"""What is still under way when the last request has ended arrives in this time."""

_TRANSITION_KILLS = (
    "no answer in",
    "the exchange stood still",
    "a transfer of",
    "it did not become",
)
"""Reasons to end a process for what may be the fault of another one, or of a link."""

TraceEntry = tuple[int, Event | Command | Fault]
_Name = tuple[InstanceId, int]
"""A process: instance and incarnation."""


@dataclass(frozen=True)
class Outcome:
    """What happened in a run, so that a test can tell that it tested something."""

    finished: int
    aborted: int
    refused: dict[RefusalKind, int]
    failovers: int
    preemptions: int
    lost_instances: int
    killed_instances: int
    is_drained: bool
    end_ns: int
    commits: int = 0
    granted_wishes: int = 0
    transitions: dict[str, int] = field(default_factory=dict)
    """Ends of transitions, by outcome."""
    migrations: dict[str, int] = field(default_factory=dict)
    """Ends of migrations, by outcome."""
    redispatched: int = 0
    """Requests that were taken back from a queue."""
    struck_pulls: int = 0
    """Pulls that a fault of a link has slowed down, held up or ended."""
    swapped_in: int = 0
    """Requests that came back from host memory."""


@dataclass(frozen=True)
class _Process:
    """A process that was started and not yet reaped, and its two links."""

    instance: SimInstance
    down: Link[DownMessage]
    up: Link[UpMessage]
    start_deadline_ns: int


class _Network:
    """What one process has of the world."""

    def __init__(
        self, world: World, instance: InstanceId, incarnation: int, up: Link[UpMessage]
    ) -> None:
        self._world = world
        self._name = (instance, incarnation)
        self._up = up

    def send_front(self, message: UpMessage) -> None:
        self._up.send(message)

    def send_peer(self, target: PeerAddress, message: PeerMessage, payload: Any) -> None:
        link = self._world.peer_link(self._name, (target.instance, target.incarnation))
        if link is not None:
            link.send((message, payload))

    def memory_of(self, peer: PeerAddress) -> PhysicalPages | None:
        process = self._world.living(peer.instance, peer.incarnation)
        return process.pages if process is not None else None

    def end(self) -> None:
        self._world.end_by_itself(self._name[0])


class World:
    """One run of one scenario.

    Args:
        scenario: the cluster, its clients and its faults.
        rng: the only source of randomness: of delays, nothing else.
    """

    def __init__(self, scenario: Scenario, rng: Random) -> None:
        self._scenario = scenario
        self._rng = rng
        self._timeline = Timeline()
        self._controller = Controller(scenario.controller, self._timeline.now_ns)
        self._laws = Laws(
            scenario.max_request_tokens,
            scenario.controller.max_num_queued_reqs,
            scenario.instance.scheduler.eos_token_ids,
            scenario.controller.max_losses,
            scenario.instance.num_layers,
        )
        self._clients = {arrival.request.id: arrival for arrival in scenario.arrivals}
        self._processes: dict[InstanceId, _Process] = {}
        self._losses: Counter[InstanceId] = Counter()
        self._incarnations: dict[InstanceId, int] = {}
        self._peer_links: dict[tuple[_Name, _Name], Link[tuple[PeerMessage, Any]]] = {}
        self._troubled_ns = 0
        self._trace: list[TraceEntry] = []
        self._planned = 0
        self._is_draining = False
        self._is_drained = False
        self._preemptions = 0
        self._swapped_in = 0
        self._struck_pulls = 0
        self._kills = 0
        self._perform_by_type: dict[type, Callable[..., None]] = {
            FormGroup: self._send_down,
            LeaseRequest: self._send_down,
            RevokeLease: self._send_down,
            DeliverTokens: self._deliver,
            RefuseRequest: lambda command: None,
            StartInstance: self._start,
            KillInstance: self._kill,
            DrainComplete: self._drained,
            AnswerWish: lambda command: None,
            LogTransition: self._log,
            NoteDecision: lambda command: None,
            LogMigration: self._log,
            LogRedispatch: self._log,
        }
        orders = (*get_args(TransitionOrder), *get_args(MigrationOrder))
        self._perform_by_type |= dict.fromkeys(orders, self._send_down)
        self._perform_by_type[Prepare] = self._prepare
        self._strikes: dict[type, Callable[[SimInstance, Any], None]] = {
            Crash: lambda instance, fault: self.end_by_itself(fault.instance),
            LastWords: lambda instance, fault: instance.end_after(fault.messages),
            Freeze: lambda instance, fault: instance.freeze(fault.duration_ns),
            StuckStep: lambda instance, fault: instance.stick(),
            SlowSteps: lambda instance, fault: instance.slow_down(fault.duration_ns, fault.factor),
            SlowPulls: lambda instance, fault: instance.pump.slow_down(
                fault.duration_ns, fault.factor
            ),
            HangingPulls: lambda instance, fault: instance.pump.hang(fault.duration_ns),
            FailingPulls: lambda instance, fault: instance.pump.fail(fault.duration_ns),
        }

    # ------------------------------------------------------------ a run

    @property
    def trace(self) -> tuple[TraceEntry, ...]:
        """All events, commands and faults so far, with their times."""
        return tuple(self._trace)

    @property
    def laws(self) -> Laws:
        """What the clients saw."""
        return self._laws

    @property
    def controller(self) -> Controller:
        """The brain under test."""
        return self._controller

    def trace_hash(self) -> str:
        """sha256 of the trace: equal for equal runs."""
        digest = hashlib.sha256()
        for time_ns, entry in self._trace:
            digest.update(f"{time_ns} {entry!r}\n".encode())
        return digest.hexdigest()

    def run(self) -> Outcome:
        """Run to the end: all is said and done, and nothing is under way.

        Raises:
            LawBrokenError: a law does not hold, or a request has not ended in time.
            AccountingError: a check of the controller or of a scheduler failed.
        """
        for index in range(self._scenario.controller.num_instances):
            self._start(StartInstance(InstanceId(index), 0))
        self._tick()
        deadline_ns = self._plan_scenario() + LIVENESS_NS
        while not self._is_quiet():
            self._timeline.advance()
            if self._timeline.now_ns > deadline_ns:
                raise LawBrokenError(f"not quiet in time: {self._state()}")
        self._settle()
        return self._outcome()

    def _plan_scenario(self) -> int:
        """Put arrivals, aborts, faults and the drain on the timeline; when is the last over?"""
        scenario = self._scenario
        for arrival in scenario.arrivals:
            self._plan(arrival.request.arrival_ns, partial(self._submit, arrival))
            if arrival.abort_at_ns is not None:
                self._plan(arrival.abort_at_ns, partial(self._abort, arrival.request.id))
        for fault in scenario.faults:
            self._plan(fault.at_ns, partial(self._strike, fault))
        for at_ns, wish in scenario.wishes:
            self._plan(at_ns, partial(self._wish, wish))
        if scenario.drain_at_ns is not None:
            self._plan(scenario.drain_at_ns, self._drain)
        last_ns = max(
            scenario.drain_at_ns or 0,
            *(end_ns(fault) for fault in scenario.faults),
            *(arrival.request.arrival_ns for arrival in scenario.arrivals),
            *(arrival.abort_at_ns or 0 for arrival in scenario.arrivals),
            *(at_ns for at_ns, _ in scenario.wishes),
            0,
        )
        self._plan(last_ns, lambda: None)
        return last_ns

    def _plan(self, time_ns: int, action: Callable[[], None]) -> None:
        """Plan a part of the scenario: the run does not end before it."""

        def act() -> None:
            self._planned -= 1
            action()

        self._planned += 1
        self._timeline.at(time_ns, act)

    def _is_quiet(self) -> bool:
        """The scenario is over, all requests have ended, all instances are ready or given up."""
        if self._planned or self._laws.open_requests or self._laws.open_wishes:
            return False
        if (self._is_draining and not self._is_drained) or self._controller.is_in_transition:
            return False
        if not self._controller.is_settled and not self._is_drained:
            return False
        return all(
            record.state is InstanceState.DEAD
            or self._is_drained_for_good(record)
            or (self._is_ready(record.id) and not record.is_draining)
            for record in self._controller.instances()
        )

    def _is_drained_for_good(self, record: InstanceRecord) -> bool:
        is_alive = self.living(record.id, record.incarnation) is not None
        return record.state is InstanceState.DRAINED and is_alive

    def _is_ready(self, instance: InstanceId) -> bool:
        """Controller and process agree that it serves, and it has nothing to do."""
        process = self._processes.get(instance)
        record = self._controller.group_record(instance)
        if process is None or record is None:
            return False
        serving = process.instance
        group = serving.group
        return (
            serving.is_alive
            and serving.hung_until_ns() <= self._timeline.now_ns
            and serving.is_idle()
            and group is not None
            and group == record.group
            and serving.holds_its_stage()
        )

    def _settle(self) -> None:
        end_ns = self._timeline.now_ns + SETTLE_NS
        while self._timeline.now_ns <= end_ns:
            self._timeline.advance()
        if not self._is_quiet() or self._controller.num_requests:
            raise LawBrokenError(f"something is left after the end: {self._state()}")

    def _state(self) -> str:
        states = ", ".join(f"{r.id}: {r.state.value}" for r in self._controller.instances())
        return (
            f"{self._timeline.now_ns / SECOND_NS:.3f} s, open {self._laws.open_requests}, "
            f"owned {self._controller.num_requests}, instances {states}, "
            f"processes {sorted(self._processes)}, drained {self._is_drained}, "
            f"wishes {self._laws.open_wishes}, in transition {self._controller.is_in_transition}, "
            f"not ready {[i for i in self._processes if not self._is_ready(i)]}"
        )

    def _outcome(self) -> Outcome:
        states = Counter(stream.state for stream in self._laws.streams)
        return Outcome(
            finished=states[StreamState.FINISHED],
            aborted=states[StreamState.ABORTED],
            refused=dict(Counter(s.refusal for s in self._laws.streams if s.refusal is not None)),
            failovers=sum(max(0, stream.leases - 1) for stream in self._laws.streams),
            preemptions=self._preemptions
            + sum(process.instance.preemptions for process in self._processes.values()),
            lost_instances=self._losses.total(),
            killed_instances=self._kills,
            is_drained=self._is_drained,
            end_ns=self._timeline.now_ns,
            commits=self._laws.commits,
            granted_wishes=self._laws.granted,
            transitions=dict(Counter(self._laws.outcomes)),
            migrations=dict(Counter(self._laws.migration_outcomes)),
            redispatched=self._laws.redispatched,
            struck_pulls=self._struck_pulls
            + sum(process.instance.pump.struck for process in self._processes.values()),
            swapped_in=self._swapped_in
            + sum(process.instance.swapped_in for process in self._processes.values()),
        )

    # ------------------------------------------------------------ the loop of both worlds

    def _handle(self, event: Event) -> None:
        self._trace.append((self._timeline.now_ns, event))
        for command in self._controller.handle(event, self._timeline.now_ns):
            self._trace.append((self._timeline.now_ns, command))
            self._laws.judge(command, self._facts())
            self._perform_by_type[type(command)](command)
        self._controller.check()
        self._laws.check_queue()

    def _facts(self) -> FrontFacts:
        controller = self._scenario.controller
        draining = [r.id for r in self._controller.instances() if r.is_draining]
        has_given_up = all(
            index in draining
            or (index not in self._processes and self._losses[index] > controller.max_restarts)
            for index in map(InstanceId, range(controller.num_instances))
        )
        return FrontFacts(
            self._is_draining, has_given_up, self._controller.layout, frozenset(draining)
        )

    def _tick(self) -> None:
        for process in tuple(self._processes.values()):
            serving = process.instance
            if serving.troubled_until_ns() > self._timeline.now_ns or not serving.is_alive:
                self._troubled_ns = self._timeline.now_ns
            if serving.is_loading and self._timeline.now_ns > process.start_deadline_ns:
                self._end_process(process, "it does not get ready in time")
        self._handle(ClockTicked())
        self._timeline.after(TICK_NS, self._tick)

    def _take(self, message: UpMessage) -> None:
        if isinstance(message, GroupReport):
            self._laws.started(message.started)
        self._handle(message)

    # ------------------------------------------------------------ clients

    def _submit(self, arrival: Arrival) -> None:
        self._laws.submitted(arrival.request)
        self._handle(RequestSubmitted(arrival.request))

    def _abort(self, request_id: RequestId) -> None:
        self._laws.aborted(request_id)
        self._handle(RequestAborted(request_id))

    def _deliver(self, command: DeliverTokens) -> None:
        limit = self._clients[command.request_id].abort_after_tokens
        before = self._laws.delivered_tokens(command.request_id) - len(command.outputs)
        if limit is not None and before < limit <= before + len(command.outputs):
            self._plan(self._timeline.now_ns, partial(self._abort, command.request_id))

    def _drain(self) -> None:
        self._is_draining = True
        self._handle(DrainRequested())

    def _drained(self, command: DrainComplete) -> None:
        self._is_drained = True

    def _wish(self, wish: Wish) -> None:
        self._laws.wished(wish)
        self._handle(wish)

    def _log(self, command: LogTransition | LogMigration | LogRedispatch) -> None:
        """A record for the log: the trace has it."""

    # ------------------------------------------------------------ processes

    def _send_down(self, command: DownMessage) -> None:
        process = self._processes.get(command.instance)
        if process is not None:
            process.down.send(command)

    def _prepare(self, command: Prepare) -> None:
        """Who is to give parts has them now, where the order says."""
        for source in command.gains:
            process = self._processes.get(source.peer) if source.peer is not None else None
            if process is None or not process.instance.is_alive:
                continue  # from the file, or its end is not known yet
            if not process.instance.holds_part(source.part, source.runs):
                raise LawBrokenError(f"{source} is named, but the peer does not hold it there")
        self._send_down(command)

    def _start(self, command: StartInstance) -> None:
        self._check_incarnation(command)
        delays, timeline, rng = self._scenario.delays, self._timeline, self._rng
        up: Link[UpMessage] = Link(timeline, delays.link, rng, self._take)
        factors = dict(enumerate(self._scenario.cost_factors))
        instance = SimInstance(
            instance=command.instance,
            incarnation=command.incarnation,
            config=self._scenario.instance,
            timeline=timeline,
            rng=rng,
            network=_Network(self, command.instance, command.incarnation, up),
            spans=Spans(delays.pull, delays.part, delays.copy),
            num_instances=self._scenario.controller.num_instances,
            cost_factor=factors.get(int(command.instance), 1.0),
            load_ns=delays.load.draw(rng),
        )
        self._processes[command.instance] = _Process(
            instance=instance,
            down=Link(timeline, delays.link, rng, instance.take),
            up=up,
            start_deadline_ns=timeline.now_ns + delays.start_timeout_ns,
        )

    def _check_incarnation(self, command: StartInstance) -> None:
        due = self._incarnations.get(command.instance, -1) + 1
        if command.instance in self._processes or command.incarnation != due:
            raise LawBrokenError(
                f"{command} came, but incarnation {due} was due, when it has ended"
            )
        self._incarnations[command.instance] = due

    def _kill(self, command: KillInstance) -> None:
        process = self._processes.get(command.instance)
        if process is None:
            raise LawBrokenError(f"{command} came, but there is no such process")
        controller = self._scenario.controller
        silent_from_ns = self._timeline.now_ns - controller.heartbeat_timeout_ns
        is_hung = process.instance.hung_until_ns() >= silent_from_ns
        if command.reason.startswith(_TRANSITION_KILLS):
            # Somebody, or a transfer, does not get on.
            longest_ns = max(controller.answer_timeout_ns, controller.long_timeout_ns)
            is_hung = self._troubled_ns >= self._timeline.now_ns - longest_ns - SECOND_NS
        if process.instance.is_alive and not is_hung:
            raise LawBrokenError(f"{command} came, but the process makes progress")
        self._kills += process.instance.is_alive
        self._end_process(process, command.reason)

    def living(self, instance: InstanceId, incarnation: int) -> SimInstance | None:
        """A process that is there."""
        process = self._processes.get(instance)
        if process is None or not process.instance.is_alive:
            return None
        return process.instance if process.instance.incarnation == incarnation else None

    def peer_link(self, source: _Name, target: _Name) -> Link[tuple[PeerMessage, Any]] | None:
        """The link between two processes, or None when the target is gone."""
        receiver = self.living(*target)
        if receiver is None:
            return None
        link = self._peer_links.get((source, target))
        if link is None:
            span = self._scenario.delays.peer
            link = Link(self._timeline, span, self._rng, receiver.take_peer)
            self._peer_links[source, target] = link
        return link

    def end_by_itself(self, instance: InstanceId) -> None:
        """A process ends, as by a signal."""
        process = self._processes[instance]
        if process.instance.killed_by is not None:
            self._laws.instance_killed_by(process.instance.killed_by)
        self._end_process(process, "killed by SIGSEGV")

    def _end_process(self, process: _Process, reason: str) -> None:
        """The process ends now; the front learns of it later."""
        if not process.instance.is_alive:
            return
        ended = process.instance
        ended.kill()
        process.up.cut()
        name = (ended.instance, ended.incarnation)
        for link_name in [link_name for link_name in self._peer_links if name in link_name]:
            self._peer_links.pop(link_name).cut()
        for other in self._processes.values():
            other.instance.peer_died(ended.instance)
        delay_ns = self._scenario.delays.exit.draw(self._rng)
        self._timeline.after(delay_ns, partial(self._reap, process, reason))

    def _reap(self, process: _Process, reason: str) -> None:
        instance = process.instance
        del self._processes[instance.instance]
        self._losses[instance.instance] += 1
        self._preemptions += instance.preemptions
        self._swapped_in += instance.swapped_in
        self._struck_pulls += instance.pump.struck
        self._laws.instance_lost(instance.instance)
        self._handle(InstanceLost(instance.instance, instance.incarnation, reason))

    def _strike(self, fault: Fault) -> None:
        """Let a fault happen to whatever process has the instance's place, if there is one."""
        self._trace.append((self._timeline.now_ns, fault))
        process = self._processes.get(fault.instance)
        if process is None:
            return
        self._strikes[type(fault)](process.instance, fault)
        if process.instance.troubled_until_ns() > self._timeline.now_ns:
            self._troubled_ns = self._timeline.now_ns
