"""The export answers like the model: in a fresh process, moved, and on a server without XLA."""

import json
import os
import shutil
import subprocess
import sys

import keras
import pytest
import tensorflow as tf
from conftest import make_model
from tensorflow.core.protobuf import saved_model_pb2

import bertgen_tf as bg
from bertgen_tf import export

TEXTS = [
    "the man saw a bird, who sang.",
    "",
    "old house",
    "a young woman left the house and found a bird " * 200,
    "über 😀 café",
]
OPTIONS = {"num_beams": 3, "max_new_tokens": 9}

# Runs where bertgen_tf cannot be imported, and prints text, score and error of each signature.
PROGRAM = """
import ctypes, json, os, sys
sys.modules["bertgen_tf"] = None
path, no_xla = sys.argv[1], sys.argv[2] == "no_xla"
import tensorflow as tf
import tensorflow_text
if no_xla:
    library = os.path.join(os.path.dirname(tf.__file__), "libtensorflow_cc.so.2")
    ctypes.CDLL(library)._ZN10tensorflow21DisableXlaCompilationEv()
loaded = tf.saved_model.load(path)
texts = json.load(sys.stdin)
results = {}
for name, signature in loaded.signatures.items():
    try:
        out = signature(text=tf.constant([t.encode() for t in texts] + [b"\\xff\\xfe bird"]))
        results[name] = {
            "text": [t.decode() for t in out["text"].numpy()],
            "score": out["score"].numpy().tolist(),
            "empty": signature(text=tf.constant([], tf.string))["text"].shape.as_list(),
        }
    except tf.errors.OpError as error:
        results[name] = {"error": error.message}
print("RESULT " + json.dumps(results))
"""


@pytest.fixture(scope="module", params=["float32", "int8"])
def exported(request, tmp_path_factory):
    """What the model answered, and its export in another place than it was written to."""
    folder = tmp_path_factory.mktemp("export")
    model = make_model("all", max_source_length=20)
    if request.param == "int8":
        model.quantize("int8")
    path = bg.export_saved_model(model, folder / "name/1", **OPTIONS)
    answers = model.generate(TEXTS, **OPTIONS)
    ids = model.preprocessor.generate_preprocess(TEXTS)
    scores = model.generate({k: v.numpy() for k, v in ids.items()}, **OPTIONS).scores[:, 0]
    del model
    shutil.move(path, folder / "moved")
    (folder / "name").rmdir()
    return folder / "moved", answers, scores


def run(path, mode):
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, path, mode],
        input=json.dumps(TEXTS),
        capture_output=True,
        text=True,
        cwd=path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.split("RESULT ")[1])


def check(result, answers, scores):
    assert result["text"][:-1] == answers
    assert result["score"][:-1] == pytest.approx(scores.tolist(), abs=1e-4)
    assert len(result["text"]) == len(TEXTS) + 1
    assert result["empty"] == [0]


def test_fresh_process_gives_the_same_text(exported):
    path, answers, scores = exported
    result = run(path, "xla")
    assert set(result) == {"serving_default", "generate_xla"}
    check(result["serving_default"], answers, scores)
    check(result["generate_xla"], answers, scores)


def test_stock_server_without_xla(exported):
    path, answers, scores = exported
    result = run(path, "no_xla")
    check(result["serving_default"], answers, scores)
    assert "XLA compilation disabled" in result["generate_xla"]["error"]


def reachable(library, nodes):
    """Every node that these nodes run, through any number of functions."""
    functions = {f.signature.name: f for f in library.function}
    todo, seen = list(nodes), set()
    while todo:
        node = todo.pop()
        yield node
        for attr in node.attr.values():
            for name in (attr.func.name, *(f.name for f in attr.list.func)):
                if name in functions and name not in seen:
                    seen.add(name)
                    todo += functions[name].node_def


