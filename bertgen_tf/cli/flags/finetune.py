"""The flags of `bertgen-tf finetune`."""

import argparse
import os
from typing import Any

from bertgen_tf import metrics as scores
from bertgen_tf.cli.flags import values
from bertgen_tf.cli.flags.common import (
    add_columns,
    add_scoring,
    add_warm_start,
    check_normalizer,
    check_readable,
    read_preset_config,
)
from bertgen_tf.cli.flags.errors import UserError, flags, user_errors
from bertgen_tf.config import LONG_TARGETS, STRATEGIES
from bertgen_tf.data import data_presets, folders
from bertgen_tf.data.preset_config import find_config

COLUMNS = ("source_column", "target_column")
SCORING = ("lowercase", "tokenize", "rouge_tokenize", "normalize_with")
HUB_FLAGS = ("decoder", "recipe", "share", "cross_attention", "num_layers")
# Of `bertgen_tf.checkpoints.recipes.RECIPES`, which knows models.
RECIPES = (
    "RND2RND",
    "BERT2RND",
    "RND2BERT",
    "BERT2BERT",
    "BERTSHARE",
    "ROBERTASHARE",
    "GPT",
    "RND2GPT",
    "BERT2GPT",
    "ROBERTA2GPT",
    "ROBERTA2RND",
    "RND2ROBERTA",
    "ROBERTA2ROBERTA",
)

# What determines the weights, besides the data and the model to start from.
SETTINGS = (
    "epochs",
    "steps",
    "validate_every",
    "batch_size",
    "gradient_accumulation",
    "schedule",
    "learning_rate",
    "new_weights_learning_rate",
    "warmup_steps",
    "clip_norm",
    "label_smoothing",
    "ema",
    "freeze",
    "unfreeze_every",
    "lora_rank",
    "seed",
    "mixed_precision",
    "deterministic",
    "max_source_length",
    "max_target_length",
    "long_targets",
    "trim_vocabulary",
    "metrics_pairs",
    "monitor",
    "lowercase",
    "tokenize",
    "rouge_tokenize",
    "patience",
)


