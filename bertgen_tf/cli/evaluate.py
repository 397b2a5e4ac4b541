"""`bertgen-tf evaluate`: scores of outputs, or of a model, against references."""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from bertgen_tf.checkpoints import presets
from bertgen_tf.cli.common import load_model, read_settings
from bertgen_tf.cli.flags.errors import complain, note, user_errors
from bertgen_tf.cli.flags.evaluate import read_scores
from bertgen_tf.config import GenerationConfig
from bertgen_tf.data import data_presets, folders, resumable, text_files
from bertgen_tf.metrics import scores as metrics
from bertgen_tf.metrics import significance
from bertgen_tf.models.encoder_decoder import EncoderDecoderModel
from bertgen_tf.serving import ray_files

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
    names, options = read_scores(arguments)
    metrics.compute(names, ["a"], ["a"], ["a"])  # are the packages installed?
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs the package matplotlib: pip install 'bertgen_tf[plot]'")
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
        with folders.whole_file(arguments.plot) as path:
            plot_by_length([results, *([others] if others else [])], names, task.sources, path)
    if arguments.json:
        settings = {k: v for k, v in task.options.items() if k != "normalize"}
        settings |= {**resampling, "normalize_with": arguments.normalize_with}
        content = _describe(arguments, len(sources), results, intervals, comparisons)
        content |= {"settings": settings, "generation": config and config.to_dict()}
        with folders.whole_file(arguments.json) as path, open(path, "w", encoding="utf-8") as file:
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
                f"{path}: the source of example {number} is not that of example {number} of "
                f"{references}"
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
