"""Sizes that sources and prompts are padded to: few, as a search is compiled for each."""

from typing import TYPE_CHECKING, Any

import tensorflow as tf

from bertgen_tf.network.buckets import bucket_lengths

if TYPE_CHECKING:
    from bertgen_tf.models.encoder_decoder import EncoderDecoderModel


def source_buckets(model: "EncoderDecoderModel") -> list[int]:
    """The lengths that XLA compiles for."""
    return bucket_lengths(model.encoder.config.max_source_positions)


def _prompt_buckets(model: "EncoderDecoderModel") -> list[int]:
    longest = model.decoder.config.max_target_positions
    return [1, *bucket_lengths(longest, 8)] if longest > 1 else [1]


def prompt_width(model: "EncoderDecoderModel", decoder_input_ids: Any) -> int:
    """The bucket of prompts [B, P]."""
    shape = decoder_input_ids.shape
    length = shape[1] if len(shape) == 2 else None
    buckets = _prompt_buckets(model)
    if length is None or not 1 <= length <= buckets[-1]:
        raise ValueError(
            "decoder_input_ids must have the shape [batch, length], start token first, with a "
            f"known length of 1 to {buckets[-1]} tokens, received {shape}."
        )
    return min(bucket for bucket in buckets if bucket >= length)


def bucket_of(size: tf.Tensor, buckets: list[int]) -> tf.Tensor:
    """The smallest bucket that holds `size`; a larger size stays unchanged."""
    table = tf.constant(buckets)
    index = tf.searchsorted(table, [size])[0]
    return tf.maximum(table[tf.minimum(index, len(buckets) - 1)], size)
