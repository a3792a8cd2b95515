"""Timing steps of this model on this machine, and a quick fit of the cost model at start.

Other processes only ever make a step slower, and three things keep them out of the figures. A step
is timed layer by layer, and of each layer its least time over all repeats counts: it is seldom the
same layer that is hit. Repeats of one step are spread over the run, so that a disturbance that
lasts does not hit all of them. And where one thread computes, its own CPU time is taken.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kunserve.core.ids import BlockId, RequestId
from kunserve.core.layout import LayerRange
from kunserve.core.step import Chunk
from kunserve.policy.cost_model import ChunkShape, CostModel, StepSample
from kunserve.worker.batch import build_step_inputs
from kunserve.worker.engine import Engine

QUICK_FIT_BUDGET_NS = 2_500_000_000
"""No further step is timed once this much time is spent; big models see the first shapes only."""

QUICK_FIT_ROUNDS = 3
"""Times of each step before the first fit, its first ones left out."""

GOOD_ERROR = 0.04
"""Mean error on its own samples up to which a quick fit is taken as it is."""

LONG_STEP_NS = 500_000_000
LONG_STEP_RUNS = 2
"""A step as long as this is hit and missed by disturbances within each run: these are enough."""

Shapes = tuple[ChunkShape, ...]

_QUICK_SHAPES: tuple[Shapes, ...] = (  # where time is short, the first ones tell most
    (ChunkShape(15, 1, True),),
    (ChunkShape(0, 64, True),),
    (ChunkShape(15, 1, True),) * 16,
    (ChunkShape(480, 1, True),) * 8,
    (ChunkShape(448, 32, False),),
    (ChunkShape(15, 1, True),) * 32,
    (ChunkShape(0, 128, False),),
    (ChunkShape(15, 1, True),) * 8,
    (ChunkShape(240, 1, True),) * 24,
)


def step_clock(engine: Engine) -> Callable[[], int]:
    """What steps of this engine are timed by, in nanoseconds.

    A single compute thread never waits, so that its CPU time is the step's time on a core of its
    own. Several wait for each other.
    """
    return time.thread_time_ns if engine.settings.threads == 1 else time.monotonic_ns


class TimedStep:
    """One step that is run again and again, and the least time that each part of it took.

    Args:
        layers: of a stage; None: all. A stage with layer 0 leads: it embeds and runs the head.

    Nothing may be scheduled on the engine: KV is written at will. What the KV before a chunk holds
    does not matter to its time.
    """

    def __init__(
        self,
        engine: Engine,
        shapes: Shapes,
        chunks: Sequence[Chunk],
        layers: LayerRange | None = None,
    ) -> None:
        self.shapes = shapes
        self.layers = layers or LayerRange(0, engine.spec.num_layers)
        self.is_leader = self.layers.start == 0
        self._engine = engine
        self._decoder = engine.decoder.for_layers(self.layers)
        self._clock = step_clock(engine)
        self._chunks = chunks
        self._least_ns: list[int] = []
        self.last_ns = 0
        self.runs = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of all chunks."""
        return sum(shape.chunk_tokens for shape in self.shapes)

    @property
    def least_ns(self) -> int:
        """Least time of the whole step, put together from its parts."""
        return sum(self._least_ns)

    @property
    def sample(self) -> StepSample:
        """What was measured, of a step that ran at least once.

        The embedding counts with the layers: it is one copy of a row per token, nothing beside
        them.
        """
        *layers_ns, head_ns = self._least_ns
        return StepSample(self.shapes, sum(layers_ns), head_ns)

    def run(self, is_counted: bool = True) -> None:
        """Run the step once. One that is not counted touches what the first use would fault in."""
        clock = self._clock
        begin_ns = clock()
        inputs = build_step_inputs(self._chunks, self._engine.settings.block_size)
        if self.is_leader:
            hidden = self._decoder.embed(inputs.token_ids)
        else:  # the rows of the stage before
            hidden = np.full((self.num_tokens, self._engine.spec.hidden_size), 0.1, np.float32)
        marks_ns = [begin_ns]

        def mark() -> bool:
            marks_ns.append(clock())
            return False

        self._decoder.run_layers(hidden, self._engine.kernels.prepare_batch(inputs.batch), mark)
        mark()
        if self.is_leader:
            np.argmax(self._decoder.logits(hidden, inputs.sample_rows), axis=-1)
        mark()
        self.last_ns = marks_ns[-1] - begin_ns
        if is_counted:
            self.runs += 1
            spans_ns = [end_ns - start_ns for start_ns, end_ns in pairwise(marks_ns)]
            self._least_ns = list(map(min, spans_ns, self._least_ns or spans_ns))


