"""Hugging Face's `config.json` and `generation_config.json`, in and out.

Every field is used, or known to change nothing, or refused: one error lists all that is refused.
What is not known is ignored, as in transformers, and one warning lists it.
Versions 3 to 5 of transformers are supported; older ones also write their generation settings, and
dozens of defaults, into `config.json`.
"""

import dataclasses
import inspect
import math
import re
import warnings
from typing import Any

from bertgen_tf.checkpoints.huggingface import generation_settings as generations
from bertgen_tf.checkpoints.huggingface import gpt2
from bertgen_tf.checkpoints.huggingface.files import (
    CONFIG_FILE,
    GENERATION_FILE,
    OWN,
    model_type_of,
)
from bertgen_tf.checkpoints.huggingface.weights import decoder_kind
from bertgen_tf.config import OWN_FIELDS, TOKEN_IDS, BertGenerationConfig, GenerationConfig
from bertgen_tf.models.encoder_decoder import EncoderDecoderModel
from bertgen_tf.tokenizers.preprocessing import Seq2SeqPreprocessor

ENCODER_DECODER = "encoder-decoder"
BERT_GENERATION = "bert-generation"

# Fields with the same name and meaning there and here.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "initializer_range",
    "layer_norm_eps",
)
_SHARING = ("none", "word_embeddings", "all")
# Fields of an encoder-decoder that are read elsewhere, or not at all.
_NOT_AT_TOP = ("encoder", "decoder", "is_encoder_decoder", "vocab_size")
# transformers' classes of the decoders that are written.
_DECODER_CLASSES = {BERT_GENERATION: "BertGenerationDecoder", "bert": "BertLMHeadModel"}
_BERT_BASE = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Defaults of fields that are not written, where they differ from ours.
_DEFAULTS: dict[str, dict[str, Any]] = {
    BERT_GENERATION: {},
    "bert": _BERT_BASE,
    "roberta": {
        **_BERT_BASE,
        "vocab_size": 50265,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    gpt2.GPT2: gpt2.DEFAULTS,
}
STACKS = tuple(_DEFAULTS)
# Those that an encoder-decoder may have as its encoder, and as its decoder.
_SIDES = (BERT_GENERATION, "bert", "roberta")
HIDDEN_ACTS = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(
        ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"),
        "gelu_new",
    ),
    "relu": "relu",
}

