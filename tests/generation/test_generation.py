"""The compiled functions: against the teacher-forced forward pass, exhaustive search, HuggingFace.

`generate` itself, which calls them, is in test_generator.py.
"""

import contextlib
import functools
import itertools
import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import bertgen_tf as bg
from bertgen_tf.generation import compiled as generation
from bertgen_tf.generation.compiled import generation_function, streaming_functions
from bertgen_tf.generation.inputs import make_seeds, start_prompt
from bertgen_tf.generation.settings import check_config, processors_for
from tests.helpers import GOLDEN, PIECES, SHARED, eagerly, make_model

RNG = np.random.default_rng(6)
IDS = RNG.integers(6, len(PIECES), (3, 7)).astype(np.int32)
MASK = np.array([[1] * 7, [1] * 4 + [0] * 3, [1] * 6 + [0]], np.int32)
EOS, PAD = 4, 0


# Seed, sharing, layers and a bias to the end token: of random weights by which some sequences end,
# and beams beat greedy search.
MODELS = {
    "none": (57, "none", (2, 1), 3.0),  # fast to trace
    "deep": (6, "none", (2, 3), 1.5),
    "all": (6, "all", (2, 2), 1.5),
}


@functools.cache
def small_model(name):
    """Read-only; no fixture, so that tests of hypothesis can have it."""
    seed, sharing, layers, bias = MODELS[name]
    model = make_model(sharing, seed=seed, layers=layers)
    model.decoder.output_bias.assign_add(bias * np.eye(len(PIECES))[EOS])
    return model


@pytest.fixture(scope="module")
def model():
    return small_model("none")


@functools.cache
def compiled(sharing, config, jit_compile=False, **options):
    return generation_function(small_model(sharing), config, jit_compile, **options)


def run(model, config, ids=IDS, mask=MASK, prompt=None, *, jit_compile=False, first=0, **options):
    """What a generation function of `model`, or of `small_model(model)`, gives, as arrays."""
    if isinstance(model, str):
        function = compiled(model, config.replace(seed=None), jit_compile, **options)
        model = small_model(model)
    else:
        function = generation_function(model, config, jit_compile, **options)
    prompt = start_prompt(model, len(ids)) if prompt is None else prompt
    output = function(ids, mask, prompt, make_seeds(config, first, len(ids)))
    return type(output)(*(None if tensor is None else tensor.numpy() for tensor in output))


def settings_of(**options):
    return bg.GenerationConfig(max_new_tokens=8).replace(**options)


def forward(model, sequences, ids=IDS, mask=MASK):
    """Teacher-forced logits of every token, [B, n, L - 1, V]."""
    n = sequences.shape[1]
    inputs = {
        "input_ids": np.repeat(ids, n, 0),
        "attention_mask": np.repeat(mask, n, 0),
        "decoder_input_ids": sequences.reshape(-1, sequences.shape[-1])[:, :-1],
    }
    logits = np.asarray(model(inputs))
    return logits.reshape(*sequences.shape[:2], -1, logits.shape[-1])


def generated(sequences, prompt_length=1, eos=(EOS,)):
    """Bool like sequences: what was generated, the end token included."""
    columns = np.arange(sequences.shape[-1]) >= prompt_length
    ends = np.isin(sequences, eos) & columns
    return columns & (np.cumsum(ends, axis=-1) - ends == 0)


def check_scores(model, output, config, ids=IDS, mask=MASK, prompt_length=1):
    """Scores are log-probabilities of the forward pass, for settings without processors."""
    sequences, scores, token_scores, _ = output
    log_probs = tf.nn.log_softmax(forward(model, sequences, ids, mask)).numpy()
    chosen = np.take_along_axis(log_probs, sequences[..., 1:, None], -1)[..., 0]
    real = generated(sequences, prompt_length)[..., 1:]
    np.testing.assert_allclose(token_scores, np.where(real, chosen, 0), atol=1e-4)
    lengths = real.sum(-1)
    if config.beam_scorer == "huggingface":
        penalty = lengths**config.length_penalty
    else:
        ended = (sequences[..., prompt_length:] == EOS).any(-1)
        penalty = np.where(ended, ((5 + lengths) / 6) ** config.gnmt_alpha, 1)
    np.testing.assert_allclose(scores, np.where(real, chosen, 0).sum(-1) / penalty, atol=1e-4)


