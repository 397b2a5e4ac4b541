"""The web application of `bertgen-tf serve`: TensorFlow Serving's REST API, and a page to try it.

| path | |
| --- | --- |
| POST /v1/models/NAME[/versions/V]:predict | JSON: see `bertgen_tf.serving.http.rest_json` |
| GET /v1/models/NAME[/versions/V] | state of the versions |
| GET /v1/models/NAME[/versions/V]/metadata | signatures |
| GET /v1/models | all models, with their exports' metadata |
| GET /healthz, GET /readyz | alive; ready: 503 until all models are loaded, and during shutdown |
| GET /monitoring/prometheus/metrics | for Prometheus |
| GET / | the page |

Errors are `{"error": "..."}`. The server is neither alive nor ready while a batch hangs, which has
run for four times as long as a request may.
"""

import asyncio
import importlib.resources
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import prometheus_client
import prometheus_client.core
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from bertgen_tf.checkpoints.versions import LARGEST_VERSION
from bertgen_tf.serving.batching import (
    Batcher,
    QueueFull,
    RequestTooLarge,
    Result,
    is_client_error,
)
from bertgen_tf.serving.exports import Models, NotLoadedYet, Version
from bertgen_tf.serving.http.origins import ANY, BrowserGuard
from bertgen_tf.serving.http.rest_json import (
    BodyReader,
    RequestError,
    parse_request,
    read_inputs,
    write_outputs,
)
from bertgen_tf.serving.signatures import DEFAULT_SIGNATURE, Signature

PAGE_FILE = "playground.html"
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
# Bodies of at least this size are parsed in a thread, so that others need not wait.
_LARGE_BODY = 2**16
# Numbers and strings in an answer; in JSON each takes tens of bytes.
_MAX_ANSWER_ITEMS = 4_000_000
# A batch that has run for this many times the time of a request hangs.
_HANGING = 4
_CLIENT_GONE = 499  # only in logs and metrics
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

_log = logging.getLogger(__name__)


