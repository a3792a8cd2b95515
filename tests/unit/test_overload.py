"""The overload monitor: demand, trends, arrivals, lengths, and a signal that does not flap."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kunserve.core.decision import Decision, Realised, Shortage, Verdict, Waits
from kunserve.core.ids import InstanceId
from kunserve.policy.overload import (
    SHORTAGE_ENDS_NS,
    SHORTAGE_LASTS_NS,
    Arrivals,
    DemandMonitor,
    OutputLengths,
    ShortageSignal,
)
from kunserve.runtime.decision_log import describe_note

MS = 1_000_000
SECOND_NS = 1_000 * MS


def test_demand_above_capacity_is_overload():
    pressure = DemandMonitor().observe(101, 100, 0)
    assert pressure.is_reached
    assert pressure.is_imminent
    assert not DemandMonitor().observe(100, 100, 0).is_reached


def test_a_steady_rise_is_overload_before_it_is_reached():
    monitor = DemandMonitor()
    pressures = [monitor.observe(20 + 4 * n, 100, n * 100 * MS) for n in range(12)]
    assert pressures[-1].slope_blocks_per_s == pytest.approx(40.0)
    assert pressures[-1].is_imminent
    assert not pressures[-1].is_reached


def test_many_at_once_are_no_trend():
    monitor = DemandMonitor()
    for n in range(10):
        monitor.observe(20, 100, n * 100 * MS)
    for n in range(10, 14):
        assert not monitor.observe(60, 100, n * 100 * MS).is_imminent


def test_a_pause_forgets_the_trend():
    monitor = DemandMonitor()
    for n in range(12):
        monitor.observe(20 + 4 * n, 100, n * 100 * MS)
    assert monitor.observe(70, 100, 20 * SECOND_NS).slope_blocks_per_s == 0.0


def test_arrivals_of_the_last_seconds_count():
    arrivals = Arrivals(0)
    for n in range(30):
        arrivals.add(10 + n % 2, 100, 5 * SECOND_NS + n * 100 * MS)
    assert arrivals.per_s(8 * SECOND_NS) == pytest.approx(10.0)
    assert arrivals.per_s(30 * SECOND_NS) == 0.0
    assert arrivals.mean_prompt_tokens == 10.5
    assert arrivals.mean_max_tokens == 100
    assert Arrivals(0).mean_max_tokens == 0


def test_what_is_left_of_an_answer_follows_those_that_ended():
    lengths = OutputLengths()
    assert lengths.remaining(0, 100) == 50.0  # nothing is known
    for _ in range(10):
        lengths.add(40)
    assert lengths.remaining(0, 100) == 40.0
    assert lengths.remaining(30, 100) == 10.0
    assert lengths.remaining(0, 20) == 20.0  # max_tokens bounds it
    assert lengths.remaining(50, 100) == 25.0  # longer than any before


@given(
    ended=st.lists(st.integers(1, 500), max_size=700),
    generated=st.integers(0, 400),
    more=st.integers(1, 400),
)
def test_remaining_is_at_least_one_and_at_most_what_is_allowed(
    ended: list[int], generated: int, more: int
):
    lengths = OutputLengths()
    for length in ended:
        lengths.add(length)
    assert 1.0 <= lengths.remaining(generated, generated + more) <= more


def test_a_shortage_is_signalled_when_it_lasts_and_taken_back_later():
    signal = ShortageSignal()
    lacking = Shortage(30, 2)
    assert signal.observe(lacking, 0) is None
    assert signal.observe(lacking, SHORTAGE_LASTS_NS) == lacking
    assert signal.observe(lacking, SHORTAGE_LASTS_NS + 1) is None
    over_ns = SHORTAGE_LASTS_NS + 2
    assert signal.observe(Shortage(0, 0), over_ns) is None
    assert signal.observe(Shortage(0, 0), over_ns + SHORTAGE_ENDS_NS) == Shortage(0, 0)


def test_a_short_shortage_is_not_signalled():
    signal = ShortageSignal()
    signal.observe(Shortage(30, 2), 0)
    signal.observe(Shortage(0, 0), SHORTAGE_LASTS_NS // 2)
    assert signal.observe(Shortage(30, 2), SHORTAGE_LASTS_NS) is None


def test_a_decision_is_one_line_with_every_term():
    decision = Decision(
        number=3,
        kind="drop",
        verdict=Verdict.ACT,
        groups=((InstanceId(0),), (InstanceId(1), InstanceId(2))),
        demand_blocks=252,
        capacity_blocks=246,
        is_reached=True,
        new_capacity_blocks=631,
        running=40,
        queued=6,
        arrivals_per_s=8.04,
        freed_blocks_per_s=25.1,
        stay=Waits(58e9, 3.2e9, 86, 20),
        change=Waits(0.0, 9.8e9, 86, 80),
        stall_ns=4e9,
    )
    assert describe_note(decision) == (
        "drop #3 of 0 + 1|2: act; demand 252 of 246 blocks (reached), 631 afterwards; 40 running, "
        "6 queued, 8.0 arrivals/s, 25.1 blocks/s freed; waiting ahead 61.2 s (memory 58.0, compute "
        "3.2; 20 of 86 in time), with it 9.8 s (memory 0.0, compute 9.8; 80 of 86 in time), stalls "
        "4.0 s: saves 47.4 s"
    )


def test_what_came_of_it_is_one_line_too():
    assert "6 requests" in describe_note(Realised(3, 6, 1.5e9, 2 * SECOND_NS))
    assert "fallback recompute; autoscale signal: 2 more" in describe_note(Shortage(30, 2))
    assert describe_note(Shortage(0, 0)) == "memory shortage is over"
