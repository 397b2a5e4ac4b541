"""Writes tests/data/golden_preset.zip: tiny models in our own format, and the logits they give.

    python tools/make_golden_preset.py

The names of classes and attributes decide the paths in model.weights.h5, so renaming one would
make the presets that users have unreadable. A test loads these folders to notice it. Run this again
only after a change of the format that is meant, and say so where users read of it.

There is one preset for each way of sharing weights; zipped, because such a small .h5 file is mostly
zeros. golden.npz holds the inputs and, under the name of each preset, the logits.
"""

import argparse
import pathlib
import shutil
import tempfile
from typing import Any

import numpy as np

import bertgen_tf as bg

ARCHIVE = pathlib.Path(__file__).resolve().parent.parent / "tests/data/golden_preset.zip"
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "bird", "##s", "sang", "."]
INPUTS = {
    "input_ids": [[4, 5, 7, 8], [5, 6, 0, 0]],
    "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
    "decoder_input_ids": [[2, 5, 7], [2, 4, 0]],
    "decoder_attention_mask": [[1, 1, 1], [1, 1, 0]],
}


def make_model(sharing: str, **changes: Any) -> bg.EncoderDecoderModel:
    """One layer a side, and no weight at its initial value.

    Args:
        sharing: of the decoder.
        **changes: fields of the config.
    """
    config = bg.BertGenerationConfig(
        vocab_size=len(PIECES),
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=3,
        max_position_embeddings=5,
        layer_norm_eps=1e-6,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    ).replace(**changes)
    encoder = bg.BertGenerationEncoder(config)
    decoder = bg.BertGenerationDecoder(
        config.replace(add_cross_attention=True),
        encoder=None if sharing == "none" else encoder,
        sharing=sharing,
    )
    rng = np.random.default_rng(0)
    for variable in {id(v): v for v in (*encoder.weights, *decoder.weights)}.values():
        variable.assign(rng.normal(variable.name == "gamma", 0.5, variable.shape))
    return bg.EncoderDecoderModel(
        encoder,
        decoder,
        bg.BertTokenizer(PIECES),
        generation_config=bg.GenerationConfig(max_new_tokens=4, num_beams=2),
    )


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    inputs = {name: np.array(values, np.int32) for name, values in INPUTS.items()}
    golden = dict(inputs)
    with tempfile.TemporaryDirectory() as folder:
        for sharing in ("none", "word_embeddings", "all"):
            model = make_model(sharing)
            model.save_to_preset(pathlib.Path(folder, sharing))
            golden[sharing] = model(inputs).numpy()
        np.savez(pathlib.Path(folder, "golden.npz"), **golden)
        shutil.make_archive(str(ARCHIVE.with_suffix("")), "zip", folder)
    print(f"wrote {ARCHIVE}, {ARCHIVE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
