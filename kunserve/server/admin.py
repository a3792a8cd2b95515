"""The admin API: look at the layout, and wish for another one. On a port and with keys of its own.

    GET  /admin/layout
    POST /admin/layout   {"groups": [[0, 1], [2, 3]]}
    POST /admin/drop     {}
    POST /admin/restore  {}
    POST /admin/drain    {"instance": 1}
    POST /admin/policy   {"drop": false}      the kill switch

The controller answers every wish, so none has a deadline here: a drop is answered at COMMIT, which
may wait for another transition to end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from kunserve.core.errors import ConfigError, KunserveError
from kunserve.core.events import WishKind
from kunserve.core.ids import InstanceId
from kunserve.core.transition import TransitionRecord
from kunserve.runtime.decision_log import describe_note
from kunserve.runtime.status import ClusterView, GroupStatus, InstanceStatus
from kunserve.runtime.transition_log import describe
from kunserve.server.errors import HttpError, handle_error, json_response
from kunserve.server.middleware import ApiKeyMiddleware

MAX_BODY_BYTES = 64 << 10
BODY_TIMEOUT_S = 10.0
ILLEGAL = "illegal:"
"""A refusal that begins so says that no time and no state would make the wish possible."""

OnAnswer = Callable[[bool, str], None]
"""Takes (granted, message), once, on any thread."""


class ClusterControl(Protocol):
    """What the admin API needs of the cluster. Callable from any thread, never blocking."""

    @property
    def view(self) -> ClusterView:
        """The last snapshot. It shows a granted wish before its answer is given."""

    def wish(
        self, kind: WishKind, groups: tuple[tuple[InstanceId, ...], ...], on_answer: OnAnswer
    ) -> None:
        """Ask for another layout; `groups` only for LAYOUT. Answered at COMMIT or when refused,
        always: also when the cluster ends, or has ended."""

    def wish_drain(self, instance: InstanceId, on_answer: OnAnswer) -> None:
        """Take an instance out of service; answered when its drain has begun or is refused."""

    def switch_policy(self, may_drop: bool, on_answer: OnAnswer) -> None:
        """Let the policy drop parameters, or forbid it; answered at once."""


# ---------------------------------------------------------------- bodies

_InstanceNumber = Annotated[StrictInt, Field(ge=0, lt=1 << 31)]


class _Body(BaseModel):
    """Unlike OpenAI's routes, a field that is not known is an error: a misspelt wish would do
    something else than was meant."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class NothingBody(_Body):
    """{}"""


class LayoutBody(_Body):
    """A partition of the instances into groups, each in ring order."""

    groups: Annotated[
        list[Annotated[list[_InstanceNumber], Field(min_length=1)]], Field(min_length=1)
    ]


class PolicyBody(_Body):
    """May the policy drop parameters?"""

    drop: StrictBool


class DrainBody(_Body):
    """The instance to take out of service."""

    instance: _InstanceNumber


BodyT = TypeVar("BodyT", bound=_Body)