# ------------------------------------------------------------------------- against other sources


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deep", "all"])
@pytest.mark.parametrize("jit_compile", [True, False])
def test_greedy_takes_the_best_token_of_the_forward_pass(name, jit_compile):
    """Different depths, padding, a batch: in one of the models 2 layers against 3."""
    output = run(name, settings_of(), jit_compile=jit_compile)
    assert output.sequences.shape == (3, 1, 9) and output.sequences.dtype == np.int32
    assert output.token_scores.shape == (3, 1, 8) and output.cross_attentions is None
    best = forward(small_model(name), output.sequences).argmax(-1)
    real = generated(output.sequences)
    np.testing.assert_array_equal(output.sequences[..., 1:], np.where(real[..., 1:], best, PAD))
    check_scores(small_model(name), output, settings_of())


@pytest.mark.slow
def test_beam_scores_are_those_of_the_forward_pass():
    model = small_model("deep")
    config = settings_of(num_beams=4, num_return_sequences=3, length_penalty=0.6)
    output = run(model, config, jit_compile=True)
    check_scores(model, output, config)
    assert (np.diff(output.scores) <= 0).all()
    plain = run(model, config)
    np.testing.assert_array_equal(plain.sequences, output.sequences)
    np.testing.assert_allclose(plain.scores, output.scores, atol=1e-5)
    # Some end, some do not, and beams find better ones than greedy search.
    assert (output.sequences[:, :, 1:] == EOS).any(-1).sum() not in (0, 9)
    greedy = run(model, settings_of(length_penalty=0.6))
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
    ids = np.array([[3, 4, 5, 6], [6, 3, 0, 0]], np.int32)
    mask = np.array([[1] * 4, [1, 1, 0, 0]], np.int32)
    output = run(
        model,
        bg.GenerationConfig(
            num_beams=7**2, num_return_sequences=5, max_new_tokens=3, early_stopping="never"
        ),
        ids,
        mask,
    )
    candidates = [
        (*head, 1) if len(head) < 3 else head
        for length in range(4)
        for head in itertools.product([i for i in range(7) if i != 1], repeat=length)
    ] + [(*head, 1) for head in itertools.product([0, 2, 3, 4, 5, 6], repeat=2)]
    candidates = sorted(set(candidates))
    padded = np.array([[2, *c, *[0] * (3 - len(c))] for c in candidates], np.int32)
    for row in range(2):
        logits = forward(model, padded[None], ids[row : row + 1], mask[row : row + 1])[0]
        probs = tf.nn.log_softmax(logits).numpy()
        scores = [
            sum(probs[i, t, token] for t, token in enumerate(c)) / len(c)
            for i, c in enumerate(candidates)
        ]
        order = np.argsort(scores)[::-1][:5]
        np.testing.assert_allclose(output.scores[row], np.array(scores)[order], atol=1e-5)
        np.testing.assert_array_equal(output.sequences[row], padded[order])


HF_GOLDEN = SHARED / "golden/hf"
needs_golden = pytest.mark.skipif(
    not HF_GOLDEN.is_dir(), reason="needs the folder `shared` beside the project"
)


@functools.cache
def golden_model(name):
    model = bg.EncoderDecoderModel.from_huggingface(HF_GOLDEN / name)
    cases = json.loads((HF_GOLDEN / name / "golden.json").read_text())["generate"]
    return model, cases, dict(np.load(HF_GOLDEN / name / "golden.npz"))


@pytest.mark.slow
@needs_golden
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("small", "eager"),
        ("shared", "eager"),
        # Of the fewest layers to trace.
        pytest.param("wide_vocab", "plain", marks=pytest.mark.slow),
        pytest.param("wide_vocab", "xla", marks=pytest.mark.slow),
        pytest.param("shared", "xla", marks=pytest.mark.slow),
    ],
)
def test_huggingface_gives_the_same(name, form):
    """All kinds of generate() of transformers on the same weights, to the first end token."""
    model, cases, golden = golden_model(name)
    ids, mask = (golden[key].astype(np.int32) for key in ("input_ids", "attention_mask"))
    assert len(cases) == 15
    if (name, form) == ("shared", "xla"):
        # What a stack shares and how one searches know nothing of each other.
        cases = dict(list(cases.items())[::3])
    for case, options in cases.items():
        config = bg.GenerationConfig(**options)
        with eagerly() if form == "eager" else contextlib.nullcontext():
            output = run(model, config, ids, mask, jit_compile=form == "xla")
        expected = golden[f"generate/{case}/sequences"]
        ours = output.sequences.reshape(len(expected), -1)
        for one, other in zip(ours, expected, strict=True):
            assert until_eos(one) == until_eos(other), case
        if f"generate/{case}/sequences_scores" in golden:
            scores = golden[f"generate/{case}/sequences_scores"]
            np.testing.assert_allclose(output.scores.ravel(), scores, atol=1e-4, err_msg=case)


def until_eos(ids):
    """The generated ids up to the end token: what follows is filled differently by HuggingFace."""
    ids = ids[1:].tolist()
    return ids[: ids.index(1) + 1] if 1 in ids else ids


