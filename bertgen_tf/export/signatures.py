"""What an export computes: the functions behind its signatures.

Each signature is a plain graph around what it shares with others: `serving_default`, `beams`, `ids`
and `attention` share one search, `generate_xla` and `beams_xla` its compiled twin, `score` and
`attention` one forward pass. This keeps the graph of a deep model small.
"""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from bertgen_tf.config import GenerationConfig
from bertgen_tf.generation.compiled import generation_function, hypotheses_to_text
from bertgen_tf.generation.inputs import start_prompt
from bertgen_tf.generation.search.logits import Processor
from bertgen_tf.generation.search.sequences import is_one_of
from bertgen_tf.generation.settings import eos_token_ids, total_length, uses_beams
from bertgen_tf.models.encoder_decoder import EncoderDecoderModel
from bertgen_tf.network.tracing import search_graph

# The suffix of signatures compiled by XLA.
COMPILED = "_xla"
# Names that `signatures=` cannot take.
OWN_NAMES = ("serving_default", "generate", "beams", "ids", "score", "attention", "tokens")

_TEXT = tf.TensorSpec([None], tf.string, name="text")


class ServingModule(tf.Module):
    """Holds what the signatures read: weights, vocabulary, functions.

    Attributes:
        functions: those behind the signatures, by name.
        settings: those of the signatures that generate.
    """

    def __init__(
        self,
        model: EncoderDecoderModel,
        config: GenerationConfig,
        variants: Mapping[str, GenerationConfig],
        logits_processor: Sequence[Processor],
    ):
        super().__init__(name="bertgen_tf")
        self.weights = [weight.value for weight in model.weights]
        self.tokenizer, self.decoder_tokenizer = model.tokenizer, model.decoder_tokenizer
        every = every_hypothesis(config)
        settings = dict.fromkeys(("serving_default", "generate_xla", "attention"), config)
        settings |= dict.fromkeys(("beams", "beams_xla", "ids"), every)

        def search(config: GenerationConfig, compiled: bool) -> Callable:
            return generation_function(model, config, compiled, logits_processor=logits_processor)

        plain, compiled, forward = search(every, False), search(every, True), _forward_pass(model)
        functions = {
            "serving_default": _text_signature(model, every, plain, best_only=True),
            "beams": _text_signature(model, every, plain),
            "ids": _ids_signature(model, every, plain),
            "score": _score_signature(model, forward),
            "attention": _attention_signature(model, every, plain, forward),
            "tokens": _tokens_signature(model),
            "generate_xla": _text_signature(model, every, compiled, best_only=True),
            "beams_xla": _text_signature(model, every, compiled),
        }
        for name, variant in variants.items():
            for suffix in ("", COMPILED):
                settings[name + suffix] = variant
                functions[name + suffix] = _text_signature(
                    model,
                    variant,
                    search(variant, bool(suffix)),
                    best_only=variant.num_return_sequences == 1,
                )
        # Not dicts, whose contents would be tracked when the module is saved.
        self.functions = types.MappingProxyType(functions)
        self.settings = types.MappingProxyType(settings)


def every_hypothesis(config: GenerationConfig) -> GenerationConfig:
    """The settings with which a search returns all that it found: every beam of a beam search."""
    return config.replace(num_return_sequences=config.num_beams) if uses_beams(config) else config


def _text_signature(
    model: EncoderDecoderModel,
    config: GenerationConfig,
    search: Callable,
    *,
    best_only: bool = False,
) -> Callable:
    """Text [B] -> text and score [B, n], or [B] with `best_only`."""

    @tf.function(input_signature=[_TEXT], autograph=False)
    def serve(text: tf.Tensor) -> dict[str, tf.Tensor]:
        output = _search_text(model, config, search, text)[1]
        sequences, scores = output.sequences, output.scores
        if best_only:
            sequences = sequences[:, :1]
        texts = hypotheses_to_text(model.preprocessor, sequences)
        if best_only:
            return {"text": texts[:, 0], "score": scores[:, 0]}
        return {"text": tf.ensure_shape(texts, [None, scores.shape[1]]), "score": scores}

    return serve


