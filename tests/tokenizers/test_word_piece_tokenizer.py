import functools
import json
import re
import sys
import unicodedata

import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from bertgen_tf.tokenizers import BertTokenizer
from tests.helpers import GOLDEN
from tests.helpers.tokenizer_samples import (
    BERT_PIECES,
    ODDITIES,
    SENTENCES,
    SHARED,
    check_answers,
    check_subset,
    decoded,
    needs_shared,
    wikisplit,
)

EXPECTED = json.loads((GOLDEN / "tokenizers.json").read_text("utf-8"))
# Where the normalization "tf_hub" differs, as `BertTokenizer` documents: compatibility characters
# are folded with the case, and characters of no width separate words.
DIFFERENT = {True: {"ﬁne Ｆｕｌｌ wide"}, False: {"zero\u200bwidth\u00a0nbsp\u3000wide"}}


@pytest.fixture(scope="module")
def bert():
    return BertTokenizer(BERT_PIECES)


def test_bert_pieces(bert):
    assert bert.tokenize("The old clocks, Clöck hock!") == (
        ["the", "old", "clock", "##s", ",", "clock", "h", "##ock", "!"]
    )
    # Case folding, accents, control characters as spaces, Chinese characters as words.
    assert bert.tokenize("CAFÉ\x07ﬁt 中文") == (
        ["c", "##a", "##f", "##e", "f", "##i", "##t", "中", "文"]
    )
    # Too long and unreadable words are one unknown token each; special tokens are plain text.
    assert bert.tokenize("x" * 101 + " 😀 ok") == ["[UNK]", "[UNK]", "o", "##k"]
    assert bert.tokenize("[SEP]") == ["[", "s", "##e", "##p", "]"]


def test_bert_cased_keeps_case_and_accents():
    cased = BertTokenizer(BERT_PIECES, lowercase=False)
    assert cased.lowercase is False
    assert cased.tokenize("Clock clock café é cafe\u0301 OLD") == (
        ["Clock", "clock", "café", "é", "[UNK]", "[UNK]"]
    )
    # All Unicode spaces separate words, not only ASCII ones.
    assert cased.tokenize("the\u00a0old\u3000bird\u2009é") == (["the", "old"] + list("b") + [
        "##i", "##r", "##d", "é",
    ])  # fmt: skip


@needs_shared
def test_bert_ids_equal_the_tf_hub_preprocessing_module():
    folder = SHARED / "hub/tf2_bert_minilm_preprocess"
    tokenizer = BertTokenizer(folder / "assets/vocab.txt")
    module = tf.saved_model.load(str(folder))
    texts = wikisplit(2000) + SENTENCES + ODDITIES
    # Everything in the basic plane that is a letter, mark, sign or space of some kind.
    characters = [chr(c) for c in range(1, 0x10000, 7) if not 0xD800 <= c < 0xE000]
    texts += ["the" + "cat ".join(characters[i : i + 9]) for i in range(0, len(characters), 9)]
    expected = module(tf.constant(texts))["input_word_ids"].numpy()
    assert expected.shape[1] == 128
    for text, ids, row in zip(texts, tokenizer(texts).to_list(), expected, strict=True):
        assert ids[:126] == [i for i in row if i][1:-1], text


def test_special_tokens_of_other_names():
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    pieces = ["old", "<s>", "</s>", "<unk>", "<pad>", "Old", "[UNK]"]
    tokenizer = BertTokenizer(pieces, False, **names)
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_id == 2
    assert tokenizer.unk_token_id == 3
    assert tokenizer.pad_token_id == 4
    assert tokenizer.sep_token_id is None
    assert tokenizer("Old bird old").numpy().tolist() == [5, 3, 0]
    assert tokenizer.detokenize([1, 5, 0, 2, 4]).numpy() == b"Old old"
    # The padding between ragged rows is not id 0.
    assert decoded(tokenizer.detokenize([[5], [5, 0, 5]])) == ["Old", "Old old Old"]
    assert tokenizer.get_config()["eos_token"] == "</s>"