@needs_golden
def test_huggingface_gives_the_same_forward_pass():
    model, _, golden = golden_model("small")
    inputs = ("input_ids", "attention_mask")
    memory = model.encoder(*(golden[key] for key in inputs))
    np.testing.assert_allclose(memory, golden["encoder_last_hidden_state"], atol=1e-5)
    inputs += ("decoder_input_ids", "decoder_attention_mask")
    logits = model({key: golden[key] for key in inputs})
    scale = max(1, np.abs(golden["decoder_logits"]).max())
    np.testing.assert_allclose(logits, golden["decoder_logits"], atol=1e-5 * scale)


def option_cases():
    """`generate()` of transformers with options and prompts, see make_beam_golden.py."""
    with np.load(GOLDEN / "hf_generation.npz") as arrays:
        numbers = sorted({int(name[4:].split("/")[0]) for name in arrays if name[:4] == "case"})
        return [
            {
                name.split("/")[1]: arrays[name]
                for name in arrays
                if name.startswith(f"case{number}/")
            }
            for number in numbers
        ]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """An encoder-decoder that transformers wrote."""
    folder = tmp_path_factory.mktemp("huggingface")
    with zipfile.ZipFile(GOLDEN / "huggingface.zip") as file:
        file.extractall(folder)
    return bg.EncoderDecoderModel.from_huggingface(folder / "v5_pair")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(24))
def test_options_are_those_of_huggingface(pair, number):
    """Each of the options changes what is found; every other case has a prompt."""
    case = option_cases()[number]
    options = json.loads(str(case["options"]))
    ids, prompt = case["input_ids"], case["decoder_input_ids"]
    config = bg.GenerationConfig(**options)
    if prompt.shape[1] > 1 and config.forced_bos_token_id is not None:
        with pytest.raises(ValueError, match="forced_bos_token_id is for outputs without a prompt"):
            check_config(config, pair, prompt.shape[1])
        config = config.replace(forced_bos_token_id=None)  # as transformers takes it
    check_config(config, pair, prompt.shape[1])
    output = run(pair, config, ids, np.ones_like(ids), prompt)
    np.testing.assert_array_equal(output.sequences, case["sequences"], str(options))
    assert ("scores" in case) == (config.num_beams > 1)
    if "scores" in case:
        np.testing.assert_allclose(output.scores, case["scores"], atol=1e-4)


