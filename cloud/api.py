"""The operators' HTTP API: what the shell speaks. JSON, a bearer token, the loopback address.

Every change takes the operator's name from the ``X-Operator`` header (percent-encoded) into the
audit log. An error is ``{"error": "..."}`` with 400 (the request is wrong), 401 (no or a wrong
token), 404 (no such thing), 409 (not possible) or 503 (the catalogue's disk or database fails).
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Final, Protocol
from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from adapter_store.errors import StoreError
from cloud.errors import ConflictError, NotFoundError, RequestError
from cloud.operators import LONGEST_WAIT_S, Operators
from cloud.store import Store

_MAX_BODY_BYTES: Final = 16 * 1024
_LOOK_EVERY_S: Final = 0.05
_LOG_AT_ONCE: Final = 10_000
_STEER: Final = ("rollback", "pin", "unpin")
_JUDGE: Final = ("approve", "quarantine", "retire")

Endpoint = Callable[[Request], Awaitable[Response]]

log = logging.getLogger(__name__)


class Connection(Protocol):
    """What the health and metrics endpoints ask of the devices' side."""

    @property
    def connected(self) -> bool:
        """Whether the broker can be reached."""

    def statistics(self) -> Mapping[str, int]:
        """What was counted since the start, by kind."""


def make_api(operators: Operators, store: Store, connection: Connection, token: str) -> Starlette:
    """The ASGI application.

    Args:
        operators: What operators can do.
        store: Watched for changes.
        connection: Asked for health and metrics.
        token: What every request must present, except for health and metrics.
    """
    looking, open_to_all = _Looking(operators, store), _Monitoring(operators, connection)

    def guarded(path: str, endpoint: Endpoint, method: str = "GET") -> Route:
        async def checked(request: Request) -> Response:
            scheme, _, presented = request.headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(presented.strip().encode(), token.encode())
            if scheme.lower() != "bearer" or not right:
                log.warning("a request for %s had no operator token, or a wrong one", request.url)
                raise HTTPException(401, "the operator token is missing or wrong")
            return await endpoint(request)

        return Route(path, checked, methods=[method])

    return Starlette(
        routes=[
            Route("/healthz", open_to_all.health),
            Route("/metrics", open_to_all.metrics),
            guarded("/v1/devices", looking.devices),
            guarded("/v1/devices/{name}", looking.device),
            guarded("/v1/devices/{name}/explanations/{episode}", looking.explanation),
            guarded("/v1/adapters", looking.adapters),
            guarded("/v1/adapters/{id}", looking.adapter),
            guarded("/v1/log", looking.audit_log),
            guarded("/v1/events", looking.events),
            *(
                guarded(f"/v1/devices/{{name}}/{action}", _steer(operators, action), "POST")
                for action in _STEER
            ),
            *(
                guarded(f"/v1/adapters/{{id}}/{action}", _judge(operators, action), "POST")
                for action in _JUDGE
            ),
        ],
        exception_handlers={
            RequestError: _answer(400),
            NotFoundError: _answer(404),
            ConflictError: _answer(409),
            StoreError: _answer(503),
            HTTPException: _http_error,
            Exception: _unexpected,
        },
    )


class _Looking:
    """The endpoints that change nothing."""

    def __init__(self, operators: Operators, store: Store) -> None:
        self._operators = operators
        self._store = store

    async def devices(self, _: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self._operators.devices))

    async def device(self, request: Request) -> Response:
        name = request.path_params["name"]
        return JSONResponse(await run_in_threadpool(self._operators.device, name))

    async def explanation(self, request: Request) -> Response:
        name, episode = request.path_params["name"], request.path_params["episode"]
        number = _count(episode, "episode")
        return JSONResponse(await run_in_threadpool(self._operators.explanation, name, number))

    async def adapters(self, request: Request) -> Response:
        status = request.query_params.get("status")
        return JSONResponse(await run_in_threadpool(self._operators.adapters, status))

    async def adapter(self, request: Request) -> Response:
        prefix = request.path_params["id"]
        return JSONResponse(await run_in_threadpool(self._operators.adapter, prefix))

    async def audit_log(self, request: Request) -> Response:
        limit, after = _number(request, "limit", 50), _number(request, "after", 0)
        entries = await run_in_threadpool(self._operators.log, min(limit, _LOG_AT_ONCE), after)
        return JSONResponse(entries)

    async def events(self, request: Request) -> Response:
        """What there is now, as soon as it is not what it was at ``revision``."""
        revision, after = _number(request, "revision", 0), _number(request, "after", 0)
        wait_s = _seconds(request.query_params.get("wait_s", "25"), "wait_s")
        store, deadline = self._store, time.monotonic() + wait_s
        while store.revision == revision and not store.closing and time.monotonic() < deadline:
            # Looked at from the event loop, so that watchers do not use up the threads.
            await asyncio.sleep(_LOOK_EVERY_S)
        seen = store.revision
        entries = await run_in_threadpool(self._operators.log, _LOG_AT_ONCE, after)
        devices = await run_in_threadpool(self._operators.devices)
        return JSONResponse({"revision": seen, "devices": devices, "log": entries})


