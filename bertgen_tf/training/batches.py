"""Text as datasets for `fit` and `evaluate`: batches padded to a few lengths."""

import math
import reprlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from bertgen_tf.checks import check_integer, check_number
from bertgen_tf.data.texts import is_text
from bertgen_tf.network.buckets import bucket_lengths
from bertgen_tf.tokenizers.preprocessing import Seq2SeqPreprocessor
from bertgen_tf.training.pairs import Pairs, read_pairs

DEFAULT_BATCH = 32  # Keras's
# A dataset has these in itself.
_NO_ARRAYS = {"y": None, "sample_weight": None, "batch_size": None}


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


def fit_arguments(
    preprocessor: Seq2SeqPreprocessor | None, given: dict[str, Any]
) -> dict[str, Any]:
    """What replaces the arguments of Keras's `fit` that hold text: preprocessed datasets.

    Args:
        preprocessor: the model's; None if it has none.
        given: the arguments by name.

    Raises:
        TypeError, ValueError: the text, or an argument, does not fit.
    """
    changes: dict[str, Any] = {}
    batch_size = given.get("batch_size")
    validation = given.get("validation_data")
    pairs = read_pairs(given.get("x"), given.get("y"), given.get("sample_weight"))
    if pairs is not None:
        _check_class_weight(given.get("class_weight"))
        split = given.get("validation_split") or 0.0
        if split and validation is None:
            pairs, held_out = _hold_out(pairs, split)
            size = given.get("validation_batch_size") or batch_size
            changes["validation_data"] = pairs_to_dataset(preprocessor, held_out, size)
        shuffle = bool(given.get("shuffle", True))
        changes |= {
            **_NO_ARRAYS,
            "x": pairs_to_dataset(preprocessor, pairs, batch_size, shuffle),
            "shuffle": False,
            "validation_split": 0.0,
        }
    elif isinstance(given.get("x"), tf.data.Dataset):
        # Keras would warn about its own default, because datasets are shuffled beforehand.
        changes["shuffle"] = given.get("shuffle", False)
        changes |= _dataset_arguments(preprocessor, given)
    elif (batches := _batches("x", preprocessor, given.get("x"))) is not None:
        changes["x"] = batches
    if validation is not None:
        size = given.get("validation_batch_size") or batch_size
        columns = validation if isinstance(validation, tuple) else (validation,)
        held_out = read_pairs(*columns, prefix="validation_data's ") if len(columns) < 4 else None
        if held_out is not None:
            changes["validation_data"] = pairs_to_dataset(preprocessor, held_out, size)
        elif _is_text_spec(validation):
            changes["validation_data"] = preprocess(preprocessor, validation, size)
        elif (batches := _batches("validation_data", preprocessor, validation)) is not None:
            changes["validation_data"] = batches
    return changes


def evaluate_arguments(
    preprocessor: Seq2SeqPreprocessor | None, given: dict[str, Any]
) -> dict[str, Any]:
    """The same for Keras's `evaluate`."""
    pairs = read_pairs(given.get("x"), given.get("y"), given.get("sample_weight"))
    if pairs is None:
        batches = _batches("x", preprocessor, given.get("x"))
        return _dataset_arguments(preprocessor, given) if batches is None else {"x": batches}
    return {**_NO_ARRAYS, "x": pairs_to_dataset(preprocessor, pairs, given.get("batch_size"))}


def batch_arguments(
    preprocessor: Seq2SeqPreprocessor | None,
    x: Any,
    y: Any,
    sample_weight: Any,
    class_weight: Any = None,
) -> tuple[Any, Any, Any]:
    """The data arguments of Keras's `train_on_batch`: text as a batch of the maximal lengths."""
    pairs = read_pairs(x, y, sample_weight)
    if pairs is None:
        return x, y, sample_weight
    _check_class_weight(class_weight)
    x, y, weights = _check_preprocessor(preprocessor)(
        tf.constant(pairs.sources), tf.constant(pairs.targets)
    )
    return x, y, weights if pairs.weights is None else weights * pairs.weights[:, np.newaxis]


def pairs_to_dataset(
    preprocessor: Seq2SeqPreprocessor | None,
    pairs: Pairs,
    batch_size: int | None = None,
    shuffle: bool = False,
) -> tf.data.Dataset:
    """Preprocessed batches, by default of 32; `shuffle` gives every epoch an order of its own."""
    columns = [column for column in pairs if column is not None]
    dataset = tf.data.Dataset.from_tensor_slices(tuple(columns))
    if shuffle:
        dataset = dataset.shuffle(len(pairs.sources))
    return preprocess(preprocessor, dataset, batch_size)