def test_the_options_of_huggingface_are_all_there():
    tested = set().union(*(json.loads(str(case["options"])) for case in option_cases()))
    fields = set(bg.GenerationConfig.__dataclass_fields__)
    sampling = {"do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "seed"}
    # tests/test_decoding.py has the length penalty; gnmt is not HuggingFace's.
    others = {"length_penalty", "beam_scorer", "gnmt_alpha", "normalize_unfinished"}
    assert tested == fields - sampling - others


# ------------------------------------------------------------------------------------ properties

# Small enough that most sources of random lengths share a trace, and all ways to search.
SEARCHES = {
    "greedy": settings_of(),
    "beams": settings_of(num_beams=3, num_return_sequences=2, length_penalty=0.6),
    "gnmt": settings_of(num_beams=3, beam_scorer="gnmt"),
    "max_length": bg.GenerationConfig(max_length=11, num_beams=2, early_stopping="never"),
    "sampling": settings_of(do_sample=True, num_return_sequences=2, temperature=1.5, seed=3),
}
PENALISED = {
    "processors": settings_of(
        repetition_penalty=1.4,
        encoder_repetition_penalty=1.2,
        no_repeat_ngram_size=2,
        encoder_no_repeat_ngram_size=2,
        min_length=4,
        forced_eos_token_id=EOS,
        exponential_decay_length_penalty=(2, 1.1),
        begin_suppress_tokens=(9, 20),
        sequence_bias={(9,): 1.5, (20, 21): 4.0},
    ),
    "beam sampling": settings_of(
        do_sample=True,
        num_beams=3,
        num_return_sequences=2,
        top_k=9,
        top_p=0.9,
        seed=2**31 - 1,
        eos_token_id=(EOS, 11),
        bad_words_ids=((9,), (20, 21)),
    ),
}
ALL = {**SEARCHES, **PENALISED}
few = functools.partial(settings, deadline=None, derandomize=True, database=None)


@st.composite
def inputs(draw, prompts=True):
    """Ids, mask, and prompts of one length, which do not end: 1 to 4 rows."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 16))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    ids = rng.integers(6, len(PIECES), (batch, length)).astype(np.int32)
    lengths = rng.integers(0, length + 1, (batch, 1))
    mask = (np.arange(length) < lengths).astype(np.int32)
    prompt = np.full((batch, 1), 3, np.int32)
    if prompts and draw(st.booleans()):
        more = rng.integers(6, len(PIECES), (batch, draw(st.integers(1, 7))))
        prompt = np.concatenate([prompt, more], axis=1).astype(np.int32)
    return np.where(mask, ids, PAD).astype(np.int32), mask, prompt


def assert_same(one, two):
    np.testing.assert_array_equal(one.sequences, two.sequences)
    np.testing.assert_allclose(one.scores, two.scores, atol=1e-4)
    np.testing.assert_allclose(one.token_scores, two.token_scores, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("search", SEARCHES)
@few(max_examples=8)
@given(inputs())
def test_scores_with_cache_and_prompt_are_those_without(search, example):
    ids, mask, prompt = example
    model = small_model("none")
    config, length = SEARCHES[search], prompt.shape[1]
    output = run("none", config, ids, mask, prompt)
    total = config.max_length or length + config.max_new_tokens
    assert output.sequences.shape == (len(ids), config.num_return_sequences, total)
    shown = np.repeat(prompt[:, None], config.num_return_sequences, axis=1)
    np.testing.assert_array_equal(output.sequences[..., :length], shown)
    after = ~generated(output.sequences, length) & (np.arange(total) >= length)
    assert not output.sequences[after].any()
    check_scores(model, output, config, ids, mask, length)
    if search == "greedy":
        best = forward(model, output.sequences, ids, mask).argmax(-1)
        real = generated(output.sequences, length)[..., 1:]
        np.testing.assert_array_equal(output.sequences[..., 1:][real], best[real])


@pytest.mark.slow
@pytest.mark.parametrize("search", ALL)
@few(max_examples=6)
@given(inputs())
def test_a_batch_is_as_many_batches_of_one(search, example):
    """Also each with its own padding taken off; samples keep the number of their example."""
    ids, mask, prompt = example
    config = ALL[search]
    together = run("none", config, ids, mask, prompt)
    for row, length in enumerate(mask.sum(axis=1)):
        part = slice(row, row + 1)
        width = max(1, length)
        alone = run("none", config, ids[part, :width], mask[part, :width], prompt[part], first=row)
        assert_same(alone, type(alone)(*(t[part] if t is not None else t for t in together)))


@pytest.mark.parametrize("search", ["greedy", "beams", "processors", "beam sampling"])
@few(max_examples=4)
@given(inputs(), st.sampled_from([(1, 4, 17), (2, 8, 26)]))
def test_padding_changes_nothing(search, example, sizes):
    """Rows and columns that fill a larger bucket, whatever ids they hold; and XLA."""
    ids, mask, prompt = example
    rows, batch, width = sizes
    ids, mask, prompt = ids[:rows], mask[:rows], prompt[:rows]
    expected = run("none", ALL[search], ids, mask, prompt)
    more, extra = width - ids.shape[1], batch - len(ids)
    wide = np.pad(ids, ((0, 0), (0, more)), constant_values=9), np.pad(mask, ((0, 0), (0, more)))
    wide = [np.pad(array, ((0, extra), (0, 0)), mode="edge") for array in (*wide, prompt)]
    padded = run("none", ALL[search], *wide)
    assert_same(type(padded)(*(t[:rows] if t is not None else t for t in padded)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("search", ["processors", "sampling", "beam sampling", "max_length"])
def test_xla_gives_the_same(search):
    """Of one function: batches of several buckets, prompts, several draws."""
    config = ALL[search]
    for seed, (rows, length) in itertools.product((3, 4), ((3, 1), (1, 1), (3, 6))):
        config = config.replace(seed=seed) if config.do_sample else config
        prompt = np.concatenate([np.full((3, 1), 3), IDS[:, ::-1]], axis=1).astype(np.int32)
        arguments = ("none", config, IDS[:rows], MASK[:rows], prompt[:rows, :length])
        assert_same(run(*arguments, jit_compile=True), run(*arguments))


def test_draws_follow_seed_and_example():
    config = SEARCHES["sampling"]
    output = run("none", config)
    np.testing.assert_array_equal(run("none", config).sequences, output.sequences)
    other = run("none", config.replace(seed=4))
    assert (output.sequences != other.sequences).any()
    assert (output.sequences[:, 0] != output.sequences[:, 1]).any()
    same = run("none", config, np.repeat(IDS[:1], 6, 0), np.repeat(MASK[:1], 6, 0))
    assert len(np.unique(same.sequences[:, 0], axis=0)) > 1
    # Without a seed every call draws anew.
    free = config.replace(seed=None)
    drawn = [run("none", free).sequences for _ in range(3)]
    assert len(np.unique(np.stack(drawn), axis=0)) == 3
    seeds = make_seeds(config, 5, 3)
    assert seeds.dtype == np.int32 and seeds.tolist() == [[3, 5], [3, 6], [3, 7]]
    assert make_seeds(settings_of(), 5, 2).tolist() == [[0, 0], [0, 0]]
    assert make_seeds(free, 0, 1)[0, 0] != make_seeds(free, 0, 1)[0, 0]


@few(max_examples=5)
@given(inputs())
def test_a_beam_of_one_is_greedy_search(example):
    greedy = run("none", settings_of(), *example)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "uses_beams", lambda config: True)
        # Another value of the same meaning: a function of its own.
        beam = run("none", settings_of(), *example, output_attentions=0)
    assert_same(beam, greedy)


# --------------------------------------------------------------------------------------- options


@pytest.mark.slow
def test_options(model):
    """Each does what its name says; against transformers they are in tests/test_decoding.py."""
    free = run(model, settings_of(num_beams=2))
    assert (free.sequences[:, 0, 1:6] == EOS).any()
    banned = sorted({int(t) for t in free.sequences[:, 0, 1]})
    output = run(model, settings_of(num_beams=2, suppress_tokens=[*banned, EOS]))
    assert not np.isin(output.sequences[:, 0, 1:], [*banned, EOS]).any()
    early = run(model, settings_of(min_new_tokens=5, num_beams=2))
    assert not (early.sequences[:, 0, 1:6] == EOS).any()
    gnmt = run(model, settings_of(num_beams=4, beam_scorer="gnmt"))
    check_scores(model, gnmt, settings_of(num_beams=4, beam_scorer="gnmt"))
    ends = run(model, settings_of(eos_token_id=[int(free.sequences[0, 0, 2]), 70]))
    assert np.isin(ends.sequences[:, 0, 1:], ends.sequences[0, 0, 1:]).any()


@pytest.mark.slow
def test_lengths_count_the_prompt_or_not(model):
    """min_length and max_length do, as in transformers; those of new tokens do not."""
    prompt = np.concatenate([np.full((3, 1), 3), IDS[:, :4]], axis=1).astype(np.int32)

    def ends(**options):
        """The width, and where the first sequence ends."""
        sequences = run("none", bg.GenerationConfig(**options), prompt=prompt).sequences[:, 0]
        assert (sequences[:, :5] == prompt).all()
        ends = sequences[:, 5:] == EOS
        return sequences.shape[1], np.where(ends.any(-1), ends.argmax(-1) + 5, 99).min()

    width, first = ends(max_new_tokens=6)
    assert width == 11 and first < 8
    assert ends(max_length=8) == (8, first)
    for options in ({"max_new_tokens": 6}, {"max_length": 11}):
        assert ends(**options, min_new_tokens=first - 5) == (11, first)
        assert ends(**options, min_new_tokens=first - 4)[1] > first
        assert ends(**options, min_length=first) == (11, first)
        assert ends(**options, min_length=first + 1)[1] > first
    # Bans of the first token are for the first new one.
    taken = run("none", settings_of(), prompt=prompt).sequences[:, 0, 5]
    other = run(model, settings_of(begin_suppress_tokens=taken.tolist()), prompt=prompt)
    assert not np.isin(other.sequences[:, 0, 5], taken).any()
    forced = run(model, bg.GenerationConfig(max_length=9, forced_eos_token_id=7), prompt=prompt)
    full = generated(forced.sequences, 5)[..., 8]
    assert full.any() and (forced.sequences[..., 8][full] == 7).all()


def test_processors_come_in_the_order_of_transformers(monkeypatch, model):
    """Each is asked for only where it does something; the caller's own come last."""
    order = (
        "sequence_bias",
        "encoder_repetition_penalty",
        "repetition_penalty",
        "no_repeat_ngram",
        "encoder_no_repeat_ngram",
        "bad_words",
        "min_length",
        "min_new_tokens",
        "forced_bos",
        "forced_eos",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
    )
    for name in order:
        monkeypatch.setattr(
            f"bertgen_tf.generation.search.logits.{name}",
            lambda *args, name=name, **kwargs: (name, args, sorted(kwargs)),
        )
    config = settings_of(
        sequence_bias={(5, 6): 2.0},
        encoder_repetition_penalty=1.5,
        repetition_penalty=1.2,
        no_repeat_ngram_size=2,
        encoder_no_repeat_ngram_size=3,
        bad_words_ids=[[5]],
        min_length=4,
        min_new_tokens=3,
        forced_bos_token_id=7,
        forced_eos_token_id=[8, 9],
        exponential_decay_length_penalty=(2, 1.5),
        suppress_tokens=[10],
        begin_suppress_tokens=[11],
    )
    found = processors_for(config, model, IDS, MASK, 1, ["own"])
    source = ["attention_mask", "input_ids"]
    assert found == [
        ("sequence_bias", ((((5, 6), 2.0),),), []),
        ("encoder_repetition_penalty", (1.5,), source),
        ("repetition_penalty", (1.2,), []),
        ("no_repeat_ngram", (2,), []),
        ("encoder_no_repeat_ngram", (3,), source),
        ("bad_words", (((5,),), (EOS,)), []),
        ("min_length", (4, (EOS,)), []),
        ("min_new_tokens", (3, (EOS,)), ["prompt_length"]),
        ("forced_bos", (7,), []),
        ("forced_eos", ((8, 9), 9), []),
        ("exponential_decay_length_penalty", (2, 1.5, (EOS,)), ["prompt_length"]),
        ("suppress_tokens", ((10,),), []),
        ("begin_suppress_tokens", ((11,), 2), []),  # after the forced first one
        "own",
    ]
    assert [item[0] for item in found[:-1]] == list(order)
    with_prompt = processors_for(config, model, IDS, MASK, 5)
    assert with_prompt[9][1] == ((8, 9), 13) and with_prompt[-1][1] == ((11,), 5)
    assert processors_for(settings_of(), model, IDS, MASK) == []


@pytest.mark.slow
def test_own_processors_run(model):
    def only_nine(logits, ids, step):
        return tf.where(tf.range(tf.shape(logits)[-1]) == 9, logits, -1e7)

    for options in ({}, {"num_beams": 2}, {"do_sample": True}):
        output = run(model, settings_of(**options), logits_processor=(only_nine,))
        assert (output.sequences[..., 1:] == 9).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("search", "jit_compile"),
    [("greedy", False), ("beams", True), ("max_length", False), ("sampling", True)],
)
def test_attentions_are_those_of_the_forward_pass(search, jit_compile):
    config, model = SEARCHES[search], small_model("none" if jit_compile else "deep")
    prompt = np.concatenate([np.full((3, 1), 3), IDS[:, :2]], axis=1).astype(np.int32)
    output = run(model, config, prompt=prompt, jit_compile=jit_compile, output_attentions=True)
    n, width = output.sequences.shape[1:]
    assert output.cross_attentions.shape == (3, n, len(model.decoder.blocks), 4, width - 1, 7)
    assert output.cross_attentions.dtype == np.float32
    _, expected = model.decoder(
        output.sequences.reshape(-1, width)[:, :-1],
        encoder_hidden_states=model.encoder(np.repeat(IDS, n, 0), np.repeat(MASK, n, 0)),
        encoder_attention_mask=np.repeat(MASK, n, 0),
        return_attention_weights=True,
    )
    expected = np.asarray(expected).reshape(output.cross_attentions.shape)
    read = np.arange(1, width) < 3  # of the prompt
    read = read | generated(output.sequences, 3)[..., 1:]
    assert not read.all()
    expected = expected * read[:, :, None, None, :, None]
    np.testing.assert_allclose(output.cross_attentions, expected, atol=1e-5)
    assert not output.cross_attentions[1, ..., 4:].any()


