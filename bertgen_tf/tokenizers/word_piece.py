"""WordPiece tokenizer of BERT."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tensorflow_text as tf_text

from bertgen_tf.checks import check_integer
from bertgen_tf.tokenizers.interface import (
    Ids,
    TextTokenizer,
    file_name_in_config,
    kept_ids,
    one_string,
    read_around,
    read_file,
    text_vector,
    visible_ids,
    write_file,
)
from bertgen_tf.tokenizers.normalization import (
    PRE_TOKENIZERS,
    MarkSorter,
    Step,
    TextNormalizer,
    bert_normalizer,
    checked_steps,
    lowers,
)
from bertgen_tf.tokenizers.prose import join_word_pieces

TF_HUB, HUGGINGFACE = "tf_hub", "huggingface"
_DEFAULTS = {
    "strip_accents": None,
    "tokenize_chinese_chars": True,
    "pre_tokenizer": PRE_TOKENIZERS[0],
    "max_input_chars_per_word": 100,
}


@keras.saving.register_keras_serializable("bertgen_tf", "BertTokenizer")
class BertTokenizer(TextTokenizer):
    """WordPiece tokenizer of BERT, with the interface of `BertGenerationTokenizer`.

    There are two ways to read a text for a BERT. They differ in rare texts, and `normalization`
    says which one a model has learned:

    - `"tf_hub"` gives the ids of TF Hub's preprocessing modules, which run the same op,
      `tf_text.BertTokenizer` (`FastBertTokenizer` disagrees with them on some Unicode spaces and
      marks). `lowercase` folds letters: ß becomes ss, ς σ, ² 2, ½ 1⁄2, ﬁ fi. Control characters
      separate words; so do, without `lowercase`, those of no width. Words over 100 bytes are
      unknown. Special tokens that are spelled out in a text are text. With `lowercase=False` one
      thing differs from the op: every Unicode space separates words, as in BERT's own tokenizer.
    - `"huggingface"` gives the ids of Hugging Face's `BertTokenizer` for every text. `lowercase`
      makes letters lower-case and removes accents; ß, ς, ², ½ and ﬁ stay. Control and zero-width
      characters vanish. Words over 100 characters are unknown. Special tokens that are spelled out
      in a text are special. What is a mark or punctuation is that of Unicode 8, as there.

    The calls shared with Hugging Face's `BertTokenizer` give the same results (tested against
    transformers 5.23), except for the differences that `TextTokenizer` lists and these:
    `tokenizer(text)` is the graph call; `encode` adds [CLS] and [SEP] only if asked;
    `save_vocabulary` creates the folder and returns one path, not a tuple.

    Args:
        vocabulary: path of a `vocab.txt` (UTF-8, one piece a line), or the pieces in the order of
            their ids.
        lowercase: fold case and strip accents, as the vocabulary requires.
        pad_token, unk_token, bos_token, eos_token: pieces that the vocabulary must contain. BERT
            has no start and end tokens for targets; its [CLS] and [SEP] serve as such.
        sep_token, mask_token: pieces that the vocabulary may lack.
        normalization: `"tf_hub"`; `"huggingface"`; or the steps of a `tokenizer.json`, such as
            `[{"type": "NFC"}, {"type": "Lowercase"}]`, see
            `bertgen_tf.tokenizers.normalization`: `lowercase` must then say what they do. All that
            follows, except `split_special_tokens`, needs one of the latter two.
        strip_accents: None: as `lowercase`. For `"huggingface"` only.
        tokenize_chinese_chars: whether Chinese characters are words of their own. For
            `"huggingface"` only.
        pre_tokenizer: what makes words of a text, with the names of `tokenizer.json`:
            `"BertPreTokenizer"` (white space separates, punctuation stands alone),
            `"WhitespaceSplit"`, or `"Whitespace"` (words and runs of other characters).
        max_input_chars_per_word: longer words are unknown.
        added_tokens: further pieces that stand for themselves in a text, as Hugging Face's
            `add_tokens` makes them: each a piece of the vocabulary, or a dictionary of its options,
            see `bertgen_tf.tokenizers.interface.checked_added_tokens`.
        split_special_tokens: whether a special token that is spelled out in a text is text. None:
            as the table says.

    Attributes:
        pad_token_id, bos_token_id, eos_token_id, unk_token_id, vocab_size: int.
        sep_token_id, mask_token_id: int or None.
        lowercase, tokenize_chinese_chars, split_special_tokens: bool.
        normalization, strip_accents, pre_tokenizer, max_input_chars_per_word, added_tokens: as
            given; steps and added tokens with all their options.
        pieces: strings [vocab_size], the vocabulary in the order of the ids.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: no vocabulary, not UTF-8, duplicate or blank pieces, a missing
            special token, or options that do not belong together.
    """

    _frames = True

    def __init__(
        self,
        vocabulary: str | os.PathLike | Sequence[str],
        lowercase: bool = True,
        *,
        pad_token: str = "[PAD]",
        unk_token: str = "[UNK]",
        bos_token: str = "[CLS]",
        eos_token: str = "[SEP]",
        sep_token: str = "[SEP]",
        mask_token: str = "[MASK]",
        normalization: str | Sequence[Step] = TF_HUB,
        strip_accents: bool | None = None,
        tokenize_chinese_chars: bool = True,
        pre_tokenizer: str = PRE_TOKENIZERS[0],
        max_input_chars_per_word: int = 100,
        added_tokens: Sequence[str | Mapping[str, Any]] = (),
        split_special_tokens: bool | None = None,
    ):
        if not isinstance(lowercase, bool):
            raise TypeError(f"`lowercase` must be True or False; received {lowercase!r}.")
        options = {
            "strip_accents": strip_accents,
            "tokenize_chinese_chars": tokenize_chinese_chars,
            "pre_tokenizer": pre_tokenizer,
            "max_input_chars_per_word": max_input_chars_per_word,
        }
        steps = _steps(normalization, lowercase, options)
        if steps is None and len(added_tokens):
            raise ValueError(
                f"`added_tokens` needs normalization={HUGGINGFACE!r}; received "
                f"{str(added_tokens)[:99]}."
            )
        if split_special_tokens is None:
            split_special_tokens = steps is None
        pieces, where = load_pieces(vocabulary)
        tokens = {
            "pad": pad_token,
            "unk": unk_token,
            "bos": bos_token,
            "eos": eos_token,
            "sep": sep_token,
            "mask": mask_token,
        }
        super().__init__(
            pieces,
            tokens,
            "bert_tokenizer",
            where,
            added_tokens=added_tokens,
            split_special_tokens=split_special_tokens,
        )
        self.lowercase = lowercase
        self._options = options
        # As JSON, because tf.Module would wrap lists and dictionaries.
        self._normalization = normalization if isinstance(normalization, str) else json.dumps(steps)
        with tf.init_scope():
            self.pieces = tf.constant(pieces)
            self._table = self._ids(pieces)
            if steps is None:
                self._tokenizer = tf_text.BertTokenizer(
                    self._table,
                    token_out_type=tf.int32,
                    unknown_token=unk_token,
                    lower_case=lowercase,
                )
                self._sorter = MarkSorter() if lowercase else None
            else:
                self._prepare(steps)

    def _ids(self, pieces: Sequence[str]) -> tf.lookup.StaticHashTable:
        """A table of pieces of the vocabulary."""
        index = self.get_vocab()
        ids = tf.constant([index[piece] for piece in pieces], tf.int64)
        return tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(tf.constant(pieces), ids),
            default_value=self.unk_token_id,
        )

    def _prepare(self, steps: Sequence[Step]) -> None:
        """Makes what the normalizations of Hugging Face need."""
        pre_tokenizer = self.pre_tokenizer
        self._normalized = self._spelled(True)
        if self._normalized:
            # Their place is between the two.
            self._normalizer = TextNormalizer(steps)
            self._pre_tokenizer = TextNormalizer([], pre_tokenizer)
            spellings = self._normalizer(tf.constant([token.text for token in self._normalized]))
            self._normalized = [
                token._replace(text=spelling.decode("utf-8"))
                for token, spelling in zip(self._normalized, spellings.numpy(), strict=True)
                if spelling
            ]
        else:
            self._normalizer = TextNormalizer(steps, pre_tokenizer)
        # No word has the pieces that were added.
        added = {token["content"] for token in self._added_tokens}
        pieces = [piece for piece in self._vocabulary if piece not in added]
        self._tokenizer = tf_text.WordpieceTokenizer(
            self._ids(pieces) if added else self._table,
            token_out_type=tf.int32,
            unknown_token=self.unk_token,
            max_bytes_per_word=4 * self.max_input_chars_per_word,
        )

    @property
    def normalization(self) -> str | list[Step]:
        if self._normalization in (TF_HUB, HUGGINGFACE):
            return self._normalization
        return json.loads(self._normalization)

    @property
    def strip_accents(self) -> bool | None:
        return self._options["strip_accents"]

    @property
    def tokenize_chinese_chars(self) -> bool:
        return self._options["tokenize_chinese_chars"]

    @property
    def pre_tokenizer(self) -> str:
        return self._options["pre_tokenizer"]

    @property
    def max_input_chars_per_word(self) -> int:
        return self._options["max_input_chars_per_word"]

    def __call__(self, text: Any) -> Ids:
        """Turns text into ids, without special tokens.

        Args:
            text: string scalar or vector [batch] (tensor, array, str or list of str).

        Returns:
            int32 [length] for a scalar, ragged int32 [batch, None] for a vector.
        """
        text, scalar = text_vector(text)
        tokens = self._spelled(False)
        ids = read_around(text, tokens, [token.id for token in tokens], self._read)
        return ids[0] if scalar else ids

    def _read(self, text: tf.Tensor) -> tf.RaggedTensor:
        """Ids [batch, None] of strings [batch] without special tokens."""
        if self._normalization != TF_HUB:
            text = self._normalizer(text)
            if not self._normalized:
                return self._read_words(text)
            return read_around(
                text,
                self._normalized,
                [token.id for token in self._normalized],
                lambda rest: self._read_words(self._pre_tokenizer(rest)),
            )
        if not self.lowercase:
            # Case folding makes these ordinary spaces; `\s`, by which the op splits, is ASCII only.
            text = tf.strings.regex_replace(text, r"\p{Zs}", " ")
        else:
            text = self._sorter(text)
        return self._tokenizer.tokenize(text).merge_dims(-2, -1)

    def _read_words(self, text: tf.Tensor) -> tf.RaggedTensor:
        """Ids [batch, None] of strings [batch] with spaces between words."""
        words = tf.strings.split(text)
        limit = self.max_input_chars_per_word
        too_long = tf.strings.length(words.flat_values, "UTF8_CHAR") > limit
        # The op counts bytes, of which this word has too many in any case.
        unknown = tf.where(too_long, b"x" * (4 * limit + 1), words.flat_values)
        return self._tokenizer.tokenize(words.with_flat_values(unknown)).merge_dims(-2, -1)

    def detokenize(self, ids: Any) -> tf.Tensor:
        """Turns ids into readable prose, up to the first eos, without pad, bos and mask tokens.

        The spaces that BERT's tokenizer dropped are restored by the rules of
        `bertgen_tf.tokenizers.prose`.

        Args:
            ids: integers [length] or [batch, length], dense or ragged. Ids outside the vocabulary
                are dropped.

        Returns:
            string scalar or [batch], valid UTF-8. The unknown token stays visible.
        """
        hidden = [self.pad_token_id, self.bos_token_id]
        if self.mask_token_id is not None:
            hidden.append(self.mask_token_id)
        ids, row = visible_ids(ids, self.eos_token_id, hidden, self.vocab_size)
        pieces = ids.with_flat_values(tf.gather(self.pieces, ids.flat_values))
        text = join_word_pieces(pieces)
        return text[0] if row else text

    def tokenize(self, text: str) -> list[str]:
        """Returns the pieces of one string; what the vocabulary lacks becomes the unknown token."""
        return self._vocabulary[self(one_string(text)).numpy()].tolist()

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """Ids of pieces; a piece that is not in the vocabulary gets `unk_token_id`."""
        with tf.init_scope():
            if isinstance(tokens, str):
                return int(self._table.lookup(tf.constant(tokens)))
            return self._table.lookup(tf.constant(list(tokens), tf.string)).numpy().tolist()

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Joins pieces with spaces, except those that continue a word or start with `.?!,`."""
        text = ""
        for i, token in enumerate(tokens):
            if i and token.startswith("##"):
                token = token[2:]
            elif i and not token.startswith((".", "?", "!", ",")):
                token = f" {token}"
            text += token
        return text

    def save_vocabulary(
        self, directory: str | os.PathLike, filename_prefix: str | None = None
    ) -> str:
        """Writes `vocab.txt` and returns its path."""
        content = "".join(f"{piece}\n" for piece in self._vocabulary)
        return write_file(directory, "vocab.txt", content.encode("utf-8"), filename_prefix)

    def get_config(self) -> dict[str, Any]:
        """JSON-serialisable arguments of `from_config`, the pieces included."""
        tokens = {f"{role}_token": piece for role, piece in self._tokens.items()}
        return {
            "vocabulary": self._vocabulary.tolist(),
            "lowercase": self.lowercase,
            **tokens,
            "normalization": self.normalization,
            **self._options,
            "added_tokens": self.added_tokens,
            "split_special_tokens": self.split_special_tokens,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BertTokenizer":
        """Rebuilds a tokenizer from `get_config`.

        Raises:
            ValueError: the config names a file as its vocabulary, as that of a preset does.
        """
        if isinstance(config["vocabulary"], str):
            raise file_name_in_config("vocabulary", config["vocabulary"])
        return cls(**config)

    def subset(self, ids: Iterable[int]) -> tuple["BertTokenizer", np.ndarray]:
        """Returns a tokenizer that has only some of the pieces, and the special and added tokens.

        A text whose ids in this tokenizer are all kept, none of them unknown, has the same pieces
        in the new one: WordPiece takes the longest piece that fits, and no longer ones are added. A
        word that was unknown here can become known there, by a split that a longer piece prevented.

        Args:
            ids: ids of this tokenizer.

        Returns:
            The new tokenizer, and int32 [kept]: the old id of each new id, ascending.

        Raises:
            ValueError: an id is not in [0, vocab_size).
        """
        kept = kept_ids(ids, {*self.all_special_ids, *self._added_ids}, self.vocab_size)
        return type(self)(
            **{**self.get_config(), "vocabulary": self._vocabulary[kept].tolist()}
        ), kept


def _steps(
    normalization: str | Sequence[Step], lowercase: bool, options: dict[str, Any]
) -> list[Step] | None:
    """The steps of a normalization of Hugging Face, None for TF Hub's; checks that all fit."""
    if options["pre_tokenizer"] not in PRE_TOKENIZERS:
        raise ValueError(
            f"`pre_tokenizer` must be one of {', '.join(PRE_TOKENIZERS)}; received "
            f"{options['pre_tokenizer']!r}."
        )
    check_integer("`max_input_chars_per_word`", options["max_input_chars_per_word"])
    for name in ("strip_accents", "tokenize_chinese_chars"):
        if not isinstance(options[name], bool) and (name, options[name]) != ("strip_accents", None):
            raise TypeError(f"`{name}` must be True or False; received {options[name]!r}.")
    if normalization == HUGGINGFACE:
        return bert_normalizer(
            lowercase, options["strip_accents"], options["tokenize_chinese_chars"]
        )
    if isinstance(normalization, str) and normalization != TF_HUB:
        raise ValueError(
            f"`normalization` must be {TF_HUB!r}, {HUGGINGFACE!r} or a list of steps; received "
            f"{normalization!r}."
        )
    steps = None if normalization == TF_HUB else checked_steps(list(normalization))
    names = list(options)[: 4 if steps is None else 2]
    foreign = [name for name in names if options[name] != _DEFAULTS[name]]
    if foreign:
        raise ValueError(
            f"`{foreign[0]}` needs normalization={HUGGINGFACE!r}; received "
            f"{foreign[0]}={options[foreign[0]]!r} with {str(normalization)[:99]!r}."
        )
    if steps is not None and lowers(steps) != lowercase:
        raise ValueError(
            f"`lowercase` must be {not lowercase} for these steps of `normalization`; received "
            f"{lowercase}."
        )
    return steps


def load_pieces(vocabulary: str | os.PathLike | Sequence[str]) -> tuple[list[str], str]:
    """Returns the pieces, checked, and what to call them in messages."""
    if isinstance(vocabulary, str | os.PathLike):
        where = os.fspath(vocabulary)
        try:
            text = read_file(vocabulary, "vocabulary").decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"`vocabulary` must be a UTF-8 text file: {where}: {error}") from error
        # Not splitlines(): U+2028 and the like can be pieces.
        pieces = [line.rstrip("\r") for line in text.split("\n")]
        while pieces and not pieces[-1]:
            pieces.pop()
    else:
        where = "`vocabulary`"
        pieces = list(vocabulary)
        if not all(isinstance(piece, str) for piece in pieces):
            raise TypeError("`vocabulary` must be a path or a list of str, the pieces.")
    if not pieces:
        raise ValueError(f"`vocabulary` must hold one piece a line; received none: {where}")
    first: dict[str, int] = {}
    twice = [(piece, i) for i, piece in enumerate(pieces) if first.setdefault(piece, i) != i]
    if twice or "" in first:
        problems = [f"{piece!r} has ids {first[piece]} and {i}" for piece, i in twice[:5]]
        if "" in first:
            problems.insert(0, f"id {first['']} is blank")
        raise ValueError(
            f"`vocabulary` must hold each piece once and no blank one ({where}): "
            f"{'; '.join(problems)}. Give each a name of its own, e.g. [unused1], to keep the ids."
        )
    return pieces, where
