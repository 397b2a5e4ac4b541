"""`bertgen-tf generate`: formats, settings, interrupted and resumed runs."""

import dataclasses
import fcntl
import gzip
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bertgen_tf as bg
from bertgen_tf.cli import generate
from bertgen_tf.cli import main as cli
from tests.helpers import fails, killed_generate, make_model, make_small_model
from tests.helpers.command_line import SOURCES

# ------------------------------------------------------------------------------------- generate


@pytest.fixture(scope="module")
def loaded(preset) -> bg.EncoderDecoderModel:
    """The model of the preset. Read-only."""
    return bg.EncoderDecoderModel.from_preset(preset)


@pytest.fixture
def echo(preset, loaded, monkeypatch):
    """Generation that shows what it got, in place of a model's; records the calls."""
    calls = []
    load = bg.EncoderDecoderModel.from_preset
    monkeypatch.setattr(
        bg.EncoderDecoderModel,
        "from_preset",
        lambda folder: loaded if folder == preset else load(folder),
    )

    def iterate(self, texts, config, *, window, **options):
        calls.append({"config": config, "window": window, "counts": [], **options})
        texts = iter(texts)
        while chunk := list(itertools.islice(texts, window)):
            calls[-1]["counts"].append(len(chunk))
            for text in chunk:
                outputs = [f"{text}\t{i}\u2028!" for i in range(config.num_beams)]
                yield outputs if config.num_return_sequences > 1 else outputs[0]

    monkeypatch.setattr(bg.EncoderDecoderModel, "iterate", iterate)
    monkeypatch.setattr(generate, "WINDOW", 32)
    return calls


def test_plain_lines_stay_aligned(echo, preset, tmp_path, monkeypatch, capsys):
    # Empty lines, also at the end, and lines that only look like two.
    texts = ["a\u2028b", "", "c\td", "e" * 5000, "", *map(str, range(60)), ""]
    data = ("\r\n".join(texts) + "\r\n").encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data))))
    assert cli.main(["generate", "--preset", preset]) == 0
    captured = capsys.readouterr()
    expected = [text.replace("\u2028", " ").replace("\t", " ") + " 0 !" for text in texts]
    assert captured.out.split("\n") == [*expected, ""]
    assert captured.err == ""  # no bar where there is no terminal
    assert echo == [
        {
            "config": bg.GenerationConfig(max_new_tokens=7, num_beams=2),  # the preset's
            "window": 32,
            "counts": [32, 32, 2],
            "batch_size": 32,
            "first_example": 0,
            "total": None,
            "verbose": 0,
            "jit_compile": True,
        }
    ]


@pytest.mark.parametrize(("num_beams", "outputs"), [(1, "x"), (2, ["x", ""])])
def test_empty_outputs_are_counted(
    num_beams, outputs, preset, loaded, tmp_path, monkeypatch, capsys
):
    """Those of texts that are not empty; of several outputs the best counts."""
    monkeypatch.setattr(bg.EncoderDecoderModel, "from_preset", lambda folder: loaded)
    (tmp_path / "in.txt").write_text("a\n\n \nb\nc\n")
    made = [outputs, "", " ", [" ", "x"] if num_beams == 2 else " ", ""]
    monkeypatch.setattr(bg.EncoderDecoderModel, "iterate", lambda self, texts, *_, **__: (
        output for _, output in zip(texts, made, strict=True)
    ))  # fmt: skip
    flags = ["--input", str(tmp_path / "in.txt"), "--num-beams", str(num_beams)]
    assert cli.main(["generate", "--preset", preset, *flags]) == 0
    assert capsys.readouterr().err == "bertgen-tf: 2 of 5 outputs are empty\n"


