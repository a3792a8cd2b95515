"""The HTTP application behind a real uvicorn, with real clients; only the engine is a stand-in."""

import asyncio
import gc
import http.client
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from kunserve.core.errors import (
    InstanceFailedError,
    InvalidRequestError,
    QueueFullError,
    ServiceUnavailableError,
)
from kunserve.core.events import StepTiming
from kunserve.core.ids import InstanceId
from kunserve.runtime.status import TransitionTotals
from kunserve.server import app
from kunserve.server.app import create_app
from kunserve.server.openai_api import Gate
from kunserve.server.settings import GenerationDefaults, ServerConfig
from kunserve.server.tokenizer import Tokenizer
from tests.support.fake_engine import LOAD, MERGED, FakeEngine
from tests.support.tiny_tokenizer import load_tokenizer

DEADLINE_S = 20.0
HI = [{"role": "user", "content": "hi"}]
KEY = "sekret-ключ"
POSTS = ("/v1/completions", "/v1/chat/completions")
ROUTES = ("/v1/models", "/v1/models/tiny", "/health/ready", "/version", "/metrics", "/nowhere")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    loaded = load_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    yield loaded
    loaded.close()


@dataclass
class Server:
    """A running server and what tests need of it."""

    engine: FakeEngine
    tokenizer: Tokenizer
    config: ServerConfig
    port: int = 0
    opened: list[Any] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def http(self, **headers: str) -> httpx.Client:
        client = httpx.Client(base_url=self.url, headers=headers, timeout=DEADLINE_S)
        self.opened.append(client)
        return client

    def openai(self, key: str = "none") -> openai.OpenAI:
        client = openai.OpenAI(
            base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=DEADLINE_S
        )
        self.opened.append(client)
        return client

    def say(self, text: str) -> list[int]:
        """Let the engine answer `text`; its tokens."""
        token_ids = list(self.tokenizer.backend.encode(text, add_special_tokens=False).ids)
        self.engine.reply = token_ids
        return token_ids

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """All events of a stream, which must end by [DONE]."""
        with self.http().stream("POST", path, json={"stream": True, **body}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            text = response.read().decode()
        return parse_events(text)


def parse_events(text: str) -> list[dict[str, Any]]:
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


@pytest.fixture
def start(tokenizer: Tokenizer) -> Iterator[Callable[..., Server]]:
    """Start servers on free ports; all end with the test."""
    running: list[tuple[uvicorn.Server, threading.Thread, Server]] = []

    def run(**settings: Any) -> Server:
        config = ServerConfig(**{"served_model_names": ("tiny", "other")} | settings)
        server = Server(FakeEngine(), tokenizer, config)
        application = create_app(server.engine, tokenizer, config)
        listener = socket.create_server(("127.0.0.1", 0))
        server.port = listener.getsockname()[1]
        front = uvicorn.Server(uvicorn.Config(application, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=front.run, kwargs={"sockets": [listener]})
        thread.start()
        running.append((front, thread, server))
        until(lambda: front.started)
        return server

    yield run
    for front, thread, server in running:
        server.engine.resume()
        for client in server.opened:
            client.close()
        front.should_exit = True
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


@pytest.fixture
def server(start: Callable[..., Server]) -> Server:
    return start()


# ---------------------------------------------------------------- completions


def test_completion(server: Server):
    server.say("hello world")
    answer = server.openai().completions.create(model="tiny", prompt="the cat")
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model) == ("text_completion", "tiny")
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason, choice.index) == ("hello world", "stop", 0)
    assert choice.model_extra is not None
    assert choice.model_extra["stop_reason"] is None
    [call] = server.engine.calls
    assert call.prompt_token_ids == tuple(server.tokenizer.backend.encode("the cat").ids)
    assert call.params.max_tokens == 16
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(call.prompt_token_ids)
    assert answer.usage.completion_tokens == len(server.engine.reply) + 1  # and EOS
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert server.engine.aborted == []


