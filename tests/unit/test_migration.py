"""The table of a migration: every way leads to an end; before the lease moves, each goes back."""

from __future__ import annotations

import pytest

from kunserve.core.errors import AccountingError
from kunserve.core.ids import Epoch, GroupId, InstanceId, MigrationId, RequestId
from kunserve.core.migration import MigrationRecord
from kunserve.policy.migration import OVER, TABLE, Cue, Migration, Phase, Place, next_phase
from kunserve.runtime.transition_log import describe_migration

FAILURES = (Cue.REFUSED, Cue.LATE, Cue.GROUNDLESS)
UNDER_WAY = (Phase.OFFER, Phase.PULL, Phase.STOP, Phase.REST)


def make_migration() -> Migration:
    source = Place(InstanceId(0), 0, GroupId(0), Epoch(0))
    target = Place(InstanceId(1), 2, GroupId(3), Epoch(4))
    return Migration(MigrationId(7), RequestId("a"), source, target, begun_ns=1_000)


def test_every_phase_is_reached_and_left_until_the_end() -> None:
    assert {rule.then for rule in TABLE} | {Phase.START} == set(Phase)
    assert {rule.phase for rule in TABLE} == set(Phase) - OVER
    assert len({(rule.phase, rule.cue) for rule in TABLE}) == len(TABLE)


@pytest.mark.parametrize("phase", UNDER_WAY)
@pytest.mark.parametrize("cue", FAILURES)
def test_each_failure_goes_back_and_waits_for_the_target(phase: Phase, cue: Cue) -> None:
    assert next_phase(phase, cue) is Phase.CLEAR


@pytest.mark.parametrize("phase", [*OVER, Phase.START])
@pytest.mark.parametrize("cue", [*FAILURES, Cue.ANSWERED, Cue.TARGET_GONE])
def test_what_has_no_rule_changes_nothing(phase: Phase, cue: Cue) -> None:
    migration = make_migration()
    migration.phase = phase
    with pytest.raises(AccountingError, match="cannot take"):
        migration.advance(cue, 0)
    assert migration.phase is phase


def test_stages_and_times_are_counted() -> None:
    migration = make_migration()
    cues = [Cue.BEGIN, Cue.ANSWERED, Cue.MUCH_LEFT, Cue.ANSWERED, Cue.ANSWERED]
    for now_ns, cue in enumerate(cues, start=2_000):
        migration.advance(cue, now_ns)
        assert migration.can_turn_back
    migration.advance(Cue.ANSWERED, 3_000)
    assert migration.advance(Cue.ANSWERED, 4_000) is Phase.DONE
    migration.pulled_blocks = 12
    assert migration.record(block_bytes=10, now_ns=4_000) == MigrationRecord(
        id=MigrationId(7),
        request_id=RequestId("a"),
        source=InstanceId(0),
        target=InstanceId(1),
        outcome="done",
        reason="",
        stages=3,
        moved_blocks=12,
        moved_bytes=120,
        elapsed_ns=3_000,
        stopped_ns=4_000 - 2_004,
    )


def test_a_record_is_one_readable_line() -> None:
    record = MigrationRecord(
        MigrationId(3), RequestId("cmpl-7"), InstanceId(0), InstanceId(1), "done", "",
        2, 12, 8_808_038, 48_000_000, 6_100_000,
    )  # fmt: skip
    assert describe_migration(record) == (
        "migration #3: request cmpl-7 0 -> 1 done in 48 ms: 2 stages, 12 blocks, 8.4 MiB, "
        "stopped 6.1 ms"
    )
    cancelled = MigrationRecord(
        MigrationId(4), RequestId("b"), InstanceId(1), InstanceId(0), "cancelled",
        "the layout changes", 1, 0, 0, 3_000_000, 0,
    )  # fmt: skip
    assert describe_migration(cancelled) == (
        "migration #4: request b 1 -> 0 cancelled in 3.0 ms (the layout changes)"
    )
