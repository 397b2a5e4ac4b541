"""Writes what the engines of `benchmark_engines.py` read, all with the same weights."""

import json
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np

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
        write_ctranslate2(folder)
    return {"weight_bytes": weight_bytes}


def convert(
    folder: str, export: str, texts: list[str], beams: list[int], for_ctranslate2: bool
) -> dict[str, Any]:
    """Writes an export's model for the other engines, and the export for other numbers of beams.

    Args:
        folder: where to.
        export: the folder of the export, NAME/VERSION.
        texts: sources.
        beams: what serving_default is wanted for.
        for_ctranslate2: also write what CTranslate2 reads.

    Returns:
        `lengths`, the tokens of each text, and `exports`, a folder for each number of beams.
    """
    import bertgen_tf as bg

    model = bg.EncoderDecoderModel.from_export(export)
    exports = {}
    for number in beams:
        if number == model.generation_config.num_beams:
            exports[number] = export
            continue
        path = Path(folder) / f"beams_{number}/1"
        if path.exists():  # of an earlier run
            shutil.rmtree(path)
        exports[number] = bg.export_saved_model(model, path, num_beams=number, check=False)
    lengths = model.preprocessor.generate_preprocess(texts)["attention_mask"].numpy().sum(axis=1)
    model.dequantize()
    model.save_to_huggingface(os.path.join(folder, "huggingface"))
    if for_ctranslate2:
        write_ctranslate2(folder)
    return {"lengths": lengths.tolist(), "exports": exports}


def read_checkpoint(folder: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors and the decoder's settings that Hugging Face reads in a folder."""
    from safetensors.numpy import load_file

    checkpoint = Path(folder) / "huggingface"
    tensors: dict[str, np.ndarray] = {}
    for file in checkpoint.glob("*.safetensors"):
        tensors |= load_file(file)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return tensors, config["decoder"]


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


def write_ctranslate2(folder: str) -> None:
    """Writes a folder's checkpoint as CTranslate2's transformer, which is the same function."""
    from ctranslate2.specs import TransformerSpec, common_spec

    tensors, config = read_checkpoint(folder)
    activations = {
        "gelu": common_spec.Activation.GELU,
        "gelu_new": common_spec.Activation.GELUTanh,
    }

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
        config["num_hidden_layers"],
        config["num_attention_heads"],
        pre_norm=False,
        activation=activations[config["hidden_act"]],
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
    tokens = [str(token) for token in range(config["vocab_size"])]
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    spec.config.bos_token = spec.config.decoder_start_token = str(config["bos_token_id"])
    spec.config.eos_token = str(config["eos_token_id"])
    spec.config.unk_token = str(config["pad_token_id"])
    spec.config.layer_norm_epsilon = config["layer_norm_eps"]
    spec.validate()
    spec.optimize()
    target = os.path.join(folder, "ctranslate2")
    os.makedirs(target, exist_ok=True)
    spec.save(target)


def write_onnx(folder: str) -> None:
    """Writes a folder's checkpoint for ONNX Runtime, float32 and dynamic int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from optimum.exporters.onnx import onnx_export_from_model

    exact, rounded = (Path(folder) / name for name in ("onnx", "onnx-int8"))
    onnx_export_from_model(
        as_bart(*read_checkpoint(folder)),
        exact,
        task="text2text-generation-with-past",
        do_validation=False,
    )
    rounded.mkdir(exist_ok=True)
    for name in ("config.json", "generation_config.json"):
        shutil.copy(exact / name, rounded / name)
    for name in ("encoder_model.onnx", "decoder_model_merged.onnx"):
        quantize_dynamic(
            exact / name,
            rounded / name,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"EnableSubgraph": True},
        )


def as_bart(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> Any:
    """A checkpoint as transformers' BART.

    optimum exports no BertGeneration, and BERT2BERT only without the keys and values of earlier
    tokens. BART is the same function, up to names and two unused rows of positions.
    """
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    layers = config["num_hidden_layers"]
    sides = {}
    for side in ("encoder", "decoder"):
        sides[f"{side}_layers"] = layers
        sides[f"{side}_attention_heads"] = config["num_attention_heads"]
        sides[f"{side}_ffn_dim"] = config["intermediate_size"]
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=config["vocab_size"],
            max_position_embeddings=config["max_position_embeddings"],
            d_model=config["hidden_size"],
            activation_function=config["hidden_act"],
            pad_token_id=config["pad_token_id"],
            bos_token_id=config["bos_token_id"],
            eos_token_id=config["eos_token_id"],
            decoder_start_token_id=config["bos_token_id"],
            forced_eos_token_id=None,
            tie_word_embeddings=False,
            **sides,
        )
    ).eval()
    for stack in (model.model.encoder, model.model.decoder):  # they need not have the same words
        stack.embed_tokens.weight = torch.nn.Parameter(stack.embed_tokens.weight.clone())
    names = bart_names(layers)
    weights = {name: torch.from_numpy(tensors[source]) for name, source in names.items()}
    for side in ("encoder", "decoder"):  # BART's positions begin at the third row
        name = f"model.{side}.embed_positions.weight"
        weights[name] = torch.nn.functional.pad(weights[name], (0, 0, 2, 0))
    weights["final_logits_bias"] = weights["final_logits_bias"][None]
    model.load_state_dict(weights)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = config["layer_norm_eps"]
    return model


def bart_names(layers: int) -> dict[str, str]:
    """BART's names of tensors, and BertGeneration's, of a model with so many layers."""
    names = {"final_logits_bias": "decoder.lm_head.bias"}
    words = "embeddings.word_embeddings.weight"
    names["model.shared.weight"] = f"encoder.{words}"
    names["lm_head.weight"] = f"decoder.bert.{words}"
    for bart, ours in (("model.encoder", "encoder"), ("model.decoder", "decoder.bert")):
        names[f"{bart}.embed_tokens.weight"] = f"{ours}.{words}"
        names[f"{bart}.embed_positions.weight"] = f"{ours}.embeddings.position_embeddings.weight"
        pairs = {"layernorm_embedding": "embeddings.LayerNorm"}
        attentions = {"self_attn": "attention"}
        if bart == "model.decoder":
            attentions["encoder_attn"] = "crossattention"
        for i in range(layers):
            layer = f"encoder.layer.{i}"
            for name, source in attentions.items():
                for part in ("query", "key", "value"):
                    pairs[f"layers.{i}.{name}.{part[0]}_proj"] = f"{layer}.{source}.self.{part}"
                pairs[f"layers.{i}.{name}.out_proj"] = f"{layer}.{source}.output.dense"
                pairs[f"layers.{i}.{name}_layer_norm"] = f"{layer}.{source}.output.LayerNorm"
            pairs[f"layers.{i}.fc1"] = f"{layer}.intermediate.dense"
            pairs[f"layers.{i}.fc2"] = f"{layer}.output.dense"
            pairs[f"layers.{i}.final_layer_norm"] = f"{layer}.output.LayerNorm"
        for name, source in pairs.items():
            for kind in ("weight", "bias"):
                names[f"{bart}.{name}.{kind}"] = f"{ours}.{source}.{kind}"
    return names
