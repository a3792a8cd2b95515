"""Figures of `bench overload`, as PNG. The only module that needs matplotlib (`kunserve[bench]`),
loaded by commands that draw.

One policy has one colour in all of them (Okabe and Ito's palette, told apart by colour-blind
readers too).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kunserve.bench.overload_report import (
    PERCENTS,
    PolicyFigures,
    counted,
    overload_s,
    ttft_s,
)
from kunserve.bench.overload_runs import LoadSample, OverloadRun
from kunserve.bench.report import Interval
from kunserve.bench.scenario import Scenario

DPI = 150
WIDTH_IN = 8.0
TTFT_BIN_S = 2.5
FREE_FROM_MS, FREE_TO_MS = -1000.0, 4000.0
_COLOURS = {
    "kunserve": "#0072B2",
    "recompute": "#D55E00",
    "swap": "#E69F00",
    "migrate": "#009E73",
    "static-pp": "#CC79A7",
    "observe": "#56B4E9",
}
_OTHERS = ("#000000", "#56B4E9", "#999999", "#F0E442")
_SHADE: dict[str, Any] = {"color": "#F0E442", "alpha": 0.3, "linewidth": 0, "zorder": 0.4}
_BURST: dict[str, Any] = {"color": "#000000", "alpha": 0.08, "linewidth": 0, "zorder": 0.5}

Runs = Mapping[str, Sequence[OverloadRun]]
"""Runs by the variant's name, all of one height."""


def colours(names: Sequence[str]) -> dict[str, str]:
    """The colour of each variant: a policy's own, else one of the rest in turn."""
    others = itertools.cycle(_OTHERS)
    return {name: _COLOURS.get(name) or next(others) for name in names}


