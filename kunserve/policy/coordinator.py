"""Carries wishes for another layout out: the protocol of `kunserve.policy.transition` on the book.

Entering a state sends its orders; an answer of every member leads to the next one. Disjoint groups
may be in transition at once. Everything is values: what members answer is enough to plan the
exchange, and the plan is part of the orders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from kunserve.core.errors import LayoutError
from kunserve.core.events import AnswerWish, Command, KillInstance, LogTransition, WishKind
from kunserve.core.ids import GroupId, InstanceId, RequestId, TransitionId
from kunserve.core.layout import Group, Part
from kunserve.core.memory import KvExtent, PageRun, PartRuns, pages_of, runs_of
from kunserve.core.transition import (
    Abort,
    Aborted,
    Adopt,
    Adopted,
    AdoptedRequest,
    Compact,
    Compacted,
    Fence,
    Fenced,
    Finish,
    Finished,
    FrozenRequest,
    Gather,
    Gathered,
    Grow,
    Home,
    MoveProgress,
    PageMove,
    PartSource,
    Prepare,
    Prepared,
    Refused,
    Remap,
    Remapped,
    Reset,
    Snapshot,
    Snapshotted,
    TransitionRecord,
    TransitionReport,
)
from kunserve.policy.book import SECOND_NS, Book, GroupRecord, InstanceRecord, InstanceState
from kunserve.policy.cost_model import CostModel
from kunserve.policy.dispatcher import PrefixIndex
from kunserve.policy.exchange import (
    ExchangeError,
    ExchangePlan,
    Member,
    SplitMember,
    Tenant,
    full_blocks,
    home_pages,
    pages_of_home,
    plan_exchange,
    plan_gather,
    still_right,
    used_blocks,
)
from kunserve.policy.planner import (
    ClusterShape,
    PlannedTransition,
    TransitionKind,
    TypicalStep,
    Wish,
    drop_all,
    next_step,
    restore_all,
)
from kunserve.policy.prefix import block_hashes
from kunserve.policy.transition import Signal, State, Transition

Commands = Iterator[Command]

GATHER_HEADROOM = 0.85
"""Homes leave room for gathering ahead only if this share of them holds what is in use."""


@dataclass
class Pursuit:
    """A wish that is being carried out, and the numbers of all who asked for it."""

    numbers: list[int]
    kind: WishKind
    groups: Wish
    why: str
    expected_requests: int = 0


@dataclass
class Regrow:
    """Pages that a split gave up before it was aborted: the leader gets them back when all members
    have mapped them again."""

    group: Group
    pages: tuple[PageRun, ...]
    waiting_for: set[InstanceId]
    deadline_ns: int


@dataclass
class Active:
    """A transition under way, and what its members have said so far."""

    transition: Transition
    wish: int
    homes: tuple[Home, ...] = ()
    gathers: bool = True
    is_overtaken: bool = False
    extents: dict[InstanceId, tuple[KvExtent, ...]] = field(default_factory=dict)
    planned_gather: tuple[PageMove, ...] = ()
    gathered: set[int] = field(default_factory=set)
    fenced: dict[InstanceId, Fenced] = field(default_factory=dict)
    adopted: dict[RequestId, tuple[FrozenRequest, int]] = field(default_factory=dict)
    plan: ExchangePlan | None = None
    progress: dict[InstanceId, MoveProgress] = field(default_factory=dict)
    progress_ns: int = 0
    finished: dict[InstanceId, Finished] = field(default_factory=dict)
    record: TransitionRecord | None = None
    gained_pages: int = 0
    gained_from_file: int = 0
    remap_ns: int = 0

    @property
    def keep(self) -> tuple[PageRun, ...]:
        """Range pages of all homes."""
        return runs_of(page for home in self.homes for page in pages_of(home.pages))


class Coordinator:
    """Transitions of the groups in `book`.

    Args:
        dispatch_parked: leases requests that wait in the front, once a group can take them.
    """

    def __init__(self, book: Book, dispatch_parked: Callable[[], Commands]) -> None:
        self._book = book
        self._dispatch_parked = dispatch_parked
        self._active: dict[TransitionId, Active] = {}
        self._pursuit: Pursuit | None = None
        self._regrows: dict[TransitionId, Regrow] = {}
        self._next_id = 0
        self._answers: dict[type, Callable[[Active, Any, int], Commands]] = {
            Refused: self._on_refused,
            Compacted: self._on_answer,
            Prepared: self._on_prepared,
            Snapshotted: self._on_snapshotted,
            Gathered: self._on_gathered,
            Fenced: self._on_fenced,
            Remapped: self._on_remapped,
            Adopted: self._on_answer,
            MoveProgress: self._on_progress,
            Finished: self._on_finished,
        }
        self._entries: dict[State, Callable[[Active, int], Commands]] = {
            State.COMPACT: self._enter_compact,
            State.PREPARE: self._enter_prepare,
            State.SNAPSHOT: self._enter_snapshot,
            State.GATHER: self._enter_gather,
            State.FENCE: self._enter_fence,
            State.REMAP: self._enter_remap,
            State.ADOPT: self._enter_adopt,
            State.MOVE: self._enter_move,
            State.FINISH: self._enter_finish,
            State.DONE: self._enter_done,
            State.ABORTED: self._enter_aborted,
            State.BROKEN: self._enter_broken,
        }

    # ------------------------------------------------------------ what others may read

    def state_of(self, instance: InstanceId) -> State | None:
        """The state of the transition that `instance` takes part in."""
        active = self._transition_of(instance)
        return active.transition.state if active else None

    @property
    def is_busy(self) -> bool:
        """True while a transition is under way or a wish waits."""
        return bool(self._active) or self._pursuit is not None

    @property
    def can_turn_back(self) -> bool:
        """True while all that is under way could still be aborted."""
        return all(active.transition.can_turn_back for active in self._active.values())

    def _transition_of(self, instance: InstanceId) -> Active | None:
        for active in self._active.values():
            if instance in active.transition.members:
                return active
        return None

    # ------------------------------------------------------------ wishes

    def wish(
        self,
        number: int,
        kind: WishKind,
        groups: Wish,
        why: str,
        now_ns: int,
        expected_requests: int = 0,
    ) -> Commands:
        """Take a wish up; transitions that can turn back do, the others end first. Layers are
        split for `expected_requests`, if these are more than there are now."""
        if not self._book.config.part_pages:
            yield AnswerWish(number, False, "this cluster has whole instances only")
            return
        serving = self._book.layout.groups
        away = self._away(groups)
        if away or not serving:
            what = f"instances {away} do not serve now" if away else "no instance serves now"
            yield AnswerWish(number, False, f"{what}; try again when they do")
            return
        try:
            wished = self._wanted(kind, groups)
            shape = self.shape()
            typical = self.typical(wished, expected_requests)
            next_step(shape, serving, wished, self.cost(), typical)
        except LayoutError as error:
            yield AnswerWish(number, False, f"illegal: {error}")
            return
        if self._pursuit is not None and _same(self._pursuit.groups, wished):
            self._pursuit.numbers.append(number)
            return
        yield from self.withdraw("another layout was wished meanwhile")
        self._pursuit = Pursuit([number], kind, wished, why, expected_requests)
        for active in tuple(self._active.values()):
            if active.transition.can_turn_back:
                active.transition.reason = "another layout was wished"
                active.is_overtaken = True
                yield from self._signal(active, Signal.NEW_WISH, now_ns)
        yield from self._pursue(now_ns)

    def _away(self, groups: Wish) -> list[InstanceId]:
        """Instances of the cluster that are wished, but are in no group now."""
        named = {instance for group in groups for instance in group}
        serving = {i for group in self._book.layout.groups for i in group.instances}
        return sorted(named & self._book.instances.keys() - serving)

    def _wanted(self, kind: WishKind, groups: Wish) -> Wish:
        """The partition that is wished, of the instances that serve now. Those that drain stay, or
        become, whole instances.

        Raises:
            LayoutError: one of them is wished into a larger group.
        """
        serving = self._book.layout.groups
        draining = [i for i, record in self._book.instances.items() if record.is_draining]
        if kind is WishKind.RESTORE:
            return restore_all(serving)
        if kind is WishKind.DROP:
            whole = [group for group in restore_all(serving) if group[0] in draining]
            others = tuple(i for i in drop_all(serving)[0] if i not in draining)
            return (*whole, others) if others or not whole else tuple(whole)
        for group in groups:
            for instance in group:
                if instance in draining and len(group) > 1:
                    raise LayoutError(f"instance {instance} is draining; leave it by itself")
        return groups

    def withdraw(self, message: str) -> Commands:
        """The wish that is being carried out will not come true."""
        if self._pursuit is not None:
            pursuit, self._pursuit = self._pursuit, None
            for number in pursuit.numbers:
                yield AnswerWish(number, False, message)

    def _withdraw(self, active: Active, message: str) -> Commands:
        """`withdraw`, if that transition was begun for the wish that is pursued now."""
        if self._pursuit is not None and self._pursuit.numbers[0] == active.wish:
            yield from self.withdraw(message)

    def _pursue(self, now_ns: int) -> Commands:
        """Begin the next step towards the wish, unless one is under way."""
        pursuit = self._pursuit
        if pursuit is None or self._active:
            return
        groups = self._book.layout.groups
        try:
            pursuit.groups = self._wanted(pursuit.kind, pursuit.groups)
            typical = self.typical(pursuit.groups, pursuit.expected_requests)
            step = next_step(self.shape(), groups, pursuit.groups, self.cost(), typical)
        except LayoutError as error:
            yield from self.withdraw(str(error))
            return
        if step is None:
            yield from self._grant()
            return
        for planned in step.transitions:
            yield from self._begin(planned, pursuit, now_ns)

    def _grant(self) -> Commands:
        pursuit = self._pursuit
        if pursuit is None:
            return
        self._pursuit = None
        message = f"the layout is as wished at epoch {self._book.epoch}"
        for number in pursuit.numbers:
            yield AnswerWish(number, True, message)

    def _grant_if_reached(self) -> Commands:
        """At COMMIT: the layout may be as wished already."""
        pursuit = self._pursuit
        now = {frozenset(group.instances) for group in self._book.layout.groups}
        if pursuit is not None and now == {frozenset(group) for group in pursuit.groups}:
            yield from self._grant()

    def shape(self) -> ClusterShape:
        """Sizes of the instances that serve now."""
        config = self._book.config
        serving = {i for group in self._book.layout.groups for i in group.instances}
        return ClusterShape(
            num_layers=config.num_layers,
            part_pages=dict(config.part_pages),
            pages={i: self._book.instances[i].num_pages for i in serving},
            slot_pages=config.slot_pages,
            blocks_per_page=config.blocks_per_page,
        )

    def cost(self) -> CostModel:
        """The fastest of the instances' fits: a disturbed measurement is only ever too slow."""
        serving = [i for group in self._book.layout.groups for i in group.instances]
        fits = [CostModel(*self._book.instances[i].costs) for i in serving]
        chunks = TypicalStep().chunks
        return min(fits, key=lambda fit: fit.step_ns(chunks), default=CostModel(0, 0, 0, 0))

    def typical(self, wished: Wish, expected_requests: int = 0) -> TypicalStep:
        """A microbatch of the moment in the largest wished group: its share of all requests, or of
        those that are expected if these are more."""
        loads = [group.load for group in self._book.groups.values() if group.load is not None]
        requests = sum(load.num_running + load.num_waiting for load in loads)
        requests = max(requests, expected_requests)
        running = sum(load.num_running for load in loads)
        if not running:
            return TypicalStep()
        used = sum(load.total_blocks - load.available_blocks for load in loads)
        stages = max(len(group) for group in wished)
        return TypicalStep(
            decodes=-(-requests // stages),
            context_tokens=max(1, used * self._book.config.block_size // running),
        )

    # ------------------------------------------------------------ a transition's life

    def _begin(self, planned: PlannedTransition, pursuit: Pursuit, now_ns: int) -> Commands:
        transition = Transition(
            id=TransitionId(self._next_id),
            kind=planned.kind,
            why=pursuit.why,
            sources=planned.sources,
            targets=self._name(planned),
            gains={i: parts for i, parts in planned.gains.items() if parts},
            begun_ns=now_ns,
        )
        self._next_id += 1
        active = Active(transition, pursuit.numbers[0])
        self._active[transition.id] = active
        is_merge = planned.kind is TransitionKind.MERGE
        yield from self._signal(active, Signal.MERGE if is_merge else Signal.SPLIT, now_ns)

    def _name(self, planned: PlannedTransition) -> tuple[Group, ...]:
        """Ids and epochs of the targets: a group keeps its id for as long as it has its leader."""
        ids = {group.leader: group.id for group in planned.sources}
        targets = []
        for stages in planned.targets:
            group_id = ids.get(stages[0].instance)
            group_id = self._book.new_group_id() if group_id is None else group_id
            targets.append(Group(group_id, self._book.new_epoch(), stages))
        return tuple(targets)

    def _signal(self, active: Active, signal: Signal, now_ns: int) -> Commands:
        """Follow the table; states that wait for nobody are passed through."""
        transition = active.transition
        before = transition.state
        state = transition.advance(signal, now_ns)
        if state is before:
            return
        config = self._book.config
        brings_in = transition.kind is TransitionKind.SPLIT
        is_long = brings_in and state in (State.COMPACT, State.PREPARE, State.GATHER)
        timeout_ns = config.long_timeout_ns if is_long else config.answer_timeout_ns
        transition.deadline_ns = now_ns + timeout_ns
        transition.waiting_for = set()
        yield from self._entries[state](active, now_ns)
        if transition.state is state and not transition.is_over and not transition.waiting_for:
            yield from self._all_answered(active, now_ns)

    def _all_answered(self, active: Active, now_ns: int) -> Commands:
        signal = Signal.ANSWERED
        if active.transition.state is State.PREPARE:
            is_merge = active.transition.kind is TransitionKind.MERGE
            signal = Signal.MERGE_READY if is_merge else Signal.SPLIT_READY
        if active.transition.state is State.FENCE:
            try:
                self._plan(active)
            except ExchangeError as error:
                active.transition.reason = str(error)
                signal = Signal.REFUSED
        yield from self._signal(active, signal, now_ns)

    def _over(self, active: Active, now_ns: int) -> Commands:
        del self._active[active.transition.id]
        yield from self._pursue(now_ns)

    # ------------------------------------------------------------ answers

    def take(self, report: TransitionReport, now_ns: int) -> Commands:
        """An answer of a member. What belongs to a transition that is over is dropped."""
        if isinstance(report, Aborted):
            yield from self._on_aborted(report)
            return
        active = self._active.get(report.transition)
        if active is None or report.instance not in active.transition.members:
            return
        yield from self._answers[type(report)](active, report, now_ns)

    def _on_answer(self, active: Active, report: TransitionReport, now_ns: int) -> Commands:
        waiting_for = active.transition.waiting_for
        if report.instance in waiting_for:
            waiting_for.discard(report.instance)
            if not waiting_for:
                yield from self._all_answered(active, now_ns)

    def _on_aborted(self, report: Aborted) -> Commands:
        regrow = self._regrows.get(report.transition)
        if regrow is None:
            return
        regrow.waiting_for.discard(report.instance)
        if not regrow.waiting_for:
            del self._regrows[report.transition]
            group = regrow.group
            yield Grow(group.leader, group.id, group.epoch, regrow.pages)

    def _on_refused(self, active: Active, report: Refused, now_ns: int) -> Commands:
        transition = active.transition
        if not transition.can_turn_back:
            return
        if transition.state is State.COMPACT and active.gathers:
            active.gathers = False  # homes without room for gathering are larger
            yield from self._enter_compact(active, now_ns)
            return
        transition.reason = f"instance {report.instance}: {report.reason}"
        yield from self._signal(active, Signal.REFUSED, now_ns)

    def _on_prepared(self, active: Active, report: Prepared, now_ns: int) -> Commands:
        self._book.instances[report.instance].parts = _parts_of(report.parts)
        active.extents[report.instance] = report.extents
        active.gained_pages += report.gained_pages
        active.gained_from_file += report.gained_from_file
        yield from self._on_answer(active, report, now_ns)

    def _on_snapshotted(self, active: Active, report: Snapshotted, now_ns: int) -> Commands:
        config = self._book.config
        source = active.transition.sources[0]
        tenants = []
        for request in report.requests:
            full = full_blocks(request.block_table, request.computed_tokens, config.block_size)
            if request.home is not None and full:
                tenants.append(Tenant(request.request_id, source, request.home, full))
        active.planned_gather = plan_gather(
            [group.stages for group in active.transition.targets],
            self._members(active),
            tenants,
            config.blocks_per_page,
        )
        yield from self._on_answer(active, report, now_ns)

    def _on_gathered(self, active: Active, report: Gathered, now_ns: int) -> Commands:
        active.gathered.update(report.moves)
        yield from self._on_answer(active, report, now_ns)

    def _on_fenced(self, active: Active, report: Fenced, now_ns: int) -> Commands:
        active.fenced[report.instance] = report
        active.extents[report.instance] = report.extents
        yield from self._on_answer(active, report, now_ns)

    def _on_remapped(self, active: Active, report: Remapped, now_ns: int) -> Commands:
        self._book.instances[report.instance].parts = _parts_of(report.parts)
        active.remap_ns = max(active.remap_ns, report.elapsed_ns)
        yield from self._on_answer(active, report, now_ns)

    def _on_progress(self, active: Active, report: MoveProgress, now_ns: int) -> Commands:
        known = active.progress.get(report.instance)
        if known is None or known != replace(report, waits_for=known.waits_for):
            active.progress_ns = now_ns
        active.progress[report.instance] = report
        if report.is_complete and active.transition.state is State.MOVE:
            yield from self._on_answer(active, report, now_ns)

    def _on_finished(self, active: Active, report: Finished, now_ns: int) -> Commands:
        active.finished[report.instance] = report
        yield from self._on_answer(active, report, now_ns)

    # ------------------------------------------------------------ before COMMIT

    def _enter_compact(self, active: Active, now_ns: int) -> Commands:
        transition, config = active.transition, self._book.config
        source = transition.sources[0]
        members = self._split_members(active)
        counts = home_pages(members, len(transition.targets), gather=active.gathers)
        if active.gathers and self._used_blocks(source) > GATHER_HEADROOM * sum(counts) * (
            config.blocks_per_page
        ):
            active.gathers = False
            counts = home_pages(members, len(transition.targets), gather=False)
        active.homes = tuple(
            Home(pages_of_home([self._slot(i) for i in group.instances], count))
            for group, count in zip(transition.targets, counts, strict=True)
        )
        transition.waiting_for = {source.leader}
        yield Compact(source.leader, transition.id, source.id, source.epoch, active.homes)

    def _used_blocks(self, group: Group) -> int:
        load = self._book.groups[group.id].load
        return load.total_blocks - load.available_blocks if load else 0

    def _split_members(self, active: Active) -> list[SplitMember]:
        shape, source = self.shape(), active.transition.sources[0]
        now_parts = shape.group_parts(source.stages)
        stage_now = {stage.instance: stage for stage in source.stages}
        members = []
        for index, target in enumerate(active.transition.targets):
            then_parts = shape.group_parts(target.stages)
            for stage in target.stages:
                instance = stage.instance
                both = set(now_parts[instance]) | set(then_parts[instance])
                pages = shape.pages[instance]
                members.append(
                    SplitMember(
                        instance=instance,
                        slot=self._slot(instance),
                        layers_now=stage_now[instance].layers,
                        layers_then=stage.layers,
                        kv_pages_both=pages - shape.pages_of_parts(tuple(both)),
                        kv_pages_then=pages - shape.pages_of_parts(then_parts[instance]),
                        target=index,
                    )
                )
        return members

    def _slot(self, instance: InstanceId) -> PageRun:
        pages = self._book.config.slot_pages
        return PageRun(int(instance) * pages, pages)

    def _enter_prepare(self, active: Active, now_ns: int) -> Commands:
        transition = active.transition
        transition.waiting_for = set(transition.members)
        keep = active.keep if transition.kind is TransitionKind.SPLIT else None
        for number, instance in enumerate(transition.members):
            peers = tuple(other for other in transition.members if other != instance)
            sources = tuple(
                self._part_source(part, peers, number + offset)
                for offset, part in enumerate(transition.gains.get(instance, ()))
            )
            yield Prepare(instance, transition.id, peers, sources, keep)

    def _part_source(self, part: Part, peers: tuple[InstanceId, ...], turn: int) -> PartSource:
        """A member that holds the part, by turns; else the file."""
        holders = [i for i in peers if part in self._book.instances[i].parts]
        if not holders:
            return PartSource(part, None)
        peer = holders[turn % len(holders)]
        return PartSource(part, peer, self._book.instances[peer].parts[part])

    def _enter_snapshot(self, active: Active, now_ns: int) -> Commands:
        source = active.transition.sources[0]
        if active.gathers:
            active.transition.waiting_for = {source.leader}
            yield Snapshot(source.leader, active.transition.id, source.id, source.epoch)

    def _enter_gather(self, active: Active, now_ns: int) -> Commands:
        transition = active.transition
        targets = {move.target for move in active.planned_gather}
        transition.waiting_for = set(targets)
        for instance in sorted(targets):
            moves = tuple(move for move in active.planned_gather if move.target == instance)
            yield Gather(instance, transition.id, moves)

    def _enter_fence(self, active: Active, now_ns: int) -> Commands:
        transition = active.transition
        transition.waiting_for = set(transition.members)
        for group in transition.sources:
            self._book.groups[group.id].is_frozen = True
            for instance in group.instances:
                yield Fence(instance, transition.id, group.id, group.epoch)

    def _enter_aborted(self, active: Active, now_ns: int) -> Commands:
        transition = active.transition
        for group in transition.sources:
            record = self._book.groups.get(group.id)
            if record is not None:
                record.is_frozen = False
        self._forget_gains(active)
        pages = self._given_up(active)
        told = [i for i in transition.members if self._book.instances[i].is_alive]
        if pages:
            self._forget_regrows(transition.sources)  # members answer the last one
            deadline_ns = now_ns + self._book.config.long_timeout_ns
            regrow = Regrow(transition.sources[0], pages, set(told), deadline_ns)
            self._regrows[transition.id] = regrow
        for instance in told:
            yield Abort(instance, transition.id, pages)
        gained_bytes = active.gained_pages * self._book.config.page_bytes
        yield LogTransition(replace(transition.record(), gained_bytes=gained_bytes))
        if not active.is_overtaken:
            yield from self._withdraw(active, f"not possible now: {transition.reason}")
        yield from self._dispatch_parked()
        yield from self._over(active, now_ns)

    def _forget_gains(self, active: Active) -> None:
        """Members release what they brought in: nobody may pull it from them."""
        for group in active.transition.sources:
            for instance, held in self.shape().group_parts(group.stages).items():
                record = self._book.instances[instance]
                record.parts = {p: runs for p, runs in record.parts.items() if p in held}

    def _given_up(self, active: Active) -> tuple[PageRun, ...]:
        """What `Prepare.keep` gave up: all that the source group had, unless it is broken."""
        record = self._book.groups.get(active.transition.sources[0].id)
        is_split = active.transition.kind is TransitionKind.SPLIT
        return record.pages if is_split and record is not None else ()

    def _forget_regrows(self, groups: tuple[Group, ...]) -> None:
        ids = {group.id for group in groups}
        self._regrows = {t: r for t, r in self._regrows.items() if r.group.id not in ids}

    # ------------------------------------------------------------ COMMIT

    def _members(self, active: Active) -> list[Member]:
        shape, transition = self.shape(), active.transition
        then_parts: dict[InstanceId, tuple[Part, ...]] = {}
        for group in transition.targets:
            then_parts |= shape.group_parts(group.stages)
        return [
            Member(
                instance=instance,
                kv_pages=shape.pages[instance] - shape.pages_of_parts(then_parts[instance]),
                extents=active.extents.get(instance, ()),
                slot=self._slot(instance),
            )
            for instance in transition.members
        ]

    def _plan(self, active: Active) -> None:
        """Everything is known and stands still: plan the exchange.

        Raises:
            ExchangeError: it cannot be carried out.
        """
        transition, config = active.transition, self._book.config
        tenants: list[Tenant] = []
        adopted: dict[RequestId, tuple[FrozenRequest, int]] = {}
        waiting: list[FrozenRequest] = []
        for source in transition.sources:
            leased = self._book.groups[source.id].requests
            for request in active.fenced[source.leader].requests:
                if request.request_id not in leased:
                    continue  # its client has gone meanwhile
                blocks = used_blocks(
                    request.block_table, request.computed_tokens, config.block_size
                )
                home = request.home if transition.kind is TransitionKind.SPLIT else 0
                if home is None or not blocks:
                    waiting.append(request)
                    continue
                kept = replace(request, block_table=blocks)
                adopted[request.request_id] = (kept, home)
                tenants.append(Tenant(request.request_id, source, home, blocks))
        touched = [block for fenced in active.fenced.values() for block in fenced.touched]
        done = [move for move in active.planned_gather if move.number in active.gathered]
        active.plan = plan_exchange(
            [group.stages for group in transition.targets],
            self._members(active),
            tenants,
            config.blocks_per_page,
            still_right(done, touched, config.blocks_per_page),
        )
        active.adopted = adopted
        self._place_waiting(active, waiting, tenants)

    def _place_waiting(
        self, active: Active, waiting: list[FrozenRequest], tenants: list[Tenant]
    ) -> None:
        """Requests without blocks go where most pages will be free for them."""
        assert active.plan is not None
        bpp, size = self._book.config.blocks_per_page, self._book.config.block_size
        room = [target.num_pages * bpp for target in active.plan.targets]
        drained = [i for i, group in enumerate(active.transition.targets) if self._drains(group)]
        for index in drained if len(drained) < len(room) else ():
            room[index] = -(1 << 40)  # nothing new goes there
        for tenant in tenants:
            room[tenant.target] -= len(tenant.blocks)
        for request in waiting:
            record = self._book.requests[request.request_id]
            tokens = len(record.request.prompt_token_ids) + len(record.outputs)
            target = max(range(len(room)), key=lambda index: (room[index], -index))
            room[target] -= -(-tokens // size)
            empty = FrozenRequest(request.request_id, 0, ())
            active.adopted[request.request_id] = (empty, target)

    def _enter_remap(self, active: Active, now_ns: int) -> Commands:
        """COMMIT: from here only forward."""
        transition, plan = active.transition, active.plan
        assert plan is not None
        self._move_leases(active)
        active.record = self._committed_record(active)
        yield LogTransition(replace(active.record, outcome="commit"))
        transition.waiting_for = set(transition.members)
        for index, group in enumerate(transition.targets):
            for instance in group.instances:
                member = plan.members[instance]
                yield Remap(
                    instance=instance,
                    transition=transition.id,
                    group=group,
                    keep=member.kept(),
                    fresh=runs_of(plan.targets[index].fresh),
                    escrow_pages=member.escrow_pages,
                    departures=tuple(member.departures),
                )
        yield from self._grant_if_reached()

    def _move_leases(self, active: Active) -> None:
        transition, plan, config = active.transition, active.plan, self._book.config
        assert plan is not None
        records = []
        for target_plan, group in zip(plan.targets, transition.targets, strict=True):
            blocks = target_plan.num_pages * config.blocks_per_page
            index, pages = PrefixIndex(blocks), target_plan.all_pages
            records.append(GroupRecord(group, blocks, index, is_frozen=True, pages=pages))
        leased = [
            request_id
            for group in transition.sources
            for request_id in self._book.groups[group.id].requests
        ]
        self._book.replace_groups(transition.sources, records)
        self._forget_regrows(transition.sources)
        for request_id in leased:
            # Not in a leader's report: it never had the lease, and the request starts anew.
            _, target = active.adopted.get(request_id, (None, 0))
            records[target].requests.add(request_id)
            self._book.requests[request_id].group = records[target].id
            active.adopted.setdefault(request_id, (FrozenRequest(request_id, 0, ()), target))

    def _committed_record(self, active: Active) -> TransitionRecord:
        transition, plan, config = active.transition, active.plan, self._book.config
        assert plan is not None
        parts = dict(config.part_pages)
        shape = self.shape()
        before = [shape.group_parts(group.stages) for group in transition.sources]
        after = [shape.group_parts(group.stages) for group in transition.targets]
        held = sum(parts[part] for groups in before for held in groups.values() for part in held)
        then = sum(parts[part] for groups in after for held in groups.values() for part in held)
        moves = [move for member in plan.members.values() for move in member.moves]
        gathered = [move for move in active.planned_gather if move.number in active.gathered]
        return replace(
            transition.record(),
            freed_bytes=max(0, held - then) * config.page_bytes,
            gained_bytes=active.gained_pages * config.page_bytes,
            gained_from_file_bytes=active.gained_from_file * config.page_bytes,
            exchanged_bytes=self._bytes_of(moves),
            gathered_bytes=self._bytes_of(gathered),
            moved_pages=sum(len(move.layers) for move in moves),
            requests=len(active.adopted),
        )

    def _bytes_of(self, moves: Iterable[PageMove]) -> int:
        """What is pulled: blocks with content, not whole pages."""
        blocks = sum(move.block_mask.bit_count() * len(move.layers) for move in moves)
        return blocks * self._book.config.page_bytes // self._book.config.blocks_per_page

    # ------------------------------------------------------------ after COMMIT

    def _enter_adopt(self, active: Active, now_ns: int) -> Commands:
        transition, plan, config = active.transition, active.plan, self._book.config
        assert plan is not None
        transition.waiting_for = set(transition.members)
        active.progress_ns = now_ns
        for index, group in enumerate(transition.targets):
            target = plan.targets[index]
            record = self._book.groups[group.id]
            record.is_frozen = self._drains(group)
            for instance in group.instances:
                order = Adopt(
                    instance=instance,
                    transition=transition.id,
                    group=group.id,
                    epoch=group.epoch,
                    moves=tuple(plan.members[instance].moves),
                    capacity_blocks=target.num_pages * config.blocks_per_page,
                )
                if instance == group.leader:
                    order = replace(
                        order,
                        requests=self._adopted_requests(active, record),
                        pages=runs_of((*target.fresh, *target.complete)),
                        pending=target.pending,
                    )
                yield order
        yield from self._dispatch_parked()

    def _drains(self, group: Group) -> bool:
        """A whole instance that is to be taken out of service."""
        return len(group.stages) == 1 and self._book.instances[group.leader].is_draining

    def _adopted_requests(self, active: Active, record: GroupRecord) -> tuple[AdoptedRequest, ...]:
        """The group's requests as they are now, by arrival; some clients may have gone."""
        adopted = []
        for request_id, request in self._book.requests.items():
            if request_id in record.requests and request_id in active.adopted:
                frozen, _ = active.adopted[request_id]
                adopted.append(
                    AdoptedRequest(request.lease(), frozen.computed_tokens, frozen.block_table)
                )
        return tuple(sorted(adopted, key=lambda a: a.request.arrival_ns))

    def _enter_move(self, active: Active, now_ns: int) -> Commands:
        complete = {i for i, report in active.progress.items() if report.is_complete}
        active.transition.waiting_for = set(active.transition.members) - complete
        active.progress_ns = now_ns
        yield from ()

    def _enter_finish(self, active: Active, now_ns: int) -> Commands:
        transition, plan = active.transition, active.plan
        assert plan is not None
        transition.waiting_for = set(transition.members)
        for index, group in enumerate(transition.targets):
            later = runs_of(plan.targets[index].later)
            for instance in group.instances:
                yield Finish(instance, transition.id, group.id, group.epoch, later)

    def _enter_done(self, active: Active, now_ns: int) -> Commands:
        transition, plan = active.transition, active.plan
        assert plan is not None
        for index, group in enumerate(transition.targets):
            if plan.targets[index].later:
                later = runs_of(plan.targets[index].later)
                yield Grow(group.leader, group.id, group.epoch, later)
        self._remember_prefixes(transition.targets)
        assert active.record is not None
        finished = active.finished.values()
        yield LogTransition(
            replace(
                active.record,
                outcome=transition.state.value,
                phases=tuple(transition.phases),
                remap_ns=active.remap_ns,
                stalled=tuple(stall for report in finished for stall in report.stalled),
                activations=sum(report.activations for report in finished),
                activation_p99_ns=max((r.activation_p99_ns for r in finished), default=0),
            )
        )
        yield from self._over(active, now_ns)

    def _remember_prefixes(self, groups: Iterable[Group]) -> None:
        """Dispatch by prefix goes on: blocks kept their content."""
        for group in groups:
            record = self._book.groups[group.id]
            for request_id in record.requests:
                lease = self._book.requests[request_id].lease()
                tokens = lease.prompt_token_ids + lease.output_token_ids
                record.prefixes.insert(block_hashes(tokens, self._book.config.block_size))

    def _enter_broken(self, active: Active, now_ns: int) -> Commands:
        """The caller has broken the groups; the record says what became of the transition."""
        transition = active.transition
        record = active.record or transition.record()
        yield LogTransition(
            replace(
                record,
                outcome=transition.state.value,
                reason=transition.reason,
                phases=tuple(transition.phases),
                remap_ns=active.remap_ns,
                exchanged_bytes=sum(r.pulled_bytes for r in active.progress.values()),
                recomputed=len(active.adopted),
            )
        )
        yield from self._withdraw(active, f"broken: {transition.reason}")
        yield from self._over(active, now_ns)

    # ------------------------------------------------------------ deaths and deadlines

    def groups_lost_with(self, instance: InstanceId) -> tuple[GroupId, ...]:
        """Groups that end when `instance` dies: its own, and after COMMIT all of its transition."""
        active = self._transition_of(instance)
        if active is not None and not active.transition.can_turn_back:
            return tuple(group.id for group in active.transition.targets)
        group = self._book.layout.group_of(instance)
        return (group.id,) if group else ()

    def lost(self, instance: InstanceId, reason: str, now_ns: int) -> Commands:
        """A member died; its groups are out of the layout already."""
        self._regrows = {
            t: regrow
            for t, regrow in self._regrows.items()
            if instance not in regrow.group.instances
        }
        active = self._transition_of(instance)
        if active is not None:
            active.transition.reason = f"instance {instance} was lost: {reason}"
            yield from self._signal(active, Signal.DEATH, now_ns)

    def reset(self, record: InstanceRecord, now_ns: int) -> Commands:
        """Make a survivor of a broken group a whole instance again."""
        record.state = InstanceState.RESETTING
        record.reset_by_ns = now_ns + self._book.config.long_timeout_ns
        yield Reset(record.id, record.incarnation)

    def tick(self, now_ns: int) -> Commands:
        """Look at deadlines."""
        for active in tuple(self._active.values()):
            if active.transition.id in self._active:
                yield from self._check_deadline(active, now_ns)
        for transition, regrow in self._regrows.items():
            if now_ns <= regrow.deadline_ns:
                continue
            regrow.deadline_ns = now_ns + self._book.config.answer_timeout_ns
            for instance in sorted(regrow.waiting_for):
                reason = f"a transfer of transition {transition} that was given up does not end"
                yield KillInstance(instance, self._book.instances[instance].incarnation, reason)

    def _check_deadline(self, active: Active, now_ns: int) -> Commands:
        transition, config = active.transition, self._book.config
        if transition.state is State.MOVE:
            silent_ns = now_ns - active.progress_ns
            if silent_ns > config.move_timeout_ns:
                active.progress_ns = now_ns  # one kill at a time
                yield from self._kill_stuck(active, silent_ns, now_ns)
            return
        if now_ns <= transition.deadline_ns:
            return
        late = sorted(transition.waiting_for)
        if transition.can_turn_back:
            transition.reason = f"instances {late} did not answer in {transition.state.value}"
            yield from self._signal(active, Signal.DEADLINE, now_ns)
            return
        transition.deadline_ns = now_ns + config.answer_timeout_ns
        for instance in late:
            incarnation = self._book.instances[instance].incarnation
            reason = f"no answer in {transition.state.value} of transition {transition.id}"
            yield KillInstance(instance, incarnation, reason)

    def _kill_stuck(self, active: Active, silent_ns: int, now_ns: int) -> Commands:
        """The exchange stands still: end who has said nothing for long, else whom most wait for,
        else who waits for nobody."""
        instances = self._book.instances
        waiting = sorted(active.transition.waiting_for)
        reports = [active.progress[i] for i in waiting if i in active.progress]
        sources = [r.waits_for for r in reports if r.waits_for is not None]
        unheard = [i for i in waiting if i not in active.progress]
        stuck = max(sources, key=sources.count) if sources else (*unheard, *waiting)[0]
        quietest = min((*waiting, *sources), key=lambda i: instances[i].last_heard_ns)
        if now_ns - instances[quietest].last_heard_ns > self._book.config.move_timeout_ns // 2:
            stuck = quietest
        record = instances[stuck]
        reason = f"the exchange stood still for {silent_ns / SECOND_NS:.1f} s"
        yield KillInstance(stuck, record.incarnation, reason)


def _parts_of(parts: tuple[PartRuns, ...]) -> dict[Part, tuple[PageRun, ...]]:
    return {held.part: held.runs for held in parts}


def _same(one: Wish, other: Wish) -> bool:
    """The same partition, in whatever order."""
    return {frozenset(group) for group in one} == {frozenset(group) for group in other}
