"""The thread that owns an agent and pulls for the instance.

    control thread                     pump thread
    submit, cancel, add_peer --inbox-> PullSchedule --> TransferAgent
    completions <--- done, wake_fd ---

The control thread never touches the agent and never waits for a transfer. The pump rests about
0.1 ms between polls, and longer while nothing moves.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress

from kunserve.core.errors import KunserveError
from kunserve.device.transfer.base import MemoryRange, TransferAgent, TransferError
from kunserve.device.transfer.schedule import (
    BUSY_REST_NS,
    PullDone,
    PullJob,
    PullSchedule,
    PumpSettings,
    PumpStats,
)

CLOSE_GRACE_S = 0.3
"""How long `close` lets what is in flight come to its end."""

CLOSE_LIMIT_S = 1.0
"""How long `close` waits for the thread."""


class Pump:
    """Runs pull jobs on one thread. Every method may be called from any thread.

    Args:
        open_agent: makes the agent; it is called on the pump's thread.
        memory: what to register.
        gate: True while something more urgent waits for the link; called on the pump's thread
            between chunks, about every 0.1 ms while it says so.

    Attributes:
        name: of the agent.
        metadata: what peers need for `add_peer`.
        wake_fd: readable while completions wait.

    Raises:
        TransferError: whatever `open_agent` or the registration raises.
    """

    def __init__(
        self,
        open_agent: Callable[[], TransferAgent],
        memory: Iterable[MemoryRange],
        *,
        settings: PumpSettings | None = None,
        gate: Callable[[], bool] | None = None,
    ) -> None:
        self.name = ""
        self.metadata = b""
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._open_agent = open_agent
        self._memory = tuple(memory)
        self._settings = settings or PumpSettings()
        self._gate = gate
        self._schedule: PullSchedule | None = None
        self._inbox: deque[Callable[[PullSchedule], None]] = deque()
        self._done: deque[PullDone] = deque()
        self._wake = threading.Event()
        self._lock = threading.Lock()  # for wake_fd, which `close` closes
        self._started = threading.Event()
        self._start_error: KunserveError | None = None
        self._closing = False
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="kunserve-pump", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._schedule is None:
            self.close()
            raise self._start_error or TransferError("the transfer thread did not start")

    def submit(self, job: PullJob) -> None:
        """Queue a job. It ends with one `PullDone`, whatever happens to it.

        Raises:
            TransferError: the pump is closed, or its thread has died.
        """
        self._post(lambda schedule: schedule.submit(job))

    def cancel(self, matches: Callable[[PullJob], bool], reason: str = "cancelled") -> None:
        """Cancel the jobs submitted so far for which `matches`, called on the pump's thread, is
        true. One that has bytes in flight is in `quarantined` until those have ended.

        Raises:
            TransferError: see `submit`.
        """
        self._post(lambda schedule: schedule.cancel(matches, reason))

    def cancel_peer(self, name: str, reason: str = "cancelled") -> None:
        """Cancel all jobs that pull from `name`, which stays known."""
        self.cancel(lambda job: job.peer == name, reason)

    def add_peer(self, name: str, metadata: bytes) -> None:
        """Let jobs that are submitted from now on pull from `name`. Known already: no effect.
        If the agent refuses, those jobs end with its reason.

        Raises:
            TransferError: see `submit`.
        """
        self._post(lambda schedule: schedule.add_peer(name, metadata))

    def remove_peer(self, name: str) -> None:
        """Cancel the jobs of `name` and forget it, once nothing of it is in flight.

        Raises:
            TransferError: see `submit`.
        """
        self._post(lambda schedule: schedule.remove_peer(name))

    def completions(self) -> list[PullDone]:
        """Jobs that ended since the last call, in order. Never blocks.

        Raises:
            TransferError: the thread has died: the jobs in flight will never end.
        """
        with self._lock, suppress(BlockingIOError):
            if self.wake_fd >= 0:
                os.eventfd_read(self.wake_fd)
        done = [self._done.popleft() for _ in range(len(self._done))]
        if not done and self._ended and not self._closing:
            raise TransferError("the transfer thread has died: end this process")
        return done

    @property
    def quarantined(self) -> tuple[int, ...]:
        """Ids of cancelled jobs whose bytes may still come; after `close`, of all such jobs."""
        return self._schedule.quarantined if self._schedule else ()

    @property
    def stats(self) -> PumpStats:
        """Totals since the start."""
        return self._schedule.stats if self._schedule else PumpStats()

    def close(self) -> None:
        """End all jobs and the thread, within about a second. May be called twice.

        Jobs that still have bytes in flight then get no `PullDone` and stay in `quarantined`.
        """
        self._closing = True
        self._wake.set()
        self._thread.join(CLOSE_LIMIT_S)
        with self._lock:
            if self.wake_fd >= 0:
                os.close(self.wake_fd)
                self.wake_fd = -1

    # -- the control thread's side

    def _post(self, command: Callable[[PullSchedule], None]) -> None:
        if self._closing or self._ended:
            raise TransferError("the pump is closed, or its thread has died")
        self._inbox.append(command)
        self._wake.set()

    # -- the pump's thread

    def _run(self) -> None:
        try:
            agent = self._open()
        except KunserveError as error:
            self._start_error = error
            return
        finally:
            self._started.set()
        try:
            self._serve()
        finally:
            self._ended = True
            self._notify()  # so that who waits learns of a thread that died
            agent.close()

    def _open(self) -> TransferAgent:
        agent = self._open_agent()
        try:
            for memory in self._memory:
                agent.register(memory.address, memory.nbytes)
        except KunserveError:
            agent.close()
            raise
        self.name, self.metadata = agent.name, agent.metadata()
        self._schedule = PullSchedule(agent, self._settings, self._gate)
        return agent

    def _serve(self) -> None:
        schedule = self._schedule
        assert schedule is not None
        while not self._closing:
            rest_ns = self._round(schedule)
            if rest_ns:
                self._wake.wait(rest_ns / 1e9)
        self._obey(schedule)
        schedule.cancel(lambda job: True, "the pump is closing")
        deadline = time.monotonic() + CLOSE_GRACE_S
        while not schedule.idle and time.monotonic() < deadline:
            self._round(schedule)
            time.sleep(BUSY_REST_NS / 1e9)
        self._hand_over(schedule)

    def _round(self, schedule: PullSchedule) -> int:
        self._wake.clear()
        self._obey(schedule)
        rest_ns = schedule.step()
        self._hand_over(schedule)
        return rest_ns

    def _obey(self, schedule: PullSchedule) -> None:
        while self._inbox:
            self._inbox.popleft()(schedule)

    def _hand_over(self, schedule: PullSchedule) -> None:
        done = schedule.take_done()
        if done:
            self._done.extend(done)
            self._notify()

    def _notify(self) -> None:
        with self._lock:
            if self.wake_fd >= 0:
                os.eventfd_write(self.wake_fd, 1)
