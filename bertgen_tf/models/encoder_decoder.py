"""The sequence-to-sequence model: encoder, decoder and tokenizer in one Keras model.

B batch, T target length, V vocabulary.
"""

import inspect
import os
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Self

import keras

from bertgen_tf import tokenizers
from bertgen_tf.config import GenerationConfig
from bertgen_tf.generation import generator, streaming
from bertgen_tf.generation.compiled import KeptFunctions
from bertgen_tf.models import int8
from bertgen_tf.models.pair_checks import (
    check_pair,
    check_preprocessor,
    check_tokenizers,
    length_or_default,
)
from bertgen_tf.network import sources
from bertgen_tf.network.stacks import BertGenerationDecoder, BertGenerationEncoder
from bertgen_tf.tokenizers import BertGenerationTokenizer, BertTokenizer
from bertgen_tf.tokenizers.preprocessing import Seq2SeqPreprocessor
from bertgen_tf.training import batches, freezing, lora, losses, optimizers

_NO_SIGNATURE = (
    "tf.saved_model.save writes an EncoderDecoderModel without a signature that generates: call "
    "bertgen_tf.export_saved_model for one."
)
_NEEDED = {"input_ids", "decoder_input_ids"}


@keras.saving.register_keras_serializable("bertgen_tf", "EncoderDecoderModel")
class EncoderDecoderModel(keras.Model):
    """Encoder, decoder and tokenizer: `fit` trains, `generate` produces text.

    Called on `dict(input_ids, attention_mask, decoder_input_ids, decoder_attention_mask)` (int32;
    the masks may be left out) it returns float32 logits [B, T, V].

    Args:
        encoder, decoder: of the same hidden size; the decoder with cross-attention, unless both
            have `source_positions`: a decoder-only model.
        tokenizer: turns text into ids and back; without one the model takes and returns ids only.
        decoder_tokenizer: that of targets, if it differs from that of sources.
        max_source_length, max_target_length: the most tokens of a text that `fit` and `generate`
            read; by default 128, or what the positions allow if that is less.
        add_eos, add_bos, mask_first: extra special tokens around source and target, see
            `Seq2SeqPreprocessor`. Off for the originals; models warm-started from BERT need them.
        hidden_token_ids, prose: what `generate` leaves out of text, and how it joins word pieces;
            see `Seq2SeqPreprocessor`.
        generation_config: the settings of `generate` if a call passes no others.
        source_checkpoint: where the weights came from before training, for the record: a handle
            for each of "encoder" and "decoder", or for "model"; "config" if the checkpoint only
            provided sizes and vocabulary.
    """

    def __init__(
        self,
        encoder: BertGenerationEncoder,
        decoder: BertGenerationDecoder,
        tokenizer: BertTokenizer | BertGenerationTokenizer | None = None,
        *,
        decoder_tokenizer: BertTokenizer | BertGenerationTokenizer | None = None,
        max_source_length: int | None = None,
        max_target_length: int | None = None,
        add_eos: bool = False,
        add_bos: bool = False,
        mask_first: bool = False,
        hidden_token_ids: Sequence[int] = (),
        prose: bool = True,
        generation_config: GenerationConfig | None = None,
        source_checkpoint: dict[str, str] | None = None,
        name: str = "encoder_decoder",
        **kwargs: Any,
    ):
        super().__init__(name=name, **kwargs)
        check_pair(encoder.config, decoder.config)
        self.encoder = encoder
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.decoder_tokenizer = decoder_tokenizer
        self.source_checkpoint = dict(source_checkpoint or {})
        self.preprocessor = None
        if decoder_tokenizer is not None and tokenizer is None:
            raise ValueError("decoder_tokenizer needs tokenizer=, that of sources, received None.")
        if tokenizer is not None:
            check_tokenizers(tokenizer, decoder_tokenizer, encoder.config, decoder.config)
            self.preprocessor = Seq2SeqPreprocessor(
                tokenizer,
                length_or_default(max_source_length, encoder.config.max_source_positions),
                length_or_default(max_target_length, decoder.config.max_target_positions),
                add_eos=add_eos,
                add_bos=add_bos,
                mask_first=mask_first,
                hidden_token_ids=hidden_token_ids,
                prose=prose,
                decoder_tokenizer=decoder_tokenizer,
            )
            check_preprocessor(self.preprocessor, encoder.config, decoder.config)
        self.generation_config = generation_config or GenerationConfig(
            max_new_tokens=min(64, decoder.config.max_target_positions)
        )
        self.lora: dict[str, Any] | None = None
        self.kept_functions = KeptFunctions()
        self.build()

    # Defined in modules of their own, with this model as their first argument.
    generate = generator.generate
    iterate = generator.iterate
    stream = streaming.stream
    quantize = int8.quantize
    dequantize = int8.dequantize

    @classmethod
    def from_hub(
        cls,
        handle: str | os.PathLike | None = None,
        *,
        encoder: str | os.PathLike | None = None,
        decoder: str | os.PathLike | None = None,
        share: bool = False,
        cross_attention: str = "random",
        num_layers: int | list[int] | None = None,
        verify: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Reads one of the originals, or warm-starts from BERT modules.

            from_hub("https://tfhub.dev/google/bertseq2seq/roberta24_bbc/1")
            from_hub(encoder="https://tfhub.dev/google/bert_uncased_L-12_H-768_A-12/1")

        Args:
            handle: an encoder-decoder module, `google/bertseq2seq/*` or similar, which comes with
                tokenizer and generation settings; see `bertgen_tf.hub.load_original` for what
                `verify` does and for the further keywords.
            encoder, decoder, share, cross_attention, num_layers: BERT modules to start from; see
                `bertgen_tf.hub.load_encoder_decoder` for these and the further keywords.

        Raises:
            ValueError: not exactly one of `handle` and `encoder`, or an option of the other.
        """
        return sources.hub.load(
            handle,
            encoder=encoder,
            decoder=decoder,
            share=share,
            cross_attention=cross_attention,
            num_layers=num_layers,
            verify=verify,
            model_class=cls,
            **kwargs,
        )

    @classmethod
    def from_huggingface(
        cls,
        folder: str | os.PathLike | None = None,
        *,
        encoder: str | os.PathLike | None = None,
        decoder: str | os.PathLike | None = None,
        share: bool | None = None,
        cross_attention: str | None = None,
        num_layers: int | list[int] | None = None,
        tokenizer: BertTokenizer | BertGenerationTokenizer | None = None,
        **kwargs: Any,
    ) -> Self:
        """Reads a Hugging Face checkpoint; see `checkpoints.huggingface.load_encoder_decoder`."""
        return sources.huggingface.load_encoder_decoder(
            folder,
            encoder=encoder,
            decoder=decoder,
            share=share,
            cross_attention=cross_attention,
            num_layers=num_layers,
            tokenizer=tokenizer,
            model_class=cls,
            **kwargs,
        )

    def save_to_huggingface(
        self, folder: str | os.PathLike, max_shard_size: int | str = "1GB"
    ) -> None:
        """Writes a checkpoint for transformers; see `bertgen_tf.checkpoints.huggingface.save`."""
        sources.huggingface.save(self, folder, max_shard_size)

    @classmethod
    def from_preset(cls, folder: str | os.PathLike) -> Self:
        """Reads what `save_to_preset` wrote; see `bertgen_tf.checkpoints.presets`."""
        return sources.presets.load(folder, model_class=cls)

    def save_to_preset(self, folder: str | os.PathLike) -> None:
        """Writes config, weights, tokenizer and settings; see `bertgen_tf.checkpoints.presets`."""
        sources.presets.save(self, folder)

    def export(
        self,
        filepath: str | os.PathLike,
        format: str = "tf_saved_model",
        verbose: Any = None,
        input_signature: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Keras's `export`: writes what `bertgen_tf.export_saved_model` does, text in and out.

        Args:
            filepath: `NAME/VERSION`, see `export_saved_model`, which also takes the keywords.
            verbose: True shows each step.
            format, input_signature: Keras's. Another format, or a signature, exports what
                calling the model gives: logits of ids.
        """
        if format != "tf_saved_model" or input_signature is not None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", _NO_SIGNATURE)
                return super().export(filepath, format, verbose, input_signature, **kwargs)
        verbose = int(bool(verbose))
        return sources.saved_model.export_saved_model(self, filepath, verbose=verbose, **kwargs)

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> Any:
        if save_type == "savedmodel":  # ours are written without tracking the model
            warnings.warn(_NO_SIGNATURE, stacklevel=2)
        return super()._trackable_children(save_type, **kwargs)

    @classmethod
    def from_export(cls, folder: str | os.PathLike) -> Self:
        """Reads an export, NAME/VERSION, as a model; see `bertgen_tf.checkpoints.exports`."""
        return sources.exports.load(folder, model_class=cls)

    def forget_compiled(self) -> None:
        """For replaced variables: compiled functions and the optimizer hold on to the old ones."""
        self.kept_functions = KeptFunctions()
        self.train_function = self.test_function = self.predict_function = None
        if self.compiled:
            del self.optimizer
            self._compile_config, self.compiled = None, False

    def enable_lora(
        self,
        rank: int,
        *,
        alpha: float | None = None,
        targets: Sequence[str] = ("query", "value"),
        train_new_weights: bool = True,
    ) -> None:
        """Freezes the model and adds small matrices beside its projections; see `training.lora`.

        Presets and `.keras` files keep them unmerged. Compile afterwards.

        Args:
            rank: of the matrices, typically 4 to 64.
            alpha: scale; the adapters' product is multiplied by `alpha / rank`. Default: `rank`, no
                scaling.
            targets: projections by name: "query", "key", "value", "output_dense", "intermediate",
                or the end of a path, such as "cross_attention/query".
            train_new_weights: also train, in full, what no checkpoint provided, see
                `freezing.new_variables`. False for a model that is fine-tuned already.

        Raises:
            ValueError: a value is out of range, a target matches nothing, or the model is int8
                or has adapters already.
        """
        lora.enable(self, rank, alpha, targets, train_new_weights)

    def merge_lora(self) -> None:
        """Merges the adapters into the matrices: an equivalent model. Compile afterwards."""
        lora.merge(self)

    def save_adapter(self, path: str | os.PathLike) -> None:
        """Writes what LoRA trained to one safetensors file; see `bertgen_tf.training.lora`.

        Raises:
            OSError: it cannot be written; a file that was there is unchanged.
            ValueError: the model has no adapters.
        """
        lora.save(self, path)

    def load_adapter(self, path: str | os.PathLike) -> None:
        """Reads what `save_adapter` wrote, with its settings; the base model must be the same.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not an adapter, or not one for this model; nothing was changed.
        """
        lora.load(self, path)

    def build(self, input_shape: Any = None) -> None:
        self.built = True  # encoder and decoder build themselves

    def call(self, inputs: dict[str, Any], training: bool | None = None) -> Any:
        if not isinstance(inputs, Mapping) or not _NEEDED <= set(inputs):
            keys = type(inputs).__name__
            if isinstance(inputs, Mapping):
                keys = f"the keys {reprlib.repr(list(inputs))}"
            raise ValueError(
                "inputs must be dict(input_ids, decoder_input_ids) with attention_mask and "
                f"decoder_attention_mask where there is padding, received {keys}: fit takes pairs "
                "of texts, and generate texts."
            )
        memory = self.encoder(inputs["input_ids"], inputs.get("attention_mask"), training=training)
        return self.decoder(
            inputs["decoder_input_ids"],
            inputs.get("decoder_attention_mask"),
            encoder_hidden_states=memory,
            encoder_attention_mask=inputs.get("attention_mask"),
            training=training,
        )

    @property
    def is_quantized(self) -> bool:
        """Whether a stack's matrices are int8."""
        configs = (self.encoder.config, self.decoder.config)
        return any(config.quantization is not None for config in configs)

    def compile(
        self,
        optimizer: Any = "auto",
        loss: Any = "auto",
        *,
        weighted_metrics: Any = "auto",
        **kwargs: Any,
    ) -> None:
        """Keras's `compile`, with defaults for fine-tuning: see `bertgen_tf.training.optimizers`.

        Args:
            optimizer: by default the AdamW of `optimizers.default_optimizer()`.
            loss: by default cross-entropy per real target token.
            weighted_metrics: by default the share of target tokens predicted correctly.
            **kwargs: among them `jit_compile`, "auto" by default: XLA if there is an accelerator.
                On a CPU alone Keras trains without it, which is faster there.
        """
        if isinstance(optimizer, optimizers.BertAdamW) and optimizer.needs_new_weights:
            optimizer.new_weights = tuple(v.path for v in freezing.new_variables(self))
        super().compile(
            optimizer=optimizers.default_optimizer() if optimizer == "auto" else optimizer,
            loss=losses.default_loss() if loss == "auto" else loss,
            weighted_metrics=(
                losses.default_metrics() if weighted_metrics == "auto" else weighted_metrics
            ),
            **kwargs,
        )

    def get_compile_config(self) -> dict[str, Any]:
        config = super().get_compile_config()
        if config and self.optimizer.built:
            config["frozen_slots"] = freezing.frozen_slots(self)
        return config

    def compile_from_config(self, config: dict[str, Any]) -> None:
        # Keras leaves this to models that override `compile`.
        config = keras.saving.deserialize_keras_object(config)
        frozen = config.pop("frozen_slots", ())  # older versions have none
        self.compile(**config)
        self.optimizer.build([v for v in self.variables if v.trainable or v.path in frozen])

    def fit(
        self, x: Any = None, y: Any = None, batch_size: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Keras's `fit`, which also takes text; a tuple holds columns, a list rows.

        Args:
            x: sources, with `y` the targets: lists, arrays, columns of a table or tensors of
                strings. Or without `y`: a tuple (sources, targets), or (sources, targets,
                sample_weight); a list of pairs (source, target); a DataFrame of two columns; a
                `tf.data.Dataset` of (source, target) or (source, target, weight), batched or not.
                Or anything preprocessed that Keras takes.
            batch_size: for text that is not batched yet; 32 by default.
            **kwargs: Keras's. `validation_data` is a tuple (sources, targets) or takes the forms of
                x; `sample_weight` is a number for each pair, the weight of its tokens in loss and
                metrics; `shuffle` and `validation_split` mean for lists of text what they mean for
                arrays.

        Raises:
            TypeError, ValueError: some of it is text, but not all of it is.
        """
        call = inspect.signature(super().fit).bind(x, y, batch_size, *args, **kwargs)
        call.arguments.update(batches.fit_arguments(self.preprocessor, call.arguments))
        return super().fit(*call.args, **call.kwargs)

    def evaluate(
        self, x: Any = None, y: Any = None, batch_size: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Keras's `evaluate`, which also takes text; see `fit`."""
        call = inspect.signature(super().evaluate).bind(x, y, batch_size, *args, **kwargs)
        call.arguments.update(batches.evaluate_arguments(self.preprocessor, call.arguments))
        return super().evaluate(*call.args, **call.kwargs)

    def train_on_batch(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        class_weight: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Keras's `train_on_batch`, which also takes text; see `fit`."""
        data = batches.batch_arguments(self.preprocessor, x, y, sample_weight, class_weight)
        return super().train_on_batch(*data, class_weight=class_weight, **kwargs)

    def test_on_batch(
        self, x: Any, y: Any = None, sample_weight: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Keras's `test_on_batch`, which also takes text; see `fit`."""
        data = batches.batch_arguments(self.preprocessor, x, y, sample_weight)
        return super().test_on_batch(*data, *args, **kwargs)

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Keras's `predict`: logits of ids. `generate` answers text."""
        _refuse_text(x, "predict")
        return super().predict(x, *args, **kwargs)

    def predict_on_batch(self, x: Any) -> Any:
        """Keras's `predict_on_batch`: logits of ids. `generate` answers text."""
        _refuse_text(x, "predict_on_batch")
        return super().predict_on_batch(x)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        loss = super().compute_loss(x, y, y_pred, sample_weight, training=training)
        return losses.share_of_replica(loss, self.loss, sample_weight)

    def make_train_function(self, force: bool = False) -> Any:
        if self.is_quantized:
            raise ValueError(
                "A quantized model cannot be trained: its matrices are int8. Train the float32 "
                "model it came from, or call dequantize() first; quantize afterwards."
            )
        return super().make_train_function(force)

    def get_config(self) -> dict[str, Any]:
        config = {
            "name": self.name,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "encoder": self.encoder.get_config(),
            "decoder": self.decoder.get_config(),
            "sharing": self.decoder.sharing,
            "tokenizer": None,
            "generation_config": self.generation_config.to_dict(),
        }
        if self.tokenizer is not None:
            config["tokenizer"] = tokenizers.serialize(self.tokenizer)
            if self.decoder_tokenizer is not None:  # older versions do not know it
                config["decoder_tokenizer"] = tokenizers.serialize(self.decoder_tokenizer)
            config.update(self.preprocessor.get_config())
        # Only if they are set: older versions do not know them.
        if self.source_checkpoint:
            config["source_checkpoint"] = dict(self.source_checkpoint)
        if frozen := freezing.frozen_layers(self):
            config["frozen_layers"] = frozen
        if self.lora is not None:
            config["lora"] = {**self.lora, "targets": list(self.lora["targets"])}
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None):
        config = dict(config)
        encoder = BertGenerationEncoder.from_config(config.pop("encoder"))
        sharing = config.pop("sharing")
        decoder_config = {**config.pop("decoder"), "sharing": sharing}
        if sharing != "none":
            decoder_config["encoder"] = encoder
        decoder = BertGenerationDecoder.from_config(decoder_config)
        for field in ("tokenizer", "decoder_tokenizer"):
            if config.get(field) is not None:
                config[field] = tokenizers.deserialize(config[field])
        generation_config = GenerationConfig.from_dict(config.pop("generation_config"))
        frozen, adapters = config.pop("frozen_layers", ()), config.pop("lora", None)
        model = cls(encoder, decoder, generation_config=generation_config, **config)
        freezing.set_frozen_layers(model, frozen)
        if adapters:
            model.enable_lora(**adapters)
        return model


def _refuse_text(x: Any, name: str) -> None:
    if batches.holds_text(x):
        raise TypeError(
            f"x must be dict(input_ids, decoder_input_ids, ...) for {name}, which gives logits, "
            "received text: call generate(texts) for answers."
        )
