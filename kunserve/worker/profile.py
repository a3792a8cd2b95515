"""A quick fit of the cost model at start: a few steps of this model on this machine, timed."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from kunserve.core.ids import BlockId, RequestId
from kunserve.core.step import Chunk
from kunserve.policy.cost_model import ChunkShape, CostModel, StepSample
from kunserve.worker.batch import build_step_inputs
from kunserve.worker.engine import Engine

QUICK_FIT_BUDGET_NS = 2_500_000_000
"""No further shape is measured once this much time is spent; big models see the first ones only."""

_SHAPES: tuple[tuple[ChunkShape, ...], ...] = (
    (ChunkShape(0, 1, True),),
    (ChunkShape(0, 16, True),),
    (ChunkShape(64, 1, True),) * 8,
    (ChunkShape(0, 64, False),),
    (ChunkShape(480, 1, True),) * 4,
    (ChunkShape(256, 64, False),),
    (ChunkShape(0, 128, True),),
)


def quick_fit(engine: Engine, budget_ns: int = QUICK_FIT_BUDGET_NS) -> CostModel:
    """Time a few steps on the real weights and fit the cost model (paper section 5, design 5).

    Nothing may be scheduled yet: it writes to the KVCache at will. The KV read is whatever lies
    there; time does not depend on it.
    """
    samples: list[StepSample] = []
    begin_ns = time.monotonic_ns()
    for shapes in _SHAPES:
        chunks = _chunks(engine, shapes)
        if chunks is None:
            continue
        _time_step(engine, chunks)  # touches memory that the first use would fault in
        elapsed_ns = min(_time_step(engine, chunks) for _ in range(2))
        samples.append(StepSample(shapes, elapsed_ns))
        if time.monotonic_ns() - begin_ns > budget_ns:
            break
    return CostModel.fit(samples)


def _chunks(engine: Engine, shapes: Sequence[ChunkShape]) -> list[Chunk] | None:
    """Chunks of these shapes on blocks of their own; None if the KVCache does not hold them."""
    block_size = engine.settings.block_size
    longest = max(shape.prefix_tokens + shape.chunk_tokens for shape in shapes)
    blocks_each = -(-longest // block_size)
    too_many = blocks_each * len(shapes) > engine.total_blocks
    if too_many or longest > engine.settings.max_model_len:
        return None
    first = engine.slots.block_id(engine.slot, 0)
    return [
        Chunk(
            request_id=RequestId(f"profile-{row}"),
            token_ids=(0,) * shape.chunk_tokens,
            context_len=shape.prefix_tokens,
            block_table=tuple(BlockId(first + row * blocks_each + i) for i in range(blocks_each)),
            samples=shape.samples,
            output_index=0,
        )
        for row, shape in enumerate(shapes)
    ]


def _time_step(engine: Engine, chunks: Sequence[Chunk]) -> int:
    begin_ns = time.monotonic_ns()
    inputs = build_step_inputs(chunks, engine.settings.block_size)
    hidden = engine.decoder.embed(inputs.token_ids)
    engine.decoder.run_layers(hidden, engine.kernels.prepare_batch(inputs.batch), lambda: False)
    np.argmax(engine.decoder.logits(hidden, inputs.sample_rows), axis=-1)
    return time.monotonic_ns() - begin_ns
