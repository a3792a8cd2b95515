"""The protocol of a transition between layouts, as one table (design section 4).

The controller is the only coordinator, so there is no election. A transition is in one state; it
waits for an answer of every member, or for a deadline. What it hears is a signal; the table says
which state comes next. A signal that has no row in a state is a defect and changes nothing.

    a merge runs   PREPARE -> FENCE -> REMAP -> ADOPT -> MOVE -> FINISH -> DONE
    a split runs   COMPACT -> PREPARE -> SNAPSHOT -> GATHER -> FENCE -> ... as a merge

Between FENCE and REMAP lies COMMIT, the point of no return: one log record. Before it a transition
ends ABORTED and nothing has changed; after it there is only forward, to DONE or, when a member
dies, to BROKEN: the survivors become whole instances again, and the requests go on from the
front's copy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from kunserve.core.errors import AccountingError
from kunserve.core.ids import InstanceId, TransitionId
from kunserve.core.layout import Group, Part
from kunserve.core.transition import PhaseTime, TransitionRecord
from kunserve.policy.planner import TransitionKind


class State(Enum):
    """Where a transition is, and what it waits for."""

    START = "start"
    COMPACT = "compact"
    PREPARE = "prepare"
    SNAPSHOT = "snapshot"
    GATHER = "gather"
    FENCE = "fence"
    REMAP = "remap"
    ADOPT = "adopt"
    MOVE = "move"
    FINISH = "finish"
    DONE = "done"
    ABORTED = "aborted"
    BROKEN = "broken"


class Signal(Enum):
    """What happens to a transition."""

    MERGE = "a merge begins"
    SPLIT = "a split begins"
    MERGE_READY = "all voted yes, merge"
    SPLIT_READY = "all voted yes, split"
    ANSWERED = "all answered"
    REFUSED = "a member refuses, or the books say no"
    DEADLINE = "deadline"
    DEATH = "a member died"
    NEW_WISH = "another layout is wished"


class Row(NamedTuple):
    """In `state`, `signal` leads to `then`. `effect` is what the coordinator does on the way."""

    state: State
    signal: Signal
    then: State
    effect: str


_ABORT = "unfreeze at the old epoch; nothing has changed"
_BREAK = "survivors become whole instances; requests go on from the front's copy"
_KILL = "kill the members that have not answered; they count as dead"

TABLE: tuple[Row, ...] = (
    Row(State.START, Signal.MERGE, State.PREPARE, "ask for votes"),
    Row(State.START, Signal.SPLIT, State.COMPACT, "give every request a home"),
    Row(State.COMPACT, Signal.ANSWERED, State.PREPARE, "give up tails, bring parts in, vote"),
    Row(State.PREPARE, Signal.MERGE_READY, State.FENCE, "stop computing"),
    Row(State.PREPARE, Signal.SPLIT_READY, State.SNAPSHOT, "name what is full"),
    Row(State.SNAPSHOT, Signal.ANSWERED, State.GATHER, "pull full blocks ahead"),
    Row(State.GATHER, Signal.ANSWERED, State.FENCE, "stop computing"),
    Row(State.FENCE, Signal.ANSWERED, State.REMAP, "COMMIT; pages change owner"),
    Row(State.REMAP, Signal.ANSWERED, State.ADOPT, "hand the requests over; they run"),
    Row(State.ADOPT, Signal.ANSWERED, State.MOVE, "exchange on credit"),
    Row(State.MOVE, Signal.ANSWERED, State.FINISH, "give the escrow back, check the books"),
    Row(State.FINISH, Signal.ANSWERED, State.DONE, "all pages are in use"),
    *(
        Row(state, signal, State.ABORTED, _ABORT)
        for state in (
            State.COMPACT,
            State.PREPARE,
            State.SNAPSHOT,
            State.GATHER,
            State.FENCE,
        )
        for signal in (Signal.REFUSED, Signal.DEADLINE, Signal.DEATH, Signal.NEW_WISH)
    ),
    *(
        row
        for state in (State.REMAP, State.ADOPT, State.MOVE, State.FINISH)
        for row in (
            Row(state, Signal.DEADLINE, state, _KILL),
            Row(state, Signal.DEATH, State.BROKEN, _BREAK),
        )
    ),
)

_NEXT = {(row.state, row.signal): row.then for row in TABLE}

BEFORE_COMMIT = frozenset(
    {State.START, State.COMPACT, State.PREPARE, State.SNAPSHOT, State.GATHER, State.FENCE}
)
"""States in which a transition can still turn back."""

OVER = frozenset({State.DONE, State.ABORTED, State.BROKEN})
"""States that nothing leads out of."""


def next_state(state: State, signal: Signal) -> State:
    """The state that `signal` leads to.

    Raises:
        AccountingError: the table has no such row.
    """
    then = _NEXT.get((state, signal))
    if then is None:
        raise AccountingError(f"a transition in {state.value} cannot take {signal.value!r}")
    return then


def as_mermaid() -> str:
    """The table as a Mermaid state diagram, for docs/architecture.md."""
    lines = ["stateDiagram-v2"]
    drawn: dict[tuple[State, State], list[Signal]] = {}
    for row in TABLE:
        drawn.setdefault((row.state, row.then), []).append(row.signal)
    for (state, then), signals in drawn.items():
        left = "[*]" if state is State.START else state.name
        label = ", ".join(signal.value for signal in signals)
        lines.append(f"    {left} --> {then.name}: {label}")
    lines += [f"    {state.name} --> [*]" for state in State if state in OVER]
    return "\n".join(lines)


@dataclass
class Transition:
    """One transition under way. Times are the controller's, in nanoseconds."""

    id: TransitionId
    kind: TransitionKind
    why: str
    sources: tuple[Group, ...]
    targets: tuple[Group, ...]
    gains: dict[InstanceId, tuple[Part, ...]]
    begun_ns: int
    state: State = State.START
    entered_ns: int = 0
    deadline_ns: int = 0
    reason: str = ""
    waiting_for: set[InstanceId] = field(default_factory=set)
    phases: list[PhaseTime] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.entered_ns = self.begun_ns

    @property
    def members(self) -> tuple[InstanceId, ...]:
        """All instances that take part, in order."""
        return tuple(sorted(i for group in self.sources for i in group.instances))

    @property
    def can_turn_back(self) -> bool:
        """True before COMMIT."""
        return self.state in BEFORE_COMMIT

    @property
    def is_over(self) -> bool:
        """True when nothing more happens."""
        return self.state in OVER

    def advance(self, signal: Signal, now_ns: int) -> State:
        """Go where the table says; the time in the state that is left is booked.

        Raises:
            AccountingError: the table has no such row. Nothing has changed.
        """
        then = next_state(self.state, signal)
        if then is not self.state:
            if self.state is not State.START:
                self.phases.append(PhaseTime(self.state.value, now_ns - self.entered_ns))
            self.state, self.entered_ns = then, now_ns
        return then

    def record(self) -> TransitionRecord:
        """What is known of it by itself; the coordinator adds what it counted."""
        return TransitionRecord(
            id=self.id,
            kind=self.kind.value,
            why=self.why,
            outcome=self.state.value,
            reason=self.reason,
            sources=self.sources,
            targets=self.targets,
            phases=tuple(self.phases),
        )
