"""Predictions over HTTP. Under load the depth decreases before requests are refused.

Built on Starlette rather than on a model server such as LitServe: those hand batches to their
workers that are already formed, while here the depth depends on the other waiting requests and
their deadlines. FastAPI would add a second kind of errors and time to start, and could not derive
from signatures that a body is a file or a form.
"""

from __future__ import annotations

import asyncio
import io
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import h11
import uvicorn
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from torch import Tensor
from uvicorn.protocols.http.h11_impl import H11Protocol

from teamnet_pl.deploy.runtime.predictor import Predictor, check_budget
from teamnet_pl.deploy.runtime.preprocessing import MAX_PIXELS, Preprocessing
from teamnet_pl.deploy.serving import openapi
from teamnet_pl.deploy.serving.batcher import Answer, Batcher, OverloadedError
from teamnet_pl.deploy.serving.uploads import Upload, read_uploads
from teamnet_pl.errors import TeamNetError

Number = TypeVar("Number", int, float)

BODY_TIMEOUT_S = 10
"""Seconds in which the body of a request has to arrive."""
HEADERS_TIMEOUT_S = 10
"""Seconds in which the headers of a request have to arrive."""
MAX_REQUESTS = 512
"""Largest number of predictions at once, as each may hold a body in memory."""
RETRY = {"Retry-After": "1"}
"""Headers of the answer to a request that may be sent again, after some seconds."""
LATENCY_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
"""Buckets of the latency histogram, in seconds."""


