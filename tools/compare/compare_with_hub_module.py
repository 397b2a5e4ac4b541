"""Runs an encoder-decoder module of TF Hub and what bertgen_tf makes of it on the same texts.

    ./tools/compare_with_hub_module MODULE TEXTS

MODULE is a folder, a .tar.gz file or a URL; TEXTS a file with a text a line: its first column if
there are tabs. Prints which answers are equal, and how long the module, our compiled graph and our
plain graph take for them: medians of rounds in which the three take turns, after one round that is
not counted. Exit status: 0, 1 if answers differ, 2 if it cannot be compared. Empty lines are left
out: in a batch with other texts a module's answer to them is not defined.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable

import tensorflow as tf
import tensorflow_hub

import bertgen_tf as bg
from bertgen_tf.checkpoints.hub.fetch import resolve


def read_texts(path: str, count: int) -> list[str]:
    with open(path, encoding="utf-8") as file:
        texts = (line.rstrip("\n").split("\t")[0] for line in file)
        return list(itertools.islice((text for text in texts if text.strip()), count))


def in_batches(function: Callable, texts: list[str], size: int) -> list[str]:
    return [
        answer
        for start in range(0, len(texts), size)
        for answer in function(texts[start : start + size])
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("module")
    parser.add_argument("texts")
    parser.add_argument("--original", help="which of bertgen_tf.hub.ORIGINALS the module is")
    parser.add_argument("--count", type=int, default=200, help="texts (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="timed (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if min(arguments.count, arguments.batch_size, arguments.rounds) < 1:
        parser.error("--count, --batch-size and --rounds must be at least 1")
    try:
        texts = read_texts(arguments.texts, arguments.count)
        if not texts:
            raise ValueError(f"{arguments.texts} should hold a text a line, but is empty")
        model = bg.EncoderDecoderModel.from_hub(
            arguments.module, original=arguments.original, verify=False
        )
        module = tensorflow_hub.load(resolve(arguments.module))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    signature = module.signatures["default"]
    (key,) = signature.structured_input_signature[1]
    (answer,) = signature.structured_outputs

    def run_module(batch: list[str]) -> list[str]:
        strings = signature(**{key: tf.constant(batch)})[answer].numpy()
        return [string.decode() for string in strings]

    sides = {
        "module": run_module,
        "XLA": model.generate,
        "plain graph": lambda batch: model.generate(batch, jit_compile=False),
    }
    size = arguments.batch_size
    answers = {name: in_batches(function, texts, size) for name, function in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, function in sides.items():
            start = time.perf_counter()
            in_batches(function, texts, size)
            seconds[name].append(time.perf_counter() - start)

    print(f"{arguments.module}: {len(texts)} texts in batches of {size}")
    all_equal = True
    for name in list(sides)[1:]:
        pairs = list(zip(texts, answers["module"], answers[name], strict=True))
        differing = [pair for pair in pairs if pair[1] != pair[2]]
        all_equal &= not differing
        print(f"  {name}: {len(pairs) - len(differing)} of {len(pairs)} answers equal")
        for text, theirs, ours in differing[:3]:
            print(f"    to {text!r}\n      module {theirs!r}\n      ours   {ours!r}")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        milliseconds = 1000 * median / len(texts)
        ratio = medians["module"] / median
        print(f"  {name:12}{milliseconds:9.2f} ms a text, {ratio:5.2f} times the module's speed")
    return 0 if all_equal else 1


if __name__ == "__main__":
    sys.exit(main())
