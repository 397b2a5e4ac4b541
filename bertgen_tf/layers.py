"""Layers of BERT's post-norm transformer, for full sequences and for cached decoding alike.

Source: Devlin et al. 2018 (`google-research/bert` `modeling.py`); cross-attention as in Rothe,
Narayan, Severyn 2020. Letters in shape comments: B batch, T query length, S key length, H hidden
size, A attention heads, D size of a head (H = A * D), V vocabulary.

Softmax and layer normalisation compute in float32 under every dtype policy.
"""

from typing import Any

import keras
from keras import ops

from bertgen_tf.config import BertGenerationConfig

# Finite, so that no row of scores can turn into NaN.
MASKED_SCORE = -1e9


def activation(name: str) -> Any:
    """The activation function of a `hidden_act` value: "gelu" is exact (erf), "gelu_new" tanh."""
    return {
        "gelu": lambda x: keras.activations.gelu(x, approximate=False),
        "gelu_new": lambda x: keras.activations.gelu(x, approximate=True),
        "relu": keras.activations.relu,
    }[name]


def dense(units: int, config: BertGenerationConfig, name: str, dtype: Any) -> keras.layers.Dense:
    """A projection with BERT's initialiser."""
    return keras.layers.Dense(units, kernel_initializer=initializer(config), name=name, dtype=dtype)


def initializer(config: BertGenerationConfig) -> keras.initializers.Initializer:
    """BERT's truncated normal; a new object each time, because each draws its own seed."""
    return keras.initializers.TruncatedNormal(stddev=config.initializer_range)


def padding_mask(attention_mask: Any) -> Any:
    """[B, S] with 1 on tokens -> bool [B, 1, 1, S], which every head and query reads."""
    return ops.cast(attention_mask, "bool")[:, None, None, :]


def causal_mask(query_length: Any, key_length: Any, first_query: Any = 0) -> Any:
    """Bool [1, 1, T, S]: query t, at position `first_query + t`, sees keys up to its own."""
    positions = first_query + ops.arange(query_length)
    return (ops.arange(key_length)[None, :] <= positions[:, None])[None, None]


