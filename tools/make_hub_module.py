"""Makes a TF Hub module in the TF2 SavedModel format from a Hugging Face BERT encoder folder.

    python tools/make_hub_module.py SOURCE_FOLDER OUTPUT_FOLDER

The module looks like those that the TensorFlow Model Garden exports
(https://www.tensorflow.org/hub/common_saved_model_apis/text): the same variable names and shapes,
the same inputs and outputs. It is computed with plain TensorFlow operations, so that it can serve
as an independent reference for bertgen_tf, and with the activation that config.json names; the
Garden always uses the tanh approximation of gelu.
"""

import argparse
import json
import math
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf
from safetensors.numpy import load_file

ACTIVATIONS = {
    "gelu": tf.nn.gelu,
    "gelu_new": lambda x: tf.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: tf.nn.gelu(x, approximate=True),
    "gelu_fast": lambda x: tf.nn.gelu(x, approximate=True),
    "relu": tf.nn.relu,
}
SOURCE_FILES = ("config.json", "model.safetensors", "vocab.txt")


def variable_sources(config: dict) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Model Garden variable name -> (Hugging Face tensor name, shape of the variable)."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head = hidden // heads
    types = config.get("type_vocab_size", 2)
    sources = {
        "word_embeddings/embeddings": (
            "embeddings.word_embeddings.weight",
            (config["vocab_size"], hidden),
        ),
        "position_embedding/embeddings": (
            "embeddings.position_embeddings.weight",
            (config["max_position_embeddings"], hidden),
        ),
        "type_embeddings/embeddings": ("embeddings.token_type_embeddings.weight", (types, hidden)),
    }

    def norm(target, source):
        sources[f"{target}/gamma"] = (f"{source}.weight", (hidden,))
        sources[f"{target}/beta"] = (f"{source}.bias", (hidden,))

    def dense(target, source, kernel, bias):
        sources[f"{target}/kernel"] = (f"{source}.weight", kernel)
        sources[f"{target}/bias"] = (f"{source}.bias", bias)

    norm("embeddings/layer_norm", "embeddings.LayerNorm")
    for i in range(config["num_hidden_layers"]):
        to, of = f"transformer/layer_{i}", f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            dense(
                f"{to}/self_attention/{name}",
                f"{of}.attention.self.{name}",
                (hidden, heads, head),
                (heads, head),
            )
        dense(
            f"{to}/self_attention/attention_output",
            f"{of}.attention.output.dense",
            (heads, head, hidden),
            (hidden,),
        )
        norm(f"{to}/self_attention_layer_norm", f"{of}.attention.output.LayerNorm")
        dense(f"{to}/intermediate", f"{of}.intermediate.dense", (hidden, inner), (inner,))
        dense(f"{to}/output", f"{of}.output.dense", (inner, hidden), (hidden,))
        norm(f"{to}/output_layer_norm", f"{of}.output.LayerNorm")
    dense("pooler_transform", "pooler.dense", (hidden, hidden), (hidden,))
    return sources


