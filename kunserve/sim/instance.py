"""An instance process in virtual time: the production member, a toy executor.

It drives `kunserve.policy.member` as `kunserve.runtime.instance` does. Only leaves differ: a step's
result is there after the time that the cost model gives it, and messages go through a delaying
link.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from kunserve.core.errors import AccountingError
from kunserve.core.events import FormGroup, GroupReport, Heartbeat, InstanceReady
from kunserve.core.ids import Epoch, InstanceId, RequestId, SlotId
from kunserve.core.step import StepPlan, StepResult
from kunserve.policy.blocks import BlockPool
from kunserve.policy.cost_model import ChunkShape, CostModel
from kunserve.policy.member import Member, MemberMessage
from kunserve.policy.scheduler import Scheduler, SchedulerConfig
from kunserve.sim.timeline import FOREVER_NS, MICROSECOND_NS, MILLISECOND_NS, Timeline
from kunserve.sim.toy_model import ProcessKilledError, ToyExecutor

HEARTBEAT_INTERVAL_NS = 500 * MILLISECOND_NS
WAKE_NS = 20 * MICROSECOND_NS
"""From a message's arrival to the control thread's turn: what comes meanwhile shares the turn."""

DownMessage = MemberMessage
UpMessage = InstanceReady | GroupReport | Heartbeat


@dataclass(frozen=True)
class SimInstanceConfig:
    """What every instance of a world has. `total_blocks` of its own slot are backed."""

    scheduler: SchedulerConfig
    cost_model: CostModel
    num_layers: int
    total_blocks: int
    blocks_per_page: int


@dataclass(frozen=True)
class _Flight:
    """A step being computed: its result, which is there at `end_ns`."""

    plan: StepPlan
    result: StepResult
    begin_ns: int
    end_ns: int


class SimInstance:
    """One incarnation of an instance, from its start to its end.

    Args:
        send: posts a message to the front.
        end: ends this process, as a crash does.
        load_ns: how long it loads.
    """

    def __init__(
        self,
        instance: InstanceId,
        incarnation: int,
        config: SimInstanceConfig,
        timeline: Timeline,
        send: Callable[[UpMessage], None],
        end: Callable[[], None],
        load_ns: int,
    ) -> None:
        self.instance = instance
        self.incarnation = incarnation
        self.is_alive = True
        self.is_loading = True
        self.killed_by: RequestId | None = None
        """The request that ended this process."""
        self._config = config
        self._timeline = timeline
        self._post = send
        self._end = end
        self._pool: BlockPool | None = None
        self._member = Member(instance, incarnation, self._make_scheduler)
        self._executor = ToyExecutor(config.scheduler.block_size)
        self._inbox: list[DownMessage] = []
        self._flight: _Flight | None = None
        self._is_woken = False
        self._execute_ns = 0
        self._layers_done = 0
        self._frozen_until_ns = 0
        self._stuck_since_ns = FOREVER_NS
        self._slow_until_ns = 0
        self._slow_factor = 1
        self._messages_left: int | None = None
        timeline.after(load_ns, partial(self._when_running, self._loaded))

    # ------------------------------------------------------------ what the world does to it

    def take(self, message: DownMessage) -> None:
        """A message of the front arrives; one that still loads reads it later."""
        if self.is_alive:
            self._inbox.append(message)
            self._wake()

    def kill(self) -> None:
        """The process ends at once."""
        self.is_alive = False

    def freeze(self, duration_ns: int) -> None:
        """Nothing of the process runs for a while."""
        until_ns = min(FOREVER_NS, self._timeline.now_ns + duration_ns)
        self._frozen_until_ns = max(self._frozen_until_ns, until_ns)

    def stick(self) -> None:
        """The compute thread gets no further, in this step or in the next one."""
        self._stuck_since_ns = min(self._stuck_since_ns, self._timeline.now_ns)

    def slow_down(self, duration_ns: int, factor: int) -> None:
        """Steps that start from now on last longer."""
        self._slow_until_ns = self._timeline.now_ns + duration_ns
        self._slow_factor = factor

    def end_after(self, messages: int) -> None:
        """The process ends by itself right after it has sent so many more messages."""
        self._messages_left = messages

    # ------------------------------------------------------------ what the world sees

    @property
    def group(self) -> FormGroup | None:
        """The group it was told to lead."""
        return self._member.group

    @property
    def preemptions(self) -> int:
        """Preemptions of its scheduler so far."""
        return self._member.preemptions

    def is_idle(self) -> bool:
        """No message is unread, no request leased, no step under way, no end foreseen."""
        has_end = self._messages_left is not None
        return not (self._inbox or self._member.has_work() or has_end)

    def hung_until_ns(self) -> int:
        """Until when it makes no progress: 0 for one that never stood still."""
        is_stuck = self._stuck_since_ns < FOREVER_NS and self._flight is not None
        return FOREVER_NS if is_stuck else self._frozen_until_ns

    def check(self) -> None:
        """Raise AccountingError unless blocks and queues add up, and idle means empty."""
        self._member.check()
        held = self._pool.referenced_blocks if self._pool is not None else 0
        if held and not self._member.has_work():
            raise AccountingError(f"instance {self.instance} is idle and holds {held} blocks")

    # ------------------------------------------------------------ turns

    def _when_running(self, action: Callable[[], None]) -> None:
        """Run `action` now, after the freeze, or never if the process has ended."""
        if not self.is_alive:
            return
        if self._timeline.now_ns < self._frozen_until_ns:
            self._timeline.at(self._frozen_until_ns, partial(self._when_running, action))
        else:
            action()

    def _wake(self) -> None:
        if not self._is_woken and not self.is_loading:
            self._is_woken = True
            self._timeline.after(WAKE_NS, partial(self._when_running, self._turn))

    def _loaded(self) -> None:
        self.is_loading = False
        self._send(InstanceReady(self.instance, self.incarnation, self._config.total_blocks))
        self._beat()

    def _beat(self) -> None:
        """A turn, and a heartbeat unless the step under way stands still."""
        self._turn()
        heartbeat = self._member.heartbeat(self._layers_now())
        if heartbeat is not None:
            self._send(heartbeat)
        self._timeline.after(HEARTBEAT_INTERVAL_NS, partial(self._when_running, self._beat))

    def _turn(self) -> None:
        self._is_woken = False
        messages, self._inbox = self._inbox, []
        for message in messages:
            self._member.take(message)
        self._finish_step()
        self._start_step()
        self.check()

    def _send(self, message: UpMessage) -> None:
        """Say something, unless the last words are said."""
        if not self.is_alive:
            return
        self._post(message)
        if self._messages_left is not None:
            self._messages_left -= 1
            if self._messages_left == 0:
                self._end()

    # ------------------------------------------------------------ steps

    def _make_scheduler(self, epoch: Epoch) -> Scheduler:
        config, slot = self._config, SlotId(int(self.instance))
        pages = -(-config.total_blocks // config.blocks_per_page)
        self._pool = BlockPool(
            pages * config.blocks_per_page, config.blocks_per_page, {slot: config.total_blocks}
        )
        return Scheduler(config.scheduler, self._pool, config.cost_model, epoch)

    def _start_step(self) -> None:
        """Report, then compute: the step may end the process."""
        plan = self._member.next_plan(self._timeline.now_ns)
        report = self._member.take_report(self._execute_ns)
        if report is not None:
            self._send(report)
        if plan is not None and self.is_alive:
            self._compute(plan)

    def _compute(self, plan: StepPlan) -> None:
        begin_ns = self._timeline.now_ns
        end_ns = begin_ns + self._step_ns(plan)
        try:
            self._flight = _Flight(plan, self._executor.execute(plan), begin_ns, end_ns)
        except ProcessKilledError as error:
            # At once: what it has just said may be lost with it.
            self.killed_by = error.request_id
            self._end()
            return
        self._timeline.at(end_ns, partial(self._when_running, self._wake))

    def _step_ns(self, plan: StepPlan) -> int:
        shapes = [ChunkShape(c.context_len, len(c.token_ids), c.samples) for c in plan.chunks]
        factor = self._slow_factor if self._timeline.now_ns < self._slow_until_ns else 1
        return max(1, round(self._config.cost_model.step_ns(shapes))) * factor

    def _finish_step(self) -> None:
        flight = self._flight
        if flight is None:
            return
        if self._timeline.now_ns < flight.end_ns or self._stuck_since_ns <= flight.end_ns:
            return
        self._member.finish_step(flight.result, self._timeline.now_ns)
        self._flight = None
        self._layers_done += self._config.num_layers
        self._execute_ns += flight.end_ns - flight.begin_ns

    def _layers_now(self) -> int:
        """Layers computed since the start, those of the step under way included."""
        flight = self._flight
        if flight is None:
            return self._layers_done
        at_ns = min(self._timeline.now_ns, self._stuck_since_ns, flight.end_ns)
        elapsed_ns = max(0, at_ns - flight.begin_ns)
        layers = elapsed_ns * self._config.num_layers // (flight.end_ns - flight.begin_ns)
        return self._layers_done + layers
