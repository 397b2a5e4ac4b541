"""Layers of BERT's transformer and of GPT-2's, for both full sequences and cached decoding.

Source: Devlin et al. 2018 (`google-research/bert` `modeling.py`); cross-attention as in Rothe,
Narayan, Severyn 2020; `norm_first` as in Radford et al. 2019 (`openai/gpt-2` `model.py`). Letters
in shape comments: B batch, T query length, S key length, H hidden size, A attention heads, D size
of a head (H = A * D), V vocabulary.

Softmax and layer normalisation compute in float32 under every dtype policy.
"""

from typing import Any

import keras
import tensorflow as tf
from keras import ops

from bertgen_tf.config import BertGenerationConfig
from bertgen_tf.network.projections import Projection, dense, initializer, linear
from bertgen_tf.network.tracing import transpose, unfold_rows
from bertgen_tf.network.weights import FiniteWeights

# Finite, so that no row of scores can turn into NaN.
MASKED_SCORE = -1e9


def activation(name: str) -> Any:
    """The activation function of a `hidden_act` value: "gelu" is exact (erf), "gelu_new" tanh."""
    return {
        "gelu": lambda x: keras.activations.gelu(x, approximate=False),
        "gelu_new": lambda x: keras.activations.gelu(x, approximate=True),
        "relu": keras.activations.relu,
    }[name]


def before_sublayer(layer: Any, hidden: Any) -> Any:
    """What attention or feed-forward reads: `hidden`, normalised if `norm_first`."""
    return layer.layer_norm(hidden) if layer.config.norm_first else hidden


def after_sublayer(layer: Any, hidden: Any, output: Any, training: bool | None) -> Any:
    """The residual connection, and normalisation unless `norm_first`."""
    hidden = hidden + layer.dropout(output, training=training)
    return hidden if layer.config.norm_first else layer.layer_norm(hidden)


class LayerNormalization(FiniteWeights, keras.layers.LayerNormalization):
    """Keras's, which refuses weights that are not finite."""


class Embedding(FiniteWeights, keras.layers.Embedding):
    """Keras's, which refuses weights that are not finite."""


def final_norm(config: BertGenerationConfig, policy: Any) -> keras.layers.Layer | None:
    """The layer with which a stack with `norm_first` normalises its output."""
    if not config.norm_first:
        return None
    return LayerNormalization(epsilon=config.layer_norm_eps, name="final_norm", dtype=policy)


