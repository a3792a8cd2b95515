"""The transfer agent: one-sided pulls of bytes out of the memory of other instance processes.

    this process, the reader                        the peer, the source: takes no part
    |....[local_address, + nbytes)....|   <-----    |..[remote_address, + nbytes)......|

One such pair of ranges is a `Span`; a pull is a list of spans of one peer. Each process registers
its memory once, at start, and hands its metadata to the others by another way (control sockets).
An agent is named "instance#incarnation": a restarted instance is another peer. The rules behind
this interface are those of links.md, numbered 1 to 6.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from kunserve.core.errors import KunserveError


class TransferError(KunserveError):
    """The agent was asked for something that it cannot do. Nothing was changed."""


class PeerUnknownError(TransferError):
    """No peer of this name was added, or it was removed."""


class TransferUnavailableError(TransferError):
    """This build or this machine has no such backend."""


class PullStatus(Enum):
    """State of a pull. Bytes of it may be written until it is DONE or FAILED, not after."""

    IN_PROGRESS = auto()
    DONE = auto()
    FAILED = auto()


@dataclass(frozen=True)
class Span:
    """Bytes [remote_address, + nbytes) of a peer, for [local_address, + nbytes) here.

    Raises:
        TransferError: there are no bytes in it.
    """

    local_address: int
    remote_address: int
    nbytes: int

    def __post_init__(self) -> None:
        if self.nbytes <= 0:
            raise TransferError(f"a span needs bytes, {self} has none")


@dataclass(eq=False)
class PullHandle:
    """One pull, from `begin_pull` to `release`. Only its agent writes to it.

    Attributes:
        error: why it failed; empty in every other state.
    """

    peer: str
    status: PullStatus = PullStatus.IN_PROGRESS
    error: str = ""

    def fail(self, error: str) -> None:
        """Mark the pull as failed."""
        self.status, self.error = PullStatus.FAILED, error


@dataclass(frozen=True)
class MemoryRange:
    """Addresses [address, address + nbytes) of this process."""

    address: int
    nbytes: int

    def holds(self, address: int, nbytes: int) -> bool:
        """Whether [address, address + nbytes) lies inside."""
        return self.address <= address and address + nbytes <= self.address + self.nbytes


def check_registered(ranges: Iterable[MemoryRange], address: int, nbytes: int, owner: str) -> None:
    """Raise TransferError unless [address, address + nbytes) lies inside one of `ranges`."""
    if not any(memory.holds(address, nbytes) for memory in ranges):
        raise TransferError(f"{nbytes} bytes at {address:#x} are not registered by {owner}")


class TransferAgent(Protocol):
    """One endpoint. Every call, the constructor included, comes from one thread: a second thread
    in one agent crashes UCX (links.md, rule 2)."""

    name: str

    def register(self, address: int, nbytes: int) -> None:
        """Let peers read, and pulls write, [address, address + nbytes) from now on.

        Once per range, at start, before `metadata`. Pages may be mapped anew inside the range
        while no pull touches them; every address of it must stay readable and writable.
        """
        ...

    def metadata(self) -> bytes:
        """What a peer needs to pull from here, for its `add_peer`."""
        ...

    def add_peer(self, name: str, metadata: bytes) -> None:
        """Make `name` known. Nothing is sent: a dead peer shows at the first pull. Both sides add
        each other, also where only one pulls.

        Raises:
            TransferError: it is known already, or the metadata is not that of `name`.
        """
        ...

    def remove_peer(self, name: str) -> None:
        """Forget `name`.

        Raises:
            PeerUnknownError: it is not known.
            TransferError: a pull from it is in progress. Removal would not stop it and would hide
                its end.
        """
        ...

    def begin_pull(self, peer: str, spans: Sequence[Span]) -> PullHandle:
        """Start copying `spans` from `peer`. What fails later shows in `poll`.

        Raises:
            PeerUnknownError: see the class.
            TransferError: bytes that this side or the peer has not registered.
        """
        ...

    def poll(self, handle: PullHandle) -> PullStatus:
        """Move transfers on and say where this one stands."""
        ...

    def release(self, handle: PullHandle) -> None:
        """Give the handle back.

        Raises:
            TransferError: the pull is in progress. Nothing can cancel it (links.md, rule 3).
        """
        ...

    def service(self) -> bool:
        """Move transfers on that peers asked of this side; True if one announced pulls.

        Over tcp a peer's pull advances only here: call it again and again (links.md, rule 5).
        """
        ...

    def close(self) -> None:
        """Leave. Pulls in progress are abandoned, and peers that pull from here see a failure.
        May be called twice."""
        ...
