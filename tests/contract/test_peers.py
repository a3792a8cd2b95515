"""Links between instances: whole, in order, only between known incarnations, never blocking."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zmq
from numpy.typing import NDArray

from kunserve.core.errors import ConfigError
from kunserve.core.ids import BlockId, Epoch, GroupId, InstanceId, RequestId, TransitionId
from kunserve.core.step import BlockMove, Chunk
from kunserve.core.transition import PagesPulled, PeerAddress, StageInput, StageOutput
from kunserve.runtime.codec import CodecError, Shutdown, encode
from kunserve.runtime.peers import Delivery, PeerMesh, decode_delivery, encode_delivery

HIDDEN_SIZE = 576
DEADLINE_S = 20.0
UNHEARD_S = 0.5
"""How long a test listens for something that must not come; a known peer needs 10 ms."""

MakeMesh = Callable[..., PeerMesh]


@pytest.fixture
def make_mesh() -> Iterator[MakeMesh]:
    opened: list[PeerMesh] = []

    def run(instance: int, incarnation: int = 0, endpoint: str | None = None) -> PeerMesh:
        opened.append(PeerMesh(InstanceId(instance), incarnation, HIDDEN_SIZE, endpoint))
        return opened[-1]

    yield run
    for mesh in opened:
        mesh.close()


def address(mesh: PeerMesh) -> PeerAddress:
    return mesh.address(b"agent")


def introduce(*meshes: PeerMesh) -> None:
    """All of them hear of all of them, themselves included, as from the front."""
    peers = [address(mesh) for mesh in meshes]
    for mesh in meshes:
        mesh.update(peers)


def receive(mesh: PeerMesh, count: int) -> list[Delivery]:
    """The next `count` messages."""
    deliveries: list[Delivery] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(deliveries) < count:
        left_ms = int((deadline - time.monotonic()) * 1000)
        assert left_ms > 0, f"{len(deliveries)} of {count} came"
        mesh.socket.poll(left_ms)
        deliveries += mesh.receive()
    assert len(deliveries) == count
    return deliveries


def heard(mesh: PeerMesh) -> list[Delivery]:
    """What comes within a while in which a known peer would long have been heard."""
    mesh.socket.poll(int(UNHEARD_S * 1000))
    return list(mesh.receive())


def pulled(sender: int, number: int = 0) -> PagesPulled:
    return PagesPulled(InstanceId(sender), TransitionId(3), (number,), (7, 1 << 40), ("a0",))


def output(sender: int, step: int = 0) -> StageOutput:
    return StageOutput(InstanceId(sender), GroupId(1), Epoch(2), step, sent_ns=1 << 60)


def stage_input(sender: int, num_tokens: int) -> StageInput:
    table = tuple(BlockId((1 << 40) + n) for n in range(num_tokens))
    chunk = Chunk(RequestId("r-é"), (0,) * num_tokens, 5, table, True, 9)
    moves = (BlockMove(BlockId(3), BlockId(1 << 40)),)
    return StageInput(InstanceId(sender), GroupId(1), Epoch(2), 4, (chunk,), moves)


def rows(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Random bits, NaNs of every kind among them: links look at no value."""
    bits = np.random.default_rng(seed).integers(0, 1 << 32, (count, HIDDEN_SIZE), np.uint32)
    return bits.view(np.float32)


def assert_same_bits(actual: NDArray[np.float32] | None, expected: NDArray[np.float32]) -> None:
    assert actual is not None
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


# ---------------------------------------------------------------- messages


def test_three_of_them(make_mesh: MakeMesh):
    """A ring of three with everything that travels on it, and the whole way around."""
    meshes = [make_mesh(instance) for instance in range(3)]
    introduce(*meshes)
    assert [mesh.peers for mesh in meshes] == [(1, 2), (0, 2), (0, 1)]
    for sender, mesh in enumerate(meshes):
        target = InstanceId((sender + 1) % 3)
        assert mesh.send(target, pulled(sender))
        assert mesh.send(target, stage_input(sender, 4), rows(4, sender))
        assert mesh.send(target, output(sender), rows(1, sender))
    for receiver, mesh in enumerate(meshes):
        sender = (receiver - 1) % 3
        first, second, third = receive(mesh, 3)
        assert first == (pulled(sender), None)
        assert second.message == stage_input(sender, 4)
        assert_same_bits(second.payload, rows(4, sender))
        assert third.message == output(sender)
        assert_same_bits(third.payload, rows(1, sender))


