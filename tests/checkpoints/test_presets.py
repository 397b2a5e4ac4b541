import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import bertgen_tf as bg
from bertgen_tf.checkpoints import presets
from bertgen_tf.checks import Damaged
from bertgen_tf.network.weights import named_variables
from tests.helpers import (
    CORPUS,
    GOLDEN,
    PIECES,
    eagerly,
    make_deep_model,
    make_model,
    make_small_model,
)

ARCHIVE = GOLDEN / "golden_preset.zip"
INPUTS = {
    "input_ids": np.array([[9, 40, 3, 7], [6, 8, 0, 0]], np.int32),
    "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0]], np.int32),
    "decoder_input_ids": np.array([[3, 41, 9], [3, 30, 0]], np.int32),
    "decoder_attention_mask": np.array([[1, 1, 1], [1, 1, 0]], np.int32),
}
GENERATE = {"jit_compile": False, "num_beams": 2, "max_new_tokens": 5, "min_new_tokens": 2}
load = bg.EncoderDecoderModel.from_preset


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    """Read-only."""
    folder = tmp_path_factory.mktemp("presets") / "preset"
    model.save_to_preset(folder)
    return folder


@pytest.fixture
def preset(saved, tmp_path) -> Path:
    """Without checksums, as an older version wrote it: what they would refuse is read."""
    folder = Path(shutil.copytree(saved, tmp_path / "preset"))
    edit(folder, "checksums", value=...)
    return folder


@pytest.mark.parametrize(
    ("sharing", "kind"),
    [
        ("none", "bert"),
        ("word_embeddings", "bert"),
        ("all", "bert"),
        ("word_embeddings", "sentencepiece"),
        ("all", "none"),
        ("all", "huggingface"),
    ],
)
def test_round_trip(sharing, kind, spiece, tmp_path):
    options = {}
    if kind == "sentencepiece":
        options["make_tokenizer"] = lambda: bg.BertGenerationTokenizer(spiece)
    elif kind == "huggingface":
        options["make_tokenizer"] = lambda: bg.BertTokenizer(
            list(PIECES),
            normalization=[{"type": "NFC"}, {"type": "Lowercase"}],
            pre_tokenizer="WhitespaceSplit",
            added_tokens=["house"],
        )
    model = make_model(
        sharing,
        max_source_length=11,
        max_target_length=7,
        add_eos=True,
        generation_config=bg.GenerationConfig(max_new_tokens=6, suppress_tokens=(5, 12)),
        **options,
    )
    if kind == "none":
        model = bg.EncoderDecoderModel(model.encoder, model.decoder)
    model.save_to_preset(tmp_path / "new/preset")
    vocabularies = {"sentencepiece": ["spiece.model"], "none": []}
    vocabulary = vocabularies.get(kind, ["vocab.txt"])
    files = sorted(os.listdir(tmp_path / "new/preset"))
    assert files == ["config.json", "model.weights.h5", *vocabulary]
    # No vocabulary in config.json, and no path of the machine that wrote it.
    config = (tmp_path / "new/preset/config.json").read_text()
    assert len(config) < 4500 and str(tmp_path) not in config

    moved = (tmp_path / "new/preset").rename(tmp_path / "elsewhere")
    if kind != "none":
        with pytest.raises(ValueError, match="EncoderDecoderModel.from_preset reads presets"):
            keras.saving.load_model(moved)
    loaded = load(str(moved))
    np.testing.assert_array_equal(loaded(INPUTS), model(INPUTS))
    assert loaded.get_config() == model.get_config()
    assert loaded.generation_config == model.generation_config
    # As many variables as before: what is shared stays shared.
    assert len(loaded.weights) == len(model.weights)
    word = loaded.encoder.embeddings.word_embeddings
    assert (loaded.decoder.embeddings.word_embeddings is word) == (sharing != "none")
    assert (loaded.decoder.embeddings is loaded.encoder.embeddings) == (sharing == "all")
    if kind == "none":
        assert loaded.tokenizer is None
        ids = {name: INPUTS[name] for name in ("input_ids", "attention_mask")}
        with eagerly():
            expected, found = (m.generate(ids, **GENERATE) for m in (model, loaded))
        np.testing.assert_array_equal(found.sequences, expected.sequences)
    else:
        assert loaded.preprocessor.get_config() == model.preprocessor.get_config()
        with eagerly():
            assert loaded.generate(CORPUS, **GENERATE) == model.generate(CORPUS, **GENERATE)


def test_every_weight_comes_back(model, saved):
    loaded = named_variables(load(saved))
    for name, variable in named_variables(model).items():
        np.testing.assert_array_equal(loaded[name], variable, err_msg=name)


