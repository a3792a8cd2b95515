"""A scheduler that gives requests away, and one that takes them in, while the rest runs on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kunserve.core.errors import AccountingError
from kunserve.core.ids import BlockId, MigrationId, RequestId
from kunserve.core.request import TokenOutput
from kunserve.policy.scheduler import Scheduler
from tests.unit.test_scheduler import (
    Executor,
    make_request,
    next_plan,
    reference_outputs,
    result_of,
    sizes,
    step,
)
from tests.unit.test_scheduler_transitions import make_scheduler, run_to_end

A, B, C = RequestId("a"), RequestId("b"), RequestId("c")
M, N = MigrationId(3), MigrationId(4)


def running(*names: str, **changes: object) -> Scheduler:
    """Requests of 6 tokens, all prefilled: two blocks of 4 each."""
    scheduler = make_scheduler(**changes)  # type: ignore[arg-type]
    for name in names:
        scheduler.add(make_request(name, 6, max_tokens=4))
    step(scheduler)
    return scheduler


# ---------------------------------------------------------------- the source


def test_an_offer_leaves_a_request_running() -> None:
    scheduler = running("a", "b")
    offered = scheduler.offer(A)
    assert offered is not None
    assert (offered.computed_tokens, len(offered.block_table)) == (6, 2)
    assert scheduler.offer(C) is None
    scheduler.add(make_request("c", 6))
    assert scheduler.offer(C) is None  # it waits
    assert sizes(next_plan(scheduler)) == {"a": 1, "b": 1, "c": 6}
    assert scheduler.is_offered(A)


@pytest.mark.parametrize("end", ["aborted", "finished", "given up"])
def test_an_offer_ends_with_the_running_set(end: str) -> None:
    scheduler = running("a")
    scheduler.offer(A)
    if end == "aborted":
        scheduler.abort(A)
    elif end == "finished":
        run_to_end(scheduler)
    else:
        scheduler.end_offer(A)
    assert not scheduler.is_offered(A)
    with pytest.raises(AccountingError, match="not offered"):
        scheduler.take_out(A)


def test_who_was_preempted_and_runs_again_is_offered_no_more() -> None:
    scheduler = running("a", "b", num_blocks=4)
    scheduler.offer(B)
    while scheduler.load().num_running:
        step(scheduler)  # both grow to three blocks: the later one is preempted, and runs again
    assert scheduler.load().preemptions
    assert not scheduler.is_offered(B)


def test_a_request_in_a_step_is_taken_out_after_it() -> None:
    scheduler = running("a")
    scheduler.offer(A)
    plan = next_plan(scheduler)
    assert scheduler.take_out(A) is None
    scheduler.update(plan, result_of(plan), 0)
    taken = scheduler.take_out(A)
    assert taken is not None
    assert taken.computed_tokens == 7
    assert scheduler.schedule(0) is None
    assert scheduler.has_work()
    scheduler.check()


def test_who_is_put_back_goes_on_and_is_said_anew() -> None:
    scheduler = running("a", "b")
    scheduler.offer(A)
    scheduler.take_out(A)
    plan, _ = step(scheduler)
    assert (sizes(plan), plan.released) == ({"b": 1}, (A,))
    scheduler.put_back(A)
    plan, _ = step(scheduler)
    assert sizes(plan) == {"a": 1, "b": 1}
    assert [request.id for request in plan.started] == [A]
    scheduler.check()


def test_who_is_given_away_leaves_its_full_blocks_in_the_cache() -> None:
    scheduler = running("a")
    scheduler.offer(A)
    scheduler.take_out(A)
    scheduler.give_away(A)
    scheduler.check()
    load = scheduler.load()
    assert (load.num_running, load.cached_blocks) == (0, 1)
    assert not scheduler.has_work()
    scheduler.give_away(A)  # as after an abort
    scheduler.put_back(A)
    assert not scheduler.has_work()


def test_who_was_taken_out_may_be_aborted() -> None:
    scheduler = running("a", "b")
    scheduler.offer(A)
    scheduler.take_out(A)
    scheduler.abort(A)
    scheduler.put_back(A)
    scheduler.check()
    assert sizes(next_plan(scheduler)) == {"b": 1}


def test_a_blocked_queue_gives_back_what_fits_elsewhere() -> None:
    scheduler = running("a", "b", "c", num_blocks=8)  # 2 are left
    names = {"d": 9, "e": 16, "f": 5, "g": 3}  # 3, 4, 2 and 1 blocks
    for name, tokens in names.items():
        scheduler.add(make_request(name, tokens))
    assert scheduler.load().head_blocks == 3
    assert scheduler.withdraw(2, frozenset({"f"})) == ("g",)
    assert scheduler.withdraw(6, frozenset()) == ("d", "f")
    scheduler.check()
    assert (scheduler.load().num_waiting, scheduler.load().queued_blocks) == (1, 4)


def test_a_queue_that_finds_room_gives_nothing_back() -> None:
    scheduler = running("a", num_blocks=8)
    scheduler.add(make_request("b", 9))
    assert scheduler.withdraw(100, frozenset()) == ()


# ---------------------------------------------------------------- the target


def test_reserved_blocks_are_nobodys_and_grow() -> None:
    scheduler = make_scheduler(num_blocks=8)
    first = scheduler.reserve(M, 3)
    assert first is not None
    assert scheduler.load().leases_seen == 1
    assert scheduler.reserve(M, 2) == first
    more = scheduler.reserve(M, 5)
    assert more is not None
    assert more[:3] == first
    assert (scheduler.load().available_blocks, scheduler.load().leases_seen) == (3, 1)
    assert scheduler.reserve(M, 9) is None
    assert scheduler.has_work()
    scheduler.check()
    scheduler.release_reserved(M)
    scheduler.release_reserved(M)
    assert not scheduler.has_work()
    scheduler.check()


def test_a_reservation_leaves_room_for_the_queue_and_a_reserve() -> None:
    scheduler = running("a", num_blocks=16, watermark_fraction=0.25)  # 14 are left
    assert scheduler.reserve(M, 11) is None
    scheduler.add(make_request("b", 6))
    assert scheduler.reserve(M, 9) is None
    assert scheduler.reserve(N, 8) is not None
    full = running("a", max_num_seqs=1)
    assert full.reserve(M, 1) is None
    assert full.load().leases_seen == 2  # refused ones as well


def test_who_is_taken_in_runs_with_its_blocks() -> None:
    scheduler = make_scheduler()
    reserved = scheduler.reserve(M, 4)
    assert reserved is not None
    scheduler.take_in(M, make_request("a", 6, outputs=(1, 2)), computed_tokens=7)
    scheduler.check()
    plan = next_plan(scheduler)
    (chunk,) = plan.chunks
    assert (chunk.block_table, chunk.context_len, chunk.output_index) == (reserved[:2], 7, 2)
    assert [request.output_token_ids for request in plan.started] == [(1, 2)]
    assert scheduler.newly_started() == ()  # it has started elsewhere


@pytest.mark.parametrize(("computed", "blocks"), [(8, 4), (7, 1)])
def test_what_is_not_complete_is_not_taken_in(computed: int, blocks: int) -> None:
    scheduler = make_scheduler()
    scheduler.reserve(M, blocks)
    with pytest.raises(AccountingError, match="cannot be taken in"):
        scheduler.take_in(M, make_request("a", 6, outputs=(1, 2)), computed)
    scheduler.check()


# ---------------------------------------------------------------- both, with their KV


class Side:
    """A scheduler and an executor with its memory."""

    def __init__(self) -> None:
        self.scheduler = make_scheduler(num_blocks=24)
        self.executor = Executor(4)
        self.outputs: dict[RequestId, list[TokenOutput]] = {}

    def step(self) -> None:
        plan = self.scheduler.schedule(0)
        if plan is not None:
            for output in self.scheduler.update(plan, self.executor.execute(plan), 0):
                self.outputs.setdefault(output.request_id, []).append(output)
        self.scheduler.check()

    def pull(self, source: Side, blocks: tuple[BlockId, ...], here: tuple[BlockId, ...]) -> None:
        for there, block in zip(blocks, here, strict=True):
            for offset in range(4):
                if (there, offset) in source.executor.memory:
                    value = source.executor.memory[there, offset]
                    self.executor.memory[block, offset] = value


@given(
    prompts=st.lists(st.integers(1, 12), min_size=2, max_size=5),
    before=st.integers(1, 6),
    meanwhile=st.integers(0, 6),
    is_cancelled=st.booleans(),
)
def test_tokens_are_those_of_a_loop_wherever_they_are_made(
    prompts: list[int], before: int, meanwhile: int, is_cancelled: bool
) -> None:
    """The first request goes from one side to the other, in two stages; the others stay."""
    source, target = Side(), Side()
    requests = [
        make_request(f"r{number}", tokens, max_tokens=12) for number, tokens in enumerate(prompts)
    ]
    for number, request in enumerate(requests):
        (target if number == 1 else source).scheduler.add(request)
    for _ in range(before):
        source.step()
        target.step()
    moving = requests[0]
    offered = source.scheduler.offer(moving.id)
    if offered is not None:
        full = offered.computed_tokens // 4
        reserved = target.scheduler.reserve(M, full)
        assert reserved is not None
        target.pull(source, offered.block_table[:full], reserved)
        for _ in range(meanwhile):
            source.step()
            target.step()
        if source.scheduler.is_offered(moving.id):
            stopped = source.scheduler.take_out(moving.id)
            assert stopped is not None
            reserved = target.scheduler.reserve(M, len(stopped.block_table))
            assert reserved is not None
            target.pull(source, stopped.block_table[full:], reserved[full:])
            if is_cancelled:
                source.scheduler.put_back(moving.id)
            else:
                source.scheduler.give_away(moving.id)
                known = tuple(o.token_id for o in source.outputs.get(moving.id, []))
                lease = make_request("r0", prompts[0], max_tokens=12, outputs=known)
                target.scheduler.take_in(M, lease, stopped.computed_tokens)
        target.scheduler.release_reserved(M)
    while source.scheduler.has_work() or target.scheduler.has_work():
        source.step()
        target.step()
    for request in requests:
        made = source.outputs.get(request.id, []) + target.outputs.get(request.id, [])
        assert made == reference_outputs(request, 100)
