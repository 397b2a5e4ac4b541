"""How text is normalised and cut into words as in Hugging Face's tokenizers, inside the graph.

TensorFlow's ops for lower case, marks and decompositions are of other versions of Unicode than
Hugging Face's tokenizers, and differ again from server to server. So both are done with tables of
code points, made from `characters.json`, which `tools/fixtures/make_characters.py` reads off
Hugging Face's library; an export holds its tables. Only NFC, NFKC and NFKD are TensorFlow's: they
also change what came to Unicode after version 12, which Hugging Face's library leaves alone: 170
characters in NFKC, 191 in NFKD, and in all three the order of some 100 marks.
"""

import functools
import json
import pathlib
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_text as tf_text

# One step: `{"type": ...}` with its options, as in the "normalizer" of a tokenizer.json.
Step = dict[str, Any]

PRE_TOKENIZERS = ("BertPreTokenizer", "WhitespaceSplit", "Whitespace")
_BERT_OPTIONS = {
    "clean_text": (True, (bool,)),
    "handle_chinese_chars": (True, (bool,)),
    "strip_accents": (None, (bool, type(None))),
    "lowercase": (True, (bool,)),
}
_BY_TENSORFLOW = ("NFC", "NFKC", "NFKD")
_PLAIN_STEPS = (*_BY_TENSORFLOW, "NFD", "Lowercase", "StripAccents")
_SPACE = ord(" ")
# In the rows of a table: the character itself, and the parts of a Korean syllable.
_SELF, _LEAD, _VOWEL, _TAIL = -1, -2, -3, -4
_SYLLABLES = range(0xAC00, 0xD7A4)
_LEADS, _VOWELS, _TAILS = 0x1100, 0x1161, 0x11A7
_VOWEL_COUNT, _TAIL_COUNT = 21, 28

# Eight marks in a row, which no language has: RE2 keeps a program of that size, not a much larger.
_MARKS = r"(?s).*[\p{Mn}\x{302E}\x{302F}\x{16FF0}\x{16FF1}\x{1D165}-\x{1D172}]{8}.*"

_Change = Callable[[int], Iterable[int]]


def bert_normalizer(
    lowercase: bool, strip_accents: bool | None = None, tokenize_chinese_chars: bool = True
) -> list[Step]:
    """What Hugging Face's `BertTokenizer` does with these options."""
    step = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": tokenize_chinese_chars,
        "strip_accents": strip_accents,
        "lowercase": lowercase,
    }
    return [step]


def checked_steps(normalizer: Any) -> list[Step]:
    """The steps of a normalizer, one after another, with all their options.

    Args:
        normalizer: as in a tokenizer.json: None, a step, a "Sequence" of them; or a list of steps.

    Raises:
        ValueError: something in it cannot be followed; the message names it.
    """
    if normalizer is None:
        return []
    if isinstance(normalizer, list | tuple):
        return [step for part in normalizer for step in checked_steps(part)]
    kind = normalizer.get("type") if isinstance(normalizer, Mapping) else None
    options = {key: normalizer[key] for key in normalizer if key != "type"} if kind else {}
    if kind == "Sequence" and list(options) == ["normalizers"]:
        return checked_steps(list(options["normalizers"]))
    if kind in _PLAIN_STEPS and not options:
        return [{"type": kind}]
    if kind == "BertNormalizer" and set(options) <= set(_BERT_OPTIONS):
        step = {"type": kind}
        for name, (default, types) in _BERT_OPTIONS.items():
            step[name] = options.get(name, default)
            if not isinstance(step[name], types):
                raise ValueError(f"BertNormalizer should not have {name}={step[name]!r}.")
        return [step]
    raise ValueError(
        f"A normalizer must be BertNormalizer, {', '.join(_PLAIN_STEPS)} or a Sequence of them; "
        f"received {json.dumps(normalizer, default=repr)[:99]}."
    )


def lowers(steps: Iterable[Step]) -> bool:
    """Whether one of the steps makes letters lower-case."""
    return any(step["type"] == "Lowercase" or step.get("lowercase") is True for step in steps)


