"""The client against servers that run a real export, and fail when told to."""

import contextlib
import copy
import itertools
import json
import shutil
import ssl
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf

from bertgen_tf.serving import client as serving_client
from bertgen_tf.serving import transport as serving_transport
from bertgen_tf.serving.client import Client, DeadlineExceeded, ServingError
from tests.helpers import EXPORT_OPTIONS, ROOT

pytest.importorskip("urllib3")
grpc = pytest.importorskip("grpc")

from tests.helpers.serving_exports import write_upper_export  # noqa: E402
from tests.helpers.serving_servers import BUSY, DROP, HANG, GrpcServer, Reply, RestServer, Served  # noqa: E402

TEXTS = [
    "the man saw a bird, who sang.",
    "",
    "old house",
    "a young woman left the house and found a bird " * 50,
    "über 😀 \u2028 café \x01 end",
    'who "sang"? \\ \n',
    "the bird",
]
NOT_UTF8 = [b"\xff\xfe bird", "file \udcff name", "\ud800 sang", b"the bird"]
AS_BYTES = [b"\xff\xfe bird", b"file \xed\xb3\xbf name", b"\xed\xa0\x80 sang", b"the bird"]
OPTIONS = {**EXPORT_OPTIONS, "jit_compile": False}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return Served(write_upper_export(tmp_path_factory.mktemp("upper") / "1"))


@pytest.fixture
def rest(served):
    with RestServer(served) as server:
        yield server


