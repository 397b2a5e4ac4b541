"""Streaming: parts that never change, together what `generate` gives."""

import string
import time
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

import bertgen_tf as bg
from bertgen_tf.generation import streaming
from bertgen_tf.generation.compiled import MAX_FUNCTIONS, KeptFunctions, StreamStep
from bertgen_tf.generation.streaming import stream
from bertgen_tf.tokenizers import BertGenerationTokenizer, BertTokenizer, prose, text_stream
from bertgen_tf.tokenizers.preprocessing import Seq2SeqPreprocessor
from bertgen_tf.tokenizers.text_stream import TextStream
from tests.helpers import make_small_model
from tests.helpers.tokenizer_samples import (
    BERT_PIECES,
    SENTENCES,
    SHARED,
    needs_shared,
    train_sentencepiece,
)

# What the rules of prose look at, and pieces that no real vocabulary has.
RULE_WORDS = "s t re ve ll d m S Ll tis twas em cause 90s qu Qu is was as has this s's www com org"
ODD_PIECES = (
    ["''", '5"', '"x', "a b", " c", "e ", "\n", ". ", "##'", '##"', "## ", "##.", "[UNK]x", "x-"]
    + ["\u0301", "##\u0301", "##\u0323", "##\u0307", "e\u0323", "é", "Å", "n", "##n"]  # marks
    + ["\u1112", "##\u1161", "##\u11ab", "\u1161", "한", "하", "##\u11a8"]  # letters of Korean
    + ["\u09c7", "##\u09be", "\u0dd9", "##\u0dcf", "##\u0dca", "\u0344", "Ω", "\uf900"]
    + [
        "中",
        "文",
        "、",
        "。",
        "（",
        "）",
        "「",
        "」",
        "は",
        "«",
        "»",
        "£",
        "¡",
        "٣",
        "Ⅷ",
        "_",
        "\x00",
    ]
    + ["ſ", "K", "ı", "İ", "ß", "\U0001e900", "\U00016d67", "\U0003134a", "\U0010ffff", "\u2028"]
)
PIECES = list(dict.fromkeys([*BERT_PIECES, *RULE_WORDS.split(), *ODD_PIECES]))
OPENING_AND_CLOSING = ['"', "'", "`", "“", "”", "„", "‘", "’", "«", "»"]


@pytest.fixture(scope="module")
def bert():
    return BertTokenizer(PIECES, lowercase=False)


@pytest.fixture(scope="module")
def spiece_with_bytes():
    return train_sentencepiece(byte_fallback=True, vocab_size=340)


def check_prefixes(preprocessor, ids, cuts=None):
    """Feeds ids one by one, or in parts that end at `cuts`.

    What was given out must begin the text of what came until now, and of all prefixes after.
    """
    ends = sorted({*(cuts if cuts is not None else range(1, len(ids))), len(ids)})
    rows = tf.ragged.constant([ids[:end] for end in ends], tf.int32, ragged_rank=1)
    eos = preprocessor.tokenizer.eos_token_id
    texts = preprocessor.generate_postprocess(rows.to_tensor(eos)).numpy()
    stream_of_text = TextStream(preprocessor)
    given_out, known, held = "", 0, []
    for end, text in zip(ends, texts, strict=True):
        given_out += stream_of_text.add(ids[known:end])
        known = end
        assert text.decode().startswith(given_out), (text.decode(), given_out)
        held.append(text.decode()[len(given_out) :])
    given_out += stream_of_text.finish()
    assert given_out == texts[-1].decode()
    return held


def ids_of(pieces):
    """Sequences of piece numbers: of any, and of those that the rules meet most."""
    often = [".", ",", "'", '"', "-", "s", "a", "1", "100", "##s", "the", "the"]
    often = [pieces.index(piece) for piece in often if piece in pieces]
    marks = [pieces.index(piece) for piece in OPENING_AND_CLOSING if piece in pieces]
    return st.lists(
        st.one_of(
            st.integers(-1, len(pieces)), st.sampled_from(often), st.sampled_from(marks or often)
        ),
        min_size=1,
        max_size=30,
    )


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(st.data())
def test_prose_of_any_pieces(bert, data):
    ids = data.draw(ids_of(PIECES))
    cuts = data.draw(st.none() | st.sets(st.integers(1, len(ids)), min_size=1))
    check_prefixes(Seq2SeqPreprocessor(bert), ids, cuts)


