"""From what the user names to a directory with a Hugging Face model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from kunserve.core.errors import ModelLoadError
from kunserve.runtime.embedded import EMBEDDED_MODEL, Progress, ensure_embedded_model
from kunserve.runtime.model_config import CONFIG_FILE

# Weights only as safetensors: unpickling a *.bin runs whatever code it holds.
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "model*.safetensors",
    "model.safetensors.index.json",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class ResolvedModel:
    """A model on this machine's disk: `name` is how clients may call it."""

    name: str
    directory: Path


def default_cache_dir(environ: Mapping[str, str]) -> Path:
    """$KUNSERVE_CACHE, or kunserve's directory in the user's cache ($XDG_CACHE_HOME, ~/.cache)."""
    if environ.get("KUNSERVE_CACHE"):
        return Path(environ["KUNSERVE_CACHE"]).expanduser()
    return Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kunserve"


def resolve_model(
    name: str | None, cache_dir: Path, progress: Progress, revision: str | None = None
) -> ResolvedModel:
    """Find the model `name`, fetching it where it is not on this machine yet.

    None and "smollm2-135m-instruct" (in any case) are the embedded model, kept in `cache_dir`; an
    existing directory is taken as it is; anything else of the form "model" or "owner/model" is a
    Hugging Face hub id, fetched into the hub's own cache at `revision` (the main branch if None).
    `progress` receives lines for people.

    Raises:
        ModelLoadError: there is no such path or hub model, the network or the index failed, or
            the model has no config.json or no safetensors weights.
    """
    if name is None or name.lower() == EMBEDDED_MODEL:
        return ResolvedModel(EMBEDDED_MODEL, ensure_embedded_model(cache_dir, progress))
    path = Path(name).expanduser()
    if path.is_dir():
        _check_files(path)
        return ResolvedModel(path.resolve().name, path.resolve())
    if path.exists():
        raise ModelLoadError(
            f"{path} is a file: give a Hugging Face model directory "
            "(config.json, tokenizer.json, *.safetensors) or a hub id"
        )
    if not _HUB_ID.fullmatch(name):
        raise ModelLoadError(f"there is no directory {path}, and {name!r} is not a hub id either")
    directory = _download(name, revision, progress)
    _check_files(directory)
    return ResolvedModel(name, directory)


def _download(name: str, revision: str | None, progress: Progress) -> Path:
    progress(f"Looking for {name} on the Hugging Face hub")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_HUB_FILES)))
    except GatedRepoError as error:
        raise ModelLoadError(
            f"{name} is gated: accept its licence on the hub, then log in with `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelLoadError(
            f"there is no directory {name} here and no model {name} on the Hugging Face hub "
            "(or it is private: log in with `hf auth login`)"
        ) from error
    except (RevisionNotFoundError, EntryNotFoundError) as error:
        # LocalEntryNotFoundError is an EntryNotFoundError: the hub could not be asked.
        if isinstance(error, LocalEntryNotFoundError):
            raise _unreachable(name, error) from error
        raise ModelLoadError(f"{name} has no revision {revision} on the hub") from error
    except (HfHubHTTPError, HTTPError, OSError) as error:
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> ModelLoadError:
    reason = str(error).strip().splitlines()
    return ModelLoadError(
        f"there is no directory {name} here, and the Hugging Face hub could not be reached for it "
        f"({reason[0] if reason else type(error).__name__}): give a local directory, or leave the "
        "model out for the embedded one"
    )


def _check_files(directory: Path) -> None:
    if not (directory / CONFIG_FILE).is_file():
        raise ModelLoadError(f"{directory} has no {CONFIG_FILE}: it is no Hugging Face model")
    if any(directory.glob("*.safetensors")):
        return
    if any(file for pattern in _PICKLES for file in directory.glob(pattern)):
        raise ModelLoadError(
            f"{directory} has only pickled weights, which are never loaded because they can run "
            "code: convert them with transformers' save_pretrained(safe_serialization=True)"
        )
    raise ModelLoadError(
        f"{directory} has no *.safetensors weights (pickled ones are neither fetched nor loaded)"
    )