class MarkSorter(tf.Module):
    """Puts long runs of marks into Unicode's canonical order.

    TensorFlow's ops do the same, in time that grows with the square of the length: hours for a text
    of a few MB. What is in order already takes them no time, and gives the same result.
    """

    def __init__(self) -> None:
        super().__init__()
        self._reordering = _Reordering(np.arange(sys.maxunicode + 1))

    def __call__(self, text: tf.Tensor) -> tf.Tensor:
        """Strings [batch], valid UTF-8 -> strings [batch]."""

        def ordered() -> tf.Tensor:
            codes = self._reordering(tf.strings.unicode_decode(text, "UTF-8"))
            return tf.strings.unicode_encode(codes, "UTF-8")

        long = tf.reduce_any(tf.strings.regex_full_match(text, _MARKS))
        return tf.cond(long, ordered, lambda: text)


class TextNormalizer(tf.Module):
    """Runs the steps of a normalizer, and puts spaces between the words of a pre-tokenizer.

    Args:
        steps: as `checked_steps` gives them.
        pre_tokenizer: one of `PRE_TOKENIZERS`. Its words then have spaces between them, perhaps
            more than one, and there is no other white space. None: the text is only normalised.
    """

    def __init__(self, steps: Sequence[Step], pre_tokenizer: str | None = None):
        super().__init__(name="text_normalizer")
        self._stages: list[_Table | _Reordering | _Boundaries | str] = []
        changes: list[_Change] = []

        def end_table() -> None:
            if changes:
                self._stages.append(_Table(changes))
                changes.clear()

        for name in [name for step in steps for name in step_parts(step)]:
            if name in _BY_TENSORFLOW:
                end_table()
                self._stages.append(name)
                continue
            changes.append(_changes()[name])
            if name == "NFD":
                end_table()
                self._stages.append(_Reordering(np.flatnonzero(_facts()["combining"])))
        if pre_tokenizer == "Whitespace":
            end_table()
            self._stages.append(_Boundaries())
        if pre_tokenizer is not None:
            isolated = pre_tokenizer == "BertPreTokenizer"
            changes.append(_changes()["words" if isolated else "separators"])
        end_table()
        self._sorter = MarkSorter() if set(self._stages) & {*_BY_TENSORFLOW} else None

    def __call__(self, text: tf.Tensor) -> tf.Tensor:
        """Strings [batch], valid UTF-8 -> strings [batch]."""
        codes = None
        for stage in self._stages:
            if isinstance(stage, str):
                text = text if codes is None else tf.strings.unicode_encode(codes, "UTF-8")
                text, codes = tf_text.normalize_utf8(self._sorter(text), stage), None
            else:
                codes = tf.strings.unicode_decode(text, "UTF-8") if codes is None else codes
                codes = stage(codes)
        return text if codes is None else tf.strings.unicode_encode(codes, "UTF-8")


def step_parts(step: Step) -> list[str]:
    """What a step consists of, in the order of Hugging Face's library."""
    if step["type"] != "BertNormalizer":
        return [step["type"]]
    strip = step["lowercase"] if step["strip_accents"] is None else step["strip_accents"]
    parts = ["clean"] if step["clean_text"] else []
    parts += ["chinese"] if step["handle_chinese_chars"] else []
    parts += ["NFD", "nonspacing"] if strip else []
    return [*parts, "Lowercase"] if step["lowercase"] else parts


@functools.cache
def _facts() -> dict[str, Any]:
    """`characters.json`: bool [code points] for each set, and the lower case of characters."""
    path = pathlib.Path(__file__).with_name("characters.json")
    facts = json.loads(path.read_text(encoding="utf-8"))
    lower = {ord(word[0]): tuple(map(ord, word[1:])) for word in facts.pop("lower").split()}
    sets = {}
    for name, ranges in facts.items():
        sets[name] = np.zeros(sys.maxunicode + 1, bool)
        for first, last in ranges:
            sets[name][first : last + 1] = True
    return {**sets, "lower": lower}