@pytest.fixture(params=["rest", "grpc"])
def server(request, served):
    with (RestServer if request.param == "rest" else GrpcServer)(served) as server:
        server.kind = request.param
        yield server


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(serving_client, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(serving_client, "POLL_INTERVAL", 0.0)


@contextlib.contextmanager
def state(served, **changes):
    """The model as its server has it for a while."""
    before = {name: getattr(served, name) for name in changes}
    vars(served).update(changes)
    try:
        yield
    finally:
        vars(served).update(before)


# ------------------------------------------------------------------------------------- answers


@pytest.fixture(scope="module")
def served_export(shared_export):
    """A model, and its export for both kinds of servers."""
    return shared_export[0], Served(shared_export[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [RestServer, GrpcServer])
def test_exports_answer_as_the_model_does(kind, served_export):
    model, served = served_export
    expected = model.generate(TEXTS, **OPTIONS)
    beams = model.generate(TEXTS, **OPTIONS, num_return_sequences=3, output_scores=True)
    with kind(served) as server, Client(server.url, "model", batch_size=3) as client:
        assert client.generate(TEXTS) == expected
        assert client.generate(TEXTS[0]) == expected[0]
        assert client.generate(TEXTS, signature="beams") == beams.texts
        output = client.generate(TEXTS, signature="beams", output_scores=True)
        assert output.texts == beams.texts
        np.testing.assert_allclose(output.scores, beams.scores, atol=1e-4)
        assert client.predict({"text": []}, "beams")["text"].shape == (0, 3)

        ids = [[3, 70, 71, 4], [3, 72, 4, 0]]
        inputs = {
            "ids": {"input_ids": ids, "attention_mask": np.sign(ids)},
            "attention": {"text": TEXTS},
            "serving_default": {"text": "a scalar"},
            "score": {"source": TEXTS, "target": TEXTS[::-1]},
        }
        for signature, values in inputs.items():
            dtype = tf.int32 if signature == "ids" else tf.string
            tensors = {name: tf.constant(value, dtype) for name, value in values.items()}
            check_arrays(client.predict(values, signature), served.run(signature, tensors))


def check_arrays(arrays, tensors):
    assert arrays.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = tensor.numpy()
        if tensor.dtype == tf.string:
            expected = np.vectorize(bytes.decode, otypes=[object])(expected)
            np.testing.assert_array_equal(arrays[name], expected)
        else:
            np.testing.assert_allclose(arrays[name], expected, rtol=1e-4, atol=1e-6)
        assert arrays[name].dtype == expected.dtype


def test_generate(server):
    expected = upper(TEXTS)
    beams = [[f"{text} {n}" for n in range(3)] for text in expected]
    scores = np.array([[-len(text.encode()) - n / 2 for n in range(3)] for text in TEXTS])
    with Client(server.url, "model", batch_size=3) as client:
        assert client.generate(TEXTS) == expected
        assert client.generate(tuple(TEXTS)) == expected
        assert client.generate(TEXTS[4]) == expected[4]
        assert client.generate(TEXTS[4].encode()) == expected[4]
        assert client.generate([]) == []
        assert client.generate(TEXTS, signature="beams") == beams
        assert client.generate(TEXTS[2], signature="beams") == beams[2]
        output = client.generate(TEXTS, signature="beams", output_scores=True)
        assert output.texts == beams and output.scores.dtype == np.float32
        np.testing.assert_array_equal(output.scores, scores)
        output = client.generate(TEXTS[4], output_scores=True)
        assert output.texts == expected[4]
        np.testing.assert_array_equal(output.scores, scores[4:5, :1])
        assert client.generate([], output_scores=True).scores.shape == (0, 1)


def test_signature_and_version_of_the_client(server):
    with Client(server.url, "model", version=1, signature="beams") as client:
        assert client.generate("bird") == ["BIRD 0", "BIRD 1", "BIRD 2"]
        assert client.generate("bird", signature="serving_default") == "BIRD"
        assert [version.version for version in client.status()] == [1]
        assert "beams" in client.metadata()
    with Client(server.url, "model", version=2) as client, pytest.raises(ServingError) as error:
        client.generate("bird")
    assert error.value.code in (404, "NOT_FOUND")


def test_texts_that_are_not_utf8(server, served):
    expected = served.run("serving_default", {"text": tf.constant(AS_BYTES)})["text"].numpy()
    with Client(server.url, "model") as client:
        assert client.generate(NOT_UTF8) == [text.decode() for text in expected]
        request = server.requests[0]
    if server.kind == "rest":
        sent = request[3]["inputs"]["text"]
        assert [isinstance(text, dict) for text in sent] == [True, True, True, False]
    else:
        assert list(tf.make_ndarray(request.inputs["text"])) == AS_BYTES
        assert list(request.output_filter) == ["text", "score"]


def test_score(server):
    sources, targets = TEXTS[:5], ["old", "", "the bird sang", "é", "a house " * 30]
    lengths = [[len(text.encode()) for text in texts] for texts in (sources, targets)]
    expected = (np.array([-10, -1]) @ lengths).tolist()
    with Client(server.url, "model", batch_size=2) as client:
        assert client.score(sources, targets) == expected
        assert client.score(sources[0], targets[0]) == expected[0]
        assert client.score([], []) == []
        for pair in [(["a"], ["b", "c"]), ("a", ["b"])]:
            with pytest.raises(ValueError, match="of equal length"):
                client.score(*pair)


def test_predict(server, served):
    ids = {"input_ids": [[3, 70, 71]], "attention_mask": np.array([[1, 1, 0]], np.int64)}
    with Client(server.url, "model") as client:
        answer = client.predict(ids, "ids")  # one output, whose name REST leaves out
        np.testing.assert_array_equal(answer["sequences"], [[[3, 70, 0]]])
        assert answer["sequences"].dtype == np.int32
        inputs = {"text": np.array([b"\xff", "é"], object)}
        tensors = {"text": tf.constant([b"\xff", "é"])}
        check_arrays(client.predict(inputs, "beams"), served.run("beams", tensors))
        assert client.predict({"text": "é"})["text"].tolist() == ["É"]
        assert client.predict({"text": []}, "beams")["text"].shape == (0, 3)
        assert client.predict({"text": []})["score"].shape == (0,)
        assert client.predict({"text": []})["score"].dtype == np.float32


@pytest.mark.parametrize(
    ("inputs", "signature", "message"),
    [
        ({"text": ["a"]}, "nothing", "signature must be one of beams, .*'nothing'"),
        ({"texts": ["a"]}, None, "serving_default must be text, received texts"),
        ({"text": [1]}, None, r"inputs\['text'\] must be an array of string"),
        ({"text": [["a"], ["b", "c"]]}, None, r"inputs\['text'\] must be"),
        ({"input_ids": [[0.5]], "attention_mask": [[1]]}, "ids", r"inputs\['input_ids'\] must be"),
        ({"input_ids": [[1 << 40]], "attention_mask": [[1]]}, "ids", "array of int32, received"),
    ],
)
def test_predict_names_what_does_not_fit(rest, inputs, signature, message):
    with Client(rest.url, "model") as client, pytest.raises(ValueError, match=message):
        client.predict(inputs, signature)


def test_metadata(server):
    with Client(server.url, "model") as client:
        signatures = client.metadata()
    assert set(signatures) == {"serving_default", "beams", "ids", "score", "generate_xla"}
    assert signatures["ids"]["inputs"]["input_ids"] == tf.TensorSpec(
        [None, None], tf.int32, "input_ids"
    )
    assert signatures["beams"]["outputs"]["text"].shape.as_list() == [None, 3]


def test_headers_reach_the_server(server):
    with Client(server.url, "model", headers={"X-Token": "Bearer e"}) as client:
        client.generate("a")
    if server.kind == "rest":
        assert server.requests[0][2]["X-Token"] == "Bearer e"
        assert server.requests[0][2]["Content-Type"] == "application/json"
    else:
        assert server.metadata["x-token"] == "Bearer e"


def test_a_proxy_may_put_a_path_in_front(rest):
    with Client(rest.url + "/some/where/", "a model") as client, pytest.raises(ServingError):
        client.status()
    assert rest.requests[0][1] == "/some/where/v1/models/a%20model"


# ---------------------------------------------------------------------- many requests, and faults


def sources(count):
    return [f"the bird {i}" for i in range(count)]


def upper(texts):
    return [text.upper() for text in texts]


def test_order_and_retries_over_many_requests(server):
    texts = sources(40)
    if server.kind == "rest":
        faults = [DROP, None, BUSY, Reply(429, ""), None, None, Reply(502, "<html>bad gateway")]
    else:
        faults = ["UNAVAILABLE", None, None, "RESOURCE_EXHAUSTED", "UNAVAILABLE"]
    server.faults[:] = faults * 2
    with Client(server.url, "model", batch_size=2) as client:
        assert client.generate(texts) == upper(texts)
    assert len(server.requests) == 20 + 2 * sum(fault is not None for fault in faults)


def test_requests_of_a_call_overlap_up_to_the_limit(rest, served, monkeypatch):
    """The first three wait for each other; a fourth would be counted."""
    together, lock, running, most = threading.Barrier(3), threading.Lock(), set(), []
    run = served.run

    def slow(*arguments):
        with lock:
            running.add(threading.get_ident())
            most.append(len(running))
        together.wait(60)
        with lock:
            running.discard(threading.get_ident())
        return run(*arguments)

    monkeypatch.setattr(served, "run", slow)
    with Client(rest.url, "model", batch_size=1, max_concurrency=3) as client:
        assert client.generate(sources(9)) == upper(sources(9))
    assert max(most) == 3


def test_threads_share_a_client(server):
    texts = sources(64)
    with Client(server.url, "model", batch_size=3) as client, ThreadPoolExecutor(8) as threads:
        parts = threads.map(lambda i: client.generate(texts[i : i + 8]), range(0, 64, 8))
        assert [text for part in parts for text in part] == upper(texts)


def test_connections_are_kept(rest):
    with Client(rest.url, "model") as client:
        for text in sources(5):
            client.generate(text)
        with pytest.raises(ServingError):
            client.generate("a", signature="nothing")
        client.status()
    assert rest.connections == 1


def test_retries_are_bounded(server):
    server.faults[:] = [BUSY if server.kind == "rest" else "UNAVAILABLE"] * 9
    with Client(server.url, "model", retries=2) as client, pytest.raises(ServingError) as error:
        client.generate("a")
    assert error.value.code == (503 if server.kind == "rest" else "UNAVAILABLE")
    assert "busy" in str(error.value) and server.url in str(error.value)
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 500, 501, 301])
def test_other_errors_are_not_sent_again(rest, status):
    rest.faults[:] = [Reply(status, '{"error": "no such luck"}', {"Location": "/v1"})]
    with Client(rest.url, "model") as client, pytest.raises(ServingError, match="luck") as error:
        client.generate("a")
    assert error.value.code == status
    assert len([path for _, path, _, _ in rest.requests if path.endswith(":predict")]) == 1


