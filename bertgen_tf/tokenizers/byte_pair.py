"""Byte-level BPE vocabularies (GPT-2, RoBERTa) as SentencePiece models with the same ids."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from bertgen_tf.tokenizers.interface import read_file

SPACE = "\u2581"
# Characters that get a piece with their own spelling, the space first: see `_byte_pieces`.
_READABLE = [ord(" "), *range(ord("!"), 0x7F), ord("\n"), ord("\t"), ord("\r")]
# GPT-2 splits them off words; each of its other tokens has characters of one kind only.
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def sentencepiece_from_byte_pair(
    vocab: str | os.PathLike | Mapping[str, int],
    merges: str | os.PathLike | Iterable[str],
    *,
    add_prefix_space: bool = False,
    pad_token: str = "<pad>",
    bos_token: str = "<s>",
    eos_token: str = "</s>",
    unk_token: str = "<unk>",
    control_tokens: Sequence[str] = ("<mask>",),
    append_missing: bool = False,
) -> bytes:
    r"""Turns a byte-level BPE into a SentencePiece model that gives the same ids.

    `BertGenerationTokenizer(proto)` then tokenizes as RoBERTa does, in the graph; the SentencePiece
    model of the BertGeneration originals is also GPT-2's BPE in this form. SentencePiece merges by
    the score of the result, BPE by the rank of the pair. The two agree if the text of every token
    is merged into that token, which holds for vocabularies made by BPE training.

    Differences, since SentencePiece does not split text into words before the merges:

    - GPT-2 treats 's, 't, 're, 've, 'm, 'll and 'd as words of their own only directly after a
      letter, a digit or a line end. Here these merges come last, which gives the same in prose,
      even after a single opening quotation mark, but can differ in "('so" and "'twas".
    - Merges of blanks come last as well, so that the last blank joins the word after it; two line
      ends before a word become one token if there is one.
    - A character without a token of its own is spelled in single bytes. The byte-level BPE may
      merge some of its bytes into tokens that are not text on their own: these ids never occur, nor
      do tokens of several characters that are merged from parts of characters only.
    - U+2581, SentencePiece's symbol for a space, is read as a space.

    If the vocabulary lacks some of the 256 single bytes, or has no tokens that are not text on
    their own, such a character becomes the unknown token instead.

    Args:
        vocab: path of `vocab.json`, or its content: token -> id, with ids 0 to n - 1.
        merges: path of `merges.txt`, or its lines, a pair of tokens each. A first line that starts
            with "#version" is skipped.
        add_prefix_space: whether to read a text as if a space preceded it. RoBERTa does not.
        pad_token, bos_token, eos_token, unk_token: special tokens; give the tokenizer the same
            ones. For GPT-2: `eos_token="<|endoftext|>", control_tokens=(), append_missing=True`.
        control_tokens: further tokens that no text contains.
        append_missing: give pad, bos, eos and unk tokens that the vocabulary lacks ids from n on,
            in this order. The embeddings then need as many further rows.

    Returns:
        The content of a `spiece.model`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: broken JSON, ids other than 0 to n - 1, characters that do not spell bytes,
            merges of unknown tokens, or a missing special token.
    """
    tokens = _read_vocab(vocab)
    roles = {"pad": pad_token, "bos": bos_token, "eos": eos_token, "unk": unk_token}
    if len(set(roles.values())) < len(roles):
        raise ValueError(f"The pad, bos, eos and unk tokens must be different; received {roles}.")
    known = set(tokens)
    missing = [token for token in (*roles.values(), *control_tokens) if token not in known]
    if append_missing:
        tokens += [token for token in roles.values() if token not in known]
        missing = [token for token in missing if token not in roles.values()]
    if missing:
        raise ValueError(
            f"`vocab` must contain every special token; not found: {', '.join(missing)}. Name them "
            "with the arguments *_token and control_tokens, or pass append_missing=True."
        )
    specials = {*roles.values(), *control_tokens}
    wrong = [token for token in tokens if token not in specials and _bytes(token) is None]
    if wrong:
        raise ValueError(
            "`vocab` must spell bytes as GPT-2 does; received "
            f"{', '.join(map(repr, wrong[:5]))}. List tokens that are not text in control_tokens."
        )
    ranks = _read_merges(merges, set(tokens))
    model = sentencepiece_model_pb2.ModelProto()
    _add_pieces(model, tokens, ranks, specials, unk_token)
    byte_fallback = _add_byte_pieces(model, tokens, specials)

    spec = model.trainer_spec
    spec.model_type = spec.BPE
    spec.vocab_size = len(model.pieces)
    spec.byte_fallback = byte_fallback
    for role, token in roles.items():
        setattr(spec, f"{role}_piece", token)
        setattr(spec, f"{role}_id", tokens.index(token))
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = add_prefix_space
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return model.SerializeToString()


def _add_pieces(
    model: Any, tokens: list[str], ranks: dict[str, int], specials: set[str], unk_token: str
) -> None:
    """Adds a piece for each token."""
    kinds = model.SentencePiece
    # Merges without a rank come last, and SentencePiece undoes those of unused pieces.
    last = max(ranks.values(), default=0) + 1
    unranked = float(-2 * last)
    for i, token in enumerate(tokens):
        if token in specials:
            kind = kinds.UNKNOWN if token == unk_token else kinds.CONTROL
            model.pieces.add(piece=token, score=0.0, type=kind)
            continue
        try:
            text = _bytes(token).decode("utf-8")
        except UnicodeDecodeError:
            text = ""
        if not text or SPACE in text or "\0" in text or text in specials:
            # No text contains it, and a control piece decodes to no text.
            model.pieces.add(piece=f"<unused {i}>", score=0.0, type=kinds.CONTROL)
            continue
        piece = text.replace(" ", SPACE)
        if len(piece) == 1:
            model.pieces.add(piece=piece, score=float(-ranks.get(token, 0)))
        elif token in ranks:
            late = text in _CONTRACTIONS or text.isspace()
            model.pieces.add(piece=piece, score=float(-ranks[token] - late * last))
        else:
            model.pieces.add(piece=piece, score=unranked, type=kinds.UNUSED)


def _add_byte_pieces(model: Any, tokens: list[str], specials: set[str]) -> bool:
    """Makes the model spell in bytes what it has no piece for, with the ids of the bytes' tokens.

    SentencePiece requires a piece `<0xE2>` for each of the 256 bytes. Bytes that are not characters
    get theirs at their own ids. Readable characters keep their spelling, and their byte pieces,
    which never occur, replace tokens that are not text on their own, the rarest first. If there are
    too few of these, the byte piece takes the character's own id, which is the same to a model. The
    space cannot do that: its piece is spelled differently.

    Returns:
        Whether the model has all 256 bytes.
    """
    ids = {
        data[0]: i
        for i, token in enumerate(tokens)
        if token not in specials and (data := _bytes(token)) and len(data) == 1
    }
    spare = [
        i
        for i, token in enumerate(tokens)
        if model.pieces[i].piece == f"<unused {i}>" and i not in ids.values()
    ]
    if len(ids) < 256 or not spare:
        return False
    for byte in _READABLE:
        if not spare:
            break
        ids[byte] = spare.pop()
    for byte, i in ids.items():
        model.pieces[i].piece = f"<0x{byte:02X}>"
        model.pieces[i].score = 0.0
        model.pieces[i].type = model.SentencePiece.BYTE
    return True


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as Latin-1, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _bytes(token: str) -> bytes | None:
    """The bytes that a token spells; None if a character of it spells none."""
    if not all(character in _ALPHABET for character in token):
        return None
    return bytes(_ALPHABET[character] for character in token)


def _read_vocab(vocab: str | os.PathLike | Mapping[str, int]) -> list[str]:
    """Returns the tokens in the order of their ids, checked."""
    where = "`vocab`"
    if isinstance(vocab, str | os.PathLike):
        where = f"`vocab` ({os.fspath(vocab)})"
        try:
            vocab = json.loads(read_file(vocab, "vocab").decode("utf-8"))
        except ValueError as error:  # from JSON or UTF-8
            raise ValueError(f"{where} must be a JSON file: {error}") from error
    if not isinstance(vocab, Mapping) or not vocab:
        raise ValueError(f"{where} must map tokens to ids; received {type(vocab).__name__}.")
    wrong = [f"{token!r}: {i!r}" for token, i in vocab.items() if type(i) is not int]
    if wrong:
        raise ValueError(f"{where} must map tokens to integers; received {', '.join(wrong[:5])}.")
    by_id = {i: token for token, i in vocab.items()}
    absent = [i for i in range(len(vocab)) if i not in by_id]
    if absent:
        raise ValueError(
            f"{where} must have the ids 0 to {len(vocab) - 1}, each once, for its {len(vocab)} "
            f"tokens; no token has {', '.join(map(str, absent[:5]))}."
        )
    return [by_id[i] for i in range(len(vocab))]


def _read_merges(merges: str | os.PathLike | Iterable[str], known: set[str]) -> dict[str, int]:
    """Returns the rank of each token that a merge makes, checked."""
    where = "`merges`"
    if isinstance(merges, str | os.PathLike):
        where = f"`merges` ({os.fspath(merges)})"
        try:
            merges = read_file(merges, "merges").decode("utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} must be a UTF-8 text file: {error}") from error
    ranks: dict[str, int] = {}
    for i, line in enumerate(merges):
        line = line.rstrip("\r")
        if not line or (i == 0 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise ValueError(f"{where} must hold two tokens a line; line {i + 1} is {line!r}.")
        unknown = [token for token in (*pair, "".join(pair)) if token not in known]
        if unknown:
            raise ValueError(
                f"{where} must name tokens of `vocab`; line {i + 1}, {line!r}, needs "
                f"{', '.join(map(repr, unknown))}. The two files must belong together."
            )
        ranks.setdefault("".join(pair), len(ranks))
    return ranks