@functools.cache
def _changes() -> dict[str, _Change]:
    """What becomes of one code point in each of the steps that tables do."""
    facts = _facts()

    def nfd(code: int) -> tuple[int, ...]:
        if code in _SYLLABLES:
            has_tail = (code - _SYLLABLES.start) % _TAIL_COUNT > 0
            return (_LEAD, _VOWEL, _TAIL) if has_tail else (_LEAD, _VOWEL)
        if not facts["decomposed"][code]:
            return (code,)
        return tuple(map(ord, unicodedata.normalize("NFD", chr(code))))

    def clean(code: int) -> tuple[int, ...]:
        return () if facts["dropped"][code] else (_SPACE if facts["space"][code] else code,)

    def apart(code: int) -> tuple[int, ...]:
        return (_SPACE, code, _SPACE)

    def separators(code: int) -> tuple[int, ...]:
        return (_SPACE if facts["separator"][code] else code,)

    return {
        "clean": clean,
        "chinese": lambda code: apart(code) if facts["chinese"][code] else (code,),
        "NFD": nfd,
        "nonspacing": lambda code: () if facts["nonspacing"][code] else (code,),
        "StripAccents": lambda code: () if facts["marks"][code] else (code,),
        "Lowercase": lambda code: facts["lower"].get(code, (code,)),
        "separators": separators,
        "words": lambda code: apart(code) if facts["punctuation"][code] else separators(code),
    }


