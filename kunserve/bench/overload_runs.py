"""Runs of `bench overload`: one variant of the server under one seed's arrivals, on a server of its
own, watched from the client's side and, four times a second, through the admin API.

Around the moment at which demand exceeds what whole instances hold it is asked forty times a
second: that is where a policy shows how fast it has memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kunserve.bench.client import (
    BenchError,
    LoadOptions,
    LoadResult,
    RequestRecord,
    first_model,
    run_load,
)
from kunserve.bench.cluster import BenchServer, LayoutInfo, bench_server
from kunserve.bench.scenario import Arrivals, ClusterFigures, Scenario
from kunserve.bench.workload import NS_PER_S, Workload, WorkloadRequest
from kunserve.policy.cost_model import ChunkShape, CostModel

SLOW_S = 0.25
FAST_S = 0.025
NEAR_SHARE = 0.8
"""Demand as a share of what whole instances hold from which the sampling is fast."""
FAST_AFTER_OVERLOAD_S = 4.0
"""For so long after the overload it stays so."""

PROBE_BATCH, FULL_BATCH = 8, 24
"""Streams on each instance that show how long a step takes: on whole instances, and when the merged
group is as full as a burst makes it."""
PROBE_PROMPT_TOKENS, PROBE_OUTPUT_TOKENS = 32, 64

Log = Callable[[str], None]


@dataclass(frozen=True)
class Variant:
    """What is compared: a server with flags and environment of its own, or servers that run already
    (`base_urls`, comma-separated), which are only loaded."""

    name: str
    flags: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    base_urls: str = ""


@dataclass(frozen=True)
class RunKey:
    """Which run."""

    variant: str
    height: str
    seed: int


@dataclass(frozen=True)
class RequestFigures:
    """One request as the client saw it, in seconds since the run began. Without a token `first_s`
    and `last_s` are None; `error` is empty for one that came to its end. Of the ramp, it counts in
    no figure."""

    arrival_s: float
    sent_s: float | None
    first_s: float | None
    last_s: float | None
    output_tokens: int
    itl_max_s: float
    is_ramp: bool
    error: str


@dataclass(frozen=True)
class LoadSample:
    """The cluster at one moment: KVCache in tokens, `stages` of its largest group."""

    at_s: float
    capacity_tokens: int
    whole_tokens: int
    used_tokens: int
    queued_tokens: int
    num_waiting: int
    stages: int

    @property
    def demand_tokens(self) -> int:
        """What runs and what waits."""
        return self.used_tokens + self.queued_tokens

    @property
    def free_tokens(self) -> int:
        """What a waiting request could have."""
        return self.capacity_tokens - self.used_tokens


@dataclass(frozen=True)
class OverloadRun:
    """One run. `tokens_by_second`: delivered in each second. `queue_s`, `ttft_s`: sums over the
    requests of the run by the server's own clocks; 0 of a server without such metrics."""

    key: RunKey
    requests: tuple[RequestFigures, ...]
    samples: tuple[LoadSample, ...]
    tokens_by_second: tuple[int, ...]
    duration_s: float
    preemptions: int = 0
    transitions: int = 0
    queue_s: float = 0.0
    ttft_s: float = 0.0
    send_lag_max_s: float = 0.0


# ---------------------------------------------------------------- the cluster's own figures


async def calibrate(server: BenchServer, options: LoadOptions) -> ClusterFigures:
    """What whole instances hold, and the merged group, by merging once; and what steps cost, by
    the constants that the instances fitted, and how much longer they take while tokens are streamed
    (front and client compute on the same machine). Nothing else must run.

    Raises:
        BenchError: a request failed, or the instances do not merge.
    """
    whole = await server.layout()
    costs = _mean_costs(whole)
    count = len(whole.instances)
    slowdown = await _measure_slowdown(server, options, costs, count, PROBE_BATCH)
    await server.idle()
    await server.change("drop")
    merged = await server.layout()
    loaded_slowdown = await _measure_slowdown(server, options, costs, count, FULL_BATCH)
    return ClusterFigures(
        num_instances=len(whole.instances),
        whole_tokens=sum(group.kv_tokens for group in whole.groups),
        merged_tokens=sum(group.kv_tokens for group in merged.groups),
        costs=costs,
        slowdown=slowdown,
        loaded_slowdown=loaded_slowdown,
    )