def test_completion_without_model_and_with_the_other_name(server: Server):
    post = server.http().post
    assert post("/v1/completions", json={"prompt": "a"}).json()["model"] == "tiny"
    body = {"prompt": "a", "model": "other"}
    assert post("/v1/completions", json=body).json()["model"] == "other"


def test_completion_of_many_prompts(server: Server):
    server.engine.choose = lambda call: [call.prompt_token_ids[0], int(call.params.seed)]
    body = {"prompt": [[5], [6, 7]], "n": 2, "seed": 30, "return_token_ids": True, "top_k": 5}
    answer = server.http().post("/v1/completions", json=body).json()
    end = server.engine.end_token
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["token_ids"] for choice in answer["choices"]] == [
        [5, 30, end], [5, 31, end], [6, 30, end], [6, 31, end],
    ]  # fmt: skip
    assert [c["prompt_token_ids"] for c in answer["choices"]] == [[5], [5], [6, 7], [6, 7]]
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 12


def test_completion_stream_has_the_same_text(server: Server):
    server.say("hello 日本 world 😀")
    body = {"prompt": "a", "stream_options": {"include_usage": True}, "max_tokens": 60}
    *chunks, last = server.stream("/v1/completions", body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello 日本 world 😀"
    assert {chunk["id"] for chunk in chunks} == {last["id"]}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (
        len(chunks) - 1
    )
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(server.engine.reply) + 1
    assert all("usage" not in chunk for chunk in chunks)


def test_continuous_usage_and_token_ids_in_a_stream(server: Server):
    reply = server.say("hello world")
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": [9, 8], "stream_options": options, "return_token_ids": True}
    *chunks, last = server.stream("/v1/completions", body)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["prompt_token_ids"] == [9, 8]
    assert all("prompt_token_ids" not in choice for choice in choices[1:])
    assert [i for choice in choices for i in choice["token_ids"]] == [*reply, 2]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == len(reply) + 1
    assert chunks[0]["usage"]["prompt_tokens"] == 2


def test_stream_of_many_choices(server: Server):
    server.engine.choose = lambda call: [call.prompt_token_ids[0]] * 3
    body = {"prompt": [[5], [6]], "n": 2, "return_token_ids": True}
    chunks = server.stream("/v1/completions", body)
    by_index: dict[int, list[int]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        by_index.setdefault(choice["index"], []).extend(choice["token_ids"])
    assert by_index == {0: [5, 5, 5, 2], 1: [5, 5, 5, 2], 2: [6, 6, 6, 2], 3: [6, 6, 6, 2]}


def test_length_and_stop_token(server: Server):
    server.say("hello world and the dog")
    answer = server.openai().completions.create(model="tiny", prompt="a", max_tokens=2)
    assert answer.choices[0].finish_reason == "length"
    server.say("hello")
    server.engine.stopped_by_stop_token = True
    post = server.http().post
    body = {"prompt": "a", "stop_token_ids": [2], "skip_special_tokens": False}
    choice = post("/v1/completions", json=body).json()["choices"][0]
    assert (choice["text"], choice["stop_reason"]) == ("hello", 2)
    body["include_stop_str_in_output"] = True
    choice = post("/v1/completions", json=body).json()["choices"][0]
    assert choice["text"] == "hello<|im_end|>"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_and_aborts(server: Server, stream: bool):
    token_ids = server.say("hello world, this is a small corpus")
    server.engine.pause_before = len(token_ids) - 1
    body = {"prompt": "a", "stop": ["nope", "small"], "max_tokens": 100}
    if stream:
        chunks = server.stream("/v1/completions", body)
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        choice = chunks[-1]["choices"][0]
    else:
        choice = server.http().post("/v1/completions", json=body).json()["choices"][0]
        text = choice["text"]
    assert text == "hello world, this is a "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "small")
    until(lambda: len(server.engine.aborted) == 1)


def test_completion_logprobs(server: Server):
    server.say("hello 日")
    client = server.openai()
    answer = client.completions.create(model="tiny", prompt="a", logprobs=2, max_tokens=50)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[:2] == [-9999.0, -0.5]
    offsets = [0]
    for token in logprobs.tokens:
        offsets.append(offsets[-1] + len(token))
    assert logprobs.text_offset == offsets[:-1]
    streamed: dict[str, list[Any]] = {}
    for chunk in server.stream("/v1/completions", {"prompt": "a", "logprobs": 2, "max_tokens": 50}):
        for name, values in chunk["choices"][0]["logprobs"].items():
            streamed.setdefault(name, []).extend(values)
    assert streamed == logprobs.model_dump()


# ---------------------------------------------------------------- chat


def test_chat(server: Server):
    server.say("hello world")
    answer = server.openai().chat.completions.create(model="tiny", messages=HI)
    assert answer.id.startswith("chatcmpl-")
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "hello world")
    assert choice.finish_reason == "stop"
    [call] = server.engine.calls
    prompt = server.tokenizer.decode(call.prompt_token_ids, skip_special_tokens=False)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert call.params.max_tokens == server.engine.max_model_len - len(call.prompt_token_ids)


