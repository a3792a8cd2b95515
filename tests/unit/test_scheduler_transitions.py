"""A scheduler while its group's layout changes: freeze and adopt, stalled requests, compaction.

The random histories at the end run on two toy stages, each with its own KV memory: a step that is
cancelled got somewhere else on each, pages of an exchange arrive late, and what no request holds is
wiped. Tokens must be those of a loop without any of this.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from kunserve.core.errors import AccountingError, ConfigError
from kunserve.core.ids import BlockId, Epoch, RequestId, SlotId
from kunserve.core.memory import PageRun, pages_of, runs_of
from kunserve.core.policy import Batching, BatchOrder
from kunserve.core.request import Request
from kunserve.core.step import BlockMove, StepPlan, StepResult
from kunserve.core.transition import AdoptedRequest, FrozenRequest, Home
from kunserve.policy.blocks import BlockPool
from kunserve.policy.homes import CompactionRefusedError, assign_homes
from kunserve.policy.scheduler import Scheduler
from tests.unit.test_scheduler import (
    COST_MODEL,
    Executor,
    SchedulerMachine,
    cancelled,
    kv_of,
    make_config,
    make_request,
    next_plan,
    reference_outputs,
    result_of,
    sizes,
    step,
)

NEXT_EPOCH = Epoch(4)
NAME_A, NAME_B = RequestId("a"), RequestId("b")


def make_scheduler(num_blocks: int = 64, **changes: object) -> Scheduler:
    """Blocks 0..num_blocks-1 of slot 0; 4 tokens a block, 4 blocks a page."""
    pool = BlockPool(1024, 4, {SlotId(0): num_blocks})
    return Scheduler(make_config(**changes), pool, COST_MODEL, Epoch(3))


def new_scheduler(**changes: object) -> Scheduler:
    """Of the next epoch, without any page."""
    return Scheduler(make_config(**changes), BlockPool(1024, 4), COST_MODEL, NEXT_EPOCH)


def pages(*numbers: int) -> tuple[PageRun, ...]:
    return runs_of(numbers)


def home(*numbers: int) -> Home:
    return Home(pages(*numbers))


def ids(*blocks: int) -> tuple[BlockId, ...]:
    return tuple(BlockId(block) for block in blocks)


def adopted(request: Request, computed_tokens: int, *blocks: int) -> AdoptedRequest:
    return AdoptedRequest(request, computed_tokens, ids(*blocks))


def run_to_end(scheduler: Scheduler) -> list[RequestId]:
    """Who got a token, in order."""
    order = []
    while scheduler.has_work():
        order += [output.request_id for output in step(scheduler)[1]]
    return order


# ---------------------------------------------------------------- freeze


def test_freeze_drops_what_is_in_flight_and_says_it_again_after_unfreeze() -> None:
    scheduler = make_scheduler(num_stages=2)
    scheduler.add(make_request("z", 3, max_tokens=1))
    step(scheduler)
    scheduler.add(make_request("a", 6))
    scheduler.add(make_request("b", 9))
    first = next_plan(scheduler)
    scheduler.add(make_request("c", 2))
    second = next_plan(scheduler)
    frozen = scheduler.freeze()
    scheduler.check()
    assert frozen == tuple(FrozenRequest(RequestId(name), 0, ()) for name in "abc")
    assert scheduler.schedule(0) is None
    for plan in (first, second):
        with pytest.raises(AccountingError, match="not in flight"):
            scheduler.update(plan, cancelled(plan), 0)
    scheduler.unfreeze()
    again = next_plan(scheduler)
    assert again.epoch == first.epoch
    assert sizes(again) == {"a": 6, "b": 9, "c": 2}
    assert [request.id for request in again.started] == ["a", "b", "c"]
    assert again.released == ("z",)
    scheduler.check()


def test_frozen_tables_hold_computed_tokens_and_waiting_requests_hold_nothing() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    scheduler.add(make_request("late", 5, arrival_ns=9))
    step(scheduler)
    scheduler.add(make_request("early", 4, arrival_ns=1))
    step(scheduler)
    scheduler.add(make_request("first", 4, arrival_ns=0))
    next_plan(scheduler)  # early gets its second block
    assert scheduler.freeze() == (
        FrozenRequest(RequestId("first"), 0, ()),
        FrozenRequest(RequestId("early"), 4, ids(2)),
        FrozenRequest(RequestId("late"), 6, ids(0, 1)),
    )
    scheduler.check()
    assert scheduler.load().free_blocks == 61


def test_requests_come_and_go_while_frozen() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 6))
    next_plan(scheduler)
    scheduler.abort(NAME_A)
    assert scheduler.freeze() == ()  # it only waited for its step
    scheduler.add(make_request("b", 6))
    scheduler.add(make_request("c", 6))
    scheduler.abort(NAME_B)
    scheduler.check()
    assert scheduler.has_work()
    scheduler.unfreeze()
    assert sizes(next_plan(scheduler)) == {"c": 6}


def test_freezing_twice_and_unfreezing_the_running_is_refused() -> None:
    scheduler = make_scheduler()
    with pytest.raises(AccountingError, match="not frozen"):
        scheduler.unfreeze()
    scheduler.freeze()
    with pytest.raises(AccountingError, match="unfreeze it first"):
        scheduler.freeze()


def test_a_snapshot_does_not_stop_and_touched_blocks_are_those_given_up_since() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 9, max_tokens=2))
    scheduler.add(make_request("b", 5, max_tokens=9))
    step(scheduler)
    assert scheduler.snapshot() == (
        FrozenRequest(NAME_A, 9, ids(0, 1, 2)),
        FrozenRequest(NAME_B, 5, ids(3, 4)),
    )
    assert scheduler.touched() == ()
    step(scheduler)
    assert scheduler.touched() == ids(0, 1, 2)
    assert [request.request_id for request in scheduler.freeze()] == ["b"]


# ---------------------------------------------------------------- adopt


def test_adopted_requests_go_on_where_they_were() -> None:
    scheduler = new_scheduler()
    a, b, c = make_request("a", 6, outputs=(7,)), make_request("b", 9), make_request("c", 3)
    requests = [adopted(a, 6, 256, 257, 99), adopted(b, 0), adopted(c, 2, 3)]
    scheduler.adopt(requests, pages(0, 64))
    scheduler.check()
    load = scheduler.load()
    assert (load.total_blocks, load.free_blocks) == (8, 5)
    assert (load.num_running, load.num_waiting, load.leases_seen) == (2, 1, 0)
    scheduler.add(make_request("d", 2))
    assert scheduler.load().leases_seen == 1
    plan, _ = step(scheduler)
    assert (plan.epoch, sizes(plan)) == (NEXT_EPOCH, {"a": 1, "c": 1, "b": 9, "d": 2})
    assert [request.id for request in plan.started] == ["a", "c", "b", "d"]
    assert plan.started[0] == a
    chunk = plan.chunks[0]
    assert (chunk.token_ids, chunk.context_len, chunk.output_index) == ((7,), 6, 1)
    assert chunk.block_table == ids(256, 257)
    assert scheduler.newly_started() == ("b", "d")  # a and c had started before


def test_adopted_requests_keep_their_order_ahead_of_later_leases() -> None:
    scheduler = new_scheduler(max_num_seqs=1)
    names = ("x", "m", "a")
    scheduler.adopt([adopted(make_request(n, 2, max_tokens=1), 0) for n in names], pages(0))
    scheduler.add(make_request("b", 2, max_tokens=1))
    assert run_to_end(scheduler) == ["x", "m", "a", "b"]


def test_shared_blocks_are_adopted_once_and_found_by_others() -> None:
    scheduler = new_scheduler()
    prompt = list(range(2, 12))
    requests = [
        adopted(make_request("a", prompt, outputs=(7,)), 10, 0, 1, 2),
        adopted(make_request("b", prompt, outputs=(8,)), 10, 0, 1, 3),
    ]
    scheduler.adopt(requests, pages(0, 1))
    scheduler.check()
    assert scheduler.load().free_blocks == 4
    scheduler.add(make_request("c", prompt))
    assert next_plan(scheduler).chunks[-1].context_len == 8


def test_requests_that_cannot_be_adopted_change_nothing() -> None:
    scheduler = new_scheduler()
    a = make_request("a", 6)
    for wrong in (
        [adopted(a, 6, 0, 1)],
        [adopted(a, -1, 0, 1)],
        [adopted(a, 5, 0)],
        [adopted(a, 5, 0, 8)],
        [adopted(a, 5, 0, 1), adopted(a, 0)],
        [adopted(make_request("b", 6, max_tokens=1, outputs=(7,)), 0)],
    ):
        with pytest.raises(AccountingError, match="adopted"):
            scheduler.adopt(wrong, pages(0, 1))
        assert not scheduler.has_work()
    scheduler.adopt([adopted(a, 5, 0, 1)], pages(0, 1))
    with pytest.raises(AccountingError, match="only a new scheduler"):
        scheduler.adopt([], pages(2))
    scheduler.check()


def test_more_may_be_adopted_than_would_be_admitted() -> None:
    scheduler = new_scheduler(max_num_seqs=2, max_num_batched_tokens=3)
    requests = [
        adopted(make_request(f"r{i}", 5, outputs=(7,)), 5, 2 * i, 2 * i + 1) for i in (0, 1)
    ]
    requests += [adopted(make_request(f"r{i}", 5), 4, 2 * i) for i in (2, 3, 4)]
    scheduler.adopt(requests, pages(0, 1, 2, 3))
    scheduler.add(make_request("new", 2, max_tokens=1))
    plan, _ = step(scheduler)  # all five are decodes
    assert sizes(plan) == {"r0": 1, "r1": 1, "r2": 1}
    assert run_to_end(scheduler)[-1] == "new"


def test_the_capacity_counts_pages_on_their_way() -> None:
    scheduler = new_scheduler()
    scheduler.adopt([], pages(0, 1), pending=[1, 2])
    assert (scheduler.max_request_tokens, scheduler.load().total_blocks) == (48, 4)
    with pytest.raises(AccountingError, match=r"\[2\] are added, but they are not complete"):
        scheduler.grow(pages(2, 3))
    scheduler.grow(pages(3))
    assert (scheduler.max_request_tokens, scheduler.load().total_blocks) == (64, 8)


# ---------------------------------------------------------------- stalled requests


def stalled_scheduler(**changes: object) -> Scheduler:
    """a: complete. b: pages 1 and 2 to come. c: page 2 to come."""
    scheduler = new_scheduler(**changes)
    requests = [
        adopted(make_request("a", 4, outputs=(7,)), 4, 0),
        adopted(make_request("b", 8, outputs=(7,)), 8, 4, 8),
        adopted(make_request("c", 8, outputs=(7,)), 8, 1, 9),
    ]
    scheduler.adopt(requests, pages(0, 3), pending=[1, 2], now_ns=100)
    scheduler.check()
    return scheduler


def test_a_stalled_request_runs_when_its_last_page_is_complete() -> None:
    scheduler = stalled_scheduler()
    assert (scheduler.num_stalled, scheduler.stalled) == (2, ())
    assert sizes(step(scheduler)[0]) == {"a": 1}
    scheduler.page_complete(1, 130)
    scheduler.check()
    assert sizes(step(scheduler)[0]) == {"a": 1}
    assert scheduler.stalled == ()
    scheduler.page_complete(2, 170)
    scheduler.check()
    assert (scheduler.num_stalled, scheduler.stalled) == (0, ((NAME_B, 70), (RequestId("c"), 70)))
    plan, _ = step(scheduler)
    assert sizes(plan) == {"a": 1, "b": 1, "c": 1}
    assert [request.id for request in plan.started] == ["b", "c"]
    with pytest.raises(AccountingError, match="nobody waits"):
        scheduler.page_complete(2, 180)


def test_nothing_is_found_in_a_table_before_it_is_complete() -> None:
    scheduler = stalled_scheduler()
    prompt = make_request("c", 8).prompt_token_ids
    scheduler.add(make_request("d", prompt, max_tokens=1))
    assert next_plan(scheduler).chunks[-1].context_len == 0
    scheduler.abort(RequestId("d"))
    scheduler.page_complete(1, 0)
    scheduler.page_complete(2, 0)
    scheduler.add(make_request("e", (*prompt, 3), max_tokens=1))
    scheduler.freeze()
    scheduler.unfreeze()
    (chunk,) = [c for c in next_plan(scheduler).chunks if c.request_id == "e"]
    assert (chunk.context_len, chunk.block_table[:2]) == (8, ids(1, 9))


def test_stalled_requests_do_not_count_for_the_share_of_a_microbatch() -> None:
    scheduler = new_scheduler(num_stages=2)
    requests = [adopted(make_request(f"r{i}", 4, outputs=(7,)), 4, 4 * i) for i in range(4)]
    scheduler.adopt(requests, pages(0, 1), pending=[2, 3])
    plans = [next_plan(scheduler), next_plan(scheduler)]
    assert [sizes(plan) for plan in plans] == [{"r0": 1}, {"r1": 1}]


def test_who_wants_room_waits_for_the_stalled_instead_of_preempting_anybody() -> None:
    scheduler = new_scheduler(enable_prefix_caching=False)
    requests = [
        adopted(make_request("a", 4, outputs=(7,)), 4, 0),
        adopted(make_request("b", 4, outputs=(7,)), 4, 1),
        adopted(make_request("c", 12, outputs=(7,)), 12, 2, 3, 4),
    ]
    scheduler.adopt(requests, pages(0), pending=[1])
    plan = scheduler.schedule(0)
    # b, the latest that runs, gives way to a; what c holds must not be given up
    assert plan is not None
    assert (sizes(plan), plan.released) == ({"a": 1}, ("b",))
    scheduler.check()
    scheduler.update(plan, result_of(plan), 0)
    for _ in range(3):
        step(scheduler)
    assert scheduler.schedule(0) is None  # a waits
    scheduler.check()
    scheduler.page_complete(1, 0)
    assert sizes(step(scheduler)[0]) == {"a": 1, "c": 1}


def test_a_stalled_request_can_be_aborted_or_computed_again() -> None:
    scheduler = stalled_scheduler()
    scheduler.abort(NAME_B)
    scheduler.check()
    scheduler.recompute([RequestId("c"), RequestId("nobody"), RequestId("c")])
    scheduler.check()
    assert (scheduler.load().num_waiting, scheduler.num_stalled) == (1, 0)
    plan = next_plan(scheduler)
    assert sizes(plan) == {"a": 1, "c": 9}
    with pytest.raises(AccountingError, match="in flight"):
        scheduler.recompute([NAME_A])
    scheduler.update(plan, result_of(plan), 0)
    scheduler.page_complete(2, 0)
    scheduler.page_complete(1, 0)
    assert scheduler.stalled == ()
    run_to_end(scheduler)
    assert scheduler.load().total_blocks == 16


# ---------------------------------------------------------------- homes


def half_of(block: BlockId) -> int | None:
    """Blocks 0..7 are home 0, 8..15 home 1, others nobody's."""
    return block // 8 if block < 16 else None


