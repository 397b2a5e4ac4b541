"""What a handle names: a preset, a Hugging Face checkpoint or a TF Hub module."""

import os

from bertgen_tf.checkpoints import hub, huggingface, presets
from bertgen_tf.checkpoints.huggingface.files import is_huggingface

PRESET, HUB, HUGGINGFACE = "preset", "TF Hub", "HuggingFace"


def family_of(handle: str | os.PathLike) -> str:
    """`HUGGINGFACE`, `PRESET` or, for anything else, `HUB`; nothing is fetched, no graph is read.

    Args:
        handle: a folder, a file, a URL, or `org/name` of the Hugging Face hub.
    """
    if is_huggingface(handle):
        return HUGGINGFACE
    return PRESET if os.path.isfile(os.path.join(handle, presets.CONFIG_FILE)) else HUB


def kind_of(handle: str | os.PathLike) -> str:
    """What a handle names, in words.

    Returns:
        "preset", "TF Hub original", "TF Hub encoder", "HuggingFace encoder-decoder", "HuggingFace
        encoder" or "HuggingFace decoder".

    Raises:
        OSError, ValueError: nothing is there, or nothing that can be read.
    """
    family = family_of(handle)
    if family == HUGGINGFACE:
        return f"{HUGGINGFACE} {huggingface.kind_of(handle)}"
    if family == PRESET:
        presets.read_config(handle)
        return PRESET
    return f"{HUB} original" if hub.is_original(handle) else f"{HUB} encoder"
