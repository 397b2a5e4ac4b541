"""BertGeneration encoder and decoder, as Keras 3 models.

Source: Rothe, Narayan, Severyn 2020, "Leveraging Pre-trained Checkpoints for Sequence Generation
Tasks". Where Hugging Face's classes differ from the TF Hub originals, the stacks do this:

- activation: whatever `config.hidden_act` says; "gelu" is exact, as in both.
- output bias: exists, as in Hugging Face; it is zero in the originals, and initially here.
- head: the word embeddings, as in both; the transform of Hugging Face's BERT and RoBERTa decoders
  and an output matrix of its own are there if `config.head_transform` and
  `config.tie_word_embeddings` ask for them.
- token types: type 0 is folded into the positions, which is exact; Hugging Face drops it.

With `norm_first` the blocks are GPT-2's instead of BERT's, as in the decoder of the paper's
BERT2GPT. With `source_positions` one stack is both encoder and decoder, as in the paper's GPT: it
reads the source and then the target, whose positions continue where those of the source end.

B batch, S source length, T target length, H hidden size, V vocabulary.
"""

import dataclasses
import os
from typing import Any, Self

import keras
import tensorflow as tf
from keras import ops

from bertgen_tf.config import HEAD_FIELDS, OWN_FIELDS, BertGenerationConfig
from bertgen_tf.network import sources, weights
from bertgen_tf.network.layers import (
    Embeddings,
    HeadTransform,
    TransformerBlock,
    final_norm,
    logits,
)
from bertgen_tf.network.masks import (
    causal_mask,
    own_beams,
    padding_mask,
    slots_mask,
    source_lengths,
)
from bertgen_tf.network.projections import Dense, initializer, quantized_weights, rebuilding
from bertgen_tf.network.quantization import dequantize_matrix, quantize_matrix, quantized_linear

SHARING = ("none", "word_embeddings", "all")
_NOT_ALONE = "A stack cannot be quantized alone. Call quantize of the EncoderDecoderModel."


class _Stack(weights.FiniteWeights, keras.Model):
    """What encoder and decoder have in common."""

    config: BertGenerationConfig

    def save_to_huggingface(
        self, folder: str | os.PathLike, max_shard_size: int | str = "1GB"
    ) -> None:
        """Writes what transformers loads; see `bertgen_tf.checkpoints.huggingface.save`."""
        sources.huggingface.save(self, folder, max_shard_size)

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        """Refuses: what the stacks share must stay the same on both sides."""
        raise ValueError(_NOT_ALONE)

    def set_quantization(self, mode: str | None) -> None:
        """Part of `EncoderDecoderModel.quantize` ("int8") and `dequantize` (None)."""
        for layer in self._flatten_layers():
            if isinstance(layer, Dense):
                layer.to_int8() if mode else layer.to_float()
        self.config = self.config.replace(quantization=mode)

    def get_config(self) -> dict[str, Any]:
        config = self.config.to_dict()
        for field in dataclasses.fields(self.config):
            # Older versions do not know them.
            later = field.name in (*OWN_FIELDS, *HEAD_FIELDS)
            if later and config[field.name] == field.default:
                del config[field.name]
        return {
            "name": self.name,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "trainable": self.trainable,
            "config": config,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None):
        config = dict(config)
        trainable = config.pop("trainable", True)
        model = cls(BertGenerationConfig.from_dict(config.pop("config")), **config)
        if not trainable:  # shared variables stay as the other side has them
            model.trainable = False
        return model


