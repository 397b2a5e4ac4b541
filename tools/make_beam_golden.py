"""Writes what HuggingFace's own `generate()` finds: hf_beam_search.npz and hf_generation.npz.

For maintainers, to be run again only if the rules of transformers change. It needs packages that
the project does not depend on, so use an environment of its own:

    pip install transformers==5.23.0 torch==2.13.0 numpy
    python tools/make_beam_golden.py

hf_beam_search.npz has searches. The model is a random table: the logits of the next token are
`table[token before the last % 3, last]`, with 0 for the token before the first. Examples of a batch
differ in their start token. Each case holds `table`, `start_ids`, `options` (JSON, in the names of
`generate()`), and the results `sequences` [batch, num_return_sequences, 1 + max_new_tokens], 0
after the end, and, for beams, `scores` [batch, num_return_sequences].

hf_generation.npz has the options of `generate()`, prompts and several end tokens, with the
encoder-decoder `v5_pair` of tests/data/huggingface.zip. Each case holds `input_ids`,
`decoder_input_ids`, `options`, `sequences` and `scores`, as above. Without any of its options, each
would find something else.
"""

import argparse
import json
import pathlib
import tempfile
import zipfile

import numpy as np
import torch
import transformers
from transformers.modeling_outputs import CausalLMOutput

PAD = 0
DATA = pathlib.Path(__file__).parent.parent / "tests/data"

# Of an encoder-decoder with the tokens 0 to 46: padding 0, end 1, start 2.
OPTIONS = [
    {"repetition_penalty": 1.6, "max_new_tokens": 8},
    {"repetition_penalty": 1.6, "no_repeat_ngram_size": 2, "num_beams": 3, "max_new_tokens": 9},
    # Beams would not be the same in transformers 5.23, which penalises the first rows only.
    {"encoder_repetition_penalty": 0.5, "min_length": 5, "eos_token_id": 3, "max_length": 11},
    {"encoder_no_repeat_ngram_size": 1, "num_beams": 3, "max_length": 10},
    {"bad_words_ids": 2, "sequence_bias": 3, "max_new_tokens": 8},
    {"bad_words_ids": 2, "sequence_bias": 3, "num_beams": 3, "max_new_tokens": 8},
    {"begin_suppress_tokens": 2, "suppress_tokens": 2, "forced_eos_token_id": 1, "max_length": 9},
    {"begin_suppress_tokens": 3, "forced_bos_token_id": 7, "num_beams": 2, "max_length": 9},
    {"exponential_decay_length_penalty": [2, 1.3], "eos_token_id": 3, "max_new_tokens": 10},
    {
        "exponential_decay_length_penalty": [2, 1.1],
        "eos_token_id": 2,
        "num_beams": 3,
        "num_return_sequences": 2,
        "early_stopping": "never",
        "max_length": 12,
    },
    {"min_new_tokens": 4, "eos_token_id": 3, "forced_eos_token_id": 9, "max_new_tokens": 7},
    {"min_length": 7, "eos_token_id": 3, "num_beams": 3, "early_stopping": True, "max_length": 11},
]


class TableModel(transformers.PreTrainedModel, transformers.GenerationMixin):
    """A language model that looks its logits up."""

    config_class = transformers.PreTrainedConfig

    def __init__(self, table: np.ndarray):
        config = transformers.PreTrainedConfig(vocab_size=table.shape[-1], is_decoder=True)
        config.num_hidden_layers = 1
        super().__init__(config)
        self.table = torch.nn.Parameter(torch.tensor(table), requires_grad=False)

    def forward(self, input_ids, **_):
        before_last = torch.nn.functional.pad(input_ids, (1, 0))[:, :-1] % len(self.table)
        return CausalLMOutput(logits=self.table[before_last, input_ids])

    def prepare_inputs_for_generation(self, input_ids, **_):
        return {"input_ids": input_ids}


def random_case(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, dict]:
    """A table, start ids and options that never ask for more candidates than there are tokens."""
    num_beams = int(rng.choice([1, 2, 3, 4], p=[0.1, 0.3, 0.3, 0.3]))
    eos = [1, 3, 4][: rng.choice([1, 1, 2, 3])]
    options = {
        "num_beams": num_beams,
        "max_new_tokens": int(rng.integers(1, 11)),
        "eos_token_id": eos,
        "pad_token_id": PAD,
    }
    if num_beams > 1:
        options |= {
            "num_return_sequences": int(rng.integers(1, num_beams + 1)),
            "length_penalty": float(rng.choice([1.0, 0.0, 0.6, 2.0, -1.0])),
            "early_stopping": [False, True, "never"][rng.integers(3)],
        }
    if rng.random() < 0.3:
        options["min_new_tokens"] = int(rng.integers(0, options["max_new_tokens"] + 1))
    if rng.random() < 0.3:
        options["suppress_tokens"] = [int(rng.integers(5, 8)), 2]
    vocabulary = max(2, 1 + len(eos)) * num_beams + len(eos) + 2 + int(rng.integers(4))
    vocabulary = max(vocabulary, 9)
    table = rng.normal(scale=rng.choice([0.5, 1.0, 2.0]), size=[3, vocabulary, vocabulary])
    table[..., eos] += rng.choice([-1.0, 0.0, 1.0])
    start_ids = rng.integers(2, vocabulary, size=rng.integers(1, 4))
    return table.astype(np.float32), start_ids.astype(np.int32), options


