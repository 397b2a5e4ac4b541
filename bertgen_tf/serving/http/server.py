"""The process of `bertgen-tf serve`: HTTP, connection limits, logs, shutdown.

Logs are JSON, one object a line, on stderr. After SIGTERM, SIGHUP or Ctrl-C nothing more is
accepted; what was accepted is answered before the process ends, within a time limit, which holds
whatever hangs.
"""

import contextlib
import datetime
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from bertgen_tf.serving.exports import COMPILING, THREADS, Models
from bertgen_tf.serving.http.app import ServingApp
from bertgen_tf.serving.http.origins import default_hosts
from bertgen_tf.serving.programs import keep_programs

_MAX_HEADER_BYTES = 2**16
# Seconds for which an idle connection stays open.
_KEEP_ALIVE = 75
# Seconds in which a refused client may read why.
_LINGER = 1.0
# Seconds from one look whether a client that sends no more is still there.
_PROBE = 0.2
# Seconds in which threads may end; and beyond the time for shutdown, for all that belongs to it.
_THREADS_GRACE, _SHUTDOWN_GRACE = 0.5, 2.0
# SIGHUP: the terminal is gone. Windows has none.
_SIGNALS = {signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM)}
_REASONS = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}
# What every record of Python's logging has; anything else was passed as `extra`.
_RECORD_FIELDS = {*vars(logging.makeLogRecord({})), "message", "color_message"}

_log = logging.getLogger(__name__)


def serve(
    folder: str | Path,
    host: str = "127.0.0.1",
    port: int = 8501,
    *,
    poll_seconds: float = 2.0,
    load_timeout: float = 600.0,
    request_timeout: float = 30.0,
    max_body_bytes: int = 4 * 2**20,
    max_texts: int = 1024,
    max_text_bytes: int = 2**16,
    batch_seconds: float = 1.0,
    max_queued_texts: int = 4096,
    max_connections: int = 512,
    batch_patience: float = 0.005,
    receive_timeout: float = 20.0,
    shutdown_timeout: float = 30.0,
    allowed_hosts: Sequence[str] | None = None,
    cors_origins: Sequence[str] | None = None,
    verify: bool = True,
    xla: bool = True,
) -> None:
    """Serves the exports of a folder until SIGTERM, SIGHUP or Ctrl-C.

    A SavedModel is a program, which can read and write files: serve those that you trust.

    When a load, a batch or a compilation has still not ended at the end, this ends the process, as
    Python would wait for it.

    Args:
        folder: see `bertgen_tf.serving.exports`.
        host: address to listen on.
        port: the same; 0 for any free one, which is logged.
        poll_seconds: between checks for new versions.
        load_timeout: seconds after which a load, with its warm-up requests, is given up.
        request_timeout: seconds after which a request is answered with 504. What would probably
            take longer is refused at once: with 503 if others wait, with 413 if it would take more
            than a third of the time alone.
        max_body_bytes: of a request; more is answered with 413.
        max_texts: of a request; more is answered with 413.
        max_text_bytes: of each text; more is answered with 413.
        batch_seconds: how long batches should take: a text that comes waits for two at most.
        max_queued_texts: waiting for their turn; more is answered with 503.
        max_connections: open at a time; more is answered with 503.
        batch_patience: seconds to wait for a full batch where several clients are active.
        receive_timeout: seconds in which a request must arrive; later is answered with 408.
        shutdown_timeout: seconds in which to answer what was accepted; the process has ended
            at most 3 seconds later.
        allowed_hosts: names that the `Host` of a request may have; "*" for all. None: on loopback
            localhost and its addresses, else all.
        cors_origins: sites whose pages may send requests and read the answers; "*" for all. None:
            only the server's own page.
        verify: see `bertgen_tf.serving.exports.Models`.
        xla: answer by compiled programs as soon as they are ready, and keep them in the user's
            cache, see `bertgen_tf.serving.programs`.

    Raises:
        FileNotFoundError: the folder has no models.
        OSError: the address is not free.
        ValueError: `cors_origins` has what is no site.
    """
    _log_as_json()
    models = Models(folder, load_timeout, verify, xla)
    listener = _listen(host, port)
    if xla:
        models.on_compiled = keep_programs()
    app = ServingApp(
        models,
        max_body_bytes=max_body_bytes,
        max_texts=max_texts,
        max_text_bytes=max_text_bytes,
        batch_seconds=batch_seconds,
        max_queued_texts=max_queued_texts,
        request_timeout=request_timeout,
        batch_patience=batch_patience,
        poll_seconds=poll_seconds,
        allowed_hosts=default_hosts(host) if allowed_hosts is None else allowed_hosts,
        cors_origins=cors_origins or (),
    )

    class Protocol(_Protocol):
        seconds_to_receive = receive_timeout
        most_connections = max_connections

    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=shutdown_timeout,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
    )
    address, number = listener.getsockname()[:2]
    url = f"http://{f'[{address}]' if ':' in address else address}:{number}"
    _log.info("serving on %s", url, extra={"url": url, "models": models.names})
    server = _Server(config, models, shutdown_timeout)
    # Before uvicorn has its handlers, and when it has stopped and sends itself the signal again.
    handlers = {
        number: signal.signal(number, server.handle_exit)
        for number in _SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN  # by nohup
    }
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        listener.close()
        hanging = _hanging_threads()
        server.finish()
    # A compilation takes seconds, and may be stopped anywhere.
    if wrong := [name for name in hanging if not name.startswith(COMPILING)]:
        _log.warning("does not end: %s", ", ".join(wrong))
    _log.info("stopped")
    if hanging:
        os._exit(0)  # `sys.exit` would wait for them


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise OSError(
            f"cannot listen on port {port} of {host}: {error.strerror or error}. Choose another "
            "host or port"
        ) from error


