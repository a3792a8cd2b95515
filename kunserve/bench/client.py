"""The load generator: sends a workload open loop and records when every token arrived.

Requests go out at their arrival time on the monotonic clock, whatever became of the earlier ones;
only `max_concurrency` makes one wait. Each request ends as one frozen `RequestRecord`, with an
error in it where it failed: nothing is dropped. All times of a record are ns since the run began.
"""

import asyncio
import contextlib
import enum
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import httpx

from kunserve.bench.workload import (
    NS_PER_S,
    RandomStream,
    Workload,
    WorkloadRequest,
    stream_rng,
)
from kunserve.core.errors import KunserveError

Endpoint = Literal["completions", "chat"]

_PATHS: Mapping[Endpoint, str] = {
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
}
# Each is one token in the usual byte-pair vocabularies, so a chat prompt is about as long as asked.
_CHAT_WORDS = ("time", "water", "people", "house", "light", "story", "river", "music", "paper")
_MESSAGE_CHARS = 300


class BenchError(KunserveError):
    """The run cannot start as it was asked for."""


class ServerError(BenchError):
    """The server cannot be asked at all, so there is nothing to measure."""


class ErrorKind(enum.StrEnum):
    """Why a request failed; the values are keys of the JSON report."""

    HTTP = "http"
    CONNECTION = "connection"
    TIMEOUT = "timeout"
    TRUNCATED = "truncated"
    STREAM_ERROR = "stream_error"
    MALFORMED = "malformed"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class RequestError:
    """One failure; `status` is the HTTP status where an answer came at all."""

    kind: ErrorKind
    message: str
    status: int | None = None


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What became of one request. Times are ns since the start of the run.

    `token_ns` has the arrival of every token the stream showed; tokens of one chunk share a time.
    `prompt_tokens` and `output_tokens` are the server's usage where it was sent, else what was
    asked and what was seen. `sent_ns` is None for a request the run was stopped before.
    """

    index: int
    request: WorkloadRequest
    sent_ns: int | None
    end_ns: int
    token_ns: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    error: RequestError | None

    @property
    def send_lag_ns(self) -> int | None:
        """Time from the scheduled arrival to the send: the client's own delay."""
        return None if self.sent_ns is None else self.sent_ns - self.request.arrival_ns

    @property
    def ttft_ns(self) -> int | None:
        """Time from the send to the first token."""
        if self.sent_ns is None or not self.token_ns:
            return None
        return self.token_ns[0] - self.sent_ns

    @property
    def e2e_ns(self) -> int | None:
        """Time from the send to the last token."""
        if self.sent_ns is None or not self.token_ns:
            return None
        return self.token_ns[-1] - self.sent_ns

    @property
    def tpot_ns(self) -> float | None:
        """(e2e - TTFT) / (output tokens - 1); None with fewer than two tokens."""
        if self.output_tokens < 2 or not self.token_ns:
            return None
        return (self.token_ns[-1] - self.token_ns[0]) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How requests are sent.

    Prompts are token ids drawn from [vocab_low, vocab_high) by `seed`; chat prompts are words, so
    their length is approximate. `timeout_s` bounds one request from send to end, None never ends.
    """

    endpoint: Endpoint = "completions"
    max_concurrency: int | None = None
    seed: int = 0
    vocab_low: int = 1000
    vocab_high: int = 20000
    ignore_eos: bool = True
    temperature: float = 0.0
    return_token_ids: bool = True
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float | None = None
    connect_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            BenchError: an option is out of range.
        """
        if self.endpoint not in _PATHS:
            raise BenchError(f"the endpoint must be one of {', '.join(_PATHS)}")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise BenchError("the maximum concurrency must be at least 1")
        if not 0 <= self.vocab_low < self.vocab_high:
            raise BenchError("token ids need 0 <= vocab low < vocab high")
        if self.timeout_s is not None and self.timeout_s <= 0:
            raise BenchError("the request timeout must be positive")


@dataclass(frozen=True, slots=True)
class LoadResult:
    """One record per request of the workload, in its order, and how long the run took."""

    base_url: str
    model: str
    workload: Workload
    options: LoadOptions
    records: tuple[RequestRecord, ...]
    duration_ns: int
    interrupted: bool


# Server-sent events