class Embeddings(keras.layers.Layer):
    """Word and position embeddings, summed, normalised: int [B, T] -> [B, T, H].

    With `norm_first` they are not normalised: the first block does that.

    BERT's token types are not here: type 0 is folded into the positions when weights are read.

    Args:
        config: sizes.
        word_embeddings: the `Embedding` of another stack to read from, which makes
            the two stacks share one matrix; by default the layer has its own.
    """

    def __init__(
        self,
        config: BertGenerationConfig,
        word_embeddings: Embedding | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.config = config
        self.word_embeddings = word_embeddings or Embedding(
            config.vocab_size,
            config.hidden_size,
            embeddings_initializer=initializer(config),
            name="word_embeddings",
            dtype=self.dtype_policy,
        )
        self.position_embeddings = Embedding(
            config.max_position_embeddings,
            config.hidden_size,
            embeddings_initializer=initializer(config),
            name="position_embeddings",
            dtype=self.dtype_policy,
        )
        self.layer_norm = None
        if not config.norm_first:
            self.layer_norm = LayerNormalization(
                epsilon=config.layer_norm_eps, name="layer_norm", dtype=self.dtype_policy
            )
        self.dropout = keras.layers.Dropout(config.hidden_dropout_prob, dtype=self.dtype_policy)

    def build(self, input_shape: Any = None) -> None:
        if not self.word_embeddings.built:
            self.word_embeddings.build()
        self.position_embeddings.build()
        if self.layer_norm is not None:
            self.layer_norm.build((None, None, self.config.hidden_size))

    def call(self, input_ids: Any, first_position: Any = 0, training: bool | None = None) -> Any:
        # One first position, or one for each row [B, 1].
        positions = first_position + ops.arange(ops.shape(input_ids)[1])
        hidden = self.word_embeddings(input_ids) + self.position_embeddings(positions)
        if self.layer_norm is not None:
            hidden = self.layer_norm(hidden)
        return self.dropout(hidden, training=training)


class Attention(keras.layers.Layer):
    """Multi-head attention with its residual connection and layer normalisation.

    What self-attention and cross-attention have in common, for whole sequences and for cached
    decoding. Keys and values are a pair of tensors [B, A, S, D] each.
    """

    def __init__(self, config: BertGenerationConfig, **kwargs: Any):
        super().__init__(**kwargs)
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        policy = self.dtype_policy
        self.attention_dropout = keras.layers.Dropout(
            config.attention_probs_dropout_prob, dtype=policy
        )
        self.output_dense = dense(config.hidden_size, config, "output_dense", policy)
        self.dropout = keras.layers.Dropout(config.hidden_dropout_prob, dtype=policy)
        self.layer_norm = LayerNormalization(
            epsilon=config.layer_norm_eps, name="layer_norm", dtype=policy
        )

    def build(self, input_shape: Any = None) -> None:
        for layer in self._flatten_layers(include_self=False, recursive=False):
            layer.build((None, None, self.config.hidden_size))

    def attend(
        self,
        hidden: Any,
        queries: Any,
        keys_values: tuple[Any, Any],
        attention_mask: Any,
        training: bool | None,
        prefix: tuple[Any, Any] | None = None,
        prefix_mask: Any = None,
    ) -> tuple[Any, Any]:
        """Attention over one pair of keys and values per example, for all its rows.

        Args:
            hidden: [B * K, T, H], to which the result is added.
            queries: [B * K, T, H]; the K rows of an example are adjacent.
            keys_values: [B, A, S, D] each.
            attention_mask: None or bool, broadcast to [B, A, K * T, S].
            prefix, prefix_mask: a second pair [B, A, P, D], before the first, with its mask.

        Returns:
            the new hidden states, and the attention weights, float32 [B, A, K * T, S], or those of
            the prefix [B, A, K * T, P].
        """
        keys, values = keys_values
        # The rows of one example share its keys: they are folded into the query axis.
        folded = (ops.shape(keys)[0], -1, self.num_heads, self.head_size)
        queries = transpose(ops.reshape(queries, folded), (0, 2, 1, 3))  # [B, A, K*T, D]
        scores = self._scores(queries, keys, attention_mask)  # [B, A, K*T, S]
        if prefix is not None:
            scores = ops.concatenate([self._scores(queries, prefix[0], prefix_mask), scores], -1)
        weights = tf.nn.softmax(scores)
        if attention_mask is not None and prefix is None:
            # A query that can see nothing (an empty source) gets zeros, however long the padding.
            weights = weights * ops.cast(ops.any(attention_mask, axis=-1, keepdims=True), "float32")
        dropped = self.attention_dropout(ops.cast(weights, values.dtype), training=training)
        if prefix is None:
            context = tf.matmul(dropped, values)
        else:
            # Two products, so that a generation step need not copy a long pair in front of a short
            # one.
            size = ops.shape(prefix[1])[2]
            context = tf.matmul(dropped[..., :size], prefix[1])
            context += tf.matmul(dropped[..., size:], values)
            weights = weights[..., :size]
        context = transpose(context, (0, 2, 1, 3))  # [B, K*T, A, D]
        rows = tf.reshape(context, [-1, self.config.hidden_size])
        output = self.output_dense(unfold_rows(rows, hidden))
        return after_sublayer(self, hidden, output, training), weights

    def _scores(self, queries: Any, keys: Any, mask: Any) -> Any:
        scores = tf.matmul(queries, keys, transpose_b=True)
        scores = ops.cast(scores, "float32") / self.head_size**0.5
        return scores if mask is None else ops.where(mask, scores, MASKED_SCORE)

    def split_heads(self, tensor: Any, rows: Any = None) -> Any:
        """[B, S, H] -> [B, A, S, D].

        With `rows`, a tensor [rows * K, T, H] has K rows for each of `rows` examples, which become
        slots: [rows, A, T * K, D].
        """
        batch, length, _ = ops.shape(tensor)
        if rows is None:
            tensor = ops.reshape(tensor, (batch, length, self.num_heads, self.head_size))
            return transpose(tensor, (0, 2, 1, 3))
        if tensor.shape[1] == 1:
            tensor = ops.reshape(tensor, (rows, -1, self.num_heads, self.head_size))
            return transpose(tensor, (0, 2, 1, 3))  # [rows, A, K, D]
        tensor = ops.reshape(tensor, (rows, -1, length, self.num_heads, self.head_size))
        tensor = transpose(tensor, (0, 3, 2, 1, 4))  # [rows, A, T, K, D]
        return ops.reshape(tensor, (rows, self.num_heads, -1, self.head_size))

    def join_heads(self, tensor: Any) -> Any:
        """[B, A, S, D] -> [B, S, H]."""
        batch, _, length, _ = ops.shape(tensor)
        return ops.reshape(
            transpose(tensor, (0, 2, 1, 3)), (batch, length, self.config.hidden_size)
        )


class SelfAttention(Attention):
    """Attention of a sequence to itself, or to its past.

    **Cache contract.** The cache is a pair of buffers [B, A, S, D] with one row per example and
    S = length * K slots: slot `i * K + k` is position i as beam k wrote it. A call writes its T
    positions from `index` on and returns the new pair. When beams change places, the buffers stay
    unchanged; the mask says which slots are a beam's own past.
    """

    def __init__(self, config: BertGenerationConfig, **kwargs: Any):
        super().__init__(config, **kwargs)
        # One product for all three: a generation step has few rows, and reads it at full speed.
        self.query_key_value = dense(
            3 * config.hidden_size,
            config,
            "query_key_value",
            self.dtype_policy,
            parts=3,
        )
        self.query, self.key, self.value = (
            Projection(self.query_key_value, number, name=name)
            for number, name in enumerate(("query", "key", "value"))
        )

    def call(
        self,
        hidden: Any,
        attention_mask: Any = None,
        cache: tuple[Any, Any] | None = None,
        index: Any = 0,
        prefix: tuple[Any, Any] | None = None,
        cross_mask: Any = None,
        training: bool | None = None,
    ) -> tuple[Any, tuple[Any, Any], Any]:
        """Hidden [B * K, T, H], mask bool, broadcast to [B, A, K * T, S].

        `prefix` and its `cross_mask` are those of `attend`; an argument `prefix_mask` would be
        filled in by Keras.

        Returns:
            the new hidden states; the pair that was read: the extended cache, or without a cache
            the keys and values of `hidden`; the attention weights, of the prefix if there is one.
        """
        inputs = before_sublayer(self, hidden)
        queries, keys, values = ops.split(self.query_key_value(inputs), 3, axis=-1)
        rows = None if cache is None else ops.shape(cache[0])[0]
        pair = self.split_heads(keys, rows), self.split_heads(values, rows)
        if cache is not None:
            pair = write_cache(cache, pair, index * (ops.shape(hidden)[0] // rows))
        hidden, weights = self.attend(
            hidden, queries, pair, attention_mask, training, prefix, cross_mask
        )
        return hidden, pair, weights


class CrossAttention(Attention):
    """Attention to the encoder's output.

    Its keys and values are projected once. They have one row per example; `hidden` may have K
    adjacent rows per example (the beams), which all attend to the same keys without a copy of them.
    """

    def __init__(self, config: BertGenerationConfig, **kwargs: Any):
        super().__init__(config, **kwargs)
        size, policy = config.hidden_size, self.dtype_policy
        self.query = dense(size, config, "query", policy)
        self.key_value = dense(2 * size, config, "key_value", policy, parts=2)
        self.key, self.value = (
            Projection(self.key_value, number, name=name)
            for number, name in enumerate(("key", "value"))
        )

    def project(self, memory: Any) -> tuple[Any, Any]:
        """Keys and values of `memory` [B, S, H]: two tensors [B, A, S, D]."""
        keys, values = ops.split(self.key_value(memory), 2, axis=-1)
        return self.split_heads(keys), self.split_heads(values)

    def call(
        self,
        hidden: Any,
        keys_values: tuple[Any, Any],
        attention_mask: Any = None,
        training: bool | None = None,
    ) -> tuple[Any, Any]:
        """Hidden [B * K, T, H], mask bool, broadcast to [B, A, K * T, S].

        Returns:
            the new hidden states, and the attention weights, float32 [B, A, K * T, S].
        """
        queries = self.query(before_sublayer(self, hidden))
        return self.attend(hidden, queries, keys_values, attention_mask, training)


def write_cache(cache: tuple[Any, Any], new: tuple[Any, Any], slot: Any) -> tuple[Any, Any]:
    """Writes `new` [B, A, N, D] into `cache` [B, A, S, D] from `slot` on.

    It scatters, because TensorFlow has slice updates only as an XLA op.
    """
    batch, heads, size, width = ops.shape(cache[0])
    first = ops.arange(batch * heads) * size + slot  # [B*A]
    places = ops.reshape(first[:, None] + ops.arange(ops.shape(new[0])[2]), (-1, 1))

    def write(old: Any, tensor: Any) -> Any:
        flat = tf.tensor_scatter_nd_update(
            ops.reshape(old, (-1, width)), places, ops.reshape(tensor, (-1, width))
        )
        return ops.reshape(flat, (batch, heads, size, width))

    return write(cache[0], new[0]), write(cache[1], new[1])


class FeedForward(keras.layers.Layer):
    """Intermediate and output projection, residual connection, layer normalisation."""

    def __init__(self, config: BertGenerationConfig, **kwargs: Any):
        super().__init__(**kwargs)
        self.config = config
        policy = self.dtype_policy
        self.intermediate = dense(config.intermediate_size, config, "intermediate", policy)
        self.activation = activation(config.hidden_act)
        self.output_dense = dense(config.hidden_size, config, "output_dense", policy)
        self.dropout = keras.layers.Dropout(config.hidden_dropout_prob, dtype=policy)
        self.layer_norm = LayerNormalization(
            epsilon=config.layer_norm_eps, name="layer_norm", dtype=policy
        )

    def build(self, input_shape: Any = None) -> None:
        self.intermediate.build((None, None, self.config.hidden_size))
        self.output_dense.build((None, None, self.config.intermediate_size))
        self.layer_norm.build((None, None, self.config.hidden_size))

    def call(self, hidden: Any, training: bool | None = None) -> Any:
        inputs = before_sublayer(self, hidden)
        output = self.output_dense(self.activation(self.intermediate(inputs)))
        return after_sublayer(self, hidden, output, training)


class HeadTransform(keras.layers.Layer):
    """What the heads of BERT and RoBERTa do before the softmax: [B, T, H] -> [B, T, H]."""

    def __init__(self, config: BertGenerationConfig, **kwargs: Any):
        super().__init__(**kwargs)
        self.dense = dense(config.hidden_size, config, "dense", self.dtype_policy)
        self.activation = activation(config.head_transform)
        self.layer_norm = LayerNormalization(
            epsilon=config.layer_norm_eps, name="layer_norm", dtype=self.dtype_policy
        )

    def build(self, input_shape: Any) -> None:
        self.dense.build(input_shape)
        self.layer_norm.build(input_shape)

    def call(self, hidden: Any) -> Any:
        return self.layer_norm(self.activation(self.dense(hidden)))


def logits(hidden: Any, matrix: Any, bias: Any) -> Any:
    """[B, T, H] times the transposed matrix [V, H], plus bias [V]: float32 [B, T, V]."""
    # Half-precision scores would make different tokens tie.
    hidden = ops.cast(hidden, "float32")
    if matrix.dtype != "float32":
        matrix = ops.cast(matrix, "float32")
    return linear(hidden, matrix, bias)


class TransformerBlock(keras.layers.Layer):
    """Self-attention, cross-attention if any, feed-forward.

    Args:
        config: sizes; `add_cross_attention` adds the cross-attention.
        shared: a block whose self-attention and feed-forward this block uses instead of having
            its own. This is how BERTSHARE's decoder shares the encoder's variables.
    """

    def __init__(
        self,
        config: BertGenerationConfig,
        shared: "TransformerBlock | None" = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        policy = self.dtype_policy
        if shared is None:
            self.self_attention = SelfAttention(config, name="self_attention", dtype=policy)
            self.feed_forward = FeedForward(config, name="feed_forward", dtype=policy)
        else:
            self.self_attention = shared.self_attention
            self.feed_forward = shared.feed_forward
        self.cross_attention = None
        if config.add_cross_attention:
            self.cross_attention = CrossAttention(config, name="cross_attention", dtype=policy)

    def build(self, input_shape: Any = None) -> None:
        for layer in (self.self_attention, self.cross_attention, self.feed_forward):
            if layer is not None and not layer.built:
                layer.build()

    def call(
        self,
        hidden: Any,
        attention_mask: Any = None,
        memory: tuple[Any, Any] | None = None,
        cross_mask: Any = None,
        cache: tuple[Any, Any] | None = None,
        index: Any = 0,
        training: bool | None = None,
    ) -> tuple[Any, tuple[Any, Any], Any]:
        """One layer of the stack; see `Attention` for the pairs of keys and values.

        Args:
            hidden: [B, T, H].
            attention_mask: bool, broadcast to [B, A, T, S], for self-attention.
            memory: pair that cross-attention reads; without cross-attention, None or the pair of a
                source that self-attention reads as its prefix.
            cross_mask: bool, broadcast to [B, A, T, S], for `memory`.
            cache: pair of buffers that self-attention extends from position `index` on, see
                `SelfAttention`.

        Returns:
            the new hidden states; the pair that self-attention read: the extended cache, or
            without a cache the keys and values of `hidden`; the attention weights of `memory`,
            float32 [B, A, T, S].
        """
        prefix = memory if self.cross_attention is None else None
        hidden, keys_values, weights = self.self_attention(
            hidden,
            attention_mask,
            cache=cache,
            index=index,
            prefix=prefix,
            cross_mask=None if prefix is None else cross_mask,
            training=training,
        )
        if self.cross_attention is not None:
            hidden, weights = self.cross_attention(hidden, memory, cross_mask, training=training)
        return self.feed_forward(hidden, training=training), keys_values, weights