class ServingApp:
    """The application, to be called by ASGI.

    Args:
        models: what it serves.
        max_body_bytes: of a request, also after decompression.
        max_texts: rows of a request.
        max_text_bytes: of each string in a request.
        max_queued_texts: rows that may wait.
        request_timeout: seconds after which a request is answered with 504; what would probably
            take longer is refused at once, see `Batcher`.
        batch_seconds: see `Batcher`.
        batch_patience: see `Batcher`.
        poll_seconds: between checks for new versions.
        allowed_hosts, cors_origins: see `BrowserGuard`.
    """

    def __init__(
        self,
        models: Models,
        *,
        max_body_bytes: int = 4 * 2**20,
        max_texts: int = 1024,
        max_text_bytes: int = 2**16,
        max_queued_texts: int = 4096,
        request_timeout: float = 30.0,
        batch_seconds: float = 1.0,
        batch_patience: float = 0.005,
        poll_seconds: float = 2.0,
        allowed_hosts: Sequence[str] = (ANY,),
        cors_origins: Sequence[str] = (),
    ):
        self.models = models
        self.metrics = _Metrics(models, lambda: self.batcher)
        self.batcher = Batcher(
            max_queued_texts,
            request_timeout,
            batch_seconds,
            batch_patience,
            self.metrics.count_batch,
        )
        self._bodies = BodyReader(max_body_bytes)
        self._max_texts = max_texts
        self._max_text_bytes = max_text_bytes
        self._request_timeout = request_timeout
        self._poll_seconds = poll_seconds
        self._background: list[asyncio.Task] = []
        model = "/v1/models/{model}"
        application = Starlette(
            routes=[
                Route(f"{model}:{{verb}}", self._predict, methods=["POST"]),
                Route(f"{model}/versions/{{version}}:{{verb}}", self._predict, methods=["POST"]),
                Route("/v1/models", self._list),
                Route(f"{model}/versions/{{version}}/metadata", self._metadata),
                Route(f"{model}/versions/{{version}}", self._status),
                Route(f"{model}/metadata", self._metadata),
                Route(model, self._status),
                Route("/monitoring/prometheus/metrics", self._show_metrics),
                Route("/healthz", self._alive),
                Route("/readyz", self._ready),
                Route("/", self._page),
            ],
            exception_handlers={
                HTTPException: _http_error,
                RequestError: _request_error,
                LookupError: _request_error,
                ClientDisconnect: _client_gone,
                Exception: _internal_error,
            },
        )
        application.router.redirect_slashes = False
        self._app = BrowserGuard(application, allowed_hosts, cors_origins)
        self._regular = (self._status, self._show_metrics, self._alive, self._ready)

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        """Answers a request, by ASGI; logs and counts it."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        start = time.perf_counter()
        status = 0
        # What `_predict` records about the request.
        facts = scope.setdefault("state", {})["facts"] = {}

        async def send_and_watch(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_watch)
        except asyncio.CancelledError:  # the time for shutdown is over
            if not status:
                await _error(503, "The server is stopping")(scope, receive, send_and_watch)
        except Exception:  # answered by _internal_error
            _log.exception("cannot answer %s %s", scope["method"], scope["path"])
            status = 500
        seconds = time.perf_counter() - start
        if "model" in facts:
            self.metrics.count_request(facts, status, seconds)
        # Probes and scrapes come by the clock: they would drown what clients ask.
        regular = scope.get("endpoint") in self._regular and status in (200, 503)
        _log.log(
            logging.DEBUG if regular else logging.INFO,
            "request",
            extra={
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "ms": round(1000 * seconds, 2),
                **facts,
            },
        )

    async def start(self) -> None:
        """Starts loading models."""
        self._background = [asyncio.create_task(self.models.watch(self._poll_seconds))]

    async def stop(self) -> None:
        """Stops what runs in the background; requests still waiting are cancelled."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.batcher.close()

    async def _lifespan(self, receive: Callable, send: Callable) -> None:
        await receive()
        await self.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.stop()
        await send({"type": "lifespan.shutdown.complete"})

    # ------------------------------------------------------------------------------------- predict

    async def _predict(self, request: Request) -> Response:
        facts = request.state.facts
        if request.path_params["verb"] != "predict":
            raise HTTPException(404)
        version = self.models.find(*_target(request))
        facts["model"] = version.model
        with version.in_use():
            try:
                async with asyncio.timeout(self._request_timeout):
                    answer = await self._answer(request, version, facts)
            except TimeoutError:
                return _error(504, f"Timed out after {self._request_timeout:g} seconds")
            except RequestTooLarge as error:
                return _error(413, str(error))
            except QueueFull as error:
                return _error(503, str(error), {"Retry-After": "1"})
        return answer

    async def _answer(self, request: Request, version: Version, facts: dict[str, Any]) -> Response:
        # The body is freed before the request waits.
        signature, inputs, rows = await self._read(request, version, facts)
        try:
            result = await _unless_gone(request, self.batcher.run(signature, inputs))
        except Exception as error:
            if not is_client_error(error):
                raise
            raise RequestError(_explain(error)) from error
        facts["batch"] = result.batch_size
        facts["batch_ms"] = round(1000 * result.batch_seconds, 2)
        items = _total_items(result)
        if items > _MAX_ANSWER_ITEMS:
            raise RequestError(
                f"The answer would have {items:,} numbers and strings, and must have at most "
                f"{_MAX_ANSWER_ITEMS:,}. Send fewer texts",
                413,
            )
        content = await _in_thread_if_large(
            items, lambda: json.dumps(write_outputs(result.outputs, rows))
        )
        return Response(content, media_type="application/json")

    async def _read(
        self, request: Request, version: Version, facts: dict[str, Any]
    ) -> tuple[Signature, dict[str, np.ndarray], bool]:
        """The requested signature, its inputs, and whether to answer by rows."""
        async with self._bodies.read(request.headers, request.stream()) as body:
            content = await _in_thread_if_large(body, lambda: parse_request(body))
            signature = _find_signature(version, content.get("signature_name"))
            facts["signature"] = signature.name
            inputs, rows = await _in_thread_if_large(
                body, lambda: read_inputs(content, signature.inputs)
            )
        texts = max((x.shape[0] for x in inputs.values() if x.ndim), default=1)
        if texts > self._max_texts:
            raise RequestError(
                f"A request must have at most {self._max_texts} texts, received {texts}. Send "
                "several requests",
                413,
            )
        longest = max((len(text) for x in inputs.values() if x.dtype == object for text in x.flat),
                      default=0)  # fmt: skip
        if longest > self._max_text_bytes:
            raise RequestError(
                f"A text must have at most {self._max_text_bytes:,} bytes, received {longest:,}",
                413,
            )
        facts["texts"] = texts
        return signature, inputs, rows

    # -------------------------------------------------------------------------- everything else

    async def _status(self, request: Request) -> Response:
        versions = self.models.versions(*_target(request))
        return _json({"model_version_status": [version.describe() for version in versions]})

    async def _metadata(self, request: Request) -> Response:
        version = self.models.find(*_target(request))
        return _json(
            {
                "model_spec": {
                    "name": version.model,
                    "signature_name": "",
                    "version": str(version.number),
                },
                "metadata": {"signature_def": {"signature_def": version.signature_defs}},
            }
        )

    async def _list(self, request: Request) -> Response:
        """One entry for each model; those not loaded have no signatures."""
        models = []
        for name in self.models.names:
            version = self.models.current(name) or self.models.versions(name)[0]
            metadata = {key: value for key, value in version.metadata.items() if key != "files"}
            models.append(
                {
                    "name": name,
                    **version.describe(),
                    "signatures": sorted(version.signatures),
                    "metadata": metadata,
                }
            )
        return _json({"models": models})

    async def _show_metrics(self, request: Request) -> Response:
        return Response(
            prometheus_client.generate_latest(self.metrics.registry),
            media_type=prometheus_client.CONTENT_TYPE_LATEST,
        )

    async def _alive(self, request: Request) -> Response:
        return self._hangs() or _json({"status": "alive"})

    def _hangs(self) -> Response | None:
        """An error if a batch will probably never end."""
        if (seconds := self.batcher.busy_seconds) <= _HANGING * self._request_timeout:
            return None
        return _error(503, f"A batch has run for {seconds:.0f} seconds", {"Retry-After": "1"})

    async def _ready(self, request: Request) -> Response:
        if self.models.ready:
            return self._hangs() or _json({"status": "ready"})
        waiting = [name for name in self.models.names if not self.models.current(name)]
        why = "stopping" if self.models.stopping else f"not loaded: {', '.join(waiting)}"
        return _error(503, f"The server is not ready: {why}", {"Retry-After": "1"})

    async def _page(self, request: Request) -> Response:
        page = importlib.resources.files("bertgen_tf.serving.http") / PAGE_FILE
        try:
            return Response(page.read_bytes(), media_type="text/html", headers=_PAGE_HEADERS)
        except FileNotFoundError:
            return _error(404, f"This installation has no page: {PAGE_FILE} is missing")


