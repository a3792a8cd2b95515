"""`kunserve serve` as real processes on a tiny model, with real clients."""

import asyncio
import os
import random
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.models import EOS_TOKEN_ID, build_tiny_model
from tests.support.servers import (
    ServerProcess,
    StreamLoad,
    running_server,
    stream_tokens,
    until,
)

KEY = "secret-key"
AUTHORISED = {"authorization": f"Bearer {KEY}"}
HI = [{"role": "user", "content": "hi"}]
CLIENT_TIMEOUT_S = 60.0
KV_BYTES = str(7 * 192 * 1024)
KV_TOKENS = 768
"""One page of each layer."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny_model(directory, "llama", seed=7, max_position_embeddings=2048)
    return directory


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Two instances with so little KVCache that a storm makes them queue and preempt."""
    flags = ["--instances", "2", "--kv-cache-memory-bytes", KV_BYTES, "--api-key", KEY]
    with running_server(tmp_path_factory.mktemp("server"), model, *flags) as running:
        yield running


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with server.openai(KEY) as opened:
        yield opened
    server.wait_idle(KEY)


def extra(**fields: Any) -> dict[str, Any]:
    """Fields that OpenAI's client does not know by name."""
    return {"extra_body": fields}


# ---------------------------------------------------------------- answers


def test_models(client: openai.OpenAI):
    names = [model.id for model in client.models.list()]
    assert names[0] == "tiny"
    card = client.models.retrieve("tiny")
    assert card.max_model_len == KV_TOKENS  # type: ignore[attr-defined]


def test_completion_and_its_stream_agree(client: openai.OpenAI):
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": "the quick brown fox",
        "max_tokens": 60,
        "temperature": 0.8,
        "seed": 5,
        **extra(return_token_ids=True, ignore_eos=True),
    }
    whole = client.completions.create(**asked)
    choice = whole.choices[0]
    assert choice.finish_reason == "length"
    assert whole.usage.completion_tokens == 60
    assert whole.usage.prompt_tokens == len("the quick brown fox")
    assert choice.prompt_token_ids == list(range_ids(client, "the quick brown fox"))
    assert len(choice.token_ids) == 60

    text, ids, reasons, usage = "", [], [], None
    with client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ) as stream:
        for event in stream:
            usage = event.usage or usage
            for part in event.choices:
                text += part.text
                ids += part.token_ids
                reasons += [part.finish_reason] if part.finish_reason else []
    assert (text, ids, reasons) == (choice.text, choice.token_ids, ["length"])
    assert usage == whole.usage


def range_ids(client: openai.OpenAI, text: str) -> list[int]:
    """Token ids of a text, by the server's own word."""
    answer = client.completions.create(
        model="tiny", prompt=text, max_tokens=1, **extra(return_token_ids=True)
    )
    return answer.choices[0].prompt_token_ids  # type: ignore[attr-defined, no-any-return]


def test_chat_and_its_stream_agree(client: openai.OpenAI):
    asked: dict[str, Any] = {
        "model": "tiny", "messages": HI, "max_tokens": 40, "temperature": 0, "seed": 1,
        **extra(ignore_eos=True),
    }  # fmt: skip
    whole = client.chat.completions.create(**asked)
    message = whole.choices[0].message
    assert (message.role, whole.usage.completion_tokens) == ("assistant", 40)
    with client.chat.completions.create(**asked, stream=True) as stream:
        deltas = [part.delta for event in stream for part in event.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == message.content


def test_token_ids_in_and_out(client: openai.OpenAI):
    prompt = [3, 141, 59, 26, 53]
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 20, "temperature": 0}
    fields = extra(return_token_ids=True, ignore_eos=True)
    answer = client.completions.create(prompt=prompt, **asked, **fields)
    choice = answer.choices[0]
    assert choice.prompt_token_ids == prompt
    # What was generated, as a prompt, continues to the same end.
    half = client.completions.create(
        prompt=prompt + choice.token_ids[:10], **{**asked, "max_tokens": 10}, **fields
    )
    assert half.choices[0].token_ids == choice.token_ids[10:]
    # Several prompts of ids, in order.
    both = client.completions.create(prompt=[prompt, [1, 2]], **asked, **fields)
    assert both.choices[0].token_ids == choice.token_ids
    assert both.choices[1].prompt_token_ids == [1, 2]