def test_what_is_too_much_for_a_request_is_sent_in_halves(rest):
    texts = [f"text {number}" for number in range(7)]
    with Client(rest.url, "model", max_concurrency=1) as client:
        expected = client.generate(texts, output_scores=True)
        rest.requests.clear()
        rest.faults[:] = [Reply(413, '{"error": "Send at most 4 such texts"}')] * 2
        output = client.generate(texts, output_scores=True)
    assert output.texts == expected.texts and output.texts[6] == "TEXT 6"
    np.testing.assert_array_equal(output.scores, expected.scores)
    # 7, its first half 3, of that 1 and 2, the second half 4.
    assert len(rest.requests) == 5


def test_other_codes_of_grpc_are_not_sent_again(served):
    with GrpcServer(served) as server, Client(server.url, "model") as client:
        server.faults[:] = ["INTERNAL"]
        with pytest.raises(ServingError, match="signature serving_default: INTERNAL: busy"):
            client.generate("a")
        assert len(server.requests) == 1


def test_a_failure_ends_the_call(rest):
    """Nothing is sent any more, nor does anything wait to be."""
    before = set(threading.enumerate())
    rest.faults[:] = [Reply(503, "", {"Retry-After": "50"}), Reply(400, '{"error": "no"}')]
    with Client(rest.url, "model", batch_size=1, max_concurrency=2) as client:
        with pytest.raises(ServingError, match="no"):
            client.generate(sources(500))
        workers = {t for t in set(threading.enumerate()) - before if "ThreadPool" in t.name}
        for thread in workers:
            thread.join(20)
        assert not any(thread.is_alive() for thread in workers)
    assert len(rest.requests) < 100


