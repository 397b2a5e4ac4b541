"""What tools/load_test and tools/soak share: a server process, a small model, a table."""

import contextlib
import http.client
import itertools
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

CLI = "import sys; from bertgen_tf.cli.main import main; sys.exit(main())"
TOLERANCE = 1e-3  # of scores
MAX_ROUNDED = 0.01
SECONDS = 300  # until a server that hangs is given up on
# For the words of the small model and of the texts.
SYLLABLES = ["".join(pair) for pair in itertools.product("bdfgklmnprst", "aeiou")]


def print_facts() -> None:
    names = ("tensorflow", "uvicorn", "starlette")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    print(f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()},")
    print(f"{versions}; clients and server share the machine\n", flush=True)


def make_model(path: Path) -> Path:
    """Exports a model with random weights: 2 layers of 128, 2,800 words, greedy search."""
    import keras

    import bertgen_tf as bg

    keras.utils.set_random_seed(0)
    words = ["".join(pair) for pair in itertools.product(SYLLABLES, SYLLABLES)][:2800]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = bg.BertTokenizer([*special, *words, *(f"##{s}" for s in SYLLABLES)])
    config = bg.BertGenerationConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
        initializer_range=0.2,  # makes it decided about its tokens
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    encoder = bg.BertGenerationEncoder(config)
    decoder = bg.BertGenerationDecoder(config.replace(add_cross_attention=True))
    model = bg.EncoderDecoderModel(encoder, decoder, tokenizer, max_source_length=64)
    bg.export_saved_model(model, path / "1", num_beams=1, max_new_tokens=12, check=False)
    return path


class Server:
    """A process of `bertgen-tf serve`; its log is in a file."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        port: int = 0,
        flags: Sequence[str] = (),
        **environment: str,
    ):
        self.log = Path(tempfile.mkstemp(suffix=".log", dir=folder)[1])
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CLI, "serve", str(model), "--port", str(port)]
                + ["--request-timeout", str(SECONDS), *flags],
                stderr=log,
                env={**os.environ, **environment},
            )
        self.url = self._wait(lambda: next((x["url"] for x in self.lines() if "url" in x), None))
        parts = urllib.parse.urlsplit(self.url)
        self.address = parts.hostname, parts.port
        self._wait(lambda: self.get("/readyz")[0] == 200)
        (entry,) = json.loads(self.get("/v1/models")[1])["models"]
        self.name, self.signatures = entry["name"], entry["signatures"]
        self.metadata = entry["metadata"]

    def _wait(self, condition: Callable) -> object:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := condition():
                return found
            time.sleep(0.1)
        raise SystemExit(f"the server did not start:\n{self.log.read_text()[-3000:]}")

    def lines(self) -> Iterator[dict]:
        for line in self.log.read_text().splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(*self.address, timeout=SECONDS)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()

    def memory_mb(self) -> float:
        kilobytes = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(self.process.pid)], capture_output=True, check=True
        ).stdout
        return int(kilobytes) / 1024

    def stop(self, how: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(SECONDS)


class Promises:
    """What was checked, printed as a table.

    Attributes:
        rows: what was checked, what came, and "kept", "BROKEN" or "".
    """

    def __init__(self):
        self.rows: list[tuple[str, str, str]] = []

    @property
    def are_kept(self) -> bool:
        return all(verdict != "BROKEN" for *_, verdict in self.rows)

    def check(self, what: str, value: str, kept: bool | None = None) -> None:
        verdict = {None: "", True: "kept", False: "BROKEN"}[kept]
        self.rows.append((what, value, verdict))
        print(f"{what:34}{value:50} {verdict}".rstrip(), flush=True)

    def check_log(self, *servers: Server) -> None:
        lines = itertools.chain(*(server.lines() for server in servers))
        bad = [x for x in lines if "traceback" in x or x["level"] == "error"]
        self.check("errors in the log", str(len(bad)), not bad)


def are_right(counts: dict[str, int]) -> bool:
    return counts["wrong"] == 0 and counts["rounded"] <= MAX_ROUNDED * sum(counts.values())


def random_text(draw: random.Random) -> str:
    words = ["".join(draw.choices(SYLLABLES, k=2)) for _ in range(draw.randint(1, 40))]
    return " ".join(words)