def check_ops(path):
    proto = saved_model_pb2.SavedModel()
    proto.ParseFromString((path / "saved_model.pb").read_bytes())
    (meta_graph,) = proto.meta_graphs
    graph = meta_graph.graph_def
    compiled = {}
    for name, signature in meta_graph.signature_def.items():
        if name.startswith("__"):
            continue
        output = signature.outputs["text"].name.split(":")[0]
        nodes = [node for node in graph.node if node.name == output]
        ops = list(reachable(graph.library, nodes))
        assert len(ops) > 100
        compiled[name] = [
            node.op for node in ops if node.op.startswith("Xla") or node.attr["_XlaMustCompile"].b
        ]
    assert compiled["serving_default"] == []
    assert compiled["generate_xla"] != []
    # A function that no signature runs must not bring one either.
    for function in graph.library.function:
        assert not [n.op for n in function.node_def if n.op.startswith("Xla")]


def test_serving_default_has_no_xla_op_anywhere(exported):
    check_ops(exported[0])


def only_words(logits, ids, step):
    """Bans the special tokens, marks and letters: every draw is a word."""
    return tf.where(tf.range(tf.shape(logits)[-1]) < 65, -1e7, logits)


def test_samples_are_drawn_anew_at_every_call(tmp_path):
    """Also where a seed of TensorFlow was set, and after a restart of the server."""
    model = make_model("all")
    keras.utils.set_random_seed(3)
    path = tmp_path / "1"
    options = {"do_sample": True, "top_k": 0, "temperature": 2.0, "max_new_tokens": 6}
    bg.export_saved_model(model, path, logits_processor=[only_words], **options)
    check_ops(path)
    drawn = []
    for _ in range(2):
        signature = tf.saved_model.load(str(path)).signatures["serving_default"]
        for _ in range(2):
            drawn += signature(text=tf.constant(TEXTS[:1] * 3))["text"].numpy().tolist()
    words = {word for text in drawn for word in text.decode().split()}
    assert len(words) > 3 and all(len(word) > 2 for word in words - {"a"})
    assert len(set(drawn)) == 12


def test_samples_with_a_seed_are_those_of_generate(model):
    options = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 6, "seed": 5}
    config = bg.GenerationConfig(**options)
    serve = export._serving_function(model, config, (), jit_compile=False)
    expected = model.generate(TEXTS[:3], jit_compile=False, **options)
    for _ in range(2):
        assert [t.decode() for t in serve(tf.constant(TEXTS[:3]))["text"].numpy()] == expected
    assert model.generate(TEXTS[:3], jit_compile=False, **{**options, "seed": 6}) != expected


def test_signature_is_the_wire_contract(exported):
    signature = tf.saved_model.load(str(exported[0])).signatures["serving_default"]
    (text,) = signature.structured_input_signature[1].values()
    assert (text.name, text.dtype, text.shape.as_list()) == ("text", tf.string, [None])
    outputs = signature.structured_outputs
    assert {k: (v.dtype, v.shape.as_list()) for k, v in outputs.items()} == {
        "text": (tf.string, [None]),
        "score": (tf.float32, [None]),
    }


def test_errors_write_nothing(tmp_path, model):
    with pytest.raises(ValueError, match='must end in an integer version.*Use ".*name/1"'):
        bg.export_saved_model(model, tmp_path / "name")
    (tmp_path / "name/3").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="must be a new version"):
        bg.export_saved_model(model, tmp_path / "name/3")
    with pytest.raises(ValueError, match="max_new_tokens must not exceed"):
        bg.export_saved_model(model, tmp_path / "name/4", max_new_tokens=300)
    silent = bg.EncoderDecoderModel(model.encoder, model.decoder)
    with pytest.raises(ValueError, match="must have a tokenizer to be exported"):
        bg.export_saved_model(silent, tmp_path / "name/4")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["3", "name"]


def test_an_export_that_fails_leaves_nothing(tmp_path, model, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("disk full")

    monkeypatch.setattr(tf.saved_model, "save", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        bg.export_saved_model(model, tmp_path / "name/1", max_new_tokens=5)
    assert list((tmp_path / "name").iterdir()) == []
