import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import sentencepiece
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from bertgen_tf.tokenizers import BertGenerationTokenizer, BertTokenizer

SHARED = Path(__file__).resolve().parent.parent / ".." / "shared"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs the folder `shared` beside the repository"
)

SENTENCES = [
    "the old clock in the tower struck twelve, and nobody heard it.",
    "clocks and towers are older than the people who hear them strike.",
    "she wrote three letters; he answered none of them (as always).",
    "winter came early: the lake froze, the boats were stored, the birds left.",
    "a singer-songwriter from leeds wrote about boats and lakes.",
    "it's the baker's dozen! isn't it? thirteen, of course.",
]
ODDITIES = [
    "",
    " ",
    "Ünïcödé naïve CAFÉ ﬁn",
    "中文 and 日本語",
    "tab\tnew\nline\r\x00nul\x07bell",
    "emoji 😀👨‍👩‍👧 end",
    "zero\u200bwidth\u00a0nbsp\u3000wide\u2028line",
    "x" * 150,
    "<s> </s> <pad> [SEP] [CLS] <::::> ##x",
]

WORDS = "the old clock tower struck café Clock é hold bird s don t".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
PUNCTUATION = list(".,;:!?()[]{}'\"`-/%$#&_–—“”‘’„¿…")
BERT_PIECES = (
    ["[PAD]", "[unused0]", "[MASK]", "[UNK]", "[SEP]", "[CLS]"]
    + PUNCTUATION
    + list(LETTERS)
    + [f"##{letter}" for letter in LETTERS]
    + WORDS[:9]
    + ["##s", "##ock", "##er"][1:]
    + ["中", "文"]
)


@pytest.fixture(scope="module")
def bert():
    return BertTokenizer(BERT_PIECES)


