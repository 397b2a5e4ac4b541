"""Exports in the runtime of TensorFlow Serving: its C API, several threads, XLA switched off.

Every signature of an export is held to `model.generate` and to the model itself. A longer load run:
`SERVING_LOAD_TIMES=100 pytest tests/serving -k load`.
"""

import json
import os
from pathlib import Path

import make_op_list
import numpy as np
import pytest
import tensorflow as tf

import bertgen_tf as bg
from bertgen_tf.generation.compiled import hypotheses_to_text
from bertgen_tf.tokenizers.byte_pair import sentencepiece_from_byte_pair
from tests.helpers import EXPORT_OPTIONS as OPTIONS
from tests.helpers import FURTHER, GOLDEN, PIECES, WORDS, c_program, make_model
from tests.helpers.c_program import Failure, Program
from tests.helpers.serving_exports import write_export

TEXTS = [
    "the man saw a bird, who sang.",
    "",
    "old house",
    "a young woman left the house and found a bird " * 200,
    "über 😀 café",
    b"\xff\xfe bird \xc3",
    b"a\x00bird",
]
OPS = json.loads((GOLDEN / "tensorflow_text_2_20_ops.json").read_text())
EXPECTED = json.loads((GOLDEN / "tokenizers.json").read_text("utf-8"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return c_program.build(tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="module")
def word_piece(shared_export):
    """A model and its export."""
    return shared_export


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory, spiece):
    model = make_model(make_tokenizer=lambda: bg.BertGenerationTokenizer(spiece))
    path = tmp_path_factory.mktemp("sentence_piece") / "1"
    # The check would run what is run here.
    return model, Path(bg.export_saved_model(model, path, check=False, **OPTIONS))


@pytest.fixture(scope="module", params=["word_piece", "sentence_piece"])
def exported(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def served(program, exported):
    """A model and a stock server, without XLA, which all tests share: none may do it harm."""
    model, path = exported
    with Program(program, path, xla=False) as server:
        yield model, server


def is_compiled(name):
    return name.endswith("_xla")


def is_plain(name):
    return not is_compiled(name)


def encode(model, texts):
    inputs = model.preprocessor.generate_preprocess(tf.constant(texts, tf.string))
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def inputs_of(model, name, texts):
    """What a client sends to signature `name` for these texts."""
    if name == "ids":
        return encode(model, texts)
    if name == "score":
        return {"source": texts, "target": texts[1:] + texts[:1]}
    return {"text": texts}


def expected(model, name, texts):
    """What `model` answers to `inputs_of` them."""
    name = name.removesuffix("_xla")
    if name == "score":
        return expected_scores(model, **inputs_of(model, name, texts))
    if name == "attention":
        return expected_attention(model, texts)
    if name == "tokens":
        special = model.preprocessor.add_bos + model.preprocessor.add_eos
        counts = [len(model.tokenizer(text)) + special for text in texts]
        return {"num_tokens": np.array(counts, np.int32)}
    known = ("serving_default", "generate", "beams", "ids", *FURTHER)
    assert name in known, f"{name} must be told here what it gives"
    # All beams, of which serving_default gives the best: one search for all signatures.
    every = {**OPTIONS, "num_return_sequences": OPTIONS["num_beams"]}
    options = FURTHER.get(name, every)
    output = model.generate(encode(model, texts), jit_compile=False, **options)
    if name == "ids":
        return {"sequences": output.sequences, "score": output.scores}
    answer = {
        "text": hypotheses_to_text(model.preprocessor, tf.constant(output.sequences)).numpy(),
        "score": output.scores,
    }
    if name == "beams" or (name in FURTHER and "num_return_sequences" in options):
        return answer
    return {key: value[:, 0] for key, value in answer.items()}


def expected_scores(model, source, target):
    x, labels, weights = model.preprocessor(tf.constant(source), tf.constant(target))
    log_probabilities = tf.nn.log_softmax(model(x, training=False))
    chosen = tf.gather(log_probabilities, labels, batch_dims=2)
    return {
        "log_probability": tf.reduce_sum(chosen * weights, axis=1).numpy(),
        "num_tokens": tf.reduce_sum(tf.cast(weights, tf.int32), axis=1).numpy(),
    }


def expected_attention(model, texts):
    pieces = np.array([*sorted(model.tokenizer.get_vocab(), key=model.tokenizer.get_vocab().get)])
    ids = encode(model, texts)
    output = model.generate(ids, output_attentions=True, jit_compile=False, **OPTIONS)
    attention = output.cross_attentions[:, 0].mean(axis=(1, 2))  # [B, L - 1, S]
    tokens = output.sequences[:, 0, 1:]
    lengths = []
    for row in tokens:
        ends = np.flatnonzero(row == model.tokenizer.eos_token_id)
        lengths.append(ends[0] + 1 if len(ends) else OPTIONS["max_new_tokens"])
    steps = np.arange(max(lengths))
    generated = steps < np.array(lengths)[:, np.newaxis]
    mask = ids["attention_mask"]

    def show(ids, visible):
        shown = np.where(visible, pieces[ids], "")
        return np.array([[piece.encode() for piece in row] for row in shown], object)

    return {
        **expected(model, "serving_default", texts),
        "source_tokens": show(ids["input_ids"], mask == 1),
        "target_tokens": show(tokens[:, steps], generated),
        "attention": attention[:, steps] * mask[:, np.newaxis] * generated[..., np.newaxis],
    }


def check(answer, wanted):
    assert not isinstance(answer, Failure), answer
    assert set(answer) == set(wanted)
    for key, value in wanted.items():
        assert answer[key].shape == value.shape, key
        if answer[key].dtype == np.float32:
            # A hypothesis that is none scores about -1e9.
            np.testing.assert_allclose(answer[key], value, rtol=1e-5, atol=1e-4, err_msg=key)
        else:
            assert answer[key].tolist() == value.tolist(), key


def test_plain_signatures_answer_as_the_model_and_compiled_ones_fail(served):
    model, server = served
    names = sorted(server.signatures)
    assert {"serving_default", "generate_xla"} <= set(names)
    wanted = expected(model, "serving_default", TEXTS)
    check(server("serving_default", text=TEXTS), wanted)
    for name in names:
        if is_compiled(name):
            answer = server(name, text=TEXTS)
            assert answer.code == tf.errors.INTERNAL
            assert answer.message.startswith("XLA compilation disabled")
            check(server("serving_default", text=TEXTS), wanted)
        else:
            answer = server(name, **inputs_of(model, name, TEXTS))
            check(answer, expected(model, name, TEXTS))


def test_shapes_that_a_server_lets_through(served):
    """A scalar, an empty batch, a batch of one."""
    model, server = served
    for name in filter(is_plain, server.signatures):
        one = expected(model, name, TEXTS[:1])
        empty = server(name, **inputs_of(model, name, []))
        assert {key: value.shape[0] for key, value in empty.items()} == dict.fromkeys(one, 0)
        assert all(empty[key].ndim == value.ndim for key, value in one.items())
        if "text" in server.signatures[name].inputs:
            check(server(name, text=TEXTS[0]), one)
        for text in TEXTS:
            check(server(name, **inputs_of(model, name, [text])), expected(model, name, [text]))


def test_very_long_texts(served):
    model, server = served
    texts = ["a bird sang " * 100_000, "x" * 1_000_000]
    check(server("serving_default", text=texts), expected(model, "serving_default", texts))


def test_ids_that_are_none_are_refused(served):
    model, server = served
    ids = encode(model, TEXTS[:2])
    for wrong in (
        {**ids, "attention_mask": ids["attention_mask"][:, 1:]},
        {**ids, "input_ids": ids["input_ids"] + 10_000},
        {**ids, "input_ids": ids["input_ids"] - 10_000},
        {**ids, "attention_mask": ids["attention_mask"] * 2},
        {key: np.ones([2, 3000], np.int32) for key in ids},
    ):
        answer = server("ids", **wrong)
        assert isinstance(answer, Failure) and answer.code == tf.errors.INVALID_ARGUMENT
    check(server("ids", **ids), expected(model, "ids", TEXTS[:2]))


def test_warm_up_requests(served, exported):
    """A server runs them before it serves; one that fails would keep it from serving."""
    apis = pytest.importorskip("tensorflow_serving.apis.prediction_log_pb2")
    model, server = served
    requests, lengths, names = [], [], []
    for record in tf.data.TFRecordDataset(exported[1] / "assets.extra/tf_serving_warmup_requests"):
        request = apis.PredictionLog.FromString(record.numpy()).predict_log.request
        inputs = {key: tf.make_ndarray(proto) for key, proto in request.inputs.items()}
        names.append(request.model_spec.signature_name)
        requests.append((names[-1], inputs))
        if names[-1] == "serving_default":
            lengths.append(encode(model, inputs["text"])["input_ids"].shape[1])
    assert lengths == sorted(set(lengths)) != []
    assert set(names) == set(filter(is_plain, server.signatures))
    for index, answer in server.run(requests):
        name, inputs = requests[index]
        if name == "serving_default":
            check(answer, expected(model, name, inputs["text"].tolist()))
        else:
            assert {len(value) for value in answer.values()} == {1}


def texts_of_lengths(lengths):
    rng = np.random.default_rng(5)
    return [" ".join(rng.choice(WORDS, length)) for length in lengths]


def test_threads_get_their_own_answers(served):
    model, server = served
    texts = texts_of_lengths([3, 5, 8, 13])
    names = list(filter(is_plain, server.signatures))
    requests = [(name, inputs_of(model, name, [text])) for text in texts for name in names]
    answers = [expected(model, name, [text]) for text in texts for name in names]
    assert len({answer["text"].tobytes() for answer in answers if "text" in answer}) > 3
    for index, answer in server.run(requests, threads=4, times=5):
        check(answer, answers[index])


def test_load_of_four_threads(served):
    """Texts of random lengths in batches of random sizes; memory does not grow."""
    model, server = served
    times = int(os.environ.get("SERVING_LOAD_TIMES", 10))
    rng = np.random.default_rng(3)
    texts = texts_of_lengths(rng.integers(0, 60, 100))
    every = expected(model, "serving_default", texts)
    starts = np.flatnonzero(rng.random(100) < 0.5)
    slices = [slice(*pair) for pair in zip([0, *starts], [*starts, 100], strict=True)]
    requests = [("serving_default", {"text": texts[part]}) for part in slices]
    server.run(requests, threads=4, times=3)  # allocators have their fill
    for index, answer in server.run(requests, threads=4, times=times):
        check(answer, {key: value[slices[index]] for key, value in every.items()})
    assert len(server.memory) == 20
    assert server.memory[-1] - server.memory[4] < 3_000, server.memory  # KiB


def test_a_run_that_takes_too_long_ends(served):
    """A server passes on the deadline of a request as `RunOptions.timeout_in_ms`."""
    model, server = served
    long = ("serving_default", {"text": TEXTS * 1000})
    ((_, answer),) = server.run([long], timeout_ms=1)
    assert isinstance(answer, Failure) and answer.code == tf.errors.DEADLINE_EXCEEDED
    check(server("serving_default", text=TEXTS), expected(model, "serving_default", TEXTS))


def test_compiled_signatures_answer_as_the_model(program, word_piece):
    """Threads compile other shapes at once, wait for each other's, and run them together."""
    model, path = word_piece
    texts = [*TEXTS, *texts_of_lengths([2, 18])]
    with Program(program, path) as server:
        requests, answers = [], []
        for name in filter(is_compiled, server.signatures):
            every = expected(model, name, texts)
            # Of another length and batch size each.
            short, two, all_of_them = slice(7, 8), slice(7, 9), slice(0, 9)
            own = name == "generate_xla"
            for part in (short, two, all_of_them) if own else (all_of_them,):
                requests.append((name, {"text": texts[part]}))
                answers.append({key: value[part] for key, value in every.items()})
        for index, answer in server.run(requests, threads=4, times=2):
            check(answer, answers[index])
        for name in filter(is_compiled, server.signatures):
            assert {len(value) for value in server(name, text=[]).values()} == {0}
        check(server("serving_default", text=TEXTS), expected(model, "serving_default", TEXTS))


def test_without_the_ops_of_tensorflow_text(program, word_piece):
    with pytest.raises(c_program.LoadFailure) as caught:
        Program(program, word_piece[1], text_ops=False)
    assert caught.value.args[0].code == tf.errors.NOT_FOUND
    assert "Op type not registered" in caught.value.args[0].message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("request 1 no_such:0 string 0 - 1 x:0", "the export has no operation no_such"),
        ("request 1 {feed} int32 1 2 5", "a line ends too early"),
        ("request 1 {feed} string 2 1000000 1000000", "a tensor is too large"),
        ("request 1 {feed} string 0 ab 1 {feed} more", "a line is too long"),
        ("stop", "must be request or run"),
    ],
)
def test_program_refuses_other_lines(program, tmp_path, line, message):
    server = Program(program, write_export(tmp_path / "1"))
    feed = server.signatures["serving_default"].inputs["text"][0]
    status, log = server.send(line.format(feed=feed) + "\n")
    assert status == 2 and message in log


