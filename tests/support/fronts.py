"""A controller whose members answer every order at once, as those do that have nothing to move."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Any

from kunserve.core.events import (
    ClockTicked,
    Command,
    Event,
    GroupReport,
    InstanceReady,
    RequestSubmitted,
)
from kunserve.core.ids import InstanceId, RequestId, SlotId
from kunserve.core.memory import KvExtent
from kunserve.core.policy import PolicyName
from kunserve.core.request import Request, SamplingParams
from kunserve.core.step import GroupLoad
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
    Gather,
    Gathered,
    MoveProgress,
    Prepare,
    Prepared,
    Remap,
    Remapped,
    Snapshot,
    Snapshotted,
)
from kunserve.policy.book import ControllerConfig
from kunserve.policy.controller import Controller
from kunserve.policy.cost_model import CostModel
from kunserve.policy.scheduler import SchedulerConfig
from kunserve.sim.instance import SimInstanceConfig

MODEL = SimInstanceConfig(
    SchedulerConfig(block_size=4, max_model_len=64),
    CostModel(0, 0, 1e6, 20e6),
    num_layers=4,
    kv_pages=8,
    blocks_per_page=2,
    layer_pages=8,
)
WHOLE_BLOCKS = 16
"""Of each instance; a merged pair has 34."""


def load_of(total: int, used: int, queued: int, waiting: int = 0) -> GroupLoad:
    """A load report of a group."""
    return GroupLoad(total, total - used, 0, 1, waiting, queued, 0, 0, 0, 0, 0, 0)


class ObedientFront:
    """A controller of ready whole instances. `commands` keeps all that it said, with the time."""

    def __init__(self, num_instances: int = 2, **config: Any) -> None:
        slots = MODEL.slots(num_instances)
        self._slot_starts = [slots.slot_range(SlotId(i)).start for i in range(num_instances)]
        self.config = ControllerConfig(
            num_instances=num_instances,
            num_layers=4,
            block_size=4,
            max_model_len=64,
            max_num_queued_reqs=10_000,
            part_pages=tuple(MODEL.part_pages.items()),
            slot_pages=slots.slot_pages,
            blocks_per_page=2,
            page_bytes=256,
            policy=PolicyName.KUNSERVE,
        )
        self.config = replace(self.config, **config)
        self.now_ns = 0
        self.commands: list[tuple[int, Command]] = []
        self.controller = Controller(self.config, 0)
        self._next_request = 0
        self._answers: dict[type, Callable[[Any], Event]] = {
            Compact: lambda order: self._answer(Compacted, order, used_pages=(), moved_blocks=0),
            Prepare: lambda order: self._answer(
                Prepared, order, parts=(), extents=self._extents(order.instance)
            ),
            Snapshot: lambda order: self._answer(Snapshotted, order, requests=()),
            Gather: lambda order: self._answer(Gathered, order, moves=(), moved_bytes=0),
            Fence: lambda order: self._answer(Fenced, order, extents=self._extents(order.instance)),
            Remap: lambda order: self._answer(
                Remapped, order, parts=(), elapsed_ns=1, remapped_pages=1
            ),
            Finish: lambda order: self._answer(Finished, order),
            Abort: lambda order: self._answer(Aborted, order),
        }
        for i in range(num_instances):
            pages, costs = MODEL.memory_plan.num_pages, astuple(MODEL.cost_model)
            self.handle(InstanceReady(InstanceId(i), 0, WHOLE_BLOCKS, pages, (), costs))

    def _answer(self, kind: type, order: Any, **fields: Any) -> Event:
        answer: Event = kind(order.instance, 0, order.transition, **fields)
        return answer

    def _extents(self, instance: int) -> tuple[KvExtent, ...]:
        start = self._slot_starts[instance]
        return tuple(KvExtent(layer, start, 40 + 8 * layer, 8) for layer in range(4))

    def handle(self, event: Event) -> list[Command]:
        """Take an event in, and all answers that follow from it."""
        said: list[Command] = []
        events = deque([event])
        while events:
            for command in self.controller.handle(events.popleft(), self.now_ns):
                said.append(command)
                answer = self._answers.get(type(command))
                if answer is not None:
                    events.append(answer(command))
                if isinstance(command, Adopt):
                    events.append(self._answer(Adopted, command))
                    progress = {"pulled_moves": 0, "pulled_bytes": 0, "is_complete": True}
                    events.append(self._answer(MoveProgress, command, **progress))
        self.controller.check()
        self.commands += [(self.now_ns, command) for command in said]
        return said

    def tick(self, seconds: float = 0.25) -> list[Command]:
        """Time passes."""
        self.now_ns += round(seconds * 1e9)
        return self.handle(ClockTicked())

    def submit(self, prompt: int = 8, max_tokens: int = 40) -> list[Command]:
        """A request arrives."""
        self._next_request += 1
        params = SamplingParams(max_tokens, seed=0)
        name = RequestId(f"r{self._next_request}")
        request = Request(name, tuple(range(prompt)), params, self.now_ns)
        return self.handle(RequestSubmitted(request))

    def report(self, number: int, used: int, queued: int) -> list[Command]:
        """The leader of the group at place `number` of the layout says what it holds."""
        record = self.controller.groups[number % len(self.controller.groups)]
        total = WHOLE_BLOCKS if len(record.group.stages) == 1 else record.total_blocks
        load = load_of(total, min(used, total), queued)
        load = replace(load, leases_seen=record.leases_sent)
        report = GroupReport(record.leader, 0, record.id, record.epoch, 1, (), (), load)
        return self.handle(report)
