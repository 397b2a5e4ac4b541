"""generate() around the compiled functions: batches, order, prompts, outputs, what is refused."""

import itertools
import math
import sys

import numpy as np
import pandas
import pytest
import tensorflow as tf

import bertgen_tf as bg
from bertgen_tf.generation import compiled, generator
from bertgen_tf.generation.compiled import GenerateTensors
from tests.helpers import PIECES, WORDS, make_small_model

RNG = np.random.default_rng(11)
TEXTS = ["the man saw a bird, who sang.", "old house", "and the woman left", ""]
BOS, EOS, PAD = 3, 4, 0
NEW = 20
# Sources of 1 to 25 tokens, of which some are alike.
MANY = [" ".join(RNG.choice(WORDS, RNG.integers(1, 18))) for _ in range(300)]


@pytest.fixture(scope="module")
def model():
    return make_small_model(seed=6, generation_config=bg.GenerationConfig(max_new_tokens=8))


class Echo:
    """A search that says the source again after the prompt; the score is the example's number."""

    def __init__(self):
        self.built = []
        self.shapes = []
        self.seeds = []

    def __call__(self, model, config, jit_compile, *, logits_processor=(), output_attentions=False):
        self.built.append((config, jit_compile, logits_processor, output_attentions))
        n = config.num_return_sequences

        def generate(input_ids, attention_mask, decoder_input_ids, seeds):
            tensors = (input_ids, attention_mask, decoder_input_ids, seeds)
            assert [tensor.dtype for tensor in tensors] == [tf.int32] * 4
            ids, mask, prompts, seeds = (tensor.numpy() for tensor in tensors)
            self.shapes.append((*ids.shape, prompts.shape[1]))
            self.seeds.extend(seeds[:, 1].tolist())
            new = np.zeros([len(ids), NEW], np.int32)
            width = min(NEW, ids.shape[1])
            new[:, :width] = np.where(mask, ids, PAD)[:, :width]
            sequences = np.concatenate([prompts, new], axis=1)
            token_scores = sequences[:, 1:] / 2
            attentions = None
            if output_attentions:
                attentions = (token_scores[..., None] + mask[:, None])[:, None, None, None]
                attentions = tf.constant(np.tile(attentions, [1, n, 3, 4, 1, 1]), tf.float32)
            return GenerateTensors(
                tf.constant(np.tile(sequences[:, None], [1, n, 1])),
                tf.constant(np.tile(seeds[:, 1:], [1, n]), tf.float32),
                tf.constant(np.tile(token_scores[:, None], [1, n, 1]), tf.float32),
                attentions,
            )

        return generate


@pytest.fixture
def echo(model, monkeypatch):
    fake = Echo()
    monkeypatch.setattr(model, "kept_functions", compiled.KeptFunctions())
    monkeypatch.setattr(generator, "generation_function", fake)
    return fake


def said(model, texts, prompts=None):
    """What `Echo` makes of texts."""
    ids = model.tokenizer(tf.constant(texts))[:, :NEW].to_tensor(PAD)
    if prompts is not None:
        start = model.tokenizer(tf.constant(prompts))
        joined = [
            [*first, *row] for first, row in zip(start.to_list(), ids.numpy().tolist(), strict=True)
        ]
        ids = tf.ragged.constant(joined).to_tensor(PAD)
    return [text.decode() for text in model.tokenizer.detokenize(ids).numpy()]


# --------------------------------------------------------------------------- order and batches


def test_a_prompt_that_is_too_long_stops_before_the_first_window(model, monkeypatch):
    monkeypatch.setattr(generator, "WINDOW", 2)
    calls = []
    monkeypatch.setattr(generator, "_generate_texts", lambda *args: calls.append(args))
    prompts = ["a", "the", "man", "word " * 15]
    with pytest.raises(ValueError, match="max_new_tokens must not exceed .* less the prompt's"):
        model.generate(["a"] * 4, decoder_text=prompts, max_new_tokens=8)
    assert not calls


