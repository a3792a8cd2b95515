"""The policy of the paper: drop replicated parameters when memory is what requests wait for, and
only where it pays; restore them when it is over (paper section 4, design section 5).

    a report, an arrival      demand exceeds capacity, or will soon (`kunserve.policy.overload`)
      -> who would merge      fewest instances that make room (`kunserve.policy.drop_plan`)
      -> what would it win    waiting with and without, costs counted (`kunserve.policy.gain`)
      -> wish                 the coordinator carries it out
    a tick                    a merged group whose requests fit whole instances again
      -> restore

**Bound.** Whatever comes in, drops begin at least `LEAST_DWELL_NS` apart, and so do restores; after
a transition, ten times what it cost pass before the next one. So in any window of W ns there begin
at most 2 x (1 + W / LEAST_DWELL_NS) wishes. A wish makes at most one transition of each group per
step, and a drop may turn back a restore that has not committed, which ends that one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from kunserve.core.decision import Decision, DecisionNote, Realised, Shortage, Verdict
from kunserve.core.errors import LayoutError
from kunserve.core.events import NoteDecision
from kunserve.core.ids import Epoch, GroupId, InstanceId, RequestId
from kunserve.core.policy import PolicyName, Trigger
from kunserve.core.request import Request
from kunserve.core.transition import TransitionRecord
from kunserve.policy.book import SECOND_NS, Book, GroupRecord, RequestRecord
from kunserve.policy.coordinator import Coordinator
from kunserve.policy.drop_plan import DropPlan, GroupDemand, plan_drop
from kunserve.policy.gain import Estimate, Estimator, Prospect, TransitionCosts
from kunserve.policy.governor import Commands, Governor
from kunserve.policy.overload import (
    IMMINENT_NS,
    Arrivals,
    DemandMonitor,
    OutputLengths,
    Pressure,
    ShortageSignal,
    capacity_blocks,
    demand_blocks,
)
from kunserve.policy.pages import MAX_SLOTS
from kunserve.policy.planner import TransitionKind, Wish, next_step

EVALUATE_NS = 100_000_000
"""An estimate costs milliseconds: not more often than this, for so many groups."""
GROUPS_PER_LOOK = 4

CONFIRM_NS = 150_000_000
"""So long overload must be imminent before it is acted on; one that is reached is at once."""

LEAST_GAIN = 0.2
"""Waiting must fall by this share, what the change costs counted (design section 5)."""

LEAST_MEMORY_SHARE = 0.25
"""Of all waiting, for memory: else it is not what the queue waits for. Neither is it if computing
alone would take half as long."""

LEAST_DWELL_NS = 2 * SECOND_NS
DWELL_FACTOR = 10
"""After a transition, so many times its cost pass before the next one."""

RESTORE_FILL = 0.9
"""Whole instances must be expected to hold all demand of the horizon in this share of them."""

REPEAT_NS = SECOND_NS
"""A verdict that has not changed is noted again after this."""


@dataclass
class _Watch:
    """Requests that were queued at a decision, until the last of them has started."""

    number: int
    at_ns: int
    predicted_ns: float
    waiting: set[RequestId]
    requests: int
    realised_ns: int = 0


@dataclass
class _Noted:
    """The last verdict on some groups."""

    verdict: Verdict
    at_ns: int


@dataclass
class _Restoring:
    """A restore that was wished, and the layout to go back to if demand rises meanwhile."""

    instances: frozenset[InstanceId]
    layout: Wish
    whole_blocks: int


@dataclass(frozen=True)
class _Candidate:
    """Groups that would become one, and what is known of it. `expected_requests`: what layers are
    split for."""

    records: tuple[GroupRecord, ...]
    prospect: Prospect
    estimate: Estimate
    is_reached: bool
    expected_requests: int = 0

    @property
    def instances(self) -> tuple[InstanceId, ...]:
        return tuple(sorted(i for r in self.records for i in r.group.instances))


class DroppingGovernor(Governor):
    """`kunserve`, and `observe`, which notes the same decisions and never acts.

    Args:
        now_ns: when the front started.
    """

    def __init__(self, book: Book, coordinator: Coordinator, now_ns: int) -> None:
        super().__init__(book, coordinator)
        self._acts = book.config.policy is PolicyName.KUNSERVE
        self._arrivals = Arrivals(now_ns)
        self._lengths = OutputLengths()
        self._costs = TransitionCosts()
        self._estimator = Estimator(book, self._arrivals, self._lengths, self._costs)
        self._monitors: dict[GroupId, tuple[Epoch, DemandMonitor]] = {}
        self._pressures: dict[GroupId, Pressure] = {}
        self._next_look_ns = now_ns
        self._next_drop_ns = now_ns
        self._next_restore_ns = now_ns
        self._imminent_since_ns = self._last_imminent_ns = now_ns
        self._restoring: _Restoring | None = None
        self._watches: list[_Watch] = []
        self._noted: dict[tuple[str, tuple[InstanceId, ...]], _Noted] = {}
        self._shortage = ShortageSignal()
        self._next_number = 0

    @property
    def is_settled(self) -> bool:
        """All instances are whole, unless they may not become so."""
        if not self._acts or self._is_held or not self._book.config.may_restore:
            return True
        return all(len(group.stages) == 1 for group in self._book.layout.groups)

    # ------------------------------------------------------------ what it hears

    def submitted(self, request: Request, group: GroupRecord | None, now_ns: int) -> Commands:
        """Many at once overload a group between two of its reports."""
        self._arrivals.add(len(request.prompt_token_ids), request.params.max_tokens, now_ns)
        if group is not None:
            yield from self.reported(group, now_ns)

    def started(self, request_id: RequestId, now_ns: int) -> Commands:
        """A wait came true."""
        for watch in self._watches:
            if request_id in watch.waiting:
                watch.waiting.remove(request_id)
                watch.realised_ns += now_ns - watch.at_ns
        yield from self._close_watches()

    def finished(self, record: RequestRecord) -> None:
        """Another length of an answer."""
        self._lengths.add(len(record.outputs))

    def reported(self, group: GroupRecord, now_ns: int) -> Commands:
        """Look at the group's demand; O(1) unless it is too much."""
        pressure = self._observe(group, now_ns)
        if pressure.is_imminent:
            yield from self._look_if_due(now_ns)

    def _observe(self, group: GroupRecord, now_ns: int) -> Pressure:
        known = self._monitors.get(group.id)
        if known is None or known[0] != group.epoch:  # another layout has other demand
            known = self._monitors[group.id] = (group.epoch, DemandMonitor())
            self._forget_old_groups()
        pressure = known[1].observe(demand_blocks(group), capacity_blocks(group), now_ns)
        self._pressures[group.id] = pressure
        return pressure

    def tick(self, now_ns: int) -> Commands:
        """Think of restoring, of a restore that should turn back, and of overload between
        reports. An idle group reports nothing."""
        self._drop_left_watches()
        yield from self._close_watches()
        pressures = [self._observe(group, now_ns) for group in self._book.groups.values()]
        if self._coordinator.is_busy:
            yield from self._turn_back(now_ns)
            return
        self._restoring = None
        if not any(pressure.is_reached for pressure in pressures):
            yield from self._note_shortage(0, now_ns)
        if any(pressure.is_imminent for pressure in pressures):
            yield from self._look_if_due(now_ns)
        elif self._may_restore(now_ns):
            yield from self._consider_restore(now_ns)

    def recorded(self, record: TransitionRecord, now_ns: int) -> None:
        """Learn what a change costs, and how long to leave the layout alone after it."""
        if record.outcome == "commit":
            return
        self._costs.add(record)
        dwell_ns = self._dwell_ns()
        if record.kind == TransitionKind.MERGE.value:
            self._next_drop_ns = max(self._next_drop_ns, now_ns + dwell_ns)
        self._next_restore_ns = max(self._next_restore_ns, now_ns + dwell_ns)

    def _dwell_ns(self) -> int:
        return max(LEAST_DWELL_NS, int(DWELL_FACTOR * self._costs.cost_ns))

    def _now(self) -> Iterator[Pressure]:
        for group_id in self._book.groups:
            pressure = self._pressures.get(group_id)
            if pressure is not None:
                yield pressure

    def _forget_old_groups(self) -> None:
        for gone in self._monitors.keys() - self._book.groups.keys():
            del self._monitors[gone]
            self._pressures.pop(gone, None)

    # ------------------------------------------------------------ dropping

    def _look_if_due(self, now_ns: int) -> Commands:
        """A look costs milliseconds for each group: the more there are, the rarer."""
        if now_ns >= self._next_look_ns:
            groups = len(self._book.groups)
            self._next_look_ns = now_ns + EVALUATE_NS * max(1, groups // GROUPS_PER_LOOK)
            yield from self._look(now_ns)

    def _look(self, now_ns: int) -> Commands:
        """Demand exceeds capacity somewhere, or will soon."""
        if self._coordinator.is_busy:
            yield from self._turn_back(now_ns)
            return
        if self._is_held or not self.may_drop or now_ns < self._next_drop_ns:
            return
        is_reached = any(pressure.is_reached for pressure in self._now())
        if not is_reached and not self._is_confirmed(now_ns):
            return
        if is_reached:
            lacking_blocks = self._plan(demand_blocks).lacking_blocks
            yield from self._note_shortage(lacking_blocks, now_ns)
        plan = self._plan(self._soon_blocks)
        chosen: list[_Candidate] = []
        for merge in plan.merges:
            candidate = self._candidate([self._book.groups[g] for g in merge], now_ns)
            if isinstance(candidate, Decision):
                yield from self._note(candidate, now_ns)
                continue
            verdict = self._judge(candidate)
            yield from self._note(self._decision(candidate, verdict), now_ns)
            if verdict in (Verdict.ACT, Verdict.WOULD_ACT):
                self._watch(candidate, now_ns)
                chosen.append(candidate)
        if chosen:
            yield from self._act(chosen, now_ns)

    def _is_confirmed(self, now_ns: int) -> bool:
        """Overload has been imminent for a moment: groups that share a burst see it one after the
        other, and are to be planned together."""
        if now_ns - self._last_imminent_ns > 3 * CONFIRM_NS:
            self._imminent_since_ns = now_ns
        self._last_imminent_ns = now_ns
        return now_ns - self._imminent_since_ns >= CONFIRM_NS

    def _plan(self, demand_of: Callable[[GroupRecord], int]) -> DropPlan:
        groups = [
            GroupDemand(
                group=record.id,
                instances=record.group.instances,
                domain=min(record.group.instances) // MAX_SLOTS,
                capacity_blocks=capacity_blocks(record),
                demand_blocks=demand_of(record),
            )
            for record in self._book.groups.values()
            if self._is_eligible(record)
        ]
        shape = self._coordinator.shape()
        return plan_drop(groups, shape.copy_blocks, min(MAX_SLOTS, shape.num_layers))

    def _soon_blocks(self, record: GroupRecord) -> int:
        """Demand as it will be soon, if it goes on rising."""
        demand = demand_blocks(record)
        pressure = self._pressures.get(record.id)
        rise = max(0.0, pressure.slope_blocks_per_s) if pressure is not None else 0.0
        return demand + int(rise * IMMINENT_NS / SECOND_NS)

    def _candidate(self, records: Sequence[GroupRecord], now_ns: int) -> _Candidate | Decision:
        """What is known of a merge; or the decision against one that drops alone cannot make."""
        instances = tuple(sorted(i for record in records for i in record.group.instances))
        shape, cost = self._coordinator.shape(), self._coordinator.cost()
        groups = [record.group for record in records]
        try:
            expected = self._estimator.expected_requests(records, shape.copy_blocks, now_ns)
            typical = self._coordinator.typical((instances,), expected)
            step = next_step(shape, groups, (instances,), cost, typical)
        except LayoutError as error:
            return self._impossible(records, str(error))
        if step is None or step.transitions[0].kind is not TransitionKind.MERGE:
            return self._impossible(records, "layers would have to be loaded first")
        planned = step.transitions[0]
        blocks = planned.capacity_pages[0] * shape.blocks_per_page
        prospect = Prospect(planned.targets, (blocks,))
        estimate = self._estimator.drop(records, prospect, cost, now_ns)
        pressures = [self._pressures.get(record.id) for record in records]
        is_reached = any(p is not None and p.is_reached for p in pressures)
        return _Candidate(tuple(records), prospect, estimate, is_reached, expected)

    def _judge(self, candidate: _Candidate) -> Verdict:
        """The gain rule. With SLOs the gain is attainment."""
        estimate = candidate.estimate
        act = Verdict.ACT if self._acts else Verdict.WOULD_ACT
        if self._book.config.trigger is Trigger.MEMORY_ONLY:
            return act if candidate.is_reached else Verdict.NO_GAIN
        stay, change = estimate.stay, estimate.change
        if not stay.memory_ns and not candidate.is_reached:
            return Verdict.NO_NEED
        # Without memory, computing is wasted too: what counts is what would be left with it.
        is_memory = stay.memory_ns > LEAST_MEMORY_SHARE * stay.total_ns
        if not is_memory or change.compute_ns > stay.total_ns / 2:
            return Verdict.COMPUTE_BOUND
        if self._estimator.slos.are_given:
            least = stay.attained + max(1.0, LEAST_GAIN * (stay.requests - stay.attained))
            return act if change.attained >= least else Verdict.NO_GAIN
        limit_ns = (1.0 - LEAST_GAIN) * stay.total_ns
        return act if change.total_ns + estimate.stall_ns <= limit_ns else Verdict.NO_GAIN

    def _act(self, chosen: Sequence[_Candidate], now_ns: int) -> Commands:
        self._next_drop_ns = now_ns + self._dwell_ns()
        self._next_restore_ns = max(self._next_restore_ns, self._next_drop_ns)
        if not self._acts:
            return
        changed: dict[InstanceId, tuple[InstanceId, ...]] = {}
        for candidate in chosen:
            changed |= dict.fromkeys(candidate.instances, candidate.instances)
        saved_s = sum(self._saved_ns(candidate) for candidate in chosen) / SECOND_NS
        why = f"overload, {saved_s:.1f} request-seconds less waiting expected"
        expected = max(candidate.expected_requests for candidate in chosen)
        yield from self._wish(self._partition(changed), why, now_ns, expected)

    @staticmethod
    def _saved_ns(candidate: _Candidate) -> float:
        estimate = candidate.estimate
        return estimate.stay.total_ns - estimate.change.total_ns - estimate.stall_ns

    # ------------------------------------------------------------ restoring

    def _may_restore(self, now_ns: int) -> bool:
        config = self._book.config
        return (
            self._acts
            and config.may_restore
            and not self._is_held
            and now_ns >= self._next_restore_ns
        )

    def _consider_restore(self, now_ns: int) -> Commands:
        """The first merged group that would be better off as whole instances."""
        for record in tuple(self._book.groups.values()):
            if len(record.group.stages) == 1 or not self._is_eligible(record):
                continue
            if not self._fits_whole(record, now_ns):
                continue
            candidate = self._restored(record, now_ns)
            if candidate is None:
                continue
            verdict = self._judge_restore(candidate)
            yield from self._note(self._decision(candidate, verdict, "restore"), now_ns)
            if verdict is Verdict.ACT:
                yield from self._restore(record, now_ns)
                return

    def _whole_blocks(self, record: GroupRecord) -> int:
        return sum(self._book.instances[i].total_blocks for i in record.group.instances)

    def _fits_whole(self, record: GroupRecord, now_ns: int) -> bool:
        """(2 - 1/g) x use <= 1, use as a share of whole instances (design section 3): what comes in
        and what goes out must be held at once. Planner and members have the last word."""
        used = self._estimator.used_blocks(record, now_ns)
        factor = 2.0 - 1.0 / len(record.group.instances)
        return factor * used <= self._whole_blocks(record)

    def _restored(self, record: GroupRecord, now_ns: int) -> _Candidate | None:
        shape, cost = self._coordinator.shape(), self._coordinator.cost()
        wish = tuple((instance,) for instance in sorted(record.group.instances))
        try:
            step = next_step(shape, [record.group], wish, cost, self._coordinator.typical(wish))
        except LayoutError:
            return None
        if step is None:
            return None
        planned = step.transitions[0]
        blocks = tuple(pages * shape.blocks_per_page for pages in planned.capacity_pages)
        prospect = Prospect(planned.targets, blocks)
        estimate = self._estimator.restore(record, prospect, cost, now_ns)
        return _Candidate((record,), prospect, estimate, is_reached=False)

    def _judge_restore(self, candidate: _Candidate) -> Verdict:
        """Nobody waits longer for memory, all demand of the horizon fits with room to spare, and
        what running requests gain in pace is more than they pay for the change."""
        estimate = candidate.estimate
        if estimate.peak_tokens > RESTORE_FILL:
            return Verdict.NO_GAIN
        if not estimate.running:
            return Verdict.ACT
        faster = 1.0 - estimate.change_decode_ns / max(1.0, estimate.stay_decode_ns)
        gain_ns = estimate.running * faster * 10 * SECOND_NS
        waits_ns = estimate.change.total_ns - estimate.stay.total_ns
        return Verdict.ACT if gain_ns > waits_ns + estimate.stall_ns else Verdict.NO_GAIN

    def _restore(self, record: GroupRecord, now_ns: int) -> Commands:
        self._next_restore_ns = now_ns + self._dwell_ns()
        instances = record.group.instances
        layout: Wish = tuple(group.instances for group in self._book.layout.groups)
        whole = self._whole_blocks(record)
        self._restoring = _Restoring(frozenset(instances), layout, whole)
        singles: dict[InstanceId, tuple[InstanceId, ...]] = {i: (i,) for i in instances}
        yield from self._wish(self._partition(singles), "demand fits whole instances", now_ns)

    def _turn_back(self, now_ns: int) -> Commands:
        """A restore under way meets a new burst: back, while it can. Usage is counted from the
        front's books, for a scheduler that compacts counts open pages only."""
        restoring = self._restoring
        if restoring is None or not self.may_drop or not self._coordinator.can_turn_back:
            return
        used = sum(
            self._estimator.used_blocks(record, now_ns)
            for record in self._book.groups.values()
            if restoring.instances & {*record.group.instances}
        )
        if used > restoring.whole_blocks:
            self._restoring = None
            self._next_restore_ns = now_ns + self._dwell_ns()
            yield from self._wish(restoring.layout, "demand rises while restoring", now_ns)

    # ------------------------------------------------------------ notes

    def _impossible(self, records: Sequence[GroupRecord], reason: str) -> Decision:
        pressures = [self._pressures.get(record.id) for record in records]
        return Decision(
            number=-1,
            kind="drop",
            verdict=Verdict.NOT_POSSIBLE,
            groups=tuple(record.group.instances for record in records),
            demand_blocks=sum(p.demand_blocks for p in pressures if p is not None),
            capacity_blocks=sum(map(capacity_blocks, records)),
            is_reached=any(p is not None and p.is_reached for p in pressures),
            reason=reason,
        )

    def _decision(self, candidate: _Candidate, verdict: Verdict, kind: str = "drop") -> Decision:
        estimate = candidate.estimate
        return Decision(
            number=-1,
            kind=kind,
            verdict=verdict,
            groups=tuple(record.group.instances for record in candidate.records),
            demand_blocks=sum(map(demand_blocks, candidate.records)),
            capacity_blocks=sum(map(capacity_blocks, candidate.records)),
            new_capacity_blocks=sum(candidate.prospect.capacity_blocks),
            running=estimate.running,
            queued=estimate.queued,
            arrivals_per_s=estimate.arrivals_per_s,
            freed_blocks_per_s=estimate.freed_blocks_per_s,
            stay=estimate.stay,
            change=estimate.change,
            stall_ns=estimate.stall_ns,
            is_reached=candidate.is_reached,
        )

    def _note(self, decision: Decision, now_ns: int) -> Commands:
        """Number and say a decision, but not the same verdict all the time, nor that there was
        nothing to decide."""
        if decision.verdict is Verdict.NO_NEED:
            return
        key = (decision.kind, tuple(sorted(i for g in decision.groups for i in g)))
        known = self._noted.get(key)
        acts = decision.verdict in (Verdict.ACT, Verdict.WOULD_ACT)
        is_old = known is not None and known.verdict is decision.verdict
        if known is not None and is_old and not acts and now_ns - known.at_ns < REPEAT_NS:
            return
        self._noted[key] = _Noted(decision.verdict, now_ns)
        yield self._say(replace(decision, number=self._next_number))
        self._next_number += 1

    @staticmethod
    def _say(note: DecisionNote) -> NoteDecision:
        return NoteDecision(note)

    def _note_shortage(self, lacking_blocks: int, now_ns: int) -> Commands:
        whole = [r.total_blocks for r in self._book.instances.values() if r.total_blocks]
        wanted = -(-lacking_blocks // min(whole)) if whole else 0
        signal = self._shortage.observe(Shortage(lacking_blocks, wanted), now_ns)
        if signal is not None:
            yield self._say(signal)

    def _watch(self, candidate: _Candidate, now_ns: int) -> None:
        """The waits of those who are queued now will show what the decision was worth."""
        waiting = {
            request_id
            for record in candidate.records
            for request_id in record.requests
            if not self._book.requests[request_id].started
        }
        if waiting:
            number = self._next_number - 1
            predicted_ns = candidate.estimate.queued_change_ns
            self._watches.append(_Watch(number, now_ns, predicted_ns, waiting, len(waiting)))

    def _drop_left_watches(self) -> None:
        """Requests that ended without a start will not start any more."""
        for watch in self._watches:
            watch.waiting &= self._book.requests.keys()

    def _close_watches(self) -> Commands:
        done = [watch for watch in self._watches if not watch.waiting]
        for watch in done:
            self._watches.remove(watch)
            yield self._say(
                Realised(watch.number, watch.requests, watch.predicted_ns, watch.realised_ns)
            )
