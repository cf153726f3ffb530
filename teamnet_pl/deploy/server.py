"""Predictions over HTTP, where depth gives way before a request is refused.

Starlette, not a server of models such as LitServe: theirs hand workers batches that are formed
already, and the depth depends on what else waits and until when.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

import h11
import uvicorn
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor
from uvicorn.protocols.http.h11_impl import H11Protocol

from teamnet_pl.deploy.batcher import Answer, Batcher, OverloadedError
from teamnet_pl.deploy.images import MAX_PIXELS
from teamnet_pl.deploy.predictor import Predictor, check_budget
from teamnet_pl.errors import TeamNetError

Number = TypeVar("Number", int, float)

READ_SECONDS = 10
"""Seconds in which a request's body has to come."""
HEADER_SECONDS = 10
"""Seconds in which a request's headers have to come."""
MAX_REQUESTS = 512
"""Requests to predict at once: each may have a body in memory."""
LATENCIES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
"""Buckets of the latency histogram, in seconds."""


class Metrics:
    """What Prometheus is told of a server.

    Args:
        predictor: The net.
        batcher: Who waits for it.
    """

    def __init__(self, predictor: Predictor, batcher: Batcher) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "teamnet_requests",
            "Requests by the status of the answer.",
            ["status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "teamnet_latency_seconds",
            "From a request's last byte to its answer, by depth.",
            ["depth"],
            buckets=LATENCIES,
            registry=registry,
        )
        self.batch_size = Histogram(
            "teamnet_batch_size",
            "Images at once, for each image.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        waiting = Gauge("teamnet_waiting", "Requests that wait.", registry=registry)
        waiting.set_function(lambda: batcher.waiting)
        load = Gauge(
            "teamnet_load", "How many times as slow as profiled runs are.", registry=registry
        )
        load.set_function(lambda: predictor.controller.load)

    def answered(self, answer: Answer, seconds: float) -> None:
        """Counts an answer."""
        self.seconds.labels(answer.depth).observe(seconds)
        self.batch_size.observe(answer.batch_size)


class Server:
    """The endpoints.

    Args:
        predictor: The net.
        budget_ms: Budget of requests that name none, in milliseconds.
        max_batch_size: Images at once.
        max_body_bytes: Size of an image file that is accepted.
        max_pixels: Size of an image that is accepted.

    Raises:
        ValueError: If a number is not positive.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        budget_ms: float = 100,
        max_batch_size: int = 8,
        max_body_bytes: int = 2**22,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        check_budget(budget_ms)
        for name, value in {"max_body_bytes": max_body_bytes, "max_pixels": max_pixels}.items():
            if value < 1:
                raise TeamNetError(f"{name} must be at least 1, found {value}.")
        self.predictor = predictor
        self.budget_ms = budget_ms
        self.max_body_bytes = max_body_bytes
        self.max_pixels = max_pixels
        self.batcher = Batcher(predictor, max_batch_size)
        self.metrics = Metrics(predictor, self.batcher)
        # Decoding more images at once than there are cores takes memory and saves no time.
        self._requests = 0
        self._decoding = asyncio.Semaphore(os.cpu_count() or 1)

    def app(self) -> Starlette:
        """The application, for any ASGI server."""
        return Starlette(
            routes=[
                Route("/predict", self.predict, methods=["POST"]),
                Route("/health", self.health),
                Route("/metrics", self.show_metrics),
            ],
            exception_handlers={HTTPException: _refuse, Exception: _fail},
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._running = asyncio.create_task(self.batcher.run())
        yield
        self._running.cancel()

    async def predict(self, request: Request) -> Response:
        """Predicts the class of the image in the body."""
        self._requests += 1
        try:
            if self._requests > MAX_REQUESTS:
                raise OverloadedError(f"The server has {MAX_REQUESTS} requests already.")
            response = await self._predict(request)
        except OverloadedError as error:
            self.metrics.requests.labels(503).inc()
            raise HTTPException(503, str(error), {"Retry-After": "1"}) from error
        except HTTPException as error:
            self.metrics.requests.labels(error.status_code).inc()
            raise
        except Exception:
            self.metrics.requests.labels(500).inc()
            raise
        finally:
            self._requests -= 1
        self.metrics.requests.labels(200).inc()
        return response

    async def _predict(self, request: Request) -> Response:
        try:
            budget_ms, depth = self._budget(request.query_params)
            body = await self._body(request)
            arrived = time.monotonic()
            self.batcher.admit(arrived, budget_ms, depth)  # or it would be decoded for nothing
            async with self._decoding:
                image = await asyncio.to_thread(self._image, body)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        answer = await self.batcher.predict(image, arrived, budget_ms, depth)
        seconds = time.monotonic() - arrived
        self.metrics.answered(answer, seconds)
        label = int(answer.probabilities.argmax())
        return JSONResponse(
            {
                "label": label,
                "class": self.predictor.class_name(label),
                "probabilities": answer.probabilities.tolist(),
                "depth": answer.depth,
                "batch_size": answer.batch_size,
                "waited_ms": answer.waited_ms,
                "latency_ms": 1000 * seconds,
            }
        )

    def _budget(self, query: QueryParams) -> tuple[float, str | None]:
        """The budget of time, and the depth if the request leaves no choice."""
        known = ("budget_ms", "macs", "depth")
        if unknown := set(query) - set(known):
            raise TeamNetError(
                f"There are the parameters {', '.join(known)}; found {', '.join(unknown)}."
            )
        budget_ms = _number(query, "budget_ms", float)
        if budget_ms is None:
            budget_ms = self.budget_ms
        check_budget(budget_ms)
        macs = _number(query, "macs", int)
        if macs is not None and "depth" in query:
            raise TeamNetError("Pass one of macs and depth, found both.")
        return budget_ms, self.predictor.depth_for(macs, query.get("depth"))

    async def _body(self, request: Request) -> bytes:
        """Reads the body, but keeps no more of it than is allowed."""
        try:
            body, size = await asyncio.wait_for(self._read(request), READ_SECONDS)
        except asyncio.TimeoutError as error:
            raise HTTPException(408, f"The body did not come in {READ_SECONDS} s.") from error
        except ClientDisconnect as error:
            raise HTTPException(400, "The body ends too early.") from error
        # Not before all of it is read: an answer would be lost on a client that still sends.
        if size > self.max_body_bytes:
            message = f"The body has {size:,} bytes, {self.max_body_bytes:,} are allowed."
            raise HTTPException(413, message)
        return body

    async def _read(self, request: Request) -> tuple[bytes, int]:
        body, size = bytearray(), 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= self.max_body_bytes:
                body += chunk
        return bytes(body), size

    def _image(self, body: bytes) -> Tensor:
        return self.predictor.preprocessing(body, self.max_pixels)[0]

    async def health(self, request: Request) -> Response:
        """Says whether requests are answered, and what the server can do."""
        status = "failed" if self._running.done() else "ok"
        if status == "ok" and not self.predictor.last_is_finite:
            status = "the last output is not finite"
        return JSONResponse(
            {
                "status": status,
                "depths": self.predictor.macs,
                "input_shape": self.predictor.preprocessing.input_shape,
                "classes": self.predictor.classes,
                "budget_ms": self.budget_ms,
            },
            200 if status == "ok" else 503,
        )

    async def show_metrics(self, request: Request) -> Response:
        """Shows the metrics in the format of Prometheus."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _number(query: QueryParams, name: str, kind: type[Number]) -> Number | None:
    text = query.get(name)
    try:
        return None if text is None else kind(text)
    except ValueError as error:
        raise TeamNetError(f"{name} must be a number ({kind.__name__}), found {text!r}.") from error


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _fail(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "The server failed; its log says how."}, 500)


