"""The tokenizer files of Hugging Face checkpoints, in and out."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import sentencepiece

from bertgen_tf.checkpoints.huggingface.files import read_json, write_json
from bertgen_tf.checks import first_line
from bertgen_tf.tokenizers import BertGenerationTokenizer, BertTokenizer
from bertgen_tf.tokenizers.byte_pair import sentencepiece_from_byte_pair

Tokenizer = BertTokenizer | BertGenerationTokenizer

CONFIG = "tokenizer_config.json"
ROLES = ("pad", "bos", "eos")
# Options of BERT's tokenizer that are always so here; None is the default.
_BERT_OPTIONS = {
    "do_basic_tokenize": (None, True),
    "never_split": (None, []),
    "tokenize_chinese_chars": (None, True),
    "wordpieces_prefix": (None, "##"),
}


def read_tokenizer(
    folder: pathlib.Path, ids: dict[str, int] | None, *, append_missing: bool = False
) -> Tokenizer | None:
    """The tokenizer of a checkpoint, or None if it has no file for one.

    `spiece.model` is read first, then `vocab.txt`, `vocab.json` with `merges.txt`, and
    `tokenizer.json` (WordPiece, or byte-level BPE). As in transformers, special tokens that a text
    spells out are special tokens for a `spiece.model`, unless `split_special_tokens` is stored.

    Args:
        folder: the checkpoint.
        ids: `pad_token_id`, `bos_token_id` and `eos_token_id` of the model, which determine the
            pieces with these roles; None takes the names in `tokenizer_config.json`: BERT has no
            start and end tokens of a target, so its [CLS] and [SEP] serve.
        append_missing: for byte-level BPE: special tokens that the vocabulary lacks get ids after
            it. GPT-2 has a single one, for the end.

    Raises:
        ValueError: a file is damaged, or asks for what is not supported, such as tokens that were
            added to the vocabulary (except a separator that it lacks: there is none then).
    """
    options = _options(folder)
    try:
        if (folder / "spiece.model").is_file():
            tokenizer = _read_sentencepiece(folder / "spiece.model", options, ids)
        elif (folder / "vocab.txt").is_file():
            path = folder / "vocab.txt"
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            pieces = [line.rstrip("\r") for line in lines]
            tokenizer = _read_word_piece(path, pieces, options, ids)
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocab = read_json(folder / "vocab.json")
            if append_missing:
                vocab |= _added_tokens(folder, options, len(vocab))
            merges = folder / "merges.txt"
            tokenizer = _read_byte_pair(vocab, merges, options, ids, append_missing)
        elif (folder / "tokenizer.json").is_file():
            tokenizer = _read_tokenizer_json(folder, options, ids, append_missing)
        else:
            return None
        _refuse_added_tokens(folder, options, tokenizer)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder} should hold a tokenizer, but reading it failed: {first_line(error)} "
            "To use another one, in Python: from_huggingface(..., tokenizer=...)."
        ) from error
    return tokenizer


def write_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Writes the vocabulary and what `AutoTokenizer` needs to read it."""
    tokenizer.save_vocabulary(folder)
    config = tokenizer.get_config()
    names = {field: piece for field, piece in config.items() if field.endswith("_token")}
    # transformers would add what the vocabulary lacks, with ids that the model has no rows for.
    if tokenizer.sep_token_id is None:
        names["sep_token"] = None
    options = {"tokenizer_class": type(tokenizer).__name__, **names}
    if isinstance(tokenizer, BertTokenizer):
        if tokenizer.mask_token_id is None:
            options["mask_token"] = None
        options["cls_token"] = names["bos_token"]
        options["sep_token"] = names["sep_token"] or names["eos_token"]
        options["do_lower_case"] = tokenizer.lowercase
    else:
        options["split_special_tokens"] = tokenizer.split_special_tokens
        options["sp_model_kwargs"] = tokenizer.sp_model_kwargs
    write_json(folder / CONFIG, options)


