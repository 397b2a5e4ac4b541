import dataclasses
import json

import numpy as np
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
SAMPLING = GenerationConfig(
    max_length=12,
    min_length=2,
    num_return_sequences=3,
    do_sample=True,
    temperature=0.5,
    top_k=7,
    top_p=0.9,
    min_p=0.1,
    typical_p=0.8,
    seed=2**31 - 1,
    repetition_penalty=1.5,
    encoder_repetition_penalty=0.5,
    no_repeat_ngram_size=2,
    encoder_no_repeat_ngram_size=3,
    bad_words_ids=[[5], [7, 8]],
    sequence_bias={(4,): 2, (6, 1): -1.5},
    begin_suppress_tokens=[9],
    forced_bos_token_id=3,
    forced_eos_token_id=[1, 2],
    exponential_decay_length_penalty=[4, 1.25],
    eos_token_id=[1, 6],
)
CONFIGS = [MODEL, GENERATION, GNMT, SAMPLING]


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
        "tie_word_embeddings": True,
        # Ours:
        "head_transform": None,
        "norm_first": False,
        "source_positions": None,
        "quantization": None,
    }


@pytest.mark.parametrize("config", CONFIGS)
def test_json_round_trip(tmp_path, config):
    """Lists and dicts, also nested ones, come back as the tuples that they were made."""
    assert config != type(config)()
    path = tmp_path / "config.json"
    config.to_json_file(path)
    assert type(config).from_json_file(path) == config
    assert type(config).from_dict(json.loads(path.read_text())) == config
    assert type(config).from_dict(config.to_dict()) == config
    assert json.loads(path.read_text()).keys() == config.to_dict().keys()


@pytest.mark.parametrize("config", CONFIGS)
def test_configs_are_frozen_and_hashable(config):
    field = "num_beams" if isinstance(config, GenerationConfig) else "vocab_size"
    config = config if config is not SAMPLING else config.replace(num_return_sequences=1)
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
        # Ours:
        "norm_first": False,
        "source_positions": None,
        "quantization": None,
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
        ("tie_word_embeddings", None, "tie_word_embeddings must be True or False, received None"),
        ("head_transform", True, "head_transform must be None or one of gelu, .* received True"),
    ],
)
def test_model_values_are_checked(field, value, message):
    with pytest.raises(ValueError, match=message):
        MODEL.replace(**{field: value})


def test_no_field_of_the_sampling_example_is_a_default():
    """What is not set there would pass all tests of round trips unseen."""
    others = {"max_new_tokens", "min_new_tokens", "num_beams", "beam_scorer", "length_penalty"}
    others |= {"early_stopping", "gnmt_alpha", "normalize_unfinished", "suppress_tokens"}
    values, defaults = SAMPLING.to_dict(), GenerationConfig().to_dict()
    assert {name for name in values if values[name] == defaults[name]} == others - {
        "max_new_tokens"
    }


def test_ids_and_numbers_are_kept_as_plain_tuples():
    assert SAMPLING.bad_words_ids == ((5,), (7, 8))
    assert SAMPLING.sequence_bias == (((4,), 2), ((6, 1), -1.5))
    pairs = [[[4], 2], [[6, 1], -1.5]]  # as in JSON
    assert SAMPLING.replace(sequence_bias=pairs) == SAMPLING
    assert SAMPLING.exponential_decay_length_penalty == (4, 1.25)
    # One end token has one form, which is hashed as one.
    assert GenerationConfig(eos_token_id=[5]) == GenerationConfig(eos_token_id=5)
    config = GenerationConfig(
        max_new_tokens=np.int64(9),
        suppress_tokens=list(np.array([3, 1], np.int32)),
        length_penalty=np.float32(0.5),
        bad_words_ids=[np.array([5]).tolist(), (np.uint8(7), 8)],
    )
    assert config == GenerationConfig(
        max_new_tokens=9, suppress_tokens=(3, 1), length_penalty=0.5, bad_words_ids=((5,), (7, 8))
    )
    assert type(config.max_new_tokens) is int and type(config.length_penalty) is float
    assert {type(token) for token in config.suppress_tokens} == {int}
    assert GenerationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("stored", "changes", "expected"),
    [
        ({"num_beams": 4, "early_stopping": True}, {"num_beams": 1}, {}),
        (
            {"num_beams": 4, "early_stopping": True},
            {"beam_scorer": "gnmt"},
            {"num_beams": 4, "beam_scorer": "gnmt"},
        ),
        ({"do_sample": True, "temperature": 0.5, "seed": 3, "top_k": 7}, {"do_sample": False}, {}),
        (
            {"do_sample": True, "temperature": 0.5},
            {"top_k": 7},
            {"do_sample": True, "temperature": 0.5, "top_k": 7},
        ),
        ({"length_penalty": 2.0}, {"beam_scorer": "gnmt"}, {"beam_scorer": "gnmt"}),
        ({"beam_scorer": "gnmt", "gnmt_alpha": 1.0}, {"beam_scorer": "huggingface"}, {}),
        (
            {"num_beams": 4, "num_return_sequences": 3},
            {"num_beams": 2},
            {"num_beams": 2, "num_return_sequences": 2},
        ),
        (
            {"do_sample": True, "num_return_sequences": 3},
            {"temperature": 2.0},
            {"do_sample": True, "num_return_sequences": 3, "temperature": 2.0},
        ),
        (
            {"min_new_tokens": 9, "max_new_tokens": 20},
            {"max_new_tokens": 5},
            {"min_new_tokens": 5, "max_new_tokens": 5},
        ),
        (
            {"min_new_tokens": 9, "max_new_tokens": 20},
            {"max_length": 5},
            {"min_new_tokens": 4, "max_length": 5},
        ),
        (
            {"min_length": 9, "max_length": 20},
            {"max_length": 5},
            {"min_length": 5, "max_length": 5},
        ),
        ({"max_length": 5}, {"max_new_tokens": None, "max_length": None}, {}),
    ],
    ids=range(12),
)
def test_what_is_stored_gives_way(stored, changes, expected):
    config = GenerationConfig(**stored).override(**changes)
    assert config == GenerationConfig(**expected)


