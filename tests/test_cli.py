import dataclasses
import io
import json
import os
import sys
from pathlib import Path

import pytest
import tensorflow as tf
from conftest import make_model, write_checkpoint

import bertgen_tf as bg
from bertgen_tf import cli, text_files

SOURCES = [
    "the old man sang",
    "a bird left, and the house found a woman.",
    "who saw the bird?",
    "young woman",
    "the man found the old house and left",
    "a house",
    "the bird sang and the man saw",
]
PAIRS = [(source, " ".join(source.split()[::-1])) for source in SOURCES]


def write_pairs(path: Path, pairs=PAIRS) -> str:
    if path.suffix == ".jsonl":
        lines = [json.dumps({"source": s, "target": t, "note": 1}) for s, t in pairs]
    else:
        lines = [f"{s}\t{t}" for s, t in pairs]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return str(path)


def fails(capsys, *arguments) -> str:
    """The one line of an error of the user."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bertgen-tf: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.fixture
def no_library(monkeypatch):
    """Errors must come before anything slow: no model is loaded."""

    def refuse(*args, **kwargs):
        raise AssertionError("too late")

    for name in ("from_hub", "from_preset"):
        monkeypatch.setattr(bg.EncoderDecoderModel, name, refuse)


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> str:
    model = make_model(generation_config=bg.GenerationConfig(max_new_tokens=7, num_beams=2))
    folder = str(tmp_path_factory.mktemp("presets") / "random")
    model.save_to_preset(folder)
    return folder


# ---------------------------------------------------------------------- the whole way, once


def test_finetune_generate_export(hub_module, tmp_path, capsys):
    train = write_pairs(tmp_path / "train.tsv")
    validation = write_pairs(tmp_path / "validation.jsonl", PAIRS[:2])
    preset = tmp_path / "new" / "preset"
    finetune = ["finetune", "--train", train, "--validation", validation, "--output", str(preset)]
    start = ["--encoder", hub_module, "--share", "--cross-attention", "self_attention"]
    start += ["--num-layers", "0,2", "--trim-vocabulary"]
    lengths = ["--max-source-length", "15", "--max-target-length", "14"]
    training = ["--steps", "3", "--batch-size", "4", "--learning-rate", "0.001"]
    assert cli.main([*finetune, *start, *lengths, *training]) == 0
    out = capsys.readouterr().out
    assert "7 pairs to train on, 2 to validate on" in out
    assert "3 steps" in out
    assert "validation: loss " in out

    model = bg.EncoderDecoderModel.from_preset(preset)
    assert model.encoder.config.num_hidden_layers == 2
    assert model.encoder.config.vocab_size < 80  # of 87
    assert model.decoder.sharing == "all"
    assert model.generation_config.max_new_tokens == 14
    preprocessor = model.preprocessor
    assert (preprocessor.max_source_length, preprocessor.max_target_length) == (15, 14)
    assert preprocessor.add_bos and preprocessor.add_eos and preprocessor.mask_first
    untrained = bg.trim_vocabulary(
        bg.EncoderDecoderModel.from_hub(encoder=hub_module, num_layers=[0, 2], share=True),
        [text for pair in PAIRS for text in pair],
    )
    layer_norm, other = (m.encoder.blocks[1].weights[-1].numpy() for m in (model, untrained))
    assert 0 < abs(layer_norm - other).max() < 0.01  # the layer is of the module, and was trained

    # Epochs of the preset, replaced in its place, in mixed precision: 2 batches an epoch.
    again = [*finetune, "--preset", str(preset), "--mixed-precision"]
    assert cli.main([*again, "--epochs", "2", "--batch-size", "4"]) == 0
    assert "4 steps" in capsys.readouterr().out
    model = bg.EncoderDecoderModel.from_preset(preset)
    assert model.encoder.dtype_policy.name == "float32"
    assert model.generation_config.max_new_tokens == 14
    assert abs(layer_norm - model.encoder.blocks[1].weights[-1].numpy()).max() > 0

    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{source}\n" for source in SOURCES))
    # What random weights prefer to any other token, whatever the source.
    stop = model.tokenizer.convert_tokens_to_ids(".")
    options = ["--preset", str(preset), "--max-new-tokens", "9", "--suppress-tokens", str(stop)]
    outputs = tmp_path / "outputs.txt"
    generate = ["generate", *options, "--input", str(texts), "--output", str(outputs)]
    assert cli.main(generate) == 0
    expected = model.generate(SOURCES, max_new_tokens=9, suppress_tokens=(stop,))
    assert len(set(expected)) > 1
    assert outputs.read_text().split("\n") == [*expected, ""]

    version = tmp_path / "models" / "name" / "3"
    assert cli.main(["export", *options, "--output", str(version)]) == 0
    out = capsys.readouterr().out
    assert f"-v {tmp_path}/models/name:/models/name -e MODEL_NAME=name tensorflow/serving" in out
    assert "/v1/models/name:predict" in out
    served = tf.saved_model.load(str(version)).signatures["serving_default"]
    texts = served(text=tf.constant(SOURCES))["text"].numpy().tolist()
    assert [text.decode() for text in texts] == expected


# ------------------------------------------------------------------------------- start-up, help


def test_a_reader_that_goes_away_is_no_traceback(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as gone:  # closing it would raise, if what is left were still written
        monkeypatch.setattr(sys, "stdout", gone)
        assert cli.main(["--help"]) == 141


def test_ctrl_c_is_no_traceback(preset, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(bg.EncoderDecoderModel, "fit", interrupt)
    train = write_pairs(tmp_path / "train.tsv")
    output = tmp_path / "new"
    code = cli.main(["finetune", "--preset", preset, "--train", train, "--output", str(output)])
    assert (code, capsys.readouterr().err) == (130, "bertgen-tf: interrupted\n")
    assert not output.exists()


@pytest.mark.parametrize("command", ["finetune", "generate", "export"])
def test_help_names_every_option(command, capsys):
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"bertgen-tf {command} --" in text  # the example
    if command != "finetune":
        for field in dataclasses.fields(bg.GenerationConfig):
            flag = "--" + field.name.replace("_", "-")
            assert (flag in text) == ((command, flag) != ("export", "--num-return-sequences"))


# ------------------------------------------------------------------------------ finetune's input


@pytest.mark.parametrize("suffix", [".tsv", ".TXT", ".jsonl", ".json"])
def test_pairs_of_every_format(suffix, tmp_path):
    # U+2028 ends no line; nor do an empty side, a byte order mark or Windows' line ends.
    pairs = [("ü\u2028x", "y z"), ("", "b"), ("a", "")]
    join = "\t".join if suffix.lower() in text_files.TAB_SEPARATED else None
    lines = [join(p) if join else json.dumps({"target": p[1], "source": p[0]}) for p in pairs]
    path = tmp_path / f"pairs{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, "", ""]).encode())
    assert text_files.read_pairs(str(path)) == pairs


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", b"", "should hold pairs of texts, but is empty"),
        ("a.tsv", b"\n\n", "is empty"),
        ("a.tsv", b"a\tb\nc d\n", "line 2: expected source<TAB>target, found 0 tabs in 'c d'"),
        ("a.tsv", b"a\tb\tc\n", "line 1: expected source<TAB>target, found 2 tabs"),
        ("a.tsv", b"a\tb\n\nc\td\n", "line 2: expected source<TAB>target"),
        (
            "a.tsv",
            b"a\tb\n\xc3\xa4\xff\tb",
            "line 2: expected UTF-8, but byte 3 of the line (0xff)",
        ),
        ("a.csv", b"a,b\n", "should have one of the extensions .tsv, .txt"),
        ("a.jsonl", b'{"source": "a"}\n', 'line 1: expected {"source": "...", "target": "..."}'),
        ("a.jsonl", b'{"source": "a", "target": 5}', "line 1: expected {"),
        ("a.jsonl", b'{"source": "a", "target": null}', "line 1: expected {"),
        ("a.jsonl", b'["source", "target"]', "line 1: expected {"),
        ("a.jsonl", b'{"source": "a", "target": "\\ud800"}', "line 1: expected {"),
        ("a.jsonl", b"[" * 100000, "line 1: expected {"),
        ("a.jsonl", b"source\ttarget\n", "found 'source\\ttarget'"),
        ("a.jsonl", None, "a.jsonl: No such file or directory"),
    ],
)
def test_pairs_that_are_none(name, content, message, tmp_path, capsys, no_library):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    start = ["--encoder", "http://localhost/module", "--output", tmp_path / "new"]
    assert message in fails(capsys, "finetune", "--train", path, *start)
    good = write_pairs(tmp_path / "good.tsv")
    error = fails(capsys, "finetune", "--train", good, "--validation", path, *start)
    assert message in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], "one of the arguments --encoder --preset is required"),
        (["--encoder", "http://x/y", "--preset", "z"], "not allowed with argument"),
        (
            ["--preset", "PRESET", "--share", "--num-layers", "2"],
            "--share, --num-layers applies to",
        ),
        (["--preset", "no/such"], "no/such should be a preset"),
        (["--preset", "."], ". should be a preset"),
        (["--encoder", "http://x/y", "--output", "train.tsv"], "train.tsv is a file"),
        (["--encoder", "http://x/y", "--output", "train.tsv/below"], "train.tsv is a file"),
        (["--encoder", "http://x/y", "--output", "full"], "full holds other files"),
        (["--preset", "PRESET", "--epochs", "0"], "argument --epochs: expected an integer of at"),
        (["--preset", "PRESET", "--learning-rate", "nan"], "--learning-rate: expected a number"),
        (["--preset", "PRESET", "--learning-rate", "0"], "expected a number above 0, received '0'"),
        (["--preset", "PRESET", "--warmup-steps", "-1"], "--warmup-steps: expected"),
        (["--preset", "PRESET", "--cross-attention", "x"], "--cross-attention: invalid choice"),
        (["--preset", "PRESET", "--num-layers", "1,x"], "expected integers with commas"),
        (["--preset", "PRESET", "--ste", "3"], "unrecognized arguments: --ste 3"),
        (["--preset", "PRESET", "--seed", "4294967296"], "Seed must be between 0 and 2**32 - 1"),
    ],
)
def test_finetune_refuses_before_it_starts(
    changes, message, preset, tmp_path, capsys, monkeypatch, no_library
):
    monkeypatch.chdir(tmp_path)
    write_pairs(Path("train.tsv"))
    Path("full").mkdir()
    Path("full/config.json").write_text('{"model_type": "bert"}')
    changes = [preset if change == "PRESET" else change for change in changes]
    before = sorted(Path().rglob("*"))
    error = fails(capsys, "finetune", "--train", "train.tsv", "--output", "new", *changes)
    assert message in error
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--max-source-length", "27"], "max_source_length must not exceed max_position_embedding"),
        (["--max-target-length", "1"], "`max_target_length` must be at least 2"),
        (["--epochs", "1", "--warmup-steps", "9"], "--warmup-steps must be below all 1 steps"),
    ],
)
def test_finetune_settings_that_do_not_fit(changes, message, preset, tmp_path, capsys):
    train = write_pairs(tmp_path / "train.tsv")
    start = ["--preset", preset, "--train", train, "--output", tmp_path / "new"]
    assert message in fails(capsys, "finetune", *start, *changes)


def test_finetune_from_huggingface(tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "bert")
    train = write_pairs(tmp_path / "train.tsv")
    start = ["finetune", "--train", train, "--encoder", str(checkpoint), "--num-layers", "1"]
    start += ["--share", "--steps", "1", "--batch-size", "2", "--output", str(tmp_path / "new")]
    assert cli.main(start) == 0
    assert bg.EncoderDecoderModel.from_preset(tmp_path / "new").decoder.sharing == "all"
    capsys.readouterr()
    bare = str(tmp_path / "bare")
    make_model().encoder.save_to_huggingface(bare)
    assert f"{bare} has no tokenizer" in fails(capsys, *start, "--encoder", bare)


def test_finetune_settings_that_the_module_refuses(hub_module, tmp_path, capsys):
    train = write_pairs(tmp_path / "train.tsv")
    start = ["--encoder", hub_module, "--train", train, "--output", tmp_path / "new"]
    assert "num_layers must be a number from 1 to 4" in fails(
        capsys, "finetune", *start, "--num-layers", "5"
    )
    for flag, handle, message in (
        ("--encoder", tmp_path, "should hold a TF Hub module"),
        ("--encoder", "no/such/one", "no/such/one should be the folder of a TF Hub module"),
        ("--decoder", "no/such/one", "no/such/one should be the folder of a TF Hub module"),
    ):
        assert message in fails(capsys, "finetune", *start, flag, handle)


@pytest.mark.parametrize("error", [TypeError("x"), ValueError("x"), RuntimeError("x")])
def test_bugs_in_training_are_not_hidden(error, preset, tmp_path, monkeypatch):
    def fit(*args, **kwargs):
        raise error

    monkeypatch.setattr(bg.EncoderDecoderModel, "fit", fit)
    train = write_pairs(tmp_path / "train.tsv")
    with pytest.raises(type(error)):
        cli.main(
            ["finetune", "--preset", preset, "--train", train, "--output", str(tmp_path / "n")]
        )


@pytest.mark.parametrize(
    ("flags", "steps", "epochs", "warmup"),
    [
        # 7 pairs in two lengths (16 and 22 tokens): 2 and 5, so 1 and 3 batches of up to 2.
        (["--epochs", "5"], 4, 5, 2),
        (["--epochs", "5", "--steps", "31", "--warmup-steps", "7"], 31, 1, 7),
    ],
)
def test_steps_and_schedule(flags, steps, epochs, warmup, preset, tmp_path, monkeypatch, capsys):
    seen = {}

    def fit(self, x, **kwargs):
        seen.update(kwargs, optimizer=self.optimizer)
        seen["pairs"] = [len(y) for _ in range(2) for _, y, _ in x.take(steps)]
        return type("History", (), {"history": {"loss": [float("nan")]}})

    monkeypatch.setattr(bg.EncoderDecoderModel, "fit", fit)
    train = write_pairs(tmp_path / "train.tsv")
    common = ["--preset", preset, "--train", train, "--output", str(tmp_path / "new")]
    assert cli.main(["finetune", *common, "--batch-size", "2", "--learning-rate", "3", *flags]) == 2
    assert "training diverged, nothing was saved" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()

    assert (seen["steps_per_epoch"], seen["epochs"]) == (steps, epochs)
    if "--steps" in flags:
        assert set(seen["pairs"]) == {2}
    else:  # every pair once in each epoch
        assert sum(seen["pairs"][:steps]) == sum(seen["pairs"][steps:]) == len(PAIRS)
    schedule = seen["optimizer"]._learning_rate.get_config()
    assert schedule == {
        "learning_rate": 3.0,
        "warmup_steps": warmup,
        "total_steps": steps * epochs,
    }


# ------------------------------------------------------------------------------------- generate


@pytest.fixture
def echo(monkeypatch):
    """Generation that shows what it got, in place of a model's; records the calls."""
    calls = []

    def generate(self, texts, config, *, jit_compile):
        calls.append((len(texts), config, jit_compile))
        outputs = [[f"{text}\t{i}\u2028!" for i in range(config.num_beams)] for text in texts]
        return outputs if config.num_return_sequences > 1 else [row[0] for row in outputs]

    monkeypatch.setattr(bg.EncoderDecoderModel, "generate", generate)
    return calls


