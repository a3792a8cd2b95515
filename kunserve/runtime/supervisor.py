"""Starts, watches and ends the instance processes of one front."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import msgspec

from kunserve.core.ids import InstanceId
from kunserve.runtime.process import die_with_parent
from kunserve.runtime.settings import InstanceSettings

logger = logging.getLogger("kunserve.supervisor")


@dataclass(frozen=True)
class Child:
    """A running instance process. `pidfd` becomes readable when it has ended."""

    instance: InstanceId
    incarnation: int
    identity: str
    public_key: str
    process: subprocess.Popen[bytes]
    pidfd: int


class Supervisor:
    """Owns the children. All calls come from one thread, which must live as long as they do:
    the kernel ends a child when the thread that started it ends (PR_SET_PDEATHSIG)."""

    def __init__(self) -> None:
        self._children: dict[InstanceId, Child] = {}

    @property
    def children(self) -> tuple[Child, ...]:
        """Processes that were started and not yet reaped."""
        return tuple(self._children.values())

    def child(self, instance: InstanceId) -> Child | None:
        """The process of an instance, or None."""
        return self._children.get(instance)

    def start(self, settings: InstanceSettings) -> Child:
        """Start an instance; its settings go through standard input, keys never through argv."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "kunserve.runtime.instance"],
            stdin=subprocess.PIPE,
            env=environment,
            preexec_fn=die_with_parent(os.getpid()),
        )
        assert process.stdin is not None
        try:
            process.stdin.write(msgspec.msgpack.encode(settings))
            process.stdin.close()
        except BrokenPipeError:
            logger.debug("instance %d ended before it read its settings", settings.instance)
        child = Child(
            instance=settings.instance,
            incarnation=settings.incarnation,
            identity=settings.keys.identity,
            public_key=settings.keys.public_key,
            process=process,
            pidfd=os.pidfd_open(process.pid),
        )
        self._children[settings.instance] = child
        return child

    def kill(self, instance: InstanceId) -> None:
        """End an instance at once, also one that is stopped; it is reaped when its pidfd says."""
        child = self._children.get(instance)
        if child is not None:
            child.process.kill()

    def reap(self, instance: InstanceId) -> str:
        """Collect an ended process and say how it ended."""
        child = self._children.pop(instance)
        os.close(child.pidfd)
        return _exit_reason(child.process.wait())

    def stop_all(self, grace_s: float) -> None:
        """Wait for the children, who were told to end, and kill those that do not in time."""
        deadline = time.monotonic() + grace_s
        for child in self.children:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                logger.warning("instance %d does not end; killing it", child.instance)
                child.process.kill()
            self.reap(child.instance)


def _exit_reason(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
