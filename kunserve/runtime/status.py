"""Snapshots of the running cluster for other threads: frozen, taken by the controller's thread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kunserve.core.decision import Decision
from kunserve.core.events import StepTiming
from kunserve.core.ids import InstanceId
from kunserve.core.layout import Group
from kunserve.core.step import GroupLoad
from kunserve.core.transition import TransitionRecord


@dataclass(frozen=True)
class InstanceStatus:
    """One instance as the front sees it.

    `state` is "starting", "ready", "resetting", "draining", "drained", "waiting for restart" or
    "dead". `load` is the group's, on its leader alone; `timing` is each instance's own. `pages` by
    kind of owner: "part", "kv", "free", ... . `costs`: constants of its cost model, as in
    `InstanceReady`. `heartbeat_age_s` counts from the last message of the instance to the moment
    of the snapshot.
    """

    instance: InstanceId
    pid: int | None
    state: str
    heartbeat_age_s: float
    load: GroupLoad | None
    timing: StepTiming = StepTiming()
    pages: Mapping[str, int] = field(default_factory=dict)
    costs: tuple[float, ...] = ()


@dataclass(frozen=True)
class GroupStatus:
    """One group that serves. `kv_blocks` are usable by its scheduler now; `whole_blocks` is what
    its members would have as whole instances. `in_transition` names the state of the transition
    that the group takes part in, or None."""

    group: Group
    kv_blocks: int
    whole_blocks: int
    num_requests: int
    load: GroupLoad | None
    in_transition: str | None = None

    @property
    def used_blocks(self) -> int:
        """Blocks that requests refer to; none while the group has not reported."""
        return self.load.total_blocks - self.load.available_blocks if self.load else 0

    @property
    def queued_blocks(self) -> int:
        """Blocks that its waiting requests need for all tokens known so far."""
        return self.load.queued_blocks if self.load else 0


@dataclass(frozen=True)
class TransitionTotals:
    """Sums over all transitions since the start. `outcomes`: count by (kind, outcome); `phase_ns`
    by (kind, phase)."""

    outcomes: Mapping[tuple[str, str], int] = field(default_factory=dict)
    phase_ns: Mapping[tuple[str, str], int] = field(default_factory=dict)
    exchanged_bytes: int = 0
    gathered_bytes: int = 0
    gained_bytes: int = 0
    stalled_requests: int = 0
    stalled_ns: int = 0
    degraded_ns: int = 0


@dataclass(frozen=True)
class DecisionTotals:
    """Sums over all decisions of the overload policy since the start.

    `verdicts`: count by (kind, verdict). `saved_ns`: waiting that drops were expected to save, by
    verdict (act, would act). `predicted_ns` and `realised_ns`: waits of the `watched` requests that
    were queued at decisions. `instances_wanted`: by the autoscale signal, now.
    """

    verdicts: Mapping[tuple[str, str], int] = field(default_factory=dict)
    saved_ns: Mapping[str, float] = field(default_factory=dict)
    watched: int = 0
    predicted_ns: float = 0.0
    realised_ns: int = 0
    lacking_blocks: int = 0
    instances_wanted: int = 0


@dataclass(frozen=True)
class MigrationTotals:
    """Sums over all migrations since the start. `outcomes`: count by outcome; `moved_bytes`: KV
    that was copied for them; `redispatched`: requests that were taken back from a queue.
    `num_running`: under way now."""

    num_running: int = 0
    outcomes: Mapping[str, int] = field(default_factory=dict)
    moved_bytes: int = 0
    redispatched: int = 0


@dataclass(frozen=True)
class ClusterView:
    """The cluster at `at_ns` on the monotonic clock: a controller that stands still shows by its
    view growing old. `cpu_ns` is the time that the controller's thread has computed."""

    ready: bool = False
    draining: bool = False
    num_requests: int = 0
    instances: tuple[InstanceStatus, ...] = ()
    groups: tuple[GroupStatus, ...] = ()
    epoch: int = 0
    block_size: int = 0
    dropped_bytes: int = 0
    totals: TransitionTotals = TransitionTotals()
    migrations: MigrationTotals = MigrationTotals()
    last_transition: TransitionRecord | None = None
    cpu_ns: int = 0
    at_ns: int = 0
    policy: str = ""
    may_drop: bool = False
    decisions: DecisionTotals = DecisionTotals()
    last_decision: Decision | None = None
