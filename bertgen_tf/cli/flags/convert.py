"""The flags of `bertgen-tf convert`."""

import argparse
from typing import Any

from bertgen_tf.cli.flags.common import add_warm_start
from bertgen_tf.data import folders


def add_command(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser(
        "convert",
        help="convert TF Hub modules, Hugging Face checkpoints, exports and presets",
        description="Writes a TF Hub module, a Hugging Face checkpoint or an export as a preset, "
        "or a preset\nas a Hugging Face folder. Shows what was read, and runs both sides to see "
        "that they agree.",
        epilog="""\
sources:
  a TF Hub module  a folder, a .tar.gz or a URL: an original (google/bertseq2seq/*), or a BERT
                   encoder, which becomes the start of an encoder-decoder
  Hugging Face     a folder, or a name such as org/name: an encoder-decoder or an encoder, of
                   BertGeneration, BERT or RoBERTa
  an export        NAME/VERSION, what export wrote
  a preset         what this command or finetune saved; becomes a Hugging Face folder

examples:
  bertgen-tf convert path/to/bertseq2seq_module my_model
  bertgen-tf convert saved_models/sentence_splitting/1 my_splitter --dequantize
  bertgen-tf convert my_model my_huggingface_model""",
    )
    parser.add_argument("source", metavar="SOURCE", help="what to read")
    parser.add_argument(
        "target", metavar="TARGET", help="folder to write: new, empty, or of the same kind"
    )
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="convert without running anything"
    )
    parser.add_argument(
        "--original",
        metavar="NAME",
        help="which of the originals a module is, such as roberta24_bbc, if it does not contain "
        "all that is needed",
    )
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="make the matrices of an int8 export or preset float32, so that finetune can train it "
        "and Hugging Face has a format for it",
    )
    add_warm_start(parser.add_argument_group("a BERT encoder as the start of both sides"))


def check(arguments: argparse.Namespace) -> None:
    """Finds what is wrong with the flags, at once.

    Raises:
        OSError: what the user can fix.
    """
    # Whether it may be replaced depends on what it will be.
    folders.check_writable(arguments.target, lambda folder: True, "a model")
