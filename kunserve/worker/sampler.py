"""From logits to tokens, by vLLM's rules, one row at a time.

A row's token is a pure function of its logits, its `SamplingParams`, its tokens so far and
(seed, t): every array operation below works on one row, so a batch changes nothing, bit for bit.

The order of the steps is vLLM's (vllm/v1/sample/sampler.py, `Sampler.forward`):

    raw logits -> logprobs                                            float64
        |  min_tokens, logit_bias, repetition, frequency, presence    float32, as vLLM, sparse
        v
    logits -> argmax                            when temperature is 0
        |  temperature, min_p, top_k, top_p                           float64
        v
    weights -> inverse CDF at uniform(seed, t)

Truncation, for w = exp((logit - largest logit) / temperature):

    min_p  keeps w >= min_p (the largest w is 1)
    top_k  keeps what is not below the k-th largest logit; ties at the k-th all stay
           (vLLM's sort path and transformers; vLLM's Triton path drops some)
    top_p  goes over what min_p and top_k left, by logit descending, ties by id ascending, and keeps
           a token while the mass before it is less than top_p of the whole: at least one

The draw goes over the kept tokens by ascending id, or in the order of top_p where top_p < 1: only
top_p needs an order, so only it sorts. The order depends on the parameters alone.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from kunserve.core.errors import AccountingError, InvalidRequestError
from kunserve.core.ids import RequestId
from kunserve.core.random import uniform
from kunserve.core.request import Request, SamplingParams, TokenLogprobs
from kunserve.core.step import SampledToken

Row: TypeAlias = NDArray[np.float32]
"""The logits of one row, [V]."""

Weights: TypeAlias = NDArray[np.float64]
"""Unnormalised probabilities, the largest 1."""

TokenIds: TypeAlias = NDArray[np.int64]

_POSITION_BITS = 32
_POSITION_MASK = (1 << _POSITION_BITS) - 1
_FLOAT32_VALUE_BITS = 0x7FFFFFFF

# Where logits can be unusable, and what to do about it.
_RAW_LOGITS = ("the model's logits", "look for damaged weights or a dtype that overflows")
_ADJUSTED_LOGITS = ("logits after penalties", "relax min_tokens, logit_bias or the penalties")


@dataclass(frozen=True)
class SamplingFailure:
    """No token could be drawn for this row; other rows of the batch are not touched by it.

    The caller ends the request with an error. Nothing was recorded, so sampling the same output
    index again is possible.
    """

    request_id: RequestId
    message: str


def validate(params: SamplingParams, vocab_size: int) -> None:
    """Check what `SamplingParams` cannot know by itself: that biased tokens exist.

    `stop_token_ids` beyond the vocabulary are allowed: they can never be drawn.

    Raises:
        InvalidRequestError: a `logit_bias` token is not in [0, vocab_size).
    """
    for token_id, _ in params.logit_bias:
        if token_id >= vocab_size:
            raise InvalidRequestError(
                f"token id {token_id} is not in the vocabulary of {vocab_size} tokens; "
                "remove it from logit_bias",
                "logit_bias",
            )


class Sampler:
    """Samples for the running requests of one group, and keeps what their penalties need.

    Not thread-safe. One instance lives beside the last stage of the group.
    """

    def __init__(self, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        """`vocab_size` is V, the width of the logits. `eos_token_ids` are the model's end-of-text
        tokens, masked until `min_tokens` are out (also under `ignore_eos`, as in vLLM)."""
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._states: dict[RequestId, _RequestState] = {}

    def start(self, request: Request) -> None:
        """Take in a request with its prompt and the outputs known so far.

        A request already started is replaced: a cancelled step's plan may run again.

        Raises:
            InvalidRequestError: `logit_bias` names a token outside the vocabulary, or a penalty is
                set and the prompt or the outputs hold one.
        """
        validate(request.params, self._vocab_size)
        self._states[request.id] = _RequestState.of(request, self._vocab_size, self._eos_token_ids)

    def release(self, request_id: RequestId) -> None:
        """Forget a request. Unknown ids are ignored: a cancelled step's plan may run again."""
        self._states.pop(request_id, None)

    def sample(
        self, logits: NDArray[np.float32], rows: Sequence[tuple[RequestId, int]]
    ) -> tuple[SampledToken | SamplingFailure, ...]:
        """Draw one token per row.

        Args:
            logits: [R, V] float32, raw. Read only: never modified.
            rows: R pairs (request, output index t), in the order of `logits`.

        Returns:
            One value per row, in order: the token, which is recorded as output t, or why there is
            none (NaN, +inf or all -inf logits, before or after penalties and masks).

        An output index below the number of outputs known discards those from t on: a cancelled
        step's tokens are drawn again, and come out the same.

        Raises:
            ValueError: `logits` is not float32 of shape [R, V].
            AccountingError: a request was not started, or outputs between its last known one and
                t are missing. Nothing was sampled.
        """
        if logits.shape != (len(rows), self._vocab_size) or logits.dtype != np.float32:
            raise ValueError(
                f"logits are {logits.dtype} {logits.shape}, not float32 "
                f"{(len(rows), self._vocab_size)}; pass one row per sampled request"
            )
        states = [self._state(request_id, t) for request_id, t in rows]
        # Values that are not finite are looked for where they matter, not warned about.
        with np.errstate(all="ignore"):
            return tuple(
                _sample_row(state, raw, request_id, t)
                for state, raw, (request_id, t) in zip(states, logits, rows, strict=True)
            )

    def _state(self, request_id: RequestId, output_index: int) -> _RequestState:
        state = self._states.get(request_id)
        if state is None:
            raise AccountingError(f"{request_id} is sampled but not started; call start() first")
        if output_index > len(state.outputs):
            raise AccountingError(
                f"{request_id} is sampled at output {output_index}, but only "
                f"{len(state.outputs)} are known; start() it again with all outputs"
            )
        return state


