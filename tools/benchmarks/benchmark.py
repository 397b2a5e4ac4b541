"""Compares how fast bertgen_tf and other engines generate, with the same weights.

    ./tools/benchmark
    ./tools/benchmark --sizes minilm --batch 1 --beams 1,4 --engines xla,huggingface
    ./tools/benchmark --sentences validation.tsv --limit 50

Engines: `xla` (our compiled loop), `plain` (our plain graph), `int8` (our compiled loop after
`quantize("int8")`), `huggingface` (transformers on PyTorch), `ctranslate2` (float32),
`ctranslate2-int8`, `onnx` (ONNX Runtime through optimum, float32) and `onnx-int8` (dynamic).
Everything runs on the CPU. Each engine has a process of its own; for each batch size and number of
beams they take turns, and medians are printed. CTranslate2 first runs with MKL and with oneDNN, for
AVX2 and AVX-512, in all of its kinds of int8; the best of them takes part.

The weights are random, and EOS is suppressed so that all generate 32 tokens. All float32 engines
must return the same ids.

With --sentences: a trained model, by default the shipped sentence splitter, the first column of a
file, and outputs that end. `plain` is then the export as TensorFlow Serving runs it; `serve` is
`bertgen-tf serve`, asked over HTTP; both have the int8 weights of the export, `xla` and the others
their float32 values. All start with text and end with text. All float32 engines must return the
same greedy texts, of which one in a hundred may differ.

Exit status: 0, 1 if outputs differ, 2 if it cannot be run. The engines that are not ours are
installed by EXTRAS=dev,serving,benchmark ./tools/benchmark
"""

import argparse
import dataclasses
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import benchmark_sentences
import numpy as np
from benchmark_engines import (
    ENGINES,
    OURS,
    BenchmarkError,
    Engines,
    Worker,
    check_libraries,
    say,
    write_onnx,
)
from benchmark_report import FEW_TOKENS, NEW_TOKENS, report

LAST_SPECIAL_TOKEN = 2
SPLITTER = Path(__file__).parents[2] / "saved_models/sentence_splitting/1"


@dataclasses.dataclass(frozen=True)
class Size:
    """A model's dimensions, and how it is run.

    `sharing` is that of `BertGenerationDecoder`; transformers 5 has two stacks in any case.
    `left_out` names engines.
    """

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    source_length: int
    max_batch: int | None = None
    sharing: str = "none"
    max_position_embeddings: int = 512
    left_out: tuple[str, ...] = ()

    def weights_per_token(self) -> int:
        """The weights that one decoder step reads.

        Its layers without the keys and values of cross-attention, which are projected once, and
        the output matrix.
        """
        hidden, inner = self.hidden_size, self.intermediate_size
        attention = 6 * (hidden + 1) * hidden  # query, key, value, output; query, output
        feed_forward = (hidden + 1) * inner + (inner + 1) * hidden
        norms = 3 * 2 * hidden
        layers = self.num_hidden_layers * (attention + feed_forward + norms)
        return layers + (hidden + 1) * self.vocab_size


SIZES = {
    "minilm": Size(6, 384, 12, 1536, 30522, source_length=64),
    "base": Size(12, 768, 12, 3072, 30522, source_length=128),
    # The originals', which share their weights.
    "large": Size(
        *(24, 1024, 16, 4096, 50358),
        source_length=128,
        max_batch=1,
        sharing="all",
        # The graph is near the 2 GB that a protobuf may have.
        left_out=("onnx", "onnx-int8"),
    ),
}


class Case(NamedTuple):
    """One thing that is timed."""

    batch: int
    beams: int
    new_tokens: int = NEW_TOKENS

    def __str__(self) -> str:
        return f"batch {self.batch}, beams {self.beams}, {self.new_tokens} tokens"


def read_bandwidth(threads: int, megabytes: int = 512, rounds: int = 5) -> float:
    """Bytes a second that `threads` threads read from memory together, at best."""
    columns = 2**12
    rows = megabytes * 2**20 // (4 * columns * threads)
    parts = [np.ones((rows, columns), np.float32) for _ in range(threads)]
    vector = np.ones(columns, np.float32)
    # One of them is bound by memory alone, wherever this runs.
    kernels: list[Callable[[np.ndarray], Any]] = [
        lambda part: part.view(np.int8).max(),
        lambda part: part.sum(),
        lambda part: part @ vector,
    ]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for kernel in kernels * rounds:
            start = time.perf_counter()
            list(pool.map(kernel, parts))
            best = max(best, sum(part.nbytes for part in parts) / (time.perf_counter() - start))
    return best


def cases_of(size: Size, batches: Iterable[int], beams: Iterable[int]) -> list[Case]:
    """What is timed for a size; for batch 1, greedy, also a run of few tokens."""
    beams = list(beams)
    batches = [batch for batch in batches if size.max_batch is None or batch <= size.max_batch]
    cases = [Case(batch, number) for batch in batches for number in beams]
    return cases + ([Case(1, 1, FEW_TOKENS)] if Case(1, 1) in cases else [])


