"""Every kernel against a float64 reference; and a row's bits depend on its own inputs only."""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kunserve.device.kernels import (
    Batch,
    CpuKernels,
    KernelArgumentError,
    LayerAddresses,
    LayerShape,
    PreparedBatch,
    PreparedLayer,
    RopeTable,
    UnknownKernelsError,
    create_kernels,
)
from kunserve.device.kernels.cpu import supported_isas

F32 = NDArray[np.float32]
MAX_POSITIONS = 1024
SMALL = LayerShape(96, 6, 2, 16, 200, 1e-5, 16, qkv_bias=True)


@pytest.fixture(scope="module")
def kernels() -> Iterator[dict[int, CpuKernels]]:
    """CPU kernels by number of threads."""
    both = {threads: CpuKernels(threads) for threads in (1, 2)}
    yield both
    for each in both.values():
        each.close()


def normal(seed: int, *shape: int) -> F32:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def address_of(array: NDArray[np.generic]) -> int:
    return int(array.ctypes.data)


def pack(kernels: CpuKernels, weight: F32) -> F32:
    packed = np.full(kernels.packed_bytes(*weight.shape) // 4, np.nan, np.float32)
    kernels.pack_linear(weight, address_of(packed))
    return packed


def assert_same_bits(actual: F32, expected: F32) -> None:
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


# Linears


@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (24, 8), (25, 33), (50, 7), (72, 64), (100, 129), (576, 576)]
)
def test_linear_matches_float64(kernels: dict[int, CpuKernels], n: int, k: int) -> None:
    weight, bias = normal(1, n, k), normal(2, n)
    for threads, kn in kernels.items():
        packed = pack(kn, weight)
        assert_same_bits(kn.unpack_linear(address_of(packed), n, k), weight)
        for m in (1, 2, 3, 4, 5, 6, 7, 9, 31, 70):
            x, residual = normal(m, m, k), normal(m + 1, m, n)
            guarded = np.full((m + 1, n), 7.0, np.float32)
            out = guarded[:m]
            kn.linear(x, address_of(packed), n, k, out, address_of(bias), residual)
            expected = x.astype(np.float64) @ weight.T.astype(np.float64) + bias + residual
            np.testing.assert_allclose(
                out, expected, rtol=1e-5, atol=2e-5 * math.sqrt(k), err_msg=f"{threads=} {m=}"
            )
            assert (guarded[m] == 7.0).all(), "wrote behind the output"


@pytest.mark.parametrize(("n", "k"), [(50, 1536), (576, 576)])
def test_linear_row_does_not_depend_on_batch_or_threads(
    kernels: dict[int, CpuKernels], n: int, k: int
) -> None:
    packed = pack(kernels[1], normal(1, n, k))
    x, bias = normal(2, 512, k), normal(3, n)
    expected = np.empty((512, n), np.float32)
    for row in range(512):
        kernels[1].linear(
            x[row : row + 1], address_of(packed), n, k, expected[row : row + 1], address_of(bias)
        )
    for kn in kernels.values():
        for m in (1, 2, 3, 4, 5, 31, 32, 512):
            out = np.empty((m, n), np.float32)
            kn.linear(x[512 - m :], address_of(packed), n, k, out, address_of(bias))
            assert_same_bits(out, expected[512 - m :])


def test_linear_adds_residual_in_place(kernels: dict[int, CpuKernels]) -> None:
    packed = pack(kernels[2], normal(1, 50, 64))
    x, residual = normal(2, 9, 64), normal(3, 9, 50)
    out = np.empty_like(residual)
    kernels[2].linear(x, address_of(packed), 50, 64, out, residual=residual)
    kernels[2].linear(x, address_of(packed), 50, 64, residual, residual=residual)
    assert_same_bits(residual, out)


@pytest.mark.parametrize(("vocab", "k"), [(50, 33), (96, 64)])
def test_embedding_from_packed_equals_rows(
    kernels: dict[int, CpuKernels], vocab: int, k: int
) -> None:
    table = normal(1, vocab, k)
    ids = np.array([0, vocab - 1, 7, 7, 24, 23], np.int32)
    for kn in kernels.values():
        packed = pack(kn, table)
        from_packed, from_rows = np.empty((2, len(ids), k), np.float32)
        kn.embed_packed(address_of(packed), vocab, k, ids, from_packed)
        kn.embed_rows(address_of(table), vocab, k, ids, from_rows)
        assert_same_bits(from_packed, table[ids])
        assert_same_bits(from_rows, table[ids])
        for bad in (-1, vocab):
            with pytest.raises(KernelArgumentError, match="vocabulary"):
                kn.embed_packed(
                    address_of(packed), vocab, k, np.array([bad], np.int32), from_rows[:1]
                )