def test_dtype_policy_comes_back(model, tmp_path):
    config = model.encoder.config
    encoder = bg.BertGenerationEncoder(config, dtype="mixed_bfloat16")
    decoder = bg.BertGenerationDecoder(model.decoder.config, dtype="mixed_bfloat16")
    mixed = bg.EncoderDecoderModel(encoder, decoder, dtype="mixed_bfloat16")
    mixed.save_to_preset(tmp_path / "preset")
    loaded = load(tmp_path / "preset")
    assert loaded.encoder(INPUTS["input_ids"]).dtype == "bfloat16"
    np.testing.assert_array_equal(loaded(INPUTS), mixed(INPUTS))


@pytest.mark.slow
def test_optimizer_is_left_out(tmp_path):
    saved = tmp_path / "saved"
    make_small_model().save_to_preset(saved)
    model = load(saved)
    model.compile(jit_compile=False, run_eagerly=True)
    model.fit(CORPUS, CORPUS, verbose=0)
    steps = int(model.optimizer.iterations)
    model.save_to_preset(tmp_path / "preset")
    size = (tmp_path / "preset/model.weights.h5").stat().st_size
    assert size == (saved / "model.weights.h5").stat().st_size
    np.testing.assert_array_equal(load(tmp_path / "preset")(INPUTS), model(INPUTS))
    # Saving changes nothing in the model: training goes on.
    model.fit(CORPUS, CORPUS, verbose=0)
    assert int(model.optimizer.iterations) == 2 * steps


@pytest.mark.parametrize("sharing", ["none", "word_embeddings", "all"])
def test_presets_of_earlier_days_are_read(sharing, tmp_path):
    """Fails if a class or an attribute was renamed that a path in model.weights.h5 is made of."""
    shutil.unpack_archive(ARCHIVE, tmp_path)
    golden = np.load(tmp_path / "golden.npz")
    model = load(tmp_path / sharing)
    inputs = {name: golden[name] for name in INPUTS}
    np.testing.assert_allclose(model(inputs), golden[sharing], atol=1e-5)
    # And written under the same names, so that an older version can read what is new.
    model.save_to_preset(tmp_path / "again")
    assert sorted(os.listdir(tmp_path / "again")) == sorted(os.listdir(tmp_path / sharing))
    assert tensor_names(tmp_path / "again") == tensor_names(tmp_path / sharing)
    old, new = (
        json.loads((tmp_path / name / "config.json").read_text())["model"]
        for name in (sharing, "again")
    )
    for side in ("encoder", "decoder"):
        assert new[side]["config"].keys() == old[side]["config"].keys()


MIRRORED = """
import sys
import numpy as np
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import bertgen_tf as bg
golden = np.load(sys.argv[1] + "/golden.npz")
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    model = bg.EncoderDecoderModel.from_preset(sys.argv[1] + "/none")
    x = {name: golden[name] for name in ("input_ids", "decoder_input_ids")}
print("OK", model.weights[-1].value.__class__.__name__, len(model.weights[-1].value.values))
"""


@pytest.mark.slow
def test_presets_are_read_for_several_devices(tmp_path):
    shutil.unpack_archive(ARCHIVE, tmp_path)
    process = subprocess.run(
        [sys.executable, "-c", MIRRORED, str(tmp_path)], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "OK MirroredVariable 2" in process.stdout


def tensor_names(folder: Path) -> list[str]:
    import h5py

    names = []
    with h5py.File(folder / "model.weights.h5") as file:
        file.visititems(
            lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None
        )
    return names


# Where it is written


def test_an_older_preset_is_replaced(preset):
    other = make_model("all", seed=7, make_tokenizer=lambda: bg.BertTokenizer(["a", *SPECIALS]))
    other.save_to_preset(preset)
    inputs = {name: np.minimum(ids, 4) for name, ids in INPUTS.items()}
    np.testing.assert_array_equal(load(preset)(inputs), other(inputs))
    assert os.listdir(preset.parent) == ["preset"]
    assert preset.stat().st_mode & 0o755 == 0o755


SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


@pytest.mark.parametrize("function", ["save_weights", "get_config"])
def test_a_failure_leaves_the_older_preset(function, model, preset, monkeypatch):
    def fail(*args):
        raise OSError("No space left on device")

    expected = {path.name: path.read_bytes() for path in preset.iterdir()}
    monkeypatch.setattr(bg.EncoderDecoderModel, function, fail)
    for folder in (preset, preset.parent / "new"):
        with pytest.raises(OSError, match="No space left"):
            model.save_to_preset(folder)
    assert {path.name: path.read_bytes() for path in preset.iterdir()} == expected
    assert os.listdir(preset.parent) == ["preset"]


def test_other_files_are_never_replaced(model, preset, tmp_path):
    message = "must be new, empty or a preset of ours to replace, but .* holds other files"
    (preset / "training_log.csv").write_text("epoch,loss\n")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "bert"}')
    for folder in (preset, foreign, tmp_path):
        before = sorted(path for path in folder.rglob("*"))
        with pytest.raises(FileExistsError, match=message):
            model.save_to_preset(folder)
        assert sorted(path for path in folder.rglob("*")) == before
    with pytest.raises(FileExistsError, match="must be a folder, but .*config.json is a file"):
        model.save_to_preset(foreign / "config.json")
    with pytest.raises(NotADirectoryError, match="must lie in a folder, but .*config.json is a f"):
        model.save_to_preset(foreign / "config.json/below/it")


