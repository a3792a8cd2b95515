"""The scheduler of a pipeline: chunks that follow each other, and lookahead, by example."""

from __future__ import annotations

from collections.abc import Sequence

from kunserve.core.ids import RequestId, SlotId
from kunserve.core.policy import Batching
from kunserve.core.step import StepPlan
from kunserve.policy.blocks import BlockPool
from kunserve.policy.cost_model import ChunkShape, CostModel
from kunserve.policy.scheduler import Scheduler
from tests.unit.test_scheduler import (
    EPOCH,
    cancelled,
    make_config,
    make_request,
    make_scheduler,
    next_plan,
    result_of,
    sizes,
)

A = RequestId("a")


def contexts(plan: StepPlan) -> dict[str, int]:
    return {chunk.request_id: chunk.context_len for chunk in plan.chunks}


def land(scheduler: Scheduler, plan: StepPlan) -> None:
    scheduler.update(plan, result_of(plan), 0)
    scheduler.check()


# ---------------------------------------------------------------- chunks that follow


def test_the_chunks_of_a_prompt_are_in_flight_one_behind_the_other() -> None:
    scheduler = make_scheduler(num_stages=2, max_num_batched_tokens=8)
    scheduler.add(make_request("a", 20))
    first, second = next_plan(scheduler), next_plan(scheduler)
    assert (sizes(first), contexts(first)) == ({"a": 8}, {"a": 0})
    assert (sizes(second), contexts(second)) == ({"a": 8}, {"a": 8})
    assert (len(first.started), len(second.started)) == (1, 0)
    assert second.chunks[0].block_table[:2] == first.chunks[0].block_table
    land(scheduler, first)
    third = next_plan(scheduler)
    assert (sizes(third), contexts(third)) == ({"a": 4}, {"a": 16})
    assert third.chunks[0].samples
    land(scheduler, second)
    assert scheduler.schedule(0) is None  # its token is on the way
    land(scheduler, third)
    assert sizes(next_plan(scheduler)) == {"a": 1}


def test_chunks_may_be_kept_apart() -> None:
    scheduler = make_scheduler(num_stages=2, max_num_batched_tokens=8, chain_chunks=False)
    scheduler.add(make_request("a", 20))
    next_plan(scheduler)
    assert scheduler.schedule(0) is None


def test_what_follows_a_cancelled_chunk_counts_for_nothing() -> None:
    scheduler = make_scheduler(num_stages=2, max_num_batched_tokens=10)
    scheduler.add(make_request("a", 20))
    first, second = next_plan(scheduler), next_plan(scheduler)
    assert second.chunks[0].samples
    assert scheduler.update(first, cancelled(first), 0) == ()
    scheduler.check()
    assert scheduler.schedule(0) is None  # not before the second one is over
    assert scheduler.update(second, result_of(second), 0) == ()
    scheduler.check()
    again = next_plan(scheduler)
    assert (sizes(again), contexts(again)) == ({"a": 10}, {"a": 0})
    assert len(again.started) == 1


def test_a_frozen_scheduler_counts_no_chunk_of_a_chain() -> None:
    scheduler = make_scheduler(num_stages=2, max_num_batched_tokens=8)
    scheduler.add(make_request("a", 20))
    next_plan(scheduler)
    next_plan(scheduler)
    (frozen,) = scheduler.freeze()
    assert (frozen.computed_tokens, frozen.block_table) == (0, ())
    scheduler.check()
    scheduler.unfreeze()
    assert contexts(next_plan(scheduler)) == {"a": 0}
    assert contexts(next_plan(scheduler)) == {"a": 8}


def test_an_aborted_prompt_keeps_its_blocks_until_its_last_chunk_is_over() -> None:
    scheduler = make_scheduler(num_stages=2, max_num_batched_tokens=8)
    scheduler.add(make_request("a", 30))
    first, second = next_plan(scheduler), next_plan(scheduler)
    scheduler.abort(A)
    land(scheduler, first)
    assert scheduler.referenced_blocks == 4
    assert scheduler.schedule(0) is None
    land(scheduler, second)
    assert scheduler.referenced_blocks == 0
    assert not scheduler.has_work()


def test_a_chunk_that_follows_preempts_nobody() -> None:
    """All 4 blocks are used by then, and b gets on with its first chunk."""
    scheduler = make_scheduler(num_blocks=4, num_stages=2, max_num_batched_tokens=8)
    scheduler.add(make_request("a", 12, max_tokens=1))
    scheduler.add(make_request("b", 8, max_tokens=1))
    first, second = next_plan(scheduler), next_plan(scheduler)
    assert (sizes(first), sizes(second)) == ({"a": 8}, {"a": 4, "b": 4})
    land(scheduler, first)
    assert scheduler.schedule(0) is None
    assert scheduler.load().preemptions == 0


# ---------------------------------------------------------------- lookahead

# A decode of a long context costs as much as many of a short one.
COST = CostModel(alpha_ns=0.0, delta_ns=1e4, beta_ns=1e6, gamma_ns=4e6)