class Embeddings(keras.layers.Layer):
    """Word and position embeddings, summed, normalised: int [B, T] -> [B, T, H].

    BERT's token types are not here: type 0 is folded into the positions when weights are read.

    Args:
        config: sizes.
        word_embeddings: the `keras.layers.Embedding` of another stack to read from, which makes
            the two stacks share one matrix; by default the layer has its own.
    """

    def __init__(
        self,
        config: BertGenerationConfig,
        word_embeddings: keras.layers.Embedding | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.config = config
        self.word_embeddings = word_embeddings or keras.layers.Embedding(
            config.vocab_size,
            config.hidden_size,
            embeddings_initializer=initializer(config),
            name="word_embeddings",
            dtype=self.dtype_policy,
        )
        self.position_embeddings = keras.layers.Embedding(
            config.max_position_embeddings,
            config.hidden_size,
            embeddings_initializer=initializer(config),
            name="position_embeddings",
            dtype=self.dtype_policy,
        )
        self.layer_norm = keras.layers.LayerNormalization(
            epsilon=config.layer_norm_eps, name="layer_norm", dtype=self.dtype_policy
        )
        self.dropout = keras.layers.Dropout(config.hidden_dropout_prob, dtype=self.dtype_policy)

    def build(self, input_shape: Any = None) -> None:
        if not self.word_embeddings.built:
            self.word_embeddings.build()
        self.position_embeddings.build()
        self.layer_norm.build((None, None, self.config.hidden_size))

    def call(self, input_ids: Any, first_position: Any = 0, training: bool | None = None) -> Any:
        positions = first_position + ops.arange(ops.shape(input_ids)[1])
        hidden = self.word_embeddings(input_ids) + self.position_embeddings(positions)
        return self.dropout(self.layer_norm(hidden), training=training)

    def logits(self, hidden: Any) -> Any:
        """[B, T, H] times the transposed word embeddings: float32 [B, T, V]."""
        # Scores of half precision would make ties of different tokens.
        matrix = ops.cast(self.word_embeddings.embeddings, "float32")
        return ops.matmul(ops.cast(hidden, "float32"), ops.transpose(matrix))


class Attention(keras.layers.Layer):
    """Multi-head attention with its residual connection and post-layer normalisation.

    One class serves self-attention and cross-attention, whole sequences and cached decoding.

    **Cache contract.** Keys and values are a pair of tensors [B, S, A, D] each.

    - Whole sequence: `call(hidden, self.project(memory), mask)`, where `memory` is
      `hidden` itself for self-attention.
    - Cached self-attention: the pair is a buffer of fixed length S; `update` writes the keys and
      values of T new tokens at positions `index ... index + T - 1` and returns the new pair.
    - Cached cross-attention: the pair is projected from the encoder's output once. It has one row
      per example; `hidden` may have several, adjacent, rows per example (the beams), which all
      attend to the same keys without a copy of them.
    """

    def __init__(self, config: BertGenerationConfig, **kwargs: Any):
        super().__init__(**kwargs)
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        policy = self.dtype_policy
        self.query = dense(config.hidden_size, config, "query", policy)
        self.key = dense(config.hidden_size, config, "key", policy)
        self.value = dense(config.hidden_size, config, "value", policy)
        self.attention_dropout = keras.layers.Dropout(
            config.attention_probs_dropout_prob, dtype=policy
        )
        self.output_dense = dense(config.hidden_size, config, "output_dense", policy)
        self.dropout = keras.layers.Dropout(config.hidden_dropout_prob, dtype=policy)
        self.layer_norm = keras.layers.LayerNormalization(
            epsilon=config.layer_norm_eps, name="layer_norm", dtype=policy
        )

    def build(self, input_shape: Any = None) -> None:
        shape = (None, None, self.config.hidden_size)
        for layer in (self.query, self.key, self.value, self.output_dense, self.layer_norm):
            layer.build(shape)

    def project(self, memory: Any) -> tuple[Any, Any]:
        """Keys and values of `memory` [B, S, H]: two tensors [B, S, A, D]."""
        return self._split(self.key(memory)), self._split(self.value(memory))

    @staticmethod
    def update(cache: tuple[Any, Any], new: tuple[Any, Any], index: Any) -> tuple[Any, Any]:
        """Writes `new` [B, T, A, D] into `cache` [B, S, A, D] from position `index` on.

        By selection, not by a slice update, which TensorFlow has only as an XLA op.
        """
        offsets = ops.arange(ops.shape(cache[0])[1]) - index  # [S]
        length = ops.shape(new[0])[1]
        inside = ((offsets >= 0) & (offsets < length))[None, :, None, None]

        def write(old: Any, tensor: Any) -> Any:
            if tensor.shape[1] != 1:  # a single position broadcasts
                tensor = ops.take(tensor, ops.clip(offsets, 0, length - 1), axis=1)
            return ops.where(inside, tensor, old)

        return write(cache[0], new[0]), write(cache[1], new[1])

    def call(
        self,
        hidden: Any,
        keys_values: tuple[Any, Any],
        attention_mask: Any = None,
        training: bool | None = None,
    ) -> Any:
        """Hidden [B or B * beams, T, H], mask bool, broadcast to [B, A, T, S] -> like hidden."""
        keys, values = keys_values
        shape = ops.shape(hidden)
        # The rows of one example share its keys: fold them into the query axis.
        queries = ops.reshape(
            self.query(hidden), (ops.shape(keys)[0], -1, self.num_heads, self.head_size)
        )
        # [B, A, T, S]
        scores = ops.einsum("btad,bsad->bats", queries, keys)
        scores = ops.cast(scores, "float32") / self.head_size**0.5
        if attention_mask is not None:
            scores = ops.where(attention_mask, scores, MASKED_SCORE)
        weights = ops.softmax(scores, axis=-1)
        if attention_mask is not None:
            # A query that may see nothing (an empty source) gets zeros, however long the padding.
            weights = weights * ops.cast(ops.any(attention_mask, axis=-1, keepdims=True), "float32")
        weights = self.attention_dropout(ops.cast(weights, values.dtype), training=training)
        context = ops.einsum("bats,bsad->btad", weights, values)
        output = self.output_dense(ops.reshape(context, shape))
        return self.layer_norm(hidden + self.dropout(output, training=training))

    def _split(self, tensor: Any) -> Any:
        batch, length, _ = ops.shape(tensor)
        return ops.reshape(tensor, (batch, length, self.num_heads, self.head_size))


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
        self.layer_norm = keras.layers.LayerNormalization(
            epsilon=config.layer_norm_eps, name="layer_norm", dtype=policy
        )

    def build(self, input_shape: Any = None) -> None:
        self.intermediate.build((None, None, self.config.hidden_size))
        self.output_dense.build((None, None, self.config.intermediate_size))
        self.layer_norm.build((None, None, self.config.hidden_size))

    def call(self, hidden: Any, training: bool | None = None) -> Any:
        output = self.output_dense(self.activation(self.intermediate(hidden)))
        return self.layer_norm(hidden + self.dropout(output, training=training))


class TransformerBlock(keras.layers.Layer):
    """Self-attention, cross-attention where there is one, feed-forward.

    Args:
        config: sizes; `add_cross_attention` adds the cross-attention.
        shared: a block whose self-attention and feed-forward this block reads instead of having
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
            self.self_attention = Attention(config, name="self_attention", dtype=policy)
            self.feed_forward = FeedForward(config, name="feed_forward", dtype=policy)
        else:
            self.self_attention = shared.self_attention
            self.feed_forward = shared.feed_forward
        self.cross_attention = None
        if config.add_cross_attention:
            self.cross_attention = Attention(config, name="cross_attention", dtype=policy)

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
    ) -> tuple[Any, tuple[Any, Any]]:
        """One layer of the stack; see `Attention` for the pairs of keys and values.

        Args:
            hidden: [B, T, H].
            attention_mask: bool, broadcast to [B, A, T, S], for self-attention.
            memory: pair that cross-attention reads; it must be None without cross-attention.
            cross_mask: bool, broadcast to [B, A, T, S], for cross-attention.
            cache: pair of buffers that self-attention extends from position `index` on.

        Returns:
            hidden like the input, and the pair that self-attention read: the extended cache, or
            without a cache the keys and values of `hidden`.
        """
        keys_values = self.self_attention.project(hidden)
        if cache is not None:
            keys_values = self.self_attention.update(cache, keys_values, index)
        hidden = self.self_attention(hidden, keys_values, attention_mask, training=training)
        if self.cross_attention is not None:
            hidden = self.cross_attention(hidden, memory, cross_mask, training=training)
        return self.feed_forward(hidden, training=training), keys_values
