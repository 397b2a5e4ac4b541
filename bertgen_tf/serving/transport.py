"""One request to TensorFlow Serving, over REST or gRPC, with its answer checked.

The two transports are the same to `bertgen_tf.serving.client`, which splits calls into requests and
retries these: `predict`, `status` and `metadata` give arrays or TensorFlow Serving's own messages,
or raise `ServingError`, whatever comes in place of an answer.
"""

import base64
import json
import re
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf import json_format

MAX_ANSWER_BYTES = 1 << 26
MAX_SHOWN = 500
CONNECT_TIMEOUT = 10.0  # seconds; an answer may take all that is left
# Requests beyond this many at a time make connections that are not kept.
KEPT_CONNECTIONS = 32
INSTALL = 'pip install "bertgen_tf[serving]"'
XLA_DISABLED = "XLA compilation disabled"
XLA_REMEDY = (
    "The server runs without XLA, which this signature needs: use serving_default, or start the "
    "server with --xla_cpu_compilation_enabled=true (on a GPU --xla_gpu_compilation_enabled=true)."
)
TOKEN_REMEDY = "If it requires a token, pass it in headers."
REMEDIES = {
    401: TOKEN_REMEDY,
    403: TOKEN_REMEDY,
    413: "Lower batch_size.",
    504: "Lower batch_size, or raise the server's --rest_api_timeout_in_ms.",
    "DEADLINE_EXCEEDED": "Lower batch_size, or raise timeout.",
    "PERMISSION_DENIED": TOKEN_REMEDY,
    "UNAUTHENTICATED": TOKEN_REMEDY,
}


class ServingError(RuntimeError):
    """A request failed: the message says which, why, and what to do.

    Attributes:
        code: the HTTP status as an integer, or the name of gRPC's, such as "NOT_FOUND"; None if no
            answer came, or a malformed one.
        retry_after: None if the same request would fail again, else the seconds that the server
            asks to wait, 0 if it does not.
    """

    def __init__(
        self, message: str, code: int | str | None = None, retry_after: float | None = None
    ):
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


class DeadlineExceeded(ServingError, TimeoutError):
    """The client's `timeout` passed, or the server's own."""


