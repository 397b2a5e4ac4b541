"""Files of texts on a local Ray, here a cluster of two machines with a core each."""

import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import tensorflow as tf
import tensorflow_text  # noqa: F401  registers ops of the exports

import bertgen_tf as bg
from bertgen_tf.cli import main as cli
from bertgen_tf.data import resumable, text_files
from bertgen_tf.data.progress import EmptyOutputs
from bertgen_tf.serving import ray_files
from tests.helpers import CORPUS, WORDS, fails, make_small_model

# Without its favourites a random model looks at the source.
CONFIG = bg.GenerationConfig(
    max_new_tokens=7,
    num_beams=2,
    suppress_tokens=tuple(range(13)),
    encoder_no_repeat_ngram_size=1,
    repetition_penalty=2.0,
)
# Many lengths, none like its neighbours'.
TEXTS = [" ".join(WORDS[: 1 + 5 * i % 13]) for i in range(70)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("batch")


@pytest.fixture(scope="module")
def preset(folder) -> str:
    make_small_model(generation_config=CONFIG).save_to_preset(folder / "preset")
    return str(folder / "preset")


@pytest.fixture(scope="module")
def export(shared_export) -> str:
    return str(shared_export[1])


@pytest.fixture(scope="module")
def lines(folder) -> Path:
    """Files of all formats, of several blocks of eight batches of two, of one block, and empty."""
    lines = folder / "lines"
    lines.mkdir()
    records = [{"id": i, "source": text, "half": "\ud800"} for i, text in enumerate(TEXTS)]
    text = "".join(f"{json.dumps(record)}\r\n" for record in records)
    (lines / "a.jsonl").write_text(f"\ufeff{text}\n\n", encoding="utf-8", newline="")
    (lines / "b.tsv").write_text("the bird\tsecond column\n\nold \\ house\n", encoding="utf-8")
    (lines / "c.txt").write_text("", encoding="utf-8")
    (lines / "d.txt").write_text("who sang\t?\nüber \u2028 \x00", encoding="utf-8")
    (lines / "folder.txt").mkdir()
    return lines


def expected_lines(export: str) -> dict[str, list[dict]]:
    """What one process makes of each text on its own."""
    answer = tf.saved_model.load(export).signatures["serving_default"]

    def output(text: str) -> str:
        return answer(text=tf.constant([text]))["text"].numpy()[0].decode()

    records = [{"id": i, "source": text, "half": "\ud800"} for i, text in enumerate(TEXTS)]
    others = {
        "a": records,
        "b": [{"source": text} for text in ("the bird", "", "old \\ house")],
        "c": [],
        "d": [{"source": text} for text in ("who sang\t?", "über \u2028 \x00")],
    }
    return {
        f"{name}.jsonl": [{**record, "output": output(record["source"])} for record in records]
        for name, records in others.items()
    }


def read_lines(output: Path) -> dict[str, list[dict]]:
    return {
        path.name: [json.loads(line) for line in path.read_bytes().splitlines(keepends=True)]
        for path in output.iterdir()
    }


# ------------------------------------------------------------------------------------- on Ray


@pytest.fixture
def ray_folder(monkeypatch):
    """Where Ray keeps its files: paths of sockets must be short, and pytest's are not."""
    folder = tempfile.mkdtemp(prefix="ray-")
    monkeypatch.setenv("RAY_TMPDIR", folder)
    # Ray gives way to all other processes; beside other tests that would be to wait for them.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(ray_folder):
    """The address of a Ray of two machines."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


def workers_of_this_process() -> list[int]:
    import psutil  # Ray brings it

    processes = psutil.Process().children(recursive=True)
    return [p.pid for p in processes if p.name().startswith("ray::MapWorker")]


def has_lines(file) -> bool:
    return file.name.endswith(".partial") and os.path.getsize(file.name) > 0


class Killer:
    """In place of `resumable.sync`: kills all workers, once, when the first lines are there."""

    def __init__(self):
        self.killed = []

    def __call__(self, file):
        file.flush()
        if has_lines(file) and not self.killed:
            self.killed = workers_of_this_process()
            for pid in self.killed:
                os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_workers_on_a_cluster_and_workers_that_die(
    cluster, export, lines, tmp_path, monkeypatch, capfd
):
    expected = expected_lines(export)
    assert len({line["output"] for line in expected["a.jsonl"]}) > 3
    output = tmp_path / "new" / "out"
    run = ["generate", "--engine", "ray", "--export", export, "--input", str(lines / "*")]
    run += ["--no-xla", "--batch-size", "2", "--ray-address", cluster]
    assert cli.main([*run, "--output", str(output)]) == 0
    assert read_lines(output) == expected
    captured = capfd.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) < 4, captured.err

    killer = Killer()
    monkeypatch.setattr(resumable, "sync", killer)
    outputs = ray_files.generate_files(
        export,
        str(lines / "*"),
        tmp_path / "again",
        signature="serving_default",
        batch_size=2,
        address=cluster,
    )
    assert len(killer.killed) == 2  # as many as there are cores
    assert [Path(path).name for path in outputs] == list(expected)
    assert {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()} == {
        p.name: p.read_bytes() for p in output.iterdir()
    }


@pytest.mark.slow
def test_a_preset_here_stopped_and_resumed(
    ray_folder, preset, lines, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("ray")
    output = tmp_path / "out"
    run = ["generate", "--engine", "ray", "--preset", preset, "--workers", "1"]
    run += ["--input", str(lines / "*"), "--output", str(output), "--batch-size", "2"]
    run += ["--num-return-sequences", "2", "--no-xla"]

    def stop(file):
        file.flush()
        if has_lines(file):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(resumable, "sync", stop)
        assert cli.main(run) == 130
    assert "a.jsonl.partial" in capsys.readouterr().err
    partial = output / "a.jsonl.partial"
    assert set(os.listdir(output)) == {"a.jsonl.partial", "a.jsonl.partial.json"}
    assert partial.read_bytes().count(b"\n") == 16  # a block
    # What is there is kept as it is.
    partial.write_bytes(partial.read_bytes().replace(b'"output": ', b'"output":   '))

    assert cli.main([*run, "--num-beams", "3", "--resume"]) == 2
    assert "had another num_beams" in capsys.readouterr().err

    assert cli.main([*run, "--resume"]) == 0
    assert (output / "a.jsonl").read_bytes().count(b'"output":   ') == 16
    model = bg.EncoderDecoderModel.from_preset(preset)
    for name, source in [("a", "a.jsonl"), ("b", "b.tsv"), ("c", "c.txt"), ("d", "d.txt")]:
        texts = list(text_files.read_texts(str(lines / source)))
        options = {"num_return_sequences": 2, "jit_compile": False}
        several = model.generate(texts, **options) if texts else []
        assert [line["output"] for line in read_lines(output)[f"{name}.jsonl"]] == several

    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    monkeypatch.setattr(bg.EncoderDecoderModel, "from_preset", None)
    assert cli.main([*run, "--resume"]) == 0
    assert "is complete" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in output.iterdir()}


@pytest.mark.slow
def test_no_cluster_or_too_few_cores(ray_folder, export, lines, tmp_path, capsys):
    pytest.importorskip("ray")
    run = ["generate", "--engine", "ray", "--export", export, "--input", str(lines / "*")]
    run += ["--output", str(tmp_path / "out")]
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        message = fails(capsys, *run, "--ray-address", address)
    assert f"no Ray cluster answers at {address}" in message
    assert "cannot have 1000 cores" in fails(capsys, *run, "--cpus-per-worker", "1000")


# Answers a block where bertgen_tf cannot be imported.
PROGRAM = """
import pickle, sys
sys.modules["bertgen_tf"] = None
import pyarrow
worker = pickle.loads(sys.stdin.buffer.read())(sys.argv[1], sys.argv[2], 2, 1)
print(worker(pyarrow.table({"text": sys.argv[3:]})).column("output").to_pylist())
import tensorflow as tf
print(tf.config.threading.get_intra_op_parallelism_threads())
"""


@pytest.mark.slow
def test_workers_need_tensorflow_alone(export):
    ray = pytest.importorskip("ray")
    texts = ["a bird sang", *CORPUS, "the house"]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, export, "beams", *texts],
        input=ray.cloudpickle.dumps(ray_files._worker_class()),
        stdout=subprocess.PIPE,
        check=True,
        timeout=300,
    )
    outputs, threads = result.stdout.decode().splitlines()
    beams = tf.saved_model.load(export).signatures["beams"]
    expected = [beams(text=tf.constant([text]))["text"].numpy().tolist()[0] for text in texts]
    assert outputs == str([[text.decode() for text in two] for two in expected])
    assert threads == "1"


# ------------------------------------------------------------------------------- without Ray


def test_inputs_of_other_formats(tmp_path):
    records = [{"id": str(i), "text": text, "source": "x"} for i, text in enumerate("abc")]
    rows = [",".join(records[0]), *(",".join(record.values()) for record in records)]
    table = "".join(f"{row}\n" for row in rows)
    (tmp_path / "a.csv").write_text(table)
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress(table.replace(",", "\t").encode("utf-16")))
    (tmp_path / "c.json").write_text(json.dumps(records, indent=2))
    notes: list[str] = []
    for column, texts in ("text", list("abc")), (None, ["x"] * 3):
        output = tmp_path / str(column)
        options = {"source_column": column, "complain": notes.append}
        jobs = ray_files.find_jobs(str(tmp_path / "*.*"), output, {}, **options)
        assert [job.total for job in jobs] == [3, 3, 3]
        assert list(ray_files._blocks(jobs, 2)) == [texts[:2], texts[2:]] * 3
        output.mkdir()
        outputs = iter("xyz" * 3)
        for job in jobs:
            ray_files._write(job, outputs, 2, lambda count: None, notes.append, EmptyOutputs())
        expected = [{**r, "output": o} for r, o in zip(records, "xyz", strict=True)]
        assert read_lines(output) == {f"{name}.jsonl": expected for name in "abc"}
    told = "the first line, 'id text source', is read as the names of columns"
    assert notes == [f"{tmp_path / 'b.tsv.gz'}: {told}"]
    # What chooses the texts tells runs apart; .csv was once read as lines.
    assert [job.run.get("source_column") for job in jobs] == ["source", "source", None]


# ------------------------------------------------------------------------- errors, without Ray


@pytest.fixture
def no_ray(monkeypatch):
    """Errors must come before anything slow: no Ray starts, no model is loaded."""

    def refuse(*args, **kwargs):
        raise AssertionError("too late")

    monkeypatch.setattr(ray_files, "_ray_running", refuse)
    monkeypatch.setattr(bg.EncoderDecoderModel, "from_preset", refuse)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "no/*.jsonl"], "must match files, such as 'lines/*.jsonl', but no file match"),
        (["--input", "-"], "--engine ray needs --input, a pattern of files"),
        (["--output", "-"], "and --output, a folder"),
        (["--output", "LINES/a.jsonl"], "must be a folder, but"),
        (["--output", "LINES/a.jsonl/out"], "must be a folder, but"),
        (["--output", "LINES"], "a folder for these outputs alone, but"),
        (["--input", "LINES/b.tsv/../*"], "no file matches"),
        (["--input", "BAD/*.jsonl"], "bad.jsonl, line 2: expected {"),
        (["--input", "TWICE/*"], "x.txt would both become"),
        (["--signature", "score"], "must be one from text to text, which in"),
        (["--signature", "beams", "--no-xla"], "--no-xla chooses a signature itself"),
        (["--export", "LINES"], "must be the folder of a SavedModel, NAME/VERSION"),
        (["--export", "DAMAGED"], "saved_model.pb is damaged"),
        (["--num-beams", "3", "--quantize", "int8"], "--num-beams, --quantize applies to --preset"),
        (["--preset", "x"], "not allowed with argument"),
        (["--workers", "0"], "argument --workers: expected an integer of at least 1"),
        (["--engine", "local"], "--export applies to --engine ray only"),
    ],
)
def test_errors_of_the_user(no_ray, export, lines, tmp_path, capsys, flags, message):
    pytest.importorskip("ray")
    for name in ("bad", "twice", "damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "bad" / "bad.jsonl").write_text('{"source": "a"}\n{"text": "b"}\n')
    (tmp_path / "twice" / "x.txt").touch()
    (tmp_path / "twice" / "x.json").touch()
    (tmp_path / "damaged" / "saved_model.pb").write_bytes(b"\xff")
    places = {"LINES": lines, **{name.upper(): tmp_path / name for name in ("bad", "twice")}}
    places["DAMAGED"] = tmp_path / "damaged"
    for name, place in places.items():
        flags = [flag.replace(name, str(place)) for flag in flags]
    run = ["generate", "--engine", "ray", "--export", export]
    run += ["--input", str(lines / "*"), "--output", str(tmp_path / "out")]
    assert message in fails(capsys, *run, *flags)
    assert not (tmp_path / "out").exists()


def test_errors_with_a_preset(no_ray, preset, lines, tmp_path, capsys, monkeypatch):
    run = ["generate", "--engine", "ray", "--preset", preset, "--input", lines / "*"]
    run += ["--output", tmp_path / "out"]
    message = "--preset is on this machine only"
    assert message in fails(capsys, *run, "--ray-address", "10.1.1.1:6379")
    assert "--signature applies to --export only" in fails(capsys, *run, "--signature", "beams")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert 'pip install "bertgen_tf[ray]"' in fails(capsys, *run)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert message in fails(capsys, *run)
    with pytest.raises(ImportError, match="bertgen_tf\\[ray\\]"):
        ray_files.generate_files("export", "*", tmp_path / "out")


def test_existing_outputs(export, lines, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    run = {"of": "a test"}

    def find(**options) -> list[ray_files.Job]:
        return ray_files.find_jobs(str(lines / "[bd].t*"), output, run, **options)

    assert [(job.target, job.total, job.begun.lines) for job in find()] == [
        (str(output / "b.jsonl"), 3, 0),
        (str(output / "d.jsonl"), 2, 0),
    ]
    (output / "b.jsonl").write_text("1\n2\n3\n")
    with pytest.raises(ValueError, match="b.jsonl exists; overwrite=True replaces it"):
        find()
    complete, missing = find(resume=True)
    assert complete.begun is None
    assert missing.begun == (0, 0)
    assert [job.begun for job in find(overwrite=True)] == [(0, 0), (0, 0)]
    (output / "b.jsonl").write_text("1\n2\n")
    with pytest.raises(ValueError, match="with 2 lines for 3 texts"):
        find(resume=True)
    (output / "b.jsonl").rename(output / "b.jsonl.partial")
    (output / "b.jsonl.partial.json").write_text(json.dumps(complete.run))
    assert find(resume=True)[0].begun == (2, 4)
    (output / "notes").touch()
    with pytest.raises(ValueError, match="holds notes; choose another folder"):
        find(resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, received 0"),
        ({"workers": 1.5}, "workers must be an integer"),
        ({"cpus_per_worker": -1}, "cpus_per_worker must be"),
    ],
)
def test_bad_counts(export, lines, tmp_path, options, message):
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match=message):
        ray_files.generate_files(export, str(lines / "*"), tmp_path / "out", **options)


def test_a_file_that_changes(tmp_path):
    source = tmp_path / "x.txt"
    source.write_text("a\nb\nc\n")
    (job,) = ray_files.find_jobs(str(source), tmp_path / "out", {})
    (tmp_path / "out").mkdir()
    source.write_text("a\nb\nx\n")
    with pytest.raises(OSError, match="x.txt changed while texts were generated"):
        ray_files._write(job, iter("ABC"), 16, lambda count: None, print, EmptyOutputs())
    assert not os.path.exists(job.target)