def preprocess(
    preprocessor: Seq2SeqPreprocessor | None,
    dataset: tf.data.Dataset,
    batch_size: int | None = None,
) -> tf.data.Dataset:
    """A dataset of texts as one of (x, y, sample_weight).

    Args:
        preprocessor: the model's; None if it has none.
        dataset: of (source, target) or (source, target, weight), batched or not.
        batch_size: for one that is not batched yet; 32 by default.
    """
    encode = _check_preprocessor(preprocessor)
    if dataset.element_spec[0].shape.rank == 0:
        dataset = dataset.batch(DEFAULT_BATCH if batch_size is None else batch_size)
    elif batch_size is not None:
        raise ValueError(
            f"batch_size is for text that is not batched yet, received {batch_size} and a dataset "
            "of batches: leave it out."
        )

    def to_batch(source: Any, target: Any, weight: Any = None) -> tuple[Any, Any, Any]:
        x, y, token_weight = encode(source, target)
        if weight is not None:
            token_weight *= tf.cast(weight, token_weight.dtype)[:, tf.newaxis]
        return x, y, token_weight

    return dataset.map(to_batch, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def holds_text(data: Any) -> bool:
    """Whether Keras's argument x holds text in some form."""
    if isinstance(data, tf.data.Dataset):
        return any(
            getattr(part, "dtype", None) == tf.string for part in tf.nest.flatten(data.element_spec)
        )
    return is_text(data) or (isinstance(data, list | tuple) and len(data) > 0 and is_text(data[0]))


def _batches(name: str, preprocessor: Seq2SeqPreprocessor | None, data: Any) -> Any:
    """What a generator gives, ids for text; None for what is no generator."""

    def encoded(batch: Any) -> Any:
        if not isinstance(batch, tuple) or not 2 <= len(batch) <= 3:
            return batch
        if any(isinstance(part, str | bytes) for part in batch):
            raise TypeError(
                f"{name} must give batches if it is a generator, received one of single texts: "
                "pass list(...) of it."
            )
        return batch_arguments(preprocessor, *(*batch, None)[:3])

    if isinstance(data, keras.utils.PyDataset) and holds_text(data[0]):
        raise TypeError(
            f"{name} must give ids, not text, if it is a PyDataset, received "
            f"{type(data).__name__}: pass a tf.data.Dataset of texts, or encode them with the "
            "preprocessor."
        )
    return map(encoded, data) if isinstance(data, Iterator) else None


def _dataset_arguments(
    preprocessor: Seq2SeqPreprocessor | None, given: dict[str, Any]
) -> dict[str, Any]:
    """What replaces the arguments with a dataset of texts; nothing for other data."""
    if not _is_text_spec(given.get("x")):
        return {}
    for name in ("y", "sample_weight", "class_weight"):
        if given.get(name) is not None:
            raise ValueError(
                f"{name} must be left out with a dataset of text, received a "
                f"{type(given[name]).__name__}: the dataset gives (source, target), or "
                "(source, target, weight)."
            )
    return {**_NO_ARRAYS, "x": preprocess(preprocessor, given["x"], given.get("batch_size"))}


def _is_text_spec(data: Any) -> bool:
    """Whether it is a dataset of texts; a ValueError if these are no pairs."""
    if not isinstance(data, tf.data.Dataset) or not holds_text(data):
        return False
    spec = data.element_spec
    columns = spec if isinstance(spec, tuple) else ()
    if (
        not _is_text_pair(columns[:2])
        or len(columns) > 3
        or any(getattr(column, "dtype", tf.string) == tf.string for column in columns[2:])
    ):
        raise ValueError(
            "A dataset of text must give pairs (source, target), or (source, target, weight), "
            f"received {reprlib.repr(spec)}."
        )
    return True


def _is_text_pair(spec: Any) -> bool:
    return (
        isinstance(spec, tuple)
        and len(spec) == 2
        and all(getattr(part, "dtype", None) == tf.string for part in spec)
    )


def _hold_out(pairs: Pairs, share: Any) -> tuple[Pairs, Pairs]:
    """Keras's `validation_split`: the last pairs, before any shuffling."""
    count = len(pairs.sources)
    place = math.floor(count * (1 - check_number("validation_split", share)))
    if not 0 < place < count:
        raise ValueError(
            f"validation_split must leave pairs on both sides, received {share!r} of {count} pairs."
        )
    return pairs.split(place)


def _check_class_weight(class_weight: Any) -> None:
    if class_weight is not None:
        raise ValueError(
            "class_weight is not for text, whose classes are word pieces, received "
            f"{reprlib.repr(class_weight)}: pass sample_weight, one of each pair."
        )


def _check_preprocessor(preprocessor: Seq2SeqPreprocessor | None) -> Seq2SeqPreprocessor:
    if preprocessor is None:
        raise ValueError(
            "Text needs a tokenizer, and this model has none. Pass tokenizer= to "
            "EncoderDecoderModel, or preprocess the text."
        )
    return preprocessor
