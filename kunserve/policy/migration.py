"""The protocol of a live migration, as one table; the messages are in `kunserve.core.migration`.

The front is the only coordinator. It runs in stages (Llumnix, OSDI 2024, section 4.2): what is full
is copied while the request decodes, then what became full meanwhile, and when that is little, the
request stops for the rest.

    OFFER -> PULL -> OFFER -> PULL -> ... -> STOP -> REST -> DONE

The request is leased to its source until REST is answered. Then, in one go, the lease moves in the
front's book, the target runs it and the source forgets it. Every failure before leads to CLEAR, in
which it runs on at the source, or, if that is dead, elsewhere from the front's copy; CLEAR waits
until nothing is written at the target any more. After it there is no failure of a migration, only
of an instance.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from kunserve.core.errors import AccountingError
from kunserve.core.ids import Epoch, GroupId, InstanceId, MigrationId, RequestId
from kunserve.core.migration import MigrationRecord, SourceBlocks


class Phase(Enum):
    """Where a migration is, and whose answer it waits for."""

    START = "start"
    OFFER = "offer"
    PULL = "pull"
    STOP = "stop"
    REST = "rest"
    CLEAR = "clear"
    DONE = "done"
    CANCELLED = "cancelled"


class Cue(Enum):
    """What happens to a migration."""

    BEGIN = "a request is chosen"
    ANSWERED = "answered"
    MUCH_LEFT = "answered, much was written meanwhile"
    REFUSED = "an instance refuses"
    LATE = "deadline"
    GROUNDLESS = "the request ended or is leased elsewhere, an instance died, the layout changes"
    TARGET_GONE = "the target died"


class Rule(NamedTuple):
    """In `phase`, `cue` leads to `then`. `effect` is what the governor does on the way."""

    phase: Phase
    cue: Cue
    then: Phase
    effect: str


_BACK = "it runs on at the source, the target gives back what it has set aside"

TABLE: tuple[Rule, ...] = (
    Rule(Phase.START, Cue.BEGIN, Phase.OFFER, "ask the source what is full"),
    Rule(Phase.OFFER, Cue.ANSWERED, Phase.PULL, "the target makes room and pulls it"),
    Rule(Phase.PULL, Cue.MUCH_LEFT, Phase.OFFER, "ask what became full meanwhile"),
    Rule(Phase.PULL, Cue.ANSWERED, Phase.STOP, "the source stops the request"),
    Rule(Phase.STOP, Cue.ANSWERED, Phase.REST, "the target pulls the rest"),
    Rule(Phase.REST, Cue.ANSWERED, Phase.DONE, "the lease moves; it runs at the target"),
    *(
        Rule(phase, cue, Phase.CLEAR, _BACK)
        for phase in (Phase.OFFER, Phase.PULL, Phase.STOP, Phase.REST)
        for cue in (Cue.REFUSED, Cue.LATE, Cue.GROUNDLESS)
    ),
    Rule(Phase.CLEAR, Cue.ANSWERED, Phase.CANCELLED, "nothing is left of it"),
    Rule(Phase.CLEAR, Cue.TARGET_GONE, Phase.CANCELLED, "nothing is left of it"),
    Rule(Phase.CLEAR, Cue.LATE, Phase.CLEAR, "kill the target: a transfer does not end"),
)

_NEXT = {(rule.phase, rule.cue): rule.then for rule in TABLE}

OVER = frozenset({Phase.DONE, Phase.CANCELLED})
"""Phases that nothing leads out of."""


def next_phase(phase: Phase, cue: Cue) -> Phase:
    """The phase that `cue` leads to.

    Raises:
        AccountingError: the table has no such rule.
    """
    then = _NEXT.get((phase, cue))
    if then is None:
        raise AccountingError(f"a migration in {phase.value} cannot take {cue.value!r}")
    return then


@dataclass(frozen=True)
class Place:
    """One of the two instances, and the group that it leads."""

    instance: InstanceId
    incarnation: int
    group: GroupId
    epoch: Epoch


@dataclass
class Migration:
    """One migration under way. Times are the controller's, in nanoseconds.

    `offered`: what the source has said last, with `computed_tokens` there; `pulled_blocks`: entries
    of the request's table that are at the target.
    """

    id: MigrationId
    request_id: RequestId
    source: Place
    target: Place
    begun_ns: int
    phase: Phase = Phase.START
    deadline_ns: int = 0
    stages: int = 0
    offered: SourceBlocks = SourceBlocks(0, (), ())
    pulled_blocks: int = 0
    computed_tokens: int = 0
    stop_ns: int = 0
    reason: str = ""

    @property
    def instances(self) -> tuple[InstanceId, InstanceId]:
        """Source and target."""
        return self.source.instance, self.target.instance

    @property
    def can_turn_back(self) -> bool:
        """True while the lease is at the source, and nobody has been told that it is over."""
        return self.phase in (Phase.OFFER, Phase.PULL, Phase.STOP, Phase.REST)

    def advance(self, cue: Cue, now_ns: int) -> Phase:
        """Go where the table says.

        Raises:
            AccountingError: the table has no such rule. Nothing has changed.
        """
        self.phase = next_phase(self.phase, cue)
        if self.phase in (Phase.PULL, Phase.REST):
            self.stages += 1
        if self.phase is Phase.STOP:
            self.stop_ns = now_ns
        return self.phase

    def record(self, block_bytes: int, now_ns: int) -> MigrationRecord:
        """What it did. `block_bytes`: of one block in all layers."""
        has_moved = self.phase is Phase.DONE
        return MigrationRecord(
            id=self.id,
            request_id=self.request_id,
            source=self.source.instance,
            target=self.target.instance,
            outcome="done" if has_moved else "cancelled",
            reason=self.reason,
            stages=self.stages,
            moved_blocks=self.pulled_blocks,
            moved_bytes=self.pulled_blocks * block_bytes,
            elapsed_ns=now_ns - self.begun_ns,
            stopped_ns=now_ns - self.stop_ns if has_moved else 0,
        )