class _Monitoring:
    """The endpoints that need no token."""

    def __init__(self, operators: Operators, connection: Connection) -> None:
        self._operators = operators
        self._connection = connection

    async def health(self, _: Request) -> Response:
        return JSONResponse({"ok": True, "broker_connected": self._connection.connected})

    async def metrics(self, _: Request) -> Response:
        counts = await run_in_threadpool(self._operators.counts)
        lines = []
        for name, value in {**counts, "broker_connected": int(self._connection.connected)}.items():
            lines += [f"# TYPE driftkeel_catalogue_{name} gauge"]
            lines += [f"driftkeel_catalogue_{name} {value}"]
        lines.append("# TYPE driftkeel_catalogue_events_total counter")
        lines += [
            f'driftkeel_catalogue_events_total{{kind="{kind}"}} {count}'
            for kind, count in sorted(self._connection.statistics().items())
        ]
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return PlainTextResponse("\n".join(lines) + "\n", media_type=kind)


def _steer(operators: Operators, action: str) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        body = await _body(request, "to", "wait_s")
        to = body.get("to")
        if to is not None and (type(to) is not int or not 0 <= to < 2**53):
            raise RequestError(f"'to' must be the number of a generation, not {to!r}")
        wait_s = _seconds(body.get("wait_s", 10.0), "wait_s")
        name, who = request.path_params["name"], _operator(request)
        result = await run_in_threadpool(
            lambda: operators.steer(who, action, name, to=to, wait_s=wait_s)
        )
        return JSONResponse(result)

    return endpoint


def _judge(operators: Operators, action: str) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        body = await _body(request, "reason")
        reason = body.get("reason", "")
        if not isinstance(reason, str):
            raise RequestError("'reason' must be text")
        result = await run_in_threadpool(
            operators.judge, _operator(request), action, request.path_params["id"], reason
        )
        return JSONResponse(result)

    return endpoint


async def _body(request: Request, *known: str) -> dict[str, Any]:
    raw = b""
    async for part in request.stream():
        raw += part
        if len(raw) > _MAX_BODY_BYTES:
            raise RequestError(f"the request's body is over {_MAX_BODY_BYTES} bytes")
    if not raw:
        return {}
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request's body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise RequestError("the request's body must be a JSON object")
    unknown = sorted(body.keys() - set(known))
    if unknown:
        raise RequestError(f"unknown key {unknown[0]!r}; known keys: {', '.join(known)}")
    return body


def _operator(request: Request) -> str:
    return unquote(request.headers.get("x-operator", "")).strip()[:100] or "operator"


def _number(request: Request, name: str, default: int) -> int:
    return _count(request.query_params.get(name, str(default)), name)


def _count(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise RequestError(f"{name!r} must be a number, not {text!r}")
    return min(int(text[:20]), 2**53)


def _seconds(value: object, name: str) -> float:
    seconds = math.nan
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            seconds = float(value)
    if math.isnan(seconds) or seconds < 0:
        raise RequestError(f"{name!r} must be seconds from 0 to {LONGEST_WAIT_S:g}, not {value!r}")
    return min(seconds, LONGEST_WAIT_S)


def _answer(code: int) -> Callable[[Request, Exception], Response]:
    def answer(_: Request, error: Exception) -> Response:
        return JSONResponse({"error": str(error)}, status_code=code)

    return answer


def _http_error(request: Request, error: Exception) -> Response:
    code = error.status_code if isinstance(error, HTTPException) else 500
    detail = error.detail if isinstance(error, HTTPException) else str(error)
    if code == 404:
        detail = f"there is nothing at {request.url.path}"
    return JSONResponse({"error": detail}, status_code=code)


def _unexpected(_: Request, error: Exception) -> Response:
    # Starlette raises it again after this answer, so that it is in the log with its traceback.
    return JSONResponse({"error": f"unexpected {type(error).__name__}"}, status_code=500)
