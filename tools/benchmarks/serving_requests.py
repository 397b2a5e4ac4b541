"""Malformed requests, as bytes, and a client that sends bytes.

The tests use them, tools/load_test and tools/soak.
"""

import contextlib
import gzip
import http.client
import json
import random
import socket
from collections.abc import Iterator


def send_bytes(address: tuple[str, int], data: bytes, seconds: float = 60) -> tuple[int, str]:
    """What a server answers: the status and the body; 0 and "" if it closes without an answer."""
    with socket.create_connection(address, timeout=seconds) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
        try:
            response = http.client.HTTPResponse(connection)
            response.begin()
            return response.status, response.read().decode()
        except (http.client.HTTPException, ConnectionError):
            return 0, ""


def is_refusal(status: int, body: str) -> bool:
    """Whether an answer is a 4xx that says why."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return 400 <= status < 500 and bool(json.loads(body)["error"])
    return False


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    if not any(header.lower().startswith("content-length") for header in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def malformed_requests(
    name: str, count: int = 1000, seed: int = 0, max_body_bytes: int = 4 * 2**20
) -> Iterator[tuple[str, bytes]]:
    """What is wrong, and a request that a server must answer with 4xx.

    First each of the fixed ones, then random ones.

    Args:
        name: of a model whose `serving_default` takes `text`.
        count: how many.
        seed: for the random ones.
        max_body_bytes: the server's limit.
    """
    fixed = [*_no_http(name), *_paths(name), *_bodies(name, max_body_bytes)]
    yield from fixed[:count]
    draw = random.Random(seed)
    makers = (_cut_json, _not_utf8, _random_bytes, _random_json, _odd_head)
    for number in range(max(0, count - len(fixed))):
        yield makers[number % len(makers)](name, draw)


def _no_http(name: str) -> Iterator[tuple[str, bytes]]:
    path = f"/v1/models/{name}:predict"
    body = b'{"inputs": {"text": ["a"]}}'
    size = f"Content-Length: {len(body)}"
    heads = {
        "no request line": b"\r\n\r\n\r\nnonsense\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
        + bytes(range(128, 192))
        + b"\r\n\r\n",
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "HTTP/0.9": b"GET /healthz\r\n\r\n",
        "two spaces": b"GET  /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "version x": b"GET /healthz HTTP/x\r\nHost: localhost\r\n\r\n",
        "no host": b"GET /healthz HTTP/1.1\r\n\r\n",
        "two hosts": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: y\r\n\r\n",
        "bytes in the path": b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "zero in a header": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nA: \x00\r\n\r\n",
        "header without colon": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nnothing\r\n\r\n",
        "space in a header's name": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nA B: c\r\n\r\n",
        "header without name": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n: c\r\n\r\n",
        "long header": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nA: "
        + b"a" * 200_000
        + b"\r\n\r\n",
        "many headers": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
        + b"A: b\r\n" * 50_000
        + b"\r\n",
        "long path": b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "long line without end": b"a" * 300_000,
    }
    yield from heads.items()
    line = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n".encode()
    for value in ("-1", "-0", "+5", "abc", "1e3", "0x10", "5 5", "5,6", "", "9" * 30, "٣"):
        header = b"Content-Length: " + value.encode()
        yield f"Content-Length {value!r}", line + header + b"\r\n\r\n" + body
    yield "two lengths", post(path, body, size, "Content-Length: 3")
    for encoding in ("gzip", "chunked, gzip", "chunked, chunked", "xchunked"):
        yield (
            f"Transfer-Encoding {encoding}",
            line + f"Transfer-Encoding: {encoding}\r\n\r\n".encode() + b"3\r\n{}}\r\n0\r\n\r\n",
        )
    for chunk in (b"zz\r\n", b"-1\r\n{}\r\n", b"2\r\n{}no", b"f" * 40 + b"\r\n", b"\xff\xff\r\n"):
        yield (
            f"chunk {chunk!r}",
            line + b"Transfer-Encoding: chunked\r\n\r\n" + chunk + b"\r\n" * 3,
        )


def _paths(name: str) -> Iterator[tuple[str, bytes]]:
    body = b'{"inputs": {"text": ["a"]}}'
    model = f"/v1/models/{name}"
    for path in (
        "/",
        "/v1",
        "/v1/models",
        model,
        f"{model}:",
        f"{model}:predictt",
        f"{model}:classify",
        f"{model}:regress",
        f"{model}:predict/",
        f"{model}/:predict",
        f"{model}/versions/1",
        f"{model}/versions/:predict",
        f"{model}/versions/77:predict",
        f"{model}/versions/-1:predict",
        f"{model}/versions/1.0:predict",
        f"{model}/versions/one:predict",
        f"{model}/versions/%D9%A3:predict",
        f"{model}/versions/{'9' * 19}:predict",
        f"{model}/versions/{'9' * 5000}:predict",
        f"{model}/labels/stable:predict",
        f"{model}/metadata",
        f"{model}x:predict",
        f"{model}%00:predict",
        f"{model}%FF:predict",
        "/v1/models/../../etc/passwd:predict",
        "/v1/models/..%2F..%2Fetc%2Fpasswd:predict",
        "/v1/models/%2e%2e:predict",
        "/v1/models/:predict",
        "//v1/models:predict",
        "*",
        f"http://x{model}:predict",
    ):
        yield f"POST {path[:60]}", post(path, body)
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "post", "FOO"):
        head = f"{method} {model}:predict HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        yield f"{method} :predict", head.encode()
    for path in (f"{model}/versions/77", f"{model}x", f"{model}x/metadata", "/favicon.ico", "/a"):
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        yield f"GET {path}", head.encode()


def _bodies(name: str, max_body_bytes: int) -> Iterator[tuple[str, bytes]]:
    path = f"/v1/models/{name}:predict"
    for content in (
        None,
        True,
        7,
        "text",
        [],
        ["a"],
        {},
        {"input": "a"},
        {"Inputs": "a"},
        {"inputs": ["a"], "instances": ["a"]},
        {"inputs": None},
        {"inputs": 5},
        {"inputs": 1.5},
        {"inputs": True},
        {"inputs": [None]},
        {"inputs": [5]},
        {"inputs": ["a", 5]},
        {"inputs": [["a"]]},
        {"inputs": ["a", ["b"]]},
        {"inputs": [["a"], "b"]},
        {"inputs": {}},
        {"inputs": {"texts": ["a"]}},
        {"inputs": {"text": ["a"], "more": ["b"]}},
        {"inputs": {"text": None}},
        {"inputs": {"text": {"a": "b"}}},
        {"inputs": {"text": [{"b64": 5}]}},
        {"inputs": {"text": [{"b64": "!"}]}},
        {"inputs": {"text": [{"b64": "ü"}]}},
        {"inputs": {"text": [{"b64": "YQ", "c": 1}]}},
        {"inputs": {"text": [{}]}},
        {"inputs": {"text": ["\ud800"]}},
        {"inputs": {"text": "\udfff a"}},
        {"instances": None},
        {"instances": []},
        {"instances": {}},
        {"instances": "a"},
        {"instances": [None]},
        {"instances": [5]},
        {"instances": [[]]},
        {"instances": [["a"]]},
        {"instances": [["a"], ["b", "c"]]},
        {"instances": ["a", ["b"]]},
        {"instances": ["a", {"text": "b"}]},
        {"instances": [{"text": "a"}, "b"]},
        {"instances": [{"text": "a"}, {"b64": "YQ"}]},
        {"instances": [{"texts": "a"}]},
        {"instances": [{"text": "a", "more": "b"}]},
        {"instances": [{"text": ["a"]}]},
        {"instances": [{"text": {"text": "a"}}]},
        {"instances": [{}]},
        {"inputs": "a", "signature_name": 5},
        {"inputs": "a", "signature_name": None},
        {"inputs": "a", "signature_name": ["serving_default"]},
        {"inputs": "a", "signature_name": "no such signature"},
        {"inputs": "a", "signature_name": "__saved_model_init_op"},
        {"inputs": "a", "signature_name": "x" * 10_000},
        {"inputs": ["a"] * 100_000},
    ):
        text = json.dumps(content)
        yield text[:70], post(path, text.encode())
    good = b'{"inputs": {"text": ["a"]}}'
    for what, body, *headers in (
        ("nothing", b""),
        ("blanks", b"  \n "),
        ("zero byte", b"\0"),
        ("mark of byte order", b"\xef\xbb\xbf" + good),
        ("UTF-16", good.decode().encode("utf-16")),
        ("Latin-1", '{"inputs": "é"}'.encode("latin-1")),
        ("overlong UTF-8", b'{"inputs": "\xc0\xaf"}'),
        ("surrogate in UTF-8", b'{"inputs": "\xed\xa0\x80"}'),
        ("two objects", good + good),
        ("comma at the end", b'{"inputs": ["a",]}'),
        ("single quotes", b"{'inputs': ['a']}"),
        ("comment", b'{"inputs": ["a"]} // a'),
        ("line end in a string", b'{"inputs": ["a\n"]}'),
        ("form", b"inputs=a"),
        ("NaN", b"NaN"),
        ("large number", b'{"inputs": 1e999}'),
        ("number of many digits", b'{"inputs": ' + b"9" * 100_000 + b"}"),
        ("deep lists", b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        ("deep lists without end", b"[" * 1_000_000),
        ("deep objects", b'{"a": ' * 100_000 + b"1" + b"}" * 100_000),
        ("lists in the limits", b'{"inputs": ' + b"[" * 500 + b"]" * 500 + b"}"),
        ("too large", b'{"inputs": "' + b"a" * max(10_000_000, max_body_bytes) + b'"}'),
        ("no gzip", good, "Content-Encoding: gzip"),
        ("half a gzip", gzip.compress(good)[:20], "Content-Encoding: gzip"),
        ("gzip and more", gzip.compress(good) + b"more", "Content-Encoding: gzip"),
        ("bomb", gzip.compress(b" " * (max_body_bytes + 1)), "Content-Encoding: gzip"),
        ("unknown encoding", good, "Content-Encoding: br"),
        ("unknown encodings", good, "Content-Encoding: gzip, gzip"),
    ):
        yield what, post(path, body, *headers)
    yield (
        "too large, asks first",
        post(path, b"", f"Content-Length: {max_body_bytes + 1}", "Expect: 100-continue"),
    )
    yield "far too large", post(path, b"", f"Content-Length: {10**18}")
    chunk = b"100000\r\n" + b"a" * 2**20 + b"\r\n"
    yield (
        "too large, in chunks",
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        + chunk * (max_body_bytes // 2**20 + 1)
        + b"0\r\n\r\n",
    )


def _body(draw: random.Random) -> bytes:
    texts = ["".join(draw.choices('abc é😀"\\\n', k=draw.randrange(12))) for _ in range(3)]
    content = draw.choice(
        [{"inputs": {"text": texts}}, {"instances": texts}, {"instances": [{"text": texts[0]}]}]
    )
    return json.dumps(content, ensure_ascii=draw.random() < 0.5).encode()


def _cut_json(name: str, draw: random.Random) -> tuple[str, bytes]:
    body = _body(draw)
    body = body[: draw.randrange(len(body))]
    return f"cut: {body!r}", post(f"/v1/models/{name}:predict", body)


def _not_utf8(name: str, draw: random.Random) -> tuple[str, bytes]:
    body = bytearray(_body(draw))
    body.insert(draw.randrange(len(body) + 1), draw.choice([0xC0, 0xF8, 0xFF]))
    return f"no UTF-8: {bytes(body)!r}", post(f"/v1/models/{name}:predict", bytes(body))


def _random_bytes(name: str, draw: random.Random) -> tuple[str, bytes]:
    body = b"\x00" + draw.randbytes(draw.randrange(2000))
    return "random bytes", post(f"/v1/models/{name}:predict", body)


def _random_json(name: str, draw: random.Random) -> tuple[str, bytes]:
    """A number somewhere: texts are strings."""

    def value(depth: int) -> object:
        kind = draw.randrange(5 if depth else 3)
        if kind == 3:
            return [value(depth - 1) for _ in range(draw.randrange(1, 4))]
        if kind == 4:
            keys = draw.sample(["text", "b64", "inputs", "a"], draw.randrange(1, 4))
            return {key: value(depth - 1) for key in keys}
        return draw.choice([None, True, -1, 0.5, 10**400])

    key = draw.choice(["inputs", "instances"])
    body = json.dumps({key: value(4)}).encode()
    return f"random JSON: {body[:80]!r}", post(f"/v1/models/{name}:predict", body)


def _odd_head(name: str, draw: random.Random) -> tuple[str, bytes]:
    head = bytearray(post(f"/v1/models/{name}:predict", b""))
    # Within the line of the request, where nothing is free text.
    head[draw.randrange(5)] = draw.choice(b"\x00\x01\x7f\xff(){}[]@,;")
    return f"odd head: {bytes(head[:20])!r}", bytes(head)
