"""The `EngineClient` over a real cluster: bridges the controller's thread and the HTTP loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable

from kunserve.core.errors import (
    InstanceFailedError,
    InvalidRequestError,
    KunserveError,
    QueueFullError,
    ServiceUnavailableError,
)
from kunserve.core.events import DeliverTokens, RefusalKind, RefuseRequest
from kunserve.core.ids import RequestId
from kunserve.core.request import Request, SamplingParams, TokenOutput
from kunserve.runtime.cluster import Cluster
from kunserve.runtime.stats_log import CounterSums
from kunserve.runtime.status import ClusterView
from kunserve.server.engine import EngineStatus

_REFUSALS: dict[RefusalKind, Callable[[str], KunserveError]] = {
    RefusalKind.INVALID: InvalidRequestError,
    RefusalKind.QUEUE_FULL: QueueFullError,
    RefusalKind.UNAVAILABLE: ServiceUnavailableError,
    RefusalKind.FAILED: InstanceFailedError,
}


# An instance that drains still serves. One that resets loads what it dropped, and may say nothing
# meanwhile: that is no silence, and the controller has a deadline of its own for it.
_ANSWERING = ("ready", "draining")
_ALIVE = (*_ANSWERING, "resetting")


class ClusterEngine:
    """Streams of tokens for HTTP handlers, which all run on one event loop.

    Args:
        sums: fed with every view of `cluster`, by whoever made it.
        heartbeat_timeout_s: an instance that is silent for longer counts as unhealthy.
    """

    def __init__(
        self, cluster: Cluster, sums: CounterSums, vocab_size: int, heartbeat_timeout_s: float
    ) -> None:
        self._cluster = cluster
        self._sums = sums
        self._vocab_size = vocab_size
        self._heartbeat_timeout_s = heartbeat_timeout_s

    @property
    def max_model_len(self) -> int:
        """Most tokens (prompt + output) of one request."""
        return self._cluster.max_request_tokens

    @property
    def vocab_size(self) -> int:
        """Token ids are in 0..vocab_size-1."""
        return self._vocab_size

    async def generate(
        self,
        request_id: RequestId,
        prompt_token_ids: tuple[int, ...],
        params: SamplingParams,
    ) -> AsyncGenerator[tuple[TokenOutput, ...], None]:
        """See `EngineClient.generate`."""
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[DeliverTokens | RefuseRequest] = asyncio.Queue()

        def sink(news: DeliverTokens | RefuseRequest) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens any more
                loop.call_soon_threadsafe(inbox.put_nowait, news)

        request = Request(request_id, prompt_token_ids, params, time.monotonic_ns())
        finished = False
        self._cluster.submit(request, sink)
        try:
            while not finished:
                news = await inbox.get()
                if isinstance(news, RefuseRequest):
                    finished = True
                    raise _REFUSALS[news.kind](news.message)
                finished = news.outputs[-1].finish is not None
                yield news.outputs
        finally:
            if not finished:
                self._cluster.abort(request_id)

    def status(self) -> EngineStatus:
        """A snapshot, never blocking."""
        view = self._cluster.view
        return EngineStatus(
            ready=view.ready,
            healthy=not self._cluster.ended.is_set() and self._is_healthy(view),
            draining=view.draining,
            num_requests=view.num_requests,
            instances=view.instances,
            controller_cpu_s=view.cpu_ns / 1e9,
            counters=self._sums.totals,
            epoch=view.epoch,
            groups=view.groups,
            block_size=view.block_size,
            dropped_bytes=view.dropped_bytes,
            totals=view.totals,
            may_drop=view.may_drop,
            decisions=view.decisions,
            migrations=view.migrations,
        )

    def _is_healthy(self, view: ClusterView) -> bool:
        """Some instance lives, the controller goes on, and none that should answer is silent."""
        answering = [instance for instance in view.instances if instance.state in _ANSWERING]
        view_age_s = (time.monotonic_ns() - view.at_ns) / 1e9
        return (
            any(instance.state in _ALIVE for instance in view.instances)
            and view_age_s <= self._heartbeat_timeout_s
            and all(instance.heartbeat_age_s <= self._heartbeat_timeout_s for instance in answering)
        )
