"""Runs a Hugging Face checkpoint in transformers and here, and reports how far apart they are.

Needs transformers and torch: the extra `compare`.
"""

import re
from typing import Any, NamedTuple

import numpy as np

from bertgen_tf.checkpoints.huggingface.generation_settings import write_generation
from bertgen_tf.config import GenerationConfig
from bertgen_tf.models.encoder_decoder import EncoderDecoderModel
from bertgen_tf.network.precision import exact
from bertgen_tf.network.stacks import BertGenerationDecoder, BertGenerationEncoder

Model = EncoderDecoderModel | BertGenerationEncoder | BertGenerationDecoder

ROWS = 3
LENGTHS = (17, 11)  # of the sources, and of the targets
MAX_NEW_TOKENS = 16


class Check(NamedTuple):
    """One thing that was compared.

    Attributes:
        name: such as "decoder logits".
        result: the difference, in words.
        passed: whether it is small enough.
    """

    name: str
    result: str
    passed: bool


def compare_with_huggingface(
    model: Model, folder: str, *, tolerance: float = 1e-5, seed: int = 0
) -> list[Check]:
    """Runs both sides on the same random ids, with padding.

    Args:
        model: what `from_huggingface(folder)` returned, with all its layers, in float32.
        folder: the checkpoint, or `org/name` of one.
        tolerance: the greatest allowed difference of hidden states and logits, relative to their
            greatest absolute value if that is above 1.
        seed: of the ids.

    Returns:
        The checks: hidden states or logits; for an encoder-decoder both, and the ids that greedy
        search and searches of four beams generate, up to the first EOS.

    Raises:
        ImportError: transformers or torch is not installed.
        ValueError: transformers finds no weights in the checkpoint for a part of its model.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(
            'Comparing needs transformers and torch: pip install "bertgen_tf[compare]".'
        ) from error
    rng = np.random.default_rng(seed)
    other = _load(transformers, model, folder)
    with exact(), torch.no_grad():
        if isinstance(model, EncoderDecoderModel):
            return _compare_encoder_decoder(model, other, rng, tolerance)
        ids, mask = _random_ids(rng, model.config, LENGTHS[0])
        inputs = {"input_ids": ids, "attention_mask": mask}
        if isinstance(model, BertGenerationEncoder):
            theirs = other(**_tensors(inputs)).last_hidden_state
            return [_compare("hidden states", model(ids, mask), theirs, mask, tolerance)]
        if model.config.add_cross_attention:
            shape = (*ids.shape, model.config.hidden_size)
            inputs["encoder_hidden_states"] = rng.normal(size=shape).astype(np.float32)
        theirs = other(**_tensors(inputs)).logits
        return [_compare("logits", model(**inputs), theirs, mask, tolerance)]


def _load(transformers: Any, model: Model, folder: str) -> Any:
    if isinstance(model, EncoderDecoderModel):
        kind = transformers.EncoderDecoderModel
    elif isinstance(model, BertGenerationDecoder):
        kind = transformers.AutoModelForCausalLM
    else:
        kind = transformers.AutoModel
    logging = transformers.utils.logging
    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        other, info = kind.from_pretrained(folder, dtype="float32", output_loading_info=True)
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()
    tensors = other.state_dict()
    decoder = getattr(other, "decoder", None)
    stacks = ("encoder.", f"decoder.{getattr(decoder, 'base_model_prefix', '')}.")
    lacking, filled = [], tensors.keys() - info["missing_keys"]
    for name in info["missing_keys"]:
        # transformers 4 stores stacks that are shared once, and transformers 5 cannot share them.
        own, other_side = stacks if name.startswith("encoder.") else stacks[::-1]
        twin = other_side + name.removeprefix(own)
        if isinstance(model, EncoderDecoderModel) and twin in tensors.keys() - info["missing_keys"]:
            tensors[name].copy_(tensors[twin])
            filled.add(name)
        elif not re.match(r"(.*\.)?pooler\.", name):  # which nothing here reads
            lacking.append(name)
    # A head that is tied to what was just filled is missing, too.
    places = {tensors[name].data_ptr() for name in filled}
    lacking = [name for name in lacking if tensors[name].data_ptr() not in places]
    if lacking:
        raise ValueError(
            f"{folder} should hold all weights of transformers' {type(other).__name__}, but has "
            f"none for {', '.join(lacking[:6])}{', ...' if lacking[6:] else ''}."
        )
    return other.eval()


def _random_ids(
    rng: np.random.Generator, config: Any, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, int32 [ROWS, length], each row shorter than the last."""
    length = min(longest, config.max_position_embeddings)
    mask = (np.arange(length) < length - 3 * np.arange(ROWS)[:, None].clip(max=length - 1)).astype(
        np.int32
    )
    # RoBERTa counts its positions by the ids that are not padding.
    choice = np.setdiff1d(np.arange(config.vocab_size, dtype=np.int32), config.pad_token_id)
    ids = rng.choice(choice, mask.shape)
    return np.where(mask == 1, ids, config.pad_token_id).astype(np.int32), mask


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    return {
        name: torch.tensor(array.astype(np.int64) if array.dtype == np.int32 else array)
        for name, array in arrays.items()
    }


