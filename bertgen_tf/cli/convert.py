"""`bertgen-tf convert`: between TF Hub modules, Hugging Face checkpoints, exports and presets."""

import argparse
import importlib.util
import pathlib

import numpy as np

from bertgen_tf.checkpoints import huggingface, presets
from bertgen_tf.checkpoints.handles import (
    EXPORT,
    HUB,
    HUB_ENCODER,
    HUB_ORIGINAL,
    HUGGINGFACE_DECODER,
    HUGGINGFACE_ENCODER,
    HUGGINGFACE_PAIR,
    PRESET,
    kind_of,
)
from bertgen_tf.checkpoints.huggingface.comparison import Check, Model, compare_with_huggingface
from bertgen_tf.cli.flags.errors import flags, user_errors
from bertgen_tf.config import BertGenerationConfig, GenerationConfig
from bertgen_tf.data import folders
from bertgen_tf.export.check import check_scores
from bertgen_tf.models.encoder_decoder import EncoderDecoderModel
from bertgen_tf.models.variants import with_dtype

WARM_START_FLAGS = ("share", "cross_attention", "num_layers")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    with user_errors():
        _convert(arguments)


def _convert(arguments: argparse.Namespace) -> None:
    source, target, verify = arguments.source, arguments.target, arguments.verify
    folders.sweep(target)
    kind = kind_of(source)
    if kind == PRESET:
        folders.check_writable(target, huggingface.is_ours, "a Hugging Face checkpoint")
    else:
        presets.check_writable(target)
    model = _read(arguments, kind)
    print(f"read {source}: {kind}")
    rows = describe(model)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:{width}}  {value}")
    if verify and kind.startswith(HUB):
        print("verified: the module itself gives the same")
    elif verify and kind == EXPORT:
        check_scores(pathlib.Path(source), model)
        print("verified: the export itself gives the same probabilities")
    elif verify and kind == HUGGINGFACE_ENCODER and arguments.num_layers is not None:
        print("not compared with Hugging Face's own outputs: not all layers were kept")
    elif verify and kind != PRESET:
        pair = kind == HUGGINGFACE_PAIR
        _verify_with_transformers(model if pair else model.encoder, source, source)
    if arguments.dequantize:
        model.dequantize()
        print("dequantized: all matrices are float32")

    def check(path: pathlib.Path) -> None:
        if kind != PRESET:
            _verify_written(model, EncoderDecoderModel.from_preset(path), target)
            return
        written = EncoderDecoderModel.from_huggingface(path)
        _verify_written(with_dtype(model, "float32"), written, target)
        _verify_with_transformers(written, str(path), target)

    save = huggingface.save if kind == PRESET else presets.save
    save(model, target, check=check if verify else None)
    print(f"written: {target}")


def describe(model: EncoderDecoderModel) -> list[tuple[str, str]]:
    """What was read, as (name, value) rows of a table."""
    sharing = {
        "none": "nothing",
        "word_embeddings": "the word embeddings",
        "all": "all but cross-attention and output bias",
    }
    encoder, decoder = model.encoder.config, model.decoder.config
    sizes = [f"{config.vocab_size:,}" for config in (encoder, decoder)]
    tokenizer, preprocessor = model.tokenizer, model.preprocessor
    rows = [
        ("encoder", _describe_stack(encoder)),
        ("decoder", _describe_stack(decoder)),
        ("shared", sharing[model.decoder.sharing]),
        ("weights", f"{model.count_params():,}"),
        ("vocabulary", ", ".join(dict.fromkeys(sizes))),
        (
            "special ids",
            f"pad {decoder.pad_token_id}, start {decoder.bos_token_id}, end {decoder.eos_token_id}",
        ),
    ]
    if tokenizer is None:
        rows.append(("tokenizer", "none: the model takes and gives ids"))
    else:
        tokenizers = {"tokenizer": tokenizer, "decoder tokenizer": model.decoder_tokenizer}
        rows += [
            (name, f"{type(value).__name__}, {value.vocab_size:,} pieces")
            for name, value in tokenizers.items()
            if value is not None
        ]
        settings = preprocessor.get_config()
        lengths = [f"{settings[f'max_{side}_length']} {side}" for side in ("source", "target")]
        rows.append(("tokens at most", ", ".join(lengths)))
        added = [name for name in ("add_bos", "add_eos", "mask_first") if settings[name]]
        rows.append(("special tokens", ", ".join(added) or "none added"))
    defaults = GenerationConfig().to_dict()
    values = model.generation_config.to_dict()
    kept = ("max_new_tokens", "num_beams")
    rows.append(
        (
            "generation",
            ", ".join(
                f"{name} {value}"
                for name, value in values.items()
                if value != defaults[name] or name in kept
            ),
        )
    )
    return rows


