"""The decoder: a contiguous range of layers, and embedding and head where they are held.

A whole instance runs all layers with both; the leader of a pipeline holds both and the first
layers; any other stage takes hidden rows and returns hidden rows. Which is which follows from the
parts it is given, nothing else differs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kunserve.core.errors import AccountingError, KunserveError
from kunserve.core.layout import LayerRange, Part, PartKind
from kunserve.core.model import ModelSpec
from kunserve.device.kernels.base import (
    Kernels,
    LayerAddresses,
    LayerShape,
    PreparedBatch,
    PreparedLayer,
    RopeTable,
)
from kunserve.worker.slabs import part_format

FloatArray = NDArray[np.float32]


class StepCancelledError(KunserveError):
    """The step was cancelled between layers. Its KV writes are idempotent: run it again or not."""


@dataclass(frozen=True)
class DecoderMemory:
    """Addresses, fixed for the life of the process: the slab of each held part, and the KV range
    of each held layer (block b of layer l is at kv_bases[l] + b * block bytes)."""

    parts: Mapping[Part, int]
    kv_bases: Mapping[int, int]


class Decoder:
    """Runs `layers` of the model over weights and KVCache that lie at the addresses of `memory`.

    A new layout gets a new decoder from `for_layers`, which costs microseconds. It computes on the
    calling thread and is used by one thread at a time.

    Args:
        rope: positions 0..max_model_len - 1, from `build_rope_table`.
        block_size: tokens of a KV block.

    Raises:
        AccountingError: a part or a KV range of `layers` has no address.
    """

    def __init__(
        self,
        spec: ModelSpec,
        kernels: Kernels,
        memory: DecoderMemory,
        layers: LayerRange,
        rope: RopeTable,
        block_size: int,
    ) -> None:
        self.spec = spec
        self.block_size = block_size
        self._kernels = kernels
        self._memory = memory
        self._rope = rope
        # By layer; addresses never change, so every decoder made by `for_layers` shares them.
        self._prepared: dict[int, PreparedLayer] = {}
        self._select(layers)
        self.has_embedding = Part(PartKind.EMBEDDING) in memory.parts
        self._head_part = Part(PartKind.EMBEDDING if spec.tied_embeddings else PartKind.HEAD)
        self.has_head = self._head_part in memory.parts

    def for_layers(self, layers: LayerRange) -> Decoder:
        """A decoder of other `layers` on the same memory. This one stays as it is.

        Raises:
            AccountingError: a part or a KV range of `layers` has no address.
        """
        other = copy.copy(self)
        other._select(layers)
        return other

    def _select(self, layers: LayerRange) -> None:
        for layer in layers:
            if layer not in self._prepared:
                self._prepared[layer] = _prepare_layer(
                    self.spec, self._kernels, self._memory, layer, self._rope, self.block_size
                )
        self.layers = layers
        self._layers = tuple(self._prepared[layer] for layer in layers)

    @property
    def kv_bases(self) -> tuple[int, ...]:
        """Address of KV block 0 of each of `layers`, in order."""
        return tuple(self._memory.kv_bases[layer] for layer in self.layers)

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one KV block of one layer."""
        return layer_shape(self.spec, self.block_size).kv_block_bytes

    def embed(self, token_ids: NDArray[np.int32]) -> FloatArray:
        """Hidden rows [M, hidden_size] of `token_ids` [M].

        Raises:
            AccountingError: the embedding is not held here.
            KernelArgumentError: an id lies outside the vocabulary.
        """
        part = Part(PartKind.EMBEDDING)
        tied = self.spec.tied_embeddings
        table = self._address(part, "matrix" if tied else "rows")
        spec = self.spec
        hidden = np.empty((len(token_ids), spec.hidden_size), np.float32)
        gather = self._kernels.embed_packed if tied else self._kernels.embed_rows
        gather(table, spec.vocab_size, spec.hidden_size, token_ids, hidden)
        return hidden

    def run_layers(
        self, hidden: FloatArray, batch: PreparedBatch, cancelled: Callable[[], bool]
    ) -> None:
        """Run the layers in order on `hidden` [M, hidden_size], in place.

        `cancelled` is called before each layer, so that nothing waits longer than one layer.

        Raises:
            StepCancelledError: `cancelled` said so; `hidden` is then of no use.
        """
        for layer in self._layers:
            if cancelled():
                raise StepCancelledError("the step was cancelled between layers; schedule it again")
            self._kernels.forward_layer(layer, batch, hidden)

    def logits(self, hidden: FloatArray, rows: NDArray[np.int64]) -> FloatArray:
        """Final norm and head on the `rows` [R] of `hidden` [M, hidden_size].

        Returns float32 [R, vocab_size]; `hidden` stays as it is.

        Raises:
            AccountingError: the head is not held here.
        """
        spec = self.spec
        norm = self._address(self._head_part, "final_norm")
        matrix = self._address(self._head_part, "matrix")
        selected = hidden[rows]
        logits = np.empty((len(rows), spec.vocab_size), np.float32)
        if len(rows):
            self._kernels.rms_norm(selected, norm, spec.rms_norm_eps, selected)
            self._kernels.linear(selected, matrix, spec.vocab_size, spec.hidden_size, logits)
        return logits

    def _address(self, part: Part, field: str) -> int:
        slab = self._memory.parts.get(part)
        if slab is None:
            raise AccountingError(f"this stage does not hold the {part}")
        return slab + part_format(self.spec, part).offset_bytes(field)