# Small steps


def test_exp_is_accurate(kernels: dict[int, CpuKernels]) -> None:
    x = np.linspace(-87.3, 88.3, 200_003, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.max(np.abs(kernels[1].exp(x) - exact) / exact) < 2e-7


def test_exp_at_the_ends(kernels: dict[int, CpuKernels]) -> None:
    x = np.array([-np.inf, -1e30, -100, 0, -0.0, 100, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(
        kernels[1].exp(x), np.array([0, 0, 0, 1, 1, np.inf, np.inf, np.nan], np.float32)
    )


@pytest.mark.parametrize("size", [1, 8, 77, 576])
def test_rms_norm_and_silu_match_float64(kernels: dict[int, CpuKernels], size: int) -> None:
    x, weight, gate_up = normal(1, 37, size), normal(2, size), normal(3, 37, 2 * size) * 20
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    normed = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=1, keepdims=True) + 1e-5) * weight
    for kn in kernels.values():
        out = np.empty_like(x)
        kn.rms_norm(x, address_of(weight), 1e-5, out)
        np.testing.assert_allclose(out, normed, rtol=2e-6, atol=1e-6)
        kn.silu_mul(gate_up, out)
        np.testing.assert_allclose(out, gate / (1 + np.exp(-gate)) * up, rtol=2e-6, atol=1e-6)


# Layers


@dataclass
class Layer:
    """A random layer with an own KV cache of `num_blocks` blocks from `kv_base` on."""

    shape: LayerShape
    prepared: PreparedLayer
    arrays: dict[str, F32]
    kv: NDArray[np.uint8] | None

    def poison(self) -> None:
        """Fills the cache with NaN (0xFF bytes)."""
        assert self.kv is not None
        self.kv[:] = 0xFF


def rope_table(head_dim: int) -> RopeTable:
    inverse = 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = np.arange(MAX_POSITIONS)[:, None] * inverse
    return RopeTable(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))


def make_layer(
    kernels: CpuKernels, shape: LayerShape, num_blocks: int, kv_base: int | None = None
) -> Layer:
    weights = {
        "qkv": normal(1, shape.qkv_size, shape.hidden_size),
        "o": normal(2, shape.hidden_size, shape.q_size),
        "gate_up": normal(3, 2 * shape.intermediate_size, shape.hidden_size),
        "down": normal(4, shape.hidden_size, shape.intermediate_size),
    }
    arrays = {
        name: pack(kernels, weight / np.float32(math.sqrt(weight.shape[1])))
        for name, weight in weights.items()
    }
    arrays |= {
        "input_norm": normal(5, shape.hidden_size),
        "post_norm": normal(6, shape.hidden_size),
    }
    if shape.qkv_bias:
        arrays["qkv_bias"] = normal(7, shape.qkv_size)
    kv = np.empty(num_blocks * shape.kv_block_bytes, np.uint8) if kv_base is None else None
    base = address_of(kv) if kv is not None else kv_base
    assert base is not None
    addresses = LayerAddresses(
        kv_base=base, **{name: address_of(array) for name, array in arrays.items()}
    )
    layer = Layer(
        shape, kernels.prepare_layer(shape, addresses, rope_table(shape.head_dim)), arrays, kv
    )
    if kv is not None:
        layer.poison()
    return layer


def batch_of(kernels: CpuKernels, parts: Sequence[tuple[int, int, Sequence[int]]]) -> PreparedBatch:
    """A batch of (context length, rows, block table) parts; tables are padded with a wild id."""
    tables = np.full((len(parts), max(len(table) for _, _, table in parts)), 1 << 60, np.int64)
    for row, (_, _, table) in zip(tables, parts, strict=True):
        row[: len(table)] = table
    starts = np.cumsum([0] + [count for _, count, _ in parts]).astype(np.int32)
    contexts = np.array([context for context, _, _ in parts], np.int32)
    return kernels.prepare_batch(Batch(starts, contexts, tables))


