"""Weights: from safetensors files into the slabs of parts.

Files are read by pread into buffers and never mapped: a mapped file would count as the instance's
memory, and would kill it with SIGBUS if somebody truncated it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from kunserve.core.closing import Closing
from kunserve.core.errors import AccountingError, ModelLoadError
from kunserve.core.layout import Part
from kunserve.core.model import FLOAT32_BYTES, ModelSpec
from kunserve.device.kernels.base import Kernels
from kunserve.worker.slabs import (
    FIELD_ALIGNMENT_BYTES,
    PACK_WIDTH,
    Field,
    FieldKind,
    PartFormat,
    part_format,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

READ_BYTES = 16 << 20
"""Most float32 bytes of a matrix that are in a buffer at a time while it is loaded."""

_MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors library
_LENGTH_BYTES = 8
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_READABLE = ("F32", "F16", "BF16")

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `offset_bytes` counts from the start of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int


class CheckpointReader(Closing):
    """The safetensors of a Hugging Face directory, in one file or in shards with an index.

    Use it as a context manager, or call `close`.

    Raises:
        ModelLoadError: a file is missing, unreadable, truncated or corrupt; the message names it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptors: dict[Path, int] = {}
        try:
            self._entries = self._read_entries()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the files. Closing twice is allowed."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """All tensors by name."""
        return self._entries

    def entry(self, name: str, shape: tuple[int, ...]) -> TensorEntry:
        """The tensor `name`, which must have this shape and a float dtype.

        Raises:
            ModelLoadError: it is missing, of another shape, or neither F32, F16 nor BF16.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise ModelLoadError(f"{self._directory} lacks the tensor {name}")
        if entry.shape != shape:
            raise ModelLoadError(
                f"{entry.file}: tensor {name} has the shape {list(entry.shape)}, "
                f"by config.json it is {list(shape)}"
            )
        if entry.dtype not in _READABLE:
            raise ModelLoadError(
                f"{entry.file}: tensor {name} is {entry.dtype}, only {', '.join(_READABLE)} "
                "are read"
            )
        return entry

    def read_into(self, name: str, shape: tuple[int, ...], first: int, target: FloatArray) -> None:
        """Fill the contiguous `target` [count] from element `first` (row-major) of a tensor.

        16-bit floats are converted to float32 exactly.

        Raises:
            ModelLoadError: as `entry`, or the file got shorter or cannot be read.
        """
        entry = self.entry(name, shape)
        offset = entry.offset_bytes + first * _ITEM_BYTES[entry.dtype]
        if entry.dtype == "F32":
            self._read(entry.file, offset, target)
        elif entry.dtype == "F16":
            halves = np.empty(target.size, np.float16)
            self._read(entry.file, offset, halves)
            target[:] = halves
        else:  # BF16 is the upper half of a float32
            upper = np.empty(target.size, np.uint16)
            self._read(entry.file, offset, upper)
            bits = target.view(np.uint32)
            bits[:] = upper
            bits <<= 16

    def _read(self, file: Path, offset: int, target: NDArray[Any]) -> None:
        remaining = target.view(np.uint8).data
        while remaining:
            try:
                count = os.preadv(self._descriptors[file], [remaining], offset)
            except OSError as error:
                raise ModelLoadError(f"{file} cannot be read: {error}") from error
            if count == 0:
                raise ModelLoadError(f"{file} got shorter while it was read: fetch it again")
            remaining, offset = remaining[count:], offset + count

    def _read_entries(self) -> dict[str, TensorEntry]:
        single, index = self._directory / SINGLE_FILE, self._directory / INDEX_FILE
        if single.exists() or not index.exists():
            return self._open(single)
        weight_map = _read_weight_map(index)
        shards = {name: self._open(self._directory / name) for name in set(weight_map.values())}
        entries = {}
        for tensor, shard in weight_map.items():
            if tensor not in shards[shard]:
                raise ModelLoadError(f"{index}: {shard} does not hold {tensor}")
            entries[tensor] = shards[shard][tensor]
        return entries

    def _open(self, file: Path) -> dict[str, TensorEntry]:
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            self._descriptors[file] = descriptor
            file_bytes = os.fstat(descriptor).st_size
        except OSError as error:
            raise ModelLoadError(f"{file} cannot be opened ({error.strerror})") from error
        if file_bytes < _LENGTH_BYTES:
            raise ModelLoadError(f"{file} is truncated: it has {file_bytes} bytes")
        length = np.empty(1, "<u8")
        self._read(file, 0, length)
        header_bytes = int(length[0])
        if header_bytes > min(_MAX_HEADER_BYTES, file_bytes - _LENGTH_BYTES):
            raise ModelLoadError(
                f"{file} is truncated or no safetensors file: it states a header of "
                f"{header_bytes} bytes and has {file_bytes} bytes in all"
            )
        text = np.empty(header_bytes, np.uint8)
        self._read(file, _LENGTH_BYTES, text)
        return _parse_header(file, text.tobytes(), _LENGTH_BYTES + header_bytes, file_bytes)