class _Metrics:
    """The metrics for Prometheus."""

    def __init__(self, models: Models, batcher: Callable[[], Batcher]):
        self.registry = prometheus_client.CollectorRegistry()
        # Labels are names that exist, never what a client made up.
        labels = ["model", "signature"]
        own = {"namespace": "bertgen_tf", "registry": self.registry}
        self._requests = prometheus_client.Counter(
            "requests", "Requests to predict", [*labels, "status"], **own
        )
        self._seconds = prometheus_client.Histogram(
            "request_seconds", "Time to answer", labels, buckets=_SECONDS, **own
        )
        self._texts = prometheus_client.Counter("texts", "Texts of requests", labels, **own)
        self._batches = prometheus_client.Histogram(
            "batch_size",
            "Texts run together in a batch",
            ["signature"],
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            **own,
        )
        for name, what, read in (
            ("queued_texts", "Texts waiting", lambda: batcher().queued),
            ("queued_seconds", "Estimated time for them", lambda: batcher().queued_seconds),
            ("busy_seconds", "Age of the running batch", lambda: batcher().busy_seconds),
        ):
            prometheus_client.Gauge(name, what, **own).set_function(read)
        self._models = models
        self.registry.register(self)

    def count_request(self, facts: dict[str, Any], status: int, seconds: float) -> None:
        labels = facts["model"], facts.get("signature", "")
        self._requests.labels(*labels, status).inc()
        self._seconds.labels(*labels).observe(seconds)
        self._texts.labels(*labels).inc(facts.get("texts", 0))

    def count_batch(self, signature: Signature, rows: int) -> None:
        self._batches.labels(signature.name).observe(rows)

    def collect(self) -> Any:
        """The versions loaded at the time Prometheus asks, and which of their graphs answered."""
        loaded = prometheus_client.core.GaugeMetricFamily(
            "bertgen_tf_model_version_loaded", "1 if it is loaded", labels=["model", "version"]
        )
        runs = prometheus_client.core.CounterMetricFamily(
            "bertgen_tf_graph_runs",
            "Batches since the version was loaded, by the graph that answered",
            labels=["model", "graph"],
        )
        for name in self._models.names:
            version = self._models.current(name)
            if version:
                loaded.add_metric([name, str(version.number)], 1)
                for graph, signature in sorted(version.signatures.items()):
                    runs.add_metric([name, graph], signature.runs)
        return [loaded, runs]