def test_chat_stream(server: Server):
    server.say("hello 日本")
    stream = server.openai().chat.completions.create(
        model="tiny",
        messages=HI,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_token_ids": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].model_extra is not None
    assert chunks[0].model_extra["prompt_token_ids"] == list(
        server.engine.calls[0].prompt_token_ids
    )
    text = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
    assert text == "hello 日本"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(server.engine.reply) + 1


def test_chat_options(server: Server):
    messages = [*HI, {"role": "assistant", "content": "The cat"}]
    body = {
        "messages": messages,
        "add_generation_prompt": False,
        "continue_final_message": True,
        "return_token_ids": True,
    }
    answer = server.http().post("/v1/chat/completions", json=body).json()
    prompt = server.tokenizer.decode(answer["prompt_token_ids"], skip_special_tokens=False)
    assert prompt.endswith("<|im_start|>assistant\nThe cat")
    assert answer["choices"][0]["token_ids"] == [*server.engine.reply, 2]
    body = {"messages": HI, "chat_template_kwargs": {"prefix": "So"}, "return_token_ids": True}
    answer = server.http().post("/v1/chat/completions", json=body).json()
    prompt = server.tokenizer.decode(answer["prompt_token_ids"], skip_special_tokens=False)
    assert prompt.endswith("assistant\nSo")


def test_chat_logprobs(server: Server):
    server.say("hé")
    answer = server.openai().chat.completions.create(
        model="tiny",
        messages=HI,
        logprobs=True,
        top_logprobs=2,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    joined = b"".join(bytes(token.bytes or ()) for token in logprobs.content[:-1])
    assert joined.decode() == "hé"
    assert [len(token.top_logprobs) for token in logprobs.content] == [2] * len(logprobs.content)


def test_generation_defaults_apply(start: Callable[..., Server]):
    defaults = GenerationDefaults(temperature=0.2, max_tokens_limit=5)
    server = start(generation_defaults=defaults)
    server.http().post("/v1/chat/completions", json={"messages": HI})
    [call] = server.engine.calls
    assert (call.params.temperature, call.params.max_tokens) == (0.2, 5)


# ---------------------------------------------------------------- errors


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert error["message"]
    return dict(error)


def test_openai_client_sees_errors_by_type(server: Server):
    client = server.openai()
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-5", prompt="a")
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt="a", temperature=-1)
    assert (bad.value.param, bad.value.type) == ("temperature", "BadRequestError")
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="tiny", prompt=[5] * 256)
    with pytest.raises(openai.BadRequestError, match="characters"):
        client.completions.create(model="tiny", prompt="a " * 20_000)
    with pytest.raises(openai.BadRequestError, match="unknown role nobody"):
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "nobody", "content": "x"}],
        )
    assert server.engine.calls == []


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "body", [b"", b"{", b"\x00", b"[1]", b"[" * 50_000, b'{"prompt": "\xff"}', b'{"n": NaN}']
)
def test_nonsense_bodies(server: Server, path: str, body: bytes):
    error_of(server.http().post(path, content=body), 400)


