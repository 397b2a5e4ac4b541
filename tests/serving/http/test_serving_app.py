"""The REST API by ASGI: no socket, no process."""

import asyncio
import base64
import collections
import gzip
import json
import logging
import os
import random
import re
import shutil
import threading

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from bertgen_tf.serving.exports import Models
from bertgen_tf.serving.http import app as serving_app
from bertgen_tf.serving.http.app import ServingApp
from bertgen_tf.serving.pricing import row_sizes
from tests.helpers.litter import Litter
from tests.helpers.serving_exports import VOCABULARY, write_export

PREDICT = "/v1/models/name:predict"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_export(folder / "name/3", ">", {"parameters": 5, "files": {"a": 1}})
    return folder


@pytest.fixture(scope="module")
def models(folder):
    """Loaded; for tests that change nothing."""
    models = Models(folder)
    asyncio.run(models.look())
    return models


def http_scope(method, path, headers=()):
    return {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "http_version": "1.1",
        "headers": [(k.lower().encode(), v.encode()) for k, v in headers],
    }


async def ask(app, method, path, body=b"", headers=(), gone=None):
    """Status, headers and body of an answer; `gone`: an event by which the client goes away."""
    parts = [body[:7], body[7:]] if body else [b""]
    messages = [
        {"type": "http.request", "body": part, "more_body": number < len(parts)}
        for number, part in enumerate(parts, 1)
    ]
    sent = []

    async def receive():
        if messages:
            return messages.pop(0)
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await app(http_scope(method, path, headers), receive, send)
    answer = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    return sent[0]["status"], answer, b"".join(m.get("body", b"") for m in sent[1:])


def serve(models, test, **options):
    """Runs `test(app)` with all models of a folder loaded."""

    async def main():
        app = ServingApp(models if isinstance(models, Models) else Models(models), **options)
        await app.models.look()
        try:
            async with asyncio.timeout(120):
                return await test(app)
        finally:
            await app.stop()

    return asyncio.run(main())


def request(models, method, path, content=None, headers=(), **options):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()

    async def test(app):
        return await ask(app, method, path, b"" if content is None else body, headers)

    status, answer, body = serve(models, test, **options)
    assert answer["content-type"] == "application/json"
    return status, json.loads(body)


def predict(models, content, *headers, **options):
    return request(models, "POST", PREDICT, content, headers, **options)


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (
            {"inputs": {"text": ["a", "é"]}},
            {"outputs": {"score": [0.1, 0.2], "text": [">a", ">é"]}},
        ),
        ({"inputs": ["a"]}, {"outputs": {"score": [0.1], "text": [">a"]}}),
        ({"inputs": "a"}, {"outputs": {"score": [0.1], "text": [">a"]}}),
        ({"inputs": {"b64": "YQ=="}}, {"outputs": {"score": [0.1], "text": [">a"]}}),
        ({"inputs": {"text": {"b64": "YQ"}}}, {"outputs": {"score": [0.1], "text": [">a"]}}),
        ({"inputs": {"text": []}}, {"outputs": {"score": [], "text": []}}),
        (
            {"instances": ["a", {"b64": "YmI="}]},
            {"predictions": [{"score": 0.1, "text": ">a"}, {"score": 0.2, "text": ">bb"}]},
        ),
        (
            {"instances": [{"text": "a"}, {"text": {"b64": "YQ=="}}], "signature_name": ""},
            {"predictions": [{"score": 0.1, "text": ">a"}] * 2},
        ),
        ({"instances": ["a", "b"], "signature_name": "batch"}, {"predictions": [2, 2]}),
        ({"inputs": ["a", "b"], "signature_name": "batch"}, {"outputs": [2, 2]}),
        ({"inputs": ["a", "b"], "signature_name": "count"}, {"outputs": 2}),
        (
            {"instances": [{"b64": "/w=="}], "signature_name": "raw"},
            {"predictions": [{"b64": "/w=="}]},
        ),
        ({"inputs": {"b64": "/w=="}}, {"outputs": {"score": [0.1], "text": [">\ufffd"]}}),
        (
            {
                "instances": [
                    {"input_ids": [1, 2], "attention_mask": [1, 1]},
                    {"attention_mask": [1, 0], "input_ids": [4, 5]},
                ],
                "signature_name": "ids",
            },
            {"predictions": [{"score": 1.0, "total": 3}, {"score": 1.3333334, "total": 4}]},
        ),
        (
            {"inputs": {"input_ids": [], "attention_mask": []}, "signature_name": "ids"},
            {"outputs": {"score": [], "total": []}},
        ),
    ],
)
def test_predict(models, content, answer):
    assert predict(models, content) == (200, answer)