def test_order_is_restored_over_windows(echo, model, monkeypatch):
    monkeypatch.setattr(generator, "WINDOW", 128)
    outputs = model.generate(MANY, batch_size=8)
    assert outputs == said(model, MANY)
    assert len(set(outputs)) > 250
    rows, widths, _ = np.array(echo.shapes).T
    assert rows.sum() == len(MANY) and rows.max() == 8
    # Of each window, full batches of either bucket and at most one that is not.
    lengths = model.tokenizer(tf.constant(MANY)).row_lengths().numpy()
    least = 0
    for start in range(0, len(MANY), 128):
        short = (lengths[start : start + 128] <= 16).sum()
        least += math.ceil(short / 8) + math.ceil((len(lengths[start : start + 128]) - short) / 8)
    assert len(rows) == least
    # Nor are they wider than their longest text: together hardly more than the tokens there are.
    assert (rows * widths).sum() < 1.1 * np.minimum(lengths, 26).sum()
    assert len(echo.built) == 1


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_hold_rows_of_one_kind(batch_size):
    lengths = RNG.integers(0, 30, 90)
    buckets, prompts = np.searchsorted([4, 8, 16, 32], lengths), RNG.integers(1, 4, 90)
    batches = generator._batches(lengths, buckets, prompts, batch_size)
    assert sorted(np.concatenate(batches)) == list(range(90))
    kinds = [(buckets[batch[0]], prompts[batch[0]]) for batch in batches]
    for batch, (bucket, prompt) in zip(batches, kinds, strict=True):
        assert (buckets[batch] == bucket).all() and (prompts[batch] == prompt).all()
        assert len(batch) <= batch_size
    sizes = {kind: 0 for kind in kinds}
    for kind in zip(buckets, prompts, strict=True):
        sizes[kind] += 1
    assert len(batches) == sum(math.ceil(size / batch_size) for size in sizes.values())


