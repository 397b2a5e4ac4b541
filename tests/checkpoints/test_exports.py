"""Exports read back as models: the same settings, weights and answers, or one error."""

import json
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import bertgen_tf as bg
from bertgen_tf.checkpoints import exports
from bertgen_tf.checks import Damaged
from tests.helpers import (
    CORPUS,
    EXPORT_OPTIONS,
    PIECES,
    make_model,
    make_small_model,
    write_bare_export,
)

INPUTS = {
    "input_ids": np.array([[9, 40, 3, 7], [6, 8, 0, 0]], np.int32),
    "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0]], np.int32),
    "decoder_input_ids": np.array([[3, 41, 9], [3, 30, 0]], np.int32),
}
load = bg.EncoderDecoderModel.from_export


def weights(model) -> dict[str, np.ndarray]:
    return {weight.path: np.array(weight) for weight in model.weights}


def check_same(model, read) -> None:
    assert read.get_config() == model.get_config()
    ours, theirs = weights(model), weights(read)
    assert list(ours) == list(theirs)
    for name, array in ours.items():
        assert theirs[name].dtype == array.dtype
        np.testing.assert_array_equal(theirs[name], array)
    np.testing.assert_array_equal(read(INPUTS), model(INPUTS))


@pytest.mark.slow
def test_the_answers_are_those_of_the_export(shared_export):
    model, path = shared_export
    read = load(path)
    assert read.generation_config == model.generation_config.replace(**EXPORT_OPTIONS)
    ids = {k: v.numpy() for k, v in read.preprocessor.generate_preprocess(CORPUS).items()}
    signatures = tf.saved_model.load(str(path)).signatures
    theirs = signatures["ids"](**{name: tf.constant(array) for name, array in ids.items()})
    ours = read.generate(ids, num_return_sequences=3, output_scores=True, jit_compile=False)
    np.testing.assert_array_equal(ours.sequences, theirs["sequences"])
    np.testing.assert_allclose(ours.scores, theirs["score"], atol=1e-5)


def of_one_stack() -> bg.EncoderDecoderModel:
    config = bg.BertGenerationConfig(
        vocab_size=len(PIECES), hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=20, max_position_embeddings=26, norm_first=True, source_positions=17,
        bos_token_id=3, eos_token_id=4,
    )  # fmt: skip
    encoder = bg.BertGenerationEncoder(config)
    decoder = bg.BertGenerationDecoder(config, encoder, "all")
    return bg.EncoderDecoderModel(encoder, decoder, bg.BertTokenizer(list(PIECES)))


def with_names_of_its_own() -> bg.EncoderDecoderModel:
    model = make_small_model()
    policy = keras.DTypePolicy("mixed_bfloat16")
    stacks = [
        kind(stack.config, name=name, dtype=policy)
        for kind, stack, name in [
            (bg.BertGenerationEncoder, model.encoder, "reader"),
            (bg.BertGenerationDecoder, model.decoder, "writer"),
        ]
    ]
    return bg.EncoderDecoderModel(*stacks, model.tokenizer, dtype=policy)


def frozen_and_int8() -> bg.EncoderDecoderModel:
    model = make_model("all", hidden_token_ids=[7, 9], prose=False, add_bos=True, mask_first=True)
    model.encoder.blocks[0].trainable = False
    model.quantize("int8")
    return model


@pytest.mark.parametrize("kind", ["two", "one stack", "names", "int8", "hub"])
def test_every_kind_of_model(kind, tmp_path, spiece, hub_module):
    if kind == "two":  # tokenizers, of which one is SentencePiece
        pieces = bg.BertGenerationTokenizer(spiece, split_special_tokens=True)
        model = make_model("word_embeddings", max_source_length=9)
        config = model.decoder.config.replace(
            vocab_size=pieces.vocab_size,
            **{
                f"{name}_token_id": getattr(pieces, f"{name}_token_id")
                for name in ("pad", "bos", "eos")
            },
        )
        model = bg.EncoderDecoderModel(
            model.encoder,
            bg.BertGenerationDecoder(config),
            model.tokenizer,
            decoder_tokenizer=pieces,
            source_checkpoint={"encoder": "a", "decoder": "b"},
            generation_config=bg.GenerationConfig(max_new_tokens=7, suppress_tokens=[5]),
        )
    elif kind == "hub":
        model = bg.EncoderDecoderModel.from_hub(encoder=hub_module, share=True, num_layers=[0, 2])
    else:
        make = {"one stack": of_one_stack, "names": with_names_of_its_own, "int8": frozen_and_int8}
        model = make[kind]()
    check_same(model, load(write_bare_export(model, tmp_path / "name/1")))


def test_a_subclass_reads_itself(light, tmp_path):
    class Mine(bg.EncoderDecoderModel):
        pass

    assert type(Mine.from_export(light)) is Mine


def test_functions_of_its_own_are_told(model, tmp_path):
    path = write_bare_export(model, tmp_path / "name/1", logits_processor=["only_verbs"])
    with pytest.warns(UserWarning, match=r"has \(only_verbs\): pass them to generate"):
        load(path)


@pytest.fixture(scope="module")
def light(model, tmp_path_factory) -> Path:
    """Read-only."""
    return write_bare_export(model, tmp_path_factory.mktemp("exports") / "name/1")


