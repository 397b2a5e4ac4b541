"""`quantize` and `dequantize` of `EncoderDecoderModel`."""

from typing import Any

from bertgen_tf.network.quantization import check_quantization
from bertgen_tf.training import lora


def quantize(model: Any, mode: str, config: Any = None) -> None:
    """Makes the matrices int8, in place, for generation in a quarter of their memory.

    That is all matrices used in products, each with a scale per output. The inputs of a product
    are quantized as well, with a scale per row, at run time. Embeddings, layer normalisation
    and softmax stay float32, so the output matrix is no longer tied to the embeddings. Such a
    model can generate, be saved as a preset and be exported; to be trained, or saved in another
    format, it needs `dequantize`. A model that is already int8 is unchanged.

    Args:
        mode: "int8".
        config: Keras passes one; quantizers of its own are not supported.

    Raises:
        ValueError: another mode, a config with quantizers, or adapters that are not merged.
    """
    check_quantization(mode, config)
    lora.check_merged(model, "an int8 model")
    if None not in (model.encoder.config.quantization, model.decoder.config.quantization):
        return
    model.encoder.set_quantization(mode)
    model.decoder.set_quantization(mode)
    model.forget_compiled()


def dequantize(model: Any) -> None:
    """Makes the matrices of an int8 model float32, in place, so that it can be trained.

    Each becomes its integers times their scales, so it stays as far from the matrix that it was
    rounded from, at most half a scale, and `quantize` gives the same integers again. The
    softmax reads the word embeddings again, which were never rounded, and the inputs of
    products are no longer rounded either: outputs are close to those of int8, not the same. A
    model that is not int8 is unchanged. Compile afterwards.
    """
    if not model.is_quantized:
        return
    model.encoder.set_quantization(None)
    model.decoder.set_quantization(None)
    model.forget_compiled()