def train_sentencepiece(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_writer=model,
        # In no usual order, so that a guessed id shows.
        **{
            "vocab_size": 85,
            "pad_id": 4,
            "eos_id": 0,
            "bos_id": 3,
            "unk_id": 2,
            "pad_piece": "<pad>",
            "user_defined_symbols": ["<::::>"],
            "minloglevel": 2,
            "num_threads": 1,
            **options,
        },
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def unigram_proto():
    return train_sentencepiece()


@pytest.fixture(scope="module")
def unigram(unigram_proto):
    return BertGenerationTokenizer(unigram_proto)


@pytest.fixture(params=["bert", "unigram"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def wikisplit(count: int) -> list[str]:
    lines = (SHARED / "data/wikisplit/validation.tsv").read_text("utf-8").split("\n")
    return [line.split("\t")[0] for line in lines[:count]]


def decoded(tensor) -> list[str]:
    return [item.decode("utf-8") for item in tensor.numpy()]


# Ids


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


def test_sentencepiece_ids_equal_the_package(unigram, unigram_proto):
    package = sentencepiece.SentencePieceProcessor(model_proto=unigram_proto)
    texts = SENTENCES + ODDITIES + ["a <::::> b", "unknown Ω and ☃"]
    assert unigram(texts).to_list() == package.encode(texts)
    assert unigram.tokenize("the boats\nλ") == [
        package.id_to_piece(i) for i in package.encode("the boats\nλ")
    ]
    rows = package.encode(SENTENCES)
    assert decoded(unigram.detokenize(tf.ragged.constant(rows))) == package.decode(rows)


@needs_shared
def test_sentencepiece_ids_equal_the_package_on_wikisplit():
    path = SHARED / "hub/spiece_1000.model"
    tokenizer = BertGenerationTokenizer(path)
    package = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = wikisplit(2000)
    rows = package.encode(texts)
    assert tokenizer(texts).to_list() == rows
    assert decoded(tokenizer.detokenize(tokenizer(texts))) == package.decode(rows)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert (tokenizer.unk_token_id, tokenizer.sep_token_id, tokenizer.vocab_size) == (3, 4, 1000)


def test_special_ids_are_read_from_the_vocabulary(bert, unigram):
    assert bert.pad_token_id == 0
    assert bert.unk_token_id == 3
    assert bert.eos_token_id == bert.sep_token_id == 4
    assert bert.bos_token_id == 5
    assert bert.vocab_size == len(BERT_PIECES)
    assert (unigram.eos_token_id, unigram.sep_token_id, unigram.unk_token_id) == (0, 1, 2)
    assert (unigram.bos_token_id, unigram.pad_token_id, unigram.vocab_size) == (3, 4, 85)
    assert (
        BertGenerationTokenizer(train_sentencepiece(user_defined_symbols=[])).sep_token_id is None
    )


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


def test_convert_tokens_to_ids(tokenizer):
    pieces = tokenizer.tokenize("the clock")
    assert tokenizer.convert_tokens_to_ids(pieces) == tokenizer("the clock").numpy().tolist()
    assert tokenizer.convert_tokens_to_ids(pieces[0]) == int(tokenizer("the clock")[0])
    assert tokenizer.convert_tokens_to_ids(["no such"]) == [tokenizer.unk_token_id]
    assert tokenizer.convert_tokens_to_ids([]) == []


# Shapes and types


def test_scalars_and_vectors(tokenizer):
    one = tokenizer("the old clock")
    assert isinstance(one, tf.Tensor) and one.dtype == tf.int32 and one.shape.rank == 1
    texts = ["the old clock", "", "clock"]
    for batch in (
        texts,
        tuple(texts),
        np.array(texts),
        np.array(texts, object),
        tf.constant(texts),
    ):
        rows = tokenizer(batch)
        assert isinstance(rows, tf.RaggedTensor)
        assert rows.dtype == tf.int32 and rows.shape.as_list() == [3, None]
        assert rows[0].numpy().tolist() == one.numpy().tolist()
        assert rows[1].shape == [0]
    assert tokenizer(np.str_("the old clock")).numpy().tolist() == one.numpy().tolist()
    assert tokenizer("").shape == [0]
    assert tokenizer([]).shape.as_list() == [0, None]


def test_in_graphs(tokenizer):
    expected = tokenizer(SENTENCES).to_list()
    dataset = tf.data.Dataset.from_tensor_slices(SENTENCES)
    single = [row.tolist() for row in dataset.map(tokenizer).as_numpy_iterator()]
    assert single == expected
    batched = [ids.to_list() for ids in dataset.batch(4).map(tokenizer)]
    assert batched == [expected[:4], expected[4:]]

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def round_trip(text):
        ids = tokenizer(text)
        assert ids.shape.as_list() == [None, None]
        return ids, tokenizer.detokenize(ids), tokenizer.detokenize(ids.to_tensor())

    ids, text, again = round_trip(SENTENCES)
    assert ids.to_list() == expected
    assert text.dtype == tf.string and decoded(text) == decoded(tokenizer.detokenize(ids))
    assert text.shape == [len(SENTENCES)] and again.shape == text.shape
    assert round_trip(tf.constant([], tf.string))[1].shape == [0]


def test_wrong_inputs(tokenizer):
    with pytest.raises(TypeError, match="must hold strings; received dtype int32"):
        tokenizer([3, 4])
    with pytest.raises(ValueError, match=r"vector of strings .* received shape \(1, 2\)"):
        tokenizer([["a", "b"]])
    with pytest.raises(TypeError, match="`ids` must be integers; received dtype float32"):
        tokenizer.detokenize([1.5])
    with pytest.raises(ValueError, match=r"`ids` must have shape .* received shape \(1, 1, 1\)"):
        tokenizer.detokenize(np.ones([1, 1, 1], int))
    with pytest.raises(TypeError, match="must be one str; received list"):
        tokenizer.tokenize(["a"])


# Any input is answered


@settings(max_examples=15, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=40), st.text(max_size=40)), min_size=1, max_size=20))
def test_any_bytes(bert, unigram, texts):
    texts = [text.encode("utf-8") if isinstance(text, str) else text for text in texts]
    for tokenizer in (bert, unigram):
        ids = tokenizer(texts)
        assert ids.nrows() == len(texts)
        flat = ids.flat_values.numpy()
        assert ((flat >= 0) & (flat < tokenizer.vocab_size)).all()
        decoded(tokenizer.detokenize(ids))


def test_invalid_utf8_is_replaced(unigram):
    cased = BertTokenizer([*BERT_PIECES, "\ufffd", "##\ufffd"], lowercase=False)
    broken = [b"the \xff\xfe old \xc3", b"b\xed\xa0\x80", b"\xe4\xb8 the", b"\xf0\x9f\x98"]
    repaired = [text.decode("utf-8", errors="replace") for text in broken]
    assert cased.tokenize(repaired[0]) == ["the", "\ufffd", "##\ufffd", "old", "\ufffd"]
    for tokenizer in (cased, unigram):
        assert tokenizer(broken).to_list() == tokenizer(repaired).to_list()


