"""WordPiece tokenizer of BERT."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_text as tf_text

from bertgen_tf.tokenizers.interface import (
    Ids,
    TextTokenizer,
    kept_ids,
    one_string,
    read_file,
    text_vector,
    visible_ids,
    write_file,
)
from bertgen_tf.tokenizers.prose import join_word_pieces


class BertTokenizer(TextTokenizer):
    """WordPiece tokenizer of BERT, with the interface of `BertGenerationTokenizer`.

    Ids equal those of TF Hub's BERT preprocessing modules, which run the same op,
    `tf_text.BertTokenizer`; the faster `FastBertTokenizer` disagrees with them on some Unicode
    spaces and marks. With `lowercase=False` one thing differs from the op: every Unicode space
    separates words, as in BERT's own tokenizer. Words over 100 bytes are unknown.

    The calls shared with Hugging Face's `BertTokenizer` give the same results (tested against
    transformers 5.23), except for the differences that `TextTokenizer` lists and these, which come
    from the op: control and zero-width characters separate words instead of vanishing; `lowercase`
    folds compatibility characters ("ﬁ", full width) as well; the limit of a word is 100 bytes, not
    100 characters. A special token that is spelled out in the text is text, as with Hugging Face's
    `split_special_tokens=True`; `tokenizer(text)` is the graph call; `encode` adds [CLS] and [SEP]
    only if asked; `save_vocabulary` creates the folder and returns one path, not a tuple.

    Args:
        vocabulary: path of a `vocab.txt` (UTF-8, one piece a line), or the pieces in the order of
            their ids.
        lowercase: fold case and strip accents, as the vocabulary requires.
        pad_token, unk_token, bos_token, eos_token: pieces that the vocabulary must contain. BERT
            has no start and end tokens for targets; its [CLS] and [SEP] serve as such.
        sep_token, mask_token: pieces that the vocabulary may lack.

    Attributes:
        pad_token_id, bos_token_id, eos_token_id, unk_token_id, vocab_size: int.
        sep_token_id, mask_token_id: int or None.
        lowercase: bool.
        pieces: strings [vocab_size], the vocabulary in the order of the ids.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no vocabulary, not UTF-8, duplicate or blank pieces, a missing special token.
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
    ):
        if not isinstance(lowercase, bool):
            raise TypeError(f"`lowercase` must be True or False; received {lowercase!r}.")
        pieces, where = _load_pieces(vocabulary)
        tokens = {
            "pad": pad_token,
            "unk": unk_token,
            "bos": bos_token,
            "eos": eos_token,
            "sep": sep_token,
            "mask": mask_token,
        }
        super().__init__(pieces, tokens, "bert_tokenizer", where)
        self.lowercase = lowercase
        with tf.init_scope():
            self.pieces = tf.constant(pieces)
            self._table = tf.lookup.StaticHashTable(
                tf.lookup.KeyValueTensorInitializer(
                    self.pieces, tf.range(self.vocab_size, dtype=tf.int64)
                ),
                default_value=self.unk_token_id,
            )
            self._tokenizer = tf_text.BertTokenizer(
                self._table, token_out_type=tf.int32, unknown_token=unk_token, lower_case=lowercase
            )

    def __call__(self, text: Any) -> Ids:
        """Turns text into ids, without special tokens.

        Args:
            text: string scalar or vector [batch] (tensor, array, str or list of str).

        Returns:
            int32 [length] for a scalar, ragged int32 [batch, None] for a vector.
        """
        text, scalar = text_vector(text)
        if not self.lowercase:
            # Case folding makes these ordinary spaces; `\s`, by which the op splits, is ASCII only.
            text = tf.strings.regex_replace(text, r"\p{Zs}", " ")
        ids = self._tokenizer.tokenize(text).merge_dims(-2, -1)
        return ids[0] if scalar else ids

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
        return {"vocabulary": self._vocabulary.tolist(), "lowercase": self.lowercase, **tokens}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BertTokenizer":
        """Rebuilds a tokenizer from `get_config`."""
        return cls(**config)

    def subset(self, ids: Iterable[int]) -> tuple["BertTokenizer", np.ndarray]:
        """Returns a tokenizer that has only some of the pieces, and the special tokens.

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
        kept = kept_ids(ids, self.all_special_ids, self.vocab_size)
        return type(self)(
            **{**self.get_config(), "vocabulary": self._vocabulary[kept].tolist()}
        ), kept


def _load_pieces(vocabulary: str | os.PathLike | Sequence[str]) -> tuple[list[str], str]:
    """Returns the pieces, checked, and what to call them in messages."""
    if isinstance(vocabulary, str | os.PathLike):
        where = os.fspath(vocabulary)
        try:
            text = read_file(vocabulary, "vocabulary").decode("utf-8")
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
