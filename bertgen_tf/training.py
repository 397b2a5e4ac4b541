"""Defaults of `compile` (optimizer, loss, metrics) and bucketed datasets for `fit`."""

from typing import Any

import keras
import tensorflow as tf

from bertgen_tf.preprocessing import Seq2SeqPreprocessor


@keras.saving.register_keras_serializable("bertgen_tf", "LinearWarmup")
class LinearWarmup(keras.optimizers.schedules.LearningRateSchedule):
    """Rises linearly over `warmup_steps`, then stays, or falls linearly to 0 at `total_steps`.

    BERT's fine-tuning schedule (`google-research/bert` `optimization.py`).
    """

    def __init__(self, learning_rate: float, warmup_steps: int = 0, total_steps: int | None = None):
        if learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, received {learning_rate!r}.")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, received {warmup_steps!r}.")
        if total_steps is not None and total_steps <= warmup_steps:
            raise ValueError(
                f"total_steps must be above warmup_steps ({warmup_steps}), "
                f"received {total_steps!r}."
            )
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps

    def __call__(self, step: Any) -> Any:
        step = tf.cast(step, tf.float32)
        # Step 0 already learns.
        rate = tf.minimum(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.total_steps is not None:
            left = (self.total_steps - step) / (self.total_steps - self.warmup_steps)
            rate = tf.minimum(rate, tf.maximum(left, 0.0))
        return self.learning_rate * rate

    def get_config(self) -> dict[str, Any]:
        return {
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.total_steps,
        }


@keras.saving.register_keras_serializable("bertgen_tf", "BertAdamW")
class BertAdamW(keras.optimizers.AdamW):
    """AdamW without weight decay of biases and layer normalisation, also after it was reloaded.

    Keras's own AdamW forgets in a file what it excludes.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])


def default_optimizer(
    learning_rate: float = 1e-4,
    *,
    warmup_steps: int = 0,
    total_steps: int | None = None,
    weight_decay: float = 0.01,
) -> keras.optimizers.Optimizer:
    """AdamW as BERT is fine-tuned with: no decay on biases and norms, clipped to norm 1.

    Args:
        learning_rate: its highest value.
        warmup_steps: steps of linear rise.
        total_steps: where the rate has fallen to 0; by default it stays at its highest value.
            Callbacks that set the rate, such as `ReduceLROnPlateau`, need it constant: without
            warm-up and fall.
        weight_decay: decoupled, for kernels and embeddings only.
    """
    # Built in any case, because it checks the values.
    schedule = LinearWarmup(learning_rate, warmup_steps, total_steps)
    return BertAdamW(
        schedule if warmup_steps or total_steps else learning_rate,
        weight_decay=weight_decay,
        global_clipnorm=1.0,
    )


def default_loss() -> keras.losses.Loss:
    """Cross-entropy of logits, averaged over the real target tokens (`sample_weight` 1)."""
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


def default_metrics() -> list[keras.metrics.Metric]:
    """The share of real target tokens that are predicted right from the true ones before them."""
    return [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]


def bucket_lengths(preprocessor: Seq2SeqPreprocessor) -> list[int]:
    """Lengths that batches are padded to: the powers of two from 16 on, and the longest."""
    longest = max(preprocessor.max_source_length, preprocessor.max_target_length)
    return [2**i for i in range(4, 16) if 2**i < longest] + [longest]


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
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, received {batch_size!r}.")
    if not _is_text_pair(pairs.element_spec) or pairs.element_spec[0].shape.rank != 0:
        raise ValueError(
            "pairs must be a dataset of (source, target) strings, not batched yet, received "
            f"{pairs.element_spec}."
        )
    if shuffle:
        pairs = pairs.shuffle(shuffle, seed=seed)
    buckets = tf.constant(bucket_lengths(preprocessor), tf.int64)

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