def test_pauses_grow_at_random_and_keep_to_retry_after(monkeypatch):
    ranges, pauses = [], []
    monkeypatch.setattr(serving_client, "FIRST_PAUSE", 0.5)
    monkeypatch.setattr(
        serving_client.random, "uniform", lambda *ends: ranges.append(ends) or ends[1]
    )
    failures = [ServingError("busy", 503, after) for after in (0.0, 7.0, 0.5, 0.0, 0.0, 0.0, 0.0)]

    def call(timeout):
        raise failures[len(pauses)]

    class Stop:
        def wait(self, pause):
            pauses.append(pause)

    late = DeadlineExceeded("late")
    with pytest.raises(ServingError, match="busy"):
        serving_client._attempt(call, float("inf"), 60, 6, Stop(), late)
    assert ranges == [(0, 0.5), (0, 1), (0, 2), (0, 4), (0, 8), (0, 10)]
    assert pauses == [0.5, 7, 2, 4, 8, 10]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ({}, 0),
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "soon"}, 0),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
    ],
)
def test_retry_after(rest, header, seconds):
    rest.faults[:] = [Reply(503, "busy", header)]
    with Client(rest.url, "model", retries=0) as client, pytest.raises(ServingError) as error:
        client.generate("a")
    assert error.value.retry_after == seconds


# ------------------------------------------------------------------------------------- deadlines


