"""What the HTTP side is told once, at its start."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kunserve.core.errors import ConfigError, InvalidRequestError
from kunserve.core.request import MAX_LOGPROBS, SamplingParams

# The keys that vLLM takes from a generation_config.json, and what they are called in a request.
_GENERATION_CONFIG_KEYS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens_limit",
}


@dataclass(frozen=True)
class GenerationDefaults:
    """A model's own sampling defaults, used where a request says nothing (None: OpenAI's default).

    As in vLLM, `max_tokens_limit` (the file's `max_new_tokens`) is more than a default: no request
    gets more output tokens.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens_limit: int | None = None

    def __post_init__(self) -> None:
        given: dict[str, Any] = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) is not None
        }
        limit = given.pop("max_tokens_limit", 1)
        try:
            SamplingParams(max_tokens=limit, seed=0, **given)
        except (InvalidRequestError, TypeError) as error:
            raise ConfigError(
                f"generation_config.json: {error}; correct it or use --generation-config vllm"
            ) from error


def load_generation_defaults(model_dir: Path) -> GenerationDefaults:
    """Sampling defaults of `model_dir`/generation_config.json (`--generation-config auto`).

    Temperature, top_p, top_k, min_p, repetition_penalty and max_new_tokens are taken, whatever
    `do_sample` says, as in vLLM; without the file, OpenAI's defaults hold.

    Raises:
        ConfigError: the file is not a JSON object or holds a value out of range.
    """
    path = model_dir / "generation_config.json"
    if not path.is_file():
        return GenerationDefaults()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    known = {name: content.get(key) for key, name in _GENERATION_CONFIG_KEYS.items()}
    if known["top_k"] == -1:
        known["top_k"] = 0
    return GenerationDefaults(**known)


@dataclass(frozen=True)
class Slo:
    """What clients are promised, in seconds: the time to the first token, and the mean time of
    each token after it. None: nothing is promised."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    @property
    def is_given(self) -> bool:
        """Something is promised."""
        return self.ttft_s is not None or self.tpot_s is not None

    def broken(self, ttft_s: float, tpot_s: float | None) -> tuple[str, ...]:
        """Which promises an answer has not kept: "ttft", "tpot". An answer of one token has no
        `tpot_s`, and keeps that one."""
        is_late = self.ttft_s is not None and ttft_s > self.ttft_s
        is_slow = self.tpot_s is not None and tpot_s is not None and tpot_s > self.tpot_s
        return ("ttft",) * is_late + ("tpot",) * is_slow


@dataclass(frozen=True)
class ServerConfig:
    """Settings of the HTTP application.

    `served_model_names`: names that requests may use; the first is used when they name none, and
    labels the metrics. `model_root`: what /v1/models shows as the checkpoint. `max_sequences`:
    most prompts times answers of one request. `max_preparing`: most requests whose bodies are
    read and tokenised at one time (more are answered 503). `seed`: of the generator that draws
    the seeds of requests without one; None takes the system's randomness. `slo`: what answers are
    judged by in the metrics.
    """

    served_model_names: tuple[str, ...]
    model_root: str | None = None
    api_keys: tuple[str, ...] = ()
    max_request_body_bytes: int = 8 << 20
    body_timeout_s: float = 60.0
    max_logprobs: int = MAX_LOGPROBS
    max_sequences: int = 256
    max_preparing: int = 256
    generation_defaults: GenerationDefaults = GenerationDefaults()
    seed: int | None = None
    slo: Slo = Slo()

    def __post_init__(self) -> None:
        if not self.served_model_names or not all(self.served_model_names):
            raise ConfigError("--served-model-name must not be empty")
        if any(not key for key in self.api_keys):
            raise ConfigError("--api-key must not be empty")
