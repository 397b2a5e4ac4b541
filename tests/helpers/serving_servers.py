"""A stand-in for TensorFlow Serving, over REST and gRPC: it runs an export and fails on request.

It keeps to the rules of TensorFlow Serving's REST interface (formats, status codes, messages), so
that what these servers answer a real one answers, too.
"""

import base64
import contextlib
import dataclasses
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_text  # noqa: F401  (registers ops)
from google.protobuf import json_format
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2

HTTP_CODES = {"INVALID_ARGUMENT": 400, "FAILED_PRECONDITION": 400, "NOT_FOUND": 404}
HTTP_CODES |= {"DEADLINE_EXCEEDED": 504, "UNAVAILABLE": 503, "RESOURCE_EXHAUSTED": 429}


class Failure(Exception):
    """What a server answers in place of outputs: the name of a canonical code, and a message."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


class Served:
    """An export of version 1 under a name.

    Args:
        path: the export.
        xla: whether XLA is switched on, which it is not in a stock server.
    """

    def __init__(self, path, name="model", xla=True):
        self.name, self.xla, self.state, self.error = name, xla, "AVAILABLE", ""
        self._loaded = tf.saved_model.load(str(path))
        saved_model = saved_model_pb2.SavedModel()
        saved_model.ParseFromString((Path(path) / "saved_model.pb").read_bytes())
        self.signature_def = saved_model.meta_graphs[0].signature_def

    def find(self, name, version):
        """Raises unless the model can be asked."""
        if name != self.name or version not in (None, 1) or self.state != "AVAILABLE":
            which = f"Latest({name})" if version is None else f"Specific({name}, {version})"
            raise Failure("NOT_FOUND", f"Servable not found for request: {which}")

    def run(self, signature, tensors):
        if not self.xla and signature.endswith("_xla"):
            raise Failure("INTERNAL", "XLA compilation disabled [[{{node PartitionedCall}}]]")
        # A server feeds scalars, too; Python's functions would refuse them.
        tensors = {name: tf.reshape(t, [1]) if t.ndim == 0 else t for name, t in tensors.items()}
        try:
            return self._loaded.signatures[signature](**tensors)
        except tf.errors.OpError as error:
            codes = {error.error_code: name for name, error in _codes().items()}
            raise Failure(codes[error.error_code], error.message) from error

    def status(self, name, version):
        if name != self.name or version not in (None, 1):
            raise Failure("NOT_FOUND", f"Could not find any versions of model {name}")
        response = get_model_status_pb2.GetModelStatusResponse()
        status = response.model_version_status.add(version=1)
        status.state = status.State.Value(self.state)
        status.status.error_message = self.error
        return response

    def metadata(self, name, version):
        self.find(name, version)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        for key, value in self.signature_def.items():
            signatures.signature_def[key].CopyFrom(value)
        return signatures


# ------------------------------------------------------------------------------------------ REST


@dataclasses.dataclass
class Reply:
    """An answer that is sent in place of the right one; of too few bytes, if `length` is more."""

    status: int
    body: str | bytes
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    length: int | None = None


BUSY = Reply(503, '{"error": "busy"}', {"Retry-After": "0"})
DROP = Reply(200, '{"outputs": {"text', length=1000)
# The connection stays open, and nothing comes until the server is closed.
HANG = object()


class RestServer:
    """Serves until it is closed.

    Attributes:
        faults: what the next requests to :predict are answered; None is the right answer.
        requests: (method, path, headers, JSON of the body) of all requests.
        connections: how many were made.
    """

    def __init__(self, served, tls=None):
        self.served, self.faults, self.requests, self.connections = served, [], [], 0
        self.lock, self.closed = threading.Lock(), threading.Event()
        rest = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self):
                super().setup()
                with rest.lock:
                    rest.connections += 1

            def do_GET(self):
                rest.answer(self, None)

            def do_POST(self):
                rest.answer(self, self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *arguments: None  # clients that go away
        if tls:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.url = f"{'https' if tls else 'http'}://localhost:{self.server.server_port}"
        self.thread = threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}
        )
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, handler, body):
        fault = None
        with self.lock:
            if handler.path.endswith(":predict") and self.faults:
                fault = self.faults.pop(0)
            content = None if body is None else json.loads(body)
            self.requests.append((handler.command, handler.path, dict(handler.headers), content))
        if fault is HANG:
            self.closed.wait()
            handler.close_connection = True
            return
        reply = fault or self.right_answer(handler.command, handler.path, body)
        data = reply.body.encode() if isinstance(reply.body, str) else reply.body
        handler.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(reply.length or len(data)))
        handler.end_headers()
        with contextlib.suppress(OSError):  # the client has gone
            handler.wfile.write(data)
        handler.close_connection |= reply.length is not None

    def right_answer(self, method, path, body):
        pattern = "/v1/models/([^/:]+)(?:/versions/([0-9]+))?"
        pattern += "(:predict)" if method == "POST" else "(/metadata)?"
        try:
            match = re.fullmatch(pattern, path)
            if not match:
                raise Failure("INVALID_ARGUMENT", f"Malformed request: {method} {path}")
            name, version = match[1], int(match[2]) if match[2] else None
            if method == "POST":
                self.served.find(name, version)
                content = predict(self.served, body)
            elif match[3]:
                signatures = _to_json(self.served.metadata(name, version))
                spec = {"name": name, "signature_name": "", "version": "1"}
                content = {"model_spec": spec, "metadata": {"signature_def": signatures}}
            else:
                content = _to_json(self.served.status(name, version))
        except Failure as failure:
            error = json.dumps({"error": str(failure)}, ensure_ascii=False)
            return Reply(HTTP_CODES.get(failure.code, 500), error)
        return Reply(200, json.dumps(content, ensure_ascii=False))


def predict(served, body):
    """The body of a request to :predict -> what is answered."""
    try:
        request = json.loads(body)
    except ValueError as error:
        raise _invalid(f"JSON Parse error: {error}") from error
    if not isinstance(request, dict):
        raise _invalid("JSON Value: is not object")
    name = request.get("signature_name", "serving_default")
    if not isinstance(name, str):
        raise _invalid("'signature_name' key must be a string value.")
    if name not in served.signature_def:
        raise _invalid(f'Serving signature name: "{name}" not found in signature def')
    infos = served.signature_def[name].inputs
    if "instances" in request and "inputs" in request:
        raise _invalid("expecting only one of 'inputs' or 'instances' keys to exist")
    if "instances" in request:
        tensors = _read_rows(request["instances"], infos)
    elif "inputs" in request:
        tensors = _read_columns(request["inputs"], infos)
    else:
        raise _invalid("Missing 'inputs' or 'instances' key")
    tensors = {key: tf.constant(value, infos[key].dtype) for key, value in tensors.items()}
    outputs = {key: _plain(value) for key, value in served.run(name, tensors).items()}
    if "inputs" in request:
        return {"outputs": outputs if len(outputs) > 1 else next(iter(outputs.values()))}
    if any(not isinstance(value, list) for value in outputs.values()):
        raise _invalid("Tensor has no shape information")
    if len({len(value) for value in outputs.values()}) > 1:
        raise _invalid("Tensor has inconsistent batch size")
    rows = [dict(zip(outputs, row, strict=True)) for row in zip(*outputs.values(), strict=True)]
    if len(outputs) == 1:
        rows = [next(iter(row.values())) for row in rows]
    return {"predictions": rows}


def _read_rows(instances, infos):
    if not isinstance(instances, list):
        raise _invalid("Excepting 'instances' to be an list/array")
    if not instances:
        raise _invalid("No values in 'instances' array")
    if not isinstance(instances[0], dict) and len(infos) > 1:
        raise _invalid("instances is a plain list, but expecting list of objects")
    named = [isinstance(row, dict) and not _is_base64(row) for row in instances]
    if len(set(named)) > 1:
        raise _invalid("'instances' must be objects or values/lists, not both")
    if not named[0]:
        instances = [{next(iter(infos)): row} for row in instances]
    columns = {name: [] for name in infos}
    for place, row in enumerate(instances):
        if row.keys() != columns.keys():
            names = ",".join(sorted(infos))
            raise _invalid(f"element: {place} of 'instances' list. keys must be equal to: {names}")
        for name, value in row.items():
            columns[name].append(_read_array(value, infos[name].dtype))
            if columns[name][-1].shape != columns[name][0].shape:
                raise _invalid(f"element: {place} key: {name}: Expecting tensor size")
    return {name: np.stack(column) for name, column in columns.items()}


def _read_columns(inputs, infos):
    if not isinstance(inputs, dict) or _is_base64(inputs):
        if len(infos) > 1:
            raise _invalid("inputs is a plain value/list, but expecting an object")
        inputs = {next(iter(infos)): inputs}
    missing = infos.keys() - inputs.keys()
    if missing:
        raise _invalid(f"Missing named input: {min(missing)} in 'inputs' object.")
    return {name: _read_array(inputs[name], info.dtype) for name, info in infos.items()}


def _read_array(value, dtype):
    """Nested lists of one size at each level."""
    shape, level = [], value
    while isinstance(level, list):
        shape.append(len(level))
        level = level[0] if level else None
    flat = [value]
    for size in shape:
        if any(not isinstance(part, list) or len(part) != size for part in flat):
            raise _invalid("Encountered list at unexpected size")
        flat = [element for part in flat for element in part]
    kinds = {tf.string.as_datatype_enum: str, tf.int32.as_datatype_enum: int}
    for place, element in enumerate(flat):
        if dtype == tf.string.as_datatype_enum and _is_base64(element):
            flat[place] = base64.b64decode(element["b64"], validate=True)
        elif type(element) is not kinds[dtype]:
            raise _invalid(f"JSON Value: {element!r} is not of expected type")
        elif isinstance(element, str):
            try:
                flat[place] = element.encode()
            except UnicodeEncodeError as error:
                raise _invalid("JSON Parse error: surrogate pair is invalid") from error
    numpy_dtype = tf.dtypes.as_dtype(dtype).as_numpy_dtype
    return np.array(flat, numpy_dtype).reshape(shape)


def _is_base64(value):
    return isinstance(value, dict) and list(value) == ["b64"] and isinstance(value["b64"], str)


def _plain(tensor):
    """What JSON is made of; floats in as many digits as they need."""
    array = tensor.numpy()
    if tensor.dtype == tf.string:
        return np.vectorize(bytes.decode, otypes=[object])(array).tolist()
    if tensor.dtype == tf.float32:
        return np.vectorize(lambda x: float(str(x)), otypes=[object])(array).tolist()
    return array.tolist()


def _to_json(message):
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def _invalid(message):
    return Failure("INVALID_ARGUMENT", message)


def _codes():
    return {
        name: value
        for name, value in vars(tf.errors).items()
        if isinstance(value, int) and name.isupper()
    }


# ------------------------------------------------------------------------------------------ gRPC


class GrpcServer:
    """The same over gRPC.

    Attributes:
        faults: codes that the next requests to Predict fail with; None is the right answer.
        requests: the PredictRequests.
        metadata: of the last request, as a dict.
    """

    def __init__(self, served, credentials=None):
        import grpc
        from tensorflow_serving.apis import (
            model_service_pb2_grpc,
            predict_pb2,
            prediction_service_pb2_grpc,
        )

        self.faults, self.requests, self.metadata = [], [], {}
        outer, lock, closed = self, threading.Lock(), threading.Event()
        self.closed = closed

        @contextlib.contextmanager
        def failures(context):
            outer.metadata = dict(context.invocation_metadata())
            try:
                yield
            except Failure as failure:
                context.abort(grpc.StatusCode[failure.code], str(failure))

        def version(spec):
            return spec.version.value if spec.HasField("version") else None

        class Predictions(prediction_service_pb2_grpc.PredictionServiceServicer):
            def Predict(self, request, context):
                with lock:
                    outer.requests.append(request)
                    fault = outer.faults.pop(0) if outer.faults else None
                with failures(context):
                    if fault is HANG:
                        closed.wait()
                    elif fault:
                        raise Failure(fault, "busy")
                    spec = request.model_spec
                    served.find(spec.name, version(spec))
                    name = spec.signature_name or "serving_default"
                    if name not in served.signature_def:
                        message = f'Serving signature key "{name}" not found.'
                        raise Failure("FAILED_PRECONDITION", message)
                    infos = served.signature_def[name].inputs
                    if infos.keys() != request.inputs.keys():
                        raise _invalid("input size does not match signature")
                    tensors = {}
                    for key, proto in request.inputs.items():
                        if proto.dtype != infos[key].dtype:
                            raise _invalid(f"Expects arg[0] to be {infos[key].dtype}")
                        tensors[key] = tf.constant(tf.make_ndarray(proto), proto.dtype)
                    outputs = served.run(name, tensors)
                    if not set(request.output_filter) <= set(outputs):
                        raise _invalid("output tensor alias not found in signature")
                    response = predict_pb2.PredictResponse()
                    for key in request.output_filter or outputs:
                        response.outputs[key].CopyFrom(tf.make_tensor_proto(outputs[key]))
                    return response

            def GetModelMetadata(self, request, context):
                with failures(context):
                    spec = request.model_spec
                    signatures = served.metadata(spec.name, version(spec))
                    response = get_model_metadata_pb2.GetModelMetadataResponse()
                    for field in request.metadata_field:
                        response.metadata[field].Pack(signatures)
                    return response

        class Models(model_service_pb2_grpc.ModelServiceServicer):
            def GetModelStatus(self, request, context):
                with failures(context):
                    return served.status(request.model_spec.name, version(request.model_spec))

        self.server = grpc.server(ThreadPoolExecutor(16))
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
            Predictions(), self.server
        )
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(Models(), self.server)
        if credentials:
            port = self.server.add_secure_port("localhost:0", credentials)
        else:
            port = self.server.add_insecure_port("localhost:0")
        self.url = f"{'grpcs' if credentials else 'grpc'}://localhost:{port}"
        self.server.start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.closed.set()
        self.server.stop(0).wait()
