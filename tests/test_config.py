import dataclasses
import json

import pytest

from bertgen_tf.config import BertGenerationConfig, GenerationConfig

MODEL = BertGenerationConfig(
    vocab_size=11,
    hidden_size=6,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=7,
    hidden_act="relu",
    hidden_dropout_prob=0.25,
    attention_probs_dropout_prob=0,
    max_position_embeddings=5,
    initializer_range=0.5,
    layer_norm_eps=1e-7,
    pad_token_id=4,
    bos_token_id=10,
    eos_token_id=0,
    add_cross_attention=True,
)
GENERATION = GenerationConfig(
    max_new_tokens=9,
    min_new_tokens=3,
    num_beams=4,
    num_return_sequences=2,
    length_penalty=-0.5,
    early_stopping="never",
    suppress_tokens=(3, 1),
)
GNMT = GenerationConfig(num_beams=3, beam_scorer="gnmt", gnmt_alpha=0.75)


def test_defaults_are_those_of_the_released_models():
    """`google/bertseq2seq/roberta24_*`, as HuggingFace's class has them."""
    assert BertGenerationConfig().to_dict() == {
        "vocab_size": 50358,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 512,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "add_cross_attention": False,
    }


@pytest.mark.parametrize("config", [MODEL, GENERATION, GNMT])
def test_json_round_trip(tmp_path, config):
    assert config != type(config)()
    path = tmp_path / "config.json"
    config.to_json_file(path)
    assert type(config).from_json_file(path) == config
    assert type(config).from_dict(json.loads(path.read_text())) == config
    assert type(config).from_dict(config.to_dict()) == config
    assert json.loads(path.read_text()).keys() == config.to_dict().keys()


@pytest.mark.parametrize("config", [MODEL, GENERATION, GNMT])
def test_configs_are_frozen_and_hashable(config):
    field = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, field, 5)
    copy = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    assert copy is not config and {config: "found"}[copy] == "found"
    assert config.replace(**{field: 11}) in {config.replace(**{field: 11})}


def test_replace_changes_what_it_names_and_only_that():
    changed = MODEL.replace(hidden_size=9, add_cross_attention=False)
    assert changed.to_dict() == {
        **MODEL.to_dict(),
        "hidden_size": 9,
        "add_cross_attention": False,
    }
    assert MODEL.hidden_size == 6 and MODEL.add_cross_attention
    assert MODEL.replace() == MODEL
    with pytest.raises(ValueError, match="BertGenerationConfig has no field hiden_size"):
        MODEL.replace(hiden_size=9)
    with pytest.raises(ValueError, match="multiple of num_attention_heads"):
        MODEL.replace(hidden_size=7)


def test_unknown_fields_are_all_named():
    with pytest.raises(
        ValueError, match=r"GenerationConfig has no field beams, temp; it has .*num_b"
    ):
        GenerationConfig.from_dict({"temp": 1, "num_beams": 2, "beams": 3})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 0, "vocab_size must be an integer of at least 1, received 0"),
        ("hidden_size", 6.0, "hidden_size must be an integer of at least 1, received 6.0"),
        ("hidden_size", 8, "received hidden_size=8, num_attention_heads=3"),
        ("num_hidden_layers", True, "num_hidden_layers must be an integer .* received True"),
        ("num_attention_heads", -3, "num_attention_heads must be an integer .* received -3"),
        ("intermediate_size", "7", "intermediate_size must be an integer .* received '7'"),
        ("max_position_embeddings", None, "max_position_embeddings must be .* received None"),
        ("hidden_act", "swish", "hidden_act must be one of gelu, gelu_new, relu, received 'swish'"),
        ("pad_token_id", -1, "pad_token_id must be an integer of at least 0, received -1"),
        ("bos_token_id", 11, r"bos_token_id must be smaller than vocab_size \(11\), received 11"),
        ("eos_token_id", None, "eos_token_id must be an integer of at least 0, received None"),
        ("hidden_dropout_prob", 1, r"hidden_dropout_prob must be .* in \[0, 1\), received 1"),
        ("hidden_dropout_prob", "0.1", "hidden_dropout_prob must be a number .* received '0.1'"),
        ("attention_probs_dropout_prob", -0.1, "attention_probs_dropout_prob must .* -0.1"),
        ("attention_probs_dropout_prob", float("nan"), "attention_probs_dropout_prob must .* nan"),
        ("initializer_range", -1.0, "initializer_range must be a number .* received -1.0"),
        ("layer_norm_eps", 0, "layer_norm_eps must be a number above 0, received 0"),
        ("layer_norm_eps", "1e-12", "layer_norm_eps must be a number above 0, received '1e-12'"),
        ("add_cross_attention", 1, "add_cross_attention must be True or False, received 1"),
    ],
)
def test_model_values_are_checked(field, value, message):
    with pytest.raises(ValueError, match=message):
        MODEL.replace(**{field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, received 0"),
        ({"min_new_tokens": 10}, r"must not exceed max_new_tokens \(9\), received 10"),
        ({"min_new_tokens": -1}, "min_new_tokens must be an integer of at least 0"),
        ({"num_beams": 2.0}, "num_beams must be an integer of at least 1, received 2.0"),
        ({"num_return_sequences": 5}, r"not exceed num_beams \(4\), received 5. Raise num_beams"),
        ({"beam_scorer": "t5"}, "beam_scorer must be one of huggingface, gnmt, received 't5'"),
        ({"length_penalty": "1"}, "length_penalty must be a number, received '1'"),
        ({"gnmt_alpha": True}, "gnmt_alpha must be a number from 0, received True"),
        ({"gnmt_alpha": -1}, "gnmt_alpha must be a number from 0, received -1"),
        ({"normalize_unfinished": 1}, "normalize_unfinished must be True or False, received 1"),
        (
            {"normalize_unfinished": True},
            "normalize_unfinished applies to beam_scorer='gnmt' only, received True",
        ),
        ({"gnmt_alpha": 0.7}, "gnmt_alpha applies to beam_scorer='gnmt' only, received 0.7"),
        ({"length_penalty": float("nan")}, "length_penalty must be a number, received nan"),
        ({"early_stopping": 1}, 'early_stopping must be True, False or "never", received 1'),
        ({"beam_scorer": "gnmt"}, "early_stopping applies to .* beam_scorer='gnmt'"),
        (
            {"beam_scorer": "gnmt", "early_stopping": False},
            "length_penalty applies to beam_scorer='huggingface' only, received -0.5",
        ),
        ({"early_stopping": "always"}, 'early_stopping must be True, False or "never"'),
        ({"suppress_tokens": [-1]}, "suppress_tokens must be token ids .* received .*-1"),
        ({"suppress_tokens": ["a"]}, "suppress_tokens must be token ids .* received .*'a'"),
        ({"suppress_tokens": 3}, "suppress_tokens must be token ids .* received 3"),
        ({"suppress_tokens": None}, "suppress_tokens must be token ids .* received None"),
        (
            {"num_beams": 1, "num_return_sequences": 1},
            "early_stopping applies to beam search .* received 'never' with num_beams=1",
        ),
    ],
)
def test_generation_values_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        GENERATION.replace(**changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json is not valid JSON"),
        ("[1]", "should hold a JSON object of GenerationConfig fields, but holds a list"),
        ('{"num_beans": 1}', "GenerationConfig has no field num_beans"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        GenerationConfig.from_json_file(path)
    with pytest.raises(FileNotFoundError, match="absent.json"):
        GenerationConfig.from_json_file(tmp_path / "absent.json")