def test_several_answers(client: openai.OpenAI):
    asked: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 30, "temperature": 1.0}
    fields = extra(return_token_ids=True, ignore_eos=True)
    pair = client.completions.create(n=2, seed=10, **asked, **fields)
    assert [choice.index for choice in pair.choices] == [0, 1]
    assert pair.usage.completion_tokens == 60
    singles = [client.completions.create(seed=10 + i, **asked, **fields) for i in (0, 1)]
    assert [c.token_ids for c in pair.choices] == [s.choices[0].token_ids for s in singles]
    assert pair.choices[0].token_ids != pair.choices[1].token_ids


def test_logprobs(client: openai.OpenAI):
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    # By id: several tokens of this model are the same text (a replacement character).
    fields = extra(ignore_eos=True, return_tokens_as_token_ids=True)
    answer = client.completions.create(prompt="abc", logprobs=3, **asked, **fields)
    given = answer.choices[0].logprobs
    assert len(given.tokens) == 8
    for token, logprob, top in zip(
        given.tokens, given.token_logprobs, given.top_logprobs, strict=True
    ):
        assert len(top) == 3
        assert logprob == max(top.values()) == top[token]  # greedy
        assert logprob < 0
    chat = client.chat.completions.create(
        messages=HI, logprobs=True, top_logprobs=2, **asked, **extra(ignore_eos=True)
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == 8
    assert all(len(entry.top_logprobs) == 2 for entry in content)


def test_stop_strings_and_stop_tokens(client: openai.OpenAI):
    asked: dict[str, Any] = {
        "model": "tiny", "prompt": "stop here", "max_tokens": 40, "temperature": 0,
    }  # fmt: skip
    fields = {"return_token_ids": True, "ignore_eos": True}
    whole = client.completions.create(**asked, **extra(**fields)).choices[0]
    # An ASCII piece of the text, at its first occurrence.
    stop = next(char for char in whole.text[5:] if char.isascii())
    stopped = client.completions.create(**asked, stop=stop, **extra(**fields)).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.stop_reason == stop
    assert stopped.text == whole.text[: whole.text.index(stop)]
    token = whole.token_ids[7]
    by_token = client.completions.create(**asked, **extra(**fields, stop_token_ids=[token]))
    ids = by_token.choices[0].token_ids
    assert by_token.choices[0].finish_reason == "stop"
    assert ids == whole.token_ids[: whole.token_ids.index(token) + 1]


def test_the_end_token_ends(client: openai.OpenAI):
    answer = client.completions.create(
        model="tiny", prompt="x", max_tokens=50, logit_bias={str(EOS_TOKEN_ID): 100},
        **extra(return_token_ids=True),
    )  # fmt: skip
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].token_ids == [EOS_TOKEN_ID]


# ---------------------------------------------------------------- errors


