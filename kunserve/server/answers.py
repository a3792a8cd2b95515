"""Answers in OpenAI's shapes with vLLM's additions: whole bodies and stream chunks.

Chunks are small plain dicts: at hundreds of events per second on a shared core, building and
dumping pydantic models would cost more than everything else in the front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kunserve.core.request import FinishReason, TokenLogprobs, TokenOutput
from kunserve.server.detokenizer import OutputText
from kunserve.server.protocol import OutputOptions
from kunserve.server.streams import Arrival
from kunserve.server.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0  # JSON has no -Infinity; vLLM's stand-in


@dataclass(frozen=True)
class Delta:
    """What one sequence gained. `token_offset_chars`: length of the tokens before, as text."""

    text: str
    outputs: Sequence[TokenOutput]
    token_offset_chars: int
    first: bool
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class SequenceState:
    """One answer while it grows. With `keep`, what it gained is kept for a whole body."""

    index: int
    prompt_token_ids: tuple[int, ...]
    text: OutputText
    include_stop: bool
    keep: bool
    num_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    started: bool = False
    token_chars: int = 0
    kept_text: list[str] = field(default_factory=list)
    kept_outputs: list[TokenOutput] = field(default_factory=list)

    def advance(self, arrival: Arrival, tokenizer: Tokenizer, with_logprobs: bool) -> Delta:
        """Take in new tokens, up to the one that ends the sequence."""
        pieces: list[str] = []
        taken: list[TokenOutput] = []
        offset = self.token_chars
        for output in arrival.outputs:
            if self.finish_reason is not None:
                break
            taken.append(output)
            pieces.append(self._take(output))
            if with_logprobs:
                self.token_chars += len(tokenizer.token_text(output.token_id))
        if arrival.ended and self.finish_reason is None:
            self.finish_reason = FinishReason.ABORT.value
        if self.keep:
            self.kept_text += pieces
            self.kept_outputs += taken
        first, self.started = not self.started, True
        text = "".join(pieces)
        return Delta(text, taken, offset, first, self.finish_reason, self.stop_reason)

    def _take(self, output: TokenOutput) -> str:
        self.num_tokens += 1
        text = ""
        # The token that stopped the request (EOS or a stop token) is shown only when asked for.
        if output.finish is not FinishReason.STOP or self.include_stop:
            text = self.text.push(output.token_id, self.num_tokens)
        if output.finish is not None and self.text.matched is None:
            text += self.text.flush(self.num_tokens)
        if self.text.matched is not None:
            self.finish_reason = FinishReason.STOP.value
            self.stop_reason = self.text.matched
        elif output.finish is not None:
            self.finish_reason = output.finish.value
            self.stop_reason = output.token_id if output.stop_token else None
        return text


@dataclass(frozen=True)
class Envelope:
    """What every body and chunk of one answer repeats."""

    id: str
    created: int
    model: str
    options: OutputOptions
    tokenizer: Tokenizer
    answers_per_prompt: int

    def wrap(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A body or chunk of type `kind`."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def usage(self, sequences: Sequence[SequenceState]) -> dict[str, int]:
        """Token counts; a prompt with several answers counts once."""
        prompts = sequences[:: self.answers_per_prompt]
        prompt_tokens = sum(len(sequence.prompt_token_ids) for sequence in prompts)
        return usage(prompt_tokens, sum(sequence.num_tokens for sequence in sequences))


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


class AnswerFormat(Protocol):
    """One of the two APIs' shapes."""

    envelope: Envelope

    def chunks(self, sequence: SequenceState, delta: Delta) -> list[dict[str, Any]]:
        """Stream chunks for what a sequence gained."""

    def usage_chunk(self, sequences: Sequence[SequenceState]) -> dict[str, Any]:
        """The last chunk with `include_usage`."""

    def body(self, sequences: Sequence[SequenceState]) -> dict[str, Any]:
        """The whole answer."""


