"""The generating routes: from a request's body to its last byte."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from kunserve.core.errors import (
    InvalidRequestError,
    KunserveError,
    QueueFullError,
    ServiceUnavailableError,
)
from kunserve.core.ids import RequestId
from kunserve.server.answers import (
    AnswerFormat,
    ChatFormat,
    CompletionFormat,
    Envelope,
    SequenceState,
)
from kunserve.server.detokenizer import OutputText
from kunserve.server.engine import EngineClient
from kunserve.server.errors import HttpError, json_response, to_http_error
from kunserve.server.metrics import RequestTimer, SequenceTimer, ServerMetrics
from kunserve.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    Prompt,
    RequestT,
    parse_request,
)
from kunserve.server.settings import ServerConfig
from kunserve.server.streams import Arrival, SequenceSpec, TokenStreams, run_until_disconnect
from kunserve.server.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SSE_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
SSE_DONE = b"data: [DONE]\n\n"
_encode_json = msgspec.json.Encoder().encode


def sse_event(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode_json(content) + b"\n\n"


@dataclass(frozen=True)
class Service:
    """What the routes share."""

    engine: EngineClient
    tokenizer: Tokenizer
    config: ServerConfig
    metrics: ServerMetrics
    seeds: random.Random

    def check_available(self) -> None:
        """Refuse early, before a body is tokenised.

        Raises:
            ServiceUnavailableError: the engine drains. Where no instance takes requests just now
                it is the engine that knows whether one may come back: then they wait.
        """
        if self.engine.status().draining:
            raise ServiceUnavailableError("the server is shutting down")

    def resolve_model(self, name: str | None) -> str:
        """The served name that a request means.

        Raises:
            HttpError: 404, there is no such model.
        """
        names = self.config.served_model_names
        if name is None:
            return names[0]
        if name not in names:
            raise HttpError(404, f"the model `{name[:200]}` does not exist", "model")
        return name


class Gate:
    """Bounds the requests whose bodies are not yet in the engine's own bounded queue: how many
    there are, and how many bytes their bodies have together."""

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self._free_places = max_requests
        self._free_bytes = max_bytes

    @contextlib.contextmanager
    def enter(self) -> Iterator[Place]:
        """Hold one place, until the end of the context if it is not left earlier.

        Raises:
            QueueFullError: there is none.
        """
        if self._free_places < 1:
            raise QueueFullError("too many requests are being read; try again shortly")
        self._free_places -= 1
        place = Place(self)
        try:
            yield place
        finally:
            place.leave()

    def take_bytes(self, count: int) -> None:
        """Count bytes of a body (see `Place.grow`)."""
        if count > self._free_bytes:
            raise QueueFullError("too many bytes of requests are being read; try again shortly")
        self._free_bytes -= count

    def give_back(self, count: int) -> None:
        """A place with a body of `count` bytes is free again."""
        self._free_places += 1
        self._free_bytes += count


class Place:
    """One request's share of a `Gate`."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._num_bytes = 0
        self._left = False

    def grow(self, count: int) -> None:
        """The body has `count` bytes more.

        Raises:
            QueueFullError: all bodies together are too large.
        """
        self._gate.take_bytes(count)
        self._num_bytes += count

    def leave(self) -> None:
        """Free the place; only the first call counts."""
        if not self._left:
            self._left = True
            self._gate.give_back(self._num_bytes)


@dataclass(frozen=True)
class Generation:
    """A request that is ready for the engine."""

    specs: tuple[SequenceSpec, ...]
    states: tuple[SequenceState, ...]
    timer: RequestTimer
    timers: tuple[SequenceTimer, ...]
    format: AnswerFormat

    def advance(self, arrival: Arrival) -> list[dict[str, Any]]:
        """Take in new tokens of one sequence; the chunks that a stream shows for them."""
        envelope = self.format.envelope
        state = self.states[arrival.index]
        if state.finish_reason is not None:
            return []
        options = envelope.options
        delta = state.advance(arrival, envelope.tokenizer, options.logprobs is not None)
        if delta.finish_reason is not None:
            self.timers[arrival.index].end(delta.finish_reason)
        return self.format.chunks(state, delta) if options.stream else []

    @property
    def done(self) -> bool:
        """True when every sequence has ended."""
        return all(state.finish_reason is not None for state in self.states)


