"""The engines that `benchmark.py` compares, each in a process of its own.

    python benchmark_engines.py SETTINGS

SETTINGS is JSON: `{"engine": name, "folder": ..., "threads": n}` serves one engine, and
`{"build": size, "folder": ..., "seed": n, "int8": bool, "ctranslate2": bool}` writes the weights.
Requests come as lines of JSON on standard input, answers go to standard output.
"""

import ctypes
import gc
import json
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# A call `(input_ids [B, S], num_beams, max_new_tokens)` gives ids int [B, max_new_tokens].
Generate = Callable[[np.ndarray, int, int], np.ndarray]

OURS = ("xla", "plain", "int8")
ENGINES = (*OURS, "huggingface", "ctranslate2", "ctranslate2-int8")
PAD, EOS, BOS = 0, 1, 2
# For random matrices, by a part of the name; the others keep the variance.
GAINS = {
    "attention.output.dense": 0.3,
    "output.dense": 0.5,
}


def build(
    folder: str, size: dict[str, Any], seed: int, for_int8: bool, for_ctranslate2: bool
) -> dict[str, Any]:
    """Writes a model with random weights; returns their bytes, shared ones counted once."""
    import bertgen_tf as bg
    from bertgen_tf.checkpoints.huggingface import files as huggingface_files

    config = bg.BertGenerationConfig(
        vocab_size=size["vocab_size"],
        hidden_size=size["hidden_size"],
        num_hidden_layers=size["num_hidden_layers"],
        num_attention_heads=size["num_attention_heads"],
        intermediate_size=size["intermediate_size"],
        max_position_embeddings=size["max_position_embeddings"],
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
    )
    encoder = bg.BertGenerationEncoder(config)
    sharing = size["sharing"]
    decoder = bg.BertGenerationDecoder(
        config.replace(add_cross_attention=True), encoder if sharing != "none" else None, sharing
    )
    model = bg.EncoderDecoderModel(encoder, decoder)
    weight_bytes = sum(4 * int(np.prod(variable.shape)) for variable in model.weights)
    checkpoint = Path(folder) / "huggingface"
    model.save_to_huggingface(str(checkpoint))
    for file in checkpoint.glob("*.safetensors"):
        write_random_weights(file, seed, sharing)
    if for_int8:
        model = bg.EncoderDecoderModel.from_huggingface(str(checkpoint))
        model.quantize("int8")
        model.save_to_preset(os.path.join(folder, "int8"))
    if for_ctranslate2:
        tensors = huggingface_files.read_tensors(checkpoint)
        write_ctranslate2(os.path.join(folder, "ctranslate2"), tensors, config)
    return {"weight_bytes": weight_bytes}