def read_config(path: Path) -> dict:
    """Reads config.json and refuses what this tool would compute wrongly."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for field, allowed in {
        "model_type": ["bert"],
        "position_embedding_type": ["absolute"],
        "hidden_act": list(ACTIVATIONS),
    }.items():
        if config.get(field, allowed[0]) not in allowed:
            raise ValueError(
                f"{path}: {field} must be one of {', '.join(allowed)}, got {config[field]!r}"
            )
    if config["hidden_size"] % config["num_attention_heads"]:
        raise ValueError(
            f"{path}: hidden_size {config['hidden_size']} is not a multiple of "
            f"num_attention_heads {config['num_attention_heads']}"
        )
    return config


def read_weights(path: Path, config: dict) -> dict[str, np.ndarray]:
    """Reads the checkpoint as Model Garden variable name -> array; the pooler may be absent."""
    tensors = {}
    for name, tensor in load_file(path).items():
        name = name.removeprefix("bert.")
        # Checkpoints converted from TensorFlow keep its names for layer normalization.
        name = re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", _torch_norm_name, name)
        if not name.startswith("cls.") and not name.endswith("position_ids"):  # heads, a constant
            tensors[name] = tensor

    sources = variable_sources(config)
    if not any(name.startswith("pooler.") for name in tensors):
        sources = {to: of for to, of in sources.items() if not to.startswith("pooler_")}

    weights, problems = {}, []
    for target, (source, shape) in sources.items():
        tensor = tensors.pop(source, None)
        if tensor is None:
            problems.append(f"missing tensor {source}")
            continue
        if target.endswith("/kernel"):
            tensor = tensor.T  # Hugging Face stores [out, in]
            flat = _flat_kernel(target, shape)
        else:
            flat = (math.prod(shape),) if target.endswith("/bias") else shape
        if tensor.shape != flat:
            problems.append(f"tensor {source}: expected shape {flat}, found {tensor.shape}")
            continue
        weights[target] = tensor.reshape(shape).astype(np.float32)
    problems += [f"unexpected tensor {name}" for name in sorted(tensors)]
    if problems:
        raise ValueError(f"{path} does not fit its config.json:\n  " + "\n  ".join(problems))
    return weights


def _torch_norm_name(match: re.Match) -> str:
    return {"gamma": "weight", "beta": "bias"}[match[1]]


def _flat_kernel(target: str, shape: tuple[int, ...]) -> tuple[int, int]:
    inputs = 2 if target.endswith("attention_output/kernel") else 1
    return math.prod(shape[:inputs]), math.prod(shape[inputs:])


class BertEncoder(tf.train.Checkpoint):
    """The module: a trackable object with the interface of Model Garden encoders.

    Without pooler weights it gives neither `pooled_output` nor `default`.
    """

    def __init__(self, config: dict, weights: dict[str, np.ndarray], vocab: Path, lowercase: bool):
        super().__init__()
        self._config = config
        self._by_name = {name: tf.Variable(value, name=name) for name, value in weights.items()}
        self.do_lower_case = tf.Variable(lowercase, trainable=False)
        self.vocab_file = tf.saved_model.Asset(str(vocab))
        self.trainable_variables = list(self._by_name.values())
        self.variables = [*self.trainable_variables, self.do_lower_case]

    @tf.function
    def __call__(self, inputs, training=False, mask=None):
        with tf.name_scope("word_embeddings"):
            hidden = tf.gather(
                self._by_name["word_embeddings/embeddings"], inputs["input_word_ids"]
            )
        with tf.name_scope("position_embedding"):
            positions = self._by_name["position_embedding/embeddings"]
            hidden += positions[: tf.shape(hidden)[1]]
        with tf.name_scope("type_embeddings"):
            hidden += tf.gather(
                self._by_name["type_embeddings/embeddings"], inputs["input_type_ids"]
            )
        hidden = self._dropout(self._norm(hidden, "embeddings/layer_norm"), training)
        with tf.name_scope("self_attention_mask"):
            keep = tf.cast(inputs["input_mask"], tf.float32)[:, None, None, :]
            bias = (1.0 - keep) * -1e9  # [batch, 1, 1, key]

        outputs = []
        for i in range(self._config["num_hidden_layers"]):
            name = f"transformer/layer_{i}"
            attended = self._attention(hidden, bias, f"{name}/self_attention", training)
            attended = self._dropout(attended, training)
            hidden = self._norm(hidden + attended, f"{name}/self_attention_layer_norm")
            inner = self._dense("bsh,hf->bsf", hidden, f"{name}/intermediate")
            with tf.name_scope(f"{name}/activation"):
                inner = ACTIVATIONS[self._config.get("hidden_act", "gelu")](inner)
            inner = self._dropout(self._dense("bsf,fh->bsh", inner, f"{name}/output"), training)
            hidden = self._norm(hidden + inner, f"{name}/output_layer_norm")
            outputs.append(hidden)

        result = {"sequence_output": hidden, "encoder_outputs": outputs}
        if "pooler_transform/kernel" in self._by_name:
            pooled = self._dense("bh,ho->bo", hidden[:, 0], "pooler_transform")
            with tf.name_scope("pooler_transform"):
                result["pooled_output"] = result["default"] = tf.tanh(pooled)
        return result

    def _attention(self, hidden, bias, name, training):
        query, key, value = (
            self._dense("bsh,had->bsad", hidden, f"{name}/{part}")
            for part in ("query", "key", "value")
        )
        with tf.name_scope(name):
            scale = 1.0 / math.sqrt(query.shape[-1])
            scores = tf.einsum("bqad,bkad->baqk", query * scale, key) + bias
            probabilities = tf.nn.softmax(scores)
            if training:
                rate = self._config.get("attention_probs_dropout_prob", 0.1)
                probabilities = tf.nn.dropout(probabilities, rate)
            context = tf.einsum("baqk,bkad->bqad", probabilities, value)
        return self._dense("bqad,adh->bqh", context, f"{name}/attention_output")

    def _dense(self, equation, x, name):
        with tf.name_scope(name):
            kernel, bias = self._by_name[f"{name}/kernel"], self._by_name[f"{name}/bias"]
            return tf.einsum(equation, x, kernel) + bias

    def _norm(self, x, name):
        with tf.name_scope(name):
            mean, variance = tf.nn.moments(x, axes=-1, keepdims=True)
            epsilon = self._config.get("layer_norm_eps", 1e-12)
            gamma, beta = self._by_name[f"{name}/gamma"], self._by_name[f"{name}/beta"]
            return tf.nn.batch_normalization(x, mean, variance, beta, gamma, epsilon)

    def _dropout(self, x, training):
        if not training:
            return x
        return tf.nn.dropout(x, self._config.get("hidden_dropout_prob", 0.1))

    @tf.function
    def serve(self, input_word_ids, input_mask, input_type_ids):
        """The signature `serving_default`: tensors by name in, tensors by name out."""
        result = self(
            {
                "input_word_ids": input_word_ids,
                "input_mask": input_mask,
                "input_type_ids": input_type_ids,
            }
        )
        return {name: result[name] for name in result if name.endswith("_output")}


def make_hub_module(
    source_folder: str | Path, output_folder: str | Path, lowercase: bool | None = None
) -> None:
    """Writes the BERT encoder in `source_folder` as a TF Hub module.

    Args:
        source_folder: holds config.json, model.safetensors, vocab.txt and, unless `lowercase` is
            given, tokenizer_config.json. Tensor names may start with `bert.`; language-model
            heads are left out.
        output_folder: the SavedModel to make; written completely or not at all.
        lowercase: whether the tokenizer lower-cases; None takes `do_lower_case` of
            tokenizer_config.json.

    Raises:
        FileNotFoundError: a source file is absent.
        FileExistsError: `output_folder` exists.
        ValueError: the model is not a BERT encoder or the tensors do not fit config.json; one
            message lists all that are missing, unexpected or of the wrong shape.
    """
    source, output = Path(source_folder), Path(output_folder)
    if output.exists():
        raise FileExistsError(f"output_folder {output} exists: remove it or choose another")
    needed = SOURCE_FILES if lowercase is not None else (*SOURCE_FILES, "tokenizer_config.json")
    absent = [name for name in needed if not (source / name).is_file()]
    if absent:
        raise FileNotFoundError(f"source_folder {source} lacks {', '.join(absent)}")
    if lowercase is None:
        tokenizer = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
        lowercase = bool(tokenizer.get("do_lower_case", True))  # Hugging Face's default

    config = read_config(source / "config.json")
    weights = read_weights(source / "model.safetensors", config)
    module = BertEncoder(config, weights, source / "vocab.txt", lowercase)
    names = ("input_word_ids", "input_mask", "input_type_ids")
    inputs = {name: tf.TensorSpec((None, None), tf.int32, name) for name in names}
    for training in (False, True):
        module.__call__.get_concrete_function(inputs, training, None)

    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        signature = module.serve.get_concrete_function(**inputs)
        tf.saved_model.save(module, str(partial), signatures=signature)
        partial.chmod(0o755)  # mkdtemp's is private
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source_folder")
    parser.add_argument("output_folder")
    parser.add_argument(
        "--lowercase",
        action=argparse.BooleanOptionalAction,
        help="whether the tokenizer lower-cases (default: read from tokenizer_config.json)",
    )
    arguments = parser.parse_args()
    try:
        make_hub_module(arguments.source_folder, arguments.output_folder, arguments.lowercase)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {arguments.output_folder}")


if __name__ == "__main__":
    main()
