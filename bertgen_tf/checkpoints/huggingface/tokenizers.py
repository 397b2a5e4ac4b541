"""The tokenizer files of Hugging Face checkpoints, in and out."""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import sentencepiece

from bertgen_tf.checkpoints.huggingface.files import OWN, read_json, write_json
from bertgen_tf.checkpoints.huggingface.tokenizer_json import (
    BERT_WORDS,
    FLAGS,
    FREE_CLASSES,
    bert_options,
    check_byte_level,
    word_piece_options,
    write_word_piece,
)
from bertgen_tf.checks import first_line
from bertgen_tf.tokenizers import BertGenerationTokenizer, BertTokenizer
from bertgen_tf.tokenizers.byte_pair import sentencepiece_from_byte_pair

Tokenizer = BertTokenizer | BertGenerationTokenizer

CONFIG = "tokenizer_config.json"
JSON = "tokenizer.json"
ROLES = ("pad", "bos", "eos")
_BERT_SPECIALS = {
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
    "unk_token": "[UNK]",
    "pad_token": "[PAD]",
}
_BERT_ROLES = {
    **{f"{role}_token": token for role, token in (("bos", "[CLS]"), ("eos", "[SEP]"))},
    **{field: token for field, token in _BERT_SPECIALS.items() if field != "cls_token"},
}
_BYTE_PAIR_ROLES = {
    "pad_token": "<pad>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}
# What Hugging Face strips from the ends of the lines of a vocab.txt.
_SPACES = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in "\x1c\x1d\x1e\x1f")


def read_tokenizer(
    folder: pathlib.Path,
    ids: dict[str, int] | None,
    *,
    rows: int | None = None,
    append_missing: bool = False,
) -> Tokenizer | None:
    """The tokenizer of a checkpoint, or None if it has no file for one.

    `spiece.model` is read first, then `tokenizer.json` (WordPiece, or byte-level BPE), `vocab.txt`
    and `vocab.json` with `merges.txt`. Texts are read as transformers 5 does: normalizer,
    pre-tokenizer and added tokens are followed, or refused by name, and special tokens that a text
    spells out are special unless `split_special_tokens` is stored. Classes of transformers such as
    `BertTokenizer` do what their options in `tokenizer_config.json` say, and so do we; what only
    `tokenizer.json` says, and such a class would not do, is an error.

    Args:
        folder: the checkpoint.
        ids: `pad_token_id`, `bos_token_id` and `eos_token_id` of the model, which determine the
            pieces with these roles; None takes the names in `tokenizer_config.json`: BERT has no
            start and end tokens of a target, so its [CLS] and [SEP] serve.
        rows: how many pieces the model knows, if the checkpoint has a model.
        append_missing: for byte-level BPE: special tokens that the vocabulary lacks get ids after
            it. GPT-2 has a single one, for the end.

    Raises:
        ValueError: a file is damaged, or asks for what is not supported. Tokens may be added to a
            WordPiece vocabulary, if the model knows them, and not to others. A separator or a mask
            that transformers added does not count: there is none then.
    """
    try:
        options = _options(folder)
        if (folder / "spiece.model").is_file():
            tokenizer = _read_sentencepiece(folder / "spiece.model", options, ids)
        elif (folder / JSON).is_file():
            tokenizer = _read_tokenizer_json(folder, options, ids, rows, append_missing)
        elif (folder / "vocab.txt").is_file():
            own = options.get(OWN)
            normalization = own.get("normalization") if isinstance(own, Mapping) else None
            if _is_older(folder, options):
                normalization = "tf_hub"
            pieces = _read_lines(folder / "vocab.txt", strip=normalization is None)
            keywords = bert_options(options)
            if normalization is not None:  # as `write_tokenizer` stores it
                keywords["normalization"] = normalization
            tokenizer = _read_word_piece(pieces, options, ids, rows, **keywords)
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocab = read_json(folder / "vocab.json")
            if append_missing:
                vocab |= _appended(options, len(vocab))
            merges = folder / "merges.txt"
            tokenizer = _read_byte_pair(vocab, merges, options, ids, append_missing)
        else:
            return None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder} should hold a tokenizer, but reading it failed: {first_line(error)} "
            "To use another one, in Python: from_huggingface(..., tokenizer=...)."
        ) from error
    return tokenizer


