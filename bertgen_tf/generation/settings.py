"""What generation settings mean for a model: whether they fit, and what they do to logits."""

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from bertgen_tf.checks import GenerationError
from bertgen_tf.config import GenerationConfig
from bertgen_tf.generation.search import filters, logits

# float32 ends at 3.4e38.
_LARGEST_EXPONENT = 38

if TYPE_CHECKING:
    from bertgen_tf.models.encoder_decoder import EncoderDecoderModel


def settings_of_call(
    model: "EncoderDecoderModel", config: GenerationConfig | None, options: dict[str, Any]
) -> GenerationConfig:
    """The settings of a call, which take precedence over those that the model stores.

    Args:
        config: of the call, if it has one; its fields and the options must not contradict each
            other.
        options: fields of the call.
    """
    if config is None:
        stored = model.generation_config
        return stored.override(**options) if options else stored
    return config.replace(**options) if options else config


def check_config(
    config: GenerationConfig, model: "EncoderDecoderModel", prompt_length: int = 1
) -> None:
    """Raises if the settings do not fit the model, or prompts of this length.

    Raises:
        ValueError: too many tokens for the decoder's positions, too few for the minimum, or ids
            outside the vocabulary.
    """
    decoder = model.decoder.config
    # The last token is never read.
    longest = decoder.max_target_positions + 1
    prompt = "" if prompt_length == 1 else f" less the prompt's further {prompt_length - 1} tokens"
    if config.max_length is None:
        total = prompt_length + config.max_new_tokens
        if total > longest:
            raise ValueError(
                "max_new_tokens must not exceed the decoder's max_position_embeddings "
                f"({decoder.max_target_positions}){prompt}, received {config.max_new_tokens}."
            )
    else:
        total = config.max_length
        if total > longest:
            raise ValueError(
                "max_length must not exceed the decoder's max_position_embeddings + 1 "
                f"({longest}), received {total}."
            )
        if total <= prompt_length:
            raise ValueError(
                "max_length counts start token and prompt, and must leave a token to generate: it "
                f"must be above {prompt_length} here, received {total}. Set max_new_tokens instead."
            )
    for name, count in (
        ("min_length", config.min_length),
        ("min_new_tokens", prompt_length + config.min_new_tokens),
    ):
        if count > total:
            raise ValueError(
                f"{name} must fit into the longest output ({total} tokens, {prompt_length} of them "
                f"start token and prompt), received {getattr(config, name)}."
            )
    # One that the model stores gives way to a prompt.
    stored = model.generation_config.forced_bos_token_id
    if prompt_length > 1 and config.forced_bos_token_id not in (None, stored):
        raise ValueError(
            "forced_bos_token_id is for outputs without a prompt, received "
            f"{config.forced_bos_token_id} and a prompt. End the prompt with it, or set None."
        )
    if getattr(model, "decoder_tokenizer", None) is not None:
        for name in ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"):
            value = getattr(config, name)
            if value != getattr(GenerationConfig, name):
                raise ValueError(
                    f"{name} needs source and target of one vocabulary, and this model has two, "
                    f"received {value}. Leave it at {getattr(GenerationConfig, name)}."
                )
    ends = eos_token_ids(config, model)
    banned = [word for word in config.bad_words_ids if len(word) == 1 and word[0] in ends]
    if banned:
        raise ValueError(
            f"bad_words_ids must not ban what ends a sequence, received {banned[0]}. Set "
            "min_new_tokens, or suppress_tokens, instead."
        )
    _check_penalties(config, total)
    _check_bans(config, decoder.vocab_size)
    for name, ids in _token_ids(config).items():
        if any(token >= decoder.vocab_size for token in ids):
            raise ValueError(
                f"{name} must be smaller than vocab_size ({decoder.vocab_size}), "
                f"received {getattr(config, name)}."
            )


def _check_penalties(config: GenerationConfig, length: int) -> None:
    """Raises if float32 cannot hold what divides the score of the longest output."""
    for name, base in (("length_penalty", length), ("gnmt_alpha", (5 + length) / 6)):
        limit = _LARGEST_EXPONENT / max(1e-9, math.log10(base))
        if abs(getattr(config, name)) > limit:
            raise ValueError(
                f"{name} must be at most {limit:.1f} for outputs of {length} tokens, whose scores "
                f"float32 could not hold, received {getattr(config, name)}."
            )


def _check_bans(config: GenerationConfig, vocab_size: int) -> None:
    """Raises if no token is left at some step, whatever the text."""
    banned = {*config.suppress_tokens, *(word[0] for word in config.bad_words_ids if not word[1:])}
    for name, more in (
        ("suppress_tokens", ()),
        ("begin_suppress_tokens", config.begin_suppress_tokens),
    ):
        if len(banned.union(more)) >= vocab_size:
            raise ValueError(
                f"{name} must leave a token to generate, with bad_words_ids, received all "
                f"{vocab_size} of the vocabulary."
            )


def check_size(config: GenerationConfig, model: "EncoderDecoderModel", batch: int) -> None:
    """Raises a `GenerationError` if the search of a batch takes more memory than there is.

    The estimate is a lower bound: the scores of the next tokens, and keys and values of all
    tokens.
    """
    decoder = model.decoder.config
    rows = batch * max(config.num_beams, config.num_return_sequences)
    length = min(total_length(config, 1), decoder.max_target_positions)
    cache = 2 * decoder.num_hidden_layers * decoder.hidden_size * length
    needed = 4 * rows * (decoder.vocab_size + cache)
    memory = _memory()
    if memory is not None and needed > memory:
        name = "num_beams" if config.num_beams > 1 else "num_return_sequences"
        raise GenerationError(
            f"{name} must fit into memory, received {getattr(config, name)}, which takes at least "
            f"{needed / 1e9:,.0f} GB of {memory / 1e9:,.0f} for {batch} inputs at a time: lower "
            "it, or batch_size."
        )