def test_empty_prompts(server: Server):
    post = server.http().post
    for prompt in ("", [], [[]], [""]):
        assert error_of(post("/v1/completions", json={"prompt": prompt}), 400)["param"] == "prompt"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ messages[0]['content'] + 1 }}", "chat template"),
        ("{{ absent.field }}", "undefined"),
        ("{% for i in range(1000000000) %}x{% endfor %}", "range"),
        ("{% for i in range(99999) %}xxxxxxxxxx{% endfor %}", "characters"),
        ("", "no chat template"),
        ("{# nothing #}", "empty prompt"),
    ],
)
def test_chat_templates_that_fail_or_misbehave(tmp_path: Path, template: str | None, message: str):
    plain = load_tokenizer(tmp_path, template)
    application = create_app(FakeEngine(), plain, ServerConfig(("tiny",)))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.post("/v1/chat/completions", json={"messages": HI})

    assert message in error_of(asyncio.run(ask()), 400)["message"]
    plain.close()


def test_unknown_routes_and_methods(server: Server):
    http_client = server.http()
    error_of(http_client.get("/nowhere"), 404)
    error_of(http_client.get("/v1/models/"), 404)
    error_of(http_client.get("/docs"), 404)
    error_of(http_client.get("/openapi.json"), 404)
    error_of(http_client.get("/v1/completions"), 405)
    error_of(http_client.post("/health"), 405)
    assert "no route" in error_of(http_client.post("/v1/embeddings"), 404)["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (QueueFullError("the queue is full"), 503),
        (ServiceUnavailableError("starting"), 503),
        (InvalidRequestError("never", "prompt"), 400),
        (InstanceFailedError("secret detail"), 500),
        (ZeroDivisionError("secret detail"), 500),
    ],
)
def test_refusals_have_their_status_in_streams_too(
    server: Server, failure: Exception, status: int, stream: bool
):
    server.engine.fail_before = 0
    server.engine.failure = failure
    response = server.http().post("/v1/completions", json={"prompt": "a", "stream": stream})
    error = error_of(response, status)
    assert ("retry-after" in response.headers) == (status == 503)
    assert "secret" not in error["message"]
    kinds = {400: "invalid", 500: "failed"}
    kind = kinds.get(status) or (
        "queue_full" if isinstance(failure, QueueFullError) else "unavailable"
    )
    assert refusals(server) == {kind: 1}
    assert aborts(server) == 0
    server.engine.fail_before = 99
    assert server.http().post("/v1/completions", json={"prompt": "a"}).status_code == 200


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    ("failure", "code", "kind"),
    [
        (InstanceFailedError("secret detail"), 500, "InternalServerError"),
        (ZeroDivisionError("secret detail"), 500, "InternalServerError"),
        (ServiceUnavailableError("the last instance was lost"), 503, "ServiceUnavailableError"),
    ],
)
def test_error_in_mid_stream_is_an_event(
    server: Server, path: str, failure: Exception, code: int, kind: str
):
    server.engine.fail_before = 2
    server.engine.failure = failure
    *chunks, last = server.stream(path, {"prompt": "a", "messages": HI})
    assert chunks
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert (last["error"]["code"], last["error"]["type"]) == (code, kind)
    assert "secret" not in last["error"]["message"]
    assert refusals(server) == {"failed": 1}
    assert aborts(server) == 0


def test_an_error_after_the_first_token_of_a_whole_answer(server: Server):
    server.engine.fail_before = 2
    server.engine.failure = ServiceUnavailableError("the last instance was lost")
    error_of(server.http().post("/v1/completions", json={"prompt": "a"}), 503)
    assert refusals(server) == {"failed": 1}
    assert aborts(server) == 0


