"""The bodies of TensorFlow Serving's REST API: JSON, to arrays and back.

A request names its tensors in one of two forms:

- rows: `{"instances": [...]}`, one element a row: the value of the only input, or an object with
  all inputs. Answered by `{"predictions": [...]}`, one element a row.
- columns: `{"inputs": ...}`: the value of the only input, or an object with all inputs. Answered
  by `{"outputs": ...}`.

A string may be `{"b64": "..."}`, any bytes. An answer of one output omits its name; outputs
whose names end in `_bytes` are base64, other strings are UTF-8.
"""

import base64
import binascii
import contextlib
import json
import reprlib
import zlib
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

# How deep a request may nest lists, where the signature does not specify it.
_MAX_RANK = 8
# How many bodies of the largest size all requests that are being read may have together.
_MAX_BODIES = 16
# This much of a refused body is read anyway: most clients read no answer before they have sent it.
_MAX_DRAINED_BYTES = 64 * 2**20


class RequestError(ValueError):
    """What a client did wrong: the message says what, and the status of what kind.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class BodyReader:
    """Reads the bodies of all requests, within a bound on each and on their sum.

    Args:
        max_bytes: of a body, also after decompression.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._room = _MAX_BODIES * max_bytes

    @contextlib.asynccontextmanager
    async def read(
        self, headers: Mapping[str, str], chunks: AsyncIterable[bytes]
    ) -> AsyncIterator[bytes]:
        """A body, decompressed; it counts until the end of the context.

        Args:
            headers: of the request, checked as HTTP.
            chunks: of its body.

        Raises:
            RequestError: it is too large, there are too many, or it is not gzip.
        """
        limit = self._max_bytes
        refusal = None
        too_large = RequestError(f"The body must have at most {limit:,} bytes", 413)
        length = int(headers.get("content-length", "0")[:20])
        if length > limit and (
            headers.get("expect", "").lower() == "100-continue" or length > _MAX_DRAINED_BYTES
        ):
            raise too_large
        body, size, counted = bytearray(), 0, 0
        try:
            async for chunk in chunks:
                size += len(chunk)
                if size > limit:
                    refusal = too_large
                elif len(chunk) > self._room:
                    refusal = refusal or self._full()
                if not refusal:
                    body += chunk
                    counted += len(chunk)
                    self._room -= len(chunk)
                    continue
                body.clear()
                self._room += counted
                counted = 0
                if size > _MAX_DRAINED_BYTES:
                    break
            if refusal:
                raise refusal
            encoding = headers.get("content-encoding", "identity").lower()
            if encoding == "gzip":
                body = self._decompress(body)
                if len(body) > self._room:
                    raise self._full()
                counted += len(body)
                self._room -= len(body)
            elif encoding != "identity":
                raise RequestError("Content-Encoding must be gzip or identity", 415)
            yield bytes(body)
        finally:
            self._room += counted

    def _decompress(self, body: bytearray) -> bytes:
        try:
            stream = zlib.decompressobj(16 + zlib.MAX_WBITS)
            plain = stream.decompress(body, self._max_bytes + 1)
        except zlib.error as error:
            raise RequestError(f"The body is not gzip: {error}") from error
        if len(plain) > self._max_bytes:
            raise RequestError(f"The body must have at most {self._max_bytes:,} bytes", 413)
        if not stream.eof or stream.unused_data:
            raise RequestError("The body is not one complete gzip stream")
        return plain

    def _full(self) -> RequestError:
        return RequestError(
            f"The requests that are being received have more than {_MAX_BODIES * self._max_bytes:,}"
            " bytes. Try again later",
            503,
        )


def parse_request(body: bytes) -> dict[str, Any]:
    """Reads the body of a request.

    Args:
        body: JSON in UTF-8.

    Returns:
        the object.

    Raises:
        RequestError: it is not a JSON object, or its "signature_name" is not a string.
    """
    try:
        request = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(f"JSON Parse error: the body must be UTF-8: {error}") from error
    except RecursionError as error:
        raise RequestError("JSON Parse error: the body nests too deep") from error
    except ValueError as error:  # also for numbers of thousands of digits
        raise RequestError(f"JSON Parse error: {error}") from error
    if not isinstance(request, dict):
        raise RequestError(f"The body must be a JSON object, received {_show(request)}")
    if not isinstance(request.get("signature_name", ""), str):
        raise RequestError(
            f"'signature_name' key must be a string value, received {_show(request)}"
        )
    return request