def test_predict_of_a_version(models):
    path = "/v1/models/name/versions/3:predict"
    assert request(models, "POST", path, {"instances": ["a"], "signature_name": "batch"}) == (
        200,
        {"predictions": [1]},
    )


IDS = {"signature_name": "ids"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "JSON Parse error"),
        (b"[" * 10**6, "nests too deep"),
        (b'{"inputs": "\xff"}', "must be UTF-8"),
        (b'{"inputs": ' + b"9" * 9999 + b"}", "JSON Parse error"),
        ([], "must be a JSON object"),
        ({}, "Missing 'inputs' or 'instances' key"),
        ({"inputs": "a", "instances": ["a"]}, "only one of"),
        ({"inputs": "a", "signature_name": 1}, "'signature_name' key must be a string value"),
        (
            {"inputs": "a", "signature_name": "no"},
            'Serving signature name: "no" not found in signature def. The signatures are: batch,',
        ),
        ({"instances": []}, "No values in 'instances' array"),
        ({"instances": "a"}, "'instances' must be a list"),
        ({"instances": [["a"], ["b"]]}, "expected a tensor of shape [?], received one with 2"),
        ({"instances": ["a", {"text": "b"}]}, "element 1 is of another kind than the first"),
        ({"instances": [{"text": "a"}, {"b64": "YQ"}]}, "element 1 is of another kind"),
        ({"instances": [{"text": "a", "b": "c"}]}, "exactly the inputs 'text'"),
        ({"instances": [[1], [2]], **IDS}, "a list of objects with the inputs"),
        (
            {"instances": [{"input_ids": [1]}], **IDS},
            "exactly the inputs 'attention_mask', 'input_ids' as keys, received ['input_ids']",
        ),
        ({"inputs": [[1]], **IDS}, "an object with the inputs 'attention_mask', 'input_ids'"),
        ({"inputs": {"text": 5}}, "5 is not of expected type: string"),
        ({"inputs": {"text": [None]}}, "None is not of expected type: string"),
        ({"inputs": {"text": ["a", ["b"]]}}, "nest to different depths"),
        ({"inputs": {"text": {"b64": "!"}}}, "unable to base64 decode"),
        ({"inputs": {"text": "\ud800"}}, "half of a surrogate pair"),
        (
            {"inputs": {"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1], [1, 0]]}, **IDS},
            "every row must have the same shape",
        ),
        (
            {"inputs": {"input_ids": [1], "attention_mask": [[1]]}, **IDS},
            "expected a tensor of shape [?, ?], received one with 1 dimensions",
        ),
        ({"inputs": {"input_ids": [[True]], "attention_mask": [[1]]}, **IDS}, "type: int32"),
        ({"inputs": {"input_ids": [[1.0]], "attention_mask": [[1]]}, **IDS}, "type: int32"),
        ({"inputs": {"input_ids": [[2**31]], "attention_mask": [[1]]}, **IDS}, "out of range"),
        (
            {"inputs": {"input_ids": [[VOCABULARY]], "attention_mask": [[1]]}, **IDS},
            f"ids must lie in [0, {VOCABULARY})",
        ),
        (
            {"inputs": {"input_ids": [[1, 2]], "attention_mask": [[1]] * 2}, **IDS},
            "ids and mask must have one shape",
        ),
        ({"instances": ["a"], "signature_name": "count"}, "Use 'inputs' instead"),
    ],
)
def test_bad_requests(models, content, message):
    status, answer = predict(models, content)
    assert status == 400 and list(answer) == ["error"]
    assert message in answer["error"] and "\n" not in answer["error"]


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("POST", "/v1/models/no:predict", 404, "Servable not found for request: Latest(no)"),
        (
            "POST",
            "/v1/models/name/versions/4:predict",
            404,
            "Servable not found for request: Specific(name, 4)",
        ),
        ("POST", "/v1/models/name/versions/x:predict", 400, "Failed to convert version: 'x'"),
        ("POST", "/v1/models/name:classify", 404, "Malformed request"),
        ("GET", PREDICT, 405, "the method must be POST"),
        ("GET", "/v1/models/name/versions/3:predict", 405, "the method must be POST"),
        ("DELETE", "/v1/models/name", 405, "the method must be GET"),
        ("GET", "/v1/models/no", 404, "Could not find any versions of model no"),
        ("GET", "/v1/models/name/versions/4", 404, "Could not find version 4 of model name"),
        ("GET", "/v1/models/no/metadata", 404, "Servable not found"),
        ("GET", "/v1/models/", 404, "there is no such path"),
        ("GET", "/v2", 404, "Malformed request: GET /v2"),
    ],
)
def test_bad_paths(models, method, path, status, message):
    content = {"inputs": "a"} if method == "POST" else None
    received, answer = request(models, method, path, content)
    assert received == status and message in answer["error"]


