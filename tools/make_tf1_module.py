"""Makes small TF Hub modules in the TF1 format ("hub.Module"), with random weights.

    python tools/make_tf1_module.py encoder VOCAB_TXT OUTPUT_FOLDER
    python tools/make_tf1_module.py shared SPIECE_MODEL OUTPUT_FOLDER
    python tools/make_tf1_module.py unshared VOCAB_TXT OUTPUT_FOLDER

`encoder` looks like google/bert_*: ids in, hidden states out. The others stand in for
google/bertseq2seq/roberta24_* and bert24_*: strings in, strings out, with the tokenizer and
tensor2tensor's beam search (`tensor2tensor/utils/beam_search.py`) inside the graph; the variable
names are those that HuggingFace's converter of these modules reads. All are written with
tf.compat.v1 and share nothing with bertgen_tf, so that they can serve as an independent reference
for it.
"""

import argparse
import dataclasses
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_text as tf_text
from sentencepiece import SentencePieceProcessor

v1 = tf.compat.v1

# tensor2tensor's value for a hypothesis that does not exist.
INF = 1e7
TWISTS = (
    "",
    "hidden",  # the decoder's output is halved
    "ban",  # a token is taken out of the logits
    "late_ban",  # the end is taken out of the log-probabilities, in the first steps
    "first",  # stops once each text has an answer
    "any",  # stops once no running beam of one text can win any more
    "quotes",  # are rewritten before the tokenizer
    "period",  # is deleted from the answer
    "cut_last",  # sources are cut after their special tokens were added
    "show_pad",  # of answers
    "limit_words",  # WordPiece: no words of more than 30 bytes
    "penalize_once",  # only the new log-probability is divided by the penalty
)
ENCODER_SIGNATURE = ("input_ids", "input_mask", "segment_ids")


@dataclasses.dataclass(frozen=True)
class Network:
    """Sizes of the layers, and how their graph is written."""

    hidden_size: int = 12
    num_layers: int = 2
    num_heads: int = 3
    intermediate_size: int = 20
    max_positions: int = 26
    activation: str = "erf"  # "erf" or "tanh" for the two gelus, or "relu"
    epsilon: float = 1e-12

    # Other ways to write the same computation.
    mask_value: float = -10000.0
    scale: str = "multiply"  # "multiply" the scores, "divide" them, or multiply the "query"
    einsum: bool = False  # einsum over heads, or matrix products of two dimensions
    fused_norm: bool = True  # tf.nn.batch_normalization, or (x - mean) * rsqrt * gamma + beta
    # Words are looked up by ids [B, S], by flat ids as in google-research/bert's embedding_lookup,
    # or, as there with use_one_hot_embeddings, by a product of matrices.
    lookup: str = "plain"

    scope: str = ""  # before each variable's name, e.g. "module/"
    resource_variables: bool = True
    train_graph: bool = False  # a second graph with the tag "train" and dropout
    seed: int = 0
    # Trainable variables that no BERT has; added to the hidden states, so that they matter.
    extra_variables: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Encoder(Network):
    """A module like google/bert_*."""

    type_vocab_size: int = 2
    lower_case: bool = True
    mlm: bool = False  # a head for masked words, with a signature of its own
    pooler_activation: bool = True


@dataclasses.dataclass(frozen=True)
class Seq2Seq(Network):
    """A module that stands in for google/bertseq2seq/*."""

    scope: str = "module/"
    shared: bool = True  # one stack for both sides, or a decoder of its own
    decoder_embeddings: bool = False  # of an unshared decoder: embeddings of its own

    # SentencePiece's roles of tests/conftest.py: nobody would guess these ids.
    pad_id: int = 3
    start_id: int = 0
    eos_id: int = 2
    # Not shown in the answer, besides what follows eos. 0 ... n - 1 is tested by one comparison.
    hidden_ids: tuple[int, ...] = (0, 1, 2, 3)
    lower_case: bool = True  # of WordPiece
    unk_token: str = "[UNK]"  # of WordPiece

    max_source_length: int = 14
    add_bos: bool = False  # start_id before each source
    add_eos: bool = False  # eos_id after each source
    fixed_source: bool = False  # pad sources to max_source_length, or to the longest of the batch
    mask_from_pad: bool = False  # what is padding is told by the ids, or by the lengths

    decode_length: int = 9
    beam_size: int = 3
    alpha: float = 0.6
    normalize_unfinished: bool = False
    early_stop: bool = True  # stop when no running beam can win any more
    cached: bool = True  # keep keys and values, or run the decoder on the whole prefix each step
    functional: bool = False  # While of functions, or TF1's Enter and Exit
    go_on: str = "and"  # the condition: i < n and not done, or "not_or": not (i >= n or done)
    extra_rows: int = 0  # of the word embeddings, beyond the vocabulary; their ids are not shown

    # What the graph hides, or does in another way.
    # ((5 + n) / 6)**alpha; "none"; "hidden": alpha can be fed; "power": n**alpha; "ids": n is
    # counted in what was said so far.
    penalty: str = "gnmt"
    # decode_length; a "placeholder"; that many beyond the "source"; a "cond" of two constants by a
    # predicate that can be fed.
    limit: str = "constant"
    hidden_beams: bool = False  # the number of candidates can be fed
    logit_scale: float = 1.0
    twist: str = ""  # one of TWISTS


