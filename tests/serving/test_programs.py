"""Which graph answers, what is compiled when, and what is kept of it."""

import asyncio
import os
import stat
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf.meta_graph_pb2 import SignatureDef

from bertgen_tf.checks import sha256
from bertgen_tf.serving import exports
from bertgen_tf.serving import programs as served
from bertgen_tf.serving.exports import Models
from bertgen_tf.serving.programs import Programs, Shape, keep_programs
from bertgen_tf.serving.signatures import Signature, connect_programs, prepare
from tests.helpers.serving_exports import write_export


def texts(*values):
    return {"text": np.array([value.encode() for value in values], object)}


def count_tokens(inputs):
    return {"num_tokens": np.array([len(text) for text in inputs["text"].reshape(-1)], np.int32)}


class Compiler:
    """Compiles when it is told to; remembers what."""

    def __init__(self):
        self.turns = threading.Semaphore(0)
        self.order = []

    def __call__(self, inputs):
        self.turns.acquire(timeout=20)
        self.order.append(inputs["text"].tolist())
        if b"broken" in inputs["text"].tolist():
            raise ValueError("cannot")


@pytest.fixture
def compiler():
    compiler = Compiler()
    yield compiler
    compiler.turns.release(100)  # one thread of the process compiles at a time


@pytest.fixture
def programs():
    programs = Programs(count_tokens, [16, 32, 40])
    yield programs
    programs.close()


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ([3], Shape(1, 16)),
        ([16, 1], Shape(2, 16)),
        ([1, 17, 2], Shape(4, 32)),
        ([33] * 5, Shape(8, 40)),
        ([500], Shape(1, 40)),  # it is cut
        ([], Shape(1, 16)),
    ],
)
def test_shapes(programs, sizes, shape):
    assert programs.shape(texts(*("x" * size for size in sizes))["text"]) == shape


def test_a_scalar_is_a_batch_of_one(programs):
    assert programs.shape(np.array(b"x" * 20, object)) == Shape(1, 32)


def test_most_used_first_and_each_once(programs, compiler):
    wanted = [texts("a"), texts("b", "b"), texts("c" * 20)]
    found = [programs.want(compiler, "generate_xla", inputs, uses=0) for inputs in wanted]
    assert [program.state for program in found] == ["waiting"] * 3
    done = []
    programs.add_task(lambda: done.append(list(compiler.order)))
    for _ in range(2):
        programs.want(compiler, "generate_xla", texts("d" * 20))
    programs.want(compiler, "generate_xla", texts("e", "e"))
    programs.start("test")
    for count in (1, 2, 3):
        compiler.turns.release()
        wait_for(lambda count=count: sum(p.state == "ready" for p in found) == count)
    assert compiler.order == [[b"c" * 20], [b"b", b"b"], [b"a"]]
    assert done == [compiler.order[:2]]  # before what nobody asked for
    assert programs.want(compiler, "generate_xla", texts("f")) is found[0]
    # The same shape of another signature is another program.
    assert programs.want(compiler, "beams_xla", texts("f")).state == "waiting"


def test_what_cannot_be_compiled_is_not_tried_again(programs, compiler, caplog):
    compiler.turns.release(10)
    program = programs.want(compiler, "generate_xla", texts("broken"))
    programs.add_task(lambda: 1 / 0)
    programs.start("test")
    wait_for(lambda: program.state == "failed")
    assert programs.want(compiler, "generate_xla", texts("broken")) is program
    other = programs.want(compiler, "generate_xla", texts("x", "x"))
    wait_for(lambda: other.state == "ready")
    assert len(compiler.order) == 2
    assert "cannot compile: cannot" in caplog.text
    assert "cannot prepare a signature" in caplog.text


