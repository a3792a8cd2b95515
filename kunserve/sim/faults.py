"""What goes wrong, and when: values, drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from kunserve.core.ids import InstanceId
from kunserve.sim.timeline import FOREVER_NS, MILLISECOND_NS, SECOND_NS


@dataclass(frozen=True)
class Crash:
    """The process ends at once, whatever it does, also while it loads."""

    at_ns: int
    instance: InstanceId


@dataclass(frozen=True)
class LastWords:
    """The process ends right after it has sent `messages` more messages. What it said may arrive
    before or after the news of its end, or not at all."""

    at_ns: int
    instance: InstanceId
    messages: int


@dataclass(frozen=True)
class Freeze:
    """The whole process stands still: no step, no message, no heartbeat. FOREVER_NS: for ever."""

    at_ns: int
    instance: InstanceId
    duration_ns: int


@dataclass(frozen=True)
class StuckStep:
    """The compute thread stands still for ever; the control thread still takes messages."""

    at_ns: int
    instance: InstanceId


@dataclass(frozen=True)
class SlowSteps:
    """Steps that start in this time last `factor` times as long, but get on layer by layer."""

    at_ns: int
    instance: InstanceId
    duration_ns: int
    factor: int


@dataclass(frozen=True)
class SlowPulls:
    """Transfers into the instance that begin in this time last `factor` times as long."""

    at_ns: int
    instance: InstanceId
    duration_ns: int
    factor: int


@dataclass(frozen=True)
class HangingPulls:
    """Transfers into the instance stand still, whatever anybody does. FOREVER_NS: until one of the
    two processes ends."""

    at_ns: int
    instance: InstanceId
    duration_ns: int


@dataclass(frozen=True)
class FailingPulls:
    """Transfers into the instance that begin in this time end with an error and some bytes written;
    all processes live."""

    at_ns: int
    instance: InstanceId
    duration_ns: int


Fault = Crash | LastWords | Freeze | StuckStep | SlowSteps | SlowPulls | HangingPulls | FailingPulls


def end_ns(fault: Fault) -> int:
    """When a fault is over by itself. What lasts for ever is over when it has begun: the
    controller must end it."""
    if isinstance(fault, SlowSteps | SlowPulls | FailingPulls):
        return fault.at_ns + fault.duration_ns
    if isinstance(fault, Freeze | HangingPulls) and fault.duration_ns < FOREVER_NS:
        return fault.at_ns + fault.duration_ns
    return fault.at_ns


def draw_faults(
    rng: Random,
    count: int,
    num_instances: int,
    horizon_ns: int,
    heartbeat_timeout_ns: int,
    *,
    links: bool = False,
) -> tuple[Fault, ...]:
    """`count` faults at random moments of [0, horizon_ns], in order of time; with `links` also of
    transfers."""
    faults = [
        _draw_link_fault(rng, rng.randint(0, horizon_ns), num_instances)
        if links and rng.random() < 0.4
        else _draw_fault(rng, rng.randint(0, horizon_ns), num_instances, heartbeat_timeout_ns)
        for _ in range(count)
    ]
    return tuple(sorted(faults, key=lambda fault: fault.at_ns))


def _draw_fault(rng: Random, at_ns: int, num_instances: int, heartbeat_timeout_ns: int) -> Fault:
    instance = InstanceId(rng.randrange(num_instances))
    kind = rng.random()
    if kind < 0.25:
        return Crash(at_ns, instance)
    if kind < 0.4:
        return LastWords(at_ns, instance, rng.choice((1, 1, 2, 5)))
    if kind < 0.5:
        return Freeze(at_ns, instance, FOREVER_NS)
    if kind < 0.7:  # around the deadline: some come back just before it, some just after
        duration_ns = rng.randint(MILLISECOND_NS, 3 * heartbeat_timeout_ns // 2)
        return Freeze(at_ns, instance, duration_ns)
    if kind < 0.8:
        return StuckStep(at_ns, instance)
    duration_ns = rng.randint(SECOND_NS, 5 * SECOND_NS)
    return SlowSteps(at_ns, instance, duration_ns, rng.choice((3, 20, 100)))


def _draw_link_fault(rng: Random, at_ns: int, num_instances: int) -> Fault:
    instance = InstanceId(rng.randrange(num_instances))
    kind = rng.random()
    if kind < 0.35:
        duration_ns = rng.randint(100 * MILLISECOND_NS, 3 * SECOND_NS)
        return SlowPulls(at_ns, instance, duration_ns, rng.choice((3, 20, 300)))
    if kind < 0.6:
        return FailingPulls(at_ns, instance, rng.randint(10 * MILLISECOND_NS, 2 * SECOND_NS))
    is_endless = kind < 0.7
    duration_ns = FOREVER_NS if is_endless else rng.randint(100 * MILLISECOND_NS, 6 * SECOND_NS)
    return HangingPulls(at_ns, instance, duration_ns)
