"""The threads of an instance beside its control thread: one computes, one loads parts, one copies
KV to host memory and back.

Each takes one kind of job from a queue and wakes the control thread through an eventfd. Nothing is
shared but the memory of the engine, whose mappings only the control thread changes, and only where
these threads do not look at that moment.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from kunserve.core.actions import (
    CheckPart,
    Computed,
    CopyKv,
    LoadPart,
    RunFirst,
    RunHead,
    RunStage,
    Work,
)
from kunserve.core.errors import AccountingError, KunserveError
from kunserve.core.layout import LayerRange
from kunserve.core.step import StepResult
from kunserve.worker.decoder import StepCancelledError
from kunserve.worker.engine import Engine
from kunserve.worker.host_kv import HostKv
from kunserve.worker.stage import StageExecutor

COMPUTE_NICENESS = 5

Job = TypeVar("Job")
Answer = TypeVar("Answer")


def name_thread(thread: threading.Thread) -> None:
    """Show the name of a running thread to `top -H` and to benchmarks; Python 3.11 does not."""
    with suppress(OSError):  # it has ended already
        Path(f"/proc/self/task/{thread.native_id}/comm").write_text(thread.name[:15])


def yield_to_others(thread_id: int) -> None:
    """Let threads that wake up go before this one, which computes without end: on few cores a ring
    otherwise waits for the kernel's time slice at every hand-over."""
    os.setpriority(os.PRIO_PROCESS, thread_id, COMPUTE_NICENESS)
    os.sched_setscheduler(thread_id, os.SCHED_BATCH, os.sched_param(0))


class WorkerThread(Generic[Job, Answer]):
    """Answers jobs in order on a thread of its own. What a job raises is raised by `answers`."""

    def __init__(self, name: str, work: Callable[[Job], Answer | None]) -> None:
        self._work = work
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Answer | BaseException] = queue.SimpleQueue()
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable when an answer waits."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        name_thread(self._thread)

    @property
    def native_id(self) -> int:
        """The kernel's number of the thread."""
        assert self._thread.native_id is not None  # it has been started
        return self._thread.native_id

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self._jobs.put(job)

    def answers(self) -> list[Answer]:
        """Answers since the last call, in order; never blocks.

        Raises:
            BaseException: what a job raised.
        """
        try:
            os.eventfd_read(self.wake_fd)
        except BlockingIOError:
            return []
        answers: list[Answer] = []
        while True:
            try:
                answer = self._answers.get_nowait()
            except queue.Empty:
                return answers
            if isinstance(answer, BaseException):
                raise answer
            answers.append(answer)

    def give(self, answer: Answer | BaseException) -> None:
        """Answer ahead of the job under way. On this thread only."""
        self._answers.put(answer)
        os.eventfd_write(self.wake_fd, 1)

    def join(self) -> None:
        """End the thread when the jobs submitted so far are done."""
        self._jobs.put(None)
        self._thread.join()
        os.close(self.wake_fd)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                answer: Answer | BaseException | None = self._work(job)
            except BaseException as error:  # noqa: BLE001 - handed to the control thread whole
                answer = error
            if answer is not None:
                self.give(answer)


class _SlippedIn:
    """In the queue behind the work that an urgent head may slip into: it ran there, or runs now."""


