"""The server as a process of its own: protocol, limits, logs, end."""

import asyncio
import concurrent.futures
import contextlib
import http.client
import inspect
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

import uvicorn
from serving_requests import malformed_requests, post, send_bytes

from bertgen_tf.cli.main import main, make_parser
from bertgen_tf.serving.http import server as server_module
from bertgen_tf.serving.http.server import _listen, _Protocol, serve
from tests.helpers.serving_exports import write_export

PREDICT = "/v1/models/name:predict"
SECONDS = 120  # until a test that hangs fails
CLI = "import sys; from bertgen_tf.cli.main import main; sys.exit(main())"
# The load of the model "slow" hangs, and so does the batch of the text "hang".
IMPATIENT = """
import sys, time
from bertgen_tf.serving.exports import Version
from bertgen_tf.serving.http.server import serve
from bertgen_tf.serving.signatures import Signature
load, run = Version.load, Signature.run
def hang_to_load(self):
    load(self)
    time.sleep(1000 * (self.model == "slow"))
def hang_to_run(self, inputs):
    if b"hang" in inputs["text"].tolist():
        print("hanging", flush=True)
        time.sleep(1000)
    return run(self, inputs)
Version.load, Signature.run = hang_to_load, hang_to_run
serve(sys.argv[1], port=0, receive_timeout=0.5, max_connections=4, shutdown_timeout=1.0)
"""


