"""Runs `bertgen-tf serve` for hours under mixed requests, and checks that nothing piles up.

    tools/soak [--model saved_models/NAME] [--minutes 120] [--rate 8]

A few clients ask, by chance: every signature with 1 to 8 texts, by rows and columns, some in gzip;
malformed requests and unknown names; status, metadata and metrics; some go away before they are
answered, or in the middle of what they send. Now and then a new version of the model appears, and
the old one is removed.

1. answers: as the server gave them to the same texts alone before, by the rules of tools/load_test
2. memory: flat after the first ten minutes
3. file descriptors when nobody asks: as many as in the first ten minutes; threads: no more than a
   pool above that
4. refusals, lost requests, reloads, errors in the log

Without --model it makes a small one with random weights. In runs shorter than half an hour the
first third counts as the first ten minutes. Linux only: it reads /proc.

Prints a line a minute, and a table; the exit status is 1 if a promise is broken.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import gzip
import http.client
import itertools
import json
import os
import random
import shutil
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from serving_process import (
    SECONDS,
    TOLERANCE,
    Promises,
    Server,
    are_right,
    make_model,
    print_facts,
    random_text,
)
from serving_requests import is_refusal, malformed_requests, post, send_bytes

WARM_UP_MINUTES = 10
# The same share of a run that is too short for them.
WARM_UP_SHARE = 1 / 3
TEXTS = 40
MAX_TEXTS = 8  # of a request
# How often each kind of request is sent.
KINDS = {"predict": 75, "malformed": 8, "look": 9, "leave": 8}
# From the first quarter after the warm-up to the last. In two hours there are 40,000 requests and 8
# reloads between them: 1 KB that each request leaves, or 4 MB that each version leaves, is more. A
# version of the small model takes 20 MB, and 80 more with what XLA compiles for it.
MAX_GROWTH_MB = 32
# asyncio starts threads for large bodies when there are more at a time than ever before.
POOL = min(32, os.cpu_count() + 4)
# For SO_LINGER: to close resets the connection.
RESET = struct.pack("ii", 1, 0)

Row = dict[str, np.ndarray]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="NAME, or NAME/VERSION")
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--rate", type=float, default=8, help="requests a second, of all clients")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--reloads", type=int, default=12, help="of the model, at equal distances")
    parser.add_argument("--seed", type=int, default=0, help="of what is asked")
    arguments = parser.parse_args(argv)
    if not Path("/proc/self/fd").is_dir():
        parser.error("this system has no /proc/PID/fd, from which the numbers come")
    print_facts()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or make_model(Path(folder) / "small")
        return 0 if Soak(arguments, model, Path(folder)).run() else 1


class Usage(NamedTuple):
    """What a process holds at a time."""

    minute: float
    resident_mb: float
    anonymous_mb: float  # without files that are mapped
    descriptors: int
    threads: int
    cpu_seconds: float

    @classmethod
    def of(cls, process: int, minute: float) -> "Usage":
        folder = Path(f"/proc/{process}")
        lines = (folder / "status").read_text().splitlines()
        status = {name: value.split() for name, _, value in (x.partition(":") for x in lines)}
        ticks = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
        return cls(
            minute,
            int(status["VmRSS"][0]) / 1024,
            int(status["RssAnon"][0]) / 1024,
            len(os.listdir(folder / "fd")),
            int(status["Threads"][0]),
            sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"),
        )


class Soak(Promises):
    """One run.

    Args:
        arguments: those of the command line.
        model: the folder to serve a copy of.
        folder: for temporary files.
    """

    def __init__(self, arguments: argparse.Namespace, model: Path, folder: Path):
        super().__init__()
        self.arguments = arguments
        self.folder = folder
        self.source, self.models = newest_version(model), folder / "served" / model_name(model)
        self.version = 0
        self.counts: collections.Counter[str] = collections.Counter()
        self.usages: list[Usage] = []
        self.reload_seconds: list[float] = []
        self.lock = threading.Lock()

    def run(self) -> bool:
        """Whether all promises were kept."""
        self.add_version()
        # Compiled beside the requests, programs come for an hour: bounded, but memory is not flat.
        self.server = Server(self.models, self.folder, flags=["--no-xla"])
        try:
            return self.soak()
        finally:
            self.server.stop(9)

    def soak(self) -> bool:
        minutes = self.arguments.minutes
        warm_up = min(WARM_UP_MINUTES, WARM_UP_SHARE * minutes)
        self.start_asking()
        print(
            f"{self.server.name}, {', '.join(self.server.signatures)}; {self.arguments.rate:g} "
            f"requests a second\n{'minute':>8}{'MB':>8}{'anon.':>8}{'files':>8}{'threads':>8}"
            f"{'CPU':>8}{'asked':>10}{'version':>8}",
            flush=True,
        )
        self.start = time.monotonic()
        period = minutes / max(1, self.arguments.reloads)
        self.reloads = collections.deque((k + 0.5) * period for k in range(self.arguments.reloads))
        self.ask_until(warm_up)
        warm, number = self.quiet(), len(self.usages)
        self.ask_until(minutes)
        end = self.quiet(warm)
        print()
        self.judge(warm, number, end)
        self.check("ends on SIGTERM", f"exit code {(code := self.server.stop())}", code == 0)
        self.check_log(self.server)
        return self.are_kept

    # ------------------------------------------------------------------------------------ questions

    def start_asking(self) -> None:
        """Records the answers to each text alone."""
        draw = random.Random(self.arguments.seed)
        self.texts = [random_text(draw) for _ in range(TEXTS)]
        config = self.server.metadata["config"]["encoder"]
        longest = max(self.server.metadata["source_lengths"])
        self.ids = [
            draw.choices(range(config["vocab_size"]), k=draw.randint(1, longest))
            for _ in range(TEXTS)
        ]
        self.malformed = self.endless_malformed()
        self.expected: dict[str, list[Row]] = {}
        connection = self.connect()
        for signature in self.server.signatures:
            if not self.samples(signature):
                rows = [self.predict(connection, signature, [i], draw) for i in range(TEXTS)]
                self.expected[signature] = [row for (row,) in rows]

    def samples(self, signature: str) -> bool:
        """Whether its answers are drawn: other ones each time, or by the place in the batch."""
        described = self.server.metadata["signatures"][signature]
        settings = described.get("generation_config", self.server.metadata["generation_config"])
        return settings["do_sample"] and signature != "score"

    def endless_malformed(self) -> Iterator[tuple[str, bytes]]:
        for seed in itertools.count():
            yield from malformed_requests(self.server.name, 300, seed)

    def inputs(self, signature: str, indices: Sequence[int]) -> dict[str, list]:
        names = self.server.metadata["signatures"][signature]["inputs"]
        ids = [self.ids[i] for i in indices]
        longest = max(map(len, ids))
        values = {
            "text": [self.texts[i] for i in indices],
            "source": [self.texts[i] for i in indices],
            "target": [self.texts[i - 1] for i in indices],
            "input_ids": [row + [0] * (longest - len(row)) for row in ids],
            "attention_mask": [[1] * len(row) + [0] * (longest - len(row)) for row in ids],
        }
        return {name: values[name] for name in names}

    def body(self, signature: str, indices: Sequence[int], rows: bool) -> bytes:
        inputs = self.inputs(signature, indices)
        content: dict[str, Any] = {"signature_name": signature}
        if rows:
            values = zip(*inputs.values(), strict=True)
            content["instances"] = [dict(zip(inputs, row, strict=True)) for row in values]
        else:
            content["inputs"] = inputs
        return json.dumps(content).encode()

    def predict(
        self,
        connection: http.client.HTTPConnection,
        signature: str,
        indices: Sequence[int],
        draw: random.Random,
    ) -> list[Row]:
        """The answer to each text."""
        rows, headers = draw.random() < 0.3, {}
        body = self.body(signature, indices, rows)
        if draw.random() < 0.2:
            body, headers = gzip.compress(body), {"Content-Encoding": "gzip"}
        connection.request("POST", f"/v1/models/{self.server.name}:predict", body, headers)
        response = connection.getresponse()
        content = response.read()
        if response.status != 200:
            raise RuntimeError(f"{signature}: status {response.status}: {content[:300]!r}")
        answer = json.loads(content)
        if not rows:
            outputs = answer["outputs"]  # a single one is its values
            outputs = outputs if isinstance(outputs, dict) else {"output": outputs}
            names, columns = outputs.keys(), outputs.values()
            predictions = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        else:
            predictions = answer["predictions"]
        if len(predictions) != len(indices):
            raise RuntimeError(f"{signature}: {len(predictions)} answers to {len(indices)} texts")
        rows = [row if isinstance(row, dict) else {"output": row} for row in predictions]
        return [{name: np.array(x) for name, x in row.items()} for row in rows]

    # -------------------------------------------------------------------------------------- clients

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(*self.server.address, timeout=SECONDS)

    def client(self, number: int, stop: threading.Event) -> None:
        """Asks at its share of the rate, or slower if the server is."""
        draw = random.Random(f"{self.arguments.seed} {time.monotonic() - self.start:.0f} {number}")
        pause = self.arguments.clients / self.arguments.rate
        next_time = time.monotonic() + draw.uniform(0, pause)
        connection = self.connect()
        with contextlib.closing(connection):
            while not stop.wait(max(0, next_time - time.monotonic())):
                next_time = max(next_time, time.monotonic() - pause) + draw.uniform(0, 2 * pause)
                (kind,) = draw.choices(list(KINDS), list(KINDS.values()))
                try:
                    found = getattr(self, f"ask_{kind}")(connection, draw)
                except Exception as error:
                    found = {"lost": 1}
                    print(f"{kind}: {type(error).__name__}: {error}", flush=True)
                    connection.close()
                with self.lock:
                    self.counts.update({"asked": 1, kind: 1})
                    self.counts.update(found)

    def ask_predict(
        self, connection: http.client.HTTPConnection, draw: random.Random
    ) -> dict[str, int]:
        signature = draw.choice(self.server.signatures)
        indices = draw.choices(range(TEXTS), k=draw.randint(1, MAX_TEXTS))
        rows = self.predict(connection, signature, indices, draw)
        if signature not in self.expected:
            return {"sampled": len(rows)}
        found: collections.Counter[str] = collections.Counter()
        for i, row in zip(indices, rows, strict=True):
            found[(verdict := compare(self.expected[signature][i], row))] += 1
            if verdict == "wrong":
                print(f"{signature} of {self.texts[i]!r}: {row}", flush=True)
        return found

    def ask_malformed(
        self, connection: http.client.HTTPConnection, draw: random.Random
    ) -> dict[str, int]:
        with self.lock:
            what, data = next(self.malformed)
        status, body = send_bytes(self.server.address, data, SECONDS)
        if is_refusal(status, body):
            return {"refused": 1}
        print(f"answered with {status} {body[:200]!r}: {what}", flush=True)
        return {"not refused": 1}

    def ask_look(
        self, connection: http.client.HTTPConnection, draw: random.Random
    ) -> dict[str, int]:
        model = f"/v1/models/{self.server.name}"
        pages = "/v1/models", model, f"{model}/metadata", "/healthz", "/readyz", "/"
        path = draw.choice([*pages, "/monitoring/prometheus/metrics"])
        connection.request("GET", path)
        response = connection.getresponse()
        if not response.read() or response.status != 200:
            raise RuntimeError(f"{path}: status {response.status}")
        return {}

    def ask_leave(
        self, connection: http.client.HTTPConnection, draw: random.Random
    ) -> dict[str, int]:
        """Goes away before the answer, or before all is sent; closes or resets the connection."""
        indices = draw.choices(range(TEXTS), k=MAX_TEXTS)
        body = self.body(draw.choice(self.server.signatures), indices, False)
        data = post(f"/v1/models/{self.server.name}:predict", body)
        if draw.random() < 0.3:
            data = data[: draw.randrange(len(data))]
        with socket.create_connection(self.server.address, timeout=SECONDS) as leaving:
            leaving.sendall(data)
            time.sleep(draw.uniform(0, 0.05))
            if draw.random() < 0.5:
                leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        return {}

    # ------------------------------------------------------------------------------- the server

    def ask_until(self, minute: float) -> None:
        """Clients ask; a line each minute, or 36 in short runs."""
        stop = threading.Event()
        step = min(1.0, self.arguments.minutes / 36)
        with concurrent.futures.ThreadPoolExecutor(self.arguments.clients) as pool:
            try:
                clients = [pool.submit(self.client, n, stop) for n in range(self.arguments.clients)]
                next_line = self.minute() + step
                # Where reloads take long, those that are due come afterwards.
                while self.server.process.poll() is None and (
                    self.minute() < minute or (self.reloads and self.reloads[0] < minute)
                ):
                    if self.reloads and self.reloads[0] <= self.minute():
                        self.reloads.popleft()
                        self.reload()
                    if next_line <= self.minute():
                        next_line = self.minute() + step
                        self.show_line()
                    time.sleep(0.2)
                self.show_line()
            finally:
                stop.set()
            for client in clients:
                client.result()
        if (code := self.server.process.poll()) is not None:
            raise SystemExit(f"the server ended with exit code {code}")

    def minute(self) -> float:
        return (time.monotonic() - self.start) / 60

    def usage(self) -> Usage:
        return Usage.of(self.server.process.pid, self.minute())

    def show_line(self) -> None:
        usage = self.usage()
        before = self.usages[-1] if self.usages else Usage(0, 0, 0, 0, 0, usage.cpu_seconds)
        seconds = 60 * (usage.minute - before.minute)
        share = (usage.cpu_seconds - before.cpu_seconds) / seconds / os.cpu_count()
        self.usages.append(usage)
        print(
            f"{usage.minute:8.1f}{usage.resident_mb:8.0f}{usage.anonymous_mb:8.0f}"
            f"{usage.descriptors:8}{usage.threads:8}{share:8.0%}{self.counts['asked']:10,}"
            f"{self.version:8}",
            flush=True,
        )

    def quiet(self, wanted: Usage | None = None) -> Usage:
        """What the server holds when nobody asks, once it has seen that all went away."""
        end = time.monotonic() + 10
        usage = self.usage()
        while time.monotonic() < end:
            time.sleep(1)
            before, usage = usage, self.usage()
            limit = wanted or before
            if usage.descriptors <= limit.descriptors and usage.threads <= limit.threads:
                break
        return usage

    def add_version(self) -> None:
        """What appears in the folder is complete."""
        copy = self.folder / "copy"
        shutil.copytree(self.source, copy)
        self.models.mkdir(parents=True, exist_ok=True)
        copy.rename(self.models / str(self.version + 1))
        self.version += 1

    def reload(self) -> None:
        """A new version replaces the old one."""
        self.add_version()
        start = time.monotonic()
        while time.monotonic() < start + SECONDS:
            status, body = self.server.get(f"/v1/models/{self.server.name}")
            states = {x["version"]: x["state"] for x in json.loads(body)["model_version_status"]}
            if states.get(str(self.version)) == "AVAILABLE":
                self.reload_seconds.append(time.monotonic() - start)
                break
            time.sleep(0.2)
        shutil.rmtree(self.models / str(self.version - 1))

    # ------------------------------------------------------------------------------------ judgement

    def judge(self, warm: Usage, number: int, end: Usage) -> None:
        """The verdicts; the first `number` measurements are of the warm-up."""
        counts = {name: self.counts[name] for name in ("equal", "rounded", "wrong")}
        value = "{equal:,} equal, {rounded} rounded, {wrong} wrong".format(**counts)
        self.check("answers", value, counts["equal"] > 0 and are_right(counts))
        if self.counts["sampled"]:
            self.check("answers that are drawn", str(self.counts["sampled"]))
        self.check("requests", ", ".join(f"{self.counts[x]:,} {x}" for x in ("asked", *KINDS)))
        self.check("requests without an answer", str(lost := self.counts["lost"]), not lost)
        value = f"{self.counts['refused']:,} of {self.counts['malformed']:,}"
        self.check("malformed requests refused", value, self.counts["not refused"] == 0)
        taken, wanted = len(self.reload_seconds), self.arguments.reloads
        value = f"{taken} of {wanted}"
        if taken:
            value += f", {statistics.median(self.reload_seconds):.1f} s each"
        self.check("versions taken up", value, taken == wanted)
        growth, slope = trend([(x.minute, x.anonymous_mb) for x in self.usages[number:]])
        value = f"{growth:+.0f} MB after {warm.minute:.0f} minutes, {slope:+.1f} MB an hour"
        self.check("memory", value, growth < MAX_GROWTH_MB)
        value = f"{warm.descriptors}, then {end.descriptors}"
        self.check("descriptors when nobody asks", value, end.descriptors <= warm.descriptors)
        most = max(x.threads for x in self.usages[:number])
        value = f"up to {most}, then {end.threads}"
        self.check("threads", value, end.threads <= most + POOL)


def newest_version(model: Path) -> Path:
    """The version of `model` to copy."""
    if (model / "saved_model.pb").is_file():
        return model
    versions = [path for path in model.iterdir() if path.name.isdecimal()]
    return max(versions, key=lambda path: int(path.name))


def model_name(model: Path) -> str:
    path = model.resolve()
    return path.parent.name if path.name.isdecimal() else path.name


def compare(expected: Row, answer: Row) -> str:
    """Whether an answer is "equal", "rounded", where a token that is as likely won, or "wrong".

    Answers beside others may be padded to the length of these.
    """
    if answer.keys() != expected.keys():
        return "wrong"
    same = {}
    for name, wanted in expected.items():
        given = answer[name]
        if given.ndim != wanted.ndim or any(np.less(given.shape, wanted.shape)):
            same[name] = False
            continue
        given = given[tuple(map(slice, wanted.shape))]
        if wanted.dtype.kind == "f" or given.dtype.kind == "f":
            same[name] = np.allclose(given, wanted, rtol=1e-5, atol=TOLERANCE)
        else:
            same[name] = np.array_equal(given, wanted)
    if not all(same.get(name, True) for name in ("score", "log_probability")):
        return "wrong"
    return "equal" if all(same.values()) else "rounded"


def trend(values: list[tuple[float, float]]) -> tuple[float, float]:
    """How much the last quarter is above the first, by medians; the slope an hour (Theil-Sen)."""
    count = max(1, len(values) // 4)
    first, last = (statistics.median(y for _, y in x) for x in (values[:count], values[-count:]))
    slopes = [(d - b) / (c - a) for (a, b), (c, d) in itertools.combinations(values, 2)]
    return last - first, 60 * statistics.median(slopes or [0.0])


if __name__ == "__main__":
    sys.exit(main())