def _compare_encoder_decoder(
    model: EncoderDecoderModel, other: Any, rng: np.random.Generator, tolerance: float
) -> list[Check]:
    ids, mask = _random_ids(rng, model.encoder.config, LENGTHS[0])
    target_ids, target_mask = _random_ids(rng, model.decoder.config, LENGTHS[1])
    source = {"input_ids": ids, "attention_mask": mask}
    batch = {**source, "decoder_input_ids": target_ids, "decoder_attention_mask": target_mask}
    theirs = other(**_tensors(batch))
    checks = [
        _compare(
            "encoder hidden states",
            model.encoder(ids, mask),
            theirs.encoder_last_hidden_state,
            mask,
            tolerance,
        ),
        _compare("decoder logits", model(batch), theirs.logits, target_mask, tolerance),
    ]
    penalties = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3}
    for name, options in (
        ("greedy search", {}),
        ("4 beams", {"num_beams": 4}),
        ("4 beams with penalties", {"num_beams": 4, **penalties}),
    ):
        checks.append(_compare_generated(name, options, model, other, source))
    return checks


def _compare(name: str, ours: Any, theirs: Any, mask: np.ndarray, tolerance: float) -> Check:
    ours, theirs = (np.asarray(tensor, np.float32)[mask == 1] for tensor in (ours, theirs))
    if ours.shape != theirs.shape:
        return Check(name, f"shapes {ours.shape} and {theirs.shape}", False)
    difference, size = np.abs(ours - theirs).max(), np.abs(theirs).max()
    result = f"max abs difference {difference:.2e}, values up to {size:.3g}"
    return Check(name, result, bool(difference <= tolerance * max(1.0, size)))  # NaN is not


def _compare_generated(
    name: str,
    options: dict[str, Any],
    model: EncoderDecoderModel,
    other: Any,
    source: dict[str, np.ndarray],
) -> Check:
    from transformers import GenerationConfig as TheirConfig

    decoder = model.decoder.config
    length = min(MAX_NEW_TOKENS, decoder.max_position_embeddings)
    config = GenerationConfig(max_new_tokens=length).replace(**options)
    special_ids = {
        "pad_token_id": decoder.pad_token_id,
        "bos_token_id": decoder.bos_token_id,
        "eos_token_id": decoder.eos_token_id,
        "decoder_start_token_id": decoder.bos_token_id,
    }
    # What a call leaves out would come from the checkpoint's own settings.
    other.generation_config = TheirConfig(
        **{"num_beams": 1, "do_sample": False, **special_ids, **write_generation(config)[0]}
    )
    theirs = other.generate(**_tensors(source)).numpy()
    ours = model.generate(source, config, jit_compile=False).sequences[:, 0]
    pairs = zip(ours.tolist(), theirs.tolist(), strict=True)
    end = decoder.eos_token_id
    equal = sum(_until(end, one[1:], length) == _until(end, two[1:], length) for one, two in pairs)
    return Check(name, f"{equal} of {len(ours)} sequences the same", equal == len(ours))


def _until(end: int, ids: list[int], length: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids[:length]
