"""Requests as values: what the front owns and what a scheduler leases."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from kunserve.core.errors import InvalidRequestError
from kunserve.core.ids import RequestId

MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 300
SEED_LIMIT = 1 << 64


class FinishReason(Enum):
    """Why a request ended. STOP and LENGTH are OpenAI's; ABORT is the client's own doing."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. Defaults are vLLM's (before a model's own generation config).

    `seed` is always set: the front draws one at admission for a request without, so that the
    random number of token t is a pure function of (seed, t) wherever the request runs.
    `top_k` 0 means all tokens. `logprobs` is the number of alternatives to report, None for none.
    `max_tokens` counts generated tokens. Stop *strings* are matched in the front, on text.

    Raises:
        InvalidRequestError: a value is out of range; `param` names it.
    """

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check_range("max_tokens", self.max_tokens, 1, math.inf)
        _check_range("seed", self.seed, 0, SEED_LIMIT - 1)
        _check_range("temperature", self.temperature, 0.0, 100.0)
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequestError(f"top_p must be in (0, 1], got {self.top_p}", "top_p")
        _check_range("top_k", self.top_k, 0, math.inf)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if not 0.0 < self.repetition_penalty <= 100.0:
            raise InvalidRequestError(
                f"repetition_penalty must be in (0, 100], got {self.repetition_penalty}",
                "repetition_penalty",
            )
        if self.logprobs is not None:
            _check_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _check_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_length("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKEN_IDS)
        _check_length("logit_bias", len(self.logit_bias), MAX_LOGIT_BIAS)
        for token_id, bias in self.logit_bias:
            if token_id < 0:
                raise InvalidRequestError(f"token id {token_id} is negative", "logit_bias")
            _check_range("logit_bias", bias, -100.0, 100.0)

    @property
    def greedy(self) -> bool:
        """True when the most likely token is taken, as vLLM does at temperature 0."""
        return self.temperature == 0.0


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # NaN fails every comparison
        limit = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise InvalidRequestError(f"{name} must be {limit}, got {value}", name)


def _check_length(name: str, length: int, limit: int) -> None:
    if length > limit:
        raise InvalidRequestError(f"{name} has {length} entries, at most {limit} allowed", name)


@dataclass(frozen=True)
class Request:
    """A request as the front owns it, and as a scheduler leases it at (group, epoch).

    `output_token_ids` are the tokens already delivered to the client: empty at first, and what a
    new leader continues from after a failure or a transition. `arrival_ns` is on the front's
    monotonic clock.
    """

    id: RequestId
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    arrival_ns: int
    output_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probabilities of the raw logits: the sampled token's, its rank from 1, and the
    `SamplingParams.logprobs` most likely tokens, best first."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenOutput:
    """One generated token on its way to the client.

    `index` is t: the token's position among the generated tokens. `finish` is set on the last.
    `queued_ns` is set by the front on the first: from the arrival until the request left the queue.
    It is a measurement, no part of what the token is.
    """

    request_id: RequestId
    index: int
    token_id: int
    logprobs: TokenLogprobs | None = None
    finish: FinishReason | None = None
    stop_token: bool = False
    """True when `finish` is STOP because of one of `stop_token_ids` (not EOS)."""
    queued_ns: int | None = field(default=None, compare=False)
