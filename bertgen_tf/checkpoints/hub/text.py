"""Where text goes into an original and comes out: its tokenizer, its source, what it shows.

Ops on strings other than the tokenizer must be known; then these parts of the module are run, and
must give our ids for odd texts and our text for all ids. Bytes that are not UTF-8 are not compared:
our tokenizers may read them differently.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import sentencepiece
import tensorflow as tf

from bertgen_tf.checkpoints.hub.graph import SAME_VALUES, Graph, Node, Tensor
from bertgen_tf.checkpoints.hub.layers import gathers
from bertgen_tf.checkpoints.hub.modules import Module
from bertgen_tf.checks import first_line
from bertgen_tf.tokenizers import BertGenerationTokenizer, BertTokenizer
from bertgen_tf.tokenizers.preprocessing import Seq2SeqPreprocessor

Tokenizer = BertTokenizer | BertGenerationTokenizer

COMPARISONS = ("Equal", "NotEqual", "Greater", "GreaterEqual", "Less", "LessEqual")
PROBES = (
    "The old house by the river was sold again, and nobody knew why.",
    "Yes.",
    "A young woman found the letter that her father had hidden in the garden behind the house "
    "many years ago; she never told anyone what it said.",
)
# Texts on which tokenizers, or what may be done to text before them, differ.
ODD_TEXTS = (
    *PROBES,
    "\"Quotes\", 'single', `back` and ``LaTeX''; \u201ccurly\u201d \u2018ones\u2019",
    "\u00dcber K\u00f6ln, caf\u00e9, na\u00efve; STRA\u00dfE",
    "U\u0308ber Ko\u0308ln, cafe\u0301",
    "a line\nanother\ttab\r\nand  two  spaces ",
    " leading, a-b, a_b, 3.14 #.# $5 <b> & [x] {y} \\ | ~ ^ @ *",
    "\u6771\u4eac\u90fd abc \u043f\u0440\u0438\u0432\u0435\u0442",
    "an emoji \U0001f600 and \u2167 \ufb01 \uff21",
    "w" * 101 + " " + "v" * 100 + " " + "u" * 300,
    "<s> </s> <pad> <unk> [CLS] [SEP] [PAD] [UNK] <::::>",
)
_WORD_PIECE = {
    "suffix_indicator": b"##",
    "max_bytes_per_word": 100,
    "max_chars_per_token": 0,
    "use_unknown_token": True,
    "split_unknown_characters": False,
}
# Of tf_text.BertTokenizer: folding of case, accents, control characters.
_PATTERNS = (rb"\p{Mn}", rb"\p{Cc}|\p{Cf}")
_BERT_OPS = ("CaseFoldUTF8", "StringLower", "NormalizeUTF8", "RegexSplitWithOffsets")


@dataclasses.dataclass(frozen=True)
class Text:
    """The signature of a module: where text goes in and comes out, and the ids between."""

    input: str
    output: Tensor
    key: str
    answer: str
    source_ids: Tensor


def read_text(module: Module, graph: Graph, embeddings: str) -> Text:
    """Reads the signature; `embeddings` is the node of the source's word embeddings."""
    signature = module.signature("default")
    sides = (signature.inputs, signature.outputs)
    string = tf.string.as_datatype_enum
    if any(len(side) != 1 or next(iter(side.values())).dtype != string for side in sides):
        raise ValueError(
            f"{module.handle} should take and give strings, but its signature default takes "
            f"{', '.join(signature.inputs) or 'nothing'} and gives {', '.join(signature.outputs)}."
        )
    ((key, source),) = signature.inputs.items()
    ((answer, result),) = signature.outputs.items()
    text = graph.resolve(source.name)
    found = set()
    for _, ids in gathers(graph, embeddings):
        before = graph.before([ids])
        if text[0] in before and not graph.loop_variables & set(before):
            found.add(ids)
    if len(found) != 1:
        raise ValueError(
            f"{module.handle} should look the ids of its text up in its word embeddings once, but "
            f"does so at {len(found)} places."
        )
    return Text(source.name, graph.resolve(result.name), key, answer, found.pop())