def make_pipeline(*prompts: tuple[int, int], **changes: object) -> Scheduler:
    """Requests r0, r1... of (prompt tokens, max_tokens)."""
    changes = {"num_stages": 2, "batching": Batching.LOOKAHEAD, "max_model_len": 2000, **changes}
    pool = BlockPool(2048, 4, {SlotId(0): 2048})
    scheduler = Scheduler(make_config(**changes), pool, COST, EPOCH)
    for number, (tokens, max_tokens) in enumerate(prompts):
        scheduler.add(make_request(f"r{number}", tokens, max_tokens=max_tokens))
    return scheduler


def cost_ns(plan: StepPlan) -> float:
    return COST.step_ns(
        ChunkShape(chunk.context_len, len(chunk.token_ids), chunk.samples) for chunk in plan.chunks
    )


def test_two_prompts_are_two_equal_microbatches_not_one_and_a_half() -> None:
    """The target has room for 76 tokens: greedily the second microbatch would get what is left."""
    scheduler = make_pipeline((60, 2), (60, 2), step_time_target_ns=80_000_000)
    plans = [next_plan(scheduler), next_plan(scheduler)]
    assert [sizes(plan) for plan in plans] == [{"r0": 60}, {"r1": 60}]
    greedy = make_pipeline(
        (60, 2), (60, 2), step_time_target_ns=80_000_000, batching=Batching.TOKEN_COUNT
    )
    assert sizes(next_plan(greedy)).keys() == {"r0", "r1"}


def test_one_prompt_is_spread_over_the_stages() -> None:
    scheduler = make_pipeline((80, 2))
    plans = [next_plan(scheduler), next_plan(scheduler)]
    assert [sizes(plan)["r0"] for plan in plans] == [41, 39]
    assert abs(cost_ns(plans[0]) - cost_ns(plans[1])) <= 2 * COST.chunk_ns(80, 1)


def test_a_queue_gives_microbatches_of_equal_cost() -> None:
    prompts = [(300, 2), (20, 2), (500, 2), (90, 2), (700, 2)]
    scheduler = make_pipeline(*prompts, step_time_target_ns=100_000_000)
    costs, flights = [], [next_plan(scheduler), next_plan(scheduler)]
    while scheduler.load().num_waiting:
        costs.append(cost_ns(flights[0]))
        land(scheduler, flights.pop(0))
        flights.append(next_plan(scheduler))
    assert len(costs) > 8
    # A prompt is not begun with fewer than 16 tokens, hence what is short of it.
    assert max(costs) - min(costs) <= 16 * COST.chunk_ns(0, 1) + COST.delta_ns * 700
    assert max(costs) <= 100_000_000


def test_nobody_is_begun_with_a_few_tokens_only() -> None:
    scheduler = make_pipeline((100, 2), (100, 2), (100, 2), step_time_target_ns=110_000_000)
    first = next_plan(scheduler)
    assert sizes(first) == {"r0": 100}  # two more tokens would fit


def test_with_one_stage_nothing_is_looked_ahead() -> None:
    prompts = [(60, 3), (90, 3), (25, 3)]
    both = [
        make_pipeline(*prompts, num_stages=1, batching=batching, step_time_target_ns=50_000_000)
        for batching in Batching
    ]
    while both[0].has_work():
        plans = [next_plan(scheduler) for scheduler in both]
        assert plans[0] == plans[1]
        for scheduler, plan in zip(both, plans, strict=True):
            land(scheduler, plan)


def decode_lengths(batching: Batching) -> Sequence[list[int]]:
    """Contexts of the decodes of two microbatches in a steady pipeline: 1 of 600, 8 of 40."""
    scheduler = make_pipeline((600, 90), *[(40, 90)] * 8, batching=batching)
    flights = [next_plan(scheduler)]
    for _ in range(60):
        while (plan := scheduler.schedule(0)) is not None:
            flights.append(plan)
        land(scheduler, flights.pop(0))
    flights += [next_plan(scheduler)]
    return [sorted(contexts(plan).values()) for plan in flights]


def test_decodes_are_shared_by_cost() -> None:
    """A decode of 600 costs 7 ms, one of 40 1.4 ms: 18.2 ms in all, and 9.1 is 7 + 2 x 1.4."""
    assert sorted(map(len, decode_lengths(Batching.TOKEN_COUNT))) == [4, 5]
    with_long, others = sorted(decode_lengths(Batching.LOOKAHEAD), key=len)
    assert max(with_long) > 600
    assert (len(with_long), len(others)) == (3, 6)


def test_a_budget_of_tokens_bounds_lookahead_too() -> None:
    scheduler = make_pipeline((400, 2), (300, 2), max_num_batched_tokens=50)
    sizes_seen = []
    while scheduler.load().num_waiting or not sizes_seen:
        plan = next_plan(scheduler)
        sizes_seen.append(plan.num_tokens)
        land(scheduler, plan)
    assert 35 <= min(sizes_seen) <= max(sizes_seen) <= 50


def test_memory_bounds_what_is_looked_at() -> None:
    """The pool has room for 94 of 200 tokens: they are the work, and are shared."""
    pool = BlockPool(1024, 4, {SlotId(0): 24})
    config = make_config(num_stages=2, batching=Batching.LOOKAHEAD)
    scheduler = Scheduler(config, pool, COST, EPOCH)
    for number in range(4):
        scheduler.add(make_request(f"r{number}", 50, max_tokens=1))
    plans = [next_plan(scheduler), next_plan(scheduler)]
    assert [plan.num_tokens for plan in plans] == [48, 46]
