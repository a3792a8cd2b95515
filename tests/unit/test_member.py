"""The member by example: what it takes, does and says. The simulator covers the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kunserve.core.actions import (
    Action,
    CancelCompute,
    Compute,
    Computed,
    Configure,
    Connect,
    CopyKv,
    LoadPart,
    RunFirst,
    RunHead,
    RunStage,
    SendFront,
    SendPeer,
)
from kunserve.core.errors import AccountingError
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
from kunserve.core.ids import Epoch, GroupId, InstanceId, RequestId, SlotId, TransitionId
from kunserve.core.layout import Group, LayerRange, Stage
from kunserve.core.memory import PageRun
from kunserve.core.request import Request, SamplingParams, TokenOutput
from kunserve.core.step import SampledToken, StepPlan, StepResult
from kunserve.core.transition import (
    Abort,
    Aborted,
    Adopt,
    AdoptedRequest,
    Compact,
    Compacted,
    Fence,
    Fenced,
    Home,
    PagesPulled,
    PeerAddress,
    Peers,
    Prepare,
    Prepared,
    Refused,
    Remap,
    Remapped,
    Reset,
    StageInput,
    StageOutput,
)
from kunserve.policy.cost_model import CostModel
from kunserve.policy.member import Member, MemberConfig
from kunserve.policy.memory import MemoryBook
from kunserve.policy.scheduler import SchedulerConfig
from kunserve.sim.instance import BLOCK_BYTES, SimInstanceConfig
from kunserve.sim.memory import PhysicalPages, TableMapper

ZERO, ONE, GROUP, EPOCH = InstanceId(0), InstanceId(1), GroupId(5), Epoch(2)
A, B = RequestId("a"), RequestId("b")
T = TransitionId(4)
CONFIG = SimInstanceConfig(
    SchedulerConfig(block_size=4, max_model_len=32, max_num_batched_tokens=16),
    CostModel(0, 0, 1, 1),
    num_layers=4,
    kv_pages=8,
    blocks_per_page=2,
)
SLOTS = CONFIG.slots(2)
OWN = SLOTS.slot_range(SlotId(1)).start


def make_member() -> Member:
    """Instance 1 of two, with eight pages of two blocks in each of its four layers."""
    mapper = TableMapper(PhysicalPages(CONFIG.memory_plan.num_pages, 2, 4), 4)
    memory = MemoryBook(CONFIG.memory_plan, SLOTS, SlotId(1), mapper, poison=True)
    config = MemberConfig(ONE, 3, 4, CONFIG.scheduler)
    return Member(config, CONFIG.cost_model, memory, lambda: InstanceReady(ONE, 3, 16))


def leading() -> Member:
    member = make_member()
    member.take(FormGroup(ONE, GROUP, EPOCH), 0)
    actions = member.turn(0)
    assert actions[0] == Configure(LayerRange(0, 4))
    assert [type(message) for message in said(actions)] == [GroupReport]
    return member


def said(actions: list[Action]) -> list[Any]:
    return [action.message for action in actions if isinstance(action, SendFront)]


def lease(request_id: RequestId, prompt: tuple[int, ...] = (1, 2, 3), **where: Any) -> LeaseRequest:
    request = Request(request_id, prompt, SamplingParams(max_tokens=4, seed=0), arrival_ns=0)
    group, epoch = where.get("group", GROUP), where.get("epoch", EPOCH)
    return LeaseRequest(ONE, group, epoch, request)


def work_of(actions: list[Action]) -> RunFirst:
    (work,) = [action.work for action in actions if isinstance(action, Compute)]
    assert isinstance(work, RunFirst)
    return work


def report_of(actions: list[Action]) -> GroupReport:
    (report,) = [message for message in said(actions) if isinstance(message, GroupReport)]
    return report


def result_of(plan: StepPlan, *failed: RequestId) -> StepResult:
    tokens = [
        SampledToken(chunk.request_id, chunk.output_index, 7)
        for chunk in plan.chunks
        if chunk.request_id not in failed
    ]
    return StepResult(
        plan.epoch, plan.step, tuple(tokens), failed=tuple((rid, "not finite") for rid in failed)
    )


def done(work: RunFirst, *failed: RequestId) -> Computed:
    return Computed(work, result_of(work.plan, *failed))


# ---------------------------------------------------------------- a whole instance


def test_without_a_group_it_plans_and_reports_nothing() -> None:
    member = make_member()
    member.take(lease(A), 0)
    member.check()
    assert (member.turn(0), member.group, member.leads) == ([], None, False)
    assert not member.has_work()


def test_what_starts_is_said_before_its_first_step_is_computed() -> None:
    member = leading()
    member.take(lease(A), 0)
    actions = member.turn(0, 11, 12)
    assert [type(action) for action in actions] == [SendFront, Compute]
    report = report_of(actions)
    assert (report.instance, report.incarnation) == (ONE, 3)
    assert (report.group, report.epoch, report.step) == (GROUP, EPOCH, 0)
    assert (report.started, report.outputs) == ((A,), ())
    assert report.timing == StepTiming(0, 11, 12)
    assert member.is_computing
    assert member.turn(0) == []
    member.computed(done(work_of(actions)), 0)
    report = report_of(member.turn(0))
    assert (report.started, report.outputs) == ((), (TokenOutput(A, 0, 7),))
    assert (report.step, report.load.leases_seen, report.load.num_running) == (1, 1, 1)


def test_one_piece_of_work_is_under_way_at_a_time() -> None:
    member = leading()
    member.take(lease(A), 0)
    work = work_of(member.turn(0))
    member.take(lease(B), 0)
    assert member.turn(0) == []
    with pytest.raises(AccountingError, match="while a step is under way"):
        member.take(FormGroup(ONE, GroupId(6), EPOCH), 0)
    member.computed(done(work), 0)
    with pytest.raises(AccountingError, match="was not under way"):
        member.computed(done(work), 0)


def test_a_lease_that_comes_during_a_step_is_reported_after_it() -> None:
    member = leading()
    member.take(lease(A), 0)
    work = work_of(member.turn(0))
    member.take(lease(B), 0)
    member.computed(done(work), 0)
    actions = member.turn(0)
    assert [chunk.request_id for chunk in work_of(actions).plan.chunks] == [A, B]
    report = report_of(actions)
    assert (report.started, [output.request_id for output in report.outputs]) == ((B,), [A])


def test_a_refused_lease_is_reported_with_its_kind() -> None:
    member = leading()
    member.take(lease(A, prompt=()), 0)
    report = report_of(member.turn(0))
    message = "the prompt has no tokens; give at least one"
    assert report.refused == ((A, RefusalKind.INVALID, message),)
    assert member.turn(0) == []


def test_a_failed_row_ends_its_request_alone() -> None:
    member = leading()
    member.take(lease(A), 0)
    member.take(lease(B), 0)
    member.computed(done(work_of(member.turn(0)), A), 0)
    member.check()
    actions = member.turn(0)
    assert [chunk.request_id for chunk in work_of(actions).plan.chunks] == [B]
    report = report_of(actions)
    assert report.refused == ((A, RefusalKind.FAILED, "not finite"),)
    assert [output.request_id for output in report.outputs] == [B]


def test_a_revoked_lease_is_forgotten() -> None:
    member = leading()
    member.take(lease(A), 0)
    member.take(RevokeLease(ONE, GROUP, EPOCH, A), 0)
    assert report_of(member.turn(0)).load.leases_seen == 1
    assert not member.has_work()


@pytest.mark.parametrize("where", [{"group": GroupId(4)}, {"epoch": Epoch(1)}])
def test_what_was_meant_for_another_epoch_is_ignored(where: dict[str, Any]) -> None:
    member = leading()
    member.take(lease(A, **where), 0)
    assert not member.has_work()
    member.take(lease(A), 0)
    stale = {"group": GROUP, "epoch": EPOCH, **where}
    member.take(RevokeLease(ONE, stale["group"], stale["epoch"], A), 0)
    assert member.has_work()


def test_other_messages_are_a_defect() -> None:
    with pytest.raises(AccountingError, match="does not take str"):
        leading().take("hello", 0)  # type: ignore[arg-type]


def test_it_is_silent_while_a_step_stands_still() -> None:
    member = leading()
    beats = [member.heartbeat(0), member.heartbeat(0)]
    assert [type(beat) for beat in beats] == [Heartbeat, Heartbeat]
    member.take(lease(A), 0)
    work = work_of(member.turn(0))
    assert [member.heartbeat(n) is not None for n in (0, 1, 1, 2)] == [False, True, False, True]
    member.computed(done(work), 0)
    assert member.heartbeat(2) is not None


# ---------------------------------------------------------------- fences

FENCE = Fence(ONE, T, GROUP, EPOCH)


def test_a_fence_cancels_the_step_and_reports_what_there_is() -> None:
    member = leading()
    member.take(lease(A), 0)
    work = work_of(member.turn(0))
    member.take(FENCE, 0)
    assert member.turn(0) == [CancelCompute()]
    cancelled = StepResult(EPOCH, work.plan.step, (), cancelled=True)
    member.computed(Computed(work, cancelled), 0)
    report, fenced = said(member.turn(0))
    assert isinstance(report, GroupReport)
    assert isinstance(fenced, Fenced)
    assert [(r.request_id, r.computed_tokens) for r in fenced.requests] == [(A, 0)]
    assert member.turn(0) == []


def test_a_step_that_ends_before_it_can_be_cancelled_counts() -> None:
    member = leading()
    member.take(lease(A), 0)
    work = work_of(member.turn(0))
    member.take(FENCE, 0)
    member.turn(0)
    member.computed(done(work), 0)
    report, fenced = said(member.turn(0))
    assert report.outputs == (TokenOutput(A, 0, 7),)
    assert [(r.request_id, r.computed_tokens) for r in fenced.requests] == [(A, 3)]


@pytest.mark.parametrize("is_answered", [True, False])
def test_an_aborted_fence_plans_the_work_again(is_answered: bool) -> None:
    member = leading()
    member.take(lease(A), 0)
    work = work_of(member.turn(0))
    member.take(FENCE, 0)
    cancelled = Computed(work, StepResult(EPOCH, work.plan.step, (), cancelled=True))
    if is_answered:
        member.computed(cancelled, 0)
        member.turn(0)
    member.take(Abort(ONE, T, ()), 0)
    if not is_answered:  # it ends after the fence was taken back
        assert Aborted(ONE, 3, T) in said(member.turn(0))
        member.computed(cancelled, 0)
    again = work_of(member.turn(0))
    assert again.plan.step > work.plan.step
    assert again.plan.chunks == work.plan.chunks
    assert again.plan.started == work.plan.started
    member.check()


def test_a_member_that_never_heard_of_a_transition_is_back_at_once() -> None:
    member = leading()
    member.take(Abort(ONE, T, ()), 0)
    assert Aborted(ONE, 3, T) in said(member.turn(0))
    assert not member.is_changing


def test_an_aborted_compaction_opens_pages_only_with_grow() -> None:
    member = leading()
    homes = (Home((PageRun(OWN, 3),)), Home((PageRun(OWN + 3, 3),)))
    member.take(Compact(ONE, T, GROUP, EPOCH, homes), 0)
    (compacted,) = [m for m in said(member.turn(0)) if isinstance(m, Compacted)]
    assert (compacted.used_pages, compacted.moved_blocks) == ((0, 0), 0)
    address = PeerAddress(ZERO, 0, "", "", b"")
    member.take(Peers(ONE, (address,)), 0)
    keep = (PageRun(OWN, 6),)
    member.take(Prepare(ONE, T, (ZERO,), (), keep), 0)
    actions = member.turn(0)
    assert Connect((address,)) in actions
    (prepared,) = [m for m in said(actions) if isinstance(m, Prepared)]
    assert {(e.range_page, e.count) for e in prepared.extents} == {(OWN, 6)}
    member.take(Abort(ONE, T, (PageRun(OWN, 8),)), 0)
    actions = member.turn(0)
    assert Aborted(ONE, 3, T) in said(actions)
    member.take(lease(A), 0)
    assert report_of(member.turn(0)).load.total_blocks == 12
    member.check()


@pytest.mark.parametrize("reason", ["no link to instances", "it is in no group"])
def test_it_refuses_what_it_cannot_do(reason: str) -> None:
    member = leading() if "link" in reason else make_member()
    member.take(Prepare(ONE, T, (ZERO,) if "link" in reason else ()), 0)
    (refused,) = [m for m in said(member.turn(0)) if isinstance(m, Refused)]
    assert reason in refused.reason


# ---------------------------------------------------------------- a ring of two


def two(leader: InstanceId) -> Group:
    other = ZERO if leader == ONE else ONE
    stages = (Stage(leader, LayerRange(0, 2)), Stage(other, LayerRange(2, 4)))
    return Group(GROUP, Epoch(7), stages)


def remapped(leader: InstanceId) -> Member:
    """A member of a ring that waits for Adopt."""
    member = leading()
    member.take(FENCE, 0)
    member.turn(0)
    fresh = (PageRun(OWN, 8),)
    member.take(Remap(ONE, T, two(leader), (), fresh, 0, ()), 0)
    actions = member.turn(0)
    (answer,) = [m for m in said(actions) if isinstance(m, Remapped)]
    parts = {str(held.part) for held in answer.parts}
    assert parts == (
        {"embedding", "layer 0", "layer 1"} if leader == ONE else {"layer 2", "layer 3"}
    )
    member.check()
    return member


def adopt(requests: tuple[AdoptedRequest, ...] = ()) -> Adopt:
    return Adopt(ONE, T, GROUP, Epoch(7), (), requests, (PageRun(OWN, 8),), (), 16)


def stage_input(step: int, fence: int = -1) -> StageInput:
    return StageInput(ZERO, GROUP, Epoch(7), step, (), (), 0, TransitionId(fence))


def test_a_leader_sends_rows_around_and_runs_the_head() -> None:
    member = remapped(ONE)
    member.take(adopt((AdoptedRequest(lease(A).request, 0, ()),)), 0)
    work = work_of(member.turn(0))
    member.computed(Computed(work, payload="rows"), 0)
    (send,) = [a for a in member.turn(0) if isinstance(a, SendPeer)]
    assert (send.target, send.payload) == (ZERO, "rows")
    assert isinstance(send.message, StageInput)
    assert (send.message.step, send.message.chunks) == (work.plan.step, work.plan.chunks)
    output = StageOutput(ZERO, GROUP, Epoch(7), work.plan.step)
    member.take_peer(output, "last rows", 0)
    (compute,) = [a for a in member.turn(0) if isinstance(a, Compute)]
    assert compute.work == RunHead(work.plan, "last rows")
    member.computed(Computed(compute.work, result_of(work.plan)), 0)
    assert report_of(member.turn(0)).outputs == (TokenOutput(A, 0, 7),)
    member.take_peer(output, "again", 0)  # of a step that is over
    assert not [a.work for a in member.turn(0) if isinstance(a, Compute) and a.work is output]


def test_heads_run_in_the_order_of_their_steps() -> None:
    """A step may release a request that the next one starts again."""
    member = remapped(ONE)
    member.take(adopt((AdoptedRequest(lease(A).request, 0, ()),)), 0)
    first = work_of(member.turn(0))
    member.take(lease(B, group=GROUP, epoch=Epoch(7)), 0)
    member.turn(0)
    member.computed(Computed(first, payload="rows"), 0)
    second = work_of(member.turn(0))
    for work in (first, second):  # both come around while the leader computes
        member.take_peer(StageOutput(ZERO, GROUP, Epoch(7), work.plan.step), "last rows", 0)
    member.computed(Computed(second, payload="rows"), 0)
    for work in (first, second):
        (compute,) = [a for a in member.turn(0) if isinstance(a, Compute)]
        assert compute.work == RunHead(work.plan, "last rows")
        member.computed(Computed(compute.work, result_of(work.plan)), 0)


def test_rows_that_come_before_adopt_are_kept() -> None:
    member = remapped(ZERO)
    member.take_peer(stage_input(0), "rows", 0)
    assert not [a for a in member.turn(0) if isinstance(a, Compute)]
    member.take(adopt(), 0)
    (compute,) = [a for a in member.turn(0) if isinstance(a, Compute)]
    assert isinstance(compute.work, RunStage)
    member.computed(Computed(compute.work, payload="last"), 0)
    (send,) = [a for a in member.turn(0) if isinstance(a, SendPeer)]
    assert (send.target, type(send.message), send.payload) == (ZERO, StageOutput, "last")


def test_rows_of_before_a_fence_are_dropped_and_those_of_after_it_are_kept() -> None:
    member = remapped(ZERO)
    member.take(adopt(), 0)
    member.turn(0)
    later = TransitionId(9)
    member.take_peer(stage_input(0), "old", 0)
    old = member.turn(0)
    (compute,) = [a for a in old if isinstance(a, Compute)]
    member.take_peer(stage_input(2, fence=9), "new", 0)  # the leader was told before us
    member.take(Fence(ONE, later, GROUP, Epoch(7)), 0)
    assert CancelCompute() in member.turn(0)
    member.computed(Computed(compute.work), 0)
    member.take_peer(stage_input(1), "late", 0)
    assert not [a for a in member.turn(0) if isinstance(a, Compute | SendPeer)]
    member.take(Abort(ONE, later, ()), 0)
    (compute,) = [a for a in member.turn(0) if isinstance(a, Compute)]
    assert isinstance(compute.work, RunStage)
    assert (compute.work.step, compute.work.payload) == (2, "new")


def test_pages_that_a_receiver_has_before_we_adopt_count_afterwards() -> None:
    member = remapped(ONE)
    member.take_peer(PagesPulled(ZERO, T, (0,), (OWN + 9,)), None, 0)
    order = replace(adopt(), pending=((OWN + 9, 1),))
    member.take(order, 0)
    member.turn(0)
    assert not member._pending_moves


def test_a_reset_makes_it_whole_again() -> None:
    member = remapped(ZERO)
    member.take(Reset(ONE, 2), 0)  # of another incarnation
    assert member.group is not None
    member.take(Reset(ONE, 3), 0)
    heard: list[Any] = []
    for _ in range(6):
        actions = member.turn(0)
        heard += said(actions)
        for action in actions:
            if isinstance(action, LoadPart):
                member.part_ready(action.transfer, None)
    assert heard == [InstanceReady(ONE, 3, 16)]
    member.take(FormGroup(ONE, GroupId(6), Epoch(8)), 0)
    assert not member.is_changing
    assert report_of(member.turn(0)).load.total_blocks == 16
    member.check()


# ---------------------------------------------------------------- host memory


def swapping_member() -> tuple[Member, CopyKv, RunFirst]:
    """B is on its way to host memory while a step computes A."""
    mapper = TableMapper(PhysicalPages(CONFIG.memory_plan.num_pages, 2, 4), 4)
    memory = MemoryBook(CONFIG.memory_plan, SLOTS, SlotId(1), mapper, poison=True)
    scheduler = replace(CONFIG.scheduler, max_model_len=64, host_blocks=16)
    config = MemberConfig(ONE, 3, 4, scheduler)
    member = Member(config, CONFIG.cost_model, memory, lambda: InstanceReady(ONE, 3, 16))
    member.take(FormGroup(ONE, GROUP, EPOCH), 0)
    for name in (A, B):
        params = SamplingParams(max_tokens=40, seed=0)
        request = Request(name, (ord(name), *range(19)), params, arrival_ns=ord(name))
        member.take(LeaseRequest(ONE, GROUP, EPOCH, request), 0)
    while True:
        actions = member.turn(0)
        copies = [action for action in actions if isinstance(action, CopyKv)]
        if copies:
            return member, copies[0], work_of(actions)
        member.computed(sampled(work_of(actions)), 0)


def sampled(work: RunFirst) -> Computed:
    """`done` for plans in which not every chunk samples."""
    tokens = tuple(
        SampledToken(chunk.request_id, chunk.output_index, 7)
        for chunk in work.plan.chunks
        if chunk.samples
    )
    return Computed(work, StepResult(work.plan.epoch, work.plan.step, tokens))


def copies_of(actions: list[Action]) -> list[CopyKv]:
    return [action for action in actions if isinstance(action, CopyKv)]


def test_a_copy_runs_beside_a_step_and_is_reported_when_it_has_ended() -> None:
    member, order, work = swapping_member()
    assert (order.to_host, [c.request_id for c in work.plan.chunks]) == (True, [A])
    member.copied(order.transfer, 0)
    with pytest.raises(AccountingError, match="none was under way"):
        member.copied(order.transfer, 0)
    member.computed(sampled(work), 0)
    load = report_of(member.turn(0)).load
    assert (load.num_running, load.num_waiting, load.swapped_out) == (1, 1, 1)
    assert load.swap_bytes == len(order.blocks) * 4 * BLOCK_BYTES
    member.check()


@pytest.mark.parametrize("copy_ends_first", [True, False])
def test_a_fence_is_answered_when_no_copy_is_under_way(copy_ends_first: bool) -> None:
    member, order, work = swapping_member()
    member.take(FENCE, 0)
    member.turn(0)
    cancelled = Computed(work, StepResult(EPOCH, work.plan.step, (), cancelled=True))
    ends = [lambda: member.computed(cancelled, 0), lambda: member.copied(order.transfer, 0)]
    first, second = reversed(ends) if copy_ends_first else ends
    first()
    assert not [m for m in said(member.turn(0)) if isinstance(m, Fenced)]
    second()
    (fenced,) = [m for m in said(member.turn(0)) if isinstance(m, Fenced)]
    a, b = fenced.requests
    assert a.computed_tokens > 20
    assert (b.computed_tokens, b.block_table) == (0, ())
    member.check()


def test_after_a_fence_was_taken_back_no_copy_begins_beside_the_cancelled_step() -> None:
    """It may still write to blocks that somebody else has by now."""
    member, order, work = swapping_member()
    member.take(FENCE, 0)
    member.take(Abort(ONE, T, ()), 0)
    member.take(RevokeLease(ONE, GROUP, EPOCH, A), 0)  # so that B may come back at once
    member.copied(order.transfer, 0)
    actions = member.turn(0)
    assert Aborted(ONE, 3, T) in said(actions)
    assert not copies_of(actions)
    member.computed(Computed(work, StepResult(EPOCH, work.plan.step, (), cancelled=True)), 0)
    (back,) = copies_of(member.turn(0))
    assert not back.to_host
    member.copied(back.transfer, 0)
    (chunk,) = work_of(member.turn(0)).plan.chunks
    assert (chunk.request_id, -(-chunk.context_len // 4)) == (B, len(order.blocks))
    member.check()


def test_a_reset_waits_for_copies() -> None:
    member, order, work = swapping_member()
    member.take(Reset(ONE, 3), 0)
    member.computed(Computed(work, StepResult(EPOCH, work.plan.step, (), cancelled=True)), 0)
    assert not said(member.turn(0))
    member.copied(order.transfer, 0)
    assert said(member.turn(0)) == [InstanceReady(ONE, 3, 16)]
    member.take(FormGroup(ONE, GroupId(6), Epoch(8)), 0)
    assert report_of(member.turn(0)).load.swapped_out == 0
    member.check()


def test_a_ring_does_not_swap() -> None:
    member, order, work = swapping_member()
    member.take(FENCE, 0)
    member.computed(sampled(work), 0)
    member.copied(order.transfer, 0)
    member.turn(0)
    member.take(Remap(ONE, T, two(ONE), (), (PageRun(OWN, 8),), 0, ()), 0)
    member.take(adopt(tuple(AdoptedRequest(lease(r).request, 0, ()) for r in (A, B))), 0)
    member.turn(0)
    member.take(RevokeLease(ONE, GROUP, Epoch(7), A), 0)
    assert not copies_of(member.turn(0))
    member.check()