def test_a_request_stays_where_most_of_its_blocks_are() -> None:
    tables = [ids(8, 9, 0), ids(1, 2), ids(30), ids()]
    assert assign_homes(tables, [8, 8], half_of) == (1, 0, 0, 0)


def test_who_does_not_fit_there_goes_elsewhere_the_largest_first() -> None:
    tables = [ids(0, 1), ids(2, 3, 4), ids(5)]
    assert assign_homes(tables, [6, 5], half_of) == (1, 0, 0)


def test_packing_starts_anew_when_preferences_do_not_fit() -> None:
    # the middle one would stay in home 0, and 2 + 1 of the last would then fit nowhere
    tables = [ids(*range(8, 13)), ids(0, 1, 2), ids(3, 4)]
    assert assign_homes(tables, [7, 7], half_of) == (1, 0, 0)
    tables = [ids(8, 9, 10, 11), ids(0, 1, 2), ids(3, 4)]
    assert assign_homes(tables, [5, 7], half_of) == (0, 1, 1)


def test_the_preference_is_for_the_home_of_most_blocks() -> None:
    tables = [ids(8, 9, 10), ids(0, 1), ids(2, 3, 4, 5)]
    assert assign_homes(tables, [5, 8], half_of) == (1, 1, 0)


def test_blocks_that_are_shared_count_once_in_a_home() -> None:
    shared = ids(0, 1, 2, 3)
    tables = [(*shared, BlockId(n)) for n in (4, 5)]
    assert assign_homes(tables, [8], lambda block: 0) == (0, 0)
    with pytest.raises(CompactionRefusedError, match=r"homes of 7, 5 blocks"):
        assign_homes(tables, [7, 5], half_of)
    assert assign_homes(tables, [7, 6], half_of) == (0, 1)