def test_deadline(server):
    server.faults[:] = [HANG] * 4
    with Client(server.url, "model", timeout=1.0, request_timeout=1.0) as client:
        with pytest.raises(DeadlineExceeded) as error:
            client.generate("a")
    assert isinstance(error.value, TimeoutError) and isinstance(error.value, ServingError)
    assert len(server.requests) == 1


def test_a_request_without_an_answer_is_sent_again(server):
    server.faults[:] = [HANG]
    with Client(server.url, "model", request_timeout=1.0) as client:
        assert client.generate("a") == client.generate("a")
    assert len(server.requests) == 3


def test_a_request_without_an_answer_is_sent_again_so_often(server):
    server.faults[:] = [HANG] * 3
    with Client(server.url, "model", request_timeout=1.0, retries=1) as client:
        with pytest.raises(DeadlineExceeded):
            client.generate("a")
    assert len(server.requests) == 2


def test_no_pause_goes_beyond_the_deadline(rest):
    rest.faults[:] = [Reply(503, '{"error": "busy"}', {"Retry-After": "3600"})]
    with Client(rest.url, "model") as client:
        with pytest.raises(DeadlineExceeded, match="busy. No time is left") as error:
            client.generate("a")
    assert error.value.code == 503
    assert len(rest.requests) == 1


def test_what_minds_no_timeout_does_not_hold_up_the_caller(rest):
    released = threading.Event()
    with Client(rest.url, "model", timeout=0.2, batch_size=1) as client:
        client._transport.predict = lambda *arguments: released.wait(60)
        try:
            with pytest.raises(DeadlineExceeded, match="not done within 0.2 seconds"):
                client.generate(["a", "b", "c"])
        finally:
            released.set()


def test_an_answer_in_drops_ends_at_the_deadline(rest, monkeypatch):
    clock = itertools.count(step=1.0)
    monkeypatch.setattr(serving_transport.time, "monotonic", lambda: next(clock))
    rest.faults[:] = [Reply(200, b" " * (1 << 20))]
    with pytest.raises(DeadlineExceeded, match="did not end in time"):
        client = Client(rest.url, "model")
        client._transport.predict({"text": np.array([b"a"], object)}, "serving_default", {}, 5.0)
    client.close()


def test_the_servers_own_limit_is_not_asked_for_again(rest):
    rest.faults[:] = [Reply(504, '{"error": "timed out"}')]
    with Client(rest.url, "model") as client:
        with pytest.raises(DeadlineExceeded, match="timed out. Lower batch_size") as error:
            client.generate("a")
    assert error.value.code == 504 and len(rest.requests) == 1


# ---------------------------------------------------------------------------- malformed answers


def outputs(**columns):
    return json.dumps({"outputs": columns})


@pytest.mark.parametrize(
    "body",
    [
        "<html><body>Please log in</body></html>",
        "",
        '{"outputs": {"text": ["a"], "sc',
        "[1]",
        '{"predictions": ["a"]}',
        '{"outputs": ["a"]}',
        b'{"outputs": {"text": ["\xff"], "score": [1.0]}}',
        "[" * 100_000,
        outputs(text=["a"]),
        outputs(text=["a", "b"], score=[1.0, 2.0]),
        outputs(text=["a"], score=[1.0, 2.0]),
        outputs(text=[["a"]], score=[1.0]),
        outputs(text=[[["a"]]], score=[[[1.0]]]),
        outputs(text="a", score=1.0),
        outputs(text=[1], score=[1.0]),
        outputs(text=[None], score=[1.0]),
        outputs(text=[{"b64": "YQ=="}], score=[1.0]),
        outputs(text=["a"], score=["1.0"]),
        outputs(text=["a"], score=[None]),
        outputs(text=["a"], score=[True]),
        outputs(text=["a"], score=[{}]),
        outputs(text=[["a", "b"], ["c"]], score=[[1.0], [1.0, 2.0]]),
    ],
)
def test_malformed_answers(rest, body):
    rest.faults[:] = [Reply(200, body)]
    with Client(rest.url, "model") as client:
        with pytest.raises(
            ServingError, match="signature serving_default: malformed answer"
        ) as error:
            client.generate("a")
        assert type(error.value) is ServingError and error.value.retry_after is None
        assert len(rest.requests) == 1
        assert len(str(error.value)) < 2000
        assert client.generate("a") == "A"  # the connection is in order