@keras.saving.register_keras_serializable("bertgen_tf", "BertGenerationEncoder")
class BertGenerationEncoder(_Stack):
    """BERT without pooler and heads: `(input_ids, attention_mask=None) -> [B, S, H]`.

    Args:
        config: sizes and activation.
    """

    def __init__(self, config: BertGenerationConfig, name: str = "encoder", **kwargs: Any):
        super().__init__(name=name, **kwargs)
        # What only a decoder reads is as in a decoder without it.
        self.config = config = config.replace(
            add_cross_attention=False, head_transform=None, tie_word_embeddings=True
        )
        self.embeddings = Embeddings(config, name="embeddings", dtype=self.dtype_policy)
        self.blocks = [
            TransformerBlock(config, name=f"layer_{i}", dtype=self.dtype_policy)
            for i in range(config.num_hidden_layers)
        ]
        self.final_norm = final_norm(config, self.dtype_policy)
        self.build()

    @classmethod
    def from_hub(
        cls,
        handle: str | os.PathLike,
        *,
        num_layers: int | list[int] | None = None,
        verify: bool = True,
    ) -> Self:
        """Takes up the weights of a TF Hub BERT module; see `bertgen_tf.hub.load_encoder`."""
        return sources.hub.load_encoder(
            handle, num_layers=num_layers, verify=verify, model_class=cls
        )

    @classmethod
    def from_huggingface(
        cls, folder: str | os.PathLike, *, num_layers: int | list[int] | None = None
    ) -> Self:
        """Reads a checkpoint; see `bertgen_tf.checkpoints.huggingface.load_encoder`."""
        return sources.huggingface.load_encoder(folder, num_layers=num_layers, model_class=cls)

    def build(self, input_shape: Any = None) -> None:
        self.embeddings.build()
        for block in self.blocks:
            block.build()
        if self.final_norm is not None:
            self.final_norm.build((None, None, self.config.hidden_size))

    def call(self, input_ids: Any, attention_mask: Any = None, training: bool | None = None) -> Any:
        """Encodes a batch.

        Args:
            input_ids: int32 [B, S].
            attention_mask: int32 [B, S], 1 on tokens and 0 on padding; None means no padding.

        Returns:
            [B, S, H] in the compute dtype of the dtype policy. For a decoder-only model, what its
            decoder reads instead: keys and values of all layers, [B, S, layers * 2 * H].
        """
        _check_length("input_ids", input_ids, self.config.max_source_positions)
        mask = None if attention_mask is None else padding_mask(attention_mask)
        if self.config.decoder_only:
            length = ops.shape(input_ids)[1]
            causal = causal_mask(length, length)
            mask = causal if mask is None else ops.logical_and(mask, causal)
        hidden = self.embeddings(input_ids, training=training)
        memory = []
        for block in self.blocks:
            hidden, pair, _ = block(hidden, mask, training=training)
            if self.config.decoder_only:
                memory += map(block.self_attention.join_heads, pair)
        if self.config.decoder_only:
            return ops.concatenate(memory, axis=-1)
        return hidden if self.final_norm is None else self.final_norm(hidden)


