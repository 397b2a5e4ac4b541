"""Defaults of `compile` (loss and metrics) and bucketed datasets for `fit`."""

from typing import Any

import keras
import tensorflow as tf

from bertgen_tf.checks import check_integer
from bertgen_tf.network.buckets import bucket_lengths
from bertgen_tf.tokenizers.preprocessing import Seq2SeqPreprocessor


@keras.saving.register_keras_serializable("bertgen_tf", "SmoothedCrossEntropy")
class SmoothedCrossEntropy(keras.losses.Loss):
    """Cross-entropy of logits with smoothed labels, averaged over the weights.

    A share of each label, `label_smoothing`, is spread evenly over the vocabulary, itself included,
    as in `keras.losses.CategoricalCrossentropy` and PyTorch's `cross_entropy`. Labels stay ids:
    there is no tensor of one-hot labels [B, T, V].

    Args:
        label_smoothing: from 0 to below 1.
    """

    def __init__(
        self,
        label_smoothing: float = 0.1,
        name: str = "smoothed_cross_entropy",
        reduction: str = "mean_with_sample_weight",
        **kwargs: Any,
    ):
        super().__init__(name=name, reduction=reduction, **kwargs)
        if not 0 <= label_smoothing < 1:
            raise ValueError(
                f"label_smoothing must be at least 0 and below 1, received {label_smoothing!r}."
            )
        self.label_smoothing = label_smoothing

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Labels int [..., T] and float32 logits [..., T, V]: losses, float32 [..., T]."""
        labels = tf.cast(y_true, tf.int32)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=y_pred)
        even = tf.reduce_logsumexp(y_pred, axis=-1) - tf.reduce_mean(y_pred, axis=-1)
        return (1 - self.label_smoothing) * losses + self.label_smoothing * even

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "label_smoothing": self.label_smoothing}


def default_loss(label_smoothing: float = 0.0) -> keras.losses.Loss:
    """Cross-entropy of logits, averaged over the real target tokens (`sample_weight` 1).

    Args:
        label_smoothing: the share of each label that is spread over the vocabulary, such as 0.1.
            `evaluate` and validation give the smoothed loss, too, which then does not go to 0.

    Returns:
        a loss of labels, int [B, T], and logits, float32 [B, T, V], with `sample_weight` [B, T]: a
        scalar.

    Raises:
        ValueError: `label_smoothing` is not at least 0 and below 1.
    """
    if label_smoothing:
        return SmoothedCrossEntropy(label_smoothing)
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )


def share_of_replica(loss: Any, of: Any, sample_weight: Any) -> Any:
    """A replica's loss, so that those of all add up to the mean over the tokens of all.

    Keras gives each replica's mean the same weight, whatever tokens it has.

    Args:
        loss: of Keras's `compute_loss`: the mean of a replica, divided by their number.
        of: the loss function. Only those whose `reduction` is "mean_with_sample_weight" change.
        sample_weight: [B, T] of the replica's rows.
    """
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    mean = getattr(of, "reduction", None) == "mean_with_sample_weight"
    context = tf.distribute.get_replica_context()
    # Without a context Keras only traces what there is to build.
    if replicas == 1 or context is None or sample_weight is None or not mean:
        return loss
    own = tf.reduce_sum(sample_weight)
    total = context.all_reduce(tf.distribute.ReduceOp.SUM, own)
    return loss * replicas * tf.math.divide_no_nan(own, total)


@keras.saving.register_keras_serializable("bertgen_tf", "TokenAccuracy")
class TokenAccuracy(keras.metrics.SparseCategoricalAccuracy):
    """The share of tokens that are right, each of the same weight.

    Keras's own has a token of a longer batch count less.
    """

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Labels [B, T], logits [B, T, V] and weights [B, T]."""
        if sample_weight is not None:
            sample_weight = tf.reshape(sample_weight, [-1])
        y_pred = tf.reshape(y_pred, [-1, y_pred.shape[-1]])
        super().update_state(tf.reshape(y_true, [-1]), y_pred, sample_weight)


def default_metrics() -> list[keras.metrics.Metric]:
    """The share of real target tokens that are predicted right from the true ones before them."""
    return [TokenAccuracy(name="accuracy")]


def lengths_of_batches(preprocessor: Seq2SeqPreprocessor) -> list[int]:
    """What sources and targets of a batch are padded to, of both the longest."""
    return bucket_lengths(max(preprocessor.max_source_length, preprocessor.max_target_length))


def bucketed_dataset(
    pairs: tf.data.Dataset,
    preprocessor: Seq2SeqPreprocessor,
    batch_size: int,
    *,
    shuffle: int | None = None,
    seed: int | None = None,
) -> tf.data.Dataset:
    """Batches (source, target) strings of similar length, padded to few lengths.

    Each distinct shape compiles the training step once: there are at most as many lengths as
    powers of two between 16 and the preprocessor's limits.

    Args:
        pairs: unbatched dataset of (source, target) strings.
        batch_size: pairs in a batch.
        shuffle: size of the shuffle buffer, in pairs; None keeps the order within a length.
        seed: of the shuffling.

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
    """`(x, y, batch_size)` for Keras: text as a preprocessed dataset, all else as it is.

    Args:
        preprocessor: of the model; None if it has none.
        x, y: lists or arrays of sources and targets, or a dataset of pairs and None.
        batch_size: of text that is not batched yet; 32 by default.
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
