"""What an instance is told, and the arithmetic that follows. No torch here: the front uses it."""

from __future__ import annotations

from dataclasses import dataclass

from kunserve.core.errors import ConfigError
from kunserve.core.model import ModelSpec
from kunserve.policy.pages import MemoryPlan, PageGeometry, plan_memory
from kunserve.worker.slabs import part_format


@dataclass(frozen=True)
class EngineSettings:
    """What an instance computes with. Sizes in bytes; exactly one of the two memory sizes is set.

    `num_slots` and `slot` place it in its partner domain (design section 3).
    """

    model_directory: str
    spec: ModelSpec
    threads: int
    block_size: int
    max_model_len: int
    kv_cache_memory_bytes: int | None = None
    memory_bytes: int | None = None
    num_slots: int = 1
    slot: int = 0
    poison: bool = False


def plan_instance_memory(
    spec: ModelSpec,
    block_size: int,
    kv_cache_memory_bytes: int | None,
    memory_bytes: int | None,
) -> MemoryPlan:
    """How the memory of a whole instance is split. Pure arithmetic: the front uses it as well.

    Raises:
        ConfigError: the memory is too small; the message says what is needed.
    """
    geometry = PageGeometry.fit(block_size * spec.kv_bytes_per_token_layer)
    part_bytes = {part: part_format(spec, part).nbytes for part in spec.parts}
    return plan_memory(
        spec,
        part_bytes,
        spec.parts,
        geometry,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        memory_bytes=memory_bytes,
    )


def resolve_max_model_len(
    spec: ModelSpec, plan: MemoryPlan, block_size: int, wanted: int | None
) -> int:
    """Most tokens of a request: `wanted`, or as many as the model and the KVCache allow.

    Raises:
        ConfigError: `wanted` is more than the model's context or than the KVCache holds.
    """
    kv_tokens = plan.kv_blocks * block_size
    if wanted is None:
        return min(spec.max_position, kv_tokens)
    if wanted > spec.max_position:
        raise ConfigError(
            f"--max-model-len {wanted} is more than the model's context of {spec.max_position}"
        )
    if wanted > kv_tokens:
        raise ConfigError(
            f"--max-model-len {wanted} is more than the {kv_tokens} tokens that the KVCache of an "
            "instance holds; lower it or raise --kv-cache-memory-bytes"
        )
    return wanted