def test_formats_of_generate(echo, preset, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"source": "ü"}\n{"id": 1, "source": "b\\nc"}\n\n')
    (tmp_path / "in.tsv").write_text("ü\t1\nb\n")
    several = ["--num-return-sequences", "2"]

    def run(name, output, *flags):
        paths = ["--input", str(tmp_path / name), "--output", str(tmp_path / output)]
        assert cli.main(["generate", "--preset", preset, *paths, *flags]) == 0
        assert not list(tmp_path.glob("*.partial"))
        return (tmp_path / output).read_text(encoding="utf-8")

    assert run("in.tsv", "1.txt") == "ü 0 !\nb 0 !\n"
    assert run("in.tsv", "2.txt", *several) == "ü 0 !\tü 1 !\nb 0 !\tb 1 !\n"
    assert run("in.jsonl", "3.txt") == "ü 0 !\nb c 0 !\n"
    lines = [json.loads(line) for line in run("in.jsonl", "4.jsonl").split("\n")[:-1]]
    assert lines[1] == {"source": "b\nc", "output": "b\nc\t0\u2028!"}
    lines = [json.loads(line) for line in run("in.tsv", "5.jsonl", *several).split("\n")[:-1]]
    assert lines[0] == {"source": "ü", "output": ["ü\t0\u2028!", "ü\t1\u2028!"]}
    (tmp_path / "empty.txt").write_text("")
    assert run("empty.txt", "5.jsonl", "--overwrite") == ""


def test_columns_with_names(echo, preset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("in.csv").write_text('id,text,source\n1,the cat sat,x\n2,"a dog, ran",y\n')
    Path("id.csv").write_text("id;text\n1;a\n")
    Path("in.tsv").write_text("id\tsource\n1\ta\n2\tb\n")
    run = ["generate", "--preset", preset, "--output", "out.jsonl", "--overwrite", "--input"]

    def answers(*flags):
        assert cli.main([*run, *flags]) == 0
        lines = Path("out.jsonl").read_bytes().splitlines()
        return [json.loads(line)["source"] for line in lines]

    assert answers("in.csv", "--source-column", "text") == ["the cat sat", "a dog, ran"]
    assert answers("in.csv") == ["x", "y"]
    assert capsys.readouterr().err == ""
    Path("in.csv.gz").write_bytes(gzip.compress(Path("in.csv").read_text().encode("utf-16")))
    assert answers("in.csv.gz") == ["x", "y"]
    assert answers("in.tsv") == ["a", "b"]
    told = "the first line, 'id source', is read as the names of columns"
    assert capsys.readouterr().err == f"bertgen-tf: in.tsv: {told}\n"
    message = (
        "id.csv has no column source; by its first line its columns are 'id, text': choose one"
    )
    assert f"{message} with --source-column\n" in fails(capsys, *run, "id.csv")
    Path("in.txt").write_text("a\n")
    message = fails(capsys, *run, "in.txt", "--source-column", "x")
    assert "error: --source-column applies to .csv, .tsv and .jsonl, .json, whose" in message
    run[4] = "out.csv"
    assert "--output must not end in .csv, which is not written" in fails(capsys, *run, "in.csv")


# Every field, with a value that is not its default.
SETTINGS = [
    {
        "max_new_tokens": 11,
        "min_new_tokens": 2,
        "min_length": 3,
        "num_beams": 5,
        "num_return_sequences": 3,
        "length_penalty": -0.5,
        "early_stopping": "never",
        "repetition_penalty": 1.5,
        "encoder_repetition_penalty": 0.5,
        "no_repeat_ngram_size": 3,
        "encoder_no_repeat_ngram_size": 2,
        "bad_words_ids": ((5, 6), (7,)),
        "sequence_bias": (((5, 6), -2.5), ((7,), 1.0)),
        "suppress_tokens": (7, 9),
        "begin_suppress_tokens": (8,),
        "forced_bos_token_id": 10,
        "forced_eos_token_id": (4, 6),
        "exponential_decay_length_penalty": (5, 1.1),
        "eos_token_id": 4,
    },
    {"num_beams": 2, "beam_scorer": "gnmt", "gnmt_alpha": 0.9, "normalize_unfinished": True},
    {
        "max_length": 9,
        "num_beams": 1,
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "typical_p": 0.8,
        "seed": 3,
        "eos_token_id": (4, 6),
        "forced_eos_token_id": 4,
    },
]


AS_TEXT = {
    "bad_words_ids": "5,6;7",
    "sequence_bias": "5,6:-2.5;7:1",
    "exponential_decay_length_penalty": "5,1.1",
}


def flags_of(settings):
    for name, value in settings.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
        yield from ("--" + name.replace("_", "-"), AS_TEXT.get(name, text))


def test_generation_flags(echo, preset, tmp_path):
    (tmp_path / "in.txt").write_text("a\n")
    fields = {field.name: field.default for field in dataclasses.fields(bg.GenerationConfig)}
    assert {name for settings in SETTINGS for name in settings} == set(fields)
    assert all(
        any(settings.get(name, default) != default for settings in SETTINGS)
        for name, default in fields.items()
    )
    paths = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "o"), "--overwrite"]

    def run(*flags):
        assert cli.main(["generate", "--preset", preset, *paths, *flags]) == 0
        return echo[-1]

    for settings in SETTINGS:
        call = run(*flags_of(settings), "--no-xla", "--batch-size", "5")
        assert (call["counts"], call["jit_compile"], call["batch_size"]) == ([1], False, 5)
        assert {name: getattr(call["config"], name) for name in settings} == settings
    assert run("--early-stopping", "true")["config"].early_stopping is True
    assert run("--do-sample", "false", "--suppress-tokens", "")["jit_compile"] is True


