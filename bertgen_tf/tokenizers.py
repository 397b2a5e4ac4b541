"""Tokenizers that run inside the TensorFlow graph, over tensorflow-text.

Two classes with one interface: `BertGenerationTokenizer` (SentencePiece, as the BertGeneration
checkpoints) and `BertTokenizer` (WordPiece, as the BERT modules of TF Hub). Both turn strings into
ids and ids into strings with graph ops only, are tracked by `tf.saved_model.save`, and embed their
vocabulary in it, so that an export needs no other file.

Any bytes are accepted as text: what is not valid UTF-8 is replaced by U+FFFD. Special tokens are
never added by `__call__`, and a special token that is spelled out in the text is ordinary text.
"""

import base64
import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import sentencepiece
import tensorflow as tf
import tensorflow_text as tf_text
from sentencepiece import sentencepiece_model_pb2
from tensorflow_text.python.ops import sentencepiece_tokenizer

from bertgen_tf.prose import join_word_pieces

Ids = tf.Tensor | tf.RaggedTensor


def _sanitize(text: tf.Tensor) -> tf.Tensor:
    """Replaces what is not UTF-8 by U+FFFD; valid strings stay as they are."""
    return tf.strings.unicode_transcode(
        text, "UTF-8", "UTF-8", errors="replace", replace_control_characters=False
    )


def _text_vector(text: Any) -> tuple[tf.Tensor, bool]:
    """Returns clean strings [batch], and whether `text` was a scalar."""
    empty = isinstance(text, list | tuple) and not text
    text = tf.convert_to_tensor(text, tf.string if empty else None)
    if text.dtype != tf.string:
        raise TypeError(
            f"`text` must hold strings; received dtype {text.dtype.name}. "
            "Decode ids with `detokenize`, convert numbers with `tf.strings.as_string`."
        )
    if text.shape.rank not in (0, 1):
        raise ValueError(
            "`text` must be one string or a vector of strings with a statically known rank; "
            f"received shape {text.shape}. Flatten it with `tf.reshape(text, [-1])`."
        )
    scalar = text.shape.rank == 0
    return _sanitize(tf.reshape(text, [1]) if scalar else text), scalar


def _visible_ids(ids: Any, eos: int, hidden: Sequence[int], vocab_size: int):
    """Drops what is no text: hidden and impossible ids, and all from the first eos on.

    Returns ragged int32 [batch, None], and whether `ids` was one row.
    """
    if isinstance(ids, list | tuple):
        rows = [row for row in ids if isinstance(row, list | tuple)]
        empty = not any(rows) if rows else not ids
        dtype = tf.int32 if empty else None  # An empty list has no dtype of its own.
        ids = tf.ragged.constant(ids, dtype, ragged_rank=1) if rows else tf.constant(ids, dtype)
    elif not isinstance(ids, tf.RaggedTensor):
        ids = tf.convert_to_tensor(ids)
    if not tf.as_dtype(ids.dtype).is_integer:
        raise TypeError(f"`ids` must be integers; received dtype {tf.as_dtype(ids.dtype).name}.")
    if ids.shape.rank not in (1, 2):
        raise ValueError(
            "`ids` must have shape [length] or [batch, length] with a statically known rank; "
            f"received shape {ids.shape}. Merge further dimensions into the batch first."
        )
    row = ids.shape.rank == 1
    if row:
        ids = ids[tf.newaxis]
    ids = tf.cast(ids, tf.int64)  # Before the range check: a cast to int32 would wrap around.
    if isinstance(ids, tf.RaggedTensor):
        ids = ids.to_tensor(default_value=eos)
    keep = tf.cumsum(tf.cast(tf.equal(ids, eos), tf.int32), axis=1) == 0
    keep &= (ids >= 0) & (ids < vocab_size)
    for token in hidden:
        keep &= tf.not_equal(ids, token)
    return tf.cast(tf.ragged.boolean_mask(ids, keep), tf.int32), row


def _find_specials(find, names: dict[str, str], optional: Sequence[str], where: str):
    """Looks special tokens up; `find` maps a piece to its id, or None."""
    ids = {role: find(piece) for role, piece in names.items()}
    missing = [f"{role}_token={names[role]!r}" for role in ids if ids[role] is None]
    missing = [item for item in missing if item.split("_")[0] not in optional]
    if missing:
        raise ValueError(
            f"{where} must contain every special token; not found: {', '.join(missing)}. "
            "Name the piece that plays the role with these arguments, or add it to the vocabulary."
        )
    needed = {role: ids[role] for role in ids if role not in optional}
    if len(set(needed.values())) < len(needed):
        raise ValueError(
            "The pad, bos, eos and unk tokens must be four different pieces; received "
            f"{ {role: names[role] for role in needed} }."
        )
    return ids


