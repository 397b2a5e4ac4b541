"""Writes tests/data/logits.npz: scores changed by HuggingFace's own logits processors.

For maintainers, to be run again only if the rules of transformers change. It needs packages that
the project does not depend on, so use an environment of its own:

    pip install transformers==5.23.0 torch==2.13.0 numpy
    python tools/make_logits_golden.py

A case is a list of processors, each a name and arguments as in
`bertgen_tf.generation.search.logits` and `bertgen_tf.generation.search.filters`. All cases have the
same shapes and are stacked: `cases` (JSON), `lengths` [cases], `ids` [cases, rows, length], of
which `lengths` count, `logits` and `expected` [cases, rows, vocabulary], with minus infinity for
banned tokens. A source has no padding, which HuggingFace counts.
"""

import argparse
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers import LogitsProcessorList

# Beside TensorFlow, in tests, the threads would wait for each other; and there is little to do.
torch.set_num_threads(1)

BATCH, BEAMS, VOCABULARY, LENGTH, SOURCE = 2, 2, 13, 11, 7
EOS = ([1], [1, 4])

# In the order in which generate() runs them.
PROCESSORS = (
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
FILTERS = ("temperature", "top_k", "top_p", "min_p", "typical_p")


class Case(NamedTuple):
    """Processors and what they are applied to; `ids` hold other tokens behind `length`."""

    processors: list[tuple[str, dict[str, Any]]]
    length: int
    ids: np.ndarray  # int32 [BATCH * BEAMS, LENGTH]
    logits: np.ndarray  # float32 [BATCH * BEAMS, VOCABULARY]


def random_case(rng: np.random.Generator, names: list[str]) -> Case:
    """A case of processors `names`; few different tokens, so that there are repetitions."""
    length = int(rng.choice([1, 2, 3, rng.integers(4, LENGTH + 1)], p=[0.2, 0.1, 0.1, 0.6]))
    tokens = rng.integers(2, VOCABULARY, size=int(rng.integers(2, 5)))
    ids = rng.choice(tokens, size=[BATCH * BEAMS, LENGTH]).astype(np.int32)
    logits = rng.normal(scale=rng.choice([0.3, 1.0, 4.0]), size=[BATCH * BEAMS, VOCABULARY])
    logits[rng.random(logits.shape) < rng.choice([0.0, 0.1])] = -np.inf
    if rng.random() < 0.3:  # log-probabilities, as in beam search
        logits = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) + 1e-30)
    processors = [(name, random_arguments(rng, name, length, tokens)) for name in names]
    return Case(processors, length, ids, logits.astype(np.float32))


def random_arguments(
    rng: np.random.Generator, name: str, length: int, tokens: np.ndarray
) -> dict[str, Any]:
    """Arguments of the processor `name` that often have an effect on ids of `tokens`."""

    def some(count: int) -> list[int]:
        return [int(token) for token in rng.choice(tokens, size=count)]

    def sequence() -> list[int]:
        return some(int(rng.integers(1, 4)))

    def source() -> dict[str, Any]:
        input_ids = [some(SOURCE) for _ in range(BATCH)]
        return {"input_ids": input_ids, "attention_mask": [[1] * SOURCE] * BATCH}

    def near(value: int) -> int:
        return max(0, value + int(rng.integers(-1, 2)))

    eos = EOS[rng.integers(2)]
    prompt_length = int(rng.integers(1, length + 1))
    penalty = float(rng.choice([0.6, 1.3, 2.0]))
    size = int(rng.choice([1, 2, 3, 4], p=[0.1, 0.5, 0.2, 0.2]))
    least = {"min_tokens_to_keep": int(rng.choice([1, 2, 3]))}
    share = float(rng.choice([0.02, 0.3, 0.7, 0.95]))
    if name == "sequence_bias":
        biases = {tuple(sequence()): float(rng.normal(scale=3.0)) for _ in range(5)}
        return {"biases": [[list(ids), bias] for ids, bias in biases.items()]}
    if name == "bad_words":
        words = [sequence() for _ in range(4)]
        return {"bad_words_ids": [*words, [1]], "eos_token_ids": eos}
    if name in ("repetition_penalty", "encoder_repetition_penalty"):
        return {"penalty": penalty} | (source() if name.startswith("encoder") else {})
    if name in ("no_repeat_ngram", "encoder_no_repeat_ngram"):
        return {"size": size} | (source() if name.startswith("encoder") else {})
    if name == "min_length":
        return {"n": near(length + 1), "eos_token_ids": eos}
    if name == "min_new_tokens":
        n = near(length - prompt_length + 1)
        return {"n": n, "eos_token_ids": eos, "prompt_length": prompt_length}
    if name == "forced_bos":
        return {"token_id": some(1)[0]}
    if name == "forced_eos":
        return {"token_ids": eos, "max_length": max(1, near(length + 1))}
    if name == "exponential_decay_length_penalty":
        return {
            "start": int(rng.integers(0, 3)),
            "factor": float(rng.choice([0.7, 1.1, 1.8])),
            "eos_token_ids": eos,
            "prompt_length": prompt_length,
        }
    if name == "suppress_tokens":
        return {"token_ids": some(2)}
    if name == "begin_suppress_tokens":
        return {"token_ids": some(2), "begin_index": max(1, near(length))}
    if name == "temperature":
        return {"t": float(rng.choice([0.1, 0.7, 100.0]))}
    if name == "top_k":
        return {"k": int(rng.integers(1, VOCABULARY + 4))} | least
    if name in ("top_p", "min_p", "typical_p"):
        return {"p": share} | least
    raise ValueError(name)