# --------------------------------------------------------------------------- graphs and compiling


def test_changed_weights_are_read():
    """Compiled functions read the variables, they hold no copy."""
    own = make_model(layers=(1, 1))
    config = settings_of(max_new_tokens=5)
    function = generation_function(own, config, True)
    arguments = (IDS, MASK, start_prompt(own, 3), make_seeds(config, 0, 3))
    before = function(*arguments).sequences.numpy()
    own.decoder.output_bias.assign_add(100 * np.eye(len(PIECES))[9])
    assert (function(*arguments).sequences.numpy()[:, 0, 1:] == 9).all()
    assert not (before[:, 0, 1:] == 9).all()


def bucket(size, buckets):
    return min(bucket for bucket in buckets if bucket >= size)


def test_only_bucket_shapes_reach_xla(monkeypatch):
    """That bounds compilations, whatever comes; an empty batch gives an empty answer."""
    seen, traced = [], []

    def search(model, config, inputs, logits_processor, output_attentions):
        traced.append(inputs.prompt.shape[1])
        note = lambda *tensors: seen.append(tuple(t.numpy().shape for t in tensors))  # noqa: E731
        tf.py_function(note, [inputs.input_ids, inputs.prompt, inputs.seeds], [])
        rows = tf.shape(inputs.input_ids)[0]
        width = inputs.prompt.shape[1] + config.max_new_tokens
        return generation.GenerateTensors(
            tf.repeat(tf.pad(inputs.prompt, [[0, 0], [0, 3]])[:, None], 2, axis=1),
            tf.zeros([rows, 2]),
            tf.zeros([rows, 2, width - 1]),
            None,
        )

    monkeypatch.setattr(generation, "_search", search)
    function = tf.function  # XLA cannot call Python: trace the same graph without it
    monkeypatch.setattr(
        tf, "function", lambda *args, jit_compile=None, **kwargs: function(*args, **kwargs)
    )
    model = small_model("none")  # of 26 and 22 positions
    config = settings_of(max_new_tokens=3)
    bucketed = generation_function(model, config, jit_compile=True)
    sizes = [(0, 3, 1), (1, 26, 20), (1100, 2, 1), (1500, 2, 1)] + [
        tuple(int(RNG.integers(1, top)) for top in (33, 27, 21)) for _ in range(60)
    ]
    expected = set()
    for batch, length, prompt in sizes:
        ids = np.ones((batch, length), np.int32)
        prompts = np.arange(3, 3 + prompt, dtype=np.int32)[None].repeat(batch, 0)
        output = bucketed(ids, ids, prompts, make_seeds(config, 0, batch))
        assert output.sequences.shape == (batch, 2, prompt + 3)
        assert output.token_scores.shape == (batch, 2, prompt + 2)
        assert output.scores.shape == (batch, 2)
        assert (output.sequences.numpy()[:, 0, :prompt] == prompts).all()
        rows = bucket(batch, [1, 2, 4, 8, 16, 32, 2048])
        width = bucket(prompt, [1, 8, 16, 22])
        expected.add(((rows, bucket(length, [16, 26])), (rows, width), (rows, 2)))
        assert seen[-1] in expected
    assert set(seen) == expected and len(expected) < 30 < len(set(sizes))
    assert sorted(traced) == [1, 8, 16, 22]


