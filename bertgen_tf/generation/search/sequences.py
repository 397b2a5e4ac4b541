"""What `sampling` and `beam_search` share: buffers, their bounds, penalties and checks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from bertgen_tf.checks import check_integer

Step = Callable[[tf.Tensor, tf.Tensor, Any], tuple[tf.Tensor, Any]]


class SearchOutput(NamedTuple):
    """What a search found.

    Attributes:
        sequences: int32 `[batch, num_return_sequences, P + max_new_tokens]`: prompt, generated
            tokens, EOS if it was met, padding.
        scores: float32 `[batch, num_return_sequences]`.
        token_scores: float32, one column fewer than `sequences`: what `sequences[..., i + 1]`
            added to the score, 0 where it was not generated. Their sum / penalty is the score.
    """

    sequences: tf.Tensor
    scores: tf.Tensor
    token_scores: tf.Tensor


class Prompt(NamedTuple):
    """Where a search starts.

    Attributes:
        sequences: int32 `[batch, width]`: the prompt, then padding.
        length: int or int32 `[]`, tokens of the prompt.
        limit: int or int32 `[]`, tokens of the prompt and of the longest sequence generated.
    """

    sequences: tf.Tensor
    length: int | tf.Tensor
    limit: int | tf.Tensor


def make_prompt(
    start_ids: tf.Tensor,
    prompt_length: int | tf.Tensor | None,
    max_new_tokens: int,
    max_length: int | tf.Tensor | None,
    pad_token_id: int,
) -> Prompt:
    """Allocates the sequences of a search, see `beam_search` for the arguments.

    Raises:
        ValueError: for an argument outside the rules.
    """
    check_integer("max_new_tokens", max_new_tokens)
    start_ids = tf.convert_to_tensor(start_ids)
    if not start_ids.dtype.is_integer or start_ids.shape.rank not in (1, 2):
        raise ValueError(
            "start_ids must be integers of shape [batch] or [batch, P], received "
            f"{start_ids.dtype.name} of shape {start_ids.shape}: pass one start token, or a prompt "
            "that begins with it, per example."
        )
    start_ids = tf.cast(start_ids, tf.int32)
    if start_ids.shape.rank == 1:
        start_ids = start_ids[:, tf.newaxis]
    columns = size(start_ids, 1)
    if prompt_length is None:
        prompt_length = columns
    if isinstance(prompt_length, int) and isinstance(columns, int):
        if not 1 <= prompt_length <= columns:
            raise ValueError(
                f"prompt_length must be from 1 to {columns}, the columns of start_ids, received "
                f"{prompt_length}: pass the number of tokens before the padding."
            )
    limit = prompt_length + max_new_tokens
    if max_length is not None:
        known = isinstance(prompt_length, int) and isinstance(max_length, int)
        if known and prompt_length >= max_length:
            raise ValueError(
                f"max_length counts the prompt and must be above its length, {prompt_length}, "
                f"received {max_length}: raise max_length or pass None."
            )
        limit = min(limit, max_length) if known else tf.minimum(limit, max_length)
    in_prompt = tf.range(columns) < prompt_length  # [P]
    sequences = tf.pad(
        tf.where(in_prompt, start_ids, pad_token_id),
        [[0, 0], [0, max_new_tokens]],
        constant_values=pad_token_id,
    )
    return Prompt(sequences, prompt_length, limit)


def write(sequences: tf.Tensor, index: tf.Tensor | int, values: tf.Tensor) -> tf.Tensor:
    """`sequences` `[..., L]` with `values` `[...]` at `index` of the last axis."""
    here = tf.range(size(sequences, -1)) == index  # [L]
    return tf.where(here, values[..., tf.newaxis], sequences)


def is_one_of(ids: tf.Tensor, token_ids: tuple[int, ...]) -> tf.Tensor:
    """Bool of the shape of `ids`."""
    return tf.reduce_any(ids[..., tf.newaxis] == tf.constant(token_ids, tf.int32), axis=-1)


def length_power(length: tf.Tensor | int, exponent: float) -> tf.Tensor:
    """Hugging Face's length penalty."""
    return tf.pow(tf.cast(length, tf.float32), exponent)


def gnmt_penalty(length: tf.Tensor | int, alpha: float) -> tf.Tensor:
    """tensor2tensor's length penalty, of Wu et al. 2016."""
    return tf.pow((5.0 + tf.cast(length, tf.float32)) / 6.0, alpha)


def size(tensor: tf.Tensor, axis: int) -> int | tf.Tensor:
    """The size of an axis, a Python integer where it is known."""
    static = tensor.shape[axis]
    return tf.shape(tensor)[axis] if static is None else static


def with_shapes_of(old: Any, new: Any) -> Any:
    """`new` with the static shapes of `old`: gathering forgets the number of rows."""
    tf.nest.map_structure(lambda a, b: b.set_shape(a.shape), old, new)
    return new


def check_scorer(scorer: str, gnmt_alpha: float) -> None:
    """Raises for an unknown scorer or a negative alpha."""
    if scorer not in ("huggingface", "gnmt"):
        raise ValueError(f'scorer must be "huggingface" or "gnmt", received {scorer!r}.')
    if gnmt_alpha < 0:
        # The bound on what a running beam can still reach would not hold.
        raise ValueError(f"gnmt_alpha must be >= 0, received {gnmt_alpha}: pass 0 for plain sums.")


def check_seeds(seeds: tf.Tensor | None, do_sample: bool) -> tf.Tensor | None:
    """Returns `seeds` as int32 `[batch, 2]`, None without `do_sample`."""
    if not do_sample:
        return None
    if seeds is None:
        raise ValueError("seeds must be given with do_sample: pass integers [batch, 2].")
    seeds = tf.convert_to_tensor(seeds)
    if not seeds.dtype.is_integer or not seeds.shape.is_compatible_with([None, 2]):
        raise ValueError(
            "seeds must be integers of shape [batch, 2], received "
            f"{seeds.dtype.name} of shape {seeds.shape}: pass a seed and the number of the example "
            "for each example."
        )
    return tf.cast(seeds, tf.int32)


def check_state(state: Any, batch: int | None, num_beams: int) -> Any:
    """Returns `state` as tensors of `batch * num_beams` rows."""
    state = tf.nest.map_structure(tf.convert_to_tensor, state)
    rows = None if batch is None else batch * num_beams
    for tensor in tf.nest.flatten(state):
        if not tensor.shape[:1].is_compatible_with([rows]):
            raise ValueError(
                "every tensor in state must have leading dimension batch * num_beams"
                f"{'' if rows is None else f' = {rows}'}, received shape {tensor.shape}: allocate "
                "the state for that many rows."
            )
    return state
