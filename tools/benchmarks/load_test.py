"""Puts `bertgen-tf serve` under load, in a process of its own here, and checks what it promises.

    tools/load_test [--model saved_models/NAME] [--seconds 60]

1. kill -9 and a restart under load: clients that retry lose nothing
2. answers: 32 clients at a time; none lost, swapped or wrong
3. batching: at least 3 times the texts a second of one client; what the server adds to a request
4. long requests give way: a text beside the largest ones that are allowed, of each plain signature,
   is answered within the time of three batches, which are short; none is lost
5. memory: the same after thousands of requests of all lengths
6. malformed requests: all answered with 4xx, and the server keeps running
7. XLA compiles a bounded number of programs

Without --model it makes a small one with random weights. Every answer is compared with the one that
the server gave to the same text alone. Batches are computed in another order: where two tokens are
almost equally likely, the other one may win in 1 answer of 100, with a score that is the same to
1e-3.

Prints a table; the exit status is 1 if a promise is broken.
"""

import argparse
import concurrent.futures
import http.client
import itertools
import json
import random
import re
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from serving_process import (
    SECONDS,
    SYLLABLES,
    TOLERANCE,
    Promises,
    Server,
    are_right,
    make_model,
    print_facts,
    random_text,
)
from serving_requests import is_refusal, malformed_requests, send_bytes

MIN_RATIO = 3.0
MAX_OVERHEAD_MS = 10.0
# What batches aim at by default.
BATCH_SECONDS = 1.0
# Growth of memory in the second half of the requests.
MAX_GROWTH_MB = 32


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="NAME, or NAME/VERSION")
    parser.add_argument("--seconds", type=float, default=60, help="of answers under load")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=10_000, help="of the memory test")
    parser.add_argument("--xla-requests", type=int, default=100, help="0 to leave XLA out")
    parser.add_argument("--malformed", type=int, default=1000, help="malformed requests")
    arguments = parser.parse_args(argv)
    print_facts()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or make_model(Path(folder) / "small")
        return 0 if LoadTest(arguments, model, Path(folder)).run() else 1


class Connection:
    """One client, which keeps its connection."""

    def __init__(self, server: Server, signature: str = "serving_default"):
        self.path = f"/v1/models/{server.name}:predict"
        self.signature = signature
        self.max_length = server.metadata["config"]["preprocessor"]["max_source_length"]
        self.connection = http.client.HTTPConnection(*server.address, timeout=SECONDS)

    def ask(self, texts: list[str]) -> list[tuple[str, float]]:
        """Texts and scores."""
        status, content = self.post({"text": texts})
        if status != 200:
            raise RuntimeError(f"status {status}: {content[:300]!r}")
        outputs = json.loads(content)["outputs"]
        return list(zip(outputs["text"], outputs["score"], strict=True))

    def post(self, inputs: dict[str, list]) -> tuple[int, bytes]:
        """Status and body of the answer."""
        body = json.dumps({"signature_name": self.signature, "inputs": inputs})
        self.connection.request("POST", self.path, body)
        response = self.connection.getresponse()
        return response.status, response.read()