def test_programs_are_bounded(programs, compiler, monkeypatch, caplog):
    """What nobody asked for gives way to what is asked for."""
    monkeypatch.setattr(served, "_MAX_PROGRAMS", 2)
    compiler.turns.release(10)
    programs.want(compiler, "x", texts("unasked" * 3), uses=0)
    first = [programs.want(compiler, "x", texts(*["a"] * rows)) for rows in (1, 2)]
    for text in "bc":
        assert programs.want(compiler, "x", texts(text, *"bcd")).state == "waiting"
    programs.start("test")
    wait_for(lambda: all(program.state == "ready" for program in first))
    assert len(compiler.order) == 2
    assert caplog.text.count("compiles no more: there are 2 programs") == 1


def test_closed_compiles_no_more(compiler):
    programs = Programs(count_tokens, [16])
    program = programs.want(compiler, "x", texts("a"))
    programs.close()
    programs.start("closed programs")
    wait_for(lambda: "closed programs" not in {t.name for t in threading.enumerate()})
    assert program.state == "waiting" and compiler.order == []
    assert programs.want(compiler, "x", texts("a")).state == "waiting"  # for a last batch


def test_closed_while_another_compiles(compiler):
    """What waited for its turn is not done, and what was held is let go."""

    class Held:
        def count(self, inputs):
            return count_tokens(inputs)

    held = Held()
    gone = weakref.ref(held)
    programs, ended = Programs(held.count, [16]), threading.Event()
    del held
    with served._COMPILING:
        programs.want(compiler, "x", texts("a"))
        programs.start("test", ended.set)
        programs.close()
    assert ended.wait(20) and compiler.order == []
    assert gone() is None


@pytest.mark.parametrize(
    ("metadata", "known"),
    [
        ({"source_lengths": [16, 32]}, True),
        ({}, False),
        ({"source_lengths": []}, False),
        ({"source_lengths": ["16"]}, False),
        ({"source_lengths": 16}, False),
    ],
)
def test_what_an_export_must_have(metadata, known):
    text, tokens = SignatureDef(), SignatureDef()
    text.outputs["text"].name, tokens.outputs["num_tokens"].name = "a", "b"
    assert served.has_programs({"tokens": tokens, "generate_xla": text}, metadata) == known
    assert not served.has_programs({"tokens": tokens}, metadata)
    assert not served.has_programs({"generate_xla": text}, metadata)
    # A signature that somebody once gave this name.
    assert not served.has_programs({"tokens": text, "generate_xla": text}, metadata)


# ------------------------------------------------------------------------------------- the cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TF_XLA_FLAGS", raising=False)
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def kept(folder, names):
    """The folder, with a program of each name."""
    for number, name in enumerate(names):
        path = folder / f"xla_compile_cache_{name}.pb"
        path.write_bytes(b"program" * (number + 1))
        os.utime(path, (1000 + number,) * 2)
    return folder


def test_programs_are_kept_in_a_folder_of_the_users_own(cache, monkeypatch):
    monkeypatch.setenv("TF_XLA_FLAGS", "--tf_xla_max_cluster_size=9")
    write_checksums = keep_programs()
    (folder,) = (cache / "bertgen_tf").iterdir()
    flag = f"--tf_xla_persistent_cache_directory={folder}"
    assert os.environ["TF_XLA_FLAGS"] == f"--tf_xla_max_cluster_size=9 {flag}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    kept(folder, "ab")
    write_checksums()
    names = [f"xla_compile_cache_{name}.{end}" for name in "ab" for end in ("pb", "sha256")]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / names[1]).read_text() == sha256(folder / names[0])


def test_what_is_not_whole_is_removed(cache, monkeypatch):
    write_checksums = keep_programs()
    (folder,) = (cache / "bertgen_tf").iterdir()
    kept(folder, "abc")
    write_checksums()
    (folder / "xla_compile_cache_b.pb").write_bytes(b"proGram" * 2)
    (folder / "xla_compile_cache_d.pb").write_bytes(b"written as its server died")
    (folder / "xla_compile_cache_e.pb.tmp").write_bytes(b"being written")
    (folder / "xla_compile_cache_f.pb.tmp").write_bytes(b"never finished")
    os.utime(folder / "xla_compile_cache_f.pb.tmp", (1000, 1000))
    monkeypatch.delenv("TF_XLA_FLAGS")
    keep_programs()
    left = {path.name.removeprefix("xla_compile_cache_") for path in folder.iterdir()}
    assert left == {"a.pb", "a.sha256", "c.pb", "c.sha256", "e.pb.tmp"}


