"""What a `tokenizer.json` of Hugging Face says: normalizer, pre-tokenizer, model; in and out.

transformers follows it whole only in the classes `FREE_CLASSES`. Those of a model, such as
`BertTokenizer`, take the vocabulary and the added tokens from it, and everything else from their
options in `tokenizer_config.json`. Where the two would read texts differently, reading fails.
"""

import json
from collections.abc import Mapping
from typing import Any

from bertgen_tf.tokenizers import BertTokenizer
from bertgen_tf.tokenizers.normalization import (
    PRE_TOKENIZERS,
    bert_normalizer,
    checked_steps,
    lowers,
    step_parts,
)

# The classes of transformers that do what tokenizer.json says; those of a model make their
# tokenizer from its vocabulary and their own options.
FREE_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
# Options of BERT's tokenizer that are always so here; None is the default.
_BERT_OPTIONS = {
    "do_basic_tokenize": (None, True),
    "never_split": (None, []),
    "wordpieces_prefix": (None, "##"),
}
# Options of BERT's tokenizer: their names in a BertNormalizer, their defaults.
_BERT_NORMALIZER = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
}
BERT_WORDS = (PRE_TOKENIZERS[0], 100)  # pre-tokenizer, and the limit of words
FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


def bert_options(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `BertTokenizer` that the options of transformers' class say."""
    problems = [
        f"{field}={options[field]!r}"
        for field, values in _BERT_OPTIONS.items()
        if field in options and options[field] not in values
    ]
    if problems:
        raise ValueError(f"BertTokenizer does not support {', '.join(problems)}.")
    found = {field: options.get(field, default) for field, (_, default) in _BERT_NORMALIZER.items()}
    return {"lowercase": found.pop("do_lower_case"), "normalization": "huggingface", **found}


def word_piece_options(values: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `BertTokenizer` that a `tokenizer.json` says; checks that it can be read."""
    model = values["model"]
    steps = checked_steps(values.get("normalizer"))
    words = values.get("pre_tokenizer")
    if isinstance(words, Mapping) and len(words.get("pretokenizers") or ()) == 1:
        words = words["pretokenizers"][0]
    pre_tokenizer = words.get("type") if isinstance(words, Mapping) and len(words) == 1 else None
    if pre_tokenizer not in PRE_TOKENIZERS:
        raise ValueError(
            f"The pre_tokenizer of tokenizer.json must be one of {', '.join(PRE_TOKENIZERS)}; "
            f"received {json.dumps(words)[:99]}."
        )
    prefix = model.get("continuing_subword_prefix", "##")
    if prefix != "##":
        raise ValueError(f"BertTokenizer does not support wordpieces_prefix={prefix!r}.")
    limit = model.get("max_input_chars_per_word", BERT_WORDS[1])
    name = options.get("tokenizer_class")
    if name in FREE_CLASSES or not (name or set(options) & set(_BERT_NORMALIZER)):
        keywords = {"pre_tokenizer": pre_tokenizer, "max_input_chars_per_word": limit}
        if len(steps) == 1 and steps[0].get("clean_text"):
            arguments = {
                "lowercase" if k == "do_lower_case" else k: v[0]
                for k, v in _BERT_NORMALIZER.items()
            }
            step = {argument: steps[0][field] for argument, field in arguments.items()}
            return {**keywords, "normalization": "huggingface", **step}
        return {**keywords, "normalization": steps, "lowercase": lowers(steps)}
    keywords = bert_options(options)
    said = {k: keywords[k] for k in ("lowercase", "strip_accents", "tokenize_chinese_chars")}
    stated = {v[0]: options[k] for k, v in _BERT_NORMALIZER.items() if k in options}
    wrong = []
    if len(steps) != 1 or "clean_text" not in steps[0]:
        wrong.append(f"normalizer {json.dumps(values.get('normalizer'))[:60]}")
    elif step_parts({**steps[0], **stated}) != step_parts(bert_normalizer(**said)[0]):
        fields = {k: v[0] for k, v in _BERT_NORMALIZER.items() if k not in options}
        wrong.append(", ".join(f"{f}={steps[0][f]} without {k}" for k, f in fields.items()))
    if (pre_tokenizer, limit) != BERT_WORDS:
        wrong.append(f"{pre_tokenizer} with max_input_chars_per_word={limit}")
    if wrong:
        raise ValueError(
            f"tokenizer.json has {'; '.join(wrong)}, but transformers' {name or 'BertTokenizer'} "
            f"reads only tokenizer_config.json. State it there, or tokenizer_class="
            f"{FREE_CLASSES[0]}."
        )
    return keywords


def check_byte_level(values: dict[str, Any], options: dict[str, Any]) -> bool:
    """Whether a byte-level BPE adds a space to a text; checks that it can be read."""
    model, words = values["model"], values.get("pre_tokenizer")
    wrong = [
        f"{field} {json.dumps(model[field])}"
        for field in (
            *("dropout", "byte_fallback", "ignore_merges"),
            *("continuing_subword_prefix", "end_of_word_suffix"),
        )
        if model.get(field)
    ]
    if values.get("normalizer") is not None:
        wrong.append(f"normalizer {json.dumps(values['normalizer'])[:60]}")
    if not isinstance(words, Mapping) or words.get("type") != "ByteLevel":
        wrong.append(f"pre_tokenizer {json.dumps(words)[:60]}")
    elif words.get("use_regex") is False:
        wrong.append("pre_tokenizer ByteLevel with use_regex false")
    if wrong:
        raise ValueError(
            f"tokenizer.json has a BPE with {', '.join(wrong)}; only byte-level BPE as GPT-2's and "
            "RoBERTa's can be read."
        )
    said = options.get("add_prefix_space")
    name = options.get("tokenizer_class")
    if said is None or name in FREE_CLASSES:
        own = bool(words.get("add_prefix_space"))
        if own and name not in (None, *FREE_CLASSES):
            raise ValueError(
                f"tokenizer.json has add_prefix_space=True, but transformers' {name} reads only "
                "tokenizer_config.json. State it there."
            )
        return own
    return bool(said)


def write_word_piece(tokenizer: BertTokenizer) -> dict[str, Any]:
    """The `tokenizer.json` of a WordPiece tokenizer with a normalization of Hugging Face."""
    steps = tokenizer.normalization
    if isinstance(steps, str):
        steps = bert_normalizer(
            tokenizer.lowercase, tokenizer.strip_accents, tokenizer.tokenize_chinese_chars
        )
    index = tokenizer.get_vocab()
    plain = dict(zip(FLAGS, (True, False, False, False, False), strict=True))
    added = {token: {"content": token, **plain} for token in tokenizer.all_special_tokens}
    added |= {token["content"]: {**token, "single_word": False} for token in tokenizer.added_tokens}
    tokens = [{"id": index[content], **token} for content, token in added.items()]
    # What stands after the vocabulary is not part of it: no word can be such a token.
    own = {token["content"] for token in tokenizer.added_tokens}
    vocab = dict(index)
    for piece in reversed(index):
        if piece not in own:
            break
        del vocab[piece]
    first, last = tokenizer.bos_token, tokenizer.eos_token
    frame = [
        {"SpecialToken": {"id": first, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": last, "type_id": 0}},
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(tokens, key=lambda token: token["id"]),
        "normalizer": {"type": "Sequence", "normalizers": steps} if len(steps) != 1 else steps[0],
        "pre_tokenizer": {"type": tokenizer.pre_tokenizer},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": frame,
            "pair": [*frame, {"Sequence": {"id": "B", "type_id": 1}}, frame[2]],
            "special_tokens": {
                piece: {"id": piece, "ids": [index[piece]], "tokens": [piece]}
                for piece in (first, last)
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": tokenizer.unk_token,
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": tokenizer.max_input_chars_per_word,
            "vocab": vocab,
        },
    }