def test_plain_lines_stay_aligned(echo, preset, tmp_path, monkeypatch, capsys):
    # Empty lines, also at the end, and lines that only look like two.
    texts = ["a\u2028b", "", "c\td", "e" * 5000, "", *map(str, range(60)), ""]
    data = ("\r\n".join(texts) + "\r\n").encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert cli.main(["generate", "--preset", preset]) == 0
    captured = capsys.readouterr()
    expected = [text.replace("\u2028", " ").replace("\t", " ") + " 0 !" for text in texts]
    assert captured.out.split("\n") == [*expected, ""]
    assert captured.err == ""  # no bar where there is no terminal
    assert [count for count, _, _ in echo] == [32, 32, 2]
    assert {config for _, config, _ in echo} == {
        bg.GenerationConfig(max_new_tokens=7, num_beams=2)  # the preset's
    }


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


def test_generation_flags(echo, preset, tmp_path):
    (tmp_path / "in.txt").write_text("a\n")
    huggingface = {
        "max_new_tokens": 11,
        "min_new_tokens": 2,
        "num_beams": 5,
        "num_return_sequences": 3,
        "length_penalty": -0.5,
        "early_stopping": "never",
        "suppress_tokens": (7, 9),
    }
    gnmt = {"num_beams": 2, "beam_scorer": "gnmt", "gnmt_alpha": 0.9, "normalize_unfinished": True}
    fields = {field.name for field in dataclasses.fields(bg.GenerationConfig)}
    assert {*huggingface, *gnmt} == fields
    paths = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "o"), "--overwrite"]
    for values in (huggingface, gnmt):
        flags = []
        for name, value in values.items():
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
            flags += ["--" + name.replace("_", "-"), text]
        assert cli.main(["generate", "--preset", preset, *paths, *flags, "--no-xla"]) == 0
        (rows, config, jit_compile) = echo[-1]
        assert (rows, jit_compile) == (1, False)
        assert {name: getattr(config, name) for name in values} == values
    assert cli.main(["generate", "--preset", preset, *paths, "--early-stopping", "true"]) == 0
    assert echo[-1][1].early_stopping is True
    assert echo[-1][2] is True


