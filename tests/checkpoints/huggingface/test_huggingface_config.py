"""What a `config.json` says is followed, or is one error that lists it."""

import json

import numpy as np
import pytest

import bertgen_tf as bg
from bertgen_tf.checkpoints.huggingface.files import model_type_of
from tests.helpers import write_checkpoint
from tests.helpers.huggingface import assert_close

# What transformers 4.10 writes into the dictionary of a decoder, besides the sizes.
V4_DEFAULTS = {
    "_name_or_path": "",
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "gradient_checkpointing": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": True,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torch_dtype": None,
    "torchscript": False,
    "transformers_version": "4.10.0",
    "use_bfloat16": False,
}


def test_config_of_transformers_4(copy):
    """Defaults change nothing; settings of generation in config.json count where they are alone."""

    def change(values):
        for side in ("encoder", "decoder"):
            values[side].update(V4_DEFAULTS)
        values["decoder"]["num_beams"] = 3
        values["decoder"]["length_penalty"] = 2.0
        values.update(max_length=9, num_beams=4, early_stopping=True, vocab_size=47)

    folder = copy("v4_shared", config=change)
    read = bg.EncoderDecoderModel.from_huggingface
    assert read(folder).generation_config == bg.GenerationConfig(max_new_tokens=20)
    (folder / "generation_config.json").unlink()
    assert read(folder).generation_config == bg.GenerationConfig(
        max_length=9, num_beams=4, early_stopping=True, length_penalty=2.0
    )
    values = json.loads((folder / "config.json").read_text())
    del values["max_length"]
    (folder / "config.json").write_text(json.dumps(values))
    assert (
        read(folder).generation_config.max_new_tokens == 20
    )  # the positions, not transformers' 20


def test_all_that_config_asks_for_in_vain_is_one_error(copy):
    def change(values):
        values["decoder"].update(
            position_embedding_type="relative_key", hidden_act="silu", is_decoder=False
        )
        values["encoder"].update(pruned_heads={"0": [1]}, vocab_size=0)
        values["encoder"]["quantization_config"] = {"quant_method": "fp8", "skip": ["x" * 99]}
        values["encoder"].update(hidden_dropout_prob=2, num_attention_heads="x")
        values["decoder"]["tie_word_embeddings"] = 0

    folder = copy("v4_shared", config=change)
    with pytest.raises(ValueError, match="config.json asks for what is not supported") as error:
        bg.EncoderDecoderModel.from_huggingface(folder)
    for part in (
        "decoder.position_embedding_type='relative_key' (only 'absolute')",
        "decoder.hidden_act='silu' (only gelu, gelu_python, gelu_new",
        "decoder.is_decoder=False (only True)",
        "encoder.pruned_heads={'0': [1]} (only {})",
        "encoder.quantization_config={'quant_method': 'fp8', 'skip': ['xxx",
        "xxx... (only None)",
        "encoder: vocab_size must be an integer of at least 1, received 0",
        "encoder: hidden_dropout_prob must be a number in [0, 1), received 2",
        "encoder: num_attention_heads must be an integer of at least 1, received 'x'",
        "decoder: tie_word_embeddings must be True or False, received 0",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_of_generation_are_in_the_same_error(copy):
    """Also where version 4 wrote all into config.json, and beside a decoder that cannot be."""

    def change(values):
        values["decoder"].update(hidden_act="silu", num_beam_groups=3)
        values["encoder"]["prefix"] = "x"

    folder = copy("v4_shared", config=change)
    (folder / "generation_config.json").unlink()
    with pytest.raises(ValueError, match="decoder.hidden_act='silu'.*num_beam_groups=3") as e:
        bg.EncoderDecoderModel.from_huggingface(folder)
    assert "\n" not in str(e.value)
    values = json.loads((folder / "config.json").read_text())
    values["decoder"]["model_type"] = "gpt2"
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "generation_config.json").write_text('{"guidance_scale": 2}')
    with pytest.raises(ValueError, match="prefix='x'.*'gpt2'.*n_config.json.*dance_scale=2"):
        bg.EncoderDecoderModel.from_huggingface(folder)


