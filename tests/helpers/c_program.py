"""Runs SavedModels in run_saved_model.c, the C API of TensorFlow, and reads their signatures.

The library is that of the installed wheels or, where the variable SERVING_RUNTIME names another
`site-packages` folder, of the wheels there (tools/test_older_tensorflow).
"""

import dataclasses
import functools
import importlib.util
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2, saved_model_pb2

SOURCE = Path(__file__).with_name("run_saved_model.c")
DTYPES = {"string": object, "int32": np.int32, "float32": np.float32}


def runtime() -> Path:
    """The folder that holds `tensorflow` and `tensorflow_text`."""
    installed = Path(importlib.util.find_spec("tensorflow").origin).parent.parent
    return Path(os.environ.get("SERVING_RUNTIME") or installed)


@functools.cache
def build(folder: Path, *flags: str) -> Path:
    """Compiles the program into `folder`; skips the test where there is no compiler."""
    tensorflow, program = runtime() / "tensorflow", folder / "run_saved_model"
    libraries = [f"-l:lib{name}.so.2" for name in ("tensorflow_cc", "tensorflow_framework")]
    warnings = ["-Wall", "-Wextra", "-Werror", "-pedantic"]
    command = [
        *("gcc", "-std=c11", "-O1", "-g", *warnings, *flags, "-isystem", tensorflow / "include"),
        *(SOURCE, "-o", program, "-pthread", f"-L{tensorflow}", *libraries),
        f"-Wl,-rpath,{tensorflow}",
    ]
    try:
        process = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs gcc")
    assert process.returncode == 0, process.stderr
    return program


@dataclasses.dataclass(frozen=True)
class Signature:
    """Of each input and output: the name of its tensor and its dtype."""

    inputs: dict[str, tuple[str, str]]
    outputs: dict[str, tuple[str, str]]


def read_meta_graph(export: Path):
    """The only MetaGraphDef of an export."""
    proto = saved_model_pb2.SavedModel()
    proto.ParseFromString((export / "saved_model.pb").read_bytes())
    (meta_graph,) = proto.meta_graphs
    return meta_graph


def read_signatures(export: Path) -> dict[str, Signature]:
    """What a server reads from the export, but the signature of its initialisation."""

    def tensors(infos):
        return {key: (info.name, tf.as_dtype(info.dtype).name) for key, info in infos.items()}

    return {
        name: Signature(tensors(definition.inputs), tensors(definition.outputs))
        for name, definition in read_meta_graph(export).signature_def.items()
        if not name.startswith("__")
    }


@dataclasses.dataclass(frozen=True)
class Failure:
    """What TensorFlow answered in place of tensors: a code of `tf.errors` and a message."""

    code: int
    message: str


class LoadFailure(Exception):
    """The export did not load; its argument is a `Failure`."""


class Program:
    """The program with an export loaded, as a context manager.

    Args:
        program: what `build` made.
        export: the folder of a SavedModel.
        xla: False switches XLA off, as a server does unless told otherwise.
        text_ops: whether the ops of tensorflow-text are there, as they are in a server.

    Attributes:
        version: of TensorFlow.

    Raises:
        LoadFailure: TensorFlow could not load the export.
    """

    def __init__(self, program: Path, export: Path, *, xla: bool = True, text_ops: bool = True):
        self.signatures = read_signatures(export)
        folder = runtime() / "tensorflow_text/python/ops"
        libraries = sorted(folder.glob("*.so")) if text_ops else []
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [program, *(() if xla else ("--no-xla",)), export, *libraries],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        kind, *words = self._read()
        if kind == "error":
            self.close()
            raise LoadFailure(_failure(words))
        self.version = words[0]

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        status = self.close()
        if kind is None:
            assert status == 0, self.log()

    def close(self) -> int:
        """Ends the program; returns its exit status."""
        self._process.stdin.close()
        self._process.stdout.close()
        return self._process.wait()

    def log(self) -> str:
        """The end of what it wrote to standard error."""
        self._log.seek(0)
        return self._log.read()[-3000:]

    def __call__(self, name: str, **inputs) -> dict[str, np.ndarray] | Failure:
        """Runs signature `name` once."""
        ((_, answer),) = self.run([(name, inputs)])
        return answer

    def run(self, requests, threads: int = 1, times: int = 1, timeout_ms: int = 0):
        """Runs `(name of a signature, inputs)`, all of them `times` times over.

        Args:
            requests: pairs; the inputs are arrays or nested lists by name.
            threads: how many run at once.
            times: how often each request runs.
            timeout_ms: RunOptions.timeout_in_ms, as a server sets it; 0 is none.

        Returns:
            `(index of the request, answer)` in the order of their ends; an answer is the outputs by
            name, or a `Failure`. `self.memory` has the resident memory in KiB, in equal steps.
        """
        options = config_pb2.RunOptions(timeout_in_ms=timeout_ms).SerializeToString()
        lines = [self._request(name, inputs) for name, inputs in requests]
        self._write("\n".join([*lines, f"run {threads} {times} {options.hex() or '-'}\n"]))
        answers, self.memory = [], []
        while (line := self._read())[0] != "done":
            if line[0] == "memory":
                self.memory.append(int(line[2]))
                continue
            index = int(line[1]) % len(requests)
            outputs = self.signatures[requests[index][0]].outputs
            if line[2] == "error":
                answers.append((index, _failure(line[3:])))
            else:
                answers.append((index, dict(zip(outputs, _arrays(line[3:]), strict=True))))
        assert len(answers) == len(requests) * times
        return answers

    def send(self, text: str) -> tuple[int, str]:
        """Writes to standard input and closes it; returns exit status and standard error."""
        self._write(text)
        return self.close(), self.log()

    def _request(self, name, inputs) -> str:
        signature = self.signatures[name]
        words = ["request", str(len(inputs))]
        for key, value in inputs.items():
            tensor, dtype = signature.inputs[key]
            words += [tensor, dtype, *_words(value, dtype)]
        words += [
            str(len(signature.outputs)),
            *(tensor for tensor, _ in signature.outputs.values()),
        ]
        return " ".join(words)

    def _write(self, text: str) -> None:
        self._process.stdin.write(text)
        self._process.stdin.flush()

    def _read(self) -> list[str]:
        line = self._process.stdout.readline()
        assert line, f"the program ended with {self._process.wait()}: {self.log()}"
        return line.rstrip("\n").split(" ")


def _words(value, dtype: str) -> list[str]:
    array = np.array(value, DTYPES[dtype])
    words = [str(array.ndim), *map(str, array.shape)]
    if dtype != "string":
        return words + [f"{number:.9g}" for number in array.ravel().tolist()]
    texts = (text.encode() if isinstance(text, str) else text for text in array.ravel())
    return words + [text.hex() or "-" for text in texts]


def _arrays(words: list[str]) -> list[np.ndarray]:
    """The tensors of an answer: strings as `bytes`."""
    arrays, words = [], iter(words)
    for dtype in words:
        shape = [int(next(words)) for _ in range(int(next(words)))]
        count = int(np.prod(shape, dtype=np.int64))
        values = [next(words) for _ in range(count)]
        if dtype == "string":
            values = [_bytes(value) for value in values]
        array = np.empty(count, DTYPES[dtype])
        array[:] = values
        arrays.append(array.reshape(shape))
    return arrays


def _failure(words: list[str]) -> Failure:
    code, message = words
    return Failure(int(code), _bytes(message).decode())


def _bytes(word: str) -> bytes:
    return b"" if word == "-" else bytes.fromhex(word)