# Counts XLA's compilations by the modules that it writes down.
COUNT = """
import os, pathlib, sys
folder = sys.argv[1]
os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_hlo_module_re=.*search.*"
import numpy as np
import bertgen_tf as bg
from bertgen_tf.generation.compiled import generation_function
from bertgen_tf.generation.inputs import make_seeds, start_prompt
config = bg.BertGenerationConfig(vocab_size=11, hidden_size=6, num_hidden_layers=1,
    num_attention_heads=2, intermediate_size=7, max_position_embeddings=22)
model = bg.EncoderDecoderModel(bg.BertGenerationEncoder(config),
    bg.BertGenerationDecoder(config.replace(add_cross_attention=True)))
settings = bg.GenerationConfig(max_new_tokens=3, do_sample=True)
function = generation_function(model, settings, True)
for batch, length, prompt in ((1, 3, 1), (1, 9, 1), (3, 2, 1), (4, 16, 1), (1, 5, 4), (1, 6, 7)):
    ids = np.ones((batch, length), np.int32)
    prompts = np.full((batch, prompt), 2, np.int32)
    function(ids, ids, prompts, make_seeds(settings, batch, batch))
    path = pathlib.Path(folder)
    modules = {path.name.split(".")[0] for path in path.iterdir()} if path.is_dir() else ()
    print("MODULES", len(modules))
"""