def test_draining(server: Server):
    client = server.http()
    assert client.get("/health/ready").status_code == 200
    server.engine.draining = True
    response = client.post("/v1/completions", json={"prompt": "a"})
    error_of(response, 503)
    assert response.headers["retry-after"]
    with pytest.raises(openai.InternalServerError):
        server.openai().completions.create(model="tiny", prompt="a")
    assert client.get("/health/ready").status_code == 503
    assert client.get("/health").status_code == 200
    assert server.engine.calls == []
    assert refusals(server) == {"unavailable": 2}


def test_while_no_instance_is_ready_the_engine_decides(server: Server):
    """It parks requests for a restart, or refuses them when none will come."""
    client = server.http()
    server.engine.ready = server.engine.healthy = False
    for path in ("/health", "/health/ready"):
        assert client.get(path).status_code == 503
    assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200
    server.engine.fail_before = 0
    server.engine.failure = ServiceUnavailableError("no instance is alive")
    response = client.post("/v1/completions", json={"prompt": "a"})
    assert "no instance is alive" in error_of(response, 503)["message"]
    assert response.headers["retry-after"]


def samples(server: Server) -> dict[str, float]:
    """Metrics by name and labels, as they are written, without the prefix."""
    text = server.http().get("/metrics").text
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name.removeprefix("kunserve:"): float(value) for name, value in lines}


def refusals(server: Server) -> dict[str, float]:
    """What was refused so far, by kind."""
    found = samples(server)
    kinds = ("invalid", "queue_full", "unavailable", "failed")
    name = 'request_refused_total{kind="%s",model_name="tiny"}'
    return {kind: found[name % kind] for kind in kinds if found[name % kind]}


def aborts(server: Server) -> float:
    return samples(server)['request_success_total{finished_reason="abort",model_name="tiny"}']


def test_refused_bodies_are_counted(start: Callable[..., Server]):
    server = start(max_request_body_bytes=1_000)
    post = server.http().post
    for body in (b"{", b'{"prompt": ""}', b'{"prompt": "a", "model": "absent"}', b" " * 2_000):
        assert post("/v1/completions", content=body).status_code in (400, 404, 413)
    assert post("/v1/completions", content=iter([b" " * 2_000])).status_code == 413
    assert post("/nowhere", json={}).status_code == 404
    assert refusals(server) == {"invalid": 5}
    assert aborts(server) == 0


# ---------------------------------------------------------------- keys and limits


def test_key_on_every_route_but_health(start: Callable[..., Server]):
    server = start(api_keys=("other", KEY))
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": KEY.encode()},
        {"authorization": b"Basic " + KEY.encode()},
        {"authorization": "Bearer"},
        {"authorization": b"Bearer \xff\xfe"},
    ):
        client = httpx.Client(base_url=server.url, headers=headers)
        with client:
            for path in ROUTES:
                response = client.get(path)
                assert error_of(response, 401)["type"] == "AuthenticationError"
            for path in POSTS:
                error_of(client.post(path, json={"prompt": "a", "messages": HI}), 401)
            for path in ("/health/", "//health", "/health?x", "/HEALTH", "/%2fhealth"):
                expected = 200 if path == "/health?x" else 401
                assert client.get(path).status_code == expected, path
            assert client.get("/health").status_code == 200
    assert server.engine.calls == []
    good = {"authorization": b"bearer " + KEY.encode()}
    with httpx.Client(base_url=server.url, headers=good) as client:
        assert client.get("/v1/models").status_code == 200
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        server.openai("wrong").models.list()
    assert server.openai("other").models.list().data[0].id == "tiny"


def test_body_limit(start: Callable[..., Server]):
    server = start(max_request_body_bytes=10_000)
    client = server.http()
    fits = json.dumps({"prompt": "a", "user": "x" * 9_900}).encode()
    assert client.post("/v1/completions", content=fits).status_code == 200
    too_large = b" " * 5_000_000
    error = error_of(client.post("/v1/completions", content=too_large), 413)
    assert "--max-request-body-bytes" in error["message"]

    def pieces() -> Iterator[bytes]:
        for _ in range(200):
            yield b" " * 10_000

    for path in POSTS:
        error_of(client.post(path, content=pieces()), 413)
    assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200


