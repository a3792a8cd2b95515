"""The admin API over a cluster that answers on command: keys, shapes, refusals, waiting wishes."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest

from kunserve.core.errors import ConfigError
from kunserve.core.events import WishKind
from kunserve.core.ids import TransitionId
from kunserve.core.transition import PhaseTime, TransitionRecord
from kunserve.runtime.status import ClusterView
from kunserve.server.admin import MAX_BODY_BYTES, OnAnswer, create_admin_app
from tests.support.fake_engine import APART, LOAD, MERGED, FakeCluster

KEY = "sekret-ключ"
POSTS = ("/admin/layout", "/admin/drop", "/admin/restore", "/admin/drain", "/admin/policy")


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster()


def with_client(
    cluster: FakeCluster,
    use: Callable[[httpx.AsyncClient], Awaitable[None]],
    key: bytes | None = KEY.encode(),
) -> None:
    """Run `use` with a client of the app; `key` None sends none."""
    app = create_admin_app(cluster, ("other", KEY))
    headers = {} if key is None else {b"authorization": b"Bearer " + key}

    async def main() -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://admin", headers=headers
        ) as client:
            await asyncio.wait_for(use(client), 20)

    asyncio.run(main())
    for thread in cluster.threads:
        thread.join()


def ask(
    cluster: FakeCluster, method: str, path: str, key: bytes | None = KEY.encode(), **body: Any
) -> httpx.Response:
    answers: list[httpx.Response] = []

    async def use(client: httpx.AsyncClient) -> None:
        answers.append(await client.request(method, path, **body))

    with_client(cluster, use, key)
    return answers[0]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert error["message"]
    return dict(error)


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize("key", [None, b"wrong", b"", b"\xff\xfe", KEY.encode()[:-1]])
@pytest.mark.parametrize("path", [*POSTS, "/admin/nowhere", "/"])
def test_no_route_without_a_key(cluster: FakeCluster, key: bytes | None, path: str):
    for method in ("GET", "POST"):
        response = ask(cluster, method, path, key)
        assert error_of(response, 401)["type"] == "AuthenticationError"
    assert cluster.wishes == []


def test_each_key_opens(cluster: FakeCluster):
    for key in (b"other", KEY.encode()):
        assert ask(cluster, "GET", "/admin/layout", key).status_code == 200


@pytest.mark.parametrize("keys", [(), ("",), ("a", "")])
def test_an_app_without_a_key_is_refused(cluster: FakeCluster, keys: tuple[str, ...]):
    with pytest.raises(ConfigError, match="--admin-key"):
        create_admin_app(cluster, keys)


# ---------------------------------------------------------------- shapes


def test_the_layout(cluster: FakeCluster):
    busy = replace(APART.groups[0], load=replace(LOAD, queued_blocks=6))
    ready = replace(APART.instances[0], costs=(1.5, 2.0))
    cluster.view = replace(
        APART,
        groups=(busy, APART.groups[1]),
        instances=(ready, APART.instances[1]),
        at_ns=7,
    )
    response = ask(cluster, "GET", "/admin/layout")
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {
        "at_ns": 7,
        "epoch": 3,
        "groups": [
            {
                "id": 30 + index,
                "epoch": 3,
                "stages": [{"instance": index, "layers": [0, 30]}],
                "kv_tokens": 1600,
                "kv_tokens_whole": 960,
                "kv_tokens_used": (400, None)[index],
                "kv_tokens_queued": (96, None)[index],
                "num_requests": 4,
                "num_waiting": (2, 0)[index],
                "in_transition": None,
            }
            for index in range(2)
        ],
        "instances": [
            {
                "id": 0, "pid": 71, "state": "ready", "pages": {"part": 5, "free": 2},
                "costs": [1.5, 2.0],
            },
            {"id": 1, "pid": None, "state": "waiting for restart", "pages": {}, "costs": []},
        ],
        "dropped_bytes": 0,
        "last_decision": None,
        "policy": {"name": "", "drop": False},
        "last_transition": None,
    }  # fmt: skip


def test_the_last_transition(cluster: FakeCluster):
    source, target = APART.groups[0].group, MERGED.groups[0].group
    cluster.view = ClusterView(
        last_transition=TransitionRecord(
            TransitionId(9), "drop", "operator", "aborted", "no links", (source,), (target,),
            (PhaseTime("prepare", 5_000_000),),
        )
    )  # fmt: skip
    last = ask(cluster, "GET", "/admin/layout").json()["last_transition"]
    assert last.pop("figures")["phases_ns"] == {"prepare": 5_000_000}
    assert last.pop("text").startswith("drop #9 (operator): 0[0:30] -> 0[0:12]|1[12:30]")
    assert last == {
        "id": 9, "kind": "drop", "why": "operator", "outcome": "aborted", "reason": "no links",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "wish"),
    [
        ("/admin/layout", {"groups": [[0, 1], [3, 2]]},
         (WishKind.LAYOUT, ((0, 1), (3, 2)))),
        ("/admin/drop", {}, (WishKind.DROP, ())),
        ("/admin/restore", {}, (WishKind.RESTORE, ())),
        ("/admin/drain", {"instance": 1}, ("drain", 1)),
        ("/admin/policy", {"drop": False}, ("policy", False)),
    ],
)  # fmt: skip
def test_a_granted_wish_shows_the_new_layout(
    cluster: FakeCluster, path: str, body: dict[str, Any], wish: tuple[object, ...]
):
    cluster.script = cluster.grant
    response = ask(cluster, "POST", path, json=body)
    assert response.status_code == 200
    answer = response.json()
    assert cluster.wishes == [wish]
    assert answer.pop("message") == "epoch 4"
    assert answer == ask(cluster, "GET", "/admin/layout").json()
    assert answer["groups"][0]["stages"] == [
        {"instance": 0, "layers": [0, 12]},
        {"instance": 1, "layers": [12, 30]},
    ]
    assert (answer["epoch"], answer["groups"][0]["kv_tokens"]) == (4, 3200)


@pytest.mark.parametrize("body", [b"", b"{}", b" {} "])
def test_an_empty_body_is_an_empty_object(cluster: FakeCluster, body: bytes):
    cluster.script = cluster.grant
    for path in ("/admin/drop", "/admin/restore"):
        assert ask(cluster, "POST", path, content=body).status_code == 200


# ---------------------------------------------------------------- refusals


def test_a_wish_that_cannot_be_now_is_a_conflict(cluster: FakeCluster):
    cluster.script = lambda answer: answer(False, "a transition is under way")
    error = error_of(ask(cluster, "POST", "/admin/drop"), 409)
    assert error["message"] == "a transition is under way"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/admin/layout", {"groups": [[0, 0]]}, "groups"),
        ("/admin/drain", {"instance": 7}, "instance"),
        ("/admin/drop", {}, None),
    ],
)
def test_an_illegal_wish(cluster: FakeCluster, path: str, body: dict[str, Any], param: str | None):
    cluster.script = lambda answer: answer(False, "illegal: no such instance")
    error = error_of(ask(cluster, "POST", path, json=body), 400)
    assert (error["message"], error["param"]) == ("no such instance", param)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/admin/layout", b"", "groups"),
        ("/admin/layout", b"{}", "groups"),
        ("/admin/layout", b'{"groups": null}', "groups"),
        ("/admin/layout", b'{"groups": []}', "groups"),
        ("/admin/layout", b'{"groups": [[]]}', "groups"),
        ("/admin/layout", b'{"groups": [0, 1]}', "groups"),
        ("/admin/layout", b'{"groups": [["0"]]}', "groups"),
        ("/admin/layout", b'{"groups": [[true]]}', "groups"),
        ("/admin/layout", b'{"groups": [[0.0]]}', "groups"),
        ("/admin/layout", b'{"groups": [[-1]]}', "groups"),
        ("/admin/layout", b'{"groups": [[9999999999999999999999]]}', "groups"),
        ("/admin/layout", b'{"groups": [[0]], "group": 1}', "group"),
        ("/admin/drop", b'{"instances": [0]}', "instances"),
        ("/admin/restore", b'{"x": 1}', "x"),
        ("/admin/drain", b"", "instance"),
        ("/admin/policy", b"", "drop"),
        ("/admin/policy", b'{"drop": 0}', "drop"),
        ("/admin/policy", b'{"drop": "false"}', "drop"),
        ("/admin/drain", b'{"instance": "1"}', "instance"),
        ("/admin/drain", b'{"instance": true}', "instance"),
        ("/admin/drain", b'{"instance": 1.5}', "instance"),
        ("/admin/drain", b'{"instance": [1]}', "instance"),
        ("/admin/drop", b"[]", None),
        ("/admin/drop", b"null", None),
        ("/admin/drop", b"{", None),
        ("/admin/drop", b"\xff", None),
        ("/admin/drop", b'{"a": NaN}', None),
        ("/admin/drop", b"[" * 5000, None),
    ],
)
def test_nonsense_is_a_400_that_names_the_field(
    cluster: FakeCluster, path: str, body: bytes, param: str | None
):
    error = error_of(ask(cluster, "POST", path, content=body), 400)
    assert error["param"] == param
    assert param is None or error["message"].startswith(param)
    assert cluster.wishes == []


def test_bodies_are_bounded(cluster: FakeCluster):
    cluster.script = cluster.grant
    fits = b" " * (MAX_BODY_BYTES - 2) + b"{}"
    assert ask(cluster, "POST", "/admin/drop", content=fits).status_code == 200
    error_of(ask(cluster, "POST", "/admin/drop", content=b" " + fits), 413)

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    error_of(ask(cluster, "POST", "/admin/drop", content=pieces()), 413)


def test_unknown_routes_and_methods(cluster: FakeCluster):
    for path in ("/", "/admin", "/admin/", "/admin/nowhere", "/admin/layout/", "/metrics"):
        error_of(ask(cluster, "GET", path), 404)
    for path in ("/admin/drop", "/admin/restore", "/admin/drain"):
        error_of(ask(cluster, "GET", path), 405)
    error = error_of(ask(cluster, "DELETE", "/admin/layout"), 405)
    assert error["type"] == "MethodNotAllowedError"


def test_a_defect_leaks_nothing(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch):
    def broken(*args: object) -> None:
        raise ValueError("secret")

    monkeypatch.setattr(cluster, "wish", broken)
    error = error_of(ask(cluster, "POST", "/admin/drop"), 500)
    assert "secret" not in json.dumps(error)


# ---------------------------------------------------------------- waiting


def test_wishes_wait_for_their_own_answers(cluster: FakeCluster):
    """Three at once, answered in another order; meanwhile the layout can be looked at."""

    async def use(client: httpx.AsyncClient) -> None:
        names = ("drop", "restore", "drop")
        tasks = []
        for count, name in enumerate(names, 1):
            tasks.append(asyncio.create_task(client.post(f"/admin/{name}")))
            while len(cluster.open) < count:
                await asyncio.sleep(0.001)
        assert (await client.get("/admin/layout")).json()["epoch"] == 3
        assert not any(task.done() for task in tasks)
        cluster.in_thread(cluster.open[1], False, "second")
        assert error_of(await tasks[1], 409)["message"] == "second"
        cluster.in_thread(cluster.open[2], True, "third")
        cluster.in_thread(cluster.open[0], False, "illegal:first")
        assert (await tasks[2]).json()["message"] == "third"
        assert error_of(await tasks[0], 400)["message"] == "first"

    with_client(cluster, use)
    assert [kind for kind, _ in cluster.wishes] == [
        WishKind.DROP, WishKind.RESTORE, WishKind.DROP,
    ]  # fmt: skip


def test_an_answer_at_once_and_one_twice(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch):
    """A cluster that has ended answers in the caller's thread; only the first answer counts."""

    def at_once(kind: WishKind, groups: object, on_answer: OnAnswer) -> None:
        on_answer(False, "the server is shutting down")
        on_answer(True, "no")

    monkeypatch.setattr(cluster, "wish", at_once)
    error = error_of(ask(cluster, "POST", "/admin/drop"), 409)
    assert error["message"] == "the server is shutting down"


def test_an_answer_after_the_loop_has_closed_is_dropped(cluster: FakeCluster):
    async def use(client: httpx.AsyncClient) -> None:
        task = asyncio.create_task(client.post("/admin/drop"))
        while not cluster.open:
            await asyncio.sleep(0.001)
        task.cancel()

    with_client(cluster, use)
    cluster.open[0](True, "too late")