def draw_all(
    directory: Path, scenario: Scenario, runs: Runs, figures: Mapping[str, PolicyFigures]
) -> list[Path]:
    """Draw what one height's runs show into `directory`, which is made; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[], Figure]] = {
        "arrivals": lambda: draw_arrivals(scenario, runs),
        "demand": lambda: draw_demand(scenario, runs),
        "ttft_over_time": lambda: draw_ttft_over_time(scenario, runs),
        "percentiles": lambda: draw_percentiles(figures),
        "queue_share": lambda: draw_queue_share(runs),
        "free_kv": lambda: draw_free_kv(runs),
    }
    paths = []
    for name, draw in drawings.items():
        paths.append(directory / f"{name}.png")
        draw().savefig(paths[-1], dpi=DPI)
    return paths


def _figure(rows: int = 1, columns: int = 1, height_in: float = 4.0) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for each in axes.flat:
        each.grid(True, alpha=0.25, linewidth=0.6)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def _shade_bursts(axes: Axes, scenario: Scenario) -> None:
    for index, (begin, end) in enumerate(scenario.bursts_s):
        axes.axvspan(begin, end, label="" if index else "burst", **_BURST)


def _log_scale(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


# ---------------------------------------------------------------- over the time of a run


def draw_arrivals(scenario: Scenario, runs: Runs) -> Figure:
    """Requests per second: drawn, by seed, and the rates of the rule. The ramp is left out."""
    figure, (axes,) = _figure()
    _shade_bursts(axes, scenario)
    bins = np.arange(0, math.ceil(scenario.end_s) + 1)
    for run in next(iter(runs.values())):
        arrivals = [request.arrival_s for request in counted(run)]
        counts, _ = np.histogram(arrivals, bins)
        axes.stairs(counts, bins, color="#999999", alpha=0.6, linewidth=0.9)
    axes.plot([], [], color="#999999", label="arrivals, each seed")
    edges, rates = [0.0], [scenario.steady_rate]
    for begin, end in scenario.bursts_s:
        edges += [begin, end]
        rates += [scenario.burst_rate, scenario.steady_rate]
    axes.stairs(rates, [*edges, scenario.end_s], color="#000000", baseline=None, label="mean rate")
    axes.set(xlabel="time (s)", ylabel="requests per second", title="Arrivals", ylim=(0, None))
    _legend(axes)
    return figure


def draw_story(scenario: Scenario, runs: Runs) -> Figure:
    """Demand against capacity, a row per variant, and TTFT below: the whole story in one figure."""
    figure, rows = _figure(len(runs) + 1, height_in=2.4 * (len(runs) + 1))
    _demand_rows(rows[: len(runs)], scenario, runs)
    _ttft_lines(rows[-1], scenario, runs)
    rows[-1].set_xlim(rows[0].get_xlim())
    handles, labels = _first_of_each(rows[: len(runs)])
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return figure


def draw_demand(scenario: Scenario, runs: Runs) -> Figure:
    """KV demand against capacity, a row per variant, of its first seed."""
    watched = {name: each for name, each in runs.items() if each[0].samples}
    figure, rows = _figure(max(1, len(watched)), height_in=1.2 + 1.7 * max(1, len(watched)))
    _demand_rows(rows, scenario, watched)
    rows[-1].set_xlabel("time (s)")
    figure.suptitle("KV demand and capacity")
    handles, labels = _first_of_each(rows)
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return figure


def _demand_rows(rows: Sequence[Axes], scenario: Scenario, runs: Runs) -> None:
    """One row for each variant, all on one scale."""
    watched = {name: each[0] for name, each in runs.items()}
    shared = colours(list(runs))
    highest = max(
        (max(s.demand_tokens, s.capacity_tokens) for r in watched.values() for s in r.samples),
        default=1,
    )
    end_s = max((run.duration_s for run in watched.values()), default=scenario.end_s)
    for axes, (name, run) in zip(rows, watched.items(), strict=False):
        _demand_row(axes, run, shared[name])
        _shade_bursts(axes, scenario)
        axes.set(ylabel="k tokens", ylim=(0, highest * 1.08 / 1000), xlim=(0, end_s))
        axes.set_title(name, loc="left", fontsize=10)
        axes.tick_params(labelbottom=axes is rows[-1])


def _demand_row(axes: Axes, run: OverloadRun, colour: str) -> None:
    times = [sample.at_s for sample in run.samples]
    used = [sample.used_tokens / 1000 for sample in run.samples]
    demand = [sample.demand_tokens / 1000 for sample in run.samples]
    capacity = [sample.capacity_tokens / 1000 for sample in run.samples]
    axes.fill_between(times, used, color=colour, alpha=0.35, linewidth=0, label="in use")
    axes.plot(times, demand, color=colour, linewidth=1.2, label="demand: in use + queued")
    axes.step(times, capacity, "k--", where="post", linewidth=1.2, label="capacity")
    for index, (begin, end) in enumerate(merged_periods(run.samples)):
        axes.axvspan(begin, end, label="" if index else "parameters dropped", **_SHADE)


def merged_periods(samples: Sequence[LoadSample]) -> Iterator[tuple[float, float]]:
    """Begin and end of each time in which some group had several stages."""
    begin: float | None = None
    for sample in samples:
        if sample.stages > 1 and begin is None:
            begin = sample.at_s
        elif sample.stages <= 1 and begin is not None:
            yield begin, sample.at_s
            begin = None
    if begin is not None:
        yield begin, samples[-1].at_s


def _first_of_each(rows: Sequence[Axes]) -> tuple[list[Artist], list[str]]:
    found: dict[str, Artist] = {}
    for axes in rows:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def draw_ttft_over_time(scenario: Scenario, runs: Runs) -> Figure:
    """Mean TTFT by the time of sending, over all seeds."""
    figure, (axes,) = _figure()
    _ttft_lines(axes, scenario, runs)
    axes.set_title("TTFT over time")
    return figure


def _ttft_lines(axes: Axes, scenario: Scenario, runs: Runs) -> None:
    """Mean TTFT of the requests that were sent in each bin. One in which a request failed has no
    mean: its line breaks off."""
    _shade_bursts(axes, scenario)
    shared = colours(list(runs))
    for name, each in runs.items():
        times, means = mean_ttft(each)
        axes.plot(times, means, "o-", color=shared[name], markersize=3, label=name)
    _log_scale(axes)
    axes.set(xlabel="time of sending (s)", ylabel="mean TTFT (s)")
    _legend(axes)


def mean_ttft(runs: Sequence[OverloadRun]) -> tuple[list[float], list[float]]:
    """Middles of the bins with requests, in s, and their mean TTFT."""
    bins: dict[int, list[float]] = {}
    for run in runs:
        for request in counted(run):
            bins.setdefault(int(request.arrival_s // TTFT_BIN_S), []).append(ttft_s(request))
    ordered = sorted(bins)
    means = [sum(bins[index]) / len(bins[index]) for index in ordered]
    times = [(index + 0.5) * TTFT_BIN_S for index in ordered]
    return times, [mean if math.isfinite(mean) else math.nan for mean in means]


# ---------------------------------------------------------------- policies side by side


def draw_percentiles(figures: Mapping[str, PolicyFigures]) -> Figure:
    """TTFT and TPOT at P50, P90 and P99 with their 95 % intervals. An infinite one has no bar."""
    figure, (left, right) = _figure(1, 2)
    for axes, name, scale, unit in ((left, "ttft", 1.0, "s"), (right, "tpot", 1000.0, "ms")):
        _bars(axes, name, figures, scale)
        axes.set(ylabel=f"{name.upper()} ({unit})", title=name.upper())
    _log_scale(left)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False
    )
    return figure


def _bars(axes: Axes, name: str, figures: Mapping[str, PolicyFigures], scale: float) -> None:
    shared = colours(list(figures))
    width = 0.8 / max(1, len(figures))
    for number, (variant, figure) in enumerate(figures.items()):
        values = figure.latencies.ttft_s if name == "ttft" else figure.latencies.tpot_s
        for place, percent in enumerate(PERCENTS):
            value = values[percent]
            if value is None or math.isinf(value):
                continue
            at = place + (number - (len(figures) - 1) / 2) * width
            axes.bar(
                at,
                value * scale,
                width * 0.92,
                color=shared[variant],
                label=variant if place == 0 else "",
                yerr=_error_bar(value, figure.intervals.get((name, percent)), scale),
                error_kw={"elinewidth": 0.9, "capsize": 2},
            )
    axes.set_xticks(range(len(PERCENTS)), [f"P{percent}" for percent in PERCENTS])


def _error_bar(value: float, interval: Interval | None, scale: float) -> list[list[float]] | None:
    """Distances below and above, as matplotlib takes them."""
    if interval is None or math.isinf(interval.high):
        return None
    below, above = max(0.0, value - interval.low), max(0.0, interval.high - value)
    return [[below * scale], [above * scale]]


def draw_queue_share(runs: Runs) -> Figure:
    """Mean TTFT by the server's clocks, divided into waiting in the queue and the rest."""
    figure, (axes,) = _figure()
    shares = {name: _queue_and_rest(each) for name, each in runs.items()}
    shares = {name: share for name, share in shares.items() if sum(share) > 0}
    shared = colours(list(runs))
    for place, (name, (queue, rest)) in enumerate(shares.items()):
        axes.bar(place, queue, 0.6, color=shared[name])
        axes.bar(place, rest, 0.6, bottom=queue, color=shared[name], alpha=0.35, hatch="//")
        axes.annotate(
            f"{queue / (queue + rest):.0%}",
            (place, queue + rest),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
        )
    axes.bar(0, 0, color="#666666", label="waiting in the queue (its share is written above)")
    axes.bar(0, 0, color="#666666", alpha=0.35, hatch="//", label="prefill and the rest")
    axes.set_xticks(range(len(shares)), list(shares))
    axes.set(ylabel="mean TTFT (s)", title="Queue wait as a share of TTFT")
    axes.margins(y=0.12)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
    )
    return figure


