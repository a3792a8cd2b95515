"""The load generator against a tiny OpenAI endpoint on the loopback, well-behaved and not."""

import argparse
import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from kunserve.bench.client import (
    BenchError,
    ErrorKind,
    LoadOptions,
    LoadResult,
    RequestRecord,
    first_model,
    run_load,
)
from kunserve.bench.serve import add_arguments, run
from kunserve.bench.workload import NS_PER_S, Workload, WorkloadRequest

Body = dict[str, Any]
STEP_S = 0.01


@dataclass
class FakeServer:
    """An endpoint that counts: the test sets `answer`, the server keeps what was asked."""

    base_url: str = ""
    answer: Callable[[Body], Response] | None = None
    models: Response | None = None
    bodies: list[Body] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    client_ports: list[int] = field(default_factory=list)
    open_now: int = 0
    open_most: int = 0


def event(payload: Body) -> str:
    return f"data: {json.dumps(payload, ensure_ascii=False)}\n\n"


def usage(body: Body, output_tokens: int) -> Body:
    prompt_tokens = len(body.get("prompt", []))
    return {
        "choices": [],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": output_tokens},
    }


def streaming(chunks: AsyncIterator[str]) -> Response:
    return StreamingResponse(chunks, media_type="text/event-stream")


def one_token_at_a_time(server: FakeServer, body: Body) -> Response:
    async def chunks() -> AsyncIterator[str]:
        server.open_now += 1
        server.open_most = max(server.open_most, server.open_now)
        try:
            for index in range(body["max_tokens"]):
                await asyncio.sleep(STEP_S)
                last = index == body["max_tokens"] - 1
                choice = {"text": "\u2028x", "finish_reason": "length" if last else None}
                yield event({"choices": [choice]})
        finally:
            server.open_now -= 1
        yield event(usage(body, body["max_tokens"]))
        yield "data: [DONE]\n\n"

    return streaming(chunks())


def chat_stream(body: Body) -> Response:
    async def chunks() -> AsyncIterator[str]:
        yield event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for _ in range(body["max_tokens"]):
            yield event({"choices": [{"delta": {"content": "x"}, "finish_reason": None}]})
        yield event({"choices": [{"delta": {}, "finish_reason": "length"}]})
        yield "data: [DONE]\n\n"

    return streaming(chunks())


def three_tokens_in_a_chunk(body: Body) -> Response:
    async def chunks() -> AsyncIterator[str]:
        yield event({"choices": [{"text": "", "token_ids": [], "finish_reason": None}]})
        yield event({"choices": [{"text": "a", "token_ids": [7]}]})
        await asyncio.sleep(STEP_S)
        yield event(
            {"choices": [{"text": "bc", "token_ids": [8, 9, 10], "finish_reason": "length"}]}
        )
        yield event(usage(body, 4))
        yield "data: [DONE]\n\n"

    return streaming(chunks())


def ends_without_done(_: Body) -> Response:
    async def chunks() -> AsyncIterator[str]:
        yield event({"choices": [{"text": "x", "finish_reason": None}]})

    return streaming(chunks())


def says_error_in_the_stream(_: Body) -> Response:
    async def chunks() -> AsyncIterator[str]:
        yield event({"choices": [{"text": "x", "finish_reason": None}]})
        yield event({"error": {"message": "instance lost", "code": 500}})
        yield "data: [DONE]\n\n"

    return streaming(chunks())


def sends_no_json(_: Body) -> Response:
    async def chunks() -> AsyncIterator[str]:
        yield "data: what?\n\n"

    return streaming(chunks())


def sends_no_token(_: Body) -> Response:
    async def chunks() -> AsyncIterator[str]:
        yield "data: [DONE]\n\n"

    return streaming(chunks())


def never_ends(_: Body) -> Response:
    async def chunks() -> AsyncIterator[str]:
        yield event({"choices": [{"text": "x", "finish_reason": None}]})
        await asyncio.sleep(5)

    return streaming(chunks())


def openai_503(_: Body) -> Response:
    return JSONResponse({"error": {"message": "the queue is full"}}, status_code=503)


