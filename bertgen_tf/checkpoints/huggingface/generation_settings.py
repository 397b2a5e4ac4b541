"""Hugging Face's generation settings, in and out: `generation_config.json`, or `config.json`."""

import math
from typing import Any

from bertgen_tf.checkpoints.huggingface.files import CONFIG_FILE, GENERATION_FILE
from bertgen_tf.config import DEFAULT_MAX_NEW_TOKENS, TOKEN_IDS, GenerationConfig

# Fields with the same name and meaning there and here.
GENERATION_FIELDS = (
    "max_new_tokens",
    "max_length",
    "min_new_tokens",
    "min_length",
    "num_beams",
    "num_return_sequences",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "length_penalty",
    "early_stopping",
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
)
# Only read with do_sample: without it, transformers ignores them.
_SAMPLING = {
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff"),
    "eta_cutoff",
}
_HARMLESS = {
    *(
        *TOKEN_IDS,
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
}
# None is always the default.
_NEUTRAL: dict[str, tuple] = {
    "assistant_early_exit": (),
    "assistant_ensemble_weight": (),
    "constraints": ([],),
    "diversity_penalty": (0.0,),
    "dola_layers": (),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "force_words_ids": ([],),
    "guidance_scale": (1.0,),
    "max_time": (),
    "num_beam_groups": (1,),
    "penalty_alpha": (0.0,),
    "prompt_lookup_num_tokens": (),
    "renormalize_logits": (False,),
    "speculation_type": (),
    "stop_strings": ([],),
    "token_healing": (False,),
    "top_h": (),
    "use_mtp": (False,),
    "watermarking_config": (),
}
GENERATION = {*GENERATION_FIELDS, *_HARMLESS, *_NEUTRAL}
# transformers 4 writes it into the dictionary of the decoder, whether or not anybody set it.
DEFAULT_MAX_LENGTH = 20
_GNMT = ("beam_scorer", "gnmt_alpha", "normalize_unfinished")
# Our settings that Hugging Face has no place for: all of the scorer "gnmt", the seed, a
# min_length beside min_new_tokens, and an end token that is not the decoder's own.
OWN_GENERATION = (*_GNMT, "seed", "min_length", "eos_token_id")


def read_generation(
    values: dict[str, Any], own: dict[str, Any], positions: float, where: str
) -> GenerationConfig:
    """Our generation settings from Hugging Face's.

    Args:
        values: theirs.
        own: what `write_generation` had no place for.
        positions: how many tokens the decoder can read.
        where: the file, for errors.

    Raises:
        ValueError: settings that we do not support.
    """
    values = {field: value for field, value in values.items() if value is not None}
    if not values.get("do_sample"):
        values = {field: value for field, value in values.items() if field not in _SAMPLING}
    if values.get("num_beams", 1) == 1:  # transformers does not read it then
        values.pop("early_stopping", None)
    for kind in ("max", "min"):
        if f"{kind}_new_tokens" in values:  # takes precedence in transformers
            values.pop(f"{kind}_length", None)
    ours: dict[str, Any] = {}
    if not {"max_new_tokens", "max_length"} & values.keys():
        # transformers stops after 20 tokens by default, which suits few models.
        ours["max_new_tokens"] = min(DEFAULT_MAX_NEW_TOKENS, positions)
    problems = []
    for field, value in values.items():
        if field in GENERATION_FIELDS:
            ours[field] = value
        elif field in _NEUTRAL:
            if value not in _NEUTRAL[field]:
                problems.append(f"{field}={value!r}")
        elif field not in GENERATION:
            problems.append(f"{field}={value!r}")
    ends = values.get("eos_token_id")
    if isinstance(ends, list) and len(ends) > 1:  # a single one is the decoder's
        ours["eos_token_id"] = ends
    override = (
        "Other settings can replace them, in Python: "
        "from_huggingface(..., generation_config=GenerationConfig(...))."
    )
    if problems:
        raise ValueError(
            f"{where} has generation settings that are not supported here: "
            f"{', '.join(problems)}. {override}"
        )
    ours.update(own.get("generation", {}))
    try:
        settings = GenerationConfig.from_dict(ours)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error} {override}") from error
    # The last token is never read, and the start token is not new.
    longest = settings.max_new_tokens or settings.max_length - 1
    if longest > positions:
        raise ValueError(
            f"{where} lets {longest} tokens be generated, but the decoder has "
            f"{positions} positions. {override}"
        )
    return settings


def write_generation(settings: GenerationConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Hugging Face's settings from ours, and what Hugging Face has no place for."""
    values, defaults = settings.to_dict(), GenerationConfig().to_dict()
    changed = {
        field: value
        for field, value in values.items()
        if value is not None and (value != defaults[field] or field == "max_new_tokens")
    }
    theirs = {
        field: _to_lists(value)
        for field, value in changed.items()
        if field in (*GENERATION_FIELDS, "eos_token_id")
    }
    own = {
        field: _to_lists(changed[field]) for field in ("seed", "eos_token_id") if field in changed
    }
    if {"min_length", "min_new_tokens"} <= changed.keys():
        own["min_length"] = values["min_length"]
    if "beam_scorer" in changed:
        own |= {field: values[field] for field in _GNMT}
    return theirs, own


def _to_lists(value: Any) -> Any:
    return list(map(_to_lists, value)) if isinstance(value, tuple) else value


def read_ids(
    values: dict[str, Any],
    generation: dict[str, Any] | None,
    decoder: dict[str, Any],
    defaults: dict[str, Any],
    problems: dict[str, list[str]],
) -> dict[str, int | None]:
    """The ids that generation uses; the start token is what we call bos. BERT may lack them.

    Args:
        values, generation: of `config.json`, and of `generation_config.json` if there is one.
        decoder: of the decoder's part of `config.json`.
        defaults: of a decoder of its kind.
        problems: by file, gets what is wrong.
    """
    sources = (
        (GENERATION_FILE, "", generation or {}),
        (CONFIG_FILE, "", values),
        (CONFIG_FILE, "decoder.", decoder),
    )
    size = decoder.get("vocab_size", defaults["vocab_size"])
    if not isinstance(size, int):
        size = math.inf  # refused elsewhere

    def first(*fields: str) -> int | None:
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
        return defaults[fields[-1]] if several is None else several

    starts = {
        source["decoder_start_token_id"]
        for _, _, source in sources[:2]
        if isinstance(source.get("decoder_start_token_id"), int)
    }
    if len(starts) > 1:
        problems[CONFIG_FILE].append(
            f"decoder_start_token_id={values['decoder_start_token_id']!r} "
            f"(generation_config.json says {generation['decoder_start_token_id']!r})"
        )
    return {
        "pad_token_id": first("pad_token_id"),
        "bos_token_id": first("decoder_start_token_id", "bos_token_id"),
        "eos_token_id": first("eos_token_id"),
    }


def settings_in_config(values: dict[str, Any], decoder: dict[str, Any]) -> dict[str, Any]:
    """The generation settings that transformers 4 wrote into `config.json`."""
    settings = {
        field: value
        for field, value in decoder.items()
        if field in GENERATION and (field, value) != ("max_length", DEFAULT_MAX_LENGTH)
    }
    return settings | {
        field: value for field, value in values.items() if field in GENERATION and value is not None
    }