# Every rule again and again: sequences of what a rule is made of.
RULE_PIECES = [
    ["' s a ' the ’ players t ' ' \" ‘ s' em".split(), 9],
    ["\" \" ' ' ` ` x s was is the s . ' „ “ ” ‘ ’ « »".split(), 12],
    ["1 , 0 0 0 . 3 5 : 1 0 – / - $ # £ x ##0 ##0 ##0".split(), 12],
    ["u . s . a . r . j . www . com".split(), 12],
    ["www . com org e . g . the ? ! … ) ] } ( [ { ¿".split(), 12],
    ["中 、 文 。 （ は ） the \u1112 ##\u1161 ##\u11ab e ##\u0301 ##\u0323 하".split(), 10],
    ["o ' n ' rock ’ d qu l ' ( [ \" c ' e 90s tis twas cause".split(), 10],
]


@pytest.mark.parametrize("sample, length", RULE_PIECES)
def test_prose_of_what_rules_are_made_of(sample, length):
    """Pieces of rules in any order: many more near misses than any pieces give."""
    pieces = list(dict.fromkeys([*BERT_PIECES, *sample]))
    preprocessor = Seq2SeqPreprocessor(BertTokenizer(pieces, lowercase=False))
    rng = np.random.default_rng(5)
    for _ in range(40):
        chosen = rng.choice(sample, rng.integers(2, 3 * length))
        check_prefixes(preprocessor, [pieces.index(piece) for piece in chosen])


PROSE = [
    *SENTENCES,
    "the man went to the old house, but nobody was there; it had been sold (for $1,000,000).",
    "e.g. j.r.r. tolkien wrote it. i read it at 10:30 p.m. on www.amazon.com, a friend too.",
    "michael's players' union isn't o'neill's state-of-the-art and/or 14-issue series, 1990-1995.",
    "wait... what?! no!! (really? [see note 3] {x}).",
    "中文 and 文, in 1990, 12 people came.",
]


@needs_shared
def test_a_word_or_two_are_held_back_in_ordinary_prose():
    tokenizer = BertTokenizer(SHARED / "hub/tf2_bert_minilm_preprocess/assets/vocab.txt")
    preprocessor = Seq2SeqPreprocessor(tokenizer)
    lags = []
    for text in PROSE:
        held = check_prefixes(preprocessor, tokenizer(text).numpy().tolist())
        lags += [len(part.split()) for part in held]
    assert max(lags) <= 2
    assert np.mean(lags) < 0.75
    quotation = 'he said "i saw the old clock in the tower" and left.'
    held = check_prefixes(preprocessor, tokenizer(quotation).numpy().tolist())
    # All between the marks waits, then it is as before.
    assert [len(part.split()) for part in held] == [0, 0, 0, *range(1, 9), 0, 0, 0, 1]


def test_parts_of_prose():
    preprocessor = Seq2SeqPreprocessor(BertTokenizer(BERT_PIECES))

    def parts(text):
        stream_of_text = TextStream(preprocessor)
        found = [stream_of_text.add([BERT_PIECES.index(piece)]) for piece in text.split(" ")]
        return [*found, stream_of_text.finish()]

    assert parts("the old clock ##er , the tower") == (
        ["the", " old", " clock", "er", ",", " the", " tower", ""]
    )
    assert parts('the " old clock " hold x') == (
        ["the", ' "', "", "", 'old clock"', " hold", " x", ""]
    )
    # No partner comes: there is a space on both sides after all.
    assert parts('the " old clock') == ["the", ' "', "", "", " old clock"]
    assert parts("the 1 , 0 ##0 ##0 the") == ["the", " 1", "", "", "", "", ",000 the", ""]


