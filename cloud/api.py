"""The operators' HTTP API: what the shell speaks. JSON, a bearer token, the loopback address.

Every change takes the operator's name from the ``X-Operator`` header into the audit log.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from adapter_store import wire
from cloud.catalogue import APPROVED, QUARANTINED, RETIRED, Catalogue
from cloud.errors import CatalogueError, ConflictError, NotFoundError

_STATUS_OF = {"approve": APPROVED, "quarantine": QUARANTINED, "retire": RETIRED}
_LONGEST_WAIT_S = 60.0


class Health(Protocol):
    """What the health and metrics endpoints ask of the service."""

    counters: Any
    catalogue: Catalogue

    @property
    def connected(self) -> bool:
        """Whether the broker can be reached."""


@dataclass(frozen=True)
class Operators:
    """What operators can do; the parts that wait for a device are here."""

    catalogue: Catalogue
    send: Callable[[str, wire.DownMessage], bool]
    wait_applied: Callable[[str, int, float], dict[str, Any] | None]

    def want(
        self, who: str, action: str, name: str, to: int | None, wait_s: float
    ) -> dict[str, Any]:
        """Change what is wanted of a device, tell it, and wait for its report.

        Raises:
            CatalogueError: It is not possible.
        """
        begun = time.monotonic()
        before = (self.catalogue.device(name)["reported"] or {}).get("generation")
        match action:
            case "rollback":
                device, desired = self.catalogue.roll_back(who, name, to)
            case "pin":
                device, desired = self.catalogue.pin(who, name)
            case _:
                device, desired = self.catalogue.unpin(who, name)
        self.send(name, desired)
        report = self.wait_applied(name, desired.version, min(wait_s, _LONGEST_WAIT_S))
        seconds = time.monotonic() - begun
        return {
            "device": name,
            "action": action,
            "was": before,
            "desired": device["desired"],
            "confirmed": report is not None,
            "confirmed_s": round(seconds, 4) if report is not None else None,
            "generation": None if report is None else report["generation"],
            "problem": "" if report is None else report.get("problem", ""),
            "message": _outcome(name, before, desired, report, seconds),
        }


def make_api(operators: Operators, service: Health, token: str) -> Starlette:
    """The ASGI application.

    Args:
        operators: What operators can do.
        service: Who is asked for health and metrics.
        token: What every request must present, except for health and metrics.
    """
    catalogue = operators.catalogue

    async def devices(_: Request) -> Response:
        return JSONResponse(await run_in_threadpool(catalogue.devices))

    async def device(request: Request) -> Response:
        name = request.path_params["name"]
        return JSONResponse(await run_in_threadpool(catalogue.device, name))

    async def want(request: Request) -> Response:
        body = await _body(request)
        to = body.get("to")
        if to is not None and (type(to) is not int or to < 0):
            raise ConflictError(f"'to' must be the number of a generation, not {to!r}")
        result = await run_in_threadpool(
            operators.want,
            _operator(request),
            request.path_params["action"],
            request.path_params["name"],
            to,
            float(body.get("wait_s", 10.0)),
        )
        return JSONResponse(result)

    async def adapters(request: Request) -> Response:
        status = request.query_params.get("status")
        return JSONResponse(await run_in_threadpool(catalogue.adapters, status))

    async def adapter(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(catalogue.adapter, request.path_params["id"]))

    async def judge(request: Request) -> Response:
        body = await _body(request)
        result = await run_in_threadpool(
            catalogue.set_status,
            _operator(request),
            request.path_params["id"],
            _STATUS_OF[request.path_params["action"]],
            str(body.get("reason", "")),
        )
        return JSONResponse(result)

    async def log(request: Request) -> Response:
        numbers = {k: _number(request, k, d) for k, d in (("limit", 50), ("after", 0))}
        return JSONResponse(await run_in_threadpool(lambda: catalogue.log(**numbers)))

    async def health(_: Request) -> Response:
        return JSONResponse({"ok": True, "broker_connected": service.connected})

    async def metrics(_: Request) -> Response:
        values = await run_in_threadpool(catalogue.counts)
        values |= {"broker_connected": int(service.connected)}
        lines = [f"driftkeel_catalogue_{name} {value}" for name, value in values.items()]
        lines += [
            f'driftkeel_catalogue_events_total{{kind="{kind}"}} {count}'
            for kind, count in sorted(service.counters.items())
        ]
        return PlainTextResponse("\n".join(lines) + "\n")

    def guarded(endpoint: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def checked(request: Request) -> Response:
            presented = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(presented.encode(), token.encode()):
                raise HTTPException(401, "the operator token is missing or wrong")
            response: Response = await endpoint(request)
            return response

        return checked

    routes = [
        Route("/healthz", health),
        Route("/metrics", metrics),
        Route("/v1/devices", guarded(devices)),
        Route("/v1/devices/{name}", guarded(device)),
        Route("/v1/adapters", guarded(adapters)),
        Route("/v1/adapters/{id}", guarded(adapter)),
        Route("/v1/log", guarded(log)),
        *_actions("/v1/devices/{name}", ("rollback", "pin", "unpin"), guarded(want)),
        *_actions("/v1/adapters/{id}", tuple(_STATUS_OF), guarded(judge)),
    ]
    return Starlette(
        routes=routes,
        exception_handlers={CatalogueError: _refused, HTTPException: _http_error},
    )


def _actions(
    path: str, actions: tuple[str, ...], endpoint: Callable[[Request], Any]
) -> list[Route]:
    def named(action: str) -> Callable[[Request], Any]:
        async def call(request: Request) -> Response:
            request.path_params["action"] = action
            response: Response = await endpoint(request)
            return response

        return call

    return [Route(f"{path}/{action}", named(action), methods=["POST"]) for action in actions]


async def _body(request: Request) -> dict[str, Any]:
    raw = await request.body()
    if not raw:
        return {}
    try:
        body = await request.json()
    except ValueError as error:
        raise ConflictError(f"the request's body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ConflictError("the request's body must be a JSON object")
    return body


def _operator(request: Request) -> str:
    return request.headers.get("x-operator", "operator")[:100]


def _number(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, str(default))
    if not text.isdigit():
        raise ConflictError(f"{name} must be a number, not {text!r}")
    return min(int(text), 10_000 if name == "limit" else 2**53)


def _outcome(
    name: str, before: int | None, desired: wire.Desired, report: dict[str, Any] | None, s: float
) -> str:
    if report is None:
        return (
            f"{name} has not confirmed yet; it is told again when it reports "
            f"(desired version {desired.version})"
        )
    if report.get("problem"):
        return f"{name} refuses: {report['problem']}"
    held = ", pinned" if report["pinned"] else ""
    return (
        f"{name} runs generation {report['generation']} (was {before}){held}; "
        f"confirmed in {s:.2f} s"
    )


def _refused(_: Request, error: Exception) -> Response:
    code = 404 if isinstance(error, NotFoundError) else 409
    return JSONResponse({"error": str(error)}, status_code=code)


def _http_error(_: Request, error: Exception) -> Response:
    code = error.status_code if isinstance(error, HTTPException) else 500
    detail = error.detail if isinstance(error, HTTPException) else str(error)
    return JSONResponse({"error": detail}, status_code=code)