@pytest.mark.parametrize(
    ("file", "side", "field", "token"),
    [
        ("generation_config.json", None, "decoder_start_token_id", 99),
        ("generation_config.json", None, "pad_token_id", "x"),
        ("config.json", None, "eos_token_id", -1),
        ("generation_config.json", None, "eos_token_id", [1, 47]),
        ("generation_config.json", None, "pad_token_id", [0, 1]),
        ("config.json", "decoder", "bos_token_id", 47),
    ],
)
def test_ids_that_cannot_be(copy, file, side, field, token):
    """The error names the file and the field, and nothing else."""
    folder = copy("v4_shared")
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text())
        if name == "config.json":
            for ids in ("pad_token_id", "bos_token_id", "eos_token_id"):
                values["encoder"].pop(ids, None)
        for part in (values, values.get("decoder", {})):
            part.pop(field, None)
            if field == "bos_token_id":
                part.pop("decoder_start_token_id", None)
        if name == file:
            (values[side] if side else values)[field] = token
        (folder / name).write_text(json.dumps(values))
    name = f"{side}.{field}" if side else field
    with pytest.raises(ValueError) as error:
        bg.EncoderDecoderModel.from_huggingface(folder)
    message = f"here: {name}={token!r} (only an id below vocab_size=47)."
    assert str(error.value).endswith(f"{file} asks for what is not supported {message}")


def test_cross_attention_hidden_size(copy):
    """transformers 4 wants it where it is the encoder's own."""

    def change(size):
        return lambda values: values["decoder"].update(cross_attention_hidden_size=size)

    folder = copy("v4_shared", config=change(12))
    assert bg.EncoderDecoderModel.from_huggingface(folder).decoder.sharing == "all"
    folder = copy("v5_pair", config=change(15))
    with pytest.raises(ValueError, match=r"decoder.cross_attention_hidden_size=15 \(only 12\)"):
        bg.EncoderDecoderModel.from_huggingface(folder)


def test_positions_of_a_roberta_that_tells_no_padding(checkpoints, copy):
    """Its own default counts, not the padding of the decoder."""

    def change(values):
        assert values["decoder"]["pad_token_id"] == 0
        assert values["encoder"].pop("pad_token_id") == 1

    model = bg.EncoderDecoderModel.from_huggingface(copy("v5_mixed", config=change))
    golden = np.load(checkpoints / "v5_mixed/golden.npz")
    mask = golden["attention_mask"]
    memory = model.encoder(golden["input_ids"], mask)
    assert_close(memory, golden["encoder_last_hidden_state"], mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda v: (v.pop("model_type"), v.pop("architectures")),
            "should have a model_type, one of .* but has None",
        ),
        (lambda v: v.update(model_type="t5"), "but has 't5'"),
        (
            lambda v: v["decoder"].update(model_type="gpt2"),
            r"decoder with model_type 'gpt2' \(only bert-generation or bert or roberta",
        ),
        (
            lambda v: v.update(encoder=None),
            r"encoder with model_type None \(only bert-generation or",
        ),
        (
            lambda v: v["encoder"].update(hidden_size=15),
            "encoder.hidden_size=15 with decoder.hidden_size=12",
        ),
        (lambda v: v["encoder"].update(is_decoder=True), r"encoder.is_decoder=True \(only False"),
        (lambda v: v["decoder"].update(eos_token_id=[1, 5]), None),
        (lambda v: v.update(eos_token_id=[1, 5]), None),
    ],
)
def test_configs_that_cannot_be_followed(copy, change, message):
    folder = copy("v4_shared", config=change)
    if message is None:  # generation_config.json says which one
        assert bg.EncoderDecoderModel.from_huggingface(folder).decoder.config.eos_token_id == 1
        return
    with pytest.raises(ValueError, match=message):
        bg.EncoderDecoderModel.from_huggingface(folder)


@pytest.mark.parametrize(
    "own",
    [
        3,
        {"preprocessor": {"name": "x"}},
        {"preprocessor": 5},
        {"generation": {"top_k": 1}},
        {"sharing": "some"},
        {"sharing": ["all"]},
    ],
)
def test_own_settings_that_are_not_ours(copy, own):
    folder = copy("v4_shared", config=lambda values: values.update(bertgen_tf=own))
    with pytest.raises(ValueError, match="bertgen_tf=.* .only what save_to_huggingface wrote"):
        bg.EncoderDecoderModel.from_huggingface(folder)


