"""The scenario of `bench overload`: a rule that turns the memory of a cluster into arrivals.

    KV demand   |              ____ height x capacity
                |            _/    \\__
      50 % of   |___________/         \\______________
      no-drop   |   steady  |burst|   steady          | drain
                +-----------+-----+-------------------+------> s
                0      burst_at  +20             arrivals end

Demand is counted in a cluster with unlimited memory: prompt and generated tokens of every request
that has arrived and has not ended. `ModelInstance` computes it from the costs of a step, so the
rule needs no taste: the steady rate is the one whose mean demand is `steady_share` of what the
whole instances hold; the rate of the burst is the one whose highest demand is the wished height, a
multiple of what the whole instances ("whole") or the merged group ("merged") hold. Answers outlast
the burst and go on growing, so the highest demand comes after it.

Arrivals are Poisson and never clipped. A run does not wait for minutes until it is steady: it
begins with the requests that the model has under way then, as far as they have got (their tokens so
far are part of the prompt), and these count in no figure.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kunserve.bench.client import BenchError
from kunserve.bench.workload import (
    NS_PER_S,
    ArrivalOptions,
    LengthTable,
    RandomLengths,
    RandomStream,
    RateStep,
    RequestShape,
    Workload,
    WorkloadRequest,
    random_shapes,
    sample_shapes,
    stream_rng,
    synthetic_workload,
)
from kunserve.policy.cost_model import ChunkShape, CostModel

MODEL_SHAPES = 256
"""Lengths that the model draws; it goes through them again and again."""
MODEL_ARRIVALS = 160
"""Arrivals at one modelled instance; the second half of their time counts as steady."""
DRAIN_S = 60.0
"""So long after the last arrival demand may still rise."""
TOLERANCE = 0.005
"""Relative error of a rate that bisection leaves."""
RAMP_LOAD = 0.5
"""Share of the computing time that prefills of the first requests take, unless there is too little
time before the burst."""
Lengths = RandomLengths | LengthTable
_HEIGHT = re.compile(r"(\d{1,3}(?:\.\d{1,4})?)x-(whole|merged)")


@dataclass(frozen=True)
class ClusterFigures:
    """What the rule needs to know of a cluster. Tokens of KVCache: of all whole instances, and of
    the group that they merge to. `costs`: constants of the cost model of a whole instance;
    `slowdown`: how many times as long a step of a few requests takes when its tokens are served;
    `loaded_slowdown`: the same of the merged group when it is full."""

    num_instances: int
    whole_tokens: int
    merged_tokens: int
    costs: tuple[float, ...]
    slowdown: float = 1.0
    loaded_slowdown: float = 1.0

    @property
    def cost(self) -> CostModel:
        """Costs of a step while tokens are served."""
        return CostModel(*self.costs).scaled(self.slowdown)

    @property
    def loaded_cost_model(self) -> CostModel:
        """What steps take in a burst."""
        return CostModel(*self.costs).scaled(self.loaded_slowdown)


@dataclass(frozen=True)
class Height:
    """How high the demand of a burst is: `factor` times what the `base` layout holds."""

    factor: float
    base: str

    @classmethod
    def parse(cls, text: str) -> Height:
        """A height such as 0.8x-whole or 1.0x-merged.

        Raises:
            BenchError: it is not written so, or not positive.
        """
        match = _HEIGHT.fullmatch(text)
        if match is None or float(match.group(1)) <= 0:
            raise BenchError(f"a height is written like 0.8x-whole or 1.0x-merged, not {text!r}")
        return cls(float(match.group(1)), match.group(2))

    def __str__(self) -> str:
        return f"{self.factor:g}x-{self.base}"

    def tokens(self, figures: ClusterFigures) -> float:
        """The demand in tokens."""
        whole = self.base == "whole"
        return self.factor * (figures.whole_tokens if whole else figures.merged_tokens)


@dataclass(frozen=True)
class ScenarioOptions:
    """The rule's numbers. `gap_s`: steady time between two bursts, where there are several."""

    height: Height
    steady_share: float = 0.5
    before_s: float = 20.0
    burst_s: float = 20.0
    after_s: float = 30.0
    num_bursts: int = 1
    gap_s: float = 45.0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            BenchError: a time or share is out of range.
        """
        times_s = (self.before_s, self.burst_s, self.after_s, self.gap_s)
        if not all(math.isfinite(time_s) and time_s > 0 for time_s in times_s):
            raise BenchError("the times of a scenario must be positive")
        if not 0 < self.steady_share < 1:
            raise BenchError(f"the steady share must be in (0, 1), not {self.steady_share}")


@dataclass(frozen=True)
class Scenario:
    """The rule resolved for one cluster. Rates in requests per second; `ramp` is what is under way
    at the beginning, sent over `ramp_s`. `lengths`: in words."""

    options: ScenarioOptions
    lengths: str
    figures: ClusterFigures
    steady_rate: float
    burst_rate: float
    ramp: tuple[RequestShape, ...]
    ramp_s: float

    @property
    def bursts_s(self) -> tuple[tuple[float, float], ...]:
        """Begin and end of each burst."""
        options = self.options
        begins = [
            options.before_s + number * (options.burst_s + options.gap_s)
            for number in range(options.num_bursts)
        ]
        return tuple((begin, begin + options.burst_s) for begin in begins)

    @property
    def end_s(self) -> float:
        """When the last request arrives, at the latest."""
        return self.bursts_s[-1][1] + self.options.after_s

    def phase_of(self, arrival_s: float) -> str:
        """Where a request belongs by its arrival: "before", "burst" or "after"."""
        if any(begin <= arrival_s < end for begin, end in self.bursts_s):
            return "burst"
        return "before" if arrival_s < self.bursts_s[0][0] else "after"

    def arrivals(self, lengths: Lengths, seed: int) -> Arrivals:
        """What is sent and when; the same for every policy. `lengths` as it was resolved for."""
        steps = [RateStep(0.0, self.steady_rate)]
        for begin, end in self.bursts_s:
            steps += [RateStep(begin, self.burst_rate), RateStep(end, self.steady_rate)]
        drawn = synthetic_workload(
            lengths, ArrivalOptions(tuple(steps), duration_s=self.end_s), seed
        )
        spacing_ns = self.ramp_s * NS_PER_S / max(1, len(self.ramp))
        ramp = [
            WorkloadRequest(round(index * spacing_ns), shape.prompt_tokens, shape.output_tokens)
            for index, shape in enumerate(self.ramp)
        ]
        tagged = [(request, True) for request in ramp] + [(r, False) for r in drawn.requests]
        tagged.sort(key=lambda pair: pair[0].arrival_ns)
        return Arrivals(
            Workload("overload", tuple(request for request, _ in tagged)),
            frozenset(index for index, (_, is_ramp) in enumerate(tagged) if is_ramp),
        )


@dataclass(frozen=True)
class Arrivals:
    """A workload, and which of its requests (by index) are the ramp."""

    workload: Workload
    ramp: frozenset[int]


# ---------------------------------------------------------------- demand with unlimited memory


@dataclass
class _Running:
    """A request under way: `done` tokens are generated."""

    shape: RequestShape
    done: int = 0

    @property
    def tokens(self) -> int:
        """KV that it takes."""
        return self.shape.prompt_tokens + self.done

    @property
    def chunk(self) -> ChunkShape:
        """What its next step computes: the whole prompt, or the token before."""
        if self.done == 0:
            return ChunkShape(0, self.shape.prompt_tokens, True)
        return ChunkShape(self.tokens - 1, 1, True)


class ModelInstance:
    """One whole instance with unlimited memory: all that has arrived is in every step."""

    def __init__(self, cost: CostModel, running: Sequence[tuple[RequestShape, int]] = ()) -> None:
        self._cost = cost
        self._running = [_Running(shape, done) for shape, done in running]
        self._now_s = 0.0

    @property
    def state(self) -> tuple[tuple[RequestShape, int], ...]:
        """Requests under way and how many tokens each has generated."""
        return tuple((running.shape, running.done) for running in self._running)

    def run(
        self,
        arrivals: Sequence[tuple[float, RequestShape]],
        limit_tokens: float = math.inf,
        drain_s: float = 0.0,
    ) -> list[tuple[float, int]]:
        """(time in s, demand in tokens) after every step until `drain_s` after the last arrival, or
        until the demand exceeds `limit_tokens`."""
        demand: list[tuple[float, int]] = []
        waiting = list(reversed(arrivals))
        end_s = arrivals[-1][0] + drain_s if arrivals else 0.0
        while waiting or (self._running and self._now_s < end_s):
            if not self._running:
                self._now_s = max(self._now_s, waiting[-1][0])
            while waiting and waiting[-1][0] <= self._now_s:
                self._running.append(_Running(waiting.pop()[1]))
            self._step()
            demand.append((self._now_s, sum(running.tokens for running in self._running)))
            if demand[-1][1] > limit_tokens:
                break
        return demand

    def _step(self) -> None:
        step_ns = self._cost.step_ns([running.chunk for running in self._running])
        self._now_s += step_ns / NS_PER_S
        for running in self._running:
            running.done += 1
        self._running = [r for r in self._running if r.done < r.shape.output_tokens]


def resolve(
    options: ScenarioOptions,
    lengths: Lengths,
    figures: ClusterFigures,
    rates: tuple[float, float] | None = None,
) -> Scenario:
    """Find the rates; or take `rates`, (steady, burst), as an earlier run found them.

    Raises:
        BenchError: the burst would not be higher than the steady demand.
    """
    cost = figures.cost
    shapes = _model_shapes(lengths)
    steady_tokens = options.steady_share * figures.whole_tokens
    height_tokens = options.height.tokens(figures)
    if height_tokens <= steady_tokens:
        raise BenchError(
            f"a burst of {options.height} is {height_tokens:.0f} tokens, no more than the steady "
            f"demand of {steady_tokens:.0f}; raise --height"
        )
    each = figures.num_instances
    steady_rate = burst_rate = 0.0
    if rates is not None:
        steady_rate, burst_rate = (rate / each for rate in rates)
    else:
        steady_rate = _bisect(
            lambda rate: steady_demand(cost, shapes, rate, 4 * steady_tokens / each),
            steady_tokens / each,
        )
    state = steady_state(cost, shapes, steady_rate)
    if rates is None:
        burst_rate = _bisect(
            lambda rate: burst_demand(
                figures.loaded_cost_model,
                shapes,
                ((options.burst_s, rate), (options.after_s, steady_rate)),
                state,
                4 * height_tokens / each,
            ),
            height_tokens / each,
        )
    ramp = _ramp(state) * each
    prefill_ns = sum(cost.chunk_ns(0, shape.prompt_tokens) for shape in ramp) / each
    return Scenario(
        options,
        describe_lengths(lengths),
        figures,
        steady_rate * each,
        burst_rate * each,
        tuple(sorted(ramp, key=lambda shape: -shape.output_tokens)),
        min(prefill_ns / NS_PER_S / RAMP_LOAD, options.before_s / 2),
    )


def steady_state(
    cost: CostModel, shapes: Sequence[RequestShape], rate: float
) -> tuple[tuple[RequestShape, int], ...]:
    """What an instance has under way at which `rate` requests arrive per second."""
    instance = ModelInstance(cost)
    instance.run(_evenly(shapes, rate, MODEL_ARRIVALS))
    return instance.state


def steady_demand(
    cost: CostModel, shapes: Sequence[RequestShape], rate: float, limit_tokens: float = math.inf
) -> float:
    """Mean demand in tokens of an instance at which `rate` requests arrive per second; infinite
    where it exceeds `limit_tokens`."""
    arrivals = _evenly(shapes, rate, MODEL_ARRIVALS)
    demand = ModelInstance(cost).run(arrivals, limit_tokens)
    if demand[-1][1] > limit_tokens:
        return math.inf
    half_s = arrivals[-1][0] / 2
    total = weight = 0.0
    for (before_s, _), (at_s, tokens) in itertools.pairwise(demand):
        if at_s >= half_s:
            total += tokens * (at_s - before_s)
            weight += at_s - before_s
    return total / weight if weight else 0.0


def burst_demand(
    cost: CostModel,
    shapes: Sequence[RequestShape],
    phases: Sequence[tuple[float, float]],
    under_way: Sequence[tuple[RequestShape, int]] = (),
    limit_tokens: float = math.inf,
) -> float:
    """Highest demand in tokens of an instance during the `phases`, each (seconds, requests per
    second), and after them; infinite where it exceeds `limit_tokens`."""
    arrivals: list[tuple[float, RequestShape]] = []
    begin_s = 0.0
    for duration_s, rate in phases:
        arrivals += [
            (begin_s + at_s, shape)
            for at_s, shape in _evenly(shapes, rate, math.ceil(rate * duration_s))
        ]
        begin_s += duration_s
    demand = ModelInstance(cost, under_way).run(arrivals, limit_tokens, DRAIN_S)
    highest = max(tokens for at_s, tokens in demand)
    return math.inf if highest > limit_tokens else float(highest)


def _evenly(
    shapes: Sequence[RequestShape], rate: float, count: int
) -> list[tuple[float, RequestShape]]:
    lengths = itertools.cycle(shapes)
    return [((index + 1) / rate, next(lengths)) for index in range(count)]


def describe_lengths(lengths: Lengths) -> str:
    """In words: means, and where they come from."""
    if isinstance(lengths, LengthTable):
        rows = len(lengths.shapes)
        prompt = sum(shape.prompt_tokens for shape in lengths.shapes) / rows
        output = sum(shape.output_tokens for shape in lengths.shapes) / rows
        return f"{rows} recorded lengths, mean {prompt:.0f} in / {output:.0f} out"
    return (
        f"uniform around {lengths.prompt_tokens} in / {lengths.output_tokens} out, "
        f"+- {lengths.range_ratio:.0%}"
    )


def _model_shapes(lengths: Lengths) -> tuple[RequestShape, ...]:
    """Lengths as they are drawn for runs, of a seed that no run has."""
    rng = stream_rng(0, RandomStream.LENGTHS, 1)
    if isinstance(lengths, LengthTable):
        return sample_shapes(lengths, MODEL_SHAPES, rng)
    return random_shapes(lengths, MODEL_SHAPES, rng)


def _ramp(state: Sequence[tuple[RequestShape, int]]) -> list[RequestShape]:
    """Requests under way as new ones: what they have is prompt, what is left is output."""
    return [
        RequestShape(shape.prompt_tokens + done, shape.output_tokens - done)
        for shape, done in state
    ]


def _bisect(demand_of: Callable[[float], float], wanted: float) -> float:
    """The rate at which a demand that grows with the rate is as wanted."""
    low, high = 0.0, 1.0
    while demand_of(high) < wanted:
        low, high = high, 2 * high
    while high - low > TOLERANCE * high:
        middle = (low + high) / 2
        if demand_of(middle) < wanted:
            low = middle
        else:
            high = middle
    return high
