"""Metrics of what the overload policy decided: demand, verdicts, waits, the autoscale signal."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kunserve.runtime.status import DecisionTotals
from kunserve.server.engine import EngineStatus

NS_PER_S = 1e9


def overload_families(prefix: str, model_name: str, status: EngineStatus) -> Iterable[Metric]:
    """One family per metric; names without `prefix` are in docs/operations.md."""
    yield from _gauges(prefix, model_name, status)
    yield from _counters(prefix, model_name, status.decisions)


def _gauges(prefix: str, model_name: str, status: EngineStatus) -> Iterable[Metric]:
    totals = status.decisions
    gauges: dict[str, tuple[str, float]] = {
        "policy_may_drop": ("1 while the policy may drop parameters", float(status.may_drop)),
        "kv_demand_tokens": (
            "KV cache in use and what queued requests need, in tokens",
            _demand_blocks(status) * status.block_size,
        ),
        "kv_lacking_tokens": (
            "Demand that dropping cannot make room for, in tokens; 0: none",
            totals.lacking_blocks * status.block_size,
        ),
        "autoscale_instances_wanted": (
            "Instances that would hold what dropping cannot free",
            totals.instances_wanted,
        ),
    }
    for name, (text, value) in gauges.items():
        gauge = GaugeMetricFamily(prefix + name, text, labels=("model_name",))
        gauge.add_metric([model_name], value)
        yield gauge


def _demand_blocks(status: EngineStatus) -> int:
    loads = [group.load for group in status.groups if group.load is not None]
    return sum(load.total_blocks - load.available_blocks + load.queued_blocks for load in loads)


def _counters(prefix: str, model_name: str, totals: DecisionTotals) -> Iterable[Metric]:
    verdicts = CounterMetricFamily(
        prefix + "overload_decisions",
        "Candidates for a change of layout, by what was decided",
        labels=("model_name", "kind", "verdict"),
    )
    for (kind, verdict), number in totals.verdicts.items():
        verdicts.add_metric([model_name, kind, verdict], number)
    yield verdicts
    saved = CounterMetricFamily(
        prefix + "overload_saved_wait_seconds",
        "Waiting that drops were expected to save; verdict would act: those only observed",
        labels=("model_name", "verdict"),
    )
    for verdict, saved_ns in totals.saved_ns.items():
        saved.add_metric([model_name, verdict], saved_ns / NS_PER_S)
    yield saved
    counters: dict[str, tuple[str, float]] = {
        "overload_watched_requests": (
            "Requests that were queued at a drop, and have started since",
            totals.watched,
        ),
        "overload_predicted_wait_seconds": (
            "Their waits as predicted at the drop",
            totals.predicted_ns / NS_PER_S,
        ),
        "overload_realised_wait_seconds": (
            "Their waits as they came true",
            totals.realised_ns / NS_PER_S,
        ),
    }
    for name, (text, value) in counters.items():
        counter = CounterMetricFamily(prefix + name, text, labels=("model_name",))
        counter.add_metric([model_name], value)
        yield counter