@pytest.mark.parametrize("later", [False, True])
def test_the_oldest_of_too_much_is_removed(cache, monkeypatch, later):
    """At the start, and when there is more; those of another TensorFlow or processor, too."""
    on_compiled = keep_programs()
    (folder,) = (cache / "bertgen_tf").iterdir()
    (cache / "bertgen_tf/programs-other").mkdir()
    kept(folder, "dab")
    on_compiled()
    newest = kept(folder.parent / "programs-other", "c") / "xla_compile_cache_c.pb"
    os.utime(newest, (2000, 2000))
    monkeypatch.setattr(served, "_MAX_CACHE_BYTES", 40)  # of 7, 14, 21 and 7
    monkeypatch.delenv("TF_XLA_FLAGS")
    (on_compiled if later else keep_programs)()
    names = {path.stem[-1] for path in (cache / "bertgen_tf").rglob("xla_*")}
    assert names == {"b", "c"}


def test_checksums_follow_programs(cache, monkeypatch):
    """Another server may write the same program; a checksum may be damaged like any file."""
    write_checksums = keep_programs()
    (folder,) = (cache / "bertgen_tf").iterdir()
    kept(folder, "abc")
    write_checksums()
    (folder / "xla_compile_cache_a.pb").write_bytes(b"compiled elsewhere")
    os.utime(folder / "xla_compile_cache_a.pb", (time.time() + 10,) * 2)
    write_checksums()
    (folder / "xla_compile_cache_b.sha256").write_bytes(b"\xff\xfe")
    monkeypatch.delenv("TF_XLA_FLAGS")
    keep_programs()
    assert sorted(path.name[18:] for path in folder.iterdir()) == [
        "a.pb", "a.sha256", "c.pb", "c.sha256"
    ]  # fmt: skip
    assert "tf_xla_persistent" in os.environ["TF_XLA_FLAGS"]


def test_the_users_own_cache_stays(cache, monkeypatch):
    flags = "--tf_xla_persistent_cache_directory=/somewhere"
    monkeypatch.setenv("TF_XLA_FLAGS", flags)
    keep_programs()()
    assert os.environ["TF_XLA_FLAGS"] == flags


@pytest.mark.parametrize("what", ["others write", "blanks", "full", "a file"])
def test_no_cache_is_no_error(cache, what, monkeypatch, caplog):
    if what == "others write":
        (cache / "bertgen_tf").mkdir()
        (cache / "bertgen_tf").chmod(0o777)
    elif what == "blanks":
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "a b"))
    elif what == "full":
        monkeypatch.setattr(served, "_MIN_FREE_BYTES", 2**62)
    else:
        (cache / "bertgen_tf").write_text("")
    keep_programs()()
    assert "TF_XLA_FLAGS" not in os.environ
    (record,) = caplog.records
    assert record.getMessage().startswith("compiled programs are not kept: ")


# ---------------------------------------------------------------------------------------- exports


def look(models):
    asyncio.run(models.look())
    return models.current(models.names[0])


def test_old_exports_have_no_programs(tmp_path):
    version = look(Models(write_export(tmp_path / "1", "<")))
    assert version.signatures["serving_default"].run(texts("a"))["text"].tolist() == [b"<a"]
    assert version.signatures["serving_default"].runs == 1