def test_status_and_metadata(models):
    status = {
        "model_version_status": [
            {
                "version": "3",
                "state": "AVAILABLE",
                "status": {"error_code": "OK", "error_message": ""},
            }
        ]
    }
    for path in ("/v1/models/name", "/v1/models/name/versions/3"):
        assert request(models, "GET", path) == (200, status)
    for path in ("/v1/models/name/metadata", "/v1/models/name/versions/3/metadata"):
        code, metadata = request(models, "GET", path)
        assert code == 200
        assert metadata["model_spec"] == {"name": "name", "signature_name": "", "version": "3"}
        definition = metadata["metadata"]["signature_def"]["signature_def"]["serving_default"]
        assert definition["inputs"]["text"]["dtype"] == "DT_STRING"
        assert set(definition["outputs"]) == {"text", "score"}


def test_list(models):
    code, answer = request(models, "GET", "/v1/models")
    (model,) = answer["models"]
    assert code == 200
    assert (model["name"], model["version"], model["state"]) == ("name", "3", "AVAILABLE")
    assert model["signatures"] == ["batch", "count", "ids", "raw", "serving_default"]
    assert model["metadata"] == {"parameters": 5}  # without the files


def test_alive_and_ready(folder):
    async def test(app):
        other = ServingApp(Models(folder))
        statuses = [
            [(await ask(a, "GET", path))[0] for path in ("/healthz", "/readyz")]
            for a in (other, app)
        ]
        app.models.stopping = True
        statuses.append([(await ask(app, "GET", path))[0] for path in ("/healthz", "/readyz")])
        _, headers, body = await ask(other, "GET", "/readyz")
        assert "not loaded: name" in body.decode() and headers["retry-after"] == "1"
        # Not 404, after which a client would give up.
        status, headers, body = await ask(other, "POST", PREDICT, b'{"inputs": "a"}')
        assert status == 503 and headers["retry-after"] == "1"
        assert "It is being loaded" in body.decode()
        return statuses

    assert serve(folder, test) == [[200, 503], [200, 200], [200, 503]]


def test_body_limit(models):
    content = {"inputs": "a" * 100}
    body = json.dumps(content).encode()
    assert predict(models, content, max_body_bytes=len(body))[0] == 200
    for send in (body, gzip.compress(body)):
        headers = [("Content-Encoding", "gzip")] if send is not body else []
        status, answer = predict(models, send, *headers, max_body_bytes=len(body) - 1)
        assert status == 413 and "at most" in answer["error"]