def test_texts_without_end_are_read_a_window_ahead(echo, model):
    read = []

    def source():
        for number in itertools.count():
            read.append(number)
            yield WORDS[number % 7]

    results = model.iterate(source(), window=16, batch_size=4)
    assert not read
    expected = itertools.cycle(said(model, WORDS[:7]))
    for number in range(100):
        assert next(results) == next(expected)
        assert len(read) == (number // 16 + 1) * 16
    # What ends within a window, or with it, or has nothing.
    for count in (21, 32, 0):
        assert len(list(model.iterate(MANY[:count], window=16))) == count


@pytest.mark.parametrize(
    "form",
    [tuple, np.array, pandas.Series, tf.constant, lambda texts: [text.encode() for text in texts]],
    ids=["tuple", "array", "column", "tensor", "bytes"],
)
def test_texts_in_the_forms_that_fit_takes(echo, model, form):
    texts, prompts = MANY[:4], WORDS[:4]
    assert model.generate(form(texts)) == said(model, texts)
    output = model.generate(form(texts), decoder_text=form(prompts))
    assert output == said(model, texts, prompts)
    assert model.generate(form(texts)[0]) == said(model, texts[:1])[0]


def test_a_text_that_is_missing_later_is_named(echo, model):
    outputs = model.iterate(iter([*MANY[:20], None]), window=8)
    with pytest.raises(TypeError, match=r"texts\[20\] must be text, received None"):
        list(outputs)


def test_what_a_call_sets_comes_before_what_the_model_stores(echo, model, monkeypatch):
    stored = bg.GenerationConfig(
        num_beams=4, early_stopping=True, max_new_tokens=NEW, forced_bos_token_id=7
    )
    monkeypatch.setattr(model, "generation_config", stored)
    assert model.generate(MANY[:3], num_beams=1) == said(model, MANY[:3])
    assert model.generate(MANY[0], decoder_text="a") == said(model, MANY[:1], ["a"])[0]
    with pytest.raises(ValueError, match="early_stopping applies to beam search"):
        model.generate(MANY[0], num_beams=1, early_stopping=True)
    with pytest.raises(ValueError, match="early_stopping applies to beam search"):
        model.generate(MANY[0], stored, num_beams=1)
    with pytest.raises(ValueError, match="forced_bos_token_id is for outputs without a prompt"):
        model.generate(MANY[0], decoder_text="a", forced_bos_token_id=8)


@pytest.mark.parametrize("batch", [None, 1, 7])
def test_datasets_of_strings(echo, model, batch):
    dataset = tf.data.Dataset.from_tensor_slices(MANY[:20] + ["ü".encode("latin-1")])
    dataset = dataset if batch is None else dataset.batch(batch)
    expected = said(model, MANY[:20] + ["ü".encode("latin-1")])
    assert model.generate(dataset) == expected
    prompts = WORDS[:4] * 5 + ["a"]
    assert model.generate(dataset, decoder_text=prompts) == said(
        model, MANY[:20] + ["ü".encode("latin-1")], prompts
    )
    assert model.generate(dataset.take(0)) == []


def test_examples_are_numbered_through(echo, model, monkeypatch):
    """Whatever the batches: draws follow the numbers."""
    monkeypatch.setattr(generator, "WINDOW", 64)
    sampling = {"do_sample": True, "seed": 5}
    output = model.generate(MANY, output_scores=True, batch_size=7, **sampling)
    np.testing.assert_array_equal(output.scores[:, 0], np.arange(300))
    ids = RNG.integers(6, len(PIECES), [70, 9])
    output = model.generate({"input_ids": ids}, batch_size=7, **sampling)
    np.testing.assert_array_equal(output.scores[:, 0], np.arange(70))

    numbers = []
    make_seeds = generator.make_seeds

    def record(config, first_example, batch):
        numbers.append((config.seed, first_example, batch))
        return make_seeds(config, first_example, batch)

    monkeypatch.setattr(generator, "make_seeds", record)
    list(model.iterate(MANY[:25], window=10, first_example=1000, **sampling))
    assert numbers == [(5, 1000, 10), (5, 1010, 10), (5, 1020, 5)]


# ---------------------------------------------------------------------------- outputs, joined


def test_outputs_of_batches_become_one(echo, model, monkeypatch):
    """Windows, buckets and prompts of different lengths: padded alike, in order."""
    monkeypatch.setattr(generator, "WINDOW", 10)
    texts = MANY[:35]
    prompts = [" ".join(WORDS[2 : 2 + number % 4]) for number in range(35)]
    output = model.generate(
        texts,
        decoder_text=prompts,
        output_scores=True,
        output_attentions=True,
        batch_size=4,
        num_beams=2,
        num_return_sequences=2,
    )
    assert isinstance(output, generator.GenerateOutput)
    starts = model.tokenizer(tf.constant(prompts)).to_list()
    longest = max(map(len, starts)) + 1
    source = model.preprocessor.generate_preprocess(texts)
    ids, mask = source["input_ids"].numpy(), source["attention_mask"].numpy()
    assert output.sequences.shape == (35, 2, longest + NEW)
    assert output.token_scores.shape == (35, 2, longest + NEW - 1)
    assert output.cross_attentions.shape == (35, 2, 3, 4, longest + NEW - 1, ids.shape[1])
    for row, start in enumerate(starts):
        length = min(mask[row].sum(), NEW)
        expected = np.zeros([longest + NEW], np.int32)
        expected[: len(start) + 1] = [BOS, *start]
        expected[len(start) + 1 :][:length] = ids[row, :length]
        np.testing.assert_array_equal(output.sequences[row, 1], expected)
        scores = expected[1:] / 2
        np.testing.assert_array_equal(output.token_scores[row, 0], scores)
        generated = slice(0, len(start) + NEW)
        tokens = slice(0, mask[row].sum())
        attentions = output.cross_attentions[row, 1, 2, 3]
        np.testing.assert_array_equal(
            attentions[generated, tokens], np.tile(scores[generated, None] + 1, mask[row].sum())
        )
        assert not attentions[len(start) + NEW :].any()
    assert [row[1] for row in output.texts] == said(model, texts, prompts)
    assert output.texts == model.generate(
        texts, decoder_text=prompts, num_beams=2, num_return_sequences=2
    )


def test_outputs_that_are_asked_for(echo, model):
    plain = model.preprocessor.generate_preprocess(TEXTS)
    output = model.generate(plain)
    assert output.token_scores is output.cross_attentions is output.texts is None
    output = model.generate(plain, output_scores=True)
    assert output.token_scores.shape == (4, 1, NEW) and output.cross_attentions is None
    # As wide as the ids are, though no row needs that.
    wide = {name: np.pad(value, [[0, 0], [0, 6]]) for name, value in plain.items()}
    output = model.generate(wide, output_attentions=True)
    assert output.cross_attentions.shape[-1] == plain["input_ids"].shape[1] + 6
    assert output.token_scores is None
    output = model.generate(TEXTS[0], output_scores=True)
    assert output.sequences.shape == (1, 1, NEW + 1)
    assert [output.texts] == said(model, TEXTS[:1])
    output = model.generate([], output_scores=True, output_attentions=True)
    assert output.sequences.shape == (0, 1, NEW + 1) and output.texts == []
    assert output.cross_attentions.shape[:2] == (0, 1)
    output = model.generate({"input_ids": np.zeros([0, 5], int)})
    assert output.sequences.shape == (0, 1, NEW + 1) and output.scores.shape == (0, 1)
    assert model.generate({"input_ids": np.zeros([2, 0], int)}).scores.shape == (2, 1)


def test_masks_may_have_gaps(echo, model):
    """Padding before and between tokens is not cut off with that behind them."""
    ids = RNG.integers(6, len(PIECES), [3, 9])
    mask = np.array([[0, 0, 1, 1, 0, 1, 0, 0, 0], [1] + [0] * 8, [0] * 9])
    output = model.generate({"input_ids": ids, "attention_mask": mask}, batch_size=1)
    assert sorted(width for _, width, _ in echo.shapes) == [1, 1, 6]
    expected = np.pad(np.where(mask, ids, PAD), [[0, 0], [0, NEW - 9]])
    np.testing.assert_array_equal(output.sequences[:, 0, 1:], expected)


# ------------------------------------------------------------------------------------- prompts


def test_prompts_of_ids(echo, model):
    prompts = np.array([[9, 8, 7], [9, 0, 0], [6, 5, 0], [0, 0, 0]])
    mask = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]])
    ids = RNG.integers(6, len(PIECES), [4, 3])
    inputs = {"input_ids": ids, "decoder_input_ids": prompts, "decoder_attention_mask": mask}
    output = model.generate(inputs)
    for row, prompt in enumerate(([9, 8, 7], [9], [6, 5], [])):
        expected = [BOS, *prompt, *ids[row]]
        assert output.sequences[row, 0].tolist() == expected + [0] * (NEW + 4 - len(expected))
    assert sorted(echo.shapes) == [(1, 3, length) for length in (1, 2, 3, 4)]

    # With the start token in all rows, the same.
    begun = {
        "input_ids": ids,
        "decoder_input_ids": np.concatenate([np.full([4, 1], BOS), prompts], axis=1),
        "decoder_attention_mask": np.concatenate([np.ones([4, 1], int), mask], axis=1),
    }
    again = model.generate({name: tf.constant(x) for name, x in begun.items()})
    np.testing.assert_array_equal(again.sequences, output.sequences)
    # A start token that stands for padding is none; nor is one in the middle.
    masked = {**inputs, "decoder_input_ids": np.where(mask, prompts, BOS)}
    again = model.generate(masked)
    np.testing.assert_array_equal(again.sequences, output.sequences)
    begun["decoder_input_ids"][1, 0] = 9
    with pytest.raises(ValueError, match=r"start token \(3\) in every row, or in none.* 3 of 4"):
        model.generate(begun)


