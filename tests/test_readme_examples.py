"""The Python examples of the READMEs run, with tiny models for the checkpoints that they name."""

import hashlib
import json
import shutil
from pathlib import Path

import keras
import make_tf1_module
import numpy as np
import pytest
from make_hub_module import make_hub_module
from safetensors.numpy import save_file

import bertgen_tf as bg
from tests.helpers import CORPUS, write_bare_export, write_checkpoint
from tests.helpers.documents import all_blocks
from tests.helpers.serving_exports import write_upper_export

# What is in an example that does not run here, and why.
NOT_RUN = {
    "import apache_beam": "Apache Beam has an environment of its own: tests/test_beam.py",
    "bg.export_saved_model(": "an export takes 20 seconds: tests/test_export.py",
}
# What an example needs that is not always installed.
NEEDS = {"bleu": "sacrebleu", "bertgen_tf.serving.client": "urllib3", "import grpc": "grpc"}
MODULE = "path/or/url/of/a/tf_hub_bert_module"
ORIGINAL = "https://tfhub.dev/google/bertseq2seq/roberta24_bbc/1"
# Few layers, as each is traced anew in each example; 64 tokens are generated somewhere.
SIZES = {"num_hidden_layers": 1, "max_position_embeddings": 80}
SMALLER = {"encoder_layers=6": "encoder_layers=1"}
TARGETS = ["the old man saw a house. the bird sang.", "a young woman left!", "the man sang."]


def _write_gpt2(folder: Path) -> None:
    """A random GPT-2 whose tokens are bytes, and the end of a text."""
    hidden, layers = 12, 1
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [256 + i for i in range(256 - len(printable))]
    pieces = [*map(chr, printable + others), "<|endoftext|>"]
    shapes = {"wte.weight": (len(pieces), hidden), "wpe.weight": (80, hidden)}
    norms = ["ln_f"]
    for i in range(layers):
        norms += [f"h.{i}.ln_1", f"h.{i}.ln_2"]
        for name, inputs, outputs in [
            ("attn.c_attn", hidden, 3 * hidden),
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", hidden, 20),
            ("mlp.c_proj", 20, hidden),
        ]:
            shapes |= {f"h.{i}.{name}.weight": (inputs, outputs), f"h.{i}.{name}.bias": (outputs,)}
    for name in norms:
        shapes |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    config = {"model_type": "gpt2", "vocab_size": len(pieces), "n_embd": hidden, "n_head": 3}
    config |= {"n_layer": layers, "n_inner": 20, "n_positions": 80}
    config |= {"bos_token_id": len(pieces) - 1, "eos_token_id": len(pieces) - 1}
    end = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(end))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, spiece) -> Path:
    """A folder where the examples find what they name."""
    folder = tmp_path_factory.mktemp("examples")
    bert = write_checkpoint(folder / "google-bert/bert-base-cased", **SIZES)
    make_hub_module(bert, folder / MODULE)
    shutil.copytree(bert, folder / "path/to/bert")
    _write_gpt2(folder / "openai-community/gpt2")
    cached = folder / "cache" / hashlib.sha1(ORIGINAL.encode()).hexdigest()
    make_tf1_module.make_shared_original(cached, spiece, num_layers=1, decode_length=6)
    model = bg.EncoderDecoderModel.from_hub(
        encoder=str(folder / MODULE), generation_config=bg.GenerationConfig(max_new_tokens=6)
    )
    model.save_to_preset(folder / "my_model")
    write_bare_export(model, folder / "saved_models/my_model/1")
    model.save_to_huggingface(folder / "path/to/folder")
    (folder / "sources.txt").write_text("".join(f"{text}\n" for text in CORPUS))
    pairs = zip(CORPUS, TARGETS, strict=True)
    (folder / "train.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in pairs))
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Path:
    return write_upper_export(tmp_path_factory.mktemp("upper") / "1")


@pytest.fixture
def place(folder, tmp_path, monkeypatch) -> None:
    """In a folder of its own; nothing is compiled, which takes longer than all the rest."""
    shutil.copytree(folder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "here/cache"))
    plain = {"jit_compile": False}
    changes = dict.fromkeys(("generate", "stream", "iterate"), plain)
    changes["compile"] = {**plain, "run_eagerly": True}
    for name, options in changes.items():
        method = getattr(bg.EncoderDecoderModel, name)

        def changed(*args, _method=method, _options=options, **kwargs):
            return _method(*args, **{**kwargs, **_options})

        monkeypatch.setattr(bg.EncoderDecoderModel, name, changed)


@pytest.fixture
def addresses(request, served):
    """The servers that an example asks, by the strings it has for them."""
    text = request.node.callspec.params["block"].text
    kinds = {
        '"http://localhost:8501"': ("RestServer", "my_model"),
        '"localhost:8500"': ("GrpcServer", "sentence_splitting"),
    }
    found = {address: kind for address, kind in kinds.items() if address in text}
    if not found:
        yield {}
        return
    pytest.importorskip("grpc")
    from tests.helpers import serving_servers

    ((address, (kind, name)),) = found.items()
    with getattr(serving_servers, kind)(serving_servers.Served(served, name)) as server:
        yield {address: repr(server.url.removeprefix("grpc://"))}


def _runs(block) -> bool:
    return not any(part in block.text for part in NOT_RUN)


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in all_blocks("python") if _runs(b)], ids=str)
def test_example_runs(block, place, addresses):
    for part, package in NEEDS.items():
        if part in block.text:
            pytest.importorskip(package)
    text = block.text
    for theirs, ours in {**SMALLER, **addresses}.items():
        text = text.replace(theirs, ours)
    keras.utils.set_random_seed(0)
    # Of no names: an example defines what it uses.
    exec(compile(text, str(block), "exec"), {"__name__": "__main__"})


def test_what_does_not_run_is_there():
    for part, reason in NOT_RUN.items():
        assert any(part in block.text for block in all_blocks("python")), (part, reason)
