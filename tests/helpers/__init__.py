"""What several test modules share: tiny models, of pairwise different dimensions."""

import contextlib
import json
import string
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from make_hub_module import variable_sources
from safetensors.numpy import save_file

import bertgen_tf as bg
from bertgen_tf.cli import main as cli
from bertgen_tf.export import files as export_files

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
# Data and modules that are not part of the repository: tests that need them are skipped.
SHARED = ROOT / ".." / "shared"

WORDS = "the a man woman bird house old young saw found and but who sang left".split()
PIECES = (
    ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    + list(".,;'-!?")
    + list(string.ascii_lowercase)
    + [f"##{letter}" for letter in string.ascii_lowercase]
    + WORDS[:1]
    + WORDS[2:]
    + ["##ing", "##s"][:1]
)
CORPUS = [
    "the old man saw a house, and the bird sang.",
    "a young woman found birds but left!",
    "who sang?",
]
# Of `shared_export`: without its favourites a random model has an answer of its own to each text.
EXPORT_OPTIONS = {
    "num_beams": 3,
    "max_new_tokens": 9,
    "suppress_tokens": tuple(range(13)),
    "no_repeat_ngram_size": 1,
}
# Its further signatures.
FURTHER = {
    "brief": {"max_new_tokens": 4},
    "drawn": {
        "do_sample": True,
        "seed": 4,
        "top_k": 0,
        "num_return_sequences": 2,
        "max_new_tokens": 5,
    },
}
HUB_CONFIG = {
    "model_type": "bert",
    "vocab_size": len(PIECES),
    "hidden_size": 12,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 26,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
}


def write_checkpoint(folder: Path, pieces=PIECES, seed: int = 0, **changes) -> Path:
    """A BERT encoder with random weights, as a HuggingFace folder."""
    config = {**HUB_CONFIG, **changes}
    rng = np.random.default_rng(seed)
    hidden = config["hidden_size"]
    tensors = {}
    for source, shape in variable_sources(config).values():
        if len(shape) == 3 or (len(shape) == 2 and source.endswith(".bias")):
            shape = (hidden, hidden) if source.endswith("weight") else (hidden,)
        elif len(shape) == 2 and "embeddings" not in source:
            shape = shape[::-1]  # PyTorch's layout: [out, in]
        centre = 1.0 if "LayerNorm.weight" in source else 0.0
        tensors[source] = rng.normal(centre, 0.4, shape).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    return folder


def make_model(
    sharing: str = "none",
    seed: int = 1,
    make_tokenizer=lambda: bg.BertTokenizer(list(PIECES)),
    layers: tuple[int, int] = (1, 2),
    **kwargs,
) -> bg.EncoderDecoderModel:
    """A random model whose weights are large enough to disagree about tokens."""
    keras.utils.set_random_seed(seed)
    tokenizer = make_tokenizer()
    encoder_config = bg.BertGenerationConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=12,
        num_hidden_layers=layers[0],
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=26,
        initializer_range=0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    decoder_config = encoder_config.replace(add_cross_attention=True)
    if sharing != "all":
        decoder_config = decoder_config.replace(
            num_hidden_layers=layers[1], num_attention_heads=4, max_position_embeddings=22
        )
    encoder = bg.BertGenerationEncoder(encoder_config)
    decoder = bg.BertGenerationDecoder(
        decoder_config, encoder=None if sharing == "none" else encoder, sharing=sharing
    )
    for variable in (*encoder.weights, *decoder.weights):
        if variable.name in ("bias", "beta", "output_bias"):  # zeros hide mistakes
            variable.assign(np.random.default_rng(seed).normal(0, 0.3, variable.shape))
    return bg.EncoderDecoderModel(encoder, decoder, tokenizer, **kwargs)


def make_deep_model(*args, **kwargs) -> bg.EncoderDecoderModel:
    """Of two and three layers, where their number matters."""
    return make_model(*args, **kwargs, layers=(2, 3))


def make_small_model(*args, **kwargs) -> bg.EncoderDecoderModel:
    """Of one layer in each stack: faster to trace and to compile, where depth is no matter."""
    return make_model(*args, **kwargs, layers=(1, 1))


def write_bare_export(model: bg.EncoderDecoderModel, path: Path, **further) -> Path:
    """What `from_export` reads of an export: without its graphs, which take seconds to trace.

    Args:
        further: fields of its metadata.json.
    """
    module = tf.Module()
    module.weights = [weight.value for weight in model.weights]
    tf.saved_model.save(module, str(path))
    export_files.write_settings(path, model, model.generation_config)
    files = export_files.describe_files(path)
    metadata = {"versions": {"bertgen_tf": "0.1.0"}, "files": files, **further}
    (path / "metadata.json").write_text(json.dumps(metadata))
    return path


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Runs functions without tracing them: faster for what runs once, of a few tokens."""
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(False)


def fails(capsys, *arguments) -> str:
    """The one line of an error of the user."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bertgen-tf: error: ")
    assert captured.err.count("\n") == 1
    return captured.err
