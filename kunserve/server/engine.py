"""What HTTP needs from the rest of the front: a narrow, asynchronous interface."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from kunserve.core.ids import InstanceId, RequestId
from kunserve.core.request import SamplingParams, TokenOutput
from kunserve.runtime.stats_log import InstanceCounters
from kunserve.runtime.status import (
    DecisionTotals,
    GroupStatus,
    InstanceStatus,
    MigrationTotals,
    TransitionTotals,
)

__all__ = ["EngineClient", "EngineStatus", "InstanceStatus"]


@dataclass(frozen=True)
class EngineStatus:
    """`ready`: at least one instance takes requests and the front does not drain.
    `healthy`: an instance serves, and neither the controller nor an instance that should answer
    has been silent past its deadline.
    `controller_cpu_s`: what the controller's thread has computed since the start.
    `counters`: what every instance did since the start of the front; they never go back.
    `epoch`, `groups`, `dropped_bytes` (of parameters), `totals` and `migrations`: of the layout and
    of requests that moved, as in `ClusterView`, as are `may_drop` and `decisions` of the overload
    policy. `block_size`: tokens of a KV block."""

    ready: bool
    healthy: bool
    draining: bool
    num_requests: int
    instances: tuple[InstanceStatus, ...]
    controller_cpu_s: float = 0.0
    counters: Mapping[InstanceId, InstanceCounters] = field(default_factory=dict)
    epoch: int = 0
    groups: tuple[GroupStatus, ...] = ()
    block_size: int = 0
    dropped_bytes: int = 0
    totals: TransitionTotals = TransitionTotals()
    may_drop: bool = False
    decisions: DecisionTotals = DecisionTotals()
    migrations: MigrationTotals = MigrationTotals()


class EngineClient(Protocol):
    """The running cluster, seen from the HTTP side's event loop."""

    @property
    def max_model_len(self) -> int:
        """Most tokens (prompt + output) of one request: context and KVCache considered."""

    @property
    def vocab_size(self) -> int:
        """Token ids are in 0..vocab_size-1."""

    def generate(
        self,
        request_id: RequestId,
        prompt_token_ids: tuple[int, ...],
        params: SamplingParams,
    ) -> AsyncGenerator[tuple[TokenOutput, ...], None]:
        """Yield the tokens of one request as they come, the last one with `finish` set.

        Closing the iterator early (aclose, or cancellation of the task that awaits it) aborts
        the request and frees its blocks, whatever state it is in.

        Raises:
            InvalidRequestError: it can never be served; nothing was queued.
            QueueFullError: the bounded queue is full.
            ServiceUnavailableError: starting, draining, or every instance is dead.
        """

    def status(self) -> EngineStatus:
        """A snapshot, never blocking."""
