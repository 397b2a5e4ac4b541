"""Compares how a checkpoint's in-graph tokenizer and that of transformers cut texts.

    ./tools/compare_tokenizers FOLDER TEXTS...
    ./tools/compare_tokenizers FOLDER TEXTS... --spiece spiece.model

FOLDER is a Hugging Face checkpoint, or only its tokenizer's files: a BERT, a RoBERTa or a GPT-2,
whose byte-level BPE runs as a SentencePiece model in the graph. TEXTS are files of UTF-8 lines.
With --spiece, the tokenizer of a BertGeneration original is compared with a GPT-2 in FOLDER: its
ids are GPT-2's for the text after a space, plus 101.

Prints how many texts are cut the same and the first few others. Exit status: 0, 1 if a text
differs, 2 if it cannot be compared. Needs transformers: pip install -e '.[compare]'
"""

import argparse
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf

import bertgen_tf as bg
from bertgen_tf.checkpoints.huggingface import tokenizers as huggingface_tokenizers
from bertgen_tf.checkpoints.huggingface.files import read_json

BATCH = 512
# Where the ids of GPT-2 begin in the vocabulary of the originals.
OFFSET = 101


def read_texts(paths: Iterable[str]) -> Iterator[str]:
    """The lines of files."""
    for path in paths:
        with open(path, encoding="utf-8", newline="\n") as file:
            yield from (line.rstrip("\r\n") for line in file)


def load_theirs(folder: pathlib.Path) -> Any:
    """The tokenizer of transformers."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


def load_ours(folder: pathlib.Path) -> Any:
    """The tokenizer that runs in the graph."""
    config = folder / "config.json"
    kind = read_json(config).get("model_type") if config.is_file() else None
    # GPT-2 lacks what RoBERTa has.
    tokenizer = huggingface_tokenizers.read_tokenizer(
        folder, None, append_missing=kind != "roberta"
    )
    if tokenizer is None:
        raise ValueError(f"{folder} should hold a tokenizer, but has no tokenizer files.")
    return tokenizer


def differences(
    ours: Any, theirs: Any, texts: Iterable[str], offset: int = 0
) -> Iterator[tuple[str, list[int], list[int]] | None]:
    """For each text None, or the text and the ids of both if these differ.

    Args:
        ours: called in a graph.
        theirs: a tokenizer of transformers.
        offset: subtracted from our ids; with one, theirs reads a space before the text.
    """
    in_graph = tf.function(
        lambda batch: ours(batch), input_signature=[tf.TensorSpec([None], tf.string)]
    )
    texts = iter(texts)
    while batch := list(itertools.islice(texts, BATCH)):
        mine = in_graph(tf.constant(batch)).to_list()
        read = [f" {text}" for text in batch] if offset else batch
        yours = theirs(read, add_special_tokens=False)["input_ids"]
        for text, one, two in zip(batch, mine, yours, strict=True):
            one = [i - offset for i in one]
            yield None if one == two else (text, one, two)


def report(
    found: Iterable[tuple[str, list[int], list[int]] | None],
    names: tuple[Callable[[list[int]], list[str]], Callable[[list[int]], list[str]]],
    shown: int,
) -> int:
    """Prints the result; returns how many texts differ.

    Args:
        found: what `differences` gives.
        names: our pieces for ids, and theirs.
        shown: for how many texts to print the place where the two begin to differ.
    """
    total = different = not_ascii = 0
    places = []
    for difference in found:
        total += 1
        if difference is None:
            continue
        different += 1
        text, *ids = difference
        cut = [pieces_of(side) for pieces_of, side in zip(names, ids, strict=True)]
        not_ascii += not text.isascii()
        if len(places) < shown:
            same = sum(
                1
                for _ in itertools.takewhile(
                    lambda pair: pair[0] == pair[1], zip(*ids, strict=False)
                )
            )
            places.append((text, [side[max(same - 3, 0) : same + 5] for side in cut]))
    print(f"{total - different} of {total} texts are cut the same")
    if different:
        # There byte-level BPE has tokens of half characters, see
        # `bertgen_tf.tokenizers.byte_pair`.
        print(f"{not_ascii} of the other {different} have characters beyond ASCII")
    for text, (here, there) in places:
        print(f"  {text if len(text) < 90 else text[:87] + '...'}")
        print(f"    here         ... {' '.join(here)}")
        print(f"    transformers ... {' '.join(there)}")
    return different


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("texts", nargs="+", help="files of lines")
    parser.add_argument("--spiece", help="the SentencePiece model of an original")
    parser.add_argument(
        "--show", type=int, default=5, help="differing texts (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    offset = 0 if arguments.spiece is None else OFFSET
    try:
        theirs = load_theirs(arguments.folder)
        if arguments.spiece is None:
            ours = load_ours(arguments.folder)
        else:
            ours = bg.BertGenerationTokenizer(arguments.spiece)
        names = (
            lambda ids: ours.convert_ids_to_tokens([i + offset for i in ids]),
            theirs.convert_ids_to_tokens,
        )
        found = differences(ours, theirs, read_texts(arguments.texts), offset)
        return 1 if report(found, names, arguments.show) else 0
    except ImportError as error:
        print(f"error: {error}: pip install -e '.[compare]'", file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
