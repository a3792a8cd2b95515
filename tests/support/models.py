"""Tiny random models with odd sizes, written as Hugging Face directories with a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

ARCHITECTURES = ("llama", "llama3", "mistral", "qwen2")
"""What `build_tiny_model` takes: Llama untied, Llama tied with llama3 rope, Mistral, Qwen2 tied."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
TINY_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
BOS_TOKEN_ID, EOS_TOKEN_ID, PAD_TOKEN_ID = 257, 258, 259

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# Nothing here is a multiple of a panel (24) or a vector (8) unless it has to be.
_SIZES: dict[str, Any] = {
    "vocab_size": TINY_VOCAB_SIZE,
    "hidden_size": 112,
    "intermediate_size": 100,
    "num_hidden_layers": 7,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.15,
    "bos_token_id": BOS_TOKEN_ID,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": PAD_TOKEN_ID,
}

_CLASSES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"head_dim": 16, "tie_word_embeddings": False}),
    "llama3": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": 24}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
}


def build_tiny_model(
    directory: Path,
    architecture: str,
    seed: int,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **overrides: object,
) -> PreTrainedModel:
    """Write a random model of one of `ARCHITECTURES` with its tokenizer, and return it.

    The weights are a function of `seed` alone, and so large that logits differ visibly; norms and
    biases are random too. `overrides` are fields of the transformers config. The returned model
    is float32 with eager attention, holding exactly the values that were written.
    """
    config_class, model_class, fields = _CLASSES[architecture]
    config = config_class(**_SIZES | fields | overrides, attn_implementation="eager")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(config).eval()
        _randomise_vectors(model)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    build_byte_tokenizer().save_pretrained(directory)
    return model.float()


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte (ids 0..255) and the four `SPECIAL_TOKENS`, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*alphabet, *SPECIAL_TOKENS))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=_SIZES["max_position_embeddings"],
    )


@torch.no_grad()
def _randomise_vectors(model: PreTrainedModel) -> None:
    # transformers starts norms at one and biases at zero, which would hide their absence.
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
        elif name.endswith(".bias"):
            parameter.copy_(0.5 * torch.randn_like(parameter))
