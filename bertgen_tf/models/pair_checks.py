"""Whether encoder, decoder, tokenizers and lengths fit together."""

from typing import Any

from bertgen_tf.config import TOKEN_IDS, BertGenerationConfig


def length_or_default(length: int | None, longest: int) -> int:
    """The most tokens of a text that a model reads."""
    return min(128, longest) if length is None else length


def check_pair(encoder: BertGenerationConfig, decoder: BertGenerationConfig) -> None:
    """Raises a ValueError for stacks that do not fit together."""
    if encoder.source_positions != decoder.source_positions:
        raise ValueError(
            "encoder and decoder must have the same source_positions, received "
            f"{encoder.source_positions} and {decoder.source_positions}."
        )
    if not decoder.add_cross_attention and not decoder.decoder_only:
        raise ValueError(
            "decoder must have cross-attention, received one with add_cross_attention=False. "
            "Build it from config.replace(add_cross_attention=True)."
        )
    if encoder.hidden_size != decoder.hidden_size:
        raise ValueError(
            "encoder and decoder must have the same hidden_size, received "
            f"{encoder.hidden_size} and {decoder.hidden_size}."
        )


def check_tokenizers(
    tokenizer: Any,
    decoder_tokenizer: Any,
    encoder: BertGenerationConfig,
    decoder: BertGenerationConfig,
) -> None:
    """Raises a ValueError for tokenizers whose sizes or special tokens do not match the stacks.

    Args:
        decoder_tokenizer: that of targets, or None if that is `tokenizer`.
    """
    name = "tokenizer" if decoder_tokenizer is None else "decoder_tokenizer"
    target = tokenizer if decoder_tokenizer is None else decoder_tokenizer
    for argument, value, side, config in (
        ("tokenizer", tokenizer, "encoder", encoder),
        (name, target, "decoder", decoder),
    ):
        if value.vocab_size > config.vocab_size:
            raise ValueError(
                f"{argument} must not have more pieces than the {side}'s vocab_size "
                f"({config.vocab_size}), received {value.vocab_size}. Use its own tokenizer."
            )
    for field in TOKEN_IDS:
        if getattr(target, field) != getattr(decoder, field):
            raise ValueError(
                f"{field} of {name} and decoder must be the same, received "
                f"{getattr(target, field)} and {getattr(decoder, field)}. "
                "Set the decoder's config from the tokenizer."
            )


def check_preprocessor(
    preprocessor: Any, encoder: BertGenerationConfig, decoder: BertGenerationConfig
) -> None:
    """Raises a ValueError for lengths that the positions do not allow."""
    for name, longest in (
        ("max_source_length", encoder.max_source_positions),
        ("max_target_length", decoder.max_target_positions),
    ):
        if getattr(preprocessor, name) > longest:
            raise ValueError(
                f"{name} must not exceed max_position_embeddings ({longest}), received "
                f"{getattr(preprocessor, name)}."
            )
