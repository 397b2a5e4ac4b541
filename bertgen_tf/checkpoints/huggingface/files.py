"""The files of Hugging Face checkpoints: folders and hub names, JSON, tensors in and out.

Tensors are read from `model.safetensors`, or from shards with an index. `pytorch_model.bin` is a
pickle: only torch reads it, with `weights_only=True`, and only if torch is installed.
"""

import importlib.util
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bertgen_tf import checks
from bertgen_tf.checks import first_line
from bertgen_tf.network import sources

CONFIG_FILE = "config.json"
# The key in JSON files for what Hugging Face has no place for.
OWN = "bertgen_tf"
GENERATION_FILE = "generation_config.json"
SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
INDEX = ".index.json"
# What is fetched from a repository on the hub: only what we read.
PATTERNS = (
    CONFIG_FILE,
    GENERATION_FILE,
    "spiece.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    SAFETENSORS,
    SAFETENSORS + INDEX,
    "model-*-of-*.safetensors",
)
TORCH_PATTERNS = (TORCH, TORCH + INDEX, "pytorch_model-*-of-*.bin")
# How the names of transformers' classes begin -> model_type; the longer one first.
_CLASSES = {
    "BertGeneration": "bert-generation",
    "Bert": "bert",
    "Roberta": "roberta",
    "GPT2": "gpt2",
    "EncoderDecoder": "encoder-decoder",
}
# Models that have an `org/` on the hub today, and are found without it, too: patterns -> `org`.
_FORMER_NAMES = {
    r"bert-(base|large)-[a-z-]+": "google-bert",
    r"roberta-(base|large)": "FacebookAI",
    r"gpt2(-medium|-large|-xl)?": "openai-community",
}
# Buffers with the numbers 0, 1, 2 ..., which old versions stored.
_BUFFERS = r"(.*\.)?embeddings\.(position_ids|token_type_ids)"


def is_hub_name(name: str) -> bool:
    """Whether it names a repository on the hub, and not a path on this machine."""
    return hub_name_in(name) == name


def hub_name_in(name: str) -> str | None:
    """The repository on the hub that a name, or the URL of its page, stands for; None for a path.

    That is `org/name`, or one of the few names of models that had no `org/` once, such as
    `bert-base-uncased`.
    """
    url = re.fullmatch(r"https?://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)(/.*)?", name)
    if url:
        return url[1]
    if os.path.exists(name):
        return None
    former = any(re.fullmatch(pattern, name) for pattern in _FORMER_NAMES)
    is_name = (
        re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None
        and not os.path.isdir(name.split("/")[0])
        and not name.endswith((".tar.gz", ".tgz"))
    )
    return name if former or is_name else None


def is_huggingface(source: str | os.PathLike) -> bool:
    """Whether a source is a Hugging Face folder, or a name on its hub such as org/name."""
    if not os.path.exists(source):
        return is_hub_name(os.fspath(source))
    try:
        return model_type_of(checks.read_json(pathlib.Path(source, CONFIG_FILE))) is not None
    except (OSError, ValueError):
        return False


def model_type_of(config: dict[str, Any]) -> Any:
    """The `model_type` of a `config.json`; where old versions did not write it, that of its class.

    Returns:
        what is stored, whatever it is; None if nothing says it.
    """
    if config.get("model_type") is not None:
        return config["model_type"]
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    for prefix, kind in _CLASSES.items():
        if any(isinstance(name, str) and name.startswith(prefix) for name in names):
            return kind
    # As Google's own: what RoBERTa, the only other one with token types, has differs.
    is_bert = not names and config.get("type_vocab_size") == 2 and not config.get("pad_token_id")
    return "bert" if is_bert else None