def add_command(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser(
        "finetune",
        help="train a model on pairs of texts",
        description="Trains an encoder-decoder on pairs of texts, and saves it as a preset folder.",
        epilog="""\
files of pairs, in UTF-8 or UTF-16, also packed (.gz):
  .tsv, .txt     source<TAB>target, one pair a line
  .csv           with names of its columns in the first line
  .jsonl, .json  {"source": "...", "target": "..."} a line, or an array of these

While it runs, OUTPUT.training holds what --resume continues from: after Ctrl-C (or SIGTERM) the
last step, after kill -9 the last state of --checkpoint-every. Both end with the same weights, bit
for bit, as an uninterrupted run. At the end log.jsonl, samples and tensorboard stay.

several workers: start the same command on each, with TF_CONFIG set as TensorFlow expects it and
--output in a folder that all of them see. A lost worker ends the others; started again with
--resume, they continue together.

example:
  bertgen-tf finetune --encoder path/to/bert_module --share --cross-attention self_attention \\
      --train train.tsv --validation validation.tsv --epochs 3 --output my_model""",
    )
    data = parser.add_argument_group("data")
    source = data.add_mutually_exclusive_group(required=True)
    source.add_argument("--train", metavar="FILE", help="pairs to train on")
    source.add_argument(
        "--data",
        choices=data_presets.PRESETS,
        metavar="NAME",
        help="a data set of the paper, with the paper's lengths, to train on and to validate on: "
        f"{', '.join(data_presets.PRESETS)}",
    )
    data.add_argument("--data-folder", metavar="DIR", help="where it is (default: download it)")
    data.add_argument("--reverse", action="store_true", help="swap sources and targets of --data")
    data.add_argument("--validation", metavar="FILE", help="pairs to measure on, not to train on")
    add_columns(data, "source", "target")
    data.add_argument(
        "--output", required=True, metavar="FOLDER", help="new, empty, or a preset to replace"
    )

    start = parser.add_argument_group("the model to start from")
    source = start.add_mutually_exclusive_group()
    source.add_argument(
        "--encoder",
        metavar="HANDLE",
        help="BERT: a TF Hub module (a folder or a URL) or a Hugging Face checkpoint (a folder or "
        "org/name)",
    )
    source.add_argument("--preset", metavar="FOLDER", help="continue from a fine-tuned model")
    start.add_argument(
        "--decoder", metavar="HANDLE", help="a different one for the decoder (default: --encoder's)"
    )
    start.add_argument(
        "--recipe",
        choices=RECIPES,
        metavar="NAME",
        help="which side starts from a checkpoint, by the paper's names: "
        f"{', '.join(RECIPES)}; takes --encoder, --decoder or both",
    )
    add_warm_start(start)
    parser.alternatives.append(("--encoder", "--preset", "--recipe"))
    start.add_argument(
        "--trim-vocabulary",
        action="store_true",
        help="keep only the word pieces that the texts of --train and --validation need: a smaller "
        "and faster model, which knows no other words",
    )
    _add_texts(parser)
    _add_training(parser)
    _add_watching(parser)


def _add_texts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "texts",
        "By default those of the preset, or of the paper for --data; with --encoder 128 tokens, "
        "or\nwhat the model allows if that is less.",
    )
    lengths = {"type": values.at_least(1), "metavar": "TOKENS"}
    group.add_argument("--max-source-length", **lengths, help="longer sources are cut")
    group.add_argument(
        "--max-target-length",
        **lengths,
        help="longer targets are cut; also the default length of what is generated",
    )
    group.add_argument(
        "--long-targets",
        choices=LONG_TARGETS,
        default="cut",
        help="what to do with pairs whose target is longer; cut targets teach the model to end "
        "early (default: %(default)s)",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    count, count_or_zero = ({"type": values.at_least(n), "metavar": "N"} for n in (1, 0))
    group.add_argument(
        "--epochs", **count, default=3, help="passes over the pairs (default: %(default)s)"
    )
    group.add_argument(
        "--steps", **count, help="batches, instead of --epochs; then validates once, at the end"
    )
    group.add_argument(
        "--batch-size",
        **count,
        default=32,
        help="pairs in a batch, over all devices (default: %(default)s); fewer need less memory",
    )
    group.add_argument(
        "--gradient-accumulation",
        **count,
        default=1,
        help="batches for one update of the weights; all other numbers of steps still count "
        "batches (default: %(default)s)",
    )
    group.add_argument(
        "--schedule",
        choices=("linear", "paper"),
        default="linear",
        help="of the learning rate: linear falls to 0 at the end; paper is 0.05 / sqrt(hidden "
        "size), falling with the square root of the steps, without weight decay or clipping "
        "(default: %(default)s)",
    )
    rate = {"type": values.positive_number, "metavar": "X"}
    group.add_argument(
        "--learning-rate",
        **rate,
        help="its highest value; for the paper's schedule the number above the root (default: "
        "1e-4, or 0.05)",
    )
    group.add_argument(
        "--new-weights-learning-rate",
        **rate,
        help="the same for weights from no checkpoint (default: the same value)",
    )
    group.add_argument(
        "--warmup-steps",
        **count_or_zero,
        help="steps over which the learning rate rises (default: a tenth of all, or the paper's "
        "40000)",
    )
    group.add_argument(
        "--clip-norm",
        type=values.none_or(values.positive_number),
        default=0.0,
        metavar="X|none",
        help="gradients of a greater norm are scaled down to it (default: 1, or the paper's none)",
    )
    group.add_argument(
        "--label-smoothing",
        type=values.share,
        default=0.0,
        metavar="X",
        help="share of each label that goes to all other tokens, such as 0.1 (default: 0)",
    )
    group.add_argument(
        "--ema",
        type=values.share,
        metavar="X",
        help="validate and save an exponential moving average of the weights, with this share of "
        "the old ones at each update, such as 0.999 (default: the weights themselves)",
    )
    group.add_argument(
        "--freeze",
        type=values.frozen,
        default={},
        metavar="PART,PART",
        help="what does not train: embeddings, encoder, decoder, or their lowest layers, such as "
        "embeddings,encoder:6; cross-attention always trains",
    )
    group.add_argument(
        "--unfreeze-every",
        **count,
        help="begin with all pre-trained layers frozen, and unfreeze the highest after this many "
        "updates, then the next",
    )
    group.add_argument(
        "--lora-rank",
        **count,
        help="train small matrices of this rank beside frozen ones, and new weights; the model is "
        "saved with them merged in, they alone in OUTPUT.training/adapter.safetensors",
    )
    group.add_argument(
        "--seed",
        **count_or_zero,
        default=0,
        help="of new weights, shuffling and dropout (default: %(default)s)",
    )
    group.add_argument(
        "--mixed-precision",
        action="store_true",
        help="compute in bfloat16 while training: faster on GPUs, slower on most CPUs",
    )
    group.add_argument(
        "--distribute",
        choices=STRATEGIES,
        default="auto",
        help="auto: all GPUs of this machine, and the workers of TF_CONFIG if it is set; mirrored: "
        "all devices; tpu: untested; none: one device (default: %(default)s)",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits in every run on GPUs, too, as on CPUs; slower",
    )


def _add_watching(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("while it runs")
    count = {"type": values.at_least(1), "metavar": "N"}
    again = group.add_mutually_exclusive_group()
    again.add_argument(
        "--resume",
        action="store_true",
        help="continue from OUTPUT.training, if an earlier run with the same data, start and "
        "settings left one",
    )
    again.add_argument(
        "--overwrite", action="store_true", help="discard OUTPUT.training, if it exists"
    )
    group.add_argument(
        "--checkpoint-every",
        type=values.interval,
        default=(None, 600),
        metavar="N|TIME",
        help="steps, such as 500, or a time, such as 90s or 1h: what kill -9 loses at most "
        "(default: 10m)",
    )
    group.add_argument(
        "--validate-every",
        **count,
        help="steps between validations (default: an epoch, or all --steps)",
    )
    group.add_argument(
        "--metrics",
        type=values.names,
        metavar="NAME,NAME",
        help="generate from --validation at each validation, and score the outputs: "
        f"{', '.join((*scores.METRICS, *scores.GROUPS))}",
    )
    group.add_argument(
        "--metrics-pairs",
        **count,
        default=200,
        help="for the first N pairs of --validation (default: %(default)s)",
    )
    add_scoring(group, "a preset, an export, or the folder of --output for the model itself")
    group.add_argument(
        "--monitor",
        metavar="NAME",
        help="save the weights that are best on --validation, not the last ones: by loss, accuracy "
        "or one of the metrics",
    )
    group.add_argument(
        "--patience",
        **count,
        help="end after this many validations without a better --monitor (default: never)",
    )
    group.add_argument(
        "--tensorboard",
        action="store_true",
        help="write curves and samples: tensorboard --logdir OUTPUT.training/tensorboard",
    )


def check(arguments: argparse.Namespace) -> None:
    """Finds what is wrong with the flags, at once, and fills in what follows from others.

    Raises:
        OSError, UserError: what the user can fix.
    """
    _check_flags(arguments)
    check_readable(arguments.train, arguments.validation)
    # Whether it may be replaced is known when TensorFlow is there.
    folders.check_writable(arguments.output, lambda folder: True, "a preset")


def _check_flags(arguments: argparse.Namespace) -> None:
    if not (arguments.preset or arguments.encoder or arguments.decoder):
        raise UserError("--recipe needs --encoder, --decoder or both")
    if arguments.recipe and arguments.share:
        raise UserError("--recipe specifies whether the sides share: leave --share out")
    if arguments.lora_rank and (arguments.freeze or arguments.unfreeze_every):
        raise UserError("--lora-rank freezes all that is pre-trained: leave --freeze out")
    if arguments.preset:
        given = [name for name in HUB_FLAGS if getattr(arguments, name) is not None]
        if given:
            raise UserError(f"{flags(given)} applies to --encoder only, not to --preset")
        if find_config(arguments.preset) is not None or not os.path.isdir(arguments.preset):
            read_preset_config(arguments.preset)
    names = ("metrics", "monitor", "patience", "validate_every")
    given = [name for name in names if getattr(arguments, name) is not None]
    if given and not arguments.validation and not arguments.data:
        raise UserError(f"{flags(given)} needs --validation")
    given = [name for name in COLUMNS if getattr(arguments, name) is not None]
    if given and not (arguments.train or arguments.validation):
        raise UserError(f"{flags(given)} applies to --train and --validation only")
    if arguments.data:
        preset = data_presets.find(arguments.data)
        for name in ("max_source_length", "max_target_length"):
            if getattr(arguments, name) is None:
                setattr(arguments, name, getattr(preset, name))
    elif arguments.data_folder or arguments.reverse:
        given = ["data_folder"] if arguments.data_folder else ["reverse"]
        raise UserError(f"{flags(given)} applies to --data only")
    with user_errors():
        if arguments.metrics is not None:
            arguments.metrics = scores.expand(arguments.metrics)
    if arguments.patience is not None and arguments.monitor is None:
        arguments.monitor = "loss"
    if arguments.monitor not in (None, "loss", "accuracy", *(arguments.metrics or ())):
        if arguments.monitor not in scores.METRICS:
            raise UserError(
                f"--monitor must be loss, accuracy or one of {', '.join(scores.METRICS)}, "
                f"received {arguments.monitor!r}"
            )
        arguments.metrics = (*(arguments.metrics or ()), arguments.monitor)
    given = [name for name in SCORING if getattr(arguments, name) is not None]
    if given and not arguments.metrics:
        raise UserError(f"{flags(given)} needs --metrics")
    if arguments.normalize_with and not normalizes_itself(arguments):
        with user_errors():
            check_normalizer(arguments.normalize_with)


def normalizes_itself(arguments: argparse.Namespace) -> bool:
    """Whether --normalize-with is the model to be, as it will be for `evaluate`."""
    output, folder = arguments.output, arguments.normalize_with
    return bool(folder) and os.path.realpath(folder) == os.path.realpath(output)
