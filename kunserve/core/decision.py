"""What the overload policy decided and why, as values for the log, metrics and the simulator."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kunserve.core.ids import InstanceId


class Verdict(Enum):
    """What became of a candidate for a change of layout."""

    ACT = "act"
    """It is wished for."""
    WOULD_ACT = "would act"
    """It pays, but the policy only observes."""
    NO_NEED = "no need"
    """Demand rose for a moment, but nobody is expected to wait for memory."""
    NO_GAIN = "no gain"
    """Waiting would not fall by enough."""
    COMPUTE_BOUND = "compute bound"
    """The queue waits for computing, not for memory."""
    NOT_POSSIBLE = "not possible"
    """No split of the layers, or not by drops alone."""


@dataclass(frozen=True)
class Waits:
    """Predicted waiting until the first token, summed over the queue and the arrivals of the
    horizon, in request-nanoseconds. `attained`: how many of them keep the SLOs, of `requests`."""

    memory_ns: float = 0.0
    compute_ns: float = 0.0
    requests: int = 0
    attained: int = 0

    @property
    def total_ns(self) -> float:
        """Waiting for whatever reason."""
        return self.memory_ns + self.compute_ns

    def __add__(self, other: Waits) -> Waits:
        return Waits(
            self.memory_ns + other.memory_ns,
            self.compute_ns + other.compute_ns,
            self.requests + other.requests,
            self.attained + other.attained,
        )


@dataclass(frozen=True)
class Decision:
    """One candidate, every term of its estimate, and the verdict (design section 5).

    `kind`: "drop" or "restore". `groups`: instances of the groups it would change.
    `demand_blocks`, `capacity_blocks`: now, over these groups; `new_capacity_blocks` afterwards.
    `freed_blocks_per_s` is rho: what running requests give back as they end. `stay` and `change`:
    waiting without and with it; `stall_ns`: what running requests pay for the change, summed.
    `is_reached`: demand exceeds capacity already, else it is about to.
    """

    number: int
    kind: str
    verdict: Verdict
    groups: tuple[tuple[InstanceId, ...], ...]
    demand_blocks: int
    capacity_blocks: int
    is_reached: bool
    new_capacity_blocks: int = 0
    running: int = 0
    queued: int = 0
    arrivals_per_s: float = 0.0
    freed_blocks_per_s: float = 0.0
    stay: Waits = Waits()
    change: Waits = Waits()
    stall_ns: float = 0.0
    reason: str = ""

    @property
    def saved_ns(self) -> float:
        """By how much waiting falls, less what the change costs."""
        return self.stay.total_ns - self.change.total_ns - self.stall_ns


@dataclass(frozen=True)
class Realised:
    """The waits that came true of the requests that were queued at a decision, when the last of
    them has started or ended. `predicted_ns`: their share of the estimate that was acted on."""

    number: int
    requests: int
    predicted_ns: float
    realised_ns: int


@dataclass(frozen=True)
class Shortage:
    """Dropping cannot free what is needed: recompute takes over, and more instances would help.

    0 blocks: it is over.
    """

    lacking_blocks: int
    instances_wanted: int


DecisionNote = Decision | Realised | Shortage
