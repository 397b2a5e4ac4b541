"""Writes tests/data/tokenizers.json: what the tokenizers of HuggingFace answer.

For maintainers, to be run again only if the rules of transformers change. It needs packages that
the project does not depend on, so use an environment of its own:

    pip install transformers==5.23.0 tokenizers==0.23.3 sentencepiece==0.2.3 protobuf
    python tools/make_tokenizer_golden.py

The vocabularies are tiny and trained here, on the sentences below. A case of `bert_generation` or
`bert` holds `options` of the class, the vocabulary (`model`, base64 of a `spiece.model`, or
`pieces`) and `answers`, see `answers`; a case of `byte_pair` holds `vocab`, `merges`, `options` of
the training, `texts` and `ids`.
"""

import argparse
import base64
import io
import json
import pathlib
import random
import tempfile
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

TRAINING = [
    "The old clock in the tower struck twelve, and nobody heard it.",
    "Clocks and towers are older than the people who hear them strike.",
    "She wrote three letters; he answered none of them (as always).",
    "Winter came early: the lake froze, the boats were stored, the birds left.",
    "A singer-songwriter from Leeds wrote 12 songs about boats and lakes in 1998.",
    "It's the baker's dozen! Isn't it? They're thirteen, of course: we've counted, I'm sure.",
    'He said "hello there", she\'d said "goodbye"; they\'ll meet on 3.5.2021 at 10:30.',
    "Die Bäcker backen süße Brötchen, und die Gänse schnattern über den Weiher.",
    "Le garçon a mangé une crème brûlée à côté de la forêt – “très bien”, dit-il.",
]
TEXTS = [
    *TRAINING[:3],
    "",
    " ",
    "  two  spaces  ",
    "a <::::> b",
    "<::::>",
    "clock <::::>",
    "<s>clock</s>",
    "x <unk> y<pad><pad>z",
    "<mask> <sep> < s> <S>",
    "<s",
    "</s><s>",
    "[SEP] the [CLS] [MASK][PAD] [UNK]x",
    "tab\tand\nline\r\nend\n",
    "Unknown Ω and ☃☃ in 中文.",
    "ﬁne Ｆｕｌｌ wide",
    "café CAFE\u0301 naïve Ünïcödé Äpfel über",
    "don't 's 'tis it's' , . ! ?",
    "emoji 😀 end",
    "zero\u200bwidth\u00a0nbsp\u3000wide",
    "a▁b ▁ c",
    "... ?! ''",
    "clockclockclock towertower",
]
BYTE_PAIR_TEXTS = [
    *TRAINING,
    "",
    " ",
    "   ",
    " a leading one",
    "two at the end  ",
    "two  and   three    and tabs\t\tand\tone",
    "lines\nof\n text \n and\r\nmore",
    "'so he said, and 'she' too, 'the end' I've 'read'",
    "it's we're they'll I'm she'd don't we've IT'S isn't.",
    "12 123 1234 a1b2 3.14 10:30:59 1,000,000",
    'He said: "(no)", ... and?! --- left.',
    "http://a.b/c?d=e_f&g=#1 ~`@$%^*+|\\<>{}[]",
    "süße Brötchen über Gänse crème brûlée",
    "ZZQX JKVW zzqx jkvw",
]


def train_sentencepiece(rules: str = "", **options: Any) -> bytes:
    """A tiny model; `rules` is a table of characters to replace, in place of Unicode's."""
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv", encoding="utf-8") as file:
        file.write(rules)
        file.flush()
        if rules:
            options["normalization_rule_tsv"] = file.name
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TRAINING * 3),
            model_writer=model,
            **{
                "pad_id": 0,
                "eos_id": 1,
                "bos_id": 2,
                "unk_id": 3,
                "pad_piece": "<pad>",
                "user_defined_symbols": ["<::::>"],
                "normalization_rule_name": "" if rules else "identity",
                "minloglevel": 2,
                "num_threads": 1,
                **options,
            },
        )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    proto.normalizer_spec.ClearField("normalization_rule_tsv")  # another name in each run
    return proto.SerializeToString(deterministic=True)


