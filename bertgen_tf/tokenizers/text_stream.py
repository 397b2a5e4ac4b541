"""How much of a text is final while its ids are still arriving.

Further ids can change the text of those before them: a word continues, punctuation closes up, marks
become pairs, bytes become a character. `TextStream` gives out what no further ids can change.
"""

import codecs
import functools
import re
import string
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_text as tf_text
from sentencepiece import sentencepiece_model_pb2

from bertgen_tf.tokenizers import BertGenerationTokenizer, BertTokenizer
from bertgen_tf.tokenizers.prose import RULES


class TextStream:
    """The text of ids that arrive one after another, as `generate_postprocess` shows them.

    What is final depends on how ids become text:

    - WordPiece with `prose=False`: further pieces are appended and change nothing.
    - SentencePiece: the same, but the bytes of an incomplete character wait for the others.
      Models with rules for denormalisation, which are rare, give out everything at the end.
    - WordPiece as prose: the rules of `bertgen_tf.tokenizers.prose` are applied one after another
      to the growing text, each as far as what may follow cannot matter, see `_Replacement`. Mostly
      the last word or mark is held back, but everything from an opening quotation mark on until its
      partner arrives: only then is it known that no space follows the mark.

    Args:
        preprocessor: a `Seq2SeqPreprocessor`.
    """

    def __init__(self, preprocessor: Any):
        tokenizer = preprocessor.target_tokenizer
        self._preprocessor = preprocessor
        self._hidden = {tokenizer.pad_token_id, tokenizer.bos_token_id}
        self._hidden.update(preprocessor.hidden_token_ids)
        if isinstance(tokenizer, BertGenerationTokenizer):
            self._final: _Characters | _Prose | _Words = _Characters(tokenizer)
        elif preprocessor.prose:
            self._hidden.add(tokenizer.mask_token_id)
            self._final = _Prose(tokenizer)
        else:
            self._final = _Words(tokenizer)
        self._ids: list[int] = []  # the visible ones
        self._ended = False
        self._given = 0

    def add(self, ids: Iterable[int]) -> str:
        """Takes the next ids; returns the text that they make final, perhaps none."""
        new = self._visible(ids)
        if not new:
            return ""
        self._ids += new
        part = self._final.add(new)
        self._given += len(part)
        return part

    def finish(self) -> str:
        """Returns the rest of the text; there are no further ids."""
        text = self._preprocessor.generate_postprocess(np.array(self._ids, np.int32))
        part = text.numpy().decode("utf-8")[self._given :]
        self._given += len(part)
        return part

    def _visible(self, ids: Iterable[int]) -> list[int]:
        """The ids that `visible_ids` keeps."""
        tokenizer = self._preprocessor.target_tokenizer
        visible = []
        for i in ids:
            self._ended |= i == tokenizer.eos_token_id
            if not self._ended and i not in self._hidden and 0 <= i < tokenizer.vocab_size:
                visible.append(i)
        return visible


class _Words:
    """Word pieces with single spaces between words."""

    def __init__(self, tokenizer: BertTokenizer):
        self._tokenizer = tokenizer
        self._space = ""

    def add(self, ids: list[int]) -> str:
        pieces = self._tokenizer.convert_ids_to_tokens(ids)
        part = (self._space + " ".join(pieces)).replace(" ##", "")
        self._space = " "
        return part


class _Characters:
    """What SentencePiece makes of its pieces."""

    def __init__(self, tokenizer: BertGenerationTokenizer):
        self._tokenizer = tokenizer
        self._denormalizes = _denormalizes(tokenizer._proto)
        self._ids: list[int] = []
        self._given = 0

    def add(self, ids: list[int]) -> str:
        self._ids += ids
        complete = np.array(self._ids[: self._complete()], np.int32)
        # As `detokenize` does, which takes ten times as long to find the visible ids.
        row = tf.RaggedTensor.from_row_splits(complete, [0, len(complete)], validate=False)
        text = self._tokenizer._tokenizer.detokenize(row)[0].numpy().decode("utf-8")
        part = text[self._given :]
        self._given = len(text)
        return part

    def _complete(self) -> int:
        """How many of the ids make a text that further ones cannot change."""
        if self._denormalizes:
            return 0
        # SentencePiece reads adjacent bytes together, from the first one on. While they are valid
        # characters, these stay; after anything else the bytes wait for a piece that is not a byte.
        first = len(self._ids)
        while first and self._tokenizer._processor.is_byte(self._ids[first - 1]):
            first -= 1
        tail = self._tokenizer.convert_ids_to_tokens(self._ids[first:])
        try:
            # Not an error: an end in the middle of a character.
            _, valid = codecs.utf_8_decode(b"".join(map(self._tokenizer._spelling, tail)))
        except UnicodeDecodeError as error:
            valid = error.start
        return first + valid


