"""The law of the kernels on the real model: a row's logits depend on its own inputs, to the bit.

One sequence is computed in many ways. What is compared are float32 logits over the whole
vocabulary, bit by bit; the KVCache is NaN wherever a test has not computed it itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from kunserve.core.ids import BlockId, RequestId, SlotId
from kunserve.core.layout import LayerRange, Part, PartKind
from kunserve.core.step import Chunk
from kunserve.device.kernels import Kernels, create_kernels
from kunserve.worker.batch import build_step_inputs
from kunserve.worker.decoder import Decoder, DecoderMemory, build_rope_table
from kunserve.worker.engine import Engine
from tests.support.engines import BLOCK_SIZE, open_embedded_engine, renew_kv

VOCAB_SIZE = 49152
MAX_MODEL_LEN = 640
LENGTH = 130  # of the sequence that most tests compute: eight blocks and a piece
LONG = 530  # more than a chunk of 512

FIRST_SLOT, LAST_SLOT = SlotId(0), SlotId(15)
BACKED_BLOCKS = {FIRST_SLOT: 192, LAST_SLOT: 48}

Floats = NDArray[np.float32]
Table = Sequence[int]


def random_tokens(seed: int, count: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, VOCAB_SIZE, count).tolist())


TOKENS = random_tokens(1, LONG)


@dataclass(frozen=True)
class Stage:
    """Some layers and the kernels that they run on. A list of them that begins with the embedding
    and covers all layers is a model."""

    decoder: Decoder
    kernels: Kernels


def chunk(tokens: Sequence[int], start: int, stop: int, table: Table) -> Chunk:
    blocks = tuple(BlockId(block) for block in table)
    return Chunk(RequestId("r"), tuple(tokens[start:stop]), start, blocks, True, 0)


def step(stages: Sequence[Stage], chunks: Sequence[Chunk]) -> list[Floats]:
    """One step: per chunk, the logits [tokens of the chunk, vocabulary]."""
    inputs = build_step_inputs(chunks, BLOCK_SIZE)
    leader = stages[0].decoder
    hidden = leader.embed(inputs.token_ids)
    for stage in stages:
        stage.decoder.run_layers(hidden, stage.kernels.prepare_batch(inputs.batch), lambda: False)
    logits = leader.logits(hidden, np.arange(len(hidden)))
    return np.split(logits, inputs.batch.query_starts[1:-1])


def compute(stages: Sequence[Stage], cuts: Sequence[int], table: Table) -> Floats:
    """Logits of TOKENS up to the last cut, [positions, vocabulary]: one step from cut to cut."""
    steps = (step(stages, [chunk(TOKENS, *span, table)]) for span in pairwise((0, *cuts)))
    return np.concatenate([rows for (rows,) in steps])


def cut_every(tokens: int, length: int) -> list[int]:
    return [*range(tokens, length, tokens), length]


def assert_same_bits(actual: Floats, expected: Floats) -> None:
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    differing = (actual.view(np.uint32) != expected.view(np.uint32)).any(axis=1)
    assert not differing.any(), f"rows {np.flatnonzero(differing).tolist()} differ"


def make_stage(engine: Engine, layers: LayerRange, kernels: Kernels, *, leads: bool) -> Stage:
    """`layers` on the memory of `engine`, with the embedding and the head if the stage leads."""
    spec, memory = engine.settings.spec, engine.memory
    parts = [Part(PartKind.LAYER, layer) for layer in layers]
    parts += [part for part in spec.parts if part.kind is not PartKind.LAYER and leads]
    held = DecoderMemory(
        {part: memory.part_address(part) for part in parts},
        {layer: memory.kv_base(layer) for layer in layers},
    )
    rope = build_rope_table(spec, MAX_MODEL_LEN)
    return Stage(Decoder(spec, kernels, held, layers, rope, BLOCK_SIZE), kernels)


def kv_bytes(engine: Engine, table: Table) -> NDArray[np.uint8]:
    """The blocks of a table in all layers, [layers, blocks, bytes of a block]."""
    nbytes = engine.plan.geometry.block_bytes
    view, base = engine.memory.arena.view, engine.memory.kv_base
    layers = range(engine.settings.spec.num_layers)
    return np.array([[view(base(la) + block * nbytes, nbytes) for block in table] for la in layers])


@pytest.fixture(scope="module")
def loaded_engine() -> Iterator[Engine]:
    with open_embedded_engine(
        kv_blocks=sum(BACKED_BLOCKS.values()),
        max_model_len=MAX_MODEL_LEN,
        num_slots=LAST_SLOT + 1,
    ) as engine:
        assert engine.settings.spec.vocab_size == VOCAB_SIZE
        yield engine


@pytest.fixture
def engine(loaded_engine: Engine) -> Engine:
    """With blocks in the first and in the last slot, and nothing in them."""
    renew_kv(loaded_engine, BACKED_BLOCKS)
    return loaded_engine


@pytest.fixture
def model(engine: Engine) -> list[Stage]:
    """The engine's own decoder and threads."""
    return [Stage(engine.decoder, engine.kernels)]


@pytest.fixture(scope="module")
def expected(loaded_engine: Engine) -> Floats:
    """Logits of the first LENGTH tokens, alone and in one chunk."""
    renew_kv(loaded_engine, BACKED_BLOCKS)
    whole = [Stage(loaded_engine.decoder, loaded_engine.kernels)]
    return compute(whole, [LENGTH], range(9))


