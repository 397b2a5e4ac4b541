"""The flags of a model and its settings, which several commands have."""

import argparse
import dataclasses
import os
import stat
from typing import Any, NoReturn

from bertgen_tf import metrics
from bertgen_tf.cli.flags import values
from bertgen_tf.cli.flags.errors import UserError, user_errors
from bertgen_tf.config import BATCH_SIZE, BEAM_SCORERS, QUANTIZATIONS, GenerationConfig
from bertgen_tf.data import data_presets, folders
from bertgen_tf.data.preset_config import find_config


def check_readable(*paths: str | None) -> None:
    """Raises an OSError if one of the files, or `None`s, cannot be read; `-` is no file."""
    for path in paths:
        # What a pipe holds can be read once only.
        if path not in (None, "-") and not stat.S_ISFIFO(os.stat(path).st_mode):
            open(path, "rb").close()


def check_export(folder: str | None) -> None:
    """Raises a UserError if there is no export in the folder, or `None`."""
    if folder is not None and not os.path.isfile(path := os.path.join(folder, "saved_model.pb")):
        raise UserError(
            f"--export must be the folder of a SavedModel, NAME/VERSION, but there is no {path}"
        )


def check_normalizer(folder: str | None) -> None:
    """Raises a UserError if a preset, if the folder is one, has no tokenizer."""
    config = {} if folder is None else find_config(folder)
    if folder and config is None and not os.path.isdir(folder):
        _refuse_preset(folder)
    if folder and config is not None and not config.get("tokenizer"):
        raise UserError(f"{folder} has no tokenizer: name a preset that reads and writes text.")


def check_preset(arguments: argparse.Namespace) -> None:
    """Raises a UserError if --preset has no tokenizer, or settings that do not fit the flags.

    What a folder is that is no preset is known when TensorFlow is there.
    """
    if find_config(arguments.preset) is not None or not os.path.isdir(arguments.preset):
        read_settings(arguments)


def _refuse_preset(folder: str) -> NoReturn:
    folders.check_replaced(folder)
    raise UserError(f"{folder} should be a preset that save_to_preset wrote, but is not one")


def read_preset_config(folder: str) -> dict[str, Any]:
    """The config of a preset that reads and writes text."""
    config = find_config(folder)
    if config is None:
        _refuse_preset(folder)
    if not config.get("tokenizer"):
        raise UserError(f"{folder} has no tokenizer, so it cannot read or write text")
    return config


def read_settings(arguments: argparse.Namespace) -> GenerationConfig:
    """The settings of the preset, replaced by those of the flags where given."""
    saved = read_preset_config(arguments.preset).get("generation_config")
    try:
        config = GenerationConfig.from_dict(saved)
    except (TypeError, ValueError) as error:
        raise UserError(f"{arguments.preset} has a damaged generation_config: {error}") from error
    names = [field.name for field in dataclasses.fields(config)]
    with user_errors():
        # Flags that are not given have no attribute: None is a value.
        return config.override(**{k: getattr(arguments, k) for k in names if hasattr(arguments, k)})


def add_columns(group: Any, *names: str) -> None:
    """Which columns of a file have the texts.

    Args:
        group: of the parser.
        *names: "source", "target" or both, the default names.
    """
    for name in names:
        group.add_argument(
            f"--{name}-column",
            metavar="NAME",
            help=f"where the {name}s are: a column of .csv, a column of .tsv that has its name in "
            f"the first line, or a field of JSON (default: {name})",
        )


def add_scoring(group: Any, normalizers: str = "a preset or an export") -> None:
    """How texts are compared; None, where a flag is not given, for the values of --data.

    Args:
        group: of the parser.
        normalizers: what --normalize-with takes.
    """
    group.add_argument(
        "--lowercase",
        action="store_true",
        default=None,
        help="ignore case (ROUGE always ignores it)",
    )
    group.add_argument(
        "--tokenize",
        choices=metrics.TOKENIZERS,
        help="tokenization for BLEU and SARI, by sacrebleu's name; none for texts with spaces "
        "between all tokens, such as WikiSplit's; zh, or char, for those without spaces between "
        "words (default: 13a, or the paper's for --data)",
    )
    group.add_argument(
        "--rouge-tokenize",
        choices=metrics.ROUGE_TOKENIZERS,
        help="tokenization for ROUGE: words of all scripts, or rouge-score's, which deletes all "
        "but a to z and digits (default: unicode, or rouge-score for --data)",
    )
    group.add_argument(
        "--normalize-with",
        metavar="FOLDER",
        help=f"{normalizers}: compare all texts as its tokenizer decodes them, if it ignores case "
        "or spacing",
    )