def _target(request: Request) -> tuple[str, int | None]:
    """The model of a path, and the version if there is one."""
    name, number = request.path_params["model"], request.path_params.get("version")
    if request.method != "POST" and ":" in (number or name):
        raise HTTPException(405, headers={"Allow": "POST"})
    if number is None:
        return name, None
    decimal = number.isascii() and number.isdecimal() and len(number) < 100
    if not decimal or int(number) > LARGEST_VERSION:
        raise RequestError(f"Failed to convert version: {number[:40]!r} to numeric")
    return name, int(number)


def _find_signature(version: Version, name: str | None) -> Signature:
    name = name or DEFAULT_SIGNATURE
    signature = version.signatures.get(name)
    if signature is None:
        raise RequestError(
            f'Serving signature name: "{name[:100]}" not found in signature def. The signatures '
            f"are: {', '.join(sorted(version.signatures))}"
        )
    return signature


async def _unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled when the client goes away.

    Raises:
        ClientDisconnect: it went away.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _in_thread_if_large(size: bytes | int, work: Callable[[], Any]) -> Any:
    if (size if isinstance(size, int) else len(size)) < _LARGE_BODY:
        return work()
    return await asyncio.to_thread(work)


def _total_items(result: Result) -> int:
    return sum(np.size(x) for x in result.outputs.values())


def _explain(error: Exception) -> str:
    """TensorFlow's message, without what only the authors of the graph understand."""
    text = str(getattr(error, "message", error))
    text = re.split(r"\s*\[\[\{\{node|\s*\[Op:", text)[0]
    lines = [re.sub(r"\{\{.*?\}\}\s*", "", line).strip() for line in text.splitlines()]
    return next((line for line in reversed(lines) if line), "The inputs do not fit")[:500]


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content), status, headers, "application/json")


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return _json({"error": message}, status, headers)


async def _request_error(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestError):
        # The rest of the body of a too large request must not be read as another request.
        headers = {413: {"Connection": "close"}, 503: {"Retry-After": "1"}}.get(error.status)
        return _error(error.status, str(error), headers)
    if isinstance(error, NotLoadedYet):
        return _error(503, str(error), {"Retry-After": "1"})
    if type(error) is LookupError:
        return _error(404, str(error))
    raise error


async def _client_gone(request: Request, error: Exception) -> Response:
    return _error(_CLIENT_GONE, "The client went away")


async def _internal_error(request: Request, error: Exception) -> Response:
    return _error(500, "Internal error; the server's log says more")


async def _http_error(request: Request, error: Exception) -> Response:
    message = f"Malformed request: {request.method} {request.url.path[:200]}"
    if error.status_code == 405:
        allowed = sorted(error.headers["Allow"].split(", "))
        message += f": the method must be {' or '.join(allowed)}"
    elif error.status_code == 404:
        message += ": there is no such path, see /v1/models"
    return _error(error.status_code, message, error.headers)
