"""What a kernel backend offers to the decoder: value types and the `Kernels` protocol.

Big memory (weights, KV cache) lives in a memory arena and is named by address; activations are
numpy float32 arrays. Every backend keeps one law: **the result of a row depends on nothing but its
own inputs**, bit for bit, not on the other rows of the batch, on how a prompt is cut into chunks,
on the number of threads or on where its blocks lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kunserve.core.errors import KunserveError

Float32Array = NDArray[np.float32]
Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]


class UnknownKernelsError(KunserveError):
    """No kernel backend has the requested name."""


class KernelsNotBuiltError(KunserveError):
    """The native library of a backend is not there."""


class UnsupportedCpuError(KunserveError):
    """The CPU lacks instructions that the native library is built with."""


class KernelArgumentError(KunserveError):
    """An array, shape or id that the kernels cannot work with; nothing was computed."""


class KernelMemoryError(KunserveError):
    """There is no memory for threads or for the workspace of a call."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Sizes of one decoder layer.

    `head_dim` is a multiple of 8, at most 256; at most 16 query heads share one KV head;
    `block_size` (tokens in a KV block) is a multiple of 16.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    block_size: int
    qkv_bias: bool = False

    @property
    def q_size(self) -> int:
        """Query features of one row."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Features of K, and of V, of one row."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Output features of the fused qkv linear: q heads, k heads, v heads."""
        return self.q_size + 2 * self.kv_size

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one KV block of one layer: K `[kv_head][head_dim][block_size]`, then V
        `[kv_head][block_size][head_dim]`."""
        return 2 * self.block_size * self.kv_size * 4


@dataclass(frozen=True, slots=True)
class LayerAddresses:
    """Where one layer's float32 weights and KV cache lie. The memory outlives every call that uses
    it.

    Norms are vectors `[hidden_size]`; `qkv`, `o`, `gate_up` and `down` are packed linears
    (`Kernels.pack_linear`); `gate_up` has all gate rows first, then all up rows. `qkv_bias` is
    `[qkv_size]`, or 0 if the layer has none. Block b of the KV cache begins at `kv_base + b *
    shape.kv_block_bytes`.
    """

    input_norm: int
    qkv: int
    o: int
    post_norm: int
    gate_up: int
    down: int
    kv_base: int
    qkv_bias: int = 0


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Cosine and sine by absolute position, float32 `[max_positions, head_dim / 2]` each."""

    cos: Float32Array
    sin: Float32Array


@dataclass(frozen=True, slots=True)
class Batch:
    """A mixed batch of prefill chunks and decodes.

    Row i of sequence s is row `query_starts[s] + i` of the batch and stands at position
    `context_lens[s] + i`.
    """

    query_starts: Int32Array  # [num_seqs + 1], from 0, not decreasing
    context_lens: Int32Array  # [num_seqs], tokens already computed
    block_tables: (
        Int64Array  # [num_seqs, max_blocks], ids by position; unused entries hold anything
    )


@dataclass(frozen=True, slots=True)
class PreparedLayer:
    """A layer as its backend takes it; made once by `Kernels.prepare_layer`."""

    shape: LayerShape
    max_positions: int
    native: object


@dataclass(frozen=True, slots=True)
class PreparedBatch:
    """A batch as its backend takes it; `Kernels.prepare_batch` makes it once per step."""

    num_rows: int
    last_position: int  # highest position of any row, -1 in an empty batch
    max_blocks: int
    native: object


class Kernels(Protocol):
    """Kernels of one backend.

    Calls on one object run one after the other and do not hold the GIL while computing. Wrong
    shapes, dtypes and ids raise KernelArgumentError before anything is computed; addresses cannot
    be checked.
    """

    @property
    def threads(self) -> int:
        """Threads that compute, the calling one included."""

    @property
    def pack_width(self) -> int:
        """Output features of one panel of a packed linear."""

    @property
    def identity(self) -> str:
        """Backend, instruction set and build: with equal ones the same call does the same work."""

    def close(self) -> None:
        """Ends the threads and frees the workspace; later calls raise. Closing twice is allowed."""

    def packed_bytes(self, n: int, k: int) -> int:
        """Bytes of a packed linear of n outputs and k inputs; its last panel is padded."""

    def pack_linear(self, weight: Float32Array, destination: int) -> None:
        """Writes `weight` [n, k] packed to the `packed_bytes(n, k)` bytes at `destination`."""

    def unpack_linear(self, packed: int, n: int, k: int) -> Float32Array:
        """The weight [n, k] that was packed at address `packed`."""

    def linear(
        self,
        x: Float32Array,
        packed: int,
        n: int,
        k: int,
        out: Float32Array,
        bias: int = 0,
        residual: Float32Array | None = None,
    ) -> None:
        """out = x W^T (+ bias) (+ residual).

        x [m, k]; out and residual [m, n], which may be the same array; bias address of [n], 0 for
        none.
        """

    def embed_packed(
        self,
        packed: int,
        vocab_size: int,
        hidden_size: int,
        token_ids: Int32Array,
        out: Float32Array,
    ) -> None:
        """Gathers rows of a packed linear, as an embedding tied to the head is.

        token_ids [m], out [m, hidden_size].
        """

    def embed_rows(
        self,
        table: int,
        vocab_size: int,
        hidden_size: int,
        token_ids: Int32Array,
        out: Float32Array,
    ) -> None:
        """Gathers rows of a row-major table [vocab_size, hidden_size].

        token_ids [m], out [m, hidden_size].
        """

    def rms_norm(self, x: Float32Array, weight: int, eps: float, out: Float32Array) -> None:
        """out = x / sqrt(mean(x^2) + eps) * weight, row by row.

        x and out [m, size], which may be the same array; weight address of [size].
        """

    def prepare_layer(
        self, shape: LayerShape, addresses: LayerAddresses, rope: RopeTable
    ) -> PreparedLayer:
        """Checks and binds one layer; its addresses stay valid as long as the result is used."""

    def prepare_batch(self, batch: Batch) -> PreparedBatch:
        """Checks and binds one step's batch; its arrays must not change while it is used."""

    def forward_layer(
        self, layer: PreparedLayer, batch: PreparedBatch, hidden: Float32Array
    ) -> None:
        """Runs one decoder layer on `hidden` [num_rows, hidden_size] in place.

        The K and V of all rows are written to the cache before any row attends. Two rows never
        write the same slot.

        Raises:
            KernelArgumentError: a position lies beyond the rope table or beyond the block tables.
            KernelMemoryError: no memory for the workspace.
        """
