"""The log line every 10 s, in vLLM's form, one per instance that works."""

from __future__ import annotations

import logging
import time

from kunserve.core.ids import InstanceId
from kunserve.core.step import GroupLoad
from kunserve.runtime.status import ClusterView

logger = logging.getLogger("kunserve.stats")

INTERVAL_S = 10.0


class StatsLogger:
    """Watches snapshots of the cluster and logs rates between them.

    An instance that was idle through the whole interval is not logged.
    """

    def __init__(self) -> None:
        self._last_s = time.monotonic()
        self._last: dict[InstanceId, GroupLoad] = {}

    def observe(self, view: ClusterView) -> None:
        """Take in a snapshot; called on every tick of the cluster."""
        now_s = time.monotonic()
        elapsed_s = now_s - self._last_s
        if elapsed_s < INTERVAL_S:
            return
        self._last_s = now_s
        for instance in view.instances:
            if instance.load is None:
                continue
            before = self._last.get(instance.instance, instance.load)
            if instance.load.prompt_tokens < before.prompt_tokens:  # a new incarnation
                before = instance.load
            self._last[instance.instance] = instance.load
            line = describe_interval(before, instance.load, elapsed_s)
            if line:
                logger.info("Engine %03d: %s", instance.instance, line)


def describe_interval(before: GroupLoad, after: GroupLoad, elapsed_s: float) -> str:
    """What happened between two loads `elapsed_s` apart; empty if nothing did."""
    prompt = after.prompt_tokens - before.prompt_tokens
    generated = after.generated_tokens - before.generated_tokens
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
