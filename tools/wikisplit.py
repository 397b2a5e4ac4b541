"""The real-data checks: sentence splitting on WikiSplit, from a TF Hub BERT module.

    tools/wikisplit.py learn   MODULE DATA OUTPUT   64 pairs by heart
    tools/wikisplit.py train   MODULE DATA OUTPUT   all pairs, then BLEU and exact match
    tools/wikisplit.py compare MODULE DATA OUTPUT   both starts of cross-attention, random weights

MODULE is the folder of a TF Hub BERT module, DATA a folder with tune.tsv and validation.tsv
(sentence, tab, its two sentences joined by " <::::> "), OUTPUT a new folder for curves (JSON lines)
and outputs. BLEU needs `pip install sacrebleu`.
"""

import argparse
import json
import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import tensorflow as tf

import bertgen_tf as bg


def read_pairs(path: pathlib.Path, max_words: int) -> list[tuple[str, str]]:
    """(sentence, its two sentences), for sources of at most `max_words` words."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [line.replace(" <::::> ", " ").split("\t") for line in lines]
    return [(source, target) for source, target in pairs if len(source.split()) <= max_words]


def build(module: str, cross_attention: str, share: bool, pretrained: bool = True):
    """The warm-started model, or one of the same sizes with random weights."""
    model = bg.EncoderDecoderModel.from_hub(
        encoder=module,
        share=share,
        cross_attention=cross_attention,
        max_source_length=96,
        max_target_length=96,
    )
    if pretrained:
        return model
    return bg.EncoderDecoderModel.from_config(model.get_config())


class Curve(keras.callbacks.Callback):
    """Writes training and validation loss to a file of JSON lines every `every` steps."""

    def __init__(self, path: pathlib.Path, validation, every: int):
        super().__init__()
        self.path, self.validation, self.every = path, validation, every
        self.start = time.time()

    def on_train_batch_end(self, batch, logs=None):
        step = int(self.model.optimizer.iterations)
        if step % self.every and step != 1:
            return
        record = {"step": step, "seconds": round(time.time() - self.start, 1), **(logs or {})}
        if step % (5 * self.every) == 0:
            record["validation"] = evaluate_loss(self.model, self.validation)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, default=float) + "\n")


def evaluate_loss(model, dataset) -> float:
    """Cross-entropy per target token, teacher-forced."""
    total, count = 0.0, 0.0
    for x, y, weight in dataset:
        losses = token_losses(model, x, y)
        total += float(tf.reduce_sum(losses * weight))
        count += float(tf.reduce_sum(weight))
    return total / count


def token_losses(model, x, y):
    if not hasattr(model, "compiled_token_losses"):
        object.__setattr__(
            model,
            "compiled_token_losses",
            tf.function(
                lambda x, y: keras.losses.sparse_categorical_crossentropy(
                    y, model(x, training=False), from_logits=True
                ),
                jit_compile=True,
                reduce_retracing=True,
            ),
        )
    return model.compiled_token_losses(x, y)


def train(model, pairs, validation, steps, args, curve) -> None:
    """`steps` steps of AdamW with linear decay on shuffled, bucketed batches."""
    dataset = tf.data.Dataset.from_tensor_slices(tuple(map(list, zip(*pairs, strict=True))))
    dataset = bg.bucketed_dataset(
        dataset.repeat(),
        model.preprocessor,
        args.batch_size,
        shuffle=len(pairs),
        seed=args.seed,
    )
    held_out = tf.data.Dataset.from_tensor_slices(tuple(map(list, zip(*validation, strict=True))))
    held_out = bg.bucketed_dataset(held_out, model.preprocessor, 32)
    optimizer = bg.default_optimizer(
        args.learning_rate, warmup_steps=max(1, steps // 20), total_steps=steps
    )
    model.compile(optimizer=optimizer, jit_compile=args.jit_compile or "auto")
    model.fit(
        dataset,
        steps_per_epoch=steps,
        epochs=1,
        callbacks=[Curve(curve, held_out, args.every)],
        verbose=2 if os.environ.get("NO_PROGRESS") else 1,
    )


def normalise(model, texts: list[str]) -> list[str]:
    """The form that the vocabulary can express: lower case, the spacing of our detokenizer."""
    return [t.decode() for t in model.tokenizer.detokenize(model.tokenizer(texts)).numpy()]


def score(model, outputs: list[str], targets: list[str]) -> dict[str, float]:
    """Corpus BLEU (sacrebleu, lower-cased) and the share of exact matches."""
    import sacrebleu

    outputs, targets = normalise(model, outputs), normalise(model, targets)
    return {
        "bleu": sacrebleu.corpus_bleu(outputs, [targets], lowercase=True).score,
        "exact": sum(a == b for a, b in zip(outputs, targets, strict=True)) / len(targets),
    }


def learn(args) -> None:
    pairs = read_pairs(args.data / "tune.tsv", 36)[:64]
    model = build(args.module, "self_attention", args.share)
    train(model, pairs, pairs, args.steps or 300, args, args.output / "learn.jsonl")
    outputs = model.generate([source for source, _ in pairs], max_new_tokens=95)
    report(args, "learn", model, outputs, pairs)


def run_train(args) -> None:
    pairs = read_pairs(args.data / "tune.tsv", args.max_words)
    validation = read_pairs(args.data / "validation.tsv", args.max_words)
    print(f"{len(pairs)} pairs, {len(validation)} validation pairs")
    model = build(args.module, args.cross_attention, args.share)
    train(model, pairs, validation[500:820], args.steps or 900, args, args.output / "train.jsonl")
    model.save_to_preset(args.output / "preset")
    validation = validation[:500]
    for beams in (1, 4):
        outputs = model.generate(
            [source for source, _ in validation], max_new_tokens=95, num_beams=beams
        )
        report(args, f"train_beams{beams}", model, outputs, validation)


def compare(args) -> None:
    pairs = read_pairs(args.data / "tune.tsv", args.max_words)
    validation = read_pairs(args.data / "validation.tsv", args.max_words)[500:820]
    for name, start, pretrained in (
        ("self_attention", "self_attention", True),
        ("random", "random", True),
        ("random_weights", "random", False),
    ):
        keras.utils.set_random_seed(args.seed)
        model = build(args.module, start, args.share, pretrained)
        train(model, pairs, validation, args.steps or 300, args, args.output / f"{name}.jsonl")
        held_out = tf.data.Dataset.from_tensor_slices(
            tuple(map(list, zip(*validation, strict=True)))
        )
        held_out = bg.bucketed_dataset(held_out, model.preprocessor, 32)
        print(f"{name}: validation loss {evaluate_loss(model, held_out):.3f}", flush=True)


def report(args, name: str, model, outputs: list[str], pairs: list[tuple[str, str]]) -> None:
    """Writes all outputs, prints the figures beside those of copying the source."""
    sources, targets = (list(side) for side in zip(*pairs, strict=True))
    figures = {"model": score(model, outputs, targets), "copy": score(model, sources, targets)}
    print(name, json.dumps(figures), flush=True)
    with open(args.output / f"{name}.outputs.jsonl", "w", encoding="utf-8") as file:
        for source, target, output in zip(sources, targets, outputs, strict=True):
            record = {"source": source, "target": target, "output": output}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["learn", "train", "compare"])
    parser.add_argument("module")
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--max-words", type=int, default=36)
    parser.add_argument("--share", action="store_true")
    parser.add_argument("--cross-attention", default="self_attention")
    parser.add_argument("--every", type=int, default=10, help="steps between points of the curve")
    parser.add_argument("--jit-compile", action="store_true", help="train with XLA, also on a CPU")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(args.seed)
    {"learn": learn, "train": run_train, "compare": compare}[args.what](args)


if __name__ == "__main__":
    main()
