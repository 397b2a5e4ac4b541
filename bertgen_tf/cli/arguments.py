"""The arguments of the command line, and their help."""

import argparse
import dataclasses
from typing import Any, NoReturn

from bertgen_tf import __version__
from bertgen_tf.cli import evaluate, serve, values
from bertgen_tf.cli.common import PROGRAM
from bertgen_tf.cli.finetune_arguments import add_finetune
from bertgen_tf.config import BEAM_SCORERS, QUANTIZATIONS, GenerationConfig
from bertgen_tf.generation.generator import BATCH_SIZE


class _Parser(argparse.ArgumentParser):
    """One-line errors, no abbreviated options, descriptions as they are written."""

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: error: {message} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser; `command` of what it parses is the name of a command, such as finetune."""
    parser = _Parser(
        prog=PROGRAM,
        description="Sequence-to-sequence models warm-started from BERT: fine-tune one on pairs of "
        "texts,\ngenerate text with it, score it, export it for TensorFlow Serving, convert it.",
        epilog=f"`{PROGRAM} COMMAND --help` explains a command and shows an example.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_finetune(commands, _add_warm_start)
    _add_generate(commands)
    _add_evaluate(commands)
    _add_export(commands)
    _add_convert(commands)
    _add_serve(commands)
    return parser


def _add_warm_start(group: Any) -> None:
    """How an encoder becomes an encoder-decoder."""
    group.add_argument(
        "--share",
        action="store_true",
        default=None,
        help="one set of weights for encoder and decoder (the paper's BERTSHARE), which makes a "
        "smaller model (default: only the word embeddings are shared)",
    )
    group.add_argument(
        "--cross-attention",
        choices=("random", "self_attention"),
        help="how the weights that BERT does not have begin: random, or a copy of each layer's "
        "self-attention, which learns to copy from the source much sooner (default: random)",
    )
    group.add_argument(
        "--num-layers",
        type=values.layers,
        metavar="N",
        help="keep the first N, or those of a list counted from 0, such as 0,2,4 (default: all)",
    )


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="generate a text for each line of a file",
        description="Generates a text for each line of the input, in its order.",
        epilog="""\
files, in UTF-8:
  .jsonl, .json  in: {"source": "..."} a line, out: {"source": "...", "output": "..."}, where
                 "output" is a list if --num-return-sequences is above 1
  .tsv           in: the first column of each line
  others         in: one text a line; out: one text a line, tabs between several

Outputs are written, and --resume goes on, by the thousand: killed before, it begins with them anew.

With --engine ray, --input is a pattern of many files and --output a folder: NAME.* becomes
NAME.jsonl, where each line is the object of the input line, or {"source": "..."}, with "output".

examples:
  bertgen-tf generate --preset my_model --input sources.txt --output outputs.txt --num-beams 4
  bertgen-tf generate --engine ray --export saved_models/my_model/1 --input 'lines/*.jsonl' \\
      --output out/""",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    _add_preset(parser, model)
    model.add_argument(
        "--export",
        metavar="NAME/VERSION",
        help="what export wrote, settings of generation included; with --engine ray",
    )
    parser.add_argument(
        "--input", default="-", metavar="FILE", help="texts (default: -, standard input)"
    )
    parser.add_argument(
        "--output",
        default="-",
        metavar="FILE",
        help="a new file, called FILE.partial until it is complete (default: -, standard output)",
    )
    _add_engine(parser)
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--overwrite", action="store_true", help="replace --output, or FILE.partial, if it exists"
    )
    again.add_argument(
        "--resume",
        action="store_true",
        help="go on with FILE.partial, which an earlier run with the same --input, --preset and "
        "settings left, if there is one; a complete --output is left as it is",
    )
    parser.add_argument(
        "--batch-size",
        type=values.at_least(1),
        default=BATCH_SIZE,
        metavar="N",
        help="texts that are generated together (default: %(default)s); fewer need less memory",
    )
    parser.add_argument(
        "--no-xla", action="store_true", help="without XLA: starts sooner, then is slower"
    )
    _add_generation_config(parser)


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="score outputs, or a model, against references",
        description=evaluate.DESCRIPTION,
        epilog=evaluate.EPILOG,
    )
    outputs = parser.add_mutually_exclusive_group(required=True)
    evaluate.add_arguments(parser, outputs)
    _add_preset(parser, outputs)
    # One output of each text is scored.
    _add_generation_config(parser, leave_out="num_return_sequences")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    """What `cli_batch` reads."""
    group = parser.add_argument_group("many files, on many cores or machines")
    group.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="local: one file in this process; ray: files on Ray, here or on a cluster (default: "
        "%(default)s)",
    )
    count = {"type": values.at_least(1), "metavar": "N"}
    group.add_argument(
        "--workers",
        **count,
        help="processes, each with its own copy of the model (default: all cores are used)",
    )
    group.add_argument("--cpus-per-worker", **count, help="cores and threads of each (default: 1)")
    group.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="a Ray cluster, on all of whose machines --export is at the same path (default: "
        "RAY_ADDRESS, or else this machine)",
    )
    group.add_argument(
        "--signature",
        metavar="NAME",
        help="of --export (default: generate_xla, with --no-xla serving_default)",
    )


def _add_export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="export a model for TensorFlow Serving",
        description="Writes a preset as a SavedModel, text in and text out, that TensorFlow Serving"
        " runs.\nThe settings of generation are baked in.",
        epilog="""\
