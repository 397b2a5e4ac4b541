"""Hugging Face's own BERT2BERT and RoBERTa2RoBERTa, as the real transformers makes and runs them.

Needs the extra `compare`.
"""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from safetensors.numpy import load_file, save_file

import bertgen_tf as bg
from bertgen_tf.checkpoints.huggingface import comparison
from tests.helpers import CORPUS, PIECES, eagerly
from tests.helpers.huggingface import assert_close, assert_same_model

torch = pytest.importorskip("torch", reason="needs the extra compare (transformers and torch)")
transformers = pytest.importorskip(
    "transformers", reason="needs the extra compare (transformers and torch)"
)

MASK = np.array([[1] * 9, [1] * 6 + [0] * 3, [1] * 2 + [0] * 7])
TARGET_MASK = np.array([[1] * 7, [1] * 3 + [0] * 4, [1] * 7])
SIZES = {
    "vocab_size": len(PIECES),
    "hidden_size": 12,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 26,
    "initializer_range": 0.5,
}
IDS = {"pad_token_id": 0, "decoder_start_token_id": 3, "eos_token_id": 4}


def make_theirs(kind, *, shared=False, ids=IDS, **decoder):
    """A random pair of `kind`; with `shared`, of equal stacks, as transformers 4 shared them."""
    torch.manual_seed(7)
    make = getattr(transformers, f"{kind}Config")
    further = {} if shared else {"num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        make(**SIZES), make(**{**SIZES, **further, **decoder}), **ids
    )
    theirs = transformers.EncoderDecoderModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:  # zeros and ones hide mistakes
                parameter.add_(0.3 * torch.randn_like(parameter))
        if shared:
            stack = getattr(theirs.decoder, kind.lower())
            own = dict(theirs.encoder.named_parameters())
            for name, parameter in stack.named_parameters():
                if name in own:
                    parameter.copy_(own[name])
    return theirs


def write(theirs, folder, shared=False, tokenizer=True):
    theirs.save_pretrained(folder)
    if tokenizer:
        (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in PIECES))
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    if shared:  # transformers 4 wrote one of the two, and the flag
        tensors = load_file(folder / "model.safetensors")
        prefix = f"decoder.{theirs.decoder.base_model_prefix}."
        for name in list(tensors):
            if name.startswith(prefix) and "encoder." + name.removeprefix(prefix) in tensors:
                del tensors[name]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "tie_encoder_decoder": True}))
    return folder


def tensors(**arrays):
    return {name: torch.tensor(np.asarray(array)) for name, array in arrays.items()}


def make_batch(padding):
    rng = np.random.default_rng(5)
    source, target = (
        np.where(mask == 1, rng.integers(6, len(PIECES), mask.shape), padding)
        for mask in (MASK, TARGET_MASK)
    )
    return {
        "input_ids": source,
        "attention_mask": MASK,
        "decoder_input_ids": target,
        "decoder_attention_mask": TARGET_MASK,
    }


def assert_same_outputs(model, theirs, searches):
    batch = make_batch(theirs.config.encoder.pad_token_id)
    output = theirs(**tensors(**batch))
    memory = model.encoder(batch["input_ids"], MASK)
    assert_close(memory, output.encoder_last_hidden_state.detach(), MASK)
    assert_close(model(batch), output.logits.detach(), TARGET_MASK)
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    end = model.decoder.config.eos_token_id
    for options in searches:
        # RoBERTa would give padding inside a text no position.
        options = {"max_new_tokens": 7, "suppress_tokens": [0, 1], **options}
        generated = theirs.generate(**tensors(**source), **options).numpy()
        with eagerly():
            ours = model.generate(source, jit_compile=False, **options).sequences
        for one, two in zip(ours.reshape(len(generated), -1), generated, strict=True):
            assert until(one, end) == until(two, end)


def until(ids, end):
    ids = [*np.asarray(ids).tolist()[1:], end]
    return ids[: ids.index(end)]


GREEDY, BEAMS = {}, {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5}


