"""What instances did since the front started, and the log line of it every 10 s in vLLM's form.

A scheduler counts from zero in every new epoch of its group, and an instance process after every
restart; an instance that follows in a ring reports nothing at all. `CounterSums` watches each
snapshot of the cluster and adds up what came since, so that totals only ever grow.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import NamedTuple, Self, TypeVar

from kunserve.core.events import StepTiming
from kunserve.core.ids import Epoch, GroupId, InstanceId
from kunserve.core.step import GroupLoad
from kunserve.runtime.status import ClusterView, GroupStatus, InstanceStatus

logger = logging.getLogger("kunserve.stats")

INTERVAL_S = 10.0


@dataclass(frozen=True)
class LoadCounts:
    """The counters of a `GroupLoad`, by their names there. In tokens, but for
    `preemptions` and what is swapped."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    swapped_out: int = 0
    swapped_in: int = 0
    swap_bytes: int = 0
    swap_refused: int = 0

    @classmethod
    def of(cls, load: GroupLoad) -> Self:
        """What one scheduler has counted."""
        return cls(*(getattr(load, f.name) for f in fields(cls)))


@dataclass(frozen=True)
class InstanceCounters:
    """What one instance did since the front started, in all its incarnations, groups and epochs.
    Work of a whole group counts on the leader."""

    load: LoadCounts = LoadCounts()
    timing: StepTiming = StepTiming()


_Counts = TypeVar("_Counts", LoadCounts, StepTiming)


class _Scheduler(NamedTuple):
    """Whose counters a load holds: they begin at zero when one of these changes."""

    pid: int | None
    group: GroupId | None
    epoch: Epoch | None


class CounterSums:
    """Adds up counters that restart.

    Written by one thread, the one that takes the snapshots; `totals` may be read by any.
    What an instance counts between its last snapshot and the end of its epoch is not seen.
    """

    def __init__(self) -> None:
        self._totals: Mapping[InstanceId, InstanceCounters] = MappingProxyType({})
        self._loads: dict[InstanceId, tuple[_Scheduler, LoadCounts]] = {}
        self._timings: dict[InstanceId, tuple[int | None, StepTiming]] = {}

    @property
    def totals(self) -> Mapping[InstanceId, InstanceCounters]:
        """Totals of every instance that has ever been seen. A snapshot: it does not change."""
        return self._totals

    def observe(self, view: ClusterView) -> None:
        """Take in a snapshot; called on every tick of the cluster."""
        led = {status.group.leader: status for status in view.groups}
        totals = dict(self._totals)
        for instance in view.instances:
            before = totals.get(instance.instance, InstanceCounters())
            totals[instance.instance] = InstanceCounters(
                _plus(before.load, self._load_since(instance, led.get(instance.instance))),
                _plus(before.timing, self._timing_since(instance)),
            )
        self._totals = MappingProxyType(totals)

    def _load_since(self, instance: InstanceStatus, led: GroupStatus | None) -> LoadCounts:
        if instance.load is None:
            return LoadCounts()
        whose = _Scheduler(
            instance.pid, led.group.id if led else None, led.group.epoch if led else None
        )
        counts = LoadCounts.of(instance.load)
        last_whose, last = self._loads.get(instance.instance, (whose, LoadCounts()))
        self._loads[instance.instance] = whose, counts
        return _since(counts, last) if whose == last_whose else counts

    def _timing_since(self, instance: InstanceStatus) -> StepTiming:
        """An instance times its steps from its own start, through all epochs that it leads."""
        timing = instance.timing
        if timing == StepTiming():  # it leads no group, or has not reported yet
            return timing
        last_pid, last = self._timings.get(instance.instance, (instance.pid, StepTiming()))
        self._timings[instance.instance] = instance.pid, timing
        return _since(timing, last) if instance.pid == last_pid else timing


def _since(after: _Counts, before: _Counts) -> _Counts:
    """What came after `before`. Counters only grow: where one has gone down, all began again."""
    pairs = [(getattr(after, f.name), getattr(before, f.name)) for f in fields(after)]
    if any(new < old for new, old in pairs):
        return after
    return type(after)(*(new - old for new, old in pairs))


def _plus(one: _Counts, other: _Counts) -> _Counts:
    return type(one)(*(getattr(one, f.name) + getattr(other, f.name) for f in fields(one)))


class StatsLogger:
    """Logs rates between snapshots of the cluster.

    An instance that did nothing through the whole interval is not logged; nor is one that follows
    in a ring, whose work shows on the leader's line.
    """

    def __init__(self) -> None:
        self.sums = CounterSums()
        self._last_s = time.monotonic()
        self._logged: Mapping[InstanceId, InstanceCounters] = {}

    def observe(self, view: ClusterView) -> None:
        """Take in a snapshot; called on every tick of the cluster."""
        self.sums.observe(view)
        now_s = time.monotonic()
        elapsed_s = now_s - self._last_s
        if elapsed_s < INTERVAL_S:
            return
        self._last_s = now_s
        before, self._logged = self._logged, self.sums.totals
        rings = {
            status.group.leader: "+".join(map(str, status.group.instances))
            for status in view.groups
            if len(status.group.stages) > 1
        }
        for instance in view.instances:
            id_ = instance.instance
            counts = self._logged[id_].load
            line = describe_interval(
                _since(counts, before.get(id_, InstanceCounters()).load),
                counts,
                instance.load,
                elapsed_s,
            )
            if line:
                ring = f" (leads {rings[id_]})" if id_ in rings else ""
                logger.info("Engine %03d%s: %s", id_, ring, line)


def describe_interval(
    done: LoadCounts, total: LoadCounts, load: GroupLoad | None, elapsed_s: float
) -> str:
    """What an instance did in `elapsed_s`; empty if nothing.

    Args:
        done: in the interval.
        total: since the start, for the hit rate.
        load: now; None while the instance leads no group.
    """
    running, waiting = (load.num_running, load.num_waiting) if load else (0, 0)
    if not (done.prompt_tokens or done.generated_tokens or running or waiting):
        return ""
    queries = total.prefix_queries
    return (
        f"Avg prompt throughput: {done.prompt_tokens / elapsed_s:.1f} tokens/s, "
        f"Avg generation throughput: {done.generated_tokens / elapsed_s:.1f} tokens/s, "
        f"Running: {running} reqs, Waiting: {waiting} reqs, "
        f"KV cache usage: {load.used_share if load else 0.0:.1%}, "
        f"Prefix cache hit rate: {total.prefix_hits / queries if queries else 0.0:.1%}"
    )