@pytest.mark.parametrize("mark, shown", [("'", "tower"), ('"', 'tower "')])
def test_an_open_quotation_takes_no_long_time(mark, shown):
    """It is searched again from its beginning with every token."""
    stream_of_text = TextStream(Seq2SeqPreprocessor(BertTokenizer(BERT_PIECES)))
    ids = [BERT_PIECES.index(piece) for piece in ("tower", mark)]
    assert stream_of_text.add(ids) == shown
    start = time.process_time()
    assert [stream_of_text.add(ids[:1]) for _ in range(512)] == [""] * 512
    assert time.process_time() - start < 5  # 0.2 seconds; backtracking would never end
    assert shown + stream_of_text.finish() == f"tower {mark}" + " tower" * 512


def test_what_is_not_shown():
    bert = BertTokenizer(BERT_PIECES)
    the, old, unknown = (BERT_PIECES.index(piece) for piece in ("the", "old", "[UNK]"))
    ids = [
        bert.bos_token_id,
        bert.mask_token_id,
        the,
        unknown,
        bert.pad_token_id,
        len(BERT_PIECES),
        -1,
    ]
    ids += [old, bert.eos_token_id, the, the]
    for options in (
        {},
        {"hidden_token_ids": [unknown]},
        {"prose": False},
        {"prose": False, "hidden_token_ids": [unknown, old]},
    ):
        held = check_prefixes(Seq2SeqPreprocessor(bert, **options), ids)
        assert held[-1] == ""
    plain = TextStream(Seq2SeqPreprocessor(bert, prose=False, hidden_token_ids=[unknown]))
    assert [plain.add(ids), plain.add([the]), plain.finish()] == ["[MASK] the old", "", ""]
    nothing = TextStream(Seq2SeqPreprocessor(bert, hidden_token_ids=[unknown]))
    assert [nothing.add([]), nothing.add([unknown]), nothing.finish()] == ["", "", ""]


@settings(max_examples=50, deadline=None)
@given(ids_of(PIECES))
def test_any_pieces_without_prose(bert, ids):
    held = check_prefixes(Seq2SeqPreprocessor(bert, prose=False, hidden_token_ids=[7, 9]), ids)
    assert not any(held)


# SentencePiece


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model_type": "bpe"},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": False},
        {"treat_whitespace_as_suffix": True},
        {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "unk_surface": " ▁?"},
    ],
    ids=str,
)
def test_sentencepiece_of_any_pieces(options):
    tokenizer = BertGenerationTokenizer(
        train_sentencepiece(byte_fallback=True, vocab_size=340, **options)
    )
    preprocessor = Seq2SeqPreprocessor(tokenizer, hidden_token_ids=[tokenizer.sep_token_id])
    bytes_of = dict(
        enumerate(tokenizer.convert_tokens_to_ids([f"<0x{i:02X}>" for i in range(256)]))
    )
    assert tokenizer.unk_token_id not in bytes_of.values()
    rng = np.random.default_rng(4)
    characters = [*"aé中😀\u2581\ufffd", "\u0301", " "]
    for _ in range(25):
        ids = []
        while len(ids) < 25:
            kind = rng.integers(6)
            if kind == 0:
                ids.append(int(rng.integers(-1, tokenizer.vocab_size + 2)))
            elif kind == 1:  # any bytes
                ids += [bytes_of[int(i)] for i in rng.integers(256, size=rng.integers(1, 4))]
            elif kind in (2, 3):  # characters, some without their last bytes
                code = str(rng.choice(characters)).encode()
                ids += [bytes_of[i] for i in code[: rng.integers(1, len(code) + 1)]]
            elif kind == 4:
                ids += tokenizer(str(rng.choice(SENTENCES))[:8]).numpy().tolist()
            else:
                ids.append(tokenizer.pad_token_id)
        check_prefixes(preprocessor, ids)