@pytest.mark.slow
def test_the_compiled_graph_takes_over(shared_export, monkeypatch):
    """The answers stay the same; a request to a twin never waits for a compilation."""
    _, path = shared_export
    compiled = []
    models = Models(path)
    models.on_compiled = lambda: compiled.append(1)
    version = look(models)
    default, twin = (version.signatures[name] for name in ("serving_default", "generate_xla"))
    inputs = texts("the man saw a bird, who sang.", "old house")
    answers = [default.run(inputs), twin.run(inputs)]
    assert (default.runs, twin.runs) == (2, 0)
    shape = version._programs.shape(inputs["text"])
    program = version._programs._programs["generate_xla", shape]
    end = time.monotonic() + 120
    while program.state == "waiting" and time.monotonic() < end:
        time.sleep(0.05)
    answers += [twin.run(inputs), default.run(inputs)]
    assert (default.runs, twin.runs) == (2, 2) and compiled
    for answer in answers[1:]:
        assert answer["text"].tolist() == answers[0]["text"].tolist()
        np.testing.assert_allclose(answer["score"], answers[0]["score"], rtol=1e-4)
    version.retire()
    assert version.signatures == {} and version._programs is None


@pytest.mark.parametrize("xla", [True, False])
def test_without_xla_nothing_is_connected(tmp_path, monkeypatch, xla):
    calls = []
    monkeypatch.setattr(exports, "has_programs", lambda *args: bool(calls.append(args)))
    look(Models(write_export(tmp_path / "1"), xla=xla))
    assert len(calls) == xla


class Plain:
    """A signature, as far as a version is prepared."""

    inputs, has_rows, route = {"text": None}, False, None

    def __init__(self, name, ran):
        self.name, self.ran = name, ran

    def run_graph(self, inputs):
        self.ran.append(self.name)
        if inputs["text"][0] == b"broken":
            raise ValueError("cannot")
        return {"num_tokens": np.array([3], np.int32)}

    run_aside = run_graph


@pytest.mark.parametrize("hurry", [False, True])
def test_warm_up_requests(hurry, caplog):
    """The first version is ready at once; what replaces another has run as a whole."""
    ran = []
    names = ["serving_default", "beams", "tokens", "generate_xla", "beams_xla"]
    signatures = {name: Plain(name, ran) for name in names}
    programs = connect_programs(signatures, {"source_lengths": [16]})
    requests = [
        ("", texts("a")),
        ("", texts("b")),
        ("beams", texts("c")),
        ("beams_xla", texts("d")),
    ]
    prepare(signatures, requests, programs, hurry)
    assert [name for name in ran if name != "tokens"] == ["serving_default", "beams"][: 2 - hurry]
    programs.start("test")
    wait_for(lambda: ran[-2:] == ["generate_xla", "beams_xla"])
    assert ran.count("beams") == 1
    programs.close()
    with pytest.raises(ValueError, match="to 'other', which is no signature"):
        prepare(signatures, [("other", {})], programs, hurry)
    programs, broken = connect_programs(signatures, {"source_lengths": [16]}), [
        ("", texts("a")), ("beams", texts("broken"))
    ]  # fmt: skip
    if not hurry:
        with pytest.raises(ValueError, match="cannot"):
            prepare(signatures, broken, programs, hurry)
        return
    prepare(signatures, broken, programs, hurry)
    programs.start("test")
    wait_for(lambda: "a warm-up request failed" in caplog.text)
    assert caplog.records[-1].signature == "beams"
    programs.close()


def test_a_compilation_keeps_no_thread_of_tensorflow():
    """It runs in the thread that asks for it, which may have a lower priority."""
    threads = []

    def note(text):
        threads.append(threading.get_native_id())
        return text

    with tf.Graph().as_default() as graph:
        text = tf.compat.v1.placeholder(tf.string, [None])
        copy = tf.numpy_function(note, [text], tf.string)
        copy.set_shape([None])
        build = tf.compat.v1.saved_model.build_signature_def
        info = tf.compat.v1.saved_model.build_tensor_info
        definition = build({"text": info(text)}, {"copy": info(copy)})
        signature = Signature("x", definition, tf.compat.v1.Session(graph=graph))
    own = threading.get_native_id()
    assert signature.run_aside(texts("a"))["copy"].tolist() == [b"a"]
    assert threads == [own]
    assert signature.run_graph(texts("b"))["copy"].tolist() == [b"b"]
    assert threads[1] != own


def test_the_processor_is_known():
    lines = served._processor()
    assert lines and (
        not Path("/proc/cpuinfo").exists() or "model name" in lines or "Feat" in lines
    )
