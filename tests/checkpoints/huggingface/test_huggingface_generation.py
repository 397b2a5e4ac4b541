"""Settings of generation, from transformers and back."""

import json

import numpy as np
import pytest

import bertgen_tf as bg
from bertgen_tf.checkpoints.huggingface import config as configs
from bertgen_tf.checkpoints.huggingface import generation_settings as generations
from bertgen_tf.config import HEAD_FIELDS, TOKEN_IDS
from tests.helpers.huggingface import assert_same_model, make_pair


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"max_new_tokens": 7, "max_length": 5}, {"max_new_tokens": 7}),
        # One of a kind comes before the other in transformers, too.
        (
            {"max_length": 6, "min_new_tokens": 4, "min_length": 2},
            {"max_length": 6, "min_new_tokens": 4},
        ),
        ({"max_length": 6, "min_length": 2}, {"max_length": 6, "min_length": 2}),
        ({"max_length": 9, "early_stopping": True}, {"max_length": 9}),  # greedy
        (
            {"max_length": 9, "num_beams": 4, "early_stopping": "never", "suppress_tokens": [5]},
            {"max_length": 9, "num_beams": 4, "early_stopping": "never", "suppress_tokens": (5,)},
        ),
        # Without do_sample transformers does not look at them.
        (
            {
                "max_length": 9,
                "do_sample": False,
                "top_k": 7,
                "temperature": 0.3,
                "top_h": 0.4,
                "epsilon_cutoff": 0.1,
                "no_repeat_ngram_size": 0,
                "repetition_penalty": None,
            },
            {"max_length": 9},
        ),
        (
            {
                "max_length": 9,
                "do_sample": True,
                "num_return_sequences": 3,
                "top_k": 7,
                "temperature": 0.3,
                "top_p": 0.9,
                "min_p": 0.1,
                "typical_p": 0.8,
                "eta_cutoff": 0.0,
            },
            {
                "max_length": 9,
                "do_sample": True,
                "num_return_sequences": 3,
                "top_k": 7,
                "temperature": 0.3,
                "top_p": 0.9,
                "min_p": 0.1,
                "typical_p": 0.8,
            },
        ),
        (
            {
                "max_length": 9,
                "repetition_penalty": 1.5,
                "encoder_repetition_penalty": 2,
                "no_repeat_ngram_size": 2,
                "encoder_no_repeat_ngram_size": 3,
                "bad_words_ids": [[5], [6, 7]],
                "sequence_bias": [[[5], 1.5], [[6, 7], -2.0]],
                "begin_suppress_tokens": [5],
                "forced_bos_token_id": 6,
                "forced_eos_token_id": [1, 9],
                "exponential_decay_length_penalty": [3, 1.5],
                "eos_token_id": [1, 9],
            },
            {
                "max_length": 9,
                "repetition_penalty": 1.5,
                "encoder_repetition_penalty": 2,
                "no_repeat_ngram_size": 2,
                "encoder_no_repeat_ngram_size": 3,
                "bad_words_ids": ((5,), (6, 7)),
                "sequence_bias": {(5,): 1.5, (6, 7): -2.0},
                "begin_suppress_tokens": (5,),
                "forced_bos_token_id": 6,
                "forced_eos_token_id": (1, 9),
                "exponential_decay_length_penalty": (3, 1.5),
                "eos_token_id": (1, 9),
            },
        ),
        # One end token is the decoder's own.
        ({"eos_token_id": [1], "max_length": 9}, {"max_length": 9}),
    ],
)
def test_settings_of_generation(copy, changes, settings):
    folder = copy("v4_shared", generation=lambda values: values.update(changes))
    model = bg.EncoderDecoderModel.from_huggingface(folder)
    assert model.generation_config == bg.GenerationConfig(**settings)
    assert model.decoder.config.eos_token_id == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"do_sample": True, "num_beam_groups": 3, "what": 1, "top_h": 0.5, "eta_cutoff": 0.1},
            "not supported here: num_beam_groups=3, what=1, top_h=0.5, eta_cutoff=0.1. Other sett",
        ),
        ({"max_length": 30}, "lets 29 tokens be generated, but the decoder has 20 positions"),
        ({"max_new_tokens": 21}, "lets 21 tokens be generated, but the decoder has 20 positions"),
        ({"num_return_sequences": 2}, "json: num_return_sequences must not exceed num_beams .*1"),
        ({"do_sample": True, "top_p": 3}, "json: top_p must be a number above 0 and at most 1"),
        (
            {"num_beams": 0},
            "num_beams must be an integer of at least 1, received 0. Other settings",
        ),
        ({"max_length": "long"}, "max_length must be an integer .* 'long'. Other settings"),
    ],
)
def test_settings_that_cannot_be_followed(copy, changes, message):
    """All in one error; other settings replace them."""
    folder = copy("v4_shared", generation=lambda values: values.update(changes))
    with pytest.raises(ValueError, match=message):
        bg.EncoderDecoderModel.from_huggingface(folder)
    settings = bg.GenerationConfig(max_new_tokens=3)
    model = bg.EncoderDecoderModel.from_huggingface(folder, generation_config=settings)
    assert model.generation_config == settings


