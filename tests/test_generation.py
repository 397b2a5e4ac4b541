"""generate(): against the teacher-forced forward pass, exhaustive search and HuggingFace."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from conftest import PIECES, SHARED, make_model

import bertgen_tf as bg
from bertgen_tf import generation

RNG = np.random.default_rng(6)
IDS = RNG.integers(6, len(PIECES), (3, 7)).astype(np.int32)
MASK = np.array([[1] * 7, [1] * 4 + [0] * 3, [1] * 6 + [0]], np.int32)
INPUTS = {"input_ids": IDS, "attention_mask": MASK}


@pytest.fixture(scope="module")
def model():
    """Random weights of which some sequences end, and beams beat greedy search."""
    return make_model(seed=6)


TEXTS = ["the man saw a bird, who sang.", "old house", "and the woman left"]


def log_probs(model, sequences):
    """Teacher-forced log-probabilities of every token: [batch, n, length, V]."""
    n = sequences.shape[1]
    flat = sequences.reshape(-1, sequences.shape[-1])[:, :-1]
    logits = model(
        {
            "input_ids": np.repeat(IDS, n, 0),
            "attention_mask": np.repeat(MASK, n, 0),
            "decoder_input_ids": flat,
        }
    )
    return tf.nn.log_softmax(logits).numpy().reshape(*sequences.shape[:2], -1, logits.shape[-1])


def scores_of(model, sequences, length_penalty=1.0):
    """What the scores must be, from the teacher-forced forward pass."""
    all_probs = log_probs(model, sequences)
    scores = np.zeros(sequences.shape[:2])
    for i, k in np.ndindex(scores.shape):
        tokens = sequences[i, k, 1:].tolist()
        length = tokens.index(4) + 1 if 4 in tokens else len(tokens)
        scores[i, k] = sum(all_probs[i, k, t, tokens[t]] for t in range(length))
        scores[i, k] /= length**length_penalty
    return scores


@pytest.mark.parametrize("sharing", ["none", "all"])
@pytest.mark.parametrize("jit_compile", [True, False])
def test_greedy_takes_the_best_token_of_the_forward_pass(sharing, jit_compile):
    """Different depths, padding, a batch: with sharing="none" 2 layers against 3."""
    model = make_model(sharing)
    output = model.generate(INPUTS, max_new_tokens=9, jit_compile=jit_compile)
    assert output.sequences.shape == (3, 1, 10) and output.sequences.dtype == np.int32
    best = log_probs(model, output.sequences).argmax(-1)
    for row, expected in zip(output.sequences[:, 0, 1:], best[:, 0], strict=True):
        length = row.tolist().index(4) + 1 if 4 in row else len(row)
        np.testing.assert_array_equal(row[:length], expected[:length])
        assert not row[length:].any()
    np.testing.assert_allclose(output.scores, scores_of(model, output.sequences), atol=1e-5)


def test_beam_scores_are_those_of_the_forward_pass(model):
    options = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.6}
    output = model.generate(INPUTS, max_new_tokens=8, **options)
    expected = scores_of(model, output.sequences, 0.6)
    np.testing.assert_allclose(output.scores, expected, atol=1e-5)
    assert (np.diff(output.scores) <= 0).all()
    plain = model.generate(INPUTS, max_new_tokens=8, jit_compile=False, **options)
    np.testing.assert_array_equal(plain.sequences, output.sequences)
    np.testing.assert_allclose(plain.scores, output.scores, atol=1e-5)
    assert (output.sequences[:, :, 1:] == 4).any(-1).sum() not in (0, 9)  # some end, some do not
    greedy = model.generate(INPUTS, max_new_tokens=8, length_penalty=0.6)
    assert (output.scores[:, 0] > greedy.scores[:, 0] + 1e-3).any()


def test_wide_beam_equals_exhaustive_search():
    """All sequences of up to 3 tokens over a vocabulary of 7."""
    config = bg.BertGenerationConfig(
        vocab_size=7,
        hidden_size=6,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=10,
        max_position_embeddings=9,
        initializer_range=0.6,
    )
    model = bg.EncoderDecoderModel(
        bg.BertGenerationEncoder(config),
        bg.BertGenerationDecoder(config.replace(add_cross_attention=True)),
    )
    ids, mask = np.array([[3, 4, 5, 6], [6, 3, 0, 0]], np.int32), np.array([[1] * 4, [1, 1, 0, 0]])
    output = model.generate(
        {"input_ids": ids, "attention_mask": mask},
        num_beams=7**2,
        num_return_sequences=5,
        max_new_tokens=3,
        early_stopping="never",
    )
    candidates = [
        (*head, 1) if len(head) < 3 else head
        for length in range(4)
        for head in itertools.product([i for i in range(7) if i != 1], repeat=length)
    ] + [(*head, 1) for head in itertools.product([0, 2, 3, 4, 5, 6], repeat=2)]
    candidates = sorted(set(candidates))
    padded = np.array([[2, *c, *[0] * (3 - len(c))] for c in candidates], np.int32)
    for row in range(2):
        logits = model(
            {
                "input_ids": np.repeat(ids[row : row + 1], len(padded), 0),
                "attention_mask": np.repeat(mask[row : row + 1], len(padded), 0),
                "decoder_input_ids": padded[:, :-1],
            }
        )
        probs = tf.nn.log_softmax(logits).numpy()
        scores = [
            sum(probs[i, t, token] for t, token in enumerate(c)) / len(c)
            for i, c in enumerate(candidates)
        ]
        order = np.argsort(scores)[::-1][:5]
        np.testing.assert_allclose(output.scores[row], np.array(scores)[order], atol=1e-5)
        np.testing.assert_array_equal(output.sequences[row], padded[order])


def test_buckets_change_nothing(model):
    """One row alone, in a batch, and with more padding: the same ids and scores."""
    together = model.generate(INPUTS, max_new_tokens=8, num_beams=3)
    for row in range(3):
        length = MASK[row].sum()
        alone = model.generate(
            {"input_ids": IDS[row : row + 1, :length]}, max_new_tokens=8, num_beams=3
        )
        np.testing.assert_array_equal(alone.sequences[0], together.sequences[row])
        np.testing.assert_allclose(alone.scores[0], together.scores[row], atol=1e-5)
    wide = {name: np.pad(value, ((0, 0), (0, 14))) for name, value in INPUTS.items()}
    np.testing.assert_array_equal(
        model.generate(wide, max_new_tokens=8, num_beams=3).sequences, together.sequences
    )


def test_same_bucket_neither_retraces_nor_compiles_again():
    model = make_model()
    calls = []
    encoder_call = model.encoder.call
    model.encoder.call = lambda *args, **kwargs: calls.append(1) or encoder_call(*args, **kwargs)
    lengths = [(1, 5), (3, 9), (4, 16), (3, 12)]
    for batch, length in lengths:
        ids = RNG.integers(6, len(PIECES), (batch, length))
        model.generate({"input_ids": ids}, max_new_tokens=5)
    # Whatever the shapes, Python runs the model's code once.
    assert len(calls) == 1
    config = model.generation_config.replace(max_new_tokens=5)
    function = model._generator.function(config, True)
    assert function.experimental_get_tracing_count() == 1
    model.generate(INPUTS, max_new_tokens=6)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("batch", "length", "shape"),
    [(1, 1, (1, 16)), (2, 16, (2, 16)), (3, 17, (4, 26)), (5, 26, (8, 26)), (0, 3, (1, 16))],
)
def test_only_bucket_shapes_reach_xla(monkeypatch, batch, length, shape):
    """That bounds the number of compilations; an empty batch gives an empty answer."""
    seen = []

    def search(model, config, input_ids, attention_mask):
        tf.py_function(lambda ids: seen.append(tuple(ids.shape)), [input_ids], [])
        rows = tf.shape(input_ids)[0]
        return generation.decoding.SearchOutput(tf.zeros([rows, 1, 4]), tf.zeros([rows, 1]))

    monkeypatch.setattr(generation, "_search", search)
    function = tf.function  # XLA cannot call Python: trace the same graph without it
    monkeypatch.setattr(
        tf, "function", lambda *args, jit_compile=None, **kwargs: function(*args, **kwargs)
    )
    model = SimpleNamespace(
        encoder=SimpleNamespace(config=SimpleNamespace(max_position_embeddings=26, pad_token_id=0))
    )
    bucketed = generation.generation_function(model, None, jit_compile=True)
    output = bucketed(np.ones((batch, length), np.int32), np.ones((batch, length), np.int32))
    assert seen == [shape]
    assert output.sequences.shape == (batch, 1, 4)


def test_text_in_text_out(model):
    outputs = model.generate(TEXTS, max_new_tokens=8)
    assert [type(text) for text in outputs] == [str] * 3
    assert model.generate(TEXTS[0], max_new_tokens=8) == outputs[0]
    batch = model.preprocessor.generate_preprocess(TEXTS)
    ids = model.generate({k: v.numpy() for k, v in batch.items()}, max_new_tokens=8).sequences
    expected = model.tokenizer.detokenize(ids[:, 0, 1:]).numpy()
    assert outputs == [text.decode() for text in expected]
    hypotheses = model.generate(TEXTS, max_new_tokens=8, num_beams=3, num_return_sequences=2)
    assert [len(row) for row in hypotheses] == [2, 2, 2]
    assert model.generate([], max_new_tokens=8) == []
    many = model.generate(TEXTS * 15, max_new_tokens=8)
    assert many == outputs * 15
    odd = ["", "😀", "word " * 5000]
    assert len(model.generate(odd, max_new_tokens=8)) == 3


def test_options(model):
    free = model.generate(INPUTS, max_new_tokens=8, num_beams=2)
    assert (free.sequences[:, 0, 1:6] == 4).any()
    banned = sorted({int(t) for t in free.sequences[:, 0, 1]})
    output = model.generate(INPUTS, max_new_tokens=8, num_beams=2, suppress_tokens=[*banned, 4])
    assert not np.isin(output.sequences[:, 0, 1:], [*banned, 4]).any()
    early = model.generate(INPUTS, max_new_tokens=8, min_new_tokens=5, num_beams=2)
    assert not (early.sequences[:, 0, 1:6] == 4).any()
    own = make_model(generation_config=bg.GenerationConfig(max_new_tokens=3, num_beams=2))
    assert own.generate(INPUTS).sequences.shape == (3, 1, 4)
    gnmt = model.generate(INPUTS, max_new_tokens=8, num_beams=4, beam_scorer="gnmt")
    raw = scores_of(model, gnmt.sequences, 0.0)[:, 0]
    ended = [row.tolist().index(4) for row in gnmt.sequences[:, 0] if 4 in row]
    assert len(ended) == 3  # else the score is the raw sum
    np.testing.assert_allclose(
        gnmt.scores[:, 0], raw / ((5 + np.array(ended)) / 6) ** 0.6, atol=1e-5
    )


def test_changed_weights_are_read(model):
    """Compiled functions read the variables, they hold no copy."""
    own = make_model()
    before = own.generate(INPUTS, max_new_tokens=5)
    own.decoder.output_bias.assign_add(100 * np.eye(len(PIECES))[9])
    assert (own.generate(INPUTS, max_new_tokens=5).sequences[:, 0, 1:] == 9).all()
    assert not (before.sequences[:, 0, 1:] == 9).all()


def test_errors(model):
    with pytest.raises(TypeError, match="inputs must be a string.*received int"):
        model.generate(5)
    with pytest.raises(ValueError, match="must have the keys input_ids.*received ids"):
        model.generate({"ids": IDS})
    with pytest.raises(ValueError, match=r"one shape \[batch, length\], received int32 \(7,\)"):
        model.generate({"input_ids": IDS[0]})
    with pytest.raises(ValueError, match=r"must lie in \[0, 80\), received .* to 80"):
        model.generate({"input_ids": np.where(IDS == IDS.max(), 80, IDS)})
    with pytest.raises(ValueError, match=r"input_ids must not be longer .*\(26\), received 27"):
        model.generate({"input_ids": np.ones((1, 27), np.int32)})
    with pytest.raises(ValueError, match=r"max_new_tokens must not exceed .*\(22\), received 23"):
        model.generate(TEXTS, max_new_tokens=23)
    with pytest.raises(ValueError, match="GenerationConfig has no field max_tokens"):
        model.generate(TEXTS, max_tokens=5)
    with pytest.raises(ValueError, match="suppress_tokens must be smaller than vocab_size"):
        model.generate(TEXTS, suppress_tokens=[80], max_new_tokens=5)
    silent = bg.EncoderDecoderModel(model.encoder, model.decoder)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        silent.generate(TEXTS)


HF_GOLDEN = SHARED / "golden/hf"
# Options that this version has; the others come with later ones.
HF_OPTIONS = {
    "num_beams",
    "num_return_sequences",
    "max_new_tokens",
    "min_new_tokens",
    "length_penalty",
    "early_stopping",
    "suppress_tokens",
}


@pytest.mark.skipif(not HF_GOLDEN.is_dir(), reason="needs the folder `shared` beside the project")
@pytest.mark.parametrize("name", ["small", "shared", "wide_vocab"])
def test_huggingface_gives_the_same(name):
    """Forward pass and generate() of transformers on the same weights."""
    folder = HF_GOLDEN / name
    golden = np.load(folder / "golden.npz")
    model = bg.EncoderDecoderModel.from_huggingface(folder)
    inputs = {k: golden[k] for k in ("input_ids", "attention_mask")}
    memory = model.encoder(*(golden[k] for k in ("input_ids", "attention_mask")))
    np.testing.assert_allclose(memory, golden["encoder_last_hidden_state"], atol=1e-5)
    logits = model({k: golden[k] for k in (*inputs, "decoder_input_ids", "decoder_attention_mask")})
    scale = np.abs(golden["decoder_logits"]).max()
    np.testing.assert_allclose(logits, golden["decoder_logits"], atol=1e-5 * max(1, scale))
    compared = 0
    for case, options in json.loads((folder / "golden.json").read_text())["generate"].items():
        if not set(options) <= HF_OPTIONS:
            continue
        output = model.generate(inputs, **options)
        expected = golden[f"generate/{case}/sequences"]
        n = options.get("num_return_sequences", 1)
        expected = expected.reshape(-1, n, expected.shape[-1])
        for ours, theirs in zip(
            output.sequences.reshape(-1, output.sequences.shape[-1]),
            expected.reshape(-1, expected.shape[-1]),
            strict=True,
        ):
            assert _until_eos(ours) == _until_eos(theirs), case
        if f"generate/{case}/sequences_scores" in golden:
            scores = golden[f"generate/{case}/sequences_scores"].reshape(-1, n)
            np.testing.assert_allclose(output.scores, scores, atol=1e-4)
        compared += 1
    assert compared >= 8


def _until_eos(ids):
    """The generated ids up to the end token: what follows is filled differently by HuggingFace."""
    ids = ids[1:].tolist()
    return ids[: ids.index(1) + 1] if 1 in ids else ids