class Metrics:
    """The metrics of a server for Prometheus.

    Attributes:
        registry: All metrics.
        requests: Counts requests by the status of their answer.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "teamnet_requests",
            "Requests by the status of the answer.",
            ["status"],
            registry=registry,
        )
        self._latency = Histogram(
            "teamnet_latency_seconds",
            "Time from the last byte of a request to its answer, by depth.",
            ["depth"],
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._batch_size = Histogram(
            "teamnet_batch_size",
            "Size of the batch in which an image ran, for each image.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )

    def watch(self, batcher: Batcher) -> None:
        """Adds the metrics of the net, once it is loaded."""
        predictor = batcher.predictor
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "waiting": ("Waiting images.", lambda: batcher.waiting),
            "slowdown": (
                "How many times as slow as profiled the machine is.",
                lambda: predictor.controller.slowdown,
            ),
            "last_output_finite": (
                "Whether the whole output of the last run was finite.",
                lambda: predictor.last_is_finite,
            ),
        }
        for name, (description, value) in gauges.items():
            gauge = Gauge(f"teamnet_{name}", description, registry=self.registry)
            gauge.set_function(value)

    def count_answer(self, answer: Answer, seconds: float) -> None:
        """Counts an answer and its latency in seconds."""
        self._latency.labels(answer.depth).observe(seconds)
        self._batch_size.observe(answer.batch_size)


class Server:
    """The endpoints.

    They answer at once, and predict when the net is loaded and each depth has run at each batch
    size, so that the first request takes no longer than the others.

    Args:
        load: Loads the net.
        budget_ms: Budget of requests that do not give one, in milliseconds.
        max_batch_size: Largest number of images that run at once.
        max_body_bytes: Largest size of the body of a request, with all its images, in bytes.
        max_images: Largest number of images in a request.
        max_pixels: Largest number of pixels of an image.

    Attributes:
        load: Loads the net.
        batcher: Runs the net; None until it is ready.
        failure: The error that ended the loading or the batches.
        on_failure: Is called after such an error.

    Raises:
        TeamNetError: If a number is not positive.
    """

    def __init__(
        self,
        load: Callable[[], Predictor],
        *,
        budget_ms: float = 100,
        max_batch_size: int = 8,
        max_body_bytes: int = 2**22,
        max_images: int = 32,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        check_budget(budget_ms)
        limits = {
            "max_batch_size": max_batch_size,
            "max_body_bytes": max_body_bytes,
            "max_images": max_images,
            "max_pixels": max_pixels,
        }
        for name, value in limits.items():
            if value < 1:
                raise TeamNetError(f"{name} must be at least 1, found {value}.")
        self.budget_ms = budget_ms
        self.max_batch_size = max_batch_size
        self.max_body_bytes = max_body_bytes
        self.max_images = max_images
        self.max_pixels = max_pixels
        self.metrics = Metrics()
        self.batcher: Batcher | None = None
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.load = load
        self._num_requests = 0
        # Decoding more images at once than there are cores takes memory and saves no time.
        self._decoding_slots = asyncio.Semaphore(os.cpu_count() or 1)

    def app(self) -> Starlette:
        """Makes the application, for any ASGI server."""
        return Starlette(
            routes=[
                Route("/predict", self.predict, methods=["POST"]),
                Route("/model", self.model),
                Route("/livez", self.live),
                Route("/readyz", self.ready),
                Route("/metrics", self.show_metrics),
                Route("/openapi.json", lambda _: JSONResponse(openapi.description())),
                Route("/docs", lambda _: HTMLResponse(openapi.page())),
            ],
            exception_handlers={HTTPException: _http_error, Exception: _internal_error},
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(self._work())
        yield
        task.cancel()

    async def _work(self) -> None:
        """Loads the net, and then answers requests until it is cancelled."""
        try:
            batcher = Batcher(await asyncio.to_thread(self.load), self.max_batch_size)
            await batcher.warm_up()
            await asyncio.to_thread(self._read_example, batcher.predictor.preprocessing)
            self.metrics.watch(batcher)
            self.batcher = batcher
            uvicorn.config.logger.info("The net is ready.")
            await batcher.run()
        except Exception as error:
            self.failure, self.batcher = error, None
            self.on_failure()

    def _read_example(self, preprocessing: Preprocessing) -> None:
        """Reads an image file, since the first one makes Pillow import its plugins."""
        channels, height, width = preprocessing.input_shape
        file = io.BytesIO()
        Image.new("L" if channels == 1 else "RGB", (width, height)).save(file, "PNG")
        preprocessing(file.getvalue())

    def _ready_batcher(self) -> Batcher:
        if self.batcher is None:
            raise OverloadedError("The net is not ready: GET /readyz tells when it is.")
        return self.batcher

    async def predict(self, request: Request) -> Response:
        """Predicts the class of each image in the body: a file, or a form of several."""
        self._num_requests += 1
        try:
            if self._num_requests > MAX_REQUESTS:
                raise OverloadedError(f"The server already has {MAX_REQUESTS} requests.")
            response = await self._predict(request)
        except OverloadedError as error:
            self.metrics.requests.labels(503).inc()
            raise HTTPException(503, str(error), RETRY) from error
        except HTTPException as error:
            self.metrics.requests.labels(error.status_code).inc()
            raise
        except Exception:
            self.metrics.requests.labels(500).inc()
            raise
        finally:
            self._num_requests -= 1
        self.metrics.requests.labels(200).inc()
        return response

    async def _predict(self, request: Request) -> Response:
        batcher = self._ready_batcher()
        predictor = batcher.predictor
        try:
            budget_ms, depth = self._budget(request.query_params, predictor)
            body = await self._body(request)
            arrived = batcher.clock()
            content_type = request.headers.get("Content-Type", "")
            uploads = read_uploads(content_type, body, self.max_images)
            # Spares decoding images in vain.
            batcher.admit(arrived, budget_ms, depth, len(uploads))
            async with self._decoding_slots:
                images = await asyncio.to_thread(
                    lambda: [self._image(upload, predictor.preprocessing) for upload in uploads]
                )
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        answers = await batcher.predict(images, arrived, budget_ms, depth)
        seconds = batcher.clock() - arrived
        predictions = []
        for upload, answer in zip(uploads, answers, strict=True):
            self.metrics.count_answer(answer, seconds)
            file = {} if upload.name is None else {"file": upload.name}
            predictions.append(file | _prediction(answer, predictor))
        is_form = uploads[0].name is not None
        content = {"predictions": predictions} if is_form else predictions[0]
        return JSONResponse({**content, "latency_ms": 1000 * seconds})

    def _budget(self, query: QueryParams, predictor: Predictor) -> tuple[float, str | None]:
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
        return budget_ms, predictor.depth_for(macs, query.get("depth"))

    async def _body(self, request: Request) -> bytes:
        """Reads the body, and keeps no more of it than the allowed size."""
        try:
            body, size = await asyncio.wait_for(self._read(request), BODY_TIMEOUT_S)
        except asyncio.TimeoutError as error:
            raise HTTPException(
                408, f"The body did not arrive within {BODY_TIMEOUT_S} s."
            ) from error
        except ClientDisconnect as error:
            raise HTTPException(400, "The body ended too early.") from error
        # Only after all of it is read: a client that is still sending would miss an answer.
        if size > self.max_body_bytes:
            message = f"The body has {size:,} bytes; {self.max_body_bytes:,} are allowed."
            raise HTTPException(413, message)
        return body

    async def _read(self, request: Request) -> tuple[bytes, int]:
        """Returns the beginning of the body, up to the allowed size, and its whole size."""
        body, size = bytearray(), 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= self.max_body_bytes:
                body += chunk
        return bytes(body), size

    def _image(self, upload: Upload, preprocessing: Preprocessing) -> Tensor:
        try:
            return preprocessing(upload.content, self.max_pixels)[0]
        except TeamNetError as error:
            if upload.name is None:
                raise
            raise TeamNetError(f"{upload.name}: {error}") from error

    async def live(self, request: Request) -> Response:
        """Reports that the process answers."""
        return JSONResponse({"status": "live"})

    async def ready(self, request: Request) -> Response:
        """Reports whether predictions are answered."""
        if self.batcher is not None:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "failed" if self.failure else "loading"}, 503)

    async def model(self, request: Request) -> Response:
        """Describes the net."""
        try:
            predictor = self._ready_batcher().predictor
        except OverloadedError as error:
            raise HTTPException(503, str(error), RETRY) from error
        return JSONResponse(
            {
                "depths": predictor.macs,
                "input_shape": predictor.preprocessing.input_shape,
                "classes": predictor.classes,
                "budget_ms": self.budget_ms,
            }
        )

    async def show_metrics(self, request: Request) -> Response:
        """Reports the metrics in the format of Prometheus."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _prediction(answer: Answer, predictor: Predictor) -> dict[str, Any]:
    label = int(answer.probabilities.argmax())
    return {
        "label": label,
        "class": predictor.class_name(label),
        "probabilities": answer.probabilities.tolist(),
        "depth": answer.depth,
        "batch_size": answer.batch_size,
        "waited_ms": answer.waited_ms,
    }