def test_characters_of_bytes_come_whole(spiece_with_bytes):
    tokenizer = BertGenerationTokenizer(spiece_with_bytes)

    def parts(content):
        stream_of_text = TextStream(Seq2SeqPreprocessor(tokenizer))
        ids = tokenizer.convert_tokens_to_ids([f"<0x{i:02X}>" for i in content])
        found = [stream_of_text.add([i]) for i in ids]
        return [*found, stream_of_text.add(tokenizer("old").numpy().tolist())]

    assert parts("é中😀".encode()) == ["", "é", "", "", "中", "", "", "", "😀", " old"]
    assert parts(b"a\xe4\xb8") == ["a", "", "", "\ufffd\ufffd old"]
    assert parts(b"\xff\xc3\xa9") == ["", "", "", "\ufffdé old"]


def test_ordinary_pieces_of_sentencepiece_are_given_at_once(spiece):
    tokenizer = BertGenerationTokenizer(spiece)
    ids = tokenizer("the old man saw a house, and the bird sang.").numpy().tolist()
    assert not any(check_prefixes(Seq2SeqPreprocessor(tokenizer), ids))


def test_denormalised_text_is_given_at_the_end(spiece):
    model = sentencepiece_model_pb2.ModelProto.FromString(spiece)
    charsmap = model.normalizer_spec.precompiled_charsmap
    assert charsmap
    model.denormalizer_spec.precompiled_charsmap = charsmap
    tokenizer = BertGenerationTokenizer(model.SerializeToString())
    ids = tokenizer("the old man").numpy().tolist()
    stream_of_text = TextStream(Seq2SeqPreprocessor(tokenizer))
    assert stream_of_text.add(ids) == ""
    assert stream_of_text.finish() == tokenizer.detokenize(ids).numpy().decode() != ""


# The reading of the rules


def test_all_that_composes_with_what_is_before_is_known():
    """Against Unicode's data, of the version that this Python has."""
    for i in range(0x110000):
        parts = unicodedata.decomposition(chr(i)).split()
        if len(parts) == 2 and "<" not in parts[0]:
            second = chr(int(parts[1], 16))
            assert text_stream._may_join(second), f"U+{i:04X}"
        if unicodedata.combining(chr(i)):
            assert text_stream._may_join(chr(i)), f"U+{i:04X}"
    assert not any(text_stream._may_join(character) for character in string.printable + "中가é")


@pytest.mark.parametrize(
    "pattern", [r"a(?=b)", r"\Bx", r"(?s)a.b", r"\Aa", r"(?P<name>a)", r"\pL\z"]
)
def test_rules_in_syntax_that_is_not_known(monkeypatch, pattern):
    monkeypatch.setattr(text_stream, "RULES", ((pattern, ""),))
    with pytest.raises(ValueError, match="Rules of prose may use only the syntax"):
        text_stream._growing_rules.__wrapped__("abx")


def test_python_matches_what_re2_matches():
    """Rules in Python's expressions, on the texts that they see: the same as the graph's."""
    alphabet = "".join(sorted({*"".join(PIECES), *string.printable}))
    rules = text_stream._growing_rules(alphabet)
    rng = np.random.default_rng(3)
    texts = [
        " " + " ".join(rng.choice(np.array(PIECES, object), rng.integers(1, 25)))
        for _ in range(1500)
    ]
    texts += [
        " " + " ".join(rng.choice(sample, 20)) for sample, _ in RULE_PIECES for _ in range(99)
    ]
    seen = set()
    for rule, (pattern, rewrite) in zip(rules, prose.RULES, strict=True):
        expected = tf.strings.regex_replace(texts, pattern, rewrite).numpy()
        expected = [text.decode() for text in expected]
        assert [rule.match.sub(rewrite, text) for text in texts] == expected, pattern
        # The texts have what the rule is for, and some have it twice.
        assert expected != texts or pattern in seen, pattern
        seen.add(pattern)
        texts = expected


# Models


# Keywords of stream and generate, and of stream alone: every pair of choices once.
OPTIONS = [
    ({"jit_compile": True, "max_new_tokens": 15}, {"tokens_per_step": 1}),
    (
        {"jit_compile": True, "max_length": 15, "do_sample": True, "seed": 5, "top_k": 20},
        {"tokens_per_step": 3},
    ),
    (
        {"jit_compile": False, "max_length": 14, "repetition_penalty": 1.3},
        {"tokens_per_step": 3},
    ),
    (
        {"jit_compile": False, "max_new_tokens": 13, "do_sample": True, "seed": 6, "top_k": 0},
        {"tokens_per_step": 1},
    ),
]
TEXTS = ["the man saw a bird, who sang.", ""]


