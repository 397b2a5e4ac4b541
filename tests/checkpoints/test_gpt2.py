"""GPT-2: blocks with `norm_first`, checkpoints as transformers writes them, decoder-only models."""

import json
from pathlib import Path

import compare_tokenizers
import keras
import numpy as np
import pytest
import tensorflow as tf

import bertgen_tf as bg
from bertgen_tf.checkpoints.huggingface import comparison
from bertgen_tf.checkpoints.huggingface import loading as huggingface
from tests.helpers import CORPUS, PIECES, write_checkpoint

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

VOCAB = 300
SIZES = {"n_embd": 12, "n_head": 3, "n_layer": 4, "n_inner": 28, "n_positions": 26}


@pytest.fixture(scope="module")
def byte_pair():
    """A byte-level BPE of GPT-2's kind, trained on the corpus."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(CORPUS * 3, vocab_size=VOCAB, special_tokens=["<|endoftext|>"])
    return bpe


def write_gpt2(folder, byte_pair, *, cross=False, seed=0, **changes):
    """A random GPT-2 with its tokenizer, written by transformers."""
    torch.manual_seed(seed)
    end = byte_pair.token_to_id("<|endoftext|>")
    config = transformers.GPT2Config(
        vocab_size=byte_pair.get_vocab_size(),
        bos_token_id=end,
        eos_token_id=end,
        add_cross_attention=cross,
        initializer_range=0.3,
        **{**SIZES, **changes},
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    byte_pair.save_model(str(folder))
    options = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>"}
    options |= {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return model


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, byte_pair):
    folder = tmp_path_factory.mktemp("gpt2") / "checkpoint"
    return write_gpt2(folder, byte_pair), str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("bert") / "checkpoint"))


def ids_of(rng, *shape, size=VOCAB):
    return rng.integers(0, size - 1, shape).astype(np.int32)


def test_language_model_gives_the_logits_of_transformers(gpt2):
    theirs, folder = gpt2
    ids = ids_of(np.random.default_rng(0), 2, 11)
    decoder = bg.BertGenerationDecoder.from_huggingface(folder)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(decoder(ids), expected, atol=1e-4)
    assert decoder.config.max_position_embeddings == SIZES["n_positions"]
    (check,) = comparison.compare_with_huggingface(decoder, folder)
    assert check.passed, check.result


def test_cross_attention_gives_the_logits_of_transformers(tmp_path, byte_pair):
    theirs = write_gpt2(tmp_path, byte_pair, cross=True, seed=3)
    rng = np.random.default_rng(1)
    ids, memory = ids_of(rng, 2, 7), rng.normal(size=(2, 5, 12)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32)
    decoder = bg.BertGenerationDecoder.from_huggingface(tmp_path)
    with torch.no_grad():
        expected = theirs(
            torch.tensor(ids),
            encoder_hidden_states=torch.tensor(memory),
            encoder_attention_mask=torch.tensor(mask),
        ).logits.numpy()
    logits = decoder(ids, encoder_hidden_states=memory, encoder_attention_mask=mask)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    # The same, a token at a time.
    cache = decoder.init_cache(2, 7, memory)
    for i in range(7):
        step, cache = decoder(
            ids[:, i : i + 1], encoder_attention_mask=mask, cache=cache, cache_index=i
        )
        np.testing.assert_allclose(step[:, 0], expected[:, i], atol=1e-4)


def test_layers_that_are_kept(gpt2):
    theirs, folder = gpt2
    ids = ids_of(np.random.default_rng(2), 1, 6)
    kept = bg.BertGenerationDecoder.from_huggingface(folder, num_layers=[0, 2])
    layers = theirs.transformer.h
    theirs.transformer.h = torch.nn.ModuleList([layers[0], layers[2]])
    try:
        with torch.no_grad():
            expected = theirs(torch.tensor(ids), use_cache=False).logits.numpy()
    finally:
        theirs.transformer.h = layers
    np.testing.assert_allclose(kept(ids), expected, atol=1e-4)


def test_a_decoder_only_model_is_the_language_model_on_source_and_target(gpt2, byte_pair):
    theirs, folder = gpt2
    model = bg.warm_start("GPT", decoder=folder, max_target_length=9)
    assert (model.encoder.config.source_positions, model.preprocessor.max_source_length) == (17, 17)
    rng = np.random.default_rng(3)
    sources = [ids_of(rng, 6), ids_of(rng, 3)]
    target = ids_of(rng, 2, 5)
    source = np.full((2, 6), 0, np.int32)
    mask = np.zeros((2, 6), np.int32)
    for row, ids in enumerate(sources):
        source[row, : len(ids)], mask[row, : len(ids)] = ids, 1
    x = {"input_ids": source, "attention_mask": mask, "decoder_input_ids": target}
    logits = model(x).numpy()
    size = byte_pair.get_vocab_size()
    for row, ids in enumerate(sources):
        with torch.no_grad():
            whole = np.concatenate([ids, target[row]])[None]
            expected = theirs(torch.tensor(whole)).logits.numpy()[0, len(ids) :]
        np.testing.assert_allclose(logits[row, :, :size], expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_generation_of_a_decoder_only_model(gpt2, byte_pair, jit_compile):
    theirs, folder = gpt2
    model = bg.warm_start("GPT", decoder=folder, max_target_length=9)
    texts = ["the old man", "who sang? a young woman", ""]
    end = byte_pair.token_to_id("<|endoftext|>")
    options = {"max_new_tokens": 6, "num_beams": 3, "jit_compile": jit_compile}
    bias = np.zeros(model.decoder.config.vocab_size, np.float32)
    bias[byte_pair.get_vocab_size() :] = -1e9  # what the checkpoint does not have
    model.decoder.output_bias.assign(bias)
    output = model.generate(texts, output_scores=True, output_attentions=True, **options)
    for row, text in enumerate(texts):
        # The start token has the embedding of the end token.
        ids = [*byte_pair.encode(text).ids, end]
        with torch.no_grad():
            expected = theirs.generate(
                torch.tensor([ids]),
                num_beams=3,
                max_new_tokens=6,
                do_sample=False,
                pad_token_id=end,
                output_scores=True,
                return_dict_in_generate=True,
            )
        found = output.sequences[row, 0]
        found = found[: 1 + 6].tolist()[1:]
        theirs_ids = expected.sequences[0, len(ids) :].tolist()
        stop = theirs_ids.index(end) + 1 if end in theirs_ids else 6
        assert found[:stop] == theirs_ids[:stop]
        np.testing.assert_allclose(
            output.scores[row, 0], expected.sequences_scores[0].item(), atol=1e-4
        )
    assert output.cross_attentions.shape[:4] == (3, 1, 4, 3)


@pytest.mark.slow
def test_prompts_of_a_decoder_only_model(gpt2):
    model = bg.warm_start("GPT", decoder=gpt2[1], max_target_length=9)
    options = {"decoder_text": "a young", "max_new_tokens": 6, "jit_compile": False}
    prompted = model.generate("the old man", **options)
    assert prompted.startswith("a young")
    assert "".join(model.stream("the old man", **options)) == prompted


GPT_ROWS = ("GPT", "RND2GPT", "BERT2GPT")


def start(name, gpt2, bert, **kwargs):
    keras.utils.set_random_seed(5)
    handles = {"encoder": bert} if name == "BERT2GPT" else {}
    return bg.warm_start(name, decoder=gpt2[1], **handles, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("name", GPT_ROWS)
def test_recipe_trains_and_is_kept(name, gpt2, bert, tmp_path):
    model = start(name, gpt2, bert, max_target_length=9, num_layers=2)
    model.compile(run_eagerly=True)
    sources, targets = CORPUS, CORPUS[::-1]
    batch = model.preprocessor(tf.constant(sources), tf.constant(targets))[0]
    first = model.evaluate(sources, targets, verbose=0)[0]
    model.fit(sources, targets, epochs=3, verbose=0)
    assert model.evaluate(sources, targets, verbose=0)[0] < first
    expected = model(batch).numpy()
    model.save_to_preset(tmp_path / "preset")
    model.save(tmp_path / "model.keras")
    for again in (
        bg.EncoderDecoderModel.from_preset(tmp_path / "preset"),
        keras.models.load_model(tmp_path / "model.keras"),
    ):
        same = again.preprocessor(tf.constant(sources), tf.constant(targets))[0]
        np.testing.assert_array_equal(again(same), expected)
        assert bg.warm_start_report(again) == bg.warm_start_report(model)
    trimmed = bg.trim_vocabulary(model, [*sources, *targets])
    assert trimmed.count_params() < model.count_params()
    small = trimmed.preprocessor(tf.constant(sources), tf.constant(targets))[0]
    kept = [model.preprocessor.target_tokenizer.get_vocab()[piece] for piece in _pieces(trimmed)]
    np.testing.assert_allclose(trimmed(small), np.take(expected, kept, axis=-1), atol=1e-5)
    model.quantize("int8")
    assert np.corrcoef(model(batch).numpy().ravel(), expected.ravel())[0, 1] > 0.99
    model.save_to_preset(tmp_path / "int8")
    again = bg.EncoderDecoderModel.from_preset(tmp_path / "int8")
    np.testing.assert_array_equal(again(batch), model(batch))


def _pieces(model):
    vocabulary = model.preprocessor.target_tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.get)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT", "BERT2GPT"])
def test_recipe_is_exported(name, gpt2, bert, tmp_path):
    # The export is compared with the model, in a process of its own. RND2GPT has no part that the
    # others lack.
    model = start(name, gpt2, bert, max_target_length=9, num_layers=1)
    if name == "BERT2GPT":
        model.quantize("int8")
    path = bg.export_saved_model(
        model, tmp_path / "name" / "1", max_new_tokens=4, num_beams=2, max_batch_size=2
    )
    served = tf.saved_model.load(path)
    answers = served.signatures["attention"](tf.constant(CORPUS))
    assert [text.decode() for text in answers["text"].numpy()] == model.generate(
        CORPUS, max_new_tokens=4, num_beams=2, jit_compile=False
    )


@pytest.mark.slow
def test_two_vocabularies(gpt2, bert, byte_pair):
    model = start("BERT2GPT", gpt2, bert, num_layers=1)
    batch = model.preprocessor(tf.constant(CORPUS), tf.constant(CORPUS))[0]
    source = batch["input_ids"][0].numpy()
    pieces = model.tokenizer.convert_ids_to_tokens(
        source[: batch["attention_mask"][0].numpy().sum()]
    )
    assert pieces[:3] == ["[CLS]", "the", "old"] and pieces[-1] == "[SEP]"
    target = byte_pair.encode(CORPUS[0]).ids
    found = batch["decoder_input_ids"][0].numpy()
    assert found[0] == model.decoder.config.bos_token_id == byte_pair.get_vocab_size() + 1
    assert found[1 : 1 + len(target)].tolist() == target[: len(found) - 1]
    assert model.encoder.config.vocab_size == len(PIECES)
    options = {"max_new_tokens": 4, "jit_compile": False, "decoder_text": "a young"}
    said = model.generate(CORPUS[0], **options)
    assert said.startswith("a young") and len(said) > len("a young")
    assert "".join(model.stream(CORPUS[0], **options)) == said
    for name in ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"):
        with pytest.raises(ValueError, match=f"{name} needs .* one vocabulary"):
            model.generate("the", **{name: 2})
    with pytest.raises(ValueError, match="keep must be texts"):
        bg.trim_vocabulary(model, [7, 8])
    with pytest.raises(ValueError, match="one tokenizer"):
        bg.EncoderDecoderModel(
            bg.BertGenerationEncoder.from_huggingface(bert),
            bg.BertGenerationDecoder.from_huggingface(bert),
            bg.BertTokenizer(list(PIECES)),
            decoder_tokenizer=bg.BertTokenizer(list(PIECES)),
        ).save_to_huggingface("nowhere")


@pytest.mark.slow
def test_mixed_precision(gpt2, bert):
    policy = keras.config.dtype_policy()
    batch = {"input_ids": [[3, 9, 4]], "decoder_input_ids": [[5, 7]]}
    batch = {name: np.array(ids) for name, ids in batch.items()}
    models = {}
    try:
        for dtype in ("float32", "mixed_bfloat16"):
            keras.config.set_dtype_policy(dtype)
            models[dtype] = [start(name, gpt2, bert, num_layers=2) for name in ("GPT", "BERT2GPT")]
    finally:
        keras.config.set_dtype_policy(policy)
    for exact, mixed in zip(*models.values(), strict=True):
        assert mixed.decoder.blocks[0].compute_dtype == "bfloat16"
        logits = mixed(batch)
        assert logits.dtype == tf.float32
        assert np.corrcoef(logits.numpy().ravel(), exact(batch).numpy().ravel())[0, 1] > 0.99
        text = mixed.generate("the old man", max_new_tokens=3, num_beams=2, jit_compile=False)
        assert isinstance(text, str)


def test_cross_attention_as_a_copy(gpt2, bert):
    model = start("BERT2GPT", gpt2, bert, cross_attention="self_attention", num_layers=[0, 2])
    block = model.decoder.blocks[1]
    np.testing.assert_array_equal(
        block.cross_attention.layer_norm.gamma, block.self_attention.layer_norm.gamma
    )
    assert len(model.encoder.blocks) == len(model.decoder.blocks) == 2


def test_sharing_pre_norm_stacks():
    config = bg.BertGenerationConfig(
        vocab_size=31, hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=20, max_position_embeddings=9, norm_first=True,
    )  # fmt: skip
    encoder = bg.BertGenerationEncoder(config)
    crossed = config.replace(add_cross_attention=True)
    decoder = bg.BertGenerationDecoder(crossed, encoder, "all")
    assert decoder.final_norm is encoder.final_norm
    hidden = encoder(np.array([[5, 6, 7]])).numpy()
    np.testing.assert_allclose(hidden.mean(axis=-1), 0, atol=1e-5)
    with pytest.raises(ValueError, match=r"differ in norm_first \(True and False\)"):
        bg.BertGenerationDecoder(crossed.replace(norm_first=False), encoder, "all")
    with pytest.raises(ValueError, match="needs sharing='all'"):
        bg.BertGenerationDecoder(config.replace(source_positions=4), encoder, "word_embeddings")
    with pytest.raises(ValueError, match="BERT's blocks"):
        encoder.save_to_huggingface("nowhere")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx=True"),
        ("embd_pdrop", 0.3, "embd_pdrop=0.3"),
        ("n_positions", 27, r"wpe.weight has shape \(26, 12\), not \(27, 12\)"),
        ("n_layer", 5, "there are 4 layers"),
        ("tie_word_embeddings", False, r"tie_word_embeddings=False \(only True\)"),
    ],
)
def test_what_cannot_be_followed_is_refused(field, value, words, tmp_path, gpt2):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((Path(gpt2[1]) / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ValueError, match=words):
        bg.BertGenerationDecoder.from_huggingface(tmp_path)


def test_wrong_checkpoints_are_refused_before_they_are_read(gpt2, bert, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface.files, "read_tensors", None)
    _, folder = gpt2
    wide = str(write_checkpoint(tmp_path / "wide", hidden_size=15))
    for name, arguments, words in (
        ("BERT2GPT", {"encoder": folder, "decoder": folder}, "encoder= .*bert.* type gpt2"),
        ("BERT2GPT", {"encoder": bert, "decoder": bert}, "decoder= .*gpt2.* type bert"),
        ("BERT2GPT", {"encoder": bert}, "needs decoder="),
        ("GPT", {"encoder": bert, "decoder": folder}, "decoder-only and takes no encoder="),
        ("GPT", {"decoder": folder, "cross_attention": "self_attention"}, "no cross-attention"),
        ("RND2GPT", {"encoder": bert, "decoder": folder}, "random encoder"),
        ("BERT2GPT", {"encoder": wide, "decoder": folder}, "one hidden_size.*15.*12"),
        ("GPT", {"decoder": folder, "decoder_tokenizer": 1}, "one vocabulary"),
    ):
        with pytest.raises(ValueError, match=words):
            bg.warm_start(name, **arguments)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="max_target_length must leave .* of 26 .* received 26"):
        bg.warm_start("GPT", decoder=folder, max_target_length=26)
    with pytest.raises(ValueError, match="holds a GPT-2, which is a decoder"):
        bg.BertGenerationEncoder.from_huggingface(folder)


def test_tool_compares_tokenizers(gpt2, tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.write_text("".join(f"{text}\n" for text in (*CORPUS, "don't,  you're\tnew", "")))
    assert compare_tokenizers.main([gpt2[1], str(texts)]) == 0
    assert capsys.readouterr().out == "5 of 5 texts are cut the same\n"
    # The form of the originals: GPT-2's ids behind 101 others, each text behind a space.
    from sentencepiece import sentencepiece_model_pb2

    own = compare_tokenizers.load_ours(Path(gpt2[1]))
    stored = sentencepiece_model_pb2.ModelProto.FromString(own._proto)
    pieces = [piece for piece in stored.pieces if piece.piece not in ("<pad>", "<s>", "<unk>")]
    names = ["<pad>", "</s>", "<s>", *(f"<reserved {i}>" for i in range(97)), "<unk>"]
    kinds = stored.SentencePiece
    del stored.pieces[:]
    for name in names:
        kind = kinds.UNKNOWN if name == "<unk>" else kinds.CONTROL
        stored.pieces.add(piece=name, score=0.0, type=kind)
    stored.pieces.extend(pieces)
    spec = stored.trainer_spec
    spec.pad_id, spec.eos_id, spec.bos_id, spec.unk_id = 0, 1, 2, 100
    spec.pad_piece, spec.eos_piece, spec.bos_piece, spec.unk_piece = "<pad>", "</s>", "<s>", "<unk>"
    stored.normalizer_spec.add_dummy_prefix = True
    model = tmp_path / "spiece.model"
    model.write_bytes(stored.SerializeToString())
    texts.write_text("".join(f"{text}\n" for text in CORPUS))
    assert compare_tokenizers.main([gpt2[1], str(texts), "--spiece", str(model)]) == 0
    stored.pieces.insert(0, stored.pieces[3])
    stored.pieces[0].piece = "<one more>"
    spec.pad_id, spec.eos_id, spec.bos_id, spec.unk_id = 1, 2, 3, 101
    model.write_bytes(stored.SerializeToString())
    capsys.readouterr()
    assert compare_tokenizers.main([gpt2[1], str(texts), "--spiece", str(model)]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"0 of {len(CORPUS)} texts are cut the same\n0 of the other")
    assert compare_tokenizers.main([str(tmp_path), str(texts)]) == 2


def test_added_tokens_keep_their_ids(gpt2, byte_pair, tmp_path):
    """A GPT-2 whose embeddings were resized for a padding token and a separator."""
    size = byte_pair.get_vocab_size()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((Path(gpt2[1]) / name).read_bytes())
    options = json.loads((Path(gpt2[1]) / "tokenizer_config.json").read_text())
    options |= {"pad_token": "[PAD]"}
    options["added_tokens_decoder"] = {
        str(size): {"content": "[PAD]"}, str(size + 1): {"content": "<sep>"}
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    tokenizer = compare_tokenizers.load_ours(tmp_path)
    assert tokenizer.pad_token_id == size
    assert tokenizer.convert_tokens_to_ids("<sep>") == size + 1
    assert (tokenizer.bos_token_id, tokenizer.unk_token_id) == (size + 2, size + 3)
    assert tokenizer.eos_token_id == byte_pair.token_to_id("<|endoftext|>")


@pytest.mark.parametrize("name", ["ROBERTASHARE", "ROBERTA2GPT", "RND2ROBERTA"])
def test_roberta_checkpoints(name, gpt2, tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    torch.manual_seed(2)
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(CORPUS, vocab_size=290, special_tokens=specials)
    config = transformers.RobertaConfig(
        vocab_size=bpe.get_vocab_size(),
        hidden_size=12,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=20,
        max_position_embeddings=24,
        type_vocab_size=1,
        initializer_range=0.3,
    )
    theirs = transformers.RobertaForMaskedLM(config).eval()
    folder = tmp_path / "roberta"
    theirs.save_pretrained(folder)
    bpe.save_model(str(folder))
    handles = {"ROBERTA2GPT": {"encoder": folder, "decoder": gpt2[1]}}
    side = "decoder" if name.startswith("RND") else "encoder"
    model = bg.warm_start(name, **handles.get(name, {side: folder}))
    ids = np.array([[0, *bpe.encode(CORPUS[1]).ids[:9], 2]], np.int32)
    read = model.preprocessor.encode_source([CORPUS[1]]).to_tensor().numpy()
    np.testing.assert_array_equal(read[0, :10], ids[0, :10])
    with torch.no_grad():
        expected = theirs.roberta(torch.tensor(ids)).last_hidden_state.numpy()
    same = np.allclose(model.encoder(ids), expected, atol=1e-4)
    assert same == (name != "RND2ROBERTA")
    two = name == "ROBERTA2GPT"
    assert (model.decoder_tokenizer is not None) == two
    assert model.decoder.config.norm_first == two
    words = model.decoder.embeddings.word_embeddings
    assert (words is model.encoder.embeddings.word_embeddings) != two
    assert isinstance(model.generate(CORPUS[0], max_new_tokens=2, jit_compile=False), str)


def test_a_random_decoder_with_a_vocabulary_of_its_own(bert, spiece):
    tokenizer = bg.BertGenerationTokenizer(spiece)
    model = bg.warm_start("BERT2RND", encoder=bert, decoder_tokenizer=tokenizer)
    assert model.decoder.config.vocab_size == tokenizer.vocab_size != len(PIECES)
    report = bg.warm_start_report(model)
    assert report.initialised == model.encoder.count_params()
    both = bg.warm_start("RND2RND", encoder=bert, tokenizer=tokenizer)
    assert both.encoder.config.vocab_size == both.decoder.config.vocab_size == tokenizer.vocab_size
    assert both.encoder.config.hidden_size == 12 and both.decoder_tokenizer is None