def first_difference(ids: list[list[int]], expected: list[list[int]]) -> str | None:
    """Where two engines first differ, in words; a token missing in one of them is -1."""
    for row, (ours, theirs) in enumerate(zip(ids, expected, strict=True)):
        pairs = enumerate(itertools.zip_longest(ours, theirs, fillvalue=-1))
        for step, (one, other) in pairs:
            if one != other:
                return f"row {row}, token {step} is {one} and not {other}"
    return None


def equal_share(ids: list[list[int]], expected: list[list[int]]) -> float:
    """The share of the expected tokens found in their places."""
    pairs = zip(ids, expected, strict=True)
    equal = sum(a == b for row in pairs for a, b in zip(*row, strict=False))
    return equal / max(sum(map(len, expected)), 1)


def write_weights(folder: Path, name: str, size: Size, seed: int, engines: list[str]) -> int:
    """Writes a size's weights unless they exist; returns their bytes."""
    marker = folder / "built.json"
    settings = {
        "build": dataclasses.asdict(size),
        "seed": seed,
        "int8": "int8" in engines,
        "ctranslate2": any(engine.startswith("ctranslate2") for engine in engines),
    }
    settings = json.loads(json.dumps(settings))
    settings["onnx"] = any(engine.startswith("onnx") for engine in engines)
    try:
        built = json.loads(marker.read_text(encoding="utf-8"))
        if built["settings"] == settings:
            return built["weight_bytes"]
    except (OSError, ValueError, KeyError):
        pass
    say(f"{name}: writing the weights")
    folder.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)
    request = {name: value for name, value in settings.items() if name != "onnx"}
    worker = Worker("writing weights", {**request, "folder": str(folder)}, folder / "build.log")
    try:
        weight_bytes = worker.answer()["weight_bytes"]
    finally:
        worker.close()
    if settings["onnx"]:
        write_onnx(folder)
    marker.write_text(json.dumps({"settings": settings, "weight_bytes": weight_bytes}))
    return weight_bytes