def make_encoder(folder: str | Path, pieces: Sequence[str], **settings) -> Encoder:
    """Writes a module like google/bert_*, with signatures `tokens` and `tokenization_info`.

    Args:
        folder: to be made; must not exist.
        pieces: the WordPiece vocabulary, in the order of ids.
        **settings: fields of `Encoder`.

    Returns:
        The settings it was made with.
    """
    made = Encoder(**settings)
    _check(made)

    def graph(training: bool) -> dict:
        bert = _Bert(made, _encoder_shapes(made, len(pieces)), training)
        ids, mask, types = (v1.placeholder(tf.int32, [None, None], n) for n in ENCODER_SIGNATURE)
        hidden = bert.embed(ids, "bert/embeddings", types)
        hidden = bert.stack(hidden, "bert/encoder", bert.padding(mask))
        pooled = bert.dense(hidden[:, 0], "bert/pooler/dense")
        pooled = tf.tanh(pooled) if made.pooler_activation else pooled
        inputs = dict(zip(ENCODER_SIGNATURE, (ids, mask, types), strict=True))
        outputs = {"sequence_output": hidden, "pooled_output": pooled}
        signatures = {"tokens": (inputs, outputs)}
        if made.mlm:
            positions = v1.placeholder(tf.int32, [None, None], "mlm_positions")
            logits = bert.masked_words(hidden, positions)
            signatures["mlm"] = (
                {**inputs, "mlm_positions": positions},
                {**outputs, "mlm_logits": logits},
            )
        asset = _asset(vocabulary)
        signatures["tokenization_info"] = (
            {},
            {"vocab_file": tf.identity(asset), "do_lower_case": tf.constant(made.lower_case)},
        )
        return signatures

    with tempfile.TemporaryDirectory() as scratch:
        vocabulary = _write_vocabulary(scratch, pieces)
        _write(folder, made, graph)
    return made


def make_seq2seq(
    folder: str | Path,
    *,
    spiece: bytes | None = None,
    pieces: Sequence[str] | None = None,
    **settings,
) -> Seq2Seq:
    """Writes a module with the signature `default`, strings [batch] -> strings [batch].

    Args:
        folder: to be made; must not exist.
        spiece: a SentencePiece model, which becomes part of the graph.
        pieces: a WordPiece vocabulary in the order of ids, which becomes an asset; one of the two.
        **settings: fields of `Seq2Seq`.

    Returns:
        The settings it was made with.
    """
    made = Seq2Seq(**settings)
    _check(made)
    if (spiece is None) == (pieces is None):
        raise ValueError("one of spiece and pieces must be given, and not both")

    def graph(training: bool) -> dict:
        text = v1.placeholder(tf.string, [None], "input_texts")
        if spiece is not None:
            tokenizer = _SentencePieces(spiece)
            vocab_size = SentencePieceProcessor(model_proto=spiece).get_piece_size()
        else:
            tokenizer = _WordPieces(made, _asset(vocabulary))
            vocab_size = len(pieces)
        bert = _Bert(made, _seq2seq_shapes(made, vocab_size + made.extra_rows), training)
        with tf.name_scope("source"):
            read = tf.strings.regex_replace(text, '"', "'") if made.twist == "quotes" else text
            ids, mask = _read_source(made, tokenizer.encode(read))
        with tf.name_scope("reading"):
            memory = bert.embed(ids, "bert/embeddings")
            memory = bert.stack(memory, "bert/encoder", bert.padding(mask))
        with tf.name_scope("search"):
            sequences, scores = _Search(made, bert, memory, mask).run()
            sequences = tf.identity(sequences, "sequences")
            tf.identity(scores, "scores")
        with tf.name_scope("answer"):
            answer = tokenizer.decode(_visible(made, sequences[:, 1:], vocab_size))
            if made.twist == "period":
                answer = tf.strings.regex_replace(answer, "[.]", "")
        return {"default": ({"default": text}, {"default": answer})}

    with tempfile.TemporaryDirectory() as scratch:
        vocabulary = _write_vocabulary(scratch, pieces or ())
        _write(folder, made, graph)
    return made


def make_shared_original(folder: str | Path, spiece: bytes, **settings) -> Seq2Seq:
    """Writes a small stand-in of google/bertseq2seq/roberta24_*: one stack, SentencePiece.

    Special ids are those of the model, which must have all, unless `settings` tell others.
    """
    model = SentencePieceProcessor(model_proto=spiece)
    ids = {"pad_id": model.pad_id(), "start_id": model.bos_id(), "eos_id": model.eos_id()}
    defaults = {"seed": 2, "hidden_ids": (*ids.values(), model.unk_id()), **ids}
    return make_seq2seq(folder, spiece=spiece, **{**defaults, **settings})