@pytest.mark.slow
def test_xla_compiles_once_for_a_bucket(tmp_path):
    """Neither lengths of prompts within a bucket nor seeds are constants of the program.

    And another process compiles nothing, with TensorFlow's cache.
    """
    flags = f"--tf_xla_persistent_cache_directory={tmp_path / 'cache'}"

    def counts(folder):
        process = subprocess.run(
            [sys.executable, "-c", COUNT, str(tmp_path / folder)],
            capture_output=True,
            text=True,
            env={**os.environ, "TF_XLA_FLAGS": flags},
        )
        assert process.returncode == 0, process.stderr[-3000:]
        return [int(line.split()[1]) for line in process.stdout.splitlines() if "MODULES" in line]

    assert counts("first") == [1, 1, 2, 2, 3, 3]
    assert counts("second") == [0] * 6


def constants(function):
    """The sizes of all constants of a traced function, and of those that it calls."""
    graph = function.graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    return [
        int(np.prod([dim.size for dim in node.attr["value"].tensor.tensor_shape.dim] or [1]))
        for node in nodes
        if node.op == "Const"
    ]


@pytest.mark.slow
def test_no_weights_are_in_the_graph(model):
    """Weights that are constants would be stored and compiled once for each function."""
    functions = []
    original = tf.function

    def keep(*args, **kwargs):
        return lambda f: functions.append(original(*args, **kwargs)(f)) or functions[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tf, "function", keep)
        for name in ("greedy", "beam sampling", "processors"):
            run(model, ALL[name], output_attentions=True)
    assert len(functions) == 6
    weights = min(np.prod(v.shape) for v in model.variables if len(v.shape) > 1)
    sizes = [
        size
        for function in functions
        for concrete in function._list_all_concrete_functions()
        for size in constants(concrete)
    ]
    assert len(sizes) > 100 and max(sizes) < weights