def test_scores_may_be_whole_or_infinite(rest):
    rest.faults[:] = [Reply(200, '{"outputs": {"text": ["a", "b"], "score": [-1, -Infinity]}}')]
    with Client(rest.url, "model") as client:
        scores = client.generate(["a", "b"], output_scores=True).scores
    assert scores.tolist() == [[-1.0], [-np.inf]] and scores.dtype == np.float32


@pytest.mark.parametrize("tokens", [["1"], [1.5], [1 << 40], [True]])
def test_counts_are_whole_numbers(rest, tokens):
    rest.faults[:] = [Reply(200, outputs(log_probability=[-1.0], num_tokens=tokens))]
    with Client(rest.url, "model") as client, pytest.raises(ServingError, match="num_tokens must"):
        client.score("a", "b")


def test_answers_are_of_bounded_size(server, monkeypatch):
    monkeypatch.setattr(serving_transport, "MAX_ANSWER_BYTES", 2000)
    texts = ["the bird"] * 200
    with Client(server.url, "model", batch_size=200) as client:
        with pytest.raises(ServingError, match="Lower batch_size"):
            client.generate(texts)
        assert len(server.requests) == 1
        client.batch_size = 5
        assert len(client.generate(texts)) == 200


def test_malformed_answers_of_grpc(served, monkeypatch):
    outputs = {"text": tf.constant(["a"]), "score": tf.constant([1.0])}
    wrong = [
        {"text": tf.constant(["a", "b"])},
        {"text": tf.constant([b"\xff"])},
        {"text": tf.constant([1])},
        {"score": tf.constant([1.0], tf.float64)},
        {"score": tf.constant([[1.0]])},
    ]
    with GrpcServer(served) as server, Client(server.url, "model") as client:
        for change in wrong:
            monkeypatch.setattr(served, "run", lambda *_, change=change: {**outputs, **change})
            with pytest.raises(ServingError, match="malformed answer"):
                client.generate("a")
        monkeypatch.setattr(served, "run", lambda *_: outputs)
        assert client.generate("a") == "a"


@pytest.mark.parametrize("dtype", ["DT_INVALID", "DT_NONSENSE", 3000, None])
def test_malformed_metadata(rest, dtype, monkeypatch):
    signature = {"inputs": {"text": {"dtype": dtype}}}
    content = {"metadata": {"signature_def": {"signature_def": {"serving_default": signature}}}}
    monkeypatch.setattr(rest, "right_answer", lambda *_: Reply(200, json.dumps(content)))
    with Client(rest.url, "model") as client, pytest.raises(ServingError, match="malformed"):
        client.metadata()


def test_the_deadline_holds_for_what_an_error_tells_too(rest, monkeypatch):
    """The look-up of what the server has instead does not come, either."""
    right_answer = rest.right_answer
    released = threading.Event()

    def answer(method, path, body):
        if method == "GET":
            released.wait(60)
        return right_answer(method, path, body)

    monkeypatch.setattr(rest, "right_answer", answer)
    with Client(rest.url, "model", timeout=1.0) as client:
        try:
            with pytest.raises(ServingError, match="not found.*Nor does the server say") as error:
                client.generate("a", signature="nothing")
        finally:
            released.set()
    assert error.value.code == 400


@pytest.mark.parametrize("body", ["{}", "[]", '{"model_version_status": 3}', "<html>"])
def test_malformed_status(rest, body, monkeypatch):
    monkeypatch.setattr(rest, "right_answer", lambda *_: Reply(200, body))
    with Client(rest.url, "model") as client:
        if body == "{}":
            assert client.status() == []
        else:
            with pytest.raises(ServingError, match="malformed answer"):
                client.status()
        with pytest.raises(ServingError, match="malformed answer"):
            client.metadata()