def test_prompts_of_text(echo, model):
    generate = model.generate
    assert generate(TEXTS, decoder_text="old man") == said(model, TEXTS, ["old man"] * 4)
    assert generate(TEXTS[0], decoder_text="old") == said(model, TEXTS[:1], ["old"])[0]
    assert {prompt for _, _, prompt in echo.shapes} == {3, 2}
    echo.shapes.clear()
    prompts = ["a", "", "old man", "a"]
    assert generate(TEXTS, decoder_text=prompts) == said(model, TEXTS, prompts)
    # Those of one length together: "a" twice.
    assert sorted((rows, prompt) for rows, _, prompt in echo.shapes) == [(1, 1), (1, 3), (2, 2)]
    results = model.iterate(TEXTS, decoder_text=iter(prompts), window=3)
    assert list(results) == said(model, TEXTS, prompts)
    for wrong in (prompts[:3], [*prompts, "b"]):
        count = len(wrong)
        with pytest.raises(ValueError, match=f"received {count} prompts for 4 texts"):
            generate(TEXTS, decoder_text=wrong)
        with pytest.raises(ValueError, match="decoder_text must be one prompt for all texts, or"):
            list(model.iterate(TEXTS, decoder_text=wrong))


# -------------------------------------------------------------------------- the real functions


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"no_repeat_ngram_size": 1}, {"do_sample": True, "seed": 3, "top_k": 0}]
)
def test_a_result_depends_on_no_other(model, options):
    options = {"max_new_tokens": 8, "jit_compile": False, **options}
    texts = MANY[:24]
    together = model.generate(texts, **options)
    assert len(set(together)) > 3
    assert model.generate(texts, batch_size=5, **options) == together
    assert list(model.iterate(texts, window=7, batch_size=3, **options)) == together
    parts = model.iterate(texts[10:], first_example=10, **options)
    assert list(parts) == together[10:]
    assert model.generate(texts, **{**options, "jit_compile": True}) == together
    if options.get("do_sample"):
        assert model.generate(texts, **{**options, "seed": 4}) != together
        assert model.generate(texts[::-1], **options)[::-1] != together
    else:
        assert model.generate(texts[::-1], **options)[::-1] == together


