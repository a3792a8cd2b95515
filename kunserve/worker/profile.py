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
    (ChunkShape(15, 1, True),) * 32,  # the kernels' first rows are free: the head needs many
    (ChunkShape(0, 64, False),),
    (ChunkShape(480, 1, True),) * 4,
    (ChunkShape(256, 64, False),),
    (ChunkShape(0, 128, True),),
)


def quick_fit(engine: Engine, budget_ns: int = QUICK_FIT_BUDGET_NS) -> CostModel:
    """Time a few steps on the real weights and fit the cost model (paper section 5, design 5).

    Layers and head are timed apart, so that the cost of any stage follows.
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
        layers_ns, head_ns = zip(*(_time_step(engine, chunks) for _ in range(2)), strict=True)
        samples.append(StepSample(shapes, min(layers_ns), min(head_ns)))
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


def _time_step(engine: Engine, chunks: Sequence[Chunk]) -> tuple[int, int]:
    """Time of the layers and of the head, in nanoseconds.

    The embedding counts with the layers: it is one copy of a row per token, nothing beside them.
    """
    begin_ns = time.monotonic_ns()
    inputs = build_step_inputs(chunks, engine.settings.block_size)
    hidden = engine.decoder.embed(inputs.token_ids)
    engine.decoder.run_layers(hidden, engine.kernels.prepare_batch(inputs.batch), lambda: False)
    layers_end_ns = time.monotonic_ns()
    np.argmax(engine.decoder.logits(hidden, inputs.sample_rows), axis=-1)
    return layers_end_ns - begin_ns, time.monotonic_ns() - layers_end_ns