def check_checkpoint(reader: CheckpointReader, spec: ModelSpec) -> None:
    """Look for every tensor of every part before any is loaded.

    Raises:
        ModelLoadError: one is missing, of another shape than `spec` says, or of another dtype.
    """
    for part in spec.parts:
        for field in part_format(spec, part).fields:
            for source in field.sources:
                reader.entry(source.tensor, source.shape)


def load_part(
    reader: CheckpointReader, spec: ModelSpec, part: Part, address: int, kernels: Kernels
) -> PartFormat:
    """Fill the slab of `part` at `address` from the checkpoint, and return its format.

    `address` is host memory of at least `part_format(spec, part).nbytes` bytes, 64-byte aligned;
    what it held before does not matter. Besides it, about READ_BYTES (twice that for 16-bit
    checkpoints) are in use.

    Raises:
        ModelLoadError: see `CheckpointReader.read_into`.
        AccountingError: the address is not aligned, or `kernels` pack in another way.
    """
    if address % FIELD_ALIGNMENT_BYTES:
        raise AccountingError(f"the slab of {part} at {address:#x} is not 64-byte aligned")
    layout = part_format(spec, part)
    end_bytes = 0
    for field in layout.fields:
        _zero(address, end_bytes, field.offset_bytes)
        if field.kind is FieldKind.PACKED:
            _load_packed(reader, field, address + field.offset_bytes, kernels)
        else:
            _load_rows(reader, field, address + field.offset_bytes)
        end_bytes = field.offset_bytes + field.nbytes
    _zero(address, end_bytes, layout.nbytes)
    return layout


def part_checksum(address: int, nbytes: int) -> str:
    """SHA-256 (hexadecimal) of the `nbytes` of a slab at `address`: the fastest of the standard
    library on CPUs with SHA extensions.

    The same for a part wherever it was loaded, because every byte of a slab is defined.
    """
    slab = host_array(address, nbytes // FLOAT32_BYTES)
    return hashlib.sha256(slab.view(np.uint8).data).hexdigest()


def host_array(address: int, count: int) -> FloatArray:
    """The `count` float32 values of host memory at `address`, as a writable array [count].

    It owns nothing: the memory must stay for as long as the array is used.
    """
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))