@pytest.mark.parametrize(
    ("stored", "changes", "message"),
    [
        ({}, {"num_beams": 1, "early_stopping": True}, "early_stopping applies to beam search"),
        ({"num_beams": 4}, {"do_sample": False, "temperature": 2.0}, "temperature applies to samp"),
        ({"num_beams": 2}, {"num_return_sequences": 3}, "must not exceed num_beams"),
        ({"max_new_tokens": 9}, {"min_new_tokens": 10}, "must not exceed max_new_tokens"),
        ({}, {"num_beams": "two"}, "num_beams must be an integer"),
        ({}, {"beams": 2}, "has no field beams"),
    ],
    ids=range(6),
)
def test_contradictions_within_a_call(stored, changes, message):
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**stored).override(**changes)


def test_one_of_two_lengths_is_set():
    def lengths(config):
        return config.max_new_tokens, config.max_length

    assert lengths(GenerationConfig()) == (64, None)
    assert lengths(GenerationConfig(max_length=7)) == (None, 7)
    assert lengths(SAMPLING.replace(max_new_tokens=5)) == (5, None)
    assert lengths(GENERATION.replace(max_length=5)) == (None, 5)
    assert lengths(SAMPLING.replace(top_k=3)) == (None, 12)
    assert lengths(GenerationConfig.from_dict(SAMPLING.to_dict())) == (None, 12)
    assert lengths(SAMPLING.replace(max_length=None)) == (64, None)
    with pytest.raises(ValueError, match="exclude each other, received 5 and 6. Set one"):
        GenerationConfig(max_new_tokens=5, max_length=6)
    with pytest.raises(ValueError, match="exclude each other"):
        GENERATION.replace(max_new_tokens=5, max_length=6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, received 0"),
        ({"max_length": 1}, "max_length must be an integer of at least 2, received 1"),
        ({"min_new_tokens": 10}, r"must not exceed max_new_tokens \(9\), received 10"),
        ({"min_new_tokens": -1}, "min_new_tokens must be an integer of at least 0"),
        ({"max_length": 3}, r"min_new_tokens must not exceed max_length - 1 \(2\), received 3"),
        ({"max_length": 5, "min_length": 6}, r"min_length must not exceed max_length \(5\), rec"),
        ({"min_length": -1}, "min_length must be an integer of at least 0, received -1"),
        ({"num_beams": 2.0}, "num_beams must be an integer of at least 1, received 2.0"),
        ({"num_return_sequences": 5}, r"not exceed num_beams \(4\), received 5. Raise num_beams"),
        ({"num_return_sequences": 5, "do_sample": True}, "not exceed num_beams"),
        ({"do_sample": 1}, "do_sample must be True or False, received 1"),
        ({"beam_scorer": "t5"}, "beam_scorer must be one of huggingface, gnmt, received 't5'"),
        ({"beam_scorer": ["gnmt"]}, "beam_scorer must be one of huggingface, gnmt, received"),
        ({"length_penalty": "1"}, "length_penalty must be a number, received '1'"),
        ({"gnmt_alpha": True}, "gnmt_alpha must be a number of at least 0, received True"),
        ({"gnmt_alpha": -1}, "gnmt_alpha must be a number of at least 0, received -1"),
        ({"normalize_unfinished": 1}, "normalize_unfinished must be True or False, received 1"),
        (
            {"normalize_unfinished": np.True_},
            "normalize_unfinished must be True or False, received .*True",
        ),
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
        (
            {"num_beams": 1, "num_return_sequences": 1},
            "early_stopping applies to beam search .* received 'never' with num_beams=1",
        ),
        # Only with do_sample.
        ({"temperature": 0.5}, r"temperature applies to sampling \(do_sample=True\) only, rec"),
        ({"top_k": 0}, "top_k applies to sampling .* received 0 with do_sample=False. Leave .* 50"),
        ({"top_p": 0.5}, "top_p applies to sampling"),
        ({"min_p": 0.5}, "min_p applies to sampling"),
        ({"typical_p": 0.5}, "typical_p applies to sampling"),
        ({"seed": 0}, "seed applies to sampling .* received 0 with do_sample=False. Leave .* None"),
        ({"temperature": 0}, "temperature must be a number of at least 0.0001, received 0"),
        ({"temperature": 9e-5}, "temperature must be a number of at least 0.0001, received 9e-05"),
        ({"top_k": -1}, "top_k must be an integer of at least 0, received -1"),
        ({"top_k": 2.5}, "top_k must be an integer of at least 0, received 2.5"),
        ({"top_p": 0}, "top_p must be a number above 0 and at most 1, received 0"),
        ({"top_p": 1.1}, "top_p must be a number above 0 and at most 1, received 1.1"),
        ({"min_p": 2}, "min_p must be a number between 0 and 1, received 2"),
        ({"typical_p": "x"}, "typical_p must be a number above 0 and at most 1, received 'x'"),
        ({"seed": 2**31}, r"seed must be an integer from 0 to 2\*\*31 - 1, received 2147483648"),
        ({"seed": True}, "seed must be an integer from 0 .* received True"),
        # What happens to logits.
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0, received 0"),
        ({"encoder_repetition_penalty": None}, "encoder_repetition_penalty must be .* None"),
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size must be an integer of at least 0"),
        ({"encoder_no_repeat_ngram_size": "2"}, "encoder_no_repeat_ngram_size must be .* '2'"),
        ({"suppress_tokens": [-1]}, "suppress_tokens must be token ids .* received .*-1"),
        ({"suppress_tokens": ["a"]}, "suppress_tokens must be token ids .* received .*'a'"),
        ({"suppress_tokens": [True]}, "suppress_tokens must be token ids .* received .*True"),
        ({"suppress_tokens": 3}, "suppress_tokens must be token ids .* received 3"),
        ({"suppress_tokens": None}, "suppress_tokens must be token ids .* received None"),
        ({"begin_suppress_tokens": "12"}, "begin_suppress_tokens must be token ids .* '12'"),
        ({"bad_words_ids": [5]}, r"bad_words_ids must be sequences of token ids, such as .*\(5,\)"),
        ({"bad_words_ids": [[]]}, "bad_words_ids must be sequences of token ids"),
        ({"sequence_bias": {5: 1.0}}, "sequence_bias must be different sequences of token ids"),
        ({"sequence_bias": [[[5], "1"]]}, "sequence_bias must be different sequences of token ids"),
        ({"sequence_bias": [[[5], 1], [[5], 2]]}, "sequence_bias must be different sequences"),
        ({"sequence_bias": [[5, 1.0], 2]}, "sequence_bias must be different sequences"),
        ({"forced_bos_token_id": [1]}, "forced_bos_token_id must be a token id .* received"),
        ({"forced_eos_token_id": []}, r"forced_eos_token_id must be a token id .* received \(\)"),
        ({"eos_token_id": -1}, "eos_token_id must be a token id .* received -1"),
        ({"eos_token_id": "1"}, "eos_token_id must be a token id .* received '1'"),
        (
            {"exponential_decay_length_penalty": 3},
            "exponential_decay_length_penalty must be an integer of at least 0 .* received 3",
        ),
        ({"exponential_decay_length_penalty": [1.5, 2]}, "exponential_decay_length_penalty must"),
        ({"exponential_decay_length_penalty": [1, 0]}, "exponential_decay_length_penalty must"),
    ],
)
def test_generation_values_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        GENERATION.replace(**changes)


def test_samples_may_be_more_than_beams():
    """With one beam they are independent of each other; with several, the best are returned."""
    assert SAMPLING.num_return_sequences == 3 and SAMPLING.num_beams == 1
    SAMPLING.replace(num_beams=3)
    with pytest.raises(ValueError, match=r"must not exceed num_beams \(2\), received 3"):
        SAMPLING.replace(num_beams=2)


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
