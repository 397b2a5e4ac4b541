"""Trains the sentence splitter of saved_models/: small enough for a repository.

    python tools/study/splitter.py MODULE DATA OUTPUT
    bertgen-tf export --preset OUTPUT/small --output saved_models/sentence_splitting/1

MODULE and DATA are as for study.py. OUTPUT gets two presets, the model as trained and a small
one of int8 with fewer pieces, and the outputs of both for the 500 pairs that the study scores.
These pairs are never trained on; everything else is: tune.tsv and the rest of validation.tsv
(where 3 of the 500 targets occur with other sources).
"""

import argparse
import collections
import json
import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import bertgen_tf as bg
from bertgen_tf.data import data_presets

LENGTH = 80


def frequent_pieces(tokenizer: bg.BertTokenizer, texts: list[str], count: int) -> list[int]:
    """The `count` most frequent pieces of texts, and all single characters.

    Words whose piece is not kept fall into shorter ones, so nothing becomes unknown.
    """
    seen = collections.Counter(tokenizer(texts).flat_values.numpy().tolist())
    pieces = [piece.decode() for piece in tokenizer.pieces.numpy()]
    letters = {i for i, p in enumerate(pieces) if len(p.removeprefix("##")) == 1 and p.isascii()}
    letters |= {i for i in seen if len(pieces[i].removeprefix("##")) == 1}
    frequent = [i for i, _ in seen.most_common() if i not in letters]
    return sorted(letters | set(frequent[: count - len(letters)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module")
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--pieces", type=int, default=8000, help="those trained")
    parser.add_argument("--small-pieces", type=int, default=4000, help="those of the small one")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--generate-batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(options.seed)
    folder = options.data / "wikisplit"
    validation = list(data_presets.read("wikisplit", "validation", folder))
    scored = validation[::10][:500]
    kept = set(scored)
    train = list(data_presets.read("wikisplit", "tune", folder))
    train += [pair for pair in validation if pair not in kept]
    model = bg.warm_start(
        "BERTSHARE",
        encoder=options.module,
        cross_attention="self_attention",
        max_source_length=LENGTH,
        max_target_length=LENGTH,
    )
    texts = [text for pair in train for text in pair]
    model = bg.trim_vocabulary(model, frequent_pieces(model.tokenizer, texts, options.pieces))
    model.generation_config = model.generation_config.replace(max_new_tokens=LENGTH - 1)

    def encode(pairs: list[tuple[str, str]]) -> tuple:
        columns = map(list, zip(*pairs, strict=True))
        return tf.nest.map_structure(np.asarray, model.preprocessor(*columns))

    data = tf.data.Dataset.from_tensor_slices(encode(train))
    data = data.shuffle(len(train), seed=options.seed).repeat()
    data = data.batch(options.batch_size, drop_remainder=True).prefetch(16)
    model.compile(
        bg.default_optimizer(
            options.learning_rate, warmup_steps=options.steps // 10, total_steps=options.steps
        ),
        jit_compile=True,
    )
    begun = time.time()
    model.fit(
        data,
        steps_per_epoch=options.steps // 10,
        epochs=10,
        validation_data=tf.data.Dataset.from_tensor_slices(encode(scored)).batch(100),
        verbose=2,
    )
    print(f"{model.count_params():,} weights, {time.time() - begun:.0f} s", flush=True)
    model.save_to_preset(options.output / "preset")
    small = frequent_pieces(model.tokenizer, texts, options.small_pieces)
    small = bg.trim_vocabulary(model, small)
    small.quantize("int8")
    # Saved with the settings that it will be served with.
    small.generation_config = small.generation_config.replace(num_beams=4)
    small.save_to_preset(options.output / "small")
    for name, which, beams in (("greedy", model, 1), ("beams", model, 4), ("small", small, 4)):
        outputs = which.generate(
            [source for source, _ in scored], num_beams=beams, batch_size=options.generate_batch
        )
        path = options.output / f"{name}.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            for (source, target), output in zip(scored, outputs, strict=True):
                record = {"source": source, "target": target, "output": output}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
