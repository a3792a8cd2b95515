"""The log line every 10 s, in vLLM's form, one per instance that works."""

from __future__ import annotations

import logging
import time

from kunserve.core.ids import InstanceId
from kunserve.core.step import GroupLoad
from kunserve.runtime.status import ClusterView

logger = logging.getLogger("kunserve.stats")

INTERVAL_S = 10.0
_COUNTERS = (
    "leases_seen",
    "prompt_tokens",
    "generated_tokens",
    "preemptions",
    "prefix_queries",
    "prefix_hits",
)


class StatsLogger:
    """Watches snapshots of the cluster and logs rates between them.

    An instance that was idle through the whole interval is not logged.
    """

    def __init__(self) -> None:
        self._last_s = time.monotonic()
        self._logged: dict[InstanceId, GroupLoad] = {}
        """What each instance's present incarnation had done at the end of the last interval."""

    def observe(self, view: ClusterView) -> None:
        """Take in a snapshot; called on every tick of the cluster."""
        for instance in view.instances:
            if instance.load is None:  # its successor begins again
                self._logged.pop(instance.instance, None)
        now_s = time.monotonic()
        elapsed_s = now_s - self._last_s
        if elapsed_s < INTERVAL_S:
            return
        self._last_s = now_s
        for instance in view.instances:
            if instance.load is None:
                continue
            before = self._logged.get(instance.instance)
            self._logged[instance.instance] = instance.load
            line = describe_interval(before, instance.load, elapsed_s)
            if line:
                logger.info("Engine %03d: %s", instance.instance, line)


def describe_interval(before: GroupLoad | None, after: GroupLoad, elapsed_s: float) -> str:
    """What happened between two loads `elapsed_s` apart; empty if nothing did.

    Counted from zero where there is no load before, or where that is another incarnation's.
    """
    prompt, generated = after.prompt_tokens, after.generated_tokens
    if before is not None and not _restarted(before, after):
        prompt -= before.prompt_tokens
        generated -= before.generated_tokens
    if not (prompt or generated or after.num_running or after.num_waiting):
        return ""
    queries = after.prefix_queries
    return (
        f"Avg prompt throughput: {prompt / elapsed_s:.1f} tokens/s, "
        f"Avg generation throughput: {generated / elapsed_s:.1f} tokens/s, "
        f"Running: {after.num_running} reqs, Waiting: {after.num_waiting} reqs, "
        f"KV cache usage: {after.used_share:.1%}, "
        f"Prefix cache hit rate: {after.prefix_hits / queries if queries else 0.0:.1%}"
    )


def _restarted(before: GroupLoad, after: GroupLoad) -> bool:
    """Counters only grow: where one has gone down, an instance was replaced."""
    return any(getattr(after, name) < getattr(before, name) for name in _COUNTERS)