def check_stream(model, text, of_both, of_stream):
    expected = model.generate(text, **{**of_both, "jit_compile": False})
    parts = list(model.stream(text, **of_both, **of_stream))
    assert "".join(parts) == expected
    assert all(isinstance(part, str) and part for part in parts)
    return parts


@pytest.mark.slow
@pytest.mark.parametrize("options, of_stream", OPTIONS)
def test_parts_make_what_generate_gives(options, of_stream):
    model = make_small_model()
    counts = [len(check_stream(model, text, options, of_stream)) for text in TEXTS]
    assert max(counts) > 2
    if options.get("do_sample"):  # Every length of prompt compiles anew: once in each form.
        prompt = {"decoder_text": "the old bird's"}
        parts = check_stream(model, TEXTS[0], {**options, **prompt}, of_stream)
        assert parts[0].startswith("the old bird")


@pytest.mark.slow
def test_compiled_parts_make_what_the_compiled_search_gives(model):
    """Of stacks of different depth, whose caches differ."""
    options = {"max_new_tokens": 15, "suppress_tokens": tuple(range(13)), "jit_compile": True}
    text = model.generate(TEXTS[0], **options)
    assert "".join(model.stream(TEXTS[0], tokens_per_step=4, **options)) == text != ""


@pytest.mark.slow
def test_parts_of_sentencepiece_with_bytes(spiece_with_bytes):
    model = make_small_model(make_tokenizer=lambda: BertGenerationTokenizer(spiece_with_bytes))
    options, of_stream = OPTIONS[-1]
    for seed in range(4):
        options = {**options, "seed": seed}
        check_stream(model, TEXTS[0], options, of_stream)
        check_stream(model, TEXTS[1], {**options, "decoder_text": "the old 😀"}, of_stream)


@pytest.mark.slow
def test_ends():
    """The end tokens of the settings, hidden tokens, and a target's mask token."""
    model = make_small_model(hidden_token_ids=[30, 31, 32], mask_first=True, prose=False)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 20, "jit_compile": False}
    options["eos_token_id"] = (4, 9, 12, 40, 41)
    for seed in range(6):
        check_stream(model, TEXTS[0], {**options, "seed": seed}, {"tokens_per_step": 2})


def test_own_logits_processors():
    model = make_small_model()

    def only_birds(logits, ids, step):
        return logits + 1e6 * tf.one_hot(model.tokenizer.get_vocab()["bird"], logits.shape[-1])

    options = {"logits_processor": [only_birds], "max_new_tokens": 3, "jit_compile": False}
    assert list(stream(model, "the man", **options)) == ["bird", " bird", " bird"]


class Search:
    """In place of compiled functions: gives the ids of a text, and notes what it is asked for."""

    def __init__(self, model, text):
        self.ids = [model.tokenizer.bos_token_id, *model.tokenizer(text).numpy().tolist()]
        self.ids.append(model.tokenizer.eos_token_id)
        self.built, self.seeds, self.steps = [], [], 0

    def build(self, model, config, jit_compile, *, logits_processor, tokens_per_step):
        self.built.append((config, jit_compile, logits_processor, tokens_per_step))

        def start(input_ids, attention_mask, decoder_input_ids, seeds):
            self.seeds.append(seeds.tolist())
            return 1

        def advance(length):
            self.steps += 1
            length = min(length + tokens_per_step, len(self.ids))
            ids = np.zeros([1, 1, 50], np.int32)
            ids[0, 0, :length] = self.ids[:length]
            done = length == len(self.ids)
            return StreamStep(length, tf.constant(ids), tf.constant(length), tf.constant(done))

        return start, advance


