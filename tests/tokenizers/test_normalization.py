"""Normalizers and pre-tokenizers against Hugging Face's library, for every character."""

import itertools
import re
import sys
import unicodedata

import pytest
import tensorflow as tf
import tensorflow_text as tf_text
from hypothesis import given, settings
from hypothesis import strategies as st

from bertgen_tf.tokenizers import BertTokenizer
from bertgen_tf.tokenizers.normalization import (
    PRE_TOKENIZERS,
    MarkSorter,
    TextNormalizer,
    bert_normalizer,
    checked_steps,
    lowers,
    step_parts,
)


def is_sampled(code: int) -> bool:
    """All characters, but of those of no meaning only some."""
    kind = unicodedata.category(chr(code))
    return kind != "Cs" and (kind not in ("Cn", "Co") or code % 101 == 0)


MARK_SORTER = MarkSorter()
CHARACTERS = [chr(i) for i in range(sys.maxunicode + 1) if is_sampled(i)]
# Each between letters, 97 a text.
EVERY_CHARACTER = [
    "".join(f"a{c}b" for c in CHARACTERS[i : i + 97]) for i in range(0, len(CHARACTERS), 97)
]
ACCENTS = {"type": "BertNormalizer", "strip_accents": True, "lowercase": False}
QUICKTOUR = {
    "type": "Sequence",
    "normalizers": [{"type": "NFD"}, {"type": "Lowercase"}, {"type": "StripAccents"}],
}


def normalized(normalizer, pre_tokenizer, texts):
    """The words of texts, or the texts themselves without a pre-tokenizer."""
    result = TextNormalizer(checked_steps(normalizer), pre_tokenizer)(tf.constant(texts))
    if pre_tokenizer is not None:
        result = tf.strings.split(result)
        return [[word.decode() for word in words] for words in result.to_list()]
    return [text.decode() for text in result.numpy()]


def expected(normalizer, pre_tokenizer, texts):
    """The same of the library tokenizers."""
    library = pytest.importorskip("tokenizers", reason="needs the library tokenizers")

    def make(steps):
        if isinstance(steps, list):
            return library.normalizers.Sequence(list(map(make, steps)))
        if steps["type"] == "Sequence":
            return make(steps["normalizers"])
        options = {name: value for name, value in steps.items() if name != "type"}
        return getattr(library.normalizers, steps["type"])(**options)

    if normalizer is not None:
        texts = list(map(make(normalizer).normalize_str, texts))
    if pre_tokenizer is None:
        return texts
    split = getattr(library.pre_tokenizers, pre_tokenizer)().pre_tokenize_str
    return [[word for word, _ in split(text)] for text in texts]


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer"),
    [
        (bert_normalizer(True), "BertPreTokenizer"),
        (bert_normalizer(False), "BertPreTokenizer"),
        (bert_normalizer(True, False, False), None),
        (QUICKTOUR, "Whitespace"),
        (None, "WhitespaceSplit"),
    ],
    ids=["uncased", "cased", "accents", "quicktour", "none"],
)
def test_every_character(normalizer, pre_tokenizer):
    theirs = expected(normalizer, pre_tokenizer, EVERY_CHARACTER)
    ours = normalized(normalizer, pre_tokenizer, EVERY_CHARACTER)
    for text, one, two in zip(EVERY_CHARACTER, ours, theirs, strict=True):
        assert one == two, text


ASSIGNED = st.characters(categories=("L", "M", "N", "P", "S", "Z", "Cc", "Cf"))
MARKS = st.sampled_from([c for c in CHARACTERS if unicodedata.combining(c)])
TEXT = st.lists(st.one_of(ASSIGNED, MARKS, st.sampled_from("aΣİ가 .\u200d中")), max_size=12)
STEPS = st.one_of(
    st.sampled_from(
        [None, QUICKTOUR, {"type": "Lowercase"}, {"type": "NFD"}, [ACCENTS, QUICKTOUR]]
    ),
    st.builds(
        lambda **options: {"type": "BertNormalizer", **options},
        clean_text=st.booleans(),
        handle_chinese_chars=st.booleans(),
        strip_accents=st.sampled_from([None, True, False]),
        lowercase=st.booleans(),
    ),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(TEXT.map("".join), min_size=1, max_size=30), STEPS, st.sampled_from(PRE_TOKENIZERS))