# --------------------------------------------------------------------------- errors that tell more


def test_unknown_signature_lists_those_that_exist(server):
    with Client(server.url, "model") as client:
        with pytest.raises(ServingError, match="signature nothing: .*not found") as error:
            client.generate("a", signature="nothing")
    assert "It has beams, generate_xla, ids, score, serving_default" in str(error.value)
    assert error.value.code == (400 if server.kind == "rest" else "FAILED_PRECONDITION")


def test_unknown_model_tells_what_there_is(server, served):
    with Client(server.url, "other") as client:
        with pytest.raises(ServingError, match="Could not find any versions of model other"):
            client.generate("a")
    with state(served, state="LOADING"), Client(server.url, "model") as client:
        with pytest.raises(ServingError, match="The server has version 1 LOADING") as error:
            client.generate("a")
    assert error.value.code == (404 if server.kind == "rest" else "NOT_FOUND")


def test_a_server_without_xla(server, served):
    with state(served, xla=False), Client(server.url, "model") as client:
        with pytest.raises(ServingError, match="XLA compilation disabled") as error:
            client.generate("a", signature="generate_xla")
        assert "use serving_default" in str(error.value)
        assert "--xla_cpu_compilation_enabled" in str(error.value)
        assert client.generate("a") == "A"


def test_errors_that_are_no_json_are_shown(rest):
    rest.faults[:] = [Reply(400, r'{ "error": "C\'s \303 escapes" }'), Reply(500, "x" * 10_000)]
    with Client(rest.url, "model") as client:
        with pytest.raises(ServingError, match=r"400 Bad Request: .*C\\'s"):
            client.generate("a")
        with pytest.raises(ServingError, match="500 Internal Server Error: xxx") as error:
            client.generate("a")
    assert len(str(error.value)) < 1000


def test_nothing_listens(served):
    for kind in (RestServer, GrpcServer):
        with kind(served) as server:
            pass
        with Client(server.url, "model", retries=2) as client, pytest.raises(ServingError) as error:
            client.generate("a")
        assert error.value.retry_after == 0 and server.url in str(error.value)


# ------------------------------------------------------------------------------------------ state


def test_status(server, served):
    with Client(server.url, "model") as client:
        assert client.status() == [serving_client.VersionStatus(1, "AVAILABLE", "")]
        with state(served, state="END", error="no memory"):
            assert client.status() == [serving_client.VersionStatus(1, "END", "no memory")]
    with Client(server.url, "other") as client, pytest.raises(ServingError, match="other"):
        client.status()


def test_wait_until_ready(server, served, monkeypatch):
    def load(seconds):
        served.state = "AVAILABLE"

    monkeypatch.setattr(serving_client.time, "sleep", load)
    with state(served, state="LOADING"), Client(server.url, "model") as client:
        client.wait_until_ready()
        assert client.status()[0].state == "AVAILABLE"


def test_wait_until_ready_gives_up(server, served):
    with state(served, state="LOADING"), Client(server.url, "model") as client:
        with pytest.raises(DeadlineExceeded, match="Last seen: version 1 LOADING"):
            client.wait_until_ready(0.3)
    with Client(server.url, "other") as client:
        with pytest.raises(DeadlineExceeded, match="Last seen: .*Could not find any versions"):
            client.wait_until_ready(0.3)
    server.__exit__()
    with Client(server.url, "model") as client:
        with pytest.raises(DeadlineExceeded, match="not ready after 0.3 seconds"):
            client.wait_until_ready(0.3)


def test_wait_until_ready_does_not_wait_for_what_does_not_come(rest, monkeypatch):
    monkeypatch.setattr(rest, "right_answer", lambda *_: Reply(403, '{"error": "who are you"}'))
    with Client(rest.url, "model") as client:
        with pytest.raises(ServingError, match="who are you. If it requires a token") as error:
            client.wait_until_ready()
    assert error.value.code == 403 and len(rest.requests) == 1