async def read_body(request: Request, model: type[BodyT]) -> BodyT:
    """The body of `request`, parsed and checked; an empty one is {}.

    Raises:
        HttpError: 400 with the first offending field as `param`, 408, or 413.
        ClientDisconnect: the client went away.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in request.stream():
                body += piece
                if len(body) > MAX_BODY_BYTES:
                    raise HttpError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    except TimeoutError:
        raise HttpError(408, "the request body did not arrive in time") from None
    try:
        content = pydantic_core.from_json(body or b"{}", allow_inf_nan=False)
    except ValueError as error:
        raise HttpError(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise HttpError(400, "the body must be a JSON object")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise HttpError(400, f"{where[:200]}: {first['msg']}", str(first["loc"][0])) from error


# ---------------------------------------------------------------- answers


def layout_json(view: ClusterView) -> dict[str, Any]:
    """The layout as GET /admin/layout shows it, at `at_ns` of the monotonic clock. Layers are
    half-open, capacities in tokens; what is used and queued is null until the group's scheduler
    has reported. `costs`: the constants of the cost model."""
    return {
        "at_ns": view.at_ns,
        "epoch": view.epoch,
        "groups": [_group_json(group, view.block_size) for group in view.groups],
        "instances": [_instance_json(instance) for instance in view.instances],
        "dropped_bytes": view.dropped_bytes,
        "last_transition": view.last_transition and _transition_json(view.last_transition),
        "policy": {"name": view.policy, "drop": view.may_drop},
        "last_decision": view.last_decision and describe_note(view.last_decision),
    }


def _group_json(status: GroupStatus, block_size: int) -> dict[str, Any]:
    return {
        "id": status.group.id,
        "epoch": status.group.epoch,
        "stages": [
            {"instance": stage.instance, "layers": [stage.layers.start, stage.layers.stop]}
            for stage in status.group.stages
        ],
        "kv_tokens": status.kv_blocks * block_size,
        "kv_tokens_whole": status.whole_blocks * block_size,
        "kv_tokens_used": status.used_blocks * block_size if status.load else None,
        "kv_tokens_queued": status.queued_blocks * block_size if status.load else None,
        "num_requests": status.num_requests,
        "num_waiting": status.load.num_waiting if status.load else 0,
        "in_transition": status.in_transition,
    }


def _instance_json(status: InstanceStatus) -> dict[str, Any]:
    return {
        "id": status.instance,
        "pid": status.pid,
        "state": status.state,
        "pages": dict(status.pages),
        "costs": list(status.costs),
    }


def _transition_json(record: TransitionRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "kind": record.kind,
        "why": record.why,
        "outcome": record.outcome,
        "reason": record.reason,
        "text": describe(record),
        "figures": {
            "phases_ns": {phase.name: phase.elapsed_ns for phase in record.phases},
            "freed_bytes": record.freed_bytes,
            "gained_bytes": record.gained_bytes,
            "exchanged_bytes": record.exchanged_bytes,
            "gathered_bytes": record.gathered_bytes,
            "remap_ns": record.remap_ns,
            "requests": record.requests,
            "stalled_ns": [elapsed_ns for _, elapsed_ns in record.stalled],
            "activations": record.activations,
            "activation_p99_ns": record.activation_p99_ns,
        },
    }


# ---------------------------------------------------------------- routes


class _Answer(NamedTuple):
    granted: bool
    message: str


class AdminRoutes:
    """The routes, over one cluster."""

    def __init__(self, cluster: ClusterControl) -> None:
        self._cluster = cluster

    async def layout(self, request: Request) -> Response:
        """The layout of now, or another one, group by group."""
        if request.method != "POST":
            return json_response(layout_json(self._cluster.view))
        body = await read_body(request, LayoutBody)
        groups = tuple(tuple(map(InstanceId, group)) for group in body.groups)
        return await self._ask(
            lambda answer: self._cluster.wish(WishKind.LAYOUT, groups, answer), "groups"
        )

    async def drop(self, request: Request) -> Response:
        """All instances into one group."""
        await read_body(request, NothingBody)
        return await self._ask(lambda answer: self._cluster.wish(WishKind.DROP, (), answer))

    async def restore(self, request: Request) -> Response:
        """Whole instances again."""
        await read_body(request, NothingBody)
        return await self._ask(lambda answer: self._cluster.wish(WishKind.RESTORE, (), answer))

    async def drain(self, request: Request) -> Response:
        """One instance out of service."""
        body = await read_body(request, DrainBody)
        return await self._ask(
            lambda answer: self._cluster.wish_drain(InstanceId(body.instance), answer), "instance"
        )

    async def policy(self, request: Request) -> Response:
        """The kill switch of the overload policy."""
        body = await read_body(request, PolicyBody)
        return await self._ask(lambda answer: self._cluster.switch_policy(body.drop, answer))

    async def _ask(self, wish: Callable[[OnAnswer], None], param: str | None = None) -> Response:
        """Wish, wait, and answer: 200, 409 where it cannot be now, 400 where it never can."""
        granted, message = await _answer_of(wish)
        if granted:
            return json_response({**layout_json(self._cluster.view), "message": message})
        if message.startswith(ILLEGAL):
            raise HttpError(400, message.removeprefix(ILLEGAL).strip(), param)
        raise HttpError(409, message)


async def _answer_of(wish: Callable[[OnAnswer], None]) -> _Answer:
    """The one answer to a wish, brought over from the controller's thread."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Answer] = loop.create_future()

    def settle(answer: _Answer) -> None:
        if not future.done():  # cancelled: the server ends
            future.set_result(answer)

    def on_answer(granted: bool, message: str) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens any more
            loop.call_soon_threadsafe(settle, _Answer(granted, message))

    wish(on_answer)
    return await future


def _unless_gone(
    handler: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """A client that goes away while it still sends is no error of the server."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it

    return handle


def create_admin_app(cluster: ClusterControl, keys: tuple[str, ...]) -> Starlette:
    """The ASGI application. Every route wants one of `keys`.

    Raises:
        ConfigError: no key, or an empty one.
    """
    if not keys or not all(keys):
        raise ConfigError("the admin API needs a key (--admin-key)")
    routes = AdminRoutes(cluster)
    app = Starlette(
        routes=[
            Route("/admin/layout", _unless_gone(routes.layout), methods=["GET", "POST"]),
            Route("/admin/drop", _unless_gone(routes.drop), methods=["POST"]),
            Route("/admin/restore", _unless_gone(routes.restore), methods=["POST"]),
            Route("/admin/drain", _unless_gone(routes.drain), methods=["POST"]),
            Route("/admin/policy", _unless_gone(routes.policy), methods=["POST"]),
        ],
        middleware=[Middleware(ApiKeyMiddleware, api_keys=keys)],
        exception_handlers={
            KunserveError: handle_error,
            HTTPException: handle_error,
            Exception: handle_error,
        },
    )
    app.router.redirect_slashes = False
    return app
