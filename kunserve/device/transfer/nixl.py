"""Pulls between processes over NIXL with its UCX backend.

UCX picks the link: on one host a copy by the kernel, which runs inside `begin_pull`; with
UCX_TLS=tcp in the environment of every process, sockets. Host memory only.

Known defect of UCX 1.23 over tcp: a source on which a request of a dead reader arrives late aborts
("Endpoint timeout"; 5 of 30 readers killed in a pull of 1 MiB chunks). The default link does not.

`remove_peer` refuses while a pull is in progress: NIXL would forget the pull ("not found") while
its bytes still come.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kunserve.device.transfer.base import (
    MemoryRange,
    PeerUnknownError,
    PullHandle,
    PullStatus,
    Span,
    TransferError,
    TransferUnavailableError,
    check_registered,
)

try:
    import nixl_cu12
    from nixl_cu12 import _bindings as nixl_bindings
except ImportError as error:
    _UNAVAILABLE = f"nixl_cu12 cannot be imported ({error}): pip install nixl-cu12"
    _NIXL_ERRORS: tuple[type[Exception], ...] = ()
else:
    _UNAVAILABLE = ""
    _NIXL_ERRORS = (
        nixl_bindings.nixlBackendError,
        nixl_bindings.nixlCancelledError,
        nixl_bindings.nixlInvalidParamError,
        nixl_bindings.nixlMismatchError,
        nixl_bindings.nixlNotAllowedError,
        nixl_bindings.nixlNotFoundError,
        nixl_bindings.nixlNotPostedError,
        nixl_bindings.nixlNotSupportedError,
        nixl_bindings.nixlRemoteDisconnectError,
        nixl_bindings.nixlRepostActiveError,
        nixl_bindings.nixlUnknownError,
    )
    # Its import sends INFO to stdout and silences failing log handlers of the whole process.
    logging.getLogger("nixl").setLevel(logging.WARNING)
    logging.raiseExceptions = True

ANNOUNCE_EVERY_NS = 20_000_000
"""A reader tells its source so often that it pulls, for the source to look after its sockets.