def read_inputs(
    request: Mapping[str, Any], specs: Mapping[str, tf.TensorSpec]
) -> tuple[dict[str, np.ndarray], bool]:
    """The tensors of a request.

    Args:
        request: what `parse_request` gives.
        specs: the inputs of the signature.

    Returns:
        the arrays, of the types and ranks of `specs`, strings as objects of bytes; and whether
        they came in rows.

    Raises:
        RequestError: they are not what the signature takes.
    """
    if "instances" in request and "inputs" in request:
        raise RequestError("Expected only one of 'inputs' or 'instances' keys, received both")
    if "inputs" in request:
        return _read_columns(request["inputs"], specs), False
    if "instances" in request:
        return _read_rows(request["instances"], specs), True
    raise RequestError(
        "Missing 'inputs' or 'instances' key. A request looks like "
        '{"inputs": {"text": ["a text"]}} or {"instances": ["a text"]}'
    )


def write_outputs(outputs: Mapping[str, np.ndarray], rows: bool) -> dict[str, Any]:
    """What to answer.

    Args:
        outputs: arrays by their names.
        rows: whether the request came in rows.

    Returns:
        an object for `json.dumps`.

    Raises:
        RequestError: the outputs have no rows, but the request did.
    """
    lists = {name: _to_list(name, values) for name, values in outputs.items()}
    if not rows:
        return {"outputs": next(iter(lists.values())) if len(lists) == 1 else lists}
    sizes = {values.shape[0] if values.ndim else None for values in outputs.values()}
    if len(sizes) != 1 or None in sizes:
        shapes = {name: list(values.shape) for name, values in outputs.items()}
        raise RequestError(
            f"The outputs have inconsistent batch sizes: {shapes}. Use 'inputs' instead of "
            "'instances'"
        )
    if len(lists) == 1:
        return {"predictions": next(iter(lists.values()))}
    return {
        "predictions": [
            dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)
        ]
    }


# ---------------------------------------------------------------------------------------- requests


def _read_columns(value: Any, specs: Mapping[str, tf.TensorSpec]) -> dict[str, np.ndarray]:
    if not isinstance(value, dict) or _is_base64(value):
        if len(specs) != 1:
            raise RequestError(
                f"'inputs' must be an object with the inputs {_names(specs)}, received "
                f"{_show(value)}"
            )
        value = {next(iter(specs)): value}
    _check_names(value, specs, "'inputs'")
    return {
        name: _to_array(value[name], _shape_of(value[name]), spec, f"'inputs', {name!r}")
        for name, spec in specs.items()
    }


def _read_rows(rows: Any, specs: Mapping[str, tf.TensorSpec]) -> dict[str, np.ndarray]:
    if not isinstance(rows, list):
        raise RequestError(f"'instances' must be a list, received {_show(rows)}")
    if not rows:
        raise RequestError("No values in 'instances' array")
    named = isinstance(rows[0], dict) and not _is_base64(rows[0])
    if not named and len(specs) != 1:
        raise RequestError(
            f"'instances' must be a list of objects with the inputs {_names(specs)}, received "
            f"{_show(rows[0])} in it"
        )
    for number, row in enumerate(rows):
        if (isinstance(row, dict) and not _is_base64(row)) != named:
            raise RequestError(
                "'instances' must hold either objects or values, but element "
                f"{number} is of another kind than the first: {_show(row)}"
            )
        if named:
            _check_names(row, specs, f"element {number} of 'instances'")
    arrays = {}
    for name, spec in specs.items():
        column = [row[name] for row in rows] if named else rows
        arrays[name] = _to_array(column, _shape_of(column), spec, f"'instances', {name!r}")
    return arrays


def _check_names(value: dict, specs: Mapping[str, tf.TensorSpec], where: str) -> None:
    if set(value) != set(specs):
        raise RequestError(
            f"{where} must have exactly the inputs {_names(specs)} as keys, received "
            f"{_show(sorted(value))}"
        )


def _names(specs: Mapping[str, tf.TensorSpec]) -> str:
    return ", ".join(repr(name) for name in specs)


def _show(value: Any) -> str:
    return reprlib.repr(value)


def _is_base64(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"b64"} and isinstance(value["b64"], str)


def _shape_of(value: Any) -> list[int]:
    """The shape of nested lists, by their first elements."""
    shape = []
    while isinstance(value, list):
        shape.append(len(value))
        if not value:
            break
        value = value[0]
    return shape


def _to_array(value: Any, shape: list[int], spec: tf.TensorSpec, where: str) -> np.ndarray:
    rank = spec.shape.rank
    if not shape and rank == 1:
        value, shape = [value], [1]  # a scalar is a batch of one
    if shape and not shape[-1] and rank is not None:
        shape = shape + [0] * (rank - len(shape))  # an empty list does not show the rank
    if len(shape) != rank and (rank is not None or len(shape) > _MAX_RANK):
        raise RequestError(
            f"{where}: expected a tensor of shape {_show_shape(spec.shape)}, received one with "
            f"{len(shape)} dimensions"
        )
    leaves: list[Any] = []
    _flatten(value, shape, 0, leaves, where)
    array = _convert(leaves, spec.dtype, where).reshape(shape)
    if not spec.shape.is_compatible_with(array.shape):
        raise RequestError(
            f"{where}: expected a tensor of shape {_show_shape(spec.shape)}, received {shape}"
        )
    return array


