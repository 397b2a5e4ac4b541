"""What a handle names: a preset, an export, a Hugging Face checkpoint or a TF Hub module."""

import os
import pathlib

from bertgen_tf.checkpoints import exports, hub, huggingface, presets
from bertgen_tf.checkpoints.huggingface.files import hub_name_in, is_huggingface

PRESET, HUB, HUGGINGFACE, EXPORT = "preset", "TF Hub", "HuggingFace", "export"
HUB_ORIGINAL, HUB_ENCODER = f"{HUB} original", f"{HUB} encoder"
HUGGINGFACE_PAIR = f"{HUGGINGFACE} encoder-decoder"
HUGGINGFACE_ENCODER, HUGGINGFACE_DECODER = f"{HUGGINGFACE} encoder", f"{HUGGINGFACE} decoder"

_KERAS = "Keras file"
# What each is called, and what reads it.
_READERS = {
    PRESET: ("a preset", "EncoderDecoderModel.from_preset reads it, and --preset of each command"),
    HUB: ("a TF Hub module", "from_hub reads it"),
    HUGGINGFACE: ("a Hugging Face checkpoint", "from_huggingface reads it"),
    EXPORT: (
        "an export",
        "EncoderDecoderModel.from_export reads it, and bertgen-tf convert makes a preset of it",
    ),
    _KERAS: ("a file of Keras", "keras.models.load_model reads it"),
}


def family_of(handle: str | os.PathLike) -> str:
    """`HUGGINGFACE`, `PRESET`, `EXPORT` or, for anything else, `HUB`.

    Nothing is fetched, and no graph is read.

    Args:
        handle: a folder, a file, a URL, or `org/name` of the Hugging Face hub.
    """
    if is_huggingface(handle):
        return HUGGINGFACE
    if os.path.isfile(os.path.join(handle, presets.CONFIG_FILE)):
        return PRESET
    return EXPORT if exports.is_export(handle) or exports.versions_in(handle) else HUB


def kind_of(handle: str | os.PathLike) -> str:
    """What a handle names, in words.

    Returns:
        `PRESET`, `EXPORT`, `HUB_ORIGINAL`, `HUB_ENCODER`, `HUGGINGFACE_PAIR`,
        `HUGGINGFACE_ENCODER` or `HUGGINGFACE_DECODER`.

    Raises:
        OSError, ValueError: nothing is there, or nothing that can be read.
    """
    family = family_of(handle)
    if family == HUGGINGFACE:
        return f"{HUGGINGFACE} {huggingface.kind_of(handle)}"
    if family == PRESET:
        presets.read_config(handle)
        return PRESET
    if family == EXPORT:
        return EXPORT
    return HUB_ORIGINAL if hub.is_original(handle) else HUB_ENCODER


def check_family(handle: str | os.PathLike, wanted: str) -> None:
    """Refuses what another call reads, and names that call; what is not recognised passes.

    Args:
        handle: as for `family_of`.
        wanted: `PRESET`, `HUB` or `HUGGINGFACE`, what the caller reads.

    Raises:
        FileNotFoundError: it is no path, but might be a name on the Hugging Face hub.
        ValueError: it is something else.
    """
    name, expected = os.fspath(handle), _READERS[wanted][0]
    hub_name = hub_name_in(name)
    if hub_name is not None:
        if hub_name == name and wanted == HUGGINGFACE:
            return
        raise FileNotFoundError(
            f"{name} should be {expected}, but there is no such folder. As a name on the Hugging "
            f"Face hub, from_huggingface reads it: {hub_name!r}."
        )
    found = _recognise(name)
    if found not in (None, wanted):
        what, reader = _READERS[found]
        raise ValueError(f"{name} should be {expected}, but is {what}: {reader}.")


def _recognise(name: str) -> str | None:
    if "://" in name or (os.path.isfile(name) and name.endswith((".tar.gz", ".tgz"))):
        return HUB
    if os.path.isfile(name) and name.endswith(".keras"):
        return _KERAS
    folder = pathlib.Path(name)
    if not folder.is_dir():
        return None
    if is_huggingface(name):
        return HUGGINGFACE
    if presets.has_config(folder):
        return PRESET
    if exports.is_export(folder) or exports.versions_in(folder):
        return EXPORT
    return HUB if (folder / "saved_model.pb").is_file() else None
