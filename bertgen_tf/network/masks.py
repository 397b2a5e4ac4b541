"""Which keys a query sees: padding, the past, and the beams' own slots of a cache.

B batch, K beams, T query length, S key length, L positions of a cache, A attention heads.
"""

from typing import Any

import tensorflow as tf
from keras import ops


def padding_mask(attention_mask: Any) -> Any:
    """[B, S] with 1 on tokens -> bool [B, 1, 1, S], which every head and query reads."""
    return ops.cast(attention_mask, "bool")[:, None, None, :]


def causal_mask(query_length: Any, key_length: Any, first_query: Any = 0) -> Any:
    """Bool [1, 1, T, S]: query t, at position `first_query + t`, sees keys up to its own."""
    positions = first_query + ops.arange(query_length)
    return (ops.arange(key_length)[None, :] <= positions[:, None])[None, None]


def own_beams(beams: Any, index: Any, length: Any) -> Any:
    """`beams` [B, K, L] after every beam wrote `length` positions from `index` on."""
    positions = ops.arange(ops.shape(beams)[2])  # [L]
    written = ops.logical_and(positions >= index, positions < index + length)
    own = ops.arange(ops.shape(beams)[1])[:, None]  # [K, 1]
    return ops.where(written, own, beams)


def slots_mask(beams: Any, index: Any, length: Any) -> Any:
    """Which slots each row sees, from `beams` [B, K, L]: bool [B, 1, K * length, L * K].

    Those of its own past, up to its own position `index + t`.
    """
    batch, num_beams, size = ops.shape(beams)
    causal = causal_mask(length, size, index)[0]  # [1, length, L]
    own = beams[..., None] == ops.arange(num_beams)  # [B, K, L, K]
    mask = ops.logical_and(causal[..., None], own[:, :, None])  # [B, K, length, L, K]
    return ops.reshape(mask, (batch, 1, num_beams * length, size * num_beams))


def source_lengths(keys: Any, attention_mask: Any, shape: Any) -> Any:
    """The positions that sources take, up to their last tokens, for the rows of a target.

    Args:
        keys: of the source, [B, A, S, D].
        attention_mask: int32 [B, S], or None.
        shape: of the target's ids, [B * K, T].

    Returns:
        int32 [B * K, 1].
    """
    batch, _, length, _ = ops.shape(keys)
    if attention_mask is None:
        return length
    positions = ops.where(padding_mask(attention_mask)[:, 0], 1 + ops.arange(length), 0)
    lengths = ops.max(positions, axis=-1)  # [B, 1]
    return ops.reshape(tf.broadcast_to(lengths, (batch, shape[0] // batch)), (shape[0], 1))