def test_a_folder_that_cannot_be_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may all
    with pytest.raises(PermissionError, match=f"can be written, but {tmp_path} cannot"):
        model.save_to_preset(tmp_path / "new/preset")
    assert not os.listdir(tmp_path)


def test_empty_current_and_linked_folders(model, preset, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    model.save_to_preset(".")
    assert "config.json" in os.listdir(empty)
    link = tmp_path / "link"
    link.symlink_to(preset)
    model.save_to_preset(link)
    assert link.is_symlink() and sorted(os.listdir(link)) == sorted(os.listdir(preset))
    load(link)


# What cannot be read


def one_error(folder, kind, *parts):
    with pytest.raises(kind) as caught:
        load(folder)
    message = str(caught.value)
    assert type(caught.value) is kind and "\n" not in message
    for part in (str(folder), "should ", *parts):
        assert part in message, message


def edit(preset, *path, value):
    """Sets one value of config.json; `...` deletes it."""
    content = json.loads((preset / "config.json").read_text())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    (preset / "config.json").write_text(json.dumps(content))


def test_a_missing_folder_and_missing_files(preset, tmp_path):
    one_error(tmp_path / "absent", FileNotFoundError, "there is no such folder")
    one_error(preset / "config.json", FileNotFoundError, "there is no such folder")
    for name in ("vocab.txt", "model.weights.h5"):
        content = (preset / name).read_bytes()
        (preset / name).unlink()
        one_error(preset, FileNotFoundError, f"should hold {name}, but does not")
        (preset / name).write_bytes(content)
    (preset / "config.json").unlink()
    one_error(preset, ValueError, "its config.json is missing or is not that of a bertgen_tf pre")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"format": "bertgen_tf preset"}', '{"format": "other", "model": {}}']
    + ['{"format": "bertgen_tf preset", "model": []}', '{"vocab_size": 3}'],
)
def test_a_config_that_is_none(content, preset):
    (preset / "config.json").write_text(content)
    one_error(preset, ValueError, "should be a preset that save_to_preset wrote")


def test_a_config_that_is_not_text(preset):
    (preset / "config.json").write_bytes(b"\xff\xfe{}")
    one_error(preset, ValueError, "should be a preset that save_to_preset wrote")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["encoder"], ..., "KeyError: 'encoder'"),
        (["encoder"], None, "TypeError"),
        (["decoder", "config"], {"hidden": 3}, "has no field hidden"),
        (["sharing"], "some", "sharing must be one of none, word_embeddings, all"),
        (["sharing"], "all", "needs an encoder and a decoder that agree"),
        (["tokenizer"], ..., "KeyError: 'tokenizer'"),
        (["tokenizer"], "BertTokenizer", "TypeError"),
        (["tokenizer", "class_name"], "os.system", "KeyError: 'os.system'"),
        (["tokenizer", "config"], None, "TypeError"),
        (["tokenizer", "config", "case"], True, "unexpected keyword argument 'case'"),
        (["tokenizer", "config", "bos_token"], "[BOS]", "bos_token='[BOS]'"),
        (["generation_config", "num_beams"], 0, "num_beams must be an integer of at least 1"),
        (["max_source_length"], "long", "max_source_length must be an integer"),
        (["surprise"], 1, "surprise"),
    ],
)
def test_settings_that_are_damaged(path, value, message, preset):
    edit(preset, "model", *path, value=value)
    one_error(preset, ValueError, "settings and the vocabulary of a model, but building", message)