def _memory() -> int | None:
    """Bytes of this machine; None where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def processors_for(
    config: GenerationConfig,
    model: "EncoderDecoderModel",
    input_ids: tf.Tensor,
    attention_mask: tf.Tensor,
    prompt_length: int | tf.Tensor = 1,
    logits_processor: Sequence[logits.Processor] = (),
) -> list[logits.Processor]:
    """The processors of the settings in the order of transformers, the caller's own last."""
    eos = eos_token_ids(config, model)
    source = {"input_ids": input_ids, "attention_mask": attention_mask}
    begin = prompt_length
    if config.forced_bos_token_id is not None:  # which comes first without a prompt
        begin = prompt_length + tf.cast(tf.equal(prompt_length, 1), tf.int32)
    decay = config.exponential_decay_length_penalty or (0, 1.0)
    table = (
        (config.sequence_bias, logits.sequence_bias, (config.sequence_bias,), {}),
        (
            config.encoder_repetition_penalty != 1.0,
            logits.encoder_repetition_penalty,
            (config.encoder_repetition_penalty,),
            source,
        ),
        (
            config.repetition_penalty != 1.0,
            logits.repetition_penalty,
            (config.repetition_penalty,),
            {},
        ),
        (config.no_repeat_ngram_size, logits.no_repeat_ngram, (config.no_repeat_ngram_size,), {}),
        (
            config.encoder_no_repeat_ngram_size,
            logits.encoder_no_repeat_ngram,
            (config.encoder_no_repeat_ngram_size,),
            source,
        ),
        (config.bad_words_ids, logits.bad_words, (config.bad_words_ids, eos), {}),
        (config.min_length, logits.min_length, (config.min_length, eos), {}),
        (
            config.min_new_tokens,
            logits.min_new_tokens,
            (config.min_new_tokens, eos),
            {"prompt_length": prompt_length},
        ),
        (
            config.forced_bos_token_id is not None,
            logits.forced_bos,
            (config.forced_bos_token_id,),
            {},
        ),
        (
            config.forced_eos_token_id is not None,
            logits.forced_eos,
            (_as_tuple(config.forced_eos_token_id), total_length(config, prompt_length)),
            {},
        ),
        (
            config.exponential_decay_length_penalty,
            logits.exponential_decay_length_penalty,
            (*decay, eos),
            {"prompt_length": prompt_length},
        ),
        (config.suppress_tokens, logits.suppress_tokens, (config.suppress_tokens,), {}),
        (
            config.begin_suppress_tokens,
            logits.begin_suppress_tokens,
            (config.begin_suppress_tokens, begin),
            {},
        ),
    )
    chosen = [factory(*args, **kwargs) for wanted, factory, args, kwargs in table if wanted]
    return [*chosen, *logits_processor]


def filters_for(config: GenerationConfig, model: "EncoderDecoderModel") -> list[logits.Processor]:
    """Filters that narrow the choice of a draw, in the order of transformers."""
    if not config.do_sample:
        return []
    # A beam must find a continuation besides its ends.
    keep = 1 if config.num_beams == 1 else 1 + len(eos_token_ids(config, model))
    chosen = []
    if config.temperature != 1.0:
        chosen.append(filters.temperature(config.temperature))
    for factory, value, off in (
        (filters.top_k, config.top_k, 0),
        (filters.top_p, config.top_p, 1.0),
        (filters.min_p, config.min_p, 0.0),
        (filters.typical_p, config.typical_p, 1.0),
    ):
        if value != off:
            chosen.append(factory(value, min_tokens_to_keep=keep))
    return chosen


def uses_beams(config: GenerationConfig) -> bool:
    """Whether these settings call for `beam_search`, rather than `sample`."""
    # tensor2tensor's beam of one continues after an end that was not likely enough.
    return config.num_beams > 1 or (config.beam_scorer == "gnmt" and not config.do_sample)


def eos_token_ids(config: GenerationConfig, model: "EncoderDecoderModel") -> tuple[int, ...]:
    """The ids that end a sequence."""
    if config.eos_token_id is None:
        return (model.decoder.config.eos_token_id,)
    return _as_tuple(config.eos_token_id)


def _as_tuple(ids: int | tuple[int, ...] | None) -> tuple[int, ...]:
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else ids


def _token_ids(config: GenerationConfig) -> dict[str, tuple[int, ...]]:
    """All token ids of the settings, by field."""
    return {
        "suppress_tokens": config.suppress_tokens,
        "begin_suppress_tokens": config.begin_suppress_tokens,
        "bad_words_ids": sum(config.bad_words_ids, ()),
        "sequence_bias": sum((ids for ids, _ in config.sequence_bias), ()),
        "forced_bos_token_id": _as_tuple(config.forced_bos_token_id),
        "forced_eos_token_id": _as_tuple(config.forced_eos_token_id),
        "eos_token_id": _as_tuple(config.eos_token_id),
    }


def total_length(config: GenerationConfig, prompt_length: int | tf.Tensor) -> int | tf.Tensor:
    """Tokens of the longest output, start token and prompt included."""
    return config.max_length or prompt_length + config.max_new_tokens