class Server:
    """A process; `lines` of its log grow while it runs."""

    def __init__(self, program, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"},
            # Where the tests run under nohup, the server would ignore it, too.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )
        self.lines, self.other = [], []
        self.news = threading.Condition()
        self.ended = False
        threading.Thread(target=self._read, daemon=True).start()
        url = self.wait_for("url")["url"]
        host, port = url.removeprefix("http://").rsplit(":", 1)
        self.address = host, int(port)
        self.wait_for("message", "loaded")

    def _read(self):
        for line in self.process.stderr:
            with self.news:
                try:
                    self.lines.append(json.loads(line))
                except ValueError:  # of TensorFlow's C++
                    self.other.append(line)
                self.news.notify_all()
        with self.news:
            self.ended = True
            self.news.notify_all()

    def wait_for(self, key, value=None):
        def found():
            for line in self.lines:
                if key in line and value in (None, line[key]):
                    return line
            return "ended" if self.ended else None

        with self.news:
            line = self.news.wait_for(found, SECONDS)
        assert line not in (None, "ended"), (self.lines, self.other)
        return line

    def ask(self, method, path, body=None, connection=None):
        mine = connection or http.client.HTTPConnection(*self.address, timeout=SECONDS)
        try:
            mine.request(method, path, body)
            response = mine.getresponse()
            return response.status, json.loads(response.read())
        finally:
            if not connection:
                mine.close()

    def predict(self, content, connection=None):
        return self.ask("POST", PREDICT, json.dumps(content), connection)

    def stop(self, how=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(SECONDS)


@contextlib.contextmanager
def running(program, *arguments):
    server = Server(program, *arguments)
    try:
        yield server
    finally:
        server.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_export(folder / "name/1", ">")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with running(CLI, "serve", folder, "--port", "0") as server:
        yield server
        # Whatever the tests did, nothing went wrong within.
        assert not [
            line for line in server.lines if "traceback" in line or line["level"] == "error"
        ]
        assert server.stop() == 0


@pytest.fixture(scope="module")
def impatient(folder, tmp_path_factory):
    own = shutil.copytree(folder, tmp_path_factory.mktemp("impatient") / "models")
    shutil.copytree(folder / "name/1", own / "slow/1")
    with running(IMPATIENT, own) as server:
        yield server


def check_alive(server):
    assert server.predict({"inputs": ["a"]}) == (200, {"outputs": {"score": [0.1], "text": [">a"]}})


def test_malformed_requests(server):
    count = 0
    for what, data in malformed_requests("name"):
        status, body = send_bytes(server.address, data)
        assert 400 <= status < 500, (what, status, body)
        error = json.loads(body)["error"]
        assert error and "Traceback" not in error, what
        count += 1
    assert count == 1000
    check_alive(server)


def test_clients_at_the_same_time_get_their_own(server):
    def client(number):
        draw = random.Random(number)
        connection = http.client.HTTPConnection(*server.address, timeout=SECONDS)
        for _ in range(40):
            texts = [str(draw.random()) for _ in range(draw.randrange(1, 50))]
            if draw.random() < 0.3:
                ids = [[draw.randrange(100) for _ in range(len(texts))] for _ in range(3)]
                ones = [[1] * len(texts)] * 3
                inputs = {"input_ids": ids, "attention_mask": ones}
                content = {"inputs": inputs, "signature_name": "ids"}
                _, answer = server.predict(content, connection)
                assert answer["outputs"]["total"] == [sum(row) for row in ids]
            else:
                _, answer = server.predict({"inputs": texts}, connection)
                assert answer["outputs"]["text"] == [f">{text}" for text in texts]
        connection.close()
        return True

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        assert all(pool.map(client, range(32)))
    batches = {line["batch"] for line in server.lines if "batch" in line}
    assert max(batches) == 32


def test_requests_one_after_the_other_in_one_piece(server):
    """Pipelined: answered in their order."""
    body = [json.dumps({"inputs": letter, "signature_name": "raw"}).encode() for letter in "abc"]
    requests = [post(PREDICT, b) for b in body]
    closing = b"Connection: close\r\n"
    with socket.create_connection(server.address, timeout=SECONDS) as connection:
        connection.sendall(b"".join(r.replace(closing, b"") for r in requests[:-1]) + requests[-1])
        data = b"".join(iter(lambda: connection.recv(2**16), b""))
    # Not by http.client, whose file of one response may read the beginning of the next.
    answers = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        size = int(re.search(rb"(?i)\r\ncontent-length: (\d+)", head)[1])
        answers.append(json.loads(data[:size]))
        data = data[size:]
    assert answers == [{"outputs": [{"b64": code}]} for code in ("YQ==", "Yg==", "Yw==")]


def test_expect_continue(server):
    body = b'{"inputs": "a"}'
    head = post(PREDICT, b"", f"Content-Length: {len(body)}", "Expect: 100-continue")
    with socket.create_connection(server.address, timeout=SECONDS) as connection:
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 200


def test_other_signatures_and_paths(server):
    assert server.ask("GET", "/healthz") == (200, {"status": "alive"})
    assert server.ask("GET", "/readyz") == (200, {"status": "ready"})
    assert server.ask("GET", "/v1/models")[1]["models"][0]["name"] == "name"
    assert server.predict({"inputs": "a", "signature_name": "count"}) == (200, {"outputs": 1})


def test_log(server):
    check_alive(server)
    line = server.wait_for("batch")
    assert {"time", "level", "message", "method", "path", "status", "ms", "model"} <= set(line)
    assert line["texts"] and line["batch"] and line["level"] == "info"
    assert server.wait_for("message", f"serving on http://127.0.0.1:{server.address[1]}")


@pytest.mark.parametrize(
    "data",
    [
        b"GET /healthz HTTP/1.1\r\nHo",
        post(PREDICT, b"", "Content-Length: 20") + b'{"inputs"',
        f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\n".encode()
        + b"Transfer-Encoding: chunked\r\n\r\n3",
    ],
    ids=["head", "body", "chunk"],
)
def test_slow_senders(impatient, data):
    status, body = send_bytes(impatient.address, data)
    assert status == 408 and "within 0.5 seconds" in json.loads(body)["error"]
    check_alive(impatient)


def test_a_byte_at_a_time_is_too_slow(impatient):
    """Signs of life do not help."""
    with socket.create_connection(impatient.address, timeout=SECONDS) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nA: ")
        start = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < start + SECONDS:
                connection.sendall(b"a")
                connection.settimeout(0.05)
                with contextlib.suppress(TimeoutError):
                    assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
                    break
        assert time.monotonic() < start + SECONDS


def test_who_says_nothing_is_cut_off(impatient):
    with socket.create_connection(impatient.address, timeout=SECONDS) as connection:
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""
    check_alive(impatient)


def test_the_rest_of_a_body_that_nobody_wants(impatient):
    """Answered at once, and cut off when it does not end."""
    with socket.create_connection(impatient.address, timeout=SECONDS) as connection:
        connection.sendall(
            b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"
        )
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 404
        response.read()
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""


def test_slow_requests_on_a_connection_that_was_used(impatient):
    with socket.create_connection(impatient.address, timeout=SECONDS) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 200 and response.read()
        connection.sendall(b"GET /healthz HT")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_number_of_connections(impatient):
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            connection = http.client.HTTPConnection(*impatient.address, timeout=SECONDS)
            stack.callback(connection.close)
            assert impatient.ask("GET", "/healthz", connection=connection)[0] == 200
        status, body = send_bytes(impatient.address, post(PREDICT, b'{"inputs": "a"}'))
        assert status == 503 and "There are 4 connections" in json.loads(body)["error"]
        # Those that are there go on.
        assert impatient.ask("GET", "/healthz", connection=connection)[0] == 200
    deadline = time.monotonic() + SECONDS
    while send_bytes(impatient.address, b"GET /healthz HTTP/1.0\r\n\r\n")[0] != 200:
        assert time.monotonic() < deadline


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="has no SIGHUP")
def test_it_ends_in_time_whatever_hangs(impatient):
    """A load and a batch; and SIGHUP is as SIGTERM. The last one that needs `impatient`."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(impatient.predict, {"inputs": ["hang"]})
        assert impatient.process.stdout.readline() == "hanging\n"
        start = time.monotonic()
        impatient.process.send_signal(signal.SIGHUP)
        assert waiting.result() == (503, {"error": "The server is stopping"})
    assert impatient.process.wait(SECONDS) == 0
    assert time.monotonic() - start < 5  # 1, and what a busy machine adds
    told = impatient.wait_for("level", "warning")["message"]
    assert "bertgen_tf-load slow/1" in told and "bertgen_tf-batches" in told
    impatient.wait_for("message", "stopped")
    assert not [line for line in impatient.lines if "traceback" in line]


@pytest.mark.slow
def test_new_version_while_clients_ask_then_sigterm(tmp_path):
    """No request is lost when a version replaces another one, nor when the server ends."""
    folder = tmp_path / "models"
    write_export(folder / "name/1", "1")
    write_export(tmp_path / "2", "2")
    with running(CLI, "serve", folder, "--port", "0", "--poll-seconds", "0.1") as server:
        stop = threading.Event()
        seen = []

        def client():
            connection = http.client.HTTPConnection(*server.address, timeout=SECONDS)
            while not stop.is_set():
                try:
                    connection.request("POST", PREDICT, b'{"inputs": ["a", "b"]}')
                    response = connection.getresponse()
                    if response.headers.get("connection") == "close":
                        stop.set()
                except ConnectionRefusedError:
                    return
                except (ConnectionError, http.client.RemoteDisconnected):
                    # Only an idle connection may be closed, and only when it ends.
                    if not stopping.is_set():
                        raise
                    return
                texts = json.loads(response.read())["outputs"]["text"]
                assert response.status == 200 and texts in (["1a", "1b"], ["2a", "2b"])
                seen.append(texts[0])

        stopping = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(client) for _ in range(4)]
            (tmp_path / "2").rename(folder / "name/2")
            deadline = time.monotonic() + SECONDS
            while "2a" not in seen and time.monotonic() < deadline:
                time.sleep(0.01)
            server.wait_for("message", "unloaded")
            stopping.set()
            code = server.stop()
            for future in clients:
                future.result()
        assert {"1a", "2a"} == set(seen) and code == 0
        assert server.wait_for("message", "stopped")
        assert not [line for line in server.lines if "traceback" in line]


@pytest.mark.slow
def test_killed_and_started_again_under_load(folder, tmp_path):
    """Clients that try again lose nothing."""
    pytest.importorskip("urllib3")
    from bertgen_tf.serving.client import Client

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    answered = threading.Semaphore(0)

    def client(number):
        with Client(f"http://127.0.0.1:{port}", "name", retries=1000, timeout=SECONDS) as asking:
            for step in range(200):
                text = f"{number}-{step}"
                assert asking.generate([text]) == [f">{text}"]
                answered.release()
        return True

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        with running(CLI, "serve", folder, "--port", port) as server:
            clients = [pool.submit(client, number) for number in range(4)]
            for _ in range(50):
                assert answered.acquire(timeout=SECONDS)
            server.stop(signal.SIGKILL)
        with running(CLI, "serve", folder, "--port", port):
            assert all(future.result(SECONDS) for future in clients)


@pytest.mark.slow
def test_ctrl_c_ends_it_well(folder):
    with running(CLI, "serve", folder, "--port", "0") as server:
        connection = http.client.HTTPConnection(*server.address, timeout=SECONDS)
        server.predict({"inputs": "a"}, connection)  # an idle connection does not hold it up
        assert server.stop(signal.SIGINT) == 0
        assert server.lines[-1]["message"] == "stopped"


def test_the_guard_ends_what_does_not_even_stop(monkeypatch):
    """Where the event loop, or the log, hangs."""
    ended, hang = threading.Event(), threading.Event()
    codes = []
    monkeypatch.setattr(server_module, "_SHUTDOWN_GRACE", 0.0)
    monkeypatch.setattr(server_module, "_THREADS_GRACE", 0.05)
    monkeypatch.setattr(os, "_exit", lambda code: [codes.append(code), ended.set()])
    monkeypatch.setattr(server_module._log, "error", lambda message: hang.wait(SECONDS))
    models = types.SimpleNamespace(stopping=False)
    for seconds in (SECONDS, 0.05):
        server = server_module._Server(uvicorn.Config(None), models, seconds)
        models.stopping = False
        server.handle_exit(signal.SIGTERM, None)
        assert models.stopping and server.should_exit
        if seconds == SECONDS:
            server.finish()
    assert ended.wait(SECONDS) and codes == [1]
    hang.set()


class Accepted:
    """A connection to an application, as the server accepts it."""

    def __init__(self, app):
        self.config = uvicorn.Config(app, lifespan="off", log_config=None)
        self.state = uvicorn.server.ServerState()
        self.protocols = []

    def make(self):
        class Protocol(_Protocol):
            seconds_to_receive, most_connections = SECONDS, 9

        self.protocols.append(Protocol(self.config, self.state, {}))
        return self.protocols[-1]

    async def __aenter__(self):
        loop = asyncio.get_running_loop()
        self.server = await loop.create_server(self.make, sock=_listen("127.0.0.1", 0))
        return await asyncio.open_connection(*self.server.sockets[0].getsockname())

    async def __aexit__(self, *exception):
        self.server.close()


def test_a_client_that_sends_no_more_gets_its_answers():
    """It has closed its side of the connection, as `nc -N` does; one that has gone is noticed."""
    gone = asyncio.Event()
    go_on = asyncio.Event()

    async def app(scope, receive, send):
        if scope["path"] == "/gone":
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            return
        while (await receive()).get("more_body"):
            pass
        await go_on.wait()
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": scope["path"].encode()})

    def get(path, version="1.1"):
        return f"GET {path} HTTP/{version}\r\nHost: a\r\n\r\n".encode()

    async def test():
        for data, expected in (
            (get("/a"), [b"/a"]),
            (get("/a") + get("/b") + get("/c"), [b"/a", b"/b", b"/c"]),
            (get("/a", "1.0"), [b"/a"]),
            (post("/a", b"12"), [b"/a"]),
            (get("/a") + b"GET /b HT", [b"/a"]),
        ):
            go_on.clear()
            async with asyncio.timeout(SECONDS), Accepted(app) as (reader, writer):
                writer.write(data)
                writer.write_eof()
                await asyncio.sleep(0.25)  # longer than it takes to look whether it is there
                go_on.set()
                answer = await reader.read()
                assert re.findall(rb"\r\n\r\n(/.)", answer) == expected
                # Python's clients skip "100 Continue".
                assert answer.startswith(b"HTTP/1.1 200 " if b"1.0" in data else b"HTTP/1.1 ")
                writer.close()
        for data in (b"", b"GET /a", post("/a", b"", "Content-Length: 9")):
            async with asyncio.timeout(SECONDS), Accepted(app) as (reader, writer):
                writer.write(data)
                writer.write_eof()
                assert await reader.read() == b""  # it can never be whole
        async with asyncio.timeout(SECONDS), Accepted(app) as (_, writer):
            writer.write(get("/gone"))
            await writer.drain()
            writer.close()
            await gone.wait()

    asyncio.run(test())


def test_a_client_that_went_before_it_was_refused(monkeypatch):
    """Its connection is given up all the same."""

    async def test():
        accepted = Accepted(None)
        async with asyncio.timeout(SECONDS), accepted as (_, writer):
            writer.write(b"GET /a")
            while not (accepted.protocols and accepted.protocols[0].conn.trailing_data[0]):
                await asyncio.sleep(0)
            (protocol,) = accepted.protocols

            def gone():
                raise OSError("Transport endpoint is not connected")

            protocol.transport.write_eof = gone
            protocol._time_over()
            while accepted.state.connections:
                await asyncio.sleep(0.01)
            writer.close()

    monkeypatch.setattr(server_module, "_LINGER", 0.0)
    asyncio.run(test())


def test_a_half_closed_connection_of_python(server):
    connection = http.client.HTTPConnection(*server.address, timeout=SECONDS)
    connection.request("POST", PREDICT, b'{"inputs": ["a"]}')
    connection.sock.shutdown(socket.SHUT_WR)
    response = connection.getresponse()
    assert response.status == 200 and json.loads(response.read())["outputs"]["text"] == [">a"]
    connection.close()


def test_answers_are_sent_at_once():
    """By TCP_NODELAY: else each waits 40 ms for the client's system."""

    async def app(scope, receive, send):
        pass

    async def test():
        accepted = Accepted(app)
        async with accepted as (_, writer):
            while not (accepted.protocols and accepted.protocols[0].transport):
                await asyncio.sleep(0)
            connection = accepted.protocols[0].transport.get_extra_info("socket")
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.close()

    asyncio.run(test())


def check_one_line(capsys, arguments, message):
    assert main(["serve", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bertgen-tf: error: ") and message in line


def test_nothing_to_serve(tmp_path, capsys):
    check_one_line(capsys, [tmp_path], "has no models: expected NAME/VERSION/saved_model.pb")


def test_port_in_use(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        message = f"cannot listen on port {port} of 127.0.0.1: Address already in use"
        check_one_line(capsys, [folder, "--port", port], message)


def test_missing_extra(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "bertgen_tf.serving.http.server")
    check_one_line(capsys, [folder], "pip install 'bertgen_tf[serving]'")


@pytest.mark.parametrize("flags", [["--port", "65536"], ["--port", "-1"], ["--max-texts", "0"]])
def test_flags(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args(["serve", "folder", *flags])
    assert stop.value.code == 2 and flags[0] in capsys.readouterr().err


def test_defaults_of_flags_are_those_of_the_function():
    arguments = vars(make_parser().parse_args(["serve", "folder"]))
    assert (arguments.pop("command"), arguments.pop("folder")) == ("serve", "folder")
    parameters = inspect.signature(serve).parameters
    assert arguments == {name: parameters[name].default for name in arguments}
