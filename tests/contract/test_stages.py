"""Stages of a ring against a whole instance: the same results, to the bit, wherever it is cut.

Every stage has KVCache of its own, NaN where it has not been written, and gets what the stage
before it returned and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kunserve.core.errors import AccountingError, LayoutError
from kunserve.core.ids import BlockId, Epoch, RequestId
from kunserve.core.layout import LayerRange, Part
from kunserve.core.model import ModelSpec
from kunserve.core.request import Request, SamplingParams
from kunserve.core.step import BlockMove, Chunk, StepPlan, StepResult
from kunserve.device.kernels import Kernels, create_kernels
from kunserve.runtime.model_config import load_model_spec
from kunserve.worker.batch import without_tokens
from kunserve.worker.blocks import BlockRun, copy_blocks, runs_of_moves
from kunserve.worker.decoder import (
    Decoder,
    DecoderMemory,
    StepCancelledError,
    build_rope_table,
    layer_shape,
)
from kunserve.worker.engine import Engine
from kunserve.worker.slabs import FIELD_ALIGNMENT_BYTES, part_format
from kunserve.worker.stage import StageExecutor
from kunserve.worker.weights import CheckpointReader, load_part
from tests.support.engines import open_embedded_engine
from tests.support.models import build_tiny_model

BLOCK_SIZE = 16
NUM_BLOCKS = 64
NUM_LAYERS = 7  # of the tiny models

Execute = Callable[[StepPlan], StepResult]
Bytes = NDArray[np.uint8]


def never() -> bool:
    return False


# ---------------------------------------------------------------- models in memory


def allocate(nbytes: int) -> tuple[Bytes, int]:
    """Memory with all bits set, a NaN in every float, and an aligned address in it."""
    memory = np.full(nbytes + FIELD_ALIGNMENT_BYTES, 0xFF, np.uint8)
    start = memory.ctypes.data
    return memory, start + -start % FIELD_ALIGNMENT_BYTES


@dataclass
class Model:
    """Weights in memory, once; KVCache for each decoder anew."""

    spec: ModelSpec
    kernels: Kernels
    slabs: dict[Part, int]
    keep: list[Bytes]

    @classmethod
    def load(cls, directory: Path, kernels: Kernels) -> Model:
        spec = load_model_spec(directory)
        model = cls(spec, kernels, {}, [])
        with CheckpointReader(directory) as reader:
            for part in spec.parts:
                model.slabs[part] = model.allocate(part_format(spec, part).nbytes)
                load_part(reader, spec, part, model.slabs[part], kernels)
        return model

    def allocate(self, nbytes: int) -> int:
        memory, address = allocate(nbytes)
        self.keep.append(memory)
        return address

    def stage(self, start: int, stop: int) -> StageExecutor:
        """Layers [start, stop) with fresh KVCache for every layer of the model."""
        nbytes = NUM_BLOCKS * layer_shape(self.spec, BLOCK_SIZE).kv_block_bytes
        kv_bases = {layer: self.allocate(nbytes) for layer in range(self.spec.num_layers)}
        rope = build_rope_table(self.spec, 512)
        memory = DecoderMemory(self.slabs, kv_bases)
        layers = LayerRange(start, stop)
        decoder = Decoder(self.spec, self.kernels, memory, layers, rope, BLOCK_SIZE)
        return StageExecutor(decoder, self.kernels)

    def ring(self, *bounds: int) -> list[StageExecutor]:
        return [self.stage(*pair) for pair in pairwise(bounds)]


@pytest.fixture(scope="module")
def kernels() -> Iterator[Kernels]:
    kernels = create_kernels("cpu", 2)
    yield kernels
    kernels.close()


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(
    request: pytest.FixtureRequest, kernels: Kernels, tmp_path_factory: pytest.TempPathFactory
) -> Model:
    """One with a head of its own, one with tied embeddings and biases."""
    directory = tmp_path_factory.mktemp("model")
    build_tiny_model(directory, request.param, seed=5)
    model = Model.load(directory, kernels)
    assert model.spec.num_layers == NUM_LAYERS
    return model


def run_ring(stages: Sequence[StageExecutor], plan: StepPlan) -> StepResult:
    """A step around the ring, with what links do to it: no tokens, buffers that are read-only."""
    leader, *others = stages
    hidden = leader.run_first(plan, never)
    if isinstance(hidden, StepResult):
        assert not others
        return hidden
    chunks = without_tokens(plan.chunks)
    for stage in others:
        assert hidden.shape == (plan.num_tokens, leader._spec.hidden_size)
        frame, untouched = hidden.tobytes(), hidden.copy()
        arrived = np.frombuffer(frame, np.float32).reshape(hidden.shape)
        assert not arrived.flags.writeable
        hidden = stage.run_stage(chunks, plan.moves, arrived, never)
        assert frame == untouched.tobytes(), "kernels write wherever an address points to"
    assert len(hidden) == sum(chunk.samples for chunk in plan.chunks)
    return leader.run_head(plan, hidden)


def ring_of(stages: Sequence[StageExecutor]) -> Execute:
    return lambda plan: run_ring(stages, plan)


# ---------------------------------------------------------------- a workload


class Running:
    """A request on its way, and where its blocks lie now."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens = [*request.prompt_token_ids]
        self.computed = 0
        self.table: list[BlockId] = []

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - len(self.request.prompt_token_ids)