def test_a_vocabulary_that_is_damaged(preset, spiece, tmp_path):
    (preset / "vocab.txt").write_bytes(b"[PAD]\n\xff\n")
    one_error(preset, ValueError, "vocab.txt", "must be a UTF-8 text file")
    model = make_deep_model(make_tokenizer=lambda: bg.BertGenerationTokenizer(spiece))
    model.save_to_preset(tmp_path / "other")
    (tmp_path / "other/spiece.model").write_bytes(spiece[: len(spiece) // 2])
    edit(tmp_path / "other", "checksums", value=...)
    one_error(tmp_path / "other", ValueError, "must be a SentencePiece model")


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    "damage", [cut, lambda path: path.write_bytes(b""), lambda path: path.write_text("hello")]
)
def test_weights_that_are_damaged(damage, preset):
    damage(preset / "model.weights.h5")
    one_error(preset, ValueError, "model.weights.h5 should hold the weights of the model in config")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["decoder", "config", "num_hidden_layers"], 4),
        # Keras alone would read these, and leave the rest of the file without a word.
        (["decoder", "config", "num_hidden_layers"], 1),
        (["decoder", "config", "intermediate_size"], 21),
        (["sharing"], "word_embeddings"),
    ],
)
def test_weights_of_another_model(path, value, preset):
    edit(preset, "model", *path, value=value)
    one_error(preset, ValueError, "model.weights.h5 should hold the weights of the model in config")


def test_weights_from_another_preset(preset, tmp_path):
    make_model("all").save_to_preset(tmp_path / "other")
    shutil.copy(tmp_path / "other/model.weights.h5", preset)
    one_error(preset, ValueError, "model.weights.h5 should hold the weights of the model in config")


@pytest.mark.parametrize("path", ["{outside}/vocab.txt", "../outside/vocab.txt", "sub/../../x.txt"])
def test_no_path_in_the_config_is_followed(path, preset, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    secret = re.sub("bird", "secret", (preset / "vocab.txt").read_text())
    (outside / "vocab.txt").write_text(secret)
    edit(preset, "model", "tokenizer", "config", "vocabulary", value=path.format(outside=outside))
    assert load(preset).tokenizer.tokenize("bird secret")[0] == "bird"
    (preset / "vocab.txt").unlink()
    one_error(preset, FileNotFoundError, "should hold vocab.txt")


def test_no_vocabulary_in_the_config_is_taken(preset):
    edit(preset, "model", "tokenizer", "config", "vocabulary", value=[*SPECIALS, "a"])
    assert load(preset).tokenizer.vocab_size == len((preset / "vocab.txt").read_text().split())


@pytest.mark.parametrize("name", ["config.json", "model.weights.h5", "vocab.txt"])
def test_a_file_that_was_changed(name, saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "preset"))
    path = folder / name
    if name == "config.json":
        edit(folder, "model", "generation_config", "num_beams", value=2)
    else:
        path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(Damaged) as error:
        load(folder)
    assert str(error.value) == (
        f"{path} should be as it was written, but its checksum differs: copy it again or, if the "
        'change is meant, remove "checksums" from config.json.'
    )
    if name == "model.weights.h5":
        presets.load_preprocessor(folder)
    else:
        with pytest.raises(Damaged, match=f"{name} should be as it was written"):
            presets.load_preprocessor(folder)
    assert presets.is_preset(folder)  # it can be replaced
    edit(folder, "checksums", value=...)
    if name == "config.json":
        assert load(folder).generation_config.num_beams == 2
        load(folder).save_to_preset(folder)
        assert "checksums" in json.loads(path.read_text())


def test_another_layout_of_the_config_and_checksums_that_are_none(saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "preset"))
    content = json.loads((folder / "config.json").read_text())
    assert sorted(content["checksums"]) == ["config.json", "model.weights.h5", "vocab.txt"]
    content["model"] = dict(reversed(content["model"].items()))
    (folder / "config.json").write_text(json.dumps(content))
    load(folder)
    for checksums in ([], 3, {}, {"config.json": 3}, {**content["checksums"], "vocab.txt": None}):
        edit(folder, "checksums", value=checksums)
        with pytest.raises(Damaged, match="its checksum differs"):
            load(folder)


@pytest.mark.parametrize("field", ["vocab_size", "num_hidden_layers", "intermediate_size"])
def test_sizes_beyond_the_weights_are_told_before_anything_is_built(field, preset, monkeypatch):
    monkeypatch.setattr(bg.EncoderDecoderModel, "from_config", None)
    edit(preset, "model", "encoder", "config", field, value=10**9)
    one_error(preset, ValueError, "model.weights.h5", "of the model in config.json, which has more")