def transformers_processor(name: str, arguments: dict[str, Any]) -> transformers.LogitsProcessor:
    """The processor of transformers that has the meaning of ours."""
    a = arguments
    if name.startswith("encoder"):
        source = torch.tensor(a["input_ids"])
    least = {"min_tokens_to_keep": a.get("min_tokens_to_keep", 1)}
    make = {
        "sequence_bias": lambda: transformers.SequenceBiasLogitsProcessor(a["biases"]),
        "encoder_repetition_penalty": lambda: transformers.EncoderRepetitionPenaltyLogitsProcessor(
            a["penalty"], source
        ),
        "repetition_penalty": lambda: transformers.RepetitionPenaltyLogitsProcessor(a["penalty"]),
        "no_repeat_ngram": lambda: transformers.NoRepeatNGramLogitsProcessor(a["size"]),
        "encoder_no_repeat_ngram": lambda: transformers.EncoderNoRepeatNGramLogitsProcessor(
            a["size"], source
        ),
        "bad_words": lambda: transformers.NoBadWordsLogitsProcessor(
            a["bad_words_ids"], a["eos_token_ids"]
        ),
        "min_length": lambda: transformers.MinLengthLogitsProcessor(a["n"], a["eos_token_ids"]),
        "min_new_tokens": lambda: transformers.MinNewTokensLengthLogitsProcessor(
            a["prompt_length"], a["n"], a["eos_token_ids"]
        ),
        "forced_bos": lambda: transformers.ForcedBOSTokenLogitsProcessor(a["token_id"]),
        "forced_eos": lambda: transformers.ForcedEOSTokenLogitsProcessor(
            a["max_length"], a["token_ids"]
        ),
        "exponential_decay_length_penalty": lambda: transformers.ExponentialDecayLengthPenalty(
            (a["start"], a["factor"]), a["eos_token_ids"], a["prompt_length"]
        ),
        "suppress_tokens": lambda: transformers.SuppressTokensLogitsProcessor(a["token_ids"]),
        "begin_suppress_tokens": lambda: transformers.SuppressTokensAtBeginLogitsProcessor(
            a["token_ids"], a["begin_index"]
        ),
        "temperature": lambda: transformers.TemperatureLogitsWarper(a["t"]),
        "top_k": lambda: transformers.TopKLogitsWarper(a["k"], **least),
        "top_p": lambda: transformers.TopPLogitsWarper(a["p"], **least),
        "min_p": lambda: transformers.MinPLogitsWarper(a["p"], **least),
        "typical_p": lambda: transformers.TypicalLogitsWarper(a["p"], **least),
    }
    return make[name]()


def run_transformers(case: Case) -> np.ndarray:
    """What transformers makes of the scores of a case."""
    processors = LogitsProcessorList(transformers_processor(*each) for each in case.processors)
    ids = torch.tensor(case.ids[:, : case.length], dtype=torch.int64)
    return processors(ids, torch.tensor(case.logits)).numpy()


def random_names(rng: np.random.Generator) -> list[str]:
    """Several processors, then perhaps filters, in the order of generate()."""
    chosen = sorted(rng.choice(len(PROCESSORS), size=5, replace=False))
    filters = sorted(rng.choice(len(FILTERS), size=int(rng.integers(0, 4)), replace=False))
    return [PROCESSORS[i] for i in chosen] + [FILTERS[i] for i in filters]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = pathlib.Path(__file__).parent.parent / "tests/data/logits.npz"
    parser.add_argument("--output", type=pathlib.Path, default=default)
    parser.add_argument("--seed", type=int, default=11)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    names = [[name] for name in PROCESSORS + FILTERS for _ in range(6)]
    names += [random_names(rng) for _ in range(30)]
    found = [(case, run_transformers(case)) for case in (random_case(rng, n) for n in names)]
    # Where everything is banned, HuggingFace's filters give NaN.
    found = [(case, expected) for case, expected in found if not np.isnan(expected).any()]
    cases = [case for case, _ in found]
    np.savez_compressed(
        arguments.output,
        transformers=np.array(transformers.__version__),
        cases=np.array(json.dumps([case.processors for case in cases])),
        lengths=np.array([case.length for case in cases], np.int32),
        ids=np.stack([case.ids for case in cases]),
        logits=np.stack([case.logits for case in cases]),
        expected=np.stack([expected for _, expected in found]),
    )
    print(f"{arguments.output}: {len(cases)} cases of transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
