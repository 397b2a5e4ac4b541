"""Compares a training step here and in transformers on PyTorch, from the same weights.

    ./tools/benchmark --training
    ./tools/benchmark --training --batch 16 --engines ours,pytorch --dropout 0

Engines: `ours` (`compile()`), `steps` (`steps_per_execution=4`), `xla` (`jit_compile=True`),
`bfloat16` (`mixed_bfloat16`) and `pytorch` (transformers' EncoderDecoderModel). All have two stacks
of MiniLM's size, read 48 + 48 tokens without padding, and update by AdamW with gradients clipped to
norm 1. Everything runs on the CPU, in one process; engines take turns, and medians are printed.

Without dropout, all float32 engines must have the same losses. Exit status: 0, 1 if losses differ.
PyTorch's step needs torch and transformers: pip install -e '.[benchmark]'
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

LENGTH, VOCABULARY, FIRST_TOKEN = 48, 30522, 3
LEARNING_RATE, WEIGHT_DECAY, EPSILON, CLIP_NORM = 1e-4, 0.01, 1e-7, 1.0
ENGINES = ("ours", "steps", "xla", "bfloat16", "pytorch")
STEPS_PER_EXECUTION = 4
# PyTorch's threads spin for a while after their work.
PAUSE = 0.3
TOLERANCE = 2e-3  # of losses; that of the first step is about 10.3

# Trains on ids [3, B, T] (sources, targets' inputs, labels), and returns the loss.
Run = Callable[[np.ndarray], float]


def write_weights(folder: str, dropout: float) -> None:
    """Writes a model of new weights for transformers."""
    import bertgen_tf as bg

    config = bg.BertGenerationConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    encoder = bg.BertGenerationEncoder(config)
    decoder = bg.BertGenerationDecoder(config.replace(add_cross_attention=True))
    bg.EncoderDecoderModel(encoder, decoder).save_to_huggingface(folder)


def load_ours(folder: str, engine: str) -> tuple[Run, int]:
    """One of our engines, and how many steps it does at once."""
    import keras
    import tensorflow as tf

    import bertgen_tf as bg

    steps = STEPS_PER_EXECUTION if engine == "steps" else 1
    keras.config.set_dtype_policy("mixed_bfloat16" if engine == "bfloat16" else "float32")
    model = bg.EncoderDecoderModel.from_huggingface(folder)
    keras.config.set_dtype_policy("float32")
    optimizer = bg.default_optimizer(
        LEARNING_RATE, weight_decay=WEIGHT_DECAY, global_clipnorm=CLIP_NORM
    )
    model.compile(optimizer, steps_per_execution=steps, jit_compile=engine == "xla")
    model.make_train_function()

    def run(ids: np.ndarray) -> float:
        weight = np.ones(ids.shape[1:], np.float32)
        mask = weight.astype(np.int32)
        x = {
            "input_ids": ids[0],
            "attention_mask": mask,
            "decoder_input_ids": ids[1],
            "decoder_attention_mask": mask,
        }
        batches = tf.data.Dataset.from_tensors((x, ids[2], weight)).repeat(steps)
        model.reset_metrics()
        return float(model.train_function(iter(batches))["loss"])

    return run, steps


def load_pytorch(folder: str, threads: int) -> Run:
    """PyTorch's step."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.EncoderDecoderModel.from_pretrained(folder, dtype="float32")
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, eps=EPSILON, weight_decay=WEIGHT_DECAY
    )

    def run(ids: np.ndarray) -> float:
        source, target, labels = (torch.tensor(part, dtype=torch.long) for part in ids)
        mask = torch.ones_like(source)
        optimizer.zero_grad()
        logits = model(
            input_ids=source,
            attention_mask=mask,
            decoder_input_ids=target,
            decoder_attention_mask=mask,
        ).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        return float(loss)

    return run


def measure(
    folder: str, engines: list[str], batch: int, repeat: int, threads: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of steps, without each engine's first, and the losses of all."""
    runs: dict[str, tuple[Run, int]] = {}
    for engine in engines:
        if engine == "pytorch":
            runs[engine] = load_pytorch(folder, threads), 1
        else:
            runs[engine] = load_ours(folder, engine)
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {engine: [] for engine in engines}
    losses: dict[str, list[float]] = {engine: [] for engine in engines}
    for turn in range(repeat + 1):
        ids = rng.integers(FIRST_TOKEN, VOCABULARY, (3, batch, LENGTH), np.int32)
        first = turn % len(engines)  # each time another engine
        for engine in [*engines[first:], *engines[:first]]:
            run, steps = runs[engine]
            time.sleep(PAUSE)
            began = time.perf_counter()
            losses[engine].append(run(ids))
            took = (time.perf_counter() - began) / steps
            if turn:  # the first compiles
                seconds[engine].append(took)
        print(f"batch {batch}, step {turn} of {repeat}", file=sys.stderr, flush=True)
    return seconds, losses


def differing(losses: dict[str, list[float]]) -> list[str]:
    """The float32 engines whose losses are not those of the first."""
    exact = [engine for engine in losses if engine not in ("steps", "bfloat16")]
    return [
        f"{engine} and {exact[0]}"
        for engine in exact[1:]
        if not np.allclose(losses[engine], losses[exact[0]], rtol=0, atol=TOLERANCE)
    ]


def row(batch: int, seconds: dict[str, list[float]], losses: dict[str, list[float]]) -> str:
    """A line of the table: medians, in brackets divided by that of the first engine."""
    medians = {engine: statistics.median(times) for engine, times in seconds.items()}
    base = next(iter(medians.values()))
    cells = [
        f"{median:.2f} ({median / base:.2f}), {losses[engine][-1]:.3f}"
        for engine, median in medians.items()
    ]
    return f"| {batch} | {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(
        prog="benchmark --training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", default="16,64", help="batch sizes (default: 16,64)")
    parser.add_argument("--engines", default=",".join(ENGINES), help="default: all")
    parser.add_argument("--repeat", type=int, default=5, help="timed steps of each (default: 5)")
    parser.add_argument("--dropout", type=float, default=0.1, help="default: 0.1")
    parser.add_argument("--threads", type=int, default=cores, help=f"default: {cores}, the cores")
    options = parser.parse_args(argv)
    engines = list(dict.fromkeys(options.engines.split(",")))
    if unknown := [engine for engine in engines if engine not in ENGINES]:
        parser.error(f"--engines must be of {', '.join(ENGINES)}, received {unknown[0]}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(options.threads)
    rows, problems = [], []
    with tempfile.TemporaryDirectory(prefix="bertgen_benchmark_") as folder:
        write_weights(folder, options.dropout)
        for batch in map(int, options.batch.split(",")):
            seconds, losses = measure(folder, engines, batch, options.repeat, options.threads)
            rows.append(row(batch, seconds, losses))
            if not options.dropout:
                problems += [f"batch {batch}: {names}" for names in differing(losses)]
    print(f"seconds a step (divided by {engines[0]}'s), last loss; {options.threads} threads\n")
    print(f"| batch | {' | '.join(engines)} |\n|{' --- |' * (len(engines) + 1)}")
    print("\n".join(rows))
    for problem in problems:
        print(f"different losses: {problem}", file=sys.stderr)
    return 1 if problems else 0