def test_an_interrupted_run_keeps_its_lines_and_the_older_file(
    echo, preset, tmp_path, monkeypatch, capsys
):
    (tmp_path / "in.txt").write_text("a\n" * 40)
    output = tmp_path / "out.txt"
    output.write_text("older")
    partial = tmp_path / "out.txt.partial"
    paths = ["--input", str(tmp_path / "in.txt"), "--output", str(output)]
    run = ["generate", "--preset", preset, *paths]
    assert "out.txt exists; --overwrite replaces it" in fails(capsys, *run)

    generate = bg.EncoderDecoderModel.generate

    def interrupted(self, texts, *args, **kwargs):
        if len(texts) < 32:
            assert partial.read_text() == "a 0 !\n" * 32  # also if it is killed now
            raise KeyboardInterrupt
        return generate(self, texts, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(bg.EncoderDecoderModel, "generate", interrupted)
        assert cli.main([*run, "--overwrite"]) == 130
    assert capsys.readouterr().err == (
        f"bertgen-tf: what was finished is in {partial}\nbertgen-tf: interrupted\n"
    )
    assert partial.read_text() == "a 0 !\n" * 32
    assert output.read_text() == "older"
    output.unlink()
    assert "out.txt.partial exists" in fails(capsys, *run)
    assert partial.exists()
    assert cli.main([*run, "--overwrite"]) == 0
    assert output.read_text() == "a 0 !\n" * 40


def test_progress_on_a_terminal(echo, preset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    (tmp_path / "in.txt").write_text("a\n" * 64)
    run = ["generate", "--preset", preset, "--input", str(tmp_path / "in.txt")]
    assert cli.main([*run, "--output", str(tmp_path / "out.txt")]) == 0
    err = capsys.readouterr().err
    for done in (0, 32, 64):
        assert f"\r{done} of 64 texts, " in err
    assert err.endswith(" a second\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main(run) == 0
    assert capsys.readouterr().err == ""  # it would stand between the outputs


def test_a_pipe_is_read_once(echo, preset, capsys):
    reader, writer = os.pipe()
    os.write(writer, b"a\nb\n")
    os.close(writer)
    assert cli.main(["generate", "--preset", preset, "--input", f"/dev/fd/{reader}"]) == 0
    os.close(reader)
    assert capsys.readouterr().out == "a 0 !\nb 0 !\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "no/such"], "no/such should be a preset"),
        (["--input", "no.txt"], "no.txt: No such file or directory"),
        (["--input", "."], ".: Is a directory"),
        (["--input", "bad.txt"], "bad.txt, line 2: expected UTF-8, but byte 1 of the line (0xff)"),
        (["--input", "bad.jsonl"], 'bad.jsonl, line 2: expected {"source": "..."}, found \'\''),
        (["--output", "."], "--output must be a file, or - for standard output, but . is none"),
        (["--output", os.devnull, "--overwrite"], f"but {os.devnull} is none"),
        (["--output", "no/file"], "--output must lie in a folder that can be written, but no is"),
        (["--output", "bad.txt"], "bad.txt exists; --overwrite replaces it"),
        (["--num-beams", "0"], "num_beams must be an integer of at least 1, received 0"),
        (["--num-beams", "1.5"], "argument --num-beams: invalid int value: '1.5'"),
        (["--num-return-sequences", "3"], "num_return_sequences must not exceed num_beams (2)"),
        (["--early-stopping", "True"], "expected true, false or never, received 'True'"),
        (["--beam-scorer", "x"], "argument --beam-scorer: invalid choice: 'x'"),
        (["--length-penalty", "inf"], "--length-penalty: expected a number, received 'inf'"),
        (["--suppress-tokens", "1,,2"], "expected integers with commas between them"),
        (["--suppress-tokens", "-1"], "--suppress-tokens: expected"),
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


# --------------------------------------------------------------------------------------- export


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--output", "models/x"],
            "else, received 'models/x'. Use \"models/x/1\".",
        ),
        (["--output", "models/2"], "must be a new version, but models/2 exists"),
        (["--preset", "models"], "models should be a preset"),
        (["--num-return-sequences", "2"], "unrecognized arguments: --num-return-sequences 2"),
        (
            ["--num-beams", "1", "--early-stopping", "never"],
            "early_stopping applies to beam search",
        ),
    ],
)
def test_export_refuses_before_it_starts(
    flags, message, preset, tmp_path, capsys, monkeypatch, no_library
):
    monkeypatch.chdir(tmp_path)
    Path("models/2").mkdir(parents=True)
    assert message in fails(capsys, "export", "--preset", preset, "--output", "models/3", *flags)
    assert [path.name for path in Path("models").iterdir()] == ["2"]