def test_closed(server):
    client = Client(server.url, "model")
    client.generate("a")
    client.close()
    client.close()
    with pytest.raises(ValueError, match="closed"):
        client.generate("a")


# ------------------------------------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    command += " -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    files = ["-keyout", folder / "key.pem", "-out", folder / "certificate.pem"]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    return folder / "key.pem", folder / "certificate.pem"


def test_https(served, certificate, monkeypatch):
    key, chain = certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    with RestServer(served, tls=context) as server:
        with Client(server.url, "model") as client:
            with pytest.raises(ServingError, match="no secure connection.*SSL_CERT_FILE"):
                client.generate("a")
        monkeypatch.setenv("SSL_CERT_FILE", str(chain))
        with Client(server.url, "model") as client:
            assert client.generate("a") == "A"


def test_grpcs(served, certificate, monkeypatch):
    key, chain = (path.read_bytes() for path in certificate)
    with GrpcServer(served, grpc.ssl_server_credentials([(key, chain)])) as server:
        with Client(server.url, "model", retries=0) as client, pytest.raises(ServingError):
            client.generate("a")
        # gRPC reads the roots of the machine once in a process.
        credentials = grpc.ssl_channel_credentials(chain)
        monkeypatch.setattr(grpc, "ssl_channel_credentials", lambda: credentials)
        with Client(server.url, "model") as client:
            assert client.generate("a") == "A"


# -------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8501",
        "ftp://localhost",
        "http://",
        "http://user:secret@localhost",
        "http://localhost?a=b",
        "http://localhost:99999",
        "grpc://localhost",
        "grpc://localhost:8500/path",
        8501,
        None,
    ],
)
def test_url_is_checked(url):
    with pytest.raises(ValueError, match="url must be http://HOST:PORT"):
        Client(url, "model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name": "a/1"}, "model_name must be"),
        ({"model_name": ""}, "model_name must be"),
        ({"version": "1"}, "version must be an integer"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"max_concurrency": 0}, "max_concurrency must be"),
        ({"retries": -1}, "retries must be"),
        ({"timeout": 0}, "timeout must be a positive number of seconds"),
        ({"timeout": float("inf")}, "timeout must be"),
        ({"timeout": float("nan")}, "timeout must be"),
        ({"headers": {"a b": "c"}}, "headers must be"),
        ({"headers": {"a": "c\r\nd: e"}}, "headers must be"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Client("http://localhost", **{"model_name": "model", **options})


@pytest.mark.parametrize("texts", [None, 3, [3], ["a", None], [["a"]], {"text": "a"}])
def test_texts_are_checked(texts):
    with Client("http://localhost", "model") as client:
        with pytest.raises(TypeError, match="texts must be a string or a list of strings"):
            client.generate(texts)


@pytest.mark.parametrize(("url", "package"), [("http://a", "urllib3"), ("grpc://a:1", "grpc")])
def test_packages_that_are_missing_are_named(url, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*pip install .bertgen_tf\[serving\]"):
        Client(url, "model")


def test_errors_can_be_copied():
    error = copy.copy(DeadlineExceeded("busy", 503, 7.0))
    assert (str(error), error.code, error.retry_after) == ("busy", 503, 7.0)


# ------------------------------------------------------------------ tools/test_tensorflow_serving


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--help"], 0, "usage: ./tools/test_tensorflow_serving"),
        (["--enable_batching"], 2, "error: the first argument must be an export"),
        (
            ["nowhere/1"],
            2,
            "error: nowhere/1 must be an export, NAME/VERSION with a saved_model.pb",
        ),
        ([], 2, "error: no docker found: install it"),
    ],
)
def test_tool_tells_what_it_needs(arguments, code, message, tmp_path):
    for name in ("bash", "basename", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    tool = ROOT / "tools/test_tensorflow_serving"
    process = subprocess.run(
        [shutil.which("bash"), tool, *arguments],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == code
    assert message in (process.stderr if code else process.stdout)
