"""The dropping policy on a controller whose members do as told: when, how often, and when not."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve.core.decision import Decision, Verdict
from kunserve.core.events import (
    AnswerWish,
    Command,
    LayoutWished,
    LogTransition,
    NoteDecision,
    PolicySwitched,
    WishKind,
)
from kunserve.core.policy import PolicyName, Trigger
from kunserve.policy.dropping import LEAST_DWELL_NS
from tests.support.fronts import WHOLE_BLOCKS, ObedientFront

DWELL_S = LEAST_DWELL_NS / 1e9


def commits(front: ObedientFront, kind: str) -> list[int]:
    """When transitions of a kind committed."""
    return [
        at
        for at, command in front.commands
        if isinstance(command, LogTransition)
        and command.record.kind == kind
        and command.record.outcome == "commit"
    ]


def decisions(commands: list[Command]) -> list[Decision]:
    notes = [command.note for command in commands if isinstance(command, NoteDecision)]
    return [note for note in notes if isinstance(note, Decision)]


def overload(front: ObedientFront) -> list[Command]:
    """Both groups are full, and many wait for memory."""
    said: list[Command] = []
    for _ in range(20):
        said += front.submit(prompt=8, max_tokens=40)
    for number in range(len(front.controller.groups)):
        said += front.report(number, WHOLE_BLOCKS, 20)
    return said


def sizes(front: ObedientFront) -> list[int]:
    return sorted(len(group.stages) for group in front.controller.layout.groups)


def test_overload_that_is_reached_is_answered_at_once():
    front = ObedientFront()
    (decision,) = decisions(overload(front))
    assert decision.verdict is Verdict.ACT
    assert decision.is_reached
    assert decision.new_capacity_blocks > decision.capacity_blocks
    assert decision.saved_ns > 0
    assert decision.stay.memory_ns > decision.change.memory_ns
    assert sizes(front) == [2]


def test_every_term_of_the_estimate_is_there():
    (decision,) = decisions(overload(ObedientFront()))
    assert decision.demand_blocks > decision.capacity_blocks
    assert decision.queued == decision.arrivals_per_s == decision.demand_blocks / 2
    assert decision.stay.requests >= decision.queued


def test_a_full_cache_without_a_queue_is_no_overload():
    front = ObedientFront()
    assert decisions(front.report(0, WHOLE_BLOCKS, 0)) == []
    assert sizes(front) == [1, 1]


def test_observe_says_what_it_would_do_and_does_not():
    front = ObedientFront(policy=PolicyName.OBSERVE)
    (decision,) = decisions(overload(front))
    assert decision.verdict is Verdict.WOULD_ACT
    assert sizes(front) == [1, 1]


def test_the_kill_switch_holds_until_it_is_turned_back():
    front = ObedientFront()
    (answer,) = front.handle(PolicySwitched(7, may_drop=False))
    assert answer == AnswerWish(7, True, "the policy may not drop parameters")
    assert not front.controller.may_drop
    overload(front)
    assert sizes(front) == [1, 1]
    front.handle(PolicySwitched(8, may_drop=True))
    front.now_ns += 1_000_000_000
    overload(front)
    assert sizes(front) == [2]


def test_no_drop_is_the_same_from_the_start():
    front = ObedientFront(may_drop=False)
    overload(front)
    assert sizes(front) == [1, 1]


def test_an_idle_group_is_restored_after_the_dwell():
    front = ObedientFront()
    overload(front)
    for request in tuple(front.controller._requests):  # all clients go away
        front.controller._forget(request)
    front.report(0, 0, 0)
    front.tick(DWELL_S / 2)
    assert sizes(front) == [2]
    front.tick(2 * DWELL_S)  # the burst is forgotten by then, too
    assert sizes(front) == [1, 1]


def test_what_does_not_fit_whole_instances_stays_merged():
    front = ObedientFront()
    overload(front)  # 20 requests of 8 tokens are 40 blocks, whole instances have 32
    front.report(0, 30, 0)
    for _ in range(40):
        front.tick()
    assert sizes(front) == [2]


def test_an_operators_layout_is_left_alone_until_the_operator_restores():
    front = ObedientFront()
    front.handle(LayoutWished(0, WishKind.DROP))
    for _ in range(40):
        front.tick()
    assert sizes(front) == [2]
    front.handle(LayoutWished(1, WishKind.RESTORE))
    assert sizes(front) == [1, 1]
    front.now_ns += 5_000_000_000
    overload(front)
    assert sizes(front) == [2]


def test_the_papers_trigger_acts_on_demand_alone():
    front = ObedientFront(trigger=Trigger.MEMORY_ONLY)
    (decision,) = decisions(front.report(0, WHOLE_BLOCKS, 1))
    assert decision.verdict is Verdict.ACT
    assert sizes(front) == [2]


def test_with_slos_the_gain_is_attainment():
    hopeless = ObedientFront(slo_ttft_ns=1)
    assert {d.verdict for d in decisions(overload(hopeless))} == {Verdict.NO_GAIN}
    front = ObedientFront(slo_ttft_ns=3_000_000_000)
    (decision,) = decisions(overload(front))
    assert decision.change.attained > decision.stay.attained
    assert decision.verdict is Verdict.ACT


def test_static_pipelines_are_paired_once():
    front = ObedientFront(5, policy=PolicyName.STATIC_PP)
    for _ in range(20):
        front.tick()
    assert sizes(front) == [1, 2, 2]
    assert len(commits(front, "merge")) == 2


ADVERSARY = st.lists(
    st.tuples(
        st.integers(1, 700),  # ms until the next report
        st.integers(0, 3),  # whose
        st.integers(0, 60),  # blocks in use
        st.sampled_from([0, 0, 1, 200]),  # blocks that wait
    ),
    min_size=20,
    max_size=50,
)


@settings(max_examples=25)
@given(moves=ADVERSARY, instances=st.integers(2, 3), trigger=st.sampled_from(Trigger))
def test_no_input_makes_the_layout_change_more_often_than_the_bound(
    moves: list[tuple[int, int, int, int]], instances: int, trigger: Trigger
):
    """At most 1 + W / LEAST_DWELL_NS drops in any window of W ns, and as many restores. A wish may
    make a transition of each group."""
    front = ObedientFront(instances, trigger=trigger)
    for milliseconds, number, used, queued in moves:
        front.now_ns += milliseconds * 1_000_000
        front.report(number, used, queued)
        if queued > 1:
            front.submit()
        front.tick(0.001)
    for kind in ("merge", "split"):
        times = sorted(set(commits(front, kind)))
        for index, begin in enumerate(times):
            for count, end in enumerate(times[index:], start=1):
                assert count <= 1 + (end - begin) / LEAST_DWELL_NS