def _number(query: QueryParams, name: str, kind: type[Number]) -> Number | None:
    text = query.get(name)
    try:
        return None if text is None else kind(text)
    except ValueError as error:
        raise TeamNetError(f"{name} must be a number ({kind.__name__}), found {text!r}.") from error


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _internal_error(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "The server failed; its log has the details."}, 500)


class HeadersTimeoutProtocol(H11Protocol):
    """Closes connections on which the headers of a request do not arrive in time.

    Uvicorn itself only limits the time until the first byte of a later request on a connection.
    """

    _timeout: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the timeout of the first request."""
        super().connection_made(transport)
        self._update_timeout()

    def data_received(self, data: bytes) -> None:
        """Handles bytes; the timeout runs until the headers are complete."""
        super().data_received(data)
        self._update_timeout()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancels the timeout."""
        super().connection_lost(exc)
        self._update_timeout()

    def _update_timeout(self) -> None:
        is_waiting = not self.transport.is_closing() and self.conn.their_state is h11.IDLE
        if is_waiting and self._timeout is None:
            self._timeout = self.loop.call_later(HEADERS_TIMEOUT_S, self._close)
        elif not is_waiting and self._timeout is not None:
            self._timeout.cancel()
            self._timeout = None

    def _close(self) -> None:
        self._timeout = None
        self.transport.close()


def listen(host: str, port: int) -> socket.socket:
    """Opens a listening socket.

    Args:
        host: Name or address of an interface of this machine.
        port: The port; 0 for a free one.

    Raises:
        TeamNetError: If there is no such host or port, or it is in use or not permitted.
    """
    if not 0 <= port <= 65535:
        raise TeamNetError(f"port must be in 0..65535, found {port}.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise TeamNetError(f"The host {host!r} cannot be found: {error}.") from error
    try:
        if os.name == "posix":  # otherwise the port stays in use for a while after a server ends
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise TeamNetError(
            f"The server cannot listen at {host}, port {port}: {error.strerror}. Give another "
            "--port (0 for a free one) or --host."
        ) from error
    return listener


def run(server: Server, listener: socket.socket) -> None:
    """Serves until the process is told to end.

    Args:
        server: The endpoints.
        listener: A listening socket.

    Raises:
        Exception: That of a net that cannot be loaded, or of batches that have ended.
    """
    host, port = listener.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(server.app(), http=HeadersTimeoutProtocol, ws="none", access_log=False)
    uvicorn.config.logger.info("Uvicorn running on http://%s:%d", address, port)
    web = uvicorn.Server(config)

    def stop() -> None:
        config.timeout_graceful_shutdown = 1  # since the waiting requests will get no answer
        web.should_exit = True

    server.on_failure = stop
    web.run([listener])
    if server.failure is not None:
        raise server.failure
