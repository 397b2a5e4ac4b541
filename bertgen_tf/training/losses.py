"""Losses and metrics: the defaults of `compile`."""

from typing import Any

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("bertgen_tf", "SmoothedCrossEntropy")
class SmoothedCrossEntropy(keras.losses.Loss):
    """Cross-entropy of logits with smoothed labels, averaged over the weights.

    A share of each label, `label_smoothing`, is spread evenly over the vocabulary, itself included,
    as in `keras.losses.CategoricalCrossentropy` and PyTorch's `cross_entropy`. Labels stay ids:
    there is no tensor of one-hot labels [B, T, V].

    Args:
        label_smoothing: at least 0 and below 1.
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
            `evaluate` and validation also give the smoothed loss, which then does not go to 0.

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
    """A replica's loss, scaled so that the sum over replicas is the mean over all tokens.

    Keras gives each replica's mean the same weight, however many tokens it has.

    Args:
        loss: of Keras's `compute_loss`: the replica's mean, divided by the number of replicas.
        of: the loss function. Only those whose `reduction` is "mean_with_sample_weight" change.
        sample_weight: [B, T] of the replica's rows.
    """
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    mean = getattr(of, "reduction", None) == "mean_with_sample_weight"
    context = tf.distribute.get_replica_context()
    # Without a context, Keras only traces to build.
    if replicas == 1 or context is None or sample_weight is None or not mean:
        return loss
    own = tf.reduce_sum(sample_weight)
    total = context.all_reduce(tf.distribute.ReduceOp.SUM, own)
    return loss * replicas * tf.math.divide_no_nan(own, total)


@keras.saving.register_keras_serializable("bertgen_tf", "TokenAccuracy")
class TokenAccuracy(keras.metrics.SparseCategoricalAccuracy):
    """The share of tokens that are predicted correctly, all weighted equally.

    In Keras's own, a token of a longer batch counts less.
    """

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Labels [B, T], logits [B, T, V] and weights [B, T]."""
        if sample_weight is not None:
            sample_weight = tf.reshape(sample_weight, [-1])
        y_pred = tf.reshape(y_pred, [-1, y_pred.shape[-1]])
        super().update_state(tf.reshape(y_true, [-1]), y_pred, sample_weight)


def default_metrics() -> list[keras.metrics.Metric]:
    """The share of real target tokens predicted correctly from the true ones before them."""
    return [TokenAccuracy(name="accuracy")]
