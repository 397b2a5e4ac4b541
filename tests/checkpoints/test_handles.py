from pathlib import Path

import pytest

import bertgen_tf as bg
from bertgen_tf.checkpoints import presets
from bertgen_tf.checkpoints.handles import EXPORT, HUB, HUGGINGFACE, PRESET, family_of, kind_of
from tests.helpers import make_small_model, write_bare_export, write_checkpoint


def test_names_on_the_huggingface_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "there").mkdir(parents=True)
    assert family_of("here/elsewhere") == HUB
    assert family_of("elsewhere/module.tar.gz") == HUB
    assert family_of("google/bert_for_seq_generation_L-24_bbc_encoder") == HUGGINGFACE
    assert family_of("here/there") == HUB
    assert family_of("./elsewhere") == HUB
    assert family_of("https://example.com/x") == HUB
    assert family_of("a/b/c") == HUB
    assert family_of("name") == HUB
    assert family_of("bert-base-uncased") == family_of("gpt2") == HUGGINGFACE
    (tmp_path / "gpt2").mkdir()
    assert family_of("gpt2") == HUB  # a folder


def test_kinds_of_folders(tmp_path, hub_module):
    model = make_small_model()
    model.save_to_preset(tmp_path / "preset")
    write_bare_export(model, tmp_path / "export/1")
    model.save_to_huggingface(tmp_path / "pair")
    model.encoder.save_to_huggingface(tmp_path / "encoder")
    model.decoder.save_to_huggingface(tmp_path / "decoder")
    families = {
        "preset": PRESET,
        "export/1": EXPORT,
        "export": EXPORT,  # of which a version has to be chosen
        "pair": HUGGINGFACE,
        "encoder": HUGGINGFACE,
        "decoder": HUGGINGFACE,
    }
    assert {name: family_of(tmp_path / name) for name in families} == families
    assert family_of(hub_module) == HUB
    kinds = {
        tmp_path / "preset": "preset",
        tmp_path / "export/1": "export",
        tmp_path / "pair": "HuggingFace encoder-decoder",
        tmp_path / "encoder": "HuggingFace encoder",
        tmp_path / "decoder": "HuggingFace decoder",
        Path(hub_module): "TF Hub encoder",
    }
    assert {path: kind_of(path) for path in kinds} == kinds


@pytest.fixture(scope="module")
def folders(tmp_path_factory, hub_module):
    """One of each kind."""
    base = tmp_path_factory.mktemp("handles")
    model = make_small_model()
    model.save_to_preset(base / "preset")
    model.save_to_huggingface(base / "pair")
    write_checkpoint(base / "bert")
    write_bare_export(model, base / "export/3")
    model.save(base / "model.keras")
    return {path.name: str(path) for path in base.iterdir()} | {"module": hub_module}


PRESET_IS_READ = r"is a preset: EncoderDecoderModel.from_preset reads it"
MODULE_IS_READ = "is a TF Hub module: from_hub reads it"
CHECKPOINT_IS_READ = "is a Hugging Face checkpoint: from_huggingface reads it"
NAME_IS_READ = "As a name on the Hugging Face hub, from_huggingface reads it: "
EXPORT_IS_READ = "is an export: EncoderDecoderModel.from_export reads it"
KERAS_READS = "is a file of Keras: keras.models.load_model reads it"
BERT_PAGE = "https://huggingface.co/google-bert/bert-base-uncased"


@pytest.mark.parametrize(
    ("call", "handle", "message"),
    [
        ("from_hub", "preset", PRESET_IS_READ),
        ("from_hub", "pair", CHECKPOINT_IS_READ),
        ("from_hub", "bert", CHECKPOINT_IS_READ),
        ("from_hub", "export", EXPORT_IS_READ),
        ("from_hub", "export/3", EXPORT_IS_READ),
        ("from_hub", "model.keras", KERAS_READS),
        ("from_hub", "bert-base-uncased", f"{NAME_IS_READ}'bert-base-uncased'"),
        ("from_hub", "google-bert/bert-base-uncased", f"{NAME_IS_READ}'google-bert/bert-base-un"),
        ("from_hub", BERT_PAGE, f"{NAME_IS_READ}'google-bert/bert-base-uncased'"),
        ("from_hub", "module", r"from_hub\(encoder=...\)|encoder="),
        ("from_huggingface", "module", MODULE_IS_READ),
        ("from_huggingface", "https://tfhub.dev/google/bert/1", MODULE_IS_READ),
        ("from_huggingface", "preset", PRESET_IS_READ),
        ("from_huggingface", "export/3", EXPORT_IS_READ),
        ("from_huggingface", "bert", "Pass it as encoder="),
        ("from_huggingface", BERT_PAGE, f"{NAME_IS_READ}'google-bert/bert-base-uncased'"),
        ("from_preset", "module", MODULE_IS_READ),
        ("from_preset", "pair", CHECKPOINT_IS_READ),
        ("from_preset", "bert", CHECKPOINT_IS_READ),
        ("from_preset", "export", EXPORT_IS_READ),
        ("from_preset", "model.keras", KERAS_READS),
        ("from_preset", "roberta-base", f"{NAME_IS_READ}'roberta-base'"),
        ("from_export", "preset", PRESET_IS_READ),
        ("from_export", "pair", CHECKPOINT_IS_READ),
        ("from_export", "module", MODULE_IS_READ),
    ],
)
def test_what_another_call_reads(folders, call, handle, message):
    name, _, version = handle.partition("/")
    handle = "/".join([folders[name], version]) if name in folders else handle
    with pytest.raises((FileNotFoundError, ValueError), match=message) as error:
        getattr(bg.EncoderDecoderModel, call)(handle.rstrip("/"))
    # A module's error also says what is in it.
    assert len(str(error.value)) < 300 or (call, name) == ("from_hub", "module")


def test_what_another_call_reads_as_a_side(folders):
    """The same for the keywords, for a single stack, for recipes and on the command line."""
    model, encoder = bg.EncoderDecoderModel, bg.BertGenerationEncoder
    for call, message in (
        (lambda: model.from_hub(encoder=folders["bert"]), CHECKPOINT_IS_READ),
        (lambda: model.from_huggingface(encoder=folders["module"]), MODULE_IS_READ),
        (lambda: model.from_huggingface(encoder=folders["pair"]), "EncoderDecoderModel.from_hugg"),
        (lambda: encoder.from_hub(folders["preset"]), PRESET_IS_READ),
        (lambda: bg.BertGenerationDecoder.from_huggingface(folders["preset"]), PRESET_IS_READ),
        (lambda: bg.warm_start("BERT2BERT", encoder=folders["preset"]), PRESET_IS_READ),
        (lambda: presets.read_config(folders["bert"]), CHECKPOINT_IS_READ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