class GenerationEndpoint:
    """ASGI application of one generating route.

    It is no request handler that returns a response, because one owner must see the client go
    away in every state: while tokenising, queued, computing, and between two events of a stream.
    """

    def __init__(self, service: Service, gate: Gate) -> None:
        self._service = service
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        timer = RequestTimer(self._service.metrics)
        try:
            with self._gate.enter() as place:
                body = await self._read(Request(scope, receive), place)
                await run_until_disconnect(receive, self._serve(body, place, timer, scope, send))
        except ClientDisconnect:
            pass
        except Exception as error:
            timer.fail(error)
            raise
        finally:
            timer.close()

    async def _read(self, request: Request, place: Place) -> bytearray:
        self._service.check_available()
        body = bytearray()
        try:
            async with asyncio.timeout(self._service.config.body_timeout_s):
                async for piece in request.stream():
                    place.grow(len(piece))
                    body += piece
        except TimeoutError:
            raise HttpError(408, "the request body did not arrive in time") from None
        return body

    async def _serve(
        self, body: bytearray, place: Place, timer: RequestTimer, scope: Scope, send: Send
    ) -> None:
        generation = await self._prepare(body, timer)
        place.leave()
        async with TokenStreams(
            self._service.engine, generation.specs, generation.timers
        ) as streams:
            if generation.format.envelope.options.stream:
                await _send_stream(generation, streams, send)
            else:
                await _send_whole(generation, streams, scope, send)

    async def _prepare(self, body: bytearray, timer: RequestTimer) -> Generation:
        """Parse and tokenise. The body is empty afterwards: of it and of the prompt's text nothing
        is kept while the request runs."""
        raise NotImplementedError

    def _generation(
        self,
        request: CompletionRequest | ChatCompletionRequest,
        prompts: Sequence[tuple[int, ...]],
        identity: str,
        timer: RequestTimer,
    ) -> Generation:
        """Turn tokenised prompts into sequences.

        Raises:
            InvalidRequestError: a parameter is out of range, or a prompt does not fit.
        """
        service = self._service
        logprobs = request.num_logprobs(service.config.max_logprobs)
        stop = request.stop_conditions()
        options = request.output_options(logprobs)
        envelope = Envelope(
            identity,
            int(time.time()),
            service.resolve_model(request.model),
            options,
            service.tokenizer,
            request.count,
        )
        defaults = service.config.generation_defaults
        seed = request.first_seed(service.seeds)
        specs: list[SequenceSpec] = []
        states: list[SequenceState] = []
        timers: list[SequenceTimer] = []
        for prompt in prompts:
            max_tokens = request.max_output_tokens(
                len(prompt), service.engine.max_model_len, defaults.max_tokens_limit
            )
            for answer in range(request.count):
                params = request.sampling_params(
                    max_tokens=max_tokens,
                    seed=seed + answer,
                    logprobs=logprobs,
                    vocab_size=service.engine.vocab_size,
                    defaults=defaults,
                )
                index = len(specs)
                specs.append(SequenceSpec(RequestId(f"{identity}-{index}"), prompt, params))
                text = OutputText(
                    service.tokenizer, prompt, stop, request.skip_special_tokens is not False
                )
                states.append(
                    SequenceState(index, prompt, text, stop.include_in_output, not options.stream)
                )
                timers.append(timer.sequence(len(prompt)))
            service.metrics.n.observe(request.count)
            service.metrics.max_tokens.observe(max_tokens)
        return Generation(tuple(specs), tuple(states), timer, tuple(timers), self._format(envelope))

    def _format(self, envelope: Envelope) -> AnswerFormat:
        raise NotImplementedError


