"""An export on a real TensorFlow Serving: ./tools/test_tensorflow_serving runs these.

Skipped unless TF_SERVING_REST is http://HOST:PORT of a server. Further variables: TF_SERVING_MODEL,
the name of the model there (default: model); TF_SERVING_GRPC, its HOST:PORT for gRPC;
TF_SERVING_EXPORT, the folder NAME/VERSION that it serves, whose answers are then compared; and
TF_SERVING_BATCHING=1 for a server that puts requests into batches.
"""

import base64
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_text  # noqa: F401  (registers ops)

from bertgen_tf.serving.client import Client, ServingError

urllib3 = pytest.importorskip("urllib3")

REST, GRPC = os.environ.get("TF_SERVING_REST"), os.environ.get("TF_SERVING_GRPC")
NAME, EXPORT = os.environ.get("TF_SERVING_MODEL", "model"), os.environ.get("TF_SERVING_EXPORT")
if not REST:
    pytest.skip("TF_SERVING_REST names no server", allow_module_level=True)

takes_any_shape = pytest.mark.skipif(
    os.environ.get("TF_SERVING_BATCHING") == "1",
    reason="a server with batching takes neither scalars nor empty batches",
)
URLS = [REST] if not GRPC else [REST, f"grpc://{GRPC}"]
TEXTS = [
    "the man saw a bird, who sang.",
    "",
    "old house",
    "über 😀 \u2028 café",
    'who "sang"? \\ \n',
    "a young woman left the house and found a bird " * 200,
    b"\xff\xfe bird",
]
IDS = {"input_ids": [[1, 5, 6, 4], [1, 7, 4, 0]], "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]]}
CALLS = {
    "serving_default": {"text": TEXTS},
    "beams": {"text": TEXTS},
    "ids": IDS,
    "score": {"source": TEXTS[:4], "target": TEXTS[3::-1]},
    "attention": {"text": TEXTS[:5]},
    "tokens": {"text": TEXTS},
}
# What a server may round otherwise than the process that compares.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture(params=URLS)
def client(request):
    with Client(request.param, NAME, timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def export():
    if not EXPORT:
        pytest.skip("TF_SERVING_EXPORT names no export to compare with")
    return tf.saved_model.load(EXPORT)


def post(content, path=f"/v1/models/{NAME}:predict"):
    """As other clients ask: the status and what was answered."""
    body = json.dumps(content, ensure_ascii=False).encode()
    response = urllib3.request("POST", REST + path, body=body, timeout=300, retries=False)
    return response.status, response.data


def answer(content):
    status, data = post(content)
    assert status == 200, data
    return json.loads(data)


def test_it_is_available(client):
    client.wait_until_ready()
    assert "AVAILABLE" in [version.state for version in client.status()]
    signatures = client.metadata()
    assert set(signatures) >= {*CALLS, "generate_xla", "beams_xla"}
    assert signatures["serving_default"]["inputs"]["text"] == tf.TensorSpec(
        [None], tf.string, "text"
    )


@pytest.mark.parametrize("signature", CALLS)
def test_it_answers_as_the_export_does(client, export, signature):
    dtype = tf.int32 if signature == "ids" else tf.string
    inputs = {name: tf.constant(value, dtype) for name, value in CALLS[signature].items()}
    expected = export.signatures[signature](**inputs)
    answer = client.predict(CALLS[signature], signature)
    assert answer.keys() == expected.keys()
    for name, tensor in expected.items():
        array = tensor.numpy()
        if tensor.dtype == tf.float32:
            np.testing.assert_allclose(answer[name], array, **TOLERANCE)
        elif tensor.dtype == tf.string:
            assert (
                answer[name].tolist() == np.vectorize(bytes.decode, otypes=[object])(array).tolist()
            )
        else:
            np.testing.assert_array_equal(answer[name], array)


def test_beams(client):
    best = client.generate(TEXTS, output_scores=True)
    beams = client.generate(TEXTS, signature="beams", output_scores=True)
    assert best.scores.shape == (len(TEXTS), 1)
    assert [texts[0] for texts in beams.texts] == best.texts
    np.testing.assert_allclose(beams.scores[:, :1], best.scores, **TOLERANCE)
    assert (np.diff(beams.scores, axis=1) <= 1e-5).all()


def test_ids(client):
    answer = client.predict(IDS, "ids")
    rows, n, _ = answer["sequences"].shape
    assert rows == 2 and answer["score"].shape == (2, n)
    assert answer["sequences"].dtype == np.int32


def test_score(client):
    scores = client.score(TEXTS[:4], TEXTS[3::-1])
    assert all(np.isfinite(score) and score < 0 for score in scores)
    assert client.score(TEXTS[0], TEXTS[3]) == pytest.approx(scores[0], rel=1e-3)


def test_attention(client):
    answer = client.predict({"text": TEXTS[:5]}, "attention")
    weights = answer["attention"]
    assert weights.shape == (5, answer["target_tokens"].shape[1], answer["source_tokens"].shape[1])
    lengths = np.count_nonzero(answer["target_tokens"] != "", axis=1)
    for row, length in zip(weights, lengths, strict=True):
        np.testing.assert_allclose(row[:length].sum(axis=1), 1, atol=1e-3)
        assert not row[length:].any()


@takes_any_shape
def test_scalar():
    expected = answer({"inputs": {"text": ["old house"]}})["outputs"]["text"]
    assert answer({"inputs": "old house"})["outputs"]["text"] == expected
    assert answer({"inputs": {"text": "old house"}})["outputs"]["text"] == expected


def test_row_format():
    texts = ["old house", "a bird", ""]
    columns = answer({"inputs": texts})["outputs"]
    for instances in (texts, [{"text": text} for text in texts]):
        rows = answer({"instances": instances})["predictions"]
        assert [row["text"] for row in rows] == columns["text"]
        np.testing.assert_allclose([row["score"] for row in rows], columns["score"], **TOLERANCE)
    pairs = [{"source": "a", "target": "b"}, {"source": "c", "target": "d"}]
    rows = answer({"signature_name": "score", "instances": pairs})["predictions"]
    assert [sorted(row) for row in rows] == [["log_probability", "num_tokens"]] * 2


@takes_any_shape
def test_no_texts(client):
    assert client.generate([]) == []
    assert answer({"inputs": {"text": []}})["outputs"] == {"text": [], "score": []}
    assert post({"instances": []})[0] == 400
    assert client.predict({"text": []})["score"].shape == (0,)


def test_long_and_not_utf8(client):
    alone = [client.generate(text) for text in TEXTS]
    assert all(isinstance(text, str) for text in alone)
    assert alone == client.generate(TEXTS)
    encoded = {"b64": base64.b64encode(TEXTS[-1]).decode()}
    assert answer({"inputs": {"text": [encoded]}})["outputs"]["text"] == [alone[-1]]


def test_unknown_signature_and_model(client):
    with pytest.raises(ServingError, match="not found.* It has .*serving_default") as error:
        client.generate("a", signature="nothing")
    assert error.value.code in (400, "FAILED_PRECONDITION", "INVALID_ARGUMENT")
    with Client(client.url, "no_such_model") as other, pytest.raises(ServingError) as error:
        other.generate("a")
    assert error.value.code in (404, "NOT_FOUND")


def test_other_inputs_are_refused():
    for content in (
        {"inputs": {"texts": ["a"]}},
        {"inputs": {"text": [1]}},
        {"inputs": ["a"], "instances": ["a"]},
        {"instances": [{"text": "a", "more": "b"}]},
        {"signature_name": "score", "inputs": ["a"]},
        {},
    ):
        status, data = post(content)
        assert status == 400 and b"error" in data


def test_xla_works_or_says_that_it_is_off(client):
    expected = client.generate("old house")
    try:
        assert client.generate("old house", signature="generate_xla") == expected
    except ServingError as error:
        assert "XLA compilation disabled" in str(error)
        assert "--xla_cpu_compilation_enabled" in str(error)
    assert client.generate("old house") == expected


def test_many_at_a_time(client):
    texts = ["the old man saw a bird and sang"[: i + 1] for i in range(31)] + [""]
    alone = [client.generate(text, output_scores=True) for text in texts]
    with ThreadPoolExecutor(32) as threads:
        together = list(threads.map(lambda text: client.generate(text, output_scores=True), texts))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(other.scores, one.scores, **TOLERANCE)
    assert [one.texts for one in alone] == [other.texts for other in together]