def test_the_sum_of_unfinished_bodies_is_limited(models):
    """100 clients that have sent 4 MB each, and do not go on, do not take the memory of all."""
    size = 2**16
    body = b'{"inputs": ["' + b"a" * size

    async def test(app):
        held, ends = [], asyncio.Event()

        def client():
            parts, answers = [body], []

            async def receive():
                if parts:
                    return {"type": "http.request", "body": parts.pop(), "more_body": True}
                await ends.wait()
                return {"type": "http.disconnect"}

            async def send(message):
                answers.append(message)

            return app(http_scope("POST", PREDICT), receive, send)

        held = [asyncio.create_task(client()) for _ in range(100)]
        await asyncio.sleep(0)
        status, headers, answer = await ask(app, "POST", PREDICT, b'{"inputs": "a"}' + b" " * size)
        assert status == 503 and headers["retry-after"] == "1"
        assert "are being received have more than 1,049,600 bytes" in answer.decode()
        assert (await ask(app, "POST", PREDICT, b'{"inputs": "a"}'))[0] == 200
        assert (await ask(app, "GET", "/healthz"))[0] == 200
        ends.set()
        await asyncio.gather(*held)
        for send in (body + b'"]}', gzip.compress(body + b'"]}')):
            headers = [("Content-Encoding", "gzip")] if send[:1] != b"{" else []
            for _ in range(20):  # what was counted is free again
                assert (await ask(app, "POST", PREDICT, send, headers))[0] == 200

    serve(models, test, max_body_bytes=size + 64)


def test_a_body_that_is_too_large_is_not_asked_for(models):
    async def test(app):
        headers = [("Content-Length", "101"), ("Expect", "100-continue")]
        status, headers, _ = await ask(app, "POST", PREDICT, headers=headers, gone=asyncio.Event())
        assert status == 413 and headers["connection"] == "close"

    serve(models, test, max_body_bytes=100)


def test_gzip(models):
    body = gzip.compress(b'{"inputs": "a"}')
    gzipped = ("Content-Encoding", "gzip")
    assert predict(models, body, gzipped)[0] == 200
    assert predict(models, body[:-1], gzipped)[0] == 400
    assert predict(models, body + b"x", gzipped)[0] == 400
    assert predict(models, b"x" + body, gzipped)[0] == 400
    assert predict(models, body, ("Content-Encoding", "br"))[0] == 415


def test_number_of_texts(models):
    assert predict(models, {"inputs": ["a"] * 3}, max_texts=3)[0] == 200
    status, answer = predict(models, {"inputs": ["a"] * 4}, max_texts=3)
    assert status == 413 and "at most 3 texts, received 4" in answer["error"]


def test_bytes_of_a_text(models):
    texts = ["ab", "é" * 3]
    assert predict(models, {"inputs": texts}, max_text_bytes=6)[0] == 200
    status, answer = predict(models, {"inputs": texts}, max_text_bytes=5)
    assert status == 413 and "must have at most 5 bytes, received 6" in answer["error"]


def test_a_request_has_a_price(folder):
    """What would take too long is refused at once, and by a full queue of work, too."""

    async def test(app):
        started, go_on = hold_up(app)
        signature = app.models.find("name").signatures["serving_default"]
        for count in (1, 2):  # a second for each text
            sizes = row_sizes({"text": np.array([b"a"] * count, object)}, count, None)
            signature.cost.learn(sizes.padded, float(count))

        async def send(count):
            return await ask(app, "POST", PREDICT, json.dumps({"inputs": ["a"] * count}).encode())

        status, _, answer = await send(5)
        assert status == 413 and "at most 4 such texts" in json.loads(answer)["error"]
        tasks = [asyncio.create_task(send(4)) for _ in range(3)]
        while app.batcher.queued < 9 or not started.is_set():  # others run
            await asyncio.sleep(0.001)
        status, headers, answer = await send(4)
        assert status == 503 and headers["retry-after"] == "1"
        assert "and may take 12.5. Try again" in json.loads(answer)["error"]
        metrics = (await ask(app, "GET", "/monitoring/prometheus/metrics"))[2].decode()
        (queued,) = re.findall(r"^bertgen_tf_queued_seconds (\S+)", metrics, re.MULTILINE)
        assert 8.5 < float(queued) < 11.5
        assert float(re.findall(r"^bertgen_tf_busy_seconds (\S+)", metrics, re.MULTILINE)[0]) > 0
        go_on.set()
        assert [(await task)[0] for task in tasks] == [200] * 3

    serve(folder, test, request_timeout=12.5, batch_seconds=1)


def test_size_of_an_answer(models, monkeypatch):
    monkeypatch.setattr(serving_app, "_MAX_ANSWER_ITEMS", 4)
    assert predict(models, {"inputs": ["a"] * 2})[0] == 200
    status, answer = predict(models, {"inputs": ["a"] * 3})
    assert status == 413 and "would have 6 numbers and strings" in answer["error"]