def _kept_ids(ids: Iterable[int], always: Iterable[int], vocab_size: int) -> np.ndarray:
    """Sorted union of the two, checked: int32 [kept]."""
    ids = np.asarray(ids if hasattr(ids, "__array__") else list(ids))
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"`ids` must be integers; received dtype {ids.dtype}.")
    if ids.size and not (0 <= ids.min() and ids.max() < vocab_size):
        raise ValueError(
            f"`ids` must lie in [0, {vocab_size}); received values from {ids.min()} to {ids.max()}."
        )
    return np.union1d(ids.reshape(-1).astype(np.int32), np.asarray(list(always), np.int32))


def _one_string(text: Any) -> str:
    if not isinstance(text, str):
        raise TypeError(
            f"`text` must be one str; received {type(text).__name__}. "
            "For batches and tensors call the tokenizer itself."
        )
    return text


def _write(directory: str | os.PathLike, name: str, content: bytes) -> str:
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(os.fspath(directory), name)
    with open(path, "wb") as file:
        file.write(content)
    return path


def _read(path: str | os.PathLike, argument: str) -> bytes:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"`{argument}` must be the path of a file; not found: {path}")
    with open(path, "rb") as file:
        return file.read()


class _SentencepieceModel(sentencepiece_tokenizer._SentencepieceModelResource):
    """The model's resource under a name of its own.

    Without a name its kernel owns it, and `keras.utils.set_random_seed`, which empties TensorFlow's
    cache of kernels, deletes it under a living tokenizer. The name is that of the content, so that
    equal models share one resource.
    """

    def _create_resource(self) -> tf.Tensor:
        name = f"bertgen_tf_{hashlib.sha256(self._model).hexdigest()}"
        return sentencepiece_tokenizer.gen_sentencepiece_tokenizer.sentencepiece_op(
            model=self._model, shared_name=name
        )