def test_a_config_nested_too_deeply_and_a_pipe(preset):
    path = preset / "config.json"
    for depth in (900, 200_000):
        inner = "[" * depth + "]" * depth
        path.write_text(f'{{"format": "bertgen_tf preset", "model": {{"tokenizer": {inner}}}}}')
        one_error(preset, ValueError)
    path.unlink()
    os.mkfifo(path)
    one_error(preset, ValueError, "its config.json is missing or is not that of a bertgen_tf pre")


EMBEDDINGS = "encoder/embeddings/word_embeddings/vars/0"
KERNEL = "decoder/blocks/transformer_block/cross_attention/key/vars/0"


@pytest.mark.parametrize("name", [EMBEDDINGS, KERNEL, "decoder/vars/0", "encoder/embeddings/la"])
@pytest.mark.parametrize(
    "value", [np.float32(np.nan), np.float32(np.inf), np.float64(1e39)], ids=str
)
def test_weights_that_are_not_finite(name, value, preset):
    import h5py

    if name.endswith("la"):
        name = "encoder/embeddings/layer_norm/vars/0"
    with h5py.File(preset / "model.weights.h5", "r+") as file:
        tensor = file[name][...].astype(value.dtype)
        tensor.flat[-1] = value
        del file[name]
        file[name] = tensor
    one_error(preset, ValueError, "should have finite weights, but ", "has NaN or infinity.")


@pytest.mark.parametrize("kind", ["itself", "soft", "external", "twice"])
def test_weights_with_links(kind, preset):
    import h5py

    with h5py.File(preset / "model.weights.h5", "r+") as file:
        file["encoder/more"] = {
            "itself": file["encoder"],
            "soft": h5py.SoftLink("/encoder"),
            "external": h5py.ExternalLink("/etc/passwd", "/"),
            "twice": file[EMBEDDINGS],
        }[kind]
    one_error(preset, ValueError, "should be a group or a tensor with a single name")


def test_a_keras_file_whose_weights_are_not_finite(tmp_path):
    model = make_small_model()
    for layer in (model.decoder, model.encoder.embeddings.word_embeddings):
        variable = layer.weights[-1]
        whole = np.array(variable)
        variable.assign(np.full_like(whole, np.nan))
        model.save(tmp_path / "a.keras")
        variable.assign(whole)
        with pytest.raises(ValueError, match="should have finite weights, but .* has NaN or inf"):
            keras.saving.load_model(tmp_path / "a.keras")


@pytest.mark.parametrize("two", [False, True])
def test_what_a_preset_makes_of_text_without_its_model(two, tmp_path):
    options = {"max_source_length": 11, "hidden_token_ids": [7]}
    if two:
        options["decoder_tokenizer"] = bg.BertTokenizer(list(PIECES), lowercase=False)
    model = make_model(**options)
    model.save_to_preset(tmp_path / "preset")
    found = presets.load_preprocessor(tmp_path / "preset")
    assert found.get_config() == model.preprocessor.get_config()
    texts = [*CORPUS, "  A   Bird!"]
    assert found.normalize(texts) == model.preprocessor.normalize(texts)
    ids = found.encode_source(texts).to_list()
    assert ids == model.preprocessor.encode_source(texts).to_list()
    files = presets.preprocessor_files(tmp_path / "preset")
    names = ["config.json", "vocab.txt", *["decoder-vocab.txt"] * two]
    assert [path.name for path in files] == names

    # An export has the same files, beside its graph.
    (tmp_path / "preset" / "model.weights.h5").unlink()
    (tmp_path / "preset").rename(tmp_path / "assets.extra")
    (tmp_path / "saved_model.pb").touch()
    assert presets.load_preprocessor(tmp_path).normalize(texts) == found.normalize(texts)
    (tmp_path / "assets.extra" / names[-1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"should hold {names[-1]}, but does not"):
        presets.load_preprocessor(tmp_path)
    (tmp_path / "assets.extra" / "config.json").unlink()
    with pytest.raises(
        ValueError, match="is an export without assets.extra/config.json, which has"
    ):
        presets.preprocessor_files(tmp_path)


def test_no_tokenizer_or_a_damaged_one(preset):
    path = preset / "config.json"
    content = json.loads(path.read_text())
    for tokenizer, message in (
        (None, "has no tokenizer: name a preset that reads and writes text"),
        ({"class_name": "x"}, "should hold the settings of tokenizers, but reading them failed"),
        (
            {"class_name": "BertTokenizer", "config": {"a": 1}},
            "settings and the vocabulary of a mo",
        ),
    ):
        content["model"]["tokenizer"] = tokenizer
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            presets.load_preprocessor(preset)
