"""Stand-ins of the cluster for HTTP tests. `FakeEngine`: tokens from a list, pauses on command,
aborts on record. `FakeCluster`: layouts, and wishes that are answered on command."""

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from kunserve.core.events import WishKind
from kunserve.core.ids import Epoch, GroupId, InstanceId, RequestId
from kunserve.core.layout import Group, LayerRange, Stage
from kunserve.core.request import FinishReason, SamplingParams, TokenLogprobs, TokenOutput
from kunserve.core.step import GroupLoad
from kunserve.runtime.stats_log import InstanceCounters, LoadCounts
from kunserve.runtime.status import ClusterView, GroupStatus, InstanceStatus
from kunserve.server.admin import OnAnswer
from kunserve.server.engine import EngineStatus

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
    `view`: what `status` says of instances and layout; without instances it makes one up.
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
    view: ClusterView = ClusterView()
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
        instances = self.view.instances or (
            InstanceStatus(InstanceId(0), 1, "ready", 0.5, LOAD, pages={"kv": 8, "free": 2}),
        )
        return EngineStatus(
            self.ready,
            self.healthy,
            self.draining,
            len(self.calls),
            instances,
            counters={
                instance.instance: InstanceCounters(LoadCounts.of(instance.load), instance.timing)
                for instance in instances
                if instance.load is not None
            },
            epoch=self.view.epoch,
            groups=self.view.groups,
            block_size=self.view.block_size,
            dropped_bytes=self.view.dropped_bytes,
            totals=self.view.totals,
        )


def make_view(epoch: int, *rings: tuple[tuple[int, int, int], ...]) -> ClusterView:
    """Two instances in groups of (instance, first layer, layer after the last)."""
    groups = []
    for number, ring in enumerate(rings):
        stages = tuple(Stage(InstanceId(i), LayerRange(a, b)) for i, a, b in ring)
        group = Group(GroupId(10 * epoch + number), Epoch(epoch), stages)
        groups.append(GroupStatus(group, 100 * len(ring), 60 * len(ring), 4, None))
    return ClusterView(
        ready=True,
        instances=(
            InstanceStatus(InstanceId(0), 71, "ready", 0.1, None, pages={"part": 5, "free": 2}),
            InstanceStatus(InstanceId(1), None, "waiting for restart", 3.0, None),
        ),
        groups=tuple(groups),
        epoch=epoch,
        block_size=16,
        dropped_bytes=1000 * (2 - len(rings)),
    )


APART = make_view(3, ((0, 0, 30),), ((1, 0, 30),))
MERGED = make_view(4, ((0, 0, 12), (1, 12, 30)))


class FakeCluster:
    """A `ClusterControl` for tests: keeps wishes, and answers each as `script` says, from another
    thread as the real one does. Without a script they stay in `open`."""

    def __init__(self) -> None:
        self.view = APART
        self.wishes: list[tuple[object, ...]] = []
        self.open: list[OnAnswer] = []
        self.script: Callable[[OnAnswer], None] = self.open.append
        self.threads: list[threading.Thread] = []

    def wish(
        self, kind: WishKind, groups: tuple[tuple[InstanceId, ...], ...], on_answer: OnAnswer
    ) -> None:
        self._take(on_answer, kind, groups)

    def wish_drain(self, instance: InstanceId, on_answer: OnAnswer) -> None:
        self._take(on_answer, "drain", instance)

    def switch_policy(self, may_drop: bool, on_answer: OnAnswer) -> None:
        self._take(on_answer, "policy", may_drop)

    def _take(self, on_answer: OnAnswer, *wish: object) -> None:
        self.wishes.append(wish)
        self.in_thread(self.script, on_answer)

    def in_thread(self, call: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=call, args=args)
        self.threads.append(thread)
        thread.start()

    def grant(self, on_answer: OnAnswer) -> None:
        self.view = MERGED
        on_answer(True, "epoch 4")