def make_requests(vocab_size: int, count: int, longest: int) -> list[Request]:
    """Greedy and drawn, with and without penalties, all with logprobs."""
    rng = random.Random(11)
    kinds = (
        {"temperature": 0.0},
        {"temperature": 0.9, "top_p": 0.8},
        {"temperature": 1.2, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"top_k": 20, "presence_penalty": 0.4, "min_tokens": 3},
    )
    requests = []
    for n in range(count):
        prompt = tuple(rng.randrange(vocab_size) for _ in range(rng.randint(1, longest)))
        params = SamplingParams(max_tokens=12, seed=n, logprobs=3, **kinds[n % len(kinds)])
        requests.append(Request(RequestId(f"r{n}"), prompt, params, 0))
    return requests


class Workload:
    """Prompts in pieces beside decodes, in an order of its own in every step. The same tokens go in
    whatever `first_block` and `moves` say about where they lie.

    Args:
        moves: blocks are moved between steps, some in runs.
        first_block: blocks from here on are used, `num_blocks` of them.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        *,
        moves: bool,
        first_block: int = 0,
        num_blocks: int = NUM_BLOCKS,
    ) -> None:
        self._rng = random.Random(12)  # what is computed
        self._moves_rng = random.Random(13) if moves else None  # where it lies
        self._coming = list(requests)
        self._running: list[Running] = []
        self._started: list[Request] = []
        self._released: list[RequestId] = []
        self._free = [BlockId(first_block + n) for n in range(num_blocks)]
        self.moved_blocks = 0
        self.mixed_steps = 0

    def run(self, execute: Execute) -> list[StepResult]:
        """Results of all steps, until every request has its tokens."""
        results: list[StepResult] = []
        while self._coming or self._running:
            plan = self._plan(len(results))
            self.moved_blocks += len(plan.moves)
            self.mixed_steps += len({len(chunk.token_ids) == 1 for chunk in plan.chunks}) == 2
            result = execute(plan)
            assert (result.step, result.failed, result.cancelled) == (plan.step, (), False)
            self._take_in(plan, result)
            results.append(result)
        return results

    def _plan(self, step: int) -> StepPlan:
        if self._coming and step % 2 == 0:
            self._started.append(self._coming[0])
            self._running.append(Running(self._coming.pop(0)))
        moves = self._make_moves()
        self._rng.shuffle(self._running)
        chunks = tuple(self._chunk(each) for each in self._running)
        started, released = tuple(self._started), tuple(self._released)
        self._started, self._released = [], []
        return StepPlan(Epoch(1), step, chunks, started, released, moves)

    def _chunk(self, running: Running) -> Chunk:
        left = len(running.tokens) - running.computed
        end = running.computed + min(left, self._rng.randint(1, 30))
        while len(running.table) * BLOCK_SIZE < end:
            running.table.append(self._free.pop(0))
        return Chunk(
            request_id=running.request.id,
            token_ids=tuple(running.tokens[running.computed : end]),
            context_len=running.computed,
            block_table=tuple(running.table),
            samples=end == len(running.tokens),
            output_index=running.num_outputs,
        )

    def _make_moves(self) -> tuple[BlockMove, ...]:
        """Move up to three blocks in a row of some request to the lowest free ones."""
        moves: list[BlockMove] = []
        rng = self._moves_rng
        for running in self._running if rng else ():
            if rng and running.table and rng.random() < 0.4:
                start = rng.randrange(len(running.table))
                for n in range(start, min(start + 3, len(running.table))):
                    target = self._free.pop(0)
                    moves.append(BlockMove(running.table[n], target))
                    self._free.append(running.table[n])
                    running.table[n] = target
        return tuple(moves)

    def _take_in(self, plan: StepPlan, result: StepResult) -> None:
        tokens = {token.request_id: token for token in result.tokens}
        chunks = {chunk.request_id: chunk for chunk in plan.chunks}
        for running in list(self._running):
            chunk = chunks[running.request.id]
            running.computed += len(chunk.token_ids)
            assert chunk.samples == (running.request.id in tokens)
            if chunk.samples:
                token = tokens[running.request.id]
                assert token.output_index == running.num_outputs
                assert token.logprobs is not None
                running.tokens.append(token.token_id)
            if running.num_outputs == running.request.params.max_tokens:
                self._running.remove(running)
                self._released.append(running.request.id)
                self._free.extend(running.table)


@pytest.fixture(scope="module")
def requests(model: Model) -> list[Request]:
    return make_requests(model.spec.vocab_size, 9, 70)


@pytest.fixture(scope="module")
def expected(model: Model, requests: list[Request]) -> list[StepResult]:
    """Of a whole instance in which no block ever moves."""
    workload = Workload(requests, moves=False)
    results = workload.run(ring_of(model.ring(0, NUM_LAYERS)))
    assert workload.mixed_steps > 10
    return results


# ---------------------------------------------------------------- the law


@pytest.mark.parametrize(
    "bounds",
    [(0, 7), (0, 3, 7), (0, 1, 7), (0, 6, 7), (0, 2, 4, 7), tuple(range(8))],
    ids=lambda bounds: "-".join(map(str, bounds)),
)
@pytest.mark.parametrize("moves", [False, True], ids=["", "moves"])
def test_any_split(
    model: Model,
    requests: list[Request],
    expected: list[StepResult],
    bounds: tuple[int, ...],
    moves: bool,
):
    """Tokens, logprobs and ranks are floats and ints that are compared exactly."""
    workload = Workload(requests, moves=moves)
    assert workload.run(ring_of(model.ring(*bounds))) == expected
    assert (workload.moved_blocks > 20) == moves


def test_reconfigured(model: Model, requests: list[Request], expected: list[StepResult]):
    """The same three executors take every place in turn, and forget who was running."""
    one, two, three = (model.stage(0, NUM_LAYERS) for _ in range(3))
    for leader, middle, last in ((one, two, three), (three, one, two), (two, three, one)):
        for stage, bounds in ((leader, (0, 3)), (middle, (3, 5)), (last, (5, 7))):
            stage.configure(LayerRange(*bounds))
        assert [leader.is_leader, middle.is_leader, last.is_leader] == [True, False, False]
        assert [leader.is_last, middle.is_last, last.is_last] == [False, False, True]
        results = Workload(requests, moves=True).run(ring_of([leader, middle, last]))
        assert results == expected
    one.configure(LayerRange(0, NUM_LAYERS))
    assert Workload(requests, moves=False).run(lambda plan: one.execute(plan, never)) == expected


def test_requests_of_an_older_layout_are_forgotten(model: Model, requests: list[Request]):
    leader = model.stage(0, NUM_LAYERS)
    short = replace(requests[0], prompt_token_ids=(1, 2))
    chunk = Chunk(short.id, (1, 2), 0, (BlockId(0),), True, 0)
    leader.execute(StepPlan(Epoch(0), 0, (chunk,), started=(short,)), never)
    leader.configure(LayerRange(0, NUM_LAYERS))
    with pytest.raises(AccountingError, match="not started"):
        leader.execute(StepPlan(Epoch(1), 0, (chunk,)), never)


# ---------------------------------------------------------------- steps that are cancelled


def after(calls: int) -> Callable[[], bool]:
    """False for so many calls, then True."""
    left = iter(range(calls))
    return lambda: next(left, None) is None


@pytest.mark.parametrize("place", ["leader", "middle", "last", "every"])
def test_cancelled_steps_run_again(
    model: Model, requests: list[Request], expected: list[StepResult], place: str
):
    """Each step is cancelled between layers of one stage, or of all in turn, then run whole. It
    starts and releases requests and moves blocks twice."""
    stages = model.ring(0, 3, 5, 7)
    leader, middle, last = stages

    def execute(plan: StepPlan) -> StepResult:
        chunks = without_tokens(plan.chunks)
        if place in ("leader", "every"):
            cancelled = StepResult(plan.epoch, plan.step, (), cancelled=True)
            assert leader.run_first(plan, after(plan.step % 3)) == cancelled
        hidden = leader.run_first(plan, never)
        assert not isinstance(hidden, StepResult)
        for name, stage in (("middle", middle), ("last", last)):
            if place in (name, "every"):
                with pytest.raises(StepCancelledError):
                    stage.run_stage(chunks, plan.moves, hidden.copy(), after(plan.step % 2))
            hidden = stage.run_stage(chunks, plan.moves, hidden, never)
        return leader.run_head(plan, hidden)

    assert Workload(requests, moves=True).run(execute) == expected


def test_cancelled_before_the_head(model: Model, requests: list[Request]):
    """A whole instance is asked once more after its last layer; a leader of two is not."""
    request = replace(requests[0], prompt_token_ids=(1, 2))
    chunk = Chunk(request.id, (1, 2), 0, (BlockId(0),), True, 0)
    plan = StepPlan(Epoch(0), 3, (chunk,), started=(request,))
    whole, leader = model.stage(0, NUM_LAYERS), model.stage(0, 4)
    assert whole.execute(plan, after(NUM_LAYERS)) == StepResult(Epoch(0), 3, (), cancelled=True)
    assert len(whole.execute(plan, after(NUM_LAYERS + 1)).tokens) == 1
    assert not isinstance(leader.run_first(plan, after(4)), StepResult)


# ---------------------------------------------------------------- heads in step order


def test_two_steps_on_the_way(model: Model, requests: list[Request], expected: list[StepResult]):
    """The leader runs its layers of the next step before the head of the last one: two rings of
    requests, whose plans take turns, and each gets what it gets alone."""
    alone = [
        Workload(half, moves=False, num_blocks=32).run(ring_of(model.ring(0, NUM_LAYERS)))
        for half in (requests[::2], requests[1::2])
    ]
    leader, last = model.ring(0, 4, NUM_LAYERS)
    plans: list[list[StepPlan]] = [[], []]
    results: list[list[StepResult]] = [[], []]
    for half, mine, first_block in ((0, requests[::2], 0), (1, requests[1::2], 32)):
        replay = iter(alone[half])

        def record(plan: StepPlan, half: int = half, replay: Iterator[StepResult] = replay):
            plans[half].append(plan)
            return next(replay)

        Workload(mine, moves=True, first_block=first_block, num_blocks=32).run(record)
    count = max(map(len, plans))
    order = [(half, n) for n in range(count) for half in (0, 1) if n < len(plans[half])]
    on_the_way: tuple[int, StepPlan, NDArray[np.float32]] | None = None
    for half, n in [*order, (-1, -1)]:
        first = None if half < 0 else leader.run_first(plans[half][n], never)
        if on_the_way is not None:
            before, plan, hidden = on_the_way
            rows = last.run_stage(without_tokens(plan.chunks), plan.moves, hidden, never)
            results[before].append(leader.run_head(plan, rows))
        if first is not None:
            assert not isinstance(first, StepResult)
            on_the_way = (half, plans[half][n], first)
    assert results == alone


# ---------------------------------------------------------------- what is refused


def test_roles(model: Model):
    leader, middle, last = model.ring(0, 2, 4, 7)
    plan = StepPlan(Epoch(0), 0, ())
    rows = np.zeros((0, model.spec.hidden_size), np.float32)
    for stage in (middle, last):
        with pytest.raises(AccountingError, match="not the one that embeds"):
            stage.run_first(plan, never)
        with pytest.raises(AccountingError, match="not the one that samples"):
            stage.run_head(plan, rows)
    with pytest.raises(AccountingError, match="takes hidden rows"):
        leader.run_stage((), (), rows, never)
    with pytest.raises(AccountingError, match="computes a step alone"):
        leader.execute(plan, never)
    for bounds in ((0, 0), (3, 2), (-1, 2), (5, 8)):
        with pytest.raises(LayoutError, match="a stage of layers"):
            leader.configure(LayerRange(*bounds))
    assert leader.layers == LayerRange(0, 2)


def test_a_head_with_other_rows_changes_nothing(model: Model, requests: list[Request]):
    request = replace(requests[0], prompt_token_ids=(1, 2))
    chunk = Chunk(request.id, (1, 2), 0, (BlockId(0),), True, 0)
    plan = StepPlan(Epoch(0), 0, (chunk,), started=(request,))
    leader = model.stage(0, 4)
    for shape in ((0, model.spec.hidden_size), (2, model.spec.hidden_size), (1, 8)):
        with pytest.raises(AccountingError, match="samples 1 rows"):
            leader.run_head(plan, np.zeros(shape, np.float32))
    with pytest.raises(AccountingError, match="not started"):
        leader.run_head(replace(plan, started=()), np.zeros((1, model.spec.hidden_size), "f4"))


def test_without_tokens():
    chunk = Chunk(RequestId("r"), (5, 6, 7), 9, (BlockId(1),), True, 4)
    assert without_tokens([chunk]) == (replace(chunk, token_ids=(0, 0, 0)),)


# ---------------------------------------------------------------- copies of blocks


def moves_of(*pairs: tuple[int, int]) -> list[BlockMove]:
    return [BlockMove(BlockId(source), BlockId(target)) for source, target in pairs]


def test_runs_of_moves():
    assert runs_of_moves([]) == ()
    together = runs_of_moves(moves_of((4, 0), (5, 1), (6, 2), (9, 3), (10, 7)))
    assert together == (BlockRun(4, 0, 3), BlockRun(9, 3, 1), BlockRun(10, 7, 1))
    assert len(runs_of_moves(moves_of((1, 2), (2, 3)))) == 2, "block 3 gets what was in block 1"
    assert runs_of_moves(moves_of((3, 2), (4, 3))) == (BlockRun(3, 2, 2),)


@pytest.mark.parametrize("seed", range(40))
def test_copies_do_what_moves_say(seed: int):
    """Whatever the moves, also those that overlap, in every layer, and nothing beside them."""
    rng = random.Random(seed)
    block_bytes, num_blocks, num_layers = 24, 12, 3
    memory = np.random.default_rng(seed).integers(0, 256, (num_layers, num_blocks, block_bytes))
    actual = memory.astype(np.uint8)
    expected = actual.copy()
    moves = []
    while len(moves) < 20:
        source, target = rng.randrange(num_blocks), rng.randrange(num_blocks)
        length = min(rng.randint(1, 5), num_blocks - max(source, target))
        moves += moves_of(*((source + n, target + n) for n in range(length)))
    for move in moves:
        expected[:, move.target] = expected[:, move.source]
    bases = [int(layer.ctypes.data) for layer in actual]
    copied_bytes = copy_blocks(moves, bases, block_bytes)
    assert copied_bytes == len(moves) * num_layers * block_bytes
    assert np.array_equal(actual, expected)


def test_moves_are_made_in_held_layers_only(model: Model):
    """What a stage does not hold may not be mapped."""
    stage = model.stage(2, 5)
    nbytes = layer_shape(model.spec, BLOCK_SIZE).kv_block_bytes
    caches = model.keep[-NUM_LAYERS:]
    starts = [-cache.ctypes.data % FIELD_ALIGNMENT_BYTES for cache in caches]
    blocks = [cache[start:][: 2 * nbytes] for cache, start in zip(caches, starts, strict=True)]
    for layer, block in enumerate(blocks):
        block[:nbytes] = layer
    rows = np.zeros((0, model.spec.hidden_size), np.float32)
    stage.run_stage((), moves_of((0, 1)), rows, never)
    for layer, block in enumerate(blocks):
        assert (block[nbytes:] == (layer if layer in stage.layers else 0xFF)).all()


# ---------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with open_embedded_engine(kv_blocks=160, max_model_len=256) as engine:
        yield engine


def test_the_real_model(engine: Engine):
    """Each split has blocks of its own: NaN until it writes them."""
    spec = engine.settings.spec
    requests = make_requests(spec.vocab_size, 4, 40)
    requests = [replace(r, params=replace(r.params, max_tokens=5)) for r in requests]
    results = []
    splits = ((0, 30), (0, 12, 30), (0, 12, 21, 30))
    for n, bounds in enumerate(splits):
        stages = [
            StageExecutor(engine.decoder.for_layers(LayerRange(*pair)), engine.kernels)
            for pair in pairwise(bounds)
        ]
        workload = Workload(requests, moves=n > 0, first_block=40 * n, num_blocks=40)
        results.append(workload.run(ring_of(stages)))
    assert results[1] == results[0]
    assert results[2] == results[0]


def test_an_engine_s_executor_takes_any_place(engine: Engine):
    executor = engine.make_executor()
    assert executor.is_leader
    assert executor.is_last
    executor.configure(LayerRange(12, 30))
    assert not executor.is_leader
    assert executor.is_last
