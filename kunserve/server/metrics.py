"""Prometheus metrics: vLLM's names under the prefix `kunserve:`.

What belongs to requests is counted here as it happens; what belongs to instances, groups and
transitions is read from `EngineStatus` when Prometheus asks, so it costs nothing in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kunserve.core.errors import QueueFullError, ServiceUnavailableError
from kunserve.core.request import FinishReason
from kunserve.core.step import GroupLoad
from kunserve.runtime.stats_log import InstanceCounters
from kunserve.runtime.status import GroupStatus
from kunserve.server.engine import EngineClient, EngineStatus, InstanceStatus
from kunserve.server.errors import to_http_error
from kunserve.server.overload_metrics import overload_families
from kunserve.server.settings import Slo

PREFIX = "kunserve:"
_LABELS = ("model_name",)
# vLLM's name; `instance` is Prometheus' own label of the scraped target.
_INSTANCE_LABELS = ("model_name", "engine")
# `engine` is the leader here.
_GROUP_LABELS = ("model_name", "group", "engine")
_REFUSALS = ("invalid", "queue_full", "unavailable", "failed")

# vLLM's buckets, in seconds.
_TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
_REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip


def _count_buckets(limit: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50 ... up to `limit`, as in vLLM."""
    buckets = []
    for exponent in range(len(str(limit))):
        buckets += [mantissa * 10**exponent for mantissa in (1, 2, 5)]
    return tuple(bucket for bucket in buckets if bucket <= limit) or (1,)