@pytest.mark.parametrize("endpoint", [None, "tcp://127.0.0.1:*"])
@pytest.mark.parametrize("count", [0, 1, 5, 512])
def test_payloads_arrive_to_the_bit(make_mesh: MakeMesh, endpoint: str | None, count: int):
    """No row that samples is a payload too; 5 rows are 11 KB, 512 are 1.2 MB."""
    one, two = make_mesh(0, endpoint=endpoint), make_mesh(1, endpoint=endpoint)
    introduce(one, two)
    sent = rows(count)
    expected = sent.copy()
    assert one.send(InstanceId(1), output(0), sent)
    sent.fill(0.0)  # the sender goes on with its buffer
    ((message, payload),) = receive(two, 1)
    assert message == output(0)
    assert_same_bits(payload, expected)
    assert payload is not None
    np.negative(payload, out=payload)  # and the receiver computes in place
    assert two.send(InstanceId(0), output(1), payload)
    assert_same_bits(receive(one, 1)[0].payload, payload)


def test_order_is_kept(make_mesh: MakeMesh):
    """Also of what is sent before the link stands, big and small in turn."""
    one, two = make_mesh(0), make_mesh(1)
    introduce(one, two)
    count = 2000
    for step in range(count):
        payload = rows(100 if step % 50 == 0 else 1, step)
        assert one.send(InstanceId(1), output(0, step), payload)
    for step, (message, payload) in enumerate(receive(two, count)):
        assert message == output(0, step)
        assert_same_bits(payload, rows(100 if step % 50 == 0 else 1, step))


# ---------------------------------------------------------------- who is heard


def test_a_peer_that_knocks_early_waits(make_mesh: MakeMesh):
    """The front tells one of the other first; what is sent meanwhile arrives when both know."""
    one, two = make_mesh(0), make_mesh(1)
    one.update([address(one), address(two)])
    assert one.send(InstanceId(1), pulled(0))
    assert heard(two) == []
    two.update([address(one)])
    assert receive(two, 1) == [(pulled(0), None)]


def test_an_unknown_key_is_not_heard(make_mesh: MakeMesh):
    """A stranger who knows where to knock, and what a real peer looks like."""
    one, two, stranger = make_mesh(0), make_mesh(1), make_mesh(0)
    introduce(one, two)
    stranger.update([address(two)])
    assert stranger.send(InstanceId(1), pulled(0, 666))
    assert heard(two) == []
    assert two.dropped_messages == 0, "it never got in"
    assert one.send(InstanceId(1), pulled(0, 1))
    assert receive(two, 1) == [(pulled(0, 1), None)]


def test_a_wrong_server_key_does_not_connect(make_mesh: MakeMesh):
    """Nobody who took over an address hears what was meant for a peer."""
    one, two, other = make_mesh(0), make_mesh(1), make_mesh(2)
    introduce(one, two)
    other.update([address(one), replace(address(two), public_key=address(one).public_key)])
    assert other.send(InstanceId(1), pulled(2))
    assert heard(two) == []


@pytest.mark.parametrize("mechanism", ["null", "plain"])
def test_no_other_mechanism_is_admitted(make_mesh: MakeMesh, mechanism: str):
    mesh = make_mesh(0)
    mesh.update([])
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.linger = 0
        if mechanism == "plain":
            peer.plain_username, peer.plain_password = b"admin", b"admin"
        peer.connect(address(mesh).endpoint)
        peer.send_multipart(encode(pulled(1)))
        assert heard(mesh) == []