class ComputeThread:
    """Runs one piece of work at a time on a stage executor. A head may slip in between the layers
    of the work under way: its requests have waited for a whole turn of the ring.

    `layers_done` grows between layers, and before the head: work that stands still is seen from
    outside. `is_handing_on` is true from the end of work whose rows go to another stage until
    `handed_on`: a transfer that is not urgent waits for that long.
    """

    def __init__(self, executor: StageExecutor) -> None:
        self._executor = executor
        self._cancelled = threading.Event()
        self._under_way = 0
        self._urgent: queue.SimpleQueue[RunHead] = queue.SimpleQueue()
        self.layers_done = 0
        self.execute_ns = 0
        self.is_handing_on = False
        self._thread: WorkerThread[Work | _SlippedIn, Computed] = WorkerThread("compute", self._run)
        yield_to_others(self._thread.native_id)

    @property
    def wake_fd(self) -> int:
        """Readable when work is done."""
        return self._thread.wake_fd

    @property
    def is_busy(self) -> bool:
        """True from `submit` until all answers are collected."""
        return self._under_way > 0

    def configure(self, layers: LayerRange) -> None:
        """Compute other layers from now on.

        Raises:
            AccountingError: work is under way.
        """
        if self.is_busy:
            raise AccountingError("a stage cannot change its layers while it computes")
        self._executor.configure(layers)

    def submit(self, work: Work) -> None:
        """Start a piece of work. The last one's answer must have been collected, but for one head
        that slips into it.

        Raises:
            AccountingError: too much is under way already.
        """
        if self._under_way > 1 or (self.is_busy and not isinstance(work, RunHead)):
            raise AccountingError("work is under way already")
        self._under_way += 1
        if self._under_way > 1 and isinstance(work, RunHead):
            self._urgent.put(work)
            self._thread.submit(_SlippedIn())
            return
        self._cancelled.clear()
        self._thread.submit(work)

    def collect(self) -> list[Computed]:
        """Answers to the work under way, if they are there.

        Raises:
            BaseException: what the work raised.
        """
        answers = self._thread.answers()
        self._under_way -= len(answers)
        return answers

    def handed_on(self) -> None:
        """The rows of the last work are on their way."""
        self.is_handing_on = False

    def cancel(self) -> None:
        """Cancel the work under way between layers; its answer comes marked as cancelled."""
        self._cancelled.set()

    def join(self) -> None:
        """Cancel what runs and end the thread: nothing may be unmapped before."""
        self._cancelled.set()
        self._thread.join()

    def _run(self, work: Work | _SlippedIn) -> Computed | None:
        begin_ns = time.monotonic_ns()
        try:
            if isinstance(work, _SlippedIn):
                self._slip_in()
                return None
            return self._compute(work)
        finally:
            self.execute_ns += time.monotonic_ns() - begin_ns

    def _slip_in(self) -> None:
        """Run the head that waits, if one does."""
        try:
            work = self._urgent.get_nowait()
        except queue.Empty:
            return
        try:
            self._thread.give(self._compute(work))
        except BaseException as error:  # noqa: BLE001 - handed to the control thread whole
            self._thread.give(error)

    def _compute(self, work: Work) -> Computed:
        if isinstance(work, RunHead):
            self.layers_done += 1
            return Computed(work, self._executor.run_head(work.plan, work.payload))
        if isinstance(work, RunFirst):
            given = self._executor.run_first(work.plan, self._between)
            if isinstance(given, StepResult):
                return Computed(work, given)
            self.is_handing_on = True
            return Computed(work, payload=given)
        return self._compute_stage(work)

    def _compute_stage(self, work: RunStage) -> Computed:
        try:
            rows = self._executor.run_stage(work.chunks, work.moves, work.payload, self._between)
        except StepCancelledError:
            return Computed(work)
        self.is_handing_on = True
        return Computed(work, payload=rows)

    def _between(self) -> bool:
        self.layers_done += 1
        self._slip_in()
        return self._cancelled.is_set()


@dataclass(frozen=True)
class PartDone:
    """A part was loaded or compared. `error`: why it is not right, or None."""

    transfer: int
    error: str | None


class PartThread(WorkerThread[LoadPart | CheckPart, PartDone]):
    """Reads parts from the file, and compares those that peers sent."""

    def __init__(self, engine: Engine) -> None:
        super().__init__("parts", self._bring)
        self._engine = engine

    def _bring(self, job: LoadPart | CheckPart) -> PartDone:
        try:
            if isinstance(job, LoadPart):
                self._engine.load(job.part)
            if self._engine.checksum(job.part) != self._engine.checksums[job.part]:
                what = "the file has changed" if isinstance(job, LoadPart) else "it came damaged"
                return PartDone(job.transfer, f"the checksum of {job.part} is wrong: {what}")
        except KunserveError as error:
            return PartDone(job.transfer, str(error))
        return PartDone(job.transfer, None)


class CopyThread(WorkerThread[CopyKv, int]):
    """Copies KV to host memory and back, in order, while steps compute; answers with transfers.

    Args:
        host_kv: closed with the thread.
    """

    def __init__(self, host_kv: HostKv) -> None:
        super().__init__("copies", self._copy)
        self._host_kv = host_kv

    def _copy(self, order: CopyKv) -> int:
        self._host_kv.copy(order)
        return order.transfer

    def join(self) -> None:
        """End the thread when its copies are done, and give the host memory back."""
        super().join()
        self._host_kv.close()
