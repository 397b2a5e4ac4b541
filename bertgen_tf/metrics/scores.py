"""Scores of generated texts against references: exact match, SARI, BLEU, chrF and ROUGE.

Every score is a percentage. That of a corpus comes from statistics of its examples, so subsets, and
the resamples of `bertgen_tf.metrics.significance`, take sums, not string operations.

BLEU and chrF are sacrebleu's, ROUGE is rouge-score's: `pip install 'bertgen_tf[metrics]'`.

Exact match, SARI and ROUGE of Unicode words take texts that Unicode calls equivalent, such as an é
of one character and of two, for the same (NFC). BLEU, chrF and ROUGE of rouge-score's own words do
not: they are what their packages give.
"""

import dataclasses
import importlib.metadata
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from bertgen_tf.checks import check_number
from bertgen_tf.metrics.sari_scores import sari_scores

METRICS = ("exact", "sari", "sari_f1", "bleu", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum")
GROUPS = {"rouge": ("rouge1", "rouge2", "rougeL")}
# Those of sacrebleu that need neither a download nor another package.
TOKENIZERS = ("13a", "intl", "none", "char", "zh")
ROUGE_TOKENIZERS = ("unicode", "rouge-score")
# Scripts without spaces between words: East Asia, the mainland of its south-east, Tibet.
_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_WORD = (
    rf"[{_SPACELESS}&&[\p{{L}}\p{{N}}]]\p{{M}}*"
    rf"|[[\p{{L}}\p{{N}}]--[{_SPACELESS}]][[\p{{L}}\p{{N}}\p{{M}}]--[{_SPACELESS}]]*"
)
# What only says how letters are joined, such as a soft hyphen; a zero-width space does part words.
_JOINERS = r"[\p{Cf}--\u200b]"


@dataclasses.dataclass(frozen=True, eq=False)
class MetricResult:
    """One metric over all examples.

    Attributes:
        name: one of `METRICS`.
        value: percent, of all examples.
        signature: what determines the value: tokens, case, version.
        details: its parts, by their names; empty for most metrics.
        examples: percent of each example [n]; None for BLEU, which has no such values.
        statistics: of each example [n, k].
        combine: their sums [k] and the number of examples -> percent.
    """

    name: str
    value: float
    signature: str
    details: dict[str, float]
    examples: np.ndarray | None
    statistics: np.ndarray = dataclasses.field(repr=False)
    combine: Callable[[np.ndarray, int], float] = dataclasses.field(repr=False)

    def of(self, examples: Any) -> float:
        """The value over some examples: their indices, or a mask [n]."""
        chosen = self.statistics[examples]
        if not len(chosen):
            raise ValueError(f"{self.name} needs an example, received none")
        return self.combine(chosen.sum(axis=0), len(chosen))


References = Sequence[str] | Sequence[Sequence[str]]


def compute(
    metrics: str | Iterable[str],
    sources: Sequence[str] | None,
    predictions: Sequence[str],
    references: References,
    *,
    lowercase: bool = False,
    tokenize: str = "13a",
    rouge_tokenize: str = "unicode",
    normalize: Callable[[list[str]], list[str]] | None = None,
) -> dict[str, MetricResult]:
    """Several metrics at once.

    Args:
        metrics: names of `METRICS` or `GROUPS`, or one name.
        sources: what was generated from [n]; needed for SARI only.
        predictions: what was generated [n].
        references: the correct texts [n], one or several for each prediction.
        lowercase: whether case is ignored (ROUGE always ignores it).
        tokenize: how BLEU and SARI split words: one of `TOKENIZERS`, sacrebleu's names; "none" for
            texts whose tokens are already separated by spaces.
        rouge_tokenize: how ROUGE splits words, see `rouge`.
        normalize: applied to all texts first, such as `normalize` of a model's preprocessor; None
            compares them as they are.

    Returns:
        the results by their names, in the requested order.

    Raises:
        ValueError: an unknown name, no examples, different numbers of them, no reference.
        TypeError: something is not text.
        ImportError: a package is not installed.
    """
    names = expand(metrics)
    if sources is None and not {"sari", "sari_f1"}.isdisjoint(names):
        raise ValueError("sources must be given for SARI, received None")
    if normalize is not None:
        lists = _check(predictions, references, sources)
        flat = iter(normalize([text for texts in lists for text in texts]))
        references = [[next(flat) for _ in texts] for texts in lists]
        predictions = normalize(list(predictions))
        sources = None if sources is None else normalize(list(sources))
    options = {"lowercase": lowercase, "tokenize": tokenize}
    functions = {
        "exact": lambda: exact_match(predictions, references, lowercase=lowercase),
        "sari": lambda: sari(sources, predictions, references, **options),
        "sari_f1": lambda: sari(sources, predictions, references, deletion_beta=1, **options),
        "bleu": lambda: bleu(predictions, references, **options),
        "chrf": lambda: chrf(predictions, references, lowercase=lowercase),
    }
    kinds = [name for name in names if name.startswith("rouge")]
    scores = {}
    if kinds:
        scores = rouge(predictions, references, kinds, tokenize=rouge_tokenize)
    return {name: scores[name] if name in scores else functions[name]() for name in names}


def expand(metrics: str | Iterable[str]) -> tuple[str, ...]:
    """The names of `METRICS` that names and groups stand for, each once.

    Raises:
        ValueError: an unknown name, or none.
    """
    given = [metrics] if isinstance(metrics, str) else list(metrics)
    known = (*METRICS, *GROUPS)
    for name in given:
        if name not in known:
            raise ValueError(f"metrics must be among {', '.join(known)}, received {name!r}")
    if not given:
        raise ValueError(f"metrics must be some of {', '.join(known)}, received none")
    return tuple(dict.fromkeys(kind for name in given for kind in GROUPS.get(name, (name,))))


def exact_match(
    predictions: Sequence[str], references: References, *, lowercase: bool = False
) -> MetricResult:
    """The share of predictions that are one of their references; white space may differ.

    Args:
        predictions: what was generated [n].
        references: the correct texts [n], one or several for each prediction.
        lowercase: whether case is ignored.
    """
    lists = _check(predictions, references)

    def normalise(text: str) -> str:
        return " ".join(_same(_lower(text, lowercase)).split())

    examples = [
        100.0 * (normalise(prediction) in [normalise(text) for text in texts])
        for prediction, texts in zip(predictions, lists, strict=True)
    ]
    return _mean("exact", f"case:{_case(lowercase)}", np.array(examples))


def sari(
    sources: Sequence[str],
    predictions: Sequence[str],
    references: References,
    *,
    lowercase: bool = False,
    tokenize: str = "13a",
    deletion_beta: float = 0.0,
) -> MetricResult:
    """SARI, as in the BertGeneration paper: how well words are kept, added and deleted.

    SARI is by Xu et al. 2016, "Optimizing Statistical Machine Translation for Text Simplification".
    The paper (Rothe et al. 2020) uses the definition of tensor2tensor's `sari_hook`: the mean over
    sentences of the mean of three F scores, each a mean over n-grams of 1 to 4 words. It differs
    from the published code of Xu et al.: 0/0 is 1 (a perfect prediction has 100 percent), n-grams
    count once however often a sentence has them, and precision and recall are ratios of sums. EASSE
    adds up the counts of all sentences and takes F1 for deletions: its values differ.

    Deletions count by their precision alone: a system that deletes nothing has full precision, so
    copying the source scores high where little is to be deleted. `deletion_beta=1`, the metric
    "sari_f1" of `compute`, takes their F1 instead, as LaserTagger (Malmi et al. 2019) and FELIX do
    with the same `sari_hook`. The paper does not state its beta; 0 is the default of the hook.

    Args:
        sources: what was generated from [n].
        predictions: what was generated [n].
        references: the correct texts [n], one or several for each prediction.
        lowercase: whether case is ignored.
        tokenize: how words are split, one of `TOKENIZERS`.
        deletion_beta: of the F score of deletions: 0 for their precision, 1 for F1.

    Returns:
        the result, with "keep", "add" and "delete" as its details.
    """
    lists = _check(predictions, references, sources)
    check_number("deletion_beta", deletion_beta, 0)
    words = _tokenizer(tokenize)

    def split(text: str) -> list[str]:
        return words(_same(_lower(text, lowercase))).split()

    parts = 100.0 * np.array(
        [
            sari_scores(split(source), split(prediction), [*map(split, texts)], deletion_beta)
            for source, prediction, texts in zip(sources, predictions, lists, strict=True)
        ]
    )
    result = _mean(
        "sari_f1" if deletion_beta == 1 else "sari",
        f"case:{_case(lowercase)}|tok:{tokenize}|beta_deletion:{deletion_beta:g}|zero_by_zero:1",
        parts.mean(axis=1),
    )
    details = dict(zip(("keep", "add", "delete"), map(float, parts.mean(axis=0)), strict=True))
    return dataclasses.replace(result, details=details)


def bleu(
    predictions: Sequence[str],
    references: References,
    *,
    lowercase: bool = False,
    tokenize: str = "13a",
) -> MetricResult:
    """Corpus BLEU, sacrebleu's.

    The paper's BLEU on WikiSplit (NLTK, cased, tokens between spaces) is `tokenize="none"`; that on
    WMT (the script of tensorflow/models, uncased) is `tokenize="intl", lowercase=True`.

    Args:
        predictions: what was generated [n].
        references: the correct texts [n], one or several for each prediction.
        lowercase: whether case is ignored.
        tokenize: how words are split, one of `TOKENIZERS`.

    Returns:
        the result; its details are the precisions of 1- to 4-grams, in percent, the brevity penalty
        and the lengths, in words.
    """
    lists = _check(predictions, references)
    _check_tokenizer(tokenize)
    # `force` stops it from warning about tokens between spaces.
    metric = _import("sacrebleu").BLEU(lowercase=lowercase, tokenize=tokenize, force=True)
    statistics = _sacrebleu_statistics(metric, predictions, lists)

    def score(sums: np.ndarray) -> Any:
        return metric._compute_score_from_stats(sums.tolist())

    total = score(statistics.sum(axis=0))
    details = {f"precision{n}": float(p) for n, p in enumerate(total.precisions, 1)}
    details |= {
        "brevity_penalty": float(total.bp),
        "length": float(total.sys_len),
        "reference_length": float(total.ref_len),
    }
    return MetricResult(
        "bleu",
        float(total.score),
        str(metric.get_signature()),
        details,
        None,
        statistics,
        lambda sums, count: float(score(sums).score),
    )


def chrf(
    predictions: Sequence[str], references: References, *, lowercase: bool = False
) -> MetricResult:
    """Corpus chrF (character n-grams, Popović 2015), sacrebleu's.

    Args:
        predictions: what was generated [n].
        references: the correct texts [n], one or several for each prediction.
        lowercase: whether case is ignored.
    """
    lists = _check(predictions, references)
    metric = _import("sacrebleu").CHRF(lowercase=lowercase)
    statistics = _sacrebleu_statistics(metric, predictions, lists)

    def combine(sums: np.ndarray, count: int = 1) -> float:
        return float(metric._compute_score_from_stats(sums.tolist()).score)

    return MetricResult(
        "chrf",
        combine(statistics.sum(axis=0)),
        str(metric.get_signature()),
        {},
        np.array([combine(row) for row in statistics]),
        statistics,
        combine,
    )


def _sacrebleu_statistics(
    metric: Any, predictions: Sequence[str], references: list[list[str]]
) -> np.ndarray:
    """[n, k]; sacrebleu has them for its own significance tests only, under these names."""
    streams = max(map(len, references))
    # Its references are listed by stream, None where an example has fewer.
    by_stream = [[r[i] if i < len(r) else None for r in references] for i in range(streams)]
    return np.array(metric._extract_corpus_statistics(list(predictions), by_stream), float)


def rouge(
    predictions: Sequence[str],
    references: References,
    kinds: Iterable[str] = GROUPS["rouge"],
    *,
    stemmer: bool = True,
    tokenize: str = "unicode",
) -> dict[str, MetricResult]:
    """ROUGE F1, rouge-score's; the best of several references.

    rouge-score deletes all but a to z and 0 to 9: a perfect text in Russian has 0 percent, and
    "Bär" is the same as "Bür". So words are Unicode's by default, which for ASCII are the same.

    Args:
        predictions: what was generated [n].
        references: the correct texts [n], one or several for each prediction.
        kinds: "rouge1", "rouge2", "rougeL" (longest common subsequence of the texts) and
            "rougeLsum" (of their sentences, one per line: the ROUGE-L of CNN/DailyMail).
        stemmer: whether to use Porter's, as published figures do. It strips English suffixes.
        tokenize: how words are split, after lower-casing: "unicode", runs of letters, marks and
            digits, in scripts without spaces between words each character; or "rouge-score", the
            package's own, with which English figures are published.

    Returns:
        the results by kind.

    Raises:
        ValueError: `tokenize` is none of `ROUGE_TOKENIZERS`.
    """
    lists = _check(predictions, references)
    if tokenize not in ROUGE_TOKENIZERS:
        raise ValueError(
            f"rouge_tokenize must be one of {', '.join(ROUGE_TOKENIZERS)}, received {tokenize!r}"
        )
    scorer = _import("rouge_score.rouge_scorer").RougeScorer(
        list(kinds),
        use_stemmer=stemmer,
        tokenizer=_UnicodeWords(stemmer) if tokenize == "unicode" else None,
    )
    rows = [
        scorer.score_multi(texts, prediction)
        for prediction, texts in zip(predictions, lists, strict=True)
    ]
    version = importlib.metadata.version("rouge-score")
    signature = f"tok:{tokenize}|stemmer:{'yes' if stemmer else 'no'}|version:{version}"
    return {
        kind: _mean(kind, signature, np.array([100.0 * row[kind].fmeasure for row in rows]))
        for kind in kinds
    }


class _UnicodeWords:
    """A tokenizer for rouge-score."""

    def __init__(self, stemmer: bool):
        regex = _import("regex")
        self._words = regex.compile(_WORD, regex.VERSION1).findall
        self._joiners = regex.compile(_JOINERS, regex.VERSION1).sub
        self._stem = _import("nltk.stem.porter").PorterStemmer().stem if stemmer else None

    def tokenize(self, text: str) -> list[str]:
        words = self._words(_same(self._joiners("", text.lower())))
        # As there: short words have no suffix.
        return [self._stem(w) if len(w) > 3 else w for w in words] if self._stem else words


def subset(results: dict[str, MetricResult], examples: np.ndarray) -> dict[str, MetricResult]:
    """The same metrics over some examples: their indices, or a mask [n].

    Details are left out, as they describe all examples.
    """
    return {
        name: dataclasses.replace(
            result,
            value=result.of(examples),
            details={},
            examples=None if result.examples is None else result.examples[examples],
            statistics=result.statistics[examples],
        )
        for name, result in results.items()
    }


def _mean(name: str, signature: str, examples: np.ndarray) -> MetricResult:
    return MetricResult(
        name,
        float(examples.mean()),
        signature,
        {},
        examples,
        examples[:, None],
        lambda sums, count: float(sums[0] / count),
    )


def _check(
    predictions: Sequence[str], references: References, sources: Sequence[str] | None = None
) -> list[list[str]]:
    """The references of each prediction, if all inputs are valid."""
    for name, values in (
        ("predictions", predictions),
        ("references", references),
        ("sources", sources),
    ):
        if values is None and name == "sources":
            continue
        if isinstance(values, str):
            raise TypeError(f"{name} must be a list of texts, received one text: {values[:40]!r}")
        if not len(values):
            raise ValueError(f"{name} must have at least one text, received none")
        if len(values) != len(predictions):
            raise ValueError(
                f"{name} must be as many as predictions, {len(predictions)}, received {len(values)}"
            )
    lists = [
        list(texts) if isinstance(texts, Iterable) and not isinstance(texts, str) else [texts]
        for texts in references
    ]
    for index, texts in enumerate(lists):
        if not texts:
            raise ValueError(f"references must have a text for each prediction, [{index}] has none")
    columns = {"predictions": [[text] for text in predictions], "references": lists}
    if sources is not None:
        columns["sources"] = [[text] for text in sources]
    for name, rows in columns.items():
        for index, row in enumerate(rows):
            for text in row:
                if not isinstance(text, str):
                    raise TypeError(f"{name} must be texts, but [{index}] is {text!r}")
    return lists


def _tokenizer(name: str) -> Callable[[str], str]:
    """Puts spaces between tokens."""
    _check_tokenizer(name)
    if name == "none":
        return lambda text: text
    return _import("sacrebleu").BLEU(tokenize=name).tokenizer


def _check_tokenizer(name: str) -> None:
    if name not in TOKENIZERS:
        raise ValueError(f"tokenize must be one of {', '.join(TOKENIZERS)}, received {name!r}")


def _lower(text: str, lowercase: bool) -> str:
    return text.lower() if lowercase else text


def _same(text: str) -> str:
    """One spelling of all that are equivalent."""
    return unicodedata.normalize("NFC", text)


def _case(lowercase: bool) -> str:
    return "lc" if lowercase else "mixed"


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise ImportError(
            f"this metric needs the package {package}: pip install 'bertgen_tf[metrics]'"
        ) from error
