"""Hugging Face's `config.json` and `generation_config.json`, in and out.

Every field is used, or known to change nothing, or refused: one error lists all that is refused.
Versions 4 and 5 of transformers are supported; version 4 also writes its generation settings, and
dozens of defaults, into `config.json`.
"""

import dataclasses
import inspect
import math
from typing import Any

from bertgen_tf.checkpoints.huggingface import generation_settings as generations
from bertgen_tf.checkpoints.huggingface import gpt2
from bertgen_tf.config import OWN_FIELDS, TOKEN_IDS, BertGenerationConfig, GenerationConfig
from bertgen_tf.models.encoder_decoder import EncoderDecoderModel
from bertgen_tf.tokenizers.preprocessing import Seq2SeqPreprocessor

# The key in config.json for what Hugging Face has no place for.
OWN = "bertgen_tf"
ENCODER_DECODER = "encoder-decoder"
_CONFIG, _GENERATION = "config.json", "generation_config.json"
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
# Those that an encoder-decoder may have as its encoder.
_ENCODERS = (BERT_GENERATION, "bert", "roberta")
HIDDEN_ACTS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "relu": "relu",
}

# Fields that change neither the numbers nor the ids, whatever their values.
_HARMLESS = {
    *("_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path"),
    *("architectures", "chunk_size_feed_forward", "classifier_dropout", "cls_token_id"),
    *("directionality", "dtype", "finetuning_task", "gradient_checkpointing", "id2label"),
    *("label2id", "mask_token_id", "model_type", "name_or_path", "num_labels"),
    *("output_attentions", "output_hidden_states", "pooler_fc_size"),
    *("pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head"),
    *("pooler_type", "problem_type", "return_dict", "sep_token_id", "task_specific_params"),
    *("tf_legacy_loss", "tokenizer_class", "torch_dtype", "torchscript"),
    *("transformers_version", "type_vocab_size", "use_bfloat16", "use_cache", "xla_device"),
}
# Fields that change nothing with these values.
_NEUTRAL: dict[str, tuple] = {
    "per_layer_config": (None, {}),
    "position_embedding_type": (None, "absolute"),
    "prefix": (None, ""),
    "pruned_heads": (None, {}),
    "tie_last_hidden_states": (None,),
    "tie_word_embeddings": (None, True),
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
        has_ids: whether all three ids are given.
    """

    kind: str
    config: BertGenerationConfig
    first_position: int
    is_decoder: bool
    has_ids: bool


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
    kind = values.get("model_type")
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
    if values["model_type"] == gpt2.GPT2:
        values = gpt2.bert_fields(values, problems)
    _check_fields(values, "", problems)
    if values["model_type"] not in (BERT_GENERATION, gpt2.GPT2) and values.get("is_decoder"):
        problems.append(
            "is_decoder=True (BERT's decoder has a head of its own, and cannot warm-start)"
        )
    stack = _stack(values, "", problems)
    errors = _refusal(where, problems)
    if errors:
        raise ValueError(errors[0])
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
    problems: dict[str, list[str]] = {_CONFIG: [], _GENERATION: []}
    ours = problems[_CONFIG]
    _check_fields(
        {
            field: value
            for field, value in values.items()
            if field not in ("encoder", "decoder", "is_encoder_decoder", "vocab_size")
        },
        "",
        ours,
        top=True,
    )
    own = values.get(OWN) or {}
    if not _is_own(own):
        ours.append(f"{OWN}={own!r} (only what save_to_huggingface wrote)")
        own = {}
    ends = own.get("generation", {}).get("eos_token_id")
    encoder = _side(values, "encoder", _ENCODERS, ours)
    decoder = _side(values, "decoder", (BERT_GENERATION,), ours)
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
        decoder.update(_generation_ids(values, ids, decoder, problems))
        stacks["decoder"] = _stack(decoder, "decoder.", ours)
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
        file, source = _GENERATION, generation
        if generation is None:
            file, source = _CONFIG, _settings_in_config(values, decoder or {})
        stack = stacks.get("decoder")
        positions = stack.config.max_position_embeddings if stack else math.inf
        try:
            settings = generations.read_generation(source, own, positions, f"{where}/{file}")
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError(" ".join(errors))
    sharing = "all" if values.get("tie_encoder_decoder") else own.get("sharing", "none")
    return Pair(
        stacks["encoder"], stacks["decoder"], sharing, settings, own.get("preprocessor", {})
    )


def write_stack(config: BertGenerationConfig, architecture: str) -> dict[str, Any]:
    """The `config.json` of a lone encoder ("BertGenerationEncoder") or decoder."""
    decoder = architecture == "BertGenerationDecoder"
    values = {**config.to_dict(), "model_type": BERT_GENERATION, "is_decoder": decoder}
    for field in OWN_FIELDS:
        del values[field]
    return {**values, "architectures": [architecture], "dtype": "float32", OWN: {}}


def write_pair(model: EncoderDecoderModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `config.json` and `generation_config.json` of an `EncoderDecoderModel`."""
    encoder, decoder = (
        write_stack(stack.config, type(stack).__name__) for stack in (model.encoder, model.decoder)
    )
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
    values: dict[str, Any], prefix: str, problems: list[str], *, top: bool = False
) -> None:
    known = {*_HARMLESS, *generations.GENERATION, "tie_encoder_decoder", OWN}
    if not top:
        known |= {*_SIZES, "hidden_act", "is_decoder", "add_cross_attention"}
    # transformers 4 wants the encoder's hidden size there, which is the decoder's for us.
    neutral = {**_NEUTRAL, "cross_attention_hidden_size": (None, values.get("hidden_size"))}
    if not top:
        neutral["is_encoder_decoder"] = (None, False)
    for field, value in values.items():
        if field in neutral:
            if not any(value == harmless for harmless in neutral[field]):
                problems.append(f"{prefix}{field}={value!r} (only {neutral[field][-1]!r})")
        elif field not in known:
            problems.append(f"{prefix}{field}={value!r} (unknown)")


