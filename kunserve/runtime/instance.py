"""The instance process: a member and an executor, driven by messages of the front.

Two threads. The control thread (main) takes messages in, schedules and reports; the compute
thread runs one plan at a time. So an abort, a lease or a heartbeat never waits for a long step.

    front --Lease/Revoke--> control --plan--> compute
    front <--GroupReport--- control <-result-- compute

What it decides is `kunserve.policy.member`; here are threads, sockets and time.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import sys
import threading
import time
from functools import partial
from typing import Any

import msgspec
import torch
import zmq

from kunserve.core.errors import AccountingError, KunserveError
from kunserve.core.events import InstanceReady
from kunserve.core.step import StepPlan, StepResult
from kunserve.policy.cost_model import CostModel
from kunserve.policy.member import Member
from kunserve.runtime.codec import LoadProgress, Shutdown, StartFailed
from kunserve.runtime.process import ignore_terminal_signals
from kunserve.runtime.settings import InstanceSettings
from kunserve.runtime.transport import InstanceSocket
from kunserve.worker.engine import Engine
from kunserve.worker.executor import Executor
from kunserve.worker.profile import quick_fit

logger = logging.getLogger("kunserve.instance")

HEARTBEAT_INTERVAL_MS = 500


class ComputeThread:
    """Runs plans one at a time and wakes the control thread through an eventfd.

    `layers_done` grows between layers, and before the head: a step that stands still is seen
    from outside.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[StepResult | BaseException] = queue.SimpleQueue()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._cancelled = threading.Event()
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self.layers_done = 0
        self.busy = False
        self.execute_ns = 0
        self._thread.start()

    @property
    def wake_fd(self) -> int:
        """Readable when a result waits."""
        return self._wake_fd

    def submit(self, plan: StepPlan) -> None:
        """Start a step. The last one's result must have been collected."""
        if self.busy:
            raise AccountingError("a step is under way already")
        self.busy = True
        self._cancelled.clear()
        self._plans.put(plan)

    def collect(self) -> StepResult | None:
        """The result of the step under way, or None while it runs.

        Raises:
            BaseException: what the step raised.
        """
        try:
            os.eventfd_read(self._wake_fd)
        except BlockingIOError:
            return None
        result = self._results.get()
        self.busy = False
        if isinstance(result, BaseException):
            raise result
        return result

    def cancel(self) -> None:
        """Cancel the step under way between layers; its result comes marked as cancelled."""
        self._cancelled.set()

    def join(self) -> None:
        """Cancel what runs and end the thread: nothing may be unmapped before."""
        self._cancelled.set()
        self._plans.put(None)
        self._thread.join()
        os.close(self._wake_fd)

    def _run(self) -> None:
        while (plan := self._plans.get()) is not None:
            begin_ns = time.monotonic_ns()
            try:
                result: StepResult | BaseException = self._executor.execute(plan, self._between)
            except BaseException as error:  # noqa: BLE001 - handed to the control thread whole
                result = error
            self.execute_ns += time.monotonic_ns() - begin_ns
            self._results.put(result)
            os.eventfd_write(self._wake_fd, 1)

    def _between(self) -> bool:
        self.layers_done += 1
        return self._cancelled.is_set()


class Instance:
    """The control thread: messages in, results in, plans and reports out."""

    def __init__(
        self,
        settings: InstanceSettings,
        engine: Engine,
        cost_model: CostModel,
        link: InstanceSocket,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._link = link
        self._member = Member(
            settings.instance,
            settings.incarnation,
            partial(engine.make_scheduler, settings.scheduler, cost_model),
        )
        self._compute = ComputeThread(engine.make_executor())
        self._schedule_ns = 0
        self._stopping = False

    def run(self) -> None:
        """Serve until the front says Shutdown."""
        poller = zmq.Poller()
        poller.register(self._link.socket, zmq.POLLIN)
        poller.register(self._compute.wake_fd, zmq.POLLIN)
        next_beat = time.monotonic()
        while not self._stopping:
            wait_ms = max(0, int((next_beat - time.monotonic()) * 1000))
            poller.poll(wait_ms)
            begin_ns = time.monotonic_ns()
            for message in self._link.receive():
                self._take(message)
            self._finish_step()
            self._start_step()
            self._schedule_ns += time.monotonic_ns() - begin_ns
            if time.monotonic() >= next_beat:
                self._beat()
                next_beat = time.monotonic() + HEARTBEAT_INTERVAL_MS / 1000
        self._compute.join()

    def _take(self, message: Any) -> None:
        if isinstance(message, Shutdown):
            self._stopping = True
        else:
            self._member.take(message)

    def _finish_step(self) -> None:
        """Take in the result of the step under way, if it is there."""
        result = self._compute.collect() if self._compute.busy else None
        if result is None:
            return
        for request_id, message in result.failed:
            logger.error("request %s failed: %s", request_id, message)
        self._member.finish_step(result, time.monotonic_ns())
        if self._settings.check_accounting:
            self._member.check()
            self._engine.memory.check()

    def _start_step(self) -> None:
        """Report before the compute thread has the plan: its step may end the process."""
        plan = self._member.next_plan(time.monotonic_ns())
        report = self._member.take_report(self._compute.execute_ns, self._schedule_ns)
        if report is not None:
            self._link.send(report)
        if plan is not None:
            self._compute.submit(plan)

    def _beat(self) -> None:
        heartbeat = self._member.heartbeat(self._compute.layers_done)
        if heartbeat is not None:
            self._link.send(heartbeat)


def _serve(settings: InstanceSettings, link: InstanceSocket) -> None:
    def progress(activity: str, fraction: float) -> None:
        link.send(LoadProgress(settings.instance, settings.incarnation, activity, fraction))

    progress("opening memory", 0.0)
    with Engine(settings.engine, progress) as engine:
        progress("measuring step times", 1.0)
        cost_model = quick_fit(engine)
        logger.info("step cost: %s", cost_model)
        gc.freeze()  # what lives until the end: no collection needs to look at it again
        link.send(InstanceReady(settings.instance, settings.incarnation, engine.total_blocks))
        Instance(settings, engine, cost_model, link).run()


def main() -> int:
    """Entry of the process: settings come as msgpack on standard input."""
    ignore_terminal_signals()
    given = sys.stdin.buffer.read()
    if not given:  # the front died before it wrote them
        return 1
    settings = msgspec.msgpack.decode(given, type=InstanceSettings)
    logging.basicConfig(
        level=settings.log_level.upper(),
        format=f"%(levelname)s %(asctime)s instance {settings.instance}: %(message)s",
        datefmt="%m-%d %H:%M:%S",
    )
    # All parallelism is the kernels' own pool; torch only computes small tables here.
    torch.set_num_threads(1)
    link = InstanceSocket(settings.keys)
    try:
        _serve(settings, link)
    except KunserveError as error:
        logger.debug("the instance ends", exc_info=True)
        link.send(StartFailed(settings.instance, settings.incarnation, _one_line(error)))
        return 1
    except MemoryError:
        message = "out of memory; lower --kv-cache-memory-bytes or --instances"
        link.send(StartFailed(settings.instance, settings.incarnation, message))
        return 1
    finally:
        link.close()
    return 0


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


if __name__ == "__main__":
    sys.exit(main())