def test_slow_body_is_given_up(start: Callable[..., Server]):
    server = start(body_timeout_s=0.05)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=DEADLINE_S)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("content-length", "100")
    connection.endheaders(b'{"prompt":')
    with connection.getresponse() as response:
        assert response.status == 408
        assert json.loads(response.read())["error"]["type"] == "RequestTimeoutError"
    connection.close()


def test_requests_in_preparation_are_bounded(start: Callable[..., Server]):
    server = start(max_preparing=1)
    with socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE_S) as first:
        first.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        client = server.http()
        until(lambda: client.post("/v1/completions", json={"prompt": "a"}).status_code == 503)
    until(lambda: client.post("/v1/completions", json={"prompt": "a"}).status_code == 200)


def test_bytes_in_preparation_are_bounded(
    start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
):
    """Many bodies that each are allowed: beyond the bound 503, and the bytes come back."""
    taken: list[int] = []
    take_bytes = Gate.take_bytes

    def note_and_take(gate: Gate, count: int) -> None:
        take_bytes(gate, count)
        taken.append(count)

    monkeypatch.setattr(app, "MAX_PREPARING_BYTES", 10_000)
    monkeypatch.setattr(Gate, "take_bytes", note_and_take)
    server = start(max_request_body_bytes=10_000)
    client = server.http()
    body = {"prompt": "a", "user": "x" * 6_000}

    def status() -> int:
        return client.post("/v1/completions", json=body).status_code

    assert [status() for _ in range(3)] == [200] * 3
    taken.clear()
    with socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE_S) as first:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9000\r\n\r\n"
        first.sendall(head + b" " * 6_000)
        until(lambda: sum(taken) == 6_000)
        response = client.post("/v1/completions", json=body)
        assert "bytes" in error_of(response, 503)["message"]
        assert response.headers["retry-after"]
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200
    until(lambda: status() == 200)


def test_a_body_larger_than_the_bound_of_all_is_allowed(
    start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(app, "MAX_PREPARING_BYTES", 10)
    server = start(max_request_body_bytes=10_000)
    assert server.http().post("/v1/completions", json={"prompt": "a"}).status_code == 200


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("refused", [False, True])
def test_bodies_are_not_kept(tokenizer: Tokenizer, path: str, refused: bool):
    """Nor their parsed fields: not while a request runs, and not by the error of a refused one.
    Without uvicorn and a client in this process, which keep bodies of their own."""
    size = 4 << 20
    engine = FakeEngine(pause_before=1)
    application = create_app(engine, tokenizer, ServerConfig(("tiny",)))
    temperature = -1 if refused else 1
    fields = {"prompt": "a", "messages": HI, "temperature": temperature, "user": "x" * size}
    bodies = [json.dumps(fields).encode()]
    del fields
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        if not bodies:
            await asyncio.sleep(DEADLINE_S)
        return {"type": "http.request", "body": bodies.pop(), "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        statuses.append(message.get("status", 0))

    async def ask() -> int:
        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
        task = asyncio.create_task(application(scope, receive, send))
        while not (engine.waiting or task.done()):
            await asyncio.sleep(0.005)
        await asyncio.sleep(0)
        kept, peak = tracemalloc.get_traced_memory()
        assert peak > size  # the body was there
        engine.resume()
        if not refused:
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return kept

    gc.collect()
    gc.disable()  # nothing may depend on a collection
    tracemalloc.start()
    try:
        assert asyncio.run(ask()) < size / 4
    finally:
        tracemalloc.stop()
        gc.enable()
    assert statuses[:1] == ([400] if refused else [])


# ---------------------------------------------------------------- clients that go away


def send_raw(server: Server, body: dict[str, Any]) -> socket.socket:
    raw = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE_S)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(raw)}\r\n\r\n"
    connection.sendall(head.encode() + raw)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("pause_before", [0, 2])
