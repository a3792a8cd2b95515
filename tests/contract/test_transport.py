"""Control sockets: only admitted keys are heard, in order, whole, and closing leaves nothing."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq

from kunserve.core.events import Heartbeat, LeaseRequest
from kunserve.core.ids import Epoch, GroupId, InstanceId, RequestId
from kunserve.core.request import Request, SamplingParams
from kunserve.runtime.codec import CodecError, LoadProgress, Shutdown, StartFailed
from kunserve.runtime.transport import ClientKeys, FrontSocket, InstanceSocket

DEADLINE_S = 20.0
UNHEARD_S = 0.5
"""How long a test listens for something that must not come; an admitted peer needs 2 ms."""


@pytest.fixture
def front() -> Iterator[FrontSocket]:
    with FrontSocket() as socket:
        yield socket


@pytest.fixture
def connect() -> Iterator[Callable[[ClientKeys], InstanceSocket]]:
    opened: list[InstanceSocket] = []

    def run(keys: ClientKeys) -> InstanceSocket:
        opened.append(InstanceSocket(keys))
        return opened[-1]

    yield run
    for socket in opened:
        socket.close(linger_ms=0)


def receive(socket: FrontSocket | InstanceSocket, count: int) -> list[Any]:
    """The next `count` messages."""
    messages: list[Any] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(messages) < count:
        left_ms = int((deadline - time.monotonic()) * 1000)
        assert left_ms > 0, f"{len(messages)} of {count} came"
        socket.socket.poll(left_ms)
        messages += socket.receive()
    assert len(messages) == count
    return messages


def heard(front: FrontSocket) -> list[tuple[str, Any]]:
    """What comes within a while in which an admitted peer would long have been heard."""
    front.socket.poll(int(UNHEARD_S * 1000))
    return list(front.receive())


def progress(index: int) -> LoadProgress:
    return LoadProgress(InstanceId(0), 0, f"step {index}", 0.5)


def lease(prompt_token_ids: tuple[int, ...]) -> LeaseRequest:
    params = SamplingParams(max_tokens=1, seed=0)
    request = Request(RequestId("r"), prompt_token_ids, params, 0)
    return LeaseRequest(InstanceId(0), GroupId(0), Epoch(0), request)


def test_both_directions(front: FrontSocket, connect: Callable[..., InstanceSocket]):
    one = connect(front.admit("1#0"))
    two = connect(front.admit("2#0"))
    one.send(Heartbeat(InstanceId(1), 0))
    two.send(Heartbeat(InstanceId(2), 0))
    assert sorted(receive(front, 2)) == [
        ("1#0", Heartbeat(InstanceId(1), 0)),
        ("2#0", Heartbeat(InstanceId(2), 0)),
    ]
    assert front.send("2#0", Shutdown())
    assert receive(two, 1) == [Shutdown()]
    assert list(one.receive()) == []


def test_order_is_kept(front: FrontSocket, connect: Callable[..., InstanceSocket]):
    """Both ways, also for what is sent before the connection stands."""
    count = 3000
    instance = connect(front.admit("0#0"))
    for index in range(count):
        instance.send(progress(index))
    assert receive(front, count) == [("0#0", progress(index)) for index in range(count)]
    for index in range(count):
        assert front.send("0#0", progress(index))
    assert receive(instance, count) == [progress(index) for index in range(count)]


def test_a_big_message_arrives_whole(front: FrontSocket, connect: Callable[..., InstanceSocket]):
    instance = connect(front.admit("0#0"))
    big = StartFailed(InstanceId(0), 0, "é" * (8 << 20))
    instance.send(big)
    assert receive(front, 1) == [("0#0", big)]
    prompt = lease(tuple(range(1 << 20)))
    assert front.send("0#0", prompt)
    assert receive(instance, 1) == [prompt]


def test_sending_to_nobody_says_so(front: FrontSocket, connect: Callable[..., InstanceSocket]):
    assert not front.send("0#0", Shutdown())
    keys = front.admit("0#0")
    assert not front.send("0#0", Shutdown())
    instance = connect(keys)
    instance.send(progress(0))
    receive(front, 1)
    assert front.send("0#0", Shutdown())


# ---------------------------------------------------------------- who is heard


@pytest.fixture
def stranger(front: FrontSocket) -> ClientKeys:
    """Everything right but the pair of keys, which is nobody's."""
    public, secret = zmq.curve_keypair()
    keys = front.admit("0#0")
    return replace(keys, public_key=public.decode(), secret_key=secret.decode())