class RestTransport:
    """TensorFlow Serving's REST interface, in its columnar format.

    Args:
        url: the server's, with the scheme http or https.
        model_name, version: the model; None leaves the version to the server.
        headers: for every request.
    """

    def __init__(
        self,
        url: urllib.parse.SplitResult,
        model_name: str,
        version: int | None,
        headers: Mapping[str, str],
    ):
        try:
            import urllib3
        except ImportError as error:
            raise ImportError(f"REST needs urllib3, which is not installed: {INSTALL}.") from error
        self.urllib3 = urllib3
        self.pool = urllib3.connection_from_url(url.geturl(), maxsize=KEPT_CONNECTIONS)
        self.path = f"{url.path.rstrip('/')}/v1/models/{urllib.parse.quote(model_name, safe='')}"
        if version is not None:
            self.path += f"/versions/{version}"
        self.place = f"{url.scheme}://{url.netloc}{self.path}"
        self.headers = {**headers, "Content-Type": "application/json"}

    def close(self) -> None:
        self.pool.close()

    def predict(
        self,
        inputs: Mapping[str, np.ndarray],
        signature: str,
        outputs: Mapping[str, tf.DType],
        timeout: float,
    ) -> dict[str, np.ndarray]:
        """The outputs named in `outputs`, of these dtypes; strings come as str."""
        place = f"{self.place}:predict, signature {signature}"
        columns = {name: _json_value(array.tolist()) for name, array in inputs.items()}
        request = {"signature_name": signature, "inputs": columns}
        body = json.dumps(request, ensure_ascii=False).encode()
        answer = self._ask("POST", ":predict", body, timeout, place)
        if "outputs" not in answer:
            raise _malformed(place, f'no "outputs" in {_shorten(json.dumps(answer))}')
        values = answer["outputs"]
        if len(outputs) == 1:  # the server leaves its name out
            values = dict.fromkeys(outputs, values)
        if not isinstance(values, dict) or not outputs.keys() <= values.keys():
            names = ", ".join(values) if isinstance(values, dict) else type(values).__name__
            raise _malformed(place, f"outputs must be {', '.join(outputs)}, received {names}")
        return {name: _read_column(place, name, values[name], outputs[name]) for name in outputs}

    def status(self, timeout: float) -> Any:
        """A GetModelStatusResponse."""
        from tensorflow_serving.apis import get_model_status_pb2

        answer = self._ask("GET", "", None, timeout, self.place)
        return _read_message(self.place, answer, get_model_status_pb2.GetModelStatusResponse())

    def metadata(self, timeout: float) -> Any:
        """A SignatureDefMap."""
        from tensorflow_serving.apis import get_model_metadata_pb2

        place = f"{self.place}/metadata"
        answer = self._ask("GET", "/metadata", None, timeout, place).get("metadata")
        signatures = answer.get("signature_def") if isinstance(answer, dict) else None
        return _read_message(place, signatures, get_model_metadata_pb2.SignatureDefMap())

    def _ask(
        self, method: str, suffix: str, body: bytes | None, timeout: float, place: str
    ) -> dict[str, Any]:
        """The JSON object of an answer."""
        end = time.monotonic() + timeout
        errors = self.urllib3.exceptions
        try:
            response = self.pool.request(
                method,
                self.path + suffix,
                body=body,
                headers=self.headers,
                timeout=self.urllib3.Timeout(
                    connect=min(CONNECT_TIMEOUT, timeout), read=timeout, total=timeout
                ),
                retries=False,  # nor redirects
                preload_content=False,
            )
            data = self._read(response, end, place)
        except errors.SSLError as error:
            raise ServingError(
                f"{place}: no secure connection: {error}. Put your own root certificates into "
                "a file that SSL_CERT_FILE names."
            ) from error
        except errors.ReadTimeoutError as error:
            raise DeadlineExceeded(f"{place}: no answer within {timeout:.3g} seconds.") from error
        except errors.HTTPError as error:
            message = f"{place}: no answer: {_shorten(error)}"
            raise ServingError(message, retry_after=0.0) from error
        if response.status != 200:
            raise self._failure(response, data, place)
        try:
            answer = json.loads(data.decode())
        except (ValueError, RecursionError) as error:
            shown = _shorten(data.decode(errors="replace"))
            raise _malformed(place, f"expected JSON, received {shown!r} ({error})") from error
        if not isinstance(answer, dict):
            raise _malformed(place, f"expected an object, received {_shorten(json.dumps(answer))}")
        return answer

    def _read(self, response: Any, end: float, place: str) -> bytes:
        """The body, of bounded size, in bounded time; then the connection may be used again."""
        data = bytearray()
        try:
            # Not read(), which waits for all of it, however slow.
            while part := response.read1(1 << 16):
                data += part
                if len(data) > MAX_ANSWER_BYTES:
                    raise ServingError(
                        f"{place}: the answer is larger than {MAX_ANSWER_BYTES:,} bytes. Lower "
                        "batch_size.",
                        response.status,
                    )
                if time.monotonic() > end:
                    raise DeadlineExceeded(f"{place}: the answer did not end in time.")
        except BaseException:
            response.close()
            raise
        response.release_conn()
        return bytes(data)

    def _failure(self, response: Any, data: bytes, place: str) -> ServingError:
        text = data.decode(errors="replace")
        try:
            message = json.loads(text)["error"]
        # Older servers escape as C does, which is not JSON.
        except (ValueError, KeyError, TypeError, RecursionError):
            message = text
        retry_after = None
        if response.status in (429, 502, 503):
            try:
                retry_after = self.urllib3.Retry().get_retry_after(response) or 0.0
            except self.urllib3.exceptions.InvalidHeader:
                retry_after = 0.0
        kind = DeadlineExceeded if response.status == 504 else ServingError
        return kind(
            _error_text(place, f"{response.status} {response.reason}", response.status, message),
            response.status,
            retry_after,
        )