def make_app(server: FakeServer) -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> Response:
        return server.models or JSONResponse({"data": [{"id": "fake-model"}]})

    @app.post("/v1/completions")
    @app.post("/v1/chat/completions")
    async def completions(request: Request) -> Response:
        body = await request.json()
        server.bodies.append(body)
        server.headers.append(dict(request.headers))
        if request.client is not None:
            server.client_ports.append(request.client.port)
        return server.answer(body) if server.answer else one_token_at_a_time(server, body)

    return app


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    listener = socket.create_server(("127.0.0.1", 0))
    fake.base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config = uvicorn.Config(
        make_app(fake), log_level="critical", lifespan="off", timeout_graceful_shutdown=1
    )
    host = uvicorn.Server(config)
    thread = threading.Thread(target=host.run, kwargs={"sockets": [listener]})
    thread.start()
    while not host.started:
        time.sleep(0.005)
    yield fake
    host.should_exit = True
    host.force_exit = True
    thread.join(timeout=10)
    listener.close()
    assert not thread.is_alive()


def steady(count: int, gap_ms: int = 0, output_tokens: int = 4) -> Workload:
    gap_ns = gap_ms * 1_000_000
    return Workload(
        "steady", tuple(WorkloadRequest(i * gap_ns, 16, output_tokens) for i in range(count))
    )


def load(server: FakeServer, workload: Workload, **options: Any) -> LoadResult:
    return asyncio.run(run_load(server.base_url, "m", workload, LoadOptions(**options)))


def only_error(result: LoadResult) -> tuple[ErrorKind, str, int | None]:
    (record,) = result.records
    assert record.error is not None
    return record.error.kind, record.error.message, record.error.status


# Answers


def test_every_token_is_timed_and_the_lengths_are_exact(server: FakeServer) -> None:
    result = load(server, steady(3), seed=1, api_key="k")
    assert [r.error for r in result.records] == [None] * 3
    for record in result.records:
        assert (record.prompt_tokens, record.output_tokens) == (16, 4)
        assert len(record.token_ns) == 4
        assert record.ttft_ns is not None
        assert record.ttft_ns >= STEP_S * NS_PER_S * 0.9
        assert record.tpot_ns is not None
        assert STEP_S * 0.5 < record.tpot_ns / NS_PER_S < 1
        assert record.token_ns[-1] <= record.end_ns <= result.duration_ns
    assert not result.interrupted
    for body, headers in zip(server.bodies, server.headers, strict=True):
        assert headers["authorization"] == "Bearer k"
        assert len(body["prompt"]) == 16
        assert all(1000 <= token < 20000 for token in body["prompt"])
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 4, 0.0)
        assert body["ignore_eos"] is body["stream"] is body["return_token_ids"] is True
        assert body["stream_options"] == {"include_usage": True}
    prompts = {tuple(body["prompt"]) for body in server.bodies}
    assert len(prompts) == 3
    load(server, steady(3), seed=1)
    assert {tuple(body["prompt"]) for body in server.bodies} == prompts


def test_chat_counts_only_deltas_with_content(server: FakeServer) -> None:
    server.answer = chat_stream
    (record,) = load(server, steady(1), endpoint="chat").records
    assert record.error is None
    assert (len(record.token_ns), record.output_tokens, record.prompt_tokens) == (4, 4, 16)
    (message,) = server.bodies[0]["messages"]
    assert len(message["content"].split()) == 16


def test_a_chunk_of_several_tokens_counts_by_its_ids(server: FakeServer) -> None:
    server.answer = three_tokens_in_a_chunk
    (record,) = load(server, steady(1)).records
    assert record.output_tokens == len(record.token_ns) == 4
    assert len(set(record.token_ns)) == 2


# Arrivals


def test_arrivals_do_not_wait_for_answers(server: FakeServer) -> None:
    # Ten requests 5 ms apart, each 40 ms long: sent one by one this would take 400 ms.
    result = load(server, steady(10, gap_ms=5))
    assert server.open_most > 3
    for record in result.records:
        assert record.send_lag_ns is not None
        assert 0 <= record.send_lag_ns < NS_PER_S


