"""Tokenizers of Hugging Face checkpoints."""

import json

import pytest

import bertgen_tf as bg
from bertgen_tf.checkpoints.huggingface import tokenizers
from tests.helpers import GOLDEN, PIECES, write_checkpoint
from tests.helpers.huggingface import assert_same_model


def test_tokenizer_that_transformers_wrote(checkpoints, copy, tmp_path):
    """Its separator has no row; special tokens in a text are special tokens there."""
    folder = copy("v4_shared")
    theirs = checkpoints / "v5_tokenizer"
    for name in ("spiece.model", "tokenizer_config.json", "added_tokens.json"):
        (folder / name).write_bytes((theirs / name).read_bytes())
    model = bg.EncoderDecoderModel.from_huggingface(folder)
    golden = json.loads((theirs / "golden.json").read_text())
    assert model.tokenizer(golden["texts"]).to_list() == golden["ids"]
    assert model.tokenizer.sep_token_id is None
    model.save_to_huggingface(tmp_path / "out")
    assert_same_model(model, bg.EncoderDecoderModel.from_huggingface(tmp_path / "out"))
    (folder / "added_tokens.json").write_text('{"<new>": 42, "<::::>": 43}')
    with pytest.raises(ValueError, match="added that the vocabulary lacks: '<new>'"):
        bg.EncoderDecoderModel.from_huggingface(folder)
    (folder / "added_tokens.json").unlink()
    values = json.loads((folder / "tokenizer_config.json").read_text())
    values.update(split_special_tokens=True, sp_model_kwargs={"enable_sampling": True})
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    tokenizer = bg.EncoderDecoderModel.from_huggingface(folder).tokenizer
    assert tokenizer.split_special_tokens and tokenizer.sp_model_kwargs == {"enable_sampling": True}


def test_word_pieces_of_transformers_5(tmp_path):
    """It writes tokenizer.json and no vocab.txt."""
    folder = write_checkpoint(tmp_path / "bert")
    expected = bg.EncoderDecoderModel.from_huggingface(encoder=str(folder)).tokenizer
    values = {
        "normalizer": {"type": "BertNormalizer", "lowercase": True, "strip_accents": None},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "model": {"type": "WordPiece", "vocab": {piece: i for i, piece in enumerate(PIECES)}},
    }
    (folder / "vocab.txt").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = bg.EncoderDecoderModel.from_huggingface(encoder=str(folder)).tokenizer
    assert tokenizer.get_config() == expected.get_config()
    values["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(values))
    # As in transformers, what its configuration says comes first.
    assert bg.EncoderDecoderModel.from_huggingface(encoder=str(folder)).tokenizer.lowercase
    (folder / "tokenizer_config.json").unlink()
    tokenizer = bg.EncoderDecoderModel.from_huggingface(encoder=str(folder)).tokenizer
    assert not tokenizer.lowercase


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", '{"never_split": ["a"]}', "not support never_split="),
        ("tokenizer_config.json", '{"unk_token": "<what>"}', "not found: unk_token='<what>'"),
        ("added_tokens.json", '{"<new>": 80}', "Tokens were added .* lacks: '<new>'"),
        ("tokenizer_config.json", "{", "tokenizer_config.json should be a JSON file"),
        ("spiece.model", "no model", "is not a SentencePiece model. To use another one"),
        ("vocab.txt", "one\ntwo\n", "must contain every special token"),
    ],
)
def test_tokenizers_that_cannot_be_followed(tmp_path, name, content, message):
    """Another tokenizer helps."""
    folder = write_checkpoint(tmp_path / "bert")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        bg.EncoderDecoderModel.from_huggingface(encoder=str(folder))
    tokenizer = bg.BertTokenizer(list(PIECES))
    model = bg.EncoderDecoderModel.from_huggingface(encoder=str(folder), tokenizer=tokenizer)
    assert model.tokenizer is tokenizer
    other = tokenizer.subset(range(30))[0]
    with pytest.raises(ValueError, match=message):
        bg.EncoderDecoderModel.from_huggingface(encoder=str(folder), tokenizer=other)


