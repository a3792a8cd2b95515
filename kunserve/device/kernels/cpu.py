"""The CPU backend: csrc/ (plain C interface, AVX2 or AVX-512) bound by ctypes, without the
GIL."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import weakref
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kunserve.device.kernels.base import (
    Batch,
    Float32Array,
    Int32Array,
    KernelArgumentError,
    KernelMemoryError,
    KernelsNotBuiltError,
    LayerAddresses,
    LayerShape,
    PreparedBatch,
    PreparedLayer,
    RopeTable,
    UnsupportedCpuError,
)

PACK_WIDTH = 24
MAX_HEAD_DIM = 256
MAX_GROUP = 16
POSITION_STEP = 16  # positions that attention takes together; a block holds whole steps
ISAS = {"avx2": 1, "avx512": 2}  # instruction sets by their numbers in csrc/kernels.h, rising

_ADDRESS = ctypes.c_void_p
_INT = ctypes.c_int64


class _LayerStruct(ctypes.Structure):
    """KnLayer in csrc/kernels.h."""

    _fields_ = (
        ("hidden_size", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("intermediate_size", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("max_positions", ctypes.c_int32),
        ("rms_norm_eps", ctypes.c_float),
        ("input_norm", _ADDRESS),
        ("qkv", _ADDRESS),
        ("qkv_bias", _ADDRESS),
        ("o", _ADDRESS),
        ("post_norm", _ADDRESS),
        ("gate_up", _ADDRESS),
        ("down", _ADDRESS),
        ("kv_base", _ADDRESS),
        ("rope_cos", _ADDRESS),
        ("rope_sin", _ADDRESS),
    )


class _BatchStruct(ctypes.Structure):
    """KnBatch in csrc/kernels.h."""

    _fields_ = (
        ("num_seqs", ctypes.c_int32),
        ("num_rows", ctypes.c_int32),
        ("query_starts", _ADDRESS),
        ("context_lens", _ADDRESS),
        ("block_tables", _ADDRESS),
        ("block_table_stride", ctypes.c_int64),
    )


class _Native(NamedTuple):
    """A struct of the C interface with its address and the arrays that it points into."""

    address: int
    struct: ctypes.Structure
    arrays: tuple[NDArray[Any], ...]


# Result type, then argument types, of every function.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "kn_widest_isa": (ctypes.c_int,),
    "kn_create": (_ADDRESS, ctypes.c_int, ctypes.c_int),
    "kn_destroy": (None, _ADDRESS),
    "kn_pack_linear": (None, _ADDRESS, _ADDRESS, _INT, _INT, _ADDRESS),
    "kn_unpack_linear": (None, _ADDRESS, _ADDRESS, _INT, _INT, _ADDRESS),
    "kn_linear": (
        None,
        _ADDRESS,
        _ADDRESS,
        _INT,
        _ADDRESS,
        _INT,
        _INT,
        _ADDRESS,
        _ADDRESS,
        _ADDRESS,
    ),
    "kn_embed_packed": (ctypes.c_int, _ADDRESS, _ADDRESS, _INT, _INT, _ADDRESS, _INT, _ADDRESS),
    "kn_embed_rows": (ctypes.c_int, _ADDRESS, _ADDRESS, _INT, _INT, _ADDRESS, _INT, _ADDRESS),
    "kn_rms_norm": (None, _ADDRESS, _ADDRESS, _ADDRESS, _INT, _INT, ctypes.c_float, _ADDRESS),
    "kn_silu_mul": (None, _ADDRESS, _ADDRESS, _INT, _INT, _ADDRESS),
    "kn_exp": (None, _ADDRESS, _INT, _ADDRESS),
    "kn_rope_write_kv": (None, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS),
    "kn_attention": (ctypes.c_int, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _INT, _ADDRESS),
    "kn_layer_forward": (ctypes.c_int, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS),
    "kn_measure_read_gb_per_s": (ctypes.c_double, _ADDRESS, _INT, ctypes.c_int),
    "kn_measure_fma_gflop_per_s": (ctypes.c_double, _ADDRESS, ctypes.c_int),
}


def _library_path() -> Path:
    folder = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_cpu{suffix}"
        if path.exists():
            return path
    raise KernelsNotBuiltError(
        f"the CPU kernels are not built: no _cpu library in {folder}; "
        "run `pip install -e .` in the project's root"
    )


@functools.cache
def _load_library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_library_path()))
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    if not library.kn_widest_isa():
        raise UnsupportedCpuError(
            "the CPU kernels need AVX2 and FMA, which this CPU does not have; use another machine"
        )
    return library


@functools.cache
def _build() -> str:
    return hashlib.sha256(_library_path().read_bytes()).hexdigest()[:16]


def supported_isas() -> tuple[str, ...]:
    """The instruction sets that this CPU has kernels for, the fastest last.

    Raises:
        KernelsNotBuiltError, UnsupportedCpuError: see `CpuKernels`.
    """
    widest = _load_library().kn_widest_isa()
    return tuple(name for name, number in ISAS.items() if number <= widest)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise KernelArgumentError(message)


def _address(array: NDArray[Any], name: str, dtype: type, shape: tuple[int, ...]) -> int:
    """Address of a C-contiguous array of exactly this type and shape."""
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise KernelArgumentError(
            f"{name} must be a C-contiguous {np.dtype(dtype)} array of shape {shape}, "
            f"not {array.dtype} {array.shape}, contiguous={array.flags.c_contiguous}"
        )
    address: int = array.__array_interface__["data"][0]
    return address


class CpuKernels:
    """`Kernels` on one pool of CPU threads; `threads` counts the calling one.

    `isa` is one of `supported_isas()`, by default the fastest; all give the same bits.

    Raises:
        KernelsNotBuiltError: the native library was not compiled.
        UnsupportedCpuError: the CPU lacks AVX2 or FMA.
        KernelArgumentError: `threads` is below 1, or the CPU lacks `isa`.
        KernelMemoryError: the threads cannot be started.
    """

    def __init__(self, threads: int, isa: str | None = None) -> None:
        _check(threads >= 1, f"threads must be at least 1, not {threads}")
        self._library = _load_library()
        supported = supported_isas()
        self._isa = isa if isa is not None else supported[-1]
        _check(
            self._isa in supported,
            f"this CPU has no kernels for {isa!r}; it has: {', '.join(supported)}",
        )
        context = self._library.kn_create(threads, ISAS[self._isa])
        if not context:
            raise KernelMemoryError(
                f"cannot start {threads} kernel threads; lower the number of threads"
            )
        self._threads = threads
        self._open_context: int | None = context
        self._destroy = weakref.finalize(self, self._library.kn_destroy, context)

    @property
    def threads(self) -> int:
        """Threads that compute, the calling one included."""
        return self._threads

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._isa

    @property
    def identity(self) -> str:
        """The backend, the instruction set and a digest of the library."""
        return f"cpu {self._isa} {_build()}"

    @property
    def pack_width(self) -> int:
        """Output features of one panel of a packed linear."""
        return PACK_WIDTH

    @property
    def _context(self) -> int:
        if self._open_context is None:
            raise KernelArgumentError("these kernels are closed; create new ones")
        return self._open_context

    def close(self) -> None:
        """Ends the threads and frees the workspace."""
        self._open_context = None
        self._destroy()

    # Linears

    def packed_bytes(self, n: int, k: int) -> int:
        """Bytes of a packed linear: ceil(n / 24) panels of [k][24] float32."""
        return math.ceil(n / PACK_WIDTH) * PACK_WIDTH * k * 4

    def pack_linear(self, weight: Float32Array, destination: int) -> None:
        """Writes weight [n, k] to `destination` as panels [ceil(n / 24)][k][24], zero padded."""
        n, k = weight.shape
        source = _address(weight, "weight", np.float32, (n, k))
        self._library.kn_pack_linear(self._context, source, n, k, destination)

    def unpack_linear(self, packed: int, n: int, k: int) -> Float32Array:
        """The weight [n, k] that was packed at address `packed`."""
        weight = np.empty((n, k), np.float32)
        self._library.kn_unpack_linear(
            self._context, packed, n, k, _address(weight, "weight", np.float32, (n, k))
        )
        return weight

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
        """out [m, n] = x [m, k] W^T (+ bias [n]) (+ residual [m, n]), summed over k in order."""
        m = x.shape[0]
        source = _address(x, "x", np.float32, (m, k))
        target = _address(out, "out", np.float32, (m, n))
        added = 0 if residual is None else _address(residual, "residual", np.float32, (m, n))
        self._library.kn_linear(self._context, source, m, packed, n, k, bias, added, target)

    def embed_packed(
        self,
        packed: int,
        vocab_size: int,
        hidden_size: int,
        token_ids: Int32Array,
        out: Float32Array,
    ) -> None:
        """out [m, hidden_size] = rows token_ids [m] of a packed linear."""
        self._embed(self._library.kn_embed_packed, packed, vocab_size, hidden_size, token_ids, out)

    def embed_rows(
        self,
        table: int,
        vocab_size: int,
        hidden_size: int,
        token_ids: Int32Array,
        out: Float32Array,
    ) -> None:
        """out [m, hidden_size] = rows token_ids [m] of a row-major table."""
        self._embed(self._library.kn_embed_rows, table, vocab_size, hidden_size, token_ids, out)

    def _embed(
        self,
        gather: Any,
        table: int,
        vocab_size: int,
        hidden_size: int,
        token_ids: Int32Array,
        out: Float32Array,
    ) -> None:
        m = len(token_ids)
        ids = _address(token_ids, "token_ids", np.int32, (m,))
        target = _address(out, "out", np.float32, (m, hidden_size))
        failed = gather(self._context, table, vocab_size, hidden_size, ids, m, target)
        _check(not failed, f"a token id lies outside the vocabulary [0, {vocab_size})")

    # Small steps

    def rms_norm(self, x: Float32Array, weight: int, eps: float, out: Float32Array) -> None:
        """out [m, size] = x [m, size] / sqrt(mean(x^2) + eps) * weight [size]."""
        m, size = x.shape
        source = _address(x, "x", np.float32, (m, size))
        target = _address(out, "out", np.float32, (m, size))
        self._library.kn_rms_norm(self._context, source, weight, m, size, eps, target)

    def silu_mul(self, gate_up: Float32Array, out: Float32Array) -> None:
        """out [m, size] = silu(gate) * up, where gate_up is [m, 2 * size], gate first."""
        m, size = out.shape
        source = _address(gate_up, "gate_up", np.float32, (m, 2 * size))
        self._library.kn_silu_mul(
            self._context, source, m, size, _address(out, "out", np.float32, (m, size))
        )

    def exp(self, x: Float32Array) -> Float32Array:
        """e^x of a vector [count] by the polynomial that all kernels use."""
        out = np.empty_like(x)
        source = _address(x, "x", np.float32, (len(x),))
        self._library.kn_exp(source, len(x), _address(out, "out", np.float32, (len(x),)))
        return out

    # Layers

    def prepare_layer(
        self, shape: LayerShape, addresses: LayerAddresses, rope: RopeTable
    ) -> PreparedLayer:
        """Checks and binds one layer; keeps the rope table alive."""
        _check_shape(shape)
        _check(
            (addresses.qkv_bias != 0) == shape.qkv_bias,
            "qkv_bias needs an address exactly if the shape has it",
        )
        max_positions = rope.cos.shape[0]
        table = (max_positions, shape.head_dim // 2)
        struct = _LayerStruct(
            hidden_size=shape.hidden_size,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            intermediate_size=shape.intermediate_size,
            block_size=shape.block_size,
            max_positions=max_positions,
            rms_norm_eps=shape.rms_norm_eps,
            input_norm=addresses.input_norm,
            qkv=addresses.qkv,
            qkv_bias=addresses.qkv_bias,
            o=addresses.o,
            post_norm=addresses.post_norm,
            gate_up=addresses.gate_up,
            down=addresses.down,
            kv_base=addresses.kv_base,
            rope_cos=_address(rope.cos, "rope.cos", np.float32, table),
            rope_sin=_address(rope.sin, "rope.sin", np.float32, table),
        )
        native = _Native(ctypes.addressof(struct), struct, (rope.cos, rope.sin))
        return PreparedLayer(shape, max_positions, native)

    def prepare_batch(self, batch: Batch) -> PreparedBatch:
        """Checks and binds one step's batch; keeps its arrays alive."""
        num_seqs = len(batch.context_lens)
        max_blocks = batch.block_tables.shape[1]
        starts = _address(batch.query_starts, "query_starts", np.int32, (num_seqs + 1,))
        contexts = _address(batch.context_lens, "context_lens", np.int32, (num_seqs,))
        tables = _address(batch.block_tables, "block_tables", np.int64, (num_seqs, max_blocks))
        counts = np.diff(batch.query_starts)
        _check(
            batch.query_starts[0] == 0 and bool((counts >= 0).all()),
            "query_starts must rise from 0",
        )
        _check(bool((batch.context_lens >= 0).all()), "context_lens must not be negative")
        struct = _BatchStruct(
            num_seqs=num_seqs,
            num_rows=int(batch.query_starts[-1]),
            query_starts=starts,
            context_lens=contexts,
            block_tables=tables,
            block_table_stride=max_blocks,
        )
        native = _Native(
            ctypes.addressof(struct),
            struct,
            (batch.query_starts, batch.context_lens, batch.block_tables),
        )
        last_position = int((batch.context_lens + counts).max(initial=0)) - 1
        return PreparedBatch(int(batch.query_starts[-1]), last_position, max_blocks, native)

    def forward_layer(
        self, layer: PreparedLayer, batch: PreparedBatch, hidden: Float32Array
    ) -> None:
        """Runs a layer on hidden [num_rows, hidden_size] in place; see `Kernels.forward_layer`."""
        layer_address, batch_address = _bound_pair(layer, batch)
        rows = _address(hidden, "hidden", np.float32, (batch.num_rows, layer.shape.hidden_size))
        failed = self._library.kn_layer_forward(self._context, layer_address, batch_address, rows)
        _check_memory(failed, batch.num_rows)

    def rope_write_kv(self, layer: PreparedLayer, batch: PreparedBatch, qkv: Float32Array) -> None:
        """Rotates q and k of qkv [num_rows, qkv_size] in place and writes k and v to the cache."""
        layer_address, batch_address = _bound_pair(layer, batch)
        rows = _address(qkv, "qkv", np.float32, (batch.num_rows, layer.shape.qkv_size))
        self._library.kn_rope_write_kv(self._context, layer_address, batch_address, rows)

    def attention(
        self, layer: PreparedLayer, batch: PreparedBatch, q: Float32Array, out: Float32Array
    ) -> None:
        """out = causal attention over the cache; out and rotated queries q [num_rows, q_size]."""
        layer_address, batch_address = _bound_pair(layer, batch)
        q_size = layer.shape.q_size
        source = _address(q, "q", np.float32, (batch.num_rows, q_size))
        target = _address(out, "out", np.float32, (batch.num_rows, q_size))
        failed = self._library.kn_attention(
            self._context, layer_address, batch_address, source, q_size, target
        )
        _check_memory(failed, batch.num_rows)

    # Limits of the machine

    def measure_read_gb_per_s(self, num_bytes: int, passes: int) -> float:
        """Read bandwidth (GB/s) of all threads, best of `passes` over `num_bytes` of memory."""
        return float(self._library.kn_measure_read_gb_per_s(self._context, num_bytes, passes))

    def measure_fma_gflop_per_s(self, passes: int) -> float:
        """Rate (GFLOP/s) of float32 multiply-adds of all threads, best of `passes`."""
        return float(self._library.kn_measure_fma_gflop_per_s(self._context, passes))


