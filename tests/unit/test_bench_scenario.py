"""The scenario of `bench overload`: its rule holds in the model that it is stated in."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest

from kunserve.bench.client import BenchError
from kunserve.bench.scenario import (
    ClusterFigures,
    Height,
    ModelInstance,
    Scenario,
    ScenarioOptions,
    _model_shapes,
    burst_demand,
    describe_lengths,
    resolve,
    steady_demand,
    steady_state,
)
from kunserve.bench.workload import LengthTable, RandomLengths, RequestShape
from kunserve.policy.cost_model import CostModel

MS = 1e6
COSTS = (100.0, 1000.0, 1.5 * MS, 20.0 * MS, 2.0 * MS, 0.2 * MS)
FIGURES = ClusterFigures(2, whole_tokens=6000, merged_tokens=14000, costs=COSTS)
LENGTHS = RandomLengths(48, 64, 0.5)
OPTIONS = ScenarioOptions(Height(1.0, "merged"))
STEPWISE = CostModel(0.0, 0.0, 0.0, 100.0 * MS)
"""Every step takes a tenth of a second, whatever is in it."""


@functools.cache
def rule(options: ScenarioOptions = OPTIONS, figures: ClusterFigures = FIGURES) -> Scenario:
    return resolve(options, LENGTHS, figures)


@pytest.mark.parametrize(
    ("text", "height", "tokens"),
    [
        ("0.8x-whole", Height(0.8, "whole"), 4800.0),
        ("1.0x-merged", Height(1.0, "merged"), 14000.0),
        ("2x-merged", Height(2.0, "merged"), 28000.0),
    ],
)
def test_a_height(text: str, height: Height, tokens: float):
    assert Height.parse(text) == height
    assert Height.parse(str(height)) == height
    assert height.tokens(FIGURES) == pytest.approx(tokens)


@pytest.mark.parametrize(
    "text", ["", "2", "x-whole", "1x-half", "-1x-whole", "0x-whole", "1.x-whole"]
)
def test_what_is_no_height(text: str):
    with pytest.raises(BenchError, match=r"0\.8x-whole"):
        Height.parse(text)


# ---------------------------------------------------------------- the model


def test_demand_of_one_request_in_the_model():
    demand = ModelInstance(STEPWISE).run([(1.0, RequestShape(10, 3)), (9.0, RequestShape(5, 1))])
    # It arrives at 1 s; the prompt, then a token each step until the third ends it. The second
    # one ends in its first step.
    assert demand == [
        (pytest.approx(1.1), 11),
        (pytest.approx(1.2), 12),
        (pytest.approx(1.3), 0),
        (pytest.approx(9.1), 0),
    ]


def test_the_model_goes_on_from_what_is_under_way():
    model = ModelInstance(STEPWISE, [(RequestShape(10, 4), 2)])
    demand = model.run([(0.05, RequestShape(1, 9))])
    assert demand == [(pytest.approx(0.1), 13), (pytest.approx(0.2), 2)]
    assert model.state == ((RequestShape(1, 9), 1),)


def test_steady_demand_is_littles_law():
    # 10 steps of 0.1 s: each request is there for a second, with 20 + 1 .. 20 + 9 tokens, then 0.
    demand = steady_demand(STEPWISE, [RequestShape(20, 10)], rate=8.0)
    assert demand == pytest.approx(8.0 * sum(20 + done for done in range(1, 10)) * 0.1, rel=0.05)


def test_a_demand_beyond_the_limit_is_infinite():
    shapes = [RequestShape(20, 100)]
    assert steady_demand(STEPWISE, shapes, rate=50.0, limit_tokens=1000.0) == math.inf
    assert burst_demand(STEPWISE, shapes, [(10.0, 50.0)], limit_tokens=1000.0) == math.inf


# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("whole_tokens", "merged_tokens", "share", "height"),
    [
        (3000, 9000, 0.5, Height(1.0, "merged")),
        (6000, 7500, 0.3, Height(1.1, "whole")),
        (6000, 12000, 0.7, Height(1.6, "merged")),
    ],
)
def test_the_rates_give_the_demands_of_the_rule(
    whole_tokens: int, merged_tokens: int, share: float, height: Height
):
    figures = ClusterFigures(2, whole_tokens, merged_tokens, COSTS)
    found = rule(replace(OPTIONS, height=height, steady_share=share), figures)
    cost, shapes = CostModel(*COSTS), _model_shapes(LENGTHS)
    steady = 2 * steady_demand(cost, shapes, found.steady_rate / 2)
    assert steady == pytest.approx(share * whole_tokens, rel=0.05)
    ramp_tokens = sum(shape.prompt_tokens for shape in found.ramp)
    assert ramp_tokens == pytest.approx(steady, rel=0.35)  # one moment of what is a mean
    state = steady_state(cost, shapes, found.steady_rate / 2)
    phases = [
        (OPTIONS.burst_s, found.burst_rate / 2),
        (OPTIONS.after_s, found.steady_rate / 2),
    ]
    burst = 2 * burst_demand(cost, shapes, phases, state)
    assert burst == pytest.approx(height.tokens(figures), rel=0.03)


def test_higher_bursts_have_higher_rates():
    heights = [Height.parse(text) for text in ("0.8x-whole", "1.0x-merged", "2.0x-merged")]
    found = [rule(replace(OPTIONS, height=height)) for height in heights]
    rates = [scenario.burst_rate for scenario in found]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]
    assert len({scenario.steady_rate for scenario in found}) == 1


def test_a_burst_below_the_steady_demand_is_refused():
    with pytest.raises(BenchError, match="--height"):
        rule(replace(OPTIONS, height=Height(0.4, "whole")))


def test_given_rates_are_taken_as_they_are():
    found = resolve(OPTIONS, LENGTHS, FIGURES, rates=(2.0, 9.0))
    assert (found.steady_rate, found.burst_rate) == (2.0, 9.0)
    assert found.ramp


@pytest.mark.parametrize(
    "broken",
    [{"burst_s": 0.0}, {"after_s": math.inf}, {"steady_share": 0.0}, {"steady_share": 1.0}],
)
def test_numbers_out_of_range(broken: dict[str, float]):
    with pytest.raises(BenchError):
        replace(OPTIONS, **broken)


# ---------------------------------------------------------------- arrivals


def test_one_seed_gives_one_workload():
    scenario = rule()
    assert scenario.arrivals(LENGTHS, 7) == scenario.arrivals(LENGTHS, 7)
    assert scenario.arrivals(LENGTHS, 7) != scenario.arrivals(LENGTHS, 8)


def test_the_same_rule_gives_the_same_scenario():
    assert resolve(OPTIONS, LENGTHS, FIGURES) == rule()


def test_arrivals_follow_the_rates():
    scenario = rule()
    counts = dict.fromkeys(("before", "burst", "after"), 0)
    for seed in range(20):
        arrivals = scenario.arrivals(LENGTHS, seed)
        for index, request in enumerate(arrivals.workload.requests):
            if index not in arrivals.ramp:
                counts[scenario.phase_of(request.arrival_ns / 1e9)] += 1
    expected = {
        "before": 20 * 20 * scenario.steady_rate,
        "burst": 20 * 20 * scenario.burst_rate,
        "after": 20 * 30 * scenario.steady_rate,
    }
    for phase, count in counts.items():
        assert abs(count - expected[phase]) < 5 * math.sqrt(expected[phase]), phase


def test_the_ramp_is_what_is_under_way_and_comes_first():
    scenario = rule()
    arrivals = scenario.arrivals(LENGTHS, 0)
    ramp = [arrivals.workload.requests[index] for index in arrivals.ramp]
    shapes = sorted((r.prompt_tokens, r.output_tokens) for r in ramp)
    assert shapes == sorted((shape.prompt_tokens, shape.output_tokens) for shape in scenario.ramp)
    assert all(request.arrival_ns <= scenario.ramp_s * 1e9 for request in ramp)
    times = [request.arrival_ns for request in arrivals.workload.requests]
    assert times == sorted(times)
    assert min(shape.output_tokens for shape in scenario.ramp) >= 1


def test_two_bursts():
    scenario = rule(replace(OPTIONS, num_bursts=2, gap_s=40.0))
    assert scenario.bursts_s == ((20.0, 40.0), (80.0, 100.0))
    assert scenario.end_s == 130.0
    phases = [scenario.phase_of(at_s) for at_s in (0.0, 19.9, 20.0, 40.0, 79.0, 85.0, 100.0)]
    assert phases == ["before", "before", "burst", "after", "after", "burst", "after"]


def test_recorded_lengths():
    table = LengthTable((RequestShape(10, 20), RequestShape(30, 60)), 0)
    scenario = resolve(OPTIONS, table, FIGURES)
    arrivals = scenario.arrivals(table, 0)
    shapes = {
        (request.prompt_tokens, request.output_tokens)
        for index, request in enumerate(arrivals.workload.requests)
        if index not in arrivals.ramp
    }
    assert shapes == {(10, 20), (30, 60)}
    assert describe_lengths(table) == "2 recorded lengths, mean 20 in / 40 out"