def test_many_strangers_at_the_door(make_mesh: MakeMesh):
    """More than may wait; a peer that comes after them is let in."""
    one, two = make_mesh(0), make_mesh(1)
    introduce(one, two)
    with zmq.Context() as context:
        strangers = []
        for _ in range(100):
            stranger = context.socket(zmq.DEALER)
            stranger.linger = 0
            stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()
            stranger.curve_serverkey = address(two).public_key.encode()
            stranger.connect(address(two).endpoint)
            stranger.send_multipart(encode(pulled(0)))
            strangers.append(stranger)
        assert heard(two) == []
        late = make_mesh(2)
        introduce(one, two, late)
        assert late.send(InstanceId(1), pulled(2))
        assert receive(two, 1) == [(pulled(2), None)]
        for stranger in strangers:
            stranger.close()


def test_nobody_speaks_for_another(make_mesh: MakeMesh):
    one, two = make_mesh(0), make_mesh(1)
    introduce(one, two, make_mesh(2))
    one.send(InstanceId(1), pulled(2))
    one.send(InstanceId(1), pulled(0))
    assert two.socket.poll(int(DEADLINE_S * 1000))
    with pytest.raises(CodecError, match="instance 0 sent a message as instance 2"):
        list(two.receive())
    assert receive(two, 1) == [(pulled(0), None)]


# ---------------------------------------------------------------- those who go


def test_a_new_incarnation(make_mesh: MakeMesh):
    """The old one is heard no more, though its process still runs; the new one is reached."""
    one, old = make_mesh(0), make_mesh(1)
    introduce(one, old)
    old.send(InstanceId(0), pulled(1, 1))
    assert receive(one, 1) == [(pulled(1, 1), None)]
    new = make_mesh(1, incarnation=1)
    introduce(one, new)
    old.send(InstanceId(0), pulled(1, 2))
    new.send(InstanceId(0), pulled(1, 3))
    assert receive(one, 1) == [(pulled(1, 3), None)]
    assert heard(one) == []
    assert one.dropped_messages == 1
    assert one.send(InstanceId(1), pulled(0))
    assert receive(new, 1) == [(pulled(0), None)]
    assert list(old.receive()) == []


def test_a_peer_that_is_gone_and_comes_back(make_mesh: MakeMesh):
    """Left out of an update, as while it loads, the same incarnation can be linked again."""
    one, two = make_mesh(0), make_mesh(1)
    for number in range(5):
        introduce(one, two)
        assert one.send(InstanceId(1), pulled(0, number))
        assert receive(two, 1) == [(pulled(0, number), None)]
        one.update([])
        assert one.peers == ()
        assert not one.send(InstanceId(1), pulled(0))


def test_an_update_leaves_other_links_alone(make_mesh: MakeMesh):
    """Neither new metadata nor another peer's coming and going loses a message."""
    one, two, three = make_mesh(0), make_mesh(1), make_mesh(2)
    for number in range(50):
        peers = [two.address(bytes([number])), *([address(three)] if number % 2 else [])]
        one.update(peers)
        assert one.send(InstanceId(1), pulled(0, number))
    two.update([address(one)])
    assert [delivery.message for delivery in receive(two, 50)] == [
        pulled(0, number) for number in range(50)
    ]


def test_a_dead_peer_blocks_nobody(make_mesh: MakeMesh):
    one, two, dead = make_mesh(0), make_mesh(1), make_mesh(2)
    introduce(one, two, dead)
    dead.send(InstanceId(0), pulled(2))
    receive(one, 1)
    dead.close()
    begin_s = time.monotonic()
    for step in range(30):
        one.send(InstanceId(2), output(0, step), rows(512))
        assert one.send(InstanceId(1), output(0, step), rows(1))
    assert [delivery.message for delivery in receive(two, 30)] == [
        output(0, step) for step in range(30)
    ]
    one.close()  # with 35 MB that nobody reads
    assert time.monotonic() - begin_s < DEADLINE_S / 2


def test_a_peer_that_does_not_read_blocks_nobody(make_mesh: MakeMesh):
    """More than any socket buffer holds; it finds all of it when it gets to it."""
    one, two = make_mesh(0), make_mesh(1)
    introduce(one, two)
    for step in range(30):
        assert one.send(InstanceId(1), output(0, step), rows(512))
    assert [delivery.message.step for delivery in receive(two, 30)] == [*range(30)]