def test_special_tokens_by_name(tmp_path):
    """Of tokenizer_config.json and special_tokens_map.json, as words and as dictionaries."""
    pieces = ["<pad>", "[UNK]", "<s>", "</s>", *PIECES[4:]]
    folder = write_checkpoint(tmp_path / "bert", pieces=pieces)
    (folder / "tokenizer_config.json").write_text(
        '{"do_lower_case": false, "pad_token": {"__type": "AddedToken", "content": "<pad>"}}'
    )
    (folder / "special_tokens_map.json").write_text('{"cls_token": "<s>", "sep_token": "</s>"}')
    tokenizer = bg.EncoderDecoderModel.from_huggingface(encoder=str(folder)).tokenizer
    ids = [getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos", "sep", "mask")]
    assert ids == [0, 2, 3, 3, 5] and not tokenizer.lowercase


WORDS = [
    "The",
    "Cat",
    "the",
    "cat",
    "-",
    "sat",
    "été",
    "e",
    "##t",
    "##e",
    "die",
    "straße",
    "<",
    ">",
]
VOCAB = [*PIECES[:6], *WORDS, "hl", "q", "[", "]", "x"]
SPECIALS = [piece for piece in VOCAB if piece.startswith("[") and piece.endswith("]")]
TEXTS = [
    *("The Cat", "Été", "The\tcat-sat", "die [SEP] straße[MASK]x", "die <hl> straße <HL>"),
    *("[Q]the[q] [cls]", "the<sp>cat <SP> x", "中the\u200bcat", "x" * 101),
]
BERT_NORMALIZER = {
    **{"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True},
    **{"strip_accents": None, "lowercase": True},
}
FREE = {"tokenizer_class": "PreTrainedTokenizerFast"}
NFC_LOWER = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}


def added(content, i, **flags):
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": i, "content": content, **dict.fromkeys(names, False), **flags}


def tokenizer_json(normalizer=BERT_NORMALIZER, pre="BertPreTokenizer", more=(), **model):
    """What transformers 5 writes; `more` tokens come after the vocabulary."""
    special = [added(piece, VOCAB.index(piece), special=True) for piece in SPECIALS]
    return {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "post_processor")),
        "added_tokens": [*special, *more],
        "normalizer": normalizer,
        "pre_tokenizer": pre if pre is None else {"type": pre},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {piece: i for i, piece in enumerate(VOCAB)},
            **model,
        },
    }


def write(folder, files):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(data)
    return folder


