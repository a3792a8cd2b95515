"""A member of the cluster: what an instance decides, pure. No clock, no threads, no sockets.

Both worlds drive it, the process (`kunserve.runtime.instance`) and the simulator, turn by turn:

    for message in inbox:
        member.take(message, now_ns)                  # of the front
    for message, payload in peers:
        member.take_peer(message, payload, now_ns)    # of other instances
    for answer in answers:
        member.computed(answer, now_ns)               # or pulled, part_ready, copied
    for action in member.turn(now_ns, ...):
        world.perform(action)                         # in this order: see `turn`

and once in a while `member.heartbeat(layers_done)`.

**The ring** (design section 1). The leader is stage 0: it schedules, embeds, runs its layers and
hands hidden rows to stage 1; the last stage hands the rows that sample back, and the leader runs
the head. A whole instance is a ring of one, which needs no hand at all.

    leader   RunFirst(m) ---> RunFirst(m + 1) --- RunHead(m) ---> ...
    stage 1            RunStage(m) ---> RunStage(m + 1) ---> ...
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

from kunserve.core.actions import (
    Action,
    CancelCompute,
    Compute,
    Computed,
    Configure,
    Connect,
    Payload,
    RunFirst,
    RunHead,
    RunStage,
    SendFront,
    SendPeer,
    Work,
)
from kunserve.core.errors import AccountingError, InvalidRequestError
from kunserve.core.events import (
    FormGroup,
    GroupReport,
    Heartbeat,
    InstanceReady,
    LeaseRequest,
    RefusalKind,
    RevokeLease,
    StepTiming,
)
from kunserve.core.ids import BlockId, InstanceId, RequestId, TransitionId
from kunserve.core.layout import Group, Part, stage_holds, whole_instance
from kunserve.core.memory import PageRun, pages_of, runs_of
from kunserve.core.migration import MigrationOrder
from kunserve.core.request import TokenOutput
from kunserve.core.step import StepPlan
from kunserve.core.transition import (
    Abort,
    Aborted,
    Adopt,
    Adopted,
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
    MoveProgress,
    PagesPulled,
    PartSource,
    PeerMessage,
    Peers,
    Prepare,
    Prepared,
    Refused,
    Remap,
    Remapped,
    Reset,
    Snapshot,
    Snapshotted,
    StageInput,
    StageOutput,
    TransitionOrder,
)
from kunserve.policy.blocks import BlockPool
from kunserve.policy.cost_model import CostModel
from kunserve.policy.homes import CompactionRefusedError
from kunserve.policy.memory import MemoryBook
from kunserve.policy.migrator import Migrator
from kunserve.policy.mover import Digest, Mover
from kunserve.policy.planner import TypicalStep, slowest_stage
from kunserve.policy.scheduler import Scheduler, SchedulerConfig

MemberMessage = FormGroup | LeaseRequest | RevokeLease | TransitionOrder | MigrationOrder
"""What the front tells a member."""

MOVE_BYTES_PER_STEP = 24 << 20
"""Most bytes that a stage copies for `StepPlan.moves` in a step: about 5 ms on one CPU thread."""

PROGRESS_INTERVAL_NS = 50_000_000
"""At most so often an exchange says how far it is."""


@dataclass(frozen=True)
class MemberConfig:
    """What a member is told at its start. `window_pages`: see `Mover`."""

    instance: InstanceId
    incarnation: int
    num_layers: int
    scheduler: SchedulerConfig
    window_pages: int | None = 64


class Member:
    """The stage that an instance is, the scheduler of the group that it leads, and its transfers.

    Args:
        cost_model: of a whole instance.
        memory: the instance's pages; every change of layout goes through it.
        make_ready: what the instance says when it is whole, at its start and after a reset.
        digest: see `Mover`.
    """

    def __init__(
        self,
        config: MemberConfig,
        cost_model: CostModel,
        memory: MemoryBook,
        make_ready: Callable[[], InstanceReady],
        digest: Digest | None = None,
    ) -> None:
        self._config = config
        self._cost_model = cost_model
        self._memory = memory
        self._make_ready = make_ready
        self._mover = Mover(config.instance, memory, config.window_pages, digest)
        self._migrator = Migrator(
            config.instance,
            config.incarnation,
            config.scheduler.block_size,
            memory,
            self._mover.new_transfer,
        )
        self._actions: list[Action] = []
        # The group and its steps
        self._group: Group | None = None
        self._scheduler: Scheduler | None = None
        self._is_frozen = False
        self._flights: dict[int, StepPlan] = {}
        self._ready: deque[Work] = deque()
        self._active: Work | None = None
        self._urgent: RunHead | None = None  # between the layers of the active work
        self._copies = 0  # of KV, to or from host memory, that the world has begun
        # A transition
        self._transition = TransitionId(-1)
        self._prepare: Prepare | None = None  # that is not answered yet
        self._is_preparing = False
        self._is_compacting = False
        self._is_gathering = False
        self._fence: Fence | None = None  # that is not answered yet
        self._fence_passed = TransitionId(-1)
        self._turning_back: Abort | None = None  # until no old transfer writes any more
        self._is_exchanging = False
        self._adopted = TransitionId(-1)  # the last one whose exchange began here
        self._is_resetting = False
        self._pending_moves: dict[int, int] = {}
        self._early: list[PagesPulled] = []
        self._peers: frozenset[InstanceId] = frozenset()
        self._progress_said: tuple[int, int, InstanceId | None] = (-1, 0, None)
        self._progress_ns = 0
        self._activation_delays_ns: list[int] = []
        # What it says
        self._outputs: list[TokenOutput] = []
        self._started: list[RequestId] = []
        self._refused: list[tuple[RequestId, RefusalKind, str]] = []
        self._has_stepped = False  # since the last report
        self._has_changed = False  # what is leased, since the last report
        self._steps = 0
        self._link_bytes = 0
        self._times_ns = (0, 0)  # computing, scheduling: since the start of the instance
        self._layers_reported = 0
        self._orders: dict[type, Callable[[Any, int], None]] = {
            FormGroup: self._form_group,
            LeaseRequest: self._on_lease,
            RevokeLease: self._on_revoke,
            Compact: self._on_compact,
            Prepare: self._on_prepare,
            Snapshot: self._on_snapshot,
            Gather: self._on_gather,
            Fence: self._on_fence,
            Remap: self._on_remap,
            Adopt: self._on_adopt,
            Finish: self._on_finish,
            Grow: self._on_grow,
            Abort: self._on_abort,
            Reset: self._on_reset,
            Peers: self._on_peers,
        }
        self._orders |= dict.fromkeys(get_args(MigrationOrder), self._on_migration)

    # ------------------------------------------------------------ what others may read

    @property
    def group(self) -> Group | None:
        """The group that it works in."""
        return self._group

    @property
    def leads(self) -> bool:
        """True when it schedules its group."""
        return self._scheduler is not None

    @property
    def is_computing(self) -> bool:
        """True while a piece of work is under way here."""
        return self._active is not None or self._urgent is not None

    @property
    def is_changing(self) -> bool:
        """True while it takes part in a transition, or becomes whole again."""
        return (
            self._is_frozen
            or self._is_exchanging
            or self._is_resetting
            or self._is_compacting
            or self._is_gathering
            or self._prepare is not None
            or self._turning_back is not None
            or self._mover.has_quarantine
            or self._migrator.is_busy
        )

    @property
    def preemptions(self) -> int:
        """Preemptions under the group that it leads."""
        return self._scheduler.load().preemptions if self._scheduler is not None else 0

    @property
    def swapped_in(self) -> int:
        """Requests that came back from host memory under the group that it leads."""
        return self._scheduler.load().swapped_in if self._scheduler is not None else 0

    @property
    def referenced_blocks(self) -> int:
        """Blocks in use of the group that it leads."""
        return self._scheduler.referenced_blocks if self._scheduler is not None else 0

    def has_work(self) -> bool:
        """True while a request is leased or work is under way."""
        has_requests = self._scheduler is not None and self._scheduler.has_work()
        return has_requests or self.is_computing or bool(self._ready)

    def check(self) -> None:
        """Raise AccountingError if blocks, queues and pages do not add up."""
        self.check_steps()
        self._memory.check()

    def check_steps(self) -> None:
        """`check` without the pages."""
        if self._scheduler is not None:
            self._scheduler.check()

    # ------------------------------------------------------------ messages of the front

    def take(self, message: MemberMessage, now_ns: int) -> None:
        """Follow a message of the front. What was meant for an epoch or a transition that is over
        is ignored.

        Raises:
            AccountingError: a group is to be formed while work is under way, or the message is
                none for a member.
        """
        order = self._orders.get(type(message))
        if order is None:
            raise AccountingError(f"a member does not take {type(message).__name__}")
        order(message, now_ns)

    def _form_group(self, message: FormGroup, now_ns: int) -> None:
        if self.is_computing or self._is_copying:
            raise AccountingError("a group cannot be formed while a step is under way, or a copy")
        config = self._config
        group = whole_instance(message.group, message.epoch, config.instance, config.num_layers)
        self._join(group)
        blocks = sum(run.count for run in self._memory.home_runs) * self._blocks_per_page
        self._scheduler = self._make_scheduler(group, blocks)
        self._scheduler.grow(self._memory.home_runs)
        self._is_frozen = False
        self._has_changed = True

    def _on_lease(self, message: LeaseRequest, now_ns: int) -> None:
        if self._scheduler is None or not self._is_of_epoch(message):
            return
        self._has_changed = True
        try:
            self._scheduler.add(message.request)
        except InvalidRequestError as error:
            self._refused.append((message.request.id, RefusalKind.INVALID, str(error)))

    def _on_revoke(self, message: RevokeLease, now_ns: int) -> None:
        if self._scheduler is not None and self._is_of_epoch(message):
            self._has_changed = True
            self._scheduler.abort(message.request_id)

    def _on_migration(self, message: MigrationOrder, now_ns: int) -> None:
        self._has_changed = True
        self._migrator.take(message, self._scheduler if self._is_of_epoch(message) else None)

    def _is_of_epoch(
        self, message: LeaseRequest | RevokeLease | Fence | Compact | Snapshot | MigrationOrder
    ) -> bool:
        group = self._group
        return group is not None and (group.id, group.epoch) == (message.group, message.epoch)

    # ------------------------------------------------------------ the group

    @property
    def _blocks_per_page(self) -> int:
        return self._memory.plan.geometry.blocks_per_page

    def _join(self, group: Group) -> None:
        """Take a place in a group. Nothing is under way."""
        self._migrator.leave_group()
        self._group = group
        self._scheduler = None
        self._fence_passed = TransitionId(-1)
        self._flights.clear()
        self._ready.clear()
        stage = group.stages[group.instances.index(self._config.instance)]
        self._actions.append(Configure(stage.layers))

    def _make_scheduler(self, group: Group, capacity_blocks: int) -> Scheduler:
        """An empty scheduler of `group`; limits grow with its capacity (design section 5)."""
        config, slots = self._config.scheduler, self._memory.slots
        whole_blocks = sum(run.count for run in self._memory.home_runs) * self._blocks_per_page
        most_seqs = math.ceil(config.max_num_seqs * max(1.0, capacity_blocks / whole_blocks))
        cost = slowest_stage(group.stages, self._config.num_layers, self._cost_model, TypicalStep())
        most_layers = max(len(stage.layers) for stage in group.stages)
        most_moves = MOVE_BYTES_PER_STEP // (self._memory.plan.geometry.block_bytes * most_layers)
        limits = replace(
            config,
            num_stages=len(group.stages),
            max_num_seqs=most_seqs,
            max_moves_per_step=max(1, most_moves),
            capacity_blocks=capacity_blocks,
            host_blocks=config.host_blocks if len(group.stages) == 1 else 0,
            host_block_bytes=self._memory.plan.geometry.block_bytes * self._config.num_layers,
        )
        pool = BlockPool(slots.slot_blocks, self._blocks_per_page)
        return Scheduler(limits, pool, cost, group.epoch)

    def _stage_index(self) -> int:
        assert self._group is not None
        return self._group.instances.index(self._config.instance)

    # ------------------------------------------------------------ the ring

    def take_peer(self, message: PeerMessage, payload: Payload, now_ns: int) -> None:
        """A message of another instance. What is meant for an epoch that is over, or was cancelled
        by a fence, is ignored: the leader has planned the work again. A frozen stage keeps the
        rest for later: its leader may have heard from the front before it."""
        if isinstance(message, PagesPulled):
            self._on_pages_pulled(message, now_ns)
            return
        group = self._group
        if group is None or (group.id, group.epoch) != (message.group, message.epoch):
            return
        if self._is_exchanging:
            self._activation_delays_ns.append(now_ns - message.sent_ns)
        if isinstance(message, StageInput):
            if message.fence < self._fence_passed:
                return
            work = RunStage(
                group=group.id,
                epoch=group.epoch,
                step=message.step,
                chunks=message.chunks,
                moves=message.moves,
                payload=payload,
                fence=message.fence,
            )
            self._ready.append(work)
        elif message.step in self._flights:
            # Rows that came around go first: their requests wait for nothing else. But in the order
            # of their steps: one may release a request that the next one starts again.
            heads = sum(isinstance(work, RunHead) for work in self._ready)
            self._ready.insert(heads, RunHead(self._flights[message.step], payload))

    def computed(self, answer: Computed, now_ns: int) -> None:
        """The work under way is done, or cancelled.

        Raises:
            AccountingError: it is not what was under way, or its result is wrong.
        """
        if answer.work is self._active:
            self._active = None
        elif answer.work is self._urgent:
            self._urgent = None
        else:
            raise AccountingError("work is done that was not under way")
        if not self._is_resetting and not self._is_cancelled(answer.work):
            if self._fence is not None and self._scheduler is not None:
                self._use_late(answer, now_ns)
            else:
                self._hand_on(answer, now_ns)
        self._reply_fenced()
        self._go_on_resetting()

    def _use_late(self, answer: Computed, now_ns: int) -> None:
        """A step that was done before it could be cancelled counts; all others are cancelled with
        the scheduler's freeze."""
        if answer.result is not None and not answer.result.cancelled:
            self._finish_step(answer, now_ns)

    def _hand_on(self, answer: Computed, now_ns: int) -> None:
        work = answer.work
        if answer.result is not None:
            self._finish_step(answer, now_ns)
            return
        group = self._group
        assert group is not None
        name, config = (group.id, group.epoch), self._config
        following = self._stage_index() + 1
        if isinstance(work, RunFirst):
            plan = work.plan
            fence = self._fence_passed
            message: PeerMessage = StageInput(
                config.instance, *name, plan.step, plan.chunks, plan.moves, now_ns, fence
            )
        elif isinstance(work, RunStage) and following < len(group.stages):
            message = StageInput(
                config.instance, *name, work.step, work.chunks, work.moves, now_ns, work.fence
            )
        elif isinstance(work, RunStage):
            message = StageOutput(config.instance, *name, work.step, now_ns)
        else:
            raise AccountingError("the head of a step gave no result")
        target = group.instances[following % len(group.stages)]
        self._actions.append(SendPeer(target, message, answer.payload))

    def _is_cancelled(self, work: Work) -> bool:
        """A fence has cancelled it, and was taken back while it was under way."""
        if isinstance(work, RunStage):
            return work.fence < self._fence_passed
        return self._flights.get(work.plan.step) is not work.plan

    def _finish_step(self, answer: Computed, now_ns: int) -> None:
        work, result = answer.work, answer.result
        if self._scheduler is None or result is None or isinstance(work, RunStage):
            raise AccountingError("a step is done, but this instance leads no group")
        del self._flights[work.plan.step]
        self._outputs += self._scheduler.update(work.plan, result, now_ns)
        self._refused += [(rid, RefusalKind.FAILED, message) for rid, message in result.failed]
        self._has_stepped = True
        self._steps += 1

    # ------------------------------------------------------------ a turn

    def turn(
        self, now_ns: int, execute_ns: int = 0, schedule_ns: int = 0, link_bytes: int = 0
    ) -> list[Action]:
        """What the world must do now, in order.

        A report goes before the work with which requests start: so the front knows which were
        about to start when a step takes the whole process with it.

        Args:
            execute_ns: time that was computed since the start of the instance.
            schedule_ns: and that which this member and its driver took.
            link_bytes: pulled from peers since the start of the instance.
        """
        self._link_bytes = link_bytes
        self._times_ns = (execute_ns, schedule_ns)
        self._migrator.step(self._scheduler)
        self._plan_steps(now_ns)
        self._start_copies()
        self._step_transition(now_ns)
        report = self._take_report()
        if report is not None:
            self._actions.append(SendFront(report))
        self._actions += self._migrator.take_actions()
        self._start_work()
        actions, self._actions = self._actions, []
        return actions

    def _plan_steps(self, now_ns: int) -> None:
        """As many steps on the ring as it has stages."""
        while self._scheduler is not None and not self._is_frozen:
            plan = self._scheduler.schedule(now_ns)
            if plan is None:
                break
            self._flights[plan.step] = plan
            self._ready.append(RunFirst(plan))
            self._started += self._scheduler.newly_started()

    @property
    def _is_copying(self) -> bool:
        return self._copies > 0 or (self._scheduler is not None and self._scheduler.is_copying)

    def _start_copies(self) -> None:
        """Beside the work under way, but not beside a step that an aborted fence has cancelled: it
        may still write to blocks that have another owner by now."""
        if self._scheduler is None or (self._active and self._is_cancelled(self._active)):
            return
        copies = self._scheduler.take_copies()
        self._copies += len(copies)
        self._actions += copies

    def copied(self, transfer: int, now_ns: int) -> None:
        """A copy of KV to or from host memory has ended.

        Raises:
            AccountingError: none is under way.
        """
        if not self._copies:
            raise AccountingError(f"copy {transfer} has ended, but none was under way")
        self._copies -= 1
        if self._scheduler is not None:
            self._scheduler.copied(transfer)
            self._has_changed = True
        self._reply_fenced()
        self._go_on_resetting()

    def _start_work(self) -> None:
        if not self._ready or self._is_frozen:
            return
        work = self._ready[0]
        if self._active is None and self._urgent is None:
            self._active = self._ready.popleft()
            self._actions.append(Compute(self._active))
        elif (
            isinstance(work, RunHead)
            and isinstance(self._active, RunFirst)
            and self._urgent is None
        ):
            # Its requests have been around the ring: they need not wait for a long chunk.
            self._urgent = work
            self._ready.popleft()
            self._actions.append(Compute(work))

    # ------------------------------------------------------------ what it says

    def _take_report(self) -> GroupReport | None:
        """What the front should hear of the group that this instance leads: after every step,
        before every step with which requests start, and between steps when leases came or went."""
        if self._group is None or self._scheduler is None:
            return None
        is_idle = self._has_changed and not self._flights
        if not (self._has_stepped or self._started or is_idle):
            return None
        report = GroupReport(
            instance=self._config.instance,
            incarnation=self._config.incarnation,
            group=self._group.id,
            epoch=self._group.epoch,
            step=self._steps,
            outputs=tuple(self._outputs),
            started=tuple(self._started),
            load=self._scheduler.load(),
            refused=tuple(self._refused),
            timing=StepTiming(self._steps, *self._times_ns),
        )
        self._outputs.clear()
        self._started.clear()
        self._refused.clear()
        self._has_stepped = self._has_changed = False
        return report

    def heartbeat(self, layers_done: int) -> Heartbeat | None:
        """A sign of life, or None while the work under way stands still, so that the front
        sees it.

        Args:
            layers_done: layers computed since the start of the instance.
        """
        is_stuck = self.is_computing and layers_done == self._layers_reported
        self._layers_reported = layers_done
        config = self._config
        if is_stuck:
            return None
        pages = tuple((kind.value, count) for kind, count in self._memory.counts().items())
        timing = StepTiming(self._steps, *self._times_ns)
        return Heartbeat(config.instance, config.incarnation, pages, timing)

    def _say(self, message: Any) -> None:
        self._actions.append(SendFront(message))

    def _answer(self, answer_type: type, transition: TransitionId, **fields: Any) -> None:
        config = self._config
        self._say(answer_type(config.instance, config.incarnation, transition, **fields))

    # ------------------------------------------------------------ transfers

    def pulled(self, transfer: int, error: str | None) -> None:
        """A pull has ended; with an error, what it was for is not there."""
        if self._migrator.pulled(transfer, error, self._scheduler):
            self._has_changed = True
        else:
            self._mover.pulled(transfer, error)

    def part_ready(self, transfer: int, error: str | None) -> None:
        """A part was read from the file, or compared after a pull."""
        self._mover.part_ready(transfer, error)

    def _on_peers(self, message: Peers, now_ns: int) -> None:
        self._peers = frozenset(peer.instance for peer in message.peers)
        self._actions.append(Connect(message.peers))

    def _on_pages_pulled(self, message: PagesPulled, now_ns: int) -> None:
        if message.transition > self._adopted:
            self._early.append(message)  # a receiver was faster than the front's order to us
            return
        if message.transition < self._adopted:
            return
        # Also when nothing is left to do here: a leader counts what others still move.
        self._mover.depart(message)
        if self._scheduler is not None:
            self._count_moves(message, now_ns)

    def _count_moves(self, message: PagesPulled, now_ns: int) -> None:
        assert self._scheduler is not None
        for page in message.pages:
            if page not in self._pending_moves:
                continue  # a page of another group, sent here as to its source
            self._pending_moves[page] -= 1
            if not self._pending_moves[page]:
                del self._pending_moves[page]
                self._scheduler.page_complete(page, now_ns)

    def _step_transition(self, now_ns: int) -> None:
        """Say what is done since the last turn."""
        self._end_compaction()
        self._end_turning_back()
        self._begin_prepare()
        self._end_prepare()
        self._end_gather()
        self._go_on_resetting()
        own = self._mover.announce()
        if own is not None:
            self._on_pages_pulled(own, now_ns)
        if self._is_exchanging:
            self._say_progress(now_ns)
        self._actions += self._mover.take_actions()

    # ------------------------------------------------------------ before COMMIT

    def _refuse(self, transition: TransitionId, reason: str) -> None:
        self._answer(Refused, transition, reason=reason)

    def _on_compact(self, message: Compact, now_ns: int) -> None:
        self._transition = message.transition
        if self._scheduler is None or not self._is_of_epoch(message):
            self._refuse(message.transition, f"it does not lead group {message.group}")
            return
        try:
            self._scheduler.compact(message.homes)
        except CompactionRefusedError as error:
            self._refuse(message.transition, str(error))
            return
        self._is_compacting = True

    def _end_compaction(self) -> None:
        scheduler = self._scheduler
        if not self._is_compacting or scheduler is None or not scheduler.is_compacted:
            return
        if self._flights and not self._flights_are_compact():
            return
        self._is_compacting = False
        self._answer(
            Compacted,
            self._transition,
            used_pages=scheduler.used_pages_per_home(),
            moved_blocks=scheduler.moved_blocks,
        )

    def _flights_are_compact(self) -> bool:
        """No step on the ring still reads or writes a page that is about to be given up."""
        assert self._scheduler is not None
        closed = set(pages_of(self._scheduler.closed_pages()))
        tables = (chunk.block_table for plan in self._flights.values() for chunk in plan.chunks)
        return not any(block // self._blocks_per_page in closed for t in tables for block in t)

    def _on_prepare(self, message: Prepare, now_ns: int) -> None:
        self._transition = message.transition
        unknown = [peer for peer in message.peers if peer not in self._peers]
        if unknown or self._group is None:
            reason = f"it has no link to instances {unknown}" if unknown else "it is in no group"
            self._refuse(message.transition, reason)
            return
        self._prepare = message
        self._is_preparing = False

    def _begin_prepare(self) -> None:
        """Once an aborted transition has left nothing behind: no pages on their way back, and no
        transfer that may still write. Nor a migration: the front ends it for a transition."""
        message = self._prepare
        if message is None or self._is_preparing or self._migrator.is_busy:
            return
        if self._turning_back is not None or self._mover.has_quarantine:
            return
        self._is_preparing = True
        if message.keep is not None:
            self._give_up_pages(set(pages_of(message.keep)))
        self._mover.bring(message.gains)

    def _give_up_pages(self, keep: set[int]) -> None:
        given = {
            layer: runs_of(set(pages_of(self._memory.kv_runs(layer))) - keep)
            for layer in range(self._config.num_layers)
        }
        self._memory.unmap_kv_many({layer: runs for layer, runs in given.items() if runs})

    def _end_prepare(self) -> None:
        if self._prepare is None or not self._is_preparing:
            return
        if self._mover.refusal:
            self._prepare = None
            self._refuse(self._transition, self._mover.refusal)
        elif not self._mover.is_bringing:
            self._prepare = None
            self._answer(
                Prepared,
                self._transition,
                parts=self._memory.part_runs(),
                extents=self._memory.kv_extents(),
                gained_pages=self._mover.gained_pages,
                gained_from_file=self._mover.gained_from_file,
            )

    def _on_snapshot(self, message: Snapshot, now_ns: int) -> None:
        requests: tuple[FrozenRequest, ...] = ()
        if self._scheduler is not None and self._is_of_epoch(message):
            requests = self._scheduler.snapshot()
        self._answer(Snapshotted, message.transition, requests=requests)

    def _on_gather(self, message: Gather, now_ns: int) -> None:
        if message.transition == self._transition:
            self._is_gathering = True
            self._mover.gather(message.transition, message.moves)

    def _end_gather(self) -> None:
        if self._is_gathering and not self._mover.is_moving:
            self._is_gathering = False
            self._answer(
                Gathered,
                self._transition,
                moves=self._mover.gathered,
                moved_bytes=self._mover.pulled_pages * self._memory.plan.geometry.page_bytes,
            )

    def _on_fence(self, message: Fence, now_ns: int) -> None:
        if not self._is_of_epoch(message):
            return
        self._transition = message.transition
        self._fence = message
        self._fence_passed = message.transition
        self._is_frozen = True
        kept = [w for w in self._ready if isinstance(w, RunStage) and not self._is_cancelled(w)]
        self._ready = deque(kept)
        if self._active is not None and (self._scheduler or self._is_cancelled(self._active)):
            self._actions.append(CancelCompute())
        self._reply_fenced()

    def _reply_fenced(self) -> None:
        """Nothing is computed or copied any more: say what there is. Tokens sampled so far go
        first."""
        if self._fence is None or self.is_computing or self._is_copying:
            return
        self._fence = None
        requests: tuple[FrozenRequest, ...] = ()
        touched: tuple[BlockId, ...] = ()
        if self._scheduler is not None:
            requests = self._scheduler.freeze()
            touched = self._scheduler.touched()
            self._has_stepped = True
            report = self._take_report()
            if report is not None:
                self._say(report)
        self._flights.clear()
        self._answer(
            Fenced,
            self._transition,
            extents=self._memory.kv_extents(),
            requests=requests,
            touched=touched,
        )

    def _on_abort(self, message: Abort, now_ns: int) -> None:
        """Back to what was, at once for all that needs no pages. A member that had not heard of the
        transition has nothing to do."""
        if message.transition < self._transition or self._group is None or self._is_resetting:
            return
        self._transition = message.transition
        self._prepare = None
        self._is_compacting = self._is_gathering = False
        self._mover.give_up()
        self._unfreeze()
        self._turning_back = message
        self._end_turning_back()

    def _unfreeze(self) -> None:
        """Go on at the old epoch. If the fence was not answered yet, it cancels all work now: other
        stages have dropped theirs."""
        if self._scheduler is not None:
            if self._fence is not None:
                self._scheduler.freeze()
                self._flights.clear()
            self._scheduler.turn_back()
            self._has_changed = True
        self._fence = None
        self._is_frozen = False

    def _end_turning_back(self) -> None:
        """When no old transfer writes any more there is room for all that was given up. The leader
        uses it when all members have mapped it again (`Grow`)."""
        message, group = self._turning_back, self._group
        if message is None or group is None or self._mover.has_quarantine:
            return
        self._turning_back = None
        stage, parts = group.stages[self._stage_index()], self._stage_parts(group)
        for part in self._memory.held_parts:
            if part not in parts:
                self._memory.release_part(part)
        wanted = set(pages_of(message.restore_pages))
        mapped = {
            layer: set(pages_of(self._memory.kv_runs(layer)))
            for layer in range(self._config.num_layers)
        }
        # What was gathered goes first: its pages are those that are given back.
        self._memory.unmap_kv_many(
            {
                layer: runs_of(pages)
                for layer, pages in mapped.items()
                if pages and layer not in stage.layers
            }
        )
        lacking = {layer: wanted - mapped[layer] for layer in stage.layers}
        self._memory.map_kv_many(
            {layer: runs_of(pages) for layer, pages in lacking.items() if pages}
        )
        self._answer(Aborted, message.transition)

    # ------------------------------------------------------------ after COMMIT

    def _stage_parts(self, group: Group) -> frozenset[Part]:
        index = group.instances.index(self._config.instance)
        layers, model = group.stages[index].layers, self._memory.plan.part_pages
        return frozenset(part for part in model if stage_holds(index, layers, part))

    def _on_remap(self, message: Remap, now_ns: int) -> None:
        """Pages change owner: those of parts and KV that go become new KV."""
        if message.transition != self._transition or not self._is_frozen:
            return
        memory, wanted_parts = self._memory, self._stage_parts(message.group)
        fresh = set(pages_of(message.fresh))
        keep = {pages.layer: set(pages_of(pages.runs)) for pages in message.keep}
        index = message.group.instances.index(self._config.instance)
        layers = message.group.stages[index].layers
        given: dict[int, tuple[PageRun, ...]] = {}
        mapped: dict[int, tuple[PageRun, ...]] = {}
        for layer in range(self._config.num_layers):
            now = set(pages_of(memory.kv_runs(layer)))
            wanted = keep.get(layer, set()) | (fresh if layer in layers else set())
            given[layer] = runs_of(now - wanted)
            mapped[layer] = runs_of(wanted - now)
        dropped = [part for part in memory.held_parts if part not in wanted_parts]
        remapped = sum(memory.plan.part_pages[part] for part in dropped)
        remapped += sum(run.count for runs in given.values() for run in runs)
        memory.remap(dropped, given, mapped)
        memory.set_escrow(message.escrow_pages)
        self._mover.expect_departures(message.departures)
        self._join(message.group)
        self._answer(
            Remapped,
            message.transition,
            parts=memory.part_runs(),
            elapsed_ns=0,
            remapped_pages=remapped,
        )

    def _on_adopt(self, message: Adopt, now_ns: int) -> None:
        group = self._group
        if message.transition != self._transition or group is None:
            return
        if (group.id, group.epoch) != (message.group, message.epoch):
            return
        if group.leader == self._config.instance:
            self._scheduler = self._make_scheduler(group, message.capacity_blocks)
            pending = dict(message.pending)
            self._scheduler.adopt(message.requests, message.pages, pending, now_ns)
            self._pending_moves = pending
            self._has_changed = True
        self._is_frozen = False
        self._is_exchanging = True
        self._adopted = message.transition
        self._activation_delays_ns.clear()
        self._progress_said = (-1, 0, None)
        self._mover.exchange(message.transition, group.leader, message.moves)
        early, self._early = self._early, []
        for pulled in early:
            self._on_pages_pulled(pulled, now_ns)
        self._answer(Adopted, message.transition)

    def _say_progress(self, now_ns: int) -> None:
        mover = self._mover
        # The leader also counts what others have pulled: then the end is the end for all requests.
        is_complete = not mover.is_moving and not self._pending_moves
        said = (mover.pulled_moves, self._link_bytes, mover.waits_for)
        is_due = now_ns - self._progress_ns >= PROGRESS_INTERVAL_NS
        if not is_complete and (said == self._progress_said or not is_due):
            return
        self._progress_said, self._progress_ns = said, now_ns
        self._is_exchanging = not is_complete
        self._answer(
            MoveProgress,
            self._transition,
            pulled_moves=mover.pulled_moves,
            pulled_bytes=mover.pulled_pages * self._memory.plan.geometry.page_bytes,
            is_complete=is_complete,
            waits_for=mover.waits_for,
            link_bytes=self._link_bytes,
        )

    def _on_finish(self, message: Finish, now_ns: int) -> None:
        group = self._group
        if group is None or (group.id, group.epoch) != (message.group, message.epoch):
            return
        self._memory.set_escrow(0)
        if message.fresh:
            layers = group.stages[self._stage_index()].layers
            self._memory.map_kv_many(dict.fromkeys(layers, message.fresh))
        self.check()
        delays = sorted(self._activation_delays_ns)
        self._answer(
            Finished,
            message.transition,
            stalled=self._scheduler.stalled if self._scheduler is not None else (),
            activations=len(delays),
            activation_p99_ns=delays[min(len(delays) - 1, len(delays) * 99 // 100)]
            if delays
            else 0,
            free_pages=self._memory.free_pages,
        )

    def _on_grow(self, message: Grow, now_ns: int) -> None:
        group, scheduler = self._group, self._scheduler
        if group is None or scheduler is None:
            return
        if (group.id, group.epoch) == (message.group, message.epoch):
            scheduler.grow_or_reopen(message.pages)
            self._has_changed = True

    # ------------------------------------------------------------ becoming whole again

    def _on_reset(self, message: Reset, now_ns: int) -> None:
        if message.incarnation != self._config.incarnation:
            return
        self._is_resetting = True
        self._turning_back = None
        self._migrator.leave_group()
        self._group = self._scheduler = None
        self._is_frozen = True
        self._fence = self._prepare = None
        self._is_compacting = self._is_gathering = self._is_exchanging = False
        for queue in (self._outputs, self._started, self._refused, self._early):
            queue.clear()
        self._flights.clear()
        self._ready.clear()
        self._pending_moves.clear()
        self._mover.give_up()
        if self.is_computing:
            self._actions.append(CancelCompute())

    def _go_on_resetting(self) -> None:
        """When nothing computes and no old transfer or copy writes: give KV up, bring all parts
        in."""
        mover, memory = self._mover, self._memory
        if not self._is_resetting or self.is_computing or mover.has_quarantine or self._copies:
            return
        if mover.is_bringing or self._migrator.is_busy:
            return
        if mover.refusal:
            raise AccountingError(f"it cannot become whole again: {mover.refusal}")
        memory.set_escrow(0)
        memory.release_all_kv()
        missing = [part for part in memory.plan.part_pages if not memory.holds(part)]
        if missing:
            mover.bring(_from_file(missing))
            return
        memory.map_kv_many(dict.fromkeys(memory.held_layers, memory.home_runs))
        self._is_resetting = False
        self._say(self._make_ready())


def _from_file(parts: list[Part]) -> tuple[PartSource, ...]:
    return tuple(PartSource(part, None) for part in parts)
