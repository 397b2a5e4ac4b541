"""Vocabularies, texts and checks that the tests of the tokenizers share."""

import io

import numpy as np
import pytest
import sentencepiece
import tensorflow as tf

from tests.helpers import SHARED

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


def wikisplit(count: int) -> list[str]:
    lines = (SHARED / "data/wikisplit/validation.tsv").read_text("utf-8").split("\n")
    return [line.split("\t")[0] for line in lines[:count]]


def decoded(tensor) -> list[str]:
    return [item.decode("utf-8") for item in tensor.numpy()]


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


def check_answers(tokenizer, answers: dict, different: set[str] = frozenset()) -> None:
    """Compares with what HuggingFace's class answered; see tools/fixtures/make_tokenizer_golden.py.

    `different` are texts whose ids differ on purpose.
    """
    texts = [row["text"] for row in answers["texts"]]
    encoded = [tokenizer.encode(text) for text in texts]
    for row, own in zip(answers["texts"], encoded, strict=True):
        text, ids = row["text"], row["ids"]
        same = [tokenizer.tokenize(text) == row["tokens"], own == ids]
        assert same == [text not in different] * 2, text
        assert tokenizer.decode(ids) == row["decoded"]
        if text not in different:
            assert tokenizer.convert_tokens_to_ids(row["tokens"]) == ids
    assert tokenizer(texts).to_list() == encoded
    for row in answers["rows"]:
        ids = row["ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == row["tokens"]
        assert tokenizer.convert_ids_to_tokens(ids, True) == row["skipped_tokens"]
        assert tokenizer.decode(np.array(ids, np.int64)) == row["decoded"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["skipped"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=True) == row["cleaned"]
    rows = [row["ids"] for row in answers["rows"]]
    for batch in (rows, tf.ragged.constant(rows, tf.int32)):
        assert tokenizer.batch_decode(batch, skip_special_tokens=True) == answers["batch"]
        assert tokenizer.decode(batch, True) == answers["batch"]
    assert [tokenizer.convert_ids_to_tokens(5), tokenizer.decode(5)] == answers["id"]
    assert tokenizer.convert_tokens_to_ids(["no such", "e"]) == answers["unknown"]
    assert tokenizer.convert_tokens_to_ids("e") == answers["one"]
    tokens = ["e", "▁e", "##e", ".", "<s>", "e", "▁"]
    assert tokenizer.convert_tokens_to_string(tokens) == answers["joined"]
    assert tokenizer.vocab_size == answers["vocab_size"]
    assert len(tokenizer) == answers["length"]
    assert list(tokenizer.get_vocab()) == answers["vocab"]
    assert list(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    for name, (token, i) in answers["named"].items():
        assert getattr(tokenizer, name) == token and getattr(tokenizer, f"{name}_id") == i
    specials = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    assert specials.items() <= answers["special_tokens"].items()
