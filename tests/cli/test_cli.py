import dataclasses
import fcntl
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
import tensorflow as tf

import bertgen_tf as bg
from bertgen_tf import finetuning
from bertgen_tf.cli import generate
from bertgen_tf.cli import main as cli
from bertgen_tf.data import text_files
from bertgen_tf.export import saved_model
from tests.helpers import fails, killed_generate, make_model, make_small_model, write_checkpoint

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


@pytest.fixture
def checks(monkeypatch) -> list[Path]:
    """The exports that were to be checked; tests/test_export_check.py has the check itself."""
    checked = []
    monkeypatch.setattr(saved_model, "check_export", lambda folder, *args: checked.append(folder))
    return checked


# ---------------------------------------------------------------------- the whole way, once


@pytest.mark.slow
def test_finetune_generate_export(hub_module, checks, tmp_path, capsys):
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
    expected = model.generate(SOURCES, max_new_tokens=9, suppress_tokens=(stop,), jit_compile=False)
    assert len(set(expected)) > 1
    assert outputs.read_text().split("\n") == [*expected, ""]

    version = tmp_path / "models" / "name" / "3"
    assert cli.main(["export", *options, "--output", str(version)]) == 0
    assert [folder.parent for folder in checks] == [version.parent]
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

    monkeypatch.setattr(finetuning, "train", interrupt)
    train = write_pairs(tmp_path / "train.tsv")
    output = tmp_path / "new"
    code = cli.main(["finetune", "--preset", preset, "--train", train, "--output", str(output)])
    assert (code, capsys.readouterr().err) == (130, "bertgen-tf: interrupted\n")
    assert not output.exists()


@pytest.mark.parametrize("command", ["finetune", "generate", "evaluate", "export"])
def test_help_names_every_option(command, capsys):
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"bertgen-tf {command} --" in text  # the example
    if command != "finetune":
        for field in dataclasses.fields(bg.GenerationConfig):
            flag = "--" + field.name.replace("_", "-")
            one_output = command != "generate"
            assert (flag in text) == (not one_output or flag != "--num-return-sequences")


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"bertgen-tf {bg.__version__}\n"


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


@pytest.mark.slow
def test_int8_on_the_command_line(checks, tmp_path, capsys):
    source, output = tmp_path / "in.txt", tmp_path / "out.txt"
    preset = str(tmp_path / "preset")
    settings = bg.GenerationConfig(max_new_tokens=7, num_beams=2)
    make_small_model(generation_config=settings).save_to_preset(preset)
    source.write_text("the man saw a bird\nwho sang\n")
    flags = ["--preset", preset, "--quantize", "int8", "--num-beams", "1"]
    files = ["--input", str(source), "--output", str(output), "--no-xla"]
    assert cli.main(["generate", *flags, *files]) == 0
    model = bg.EncoderDecoderModel.from_preset(preset)
    model.quantize("int8")
    texts = source.read_text().splitlines()
    expected = model.generate(texts, num_beams=1, jit_compile=False)
    assert output.read_text().splitlines() == expected
    command = ["export", *flags, "--output", str(tmp_path / "name/1"), "--no-check"]
    assert cli.main(command) == 0 and not checks
    weights = tf.saved_model.load(str(tmp_path / "name/1")).weights
    assert sum(weight.dtype == tf.int8 for weight in weights) > 10
    int8 = str(tmp_path / "int8")
    model.save_to_preset(int8)
    capsys.readouterr()
    train = write_pairs(tmp_path / "train.tsv")
    start = ["--preset", int8, "--train", train, "--output", tmp_path / "new"]
    assert f"{int8} is int8: train the float32 preset" in fails(capsys, "finetune", *start)
    assert cli.main(["convert", int8, str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert "must have float32 matrices to become a HuggingFace checkpoint" in error
    assert not (tmp_path / "new").exists()
    assert "--quantize: invalid choice: 'x'" in fails(capsys, "generate", *flags, "--quantize", "x")


@pytest.mark.slow
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
    assert "num_layers must be a number from 1 to 3" in fails(
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
    def train(*args, **kwargs):
        raise error

    monkeypatch.setattr(finetuning, "train", train)
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

    def train(model, data, **kwargs):
        seen.update(kwargs, optimizer=model.optimizer, data=data)
        raise finetuning.Diverged("the loss is nan at step 1")

    monkeypatch.setattr(finetuning, "train", train)
    train_file = write_pairs(tmp_path / "train.tsv")
    common = ["--preset", preset, "--train", train_file, "--output", str(tmp_path / "new")]
    assert cli.main(["finetune", *common, "--batch-size", "2", "--learning-rate", "3", *flags]) == 2
    assert "training diverged, nothing was saved: the loss is nan" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()

    assert (seen["steps_per_epoch"], seen["steps"]) == (steps, steps * epochs)
    assert (len(seen["data"]), seen["data"].steps_per_epoch) == (len(PAIRS), 4)
    schedule = seen["optimizer"]._learning_rate.get_config()
    assert schedule == {
        "learning_rate": 3.0,
        "warmup_steps": warmup,
        "total_steps": steps * epochs,
    }


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
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
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
    stdin = io.TextIOWrapper(io.BytesIO(b"a\nb\n"))
    stdin.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", stdin)
    assert cli.main(["generate", "--preset", preset]) == 0
    assert (echo[-1]["window"], echo[-1]["counts"]) == (1, [1, 1])
    captured = capsys.readouterr()
    assert captured.out == "a 0 !\nb 0 !\n"
    assert captured.err == "bertgen-tf: one text a line, Ctrl-D to end\n"


def test_a_pipe_is_read_once(echo, preset, capsys):
    reader, writer = os.pipe()
    os.write(writer, b"a\nb\n")
    os.close(writer)
    assert cli.main(["generate", "--preset", preset, "--input", f"/dev/fd/{reader}"]) == 0
    os.close(reader)
    assert capsys.readouterr().out == "a 0 !\nb 0 !\n"


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
    assert f"{job.partial} exists; --resume goes on, --overwrite starts anew" in error
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
        assert "tells what run began" in refused("--input", tmp_path / "same.txt")
    job.settings.unlink()
    assert "tells what run began" in refused("--input", tmp_path / "same.txt")
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
            assert f"another run writes to {job.partial}: let it end" in error
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
    assert "tells what run began" in fails(capsys, *job.run, "--resume")


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
        (["--output", "."], "--output must be a file, or - for standard output, but . is none"),
        (["--output", os.devnull, "--overwrite"], f"but {os.devnull} is none"),
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
