"""From checkpoint files to slabs: the bytes, and every way in which a file can be wrong."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from kunserve.core.errors import AccountingError, ModelLoadError
from kunserve.core.layout import Part, PartKind
from kunserve.core.model import ModelSpec
from kunserve.device.kernels import Kernels, create_kernels
from kunserve.runtime.model_config import load_model_spec
from kunserve.worker.slabs import (
    FIELD_ALIGNMENT_BYTES,
    PACK_WIDTH,
    FieldKind,
    PartFormat,
    part_format,
)
from kunserve.worker.weights import (
    CheckpointReader,
    check_checkpoint,
    load_part,
    part_checksum,
)
from tests.support.models import ARCHITECTURES, build_tiny_model

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@pytest.fixture(scope="module")
def kernels() -> Iterator[Kernels]:
    kernels = create_kernels("cpu", 1)
    yield kernels
    kernels.close()


def reference_pack(weight: Floats) -> Floats:
    """[n, k] -> [ceil(n / 24), k, 24], the last panel padded with zeros, in plain numpy."""
    n, k = weight.shape
    padded = np.zeros((-(-n // PACK_WIDTH) * PACK_WIDTH, k), np.float32)
    padded[:n] = weight
    return np.ascontiguousarray(padded.reshape(-1, PACK_WIDTH, k).swapaxes(1, 2))


def reference_slab(layout: PartFormat, tensors: dict[str, Floats]) -> Bytes:
    slab = np.zeros(layout.nbytes, np.uint8)
    for field in layout.fields:
        values = np.concatenate([tensors[source.tensor] for source in field.sources])
        stored = reference_pack(values) if field.kind is FieldKind.PACKED else values
        raw = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
        slab[field.offset_bytes : field.offset_bytes + len(raw)] = raw
    return slab


def tensors_of(model: PreTrainedModel) -> dict[str, Floats]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


def load(directory: Path, spec: ModelSpec, part: Part, kernels: Kernels, fill: int = 0xFF) -> Bytes:
    """The loaded slab, after checking that nothing beyond it was written."""
    nbytes = part_format(spec, part).nbytes
    memory = np.full(nbytes + 2 * FIELD_ALIGNMENT_BYTES, fill, np.uint8)
    start = -memory.ctypes.data % FIELD_ALIGNMENT_BYTES
    with CheckpointReader(directory) as reader:
        load_part(reader, spec, part, memory.ctypes.data + start, kernels)
    assert (memory[:start] == fill).all()
    assert (memory[start + nbytes :] == fill).all()
    return memory[start : start + nbytes]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_slabs_hold_the_checkpoint(architecture: str, tmp_path: Path, kernels: Kernels) -> None:
    tensors = tensors_of(build_tiny_model(tmp_path, architecture, seed=11))
    spec = load_model_spec(tmp_path)
    for part in spec.parts:
        expected = reference_slab(part_format(spec, part), tensors)
        np.testing.assert_array_equal(load(tmp_path, spec, part, kernels), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_checkpoints_become_float32_exactly(
    dtype: torch.dtype, tmp_path: Path, kernels: Kernels
) -> None:
    tensors = tensors_of(build_tiny_model(tmp_path, "qwen2", seed=12, dtype=dtype))
    spec = load_model_spec(tmp_path)
    with CheckpointReader(tmp_path) as reader:
        stored = {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
        assert {entry.dtype for entry in reader.tensors.values()} == {stored}
    for part in spec.parts:
        expected = reference_slab(part_format(spec, part), tensors)
        np.testing.assert_array_equal(load(tmp_path, spec, part, kernels), expected)


def test_shards_are_one_checkpoint(tmp_path: Path, kernels: Kernels) -> None:
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    build_tiny_model(single, "llama", seed=13)
    build_tiny_model(sharded, "llama", seed=13, max_shard_size="400KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    spec = load_model_spec(sharded)
    for part in spec.parts:
        expected = load(single, spec, part, kernels)
        np.testing.assert_array_equal(load(sharded, spec, part, kernels), expected)


def test_slices_of_a_large_matrix_join(
    tmp_path: Path, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = tensors_of(build_tiny_model(tmp_path, "qwen2", seed=14))
    spec = load_model_spec(tmp_path)
    # One panel at a time: the seams of q, k and v (112, 16, 16 rows) fall inside panels.
    monkeypatch.setattr("kunserve.worker.weights.READ_BYTES", 1000)
    for part in spec.parts:
        expected = reference_slab(part_format(spec, part), tensors)
        np.testing.assert_array_equal(load(tmp_path, spec, part, kernels), expected)


def test_little_memory_beside_the_slab(tmp_path: Path, kernels: Kernels) -> None:
    build_tiny_model(tmp_path, "llama3", 15, vocab_size=20000, num_hidden_layers=1, hidden_size=448)
    spec = load_model_spec(tmp_path)
    part = Part(PartKind.EMBEDDING)
    slab = np.empty(part_format(spec, part).nbytes + FIELD_ALIGNMENT_BYTES, np.uint8)
    address = slab.ctypes.data + -slab.ctypes.data % FIELD_ALIGNMENT_BYTES
    with CheckpointReader(tmp_path) as reader:
        tracemalloc.start()
        load_part(reader, spec, part, address, kernels)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert slab.nbytes > 32 << 20
    assert peak_bytes < 17 << 20


def test_checksum_depends_on_the_part_alone(tmp_path: Path, kernels: Kernels) -> None:
    build_tiny_model(tmp_path, "qwen2", seed=16)
    spec = load_model_spec(tmp_path)
    checksums = []
    for part in spec.parts:
        first, second = (load(tmp_path, spec, part, kernels, fill) for fill in (0xFF, 0x3C))
        checksum = part_checksum(first.ctypes.data, first.nbytes)
        assert part_checksum(second.ctypes.data, second.nbytes) == checksum
        second[second.nbytes // 2] ^= 1
        assert part_checksum(second.ctypes.data, second.nbytes) != checksum
        checksums.append(checksum)
    assert len(set(checksums)) == len(checksums)


def test_unaligned_slab_is_refused(tmp_path: Path, kernels: Kernels) -> None:
    build_tiny_model(tmp_path, "llama", seed=17)
    with (
        CheckpointReader(tmp_path) as reader,
        pytest.raises(AccountingError, match="not 64-byte aligned"),
    ):
        load_part(reader, load_model_spec(tmp_path), Part(PartKind.HEAD), 4100, kernels)


# ---------------------------------------------------------------- the format


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fields_are_aligned_and_apart(architecture: str, tmp_path: Path) -> None:
    build_tiny_model(tmp_path, architecture, seed=18)
    spec = load_model_spec(tmp_path)
    for part in spec.parts:
        layout = part_format(spec, part)
        end_bytes = 0
        for field in layout.fields:
            assert field.offset_bytes % FIELD_ALIGNMENT_BYTES == 0
            assert 0 <= field.offset_bytes - end_bytes < FIELD_ALIGNMENT_BYTES
            assert layout.offset_bytes(field.name) == field.offset_bytes
            end_bytes = field.offset_bytes + field.nbytes
        assert 0 <= layout.nbytes - end_bytes < FIELD_ALIGNMENT_BYTES


def test_sizes_of_smollm2() -> None:
    spec = ModelSpec(
        architecture="LlamaForCausalLM",
        num_layers=30,
        hidden_size=576,
        intermediate_size=1536,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        max_position=8192,
        tied_embeddings=True,
    )
    layer = part_format(spec, Part(PartKind.LAYER, 29))
    assert [field.name for field in layer.fields] == [
        "input_norm",
        "qkv",
        "o",
        "post_norm",
        "gate_up",
        "down",
    ]
    weights = 960 * 576 + 576 * 576 + 3 * 1536 * 576 + 2 * 576
    assert layer.nbytes == 4 * weights  # design section 3: 13.5 MiB a layer
    embedding = part_format(spec, Part(PartKind.EMBEDDING))
    assert embedding.nbytes == 4 * (49152 + 1) * 576
    with pytest.raises(KeyError, match="no part layer 30"):
        part_format(spec, Part(PartKind.LAYER, 30))
    with pytest.raises(KeyError, match="no part head"):
        part_format(spec, Part(PartKind.HEAD))


# ---------------------------------------------------------------- wrong files

HEADER = 8


def rewrite_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Damage of a file whose header is changed and written back with the right length."""

    def damage(file: Path) -> None:
        raw = file.read_bytes()
        length = int.from_bytes(raw[:HEADER], "little")
        header = json.loads(raw[HEADER : HEADER + length])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + raw[HEADER + length :])

    return damage


