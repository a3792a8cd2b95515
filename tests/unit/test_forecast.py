"""The fluid of a group's near future: waits by cause, memory over time, pace of pipelines."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve.policy.cost_model import ChunkShape, CostModel
from kunserve.policy.forecast import (
    Expected,
    Pace,
    Plant,
    Slos,
    expected_arrivals,
    project,
)

SECOND_NS = 1_000_000_000
COST = CostModel(0.0, 1e3, beta_ns=1e6, gamma_ns=20e6, head_gamma_ns=2e6, sharpness=2.0)
WHOLE = Pace(1, COST, 1.0, 100_000_000, None)
PLANT = Plant(1000.0, 8.0, 256, WHOLE)


def test_nothing_waits_where_there_is_room():
    forecast = project(PLANT, [Expected(100.0, 50.0)] * 3, [], 10 * SECOND_NS)
    assert forecast.waits.total_ns == 0.0
    assert forecast.finished == 3
    assert 3 * 108.0 <= forecast.peak_tokens <= 3 * 158.0


def test_a_queue_waits_for_memory_until_somebody_ends():
    running = [Expected(440.0, 40.0), Expected(440.0, 80.0)]
    forecast = project(PLANT, running, [Expected(100.0, 10.0)], 10 * SECOND_NS)
    until_one_ends_ns = 40 * WHOLE.decode_ns(2, 460.0)
    assert forecast.waits.memory_ns == pytest.approx(until_one_ends_ns, rel=0.2)
    assert forecast.waits.compute_ns < forecast.waits.memory_ns / 3


def test_a_queue_with_room_waits_for_computing_alone():
    roomy = replace(PLANT, capacity_tokens=1e6)
    forecast = project(roomy, [], [Expected(2000.0, 2.0)] * 5, 20 * SECOND_NS)
    assert forecast.waits.memory_ns == 0.0
    assert forecast.waits.compute_ns > 5 * SECOND_NS


def test_growth_that_does_not_fit_sends_the_latest_back_to_the_queue():
    running = [Expected(300.0, 400.0), Expected(300.0, 400.0), Expected(300.0, 400.0)]
    forecast = project(PLANT, running, [], 20 * SECOND_NS)
    assert forecast.waits.memory_ns > 0.0
    assert forecast.waits.requests == 0  # their clients have had the first token


def test_waits_of_those_who_are_here_are_told_apart():
    running = [Expected(900.0, 100.0)]
    here = [Expected(100.0, 10.0)]
    coming = expected_arrivals(2.0, 100.0, 10.0, 10 * SECOND_NS)
    forecast = project(PLANT, running, [*here, *coming], 10 * SECOND_NS)
    assert 0.0 < forecast.present_ns < forecast.waits.total_ns


def test_slos_count_who_keeps_them():
    running = [Expected(900.0, 100.0)]
    queue = [Expected(100.0, 10.0)]
    assert project(PLANT, running, queue, 10 * SECOND_NS).waits.attained == 1
    late = project(PLANT, running, queue, 10 * SECOND_NS, Slos(ttft_ns=SECOND_NS // 2))
    assert late.waits.attained == 0
    slow = project(PLANT, running, queue, 10 * SECOND_NS, Slos(tpot_ns=1_000_000))
    assert slow.waits.attained == 0


def test_arrivals_come_evenly():
    given_ns = [request.arrival_ns for request in expected_arrivals(4.0, 1.0, 1.0, SECOND_NS)]
    assert given_ns == [SECOND_NS / 4 * n for n in range(1, 5)]
    assert expected_arrivals(0.0, 1.0, 1.0, SECOND_NS) == ()


def test_a_balanced_ring_without_loss_computes_as_two_wholes_do():
    stage = COST.for_stage(15, 30, is_leader=True)
    ring = Pace(2, stage, 1.0, 100_000_000, None)
    steps = [ChunkShape(200, 1, True)] * 8
    assert ring.decode_ns(16, 200.0) == pytest.approx(2 * stage.step_ns(steps))
    assert WHOLE.decode_ns(8, 200.0) == pytest.approx(COST.step_ns(steps))
    lossy = replace(ring, efficiency=0.5)
    assert lossy.decode_ns(16, 200.0) == pytest.approx(2 * ring.decode_ns(16, 200.0))


def test_prompts_get_as_much_of_a_step_as_decodes():
    round_ns, tokens = WHOLE.mixed(64, 200.0)
    assert tokens > 0
    assert round_ns <= 2.01 * WHOLE.decode_ns(64, 200.0)
    assert replace(WHOLE, max_tokens=128).mixed(64, 200.0)[1] == 64


REQUESTS = st.lists(
    st.builds(
        Expected,
        st.floats(1.0, 400.0),
        st.floats(1.0, 300.0),
        st.floats(0.0, 4.5e9),
        st.just(False),
    ),
    max_size=20,
)


@settings(max_examples=30)
@given(running=REQUESTS, queued=REQUESTS)
def test_more_memory_never_makes_anybody_wait_longer_for_it(
    running: list[Expected], queued: list[Expected]
):
    queue = sorted(queued, key=lambda request: request.arrival_ns)
    tight = project(PLANT, running[:3], queue, 5 * SECOND_NS)
    endless = project(replace(PLANT, capacity_tokens=1e9), running[:3], queue, 5 * SECOND_NS)
    assert endless.waits.memory_ns == 0.0
    assert tight.waits.requests == endless.waits.requests == len(queue)
    assert tight.waits.attained <= len(queue)
