"""The coordinator by example, as the controller shows it. The simulator covers the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import pytest

from kunserve.core.events import (
    AnswerWish,
    ClockTicked,
    Command,
    Event,
    InstanceDrainWished,
    InstanceLost,
    InstanceReady,
    KillInstance,
    LayoutWished,
    LeaseRequest,
    LogTransition,
    RequestSubmitted,
    WishKind,
)
from kunserve.core.ids import InstanceId, RequestId, SlotId
from kunserve.core.memory import KvExtent
from kunserve.core.request import Request, SamplingParams
from kunserve.core.transition import (
    Abort,
    Adopt,
    Adopted,
    Fence,
    Fenced,
    Finish,
    Finished,
    FrozenRequest,
    MoveProgress,
    Prepare,
    Prepared,
    Remap,
    Remapped,
    Reset,
)
from kunserve.policy.book import SECOND_NS, ControllerConfig, InstanceState
from kunserve.policy.controller import Controller
from kunserve.policy.cost_model import CostModel
from kunserve.policy.scheduler import SchedulerConfig
from kunserve.policy.transition import State
from kunserve.sim.instance import SimInstanceConfig

MODEL = SimInstanceConfig(
    SchedulerConfig(block_size=4, max_model_len=64),
    CostModel(0, 0, 1e6, 20e6),
    num_layers=4,
    kv_pages=8,
    blocks_per_page=2,
)
ZERO, ONE, TWO = (InstanceId(i) for i in range(3))
A = RequestId("a")
DROP = LayoutWished(0, WishKind.DROP)


class Front:
    """A controller of ready whole instances, and the answers of members that do as told."""

    def __init__(self, num_instances: int = 2) -> None:
        slots = MODEL.slots(num_instances)
        self.slot_starts = [slots.slot_range(SlotId(i)).start for i in range(num_instances)]
        config = ControllerConfig(
            num_instances=num_instances,
            num_layers=4,
            block_size=4,
            max_model_len=64,
            max_num_queued_reqs=100,
            part_pages=tuple(MODEL.part_pages.items()),
            slot_pages=slots.slot_pages,
            blocks_per_page=2,
            answer_timeout_ns=5 * SECOND_NS,
            long_timeout_ns=20 * SECOND_NS,
        )
        self.now_ns = 0
        self.controller = Controller(config, 0)
        pages = MODEL.memory_plan.num_pages
        for i in range(num_instances):
            costs = astuple(MODEL.cost_model)
            self.handle(InstanceReady(InstanceId(i), 0, 16, pages, (), costs))

    def handle(self, event: Event) -> tuple[Command, ...]:
        commands = self.controller.handle(event, self.now_ns)
        self.controller.check()
        return commands

    def tick(self, seconds: float) -> tuple[Command, ...]:
        self.now_ns += round(seconds * SECOND_NS)
        return self.handle(ClockTicked())

    def extents(self, instance: int) -> tuple[KvExtent, ...]:
        start = self.slot_starts[instance]
        return tuple(KvExtent(layer, start, 20 + 8 * layer, 8) for layer in range(4))

    def answer(self, kind: type, instances: Sequence[int], **fields: Any) -> tuple[Command, ...]:
        commands: tuple[Command, ...] = ()
        for i in instances:
            more = {"extents": self.extents(i)} if kind in (Prepared, Fenced) else {}
            commands = self.handle(kind(InstanceId(i), 0, 0, **(more | fields)))
        return commands

    def state(self) -> State | None:
        return self.controller.transition_state(ZERO)


def kinds(commands: Sequence[Command]) -> list[str]:
    return [type(command).__name__ for command in commands]


def submitted(front: Front) -> None:
    request = Request(A, (1, 2, 3, 4, 5), SamplingParams(8, seed=0), arrival_ns=0)
    (lease,) = front.handle(RequestSubmitted(request))
    assert isinstance(lease, LeaseRequest)


def fenced(front: Front) -> tuple[Command, ...]:
    """Run a merge up to COMMIT; request a is on instance 0."""
    assert kinds(front.handle(DROP)) == ["Prepare", "Prepare"]
    assert kinds(front.answer(Prepared, (0, 1), parts=())) == ["Fence", "Fence"]
    held = FrozenRequest(A, 5, (front.slot_starts[0] * 2, front.slot_starts[0] * 2 + 1))  # type: ignore[arg-type]
    front.answer(Fenced, (1,))
    return front.answer(Fenced, (0,), requests=(held,))


def remap(front: Front) -> tuple[Command, ...]:
    fields = {"parts": (), "elapsed_ns": 1, "remapped_pages": 1}
    return front.answer(Remapped, (0, 1), **fields)


def test_a_merge_goes_through_all_states() -> None:
    front = Front()
    submitted(front)
    committed = fenced(front)
    assert kinds(committed) == ["LogTransition", "Remap", "Remap", "AnswerWish"]
    assert isinstance(committed[-1], AnswerWish)
    assert committed[-1].granted
    group = front.controller.layout.groups[0]
    assert group.instances == (ZERO, ONE)
    adopts = [command for command in remap(front) if isinstance(command, Adopt)]
    assert [request.request.id for order in adopts for request in order.requests] == [A]
    assert [len(order.moves) for order in adopts] == [0, 1]
    assert adopts[0].pending == ((front.slot_starts[0], 1),)
    assert kinds(front.answer(Adopted, (0, 1))) == []
    assert front.state() is State.MOVE
    done = {"pulled_moves": 1, "pulled_bytes": 1, "is_complete": True}
    assert kinds(front.answer(MoveProgress, (0, 1), **done)) == ["Finish", "Finish"]
    last = front.answer(Finished, (0, 1))
    assert isinstance(last[-1], LogTransition)
    assert last[-1].record.outcome == "done"
    assert front.state() is None
    assert not front.controller.is_in_transition


def test_between_fence_and_adopt_no_request_is_leased() -> None:
    front = Front()
    submitted(front)
    fenced(front)
    late = Request(RequestId("b"), (9, 9), SamplingParams(8, seed=0), arrival_ns=1)
    assert front.handle(RequestSubmitted(late)) == ()
    commands = remap(front)
    assert kinds(commands) == ["Adopt", "Adopt", "LeaseRequest"]
    (lease,) = [c for c in commands if isinstance(c, LeaseRequest)]
    assert (lease.group, lease.epoch) == (commands[0].group, commands[0].epoch)  # type: ignore[union-attr]


def test_a_deadline_before_commit_turns_back() -> None:
    front = Front()
    front.handle(DROP)
    front.answer(Prepared, (0, 1), parts=())
    front.answer(Fenced, (0,))
    assert front.tick(5) == ()
    commands = front.tick(0.1)
    assert kinds(commands) == ["Abort", "Abort", "LogTransition", "AnswerWish"]
    answer = commands[-1]
    assert isinstance(answer, AnswerWish)
    assert not answer.granted
    assert "instances [1] did not answer in fence" in answer.message
    assert len(front.controller.layout.groups) == 2


def test_a_deadline_after_commit_kills() -> None:
    front = Front()
    submitted(front)
    fenced(front)
    front.answer(Remapped, (0,), parts=(), elapsed_ns=1, remapped_pages=1)
    (kill,) = [c for c in front.tick(5.1) if isinstance(c, KillInstance)]
    assert (kill.instance, kill.reason) == (ONE, "no answer in remap of transition 0")
    assert front.state() is State.REMAP
    commands = front.handle(InstanceLost(ONE, 0, "killed"))
    assert kinds(commands) == ["Reset", "LogTransition"]
    assert front.controller.instances()[0].state is InstanceState.RESETTING
    assert front.controller.layout.groups == ()
    ready = InstanceReady(ZERO, 0, 16, MODEL.memory_plan.num_pages, (), astuple(MODEL.cost_model))
    _, lease = front.handle(ready)
    assert isinstance(lease, LeaseRequest)
    assert lease.request.id == A


def test_an_exchange_that_stands_still_ends_who_is_silent() -> None:
    front = Front()
    submitted(front)
    fenced(front)
    remap(front)
    front.answer(Adopted, (0, 1))
    stuck = {"pulled_moves": 0, "pulled_bytes": 0, "is_complete": False}
    front.answer(MoveProgress, (1,), waits_for=ZERO, **stuck)
    front.now_ns += 1_900_000_000
    front.answer(MoveProgress, (0,), waits_for=ONE, **stuck)  # the first word of it is progress
    assert front.tick(1.9) == ()
    (kill,) = front.tick(0.2)
    assert isinstance(kill, KillInstance)
    assert kill.instance == ONE  # both wait for each other; it has said nothing for longer


def test_a_new_wish_overtakes_what_can_turn_back() -> None:
    front = Front(3)
    front.handle(DROP)
    wish = LayoutWished(1, WishKind.LAYOUT, ((ZERO, ONE), (TWO,)))
    commands = front.handle(wish)
    assert kinds(commands) == ["AnswerWish", *["Abort"] * 3, "LogTransition", *["Prepare"] * 2]
    assert commands[0] == AnswerWish(0, False, "another layout was wished meanwhile")


def test_a_new_wish_waits_for_what_cannot_turn_back() -> None:
    front = Front()
    submitted(front)
    fenced(front)
    assert front.handle(LayoutWished(1, WishKind.RESTORE)) == ()
    remap(front)
    front.answer(Adopted, (0, 1))
    done = {"pulled_moves": 1, "pulled_bytes": 1, "is_complete": True}
    front.answer(MoveProgress, (0, 1), **done)
    assert "Compact" in kinds(front.answer(Finished, (0, 1)))


@pytest.mark.parametrize("groups", [((ZERO,),), ((ZERO, ONE, TWO),), ((ZERO, ZERO), (ONE,)), ((),)])
def test_an_illegal_wish_is_refused(groups: tuple[tuple[InstanceId, ...], ...]) -> None:
    front = Front()
    (answer,) = front.handle(LayoutWished(4, WishKind.LAYOUT, groups))
    assert isinstance(answer, AnswerWish)
    assert (answer.wish, answer.granted) == (4, False)
    assert answer.message.startswith("illegal: ")


def test_a_wish_that_is_true_already_is_granted() -> None:
    (answer,) = Front().handle(LayoutWished(4, WishKind.RESTORE))
    assert isinstance(answer, AnswerWish)
    assert answer.granted


def test_a_draining_instance_stays_by_itself() -> None:
    front = Front(3)
    submitted(front)
    busy = next(group.leader for group in front.controller.groups if group.requests)
    front.handle(InstanceDrainWished(1, busy))
    others = tuple(i for i in (ZERO, ONE, TWO) if i != busy)
    commands = front.handle(DROP)
    assert {c.instance for c in commands if isinstance(c, Prepare)} == set(others)
    wish = LayoutWished(5, WishKind.LAYOUT, ((busy, others[0]), others[1:]))
    (answer,) = front.handle(wish)
    assert answer == AnswerWish(
        5, False, f"illegal: instance {busy} is draining; leave it by itself"
    )


def test_orders_name_their_transition() -> None:
    front = Front()
    submitted(front)
    seen = [*front.handle(DROP), *front.answer(Prepared, (0, 1), parts=())]
    orders = [c for c in seen if isinstance(c, Prepare | Fence | Remap | Adopt | Finish | Abort)]
    assert {order.transition for order in orders} == {0}
    assert not [c for c in seen if isinstance(c, Reset)]
