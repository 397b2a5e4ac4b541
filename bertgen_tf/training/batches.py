"""Text as datasets for `fit` and `evaluate`: batches padded to a few lengths."""

from typing import Any

import tensorflow as tf

from bertgen_tf.checks import check_integer
from bertgen_tf.network.buckets import bucket_lengths
from bertgen_tf.tokenizers.preprocessing import Seq2SeqPreprocessor


def lengths_of_batches(preprocessor: Seq2SeqPreprocessor) -> list[int]:
    """The lengths that the sources and targets of a batch may be padded to."""
    return bucket_lengths(max(preprocessor.max_source_length, preprocessor.max_target_length))


def bucketed_dataset(
    pairs: tf.data.Dataset,
    preprocessor: Seq2SeqPreprocessor,
    batch_size: int,
    *,
    shuffle: int | None = None,
    seed: int | None = None,
) -> tf.data.Dataset:
    """Batches (source, target) strings of similar length, padded to a few lengths.

    Each distinct shape compiles the training step once: there are at most as many lengths as
    powers of two between 16 and the preprocessor's limits.

    Args:
        pairs: unbatched dataset of (source, target) strings.
        batch_size: pairs in a batch.
        shuffle: size of the shuffle buffer, in pairs; None keeps the order within a length.
        seed: for shuffling.

    Returns:
        dataset of (x, y, sample_weight) as `fit` takes it.
    """
    check_integer("batch_size", batch_size)
    if not _is_text_pair(pairs.element_spec) or pairs.element_spec[0].shape.rank != 0:
        raise ValueError(
            "pairs must be a dataset of (source, target) strings, not batched yet, received "
            f"{pairs.element_spec}."
        )
    if shuffle:
        pairs = pairs.shuffle(shuffle, seed=seed)
    buckets = tf.constant(lengths_of_batches(preprocessor), tf.int64)

    def encode(source: Any, target: Any) -> tuple[Any, Any]:
        return preprocessor.encode_source(source), preprocessor.encode_target(target)

    def bucket(source_ids: Any, target_ids: Any) -> Any:
        # One more than the target's ids: the start or end token.
        length = tf.maximum(tf.size(source_ids), tf.size(target_ids) + 1)
        return tf.searchsorted(buckets, [tf.cast(length, tf.int64)], out_type=tf.int64)[0]

    def batch(key: Any, window: tf.data.Dataset) -> tf.data.Dataset:
        length = tf.cast(buckets[key], tf.int32)

        def pack(source_ids: Any, target_ids: Any) -> tuple[Any, Any, Any]:
            return preprocessor.pack(
                source_ids,
                target_ids,
                source_length=tf.minimum(length, preprocessor.max_source_length),
                target_length=tf.minimum(length, preprocessor.max_target_length),
            )

        return window.ragged_batch(batch_size).map(pack)

    return (
        pairs.map(encode, num_parallel_calls=tf.data.AUTOTUNE)
        .group_by_window(bucket, batch, window_size=batch_size)
        .prefetch(tf.data.AUTOTUNE)
    )


def text_to_dataset(
    preprocessor: Seq2SeqPreprocessor | None,
    x: Any,
    y: Any = None,
    batch_size: int | None = None,
    shuffle: bool = False,
) -> tuple[Any, Any, int | None]:
    """`(x, y, batch_size)` for Keras: text as a preprocessed dataset, all else unchanged.

    Args:
        preprocessor: the model's; None if it has none.
        x, y: lists or arrays of sources and targets, or a dataset of pairs and None.
        batch_size: for text that is not batched yet; 32 by default.
        shuffle: shuffles lists, as Keras does with arrays.
    """
    if _is_text(x) and _is_text(y):
        if len(x) != len(y):
            raise ValueError(
                f"x and y must hold as many sources as targets, received {len(x)} and {len(y)}."
            )
        dataset = tf.data.Dataset.from_tensor_slices((list(x), list(y)))
        x = dataset.shuffle(len(y)) if shuffle else dataset
        y = None
    spec = x.element_spec if isinstance(x, tf.data.Dataset) else None
    if not _is_text_pair(spec):
        if any(getattr(part, "dtype", None) == tf.string for part in tf.nest.flatten(spec)):
            raise ValueError(
                f"A dataset of text must give pairs (source, target), received {spec}."
            )
        return x, y, batch_size
    if preprocessor is None:
        raise ValueError(
            "A dataset of text needs a tokenizer, and this model has none. Pass tokenizer= to "
            "EncoderDecoderModel, or preprocess the dataset."
        )
    if spec[0].shape.rank == 0:
        x = x.batch(batch_size or 32)
    x = x.map(preprocessor, num_parallel_calls=tf.data.AUTOTUNE)
    return x.prefetch(tf.data.AUTOTUNE), None, None


def _is_text_pair(spec: Any) -> bool:
    return (
        isinstance(spec, tuple)
        and len(spec) == 2
        and all(getattr(part, "dtype", None) == tf.string for part in spec)
    )


def _is_text(values: Any) -> bool:
    # An array or a pandas column of Python strings has the kind "O".
    kind = getattr(getattr(values, "dtype", None), "kind", None)
    if kind == "O" or isinstance(values, list | tuple):
        return len(values) > 0 and all(isinstance(value, str | bytes) for value in values)
    return kind in ("U", "S")
