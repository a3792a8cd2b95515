"""The API and the admin API in one process, and how a signal ends both in order. The cluster is a
stand-in; uvicorn, sockets and signals are real."""

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest

from kunserve.core.errors import ConfigError
from kunserve.server.admin import create_admin_app
from kunserve.server.app import create_app
from kunserve.server.serve import Site, _serve_http, bind
from kunserve.server.settings import ServerConfig
from kunserve.server.tokenizer import Tokenizer
from tests.support.fake_engine import FakeCluster, FakeEngine
from tests.support.tiny_tokenizer import load_tokenizer

KEY = "key"
DEADLINE_S = 20.0


class StoppableCluster(FakeCluster):
    """A cluster that notes how it is ended, and drains when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = threading.Event()
        self.drained = threading.Event()
        self.calls: list[str] = []

    def drain(self) -> None:
        self.calls.append("drain")

    def begin_stop(self, at_once: bool = False) -> None:
        self.calls.append(f"stop {at_once}")


class Stand:
    """Two sites before they serve."""

    def __init__(self, tokenizer: Tokenizer, stack: contextlib.ExitStack) -> None:
        self.cluster = StoppableCluster()
        self.engine = FakeEngine()
        listeners = [stack.enter_context(bind("127.0.0.1", 0)) for _ in range(2)]
        self.url, self.admin_url = (
            f"http://127.0.0.1:{listener.getsockname()[1]}" for listener in listeners
        )
        app = create_app(self.engine, tokenizer, ServerConfig(served_model_names=("tiny",)))
        self.api = Site(app, listeners[0], False)
        self.admin = Site(create_admin_app(self.cluster, (KEY,)), listeners[1], False)

    def serve_while(self, use: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
        """Serve until `use` has made the server end; it must have, when it returns."""

        async def main() -> None:
            serving = asyncio.create_task(
                _serve_http(self.api, self.admin, self.cluster, 5.0)  # type: ignore[arg-type]
            )
            async with httpx.AsyncClient(
                headers={"authorization": f"Bearer {KEY}"}, timeout=DEADLINE_S
            ) as client:
                await until_async(lambda: self.answers(client))
                await asyncio.wait_for(use(client), DEADLINE_S)
            await asyncio.wait_for(serving, DEADLINE_S)

        asyncio.run(main())
        for thread in self.cluster.threads:
            thread.join()

    async def answers(self, client: httpx.AsyncClient) -> bool:
        return await is_up(client, self.url) and await is_up(client, self.admin_url)


async def is_up(client: httpx.AsyncClient, url: str) -> bool:
    try:
        await client.get(url + "/version")
    except httpx.TransportError:
        return False
    return True


async def until_async(condition: Callable[[], Awaitable[Any]]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await condition():
            await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    with contextlib.closing(load_tokenizer(tmp_path_factory.mktemp("tokenizer"))) as loaded:
        yield loaded


@pytest.fixture
def stand(tokenizer: Tokenizer) -> Iterator[Stand]:
    before = [(n, signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGINT)]
    with contextlib.ExitStack() as stack:
        yield Stand(tokenizer, stack)
    for number, handler in before:
        signal.signal(number, handler)


def test_a_signal_drains_then_ends_the_api_then_the_admin_api(stand: Stand):
    stand.engine.pause_before = 1

    async def use(client: httpx.AsyncClient) -> None:
        url = stand.url + "/v1/completions"
        stream = asyncio.create_task(client.post(url, json={"prompt": "a", "stream": True}))
        wish = asyncio.create_task(client.post(stand.admin_url + "/admin/drop"))
        await until_async(lambda: ready(stand.engine.waiting and stand.cluster.open))
        os.kill(os.getpid(), signal.SIGTERM)
        await until_async(lambda: ready(stand.cluster.calls == ["drain"]))
        # While the last stream runs, the drain can be watched, and wishes are answered.
        assert (await client.get(stand.admin_url + "/admin/layout")).status_code == 200
        stand.cluster.open[0](False, "the server drains")
        assert (await wish).status_code == 409
        stand.engine.resume()
        assert (await stream).text.endswith("data: [DONE]\n\n")
        stand.cluster.drained.set()
        await until_async(lambda: is_down(client, stand.url))
        await until_async(lambda: is_down(client, stand.admin_url))

    stand.serve_while(use)
    assert stand.cluster.calls == ["drain"]


def test_a_second_signal_does_not_wait(stand: Stand):
    """An open wish is answered by the cluster, which ends."""

    async def use(client: httpx.AsyncClient) -> None:
        wish = asyncio.create_task(client.post(stand.admin_url + "/admin/drop"))
        await until_async(lambda: ready(stand.cluster.open))
        os.kill(os.getpid(), signal.SIGINT)
        await until_async(lambda: ready(stand.cluster.calls == ["drain"]))
        os.kill(os.getpid(), signal.SIGTERM)
        await until_async(lambda: ready(len(stand.cluster.calls) == 2))
        stand.cluster.open[0](False, "the server is shutting down")
        assert (await wish).status_code == 409

    stand.serve_while(use)
    assert stand.cluster.calls == ["drain", "stop True"]


def test_a_cluster_that_fails_ends_both(stand: Stand):
    async def use(client: httpx.AsyncClient) -> None:
        stand.cluster.ended.set()

    stand.serve_while(use)


@pytest.mark.parametrize("which", [0, 1])
def test_a_port_that_somebody_else_listens_on_by_now(tokenizer: Tokenizer, which: int):
    with contextlib.ExitStack() as stack:
        stand = Stand(tokenizer, stack)
        url = (stand.url, stand.admin_url)[which]
        rival = stack.enter_context(bind("127.0.0.1", int(url.rpartition(":")[2])))
        rival.listen()
        with pytest.raises(ConfigError, match="cannot listen on"):
            asyncio.run(
                _serve_http(stand.api, stand.admin, stand.cluster, 5.0)  # type: ignore[arg-type]
            )


async def ready(condition: object) -> bool:
    return bool(condition)


async def is_down(client: httpx.AsyncClient, url: str) -> bool:
    return not await is_up(client, url)
