"""Snapshots of the running cluster for other threads: frozen, taken by the controller's thread."""

from __future__ import annotations

from dataclasses import dataclass

from kunserve.core.events import StepTiming
from kunserve.core.ids import InstanceId
from kunserve.core.step import GroupLoad


@dataclass(frozen=True)
class InstanceStatus:
    """One instance as the front sees it.

    `state` is "starting", "ready", "waiting for restart" or "dead". `heartbeat_age_s` counts from
    the last message of the instance to the moment of the snapshot.
    """

    instance: InstanceId
    pid: int | None
    state: str
    heartbeat_age_s: float
    load: GroupLoad | None
    timing: StepTiming = StepTiming()


@dataclass(frozen=True)
class ClusterView:
    """The cluster at `at_ns` on the monotonic clock: a controller that stands still shows by its
    view growing old. `cpu_ns` is the time that the controller's thread has computed."""

    ready: bool = False
    draining: bool = False
    num_requests: int = 0
    instances: tuple[InstanceStatus, ...] = ()
    cpu_ns: int = 0
    at_ns: int = 0
