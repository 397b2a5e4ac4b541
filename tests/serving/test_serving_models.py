"""Exports are found, loaded, replaced; what is broken costs nothing else."""

import asyncio
import contextlib
import json
import os
import shutil
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

from bertgen_tf.checkpoints import versions as on_disk
from bertgen_tf.export import files as export_files
from bertgen_tf.serving import exports as served
from bertgen_tf.serving.exports import Models, NotLoadedYet, Version
from bertgen_tf.serving.pricing import Size
from bertgen_tf.serving.signatures import Signature
from tests.helpers.serving_exports import VOCABULARY, write_export


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Exports to copy: `a` and `b`, which mark their texts."""
    folder = tmp_path_factory.mktemp("exports")
    for marker in "ab":
        write_export(folder / marker, marker, {"batch_sizes": [1, 2, 8], "parameters": 5})
    return folder


@pytest.fixture
def folder(tmp_path, exports):
    shutil.copytree(exports / "a", tmp_path / "models/name/1")
    return tmp_path / "models"


def look(models, times=1):
    async def main():
        for _ in range(times):
            await models.look()

    asyncio.run(main())


def answer(version, text=b"x"):
    return version.signatures["serving_default"].run({"text": np.array([text], object)})["text"][0]


def states(models, name="name"):
    return [(v.number, v.state) for v in models.versions(name)]


@pytest.mark.slow
def test_loads_what_is_there(folder, exports):
    shutil.copytree(exports / "b", folder / "other/12")
    (folder / "other/notes").mkdir()
    (folder / "other/.13-temporary").mkdir()
    (folder / "empty").mkdir()
    (folder / "README.md").write_text("")
    models = Models(folder)
    assert models.names == ["name", "other"] and not models.ready
    with pytest.raises(NotLoadedYet, match=r"Servable not found for request: Latest\(name\)"):
        models.find("name")
    look(models)
    assert models.ready
    assert answer(models.find("name")) == b"ax"
    assert answer(models.find("other", 12)) == b"bx"
    version = models.find("name")
    assert version.describe() == {
        "version": "1",
        "state": "AVAILABLE",
        "status": {"error_code": "OK", "error_message": ""},
    }
    assert version.metadata["parameters"] == 5
    assert version.signatures["ids"].max_batch_size == 8
    assert [s.name for s in version.signatures.values() if not s.has_rows] == ["count"]
    assert version.signature_defs["serving_default"]["inputs"]["text"] == {
        "name": "serving_default_text:0",
        "dtype": "DT_STRING",
        "tensor_shape": {"dim": [{"size": "-1", "name": ""}], "unknown_rank": False},
    }
    assert version.signature_defs["serving_default"]["method_name"] == "tensorflow/serving/predict"


def test_all_are_listed_while_the_first_one_loads(folder, exports, monkeypatch):
    shutil.copytree(exports / "a", folder / "other/2")
    models, seen, load = Models(folder), [], Version.load

    def watched(version):
        listed = [versions[0] for versions in map(models.versions, models.names)]
        seen.append([(v.model, v.state, v.metadata.get("parameters")) for v in listed])
        load(version)

    monkeypatch.setattr(Version, "load", watched)
    look(models)
    assert seen[0] == [("name", "LOADING", 5), ("other", "LOADING", 5)]
    assert [state for _, state, _ in seen[1]] == ["AVAILABLE", "LOADING"]


@pytest.mark.parametrize(
    ("given", "name", "number"), [("models/name", "name", 1), ("models/name/1", "name", 1)]
)
def test_folder_of_a_model_or_a_version(folder, given, name, number):
    models = Models(folder.parent / given)
    look(models)
    assert models.names == [name] and models.find(name).number == number


def test_folder_of_a_version_without_a_number(tmp_path, exports):
    models = Models(exports / "a")
    look(models)
    assert models.names == ["a"] and models.find("a").number == 1


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "no versions"])
def test_nothing_to_serve(tmp_path, kind):
    folder = tmp_path / "models"
    if kind == "file":
        folder.write_text("")
    elif kind != "missing":
        (folder / "name/version" if kind == "no versions" else folder).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="expected NAME/VERSION/saved_model.pb"):
        Models(folder)


def test_unknown_names_and_versions(folder):
    models = Models(folder)
    look(models)
    with pytest.raises(LookupError, match=r"request: Latest\(no\)\. The models are: name"):
        models.find("no")
    with pytest.raises(LookupError, match=r"request: Specific\(name, 2\)\. Version 1 is served"):
        models.find("name", 2)
    with pytest.raises(LookupError, match="Could not find any versions of model no"):
        models.versions("no")
    with pytest.raises(LookupError, match="Could not find version 2 of model name"):
        models.versions("name", 2)


def test_a_higher_version_takes_over_and_the_old_one_ends_with_its_requests(folder, exports):
    models = Models(folder)
    look(models)
    old = models.find("name")
    with old.in_use():
        shutil.copytree(exports / "b", folder / "name/10")
        shutil.copytree(exports / "b", folder / "name/9")
        look(models)
        assert answer(models.find("name")) == b"bx"
        assert states(models) == [(10, "AVAILABLE"), (1, "UNLOADING")]
        assert answer(old) == b"ax"
        with pytest.raises(LookupError):
            models.find("name", 1)
    assert states(models) == [(10, "AVAILABLE"), (1, "END")]
    assert not old.signatures
    look(models)
    assert len(models.versions("name")) == 2


def test_the_old_version_answers_while_the_new_one_loads(folder, exports, monkeypatch):
    models = Models(folder)
    look(models)
    loading, go_on = threading.Event(), threading.Event()
    load = Version.load

    def slow(version):
        loading.set()
        assert go_on.wait(60)
        load(version)

    monkeypatch.setattr(Version, "load", slow)
    shutil.copytree(exports / "b", folder / "name/2")

    async def main():
        task = asyncio.create_task(models.look())
        assert await asyncio.to_thread(loading.wait, 60)
        assert states(models) == [(2, "LOADING"), (1, "AVAILABLE")]
        assert answer(models.find("name")) == b"ax" and models.ready
        go_on.set()
        await task

    asyncio.run(main())
    assert answer(models.find("name")) == b"bx"


@pytest.mark.slow
def test_a_broken_version_costs_nothing_else(folder, exports, caplog):
    models = Models(folder)
    look(models)
    broken = folder / "name/2"
    broken.mkdir()
    shutil.copytree(exports / "b", folder / "other/1")
    look(models, times=3)
    assert answer(models.find("name")) == b"ax" and answer(models.find("other")) == b"bx"
    (status,) = [v.describe() for v in models.versions("name", 2)]  # tried once
    assert status["state"] == "END"
    assert status["status"]["error_code"] == "NOT_FOUND"
    assert "has no saved_model.pb" in status["status"]["error_message"]
    assert [r.message for r in caplog.records if r.levelname == "ERROR"] == [
        f"cannot load: {status['status']['error_message']}"
    ]
    # Copied file by file it is broken for a while.
    for file in sorted((exports / "b").iterdir(), reverse=True):
        copy = shutil.copytree if file.is_dir() else shutil.copy2
        copy(file, broken / file.name)
        look(models)
    assert answer(models.find("name")) == b"bx" and models.find("name").number == 2


def refuse(condition, error):
    if condition:
        raise error


NOT_SHOWN = {
    "nan": '{"loss": NaN}',
    "infinite": '{"loss": 1e999}',
    "deep": '{"a": ' + "[" * 60 + "]" * 60 + "}",
    "deepest": "[" * 10**5,
    "large": json.dumps({"description": "a" * 2**20}),
    "largest": "",
    "integer": "1" * 5000,
    "list": "[]",
    "pipe": None,
}


@pytest.mark.parametrize("kind", NOT_SHOWN)
def test_metadata_that_cannot_be_shown(folder, caplog, monkeypatch, kind):
    """What the list of all models cannot hold is ignored, as where there is none."""
    monkeypatch.setattr(Version, "load", lambda version: None)
    path = folder / "name/1/metadata.json"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_text(NOT_SHOWN[kind])
    if kind == "largest":
        os.truncate(path, 2**40)
    models = Models(folder)
    look(models)
    assert models.find("name").metadata == {}
    assert [r.levelname for r in caplog.records if str(path) in r.message] == ["WARNING"]


@pytest.mark.parametrize("sizes", [[10**9], [0], [True], ["8"], [], {}, 8, [2**5000]])
def test_batch_sizes_that_no_export_has(folder, caplog, sizes):
    (folder / "name/1/metadata.json").write_text(json.dumps({"batch_sizes": sizes}))
    models = Models(folder)
    look(models)
    assert models.find("name").signatures["ids"].max_batch_size == 32
    assert any("ignored batch_sizes" in message for message in caplog.messages)


@pytest.mark.parametrize("kind", ["pipe", "lock", "empty graph", "directory", "unreadable"])
def test_files_of_any_kind(folder, exports, monkeypatch, kind):
    """Loaded, or told why; and tried again once it is mended."""
    new = shutil.copytree(exports / "b", folder / "name/2")
    if kind == "pipe":
        os.mkfifo(new / "variables/other")
    elif kind == "lock":
        (new / ".#saved_model.pb").symlink_to("user@host.1234:5678")
    elif kind == "unreadable":  # root reads all, so by hand
        refused = PermissionError(13, "Permission denied", str(new / "saved_model.pb"))
        monkeypatch.setattr(on_disk, "check_files", lambda path: refuse(path == new, refused))
    else:
        (new / "saved_model.pb").unlink()
        make = Path.touch if kind == "empty graph" else Path.mkdir
        make(new / "saved_model.pb")
    models = Models(folder)
    look(models)
    monkeypatch.undo()
    if kind == "lock":
        assert models.find("name").number == 2
        return
    assert answer(models.find("name")) == b"ax"  # the next lower one, at once
    status = models.versions("name")[0].describe()
    assert status["state"] == "END" and str(folder) not in status["status"]["error_message"]
    assert (status["status"]["error_code"], status["status"]["error_message"]) == {
        "pipe": (
            "UNKNOWN",
            "name/2/variables/other must be a file, but is a pipe, a socket or a device.",
        ),
        "empty graph": ("UNKNOWN", "name/2/saved_model.pb holds no graph"),
        "directory": ("NOT_FOUND", "name/2 has no saved_model.pb"),
        "unreadable": (
            "PERMISSION_DENIED",
            "[Errno 13] Permission denied: 'name/2/saved_model.pb'",
        ),
    }[kind]
    shutil.rmtree(new)
    shutil.copytree(exports / "b", new)
    look(models)
    assert answer(models.find("name")) == b"bx"


def hang(monkeypatch, model, number):
    """Loads of a version wait for the event that this returns."""
    load, go_on = Version.load, threading.Event()

    def slow(version):
        if (version.model, version.number) == (model, number):
            assert go_on.wait(60)
        load(version)

    monkeypatch.setattr(Version, "load", slow)
    return go_on


def test_a_load_that_hangs_has_a_deadline_and_holds_up_no_other(folder, exports, monkeypatch):
    for path in ("bad/1", "bad/2"):
        shutil.copytree(exports / "b", folder / path)
    go_on = hang(monkeypatch, "bad", 2)
    models = Models(folder, load_timeout=0.5)

    async def main():
        await models.look(0.01)
        late = models.versions("bad", 2)[0]
        assert late.state == "LOADING"
        while not models.current("name"):  # does not wait for it
            await asyncio.sleep(0.01)
        assert states(models, "bad") == [(2, "LOADING")]
        while not models.current("bad"):
            await asyncio.sleep(0.01)
        assert late.describe()["status"] == {
            "error_code": "DEADLINE_EXCEEDED",
            "error_message": "It was not loaded within 0.5 seconds",
        }
        assert states(models, "bad") == [(2, "END"), (1, "AVAILABLE")] and models.ready
        shutil.copytree(exports / "a", folder / "bad/3")
        while models.current("bad").number != 3:  # the garbage may still be collected
            await models.look()
        assert answer(models.find("bad")) == b"ax"
        go_on.set()
        (thread,) = [t for t in threading.enumerate() if t.name == "bertgen_tf-load bad/2"]
        await asyncio.to_thread(thread.join, 60)
        assert late.state == "END" and not late.signatures

    asyncio.run(main())


def test_a_disk_that_hangs_stops_no_answers(folder, exports, monkeypatch, caplog):
    models = Models(folder)
    look(models)
    go_on, scan = threading.Event(), on_disk.VersionFolder.scan
    monkeypatch.setattr(on_disk.VersionFolder, "scan", lambda self: [go_on.wait(60), scan(self)][1])
    shutil.copytree(exports / "b", folder / "name/2")

    async def main():
        task = asyncio.create_task(models.look(0.01))
        while not any("cannot be read yet" in message for message in caplog.messages):
            await asyncio.sleep(0.01)
        assert answer(models.find("name")) == b"ax" and not task.done()
        go_on.set()
        await task
        while models.find("name").number != 2:
            await asyncio.sleep(0.01)

    asyncio.run(main())


def test_one_that_ends_the_interpreter_ends_its_load_only(folder, exports, monkeypatch):
    shutil.copytree(exports / "b", folder / "bad/1")
    load = Version.load

    def leave(version):
        if version.model == "bad":
            raise SystemExit(3)
        load(version)

    monkeypatch.setattr(Version, "load", leave)
    models = Models(folder)
    look(models)
    assert models.current("name")
    assert models.versions("bad")[0].error == ("UNKNOWN", "SystemExit: 3")


def test_models_that_never_loaded_are_forgotten_with_their_folders(folder):
    (folder / "other/1").mkdir(parents=True)
    models = Models(folder)
    assert states(models, "other") == [(1, "LOADING")]
    look(models)
    assert not models.ready
    shutil.rmtree(folder / "other")
    look(models)
    assert models.names == ["name"] and models.ready


@pytest.mark.parametrize("real", ["/", "/2", "/elsewhere/name/2", ""])
def test_clients_are_told_no_paths(real):
    version = Version("name", 2, Path("/models/name/2"), _real_path=real)
    version.fail(OSError(f"/models/name/2/a, {real or '/models/name/2'}/b"))
    behind = real if real == "/" else "name/2"
    assert version.error == ("NOT_FOUND", f"name/2/a, {behind}/b")


def test_a_name_that_cannot_be_served_is_told_at_the_start(folder):
    (folder / "name").rename(folder / "my name")
    with pytest.raises(FileNotFoundError, match="my name must have a name of letters, digits"):
        Models(folder)


@pytest.mark.parametrize("damage", ["graph", "weights", "metadata"])
def test_damaged_files(folder, damage):
    """Found by TensorFlow, where there are no checksums."""
    path = {
        "graph": folder / "name/1/saved_model.pb",
        "weights": next((folder / "name/1/variables").glob("*.data*")),
        "metadata": folder / "name/1/metadata.json",
    }[damage]
    whole = path.read_bytes()
    path.write_bytes(b"\xff damaged")
    models = Models(folder, verify=damage != "metadata")
    look(models)
    if damage == "metadata":
        assert models.find("name").metadata == {}
        assert models.find("name").signatures["ids"].max_batch_size == 32
    else:
        assert not models.ready
        assert models.versions("name")[0].error[1]
        with pytest.raises(LookupError, match="Version 1 cannot be loaded: .+") as error:
            models.find("name")
        assert not isinstance(error.value, NotLoadedYet)
        path.write_bytes(whole)
        look(models)
        assert answer(models.find("name")) == b"ax"


@pytest.mark.parametrize("files", [["a.txt"], None, {"saved_model.pb": {"sha256": "0"}}])
def test_a_metadata_file_of_somebody_else(folder, files):
    """Its `files` may mean anything."""
    (folder / "name/1/metadata.json").write_text(json.dumps({"files": files, "versions": [1]}))
    models = Models(folder)
    look(models)
    assert answer(models.find("name")) == b"ax"


@pytest.mark.parametrize("name", ["saved_model.pb", "variables/variables.index", "metadata.json"])
def test_files_that_differ_from_their_checksums(folder, exports, name):
    """The version before it is served."""
    newer = shutil.copytree(exports / "b", folder / "name/2")
    content = json.loads((newer / "metadata.json").read_text())
    content["files"] = export_files.describe_files(newer)
    content["versions"] = {"bertgen_tf": "0.1.0"}
    (newer / "metadata.json").write_text(json.dumps(content))
    path = newer / name
    whole = path.read_bytes()
    path.write_bytes(b"{" if name == "metadata.json" else whole + b"\0")
    models = Models(folder)
    look(models, times=2)
    assert states(models) == [(2, "END"), (1, "AVAILABLE")]
    code, message = models.versions("name", 2)[0].error
    assert code == "DATA_LOSS" and f"name/2/{name} should " in message
    assert message.endswith(": copy the export again.")
    path.write_bytes(whole)
    look(models)
    assert answer(models.find("name")) == b"bx"


@pytest.mark.parametrize("ids, works", [(5, True), (VOCABULARY, False)])
def test_warmup_requests_run_before_it_answers(folder, monkeypatch, ids, works):
    """One that fails keeps a version from loading, as in TensorFlow Serving.

    Where they run, they run again to measure what requests cost.
    """
    request = predict_pb2.PredictRequest()
    request.model_spec.signature_name = "ids"
    request.inputs["input_ids"].CopyFrom(tf.make_tensor_proto([[ids]]))
    request.inputs["attention_mask"].CopyFrom(tf.make_tensor_proto([[1]]))
    log = prediction_log_pb2.PredictionLog()
    log.predict_log.request.CopyFrom(request)
    path = folder / "name/1" / export_files.WARMUP_FILE
    path.parent.mkdir()
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(log.SerializeToString())
    ran = []
    run = Signature.run_graph
    monkeypatch.setattr(
        Signature, "run_graph", lambda *args: [ran.append(args[0].name), run(*args)][1]
    )
    models = Models(folder)
    look(models)
    assert ran == ["ids"] * (5 if works else 1)
    if works:
        assert models.find("name").signatures["ids"].cost.seconds(Size(100.0, 0.0)) > 0
    assert models.ready == works
    assert "ids must lie in" in models.versions("name")[0].error[1] or works


def test_a_lower_version_where_the_highest_is_broken(folder):
    (folder / "name/2").mkdir()
    models = Models(folder)
    look(models, times=2)
    assert answer(models.find("name")) == b"ax" and models.ready


def test_a_version_that_is_taken_away(folder, exports):
    shutil.copytree(exports / "b", folder / "name/2")
    models = Models(folder)
    look(models)
    assert answer(models.find("name")) == b"bx"
    shutil.rmtree(folder / "name/2")
    look(models)
    assert answer(models.find("name")) == b"ax"
    shutil.rmtree(folder)
    look(models)
    assert answer(models.find("name")) == b"ax" and models.ready


def test_a_version_that_is_written_anew(folder, exports):
    models = Models(folder)
    look(models)
    shutil.rmtree(folder / "name/1")
    shutil.copytree(exports / "b", folder / "name/1")
    look(models)
    assert answer(models.find("name", 1)) == b"bx"


def test_a_newcomer_that_is_broken_does_not_stop_the_others(folder):
    models = Models(folder)
    look(models)
    assert models.ready
    (folder / "other/1").mkdir(parents=True)
    look(models)
    assert models.names == ["name", "other"] and models.ready
    models.stopping = True
    assert not models.ready


@pytest.mark.slow
def test_status_tells_of_what_is_there(folder):
    """And of nothing else, whatever came and went in weeks."""
    models = Models(folder)
    for number in (2, 3, 4):
        (folder / f"name/{number}").mkdir()
        look(models)
    for content in "abc":
        (folder / "name/4/file").write_text(content * 5)
        look(models)
    (folder / "name/2").rmdir()
    look(models, times=3)
    assert states(models) == [(4, "END"), (3, "END"), (1, "AVAILABLE")]


@pytest.mark.parametrize("asked", [False, True])
def test_what_a_version_held_is_freed_when_it_is_unloaded(folder, exports, monkeypatch, asked):
    """At once, or when its last request is done."""
    freed = threading.Semaphore(0)
    monkeypatch.setattr(served, "_free_memory", freed.release)
    models = Models(folder)
    look(models)
    version = models.find("name")
    held = weakref.ref(version.signatures["serving_default"])
    shutil.copytree(exports / "b", folder / "name/2")
    assert freed.acquire(timeout=10)  # after the first load
    with version.in_use() if asked else contextlib.nullcontext():
        look(models)
        assert freed.acquire(timeout=10)
        assert (held() is None) != asked
        assert freed.acquire(timeout=10 * (not asked)) != asked
    assert held() is None
    assert freed.acquire(timeout=10 * asked) == asked
