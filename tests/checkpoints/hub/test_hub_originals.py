"""The stand-ins of google/bertseq2seq/*, beside the modules themselves and their golden files."""

import dataclasses
import functools
import re

import compare_with_hub_module as compare
import keras
import make_tf1_module as maker
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_hub

import bertgen_tf as bg
from bertgen_tf.checkpoints.hub import loading as hub
from bertgen_tf.checkpoints.hub import originals as hub_originals
from tests.helpers import CORPUS, PIECES, SHARED

pytestmark = pytest.mark.slow

KINDS = ("shared", "unshared")
WIKISPLIT = SHARED / "data/wikisplit/validation.tsv"
SETTINGS = {"num_layers": 1, "decode_length": 6}


def shared(path):
    if not path.exists():
        pytest.skip(f"needs {path.name} in ../shared beside the repository")
    return path


class Pair:
    """A module, our model of it, and golden inputs and outputs."""

    def __init__(self, kind: str):
        self.folder = str(shared(SHARED / f"hub/tf1hub_bertseq2seq_{kind}_tiny"))
        self.golden = dict(np.load(f"{self.folder}.golden.npz"))
        self.model = bg.EncoderDecoderModel.from_hub(self.folder)
        self.loaded = tensorflow_hub.load(self.folder)

    def answer(self, texts: list[str]) -> list[str]:
        result = self.loaded.signatures["default"](default=tf.constant(texts))["default"]
        return [text.decode() for text in result.numpy()]

    def strings(self, name: str) -> list[str]:
        return [s.decode() if isinstance(s, bytes) else s for s in self.golden[name].tolist()]


@pytest.fixture(scope="module", params=KINDS)
def pair(request) -> Pair:
    return Pair(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, spiece) -> str:
    folder = tmp_path_factory.mktemp("original") / "module"
    maker.make_shared_original(folder, spiece, **SETTINGS)
    return str(folder)


@pytest.fixture(scope="module")
def small(folder) -> bg.EncoderDecoderModel:
    """Read-only."""
    return bg.EncoderDecoderModel.from_hub(folder)


# The stand-ins


def test_settings_and_sizes(pair):
    model = pair.model
    assert model.decoder.sharing == ("all" if "_shared" in pair.folder else "word_embeddings")
    assert model.generation_config == bg.GenerationConfig(
        max_new_tokens=32,
        num_beams=4,
        beam_scorer="gnmt",
        gnmt_alpha=0.6,
        normalize_unfinished=True,
    )
    assert model.preprocessor.get_config() == {
        "max_source_length": 128,
        "max_target_length": 33,
        "add_eos": False,
        "add_bos": False,
        "mask_first": False,
        "hidden_token_ids": [3],
        "prose": True,
    }
    config = model.decoder.config
    assert (config.vocab_size, config.hidden_size, config.num_attention_heads) == (1000, 64, 2)
    assert (config.hidden_act, config.layer_norm_eps) == ("gelu", 1e-12)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 2, 1)
    assert not model.decoder.output_bias.numpy().any()


def test_encoder_output_and_logits_are_the_golden_ones(pair):
    golden = pair.golden
    ids, mask = golden["input_ids"], golden["input_mask"]
    memory = pair.model.encoder(ids, mask).numpy()
    assert np.abs(memory - golden["encoder_output"])[mask == 1].max() < 1e-5
    logits = pair.model(
        {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": golden["decoder_input_ids"],
        }
    ).numpy()
    with_tokens = mask.any(axis=1)
    assert with_tokens.sum() >= 4
    assert np.abs(logits - golden["decoder_logits"])[with_tokens].max() < 1e-5


def test_golden_texts_and_scores(pair):
    texts, outputs = pair.strings("texts"), pair.strings("outputs")
    said = pair.model.generate(texts)
    full = [i for i, text in enumerate(texts) if text]
    assert [said[i] for i in full] == [outputs[i] for i in full]
    alone = [pair.model.generate(texts[i], jit_compile=False) for i in full]
    assert alone == [outputs[i] for i in full]
    assert pair.model.generate(texts[full[0]]) == outputs[full[0]]
    ids = {"input_ids": pair.golden["input_ids"], "attention_mask": pair.golden["input_mask"]}
    result = pair.model.generate(ids, jit_compile=False)
    assert np.abs(result.scores[:, 0] - pair.golden["beam_score"])[full].max() < 1e-4


def test_an_empty_text_has_the_answer_that_it_has_alone(pair):
    """In the module it depends on its neighbours, to which its additive mask leads it."""
    alone = pair.answer([""])
    assert pair.answer(["", "hello world, this is a longer text"])[:1] != alone
    assert pair.model.generate([""]) == alone
    texts = ["hello world, this is a longer text", ""]
    assert pair.model.generate(texts, jit_compile=False)[1:] == alone
    assert pair.model.generate(["", "", "hello"], jit_compile=False)[:2] == alone * 2