def test_an_unknown_key_is_not_admitted(
    front: FrontSocket, connect: Callable[..., InstanceSocket], stranger: ClientKeys
):
    connect(stranger).send(progress(0))
    assert heard(front) == []
    assert not front.send("0#0", Shutdown())


def test_another_server_key_does_not_connect(
    front: FrontSocket, connect: Callable[..., InstanceSocket]
):
    """An instance talks to its own front only."""
    public, _ = zmq.curve_keypair()
    connect(replace(front.admit("0#0"), server_key=public.decode())).send(progress(0))
    assert heard(front) == []


@pytest.mark.parametrize("mechanism", ["null", "plain"])
def test_no_other_mechanism_is_admitted(front: FrontSocket, mechanism: str):
    keys = front.admit("0#0")
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.linger = 0
        peer.routing_id = b"0#0"
        if mechanism == "plain":
            peer.plain_username, peer.plain_password = b"admin", b"admin"
        peer.connect(keys.endpoint)
        peer.send_multipart([b"Shutdown", b"\x80"])
        assert heard(front) == []


def test_the_key_of_one_front_opens_no_other(
    front: FrontSocket, connect: Callable[..., InstanceSocket]
):
    with FrontSocket() as other:
        foreign = replace(
            other.admit("0#0"),
            endpoint=front.admit("0#0").endpoint,
            server_key=front.admit("0#0").server_key,
        )
        connect(foreign).send(progress(0))
        assert heard(front) == []
        assert list(other.receive()) == []


def test_a_dismissed_key_opens_nothing(front: FrontSocket, connect: Callable[..., InstanceSocket]):
    old, new = front.admit("0#0"), front.admit("0#1")
    front.dismiss(old.public_key)
    connect(old).send(progress(0))
    assert heard(front) == []
    connect(new).send(progress(1))
    assert receive(front, 1) == [("0#1", progress(1))]
    front.dismiss(old.public_key)  # twice is no error


def test_an_admitted_peer_that_talks_nonsense(
    front: FrontSocket, connect: Callable[..., InstanceSocket]
):
    """It is named as such, and what comes after it is still heard."""
    instance = connect(front.admit("0#0"))
    instance.socket.send_multipart([b"Nonsense", b"\x80"])
    instance.send(progress(1))
    assert front.socket.poll(int(DEADLINE_S * 1000))
    with pytest.raises(CodecError, match="Nonsense"):
        list(front.receive())
    assert receive(front, 1) == [("0#0", progress(1))]


# ---------------------------------------------------------------- the end


def abstract_names() -> str:
    return Path("/proc/net/unix").read_text(encoding="utf-8")


def test_nothing_is_left_after_close():
    threads = set(threading.enumerate())
    native = len(list(Path("/proc/self/task").iterdir()))
    front = FrontSocket()
    keys = front.admit("0#0")
    name = keys.endpoint.removeprefix("ipc://")
    assert name in abstract_names()
    instance = InstanceSocket(keys)
    instance.send(progress(0))
    receive(front, 1)
    front.send("0#0", progress(1))  # never read
    front.close()
    instance.close()
    assert set(threading.enumerate()) == threads
    deadline = time.monotonic() + DEADLINE_S
    while len(list(Path("/proc/self/task").iterdir())) > native or name in abstract_names():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_last_words_are_heard(front: FrontSocket):
    """An instance that closes at once has still said why."""
    instance = InstanceSocket(front.admit("0#0"))
    failed = StartFailed(InstanceId(0), 0, "no memory")
    instance.send(failed)
    instance.close()
    assert receive(front, 1) == [("0#0", failed)]


def test_closing_never_waits_for_a_dead_front():
    with FrontSocket() as front:
        keys = front.admit("0#0")
    instance = InstanceSocket(keys)
    instance.send(progress(0))
    begin_s = time.monotonic()
    instance.close(linger_ms=200)
    assert time.monotonic() - begin_s < DEADLINE_S / 2