def _show_shape(shape: tf.TensorShape) -> str:
    if shape.rank is None:
        return f"of up to {_MAX_RANK} dimensions"
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def _flatten(value: Any, shape: list[int], level: int, leaves: list[Any], where: str) -> None:
    if level == len(shape):
        if isinstance(value, list):
            raise RequestError(f"{where}: lists nest to different depths: {_show(value)}")
        leaves.append(value)
        return
    if not isinstance(value, list):
        raise RequestError(f"{where}: expected a list, received {_show(value)}")
    if len(value) != shape[level]:
        raise RequestError(
            f"{where}: every row must have the same shape, but there is a list of {len(value)} "
            f"beside one of {shape[level]}. Pad them, or send them one by one"
        )
    if level + 1 == len(shape) and list not in set(map(type, value)):
        leaves.extend(value)  # at the speed of C: there can be a million
        return
    for element in value:
        _flatten(element, shape, level + 1, leaves, where)


def _convert(leaves: list[Any], dtype: tf.DType, where: str) -> np.ndarray:
    if dtype == tf.string:
        array = np.empty(len(leaves), object)
        array[:] = [_to_bytes(leaf, where) for leaf in leaves]
        return array
    if dtype == tf.bool:
        kinds: tuple[type, ...] = (bool,)
    elif dtype.is_integer:
        kinds = (int,)
    elif dtype in (tf.float32, tf.float64):
        kinds = (int, float)
    else:
        raise RequestError(f"{where}: JSON cannot hold the type {dtype.name}")
    if not set(map(type, leaves)) <= set(kinds):  # a bool is an int, too
        leaf = next(leaf for leaf in leaves if type(leaf) not in kinds)
        raise RequestError(f"{where}: {_show(leaf)} is not of expected type: {dtype.name}")
    if dtype != tf.bool:
        _check_range(leaves, dtype, where)
    return np.array(leaves, dtype.as_numpy_dtype)


def _check_range(leaves: list[int | float], dtype: tf.DType, where: str) -> None:
    least, most, infinity = dtype.min, dtype.max, float("inf")  # TensorFlow computes them
    if dtype.is_integer:
        if leaves and not least <= min(leaves) <= max(leaves) <= most:
            leaf = next(leaf for leaf in leaves if not least <= leaf <= most)
            raise RequestError(f"{where}: {_show(leaf)} is out of range of {dtype.name}")
        return
    exact = 2 ** (24 if dtype == tf.float32 else 53)  # larger integers would change
    for leaf in leaves:
        if type(leaf) is int and not least <= leaf <= exact:
            raise RequestError(f"{where}: {_show(leaf)} is out of range of {dtype.name}")
        if type(leaf) is float and abs(leaf) > most and abs(leaf) != infinity:
            raise RequestError(f"{where}: {leaf} is out of range of {dtype.name}")


def _to_bytes(value: Any, where: str) -> bytes:
    if isinstance(value, str):
        try:
            return value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{where}: a string has half of a surrogate pair, which is not a character"
            ) from error
    if _is_base64(value):
        text = value["b64"]
        try:
            return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError(f"{where}: unable to base64 decode {_show(text)}") from error
    raise RequestError(
        f"{where}: {_show(value)} is not of expected type: string. Expected a string, or "
        '{"b64": "..."}'
    )


# ----------------------------------------------------------------------------------------- answers


def _to_list(name: str, values: np.ndarray) -> Any:
    if values.ndim > 1:  # by rows: a number takes a hundred bytes on its way to text
        return [_to_list(name, row) for row in values]
    if values.dtype == object:
        if name.endswith("_bytes"):
            return _map(values, lambda item: {"b64": base64.b64encode(item).decode("ascii")})
        return _map(values, lambda item: item.decode("utf-8", "replace"))
    if values.dtype.kind == "f" and values.dtype.itemsize < 8:
        # With as few digits as they need: 0.1, not 0.10000000149011612.
        return values.astype(str).astype(np.float64).tolist()
    return values.tolist()


def _map(values: np.ndarray, function: Any) -> Any:
    mapped = np.empty(values.shape, object)
    mapped.reshape(-1)[:] = [function(item) for item in values.reshape(-1)]
    return mapped.tolist()