def test_disconnect_aborts(server: Server, stream: bool, pause_before: int):
    """Queued (no token yet) and running, streamed or not."""
    server.engine.pause_before = pause_before
    connection = send_raw(server, {"prompt": "a", "stream": stream, "n": 2})
    until(lambda: len(server.engine.waiting) == 2)
    if stream and pause_before:
        assert connection.recv(10).startswith(b"HTTP/1.1 2")
    assert server.engine.aborted == []
    connection.close()
    until(lambda: len(server.engine.aborted) == 2)
    assert sorted(server.engine.aborted) == sorted(call.request_id for call in server.engine.calls)
    until(lambda: aborts(server) == 2)
    assert refusals(server) == {}


def test_disconnect_while_the_body_comes(server: Server):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{"
        )
    assert server.http().post("/v1/completions", json={"prompt": "a"}).status_code == 200
    assert len(server.engine.calls) == 1


def test_disconnect_while_tokenising(start: Callable[..., Server]):
    """The only place for preparation is taken, and free again after the client went away."""
    server = start(max_preparing=1)
    release = threading.Event()
    blockers = [server.tokenizer._pool.submit(release.wait, DEADLINE_S) for _ in range(2)]
    client = server.http()

    def status() -> int:
        return client.post("/v1/completions", json={"prompt": [1]}).status_code

    try:
        connection = send_raw(server, {"prompt": "never computed"})
        until(lambda: status() == 503)
        connection.close()
        until(lambda: status() == 200)
    finally:
        release.set()
    assert all(blocker.result() for blocker in blockers)
    assert {call.prompt_token_ids for call in server.engine.calls} == {(1,)}


def test_one_failed_sequence_aborts_the_others(server: Server):
    server.engine.pause_before = 1
    server.engine.failure = QueueFullError("full")

    def choose(call: Any) -> list[int]:
        if call.prompt_token_ids == (7,):
            raise QueueFullError("full")
        return [1, 2, 3]

    server.engine.choose = choose
    response = server.http().post("/v1/completions", json={"prompt": [[5], [6], [7]]})
    error_of(response, 503)
    until(lambda: len(server.engine.aborted) == 2)
    assert refusals(server) == {"queue_full": 1}
    assert aborts(server) == 0


def test_tokens_that_are_ready_together_share_an_event(server: Server):
    """The engine yields one by one, but without a pause: a slow client would see the same."""
    server.say("hello world")
    chunks = server.stream("/v1/completions", {"prompt": "a", "max_tokens": 60})
    assert len(chunks) == 1
    assert chunks[0]["choices"][0]["text"] == "hello world"


# ---------------------------------------------------------------- other routes


def test_models_and_version(server: Server):
    client = server.openai()
    assert [model.id for model in client.models.list()] == ["tiny", "other"]
    assert client.models.retrieve("other").owned_by == "kunserve"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/absent")
    card = server.http().get("/v1/models").json()["data"][0]
    assert card["max_model_len"] == server.engine.max_model_len
    assert server.http().get("/version").json()["version"]


def test_metrics(server: Server):
    server.say("hello world")
    server.openai().completions.create(model="tiny", prompt="a", max_tokens=50)
    response = server.http().get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    tokens = len(server.engine.reply) + 1
    request, instance = '{model_name="tiny"}', '{engine="0",model_name="tiny"}'
    expected = {
        "num_requests_owned" + request: 1,
        "num_requests_running" + instance: 3,
        "num_requests_waiting" + instance: 2,
        "kv_cache_usage_perc" + instance: 0.25,
        "num_preemptions_total" + instance: 7,
        "prefix_cache_queries_total" + instance: 11,
        "prefix_cache_hits_total" + instance: 5,
        "generation_tokens_total" + request: tokens,
        "prompt_tokens_total" + request: 1,
        "time_to_first_token_seconds_count" + request: 1,
        "inter_token_latency_seconds_count" + request: tokens - 1,
        "request_time_per_output_token_seconds_count" + request: 1,
        "e2e_request_latency_seconds_count" + request: 1,
        "request_generation_tokens_sum" + request: tokens,
        'request_success_total{finished_reason="stop",model_name="tiny"}': 1,
    }
    found = samples(server)
    assert {name: found[name] for name in expected} == expected
    assert 'instance="' not in response.text


