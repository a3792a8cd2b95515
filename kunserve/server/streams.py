"""The token streams of one HTTP request, merged; and work that ends with its client."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from starlette.types import Receive

from kunserve.core.ids import RequestId
from kunserve.core.request import SamplingParams, TokenOutput
from kunserve.server.engine import EngineClient
from kunserve.server.metrics import SequenceTimer

NS_PER_S = 1e9

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SequenceSpec:
    """One answer to one prompt: what the engine is asked for."""

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True)
class Arrival:
    """Tokens of one sequence that came since the last look. `ended`: no more will come."""

    index: int
    outputs: tuple[TokenOutput, ...]
    ended: bool


class TokenStreams:
    """Runs all sequences of an HTTP request and hands out their tokens as they come.

    Tokens that came while the consumer was busy (a slow client) are handed out together, so one
    event carries them all. Leaving the context aborts whatever still runs.
    """

    def __init__(
        self,
        engine: EngineClient,
        specs: Sequence[SequenceSpec],
        timers: Sequence[SequenceTimer],
    ) -> None:
        self._engine = engine
        self._specs = specs
        self._timers = timers
        self._tasks: list[asyncio.Task[None]] = []
        self._arrived: dict[int, list[TokenOutput]] = {}
        self._ended: set[int] = set()
        self._error: Exception | None = None
        self._wakeup = asyncio.Event()

    async def __aenter__(self) -> TokenStreams:
        self._tasks = [
            asyncio.create_task(self._pump(index, spec)) for index, spec in enumerate(self._specs)
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:  # wait, not gather: if we are cancelled here, their clean-up still runs
            await asyncio.wait(self._tasks)

    async def next(self) -> list[Arrival]:
        """Wait for tokens of any sequence.

        Raises:
            KunserveError: the engine refused or lost a sequence. Tokens that came before it are
                handed out first.
        """
        await self._wakeup.wait()
        self._wakeup.clear()
        if self._error is not None:
            if not self._arrived:
                raise self._error
            self._wakeup.set()
        arrivals = [
            Arrival(index, tuple(outputs), index in self._ended)
            for index, outputs in self._arrived.items()
        ]
        self._arrived.clear()
        return arrivals

    def abort(self, index: int) -> None:
        """A stop string ended the sequence: no more of its tokens are wanted."""
        self._tasks[index].cancel()

    async def _pump(self, index: int, spec: SequenceSpec) -> None:
        timer = self._timers[index]
        stream = self._engine.generate(spec.request_id, spec.prompt_token_ids, spec.params)
        try:
            async with contextlib.aclosing(stream):
                async for outputs in stream:
                    timer.tokens(len(outputs))
                    if outputs[0].queued_ns is not None:
                        timer.queued(outputs[0].queued_ns / NS_PER_S)
                    self._arrived.setdefault(index, []).extend(outputs)
                    self._wakeup.set()
            self._ended.add(index)
            self._arrived.setdefault(index, [])
        except Exception as error:  # noqa: BLE001  raised again in the consumer, see `next`
            self._error = self._error or error
        self._wakeup.set()


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, and cancel it when the client goes away. The request's body must have been read.

    Raises:
        Exception: what `work` raised.
    """
    worker = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone = watcher.done() and not worker.done()
        watcher.cancel()
        worker.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)
    if not worker.cancelled() and (error := worker.exception()) is not None:
        if gone:
            logger.debug("after a client went away: %r", error)
        else:
            raise error


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
