"""Transfers of one simulated process, as `links.md` found them: by physical page, blind, and never
taken back.

One pull is under way at a time, KV before weights. It writes at one or two instants what the peer's
pages hold at that moment, whether or not the puller still wants it and whether or not the peer
stands still. A pull that was cancelled before it began ends at once, another one when its last byte
is written. When a process dies, pulls from it end with an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from kunserve.core.actions import PageCopy, Pull
from kunserve.core.ids import InstanceId
from kunserve.sim.memory import PhysicalPages
from kunserve.sim.timeline import FOREVER_NS, MILLISECOND_NS, SpanNs, Timeline

PullAnswer = tuple[int, str | None]
"""Transfer, and error."""

FindPages = Callable[[InstanceId], PhysicalPages | None]
"""The memory of the peer that a process is connected to, or None when there is no link."""

ERROR_DELAY = SpanNs(2 * MILLISECOND_NS, 96 * MILLISECOND_NS)
"""Until a pull from a process that died ends (links.md)."""


@dataclass
class _Running:
    order: Pull
    is_failing: bool
    is_held_up: bool = False
    is_over: bool = False


class Pump:
    """Pulls of one process.

    Args:
        pages: where it writes.
        find: whose memory it reads.
        answer: takes the end of a pull.
        duration: of one pull.
    """

    def __init__(
        self,
        timeline: Timeline,
        rng: Random,
        pages: PhysicalPages,
        find: FindPages,
        answer: Callable[[PullAnswer], None],
        duration: SpanNs,
    ) -> None:
        self._timeline = timeline
        self._rng = rng
        self._pages = pages
        self._find = find
        self._answer = answer
        self._duration = duration
        self._waiting: list[Pull] = []
        self._running: _Running | None = None
        self._slow_until_ns = self._failing_until_ns = self._hung_until_ns = 0
        self._slow_factor = 1
        self.is_closed = False
        self.struck = 0
        """Pulls that a fault has slowed down, held up or ended."""

    # ------------------------------------------------------------ orders

    def pull(self, order: Pull) -> None:
        """Take an order."""
        self._waiting.append(order)
        self._start()

    def cancel(self) -> None:
        """What has not begun ends now."""
        waiting, self._waiting = self._waiting, []
        for order in waiting:
            self._answer((order.transfer, "cancelled"))

    def close(self) -> None:
        """The process has ended: its memory is written no more."""
        self.is_closed = True

    # ------------------------------------------------------------ faults

    def slow_down(self, duration_ns: int, factor: int) -> None:
        """Pulls that begin in this time last longer."""
        self._slow_until_ns, self._slow_factor = self._timeline.now_ns + duration_ns, factor

    def hang(self, duration_ns: int) -> None:
        """Pulls stand still for this time."""
        until_ns = min(FOREVER_NS, self._timeline.now_ns + duration_ns)
        self._hung_until_ns = max(self._hung_until_ns, until_ns)

    def fail(self, duration_ns: int) -> None:
        """Pulls that begin in this time end with an error, the peer lives."""
        self._failing_until_ns = self._timeline.now_ns + duration_ns

    def troubled_until_ns(self) -> int:
        """Until when faults act on it; 0 if there were none."""
        hung_ns = self._hung_until_ns
        if hung_ns == FOREVER_NS and self._running is None:
            hung_ns = self._timeline.now_ns
        return max(hung_ns, self._slow_until_ns, self._failing_until_ns)

    def peer_died(self, instance: InstanceId) -> None:
        """A process that may be read from is gone."""
        running = self._running
        if running is not None and running.order.peer == instance:
            delay_ns = ERROR_DELAY.draw(self._rng)
            self._timeline.after(delay_ns, partial(self._end, running, "the peer is gone"))

    # ------------------------------------------------------------ one pull

    def _start(self) -> None:
        if self._running is not None or not self._waiting:
            return
        order = next((o for o in self._waiting if not o.is_weights), self._waiting[0])
        self._waiting.remove(order)
        now_ns = self._timeline.now_ns
        running = self._running = _Running(order, now_ns < self._failing_until_ns)
        duration_ns = self._duration.draw(self._rng)
        if now_ns < self._slow_until_ns:
            duration_ns *= self._slow_factor
            self.struck += 1
        if self._find(order.peer) is None:
            self._timeline.after(duration_ns, partial(self._end, running, "there is no link"))
            return
        half = self._rng.randrange(len(order.copies)) if self._rng.random() < 0.5 else 0
        if half:
            middle_ns = self._rng.randrange(duration_ns)
            self._timeline.after(middle_ns, partial(self._write, running, order.copies[:half]))
        self._timeline.after(duration_ns, partial(self._finish, running, order.copies[half:]))

    def _write(self, running: _Running, copies: Sequence[PageCopy]) -> None:
        peer = self._find(running.order.peer)
        if peer is None or self.is_closed or running.is_over:
            return
        for copy in copies:
            self._pages.copy_from(peer, copy)

    def _finish(self, running: _Running, copies: Sequence[PageCopy]) -> None:
        if self._timeline.now_ns < self._hung_until_ns:
            self.struck += not running.is_held_up
            running.is_held_up = True
            if self._hung_until_ns < FOREVER_NS:
                self._timeline.at(self._hung_until_ns, partial(self._finish, running, copies))
            return
        if running.is_failing:
            self.struck += 1
            self._write(running, copies[: self._rng.randrange(len(copies) + 1)])
            self._end(running, "the link was lost")
            return
        is_gone = self._find(running.order.peer) is None
        self._write(running, copies)
        self._end(running, "the peer is gone" if is_gone else None)

    def _end(self, running: _Running, error: str | None) -> None:
        if running.is_over:
            return
        running.is_over = True
        self._running = None
        self._answer((running.order.transfer, error))
        self._start()
