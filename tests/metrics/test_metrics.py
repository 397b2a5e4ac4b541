"""Metrics against sacrebleu, rouge-score, tensor2tensor's published numbers and counts by hand."""

import random
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bertgen_tf import metrics
from bertgen_tf.metrics import scores

sacrebleu = pytest.importorskip("sacrebleu", reason="needs the extra metrics")
rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="needs the extra metrics")

SOURCE = "About 95 species are currently accepted ."
REFERENCES = [
    "About 95 species are currently known .",
    "About 95 species are now accepted .",
    "95 species are now accepted .",
]
words = st.lists(st.sampled_from("a b c d A B .".split()), min_size=1, max_size=9).map(" ".join)
examples = st.lists(
    st.tuples(words, words, st.lists(words, min_size=1, max_size=3)), min_size=1, max_size=7
)


def corpus(
    n: int, seed: int, noise: float = 0.4, system: int = 0
) -> tuple[list[str], list[str], list[str]]:
    """Sources, predictions and references that are alike but for the noise of a system."""
    draw, of_system = random.Random(seed), random.Random(1000 * seed + system)
    vocabulary = [f"w{i}" for i in range(50)]

    def change(text: list[str], share: float, draw: random.Random) -> str:
        return " ".join(draw.choice(vocabulary) if draw.random() < share else w for w in text)

    sources, predictions, references = [], [], []
    for _ in range(n):
        text = draw.choices(vocabulary, k=draw.randint(5, 20))
        sources.append(" ".join(text))
        references.append(change(text, 0.1, draw))
        predictions.append(change(text, noise * of_system.random(), of_system))
    return sources, predictions, references


# ------------------------------------------------------------------------------------------ SARI


@pytest.mark.parametrize(
    ("prediction", "published"),
    # In tensor2tensor's sari_hook_test.py.
    [
        ("About 95 you now get in .", 0.2695360),
        ("About 95 species are now agreed .", 0.6170966),
        ("About 95 species are currently agreed .", 0.5088682),
    ],
)
@pytest.mark.parametrize("tokenize", ["none", "13a"])
def test_sari_has_tensor2tensors_published_values(prediction, published, tokenize):
    result = metrics.sari([SOURCE], [prediction], [REFERENCES], tokenize=tokenize)
    assert round(result.value / 100, 7) == pytest.approx(published, abs=1e-7)


def test_sari_has_the_value_of_huggingfaces_documentation():
    def attached(text):
        return text.replace(" .", ".")

    result = metrics.sari(
        [attached(SOURCE)], ["About 95 you now get in."], [[*map(attached, REFERENCES)]]
    )
    assert result.value == pytest.approx(26.953601953601954)


def test_sari_of_one_word_by_hand():
    # Kept of "a b": "b", which half of the references have; "a", which all have, is gone.
    # keep: precision 0.5 / 1, recall 0.5 / 1.5; delete: precision (1 - 1) / 1; add: 0/0 = 1.
    # No n-grams of 2 words are kept or added; (a b) is deleted, right for one reference of two.
    # Above 2 words all is 0/0 = 1.
    result = metrics.sari(["a b"], ["b"], [["a b", "a"]], tokenize="none")
    # (a b): keep precision 0/0 = 1, recall 0 / 1: of the one reference with 2 words, it has it.
    keep = (2 * 0.5 * (1 / 3) / (0.5 + 1 / 3) + 0 + 1 + 1) / 4
    delete = (0 + 0 + 1 + 1) / 4
    assert result.details == pytest.approx({"keep": 100 * keep, "add": 100, "delete": 100 * delete})
    assert result.value == pytest.approx(100 * (keep + 1 + delete) / 3)


def test_beta_of_deletion():
    # Nothing is deleted of the "b" that should be: precision 0/0 = 1, recall 0.
    values = [
        metrics.sari(["a b"], ["a b"], ["a"], tokenize="none", deletion_beta=beta).details["delete"]
        for beta in (0, 1)
    ]
    assert values == [100, 50]  # of orders 1 and 2; of 3 and 4 there is nothing
    results = metrics.compute(["sari", "sari_f1"], ["a b"], ["a b"], ["a"])
    assert [result.details["delete"] for result in results.values()] == values
    assert [result.name for result in results.values()] == ["sari", "sari_f1"]
    with pytest.raises(
        ValueError, match="deletion_beta must be a number of at least 0, received -1"
    ):
        metrics.sari(["a"], ["a"], ["a"], deletion_beta=-1)