def make_unshared_original(folder: str | Path, pieces: Sequence[str], **settings) -> Seq2Seq:
    """Writes a small stand-in of google/bertseq2seq/bert24_*: two stacks, WordPiece.

    [PAD], [CLS] and [SEP] serve as padding, start and end, unless `settings` tell other ids.
    """
    roles = {"pad_id": "[PAD]", "start_id": "[CLS]", "eos_id": "[SEP]"}
    ids = {name: list(pieces).index(piece) for name, piece in roles.items() if piece in pieces}
    defaults = {"shared": False, "seed": 2, "hidden_ids": tuple(ids.values()), **ids}
    return make_seq2seq(folder, pieces=pieces, **{**defaults, **settings})


def read_weights(folder: str | Path) -> dict[str, np.ndarray]:
    """The variables of a module by name."""
    reader = tf.train.load_checkpoint(str(Path(folder, "variables", "variables")))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def _check(made: Network) -> None:
    choices = {
        "activation": ("erf", "tanh", "relu"),
        "scale": ("multiply", "divide", "query"),
        "lookup": ("plain", "flat", "one_hot"),
        "go_on": ("and", "not_or"),
        "penalty": ("gnmt", "none", "hidden", "power", "ids"),
        "limit": ("constant", "placeholder", "source", "cond"),
        "twist": TWISTS,
    }
    for name, allowed in choices.items():
        if getattr(made, name, allowed[0]) not in allowed:
            raise ValueError(
                f"{name} must be one of {', '.join(allowed)}, received {getattr(made, name)!r}"
            )
    if made.hidden_size % made.num_heads:
        raise ValueError(
            f"hidden_size must be a multiple of num_heads, received {made.hidden_size} and "
            f"{made.num_heads}"
        )


# Variables.


def _norm_shapes(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}/beta": (size,), f"{name}/gamma": (size,)}


def _dense_shapes(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}/kernel": (inputs, outputs), f"{name}/bias": (outputs,)}


def _embedding_shapes(name: str, made: Network, vocab_size: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}/word_embeddings": (vocab_size, made.hidden_size),
        f"{name}/position_embeddings": (made.max_positions, made.hidden_size),
        **_norm_shapes(f"{name}/LayerNorm", made.hidden_size),
    }


def _layer_shapes(name: str, made: Network, cross: bool, main: bool = True) -> dict:
    hidden = made.hidden_size
    shapes = {}
    attentions = [("self", "output")] * main + [("encdec", "encdec_output")] * cross
    for attention, output in attentions:
        for part in ("query", "key", "value"):
            shapes |= _dense_shapes(f"{name}/attention/{attention}/{part}", hidden, hidden)
        shapes |= _dense_shapes(f"{name}/attention/{output}/dense", hidden, hidden)
        shapes |= _norm_shapes(f"{name}/attention/{output}/LayerNorm", hidden)
    if main:
        shapes |= _dense_shapes(f"{name}/intermediate/dense", hidden, made.intermediate_size)
        shapes |= _dense_shapes(f"{name}/output/dense", made.intermediate_size, hidden)
        shapes |= _norm_shapes(f"{name}/output/LayerNorm", hidden)
    return shapes


def _encoder_shapes(made: Encoder, vocab_size: int) -> dict[str, tuple[int, ...]]:
    hidden = made.hidden_size
    shapes = _embedding_shapes("bert/embeddings", made, vocab_size)
    shapes["bert/embeddings/token_type_embeddings"] = (made.type_vocab_size, hidden)
    for i in range(made.num_layers):
        shapes |= _layer_shapes(f"bert/encoder/layer_{i}", made, cross=False)
    shapes |= _dense_shapes("bert/pooler/dense", hidden, hidden)
    if made.mlm:
        shapes |= _dense_shapes("cls/predictions/transform/dense", hidden, hidden)
        shapes |= _norm_shapes("cls/predictions/transform/LayerNorm", hidden)
        shapes["cls/predictions/output_bias"] = (vocab_size,)
    return shapes


def _seq2seq_shapes(made: Seq2Seq, vocab_size: int) -> dict[str, tuple[int, ...]]:
    shapes = _embedding_shapes("bert/embeddings", made, vocab_size)
    for i in range(made.num_layers):
        shapes |= _layer_shapes(f"bert/encoder/layer_{i}", made, cross=made.shared)
    if not made.shared:
        if made.decoder_embeddings:
            shapes |= _embedding_shapes("bert/decoder/embeddings", made, vocab_size)
        for i in range(made.num_layers):
            shapes |= _layer_shapes(f"bert/decoder/layer_{i}", made, cross=True)
    return shapes


