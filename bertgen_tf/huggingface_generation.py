"""HuggingFace's settings of generation, in and out: `generation_config.json`, or `config.json`."""

from typing import Any

from bertgen_tf.config import GenerationConfig

IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
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
_HARMLESS = {
    *(
        *IDS,
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
_NEUTRAL: dict[str, tuple] = {
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
GENERATION = {
    *GENERATION_FIELDS,
    *_HARMLESS,
    *_NEUTRAL,
    *("max_length", "min_length"),
}
# transformers 4 writes it into the dictionary of the decoder, whether anybody chose it or not.
DEFAULT_MAX_LENGTH = 20
# Settings of ours that HuggingFace has no place for, all of the scorer "gnmt".
OWN_GENERATION = ("beam_scorer", "gnmt_alpha", "normalize_unfinished")


def read_generation(
    values: dict[str, Any], own: dict[str, Any], positions: float, where: str
) -> GenerationConfig:
    """Our settings of generation from HuggingFace's.

    Args:
        values: theirs.
        own: what `write_generation` had no place for.
        positions: how many tokens the decoder can read.
        where: the file, for errors.

    Raises:
        ValueError: settings that we cannot follow.
    """
    values = {field: value for field, value in values.items() if value is not None}
    problems = []
    ours: dict[str, Any] = {
        # transformers stops after 20 tokens where nothing is said, which fits few models.
        "max_new_tokens": min(GenerationConfig().max_new_tokens, positions)
    }
    for field, counted in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if isinstance(values.get(field), int):
            ours[counted] = max(values[field] - 1, 0)
        elif field in values:
            problems.append(f"{field}={values[field]!r}")
    for field, value in values.items():
        if field in GENERATION_FIELDS:
            ours[GENERATION_FIELDS[field]] = value
        elif field in _NEUTRAL:
            if value not in _NEUTRAL[field]:
                problems.append(f"{field}={value!r}")
        elif field not in GENERATION:
            problems.append(f"{field}={value!r}")
    if ours.get("num_beams", 1) == 1:  # transformers does not read it then
        ours.pop("early_stopping", None)
    override = (
        "Other settings can replace them, in Python: "
        "from_huggingface(..., generation_config=GenerationConfig(...))."
    )
    if problems:
        raise ValueError(
            f"{where} has settings of generation that are not supported here: "
            f"{', '.join(problems)}. {override}"
        )
    ours.update(own.get("generation", {}))
    try:
        settings = GenerationConfig.from_dict(ours)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error} {override}") from error
    if settings.max_new_tokens > positions:
        raise ValueError(
            f"{where} lets {settings.max_new_tokens} tokens be generated, but the decoder has "
            f"{positions} positions. {override}"
        )
    return settings


def write_generation(settings: GenerationConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """HuggingFace's settings from ours, and what HuggingFace has no place for."""
    values, defaults = settings.to_dict(), GenerationConfig().to_dict()
    # transformers counts the start token.
    theirs = {"max_length": values["max_new_tokens"] + 1}
    theirs |= {
        their_field: values[field]
        for their_field, field in GENERATION_FIELDS.items()
        if field != "max_new_tokens" and values[field] != defaults[field]
    }
    if "suppress_tokens" in theirs:
        theirs["suppress_tokens"] = list(theirs["suppress_tokens"])
    if values["beam_scorer"] == defaults["beam_scorer"]:
        return theirs, {}
    return theirs, {field: values[field] for field in OWN_GENERATION}
