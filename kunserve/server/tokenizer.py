"""Text to token ids and back, for the front.

`PreTrainedTokenizerFast` reads tokenizer.json as it is. `AutoTokenizer` would do the same for
such a directory, but it imports torch: 190 MiB for nothing in a process that computes nothing.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer as TokenizerBackend
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from kunserve.core.errors import InvalidRequestError, ModelLoadError, RequestTooLargeError

ENCODE_THREADS = 2
T = TypeVar("T")


class Tokenizer:
    """A model's tokenizer and chat template.

    Encoding and template rendering run in a small thread pool, so that a long text never holds up
    the event loop. Decoding is cheap per token and done inline.
    """

    def __init__(self, pretrained: PreTrainedTokenizerFast) -> None:
        self._pretrained = pretrained
        self._backend: TokenizerBackend = pretrained.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._pool = ThreadPoolExecutor(ENCODE_THREADS, thread_name_prefix="tokenizer")
        self._token_bytes: dict[int, bytes] = {}
        self.vocab_size = self._backend.get_vocab_size(with_added_tokens=True)
        # One by one: get_vocab would build a dict of megabytes that the heap never gives back.
        tokens = map(self._backend.id_to_token, range(self.vocab_size))
        self._max_token_chars = max((len(token) for token in tokens if token), default=1)
        self.byte_level = isinstance(self._backend.decoder, ByteLevel)
        self.special_ids = frozenset(
            token_id
            for token_id, token in self._backend.get_added_tokens_decoder().items()
            if token.special
        )

    @classmethod
    def load(cls, model_dir: Path) -> Tokenizer:
        """Load tokenizer.json, tokenizer_config.json and the chat template of a local directory.

        No code of the checkpoint is run and nothing is fetched.

        Raises:
            ModelLoadError: a file is missing or unreadable.
        """
        if not (model_dir / "tokenizer.json").is_file():
            raise ModelLoadError(
                f"{model_dir} has no tokenizer.json; convert it with "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        try:
            pretrained = PreTrainedTokenizerFast.from_pretrained(
                str(model_dir), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelLoadError(f"cannot load the tokenizer in {model_dir}: {error}") from error
        tokenizer = cls(pretrained)
        _return_free_heap()
        return tokenizer

    @property
    def backend(self) -> TokenizerBackend:
        """The `tokenizers` object, for streaming decoders."""
        return self._backend

    def close(self) -> None:
        """Stop the threads; texts still waiting to be encoded are dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------ encoding

    async def encode(self, text: str, add_special_tokens: bool, max_tokens: int) -> tuple[int, ...]:
        """Token ids of `text`.

        Raises:
            RequestTooLargeError: no text of this length can have `max_tokens` tokens or fewer, so
                that it is not even encoded.
        """
        self._check_length(text, max_tokens)
        return await self._in_thread(lambda: self._encode(text, add_special_tokens))

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """Token ids of a conversation, rendered by the model's chat template.

        transformers renders in jinja2's ImmutableSandboxedEnvironment, on plain JSON values only.

        Raises:
            InvalidRequestError: the model has no template, or the template refuses the messages.
            RequestTooLargeError: see `encode`.
        """
        if not self._pretrained.chat_template:
            raise InvalidRequestError(
                "the model has no chat template; use /v1/completions", "messages"
            )

        def render_and_encode() -> tuple[int, ...]:
            text = self._pretrained.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **dict(template_kwargs or {}),
            )
            self._check_length(text, max_tokens)
            return self._encode(text, add_special_tokens)

        try:
            return await self._in_thread(render_and_encode)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise InvalidRequestError(f"chat template: {error}", "messages") from error

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        # Of the backend's calls, only those for batches release the GIL while they work.
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return tuple(encoding.ids)

    def _check_length(self, text: str, max_tokens: int) -> None:
        if len(text) > max_tokens * self._max_token_chars:
            raise RequestTooLargeError(
                f"a prompt of {len(text)} characters cannot fit the context of {max_tokens} tokens"
            )

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    # ------------------------------------------------------------ decoding

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`, without any clean-up of spaces."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for: exact for byte-level tokenizers (where a token may be
        part of a character), else the UTF-8 form of the token's own text."""
        known = self._token_bytes.get(token_id)
        if known is None:
            known = self._token_bytes[token_id] = self._compute_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """A token by itself as text, with U+FFFD where it is not whole characters."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _compute_bytes(self, token_id: int) -> bytes:
        if not self.byte_level:
            return self.decode([token_id], skip_special_tokens=False).encode("utf-8", "replace")
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(_BYTE_OF_CHAR[char] for char in token)
        except KeyError:  # an added token with characters outside of the byte alphabet
            return str(token).encode()


def _return_free_heap() -> None:
    """Give back what parsing tokenizer.json left free in the heap: 30 MiB for 49k tokens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, all others for U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


_BYTE_OF_CHAR = _byte_alphabet()