def test_errors_by_type(server: ServerProcess, client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="gpt-5", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    with pytest.raises(openai.BadRequestError, match="prompt"):
        client.completions.create(model="tiny", prompt=[1, 9999])
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="tiny", messages=HI,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )  # fmt: skip
    with server.openai("wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.completions.create(model="tiny", prompt="x")


@pytest.mark.parametrize("stream", [False, True])
def test_too_large_a_request_names_the_limit(client: openai.OpenAI, stream: bool):
    with pytest.raises(openai.BadRequestError, match=str(KV_TOKENS)):
        client.completions.create(model="tiny", prompt=[1] * 700, max_tokens=69, stream=stream)
    with pytest.raises(openai.BadRequestError, match=str(KV_TOKENS)):
        client.completions.create(model="tiny", prompt=[1] * 800, max_tokens=1, stream=stream)


def test_the_largest_request_runs(client: openai.OpenAI):
    answer = client.completions.create(
        model="tiny", prompt=[1] * 700, max_tokens=68, temperature=0, **extra(ignore_eos=True)
    )
    assert answer.usage.total_tokens == KV_TOKENS


# ---------------------------------------------------------------- abort storm

NUM_STORM = 200
NUM_PREFIXES = 5
ABORTED_SHARE = 0.3


def storm_bodies() -> list[dict[str, Any]]:
    """Requests with shared prefixes, some greedy, some drawn."""
    rng = random.Random(1)
    prefixes = [[rng.randrange(256) for _ in range(48)] for _ in range(NUM_PREFIXES)]
    return [
        {
            "prompt": rng.choice(prefixes) + [rng.randrange(256) for _ in range(rng.randrange(60))],
            "max_tokens": rng.randrange(1, 60),
            "temperature": rng.choice([0.0, 0.9]),
            "seed": index,
            "ignore_eos": True,
        }
        for index in range(NUM_STORM)
    ]


async def fetch(client: httpx.AsyncClient, body: dict[str, Any], tokens: list[int]) -> None:
    """The same without streaming."""
    wanted = {"return_token_ids": True, **body}
    response = await client.post("/v1/completions", json=wanted)
    assert response.status_code == 200, response.text
    tokens += response.json()["choices"][0]["token_ids"]


async def ask_all(
    url: str, bodies: list[dict[str, Any]], leave_after: dict[int, float | int]
) -> list[list[int]]:
    """All requests at once, every other one streaming. `leave_after[i]`: seconds (a float) or
    tokens (an int) after which the client of request i goes away."""
    tokens: list[list[int]] = [[] for _ in bodies]

    async def ask(index: int) -> None:
        task = asyncio.create_task(
            (stream_tokens if index % 2 else fetch)(client, bodies[index], tokens[index])
        )
        limit = leave_after.get(index)
        if isinstance(limit, float):
            await asyncio.wait((task,), timeout=limit)
        while isinstance(limit, int) and len(tokens[index]) < limit and not task.done():
            await asyncio.sleep(0.002)
        if limit is not None:
            task.cancel()
        gone = (await asyncio.gather(task, return_exceptions=True))[0]
        if limit is None and gone is not None:
            assert isinstance(gone, str), gone

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, headers=AUTHORISED, timeout=CLIENT_TIMEOUT_S, limits=limits
    ) as client:
        await asyncio.gather(*map(ask, range(len(bodies))))
    return tokens


def test_abort_storm(server: ServerProcess):
    """200 requests at once, 30 % of whose clients leave: all blocks come back, and the other
    answers are those of a run in which nobody left."""
    bodies = storm_bodies()
    calm = asyncio.run(ask_all(server.url, bodies, {}))
    assert [len(tokens) for tokens in calm] == [body["max_tokens"] for body in bodies]
    server.wait_idle(KEY)
    before = totals(server)

    rng = random.Random(2)
    leaving = rng.sample(range(NUM_STORM), int(NUM_STORM * ABORTED_SHARE))
    leave_after: dict[int, float | int] = {}
    for index in leaving:
        tokens = rng.randrange(1, 10) if index % 2 and rng.random() < 0.5 else None
        leave_after[index] = tokens if tokens else rng.choice([0.0, 0.05, 0.2, 1.0]) * rng.random()
    storm = asyncio.run(ask_all(server.url, bodies, leave_after))
    for index, (tokens, expected) in enumerate(zip(storm, calm, strict=True)):
        if index in leave_after:  # a stream that broke off was right up to there
            assert tokens == expected[: len(tokens)]
        else:
            assert tokens == expected
    server.wait_idle(KEY)
    after = totals(server)
    assert after["prefix_cache_hits_total"] > before["prefix_cache_hits_total"]
    assert before["num_preemptions_total"] > 0  # memory was short indeed
    # Some left before their end, and what they left was not computed to it.
    computed = (
        after["instance_generation_tokens_total"] - before["instance_generation_tokens_total"]
    )
    assert computed < sum(body["max_tokens"] for body in bodies)