def rewrite_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        file.write_bytes(change(file.read_bytes()))

    return damage


NORM = "model.norm.weight"

DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (rewrite_bytes(lambda raw: b""), "is truncated: it has 0 bytes"),
    "cut in the header": (rewrite_bytes(lambda raw: raw[:100]), "is truncated or no safetensors"),
    "cut in the data": (rewrite_bytes(lambda raw: raw[:-1]), "is truncated: its tensors end"),
    "longer": (rewrite_bytes(lambda raw: raw + b"x"), "is corrupt: its tensors end"),
    "huge header": (rewrite_bytes(lambda raw: b"\xff" * 8 + raw[8:]), "truncated or no safeten"),
    "no JSON": (rewrite_bytes(lambda raw: raw[:8] + b"[" + raw[9:]), "not valid JSON"),
    "no UTF-8": (rewrite_bytes(lambda raw: raw[:9] + b"\xff" + raw[10:]), "not valid JSON"),
    "a list": (rewrite_bytes(lambda raw: (2).to_bytes(8, "little") + b"[]"), "no JSON object"),
    "repeated": (
        rewrite_bytes(lambda raw: (17).to_bytes(8, "little") + b'{"a": {},"a": {}}'),
        "a key is repeated",
    ),
    "no header": (rewrite_bytes(lambda raw: bytes(8)), "not valid JSON"),
    "overlap": (
        rewrite_header(lambda header: header[NORM].update(data_offsets=[0, 448])),
        "leave a gap or overlap",
    ),
    "beyond the end": (
        rewrite_header(lambda header: header[NORM].update(data_offsets=[1 << 50, 448 + (1 << 50)])),
        "leave a gap or overlap",
    ),
    "backwards": (
        rewrite_header(lambda header: header[NORM].update(data_offsets=[448, 0])),
        f"tensor {NORM} has no valid data_offsets",
    ),
    "negative size": (
        rewrite_header(lambda header: header[NORM].update(shape=[-1, 112])),
        f"tensor {NORM} has no valid shape",
    ),
    "size and shape differ": (
        rewrite_header(lambda header: header[NORM].update(shape=[113])),
        f"tensor {NORM} of 452 bytes has data_offsets",
    ),
    "dtype missing": (
        rewrite_header(lambda header: header[NORM].pop("dtype")),
        f"tensor {NORM} has no dtype",
    ),
    "entry no object": (
        rewrite_header(lambda header: header.update({NORM: 7})),
        f"tensor {NORM} has no JSON object",
    ),
    "missing file": (lambda file: file.unlink(), "cannot be opened"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    build_tiny_model(tmp_path, "llama", seed=19, num_hidden_layers=1)
    damage, message = DAMAGES[name]
    damage(tmp_path / "model.safetensors")
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ModelLoadError, match=message) as caught:
        CheckpointReader(tmp_path)
    assert "model.safetensors" in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def change_tensor(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return damage


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (
        change_tensor(lambda t: t.pop("model.layers.0.mlp.up_proj.weight")),
        "lacks the tensor model.layers.0.mlp.up_proj.weight",
    ),
    "shape": (
        change_tensor(lambda t: t.update({NORM: torch.ones(113)})),
        r"tensor model.norm.weight has the shape \[113\], by config.json it is \[112\]",
    ),
    "dtype": (
        change_tensor(lambda t: t.update({NORM: t[NORM].double()})),
        "tensor model.norm.weight is F64, only F32, F16, BF16",
    ),
    "quantized": (
        change_tensor(lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)})),
        "tensor model.norm.weight is F8_E4M3",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_checkpoint_that_does_not_fit_its_config(name: str, tmp_path: Path) -> None:
    build_tiny_model(tmp_path, "llama", seed=20, num_hidden_layers=1)
    spec = load_model_spec(tmp_path)
    with CheckpointReader(tmp_path) as reader:
        check_checkpoint(reader, spec)
    damage, message = CHANGES[name]
    damage(tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader, pytest.raises(ModelLoadError, match=message):
        check_checkpoint(reader, spec)


def test_file_that_gets_shorter_while_it_is_read(tmp_path: Path) -> None:
    build_tiny_model(tmp_path, "llama", seed=21)
    spec = load_model_spec(tmp_path)
    file = tmp_path / "model.safetensors"
    norm = np.empty(spec.hidden_size, np.float32)
    with CheckpointReader(tmp_path) as reader:
        os.truncate(file, reader.tensors[NORM].offset_bytes + norm.nbytes // 2)
        with pytest.raises(ModelLoadError, match="got shorter while it was read"):
            reader.read_into(NORM, norm.shape, 0, norm)


INDEX_DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "outside": (
        lambda index: index["weight_map"].update({NORM: "../secret.safetensors"}),
        "must give a file name by tensor",
    ),
    "another shard": (
        lambda index: index["weight_map"].update({"nowhere": index["weight_map"][NORM]}),
        "does not hold nowhere",
    ),
    "absent shard": (
        lambda index: index["weight_map"].update({NORM: "model-9.safetensors"}),
        "model-9.safetensors cannot be opened",
    ),
    "no map": (lambda index: index.pop("weight_map"), "no weight_map"),
}


@pytest.mark.parametrize("name", INDEX_DAMAGES)
def test_damaged_index(name: str, tmp_path: Path) -> None:
    build_tiny_model(tmp_path, "llama", seed=22, max_shard_size="400KB")
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change, message = INDEX_DAMAGES[name]
    change(index)
    file.write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match=message):
        CheckpointReader(tmp_path)