@pytest.mark.parametrize(
    "unit", ["a", "a ", ".", "' \"", "é", "😀", "\u0301", "x-", "1 , ", "\x00"]
)
def test_long_strings(bert, unigram, unit):
    text = unit * (100_000 // len(unit.encode("utf-8")))
    for tokenizer in (bert, unigram):
        ids = tokenizer([text, "the"])
        assert ids[1].shape[0] >= 1
        decoded(tokenizer.detokenize(ids))


# Detokenisation


def test_detokenize_drops_special_tokens_and_what_follows_eos(tokenizer):
    words = tokenizer("the old clock").numpy().tolist()
    pad, bos, eos = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    text = "the old clock"
    assert tokenizer.detokenize(words).numpy().decode() == text
    rows = [
        words,
        [bos, *words],
        [bos, *words, eos],
        [*words, eos, *words, eos],
        [*words, pad, pad, pad],
        [pad, *words[:1], bos, *words[1:], eos, pad],
        [-1, *words, tokenizer.vocab_size, 2**31 - 1],
    ]
    assert decoded(tokenizer.detokenize(tf.ragged.constant(rows))) == [text] * len(rows)
    dense = tf.ragged.constant(rows).to_tensor(pad)
    assert decoded(tokenizer.detokenize(dense)) == [text] * len(rows)
    assert decoded(tokenizer.detokenize(dense.numpy().tolist())) == [text] * len(rows)
    # int64 ids that a cast to int32 would wrap around to a valid one.
    assert tokenizer.detokenize(np.array([*words, 2**32 + words[0]])).numpy().decode() == text
    assert decoded(tokenizer.detokenize([[eos, *words], [bos, eos, *words]])) == ["", ""]
    assert tokenizer.detokenize([]).numpy() == b""
    assert decoded(tokenizer.detokenize([[], []])) == ["", ""]
    assert decoded(tokenizer.detokenize([words[:1], [], words])) == [
        tokenizer.detokenize(words[:1]).numpy().decode(),
        "",
        text,
    ]
    assert tokenizer.detokenize(np.zeros([0, 3], np.int32)).shape == [0]
    assert decoded(tokenizer.detokenize(np.zeros([2, 0], np.int32))) == ["", ""]


def test_unknown_stays_visible_and_mask_does_not(bert, unigram):
    ids = bert.convert_tokens_to_ids(["the", "[UNK]", "[MASK]", "##s"])
    assert bert.detokenize(ids).numpy() == b"the [UNK]s"
    assert "⁇" in unigram.detokenize([unigram.unk_token_id]).numpy().decode()
    sep = unigram("a <::::> b")
    assert unigram.sep_token_id in sep.numpy()
    assert unigram.detokenize(sep).numpy() == b"a <::::> b"


def test_byte_pieces_give_valid_utf8():
    tokenizer = BertGenerationTokenizer(
        train_sentencepiece(byte_fallback=True, vocab_size=330, hard_vocab_limit=False)
    )
    ids = tokenizer("☃")
    assert tokenizer.detokenize(ids).numpy().decode() == "☃"
    assert "\ufffd" in tokenizer.detokenize(ids[:-1]).numpy().decode("utf-8")


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


# Saving


def test_config_and_vocabulary_round_trip(tokenizer, tmp_path):
    config = json.loads(json.dumps(tokenizer.get_config()))
    path = tokenizer.save_vocabulary(tmp_path / "new" / "folder")
    name = {"BertTokenizer": "vocab.txt", "BertGenerationTokenizer": "spiece.model"}
    assert Path(path) == tmp_path / "new/folder" / name[type(tokenizer).__name__]
    texts = SENTENCES + ODDITIES
    field = next(iter(config))  # a preset keeps the vocabulary in a file of its own
    others = [type(tokenizer).from_config(config), type(tokenizer)(path)]
    for other in [*others, type(tokenizer).from_config({**config, field: path})]:
        assert other(texts).to_list() == tokenizer(texts).to_list()
        assert other.get_config() == tokenizer.get_config()


def test_config_keeps_options(unigram_proto):
    cased = BertTokenizer(BERT_PIECES, lowercase=False, mask_token="[unused0]")
    other = BertTokenizer.from_config(cased.get_config())
    assert other.lowercase is False
    assert other.detokenize([1, 2]).numpy() == b"[MASK]"
    swapped = BertGenerationTokenizer(unigram_proto, bos_token="</s>", eos_token="<s>")
    assert BertGenerationTokenizer.from_config(swapped.get_config()).eos_token_id == 3


def test_vocabulary_file_is_read_line_by_line(tmp_path):
    path = tmp_path / "vocab.txt"
    pieces = [*BERT_PIECES, "\u2028", "\x85"]  # line breaks to Python, not to the format
    path.write_bytes("\r\n".join(pieces).encode("utf-8"))
    assert BertTokenizer(str(path)).get_config()["vocabulary"] == pieces


LOADER = """
import sys, tensorflow as tf, tensorflow_text
module = tf.saved_model.load(sys.argv[1])
texts = tf.constant(["the old clocks, don't strike!", "", b"\\xff caf\\xc3\\xa9"])
for name in ("bert", "unigram"):
    out = getattr(module, name)(texts)
    print(out["ids"].numpy().tolist(), out["text"].numpy().tolist())
assert "bertgen_tf" not in sys.modules
"""


def round_trip_function(tokenizer):
    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def round_trip(text):
        ids = tokenizer(text)
        return {"ids": ids.flat_values, "text": tokenizer.detokenize(ids)}

    return round_trip


def test_export_needs_no_other_file(bert, unigram, tmp_path):
    vocabulary = bert.save_vocabulary(tmp_path / "gone")
    model = unigram.save_vocabulary(tmp_path / "gone")
    module = tf.Module()
    texts = tf.constant(["the old clocks, don't strike!", "", b"\xff caf\xc3\xa9"])
    expected = ""
    tokenizers = {
        "bert": BertTokenizer(vocabulary),
        "unigram": BertGenerationTokenizer(model),
    }
    for name, tokenizer in tokenizers.items():
        function = round_trip_function(tokenizer)
        setattr(module, name, function)
        setattr(module, f"{name}_tokenizer", tokenizer)
        out = function(texts)
        expected += f"{out['ids'].numpy().tolist()} {out['text'].numpy().tolist()}\n"
    tf.saved_model.save(module, str(tmp_path / "export"))
    shutil.rmtree(tmp_path / "gone")
    shutil.move(tmp_path / "export", tmp_path / "moved")
    result = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path / "moved")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == expected