class CompletionEndpoint(GenerationEndpoint):
    """POST /v1/completions."""

    def _format(self, envelope: Envelope) -> AnswerFormat:
        return CompletionFormat(envelope)

    async def _prepare(self, body: bytearray, timer: RequestTimer) -> Generation:
        request = _take_request(body, CompletionRequest)
        service = self._service
        service.resolve_model(request.model)
        prompts = request.prompts(service.engine.vocab_size, service.config.max_sequences)
        encoded = [await self._encode(prompt, request) for prompt in prompts]
        return self._generation(request, encoded, f"cmpl-{uuid.uuid4().hex}", timer)

    async def _encode(self, prompt: Prompt, request: GenerationRequest) -> tuple[int, ...]:
        service = self._service
        if isinstance(prompt, str):
            add_special_tokens = request.add_special_tokens is not False
            prompt = await service.tokenizer.encode(
                prompt, add_special_tokens, service.engine.max_model_len
            )
        if not prompt:
            raise InvalidRequestError("prompt must not be empty", "prompt")
        return prompt


class ChatEndpoint(GenerationEndpoint):
    """POST /v1/chat/completions."""

    def _format(self, envelope: Envelope) -> AnswerFormat:
        return ChatFormat(envelope)

    async def _prepare(self, body: bytearray, timer: RequestTimer) -> Generation:
        request = _take_request(body, ChatCompletionRequest)
        service = self._service
        service.resolve_model(request.model)
        prompt = await service.tokenizer.encode_chat(
            [message.for_template() for message in request.messages],
            max_tokens=service.engine.max_model_len,
            add_generation_prompt=request.adds_generation_prompt,
            continue_final_message=bool(request.continue_final_message),
            add_special_tokens=bool(request.add_special_tokens),
            template_kwargs=request.template_kwargs(),
        )
        if not prompt:
            raise InvalidRequestError("the chat template gave an empty prompt", "messages")
        return self._generation(request, [prompt], f"chatcmpl-{uuid.uuid4().hex}", timer)


def _take_request(body: bytearray, model: type[RequestT]) -> RequestT:
    """Parse `body` and free it, whoever else still refers to it."""
    try:
        return parse_request(body, model)
    finally:
        body.clear()


async def _send_whole(
    generation: Generation, streams: TokenStreams, scope: Scope, send: Send
) -> None:
    while not generation.done:
        await _take(generation, streams)
    body = generation.format.body(generation.states)
    await json_response(body)(scope, _receive_nothing, send)


async def _send_stream(generation: Generation, streams: TokenStreams, send: Send) -> None:
    """Send events as tokens come. The status waits for the first token, so that a request that the
    engine refuses gets its own status instead of an error event."""
    events = await _take(generation, streams)
    await send({"type": "http.response.start", "status": 200, "headers": list(SSE_HEADERS)})
    try:
        while not generation.done:
            await send({"type": "http.response.body", "body": events, "more_body": True})
            events = await _take(generation, streams)
        if generation.format.envelope.options.include_usage:
            events += sse_event(generation.format.usage_chunk(generation.states))
    except OSError:  # the client went away while we wrote; there is nobody to tell
        return
    except Exception as error:  # the status is out: all that is left is an event
        generation.timer.fail(error)
        http_error = to_http_error(error)
        unexpected = not isinstance(error, KunserveError)
        logger.log(
            logging.ERROR if unexpected else logging.WARNING,
            "stream %s ended by an error: %s",
            generation.format.envelope.id,
            error,
            exc_info=unexpected,
        )
        events = sse_event(http_error.body())
    with contextlib.suppress(OSError):
        await send({"type": "http.response.body", "body": events + SSE_DONE, "more_body": False})


async def _take(generation: Generation, streams: TokenStreams) -> bytes:
    """Wait for tokens and take them in; the events that a stream shows for them, in one piece."""
    chunks: list[dict[str, Any]] = []
    for arrival in await streams.next():
        chunks += generation.advance(arrival)
        if generation.states[arrival.index].text.matched is not None:
            streams.abort(arrival.index)
    return _events(chunks)


def _events(chunks: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(map(sse_event, chunks))


async def _receive_nothing() -> Message:
    raise RuntimeError("a plain response reads nothing")
