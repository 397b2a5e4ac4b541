"""`bertgen-tf evaluate`: scores of outputs, or of a model, against references."""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from bertgen_tf.checkpoints import presets
from bertgen_tf.cli import values
from bertgen_tf.cli.common import (
    add_columns,
    add_generation_config,
    add_preset,
    add_running,
    add_scoring,
    complain,
    flags,
    load_model,
    note,
    read_settings,
    scoring_options,
    user_errors,
)
from bertgen_tf.config import GenerationConfig
from bertgen_tf.data import data_presets, resumable, text_files
from bertgen_tf.metrics import scores as metrics
from bertgen_tf.metrics import significance
from bertgen_tf.models.encoder_decoder import EncoderDecoderModel
from bertgen_tf.serving import ray_files

_DESCRIPTION = """\
Scores what was generated, or what a model generates, against references: exact match, SARI, BLEU,
chrF and ROUGE, in percent, with bootstrap confidence intervals."""
_EPILOG = """\
files, in UTF-8 or UTF-16, also packed (.gz):
  --references   .tsv, .txt     source<TAB>reference<TAB>further references
                 .csv           with names of its columns in the first line
                 .jsonl, .json  {"source": "...", "target": "..." or ["...", ...]} a line, or an
                                array of these
  --predictions  what generate wrote: .jsonl, .json with "output", others one text a line; if
                 a text has several outputs, the first counts; .csv has a column output

examples:
  bertgen-tf evaluate --predictions outputs.txt --references test.tsv
  bertgen-tf evaluate --predictions new.txt --baseline old.txt --references test.tsv --plot new.png
  bertgen-tf evaluate --preset my_model --references test.tsv --num-beams 4 --json scores.json
  bertgen-tf evaluate --preset my_model --data wikisplit --split test"""
# The order of the table; ROUGE-Lsum only if requested.
DEFAULT_METRICS = ("exact", "sari", "bleu", "chrf", "rouge")
CONFIDENCE, SEED = 0.95, 0


@dataclasses.dataclass
class Task:
    """What is to be scored, once flags and files are checked.

    Attributes:
        metrics: names of `metrics.METRICS`.
        options: of `metrics.compute`.
        sources: [n].
        references: [n], each at least one.
        predictions: [n], or None if a model is to generate them.
        baseline: [n], or None.
    """

    metrics: tuple[str, ...]
    options: dict[str, Any]
    sources: list[str]
    references: list[list[str]]
    predictions: list[str] | None
    baseline: list[str] | None