def _ids_signature(
    model: EncoderDecoderModel, config: GenerationConfig, search: Callable
) -> Callable:
    """input_ids, attention_mask [B, S] -> sequences [B, n, L], score [B, n]."""
    encoder = model.encoder.config

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None], tf.int32, name="input_ids"),
            tf.TensorSpec([None, None], tf.int32, name="attention_mask"),
        ],
        autograph=False,
    )
    def serve(input_ids: tf.Tensor, attention_mask: tf.Tensor) -> dict[str, tf.Tensor]:
        # In JSON the shape of an empty batch is [0].
        batch = tf.shape(input_ids)[0]
        length = tf.size(input_ids) // tf.maximum(batch, 1)
        checks = (
            (
                tf.reduce_all(tf.equal(tf.shape(input_ids), tf.shape(attention_mask))),
                "input_ids and attention_mask must have one shape [batch, length]",
            ),
            (
                length <= encoder.max_source_positions,
                f"input_ids must have at most {encoder.max_source_positions} columns",
            ),
            (
                tf.reduce_all((input_ids >= 0) & (input_ids < encoder.vocab_size)),
                f"input_ids must lie in [0, {encoder.vocab_size})",
            ),
            (
                tf.reduce_all((attention_mask == 0) | (attention_mask == 1)),
                "attention_mask must be 1 on tokens and 0 on padding",
            ),
        )
        asserted = [tf.debugging.Assert(passed, [message]) for passed, message in checks]
        with tf.control_dependencies(asserted):
            input_ids = tf.reshape(input_ids, [batch, length])
            attention_mask = tf.reshape(attention_mask, [batch, length])
            # A search needs at least one column.
            missing = [[0, 0], [0, tf.cast(tf.equal(length, 0), tf.int32)]]
            input_ids = tf.pad(input_ids, missing, constant_values=encoder.pad_token_id)
            attention_mask = tf.pad(attention_mask, missing)
        output = search(
            input_ids, attention_mask, start_prompt(model, batch), _seeds(config, batch)
        )
        shape = [None, config.num_return_sequences, total_length(config, 1)]
        return {
            "sequences": tf.ensure_shape(output.sequences, shape),
            "score": output.scores,
        }

    return serve


def _forward_pass(model: EncoderDecoderModel) -> Callable:
    """For one example: the logits of its target, and its cross-attention weights.

    For one, because the logits and the weights of all layers of a batch would take gigabytes.

    Returns:
        `(input_ids [S], attention_mask [S], decoder_input_ids [T])` -> float32 [T, V], and the
        weights [T, S], averaged over layers and heads.
    """

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int32)] * 3, autograph=False)
    def forward(
        input_ids: tf.Tensor, attention_mask: tf.Tensor, decoder_input_ids: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        mask = attention_mask[tf.newaxis]
        with search_graph(compiled=False):  # rounded as the search rounds
            logits, weights = model.decoder(
                decoder_input_ids[tf.newaxis],
                encoder_hidden_states=model.encoder(input_ids[tf.newaxis], mask, training=False),
                encoder_attention_mask=mask,
                return_attention_weights=True,
                training=False,
            )
        return logits[0], tf.reduce_mean(weights[0], axis=[0, 1])

    return forward


def _score_signature(model: EncoderDecoderModel, forward: Callable) -> Callable:
    """source, target [B] -> log_probability, num_tokens [B]."""
    preprocessor = model.preprocessor

    def score_row(row: tuple[tf.Tensor, ...]) -> tuple[tf.Tensor, tf.Tensor]:
        input_ids, attention_mask, decoder_input_ids, labels, length = row
        logits, _ = forward(input_ids, attention_mask, decoder_input_ids[:length])
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels[:length], logits)
        return -tf.reduce_sum(losses), length

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.string, name="source"),
            tf.TensorSpec([None], tf.string, name="target"),
        ],
        autograph=False,
    )
    def serve(source: tf.Tensor, target: tf.Tensor) -> dict[str, tf.Tensor]:
        source, target = tf.reshape(source, [-1]), tf.reshape(target, [-1])
        same = tf.equal(tf.size(source), tf.size(target))
        asserted = tf.debugging.Assert(same, ["source and target must be equal in number"])
        with tf.control_dependencies([asserted]):
            source = tf.identity(source)
        x, labels, weights = preprocessor.pack(
            preprocessor.encode_source(source), preprocessor.encode_target(target)
        )
        lengths = tf.reduce_sum(tf.cast(weights, tf.int32), axis=1)
        scores, lengths = tf.map_fn(
            score_row,
            (x["input_ids"], x["attention_mask"], x["decoder_input_ids"], labels, lengths),
            fn_output_signature=(tf.TensorSpec([]), tf.TensorSpec([], tf.int32)),
            parallel_iterations=1,
        )
        return {"log_probability": scores, "num_tokens": lengths}

    return serve