@pytest.fixture
def search(model, monkeypatch):
    search = Search(model, "the old man saw a house, and who sang?")
    monkeypatch.setattr(streaming, "streaming_functions", search.build)
    monkeypatch.setattr(model, "kept_functions", KeptFunctions())
    return search


def test_steps_run_when_they_are_asked_for(model, search):
    parts = stream(model, "the man")
    assert search.steps == 0
    assert [next(parts), search.steps] == ["the", 1]
    assert [next(parts), search.steps] == [" old", 2]
    parts.close()
    with pytest.raises(StopIteration):
        next(parts)
    assert search.steps == 2
    assert list(stream(model, "the man", tokens_per_step=3)) == (
        ["the old man", " saw a house", ", and who", " sang?"]
    )


def test_functions_are_kept_for_all_seeds(model, search):
    sampling = {"do_sample": True, "max_new_tokens": 12}
    for seed in (1, 2, None, None):
        assert "".join(stream(model, "the man", seed=seed, **sampling))[:7] == "the old"
    assert len(search.built) == 1
    assert search.seeds[:2] == [[[1, 0]], [[2, 0]]]
    assert search.seeds[2] != search.seeds[3]  # None: others at every call
    config, *others = search.built[0]
    assert (config.do_sample, config.seed, others) == (True, None, [True, (), 1])
    stream(model, "the man", seed=1, tokens_per_step=2, **sampling)
    stream(model, "the man", seed=1, jit_compile=False, **sampling)
    stream(model, "the man", seed=1, logits_processor=[np.add], **sampling)
    assert [others for _, *others in search.built[1:]] == (
        [[True, (), 2], [False, (), 1], [True, (np.add,), 1]]
    )
    for length in range(2, 22):
        stream(model, "the man", max_new_tokens=length)
        stream(model, "the man", seed=1, **sampling)  # used again and again, and so not dropped
    assert len(search.built) == 24
    assert len(model.kept_functions) == MAX_FUNCTIONS


def test_settings(model, search):
    stream(model, "the man")
    stream(model, "the man", bg.GenerationConfig(max_new_tokens=6))
    stream(model, "the man", bg.GenerationConfig(max_new_tokens=6), max_length=7)
    assert [config for config, *_ in search.built] == [
        model.generation_config,
        bg.GenerationConfig(max_new_tokens=6),
        bg.GenerationConfig(max_length=7),
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"text": ["a"]}, TypeError, "text must be one string, received list"),
        ({"text": None}, TypeError, "text must be one string, received NoneType"),
        ({"decoder_text": ["a"]}, TypeError, "decoder_text must be one string, received list"),
        ({"num_beams": 2}, ValueError, "Streaming needs greedy search or sampling.*num_beams=2"),
        ({"beam_scorer": "gnmt"}, ValueError, "Streaming needs greedy search.*'gnmt'"),
        (
            {"do_sample": True, "num_return_sequences": 2},
            ValueError,
            "num_return_sequences must be 1 for streaming.*received 2",
        ),
        ({"tokens_per_step": 0}, ValueError, "tokens_per_step must be an integer of at least 1"),
        ({"tokens_per_step": True}, ValueError, "tokens_per_step must be .* received True"),
        ({"tokens_per_step": [1]}, ValueError, r"tokens_per_step must be .* received \[1\]"),
        ({"max_new_tokens": 23}, ValueError, "max_new_tokens must not exceed"),
        (
            {"max_new_tokens": 20, "decoder_text": "the old old bird"},
            ValueError,
            "max_new_tokens must not exceed .* further 4 tokens",
        ),
        ({"max_tokens": 3}, ValueError, "GenerationConfig has no field max_tokens"),
        ({"logits_processor": [3]}, TypeError, "logits_processor must be a list of functions"),
    ],
)
def test_errors_come_at_the_call(model, arguments, error, message):
    with pytest.raises(error, match=message):
        stream(model, **{"text": "the man", **arguments})


def test_streaming_needs_a_tokenizer():
    with pytest.raises(ValueError, match="Streaming needs a tokenizer"):
        stream(SimpleNamespace(preprocessor=None), "the man")
