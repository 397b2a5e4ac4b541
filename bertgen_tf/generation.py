"""Joins model, settings and search: caches, buckets and compiled functions.

Strings cannot enter XLA, so text stays outside: the compiled function takes padded integers only.
Batch and source length are padded to buckets inside the graph, so that a model compiles a bounded
number of times, also when it is served.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from bertgen_tf import decoding, logits
from bertgen_tf.config import GenerationConfig

# Longer lists are generated in parts of this many texts.
MAX_BATCH_SIZE = 32
# Settings whose compiled functions a model keeps.
MAX_FUNCTIONS = 16

_SIGNATURE = [tf.TensorSpec([None, None], tf.int32)] * 2


class GenerateOutput(NamedTuple):
    """What `generate` gives for ids; hypotheses are best first.

    Attributes:
        sequences: int32 [batch, num_return_sequences, 1 + max_new_tokens]: start token, generated
            tokens, end token if it was reached, padding.
        scores: float32 [batch, num_return_sequences]: the log-probability of the sequence, divided
            by the length penalty of the settings.
    """

    sequences: np.ndarray
    scores: np.ndarray


class Generator:
    """The generation functions of one model, built when first needed and kept."""

    def __init__(self, model: Any):
        self.model = model
        self.functions: dict[tuple[GenerationConfig, bool], Callable] = {}

    def generate(
        self,
        inputs: Any,
        config: GenerationConfig | None,
        jit_compile: bool,
        options: dict[str, Any],
    ) -> Any:
        """See `EncoderDecoderModel.generate`."""
        config = config or self.model.generation_config
        config = config.replace(**options) if options else config
        check_config(config, self.model)
        function = self.function(config, jit_compile)
        if isinstance(inputs, dict):
            ids, mask = _check_ids(inputs, self.model)
            return _generate_ids(function, ids, mask)
        if isinstance(inputs, str):
            return self._generate_text(function, [inputs], config)[0]
        if isinstance(inputs, list | tuple) and all(isinstance(text, str) for text in inputs):
            return self._generate_text(function, list(inputs), config)
        raise TypeError(
            "inputs must be a string, a list of strings or dict(input_ids, attention_mask), "
            f"received {type(inputs).__name__}."
        )

    def function(self, config: GenerationConfig, jit_compile: bool) -> Callable:
        """`(input_ids, attention_mask)` int32 [B, S] -> `decoding.SearchOutput`, traced once."""
        key = (config, jit_compile)
        if key not in self.functions:
            if len(self.functions) >= MAX_FUNCTIONS:
                self.functions.pop(next(iter(self.functions)))
            self.functions[key] = generation_function(self.model, config, jit_compile)
        return self.functions[key]

    def _generate_text(self, function: Callable, texts: list[str], config: Any) -> list:
        preprocessor = self.model.preprocessor
        if preprocessor is None:
            raise ValueError(
                "Generating from text needs a tokenizer, and this model has none. Pass tokenizer= "
                "to EncoderDecoderModel, or dict(input_ids, attention_mask) to generate."
            )
        results: list = []
        for start in range(0, len(texts), MAX_BATCH_SIZE):
            batch = preprocessor.generate_preprocess(texts[start : start + MAX_BATCH_SIZE])
            output = function(batch["input_ids"], batch["attention_mask"])
            decoded = hypotheses_to_text(preprocessor, output.sequences)
            results += [[text.decode() for text in row] for row in decoded.numpy()]
        if config.num_return_sequences == 1:
            return [row[0] for row in results]
        return results


def generation_function(model: Any, config: GenerationConfig, jit_compile: bool) -> Callable:
    """A `tf.function` of int32 `(input_ids, attention_mask)` [B, S] -> `decoding.SearchOutput`.

    With `jit_compile`, the search is compiled by XLA once for each bucket that comes up: batches
    are padded to powers of two, sources to powers of two from 16. Without, it is a plain graph.
    """

    @tf.function(jit_compile=jit_compile, input_signature=_SIGNATURE)
    def search(input_ids: tf.Tensor, attention_mask: tf.Tensor) -> decoding.SearchOutput:
        return _search(model, config, input_ids, attention_mask)

    if not jit_compile:
        return search
    longest = model.encoder.config.max_position_embeddings
    lengths = [2**i for i in range(4, 16) if 2**i < longest] + [longest]

    @tf.function(input_signature=_SIGNATURE)
    def bucketed(input_ids: tf.Tensor, attention_mask: tf.Tensor) -> decoding.SearchOutput:
        batch, length = tf.unstack(tf.shape(input_ids))
        to_length = _bucket(length, lengths)
        to_batch = _bucket(batch, [2**i for i in range(11)])
        # Rows that fill up the batch repeat its last one: they end when it ends. An empty batch
        # has none to repeat and gets a row of padding.
        rows = tf.minimum(tf.range(to_batch), tf.maximum(batch - 1, 0))

        def pad(tensor: tf.Tensor, value: int) -> tf.Tensor:
            missing_rows = tf.cast(tf.equal(batch, 0), tf.int32)
            padding = [[0, missing_rows], [0, to_length - length]]
            return tf.gather(tf.pad(tensor, padding, constant_values=value), rows)

        ids = pad(input_ids, model.encoder.config.pad_token_id)
        output = search(ids, pad(attention_mask, 0))
        return decoding.SearchOutput(*(tensor[:batch] for tensor in output))

    return bucketed


def hypotheses_to_text(preprocessor: Any, sequences: tf.Tensor) -> tf.Tensor:
    """int32 [B, n, L] with the start token first -> strings [B, n]."""
    batch, hypotheses, length = tf.unstack(tf.shape(sequences))
    ids = tf.reshape(sequences, [batch * hypotheses, length])[:, 1:]
    return tf.reshape(preprocessor.generate_postprocess(ids), [batch, hypotheses])


def check_config(config: GenerationConfig, model: Any) -> None:
    """Raises if the settings do not fit the model."""
    decoder = model.decoder.config
    if config.max_new_tokens > decoder.max_position_embeddings:
        raise ValueError(
            "max_new_tokens must not exceed the decoder's max_position_embeddings "
            f"({decoder.max_position_embeddings}), received {config.max_new_tokens}."
        )
    if any(token >= decoder.vocab_size for token in config.suppress_tokens):
        raise ValueError(
            f"suppress_tokens must be smaller than vocab_size ({decoder.vocab_size}), "
            f"received {config.suppress_tokens}."
        )


def _search(
    model: Any, config: GenerationConfig, input_ids: tf.Tensor, attention_mask: tf.Tensor
) -> decoding.SearchOutput:
    decoder = model.decoder
    batch = tf.shape(input_ids)[0]
    memory = model.encoder(input_ids, attention_mask, training=False)
    # The last token generated is never read, so positions 0 ... max_new_tokens - 1 suffice.
    cache = decoder.init_cache(batch * config.num_beams, config.max_new_tokens, memory)

    def step(ids: tf.Tensor, index: tf.Tensor, state: Any) -> tuple[tf.Tensor, Any]:
        # [rows, 1, V]
        token_logits, new_cache = decoder(
            ids[:, None],
            encoder_attention_mask=attention_mask,
            cache={"self": state, "cross": cache["cross"]},
            cache_index=index,
            training=False,
        )
        return token_logits[:, 0], new_cache["self"]

    eos_token_ids = (decoder.config.eos_token_id,)
    processors = []
    if config.min_new_tokens:
        processors.append(logits.min_new_tokens(config.min_new_tokens, eos_token_ids))
    if config.suppress_tokens:
        processors.append(logits.suppress_tokens(config.suppress_tokens))
    common = {
        "max_new_tokens": config.max_new_tokens,
        "eos_token_ids": eos_token_ids,
        "pad_token_id": decoder.config.pad_token_id,
        "processors": processors,
        "length_penalty": config.length_penalty,
    }
    start_ids = tf.fill([batch], decoder.config.bos_token_id)
    if config.num_beams == 1 and config.beam_scorer == "huggingface":
        return decoding.sample(step, cache["self"], start_ids, **common)
    return decoding.beam_search(
        step,
        cache["self"],
        start_ids,
        num_beams=config.num_beams,
        num_return_sequences=config.num_return_sequences,
        scorer=config.beam_scorer,
        early_stopping=config.early_stopping,
        gnmt_alpha=config.gnmt_alpha,
        normalize_unfinished=config.normalize_unfinished,
        **common,
    )


def _bucket(size: tf.Tensor, buckets: list[int]) -> tf.Tensor:
    """The smallest bucket that holds `size`; what no bucket holds stays as it is."""
    table = tf.constant(buckets)
    index = tf.searchsorted(table, [size])[0]
    return tf.maximum(table[tf.minimum(index, len(buckets) - 1)], size)


def _generate_ids(function: Callable, ids: np.ndarray, mask: np.ndarray) -> GenerateOutput:
    parts = [
        function(ids[start : start + MAX_BATCH_SIZE], mask[start : start + MAX_BATCH_SIZE])
        for start in range(0, max(len(ids), 1), MAX_BATCH_SIZE)
    ]
    return GenerateOutput(
        np.concatenate([part.sequences.numpy() for part in parts]),
        np.concatenate([part.scores.numpy() for part in parts]),
    )


def _check_ids(inputs: dict[str, Any], model: Any) -> tuple[np.ndarray, np.ndarray]:
    if set(inputs) not in ({"input_ids"}, {"input_ids", "attention_mask"}):
        raise ValueError(
            "inputs must have the keys input_ids and, where there is padding, attention_mask, "
            f"received {', '.join(map(str, inputs)) or 'none'}."
        )
    ids = np.asarray(inputs["input_ids"])
    mask = np.asarray(inputs.get("attention_mask", np.ones_like(ids)))
    if ids.ndim != 2 or mask.shape != ids.shape or ids.dtype.kind not in "iu":
        raise ValueError(
            "input_ids and attention_mask must be integers of one shape [batch, length], received "
            f"{ids.dtype} {ids.shape} and {mask.dtype} {mask.shape}."
        )
    config = model.encoder.config
    if ids.shape[1] > config.max_position_embeddings:
        raise ValueError(
            "input_ids must not be longer than max_position_embeddings "
            f"({config.max_position_embeddings}), received {ids.shape[1]} tokens."
        )
    if ids.size and not 0 <= ids.min() <= ids.max() < config.vocab_size:
        raise ValueError(
            f"input_ids must lie in [0, {config.vocab_size}), received {ids.min()} to {ids.max()}."
        )
    return ids.astype(np.int32), mask.astype(np.int32)
