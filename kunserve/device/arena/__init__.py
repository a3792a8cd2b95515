"""Memory arenas, one file per backend, behind one interface."""

from __future__ import annotations

from kunserve.device.arena.base import (
    Arena,
    ArenaError,
    ArenaOutOfMemoryError,
    ArenaUnavailableError,
    CompletionToken,
    MappedRun,
    MappingLimitError,
    PageSpan,
    VirtualRange,
    WorkInFlightError,
    merge_runs,
)
from kunserve.device.arena.host import HostArena

__all__ = [
    "Arena",
    "ArenaError",
    "ArenaOutOfMemoryError",
    "ArenaUnavailableError",
    "CompletionToken",
    "HostArena",
    "MappedRun",
    "MappingLimitError",
    "PageSpan",
    "VirtualRange",
    "WorkInFlightError",
    "create_arena",
    "merge_runs",
]

_BACKENDS = {"host": HostArena}


def create_arena(
    name: str, *, page_bytes: int, num_pages: int, mapping_limit: int | None = None
) -> Arena:
    """Open `num_pages` physical pages of `page_bytes` on the backend `name`.

    Args:
        mapping_limit: the most mappings to use; None takes what the system leaves.

    Raises:
        ArenaUnavailableError: this build or machine has no such backend.
        ArenaOutOfMemoryError: the memory is not there.
    """
    backend = _BACKENDS.get(name)
    if backend is None:
        raise ArenaUnavailableError(
            f"memory arena {name!r} is not available in this build; it has: {', '.join(_BACKENDS)}"
        )
    return backend(page_bytes, num_pages, mapping_limit=mapping_limit)
