"""Swapping to host memory: rules by example, and random histories in which KV is really copied.

A copy reads its source when it begins and writes its target when it ends, so a block that is given
away too early, or used before its KV is back, changes tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from kunserve.core.actions import CopyKv
from kunserve.core.errors import AccountingError, ConfigError
from kunserve.core.ids import BlockId, HostBlock, RequestId
from kunserve.core.policy import Batching, BatchOrder
from kunserve.core.step import StepPlan
from kunserve.core.transition import Home
from kunserve.policy.scheduler import Scheduler
from kunserve.policy.swap import SwapSpace
from tests.unit.test_scheduler import (
    COST_MODEL,
    EPOCH,
    Executor,
    SchedulerMachine,
    make_request,
    make_scheduler,
    result_of,
    sizes,
    step,
)

A, B, C = RequestId("a"), RequestId("b"), RequestId("c")


def ids(*blocks: int) -> tuple[BlockId, ...]:
    return tuple(BlockId(block) for block in blocks)


def host(*blocks: int) -> tuple[HostBlock, ...]:
    return tuple(HostBlock(block) for block in blocks)


# ---------------------------------------------------------------- the space


def test_host_blocks_come_and_go_lowest_first() -> None:
    space = SwapSpace(5)
    assert space.send_out(A, ids(7, 3), freed_blocks=1) == host(0, 1)
    assert space.send_out(B, ids(4), freed_blocks=1) == host(2)
    assert (space.free_blocks, space.freed_blocks, space.is_sending_out) == (2, 2, True)
    assert space.take_orders() == [
        CopyKv(0, True, ids(7, 3), host(0, 1)),
        CopyKv(1, True, ids(4), host(2)),
    ]
    assert space.take_orders() == []
    space.check([host(0, 1), host(2)], [A, B])
    assert space.finish(0).request_id == A
    assert space.freed_blocks == 1
    space.bring_in(A, ids(9), host(1))  # the first one is in the prefix cache
    assert space.take_orders() == [CopyKv(2, False, ids(9), host(1))]
    for transfer in (1, 2):
        space.finish(transfer)
    assert not space.is_copying
    space.release(host(0, 1))
    space.check([host(2)], [])
    assert space.send_out(C, ids(1, 2, 3), freed_blocks=3) == host(0, 1, 3)
    assert (space.counts.swapped_out, space.counts.swapped_in) == (2, 1)
    assert space.counts.copied_blocks == 2 + 1 + 1 + 3


def test_a_space_refuses_what_would_break_it() -> None:
    space = SwapSpace(2)
    with pytest.raises(AccountingError, match="2 are free"):
        space.send_out(A, ids(1, 2, 3), freed_blocks=3)
    with pytest.raises(AccountingError, match="1 blocks are copied, 2 on the host"):
        space.bring_in(A, ids(1), host(0, 1))
    with pytest.raises(AccountingError, match="was not under way"):
        space.finish(0)
    space.send_out(A, ids(1), freed_blocks=1)
    with pytest.raises(AccountingError, match="two holders"):
        space.check([], [A])
    with pytest.raises(AccountingError, match="said to be swapped"):
        space.check([host(0)], [])


def test_only_groups_of_one_stage_swap() -> None:
    with pytest.raises(ConfigError, match="several stages"):
        make_scheduler(host_blocks=1, num_stages=2)
    with pytest.raises(AccountingError, match="never split"):
        make_scheduler(host_blocks=1).compact([Home(())])


# ---------------------------------------------------------------- the scheduler, by example


def swapping(num_blocks: int = 6, **changes: object) -> Scheduler:
    return make_scheduler(num_blocks, **{"host_blocks": 16, "host_block_bytes": 10, **changes})


def out_of(scheduler: Scheduler) -> CopyKv:
    (order,) = scheduler.take_copies()
    return order


def step_if_any(scheduler: Scheduler) -> StepPlan | None:
    """A step, unless all there is to do waits for a copy."""
    plan = scheduler.schedule(0)
    if plan is None:
        assert scheduler.is_copying
    else:
        scheduler.update(plan, result_of(plan), 0)
    scheduler.check()
    return plan


def next_copy(scheduler: Scheduler) -> CopyKv:
    """Steps until a request leaves or comes."""
    while not (copies := scheduler.take_copies()):
        step_if_any(scheduler)
    (order,) = copies
    return order


def run_to_end(scheduler: Scheduler) -> list[StepPlan]:
    """All plans until nothing is left; every copy lasts one step."""
    plans: list[StepPlan | None] = []
    while scheduler.has_work():
        copies = scheduler.take_copies()
        plans.append(step_if_any(scheduler))
        for copy in copies:
            scheduler.copied(copy.transfer)
    return [plan for plan in plans if plan is not None]


def two_that_fill_it() -> Scheduler:
    """a and b with 7 computed tokens each in two blocks, and one block left: b goes, a goes on."""
    scheduler = swapping(num_blocks=5)
    scheduler.add(make_request("a", 7, max_tokens=9))
    scheduler.add(make_request("b", 7, max_tokens=9))
    step(scheduler)
    assert not scheduler.is_copying
    assert sizes(step(scheduler)[0]) == {"a": 1}  # for the step after this one, two are needed
    return scheduler


def test_the_latest_leaves_before_room_is_short_and_the_other_goes_on() -> None:
    scheduler = two_that_fill_it()
    order = out_of(scheduler)
    assert (order.to_host, len(order.blocks), order.host_blocks) == (True, 2, host(0, 1))
    plan, _ = step(scheduler)
    assert (sizes(plan), plan.released) == ({"a": 1}, ())  # not out yet, but a had its block
    load = scheduler.load()
    assert (load.num_running, load.num_waiting, load.preemptions) == (2, 0, 1)
    scheduler.copied(order.transfer)
    scheduler.check()
    load = scheduler.load()
    assert (load.num_running, load.num_waiting, load.swapped_out) == (1, 1, 1)
    plan, _ = step(scheduler)
    assert (sizes(plan), plan.released) == ({"a": 1}, ("b",))


def test_a_swapped_request_comes_back_with_its_computed_tokens() -> None:
    scheduler = two_that_fill_it()
    scheduler.copied(out_of(scheduler).transfer)
    back = next_copy(scheduler)
    # The first block still is in the prefix cache; the last one is copied in any case.
    assert (back.to_host, len(back.blocks), back.host_blocks) == (False, 1, host(1))
    assert scheduler.schedule(0) is None
    assert scheduler.has_work()
    scheduler.copied(back.transfer)
    scheduler.check()
    plan, _ = step(scheduler)
    (chunk,) = plan.chunks
    assert (chunk.request_id, chunk.context_len, chunk.token_ids) == (B, 7, (7,))
    assert plan.started[0].output_token_ids == (7,)
    load = scheduler.load()
    assert (load.swapped_in, load.swap_bytes, load.swap_refused) == (1, 30, 0)


def test_nobody_is_admitted_while_a_victim_leaves() -> None:
    scheduler = two_that_fill_it()
    scheduler.add(make_request("c", 1, max_tokens=1, arrival_ns=9))
    leaving = out_of(scheduler)
    scheduler.abort(A)
    assert scheduler.schedule(0) is None  # c would have room
    scheduler.copied(leaving.transfer)
    plan, _ = step(scheduler)
    (coming,) = scheduler.take_copies()  # b was there before c, and has its blocks
    assert (sizes(plan), coming.to_host) == ({"c": 1}, False)


def test_who_needs_room_waits_for_a_copy_that_is_late() -> None:
    scheduler = two_that_fill_it()
    order = out_of(scheduler)
    while scheduler.load().free_blocks:
        step(scheduler)
    for _ in range(3):
        step(scheduler)  # a fills its block
    assert scheduler.schedule(0) is None
    assert scheduler.load().preemptions == 1
    scheduler.copied(order.transfer)
    assert sizes(step(scheduler)[0]) == {"a": 1}


def test_without_host_memory_for_it_a_victim_is_computed_again() -> None:
    scheduler = swapping(num_blocks=4, host_blocks=1)
    scheduler.add(make_request("a", 7, max_tokens=9))
    scheduler.add(make_request("b", 7, max_tokens=9))
    for _ in range(3):
        plan, _ = step(scheduler)
    assert (sizes(plan), plan.released) == ({"a": 1}, ("b",))
    load = scheduler.load()
    assert (load.preemptions, load.swapped_out, load.swap_refused) == (1, 0, 1)


@pytest.mark.parametrize("when", ["leaving", "swapped", "coming"])
def test_an_aborted_request_gives_everything_back(when: str) -> None:
    scheduler = two_that_fill_it()
    order = out_of(scheduler)
    if when != "leaving":
        scheduler.copied(order.transfer)
    if when == "coming":
        order = next_copy(scheduler)
    scheduler.abort(B)
    scheduler.check()
    if when != "swapped":
        scheduler.copied(order.transfer)
        scheduler.check()
    while scheduler.has_work():
        assert set(sizes(step(scheduler)[0])) <= {"a"}
    load = scheduler.load()
    assert load.free_blocks + load.cached_blocks == load.total_blocks


@pytest.mark.parametrize("when", ["leaving", "swapped", "coming"])
def test_a_fence_finds_swapped_requests_with_nothing_computed_and_they_survive_its_abort(
    when: str,
) -> None:
    scheduler = two_that_fill_it()
    order = out_of(scheduler)
    if when != "leaving":
        scheduler.copied(order.transfer)
    if when == "coming":
        order = next_copy(scheduler)
    frozen = {request.request_id: request for request in scheduler.freeze()}
    assert (frozen[B].computed_tokens, frozen[B].block_table) == (0, ())
    if A in frozen:
        assert frozen[A].computed_tokens > 7
    scheduler.check()
    if when != "swapped":
        assert scheduler.is_copying
        scheduler.copied(order.transfer)
    scheduler.turn_back()
    plans = run_to_end(scheduler)
    assert [sizes(plan)["b"] for plan in plans if "b" in sizes(plan)] == [1] * 8
    assert scheduler.load().swapped_in == 1


def test_shared_blocks_do_not_count_as_room_that_a_victim_leaves() -> None:
    scheduler = swapping(num_blocks=7)
    scheduler.add(make_request("a", (5,) * 9, max_tokens=11))
    step(scheduler)
    scheduler.add(make_request("b", (5,) * 9, max_tokens=11, arrival_ns=1))
    while not scheduler.is_copying:
        step(scheduler)
    order = out_of(scheduler)
    assert len(order.blocks) > 2
    shared = scheduler.load().free_blocks
    scheduler.copied(order.transfer)
    scheduler.check()
    freed = scheduler.load().free_blocks + scheduler.load().cached_blocks - shared
    assert freed == len(order.blocks) - 2


# ---------------------------------------------------------------- random histories


@dataclass
class HostMemory:
    """Makes copies: reads when they begin, writes when they end."""

    executor: Executor
    blocks: dict[HostBlock, list[int | None]] = field(default_factory=dict)
    under_way: list[tuple[CopyKv, list[list[int | None]]]] = field(default_factory=list)

    def begin(self, order: CopyKv) -> None:
        if order.to_host:
            contents = [self.read(block) for block in order.blocks]
        else:
            contents = [self.blocks[block] for block in order.host_blocks]
            for block in order.blocks:
                self.write(block, [None] * self.executor.block_size)
        self.under_way.append((order, contents))

    def end(self, number: int) -> int:
        order, contents = self.under_way.pop(number)
        for block, host_block, content in zip(
            order.blocks, order.host_blocks, contents, strict=True
        ):
            if order.to_host:
                assert self.read(block) == content, "written while it was copied"
                self.blocks[host_block] = content
            else:
                assert self.read(block) == [None] * len(content), "used before it was there"
                self.write(block, content)
        return order.transfer

    def read(self, block: BlockId) -> list[int | None]:
        memory = self.executor.memory
        return [memory.get((block, offset)) for offset in range(self.executor.block_size)]

    def write(self, block: BlockId, content: list[int | None]) -> None:
        for offset, value in enumerate(content):
            self.executor.memory.pop((block, offset), None)
            if value is not None:
                self.executor.memory[block, offset] = value


class SwapMachine(SchedulerMachine):
    """`SchedulerMachine` with host memory, copies that take their time, and fences."""

    @initialize(
        block_size=st.sampled_from([1, 2, 4, 5]),
        capacity_tokens=st.integers(24, 60),
        host_blocks=st.sampled_from([1, 6, 20, 60, 60]),
        budget_tokens=st.one_of(st.none(), st.integers(1, 25)),
        max_num_seqs=st.sampled_from([2, 3, 5, 8, 8]),
        caching=st.booleans(),
        watermark=st.sampled_from([0.0, 0.2]),
        order=st.sampled_from(BatchOrder),
    )
    def build(self, host_blocks: int, **limits: object) -> None:  # type: ignore[override]
        ring = {"stages": 1, "batching": Batching.TOKEN_COUNT, "chained": False}
        super().build(target_ms=20, **ring, **limits)  # type: ignore[arg-type]
        self.config = replace(self.config, host_blocks=host_blocks)
        self.scheduler = Scheduler(self.config, self.pool, COST_MODEL, EPOCH)
        self.host = HostMemory(self.executor)

    def may_be_idle(self) -> bool:
        return self.scheduler.is_copying or super().may_be_idle()

    @rule(length=st.integers(9, 24), copies=st.integers(2, 4))
    def submit_long(self, length: int, copies: int) -> None:
        """Long enough to share blocks, and to need more than there are."""
        for _ in range(copies):
            self.num_requests += 1
            name, arrival_ns = f"r{self.num_requests}", 10 * self.num_requests
            self.lease(make_request(name, (2,) * length, 30, arrival_ns), 0)
            self.run(2)

    def schedule(self) -> None:
        super().schedule()
        for order in self.scheduler.take_copies():
            self.host.begin(order)

    @precondition(lambda self: self.host.under_way)
    @rule(number=st.integers(0, 8))
    def copied(self, number: int) -> None:
        transfer = self.host.end(number % len(self.host.under_way))
        self.scheduler.copied(transfer)

    @rule(steps=st.integers(1, 10))
    def run(self, steps: int) -> None:
        """Every second step a copy ends."""
        for number in range(steps):
            self.schedule()
            if self.flights:
                self.land()
            if self.host.under_way and number % 2:
                self.copied(0)

    @rule()
    def fence_and_turn_back(self) -> None:
        self.flights.clear()
        for frozen in self.scheduler.freeze():
            assert len(frozen.block_table) == -(-frozen.computed_tokens // self.config.block_size)
        self.scheduler.check()
        self.scheduler.turn_back()

    @invariant()
    def copies_are_known(self) -> None:
        if hasattr(self, "host"):
            assert self.scheduler.is_copying == bool(self.host.under_way)
            assert self.scheduler.load().swapped_out <= self.scheduler.load().preemptions

    def land(self) -> None:
        if self.flights:
            super().land()

    def teardown(self) -> None:
        if hasattr(self, "host"):
            for _ in range(5000):
                if not self.scheduler.has_work():
                    break
                self.run(2)
        super().teardown()


SwapMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestSwap = SwapMachine.TestCase
