"""Control sockets between the front and its instances: pyzmq over abstract Unix sockets.

An abstract socket has no file, so nothing is left on disk however the front dies. Any local user
may connect to one, so both ends prove themselves with CURVE keys made for this run; the instance
gets its own through its standard input, never through argv or the environment.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.auth.thread

from kunserve.core.closing import Closing
from kunserve.runtime.codec import CodecError, decode, encode


@dataclass(frozen=True)
class ClientKeys:
    """What an instance needs to reach its front: address, identity and keys (z85)."""

    endpoint: str
    identity: str
    public_key: str
    secret_key: str
    server_key: str


class _KnownKeys:
    """ZAP credentials: only the keys made for the instances of this run."""

    def __init__(self) -> None:
        self.keys: set[bytes] = set()

    def callback(self, domain: str, key: bytes) -> bool:
        """True if `key`, in printable (z85) form, was made for an instance of this run."""
        return key in self.keys


class FrontSocket(Closing):
    """The front's end: a ROUTER that only admitted instances can talk to."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._known = _KnownKeys()
        self._authenticator = zmq.auth.thread.ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(domain="*", credentials_provider=self._known)
        public, secret = zmq.curve_keypair()
        self._public_key = public
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.curve_server = True
        self._socket.curve_publickey = public
        self._socket.curve_secretkey = secret
        self._socket.router_mandatory = True
        # Control messages are small and bounded by the requests in flight; nothing may be lost.
        self._socket.set_hwm(0)
        self._endpoint = f"ipc://@kunserve-{secrets.token_hex(16)}"
        self._socket.bind(self._endpoint)

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """For a poller."""
        return self._socket

    def admit(self, identity: str) -> ClientKeys:
        """Make keys for one incarnation of an instance."""
        public, secret = zmq.curve_keypair()
        self._known.keys.add(public)
        return ClientKeys(
            endpoint=self._endpoint,
            identity=identity,
            public_key=public.decode(),
            secret_key=secret.decode(),
            server_key=self._public_key.decode(),
        )

    def dismiss(self, public_key: str) -> None:
        """An incarnation is gone: its keys open nothing any more."""
        self._known.keys.discard(public_key.encode())

    def send(self, identity: str, message: Any) -> bool:
        """Send to an instance. False if it is not connected (any more): its loss is handled
        where its process is watched."""
        try:
            self._socket.send_multipart((identity.encode(), *encode(message)), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def receive(self) -> Iterator[tuple[str, Any]]:
        """Yield (identity, message) until the inbox is empty.

        Raises:
            CodecError: an admitted peer sent something unknown.
        """
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield frames[0].decode(), decode(frames[1:])

    def close(self) -> None:
        """Release the sockets; what was not sent is dropped."""
        self._socket.close(linger=0)
        self._authenticator.stop()
        self._context.destroy(linger=0)


class InstanceSocket:
    """The instance's end: a DEALER bound to one front."""

    def __init__(self, keys: ClientKeys) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.routing_id = keys.identity.encode()
        self._socket.curve_publickey = keys.public_key.encode()
        self._socket.curve_secretkey = keys.secret_key.encode()
        self._socket.curve_serverkey = keys.server_key.encode()
        self._socket.set_hwm(0)
        self._socket.connect(keys.endpoint)

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """For a poller."""
        return self._socket

    def send(self, message: Any) -> None:
        """Send to the front; never blocks."""
        self._socket.send_multipart(encode(message))

    def receive(self) -> Iterator[Any]:
        """Yield messages until the inbox is empty."""
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield decode(frames)

    def close(self, linger_ms: int = 1000) -> None:
        """Release the socket after the last messages are out, or `linger_ms` have passed."""
        self._socket.close(linger=linger_ms)
        self._context.term()


__all__ = ["ClientKeys", "CodecError", "FrontSocket", "InstanceSocket"]