@pytest.fixture
def export(light, tmp_path) -> Path:
    """Without checksums, as an older version wrote it: what they would refuse is read."""
    folder = Path(shutil.copytree(light, tmp_path / "other/2"))
    change_json(folder / "metadata.json", lambda metadata: metadata.pop("files"))
    change_json(folder / "assets.extra/config.json", lambda config: config.pop("checksums"))
    return folder


def change_json(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refused(path, kind=ValueError) -> str:
    with pytest.raises(kind) as error:
        load(path)
    message = str(error.value).replace(str(path), "")
    assert "\n" not in message and len(message) < 300
    return str(error.value)


def test_what_is_no_export(export, tmp_path, light):
    assert "there is no such folder" in refused(tmp_path / "nowhere", FileNotFoundError)
    assert "should be an export, NAME/VERSION" in refused(tmp_path)
    shutil.copytree(export, export.with_name("10"))
    message = refused(export.parent)
    assert "but holds 10, 2. Use" in message and message.endswith("/other/10.")
    for content in ("{", "[]", '{"versions": 3}', "[" * 100_000):
        (export / "metadata.json").write_text(content)
        assert not exports.is_export(export)
    (export / "metadata.json").write_text(" " * (16 * 2**20 + 1))
    assert not exports.is_export(export)


def test_other_readers_name_the_one_for_exports(light):
    model = bg.EncoderDecoderModel
    for read in (model.from_hub, lambda folder: model.from_hub(encoder=folder), model.from_preset):
        with pytest.raises(ValueError, match="from_export"):
            read(light)


def test_an_older_export(export):
    shutil.rmtree(export / "assets.extra")
    message = refused(export)
    assert "is of an older version, which wrote none. Export its preset again" in message


def test_damaged_settings(export):
    (export / "assets.extra/vocab.txt").unlink()
    assert "should hold vocab.txt" in refused(export, FileNotFoundError)
    (export / "assets.extra/config.json").write_text("{}")
    assert "is not that of a bertgen_tf preset" in refused(export)


def change_settings(path, change) -> None:
    change_json(path / "assets.extra/config.json", lambda content: change(content["model"]))


def test_weights_of_another_model(export):
    """Too many, too few, other shapes: all in one error, before anything is assigned."""
    change_settings(export, lambda model: model["encoder"]["config"].update(num_hidden_layers=1))
    message = refused(export)
    assert "they have besides encoder/layer_1/" in message and "11 more." in message
    change_settings(export, lambda model: model["encoder"]["config"].update(num_hidden_layers=3))
    assert "they lack encoder/layer_2/" in refused(export)
    change_settings(
        export,
        lambda model: model["encoder"]["config"].update(num_hidden_layers=2, intermediate_size=21),
    )
    assert "have in another shape encoder/layer_0/feed_forward/intermediate/bias" in refused(export)
    change_settings(
        export,
        lambda model: model["encoder"]["config"].update(intermediate_size=20, quantization="int8"),
    )
    assert "they lack encoder/layer_0/feed_forward/intermediate/kernel_scale" in refused(export)


def test_damaged_weights(export):
    data = export / "variables/variables.data-00000-of-00001"
    content = data.read_bytes()
    for damaged in (content[: len(content) // 2], bytes(len(content))):
        data.write_bytes(damaged)
        assert "variables should hold the weights of the export, but reading" in refused(export)
    (export / "variables/variables.index").write_bytes(b"no index")
    assert "variables should hold the weights of the export, but reading" in refused(export)
    shutil.rmtree(export / "variables")
    assert "which has more than 4,392, but has 0 bytes" in refused(export)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("variables/variables.data-00000-of-00001", True),
        ("assets.extra/vocab.txt", True),
        ("saved_model.pb", False),
    ],
)
def test_files_that_were_changed(light, tmp_path, name, read):
    folder = Path(shutil.copytree(light, tmp_path / "other/2"))
    exports.verify(folder, ["*"])
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(Damaged, match=f"{name} should be as it was exported, but its checksum"):
        exports.verify(folder, ["*"])
    if read:
        assert "its checksum differs: copy the export again." in refused(folder, Damaged)
    else:
        load(folder)
    path.unlink()
    with pytest.raises(Damaged, match="but there is no such file: copy the export again"):
        exports.verify(folder, ["*"])
    exports.verify(folder, ["*.index"])


def test_metadata_that_is_damaged_or_names_other_files(light, tmp_path):
    folder = Path(shutil.copytree(light, tmp_path / "other/2"))
    path = folder / "metadata.json"
    for files in (3, {"a": 3}, {"a": {}}):
        change_json(path, lambda metadata, files=files: metadata.update(files=files))
        with pytest.raises(Damaged, match=r"should have the checksums .* but is damaged \("):
            exports.verify(folder)
    for name in ("../secret", str(tmp_path / "secret")):
        (tmp_path / "other/secret").touch()
        files = {name: {"sha256": "0"}}
        change_json(path, lambda metadata, files=files: metadata.update(files=files))
        with pytest.raises(Damaged, match="should name files of its own"):
            exports.verify(folder, ["*"])
    path.write_bytes(b"\xff")
    with pytest.raises(Damaged, match="should have the checksums"):
        exports.verify(folder)
    path.unlink()
    exports.verify(folder)  # of another program, perhaps
