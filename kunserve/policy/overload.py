"""Sees overload coming: demand against capacity of every group, at every step (paper, mechanism 1).

    demand = KV of running requests + what queued requests need, in blocks

What is measured here is cheap, O(1) for each report; the costly estimate of what a change would
win (`kunserve.policy.governor`) is made only once this says that demand exceeds capacity, or will
within `IMMINENT_NS` if it goes on rising as it does.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from kunserve.core.decision import Shortage
from kunserve.policy.book import GroupRecord

IMMINENT_NS = 2_000_000_000
"""So far ahead the monitor looks: dropping takes a tenth of a second, and the estimate a few ms."""

SLOPE_STEP_NS = 200_000_000
SLOPE_STEPS = 5
FEWEST_STEPS = 3
LEAST_RATE_WINDOW_NS = 1_000_000_000
SHORTAGE_LASTS_NS = 1_000_000_000
SHORTAGE_ENDS_NS = 10_000_000_000
RATE_WINDOW_NS = 3_000_000_000
MEAN_OF_ARRIVALS = 64
KEPT_LENGTHS = 512
FEWEST_LENGTHS = 8


def demand_blocks(record: GroupRecord) -> int:
    """KV that a group's running requests hold and its queued ones need, with leases that are still
    on the way."""
    load, on_the_way = record.load, record.unseen_blocks
    if load is None:
        return on_the_way
    return load.total_blocks - load.available_blocks + load.queued_blocks + on_the_way


def capacity_blocks(record: GroupRecord) -> int:
    """KV blocks that a group has now."""
    return record.load.total_blocks if record.load is not None else record.total_blocks


@dataclass(frozen=True)
class Pressure:
    """A group's demand now, and how fast it rises."""

    demand_blocks: int
    capacity_blocks: int
    slope_blocks_per_s: float

    @property
    def is_reached(self) -> bool:
        """Demand exceeds capacity."""
        return self.demand_blocks > self.capacity_blocks

    @property
    def is_imminent(self) -> bool:
        """It does, or will soon."""
        rise = max(0.0, self.slope_blocks_per_s) * IMMINENT_NS / 1e9
        return self.demand_blocks + rise > self.capacity_blocks


class DemandMonitor:
    """Demand of one group over the last second.

    Its slope is the median over steps of `SLOPE_STEP_NS`, so that many arrivals at once, which are
    no trend, do not count as one; what they need is demand already.
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[int, int]] = deque(maxlen=SLOPE_STEPS + 1)

    def observe(self, demand: int, capacity: int, now_ns: int) -> Pressure:
        """Take in a group's demand of now."""
        samples = self._samples
        if samples and now_ns - samples[-1][0] > SLOPE_STEPS * SLOPE_STEP_NS:
            samples.clear()
        if not samples or now_ns - samples[-1][0] >= SLOPE_STEP_NS:
            samples.append((now_ns, demand))
        return Pressure(demand, capacity, self._slope_blocks_per_s())

    def _slope_blocks_per_s(self) -> float:
        if len(self._samples) <= FEWEST_STEPS:
            return 0.0
        return median(
            (after - before) * 1e9 / (until_ns - since_ns)
            for (since_ns, before), (until_ns, after) in pairwise(self._samples)
        )


class ShortageSignal:
    """The autoscale signal: raised when demand has been lacking room for a while, and taken back
    when it has not for a longer one, so that it does not flap."""

    def __init__(self) -> None:
        self._shown = Shortage(0, 0)
        self._since_ns: int | None = None
        self._quiet_ns: int | None = None

    def observe(self, shortage: Shortage, now_ns: int) -> Shortage | None:
        """Take in what is lacking now; returns the signal if it changes."""
        if not shortage.lacking_blocks:
            self._since_ns = None
            if self._quiet_ns is None:
                self._quiet_ns = now_ns
            is_over = now_ns - self._quiet_ns >= SHORTAGE_ENDS_NS
            return self._show(shortage) if is_over else None
        self._quiet_ns = None
        if self._since_ns is None:
            self._since_ns = now_ns
        if now_ns - self._since_ns < SHORTAGE_LASTS_NS:
            return None
        more = shortage.instances_wanted > self._shown.instances_wanted
        return self._show(shortage) if more else None

    def _show(self, shortage: Shortage) -> Shortage | None:
        if shortage.instances_wanted == self._shown.instances_wanted:
            return None
        self._shown = shortage
        return shortage


class Arrivals:
    """What comes in: how often, how long its prompts are, and how many tokens it asks for."""

    def __init__(self, since_ns: int) -> None:
        self._since_ns = since_ns
        self._times_ns: deque[int] = deque()
        self._prompts: deque[int] = deque(maxlen=MEAN_OF_ARRIVALS)
        self._limits: deque[int] = deque(maxlen=MEAN_OF_ARRIVALS)

    def add(self, prompt_tokens: int, max_tokens: int, now_ns: int) -> None:
        """A request arrived."""
        self._times_ns.append(now_ns)
        self._prompts.append(prompt_tokens)
        self._limits.append(max_tokens)

    def per_s(self, now_ns: int) -> float:
        """Requests per second over the last seconds."""
        while self._times_ns and now_ns - self._times_ns[0] > RATE_WINDOW_NS:
            self._times_ns.popleft()
        window_ns = min(RATE_WINDOW_NS, max(LEAST_RATE_WINDOW_NS, now_ns - self._since_ns))
        return len(self._times_ns) * 1e9 / window_ns

    @property
    def mean_prompt_tokens(self) -> float:
        """Of the last arrivals; 0 before the first."""
        return sum(self._prompts) / len(self._prompts) if self._prompts else 0.0

    @property
    def mean_max_tokens(self) -> int:
        """Likewise: most output tokens that they ask for."""
        return sum(self._limits) // len(self._limits) if self._limits else 0


class OutputLengths:
    """How long answers are, from those that ended lately: what is left of one that goes on.

    The mean of the longer ones, less what there is already (the mean residual life). Before enough
    have ended, half of what `max_tokens` still allows.
    """

    def __init__(self) -> None:
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []

    def add(self, output_tokens: int) -> None:
        """An answer ended."""
        self._recent.append(output_tokens)
        insort(self._sorted, output_tokens)
        if len(self._recent) > KEPT_LENGTHS:
            self._sorted.pop(bisect_right(self._sorted, self._recent.popleft()) - 1)

    def remaining(self, generated: int, max_tokens: int) -> float:
        """Tokens that a request with `generated` of at most `max_tokens` will still get, at least
        one."""
        most = max(1, max_tokens - generated)
        longer = self._sorted[bisect_right(self._sorted, generated) :]
        if len(self._sorted) < FEWEST_LENGTHS or not longer:
            return max(1.0, most / 2)
        mean = sum(min(length, max_tokens) for length in longer) / len(longer)
        return min(float(most), max(1.0, mean - generated))