@pytest.mark.slow
def test_the_start_token_is_what_we_call_bos(copy):
    """decoder_start_token_id, not bos_token_id, is what transformers starts with."""

    def change(values):
        values.update(decoder_start_token_id=7)

    folder = copy("v4_shared", config=change, generation=change)
    model = bg.EncoderDecoderModel.from_huggingface(folder)
    assert model.decoder.config.bos_token_id == 7
    sequences = model.generate({"input_ids": np.array([[5, 6]])}, max_new_tokens=2).sequences
    assert sequences[0, 0, 0] == 7
    folder.joinpath("generation_config.json").write_text('{"decoder_start_token_id": 2}')
    with pytest.raises(ValueError, match=r"token_id=7 \(generation_config.json says 2\)"):
        bg.EncoderDecoderModel.from_huggingface(folder)


def test_settings_there_and_back(tmp_path):
    """Those of gnmt are ours alone, and nothing of them can be taken for HuggingFace's."""
    settings = bg.GenerationConfig(
        max_new_tokens=8,
        min_new_tokens=2,
        num_beams=4,
        num_return_sequences=2,
        beam_scorer="gnmt",
        gnmt_alpha=0.8,
        normalize_unfinished=True,
        suppress_tokens=(5, 6),
    )
    model = make_pair("none", generation_config=settings, mask_first=True, add_bos=True)
    model.save_to_huggingface(tmp_path / "out")
    assert_same_model(model, bg.EncoderDecoderModel.from_huggingface(tmp_path / "out"))
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert written == {
        "pad_token_id": 0,
        "bos_token_id": 3,
        "eos_token_id": 4,
        "decoder_start_token_id": 3,
        "max_new_tokens": 8,
        "min_new_tokens": 2,
        "num_beams": 4,
        "num_return_sequences": 2,
        "suppress_tokens": [5, 6],
    }
    plain = make_pair("none")
    plain.save_to_huggingface(tmp_path / "out")
    own = json.loads((tmp_path / "out/config.json").read_text())["bertgen_tf"]
    assert "generation" not in own
    assert_same_model(plain, bg.EncoderDecoderModel.from_huggingface(tmp_path / "out"))


SETTINGS = {
    "max_length": 12,
    "min_length": 4,
    "min_new_tokens": 2,  # transformers follows one of the two
    "num_return_sequences": 3,
    "do_sample": True,
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.9,
    "min_p": 0.1,
    "typical_p": 0.8,
    "seed": 5,
    "repetition_penalty": 1.5,
    "encoder_repetition_penalty": 0.5,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 3,
    "bad_words_ids": ((5,), (7, 8)),
    "sequence_bias": (((4,), 2.0), ((6, 1), -1.5)),
    "suppress_tokens": (10, 11),
    "begin_suppress_tokens": (9,),
    "forced_bos_token_id": 3,
    "forced_eos_token_id": (4, 2),
    "exponential_decay_length_penalty": (4, 1.25),
    "eos_token_id": (4, 6),
}


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        {"max_new_tokens": 9, "num_beams": 3, "early_stopping": True, "eos_token_id": 6},
    ],
)
def test_every_setting_there_and_back(tmp_path, settings):
    """An end token that is not the decoder's own does not become it."""
    model = make_pair("none", generation_config=bg.GenerationConfig(**settings))
    model.save_to_huggingface(tmp_path / "out")
    assert_same_model(model, bg.EncoderDecoderModel.from_huggingface(tmp_path / "out"))
    theirs = json.loads((tmp_path / "out/generation_config.json").read_text())
    ids = {"pad_token_id": 0, "bos_token_id": 3, "decoder_start_token_id": 3}
    expected = {name: value for name, value in settings.items() if name != "seed"}
    assert theirs == json.loads(json.dumps({**ids, **expected}))
    own = json.loads((tmp_path / "out/config.json").read_text())
    assert own["eos_token_id"] == own["decoder"]["eos_token_id"] == 4


def test_every_setting_has_its_place():
    """A field that is added to a config and forgotten here would be lost in silence."""
    fields = {*generations.GENERATION_FIELDS, *generations.OWN_GENERATION}
    assert fields == set(bg.GenerationConfig.__dataclass_fields__)
    fields = {*configs._SIZES, *TOKEN_IDS, *HEAD_FIELDS, "hidden_act", "add_cross_attention"}
    ours = {"norm_first", "source_positions", "quantization"}  # such models are not written
    assert fields == set(bg.BertGenerationConfig.__dataclass_fields__) - ours