@pytest.mark.parametrize(
    ("kind", "shared", "decoder"),
    [
        pytest.param("Bert", False, {}, marks=pytest.mark.slow),
        ("Bert", False, {"tie_word_embeddings": False, "hidden_act": "gelu_fast"}),
        pytest.param("Bert", True, {}, marks=pytest.mark.slow),
        pytest.param("Roberta", False, {"tie_word_embeddings": False}, marks=pytest.mark.slow),
        ("Roberta", True, {"hidden_act": "gelu"}),
    ],
)
def test_pairs(tmp_path, kind, shared, decoder):
    """Read, kept as a preset, written back and read by transformers: always the same numbers."""
    theirs = make_theirs(kind, shared=shared, **decoder)
    folder = write(theirs, tmp_path / "theirs", shared, tokenizer=kind == "Bert")
    model = bg.EncoderDecoderModel.from_huggingface(folder)
    assert model.decoder.sharing == ("all" if shared else "none")
    fast = decoder.get("hidden_act") == "gelu_fast"
    assert model.decoder.config.head_transform == ("gelu_new" if fast else "gelu")
    assert_same_outputs(model, theirs, [BEAMS] if shared else [GREEDY])
    if shared:  # the stack that is missing in the file is filled, and the head that is tied to it
        loaded = comparison._load(transformers, model, str(folder))
        batch = make_batch(theirs.config.encoder.pad_token_id)
        logits = [each(**tensors(**batch)).logits for each in (loaded, theirs)]
        assert_close(*(each.detach() for each in logits), TARGET_MASK)
    model.save_to_preset(tmp_path / "preset")
    assert_same_model(bg.EncoderDecoderModel.from_preset(tmp_path / "preset"), model)
    model.save_to_huggingface(tmp_path / "ours")
    again, info = transformers.EncoderDecoderModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again.decoder).__name__ == "BertLMHeadModel"
    batch = make_batch(theirs.config.encoder.pad_token_id)
    logits = [each(**tensors(**batch)).logits.detach() for each in (again.eval(), theirs)]
    assert_close(*logits, TARGET_MASK)
    assert_same_model(bg.EncoderDecoderModel.from_huggingface(tmp_path / "ours"), model)


def test_what_follows_from_reading_one(tmp_path):
    """It trains, in one step as in PyTorch, becomes int8, and texts have the tokens of BERT's."""
    theirs = make_theirs("Bert", tie_word_embeddings=False)
    folder = write(theirs, tmp_path / "theirs")
    model = bg.EncoderDecoderModel.from_huggingface(folder)
    read = transformers.AutoTokenizer.from_pretrained(folder)
    ids = model.preprocessor.generate_preprocess(tf.constant(CORPUS))["input_ids"]
    assert ids.numpy().tolist() == read(CORPUS, padding=True).input_ids
    batch = make_batch(0)
    labels = np.roll(batch["decoder_input_ids"], -1, axis=1)
    before = np.asarray(model(batch))
    quantized = bg.EncoderDecoderModel.from_huggingface(folder)
    quantized.quantize("int8")
    quantized.save_to_preset(tmp_path / "int8")
    again = bg.EncoderDecoderModel.from_preset(tmp_path / "int8")
    int8 = np.asarray(quantized(batch))
    np.testing.assert_array_equal(again(batch), int8)
    assert again.decoder.head_transform.dense.kernel.dtype == "int8"
    assert 0 < np.abs(int8 - before).max() < 0.1 * np.abs(before).max()
    with pytest.raises(ValueError, match="float32 matrices"):
        quantized.save_to_huggingface(tmp_path / "no")

    for parameter in theirs.parameters():
        parameter.grad = None
    logits = theirs(**tensors(**batch)).logits
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), torch.tensor(labels), reduction="none"
    )
    (losses * torch.tensor(TARGET_MASK)).sum().div(TARGET_MASK.sum()).backward()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            # Token types are in the positions here, and would learn the same once more.
            if parameter.grad is not None and "token_type" not in name:
                parameter.sub_(0.2 * parameter.grad)
    for stack in (model.encoder, model.decoder):
        for layer in stack._flatten_layers():
            if isinstance(layer, keras.layers.Dropout):
                layer.rate = 0.0
    model.compile(keras.optimizers.SGD(0.2), run_eagerly=True, weighted_metrics=[])
    model.train_on_batch(batch, labels, TARGET_MASK.astype(np.float32))
    assert_close(model(batch), theirs(**tensors(**batch)).logits.detach(), TARGET_MASK)
    assert np.abs(model(batch) - before).max() > 0.1