def test_concurrency_is_bounded_and_its_wait_is_lag(server: FakeServer) -> None:
    result = load(server, steady(6), max_concurrency=2)
    assert server.open_most == 2
    assert all(record.error is None for record in result.records)
    lags_ns = [record.send_lag_ns or 0 for record in result.records]
    assert lags_ns == sorted(lags_ns)
    assert lags_ns[-1] >= 2 * 4 * STEP_S * NS_PER_S * 0.9


def test_connections_are_used_again(server: FakeServer) -> None:
    load(server, steady(5, output_tokens=1), max_concurrency=1)
    assert len(server.client_ports) == 5
    assert len(set(server.client_ports)) == 1


# Failures


@pytest.mark.parametrize(
    ("answer", "kind", "message", "status"),
    [
        (openai_503, ErrorKind.HTTP, "the queue is full", 503),
        (
            lambda _: PlainTextResponse("gateway", status_code=502),
            ErrorKind.HTTP,
            "gateway",
            502,
        ),
        (ends_without_done, ErrorKind.TRUNCATED, "without [DONE]", 200),
        (says_error_in_the_stream, ErrorKind.STREAM_ERROR, "instance lost", None),
        (sends_no_json, ErrorKind.MALFORMED, "what?", None),
        (sends_no_token, ErrorKind.MALFORMED, "without a token", 200),
    ],
)
def test_failures_are_recorded_by_kind(
    server: FakeServer,
    answer: Callable[[Body], Response],
    kind: ErrorKind,
    message: str,
    status: int | None,
) -> None:
    server.answer = answer
    found_kind, found_message, found_status = only_error(load(server, steady(1)))
    assert (found_kind, found_status) == (kind, status)
    assert message in found_message


def test_a_request_that_does_not_end_times_out(server: FakeServer) -> None:
    server.answer = never_ends
    result = load(server, steady(1), timeout_s=0.2)
    assert only_error(result)[0] is ErrorKind.TIMEOUT
    assert len(result.records[0].token_ns) == 1


def test_nobody_listening_is_a_connection_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    nobody = FakeServer(base_url=f"http://127.0.0.1:{port}")
    assert only_error(load(nobody, steady(1)))[0] is ErrorKind.CONNECTION
    with pytest.raises(BenchError, match="cannot ask"):
        asyncio.run(first_model(nobody.base_url, LoadOptions()))


@pytest.mark.parametrize(
    ("promised", "kind"), [(b"", ErrorKind.CONNECTION), (b"header", ErrorKind.TRUNCATED)]
)
def test_a_connection_cut_before_or_within_the_answer(promised: bytes, kind: ErrorKind) -> None:
    payload = event({"choices": [{"text": "x", "finish_reason": None}]}).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + payload if promised else b""

    def cut_once(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(head)
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=cut_once, args=(listener,))
        thread.start()
        cut = FakeServer(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}")
        result = load(cut, steady(1))
        thread.join()
    assert only_error(result)[0] is kind
    assert len(result.records[0].token_ns) == (1 if promised else 0)


def test_one_failure_leaves_the_others_alone(server: FakeServer) -> None:
    def fail_second(body: Body) -> Response:
        if len(server.bodies) == 2:
            return openai_503(body)
        return one_token_at_a_time(server, body)

    server.answer = fail_second
    done: list[RequestRecord] = []
    result = asyncio.run(
        run_load(server.base_url, "m", steady(4), LoadOptions(), on_done=done.append)
    )
    assert [r.index for r in result.records] == [0, 1, 2, 3]
    assert sum(r.error is not None for r in result.records) == 1
    assert sorted(r.index for r in done) == [0, 1, 2, 3]


def test_stopping_records_what_is_open_as_interrupted(server: FakeServer) -> None:
    async def stopped_run() -> LoadResult:
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(0.3, stop.set)
        workload = Workload(
            "w",
            (WorkloadRequest(0, 4, 2), WorkloadRequest(0, 4, 500), WorkloadRequest(10**11, 4, 2)),
        )
        return await run_load(server.base_url, "m", workload, LoadOptions(), stop=stop)

    result = asyncio.run(stopped_run())
    finished, cut, unsent = result.records
    assert result.interrupted
    assert finished.error is None
    assert cut.error is not None
    assert cut.error.kind is ErrorKind.INTERRUPTED
    assert len(cut.token_ns) > 1
    assert (unsent.sent_ns, unsent.token_ns) == (None, ())