def resolve(name: str | os.PathLike) -> pathlib.Path:
    """The folder of a checkpoint: a local one, or `org/name` of the hub, downloaded if needed.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: it is what another call reads.
        ImportError: it is the name of a hub repository, and huggingface_hub is not installed, or
            torch is not and the repository has no safetensors.
    """
    name = os.fspath(name)
    sources.handles.check_family(name, sources.handles.HUGGINGFACE)
    if os.path.isdir(name):
        return pathlib.Path(name)
    if not is_hub_name(name):
        raise FileNotFoundError(
            f"{name} should be the folder of a Hugging Face checkpoint, or org/name of one on its "
            "hub, but there is no such folder."
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"{name} is not a local folder, and looking for it on the Hugging Face hub needs "
            'huggingface_hub: pip install "bertgen_tf[huggingface]".'
        ) from error
    for pattern, organisation in _FORMER_NAMES.items():
        if re.fullmatch(pattern, name):
            name = f"{organisation}/{name}"
    try:
        folder = pathlib.Path(
            huggingface_hub.snapshot_download(name, allow_patterns=list(PATTERNS))
        )
        found = _weights_file(folder)
        # Only if there is nothing else; they would double the download.
        if not found and _has_torch():
            huggingface_hub.snapshot_download(name, allow_patterns=[*PATTERNS, *TORCH_PATTERNS])
    except Exception as error:  # huggingface_hub raises its own, those of httpx and of the system
        raise FileNotFoundError(
            f"{name} is not a local folder and could not be fetched from the Hugging Face hub: "
            f"{first_line(error)}"
        ) from error
    if not found and not _has_torch():
        raise ImportError(
            f"{name} has no {SAFETENSORS} on the Hugging Face hub, and reading a {TORCH} needs "
            'torch, which is not installed: pip install "bertgen_tf[torch]".'
        )
    return folder


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it holds something else.
    """
    try:
        return checks.read_json(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path.parent} should be a Hugging Face checkpoint with a file {path.name}, but has "
            "none."
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} should be a JSON file, but reading it failed: {first_line(error)}"
        ) from error


def write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    """Writes an object as indented JSON."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint by name, in float32.

    Raises:
        FileNotFoundError: there are no weights, or a shard is missing.
        ImportError: there is only a `pytorch_model.bin`, and no torch.
        ValueError: a file is damaged, or index and shards do not agree.
    """
    file = _weights_file(folder)
    if file is None:
        found = sorted(path.name for path in folder.iterdir() if path.suffix != ".json")
        raise FileNotFoundError(
            f"{folder} should hold the weights in {SAFETENSORS} or {TORCH}, or in shards with an "
            f"index, but holds {', '.join(found[:6]) or 'none'}."
        )
    read = _read_safetensors if file.startswith(SAFETENSORS) else _read_torch
    tensors: dict[str, np.ndarray] = {}
    if not file.endswith(INDEX):
        read_shards = [(file, None)]
    else:
        read_shards = list(_shards(folder / file))
    for shard, listed in read_shards:
        own = read(folder / shard)
        if listed is not None:
            _check_shard(folder / shard, listed, set(own))
        tensors.update(own)
    tensors = {name: tensor for name, tensor in tensors.items() if not re.fullmatch(_BUFFERS, name)}
    # bfloat16 is a custom type in numpy, of kind "V".
    other = {
        name: tensor.dtype.name
        for name, tensor in tensors.items()
        if tensor.dtype.name not in ("float16", "bfloat16", "float32", "float64")
    }
    if other:
        some = ", ".join(f"{name} ({dtype})" for name, dtype in list(other.items())[:6])
        raise ValueError(
            f"{folder} should hold weights in float16, bfloat16, float32 or float64, but has {some}"
            f"{' and more' if len(other) > 6 else ''}. Quantized checkpoints cannot be read."
        )
    with np.errstate(over="ignore"):  # too large for float32: an inf, which is refused later
        for name in tensors:  # one by one: not all in two types at once
            tensors[name] = tensors[name].astype(np.float32, copy=False)
    return tensors


def write_tensors(
    folder: pathlib.Path,
    tensors: dict[str, Callable[[], np.ndarray]],
    sizes: dict[str, int],
    max_shard_size: int,
) -> None:
    """Writes `model.safetensors`, or shards of at most `max_shard_size` bytes with an index.

    Args:
        folder: an existing folder.
        tensors: functions that return a float32 array each, by name: only one shard is in memory.
        sizes: bytes of each tensor.
        max_shard_size: a tensor that is larger has a shard of its own.
    """
    shards: list[list[str]] = [[]]
    room = max_shard_size
    for name in tensors:
        if shards[-1] and sizes[name] > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(name)
        room -= sizes[name]
    files = [SAFETENSORS]
    if len(shards) > 1:
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        write_json(
            folder / (SAFETENSORS + INDEX),
            {
                "metadata": {"total_size": sum(sizes.values())},
                "weight_map": {
                    name: file for file, names in zip(files, shards, strict=True) for name in names
                },
            },
        )
    for file, names in zip(files, shards, strict=True):
        shard = {name: np.ascontiguousarray(tensors[name]()) for name in names}
        # transformers refuses files that do not say so.
        save_file(shard, folder / file, metadata={"format": "pt"})


def parse_size(size: int | str) -> int:
    """Bytes: an integer, or a string such as "5GB" or "200MB" (powers of 1000)."""
    number = size
    if isinstance(size, str) and (match := re.fullmatch(r"(\d+) ?(KB|MB|GB)", size.upper())):
        number = int(match[1]) * 1000 ** ("KB", "MB", "GB").index(match[2]) * 1000
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(
            f'max_shard_size must be bytes from 1, or a string such as "5GB", received {size!r}.'
        )
    return number


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _weights_file(folder: pathlib.Path) -> str | None:
    candidates = (SAFETENSORS, SAFETENSORS + INDEX, TORCH, TORCH + INDEX)
    return next((name for name in candidates if (folder / name).is_file()), None)


def _shards(index: pathlib.Path) -> Iterator[tuple[str, set[str]]]:
    """The files that an index lists, with the names of their tensors."""
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise ValueError(f"{index} should list the tensors and their files in weight_map.")
    listed: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        listed.setdefault(file, set()).add(name)
    for file in listed:
        # A checkpoint must not make us read other files.
        if file in (".", "..") or re.search(r"[/\\\0:]", file):
            raise ValueError(f"{index} should name files in its own folder, but names {file!r}.")
        if not (index.parent / file).is_file():
            raise FileNotFoundError(f"{index} lists {file}, which is missing: copy it again.")
    yield from listed.items()


def _check_shard(path: pathlib.Path, listed: set[str], held: set[str]) -> None:
    # So no tensor can be in two shards: the index lists each of them once.
    if listed == held:
        return
    problems = [
        f"{verb} {', '.join(sorted(names)[:6])}"
        for verb, names in (("lacks", listed - held), ("also holds", held - listed))
        if names
    ]
    raise ValueError(
        f"{path} should hold the tensors that the index lists for it, but {' and '.join(problems)}."
    )


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} should be a safetensors file, but reading it failed: {first_line(error)}"
        ) from error


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    if not _has_torch():
        raise ImportError(
            f"Reading {path} needs torch, which is not installed: pip install "
            '"bertgen_tf[torch]", or save the checkpoint as model.safetensors.'
        )
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        arrays = {}
        for name in list(state):
            tensor = state.pop(name)
            arrays[name] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        return arrays
    except Exception as error:  # pickle, zipfile and torch raise classes of their own
        raise ValueError(
            f"{path} should be a PyTorch file that holds tensors only, but reading it failed: "
            f"{first_line(error)}"
        ) from error