def word_pieces(specials: list[str], seed: int) -> list[str]:
    """Characters and words of the training sentences, some with and some without accents."""
    words = {w for s in TRAINING for w in "".join(c if c.isalnum() else " " for c in s).split()}
    letters = sorted(
        {c for c in "".join(TRAINING) if c.isalnum()} | set("abcdefghijklmnopqrstuvwxyz")
    )
    marks = sorted({c for c in "".join(TRAINING) if not c.isalnum() and c != " "} | set("<>[]"))
    words |= {w.lower() for w in words} | {"uber", "creme", "cafe", "naïve", "中"}
    rare = random.Random(seed).sample(sorted(words), len(words) // 2)
    singles = letters + marks
    words = sorted(set(rare) - set(singles))
    return [*specials, *singles, *(f"##{c}" for c in letters), *words]


def answers(tokenizer: Any, texts: list[str], seed: int = 0, **encode: Any) -> dict[str, Any]:
    """What a tokenizer answers to texts and to random ids; `encode` goes to that call.

    texts: tokens, ids and the text decoded again. rows: ids with their tokens, decoded with and
    without (skipped) special tokens, and with spaces cleaned up.
    """
    rng = random.Random(seed)
    specials = tokenizer.all_special_ids
    rows = [
        [rng.choice(specials) if rng.random() < 0.2 else rng.randrange(tokenizer.vocab_size)
         for _ in range(rng.randrange(9))]
        for _ in range(12)
    ]  # fmt: skip
    return {
        "vocab_size": tokenizer.vocab_size,
        "length": len(tokenizer),
        "special_tokens": dict(
            zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        ),
        "named": {
            f"{role}_token": [getattr(tokenizer, f"{role}_token"),
                              getattr(tokenizer, f"{role}_token_id")]
            for role in ("pad", "unk", "sep")
        },
        "vocab": [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda x: x[1])],
        "texts": [
            {"text": text, "tokens": tokenizer.tokenize(text), "ids": ids,
             "decoded": tokenizer.decode(ids)}
            for text in texts
            for ids in [tokenizer.encode(text, **encode)]
        ],
        "rows": [
            {"ids": row,
             "tokens": tokenizer.convert_ids_to_tokens(row),
             "skipped_tokens": tokenizer.convert_ids_to_tokens(row, skip_special_tokens=True),
             "decoded": tokenizer.decode(row),
             "skipped": tokenizer.decode(row, skip_special_tokens=True),
             "cleaned": tokenizer.decode(row, clean_up_tokenization_spaces=True)}
            for row in rows
        ],
        "batch": tokenizer.batch_decode(rows, skip_special_tokens=True),
        "id": [tokenizer.convert_ids_to_tokens(5), tokenizer.decode(5)],
        "unknown": tokenizer.convert_tokens_to_ids(["no such", "e"]),
        "one": tokenizer.convert_tokens_to_ids("e"),
        "joined": tokenizer.convert_tokens_to_string(["e", "▁e", "##e", ".", "<s>", "e", "▁"]),
    }  # fmt: skip


def bert_generation_answers(proto: bytes, texts: list[str] = TEXTS, **options: Any) -> Any:
    """What HuggingFace's BertGenerationTokenizer answers."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "spiece.model")
        path.write_bytes(proto)
        return answers(transformers.BertGenerationTokenizer(str(path), **options), texts)


def bert_answers(pieces: list[str], texts: list[str] = TEXTS, **options: Any) -> Any:
    """What HuggingFace's BertTokenizer answers; special tokens in texts are text, as for ours."""
    import transformers

    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = transformers.BertTokenizer(vocab=vocab, split_special_tokens=True, **options)
    return answers(tokenizer, texts, add_special_tokens=False)


def byte_pair(vocab_size: int, specials: list[str], last: list[str]) -> dict[str, Any]:
    """A byte-level BPE with ids for its texts; `specials` come first, `last` at the end."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    # Twice each, so that characters come before the words that they are in.
    characters = "-".join(sorted(c for c in set("".join(TRAINING)) if not c.isascii()) * 2)
    quotes = ["'Yes', 'no' and 'maybe' are 'answers' to 'some' questions."]
    tokenizer.train_from_iterator(
        [*TRAINING, *quotes, characters], vocab_size=vocab_size, min_frequency=1,
        special_tokens=specials,
        show_progress=False,
    )  # fmt: skip
    model = json.loads(tokenizer._tokenizer.to_str())["model"]
    vocab = model["vocab"]
    for token in last:
        vocab[token] = len(vocab)
    return {
        "vocab": vocab,
        "merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
        "texts": BYTE_PAIR_TEXTS,
        "ids": [tokenizer.encode(text).ids for text in BYTE_PAIR_TEXTS],
    }


def make() -> dict[str, Any]:
    """Everything that the file holds."""
    rules = "FB01\t66 69\nFF26\t46\nFF55\t75\nFF4C\t6C\n9\t20\nA\t20\nD\t20\n3000\t20\n200B\t\n"
    models = {
        "unigram": train_sentencepiece(rules, vocab_size=110),
        "bpe": train_sentencepiece(model_type="bpe", vocab_size=140),
    }
    split = [{"split_special_tokens": value} for value in (True, False)]
    bert = ["[PAD]", "[unused0]", "[MASK]", "[UNK]", "[SEP]", "[CLS]"]
    # As in the vocabulary of the WMT originals, whose copies name these by hand.
    wmt = ["<pad>", "</s>", "<s>", "[UNK]", "[SEP]", "[CLS]", "[MASK]"]
    wmt_options = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    bert_cases = [
        (word_pieces(bert, 1), {"do_lower_case": True}),
        (word_pieces(bert, 2), {"do_lower_case": False}),
        (word_pieces(wmt, 3), {"do_lower_case": False, **wmt_options}),
    ]
    return {
        "bert_generation": [
            {
                "name": name,
                "model": base64.b64encode(proto).decode("ascii"),
                "options": options,
                "answers": bert_generation_answers(proto, **options),
            }
            for name, proto in models.items()
            for options in split
        ],
        "bert": [
            {"pieces": pieces, "options": options, "answers": bert_answers(pieces, **options)}
            for pieces, options in bert_cases
        ],
        "byte_pair": {
            "roberta": byte_pair(580, ["<s>", "<pad>", "</s>", "<unk>"], ["<mask>"]),
            "gpt2": byte_pair(460, [], ["<|endoftext|>"]),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = pathlib.Path(__file__).parent.parent / "tests/data/tokenizers.json"
    parser.add_argument("--output", type=pathlib.Path, default=default)
    path = parser.parse_args().output
    text = json.dumps(make(), ensure_ascii=False, separators=(",", ":"))
    path.write_text(text + "\n", encoding="utf-8")
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