@pytest.mark.parametrize(
    "base_url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host:port", ""]
)
def test_a_base_url_that_is_none_is_refused(base_url: str) -> None:
    with pytest.raises(BenchError, match="base URL"):
        asyncio.run(run_load(base_url, "m", steady(1), LoadOptions()))


# The command


def command(*flags: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(flags))


SHORT = ("--num-prompts", "3", "--random-input-len", "8", "--random-output-len", "2")


def test_the_command_reports_and_writes_json(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    flags = ("--base-url", server.base_url, *SHORT, "--json", str(out), "--progress", "always")
    assert command(*flags) == 0
    captured = capsys.readouterr()
    assert "random on fake-model" in captured.out
    assert "3/3" in captured.err
    document = json.loads(out.read_text(encoding="utf-8"))
    assert (document["summary"]["completed"], document["model"]) == (3, "fake-model")


def test_json_to_stdout_is_only_json(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--base-url", server.base_url, "--model", "m", *SHORT, "--json", "-") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["summary"]["completed"] == 3
    assert "TTFT" in captured.err


def test_the_command_replays_a_trace(server: FakeServer, tmp_path: Path) -> None:
    trace = tmp_path / "burst.csv"
    trace.write_text(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "100,ChatGPT,20,2,22,API log\n101,ChatGPT,9,0,9,API log\n102,ChatGPT,3,1,4,API log\n"
    )
    flags = ("--dataset-name", "burstgpt", "--dataset-path", str(trace), "--time-scale", "0.05")
    assert command("--base-url", server.base_url, "--max-prompt-tokens", "10", *flags) == 0
    assert sorted(len(body["prompt"]) for body in server.bodies) == [3, 10]


def test_failed_requests_exit_with_1(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = openai_503
    assert command("--base-url", server.base_url, *SHORT) == 1
    assert "3 x http 503: the queue is full" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--dataset-name", "azure"), "needs --dataset-path"),
        (("--dataset-name", "azure", "--dataset-path", "/no/such"), "/no/such"),
        (("--dataset-name", "azure", "--burstiness", "2"), "--burstiness does not apply"),
        (("--rate-scale", "2"), "--rate-scale does not apply"),
        (("--rate-steps", "0-2"), "--rate-steps must be like"),
        (("--rate-steps", "0:2", "--request-rate", "1"), "not both"),
        (("--request-rate", "0"), "must be > 0"),
        (("--seed", "-1"), "--seed"),
        (("--max-concurrency", "0"), "concurrency"),
        (("--vocab-high", "5"), "vocab"),
        (("--json", "/no/such/dir/out.json"), "--json"),
        (("--base-url", "nonsense"), "base URL"),
        (("--base-url", "http://host:port"), "base URL"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(
    flags: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*flags) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def refuse_models(server: FakeServer) -> None:
    server.models = JSONResponse({"error": {"message": "missing or wrong API key"}}, 401)


def serve_a_page(server: FakeServer) -> None:
    server.models = PlainTextResponse("<html>")


def stop_listening(server: FakeServer) -> None:
    server.base_url = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (refuse_models, "the server answered 401: missing or wrong API key"),
        (serve_a_page, "names no model"),
        (stop_listening, "cannot ask"),
    ],
)
def test_a_server_that_cannot_be_asked_exits_with_1_and_one_line(
    server: FakeServer,
    capsys: pytest.CaptureFixture[str],
    prepare: Callable[[FakeServer], None],
    expected: str,
) -> None:
    prepare(server)
    assert command("--base-url", server.base_url, "--api-key", "wrong", *SHORT) == 1
    captured = capsys.readouterr()
    assert expected in captured.err
    assert "mozilla" not in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_ctrl_c_reports_what_was_measured(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    timer = threading.Timer(0.5, signal.raise_signal, (signal.SIGINT,))
    timer.start()
    flags = ("--num-prompts", "50", "--request-rate", "10", "--random-output-len", "2")
    assert command("--base-url", server.base_url, *flags) == 130
    timer.join()
    text = capsys.readouterr().out
    assert "(interrupted)" in text
    assert "TTFT" in text