def build_rope_table(spec: ModelSpec, max_positions: int) -> RopeTable:
    """Cosine and sine of positions 0..max_positions - 1, float32 [max_positions, head_dim / 2].

    Computed with torch in the steps of transformers' rotary embedding, so that the values are the
    same to the bit.
    """
    inverse = _inverse_frequencies(spec)
    positions = torch.arange(max_positions, dtype=torch.int64).float()
    angles = positions[:, None] * inverse
    return RopeTable(cos=angles.cos().numpy(), sin=angles.sin().numpy())


def _inverse_frequencies(spec: ModelSpec) -> torch.Tensor:
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    inverse: torch.Tensor = 1.0 / (spec.rope_theta**exponents)
    scaling = spec.rope_scaling
    if scaling.kind == "default":
        return inverse
    # "llama3": long wavelengths are stretched by `factor`, short ones stay, those between blend.
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_position
    wavelengths = 2 * math.pi / inverse
    stretched = torch.where(wavelengths > original / low, inverse / scaling.factor, inverse)
    smooth = (original / wavelengths - low) / (high - low)
    blended = (1 - smooth) * stretched / scaling.factor + smooth * stretched
    between = ~(wavelengths < original / high) & ~(wavelengths > original / low)
    return torch.where(between, blended, stretched)


def layer_shape(spec: ModelSpec, block_size: int) -> LayerShape:
    """The sizes of one layer as the kernels take them; `block_size` is tokens of a KV block."""
    return LayerShape(
        hidden_size=spec.hidden_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        intermediate_size=spec.intermediate_size,
        rms_norm_eps=spec.rms_norm_eps,
        block_size=block_size,
        qkv_bias=spec.qkv_bias,
    )


def _prepare_layer(
    spec: ModelSpec,
    kernels: Kernels,
    memory: DecoderMemory,
    layer: int,
    rope: RopeTable,
    block_size: int,
) -> PreparedLayer:
    part = Part(PartKind.LAYER, layer)
    slab, kv_base = memory.parts.get(part), memory.kv_bases.get(layer)
    if slab is None or kv_base is None:
        raise AccountingError(f"layer {layer} is to be computed but its memory is not here")
    at = {field.name: slab + field.offset_bytes for field in part_format(spec, part).fields}
    addresses = LayerAddresses(
        input_norm=at["input_norm"],
        qkv=at["qkv"],
        qkv_bias=at.get("qkv_bias", 0),
        o=at["o"],
        post_norm=at["post_norm"],
        gate_up=at["gate_up"],
        down=at["down"],
        kv_base=kv_base,
    )
    return kernels.prepare_layer(layer_shape(spec, block_size), addresses, rope)
