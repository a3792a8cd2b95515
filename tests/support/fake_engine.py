"""An `EngineClient` for HTTP tests: tokens from a list, pauses on command, aborts on record."""

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from kunserve.core.ids import InstanceId, RequestId
from kunserve.core.request import FinishReason, SamplingParams, TokenLogprobs, TokenOutput
from kunserve.core.step import GroupLoad
from kunserve.server.engine import EngineStatus, InstanceStatus

LOAD = GroupLoad(
    total_blocks=100,
    free_blocks=60,
    cached_blocks=15,
    num_running=3,
    num_waiting=2,
    queued_blocks=0,
    leases_seen=0,
    prompt_tokens=1,
    generated_tokens=2,
    preemptions=7,
    prefix_queries=11,
    prefix_hits=5,
)


@dataclass(frozen=True)
class Call:
    """What `generate` was asked for."""

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams


@dataclass
class FakeEngine:
    """Set the fields before a request; `calls`, `waiting` and `aborted` say what happened.

    `reply`: token ids of the answer. It ends by `end_token` (then STOP) unless `max_tokens` ends
    it first. `pause_before`: index of the token before which the stream waits for `resume()`.
    `fail_before`: index of the token before which `failure` is raised. `batch`: tokens per yield.
    """

    max_model_len: int = 256
    vocab_size: int = 400
    reply: Sequence[int] = (10, 11, 12)
    end_token: int = 2
    stopped_by_stop_token: bool = False
    pause_before: float = math.inf
    fail_before: float = math.inf
    failure: Exception | None = None
    batch: int = 1
    ready: bool = True
    healthy: bool = True
    draining: bool = False
    choose: Callable[[Call], Sequence[int]] | None = None
    calls: list[Call] = field(default_factory=list)
    waiting: list[RequestId] = field(default_factory=list)
    aborted: list[RequestId] = field(default_factory=list)
    _released: threading.Event = field(default_factory=threading.Event)
    _sleepers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = field(default_factory=list)

    def resume(self) -> None:
        """Let paused streams go on, now and later."""
        self._released.set()
        for loop, event in self._sleepers:
            loop.call_soon_threadsafe(event.set)

    async def generate(
        self, request_id: RequestId, prompt_token_ids: tuple[int, ...], params: SamplingParams
    ) -> AsyncIterator[tuple[TokenOutput, ...]]:
        """See `EngineClient`."""
        call = Call(request_id, prompt_token_ids, params)
        self.calls.append(call)
        reply = list(self.choose(call) if self.choose else self.reply)
        complete = False
        pending: list[TokenOutput] = []
        try:
            for index, token_id in enumerate([*reply, self.end_token]):
                if index >= self.pause_before:
                    await self._pause(request_id)
                if index >= self.fail_before and self.failure is not None:
                    complete = True
                    raise self.failure
                pending.append(self._output(call, index, token_id, index == len(reply)))
                complete = pending[-1].finish is not None
                if complete or len(pending) >= self.batch:
                    yield tuple(pending)
                    pending = []
                if complete:
                    return
        finally:
            if not complete:
                self.aborted.append(request_id)

    async def _pause(self, request_id: RequestId) -> None:
        event = asyncio.Event()
        self._sleepers.append((asyncio.get_running_loop(), event))
        self.waiting.append(request_id)
        if not self._released.is_set():
            await event.wait()

    def _output(self, call: Call, index: int, token_id: int, end: bool) -> TokenOutput:
        finish = None
        if end:
            finish = FinishReason.STOP
        elif index + 1 == call.params.max_tokens:
            finish = FinishReason.LENGTH
        logprobs = None
        if call.params.logprobs is not None:
            top = tuple((token_id + i, -0.5 - i) for i in range(call.params.logprobs))
            logprobs = TokenLogprobs(-0.5 if index else -math.inf, 1, top)
        stop_token = end and self.stopped_by_stop_token
        return TokenOutput(call.request_id, index, token_id, logprobs, finish, stop_token)

    def status(self) -> EngineStatus:
        """See `EngineClient`."""
        instance = InstanceStatus(InstanceId(0), 1, "ready", 0.5, LOAD)
        return EngineStatus(self.ready, self.healthy, self.draining, len(self.calls), (instance,))