def _random_weights(seed: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Nothing is 0 or 1, so that no term can be left out unnoticed."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        values = rng.normal(0.0, 0.2, shape)  # biases and beta
        if name.endswith("kernel"):
            # Attention that chooses, rather than one that averages.
            strength = 3.0 if re.search("(query|key)/kernel$", name) else 1.0
            values = rng.normal(0.0, strength / math.sqrt(shape[0]), shape)
        elif name.endswith("embeddings"):
            values = rng.normal(0.0, 1.2 if "position" in name else 0.6, shape)
        elif name.endswith("gamma"):
            # Of both signs: the word embeddings are also the output's, and a decoder would see its
            # input in its output, and repeat it for ever.
            values = rng.normal(1.0, 0.3, shape) * rng.choice([-1.0, 1.0], shape)
        weights[name] = values.astype(np.float32)
    return weights


# The network.


class _Bert:
    """Layers of one graph over its variables; what names they have is told by the caller."""

    def __init__(self, made: Network, shapes: dict[str, tuple[int, ...]], training: bool):
        self.made = made
        self.training = training
        shapes = {**shapes, **{name: (made.hidden_size,) for name in made.extra_variables}}
        self.variables = {
            name: v1.get_variable(
                made.scope + name,
                shape,
                initializer=v1.zeros_initializer(),
                use_resource=made.resource_variables,
            )
            for name, shape in shapes.items()
        }

    def embed(
        self, ids: tf.Tensor, name: str, types: tf.Tensor | None = None, first=0
    ) -> tf.Tensor:
        """Ids [B, S] -> [B, S, H]; the first id is at position `first`."""
        word = self.variables[f"{name}/word_embeddings"]
        if self.made.lookup == "plain":
            hidden = tf.nn.embedding_lookup(word, ids)
        else:
            rows, size = word.shape.as_list()
            flat = tf.reshape(tf.expand_dims(ids, axis=[-1]), [-1])
            if self.made.lookup == "flat":
                hidden = tf.gather(word, flat)
            else:
                hidden = tf.matmul(tf.one_hot(flat, depth=rows), word)
            shape = tf.shape(ids)
            hidden = tf.reshape(hidden, [shape[0], shape[1], size])
        if types is not None:
            # As in google-research/bert: faster than a lookup on its accelerators.
            table = self.variables[f"{name}/token_type_embeddings"]
            one_hot = tf.one_hot(tf.reshape(types, [-1]), self.made.type_vocab_size)
            hidden += tf.reshape(tf.matmul(one_hot, table), tf.shape(hidden))
        positions = tf.convert_to_tensor(self.variables[f"{name}/position_embeddings"])
        hidden += tf.slice(positions, [first, 0], [tf.shape(ids)[1], -1])[tf.newaxis]
        for extra in self.made.extra_variables:
            hidden += self.variables[extra]
        return self._dropout(self.norm(hidden, f"{name}/LayerNorm"))

    def stack(self, hidden: tf.Tensor, name: str, mask: tf.Tensor) -> tf.Tensor:
        for i in range(self.made.num_layers):
            layer = f"{name}/layer_{i}"
            attention = f"{layer}/attention/self"
            keys, values = self.project_memory(hidden, attention)
            hidden = self.attend(hidden, keys, values, mask, attention, f"{layer}/attention/output")
            hidden = self.feed_forward(hidden, layer)
        return hidden

    def decoder_layer(
        self,
        hidden: tf.Tensor,
        layer: str,
        self_memory: tuple[tf.Tensor, tf.Tensor],
        self_mask: tf.Tensor | None,
        memory: tuple[tf.Tensor, tf.Tensor],
        mask: tf.Tensor,
    ) -> tf.Tensor:
        name = f"{layer}/attention"
        hidden = self.attend(hidden, *self_memory, self_mask, f"{name}/self", f"{name}/output")
        hidden = self.attend(hidden, *memory, mask, f"{name}/encdec", f"{name}/encdec_output")
        return self.feed_forward(hidden, layer)

    def padding(self, mask: tf.Tensor) -> tf.Tensor:
        """1 and 0 [B, S] -> what is added to scores [B, A, Q, S]."""
        visible = tf.cast(mask[:, tf.newaxis, tf.newaxis, :], tf.float32)
        return (1.0 - visible) * self.made.mask_value

    def project_memory(self, hidden: tf.Tensor, name: str) -> tuple[tf.Tensor, tf.Tensor]:
        """[B, S, H] -> keys and values [B, S, A, D]."""
        return self._heads(hidden, f"{name}/key"), self._heads(hidden, f"{name}/value")

    def attend(
        self,
        hidden: tf.Tensor,
        keys: tf.Tensor,
        values: tf.Tensor,
        mask: tf.Tensor | None,
        name: str,
        output: str,
    ) -> tf.Tensor:
        """[B, Q, H], with the residual connection and layer normalisation of `output`."""
        made = self.made
        size = made.hidden_size // made.num_heads
        query = self._heads(hidden, f"{name}/query")
        if made.scale == "query":
            query *= size**-0.5
        if made.einsum:
            scores = tf.einsum("bqad,bkad->baqk", query, keys)
        else:
            query, keys, values = (tf.transpose(x, [0, 2, 1, 3]) for x in (query, keys, values))
            scores = tf.matmul(query, keys, transpose_b=True)
        if made.scale == "multiply":
            scores = tf.multiply(scores, 1.0 / math.sqrt(size))
        elif made.scale == "divide":
            scores /= math.sqrt(size)
        if mask is not None:
            scores += mask
        probabilities = self._dropout(tf.nn.softmax(scores))
        kernel, bias = self.variables[f"{output}/dense/kernel"], f"{output}/dense/bias"
        if made.einsum:
            context = tf.einsum("baqk,bkad->bqad", probabilities, values)
            kernel = tf.reshape(kernel, [made.num_heads, size, made.hidden_size])
            result = tf.einsum("bqad,adh->bqh", context, kernel) + self.variables[bias]
        else:
            context = tf.transpose(tf.matmul(probabilities, values), [0, 2, 1, 3])
            context = tf.reshape(context, tf.shape(hidden))
            result = self.dense(context, f"{output}/dense")
        return self.norm(self._dropout(result) + hidden, f"{output}/LayerNorm")

    def feed_forward(self, hidden: tf.Tensor, layer: str) -> tf.Tensor:
        inner = self.activate(self.dense(hidden, f"{layer}/intermediate/dense"))
        result = self._dropout(self.dense(inner, f"{layer}/output/dense"))
        return self.norm(result + hidden, f"{layer}/output/LayerNorm")

    def activate(self, x: tf.Tensor) -> tf.Tensor:
        if self.made.activation == "relu":
            return tf.nn.relu(x)
        if self.made.activation == "erf":
            return x * (0.5 * (1.0 + tf.math.erf(x / math.sqrt(2.0))))
        return x * (0.5 * (1.0 + tf.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * tf.pow(x, 3)))))

    def dense(self, x: tf.Tensor, name: str) -> tf.Tensor:
        kernel, bias = self.variables[f"{name}/kernel"], self.variables[f"{name}/bias"]
        if self.made.einsum:
            return tf.einsum("...i,io->...o", x, kernel) + bias
        inputs, outputs = kernel.shape.as_list()
        flat = tf.nn.bias_add(tf.matmul(tf.reshape(x, [-1, inputs]), kernel), bias)
        return tf.reshape(flat, tf.concat([tf.shape(x)[:-1], [outputs]], axis=0))

    def norm(self, x: tf.Tensor, name: str) -> tf.Tensor:
        beta, gamma = self.variables[f"{name}/beta"], self.variables[f"{name}/gamma"]
        mean, variance = tf.nn.moments(x, axes=[-1], keepdims=True)
        if self.made.fused_norm:
            return tf.nn.batch_normalization(x, mean, variance, beta, gamma, self.made.epsilon)
        return (x - mean) * v1.rsqrt(variance + self.made.epsilon) * gamma + beta

    def logits(self, hidden: tf.Tensor, name: str) -> tf.Tensor:
        """[R, H] -> [R, V], over the word embeddings of `name`."""
        table = self.variables[f"{name}/word_embeddings"]
        if self.made.einsum:
            return tf.einsum("rh,vh->rv", hidden, table)
        return tf.matmul(hidden, table, transpose_b=True)

    def masked_words(self, hidden: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
        name = "cls/predictions"
        hidden = tf.gather(hidden, positions, batch_dims=1)
        hidden = self.activate(self.dense(hidden, f"{name}/transform/dense"))
        hidden = self.norm(hidden, f"{name}/transform/LayerNorm")
        table = self.variables["bert/embeddings/word_embeddings"]
        return tf.einsum("bsh,vh->bsv", hidden, table) + self.variables[f"{name}/output_bias"]

    def _heads(self, x: tf.Tensor, name: str) -> tf.Tensor:
        heads = self.made.num_heads
        size = self.made.hidden_size // heads
        if self.made.einsum:
            kernel = tf.reshape(self.variables[f"{name}/kernel"], [-1, heads, size])
            bias = tf.reshape(self.variables[f"{name}/bias"], [heads, size])
            return tf.einsum("bsh,had->bsad", x, kernel) + bias
        shape = tf.shape(x)
        return tf.reshape(self.dense(x, name), [shape[0], shape[1], heads, size])

    def _dropout(self, x: tf.Tensor) -> tf.Tensor:
        return tf.nn.dropout(x, rate=0.1) if self.training else x


# Text.


class _SentencePieces:
    def __init__(self, model: bytes):
        self.tokenizer = tf_text.SentencepieceTokenizer(model, out_type=tf.int32)

    def encode(self, text: tf.Tensor) -> tf.RaggedTensor:
        return self.tokenizer.tokenize(text)

    def decode(self, ids: tf.RaggedTensor) -> tf.Tensor:
        return self.tokenizer.detokenize(ids)


class _WordPieces:
    def __init__(self, made: Seq2Seq, file: tf.Tensor):
        index, line = tf.lookup.TextFileIndex.LINE_NUMBER, tf.lookup.TextFileIndex.WHOLE_LINE
        to_id = tf.lookup.TextFileInitializer(file, tf.string, line, tf.int64, index)
        to_piece = tf.lookup.TextFileInitializer(file, tf.int64, index, tf.string, line)
        self.pieces = v1.lookup.StaticHashTable(to_piece, made.unk_token)
        self.tokenizer = tf_text.BertTokenizer(
            v1.lookup.StaticHashTable(to_id, -1),
            token_out_type=tf.int64,
            unknown_token=made.unk_token,
            lower_case=made.lower_case,
            max_bytes_per_word=30 if made.twist == "limit_words" else 100,
        )

    def encode(self, text: tf.Tensor) -> tf.RaggedTensor:
        return tf.cast(self.tokenizer.tokenize(text).merge_dims(1, 2), tf.int32)

    def decode(self, ids: tf.RaggedTensor) -> tf.Tensor:
        pieces = self.pieces.lookup(tf.cast(ids.flat_values, tf.int64))
        text = tf.strings.reduce_join(ids.with_flat_values(pieces), axis=1, separator=" ")
        return tf.strings.regex_replace(text, " ##", "")


def _read_source(made: Seq2Seq, ids: tf.RaggedTensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Ragged ids -> ids and mask, int32 [B, S]."""
    rows = ids.nrows(tf.int32)

    def column(token: int) -> tf.Tensor:
        return tf.fill([rows, 1], token)

    if made.twist != "cut_last":
        ids = ids[:, : made.max_source_length - made.add_bos - made.add_eos]
    if made.add_bos or made.add_eos:
        parts = (
            [column(made.start_id)] * made.add_bos + [ids] + [column(made.eos_id)] * made.add_eos
        )
        ids = tf.concat(parts, axis=1)
    ids = ids[:, : made.max_source_length]
    shape = [None, made.max_source_length] if made.fixed_source else None
    dense = ids.to_tensor(default_value=made.pad_id, shape=shape)
    if made.mask_from_pad:
        return dense, tf.cast(tf.not_equal(dense, made.pad_id), tf.int32)
    return dense, tf.sequence_mask(ids.row_lengths(), tf.shape(dense)[1], tf.int32)


def _visible(made: Seq2Seq, ids: tf.Tensor, vocab_size: int) -> tf.RaggedTensor:
    """What stands before the first eos and is not hidden."""
    hidden = [i for i in made.hidden_ids if made.twist != "show_pad" or i != made.pad_id]
    ends = tf.cumsum(tf.cast(tf.equal(ids, made.eos_id), tf.int32), axis=1)
    keep = tf.equal(ends, 0)
    if sorted(hidden) == list(range(len(hidden))):
        keep = tf.logical_and(keep, ids >= len(hidden))
    else:
        for token in hidden:
            keep = tf.logical_and(keep, tf.not_equal(ids, token))
    if made.extra_rows:
        keep = tf.logical_and(keep, ids < vocab_size)
    return tf.ragged.boolean_mask(ids, keep)


# Search.


class _Search:
    """tensor2tensor's beam search with the decoder of one graph.

    B batch, K beams, T tokens so far, V vocabulary; rows are B * K.
    """

    def __init__(self, made: Seq2Seq, bert: _Bert, memory: tf.Tensor, mask: tf.Tensor):
        self.made = made
        self.bert = bert
        self.stack = "bert/encoder" if made.shared else "bert/decoder"
        own = not made.shared and made.decoder_embeddings
        self.embeddings = "bert/decoder/embeddings" if own else "bert/embeddings"
        self.batch = tf.shape(memory)[0]
        self.layers = [f"{self.stack}/layer_{i}" for i in range(made.num_layers)]
        memory = self._to_beams(memory)
        self.mask = bert.padding(self._to_beams(mask))
        self.memory = [
            bert.project_memory(memory, f"{layer}/attention/encdec") for layer in self.layers
        ]
        self.limit = made.decode_length
        if made.limit == "placeholder":
            self.limit = v1.placeholder_with_default(made.decode_length, [], "decode_limit")
        elif made.limit == "source":
            self.limit = tf.shape(mask)[1] + made.decode_length
        elif made.limit == "cond":
            short = v1.placeholder_with_default(True, [], "short")
            self.limit = v1.cond(
                short, lambda: tf.constant(3), lambda: tf.constant(made.decode_length)
            )
        self.alpha = made.alpha
        if made.penalty == "hidden":
            self.alpha = v1.placeholder_with_default(made.alpha, [], "exponent")
        self.kept = made.beam_size
        if made.hidden_beams:
            self.kept = v1.placeholder_with_default(made.beam_size, [], "beam_width")

    def run(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Best sequences int32 [B, 1 + T] with the start token first, and their scores [B]."""
        made, batch, beams = self.made, self.batch, self.made.beam_size
        heads = made.num_heads
        size = made.hidden_size // heads
        first = {
            "step": tf.constant(0),
            "alive": tf.fill([batch, beams, 1], made.start_id),
            "sums": tf.tile([[0.0] + [-np.inf] * (beams - 1)], [batch, 1]),
            "ended": tf.fill([batch, beams, 1], made.pad_id),
            "scores": tf.fill([batch, beams], -INF),
            "exists": tf.zeros([batch, beams], tf.bool),
        }
        shapes = {
            "step": [],
            "alive": [None, beams, None],
            "sums": [None, beams],
            "ended": [None, beams, None],
            "scores": [None, beams],
            "exists": [None, beams],
        }
        if made.cached:
            for i in range(made.num_layers):
                for part in ("keys", "values"):
                    first[f"{part}{i}"] = tf.zeros([batch, beams, 0, heads, size])
                    shapes[f"{part}{i}"] = [None, beams, None, heads, size]
        last = v1.while_loop(
            lambda state: self._goes_on(state),
            lambda state: [self._step(state)],
            [first],
            shape_invariants=[{name: tf.TensorShape(shape) for name, shape in shapes.items()}],
        )
        last = last[0] if isinstance(last, list | tuple) else last
        any_ended = tf.reduce_any(last["exists"], axis=1)
        sums = last["sums"]
        if made.normalize_unfinished and made.penalty != "none":
            sums /= self._penalty(self.limit)
        sequences = tf.where(any_ended[:, None, None], last["ended"], last["alive"])
        scores = tf.where(any_ended[:, None], last["scores"], sums)
        return sequences[:, 0], scores[:, 0]

    def _goes_on(self, state: dict) -> tf.Tensor:
        more = tf.less(state["step"], self.limit)
        if not self.made.early_stop:
            return more
        if self.made.twist == "first":
            done = tf.reduce_all(tf.reduce_any(state["exists"], axis=1))
            return tf.logical_and(more, tf.logical_not(done))
        best = state["sums"][:, 0]
        penalty = self._penalty(self.limit)
        best = best if penalty is None else best / penalty
        exists = tf.cast(state["exists"], tf.float32)
        worst = tf.reduce_min(state["scores"] * exists, axis=1)
        worst += (1.0 - tf.cast(tf.reduce_any(state["exists"], axis=1), tf.float32)) * -INF
        reduce = tf.reduce_any if self.made.twist == "any" else tf.reduce_all
        done = reduce(tf.greater(worst, best))
        if self.made.go_on == "not_or":
            return tf.logical_not(tf.logical_or(state["step"] >= self.limit, done))
        return tf.logical_and(more, tf.logical_not(done))

    def _step(self, state: dict) -> dict:
        made, beams = self.made, self.made.beam_size
        logits, cache = self._decode(state)
        vocab_size = logits.shape[-1]
        logits = tf.reshape(logits, [self.batch, beams, vocab_size])
        log_probs = logits - tf.reduce_logsumexp(logits, axis=2, keepdims=True)
        if made.twist == "late_ban":
            early = tf.cast(state["step"] < 3, tf.float32)
            log_probs -= 1e9 * early * tf.one_hot(made.eos_id, vocab_size)
        penalty = self._penalty(state["step"] + 1)
        if made.penalty == "ids":
            said = tf.not_equal(state["alive"][:, :1], made.pad_id)
            said = tf.reduce_sum(tf.cast(said, tf.float32), axis=2)[:, :, None]
            penalty = tf.pow((5.0 + said) / 6.0, made.alpha)
        if made.twist == "penalize_once":
            sums, penalty = log_probs / penalty + state["sums"][:, :, None], None
        else:
            sums = log_probs + state["sums"][:, :, None]
        scores = sums if penalty is None else sums / penalty
        penalty = penalty[:, 0] if made.penalty == "ids" else penalty
        scores = tf.reshape(scores, [self.batch, beams * vocab_size])
        scores, places = self._top(scores, 2)
        parents, tokens = places // vocab_size, places % vocab_size
        grown = tf.gather(state["alive"], parents, batch_dims=1)
        grown = tf.concat([grown, tokens[:, :, None]], axis=2)
        ends = tf.equal(tokens, made.eos_id)

        _, kept = self._top(scores + tf.cast(ends, tf.float32) * -INF, 1)
        kept_parents = tf.gather(parents, kept, batch_dims=1)
        filled = tf.pad(state["ended"], [[0, 0], [0, 0], [0, 1]], constant_values=made.pad_id)
        offered = scores + (1.0 - tf.cast(ends, tf.float32)) * -INF
        all_scores = tf.concat([state["scores"], offered], axis=1)
        _, best = self._top(all_scores, 1)
        new = {
            "step": state["step"] + 1,
            "alive": tf.gather(grown, kept, batch_dims=1),
            "sums": tf.gather(scores if penalty is None else scores * penalty, kept, batch_dims=1),
            "ended": tf.gather(tf.concat([filled, grown], axis=1), best, batch_dims=1),
            "scores": tf.gather(all_scores, best, batch_dims=1),
            "exists": tf.gather(tf.concat([state["exists"], ends], axis=1), best, batch_dims=1),
        }
        return new | {
            name: tf.gather(tensor, kept_parents, batch_dims=1) for name, tensor in cache.items()
        }

    def _top(self, scores: tf.Tensor, times: int) -> list[tf.Tensor]:
        size = times * self.made.beam_size
        found = tf.math.top_k(scores, times * self.kept)
        return [tf.ensure_shape(tensor, [None, size]) for tensor in found]

    def _decode(self, state: dict) -> tuple[tf.Tensor, dict]:
        """Logits of the next token [rows, V], and the cache with this step."""
        made, bert = self.made, self.bert
        rows = self.batch * made.beam_size
        heads = made.num_heads
        size = made.hidden_size // heads
        cache = {}
        if made.cached:
            ids = tf.reshape(state["alive"][:, :, -1], [rows, 1])
            hidden = bert.embed(ids, self.embeddings, first=state["step"])
        else:
            ids = tf.reshape(state["alive"], [rows, -1])
            hidden = bert.embed(ids, self.embeddings)
        for i, layer in enumerate(self.layers):
            new = bert.project_memory(hidden, f"{layer}/attention/self")
            mask = None
            if made.cached:
                grown = []
                for part, tensor in zip(("keys", "values"), new, strict=True):
                    tensor = tf.reshape(tensor, [self.batch, made.beam_size, 1, heads, size])
                    tensor = tf.concat([state[f"{part}{i}"], tensor], axis=2)
                    cache[f"{part}{i}"] = tensor
                    grown.append(tf.reshape(tensor, [rows, -1, heads, size]))
                new = tuple(grown)
            else:
                length = tf.shape(ids)[1]
                later = 1.0 - tf.linalg.band_part(tf.ones([length, length]), -1, 0)
                mask = later[None, None] * made.mask_value
            hidden = bert.decoder_layer(hidden, layer, new, mask, self.memory[i], self.mask)
        hidden = hidden[:, -1]
        if made.twist == "hidden":
            hidden *= 0.5
        logits = bert.logits(hidden, self.embeddings)
        if made.twist == "ban":
            logits -= 1e9 * tf.one_hot(20, logits.shape[-1])
        return (logits if made.logit_scale == 1.0 else logits * made.logit_scale), cache

    def _penalty(self, length: tf.Tensor | int) -> tf.Tensor | None:
        if self.made.penalty == "none":
            return None
        length = tf.cast(length, tf.float32)
        base = length if self.made.penalty == "power" else (5.0 + length) / 6.0
        return tf.pow(base, self.alpha)

    def _to_beams(self, tensor: tf.Tensor) -> tf.Tensor:
        """[B, ...] -> [B * K, ...]."""
        return tf.repeat(tensor, self.made.beam_size, axis=0)


# Files.


def _write_vocabulary(scratch: str, pieces: Sequence[str]) -> str:
    path = Path(scratch, "vocab.txt")
    path.write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    return str(path)


def _asset(path: str) -> tf.Tensor:
    tensor = tf.constant(path, name="vocab_path")
    v1.add_to_collection(v1.GraphKeys.ASSET_FILEPATHS, tensor)
    return tensor


def _write(folder: str | Path, made: Network, build: Callable[[bool], dict]) -> None:
    output = Path(folder)
    if output.exists():
        raise FileExistsError(f"folder {output} exists: remove it or choose another")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    partial.rmdir()  # the builder makes it, or refuses
    try:
        builder = v1.saved_model.Builder(str(partial))
        for training in (False, True) if made.train_graph else (False,):
            _add_graph(builder, made, build, training)
        builder.save()
        # The version of TF Hub's format for hub.Module: field 1 of ModuleDef is 3.
        Path(partial, "tfhub_module.pb").write_bytes(b"\x08\x03")
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _add_graph(
    builder: v1.saved_model.Builder, made: Network, build: Callable[[bool], dict], training: bool
) -> None:
    functional = getattr(made, "functional", False)
    before = v1.control_flow_v2_enabled()
    (v1.enable_control_flow_v2 if functional else v1.disable_control_flow_v2)()
    try:
        with tf.Graph().as_default(), v1.Session() as session:
            if isinstance(made, Seq2Seq):
                v1.train.create_global_step()
            signatures = {
                name: v1.saved_model.build_signature_def(
                    *(
                        {key: v1.saved_model.build_tensor_info(t) for key, t in tensors.items()}
                        for tensors in pair
                    )
                )
                for name, pair in build(training).items()
            }
            common = {
                "signature_def_map": signatures,
                "assets_collection": v1.get_collection(v1.GraphKeys.ASSET_FILEPATHS),
                "main_op": v1.tables_initializer(),
                "strip_default_attrs": True,
            }
            if training:
                builder.add_meta_graph(["train"], **common)
                return
            session.run(v1.global_variables_initializer())
            variables = v1.trainable_variables()
            shapes = {v.op.name: tuple(v.shape.as_list()) for v in variables}
            weights = _random_weights(made.seed, shapes)
            for variable in variables:
                variable.load(weights[variable.op.name], session)
            builder.add_meta_graph_and_variables(session, [], **common)
    finally:
        (v1.enable_control_flow_v2 if before else v1.disable_control_flow_v2)()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["encoder", "shared", "unshared"])
    parser.add_argument("vocabulary", type=Path)
    parser.add_argument("output_folder")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")
    arguments = parser.parse_args()
    try:
        content = arguments.vocabulary.read_bytes()
        if arguments.kind == "shared":
            make_shared_original(arguments.output_folder, content, seed=arguments.seed)
        else:
            make = make_encoder if arguments.kind == "encoder" else make_unshared_original
            make(arguments.output_folder, content.decode().splitlines(), seed=arguments.seed)
    except (OSError, ValueError, RuntimeError) as error:  # the last is sentencepiece's
        sys.exit(f"error: {error}")
    print(f"wrote {arguments.output_folder}")


if __name__ == "__main__":
    main()