example:
  bertgen-tf export --preset my_model --output saved_models/my_model/1 --num-beams 4""",
    )
    _add_preset(parser)
    parser.add_argument(
        "--output",
        required=True,
        metavar="NAME/VERSION",
        help="a new folder, called by an integer, such as saved_models/my_model/1",
    )
    parser.add_argument(
        "--max-batch-size",
        type=values.power_of_two,
        default=32,
        metavar="N",
        help="the most texts that a server with batching runs together, a power of two (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--warmup-xla",
        action="store_true",
        help="let the server compile generate_xla for every batch size and length before it "
        "serves; a server without XLA does not load such an export",
    )
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not run the export in a process of its own to see that it answers as the model",
    )
    # Each signature gives one hypothesis, or all.
    _add_generation_config(parser, leave_out="num_return_sequences")


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="convert TF Hub modules, HuggingFace checkpoints and presets",
        description="Writes a TF Hub module or a HuggingFace checkpoint as a preset, or a preset as"
        " a HuggingFace\nfolder. Shows what was read, and runs both sides to see that they agree.",
        epilog="""\
sources:
  a TF Hub module  a folder, a .tar.gz or a URL: an original (google/bertseq2seq/*), or a BERT
                   encoder, which becomes the start of an encoder-decoder
  HuggingFace      a folder, or a name such as org/name: a BertGeneration encoder-decoder, or a
                   BertGeneration, BERT or RoBERTa encoder
  a preset         what this command or finetune saved; becomes a HuggingFace folder

examples:
  bertgen-tf convert path/to/bertseq2seq_module my_model
  bertgen-tf convert my_model my_huggingface_model""",
    )
    parser.add_argument("source", metavar="SOURCE", help="what to read")
    parser.add_argument(
        "target", metavar="TARGET", help="folder to write: new, empty, or of the same kind"
    )
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="convert without running anything"
    )
    parser.add_argument(
        "--original",
        metavar="NAME",
        help="which of the originals a module is, such as roberta24_bbc, if it does not tell all "
        "that is needed",
    )
    _add_warm_start(parser.add_argument_group("a BERT encoder as the start of both sides"))


def _add_serve(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="serve exports on this machine",
        description=serve.DESCRIPTION,
        epilog=serve.EPILOG,
    )
    serve.add_serve_arguments(parser, values.at_least(1), values.positive_number)


def _add_preset(parser: argparse.ArgumentParser, instead: Any = None) -> None:
    """The model; `instead` is a required group of what may be given in its place."""
    (instead or parser).add_argument(
        "--preset", required=instead is None, metavar="FOLDER", help="a model that finetune saved"
    )
    parser.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        help="make the matrices of a float32 preset int8: a quarter of their memory; faster with "
        "XLA, slower without",
    )


def _add_generation_config(parser: argparse.ArgumentParser, leave_out: str = "") -> None:
    """A flag for each field of `GenerationConfig`; those not given keep the preset's value."""
    group = parser.add_argument_group(
        "generation",
        "A setting that is left out is that of the preset, as finetune saved it; those that can be "
        "none\ntake none as a value.",
    )
    for field in dataclasses.fields(GenerationConfig):
        if field.name == leave_out:
            continue
        text = _GENERATION_HELPS[field.name]
        default = "none" if field.default in ((), None) else str(field.default).lower()
        default = _GENERATION_DEFAULTS.get(field.name, default)
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            # None is a value of some.
            default=argparse.SUPPRESS,
            help=f"{text} (default: {default})",
            **(_GENERATION_KINDS.get(field.name) or _GENERATION_KINDS[field.type]),
        )


_TOKEN_IDS = {"type": values.ids, "metavar": "ID,ID"}
_END_IDS = {"type": values.none_or(values.one_or_more_ids), "metavar": "ID,ID|none"}
# By the name or the type of a field.
_GENERATION_KINDS: dict[Any, dict[str, Any]] = {
    int: {"type": int, "metavar": "N"},
    int | None: {"type": values.none_or(values.integer), "metavar": "N|none"},
    float: {"type": values.number, "metavar": "X"},
    bool: {"type": values.boolean, "metavar": "true|false"},
    "beam_scorer": {"choices": BEAM_SCORERS},
    "early_stopping": {"type": values.early_stopping, "metavar": "true|false|never"},
    "bad_words_ids": {"type": values.id_sequences, "metavar": "ID,ID;ID"},
    "sequence_bias": {"type": values.biases, "metavar": "ID,ID:X;ID:X"},
    "suppress_tokens": _TOKEN_IDS,
    "begin_suppress_tokens": _TOKEN_IDS,
    "forced_eos_token_id": _END_IDS,
    "exponential_decay_length_penalty": {
        "type": values.none_or(values.start_and_factor),
        "metavar": "N,X|none",
    },
    "eos_token_id": _END_IDS,
}
_GENERATION_DEFAULTS = {
    "max_new_tokens": "finetune's --max-target-length",
    "eos_token_id": "none, the model's own",
}
_GENERATION_HELPS = {
    "max_new_tokens": "the most tokens to generate, the end token included",
    "max_length": "the same with the start token; instead of --max-new-tokens",
    "min_new_tokens": "no end before so many tokens",
    "min_length": "the same with the start token; both may be given",
    "num_beams": "width of the beam search; 1 is greedy search, or sampling with --do-sample",
    "num_return_sequences": "outputs of each text, best first; at most --num-beams, or any number "
    "with --do-sample and --num-beams 1",
    "do_sample": "whether tokens are drawn by their probabilities",
    "temperature": "of sampling: above 1 more varied, below 1 less",
    "top_k": "draw from so many of the likeliest tokens; 0 for all",
    "top_p": "draw from the fewest of the likeliest tokens whose probabilities reach it",
    "min_p": "draw from tokens that have at least this share of the highest probability",
    "typical_p": "draw from the most typical tokens whose probabilities reach it",
    "seed": "of sampling: the same outputs in every run; none for others in each",
    "beam_scorer": "how beam search compares lengths and stops: as HuggingFace does, or as "
    "Google's NMT, which the TF Hub originals use",
    "length_penalty": "exponent of the length by which huggingface divides scores: higher "
    "makes longer texts",
    "early_stopping": "when huggingface's beam search ends: with the first --num-beams "
    "complete texts (true), when better ones are unlikely (false) or impossible (never)",
    "gnmt_alpha": "the same exponent for gnmt",
    "normalize_unfinished": "whether gnmt divides the score of a text that did not end, too",
    "repetition_penalty": "above 1, tokens that came already become less likely",
    "encoder_repetition_penalty": "above 1, tokens of the source become more likely",
    "no_repeat_ngram_size": "no sequence of so many tokens twice; 0 for no such rule",
    "encoder_no_repeat_ngram_size": "no sequence of so many tokens that the source has; 0 for no "
    "such rule",
    "bad_words_ids": "sequences of token ids that are never generated, such as 5,6;7",
    "sequence_bias": "what is added to the scores of sequences of token ids, such as 5,6:-2.5;7:1",
    "suppress_tokens": "ids of tokens that are never generated, such as 5,17",
    "begin_suppress_tokens": "ids of tokens that are not generated first",
    "forced_bos_token_id": "id of the token to begin with",
    "forced_eos_token_id": "id of the token, or tokens, to end with at the greatest length",
    "exponential_decay_length_penalty": "after N tokens the end becomes likelier by the factor X "
    "with each further one, such as 20,1.1",
    "eos_token_id": "id of the token that ends a text, or ids of several",
}