@pytest.mark.slow
def test_prompts_of_text_and_ids_say_the_same(model):
    prompts = ["the old", "", "a woman", "who"]
    options = {"max_new_tokens": 6, "jit_compile": False}
    texts = model.generate(TEXTS, decoder_text=prompts, **options)
    source = model.preprocessor.generate_preprocess(TEXTS)
    prompt = model.tokenizer(tf.constant(prompts))
    ids = {
        **source,
        "decoder_input_ids": prompt.to_tensor(PAD),
        "decoder_attention_mask": tf.sequence_mask(prompt.row_lengths()),
    }
    output = model.generate(ids, output_scores=True, output_attentions=True, **options)
    said = model.tokenizer.detokenize(output.sequences[:, 0, 1:]).numpy()
    assert texts == [text.decode() for text in said]
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True))
    # Prompt tokens have no score; what the decoder looked at is of the source alone.
    lengths = prompt.row_lengths().numpy()
    for row, length in enumerate(lengths):
        assert not output.token_scores[row, 0, :length].any()
        assert output.token_scores[row, 0, length] < 0
        weights = output.cross_attentions[row, 0, :, :, length]
        mask = source["attention_mask"][row].numpy()
        np.testing.assert_allclose(weights.sum(axis=-1), mask.max(), atol=1e-5)
        assert not weights[..., mask == 0].any()


# ------------------------------------------------------------------------- functions, progress


def test_iterate_gives_what_generate_gives_with_the_same_functions(monkeypatch):
    traced = []
    search = compiled._search
    monkeypatch.setattr(compiled, "_search", lambda *a: traced.append(a[2]) or search(*a))
    model = make_small_model(seed=6, generation_config=bg.GenerationConfig(max_new_tokens=5))
    options = {"num_beams": 3, "num_return_sequences": 2, "batch_size": 4, "jit_compile": False}
    expected = model.generate(MANY[:10], **options)
    assert len(traced) == 1
    read = []
    results = model.iterate((read.append(text) or text for text in MANY[:10]), window=5, **options)
    assert not read
    assert next(results) == expected[0] and len(read) == 5
    assert [*results] == expected[1:] and len(read) == 10
    assert len(traced) == 1