@functools.lru_cache(maxsize=8)
def _denormalizes(proto: bytes) -> bool:
    model = sentencepiece_model_pb2.ModelProto.FromString(proto)
    return bool(model.denormalizer_spec.precompiled_charsmap)


class _Prose:
    """Word pieces joined by the rules of `prose`."""

    def __init__(self, tokenizer: BertTokenizer):
        self._tokenizer = tokenizer
        alphabet = "".join(sorted({*"".join(tokenizer.get_vocab()), *string.printable}))
        self._stages: list[_Replacement | _Composition] = [
            *map(_Replacement, _growing_rules(alphabet)),
            _Composition(alphabet),
        ]

    def add(self, ids: list[int]) -> str:
        pieces = self._tokenizer.convert_ids_to_tokens(ids)
        part = "".join(f" {piece}" for piece in pieces)
        for stage in self._stages:
            part = stage.add(part)
        return part


class _GrowingRule(NamedTuple):
    """A rule of `prose` for texts of one alphabet, in Python's regular expressions.

    Attributes:
        match: finds what the rule finds.
        undecided: in the known text with `beyond` after it, finds where there may be a match that
            needs more of the text.
        rewrite: what replaces a match.
        beyond: enough wildcard characters to end every match.
        keeps_first: whether the first character of a match stays, unless it is a space.
    """

    match: re.Pattern
    undecided: re.Pattern
    rewrite: str
    beyond: str
    keeps_first: bool


class _Replacement:
    """Replaces all matches of a rule in a growing text, as `tf.strings.regex_replace` does.

    The search goes from left to right. Whether there is a match at a place, and where it ends,
    depends on the characters that it must inspect. Once these are all known, nothing that follows
    can change it. So the search stops at the first place where a match may need more.
    """

    def __init__(self, rule: _GrowingRule):
        self._rule = rule
        self._text = ""
        self._searched = 0  # the search has come this far
        self._given = 0  # the text was given out this far, at most one character further

    def add(self, text: str) -> str:
        """Takes the next part of the text; returns what is final of the result."""
        rule = self._rule
        self._text += text
        parts = []
        while True:
            # `^` is the beginning of the whole text, and word boundaries need the preceding
            # character: so always search the whole text, from a position.
            start = rule.undecided.search(self._text + rule.beyond, self._searched)
            stop = start.start() if start else len(self._text)
            match = rule.match.search(self._text, self._searched)
            if not match or match.start() >= stop:
                break
            before = self._text[self._searched : match.start()]
            replaced = before + match.expand(rule.rewrite)
            parts.append(replaced[self._given - self._searched :])
            self._searched = self._given = match.end()
        end = stop
        if rule.keeps_first and stop < len(self._text) and self._text[stop] != " ":
            end += 1
        parts.append(self._text[self._given : end])
        self._searched, self._given = stop, max(end, self._given)
        return "".join(parts)


class _Composition:
    """Unicode's NFC of a growing text."""

    def __init__(self, alphabet: str):
        self._joining = frozenset(filter(_may_join, alphabet))
        self._held = ""

    def add(self, text: str) -> str:
        """Takes the next part of the text; returns what is final of the result."""
        self._held += text
        # The text before a character that joins nothing before it is composed on its own.
        end = len(self._held)
        while end and self._held[end - 1] in self._joining:
            end -= 1
        if end < len(self._held) or (end and self._composes(self._held[-1])):
            end -= 1
        end = max(end, 0)
        final, self._held = self._held[:end], self._held[end:]
        if final.isascii():
            return final
        return tf_text.normalize_utf8(final, "NFC").numpy().decode("utf-8")

    def _composes(self, character: str) -> bool:
        """Whether any character that may follow joins it."""
        return _composes(character, self._joining)


