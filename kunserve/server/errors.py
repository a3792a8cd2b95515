"""Errors as HTTP: vLLM's body and codes for everything that can go wrong."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from kunserve.core.errors import (
    InstanceFailedError,
    InvalidRequestError,
    KunserveError,
    QueueFullError,
    ServiceUnavailableError,
)

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1
MAX_MESSAGE_CHARS = 1000

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestEntityTooLargeError",
    503: "ServiceUnavailableError",
}


class HttpError(KunserveError):
    """An error that already knows its HTTP status.

    Attributes:
        status: HTTP status code.
        param: name of the offending request field, or None.
        headers: extra response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The OpenAI error object; `code` is the HTTP status, as in vLLM."""
        message = str(self)
        if len(message) > MAX_MESSAGE_CHARS:
            message = message[:MAX_MESSAGE_CHARS] + "..."
        kind = _TYPES.get(self.status)
        if kind is None:
            kind = "InternalServerError" if self.status >= 500 else "BadRequestError"
        return {
            "error": {"message": message, "type": kind, "param": self.param, "code": self.status}
        }

    def response(self) -> Response:
        """The error as a complete HTTP response."""
        return json_response(self.body(), self.status, self.headers)


def json_response(
    content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """A JSON response of plain values."""
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def to_http_error(error: Exception) -> HttpError:
    """What a client is told about `error`. Of an unexpected one nothing leaks."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, InvalidRequestError):
        return HttpError(400, str(error), error.param)
    if isinstance(error, QueueFullError | ServiceUnavailableError):
        return HttpError(503, str(error), headers={"retry-after": str(RETRY_AFTER_S)})
    if isinstance(error, InstanceFailedError):
        return HttpError(500, "the server failed to compute this request; see the server's log")
    if isinstance(error, HTTPException):
        message = error.detail or HTTPStatus(error.status_code).phrase
        return HttpError(error.status_code, message, headers=dict(error.headers or {}))
    return HttpError(500, "internal server error; see the server's log")


async def handle_error(request: Request, error: Exception) -> Response:
    """Starlette's exception handler for expected errors."""
    http_error = to_http_error(error)
    if http_error.status == 404 and isinstance(error, HTTPException):
        http_error = HttpError(404, f"no route {request.url.path!r}")
    if http_error.status >= 500 and isinstance(error, KunserveError):
        logger.warning("%s %s: %s", request.method, request.url.path, error)
    return http_error.response()
