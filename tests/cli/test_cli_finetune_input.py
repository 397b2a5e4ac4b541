"""`bertgen-tf finetune`: pairs, settings, what it refuses before it starts."""

import json
from pathlib import Path

import pytest
import tensorflow as tf

import bertgen_tf as bg
from bertgen_tf import finetuning
from bertgen_tf.cli import main as cli
from bertgen_tf.data import text_files
from tests.helpers import fails, make_model, make_small_model, write_checkpoint
from tests.helpers.command_line import PAIRS, write_pairs

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
        ("a.xml", b"<a>", "should have one of the extensions .tsv, .txt (source<TAB>target), .csv"),
        ("a.csv", b"a,b\n", "first line its columns are 'a, b': choose one with --source-column"),
        ("a.jsonl", b'{"source": "a"}\n', 'line 1: expected {"source": "...", "target": "..."}'),
        ("a.jsonl", b'{"source": "a", "target": 5}', "line 1: expected {"),
        ("a.jsonl", b'{"source": "a", "target": null}', "line 1: expected {"),
        ("a.jsonl", b'["source", "target"]', "element 1: expected {"),
        ("a.jsonl", b'{"source": "a", "target": "\\ud800"}', "line 1: expected {"),
        ("a.jsonl", b"[" * 100000, "line 1: expected an array of {"),
        ("a.jsonl", b'{"a":' * 100000, "line 1: expected {"),
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
        ([], "arguments are required: --encoder or --preset or --recipe (see"),
        (["--recipe", "BERT2BERT"], "--recipe needs --encoder, --decoder or both"),
        (
            ["--recipe", "BERT2BERT", "--encoder", "x", "--share"],
            "--recipe specifies whether the sides share: leave --share out",
        ),
        (["--recipe", "BERT2bert", "--encoder", "x"], "--recipe: invalid choice: 'BERT2bert'"),
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
        (["--max-target-length", "1"], "max_target_length must be an integer of at least 2"),
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
    assert "must have float32 matrices to become a Hugging Face checkpoint" in error
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