class SseDecoder:
    """Splits a byte stream into the data of its server-sent events.

    Lines end in LF, CR LF or CR and nothing else: httpx's own line iterator also splits at the
    Unicode separators that may stand inside a JSON string.
    """

    def __init__(self) -> None:
        self._pending = b""
        self._data: list[str] = []
        self._at_start = True

    def feed(self, received: bytes) -> list[str]:
        """Take bytes as they came and return the data of the events they complete."""
        buffer = self._pending + received
        if self._at_start and len(buffer) >= 3:
            buffer = buffer.removeprefix(b"\xef\xbb\xbf")
            self._at_start = False
        # A CR at the end may be the first half of a CR LF: keep it for the next bytes.
        held = b"\r" if buffer.endswith(b"\r") else b""
        whole = buffer.removesuffix(held).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, rest = whole.split(b"\n")
        self._pending = rest + held
        return [event for line in lines for event in self._take_line(line)]

    def _take_line(self, line: bytes) -> Iterator[str]:
        if not line:
            if self._data:
                yield "\n".join(self._data)
                self._data = []
            return
        name, _, value = line.decode("utf-8", errors="replace").partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))


# One request


@dataclass(slots=True)
class _Progress:
    """What is known of one request while it runs."""

    index: int
    request: WorkloadRequest
    body: bytes
    sent_ns: int | None = None
    end_ns: int | None = None
    token_ns: list[int] = field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    finished: bool = False
    error: RequestError | None = None

    def record(self, now_ns: int) -> RequestRecord:
        error = self.error
        if self.end_ns is None:
            error = RequestError(ErrorKind.INTERRUPTED, "the run was stopped")
        return RequestRecord(
            index=self.index,
            request=self.request,
            sent_ns=self.sent_ns,
            end_ns=now_ns if self.end_ns is None else self.end_ns,
            token_ns=tuple(self.token_ns),
            prompt_tokens=_first(self.prompt_tokens, self.request.prompt_tokens),
            output_tokens=_first(self.output_tokens, len(self.token_ns)),
            error=error,
        )


def _first(measured: int | None, otherwise: int) -> int:
    return otherwise if measured is None else measured


class _StreamError(Exception):
    """An event of the stream that ends the request as a failure."""

    def __init__(self, error: RequestError) -> None:
        super().__init__(error.message)
        self.error = error