@pytest.mark.parametrize("own", [{"max_source_length": "x"}, {"max_target_length": 10**30}])
def test_own_settings_that_fit_no_model(tmp_path, model, own):
    """The error names the file, and is one of values."""
    model.save_to_huggingface(tmp_path / "out")
    values = json.loads((tmp_path / "out/config.json").read_text())
    values["bertgen_tf"]["preprocessor"].update(own)
    (tmp_path / "out/config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="out/config.json should hold settings under bertgen_tf"):
        bg.EncoderDecoderModel.from_huggingface(tmp_path / "out")


# Each alone is on a public checkpoint, and transformers gives the same numbers with it.
HARMLESS = {
    "output_past": True,
    "eos_token_ids": 0,
    "language": "english",
    "name": "Bert",
    "adapters": {"adapters": {}, "config_map": {}},
    "model_max_length": 512,
    "embedding_size": 768,
    "tie_word_embeddings": False,
    "hidden_act": "gelu_python",
    "_num_labels": 2,
    "summary_type": "first",
    "summary_use_proj": True,
    "auto_map": {"AutoModel": "modeling.py"},
    "do_lower_case": True,
    "classifier_dropout": 0.3,
    "gradient_checkpointing": True,
    "num_beams": 4,
    "torch_dtype": "float16",
}


def test_fields_that_change_nothing(tmp_path, recwarn):
    """Known ones are ignored, whatever their values; unknown ones are one warning."""
    read = bg.BertGenerationEncoder.from_huggingface
    ids = np.arange(6)[None]
    expected = read(write_checkpoint(tmp_path / "plain"))(ids)
    folder = write_checkpoint(tmp_path / "more", **HARMLESS)
    np.testing.assert_array_equal(read(folder)(ids), expected)
    assert not recwarn.list
    values = json.loads((folder / "config.json").read_text())
    del values["model_type"]
    (folder / "config.json").write_text(json.dumps({**values, "new_option": 7, "team": "x"}))
    with pytest.warns(UserWarning, match="config.json has fields .*: new_option, team.$") as seen:
        np.testing.assert_array_equal(read(folder)(ids), expected)
    assert len(seen) == 1


def test_unknown_fields_of_a_pair_are_one_warning(copy):
    def change(values):
        values["encoder"]["one"] = 1
        values["decoder"]["two"] = 2
        values.update({f"three_{i}": 3 for i in range(30)})
        values.update(tie_word_embeddings=False, is_decoder=False)  # nobody reads them there

    with pytest.warns(UserWarning, match=": three_0, .*three_19 and 12 more") as seen:
        bg.EncoderDecoderModel.from_huggingface(copy("v4_shared", config=change))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "bert"),
        ({"architectures": ["BertGenerationDecoder"]}, "bert-generation"),
        ({"architectures": ["RobertaModel"], "type_vocab_size": 1}, "roberta"),
        ({"architectures": ["GPT2LMHeadModel"]}, "gpt2"),
        ({"architectures": ["EncoderDecoderModel"]}, "encoder-decoder"),
        ({"type_vocab_size": 2, "directionality": "bidi"}, "bert"),  # Google's bert_config.json
        ({"type_vocab_size": 1, "pad_token_id": 1}, None),  # perhaps RoBERTa
        ({"architectures": ["T5Model"], "type_vocab_size": 2}, None),
        ({"format": "bertgen_tf preset", "model": {}}, None),
        ({"model_type": "t5", "architectures": ["BertModel"]}, "t5"),
    ],
)
def test_model_type_that_is_not_written(values, kind):
    assert model_type_of(values) == kind


def test_ids_that_nobody_uses(tmp_path):
    """Some BERTs have RoBERTa's bos and eos in their config.json; [CLS] and [SEP] count."""
    folder = write_checkpoint(tmp_path / "bert", bos_token_id=0, eos_token_id=2)
    config = bg.BertGenerationDecoder.from_huggingface(folder).config
    assert (config.bos_token_id, config.eos_token_id) == (3, 4)
