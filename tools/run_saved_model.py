"""Runs an exported model on lines of text, the way a server would: without bertgen_tf.

    echo "a text" | python tools/run_saved_model.py saved_models/NAME/VERSION

Reads one text a line from standard input and writes one JSON object a line: input, text, score.
A SavedModel is a program, which can read and write files: run those that you trust.
"""

import argparse
import json
import sys

import tensorflow as tf
import tensorflow_text  # noqa: F401 (registers the tokenizer's operations)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="the SavedModel: saved_models/NAME/VERSION")
    parser.add_argument("--signature", default="serving_default")
    parser.add_argument("--batch-size", type=int, default=32)
    arguments = parser.parse_args()

    texts = [line.rstrip("\n") for line in sys.stdin]
    exported = tf.saved_model.load(arguments.folder)  # the signature uses its variables
    generate = exported.signatures[arguments.signature]
    for start in range(0, len(texts), arguments.batch_size):
        batch = texts[start : start + arguments.batch_size]
        result = generate(text=tf.constant(batch))
        for source, text, score in zip(
            batch, result["text"].numpy(), result["score"].numpy(), strict=True
        ):
            answer = {"input": source, "text": text.decode(), "score": round(float(score), 4)}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
