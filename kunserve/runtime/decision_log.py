"""One readable line per decision of the overload policy: every term of its estimate."""

from __future__ import annotations

from kunserve.core.decision import Decision, DecisionNote, Realised, Shortage, Waits

NS_PER_S = 1e9


def describe_note(note: DecisionNote) -> str:
    """What was decided and why, or what came of it.

    drop #3 of 0 + 1: act; demand 252 of 246 blocks (reached), 631 afterwards; 40 running, 6 queued,
    8.0 arrivals/s, 25.1 blocks/s freed; waiting in 10 s: 61.2 s (memory 58.0, compute 3.2), with it
    9.8 s (memory 0.0, compute 9.8), stalls 4.0 s: saves 47.4 s
    """
    if isinstance(note, Decision):
        return _decision(note)
    if isinstance(note, Realised):
        return _realised(note)
    return _shortage(note)


def _decision(decision: Decision) -> str:
    groups = " + ".join("|".join(map(str, group)) for group in decision.groups)
    state = "reached" if decision.is_reached else "not reached"
    head = (
        f"{decision.kind} #{decision.number} of {groups}: {decision.verdict.value}; demand "
        f"{decision.demand_blocks} of {decision.capacity_blocks} blocks ({state}), "
        f"{decision.new_capacity_blocks} afterwards"
    )
    if decision.reason:
        return f"{head}; {decision.reason}"
    return (
        f"{head}; {decision.running} running, {decision.queued} queued, "
        f"{decision.arrivals_per_s:.1f} arrivals/s, {decision.freed_blocks_per_s:.1f} blocks/s "
        f"freed; waiting ahead {_waits(decision.stay)}, with it {_waits(decision.change)}, "
        f"stalls {decision.stall_ns / NS_PER_S:.1f} s: "
        f"saves {decision.saved_ns / NS_PER_S:.1f} s"
    )


def _waits(waits: Waits) -> str:
    return (
        f"{waits.total_ns / NS_PER_S:.1f} s (memory {waits.memory_ns / NS_PER_S:.1f}, compute "
        f"{waits.compute_ns / NS_PER_S:.1f}; {waits.attained} of {waits.requests} in time)"
    )


def _realised(realised: Realised) -> str:
    return (
        f"decision #{realised.number}: the {realised.requests} requests that were queued waited "
        f"{realised.realised_ns / NS_PER_S:.2f} s more in all, "
        f"{realised.predicted_ns / NS_PER_S:.2f} s were predicted"
    )


def _shortage(shortage: Shortage) -> str:
    if not shortage.lacking_blocks:
        return "memory shortage is over"
    return (
        f"dropping cannot free {shortage.lacking_blocks} KV blocks that are asked for: fallback "
        f"recompute; autoscale signal: {shortage.instances_wanted} more instance(s) would hold them"
    )