class BertGenerationTokenizer(tf.Module):
    """SentencePiece tokenizer of the BertGeneration checkpoints.

    Ids are those of the `sentencepiece` package; special tokens are found by their piece in the
    model, as in HuggingFace's `BertGenerationTokenizer`, and none is added to the text.

    Args:
        proto: path of a `spiece.model`, or its bytes.
        pad_token, bos_token, eos_token, unk_token: pieces that the model must contain.
        sep_token: piece between the sentences of a split; `sep_token_id` is None where the model
            has none. It is part of the text in both directions: `detokenize` shows it unless the
            model calls it a control piece.

    Attributes:
        pad_token_id, bos_token_id, eos_token_id, unk_token_id, vocab_size: int.
        sep_token_id: int or None.
        mask_token_id: None, for the interface of `BertTokenizer`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a SentencePiece model, or a special token is missing.
    """

    def __init__(
        self,
        proto: str | os.PathLike | bytes,
        *,
        pad_token: str = "<pad>",
        bos_token: str = "<s>",
        eos_token: str = "</s>",
        unk_token: str = "<unk>",
        sep_token: str = "<::::>",
    ):
        super().__init__(name="bert_generation_tokenizer")
        where = "The SentencePiece model" if isinstance(proto, bytes) else os.fspath(proto)
        self._proto = proto if isinstance(proto, bytes) else _read(proto, "proto")
        try:
            model = sentencepiece_model_pb2.ModelProto.FromString(self._proto)
            if not model.pieces:
                raise ValueError("it has no pieces.")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._proto)
        except Exception as error:  # protobuf and sentencepiece raise classes of their own
            raise ValueError(
                "`proto` must be a SentencePiece model; received "
                f"{len(self._proto)} bytes that are none ({where}): {error}"
            ) from error
        self._tokens = {
            "pad": pad_token,
            "bos": bos_token,
            "eos": eos_token,
            "unk": unk_token,
            "sep": sep_token,
        }
        index = {piece.piece: i for i, piece in enumerate(model.pieces)}
        ids = _find_specials(index.get, self._tokens, ["sep"], where)
        self.pad_token_id: int = ids["pad"]
        self.bos_token_id: int = ids["bos"]
        self.eos_token_id: int = ids["eos"]
        self.unk_token_id: int = ids["unk"]
        self.sep_token_id: int | None = ids["sep"]
        self.mask_token_id: int | None = None
        self.vocab_size: int = len(model.pieces)
        with tf.init_scope():
            self._tokenizer = tf_text.SentencepieceTokenizer(self._proto, out_type=tf.int32)
            self._tokenizer._model_resource = _SentencepieceModel(self._proto, None)

    def __call__(self, text: Any) -> Ids:
        """Turns text into ids, without special tokens.

        Args:
            text: string scalar or vector [batch] (tensor, array, str or list of str).

        Returns:
            int32 [length] for a scalar, ragged int32 [batch, None] for a vector.
        """
        text, scalar = _text_vector(text)
        ids = self._tokenizer.tokenize(text)
        return ids[0] if scalar else ids

    def detokenize(self, ids: Any) -> tf.Tensor:
        """Turns ids into text: everything up to the first eos, without pad and bos.

        Args:
            ids: integers [length] or [batch, length], dense or ragged. Ids outside the vocabulary
                are dropped.

        Returns:
            string scalar or [batch], valid UTF-8. The unknown token shows as SentencePiece's " ⁇ ".
        """
        hidden = [self.pad_token_id, self.bos_token_id]
        ids, row = _visible_ids(ids, self.eos_token_id, hidden, self.vocab_size)
        text = self._tokenizer.detokenize(ids)
        return text[0] if row else text

    def tokenize(self, text: str) -> list[str]:
        """Returns the pieces of one string; what the vocabulary lacks is the unknown token."""
        ids = self(_one_string(text)).numpy().tolist()
        return [self._processor.id_to_piece(i) for i in ids]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """Ids of pieces; a piece that is not in the vocabulary gets `unk_token_id`."""
        return self._processor.piece_to_id(tokens if isinstance(tokens, str) else list(tokens))

    def save_vocabulary(self, directory: str | os.PathLike) -> str:
        """Writes `spiece.model`, byte for byte what was loaded, and returns its path."""
        return _write(directory, "spiece.model", self._proto)

    def get_config(self) -> dict[str, Any]:
        """JSON-serialisable arguments of `from_config`; the model itself is inside, in base64."""
        tokens = {f"{role}_token": piece for role, piece in self._tokens.items()}
        return {"proto": base64.b64encode(self._proto).decode("ascii"), **tokens}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BertGenerationTokenizer":
        """Rebuilds a tokenizer from `get_config`; `proto` may also be the path of a `.model`."""
        proto = config["proto"]
        if not proto.endswith(".model"):  # There is no full stop in base64.
            proto = base64.b64decode(proto, validate=True)
        return cls(**{**config, "proto": proto})

    def subset(self, ids: Iterable[int]) -> tuple["BertGenerationTokenizer", np.ndarray]:
        """Returns a tokenizer that has only some of the pieces.

        A text whose ids in this tokenizer are all kept has the same pieces in the new one. To make
        this exact, more than `ids` is kept: every piece that is not a normal one (special,
        user-defined and byte pieces); the normal pieces of lowest and highest score, from which
        unigram models derive the score of unknown characters; and in BPE models the pieces that
        the merges of kept pieces pass through.

        Args:
            ids: ids of this tokenizer.

        Returns:
            The new tokenizer, and int32 [kept]: the old id of each new id, ascending.

        Raises:
            ValueError: an id is not in [0, vocab_size).
        """
        model = sentencepiece_model_pb2.ModelProto.FromString(self._proto)
        normal = [i for i, piece in enumerate(model.pieces) if piece.type == piece.NORMAL]
        always = {i for i, piece in enumerate(model.pieces) if piece.type != piece.NORMAL}
        always |= set(self._special_ids())
        if normal:
            always.add(min(normal, key=lambda i: model.pieces[i].score))
            always.add(max(normal, key=lambda i: model.pieces[i].score))
        kept = _kept_ids(ids, always, self.vocab_size)
        if model.trainer_spec.model_type == model.trainer_spec.BPE:
            kept = _kept_ids(kept, _merge_path(model, kept), self.vocab_size)

        # Not a copy with fewer pieces: a model can hold test sentences for the whole vocabulary.
        small = sentencepiece_model_pb2.ModelProto(
            pieces=[model.pieces[i] for i in kept.tolist()],
            trainer_spec=model.trainer_spec,
            normalizer_spec=model.normalizer_spec,
        )
        if model.HasField("denormalizer_spec"):
            small.denormalizer_spec.CopyFrom(model.denormalizer_spec)
        new_ids = {piece.piece: i for i, piece in enumerate(small.pieces)}
        spec = small.trainer_spec
        spec.vocab_size = len(small.pieces)
        for role in ("unk", "bos", "eos", "pad"):  # Other readers of the file go by these.
            setattr(spec, f"{role}_id", new_ids.get(getattr(spec, f"{role}_piece"), -1))
        tokens = {f"{role}_token": piece for role, piece in self._tokens.items()}
        return type(self)(small.SerializeToString(), **tokens), kept

    def _special_ids(self) -> list[int]:
        ids = [self.pad_token_id, self.bos_token_id, self.eos_token_id, self.unk_token_id]
        return ids if self.sep_token_id is None else [*ids, self.sep_token_id]