def _queue_and_rest(runs: Sequence[OverloadRun]) -> tuple[float, float]:
    """Seconds per request."""
    requests = sum(len(run.requests) for run in runs)
    queue = sum(run.queue_s for run in runs)
    return queue / requests, max(0.0, sum(run.ttft_s for run in runs) - queue) / requests


def draw_free_kv(runs: Runs) -> Figure:
    """Free KV tokens against milliseconds after the overload, every seed a line: how fast a policy
    has memory is what it is about."""
    figure, (axes,) = _figure()
    shared = colours(list(runs))
    moments = overload_moments(runs)
    for name, each in runs.items():
        for number, run in enumerate(run for run in each if run.key.seed in moments):
            begin_s = _moment(run, moments)
            near = [
                ((sample.at_s - begin_s) * 1000, sample.free_tokens)
                for sample in run.samples
                if FREE_FROM_MS <= (sample.at_s - begin_s) * 1000 <= FREE_TO_MS
            ]
            axes.plot(
                [at_ms for at_ms, _ in near],
                [free for _, free in near],
                color=shared[name],
                linewidth=1.3,
                alpha=0.9 if number == 0 else 0.45,
                label="" if number else name,
            )
    axes.axvline(0, color="k", linewidth=0.8, linestyle=":")
    axes.set(
        xlabel="time after demand exceeded what whole instances hold (ms)",
        ylabel="free KV tokens",
        title="Free KV memory after the overload",
        xlim=(FREE_FROM_MS, FREE_TO_MS),
    )
    _legend(axes)
    return figure