@dataclass(frozen=True)
class _RequestState:
    """What sampling one request needs. `outputs` grows by each token drawn.

    `prompt_ids` are the distinct prompt tokens, empty without a repetition penalty; `masked_ids`
    are those that may not come before `min_tokens`.
    """

    params: SamplingParams
    prompt_ids: TokenIds
    masked_ids: TokenIds
    bias_ids: TokenIds
    biases: Row
    outputs: array[int]

    @classmethod
    def of(cls, request: Request, vocab_size: int, eos_token_ids: tuple[int, ...]) -> _RequestState:
        params = request.params
        bias_by_id = dict(params.logit_bias)  # of a repeated id the last counts, as in JSON
        masked_ids = {
            token_id
            for token_id in (*eos_token_ids, *params.stop_token_ids)
            if params.min_tokens > 0 and 0 <= token_id < vocab_size
        }
        repeats = params.repetition_penalty != 1.0
        if repeats or _has_output_penalty(params):
            _check_token_ids(request, vocab_size)
        return cls(
            params=params,
            prompt_ids=_token_ids(set(request.prompt_token_ids) if repeats else ()),
            masked_ids=_token_ids(masked_ids),
            bias_ids=_token_ids(bias_by_id),
            biases=np.array(list(bias_by_id.values()), dtype=np.float32),
            outputs=array("q", request.output_token_ids),
        )

    def adjusts(self, output_index: int) -> bool:
        """True when `adjusted` can differ from the raw row at this output index."""
        return (
            (output_index < self.params.min_tokens and self.masked_ids.size > 0)
            or self.bias_ids.size > 0
            or self.params.repetition_penalty != 1.0
            or (_has_output_penalty(self.params) and output_index > 0)
        )

    def adjusted(self, raw: Row) -> Row:
        """A copy of `raw`, [V], with masks, biases and penalties, for the output after `outputs`.

        Only the tokens concerned are read and written. Repeated ids are harmless where every
        repetition computes the same value; frequencies need counts. Divides by the repetition
        penalty, as transformers does, where vLLM may multiply by its reciprocal.
        """
        params = self.params
        row = raw.copy()
        outputs = np.array(self.outputs, dtype=np.int64)
        if len(outputs) < params.min_tokens:
            row[self.masked_ids] = -np.inf
        if self.bias_ids.size:
            row[self.bias_ids] += self.biases
        if params.repetition_penalty != 1.0:
            seen_ids = np.concatenate((self.prompt_ids, outputs))
            penalty = np.float32(params.repetition_penalty)
            seen = row[seen_ids]
            row[seen_ids] = np.where(seen > 0, seen / penalty, seen * penalty)
        if _has_output_penalty(params) and outputs.size:
            ids, counts = np.unique(outputs, return_counts=True)
            row[ids] -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
            row[ids] -= np.float32(params.presence_penalty)
        return row


def _has_output_penalty(params: SamplingParams) -> bool:
    return params.frequency_penalty != 0.0 or params.presence_penalty != 0.0


def _token_ids(ids: Iterable[int]) -> TokenIds:
    return np.array(list(ids), dtype=np.int64)


def _check_token_ids(request: Request, vocab_size: int) -> None:
    known_ids = (*request.prompt_token_ids, *request.output_token_ids)
    if any(token_id < 0 or token_id >= vocab_size for token_id in known_ids):
        raise InvalidRequestError(
            f"{request.id} holds token ids outside the vocabulary of {vocab_size} tokens; "
            "penalties cannot be applied to them",
            "prompt",
        )


def _sample_row(
    state: _RequestState, raw: Row, request_id: RequestId, output_index: int
) -> SampledToken | SamplingFailure:
    params = state.params
    del state.outputs[output_index:]
    row, best_id = raw, int(raw.argmax())
    if not math.isfinite(raw[best_id]):
        return _failure(request_id, output_index, float(raw[best_id]), _RAW_LOGITS)
    if state.adjusts(output_index):
        row = state.adjusted(raw)
        best_id = int(row.argmax())
        if not math.isfinite(row[best_id]):
            return _failure(request_id, output_index, float(row[best_id]), _ADJUSTED_LOGITS)
    token_id = best_id
    if not params.greedy:
        token_id = draw_token(row, params, uniform(params.seed, output_index))
    state.outputs.append(token_id)
    logprobs = None if params.logprobs is None else _logprobs(raw, token_id, params.logprobs)
    return SampledToken(request_id, output_index, token_id, logprobs)