def test_nothing_is_left_after_close():
    threads = set(threading.enumerate())
    native = len(list(Path("/proc/self/task").iterdir()))
    one, two = (PeerMesh(InstanceId(n), 0, HIDDEN_SIZE) for n in range(2))
    names = [address(mesh).endpoint.removeprefix("ipc://") for mesh in (one, two)]
    one.update([address(two)])  # two does not know it: the knock is never answered
    two.update([])
    assert one.send(InstanceId(1), pulled(0))
    assert heard(two) == []
    for mesh in (one, two, one):
        mesh.close()
    assert set(threading.enumerate()) == threads
    deadline = time.monotonic() + DEADLINE_S
    while len(list(Path("/proc/self/task").iterdir())) > native or any(
        name in Path("/proc/net/unix").read_text(encoding="utf-8") for name in names
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---------------------------------------------------------------- nonsense


def test_nonsense_of_a_peer_is_named_and_survived(make_mesh: MakeMesh):
    mesh = make_mesh(0)
    public, secret = zmq.curve_keypair()
    mesh.update([PeerAddress(InstanceId(1), 0, "ipc://@nowhere", public.decode(), b"")])
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.linger = 0
        peer.curve_publickey, peer.curve_secretkey = public, secret
        peer.curve_serverkey = address(mesh).public_key.encode()
        peer.connect(address(mesh).endpoint)
        peer.send_multipart(encode(Shutdown()))  # nothing that a peer may say
        peer.send(b"")
        peer.send_multipart(encode(pulled(1)))
        for nonsense in ("Shutdown", "got 1"):
            assert mesh.socket.poll(int(DEADLINE_S * 1000))
            with pytest.raises(CodecError, match=nonsense):
                list(mesh.receive())
        assert receive(mesh, 1) == [(pulled(1), None)]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "got 0"),
        ([*encode(output(0)), b"", b""], "got 4"),
        ([b"Request", b"\x80"], "unknown message type"),
        ([b"StageOutput", b"\x80"], "bad StageOutput message"),
        ([b"StageOutput", b"\xc1"], "bad StageOutput message"),
        ([*encode(pulled(0)), b""], "PagesPulled comes with hidden rows"),
        ([*encode(output(0))], "StageOutput comes without hidden rows"),
        ([*encode(output(0)), bytes(4 * HIDDEN_SIZE - 4)], "no whole rows"),
        ([*encode(output(0)), bytes(3)], "no whole rows"),
        ([*encode(stage_input(0, 2)), bytes(4 * HIDDEN_SIZE)], "2 tokens comes with 1 hidden"),
    ],
)
def test_bad_frames(frames: list[bytes], message: str):
    with pytest.raises(CodecError, match=message):
        decode_delivery(frames, HIDDEN_SIZE)


def test_rows_that_cannot_be_sent():
    good = rows(4)
    assert len(encode_delivery(output(0), good, HIDDEN_SIZE)) == 3
    for bad in (good[:, :-1], good.T, good[::2], good[0], np.zeros(good.shape)):
        with pytest.raises(CodecError, match="contiguous float32"):
            encode_delivery(output(0), bad, HIDDEN_SIZE)  # type: ignore[arg-type]
    for payload, sent in ((None, stage_input(0, 4)), (rows(3), stage_input(0, 4))):
        with pytest.raises(CodecError, match="hidden rows"):
            encode_delivery(sent, payload, HIDDEN_SIZE)
    with pytest.raises(CodecError, match="with hidden rows"):
        encode_delivery(pulled(0), good, HIDDEN_SIZE)


@pytest.mark.parametrize("endpoint", ["tcp://*:0", "tcp://10.0.0.1:80", "udp://127.0.0.1:1", "x"])
def test_only_this_machine(endpoint: str):
    with pytest.raises(ConfigError, match="not on this machine"):
        PeerMesh(InstanceId(0), 0, HIDDEN_SIZE, endpoint)


def test_an_address_in_use(make_mesh: MakeMesh):
    taken = address(make_mesh(0)).endpoint
    threads = set(threading.enumerate())
    with pytest.raises(ConfigError, match="cannot listen"):
        PeerMesh(InstanceId(1), 0, HIDDEN_SIZE, taken)
    assert set(threading.enumerate()) == threads
