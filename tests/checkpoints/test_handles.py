from pathlib import Path

from bertgen_tf.checkpoints.handles import HUB, HUGGINGFACE, PRESET, family_of, kind_of
from tests.helpers import make_small_model


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


def test_kinds_of_folders(tmp_path, hub_module):
    model = make_small_model()
    model.save_to_preset(tmp_path / "preset")
    model.save_to_huggingface(tmp_path / "pair")
    model.encoder.save_to_huggingface(tmp_path / "encoder")
    model.decoder.save_to_huggingface(tmp_path / "decoder")
    families = {
        "preset": PRESET,
        "pair": HUGGINGFACE,
        "encoder": HUGGINGFACE,
        "decoder": HUGGINGFACE,
    }
    assert {name: family_of(tmp_path / name) for name in families} == families
    assert family_of(hub_module) == HUB
    kinds = {
        tmp_path / "preset": "preset",
        tmp_path / "pair": "HuggingFace encoder-decoder",
        tmp_path / "encoder": "HuggingFace encoder",
        tmp_path / "decoder": "HuggingFace decoder",
        Path(hub_module): "TF Hub encoder",
    }
    assert {path: kind_of(path) for path in kinds} == kinds
