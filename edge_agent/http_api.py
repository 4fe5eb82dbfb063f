"""The device's local HTTP API: predictions, late labels, status, metrics.

A thin shell over the agent: it reads a request, calls the agent in a worker thread so that the
event loop stays free, and turns errors into JSON ``{"error", "hint"}`` with the status that
fits. Served on loopback by uvicorn; it has no authentication of its own.
"""

from __future__ import annotations

import io
import json
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import uvicorn
from anyio import CapacityLimiter, to_thread
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from adapter_store.errors import DiskFullError, LabelError, StoreError, UnknownSampleError
from edge_agent.agent import Agent
from edge_agent.errors import AgentError, NoGenerationError
from edge_agent.metrics import CONTENT_TYPE
from exporter.errors import PreprocessError
from exporter.preprocess import decode_sample
from ood.errors import DriftkeelError

Handler = Callable[[Request], Awaitable[Response]]
Episodes = Callable[[], Sequence[dict[str, Any]]]

_JSON: Final = "application/json"
_NPY: Final = ("application/x-npy", "application/x-numpy", "application/octet-stream")
_MAX_FEEDBACK: Final = 10_000
_encode = msgspec.json.Encoder().encode


class _Refused(Exception):  # noqa: N818 - control flow inside this module
    """A request that cannot be served as it is."""

    def __init__(self, status: int, error: str, hint: str) -> None:
        super().__init__(error)
        self.status, self.error, self.hint = status, error, hint


class _Label(msgspec.Struct, forbid_unknown_fields=True):
    """One true label: which sample, and what it really was."""

    sample_id: str
    label: str


class _Labels(msgspec.Struct, forbid_unknown_fields=True):
    """Many true labels."""

    feedback: list[_Label]


def create_app(agent: Agent, *, episodes: Episodes = list) -> Starlette:
    """The API as an ASGI application.

    Args:
        agent: What answers.
        episodes: Gives the stored episodes, oldest first.
    """
    limit = agent.config.http.max_body_bytes
    # Threads of their own: however many predictions wait, labels and health checks get through.
    predicting = CapacityLimiter(agent.config.http.max_requests)
    in_flight = 0

    async def predict(request: Request) -> Response:
        nonlocal in_flight
        if in_flight >= agent.config.http.max_requests:
            raise _Refused(
                429,
                f"{in_flight} predictions are being answered or waiting",
                "try again in a second, send several samples in one request, or raise "
                "http.max_requests",
            )
        in_flight += 1
        try:
            body = await _body(request, limit)
            content_type = request.headers.get("content-type", "")
            probe = request.query_params.get("probe", "0") in ("1", "true", "yes")
            return await to_thread.run_sync(
                _predict, agent, body, content_type, probe, limiter=predicting
            )
        finally:
            in_flight -= 1

    async def feedback(request: Request) -> Response:
        body = await _body(request, limit)
        return await run_in_threadpool(_feedback, agent, body)

    async def status(_: Request) -> Response:
        return _json(await run_in_threadpool(agent.status))

    async def generations(_: Request) -> Response:
        return _json({"generations": await run_in_threadpool(agent.generations)})

    async def list_episodes(_: Request) -> Response:
        return _json({"episodes": await run_in_threadpool(episodes)})

    async def cancel(_: Request) -> Response:
        return _json(await run_in_threadpool(_cancel, agent))

    async def healthz(_: Request) -> Response:
        serving = agent.serving
        if serving is None:
            return _json({"ok": False, "generation": None}, status=503)
        return _json({"ok": True, "generation": serving.number})

    async def metrics(_: Request) -> Response:
        agent.metrics.outbox_depth.set(await run_in_threadpool(len, agent.state.outbox))
        return Response(agent.metrics.render(), media_type=CONTENT_TYPE)

    routes = [
        ("POST", "/v1/predict", predict),
        ("POST", "/v1/feedback", feedback),
        ("GET", "/v1/status", status),
        ("GET", "/v1/generations", generations),
        ("GET", "/v1/episodes", list_episodes),
        ("POST", "/v1/training/cancel", cancel),
        ("GET", "/healthz", healthz),
        ("GET", "/metrics", metrics),
    ]
    return Starlette(
        routes=[
            Route(path, _guarded(agent, handler), methods=[method])
            for method, path, handler in routes
        ],
        exception_handlers={HTTPException: _not_served},
    )


def _guarded(agent: Agent, handler: Handler) -> Handler:
    """The handler, its errors as JSON and counted."""

    async def guarded(request: Request) -> Response:
        try:
            return await handler(request)
        except _Refused as refused:
            response = _error(refused.status, refused.error, refused.hint)
            if refused.status == 429:
                response.headers["Retry-After"] = "1"
        except ClientDisconnect:
            response = _error(400, "the client went away before its request was whole", "")
        except DriftkeelError as error:
            response = _error(_status_of(error), str(error), _hint_of(error))
        agent.metrics.failures.labels(str(response.status_code)).inc()
        return response

    return guarded


def _predict(agent: Agent, body: bytes, content_type: str, probe: bool) -> Response:
    try:
        images = _images(body, content_type)
    except PreprocessError as error:
        if not probe:
            agent.refusals.note(str(error))
        raise
    answers = agent.predict(images, probe=probe)
    return _json({"samples": answers})


def _images(body: bytes, content_type: str) -> NDArray[np.uint8]:
    kind = content_type.partition(";")[0].strip().lower()
    if not body:
        raise _Refused(400, "the request body is empty", "send an image file or a .npy array")
    if kind == _JSON:
        return _nested(body)
    if kind.startswith("image/") or kind in _NPY or not kind:
        return decode_sample(body, kind)
    raise _Refused(
        415,
        f"content type {kind[:80]!r} is not supported",
        "send image/png, image/jpeg, application/x-npy or application/json",
    )