def run_part(module: Module, graph: Graph, text: Text, tensor: Tensor) -> Callable:
    """Texts -> the value of a tensor of the module."""
    if tensor[0] not in graph.main:
        raise ValueError(
            f"{module.handle} should compute {tensor[0]} outside of functions, to be compared."
        )
    function = module.loaded.prune(text.input, f"{tensor[0]}:{tensor[1]}")

    def run(texts: list[str]) -> np.ndarray:
        try:
            return function(tf.constant(texts)).numpy()
        except tf.errors.OpError as error:
            raise ValueError(
                f"{module.handle} should compute {tensor[0]} for texts, but running it failed: "
                f"{first_line(error)}"
            ) from error

    return run


def read_ids(module: Module, graph: Graph, text: Text) -> Callable:
    """Texts -> the ids that the encoder looks up, [batch, length], even if it does so flat."""
    run = run_part(module, graph, text, text.source_ids)

    def read(texts: list[Any]) -> np.ndarray:
        ids = run(texts)
        if ids.ndim == 2 and len(ids) == len(texts):
            return ids
        if not ids.size or ids.size % len(texts):
            raise ValueError(
                f"{module.handle} should look up equally many ids for each text of a batch, but "
                f"looks up {ids.size} for {len(texts)}."
            )
        return ids.reshape(len(texts), -1)

    return read


def read_tokenizer(module: Module, graph: Graph, text: Text, ids: dict[str, int]) -> Tokenizer:
    """The tokenizer of the module; `ids` are those of its special tokens, by name.

    Raises:
        ValueError: it is not one of ours, or something else is done to text.
    """
    names = graph.before([text.source_ids])
    by_op = {graph.nodes[name].op: graph.nodes[name] for name in names}
    try:
        _check_strings(graph, text, by_op)
    except ValueError as error:
        raise ValueError(
            f"{module.handle} should do only what our tokenizers do to strings, but {error}."
        ) from error
    try:
        if "SentencepieceOp" in by_op:
            proto = by_op["SentencepieceOp"].attr["model"].s
            processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
            pieces = [processor.id_to_piece(i) for i in ids.values()]
            roles = dict(zip(("pad_token", "bos_token", "eos_token"), pieces, strict=True))
            return BertGenerationTokenizer(
                proto,
                unk_token=processor.id_to_piece(processor.unk_id()),
                split_special_tokens=True,
                **roles,
            )
        if "WordpieceTokenizeWithOffsets" in by_op:
            node = by_op["WordpieceTokenizeWithOffsets"]
            pieces = _read_table(module, graph, node.inputs[1])
            roles = dict(
                zip(
                    ("pad_token", "bos_token", "eos_token"),
                    (pieces[i] for i in ids.values()),
                    strict=True,
                )
            )
            return BertTokenizer(
                pieces,
                lowercase=bool({"CaseFoldUTF8", "StringLower"} & set(by_op)),
                unk_token=node.attr["unknown_token"].s.decode(),
                **roles,
            )
    except (IndexError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{module.handle} should hold its vocabulary, but reading it failed: "
            f"{first_line(error)}"
        ) from error
    strings = [n for n in names if "Token" in graph.nodes[n].op or "piece" in graph.nodes[n].op]
    raise ValueError(
        f"{module.handle} should tokenize with SentencepieceOp or WordpieceTokenizeWithOffsets, "
        f"but has {graph.ops_of(strings) or graph.ops_of(names)}."
    )


def _check_strings(graph: Graph, text: Text, by_op: dict[str, Node]) -> None:
    """Raises if strings are changed before the tokenizer or after the answer, unlike ours."""
    start = graph.resolve(text.input)
    if "SentencepieceTokenizeOp" in by_op:
        source = graph.source(by_op["SentencepieceTokenizeOp"].inputs[1], SAME_VALUES)
        if source != start:
            raise ValueError(
                f"{graph.op(source)} {source[0]} changes the text before SentencePiece"
            )
        end = graph.source(text.output, SAME_VALUES)
        if graph.op(end) != "SentencepieceDetokenizeOp":
            raise ValueError(f"{graph.op(end)} {end[0]} changes the text after SentencePiece")
    elif "WordpieceTokenizeWithOffsets" in by_op:
        node = by_op["WordpieceTokenizeWithOffsets"]
        for key, expected in _WORD_PIECE.items():
            value = getattr(node.attr[key], {bytes: "s", int: "i", bool: "b"}[type(expected)])
            if key in node.attr and value != expected:
                raise ValueError(f"{node.name} has {key} {value!r} instead of {expected!r}")
        for name in graph.before([node.inputs[0]]):
            step = graph.nodes[name]
            if start[0] not in graph.before([(name, 0)]) or name == start[0]:
                continue
            known = step.op in _BERT_OPS or step.op in SAME_VALUES
            if step.op == "StaticRegexReplace":
                known = step.attr["pattern"].s in _PATTERNS
            elif step.op == "RegexReplace":
                pattern = graph.constant(step.inputs[1])
                known = pattern is not None and pattern.item() in _PATTERNS
            if not known:
                raise ValueError(f"{step.op} {name} changes the text before WordPiece")


