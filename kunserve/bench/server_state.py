"""What a kunserve server says of itself (/metrics) and what the kernel says of its processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

_PREFIX = "kunserve:"


@dataclass(frozen=True)
class TimeCounters:
    """Totals in seconds since the server's start, over all instances.

    `step_execute_seconds`: computing. `step_schedule_seconds`: the instances' Python between
    steps. `controller_cpu_seconds`, `http_cpu_seconds`: the front's two threads.
    """

    step_execute_seconds: float
    step_schedule_seconds: float
    controller_cpu_seconds: float
    http_cpu_seconds: float

    def since(self, before: TimeCounters) -> TimeCounters:
        """What was added after `before`."""
        return TimeCounters(
            *(getattr(self, f.name) - getattr(before, f.name) for f in fields(self))
        )

    @property
    def overhead_share(self) -> float:
        """HTTP, controller and scheduling as a share of the time that steps compute."""
        around = self.step_schedule_seconds + self.controller_cpu_seconds + self.http_cpu_seconds
        return around / self.step_execute_seconds if self.step_execute_seconds else 0.0


def read_time_counters(base_url: str, api_key: str | None = None) -> TimeCounters | None:
    """The server's time counters; None if it has no such metrics (another server, no key)."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        response = httpx.get(
            f"{base_url.rstrip('/')}/metrics", headers=headers, timeout=10.0, trust_env=False
        )
    except (httpx.HTTPError, httpx.InvalidURL):
        return None
    if response.status_code != httpx.codes.OK:
        return None
    try:
        totals = sample_sums(response.text)
    except ValueError:
        return None
    names = [f"{f.name}_total" for f in fields(TimeCounters)]
    return TimeCounters(*(totals[n] for n in names)) if all(n in totals for n in names) else None


def sample_sums(text: str) -> dict[str, float]:
    """kunserve's metrics by the name of their samples without the prefix, summed over labels.

    Raises:
        ValueError: this is no text of metrics.
    """
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples if family.name.startswith(_PREFIX) else ():
            name = sample.name.removeprefix(_PREFIX)
            totals[name] = totals.get(name, 0.0) + sample.value
    return totals


def process_tree_pss(pid: int) -> Iterator[tuple[int, int]]:
    """(pid, proportional set size in bytes) of a process and all below it, parents first."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    line = next(line for line in rollup.splitlines() if line.startswith("Pss:"))
    yield pid, int(line.split()[1]) * 1024
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text(encoding="ascii").split():
            yield from process_tree_pss(int(child))
