"""One group's pipeline in virtual time: the production scheduler on stages that only take time.

    stage 0   [ layers of m ][ layers of m+1 ][head m][ layers of m+2 ]
    stage 1                  [ layers of m   ][ layers of m+1 ]
                                              ^ m is done; what is formed next is m+2

Steps go around the ring as `kunserve.policy.member` sends them: as many in flight as stages; the
head of a step slips in between two layers of the leader's work. A stage takes what the cost model
says, a link what it takes for the rows. Nothing is computed, so long queues are cheap to run.

A *bubble* is time in which a stage has nothing to do although some microbatch is unfinished (paper
section 5): it waits for another stage.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from kunserve.core.ids import Epoch, InstanceId, RequestId, SlotId
from kunserve.core.layout import LayerRange, Stage
from kunserve.core.request import Request, SamplingParams
from kunserve.core.step import Chunk, SampledToken, StepPlan, StepResult
from kunserve.policy.blocks import BlockPool
from kunserve.policy.cost_model import ChunkShape, CostModel
from kunserve.policy.planner import TypicalStep, slowest_stage
from kunserve.policy.scheduler import Scheduler, SchedulerConfig
from kunserve.sim.timeline import Timeline

_EPOCH = Epoch(1)
_TOKEN = 7
_BLOCKS_PER_PAGE = 64


@dataclass(frozen=True)
class PipelineProfile:
    """A model on a group of stages.

    Args:
        cost_model: of a whole instance.
        stage_layers: layers of each stage, in ring order.
        kv_blocks: that the group has, in whole pages of 64.
        link_ns: of one hop, besides its rows.
        link_ns_per_row: of one row of activations.
    """

    cost_model: CostModel
    stage_layers: tuple[int, ...]
    kv_blocks: int
    link_ns: float = 0.0
    link_ns_per_row: float = 0.0

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return sum(self.stage_layers)

    @property
    def slowest(self) -> CostModel:
        """What the scheduler budgets by, as `kunserve.policy.member` has it."""
        ends = [sum(self.stage_layers[: index + 1]) for index in range(len(self.stage_layers))]
        stages = [
            Stage(InstanceId(index), LayerRange(end - count, end))
            for index, (end, count) in enumerate(zip(ends, self.stage_layers, strict=True))
        ]
        return slowest_stage(stages, self.num_layers, self.cost_model, TypicalStep())


@dataclass(frozen=True)
class PipelineRun:
    """What became of a queue. Times from its arrival; `first_token_ns` in the queue's order.

    `queue_ns`: until the last request had its first token. `tokens`: prompt and output.
    """

    elapsed_ns: int
    queue_ns: int
    busy_ns: tuple[int, ...]
    queue_busy_ns: tuple[int, ...]
    steps: int
    tokens: int
    preemptions: int
    first_token_ns: tuple[int, ...]

    @property
    def bubbles(self) -> tuple[float, ...]:
        """Idle share of each stage: some microbatch is unfinished from begin to end."""
        return tuple(1.0 - busy_ns / self.elapsed_ns for busy_ns in self.busy_ns)

    @property
    def queue_bubbles(self) -> tuple[float, ...]:
        """The same while requests queued: afterwards there is nothing to look ahead to."""
        return tuple(1.0 - busy_ns / self.queue_ns for busy_ns in self.queue_busy_ns)

    @property
    def tokens_per_s(self) -> float:
        """Throughput."""
        return self.tokens / (self.elapsed_ns / 1e9)


def run_pipeline(
    profile: PipelineProfile, config: SchedulerConfig, queue: Sequence[tuple[int, int]]
) -> PipelineRun:
    """Serve requests of (prompt, output) tokens that are all there at once, to the last token.

    Args:
        config: `num_stages` is the profile's; prefixes are not cached, prompts are all alike.

    Raises:
        RequestTooLargeError: one of them can never fit.
    """
    return _Pipeline(profile, config, queue).run()


@dataclass(eq=False)
class _Work:
    """A stage's part of a step. It ends at `end_ns`, later if a head slips in."""

    plan: StepPlan
    is_head: bool
    duration_ns: int
    end_ns: int = 0