def make_step(engine: Engine, shapes: Shapes, layers: LayerRange | None = None) -> TimedStep | None:
    """A step of these chunks, each on blocks of its own; None if the engine cannot hold it."""
    block_size = engine.settings.block_size
    lengths = [shape.prefix_tokens + shape.chunk_tokens for shape in shapes]
    counts = [-(-length // block_size) for length in lengths]
    if sum(counts) > engine.total_blocks or max(lengths) > engine.settings.max_model_len:
        return None
    next_block = engine.slots.block_id(engine.slot, 0)
    chunks = []
    for row, (shape, count) in enumerate(zip(shapes, counts, strict=True)):
        chunks.append(
            Chunk(
                request_id=RequestId(f"profile-{row}"),
                token_ids=(0,) * shape.chunk_tokens,
                context_len=shape.prefix_tokens,
                block_table=tuple(BlockId(next_block + i) for i in range(count)),
                samples=shape.samples,
                output_index=0,
            )
        )
        next_block = BlockId(next_block + count)
    return TimedStep(engine, shapes, chunks, layers)


@dataclass(frozen=True)
class Fit:
    """A cost model and the samples that it was fitted to."""

    cost_model: CostModel
    samples: tuple[StepSample, ...]

    @property
    def mean_error(self) -> float:
        """Mean relative error on its own samples, without signs."""
        return statistics.fmean(abs(self.cost_model.relative_error(s)) for s in self.samples)


def quick_fit(engine: Engine, budget_ns: int = QUICK_FIT_BUDGET_NS) -> Fit:
    """Time a few steps on the real weights and fit the cost model (paper section 5, design 5).

    Layers and head are timed apart, so that the cost of any stage follows.
    """
    clock = step_clock(engine)
    end_ns = clock() + budget_ns
    steps = first_runs(engine, _QUICK_SHAPES, lambda: clock() > end_ns)
    for _ in range(QUICK_FIT_ROUNDS - 1):
        run_round(steps, lambda: clock() > end_ns)
    again_end_ns = clock() + budget_ns
    return fit_steps(steps, lambda: clock() > again_end_ns)


def fit_steps(steps: Sequence[TimedStep], is_over: Callable[[], bool]) -> Fit:
    """Fit the cost model to steps that ran at least once.

    A large error means that the measurement was disturbed: the steps run again, until `is_over`.
    """
    while True:
        samples = tuple(step.sample for step in steps)
        fit = Fit(CostModel.fit(samples), samples)
        if fit.mean_error <= GOOD_ERROR or is_over():
            return fit
        run_round(steps, is_over)


def run_round(steps: Sequence[TimedStep], is_over: Callable[[], bool]) -> None:
    """Run every step once more, until `is_over`; long ones only `LONG_STEP_RUNS` times in all."""
    for step in steps:
        if is_over():
            return
        if step.runs < LONG_STEP_RUNS or step.last_ns < LONG_STEP_NS:
            step.run()


def first_runs(
    engine: Engine, shapes: Sequence[Shapes], is_over: Callable[[], bool]
) -> list[TimedStep]:
    """The steps that the engine can hold, timed once each, up to the first one after `is_over`.

    There is one at least.
    """
    steps: list[TimedStep] = []
    for chunks in shapes:
        step = make_step(engine, chunks)
        if step is None:
            continue
        step.run(is_counted=False)
        step.run()
        steps.append(step)
        if is_over():
            break
    return steps
