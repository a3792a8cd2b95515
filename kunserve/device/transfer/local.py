"""Pulls between agents of one process, with faults on demand: for tests and for one process.

A pull is a copy that is due. It happens at the reader's next poll or, on a manual fabric, in
`LocalFabric.step`. A stopped source leaves its pulls in progress, and they write when it goes on:
as a stopped process does over tcp (links.md).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from kunserve.device.transfer.base import (
    MemoryRange,
    PeerUnknownError,
    PullHandle,
    PullStatus,
    Span,
    TransferError,
    check_registered,
)


@dataclass(eq=False)
class _DuePull:
    reader: str
    handle: PullHandle
    spans: tuple[Span, ...]


class LocalFabric:
    """What connects the agents of one process. Its methods may be called from any thread.

    Args:
        manual: pulls advance only in `step`, the oldest first.
    """

    def __init__(self, *, manual: bool = False) -> None:
        self.manual = manual
        self._lock = threading.Lock()
        self._ranges: dict[str, list[MemoryRange]] = {}
        self._stopped: set[str] = set()
        self._announced: set[str] = set()
        self._due: list[_DuePull] = []

    # -- faults and time, for tests

    @property
    def pulls_in_progress(self) -> int:
        """How many pulls have begun and not ended."""
        with self._lock:
            return len(self._due)

    def step(self, count: int = 1) -> int:
        """End the `count` oldest pulls whose sources are not stopped; returns how many ended."""
        with self._lock:
            ready = [due for due in self._due if due.handle.peer not in self._stopped][:count]
            for due in ready:
                self._copy(due)
            return len(ready)

    def fail(self, peer: str, error: str = "injected failure") -> None:
        """Fail the pulls from `peer` that are in progress."""
        with self._lock:
            for due in [due for due in self._due if due.handle.peer == peer]:
                due.handle.fail(error)
                self._due.remove(due)

    def stop(self, name: str) -> None:
        """From now on pulls from `name` stay in progress."""
        with self._lock:
            self._stopped.add(name)

    def resume(self, name: str) -> None:
        """Undo `stop`."""
        with self._lock:
            self._stopped.discard(name)

    def kill(self, name: str) -> None:
        """`name` is gone for good: pulls from it fail, its own never end."""
        with self._lock:
            self._ranges.pop(name, None)
            self._due = [due for due in self._due if due.reader != name]
        self.fail(name, f"{name} is gone")

    # -- for agents

    def join(self, name: str) -> None:
        """Open `name`."""
        with self._lock:
            if name in self._ranges:
                raise TransferError(f"an agent named {name!r} exists already")
            self._ranges[name] = []

    def register(self, name: str, memory: MemoryRange) -> None:
        """Let the others read `memory` of `name`."""
        with self._lock:
            self._ranges[name].append(memory)

    def begin(self, reader: str, peer: str, spans: Sequence[Span]) -> PullHandle:
        """Make a pull due; at once failed where the peer is gone."""
        handle = PullHandle(peer)
        with self._lock:
            if peer not in self._ranges:
                handle.fail(f"{peer} is gone")
                return handle
            for span in spans:
                check_registered(self._ranges[peer], span.remote_address, span.nbytes, peer)
            self._announced.add(peer)
            self._due.append(_DuePull(reader, handle, tuple(spans)))
        return handle

    def advance(self, handle: PullHandle) -> None:
        """End the pull of `handle` if nothing holds it back."""
        if self.manual:
            return
        with self._lock:
            for due in self._due:
                if due.handle is handle and handle.peer not in self._stopped:
                    self._copy(due)
                    return

    def take_announced(self, name: str) -> bool:
        """Whether a pull from `name` began since the last call."""
        with self._lock:
            announced = name in self._announced
            self._announced.discard(name)
            return announced

    def _copy(self, due: _DuePull) -> None:
        for span in due.spans:
            ctypes.memmove(span.local_address, span.remote_address, span.nbytes)
        due.handle.status = PullStatus.DONE
        self._due.remove(due)


DEFAULT_FABRIC = LocalFabric()
"""Connects the agents that name no other fabric."""


class LocalAgent:
    """See `TransferAgent`.

    Raises:
        TransferError: the fabric has an agent of this name.
    """

    def __init__(self, name: str, fabric: LocalFabric = DEFAULT_FABRIC) -> None:
        fabric.join(name)
        self.name = name
        self._fabric = fabric
        self._ranges: list[MemoryRange] = []
        self._peers: set[str] = set()
        self._pulls: set[PullHandle] = set()

    def register(self, address: int, nbytes: int) -> None:
        memory = MemoryRange(address, nbytes)
        self._ranges.append(memory)
        self._fabric.register(self.name, memory)

    def metadata(self) -> bytes:
        return self.name.encode()

    def add_peer(self, name: str, metadata: bytes) -> None:
        if name in self._peers:
            raise TransferError(f"{name} is known already: remove it first")
        if metadata != name.encode():
            raise TransferError(f"this is not the metadata of {name}")
        self._peers.add(name)

    def remove_peer(self, name: str) -> None:
        if name not in self._peers:
            raise PeerUnknownError(f"{name} is not known: add it first")
        if any(p.peer == name and p.status is PullStatus.IN_PROGRESS for p in self._pulls):
            raise TransferError(f"a pull from {name} is in progress: poll it to its end first")
        self._peers.remove(name)

    def begin_pull(self, peer: str, spans: Sequence[Span]) -> PullHandle:
        if peer not in self._peers:
            raise PeerUnknownError(f"{peer} is not known: add it first")
        for span in spans:
            check_registered(self._ranges, span.local_address, span.nbytes, self.name)
        handle = self._fabric.begin(self.name, peer, spans)
        self._pulls.add(handle)
        return handle

    def poll(self, handle: PullHandle) -> PullStatus:
        if handle.status is PullStatus.IN_PROGRESS:
            self._fabric.advance(handle)
        return handle.status

    def release(self, handle: PullHandle) -> None:
        if handle.status is PullStatus.IN_PROGRESS:
            raise TransferError(f"a pull from {handle.peer} is in progress: it cannot be cancelled")
        self._pulls.discard(handle)

    def service(self) -> bool:
        return self._fabric.take_announced(self.name)

    def close(self) -> None:
        self._fabric.kill(self.name)
