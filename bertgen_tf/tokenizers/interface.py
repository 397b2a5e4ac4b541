"""What both tokenizers share: the calls of Hugging Face's tokenizers, and checks of input."""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

Ids = tf.Tensor | tf.RaggedTensor

# Hugging Face's order.
ROLES = ("bos", "eos", "unk", "sep", "pad", "mask")
_ADDED_OPTIONS = ("special", "normalized", "lstrip", "rstrip")

# White space in the sense of Unicode.
_SPACES = r"[\s\x0b\x{85}\p{Z}]+"


class Spelled(NamedTuple):
    """A token that stands for itself in a text.

    Attributes:
        text: how it is spelled there.
        token, id: its piece in the vocabulary.
        lstrip, rstrip: whether white space before, or after it, belongs to it.
    """

    text: str
    token: str
    id: int
    lstrip: bool = False
    rstrip: bool = False


def file_name_in_config(field: str, name: str) -> ValueError:
    """The error for a config that is not complete: a config never makes us read another file."""
    return ValueError(
        f"{field} must be the vocabulary itself in the config of a tokenizer, received the name "
        f"{name[-80:]!r}: EncoderDecoderModel.from_preset reads presets."
    )


class TextTokenizer(tf.Module):
    """A vocabulary with special tokens, and conversions of plain Python values.

    These conversions are for inspecting data and for code written against Hugging Face's classes
    (transformers 5.23), whose results they give; the graph calls are `__call__` and `detokenize`.
    They differ from Hugging Face's on purpose: nothing is ever added to the vocabulary, so a
    special token that it lacks has neither piece nor id; an id outside the vocabulary is an error;
    an empty batch gives an empty result.

    Attributes:
        vocab_size: int, also `len(tokenizer)`.
        pad_token, bos_token, eos_token, unk_token: str.
        pad_token_id, bos_token_id, eos_token_id, unk_token_id: int.
        sep_token, mask_token: str, or None if the vocabulary has none.
        sep_token_id, mask_token_id: int or None.
        added_tokens: dictionaries, see `checked_added_tokens`.
        split_special_tokens: bool.
    """

    _frames = False  # whether `encode` can put special tokens around a text

    def __init__(
        self,
        pieces: Sequence[str],
        tokens: dict[str, str],
        name: str,
        where: str,
        *,
        added_tokens: Sequence[str | Mapping[str, Any]],
        split_special_tokens: bool,
    ):
        """Takes the pieces in the order of their ids; `tokens` maps roles to pieces."""
        super().__init__(name=name)
        if not isinstance(split_special_tokens, bool):
            raise TypeError(
                f"`split_special_tokens` must be True or False; received {split_special_tokens!r}."
            )
        optional = ["sep", "mask"]
        index = {piece: i for i, piece in enumerate(pieces)}
        ids = find_specials(index.get, tokens, optional, where)
        self._tokens = tokens
        self.pad_token_id: int = ids["pad"]
        self.bos_token_id: int = ids["bos"]
        self.eos_token_id: int = ids["eos"]
        self.unk_token_id: int = ids["unk"]
        self.sep_token_id: int | None = ids.get("sep")
        self.mask_token_id: int | None = ids.get("mask")
        self.vocab_size: int = len(pieces)
        # Not a list: tf.Module would wrap it and walk through it at each export.
        self._vocabulary = np.array(pieces, dtype=object)
        self._added_tokens = checked_added_tokens(added_tokens, index)
        self._added_ids = tuple(index[token["content"]] for token in self._added_tokens)
        self.split_special_tokens = split_special_tokens

    def __len__(self) -> int:
        return self.vocab_size

    def __reduce__(self) -> tuple[Any, ...]:
        # Tables of TensorFlow are not to be copied, but can be made anew.
        return type(self).from_config, (self.get_config(),)

    @property
    def pad_token(self) -> str:
        return self._vocabulary[self.pad_token_id]

    @property
    def bos_token(self) -> str:
        return self._vocabulary[self.bos_token_id]

    @property
    def eos_token(self) -> str:
        return self._vocabulary[self.eos_token_id]

    @property
    def unk_token(self) -> str:
        return self._vocabulary[self.unk_token_id]

    @property
    def sep_token(self) -> str | None:
        return None if self.sep_token_id is None else self._vocabulary[self.sep_token_id]

    @property
    def mask_token(self) -> str | None:
        return None if self.mask_token_id is None else self._vocabulary[self.mask_token_id]

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the existing special tokens, each once, the added ones last."""
        ids = [getattr(self, f"{role}_token_id") for role in ROLES]
        added = zip(self._added_tokens, self._added_ids, strict=True)
        ids += [i for token, i in added if token["special"]]
        return list(dict.fromkeys(i for i in ids if i is not None))

    @property
    def all_special_tokens(self) -> list[str]:
        """The pieces of `all_special_ids`."""
        return self._vocabulary[self.all_special_ids].tolist()

    @property
    def added_tokens(self) -> list[dict[str, Any]]:
        return [dict(token) for token in self._added_tokens]

    def get_vocab(self) -> dict[str, int]:
        """Returns the id of each piece."""
        return {piece: i for i, piece in enumerate(self._vocabulary)}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Returns the ids of one string: what `__call__` gives, as a list.

        Args:
            text: one string.
            add_special_tokens: whether to put [CLS] and [SEP] (bos and eos) around it. For
                `BertTokenizer` only: Hugging Face's `BertGenerationTokenizer` adds nothing even
                then, nor does ours.
        """
        ids = self(one_string(text)).numpy().tolist()
        if add_special_tokens and self._frames:
            return [self.bos_token_id, *ids, self.eos_token_id]
        return ids

    def convert_ids_to_tokens(
        self, ids: int | Sequence[int], skip_special_tokens: bool = False
    ) -> str | list[str]:
        """Pieces of ids: a str for one id, which is never skipped, otherwise a list.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        ids = self._checked(ids)
        if isinstance(ids, int):
            return self._vocabulary[ids]
        hidden = self.all_special_ids if skip_special_tokens else ()
        return [self._vocabulary[i] for i in ids if i not in hidden]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Joins pieces into text."""
        raise NotImplementedError

    def decode(
        self,
        ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str | list[str]:
        """Turns ids into text as Hugging Face does; `detokenize` gives more readable text.

        All ids are shown, even those after eos, and the rules of `convert_tokens_to_string` apply:
        special tokens may lack spaces around them, and the unknown token is shown as such.

        Args:
            ids: one id, integers [length] or [batch, length]: lists, arrays or tensors.
            skip_special_tokens: leave `all_special_ids` out, the unknown and sep tokens too.
            clean_up_tokenization_spaces: remove spaces before punctuation and contractions.

        Returns:
            str, or a list of them for a batch.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        ids = _plain(ids)
        if isinstance(ids, list) and ids and isinstance(ids[0], list):
            return [
                self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in ids
            ]
        row = [ids] if isinstance(ids, int) else ids
        text = self.convert_tokens_to_string(self.convert_ids_to_tokens(row, skip_special_tokens))
        return _clean_up(text) if clean_up_tokenization_spaces else text

    def batch_decode(
        self,
        ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> list[str]:
        """`decode`, but returns a list for a single row too."""
        ids = _plain(ids)
        if ids == []:
            return []
        texts = self.decode(ids, skip_special_tokens, clean_up_tokenization_spaces)
        return [texts] if isinstance(texts, str) else texts

    def _spelled(self, normalized: bool) -> list[Spelled]:
        """The tokens that a text can spell out, before it is normalised or after."""
        found = [
            Spelled(token["content"], token["content"], i, token["lstrip"], token["rstrip"])
            for token, i in zip(self._added_tokens, self._added_ids, strict=True)
            if token["normalized"] == normalized
            and not (token["special"] and self.split_special_tokens)
        ]
        if not normalized and not self.split_special_tokens:
            special = set(self.all_special_ids) - set(self._added_ids)
            found += [Spelled(self._vocabulary[i], self._vocabulary[i], i) for i in special]
        return found

    def _checked(self, ids: Any) -> int | list[int]:
        ids = _plain(ids)
        row = [ids] if isinstance(ids, int) else ids
        if not all(isinstance(i, int) for i in row):
            raise TypeError("`ids` must be one id or one row of ids; received rows of rows.")
        wrong = [i for i in row if not 0 <= i < self.vocab_size]
        if wrong:
            raise ValueError(
                f"`ids` must lie in [0, {self.vocab_size}); received {wrong[:5]}. "
                "Remove padding such as -100 first."
            )
        return ids


def checked_added_tokens(
    tokens: Sequence[str | Mapping[str, Any]], index: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Added tokens with all their options, which are those of Hugging Face's `AddedToken`.

    Args:
        tokens: pieces, or dictionaries: `content`, the piece; `special` (False): it is skipped by
            `skip_special_tokens` and is text if `split_special_tokens`; `normalized` (not special):
            it is looked for in the normalised text; `lstrip` and `rstrip` (False): it takes in the
            white space before it, or after it.
        index: the ids of the pieces.

    Raises:
        TypeError, ValueError: not such tokens, or not pieces of the vocabulary.
    """
    checked = []
    for token in tokens:
        options = {"content": token} if isinstance(token, str) else dict(token)
        for name, default in zip(_ADDED_OPTIONS, (False, None, False, False), strict=True):
            options.setdefault(name, not options["special"] if default is None else default)
        content = options.get("content")
        wrong = [name for name in options if name not in ("content", *_ADDED_OPTIONS)]
        wrong += [name for name in _ADDED_OPTIONS if not isinstance(options[name], bool)]
        if wrong:
            raise ValueError(
                f"`added_tokens` may have content and, True or False, {', '.join(_ADDED_OPTIONS)}; "
                f"received {content!r} with {wrong[0]}={options[wrong[0]]!r}."
            )
        if not content or content not in index:
            raise ValueError(
                f"`added_tokens` must be pieces of the vocabulary, each with an id; received "
                f"{content!r}. Append it to the vocabulary."
            )
        checked.append(options)
    return checked


def _plain(ids: Any) -> Any:
    """Turns ids of any kind into an int or nested lists of int."""
    if isinstance(ids, tf.RaggedTensor):
        return ids.to_list()
    if isinstance(ids, tf.Tensor):
        ids = ids.numpy()
    if isinstance(ids, np.ndarray):
        ids = ids.tolist()
    if isinstance(ids, list | tuple | range):
        return [_plain(i) for i in ids]
    if isinstance(ids, bool) or not isinstance(ids, int | np.integer):
        raise TypeError(f"`ids` must be integers; received {type(ids).__name__}.")
    return int(ids)


def _clean_up(text: str) -> str:
    """The replacements of Hugging Face's `clean_up_tokenization`, in its order."""
    for end in (".", "?", "!", ","):
        text = text.replace(f" {end}", end)
    text = text.replace(" ' ", "'")
    for end in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {end}", end)
    return text


def _sanitize(text: tf.Tensor) -> tf.Tensor:
    """Replaces invalid UTF-8 by U+FFFD; valid strings stay unchanged."""
    return tf.strings.unicode_transcode(
        text, "UTF-8", "UTF-8", errors="replace", replace_control_characters=False
    )


def text_vector(text: Any) -> tuple[tf.Tensor, bool]:
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


def read_around(
    text: tf.Tensor,
    tokens: Sequence[Spelled],
    values: Sequence[Any],
    read: Callable[[tf.Tensor], tf.RaggedTensor],
) -> tf.RaggedTensor:
    """Reads texts in which some tokens are spelled out: the longest one wins.

    Args:
        text: strings [batch], valid UTF-8.
        tokens: what may be spelled out.
        values: what each token becomes.
        read: strings [parts] -> [parts, None], for the text between tokens.

    Returns:
        ragged [batch, None], in the type of what `read` returns.
    """
    if not tokens:
        return read(text)
    spellings = [token.text for token in tokens]
    pattern = "|".join(map(re.escape, sorted(spellings, key=len, reverse=True)))
    # Split at a byte that no UTF-8 text has; `tf_text.regex_split` would end the text at a NUL.
    parts = tf.strings.split(
        tf.strings.regex_replace(text, f"({pattern})", b"\xff\\1\xff"), sep=b"\xff"
    )
    found = tf.equal(parts.flat_values[:, tf.newaxis], spellings)
    rest = tf.where(tf.reduce_any(found, axis=1), "", parts.flat_values)
    # Before and after each token there is a part of its row, so neighbours are of the same row.
    for strips, shift, space in (
        ([token.lstrip for token in tokens], -1, rf"{_SPACES}$"),
        ([token.rstrip for token in tokens], 1, rf"^{_SPACES}"),
    ):
        if any(strips):
            beside = tf.roll(tf.reduce_any(found & strips, axis=1), shift, axis=0)
            rest = tf.where(beside, tf.strings.regex_replace(rest, space, ""), rest)
    pieces = read(rest)
    each = tf.broadcast_to(tf.constant(values, pieces.dtype), tf.shape(found))
    pieces = tf.concat([tf.ragged.boolean_mask(each, found), pieces], axis=1)
    return parts.with_flat_values(pieces).merge_dims(1, 2)


def visible_ids(ids: Any, eos: int, hidden: Sequence[int], vocab_size: int):
    """Drops what is not text: hidden and impossible ids, and everything from the first eos on.

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


def find_specials(find, names: dict[str, str], optional: Sequence[str], where: str):
    """Looks up special tokens; `find` maps a piece to its id, or None."""
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


def kept_ids(ids: Iterable[int], always: Iterable[int], vocab_size: int) -> np.ndarray:
    """Sorted union of the two, checked: int32 [kept]."""
    ids = np.asarray(ids if hasattr(ids, "__array__") else list(ids))
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"`ids` must be integers; received dtype {ids.dtype}.")
    if ids.size and not (0 <= ids.min() and ids.max() < vocab_size):
        raise ValueError(
            f"`ids` must lie in [0, {vocab_size}); received values from {ids.min()} to {ids.max()}."
        )
    return np.union1d(ids.reshape(-1).astype(np.int32), np.asarray(list(always), np.int32))


def one_string(text: Any) -> str:
    """Checks that `text` is one string."""
    if not isinstance(text, str):
        raise TypeError(
            f"`text` must be one str; received {type(text).__name__}. "
            "For batches and tensors call the tokenizer itself."
        )
    return text


def write_file(
    directory: str | os.PathLike, name: str, content: bytes, prefix: str | None = None
) -> str:
    """Writes `name`, or `prefix-name`, and returns its path."""
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(os.fspath(directory), f"{prefix}-{name}" if prefix else name)
    with open(path, "wb") as file:
        file.write(content)
    return path


def read_file(path: str | os.PathLike, argument: str) -> bytes:
    """Reads a file that `argument` names."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"`{argument}` must be the path of a file; not found: {path}")
    with open(path, "rb") as file:
        return file.read()