# ---------------------------------------------------------------- compaction


def make_scattered(num_stages: int = 1, max_moves_per_step: int = 64) -> tuple[Scheduler, Executor]:
    """a: blocks 0, 1, 16 (6 tokens of a block free); b: 17, 18. Of pages 0 .. 7."""
    scheduler = new_scheduler(num_stages=num_stages, max_moves_per_step=max_moves_per_step)
    a = make_request("a", 10, max_tokens=30, outputs=(7,))
    b = make_request("b", 7, max_tokens=30, outputs=(7,))
    scheduler.adopt([adopted(a, 10, 0, 1, 16), adopted(b, 7, 17, 18)], pages(*range(8)))
    executor = Executor(4)
    for request, table in ((a, (0, 1, 16)), (b, (17, 18))):
        kv: list[int] = []
        for position, token_id in enumerate(request.prompt_token_ids):
            kv.append(kv_of(token_id, kv))
            executor.memory[BlockId(table[position // 4]), position % 4] = kv[-1]
    return scheduler, executor


def test_blocks_move_home_with_the_plans() -> None:
    scheduler, executor = make_scattered()
    scheduler.compact((home(0, 1), home(2, 3)))
    assert not scheduler.is_compacted
    assert scheduler.load().total_blocks == 16
    plan = next_plan(scheduler)
    assert plan.moves == (
        BlockMove(BlockId(16), BlockId(2)),
        BlockMove(BlockId(17), BlockId(3)),
        BlockMove(BlockId(18), BlockId(4)),
    )
    assert [chunk.block_table for chunk in plan.chunks] == [ids(0, 1, 2), ids(3, 4)]
    scheduler.check()
    assert not scheduler.is_compacted
    scheduler.update(plan, executor.execute(plan), 0)
    scheduler.check()
    assert scheduler.is_compacted
    assert (scheduler.moved_blocks, scheduler.used_pages_per_home()) == (3, (2, 0))
    assert {r.home for r in scheduler.snapshot()} == {0}
    assert scheduler.closed_pages() == pages(4, 5, 6, 7)
    scheduler.end_compaction(pages(4, 5, 6, 7))
    assert (scheduler.is_compacted, scheduler.moved_blocks) == (False, 0)
    assert scheduler.load().total_blocks == 32
    assert {r.home for r in scheduler.snapshot()} == {None}
    scheduler.check()


def test_blocks_of_the_next_microbatch_move_with_it() -> None:
    scheduler, _ = make_scattered(num_stages=2)
    scheduler.compact((home(0, 1),))
    plans = [next_plan(scheduler), next_plan(scheduler)]
    assert [(sizes(plan), len(plan.moves)) for plan in plans] == [({"a": 1}, 1), ({"b": 1}, 2)]


def test_at_most_so_many_moves_a_step() -> None:
    scheduler, executor = make_scattered(max_moves_per_step=2)
    scheduler.compact((home(0, 1),))
    counts = []
    while not scheduler.is_compacted:
        plan = next_plan(scheduler)
        counts.append(len(plan.moves))
        scheduler.update(plan, executor.execute(plan), 0)
        scheduler.check()
    assert counts == [2, 1]
    with pytest.raises(ConfigError, match="max_moves_per_step"):
        make_config(max_moves_per_step=0)


def test_homes_that_are_too_small_are_refused_and_nothing_changes() -> None:
    scheduler, _ = make_scattered()
    before = scheduler.snapshot()
    with pytest.raises(CompactionRefusedError, match="fits none of the homes"):
        scheduler.compact((home(0),))
    with pytest.raises(AccountingError, match="two homes"):
        scheduler.compact((home(0, 1), home(1, 2)))
    assert (scheduler.snapshot(), scheduler.load().total_blocks) == (before, 32)
    assert sizes(next_plan(scheduler)) == {"a": 1, "b": 1}
    scheduler.freeze()
    with pytest.raises(AccountingError, match="frozen"):
        scheduler.compact((home(0, 1, 2, 3),))
    stalled = stalled_scheduler()
    with pytest.raises(CompactionRefusedError, match="on their way"):
        stalled.compact((home(0),))
    with pytest.raises(AccountingError, match="no compaction"):
        stalled.end_compaction(())


@pytest.mark.parametrize("how", ["cancel", "freeze"])
def test_moves_of_a_cancelled_plan_are_undone_and_made_again(how: str) -> None:
    scheduler, executor = make_scattered()
    scheduler.compact((home(0, 1),))
    before = scheduler.snapshot()
    first = next_plan(scheduler)
    assert scheduler.snapshot() == before  # as if it were cancelled
    if how == "cancel":
        scheduler.update(first, executor.execute(first, cancel_after=1), 0)
    else:
        assert scheduler.freeze() == before
        scheduler.unfreeze()
    scheduler.check()
    assert scheduler.moved_blocks == 0
    second = next_plan(scheduler)
    assert (second.moves, second.chunks) == (first.moves, first.chunks)
    executor.execute(second)


def test_a_request_that_the_budget_leaves_out_moves_too() -> None:
    scheduler = new_scheduler(max_num_batched_tokens=1)
    requests = [
        adopted(make_request("a", 4, outputs=(7,)), 4, 0),
        adopted(make_request("b", 9), 4, 8),
    ]
    scheduler.adopt(requests, pages(0, 1, 2, 3))
    scheduler.compact((home(0, 1),))
    plan, _ = step(scheduler)
    assert (sizes(plan), plan.moves) == ({"a": 1}, (BlockMove(BlockId(8), BlockId(2)),))


def test_a_request_that_moves_is_in_flight_and_its_abort_waits() -> None:
    scheduler = new_scheduler(max_num_batched_tokens=1)
    requests = [
        adopted(make_request("a", 4, outputs=(7,)), 4, 0),
        adopted(make_request("b", 4, outputs=(7,)), 4, 8),
    ]
    scheduler.adopt(requests, pages(0, 1, 2))
    scheduler.compact((home(0, 1),))
    plan = next_plan(scheduler)
    assert (sizes(plan), plan.moves) == ({"a": 1}, (BlockMove(BlockId(8), BlockId(2)),))
    scheduler.abort(NAME_B)
    scheduler.check()
    assert scheduler.load().num_running == 2
    scheduler.update(plan, result_of(plan), 0)
    scheduler.check()
    assert scheduler.load().num_running == 1
    assert next_plan(scheduler).released == ("b",)


def shared_scheduler(num_stages: int = 1) -> Scheduler:
    """a and b share blocks 8 and 9; all of page 2."""
    scheduler = new_scheduler(num_stages=num_stages)
    prompt = list(range(2, 11))
    requests = [
        adopted(make_request("a", prompt, outputs=(7,)), 9, 8, 9, 10),
        adopted(make_request("b", prompt, outputs=(8,)), 9, 8, 9, 11),
    ]
    scheduler.adopt(requests, pages(0, 1, 2))
    return scheduler


def test_a_shared_block_moves_once_in_a_home_with_its_name() -> None:
    scheduler = shared_scheduler()
    scheduler.compact((home(0, 1),))
    plan, _ = step(scheduler)
    assert [chunk.block_table for chunk in plan.chunks] == [ids(0, 1, 2), ids(0, 1, 3)]
    assert len(plan.moves) == 4
    assert (scheduler.moved_blocks, scheduler.is_compacted) == (4, True)
    scheduler.add(make_request("c", list(range(2, 11))))
    assert next_plan(scheduler).chunks[-1].block_table[:2] == ids(0, 1)


def test_a_sharer_in_another_microbatch_takes_the_copy_when_it_is_sure() -> None:
    scheduler = shared_scheduler(num_stages=2)
    first, second = next_plan(scheduler), next_plan(scheduler)
    assert (sizes(first), sizes(second)) == ({"a": 1}, {"b": 1})
    scheduler.compact((home(0, 1),))
    scheduler.update(first, result_of(first), 0)
    first = next_plan(scheduler)
    assert (sizes(first), len(first.moves)) == ({"a": 1}, 3)
    scheduler.update(second, result_of(second), 0)
    second = next_plan(scheduler)  # the copies of 8 and 9 are in flight
    assert second.moves == (BlockMove(BlockId(11), BlockId(3)),)
    scheduler.update(first, result_of(first), 0)
    scheduler.update(second, result_of(second), 0)
    scheduler.check()
    plans = [next_plan(scheduler), next_plan(scheduler)]
    assert [plan.moves for plan in plans] == [(), ()]
    assert plans[1].chunks[0].block_table == ids(0, 1, 3)
    scheduler.check()


def test_a_block_that_is_shared_across_homes_is_in_both() -> None:
    scheduler = shared_scheduler()
    scheduler.compact((home(0), home(1)))
    plan, _ = step(scheduler)
    assert [chunk.block_table for chunk in plan.chunks] == [ids(0, 1, 2), ids(4, 5, 6)]
    assert scheduler.used_pages_per_home() == (1, 1)
    assert [request.home for request in scheduler.freeze()] == [0, 1]


def test_new_requests_get_the_home_with_most_room_and_find_prefixes_only_there() -> None:
    scheduler = make_scheduler(24)
    prompt = list(range(2, 14))
    scheduler.add(make_request("a", prompt, max_tokens=30))
    step(scheduler)
    scheduler.compact((home(0, 1), home(2, 3)))
    scheduler.add(make_request("b", prompt))
    plan = next_plan(scheduler)
    chunk = plan.chunks[-1]
    assert (chunk.request_id, chunk.context_len, chunk.block_table) == ("b", 0, ids(8, 9, 10))
    assert [request.home for request in scheduler.snapshot()] == [0, 1]


def test_admission_leaves_room_for_what_has_yet_to_move_home() -> None:
    scheduler, _ = make_scattered(max_moves_per_step=1)
    scheduler.compact((home(0, 1),))
    scheduler.add(make_request("c", 9, max_tokens=1))  # 3 of 8 blocks, 2 free, one each to grow
    plan, _ = step(scheduler)
    assert sizes(plan) == {"a": 1, "b": 1}
    step(scheduler)
    step(scheduler)
    assert scheduler.is_compacted  # 5 blocks used, 3 free
    assert sizes(step(scheduler)[0]) == {"a": 1, "b": 1}
    scheduler.abort(NAME_B)
    assert sizes(step(scheduler)[0]) == {"a": 1, "c": 9}


def test_a_full_home_preempts_its_own_latest_arrival() -> None:
    scheduler = new_scheduler(enable_prefix_caching=False)
    requests = [
        adopted(make_request("a", 4, outputs=(7,)), 3, 0),
        adopted(make_request("b", 12, max_tokens=4, outputs=(7,)), 12, 4, 5, 6),
        adopted(make_request("c", 4, outputs=(7,)), 3, 1),
    ]
    scheduler.adopt(requests, pages(0, 1))
    scheduler.compact((home(0), home(1)))
    plan, _ = step(scheduler)
    while "c" not in plan.released:  # 4 blocks of 4 tokens in home 0; b ends meanwhile
        plan, _ = step(scheduler)
        assert "a" not in plan.released
    assert [(r.request_id, r.home) for r in scheduler.snapshot()] == [("a", 0), ("c", None)]
    assert scheduler.load().preemptions == 1


def test_two_full_homes_with_blocks_of_each_other_do_not_get_stuck() -> None:
    scheduler = new_scheduler(enable_prefix_caching=False)
    requests = [
        adopted(make_request("a", 12, max_tokens=30, outputs=(7,)), 9, 0, 4, 5),
        adopted(make_request("b", 12, max_tokens=30, outputs=(7,)), 9, 6, 1, 2),
    ]
    scheduler.adopt(requests, pages(0, 1))
    scheduler.compact((home(0), home(1)))
    for _ in range(10):
        if scheduler.is_compacted:
            return
        plan = scheduler.schedule(0)
        assert plan is not None
        scheduler.update(plan, result_of(plan), 0)
        scheduler.check()
    pytest.fail("blocks never got home")


def test_compaction_can_end_while_blocks_move() -> None:
    scheduler, executor = make_scattered(num_stages=2)
    scheduler.compact((home(0, 1),))
    plans = [next_plan(scheduler), next_plan(scheduler)]
    scheduler.end_compaction(scheduler.closed_pages())
    scheduler.check()
    scheduler.update(plans[0], executor.execute(plans[0]), 0)
    scheduler.update(plans[1], executor.execute(plans[1], cancel_after=0), 0)
    scheduler.check()
    plan = next_plan(scheduler)
    executor.execute(plan)
    assert plan.moves == ()


# ---------------------------------------------------------------- random histories


@dataclass
class Ring:
    """Two stages that make every step, each with its own memory. The second is the reference:
    tokens come from it, the first must agree."""

    block_size: int
    stages: tuple[Executor, Executor] = field(init=False)

    def __post_init__(self) -> None:
        self.stages = (Executor(self.block_size), Executor(self.block_size))

    @property
    def outputs(self) -> dict[RequestId, int]:
        return self.stages[0].outputs

    def execute(self, plan: StepPlan) -> StepResult:
        first, second = (stage.execute(plan) for stage in self.stages)
        assert first == second
        return first

    def cancel(self, plan: StepPlan, extents: Sequence[tuple[int, int]]) -> StepResult:
        """Each stage makes so many moves, and if these are all, so many chunks; or nothing."""
        for stage, (moves, chunks) in zip(self.stages, extents, strict=True):
            if moves < len(plan.moves):
                stage.execute(plan, moves_made=moves)
            else:
                stage.execute(plan, cancel_after=chunks)
        return StepResult(plan.epoch, plan.step, (), cancelled=True)

    def restart(self) -> None:
        for stage in self.stages:
            stage.outputs.clear()

    def keep(self, blocks: set[BlockId]) -> None:
        for stage in self.stages:
            for place in [place for place in stage.memory if place[0] not in blocks]:
                del stage.memory[place]

    def take_out(self, page: int) -> list[dict[tuple[BlockId, int], int]]:
        """Content of a page of 4 blocks, which is not there any more."""
        content = []
        for stage in self.stages:
            places = [place for place in stage.memory if place[0] // 4 == page]
            content.append({place: stage.memory.pop(place) for place in places})
        return content

    def put_back(self, content: list[dict[tuple[BlockId, int], int]]) -> None:
        for stage, memory in zip(self.stages, content, strict=True):
            assert not memory.keys() & stage.memory.keys(), "written before it was complete"
            stage.memory.update(memory)

    def content(self, blocks: Sequence[BlockId]) -> list[list[int]]:
        return [
            [stage.memory[block, offset] for block in blocks for offset in range(self.block_size)]
            for stage in self.stages
        ]


EXTENTS = st.tuples(*[st.tuples(st.integers(0, 4), st.integers(0, 4))] * 2)


class TransitionMachine(SchedulerMachine):
    """The histories of `SchedulerMachine` across transitions."""

    @initialize(
        block_size=st.integers(1, 5),
        capacity_tokens=st.integers(80, 240),
        budget_tokens=st.one_of(st.none(), st.none(), st.integers(1, 40)),
        target_ms=st.sampled_from([20, 1000]),
        max_num_seqs=st.sampled_from([3, 8, 8]),
        caching=st.sampled_from([True, True, False]),
        watermark=st.sampled_from([0.0, 0.2]),
        stages=st.sampled_from([1, 2, 3]),
        order=st.sampled_from(BatchOrder),
        batching=st.sampled_from(Batching),
        chained=st.booleans(),
        max_moves=st.sampled_from([1, 2, 64]),
    )
    def build(self, max_moves: int, **limits: object) -> None:  # type: ignore[override]
        super().build(**limits)  # type: ignore[arg-type]
        self.config = replace(self.config, max_moves_per_step=max_moves)
        self.scheduler = Scheduler(self.config, self.pool, COST_MODEL, Epoch(3))
        self.ring = Ring(self.config.block_size)
        self.executor = self.ring  # type: ignore[assignment]
        self.is_frozen = self.is_compacting = False
        self.arriving: dict[int, list[dict[tuple[BlockId, int], int]]] = {}
        self.epoch = 3
        self.clock_ns = 0
        self.num_adopted = 0
        self.watched: dict[BlockId, list[list[int]]] | None = None

    # what the base asks

    def capacity_tokens(self) -> int:
        return self.scheduler.max_request_tokens

    def may_be_idle(self) -> bool:
        waits = self.is_frozen or self.arriving or self.is_compacting
        return bool(waits) or super().may_be_idle()

    def max_running(self) -> int:
        return max(self.config.max_num_seqs, self.num_adopted)

    @precondition(lambda self: self.flights)
    @rule(extents=EXTENTS)
    def cancel(self, extents: Sequence[tuple[int, int]]) -> None:  # type: ignore[override]
        plan = self.flights.pop(0)
        assert self.scheduler.update(plan, self.ring.cancel(plan, extents), 0) == ()

    @rule(length=st.integers(9, 24), copies=st.integers(2, 4))
    def submit_long(self, length: int, copies: int) -> None:
        """Long enough to share blocks and to be there for a while."""
        for _ in range(copies):
            self.num_requests += 1
            name, arrival_ns = f"r{self.num_requests}", 10 * self.num_requests
            self.lease(make_request(name, (2,) * length, 30, arrival_ns), 0)
            self.run(2)

    # the old scheduler

    @precondition(lambda self: not self.is_frozen)
    @rule(data=st.data())
    def freeze(self, data: st.DataObject) -> None:
        self.freeze_now(data)

    def freeze_now(self, data: st.DataObject) -> None:
        for plan in self.flights:
            if not data.draw(st.booleans()):
                break  # it has not gone out, nor has what comes after it
            self.ring.cancel(plan, data.draw(EXTENTS))
        self.flights.clear()
        self.frozen = self.scheduler.freeze()
        self.is_frozen = True
        self.check_frozen(self.frozen)
        self.check_watched()

    def check_frozen(self, frozen: Sequence[FrozenRequest]) -> None:
        """All live requests, by arrival, and on both stages the KV that they claim."""
        assert {request.request_id for request in frozen} == self.expected.keys()
        orders = [self.arrivals[request.request_id] for request in frozen]
        assert orders == sorted(orders)
        for request in frozen:
            size, computed = self.config.block_size, request.computed_tokens
            assert len(request.block_table) == -(-computed // size)
            if any(block // 4 in self.arriving for block in request.block_table):
                continue
            kv: list[int] = []
            for token_id in self.known_tokens(request.request_id)[:computed]:
                kv.append(kv_of(token_id, kv))
            for stage in self.ring.stages:
                table = request.block_table
                places = [(table[p // size], p % size) for p in range(computed)]
                assert [stage.memory[place] for place in places] == kv

    def known_tokens(self, request_id: RequestId) -> list[int]:
        request = self.requests[request_id]
        return [*request.prompt_token_ids, *self.delivered(request)]

    def delivered(self, request: Request) -> tuple[int, ...]:
        outputs = reference_outputs(request, 60)
        done = outputs[: len(outputs) - len(self.expected[request.id])]
        return tuple(output.token_id for output in done)

    @precondition(lambda self: self.is_frozen)
    @rule()
    def thaw(self) -> None:
        self.unfreeze()

    def unfreeze(self) -> None:
        self.scheduler.unfreeze()
        self.is_frozen = False

    @rule()
    def snapshot(self) -> None:
        frozen = self.scheduler.snapshot()
        self.check_frozen(frozen)
        full = {
            block
            for request in frozen
            for block in request.block_table[: request.computed_tokens // self.config.block_size]
            if block // 4 not in self.arriving
        }
        self.watched = {block: self.ring.content([block]) for block in full}

    def check_watched(self) -> None:
        """What was full at the snapshot and was not touched since is still the same."""
        if self.watched is None:
            return
        for block in self.watched.keys() - set(self.scheduler.touched()):
            assert self.ring.content([block]) == self.watched[block]

    # the new scheduler

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), steps=st.integers(0, 3))
    def adopt(self, data: st.DataObject, steps: int) -> None:
        """Other pages, some of them to come; the rest of the memory is wiped."""
        if not self.is_frozen:
            self.freeze_now(data)
        live = [request for request in self.frozen if request.request_id in self.expected]
        used = {block // 4 for request in live for block in request.block_table}
        adopted = [
            AdoptedRequest(
                replace(self.requests[r.request_id], output_token_ids=self.delivered_of(r)),
                r.computed_tokens,
                r.block_table,
            )
            for r in live
        ]
        self.add_those_that_came_late(adopted)
        needed = max((self.total_tokens(a.request) for a in adopted), default=4)
        chosen = used | data.draw(st.sets(st.integers(0, 24), max_size=6))
        more = (page for page in range(100) if page not in chosen)
        while len(chosen) * 4 * self.config.block_size < needed:
            chosen.add(next(more))
        late: set[int] = set()
        if data.draw(st.integers(0, 2)) == 0:
            late = set(data.draw(st.lists(st.sampled_from(sorted(chosen)), max_size=4)))
        late = (late | self.arriving.keys()) & chosen
        self.ring.restart()
        self.ring.keep({block for request in live for block in request.block_table})
        self.arriving = {p: self.arriving.get(p) or self.ring.take_out(p) for p in late}
        self.start_anew(data, adopted, chosen)
        self.run(steps)

    def delivered_of(self, frozen: FrozenRequest) -> tuple[int, ...]:
        return self.delivered(self.requests[frozen.request_id])

    def total_tokens(self, request: Request) -> int:
        return len(request.prompt_token_ids) + request.params.max_tokens

    def add_those_that_came_late(self, adopted: list[AdoptedRequest]) -> None:
        """Leased while it was frozen."""
        here = {request.request.id for request in adopted}
        for request_id in self.expected.keys() - here:
            request = self.requests[request_id]
            lease = replace(request, output_token_ids=self.delivered(request))
            adopted.append(AdoptedRequest(lease, 0, ()))
        adopted.sort(key=lambda a: self.arrivals[a.request.id])

    def start_anew(
        self, data: st.DataObject, adopted: list[AdoptedRequest], chosen: set[int]
    ) -> None:
        self.epoch += 1
        stages = data.draw(st.integers(1, 3))
        self.config = replace(self.config, num_stages=stages)
        self.pool = BlockPool(1024, 4)
        self.scheduler = Scheduler(self.config, self.pool, COST_MODEL, Epoch(self.epoch))
        self.scheduler.adopt(adopted, runs_of(chosen), self.arriving, self.clock_ns)
        assert self.scheduler.load().leases_seen == 0
        self.num_adopted = self.scheduler.load().num_running
        self.started = {a.request.id for a in adopted if a.computed_tokens}
        self.is_frozen = self.is_compacting = False
        self.watched = None

    @precondition(lambda self: self.arriving)
    @rule(data=st.data())
    def page_complete(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.arriving)))
        before = {request_id for request_id, _ in self.scheduler.stalled}
        self.clock_ns += 10
        self.ring.put_back(self.arriving.pop(page))
        self.scheduler.page_complete(page, self.clock_ns)
        now = {request_id for request_id, _ in self.scheduler.stalled}
        assert before <= now
        if not self.arriving:
            assert self.scheduler.num_stalled == 0

    @precondition(lambda self: self.arriving and not self.is_frozen)
    @rule(data=st.data())
    def page_lost(self, data: st.DataObject) -> None:
        """Who needs it is computed again; then it is as good as a new page."""
        page = data.draw(st.sampled_from(sorted(self.arriving)))
        lost = [
            request.request_id
            for request in self.scheduler.snapshot()
            if any(block // 4 == page for block in request.block_table)
        ]
        self.watched = None
        self.scheduler.recompute(lost)
        self.arriving.pop(page)
        self.scheduler.page_complete(page, self.clock_ns)

    @rule(page=st.integers(0, 30))
    def grow(self, page: int) -> None:
        held = self.pool.backed_blocks
        try:
            self.scheduler.grow((PageRun(page, 1),))
        except AccountingError:
            assert self.pool.backed_blocks == held
        else:
            assert self.pool.backed_blocks == held + 4

    # compaction

    @precondition(lambda self: not self.is_frozen and not self.is_compacting and self.expected)
    @rule(data=st.data(), num_homes=st.integers(1, 2), plans=st.integers(0, 3))
    def compact(self, data: st.DataObject, num_homes: int, plans: int) -> None:
        open_pages = [p for p in range(256) if self.pool.is_open(BlockId(4 * p))]
        used = self.pool.pages_in_use() if data.draw(st.booleans()) else ()
        shift = data.draw(st.integers(0, num_homes))
        home_of = {  # with `used`, everything has to move
            page: 9 if page in used else (page + shift) % (num_homes + (not used))
            for page in open_pages
        }
        homes = [
            Home(runs_of(page for page in open_pages if home_of[page] == number))
            for number in range(num_homes)
        ]
        before = (self.scheduler.load(), self.scheduler.snapshot(), self.pool.closed_pages())
        self.watched = None
        try:
            self.scheduler.compact(homes)
        except CompactionRefusedError:
            after = (self.scheduler.load(), self.scheduler.snapshot(), self.pool.closed_pages())
            assert before == after
        else:
            self.is_compacting = True
            self.homes = homes
            for _ in range(plans):
                self.schedule()

    @precondition(lambda self: self.is_compacting and not self.is_frozen)
    @rule()
    def finish_compaction(self) -> None:
        """Every block gets home in bounded time; then a split would find all of it there."""
        for _ in range(400):
            if self.scheduler.is_compacted:
                break
            self.schedule()
            if self.flights:
                self.land()
        assert self.scheduler.is_compacted
        used = [0] * len(self.homes)
        for number, kept in enumerate(self.homes):
            numbers = set(pages_of(kept.pages))
            tables = [r.block_table for r in self.scheduler.snapshot() if r.home == number]
            held = {block // 4 for table in tables for block in table}
            assert held <= numbers
            used[number] = len(held)
        in_use = self.scheduler.used_pages_per_home()
        assert all(a <= b for a, b in zip(used, in_use, strict=True))
        assert sum(in_use) == len(self.pool.pages_in_use())
        self.watched = None

    @precondition(lambda self: self.is_compacting)
    @rule(all_of_them=st.booleans())
    def end_compaction(self, all_of_them: bool) -> None:
        closed = self.scheduler.closed_pages()
        self.scheduler.end_compaction(closed if all_of_them else closed[1:])
        self.is_compacting = False
        if not all_of_them:
            self.pool.reopen_pages(closed[:1])

    @invariant()
    def moves_are_bounded(self) -> None:
        for plan in getattr(self, "flights", ()):
            assert len(plan.moves) <= self.config.max_moves_per_step
            assert plan.epoch == self.epoch

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        while self.arriving:
            page, content = self.arriving.popitem()
            self.ring.put_back(content)
            self.scheduler.page_complete(page, self.clock_ns)
        if self.is_frozen:
            self.unfreeze()
        if self.is_compacting:
            self.end_compaction(True)
        super().teardown()


TransitionMachine.TestCase.settings = settings(
    max_examples=50, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestTransitions = TransitionMachine.TestCase


# ---------------------------------------------------------------- sharers that keep moving


class Shuffle:
    """Requests with a common prefix, compacted into random pages again and again, while steps
    are cancelled, frozen and finished in any way. Seeded: it always gets to what it is for."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.scheduler = make_scheduler(
            64, num_stages=seed % 3 + 1, max_moves_per_step=self.random.choice([1, 2, 64])
        )
        self.ring = Ring(4)
        self.flights: list[StepPlan] = []
        self.expected: dict[RequestId, list[int]] = {}
        self.is_compacting = False
        self.moves = self.shared = self.leases = 0

    def lease(self) -> None:
        prompt = [2] * self.random.randint(5, 14)
        self.leases += 1
        request = make_request(f"r{self.leases}", prompt, max_tokens=12, arrival_ns=self.leases)
        self.scheduler.add(request)
        self.expected[request.id] = [t.token_id for t in reference_outputs(request, 100)]

    def extent(self, plan: StepPlan) -> list[tuple[int, int]]:
        return [
            (self.random.randint(0, len(plan.moves)), self.random.randint(0, len(plan.chunks)))
            for _ in range(2)
        ]

    def compact(self) -> None:
        if not self.is_compacting:
            count = self.random.randint(1, 2)
            homes: list[set[int]] = [set() for _ in range(count + 1)]
            for page in range(16):
                self.random.choice(homes).add(page)
            try:
                self.scheduler.compact([Home(runs_of(home)) for home in homes[:count]])
            except CompactionRefusedError:
                return
            self.is_compacting = True
        elif self.random.random() < 0.5:
            self.is_compacting = False
            self.scheduler.end_compaction(self.scheduler.closed_pages())

    def freeze(self) -> None:
        reached = self.random.randint(0, len(self.flights))
        for plan in self.flights[:reached]:
            self.ring.cancel(plan, self.extent(plan))
        self.flights.clear()
        for request in self.scheduler.freeze():
            self.ring.content(request.block_table[: request.computed_tokens // 4])
        self.scheduler.unfreeze()

    def turn(self) -> None:
        chance = self.random.random()
        if chance < 0.15 and len(self.expected) < 6:
            self.lease()
        elif chance < 0.25:
            self.compact()
        elif chance < 0.28:
            self.freeze()
        elif chance < 0.3 and self.expected:
            request_id = self.random.choice(sorted(self.expected))
            self.scheduler.abort(request_id)
            del self.expected[request_id]
        elif chance < 0.65 or not self.flights:
            self.plan()
        else:
            self.land(is_cancelled=self.random.random() < 0.15)
        self.scheduler.check()

    def plan(self) -> None:
        before = {r.request_id: r.block_table for r in self.scheduler.snapshot()}
        plan = self.scheduler.schedule(0)
        if plan is None:
            return
        self.flights.append(plan)
        self.moves += len(plan.moves)
        targets = {move.target for move in plan.moves}
        tables = [set(c.block_table) for c in plan.chunks if c.request_id in before]
        self.shared += sum(sum(t in table for table in tables) > 1 for t in targets)

    def land(self, is_cancelled: bool) -> None:
        plan = self.flights.pop(0)
        if is_cancelled:
            assert not self.scheduler.update(plan, self.ring.cancel(plan, self.extent(plan)), 0)
            return
        for output in self.scheduler.update(plan, self.ring.execute(plan), 0):
            expected = self.expected[output.request_id]
            assert output.token_id == expected.pop(0)
            if output.finish is not None:
                assert not expected
                del self.expected[output.request_id]


def test_sharers_that_keep_moving_lose_nothing() -> None:
    moves = shared = 0
    for seed in range(90):
        shuffle = Shuffle(seed)
        for _ in range(250):
            shuffle.turn()
        moves, shared = moves + shuffle.moves, shared + shuffle.shared
    assert moves > 1000
    assert shared > 120
