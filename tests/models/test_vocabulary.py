import numpy as np
import pytest
import sentencepiece

import bertgen_tf as bg
from bertgen_tf.network.weights import named_variables
from tests.helpers import CORPUS, PIECES, SHARED, eagerly, make_model, make_small_model


def spiece_pieces(tokenizer, folder) -> list[str]:
    """The vocabulary as the sentencepiece package reads it."""
    processor = sentencepiece.SentencePieceProcessor(model_file=tokenizer.save_vocabulary(folder))
    return [processor.id_to_piece(i) for i in range(processor.vocab_size())]


def pieces_of(tokenizer, folder) -> list[str]:
    if isinstance(tokenizer, bg.BertTokenizer):
        return tokenizer.get_config()["vocabulary"]
    return spiece_pieces(tokenizer, folder)


def check_trimmed(model, trimmed, texts, tmp_path):
    """Texts have the same pieces, and every logit of a piece that is left is the same."""
    pieces = pieces_of(trimmed.tokenizer, tmp_path / "trimmed")
    old_pieces = pieces_of(model.tokenizer, tmp_path / "old")
    assert len(pieces) == trimmed.tokenizer.vocab_size < len(old_pieces)
    kept = np.array([old_pieces.index(piece) for piece in pieces])
    for name in ("pad", "bos", "eos", "unk"):
        new, old = (getattr(m.tokenizer, f"{name}_token_id") for m in (trimmed, model))
        assert pieces[new] == old_pieces[old]

    x, y, weight = trimmed.preprocessor(texts, texts[::-1])
    old_x, old_y, old_weight = model.preprocessor(texts, texts[::-1])
    np.testing.assert_array_equal(weight, old_weight)
    np.testing.assert_array_equal(kept[y], old_y)
    for name in ("input_ids", "decoder_input_ids"):
        np.testing.assert_array_equal(kept[x[name]], old_x[name])
    logits, old_logits = trimmed(x).numpy(), model(old_x).numpy()
    assert logits.shape[-1] == len(kept)
    real = weight.numpy() == 1
    np.testing.assert_allclose(logits[real], old_logits[..., kept][real], atol=1e-6, rtol=1e-6)
    return kept


def check_generates_the_same(model, trimmed, texts, kept, num_beams):
    """The old model gets a bias by which it never says what the new one cannot."""
    bias = model.decoder.output_bias.numpy()
    quiet = np.full_like(bias, -1e9)
    quiet[kept] = bias[kept]
    model.decoder.output_bias.assign(quiet)
    options = {"max_new_tokens": 7, "min_new_tokens": 3, "num_beams": num_beams}
    with eagerly():
        expected = model.generate(texts, jit_compile=False, **options)
        assert any(expected)
        assert trimmed.generate(texts, jit_compile=False, **options) == expected
    model.decoder.output_bias.assign(bias)


@pytest.mark.parametrize(
    ("sharing", "num_beams"), [("none", 1), ("word_embeddings", 3), ("all", 1)]
)
def test_trimmed_to_texts(sharing, num_beams, tmp_path):
    model = make_model(sharing, max_source_length=21, add_eos=True)
    before = {name: v.numpy() for name, v in named_variables(model).items()}
    trimmed = bg.trim_vocabulary(model, CORPUS)
    kept = check_trimmed(model, trimmed, CORPUS, tmp_path)
    # Exactly what the texts need and the special tokens.
    needed = set(model.tokenizer(CORPUS).flat_values.numpy().tolist())
    specials = {PIECES.index(piece) for piece in PIECES[:6] if piece != "[unused0]"}
    assert set(kept.tolist()) == needed | specials
    check_generates_the_same(model, trimmed, CORPUS, kept, num_beams)

    matrices = 1 if sharing != "none" else 2
    removed = model.tokenizer.vocab_size - len(kept)
    assert model.count_params() - trimmed.count_params() == removed * (12 * matrices + 1)
    assert trimmed.preprocessor.get_config() == model.preprocessor.get_config()
    # The old model is untouched, and shares nothing with the new one.
    assert model.tokenizer.vocab_size == len(PIECES)
    for name, variable in named_variables(model).items():
        np.testing.assert_array_equal(variable, before[name])
    assert not {id(v) for v in model.weights} & {id(v) for v in trimmed.weights}
    shared = (
        trimmed.decoder.embeddings.word_embeddings is trimmed.encoder.embeddings.word_embeddings
    )
    assert shared == (sharing != "none")


def test_trimmed_to_ids(model, tmp_path):
    ids = model.tokenizer(CORPUS).flat_values.numpy()
    trimmed = bg.trim_vocabulary(model, ids)
    kept = check_trimmed(model, trimmed, CORPUS, tmp_path)
    by_texts = bg.trim_vocabulary(model, iter(CORPUS))
    assert by_texts.tokenizer.get_config() == trimmed.tokenizer.get_config()
    again = bg.trim_vocabulary(model, kept.tolist())
    assert again.tokenizer.get_config() == trimmed.tokenizer.get_config()


def test_one_text_is_no_list_of_letters(model):
    trimmed = bg.trim_vocabulary(model, "the bird")
    vocabulary = trimmed.tokenizer.get_config()["vocabulary"]
    assert vocabulary == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "bird"]