def add_command(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser(
        "evaluate",
        help="score outputs, or a model, against references",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    outputs = parser.add_mutually_exclusive_group(required=True)
    outputs.add_argument("--predictions", metavar="FILE", help="outputs generated before")
    outputs.add_argument("--export", metavar="NAME/VERSION", help="generate with what export wrote")
    references = parser.add_mutually_exclusive_group(required=True)
    references.add_argument("--references", metavar="FILE", help="see below")
    references.add_argument(
        "--data",
        choices=data_presets.PRESETS,
        metavar="NAME",
        help=f"a data set of the paper, with its metrics: {', '.join(data_presets.PRESETS)}",
    )
    add_columns(parser, "source", "target")
    parser.add_argument("--data-folder", metavar="DIR", help="where it is (default: download it)")
    parser.add_argument(
        "--split", metavar="NAME", help="of --data: train, validation or test (default: test)"
    )
    parser.add_argument("--reverse", action="store_true", help="swap sources and targets of --data")
    parser.add_argument(
        "--baseline",
        metavar="FILE",
        help="outputs of another system for the same sources: adds the differences, their "
        "intervals, and p-values of paired bootstrap resampling",
    )
    scores = parser.add_argument_group("scores")
    scores.add_argument(
        "--metrics",
        type=_metrics,
        metavar="NAME,NAME",
        help=f"any of {', '.join((*metrics.METRICS, *metrics.GROUPS))} (default: "
        f"{','.join(DEFAULT_METRICS)}, or the paper's for --data)",
    )
    add_scoring(scores)
    scores.add_argument(
        "--resamples",
        type=values.at_least(1),
        default=1000,
        metavar="N",
        help="of the bootstrap (default: %(default)s)",
    )
    report = parser.add_argument_group("report")
    report.add_argument("--json", metavar="FILE", help="also write values, intervals and settings")
    report.add_argument("--plot", metavar="FILE.png", help="draw the scores against source length")
    generate = parser.add_argument_group("generating, with --preset or --export")
    generate.add_argument("--output", metavar="FILE", help="keep the generated texts")
    add_running(generate)
    add_preset(parser, outputs)
    # One output per text is scored.
    add_generation_config(parser, leave_out="num_return_sequences")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    config = model = None
    with user_errors(output="--output"):
        task = _prepare(arguments)
    if arguments.preset:
        config = read_settings(arguments).replace(num_return_sequences=1)
        model = load_model(arguments, config)
    _run(arguments, task, model, config)


def _prepare(arguments: argparse.Namespace) -> Task:
    """Reads the files, and finds what would fail after hours of generating.

    Raises:
        ImportError, OSError, ValueError: what the user can fix.
    """
    _check_flags(arguments)
    names = DEFAULT_METRICS
    if arguments.data:
        names = data_presets.find(arguments.data).metrics
    names, options = metrics.expand(arguments.metrics or names), scoring_options(arguments)
    metrics.compute(names, ["a"], ["a"], ["a"])  # are the packages installed?
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs the package matplotlib: pip install 'bertgen_tf[plot]'")
    for flag in ("json", "plot"):
        _check_report(f"--{flag}", getattr(arguments, flag))
    if arguments.export:
        ray_files.describe_export(arguments.export, _signature(arguments))
    sources, references, place = _read_references(arguments)
    predictions, baseline = (
        path and _read_outputs(path, place, sources)
        for path in (arguments.predictions, arguments.baseline)
    )
    task = Task(names, options, sources, references, predictions, baseline)
    folder = arguments.normalize_with
    if folder:
        task.options["normalize"] = presets.load_preprocessor(folder).normalize
    return task


def _run(
    arguments: argparse.Namespace,
    task: Task,
    model: EncoderDecoderModel | None,
    config: GenerationConfig | None,
) -> None:
    """Generates, if there are no predictions; scores; reports.

    Args:
        arguments: the command's.
        task: from `_prepare`.
        model: the one of --preset, or None.
        config: its settings, or None.
    """
    predictions = task.predictions
    if predictions is None:
        predictions = _generate(arguments, task, model, config)
    sources, references, baseline = task.sources, task.references, task.baseline
    results = metrics.compute(task.metrics, sources, predictions, references, **task.options)
    resampling = {"resamples": arguments.resamples, "confidence": CONFIDENCE, "seed": SEED}
    intervals = significance.bootstrap(results, **resampling)
    comparisons, others = {}, None
    if baseline:
        others = metrics.compute(task.metrics, sources, baseline, references, **task.options)
        comparisons = significance.paired_bootstrap(results, others, **resampling)
    print(f"{len(sources):,} examples")
    print(_table(results, intervals, comparisons))
    if arguments.plot:
        from bertgen_tf.metrics.plot import plot_by_length

        names = [_name(arguments)] + ([os.path.basename(arguments.baseline)] if baseline else [])
        with _replacing(arguments.plot) as path:
            plot_by_length([results, *([others] if others else [])], names, task.sources, path)
    if arguments.json:
        settings = {k: v for k, v in task.options.items() if k != "normalize"}
        settings |= {**resampling, "normalize_with": arguments.normalize_with}
        content = _describe(arguments, len(sources), results, intervals, comparisons)
        content |= {"settings": settings, "generation": config and config.to_dict()}
        with _replacing(arguments.json) as path, open(path, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, ensure_ascii=False)
            file.write("\n")


def _read_references(
    arguments: argparse.Namespace,
) -> tuple[list[str], list[list[str]], str]:
    """Sources, their references, and what messages call the two."""
    if arguments.references:
        sources, references = text_files.read_references(
            arguments.references,
            source_column=arguments.source_column,
            target_column=arguments.target_column,
            complain=note,
        )
        return sources, references, arguments.references
    split = arguments.split or "test"
    pairs = data_presets.read(
        arguments.data,
        split,
        arguments.data_folder,
        reverse=arguments.reverse,
        verbose=int(sys.stderr.isatty()),
    )
    sources, references = [], []
    for source, target in pairs:
        sources.append(source)
        references.append([target])
    place = f"the split {split} of {arguments.data}"
    if not sources:
        raise ValueError(f"{place} should hold pairs of texts, but is empty")
    return sources, references, place


def _check_flags(arguments: argparse.Namespace) -> None:
    given = []
    if not arguments.preset:
        fields = [field.name for field in dataclasses.fields(GenerationConfig)]
        given = [name for name in fields if hasattr(arguments, name)]
        given += ["quantize"] if arguments.quantize else []
        needs = "--preset"
    if arguments.predictions and not given:
        given = [name for name in ("output", "no_xla") if getattr(arguments, name)]
        needs = "--preset and --export"
    if arguments.references and not given:
        given = [n for n in ("data_folder", "split", "reverse") if getattr(arguments, n)]
        needs = "--data"
    if arguments.data and not given:
        given = [n for n in ("source_column", "target_column") if getattr(arguments, n)]
        needs = "--references"
    if given:
        raise ValueError(f"{flags(given)} applies to {needs} only")
    if arguments.output:
        if arguments.output == "-":
            raise ValueError("--output must be a file: standard output is for the scores")
        text_files.check_output(arguments.output)
        resumable.check_path(arguments.output, overwrite=False, resume=False)


def _check_report(flag: str, path: str | None) -> None:
    """Raises a ValueError if no file could be written there."""
    if path is None:
        return
    resumable.check_file(flag, path)
    if flag == "--plot" and Path(path).suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--plot must end in .png, .pdf or .svg, received {path}")


def _read_outputs(path: str, references: str, sources: Sequence[str]) -> list[str]:
    """The outputs in a file, which must be those for the sources."""
    outputs, own_sources = text_files.read_outputs(path, note)
    while len(outputs) > len(sources) and not outputs[-1].strip():
        outputs.pop()
    if len(outputs) != len(sources):
        raise ValueError(
            f"{path} has {len(outputs):,} outputs, but {references} has {len(sources):,} examples"
        )
    for number, (own, source) in enumerate(zip(own_sources, sources, strict=False), 1):
        if own is not None and own != source:
            raise ValueError(
                f"{path}, line {number}: the source is not that of line {number} of {references}"
            )
    return outputs


def _generate(
    arguments: argparse.Namespace,
    task: Task,
    model: EncoderDecoderModel | None,
    config: GenerationConfig | None,
) -> list[str]:
    """What the model, or the export, makes of the sources; also written to a file if requested."""
    if model is None:
        outputs = iter(_run_export(arguments, task.sources))
    else:
        outputs = model.iterate(
            task.sources,
            config,
            batch_size=arguments.batch_size,
            total=len(task.sources),
            verbose=int(sys.stderr.isatty()),
            jit_compile=not arguments.no_xla,
        )
    if not arguments.output:
        return list(outputs)
    predictions = []
    with resumable.open_output(arguments.output, None, resumable.Begun(), complain) as file:
        for source, output in zip(task.sources, outputs, strict=True):
            file.write(text_files.output_line(arguments.output, source, output))
            predictions.append(output)
    return predictions


def _run_export(arguments: argparse.Namespace, sources: list[str]) -> list[str]:
    loaded = tf.saved_model.load(arguments.export)  # the signatures read its variables
    answer = loaded.signatures[_signature(arguments)]
    # Similar lengths together: less padding.
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    outputs = [""] * len(sources)
    for start in range(0, len(sources), arguments.batch_size):
        numbers = order[start : start + arguments.batch_size]
        texts = answer(text=tf.constant([sources[i] for i in numbers]))["text"].numpy()
        for i, text in zip(numbers, texts.tolist(), strict=True):
            outputs[i] = text.decode()
    return outputs


def _signature(arguments: argparse.Namespace) -> str:
    return "serving_default" if arguments.no_xla else "generate_xla"


def _table(
    results: dict[str, metrics.MetricResult],
    intervals: dict[str, significance.Interval],
    comparisons: dict[str, significance.Comparison],
) -> str:
    percent = f"{CONFIDENCE:.0%} interval"
    rows = [["metric", "value", percent]]
    if comparisons:
        rows[0] += ["baseline", "difference", percent, "p"]
    for name, result in results.items():
        row = [name, f"{result.value:.2f}", _span(intervals[name])]
        if comparisons:
            found = comparisons[name]
            row += [
                f"{found.baseline:.2f}",
                f"{found.difference:+.2f}",
                _span(found.interval, "+"),
                f"{found.p_value:.3f}",
            ]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _span(interval: significance.Interval, sign: str = "") -> str:
    return f"{interval.low:{sign}.2f} to {interval.high:{sign}.2f}"


def _describe(
    arguments: argparse.Namespace,
    count: int,
    results: dict[str, metrics.MetricResult],
    intervals: dict[str, significance.Interval],
    comparisons: dict[str, significance.Comparison],
) -> dict[str, Any]:
    scores = {}
    for name, result in results.items():
        scores[name] = {
            "value": result.value,
            "interval": dataclasses.asdict(intervals[name]),
            "details": result.details,
            "signature": result.signature,
        }
        if name in comparisons:
            scores[name]["baseline"] = dataclasses.asdict(comparisons[name])
    files = ("predictions", "preset", "export", "references", "data", "split", "baseline")
    versions = {}
    for package in ("bertgen_tf", "tensorflow", "keras", "sacrebleu", "rouge-score"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "examples": count,
        "metrics": scores,
        "files": {name: getattr(arguments, name) for name in files if getattr(arguments, name)},
        "versions": versions,
    }


def _name(arguments: argparse.Namespace) -> str:
    """What the plot calls the system."""
    path = arguments.predictions or arguments.preset or arguments.export
    return os.path.basename(os.path.normpath(path))


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[str]:
    """Yields a file to write beside `path`, which replaces it when it is complete."""
    with tempfile.TemporaryDirectory(prefix=".", dir=os.path.dirname(path) or ".") as folder:
        new = os.path.join(folder, os.path.basename(path))
        yield new
        os.replace(new, path)


def _metrics(text: str) -> tuple[str, ...]:
    try:
        return metrics.expand(part for part in text.split(",") if part)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