PROSE = [
    "don't say bob's wrong; i'd've known, they'll say we're done, and i'm sure you've 'em.",
    "'twas in the '90s, 'cause rock 'n' roll died.",
    "o'neill's l'amour and d'angelo's c'est la vie.",
    "it costs $1,000,000.50 (about 3.5%) at 10:30 p.m. in the u.s. market.",
    "in 1990, 12 people came. on january 4, 1998, none did: zero!",
    'he said "hello there," and "goodbye" twice; "why?" she asked.',
    "the players' union was 'bald', said the fans' club.",
    "it was 'the best' and 'the worst' of times.",
    "michael's 'thriller' video",
    "a singer-songwriter's state-of-the-art and/or 14-issue series, 1990-1995.",
    "wait... what?! no!! (really? [see note 3] {x}).",
    "e.g. j.r.r. tolkien wrote it. i read it. a friend too.",
    "#1 at www.amazon.com & version 1.2.3.4",
    "“curly” quotes don’t matter, ‘single’ ones too – or do they?",
    "„gänse“ und „enten” sind vögel.".replace("ä", "a").replace("ö", "o"),
    "¿que? no.",
    "中文 and 文",
    'he was 5 feet " tall',
]


@pytest.mark.parametrize("text", PROSE)
def test_prose_round_trip(bert, text):
    assert bert.detokenize(bert(text)).numpy().decode() == text


def test_prose_that_cannot_be_undone(bert):
    # Documented in `detokenize`.
    pairs = {
        "The  CAFÉ\nold": "the cafe old",
        "``quoted'' and ''also''": '"quoted" and "also"',
        "late - very late": "late-very late",
        "in 2001,300 people": "in 2001, 300 people",
        "rooms 1, 200 and 3. 5 each": "rooms 1,200 and 3.5 each",
    }
    assert decoded(bert.detokenize(bert(list(pairs)))) == list(pairs.values())


def test_bert_detokenize_composes_letters():
    # Lower-casing decomposes Hangul, so a lower-case vocabulary holds its parts.
    decomposed = "\u1112\u1161\u11ab"
    tokenizer = BertTokenizer([*BERT_PIECES, decomposed])
    assert tokenizer.detokenize(tokenizer("한")).numpy().decode() == "한"


WORD = st.sampled_from(["tower", "old", "café's".replace("é", "e"), "bird", "x2", "well-kept", "7"])

PHRASE = st.lists(WORD, min_size=1, max_size=4).map(" ".join)

PART = st.one_of(PHRASE, PHRASE.map('"{}"'.format), PHRASE.map("({})".format))

SENTENCE = st.lists(
    st.tuples(
        PART, st.sampled_from([" and ", ", but ", "; ", ": a ", "! the ", "? the ", ". the "])
    ),
    min_size=1,
    max_size=5,
).map(lambda parts: "".join(a + b for a, b in parts) + "end.")


@settings(max_examples=10, deadline=None)
@given(st.lists(SENTENCE, min_size=30, max_size=60))
def test_prose_round_trip_of_any_sentence(bert, texts):
    assert decoded(bert.detokenize(bert(texts))) == texts


def test_vocabulary_file_is_read_line_by_line(tmp_path):
    path = tmp_path / "vocab.txt"
    pieces = [*BERT_PIECES, "\u2028", "\x85"]  # line breaks to Python, not to the format
    path.write_bytes("\r\n".join(pieces).encode("utf-8"))
    assert BertTokenizer(str(path)).get_config()["vocabulary"] == pieces
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark
    assert BertTokenizer(str(path)).get_config()["vocabulary"] == pieces


def test_bert_subset(bert):
    small, kept = check_subset(bert, ["the old clocks don't hock"], ["clock", "the", "old d"])
    specials = {"[PAD]", "[MASK]", "[UNK]", "[SEP]", "[CLS]"}
    pieces = set(bert.tokenize("the old clocks don't hock")) | specials
    assert set(small.get_config()["vocabulary"]) == pieces
    assert len(kept) == len(pieces)
    cased = BertTokenizer(BERT_PIECES, lowercase=False)
    assert cased.subset(cased("Clock"))[0].tokenize("Clock clock") == ["Clock", "[UNK]"]


