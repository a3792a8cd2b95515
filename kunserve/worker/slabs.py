"""The byte format of parts: what lies where in the slab that holds one part's weights.

A part (a layer, the embedding, the head) is one page-aligned run of plain bytes: float32 fields,
each on a cache line of its own. Nothing in it points anywhere, so that it moves between instances
like any page and its checksum means the same everywhere.

    layer       | input_norm | qkv | (qkv_bias) | o | post_norm | gate_up | down |
    embedding   | rows |                    the lookup table [vocab][hidden]
    head        | final_norm | matrix |     packed
    embedding   | final_norm | matrix |     tied: the packed matrix serves lookup and head

Matrices are packed (kernels.md, design section 3): panels of 24 rows, the last padded with zeros,
[ceil(rows / 24)][columns][24].
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kunserve.core.layout import Part, PartKind
from kunserve.core.model import FLOAT32_BYTES, ModelSpec

PACK_WIDTH = 24
FIELD_ALIGNMENT_BYTES = 64


class FieldKind(Enum):
    """How the values of a field lie."""

    ROWS = "rows"
    """Row-major [rows][columns]."""
    PACKED = "packed"
    """Panels [ceil(rows / 24)][columns][24]."""


@dataclass(frozen=True)
class Source:
    """A checkpoint's tensor that a field is made of, and the shape it must have there."""

    tensor: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Field:
    """One array of a slab, [rows][columns] float32; a vector is one row.

    `sources` follow each other: stacked by rows in a matrix, joined end to end in a vector.
    `offset_bytes` counts from the slab's start.
    """

    name: str
    kind: FieldKind
    rows: int
    columns: int
    sources: tuple[Source, ...]
    offset_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of the array, padding rows of the last panel included."""
        rows = self.rows if self.kind is FieldKind.ROWS else padded_rows(self.rows)
        return rows * self.columns * FLOAT32_BYTES


@dataclass(frozen=True)
class PartFormat:
    """All fields of one part, by rising offset, and the bytes of its slab.

    Bytes between fields (less than 64 each) are zero.
    """

    fields: tuple[Field, ...]
    nbytes: int

    def offset_bytes(self, name: str) -> int:
        """Where the field `name` begins. KeyError if the part has no such field."""
        for field in self.fields:
            if field.name == name:
                return field.offset_bytes
        raise KeyError(name)

    def has(self, name: str) -> bool:
        """True when the part has a field `name`."""
        return any(field.name == name for field in self.fields)


def padded_rows(rows: int) -> int:
    """Rows of a packed matrix once its last panel is full."""
    return -(-rows // PACK_WIDTH) * PACK_WIDTH


def part_format(spec: ModelSpec, part: Part) -> PartFormat:
    """The format of `part` in a model of shape `spec`: pure arithmetic, the same on every instance.

    Raises:
        KeyError: the model has no such part.
    """
    if part not in spec.parts:
        raise KeyError(f"a model of {spec.num_layers} layers has no part {part}")
    builder = _Builder()
    if part.kind is PartKind.LAYER:
        _layer(builder, spec, f"model.layers.{part.index}.")
    elif part.kind is PartKind.HEAD:
        _matrix_with_norm(builder, spec, "lm_head.weight")
    elif spec.tied_embeddings:
        _matrix_with_norm(builder, spec, _EMBEDDING)
    else:
        shape = (spec.vocab_size, spec.hidden_size)
        builder.add("rows", FieldKind.ROWS, Source(_EMBEDDING, shape))
    return builder.build()


_EMBEDDING = "model.embed_tokens.weight"


class _Builder:
    """Places fields one after the other, each on its own cache line."""

    def __init__(self) -> None:
        self._fields: list[Field] = []
        self._end = 0

    def vector(self, name: str, *sources: Source) -> None:
        columns = sum(source.shape[0] for source in sources)
        self._place(Field(name, FieldKind.ROWS, 1, columns, sources, self._end))

    def add(self, name: str, kind: FieldKind, *sources: Source) -> None:
        rows = sum(source.shape[0] for source in sources)
        self._place(Field(name, kind, rows, sources[0].shape[1], sources, self._end))

    def build(self) -> PartFormat:
        return PartFormat(tuple(self._fields), self._end)

    def _place(self, field: Field) -> None:
        self._fields.append(field)
        end = field.offset_bytes + field.nbytes
        self._end = -(-end // FIELD_ALIGNMENT_BYTES) * FIELD_ALIGNMENT_BYTES


def _layer(builder: _Builder, spec: ModelSpec, prefix: str) -> None:
    hidden, intermediate = spec.hidden_size, spec.intermediate_size
    q_size = spec.num_heads * spec.head_dim
    kv_size = spec.num_kv_heads * spec.head_dim
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    qkv = (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size))

    builder.vector("input_norm", Source(f"{prefix}input_layernorm.weight", (hidden,)))
    builder.add(
        "qkv",
        FieldKind.PACKED,
        *(Source(f"{attention}{name}.weight", (rows, hidden)) for name, rows in qkv),
    )
    if spec.qkv_bias:
        biases = (Source(f"{attention}{name}.bias", (rows,)) for name, rows in qkv)
        builder.vector("qkv_bias", *biases)
    builder.add("o", FieldKind.PACKED, Source(f"{attention}o_proj.weight", (hidden, q_size)))
    builder.vector("post_norm", Source(f"{prefix}post_attention_layernorm.weight", (hidden,)))
    builder.add(
        "gate_up",
        FieldKind.PACKED,
        Source(f"{mlp}gate_proj.weight", (intermediate, hidden)),
        Source(f"{mlp}up_proj.weight", (intermediate, hidden)),
    )
    builder.add("down", FieldKind.PACKED, Source(f"{mlp}down_proj.weight", (hidden, intermediate)))


def _matrix_with_norm(builder: _Builder, spec: ModelSpec, tensor: str) -> None:
    builder.vector("final_norm", Source("model.norm.weight", (spec.hidden_size,)))
    shape = (spec.vocab_size, spec.hidden_size)
    builder.add("matrix", FieldKind.PACKED, Source(tensor, shape))
