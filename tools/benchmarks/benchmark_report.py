"""The tables that `benchmark.py` prints."""

from collections.abc import Iterable, Iterator
from typing import Any

from benchmark_engines import ENGINES, OURS

NEW_TOKENS = 32
# What the tokens after these take is the time of the loop alone, without the encoder.
FEW_TOKENS = 2


def reference(engine: str, engines: Iterable[str]) -> str:
    """The engine of ours by whose time an engine's time is divided."""
    engines = list(engines)
    wanted = ("int8", "xla") if engine == "ctranslate2-int8" else ("xla",)
    return next((name for name in wanted if name in engines), engines[0])


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def times_table(results: list[dict[str, Any]], engines: list[str]) -> str:
    rows = []
    for result, case, timed in long_cases(results):
        cells = []
        for engine in engines:
            if engine not in timed:
                cells.append("-")
                continue
            seconds = timed[engine]["median"]
            base = reference(engine, timed)
            ratio = f" ({seconds / timed[base]['median']:.2f})" if base != engine else ""
            cells.append(f"{seconds:.3f}{ratio}")
        rows.append([*case_cells(result, case), *cells])
    return table(["size", "batch", "beams", *engines], rows)


def compile_table(results: list[dict[str, Any]], engines: list[str]) -> str:
    rows = [
        case_cells(result, case)
        + [
            f"{timed[e]['first_seconds'] - timed[e]['median']:.1f}" if e in timed else "-"
            for e in engines
        ]
        for result, case, timed in long_cases(results)
    ]
    return table(["size", "batch", "beams", *engines], rows)


def equal_table(results: list[dict[str, Any]], engines: list[str]) -> str:
    rows = [
        case_cells(result, case)
        + [f"{timed[e]['equal_tokens']:.1%}" if e in timed else "-" for e in engines]
        for result, case, timed in long_cases(results)
    ]
    return table(["size", "batch", "beams", *engines], rows)


def tuned_parts(tuned: list[dict[str, Any]], facts: dict[str, str]) -> list[str]:
    """The seconds of each setting of CTranslate2, and what it says about those that were best.

    Args:
        tuned: `dict(engine, case, seconds)`, the last by setting.
        facts: texts by engine.
    """
    names = list(dict.fromkeys(name for one in tuned for name in one["seconds"]))
    rows = []
    for one in tuned:
        times = [one["seconds"].get(name) for name in names]
        best = min(one["seconds"].values())
        cells = ["-" if x is None else f"**{x:.3f}**" if x == best else f"{x:.3f}" for x in times]
        rows.append([one["engine"], one["case"], *cells])
    return [
        "Seconds, medians of 3 runs, of the settings of CTranslate2, of which the best took part "
        "above:",
        table(["engine", "case", *names], rows),
        "\n".join(f"- {name}: {text}" for name, text in facts.items()),
    ]


def memory_table(results: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        weights = result["weight_bytes"]
        for engine, memory in result["engines"].items():
            timed = [case["engines"][engine] for case in result["cases"]]
            before = [value for one in timed for value in one["before"]]
            peaks = [value for one in timed for value in one["peaks"]]
            if None in (*before, *peaks, memory["imported"], memory["loaded"]):
                continue  # not Linux
            above = [value - memory["imported"] for value in (memory["loaded"], max(before))]
            above.append(max(peaks) - memory["imported"])
            above.append(max(b - a for a, b in zip(before, peaks, strict=True)))
            rows.append(
                [result["size"], engine]
                + [f"{value / 1e6:.0f}" for value in (weights, memory["imported"])]
                + [f"{value / 1e6:.0f} ({value / weights:.2f})" for value in above]
            )
    header = ["weights", "libraries", "loaded", "between runs", "peak", "of a run"]
    return table(["size", "engine", *header], rows)


def bandwidth_table(results: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        timed = {case["new_tokens"]: case["engines"] for case in result["cases"] if greedy(case)}
        for engine in result["engines"] if len(timed) == 2 else ():
            # In int8, everything that is read counts one byte.
            size = result["weights_per_token"] * (1 if engine.endswith("int8") else 4)
            tokens = NEW_TOKENS - FEW_TOKENS
            seconds = timed[NEW_TOKENS][engine]["median"] - timed[FEW_TOKENS][engine]["median"]
            if seconds <= 0:
                continue  # too much else was going on
            rate = size * tokens / seconds
            rows.append(
                [result["size"], engine, f"{size / 1e6:.0f}", f"{1000 * seconds / tokens:.2f}"]
                + [f"{rate / 1e9:.1f}", f"{result['bandwidth'] / 1e9:.1f}"]
                + [f"{rate / result['bandwidth']:.0%}"]
            )
    header = ["size", "engine", "MB a token", "ms a token", "GB/s", "GB/s of the memory", "share"]
    return table(header, rows)


def greedy(case: dict[str, Any]) -> bool:
    return (case["batch"], case["beams"]) == (1, 1)


def long_cases(results: list[dict[str, Any]]) -> Iterator[tuple[dict, dict, dict]]:
    for result in results:
        for case in result["cases"]:
            if case["new_tokens"] == NEW_TOKENS:
                yield result, case, case["engines"]


def case_cells(result: dict[str, Any], case: dict[str, Any]) -> list[str]:
    return [result["size"], str(case["batch"]), str(case["beams"])]


def report(results: list[dict[str, Any]], repeat: int) -> str:
    """What is printed, in Markdown."""
    engines = [e for e in ENGINES if any(e in result["engines"] for result in results)]
    compiled = [engine for engine in engines if engine in OURS]
    rounded = [engine for engine in engines if engine.endswith("int8")]
    base = reference("", engines)
    parts = [
        f"Seconds, medians of {repeat} runs, and in brackets how many times those of {base}"
        + (
            " (of int8 for ctranslate2-int8)"
            if {"int8", "ctranslate2-int8"} <= set(engines)
            else ""
        )
        + f"; {NEW_TOKENS} new tokens:",
        times_table(results, engines),
    ]
    if compiled:
        parts += [
            "Seconds of tracing and compiling: the first run minus a later one:",
            compile_table(results, compiled),
        ]
    parts += [
        "Memory in MB: float32 weights, counted once if shared; the process with its libraries; "
        "and on top of that with the model loaded, later between runs (with everything that was "
        "compiled), and at the peak of a run that does not compile; and how much a run takes by "
        "itself. In brackets how many times the weights:",
        memory_table(results),
    ]
    if any(case["new_tokens"] == FEW_TOKENS for result in results for case in result["cases"]):
        parts += [
            "Share of the memory's bandwidth at batch 1, greedy: weights of the decoder that a "
            "token reads, over the time it takes:",
            bandwidth_table(results),
        ]
    if rounded:
        parts += [
            f"Share of the tokens that are those of {base}, with random weights, which say "
            "nothing about quality:",
            equal_table(results, rounded),
        ]
    tuned = [one for result in results for one in result.get("tuned", ())]
    if tuned:
        facts = {name: text for result in results for name, text in result["facts"].items()}
        parts += tuned_parts(tuned, facts)
    differences = [text for result in results for text in result["differences"]]
    parts.append(
        "\n".join(["The float32 engines DIFFER:", "", *(f"- {text}" for text in differences)])
        if differences
        else "All float32 engines returned the same ids."
    )
    return "\n\n".join(parts)
