"""Snapshots of the controller for other threads, and totals over its transitions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from kunserve.core.decision import Decision, DecisionNote, Realised, Verdict
from kunserve.core.ids import InstanceId
from kunserve.core.layout import stage_holds
from kunserve.core.migration import MigrationRecord
from kunserve.core.transition import TransitionRecord
from kunserve.policy.book import ControllerConfig, GroupRecord, InstanceRecord, InstanceState
from kunserve.policy.controller import Controller
from kunserve.runtime.status import (
    ClusterView,
    DecisionTotals,
    GroupStatus,
    InstanceStatus,
    MigrationTotals,
    TransitionTotals,
)


class Viewer:
    """Looks at a controller, on its thread."""

    def __init__(self, controller: Controller, config: ControllerConfig) -> None:
        self._controller = controller
        self._config = config
        self._part_pages = dict(config.part_pages)
        self._totals = TransitionTotals()
        self._migrations = MigrationTotals()
        self._last: TransitionRecord | None = None
        self._last_ns: int | None = None
        self._decisions = DecisionTotals()
        self._last_decision: Decision | None = None

    def note(self, note: DecisionNote) -> None:
        """Take in a decision of the overload policy, or what came of one."""
        totals = self._decisions
        if isinstance(note, Decision):
            self._last_decision = note
            verdicts, saved = Counter(totals.verdicts), dict(totals.saved_ns)
            verdicts[(note.kind, note.verdict.value)] += 1
            if note.kind == "drop" and note.verdict in (Verdict.ACT, Verdict.WOULD_ACT):
                word = note.verdict.value
                saved[word] = saved.get(word, 0.0) + note.saved_ns
            self._decisions = replace(totals, verdicts=verdicts, saved_ns=saved)
        elif isinstance(note, Realised):
            self._decisions = replace(
                totals,
                watched=totals.watched + note.requests,
                predicted_ns=totals.predicted_ns + note.predicted_ns,
                realised_ns=totals.realised_ns + note.realised_ns,
            )
        else:
            self._decisions = replace(
                totals,
                lacking_blocks=note.lacking_blocks,
                instances_wanted=note.instances_wanted,
            )

    def count(self, record: TransitionRecord) -> None:
        """Take in a record; one at COMMIT is not the end of its transition."""
        self._last = record
        if record.outcome == "commit":
            return
        totals = self._totals
        outcomes = Counter(totals.outcomes)
        outcomes[(record.kind, record.outcome)] += 1
        phases = Counter(totals.phase_ns)
        for phase in record.phases:
            phases[(record.kind, phase.name)] += phase.elapsed_ns
        self._totals = TransitionTotals(
            outcomes=outcomes,
            phase_ns=phases,
            exchanged_bytes=totals.exchanged_bytes + record.exchanged_bytes,
            gathered_bytes=totals.gathered_bytes + record.gathered_bytes,
            gained_bytes=totals.gained_bytes + record.gained_bytes,
            stalled_requests=totals.stalled_requests + len(record.stalled),
            stalled_ns=totals.stalled_ns + sum(ns for _, ns in record.stalled),
            degraded_ns=totals.degraded_ns,
        )

    def count_migration(self, record: MigrationRecord) -> None:
        """Take in a record of a migration that is over."""
        outcomes = Counter(self._migrations.outcomes)
        outcomes[record.outcome] += 1
        moved_bytes = self._migrations.moved_bytes + record.moved_bytes
        self._migrations = replace(self._migrations, outcomes=outcomes, moved_bytes=moved_bytes)

    def count_redispatched(self, number: int) -> None:
        """So many requests were taken back from a queue."""
        redispatched = self._migrations.redispatched + number
        self._migrations = replace(self._migrations, redispatched=redispatched)

    def view(self, pids: Mapping[InstanceId, int], now_ns: int, cpu_ns: int) -> ClusterView:
        """The cluster now."""
        controller = self._controller
        self._count_degraded(now_ns)
        return ClusterView(
            ready=bool(controller.layout.groups) and not controller.draining,
            draining=controller.draining,
            num_requests=controller.num_requests,
            instances=tuple(
                self._instance(record, pids.get(record.id), now_ns)
                for record in controller.instances()
            ),
            groups=tuple(self._group(record) for record in controller.groups),
            epoch=controller.epoch,
            block_size=self._config.block_size,
            dropped_bytes=self._dropped_pages() * self._config.page_bytes,
            totals=self._totals,
            migrations=replace(self._migrations, num_running=len(controller.migrations)),
            last_transition=self._last,
            cpu_ns=cpu_ns,
            at_ns=now_ns,
            policy=self._config.policy.value,
            may_drop=controller.may_drop,
            decisions=self._decisions,
            last_decision=self._last_decision,
        )

    def _count_degraded(self, now_ns: int) -> None:
        """Time in which some group had several stages, to the resolution of snapshots."""
        is_degraded = any(len(group.stages) > 1 for group in self._controller.layout.groups)
        if is_degraded and self._last_ns is not None:
            totals = self._totals
            self._totals = TransitionTotals(
                **{**vars(totals), "degraded_ns": totals.degraded_ns + now_ns - self._last_ns}
            )
        self._last_ns = now_ns

    def _group(self, record: GroupRecord) -> GroupStatus:
        instances = {r.id: r for r in self._controller.instances()}
        state = self._controller.transition_state(record.leader)
        return GroupStatus(
            group=record.group,
            kv_blocks=record.load.total_blocks if record.load else record.total_blocks,
            whole_blocks=sum(instances[i].total_blocks for i in record.group.instances),
            num_requests=len(record.requests),
            load=record.load,
            in_transition=state.value if state is not None else None,
        )

    def _instance(self, record: InstanceRecord, pid: int | None, now_ns: int) -> InstanceStatus:
        group = self._controller.group_record(record.id)
        leads = group is not None and group.leader == record.id
        is_draining = record.is_draining and record.state is InstanceState.READY
        return InstanceStatus(
            instance=record.id,
            pid=pid,
            state="draining" if is_draining else record.state.value,
            heartbeat_age_s=(now_ns - record.last_heard_ns) / 1e9,
            load=group.load if group is not None and leads else None,
            timing=record.timing,
            pages=record.pages,
            costs=record.costs,
        )

    def _dropped_pages(self) -> int:
        """Pages of parts that whole instances would hold, and the members of groups do not."""
        whole = sum(self._part_pages.values())
        held = 0
        instances = 0
        for group in self._controller.layout.groups:
            for index, stage in enumerate(group.stages):
                instances += 1
                held += sum(
                    pages
                    for part, pages in self._part_pages.items()
                    if stage_holds(index, stage.layers, part)
                )
        return whole * instances - held
