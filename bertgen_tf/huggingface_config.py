"""HuggingFace's `config.json` and `generation_config.json`, in and out.

Every field is used, or known to change nothing, or refused: all that is refused comes in one error.
Versions 4 and 5 of transformers are meant; version 4 also writes its settings of generation, and
dozens of defaults, into `config.json`.
"""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

from bertgen_tf.config import BertGenerationConfig, GenerationConfig
from bertgen_tf.preprocessing import Seq2SeqPreprocessor

# The key in config.json for what HuggingFace has no place for.
OWN = "bertgen_tf"
ENCODER_DECODER = "encoder-decoder"
BERT_GENERATION = "bert-generation"

# Fields of one name and meaning there and here.
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
_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
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
# What a field that is not written means, where it is not what it means here.
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
}
STACKS = tuple(_DEFAULTS)
HIDDEN_ACTS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "relu": "relu",
}

# Fields that change neither the numbers nor the ids, whatever they say.
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
    "cross_attention_hidden_size": (None,),
    "per_layer_config": (None, {}),
    "position_embedding_type": (None, "absolute"),
    "prefix": (None, ""),
    "pruned_heads": (None, {}),
    "tie_last_hidden_states": (None,),
    "tie_word_embeddings": (None, True),
}

# Settings of generation: HuggingFace's field -> ours. `max_length` and `min_length`, which count
# the start token, are translated apart.
GENERATION_FIELDS = {
    "max_new_tokens": "max_new_tokens",
    "min_new_tokens": "min_new_tokens",
    "num_beams": "num_beams",
    "num_return_sequences": "num_return_sequences",
    "length_penalty": "length_penalty",
    "early_stopping": "early_stopping",
    "suppress_tokens": "suppress_tokens",
}
_GENERATION_HARMLESS = {
    *(
        *_IDS,
        "decoder_start_token_id",
        "_from_model_config",
        "transformers_version",
        "_commit_hash",
    ),
    # Forms of the output, caches and speed.
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config"),
    *("disable_compile", "output_attentions", "output_hidden_states", "output_scores"),
    *("output_logits", "return_dict_in_generate", "remove_invalid_values", "low_memory"),
    *("is_assistant", "num_assistant_tokens"),
    *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind"),
    *("target_lookbehind", "max_matching_ngram_size", "prefill_chunk_size"),
    # Only read with do_sample, which is refused.
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff"),
    *("eta_cutoff",),
}
# None is everywhere the default.
_GENERATION_NEUTRAL: dict[str, tuple] = {
    "assistant_early_exit": (),
    "assistant_ensemble_weight": (),
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "diversity_penalty": (0.0,),
    "do_sample": (False,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "max_time": (),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0.0,),
    "prompt_lookup_num_tokens": (),
    "renormalize_logits": (False,),
    "repetition_penalty": (1.0,),
    "sequence_bias": ({}, []),
    "speculation_type": (),
    "stop_strings": ([],),
    "token_healing": (False,),
    "use_mtp": (False,),
    "watermarking_config": (),
}
_GENERATION = {
    *GENERATION_FIELDS,
    *_GENERATION_HARMLESS,
    *_GENERATION_NEUTRAL,
    *("max_length", "min_length"),
}
# transformers 4 writes it into the dictionary of the decoder, whether anybody chose it or not.
_DEFAULT_MAX_LENGTH = 20
# Settings of ours that HuggingFace has no place for, all of the scorer "gnmt".
_OWN_GENERATION = ("beam_scorer", "gnmt_alpha", "normalize_unfinished")


@dataclasses.dataclass(frozen=True)
class Stack:
    """What `config.json` says of one stack.

    Attributes:
        kind: its model_type.
        config: sizes and ids; `max_position_embeddings` without `first_position`.
        first_position: rows of the position embeddings before that of the first token: RoBERTa
            begins after its padding id.
        is_decoder: whether it is causal there.
        has_ids: whether the three ids are all told.
    """

    kind: str
    config: BertGenerationConfig
    first_position: int
    is_decoder: bool
    has_ids: bool


