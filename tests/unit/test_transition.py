"""The protocol table: every row by its law, illegal signals, and the record."""

from __future__ import annotations

import pytest

from kunserve.core.errors import AccountingError
from kunserve.core.ids import TransitionId
from kunserve.core.layout import Epoch, GroupId, InstanceId, whole_instance
from kunserve.core.transition import PhaseTime
from kunserve.policy.planner import TransitionKind
from kunserve.policy.transition import (
    BEFORE_COMMIT,
    OVER,
    TABLE,
    Signal,
    State,
    Transition,
    as_mermaid,
    next_state,
)

AFTER_COMMIT = (State.REMAP, State.ADOPT, State.MOVE, State.FINISH)


def make_transition(kind: TransitionKind = TransitionKind.MERGE) -> Transition:
    sources = tuple(whole_instance(GroupId(i), Epoch(i), InstanceId(1 - i), 4) for i in range(2))
    return Transition(TransitionId(3), kind, "test", sources, (), {}, begun_ns=100)


def test_no_state_and_signal_have_two_rows() -> None:
    assert len({(row.state, row.signal) for row in TABLE}) == len(TABLE)


def test_a_merge_and_a_split_run_through_their_states() -> None:
    ways = {
        Signal.MERGE: [State.PREPARE, State.FENCE],
        Signal.SPLIT: [State.COMPACT, State.PREPARE, State.SNAPSHOT, State.GATHER, State.FENCE],
    }
    ready = {Signal.MERGE: Signal.MERGE_READY, Signal.SPLIT: Signal.SPLIT_READY}
    for first, states in ways.items():
        state, seen = next_state(State.START, first), []
        while state not in OVER:
            seen.append(state)
            signal = ready[first] if state is State.PREPARE else Signal.ANSWERED
            state = next_state(state, signal)
        assert seen == [*states, *AFTER_COMMIT]
        assert state is State.DONE


@pytest.mark.parametrize("state", sorted(BEFORE_COMMIT - {State.START}, key=lambda s: s.value))
def test_before_commit_whatever_goes_wrong_aborts(state: State) -> None:
    for signal in (Signal.REFUSED, Signal.DEADLINE, Signal.DEATH, Signal.NEW_WISH):
        assert next_state(state, signal) is State.ABORTED


@pytest.mark.parametrize("state", AFTER_COMMIT)
def test_after_commit_there_is_only_forward(state: State) -> None:
    assert next_state(state, Signal.DEATH) is State.BROKEN
    assert next_state(state, Signal.DEADLINE) is state
    for signal in (Signal.REFUSED, Signal.NEW_WISH):
        with pytest.raises(AccountingError, match=f"{state.value} cannot take"):
            next_state(state, signal)


@pytest.mark.parametrize("state", sorted(OVER, key=lambda s: s.value))
def test_nothing_leads_out_of_an_end(state: State) -> None:
    for signal in Signal:
        with pytest.raises(AccountingError):
            next_state(state, signal)


def test_every_state_can_be_reached() -> None:
    assert {row.then for row in TABLE} == set(State) - {State.START}


def test_a_transition_books_the_time_of_each_state() -> None:
    transition = make_transition()
    assert transition.members == (0, 1)
    transition.advance(Signal.MERGE, 110)
    transition.advance(Signal.MERGE_READY, 150)
    assert transition.can_turn_back
    transition.advance(Signal.ANSWERED, 170)
    assert not transition.can_turn_back
    with pytest.raises(AccountingError):
        transition.advance(Signal.NEW_WISH, 180)
    transition.advance(Signal.DEADLINE, 190)  # stays
    transition.advance(Signal.DEATH, 200)
    assert transition.is_over
    record = transition.record()
    assert record.outcome == "broken"
    assert record.phases == (
        PhaseTime("prepare", 40),
        PhaseTime("fence", 20),
        PhaseTime("remap", 30),
    )


def test_the_diagram_has_every_row() -> None:
    lines = as_mermaid().splitlines()
    assert lines[0] == "stateDiagram-v2"
    for row in TABLE:
        left = "[*]" if row.state is State.START else row.state.name
        (line,) = [x for x in lines if x.strip().startswith(f"{left} --> {row.then.name}:")]
        assert row.signal.value in line
