"""The export answers like the model: in a fresh process, moved, and on a server without XLA."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

import bertgen_tf as bg
from bertgen_tf.export import signatures as export_signatures
from bertgen_tf.network import sources
from tests.helpers import EXPORT_OPTIONS as OPTIONS
from tests.helpers import FURTHER, PIECES, make_small_model

TEXTS = [
    "the man saw a bird, who sang.",
    "",
    "old house",
    "a young woman left the house and found a bird " * 200,
    "über 😀 café",
]
ODD = b"\xff\xfe bird"
BRIEF, DRAWN = (bg.GenerationConfig(**FURTHER[name]) for name in ("brief", "drawn"))
PLAIN = {"serving_default", "beams", "ids", "score", "attention", "tokens", "brief", "drawn"}
# Each compiled one takes a compilation more.
EMPTY = [*sorted(PLAIN - {"ids"}), "generate_xla"]
COMPILED = {"generate_xla", "beams_xla", "brief_xla", "drawn_xla"}
AGAIN = COMPILED | {"serving_default"}  # with XLA

# Runs where bertgen_tf cannot be imported; prints the outputs, or the error, of each request: first
# as a stock server does, without XLA, then those that it may change again, with it.
PROGRAM = """
import base64, ctypes, json, os, sys
sys.modules["bertgen_tf"] = None
path = sys.argv[1]
import tensorflow as tf
import tensorflow_text
library = ctypes.CDLL(os.path.join(os.path.dirname(tf.__file__), "libtensorflow_cc.so.2"))
library._ZN10tensorflow21DisableXlaCompilationEv()
loaded = tf.saved_model.load(path)
results, requests = [], json.load(sys.stdin)
again = [request for request in requests if request[0].endswith(("_xla", "_default"))]
for number, (name, inputs) in enumerate(requests + again):
    if number == len(requests):
        library._ZN10tensorflow20EnableXlaCompilationEv()
    texts = {k: [base64.b64decode(t) for t in v] for k, v in inputs.items() if k[0] != "="}
    tensors = {k: tf.constant(v, tf.string) for k, v in texts.items()}
    tensors |= {k[1:]: tf.constant(v, tf.int32) for k, v in inputs.items() if k[0] == "="}
    try:
        outputs = loaded.signatures[name](**tensors)
    except tf.errors.OpError as error:
        results.append(error.message)
        continue
    arrays = {k: v.numpy() for k, v in outputs.items()}
    decode = lambda v: v.decode() if isinstance(v, bytes) else [decode(x) for x in v]
    arrays = {k: v.tolist() if v.dtype != object else decode(v.tolist()) for k, v in arrays.items()}
    results.append(arrays)