VOCAB_TXT = "".join(f"{piece}\n" for piece in VOCAB).encode()
NEW = [
    added("<hl>", len(VOCAB), normalized=True),
    added("[Q]", len(VOCAB) + 1, normalized=True),
    added("<sp>", len(VOCAB) + 2, special=True),
]
# What each folder makes of a text.
FOLDERS = {
    "vocab.txt": ({"vocab.txt": VOCAB_TXT}, "The Cat", "the cat"),
    "null": ({"tokenizer.json": tokenizer_json(None), "tokenizer_config.json": FREE},
             "The Cat", "The Cat"),
    "NFC": ({"tokenizer.json": tokenizer_json({"type": "NFC"}), "tokenizer_config.json": FREE},
            "The e\u0301t\u00e9", "The été"),
    "sequence": ({"tokenizer.json": tokenizer_json(NFC_LOWER), "tokenizer_config.json": FREE},
                 "Été", "été"),
    "white space": ({"tokenizer.json": tokenizer_json(None, "WhitespaceSplit"),
                     "tokenizer_config.json": FREE}, "The\tcat-sat", "The [UNK]"),
    "words": ({"tokenizer.json": tokenizer_json(NFC_LOWER, "Whitespace"),
               "tokenizer_config.json": FREE}, "The<cat>--", "the < cat [UNK]"),
    "limit": ({"tokenizer.json": tokenizer_json(max_input_chars_per_word=3),
               "tokenizer_config.json": FREE}, "The straße été", "the [UNK] e ##t ##e"),
    "added": ({"tokenizer.json": tokenizer_json(more=NEW),
               "tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}},
              "die <HL> straße[q]<sp>", "die <hl> straße [Q] <sp>"),
    "added to vocab.txt": (
        {"vocab.txt": VOCAB_TXT,
         "tokenizer_config.json": {"added_tokens_decoder": {str(t["id"]): t for t in NEW}}},
        "die <HL> straße[q]<sp>", "die <hl> straße [Q] <sp>"),
    "added_tokens.json": (
        {"vocab.txt": VOCAB_TXT, "added_tokens.json": {"<hl>": len(VOCAB), "<sp>": len(VOCAB) + 1},
         "tokenizer_config.json": {"additional_special_tokens": ["<sp>"]}},
        "die <HL> straße<sp>", "die <hl> straße <sp>"),
    "split": ({"vocab.txt": VOCAB_TXT, "tokenizer_config.json": {"split_special_tokens": True}},
              "the [CAT]", "the [ cat ]"),
    "accents": ({"vocab.txt": VOCAB_TXT, "tokenizer_config.json":
                 {"strip_accents": False, "tokenize_chinese_chars": False}}, "Été", "été"),
    "the options come first": (
        {"tokenizer.json": tokenizer_json(),
         "tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "do_lower_case": False}},
        "The Cat", "The Cat"),
    "tokenizer.json comes first": (
        {"vocab.txt": b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n", "tokenizer.json": tokenizer_json()},
        "The Cat", "the cat"),
    "trailing spaces": ({"vocab.txt": VOCAB_TXT.replace(b"\nthe\n", b"\nthe \xc2\xa0\r\n")},
                        "The Cat", "the cat"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_stored_is_followed(tmp_path, name):
    files, text, expected = FOLDERS[name]
    folder = write(tmp_path / "one", files)
    tokenizer = tokenizers.read_tokenizer(folder, None)
    assert " ".join(tokenizer.tokenize(text)) == expected
    (tmp_path / "two").mkdir()
    tokenizers.write_tokenizer(tmp_path / "two", tokenizer)
    assert tokenizers.read_tokenizer(tmp_path / "two", None).get_config() == tokenizer.get_config()
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    ours = tokenizer([*TEXTS, text]).to_list()
    (tmp_path / "two" / "config.json").write_text('{"model_type": "bert"}')
    for written in (folder, tmp_path / "two"):
        theirs = transformers.AutoTokenizer.from_pretrained(written)
        assert len(theirs) == len(tokenizer)
        assert theirs([*TEXTS, text], add_special_tokens=False)["input_ids"] == ours


def test_a_byte_order_mark(tmp_path):
    """transformers takes it for a part of the first piece, and adds a second [PAD]."""
    folder = write(tmp_path / "bert", {"vocab.txt": b"\xef\xbb\xbf" + VOCAB_TXT})
    assert list(tokenizers.read_tokenizer(folder, None).get_vocab()) == VOCAB


BERT = {"tokenizer_class": "BertTokenizer"}
OF_BERT = "but transformers' BertTokenizer reads only tokenizer_config.json. State it there"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((tokenizer_json({"type": "Replace", "content": ""}), FREE), 'received {"type": "Replace"'),
        ((tokenizer_json({"type": "NFC"}), BERT), f'has normalizer {{"type": "NFC"}}, {OF_BERT}'),
        ((tokenizer_json({**BERT_NORMALIZER, "lowercase": False}), BERT),
         f"has lowercase=False without do_lower_case, .*{OF_BERT}"),
        ((tokenizer_json(pre="WhitespaceSplit"), BERT), f"has WhitespaceSplit .*{OF_BERT}"),
        ((tokenizer_json(max_input_chars_per_word=9), BERT), f"has .*_word=9, {OF_BERT}"),
        ((tokenizer_json(pre=None), FREE), "pre_tokenizer .* must be one of .*received null"),
        ((tokenizer_json(pre="Digits"), FREE), 'pre_tokenizer .* received {"type": "Digits"}'),
        ((tokenizer_json(continuing_subword_prefix="_"), FREE), "wordpieces_prefix='_'"),
        ((tokenizer_json(more=[added("a", 99)]), FREE), "Tokens were added .* lacks: 'a'"),
        ((tokenizer_json(more=[{**NEW[0], "single_word": True}]), FREE), "'<hl>' has single_word"),
        ((tokenizer_json(type="Unigram"), FREE), "holds a Unigram model"),
        ((tokenizer_json(None, "ByteLevel", type="BPE", ignore_merges=True), FREE),
         "a BPE with ignore_merges true, .*; only byte-level BPE"),
        ((tokenizer_json({"type": "NFC"}, "ByteLevel", type="BPE"), FREE),
         'a BPE with .*normalizer {"type": "NFC"}'),
        ((tokenizer_json(None, "Split", type="BPE"), FREE), 'BPE with .*pre_tokenizer {"ty'),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_named(tmp_path, files, message):
    names = ("tokenizer.json", "tokenizer_config.json")
    folder = write(tmp_path / "bert", dict(zip(names, files, strict=True)))
    with pytest.raises(ValueError, match=message) as caught:
        tokenizers.read_tokenizer(folder, None)
    assert len(str(caught.value).replace(str(folder), "")) < 420


def test_tokens_that_the_model_does_not_know(tmp_path):
    """A mask that transformers added to a vocabulary is none; other tokens are an error."""
    mask = added("<mask>", len(VOCAB), special=True)
    options = {"tokenizer_class": "BertTokenizer", "mask_token": "<mask>"}
    files = {"tokenizer.json": tokenizer_json(more=[mask]), "tokenizer_config.json": options}
    folder = write(tmp_path / "bert", files)
    tokenizer = tokenizers.read_tokenizer(folder, None, rows=len(VOCAB))
    assert (len(tokenizer), tokenizer.mask_token) == (len(VOCAB), None)
    assert tokenizers.read_tokenizer(folder, None, rows=99).mask_token == "<mask>"
    write(tmp_path / "bert", {"tokenizer.json": tokenizer_json(more=NEW)})
    with pytest.raises(ValueError, match="lacks: '\\[Q\\]', '<sp>'"):
        tokenizers.read_tokenizer(folder, None, rows=len(VOCAB) + 1)


def test_the_normalization_of_tf_hub_there_and_back(tmp_path):
    """transformers has no place for it."""
    tokenizer = bg.BertTokenizer(VOCAB)
    tokenizers.write_tokenizer(tmp_path, tokenizer)
    assert tokenizers.read_tokenizer(tmp_path, None).get_config() == tokenizer.get_config()


def test_what_was_written_when_there_was_one_normalization(tmp_path):
    """By versions that said nothing of it."""
    tokenizers.write_tokenizer(tmp_path, bg.BertTokenizer(VOCAB))
    path = tmp_path / "tokenizer_config.json"
    options = json.loads(path.read_text())
    del options["bertgen_tf"], options["split_special_tokens"]
    path.write_text(json.dumps(options))
    assert tokenizers.read_tokenizer(tmp_path, None).normalization == "huggingface"
    (tmp_path / "config.json").write_text(json.dumps({"bertgen_tf": {}}))
    assert tokenizers.read_tokenizer(tmp_path, None).normalization == "tf_hub"


@pytest.mark.parametrize(
    "options", [{"added_tokens_decoder": {"x": {}}}, {"additional_special_tokens": 5}]
)
def test_damaged_options(tmp_path, options):
    tokenizers.write_tokenizer(tmp_path, bg.BertTokenizer(VOCAB))
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    with pytest.raises(ValueError, match="should hold a tokenizer, but reading it failed"):
        tokenizers.read_tokenizer(tmp_path, None)


@pytest.mark.parametrize("lstrip", [False, True])
def test_special_tokens_in_a_text_of_roberta(tmp_path, lstrip):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    case = json.loads((GOLDEN / "tokenizers.json").read_text("utf-8"))["byte_pair"]["roberta"]
    mask = transformers.AddedToken("<mask>", lstrip=lstrip, special=True)
    merges = [tuple(line.split(" ")) for line in case["merges"]]
    theirs = transformers.RobertaTokenizer(vocab=case["vocab"], merges=merges, mask_token=mask)
    theirs.save_pretrained(tmp_path)
    texts = ["the <mask> clock", "the<mask> </s>old <s>", "<pad> a <unk> b  <mask>", "<Mask>"]
    for split in (False, True):
        theirs.split_special_tokens = split
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        config["split_special_tokens"] = split
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        ours = tokenizers.read_tokenizer(tmp_path, None)
        expected = [
            theirs(text, add_special_tokens=False, split_special_tokens=split).input_ids
            for text in texts
        ]
        assert ours(texts).to_list() == expected
        again = bg.BertGenerationTokenizer.from_config(ours.get_config())
        assert again(texts).to_list() == expected
