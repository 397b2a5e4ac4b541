"""The real transformers on what we saved, and we on what it saved; needs the extra `compare`."""

import copy

import numpy as np
import pytest

import bertgen_tf as bg
from bertgen_tf import config
from bertgen_tf.checkpoints.huggingface.config import HIDDEN_ACTS, read_pair, read_stack
from bertgen_tf.network.layers import activation
from tests.helpers import CORPUS, PIECES, make_model

torch = pytest.importorskip("torch", reason="needs the extra compare (transformers and torch)")
transformers = pytest.importorskip(
    "transformers", reason="needs the extra compare (transformers and torch)"
)

RNG = np.random.default_rng(5)
MASK = np.array([[1] * 9, [1] * 6 + [0] * 3, [1] * 2 + [0] * 7])
TARGET_MASK = np.array([[1] * 7, [1] * 3 + [0] * 4, [1] * 7])


def random_ids(mask, vocab_size, first=6, padding=0):
    return np.where(mask == 1, RNG.integers(first, vocab_size, mask.shape), padding)


def tensors(**arrays):
    return {name: torch.tensor(np.asarray(array)) for name, array in arrays.items()}


def assert_close(ours, theirs, mask):
    ours, theirs = np.asarray(ours)[mask == 1], theirs.detach().numpy()[mask == 1]
    tolerance = 1e-5 * max(1, np.abs(theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def until(ids, end):
    ids = [*list(ids)[1:], end]
    return ids[: ids.index(end)]


def load(kind, folder):
    """Nothing may be missing or left over."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharing", "shard_size"), [("none", "5GB"), ("word_embeddings", 9000), ("all", 9000)]
)
def test_encoder_decoder(tmp_path, sharing, shard_size):
    settings = bg.GenerationConfig(max_new_tokens=7, min_new_tokens=2, suppress_tokens=(9, 11))
    model = make_model(sharing, generation_config=settings)
    model.save_to_huggingface(tmp_path / "out", max_shard_size=shard_size)
    theirs = load(transformers.EncoderDecoderModel, tmp_path / "out")
    ids = random_ids(MASK, len(PIECES))
    source = {"input_ids": ids, "attention_mask": MASK}
    batch = {
        **source,
        "decoder_input_ids": random_ids(TARGET_MASK, len(PIECES)),
        "decoder_attention_mask": TARGET_MASK,
    }
    output = theirs(**tensors(**batch))
    assert_close(model.encoder(ids, MASK), output.encoder_last_hidden_state, MASK)
    assert_close(model(batch), output.logits, TARGET_MASK)
    for options in (
        {},  # the settings of the folder
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
        {"num_beams": 4, "early_stopping": True},
    ):
        generated = theirs.generate(**tensors(**source), **options).numpy()
        sequences = model.generate(source, jit_compile=False, **options).sequences
        ours = sequences.reshape(len(generated), -1)
        for one, two in zip(ours.tolist(), generated.tolist(), strict=True):
            assert until(one, 4) == until(two, 4)
    # What transformers saves again can be read again.
    theirs.save_pretrained(tmp_path / "again")
    again = bg.EncoderDecoderModel.from_huggingface(tmp_path / "again", tokenizer=model.tokenizer)
    configs = [{**m.get_config(), "source_checkpoint": None} for m in (again, model)]
    assert configs[0] == configs[1]  # but for the folder that they were read from
    for one, two in zip(again.weights, model.weights, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("sharing", ["word_embeddings", "all"])
def test_what_it_trains_it_also_unties(tmp_path, sharing):
    """Version 5 keeps tie_encoder_decoder and our key, and has two stacks; its numbers count."""
    make_model(sharing).save_to_huggingface(tmp_path / "out")
    theirs = load(transformers.EncoderDecoderModel, tmp_path / "out")
    if theirs.encoder.embeddings.word_embeddings is theirs.decoder.get_input_embeddings():
        pytest.skip("this version of transformers ties the stacks")
    with torch.no_grad():
        for parameter in theirs.encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "trained")
    model = bg.EncoderDecoderModel.from_huggingface(
        tmp_path / "trained", tokenizer=bg.BertTokenizer(list(PIECES))
    )
    assert model.decoder.sharing == "none"
    batch = {
        "input_ids": random_ids(MASK, len(PIECES)),
        "attention_mask": MASK,
        "decoder_input_ids": random_ids(TARGET_MASK, len(PIECES)),
        "decoder_attention_mask": TARGET_MASK,
    }
    assert_close(model(batch), theirs(**tensors(**batch)).logits, TARGET_MASK)
    # It is theirs now, and is not overwritten.
    with pytest.raises(FileExistsError, match="holds other files"):
        model.save_to_huggingface(tmp_path / "trained")


def test_gnmt_is_not_taken_for_a_length_penalty(tmp_path):
    settings = bg.GenerationConfig(
        max_new_tokens=7, num_beams=4, beam_scorer="gnmt", gnmt_alpha=0.9
    )
    make_model(generation_config=settings).save_to_huggingface(tmp_path / "out")
    theirs = load(transformers.EncoderDecoderModel, tmp_path / "out").generation_config
    assert (theirs.num_beams, theirs.max_new_tokens, theirs.length_penalty) == (4, 7, None)


def test_lone_stacks(tmp_path, model):
    model.encoder.save_to_huggingface(tmp_path / "encoder")
    model.decoder.save_to_huggingface(tmp_path / "decoder")
    ids = random_ids(MASK, len(PIECES))
    theirs = load(transformers.BertGenerationEncoder, tmp_path / "encoder")
    memory = theirs(**tensors(input_ids=ids, attention_mask=MASK)).last_hidden_state
    assert_close(model.encoder(ids, MASK), memory, MASK)
    decoder = load(transformers.BertGenerationDecoder, tmp_path / "decoder")
    memory = RNG.normal(size=(3, 9, 12)).astype(np.float32)
    inputs = {
        "input_ids": random_ids(TARGET_MASK, len(PIECES)),
        "attention_mask": TARGET_MASK,
        "encoder_hidden_states": memory,
        "encoder_attention_mask": MASK,
    }
    assert_close(model.decoder(**inputs), decoder(**tensors(**inputs)).logits, TARGET_MASK)
    config = model.decoder.config.replace(add_cross_attention=False)
    alone = bg.BertGenerationDecoder(config)
    alone.save_to_huggingface(tmp_path / "alone")
    other = load(transformers.AutoModelForCausalLM, tmp_path / "alone")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert_close(alone(**inputs), other(**tensors(**inputs)).logits, TARGET_MASK)


TEXTS = [*CORPUS, "The OLD man, the house.", "an owl; a fox?", ""]


@pytest.mark.parametrize("mask", ["[MASK]", "none"])
@pytest.mark.parametrize("lowercase", [True, False])
def test_word_piece_tokenizer(tmp_path, lowercase, mask):
    tokenizer = bg.BertTokenizer(list(PIECES), lowercase=lowercase, mask_token=mask)
    make_model(make_tokenizer=lambda: tokenizer).save_to_huggingface(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(theirs) == tokenizer.vocab_size
    for text in TEXTS:
        ids = tokenizer(text).numpy().tolist()
        assert theirs(text, add_special_tokens=False).input_ids == ids
    for role in ("pad", "bos", "eos", "unk", "sep", "mask"):
        token = getattr(tokenizer, f"{role}_token_id")
        assert getattr(theirs, f"{role}_token_id") == token
    assert theirs("the").input_ids == [3, *tokenizer("the").numpy().tolist(), 4]
    # What it saves (no vocab.txt, in version 5) can be read again.
    theirs.save_pretrained(tmp_path / "out")
    (tmp_path / "out/vocab.txt").unlink(missing_ok=True)
    again = bg.EncoderDecoderModel.from_huggingface(tmp_path / "out").tokenizer
    assert again.get_vocab() == tokenizer.get_vocab() and again.lowercase == lowercase


@pytest.mark.parametrize("sep", ["<::::>", "none"])
def test_sentencepiece_tokenizer(tmp_path, spiece, sep):
    tokenizer = bg.BertGenerationTokenizer(spiece, sep_token=sep)
    make_model(make_tokenizer=lambda: tokenizer).save_to_huggingface(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == "BertGenerationTokenizer"
    assert len(theirs) == tokenizer.vocab_size
    for text in TEXTS:
        assert theirs(text).input_ids == tokenizer(text).numpy().tolist()
    for role in ("pad", "bos", "eos", "unk", "sep"):
        token = getattr(tokenizer, f"{role}_token_id")
        assert getattr(theirs, f"{role}_token_id") == token


def test_activations_that_are_one():
    """Each name that is accepted is one of ours, and none that is refused would be."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.linspace(-1, 1, 2001)])
    ours = {name: activation(name)(x.numpy()).numpy() for name in config.HIDDEN_ACTS}
    for name in transformers.activations.ACT2FN:
        theirs = transformers.activations.ACT2FN[name](x).detach().numpy()
        near = [n for n, y in ours.items() if np.abs(theirs - y).max() < 1e-5]
        assert near == [HIDDEN_ACTS[name]] if name in HIDDEN_ACTS else not near


def test_what_transformers_writes_is_known(recwarn):
    """All fields of its classes, with their defaults."""
    make = {kind: getattr(transformers, f"{kind}Config") for kind in ("Bert", "Roberta", "GPT2")}
    stacks = [make_config() for make_config in (*make.values(), transformers.BertGenerationConfig)]
    for stack in stacks:
        read_stack(stack.to_dict(), stack.model_type)
    for stack in (stacks[0], stacks[1], stacks[3]):
        pair = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
            stack, copy.deepcopy(stack)
        )
        read_pair(pair.to_dict(), None, stack.model_type)
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
@pytest.mark.parametrize("task", ["Model", "ForMaskedLM", "ForSequenceClassification"])
def test_bert_and_roberta(tmp_path, kind, task):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=83,
        hidden_size=15,
        num_hidden_layers=3,
        num_attention_heads=5,
        intermediate_size=14,
        max_position_embeddings=19,
        initializer_range=0.3,
        hidden_act="gelu_new",
    )
    torch.manual_seed(3)
    theirs = getattr(transformers, kind + task)(config).eval()
    theirs.save_pretrained(tmp_path / "out")
    stack = theirs if task == "Model" else getattr(theirs, kind.lower())
    ids = random_ids(MASK, 83, padding=config.pad_token_id)
    expected = stack(**tensors(input_ids=ids, attention_mask=MASK)).last_hidden_state
    encoder = bg.BertGenerationEncoder.from_huggingface(tmp_path / "out")
    assert_close(encoder(ids, MASK), expected, MASK)
    if kind == "Roberta":
        decoder = bg.BertGenerationDecoder.from_huggingface(tmp_path / "out")
        assert decoder.config.add_cross_attention and decoder.config.eos_token_id == 2
        model = bg.EncoderDecoderModel.from_huggingface(encoder=tmp_path / "out", share=True)
        assert_close(model.encoder(ids, MASK), expected, MASK)