def nodes_of(graph):
    """Every node, those in functions too, but calls of functions."""
    functions = {function.signature.name for function in graph.library.function}
    for nodes in (graph.node, *(function.node_def for function in graph.library.function)):
        yield from (node for node in nodes if node.op not in functions)


def check_ops(graph):
    known, ours = OPS["ops"], make_op_list.registered_ops()
    nodes = list(nodes_of(graph))
    if missing := sorted({node.op for node in nodes} - set(known)):
        pytest.fail(
            f"the list does not have these ops: {' '.join(missing)}. To see whether an older "
            "server has them, and to add them, run tools/test_older_tensorflow " + " ".join(missing)
        )
    for node in nodes:
        attributes = {name for name in node.attr if not name.startswith("_")}
        unknown = attributes - set(known[node.op]["attrs"])
        assert not unknown, f"{node.op} had no attribute {unknown} in {OPS['tensorflow']}"
        # An attribute that is new since, and that the node leaves at its default, does no harm.
        defaults = {
            attr.name: tf.as_dtype(attr.default_value.type).name
            for attr in ours[node.op].attr
            if attr.type == "type" and attr.name not in known[node.op]["attrs"]
        }
        here = make_op_list.describe(ours[node.op])
        for side in ("inputs", "outputs"):
            tensors = {name: defaults.get(kind, kind) for name, kind in here[side].items()}
            assert tensors == known[node.op][side], f"{node.op} had other {side}"
    return {node.op for node in nodes}