def write_random_weights(file: Path, seed: int, sharing: str) -> None:
    """Replaces the tensors in a file; those that the stacks share stay equal."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(file)
    for name, tensor in tensors.items():
        shared = sharing == "all" or sharing in name  # of these, "word_embeddings"
        stacks = r"(encoder|decoder\.bert)\."
        seed_name = re.sub(f"^{stacks}", "", name) if shared else name
        tensors[name] = random_weights(seed_name, tensor.shape, seed)
    save_file(tensors, file, metadata={"format": "pt"})


def random_weights(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Weights that make a model generate something else at every step, with clear choices.

    Logits have a standard deviation of 3, so that the best tokens are far apart. What would make a
    model repeat one token is kept down: tied embeddings, by layer norms that flip the sign of half
    of the units; the mean of gelu, which the matrices after it cancel; uniform attention, and
    biases, by their size. EOS has practically no probability, as engines differ in whether a
    suppressed token counts in the softmax.

    Args:
        name: Hugging Face's.
        shape: for matrices [outputs, inputs].
        seed: for all of them.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith("LayerNorm.weight"):
        return rng.choice(np.array([-1, 1], np.float32), shape)
    values = rng.standard_normal(shape, np.float32)
    if name.endswith("embeddings.weight"):
        return values * np.float32(3 / shape[1] ** 0.5)
    if name.endswith("weight"):
        if name.endswith("output.dense.weight"):
            values -= values.mean(axis=1, keepdims=True)
        gain = next((gain for part, gain in GAINS.items() if part in name), 1)
        return values * np.float32(gain / shape[1] ** 0.5)
    values *= np.float32(0.01)
    if name.endswith("lm_head.bias"):
        values[EOS] = -100
    return values


def write_ctranslate2(folder: str, tensors: dict[str, np.ndarray], config: Any) -> None:
    """Writes a checkpoint, by Hugging Face's names, as CTranslate2's transformer."""
    from ctranslate2.specs import TransformerSpec, common_spec

    def norm(spec: Any, name: str) -> None:
        spec.gamma, spec.beta = tensors[f"{name}.weight"], tensors[f"{name}.bias"]

    def linear(spec: Any, *names: str) -> None:
        # Several layers, one below the other.
        spec.weight = np.concatenate([tensors[f"{name}.weight"] for name in names])
        spec.bias = np.concatenate([tensors[f"{name}.bias"] for name in names])

    def attention(spec: Any, name: str, *, cross: bool) -> None:
        parts = [f"{name}.self.{part}" for part in ("query", "key", "value")]
        groups = [parts[:1], parts[1:]] if cross else [parts]
        for target, group in zip(spec.linear[:-1], groups, strict=True):
            linear(target, *group)
        linear(spec.linear[-1], f"{name}.output.dense")
        norm(spec.layer_norm, f"{name}.output.LayerNorm")

    spec = TransformerSpec.from_config(
        config.num_hidden_layers,
        config.num_attention_heads,
        pre_norm=False,
        activation=common_spec.Activation.GELU,
        layernorm_embedding=True,
    )
    for side, stack in (("encoder", spec.encoder), ("decoder.bert", spec.decoder)):
        words = stack.embeddings[0] if side == "encoder" else stack.embeddings
        words.weight = tensors[f"{side}.embeddings.word_embeddings.weight"]
        positions = tensors[f"{side}.embeddings.position_embeddings.weight"]
        stack.position_encodings.encodings = positions
        stack.scale_embeddings = 1.0
        norm(stack.layernorm_embedding, f"{side}.embeddings.LayerNorm")
        for i, layer in enumerate(stack.layer):
            name = f"{side}.encoder.layer.{i}"
            attention(layer.self_attention, f"{name}.attention", cross=False)
            if side != "encoder":
                attention(layer.attention, f"{name}.crossattention", cross=True)
            linear(layer.ffn.linear_0, f"{name}.intermediate.dense")
            linear(layer.ffn.linear_1, f"{name}.output.dense")
            norm(layer.ffn.layer_norm, f"{name}.output.LayerNorm")
    spec.decoder.projection.weight = spec.decoder.embeddings.weight
    spec.decoder.projection.bias = tensors["decoder.lm_head.bias"]
    tokens = [str(token) for token in range(config.vocab_size)]
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    spec.config.bos_token = spec.config.decoder_start_token = str(BOS)
    spec.config.eos_token = str(EOS)
    spec.config.unk_token = str(PAD)
    spec.config.layer_norm_epsilon = config.layer_norm_eps
    spec.validate()
    spec.optimize()
    os.makedirs(folder, exist_ok=True)
    spec.save(folder)


def load_ours(folder: str, engine: str) -> Generate:
    import bertgen_tf as bg

    if engine == "int8":
        model = bg.EncoderDecoderModel.from_preset(os.path.join(folder, "int8"))
    else:
        model = bg.EncoderDecoderModel.from_huggingface(os.path.join(folder, "huggingface"))

    def generate(ids: np.ndarray, num_beams: int, max_new_tokens: int) -> np.ndarray:
        output = model.generate(
            {"input_ids": ids, "attention_mask": np.ones_like(ids)},
            jit_compile=engine != "plain",
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            suppress_tokens=(EOS,),
        )
        return output.sequences[:, 0, 1:]

    return generate


def load_huggingface(folder: str) -> Generate:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.EncoderDecoderModel.from_pretrained(
        os.path.join(folder, "huggingface"), dtype="float32"
    ).eval()

    def generate(ids: np.ndarray, num_beams: int, max_new_tokens: int) -> np.ndarray:
        tensor = torch.from_numpy(ids.astype(np.int64))
        with torch.inference_mode():
            output = model.generate(
                input_ids=tensor,
                attention_mask=torch.ones_like(tensor),
                num_beams=num_beams,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                suppress_tokens=[EOS],
            )
        return output[:, 1:].numpy()

    return generate


def load_ctranslate2(folder: str, compute_type: str, threads: int) -> Generate:
    import ctranslate2

    translator = ctranslate2.Translator(
        os.path.join(folder, "ctranslate2"),
        compute_type=compute_type,
        inter_threads=1,
        intra_threads=threads,
    )

    def generate(ids: np.ndarray, num_beams: int, max_new_tokens: int) -> np.ndarray:
        results = translator.translate_batch(
            [[str(token) for token in row] for row in ids],
            beam_size=num_beams,
            max_decoding_length=max_new_tokens,
            suppress_sequences=[[str(EOS)]],
        )
        return np.array([[int(token) for token in result.hypotheses[0]] for result in results])

    return generate


def import_engine(engine: str, threads: int) -> None:
    """Imports what an engine needs, separately so that its memory is known; sets its threads."""
    if engine in OURS:
        import bertgen_tf  # noqa: F401  # first, as it may set flags for TensorFlow

        # isort: split
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
        # Starts TensorFlow and its compiler, which belong to the libraries' memory.
        square = tf.ones([64, 64])
        tf.function(tf.matmul, jit_compile=True)(square, square)
    elif engine == "huggingface":
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.EncoderDecoderModel  # noqa: B018, it is imported when it is named
    else:
        import ctranslate2  # noqa: F401


def load_engine(engine: str, folder: str, threads: int) -> Generate:
    if engine == "huggingface":
        return load_huggingface(folder)
    if engine.startswith("ctranslate2"):
        kind = "int8" if engine.endswith("int8") else "float32"
        return load_ctranslate2(folder, kind, threads)
    return load_ours(folder, engine)


def memory(field: str) -> int | None:
    """Bytes that Linux reports for this process: "VmRSS", or its peak, "VmHWM"."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    match = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def settle_memory() -> None:
    """Returns freed memory to the system, and resets the peak to what is left."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        pass


def serve(settings: dict[str, Any], requests: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The answers of one engine: first that it is loaded, then one for each request.

    A request is `dict(input_ids, num_beams, max_new_tokens)`, its answer
    `dict(ids, seconds, before, peak)`, with the memory before the run and its peak during it, in
    bytes.
    """
    engine, threads = settings["engine"], settings["threads"]
    import_engine(engine, threads)
    settle_memory()
    imported = memory("VmRSS")
    start = time.perf_counter()
    generate = load_engine(engine, settings["folder"], threads)
    seconds = time.perf_counter() - start
    settle_memory()
    yield {"imported": imported, "loaded": memory("VmRSS"), "seconds": seconds}
    for line in requests:
        request = json.loads(line)
        ids = np.array(request["input_ids"], np.int32)
        settle_memory()
        before = memory("VmRSS")
        start = time.perf_counter()
        output = generate(ids, request["num_beams"], request["max_new_tokens"])
        seconds = time.perf_counter() - start
        yield {
            "ids": np.asarray(output).tolist(),
            "seconds": seconds,
            "before": before,
            "peak": memory("VmHWM"),
        }


def main(settings: dict[str, Any]) -> None:
    # Libraries print to standard output, which is for the answers alone.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if "build" in settings:
        built = build(
            settings["folder"],
            settings["build"],
            settings["seed"],
            settings["int8"],
            settings["ctranslate2"],
        )
        results: Any = [built]
    else:
        results = serve(settings, sys.stdin)
    for answer in results:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