def search(table: np.ndarray, start_ids: np.ndarray, options: dict) -> dict[str, np.ndarray]:
    """`sequences` and, for beams, `scores` of HuggingFace's `generate()`."""
    prompts = torch.tensor(start_ids, dtype=torch.int64)[:, None]
    output = generate(TableModel(table), prompts, use_cache=False, **options)
    return results_of(output, prompts, options)


def generate(model: transformers.PreTrainedModel, *inputs: torch.Tensor, **options):
    return model.generate(
        *inputs, do_sample=False, output_scores=True, return_dict_in_generate=True, **options
    )


def results_of(output, prompts: torch.Tensor, options: dict) -> dict[str, np.ndarray]:
    batch, start = prompts.shape
    width = options.get("max_length") or start + options["max_new_tokens"]
    ends = options.get("eos_token_id", 1)
    sequences = np.full([len(output.sequences), width], PAD, np.int32)
    for row, found in zip(sequences, output.sequences.numpy(), strict=True):
        places = np.flatnonzero(np.isin(found[start:], ends))
        # generate() fills with EOS after the end where the padding id is 0.
        length = start + 1 + places[0] if len(places) else len(found)
        row[:length] = found[:length]
    results = {"sequences": sequences.reshape(batch, -1, width)}
    if options["num_beams"] > 1:
        results["scores"] = output.sequences_scores.numpy().reshape(batch, -1)
    return results


def option_cases(rng: np.random.Generator) -> list[dict[str, np.ndarray]]:
    """One case with and one without a prompt for each of `OPTIONS`."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(DATA / "huggingface.zip") as archive:
            archive.extractall(folder)
        model = transformers.EncoderDecoderModel.from_pretrained(f"{folder}/v5_pair")
    model.generation_config = transformers.GenerationConfig(
        pad_token_id=PAD, bos_token_id=2, eos_token_id=1, decoder_start_token_id=2
    )
    cases = []
    for options in OPTIONS:
        for prompt_length in (1, 3):
            case = None
            while case is None:
                case = option_case(model, rng, options, prompt_length)
            cases.append(case)
    return cases


def option_case(
    model: transformers.PreTrainedModel, rng: np.random.Generator, kinds: dict, prompt_length: int
) -> dict[str, np.ndarray] | None:
    """Random inputs and ids for options, or None where an option changes nothing."""
    input_ids = rng.integers(3, 47, [2, rng.integers(4, 10)])
    prompts = np.concatenate([np.full([2, 1], 2), rng.integers(3, 47, [2, prompt_length - 1])], 1)

    def run(options: dict) -> dict[str, np.ndarray]:
        tensors = {"decoder_input_ids": torch.tensor(prompts)}
        output = generate(model, torch.tensor(input_ids), **tensors, **options)
        return results_of(output, tensors["decoder_input_ids"], options)

    # What is generated anyway is worth a ban.
    said = run({"num_beams": 1, "max_new_tokens": 8})["sequences"][:, 0, prompt_length:]

    def ids(length: int) -> list[int]:
        row, start = rng.integers(2), rng.integers(4)
        return said[row, start : start + length].tolist()

    options = {"num_beams": 1, **kinds}
    for name in ("begin_suppress_tokens", "suppress_tokens"):
        if name in options:
            options[name] = ids(options[name])
    if "eos_token_id" in options:
        options["eos_token_id"] = sorted({1, *ids(options["eos_token_id"])})
    if "bad_words_ids" in options:
        options["bad_words_ids"] = [ids(n + 1) for n in range(options["bad_words_ids"])]
    if "sequence_bias" in options:
        biases = [-4.0, -3.0, 5.0]
        found = {tuple(ids(n + 1)): biases[n] for n in range(options["sequence_bias"])}
        options["sequence_bias"] = [[list(sequence), bias] for sequence, bias in found.items()]

    results = run(options)
    always = ("num_beams", "num_return_sequences", "max_new_tokens", "max_length")
    for name in options:
        # The first token is forced only where there is no prompt.
        if name in always or (name == "forced_bos_token_id" and prompt_length > 1):
            continue
        other = run({key: value for key, value in options.items() if key != name})
        if all(np.array_equal(results[key], other[key]) for key in results):
            return None
    return {
        "input_ids": input_ids.astype(np.int32),
        "decoder_input_ids": prompts.astype(np.int32),
        "options": np.array(json.dumps(options)),
        **results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=DATA)
    parser.add_argument("--cases", type=int, default=36)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    searches = []
    for _ in range(arguments.cases):
        table, start_ids, options = random_case(rng)
        results = search(table, start_ids, options)
        options = np.array(json.dumps(options))
        searches.append({**results, "table": table, "start_ids": start_ids, "options": options})
    write(arguments.output / "hf_beam_search.npz", searches)
    write(arguments.output / "hf_generation.npz", option_cases(rng))


def write(path: pathlib.Path, cases: list[dict[str, np.ndarray]]) -> None:
    arrays = {
        f"case{number}/{name}": array
        for number, case in enumerate(cases)
        for name, array in case.items()
    }
    np.savez_compressed(path, transformers=np.array(transformers.__version__), **arrays)
    print(f"{path}: {len(cases)} cases of transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