@pytest.mark.parametrize(
    "cuts",
    [
        cut_every(1, 70),
        cut_every(16, LENGTH),
        cut_every(33, LENGTH),
        [1, 2, 63, 127, 128, 129],
        [65, 129, LENGTH],
    ],
    ids=["1", "16", "33", "uneven", "large and a decode"],
)
def test_chunks(model: list[Stage], expected: Floats, cuts: list[int]) -> None:
    assert_same_bits(compute(model, cuts, range(9)), expected[: cuts[-1]])


def test_chunks_of_a_long_prompt(model: list[Stage]) -> None:
    one_large = compute(model, [512, LONG], range(34))
    small = compute(model, cut_every(16, LONG), range(40, 74))
    assert_same_bits(small, one_large)


def test_in_a_batch_of_others(model: list[Stage], expected: Floats) -> None:
    """32 others: half of them prefill, half decode behind a context; the place in the batch
    changes from step to step."""
    lengths = np.random.default_rng(2).integers(1, 40, 32).tolist()
    prompts = [random_tokens(100 + n, length) for n, length in enumerate(lengths)]
    tables = [range(4 * n, 4 * n + 4) for n in range(32)]
    prefills = [
        chunk(prompt, 0, len(prompt), table) for prompt, table in zip(prompts, tables, strict=True)
    ]
    before = step(model, prefills)
    others = [
        chunk(prompt, len(prompt) - 1, len(prompt), table) if n % 2 else prefills[n]
        for n, (prompt, table) in enumerate(zip(prompts, tables, strict=True))
    ]
    mine, table = [], range(130, 139)
    for place, span in ((0, (0, 57)), (13, (57, 129)), (32, (129, LENGTH))):
        batch = [*others[:place], chunk(TOKENS, *span, table), *others[place:]]
        logits = step(model, batch)
        mine.append(logits.pop(place))
        for n, rows in enumerate(logits):
            assert_same_bits(rows, before[n][-len(rows) :])
    assert_same_bits(np.concatenate(mine), expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads(engine: Engine, model: list[Stage], threads: int) -> None:
    cuts = [260, 300, 316, 317, 318]  # short chunks and decodes behind a context, too
    by_two = compute(model, cuts, range(20))
    renew_kv(engine, BACKED_BLOCKS)
    kernels = create_kernels("cpu", threads)
    try:
        every_layer = LayerRange(0, engine.settings.spec.num_layers)
        other = [make_stage(engine, every_layer, kernels, leads=True)]
        assert_same_bits(compute(other, cuts, range(20)), by_two)
    finally:
        kernels.close()


def test_three_stages(engine: Engine, expected: Floats) -> None:
    bounds = (0, 11, 12, engine.settings.spec.num_layers)
    stages = [
        make_stage(engine, LayerRange(*bound), engine.kernels, leads=bound[0] == 0)
        for bound in pairwise(bounds)
    ]
    assert [stage.decoder.has_head for stage in stages] == [True, False, False]
    assert_same_bits(compute(stages, [90, 128, 129, LENGTH], range(9)), expected)


def test_what_was_decoded_is_computed_again(engine: Engine, model: list[Stage]) -> None:
    """After a preemption a prefill computes what decodes computed before: logits and KV."""
    decoded, again = range(9), range(100, 109)
    first = compute(model, [100, *range(101, LENGTH + 1)], decoded)
    assert_same_bits(compute(model, [LENGTH], again), first)
    assert np.array_equal(kv_bytes(engine, decoded), kv_bytes(engine, again))


def test_blocks_elsewhere(engine: Engine, model: list[Stage], expected: Floats) -> None:
    last = [engine.slots.block_id(LAST_SLOT, index) for index in range(48)]
    assert last[0] * engine.plan.geometry.block_bytes > 1 << 32, "offsets need more than 32 bits"
    scattered = np.random.default_rng(3).permutation(192)[:9].tolist()
    alternating = [last[20 + n] if n % 2 else 150 - n for n in range(9)]
    for table in (scattered, last[-9:], last[8::-1], alternating):
        renew_kv(engine, BACKED_BLOCKS)
        assert_same_bits(compute(model, [80, 129, LENGTH], table), expected)


def test_a_shared_prefix(engine: Engine, model: list[Stage], expected: Floats) -> None:
    """Two requests of one batch read the full blocks that a third has left behind."""
    last = [engine.slots.block_id(LAST_SLOT, index) for index in range(6)]
    prefix, prefix_tokens = last, 6 * BLOCK_SIZE
    compute(model, [50, prefix_tokens], prefix)
    other_tokens = (*TOKENS[:prefix_tokens], *random_tokens(4, 40))
    batch = [
        chunk(other_tokens, prefix_tokens, 136, [*prefix, 7, 8, 9]),
        chunk(TOKENS, prefix_tokens, LENGTH, [*prefix, 3, 90, 2]),
    ]
    other, mine = step(model, batch)
    assert_same_bits(mine, expected[prefix_tokens:])
    (other_alone,) = step(model, [chunk(other_tokens, 0, 136, range(20, 29))])
    assert_same_bits(other, other_alone[prefix_tokens:])
