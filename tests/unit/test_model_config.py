"""config.json to ModelSpec: both forms, and every option that has to be refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kunserve.core.errors import ModelLoadError, ModelNotSupportedError
from kunserve.core.model import ModelSpec, RopeScaling
from kunserve.runtime.model_config import load_model_spec

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}

LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 4096,
}

ABSENT = object()


def read(directory: Path, /, base: dict[str, Any] = LLAMA, **changes: object) -> ModelSpec:
    config = {key: value for key, value in (base | changes).items() if value is not ABSENT}
    (directory / "config.json").write_text(json.dumps(config))
    return load_model_spec(directory)


def test_llama_in_the_old_form(tmp_path: Path) -> None:
    assert read(tmp_path) == ModelSpec(
        architecture="LlamaForCausalLM",
        num_layers=30,
        hidden_size=576,
        intermediate_size=1536,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        max_position=8192,
        tied_embeddings=True,
        eos_token_ids=(2,),
        bos_token_id=1,
    )


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_both_forms_of_rope_say_the_same(kind: str, tmp_path: Path) -> None:
    scaling = LLAMA3_SCALING | {kind: "llama3"}
    old = read(tmp_path, rope_theta=500000.0, rope_scaling=scaling)
    parameters = scaling | {"rope_theta": 500000.0}
    new = read(tmp_path, rope_theta=ABSENT, rope_scaling=ABSENT, rope_parameters=parameters)
    assert old == new
    assert new.rope_theta == 500000.0
    assert new.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 4096)


def test_rope_by_default(tmp_path: Path) -> None:
    absent = read(tmp_path, rope_theta=ABSENT, rope_scaling=ABSENT)
    assert (absent.rope_theta, absent.rope_scaling) == (10000.0, RopeScaling())
    stated = {"rope_type": "default", "rope_theta": 1e6}
    assert read(tmp_path, rope_theta=ABSENT, rope_parameters=stated).rope_theta == 1e6
    del (scaling := LLAMA3_SCALING | {"type": "llama3"})["original_max_position_embeddings"]
    assert read(tmp_path, rope_scaling=scaling).rope_scaling.original_max_position == 8192


def test_mistral_and_qwen2(tmp_path: Path) -> None:
    mistral = read(
        tmp_path, architectures=["MistralForCausalLM"], sliding_window=None, head_dim=128
    )
    assert (mistral.head_dim, mistral.qkv_bias) == (128, False)
    qwen2 = read(
        tmp_path,
        architectures=["Qwen2ForCausalLM"],
        use_sliding_window=False,
        sliding_window=4096,
        max_window_layers=21,
        layer_types=["full_attention"] * 30,
    )
    assert qwen2.qkv_bias


def test_sliding_window_that_is_never_shorter_than_the_context(tmp_path: Path) -> None:
    for name in ("MistralForCausalLM", "Qwen2ForCausalLM"):
        spec = read(tmp_path, architectures=[name], use_sliding_window=True, sliding_window=8192)
        assert spec.max_position == 8192


def test_kv_heads_by_default(tmp_path: Path) -> None:
    assert read(tmp_path, num_key_value_heads=ABSENT).num_kv_heads == 9
    qwen2: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"]}
    assert read(tmp_path, **qwen2, num_key_value_heads=None).num_kv_heads == 9
    # The class default is a number there, which is never what a checkpoint means.
    with pytest.raises(ModelLoadError, match="num_key_value_heads is missing"):
        read(tmp_path, **qwen2, num_key_value_heads=ABSENT)


def test_end_of_sequence_ids(tmp_path: Path) -> None:
    assert read(tmp_path, eos_token_id=[7, 8, 7]).eos_token_ids == (7, 8)
    assert read(tmp_path, eos_token_id=None).eos_token_ids == ()
    generation = tmp_path / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [128001, 9]}))
    with pytest.raises(ModelLoadError, match=r"generation_config.json: field eos_token_id"):
        read(tmp_path)
    generation.write_text(json.dumps({"eos_token_id": [5, 9]}))
    assert read(tmp_path).eos_token_ids == (5, 9)
    generation.write_text(json.dumps({"temperature": 0.6}))
    assert read(tmp_path).eos_token_ids == (2,)


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "architecture GPT2LMHeadModel": {"architectures": ["GPT2LMHeadModel"]},
    "architecture MixtralForCausalLM": {"architectures": ["MixtralForCausalLM"]},
    "auto_map": {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}},
    "quantization_config": {"quantization_config": {"quant_method": "gptq"}},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "hidden_act 'gelu'": {"hidden_act": "gelu"},
    "rope of type 'yarn'": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "rope of type 'linear'": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "rope_parameters by layer type": {
        "rope_parameters": {"full_attention": {"rope_type": "default"}}
    },
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "head_dim 20": {"head_dim": 20},
    "head_dim 264": {"head_dim": 264},
    "32 heads on 1 KV heads": {"num_attention_heads": 32, "num_key_value_heads": 1},
    "layer_types": {"layer_types": ["sliding_attention"] * 30},
    "sliding_window 4096": {"architectures": ["MistralForCausalLM"]},
    "sliding_window 1024": {
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": True,
        "sliding_window": 1024,
    },
}


@pytest.mark.parametrize("found", UNSUPPORTED)
def test_what_is_not_implemented_is_refused_by_name(found: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotSupportedError) as caught:
        read(tmp_path, **UNSUPPORTED[found])
    message = str(caught.value)
    assert found in message
    assert "config.json" in message
    assert "LlamaForCausalLM, MistralForCausalLM and Qwen2ForCausalLM" in message


NONSENSE: dict[str, dict[str, Any]] = {
    "hidden_size is missing": {"hidden_size": ABSENT},
    "vocab_size is missing": {"vocab_size": None},
    "architectures must be": {"architectures": ABSENT},
    "num_hidden_layers must be": {"num_hidden_layers": 0},
    "num_attention_heads must be": {"num_attention_heads": "9"},
    "intermediate_size must be": {"intermediate_size": True},
    "max_position_embeddings must be": {"max_position_embeddings": 2048.0},
    "rms_norm_eps must be": {"rms_norm_eps": -1e-5},
    "rope_theta must be": {"rope_theta": "1e4"},
    "hidden_size must be a multiple": {"hidden_size": 577},
    "num_key_value_heads must be a divisor": {"num_key_value_heads": 2},
    "tie_word_embeddings must be": {"tie_word_embeddings": "yes"},
    "eos_token_id must be": {"eos_token_id": 49152},
    "bos_token_id must be": {"bos_token_id": -1},
    "rope_scaling must be an object": {"rope_scaling": 4},
    "rope_scaling.factor is missing": {
        "rope_scaling": {"type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4}
    },
    "rope_parameters.high_freq_factor must be above": {
        "rope_parameters": LLAMA3_SCALING | {"rope_type": "llama3", "high_freq_factor": 1}
    },
}


@pytest.mark.parametrize("found", NONSENSE)
def test_wrong_fields_are_named(found: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError) as caught:
        read(tmp_path, **NONSENSE[found])
    assert f"{tmp_path / 'config.json'}: field {found}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "no JSON object, found list"),
        ("\udcff", "not valid JSON"),
        ('{"hidden_size": Infinity, "architectures": ["LlamaForCausalLM"]}', "num_attention_heads"),
    ],
)
def test_files_that_are_no_config(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_model_spec(tmp_path)
    assert str(file) in str(caught.value)


def test_no_config_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"config\.json cannot be read"):
        load_model_spec(tmp_path)