def _take_event(progress: _Progress, event: str, now_ns: int) -> None:
    """Note what one event says: tokens, usage, the end or an error."""
    if event == "[DONE]":
        progress.finished = True
        return
    try:
        payload = json.loads(event)
        if not isinstance(payload, dict):
            raise TypeError("not an object")
        if payload.get("error"):
            message = _error_message(payload)
            raise _StreamError(RequestError(ErrorKind.STREAM_ERROR, message))
        for choice in payload.get("choices") or ():
            progress.token_ns.extend([now_ns] * _count_tokens(choice))
        usage = payload.get("usage")
        if usage:
            progress.prompt_tokens = int(usage["prompt_tokens"])
            progress.output_tokens = int(usage["completion_tokens"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        shown = event[:_MESSAGE_CHARS]
        message = f"not a completion chunk ({type(error).__name__}: {error}): {shown}"
        raise _StreamError(RequestError(ErrorKind.MALFORMED, message)) from error


def _count_tokens(choice: Mapping[str, Any]) -> int:
    """Return how many tokens a chunk bears: by its ids, else one if it is a token at all.

    A completion chunk without text is still a token (part of a character, a special token) unless
    it only tells the finish reason; a chat chunk without text only opens or closes the message.
    """
    token_ids = choice.get("token_ids")
    if token_ids is not None:
        return len(token_ids)
    delta = choice.get("delta")
    if delta is not None:
        return 1 if delta.get("content") or delta.get("reasoning_content") else 0
    return 1 if choice.get("text") or choice.get("finish_reason") is None else 0


def _error_message(payload: Any) -> str:
    """Return the message of an error answer, in OpenAI's or FastAPI's shape."""
    found = payload
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    text = found if isinstance(found, str) else json.dumps(found)
    return text[:_MESSAGE_CHARS]


async def _http_error(response: httpx.Response) -> RequestError:
    text = (await response.aread()).decode("utf-8", errors="replace")
    message = text[:_MESSAGE_CHARS] or response.reason_phrase
    with contextlib.suppress(ValueError):
        message = _error_message(json.loads(text))
    return RequestError(ErrorKind.HTTP, message, response.status_code)


# The run


class _Clients:
    """Clients of one connection each, reused by the request that comes next to the same server.
    Request number i goes to server i modulo their number.

    One shared httpx pool goes through all its connections whenever one is freed: a thousand streams
    that end together hold the event loop for seconds, and that shows up as the server's latency.
    """

    def __init__(self, base_url: str, options: LoadOptions) -> None:
        self._base_urls = base_url.split(",")
        self._options = options
        self._tls = httpx.create_ssl_context(trust_env=False)
        self._idle: list[list[httpx.AsyncClient]] = [[] for _ in self._base_urls]
        self._open = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        # A base URL that is none is refused before the run, not by its first request.
        for server, idle in enumerate(self._idle):
            idle.append(await self._make(server))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open.aclose()

    async def _make(self, server: int) -> httpx.AsyncClient:
        client = make_client(self._base_urls[server], self._options, self._tls)
        return await self._open.enter_async_context(client)

    @contextlib.asynccontextmanager
    async def borrow(self, index: int) -> AsyncIterator[httpx.AsyncClient]:
        """Lend a client to request number `index`."""
        server = index % len(self._base_urls)
        idle = self._idle[server]
        client = idle.pop() if idle else await self._make(server)
        try:
            yield client
        finally:
            idle.append(client)


class _Run:
    """One run of a workload: the requests under way and the clock they share."""

    def __init__(
        self,
        clients: _Clients,
        url: str,
        options: LoadOptions,
        progress: list[_Progress],
        on_done: Callable[[RequestRecord], None] | None,
    ) -> None:
        self._clients = clients
        self._url = url
        self._options = options
        self._progress = progress
        self._on_done = on_done
        limit = options.max_concurrency or len(progress) or 1
        self._slots = asyncio.Semaphore(limit)
        self._start_ns = time.monotonic_ns()

    def now_ns(self) -> int:
        """Return the time since the run began."""
        return time.monotonic_ns() - self._start_ns

    async def send_all(self) -> None:
        """Send every request at its arrival time and wait until all have ended."""
        async with asyncio.TaskGroup() as group:
            for progress in self._progress:
                wait_ns = progress.request.arrival_ns - self.now_ns()
                if wait_ns > 0:
                    await asyncio.sleep(wait_ns / NS_PER_S)
                group.create_task(self._send(progress))

    async def _send(self, progress: _Progress) -> None:
        async with self._slots:
            progress.sent_ns = self.now_ns()
            try:
                async with asyncio.timeout(self._options.timeout_s):
                    await self._stream(progress)
            except _StreamError as failure:
                progress.error = failure.error
            except TimeoutError:
                # After [DONE] the answer is whole: that the connection lingers is no failure.
                if not progress.finished:
                    message = f"no end after {self._options.timeout_s} s"
                    progress.error = RequestError(ErrorKind.TIMEOUT, message)
            except httpx.TimeoutException as error:
                progress.error = RequestError(ErrorKind.TIMEOUT, _describe(error))
            except httpx.RequestError as error:
                progress.error = RequestError(ErrorKind.CONNECTION, _describe(error))
            if progress.end_ns is None:
                progress.end_ns = self.now_ns()
            progress.body = b""
        if self._on_done is not None:
            self._on_done(progress.record(self.now_ns()))

    async def _stream(self, progress: _Progress) -> None:
        """Read one answer to its end; a stream that ends without [DONE] was cut."""
        decoder = SseDecoder()
        async with (
            self._clients.borrow(progress.index) as client,
            client.stream("POST", self._url, content=progress.body) as response,
        ):
            if response.status_code != httpx.codes.OK:
                raise _StreamError(await _http_error(response))
            cut = "the stream ended without [DONE]"
            try:
                async for received in response.aiter_bytes():
                    self._take_bytes(progress, decoder, received)
            except (httpx.NetworkError, httpx.ProtocolError, httpx.DecodingError) as error:
                cut = _describe(error)
        if not progress.finished:
            raise _StreamError(RequestError(ErrorKind.TRUNCATED, cut, response.status_code))
        if not progress.token_ns:
            message = "the stream finished without a token"
            raise _StreamError(RequestError(ErrorKind.MALFORMED, message, response.status_code))

    def _take_bytes(self, progress: _Progress, decoder: SseDecoder, received: bytes) -> None:
        now_ns = self.now_ns()
        for event in decoder.feed(received):
            if progress.finished:
                return
            _take_event(progress, event, now_ns)
            if progress.finished:
                progress.end_ns = now_ns


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")[:_MESSAGE_CHARS]


async def run_load(
    base_url: str,
    model: str,
    workload: Workload,
    options: LoadOptions,
    *,
    on_done: Callable[[RequestRecord], None] | None = None,
    stop: asyncio.Event | None = None,
) -> LoadResult:
    """Send a workload and return what became of every request.

    Args:
        base_url: the server, without `/v1`; several, separated by commas, take turns.
        model: the model name sent with each request.
        workload: what to send and when; the run starts at its time 0.
        options: how to send it.
        on_done: called with each request's record as it ends.
        stop: setting it ends the run; requests still open are recorded as interrupted.

    Raises:
        BenchError: the base URL is not one.
    """
    stop = stop or asyncio.Event()
    # Bodies are built before the clock starts, so that encoding long prompts delays no request.
    progress = [
        _Progress(index, request, request_body(index, request, model, options))
        for index, request in enumerate(workload.requests)
    ]
    async with _Clients(base_url, options) as clients:
        run = _Run(clients, _PATHS[options.endpoint], options, progress, on_done)
        sending = asyncio.create_task(run.send_all())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((sending, stopping), return_when=asyncio.FIRST_COMPLETED)
            interrupted = not sending.done()
        finally:
            await _cancel(stopping)
            await _cancel(sending)
    now_ns = run.now_ns()
    records = tuple(one.record(now_ns) for one in progress)
    return LoadResult(
        base_url=base_url,
        model=model,
        workload=workload,
        options=options,
        records=records,
        duration_ns=max((record.end_ns for record in records), default=0),
        interrupted=interrupted,
    )


async def _cancel(task: asyncio.Task[Any]) -> None:
    """End a task; an error it met, other than being cancelled, is raised here."""
    task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled():
        task.result()


def request_body(index: int, request: WorkloadRequest, model: str, options: LoadOptions) -> bytes:
    """Return the JSON body of one request; the prompt depends on the seed and the index alone."""
    rng = stream_rng(options.seed, RandomStream.PROMPTS, index)
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": request.output_tokens,
        "temperature": options.temperature,
        "ignore_eos": options.ignore_eos,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.return_token_ids:
        body["return_token_ids"] = True
    if options.endpoint == "chat":
        picks = rng.integers(0, len(_CHAT_WORDS), size=request.prompt_tokens)
        text = " ".join(_CHAT_WORDS[pick] for pick in picks)
        body["messages"] = [{"role": "user", "content": text}]
    else:
        ids = rng.integers(options.vocab_low, options.vocab_high, size=request.prompt_tokens)
        body["prompt"] = ids.tolist()
    return json.dumps(body, separators=(",", ":")).encode()


def make_client(
    base_url: str, options: LoadOptions, tls: ssl.SSLContext | None = None
) -> httpx.AsyncClient:
    """Return a client for one request at a time, without a limit of its own on reading time.

    Proxies of the environment are not used: they would be part of what is measured.

    Raises:
        BenchError: the base URL is not one.
    """
    try:
        parsed = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise BenchError(f"the base URL {base_url!r} is not a URL: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise BenchError(f"the base URL {base_url!r} must be like http://127.0.0.1:8000")
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if options.api_key is not None:
        headers["Authorization"] = f"Bearer {options.api_key}"
    return httpx.AsyncClient(
        base_url=parsed,
        headers=headers,
        timeout=httpx.Timeout(None, connect=options.connect_timeout_s),
        # Idle connections are given up before a server does (uvicorn: 5 s), or a request could go
        # out on one that is just being closed.
        limits=httpx.Limits(keepalive_expiry=2.0),
        verify=tls or True,
        trust_env=False,
    )


async def first_model(base_url: str, options: LoadOptions) -> str:
    """Ask the server for its models and return the first.

    Raises:
        BenchError: the base URL is not one.
        ServerError: the server does not answer, refuses or serves no model.
    """
    async with make_client(base_url, options) as client:
        try:
            response = await client.get("/v1/models", timeout=options.connect_timeout_s)
            if response.status_code != httpx.codes.OK:
                refusal = await _http_error(response)
                raise ServerError(f"the server answered {refusal.status}: {refusal.message}")
            return str(response.json()["data"][0]["id"])
        except httpx.HTTPError as error:
            message = f"cannot ask {base_url} for its models: {_describe(error)}"
            raise ServerError(message) from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ServerError(
                f"{base_url}/v1/models names no model; is it an OpenAI-compatible server?"
            ) from error