def rows_by_piece(old: Tokenizer, new: Tokenizer) -> np.ndarray:
    """For each piece of `new`, the id that it has in `old`; -1 where it has none: int [V].

    Raises:
        ValueError: pieces of the two kinds are spelled differently.
    """
    if type(old) is not type(new):
        raise ValueError(
            f"tokenizer must be of the same kind as the checkpoint's, a {type(old).__name__}, to "
            f"find its pieces there, received a {type(new).__name__}."
        )
    ids = {piece: i for piece, i in old.get_vocab().items() if not piece.startswith("<unused ")}
    rows = np.full(new.vocab_size, -1)
    for piece, i in new.get_vocab().items():
        rows[i] = ids.get(piece, -1)
    for role in ("sep", "mask", "unk", "eos", "bos", "pad"):
        here, there = (getattr(tokenizer, f"{role}_token_id") for tokenizer in (new, old))
        if here is not None and there is not None:
            rows[here] = there
    return rows


def permuted_rows(matrix: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The rows of an embedding matrix in another order; -1 becomes the mean of all."""
    mean = matrix.mean(axis=0, keepdims=True, dtype=np.float64).astype(matrix.dtype)
    return np.where((rows >= 0)[:, np.newaxis], matrix[np.maximum(rows, 0)], mean)


def _options(folder: pathlib.Path) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name in (CONFIG, "special_tokens_map.json"):
        if (folder / name).is_file():
            options |= read_json(folder / name)
    return {
        field: value["content"] if isinstance(value, dict) and "content" in value else value
        for field, value in options.items()
    }


def _names(
    options: dict[str, Any], ids: dict[str, int] | None, pieces: Sequence[str]
) -> dict[str, str]:
    """The arguments of a tokenizer that name its special tokens."""
    names = {}
    for role in (*ROLES, "unk", "sep", "mask"):
        if isinstance(options.get(f"{role}_token"), str):
            names[f"{role}_token"] = options[f"{role}_token"]
    if ids is None:
        for role, theirs in (("bos", "cls"), ("eos", "sep")):
            if isinstance(options.get(f"{theirs}_token"), str):
                names.setdefault(f"{role}_token", options[f"{theirs}_token"])
        return names
    for role in ROLES:
        token = ids[f"{role}_token_id"]
        if token >= len(pieces):
            raise ValueError(
                f"{role}_token_id is {token}, but the vocabulary has {len(pieces)} pieces."
            )
        names[f"{role}_token"] = pieces[token]
    return names


def _read_sentencepiece(
    source: pathlib.Path | bytes, options: dict[str, Any], ids: dict[str, int] | None
) -> BertGenerationTokenizer:
    content = source if isinstance(source, bytes) else source.read_bytes()
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    except Exception as error:  # protobuf and sentencepiece raise classes of their own
        raise ValueError(f"{source} is not a SentencePiece model.") from error
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    names = {"unk_token": processor.id_to_piece(processor.unk_id())}
    names |= _names(options, ids, pieces)
    names.pop("mask_token", None)
    return BertGenerationTokenizer(
        content,
        **names,
        # transformers' default, which is not ours.
        split_special_tokens=options.get("split_special_tokens") or False,
        sp_model_kwargs=options.get("sp_model_kwargs"),
    )


def _read_word_piece(
    vocabulary: pathlib.Path | Sequence[str],
    pieces: Sequence[str],
    options: dict[str, Any],
    ids: dict[str, int] | None,
) -> BertTokenizer:
    lowercase = options.get("do_lower_case", True)
    allowed = {**_BERT_OPTIONS, "strip_accents": (None, lowercase)}
    problems = [
        f"{field}={options[field]!r}"
        for field, values in allowed.items()
        if field in options and options[field] not in values
    ]
    if problems:
        raise ValueError(f"BertTokenizer does not support {', '.join(problems)}.")
    names = _names(options, ids, pieces)
    return BertTokenizer(vocabulary, lowercase=lowercase, **names)


def _read_byte_pair(
    vocab: dict[str, int],
    merges: pathlib.Path | Sequence[str],
    options: dict[str, Any],
    ids: dict[str, int] | None,
    append_missing: bool = False,
) -> BertGenerationTokenizer:
    pieces = {i: piece for piece, i in vocab.items()}
    if append_missing:
        names = _distinct_names(vocab, options)
        control_tokens = sorted(_specials_of(vocab, options) - set(names.values()))
    else:
        names = _names(options, ids, [pieces.get(i, "") for i in range(len(pieces))])
        mask = names.pop("mask_token", "<mask>")
        names.pop("sep_token", None)
        control_tokens = [mask] if mask in vocab else []
    content = sentencepiece_from_byte_pair(
        vocab,
        merges,
        add_prefix_space=bool(options.get("add_prefix_space")),
        control_tokens=control_tokens,
        append_missing=append_missing,
        **names,
    )
    return BertGenerationTokenizer(content, **names)


def _distinct_names(vocab: dict[str, int], options: dict[str, Any]) -> dict[str, str]:
    """Distinct tokens for pad, bos, eos and unk, from the vocabulary where it has them.

    GPT-2 has "<|endoftext|>" for all: it stays the end token, and the others are new.
    """
    names = {"eos_token": options.get("eos_token") or "<|endoftext|>"}
    if names["eos_token"] not in vocab:
        raise ValueError(f"The vocabulary lacks the end token, {names['eos_token']!r}.")
    for role, default in (("pad", "<pad>"), ("bos", "<s>"), ("unk", "<unk>")):
        token = options.get(f"{role}_token")
        taken = token not in vocab or token in names.values()
        names[f"{role}_token"] = default if taken else token
    return names


def _specials_of(vocab: dict[str, int], options: dict[str, Any]) -> set[str]:
    added = (options.get("added_tokens_decoder") or {}).values()
    found = {token["content"] for token in added} | {options.get("mask_token")}
    return {token for token in found if token in vocab}


def _added_tokens(folder: pathlib.Path, options: dict[str, Any], size: int) -> dict[str, int]:
    """The tokens that come after a vocabulary of `size`, with their ids."""
    added = {
        token["content"]: int(i) for i, token in (options.get("added_tokens_decoder") or {}).items()
    }
    if (folder / "added_tokens.json").is_file():
        added |= read_json(folder / "added_tokens.json")
    return {token: i for token, i in added.items() if i >= size}


def _read_tokenizer_json(
    folder: pathlib.Path,
    options: dict[str, Any],
    ids: dict[str, int] | None,
    append_missing: bool,
) -> Tokenizer:
    values = read_json(folder / "tokenizer.json")
    model = values["model"]
    if append_missing:  # what was added to the vocabulary is here
        added = {str(token["id"]): token for token in values.get("added_tokens") or []}
        options = {**options, "added_tokens_decoder": added}
    if model.get("type") == "BPE" and "ByteLevel" in str(values["pre_tokenizer"]):
        merges = [line if isinstance(line, str) else " ".join(line) for line in model["merges"]]
        # With the first line of merges.txt, so that it becomes the same model.
        merges = ["#version: 0.2", *merges]
        vocab = model["vocab"]
        if append_missing:
            vocab = vocab | _added_tokens(folder, options, len(vocab))
        return _read_byte_pair(vocab, merges, options, ids, append_missing)
    if model.get("type") == "WordPiece":
        pieces = sorted(model["vocab"], key=model["vocab"].get)
        if [model["vocab"][piece] for piece in pieces] != list(range(len(pieces))):
            raise ValueError("The ids in tokenizer.json have gaps.")
        normalizer = values.get("normalizer") or {}
        options = {
            **options,
            "do_lower_case": normalizer.get("lowercase", True),
            "strip_accents": normalizer.get("strip_accents"),
            "tokenize_chinese_chars": normalizer.get("handle_chinese_chars"),
            "wordpieces_prefix": model.get("continuing_subword_prefix"),
        }
        return _read_word_piece(pieces, pieces, options, ids)
    raise ValueError(
        f"tokenizer.json holds a {model.get('type')} model; WordPiece and byte-level BPE can be "
        "read."
    )


def _refuse_added_tokens(
    folder: pathlib.Path, options: dict[str, Any], tokenizer: Tokenizer
) -> None:
    added = {
        int(i): token["content"] for i, token in (options.get("added_tokens_decoder") or {}).items()
    }
    if (folder / "added_tokens.json").is_file():
        added |= {i: token for token, i in read_json(folder / "added_tokens.json").items()}
    beyond = [token for i, token in sorted(added.items()) if i >= tokenizer.vocab_size]
    # transformers adds the separator that a vocabulary lacks; the model has no row for it.
    if tokenizer.sep_token_id is None:
        separator = options.get("sep_token", "<::::>")
        beyond = [token for token in beyond if token != separator]
    if beyond:
        raise ValueError(
            f"Tokens were added that the vocabulary lacks: {', '.join(map(repr, beyond[:6]))}."
        )