def forward(
    kernels: CpuKernels, layer: Layer, hidden: F32, table: Sequence[int], chunk: int
) -> F32:
    """Output rows of one sequence that is computed alone in chunks of `chunk` rows."""
    out = hidden.copy()
    for begin in range(0, len(out), chunk):
        rows = out[begin : begin + chunk]
        kernels.forward_layer(layer.prepared, batch_of(kernels, [(begin, len(rows), table)]), rows)
    return out


def reference_attention(layer: Layer, qkv: F32, q: F32) -> NDArray[np.float64]:
    """Causal attention of rotated rows in float64, heads one by one."""
    shape = layer.shape
    rows = len(qkv)
    heads = q.astype(np.float64).reshape(rows, shape.num_heads, shape.head_dim)
    kv = (
        qkv[:, shape.q_size :]
        .astype(np.float64)
        .reshape(rows, 2, shape.num_kv_heads, shape.head_dim)
    )
    out = np.empty_like(heads)
    for head in range(shape.num_heads):
        kv_head = head * shape.num_kv_heads // shape.num_heads
        scores = heads[:, head] @ kv[:, 0, kv_head].T / math.sqrt(shape.head_dim)
        scores[np.triu_indices(rows, 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = weights @ kv[:, 1, kv_head] / weights.sum(axis=1, keepdims=True)
    return np.reshape(out, (rows, shape.q_size))


def rotate(shape: LayerShape, qkv: F32) -> NDArray[np.float64]:
    """Rotate-half on the q and k heads of rows at positions 0.. in float64."""
    half = shape.head_dim // 2
    rope = rope_table(shape.head_dim)
    heads = qkv.astype(np.float64).reshape(len(qkv), -1, shape.head_dim)
    turned = heads[:, : shape.num_heads + shape.num_kv_heads]
    low, high = turned[..., :half].copy(), turned[..., half:].copy()
    cos, sin = rope.cos[: len(qkv), None], rope.sin[: len(qkv), None]
    turned[..., :half] = low * cos - high * sin
    turned[..., half:] = high * cos + low * sin
    return heads.reshape(len(qkv), -1)


@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim"),
    [(2, 1, 8), (3, 3, 64), (1, 7, 128), (2, 16, 24), (1, 5, 256), (1, 4, 40)],
)
def test_attention_matches_float64(
    kernels: dict[int, CpuKernels], kv_heads: int, group: int, head_dim: int, block_size: int
) -> None:
    shape = LayerShape(32, kv_heads * group, kv_heads, head_dim, 32, 1e-5, block_size)
    rows = 700
    blocks = -(-rows // block_size)
    table = np.random.default_rng(1).permutation(blocks).tolist()
    qkv = normal(2, rows, shape.qkv_size)
    outs = []
    for threads, chunk in ((1, 700), (2, 700), (2, 333)):
        kn = kernels[threads]
        layer = make_layer(kn, shape, blocks)
        out = np.empty((rows, shape.q_size), np.float32)
        for begin in range(0, rows, chunk):
            batch = batch_of(kn, [(begin, min(chunk, rows - begin), table)])
            rotated = qkv[begin : begin + chunk].copy()
            kn.rope_write_kv(layer.prepared, batch, rotated)
            q = np.ascontiguousarray(rotated[:, : shape.q_size])
            kn.attention(layer.prepared, batch, q, out[begin : begin + chunk])
        outs.append(out)
        decoded = np.empty((3, shape.q_size), np.float32)
        for i, position in enumerate((0, 300, 699)):
            batch = batch_of(kn, [(position, 1, table)])
            again = qkv[position : position + 1].copy()
            kn.rope_write_kv(layer.prepared, batch, again)
            kn.attention(layer.prepared, batch, again[:, : shape.q_size].copy(), decoded[i : i + 1])
        assert_same_bits(decoded, out[[0, 300, 699]])
    turned = rotate(shape, qkv)
    expected = reference_attention(
        layer, turned.astype(np.float32), turned[:, : shape.q_size].astype(np.float32)
    )
    np.testing.assert_allclose(outs[0], expected, rtol=1e-4, atol=5e-6)
    for out in outs[1:]:
        assert_same_bits(out, outs[0])


def test_layer_matches_float64(kernels: dict[int, CpuKernels]) -> None:
    kn, shape = kernels[2], SMALL
    layer = make_layer(kn, shape, 3)
    hidden = normal(1, 40, shape.hidden_size)
    actual = forward(kn, layer, hidden, [2, 0, 1], 40)

    def linear(x: NDArray[np.float64], name: str, n: int, k: int) -> NDArray[np.float64]:
        return x @ kn.unpack_linear(address_of(layer.arrays[name]), n, k).astype(np.float64).T

    def norm(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        return (
            x
            / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + shape.rms_norm_eps)
            * layer.arrays[name]
        )

    x = hidden.astype(np.float64)
    qkv = (
        linear(norm(x, "input_norm"), "qkv", shape.qkv_size, shape.hidden_size)
        + layer.arrays["qkv_bias"]
    )
    turned = rotate(shape, qkv.astype(np.float32)).astype(np.float32)
    x = x + linear(
        reference_attention(layer, turned, turned[:, : shape.q_size]),
        "o",
        shape.hidden_size,
        shape.q_size,
    )
    both = linear(norm(x, "post_norm"), "gate_up", 2 * shape.intermediate_size, shape.hidden_size)
    gate, up = np.split(both, 2, axis=1)
    x = x + linear(
        gate / (1 + np.exp(-gate)) * up, "down", shape.hidden_size, shape.intermediate_size
    )
    np.testing.assert_allclose(actual, x, rtol=1e-4, atol=1e-4)


def test_layer_does_not_depend_on_chunks_threads_or_blocks(kernels: dict[int, CpuKernels]) -> None:
    hidden = normal(1, 70, SMALL.hidden_size)
    expected = forward(kernels[1], make_layer(kernels[1], SMALL, 8), hidden, range(5), 1)
    assert np.isfinite(expected).all()
    for kn in kernels.values():
        for chunk in (1, 7, 16, 70):
            for table in (range(5), [7, 0, 6, 3, 1]):
                assert_same_bits(
                    forward(kn, make_layer(kn, SMALL, 8), hidden, table, chunk), expected
                )


@pytest.mark.parametrize("threads", [1, 2])
def test_layer_does_not_depend_on_the_other_rows(
    kernels: dict[int, CpuKernels], threads: int
) -> None:
    """32 sequences, prefills and decodes mixed, against each of them alone."""
    kn = kernels[threads]
    lengths = [1 + 19 * i % 90 for i in range(31)] + [600]
    hidden = [normal(10 + i, length, SMALL.hidden_size) for i, length in enumerate(lengths)]
    tables, first = [], 0
    for length in lengths:
        tables.append(range(first, first := first + -(-length // SMALL.block_size)))
    together = make_layer(kn, SMALL, first)
    chunks = [1 + i % 17 for i in range(31)] + [64]
    outs = [np.empty_like(rows) for rows in hidden]
    done = [0] * len(lengths)
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        active = [i for i, length in enumerate(lengths) if done[i] < length]
        counts = [min(chunks[i], lengths[i] - done[i]) for i in active]
        rows = np.concatenate(
            [hidden[i][done[i] : done[i] + n] for i, n in zip(active, counts, strict=True)]
        )
        parts = [(done[i], n, tables[i]) for i, n in zip(active, counts, strict=True)]
        kn.forward_layer(together.prepared, batch_of(kn, parts), rows)
        for i, n, part in zip(active, counts, np.split(rows, np.cumsum(counts)[:-1]), strict=True):
            outs[i][done[i] : done[i] + n] = part
            done[i] += n
    alone = make_layer(kernels[1], SMALL, first)
    for rows, table, out in zip(hidden, tables, outs, strict=True):
        assert_same_bits(out, forward(kernels[1], alone, rows, table, len(rows)))


def test_stale_values_in_blocks_never_matter(kernels: dict[int, CpuKernels]) -> None:
    """NaN everywhere, or the leftovers of a longer sequence: the same bits."""
    for kn in kernels.values():
        layer = make_layer(kn, SMALL, 8)
        long = forward(kn, layer, normal(1, 128, SMALL.hidden_size), range(8), 128)
        assert np.isfinite(long).all()
        hidden = normal(2, 53, SMALL.hidden_size)
        after_leftovers = forward(kn, layer, hidden, range(4), 53)
        layer.poison()
        assert_same_bits(forward(kn, layer, hidden, range(4), 9), after_leftovers)


def test_one_chunk_may_attend_to_another_of_the_same_call(kernels: dict[int, CpuKernels]) -> None:
    kn = kernels[2]
    hidden = normal(1, 40, SMALL.hidden_size)
    expected = forward(kn, make_layer(kn, SMALL, 3), hidden, range(3), 40)
    out = hidden.copy()
    layer = make_layer(kn, SMALL, 3)
    kn.forward_layer(
        layer.prepared,
        batch_of(kn, [(0, 23, range(3)), (23, 0, range(3)), (23, 17, range(3))]),
        out,
    )
    assert_same_bits(out, expected)


def test_block_ids_may_be_huge(kernels: dict[int, CpuKernels]) -> None:
    """A reserved range of 2 TiB of which two blocks at the far end are ever touched."""
    size = 2 << 40
    no_reserve = 0x4000  # MAP_NORESERVE, which module mmap names only from Python 3.13 on
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    with mmap.mmap(-1, size, flags=private) as reserved:
        base = ctypes.addressof(view := ctypes.c_char.from_buffer(reserved))
        last = size // SMALL.kv_block_bytes - 1
        hidden = normal(1, 30, SMALL.hidden_size)
        for kn in kernels.values():
            layer = make_layer(kn, SMALL, 0, kv_base=base)
            expected = forward(kn, make_layer(kn, SMALL, 2), hidden, range(2), 30)
            assert_same_bits(forward(kn, layer, hidden, [last, last - 1_000_003], 11), expected)
        del view


def test_empty_batch_is_nothing(kernels: dict[int, CpuKernels]) -> None:
    for kn in kernels.values():
        layer = make_layer(kn, SMALL, 1)
        kn.forward_layer(
            layer.prepared,
            batch_of(kn, [(0, 0, [0])]),
            np.empty((0, SMALL.hidden_size), np.float32),
        )


# Instruction sets


@pytest.fixture(scope="module")
def by_isa() -> Iterator[dict[str, CpuKernels]]:
    """Kernels on 2 threads for every instruction set of this CPU, AVX2 first."""
    each = {isa: CpuKernels(2, isa) for isa in supported_isas()}
    if len(each) == 1:
        pytest.skip("this CPU has AVX2 only, so there is nothing to compare")
    yield each
    for kn in each.values():
        kn.close()


@pytest.mark.parametrize(("n", "k"), [(1, 1), (23, 5), (24, 40), (50, 33), (97, 200), (580, 576)])
def test_linear_is_the_same_with_every_isa(by_isa: dict[str, CpuKernels], n: int, k: int) -> None:
    """Odd and even numbers of panels, partly filled ones, every height of a tile."""
    weight, bias = normal(1, n, k), normal(2, n)
    for m in (*range(1, 18), 32, 33, 41, 64, 65, 300):
        x, residual = normal(m, m, k), normal(m + 1, m, n)
        outs = []
        for kn in by_isa.values():
            guarded = np.full((m + 1, n), 7.0, np.float32)
            packed = address_of(weights := pack(kn, weight))
            kn.linear(x, packed, n, k, guarded[:m], address_of(bias), residual)
            assert (guarded[m] == 7.0).all(), "wrote behind the output"
            del weights
            outs.append(guarded)
        for out in outs[1:]:
            assert_same_bits(out, outs[0])


@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim"),
    [(2, 1, 8), (3, 3, 64), (1, 7, 128), (2, 4, 24), (1, 5, 40), (1, 6, 256)],
)
def test_attention_is_the_same_with_every_isa(
    by_isa: dict[str, CpuKernels], kv_heads: int, group: int, head_dim: int
) -> None:
    """Rows of several partitions, with scores so far apart that weights reach down to 0."""
    shape = LayerShape(32, kv_heads * group, kv_heads, head_dim, 32, 1e-5, 16)
    rows, table = 555, np.random.default_rng(1).permutation(35).tolist()
    qkv = normal(2, rows, shape.qkv_size) * np.float32(4)
    outs = []
    for kn in by_isa.values():
        layer = make_layer(kn, shape, len(table))
        batch, rotated = batch_of(kn, [(0, rows, table)]), qkv.copy()
        kn.rope_write_kv(layer.prepared, batch, rotated)
        q = np.ascontiguousarray(rotated[:, : shape.q_size])
        out = np.empty((rows + 1, shape.q_size), np.float32)
        kn.attention(layer.prepared, batch, q, out[:rows])
        last = batch_of(kn, [(rows - 1, 1, table)])
        kn.attention(layer.prepared, last, q[rows - 1 :], out[rows:])
        assert_same_bits(out[rows], out[rows - 1])
        outs.append(out)
    for out in outs[1:]:
        assert_same_bits(out, outs[0])


@pytest.mark.parametrize("shape", [SMALL, LayerShape(576, 9, 3, 64, 1536, 1e-5, 16)])
def test_layer_is_the_same_with_every_isa(by_isa: dict[str, CpuKernels], shape: LayerShape) -> None:
    hidden, table = normal(1, 130, shape.hidden_size), [7, 0, 6, 3, 1, 2, 8, 5, 4]
    for chunk in (1, 6, 130):
        outs = [
            forward(kn, make_layer(kn, shape, 9), hidden, table, chunk) for kn in by_isa.values()
        ]
        assert np.isfinite(outs[0]).all()
        for out in outs[1:]:
            assert_same_bits(out, outs[0])


def test_the_fastest_isa_is_the_default(kernels: dict[int, CpuKernels]) -> None:
    assert kernels[1].isa == supported_isas()[-1]
    with pytest.raises(KernelArgumentError, match="it has: avx2"):
        CpuKernels(1, "sse9")


# Arguments and threads


def test_wrong_arguments_are_named_errors(kernels: dict[int, CpuKernels]) -> None:
    kn = kernels[1]
    layer = make_layer(kn, SMALL, 1)
    hidden = normal(1, 17, SMALL.hidden_size)
    with pytest.raises(KernelArgumentError, match="block tables"):
        kn.forward_layer(layer.prepared, batch_of(kn, [(0, 17, [0])]), hidden)
    with pytest.raises(KernelArgumentError, match="rope table"):
        kn.forward_layer(layer.prepared, batch_of(kn, [(MAX_POSITIONS, 17, range(100))]), hidden)
    with pytest.raises(KernelArgumentError, match="hidden must be"):
        kn.forward_layer(layer.prepared, batch_of(kn, [(0, 16, [0])]), hidden)
    with pytest.raises(KernelArgumentError, match="float32"):
        kn.pack_linear(np.zeros((3, 3)), 0)  # type: ignore[arg-type]
    with pytest.raises(KernelArgumentError, match="head_dim"):
        make_layer(kn, replace(SMALL, head_dim=12), 1)
    with pytest.raises(KernelArgumentError, match="block_size"):
        make_layer(kn, replace(SMALL, block_size=8), 1)
    with pytest.raises(UnknownKernelsError, match="known: cpu"):
        create_kernels("tpu", 1)
    with pytest.raises(KernelArgumentError, match="at least 1"):
        create_kernels("cpu", 0)


def kernel_thread_names() -> list[str]:
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if name.startswith("kn-worker")]


def test_threads_are_named_and_end_with_their_kernels(kernels: dict[int, CpuKernels]) -> None:
    before = len(kernel_thread_names())
    packed = pack(kernels[1], normal(1, 576, 64))
    for _ in range(50):
        kn = CpuKernels(4)
        assert len(kernel_thread_names()) == before + 3
        kn.linear(normal(2, 8, 64), address_of(packed), 576, 64, np.empty((8, 576), np.float32))
        kn.close()
        kn.close()
        assert len(kernel_thread_names()) == before
    with pytest.raises(KernelArgumentError, match="closed"):
        kn.rms_norm(normal(1, 1, 8), 0, 1e-5, np.empty((1, 8), np.float32))


def test_calls_from_two_python_threads_do_not_mix(kernels: dict[int, CpuKernels]) -> None:
    kn, shape = kernels[2], SMALL
    inputs = [normal(i, 70, shape.hidden_size) for i in range(2)]
    layers = [make_layer(kn, shape, 5) for _ in inputs]
    expected = [forward(kn, layers[0], hidden, range(5), 5) for hidden in inputs]
    outs: dict[int, F32] = {}

    def work(i: int) -> None:
        outs[i] = forward(kn, layers[i], inputs[i], range(5), 5)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert_same_bits(outs[i], expected[i])