def hold_up(app):
    """Lets runs of `serving_default` wait; returns the events that one started and may go on."""
    started, go_on = threading.Event(), threading.Event()
    signature = app.models.find("name").signatures["serving_default"]
    run = signature.run

    def slow(inputs):
        started.set()
        assert go_on.wait(60)
        return run(inputs)

    signature.run = slow
    return started, go_on


def test_requests_at_the_same_time_share_a_batch(folder):
    async def test(app):
        started, go_on = hold_up(app)
        body = json.dumps({"inputs": ["a"], "signature_name": "batch"}).encode()
        first = asyncio.create_task(ask(app, "POST", PREDICT, b'{"inputs": "a"}'))
        await asyncio.to_thread(started.wait, 60)
        tasks = [asyncio.create_task(ask(app, "POST", PREDICT, body)) for _ in range(5)]
        while app.batcher.queued < 5:
            await asyncio.sleep(0)
        go_on.set()
        assert [json.loads((await task)[2]) for task in tasks] == [{"outputs": [5]}] * 5
        assert (await first)[0] == 200

    serve(folder, test)


def test_full_queue(folder):
    async def test(app):
        started, go_on = hold_up(app)
        body = b'{"inputs": ["a", "b"]}'
        tasks = [asyncio.create_task(ask(app, "POST", PREDICT, body))]
        await asyncio.to_thread(started.wait, 60)
        tasks.append(asyncio.create_task(ask(app, "POST", PREDICT, body)))
        while not app.batcher.queued:
            await asyncio.sleep(0)
        status, headers, answer = await ask(app, "POST", PREDICT, body)
        assert status == 503 and headers["retry-after"] == "1"
        assert "2 texts wait, but at most 3 may" in json.loads(answer)["error"]
        go_on.set()
        assert [(await task)[0] for task in tasks] == [200, 200]

    serve(folder, test, max_queued_texts=3)


def test_time_is_over(folder):
    async def test(app):
        started, go_on = hold_up(app)
        statuses = [(await ask(app, "POST", PREDICT, b'{"inputs": "a"}'))[0] for _ in range(2)]
        assert statuses == [504, 504] and app.batcher.queued == 0
        go_on.set()

    serve(folder, test, request_timeout=0.05)


def test_a_batch_that_hangs_is_no_sign_of_life(folder):
    """From four times the time of a request on: then nobody waits for it."""

    async def test(app):
        started, go_on = hold_up(app)
        assert app.batcher.busy_seconds == 0
        task = asyncio.create_task(ask(app, "POST", PREDICT, b'{"inputs": "a"}'))
        await asyncio.to_thread(started.wait, 60)
        assert (await ask(app, "GET", "/healthz"))[0] == 200
        while (await ask(app, "GET", "/healthz"))[0] == 200:
            await asyncio.sleep(0.01)
        assert app.batcher.busy_seconds > 0.4 and (await task)[0] == 504
        for path in ("/healthz", "/readyz"):
            status, headers, body = await ask(app, "GET", path)
            assert status == 503 and headers["retry-after"] == "1"
            assert "A batch has run for" in json.loads(body)["error"]
        go_on.set()
        while app.batcher.busy_seconds:
            await asyncio.sleep(0.01)
        assert (await ask(app, "GET", "/healthz"))[0] == 200

    serve(folder, test, request_timeout=0.1)


def test_models_are_listed_before_they_load(folder):
    other = ServingApp(Models(folder))
    status, _, body = asyncio.run(ask(other, "GET", "/v1/models"))
    assert status == 200
    (model,) = json.loads(body)["models"]
    assert (model["name"], model["version"], model["state"]) == ("name", "3", "LOADING")


def test_versions_of_int64_can_be_asked_for(folder, tmp_path):
    number = 2**63 - 1
    shutil.copytree(folder / "name/3", tmp_path / f"models/name/{number}")
    path = f"/v1/models/name/versions/{number}"
    models = Models(tmp_path / "models")
    assert request(models, "POST", f"{path}:predict", {"inputs": ["a"]})[0] == 200
    assert request(models, "GET", f"/v1/models/name/versions/{number + 1}")[0] == 400