def test_any_text(texts, normalizer, pre_tokenizer):
    """Sequences: marks are reordered, final sigmas are none."""
    assert normalized(normalizer, None, texts) == expected(normalizer, None, texts)
    words = normalized(normalizer, pre_tokenizer, texts)
    assert words == expected(normalizer, pre_tokenizer, texts)


def test_compositions_are_those_of_tensorflow():
    """Apart from what is newer than Unicode 12, which the library does not know."""
    texts = ["é Å \ufb01 ½ \uac00", "e\u0301 A\u030a \u1100\u1161"]
    for form in ("NFC", "NFKC", "NFKD"):
        assert normalized({"type": form}, None, texts) == expected({"type": form}, None, texts)
    assert normalized([{"type": "NFC"}, {"type": "Lowercase"}], None, ["E\u0301"]) == ["é"]


def test_without_the_library():
    uncased = "BertPreTokenizer"
    samples = {
        "Die Straße, ΚΌΣΜΟΣ ς": ["die", "straße", ",", "κοσμοσ", "ς"],
        "5 km² ½ Donau\u00addampf": ["5", "km²", "½", "donaudampf"],
        "İI\u200b\ufeff한中文": ["ii\u1112\u1161\u11ab", "中", "文"],
        "a\u0344\U0001d165\x00\ufffd\U000e0001b": ["a\U0001d165b"],
        "": [],
    }
    assert normalized(bert_normalizer(True), uncased, list(samples)) == list(samples.values())
    assert normalized(None, "Whitespace", ["x-y!! z_1"]) == [["x", "-", "y", "!!", "z_1"]]


def test_steps():
    assert checked_steps(None) == checked_steps([]) == []
    filled = {"clean_text": True, "handle_chinese_chars": True, **ACCENTS}
    assert checked_steps([QUICKTOUR, ACCENTS]) == [*QUICKTOUR["normalizers"], filled]
    assert lowers(checked_steps(QUICKTOUR)) and not lowers([filled])
    combinations = itertools.product([True, False], [None, True, False])
    strip = [step_parts(bert_normalizer(*options)[0]) for options in combinations]
    assert [("NFD" in parts, "Lowercase" in parts) for parts in strip] == [
        *((True, True), (True, True), (False, True)),
        *((False, False), (True, False), (False, False)),
    ]
    for wrong, message in (
        ({"type": "Replace", "content": "x"}, 'received {"type": "Replace"'),
        ({"type": "NFC", "left": True}, "received .*left"),
        ({"type": "BertNormalizer", "lowercase": None}, "not have lowercase=None"),
        ("NFC", 'received "NFC"'),
        ([3], "received 3"),
    ):
        with pytest.raises(ValueError, match=message):
            checked_steps(wrong)


@pytest.mark.parametrize("lowercase", [True, False])
def test_long_runs_of_marks_are_read_as_they_were(lowercase):
    """As the op reads them in full, which takes time by the square of their number."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "\u00e1", "##\u0301", "b"]
    table = tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer(pieces, tf.range(len(pieces), dtype=tf.int64)), 1
    )
    op = tf_text.BertTokenizer(table, token_out_type=tf.int32, lower_case=lowercase)
    tokenizer = BertTokenizer(pieces, lowercase)
    for marks in ("\u0301", "\u0301\u0323", "\u302e\u0301", "\u0301\u0903"):
        for count in (1, 3, 63, 64, 65, 200):
            text = f"b a{marks * count}b b"
            assert (
                tokenizer(text).numpy().tolist() == op.tokenize([text]).flat_values.numpy().tolist()
            )


@given(st.text("a \u0301\u0323\u302e\u0903\u0345\U0001d165", min_size=9, max_size=40))
def test_long_runs_of_marks_are_put_into_order(text):
    """After which there is nothing to sort, and all that Unicode compares is the same."""
    found = MARK_SORTER(tf.constant([text, "b"])).numpy().tolist()
    assert found[1] == b"b"
    assert unicodedata.normalize("NFD", found[0].decode()) == unicodedata.normalize("NFD", text)
    if re.search("[\u0301\u0323\u302e\u0345\U0001d165]{8}", text):
        classes = list(map(unicodedata.combining, found[0].decode()))
        assert not any(a > b > 0 for a, b in itertools.pairwise(classes))


def test_texts_are_read_without_a_word_of_re2(capfd):
    text = "a\u0301 \u00df" * 999 + "a" + "\u0301\u0323" * 999
    MARK_SORTER(tf.constant([text, text[9:]]))
    assert capfd.readouterr().err == ""