@settings(max_examples=40, deadline=None)
@given(examples, st.integers(0, 2))
def test_a_reference_as_prediction_has_the_best_scores(rows, pick):
    sources, _, references = (list(side) for side in zip(*rows, strict=True))
    predictions = [texts[0] for texts in references]
    results = metrics.compute(
        ["exact", "sari", "chrf", "rouge"], sources, predictions, references, tokenize="none"
    )
    assert results["exact"].value == 100
    assert results["chrf"].value == pytest.approx(100)
    one = metrics.sari(sources, predictions, [[texts[0]] for texts in references], tokenize="none")
    assert one.value == pytest.approx(100)
    for result in results.values():
        assert 0 <= result.value <= 100 + 1e-9


@settings(max_examples=40, deadline=None)
@given(examples, st.randoms(use_true_random=False))
def test_order_of_examples_and_references_is_no_matter(rows, draw):
    shuffled = [(s, p, draw.sample(r, len(r))) for s, p, r in draw.sample(rows, len(rows))]
    values = []
    for some in (rows, shuffled):
        sides = [list(side) for side in zip(*some, strict=True)]
        # Of references that are equally good, sacrebleu's chrF counts the first, of any length.
        names = [name for name in metrics.METRICS if name != "chrf"]
        values.append([r.value for r in metrics.compute(names, *sides).values()])
    assert values[0] == pytest.approx(values[1])


# ---------------------------------------------------------------------- other people's metrics


@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("tokenize", metrics.TOKENIZERS)
def test_bleu_is_sacrebleus(tokenize, lowercase):
    _, predictions, references = corpus(20, seed=3)
    predictions[0] = "W1, the (end)."
    references[0] = "w1 , the ( end ) ."
    theirs = sacrebleu.BLEU(tokenize=tokenize, lowercase=lowercase, force=True)
    result = metrics.bleu(predictions, references, tokenize=tokenize, lowercase=lowercase)
    score = theirs.corpus_score(predictions, [references])
    assert result.value == pytest.approx(score.score)
    assert result.signature == str(theirs.get_signature())
    assert result.details["precision2"] == pytest.approx(score.precisions[1])
    assert result.details["brevity_penalty"] == pytest.approx(score.bp)
    assert result.examples is None


@pytest.mark.parametrize("lowercase", [False, True])
def test_chrf_is_sacrebleus(lowercase):
    _, predictions, references = corpus(20, seed=4)
    predictions[0] = predictions[0].upper()
    theirs = sacrebleu.CHRF(lowercase=lowercase)
    result = metrics.chrf(predictions, references, lowercase=lowercase)
    assert result.value == pytest.approx(theirs.corpus_score(predictions, [references]).score)
    assert result.signature == str(theirs.get_signature())
    assert result.examples[0] == pytest.approx(
        theirs.sentence_score(predictions[0], [references[0]]).score
    )


def test_several_references_not_of_the_same_number():
    # To BLEU, an absent reference that counted as empty would be the nearest in length to "off".
    predictions = ["the cat sat", "a dog ran off", "off"]
    references = [["a cat sat", "the cat sat down"], ["the dog ran off"], ["the dog ran off"]]
    streams = [
        ["a cat sat", "the dog ran off", "the dog ran off"],
        ["the cat sat down", None, None],
    ]
    results = metrics.compute(["exact", "bleu", "chrf", "rouge1"], None, predictions, references)
    bleu, chrf = sacrebleu.BLEU(), sacrebleu.CHRF()
    assert results["bleu"].value == pytest.approx(bleu.corpus_score(predictions, streams).score)
    assert results["bleu"].signature == str(bleu.get_signature())
    assert results["bleu"].details["reference_length"] == 3 + 4 + 4
    assert results["chrf"].value == pytest.approx(chrf.corpus_score(predictions, streams).score)
    # 3 of 3 and of 4 words with the better reference; then 3 of 4; then 1 of 1 and of 4.
    assert results["rouge1"].examples == pytest.approx([100 * 6 / 7, 75, 40])
    assert results["exact"].value == 0


