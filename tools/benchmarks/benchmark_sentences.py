"""The second table of `benchmark.py`: a trained model, real sentences, outputs that end.

Both sides of it: what starts the engines and asks them, and, as a program of its own, an engine:

    python benchmark_sentences.py SETTINGS

SETTINGS is JSON, `{"engine": name, "folder": ..., "threads": n, "exports": {beams: folder}}`, or
`{"convert": export, "folder": ..., "texts": [...], "beams": [...], "ctranslate2": bool}`.
"""

import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import benchmark_weights
import numpy as np
from benchmark_engines import (
    BenchmarkError,
    Engines,
    Worker,
    answer_all,
    import_engine,
    load_other,
    say,
    write_onnx,
)
from benchmark_report import table, tuned_parts

# A call `(texts, num_beams)` gives a text each.
Answer = Callable[[list[str], int], list[str]]

BATCH = 32
# Of texts alone that an engine answers before it is the next one's turn.
CHUNK = 10
TUNED_TEXTS = 6
# Without plain and serve: exports have the precision of the model.
EXACT = ("xla", "huggingface", "ctranslate2", "onnx")
# Of greedy float32 outputs: two tokens may be equally likely.
MIN_EQUAL = 0.99


def read_texts(file: Path, limit: int) -> list[str]:
    """The first column of the first lines."""
    with open(file, encoding="utf-8") as lines:
        texts = [
            line.rstrip("\n").split("\t")[0] for line, _ in zip(lines, range(limit), strict=False)
        ]
    texts = [text for text in texts if text.strip()]
    if len(texts) < 2:
        raise BenchmarkError(f"--sentences must name at least 2 sentences; found {len(texts)}")
    return texts


def first_of_buckets(lengths: list[int]) -> list[int]:
    """The indices of the first text of each power of two, from 16, that lengths are padded to."""
    buckets = [max(16, 1 << (length - 1).bit_length()) for length in lengths]
    return sorted({bucket: i for i, bucket in reversed(list(enumerate(buckets)))}.values())


def without_prose(text: str) -> str:
    """What is compared: ours set spaces and quotation marks as in prose, others do not."""
    return "".join(text.split()).replace("''", '"').replace("``", '"')


class Case(NamedTuple):
    """One thing that is timed."""

    batch: int
    beams: int

    def __str__(self) -> str:
        return f"batch {self.batch}, beams {self.beams}"


def ask(worker: Worker, texts: list[str], case: Case) -> dict[str, Any]:
    return worker.ask({"texts": texts, "batch": case.batch, "num_beams": case.beams})


def measure(
    export: Path, texts: list[str], engines: list[str], beams: list[int], threads: int, folder: Path
) -> dict[str, Any]:
    """Times the engines; the table and the JSON are made from the result.

    Args:
        export: the folder of an export, NAME/VERSION.
        texts: the sentences.
        engines: names; `serve` is `bertgen-tf serve`, `plain` the export in a session.
        beams: numbers of beams.
        threads: of each engine; `serve` and `plain` take all cores.
        folder: for files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    say("writing the model for each engine")
    converted = ask_once(
        "convert",
        {
            "convert": str(export),
            "folder": str(folder),
            "texts": texts,
            "beams": beams,
            "ctranslate2": any(engine.startswith("ctranslate2") for engine in engines),
        },
        folder,
    )
    if any(engine.startswith("onnx") for engine in engines):
        write_onnx(folder)
    lengths = converted["lengths"]
    size = min(BATCH, len(texts))
    # Full batches only: each further size would be another program.
    batches = [texts[i : i + size] for i in range(0, len(texts) - size + 1, size)]
    longest = [max(lengths[i * size : (i + 1) * size]) for i in range(len(batches))]
    chunks = [texts[i : i + CHUNK] for i in range(0, len(texts), CHUNK)]
    rows = {(e, number): {"engine": e, "beams": number} for number in beams for e in engines}
    cases = [Case(count, number) for number in beams for count in (1, size)]
    settings = {"folder": str(folder), "threads": threads, "exports": converted["exports"]}
    running = Engines(settings, folder, __file__)

    def try_out(worker: Worker, case: Case) -> float:
        few = texts[:TUNED_TEXTS] if case.batch == 1 else batches[0]
        return sum(ask(worker, few, case)["seconds"])

    try:
        for engine in engines:
            say(f"loading {engine}")
            running.start(engine, cases, try_out)
        for case in cases:
            if case.batch == 1:
                parts, first = chunks, [[texts[i]] for i in first_of_buckets(lengths)]
            else:
                parts, first = batches, [batches[i] for i in first_of_buckets(longest)]
            say(f"first runs, {case}")
            for engine, part in itertools.product(engines, first):
                ask(running.worker(engine, case), part, case)
            say(f"timing {case}")
            for engine, (answers, seconds) in take_turns(running, engines, parts, case).items():
                row = rows[engine, case.beams]
                setting = running.setting(engine, case)
                if case.batch == 1:
                    row["texts"], row["setting"] = answers, setting
                    row["p50"], row["p99"] = (float(np.quantile(seconds, q)) for q in (0.5, 0.99))
                else:
                    row["batch_setting"] = setting
                    row["per_second"] = len(answers) / sum(seconds)
        facts = running.facts()
    finally:
        running.close()
    compare(list(rows.values()))
    return {
        "sentences": len(texts),
        "batch": size,
        "batches": len(batches),
        "rows": list(rows.values()),
        "tuned": running.tuned,
        "facts": facts,
    }


def take_turns(
    running: Engines, engines: list[str], parts: list[list[str]], case: Case
) -> dict[str, tuple[list[str], list[float]]]:
    """Each engine's answers to all parts, and the seconds of each batch."""
    results: dict[str, tuple[list[str], list[float]]] = {e: ([], []) for e in engines}
    for turn, part in enumerate(parts):
        # Each time another engine goes first.
        for engine in engines[turn % len(engines) :] + engines[: turn % len(engines)]:
            asked = part
            if engine == "serve" and case.batch > 1:
                # All at once: its clients do not wait for each other at the end of a batch.
                asked = [] if turn else [text for part in parts for text in part]
            if not asked:
                continue
            answer = ask(running.worker(engine, case), asked, case)
            results[engine][0].extend(answer["texts"])
            results[engine][1].extend(answer["seconds"])
    return results