class SlowHeadersProtocol(H11Protocol):
    """Closes connections whose request's headers do not come in time.

    Uvicorn itself has a time limit only for the first byte of a connection's later requests.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the time for the first request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Takes bytes; the time goes on until the headers are whole."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the time."""
        super().connection_lost(exc)
        self._watch()

    def _watch(self) -> None:
        waits = not self.transport.is_closing() and self.conn.their_state is h11.IDLE
        if waits and self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self._close)
        elif not waits and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _close(self) -> None:
        self._deadline = None
        self.transport.close()


def listen(host: str, port: int) -> socket.socket:
    """Takes an address for a server.

    Args:
        host: Name or number of an interface of this machine.
        port: Port; 0 for a free one.

    Raises:
        ValueError: If there is no such host or port, or it is not free or not allowed.
    """
    if not 0 <= port <= 65535:
        raise TeamNetError(f"port must be in 0..65535, found {port}.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        taken = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise TeamNetError(f"The host {host!r} cannot be found: {error}.") from error
    try:
        if os.name == "posix":  # or the port stays taken for a while after a server has ended
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        taken.listen(2048)
    except OSError as error:
        taken.close()
        raise TeamNetError(
            f"The server cannot listen at {host}, port {port}: {error.strerror}. Give another "
            "--port (0 for a free one) or --host."
        ) from error
    return taken


def run(app: Starlette, taken: socket.socket) -> None:
    """Serves an application until the process is told to end.

    Args:
        app: The application.
        taken: Listens already.
    """
    host, port = taken.getsockname()[:2]
    place = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(app, http=SlowHeadersProtocol, ws="none", access_log=False)
    uvicorn.config.logger.info("Uvicorn running on http://%s:%d", place, port)
    uvicorn.Server(config).run([taken])