@keras.saving.register_keras_serializable("bertgen_tf", "BertGenerationDecoder")
class BertGenerationDecoder(_Stack):
    """Causal BERT with cross-attention and a language-model head.

    The head's matrix is that of the word embeddings, unless `config.tie_word_embeddings` is False;
    `config.head_transform` puts the transform of BERT's and RoBERTa's heads before it.

    Args:
        config: sizes and activation; with `add_cross_attention=False` it is a language model, which
            continues the encoder's text if there are `source_positions`.
        encoder: an encoder to share variables with.
        sharing: what is shared with `encoder`: "none", "word_embeddings" (the paper's BERT2BERT
            counts one matrix for encoder, decoder and softmax) or "all" (BERTSHARE: everything
            but cross-attention and the output bias).
    """

    def __init__(
        self,
        config: BertGenerationConfig,
        encoder: BertGenerationEncoder | None = None,
        sharing: str = "none",
        name: str = "decoder",
        **kwargs: Any,
    ):
        super().__init__(name=name, **kwargs)
        if sharing not in SHARING:
            raise ValueError(f"sharing must be one of {', '.join(SHARING)}, received {sharing!r}.")
        if (encoder is None) != (sharing == "none"):
            raise ValueError(
                f"sharing={sharing!r} needs an encoder to share with and 'none' takes none, "
                f"received encoder={encoder!r}."
            )
        if encoder is not None:
            _check_shareable(config, encoder.config, sharing)
            if self.dtype_policy != encoder.dtype_policy:
                raise ValueError(
                    "A decoder that shares must have the encoder's dtype policy, received "
                    f"{self.dtype_policy.name} and {encoder.dtype_policy.name}."
                )
        if config.decoder_only and sharing != "all":
            raise ValueError(
                f"source_positions={config.source_positions} makes encoder and decoder one stack, "
                f"which needs sharing='all', received {sharing!r}."
            )
        share_all = sharing == "all"
        self.config = config
        self.sharing = sharing
        if share_all:
            self.embeddings = encoder.embeddings
        else:
            self.embeddings = Embeddings(
                config,
                word_embeddings=encoder.embeddings.word_embeddings if encoder else None,
                name="embeddings",
                dtype=self.dtype_policy,
            )
        self.blocks = [
            TransformerBlock(
                config,
                shared=encoder.blocks[i] if share_all else None,
                name=f"layer_{i}",
                dtype=self.dtype_policy,
            )
            for i in range(config.num_hidden_layers)
        ]
        self.final_norm = encoder.final_norm if share_all else final_norm(config, self.dtype_policy)
        self.head_transform = None
        if config.head_transform is not None:
            self.head_transform = HeadTransform(
                config, name="head_transform", dtype=self.dtype_policy
            )
        self.build()

    @classmethod
    def from_hub(
        cls,
        handle: str | os.PathLike,
        *,
        cross_attention: str = "random",
        num_layers: int | list[int] | None = None,
        verify: bool = True,
    ) -> Self:
        """Takes up the weights of a TF Hub BERT module; see `bertgen_tf.hub.load_decoder`."""
        return sources.hub.load_decoder(
            handle,
            cross_attention=cross_attention,
            num_layers=num_layers,
            verify=verify,
            model_class=cls,
        )

    @classmethod
    def from_huggingface(
        cls,
        folder: str | os.PathLike,
        *,
        cross_attention: str | None = None,
        num_layers: int | list[int] | None = None,
    ) -> Self:
        """Reads a checkpoint; see `bertgen_tf.checkpoints.huggingface.load_decoder`."""
        return sources.huggingface.load_decoder(
            folder, cross_attention=cross_attention, num_layers=num_layers, model_class=cls
        )

    def set_quantization(self, mode: str | None) -> None:
        if mode == self.config.quantization:
            return
        tied, old = self.config.tie_word_embeddings, []
        if not (tied and mode):
            old = [self.output_kernel] if mode else [self.output_kernel, self.output_kernel_scale]
        matrix = self._output_matrix() if mode or tied else dequantize_matrix(*old)
        super().set_quantization(mode)
        for variable in old:
            self._untrack_variable(variable)
        self.output_kernel = self.output_kernel_scale = None
        if tied and not mode:
            return
        with rebuilding(self):
            self._build_output_kernel()
        kernel, *scales = quantize_matrix(matrix) if mode else (matrix,)
        self.output_kernel.assign(kernel)
        for scale in scales:
            self.output_kernel_scale.assign(scale)

    def build(self, input_shape: Any = None) -> None:
        if not self.embeddings.built:
            self.embeddings.build()
        for block in self.blocks:
            block.build()
        if self.final_norm is not None and not self.final_norm.built:
            self.final_norm.build((None, None, self.config.hidden_size))
        self.output_bias = self.add_weight(
            (self.config.vocab_size,), initializer="zeros", name="output_bias", autocast=False
        )
        if self.head_transform is not None:
            self.head_transform.build((None, None, self.config.hidden_size))
        if self.config.quantization is not None or not self.config.tie_word_embeddings:
            self._build_output_kernel()

    def _build_output_kernel(self) -> None:
        shape = (self.config.vocab_size, self.config.hidden_size)
        if self.config.quantization is None:
            self.output_kernel = self.add_weight(
                shape, initializer=initializer(self.config), name="output_kernel", autocast=False
            )
        else:
            # Besides the word embeddings that a tied one is rounded from, which are looked up in
            # float32.
            weights = quantized_weights(self, shape, "output_kernel")
            self.output_kernel, self.output_kernel_scale = weights

    def _output_matrix(self) -> Any:
        tied = self.config.tie_word_embeddings
        return self.embeddings.word_embeddings.embeddings if tied else self.output_kernel

    def call(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        cache: dict[str, list] | None = None,
        cache_index: Any = 0,
        return_attention_weights: bool = False,
        training: bool | None = None,
    ) -> Any:
        """The one forward pass, for training and for cached decoding.

        Args:
            input_ids: int32 [B, T]; with a cache, the T tokens from position `cache_index` on.
            attention_mask: int32 [B, T], 1 on tokens and 0 on padding; None means no padding. Not
                with a cache.
            encoder_hidden_states: the encoder's output; not read when a cache is given.
            encoder_attention_mask: int32 [B, S].
            cache: what `init_cache` made or the last call returned. B is its batch times its beams,
                the beams of an example adjacent.
            cache_index: int32 scalar, the position of the first token.
            return_attention_weights: also return the cross-attention weights.

        Returns:
            float32 logits [B, T, V]; with a cache `(logits, cache)`; with
            `return_attention_weights` one more item, float32 [B, layers, heads, T, S].
        """
        _check_length("input_ids", input_ids, self.config.max_target_positions)
        length = ops.shape(input_ids)[1]
        if cache is None:
            mask = causal_mask(length, length)
            memory = self._project(encoder_hidden_states)
        else:
            cache = {**cache, "beams": own_beams(cache["beams"], cache_index, length)}
            mask = slots_mask(cache["beams"], cache_index, length)
            memory = cache["cross"]
        if attention_mask is not None:
            mask = ops.logical_and(mask, padding_mask(attention_mask))
        # Not `memory_mask`, which Keras would fill in for an argument called `memory`.
        cross_mask = (
            None if encoder_attention_mask is None else padding_mask(encoder_attention_mask)
        )
        position = cache_index
        if self.config.decoder_only:
            position += source_lengths(memory[0][0], encoder_attention_mask, ops.shape(input_ids))
        hidden = self.embeddings(input_ids, first_position=position, training=training)
        new_cache, weights = [], []
        for i, block in enumerate(self.blocks):
            hidden, pair, looked_at = block(
                hidden,
                mask,
                memory=memory[i],
                cross_mask=cross_mask,
                cache=None if cache is None else cache["self"][i],
                index=cache_index,
                training=training,
            )
            new_cache.append(pair)
            weights.append(looked_at)
        results = [self._logits(hidden)]
        if cache is not None:
            results.append({**cache, "self": new_cache})
        if return_attention_weights:
            results.append(ops.stack(weights, axis=1))
        return results[0] if len(results) == 1 else tuple(results)

    def init_cache(self, batch: Any, max_length: int, encoder_hidden_states: Any = None) -> dict:
        """An empty cache of `max_length` positions for `batch` examples of one row each.

        Returns:
            {"self": one pair of buffers [batch, A, max_length, D] per layer, see
                 `layers.SelfAttention`,
             "beams": int32 [batch, 1, max_length], see `repeat_cache`,
             "cross": one pair [batch, A, S, D] per layer, projected from `encoder_hidden_states`}.
        """
        heads = self.config.num_attention_heads
        shape = (batch, heads, max_length, self.config.hidden_size // heads)
        return {
            "self": [
                (ops.zeros(shape, self.compute_dtype), ops.zeros(shape, self.compute_dtype))
                for _ in self.blocks
            ],
            "beams": ops.zeros((batch, 1, max_length), "int32"),
            "cross": self._project(encoder_hidden_states),
        }

    @staticmethod
    def repeat_cache(cache: dict[str, Any], num_beams: int) -> dict[str, Any]:
        """Turns a cache of one row per example into one of `num_beams` (K) adjacent rows.

        Its self-attention buffers have K slots per position. "beams" [batch, K, max_length] says
        which beam of the example wrote each position of a beam's past: nothing else has to move
        when beams change places.
        """
        if num_beams == 1:
            return cache
        return {
            **cache,
            "self": [
                tuple(ops.repeat(tensor, num_beams, axis=2) for tensor in pair)
                for pair in cache["self"]
            ],
            "beams": ops.repeat(cache["beams"], num_beams, axis=1),
        }

    def _logits(self, hidden: Any) -> Any:
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        if self.head_transform is not None:
            hidden = self.head_transform(hidden)
        bias = tf.convert_to_tensor(self.output_bias)
        if self.config.quantization is None:
            return logits(hidden, self._output_matrix(), bias)
        scale = tf.convert_to_tensor(self.output_kernel_scale)
        return quantized_linear(hidden, self.output_kernel, scale, bias)

    def kernels_for_loop(self) -> list[Any]:
        """The variables of matrices for `bertgen_tf.network.tracing.kernels_for_loop`.

        Not float32 ones, but for the largest: turning them round takes memory and time.
        """
        if self.config.quantization is None:
            return [self._output_matrix()]
        layers = self._flatten_layers(include_self=False)
        return [layer.kernel for layer in layers if isinstance(layer, Dense)] + [self.output_kernel]

    def _project(self, encoder_hidden_states: Any) -> list:
        reads = self.config.add_cross_attention or self.config.decoder_only
        if (encoder_hidden_states is not None) != reads:
            needed = "needs" if reads else "takes no"
            raise ValueError(
                f"A decoder with add_cross_attention={self.config.add_cross_attention} {needed} "
                f"encoder_hidden_states, received {type(encoder_hidden_states).__name__}."
            )
        if encoder_hidden_states is None:
            return [None] * len(self.blocks)
        if self.config.decoder_only:
            parts = ops.split(encoder_hidden_states, 2 * len(self.blocks), axis=-1)
            split = self.blocks[0].self_attention.split_heads
            return [
                (split(keys), split(values))
                for keys, values in zip(parts[::2], parts[1::2], strict=True)
            ]
        return [block.cross_attention.project(encoder_hidden_states) for block in self.blocks]


def _check_length(argument: str, ids: Any, longest: int) -> None:
    # Out of range, XLA silently reads the last position again.
    length = ids.shape[1]
    if length is not None and length > longest:
        raise ValueError(
            f"{argument} must not be longer than max_position_embeddings ({longest}), received "
            f"{length} tokens. Truncate the text."
        )


def _check_shareable(
    config: BertGenerationConfig, encoder: BertGenerationConfig, sharing: str
) -> None:
    names = ["vocab_size", "hidden_size"]
    if sharing == "all":
        names += [
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "hidden_act",
            "max_position_embeddings",
            "layer_norm_eps",
            *(field for field in OWN_FIELDS if field not in HEAD_FIELDS),
        ]
    differing = [
        f"{name} ({getattr(encoder, name)} and {getattr(config, name)})"
        for name in names
        if getattr(encoder, name) != getattr(config, name)
    ]
    if differing:
        raise ValueError(
            f"sharing={sharing!r} needs an encoder and a decoder that agree, but they differ in "
            f"{', '.join(differing)}."
        )