def totals(server: ServerProcess) -> dict[str, float]:
    """Metrics summed over the instances."""
    summed: dict[str, float] = defaultdict(float)
    for (name, _), value in server.metrics(KEY).items():
        summed[name] += value
    return summed


# ---------------------------------------------------------------- the queue's bound

LONG: dict[str, Any] = {"prompt": "long", "max_tokens": 1500, "temperature": 0, "ignore_eos": True}


def test_a_full_queue_is_503_and_the_others_go_on(model: Path, tmp_path: Path):
    flags = ["--max-num-queued-reqs", "1", "--max-num-seqs", "1"]
    body = LONG
    with running_server(tmp_path, model, *flags) as server:
        with StreamLoad(server.url, [body]) as running:
            running.wait_tokens(1)
            with StreamLoad(server.url, [body]) as queued:
                until(
                    lambda: server.metrics().get(("num_requests_waiting", "0")) == 1.0,
                    "one request waits",
                )
                (instance,) = server.instances()
                signal_process(instance, signal.SIGSTOP)  # so that the queue stays as it is
                for stream in (False, True):
                    refused = httpx.post(
                        server.url + "/v1/completions", json={**body, "stream": stream}
                    )
                    assert refused.status_code == 503
                    assert int(refused.headers["retry-after"]) > 0
                    assert "--max-num-queued-reqs" in refused.json()["error"]["message"]
                with server.openai() as client, pytest.raises(openai.APIStatusError) as caught:
                    client.completions.create(model="tiny", prompt="x")
                assert caught.value.status_code == 503
                assert isinstance(caught.value, openai.InternalServerError)
                signal_process(instance, signal.SIGCONT)
                assert running.result() == queued.result()
        server.wait_idle()


# ---------------------------------------------------------------- shutdown


def test_sigterm_lets_streams_end(model: Path, tmp_path: Path):
    """Signals to a whole group reach the instances too (Ctrl-C, a service manager): they stay."""
    with running_server(tmp_path, model, "--instances", "2") as server:
        with StreamLoad(server.url, [LONG, LONG]) as load, httpx.Client() as other:
            load.wait_tokens(5)
            for pid in server.instances():
                signal_process(pid, signal.SIGTERM)
                signal_process(pid, signal.SIGINT)
            server.signal(signal.SIGTERM)
            until(lambda: "draining" in server.log, "the drain")
            refused = other.post(server.url + "/v1/completions", json=LONG)
            assert refused.status_code == 503
            assert other.get(server.url + "/health/ready").status_code == 503
            tokens = load.result()
            assert [len(each) for each in tokens] == [1500, 1500]
            assert "was lost" not in server.log
        assert server.wait() == 0


def signal_process(pid: int, number: signal.Signals) -> None:
    signal.pidfd_send_signal(os.pidfd_open(pid), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(model: Path, tmp_path: Path, number: signal.Signals):
    with running_server(tmp_path, model) as server, StreamLoad(server.url, [LONG] * 4) as load:
        load.wait_tokens(5)
        server.signal(number)
        until(lambda: "draining" in server.log, "the drain")
        server.signal(number)
        assert server.wait(8) == 0
        assert min(map(len, load.tokens)) < LONG["max_tokens"]
        with pytest.raises(AssertionError, match="shutting down"):
            load.result()


@pytest.mark.parametrize("timeout", ["0", "0.5"])
def test_shutdown_timeout_aborts(model: Path, tmp_path: Path, timeout: str):
    """Streams still open are told, by an error event, that they are not complete."""
    with running_server(tmp_path, model, "--shutdown-timeout", timeout) as server:
        with StreamLoad(server.url, [LONG] * 4) as load:
            load.wait_tokens(5)
            server.signal(signal.SIGTERM)
            assert server.wait(8) == 0
            with pytest.raises(AssertionError, match="shutting down"):
                load.result()
        assert "--shutdown-timeout has passed" in server.log