@dataclasses.dataclass(frozen=True)
class Pair:
    """What the two files say of an encoder-decoder.

    Attributes:
        encoder, decoder: its stacks; the ids of the decoder are those that generation uses, with
            the start token as bos.
        sharing: what both stacks share, as for `BertGenerationDecoder`.
        generation: settings of generation, unless others replace them.
        preprocessor: arguments of ours for `EncoderDecoderModel`.
    """

    encoder: Stack
    decoder: Stack
    sharing: str
    generation: GenerationConfig | None
    preprocessor: dict[str, Any]


def model_type(values: dict[str, Any], where: str) -> str:
    """The kind of model that a `config.json` tells.

    Raises:
        ValueError: it tells none, or one that we do not know.
    """
    kind = values.get("model_type")
    known = (ENCODER_DECODER, *STACKS)
    if kind not in known:
        raise ValueError(
            f"{where} should tell a model_type, one of {', '.join(known)}, but tells {kind!r}."
        )
    return kind


def read_stack(values: dict[str, Any], where: str) -> Stack:
    """Reads the `config.json` of a lone encoder or decoder.

    Raises:
        ValueError: all that is refused, with its values.
    """
    problems: list[str] = []
    _check_fields(values, "", problems)
    if values["model_type"] != BERT_GENERATION and values.get("is_decoder"):
        problems.append(
            "is_decoder=True (BERT's decoder has a head of its own, and is no warm start)"
        )
    stack = _stack(values, "", problems)
    _refuse(where, problems)
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
    problems: list[str] = []
    sides = {}
    for side, kinds in (("encoder", STACKS), ("decoder", (BERT_GENERATION,))):
        sides[side] = values.get(side)
        kind = sides[side].get("model_type") if isinstance(sides[side], dict) else None
        if kind not in kinds:
            raise ValueError(
                f"{where}/config.json should have {side} with model_type {' or '.join(kinds)}, but "
                f"tells {kind!r}."
                + (
                    " The head of that decoder (a dense layer and a layer normalisation before "
                    "the softmax) has no place in BertGeneration."
                    if side == "decoder" and kind in STACKS
                    else ""
                )
            )
        _check_fields(sides[side], f"{side}.", problems)
    _check_fields(
        {
            field: value
            for field, value in values.items()
            if field not in ("encoder", "decoder", "is_encoder_decoder", "vocab_size")
        },
        "",
        problems,
        top=True,
    )
    encoder, decoder = (dict(sides[side]) for side in ("encoder", "decoder"))
    for field in ("is_decoder", "add_cross_attention"):
        if decoder.get(field) is not True:
            problems.append(f"decoder.{field}={decoder.get(field)!r} (only True)")
        if encoder.get(field):
            problems.append(f"encoder.{field}={encoder[field]!r} (only False)")
    decoder.update(_generation_ids(values, generation, decoder, problems))
    for field in _IDS:
        if encoder.get(field) is None:
            encoder[field] = decoder[field]
    stacks = [_stack(encoder, "encoder.", problems), _stack(decoder, "decoder.", problems)]
    if all(stacks) and stacks[0].config.hidden_size != stacks[1].config.hidden_size:
        problems.append(
            f"encoder.hidden_size={stacks[0].config.hidden_size} with "
            f"decoder.hidden_size={stacks[1].config.hidden_size} (only equal ones)"
        )
    own = values.get(OWN) or {}
    if not _is_own(own):
        problems.append(f"{OWN}={own!r} (only what save_to_huggingface wrote)")
    _refuse(f"{where}/config.json", problems)
    settings = None
    if read_generation:
        if generation is None:
            settings = _read_generation(
                {
                    **{
                        f: v
                        for f, v in _generation_of(decoder).items()
                        if (f, v) != ("max_length", _DEFAULT_MAX_LENGTH)
                    },
                    **{f: v for f, v in _generation_of(values).items() if v is not None},
                },
                own,
                stacks[1].config,
                f"{where}/config.json",
            )
        else:
            settings = _read_generation(
                generation, own, stacks[1].config, f"{where}/generation_config.json"
            )
    sharing = "all" if values.get("tie_encoder_decoder") else own.get("sharing", "none")
    return Pair(stacks[0], stacks[1], sharing, settings, own.get("preprocessor", {}))


