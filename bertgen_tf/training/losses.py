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
        if tf.config.list_physical_devices("GPU") or tf.config.list_physical_devices("TPU"):
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=y_pred)
            if not self.label_smoothing:
                return losses
            even = tf.reduce_logsumexp(y_pred, axis=-1) - tf.reduce_mean(y_pred, axis=-1)
            return (1 - self.label_smoothing) * losses + self.label_smoothing * even
        rows = tf.reshape(tf.convert_to_tensor(y_pred), [-1, y_pred.shape[-1]])
        losses = _cross_entropy(rows, tf.reshape(labels, [-1]), self.label_smoothing)
        return tf.reshape(losses, tf.shape(labels))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "label_smoothing": self.label_smoothing}


def _cross_entropy(logits: Any, labels: Any, smoothing: float) -> Any:
    """Smoothed cross-entropy of logits [N, V] and labels int [N]: [N].

    Twice as fast on a CPU as TensorFlow's op, which does not use oneDNN, and has the gradient made
    by a product of its own.
    """
    places = tf.stack([tf.range(tf.size(labels)), labels], axis=1)  # [N, 2]

    @tf.custom_gradient
    def losses(logits: Any) -> tuple[Any, Any]:
        probabilities = tf.nn.softmax(logits)
        # Logsumexp by the largest probability, which is never rounded to 0. The graph's optimizer
        # makes one of this argmax and that of `TokenAccuracy`.
        best = tf.argmax(logits, axis=-1, output_type=tf.int32)
        best = tf.stack([tf.range(tf.size(labels)), best], axis=1)
        total = tf.gather_nd(logits, best) - tf.math.log(tf.gather_nd(probabilities, best))
        expected = (1 - smoothing) * tf.gather_nd(logits, places)
        if smoothing:
            expected += smoothing * tf.reduce_mean(logits, axis=-1)

        def gradient(upstream: Any) -> Any:
            each = probabilities
            if smoothing:
                each -= smoothing / logits.shape[-1]
            each *= upstream[:, None]
            return tf.tensor_scatter_nd_sub(each, places, (1 - smoothing) * upstream)

        return total - expected, gradient

    return losses(logits)


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
    return SmoothedCrossEntropy(label_smoothing)


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

    In Keras's own, a token of a longer batch counts less, and finding the largest logit copies all
    of them several times, to tell 0 from -0.
    """

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Labels [B, T], logits [B, T, V] and weights [B, T]."""
        if sample_weight is not None:
            sample_weight = tf.reshape(sample_weight, [-1])
        rows = tf.reshape(tf.convert_to_tensor(y_pred), [-1, y_pred.shape[-1]])
        best = tf.argmax(rows, axis=-1, output_type=tf.int32)
        right = tf.equal(tf.reshape(tf.cast(y_true, tf.int32), [-1]), best)
        keras.metrics.Mean.update_state(self, tf.cast(right, tf.float32), sample_weight)


def default_metrics() -> list[keras.metrics.Metric]:
    """The share of real target tokens predicted correctly from the true ones before them."""
    return [TokenAccuracy(name="accuracy")]