def _read_table(module: Module, graph: Graph, table: Tensor) -> list[str]:
    """The keys of a table from strings to ids, in the order of ids."""
    name = graph.source(table)[0]
    for node, index in graph.uses(name):
        if index == 0 and node.op.startswith("InitializeTableFromTextFile"):
            source = graph.source(node.inputs[1])
            path = module.asset(f"{source[0]}:{source[1]}")
            columns = (node.attr["key_index"].i, node.attr["value_index"].i)
            if path and columns == (-2, -1):  # whole lines, and their numbers
                # As TensorFlow reads it: lines end at \n alone, and \r is dropped everywhere.
                lines = pathlib.Path(path).read_bytes().decode().replace("\r", "").split("\n")
                return lines if lines[-1] else lines[:-1]
        elif index == 0 and node.op in ("InitializeTableV2", "LookupTableImportV2"):
            keys, ids = (graph.constant(tensor) for tensor in node.inputs[1:3])
            if keys is not None and ids is not None:
                pieces = dict(zip(ids.tolist(), keys.tolist(), strict=True))
                return [pieces[i].decode() for i in range(len(pieces))]
    raise ValueError(f"the table {name} is not filled from an asset or constants")


def read_source(
    handle: str, read: Callable, tokenizer: Tokenizer, positions: int
) -> tuple[int, dict[str, bool]]:
    """Which lengths and special tokens a source gets, by running that part of the module.

    Returns:
        The length to which sources are cut, at most `positions`; `add_bos` and `add_eos`.
    """

    def ours(text: Any) -> list[int]:
        return tokenizer(tf.constant([text])).to_list()[0]

    def differ(text: Any, theirs: list[int], mine: list[int]) -> ValueError:
        return ValueError(
            f"{handle} should read a text as our tokenizer does with its vocabulary, but its ids "
            f"of {text[:60]!r} are {_shortened(theirs)}, and ours {_shortened(mine)}."
        )

    short = PROBES[0]
    long = " ".join([short] * (2 * positions // max(len(ours(short)), 1) + 2))
    limit = len(cut := read([long])[0].tolist())
    # A text that is not cut shows the special tokens; one word, if the limit is that small.
    texts = [text for text in (short, "Yes", "a") if len(ours(text)) + 2 <= limit] or ["a"]
    theirs, mine = _unpadded(read([texts[0]])[0], tokenizer), ours(texts[0])
    for bos, eos in itertools.product((False, True), repeat=2):
        before, after = [tokenizer.bos_token_id] * bos, [tokenizer.eos_token_id] * eos
        if theirs == [*before, *mine, *after]:
            break
    else:
        raise differ(texts[0], theirs, mine)

    def expected(text: Any) -> list[int]:
        return [*before, *ours(text)[: limit - bos - eos], *after]

    if cut != expected(long):
        if cut == [*before, *ours(long), *after][:limit]:
            raise ValueError(
                f"{handle} should add its special tokens to a source that is already cut, but "
                "adds them first and then cuts them off."
            )
        raise differ(long, cut[-9:], expected(long)[-9:])
    for text in ODD_TEXTS:
        theirs = _unpadded(read([text])[0], tokenizer)
        if theirs != _unpadded(np.array(expected(text)), tokenizer):
            raise differ(text, theirs, expected(text))
    return min(limit, positions), {"add_bos": bos, "add_eos": eos}


def _unpadded(ids: np.ndarray, tokenizer: Tokenizer) -> list[int]:
    kept = np.flatnonzero(ids != tokenizer.pad_token_id)
    return ids[: kept[-1] + 1].tolist() if kept.size else []


def _shortened(ids: list[int]) -> str:
    return str(ids) if len(ids) <= 16 else f"{str(ids[:16])[:-1]}, ...]"


def check_answers(
    module: Module, graph: Graph, text: Text, ids: Tensor, preprocessor: Seq2SeqPreprocessor
) -> None:
    """Raises unless ids become the same text in the module as in ours.

    Args:
        module, graph, text: of the original.
        ids: those after the search.
        preprocessor: ours, with the module's settings.
    """
    tokenizer = preprocessor.tokenizer
    if ids[0] not in graph.main:
        raise ValueError(f"{module.handle} should show ids outside of functions, to be compared.")
    function = module.loaded.prune(f"{ids[0]}:{ids[1]}", f"{text.output[0]}:{text.output[1]}")
    # Every id, in an order that no text has; rows that end early. Unknown pieces too.
    order = np.random.default_rng(0).permutation(tokenizer.vocab_size)
    order = order[order != tokenizer.eos_token_id]
    rows = np.resize(order, (-(-len(order) // 12), 12))
    ended = rows[:4].copy()
    ended[:, 5] = tokenizer.eos_token_id
    rows = np.concatenate([rows, ended]).astype(function.inputs[0].dtype.as_numpy_dtype)
    try:
        theirs = function(tf.constant(rows)).numpy().tolist()
    except tf.errors.OpError as error:
        raise ValueError(
            f"{module.handle} should turn ids into text, but running that part failed: "
            f"{first_line(error)}"
        ) from error
    mine = preprocessor.generate_postprocess(rows).numpy().tolist()
    for row, answer, own in zip(rows.tolist(), theirs, mine, strict=True):
        if answer != own and answer.decode(errors="ignore").encode() == answer:
            raise ValueError(
                f"{module.handle} should turn ids into text as our tokenizer does, but of {row} it "
                f"makes {answer.decode()!r}, and ours {own.decode()!r}."
            )


def shown_ids(
    graph: Graph, output: Tensor, vocab_size: int, end: int
) -> tuple[Tensor, np.ndarray] | None:
    """The ids after the search, and which of them become text, from the mask applied to them."""
    found, problems = [], []
    for name in graph.before([output]):
        if graph.nodes[name].op == "Where":
            try:
                found.append(_masked_ids(graph, graph.nodes[name], vocab_size, end))
            except ValueError as error:  # of another mask, by which text is assembled
                problems.append(str(error))
    if not found and problems:
        raise ValueError(problems[0])
    if any(other[0] != found[0][0] or (other[1] != found[0][1]).any() for other in found):
        raise ValueError(f"{len(found)} different masks are applied to the ids")
    return found[0] if found else None


def _masked_ids(graph: Graph, where: Node, vocab_size: int, end: int) -> tuple[Tensor, np.ndarray]:
    mask = graph.source(where.inputs[0], SAME_VALUES)
    operands: dict[str, Tensor] = {}
    for name in graph.before([mask]):
        node = graph.nodes[name]
        for i in (0, 1) if node.op in COMPARISONS else ():
            value = graph.constant(node.inputs[i])
            other = graph.source(node.inputs[1 - i])
            if value is not None and value.dtype.kind in "iu":
                if graph.loop_variables & set(graph.before([other])):
                    operands[name] = other
    # The ids themselves, not what is counted from such comparisons of them.
    compared = {ids for ids in operands.values() if not set(operands) & set(graph.before([ids]))}
    if len(compared) != 1:
        raise ValueError(f"the ids are masked by {graph.ops_of(graph.before([mask])[:9])}")
    ids = compared.pop()
    integers = [np.int32, np.int64]
    for dtype in integers:
        try:
            each = graph.evaluate(mask, {ids: np.arange(vocab_size, dtype=dtype)[:, None]})
            other = int(np.argmax(each.ravel()))
            ended = graph.evaluate(mask, {ids: np.array([[other, end, other]], dtype)})
        except ValueError:
            if dtype == integers[-1]:
                raise
        else:
            break
    if ended.ravel().tolist() != [True, False, False]:
        raise ValueError(f"{where.name} also shows ids from the first end token on")
    return ids, each.reshape(vocab_size)
