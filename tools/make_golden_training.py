"""Writes tests/data/golden_training.zip: trainings that were saved half-way, and how they go on.

    python tools/make_golden_training.py

Saved models and states of a training depend on registered names, on names and order of attributes,
and on what run.json tells. Tests load these files to notice a change of them. Run this again only
after a change of the format that is meant, and say so where users read of it.

| in the archive | what it is |
| --- | --- |
| linear.keras | compiled, trained for three batches: linear schedule, all options, frozen layers |
| paper.keras | the same of a shared stack with LoRA, the paper's schedule and the default loss |
| encoder.keras, decoder.keras | the stacks of linear.keras, each alone |
| start, train.tsv, validation.tsv | what `COMMAND` starts from |
| model.training | what it left when it was stopped after step 5 |
| golden.npz | outputs, losses, and the weights after the next step and at the end |

The models of `.keras` files have no dropout, whose random state Keras does not save; the training
has. Numbers are the same on every run; dates and speeds, which the files hold as well, are not.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from make_golden_preset import make_model

import bertgen_tf as bg
from bertgen_tf.cli import main as cli
from bertgen_tf.data import text_files
from bertgen_tf.finetuning import data as training_data
from bertgen_tf.network import weights

ARCHIVE = pathlib.Path(__file__).resolve().parent.parent / "tests/data/golden_training.zip"
TRAIN = [("a bird sang", "bird sang a"), ("birds", "a a bird"), ("sang a .", "."), ("a a", "sang")]
VALIDATION = [("bird sang .", "sang bird ."), ("a birds", "bird a")]
INPUTS = {
    "input_ids": [[4, 5, 7, 8], [5, 6, 0, 0]],
    "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
    "decoder_input_ids": [[2, 5, 7], [2, 4, 0]],
    "decoder_attention_mask": [[1, 1, 1], [1, 1, 0]],
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
STOPPED, STEPS = 5, 8
# In the folder of the archive. The state is in the midst of an epoch, of an accumulated update and
# of gradual unfreezing; the last validation is the best, or its weights would not be the last.
COMMAND = (
    "finetune --preset start --train train.tsv --validation validation.tsv --output model "
    f"--batch-size 2 --steps {STEPS} --validate-every 3 --monitor loss --seed 3 --distribute none "
    "--learning-rate 0.03 --new-weights-learning-rate 0.04 --warmup-steps 2 --ema 0.3 "
    "--gradient-accumulation 2 --label-smoothing 0.1 --unfreeze-every 2"
).split()


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    golden = {name: np.array(values, np.int32) for name, values in INPUTS.items()}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_texts()
        write_keras_files(golden)
        write_training(golden)
        np.savez("golden.npz", **golden)
        shutil.make_archive(str(ARCHIVE.with_suffix("")), "zip", folder)
    print(f"wrote {ARCHIVE}, {ARCHIVE.stat().st_size} bytes")


def write_texts() -> None:
    for name, pairs in (("train", TRAIN), ("validation", VALIDATION)):
        text = "".join(f"{source}\t{target}\n" for source, target in pairs)
        pathlib.Path(f"{name}.tsv").write_text(text)


def write_keras_files(golden: dict[str, np.ndarray]) -> None:
    keras.utils.set_random_seed(1)
    linear = make_model("none", **NO_DROPOUT)
    linear.source_checkpoint = {"encoder": "here", "decoder": "here"}
    bg.freeze(linear, embeddings=True)
    linear.compile(
        bg.default_optimizer(
            0.02,
            warmup_steps=1,
            total_steps=4,
            new_weights_learning_rate=0.03,
            gradient_accumulation_steps=2,
            ema_momentum=0.3,
        ),
        bg.default_loss(label_smoothing=0.1),
        jit_compile=False,
    )
    paper = make_model("all", **NO_DROPOUT)
    paper.source_checkpoint = {"encoder": "here", "decoder": "here"}
    paper.enable_lora(2, targets=("query", "value"))
    paper.compile(bg.paper_optimizer(4, warmup_steps=2), jit_compile=False)
    for name, model in (("linear", linear), ("paper", paper)):
        for _ in range(3):
            train_step(model)
        model.save(f"{name}.keras")
        golden.update({f"{name}/{key}": value for key, value in outputs(model).items()})
        train_step(model)
        golden.update({f"{name}/next/{key}": value for key, value in trained(model).items()})
        if name == "linear":
            with bg.averaged_weights(model):
                averages = trained(model)
            golden.update({f"{name}/average/{key}": value for key, value in averages.items()})
    loaded = keras.saving.load_model("linear.keras")
    for stack in ("encoder", "decoder"):
        getattr(loaded, stack).save(f"{stack}.keras")
    golden["encoder/states"] = encode(loaded.encoder).numpy()


def encode(encoder: bg.BertGenerationEncoder) -> Any:
    """Hidden states [B, S, H] of `INPUTS`."""
    return encoder(*(np.array(INPUTS[name]) for name in ("input_ids", "attention_mask")))


def batch() -> tuple[list[str], list[str]]:
    """All pairs of train.tsv as sources and targets."""
    sources, targets = zip(*text_files.read_pairs("train.tsv"), strict=True)
    return list(sources), list(targets)


def train_step(model: bg.EncoderDecoderModel) -> None:
    """One step on all pairs."""
    x, y, weight = model.preprocessor(*batch())
    model.train_on_batch(x, y, sample_weight=weight)


def outputs(model: bg.EncoderDecoderModel) -> dict[str, np.ndarray]:
    """Logits of `INPUTS`, loss and accuracy of all pairs."""
    results = model.evaluate(*batch(), batch_size=4, verbose=0, return_dict=True)
    logits = model({name: np.array(ids) for name, ids in INPUTS.items()}).numpy()
    return {"logits": logits, **{name: np.array(value) for name, value in results.items()}}


def trained(model: bg.EncoderDecoderModel) -> dict[str, np.ndarray]:
    """All weights by name, but the biases of keys: softmax does not depend on them.

    Their gradients are nothing but rounding, of which Adam makes whole steps.
    """
    named = weights.named_variables(model)
    return {n: np.array(v.numpy()) for n, v in named.items() if not n.endswith("key/bias")}


def write_training(golden: dict[str, np.ndarray]) -> None:
    model = make_model("none")
    model.source_checkpoint = {"encoder": "here", "decoder": "here"}  # cross-attention is new
    model.save_to_preset("start")
    with stopped():
        if cli.main(COMMAND) != cli.INTERRUPTED:
            raise SystemExit("the training did not stop")
    shutil.copytree("model.training", "kept")
    if cli.main([*COMMAND, "--resume"]):
        raise SystemExit("the training did not go on")
    losses = [json.loads(line)["val_loss"] for line in open("model.training/log.jsonl")]
    if min(losses) != losses[-1]:
        raise SystemExit(f"the last validation is not the best: {losses}")
    final = bg.EncoderDecoderModel.from_preset("model")
    golden.update({f"finetune/{name}": value for name, value in trained(final).items()})
    shutil.copy("model.training/log.jsonl", "log.jsonl")
    for name in ("model", "model.training"):
        shutil.rmtree(name)
    os.rename("kept", "model.training")


@contextlib.contextmanager
def stopped() -> Iterator[None]:
    """As by SIGTERM in the last step before `STOPPED`."""
    tokens = training_data.TrainingData.tokens

    def stop(self: training_data.TrainingData, step: int) -> int:
        if step == STOPPED - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return tokens(self, step)

    training_data.TrainingData.tokens = stop
    try:
        yield
    finally:
        training_data.TrainingData.tokens = tokens


if __name__ == "__main__":
    main()