def _tokens_signature(model: EncoderDecoderModel) -> Callable:
    """Text [B] -> num_tokens [B]."""

    @tf.function(input_signature=[_TEXT], autograph=False)
    def serve(text: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"num_tokens": model.preprocessor.count_source_tokens(tf.reshape(text, [-1]))}

    return serve


def _attention_signature(
    model: EncoderDecoderModel, config: GenerationConfig, search: Callable, forward: Callable
) -> Callable:
    """Text [B] -> text and score [B], tokens [B, S] and [B, T], attention [B, T, S]."""
    preprocessor = model.preprocessor
    source_pieces = target_pieces = _pieces(preprocessor.tokenizer)
    if preprocessor.target_tokenizer is not preprocessor.tokenizer:
        target_pieces = _pieces(preprocessor.target_tokenizer)

    def show(pieces: tf.Tensor, ids: tf.Tensor, visible: tf.Tensor) -> tf.Tensor:
        # The embeddings may have more rows than there are pieces.
        known = visible & (ids < len(pieces))
        return tf.where(known, tf.gather(pieces, tf.where(known, ids, 0)), "")

    @tf.function(input_signature=[_TEXT], autograph=False)
    def serve(text: tf.Tensor) -> dict[str, tf.Tensor]:
        inputs, output = _search_text(model, config, search, text)
        best = output.sequences[:, 0]  # [B, 1 + max_new_tokens]
        ends = tf.cast(is_one_of(best[:, 1:], eos_token_ids(config, model)), tf.int32)
        generated = tf.cumsum(ends, axis=1, exclusive=True) == 0
        lengths = tf.reduce_sum(tf.cast(generated, tf.int32), axis=1)
        longest = tf.maximum(tf.reduce_max(lengths), 1)  # the maximum of none is negative
        generated = generated[:, :longest]
        batch = tf.shape(best)[0]
        # Without rows there would be no shape.
        missing = [[0, tf.cast(tf.equal(batch, 0), tf.int32)], [0, 0]]
        rows = inputs["input_ids"], inputs["attention_mask"], best[:, :longest]
        weights = tf.map_fn(
            lambda row: forward(*row)[1],
            tuple(tf.pad(tensor, missing) for tensor in rows),
            fn_output_signature=tf.TensorSpec([None, None]),
            parallel_iterations=1,
        )[:batch]
        is_token = tf.cast(inputs["attention_mask"], tf.bool)
        shown = generated[:, :, tf.newaxis] & is_token[:, tf.newaxis]
        return {
            "text": hypotheses_to_text(model.preprocessor, best[:, tf.newaxis])[:, 0],
            "score": output.scores[:, 0],
            "source_tokens": show(source_pieces, inputs["input_ids"], is_token),
            "target_tokens": show(target_pieces, best[:, 1 : 1 + longest], generated),
            "attention": tf.where(shown, weights, 0.0),
        }

    return serve


def _pieces(tokenizer: Any) -> tf.Tensor:
    """The pieces of a vocabulary, string [V]."""
    vocabulary = tokenizer.get_vocab()
    return tf.constant(sorted(vocabulary, key=vocabulary.get))


def _search_text(
    model: EncoderDecoderModel, config: GenerationConfig, search: Callable, text: tf.Tensor
) -> tuple[dict[str, tf.Tensor], Any]:
    """The ids of texts, and what the search found for them."""
    # The server does not check shapes: a scalar may arrive.
    inputs = model.preprocessor.generate_preprocess(tf.reshape(text, [-1]))
    batch = tf.shape(inputs["input_ids"])[0]
    output = search(
        inputs["input_ids"],
        inputs["attention_mask"],
        start_prompt(model, batch),
        _seeds(config, batch),
    )
    return inputs, output


def _seeds(config: GenerationConfig, batch: tf.Tensor) -> tf.Tensor:
    """What `inputs.make_seeds` makes, in the graph."""
    if not config.do_sample:
        return tf.zeros([batch, 2], tf.int32)
    seed = config.seed
    if seed is None:
        # Not tf.random.uniform, which writes the seed of `tf.random.set_seed` into the export.
        seed = tf.raw_ops.RandomUniformInt(
            shape=tf.constant([], tf.int32), minval=0, maxval=2**31 - 1, seed=0, seed2=0
        )
    return tf.stack([tf.fill([batch], seed), tf.range(batch)], axis=1)
