"""The paper's claim at our size: what does warm-starting encoders and decoders gain?

    python tools/study/study.py run MODULE DATA OUTPUT  trains every recipe on every task, and
                                                        resumes where it was stopped
    python tools/study/study.py report OUTPUT           Markdown tables on standard output,
                                                        curves.png

MODULE is the folder of a TF Hub BERT module (English, uncased), DATA a folder with
wikisplit/tune.tsv and validation.tsv (sentence, tab, its two sentences joined by " <::::> ") and
multi30k/train.en, train.de, val.en, val.de (one sentence a line). OUTPUT gets curves, outputs and
results, and may be outside the repository.

All recipes of a task train for the same number of steps with the same optimizer and, for each seed,
on the same batches in the same order. Recipes with the same graph share one compiled training step.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import sentencepiece
import tensorflow as tf

import bertgen_tf as bg
from bertgen_tf import metrics
from bertgen_tf.data import data_presets

SCORED = 500
LENGTHS = {"wikisplit": 80, "fusion": 80, "multi30k": 48}
GERMAN_PIECES = 8000


@dataclasses.dataclass(frozen=True)
class Start:
    """A recipe of the paper and how its cross-attention begins."""

    recipe: str
    cross_attention: str = "random"

    @property
    def name(self) -> str:
        return self.recipe + (" (copied)" if self.cross_attention == "self_attention" else "")

    @property
    def graph(self) -> str:
        """Starts with the same graph differ only in their weights."""
        return "shared" if self.recipe == "BERTSHARE" else "two stacks"


STARTS = (
    Start("RND2RND"),
    Start("BERT2RND"),
    Start("RND2BERT"),
    Start("BERT2BERT"),
    Start("BERT2BERT", "self_attention"),
    Start("BERTSHARE"),
    Start("BERTSHARE", "self_attention"),
)


@dataclasses.dataclass(frozen=True)
class Task:
    """Encoded data, and how its models are made and read.

    Attributes:
        train, validation: (x, y, sample_weight) as `fit` takes them, int32 and float32 arrays
            [pairs, length].
        sources, references: the texts of the scored pairs, which are the validation's.
        starts: what is compared.
        build: makes the model of a start, with random numbers from the global seed.
        decode: generated ids [scored, length] to texts.
    """

    name: str
    train: tuple
    validation: tuple
    sources: list[str]
    references: list[str]
    starts: tuple[Start, ...]
    build: Callable[[Start], bg.EncoderDecoderModel]
    decode: Callable[[Any], list[str]]


def splitting_task(name: str, module: str, data: pathlib.Path) -> Task:
    """WikiSplit, or its reverse: fusion of two sentences into one."""

    def read(split: str) -> list[tuple[str, str]]:
        reverse = name != "wikisplit"
        return list(data_presets.read("wikisplit", split, data / "wikisplit", reverse=reverse))

    length = LENGTHS[name]

    def build(start: Start) -> bg.EncoderDecoderModel:
        side = "decoder" if start.recipe == "RND2BERT" else "encoder"
        return bg.warm_start(
            start.recipe,
            **{side: module},
            cross_attention=start.cross_attention,
            max_source_length=length,
            max_target_length=length,
        )

    preprocessor = build(Start("BERT2BERT")).preprocessor

    def encode(pairs: list[tuple[str, str]]) -> tuple:
        return tf.nest.map_structure(np.asarray, preprocessor(*map(list, zip(*pairs, strict=True))))

    def normalise(texts: tuple[str, ...]) -> list[str]:
        """As the vocabulary, which is lower case, can express it."""
        ids = preprocessor.tokenizer(list(texts))
        return [text.decode() for text in preprocessor.tokenizer.detokenize(ids).numpy()]

    # The file is sorted: every tenth pair samples all of it.
    scored = read("validation")[::10][:SCORED]
    sources, references = map(normalise, zip(*scored, strict=True))
    return Task(
        name,
        encode(read("tune")),
        encode(scored),
        sources,
        references,
        STARTS,
        build,
        lambda ids: [text.decode() for text in preprocessor.generate_postprocess(ids).numpy()],
    )


def translation_task(module: str, data: pathlib.Path, output: pathlib.Path) -> Task:
    """Multi30k, English to German: BERT's pieces in the encoder, new German ones in the decoder.

    The checkpoint knows no German, so the word embeddings of the decoder are random in every
    recipe, and only its layers can be warm-started. With two vocabularies BERTSHARE is impossible.
    """

    def read(split: str, language: str) -> list[str]:
        text = (data / "multi30k" / f"{split}.{language}").read_text(encoding="utf-8")
        return text.split("\n")[:-1]

    spiece = output / f"multi30k_{GERMAN_PIECES}.model"
    if not spiece.exists():
        with open(spiece.with_suffix(".partial"), "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(read("train", "de")),
                model_writer=file,
                vocab_size=GERMAN_PIECES,
                pad_id=0,
                eos_id=1,
                bos_id=2,
                unk_id=3,
                num_threads=1,  # otherwise the pieces depend on their number
                minloglevel=1,
            )
        spiece.with_suffix(".partial").rename(spiece)
    german = bg.BertGenerationTokenizer(str(spiece))
    length = LENGTHS["multi30k"]

    def build(start: Start) -> bg.EncoderDecoderModel:
        side = "decoder" if start.recipe == "RND2BERT" else "encoder"
        whole = bg.warm_start(start.recipe, **{side: module}, cross_attention=start.cross_attention)
        config = whole.decoder.config.replace(
            vocab_size=german.vocab_size,
            pad_token_id=german.pad_token_id,
            bos_token_id=german.bos_token_id,
            eos_token_id=german.eos_token_id,
        )
        decoder = bg.BertGenerationDecoder(config)
        for mine, theirs in zip(decoder.blocks, whole.decoder.blocks, strict=True):
            mine.set_weights(theirs.get_weights())
        for name in ("position_embeddings", "layer_norm"):
            mine, theirs = (getattr(part.embeddings, name) for part in (decoder, whole.decoder))
            mine.set_weights(theirs.get_weights())
        return bg.EncoderDecoderModel(whole.encoder, decoder)

    english = bg.warm_start("BERT2BERT", encoder=module).tokenizer
    sources = bg.Seq2SeqPreprocessor(english, length, length, add_bos=True, add_eos=True)
    targets = bg.Seq2SeqPreprocessor(german, length, length)

    def encode(split: str, count: int | None = None) -> tuple:
        texts = read(split, "en")[:count], read(split, "de")[:count]
        # A preprocessor has one tokenizer: each encodes both sides, and one side is used.
        source, _, _ = sources(*texts)
        target, labels, weights = targets(*texts)
        x = {
            "input_ids": source["input_ids"],
            "attention_mask": source["attention_mask"],
            "decoder_input_ids": target["decoder_input_ids"],
            "decoder_attention_mask": target["decoder_attention_mask"],
        }
        return tf.nest.map_structure(np.asarray, (x, labels, weights))

    return Task(
        "multi30k",
        encode("train"),
        encode("val", SCORED),
        read("val", "en")[:SCORED],
        read("val", "de")[:SCORED],
        tuple(start for start in STARTS if start.graph != "shared"),
        build,
        lambda ids: [text.decode() for text in german.detokenize(ids).numpy()],
    )


class Runner:
    """Trains and scores the starts of a task; one compiled training step for each graph."""

    def __init__(self, task: Task, options: argparse.Namespace):
        self.task = task
        self.options = options
        self.models: dict[str, bg.EncoderDecoderModel] = {}

    def run(self, start: Start, seed: int) -> list[dict[str, Any]]:
        """Records for the points of the curve, and writes the files of outputs."""
        options = self.options
        keras.utils.set_random_seed(seed)
        model = self._start(start)
        records: list[dict[str, Any]] = []
        begun = time.time()
        steps = options.steps // options.points

        def measure(epoch: int, logs: dict[str, float]) -> None:
            step = (epoch + 1) * steps
            record = {
                "task": self.task.name,
                "start": start.name,
                "seed": seed,
                "step": step,
                "seconds": round(time.time() - begun, 1),
                "loss": logs["loss"],
                "validation_loss": self._validation_loss(model),
            }
            if step * 4 % options.steps == 0 and step * 4 // options.steps in (1, 2, 4):
                record["outputs"] = self._generate(model)
            records.append(record)

        model.fit(
            self._batches(seed),
            steps_per_epoch=steps,
            epochs=options.points,
            callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=measure)],
            verbose=0,
        )
        return records

    def _start(self, start: Start) -> bg.EncoderDecoderModel:
        """The compiled model of the start's graph, at the start's weights."""
        fresh = self.task.build(start)
        model = self.models.get(start.graph)
        if model is None:
            options = self.options
            fresh.compile(
                bg.default_optimizer(
                    options.learning_rate,
                    warmup_steps=options.steps // 10,
                    total_steps=options.steps,
                ),
                jit_compile=True,
                steps_per_execution=options.steps_per_execution,
            )
            fresh.optimizer.build(fresh.trainable_variables)
            self.models[start.graph] = fresh
            return fresh
        # The states of random number generators are among the variables.
        for mine, theirs in zip(model.variables, fresh.variables, strict=True):
            mine.assign(theirs)
        for variable in model.optimizer.variables:
            variable.assign(tf.zeros_like(variable))
        return model

    def _batches(self, seed: int) -> tf.data.Dataset:
        data = tf.data.Dataset.from_tensor_slices(self.task.train)
        data = data.shuffle(data.cardinality(), seed=seed).repeat()
        return data.batch(self.options.batch_size, drop_remainder=True).prefetch(16)

    def _validation_loss(self, model: bg.EncoderDecoderModel) -> float:
        """Cross-entropy per target token, without dropout."""
        if not hasattr(model, "study_loss"):

            @tf.function(jit_compile=True)
            def loss(x: Any, y: Any, weights: Any) -> Any:
                logits = model(x, training=False)
                losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
                return tf.reduce_sum(losses * weights), tf.reduce_sum(weights)

            model.study_loss = loss
        data = tf.data.Dataset.from_tensor_slices(self.task.validation).batch(100)
        sums = np.sum([model.study_loss(*batch) for batch in data], axis=0)
        return float(sums[0] / sums[1])

    def _generate(self, model: bg.EncoderDecoderModel) -> list[str]:
        x = self.task.validation[0]
        inputs = {name: x[name] for name in ("input_ids", "attention_mask")}
        length = LENGTHS[self.task.name] - 1
        # One shape to compile, even if the last inputs are short.
        ids = model.generate(inputs, max_new_tokens=length, batch_size=self.options.generate_batch)
        return self.task.decode(ids.sequences[:, 0])


def run(options: argparse.Namespace) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.tasks:
        if name == "multi30k":
            task = translation_task(options.module, options.data, options.output)
        else:
            task = splitting_task(name, options.module, options.data)
        texts = {"sources": task.sources, "references": task.references}
        (options.output / f"{name}.texts.json").write_text(
            json.dumps(texts, ensure_ascii=False), encoding="utf-8"
        )
        path = options.output / f"{name}.jsonl"
        done = {(record["start"], record["seed"]) for record in read_records(path)}
        runner = Runner(task, options)
        # All starts with one seed first: an early stop leaves a whole comparison.
        for seed in options.seeds:
            for start in task.starts:
                if (start.name, seed) in done or start.name not in (options.starts or start.name):
                    continue
                records = runner.run(start, seed)
                # In one write: a run exists as a whole, or not at all.
                with open(path, "a", encoding="utf-8") as file:
                    file.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
                print(
                    f"{name} {start.name} seed {seed}: validation loss "
                    f"{records[-1]['validation_loss']:.3f}, {records[-1]['seconds']} s",
                    flush=True,
                )


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------------------- report

SCORES = {
    "wikisplit": ("exact", "sari", "sari_f1", "bleu"),
    "fusion": ("exact", "sari", "sari_f1", "bleu"),
    "multi30k": ("exact", "bleu", "chrf"),
}
# One hue where the decoder is random, another where it is not.
COLORS = {
    "RND2RND": "#9aa0a6",
    "BERT2RND": "#e07b39",
    "RND2BERT": "#b39ddb",
    "BERT2BERT": "#3b7dd8",
    "BERT2BERT (copied)": "#0b3d91",
    "BERTSHARE": "#35a58a",
    "BERTSHARE (copied)": "#0f5c4a",
}


def report(options: argparse.Namespace) -> None:
    results: dict[str, list[dict[str, Any]]] = {}
    for task, names in SCORES.items():
        records = read_records(options.output / f"{task}.jsonl")
        if not records:
            continue
        texts = json.loads((options.output / f"{task}.texts.json").read_text(encoding="utf-8"))
        for record in records:
            outputs = record.pop("outputs", None)
            if outputs:
                record["scores"] = score(names, texts, outputs)
        copied = score(names, texts, texts["sources"])
        results[task] = records
        print(table(task, names, records, copied))
    path = options.output / "results.json"
    path.write_text(json.dumps(results, indent=0), encoding="utf-8")
    plot(results, options.output / "curves.png")


def score(names: tuple[str, ...], texts: dict[str, list[str]], outputs: list[str]) -> dict:
    results = metrics.compute(names, texts["sources"], outputs, texts["references"])
    return {name: round(result.value, 2) for name, result in results.items()}


def table(task: str, names: tuple[str, ...], records: list[dict], copied: dict) -> str:
    """A row for each start at the last step: the mean over its seeds, and each of them."""
    last = max(record["step"] for record in records)
    columns = ("loss", "validation loss", "lowest", *names)
    lines = [
        f"### {task}, {last:,} steps",
        "",
        "| start | " + " | ".join(columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    order = [start.name for start in STARTS]
    for name in sorted({record["start"] for record in records}, key=order.index):
        runs = [r for r in records if r["start"] == name and r["step"] == last]
        lowest = [
            min(r["validation_loss"] for r in records if (r["start"], r["seed"]) == (name, seed))
            for seed in (run["seed"] for run in runs)
        ]
        cells = [
            cell([run["loss"] for run in runs], 2),
            cell([run["validation_loss"] for run in runs], 2),
            cell(lowest, 2),
            *(cell([run["scores"][n] for run in runs], 1) for n in names),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    cells = ["", "", "", *(f"{copied[n]:.1f}" for n in names)]
    lines.append("| the source itself | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(values: list[float], digits: int) -> str:
    """The mean and, if there are several seeds, the values."""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({', '.join(f'{value:.{digits}f}' for value in values)})"


def plot(results: dict[str, list[dict]], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(5 * len(results), 4.2), squeeze=False)
    for axis, (task, records) in zip(axes[0], results.items(), strict=True):
        for start in STARTS:
            seeds = sorted({r["seed"] for r in records if r["start"] == start.name})
            for seed in seeds:
                points = [r for r in records if (r["start"], r["seed"]) == (start.name, seed)]
                axis.plot(
                    [point["step"] for point in points],
                    [point["validation_loss"] for point in points],
                    color=COLORS[start.name],
                    linestyle="-" if seed == seeds[0] else ":",
                    label=start.name if seed == seeds[0] else None,
                )
        axis.set_title(task)
        axis.set_xlabel("step")
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(matplotlib.ticker.FixedLocator([1, 1.5, 2, 3, 4, 6, 8]))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.grid(alpha=0.3)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0][0].set_ylabel("validation loss a token (dotted: the second seed)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="train and generate")
    runs.add_argument("module")
    runs.add_argument("data", type=pathlib.Path)
    runs.add_argument("output", type=pathlib.Path)
    runs.add_argument("--tasks", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    runs.add_argument("--starts", nargs="+", choices=[start.name for start in STARTS])
    runs.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    runs.add_argument("--steps", type=int, default=2000, help="a multiple of --points")
    runs.add_argument("--points", type=int, default=20, help="of the curve; a multiple of 4")
    runs.add_argument("--batch-size", type=int, default=64)
    runs.add_argument("--learning-rate", type=float, default=5e-4)
    runs.add_argument("--generate-batch", type=int, default=64)
    runs.add_argument("--steps-per-execution", type=int, default=1)
    reports = commands.add_parser("report", help="tables and curves of what was run")
    reports.add_argument("output", type=pathlib.Path)
    options = parser.parse_args()
    if options.command == "report":
        report(options)
        return
    if options.points % 4 or options.steps % options.points:
        parser.error("--steps must be a multiple of --points, and --points of 4")
    run(options)


if __name__ == "__main__":
    main()