class GrpcTransport:
    """TensorFlow Serving's gRPC services; arguments and methods are those of `RestTransport`.

    The schemes are grpc, and grpcs for TLS; the keys of `headers` become lower case, as gRPC's are.
    """

    def __init__(
        self,
        url: urllib.parse.SplitResult,
        model_name: str,
        version: int | None,
        headers: Mapping[str, str],
    ):
        try:
            import grpc
            from tensorflow_serving.apis import (
                model_service_pb2_grpc,
                prediction_service_pb2_grpc,
            )
        except ImportError as error:
            raise ImportError(f"gRPC needs grpcio, which is not installed: {INSTALL}.") from error
        self.grpc = grpc
        options = [
            ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
            ("grpc.max_send_message_length", -1),
            # Without it a server that comes back is not asked for up to two minutes.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.min_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]
        if url.scheme == "grpcs":
            credentials = grpc.ssl_channel_credentials()
            self.channel = grpc.secure_channel(url.netloc, credentials, options)
        else:
            self.channel = grpc.insecure_channel(url.netloc, options)
        self.predictions = prediction_service_pb2_grpc.PredictionServiceStub(self.channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self.channel)
        self.model_name, self.version = model_name, version
        self.place = f"{url.scheme}://{url.netloc}, model {model_name}"
        if version is not None:
            self.place += f", version {version}"
        self.headers = [(name.lower(), value) for name, value in headers.items()]

    def close(self) -> None:
        self.channel.close()

    def predict(
        self,
        inputs: Mapping[str, np.ndarray],
        signature: str,
        outputs: Mapping[str, tf.DType],
        timeout: float,
    ) -> dict[str, np.ndarray]:
        from tensorflow_serving.apis import predict_pb2

        place = f"{self.place}, signature {signature}"
        request = predict_pb2.PredictRequest(output_filter=list(outputs))
        self._name_model(request.model_spec)
        request.model_spec.signature_name = signature
        for name, array in inputs.items():
            dtype = tf.string if array.dtype == object else None
            request.inputs[name].CopyFrom(tf.make_tensor_proto(array, dtype, array.shape))
        answer = self._ask(self.predictions.Predict, request, timeout, place)
        if not set(outputs) <= set(answer.outputs):
            names = ", ".join(answer.outputs) or "none"
            raise _malformed(place, f"outputs must be {', '.join(outputs)}, received {names}")
        return {
            name: _read_tensor(place, name, answer.outputs[name], dtype)
            for name, dtype in outputs.items()
        }

    def status(self, timeout: float) -> Any:
        from tensorflow_serving.apis import get_model_status_pb2

        request = get_model_status_pb2.GetModelStatusRequest()
        self._name_model(request.model_spec)
        return self._ask(self.models.GetModelStatus, request, timeout, self.place)

    def metadata(self, timeout: float) -> Any:
        from tensorflow_serving.apis import get_model_metadata_pb2

        request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        self._name_model(request.model_spec)
        answer = self._ask(self.predictions.GetModelMetadata, request, timeout, self.place)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        if not answer.metadata["signature_def"].Unpack(signatures):
            raise _malformed(self.place, "metadata without signature_def")
        return signatures

    def _name_model(self, spec: Any) -> None:
        spec.name = self.model_name
        if self.version is not None:
            spec.version.value = self.version

    def _ask(self, method: Any, request: Any, timeout: float, place: str) -> Any:
        try:
            return method(request, timeout=timeout, metadata=self.headers)
        except self.grpc.RpcError as error:
            code, message = error.code().name, error.details() or ""
            # RESOURCE_EXHAUSTED is also what gRPC says for an answer beyond MAX_ANSWER_BYTES.
            too_large = "message larger than max" in message
            passes = code in ("UNAVAILABLE", "RESOURCE_EXHAUSTED") and not too_large
            text = _error_text(place, code, code, message)
            kind = DeadlineExceeded if code == "DEADLINE_EXCEEDED" else ServingError
            raise kind(
                f"{text} Lower batch_size." if too_large else text, code, 0.0 if passes else None
            ) from error


def read_url(url: str) -> urllib.parse.SplitResult:
    """The parts of a URL that has a scheme and a host, and for gRPC a port.

    Raises:
        ValueError: it lacks these, or has more.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        fits = parts.hostname and "@" not in parts.netloc and not (parts.query or parts.fragment)
        grpc = parts.scheme in ("grpc", "grpcs")
        # Reading a port checks it.
        fits = fits and (parts.port and not parts.path.strip("/") if grpc else parts.port != 0)
        fits = fits and (grpc or parts.scheme in ("http", "https"))
    except (AttributeError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            "url must be http://HOST:PORT or https://HOST:PORT for REST, grpc://HOST:PORT or "
            f"grpcs://HOST:PORT for gRPC, without user and query, received {url!r}. What a proxy "
            "asks for goes into headers."
        )
    return parts


def check_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The same, checked.

    Raises:
        ValueError: they are not what HTTP or gRPC could send.
    """
    for name, value in headers.items():
        if not (
            isinstance(name, str)
            and re.fullmatch(r"[A-Za-z0-9_.-]+", name)
            and isinstance(value, str)
            and value.isascii()
            and value.isprintable()
        ):
            # Its value may be a secret.
            raise ValueError(
                f"headers must be names and values of printable ASCII, received another one for "
                f"{name!r}."
            )
    return dict(headers)


def _json_value(value: Any) -> Any:
    """JSON for the elements of an array: text, or base64 for bytes that are not text."""
    if isinstance(value, list):
        return [_json_value(element) for element in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"b64": base64.b64encode(value).decode()}
    return value


def _read_column(place: str, name: str, value: Any, dtype: tf.DType) -> np.ndarray:
    """JSON's nested lists -> an array; strings are str."""
    try:
        if dtype == tf.string:
            array = np.array(value, object)
            fits = all(isinstance(element, str) for element in array.flat)
        else:
            plain = np.array(value)
            array = plain.astype(dtype.as_numpy_dtype)
            # No text that spells numbers, no fractions for integers; an empty array is of floats.
            kinds = {"f": "iuf", "b": "b"}.get(array.dtype.kind, "iu")
            fits = plain.dtype.kind in kinds or not plain.size
            if array.dtype.kind in "iu":
                fits = fits and np.array_equal(plain, array)
    except (ValueError, TypeError, OverflowError):  # rows of different lengths, null, objects
        fits = False
    if not fits:
        shown = _shorten(json.dumps(value))
        raise _malformed(place, f"{name} must be an array of {dtype.name}, received {shown}")
    return array


def _read_tensor(place: str, name: str, tensor: Any, dtype: tf.DType) -> np.ndarray:
    """A TensorProto -> an array; strings are str."""
    try:
        if tensor.dtype != dtype.as_datatype_enum:
            raise TypeError(f"received {tf.dtypes.as_dtype(tensor.dtype).name}")
        array = tf.make_ndarray(tensor)
        if dtype == tf.string:
            texts = [element.decode() for element in array.flat]
            array = np.array(texts, object).reshape(array.shape)
    except (ValueError, TypeError) as error:
        raise _malformed(place, f"{name} must be {dtype.name}: {error}") from error
    return array


def _read_message(place: str, value: Any, message: Any) -> Any:
    """JSON -> a protocol buffer."""
    try:
        return json_format.ParseDict(value, message, ignore_unknown_fields=True)
    except (json_format.ParseError, AttributeError, TypeError) as error:
        kind = message.DESCRIPTOR.name
        raise _malformed(place, f"expected a {kind}: {_shorten(error)}") from error


def _malformed(place: str, problem: str) -> ServingError:
    return ServingError(
        f"{place}: malformed answer: {problem}. Is it TensorFlow Serving, with nothing between "
        "that answers in its place?"
    )


def _error_text(place: str, status: str, code: int | str, message: Any) -> str:
    message = str(message)
    remedy = XLA_REMEDY if XLA_DISABLED in message else REMEDIES.get(code, "")
    text = f"{place}: {status}: {_shorten(message) or 'no message'}"
    text = text if text.endswith((".", "!", "?")) else f"{text}."
    return f"{text} {remedy}".rstrip()


def _shorten(text: Any) -> str:
    """One line of bounded length."""
    text = " ".join(str(text).split())
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} ..."
