"""Text pairs to training batches, sources to ids, ids to text: in the graph, over a tokenizer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from bertgen_tf.checks import check_integer
from bertgen_tf.tokenizers import BertGenerationTokenizer, BertTokenizer, Ids
from bertgen_tf.tokenizers.interface import visible_ids

Batch = tuple[dict[str, tf.Tensor], tf.Tensor, tf.Tensor]


def _check_length(name: str, value: Any, least: int) -> Any:
    if tf.is_tensor(value):  # a scalar that is known only when the graph runs
        return value
    return check_integer(name, value, least)


def _check_token_ids(ids: Any, vocab_size: int) -> np.ndarray:
    """Sorted int64 ids, each once. An array, because tf.Module would wrap a list."""
    try:
        array = np.asarray(list(ids))
    except TypeError:
        array = np.asarray(ids)
    if array.size == 0 and array.ndim == 1:
        return np.zeros([0], np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(f"`hidden_token_ids` must be a list of integers; received {ids!r}.")
    if array.min() < 0 or array.max() >= vocab_size:
        raise ValueError(
            f"`hidden_token_ids` must lie in [0, {vocab_size}), the vocabulary; received {ids!r}."
        )
    return np.unique(array.astype(np.int64))


class Seq2SeqPreprocessor(tf.Module):
    """Turns text into what an encoder-decoder trains on and generates from.

    The target ids t1 ... tn become `decoder_input_ids` [bos, t1 ... tn] and labels [t1 ... tn,
    eos]: the shift between the two is made here and nowhere else. No other special tokens are
    added, as in the BertGeneration originals, unless `add_eos`, `add_bos` and `mask_first` say so.

    Models warm-started from BERT need all three. BERT always saw [CLS] text [SEP], and many BERTs
    keep a huge activation at position 0 and on every [CLS], on which attention rests; after layer
    normalisation nothing else is left there. So a source without [CLS] loses its first token, and
    a decoder can hardly infer the first word from its [CLS], even if there are two of them (Hugging
    Face's BERT2BERT). From [MASK], where BERT always predicted words, it can.

    An empty source is a row of padding, or of the special tokens alone.

    Args:
        tokenizer: gives the ids, and those of pad, bos and eos.
        max_source_length: longer sources are cut; at least 1 besides special tokens.
        max_target_length: longer targets are cut so that bos, or eos, still fits; at least 1
            besides special tokens.
        add_eos: end each source with eos, also when it was cut.
        add_bos: begin each source with bos.
        mask_first: begin each target with the mask token: the decoder reads [bos, mask, t1 ... tn]
            and learns to produce [mask, t1 ... tn, eos], of which `detokenize` shows t1 ... tn. The
            mask token counts towards the lengths of targets and of generated outputs.
        hidden_token_ids: further ids that `generate_postprocess` leaves out of the text, besides
            pad, bos and what follows eos.
        decoder_tokenizer: the tokenizer of targets, if it differs from that of sources; what is
            said here about pad, bos, eos and mask applies to each side with its own.
        prose: False, for a `BertTokenizer` only: `generate_postprocess` puts single spaces between
            words, also around punctuation, and shows every other token, as the WordPiece modules of
            TF Hub do, instead of `BertTokenizer.detokenize`.

    Raises:
        TypeError, ValueError: a length is not an integer or too small, or an id is not in the
            vocabulary.
    """

    def __init__(
        self,
        tokenizer: BertGenerationTokenizer | BertTokenizer,
        max_source_length: int = 128,
        max_target_length: int = 128,
        add_eos: bool = False,
        add_bos: bool = False,
        mask_first: bool = False,
        hidden_token_ids: Sequence[int] = (),
        prose: bool = True,
        decoder_tokenizer: BertGenerationTokenizer | BertTokenizer | None = None,
    ):
        super().__init__(name="seq2seq_preprocessor")
        target = tokenizer if decoder_tokenizer is None else decoder_tokenizer
        options = {
            "add_eos": add_eos,
            "add_bos": add_bos,
            "mask_first": mask_first,
            "prose": prose,
        }
        for name, value in options.items():
            if not isinstance(value, bool):
                raise TypeError(f"`{name}` must be True or False; received {value!r}.")
        if mask_first and target.mask_token_id is None:
            raise ValueError("`mask_first` needs a tokenizer with a mask token; this one has none.")
        if not prose and not isinstance(target, BertTokenizer):
            raise ValueError(
                "`prose=False` is for a BertTokenizer only; received a "
                f"{type(target).__name__}, whose pieces contain their spaces."
            )
        self.tokenizer = tokenizer
        self.target_tokenizer = target
        # Special tokens and at least one of the text.
        least = 1 + add_bos + add_eos
        self.max_source_length = _check_length("max_source_length", max_source_length, least)
        least = 2 + mask_first
        self.max_target_length = _check_length("max_target_length", max_target_length, least)
        self.add_eos = add_eos
        self.add_bos = add_bos
        self.mask_first = mask_first
        ids = _check_token_ids(hidden_token_ids, target.vocab_size)
        # The eos must stay to end the text; it shows nothing anyway.
        self.prose = prose
        self._hidden_token_ids = np.setdiff1d(ids, [target.eos_token_id])

    @property
    def hidden_token_ids(self) -> tuple[int, ...]:
        """The ids that are left out of the text, in order."""
        return tuple(self._hidden_token_ids.tolist())

    def __call__(self, source: Any, target: Any) -> Batch:
        """Encodes pairs, padded to the maximal lengths, so that every batch has one static shape.

        Args:
            source: string scalar or vector [batch].
            target: the same shape.

        Returns:
            `(x, y, sample_weight)` as from `pack`, with lengths `max_source_length` and
            `max_target_length`.
        """
        return self.pack(
            self.encode_source(source),
            self.encode_target(target),
            self.max_source_length,
            self.max_target_length,
        )

    def encode_source(self, text: Any) -> Ids:
        """Ids of sources, cut to `max_source_length`, including bos and eos if they are added.

        Args:
            text: string scalar or vector [batch].

        Returns:
            int32 [length] for a scalar, ragged int32 [batch, None] for a vector.
        """
        ids = _cut(self.tokenizer(text), self.max_source_length - self.add_bos - self.add_eos)
        if self.add_bos:
            ids = _add_column(ids, self.tokenizer.bos_token_id, at_end=False)
        return _add_column(ids, self.tokenizer.eos_token_id, at_end=True) if self.add_eos else ids

    def count_source_tokens(self, texts: Any) -> tf.Tensor:
        """How many tokens sources have before they are cut, bos and eos included.

        Args:
            texts: string vector [batch].

        Returns:
            int32 [batch]; what is above `max_source_length` is cut by `encode_source`.
        """
        lengths = self.tokenizer(texts).row_lengths()
        return tf.cast(lengths, tf.int32) + self.add_bos + self.add_eos

    def encode_target(self, text: Any) -> Ids:
        """Ids of targets, without bos and eos, cut to `max_target_length - 1`.

        The mask token of `mask_first` is included.

        Args:
            text: string scalar or vector [batch].

        Returns:
            int32 [length] for a scalar, ragged int32 [batch, None] for a vector.
        """
        ids = _cut(self.target_tokenizer(text), self.max_target_length - 1 - self.mask_first)
        if self.mask_first:
            ids = _add_column(ids, self.target_tokenizer.mask_token_id, at_end=False)
        return ids

    def pack(
        self,
        source_ids: Ids,
        target_ids: Ids,
        source_length: int | tf.Tensor | None = None,
        target_length: int | tf.Tensor | None = None,
    ) -> Batch:
        """Builds a training batch from ids.

        Batches padded to their own longest row, instead of the maximum, come from

            encoded = pairs.map(lambda s, t: (p.encode_source(s), p.encode_target(t)))
            batches = encoded.ragged_batch(32).map(p.pack)

        Args:
            source_ids: int32 [length], or ragged [batch, None], as `encode_source` gives them.
            target_ids: the same, as `encode_target` gives them: without bos and eos.
            source_length: S, to which sources are padded or cut (an eos at their end included);
                None: the longest of the batch, at least 1.
            target_length: T, to which targets are padded or cut, always with the eos; None: the
                longest with its eos. Either length may be an int32 scalar tensor.

        Returns:
            `(x, y, sample_weight)`, with a leading batch dimension if the ids have one. x is a
            dict of int32 `input_ids` [S], `attention_mask` [S] (1 on tokens, 0 on padding),
            `decoder_input_ids` [T], `decoder_attention_mask` [T] (1 on bos and tokens); y is int32
            [T], the labels; sample_weight is float32 [T]: 1 on labels, the eos included, 0 on
            padding.
        """
        if source_length is not None and not tf.is_tensor(source_length):
            source_length = _check_length("source_length", source_length, 1)
        if target_length is not None:
            if not tf.is_tensor(target_length):
                target_length = _check_length("target_length", target_length, 2)
            target_ids = _cut(target_ids, target_length - 1)
        single = source_ids.shape.rank == 1
        if source_ids.shape.rank != target_ids.shape.rank:
            raise ValueError(
                "`source_ids` and `target_ids` must both be one row or both a batch; "
                f"received shapes {source_ids.shape} and {target_ids.shape}."
            )
        target = self.target_tokenizer
        input_ids, attention_mask = _pad(_rows(source_ids), source_length, self.tokenizer)
        target_ids = _rows(target_ids)
        decoder_input_ids, decoder_mask = _pad(
            _add_column(target_ids, target.bos_token_id, at_end=False), target_length, target
        )
        ended = _add_column(target_ids, target.eos_token_id, at_end=True)
        labels, _ = _pad(ended, target_length, target)
        batch = (
            {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "decoder_input_ids": decoder_input_ids,
                "decoder_attention_mask": decoder_mask,
            },
            labels,
            tf.cast(decoder_mask, tf.float32),
        )
        return tf.nest.map_structure(lambda tensor: tensor[0], batch) if single else batch

    def generate_preprocess(self, texts: Any) -> dict[str, tf.Tensor]:
        """Encodes sources for generation, padded to the longest of the batch.

        Args:
            texts: string vector [batch]; the batch may be empty.

        Returns:
            int32 `input_ids` and `attention_mask` [batch, longest], longest in [1,
            max_source_length].
        """
        ids = self.encode_source(texts)
        if ids.shape.rank != 2:
            raise ValueError("`texts` must be a vector of strings; put a single string in a list.")
        input_ids, attention_mask = _pad(ids, None, self.tokenizer)
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def prompt_preprocess(self, texts: Any) -> dict[str, tf.Tensor]:
        """Encodes the beginnings of targets, which generation continues.

        They begin with the special tokens of targets, bos and, with `mask_first`, the mask token,
        but have no eos. They are not cut: a prompt without its end would be another prompt.

        Args:
            texts: string vector [batch]; the batch may be empty.

        Returns:
            int32 `decoder_input_ids` and `decoder_attention_mask` [batch, longest], longest at
            least 1.
        """
        tokenizer = self.target_tokenizer
        ids = tokenizer(texts)
        if ids.shape.rank != 2:
            raise ValueError("`texts` must be a vector of strings; put a single string in a list.")
        if self.mask_first:
            ids = _add_column(ids, tokenizer.mask_token_id, at_end=False)
        ids = _add_column(ids, tokenizer.bos_token_id, at_end=False)
        decoder_input_ids, mask = _pad(ids, None, tokenizer)
        return {"decoder_input_ids": decoder_input_ids, "decoder_attention_mask": mask}

    def generate_postprocess(self, ids: Any) -> tf.Tensor:
        """Turns generated ids into text: `tokenizer.detokenize`, unless options say otherwise.

        Args:
            ids: integers [length] or [batch, length].

        Returns:
            string scalar or [batch].
        """
        tokenizer = self.target_tokenizer
        if self.hidden_token_ids:
            ids = tf.convert_to_tensor(ids)
            hidden = tf.reduce_any(
                tf.equal(ids[..., tf.newaxis], tf.cast(self._hidden_token_ids, ids.dtype)), axis=-1
            )
            ids = tf.where(hidden, tf.cast(tokenizer.pad_token_id, ids.dtype), ids)
        return tokenizer.detokenize(ids) if self.prose else self._join(ids)

    def normalize(self, texts: Sequence[str]) -> list[str]:
        """The texts as a model would write them: encoded and decoded as targets, not cut.

        Case, spacing or spelling that the tokenizer does not keep are the same then for what was
        generated and for what was not.
        """
        tokenizer = self.target_tokenizer
        ids = tokenizer(list(texts)).to_tensor(tokenizer.pad_token_id)
        return [text.decode() for text in self.generate_postprocess(ids).numpy()]

    def get_config(self) -> dict[str, Any]:
        """JSON-serialisable arguments of the constructor, except the tokenizers."""
        return {
            "max_source_length": self.max_source_length,
            "max_target_length": self.max_target_length,
            "add_eos": self.add_eos,
            "add_bos": self.add_bos,
            "mask_first": self.mask_first,
            "hidden_token_ids": list(self.hidden_token_ids),
            "prose": self.prose,
        }

    def _join(self, ids: Any) -> tf.Tensor:
        """Word pieces with single spaces between words."""
        tokenizer = self.target_tokenizer
        hidden = [tokenizer.pad_token_id, tokenizer.bos_token_id]
        ids, row = visible_ids(ids, tokenizer.eos_token_id, hidden, tokenizer.vocab_size)
        pieces = ids.with_flat_values(tf.gather(tokenizer.pieces, ids.flat_values))
        text = tf.strings.reduce_join(pieces, axis=-1, separator=" ")
        text = tf.strings.regex_replace(text, " ##", "")
        return text[0] if row else text


def _pad(ids: tf.RaggedTensor, length: Any, tokenizer: Any) -> tuple[tf.Tensor, tf.Tensor]:
    """Dense ids and mask, int32 [batch, length]."""
    size = tf.maximum(ids.bounding_shape(axis=1), 1) if length is None else length
    dense = ids.to_tensor(tokenizer.pad_token_id, shape=tf.stack([-1, size]))
    mask = tf.sequence_mask(ids.row_lengths(), size, dtype=tf.int32)
    shape = [ids.shape[0], None if tf.is_tensor(length) else length]
    return tf.ensure_shape(dense, shape), tf.ensure_shape(mask, shape)


def _rows(ids: Ids) -> tf.RaggedTensor:
    if ids.shape.rank == 1:
        return tf.RaggedTensor.from_tensor(ids[tf.newaxis])
    if not isinstance(ids, tf.RaggedTensor):
        raise TypeError(
            "A batch of ids must be a RaggedTensor: dense rows do not separate ids from padding; "
            f"received a dense one of shape {ids.shape}. Batch with `Dataset.ragged_batch`."
        )
    return ids


def _cut(ids: Ids, length: int | tf.Tensor) -> Ids:
    return ids[:length] if ids.shape.rank == 1 else ids[:, :length]


def _add_column(ids: Ids, token: int, *, at_end: bool) -> Ids:
    if ids.shape.rank == 1:
        column = tf.constant([token], ids.dtype)
    else:
        column = tf.fill([ids.nrows(), 1], tf.constant(token, ids.dtype))
    return tf.concat([ids, column] if at_end else [column, ids], axis=-1)
