"""The HTTP application: routes, middleware, error handlers.

Plain Starlette: the generating routes parse and answer by themselves (see `openai_api`), and
FastAPI around them would add 13 MiB and documentation routes that no key protects.
"""

from __future__ import annotations

import random
import time

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kunserve.core.errors import KunserveError
from kunserve.server.engine import EngineClient
from kunserve.server.errors import RETRY_AFTER_S, handle_error, json_response
from kunserve.server.metrics import ServerMetrics
from kunserve.server.middleware import ApiKeyMiddleware, BodyLimitMiddleware
from kunserve.server.openai_api import ChatEndpoint, CompletionEndpoint, Gate, Service
from kunserve.server.settings import ServerConfig
from kunserve.server.tokenizer import Tokenizer
from kunserve.version import VERSION

MAX_PREPARING_BYTES = 64 << 20
"""Of all bodies that are read and not yet tokenised; a larger `max_request_body_bytes` raises it
to one body."""
METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def create_app(engine: EngineClient, tokenizer: Tokenizer, config: ServerConfig) -> Starlette:
    """The ASGI application over a running engine. It owns neither engine nor tokenizer."""
    metrics = ServerMetrics(engine, config.served_model_names[0], config.slo)
    seeds = random.SystemRandom() if config.seed is None else random.Random(config.seed)
    service = Service(engine, tokenizer, config, metrics, seeds)
    max_bytes = max(MAX_PREPARING_BYTES, config.max_request_body_bytes)
    gate = Gate(config.max_preparing, max_bytes)
    status = StatusRoutes(service)
    app = Starlette(
        routes=[
            Route("/v1/completions", CompletionEndpoint(service, gate), methods=["POST"]),
            Route("/v1/chat/completions", ChatEndpoint(service, gate), methods=["POST"]),
            Route("/v1/models", status.models),
            Route("/v1/models/{model:path}", status.model),
            Route("/health", status.health),
            Route("/health/ready", status.ready),
            Route("/version", status.version),
            Route("/metrics", status.metrics),
        ],
        middleware=[
            Middleware(ApiKeyMiddleware, api_keys=config.api_keys),
            Middleware(BodyLimitMiddleware, max_bytes=config.max_request_body_bytes),
        ],
        exception_handlers={
            KunserveError: handle_error,
            HTTPException: handle_error,
            Exception: handle_error,
        },
    )
    app.router.redirect_slashes = False
    return app


class StatusRoutes:
    """The routes that only look."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._created = int(time.time())

    async def health(self, request: Request) -> Response:
        """200 while every instance that should answer does: a heartbeat of steps, not of HTTP."""
        healthy = self._service.engine.status().healthy
        return Response(status_code=200 if healthy else 503)

    async def ready(self, request: Request) -> Response:
        """200 while an instance takes requests, for load balancers. The generating routes refuse
        less: while every instance restarts, requests wait."""
        status = self._service.engine.status()
        if status.ready and not status.draining:
            return Response(status_code=200)
        return Response(status_code=503, headers={"retry-after": str(RETRY_AFTER_S)})

    async def version(self, request: Request) -> Response:
        """The version of kunserve."""
        return json_response({"version": VERSION})

    async def models(self, request: Request) -> Response:
        """All names under which the model is served."""
        names = self._service.config.served_model_names
        return json_response({"object": "list", "data": [self._card(name) for name in names]})

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = self._service.resolve_model(request.path_params["model"])
        return json_response(self._card(name))

    async def metrics(self, request: Request) -> Response:
        """Prometheus metrics."""
        return Response(self._service.metrics.render(), media_type=METRICS_CONTENT_TYPE)

    def _card(self, name: str) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "kunserve",
            "root": self._service.config.model_root or name,
            "parent": None,
            "max_model_len": self._service.engine.max_model_len,
        }