def write_stack(config: BertGenerationConfig, architecture: str) -> dict[str, Any]:
    """The `config.json` of a lone encoder ("BertGenerationEncoder") or decoder."""
    decoder = architecture == "BertGenerationDecoder"
    values = {**config.to_dict(), "model_type": BERT_GENERATION, "is_decoder": decoder}
    return {**values, "architectures": [architecture], "dtype": "float32", OWN: {}}


def write_pair(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `config.json` and `generation_config.json` of an `EncoderDecoderModel`."""
    encoder, decoder = (
        write_stack(stack.config, type(stack).__name__) for stack in (model.encoder, model.decoder)
    )
    for values in (encoder, decoder):
        del values[OWN]
    ids = {field: decoder[field] for field in _IDS}
    ids["decoder_start_token_id"] = ids["bos_token_id"]
    own: dict[str, Any] = {"sharing": model.decoder.sharing}
    if model.preprocessor is not None:
        own["preprocessor"] = model.preprocessor.get_config()
    settings = model.generation_config.to_dict()
    defaults = GenerationConfig().to_dict()
    # transformers counts the start token.
    generation = {**ids, "max_length": settings["max_new_tokens"] + 1}
    generation |= {
        theirs: settings[ours]
        for theirs, ours in GENERATION_FIELDS.items()
        if ours != "max_new_tokens" and settings[ours] != defaults[ours]
    }
    if "suppress_tokens" in generation:
        generation["suppress_tokens"] = list(generation["suppress_tokens"])
    if settings["beam_scorer"] != defaults["beam_scorer"]:
        own["generation"] = {field: settings[field] for field in _OWN_GENERATION}
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
    return config, generation


def _check_fields(
    values: dict[str, Any], prefix: str, problems: list[str], *, top: bool = False
) -> None:
    known = {*_HARMLESS, *_GENERATION, "tie_encoder_decoder", OWN}
    if not top:
        known |= {*_SIZES, "hidden_act", "is_decoder", "add_cross_attention"}
    neutral = _NEUTRAL if top else {**_NEUTRAL, "is_encoder_decoder": (None, False)}
    for field, value in values.items():
        if field in neutral:
            if not any(value == harmless for harmless in neutral[field]):
                problems.append(f"{prefix}{field}={value!r} (only {neutral[field][-1]!r})")
        elif field not in known:
            problems.append(f"{prefix}{field}={value!r} (unknown)")


def _stack(values: dict[str, Any], prefix: str, problems: list[str]) -> Stack | None:
    kind = values["model_type"]
    defaults = {**BertGenerationConfig().to_dict(), **_DEFAULTS[kind]}
    fields = {field: values.get(field, defaults[field]) for field in (*_SIZES, *_IDS)}
    has_ids = all(fields[field] is not None for field in _IDS)
    if isinstance(fields["eos_token_id"], list) and len(fields["eos_token_id"]) == 1:
        fields["eos_token_id"] = fields["eos_token_id"][0]
    act = values.get("hidden_act", "gelu")
    if not isinstance(act, str) or act not in HIDDEN_ACTS:
        problems.append(f"{prefix}hidden_act={act!r} (only {', '.join(HIDDEN_ACTS)})")
        act = "gelu"
    for field in _IDS:
        if fields[field] is None:  # an encoder never reads them
            fields[field] = 0
    is_decoder = bool(values.get("is_decoder"))
    try:
        first_position = fields["pad_token_id"] + 1 if kind == "roberta" else 0
        fields["max_position_embeddings"] -= first_position
        config = BertGenerationConfig(
            **fields,
            hidden_act=HIDDEN_ACTS[act],
            add_cross_attention=bool(is_decoder and values.get("add_cross_attention")),
        )
    except (TypeError, ValueError) as error:
        problems.append(f"{prefix.rstrip('.')}: {error}" if prefix else str(error))
        return None
    return Stack(kind, config, first_position, is_decoder, has_ids)


def _generation_ids(
    values: dict[str, Any],
    generation: dict[str, Any] | None,
    decoder: dict[str, Any],
    problems: list[str],
) -> dict[str, Any]:
    """The ids that generation uses; the start token is what we call bos."""
    sources = (generation or {}, values, decoder)
    defaults = BertGenerationConfig()

    def first(*fields: str) -> Any:
        found = (source[f] for f in fields for source in sources if source.get(f) is not None)
        return next(found, getattr(defaults, fields[-1]))

    starts = {
        source["decoder_start_token_id"]
        for source in sources[:2]
        if isinstance(source.get("decoder_start_token_id"), int)
    }
    if len(starts) > 1:
        problems.append(
            f"decoder_start_token_id={values['decoder_start_token_id']!r} "
            f"(generation_config.json says {generation['decoder_start_token_id']!r})"
        )
    return {
        "pad_token_id": first("pad_token_id"),
        "bos_token_id": first("decoder_start_token_id", "bos_token_id"),
        "eos_token_id": first("eos_token_id"),
    }


def _generation_of(values: dict[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in values.items() if field in _GENERATION}


def _read_generation(
    values: dict[str, Any], own: dict[str, Any], decoder: BertGenerationConfig, where: str
) -> GenerationConfig:
    values = {field: value for field, value in values.items() if value is not None}
    problems = []
    ours: dict[str, Any] = {
        # transformers stops after 20 tokens where nothing is said, which fits few models.
        "max_new_tokens": min(GenerationConfig().max_new_tokens, decoder.max_position_embeddings)
    }
    for field, counted in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if isinstance(values.get(field), int):
            ours[counted] = max(values[field] - 1, 0)
        elif field in values:
            problems.append(f"{field}={values[field]!r}")
    for field, value in values.items():
        if field in GENERATION_FIELDS:
            ours[GENERATION_FIELDS[field]] = value
        elif field in _GENERATION_NEUTRAL:
            if value not in _GENERATION_NEUTRAL[field]:
                problems.append(f"{field}={value!r}")
        elif field not in _GENERATION:
            problems.append(f"{field}={value!r}")
    if ours.get("num_beams", 1) == 1:  # transformers does not read it then
        ours.pop("early_stopping", None)
    override = "Pass generation_config=GenerationConfig(...) to replace these settings."
    if problems:
        raise ValueError(
            f"{where} has settings of generation that are not supported here: "
            f"{', '.join(problems)}. {override}"
        )
    if own.get("generation"):
        ours.update(own["generation"])
    try:
        settings = GenerationConfig.from_dict(ours)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error} {override}") from error
    if settings.max_new_tokens > decoder.max_position_embeddings:
        raise ValueError(
            f"{where} lets {settings.max_new_tokens} tokens be generated, but the decoder has "
            f"{decoder.max_position_embeddings} positions. {override}"
        )
    return settings


def _is_own(own: Any) -> bool:
    if not isinstance(own, dict):
        return False
    arguments = set(inspect.signature(Seq2SeqPreprocessor).parameters) - {"tokenizer"}
    parts = ((own.get("preprocessor", {}), arguments), (own.get("generation", {}), _OWN_GENERATION))
    return all(isinstance(part, dict) and set(part) <= set(known) for part, known in parts)


def _refuse(where: str, problems: Sequence[str]) -> None:
    if problems:
        raise ValueError(f"{where} asks for what is not supported here: {'; '.join(problems)}.")
