"""The whole way, help, and how commands end."""

import dataclasses
import os
import signal
import sys

import pytest
import tensorflow as tf

import bertgen_tf as bg
from bertgen_tf import finetuning
from bertgen_tf.cli import main as cli
from bertgen_tf.data import folders
from bertgen_tf.export import saved_model
from tests.helpers.command_line import PAIRS, SOURCES, write_pairs

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
    out, err = capsys.readouterr()
    assert "7 pairs to train on, 2 to validate on" in out
    assert "3 steps" in out
    assert "validation: loss " in out
    assert err.startswith("bertgen-tf: loss ") and err.count("\n") == 1
    assert err.endswith("; what usually helps: more --steps, more pairs\n")

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
    steps = [f"reading {preset}", "tracing the signatures", "writing graphs and weights"]
    assert out.splitlines()[:3] == steps and out.splitlines()[3].startswith("checking in a sep")
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


def test_output_on_a_full_disk_is_one_line(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["--help"]) == 2
    expected = "bertgen-tf: error: standard output: No space left on device\n"
    assert capsys.readouterr().err == expected


def test_ctrl_c_is_no_traceback(preset, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetuning, "train", interrupt)
    train = write_pairs(tmp_path / "train.tsv")
    output = tmp_path / "new"
    code = cli.main(["finetune", "--preset", preset, "--train", train, "--output", str(output)])
    assert (code, capsys.readouterr().err) == (130, "bertgen-tf: interrupted\n")
    assert not output.exists()


@pytest.mark.parametrize(
    ("command", "flags", "module", "name"),
    [
        ("export", ["--preset", "PRESET", "--output", "new/model/1"], saved_model, "ServingModule"),
        ("convert", ["PRESET", "new/model"], folders.os, "chmod"),
    ],
)
def test_ended_by_sigterm_it_leaves_nothing(
    command, flags, module, name, preset, tmp_path, monkeypatch
):
    """Neither a hidden folder nor those that were made for it."""
    monkeypatch.chdir(tmp_path)
    seen = []

    def end(*args, **kwargs):
        seen.extend(path.name for path in tmp_path.rglob(".*"))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(module, name, end)
    words = [preset if flag == "PRESET" else flag for flag in flags]
    assert cli.main([command, *words]) == 143
    assert len(seen) == 1 and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_a_parent_ignores_is_ignored(preset, tmp_path, monkeypatch, capsys):
    """As under nohup."""
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    train = write_pairs(tmp_path / "train.tsv")

    def hang_up(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGHUP)
        raise finetuning.Diverged("later")

    monkeypatch.setattr(finetuning, "train", hang_up)
    flags = ["--preset", preset, "--train", train, "--output", str(tmp_path / "new")]
    try:
        assert cli.main(["finetune", *flags]) == 2
    finally:
        signal.signal(signal.SIGHUP, earlier)
    assert "training diverged, nothing was saved: later" in capsys.readouterr().err


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
