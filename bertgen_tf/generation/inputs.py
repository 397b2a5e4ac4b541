"""What `generate` takes, checked: texts, datasets and prompts, or ids."""

import itertools
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tensorflow as tf

from bertgen_tf.config import GenerationConfig
from bertgen_tf.data.texts import check_text, is_single, is_text, text_list

if TYPE_CHECKING:
    from bertgen_tf.models.encoder_decoder import EncoderDecoderModel

_ID_KEYS = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")


class Rows(NamedTuple):
    """N examples as int32 ids, padded at their ends.

    Attributes:
        input_ids, attention_mask: [N, S], S at least 1.
        decoder_input_ids: [N, P], start token first.
        prompt_lengths: [N]: how many columns of decoder_input_ids count.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    decoder_input_ids: np.ndarray
    prompt_lengths: np.ndarray


def read_texts(inputs: Any) -> tuple[Iterable[str | bytes], int | None]:
    """The texts, and how many, if that is known.

    Args:
        inputs: a string, several in any form of `text_list`, or a dataset, batched or not.

    Raises:
        TypeError: it is something else.
        ValueError: it is an endless dataset.
    """
    if is_single(inputs):
        text = inputs if isinstance(inputs, str | bytes) else np.asarray(inputs).item()
        check_text("inputs", text)
        return [text], 1
    if isinstance(inputs, tf.data.Dataset):
        spec = inputs.element_spec
        if not (
            isinstance(spec, tf.TensorSpec)
            and spec.dtype == tf.string
            and spec.shape.rank in (0, 1)
        ):
            raise TypeError(
                "inputs, if a tf.data.Dataset, must hold strings, batched or not, received one of "
                f"{spec}. Map it to the source texts."
            )
        cardinality = int(inputs.cardinality())
        if cardinality == tf.data.INFINITE_CARDINALITY:
            raise ValueError("inputs must end, received a tf.data.Dataset that repeats forever.")
        if spec.shape.rank == 1:
            inputs, cardinality = inputs.unbatch(), -1
        return inputs.as_numpy_iterator(), cardinality if cardinality >= 0 else None
    if not isinstance(inputs, list | tuple) and not is_text(inputs):
        raise TypeError(
            "inputs must be a string, several as a list, an array, a column or a tensor, a "
            "tf.data.Dataset of strings or dict(input_ids, attention_mask), received "
            f"{type(inputs).__name__}."
        )
    texts = text_list("inputs", inputs)
    return texts, len(texts)


def read_prompts(decoder_text: Any, total: int | None) -> str | bytes | list[str | bytes] | None:
    """A prompt for all texts, or one for each in any form of `text_list`."""
    if decoder_text is None:
        return None
    if is_single(decoder_text):
        return read_texts(decoder_text)[0][0]
    prompts = text_list("decoder_text", decoder_text)
    if total not in (None, len(prompts)):
        raise _unequal(len(prompts), total)
    return prompts


def with_prompts(
    texts: Iterable[str | bytes], decoder_text: str | bytes | Iterable[str | bytes] | None
) -> Iterator[tuple[str | bytes, str | bytes | None]]:
    """Each text and its prompt; a ValueError if there are more of one than of the other."""
    if decoder_text is None or isinstance(decoder_text, str | bytes):
        yield from ((text, decoder_text) for text in texts)
        return
    for number, pair in enumerate(itertools.zip_longest(texts, decoder_text)):
        if pair[0] is None or pair[1] is None:
            more = f"more than {number}"
            raise _unequal(*((more, number) if pair[0] is None else (number, more)))
        yield pair


def _unequal(prompts: int | str, texts: int | str) -> ValueError:
    return ValueError(
        "decoder_text must be one prompt for all texts, or a list of one for each, received "
        f"{prompts} prompts for {texts} texts."
    )


def strings(texts: Sequence[str | bytes]) -> tf.Tensor:
    """A string vector, even of no texts."""
    return tf.constant(list(texts), tf.string, [len(texts)])


def id_rows(inputs: dict[str, Any], model: "EncoderDecoderModel") -> Rows:
    """The ids that `generate` takes, each prompt with the start token.

    Raises:
        ValueError: keys, shapes, ids or masks do not fit the model.
    """
    keys = set(inputs)
    if (
        "input_ids" not in keys
        or not keys <= set(_ID_KEYS)
        or ("decoder_attention_mask" in keys and "decoder_input_ids" not in keys)
    ):
        raise ValueError(
            "inputs must have the keys input_ids and, where there is padding, attention_mask; with "
            "prompts decoder_input_ids and, where there is padding, decoder_attention_mask; "
            f"received {', '.join(map(str, inputs)) or 'none'}."
        )
    encoder, decoder = model.encoder.config, model.decoder.config
    sizes = encoder.vocab_size, encoder.max_source_positions
    ids, mask = _ids_and_mask(inputs, "input_ids", "attention_mask", *sizes)
    if ids.shape[1] == 0:  # nothing but padding
        ids = np.full([len(ids), 1], encoder.pad_token_id, np.int32)
        mask = np.zeros_like(ids)
    if "decoder_input_ids" not in inputs:
        start = np.asarray(start_prompt(model, len(ids)))
        return Rows(ids, mask, start, np.ones([len(ids)], np.int32))
    sizes = decoder.vocab_size, decoder.max_target_positions
    prompts, prompt_mask = _ids_and_mask(
        inputs, "decoder_input_ids", "decoder_attention_mask", *sizes
    )
    if len(prompts) != len(ids):
        raise ValueError(
            "decoder_input_ids must have a row for each of input_ids, received "
            f"{len(prompts)} for {len(ids)}."
        )
    return Rows(ids, mask, *_with_start(prompts, prompt_mask, model))


def _with_start(
    prompts: np.ndarray, mask: np.ndarray, model: "EncoderDecoderModel"
) -> tuple[np.ndarray, np.ndarray]:
    """The prompts with the start token first, and their lengths including it."""
    if (np.diff(mask, axis=1) > 0).any():
        row = int((np.diff(mask, axis=1) > 0).any(axis=1).argmax())
        raise ValueError(
            "decoder_attention_mask must have the padding at the end of each row, received "
            f"{mask[row].tolist()} in row {row}. Move the prompts to the left."
        )
    lengths = mask.sum(axis=1, dtype=np.int32)
    start = np.asarray(start_prompt(model, len(prompts)), np.int32)
    begun = (prompts[:, :1] == start).any(axis=1) & (lengths > 0)
    if len(begun) and begun.all():
        return prompts, lengths
    if begun.any():
        raise ValueError(
            f"decoder_input_ids must begin with the start token ({start[0, 0]}) in every row, or "
            f"in none, to have it prepended; received it in {begun.sum()} of {len(begun)} rows."
        )
    return np.concatenate([start, prompts], axis=1), lengths + 1


def _ids_and_mask(
    inputs: dict[str, Any], ids_name: str, mask_name: str, vocab_size: int, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """int32 [N, length] each; without a mask every id counts."""
    ids = np.asarray(inputs[ids_name])
    mask = np.asarray(inputs.get(mask_name, np.ones(ids.shape, np.int32)))
    if ids.ndim != 2 or mask.shape != ids.shape or ids.dtype.kind not in "iu":
        raise ValueError(
            f"{ids_name} and {mask_name} must be integers of one shape [batch, length], received "
            f"{ids.dtype} {ids.shape} and {mask.dtype} {mask.shape}."
        )
    if mask.dtype.kind not in "iufb" or not np.isin(mask, (0, 1)).all():
        raise ValueError(
            f"{mask_name} must be 1 on tokens and 0 on padding, received {mask.dtype} with other "
            "values."
        )
    if ids.shape[1] > longest:
        raise ValueError(
            f"{ids_name} must not be longer than max_position_embeddings ({longest}), received "
            f"{ids.shape[1]} tokens."
        )
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(
            f"{ids_name} must lie in [0, {vocab_size}), received {ids.min()} to {ids.max()}."
        )
    return ids.astype(np.int32), mask.astype(np.int32)


def check_processors(processors: Any) -> tuple[Callable, ...]:
    """The logits processors in a form that can be a key."""
    if not isinstance(processors, list | tuple) or not all(
        callable(processor) and isinstance(processor, Hashable) for processor in processors
    ):
        raise TypeError(
            "logits_processor must be a list of functions (logits, ids, step) -> logits that can "
            f"be hashed, as compiled functions are kept by them, received {processors!r}."
        )
    return tuple(processors)


def start_prompt(model: "EncoderDecoderModel", batch: int | tf.Tensor) -> tf.Tensor:
    """The prompt if none is given, the start token of every row: int32 [batch, 1]."""
    prompt = tf.fill([batch, 1], model.decoder.config.bos_token_id)
    return tf.ensure_shape(prompt, [None, 1])


def make_seeds(config: GenerationConfig, first_example: int, batch: int) -> np.ndarray:
    """Seed and number of every row, int32 [batch, 2]: what its draws depend on.

    If the settings have no seed, one is drawn from Python's `random`.
    """
    seeds = np.zeros([batch, 2], np.int32)
    if config.do_sample:
        seeds[:, 0] = random.getrandbits(31) if config.seed is None else config.seed
        seeds[:, 1] = np.arange(first_example, first_example + batch)
    return seeds
