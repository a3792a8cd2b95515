"""Pure ASGI middleware: keys and body limits. (BaseHTTPMiddleware hides disconnects and buffers
streams, so it is not used.)"""

from __future__ import annotations

import hashlib
import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kunserve.server.errors import HttpError

PUBLIC_PATHS = frozenset({"/health"})


class ApiKeyMiddleware:
    """Lets requests through that carry one of the keys as `Authorization: Bearer KEY`.

    Only `/health` is public. Digests are compared, so that neither the time nor a key's length
    tells anything, and every key is compared, so that their order tells nothing either.
    """

    def __init__(self, app: ASGIApp, api_keys: tuple[str, ...]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, or hand the request on."""
        if not self._needs_key(scope) or self._authorised(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = {"www-authenticate": "Bearer"}
            error = HttpError(
                401, "missing or wrong API key (Authorization: Bearer KEY)", None, headers
            )
            await error.response()(scope, receive, send)

    def _needs_key(self, scope: Scope) -> bool:
        served = scope["type"] in ("http", "websocket")
        return bool(self._digests) and served and scope["path"] not in PUBLIC_PATHS

    def _authorised(self, scope: Scope) -> bool:
        value = _header(scope, b"authorization") or b""
        scheme, _, key = value.partition(b" ")
        digest = _digest(key.strip())
        matches = [secrets.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


class BodyLimitMiddleware:
    """Answers 413 to bodies of more than `max_bytes`, whether their length is announced or not.

    The rest of the body is left to the server: uvicorn reads and drops it until its keep-alive
    timeout. Closing a socket with unread data would reset it, and the answer would be lost.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse by the announced length as soon as the body is read, else count what arrives."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = _header(scope, b"content-length")
        too_large = (
            announced is not None and announced.isdigit() and int(announced) > self._max_bytes
        )
        await self._app(scope, self._counting(receive, too_large), send)

    def _counting(self, receive: Receive, too_large: bool) -> Receive:
        """`receive` that raises where the route reads too much, so that the route counts it."""
        received = 0

        async def counted() -> Message:
            nonlocal received
            if too_large:
                raise self._too_large()
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_bytes:
                    raise self._too_large()
            return message

        return counted

    def _too_large(self) -> HttpError:
        message = (
            f"the request body is larger than {self._max_bytes} bytes; "
            "send less or raise --max-request-body-bytes"
        )
        return HttpError(413, message)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)
