"""The steps that `kunserve profile` measures: a grid to fit, and random microbatches to test on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from kunserve.core.layout import LayerRange
from kunserve.policy.cost_model import ChunkShape
from kunserve.worker.profile import Shapes

DECODE_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
DECODE_CONTEXTS = (16, 256, 1024)
PREFILL_CHUNKS = (16, 32, 64, 128, 256, 512, 1024)
PREFIXES = (0, 256, 1024)
LONGEST_TOKENS = 1280
"""Context of the grid's longest chunk."""

MOST_DECODES = 32
MOST_PREFILLS = 3
CHUNK_TOKENS = (8, 256)
MOST_PREFIX_TOKENS = 1024


@dataclass(frozen=True)
class HeldBackStep:
    """A microbatch on a stage of these layers; the stage with layer 0 runs the head."""

    shapes: Shapes
    layers: LayerRange


def grid_steps() -> list[Shapes]:
    """Decode batches and single prefill chunks; long chunks only after short prefixes."""
    decodes = [
        (ChunkShape(context - 1, 1, samples=True),) * batch
        for batch in DECODE_BATCHES
        for context in DECODE_CONTEXTS
    ]
    prefills = [
        (ChunkShape(prefix, chunk, samples=prefix > 0),)
        for chunk in PREFILL_CHUNKS
        for prefix in PREFIXES
        if prefix + chunk <= LONGEST_TOKENS
    ]
    return decodes + prefills


def mixed_steps(rng: random.Random) -> Iterator[Shapes]:
    """Random microbatches without end: decodes and prefill chunks after prefixes, at least one of
    each. Chunks are log-uniform: short ones are as frequent as long ones."""
    while True:
        decodes = [
            ChunkShape(rng.randint(1, MOST_PREFIX_TOKENS), 1, samples=True)
            for _ in range(rng.randint(1, MOST_DECODES))
        ]
        prefills = [_prefill(rng) for _ in range(rng.randint(1, MOST_PREFILLS))]
        yield (*decodes, *prefills)


def _prefill(rng: random.Random) -> ChunkShape:
    least, most = CHUNK_TOKENS
    prefix = rng.choice((0, rng.randint(1, MOST_PREFIX_TOKENS)))
    chunk = round(least * (most / least) ** rng.random())
    return ChunkShape(prefix, chunk, samples=rng.random() < 0.5)


def held_back_steps(seed: int, count: int, num_layers: int) -> list[HeldBackStep]:
    """`count` random microbatches, in turn on a whole instance, a leader and a follower."""
    rng = random.Random(seed)
    steps = []
    for number, shapes in enumerate(islice(mixed_steps(rng), count)):
        cut = rng.randint(1, max(1, num_layers - 1))
        layers = (
            LayerRange(0, num_layers),
            LayerRange(0, cut),
            LayerRange(cut if num_layers > 1 else 0, num_layers),
        )
        steps.append(HeldBackStep(shapes, layers[number % 3]))
    return steps