def run_size(
    name: str,
    size: Size,
    cases: list[Case],
    engines: list[str],
    folder: Path,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Times all cases of one size; the tables and the JSON are made from the result."""
    weight_bytes = write_weights(folder, name, size, options.seed, engines)
    bandwidth = read_bandwidth(options.threads)
    shape = (max(case.batch for case in cases), size.source_length)
    rng = np.random.default_rng(options.seed)
    inputs = rng.integers(LAST_SPECIAL_TOKEN + 1, size.vocab_size, shape)
    rows: list[dict[str, Any]] = [{**case._asdict(), "engines": {}} for case in cases]
    differences: list[str] = []
    running = Engines({"folder": str(folder), "threads": options.threads}, folder)
    try:
        for engine in engines:
            say(f"{name}: loading {engine}")
            running.start(engine, cases, lambda worker, case: run(worker, inputs, case)["seconds"])
        for case, row in zip(cases, rows, strict=True):
            say(f"{name}: first runs, {case}")
            workers = {engine: running.worker(engine, case) for engine in engines}
            ids = first_runs(workers, inputs, case, row["engines"])
            differences += [f"{name}, {case}: {text}" for text in compare_engines(ids)]
        for case, row in zip(cases, rows, strict=True):
            say(f"{name}: timing {case}")
            for turn in range(options.repeat):
                # Each time another engine goes first.
                for engine in engines[turn % len(engines) :] + engines[: turn % len(engines)]:
                    answer = run(running.worker(engine, case), inputs, case)
                    timed = row["engines"][engine]
                    timed["seconds"].append(answer["seconds"])
                    timed["before"].append(answer["before"])
                    timed["peaks"].append(answer["peak"])
            for timed in row["engines"].values():
                timed["median"] = statistics.median(timed["seconds"])
        facts = running.facts()
    finally:
        running.close()
    return {
        "size": name,
        **dataclasses.asdict(size),
        "weight_bytes": weight_bytes,
        "weights_per_token": size.weights_per_token(),
        "bandwidth": max(bandwidth, read_bandwidth(options.threads)),
        "engines": running.loaded,
        "cases": rows,
        "tuned": [{**one, "case": f"{name}, {one['case']}"} for one in running.tuned],
        "facts": facts,
        "differences": differences,
    }


def run(worker: Worker, ids: np.ndarray, case: Case) -> dict[str, Any]:
    return worker.ask(
        {
            "input_ids": ids[: case.batch].tolist(),
            "num_beams": case.beams,
            "max_new_tokens": case.new_tokens,
        }
    )


def first_runs(
    workers: dict[str, Worker], inputs: np.ndarray, case: Case, results: dict[str, dict]
) -> dict[str, list[list[int]]]:
    """Runs each engine once, so that it compiles if it does; returns the ids of each."""
    ids: dict[str, list[list[int]]] = {}
    for engine, worker in workers.items():
        answer = run(worker, inputs, case)
        ids[engine] = answer["ids"]
        results[engine] = {
            "first_seconds": answer["seconds"],
            "first_peak": answer["peak"],
            "equal_tokens": equal_share(answer["ids"], next(iter(ids.values()))),
            "seconds": [],
            "before": [],
            "peaks": [],
        }
    return ids


def compare_engines(ids: dict[str, list[list[int]]]) -> list[str]:
    """How the float32 engines differ from the first of them, in words."""
    exact = [engine for engine in ids if not engine.endswith("int8")]
    texts = []
    for engine in exact[1:]:
        difference = first_difference(ids[engine], ids[exact[0]])
        if difference:
            texts.append(f"{engine} differs from {exact[0]}: {difference}")
    return texts


def machine(threads: int) -> dict[str, Any]:
    """What the numbers depend on."""
    names = ("tensorflow", "keras", "torch", "transformers", "ctranslate2")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        **versions,
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def list_of(kind: Callable[[str], Any], known: Iterable[Any] = ()) -> Callable[[str], list]:
    """For argparse: comma-separated values, each once."""

    def parse(text: str) -> list:
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"expected values with commas between, received {text}"
            ) from error
        unknown = [value for value in values if known and value not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"{unknown[0]} is not one of {', '.join(map(str, known))}"
            )
        return list(dict.fromkeys(values))

    return parse


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, received {value}")
    return value


def run_sentences(options: argparse.Namespace) -> int:
    """The second table."""
    facts = machine(options.threads)
    engines = options.engines or [*OURS[:2], "serve", *ENGINES[2:]]
    with tempfile.TemporaryDirectory(prefix="bertgen_benchmark_") as temporary:
        folder = options.work_folder or Path(temporary)
        try:
            check_libraries(engines)
            texts = benchmark_sentences.read_texts(options.sentences, options.limit)
            result = benchmark_sentences.measure(
                options.model, texts, engines, options.beams, options.threads, folder / "sentences"
            )
        except (BenchmarkError, OSError) as problem:
            print(f"error: {problem}", file=sys.stderr)
            return 2
    if options.json:
        content = {"machine": facts, **result}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    known = [f"{name} {value}" for name, value in facts.items() if value is not None]
    print(f"{', '.join(known)}\n\n{benchmark_sentences.report(result)}")
    return 1 if benchmark_sentences.differences(result) else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, kind: Callable, default: Any, text: str) -> None:
        parser.add_argument(name, type=kind, default=default, help=text)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--sizes", list_of(str, SIZES), list(SIZES), f"of {', '.join(SIZES)} (default: all)")
    add("--batch", list_of(positive), [1, 8], "batch sizes (default: 1,8; large only 1)")
    add("--beams", list_of(positive), [1, 4], "numbers of beams (default: 1,4)")
    names = list_of(str, (*ENGINES, "serve"))
    add("--engines", names, None, f"of {', '.join(ENGINES)}, with --sentences serve (default: all)")
    add("--repeat", positive, 5, "timed runs of each (default: 5)")
    add("--threads", positive, cores, f"of each engine (default: {cores}, the cores)")
    add("--seed", int, 0, "of weights and inputs (default: 0)")
    add("--work-folder", Path, None, "keeps the weights for the next run (default: a new one)")
    add("--json", Path, None, "writes everything measured to this file")
    add("--sentences", Path, None, "a file with a sentence a line: the table of a trained model")
    add("--model", Path, SPLITTER, "with --sentences, NAME/VERSION (default: the shipped splitter)")
    add("--limit", positive, 200, "with --sentences, how many (default: 200)")
    options = parser.parse_args(argv)
    if options.sentences:
        return run_sentences(options)
    options.engines = options.engines or list(ENGINES)
    if "serve" in options.engines:
        parser.error("--engines serve needs --sentences")
    cases = {
        name: cases_of(SIZES[name], options.batch, options.beams)
        for name in options.sizes
        if SIZES[name].max_batch is None or min(options.batch) <= SIZES[name].max_batch
    }
    if not cases:
        parser.error(f"--batch is above what is run for {', '.join(options.sizes)}")
    facts = machine(options.threads)
    results: list[dict[str, Any]] = []
    error = None
    with tempfile.TemporaryDirectory(prefix="bertgen_benchmark_") as temporary:
        folder = options.work_folder or Path(temporary)
        try:
            check_libraries(options.engines)
            for name in cases:
                size = SIZES[name]
                engines = [e for e in options.engines if e not in size.left_out]
                results.append(run_size(name, size, cases[name], engines, folder / name, options))
                if options.json:
                    content = {"machine": facts, "repeat": options.repeat, "results": results}
                    options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        except (BenchmarkError, OSError) as problem:
            error = problem
    if results:  # also when a later size failed
        known = [f"{name} {value}" for name, value in facts.items() if value is not None]
        print(f"{', '.join(known)}\n\n{report(results, options.repeat)}")
    if error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if any(result["differences"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