def test_iterate_passes_on_what_it_gets(echo, capsys):
    model = make_small_model(seed=6)
    settings = bg.GenerationConfig(max_new_tokens=3, do_sample=True, seed=2)
    processors = [lambda logits, ids, step: logits]
    results = model.iterate(
        iter(MANY[:5]),
        settings,
        decoder_text=iter(WORDS[:5]),
        logits_processor=processors,
        batch_size=2,
        first_example=100,
        total=105,
        verbose=1,
        jit_compile=False,
        temperature=0.5,
    )
    assert [*results] == said(model, MANY[:5], WORDS[:5])
    config = settings.replace(temperature=0.5, seed=None)
    assert echo.built == [(config, False, tuple(processors), False)]
    assert sorted(echo.seeds) == [*range(100, 105)]
    assert max(rows for rows, *_ in echo.shapes) == 2
    assert capsys.readouterr().err.startswith("105 of 105 texts, ")


def test_functions_are_kept_by_what_compiles(echo, model):
    processors = [lambda logits, ids, step: logits, lambda logits, ids, step: logits]
    for seed in (1, 2, None):
        model.generate(TEXTS, do_sample=True, seed=seed)
    model.generate(TEXTS, do_sample=True, output_scores=True)
    assert len(echo.built) == 1 and echo.built[0][0].seed is None
    for options in (
        {"jit_compile": False},
        {"output_attentions": True},
        {"logits_processor": processors[:1]},
        {"logits_processor": processors},
    ):
        for _ in range(2):
            model.generate(TEXTS, do_sample=True, **options)
    assert len(echo.built) == 5
    assert echo.built[-1] == (echo.built[0][0], True, tuple(processors), False)
    # The one used longest ago goes first.
    for count in range(compiled.MAX_FUNCTIONS - 1):
        model.generate(TEXTS, max_new_tokens=count + 1)
    model.generate(TEXTS, do_sample=True, logits_processor=processors)
    built = len(echo.built)
    model.generate(TEXTS, max_new_tokens=compiled.MAX_FUNCTIONS)
    model.generate(TEXTS, do_sample=True, logits_processor=processors)
    assert len(model.kept_functions) == compiled.MAX_FUNCTIONS
    assert len(echo.built) == built + 1
    model.generate(TEXTS, max_new_tokens=1)
    assert len(echo.built) == built + 2


def test_progress(echo, model, monkeypatch, capsys):
    model.generate(MANY, batch_size=4)
    assert capsys.readouterr().err == ""
    model.generate(MANY, batch_size=64, verbose=1)
    assert capsys.readouterr().err.startswith("300 of 300 texts, ")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    model.generate(MANY[:16], batch_size=4)
    model.generate(MANY, batch_size=4, verbose=0)
    assert capsys.readouterr().err == ""
    echo.shapes.clear()
    model.generate(MANY[:17], batch_size=4)
    err = capsys.readouterr().err
    lines = err.split("\r")
    assert lines[1].startswith("0 of 17 texts, ") and lines[-1].startswith("17 of 17 texts, ")
    assert len(lines) == 2 + len(echo.shapes) and err.endswith(" a second\n")
    ids = np.full([30, 3], 7)
    model.generate({"input_ids": ids}, batch_size=4)
    assert "\r28 of 30 texts, " in capsys.readouterr().err
    results = model.iterate(MANY[:9], window=4, first_example=100, total=109, verbose=1)
    assert next(results) and "\r104 of 109 texts, " in capsys.readouterr().err
    model.generate(tf.data.Dataset.from_tensor_slices(MANY[:5]).batch(2), batch_size=2)
    assert "\r5 texts, " in capsys.readouterr().err


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (5, "received int"),
        (None, "received NoneType"),
        (["a", 5], r"inputs\[1\] must be text, received 5"),
        (["a", None], r"inputs\[1\] must be text, received None: leave the row out"),
        (np.ones([2, 3]), "inputs must be a string, several .* received ndarray"),
        (iter(["a"]), "inputs must be a string, several .* received list_iterator"),
        (tf.data.Dataset.range(3), "must hold strings, batched or not, .*int64"),
        (tf.data.Dataset.from_tensors(("a", "b")), "must hold strings"),
        (tf.data.Dataset.from_tensors([["a"]]), r"must hold strings, .*shape=\(1, 1\)"),
    ],
)
def test_inputs_of_other_types(model, inputs, message):
    with pytest.raises(TypeError, match=message):
        model.generate(inputs)


