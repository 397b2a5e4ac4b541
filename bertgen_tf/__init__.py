"""BertGeneration for TensorFlow and Keras 3: BERT checkpoints as text generators.

Start from a checkpoint, train, generate, export:

    import bertgen_tf as bg

    model = bg.EncoderDecoderModel.from_hub(encoder="path/or/url/of/a/tf_hub_bert_module")
    model.compile()
    model.fit(["a source", "another"], ["its target", "and its"], epochs=3)
    model.generate("a source")
    model.save_to_preset("my_model")
    bg.export_saved_model(model, "saved_models/my_model/1")

| what | where |
| --- | --- |
| models | `EncoderDecoderModel`, `BertGenerationEncoder`, `BertGenerationDecoder` |
| starting points | `from_hub`, `from_huggingface`, `from_preset` of these; `warm_start`, `hub` |
| an export as a model | `EncoderDecoderModel.from_export` |
| settings | `BertGenerationConfig`, `GenerationConfig` |
| text | `BertTokenizer`, `BertGenerationTokenizer`, `Seq2SeqPreprocessor`, `trim_vocabulary` |
| training | `default_optimizer`, `paper_optimizer`, `default_loss`, `bucketed_dataset` |
| choice of layers to train | `freeze`, `unfreeze`, `GradualUnfreezing` |
| resumable training | `bertgen_tf.finetuning` |
| scores | `bertgen_tf.metrics` |
| serving | `export_saved_model`; `bertgen_tf.serving` |

The command line is `bertgen-tf`, or `python -m bertgen_tf`.
"""

import os as _os
import sys as _sys

__version__ = "0.1.0"


def _is_command() -> bool:
    """Whether this process runs `bertgen-tf`, which reads its flags before it loads TensorFlow.

    Everywhere else `import bertgen_tf` loads everything, and so registers the classes that Keras
    looks up by name in saved models.
    """
    program = _os.path.basename((_sys.argv or [""])[0])
    # Python puts "-m" there while it imports the package of the module that it will run.
    places = [place for place, word in enumerate(_sys.orig_argv) if word == "-m"]
    as_module = program == "-m" and _sys.orig_argv[places[0] + 1 :][:1] == ["bertgen_tf"]
    return as_module or program in ("bertgen-tf", "bertgen-tf.exe")


if not _is_command():
    import keras as _keras

    if _keras.backend.backend() != "tensorflow":
        raise ImportError(
            "bertgen_tf needs Keras's TensorFlow backend, but Keras uses "
            f"{_keras.backend.backend()!r}. Set KERAS_BACKEND=tensorflow before Keras is imported."
        )

    from bertgen_tf.checkpoints import hub
    from bertgen_tf.checkpoints.recipes import (
        RECIPES,
        WarmStartReport,
        warm_start,
        warm_start_report,
    )
    from bertgen_tf.config import BertGenerationConfig, GenerationConfig
    from bertgen_tf.export.saved_model import ExportError, export_saved_model
    from bertgen_tf.finetuning.callbacks import GenerateCallback
    from bertgen_tf.generation.generator import GenerateOutput
    from bertgen_tf.models.encoder_decoder import EncoderDecoderModel
    from bertgen_tf.models.vocabulary import trim_vocabulary
    from bertgen_tf.network.stacks import BertGenerationDecoder, BertGenerationEncoder
    from bertgen_tf.tokenizers import BertGenerationTokenizer, BertTokenizer
    from bertgen_tf.tokenizers.preprocessing import Seq2SeqPreprocessor
    from bertgen_tf.training.batches import bucketed_dataset
    from bertgen_tf.training.freezing import GradualUnfreezing, freeze, unfreeze
    from bertgen_tf.training.losses import default_loss
    from bertgen_tf.training.optimizers import (
        averaged_weights,
        default_optimizer,
        paper_optimizer,
    )

    # The names of these classes in older Hugging Face documentation.
    BertForSeqGenerationConfig = BertGenerationConfig
    BertForSeqGenerationTokenizer = BertGenerationTokenizer
    BertForSeqGenerationEncoder = BertGenerationEncoder
    BertForSeqGenerationEncoderModel = BertGenerationEncoder
    BertForSeqGenerationDecoder = BertGenerationDecoder

__all__ = [
    "BertForSeqGenerationConfig",
    "BertForSeqGenerationDecoder",
    "BertForSeqGenerationEncoder",
    "BertForSeqGenerationEncoderModel",
    "BertForSeqGenerationTokenizer",
    "BertGenerationConfig",
    "BertGenerationDecoder",
    "BertGenerationEncoder",
    "BertGenerationTokenizer",
    "BertTokenizer",
    "EncoderDecoderModel",
    "ExportError",
    "GenerateCallback",
    "GenerateOutput",
    "GenerationConfig",
    "GradualUnfreezing",
    "RECIPES",
    "Seq2SeqPreprocessor",
    "WarmStartReport",
    "averaged_weights",
    "bucketed_dataset",
    "default_loss",
    "default_optimizer",
    "export_saved_model",
    "freeze",
    "hub",
    "paper_optimizer",
    "trim_vocabulary",
    "unfreeze",
    "warm_start",
    "warm_start_report",
]


def __dir__() -> list[str]:
    return sorted([*__all__, "finetuning", "metrics", "__doc__", "__version__"])