def test_ops_are_those_of_an_older_server(exported):
    ops = check_ops(c_program.read_meta_graph(exported[1]).graph_def)
    assert {"WordpieceTokenizeWithOffsets", "SentencepieceTokenizeOp"} & ops and "While" in ops


def test_ops_of_byte_pair_vocabularies(tmp_path):
    case = EXPECTED["byte_pair"]["roberta"]
    proto = sentencepiece_from_byte_pair(case["vocab"], case["merges"])
    tokenizer = bg.BertGenerationTokenizer(proto, eos_token="</s>")
    model = make_model(make_tokenizer=lambda: tokenizer)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def there_and_back(text):
        ids = model.preprocessor.generate_preprocess(text)["input_ids"]
        return model.preprocessor.generate_postprocess(ids)

    graph = there_and_back.get_concrete_function().graph.as_graph_def()
    assert "SentencepieceTokenizeOp" in check_ops(graph)


def test_the_normalization_of_huggingface(program, tmp_path):
    """Its tables of characters are ops of TensorFlow alone."""
    tokenizer = bg.BertTokenizer(list(PIECES), normalization="huggingface", added_tokens=["bird"])
    model = make_model(make_tokenizer=lambda: tokenizer)
    path = Path(bg.export_saved_model(model, tmp_path / "1", check=False, **OPTIONS))
    assert {"RaggedGather", "UnicodeDecode"} <= check_ops(c_program.read_meta_graph(path).graph_def)
    texts = [*TEXTS, "the\u200b[SEP]  man BIRD", "a\u1e14\U0001d165\u0344\u302e b"]
    with Program(program, path, xla=False) as server:
        answer = server("serving_default", text=texts)
    check(answer, expected(model, "serving_default", texts))
