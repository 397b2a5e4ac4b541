"""Logits processors: pure functions that change the scores of the next token.

A processor is a function `(logits, ids, step) -> logits` of

- `logits`: float32 `[rows, vocab]`, scores of the next token, logits or log-probabilities;
- `ids`: int32 `[rows, 1 + max_new_tokens]`, the start token, then the tokens generated so far,
  then padding: only `ids[:, : step + 1]` counts;
- `step`: int32 scalar, the number of tokens generated so far, 0 at the first call.

It must keep the shape, must work where the vocabulary is unknown when traced, and bans a token with
the finite `BANNED`. Several of them compose by running in the given order, as in HuggingFace.
"""

import operator
from collections.abc import Callable, Sequence

import tensorflow as tf

Processor = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]

# Finite, so that no sum, product or softmax of it is ever NaN; far below every real score, and
# small enough that float32 sums of many of them stay finite.
BANNED = -1e7


def compose(processors: Sequence[Processor]) -> Processor:
    """Returns the one processor that runs `processors` in order; none of them is the identity."""

    def processor(logits: tf.Tensor, ids: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        for process in processors:
            logits = process(logits, ids, step)
        return logits

    return processor


def suppress_tokens(token_ids: Sequence[int]) -> Processor:
    """Bans `token_ids` at every step (HuggingFace's `suppress_tokens`).

    Raises:
        TypeError, ValueError: if `token_ids` is not a sequence of integers >= 0; when called, if an
            id is not in a statically known vocabulary.
    """
    token_ids = check_token_ids("token_ids", token_ids)

    def processor(logits: tf.Tensor, ids: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        return tf.where(_token_mask(token_ids, logits), BANNED, logits)

    return processor


def min_new_tokens(n: int, eos_token_ids: Sequence[int]) -> Processor:
    """Bans `eos_token_ids` for the first `n` steps (HuggingFace's `min_new_tokens`).

    At least `n` tokens then come before the end token: EOS is not counted among them.

    Raises:
        TypeError, ValueError: if `eos_token_ids` is not a sequence of integers >= 0, or `n` is
            negative; when called, if an id is not in a statically known vocabulary.
    """
    eos_token_ids = check_token_ids("eos_token_ids", eos_token_ids)
    if n < 0:
        raise ValueError(f"n must be >= 0, received {n}: pass 0 for no minimum.")

    def processor(logits: tf.Tensor, ids: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        banned = _token_mask(eos_token_ids, logits) & (step < n)
        return tf.where(banned, BANNED, logits)

    return processor


def check_token_ids(name: str, token_ids: Sequence[int]) -> tuple[int, ...]:
    """Returns `token_ids` as a tuple of Python integers; `name` is the argument to blame.

    Raises:
        TypeError: if it is not a sequence of integers.
        ValueError: if one of them is negative.
    """
    try:
        checked = tuple(operator.index(token_id) for token_id in token_ids)
    except TypeError:
        raise TypeError(
            f"{name} must be a sequence of integers, received {token_ids!r}: "
            "wrap a single id in a list."
        ) from None
    if min(checked, default=0) < 0:
        raise ValueError(f"{name} must be >= 0, received {token_ids!r}: remove negative ids.")
    return checked


def _token_mask(token_ids: tuple[int, ...], logits: tf.Tensor) -> tf.Tensor:
    """Bool `[vocab]`, true for `token_ids`."""
    vocabulary = logits.shape[-1]
    if vocabulary is not None and max(token_ids, default=0) >= vocabulary:
        raise ValueError(
            f"token ids must be below the vocabulary size {vocabulary}, received {token_ids}: "
            "use ids of this model's tokenizer."
        )
    indices = tf.reshape(tf.constant(token_ids, tf.int32), [-1, 1])  # [n, 1]
    ones = tf.ones([len(token_ids)], tf.int32)
    return tf.scatter_nd(indices, ones, [tf.shape(logits)[-1]]) > 0