def scoring_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of `metrics.compute`, but for `normalize`: from the flags, or else from --data."""
    lowercase, tokenize, rouge_tokenize = False, "13a", "unicode"
    if arguments.data:
        preset = data_presets.find(arguments.data)
        lowercase, tokenize = preset.lowercase_metrics, preset.tokenize
        rouge_tokenize = "rouge-score"  # as the paper's figures
    return {
        "lowercase": arguments.lowercase or lowercase,
        "tokenize": arguments.tokenize or tokenize,
        "rouge_tokenize": arguments.rouge_tokenize or rouge_tokenize,
    }


def add_warm_start(group: Any) -> None:
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
        help="how the weights that BERT lacks begin: random, or as a copy of each layer's "
        "self-attention, which learns to copy from the source much sooner (default: random)",
    )
    group.add_argument(
        "--num-layers",
        type=values.layers,
        metavar="N",
        help="keep the first N, or those of a list counted from 0, such as 0,2,4 (default: all)",
    )


def add_preset(parser: argparse.ArgumentParser, instead: Any = None) -> None:
    """The model; `instead` is a required group of what may be given in its place."""
    (instead or parser).add_argument(
        "--preset", required=instead is None, metavar="FOLDER", help="a model that finetune saved"
    )
    parser.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        help="make the matrices of a float32 preset int8: a quarter of the memory; faster with "
        "XLA, slower without",
    )


def add_running(group: Any) -> None:
    """How a model, or an export, runs on many texts."""
    group.add_argument(
        "--batch-size",
        type=values.at_least(1),
        default=BATCH_SIZE,
        metavar="N",
        help="texts generated together (default: %(default)s); fewer need less memory",
    )
    group.add_argument(
        "--no-xla", action="store_true", help="without XLA: starts sooner, runs slower"
    )


def add_generation_config(parser: argparse.ArgumentParser, leave_out: str = "") -> None:
    """A flag for each field of `GenerationConfig`; those not given keep the preset's value."""
    group = parser.add_argument_group(
        "generation",
        "Settings left out are those of the preset, as finetune saved it; those that can be none\n"
        "take none as a value.",
    )
    for field in dataclasses.fields(GenerationConfig):
        if field.name == leave_out:
            continue
        text = _GENERATION_HELPS[field.name]
        default = "none" if field.default in ((), None) else str(field.default).lower()
        default = _GENERATION_DEFAULTS.get(field.name, default)
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            # None is a valid value for some.
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
    "min_new_tokens": "do not end before this many tokens",
    "min_length": "the same with the start token; both may be given",
    "num_beams": "width of the beam search; 1 is greedy search, or sampling with --do-sample",
    "num_return_sequences": "outputs for each text, best first; at most --num-beams, or any number "
    "with --do-sample and --num-beams 1",
    "do_sample": "sample tokens by their probabilities",
    "temperature": "of sampling: above 1 more varied, below 1 less",
    "top_k": "sample from this many of the most likely tokens; 0 for all",
    "top_p": "sample from the fewest most likely tokens whose probabilities add up to it",
    "min_p": "sample from tokens that have at least this share of the highest probability",
    "typical_p": "sample from the most typical tokens whose probabilities add up to it",
    "seed": "of sampling: the same outputs in every run; none for different ones",
    "beam_scorer": "how beam search compares lengths and stops: as Hugging Face does, or as "
    "Google's NMT, which the TF Hub originals use",
    "length_penalty": "exponent of the length by which huggingface divides scores: higher "
    "makes longer texts",
    "early_stopping": "when huggingface's beam search ends: with the first --num-beams "
    "complete texts (true), when better ones are unlikely (false) or impossible (never)",
    "gnmt_alpha": "the same exponent for gnmt",
    "normalize_unfinished": "whether gnmt divides the score of a text that did not end, too",
    "repetition_penalty": "above 1, tokens that have occurred become less likely",
    "encoder_repetition_penalty": "above 1, tokens of the source become more likely",
    "no_repeat_ngram_size": "no sequence of this many tokens twice; 0 for no such rule",
    "encoder_no_repeat_ngram_size": "no sequence of this many tokens from the source; 0 for no "
    "such rule",
    "bad_words_ids": "sequences of token ids that are never generated, such as 5,6;7",
    "sequence_bias": "what is added to the scores of sequences of token ids, such as 5,6:-2.5;7:1",
    "suppress_tokens": "ids of tokens that are never generated, such as 5,17",
    "begin_suppress_tokens": "ids of tokens that are not generated first",
    "forced_bos_token_id": "id of the token to begin with",
    "forced_eos_token_id": "id of the token, or tokens, to end with at the maximum length",
    "exponential_decay_length_penalty": "after N tokens the end becomes more likely by the factor "
    "X with each further one, such as 20,1.1",
    "eos_token_id": "id of the token that ends a text, or ids of several",
}
