"""Virtual time: a heap of actions. Equal times run in the order in which they were planned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from random import Random
from typing import Generic, TypeVar

MICROSECOND_NS = 1_000
MILLISECOND_NS = 1_000_000
SECOND_NS = 1_000_000_000
FOREVER_NS = 1 << 62

Message = TypeVar("Message")


@dataclass(frozen=True)
class SpanNs:
    """A duration that is drawn uniformly from [shortest_ns, longest_ns]."""

    shortest_ns: int
    longest_ns: int

    def draw(self, rng: Random) -> int:
        """One duration."""
        return rng.randint(self.shortest_ns, self.longest_ns)


class Timeline:
    """The clock of a world. Nothing happens between two actions."""

    def __init__(self) -> None:
        self._now_ns = 0
        self._planned = 0
        self._heap: list[tuple[int, int, Callable[[], None]]] = []

    @property
    def now_ns(self) -> int:
        """Virtual time."""
        return self._now_ns

    def at(self, time_ns: int, action: Callable[[], None]) -> None:
        """Plan `action` for `time_ns`, or for now if that has passed."""
        heappush(self._heap, (max(time_ns, self._now_ns), self._planned, action))
        self._planned += 1

    def after(self, delay_ns: int, action: Callable[[], None]) -> None:
        """Plan `action` in `delay_ns` from now."""
        self.at(self._now_ns + delay_ns, action)

    def advance(self) -> None:
        """Go to the next action and run it.

        Raises:
            IndexError: nothing is planned.
        """
        self._now_ns, _, action = heappop(self._heap)
        action()


class Link(Generic[Message]):
    """One direction between the front and one process: delays, but keeps the order."""

    def __init__(
        self,
        timeline: Timeline,
        delay: SpanNs,
        rng: Random,
        deliver: Callable[[Message], None],
    ) -> None:
        self._timeline = timeline
        self._delay = delay
        self._rng = rng
        self._deliver = deliver
        self._last_ns = 0
        self._cut_ns = FOREVER_NS

    def send(self, message: Message) -> None:
        """Deliver `message` after a delay, never before an earlier one."""
        arrival_ns = self._timeline.now_ns + self._delay.draw(self._rng)
        self._last_ns = max(self._last_ns, arrival_ns)
        self._timeline.at(self._last_ns, partial(self._arrive, message))

    def cut(self) -> None:
        """The sender died: what has not arrived after one more delay is lost with it."""
        self._cut_ns = self._timeline.now_ns + self._delay.draw(self._rng)

    def _arrive(self, message: Message) -> None:
        if self._timeline.now_ns <= self._cut_ns:
            self._deliver(message)
