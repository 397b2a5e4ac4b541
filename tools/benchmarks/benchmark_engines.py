"""The engines that are compared, each in a process of its own, and how to speak with them.

    python benchmark_engines.py SETTINGS

SETTINGS is JSON. `{"engine": name, "folder": ..., "threads": n, "compute_type": ...}` serves one
engine; `{"build": size, "folder": ..., "seed": n, "int8": bool, "ctranslate2": bool}` and
`{"onnx": true, "folder": ...}` write what engines read, see `benchmark_weights.py`. Requests come
as lines of JSON on standard input, answers go to standard output.
"""

import contextlib
import ctypes
import gc
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import benchmark_weights
import numpy as np
from benchmark_weights import EOS, PAD

# A call `(input_ids [B, S], num_beams, max_new_tokens)`, padded with PAD, gives a row of ids each.
Generate = Callable[[np.ndarray, int, int], Iterable[Sequence[int]]]

OURS = ("xla", "plain", "int8")
OTHERS = ("huggingface", "ctranslate2", "ctranslate2-int8", "onnx", "onnx-int8")
ENGINES = (*OURS, *OTHERS)
LIBRARIES = {
    "huggingface": ("torch", "transformers"),
    "ctranslate2": ("ctranslate2",),
    "ctranslate2-int8": ("ctranslate2",),
}
# optimum needs a transformers that is older than what the rest runs with.
ONNX_PYTHON = Path(__file__).parents[2] / ".venv-onnx/bin/python"
# Intel's OpenMP, which CTranslate2 uses, lets its threads spin for 0.2 seconds after their work.
PAUSE = 0.3
AVX512 = {"avx512f", "avx512cd", "avx512vl", "avx512bw", "avx512dq"}


class BenchmarkError(Exception):
    """It cannot be run; the message says why."""


class Setting(NamedTuple):
    """One way to run an engine.

    `environment` is read once, when a library is loaded.
    """

    name: str = ""
    environment: dict[str, str] = {}  # noqa: RUF012
    compute_type: str = "float32"