IDS = np.array([[7, 8, 9], [9, 8, 7]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": IDS}, "must have the keys input_ids.*received input_ids, ids"),
        ({"decoder_attention_mask": IDS}, "must have the keys .*received input_ids, decoder_att"),
        ({"input_ids": IDS[0]}, r"one shape \[batch, length\], received int64 \(3,\)"),
        ({"input_ids": IDS / 2}, "input_ids and attention_mask must be integers"),
        (
            {"input_ids": np.where(IDS == 9, 80, IDS)},
            r"input_ids must lie in \[0, 80\), .* 7 to 80",
        ),
        ({"input_ids": -IDS}, r"input_ids must lie in \[0, 80\), received -9 to -7"),
        ({"input_ids": np.ones([1, 27], int)}, r"must not be longer than .*\(26\), received 27"),
        ({"attention_mask": IDS[:1] * 0}, r"of one shape .*\(2, 3\) and int64 \(1, 3\)"),
        ({"attention_mask": IDS}, "attention_mask must be 1 on tokens and 0 on padding"),
        ({"decoder_input_ids": IDS[0]}, "decoder_input_ids and decoder_attention_mask must be int"),
        ({"decoder_input_ids": IDS + 80}, r"decoder_input_ids must lie in \[0, 80\)"),
        ({"decoder_input_ids": IDS[:1]}, "a row for each of input_ids, received 1 for 2"),
        (
            {"decoder_input_ids": np.ones([2, 23], int)},
            r"decoder_input_ids must not be longer than .* \(22\), received 23",
        ),
        (
            {"decoder_input_ids": np.ones([2, 15], int)},
            r"less the prompt's further 15 tokens, received 8",
        ),
        (
            {"decoder_input_ids": IDS, "decoder_attention_mask": [[1, 1, 1], [0, 1, 1]]},
            r"padding at the end of each row, received \[0, 1, 1\] in row 1",
        ),
    ],
)
def test_ids_that_do_not_fit(model, changes, message):
    with pytest.raises(ValueError, match=message):
        model.generate({"input_ids": IDS, **changes}, max_new_tokens=8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decoder_text": 5}, TypeError, "decoder_text must be a list, an array, .* received int"),
        ({"decoder_text": ["a", 5, "b", "c"]}, TypeError, r"decoder_text\[1\] must be text, rec"),
        (
            {"decoder_text": "word " * 15},
            ValueError,
            "max_new_tokens must not exceed .* prompt's further",
        ),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer of at least 1, received 0"),
        ({"batch_size": True}, ValueError, "batch_size must be an integer"),
        ({"verbose": 2}, ValueError, 'verbose must be "auto", 0 or 1, received 2'),
        ({"logits_processor": len}, TypeError, "logits_processor must be a list of functions"),
        ({"logits_processor": [5]}, TypeError, "logits_processor must be a list of functions"),
        ({"max_tokens": 5}, ValueError, "GenerationConfig has no field max_tokens"),
        ({"max_new_tokens": 23}, ValueError, "max_new_tokens must not exceed"),
    ],
)
def test_options_that_do_not_fit(model, options, error, message):
    with pytest.raises(error, match=message):
        model.generate(TEXTS, **{"max_new_tokens": 8, **options})


def test_other_errors(model):
    with pytest.raises(ValueError, match="inputs must end, received a .* repeats forever"):
        model.generate(tf.data.Dataset.from_tensors("a").repeat())
    with pytest.raises(ValueError, match="decoder_text is for text, .* Pass decoder_input_ids"):
        model.generate({"input_ids": IDS}, decoder_text="a")
    with pytest.raises(ValueError, match="window must be an integer of at least 1"):
        next(model.iterate(TEXTS, window=0))
    for text in ("a bird", b"a bird"):
        with pytest.raises(TypeError, match="texts must be an iterable of strings, .* in a list"):
            next(model.iterate(text))
    silent = bg.EncoderDecoderModel(model.encoder, model.decoder)
    for texts in (TEXTS, [], "a"):
        with pytest.raises(ValueError, match="needs a tokenizer"):
            silent.generate(texts)
        with pytest.raises(ValueError, match="needs a tokenizer"):
            silent.generate(texts, output_scores=True)
