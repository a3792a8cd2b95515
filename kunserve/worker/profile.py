"""Timing steps of this model on this machine, and a quick fit of the cost model at start.

Other processes make a step slower, by half and more where they share a core's units or the memory,
and for seconds at a time. What keeps them out of the figures:
- where one thread computes, its own CPU time is taken;
- a *gauge*, a small step that is always the same, runs between all others and says how fast the
  machine is just then. Times are given as of a machine where the gauge shows `reference_ns`; on a
  quiet one that changes them by a percent or two;
- steps run in turn, until each has had its steady runs, with equal readings before and after, or
  time is over; a run is timed layer by layer, and of each layer the median of all runs counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from kunserve.core.ids import BlockId, RequestId
from kunserve.core.layout import LayerRange
from kunserve.core.step import Chunk
from kunserve.policy.cost_model import ChunkShape, CostModel, StepSample
from kunserve.worker.batch import build_step_inputs
from kunserve.worker.engine import Engine

QUICK_FIT_BUDGET_NS = 2_500_000_000
"""No further step is timed once this much time is spent; big models see the first shapes only."""

GOOD_ERROR = 0.04
"""Mean error on its own samples above which a fit is said to be disturbed."""

GAUGE_LAYERS = 4
STEADY_FACTOR = 1.1
"""Two readings of the gauge this far apart at most are equal: it is noisy by a few percent."""
STEADY_RUNS = 3
"""Steady runs that each step should have."""
MOST_RUNS = 9
"""A step that ran as often is left at that."""
REFERENCE_PERCENTILE = 10
"""Of all readings of the gauge: what it shows when nothing disturbs it."""

Shapes = tuple[ChunkShape, ...]

_GAUGE_SHAPES: Shapes = (ChunkShape(15, 1, False),) * 8
_QUICK_SHAPES: tuple[Shapes, ...] = (  # where time is short, the first ones tell most
    (ChunkShape(0, 1, True),),  # fits any engine
    (ChunkShape(0, 64, True),),
    (ChunkShape(15, 1, True),) * 16,
    (ChunkShape(480, 1, True),) * 8,
    (ChunkShape(448, 32, False),),
    (ChunkShape(15, 1, True),) * 32,
    (ChunkShape(0, 128, False),),
    (ChunkShape(15, 1, True),) * 8,
    (ChunkShape(240, 1, True),) * 24,
)


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation between the two nearest ranks (numpy's "linear")."""
    return float(np.percentile(np.asarray(values, np.float64), percent))


class _Run(NamedTuple):
    """Times of the embedding, of each layer and of the head in one run, and the readings of the
    gauge before and after it."""

    spans_ns: tuple[int, ...]
    before_ns: int
    after_ns: int

    @property
    def is_steady(self) -> bool:
        """The machine was as fast before as after."""
        slow_ns, fast_ns = max(self.before_ns, self.after_ns), min(self.before_ns, self.after_ns)
        return slow_ns <= STEADY_FACTOR * fast_ns

    def scaled_ns(self, reference_ns: float) -> list[float]:
        """The times on a machine where the gauge shows `reference_ns`."""
        factor = 2.0 * reference_ns / (self.before_ns + self.after_ns)
        return [span_ns * factor for span_ns in self.spans_ns]


class TimedStep:
    """One step of one stage that is run again and again.

    Nothing may be scheduled on the engine: KV is written at will. What the KV before a chunk holds
    does not matter to its time.
    """

    def __init__(
        self, engine: Engine, shapes: Shapes, chunks: Sequence[Chunk], layers: LayerRange
    ) -> None:
        self.shapes = shapes
        self.layers = layers
        self.is_leader = layers.start == 0
        self._engine = engine
        self._decoder = engine.decoder.for_layers(layers)
        self._chunks = chunks
        self._runs: list[_Run] = []

    @property
    def num_tokens(self) -> int:
        """Tokens of all chunks."""
        return sum(shape.chunk_tokens for shape in self.shapes)

    @property
    def has_run(self) -> bool:
        """It was timed at least once."""
        return bool(self._runs)

    @property
    def is_settled(self) -> bool:
        """It has had its steady runs, or enough of others."""
        steady = sum(run.is_steady for run in self._runs)
        return steady >= STEADY_RUNS or len(self._runs) >= MOST_RUNS

    def sample(self, reference_ns: float) -> StepSample:
        """What was measured, of a step that has run, on a machine where the gauge shows this.

        The embedding counts with the layers: it is one copy of a row per token, nothing beside
        them.
        """
        runs = [run for run in self._runs if run.is_steady] or self._runs
        parts_ns = zip(*(run.scaled_ns(reference_ns) for run in runs), strict=True)
        *layers_ns, head_ns = map(statistics.median, parts_ns)
        return StepSample(self.shapes, round(sum(layers_ns)), round(head_ns))

    def run(self, clock: Callable[[], int]) -> tuple[int, ...]:
        """Run the step once; returns the times of embedding, layers and head in nanoseconds.

        A stage that does not lead has neither embedding nor head.
        """
        marks_ns = [clock()]
        inputs = build_step_inputs(self._chunks, self._engine.settings.block_size)
        if self.is_leader:
            hidden = self._decoder.embed(inputs.token_ids)
        else:  # the rows of the stage before
            hidden = np.full((self.num_tokens, self._engine.spec.hidden_size), 0.1, np.float32)

        def mark() -> bool:
            marks_ns.append(clock())
            return False

        self._decoder.run_layers(hidden, self._engine.kernels.prepare_batch(inputs.batch), mark)
        mark()
        if self.is_leader:
            np.argmax(self._decoder.logits(hidden, inputs.sample_rows), axis=-1)
        mark()
        return tuple(end_ns - start_ns for start_ns, end_ns in pairwise(marks_ns))

    def add(self, run: _Run) -> None:
        """Count a run."""
        self._runs.append(run)