# Fields that change neither the numbers nor the ids, whatever their values: those of transformers 2
# to 5, and of tools around it that leave theirs.
_HARMLESS = {
    *("_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal"),
    *("_commit_hash", "_experts_implementation", "_experts_implementation_internal"),
    *("_flash_attn_2_enabled", "_name_or_path", "_num_labels", "_output_attentions"),
    *("_pre_quantization_dtype", "adapters", "architectures", "attn_implementation", "auto_map"),
    *("chunk_size_feed_forward", "classifier_dropout", "cls_token_id", "custom_pipelines"),
    *("directionality", "do_lower_case", "dtype", "embedding_size", "eos_token_ids"),
    *("experts_implementation", "finetuning_task", "gradient_checkpointing", "id2label"),
    *("keys_to_ignore_at_inference", "label2id", "language", "mask_token_id"),
    *("max_seq_length", "model_max_length", "model_type", "name", "name_or_path", "num_labels"),
    *("output_attentions", "output_hidden_states", "output_past", "pooler_fc_size"),
    *("pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head"),
    *("pooler_type", "problem_type", "return_dict", "sep_token_id", "task_specific_params"),
    *("tf_legacy_loss", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version"),
    *("type_vocab_size", "unk_token_id", "use_bfloat16", "use_cache", "use_return_dict"),
    *("xla_device",),
}
_HARMLESS_NAMES = r"summary_.*"  # of heads that are not read
# Fields that change nothing with these values.
_NEUTRAL: dict[str, tuple] = {
    "compression_config": (None,),
    "per_layer_config": (None, {}),
    "position_embedding_type": (None, "absolute"),
    "prefix": (None, ""),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "tie_last_hidden_states": (None,),
}


@dataclasses.dataclass(frozen=True)
class Stack:
    """What `config.json` says about one stack.

    Attributes:
        kind: its model_type.
        config: sizes and ids; `max_position_embeddings` without `first_position`.
        first_position: rows of the position embeddings before that of the first token: RoBERTa
            begins after its padding id.
        is_decoder: whether it is causal there; GPT-2 always is.
        missing_ids: those of the three ids that are not given; they are 0 in `config`.
    """

    kind: str
    config: BertGenerationConfig
    first_position: int
    is_decoder: bool
    missing_ids: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Pair:
    """What the two files say about an encoder-decoder.

    Attributes:
        encoder, decoder: its stacks; the ids of the decoder are those that generation uses, with
            the start token as bos.
        sharing: what both stacks share, as for `BertGenerationDecoder`.
        generation: generation settings, unless others replace them.
        preprocessor: our own arguments for `EncoderDecoderModel`.
    """

    encoder: Stack
    decoder: Stack
    sharing: str
    generation: GenerationConfig | None
    preprocessor: dict[str, Any]


def model_type(values: dict[str, Any], where: str) -> str:
    """The kind of model that a `config.json` specifies.

    Raises:
        ValueError: it specifies none, or one that we do not know.
    """
    kind = model_type_of(values)
    known = (ENCODER_DECODER, *STACKS)
    if kind not in known:
        raise ValueError(
            f"{where} should have a model_type, one of {', '.join(known)}, but has {kind!r}."
        )
    return kind


def read_stack(values: dict[str, Any], where: str) -> Stack:
    """Reads the `config.json` of a lone encoder or decoder.

    Raises:
        ValueError: all that is refused, with its values.
    """
    problems: list[str] = []
    unknown: list[str] = []
    values = {**values, "model_type": model_type(values, where)}
    if values["model_type"] == gpt2.GPT2:
        values = gpt2.bert_fields(values, problems)
    _check_fields(values, "", problems, unknown)
    stack = _stack(values, "", problems)
    errors = _refusal(where, problems)
    if errors:
        raise ValueError(errors[0])
    _warn(where, unknown)
    return stack


def read_pair(
    values: dict[str, Any],
    generation: dict[str, Any] | None,
    where: str,
    *,
    read_generation: bool = True,
) -> Pair:
    """Reads the files of an encoder-decoder.

    Args:
        values: of `config.json`.
        generation: of `generation_config.json`; without one, transformers 4 may have written the
            settings into `config.json`.
        where: the folder, for errors.
        read_generation: False where other settings replace them.

    Raises:
        ValueError: all that is refused, with its values.
    """
    problems: dict[str, list[str]] = {CONFIG_FILE: [], GENERATION_FILE: []}
    ours, unknown = problems[CONFIG_FILE], []
    top = {field: value for field, value in values.items() if field not in _NOT_AT_TOP}
    _check_fields(top, "", ours, unknown, top=True)
    own = values.get(OWN) or {}
    if not _is_own(own):
        ours.append(f"{OWN}={own!r} (only what save_to_huggingface wrote)")
        own = {}
    ends = own.get("generation", {}).get("eos_token_id")
    encoder = _side(values, "encoder", ours, unknown)
    decoder = _side(values, "decoder", ours, unknown)
    stacks: dict[str, Stack | None] = {}
    if decoder is not None:
        for field in ("is_decoder", "add_cross_attention"):
            if decoder.get(field) is not True:
                ours.append(f"decoder.{field}={decoder.get(field)!r} (only True)")
        ids = generation
        if (
            ends is not None and generation is not None
        ):  # not the decoder's, according to our own settings
            ids = {**generation, "eos_token_id": None}
        # What places RoBERTa's positions is the decoder's own.
        padding = decoder.get("pad_token_id", _defaults(decoder)["pad_token_id"])
        decoder.update(generations.read_ids(values, ids, decoder, _defaults(decoder), problems))
        if decoder["model_type"] == "roberta" and decoder["bos_token_id"] == padding:
            ours.append(
                f"decoder_start_token_id={padding!r} (only another than RoBERTa's pad_token_id, "
                "which has a position of its own)"
            )
        stacks["decoder"] = _stack({**decoder, "is_decoder": True}, "decoder.", ours, padding)
    if encoder is not None:
        for field in ("is_decoder", "add_cross_attention"):
            if encoder.get(field):
                ours.append(f"encoder.{field}={encoder[field]!r} (only False)")
        _fill_ids(encoder, decoder or {})
        stacks["encoder"] = _stack(encoder, "encoder.", ours)
    sizes = {side: stack.config.hidden_size for side, stack in stacks.items() if stack}
    if len(set(sizes.values())) > 1:
        ours.append(
            f"encoder.hidden_size={sizes['encoder']} with "
            f"decoder.hidden_size={sizes['decoder']} (only equal ones)"
        )
    errors = [e for file, found in problems.items() for e in _refusal(f"{where}/{file}", found)]
    settings = None
    if read_generation:
        file, source = GENERATION_FILE, generation
        if generation is None:
            file, source = CONFIG_FILE, generations.settings_in_config(values, decoder or {})
        stack = stacks.get("decoder")
        positions = stack.config.max_position_embeddings if stack else math.inf
        try:
            settings = generations.read_generation(source, own, positions, f"{where}/{file}")
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError(" ".join(errors))
    _warn(f"{where}/{CONFIG_FILE}", unknown)
    sharing = "all" if values.get("tie_encoder_decoder") else own.get("sharing", "none")
    return Pair(
        stacks["encoder"], stacks["decoder"], sharing, settings, own.get("preprocessor", {})
    )


def write_stack(config: BertGenerationConfig, *, is_decoder: bool) -> dict[str, Any]:
    """The `config.json` of a lone encoder or decoder.

    A decoder whose head has a transform becomes a BERT, the others are BertGenerations.
    """
    kind = decoder_kind(config)
    architecture = _DECODER_CLASSES[kind] if is_decoder else "BertGenerationEncoder"
    values = {**config.to_dict(), "model_type": kind, "is_decoder": is_decoder}
    for field in OWN_FIELDS:
        del values[field]
    if kind == "bert":
        values["type_vocab_size"] = 1
    return {**values, "architectures": [architecture], "dtype": "float32", OWN: {}}


def write_pair(model: EncoderDecoderModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `config.json` and `generation_config.json` of an `EncoderDecoderModel`."""
    encoder = write_stack(model.encoder.config, is_decoder=False)
    decoder = write_stack(model.decoder.config, is_decoder=True)
    for values in (encoder, decoder):
        del values[OWN]
    ids = {field: decoder[field] for field in TOKEN_IDS}
    ids["decoder_start_token_id"] = ids["bos_token_id"]
    own: dict[str, Any] = {"sharing": model.decoder.sharing}
    if model.preprocessor is not None:
        own["preprocessor"] = model.preprocessor.get_config()
    generation, further = generations.write_generation(model.generation_config)
    if further:
        own["generation"] = further
    config = {
        **ids,
        "model_type": ENCODER_DECODER,
        "architectures": ["EncoderDecoderModel"],
        "is_encoder_decoder": True,
        "dtype": "float32",
        "encoder": encoder,
        "decoder": decoder,
        OWN: own,
    }
    if model.decoder.sharing == "all":
        # transformers 4 ties the stacks; 5 keeps the flag and loads two that are equal.
        config["tie_encoder_decoder"] = True
    return config, {**ids, **generation}


def _check_fields(
    values: dict[str, Any],
    prefix: str,
    problems: list[str],
    unknown: list[str],
    *,
    top: bool = False,
) -> None:
    known = {*_HARMLESS, *generations.GENERATION, "tie_encoder_decoder", OWN}
    # At the top, and of encoders, nobody reads these.
    known |= {"is_decoder", "add_cross_attention", "tie_word_embeddings"}
    # transformers 4 wants the encoder's hidden size there, which is the decoder's for us.
    neutral = {**_NEUTRAL, "cross_attention_hidden_size": (None, values.get("hidden_size"))}
    if not top:
        known |= {*_SIZES, "hidden_act"}
        neutral["is_encoder_decoder"] = (None, False)
    if values.get("model_type") == gpt2.GPT2:
        neutral["tie_word_embeddings"] = (None, True)
    for field, value in values.items():
        if field in neutral:
            if not any(value == harmless for harmless in neutral[field]):
                problems.append(f"{prefix}{field}={_short(value)} (only {neutral[field][-1]!r})")
        elif field not in known and not re.fullmatch(_HARMLESS_NAMES, field):
            unknown.append(prefix + field)


def _short(value: Any) -> str:
    """A value for an error, which is not the place for pages of it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _warn(where: str, unknown: list[str], most: int = 20) -> None:
    if unknown:
        more = f" and {len(unknown) - most} more" if len(unknown) > most else ""
        warnings.warn(
            f"{where} has fields that bertgen_tf does not know, and ignores: "
            f"{', '.join(unknown[:most])}{more}.",
            stacklevel=2,
        )


def _stack(
    values: dict[str, Any], prefix: str, problems: list[str], padding: int | None = None
) -> Stack | None:
    """What is said about one stack; its positions begin after `padding`, by default its own."""
    kind, defaults = values["model_type"], _defaults(values)
    fields = {field: values.get(field, defaults[field]) for field in (*_SIZES, *TOKEN_IDS)}
    missing_ids = tuple(field for field in TOKEN_IDS if fields[field] is None)
    if isinstance(fields["eos_token_id"], list) and len(fields["eos_token_id"]) == 1:
        fields["eos_token_id"] = fields["eos_token_id"][0]
    act = values.get("hidden_act", defaults["hidden_act"])
    if not isinstance(act, str) or act not in HIDDEN_ACTS:
        problems.append(f"{prefix}hidden_act={_short(act)} (only {', '.join(HIDDEN_ACTS)})")
        act = "gelu"
    for field in TOKEN_IDS:
        if fields[field] is None:  # an encoder never reads them
            fields[field] = 0
    is_decoder = bool(values.get("is_decoder"))
    first_position = 0
    padding = fields["pad_token_id"] if padding is None else padding
    if (
        kind == "roberta"
        and isinstance(padding, int)
        and isinstance(fields["max_position_embeddings"], int)
    ):
        first_position = padding + 1
        fields["max_position_embeddings"] -= first_position
    if is_decoder:
        fields["tie_word_embeddings"] = values.get("tie_word_embeddings", True)
        # RoBERTa's is the same whatever the activation of its stack.
        transforms = {"bert": HIDDEN_ACTS[act], "roberta": "gelu"}
        fields["head_transform"] = transforms.get(kind)
    errors = _field_errors(fields)
    if errors:
        problems += [f"{prefix.rstrip('.')}: {error}" if prefix else error for error in errors]
        return None
    config = BertGenerationConfig(
        **fields,
        hidden_act=HIDDEN_ACTS[act],
        norm_first=kind == gpt2.GPT2,
        add_cross_attention=bool(is_decoder and values.get("add_cross_attention")),
    )
    return Stack(kind, config, first_position, is_decoder, missing_ids)


def _defaults(values: dict[str, Any]) -> dict[str, Any]:
    """What a stack of this model_type has where nothing is written."""
    return {**BertGenerationConfig().to_dict(), **_DEFAULTS[values["model_type"]]}


def _field_errors(fields: dict[str, Any]) -> list[str]:
    """What is wrong with each field, alone or with the one that limits it."""
    limits = {"num_attention_heads": "hidden_size", **dict.fromkeys(TOKEN_IDS, "vocab_size")}
    errors = {}  # in order, each once
    for field, value in fields.items():
        few = {**dict.fromkeys(TOKEN_IDS, 0), "num_attention_heads": 1, field: value}
        if field in limits:
            few[limits[field]] = fields[limits[field]]
        try:
            BertGenerationConfig(**few)
        except (TypeError, ValueError) as error:
            errors[str(error)] = None
    return list(errors)


def _side(
    values: dict[str, Any], side: str, problems: list[str], unknown: list[str]
) -> dict[str, Any] | None:
    """A copy of what is said about one stack; None, and a problem, if it is of another kind."""
    stack = values.get(side)
    kind = model_type_of(stack) if isinstance(stack, dict) else None
    if kind in _SIDES:
        _check_fields(stack, f"{side}.", problems, unknown)
        return {**stack, "model_type": kind}
    problems.append(f"{side} with model_type {_short(kind)} (only {' or '.join(_SIDES)})")
    return None


def _fill_ids(encoder: dict[str, Any], decoder: dict[str, Any]) -> None:
    """Ids that an encoder lacks: its kind's, which place RoBERTa's positions, or the decoder's."""
    size = encoder.get("vocab_size", math.inf)
    for field in TOKEN_IDS:
        if encoder.get(field) is None:
            encoder[field] = _DEFAULTS[encoder["model_type"]].get(field)
        token = decoder.get(field)
        if encoder[field] is None and token is not None and isinstance(size, int | float):
            encoder[field] = token if token < size else None


def _is_own(own: Any) -> bool:
    if not isinstance(own, dict):
        return False
    arguments = set(inspect.signature(Seq2SeqPreprocessor).parameters) - {
        "tokenizer",
        "decoder_tokenizer",
    }
    parts = (
        (own.get("preprocessor", {}), arguments),
        (own.get("generation", {}), generations.OWN_GENERATION),
    )
    return own.get("sharing", "none") in _SHARING and all(
        isinstance(part, dict) and set(part) <= set(known) for part, known in parts
    )


def _refusal(where: str, problems: list[str]) -> list[str]:
    """The error that lists them, if there are any."""
    if not problems:
        return []
    return [f"{where} asks for what is not supported here: {'; '.join(problems)}."]
