"""The flags of `bertgen-tf evaluate`."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from bertgen_tf.cli.flags import values
from bertgen_tf.cli.flags.common import (
    add_columns,
    add_generation_config,
    add_preset,
    add_running,
    add_scoring,
    check_export,
    check_normalizer,
    check_preset,
    check_readable,
    scoring_options,
)
from bertgen_tf.cli.flags.errors import flags, user_errors
from bertgen_tf.config import GenerationConfig
from bertgen_tf.data import data_presets, resumable, text_files
from bertgen_tf.metrics import scores as metrics

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


def check(arguments: argparse.Namespace) -> None:
    """Finds what is wrong with the flags, at once.

    Raises:
        OSError, UserError: what the user can fix.
    """
    with user_errors(output="--output"):
        _check_flags(arguments)
        for flag in ("json", "plot"):
            _check_report(f"--{flag}", getattr(arguments, flag))
        check_normalizer(arguments.normalize_with)
    check_readable(arguments.predictions, arguments.baseline, arguments.references)
    check_export(arguments.export)
    if arguments.preset:
        check_preset(arguments)


def read_scores(arguments: argparse.Namespace) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names of the metrics, and their options: from the flags, or else from the data set."""
    names = DEFAULT_METRICS
    if arguments.data:
        names = data_presets.find(arguments.data).metrics
    return metrics.expand(arguments.metrics or names), scoring_options(arguments)


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


def _metrics(text: str) -> tuple[str, ...]:
    try:
        return metrics.expand(part for part in text.split(",") if part)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