def test_every_batch_of_a_large_corpus_counts(model):
    texts = ["the"] * 2100
    for at, word in ((0, "sang"), (1023, "bird"), (1024, "house"), (2047, "man"), (-1, "old")):
        texts[at] = word
    vocabulary = bg.trim_vocabulary(model, texts).tokenizer.get_config()["vocabulary"]
    assert {"sang", "bird", "house", "man", "old"} < set(vocabulary)


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["none", "all"])
def test_trimmed_with_sentencepiece(sharing, spiece, tmp_path):
    model = make_model(sharing, make_tokenizer=lambda: bg.BertGenerationTokenizer(spiece))
    trimmed = bg.trim_vocabulary(model, CORPUS[1:])
    kept = check_trimmed(model, trimmed, CORPUS[1:], tmp_path)
    check_generates_the_same(model, trimmed, CORPUS[1:], kept, num_beams=3)
    assert "<::::>" in spiece_pieces(trimmed.tokenizer, tmp_path)


def test_trimmed_with_a_larger_sentencepiece_model(tmp_path):
    path = SHARED / "hub/spiece_1000.model"
    if not path.exists():
        pytest.skip("needs spiece_1000.model in ../shared/hub beside the repository")
    model = make_model(make_tokenizer=lambda: bg.BertGenerationTokenizer(path))
    trimmed = bg.trim_vocabulary(model, CORPUS)
    check_trimmed(model, trimmed, CORPUS, tmp_path)
    assert trimmed.tokenizer.vocab_size < 120


def test_settings_go_along():
    the, bird, house = (PIECES.index(word) for word in ("the", "bird", "house"))
    settings = bg.GenerationConfig(
        max_new_tokens=5, num_beams=2, length_penalty=0.5, suppress_tokens=(house, bird)
    )
    model = make_model(generation_config=settings)
    trimmed = bg.trim_vocabulary(model, [the, bird])
    assert trimmed.generation_config == settings.replace(
        suppress_tokens=trimmed.tokenizer(["bird"]).flat_values.numpy().tolist()
    )
    assert model.generation_config == settings


def test_every_id_of_the_settings_moves():
    the, bird, house, sang = (PIECES.index(word) for word in ("the", "bird", "house", "sang"))
    settings = bg.GenerationConfig(
        begin_suppress_tokens=(house, bird),
        bad_words_ids=((bird, the), (bird, house)),
        sequence_bias=(((the,), 2.0), ((house,), 3.0)),
        forced_bos_token_id=sang,
        eos_token_id=(sang, bird),
    )
    trimmed = bg.trim_vocabulary(make_model(generation_config=settings), [the, bird])
    ids = trimmed.tokenizer.get_vocab()
    assert (ids["bird"], ids["the"]) != (bird, the)
    assert trimmed.generation_config == settings.replace(
        begin_suppress_tokens=(ids["bird"],),
        bad_words_ids=((ids["bird"], ids["the"]),),
        sequence_bias=(((ids["the"],), 2.0),),
        forced_bos_token_id=ids["sang"],  # kept, because every output begins with it
        eos_token_id=(ids["sang"], ids["bird"]),
    )


def test_hidden_tokens_stay_hidden():
    """Ids move, so that an old one is out of range, or hides another piece."""
    the, bird, house, sang = (PIECES.index(word) for word in ("the", "bird", "house", "sang"))
    model = make_model(hidden_token_ids=(the, house, sang))
    trimmed = bg.trim_vocabulary(model, [the, bird, sang])
    pieces = trimmed.tokenizer.get_config()["vocabulary"]
    hidden = [pieces[i] for i in trimmed.preprocessor.hidden_token_ids]
    assert sorted(hidden) == ["sang", "the"]
    ids = trimmed.tokenizer(["the bird sang"]).to_tensor()
    assert trimmed.preprocessor.generate_postprocess(ids).numpy().tolist() == [b"bird"]
    assert model.preprocessor.hidden_token_ids == tuple(sorted((the, house, sang)))


def test_a_trimmed_model_trains_and_is_saved(tmp_path):
    trimmed = bg.trim_vocabulary(make_small_model(), CORPUS)
    trimmed.compile(jit_compile=False, run_eagerly=True)
    trimmed.fit(CORPUS, CORPUS, verbose=0)
    trimmed.save_to_preset(tmp_path / "preset")
    x, _, _ = trimmed.preprocessor(CORPUS, CORPUS)
    loaded = bg.EncoderDecoderModel.from_preset(tmp_path / "preset")
    np.testing.assert_array_equal(loaded(x), trimmed(x))


@pytest.mark.parametrize("keep", [[], [len(PIECES)], [-1], [1.5], ["a", 3], [b"a"], [None]])
def test_what_is_neither_texts_nor_ids_is_refused(keep, model):
    message = (
        rf"keep must be texts \(str\), or ids \(int\) below .*\({len(PIECES)}\), and not empty"
    )
    with pytest.raises(ValueError, match=message):
        bg.trim_vocabulary(model, keep)


def test_a_model_without_a_tokenizer_is_refused(model):
    bare = bg.EncoderDecoderModel(model.encoder, model.decoder)
    with pytest.raises(ValueError, match="model must have a tokenizer"):
        bg.trim_vocabulary(bare, CORPUS)