def test_bad_wordpiece_vocabularies(tmp_path):
    with pytest.raises(FileNotFoundError, match="`vocabulary` must be the path .*no_such.txt"):
        BertTokenizer(tmp_path / "no_such.txt")
    (tmp_path / "latin.txt").write_bytes("[PAD]\ncafé".encode("latin-1"))
    with pytest.raises(ValueError, match=r"UTF-8 text file: .*latin.txt"):
        BertTokenizer(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_bytes(b"\n")
    for empty in (tmp_path / "empty.txt", []):
        with pytest.raises(ValueError, match="one piece a line; received none"):
            BertTokenizer(empty)
    old, new = BERT_PIECES.index("the"), len(BERT_PIECES)
    with pytest.raises(ValueError, match=f"'the' has ids {old} and {new}"):
        BertTokenizer([*BERT_PIECES, "the"])
    with pytest.raises(ValueError, match=f"id {len(BERT_PIECES)} is blank"):
        BertTokenizer([*BERT_PIECES, "", "x1"])
    with pytest.raises(ValueError, match=r"not found: bos_token='\[CLS\]', eos_token='\[SEP\]'"):
        BertTokenizer(["[PAD]", "[UNK]", "a"])
    with pytest.raises(ValueError, match="four different pieces"):
        BertTokenizer(BERT_PIECES, bos_token="[SEP]")
    with pytest.raises(TypeError, match="list of str"):
        BertTokenizer([1, 2])
    with pytest.raises(TypeError, match="`lowercase` must be True or False; received 'yes'"):
        BertTokenizer(BERT_PIECES, "yes")


# HuggingFace's class


def build(case, **options) -> BertTokenizer:
    options = {**case["options"], **options}
    return BertTokenizer(case["pieces"], options.pop("do_lower_case"), **options)


def in_huggingface(case) -> BertTokenizer:
    return build(case, normalization="huggingface")


@pytest.mark.parametrize("case", EXPECTED["bert"], ids=["lower", "cased", "wmt"])
def test_answers_are_those_of_huggingface(case):
    tokenizer = build(case)
    check_answers(tokenizer, case["answers"], DIFFERENT[tokenizer.lowercase])
    check_answers(
        build(case, normalization="huggingface", split_special_tokens=True), case["answers"]
    )
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    plain = tokenizer.encode("the old clock")
    assert tokenizer.encode("the old clock", add_special_tokens=True) == [bos, *plain, eos]


@pytest.mark.parametrize("case", EXPECTED["bert_huggingface"], ids=["lower", "accents", "strip"])
def test_answers_in_huggingface_are_its_own(case):
    check_answers(in_huggingface(case), case["answers"])


def test_accents_stay_in_cased_vocabularies_only():
    lower, cased, wmt = map(build, EXPECTED["bert"])
    assert lower.encode("CRÈME Über") == lower.encode("creme uber")
    for tokenizer in (cased, wmt):
        ids = tokenizer.encode("è ü")
        assert tokenizer.unk_token_id not in ids and set(ids).isdisjoint(tokenizer.encode("e u"))
    assert (wmt.pad_token, wmt.eos_token, wmt.bos_token) == ("<pad>", "</s>", "<s>")
    assert wmt.all_special_ids == [2, 1, 3, 4, 0, 6]


@pytest.mark.slow
def test_answers_are_those_of_huggingface_itself():
    pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    from make_tokenizer_golden import TEXTS, WORD_PIECE_TEXTS, bert_answers

    texts = TEXTS + WORD_PIECE_TEXTS + SENTENCES
    for case in EXPECTED["bert_huggingface"]:
        answers = bert_answers(case["pieces"], texts, **case["options"])
        check_answers(in_huggingface(case), answers)
    for case in EXPECTED["bert"]:
        tokenizer = build(case)
        answers = bert_answers(case["pieces"], TEXTS, split_special_tokens=True, **case["options"])
        check_answers(tokenizer, answers, DIFFERENT[tokenizer.lowercase])


# A vocabulary of all that is assigned, but for the thousands of letters of the same kind.
ALPHABET = [
    c
    for c in map(chr, range(sys.maxunicode + 1))
    if unicodedata.category(c)[0] in "LMNPS"
    and (c in "中文한" or not re.match("CJK|HANGUL SYL|TANGUT|KHITAN|NUSHU|CUNEI|EGYPT|ANATO|BAMUM",
                                     unicodedata.name(c, "")))
]  # fmt: skip
ANY_TEXT = st.text(st.sampled_from([*ALPHABET, *" \u200b\u00ad\u3000\t"]), max_size=20)


@functools.cache
def everything(**options):
    """Ours and transformers' tokenizer with a piece for each character."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    pieces = [*BERT_PIECES[:6], *ALPHABET, *(f"##{c}" for c in ALPHABET)]
    theirs = transformers.BertTokenizer(vocab={p: i for i, p in enumerate(pieces)}, **options)
    options["lowercase"] = options.pop("do_lower_case")
    return BertTokenizer(pieces, normalization="huggingface", **options), theirs


@settings(max_examples=30, deadline=None)
@given(
    st.lists(ANY_TEXT, min_size=1, max_size=50),
    st.sampled_from(
        [
            {"do_lower_case": True},
            {"do_lower_case": False},
            {"do_lower_case": True, "strip_accents": False, "tokenize_chinese_chars": False},
        ]
    ),
)
def test_any_text_in_huggingface(texts, options):
    ours, theirs = everything(**options)
    assert ours(texts).to_list() == theirs(texts, add_special_tokens=False)["input_ids"]


def test_words_in_both_readings():
    words = "die straße ist groß strasse gross km² km2 donaudampf donau dampf ##1 κόσμος".split()
    pieces = [*BERT_PIECES, *(word for word in words if word not in BERT_PIECES)]
    theirs = BertTokenizer(pieces, normalization="huggingface", strip_accents=False)
    hub = BertTokenizer(pieces)
    for text, in_huggingface, in_hub in (
        ("Die Straße ist groß.", "die straße ist groß .", "die strasse ist gross ."),
        ("KM²", "km²", "km2"),
        ("Donau\x07Dampf", "donaudampf", "donau dampf"),
        ("die[SEP]straße", "die [SEP] straße", "die [ s ##e ##p ] strasse"),
        ("κόσμος", "κόσμος", "[UNK]"),
    ):
        assert " ".join(theirs.tokenize(text)) == in_huggingface
        assert " ".join(hub.tokenize(text)) == in_hub
    cased = {
        name: BertTokenizer(pieces, False, normalization=name) for name in ("tf_hub", "huggingface")
    }
    for tokenizer, expected in zip(
        cased.values(), (["donau", "dampf"], ["donaudampf"]), strict=True
    ):
        assert tokenizer.tokenize("donau\u00addampf") == expected
    # What is read can be shown again.
    assert decoded(theirs.detokenize(theirs(["Die Straße ist groß, KM²."]))) == (
        ["die straße ist groß, km²."]
    )


def test_long_words_are_counted_in_characters():
    pieces = [*BERT_PIECES, "ก", "##ก"]
    thai = {count: "ก" * count for count in (41, 100, 101)}
    hub, theirs = (BertTokenizer(pieces, normalization=name) for name in ("tf_hub", "huggingface"))
    unknown = [hub.unk_token_id]
    assert [hub.encode(text) == unknown for text in thai.values()] == [True, True, True]
    assert [theirs.encode(text) == unknown for text in thai.values()] == [False, False, True]
    short = BertTokenizer(pieces, normalization="huggingface", max_input_chars_per_word=3)
    assert short.tokenize("กกก กกกก the") == ["ก", "##ก", "##ก", "[UNK]", "the"]


def test_special_tokens_in_a_text():
    text = "the[SEP]  [MASK]old[PAD] [sep]"
    split = ["the", "[", "s", "##e", "##p", "]", "[", "m", "##a", "##s", "##k", "]", "old"]
    split += ["[", "p", "##a", "##d", "]", "[", "s", "##e", "##p", "]"]
    special = ["the", "[SEP]", "[MASK]", "old", "[PAD]", "[", "s", "##e", "##p", "]"]
    for options, expected in (
        ({}, split),
        ({"split_special_tokens": False}, special),
        ({"normalization": "huggingface"}, special),
        ({"normalization": "huggingface", "split_special_tokens": True}, split),
    ):
        tokenizer = BertTokenizer(BERT_PIECES, **options)
        assert tokenizer.tokenize(text) == expected
        assert tokenizer(["old", text, ""]).to_list() == [
            tokenizer.convert_tokens_to_ids(pieces) for pieces in (["old"], expected, [])
        ]


def test_added_tokens():
    pieces = [*BERT_PIECES, "<hl>", "[Q]", "<sp>", "clocks"]
    added = ["<hl>", "[Q]", {"content": "<sp>", "special": True}, {"content": "clocks"}]
    tokenizer = BertTokenizer(pieces, normalization="huggingface", added_tokens=added)
    # Those that are not special are looked for in the normalised text; none begins a word.
    assert tokenizer.tokenize("the<HL>old [q]<sp> Clocks [CLS] <SP>") == (
        ["the", "<hl>", "old", "[Q]", "<sp>", "clocks", "[CLS]", "[UNK]", "s", "##p", "[UNK]"]
    )
    ids = tokenizer.encode("the <hl> <sp> old")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the <hl> old"
    assert tokenizer.detokenize(ids).numpy() == b"the <hl> <sp> old"
    assert tokenizer.all_special_tokens[-1] == "<sp>"
    config = json.loads(json.dumps(tokenizer.get_config()))
    assert config["added_tokens"][2] == {
        **{"content": "<sp>", "special": True, "normalized": False},
        **{"lstrip": False, "rstrip": False},
    }
    again = BertTokenizer.from_config(config)
    assert again.encode("a<hl>[q]") == tokenizer.encode("a<hl>[q]")
    small, _ = tokenizer.subset([pieces.index("old")])
    assert small.tokenize("old<HL>the<sp>") == ["old", "<hl>", "[UNK]", "<sp>"]
    split = BertTokenizer.from_config({**config, "split_special_tokens": True})
    assert split.tokenize("<sp>[Q]") == ["[UNK]", "s", "##p", "[UNK]", "[Q]"]


def test_steps_of_a_normalizer():
    lower = [{"type": "NFC"}, {"type": "Lowercase"}]
    tokenizer = BertTokenizer(BERT_PIECES, normalization=lower, pre_tokenizer="WhitespaceSplit")
    assert tokenizer.tokenize("É é\u3000old,") == ["é", "é", "[UNK]"]
    cased = BertTokenizer(BERT_PIECES, False, normalization=[])
    assert cased.tokenize("Clock, clock e\u0301") == ["Clock", ",", "clock", "[UNK]"]
    for one in (tokenizer, cased):
        config = json.loads(json.dumps(one.get_config()))
        assert BertTokenizer.from_config(config).get_config() == config
    assert (tokenizer.normalization, cased.normalization) == (lower, [])


def test_configs_of_before_normalizations():
    """Presets without the new fields keep TF Hub's reading."""
    old = {"vocabulary": BERT_PIECES, "lowercase": True, "mask_token": "[MASK]"}
    tokenizer = BertTokenizer.from_config(old)
    assert (tokenizer.normalization, tokenizer.split_special_tokens) == ("tf_hub", True)
    assert tokenizer.tokenize("[SEP] ﬁt") == ["[", "s", "##e", "##p", "]", "f", "##i", "##t"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalization": "hub"}, "`normalization` must be 'tf_hub', 'huggingface' or a list"),
        ({"strip_accents": False}, "`strip_accents` needs normalization='huggingface'"),
        ({"pre_tokenizer": "Whitespace"}, "`pre_tokenizer` needs normalization='huggingface'"),
        ({"added_tokens": ["the"]}, "`added_tokens` needs normalization='huggingface'"),
        ({"pre_tokenizer": "Split"}, "`pre_tokenizer` must be one of BertPreTokenizer"),
        ({"max_input_chars_per_word": 0}, "`max_input_chars_per_word` must be .* at least 1"),
        ({"tokenize_chinese_chars": None}, "`tokenize_chinese_chars` must be True or False"),
        ({"split_special_tokens": 1}, "`split_special_tokens` must be True or False"),
        ({"normalization": []}, "`lowercase` must be False for these steps"),
        ({"normalization": [], "strip_accents": True}, "`strip_accents` needs normalization"),
        ({"normalization": [{"type": "Strip"}]}, 'received {"type": "Strip"}'),
        (
            {"normalization": "huggingface", "added_tokens": ["<no>"]},
            "`added_tokens` must be pieces of the vocabulary.* received '<no>'",
        ),
        (
            {
                "normalization": "huggingface",
                "added_tokens": [{"content": "the", "single_word": 1}],
            },
            "`added_tokens` may have .* received 'the' with single_word=1",
        ),
    ],
)
def test_options_that_do_not_belong_together(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        BertTokenizer(BERT_PIECES, **options)