# ------------------------------------------------------------- anything in the folder of a server


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="makes sockets by /proc")
def test_anything_in_the_folder_of_a_running_server(folder, tmp_path, caplog):
    """BERTGEN_FUZZ_STEPS and BERTGEN_FUZZ_SEED make it longer, and another one."""
    caplog.set_level(logging.CRITICAL)
    steps = int(os.environ.get("BERTGEN_FUZZ_STEPS", 120))
    seed = os.environ.get("BERTGEN_FUZZ_SEED", "1")
    print(f"BERTGEN_FUZZ_SEED={seed}")  # pytest shows it where the test fails
    root = tmp_path / "models"
    shutil.copytree(folder / "name/3", root / "good/1")
    litter = Litter(random.Random(seed), root, folder / "name/3")
    write_export(tmp_path / "new", "*")
    path, body = "/v1/models/good:predict", b'{"inputs": ["a", "b"]}'
    done, told = collections.Counter(), set()

    async def test(app):
        await app.start()
        expected = (await ask(app, "POST", path, body))[2]
        assert json.loads(expected)["outputs"]["text"] == [">a", ">b"]
        for _ in range(steps):
            done[await asyncio.to_thread(litter.step)] += 1
            status, _, answer = await ask(app, "POST", path, body)
            assert (status, answer) == (200, expected)
            status, _, listed = await ask(app, "GET", "/v1/models")
            assert status == 200
            models = json.loads(listed, parse_constant=pytest.fail)["models"]
            assert all(re.fullmatch("[A-Za-z0-9._-]+", model["name"]) for model in models)
            for model in models:
                status, _, answer = await ask(app, "GET", f"/v1/models/{model['name']}")
                assert status == 200
                assert str(tmp_path) not in answer.decode(), answer.decode()
                versions = json.loads(answer)["model_version_status"]
                told.update(version["status"]["error_code"] for version in versions)
            for probe in ("/healthz", "/readyz", "/monitoring/prometheus/metrics"):
                assert (await ask(app, "GET", probe))[0] == 200
        # A new version is taken up.
        (tmp_path / "new").rename(root / f"good/{2**63 - 1}")
        while b"*a" not in (await ask(app, "POST", path, body))[2]:
            await asyncio.sleep(0.01)

    serve(root, test, poll_seconds=0.02)
    assert len(done) == 6 and told > {"OK"}


def test_a_client_that_goes_leaves_the_queue(folder):
    async def test(app):
        started, go_on = hold_up(app)
        gone = asyncio.Event()
        body = b'{"inputs": "a"}'
        first = asyncio.create_task(ask(app, "POST", PREDICT, body))
        await asyncio.to_thread(started.wait, 60)
        second = asyncio.create_task(ask(app, "POST", PREDICT, body, gone=gone))
        while not app.batcher.queued:
            await asyncio.sleep(0)
        gone.set()
        assert (await second)[0] == 499 and app.batcher.queued == 0
        go_on.set()
        assert (await first)[0] == 200
        metrics = (await ask(app, "GET", "/monitoring/prometheus/metrics"))[2].decode()
        assert 'signature="serving_default",status="499"} 1.0' in metrics

    serve(folder, test)


def test_internal_errors_tell_the_log_only(folder, caplog):
    async def test(app):
        def broken(inputs):
            raise RuntimeError("secret")

        app.models.find("name").signatures["serving_default"].run = broken
        return await ask(app, "POST", PREDICT, b'{"inputs": "a"}')

    status, _, body = serve(folder, test)
    assert status == 500 and json.loads(body)["error"].startswith("Internal error")
    assert b"secret" not in body
    (record,) = [record for record in caplog.records if record.exc_info]
    assert record.exc_info[1].args == ("secret",)