def test_real_sentences(pair):
    texts = compare.read_texts(shared(WIKISPLIT), 120)
    expected = compare.in_batches(pair.answer, texts, 8)
    assert len(set(expected)) > 60
    assert compare.in_batches(pair.model.generate, texts, 8) == expected
    plain = functools.partial(pair.model.generate, jit_compile=False)
    assert compare.in_batches(plain, texts[:40], 1) == expected[:40]
    assert compare.in_batches(pair.answer, texts[:8], 1) == expected[:8]


def test_export_and_preset_say_the_same(pair, tmp_path):
    texts = [text for text in pair.strings("texts") if text]
    expected = pair.model.generate(texts, jit_compile=False)
    pair.model.save_to_preset(tmp_path / "preset")
    preset = bg.EncoderDecoderModel.from_preset(tmp_path / "preset")
    assert preset.get_config() == pair.model.get_config()
    assert preset.generate(texts, jit_compile=False) == expected
    # The export's own check runs what is alike in both.
    check = pair.model.decoder.sharing == "all"
    path = bg.export_saved_model(pair.model, tmp_path / "export/1", check=check)
    signature = tf.saved_model.load(path).signatures["serving_default"]
    answers = signature(text=tf.constant(texts))["text"].numpy()
    assert [answer.decode() for answer in answers] == expected


# Small modules


def test_it_trains(folder):
    model = bg.EncoderDecoderModel.from_hub(folder, verify=False)
    before = [variable.numpy() for variable in model.weights]
    model.compile(optimizer=keras.optimizers.SGD(1.0), jit_compile=False)
    model.fit(CORPUS[:2], ["he sang", "a bird"], verbose=0)
    unchanged = [
        variable.path
        for variable, value in zip(model.weights, before, strict=True)
        if np.array_equal(variable.numpy(), value) and not variable.path.endswith("key/bias")
    ]
    assert unchanged == []


def test_a_dtype_policy_changes_the_model_not_the_check(folder, small):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        half = bg.EncoderDecoderModel.from_hub(folder)
    finally:
        keras.config.set_dtype_policy("float32")
    assert half.encoder.compute_dtype == half.decoder.compute_dtype == "bfloat16"
    assert half.decoder.embeddings is half.encoder.embeddings
    for ours, expected in zip(half.weights, small.weights, strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_the_two_forms_do_not_mix(folder):
    form = bg.EncoderDecoderModel.from_hub
    with pytest.raises(ValueError, match="needs one of handle .* and encoder="):
        form()
    with pytest.raises(ValueError, match="needs one of handle .* and encoder="):
        form(folder, encoder=folder)
    for options in (
        {"decoder": folder},
        {"share": True},
        {"cross_attention": "self_attention"},
        {"num_layers": 1},
    ):
        with pytest.raises(ValueError, match=f"handle. takes no {next(iter(options))}: an orig"):
            form(folder, **options)
    for name in hub.ORIGINAL_OPTIONS:
        with pytest.raises(ValueError, match=f"encoder=. takes no {name}: these are settings of"):
            form(encoder=folder, **{name: 1})
    with pytest.raises(TypeError, match="add_eos"):
        form(folder, add_eos=True)


def test_encoders_and_originals_are_told_apart(folder, hub_module, tmp_path):
    assert hub.is_original(folder) and not hub.is_original(hub_module)
    with pytest.raises(ValueError, match=r"It is an encoder-decoder: EncoderDecoderModel.from_hub"):
        bg.BertGenerationEncoder.from_hub(folder)
    with pytest.raises(ValueError, match=r"should be an encoder-decoder like google/bertseq2seq"):
        bg.EncoderDecoderModel.from_hub(hub_module)
    maker.make_encoder(tmp_path / "encoder", PIECES, num_layers=1)
    assert not hub.is_original(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"has no .*encdec/query/kernel, signature default"):
        bg.EncoderDecoderModel.from_hub(str(tmp_path / "encoder"))
    with pytest.raises(FileNotFoundError, match="absent"):
        hub.is_original(tmp_path / "absent")


def test_keywords_go_before_the_graph(folder):
    model = bg.EncoderDecoderModel.from_hub(
        folder,
        max_source_length=5,
        max_new_tokens=4,
        num_beams=2,
        gnmt_alpha=0.9,
        normalize_unfinished=True,
        hidden_token_ids=[7],
        verify=False,
        name="mine",
    )
    assert model.name == "mine" and model.preprocessor.max_source_length == 5
    assert model.preprocessor.hidden_token_ids == (7,)
    config = model.generation_config
    assert (config.max_new_tokens, config.num_beams, config.gnmt_alpha) == (4, 2, 0.9)
    assert config.normalize_unfinished
    # And then the module says something else.
    with pytest.raises(ValueError, match=r"should say the same .* verify=False"):
        bg.EncoderDecoderModel.from_hub(folder, max_new_tokens=1)


def test_the_table_of_the_seven():
    assert len(bg.hub.ORIGINALS) == 7
    lengths = {
        key.split("/")[2]: (entry.max_source_length, entry.max_target_length, entry.shared)
        for key, entry in bg.hub.ORIGINALS.items()
    }
    assert lengths["roberta24_bbc"] == (512, 64, True)
    assert lengths["roberta24_gigaword"] == (128, 32, True)
    assert lengths["bert24_de_en"] == (128, 128, False)
    bbc = bg.hub.ORIGINALS["google/bertseq2seq/roberta24_bbc/1"]
    for handle in (
        "https://tfhub.dev/google/bertseq2seq/roberta24_bbc/1",
        "https://tfhub.dev/google/bertseq2seq/roberta24_bbc/1?tf-hub-format=compressed",
    ):
        assert hub.known_original(handle) is bbc
    assert hub.known_original("anywhere", "roberta24_bbc") is bbc
    # Never from a folder's name, nor from another server.
    for handle in (
        "/models/google/bertseq2seq/roberta24_bbc/1",
        "https://example.org/tfhub.dev/google/bertseq2seq/roberta24_bbc/1",
        "https://tfhub.dev/google/bertseq2seq/roberta24_bbc/2",
    ):
        assert hub.known_original(handle) is None
    with pytest.raises(ValueError, match="original must be one of bert24_en_de, .*'roberta'"):
        hub.known_original("anywhere", "roberta")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("embeddings/LayerNorm/beta", 1.01, r"same encoder output .* differs by 0\.\d+\. verify=F"),
        ("attention/encdec/value/kernel", -3.0, "should say the same as our model .* says .* ours"),
    ],
)
def test_verify_compares_both_sides(name, change, message, folder, monkeypatch):
    """A variable of ours that is not the module's is noticed in the encoder and in the decoder."""
    original_assign = hub_originals._assign

    def assign(model, layout, *rest):
        tensors = {n: t * change if name in n else t for n, t in layout.tensors.items()}
        original_assign(model, dataclasses.replace(layout, tensors=tensors), *rest)

    monkeypatch.setattr(hub_originals, "_assign", assign)
    with pytest.raises(ValueError, match=message) as caught:
        bg.EncoderDecoderModel.from_hub(folder)
    assert "\n" not in str(caught.value)
    bg.EncoderDecoderModel.from_hub(folder, verify=False)