@functools.lru_cache(maxsize=4096)
def _composes(character: str, joining: frozenset[str]) -> bool:
    def composed(text: str) -> str:
        return unicodedata.normalize("NFC", text)

    return unicodedata.category(character) == "Cn" or any(
        composed(character + other) != composed(character) + composed(other) for other in joining
    )


def _may_join(character: str) -> bool:
    """Whether a character can be composed with one before it, judging by its first part.

    These are marks, the vowels and finals of Korean and one letter of Kirat Rai; and, to be safe,
    characters unknown to Python.
    """
    first = unicodedata.normalize("NFD", character)[0]
    return (
        unicodedata.category(first) in ("Mn", "Mc", "Me", "Cn")
        or "\u1160" <= first <= "\u11ff"
        or first == "\U00016d67"
    )


# What the patterns of `prose` are made of: a class, property, escape or character, each of which
# matches one character; word boundaries; the end of the text; and syntax that Python shares.
_TOKEN = re.compile(
    r"(?P<one>\[(?:\\.|[^\\\]])+\]|\\p(?:\{\w+\}|\w)|\\[dws]|\\\W|[^\\()|*+?{}^$\[])"
    r"|(?P<boundary>\\b)"
    r"|(?P<end>\$)"
    r"|(?P<syntax>\(\?:|\((?!\?)|[)|^]|(?:[*+?]|\{\d+(?:,\d*)?\})\??)"
)


@functools.lru_cache(maxsize=4)
def _growing_rules(alphabet: str) -> tuple[_GrowingRule, ...]:
    """The rules of `prose` for texts of the characters of `alphabet`, which is sorted."""
    wildcard = next(chr(i) for i in range(0x10FFFF, 0, -1) if chr(i) not in alphabet)
    behind = f"(?<={wildcard})"
    # What inspects the next character also does so at the end of the known text.
    at_end = f"(?:(?={wildcard})|{behind})"

    @functools.cache
    def members(one: str) -> str:
        # RE2 knows best what matches.
        found = tf.strings.regex_full_match(list(alphabet), one).numpy().tolist()
        return _ranges(alphabet, found)

    rules = []
    for pattern, rewrite in RULES:
        flags = "(?i)" if pattern.startswith("(?i)") else ""
        match = undecided = ""
        position = len(flags)
        while position < len(pattern):
            token = _TOKEN.match(pattern, position)
            if not token:
                raise ValueError(
                    "Rules of prose may use only the syntax that streaming can read, received "
                    f"{pattern!r} with {pattern[position:]!r}. Extend text_stream."
                )
            position = token.end()
            if token["one"]:
                characters = members(flags + token["one"])
                # A class without members must not be empty.
                match += f"[{characters or wildcard}]"
                undecided += f"[{characters}{wildcard}]"
            elif token["boundary"]:
                match += r"(?a:\b)"
                undecided += rf"(?:(?a:\b)|{at_end})"
            elif token["end"]:
                match += r"\Z"
                undecided += at_end
            else:
                match += token["syntax"]
                undecided += token["syntax"]
        # Unless a match ends by inspecting what follows it, its last character decides it.
        looks_on = "$" in pattern or r"\b" in pattern[len(flags) :].removeprefix(r"\b")
        rules.append(
            _GrowingRule(
                match=re.compile(match),
                undecided=re.compile(f"(?:{undecided}){at_end if looks_on else behind}"),
                rewrite=rewrite,
                # No match needs more characters to end than its pattern has.
                beyond=wildcard * len(pattern),
                # Apart from two marks that become one, rules only remove spaces.
                keeps_first=rewrite.startswith(("\\", pattern[0])),
            )
        )
    return tuple(rules)


def _ranges(alphabet: str, found: Sequence[bool]) -> str:
    """The inside of a character class, as runs of the alphabet: other characters never occur."""
    ranges = []
    for i, is_member in enumerate(found):
        if is_member and (i == 0 or not found[i - 1]):
            ranges.append([alphabet[i], alphabet[i]])
        elif is_member:
            ranges[-1][1] = alphabet[i]
    return "".join(f"{re.escape(first)}-{re.escape(last)}" for first, last in ranges)
