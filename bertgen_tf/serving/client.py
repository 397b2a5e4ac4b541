"""Asks TensorFlow Serving, or `bertgen-tf serve`, for texts: over REST or gRPC, with retries.

    client = Client("http://localhost:8501", "my_model")  # or grpc://localhost:8500
    client.generate(["one", "two"])

A call is split into requests of `batch_size` texts, a few of which are in flight at a time.
Transient failures are retried: HTTP 429, 502 and 503, gRPC's UNAVAILABLE and RESOURCE_EXHAUSTED,
refused and broken connections. That is safe, because an answer changes nothing on the server. The
pauses between tries are random and double their range each time, so that many clients do not come
back at once; `Retry-After` makes them longer. HTTP 504 and DEADLINE_EXCEEDED are not retried: the
server had its time, and the same work would take as long. Nor is any other error, which would only
recur.

`timeout` bounds the whole call, pauses and all its requests included; within it, a request that has
no answer after `request_timeout` is retried, too. The first request that fails for good ends the
call.
"""

import itertools
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, TypeVar

import numpy as np
import tensorflow as tf

from bertgen_tf.checks import check_integer
from bertgen_tf.serving.transport import (
    DeadlineExceeded,
    GrpcTransport,
    RestTransport,
    ServingError,
    check_headers,
    read_url,
)

__all__ = ["Client", "DeadlineExceeded", "ServingError", "ServingOutput", "VersionStatus"]

# Seconds. Before its first retry, a request waits for up to FIRST_PAUSE.
FIRST_PAUSE, MAX_PAUSE = 0.5, 10.0
POLL_INTERVAL = 0.5
# For the time-out of the transport itself, whose error says more.
GRACE = 0.1
TEXTS = {"text": tf.string, "score": tf.float32}
LOG_PROBABILITIES = {"log_probability": tf.float32, "num_tokens": tf.int32}

T = TypeVar("T")


class ServingOutput(NamedTuple):
    """What `generate` gives with `output_scores`; n = 1 where a signature gives only the best.

    Attributes:
        texts: what `generate` gives without scores.
        scores: float32 [N, n]: log-probabilities, divided by the length penalty of the settings.
    """

    texts: Any
    scores: np.ndarray


class VersionStatus(NamedTuple):
    """The state of one version on the server.

    Attributes:
        version: its number.
        state: "START", "LOADING", "AVAILABLE", "UNLOADING", "END" or "UNKNOWN".
        error: why it does not load, or empty.
    """

    version: int
    state: str
    error: str