def _nested(body: bytes) -> NDArray[np.uint8]:
    """``{"samples": [...]}`` with nested lists of numbers, read as a ``.npy`` array would be."""
    try:
        samples = msgspec.json.decode(body, type=dict[str, Any])["samples"]
    except (msgspec.DecodeError, KeyError, RecursionError) as error:
        raise _Refused(
            400, f"the body is not JSON with a key 'samples': {error}", 'send {"samples": [...]}'
        ) from error
    try:
        array = np.asarray(samples)
    except ValueError as error:
        raise PreprocessError(f"samples differ in shape: {error}") from error
    if array.dtype.kind not in "iuf":
        raise PreprocessError("samples must be nested lists of numbers of one shape")
    if array.dtype.kind in "iu":
        if array.size and (array.min() < 0 or array.max() > 255):
            raise PreprocessError("whole-number samples must lie in 0..255")
        array = array.astype(np.uint8)
    if array.ndim == 3:
        array = array[..., None]  # a list of samples, each [h, w]
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return decode_sample(buffer.getvalue(), "application/x-npy")


def _feedback(agent: Agent, body: bytes) -> Response:
    try:
        if b'"feedback"' in body:
            labels = msgspec.json.decode(body, type=_Labels).feedback
        else:
            labels = [msgspec.json.decode(body, type=_Label)]
    except (msgspec.DecodeError, RecursionError) as error:
        raise _Refused(
            400,
            f"the body is not a label: {error}",
            'send {"sample_id": "...", "label": "..."} or {"feedback": [...]}',
        ) from error
    if len(labels) > _MAX_FEEDBACK:
        raise _Refused(413, f"{len(labels)} labels in one request", f"send at most {_MAX_FEEDBACK}")
    unknown = []
    for item in labels:
        try:
            agent.feedback(item.sample_id, item.label)
        except UnknownSampleError:
            if len(labels) == 1:
                raise
            unknown.append(item.sample_id)
        except DiskFullError:
            raise
        except StoreError as error:
            raise _Refused(422, str(error), "send the class's name") from error
    return _json({"accepted": len(labels) - len(unknown), "unknown": unknown})


def _cancel(agent: Agent) -> dict[str, bool]:
    if agent.conductor_cancel is None or not agent.conductor_cancel():
        raise _Refused(409, "no training is running", "see GET /v1/status")
    return {"cancelled": True}


async def _body(request: Request, limit: int) -> bytes:
    """The request's body, refused as soon as it is known to be too large."""
    refusal = _Refused(
        413,
        f"the request body is over the limit of {limit} bytes",
        "send fewer samples at once, or raise http.max_body_bytes",
    )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise refusal
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise refusal
    return bytes(body)


def _status_of(error: DriftkeelError) -> int:
    if isinstance(error, PreprocessError | LabelError):
        return 422
    if isinstance(error, UnknownSampleError):
        return 404
    if isinstance(error, NoGenerationError):
        return 503
    if isinstance(error, DiskFullError):
        return 507
    return 500


def _hint_of(error: DriftkeelError) -> str:
    if isinstance(error, PreprocessError):
        return "send one image, or an array [h, w], [h, w, c] or [n, h, w, c]"
    if isinstance(error, UnknownSampleError):
        return "labels are accepted while the sample is in the journal (buffer.max_samples)"
    if isinstance(error, NoGenerationError):
        return "run `driftkeel agent fit --config FILE --data FILE.npz`, then start the agent again"
    if isinstance(error, AgentError):
        return "the running generation still serves; see /v1/status"
    return "see the agent's log"


async def _not_served(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = "no such path" if error.status_code == 404 else str(error.detail)
    response = _error(
        error.status_code, f"{request.method} {request.url.path}: {what}", "see GET /v1/status"
    )
    response.headers.update(error.headers or {})
    return response


def _error(status: int, error: str, hint: str) -> Response:
    return _json({"error": error, "hint": hint}, status=status)


def _json(value: Any, *, status: int = 200) -> Response:
    return Response(_encode(value), status_code=status, media_type=_JSON)


@contextmanager
def listening(
    agent: Agent, *, episodes: Episodes = list
) -> Iterator[tuple[uvicorn.Server, socket.socket]]:
    """A bound server; ``http.json`` in the state directory says where, while it is open.

    The caller runs ``server.run(sockets=[sock])``.

    Raises:
        AgentError: The address is in use or not this machine's.
    """
    http = agent.config.http
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    # The protocol is named because asyncio sets TCP_NODELAY only on sockets that name it; without
    # it every answer waits 40 ms for the client's delayed acknowledgement.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    where = Path(agent.config.agent.state_dir) / "http.json"
    try:
        try:
            sock.bind((http.host, http.port))
        except OSError as error:
            raise AgentError(
                f"cannot listen on {http.host} port {http.port}: {error.strerror}; "
                "set http.port to a free one (0 picks one)"
            ) from error
        # From here on connections queue, so whoever reads http.json is never refused.
        sock.listen(2048)
        host, port = sock.getsockname()[:2]
        name = f"[{host}]" if ":" in host else host
        _write(where, {"url": f"http://{name}:{port}", "pid": os.getpid()})
        server = uvicorn.Server(
            uvicorn.Config(
                create_app(agent, episodes=episodes),
                log_level="warning",
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=10,
            )
        )
        yield server, sock
    finally:
        where.unlink(missing_ok=True)
        sock.close()


def _write(path: Path, value: dict[str, Any]) -> None:
    """Write whole or not at all, so that a reader never sees half of it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(path)
