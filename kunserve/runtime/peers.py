"""Direct links between the instances of a domain: activations on a ring, and small messages.

    instance 0   ROUTER <------ DEALER   instance 1        one ROUTER per instance: all it hears;
                 DEALER ------> ROUTER                     one DEALER per peer: what it says to it

A message is the two frames of `kunserve.runtime.codec`, and for hidden rows a third with their raw
float32 bytes. Messages of one peer arrive in the order they were sent, or not at all: what was on
the way when a process died is lost, and the transition protocol recovers it.

As in `kunserve.runtime.transport`, an abstract Unix socket leaves nothing behind and anybody on the
machine may knock, so both ends prove themselves with CURVE. Every incarnation has a pair of keys of
its own, and libzmq tells with each message whose key its connection was opened with. So a key says
both which peer speaks and which incarnation of it, and no peer can pass for another.
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import urlsplit

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray
from zmq.utils import z85

from kunserve.core.closing import Closing
from kunserve.core.errors import ConfigError, KunserveError
from kunserve.core.ids import InstanceId
from kunserve.core.transition import (
    PagesPulled,
    PeerAddress,
    PeerMessage,
    StageInput,
    StageOutput,
)
from kunserve.runtime.codec import CodecError, encode

Rows: TypeAlias = NDArray[np.float32]
"""Hidden rows, [rows, hidden_size]."""

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")

_DECODERS: dict[bytes, msgspec.msgpack.Decoder[Any]] = {
    message_type.__name__.encode(): msgspec.msgpack.Decoder(message_type)
    for message_type in (PagesPulled, StageInput, StageOutput)
}
# msgspec lets text that is no UTF-8 and too deep nesting through as Python's own errors.
_BAD_FIELDS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, KunserveError)


class Delivery(NamedTuple):
    """A message of a peer. `payload` belongs to the receiver, who may write to it."""

    message: PeerMessage
    payload: Rows | None


# ---------------------------------------------------------------- frames


def _check_rows(message: PeerMessage, rows: int | None) -> None:
    """`rows` of the payload that goes with `message`, None for no payload.

    Raises:
        CodecError: they do not go together.
    """
    name = type(message).__name__
    if (rows is None) != isinstance(message, PagesPulled):
        raise CodecError(f"{name} comes {'without' if rows is None else 'with'} hidden rows")
    if isinstance(message, StageInput):
        tokens = sum(len(chunk.token_ids) for chunk in message.chunks)
        if rows != tokens:
            raise CodecError(f"{name} of {tokens} tokens comes with {rows} hidden rows")


def encode_delivery(message: PeerMessage, payload: Rows | None, hidden_size: int) -> list[Any]:
    """The frames of a message; the last one is `payload` itself, not a copy.

    Raises:
        CodecError: `payload` is not C-contiguous float32 [rows, hidden_size], or does not go with
            the message.
    """
    _check_rows(message, None if payload is None else len(payload))
    if payload is None:
        return [*encode(message)]
    fits = payload.ndim == 2 and payload.shape[1] == hidden_size and payload.flags.c_contiguous
    if payload.dtype != np.float32 or not fits:
        raise CodecError(
            f"hidden rows are contiguous float32 [rows, {hidden_size}], not {payload.dtype} "
            f"{payload.shape}; copy them first"
        )
    return [*encode(message), payload]


def decode_delivery(frames: Sequence[bytes | memoryview], hidden_size: int) -> Delivery:
    """The message of two or three frames; the payload is a view of the third.

    Raises:
        CodecError: unknown type, wrong number of frames, fields of another shape, or a payload
            that is not whole rows or does not go with the message.
    """
    if len(frames) not in (2, 3):
        raise CodecError(f"a message of a peer has 2 or 3 frames, got {len(frames)}")
    name = bytes(frames[0])
    decoder = _DECODERS.get(name)
    if decoder is None:
        raise CodecError(f"unknown message type {name!r} of a peer")
    try:
        message: PeerMessage = decoder.decode(frames[1])
    except _BAD_FIELDS as error:
        raise CodecError(f"bad {name.decode()} message of a peer: {error}") from error
    payload: Rows | None = None
    if len(frames) == 3:
        row_bytes = hidden_size * np.dtype(np.float32).itemsize
        if len(frames[2]) % row_bytes:
            raise CodecError(f"{len(frames[2])} bytes are no whole rows of {row_bytes} bytes")
        payload = np.frombuffer(frames[2], np.float32).reshape(-1, hidden_size)
    _check_rows(message, None if payload is None else len(payload))
    return Delivery(message, payload)


# ---------------------------------------------------------------- who may connect


class _Knock(NamedTuple):
    """A connection that waits for an answer: frames to address it by, and its key in z85."""

    envelope: tuple[bytes, ...]
    key: bytes


class _Doorkeeper:
    """Answers libzmq's questions (ZAP) whether the owner of a key may connect.

    A key that is not known (yet) gets no answer until it is: the front tells the instances of each
    other one after the other, and libzmq never tries again after a refusal. An unanswered
    connection cannot send anything and times out at both ends (`ZMQ_HANDSHAKE_IVL`, 30 s).
    """

    ENDPOINT = "inproc://zeromq.zap.01"
    MAX_WAITING = 64  # a domain has at most 16 members; strangers push out the oldest

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._known: frozenset[bytes] = frozenset()
        self._waiting: deque[_Knock] = deque(maxlen=self.MAX_WAITING)
        self._questions = context.socket(zmq.ROUTER)
        self._questions.bind(self.ENDPOINT)
        self._inbox = context.socket(zmq.PAIR)
        self._inbox.bind("inproc://door")
        self._orders = context.socket(zmq.PAIR)
        self._orders.connect("inproc://door")
        self._thread = threading.Thread(target=self._run, name="doorkeeper", daemon=True)
        self._thread.start()

    def admit(self, keys: Iterable[str]) -> None:
        """Only the owners of `keys` (z85) may connect from now on; who is in stays connected."""
        self._orders.send_multipart([b"admit", *(key.encode() for key in keys)])

    def close(self) -> None:
        """End the thread and release the sockets."""
        self._orders.send_multipart([b"close"])
        self._thread.join()
        for socket in (self._orders, self._inbox, self._questions):
            socket.close(linger=0)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._inbox, zmq.POLLIN)
        poller.register(self._questions, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._inbox in ready:
                order, *keys = self._inbox.recv_multipart()
                if order == b"close":
                    return
                self._known = frozenset(keys)
            if self._questions in ready:
                self._hear(self._questions.recv_multipart())
            self._answer_known()

    def _hear(self, frames: list[bytes]) -> None:
        """RFC 27: identity, empty | version, request id, domain, address, identity, mechanism,
        credentials: of CURVE one, the key in binary."""
        if len(frames) == 9 and frames[2] == b"1.0" and frames[7] == b"CURVE":
            self._waiting.append(_Knock(tuple(frames[:4]), z85.encode(frames[8])))

    def _answer_known(self) -> None:
        for knock in [each for each in self._waiting if each.key in self._known]:
            self._waiting.remove(knock)
            # Status, its text, user id (it comes with each message), metadata.
            self._questions.send_multipart([*knock.envelope, b"200", b"OK", knock.key, b""])


# ---------------------------------------------------------------- links


@dataclass(frozen=True)
class _Link:
    """What is said to one incarnation of a peer."""

    address: PeerAddress
    socket: zmq.Socket[bytes]

    def leads_to(self, address: PeerAddress | None) -> bool:
        """True for the same incarnation, whatever else is known of it by now."""
        return address is not None and (self.address.public_key, self.address.endpoint) == (
            address.public_key,
            address.endpoint,
        )


class PeerMesh(Closing):
    """All links of one incarnation of an instance. Used by one thread at a time.

    Args:
        hidden_size: floats of a hidden row.
        endpoint: what to listen on; by default an abstract Unix socket with a random name. Else
            `ipc://...`, or `tcp://127.0.0.1:*`.

    Raises:
        ConfigError: `endpoint` is neither local nor on loopback, or cannot be bound.
    """

    def __init__(
        self,
        instance: InstanceId,
        incarnation: int,
        hidden_size: int,
        endpoint: str | None = None,
    ) -> None:
        _check_local(endpoint)
        self._instance = instance
        self._incarnation = incarnation
        self._hidden_size = hidden_size
        self._links: dict[InstanceId, _Link] = {}
        self._senders: dict[str, InstanceId] = {}
        self.dropped_messages = 0
        """Of incarnations that are gone."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._door = _Doorkeeper(self._context)
        public, secret = zmq.curve_keypair()
        self._public_key, self._secret_key = public, secret
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.curve_server = True
        self._socket.curve_publickey = public
        self._socket.curve_secretkey = secret
        # Bounded by the steps in flight on a ring and the moves of an exchange; nothing may block.
        self._socket.set_hwm(0)
        try:
            self._socket.bind(endpoint or f"ipc://@kunserve-{secrets.token_hex(16)}")
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"cannot listen on {endpoint}: {error}; choose another") from error
        self._endpoint = self._socket.get_string(zmq.LAST_ENDPOINT)

    def address(self, metadata: bytes) -> PeerAddress:
        """How peers reach this mesh. `metadata` is the transfer agent's."""
        return PeerAddress(
            instance=self._instance,
            incarnation=self._incarnation,
            endpoint=self._endpoint,
            public_key=self._public_key.decode(),
            metadata=metadata,
        )

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """For a poller: readable when `receive` has something to look at."""
        return self._socket

    @property
    def peers(self) -> tuple[InstanceId, ...]:
        """Those that `send` can reach, ascending."""
        return tuple(sorted(self._links))

    def update(self, peers: Sequence[PeerAddress]) -> None:
        """These are the peers now, this instance itself apart; all others are gone.

        Links to them open in the background, what is sent meanwhile waits for them. Links to
        incarnations that are gone are closed with all that they have not sent.
        """
        wanted = {peer.instance: peer for peer in peers if peer.instance != self._instance}
        for instance, link in list(self._links.items()):
            if not link.leads_to(wanted.get(instance)):
                self._links.pop(instance).socket.close(linger=0)
        self._senders = {peer.public_key: peer.instance for peer in wanted.values()}
        self._door.admit(self._senders)
        for instance, peer in wanted.items():
            if instance not in self._links:
                self._links[instance] = self._connect(peer)

    def send(self, peer: InstanceId, message: PeerMessage, payload: Rows | None = None) -> bool:
        """Send to a peer; never blocks, and `payload` is free to be written again afterwards.

        `payload` is copied: that costs a tenth of what CURVE does with it, and nobody has to keep a
        buffer still until the link's thread is done with it.

        Returns:
            False if it is no peer (any more): the front, which watches processes, handles its
            loss. True says nothing about arrival.

        Raises:
            CodecError: `payload` does not go with the message, see `encode_delivery`.
        """
        frames = encode_delivery(message, payload, self._hidden_size)
        link = self._links.get(peer)
        if link is None:
            return False
        try:
            link.socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self) -> Iterator[Delivery]:
        """Yield messages until the inbox is empty. Those of gone incarnations are dropped.

        Raises:
            CodecError: a peer sent something unknown, or under another's name. The next call goes
                on behind it.
        """
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            # Frame 0 is libzmq's name of the connection, which proves nothing.
            sender = self._senders.get(str(frames[-1].get("User-Id")))
            if sender is None:
                self.dropped_messages += 1
                continue
            delivery = decode_delivery([frame.buffer for frame in frames[1:]], self._hidden_size)
            if delivery.message.sender != sender:
                raise CodecError(
                    f"instance {sender} sent a message as instance {delivery.message.sender}"
                )
            yield delivery

    def close(self) -> None:
        """Close all links; what was not sent is dropped. May be called twice."""
        if self._context.closed:
            return
        for link in self._links.values():
            link.socket.close(linger=0)
        self._links.clear()
        self._socket.close(linger=0)
        self._door.close()
        self._context.term()

    def _connect(self, peer: PeerAddress) -> _Link:
        socket = self._context.socket(zmq.DEALER)
        socket.curve_publickey = self._public_key
        socket.curve_secretkey = self._secret_key
        socket.curve_serverkey = peer.public_key.encode()
        socket.set_hwm(0)
        socket.connect(peer.endpoint)
        return _Link(peer, socket)


def _check_local(endpoint: str | None) -> None:
    if endpoint is None or endpoint.startswith("ipc://"):
        return
    parts = urlsplit(endpoint)
    if parts.scheme != "tcp" or parts.netloc.rpartition(":")[0].strip("[]") not in LOOPBACK_HOSTS:
        raise ConfigError(
            f"{endpoint} is not on this machine; use ipc://NAME or tcp://127.0.0.1:PORT"
        )