class EngineCollector(Collector):
    """Reads the instances' state at every scrape."""

    def __init__(self, engine: EngineClient, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not ask the engine, which may not have started."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """One family per metric; one sample per instance, or per group."""
        status = self._engine.status()
        instances = status.instances
        yield from self._front_counters(status.controller_cpu_s)
        yield self._one(
            "num_requests_owned",
            "Accepted requests that have not ended, on an instance or waiting for one",
            status.num_requests,
        )
        yield self._gauge(
            "instance_ready", "1 while the instance takes requests", instances, _is_ready
        )
        yield self._gauge(
            "instance_heartbeat_age_seconds",
            "Time since the instance's last message",
            instances,
            lambda instance: instance.heartbeat_age_s,
        )
        yield self._pages(instances)
        yield from self._load_gauges(instances)
        yield from self._instance_counters(status)
        yield from self._capacity(status)
        yield from self._group_gauges(status)
        yield from self._transition_counters(status)
        yield from overload_families(PREFIX, self._model_name, status)
        yield from self._migration_counters(status)

    def _load_gauges(self, instances: tuple[InstanceStatus, ...]) -> Iterable[Metric]:
        gauges: dict[str, tuple[str, Callable[[GroupLoad], float]]] = {
            "num_requests_running": ("Requests in the running set", lambda load: load.num_running),
            "num_requests_waiting": ("Requests that wait to run", lambda load: load.num_waiting),
            "kv_cache_usage_perc": (
                "Share of the KV cache in use; 1 means all of it", lambda load: load.used_share,
            ),
        }  # fmt: skip
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=_INSTANCE_LABELS)
            # Who is dead, starts or follows in a ring: 0, so that no series breaks off.
            for instance in instances:
                level = 0.0 if instance.load is None else value(instance.load)
                gauge.add_metric(self._labels(instance), level)
            yield gauge

    def _instance_counters(self, status: EngineStatus) -> Iterable[Metric]:
        """Work of each scheduler, and where an instance's time goes: steps, their computing, and
        Python around them. Never back to zero while the front lives."""
        counters: dict[str, tuple[str, Callable[[InstanceCounters], float]]] = {
            "num_preemptions": ("Preemptions", lambda done: done.load.preemptions),
            "num_swapped_out": (
                "Preempted requests copied to host memory", lambda done: done.load.swapped_out,
            ),
            "num_swapped_in": (
                "Requests copied back from host memory", lambda done: done.load.swapped_in,
            ),
            "swap_bytes": (
                "KV copied to host memory and back", lambda done: done.load.swap_bytes,
            ),
            "num_swaps_refused": (
                "Preempted requests that host memory had no room for",
                lambda done: done.load.swap_refused,
            ),
            "prefix_cache_queries": (
                "Prompt tokens looked up in the prefix cache", lambda d: d.load.prefix_queries,
            ),
            "prefix_cache_hits": (
                "Prompt tokens found in the prefix cache", lambda d: d.load.prefix_hits,
            ),
            "instance_prompt_tokens": (
                "Prompt tokens computed by the group that the instance leads",
                lambda done: done.load.prompt_tokens,
            ),
            "instance_generation_tokens": (
                "Tokens generated by the group that the instance leads",
                lambda done: done.load.generated_tokens,
            ),
            "steps": ("Steps done", lambda done: done.timing.steps),
            "step_execute_seconds": (
                "Time in the executor", lambda done: done.timing.execute_ns / 1e9,
            ),
            "step_schedule_seconds": (
                "Time of the instance between steps: scheduling, messages, reports",
                lambda done: done.timing.schedule_ns / 1e9,
            ),
        }  # fmt: skip
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=_INSTANCE_LABELS)
            for instance in status.instances:
                done = status.counters.get(instance.instance, InstanceCounters())
                counter.add_metric(self._labels(instance), value(done))
            yield counter

    def _pages(self, instances: tuple[InstanceStatus, ...]) -> Metric:
        labels = (*_INSTANCE_LABELS, "kind")
        gauge = GaugeMetricFamily(
            PREFIX + "instance_pages", "Physical pages by who owns them", labels=labels
        )
        for instance in instances:
            for kind, pages in instance.pages.items():
                gauge.add_metric([*self._labels(instance), kind], pages)
        return gauge

    def _capacity(self, status: EngineStatus) -> Iterable[Metric]:
        """KVCache of the cluster, beside what it would be if no parameters were dropped."""
        capacity = sum(group.kv_blocks for group in status.groups) * status.block_size
        whole = sum(group.whole_blocks for group in status.groups) * status.block_size
        used = sum(group.used_blocks for group in status.groups) * status.block_size
        queued = sum(group.queued_blocks for group in status.groups) * status.block_size
        gauges = {
            "kv_capacity_tokens": ("KV cache of all groups now, in tokens", capacity),
            "kv_capacity_tokens_whole": (
                "KV cache that the same instances have without a drop, in tokens", whole,
            ),
            "kv_used_tokens": ("KV cache in use, in tokens", used),
            "kv_queued_tokens": (
                "KV cache that waiting requests need for their tokens so far, in tokens", queued,
            ),
            "kv_capacity_usage_perc": (
                "Share of kv_capacity_tokens in use; 1 means all of it", _share(used, capacity),
            ),
            "kv_capacity_usage_perc_whole": (
                "KV cache in use as a share of kv_capacity_tokens_whole; more than 1 would not "
                "have fit without a drop",
                _share(used, whole),
            ),
            "parameter_dropped_bytes": (
                "Memory of dropped parameters that KV cache has now", status.dropped_bytes,
            ),
            "layout_epoch": ("Epoch of the newest layout", status.epoch),
        }  # fmt: skip
        for name, (text, value) in gauges.items():
            yield self._one(name, text, value)

    def _group_gauges(self, status: EngineStatus) -> Iterable[Metric]:
        gauges: dict[str, tuple[str, Callable[[GroupStatus], float]]] = {
            "group_size": ("Instances of the group", lambda group: len(group.group.stages)),
            "group_epoch": ("Epoch of the group", lambda group: group.group.epoch),
            "group_kv_capacity_tokens": (
                "KV cache of the group, in tokens",
                lambda group: group.kv_blocks * status.block_size,
            ),
            "group_in_transition": (
                "1 while a transition changes the group",
                lambda group: group.in_transition is not None,
            ),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=_GROUP_LABELS)
            for group in status.groups:
                labels = [self._model_name, str(group.group.id), str(group.group.leader)]
                gauge.add_metric(labels, float(value(group)))
            yield gauge

    def _transition_counters(self, status: EngineStatus) -> Iterable[Metric]:
        totals = status.totals
        outcomes = CounterMetricFamily(
            PREFIX + "transitions",
            "Transitions between layouts that ended",
            labels=("model_name", "kind", "outcome"),
        )
        for (kind, outcome), number in totals.outcomes.items():
            outcomes.add_metric([self._model_name, kind, outcome], number)
        yield outcomes
        phases = CounterMetricFamily(
            PREFIX + "transition_phase_seconds",
            "Time that transitions spent in each phase",
            labels=("model_name", "kind", "phase"),
        )
        for (kind, phase), elapsed_ns in totals.phase_ns.items():
            phases.add_metric([self._model_name, kind, phase], elapsed_ns / 1e9)
        yield phases
        counters = {
            "transition_exchanged_bytes": (
                "KV moved between instances after a change of layout", totals.exchanged_bytes,
            ),
            "transition_gathered_bytes": (
                "KV moved ahead of a restore, while its requests decoded", totals.gathered_bytes,
            ),
            "transition_gained_bytes": (
                "Parameters loaded again, from peers or files", totals.gained_bytes,
            ),
            "requests_stalled": (
                "Requests that waited for their KV to move", totals.stalled_requests,
            ),
            "request_stall_seconds": ("Their waiting, summed up", totals.stalled_ns / 1e9),
            "degraded_seconds": ("Time with parameters dropped", totals.degraded_ns / 1e9),
        }  # fmt: skip
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=_LABELS)
            counter.add_metric([self._model_name], value)
            yield counter

    def _migration_counters(self, status: EngineStatus) -> Iterable[Metric]:
        """Requests that moved between instances, with `--policy migrate`."""
        totals = status.migrations
        yield self._one("num_migrations_running", "Live migrations under way", totals.num_running)
        outcomes = CounterMetricFamily(
            PREFIX + "migrations",
            "Live migrations of running requests that ended",
            labels=("model_name", "outcome"),
        )
        for outcome, number in totals.outcomes.items():
            outcomes.add_metric([self._model_name, outcome], number)
        yield outcomes
        counters = {
            "migrated_bytes": ("KV copied by live migrations", totals.moved_bytes),
            "redispatched_requests": (
                "Queued requests taken back from an instance for another one", totals.redispatched,
            ),
        }  # fmt: skip
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=_LABELS)
            counter.add_metric([self._model_name], value)
            yield counter

    def _front_counters(self, controller_cpu_s: float) -> Iterable[Metric]:
        """CPU time of the front's threads. Scraped on the HTTP thread, so that its own counts."""
        seconds = {
            "controller_cpu_seconds": ("CPU time of the controller's thread", controller_cpu_s),
            "http_cpu_seconds": ("CPU time of the HTTP thread", time.thread_time()),
        }
        for name, (text, value) in seconds.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=_LABELS)
            counter.add_metric([self._model_name], value)
            yield counter

    def _one(self, name: str, text: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(PREFIX + name, text, labels=_LABELS)
        gauge.add_metric([self._model_name], value)
        return gauge

    def _gauge(
        self,
        name: str,
        text: str,
        instances: tuple[InstanceStatus, ...],
        value: Callable[[InstanceStatus], float],
    ) -> Metric:
        gauge = GaugeMetricFamily(PREFIX + name, text, labels=_INSTANCE_LABELS)
        for instance in instances:
            gauge.add_metric(self._labels(instance), value(instance))
        return gauge

    def _labels(self, instance: InstanceStatus) -> list[str]:
        return [self._model_name, str(instance.instance)]


def _is_ready(instance: InstanceStatus) -> float:
    return float(instance.state == "ready")


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


class ServerMetrics:
    """All metrics of one server, in a registry of its own. `slo`: what answers are judged by."""

    def __init__(self, engine: EngineClient, model_name: str, slo: Slo) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine, model_name))
        ProcessCollector(registry=self.registry)
        lengths = _count_buckets(max(engine.max_model_len, 1))

        def counter(name: str, text: str) -> Counter:
            return Counter(PREFIX + name, text, _LABELS, registry=self.registry).labels(model_name)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            full = Histogram(PREFIX + name, text, _LABELS, buckets=buckets, registry=self.registry)
            return full.labels(model_name)

        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that started")
        self.generation_tokens = counter("generation_tokens", "Tokens delivered")
        success = Counter(
            PREFIX + "request_success",
            "Accepted sequences that ended, by reason; abort: the client went away",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        self.finished = {
            reason.value: success.labels(model_name, reason.value) for reason in FinishReason
        }
        refused = Counter(
            PREFIX + "request_refused",
            "HTTP requests that the server refused or failed, by kind",
            ("model_name", "kind"),
            registry=self.registry,
        )
        self.refused = {kind: refused.labels(model_name, kind) for kind in _REFUSALS}
        self.ttft = histogram(
            "time_to_first_token_seconds", "Arrival to first token", _TTFT_BUCKETS
        )
        self.queue_time = histogram(
            "request_queue_time_seconds",
            "Arrival to leaving the queue for the first step, of requests with a token",
            _REQUEST_BUCKETS,
        )
        self.inter_token = histogram(
            "inter_token_latency_seconds", "Between deliveries of tokens", _TOKEN_BUCKETS
        )
        self.per_output_token = histogram(
            "request_time_per_output_token_seconds",
            "Mean time per token after the first, by request",
            _TOKEN_BUCKETS,
        )
        self.e2e = histogram("e2e_request_latency_seconds", "Arrival to end", _REQUEST_BUCKETS)
        self.prompt_length = histogram("request_prompt_tokens", "Prompt tokens", lengths)
        self.generation_length = histogram("request_generation_tokens", "Output tokens", lengths)
        self.max_tokens = histogram("request_params_max_tokens", "Asked output tokens", lengths)
        self.n = histogram("request_params_n", "Asked answers per prompt", (1, 2, 5, 10, 20))
        self.slo = SloMetrics(self.registry, model_name, slo)

    def render(self) -> bytes:
        """The exposition text (version 0.0.4)."""
        return generate_latest(self.registry)


class SloMetrics:
    """Answers that kept what clients are promised, and those that did not. Without a promise the
    gauges are 0 and nothing is counted."""

    def __init__(self, registry: CollectorRegistry, model_name: str, slo: Slo) -> None:
        self._slo = slo
        promises = {
            "ttft": ("slo_ttft_seconds", "Promised time to first token; 0: none", slo.ttft_s),
            "tpot": ("slo_tpot_seconds", "Promised time per token after it; 0: none", slo.tpot_s),
        }
        for name, text, seconds in promises.values():
            gauge = Gauge(PREFIX + name, text, _LABELS, registry=registry)
            gauge.labels(model_name).set(seconds or 0.0)
        self._attained = Counter(
            PREFIX + "slo_attained_requests",
            "Accepted sequences that ended within all promised times",
            _LABELS,
            registry=registry,
        ).labels(model_name)
        self._goodput = Counter(
            PREFIX + "goodput_tokens", "Output tokens of those", _LABELS, registry=registry
        ).labels(model_name)
        violated = Counter(
            PREFIX + "slo_violated_requests",
            "Accepted sequences that ended and took longer than promised, by the promise broken",
            ("model_name", "slo"),
            registry=registry,
        )
        self._violated = {name: violated.labels(model_name, name) for name in promises}

    def judge(self, ttft_s: float, tpot_s: float | None, tokens: int) -> None:
        """An answer of `tokens` ended; `tpot_s` None: it has no token after the first."""
        if not self._slo.is_given:
            return
        broken = self._slo.broken(ttft_s, tpot_s)
        for name in broken:
            self._violated[name].inc()
        if not broken:
            self._attained.inc()
            self._goodput.inc(tokens)


class RequestTimer:
    """Times one HTTP request and counts how it ended: refused, failed, or by its sequences."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self.metrics = metrics
        self.arrival_s = time.monotonic()
        self.started = False
        self._failed = False
        self._sequences: list[SequenceTimer] = []

    def sequence(self, prompt_tokens: int) -> SequenceTimer:
        """The timer of one more sequence of this request."""
        timer = SequenceTimer(self, prompt_tokens)
        self._sequences.append(timer)
        return timer

    def fail(self, error: Exception) -> None:
        """The client is told `error`; only the first call counts."""
        if self._failed:
            return
        self._failed = True
        self.metrics.refused[self._kind(error)].inc()

    def _kind(self, error: Exception) -> str:
        if isinstance(error, QueueFullError):
            return "queue_full"
        if isinstance(error, ServiceUnavailableError):  # after a token it is no refusal any more
            return "failed" if self.started else "unavailable"
        return "invalid" if to_http_error(error).status < 500 else "failed"

    def close(self) -> None:
        """Nothing more will come: unless the server failed, the client left what is open."""
        if self._failed:
            return
        for timer in self._sequences:
            timer.end(FinishReason.ABORT.value)


class SequenceTimer:
    """Times one sequence from its request's arrival to its end."""

    def __init__(self, request: RequestTimer, prompt_tokens: int) -> None:
        self._request = request
        self._metrics = request.metrics
        self._prompt_tokens = prompt_tokens
        self._first_s = 0.0
        self._last_s = 0.0
        self._count = 0
        self._ended = False

    def tokens(self, count: int) -> None:
        """`count` tokens came together, now."""
        if not count or self._ended:
            return
        now = time.monotonic()
        self._request.started = True
        if self._count == 0:
            self._first_s = now
            self._metrics.ttft.observe(now - self._request.arrival_s)
            self._metrics.prompt_tokens.inc(self._prompt_tokens)
            self._metrics.prompt_length.observe(self._prompt_tokens)
        else:
            self._metrics.inter_token.observe(now - self._last_s)
        self._last_s = now
        self._count += count
        self._metrics.generation_tokens.inc(count)

    def queued(self, elapsed_s: float) -> None:
        """The sequence waited so long for its first step."""
        self._metrics.queue_time.observe(elapsed_s)

    def end(self, reason: str) -> None:
        """The sequence ended; only the first call counts."""
        if self._ended:
            return
        self._ended = True
        self._metrics.finished[reason].inc()
        if reason == FinishReason.ABORT.value:
            return
        e2e_s = time.monotonic() - self._request.arrival_s
        self._metrics.e2e.observe(e2e_s)
        self._metrics.generation_length.observe(self._count)
        per_token_s = None
        if self._count > 1:
            per_token_s = (self._last_s - self._first_s) / (self._count - 1)
            self._metrics.per_output_token.observe(per_token_s)
        ttft_s = self._first_s - self._request.arrival_s if self._count else e2e_s
        self._metrics.slo.judge(ttft_s, per_token_s, self._count)
