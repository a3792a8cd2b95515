"""What the runs of `bench overload` say: percentiles over the pooled requests of all seeds, table
and JSON.

A request that failed, was refused or ran out of time has an infinite TTFT and end-to-end latency:
a policy cannot look better by turning requests away. Requests of the ramp count in no latency.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from kunserve.bench.overload_runs import OverloadRun, RequestFigures
from kunserve.bench.report import Interval, bootstrap_interval, percentile
from kunserve.bench.scenario import Scenario

PERCENTS = (50, 90, 99)
BOOTSTRAP_SEED = 20260
PHASES = ("before", "burst", "after", "calm")
"""By arrival. "calm": before the burst, or after the last moment at which a request waited."""


@dataclass(frozen=True)
class Latencies:
    """Some requests. `ttft_s`, `tpot_s` and `e2e_s` by percent; None where there is no value."""

    requests: int
    failed: int
    ttft_s: Mapping[int, float | None]
    tpot_s: Mapping[int, float | None]
    e2e_s: Mapping[int, float | None]


@dataclass(frozen=True)
class PolicyFigures:
    """All runs of one variant at one height. `tokens_per_s`: output over whole runs;
    `loaded_tokens_per_s`: from the first burst until the last arrival. `intervals`: 95 % of
    percentiles of all requests, by (quantity, percent). `queue_share`: of TTFT, None where the
    server does not say. `steady_share` is the mean demand before the burst, and `peak_share` the
    highest, of what whole instances hold, as measured; None where nobody looked."""

    runs: int
    latencies: Latencies
    intervals: Mapping[tuple[str, int], Interval]
    phases: Mapping[str, Latencies]
    itl_max_s: float
    tokens_per_s: float
    loaded_tokens_per_s: float
    preemptions: int
    transitions: int
    queue_share: float | None
    steady_share: float | None
    peak_share: float | None
    send_lag_max_s: float
    errors: tuple[str, ...]


# ---------------------------------------------------------------- requests


def ttft_s(request: RequestFigures) -> float:
    """From the send to the first token; infinite for a request that did not end well."""
    if request.error or request.first_s is None or request.sent_s is None:
        return math.inf
    return request.first_s - request.sent_s


def e2e_s(request: RequestFigures) -> float:
    """From the send to the last token, likewise."""
    if request.error or request.last_s is None or request.sent_s is None:
        return math.inf
    return request.last_s - request.sent_s


def tpot_s(request: RequestFigures) -> float | None:
    """Time per token after the first, of a request that ended well with two tokens or more."""
    if request.error or request.first_s is None or request.last_s is None:
        return None
    if request.output_tokens < 2:
        return None
    return (request.last_s - request.first_s) / (request.output_tokens - 1)


def counted(run: OverloadRun) -> list[RequestFigures]:
    """Requests that count."""
    return [request for request in run.requests if not request.is_ramp]


def backlog_end_s(run: OverloadRun) -> float:
    """The last moment at which a request waited; infinite where nobody looked."""
    if not run.samples:
        return math.inf
    return max((sample.at_s for sample in run.samples if sample.num_waiting), default=0.0)


def overload_s(run: OverloadRun) -> float | None:
    """The first moment at which demand exceeds what whole instances hold, if it does."""
    return next(
        (sample.at_s for sample in run.samples if sample.demand_tokens > sample.whole_tokens), None
    )


def in_phase(run: OverloadRun, scenario: Scenario, phase: str) -> list[RequestFigures]:
    """Requests of a phase, see `PHASES`."""
    requests = counted(run)
    if phase == "calm":
        end_s = max(backlog_end_s(run), scenario.bursts_s[-1][1])
        first_s = scenario.bursts_s[0][0]
        return [r for r in requests if r.arrival_s < first_s or r.arrival_s > end_s]
    return [r for r in requests if scenario.phase_of(r.arrival_s) == phase]


# ---------------------------------------------------------------- figures


def figures_of(runs: Sequence[OverloadRun], scenario: Scenario) -> PolicyFigures:
    """Pool the runs of one variant at one height."""
    pooled = [request for run in runs for request in counted(run)]
    ttft_sum_s = sum(run.ttft_s for run in runs)
    errors = {request.error for run in runs for request in run.requests if request.error}
    return PolicyFigures(
        runs=len(runs),
        latencies=latencies_of(pooled),
        intervals=_intervals(pooled),
        phases={
            phase: latencies_of([r for run in runs for r in in_phase(run, scenario, phase)])
            for phase in PHASES
        },
        itl_max_s=max((request.itl_max_s for request in pooled), default=0.0),
        tokens_per_s=_rate(
            sum(sum(r.tokens_by_second) for r in runs), [r.duration_s for r in runs]
        ),
        loaded_tokens_per_s=_loaded_rate(runs, scenario),
        preemptions=sum(run.preemptions for run in runs),
        transitions=sum(run.transitions for run in runs),
        queue_share=sum(run.queue_s for run in runs) / ttft_sum_s if ttft_sum_s else None,
        steady_share=_steady_share(runs, scenario),
        peak_share=max(
            (s.demand_tokens / s.whole_tokens for run in runs for s in run.samples), default=None
        ),
        send_lag_max_s=max(run.send_lag_max_s for run in runs),
        errors=tuple(sorted(errors)),
    )


def latencies_of(requests: Sequence[RequestFigures]) -> Latencies:
    """Percentiles of some requests."""
    return Latencies(
        requests=len(requests),
        failed=sum(bool(request.error) for request in requests),
        ttft_s=_by_percent([ttft_s(request) for request in requests]),
        tpot_s=_by_percent(_known(tpot_s(request) for request in requests)),
        e2e_s=_by_percent([e2e_s(request) for request in requests]),
    )


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _by_percent(values: Sequence[float]) -> dict[int, float | None]:
    return {percent: percentile(values, percent) if values else None for percent in PERCENTS}


def _intervals(requests: Sequence[RequestFigures]) -> dict[tuple[str, int], Interval]:
    quantities = {
        "ttft": [ttft_s(request) for request in requests],
        "tpot": _known(tpot_s(request) for request in requests),
    }
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    return {
        (name, percent): bootstrap_interval(values, percent, rng)
        for name, values in quantities.items()
        for percent in PERCENTS
        if values
    }


def _rate(tokens: int, durations_s: Sequence[float]) -> float:
    return tokens / sum(durations_s) if sum(durations_s) else 0.0


def _loaded_rate(runs: Sequence[OverloadRun], scenario: Scenario) -> float:
    begin, end = int(scenario.bursts_s[0][0]), math.ceil(scenario.end_s)
    tokens = sum(sum(run.tokens_by_second[begin:end]) for run in runs)
    return _rate(tokens, [end - begin] * len(runs))


def _steady_share(runs: Sequence[OverloadRun], scenario: Scenario) -> float | None:
    """Mean demand between the ramp and the first burst."""
    shares = [
        sample.demand_tokens / sample.whole_tokens
        for run in runs
        for sample in run.samples
        if scenario.ramp_s <= sample.at_s < scenario.bursts_s[0][0]
    ]
    return sum(shares) / len(shares) if shares else None


# ---------------------------------------------------------------- table

Cell = Callable[[PolicyFigures], str]


def _rows() -> dict[str, Cell]:
    """What the table shows of each policy, by name."""
    rows: dict[str, Cell] = {}
    for percent in PERCENTS:
        rows[f"TTFT P{percent}, s"] = lambda f, p=percent: _shown(f.latencies.ttft_s[p])  # type: ignore[misc]
        if percent == 99:
            rows["  95 % interval"] = _ttft_interval
    for percent in PERCENTS:
        rows[f"TPOT P{percent}, ms"] = lambda f, p=percent: _shown_ms(f.latencies.tpot_s[p])  # type: ignore[misc]
    return rows | {
        "ITL max, s": lambda f: _shown(f.itl_max_s),
        "E2E P50, s": lambda f: _shown(f.latencies.e2e_s[50]),
        "tokens/s": lambda f: f"{f.tokens_per_s:.0f}",
        "  while requests arrive": lambda f: f"{f.loaded_tokens_per_s:.0f}",
        "calm: TTFT P99, s": lambda f: _shown(f.phases["calm"].ttft_s[99]),
        "calm: TPOT P50, ms": lambda f: _shown_ms(f.phases["calm"].tpot_s[50]),
        "burst: TTFT P50, s": lambda f: _shown(f.phases["burst"].ttft_s[50]),
        "burst: TTFT P99, s": lambda f: _shown(f.phases["burst"].ttft_s[99]),
        "queue wait / TTFT": lambda f: _shown_share(f.queue_share),
        "demand / no-drop KV, steady": lambda f: _shown_share(f.steady_share),
        "  highest": lambda f: _shown_share(f.peak_share),
        "failed": lambda f: f"{f.latencies.failed} of {f.latencies.requests}",
        "preemptions": lambda f: str(f.preemptions),
        "transitions": lambda f: str(f.transitions),
        "send lag max, ms": lambda f: _shown_ms(f.send_lag_max_s),
    }


def render(figures: Mapping[str, PolicyFigures], title: str) -> Table:
    """Policies side by side, with the failures below."""
    errors = [f"{name}: {error}" for name, each in figures.items() for error in each.errors[:3]]
    table = Table(title=title, caption=escape("\n".join(errors)), caption_justify="left")
    table.add_column("", no_wrap=True)
    for name in figures:
        table.add_column(name, justify="right")
    for name, cell in _rows().items():
        table.add_row(name, *map(cell, figures.values()))
    return table


def _ttft_interval(figure: PolicyFigures) -> str:
    interval = figure.intervals.get(("ttft", 99))
    if interval is None:
        return "-"
    return f"{_shown(interval.low, 1, '{:.1f}')}-{_shown(interval.high, 1, '{:.1f}')}"


def _shown_share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _shown_ms(value_s: float | None) -> str:
    return _shown(value_s, 1000, "{:.0f}")


def _shown(value_s: float | None, scale: float = 1.0, text: str = "{:.2f}") -> str:
    if value_s is None:
        return "-"
    return "inf" if math.isinf(value_s) else text.format(value_s * scale)


# ---------------------------------------------------------------- JSON


def figures_json(figure: PolicyFigures) -> dict[str, Any]:
    """The keys of one policy. Times in seconds; what is infinite, or not known, is null."""
    latencies = figure.latencies
    return {
        **_latencies_json(latencies),
        "itl_max_s": figure.itl_max_s,
        "tokens_per_s": figure.tokens_per_s,
        "loaded_tokens_per_s": figure.loaded_tokens_per_s,
        "preemptions": figure.preemptions,
        "transitions": figure.transitions,
        "queue_share_of_ttft": figure.queue_share,
        "steady_demand_share": figure.steady_share,
        "peak_demand_share": figure.peak_share,
        "send_lag_max_s": figure.send_lag_max_s,
        "runs": figure.runs,
        "intervals_95": {
            f"{name}_p{percent}_s": [_finite(interval.low), _finite(interval.high)]
            for (name, percent), interval in figure.intervals.items()
        },
        "phases": {name: _latencies_json(phase) for name, phase in figure.phases.items()},
        "errors": list(figure.errors),
    }


def _latencies_json(latencies: Latencies) -> dict[str, Any]:
    quantities = {"ttft": latencies.ttft_s, "tpot": latencies.tpot_s, "e2e": latencies.e2e_s}
    return {
        "requests": latencies.requests,
        "failed": latencies.failed,
        **{
            f"{name}_p{percent}_s": _finite(value)
            for name, values in quantities.items()
            for percent, value in values.items()
        },
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def scenario_json(scenario: Scenario) -> dict[str, Any]:
    """The rule and what it gave."""
    options, figures = scenario.options, scenario.figures
    return {
        "rule": "steady demand = share of the no-drop KV; burst to a height; see bench/scenario.py",
        "instances": figures.num_instances,
        "whole_tokens": figures.whole_tokens,
        "merged_tokens": figures.merged_tokens,
        "costs": list(figures.costs),
        "slowdown": figures.slowdown,
        "loaded_slowdown": figures.loaded_slowdown,
        "lengths": scenario.lengths,
        "height": str(options.height),
        "height_tokens": options.height.tokens(figures),
        "steady_share": options.steady_share,
        "steady_requests_per_s": scenario.steady_rate,
        "burst_requests_per_s": scenario.burst_rate,
        "bursts_s": [list(burst) for burst in scenario.bursts_s],
        "arrivals_end_s": scenario.end_s,
        "ramp_requests": len(scenario.ramp),
        "ramp_s": scenario.ramp_s,
    }