def ask_once(name: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    worker = Worker(name, settings, folder / f"{name}.log", script=__file__)
    try:
        return worker.answer()
    finally:
        worker.close()


def compare(rows: list[dict[str, Any]]) -> None:
    """Sets `equal`, the share of a row's texts that the first row with as many beams has, too."""
    first: dict[int, list[str]] = {}
    for row in rows:
        expected = first.setdefault(row["beams"], row["texts"])
        pairs = zip(row["texts"], expected, strict=True)
        equal = [without_prose(text) == without_prose(other) for text, other in pairs]
        row["equal"] = sum(equal) / len(equal)


def differences(result: dict[str, Any]) -> list[str]:
    """The float32 engines whose greedy texts are not those of the first row, in words."""
    first = result["rows"][0]["engine"]
    if first not in EXACT:
        return []
    return [
        f"{row['engine']}: {row['equal']:.1%} of the texts are those of {first}"
        for row in result["rows"]
        if row["beams"] == 1 and row["engine"] in EXACT and row["equal"] < MIN_EQUAL
    ]


def report(result: dict[str, Any]) -> str:
    """What is printed, in Markdown."""
    rows = []
    for row in result["rows"]:
        base = base_of(row, result["rows"])
        ratios = [row["p50"] / base["p50"], row["per_second"] / base["per_second"]]
        p50, rate = (f" ({ratio:.2f})" if base is not row else "" for ratio in ratios)
        settings = dict.fromkeys([row["setting"], row["batch_setting"]])
        rows.append(
            [row["engine"], str(row["beams"])]
            + [f"{1000 * row['p50']:.0f}{p50}", f"{1000 * row['p99']:.0f}"]
            + [f"{row['per_second']:.1f}{rate}", f"{row['equal']:.1%}"]
            + ["; ".join(filter(None, settings))]
        )
    first = result["rows"][0]["engine"]
    parts = [
        f"Milliseconds of {result['sentences']} sentences one by one; sentences a second in "
        f"{result['batches']} batches of {result['batch']}, of serve with as many clients; in "
        "brackets how many times those of ours at the same precision; and the share of the texts "
        f"that are {first}'s:",
        table(["engine", "beams", "p50", "p99", "sentences a second", "equal", "setting"], rows),
    ]
    if result["tuned"]:
        parts += tuned_parts(result["tuned"], result["facts"])
    wrong = differences(result)
    parts.append(
        "\n".join(["The float32 engines DIFFER:", "", *(f"- {text}" for text in wrong)])
        if wrong
        else "The float32 engines agree."
    )
    return "\n\n".join(parts)


def base_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of ours with which one is compared."""
    wanted = ("xla", "int8") if row["engine"] in EXACT else ("int8", "xla")
    same = {other["engine"]: other for other in rows if other["beams"] == row["beams"]}
    return next((same[name] for name in wanted if name in same), next(iter(same.values())))


def load_answers(
    engine: str, folder: str, threads: int, kind: str, exports: dict[int, str]
) -> Answer:
    """An engine from text to text."""
    if engine in ("xla", "int8"):
        import bertgen_tf as bg

        model = bg.EncoderDecoderModel.from_export(next(iter(exports.values())))
        if engine == "xla":
            model.dequantize()
        return lambda texts, num_beams: model.generate(texts, num_beams=num_beams)
    if engine == "plain":
        return load_export(exports)
    if engine.startswith("ctranslate2"):
        os.environ["USE_TORCH"] = "0"  # which would take seconds to import, for a tokenizer
    from transformers import AutoTokenizer

    checkpoint = Path(folder) / "huggingface"
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint))
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    longest = config["bertgen_tf"]["preprocessor"]["max_source_length"]
    defaults = json.loads((checkpoint / "generation_config.json").read_text(encoding="utf-8"))
    generate = load_other(engine, folder, threads, kind, [])

    def answer(texts: list[str], num_beams: int) -> list[str]:
        batch = tokenizer(
            texts, truncation=True, max_length=longest, padding=True, return_tensors="np"
        )
        ids = generate(batch["input_ids"], num_beams, defaults["max_new_tokens"])
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    return answer


def load_export(exports: dict[int, str]) -> Answer:
    """The plain graph, in a session, as TensorFlow Serving runs it."""
    from tensorflow.core.protobuf import saved_model_pb2

    from bertgen_tf.serving.signatures import load_signatures

    signatures = {}
    for number, path in exports.items():
        folder = Path(path)
        graph = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
        metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        signatures[number] = load_signatures(folder, graph, metadata)["serving_default"]

    def answer(texts: list[str], num_beams: int) -> list[str]:
        batch = np.array([text.encode() for text in texts], object)
        return [text.decode() for text in signatures[num_beams].run({"text": batch})["text"]]

    return answer


def answer_requests(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The answers of an engine: first that it is loaded, then one for each request.

    A request is `dict(texts, num_beams, batch)`, its answer `dict(texts, seconds)`, with the
    seconds of each batch.
    """
    engine, threads = settings["engine"], settings["threads"]
    exports = {int(number): path for number, path in settings["exports"].items()}
    import_engine(engine, threads)
    answer = load_answers(engine, settings["folder"], threads, settings["compute_type"], exports)
    yield {}
    for line in sys.stdin:
        asked = json.loads(line)
        texts, size = asked["texts"], asked["batch"]
        outputs: list[str] = []
        seconds = []
        for first in range(0, len(texts), size):
            start = time.perf_counter()
            outputs += answer(texts[first : first + size], asked["num_beams"])
            seconds.append(time.perf_counter() - start)
        yield {"texts": outputs, "seconds": seconds}


def answer_over_http(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The same of `bertgen-tf serve`, which as many clients ask as a batch has texts."""
    from serving_process import Server

    servers: dict[int, Server] = {}
    try:
        for number, path in settings["exports"].items():
            servers[int(number)] = Server(Path(path).parent, Path(settings["folder"]))
        yield {}
        for line in sys.stdin:
            asked = json.loads(line)
            clients = asked["batch"]
            server = servers[asked["num_beams"]]
            start = time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                parts = [asked["texts"][number::clients] for number in range(clients)]
                answers = list(pool.map(functools.partial(ask_server, server), parts))
            total = time.perf_counter() - start
            texts: list[str] = [""] * len(asked["texts"])
            for number, answer in enumerate(answers):
                texts[number::clients] = [text for text, _ in answer]
            yield {
                "texts": texts,
                "seconds": [seconds for _, seconds in answers[0]] if clients == 1 else [total],
            }
    finally:
        for server in servers.values():
            server.stop()


def ask_server(server: Any, texts: list[str]) -> list[tuple[str, float]]:
    """One client's answers, one after another, and the seconds of each."""
    from load_test import Connection

    connection = Connection(server)
    answers = []
    for text in texts:
        start = time.perf_counter()
        ((answer, _),) = connection.ask([text])
        answers.append((answer, time.perf_counter() - start))
    return answers


def results_of(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "convert" in settings:
        names = ("folder", "convert", "texts", "beams", "ctranslate2")
        yield benchmark_weights.convert(*(settings[name] for name in names))
    elif settings["engine"] == "serve":
        yield from answer_over_http(settings)
    else:
        yield from answer_requests(settings)


if __name__ == "__main__":
    answer_all(json.loads(sys.argv[1]), results_of)