class _Lookup(tf.Module):
    """A small number for each code point: int16 [code points], stored in blocks."""

    _BLOCK = 64

    def __init__(self, values: np.ndarray):
        super().__init__()
        rows = values.astype(np.int16).reshape(-1, self._BLOCK)
        numbers: dict[bytes, int] = {}  # of the different blocks
        blocks = [numbers.setdefault(row.tobytes(), len(numbers)) for row in rows]
        with tf.init_scope():
            self._cells = tf.constant(np.frombuffer(b"".join(numbers), np.int16))
            self._blocks = tf.constant(blocks, tf.int16)

    def __call__(self, codes: tf.Tensor) -> tf.Tensor:
        block = tf.cast(tf.gather(self._blocks, codes // self._BLOCK), tf.int32)
        values = tf.gather(self._cells, block * self._BLOCK + codes % self._BLOCK)
        return tf.cast(values, tf.int32)


class _Table(tf.Module):
    """Puts other characters, or none, in the place of each character."""

    def __init__(self, changes: Iterable[_Change]):
        super().__init__()
        rows, numbers = _rows(tuple(changes))
        self._decomposes = any(_LEAD in row for row in rows)
        self._numbers = _Lookup(numbers)
        with tf.init_scope():
            self._rows = tf.ragged.constant(rows, tf.int32)

    def __call__(self, codes: tf.RaggedTensor) -> tf.RaggedTensor:
        """Code points [batch, None] -> code points [batch, None]."""
        rows = tf.gather(self._rows, self._numbers(codes.flat_values))
        kept = tf.repeat(codes.flat_values, rows.row_lengths())
        values = tf.where(rows.flat_values == _SELF, kept, rows.flat_values)
        if self._decomposes:
            syllable = kept - _SYLLABLES.start
            for part, code in (
                (_LEAD, _LEADS + syllable // (_TAIL_COUNT * _VOWEL_COUNT)),
                (_VOWEL, _VOWELS + syllable // _TAIL_COUNT % _VOWEL_COUNT),
                (_TAIL, _TAILS + syllable % _TAIL_COUNT),
            ):
                values = tf.where(rows.flat_values == part, code, values)
        return _with_parts(codes, values, rows.row_splits)


def _with_parts(codes: tf.RaggedTensor, values: tf.Tensor, splits: tf.Tensor) -> tf.RaggedTensor:
    """Code points [batch, None], in place of each of which there are some of `values`."""
    splits = tf.gather(splits, codes.row_splits)
    return tf.RaggedTensor.from_row_splits(values, splits, validate=False)


@functools.lru_cache(maxsize=16)
def _rows(changes: tuple[_Change, ...]) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """What becomes of each code point after all the changes.

    Returns:
        The different results, in which `_SELF` is the code point itself, and int16 [code points]:
        which result each has.
    """

    def result(code: int) -> tuple[int, ...]:
        codes: list[int] = [code]
        for change in changes:
            # The parts of syllables, which are negative, stay what they are.
            codes = [new for old in codes for new in (change(old) if old >= 0 else (old,))]
        return tuple(_SELF if new == code else new for new in codes)

    rows: dict[tuple[int, ...], int] = {}

    def number(code: int) -> int:
        return rows.setdefault(result(code), len(rows))

    single, examples, group = _groups()
    numbers = np.array([number(code) for code in examples], np.int16)[group]
    for code in single:
        numbers[code] = number(code)
    return list(rows), numbers


@functools.cache
def _groups() -> tuple[list[int], list[int], np.ndarray]:
    """Code points with which all the changes do the same.

    Returns:
        Those that have no group, because they are decomposed or have a lower case of their own; an
        example of each group; int8 [code points]: the group of each.
    """
    facts = dict(_facts())
    alone = facts.pop("decomposed") | np.isin(np.arange(sys.maxunicode + 1), list(facts["lower"]))
    alone[_SYLLABLES.start : _SYLLABLES.stop] = False
    del facts["lower"]
    tails = np.arange(len(_SYLLABLES)) % _TAIL_COUNT > 0
    properties = sum(fact.astype(np.uint16) << bit for bit, fact in enumerate(facts.values()))
    properties[_SYLLABLES.start : _SYLLABLES.stop] = 2**14 + tails
    properties[alone] = 2**15
    kinds, group = np.unique(properties, return_inverse=True)
    examples = [int(np.argmax(group == i)) for i in range(len(kinds))]
    return np.flatnonzero(alone).tolist(), examples, group.astype(np.int8)


class _Reordering(tf.Module):
    """Unicode's canonical order of the marks that follow a character.

    Args:
        marks: code points; what is no mark among them has the class 0 and stays where it is.
    """

    def __init__(self, marks: np.ndarray) -> None:
        super().__init__()
        classes = np.zeros(sys.maxunicode + 1, np.int16)
        for code in marks.tolist():
            classes[code] = unicodedata.combining(chr(code))
        self._classes = _Lookup(classes)

    def __call__(self, codes: tf.RaggedTensor) -> tf.RaggedTensor:
        """Code points [batch, None] -> code points [batch, None]."""
        values = codes.flat_values
        classes = self._classes(values)

        def ordered() -> tf.Tensor:
            row = codes.value_rowids()
            begins = tf.concat([[True], row[1:] != row[:-1]], axis=0) | (classes == 0)
            run = tf.cumsum(tf.cast(begins, tf.int64))
            return tf.gather(
                values, tf.argsort(run * 256 + tf.cast(classes, tf.int64), stable=True)
            )

        # Hardly any text needs it.
        wrong = tf.reduce_any((classes[1:] > 0) & (classes[1:] < classes[:-1]))
        return codes.with_flat_values(tf.cond(wrong, ordered, lambda: values))


class _Boundaries(tf.Module):
    """Puts a space wherever a word meets other characters, as the pre-tokenizer Whitespace does."""

    def __init__(self) -> None:
        super().__init__()
        facts = _facts()
        self._kinds = _Lookup(np.where(facts["word"], 1, np.where(facts["separator"], 0, 2)))

    def __call__(self, codes: tf.RaggedTensor) -> tf.RaggedTensor:
        """Code points [batch, None] -> code points [batch, None]."""
        kinds = self._kinds(codes.flat_values)
        before = tf.concat([kinds[:1], kinds[:-1]], axis=0)  # across rows, which does no harm
        meets = kinds != before
        parts = tf.stack([tf.fill(tf.shape(kinds), _SPACE), codes.flat_values], axis=1)
        kept = tf.stack([meets, tf.ones_like(meets)], axis=1)
        counts = 1 + tf.cast(meets, codes.row_splits.dtype)
        splits = tf.concat([tf.zeros([1], counts.dtype), tf.cumsum(counts)], axis=0)
        return _with_parts(codes, tf.boolean_mask(parts, kept), splits)
