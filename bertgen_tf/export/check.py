"""Checks that an export answers as its model does, in a fresh process without bertgen_tf."""

import base64
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from bertgen_tf.checks import shown
from bertgen_tf.export.files import WARMUP_FILE, text_of_length
from bertgen_tf.export.signatures import COMPILED, ServingModule
from bertgen_tf.generation.search.logits import Processor
from bertgen_tf.generation.settings import eos_token_ids
from bertgen_tf.models.encoder_decoder import EncoderDecoderModel

# For log-probabilities and attention weights.
TOLERANCE = 1e-3
# Sums in another order may round to another int8 value.
INT8_TOLERANCE = 0.05
_PROGRAM = pathlib.Path(__file__).with_name("probe.py")


class ExportError(RuntimeError):
    """An export did not run, or its answers differ from its model's."""


class _Case(NamedTuple):
    """A request, and the model's answer."""

    signature: str
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    drawn: bool  # sampled anew at each call: only shapes and dtypes are the same
    tolerance: float = TOLERANCE


def check_export(
    folder: pathlib.Path,
    model: EncoderDecoderModel,
    module: ServingModule,
    logits_processor: Sequence[Processor] = (),
) -> None:
    """Runs every signature and the warm-up requests in a separate process, and compares.

    Args:
        folder: the export.
        model, module, logits_processor: what it was made from.

    Raises:
        ExportError: something failed or differs; the message lists everything.
    """
    cases = list(_cases(model, module, logits_processor))
    answers, warmed_up = _run(folder, cases)
    problems = [
        f"{case.signature}, output {name}: {problem}"
        for case, answer in zip(cases, answers, strict=True)
        for name, problem in _differences(case, answer)
    ]
    if (folder / WARMUP_FILE).exists() and not warmed_up:
        problems.append("the warm-up file holds no requests")
    if problems:
        raise ExportError(
            "The export must answer as its model does, but does not, and was not kept: "
            + "; ".join(dict.fromkeys(problems))
        )


def check_scores(folder: pathlib.Path, model: EncoderDecoderModel) -> None:
    """Raises a ValueError unless a model and the signature `score` of its export agree."""
    texts = _longest_first(model)
    targets = [*texts[1:], ""]
    inputs = {"source": np.array(texts, object), "target": np.array(targets, object)}
    score = tf.saved_model.load(str(folder)).signatures["score"]
    answer = {
        name: tensor.numpy()
        for name, tensor in score(**{k: tf.constant(v) for k, v in inputs.items()}).items()
    }
    case = _Case("score", inputs, _scores(model, texts, targets), False, _tolerance(model))
    if problems := [f"{name}: {problem}" for name, problem in _differences(case, answer)]:
        raise ValueError(
            f"{folder} should score texts as the model read from it, but differs in "
            f"{'; '.join(problems)}."
        )


def _longest_first(model: EncoderDecoderModel) -> list[str]:
    # As `generate` sorts a batch: equal batches are rounded the same way.
    limit = model.preprocessor.max_source_length
    whole = text_of_length(model, limit)
    return [f"{whole} {whole}", whole, text_of_length(model, max(1, limit - 1))]


def _tolerance(model: EncoderDecoderModel) -> float:
    """Of a forward pass that does not repeat the model's own graph."""
    return INT8_TOLERANCE if model.is_quantized else TOLERANCE


def _cases(
    model: EncoderDecoderModel, module: ServingModule, logits_processor: Sequence[Processor]
) -> Iterator[_Case]:
    batch = _longest_first(model)
    short = text_of_length(model, 5)
    odd = [[short], [""], [b"\xff\xfe \xf0\x9f\x98\x80"]]
    for signature in module.settings:
        compiled = signature.endswith(COMPILED)
        # For what is compiled one shape is enough; all hypotheses and the best share a function.
        batches = [[short]] if compiled else [batch]
        settings = module.settings["beams_xla" if signature == "generate_xla" else signature]
        for texts in batches + (odd if signature == "serving_default" else []):
            output = model.generate(
                tf.data.Dataset.from_tensor_slices(texts),
                settings,
                logits_processor=logits_processor,
                output_scores=True,
                output_attentions=signature == "attention",
                jit_compile=compiled,
                verbose=0,
            )
            yield _case(model, module, signature, texts, output)
    preprocessor = model.preprocessor
    special = preprocessor.add_bos + preprocessor.add_eos
    counts = [len(preprocessor.tokenizer(text)) + special for text in batch]
    yield _Case(
        "tokens",
        {"text": np.array(batch, object)},
        {"num_tokens": np.array(counts, np.int32)},
        drawn=False,
    )
    targets = [*batch[1:], ""]
    yield _Case(
        "score",
        {"source": np.array(batch, object), "target": np.array(targets, object)},
        _scores(model, batch, targets),
        drawn=False,
        tolerance=_tolerance(model),  # the others repeat the model's own graphs
    )