def _stack(values: dict[str, Any], prefix: str, problems: list[str]) -> Stack | None:
    kind = values["model_type"]
    defaults = {**BertGenerationConfig().to_dict(), **_DEFAULTS[kind]}
    fields = {field: values.get(field, defaults[field]) for field in (*_SIZES, *TOKEN_IDS)}
    has_ids = all(fields[field] is not None for field in TOKEN_IDS)
    if isinstance(fields["eos_token_id"], list) and len(fields["eos_token_id"]) == 1:
        fields["eos_token_id"] = fields["eos_token_id"][0]
    act = values.get("hidden_act", defaults["hidden_act"])
    if not isinstance(act, str) or act not in HIDDEN_ACTS:
        problems.append(f"{prefix}hidden_act={act!r} (only {', '.join(HIDDEN_ACTS)})")
        act = "gelu"
    for field in TOKEN_IDS:
        if fields[field] is None:  # an encoder never reads them
            fields[field] = 0
    is_decoder = bool(values.get("is_decoder"))
    first_position = 0
    if kind == "roberta" and all(
        isinstance(fields[field], int) for field in ("pad_token_id", "max_position_embeddings")
    ):
        first_position = fields["pad_token_id"] + 1
        fields["max_position_embeddings"] -= first_position
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
    return Stack(kind, config, first_position, is_decoder, has_ids)


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
    values: dict[str, Any], side: str, kinds: tuple[str, ...], problems: list[str]
) -> dict[str, Any] | None:
    """A copy of what is said about one stack; None, and a problem, if it is not of these kinds."""
    stack = values.get(side)
    kind = stack.get("model_type") if isinstance(stack, dict) else None
    if kind in kinds:
        _check_fields(stack, f"{side}.", problems)
        return dict(stack)
    why = ""
    if side == "decoder" and kind in _ENCODERS:
        why = (
            ": the head of that decoder, a dense layer and a layer normalisation before the "
            "softmax, has no place in BertGeneration"
        )
    problems.append(f"{side} with model_type {kind!r} (only {' or '.join(kinds)}{why})")
    return None


def _fill_ids(encoder: dict[str, Any], decoder: dict[str, Any]) -> None:
    """Ids that an encoder lacks: its kind's, which place RoBERTa's positions, or the decoder's."""
    size = encoder.get("vocab_size", math.inf)
    for field in TOKEN_IDS:
        if encoder.get(field) is None:
            encoder[field] = _DEFAULTS[encoder["model_type"]].get(field)
        if (
            encoder[field] is None
            and isinstance(size, int | float)
            and decoder.get(field, size) < size
        ):
            encoder[field] = decoder[field]


def _generation_ids(
    values: dict[str, Any],
    generation: dict[str, Any] | None,
    decoder: dict[str, Any],
    problems: dict[str, list[str]],
) -> dict[str, int]:
    """The ids that generation uses; the start token is what we call bos."""
    sources = (
        (_GENERATION, "", generation or {}),
        (_CONFIG, "", values),
        (_CONFIG, "decoder.", decoder),
    )
    defaults = BertGenerationConfig()
    size = decoder.get("vocab_size", defaults.vocab_size)
    if not isinstance(size, int):
        size = math.inf  # refused elsewhere

    def first(*fields: str) -> int:
        several = None
        for field in fields:
            for file, prefix, source in sources:
                token = source.get(field)
                if token is None:
                    continue
                tokens = token if isinstance(token, list) else [token]
                if (
                    not tokens
                    or (len(tokens) > 1 and field != "eos_token_id")
                    or not all(type(token) is int and 0 <= token < size for token in tokens)
                ):
                    problems[file].append(
                        f"{prefix}{field}={token!r} (only an id below vocab_size={size})"
                    )
                    return 0
                if len(tokens) == 1:
                    return tokens[0]
                # Several end tokens are a generation setting; the decoder has only one.
                several = tokens[0] if several is None else several
        return getattr(defaults, fields[-1]) if several is None else several

    starts = {
        source["decoder_start_token_id"]
        for _, _, source in sources[:2]
        if isinstance(source.get("decoder_start_token_id"), int)
    }
    if len(starts) > 1:
        problems[_CONFIG].append(
            f"decoder_start_token_id={values['decoder_start_token_id']!r} "
            f"(generation_config.json says {generation['decoder_start_token_id']!r})"
        )
    return {
        "pad_token_id": first("pad_token_id"),
        "bos_token_id": first("decoder_start_token_id", "bos_token_id"),
        "eos_token_id": first("eos_token_id"),
    }


def _settings_in_config(values: dict[str, Any], decoder: dict[str, Any]) -> dict[str, Any]:
    """The generation settings that transformers 4 wrote into `config.json`."""
    settings = {
        field: value
        for field, value in decoder.items()
        if field in generations.GENERATION
        and (field, value) != ("max_length", generations.DEFAULT_MAX_LENGTH)
    }
    return settings | {
        field: value
        for field, value in values.items()
        if field in generations.GENERATION and value is not None
    }


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
