"""A real byte-level tokenizer, trained in a moment on a few lines, with a chat template."""

import json
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from kunserve.server.tokenizer import Tokenizer

EOS = "<|im_end|>"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", EOS)
CORPUS = (
    "hello world, this is a small corpus of text about the cat and the dog; stop here",
    "日本語のテキスト 😀😃 ünïcödé — naïve café",
)
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + m['role']) }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ prefix }}{% endif %}"
)


def build_backend() -> Backend:
    """Byte-level BPE over all 256 bytes and a few merges."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    backend.add_tokens([AddedToken("日本 token", special=False)])
    return backend


def write_tokenizer(directory: Path, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Write tokenizer.json and tokenizer_config.json as a checkpoint has them."""
    build_backend().save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def load_tokenizer(directory: Path, chat_template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    """The tokenizer, through the files."""
    return Tokenizer.load(write_tokenizer(directory, chat_template))
