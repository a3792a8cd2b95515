"""What a member does for migrations, by example. The simulator covers the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kunserve.core.actions import CancelPulls, PageCopy, Pull, SendFront
from kunserve.core.ids import BlockId, InstanceId, MigrationId, RequestId
from kunserve.core.migration import (
    ActivateRequest,
    BlocksOffered,
    BlocksPulled,
    EndMigration,
    MigrationEnded,
    MigrationRefused,
    OfferBlocks,
    PullBlocks,
    RequestsWithdrawn,
    SourceBlocks,
    SourcePage,
    StopRequest,
    WithdrawRequests,
)
from kunserve.core.request import Request, SamplingParams
from kunserve.core.transition import PeerAddress, Peers, Prepare, Prepared
from kunserve.policy.member import Member
from kunserve.policy.migrator import block_runs
from kunserve.policy.mover import MOST_ATTEMPTS
from tests.unit.test_member import (
    EPOCH,
    GROUP,
    ONE,
    OWN,
    A,
    T,
    done,
    leading,
    lease,
    report_of,
    said,
    work_of,
)

ZERO, M = InstanceId(0), MigrationId(6)
OFFER = OfferBlocks(ONE, M, GROUP, EPOCH, A, first=0)
STOP = StopRequest(ONE, M, GROUP, EPOCH, first=1)
STAY = EndMigration(ONE, M, GROUP, EPOCH, has_moved=False)
MOVED = replace(STAY, has_moved=True)
PAGE = SourcePage(0, physical_pages=(70, 71, 72, 73))
PULL = PullBlocks(ONE, M, GROUP, EPOCH, ZERO, 3, SourceBlocks(0, (BlockId(0), BlockId(1)), (PAGE,)))


def decoding() -> tuple[Member, Any]:
    """A member with a request of 6 tokens, which is in its second step."""
    member = leading()
    member.take(lease(A, (1, 2, 3, 4, 5)), 0)
    member.computed(done(work_of(member.turn(0))), 0)
    return member, work_of(member.turn(0))


def answer(member: Member, *orders: Any) -> list[Any]:
    for order in orders:
        member.take(order, 0)
    kinds = (BlocksOffered, BlocksPulled, MigrationRefused, MigrationEnded, RequestsWithdrawn)
    return [message for message in said(member.turn(0)) if isinstance(message, kinds)]


# ---------------------------------------------------------------- the source


def test_full_blocks_are_offered_with_where_they_lie() -> None:
    member, _ = decoding()
    (offered,) = answer(member, OFFER)
    first_block = BlockId(OWN * 2)
    pages = tuple(member._memory.physical_page(layer, OWN) for layer in range(4))
    assert offered == BlocksOffered(
        ONE, 3, M, 5, SourceBlocks(0, (first_block,), (SourcePage(OWN, pages),))
    )
    (again,) = answer(member, replace(OFFER, first=1))
    assert again.blocks == SourceBlocks(1, (), ())


def test_who_stops_has_said_its_tokens_before() -> None:
    member, work = decoding()
    answer(member, OFFER)
    assert answer(member, STOP) == []  # it is in a step
    member.computed(done(work), 0)
    actions = member.turn(0)
    messages = said(actions)
    (stopped,) = [m for m in messages if isinstance(m, BlocksOffered)]
    assert (stopped.is_stopped, stopped.computed_tokens, stopped.blocks.first) == (True, 6, 1)
    assert len(stopped.blocks.blocks) == 1
    assert [output.index for output in report_of(actions).outputs] == [1]
    assert messages.index(report_of(actions)) < messages.index(stopped)
    assert member.has_work()
    assert member.is_changing


@pytest.mark.parametrize(("end", "runs"), [(STAY, True), (MOVED, False)])
def test_the_end_says_whether_it_runs_on(end: EndMigration, runs: bool) -> None:
    member, work = decoding()
    answer(member, OFFER, STOP)
    member.computed(done(work), 0)
    member.turn(0)
    member.take(end, 0)
    actions = member.turn(0)
    assert MigrationEnded(ONE, 3, M) in said(actions)
    assert bool([a for a in actions if not isinstance(a, SendFront)]) == runs
    assert member.has_work() == runs
    assert not member.is_changing
    member.check()


def test_who_does_not_run_is_refused() -> None:
    member, _ = decoding()
    (refusal,) = answer(member, replace(OFFER, request_id=RequestId("x")))
    assert isinstance(refusal, MigrationRefused)
    (refusal,) = answer(member, replace(OFFER, epoch=EPOCH + 1))
    assert "does not lead" in refusal.reason
    assert answer(member, replace(STOP, migration=MigrationId(9))) == []


def test_an_end_by_itself_is_said() -> None:
    member, work = decoding()
    answer(member, OFFER)
    for _ in range(3):
        member.computed(done(work), 0)
        actions = member.turn(0)
        if not member.has_work():
            break
        work = work_of(actions)
    assert any(isinstance(message, MigrationRefused) for message in said(actions))
    assert not member.is_changing


def test_a_queue_is_given_back_or_nothing() -> None:
    member = leading()
    order = WithdrawRequests(ONE, GROUP, EPOCH, room_blocks=5)
    assert answer(member, order) == [RequestsWithdrawn(ONE, 3, GROUP, EPOCH, ())]
    other = replace(order, epoch=EPOCH + 1)
    assert answer(member, other) == [RequestsWithdrawn(ONE, 3, GROUP, EPOCH + 1, ())]


# ---------------------------------------------------------------- the target


def pulls(member: Member, *orders: Any) -> list[Pull]:
    for order in orders:
        member.take(order, 0)
    return [action for action in member.turn(0) if isinstance(action, Pull)]


def test_blocks_are_pulled_into_those_set_aside() -> None:
    member = leading()
    (pull,) = pulls(member, PULL)
    here = [member._memory.physical_page(layer, OWN) for layer in range(4)]
    assert pull.peer == ZERO
    assert pull.copies == tuple(PageCopy(here[n], 70 + n, 0, 2) for n in range(4))
    assert member.is_changing
    member.pulled(pull.transfer, None)
    assert answer(member) == [BlocksPulled(ONE, 3, M)]
    request = Request(A, (1, 2, 3, 4, 5), SamplingParams(8, seed=0), 0, (9, 9, 9))
    member.take(ActivateRequest(ONE, M, GROUP, EPOCH, request, computed_tokens=7), 0)
    work = work_of(member.turn(0))
    assert (work.plan.chunks[0].context_len, work.plan.started) == (7, (request,))
    assert not member.is_changing
    member.check()


def test_where_there_is_no_room_nothing_is_set_aside() -> None:
    member = leading()
    (refusal,) = answer(member, replace(PULL, reserved_blocks=17))
    assert "no room" in refusal.reason
    assert not member.is_changing


def test_a_pull_is_tried_again_some_times() -> None:
    member = leading()
    (pull,) = pulls(member, PULL)
    for _ in range(MOST_ATTEMPTS - 1):
        member.pulled(pull.transfer, "the link was lost")
        (again,) = pulls(member)
        assert (again.copies, again.transfer != pull.transfer) == (pull.copies, True)
        pull = again
    member.pulled(pull.transfer, "the link was lost")
    (refusal,) = answer(member)
    assert "the link was lost" in refusal.reason
    assert answer(member, STAY) == [MigrationEnded(ONE, 3, M)]
    assert not member.has_work()


def test_what_is_still_written_stays_set_aside() -> None:
    member = leading()
    (pull,) = pulls(member, PULL)
    member.take(STAY, 0)
    actions = member.turn(0)
    assert CancelPulls() in actions
    assert MigrationEnded(ONE, 3, M) not in said(actions)
    assert member.referenced_blocks == 3
    member.pulled(pull.transfer, "cancelled")
    assert answer(member) == [MigrationEnded(ONE, 3, M)]
    assert member.referenced_blocks == 0
    assert not member.has_work()
    member.check()


def test_a_member_votes_for_another_layout_when_no_migration_touches_it() -> None:
    member = leading()
    member.take(Peers(ONE, (PeerAddress(ZERO, 0, "", "", b""),)), 0)
    (pull,) = pulls(member, PULL)
    member.take(Prepare(ONE, T, (ZERO,)), 0)
    assert not any(isinstance(message, Prepared) for message in said(member.turn(0)))
    member.take(STAY, 0)
    assert not any(isinstance(message, Prepared) for message in said(member.turn(0)))
    member.pulled(pull.transfer, None)
    assert any(isinstance(message, Prepared) for message in said(member.turn(0)))


def test_neighbours_on_both_sides_are_one_run() -> None:
    """Pages of four blocks."""

    def runs(sources: list[int], targets: list[int]) -> list[tuple[int, int, int]]:
        return [*block_runs(tuple(map(BlockId, sources)), tuple(map(BlockId, targets)), 4)]

    assert runs([0, 1, 2, 3], [8, 9, 10, 11]) == [(0, 8, 4)]
    assert runs([0, 1, 2, 3, 4], [9, 10, 11, 12, 13]) == [(0, 9, 3), (3, 12, 1), (4, 13, 1)]
    assert runs([0, 2, 3], [8, 9, 10]) == [(0, 8, 1), (2, 9, 2)]
    assert runs([], []) == []