class StepTimer:
    """Times steps of one engine, with readings of the gauge between them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # A single compute thread never waits, so that its CPU time is the step's on a core of its
        # own. Several wait for each other.
        is_single = engine.settings.threads == 1
        self.clock = time.thread_time_ns if is_single else time.monotonic_ns
        num_layers = engine.spec.num_layers
        self._gauge = self.make_step(
            _GAUGE_SHAPES, LayerRange(max(0, num_layers - GAUGE_LAYERS), num_layers)
        ) or self.make_step((ChunkShape(0, 1),))
        self._readings_ns: list[int] = []

    def deadline(self, budget_ns: int) -> Callable[[], bool]:
        """True once steps have taken this long from now on, by the clock that times them."""
        end_ns = self.clock() + budget_ns
        return lambda: self.clock() > end_ns

    def make_step(self, shapes: Shapes, layers: LayerRange | None = None) -> TimedStep | None:
        """A step of these chunks on a stage of `layers` (None: all), each on blocks of its own;
        None if the engine cannot hold it."""
        engine = self._engine
        block_size = engine.settings.block_size
        lengths = [shape.prefix_tokens + shape.chunk_tokens for shape in shapes]
        counts = [-(-length // block_size) for length in lengths]
        if sum(counts) > engine.total_blocks or max(lengths) > engine.settings.max_model_len:
            return None
        block = engine.slots.block_id(engine.slot, 0)
        chunks = []
        for row, (shape, count) in enumerate(zip(shapes, counts, strict=True)):
            table = tuple(BlockId(block + i) for i in range(count))
            chunks.append(_chunk(row, shape, table))
            block = BlockId(block + count)
        return TimedStep(engine, shapes, chunks, layers or LayerRange(0, engine.spec.num_layers))

    def warm_up(self, steps: Iterable[TimedStep]) -> None:
        """Touch what the first use would fault in, and read the gauge."""
        for step in steps:
            step.run(self.clock)
        self._read_gauge()

    @property
    def reference_ns(self) -> float:
        """What the gauge shows when nothing disturbs it, as far as is known by now."""
        return percentile(self._readings_ns, REFERENCE_PERCENTILE)

    @property
    def slowness(self) -> float:
        """How much longer than that everything took while the machine was at its busiest: the 90th
        percentile of all readings, as a factor."""
        return percentile(self._readings_ns, 90) / self.reference_ns

    def run_round(self, steps: Sequence[TimedStep], is_over: Callable[[], bool]) -> bool:
        """Run those steps once that are not settled, until `is_over`.

        Returns False if there is nothing left to run or no time.
        """
        pending = [step for step in steps if not step.is_settled]
        self.run_all(pending, is_over)
        return bool(pending) and not is_over()

    def run_all(self, steps: Sequence[TimedStep], is_over: Callable[[], bool]) -> None:
        """Run the steps once, until `is_over`."""
        for step in steps:
            if is_over():
                return
            before_ns = self._readings_ns[-1]
            spans_ns = step.run(self.clock)
            step.add(_Run(spans_ns, before_ns, self._read_gauge()))

    def _read_gauge(self) -> int:
        assert self._gauge is not None, "a KVCache holds one token"
        self._readings_ns.append(sum(self._gauge.run(self.clock)[1:-1]))
        return self._readings_ns[-1]


def _chunk(row: int, shape: ChunkShape, block_table: tuple[BlockId, ...]) -> Chunk:
    return Chunk(
        request_id=RequestId(f"profile-{row}"),
        token_ids=(0,) * shape.chunk_tokens,
        context_len=shape.prefix_tokens,
        block_table=block_table,
        samples=shape.samples,
        output_index=0,
    )


@dataclass(frozen=True)
class Fit:
    """A cost model and the samples that it was fitted to, on a machine where the gauge of their
    timer shows `reference_ns`."""

    cost_model: CostModel
    samples: tuple[StepSample, ...]
    reference_ns: float

    @classmethod
    def of(cls, timer: StepTimer, steps: Iterable[TimedStep]) -> Fit:
        """Fitted to those of the steps that have run.

        Raises:
            ConfigError: none has.
        """
        reference_ns = timer.reference_ns
        samples = tuple(step.sample(reference_ns) for step in steps if step.has_run)
        return cls(CostModel.fit(samples), samples, reference_ns)

    @property
    def mean_error(self) -> float:
        """Mean relative error on its own samples, without signs."""
        return statistics.fmean(abs(self.cost_model.relative_error(s)) for s in self.samples)


def quick_fit(engine: Engine, budget_ns: int = QUICK_FIT_BUDGET_NS) -> Fit:
    """Time a few steps on the real weights and fit the cost model (paper section 5, design 5).

    Layers and head are timed apart, so that the cost of any stage follows. Nothing may be scheduled
    yet. A fit with a large error comes from a disturbed measurement: it gets as much time again.
    """
    timer = StepTimer(engine)
    is_over = timer.deadline(budget_ns)
    steps: list[TimedStep] = []
    for shapes in _QUICK_SHAPES:
        step = timer.make_step(shapes)
        if step is None:
            continue
        timer.warm_up((step,))
        timer.run_all((step,), lambda: False)
        steps.append(step)
        if is_over():
            break
    while timer.run_round(steps, is_over):
        pass
    fit = Fit.of(timer, steps)
    if fit.mean_error > GOOD_ERROR:
        is_over = timer.deadline(budget_ns)
        for _ in range(STEADY_RUNS):
            timer.run_all(steps, is_over)
        fit = Fit.of(timer, steps)
    return fit