async def _measure_slowdown(
    server: BenchServer,
    options: LoadOptions,
    costs: tuple[float, ...],
    num_instances: int,
    batch: int,
) -> float:
    """The median gap of streams that all decode, over what the cost model says of a step of `batch`
    on a whole instance; 1 at least."""
    shape = WorkloadRequest(0, PROBE_PROMPT_TOKENS, PROBE_OUTPUT_TOKENS)
    probes = Workload("probe", (shape,) * (batch * num_instances))
    result = await run_load(server.base_url, server.model, probes, options)
    failed = [record.error for record in result.records if record.error is not None]
    if failed:
        raise BenchError(f"a request of the calibration failed: {failed[0].message}")
    gaps_ns = [
        after - before
        for record in result.records
        for before, after in itertools.pairwise(record.token_ns[PROBE_OUTPUT_TOKENS // 4 :])
    ]
    context = PROBE_PROMPT_TOKENS + PROBE_OUTPUT_TOKENS // 2
    step_ns = CostModel(*costs).step_ns([ChunkShape(context, 1, True)] * batch)
    return max(1.0, statistics.median(gaps_ns) / step_ns)


def _mean_costs(layout: LayoutInfo) -> tuple[float, ...]:
    """Every instance fits its own constants; on one machine they differ by noise."""
    columns = zip(*(instance.costs for instance in layout.instances), strict=True)
    costs = tuple(sum(column) / len(column) for column in columns)
    if not costs:
        raise BenchError("the server does not say what its steps cost")
    return costs


# ---------------------------------------------------------------- sampling


class LayoutSampler:
    """Asks the admin API in a loop while a run goes on."""

    def __init__(self, server: BenchServer, fast_from_s: float) -> None:
        self._server = server
        self._fast_from_s = fast_from_s
        self._begin_ns = 0
        self._overload_s: float | None = None
        self.samples: list[LoadSample] = []

    async def run(self, begin_ns: int) -> None:
        """Sample until cancelled; times count from `begin_ns`."""
        self._begin_ns = begin_ns
        while True:
            layout = await self._server.layout()
            sample = load_sample(layout, begin_ns)
            # A view that has not changed is not news, and between two layouts nobody knows the use.
            is_news = not self.samples or sample.at_s > self.samples[-1].at_s
            if is_news and all(group.is_known for group in layout.groups):
                self.samples.append(sample)
            await asyncio.sleep(FAST_S if self._is_near(sample) else SLOW_S)

    def _is_near(self, sample: LoadSample) -> bool:
        """The overload is close, or was not long ago."""
        now_s = (time.monotonic_ns() - self._begin_ns) / NS_PER_S
        if now_s < self._fast_from_s:
            return False
        if self._overload_s is None:
            if sample.demand_tokens > sample.whole_tokens:
                self._overload_s = now_s
            return sample.demand_tokens >= NEAR_SHARE * sample.whole_tokens
        return now_s < self._overload_s + FAST_AFTER_OVERLOAD_S


def load_sample(layout: LayoutInfo, begin_ns: int) -> LoadSample:
    """A layout as one sample."""
    groups = layout.groups
    return LoadSample(
        at_s=(layout.at_ns - begin_ns) / NS_PER_S,
        capacity_tokens=sum(group.kv_tokens for group in groups),
        whole_tokens=sum(group.kv_tokens_whole for group in groups),
        used_tokens=sum(group.kv_tokens_used or 0 for group in groups),
        queued_tokens=sum(group.kv_tokens_queued or 0 for group in groups),
        num_waiting=sum(group.num_waiting for group in groups),
        stages=max((len(group.stages) for group in groups), default=0),
    )


# ---------------------------------------------------------------- one run


class _Load(NamedTuple):
    result: LoadResult
    samples: tuple[LoadSample, ...]


async def run_variant(
    variant: Variant,
    flags: Sequence[str],
    scenario: Scenario,
    arrivals: Arrivals,
    options: LoadOptions,
) -> OverloadRun:
    """Start the variant's server with `flags` besides its own, replay the arrivals, end it. The
    seed of `options` is the run's.

    Raises:
        InstanceFailedError: the server did not start.
        BenchError: the servers of `base_urls` cannot be asked.
    """
    key = RunKey(variant.name, str(scenario.options.height), options.seed)
    if variant.base_urls:
        model = await first_model(variant.base_urls.partition(",")[0], options)
        result = await run_load(variant.base_urls, model, arrivals.workload, options)
        return reduce_run(key, result, arrivals, ())
    environment = dict(variant.environment)
    async with bench_server((*flags, *variant.flags), environment=environment) as server:
        before = await server.totals()
        load = await _load(server, arrivals, options, scenario.bursts_s[0][0])
        after = await server.totals()
    run = reduce_run(key, load.result, arrivals, load.samples)
    return _with_counters(run, before, after)


async def _load(
    server: BenchServer, arrivals: Arrivals, options: LoadOptions, fast_from_s: float
) -> _Load:
    sampler = LayoutSampler(server, fast_from_s)
    async with _in_background(sampler):
        result = await run_load(server.base_url, server.model, arrivals.workload, options)
    return _Load(result, tuple(sampler.samples))


@contextlib.asynccontextmanager
async def _in_background(sampler: LayoutSampler) -> AsyncIterator[None]:
    """Sample for as long as the block lasts. What it meets, other than its end, is raised."""
    task = asyncio.create_task(sampler.run(time.monotonic_ns()))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait((task,))
        if not task.cancelled():
            task.result()


def _with_counters(
    run: OverloadRun, before: dict[str, float], after: dict[str, float]
) -> OverloadRun:
    def since(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    return dataclasses.replace(
        run,
        preemptions=round(since("num_preemptions_total")),
        transitions=round(since("transitions_total")),
        queue_s=since("request_queue_time_seconds_sum"),
        ttft_s=since("time_to_first_token_seconds_sum"),
    )


# ---------------------------------------------------------------- reduction


def reduce_run(
    key: RunKey, result: LoadResult, arrivals: Arrivals, samples: Sequence[LoadSample]
) -> OverloadRun:
    """What is kept of a run."""
    return OverloadRun(
        key=key,
        requests=tuple(
            _request_figures(record, record.index in arrivals.ramp) for record in result.records
        ),
        samples=tuple(samples),
        tokens_by_second=_tokens_by_second(result.records),
        duration_s=result.duration_ns / NS_PER_S,
        send_lag_max_s=max(record.send_lag_ns or 0 for record in result.records) / NS_PER_S,
    )


def _request_figures(record: RequestRecord, is_ramp: bool) -> RequestFigures:
    gaps_ns = (after - before for before, after in itertools.pairwise(record.token_ns))
    error = record.error
    return RequestFigures(
        arrival_s=record.request.arrival_ns / NS_PER_S,
        sent_s=_seconds(record.sent_ns),
        first_s=_seconds(record.token_ns[0]) if record.token_ns else None,
        last_s=_seconds(record.token_ns[-1]) if record.token_ns else None,
        output_tokens=record.output_tokens,
        itl_max_s=max(gaps_ns, default=0) / NS_PER_S,
        is_ramp=is_ramp,
        error="" if error is None else f"{error.kind}: {error.message}",
    )


def _seconds(at_ns: int | None) -> float | None:
    return None if at_ns is None else at_ns / NS_PER_S


def _tokens_by_second(records: Sequence[RequestRecord]) -> tuple[int, ...]:
    counts: list[int] = []
    for at_ns in (at_ns for record in records for at_ns in record.token_ns):
        second = at_ns // NS_PER_S
        counts.extend([0] * (second + 1 - len(counts)))
        counts[second] += 1
    return tuple(counts)
