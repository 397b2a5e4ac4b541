"""`bertgen-tf convert`, on every kind of source."""

import functools
import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from make_tf1_module import make_shared_original
from safetensors.numpy import load_file, save_file

import bertgen_tf as bg
from bertgen_tf.cli import convert as cli_convert
from bertgen_tf.cli import main as cli
from bertgen_tf.network.weights import named_variables
from tests.helpers import (
    HUB_CONFIG,
    PIECES,
    eagerly,
    make_deep_model,
    make_model,
    make_small_model,
    write_bare_export,
    write_checkpoint,
)

TEXTS = ["the old man saw a house", "who sang?", "a bird left, but the woman found it"]


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> str:
    """Settings that HuggingFace has a place for, and settings that it has none for."""
    model = make_deep_model(
        "word_embeddings",
        max_source_length=15,
        add_bos=True,
        generation_config=bg.GenerationConfig(max_new_tokens=7, num_beams=3, length_penalty=0.6),
    )
    folder = str(tmp_path_factory.mktemp("presets") / "one")
    model.save_to_preset(folder)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory, spiece) -> str:
    folder = tmp_path_factory.mktemp("original") / "module"
    make_shared_original(folder, spiece)
    return str(folder)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(["convert", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def table(out: str) -> dict[str, str]:
    """The rows of what was read."""
    rows = [line[2:].split("  ", 1) for line in out.splitlines() if line.startswith("  ")]
    return {name: value.strip() for name, value in rows}


@pytest.mark.slow
def test_preset_to_huggingface_and_back(preset, tmp_path, capsys):
    there, back = str(tmp_path / "there"), str(tmp_path / "back")
    with eagerly():
        status, out, err = run(capsys, preset, there)
    assert (status, err) == (0, "")
    assert f"read {preset}: preset\n" in out
    assert table(out) == {
        "encoder": "2 layers, 12 wide, 3 heads, 20 inside, 26 positions, gelu",
        "decoder": "3 layers, 12 wide, 4 heads, 20 inside, 22 positions, gelu",
        "shared": "the word embeddings",
        "weights": f"{bg.EncoderDecoderModel.from_preset(preset).count_params():,}",
        "vocabulary": str(len(PIECES)),
        "special ids": "pad 0, start 3, end 4",
        "tokenizer": f"BertTokenizer, {len(PIECES)} pieces",
        "tokens at most": "15 source, 22 target",
        "special tokens": "add_bos",
        "generation": "max_new_tokens 7, num_beams 3, length_penalty 0.6",
    }
    assert "verified: read again, it gives the same logits and has the same settings\n" in out
    files = {path.name for path in Path(there).iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "vocab.txt"} <= files
    # A second time it replaces its own output.
    assert run(capsys, preset, there, "--no-verify")[0] == 0

    with eagerly():
        status, out, err = run(capsys, there, back)
    assert (status, err) == (0, "")
    assert f"read {there}: HuggingFace encoder-decoder\n" in out
    models = [bg.EncoderDecoderModel.from_preset(folder) for folder in (preset, back)]
    with eagerly():
        one, two = (model.generate(TEXTS, jit_compile=False) for model in models)
    assert one == two
    for one, two in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.slow
def test_export_to_preset(shared_export, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tf.saved_model, "load", functools.cache(tf.saved_model.load))
    export, target = str(shared_export[1]), tmp_path / "preset"
    status, out, err = run(capsys, export, str(target))
    assert (status, err) == (0, "")
    assert f"read {export}: export\n" in out
    assert "verified: the export itself gives the same probabilities\n" in out
    assert "verified: read again, it gives the same logits and has the same settings\n" in out
    read, written = (
        bg.EncoderDecoderModel.from_export(export),
        bg.EncoderDecoderModel.from_preset(target),
    )
    assert written.get_config() == read.get_config()
    for one, two in zip(read.get_weights(), written.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    # What does not answer as the graph does is not written.
    read.decoder.output_bias.assign(read.decoder.output_bias + np.arange(len(PIECES)))
    monkeypatch.setattr(bg.EncoderDecoderModel, "from_export", lambda folder: read)
    status, _, err = run(capsys, export, str(tmp_path / "other"))
    assert status == 2 and "should score texts as the model read from it, but differs in" in err
    assert not (tmp_path / "other").exists()


def test_int8_export_to_float32_preset(tmp_path, capsys):
    model = make_small_model("all")
    model.quantize("int8")
    export = str(write_bare_export(model, tmp_path / "name/3"))
    assert run(capsys, export, str(tmp_path / "int8"), "--no-verify")[0] == 0
    assert bg.EncoderDecoderModel.from_preset(tmp_path / "int8").is_quantized
    target = tmp_path / "float32"
    status, out, _ = run(capsys, export, str(target), "--no-verify", "--dequantize")
    assert status == 0 and "dequantized: all matrices are float32\n" in out
    model.dequantize()
    written = bg.EncoderDecoderModel.from_preset(target)
    assert written.get_config() == model.get_config()
    for one, two in zip(model.get_weights(), written.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    # So does an int8 preset.
    status, out, _ = run(
        capsys, str(tmp_path / "int8"), str(tmp_path / "hf"), "--no-verify", "--dequantize"
    )
    assert status == 0 and (tmp_path / "hf/model.safetensors").is_file()


@pytest.mark.slow
def test_encoders_become_the_start_of_a_model(hub_module, tmp_path, capsys):
    checkpoint = str(write_checkpoint(tmp_path / "checkpoint"))
    options = ["--share", "--cross-attention", "self_attention", "--num-layers", "0,2"]
    for source, kind in ((hub_module, "TF Hub encoder"), (checkpoint, "HuggingFace encoder")):
        target = str(tmp_path / kind)
        status, out, err = run(capsys, source, target, *options)
        assert (status, err) == (0, "")
        assert f"read {source}: {kind}\n" in out
        assert table(out)["shared"] == "all but cross-attention and output bias"
        model = bg.EncoderDecoderModel.from_preset(target)
        assert model.encoder.config.num_hidden_layers == 2 != HUB_CONFIG["num_hidden_layers"]
        block = model.decoder.blocks[1]
        cross, own = map(named_variables, (block.cross_attention, block.self_attention))
        assert cross.keys() == own.keys()
        for name, variable in cross.items():
            np.testing.assert_array_equal(variable, own[name])
        assert model.tokenizer.vocab_size == len(PIECES)


@pytest.mark.slow
def test_original_to_preset_to_huggingface(original, tmp_path, capsys):
    there, back = str(tmp_path / "there"), str(tmp_path / "back")
    status, out, err = run(capsys, original, there)
    assert (status, err) == (0, "")
    assert f"read {original}: TF Hub original\n" in out
    assert "verified: the module itself gives the same\n" in out
    assert "beam_scorer gnmt" in table(out)["generation"]
    assert "BertGenerationTokenizer, 47 pieces" in table(out)["tokenizer"]
    with eagerly():
        assert run(capsys, there, back)[0] == 0
    model = bg.EncoderDecoderModel.from_hub(original, verify=False)
    others = [bg.EncoderDecoderModel.from_preset(there)]
    others.append(bg.EncoderDecoderModel.from_huggingface(back))
    with eagerly():
        expected = model.generate(TEXTS, jit_compile=False)
        for other in others:
            assert other.generate(TEXTS, jit_compile=False) == expected


def test_differences_are_found(preset, tmp_path, capsys, monkeypatch):
    read = bg.EncoderDecoderModel.from_huggingface

    def other(folder):
        model = read(folder)
        variable = model.decoder.blocks[2].cross_attention.key_value.kernel
        variable.assign(variable * 1.01)
        return model

    monkeypatch.setattr(cli_convert.EncoderDecoderModel, "from_huggingface", other)
    older = tmp_path / "older"
    make_deep_model("all").save_to_huggingface(older)
    files = {path.name: path.read_bytes() for path in older.iterdir()}
    for target in (older, tmp_path / "new"):
        status, _, err = run(capsys, preset, str(target))
        assert status == 2 and f"{target} was not written, because what was written for it" in err
    assert {path.name: path.read_bytes() for path in older.iterdir()} == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["older"]
    assert run(capsys, preset, str(tmp_path / "unseen"), "--no-verify")[0] == 0

    def longer(folder):
        model = read(folder)
        model.generation_config = model.generation_config.replace(max_new_tokens=8)
        return model

    monkeypatch.setattr(cli_convert.EncoderDecoderModel, "from_huggingface", longer)
    assert run(capsys, preset, str(tmp_path / "settings"))[0] == 2

    def cased(folder):
        config = read(folder).get_config()
        config["tokenizer"]["config"]["lowercase"] = False
        model = bg.EncoderDecoderModel.from_config(config)
        model.set_weights(read(folder).get_weights())
        return model

    monkeypatch.setattr(cli_convert.EncoderDecoderModel, "from_huggingface", cased)
    assert run(capsys, preset, str(tmp_path / "tokenizer"))[0] == 2


@pytest.mark.slow
def test_presets_of_another_dtype_policy(tmp_path, capsys):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        make_model().save_to_preset(tmp_path / "half")
    finally:
        keras.config.set_dtype_policy("float32")
    with eagerly():
        status, out, err = run(capsys, str(tmp_path / "half"), str(tmp_path / "there"))
    assert (status, err) == (0, "")
    assert "verified: read again, it gives the same logits" in out
    bg.EncoderDecoderModel.from_huggingface(tmp_path / "there")


@pytest.mark.slow
def test_stacks_that_transformers_4_stored_once(tmp_path, capsys):
    """transformers 5 has no tie_encoder_decoder and would leave the encoder random."""
    reason = 'needs transformers and torch: pip install -e ".[compare]"'
    pytest.importorskip("transformers", reason=reason)
    pytest.importorskip("torch", reason=reason)
    folder = tmp_path / "once"
    make_small_model("all").save_to_huggingface(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: array for name, array in tensors.items() if not name.startswith("encoder.")}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with eagerly():
        status, out, err = run(capsys, str(folder), str(tmp_path / "preset"))
    assert (status, err) == (0, "")
    assert "verified with transformers: encoder hidden states: max abs difference" in out


@pytest.mark.slow
def test_what_differs_in_transformers_is_an_error(preset, tmp_path, capsys, monkeypatch):
    there = str(tmp_path / "there")
    assert run(capsys, preset, there, "--no-verify")[0] == 0
    folders = []

    def compare(model, folder):
        folders.append((type(model).__name__, Path(folder).parent.name))
        return [
            cli_convert.Check("decoder logits", "max abs difference 0.3", False),
            cli_convert.Check("greedy search", "3 of 3 sequences the same", True),
        ]

    monkeypatch.setattr(cli_convert, "compare_with_huggingface", compare)
    monkeypatch.setattr(cli_convert.importlib.util, "find_spec", lambda name: name)
    status, _, err = run(capsys, there, str(tmp_path / "back"))
    assert status == 2 and "differs in decoder logits: max abs difference 0.3." in err
    assert not (tmp_path / "back").exists()
    monkeypatch.setattr(cli_convert, "compare_with_huggingface", lambda *_: compare(*_)[1:])
    status, out, _ = run(capsys, there, str(tmp_path / "back"))
    line = "verified with transformers: greedy search: 3 of 3 sequences the same\n"
    assert status == 0 and line in out
    assert run(capsys, preset, str(tmp_path / "again"))[0] == 0
    checkpoint = str(write_checkpoint(tmp_path / "encoders" / "bert"))
    assert line in run(capsys, checkpoint, str(tmp_path / "encoder"))[1]
    out = run(capsys, checkpoint, str(tmp_path / "some"), "--num-layers", "2")[1]
    assert line not in out and "not compared with Hugging Face's own outputs: not all" in out
    assert folders == [
        *[("EncoderDecoderModel", tmp_path.name)] * 3,
        ("BertGenerationEncoder", "encoders"),
    ]
    monkeypatch.setattr(
        cli_convert.importlib.util, "find_spec", lambda name: None if name == "torch" else name
    )
    status, out, _ = run(capsys, there, str(tmp_path / "third"))
    assert (
        status == 0 and "not compared with Hugging Face's own outputs: torch not installed" in out
    )


def write_config(folder: Path, **config) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_bad_sources_and_flags(preset, original, hub_module, tmp_path, capsys):
    target = str(tmp_path / "target")
    decoder = write_config(tmp_path / "d", model_type="bert-generation", is_decoder=True)
    plain = write_config(tmp_path / "p", something="else")
    versions = tmp_path / "export"
    write_bare_export(make_small_model(), versions / "1")
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "file.txt").write_text("")
    for arguments, message in [
        ([decoder, target], "should be an encoder-decoder or an encoder, but is a decoder alone"),
        ([plain, target], f"{plain} should be a preset that save_to_preset wrote"),
        ([str(empty), target], f"{empty} should hold a TF Hub module"),
        ([str(tmp_path / "none" / "there"), target], "there is no such folder"),
        ([f"{tmp_path.name}/x.tar.gz", target], "there is no such"),
        ([str(tmp_path / "file.txt"), target], "file.txt"),
        ([preset, target, "--share"], f"--share applies to an encoder, and {preset} is a preset"),
        ([preset, target, "--num-layers", "1"], "--num-layers applies to an encoder"),
        ([original, target, "--share"], "is a TF Hub original"),
        ([hub_module, target, "--original", "roberta24_bbc"], "--original applies to an original"),
        ([hub_module, target, "--num-layers", "9"], "num_layers must be a number from 1 to 3"),
        ([original, target, "--original", "roberta"], "roberta"),
        ([hub_module, target, "--dequantize"], "--dequantize applies to an export or a preset"),
        ([str(versions), target], f"{versions} should be one version of an export, but holds 1"),
        ([preset, hub_module], "holds other files"),
        ([original, hub_module], "holds other files"),
    ]:
        status, _, err = run(capsys, *arguments)
        assert status == 2, arguments
        assert message in err and err.count("\n") == 1, err
        assert not Path(target).exists()