def _zero(address: int, start_bytes: int, stop_bytes: int) -> None:
    if stop_bytes > start_bytes:
        host_array(address + start_bytes, (stop_bytes - start_bytes) // FLOAT32_BYTES)[:] = 0


def _load_rows(reader: CheckpointReader, field: Field, address: int) -> None:
    target = host_array(address, field.rows * field.columns)
    step = READ_BYTES // FLOAT32_BYTES
    start = 0
    for source in field.sources:
        size = math.prod(source.shape)
        for first in range(0, size, step):
            count = min(step, size - first)
            piece = target[start + first : start + first + count]
            reader.read_into(source.tensor, source.shape, first, piece)
        start += size


def _load_packed(reader: CheckpointReader, field: Field, address: int, kernels: Kernels) -> None:
    """Pack a matrix in slices of whole panels: a panel depends on nothing but its 24 rows."""
    if (
        kernels.pack_width != PACK_WIDTH
        or kernels.packed_bytes(field.rows, field.columns) != field.nbytes
    ):
        raise AccountingError(f"these kernels pack {field.name} in another way than the slabs")
    row_bytes = field.columns * FLOAT32_BYTES
    slice_rows = max(1, READ_BYTES // (PACK_WIDTH * row_bytes)) * PACK_WIDTH
    buffer = np.empty((min(slice_rows, field.rows), field.columns), np.float32)
    for first in range(0, field.rows, slice_rows):
        stop = min(first + slice_rows, field.rows)
        rows = buffer[: stop - first]
        for piece in _pieces(field, first, stop):
            reader.read_into(
                piece.tensor,
                piece.shape,
                piece.first_row * field.columns,
                rows[piece.target_row : piece.target_row + piece.num_rows].reshape(-1),
            )
        kernels.pack_linear(rows, address + first * row_bytes)


@dataclass(frozen=True)
class _Piece:
    """Rows [first_row, first_row + num_rows) of a tensor, which go to row `target_row` on."""

    tensor: str
    shape: tuple[int, ...]
    first_row: int
    num_rows: int
    target_row: int


def _pieces(field: Field, first: int, stop: int) -> Iterator[_Piece]:
    """What the stacked rows [first, stop) of a matrix consist of.

    field   |----- q -----|-- k --|-- v --|
    slice           [first ... stop)
    """
    start = 0
    for source in field.sources:
        end = start + source.shape[0]
        low, high = max(first, start), min(stop, end)
        if low < high:
            yield _Piece(source.tensor, source.shape, low - start, high - low, low - first)
        start = end


# ---------------------------------------------------------------- headers


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except OSError as error:
        raise ModelLoadError(f"{index} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{index} is corrupt: no weight_map in it") from error
    if not isinstance(weight_map, dict) or not all(
        # A shard lies beside its index: no path leads out of the model's directory.
        isinstance(shard, str) and Path(shard).name == shard
        for shard in weight_map.values()
    ):
        raise ModelLoadError(f"{index} is corrupt: weight_map must give a file name by tensor")
    return weight_map


def _parse_header(
    file: Path, text: bytes, data_start: int, file_bytes: int
) -> dict[str, TensorEntry]:
    """The tensors of one file; its data must be covered exactly, as the format demands."""

    def corrupt(reason: str) -> ModelLoadError:
        return ModelLoadError(f"{file} is corrupt: {reason}; fetch it again")

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repetition)
    except ValueError as error:
        raise corrupt(f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise corrupt("its header is no JSON object")
    header.pop("__metadata__", None)
    spans: list[tuple[int, int]] = []
    entries = {}
    for name, fields in header.items():
        problem = _entry_problem(fields)
        if problem:
            raise corrupt(f"tensor {name} {problem}")
        start, end = fields["data_offsets"]
        spans.append((start, end))
        entries[name] = TensorEntry(
            file, fields["dtype"], tuple(fields["shape"]), data_start + start
        )
    covered = 0
    for start, end in sorted(spans):
        if start != covered:
            raise corrupt(f"its tensors leave a gap or overlap at byte {covered} of the data")
        covered = end
    if data_start + covered != file_bytes:
        kind = "truncated" if data_start + covered > file_bytes else "corrupt"
        raise ModelLoadError(
            f"{file} is {kind}: its tensors end at byte {data_start + covered}, "
            f"the file has {file_bytes}; fetch it again"
        )
    return entries


def _entry_problem(fields: object) -> str:
    """What is wrong with a tensor's header entry, or "" if nothing is."""
    if not isinstance(fields, dict):
        return "has no JSON object"
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str):
        return "has no dtype"
    if not _is_sizes(shape):
        return "has no valid shape"
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        return "has no valid data_offsets"
    # A dtype that is unknown here may only not be asked for.
    size = math.prod(shape) * _ITEM_BYTES.get(dtype, 0)
    if dtype in _ITEM_BYTES and size != offsets[1] - offsets[0]:
        return f"of {size} bytes has data_offsets {offsets}"
    return ""


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key is repeated")
    return values
