"""Tokens to text as they come: whole characters only, and never a piece of a stop string.

    tokens  --ByteDecoder | WindowDecoder-->  text deltas  --StopMatcher-->  what the client sees

For byte-level tokenizers (Llama 3, Qwen, SmolLM, GPT) the deltas joined are exactly the decoding of
all tokens. For others (SentencePiece with byte fallback) they are wherever that is possible: there
a later token can change the text of an earlier one, which the client has already seen.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tokenizers.decoders import DecodeStream

from kunserve.server.tokenizer import Tokenizer

_PRIME_TOKENS = 6
_MAX_PENDING_TOKENS = 32


@dataclass(frozen=True)
class StopConditions:
    """When text ends a request.

    `strings`: the text ends where one of them is complete. `include_in_output`: it is shown.
    `min_tokens`: before so many tokens, stop strings are not looked for.
    """

    strings: tuple[str, ...] = ()
    include_in_output: bool = False
    min_tokens: int = 0


class Decoder(Protocol):
    """Turns one request's tokens into text deltas."""

    def push(self, token_id: int) -> str:
        """The text that is certain with this token; often empty inside a character."""

    def flush(self) -> str:
        """What is left at the end: incomplete characters, as U+FFFD."""


class ByteDecoder:
    """For byte-level tokenizers: tokens are bytes, decoded as one UTF-8 stream."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """See `Decoder`."""
        if token_id in self._skipped:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """See `Decoder`."""
        return self._utf8.decode(b"", final=True)


class WindowDecoder:
    """For all other tokenizers: `DecodeStream`, started on the end of the prompt, so that a leading
    space is kept. It never raises and never keeps more than `_MAX_PENDING_TOKENS` back."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._pending: list[int] = []
        self._context = list(prompt_token_ids[-_PRIME_TOKENS:])
        self._stream = DecodeStream(ids=self._context, skip_special_tokens=skip_special_tokens)

    def push(self, token_id: int) -> str:
        """See `Decoder`."""
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._tokenizer.backend, token_id)
        except Exception:  # noqa: BLE001  bare Exception: "Invalid prefix", the past text changed
            return self.flush()
        if text is None:
            return self.flush() if len(self._pending) >= _MAX_PENDING_TOKENS else ""
        self._settle()
        return str(text)

    def flush(self) -> str:
        """See `Decoder`."""
        if not self._pending:
            return ""
        before = self._tokenizer.decode(self._context, self._skip)
        after = self._tokenizer.decode([*self._context, *self._pending], self._skip)
        if after.startswith(before):
            text = after[len(before) :]
        else:
            text = self._tokenizer.decode(self._pending, self._skip)
        self._settle()
        self._stream = DecodeStream(ids=self._context, skip_special_tokens=self._skip)
        return text

    def _settle(self) -> None:
        self._context = [*self._context, *self._pending][-_PRIME_TOKENS:]
        self._pending = []


class _StopAutomaton:
    """Knuth, Morris and Pratt: `state` is the longest prefix of `text` that the input ends in."""

    __slots__ = ("_fallback", "state", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.state = 0
        self._fallback = [0] * (len(text) + 1)
        length = 0
        for index in range(1, len(text)):
            while length and text[index] != text[length]:
                length = self._fallback[length]
            length += text[index] == text[length]
            self._fallback[index + 1] = length

    def push(self, char: str) -> bool:
        """True when the text is complete with `char`."""
        state = self.state
        if state == len(self.text):
            state = self._fallback[state]
        while state and char != self.text[state]:
            state = self._fallback[state]
        self.state = state + (char == self.text[state])
        return self.state == len(self.text)

    @property
    def open_chars(self) -> int:
        """How many of the last characters may be the start of an occurrence still to come."""
        complete = self.state == len(self.text)
        return self._fallback[self.state] if complete else self.state


class StopMatcher:
    """Finds the stop string that is complete first, wherever token borders lie.

    The result is that of a search character by character, so it depends on the text alone. Of two
    that are complete at once, the one listed first counts. Text that may turn out to be the start
    of a stop string is held back (unless stop strings are shown anyway).

        emitted | held (the longest prefix of any stop string) | next delta
    """

    def __init__(self, conditions: StopConditions) -> None:
        self._automata = [_StopAutomaton(text) for text in conditions.strings]
        self._include = conditions.include_in_output
        self._min_tokens = conditions.min_tokens
        self._held = ""
        self.matched: str | None = None

    def push(self, delta: str, num_tokens: int) -> str:
        """What may be shown of the text so far, with `delta` being the text of token number
        `num_tokens` (from 1). After a match, `matched` is set and nothing more is shown."""
        if not self._automata or not delta:
            return delta
        text = self._held + delta
        searching = num_tokens > self._min_tokens
        for end, char in enumerate(delta, start=len(self._held) + 1):
            complete = [automaton.text for automaton in self._automata if automaton.push(char)]
            if complete and searching:
                self.matched = complete[0]
                self._held = ""
                return text[: end if self._include else end - len(complete[0])]
        held = 0 if self._include else max(automaton.open_chars for automaton in self._automata)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back; the request ends without a stop string."""
        held, self._held = self._held, ""
        return held


class OutputText:
    """The visible text of one request, token by token."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        stop: StopConditions,
        skip_special_tokens: bool = True,
    ) -> None:
        self._decoder: Decoder
        if tokenizer.byte_level:
            self._decoder = ByteDecoder(tokenizer, skip_special_tokens)
        else:
            self._decoder = WindowDecoder(tokenizer, prompt_token_ids, skip_special_tokens)
        self._matcher = StopMatcher(stop)

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, or None."""
        return self._matcher.matched

    def push(self, token_id: int, num_tokens: int) -> str:
        """New visible text with token number `num_tokens` (from 1)."""
        return self._matcher.push(self._decoder.push(token_id), num_tokens)

    def flush(self, num_tokens: int) -> str:
        """The rest, at the end. Incomplete characters may still complete a stop string."""
        text = self._matcher.push(self._decoder.flush(), num_tokens)
        return text if self.matched is not None else text + self._matcher.flush()