# -------------------------------------------------------------------------------------- streaming


@pytest.mark.slow
@pytest.mark.parametrize(
    ("search", "tokens", "jit_compile"),
    [("greedy", 1, False), ("sampling", 3, True), ("processors", 3, False)],
)
def test_streamed_steps_come_to_the_same(search, tokens, jit_compile):
    """At every step the beginning of what the search as a whole gives."""
    config = ALL[search]
    prompt = np.concatenate([np.full((3, 1), 3), IDS[:, :2]], axis=1).astype(np.int32)
    whole = run("none", config, prompt=prompt)
    start, advance = streaming_functions(
        small_model("none"), config, jit_compile, tokens_per_step=tokens
    )
    state = start(IDS, MASK, prompt, make_seeds(config, 0, 3))
    done, lengths = False, [3]
    while not done:
        state, sequences, length, done = advance(state)
        lengths.append(int(length))
        np.testing.assert_array_equal(
            sequences[:, :, : lengths[-1]], whole.sequences[:, :, : lengths[-1]]
        )
        assert not sequences[:, :, lengths[-1] :].numpy().any()
    np.testing.assert_array_equal(sequences, whole.sequences)
    longest = generated(whole.sequences, 3).sum(-1).max()
    assert lengths == [*range(3, 3 + longest, tokens), 3 + longest]


def test_streaming_refuses_beams(model):
    for options in ({"num_beams": 2}, {"beam_scorer": "gnmt"}):
        with pytest.raises(ValueError, match="Streaming needs greedy search or sampling"):
            streaming_functions(model, settings_of(**options), False, tokens_per_step=1)
    with pytest.raises(ValueError, match="tokens_per_step must be an integer of at least 1, .* 0"):
        streaming_functions(model, settings_of(), False, tokens_per_step=0)


# ----------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("options", "prompt_length", "message"),
    [
        ({"max_new_tokens": 22}, 1, None),
        ({"max_new_tokens": 23}, 1, r"max_new_tokens must not exceed .*\(22\), received 23"),
        ({"max_new_tokens": 20}, 3, None),
        ({"max_new_tokens": 21}, 3, r"\(22\) less the prompt's further 2 tokens, received 21"),
        ({"max_length": 23}, 3, None),
        ({"max_length": 24}, 1, r"max_length must not exceed .* \+ 1 \(23\), received 24"),
        ({"max_length": 3}, 3, "max_length counts .* must be above 3 here, received 3"),
        ({"min_length": 10}, 1, r"min_length must fit into the longest output \(9 tokens, 1 of"),
        ({"min_length": 10}, 2, None),
        ({"max_length": 6, "min_new_tokens": 4}, 3, "min_new_tokens must fit into the longest"),
        ({"suppress_tokens": [80]}, 1, r"suppress_tokens must be smaller than vocab_size \(80\)"),
        ({"begin_suppress_tokens": [80]}, 1, "begin_suppress_tokens must be smaller"),
        ({"bad_words_ids": [[79], [79, 80]]}, 1, "bad_words_ids must be smaller"),
        ({"sequence_bias": {(80, 79): 1.0}}, 1, "sequence_bias must be smaller"),
        ({"forced_bos_token_id": 80}, 1, "forced_bos_token_id must be smaller .* received 80"),
        ({"forced_eos_token_id": [79, 80]}, 1, "forced_eos_token_id must be smaller"),
        ({"eos_token_id": 80}, 1, "eos_token_id must be smaller"),
        ({"eos_token_id": (79, 78), "forced_bos_token_id": 79}, 1, None),
        (
            {"forced_bos_token_id": 7},
            2,
            "forced_bos_token_id is for outputs without a prompt, .* 7",
        ),
        ({"bad_words_ids": [[9], [4]]}, 1, r"bad_words_ids must not ban what ends .* \(4,\)"),
        ({"bad_words_ids": [[9, 4]]}, 1, None),
        ({"bad_words_ids": [[4]], "eos_token_id": 9}, 1, None),
        ({"do_sample": True, "temperature": 1e-4}, 1, None),
    ],
)
def test_settings_that_do_not_fit(model, options, prompt_length, message):
    config = settings_of(**options)
    if message is None:
        check_config(config, model, prompt_length)
    else:
        with pytest.raises(ValueError, match=message):
            check_config(config, model, prompt_length)


def test_prompts_that_do_not_fit(model):
    function = generation_function(model, settings_of(), False)
    for shape in ((3, 0), (3, 23), (3,)):
        with pytest.raises(ValueError, match="decoder_input_ids must have the shape .* 1 to 22 t"):
            function(IDS, MASK, np.ones(shape, np.int32), make_seeds(settings_of(), 0, 3))
