"""The member by example: what it takes, plans and says. The simulator covers the rest."""

from __future__ import annotations

from typing import Any

import pytest

from kunserve.core.errors import AccountingError
from kunserve.core.events import (
    FormGroup,
    Heartbeat,
    LeaseRequest,
    RefusalKind,
    RevokeLease,
    StepTiming,
)
from kunserve.core.ids import Epoch, GroupId, InstanceId, RequestId, SlotId
from kunserve.core.request import Request, SamplingParams, TokenOutput
from kunserve.core.step import SampledToken, StepPlan, StepResult
from kunserve.policy.blocks import BlockPool
from kunserve.policy.cost_model import CostModel
from kunserve.policy.member import Member
from kunserve.policy.scheduler import Scheduler, SchedulerConfig

ONE, GROUP, EPOCH = InstanceId(1), GroupId(5), Epoch(2)
A, B = RequestId("a"), RequestId("b")


def make_member() -> Member:
    def make_scheduler(epoch: Epoch) -> Scheduler:
        config = SchedulerConfig(block_size=4, max_model_len=32, max_num_batched_tokens=16)
        return Scheduler(config, BlockPool(16, 1, {SlotId(0): 16}), CostModel(0, 0, 1, 1), epoch)

    return Member(ONE, 3, make_scheduler)


def leading() -> Member:
    member = make_member()
    member.take(FormGroup(ONE, GROUP, EPOCH))
    assert member.take_report() is not None
    return member


def lease(request_id: RequestId, prompt: tuple[int, ...] = (1, 2, 3), **where: Any) -> LeaseRequest:
    request = Request(request_id, prompt, SamplingParams(max_tokens=4, seed=0), arrival_ns=0)
    group, epoch = where.get("group", GROUP), where.get("epoch", EPOCH)
    return LeaseRequest(ONE, group, epoch, request)


def plan_of(member: Member) -> StepPlan:
    plan = member.next_plan(0)
    assert plan is not None
    return plan


def result_of(plan: StepPlan, *failed: RequestId) -> StepResult:
    tokens = [
        SampledToken(chunk.request_id, chunk.output_index, 7)
        for chunk in plan.chunks
        if chunk.request_id not in failed
    ]
    return StepResult(
        plan.epoch, plan.step, tuple(tokens), failed=tuple((rid, "not finite") for rid in failed)
    )


def test_without_a_group_it_plans_and_reports_nothing() -> None:
    member = make_member()
    member.take(lease(A))
    member.check()
    assert (member.next_plan(0), member.take_report(), member.group) == (None, None, None)
    assert not member.has_work()


def test_what_starts_is_said_before_its_first_step_is_computed() -> None:
    member = leading()
    member.take(lease(A))
    plan = plan_of(member)
    assert member.is_computing
    report = member.take_report(execute_ns=11, schedule_ns=12)
    assert report is not None
    assert (report.instance, report.incarnation) == (ONE, 3)
    assert (report.group, report.epoch, report.step) == (GROUP, EPOCH, 0)
    assert (report.started, report.outputs) == ((A,), ())
    assert report.timing == StepTiming(0, 11, 12)
    assert member.take_report() is None
    member.finish_step(result_of(plan), 0)
    plan_of(member)
    report = member.take_report()
    assert report is not None
    assert (report.started, report.outputs) == ((), (TokenOutput(A, 0, 7),))
    assert (report.step, report.load.leases_seen, report.load.num_running) == (1, 1, 1)


def test_one_plan_is_under_way_at_a_time() -> None:
    member = leading()
    member.take(lease(A))
    plan = plan_of(member)
    member.take(lease(B))
    assert member.next_plan(0) is None
    with pytest.raises(AccountingError, match="while a step is under way"):
        member.take(FormGroup(ONE, GroupId(6), EPOCH))
    member.finish_step(result_of(plan), 0)
    with pytest.raises(AccountingError, match="none is under way"):
        member.finish_step(result_of(plan), 0)


def test_a_lease_that_comes_during_a_step_is_reported_after_it() -> None:
    member = leading()
    member.take(lease(A))
    plan = plan_of(member)
    assert member.take_report() is not None
    member.take(lease(B))
    assert member.take_report() is None
    member.finish_step(result_of(plan), 0)
    assert [chunk.request_id for chunk in plan_of(member).chunks] == [A, B]
    report = member.take_report()
    assert report is not None
    assert (report.started, [output.request_id for output in report.outputs]) == ((B,), [A])


def test_a_refused_lease_is_reported_with_its_kind() -> None:
    member = leading()
    member.take(lease(A, prompt=()))
    assert member.next_plan(0) is None
    report = member.take_report()
    assert report is not None
    message = "the prompt has no tokens; give at least one"
    assert report.refused == ((A, RefusalKind.INVALID, message),)
    assert member.take_report() is None


def test_a_failed_row_ends_its_request_alone() -> None:
    member = leading()
    member.take(lease(A))
    member.take(lease(B))
    member.finish_step(result_of(plan_of(member), A), 0)
    member.check()
    assert [chunk.request_id for chunk in plan_of(member).chunks] == [B]
    report = member.take_report()
    assert report is not None
    assert report.refused == ((A, RefusalKind.FAILED, "not finite"),)
    assert [output.request_id for output in report.outputs] == [B]


def test_a_revoked_lease_is_forgotten() -> None:
    member = leading()
    member.take(lease(A))
    member.take(RevokeLease(ONE, GROUP, EPOCH, A))
    assert member.next_plan(0) is None
    assert not member.has_work()
    assert member.take_report() is not None


@pytest.mark.parametrize("where", [{"group": GroupId(4)}, {"epoch": Epoch(1)}])
def test_what_was_meant_for_another_epoch_is_ignored(where: dict[str, Any]) -> None:
    member = leading()
    member.take(lease(A, **where))
    assert not member.has_work()
    member.take(lease(A))
    stale = {"group": GROUP, "epoch": EPOCH, **where}
    member.take(RevokeLease(ONE, stale["group"], stale["epoch"], A))
    assert member.has_work()


def test_other_messages_are_a_defect() -> None:
    with pytest.raises(AccountingError, match="does not take str"):
        leading().take("hello")  # type: ignore[arg-type]


def test_it_is_silent_while_a_step_stands_still() -> None:
    member = leading()
    beat = Heartbeat(ONE, 3)
    assert [member.heartbeat(0), member.heartbeat(0)] == [beat, beat]
    member.take(lease(A))
    plan = plan_of(member)
    assert [member.heartbeat(n) for n in (0, 1, 1, 2)] == [None, beat, None, beat]
    member.finish_step(result_of(plan), 0)
    assert member.heartbeat(2) == beat