class CompletionFormat:
    """`text_completion`, streamed or not."""

    kind = "text_completion"

    def __init__(self, envelope: Envelope) -> None:
        self.envelope = envelope

    def chunks(self, sequence: SequenceState, delta: Delta) -> list[dict[str, Any]]:
        """See `AnswerFormat`."""
        chunk = self.envelope.wrap(self.kind, [self._choice(sequence, delta)])
        if self.envelope.options.continuous_usage:
            chunk["usage"] = usage(len(sequence.prompt_token_ids), sequence.num_tokens)
        return [chunk]

    def usage_chunk(self, sequences: Sequence[SequenceState]) -> dict[str, Any]:
        """See `AnswerFormat`."""
        chunk = self.envelope.wrap(self.kind, [])
        chunk["usage"] = self.envelope.usage(sequences)
        return chunk

    def body(self, sequences: Sequence[SequenceState]) -> dict[str, Any]:
        """See `AnswerFormat`."""
        choices = []
        for sequence in sequences:
            choice = self._choice(sequence, _whole(sequence))
            choice["prompt_logprobs"] = None
            choices.append(choice)
        body = self.envelope.wrap(self.kind, choices)
        body["usage"] = self.envelope.usage(sequences)
        return body

    def _choice(self, sequence: SequenceState, delta: Delta) -> dict[str, Any]:
        options = self.envelope.options
        choice: dict[str, Any] = {
            "index": sequence.index,
            "text": delta.text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if options.logprobs is not None:
            choice["logprobs"] = self._logprobs(delta)
        if options.return_token_ids:
            choice["token_ids"] = [output.token_id for output in delta.outputs]
            if delta.first:
                choice["prompt_token_ids"] = sequence.prompt_token_ids
        return choice

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        tokenizer, as_ids = self.envelope.tokenizer, self.envelope.options.tokens_as_ids
        offset = delta.token_offset_chars
        offsets, values, tokens, tops = [], [], [], []
        for output in delta.outputs:
            token = _token_name(tokenizer, output.token_id, as_ids)
            value = _finite(output.logprobs.logprob) if output.logprobs else None
            top = {
                _token_name(tokenizer, token_id, as_ids): _finite(logprob)
                for token_id, logprob in (output.logprobs.top if output.logprobs else ())
            }
            if value is not None:
                top.setdefault(token, value)
            offsets.append(offset)
            values.append(value)
            tokens.append(token)
            tops.append(top)
            offset += len(tokenizer.token_text(output.token_id))
        return {
            "text_offset": offsets,
            "token_logprobs": values,
            "tokens": tokens,
            "top_logprobs": tops,
        }


class ChatFormat:
    """`chat.completion` and `chat.completion.chunk`."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    role = "assistant"

    def __init__(self, envelope: Envelope) -> None:
        self.envelope = envelope

    def chunks(self, sequence: SequenceState, delta: Delta) -> list[dict[str, Any]]:
        """See `AnswerFormat`. The first chunk of every choice states the role."""
        options = self.envelope.options
        chunks = []
        if delta.first:
            chunks.append(self._opening(sequence))
        choice: dict[str, Any] = {
            "index": sequence.index,
            "delta": {"content": delta.text},
            "logprobs": self._logprobs(delta.outputs),
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if options.return_token_ids:
            choice["token_ids"] = [output.token_id for output in delta.outputs]
        chunks.append(self.envelope.wrap(self.chunk_kind, [choice]))
        if options.continuous_usage:
            chunks[-1]["usage"] = usage(len(sequence.prompt_token_ids), sequence.num_tokens)
        return chunks

    def _opening(self, sequence: SequenceState) -> dict[str, Any]:
        choice = {
            "index": sequence.index,
            "delta": {"role": self.role, "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        chunk = self.envelope.wrap(self.chunk_kind, [choice])
        if self.envelope.options.return_token_ids:
            chunk["prompt_token_ids"] = sequence.prompt_token_ids
        if self.envelope.options.continuous_usage:
            chunk["usage"] = usage(len(sequence.prompt_token_ids), 0)
        return chunk

    def usage_chunk(self, sequences: Sequence[SequenceState]) -> dict[str, Any]:
        """See `AnswerFormat`."""
        chunk = self.envelope.wrap(self.chunk_kind, [])
        chunk["usage"] = self.envelope.usage(sequences)
        return chunk

    def body(self, sequences: Sequence[SequenceState]) -> dict[str, Any]:
        """See `AnswerFormat`."""
        body = self.envelope.wrap(self.kind, [self._choice(sequence) for sequence in sequences])
        body["usage"] = self.envelope.usage(sequences)
        body["prompt_logprobs"] = None
        if self.envelope.options.return_token_ids:
            body["prompt_token_ids"] = sequences[0].prompt_token_ids
        return body

    def _choice(self, sequence: SequenceState) -> dict[str, Any]:
        delta = _whole(sequence)
        choice: dict[str, Any] = {
            "index": sequence.index,
            "message": {
                "role": self.role,
                "content": delta.text,
                "refusal": None,
                "tool_calls": [],
            },
            "logprobs": self._logprobs(delta.outputs),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self.envelope.options.return_token_ids:
            choice["token_ids"] = [output.token_id for output in delta.outputs]
        return choice

    def _logprobs(self, outputs: Sequence[TokenOutput]) -> dict[str, Any] | None:
        if self.envelope.options.logprobs is None:
            return None
        return {"content": [self._token(o, o.logprobs) for o in outputs if o.logprobs]}

    def _token(self, output: TokenOutput, logprobs: TokenLogprobs) -> dict[str, Any]:
        entry = self._entry(output.token_id, logprobs.logprob)
        entry["top_logprobs"] = [self._entry(*alternative) for alternative in logprobs.top]
        return entry

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        tokenizer = self.envelope.tokenizer
        return {
            "token": _token_name(tokenizer, token_id, self.envelope.options.tokens_as_ids),
            "logprob": _finite(logprob),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }


def _whole(sequence: SequenceState) -> Delta:
    return Delta(
        "".join(sequence.kept_text),
        sequence.kept_outputs,
        0,
        True,
        sequence.finish_reason,
        sequence.stop_reason,
    )


def _token_name(tokenizer: Tokenizer, token_id: int, as_ids: bool) -> str:
    return f"token_id:{token_id}" if as_ids else tokenizer.token_text(token_id)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