# Subsets


def check_subset(tokenizer, texts, held_out):
    ids = tokenizer(texts)
    wanted = np.unique(ids.flat_values.numpy())
    small, kept = tokenizer.subset(wanted)
    assert kept.dtype == np.int32 and (np.diff(kept) > 0).all()
    assert small.vocab_size == len(kept) < tokenizer.vocab_size
    assert set(wanted) <= set(kept)
    for role in ("pad", "bos", "eos", "unk", "sep"):
        new, old = (getattr(t, f"{role}_token_id") for t in (small, tokenizer))
        assert (new is None and old is None) or kept[new] == old
    rows = tokenizer([*texts, *held_out]).to_list()
    unknown = tokenizer.unk_token_id
    readable = [set(row) <= set(wanted) and unknown not in row for row in rows]
    assert sum(readable) >= len(texts)
    new_rows = [kept[row].tolist() for row in small([*texts, *held_out]).to_list()]
    for row, new_row, same in zip(rows, new_rows, readable, strict=True):
        if same:
            assert new_row == row
    assert decoded(small.detokenize(small(texts))) == decoded(tokenizer.detokenize(ids))
    return small, kept


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "char", "word"])
def test_sentencepiece_subset(model_type):
    size = {"unigram": 85, "bpe": 120, "char": 40, "word": 40}[model_type]
    tokenizer = BertGenerationTokenizer(
        train_sentencepiece(model_type=model_type, vocab_size=size, hard_vocab_limit=False)
    )
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    for text in ["the", "clock tower", "strike boats", "birds"]:
        if tokenizer.unk_token_id not in tokenizer(text).numpy():
            check_subset(tokenizer, [text], words)


def test_sentencepiece_subset_file(unigram, tmp_path):
    small, kept = unigram.subset(unigram("the clock").numpy())
    path = Path(small.save_vocabulary(tmp_path))
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    spec = model.trainer_spec
    assert spec.vocab_size == len(model.pieces) == len(kept)
    assert model.pieces[spec.pad_id].piece == "<pad>"
    assert model.pieces[spec.eos_id].piece == "</s>"
    again, kept_again = small.subset(range(small.vocab_size))
    assert kept_again.tolist() == list(range(small.vocab_size))
    assert again.get_config() == small.get_config()