def test_metrics(models):
    async def test(app):
        body = json.dumps({"inputs": ["a", "b"]}).encode()
        await ask(app, "POST", PREDICT, body)
        await ask(app, "POST", PREDICT, b"{}")
        await ask(app, "POST", "/v1/models/made-up:predict", body)
        other = json.dumps({"inputs": "a", "signature_name": "made-up"}).encode()
        await ask(app, "POST", PREDICT, other)
        _, headers, text = await ask(app, "GET", "/monitoring/prometheus/metrics")
        return headers["content-type"], text.decode()

    kind, text = serve(models, test)
    assert kind.startswith("text/plain")
    labels = 'model="name",signature="serving_default"'
    for line in (
        f'bertgen_tf_requests_total{{{labels},status="200"}} 1.0',
        f"bertgen_tf_texts_total{{{labels}}} 2.0",
        f"bertgen_tf_request_seconds_count{{{labels}}} 2.0",
        'bertgen_tf_batch_size_bucket{le="2.0",signature="serving_default"} 1.0',
        "bertgen_tf_queued_texts 0.0",
        'bertgen_tf_model_version_loaded{model="name",version="3"} 1.0',
    ):
        assert line in text
    assert "made-up" not in text


def test_log_of_a_request(models, caplog):
    caplog.set_level("INFO")
    assert predict(models, {"inputs": ["a", "b"]})[0] == 200
    (record,) = [record for record in caplog.records if record.message == "request"]
    fields = ("method", "path", "status", "model", "signature", "texts", "batch")
    assert [vars(record)[field] for field in fields] == [
        "POST",
        PREDICT,
        200,
        "name",
        "serving_default",
        2,
        2,
    ]
    assert record.ms > 0


def test_probes_are_not_logged(models, caplog):
    caplog.set_level("INFO")

    async def test(app):
        paths = ["/healthz", "/readyz", "/v1/models/name", "/monitoring/prometheus/metrics"]
        app.models.stopping = True  # not ready is no news, either: why is in lines of its own
        statuses = [(await ask(app, "GET", path))[0] for path in [*paths, "/v1/models/other"]]
        app.models.stopping = False
        return [*statuses, (await ask(app, "GET", "/readyz"))[0]]

    assert serve(models, test) == [200, 503, 200, 200, 404, 200]
    logged = [record.path for record in caplog.records if record.message == "request"]
    assert logged == ["/v1/models/other"]


def test_page(models, monkeypatch, tmp_path):
    async def test(app):
        return await ask(app, "GET", "/")

    (tmp_path / "playground.html").write_text("<p>")
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    status, headers, body = serve(models, test)
    assert (status, body) == (200, b"<p>")
    assert headers["content-type"].startswith("text/html")
    assert headers["content-security-policy"].startswith("default-src 'none'; ")
    (tmp_path / "playground.html").unlink()
    status, headers, body = serve(models, test)
    assert status == 404 and "has no page" in json.loads(body)["error"]


def test_a_new_version_is_found_while_requests_run(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "models")
    write_export(tmp_path / "new/4", "*")

    async def test(app):
        await app.start()
        (tmp_path / "new/4").rename(tmp_path / "models/name/4")
        seen = []
        while True:
            status, _, body = await ask(app, "POST", PREDICT, b'{"inputs": "a"}')
            assert status == 200
            seen.append(json.loads(body)["outputs"]["text"][0])
            if seen[-1] == "*a":
                return seen

    seen = serve(tmp_path / "models", test, poll_seconds=0.01)
    assert set(seen[:-1]) <= {">a"}


def test_the_old_version_stays_while_a_request_needs_it(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "models")

    async def test(app):
        started, go_on = hold_up(app)
        task = asyncio.create_task(ask(app, "POST", PREDICT, b'{"inputs": "a"}'))
        await asyncio.to_thread(started.wait, 60)
        shutil.copytree(folder / "name/3", tmp_path / "models/name/4")
        await app.models.look()
        status = (await ask(app, "GET", "/v1/models/name/versions/3"))[2]
        assert json.loads(status)["model_version_status"][0]["state"] == "UNLOADING"
        go_on.set()
        assert (await task)[0] == 200
        status = (await ask(app, "GET", "/v1/models/name/versions/3"))[2]
        assert json.loads(status)["model_version_status"][0]["state"] == "END"

    serve(tmp_path / "models", test)


def test_base64_of_any_bytes(models):
    data = bytes(range(256))
    content = {"inputs": {"b64": base64.b64encode(data).decode()}, "signature_name": "raw"}
    _, answer = predict(models, content)
    assert base64.b64decode(answer["outputs"][0]["b64"]) == data