def _check_shape(shape: LayerShape) -> None:
    _check(
        shape.head_dim % 8 == 0 and 0 < shape.head_dim <= MAX_HEAD_DIM,
        f"head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, not {shape.head_dim}",
    )
    _check(
        shape.num_kv_heads > 0 and shape.num_heads % shape.num_kv_heads == 0,
        f"num_heads ({shape.num_heads}) must be a multiple of num_kv_heads ({shape.num_kv_heads})",
    )
    group = shape.num_heads // shape.num_kv_heads
    _check(
        1 <= group <= MAX_GROUP,
        f"1 to {MAX_GROUP} query heads may share one KV head, not {group}",
    )
    _check(
        shape.block_size % POSITION_STEP == 0 and shape.block_size > 0,
        f"block_size must be a multiple of {POSITION_STEP}, not {shape.block_size}",
    )
    _check(shape.hidden_size > 0 and shape.intermediate_size > 0, "layer sizes must be positive")


def _bound_pair(layer: PreparedLayer, batch: PreparedBatch) -> tuple[int, int]:
    """Addresses of a layer and a batch that fit each other."""
    if batch.last_position >= layer.max_positions:
        raise KernelArgumentError(
            f"position {batch.last_position} lies beyond the rope table of "
            f"{layer.max_positions} positions"
        )
    if batch.last_position >= batch.max_blocks * layer.shape.block_size:
        raise KernelArgumentError(
            f"position {batch.last_position} lies beyond the block tables of "
            f"{batch.max_blocks} blocks"
        )
    if not isinstance(layer.native, _Native) or not isinstance(batch.native, _Native):
        raise KernelArgumentError("the layer or the batch was prepared by another backend")
    return layer.native.address, batch.native.address


def _check_memory(failed: int, num_rows: int) -> None:
    if failed:
        raise KernelMemoryError(
            f"no memory for the workspace of {num_rows} rows; lower the token budget"
        )
