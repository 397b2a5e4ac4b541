"""Writes Hugging Face checkpoints, which transformers 5 loads and which we read back."""

import os
import pathlib
import re
from collections.abc import Callable

from bertgen_tf.checkpoints.huggingface import config as configs
from bertgen_tf.checkpoints.huggingface import files, tokenizers
from bertgen_tf.checkpoints.huggingface import weights as names
from bertgen_tf.checkpoints.huggingface.files import CONFIG_FILE, GENERATION_FILE
from bertgen_tf.data import folders
from bertgen_tf.models.encoder_decoder import EncoderDecoderModel
from bertgen_tf.network.stacks import BertGenerationDecoder, BertGenerationEncoder
from bertgen_tf.training import lora

# What `save` writes.
_OURS = (
    r"config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors"
    r"|model\.safetensors\.index\.json|spiece\.model|vocab\.txt|tokenizer(_config)?\.json"
)


def save(
    model: EncoderDecoderModel | BertGenerationEncoder | BertGenerationDecoder,
    folder: str | os.PathLike,
    max_shard_size: int | str = "1GB",
    check: Callable[[pathlib.Path], None] | None = None,
) -> None:
    """Writes a checkpoint that transformers 5 loads with `from_pretrained`, and that we read back.

    The folder appears, or is replaced, only when everything is written. A stack is written as
    bert-generation; a decoder whose head has a transform as bert, also if it was read from a
    RoBERTa, whose positions begin later and are otherwise the same. Shared variables are
    written once for each name that transformers has for them. What Hugging Face has no place for is
    stored under the key "bertgen_tf" of `config.json`, which transformers keeps and does not read:
    what the stacks share, the arguments of `Seq2SeqPreprocessor`, and the scorer "gnmt" with its
    settings. transformers then searches with its own scorer and its default length penalty.

    Args:
        model: whatever its dtype policy, its weights are written in float32.
        folder: must not exist, be empty, or hold only what this function wrote.
        max_shard_size: bytes, or a string such as "5GB"; more than that is split into several
            files. One of them at a time is in memory.
        check: gets the folder before it takes its name; if it raises, an older one stays.

    Raises:
        OSError: the folder holds other files, or cannot be written.
        ValueError: `max_shard_size` is not a size, or the model is quantized or has adapters.
    """
    size = files.parse_size(max_shard_size)
    lora.check_merged(model, "a Hugging Face checkpoint")
    stacks = [model.encoder, model.decoder] if isinstance(model, EncoderDecoderModel) else [model]
    if any(stack.config.quantization for stack in stacks):
        raise ValueError(
            "model must have float32 matrices to become a Hugging Face checkpoint, and those of "
            "this one are int8. Save the float32 model, or call dequantize() first."
        )
    if any(stack.config.norm_first or stack.config.decoder_only for stack in stacks):
        raise ValueError(
            "model must have BERT's blocks to become a Hugging Face checkpoint: bert-generation "
            "has no place for GPT-2's (norm_first=True). Save a preset."
        )
    for config in (stack.config for stack in stacks):
        if config.head_transform not in (None, config.hidden_act):
            raise ValueError(
                "model must have a head_transform equal to its hidden_act to become a Hugging Face "
                f"checkpoint, where BERT has one for both, received {config.head_transform!r} and "
                f"{config.hidden_act!r}. Save a preset."
            )
    if getattr(model, "decoder_tokenizer", None) is not None:
        raise ValueError(
            "model must have one tokenizer to become a Hugging Face checkpoint, which has no place "
            "for a decoder_tokenizer. Save a preset."
        )
    generation = tokenizer = None
    if isinstance(model, EncoderDecoderModel):
        config, generation = configs.write_pair(model)
        tensors, sizes = names.tensors_of(model.encoder, "encoder.")
        for one, more in zip(
            (tensors, sizes), names.tensors_of(model.decoder, "decoder."), strict=True
        ):
            one.update(more)
        tokenizer = model.tokenizer
    else:
        is_decoder = isinstance(model, BertGenerationDecoder)
        config = configs.write_stack(model.config, is_decoder=is_decoder)
        tensors, sizes = names.tensors_of(model)

    def write(path: pathlib.Path) -> None:
        files.write_json(path / CONFIG_FILE, config)
        if generation is not None:
            files.write_json(path / GENERATION_FILE, generation)
        if tokenizer is not None:
            tokenizers.write_tokenizer(path, tokenizer)
        files.write_tensors(path, tensors, sizes, size)

    folders.write_folder(folder, write, is_ours, "a Hugging Face checkpoint", check)


def is_ours(folder: pathlib.Path) -> bool:
    """Whether a folder holds what `save` wrote, and nothing else that would be lost.

    transformers keeps our key when it saves a model that it trained, and adds its version.
    """
    try:
        config = files.read_json(folder / CONFIG_FILE)
    except (FileNotFoundError, ValueError):
        return False
    return (
        configs.OWN in config
        and "transformers_version" not in config
        and all(re.fullmatch(_OURS, name) for name in os.listdir(folder))
    )