class _Pipeline:
    def __init__(
        self, profile: PipelineProfile, config: SchedulerConfig, queue: Sequence[tuple[int, int]]
    ) -> None:
        self._profile = profile
        self._timeline = Timeline()
        num_stages = len(profile.stage_layers)
        kv_blocks = profile.kv_blocks // _BLOCKS_PER_PAGE * _BLOCKS_PER_PAGE
        pool = BlockPool(kv_blocks, _BLOCKS_PER_PAGE, {SlotId(0): kv_blocks})
        limits = replace(config, num_stages=num_stages, enable_prefix_caching=False)
        self._scheduler = Scheduler(limits, pool, profile.slowest, _EPOCH)
        self._ready: list[deque[_Work]] = [deque() for _ in range(num_stages)]
        self._active: list[_Work | None] = [None] * num_stages
        self._head: _Work | None = None
        self._busy_ns = [0] * num_stages
        self._queue_busy_ns: tuple[int, ...] = ()
        self._steps = 0
        self._first_token_ns: dict[RequestId, int] = {}
        self._queue = [_request(index, *lengths) for index, lengths in enumerate(queue)]

    def run(self) -> PipelineRun:
        for request in self._queue:
            self._scheduler.add(request)
        self._plan()
        while self._scheduler.has_work():
            self._timeline.advance()
        self._scheduler.check()
        first_ns = tuple(self._first_token_ns[request.id] for request in self._queue)
        load = self._scheduler.load()
        return PipelineRun(
            elapsed_ns=self._timeline.now_ns,
            queue_ns=max(first_ns),
            busy_ns=tuple(self._busy_ns),
            queue_busy_ns=self._queue_busy_ns,
            steps=self._steps,
            tokens=load.prompt_tokens + load.generated_tokens,
            preemptions=load.preemptions,
            first_token_ns=first_ns,
        )

    # ------------------------------------------------------------ the ring

    def _plan(self) -> None:
        while (plan := self._scheduler.schedule(self._timeline.now_ns)) is not None:
            self._steps += 1
            self._give(0, _Work(plan, is_head=False, duration_ns=self._layers_ns(plan.chunks, 0)))

    def _give(self, stage: int, work: _Work) -> None:
        self._ready[stage].append(work)
        self._start(stage)

    def _start(self, stage: int) -> None:
        """The next work of a stage; a head does not wait for the layers under way."""
        ready, active = self._ready[stage], self._active[stage]
        if not ready or (self._head is not None and stage == 0):
            return
        if active is None:
            self._active[stage] = self._begin(stage, ready.popleft())
        elif ready[0].is_head and not active.is_head:
            self._head = self._begin(stage, ready.popleft())
            active.end_ns += self._head.duration_ns
            self._timeline.at(active.end_ns, partial(self._end, stage, active))

    def _begin(self, stage: int, work: _Work) -> _Work:
        work.end_ns = self._timeline.now_ns + work.duration_ns
        self._timeline.at(work.end_ns, partial(self._end, stage, work))
        return work

    def _end(self, stage: int, work: _Work) -> None:
        if self._timeline.now_ns < work.end_ns or work not in (self._head, self._active[stage]):
            return  # heads slipped in: it ends later, or it has ended, if they took no time
        if work is self._head:
            self._head = None
        else:
            self._active[stage] = None
        self._busy_ns[stage] += work.duration_ns
        if work.is_head:
            self._land(work.plan)
        else:
            self._pass_on(stage, work.plan)
        self._start(stage)

    def _pass_on(self, stage: int, plan: StepPlan) -> None:
        """To the next stage; from the last one, rows that sample return to the leader."""
        following = (stage + 1) % len(self._ready)
        rows = plan.num_tokens if following else sum(chunk.samples for chunk in plan.chunks)
        duration_ns = self._layers_ns(plan.chunks, following) if following else self._head_ns(plan)
        work = _Work(plan, is_head=following == 0, duration_ns=duration_ns)
        profile = self._profile
        hop_ns = round(profile.link_ns + profile.link_ns_per_row * rows)
        if len(self._ready) == 1:
            hop_ns = 0
        self._timeline.after(hop_ns, partial(self._give, following, work))

    def _land(self, plan: StepPlan) -> None:
        now_ns = self._timeline.now_ns
        tokens = tuple(
            SampledToken(chunk.request_id, chunk.output_index, _TOKEN)
            for chunk in plan.chunks
            if chunk.samples
        )
        result = StepResult(_EPOCH, plan.step, tokens)
        for output in self._scheduler.update(plan, result, now_ns):
            if output.index == 0:
                self._first_token_ns[output.request_id] = now_ns
                if len(self._first_token_ns) == len(self._queue):
                    self._queue_busy_ns = self._busy_until(now_ns)
        self._plan()

    def _busy_until(self, now_ns: int) -> tuple[int, ...]:
        """Busy time so far, with what is under way."""
        under_way = [
            work.duration_ns - (work.end_ns - now_ns) if work is not None else 0
            for work in self._active
        ]
        return tuple(map(sum, zip(self._busy_ns, under_way, strict=True)))

    # ------------------------------------------------------------ times

    def _layers_ns(self, chunks: Sequence[Chunk], stage: int) -> int:
        profile = self._profile
        layers = profile.stage_layers[stage]
        shapes = map(_shape, chunks)
        return round(profile.cost_model.stage_ns(shapes, layers, profile.num_layers, False))

    def _head_ns(self, plan: StepPlan) -> int:
        rows = sum(chunk.samples for chunk in plan.chunks)
        return round(self._profile.cost_model.head_step_ns(rows))


def _shape(chunk: Chunk) -> ChunkShape:
    return ChunkShape(chunk.context_len, len(chunk.token_ids), chunk.samples)


def _request(index: int, prompt_tokens: int, output_tokens: int) -> Request:
    params = SamplingParams(max_tokens=output_tokens, ignore_eos=True, seed=0)
    return Request(RequestId(f"r{index}"), (_TOKEN,) * prompt_tokens, params, arrival_ns=index)