def _describe_stack(config: BertGenerationConfig) -> str:
    return (
        f"{config.num_hidden_layers} layers, {config.hidden_size} wide, "
        f"{config.num_attention_heads} heads, {config.intermediate_size} inside, "
        f"{config.max_position_embeddings} positions, {config.hidden_act}"
        + (", a transform before the softmax" if config.head_transform else "")
        + ("" if config.tie_word_embeddings else ", an output matrix of its own")
        + (f", {config.quantization} matrices" if config.quantization else "")
    )


def _read(arguments: argparse.Namespace, kind: str) -> EncoderDecoderModel:
    given = {
        name: getattr(arguments, name)
        for name in WARM_START_FLAGS
        if getattr(arguments, name) is not None
    }
    if given and kind not in (HUB_ENCODER, HUGGINGFACE_ENCODER):
        raise ValueError(
            f"{flags(given)} applies to an encoder, and {arguments.source} is a {kind}"
        )
    if arguments.original and kind != HUB_ORIGINAL:
        raise ValueError(f"--original applies to an original, and {arguments.source} is a {kind}")
    if arguments.dequantize and kind not in (PRESET, EXPORT):
        raise ValueError(
            f"--dequantize applies to an export or a preset, and {arguments.source} is a {kind}"
        )
    if kind == PRESET:
        return EncoderDecoderModel.from_preset(arguments.source)
    if kind == EXPORT:
        return EncoderDecoderModel.from_export(arguments.source)
    if kind == HUB_ORIGINAL:
        if arguments.original:
            given["original"] = arguments.original
        return EncoderDecoderModel.from_hub(arguments.source, verify=arguments.verify, **given)
    if kind == HUB_ENCODER:
        return EncoderDecoderModel.from_hub(
            encoder=arguments.source, verify=arguments.verify, **given
        )
    if kind == HUGGINGFACE_ENCODER:
        return EncoderDecoderModel.from_huggingface(encoder=arguments.source, **given)
    if kind == HUGGINGFACE_DECODER:
        raise ValueError(
            f"{arguments.source} should be an encoder-decoder or an encoder, but is a decoder "
            "alone: in Python, BertGenerationDecoder.from_huggingface reads it"
        )
    return EncoderDecoderModel.from_huggingface(arguments.source)


def _verify_with_transformers(model: Model, folder: str, name: str) -> None:
    missing = [
        package
        for package in ("transformers", "torch")
        if importlib.util.find_spec(package) is None
    ]
    if missing:
        print(
            f"not compared with Hugging Face's own outputs: {' and '.join(missing)} not installed "
            '(pip install "bertgen_tf[compare]")'
        )
        return
    checks: list[Check] = compare_with_huggingface(model, folder)
    failed = [f"{check.name}: {check.result}" for check in checks if not check.passed]
    if failed:
        raise ValueError(
            f"{name} should give the same in transformers and here, but differs in "
            f"{'; '.join(failed)}. --no-verify converts it anyway"
        )
    for check in checks:
        print(f"verified with transformers: {check.name}: {check.result}")


def _verify_written(model: EncoderDecoderModel, written: EncoderDecoderModel, target: str) -> None:
    """Runs what was written and what was read on the same ids."""
    rng = np.random.default_rng(0)
    names = ("input_ids", "decoder_input_ids")
    batch = {
        name: rng.integers(0, config.vocab_size, (2, min(9, config.max_position_embeddings)))
        for name, config in zip(names, (model.encoder.config, model.decoder.config), strict=True)
    }
    batch = {name: ids.astype(np.int32) for name, ids in batch.items()}
    same = np.array_equal(model(batch), written(batch)) and _settings(model) == _settings(written)
    if not same:
        raise ValueError(
            f"{target} was not written, because what was written for it gives different outputs "
            "when read again: please report this"
        )
    print("verified: read again, it gives the same logits and has the same settings")


def _settings(model: EncoderDecoderModel) -> list[object]:
    preprocessor, tokenizers = model.preprocessor, (model.tokenizer, model.decoder_tokenizer)
    return [
        model.generation_config,
        preprocessor and preprocessor.get_config(),
        *(each and (type(each), each.get_config()) for each in tokenizers),
    ]
