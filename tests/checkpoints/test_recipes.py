"""The recipes of the paper by name: what each side starts from, and how many parameters that is."""

import keras
import numpy as np
import pytest

import bertgen_tf as bg
from bertgen_tf.network.weights import named_variables
from bertgen_tf.training import freezing
from tests.helpers import write_checkpoint

BERT_ROWS = ("RND2RND", "BERT2RND", "RND2BERT", "BERT2BERT", "BERTSHARE")
WORDS = "embeddings/word_embeddings/embeddings"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("bert") / "checkpoint"))


def start(name, checkpoint, **kwargs):
    keras.utils.set_random_seed(7)
    side = "decoder" if name.startswith("RND2") and name != "RND2RND" else "encoder"
    return bg.warm_start(name, **{side: checkpoint}, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("name", BERT_ROWS)
def test_each_side_starts_from_what_the_name_says(checkpoint, name):
    model = start(name, checkpoint)
    stored = named_variables(bg.BertGenerationEncoder.from_huggingface(checkpoint))
    words = stored.pop(WORDS)
    shared = name == "BERTSHARE"
    for side, kind in zip(
        (model.encoder, model.decoder),
        ("BERT", "BERT") if shared else name.split("2"),
        strict=True,
    ):
        variables = named_variables(side)
        for path, value in stored.items():
            if path.endswith(("kernel", "position_embeddings/embeddings")):
                assert np.array_equal(variables[path].numpy(), value.numpy()) == (kind == "BERT")
        assert np.array_equal(variables[WORDS].numpy(), words.numpy()) == ("BERT" in name)
        assert variables[WORDS] is model.encoder.embeddings.word_embeddings.embeddings
    assert (model.encoder.blocks[0].feed_forward is model.decoder.blocks[0].feed_forward) == shared
    assert model.preprocessor.mask_first and model.preprocessor.add_bos
    said = model.generate("the old man saw a bird", max_new_tokens=3, jit_compile=False)
    assert isinstance(said, str)


def test_report_counts_what_the_checkpoint_gave(checkpoint, tmp_path):
    hidden, inner, layers, positions, pieces = 12, 20, 3, 26, len(_pieces(checkpoint))
    attention = 4 * (hidden * hidden + hidden) + 2 * hidden
    block = attention + 2 * hidden * inner + inner + hidden + 2 * hidden
    stack = layers * block + positions * hidden + 2 * hidden
    words, new = pieces * hidden, layers * attention + pieces
    expected = {
        "RND2RND": (words + 2 * stack + new, words + 2 * positions * hidden, 0),
        "BERT2RND": (words + 2 * stack + new, words + 2 * positions * hidden, words + stack),
        "RND2BERT": (words + 2 * stack + new, words + 2 * positions * hidden, words + stack),
        "BERT2BERT": (words + 2 * stack + new, words + 2 * positions * hidden, words + 2 * stack),
        "BERTSHARE": (words + stack + new, words + positions * hidden, words + stack),
    }
    for name in BERT_ROWS:
        model = start(name, checkpoint)
        report = bg.warm_start_report(model)
        total, embedding, initialised = expected[name]
        assert report == bg.WarmStartReport(total, embedding, initialised, total - initialised)
        assert report.total == model.count_params()
        assert f"{total:,}" in str(report)
    model.save_to_preset(tmp_path / "preset")
    again = bg.EncoderDecoderModel.from_preset(tmp_path / "preset")
    assert bg.warm_start_report(again) == report


def _pieces(checkpoint):
    with open(f"{checkpoint}/vocab.txt", encoding="utf-8") as file:
        return file.read().split()


def test_another_start_for_the_same_graph(checkpoint):
    model, other = start("RND2RND", checkpoint), start("BERT2BERT", checkpoint)
    assert len(freezing.new_variables(model)) == len(model.weights)
    model.set_weights(other.get_weights())
    ids = {"input_ids": np.array([[3, 9, 4]]), "decoder_input_ids": np.array([[3, 5]])}
    np.testing.assert_array_equal(model(ids), other(ids))
    before = bg.warm_start_report(other)
    other.enable_lora(2)
    after = bg.warm_start_report(other)
    assert after.initialised == before.initialised and after.random > before.random


def test_random_sides_differ_by_seed_only(checkpoint):
    def kernel(seed):
        keras.utils.set_random_seed(seed)
        model = bg.warm_start("BERT2RND", encoder=checkpoint)
        return model.decoder.blocks[1].feed_forward.intermediate.kernel.numpy()

    np.testing.assert_array_equal(kernel(3), kernel(3))
    assert not np.array_equal(kernel(3), kernel(4))


def test_tf_hub_modules(hub_module, checkpoint):
    model = start("BERT2RND", hub_module, num_layers=[0, 2], verify=False)
    assert len(model.encoder.blocks) == len(model.decoder.blocks) == 2
    mixed = bg.warm_start("BERT2BERT", hub_module, checkpoint, verify=False)
    assert mixed.source_checkpoint == {"encoder": hub_module, "decoder": checkpoint}


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("BERT2BART", {}, ["BERT2BART", "BERT2BERT, BERTSHARE"]),
        ("BERT2RND", {}, ["BERT2RND needs encoder="]),
        ("RND2BERT", {"encoder": "x"}, ["RND2BERT needs decoder="]),
        ("BERT2RND", {"encoder": "x", "decoder": "y"}, ["random decoder", "no decoder=", "'y'"]),
        ("BERTSHARE", {"encoder": "x", "decoder": "y"}, ["shares", "no decoder=", "'y'"]),
        ("BERT2BERT", {"encoder": "x", "cross_attention": "new"}, ["cross_attention", "'new'"]),
        ("BERT2RND", {"encoder": "x", "cross_attention": "self_attention"}, ["is random"]),
        ("ROBERTASHARE", {"encoder": "nowhere.tar.gz"}, ["Hugging Face", "nowhere.tar.gz"]),
    ],
)
def test_wrong_combinations_are_refused_before_anything_is_read(name, arguments, words):
    with pytest.raises(ValueError) as error:
        bg.warm_start(name, **arguments)
    for word in words:
        assert word in str(error.value)


def test_checkpoints_of_another_kind_are_refused(checkpoint):
    with pytest.raises(ValueError, match="ROBERTASHARE needs encoder= .*roberta.* type bert"):
        bg.warm_start("ROBERTASHARE", encoder=checkpoint)
