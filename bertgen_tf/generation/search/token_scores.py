"""Arithmetic on the scores of tokens: bans, and scores changed in few places.

What `bertgen_tf.generation.search.logits` and `bertgen_tf.generation.search.filters` are made of;
shapes as there. All this runs for every token over a large vocabulary: nothing here is as large as
a sequence times a vocabulary.
"""

import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf

# Finite, so that no sum, product or softmax of it is ever NaN; far below every real score, and
# small enough that float32 sums of many of them stay finite.
BANNED = -1e7


def check_vocabulary(token_ids: tuple[int, ...], logits: tf.Tensor) -> None:
    """Raises `ValueError` if an id is not in the vocabulary, as far as its size is known."""
    vocabulary = logits.shape[-1]
    if vocabulary is not None and max(token_ids, default=0) >= vocabulary:
        raise ValueError(
            f"token ids must be below the vocabulary size {vocabulary}, received {token_ids}: "
            "use ids of this model's tokenizer."
        )


def is_banned(logits: tf.Tensor) -> tf.Tensor:
    """Which scores are those of banned tokens: bool, of the shape of `logits`."""
    return logits <= BANNED / 2


def keep_banned(logits: tf.Tensor, changed: tf.Tensor) -> tf.Tensor:
    """`changed`, but `BANNED` where it was banned in `logits` or has become so."""
    return tf.where(is_banned(logits) | is_banned(changed), BANNED, changed)


def token_values(token_ids: np.ndarray, values: np.ndarray, logits: tf.Tensor) -> tf.Tensor:
    """`[vocab]` of the dtype of `values`: the value of every token id, 0 for the others."""
    if logits.shape[-1] is not None:
        dense = np.zeros(logits.shape[-1], values.dtype)
        dense[token_ids] = values
        return tf.constant(dense)
    return tf.scatter_nd(token_ids[:, np.newaxis], values, [tf.shape(logits)[-1]])


def token_mask(token_ids: tuple[int, ...], logits: tf.Tensor) -> tf.Tensor:
    """Bool `[vocab]`, true for `token_ids`."""
    check_vocabulary(token_ids, logits)
    tokens = np.unique(np.array(token_ids, np.int32))
    return token_values(tokens, np.ones_like(tokens), logits) > 0


def allow_only(token_ids: tuple[int, ...], logits: tf.Tensor) -> tf.Tensor:
    """`[vocab]`: 0 for `token_ids`, all others banned."""
    return tf.where(token_mask(token_ids, logits), 0.0, BANNED)


def ban(logits: tf.Tensor, tokens: tf.Tensor, where: tf.Tensor) -> tf.Tensor:
    """Bans the `tokens` `[rows, n]` for which `where` (broadcast to them) holds."""
    where &= _in_vocabulary(tokens, logits)
    return _change(tf.tensor_scatter_nd_min, logits, tokens, tf.where(where, BANNED, math.inf))


def penalize(
    logits: tf.Tensor, tokens: tf.Tensor, where: tf.Tensor | bool, penalty: float
) -> tf.Tensor:
    """Applies `penalty` to the `tokens` `[rows, n]` for which `where` (broadcast) holds."""
    where &= _in_vocabulary(tokens, logits)
    scores = tf.gather(logits, _clip(tokens, logits), axis=1, batch_dims=1)  # [rows, n]
    where &= ~is_banned(scores)
    scores = tf.where(scores < 0, scores * penalty, scores / penalty)
    # All penalties go one way. So minimum or maximum may meet a token several times, and separate
    # those that count from the others, whatever the order of updates.
    if penalty > 1:
        scatter, nothing = tf.tensor_scatter_nd_min, math.inf
    else:
        scatter, nothing = tf.tensor_scatter_nd_max, -math.inf
    return _change(scatter, logits, tokens, tf.where(where, scores, nothing))


def _change(
    scatter: Callable, logits: tf.Tensor, tokens: tf.Tensor, updates: tf.Tensor
) -> tf.Tensor:
    """`scatter` of `updates` into `logits` at `tokens`, `[rows, n]` both."""
    return scatter(logits, indices(_clip(tokens, logits)), updates)


def indices(tokens: tf.Tensor) -> tf.Tensor:
    """`[rows, n, 2]`: row and token."""
    rows = tf.range(tf.shape(tokens)[0])[:, tf.newaxis]
    return tf.stack([tf.broadcast_to(rows, tf.shape(tokens)), tokens], axis=-1)


def _in_vocabulary(tokens: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    # A source may have ids that the decoder does not know, and has -1 at padding.
    return (tokens >= 0) & (tokens < tf.shape(logits)[-1])


def _clip(tokens: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    return tf.clip_by_value(tokens, 0, tf.shape(logits)[-1] - 1)


# ------------------------------------------------------------------------------- sequences


def recent(ids: tf.Tensor, step: tf.Tensor, back: int) -> tf.Tensor:
    """The token `back` places before the next one, `[rows]`: -2, no token, before the first.

    `back` = 1 is the last token.
    """
    position = step + 1 - back
    tokens = tf.gather(ids, tf.maximum(position, 0), axis=1)
    return tf.where(position >= 0, tokens, -2)


def shift(ids: tf.Tensor, back: int) -> tf.Tensor:
    """For each place of `ids` `[rows, L]`, the token `back` places before it, or -1."""
    return tf.pad(ids, [[0, 0], [back, 0]], constant_values=-1)[:, : tf.shape(ids)[1]]


def for_rows(source: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """`source` `[batch, S]`, repeated for the adjacent rows of every example: `[rows, S]`."""
    return tf.repeat(source, tf.shape(logits)[0] // tf.shape(source)[0], axis=0)