def _merge_path(model, ids: np.ndarray) -> set[int]:
    """Ids of the pieces that arise on the way when BPE builds the pieces `ids`.

    Inside a piece of the result no merge crossed its borders, so the merges are those of the piece
    alone: always the adjacent pair of the highest score, the leftmost of equals.
    """
    usable = (
        model.SentencePiece.NORMAL,
        model.SentencePiece.USER_DEFINED,
        model.SentencePiece.UNUSED,
    )
    rank = {p.piece: (p.score, i) for i, p in enumerate(model.pieces) if p.type in usable}
    found = set()
    for i in ids.tolist():
        if model.pieces[i].type not in (model.SentencePiece.NORMAL, model.SentencePiece.UNUSED):
            continue
        symbols = list(model.pieces[i].piece)
        while True:
            found |= {rank[symbol][1] for symbol in symbols if symbol in rank}
            pairs = [a + b for a, b in zip(symbols, symbols[1:], strict=False)]
            scores = [rank[pair][0] if pair in rank else float("-inf") for pair in pairs]
            if not scores or max(scores) == float("-inf"):
                break
            at = scores.index(max(scores))
            symbols[at : at + 2] = [pairs[at]]
    return found


class BertTokenizer(tf.Module):
    """WordPiece tokenizer of BERT, with the interface of `BertGenerationTokenizer`.

    Ids equal those of TF Hub's BERT preprocessing modules, which run the same op,
    `tf_text.BertTokenizer`; the faster `FastBertTokenizer` disagrees with them on some Unicode
    spaces and marks. With `lowercase=False` one thing differs from the op: every Unicode space
    separates words, as in BERT's own tokenizer. Words over 100 bytes are unknown.

    Args:
        vocabulary: path of a `vocab.txt` (UTF-8, one piece a line), or the pieces in the order of
            their ids.
        lowercase: fold case and strip accents; whether to is a property of the vocabulary.
        pad_token, unk_token, bos_token, eos_token: pieces that the vocabulary must contain. BERT
            has no start and end of a target sequence; its [CLS] and [SEP] serve.
        sep_token, mask_token: pieces that may be missing.

    Attributes:
        pad_token_id, bos_token_id, eos_token_id, unk_token_id, vocab_size: int.
        sep_token_id, mask_token_id: int or None.
        lowercase: bool.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no vocabulary, not UTF-8, duplicate or blank pieces, no special token.
    """

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
        super().__init__(name="bert_tokenizer")
        if not isinstance(lowercase, bool):
            raise TypeError(f"`lowercase` must be True or False; received {lowercase!r}.")
        pieces, where = _load_pieces(vocabulary)
        self._tokens = {
            "pad": pad_token,
            "unk": unk_token,
            "bos": bos_token,
            "eos": eos_token,
            "sep": sep_token,
            "mask": mask_token,
        }
        index = {piece: i for i, piece in enumerate(pieces)}
        ids = _find_specials(index.get, self._tokens, ["sep", "mask"], where)
        self.pad_token_id: int = ids["pad"]
        self.unk_token_id: int = ids["unk"]
        self.bos_token_id: int = ids["bos"]
        self.eos_token_id: int = ids["eos"]
        self.sep_token_id: int | None = ids["sep"]
        self.mask_token_id: int | None = ids["mask"]
        self.vocab_size: int = len(pieces)
        self.lowercase = lowercase
        # Not a list: tf.Module would wrap it and walk through it at each export.
        self._vocabulary = np.array(pieces, dtype=object)
        with tf.init_scope():
            self._pieces = tf.constant(pieces)
            self._table = tf.lookup.StaticHashTable(
                tf.lookup.KeyValueTensorInitializer(
                    self._pieces, tf.range(self.vocab_size, dtype=tf.int64)
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
        text, scalar = _text_vector(text)
        if not self.lowercase:
            # Case folding makes these ordinary spaces; `\s`, by which the op splits, is ASCII only.
            text = tf.strings.regex_replace(text, r"\p{Zs}", " ")
        ids = self._tokenizer.tokenize(text).merge_dims(-2, -1)
        return ids[0] if scalar else ids

    def detokenize(self, ids: Any) -> tf.Tensor:
        """Turns ids into readable prose, up to the first eos, without pad, bos and mask tokens.

        The spaces that BERT's tokenizer dropped are set by the rules of `bertgen_tf.prose`.

        Args:
            ids: integers [length] or [batch, length], dense or ragged. Ids outside the vocabulary
                are dropped.

        Returns:
            string scalar or [batch], valid UTF-8. The unknown token stays visible.
        """
        hidden = [self.pad_token_id, self.bos_token_id]
        if self.mask_token_id is not None:
            hidden.append(self.mask_token_id)
        ids, row = _visible_ids(ids, self.eos_token_id, hidden, self.vocab_size)
        pieces = ids.with_flat_values(tf.gather(self._pieces, ids.flat_values))
        text = join_word_pieces(pieces)
        return text[0] if row else text

    def tokenize(self, text: str) -> list[str]:
        """Returns the pieces of one string; what the vocabulary lacks is the unknown token."""
        return self._vocabulary[self(_one_string(text)).numpy()].tolist()

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """Ids of pieces; a piece that is not in the vocabulary gets `unk_token_id`."""
        with tf.init_scope():
            if isinstance(tokens, str):
                return int(self._table.lookup(tf.constant(tokens)))
            return self._table.lookup(tf.constant(list(tokens), tf.string)).numpy().tolist()

    def save_vocabulary(self, directory: str | os.PathLike) -> str:
        """Writes `vocab.txt` and returns its path."""
        content = "".join(f"{piece}\n" for piece in self._vocabulary)
        return _write(directory, "vocab.txt", content.encode("utf-8"))

    def get_config(self) -> dict[str, Any]:
        """JSON-serialisable arguments of `from_config`; the pieces themselves are inside."""
        tokens = {f"{role}_token": piece for role, piece in self._tokens.items()}
        return {"vocabulary": self._vocabulary.tolist(), "lowercase": self.lowercase, **tokens}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BertTokenizer":
        """Rebuilds a tokenizer from `get_config`."""
        return cls(**config)

    def subset(self, ids: Iterable[int]) -> tuple["BertTokenizer", np.ndarray]:
        """Returns a tokenizer that has only some of the pieces, and the special tokens.

        A text whose ids in this tokenizer are all kept, none of them unknown, has the same pieces
        in the new one: WordPiece takes the longest piece that fits, and longer ones only went
        away. A word that was unknown here can become known there, by a split that a longer piece
        prevented.

        Args:
            ids: ids of this tokenizer.

        Returns:
            The new tokenizer, and int32 [kept]: the old id of each new id, ascending.

        Raises:
            ValueError: an id is not in [0, vocab_size).
        """
        specials = [self.pad_token_id, self.unk_token_id, self.bos_token_id, self.eos_token_id]
        specials += [i for i in (self.sep_token_id, self.mask_token_id) if i is not None]
        kept = _kept_ids(ids, specials, self.vocab_size)
        return type(self)(
            **{**self.get_config(), "vocabulary": self._vocabulary[kept].tolist()}
        ), kept


def _load_pieces(vocabulary: str | os.PathLike | Sequence[str]) -> tuple[list[str], str]:
    """Returns the pieces, checked, and how to call them in messages."""
    if isinstance(vocabulary, str | os.PathLike):
        where = os.fspath(vocabulary)
        try:
            text = _read(vocabulary, "vocabulary").decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"`vocabulary` must be a UTF-8 text file: {where}: {error}") from error
        # Not splitlines(): U+2028 and its like can be pieces.
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
