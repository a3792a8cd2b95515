"""One-sided pulls of bytes between instances, one file per backend, and the pump that runs them."""

from __future__ import annotations

from kunserve.device.transfer.base import (
    MemoryRange,
    PeerUnknownError,
    PullHandle,
    PullStatus,
    Span,
    TransferAgent,
    TransferError,
    TransferUnavailableError,
)
from kunserve.device.transfer.local import LocalAgent, LocalFabric
from kunserve.device.transfer.nixl import NixlAgent
from kunserve.device.transfer.pump import Pump
from kunserve.device.transfer.schedule import (
    Priority,
    PullDone,
    PullJob,
    PullSchedule,
    PumpSettings,
    PumpStats,
    TokenBucket,
    cut_spans,
    merge_spans,
)

__all__ = [
    "LocalAgent",
    "LocalFabric",
    "MemoryRange",
    "NixlAgent",
    "PeerUnknownError",
    "Priority",
    "PullDone",
    "PullHandle",
    "PullJob",
    "PullSchedule",
    "PullStatus",
    "Pump",
    "PumpSettings",
    "PumpStats",
    "Span",
    "TokenBucket",
    "TransferAgent",
    "TransferError",
    "TransferUnavailableError",
    "create_transfer_agent",
    "cut_spans",
    "merge_spans",
]


def create_transfer_agent(kind: str, name: str) -> TransferAgent:
    """Open the agent `name` ("instance#incarnation") of the backend `kind`: "nixl" or "local".

    Raises:
        TransferUnavailableError: this build or machine has no such backend.
        TransferError: the backend refused.
    """
    if kind == "nixl":
        return NixlAgent(name)
    if kind == "local":
        return LocalAgent(name)
    raise TransferUnavailableError(f"no transfer backend is called {kind!r}; known: nixl, local")
