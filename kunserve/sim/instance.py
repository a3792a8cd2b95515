"""An instance process in virtual time: the production scheduler, a toy executor.

It follows `kunserve.runtime.instance` turn by turn: messages in, a finished step, the next step,
a report, a heartbeat. Only leaves differ: a step's result is there after the time that the cost
model gives it, and messages go through a delaying link.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from kunserve.core.errors import AccountingError, InvalidRequestError
from kunserve.core.events import (
    FormGroup,
    GroupReport,
    Heartbeat,
    InstanceReady,
    LeaseRequest,
    RevokeLease,
    StepTiming,
)
from kunserve.core.ids import InstanceId, RequestId, SlotId
from kunserve.core.request import TokenOutput
from kunserve.core.step import StepPlan, StepResult
from kunserve.policy.blocks import BlockPool
from kunserve.policy.cost_model import ChunkShape, CostModel
from kunserve.policy.scheduler import Scheduler, SchedulerConfig
from kunserve.sim.timeline import FOREVER_NS, MICROSECOND_NS, MILLISECOND_NS, Timeline
from kunserve.sim.toy_model import ToyExecutor

HEARTBEAT_INTERVAL_NS = 500 * MILLISECOND_NS
WAKE_NS = 20 * MICROSECOND_NS
"""From a message's arrival to the control thread's turn: what comes meanwhile shares the turn."""

DownMessage = FormGroup | LeaseRequest | RevokeLease
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
        self._config = config
        self._timeline = timeline
        self._post = send
        self._end = end
        self._pool: BlockPool | None = None
        self._scheduler: Scheduler | None = None
        self._executor = ToyExecutor(config.scheduler.block_size)
        self._group: FormGroup | None = None
        self._inbox: list[DownMessage] = []
        self._flight: _Flight | None = None
        self._refused: list[tuple[RequestId, str]] = []
        self._changed = False
        self._is_woken = False
        self._steps = 0
        self._execute_ns = 0
        self._layers_done = 0
        self._layers_reported = 0
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
        return self._group

    @property
    def preemptions(self) -> int:
        """Preemptions of its scheduler so far."""
        return self._scheduler.load().preemptions if self._scheduler else 0

    def is_idle(self) -> bool:
        """No message is unread, no request leased, no step under way, no end foreseen."""
        has_work = self._scheduler is not None and self._scheduler.has_work()
        return not (self._inbox or has_work or self._messages_left is not None)

    def hung_until_ns(self) -> int:
        """Until when it makes no progress: 0 for one that never stood still."""
        is_stuck = self._stuck_since_ns < FOREVER_NS and self._flight is not None
        return FOREVER_NS if is_stuck else self._frozen_until_ns

    def check(self) -> None:
        """Raise AccountingError unless blocks and queues add up, and idle means empty."""
        if self._scheduler is None or self._pool is None:
            return
        self._scheduler.check()
        if not self._scheduler.has_work() and self._pool.referenced_blocks:
            raise AccountingError(
                f"instance {self.instance} is idle and holds {self._pool.referenced_blocks} blocks"
            )

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
        layers = self._layers_now()
        is_stuck = self._flight is not None and layers == self._layers_reported
        self._layers_reported = layers
        if not is_stuck:
            self._send(Heartbeat(self.instance, self.incarnation))
        self._timeline.after(HEARTBEAT_INTERVAL_NS, partial(self._when_running, self._beat))

    def _turn(self) -> None:
        self._is_woken = False
        messages, self._inbox = self._inbox, []
        for message in messages:
            self._read(message)
        outputs = self._finish_step()
        self._start_step()
        if outputs is not None or (self._changed and self._flight is None):
            self._report(outputs or ())
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

    # ------------------------------------------------------------ messages

    def _read(self, message: DownMessage) -> None:
        if isinstance(message, FormGroup):
            self._form_group(message)
        elif self._scheduler is None or not self._leads(message):
            return
        elif isinstance(message, LeaseRequest):
            self._lease(message, self._scheduler)
        else:
            self._scheduler.abort(message.request_id)
            self._changed = True

    def _form_group(self, message: FormGroup) -> None:
        if self._flight is not None:
            raise AccountingError("a group cannot be formed while a step is under way")
        config, slot = self._config, SlotId(int(self.instance))
        pages = -(-config.total_blocks // config.blocks_per_page)
        self._pool = BlockPool(
            pages * config.blocks_per_page, config.blocks_per_page, {slot: config.total_blocks}
        )
        self._scheduler = Scheduler(config.scheduler, self._pool, config.cost_model, message.epoch)
        self._group = message
        self._changed = True

    def _leads(self, message: LeaseRequest | RevokeLease) -> bool:
        group = self._group
        return group is not None and (group.group, group.epoch) == (message.group, message.epoch)

    def _lease(self, message: LeaseRequest, scheduler: Scheduler) -> None:
        self._changed = True
        try:
            scheduler.add(message.request)
        except InvalidRequestError as error:
            self._refused.append((message.request.id, str(error)))

    # ------------------------------------------------------------ steps

    def _start_step(self) -> None:
        if self._scheduler is None or self._flight is not None:
            return
        now_ns = self._timeline.now_ns
        plan = self._scheduler.schedule(now_ns)
        if plan is None:
            return
        end_ns = now_ns + self._step_ns(plan)
        self._flight = _Flight(plan, self._executor.execute(plan), now_ns, end_ns)
        self._timeline.at(end_ns, partial(self._when_running, self._wake))

    def _step_ns(self, plan: StepPlan) -> int:
        shapes = [ChunkShape(c.context_len, len(c.token_ids), c.samples) for c in plan.chunks]
        factor = self._slow_factor if self._timeline.now_ns < self._slow_until_ns else 1
        return max(1, round(self._config.cost_model.step_ns(shapes))) * factor

    def _finish_step(self) -> tuple[TokenOutput, ...] | None:
        flight = self._flight
        if flight is None or self._scheduler is None:
            return None
        if self._timeline.now_ns < flight.end_ns or self._stuck_since_ns <= flight.end_ns:
            return None
        for request_id, message in flight.result.failed:
            self._scheduler.abort(request_id)
            self._refused.append((request_id, message))
        outputs = self._scheduler.update(flight.plan, flight.result, self._timeline.now_ns)
        self._flight = None
        self._steps += 1
        self._layers_done += self._config.num_layers
        self._execute_ns += flight.end_ns - flight.begin_ns
        return outputs

    def _layers_now(self) -> int:
        """Layers computed since the start, those of the step under way included."""
        flight = self._flight
        if flight is None:
            return self._layers_done
        at_ns = min(self._timeline.now_ns, self._stuck_since_ns, flight.end_ns)
        elapsed_ns = max(0, at_ns - flight.begin_ns)
        layers = elapsed_ns * self._config.num_layers // (flight.end_ns - flight.begin_ns)
        return self._layers_done + layers

    def _report(self, outputs: tuple[TokenOutput, ...]) -> None:
        if self._group is None or self._scheduler is None:
            return
        report = GroupReport(
            instance=self.instance,
            incarnation=self.incarnation,
            group=self._group.group,
            epoch=self._group.epoch,
            step=self._steps,
            outputs=outputs,
            started=self._scheduler.newly_started(),
            load=self._scheduler.load(),
            refused=tuple(self._refused),
            timing=StepTiming(self._steps, self._execute_ns, 0),
        )
        self._refused.clear()
        self._changed = False
        self._send(report)