def test_rouge_is_rouge_scores():
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    prediction = "The dogs ran home.\nA cat sat there."
    reference = "A cat sits there.\nThe dog ran to its home."
    for stemmer in (False, True):
        theirs = rouge_scorer.RougeScorer(kinds, use_stemmer=stemmer).score(reference, prediction)
        results = metrics.rouge([prediction], [reference], kinds, stemmer=stemmer)
        assert {k: r.value for k, r in results.items()} == pytest.approx(
            {k: 100 * theirs[k].fmeasure for k in kinds}
        )
    assert results["rougeL"].value != results["rougeLsum"].value


ascii_text = st.text(st.characters(max_codepoint=127), max_size=30)


@settings(max_examples=60, deadline=None)
@example("was his bus ran", "wa hi bu running dogs", True)
@given(st.one_of(ascii_text, words), st.one_of(ascii_text, words), st.booleans())
def test_words_of_rouge_are_rouge_scores_for_ascii(prediction, reference, stemmer):
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    theirs = rouge_scorer.RougeScorer(kinds, use_stemmer=stemmer).score(reference, prediction)
    for tokenize in metrics.ROUGE_TOKENIZERS:
        ours = metrics.rouge([prediction], [reference], kinds, stemmer=stemmer, tokenize=tokenize)
        for kind, result in ours.items():
            assert result.value == pytest.approx(100 * theirs[kind].fmeasure), (kind, tokenize)
            assert result.signature.startswith(f"tok:{tokenize}|stemmer:{'yes' * stemmer or 'no'}|")


@pytest.mark.parametrize(
    ("prediction", "reference", "value"),
    [
        ("Кошка сидит дома.", "кошка сидит дома", 100),
        ("Bär Mühle", "Bür Möhle", 0),
        ("straße weiß", "strasse weiß", 50),
        ("κόσμος ΚΑΛΌΣ", "Κόσμος καλός", 100),
        ("e\u0301te\u0301", "été", 100),  # the same letters, of two characters each
        ("Donau\u00addampf", "Donaudampf", 100),
        ("می\u200cخواهم", "میخواهم", 100),
        ("नमस्ते दुनिया", "नमस्ते लोग", 50),  # vowel signs are marks, not letters
        ("한국어 문장", "한국어 글", 50),
        ("我爱北京。", "我爱上海", 50),  # each character is a word
        ("ก็ดี", "กดี", 50),  # as are its marks with it
        ("cafés", "café", 100),  # the stemmer
    ],
)
def test_words_of_rouge_in_other_scripts(prediction, reference, value):
    result = metrics.rouge([prediction], [reference], ["rouge1"])["rouge1"]
    assert result.value == pytest.approx(value)
    through_compute = metrics.compute("rouge1", None, [prediction], [reference])["rouge1"]
    assert (through_compute.value, through_compute.signature) == (result.value, result.signature)

    # By name, what the package gives.
    options = {"rouge_tokenize": "rouge-score"}
    own = metrics.compute("rouge1", None, [prediction], [reference], **options)["rouge1"].value
    theirs = rouge_scorer.RougeScorer(["rouge1"], use_stemmer=True).score(reference, prediction)
    assert own == pytest.approx(100 * theirs["rouge1"].fmeasure)


def test_every_letter_and_digit_of_unicode_is_in_a_word():
    tokenizer = scores._UnicodeWords(stemmer=True)
    for start in range(0, 0x110000, 0x1000):
        kinds = {chr(c): unicodedata.category(chr(c)) for c in range(start, start + 0x1000)}
        kept = [c.lower() for c, kind in kinds.items() if kind[0] in "LN"]
        kept = [c for c in kept if unicodedata.is_normalized("NFC", c)]
        assert tokenizer.tokenize("; ".join(kept)) == kept, hex(start)
        lost = [c for c, kind in kinds.items() if kind[0] in "PSZC" and kind not in ("Cn", "Cs")]
        assert tokenizer.tokenize("".join(lost)) == [], hex(start)


def test_equivalent_texts_are_the_same_to_our_own_metrics():
    one, two = "ein Bär", "ein Ba\u0308r"
    results = metrics.compute(["exact", "sari", "rouge"], ["ein Fuchs"], [one], [two])
    assert {name: result.value for name, result in results.items()} == pytest.approx(
        dict.fromkeys(["exact", "sari", "rouge1", "rouge2", "rougeL"], 100)
    )


def test_exact_match_by_hand():
    predictions = ["a b", "A  b ", "c", "d"]
    references = [["x", "a b"], ["a b"], ["C"], ["d"]]
    assert metrics.exact_match(predictions, references).examples.tolist() == [100, 0, 0, 100]
    lower = metrics.exact_match(predictions, references, lowercase=True)
    assert lower.examples.tolist() == [100, 100, 100, 100]


