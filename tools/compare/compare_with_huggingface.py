"""Runs a Hugging Face checkpoint in transformers and in bertgen_tf, and prints the differences.

    ./tools/compare_with_huggingface FOLDER

FOLDER holds a BertGeneration encoder-decoder, encoder or decoder, a BERT or RoBERTa encoder,
or a GPT-2.
Exit status: 0, 1 if beyond the tolerance, 2 if it cannot be compared. Needs transformers and torch:
pip install -e '.[compare]'
"""

import argparse
import sys
from importlib import metadata

import bertgen_tf as bg
from bertgen_tf.checkpoints import huggingface
from bertgen_tf.checkpoints.huggingface import comparison


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        help="of hidden states and logits, times their greatest absolute value if that is above "
        "1 (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random ids")
    arguments = parser.parse_args(argv)
    try:
        kind = huggingface.kind_of(arguments.folder)
        model = {
            "encoder-decoder": bg.EncoderDecoderModel,
            "encoder": bg.BertGenerationEncoder,
            "decoder": bg.BertGenerationDecoder,
        }[kind].from_huggingface(arguments.folder)
        checks = comparison.compare_with_huggingface(
            model, arguments.folder, tolerance=arguments.tolerance, seed=arguments.seed
        )
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    versions = [
        f"{name} {metadata.version(name)}" for name in ("transformers", "torch", "tensorflow")
    ]
    print(f"{arguments.folder}: {kind}, {', '.join(versions)}")
    for check in checks:
        print(f"  {'ok  ' if check.passed else 'FAIL'} {check.name}: {check.result}")
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