@pytest.mark.slow
def test_export(tmp_path):
    theirs = make_theirs("Bert", shared=True)
    model = bg.EncoderDecoderModel.from_huggingface(write(theirs, tmp_path / "theirs", True))
    model.quantize("int8")
    options = {"max_new_tokens": 5, "no_repeat_ngram_size": 1}
    bg.export_saved_model(model, tmp_path / "export/1", check=False, **options)
    serve = tf.saved_model.load(tmp_path / "export/1").signatures["serving_default"]
    served = serve(tf.constant(CORPUS))
    texts = model.generate(CORPUS, jit_compile=False, **options)
    assert [text.decode() for text in served["text"].numpy()] == texts


def test_lone_decoders(tmp_path):
    ids = make_batch(1)["decoder_input_ids"]
    memory = np.random.default_rng(3).normal(size=(*MASK.shape, 12)).astype(np.float32)
    for kind, crossed in (("Bert", True), ("Roberta", False)):
        config = getattr(transformers, f"{kind}Config")(
            **SIZES, is_decoder=True, add_cross_attention=crossed
        )
        theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
        theirs.save_pretrained(tmp_path / kind)
        inputs = {"input_ids": ids, "attention_mask": TARGET_MASK}
        if crossed:
            inputs |= {"encoder_hidden_states": memory, "encoder_attention_mask": MASK}
        expected = theirs(**tensors(**inputs)).logits.detach()
        decoder = bg.BertGenerationDecoder.from_huggingface(tmp_path / kind)
        with pytest.raises(ValueError, match="BertGenerationDecoder.from_huggingface reads it"):
            bg.BertGenerationEncoder.from_huggingface(tmp_path / kind)
        assert_close(decoder(**inputs), expected, TARGET_MASK)
        decoder.save_to_huggingface(tmp_path / f"{kind} again")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{kind} again")
        assert_close(again.eval()(**tensors(**inputs)).logits.detach(), expected, TARGET_MASK)
        # Cross-attention can be added, and layers left out.
        fewer = bg.BertGenerationDecoder.from_huggingface(
            tmp_path / kind, num_layers=1, cross_attention="random"
        )
        kernel = decoder.head_transform.dense.kernel
        np.testing.assert_array_equal(fewer.head_transform.dense.kernel, kernel)
        assert len(fewer.blocks) == 1 and fewer.config.add_cross_attention


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_ids_that_are_not_given(tmp_path):
    """BERT has none of its own: those of its [CLS] and [SEP] then."""
    folder = write(make_theirs("Bert", ids={}), tmp_path / "theirs")
    (folder / "generation_config.json").unlink()
    config = bg.EncoderDecoderModel.from_huggingface(folder).decoder.config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 3, 4)
    (folder / "vocab.txt").unlink()
    with pytest.raises(ValueError, match="no bos_token_id and eos_token_id .* no vocabulary"):
        bg.EncoderDecoderModel.from_huggingface(folder)


def test_what_is_refused(tmp_path):
    read = bg.EncoderDecoderModel.from_huggingface
    bert = write(make_theirs("Bert"), tmp_path / "bert")
    (bert / "generation_config.json").unlink()
    change(bert, decoder_start_token_id=1)
    with pytest.raises(
        ValueError, match=r"\[CLS\] and \[SEP\], of the ids \[3, 4\].*add_bos=False"
    ):
        read(bert)
    assert read(bert, add_bos=False, add_eos=False).decoder.config.bos_token_id == 1
    change(bert, decoder_start_token_id=3)
    values = load_file(bert / "model.safetensors")
    values["decoder.cls.predictions.decoder.weight"] = values[
        "decoder.bert.embeddings.word_embeddings.weight"
    ][::-1].copy()
    save_file(values, bert / "model.safetensors")
    with pytest.raises(ValueError, match="tied .* differ. .*tie_word_embeddings to false"):
        read(bert)
    roberta = write(make_theirs("Roberta"), tmp_path / "roberta", tokenizer=False)
    (roberta / "generation_config.json").unlink()
    change(roberta, decoder_start_token_id=1)
    with pytest.raises(ValueError, match="start_token_id=1 .only another than RoBERTa's pad"):
        read(roberta)
    stack = bg.BertGenerationConfig(
        vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=3, max_position_embeddings=5, hidden_act="relu", head_transform="gelu",
    )  # fmt: skip
    with pytest.raises(ValueError, match="equal to its hidden_act .* 'gelu' and 'relu'"):
        bg.BertGenerationDecoder(stack).save_to_huggingface(tmp_path / "no")