def test_unigram_subset_keeps_the_score_of_unknown_characters(unigram_proto):
    # Without "a", the least likely piece, an unknown "a" before "bcd" would be likelier than
    # "ab", "cd": unigram models derive the score of unknown characters from the lowest of all.
    model = sentencepiece_model_pb2.ModelProto.FromString(unigram_proto)
    del model.pieces[5:]
    for piece, score in [("▁", -1), ("a", -60), ("ab", -30), ("cd", -30), ("bcd", -1)]:
        model.pieces.add(piece=piece, score=score)
    tokenizer = BertGenerationTokenizer(model.SerializeToString())
    assert tokenizer.tokenize("abcd") == ["▁", "ab", "cd"]
    small, _ = tokenizer.subset(tokenizer.convert_tokens_to_ids(["▁", "ab", "cd", "bcd"]))
    assert small.tokenize("abcd") == ["▁", "ab", "cd"]


def test_bpe_subset_keeps_what_merges_pass_through():
    tokenizer = BertGenerationTokenizer(train_sentencepiece(model_type="bpe", vocab_size=120))
    pieces = [tokenizer._processor.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    longest = max(pieces[5:], key=len)
    assert len(longest) > 4
    small, kept = tokenizer.subset([pieces.index(longest)])
    assert small.tokenize(longest.replace("▁", " ")) == [longest]
    assert len(kept) < 30


def test_bert_subset(bert):
    small, kept = check_subset(bert, ["the old clocks don't hock"], ["clock", "the", "old d"])
    specials = {"[PAD]", "[MASK]", "[UNK]", "[SEP]", "[CLS]"}
    pieces = set(bert.tokenize("the old clocks don't hock")) | specials
    assert set(small.get_config()["vocabulary"]) == pieces
    assert len(kept) == len(pieces)
    cased = BertTokenizer(BERT_PIECES, lowercase=False)
    assert cased.subset(cased("Clock"))[0].tokenize("Clock clock") == ["Clock", "[UNK]"]


def test_subset_checks_ids(tokenizer):
    assert tokenizer.subset([])[0].pad_token_id is not None
    with pytest.raises(ValueError, match=rf"in \[0, {tokenizer.vocab_size}\); received .* -1 to 3"):
        tokenizer.subset([3, -1])
    with pytest.raises(ValueError, match=f"to {tokenizer.vocab_size}"):
        tokenizer.subset({tokenizer.vocab_size})
    with pytest.raises(TypeError, match="must be integers"):
        tokenizer.subset(["the"])


# Errors


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


def test_bad_sentencepiece_models(tmp_path, unigram_proto):
    with pytest.raises(FileNotFoundError, match="`proto` must be the path .*spiece.model"):
        BertGenerationTokenizer(tmp_path / "spiece.model")
    (tmp_path / "vocab.txt").write_text("\n".join(BERT_PIECES), "utf-8")
    for bad in (tmp_path / "vocab.txt", b"", unigram_proto[:-9]):
        with pytest.raises(ValueError, match="`proto` must be a SentencePiece model"):
            BertGenerationTokenizer(bad)
    no_pad = train_sentencepiece(pad_id=-1, unk_id=1, user_defined_symbols=[], bos_id=2)
    with pytest.raises(
        ValueError, match=r"SentencePiece model must .* not found: pad_token='<pad>'"
    ):
        BertGenerationTokenizer(no_pad)


@pytest.mark.parametrize(
    "reset",
    [lambda: keras.utils.set_random_seed(3), lambda: tf.random.set_seed(3)],
    ids=["keras", "tensorflow"],
)
def test_tokenizers_survive_a_new_random_seed(unigram_proto, reset):
    """TensorFlow forgets the resources of its kernels then; those of a graph stay in use, too."""
    tokenizer, equal = (BertGenerationTokenizer(unigram_proto) for _ in range(2))
    graph = tf.function(lambda text: tokenizer(text).to_tensor())
    expected = graph(tf.constant(["the clock"])).numpy()
    reset()
    np.testing.assert_array_equal(graph(tf.constant(["the clock"])), expected)
    np.testing.assert_array_equal(tokenizer(["the clock"]).to_tensor(), expected)
    tokenizer = graph = None
    np.testing.assert_array_equal(equal(["the clock"]).to_tensor(), expected)