class LoadTest(Promises):
    """All tests, one after another.

    Args:
        arguments: those of the command line.
        model: the folder to serve.
        folder: for temporary files.
    """

    def __init__(self, arguments: argparse.Namespace, model: Path, folder: Path):
        super().__init__()
        self.arguments = arguments
        self.model = model
        self.folder = folder
        self.expected: dict[str, tuple[str, float]] = {}

    def run(self) -> bool:
        """Whether all promises were kept."""
        dump = self.folder / "xla"
        first = Server(self.model, self.folder)
        try:
            print(f"{first.name}: {first.metadata.get('parameters', 0):,} parameters\n")
            alone = self.one_client(first)
            flags = f"--xla_dump_to={dump} --xla_dump_hlo_module_re=.*search.*"
            server = self.restart(first, XLA_FLAGS=flags)
        finally:
            first.stop(signal.SIGKILL)
        try:
            self.overhead(server, alone)
            self.many_clients(server, alone)
            self.long_requests(server)
            slow = start_slowly(server)  # they wait for their time-out while others are answered
            self.memory(server)
            self.malformed(server, slow)
            if self.arguments.xla_requests and "generate_xla" in server.signatures:
                self.compilations(server, dump)
            self.check("ends on SIGTERM", f"exit code {(code := server.stop())}", code == 0)
        finally:
            server.stop(signal.SIGKILL)
        self.check_log(first, server)
        return self.are_kept

    def one_client(self, server: Server) -> list[float]:
        """Records the expected answer to each text; returns the seconds that each took."""
        draw = random.Random(0)
        connection = Connection(server)
        texts = [random_text(draw) for _ in range(200)]
        for text in texts[:20]:
            connection.ask([text])
        times = []
        for text in texts:
            start = time.perf_counter()
            (self.expected[text],) = connection.ask([text])
            times.append(time.perf_counter() - start)
        return times

    def overhead(self, server: Server, alone: list[float]) -> None:
        """The time of one request, minus that of the signature alone."""
        import tensorflow as tf
        import tensorflow_text  # noqa: F401 (registers the operations of tokenizers)

        path = next(Path(x["path"]) for x in server.lines() if x["message"] == "loading")
        loaded = tf.saved_model.load(str(path))
        signature = loaded.signatures["serving_default"]
        signature(text=tf.constant(["a"]))
        connection = Connection(server)
        direct, asked = [], []
        for text in list(self.expected)[:100]:  # in turns: the machine may be busy
            start = time.perf_counter()
            {name: x.numpy() for name, x in signature(text=tf.constant([text])).items()}
            direct.append(time.perf_counter() - start)
            start = time.perf_counter()
            connection.ask([text])
            asked.append(time.perf_counter() - start)
        added = 1000 * statistics.median(a - d for a, d in zip(asked, direct, strict=True))
        value = f"{1000 * statistics.median(direct):.1f} ms and {added:.1f} ms by the server"
        self.check("a text alone, median", value, added < MAX_OVERHEAD_MS)

    def many_clients(self, server: Server, alone: list[float]) -> None:
        end = time.monotonic() + self.arguments.seconds
        times: list[float] = []
        counts = {"equal": 0, "rounded": 0, "wrong": 0}
        lock = threading.Lock()

        def client(number: int) -> None:
            draw = random.Random(number)
            connection = Connection(server)
            texts = list(self.expected)
            while time.monotonic() < end:
                text = draw.choice(texts)
                start = time.perf_counter()
                (answer,) = connection.ask([text])
                seconds = time.perf_counter() - start
                with lock:
                    times.append(seconds)
                    counts[self.compare(text, answer)] += 1

        start = time.monotonic()
        failures = in_threads(client, self.arguments.clients)
        seconds = time.monotonic() - start
        clients = f"{self.arguments.clients} clients"
        value = "{equal:,} equal, {rounded} rounded, {wrong} wrong".format(**counts)
        self.check(f"answers to {clients}", value, are_right(counts))
        self.check("requests without an answer", str(failures), failures == 0)
        before, now = len(alone) / sum(alone), len(times) / seconds
        self.check("one client, texts a second", f"{before:.1f}")
        self.check(f"{clients}, texts a second", f"{now:.1f}")
        self.check("ratio", f"{now / before:.1f}", now / before >= MIN_RATIO)
        for name, values in (("one client", alone), (clients, times)):
            self.check(
                f"latency of {name}",
                f"p50 {1000 * statistics.median(values):.0f} ms, "
                f"p99 {1000 * statistics.quantiles(values, n=100)[98]:.0f} ms",
            )
        sizes = [x["batch"] for x in server.lines() if "batch" in x][-len(times) :]
        self.check("texts run together, mean", f"{statistics.mean(sizes):.1f}")

    def long_requests(self, server: Server) -> None:
        """One client with the largest requests that are allowed, 16 with one text."""
        plain = [name for name in server.signatures if not name.endswith("_xla")]
        # What a batch may take: the time that it aims at, or that of two of the slowest rows.
        allowed = 0.0
        for name in plain:
            connection = Connection(server, name)
            for _ in range(2):
                start = time.perf_counter()
                connection.post(long_texts(connection, 1))
            allowed = max(allowed, BATCH_SECONDS, 2 * (time.perf_counter() - start))
        allowed *= 1.5  # the machine is shared with the clients
        end = time.monotonic() + self.arguments.seconds
        seen = sum(1 for _ in server.lines())
        times: list[float] = []
        sizes: dict[str, int] = {}
        counts = {"equal": 0, "rounded": 0, "wrong": 0}
        lock = threading.Lock()

        def client(number: int) -> None:
            if not number:
                while time.monotonic() < end:
                    for name in plain:
                        sizes[name] = ask_for_most(Connection(server, name))
                return
            draw = random.Random(number)
            connection = Connection(server)
            while time.monotonic() < end:
                text = draw.choice(list(self.expected))
                start = time.perf_counter()
                (answer,) = connection.ask([text])
                with lock:
                    times.append(time.perf_counter() - start)
                    counts[self.compare(text, answer)] += 1

        failures = in_threads(client, 17)
        value = "{equal:,} equal, {rounded} rounded, {wrong} wrong".format(**counts)
        self.check("16 clients beside long requests", value, are_right(counts))
        self.check("requests without an answer", str(failures), failures == 0)
        self.check("texts of them", ", ".join(f"{name} {n:,}" for name, n in sizes.items()))
        batches = [x["batch_ms"] for x in itertools.islice(server.lines(), seen, None)
                   if "batch_ms" in x]  # fmt: skip
        usual, longest = statistics.median(batches), max(batches)
        value = f"median {usual:.0f} ms, longest {longest:.0f}, allowed {1000 * allowed:.0f}"
        self.check("batches of them", value, usual < 1000 * allowed)
        p99 = statistics.quantiles(times, n=100)[98]
        value = f"p99 {1000 * p99:.0f} ms"
        self.check("a text beside long requests", value, p99 < 3 * allowed)

    def compare(self, text: str, answer: tuple[str, float]) -> str:
        expected = self.expected[text]
        if abs(answer[1] - expected[1]) > TOLERANCE:
            return "wrong"
        return "equal" if answer[0] == expected[0] else "rounded"

    def memory(self, server: Server) -> None:
        """Requests of 1 to 8 texts of all lengths."""
        total, steps = self.arguments.requests, 10
        values = [server.memory_mb()]
        failures = 0
        for step in range(steps):

            def client(number: int, step: int = step) -> None:
                draw = random.Random(1000 * step + number)
                connection = Connection(server)
                for _ in range(total // steps // 8):
                    connection.ask([random_text(draw) for _ in range(draw.randint(1, 8))])

            failures += in_threads(client, 8)
            values.append(server.memory_mb())
        growth = values[-1] - values[steps // 2]
        print("memory in MB:", *(f"{value:.0f}" for value in values), flush=True)
        value = f"{growth:+.0f} MB in the second half of {total:,}"
        self.check("memory of the server", value, growth < MAX_GROWTH_MB and not failures)

    def malformed(self, server: Server, slow: list[socket.socket]) -> None:
        """Requests that are answered with 4xx, and `slow` ones, which are not waited for."""
        statuses: dict[int, int] = {}
        for what, data in malformed_requests(server.name, self.arguments.malformed):
            status, body = send_bytes(server.address, data)
            if not is_refusal(status, body):
                print(f"answered with {status} {body[:200]!r}: {what}")
                status = 0
            statuses[status] = statuses.get(status, 0) + 1
        value = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
        self.check("malformed requests", value, 0 not in statuses)
        late = [connection.recv(2**16).split(b" ")[1:2] for connection in slow]
        self.check(
            "slow senders", f"{late.count([b'408'])} x 408", set(map(tuple, late)) == {(b"408",)}
        )
        texts = list(self.expected)[:20]
        answers = [self.compare(text, Connection(server).ask([text])[0]) for text in texts]
        self.check("right answers after them", str(answers.count("equal")), "wrong" not in answers)

    def restart(self, server: Server, **environment: str) -> Server:
        """Kills the server while clients ask; returns the one started on its port."""
        from bertgen_tf.serving.client import Client

        answered = threading.Semaphore(0)
        counts = {"equal": 0, "rounded": 0, "wrong": 0}
        lock = threading.Lock()
        again = threading.Event()  # the second server answers

        def client(number: int) -> None:
            draw = random.Random(number)
            texts = list(self.expected)
            after = 0
            with Client(server.url, server.name, retries=1000, timeout=SECONDS) as asking:
                while after < 10:
                    text = draw.choice(texts)
                    output = asking.generate([text], output_scores=True)
                    after += again.is_set()
                    with lock:
                        answer = output.texts[0], float(output.scores[0, 0])
                        counts[self.compare(text, answer)] += 1
                    answered.release()

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            failures = pool.submit(in_threads, client, 8)
            for _ in range(100):
                if not answered.acquire(timeout=SECONDS):
                    raise SystemExit("the clients got no answers")
            server.stop(signal.SIGKILL)
            second = Server(self.model, self.folder, server.address[1], **environment)
            again.set()
            lost = failures.result()
        value = "{equal:,} equal, {rounded} rounded, {wrong} wrong".format(**counts)
        self.check("killed and started again", value, are_right(counts))
        self.check("clients that lost an answer", str(lost), lost == 0)
        return second

    def compilations(self, server: Server, dump: Path) -> None:
        """XLA writes down each program that it compiles, in the folder `dump`."""
        draw = random.Random(0)
        connection = Connection(server, "generate_xla")
        for _ in range(self.arguments.xla_requests):
            connection.ask([random_text(draw) for _ in range(draw.randint(1, 32))])
        compiled = len({path.name.split(".")[0] for path in dump.iterdir()})
        sizes, lengths = server.metadata["batch_sizes"], server.metadata["source_lengths"]
        most = len(sizes) * len(lengths)
        value = f"{compiled} of at most {most}, {self.arguments.xla_requests} requests"
        self.check("programs that XLA compiled", value, 0 < compiled <= most)


def long_texts(connection: Connection, count: int) -> dict[str, list]:
    """Inputs of a connection's signature, as long as the model reads them."""
    text, signature = " ".join(SYLLABLES), connection.signature
    if signature == "ids":
        length = connection.max_length
        return {"input_ids": [[5] * length] * count, "attention_mask": [[1] * length] * count}
    if signature == "score":
        return {"source": [text] * count, "target": [text] * count}
    return {"text": [text] * count}


def ask_for_most(connection: Connection) -> int:
    """Sends as many long texts as a request may have; returns how many."""
    count = 1024
    while True:
        status, content = connection.post(long_texts(connection, count))
        if status == 200:
            return count
        allowed = re.search(rb"at most (\d+) such", content)
        if status == 503:  # in its turn
            time.sleep(1)
        elif status == 413 and allowed:
            count = int(allowed[1])
        else:
            raise RuntimeError(f"status {status}: {content[:300]!r}")


def start_slowly(server: Server) -> list[socket.socket]:
    """Connections on which requests begin, but nothing follows."""
    head = (
        f"POST /v1/models/{server.name}:predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99"
    )
    connections = []
    for part in ("P", head, f"{head}\r\n\r\n{{"):
        connections.append(socket.create_connection(server.address, timeout=SECONDS))
        connections[-1].sendall(part.encode())
    return connections


def in_threads(client: Callable[[int], None], count: int) -> int:
    """How many clients failed; shows why the first did."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        errors = [future.exception() for future in [pool.submit(client, n) for n in range(count)]]
    errors = [error for error in errors if error]
    if errors:
        print(f"{type(errors[0]).__name__}: {errors[0]}", flush=True)
    return len(errors)


if __name__ == "__main__":
    sys.exit(main())