def overload_moments(runs: Runs) -> dict[int, float]:
    """By seed, the overload of the first variant that had one: the moment for those that had none
    under the same arrivals."""
    moments: dict[int, float] = {}
    for run in itertools.chain.from_iterable(runs.values()):
        moment_s = overload_s(run)
        if moment_s is not None:
            moments.setdefault(run.key.seed, moment_s)
    return moments


def _moment(run: OverloadRun, moments: Mapping[int, float]) -> float:
    own_s = overload_s(run)
    return moments[run.key.seed] if own_s is None else own_s


def draw_heights(by_height: Sequence[tuple[float, Mapping[str, PolicyFigures]]]) -> Figure:
    """P99 of TTFT against the height of the burst (as a multiple of what whole instances hold):
    where two curves cross, another policy is the better one."""
    figure, (axes,) = _figure()
    names = list(dict.fromkeys(name for _, figures in by_height for name in figures))
    shared = colours(names)
    for name in names:
        points = list(_p99_points(name, by_height))
        axes.plot(
            [height for height, _, _ in points],
            [value for _, value, _ in points],
            "o-",
            color=shared[name],
            label=name,
        )
        bands = [(height, interval) for height, _, interval in points if interval is not None]
        axes.fill_between(
            [height for height, _ in bands],
            [interval.low for _, interval in bands],
            [interval.high for _, interval in bands],
            color=shared[name],
            alpha=0.15,
            linewidth=0,
        )
    _log_scale(axes)
    axes.set(
        xlabel="height of the burst (multiples of the no-drop KV)",
        ylabel="TTFT P99 (s)",
        title="TTFT against the height of the burst",
    )
    _legend(axes)
    return figure


def _p99_points(
    name: str, by_height: Sequence[tuple[float, Mapping[str, PolicyFigures]]]
) -> Iterator[tuple[float, float, Interval | None]]:
    """(height, P99 of TTFT, its interval where that is finite); infinite ones are left out."""
    for height, figures in sorted(by_height, key=lambda pair: pair[0]):
        value = figures[name].latencies.ttft_s[99] if name in figures else None
        if value is None or math.isinf(value):
            continue
        interval = figures[name].intervals.get(("ttft", 99))
        is_known = interval is not None and math.isfinite(interval.high)
        yield height, value, interval if is_known else None