def _case(
    model: EncoderDecoderModel, module: ServingModule, signature: str, texts: list, output: Any
) -> _Case:
    """The request for `texts`, and its answer, made from the output of `generate`."""
    config = module.settings[signature]
    drawn = config.do_sample and config.seed is None
    ids = {k: v.numpy() for k, v in model.preprocessor.generate_preprocess(texts).items()}
    if signature == "ids":
        outputs = {"sequences": output.sequences, "score": output.scores}
        return _Case(signature, ids, outputs, drawn)
    outputs = {
        "text": np.array(output.texts, object).reshape(len(texts), -1),
        "score": output.scores,
    }
    spec = module.functions[signature].get_concrete_function().structured_outputs["score"]
    if spec.shape.rank == 1:
        outputs = {name: array[:, 0] for name, array in outputs.items()}
    if signature == "attention":
        weights = output.cross_attentions[:, 0].mean(axis=(1, 2))
        best = output.sequences[:, 0, 1:]
        ends = np.isin(best, eos_token_ids(config, model))
        generated = np.cumsum(ends, axis=1) - ends == 0
        longest = generated.sum(axis=1).max()
        is_token = ids["attention_mask"].astype(bool)
        outputs |= {
            "source_tokens": _pieces(model.preprocessor.tokenizer, ids["input_ids"], is_token),
            "target_tokens": _pieces(model.preprocessor.target_tokenizer, best, generated)[
                :, :longest
            ],
            "attention": np.where(is_token[:, np.newaxis], weights[:, :longest], 0),
        }
        # Of one text at a time, where the model's are of a batch.
        return _Case(
            signature, {"text": np.array(texts, object)}, outputs, drawn, _tolerance(model)
        )
    return _Case(signature, {"text": np.array(texts, object)}, outputs, drawn)


def _pieces(tokenizer: Any, ids: np.ndarray, visible: np.ndarray) -> np.ndarray:
    known = visible & (ids < tokenizer.vocab_size)
    pieces = tokenizer.convert_ids_to_tokens(np.where(known, ids, 0).reshape(-1))
    return np.where(known, np.array(pieces, object).reshape(ids.shape), "")


def _scores(
    model: EncoderDecoderModel, sources: list[str], targets: list[str]
) -> dict[str, np.ndarray]:
    """From one forward pass for each pair, without target padding, as the signature does it."""
    preprocessor = model.preprocessor
    forward = tf.function(lambda x: tf.nn.log_softmax(model(x, training=False))[0], autograph=False)
    x, labels, weights = preprocessor.pack(
        preprocessor.encode_source(tf.constant(sources)),
        preprocessor.encode_target(tf.constant(targets)),
    )
    lengths = weights.numpy().sum(axis=1).astype(np.int32)
    scores = []
    for row, length in enumerate(lengths):
        of_row = {name: tensor[row : row + 1] for name, tensor in x.items()}
        for name in ("decoder_input_ids", "decoder_attention_mask"):
            of_row[name] = of_row[name][:, :length]
        log_probabilities = forward(of_row).numpy()
        scores.append(log_probabilities[np.arange(length), labels[row, :length].numpy()].sum())
    return {"log_probability": np.array(scores, np.float32), "num_tokens": lengths}


def _run(folder: pathlib.Path, cases: list[_Case]) -> tuple[list[dict[str, np.ndarray]], int]:
    """The answers of the export, and how many warm-up requests it ran."""
    requests = [
        {
            "signature": case.signature,
            "inputs": {name: _encode(array) for name, array in case.inputs.items()},
        }
        for case in cases
    ]
    # -P: nothing beside the program may be imported. This process holds the GPU's memory.
    process = subprocess.run(
        [sys.executable, "-P", str(_PROGRAM), str(folder)],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"},
    )
    if process.returncode < 0:
        raise ExportError(
            f"The export was not kept: the process that checked it was ended by signal "
            f"{-process.returncode}, perhaps for lack of memory. check=False skips the check."
        )
    if process.returncode:
        raise ExportError(
            "The export must run without bertgen_tf, but failed, and was not kept: "
            f"{' '.join(process.stderr.split())[-1000:]}"
        )
    answers, warmed_up = json.loads(process.stdout.splitlines()[-1])
    decoded = [{name: _decode(tensor) for name, tensor in answer.items()} for answer in answers]
    return decoded, warmed_up


def _encode(array: np.ndarray) -> dict[str, Any]:
    if array.dtype != object:
        return {"dtype": array.dtype.name, "values": array.tolist()}
    texts = [text.encode() if isinstance(text, str) else text for text in array]
    return {"dtype": "string", "values": [base64.b64encode(text).decode() for text in texts]}


def _decode(tensor: dict[str, Any]) -> np.ndarray:
    if tensor["dtype"] != "string":
        return np.array(tensor["values"], tensor["dtype"]).reshape(tensor["shape"])
    texts = [base64.b64decode(value).decode() for value in tensor["values"]]
    return np.array(texts, object).reshape(tensor["shape"])


def _differences(case: _Case, answer: dict[str, np.ndarray]) -> Iterator[tuple[str, str]]:
    """The outputs of an answer that differ from the expected ones, and how."""
    for name in sorted(case.outputs.keys() | answer.keys()):
        expected, found = case.outputs.get(name), answer.get(name)
        if expected is None or found is None:
            yield name, "only the " + ("export" if expected is None else "model") + " has it"
        elif case.drawn and name.endswith(("_tokens", "attention")):
            continue  # its length is that of the sample
        elif (expected.dtype, expected.shape) != (found.dtype, found.shape):
            yield (
                name,
                f"expected {expected.dtype} {expected.shape}, found {found.dtype} {found.shape}",
            )
        elif case.drawn:
            continue
        elif expected.dtype == np.float32:
            if not np.allclose(expected, found, case.tolerance, case.tolerance, equal_nan=True):
                largest = np.nanmax(np.abs(expected - found))
                yield name, f"numbers differ by up to {largest:.3g}, allowed {case.tolerance:g}"
        elif not np.array_equal(expected, found) and not tf.config.list_physical_devices("GPU"):
            # A GPU rounds differently: of two equally likely hypotheses, the other may win.
            yield name, f"expected {shown(expected.tolist())}, found {shown(found.tolist())}"