def _is_older(folder: pathlib.Path, options: Mapping[str, Any]) -> bool:
    """Whether our `save_to_huggingface` wrote the folder when there was one normalization only."""
    config = folder / "config.json"
    ours = config.is_file() and OWN in read_json(config)
    return ours and "split_special_tokens" not in options


def write_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Writes the vocabulary and what `AutoTokenizer` needs to read it.

    A WordPiece tokenizer with options that a `vocab.txt` has no place for becomes a
    `tokenizer.json`. Hugging Face has no place for the normalization "tf_hub": transformers then
    reads texts with its own, and we find ours under the key "bertgen_tf".
    """
    config = tokenizer.get_config()
    names = {field: piece for field, piece in config.items() if field.endswith("_token")}
    # transformers would add what the vocabulary lacks, with ids that the model has no rows for.
    if tokenizer.sep_token_id is None:
        names["sep_token"] = None
    options = {
        "tokenizer_class": type(tokenizer).__name__,
        **names,
        "split_special_tokens": tokenizer.split_special_tokens,
    }
    if isinstance(tokenizer, BertTokenizer):
        if tokenizer.mask_token_id is None:
            options["mask_token"] = None
        options["cls_token"] = names["bos_token"]
        options["sep_token"] = names["sep_token"] or names["eos_token"]
        options["do_lower_case"] = tokenizer.lowercase
        options["strip_accents"] = tokenizer.strip_accents
        options["tokenize_chinese_chars"] = tokenizer.tokenize_chinese_chars
        by_class = isinstance(tokenizer.normalization, str) and (
            (tokenizer.pre_tokenizer, tokenizer.max_input_chars_per_word) == BERT_WORDS
        )
        stripped = any(piece != piece.rstrip(_SPACES) for piece in tokenizer.get_vocab())
        if tokenizer.normalization == "tf_hub":
            options[OWN] = {"normalization": "tf_hub"}
            tokenizer.save_vocabulary(folder)
        elif by_class and not tokenizer.added_tokens and not stripped:
            tokenizer.save_vocabulary(folder)
        else:
            if not by_class:
                options["tokenizer_class"] = FREE_CLASSES[0]
            write_json(folder / JSON, write_word_piece(tokenizer))
    else:
        tokenizer.save_vocabulary(folder)
        options["sp_model_kwargs"] = tokenizer.sp_model_kwargs
        index = tokenizer.get_vocab()
        options["added_tokens_decoder"] = {
            str(index[token["content"]]): {**token, "single_word": False}
            for token in tokenizer.added_tokens
        }
        if not options["added_tokens_decoder"]:
            del options["added_tokens_decoder"]
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
    """What the files say, tokens by their spelling; "added": dictionaries of all added tokens."""
    options: dict[str, Any] = {}
    for name in (CONFIG, "special_tokens_map.json"):
        if (folder / name).is_file():
            options |= read_json(folder / name)
    decoder = options.get("added_tokens_decoder") or {}
    added = [{"id": int(i), **token} for i, token in decoder.items()]
    if (folder / "added_tokens.json").is_file():
        known = {token["content"] for token in added}
        more = read_json(folder / "added_tokens.json").items()
        added += [{"id": i, "content": token} for token, i in more if token not in known]
    special = []
    for field, value in options.items():
        if field in ("additional_special_tokens", "extra_special_tokens"):
            special += value.values() if isinstance(value, dict) else value or []
        elif isinstance(value, dict) and "content" in value:
            special.append(value)
    for value in special:
        token = {"content": value} if isinstance(value, str) else value
        same = [other for other in added if other["content"] == token["content"]]
        if same:
            same[0].setdefault("special", True)
        else:
            added.append({**token, "special": True})
    flat = {
        field: value["content"] if isinstance(value, dict) and "content" in value else value
        for field, value in options.items()
    }
    return {**flat, "added": added}


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


def _added_tokens(
    options: dict[str, Any], pieces: Sequence[str], size: int, lacks: Sequence[str]
) -> tuple[list[str], list[dict[str, Any]]]:
    """The tokens that stand for themselves in a text.

    Args:
        options: of the checkpoint.
        pieces: the vocabulary.
        size: how many pieces there may be with those that come after the vocabulary.
        lacks: tokens that transformers adds to a vocabulary, whether or not the model knows them:
            if it does not, there are none.

    Returns:
        The tokens that come after the vocabulary, and all of them with their options.

    Raises:
        ValueError: there are others, or options that cannot be followed.
    """
    index = {piece: i for i, piece in enumerate(pieces)}
    tokens, wrong = [], []
    for token in sorted(options["added"], key=lambda token: token.get("id", sys.maxsize)):
        content = token["content"]
        if content in lacks and content not in index and len(index) >= size:
            continue
        i = index.setdefault(content, len(index))
        if i >= max(size, len(pieces)) or token.get("id", i) != i:
            wrong.append(content)
        if token.get("single_word"):
            raise ValueError(f"The added token {content!r} has single_word=True, unlike ours.")
        tokens.append({"content": content, **{f: token[f] for f in FLAGS[:-1] if f in token}})
    if wrong:
        raise ValueError(
            f"Tokens were added that the vocabulary lacks: {', '.join(map(repr, wrong[:6]))}."
        )
    return list(index)[len(pieces) :], tokens


def _further(tokens: list[dict[str, Any]], roles: Sequence[str]) -> list[dict[str, Any]]:
    """The added tokens that are more than special tokens with a role."""
    unusual = [
        token
        for token in tokens
        if token["content"] not in roles
        or not token.get("special")
        or any(token.get(name) for name in FLAGS[1:])
    ]
    return [{"special": False, **token} for token in unusual]


def _read_sentencepiece(
    source: pathlib.Path, options: dict[str, Any], ids: dict[str, int] | None
) -> BertGenerationTokenizer:
    content = source.read_bytes()
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    except Exception as error:  # protobuf and sentencepiece raise classes of their own
        raise ValueError(f"{source} is not a SentencePiece model.") from error
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    names = {"unk_token": processor.id_to_piece(processor.unk_id())}
    names |= _names(options, ids, pieces)
    names.pop("mask_token", None)
    # transformers adds the separator that a vocabulary lacks; the model has no row for it.
    separator = options.get("sep_token", "<::::>")
    _, added = _added_tokens(options, pieces, len(pieces), [separator])
    roles = [*names.values(), separator]
    return BertGenerationTokenizer(
        content,
        **names,
        # transformers' default, which is not that of the TF Hub originals.
        split_special_tokens=options.get("split_special_tokens") or False,
        sp_model_kwargs=options.get("sp_model_kwargs"),
        added_tokens=_further(added, roles),
    )


def _read_lines(path: pathlib.Path, *, strip: bool) -> list[str]:
    """The pieces of a vocab.txt, with `strip` as Hugging Face reads them."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} should be a UTF-8 text file: {error}") from error
    lines = [line.rstrip("\r") for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    # A piece that is white space and nothing else keeps its id.
    return [line.rstrip(_SPACES) or line for line in lines] if strip else lines


def _read_word_piece(
    pieces: Sequence[str],
    options: dict[str, Any],
    ids: dict[str, int] | None,
    rows: int | None,
    **keywords: Any,
) -> BertTokenizer:
    lacks = [options.get(field, _BERT_SPECIALS[field]) for field in ("sep_token", "mask_token")]
    size = sys.maxsize if rows is None else rows
    new, added = _added_tokens(options, pieces, size, lacks)
    pieces = [*pieces, *new]
    names = _names(options, ids, pieces)
    split = options.get("split_special_tokens")
    if keywords["normalization"] == "tf_hub":
        further = added
    else:
        split = split or False
        specials = {} if options.get("tokenizer_class") in FREE_CLASSES else _BERT_SPECIALS
        specials = [options.get(field, specials.get(field)) for field in _BERT_SPECIALS]
        listed = [token["content"] for token in added]
        added += [
            {"content": token, "special": True}
            for token in specials
            if token in pieces and token not in listed
        ]
        further = _further(added, {**_BERT_ROLES, **names}.values())
    return BertTokenizer(
        pieces, **names, **keywords, added_tokens=further, split_special_tokens=split
    )


def _read_tokenizer_json(
    folder: pathlib.Path,
    options: dict[str, Any],
    ids: dict[str, int] | None,
    rows: int | None,
    append_missing: bool,
) -> Tokenizer:
    values = read_json(folder / JSON)
    model = values["model"]
    added = values.get("added_tokens") or []
    listed = {token["content"] for token in added}
    more = [token for token in options["added"] if token["content"] not in listed]
    options = {**options, "added": [*added, *more]}
    # Older files do not name the type.
    guess = "BPE" if "merges" in model else "WordPiece"
    kind = model.get("type") or (guess if "continuing_subword_prefix" in model else None)
    if kind == "BPE":
        options["add_prefix_space"] = check_byte_level(values, options)
        merges = [line if isinstance(line, str) else " ".join(line) for line in model["merges"]]
        # With the first line of merges.txt, so that it becomes the same model.
        merges = ["#version: 0.2", *merges]
        vocab = model["vocab"]
        if append_missing:
            vocab = vocab | _appended(options, len(vocab))
        return _read_byte_pair(vocab, merges, options, ids, append_missing)
    if kind == "WordPiece":
        pieces = sorted(model["vocab"], key=model["vocab"].get)
        if [model["vocab"][piece] for piece in pieces] != list(range(len(pieces))):
            raise ValueError("The ids in tokenizer.json have gaps.")
        return _read_word_piece(pieces, options, ids, rows, **word_piece_options(values, options))
    raise ValueError(
        f"tokenizer.json holds a {kind} model; WordPiece and byte-level BPE can be read."
    )


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
    else:
        names = _names(options, ids, [pieces.get(i, "") for i in range(len(pieces))])
        names.pop("mask_token", None)
        names.pop("sep_token", None)
    listed = {token["content"] for token in options["added"]}
    mask = options.get("mask_token") or "<mask>"
    if mask in vocab and mask not in listed:
        options = {**options, "added": [*options["added"], {"content": mask, "special": True}]}
    lacks = [options.get("sep_token", "<::::>"), *names.values()]
    pieces = [pieces[i] for i in sorted(pieces)]
    _, added = _added_tokens(options, pieces, len(pieces), lacks)
    further = _further(added, {**_BYTE_PAIR_ROLES, **names}.values())
    content = sentencepiece_from_byte_pair(
        vocab,
        merges,
        add_prefix_space=bool(options.get("add_prefix_space")),
        control_tokens=[t["content"] for t in further if t["content"] not in names.values()],
        append_missing=append_missing,
        **names,
    )
    return BertGenerationTokenizer(
        content,
        **names,
        added_tokens=further,
        split_special_tokens=options.get("split_special_tokens") or False,
    )


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


def _appended(options: dict[str, Any], size: int) -> dict[str, int]:
    """The tokens that come after a vocabulary of `size`, with their ids."""
    added = {token["content"]: token["id"] for token in options["added"] if "id" in token}
    return {token: i for token, i in added.items() if i >= size}