# ------------------------------------------------------------------------------------- compute


def test_names_and_groups():
    assert metrics.expand("rouge") == ("rouge1", "rouge2", "rougeL")
    assert metrics.expand(["bleu", "rouge", "rouge2", "bleu"]) == (
        "bleu",
        "rouge1",
        "rouge2",
        "rougeL",
    )
    results = metrics.compute(["rougeL", "exact"], None, ["a"], ["a"])
    assert list(results) == ["rougeL", "exact"]


def test_texts_are_normalized_before_they_are_compared():
    def normalize(texts):
        assert isinstance(texts, list)
        return [text.replace("-", " ").lower() for text in texts]

    sides = ["A-b", "c"], ("a B", "X-y"), [["A-b", "z"], ["x Y"]]
    names = ["exact", "sari", "bleu", "chrf", "rouge1"]
    results = metrics.compute(names, *sides, normalize=normalize)
    same = metrics.compute(names, ["a b", "c"], ["a b", "x y"], [["a b", "z"], ["x y"]])
    assert {name: r.value for name, r in results.items()} == {n: r.value for n, r in same.items()}
    assert results["exact"].value == 100
    assert metrics.compute("exact", None, *sides[1:], normalize=normalize)["exact"].value == 100
    with pytest.raises(TypeError, match=r"references must be texts, but \[1\] is 5"):
        metrics.compute("exact", None, ["a", "b"], ["a", 5], normalize=normalize)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["meteor"], None, ["a"], ["a"]), ValueError, "metrics must be among exact, .*'meteor'"),
        (([], None, ["a"], ["a"]), ValueError, "metrics must be some of .* received none"),
        (("exact", None, [], []), ValueError, "predictions must have at least one text"),
        (("exact", None, ["a"], ["a", "b"]), ValueError, "references must be as many .* 1, .* 2"),
        (("sari", ["a", "b"], ["a"], ["a"]), ValueError, "sources must be as many .* 1, .* 2"),
        (("sari", None, ["a"], ["a"]), ValueError, "sources must be given for SARI"),
        (("exact", None, ["a", "b"], ["a", []]), ValueError, r"references must have .* \[1\]"),
        (("exact", None, "ab", ["a", "b"]), TypeError, "predictions must be a list of texts"),
        (("bleu", None, ["a", 2], ["a", "b"]), TypeError, r"predictions must be .*\[1\] is 2"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        metrics.compute(*arguments)


def test_unknown_tokenizer():
    with pytest.raises(ValueError, match="rouge_tokenize must be one of unicode, rouge-score, rec"):
        metrics.compute("rouge", None, ["a"], ["a"], rouge_tokenize="13a")
    for function in (metrics.bleu, lambda p, r, **k: metrics.sari(p, p, r, **k)):
        with pytest.raises(ValueError, match="tokenize must be one of 13a, .* received 'moses'"):
            function(["a"], ["a"], tokenize="moses")


@pytest.mark.parametrize(
    ("package", "metric", "named"),
    [("sacrebleu", "bleu", "sacrebleu"), ("rouge_score.rouge_scorer", "rouge1", "rouge-score")],
)
def test_a_missing_package_is_named(monkeypatch, package, metric, named):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"package {named}: pip install 'bertgen_tf\[metrics\]'"):
        metrics.compute(metric, None, ["a"], ["a"])
    assert metrics.compute("exact", None, ["a"], ["a"])["exact"].value == 100


# ------------------------------------------------------------------------------------- subsets


@settings(max_examples=25, deadline=None)
@given(examples, st.data())
def test_values_of_subsets_are_those_of_their_strings(rows, data):
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=9))
    sides = [list(side) for side in zip(*rows, strict=True)]
    results = metrics.compute(metrics.METRICS, *sides)
    again = metrics.compute(metrics.METRICS, *([side[i] for i in chosen] for side in sides))
    for name, result in results.items():
        assert result.of(chosen) == pytest.approx(again[name].value), name
        if result.examples is not None and name != "chrf":
            assert result.value == pytest.approx(result.examples.mean())


def test_of_no_examples():
    result = metrics.exact_match(["a"], ["a"])
    with pytest.raises(ValueError, match="exact needs an example, received none"):
        result.of(np.array([False]))
