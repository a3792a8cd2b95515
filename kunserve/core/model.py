"""What the decision code and the executor know of a model: numbers, no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from kunserve.core.layout import Part, PartKind

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class RopeScaling:
    """Rotary embedding parameters. `kind` is "default" or "llama3" (frequency-dependent)."""

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0


@dataclass(frozen=True)
class ModelSpec:
    """Shape of a Llama-like decoder: RMSNorm, rotary positions, grouped attention, gated MLP."""

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position: int
    tied_embeddings: bool
    qkv_bias: bool = False
    rope_scaling: RopeScaling = RopeScaling()
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @property
    def qkv_size(self) -> int:
        """Rows of the fused q, k, v projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def kv_bytes_per_token_layer(self) -> int:
        """Bytes of K and V of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * FLOAT32_BYTES

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts: embedding, layers in order, and the head unless it is tied."""
        layers = tuple(Part(PartKind.LAYER, index) for index in range(self.num_layers))
        head = () if self.tied_embeddings else (Part(PartKind.HEAD),)
        return (Part(PartKind.EMBEDDING), *layers, *head)
