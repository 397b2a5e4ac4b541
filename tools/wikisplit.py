"""The real-data checks: sentence splitting on WikiSplit, from a TF Hub BERT module.

    tools/wikisplit.py learn   MODULE DATA OUTPUT   64 pairs by heart
    tools/wikisplit.py train   MODULE DATA OUTPUT   all pairs, then BLEU and exact match
    tools/wikisplit.py evaluate PRESET DATA OUTPUT  a model of before: BLEU and exact match
    tools/wikisplit.py quantize PRESET DATA OUTPUT the same in float32 and in int8, and how much the
                                                   outputs of int8 are those of float32
    tools/wikisplit.py compare MODULE DATA OUTPUT   both starts of cross-attention, random weights

MODULE is the folder of a TF Hub BERT module, DATA a folder with tune.tsv and validation.tsv
(sentence, tab, its two sentences joined by " <::::> "), OUTPUT a new folder for curves (JSON lines)
and outputs. BLEU needs `pip install -e '.[metrics]'`.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import tensorflow as tf

import bertgen_tf as bg

try:
    import sacrebleu
except ImportError:  # known before training, not after
    sys.exit("error: tools/wikisplit.py needs sacrebleu: pip install -e '.[metrics]'")


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
    """Writes the training loss to a file of JSON lines every `every` steps, with validation."""

    def __init__(self, path: pathlib.Path, validation_loss: Callable[[], float], every: int):
        super().__init__()
        self.path, self.validation_loss, self.every = path, validation_loss, every
        self.start = time.time()

    def on_train_batch_end(self, batch, logs=None):
        step = batch + 1
        if step % self.every and step != 1:
            return
        record = {"step": step, "seconds": round(time.time() - self.start, 1), **(logs or {})}
        if step % (5 * self.every) == 0:
            record["validation"] = self.validation_loss()
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, default=float) + "\n")


def validation_loss_function(model, pairs: list[tuple[str, str]]) -> Callable[[], float]:
    """A function that gives the cross-entropy per target token of some pairs, teacher-forced."""
    batches = bg.bucketed_dataset(as_dataset(pairs), model.preprocessor, 32)

    @tf.function(jit_compile=True, reduce_retracing=True)
    def losses(x, y):
        logits = model(x, training=False)
        return keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)

    def validation_loss() -> float:
        total, count = 0.0, 0.0
        for x, y, weight in batches:
            total += float(tf.reduce_sum(losses(x, y) * weight))
            count += float(tf.reduce_sum(weight))
        return total / count

    return validation_loss


def as_dataset(pairs: list[tuple[str, str]]) -> tf.data.Dataset:
    """An unbatched dataset of (source, target) strings."""
    return tf.data.Dataset.from_tensor_slices(tuple(map(list, zip(*pairs, strict=True))))


def train(model, pairs, validation, steps, args, curve) -> float:
    """`steps` steps of AdamW with linear decay on shuffled, bucketed batches; validation loss."""
    batches = bg.bucketed_dataset(
        as_dataset(pairs).repeat(),
        model.preprocessor,
        args.batch_size,
        shuffle=len(pairs),
        seed=args.seed,
    )
    optimizer = bg.default_optimizer(
        args.learning_rate, warmup_steps=max(1, steps // 20), total_steps=steps
    )
    validation_loss = validation_loss_function(model, validation)
    model.compile(optimizer=optimizer, jit_compile=args.jit_compile or "auto")
    model.fit(
        batches,
        steps_per_epoch=steps,
        callbacks=[Curve(curve, validation_loss, args.every)],
        verbose=1 if sys.stdout.isatty() else 2,
    )
    return validation_loss()


def normalise(model, texts: list[str]) -> list[str]:
    """The form that the vocabulary can express: lower case, the spacing of our detokenizer."""
    return [t.decode() for t in model.tokenizer.detokenize(model.tokenizer(texts)).numpy()]


def score(model, outputs: list[str], targets: list[str]) -> dict[str, float]:
    """Corpus BLEU (sacrebleu, lower-cased) and the share of exact matches."""
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
    scored, held_out = read_validation(args)
    print(f"{len(pairs)} pairs to train on, {len(held_out)} for the loss, {len(scored)} to score")
    model = build(args.module, args.cross_attention, args.share)
    train(model, pairs, held_out, args.steps or 900, args, args.output / "train.jsonl")
    model.save_to_preset(args.output / "preset")
    evaluate(args, model, scored)


def run_evaluate(args) -> None:
    evaluate(args, bg.EncoderDecoderModel.from_preset(args.module), read_validation(args)[0])


def evaluate(args, model, pairs: list[tuple[str, str]]) -> None:
    for beams in (1, 4):
        outputs = model.generate(
            [source for source, _ in pairs], max_new_tokens=95, num_beams=beams
        )
        report(args, f"beams{beams}", model, outputs, pairs)


def run_quantize(args) -> None:
    pairs = read_validation(args)[0]
    model = bg.EncoderDecoderModel.from_preset(args.module)
    if model.is_quantized:
        sys.exit(f"error: {args.module} is int8: name the float32 preset")
    sources = [source for source, _ in pairs]
    exact = {}
    for kind in ("float32", "int8"):
        if kind == "int8":
            model.quantize(kind)
        for beams in (1, 4):
            outputs = model.generate(sources, max_new_tokens=95, num_beams=beams)
            report(args, f"{kind} beams{beams}", model, outputs, pairs)
            if kind == "float32":
                exact[beams] = outputs
            else:
                figures = json.dumps(score(model, outputs, exact[beams]))
                print(f"int8 against float32, beams{beams}", figures, flush=True)


def read_validation(args) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """500 pairs to score and 320 others for the loss, from all over the (sorted) file."""
    pairs = read_pairs(args.data / "validation.tsv", args.max_words)
    return pairs[::6][:500], pairs[3::6][:320]


def compare(args) -> None:
    pairs = read_pairs(args.data / "tune.tsv", args.max_words)
    _, validation = read_validation(args)
    for name, start, pretrained in (
        ("self_attention", "self_attention", True),
        ("random", "random", True),
        ("random_weights", "random", False),
    ):
        keras.utils.set_random_seed(args.seed)
        model = build(args.module, start, args.share, pretrained)
        loss = train(
            model, pairs, validation, args.steps or 300, args, args.output / f"{name}.jsonl"
        )
        print(f"{name}: validation loss {loss:.3f}", flush=True)


def report(args, name: str, model, outputs: list[str], pairs: list[tuple[str, str]]) -> None:
    """Writes all outputs, prints the figures beside those of copying the source."""
    sources, targets = (list(side) for side in zip(*pairs, strict=True))
    figures = {"model": score(model, outputs, targets), "copy": score(model, sources, targets)}
    print(name, json.dumps(figures), flush=True)
    with open(
        args.output / f"{name.replace(' ', '_')}.outputs.jsonl", "w", encoding="utf-8"
    ) as file:
        for source, target, output in zip(sources, targets, outputs, strict=True):
            record = {"source": source, "target": target, "output": output}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["learn", "train", "evaluate", "quantize", "compare"])
    parser.add_argument("module", help="TF Hub module; for evaluate and quantize, a preset")
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
    commands = {
        "learn": learn,
        "train": run_train,
        "evaluate": run_evaluate,
        "quantize": run_quantize,
        "compare": compare,
    }
    commands[args.what](args)


if __name__ == "__main__":
    main()
