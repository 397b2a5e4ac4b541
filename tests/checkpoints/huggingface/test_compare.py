"""What is the same in transformers and here, and what is not."""

import compare_with_huggingface as tool
import numpy as np
import pytest

import bertgen_tf as bg
from bertgen_tf.checkpoints.huggingface.comparison import (
    Check,
    _compare,
    _random_ids,
    compare_with_huggingface,
)
from tests.helpers import make_model, write_checkpoint

NEEDS = 'needs transformers and torch: pip install -e ".[compare]"'


def test_differences_are_relative_to_large_values_and_padding_does_not_count():
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    ours = np.full((2, 3, 4), 2.0)
    theirs = ours.copy()
    theirs[0, 2] = 99.0  # padding
    assert _compare("x", ours, theirs, mask, 1e-5).passed
    theirs[1, 0, 3] += 1.5e-5
    check = _compare("x", ours, theirs, mask, 1e-5)
    assert check.passed and check.result.startswith("max abs difference 1.5")
    theirs[1, 0, 3] += 1e-5
    assert not _compare("x", ours, theirs, mask, 1e-5).passed
    assert not _compare("x", ours / 100, theirs / 100 - 2e-5, mask, 1e-5).passed
    theirs[1, 0, 3] = np.nan
    assert not _compare("x", ours, theirs, mask, 1e-5).passed
    assert not _compare("x", ours[..., :3], theirs, mask, 1e-5).passed


def test_random_ids_have_padding_at_the_end_only():
    config = bg.BertGenerationConfig(vocab_size=11, max_position_embeddings=9, pad_token_id=3)
    ids, mask = _random_ids(np.random.default_rng(0), config, 17)
    assert ids.shape == (3, 9) and mask.sum(1).tolist() == [9, 6, 3]
    np.testing.assert_array_equal(ids == 3, mask == 0)


def test_without_transformers_the_error_tells_what_to_install(model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "bertgen_tf\[compare\]"'):
        compare_with_huggingface(model, "anywhere")


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["none", "all"])
def test_what_we_write_is_the_same_in_transformers(sharing, tmp_path):
    pytest.importorskip("transformers", reason=NEEDS)
    pytest.importorskip("torch", reason=NEEDS)
    model = make_model(sharing, seed=6)
    model.save_to_huggingface(tmp_path / "pair")
    model.encoder.save_to_huggingface(tmp_path / "encoder")
    model.decoder.save_to_huggingface(tmp_path / "decoder")
    checks = compare_with_huggingface(model, str(tmp_path / "pair"))
    assert [check.name for check in checks] == [
        "encoder hidden states",
        "decoder logits",
        "greedy search",
        "4 beams",
        "4 beams with penalties",
    ]
    checks += compare_with_huggingface(model.encoder, str(tmp_path / "encoder"))
    checks += compare_with_huggingface(model.decoder, str(tmp_path / "decoder"))
    assert all(check.passed for check in checks), checks

    bias = model.decoder.output_bias
    bias.assign(bias + np.linspace(-9, 9, bias.shape[0]))
    checks = compare_with_huggingface(model, str(tmp_path / "pair"))
    assert [check.passed for check in checks] == [True] + [False] * 4, checks
    assert not compare_with_huggingface(model.decoder, str(tmp_path / "decoder"))[0].passed


def test_bert_as_encoder_is_the_same_in_transformers(tmp_path):
    pytest.importorskip("transformers", reason=NEEDS)
    pytest.importorskip("torch", reason=NEEDS)
    folder = str(write_checkpoint(tmp_path / "bert"))
    encoder = bg.BertGenerationEncoder.from_huggingface(folder)
    assert all(check.passed for check in compare_with_huggingface(encoder, folder))


def test_the_tool_tells_by_its_exit_status(tmp_path, monkeypatch, capsys):
    model = make_model()
    models = {"pair": model, "encoder": model.encoder, "decoder": model.decoder}
    passed = [True]

    def stub(given, folder, tolerance, seed):
        assert type(given) is type(models[folder.rsplit("/", 1)[1]])
        assert (tolerance, seed) == (0.25, 3)
        return [Check("logits", "max abs difference 0.5", ok) for ok in passed]

    monkeypatch.setattr(tool.comparison, "compare_with_huggingface", stub)
    monkeypatch.setattr(tool.metadata, "version", lambda name: f"version of {name}")
    for name, kind in (("pair", "encoder-decoder"), ("encoder", "encoder"), ("decoder", "decoder")):
        folder = str(tmp_path / name)
        models[name].save_to_huggingface(folder)
        assert tool.main([folder, "--tolerance", "0.25", "--seed", "3"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"{folder}: {kind}, transformers version of transformers, torch ")
        assert "  ok   logits: max abs difference 0.5\n" in out
    passed.append(False)
    assert tool.main([folder, "--tolerance", "0.25", "--seed", "3"]) == 1
    assert "  FAIL logits" in capsys.readouterr().out
    assert tool.main([str(tmp_path / "no" / "such" / "folder")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
