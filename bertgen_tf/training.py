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
    warmup_steps: int = 100,
    total_steps: int | None = None,
    weight_decay: float = 0.01,
) -> keras.optimizers.Optimizer:
    """AdamW as BERT is fine-tuned with: warm-up, no decay on biases and norms, clipped to norm 1.

    Args:
        learning_rate: its highest value.
        warmup_steps: steps of linear rise.
        total_steps: where the rate has fallen to 0; by default it stays at its highest value.
        weight_decay: decoupled, for kernels and embeddings only.
    """
    return BertAdamW(
        LinearWarmup(learning_rate, warmup_steps, total_steps),
        weight_decay=weight_decay,
        global_clipnorm=1.0,
    )


def default_loss() -> keras.losses.Loss:
    """Cross-entropy of logits, averaged over the real target tokens (`sample_weight` 1)."""
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )


def default_metrics() -> list[keras.metrics.Metric]:
    """The share of real target tokens that are predicted right from the true ones before them."""
    return [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]


def bucketed_dataset(
    pairs: tf.data.Dataset,
    preprocessor: Seq2SeqPreprocessor,
    batch_size: int,
    *,
    shuffle: int | None = None,
    seed: int | None = None,
    drop_remainder: bool = False,
) -> tf.data.Dataset:
    """Batches (source, target) strings of similar length, padded to few lengths.

    Each distinct shape compiles the training step once: there are at most as many lengths as
    powers of two between 16 and the preprocessor's limits.

    Args:
        pairs: unbatched dataset of (source, target) strings.
        batch_size: pairs in a batch.
        shuffle: size of the shuffle buffer, in pairs; None keeps the order within a length.
        seed: of the shuffling.
        drop_remainder: leaves out the last, smaller, batch of each length.

    Returns:
        dataset of (x, y, sample_weight) as `fit` takes it.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, received {batch_size!r}.")
    if shuffle:
        pairs = pairs.shuffle(shuffle, seed=seed)
    longest = max(preprocessor.max_source_length, preprocessor.max_target_length)
    buckets = tf.constant([2**i for i in range(4, 16) if 2**i < longest] + [longest], tf.int64)

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

        return window.ragged_batch(batch_size, drop_remainder=drop_remainder).map(pack)

    return (
        pairs.map(encode, num_parallel_calls=tf.data.AUTOTUNE)
        .group_by_window(bucket, batch, window_size=batch_size)
        .prefetch(tf.data.AUTOTUNE)
    )
