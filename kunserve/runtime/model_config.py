"""A Hugging Face model directory's config.json, read as plain JSON into a `ModelSpec`.

Nothing is guessed: an option that would change the arithmetic and is not implemented is refused
by name, and the defaults for absent fields are those of the transformers classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kunserve.core.errors import ModelLoadError, ModelNotSupportedError
from kunserve.core.model import ModelSpec, RopeScaling

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
# What the kernels take (see kunserve/device/kernels/base.py, LayerShape).
HEAD_DIM_MULTIPLE = 8
MAX_HEAD_DIM = 256
MAX_HEADS_PER_KV_HEAD = 16
DEFAULT_ROPE_THETA = 10000.0


@dataclass(frozen=True)
class _Architecture:
    """What one transformers class fixes in code rather than in config.json.

    `sliding_window_default` is the window of a config without the field; `reads_attention_bias`
    is False where the class ignores `attention_bias`.
    """

    qkv_bias: bool = False
    reads_attention_bias: bool = True
    sliding_window_default: int | None = None
    sliding_window_switch: str | None = None
    kv_heads_default_to_heads: bool = False


_ARCHITECTURES = {
    "LlamaForCausalLM": _Architecture(kv_heads_default_to_heads=True),
    "MistralForCausalLM": _Architecture(sliding_window_default=4096),
    "Qwen2ForCausalLM": _Architecture(
        qkv_bias=True,
        reads_attention_bias=False,
        sliding_window_default=4096,
        sliding_window_switch="use_sliding_window",
    ),
}

SUPPORTED = (
    "kunserve runs LlamaForCausalLM, MistralForCausalLM and Qwen2ForCausalLM: silu activation, "
    "full attention (no sliding window shorter than the context), rope of type default or llama3, "
    f"head_dim a multiple of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}, at most "
    f"{MAX_HEADS_PER_KV_HEAD} heads per KV head, no quantization, no remote code, and no biases "
    "but Qwen2's own on q, k and v"
)


def load_model_spec(directory: Path) -> ModelSpec:
    """Read `directory`/config.json, and the end-of-sequence ids of generation_config.json.

    Both forms are read: `rope_theta` with `rope_scaling`, and transformers 5's `rope_parameters`.
    As in transformers, end-of-sequence ids of generation_config.json go before those of the config.

    Raises:
        ModelNotSupportedError: a valid config of something that is not implemented; the message
            lists what is.
        ModelLoadError: the file is missing or no JSON object, or a field is missing or nonsense;
            the message names file and field.
    """
    config = _Fields.read(directory / CONFIG_FILE)
    name = _architecture_name(config)
    architecture = _ARCHITECTURES[name]
    _check_options(config, architecture)
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = _num_kv_heads(config, architecture, num_heads)
    vocab_size = config.integer("vocab_size")
    max_position = config.integer("max_position_embeddings")
    _check_full_attention(config, architecture, max_position)
    rope_theta, rope_scaling = _rope(config, max_position)
    return ModelSpec(
        architecture=name,
        num_layers=config.integer("num_hidden_layers"),
        hidden_size=config.integer("hidden_size"),
        intermediate_size=config.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(config, num_heads),
        vocab_size=vocab_size,
        rms_norm_eps=config.number("rms_norm_eps"),
        rope_theta=rope_theta,
        max_position=max_position,
        tied_embeddings=config.flag("tie_word_embeddings"),
        qkv_bias=architecture.qkv_bias,
        rope_scaling=rope_scaling,
        eos_token_ids=_eos_token_ids(directory, config, vocab_size),
        bos_token_id=config.token_id("bos_token_id", vocab_size),
    )


def _unsupported(path: Path, found: str) -> ModelNotSupportedError:
    """The error for an option that is not implemented, with the list of what is."""
    return ModelNotSupportedError(f"{path}: {found} is not supported. {SUPPORTED}")


class _Fields:
    """Typed reads of one JSON object; every error names the file and the field."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.path = path
        self.values = values
        self._prefix = prefix

    @classmethod
    def read(cls, path: Path) -> _Fields:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ModelLoadError(
                f"{path} cannot be read ({error.strerror}): give a Hugging Face model directory"
            ) from error
        except ValueError as error:
            raise ModelLoadError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ModelLoadError(f"{path} holds no JSON object, found {type(values).__name__}")
        return cls(path, values)

    def inside(self, name: str) -> _Fields | None:
        """The nested object `name`, or None when it is absent, null or empty."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return _Fields(self.path, value, f"{self._prefix}{name}.") if value else None

    def has(self, name: str) -> bool:
        """True when the field is there and not null."""
        return self.values.get(name) is not None

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self._get(name, default)
        if type(value) is not int or value < 1:
            raise self.wrong(name, "a whole number of at least 1")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._get(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.wrong(name, "a finite number above 0")
        return float(value)

    def flag(self, name: str) -> bool:
        """true or false; absent and null are false, as in the transformers classes."""
        value = self.values.get(name)
        if value is not None and type(value) is not bool:
            raise self.wrong(name, "true or false")
        return bool(value)

    def token_id(self, name: str, vocab_size: int) -> int | None:
        """A token id below `vocab_size`, or None when absent or null."""
        value = self.values.get(name)
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < vocab_size:
            raise self.wrong(name, f"a token id below the vocab_size {vocab_size}")
        return value

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """One token id or a list of them, without repetition; () when absent or null."""
        value = self.values.get(name)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        for item in listed:
            if type(item) is not int or not 0 <= item < vocab_size:
                raise self.wrong(name, f"token ids below the vocab_size {vocab_size}")
        return tuple(dict.fromkeys(listed))

    def wrong(self, name: str, expected: str) -> ModelLoadError:
        """The error for a field of a wrong value."""
        found = json.dumps(self.values.get(name))
        return ModelLoadError(
            f"{self.path}: field {self._prefix}{name} must be {expected}, found {found[:80]}"
        )

    def _get(self, name: str, default: float | None) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is None:
            raise ModelLoadError(f"{self.path}: field {self._prefix}{name} is missing")
        return default


def _architecture_name(config: _Fields) -> str:
    names = config.values.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise config.wrong("architectures", "a list of class names")
    # Only what was trained as one of these classes computes what this decoder computes.
    if len(names) != 1 or names[0] not in _ARCHITECTURES:
        raise _unsupported(config.path, f"architecture {', '.join(names)}")
    return str(names[0])


def _check_options(config: _Fields, architecture: _Architecture) -> None:
    if config.has("auto_map"):
        raise _unsupported(config.path, "auto_map (remote code)")
    if config.has("quantization_config"):
        raise _unsupported(config.path, "quantization_config (a quantized checkpoint)")
    if config.flag("attention_bias") and architecture.reads_attention_bias:
        raise _unsupported(config.path, "attention_bias true")
    if config.flag("mlp_bias"):
        raise _unsupported(config.path, "mlp_bias true")
    activation = config.values.get("hidden_act", "silu")
    if activation != "silu":
        raise _unsupported(config.path, f"hidden_act {activation!r}")


def _check_full_attention(config: _Fields, architecture: _Architecture, max_position: int) -> None:
    """Refuse sliding windows. One that is never shorter than the context changes nothing."""
    layer_types = config.values.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types)
    ):
        raise _unsupported(config.path, "layer_types other than full_attention")
    switch = architecture.sliding_window_switch
    if architecture.sliding_window_default is None or (switch and not config.flag(switch)):
        return
    if "sliding_window" in config.values and not config.has("sliding_window"):
        return
    window = config.integer("sliding_window", architecture.sliding_window_default)
    if window < max_position:
        raise _unsupported(
            config.path,
            f"sliding_window {window} (shorter than max_position_embeddings {max_position})",
        )


def _num_kv_heads(config: _Fields, architecture: _Architecture, num_heads: int) -> int:
    # An explicit null means "as many as heads" in all three classes; absence does so in Llama only.
    stated = "num_key_value_heads" in config.values
    if config.has("num_key_value_heads") or not (stated or architecture.kv_heads_default_to_heads):
        num_kv_heads = config.integer("num_key_value_heads")
    else:
        num_kv_heads = num_heads
    if num_heads % num_kv_heads:
        raise config.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    if num_heads // num_kv_heads > MAX_HEADS_PER_KV_HEAD:
        raise _unsupported(config.path, f"{num_heads} heads on {num_kv_heads} KV heads")
    return num_kv_heads


def _head_dim(config: _Fields, num_heads: int) -> int:
    if config.has("head_dim"):
        head_dim = config.integer("head_dim")
    else:
        hidden_size = config.integer("hidden_size")
        if hidden_size % num_heads:
            raise config.wrong("hidden_size", f"a multiple of num_attention_heads ({num_heads})")
        head_dim = hidden_size // num_heads
    if head_dim % HEAD_DIM_MULTIPLE or head_dim > MAX_HEAD_DIM:
        raise _unsupported(config.path, f"head_dim {head_dim}")
    return head_dim


def _rope(config: _Fields, max_position: int) -> tuple[float, RopeScaling]:
    """The base and the scaling, from whichever of the two forms the config has."""
    top_theta = config.number("rope_theta", DEFAULT_ROPE_THETA)
    fields = config.inside("rope_parameters") or config.inside("rope_scaling")
    if config.values.get("partial_rotary_factor", 1.0) not in (None, 1):
        raise _unsupported(config.path, "partial_rotary_factor other than 1")
    if fields is None:
        return top_theta, RopeScaling()
    if all(isinstance(value, dict) for value in fields.values.values()):
        raise _unsupported(config.path, "rope_parameters by layer type")
    if fields.values.get("partial_rotary_factor", 1.0) not in (None, 1):
        raise _unsupported(config.path, "partial_rotary_factor other than 1")
    theta = fields.number("rope_theta", top_theta)
    kind = fields.values.get("rope_type", fields.values.get("type", "default"))
    if kind == "default":
        return theta, RopeScaling()
    if kind != "llama3":
        raise _unsupported(config.path, f"rope of type {kind!r}")
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if high <= low:
        raise fields.wrong("high_freq_factor", f"above low_freq_factor ({low})")
    scaling = RopeScaling(
        kind="llama3",
        factor=fields.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=fields.integer("original_max_position_embeddings", max_position),
    )
    return theta, scaling


def _eos_token_ids(directory: Path, config: _Fields, vocab_size: int) -> tuple[int, ...]:
    path = directory / GENERATION_CONFIG_FILE
    if path.exists():
        generation = _Fields.read(path).token_ids("eos_token_id", vocab_size)
        if generation:
            return generation
    return config.token_ids("eos_token_id", vocab_size)
