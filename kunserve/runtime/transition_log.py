"""One readable line per transition or migration, for the log, the admin API and `kunserve top`."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from kunserve.core.layout import Group
from kunserve.core.migration import MigrationRecord
from kunserve.core.transition import TransitionRecord

NS_PER_MS = 1e6
MIB = 1 << 20


def describe(record: TransitionRecord) -> str:
    """What a transition did, why, and what it cost. Layers are half-open.

    merge #3 (operator): 0[0:30] + 1[0:30] -> 0[0:12]|1[12:30] epoch 7 done in 406 ms: prepare
    1.2, fence 38, remap 4.1, adopt 2.0, move 361; freed 348 MiB, exchanged 96 MiB; stalled 9
    requests, median 210 ms, at most 340 ms
    """
    total_ns = sum(phase.elapsed_ns for phase in record.phases)
    phases = ", ".join(f"{phase.name} {_ms(phase.elapsed_ns)}" for phase in record.phases)
    head = (
        f"{record.kind} #{record.id} ({record.why}): {_groups(record.sources)} -> "
        f"{_groups(record.targets)}{_epochs(record.targets)} {record.outcome} "
        f"in {_ms(total_ns)} ms"
    )
    if record.reason:
        head += f" ({record.reason})"
    if phases:
        head += f": {phases}"
    clauses = [head, _moved(record), _requests(record), _stalls(record), _activations(record)]
    # A reason may quote an error of several lines.
    return " ".join("; ".join(clause for clause in clauses if clause).split())


def describe_migration(record: MigrationRecord) -> str:
    """What a migration of a request did, and why not if it was cancelled.

    migration #3: request cmpl-7 0 -> 1 done in 48 ms: 2 stages, 12 blocks, 8.4 MiB, stopped 6.1 ms
    """
    head = (
        f"migration #{record.id}: request {record.request_id} {record.source} -> {record.target} "
        f"{record.outcome} in {_ms(record.elapsed_ns)} ms"
    )
    if record.reason:
        return f"{head} ({record.reason})"
    return (
        f"{head}: {_count(record.stages, 'stage')}, {_count(record.moved_blocks, 'block')}, "
        f"{_size(record.moved_bytes)}, stopped {_ms(record.stopped_ns)} ms"
    )


def _groups(groups: Iterable[Group]) -> str:
    """Stages in ring order, joined by |; groups by +."""
    rings = (
        "|".join(f"{s.instance}[{s.layers.start}:{s.layers.stop}]" for s in group.stages)
        for group in groups
    )
    return " + ".join(rings) or "none"


def _epochs(groups: Iterable[Group]) -> str:
    epochs = sorted({int(group.epoch) for group in groups})
    if not epochs:
        return ""
    return f" epoch{'s' if len(epochs) > 1 else ''} {', '.join(map(str, epochs))}"


def _moved(record: TransitionRecord) -> str:
    sizes = {
        "freed": record.freed_bytes,
        "gained": record.gained_bytes,
        "gathered": record.gathered_bytes,
        "exchanged": record.exchanged_bytes,
    }
    parts = [f"{name} {_size(nbytes)}" for name, nbytes in sizes.items() if nbytes]
    if record.moved_pages:
        parts.append(f"moved {record.moved_pages} pages")
    if record.remap_ns:
        parts.append(f"memory calls {_ms(record.remap_ns)} ms")
    return ", ".join(parts)


def _requests(record: TransitionRecord) -> str:
    if not record.requests and not record.recomputed:
        return ""
    recomputed = f", {record.recomputed} recomputed" if record.recomputed else ""
    return _count(record.requests, "request") + recomputed


def _stalls(record: TransitionRecord) -> str:
    if not record.stalled:
        return ""
    times_ns = [elapsed_ns for _, elapsed_ns in record.stalled]
    return (
        f"stalled {_count(len(times_ns), 'request')}, median {_ms(median(times_ns))} ms, "
        f"at most {_ms(max(times_ns))} ms"
    )


def _activations(record: TransitionRecord) -> str:
    if not record.activations:
        return ""
    return f"{_count(record.activations, 'activation')}, p99 {_ms(record.activation_p99_ns)} ms"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _ms(elapsed_ns: float) -> str:
    """Milliseconds, with two digits that count."""
    elapsed_ms = elapsed_ns / NS_PER_MS
    return f"{elapsed_ms:.1f}" if elapsed_ms < 9.95 else f"{elapsed_ms:.0f}"


def _size(nbytes: int) -> str:
    mib = nbytes / MIB
    return f"{mib:.1f} MiB" if mib < 9.95 else f"{mib:.0f} MiB"