As a message of its own: one that rides on the pull would make its end wait for the source.
"""

_LIBC = ctypes.CDLL(None)
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MADV_POPULATE_WRITE = 23
"""Linux 5.14; the mmap module does not name it."""

_BACKEND = "UCX"
_MEMORY = "DRAM"


def check_available() -> None:
    """Raise TransferUnavailableError if NIXL cannot be imported."""
    if _UNAVAILABLE:
        raise TransferUnavailableError(_UNAVAILABLE)


class NixlAgent:
    """See `TransferAgent`.

    Raises:
        TransferUnavailableError: NIXL or its UCX plugin is not there.
        TransferError: NIXL refused.
    """

    def __init__(self, name: str) -> None:
        check_available()
        self.name = name
        self._thread = threading.get_ident()
        self._ranges: list[MemoryRange] = []
        self._peers: dict[str, int] = {}  # name to the time of the last announcement
        self._pulls: dict[PullHandle, Any] = {}
        self._agent: Any = None
        config = nixl_cu12.nixl_agent_config(enable_prog_thread=False, backends=[_BACKEND])
        try:
            self._agent = nixl_cu12.nixl_agent(name, config)
        except _NIXL_ERRORS as error:
            raise TransferError(f"NIXL opened no agent: {error}") from error
        if _BACKEND not in self._agent.backends:
            raise TransferUnavailableError(f"NIXL has no {_BACKEND} plugin here")

    def register(self, address: int, nbytes: int) -> None:
        agent = self._opened()
        # Else the first pull of each page waits for its faults: 17 ms for 64 MiB, at both ends. On
        # a kernel that cannot (before Linux 5.14) it does.
        _LIBC.madvise(address, nbytes, _MADV_POPULATE_WRITE)
        try:
            agent.register_memory([(address, nbytes, 0, "")], _MEMORY)
        except _NIXL_ERRORS as error:
            raise TransferError(
                f"NIXL did not register {nbytes} bytes at {address:#x}: {error}"
            ) from error
        self._ranges.append(MemoryRange(address, nbytes))

    def metadata(self) -> bytes:
        metadata: bytes = self._opened().get_agent_metadata()
        return metadata

    def add_peer(self, name: str, metadata: bytes) -> None:
        agent = self._opened()
        if name in self._peers:
            raise TransferError(f"{name} is known already: remove it first")
        try:
            loaded: bytes | str = agent.add_remote_agent(metadata)
        except _NIXL_ERRORS as error:
            raise TransferError(f"this is not the metadata of {name}: {error}") from error
        loaded = loaded.decode() if isinstance(loaded, bytes) else loaded
        if loaded != name:
            if loaded not in self._peers:
                agent.remove_remote_agent(loaded)
            raise TransferError(f"this is not the metadata of {name} but of {loaded}")
        self._peers[name] = time.monotonic_ns() - ANNOUNCE_EVERY_NS

    def remove_peer(self, name: str) -> None:
        agent = self._opened()
        if name not in self._peers:
            raise PeerUnknownError(f"{name} is not known: add it first")
        if any(p.peer == name and p.status is PullStatus.IN_PROGRESS for p in self._pulls):
            raise TransferError(f"a pull from {name} is in progress: poll it to its end first")
        del self._peers[name]
        with suppress(*_NIXL_ERRORS):  # it may have forgotten a peer that disconnected
            agent.remove_remote_agent(name)

    def begin_pull(self, peer: str, spans: Sequence[Span]) -> PullHandle:
        agent = self._opened()
        if peer not in self._peers:
            raise PeerUnknownError(f"{peer} is not known: add it first")
        for span in spans:
            check_registered(self._ranges, span.local_address, span.nbytes, self.name)
        handle = PullHandle(peer)
        try:
            request = agent.initialize_xfer(
                "READ",
                agent.get_xfer_descs(
                    _table([(s.local_address, s.nbytes, 0) for s in spans]), _MEMORY
                ),
                agent.get_xfer_descs(
                    _table([(s.remote_address, s.nbytes, 0) for s in spans]), _MEMORY
                ),
                peer,
            )
        except nixl_bindings.nixlRemoteDisconnectError as error:
            handle.fail(f"{peer} is disconnected: {error}")
            return handle
        except _NIXL_ERRORS as error:
            raise TransferError(
                f"NIXL refused a pull from {peer} ({error}): are its bytes registered?"
            ) from error
        self._pulls[handle] = request
        try:
            self._announce(agent, peer)
            self._note(handle, agent.transfer(request))
        except _NIXL_ERRORS as error:
            handle.fail(f"{peer}: {error}")
        return handle

    def poll(self, handle: PullHandle) -> PullStatus:
        agent = self._opened()
        if handle.status is PullStatus.IN_PROGRESS:
            try:
                self._note(handle, agent.check_xfer_state(self._pulls[handle]))
            except _NIXL_ERRORS as error:
                handle.fail(f"{handle.peer}: {error}")
        return handle.status

    def release(self, handle: PullHandle) -> None:
        self._opened()
        if handle.status is PullStatus.IN_PROGRESS:
            raise TransferError(f"a pull from {handle.peer} is in progress: it cannot be cancelled")
        request = self._pulls.pop(handle, None)
        if request is not None:
            with suppress(*_NIXL_ERRORS):  # NIXL's own finalizer tries again
                request.release()

    def service(self) -> bool:
        return bool(self._opened().get_new_notifs())

    def close(self) -> None:
        self._pulls.clear()
        self._agent = None

    def _opened(self) -> Any:
        """The NIXL agent, for a caller on the right thread."""
        if self._agent is None:
            raise TransferError("the transfer agent is closed")
        if threading.get_ident() != self._thread:
            raise TransferError("a transfer agent belongs to the thread that made it")
        return self._agent

    def _announce(self, agent: Any, peer: str) -> None:
        now_ns = time.monotonic_ns()
        if now_ns - self._peers[peer] >= ANNOUNCE_EVERY_NS:
            agent.send_notif(peer, b"pull")
            self._peers[peer] = now_ns

    @staticmethod
    def _note(handle: PullHandle, state: str) -> None:
        if state == "DONE":
            handle.status = PullStatus.DONE
        elif state != "PROC":
            handle.fail(f"{handle.peer}: NIXL reports {state}")


def _table(rows: list[tuple[int, int, int]]) -> NDArray[np.uint64]:
    """Rows of (address, bytes, device), as NIXL reads them fastest."""
    return np.array(rows, dtype=np.uint64)