def test_compare_tool(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "texts.tsv").write_text("the man saw\tignored\n\nan owl\nwho sang?\nhouse\n")
    arguments = [folder, str(tmp_path / "texts.tsv"), "--count=3", "--batch-size=2", "--rounds=1"]
    assert compare.main(arguments) == 0
    output = capsys.readouterr().out
    assert "3 texts in batches of 2" in output and "XLA: 3 of 3 answers equal" in output
    assert re.search(r"plain graph +\d+\.\d\d ms a text, +\d+\.\d\d times the module's", output)
    monkeypatch.setattr(
        bg.EncoderDecoderModel, "generate", lambda self, batch, **_: ["x"] * len(batch)
    )
    assert compare.main(arguments) == 1
    assert "0 of 3 answers equal" in capsys.readouterr().out
    assert compare.main([str(tmp_path), arguments[1]]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_encoder_of_the_other_format_gives_its_output():
    path = shared(SHARED / "hub/tf1hub_bert_uncased_tiny")
    golden = np.load(f"{path}.golden.npz")
    encoder = bg.BertGenerationEncoder.from_hub(str(path))
    assert encoder.config.hidden_act == "gelu_new" and encoder.config.num_attention_heads == 2
    ids, mask = golden["input_ids"], golden["input_mask"]
    tokens = tensorflow_hub.load(str(path)).signatures["tokens"]
    inputs = {"input_ids": ids, "input_mask": mask, "segment_ids": np.zeros_like(ids)}
    theirs = tokens(**{n: tf.constant(a, tf.int32) for n, a in inputs.items()})["sequence_output"]
    assert np.abs(encoder(ids, mask) - theirs)[mask == 1].max() < 1e-5
    # The golden file has both token types: rows of type 0 alone are ours.
    plain = (golden["segment_ids"] * mask == 0).all(axis=1)
    assert plain.any()
    difference = np.abs(encoder(ids, mask) - golden["sequence_output"])[plain]
    assert difference[mask[plain] == 1].max() < 1e-5
    vocabulary = (path / "assets/vocab.txt").read_text().splitlines()
    for share, cross in ((True, "random"), (False, "self_attention")):
        model = bg.EncoderDecoderModel.from_hub(
            encoder=str(path), share=share, cross_attention=cross, verify=False
        )
        assert model.tokenizer.get_config()["vocabulary"] == vocabulary
        assert model.tokenizer.lowercase
        assert (model.decoder.sharing == "all") == share
    decoder = bg.BertGenerationDecoder.from_hub(str(path), num_layers=1)
    np.testing.assert_array_equal(
        decoder.embeddings.word_embeddings.embeddings,
        encoder.embeddings.word_embeddings.embeddings,
    )