def test_metrics_of_a_layout(server: Server):
    """Two instances in one group: what it holds now, and what it would hold without the drop."""
    (group,) = MERGED.groups
    leader, other = MERGED.instances
    server.engine.view = replace(
        MERGED,
        groups=(replace(group, load=replace(LOAD, queued_blocks=16), in_transition="MOVE"),),
        instances=(replace(leader, load=LOAD, timing=StepTiming(9, 10**9, 10**8)), other),
        totals=TransitionTotals(
            outcomes={("drop", "done"): 2, ("drop", "aborted"): 1},
            phase_ns={("drop", "fence"): 40_000_000},
            exchanged_bytes=5,
            gathered_bytes=6,
            gained_bytes=7,
            stalled_requests=3,
            stalled_ns=1_500_000_000,
            degraded_ns=2_000_000_000,
        ),
    )
    found = samples(server)
    model = 'model_name="tiny"'
    used = (100 - 75) * 16
    group_labels = '{engine="0",group="40",model_name="tiny"}'
    expected = {
        "kv_capacity_tokens{%s}": 3200,
        "kv_capacity_tokens_whole{%s}": 1920,
        "kv_used_tokens{%s}": used,
        "kv_queued_tokens{%s}": 16 * 16,
        "kv_capacity_usage_perc{%s}": used / 3200,
        "kv_capacity_usage_perc_whole{%s}": used / 1920,
        "parameter_dropped_bytes{%s}": 1000,
        "layout_epoch{%s}": 4,
        "group_size" + group_labels: 2,
        "group_epoch" + group_labels: 4,
        "group_kv_capacity_tokens" + group_labels: 3200,
        "group_in_transition" + group_labels: 1,
        'transitions_total{kind="drop",%s,outcome="done"}': 2,
        'transitions_total{kind="drop",%s,outcome="aborted"}': 1,
        'transition_phase_seconds_total{kind="drop",%s,phase="fence"}': 0.04,
        "transition_exchanged_bytes_total{%s}": 5,
        "transition_gathered_bytes_total{%s}": 6,
        "transition_gained_bytes_total{%s}": 7,
        "requests_stalled_total{%s}": 3,
        "request_stall_seconds_total{%s}": 1.5,
        "degraded_seconds_total{%s}": 2,
        'instance_pages{engine="0",kind="part",%s}': 5,
        'num_requests_running{engine="0",%s}': 3,
        'num_requests_running{engine="1",%s}': 0,
        'kv_cache_usage_perc{engine="1",%s}': 0,
        'num_preemptions_total{engine="0",%s}': 7,
        'num_preemptions_total{engine="1",%s}': 0,
        'steps_total{engine="0",%s}': 9,
        'step_execute_seconds_total{engine="0",%s}': 1,
        'step_schedule_seconds_total{engine="0",%s}': 0.1,
    }
    expected = {name.replace("%s", model): value for name, value in expected.items()}
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_metrics_without_a_group(server: Server):
    """While all instances restart: capacities are 0, and nothing is divided by it."""
    server.engine.view = replace(MERGED, groups=())
    found = samples(server)
    for name in ("kv_capacity_tokens", "kv_capacity_usage_perc", "kv_capacity_usage_perc_whole"):
        assert found[name + '{model_name="tiny"}'] == 0
    assert not any(name.startswith("group_") for name in found)


def test_an_instance_without_load_shows_zeros(server: Server, monkeypatch: pytest.MonkeyPatch):
    (alive,) = server.engine.status().instances
    dead = replace(alive, instance=InstanceId(1), state="dead", load=None)
    status = replace(server.engine.status(), num_requests=4, instances=(dead,))
    monkeypatch.setattr(server.engine, "status", lambda: status)
    found = samples(server)
    labels = '{engine="1",model_name="tiny"}'
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert found[name + labels] == 0
    assert found['num_requests_owned{model_name="tiny"}'] == 4