class Client:
    """One model on one server; threads may share it.

    Args:
        url: `http://HOST:8501` or `https://...` for REST, also with a path that a proxy puts in
            front; `grpc://HOST:8500` or `grpcs://...` (TLS, with the machine's root certificates)
            for gRPC.
        model_name: the model's name on the server.
        version: an integer; by default the server's choice, its latest.
        signature: what `generate` asks, see `bertgen_tf.export`.
        batch_size: texts in a request, at most.
        max_concurrency: requests of a call in flight at a time, at most.
        timeout: seconds for a call, in all.
        request_timeout: seconds after which a request is given up and retried, because networks
            lose answers and servers die; by default half of `timeout`.
        retries: how often a request is retried, at most.
        headers: sent with each request, such as {"Authorization": "Bearer ..."}; metadata of gRPC.

    Raises:
        ImportError: urllib3 or grpcio is not installed.
        TypeError, ValueError: an argument is invalid.
    """

    def __init__(
        self,
        url: str,
        model_name: str,
        *,
        version: int | None = None,
        signature: str = "serving_default",
        batch_size: int = 32,
        max_concurrency: int = 4,
        timeout: float = 60.0,
        request_timeout: float | None = None,
        retries: int = 5,
        headers: Mapping[str, str] | None = None,
    ):
        if not re.fullmatch(r"[^/:]+", model_name):
            raise ValueError(
                "model_name must be the model's name on the server, without / and :, "
                f"received {model_name!r}."
            )
        for name, value in (("batch_size", batch_size), ("max_concurrency", max_concurrency)):
            check_integer(name, value)
        if version is not None:
            check_integer("version", version, 0)
        check_integer("retries", retries, 0)
        _check_seconds("timeout", timeout)
        if request_timeout is not None:
            _check_seconds("request_timeout", request_timeout)
        self.url = url
        self.model_name = model_name
        self.signature = signature
        self.batch_size = batch_size
        self.max_concurrency = max_concurrency
        self.timeout = timeout
        self.request_timeout = timeout / 2 if request_timeout is None else request_timeout
        self.retries = retries
        self._closed = False
        parts = read_url(url)
        transport = GrpcTransport if parts.scheme.startswith("grpc") else RestTransport
        self._transport = transport(parts, model_name, version, check_headers(headers or {}))

    def generate(
        self,
        texts: str | bytes | Sequence[str | bytes],
        *,
        signature: str | None = None,
        output_scores: bool = False,
    ) -> Any:
        """Generates from text, as `EncoderDecoderModel.generate` does.

        Args:
            texts: a string, or a list of them; bytes need not be UTF-8.
            signature: another one than the client's: serving_default, beams, a NAME of the export,
                or one of these with _xla.
            output_scores: also return the scores.

        Returns:
            a str for a string, a list of str for a list; signatures that give n hypotheses (beams)
            return a list of them, best first, in place of each str. With `output_scores` a
            `ServingOutput`.

        Raises:
            DeadlineExceeded: `timeout` passed.
            ServingError: the server refused, failed, was unreachable or sent a malformed answer.
            TypeError: texts are not strings.
        """
        sources, single = _read_texts("texts", texts)
        parts = self._predict_batches({"text": sources}, signature or self.signature, TEXTS)
        results = [text for part in parts for text in part["text"].tolist()]
        results = results[0] if single else results
        if not output_scores:
            return results
        scores = [part["score"].reshape(len(part["score"]), -1) for part in parts]
        return ServingOutput(
            results, np.concatenate(scores) if scores else np.zeros([0, 1], np.float32)
        )

    def score(
        self, sources: str | bytes | Sequence[str | bytes], targets: str | bytes | Sequence
    ) -> float | list[float]:
        """Log-probabilities of targets, from the signature `score`.

        Args:
            sources: a string, or a list of them.
            targets: the same, as many.

        Returns:
            a float for strings, a list of float for lists.

        Raises:
            ServingError: see `generate`.
            TypeError, ValueError: sources or targets are neither strings nor lists of equal length.
        """
        sources, single = _read_texts("sources", sources)
        targets, single_target = _read_texts("targets", targets)
        if (len(sources), single) != (len(targets), single_target):
            raise ValueError(
                f"sources and targets must be two strings or two lists of equal length, received "
                f"{len(sources)} and {len(targets)}."
            )
        inputs = {"source": sources, "target": targets}
        parts = self._predict_batches(inputs, "score", LOG_PROBABILITIES)
        scores = [score for part in parts for score in part["log_probability"].tolist()]
        return scores[0] if single else scores

    def predict(
        self, inputs: Mapping[str, Any], signature: str | None = None
    ) -> dict[str, np.ndarray]:
        """Runs any signature once, with inputs and outputs as described by its metadata.

        Args:
            inputs: an array, or what converts to one, for each input of the signature.
            signature: another one than the client's.

        Returns:
            an array for each output; strings are str, in arrays of objects.

        Raises:
            ServingError: see `generate`.
            ValueError: inputs do not fit the signature, or there is none of this name.
        """
        signature = signature or self.signature
        end = time.monotonic() + self.timeout
        specs = self._read_signatures(end)
        if signature not in specs:
            raise ValueError(
                f"signature must be one of {', '.join(sorted(specs))}, received {signature!r}."
            )
        wanted = specs[signature]["inputs"]
        if set(inputs) != set(wanted):
            raise ValueError(
                f"inputs of {signature} must be {', '.join(sorted(wanted))}, received "
                f"{', '.join(sorted(inputs)) or 'none'}."
            )
        arrays = {name: _input_array(name, value, wanted[name]) for name, value in inputs.items()}
        outputs = specs[signature]["outputs"]
        dtypes = {name: spec.dtype for name, spec in outputs.items()}
        [answer] = self._predict(
            [lambda timeout: self._transport.predict(arrays, signature, dtypes, timeout)],
            signature,
            end,
        )
        for name, array in answer.items():
            shape = outputs[name].shape
            if array.size == 0 and shape.rank is not None and array.ndim < shape.rank:
                # JSON's [] does not specify the further dimensions.
                answer[name] = array.reshape(
                    [*array.shape, *(size or 0 for size in shape[array.ndim :])]
                )
        return answer

    def status(self) -> list[VersionStatus]:
        """The versions of the model that the server knows, or the client's version.

        Raises:
            ServingError: see `generate`; the server does not know the model.
        """
        return self._read_status(time.monotonic() + self.timeout)

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Returns when the server has a version of the model that is AVAILABLE.

        Args:
            timeout: seconds to wait; by default the client's.

        Raises:
            DeadlineExceeded: that did not happen; the message says what was seen last.
            ServingError: the server refuses, other than by not knowing the model.
        """
        timeout = self.timeout if timeout is None else timeout
        _check_seconds("timeout", timeout)
        end, seen = time.monotonic() + timeout, "nothing"
        while time.monotonic() < end:
            try:
                versions = self._read_status(end, retries=0)
                if any(version.state == "AVAILABLE" for version in versions):
                    return
                seen = _describe(versions)
            except DeadlineExceeded as error:
                seen = seen if seen != "nothing" else str(error)
            except ServingError as error:
                if error.retry_after is None and error.code not in (404, "NOT_FOUND"):
                    raise
                seen = str(error)
            time.sleep(min(POLL_INTERVAL, max(0, end - time.monotonic())))
        raise DeadlineExceeded(
            f"{self._transport.place}: not ready after {timeout:g} seconds. Last seen: {seen}"
        )

    def metadata(self) -> dict[str, dict[str, dict[str, tf.TensorSpec]]]:
        """The signatures: name -> {"inputs": {name: spec}, "outputs": {name: spec}}.

        Raises:
            ServingError: see `generate`.
        """
        return self._read_signatures(time.monotonic() + self.timeout)

    def close(self) -> None:
        """Closes the connections; the client cannot be used afterwards."""
        self._closed = True
        self._transport.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _predict_batches(
        self, inputs: dict[str, list[bytes]], signature: str, outputs: dict[str, tf.DType]
    ) -> list[dict[str, np.ndarray]]:
        """The answers to batches of rows, in order, each of as many rows."""
        count = len(next(iter(inputs.values())))

        def predict(start: int, end: int, timeout: float) -> dict[str, np.ndarray]:
            part = {name: np.array(rows[start:end], object) for name, rows in inputs.items()}
            until = time.monotonic() + timeout
            try:
                answer = self._transport.predict(part, signature, outputs, timeout)
            except ServingError as error:
                if error.code != 413 or end - start == 1 or "such text" not in str(error):
                    raise
                # So many are too much work for one request.
                middle = (start + end) // 2
                halves = [
                    predict(*half, max(0.0, until - time.monotonic()))
                    for half in ((start, middle), (middle, end))
                ]
                return {name: np.concatenate([half[name] for half in halves]) for name in outputs}
            shapes = sorted({array.shape for array in answer.values()})
            if len(shapes) > 1 or len(shapes[0]) not in (1, 2) or shapes[0][0] != end - start:
                raise ServingError(
                    f"{self._transport.place}, signature {signature}: malformed answer: "
                    f"{' and '.join(answer)} must have {end - start} rows, and one shape, "
                    f"received shapes {', '.join(map(str, shapes))}."
                )
            return answer

        starts = range(0, count, self.batch_size)
        calls = [
            lambda timeout, start=start: predict(
                start, min(start + self.batch_size, count), timeout
            )
            for start in starts
        ]
        return self._predict(calls, signature, time.monotonic() + self.timeout)

    def _predict(
        self, calls: Sequence[Callable[[float], dict[str, np.ndarray]]], signature: str, end: float
    ) -> list[dict[str, np.ndarray]]:
        """Runs `calls`; where they fail, the error says what the server has instead."""
        try:
            return self._run(calls, end)
        except ServingError as error:
            unknown_model = error.code in (404, "NOT_FOUND")
            if not unknown_model and "Serving signature" not in str(error):
                raise
            try:
                if unknown_model:
                    found = f"The server has {_describe(self._read_status(end, retries=0))}"
                else:
                    found = f"It has {', '.join(sorted(self._read_signatures(end, retries=0)))}."
            except ServingError as other:
                found = f"Nor does the server say what it has: {other}"
            raise ServingError(f"{error} {found}", error.code) from error

    def _read_status(self, end: float, retries: int | None = None) -> list[VersionStatus]:
        [answer] = self._run([self._transport.status], end, retries)
        return [
            VersionStatus(
                status.version, type(status).State.Name(status.state), status.status.error_message
            )
            for status in answer.model_version_status
        ]

    def _read_signatures(
        self, end: float, retries: int | None = None
    ) -> dict[str, dict[str, dict[str, tf.TensorSpec]]]:
        [answer] = self._run([self._transport.metadata], end, retries)
        try:
            return {
                name: {
                    "inputs": {k: _spec(k, info) for k, info in signature.inputs.items()},
                    "outputs": {k: _spec(k, info) for k, info in signature.outputs.items()},
                }
                for name, signature in answer.signature_def.items()
                if not name.startswith("__saved_model")
            }
        except (TypeError, ValueError) as error:
            raise ServingError(f"{self._transport.place}: malformed metadata: {error}") from error

    def _run(
        self, calls: Sequence[Callable[[float], T]], end: float, retries: int | None = None
    ) -> list[T]:
        """The results of `calls`, a few at a time; each is given the seconds until `end`."""
        if self._closed:
            raise ValueError("the client is closed. Make another.")
        if not calls:
            return []
        retries = self.retries if retries is None else retries
        timeout, stop = max(0.0, end - time.monotonic()), threading.Event()
        late = DeadlineExceeded(f"{self._transport.place}: not done within {timeout:.3g} seconds.")
        # A single call, too: no time-out applies to host look-up, or to an answer that trickles in.
        executor = ThreadPoolExecutor(min(len(calls), self.max_concurrency))
        try:
            limits = end, self.request_timeout, retries
            futures = [executor.submit(_attempt, call, *limits, stop, late) for call in calls]
            done, others = wait(futures, timeout + GRACE, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future in done:
                    future.result()
            if others:
                raise late
            return [future.result() for future in futures]
        finally:
            stop.set()
            executor.shutdown(wait=False, cancel_futures=True)


def _attempt(
    call: Callable[[float], T],
    end: float,
    request_timeout: float,
    retries: int,
    stop: threading.Event,
    late: DeadlineExceeded,
) -> T:
    """The result of `call`, which is retried where its error is transient."""
    for attempt in itertools.count():
        rest = end - time.monotonic()
        if rest <= 0:
            raise late
        bounded = request_timeout < rest
        try:
            return call(min(request_timeout, rest))
        except ServingError as error:
            # 504 means that the server's own time is over.
            unanswered = bounded and isinstance(error, DeadlineExceeded) and error.code != 504
            if (error.retry_after is None and not unanswered) or attempt >= retries:
                raise
            longest = min(MAX_PAUSE, FIRST_PAUSE * 2 ** min(attempt, 20))
            pause = max(error.retry_after or 0, random.uniform(0, longest))
            if pause >= end - time.monotonic():
                raise DeadlineExceeded(
                    f"{error} No time is left to send it again.", error.code
                ) from error
            if stop.wait(pause):
                raise  # another request of the call has failed: nobody waits for this


def _read_texts(name: str, texts: Any) -> tuple[list[bytes], bool]:
    """The texts as bytes, and whether they are a single one, not in a list."""
    single = isinstance(texts, str | bytes)
    if not single and not isinstance(texts, list | tuple):
        raise TypeError(
            f"{name} must be a string or a list of strings, received a {type(texts).__name__}."
        )
    found = []
    for place, text in enumerate([texts] if single else texts):
        if not isinstance(text, str | bytes):
            raise TypeError(
                f"{name} must be a string or a list of strings, received a list with "
                f"{type(text).__name__} at {place}."
            )
        found.append(_bytes(text))
    return found, single


def _bytes(text: str | bytes) -> bytes:
    # Surrogates, such as those of file names, become bytes that are not UTF-8.
    return text if isinstance(text, bytes) else text.encode(errors="surrogatepass")


def _input_array(name: str, value: Any, spec: tf.TensorSpec) -> np.ndarray:
    """What the signature takes under this name."""
    try:
        array = np.asarray(value, spec.dtype.as_numpy_dtype)
        if spec.dtype == tf.string:
            texts = [_bytes(text) for text in array.flat]
            array = np.array(texts, object).reshape(array.shape)
        elif not spec.dtype.is_floating and not np.array_equal(array, value):
            raise ValueError("other numbers")
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(
            f"inputs[{name!r}] must be an array of {spec.dtype.name}, received {value!r:.200}."
        ) from error
    return array


def _spec(name: str, info: Any) -> tf.TensorSpec:
    return tf.TensorSpec(tf.TensorShape(info.tensor_shape), tf.dtypes.as_dtype(info.dtype), name)


def _describe(versions: list[VersionStatus]) -> str:
    texts = [
        f"version {version.version} {version.state}"
        + (f" ({version.error})" if version.error else "")
        for version in versions
    ]
    return f"{', '.join(texts) or 'no version'}."


def _check_seconds(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 < value < threading.TIMEOUT_MAX / 2):
        raise ValueError(f"{name} must be a positive number of seconds, received {value!r}.")