def _failure(
    request_id: RequestId, output_index: int, largest: float, where: tuple[str, str]
) -> SamplingFailure:
    """`largest` is what argmax found: the first NaN, else +inf, else all are -inf."""
    found = "no token above -inf" if largest == -math.inf else f"{largest}"
    source, advice = where
    return SamplingFailure(
        request_id,
        f"request {request_id}, output {output_index}: {source} hold {found}, so no token can be "
        f"drawn; {advice}",
    )


def draw_token(row: Row, params: SamplingParams, u: float) -> int:
    """The token at `u`, in [0, 1), of the inverse CDF (order and rules: see the module).

    Args:
        row: [V] logits after penalties, the largest finite.
        params: temperature > 0, min_p, top_k and top_p are used.
    """
    if 0 < params.top_k < row.size:
        ids = _at_least_kth(row, params.top_k)
        return int(ids[_draw_index(row[ids], params, u)])
    return _draw_index(row, params, u)


def _draw_index(row: Row, params: SamplingParams, u: float) -> int:
    """Position in `row`, where top_k has been applied."""
    weights = row.astype(np.float64)
    weights -= weights.max()
    if params.temperature != 1.0:
        weights /= params.temperature  # never times the reciprocal, which may be infinite
    np.exp(weights, out=weights)
    if params.min_p > 0.0:
        weights *= weights >= params.min_p
    if params.top_p < 1.0:
        return _draw_nucleus(row, weights, params.top_p, u)
    return _search(np.cumsum(weights), u)


def _draw_nucleus(row: Row, weights: Weights, top_p: float, u: float) -> int:
    """Position drawn from the nucleus, without sorting the tail.

    All weights below (1 - top_p) / 2 of the mean add up to at most (1 - top_p) / 2 of the mass, so
    the nucleus ends before them. They come last in the order, so leaving them out changes no sum
    before them. (With top_p within 1e-11 or so of 1, rounding may end the nucleus at them.)
    """
    total = float(weights.sum())
    kept = np.flatnonzero(weights >= (1.0 - top_p) / 2 * total / weights.size)
    kept = kept[_descending(row[kept])]
    mass = np.cumsum(weights[kept])
    # Position i stays while mass[i - 1] < top_p * total.
    num_kept = int(np.searchsorted(mass, top_p * total, side="left")) + 1
    return int(kept[_search(mass[:num_kept], u)])


def _search(mass: Weights, u: float) -> int:
    """First position whose cumulative mass exceeds u of the last: never one of weight 0.

    u <= 1 - 2^-53, so the product rounds below the last and the position always exists.
    """
    return int(np.searchsorted(mass, u * mass[-1], side="right"))


def _at_least_kth(row: Row, k: int) -> TokenIds:
    """Ascending ids of the logits not below the k-th largest, 0 < k <= V; more than k on ties."""
    kth = np.partition(row, row.size - k)[row.size - k]
    return np.flatnonzero(row >= kth)


def _descending(values: Row) -> TokenIds:
    """Positions by value descending, ties by position ascending.

    One 64-bit sort of (value, position), several times faster than a stable argsort:

        | 32 bits: integer in the float's order, inverted | 32 bits: position |
    """
    bits = (values + np.float32(0.0)).view(np.int32)  # -0.0 + 0.0 is 0.0: they are ties
    ordered = bits ^ ((bits >> 31) & _FLOAT32_VALUE_BITS)
    keys = (~ordered).astype(np.int64) << _POSITION_BITS
    keys |= np.arange(values.size, dtype=np.int64)
    keys.sort()
    return keys & _POSITION_MASK


def _logprobs(raw: Row, token_id: int, num_top: int) -> TokenLogprobs:
    """Of the raw logits, [V]. Rank counts the logits not below the token's, so that of two tied
    best tokens both have rank 2, as in vLLM. Tokens of logit -inf have logprob -inf."""
    shifted = raw.astype(np.float64)
    largest = float(shifted.max())
    shifted -= largest
    normalizer = largest + math.log(float(np.exp(shifted, out=shifted).sum()))
    top: tuple[tuple[int, float], ...] = ()
    if num_top > 0:
        ids = _at_least_kth(raw, min(num_top, raw.size))
        ids = ids[_descending(raw[ids])][:num_top]
        top = tuple((int(i), float(raw[i]) - normalizer) for i in ids)
    rank = int(np.count_nonzero(raw >= raw[token_id]))
    return TokenLogprobs(float(raw[token_id]) - normalizer, rank, top)
