"""Writes tests/data/hf_beam_search.npz: searches run by HuggingFace's own `generate()`.

For maintainers, to be run again only if the rules of transformers change. It needs packages that
the project does not depend on, so use an environment of its own:

    pip install transformers==5.23.0 torch==2.13.0 numpy
    python tools/make_beam_golden.py

The model is a random table: the logits of the next token are `table[token before the last % 3,
last]`, with 0 for the token before the first. Examples of a batch differ in their start token. Each
case holds `table`, `start_ids`, `options` (JSON, in the names of `generate()`), and the results
`sequences` [batch, num_return_sequences, 1 + max_new_tokens], 0 after the end, and, for beams,
`scores` [batch, num_return_sequences].
"""

import argparse
import json
import pathlib

import numpy as np
import torch
import transformers
from transformers.modeling_outputs import CausalLMOutput

PAD = 0


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
    output = TableModel(table).generate(
        torch.tensor(start_ids, dtype=torch.int64)[:, None],
        do_sample=False,
        use_cache=False,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    sequences = np.full([len(output.sequences), 1 + options["max_new_tokens"]], PAD, np.int32)
    for row, found in zip(sequences, output.sequences.numpy(), strict=True):
        ends = np.flatnonzero(np.isin(found[1:], options["eos_token_id"]))
        # generate() fills with EOS after the end where the padding id is 0.
        length = 2 + ends[0] if len(ends) else len(found)
        row[:length] = found[:length]
    results = {"sequences": sequences.reshape(len(start_ids), -1, sequences.shape[-1])}
    if options["num_beams"] > 1:
        results["scores"] = output.sequences_scores.numpy().reshape(len(start_ids), -1)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = pathlib.Path(__file__).parent.parent / "tests/data/hf_beam_search.npz"
    parser.add_argument("--output", type=pathlib.Path, default=default)
    parser.add_argument("--cases", type=int, default=36)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    arrays = {"transformers": np.array(transformers.__version__)}
    for case in range(arguments.cases):
        table, start_ids, options = random_case(rng)
        results = search(table, start_ids, options)
        results |= {
            "table": table,
            "start_ids": start_ids,
            "options": np.array(json.dumps(options)),
        }
        arrays |= {f"case{case}/{name}": array for name, array in results.items()}
    np.savez_compressed(arguments.output, **arrays)
    print(f"{arguments.output}: {arguments.cases} cases of transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