class Worker:
    """An engine in a process of its own."""

    def __init__(
        self,
        name: str,
        settings: dict[str, Any],
        log: Path,
        environment: dict[str, str] | None = None,
        script: str = __file__,
    ):
        self.name = name
        self.log = log
        common = {"TF_CPP_MIN_LOG_LEVEL": "2", "CT2_VERBOSE": "1", **os.environ}
        with open(log, "w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                [ONNX_PYTHON if "onnx" in name else sys.executable, script, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                env={**common, **(environment or {}), "CUDA_VISIBLE_DEVICES": "-1"},
            )

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        status = self.process.wait()
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise BenchmarkError(
            f"{self.name} ended with status {status}: {lines[-1] if lines else 'it said nothing'}"
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; reading shows why
        answer = self.answer()
        time.sleep(PAUSE)
        return answer

    def facts(self) -> str:
        """What CTranslate2 says that it computes with."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return ", ".join(
            re.findall(r"- ((?:Selected ISA|SGEMM backend|GEMM_S8 backend): .*)", text)
        )

    def close(self, seconds: float = 0) -> None:
        """Ends it, after the seconds that it is given to end by itself."""
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class Engines:
    """Engines that are running, each with the setting that is best in a case.

    A case is anything that has a hash.

    Args:
        settings: what all of their processes are told.
        folder: for what they print.
        script: what they run.

    Attributes:
        loaded: the first answer of each.
        tuned: of the engines with several settings, `dict(engine, case, seconds)`, with the seconds
            of each setting by its name.
    """

    def __init__(self, settings: dict[str, Any], folder: Path, script: str = __file__):
        self.loaded: dict[str, dict[str, Any]] = {}
        self.tuned: list[dict[str, Any]] = []
        self._settings, self._folder, self._script = settings, folder, script
        self._workers: dict[tuple[str, str], Worker] = {}
        self._best: dict[tuple[str, Any], str] = {}

    def start(self, engine: str, cases: Iterable[Any], run: Callable[[Worker, Any], float]) -> None:
        """Starts an engine with all settings and keeps the best ones; `run` gives seconds."""
        workers: dict[str, Worker] = {}
        for setting in settings_of(engine):
            worker, answer = self._open(engine, setting)
            workers[setting.name] = self._workers[engine, setting.name] = worker
            self.loaded.setdefault(engine, answer)
        for case in cases:
            self._best[engine, case] = next(iter(workers))
            if len(workers) == 1:
                continue
            turns = [[run(worker, case) for worker in workers.values()] for _ in range(3)]
            medians = map(statistics.median, zip(*turns, strict=True))
            seconds = dict(zip(workers, medians, strict=True))
            self.tuned.append({"engine": engine, "case": str(case), "seconds": seconds})
            self._best[engine, case] = min(seconds, key=seconds.__getitem__)
        for name in set(workers) - {self._best[engine, case] for case in cases}:
            self._workers.pop((engine, name)).close()

    def setting(self, engine: str, case: Any) -> str:
        return self._best[engine, case]

    def worker(self, engine: str, case: Any) -> Worker:
        return self._workers[engine, self._best[engine, case]]

    def facts(self) -> dict[str, str]:
        """What they say about themselves."""
        facts = {f"{e}, {name}": worker.facts() for (e, name), worker in self._workers.items()}
        return {name: text for name, text in facts.items() if text}

    def close(self) -> None:
        for (engine, _), worker in self._workers.items():
            # `serve` has servers to end.
            worker.close(60 if engine == "serve" else 0)

    def _open(self, engine: str, setting: Setting) -> tuple[Worker, dict[str, Any]]:
        settings = {**self._settings, "engine": engine, "compute_type": setting.compute_type}
        log = self._folder / f"{engine} {setting.name}.log"
        worker = Worker(engine, settings, log, setting.environment, self._script)
        try:
            return worker, worker.answer()
        except BenchmarkError:
            worker.close()
            raise


def settings_of(engine: str) -> list[Setting]:
    """The ways to run an engine, of which the best counts."""
    if not engine.startswith("ctranslate2"):
        return [Setting()]
    environments: dict[str, dict[str, str]] = {"": {}}
    if platform.machine() == "x86_64":  # what is chosen by itself depends on the vendor
        environments = {"MKL": {"CT2_USE_MKL": "1"}, "oneDNN": {"CT2_USE_MKL": "0"}}
        if cpu_flags() >= AVX512:
            environments |= {
                f"{name}, AVX-512": {**variables, "CT2_FORCE_CPU_ISA": "AVX512"}
                for name, variables in environments.items()
            }
    settings = []
    for name, environment in environments.items():
        types = ["float32"]
        if engine.endswith("int8"):
            types = [kind for kind in ctranslate2_types(environment) if kind.startswith("int8_")]
        for kind in types:
            words = [kind] if len(types) > 1 else []
            settings.append(Setting(", ".join([name, *words]), environment, kind))
    return settings


def ctranslate2_types(environment: dict[str, str]) -> list[str]:
    """What CTranslate2 can compute in; its int8 is int8_float32, as that is what is converted."""
    code = "import ctranslate2; print(*sorted(ctranslate2.get_supported_compute_types('cpu')))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    )
    return done.stdout.split()


def write_onnx(folder: Path) -> None:
    """Converts the checkpoint in a folder."""
    worker = Worker("onnx", {"onnx": True, "folder": str(folder)}, folder / "onnx.log")
    try:
        worker.answer()
    finally:
        worker.close()


def cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    return set((re.findall(r"^flags\s*: (.*)$", text, re.MULTILINE) or [""])[0].split())


def check_libraries(engines: Iterable[str]) -> None:
    for engine in engines:
        if engine.startswith("onnx") and not ONNX_PYTHON.exists():
            raise BenchmarkError(
                f"the engine {engine} needs .venv-onnx: EXTRAS=dev,serving,benchmark "
                "./tools/benchmark makes it, or leave it out with --engines"
            )
        missing = [name for name in LIBRARIES.get(engine, ()) if not importlib.util.find_spec(name)]
        if missing:
            raise BenchmarkError(
                f"the engine {engine} needs {' and '.join(missing)}: "
                'pip install "bertgen_tf[benchmark]", or leave it out with --engines'
            )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def load_ours(folder: str, engine: str) -> Generate:
    import bertgen_tf as bg

    if engine == "int8":
        model = bg.EncoderDecoderModel.from_preset(os.path.join(folder, "int8"))
    else:
        model = bg.EncoderDecoderModel.from_huggingface(os.path.join(folder, "huggingface"))

    def generate(ids: np.ndarray, num_beams: int, max_new_tokens: int) -> np.ndarray:
        output = model.generate(
            {"input_ids": ids, "attention_mask": np.ones_like(ids)},
            jit_compile=engine != "plain",
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            suppress_tokens=(EOS,),
        )
        return output.sequences[:, 0, 1:]

    return generate


def load_transformers(folder: str, engine: str, threads: int, suppress: list[int]) -> Generate:
    """PyTorch, or ONNX Runtime, whose models optimum lets transformers' search run."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if engine == "huggingface":
        model = transformers.EncoderDecoderModel.from_pretrained(
            os.path.join(folder, "huggingface"), dtype="float32"
        ).eval()
    else:
        import onnxruntime
        from optimum.onnxruntime import ORTModelForSeq2SeqLM

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        model = ORTModelForSeq2SeqLM.from_pretrained(
            os.path.join(folder, engine), session_options=options, use_merged=True
        )

    def generate(ids: np.ndarray, num_beams: int, max_new_tokens: int) -> np.ndarray:
        tensor = torch.from_numpy(ids.astype(np.int64))
        with torch.inference_mode():
            output = model.generate(
                input_ids=tensor,
                attention_mask=(tensor != PAD).long(),
                num_beams=num_beams,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                suppress_tokens=suppress or None,
            )
        return output[:, 1:].numpy()

    return generate


def load_ctranslate2(folder: str, compute_type: str, threads: int, suppress: list[int]) -> Generate:
    import ctranslate2

    translator = ctranslate2.Translator(
        os.path.join(folder, "ctranslate2"),
        compute_type=compute_type,
        inter_threads=1,
        intra_threads=threads,
    )

    def generate(ids: np.ndarray, num_beams: int, max_new_tokens: int) -> list[list[int]]:
        results = translator.translate_batch(
            [[str(token) for token in row if token != PAD] for row in ids],
            beam_size=num_beams,
            max_decoding_length=max_new_tokens,
            suppress_sequences=[[str(token)] for token in suppress] or None,
        )
        return [[int(token) for token in result.hypotheses[0]] for result in results]

    return generate


def load_other(engine: str, folder: str, threads: int, kind: str, suppress: list[int]) -> Generate:
    if engine.startswith("ctranslate2"):
        return load_ctranslate2(folder, kind, threads, suppress)
    return load_transformers(folder, engine, threads, suppress)


def load_engine(engine: str, folder: str, threads: int, kind: str = "float32") -> Generate:
    if engine in OURS:
        return load_ours(folder, engine)
    return load_other(engine, folder, threads, kind, [EOS])


def import_engine(engine: str, threads: int) -> None:
    """Imports what an engine needs, separately so that its memory is known; sets its threads."""
    if engine in OURS:
        import bertgen_tf  # noqa: F401  # first, as it may set flags for TensorFlow

        # isort: split
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
        # Starts TensorFlow and its compiler, which belong to the libraries' memory.
        square = tf.ones([64, 64])
        tf.function(tf.matmul, jit_compile=True)(square, square)
    elif engine.startswith("ctranslate2"):
        import ctranslate2  # noqa: F401
    elif engine.startswith("onnx"):
        import optimum.onnxruntime
        import torch  # noqa: F401

        optimum.onnxruntime.ORTModelForSeq2SeqLM  # noqa: B018
    elif engine == "huggingface":
        import torch  # noqa: F401
        import transformers

        transformers.EncoderDecoderModel  # noqa: B018, it is imported when it is named


def memory(field: str) -> int | None:
    """Bytes that Linux reports for this process: "VmRSS", or its peak, "VmHWM"."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    match = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def settle_memory() -> None:
    """Returns freed memory to the system, and resets the peak to what is left."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        pass


def serve(settings: dict[str, Any], requests: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The answers of one engine: first that it is loaded, then one for each request.

    A request is `dict(input_ids, num_beams, max_new_tokens)`, its answer
    `dict(ids, seconds, before, peak)`, with the memory before the run and its peak during it, in
    bytes.
    """
    engine, threads = settings["engine"], settings["threads"]
    import_engine(engine, threads)
    settle_memory()
    imported = memory("VmRSS")
    start = time.perf_counter()
    kind = settings.get("compute_type", "float32")
    generate = load_engine(engine, settings["folder"], threads, kind)
    seconds = time.perf_counter() - start
    settle_memory()
    yield {"imported": imported, "loaded": memory("VmRSS"), "seconds": seconds}
    for line in requests:
        request = json.loads(line)
        ids = np.array(request["input_ids"], np.int32)
        settle_memory()
        before = memory("VmRSS")
        start = time.perf_counter()
        output = generate(ids, request["num_beams"], request["max_new_tokens"])
        seconds = time.perf_counter() - start
        yield {
            "ids": [[int(token) for token in row] for row in output],
            "seconds": seconds,
            "before": before,
            "peak": memory("VmHWM"),
        }


def answer_all(settings: dict[str, Any], results: Callable[[dict], Iterable[Any]]) -> None:
    """Writes results to what standard output was."""
    # Libraries print to standard output, which is for the answers alone.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for answer in results(settings):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def results_of(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "build" in settings:
        names = ("folder", "build", "seed", "int8", "ctranslate2")
        yield benchmark_weights.build(*(settings[name] for name in names))
    elif "onnx" in settings:
        benchmark_weights.write_onnx(settings["folder"])
        yield {}
    else:
        yield from serve(settings, sys.stdin)


if __name__ == "__main__":
    answer_all(json.loads(sys.argv[1]), results_of)
