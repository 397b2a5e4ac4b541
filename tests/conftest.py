"""What several test modules share: tiny models, of pairwise different dimensions."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import contextlib
import io
import json
import string
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import keras
import numpy as np
import pytest
import sentencepiece
import tensorflow as tf
from make_hub_module import make_hub_module, variable_sources
from safetensors.numpy import save_file

import bertgen_tf as bg
from bertgen_tf.cli import main as cli

SHARED = Path(__file__).resolve().parent.parent / ".." / "shared"

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


@pytest.fixture(scope="session")
def hub_module(tmp_path_factory) -> str:
    """The folder of a tiny TF Hub BERT encoder."""
    folder = tmp_path_factory.mktemp("hub")
    make_hub_module(write_checkpoint(folder / "checkpoint"), folder / "module")
    return str(folder / "module")


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


@pytest.fixture(scope="session")
def spiece() -> bytes:
    """A tiny SentencePiece model, with special ids where nobody would guess them."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*CORPUS, " ".join(WORDS), "an owl, a fox; quick!"] * 4),
        model_writer=model,
        vocab_size=47,
        pad_id=3,
        unk_id=1,
        bos_id=0,
        eos_id=2,
        pad_piece="<pad>",
        user_defined_symbols=["<::::>"],
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def write_once(tmp_path_factory):
    """`write_once(name, write)`: a new path that `write` got, once for all processes of a run."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def write_once(name: str, write: Callable[[Path], object]) -> Path:
        path = folder / f"shared-{name}" / "1"
        path.parent.mkdir(exist_ok=True)
        with filelock.FileLock(folder / f"shared-{name}.lock"):
            if not path.exists():
                write(path)
        return path

    return write_once


@pytest.fixture(scope="session")
def shared_export(write_once) -> tuple[bg.EncoderDecoderModel, Path]:
    """A model and its export by `EXPORT_OPTIONS`, with the signatures `FURTHER`. Read-only."""
    model = make_small_model("all", max_source_length=20)
    further = {name: bg.GenerationConfig(**options) for name, options in FURTHER.items()}

    def write(path: Path) -> None:
        # The check would run what is run by the tests.
        bg.export_saved_model(model, path, signatures=further, check=False, **EXPORT_OPTIONS)

    return model, write_once("export", write)


@pytest.fixture(scope="session")
def model() -> bg.EncoderDecoderModel:
    """Read-only: tests that train or change a model make their own."""
    return make_deep_model()


SLOW = 20  # seconds


def pytest_terminal_summary(terminalreporter) -> None:
    """Names the tests that should be marked `slow`; the machine may be busy, so none fails."""
    missing = [
        f"{report.duration:.0f} s {report.nodeid}"
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        if report.when == "call" and report.duration > SLOW and "slow" not in report.keywords
    ]
    if missing:
        terminalreporter.section(f"more than {SLOW} s and not marked slow")
        for line in missing:
            terminalreporter.write_line(line)