class _Server(uvicorn.Server):
    """Not ready from the signal on; the process ends in the given time.

    Args:
        seconds: for the end.
    """

    def __init__(self, config: uvicorn.Config, models: Models, seconds: float):
        super().__init__(config)
        self._models = models
        self._seconds = seconds
        self._signalled, self._ended = threading.Event(), threading.Event()
        threading.Thread(target=self._guard, daemon=True).start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._models.stopping:
            self._models.stopping = True
            self._signalled.set()
        super().handle_exit(sig, frame)

    def finish(self) -> None:
        """It has ended: the process need not."""
        self._ended.set()
        self._signalled.set()

    def _guard(self) -> None:
        """Ends the process when its time is over, even if the event loop hangs."""
        self._signalled.wait()
        if not self._ended.wait(self._seconds + _SHUTDOWN_GRACE):
            # In a thread: what hangs may hold the log.
            tell = threading.Thread(target=_log.error, args=("ended by force",), daemon=True)
            tell.start()
            tell.join(_THREADS_GRACE)
            os._exit(1)


def _hanging_threads() -> list[str]:
    """The names of those, for loads, batches and programs, that do not end."""
    end = time.monotonic() + _THREADS_GRACE
    threads = [thread for thread in threading.enumerate() if thread.name.startswith(THREADS)]
    for thread in sorted(threads, key=lambda t: t.name.startswith(COMPILING)):
        thread.join(max(0.0, end - time.monotonic()))
    return [thread.name for thread in threads if thread.is_alive()]


class _Protocol(H11Protocol):
    """Bounds the number of connections and the time to receive a request.

    The clock of a request runs from its first byte, and that of a new connection from its
    beginning, until the request is complete. Slow clients get 408, malformed requests 4xx, in JSON.
    Clients that do not read answers are cut off after the same time.
    """

    seconds_to_receive: float
    most_connections: int
    _clock: Any = None
    _refused = False
    _half_closed = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # asyncio leaves this to whoever made the socket. Without it, bodies wait 40 ms for the
        # client's system to acknowledge the head.
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(self.connections) > self.most_connections:
            self._refuse(503, f"There are {self.most_connections} connections, try again later")
            return
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE:
            self._start_clock()
        super().data_received(data)
        if not self.flow.write_paused and self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_clock()

    def eof_received(self) -> bool:
        """The client sends no more: it waits for its answers, or it has gone; whether it may."""
        if self._refused or not self._waits():
            return False
        self._half_closed = True
        self._close_after_last()
        if self.conn.our_state is h11.SEND_RESPONSE and self.scope["http_version"] == "1.1":
            # Both look the same until something is sent; what has gone then resets the connection.
            # Clients skip this line.
            proceed = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
            self.transport.write(self.conn.send(proceed))
        self.loop.call_later(_PROBE, self._probe)
        return True

    def _waits(self) -> bool:
        """Whether a whole request is to be answered."""
        cycle = self.cycle
        return cycle is not None and not (cycle.response_complete or cycle.more_body)

    def _close_after_last(self) -> None:
        if not self.conn.trailing_data[0]:  # requests that were sent ahead
            self.cycle.keep_alive = False

    def _probe(self) -> None:
        if self.transport.is_closing():
            return
        connection = self.transport.get_extra_info("socket")
        if not self._waits():
            self.transport.close()
        elif connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
        else:
            self.loop.call_later(_PROBE, self._probe)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_clock()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_clock()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._half_closed and self._waits():
            self._close_after_last()
        # The rest of an unwanted body keeps its clock; what was sent ahead has been handled.
        if self.conn.their_state is not h11.SEND_BODY:
            self._stop_clock()

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP; uvicorn calls it when it has caught h11's error."""
        error = sys.exception()
        status = getattr(error, "error_status_hint", 400)
        self._refuse(status if status in _REASONS else 400, f"Malformed request: {error or msg}")

    def _start_clock(self) -> None:
        if self._clock is None:
            self._clock = self.loop.call_later(self.seconds_to_receive, self._time_over)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _time_over(self) -> None:
        self._clock = None
        idle = self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
        if idle or self.flow.write_paused or self.transport.is_closing():
            self.transport.abort()
            return
        seconds = self.seconds_to_receive
        self._refuse(408, f"The request must be complete within {seconds:g} seconds")

    def _refuse(self, status: int, message: str) -> None:
        """Answers, if nothing has been answered yet, and closes the connection."""
        self._refused = True
        self._stop_clock()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps({"error": message}).encode()
            headers = [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                ("Connection", "close"),
            ]
            if status == 503:
                headers.append(("Retry-After", "1"))
            response = h11.Response(
                status_code=status, headers=headers, reason=_REASONS[status].encode()
            )
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
            # Closed with bytes unread, the connection would be reset, and the answer lost.
            with contextlib.suppress(OSError):  # the client has gone
                self.transport.write_eof()
            self.loop.call_later(_LINGER, self.transport.abort)
        else:
            self.transport.close()
        _log.info("refused", extra={"status": status, "error": message})


# -------------------------------------------------------------------------------------------- logs


class _JsonFormatter(logging.Formatter):
    """One object a line: time (UTC), level, message, what was passed as `extra`, traceback."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _RECORD_FIELDS}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _log_as_json() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter())
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    logging.captureWarnings(True)
    # Our own lines report the same.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    tensorflow = logging.getLogger("tensorflow")
    tensorflow.setLevel(logging.ERROR)
    tensorflow.handlers.clear()
    tensorflow.propagate = True