print("RESULT " + json.dumps([sorted(loaded.signatures), results]))
"""


@pytest.fixture(scope="module", params=["float32", "int8"])
def exported(request, tmp_path_factory):
    """A model, and its export in another place than it was written to."""
    folder = tmp_path_factory.mktemp("export")
    if request.param == "float32":
        model, path = request.getfixturevalue("shared_export")
        shutil.copytree(path, folder / "moved")
        return model, folder / "moved"
    model = make_small_model("all", max_source_length=20)
    model.quantize("int8")
    path = bg.export_saved_model(
        model,
        folder / "name/1",
        signatures={name: bg.GenerationConfig(**one) for name, one in FURTHER.items()},
        check=False,
        **OPTIONS,
    )
    shutil.move(path, folder / "moved")
    (folder / "name").rmdir()
    return model, folder / "moved"


@pytest.fixture(scope="module")
def signatures(exported):
    return tf.saved_model.load(str(exported[1])).signatures


def encoded(texts):
    return [base64.b64encode(t if isinstance(t, bytes) else t.encode()).decode() for t in texts]


def requests(model):
    """A request of each signature, and empty ones."""
    texts = encoded([*TEXTS, ODD])
    ids = model.preprocessor.generate_preprocess(TEXTS)
    ids = {f"={name}": tensor.numpy().tolist() for name, tensor in ids.items()}
    pairs = {"source": texts, "target": texts[::-1]}
    inputs = {"ids": ids, "score": pairs}
    full = [(name, inputs.get(name, {"text": texts})) for name in sorted(PLAIN | COMPILED)]
    return full + [
        (name, {"source": [], "target": []} if name == "score" else {"text": []}) for name in EMPTY
    ]


def run(model, path):
    """The outputs of each signature: without XLA, of full requests and of empty ones; with it."""
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, path],
        input=json.dumps(requests(model)),
        capture_output=True,
        text=True,
        cwd=path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    names, results = json.loads(process.stdout.split("RESULT ")[1])
    assert set(names) == PLAIN | COMPILED
    names = [name for name, _ in requests(model)]
    results = iter(results)
    stock = list(zip(names, results, strict=False))
    again = list(zip([n for n in names if n in AGAIN], results, strict=True))
    full, full_again = len(PLAIN | COMPILED), len(AGAIN)
    return [dict(x) for x in (stock[:full], stock[full:], again[:full_again], again[full_again:])]


def close(found, expected):
    return np.allclose(np.array(found), expected, atol=1e-4)


def check(model, results, empty, names):
    """Compares with the model, signature by signature."""
    texts = tf.data.Dataset.from_tensor_slices([t.encode() for t in TEXTS] + [ODD])
    settings = {"output_scores": True, "jit_compile": False}
    every = model.generate(texts, num_return_sequences=3, **OPTIONS, **settings)
    best = [row[0] for row in every.texts]
    brief = model.generate(texts, BRIEF, **settings)
    drawn = model.generate(texts, DRAWN, **settings)
    expected = {
        "serving_default": (best, every.scores[:, 0]),
        "generate_xla": (best, every.scores[:, 0]),
        "attention": (best, every.scores[:, 0]),
        "beams": (every.texts, every.scores),
        "beams_xla": (every.texts, every.scores),
        "brief": (brief.texts, brief.scores[:, 0]),
        "brief_xla": (brief.texts, brief.scores[:, 0]),
        "drawn": (drawn.texts, drawn.scores),
        "drawn_xla": (drawn.texts, drawn.scores),
    }
    for name in names & set(expected):
        assert results[name]["text"] == expected[name][0], name
        assert close(results[name]["score"], expected[name][1]), name
        if name in EMPTY:
            assert (empty[name]["text"], empty[name]["score"]) == ([], []), name
    if "ids" in names:
        assert results["ids"]["sequences"] == every.sequences[:-1].tolist()
        assert close(results["ids"]["score"], every.scores[:-1])
    if "score" in names:
        check_scores(model, results["score"])
        assert empty["score"] == {"log_probability": [], "num_tokens": []}
    if "attention" in names:
        check_attention(model, results["attention"])
    if "tokens" in names:
        special = model.preprocessor.add_bos + model.preprocessor.add_eos
        counts = [len(model.tokenizer(text)) + special for text in [*TEXTS, ODD]]
        assert results["tokens"] == {"num_tokens": counts}
        assert empty["tokens"] == {"num_tokens": []}


def check_scores(model, found):
    """The sum of log-probabilities of the labels, by a forward pass of each pair."""
    for row, (source, target) in enumerate(zip(TEXTS[1:], TEXTS[::-1], strict=False), 1):
        x, labels, weights = model.preprocessor(source, target)
        x = {name: tensor[tf.newaxis] for name, tensor in x.items()}
        logits = np.array(model(x, training=False))[0].astype(np.float64)
        log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        chosen = log_probabilities[np.arange(len(labels)), labels.numpy()]
        count = int(weights.numpy().sum())
        assert found["num_tokens"][row] == count
        assert found["log_probability"][row] == pytest.approx(chosen[:count].sum(), abs=1e-3)


def check_attention(model, found):
    output = model.generate(TEXTS, output_attentions=True, jit_compile=False, **OPTIONS)
    weights = output.cross_attentions[:, 0].mean(axis=(1, 2))
    for row, text in enumerate(TEXTS):
        ids = model.preprocessor.encode_source([text])[0].numpy().tolist()
        pieces = model.tokenizer.convert_ids_to_tokens(ids)
        assert [t for t in found["source_tokens"][row] if t] == pieces
        new = output.sequences[row, 0, 1:].tolist()
        end = (
            new.index(model.tokenizer.eos_token_id) + 1
            if model.tokenizer.eos_token_id in new
            else 9
        )
        tokens = [t for t in found["target_tokens"][row] if t]
        assert tokens == model.tokenizer.convert_ids_to_tokens(new[:end])
        matrix = np.array(found["attention"][row])
        assert matrix.shape == (len(found["target_tokens"][row]), len(found["source_tokens"][row]))
        if pieces:
            assert close(matrix[:end, : len(ids)], weights[row, :end, : len(ids)])
            assert close(matrix[:end].sum(axis=1), np.ones(end))
        assert not matrix[end:].any() and not matrix[:, len(ids) :].any()


@pytest.mark.slow
def test_fresh_process_answers_like_the_model(exported):
    """As a stock server runs it, without XLA, and with it."""
    model, path = exported
    stock, empty, again, empty_again = run(model, path)
    for name in COMPILED:
        assert "XLA compilation disabled" in stock[name]
    check(model, stock, empty, PLAIN)
    check(model, stock | again, empty | empty_again, PLAIN | COMPILED)


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


def read_graph(path):
    proto = saved_model_pb2.SavedModel()
    proto.ParseFromString((path / "saved_model.pb").read_bytes())
    (meta_graph,) = proto.meta_graphs
    return meta_graph


def check_ops(path):
    meta_graph = read_graph(path)
    graph = meta_graph.graph_def
    names = {name for name in meta_graph.signature_def if not name.startswith("__")}
    assert {"serving_default", "beams", "ids", "score", "attention", "tokens"} < names
    for name in names:
        (output, *_) = meta_graph.signature_def[name].outputs.values()
        output = output.name.split(":")[0]
        ops = list(reachable(graph.library, [node for node in graph.node if node.name == output]))
        assert len(ops) > (50 if name == "tokens" else 100)
        compiled = [n.op for n in ops if n.op.startswith("Xla") or n.attr["_XlaMustCompile"].b]
        assert bool(compiled) == name.endswith("_xla"), name
    # A function that no signature runs must not bring one either.
    for function in graph.library.function:
        assert not [n.op for n in function.node_def if n.op.startswith("Xla")]


def test_it_reads_back(exported):
    model, path = exported
    read = bg.EncoderDecoderModel.from_export(path)
    settings = model.generation_config.replace(**OPTIONS)
    assert read.get_config() == {**model.get_config(), "generation_config": settings.to_dict()}
    for ours, theirs in zip(model.weights, read.weights, strict=True):
        assert (ours.path, ours.dtype) == (theirs.path, theirs.dtype)
        np.testing.assert_array_equal(ours, theirs)


def test_only_compiled_signatures_have_xla(exported):
    check_ops(exported[1])


def test_outputs_are_what_a_server_takes(exported, signatures):
    """The batch first, rank 1 or more, strings, float32 or int32."""
    for name, signature in signatures.items():
        for output in signature.structured_outputs.values():
            assert output.dtype in (tf.string, tf.float32, tf.int32)
            assert output.shape.rank >= 1 and output.shape[0] is None, name
    specs = {
        name: {k: v.shape.as_list() for k, v in signature.structured_outputs.items()}
        for name, signature in signatures.items()
    }
    assert specs["serving_default"] == {"text": [None], "score": [None]}
    assert specs["beams"] == {"text": [None, 3], "score": [None, 3]}
    assert specs["ids"] == {"sequences": [None, 3, 10], "score": [None, 3]}
    assert specs["drawn"] == {"text": [None, 2], "score": [None, 2]}
    # A server passes a scalar on.
    one = tf.constant(TEXTS[0])
    for name in PLAIN - {"ids", "score"}:
        function = signatures[name]
        placeholder = function.structured_input_signature[1]["text"]
        assert (placeholder.name, placeholder.dtype) == ("text", tf.string)
    inner = export_signatures.ServingModule(exported[0], bg.GenerationConfig(**OPTIONS), {}, ())
    scalar = inner.functions["serving_default"].python_function(one)
    assert scalar["text"].numpy().shape == (1,)
    scalar = inner.functions["score"].python_function(one, one)
    assert scalar["log_probability"].numpy().shape == (1,)


@pytest.mark.parametrize(
    "ids, mask, message",
    [
        ([[len(PIECES)]], [[1]], "input_ids must lie in"),
        ([[-1]], [[1]], "input_ids must lie in"),
        ([[5, 6]], [[1]], "must have one shape"),
        ([[5]], [[2]], "attention_mask must be 1 on tokens and 0 on padding"),
        ([[5] * 27], [[1] * 27], "input_ids must have at most 26 columns"),
    ],
)
def test_ids_that_the_model_does_not_have(signatures, ids, mask, message):
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        signatures["ids"](input_ids=tf.constant(ids), attention_mask=tf.constant(mask))


def test_ids_of_no_columns_and_no_rows(exported, signatures):
    signature = signatures["ids"]
    none = tf.zeros([2, 0], tf.int32)
    found = signature(input_ids=none, attention_mask=none)
    ids = exported[0].preprocessor.generate_preprocess(["", ""])
    expected = signature(**ids)
    assert found["sequences"].numpy().tolist() == expected["sequences"].numpy().tolist()
    none = tf.zeros([0, 3], tf.int32)
    assert signature(input_ids=none, attention_mask=none)["sequences"].shape == [0, 3, 10]


def test_scores_need_pairs(signatures):
    with pytest.raises(tf.errors.InvalidArgumentError, match="source and target must be equal"):
        signatures["score"](source=tf.constant(["a", "b"]), target=tf.constant(["a"]))


def only_words(logits, ids, step):
    """Bans the special tokens, marks and letters: every draw is a word."""
    return tf.where(tf.range(tf.shape(logits)[-1]) < 65, -1e7, logits)


@pytest.mark.slow
def test_samples_are_drawn_anew_at_every_call(tmp_path):
    """Also where a seed of TensorFlow was set, and after a restart of the server."""
    model = make_small_model("all")
    keras.utils.set_random_seed(3)
    path = tmp_path / "1"
    options = {"do_sample": True, "top_k": 0, "temperature": 2.0, "max_new_tokens": 6}
    bg.export_saved_model(model, path, logits_processor=[only_words], check=False, **options)
    check_ops(path)
    drawn = []
    for _ in range(2):
        signature = tf.saved_model.load(str(path)).signatures["serving_default"]
        for _ in range(2):
            drawn += signature(text=tf.constant(TEXTS[:1] * 3))["text"].numpy().tolist()
    words = {word for text in drawn for word in text.decode().split()}
    assert len(words) > 3 and all(len(word) > 2 for word in words - {"a"})
    assert len(set(drawn)) == 12


@pytest.mark.slow
def test_saved_model_of_bert_large_is_small(tmp_path):
    """Its graph has 24 layers of 16 heads; how wide they are has no part in its size."""
    config = bg.BertGenerationConfig(
        vocab_size=30_522,
        hidden_size=32,
        num_attention_heads=16,
        intermediate_size=64,
        max_position_embeddings=512,
        bos_token_id=2,
        eos_token_id=3,
    )
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = bg.BertTokenizer(pieces + [f"piece{i}" for i in range(30_522 - len(pieces))])

    def size(layers):
        config_of = config.replace(num_hidden_layers=layers)
        model = bg.EncoderDecoderModel(
            bg.BertGenerationEncoder(config_of),
            bg.BertGenerationDecoder(config_of.replace(add_cross_attention=True)),
            tokenizer,
        )
        path = tmp_path / f"large/{layers}"
        bg.export_saved_model(model, path, num_beams=4, check=False)
        return path, (path / "saved_model.pb").stat().st_size

    # Every layer adds the same, so that three layers tell of 24.
    (_, one), (_, two), (path, three) = (size(layers) for layers in (1, 2, 3))
    assert two - one == pytest.approx(three - two, rel=0.02)
    assert three + 21 * (three - two) < 20e6
    # Nor would the weights of a wider one be in it.
    graph = read_graph(path).graph_def
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    sizes = {
        node.name: np.prod([d.size for d in node.attr["value"].tensor.tensor_shape.dim] or [1])
        for node in nodes
        if node.op == "Const" and node.attr["dtype"].type == tf.float32.as_datatype_enum
    }
    assert max(sizes.values()) <= 512 * 32, max(sizes, key=sizes.get)


def test_keras_and_tensorflow_lead_to_the_export(tmp_path, model, monkeypatch):
    seen = []
    monkeypatch.setattr(
        sources.saved_model, "export_saved_model", lambda *args, **options: seen.append(options)
    )
    model.export(tmp_path / "name" / "1", max_batch_size=8)
    model.export(tmp_path / "name" / "2", verbose=True)
    assert seen == [{"max_batch_size": 8, "verbose": 0}, {"verbose": 1}]
    with pytest.warns(UserWarning, match=r"without a signature that generates: call"):
        tf.saved_model.save(model, str(tmp_path / "other"))


def test_keras_exports_logits_of_ids(tmp_path):
    model = make_small_model()
    spec = {
        name: keras.InputSpec(shape=(None, length), dtype="int32")
        for name, length in (("input_ids", 5), ("decoder_input_ids", 4))
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.export(tmp_path / "logits", input_signature=[spec], verbose=False)
    batch = {
        "input_ids": tf.constant([[3, 4, 5, 6, 7]]),
        "decoder_input_ids": tf.ones([1, 4], "int32"),
    }
    loaded = tf.saved_model.load(str(tmp_path / "logits"))
    np.testing.assert_allclose(loaded.serve(batch), model(batch), rtol=1e-5, atol=1e-6)


def test_errors_write_nothing(tmp_path, model):
    with pytest.raises(ValueError, match='must end in an integer version.*Use ".*name/1"'):
        bg.export_saved_model(model, tmp_path / "name")
    for version in ("\u0663", "9" * 19, "-1", "1.0"):
        with pytest.raises(ValueError, match="must end in an integer version"):
            bg.export_saved_model(model, tmp_path / "name" / version)
    (tmp_path / "name/3").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="must be a new version"):
        bg.export_saved_model(model, tmp_path / "name/3")
    path = tmp_path / "name/4"
    with pytest.raises(ValueError, match="max_new_tokens must not exceed"):
        bg.export_saved_model(model, path, max_new_tokens=300)
    long = bg.GenerationConfig(max_new_tokens=300)
    with pytest.raises(ValueError, match="max_new_tokens must not exceed"):
        bg.export_saved_model(model, path, signatures={"long": long})
    for name in ("beams", "fast_xla", "a-b", "", "__saved", 7):
        with pytest.raises(ValueError, match="signatures must have names of letters"):
            bg.export_saved_model(model, path, signatures={name: BRIEF})
    for options in ({"description": 3}, {"examples": "one"}, {"examples": ["one", None]}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be a "):
            bg.export_saved_model(model, tmp_path / "name/1", **options)
    with pytest.raises(TypeError, match="must map names to GenerationConfig"):
        bg.export_saved_model(model, path, signatures={"greedy": {"num_beams": 1}})
    for size in (0, 12, 2.0, True):
        with pytest.raises(ValueError, match="max_batch_size must be a power of two"):
            bg.export_saved_model(model, path, max_batch_size=size)
    silent = bg.EncoderDecoderModel(model.encoder, model.decoder)
    with pytest.raises(ValueError, match="must have a tokenizer to be exported"):
        bg.export_saved_model(silent, path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["3", "name"]


@pytest.mark.slow
def test_an_export_that_fails_leaves_nothing(tmp_path, model, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("disk full")

    monkeypatch.setattr(tf.saved_model, "save", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        bg.export_saved_model(model, tmp_path / "name/1", max_new_tokens=5)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys
from tests.helpers import make_small_model
import bertgen_tf as bg
model = make_small_model("all", max_source_length=20)
print("exporting", flush=True)
bg.export_saved_model(model, sys.argv[1], max_new_tokens=5)
"""


@pytest.mark.slow
def test_a_killed_export_leaves_no_version(tmp_path):
    """Killed in the self-check, when all files are written: a poller sees no half version."""
    folder = tmp_path / "name"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder / "1")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    seen = set()
    done = threading.Event()

    def poll():  # as a server does
        while not done.is_set():
            seen.update(p.name for p in folder.glob("*") if p.name.isdecimal())
            if any(folder.glob(".1.*/metadata.json")) or process.poll() is not None:
                break
        os.killpg(process.pid, signal.SIGKILL)

    poller = threading.Thread(target=poll)
    poller.start()
    assert process.stdout.readline() == b"exporting\n"
    poller.join(120)
    done.set()
    assert process.wait(60) == -signal.SIGKILL
    assert seen == set()
    assert [p.name.startswith(".1.") for p in folder.iterdir()] == [True]
    # What is left is in nobody's way, and gone with the next export, whatever its number.
    model = make_small_model("all")
    path = bg.export_saved_model(model, folder / "2", max_new_tokens=5, check=False)
    assert "serving_default" in tf.saved_model.load(path).signatures
    assert [p.name for p in folder.iterdir()] == ["2"]