def test_none_takes_a_setting_back(echo, tmp_path):
    settings = {
        "forced_bos_token_id": 10,
        "forced_eos_token_id": (4, 6),
        "exponential_decay_length_penalty": (5, 1.1),
        "eos_token_id": 4,
        "do_sample": True,
        "seed": 3,
        "bad_words_ids": ((5, 6),),
        "sequence_bias": (((5,), 1.0),),
    }
    folder = str(tmp_path / "preset")
    make_model(generation_config=bg.GenerationConfig(max_new_tokens=7, **settings)).save_to_preset(
        folder
    )
    (tmp_path / "in.txt").write_text("a\n")
    run = ["generate", "--preset", folder, "--input", str(tmp_path / "in.txt")]
    assert cli.main(run) == 0
    assert echo[-1]["config"] == bg.GenerationConfig(max_new_tokens=7, **settings)
    for name in list(settings):
        if name != "do_sample":
            run += [
                "--" + name.replace("_", "-"),
                ""
                if isinstance(settings[name], tuple) and name in ("bad_words_ids", "sequence_bias")
                else "none",
            ]
    assert cli.main([*run, "--max-length", "9"]) == 0
    assert echo[-1]["config"] == bg.GenerationConfig(max_length=9, do_sample=True)


def test_progress_on_a_terminal(echo, preset, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    (tmp_path / "in.txt").write_text("a\n" * 64)
    run = ["generate", "--preset", preset, "--input", str(tmp_path / "in.txt")]
    assert cli.main([*run, "--output", str(tmp_path / "out.txt")]) == 0
    assert (echo[-1]["verbose"], echo[-1]["total"]) == (1, 64)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main(run) == 0
    assert echo[-1]["verbose"] == 0  # it would stand between the outputs


def test_a_line_at_a_time_from_the_keyboard(echo, preset, monkeypatch, capsys):
    stdin = io.TextIOWrapper(io.BufferedReader(io.BytesIO(b"a\nb\n")))
    stdin.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", stdin)
    assert cli.main(["generate", "--preset", preset]) == 0
    assert (echo[-1]["window"], echo[-1]["counts"]) == (1, [1, 1])
    captured = capsys.readouterr()
    assert captured.out == "a 0 !\nb 0 !\n"
    assert captured.err == "bertgen-tf: one text a line, Ctrl-D to end\n"


@pytest.mark.parametrize(
    ("content", "output", "note"),
    [
        (b"a\nb\n", "a 0 !\nb 0 !\n", ""),
        (b"id,text\n1,a\n", "id,text 0 !\n1,a 0 !\n", "the first line, 'id,text', is read as text"),
    ],
    ids=["plain", "table"],
)
def test_a_pipe_is_read_once(content, output, note, echo, preset, capsys):
    """And told what it may have been meant as, which is told of files before they are read."""
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    assert cli.main(["generate", "--preset", preset, "--input", f"/dev/fd/{reader}"]) == 0
    os.close(reader)
    captured = capsys.readouterr()
    assert captured.out == output
    assert note in captured.err and bool(note) == bool(captured.err)


def test_what_no_search_could_do_is_one_line(preset, loaded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bg.EncoderDecoderModel, "from_preset", lambda folder: loaded)
    (tmp_path / "in.txt").write_text("a\n")
    flags = ["--input", str(tmp_path / "in.txt"), "--num-beams", str(10**9)]
    assert cli.main(["generate", "--preset", preset, *flags]) == 2
    error = capsys.readouterr().err
    assert "error: num_beams must fit into memory" in error and error.count("\n") == 1


# ------------------------------------------------------------------------ generate: interrupted


@pytest.fixture
def job(echo, preset, tmp_path, monkeypatch):
    """100 texts, windows of 32; `stop(n)` interrupts after n of them."""
    (tmp_path / "in.txt").write_text("".join(f"{i}\n" for i in range(100)))
    paths = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.txt")]
    iterate = bg.EncoderDecoderModel.iterate

    class Job:
        run = ["generate", "--preset", preset, *paths]
        output, partial = tmp_path / "out.txt", tmp_path / "out.txt.partial"
        settings = tmp_path / "out.txt.partial.json"
        text = "".join(f"{i} 0 !\n" for i in range(100))
        calls = echo

        def lines(self, *numbers):
            return "".join(f"{i} 0 !\n" for i in range(*numbers))

        def stop(self, count, *flags):
            def interrupted(*args, **kwargs):
                outputs = iterate(*args, **kwargs)
                yield from itertools.islice(outputs, count)
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(bg.EncoderDecoderModel, "iterate", interrupted)
                assert cli.main([*self.run, *flags]) == 130

        def files(self):
            return sorted(path.name for path in tmp_path.iterdir())

    return Job()


def test_an_interrupted_run_keeps_its_lines_and_the_older_file(job, capsys):
    job.output.write_text("older")
    assert "out.txt exists; --overwrite replaces it" in fails(capsys, *job.run)
    job.stop(64, "--overwrite")
    assert capsys.readouterr().err == (
        f"bertgen-tf: what was finished is in {job.partial}\nbertgen-tf: interrupted\n"
    )
    assert job.partial.read_text() == job.lines(64)
    assert job.output.read_text() == "older"
    job.output.unlink()
    error = fails(capsys, *job.run)
    assert f"{job.partial} exists; --resume continues, --overwrite starts anew" in error
    assert job.partial.exists()
    assert cli.main([*job.run, "--overwrite"]) == 0
    assert job.output.read_text() == job.text
    assert job.files() == ["in.txt", "out.txt"]


def test_lines_are_on_disk_when_their_window_is_done(job, monkeypatch):
    """As a kill leaves them."""
    seen = []
    iterate = bg.EncoderDecoderModel.iterate

    def watched(*args, **kwargs):
        for number, output in enumerate(iterate(*args, **kwargs)):
            if number % 32 == 0:
                seen.append(job.partial.read_text())
            yield output

    monkeypatch.setattr(bg.EncoderDecoderModel, "iterate", watched)
    assert cli.main(job.run) == 0
    assert seen == [job.lines(count) for count in (0, 32, 64, 96)]


@pytest.mark.parametrize("torn", ["", "6", "64 0"])
@pytest.mark.parametrize("count", [0, 32, 40, 100])
def test_resume_goes_on(count, torn, job, capsys):
    job.stop(100)
    # Kills leave no more of it, and older lines need not be those that would come now.
    kept = "".join(f"kept {i}\n" for i in range(count))
    job.partial.write_text(kept + torn)
    assert cli.main([*job.run, "--resume"]) == 0
    assert job.output.read_text() == kept + job.lines(count, 100)
    assert job.files() == ["in.txt", "out.txt"]
    # The same windows as of a run that was not interrupted.
    first = count // 32 * 32 if count < 100 else 100
    assert job.calls[-1]["first_example"] == first
    assert sum(job.calls[-1]["counts"]) == 100 - first
    assert job.calls[-1]["total"] == 100


def test_resume_begins_where_nothing_is_and_leaves_what_is_complete(job, capsys):
    job.stop(10, "--resume")  # before the first window: nothing was kept
    job.stop(70, "--resume")
    assert job.partial.read_text().startswith(job.lines(64))
    job.stop(6, "--resume")  # before its first window
    assert cli.main([*job.run, "--resume"]) == 0
    assert job.output.read_text() == job.text
    calls = len(job.calls)
    capsys.readouterr()
    assert cli.main([*job.run, "--resume"]) == 0
    assert capsys.readouterr().err == f"bertgen-tf: {job.output} is complete\n"
    assert (len(job.calls), job.output.read_text()) == (calls, job.text)
    # Killed between the last two steps of a run.
    job.settings.write_text("{}")
    assert cli.main([*job.run, "--resume"]) == 0
    assert job.files() == ["in.txt", "out.txt"]
    job.output.write_text(job.lines(99) + "99")
    capsys.readouterr()
    assert "with 99 lines for 100 texts" in fails(capsys, *job.run, "--resume")
    # The older file, of a run with --overwrite, does not hinder.
    job.stop(32, "--overwrite")
    assert cli.main([*job.run, "--resume"]) == 0
    assert job.output.read_text() == job.text


def test_resume_refuses_what_another_run_began(job, preset, tmp_path, capsys):
    job.stop(32)
    capsys.readouterr()
    before = job.partial.read_bytes()

    def refused(*flags):
        error = fails(capsys, *job.run, *flags, "--resume")
        assert error.endswith("; --overwrite starts anew\n")
        assert job.partial.read_bytes() == before
        return error

    assert "had another num_beams;" in refused("--num-beams", "3")
    assert "had another quantize;" in refused("--quantize", "int8")
    changes = ["--do-sample", "true", "--seed", "1", "--num-beams", "1"]
    assert "had another num_beams, do_sample, seed;" in refused(*changes)
    other = tmp_path / "other"
    make_model(
        seed=2, generation_config=bg.GenerationConfig(max_new_tokens=7, num_beams=2)
    ).save_to_preset(other)
    assert "had another preset;" in refused("--preset", other)
    (tmp_path / "in.txt").write_text("".join(f"{i}\n" for i in range(101)))
    assert "had another input;" in refused()
    # By what they hold: names may differ.
    (tmp_path / "same.txt").write_text("".join(f"{i}\n" for i in range(100)))
    settings = job.settings.read_text()
    for damaged in (settings[:20], "[]", ""):
        job.settings.write_text(damaged)
        assert "says which run began" in refused("--input", tmp_path / "same.txt")
    job.settings.unlink()
    assert "says which run began" in refused("--input", tmp_path / "same.txt")
    job.settings.write_text(settings)
    job.partial.write_text(job.lines(101))
    before = job.partial.read_bytes()
    assert "has 101 lines for 100 texts" in refused("--input", tmp_path / "same.txt")
    job.partial.write_text(job.lines(32))
    # Fewer at a time, where memory was short, and without XLA, are the same run.
    same = ["--input", str(tmp_path / "same.txt"), "--batch-size", "3", "--no-xla"]
    assert cli.main([*job.run, *same, "--resume"]) == 0
    assert job.output.read_text() == job.text


def test_an_error_before_the_first_line_leaves_nothing(job, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("x")
        yield

    monkeypatch.setattr(bg.EncoderDecoderModel, "iterate", fail)
    with pytest.raises(RuntimeError):
        cli.main(job.run)
    assert job.files() == ["in.txt"]


def test_one_run_at_a_time_writes_to_a_file(job, capsys):
    job.stop(32)
    before = job.partial.read_bytes()
    with open(job.partial, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        capsys.readouterr()
        for flag in ("--resume", "--overwrite"):
            error = fails(capsys, *job.run, flag)
            assert f"another run is writing to {job.partial}: let it end" in error
    assert job.partial.read_bytes() == before
    assert cli.main([*job.run, "--resume"]) == 0
    assert job.output.read_text() == job.text


def test_resume_needs_files(job, capsys):
    run = job.run[:3]
    assert "--resume needs --output, a file" in fails(capsys, *job.run[:5], "--resume")
    output = ["--output", job.output]
    assert "--resume needs --input, a file" in fails(capsys, *run, *output, "--resume")
    error = fails(capsys, *job.run, "--resume", "--overwrite")
    assert "--overwrite: not allowed with argument --resume" in error
    # What standard input began cannot be gone on with.
    job.partial.write_text("a\n")
    assert "says which run began" in fails(capsys, *job.run, "--resume")


@pytest.fixture
def killed():
    """Starts runs that are processes of their own, without a start of Python for each."""
    process = subprocess.Popen(
        [sys.executable, killed_generate.__file__],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def read() -> int:
        return int(process.stdout.readline())

    def start(arguments):
        """The id of the process of a run, and a function that waits for its exit code."""
        process.stdin.write(f"{json.dumps(arguments)}\n")
        process.stdin.flush()
        return read(), read

    yield start
    process.stdin.close()
    assert process.wait() == 0


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--do-sample", "true", "--seed", "3", "--num-beams", "1"]])
def test_killed_at_any_moment(flags, killed, tmp_path, monkeypatch):
    """SIGKILL at start and between lines; the outputs are those of a run that was let be."""
    rng = random.Random(0)
    sources = tmp_path / "in.jsonl"
    words = " ".join(SOURCES).split()
    count = 8 * killed_generate.WINDOW
    with open(sources, "w") as file:
        for _ in range(count):
            source = " ".join(rng.choices(words, k=rng.randint(0, 9)))
            file.write(json.dumps({"source": source}) + "\n")
    preset = str(tmp_path / "preset")
    settings = bg.GenerationConfig(max_new_tokens=7, num_beams=2)
    make_small_model(generation_config=settings).save_to_preset(preset)
    run = ["generate", "--preset", preset, "--input", str(sources), "--no-xla", *flags]
    expected = tmp_path / "expected.jsonl"
    monkeypatch.setattr(generate, "WINDOW", killed_generate.WINDOW)
    assert cli.main([*run, "--output", str(expected)]) == 0
    lines = [json.loads(line) for line in expected.read_text().splitlines()]
    assert len(lines) == count
    assert len({line["output"] for line in lines}) > 100

    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    command = [*run, "--output", str(output), "--resume"]
    sizes = [0]
    for moment in range(3):
        process, wait = killed(command)
        if moment == 0:
            time.sleep(rng.uniform(0, 0.5))
        deadline = time.monotonic() + 120
        while moment:
            assert time.monotonic() < deadline
            os.kill(process, 0)  # raises when it has ended
            if partial.exists() and partial.stat().st_size > sizes[-1]:
                # The first time at once, while the rest of the lines of a window waits.
                time.sleep(rng.uniform(0, 0.2) if moment > 1 else 0)
                break
            time.sleep(0.001)
        os.kill(process, signal.SIGKILL)
        assert wait() == -signal.SIGKILL
        if partial.exists():
            size = partial.stat().st_size
            assert size >= sizes[-1] - 200  # a torn line at most
            sizes.append(size)
            written = partial.read_bytes()
            assert expected.read_bytes().startswith(written)
    assert len(set(sizes)) >= 3 and not output.exists()
    _, wait = killed(command)
    assert wait() == 0
    assert output.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "no/such"], "no/such should be a preset"),
        (["--input", "no.txt"], "no.txt: No such file or directory"),
        (["--input", "."], ".: Is a directory"),
        (["--input", "bad.txt"], "bad.txt, line 2: expected UTF-8, but byte 1 of the line (0xff)"),
        (["--input", "bad.jsonl"], 'bad.jsonl, line 2: expected {"source": "..."}, found \'\''),
        (["--output", "."], "--output must be a file, or - for standard output, but . is not one"),
        (["--output", os.devnull, "--overwrite"], f"but {os.devnull} is not one"),
        (["--output", "no/file"], "--output must lie in a folder that can be written, but no is"),
        (["--output", "bad.txt"], "bad.txt exists; --overwrite replaces it"),
        (["--output", "-", "--overwrite"], "--overwrite needs --output, a file to replace"),
        (["--num-beams", "0"], "num_beams must be an integer of at least 1, received 0"),
        (["--num-beams", "1.5"], "argument --num-beams: invalid int value: '1.5'"),
        (["--num-return-sequences", "3"], "num_return_sequences must not exceed num_beams (2)"),
        (["--early-stopping", "True"], "expected true, false or never, received 'True'"),
        (["--beam-scorer", "x"], "argument --beam-scorer: invalid choice: 'x'"),
        (["--length-penalty", "inf"], "--length-penalty: expected a number, received 'inf'"),
        (["--suppress-tokens", "1,,2"], "expected integers with commas between them"),
        (["--suppress-tokens", "-1"], "--suppress-tokens: expected"),
        (["--batch-size", "0"], "--batch-size: expected an integer of at least 1, received '0'"),
        (["--bad-words-ids", "5,x;6"], "--bad-words-ids: expected integers with commas"),
        (["--bad-words-ids", "5;"], "bad_words_ids must be sequences of token ids"),
        (["--sequence-bias", "5"], "--sequence-bias: expected ID,ID:X;ID:X, received '5'"),
        (["--sequence-bias", "5:x"], "--sequence-bias: expected a number, received 'x'"),
        (["--exponential-decay-length-penalty", "5"], "expected START,FACTOR, received '5'"),
        (["--exponential-decay-length-penalty", "x,1"], "expected an integer, received 'x'"),
        (["--eos-token-id", ""], "eos_token_id must be a token id"),
        (["--forced-bos-token-id", "x"], "--forced-bos-token-id: expected an integer, received"),
        (["--max-length", "9", "--max-new-tokens", "5"], "exclude each other, received 5 and 9"),
        (["--top-k", "5"], "top_k applies to sampling (do_sample=True) only"),
        (["--do-sample", "yes"], "--do-sample: expected true or false, received 'yes'"),
        (
            ["--do-sample", "true", "--temperature", "0.00001"],
            "temperature must be a number of at least 0.0001, received 1e-05",
        ),
    ],
)
def test_generate_refuses_before_it_starts(
    flags, message, preset, tmp_path, capsys, monkeypatch, no_library
):
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text("a\n")
    Path("bad.txt").write_bytes(b"a\n\xff\n")
    Path("bad.jsonl").write_text('{"source": "a"}\n\n{"source": "b"}\n')
    before = sorted(Path().iterdir())
    arguments = ["--preset", preset, "--input", "in.txt", "--output", "new.txt", *flags]
    assert message in fails(capsys, "generate", *arguments)
    assert sorted(Path().iterdir()) == before


def test_settings_and_presets_that_do_not_fit(preset, tmp_path, capsys):
    text = tmp_path / "in.txt"
    text.write_text("a\n")

    def refused(folder, *flags):
        return fails(capsys, "generate", "--preset", folder, "--input", text, *flags)

    assert "max_new_tokens must not exceed" in refused(preset, "--max-new-tokens", "23")
    assert "suppress_tokens must be smaller than" in refused(preset, "--suppress-tokens", "5,87")
    assert "max_length must not exceed" in refused(preset, "--max-length", "24")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    config = json.loads(Path(preset, "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config))
    assert "damaged should hold model.weights.h5" in refused(damaged)
    for changes, message in (
        ({"tokenizer": None}, "damaged has no tokenizer"),
        ({"generation_config": 3}, "damaged has a damaged generation_config"),
        ({"generation_config": {"num_beams": 0}}, "damaged has a damaged generation_config"),
    ):
        changed = {**config, "model": {**config["model"], **changes}}
        (damaged / "config.json").write_text(json.dumps(changed))
        assert message in refused(damaged)
    (damaged / "config.json").write_text(json.dumps({**config, "model": []}))
    assert "damaged should be a preset" in refused(damaged)
