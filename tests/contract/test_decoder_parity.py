"""The decoder against transformers: the same logits, in every architecture that is supported."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from kunserve.core.errors import AccountingError, ModelLoadError
from kunserve.core.ids import BlockId, RequestId
from kunserve.core.layout import LayerRange, Part, PartKind
from kunserve.core.model import ModelSpec
from kunserve.core.step import Chunk
from kunserve.device.kernels import Kernels, create_kernels
from kunserve.runtime.embedded import MANIFEST_FILE, WEIGHTS_FILE, ensure_embedded_model
from kunserve.runtime.model_config import load_model_spec
from kunserve.runtime.model_source import default_cache_dir
from kunserve.worker.batch import build_step_inputs
from kunserve.worker.decoder import (
    Decoder,
    DecoderMemory,
    StepCancelledError,
    build_rope_table,
    layer_shape,
)
from kunserve.worker.slabs import FIELD_ALIGNMENT_BYTES, part_format
from kunserve.worker.weights import CheckpointReader, load_part
from tests.support.models import ARCHITECTURES, TINY_VOCAB_SIZE, build_tiny_model

BLOCK_SIZE = 16
NUM_BLOCKS = 96
MAX_POSITIONS = 512
REFERENCE = Path(__file__).parents[1] / "references" / "smollm2_greedy.json"

Floats = NDArray[np.float32]


def never() -> bool:
    return False


@dataclass
class Stage:
    """A decoder on memory of its own: NaN wherever it was not loaded or written."""

    spec: ModelSpec
    kernels: Kernels
    decoder: Decoder
    _memory: list[NDArray[np.uint8]] = field(default_factory=list)

    @classmethod
    def load(
        cls, directory: Path, kernels: Kernels, layers: LayerRange, ends: bool = True
    ) -> Stage:
        """`ends`: hold embedding and head too, as a leader does."""
        spec = load_model_spec(directory)
        memory: list[NDArray[np.uint8]] = []
        wanted = {Part(PartKind.LAYER, layer) for layer in layers}
        wanted |= {part for part in spec.parts if part.kind is not PartKind.LAYER and ends}
        slabs = {part: allocate(memory, part_format(spec, part).nbytes) for part in wanted}
        with CheckpointReader(directory) as reader:
            for part, address in slabs.items():
                load_part(reader, spec, part, address, kernels)
        block_bytes = layer_shape(spec, BLOCK_SIZE).kv_block_bytes
        kv_bases = {layer: allocate(memory, NUM_BLOCKS * block_bytes) for layer in layers}
        rope = build_rope_table(spec, min(spec.max_position, 2048))
        decoder = Decoder(spec, kernels, DecoderMemory(slabs, kv_bases), layers, rope, BLOCK_SIZE)
        return cls(spec, kernels, decoder, memory)


def allocate(memory: list[NDArray[np.uint8]], nbytes: int) -> int:
    # All bits set is a NaN in every float that a kernel could wrongly read.
    memory.append(np.full(nbytes + FIELD_ALIGNMENT_BYTES, 0xFF, np.uint8))
    start = memory[-1].ctypes.data
    return start + -start % FIELD_ALIGNMENT_BYTES


def run(
    stages: Sequence[Stage], chunks: Sequence[Chunk], cancelled: Callable[[], bool] = never
) -> Floats:
    """Logits of all rows [M, vocab] of one step through the stages in order."""
    inputs = build_step_inputs(chunks, BLOCK_SIZE)
    leader = stages[0].decoder
    hidden = leader.embed(inputs.token_ids)
    for stage in stages:
        batch = stage.kernels.prepare_batch(inputs.batch)
        stage.decoder.run_layers(hidden, batch, cancelled)
    return leader.logits(hidden, np.arange(len(hidden), dtype=np.int64))


def chunk(tokens: Sequence[int], start: int, stop: int, table: Sequence[int]) -> Chunk:
    blocks = tuple(BlockId(block) for block in table)
    return Chunk(RequestId("r"), tuple(tokens[start:stop]), start, blocks, True, 0)


def random_tokens(seed: int, count: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, TINY_VOCAB_SIZE, count).tolist()
    return tokens


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Floats:
    logits: Floats = model(torch.tensor([list(tokens)])).logits[0].float().numpy()
    return logits


def assert_close_logits(actual: Floats, expected: Floats) -> None:
    scale = float(expected.std())
    assert scale > 0.5, "logits that are all alike prove nothing"
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * scale)
    np.testing.assert_array_equal(actual.argmax(-1), expected.argmax(-1))


def assert_same_bits(actual: Floats, expected: Floats) -> None:
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


@pytest.fixture(scope="module")
def kernels() -> Iterator[Kernels]:
    kernels = create_kernels("cpu", 2)
    yield kernels
    kernels.close()


@dataclass(frozen=True)
class Tiny:
    """A tiny model on disk, and in transformers."""

    directory: Path
    model: PreTrainedModel
    num_layers: int


@pytest.fixture(scope="module", params=ARCHITECTURES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    directory = tmp_path_factory.mktemp(request.param)
    model = build_tiny_model(directory, request.param, seed=len(request.param))
    return Tiny(directory, model, model.config.num_hidden_layers)


@pytest.fixture
def whole(tiny: Tiny, kernels: Kernels) -> Stage:
    return Stage.load(tiny.directory, kernels, LayerRange(0, tiny.num_layers))


def test_prefill_gives_the_logits_of_transformers(tiny: Tiny, whole: Stage) -> None:
    tokens = random_tokens(1, 200)  # beyond llama3's 64 original positions
    actual = run([whole], [chunk(tokens, 0, 200, range(13))])
    assert_close_logits(actual, reference_logits(tiny.model, tokens))


def test_chunks_and_decodes_of_several_requests(tiny: Tiny, whole: Stage) -> None:
    prompts = [random_tokens(seed, length) for seed, length in ((2, 61), (3, 90), (4, 33))]
    tables = np.random.default_rng(5).permutation(NUM_BLOCKS)[:18].reshape(3, 6).tolist()
    steps = [  # (request, start, stop) of every chunk of a step
        [(0, 0, 16)],
        [(1, 0, 37), (0, 16, 49), (2, 0, 31)],
        [(0, 49, 60), (2, 31, 32), (1, 37, 89)],
        [(0, 60, 61), (1, 89, 90), (2, 32, 33)],
    ]
    logits: list[list[Floats]] = [[], [], []]
    for step in steps:
        rows = run([whole], [chunk(prompts[r], a, b, tables[r]) for r, a, b in step])
        for request, start, stop in step:
            logits[request].append(rows[: stop - start])
            rows = rows[stop - start :]
    for request, prompt in enumerate(prompts):
        actual = np.concatenate(logits[request])
        assert_close_logits(actual, reference_logits(tiny.model, prompt))
        alone = run([whole], [chunk(prompt, 0, len(prompt), range(90, 96))])
        assert_same_bits(actual, alone)


def test_three_ranges_are_one_range_to_the_bit(tiny: Tiny, whole: Stage, kernels: Kernels) -> None:
    ranges = [LayerRange(0, 2), LayerRange(2, 3), LayerRange(3, tiny.num_layers)]
    stages = [
        Stage.load(tiny.directory, kernels, layers, ends=layers.start == 0) for layers in ranges
    ]
    assert [stage.decoder.has_embedding for stage in stages] == [True, False, False]
    assert [stage.decoder.has_head for stage in stages] == [True, False, False]
    tokens = random_tokens(6, 80)
    table = range(40, 46)
    for start, stop in ((0, 50), (50, 79), (79, 80)):
        step = [chunk(tokens, start, stop, table)]
        assert_same_bits(run(stages, step), run([whole], step))


def test_logits_of_selected_rows(whole: Stage) -> None:
    inputs = build_step_inputs([chunk(random_tokens(7, 9), 0, 9, [3])], BLOCK_SIZE)
    hidden = whole.decoder.embed(inputs.token_ids)
    before = hidden.copy()
    every = whole.decoder.logits(hidden, np.arange(9))
    assert_same_bits(whole.decoder.logits(hidden, np.array([8, 2])), every[[8, 2]])
    assert whole.decoder.logits(hidden, np.array([], np.int64)).shape == (0, TINY_VOCAB_SIZE)
    assert_same_bits(hidden, before)


def test_a_cancelled_step_can_be_run_again(whole: Stage) -> None:
    tokens = random_tokens(8, 40)
    first, second = (chunk(tokens, 0, 30, [7, 8]), chunk(tokens, 30, 40, [7, 8, 9]))
    run([whole], [first])
    undisturbed = run([whole], [second])
    calls = 0

    def after_three_layers() -> bool:
        nonlocal calls
        calls += 1
        return calls > 3

    with pytest.raises(StepCancelledError, match="schedule it again"):
        run([whole], [second], after_three_layers)
    assert calls == 4
    assert_same_bits(run([whole], [second]), undisturbed)


def test_what_is_not_held_is_refused(tiny: Tiny, whole: Stage, kernels: Kernels) -> None:
    middle = Stage.load(tiny.directory, kernels, LayerRange(2, 4), ends=False)
    with pytest.raises(AccountingError, match="does not hold the embedding"):
        middle.decoder.embed(np.zeros(1, np.int32))
    with pytest.raises(AccountingError, match=r"does not hold the (embedding|head)"):
        middle.decoder.logits(np.zeros((1, whole.spec.hidden_size), np.float32), np.array([0]))
    rope = build_rope_table(whole.spec, 64)
    with pytest.raises(AccountingError, match="layer 0 is to be computed"):
        Decoder(whole.spec, kernels, DecoderMemory({}, {}), LayerRange(0, 1), rope, BLOCK_SIZE)


def test_rope_table_has_the_bits_of_transformers(tiny: Tiny, whole: Stage) -> None:
    table = build_rope_table(whole.spec, MAX_POSITIONS)
    rotary = LlamaRotaryEmbedding(tiny.model.config)
    cos, sin = rotary(torch.zeros(1), torch.arange(MAX_POSITIONS)[None])
    half = whole.spec.head_dim // 2
    assert_same_bits(table.cos, cos[0, :, :half].contiguous().numpy())
    assert_same_bits(table.sin, sin[0, :, :half].contiguous().numpy())


@pytest.mark.parametrize(("tokens", "blocks"), [((), 1), ((1,) * 17, 1), ((1,), 0)])
def test_a_chunk_that_its_blocks_do_not_cover(tokens: tuple[int, ...], blocks: int) -> None:
    wrong = Chunk(RequestId("late"), tokens, 0, (BlockId(0),) * blocks, True, 0)
    with pytest.raises(AccountingError, match="request late"):
        build_step_inputs([wrong], BLOCK_SIZE)


def test_step_inputs_lie_in_the_order_of_the_chunks() -> None:
    far = BlockId((1 << 40) + 5)  # block ids of a late slot need 64 bits
    chunks = [
        Chunk(RequestId("a"), (10, 11, 12), 15, (BlockId(4), far), False, 0),
        Chunk(RequestId("b"), (20,), 3, (BlockId(9),), True, 2),
        Chunk(RequestId("c"), (30, 31), 0, (BlockId(1),), True, 0),
    ]
    inputs = build_step_inputs(chunks, BLOCK_SIZE)
    assert inputs.token_ids.tolist() == [10, 11, 12, 20, 30, 31]
    assert inputs.sample_rows.tolist() == [3, 5]
    assert inputs.batch.query_starts.tolist() == [0, 3, 4, 6]
    assert inputs.batch.context_lens.tolist() == [15, 3, 0]
    assert inputs.batch.block_tables.tolist() == [[4, far], [9, 0], [1, 0]]
    assert build_step_inputs([], BLOCK_SIZE).batch.query_starts.tolist() == [0]


@pytest.fixture(scope="module")
def embedded_directory() -> Path:
    try:
        return ensure_embedded_model(default_cache_dir(os.environ), print)
    except ModelLoadError as error:
        pytest.skip(f"needs the embedded model: {error}")


def test_embedded_model_takes_the_tokens_of_transformers(
    embedded_directory: Path, kernels: Kernels
) -> None:
    reference = json.loads(REFERENCE.read_text(encoding="utf-8"))
    manifest = json.loads((embedded_directory / MANIFEST_FILE).read_text(encoding="utf-8"))
    assert manifest["files"][WEIGHTS_FILE]["sha256"] == reference["weights_sha256"]
    assert len(reference["prompts"]) >= 12
    stage = Stage.load(embedded_directory, kernels, LayerRange(0, 30))
    for prompt in reference["prompts"]:
        expected = prompt["tokens"]
        known = [*prompt["prompt_token_ids"], *expected[:-1]]
        inputs = build_step_inputs([chunk(known, 0, len(known), range(NUM_BLOCKS))], BLOCK_SIZE)
        hidden = stage.decoder.embed(inputs.token_ids)
        stage.decoder.run_layers(hidden, kernels.prepare_batch(inputs.batch), never)
        first = len(prompt["prompt_token_ids"]) - 1
        logits = stage.decoder.logits(hidden, np.arange(first, len(known)))
        assert logits.argmax(-1).tolist() == expected, prompt["prompt"]
        best = np.partition(logits, -2, axis=-1)
        margins = best[:, -1] - best[:, -2]
        np.testing.assert_allclose(margins, prompt["margins"], rtol=0, atol=5e-4)
