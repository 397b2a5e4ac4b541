"""`bertgen-tf finetune`."""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from bertgen_tf import finetuning
from bertgen_tf.checkpoints import presets
from bertgen_tf.checkpoints.handles import HUGGINGFACE, family_of
from bertgen_tf.checkpoints.recipes import warm_start
from bertgen_tf.checks import Damaged, first_line
from bertgen_tf.cli.flags.common import scoring_options
from bertgen_tf.cli.flags.errors import (
    PROGRAM,
    UserError,
    complain,
    flags,
    in_flags,
    note,
    user_errors,
)
from bertgen_tf.cli.flags.finetune import COLUMNS, SETTINGS, normalizes_itself
from bertgen_tf.data import data_presets, folders, resumable, text_files
from bertgen_tf.finetuning import callbacks, diagnosis
from bertgen_tf.finetuning.data import TrainingData
from bertgen_tf.finetuning.state import (
    ADAPTER_FILE,
    BEST_FILE,
    SAMPLES_FOLDER,
    TENSORBOARD_FOLDER,
    OtherModel,
    RunFolder,
    digest_weights,
)
from bertgen_tf.models.encoder_decoder import EncoderDecoderModel
from bertgen_tf.models.variants import with_config, with_dtype
from bertgen_tf.models.vocabulary import trim_vocabulary
from bertgen_tf.training import freezing
from bertgen_tf.training.losses import default_loss
from bertgen_tf.training.optimizers import default_optimizer, paper_optimizer

START = "model to start from"

Pairs = list[tuple[str, str]]


def run(arguments: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        OSError, UserError: what the user can fix.
    """
    # First, what would otherwise fail after hours of training.
    folder = RunFolder(arguments.output)
    folders.sweep(arguments.output)
    with user_errors():
        if arguments.preset:
            presets.read_config(arguments.preset)
        if arguments.normalize_with and not normalizes_itself(arguments):
            presets.preprocessor_files(arguments.normalize_with)
    # Before TensorFlow does anything: workers meet here.
    replicas = finetuning.Replicas(_make_strategy(arguments))
    with _errors(replicas):
        _finetune(arguments, folder, replicas)


def _finetune(
    arguments: argparse.Namespace, folder: RunFolder, replicas: finetuning.Replicas
) -> None:
    if arguments.batch_size % replicas.count:
        raise UserError(
            f"--batch-size must be a multiple of the {replicas.count} devices, received "
            f"{arguments.batch_size}"
        )
    if replicas.is_chief:
        presets.check_writable(arguments.output)
        with user_errors():
            folder.check(arguments.resume, arguments.overwrite)
    with user_errors():
        training, validation = _read(arguments, note if replicas.is_chief else None)
    settings = _settings(arguments, replicas.count, training, validation)
    if arguments.resume and folder.is_complete() and presets.is_preset(folder.output):
        with user_errors():
            folder.check_same(settings, but=START)
        complain(f"{arguments.output} is complete")
        return
    with replicas.strategy.scope():
        model, saved_config = _make_model(arguments, training + validation)
    settings[START] = digest_weights(model)
    # The chief's word counts: it may have begun before another worker checks.
    begins = replicas.is_chief and arguments.resume and folder.is_begun()
    begun = bool(replicas.add([int(begins)])[0])
    if begun:
        with user_errors():
            folder.check_same(settings)
    elif replicas.is_chief and arguments.resume:
        complain(f"{folder.path} holds no training to continue: starting with the first step")
    run = _Run(arguments, replicas, folder, model, begun, training, validation)
    with folder.lock() if replicas.is_chief else contextlib.nullcontext():
        if replicas.is_chief and not begun:
            folder.begin(settings)
        replicas.add([0])  # the folder exists for all
        try:
            run.train()
            if replicas.is_chief:
                run.save(saved_config)
        except OSError as error:  # a full disk, say
            raise UserError(
                f"{error.filename or 'error'}: {error.strerror or error}; {folder.path} keeps what "
                "was saved before: the same command with --resume continues"
            ) from error
        if replicas.is_chief:
            folder.end()
            run.judge()
        replicas.add([0])  # none leaves before the model is saved


def _make_strategy(arguments: argparse.Namespace) -> tf.distribute.Strategy:
    try:
        cluster = json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster")
    except (ValueError, AttributeError) as error:
        raise UserError(f"TF_CONFIG must be a JSON object, but is not one: {error}") from error
    with user_errors():
        try:
            strategy = finetuning.make_strategy(arguments.distribute, bool(cluster))
        except (TypeError, tf.errors.OpError) as error:
            if not cluster:
                raise
            raise UserError(
                f"TF_CONFIG must name workers that can be reached: {first_line(error)}"
            ) from error
    if arguments.deterministic:
        tf.config.experimental.enable_op_determinism()
    return strategy


def _read(
    arguments: argparse.Namespace, complain: Callable[[str], None] | None
) -> tuple[Pairs, Pairs]:
    """The pairs to train on and to validate on, as they are in the files or the data set."""
    columns = {name: getattr(arguments, name) for name in COLUMNS}
    read_pairs = functools.partial(text_files.read_pairs, complain=complain, **columns)
    validation = read_pairs(arguments.validation) if arguments.validation else []
    if arguments.data is None:
        return read_pairs(arguments.train), validation

    def read(split: str) -> Pairs:
        folder, reverse = arguments.data_folder, arguments.reverse
        pairs = data_presets.read(
            arguments.data, split, folder, reverse=reverse, verbose=int(sys.stderr.isatty())
        )
        pairs = list(pairs)
        if not pairs:
            raise UserError(f"--data {arguments.data} should hold pairs to {split}, but has none")
        return pairs

    return read("train"), validation or read("validation")


def _settings(
    arguments: argparse.Namespace, replicas: int, training: Pairs, validation: Pairs
) -> dict[str, Any]:
    """What determines the result, by names that the user knows."""
    settings: dict[str, Any] = {"number of devices": replicas}
    for name, pairs in (("training data", training), ("validation data", validation)):
        # Lengths in front: without them texts that contain tabs would be ambiguous.
        texts = (f"{len(s)},{len(t)}\n{s}{t}".encode() for s, t in pairs)
        digest = hashlib.sha256()
        for text in texts:
            digest.update(text)
        settings[name] = digest.hexdigest()
    settings |= {flags([name]): getattr(arguments, name) for name in SETTINGS}
    folder = arguments.normalize_with
    if folder:
        files = [] if normalizes_itself(arguments) else presets.preprocessor_files(folder)
        settings[flags(["normalize_with"])] = resumable.digest(*files) if files else "itself"
    return settings


def _make_model(
    arguments: argparse.Namespace, pairs: Pairs
) -> tuple[EncoderDecoderModel, dict[str, Any]]:
    """The model to train, and the config to save it with."""
    with user_errors():
        keras.utils.set_random_seed(arguments.seed)
        model = _start_model(arguments)
        if arguments.trim_vocabulary:
            model = trim_vocabulary(model, [text for pair in pairs for text in pair])
    saved_config = model.get_config()
    if arguments.mixed_precision:
        model = with_dtype(model, "mixed_bfloat16")
    with user_errors():
        if arguments.lora_rank:
            model.enable_lora(arguments.lora_rank)
        if arguments.freeze:
            freezing.freeze(model, **arguments.freeze)
    if arguments.unfreeze_every and model.lora is not None:
        raise UserError(
            f"{arguments.preset} has LoRA adapters, with which layers stay frozen: leave "
            "--unfreeze-every out"
        )
    return model, saved_config


def _start_model(arguments: argparse.Namespace) -> EncoderDecoderModel:
    """The model to train: from a preset, or warm-started; with the lengths of the flags."""
    names = ("max_source_length", "max_target_length")
    values = {name: getattr(arguments, name) for name in names}
    given = {name: value for name, value in values.items() if value is not None}
    if arguments.preset:
        model = EncoderDecoderModel.from_preset(arguments.preset)
        if model.is_quantized:
            raise UserError(
                f"{arguments.preset} is int8: train the float32 preset it came from, or make one "
                "of its export with bertgen-tf convert --dequantize"
            )
        if given:
            model = with_config(model, **given)
    else:
        given["cross_attention"] = arguments.cross_attention or "random"
        given["num_layers"] = arguments.num_layers
        handles = {"encoder": arguments.encoder, "decoder": arguments.decoder}
        if arguments.recipe:
            model = warm_start(arguments.recipe, **handles, **given)
        else:
            read = EncoderDecoderModel.from_hub
            if family_of(arguments.encoder) == HUGGINGFACE:
                read = EncoderDecoderModel.from_huggingface
            model = read(**handles, share=bool(arguments.share), **given)
        if model.tokenizer is None:
            handle = arguments.encoder or arguments.decoder
            raise UserError(f"{handle} has no tokenizer, so it cannot read or write text")
    if not arguments.preset or arguments.max_target_length:
        model.generation_config = model.generation_config.replace(
            max_new_tokens=model.preprocessor.max_target_length
        )
    return model


def _make_optimizer(
    arguments: argparse.Namespace, model: EncoderDecoderModel, steps: int, updates: int
) -> keras.optimizers.Optimizer:
    if not updates:
        raise UserError(
            f"--gradient-accumulation must be at most all {steps} steps, received "
            f"{arguments.gradient_accumulation}"
        )
    options: dict[str, Any] = {
        "new_weights_learning_rate": arguments.new_weights_learning_rate,
        "gradient_accumulation_steps": arguments.gradient_accumulation,
        "ema_momentum": arguments.ema,
    }
    warmup = arguments.warmup_steps
    if warmup is not None:
        options["warmup_steps"] = warmup // arguments.gradient_accumulation
    if arguments.learning_rate is not None:
        options["learning_rate"] = arguments.learning_rate
    if arguments.clip_norm != 0:  # None, if it is not given
        options["global_clipnorm"] = arguments.clip_norm
    if arguments.schedule == "paper":
        return paper_optimizer(model.decoder.config.hidden_size, **options)
    if warmup is not None and warmup >= steps:
        raise UserError(f"--warmup-steps must be below all {steps} steps, received {warmup}")
    return default_optimizer(**{"warmup_steps": updates // 10, **options}, total_steps=updates)


class _Run:
    """The model, its data and its callbacks."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        replicas: finetuning.Replicas,
        folder: RunFolder,
        model: EncoderDecoderModel,
        begun: bool,
        training: Pairs,
        validation: Pairs,
    ):
        self.arguments, self.replicas, self.folder = arguments, replicas, folder
        self.model, self.begun = model, begun
        with user_errors():
            self.data = TrainingData(
                training,
                model.preprocessor,
                arguments.batch_size,
                seed=arguments.seed,
                long_targets=arguments.long_targets,
            )
            self.held_out = None
            if validation:
                self.held_out = TrainingData(
                    validation, model.preprocessor, arguments.batch_size, shuffle=False
                )
        per_epoch = self.data.steps_per_epoch
        self.steps = arguments.steps or per_epoch * arguments.epochs
        every = arguments.validate_every or (self.steps if arguments.steps else per_epoch)
        self.steps_per_epoch = min(every, self.steps)
        self._compile()
        self.best: callbacks.KeepBest | None = None
        self.samples: callbacks.GenerateCallback | None = None
        # Of the epoch whose weights are saved.
        self.epoch, self.results = 0, {}
        self.callbacks: list[keras.callbacks.Callback] = []
        if replicas.is_chief:
            self._describe()
        with user_errors():
            self._make_callbacks(validation)

    def _compile(self) -> None:
        arguments = self.arguments
        updates = self.steps // arguments.gradient_accumulation
        with self.replicas.strategy.scope():
            with user_errors():
                optimizer = _make_optimizer(arguments, self.model, self.steps, updates)
            self.model.compile(optimizer=optimizer, loss=default_loss(arguments.label_smoothing))

    def _describe(self) -> None:
        name = self.arguments.data
        for split, file, data in (
            ("train", self.arguments.train, self.data),
            ("validation", self.arguments.validation, self.held_out),
        ):
            for message in data.notes("pairs") if data else ():
                complain(f"{file or f'{name}, {split}'}: {message}")
        model, devices = self.model, self.replicas.count
        print(
            f"{len(self.data):,} pairs to train on, {len(self.held_out or ()):,} to validate on; "
            f"{model.count_params():,} weights, {model.encoder.config.vocab_size:,} word pieces; "
            f"{self.steps:,} steps of up to {self.arguments.batch_size:,} pairs"
            + (f" on {devices} devices" if devices > 1 else ""),
            flush=True,
        )

    def _make_callbacks(self, validation: Pairs) -> None:
        arguments, folder = self.arguments, self.folder
        samples = None
        if arguments.unfreeze_every:
            self.callbacks.append(
                freezing.GradualUnfreezing(steps_per_layer=arguments.unfreeze_every)
            )
        if not self.replicas.is_chief:
            return  # one worker measures for all
        if arguments.metrics:
            sources, references = zip(*validation[: arguments.metrics_pairs], strict=True)
            options = scoring_options(arguments)
            if normalizes_itself(arguments):
                options["normalize"] = self.model.preprocessor.normalize
            elif arguments.normalize_with:
                preprocessor = presets.load_preprocessor(arguments.normalize_with)
                options["normalize"] = preprocessor.normalize
            samples = self.samples = callbacks.GenerateCallback(
                sources, references, arguments.metrics, folder=folder / SAMPLES_FOLDER, **options
            )
            self.callbacks.append(samples)
        if arguments.monitor:
            self.best = callbacks.KeepBest(
                folder / BEST_FILE, f"val_{arguments.monitor}", arguments.patience, complain
            )
            self.callbacks.append(self.best)
        self.callbacks.append(callbacks.Log(self.steps, folder))
        if arguments.tensorboard:
            self.callbacks.append(callbacks.TensorBoardCurves(folder / TENSORBOARD_FOLDER, samples))

    def train(self) -> None:
        """Trains to the end.

        Raises:
            OSError, UserError: what the user can fix.
            KeyboardInterrupt: with a message on how to resume.
        """
        steps, seconds = self.arguments.checkpoint_every
        try:
            history = finetuning.train(
                self.model,
                self.data,
                steps=self.steps,
                steps_per_epoch=self.steps_per_epoch,
                validation=self.held_out,
                callbacks=self.callbacks,
                folder=self.folder,
                save_every=finetuning.Interval(steps, seconds),
                resume=self.begun,
                complain=complain,
            )
        finally:
            for callback in self.callbacks:
                if isinstance(callback, callbacks.Log):
                    callback.end_line()
        if self.held_out is not None and self.replicas.is_chief:
            self.epoch = self.best.best_epoch if self.best else 0
            self.epoch = self.epoch or len(history["val_loss"])
            loss, accuracy = (
                history[f"val_{name}"][self.epoch - 1] for name in ("loss", "accuracy")
            )
            self.results = {"loss": loss, "accuracy": accuracy}
            best = 0 if self.best is None else self.best.best_epoch
            which = f" (best: epoch {best})" if best else ""
            print(f"validation{which}: loss {loss:.4f} a token, {accuracy:.1%} of the tokens right")

    def save(self, config: dict[str, Any]) -> None:
        """Writes the preset.

        Args:
            config: the model's, as it is saved.
        """
        model, output = self.model, self.arguments.output
        if self.best is not None:
            with user_errors():
                self.best.load(model)
        if self.arguments.lora_rank:
            model.save_adapter(self.folder / ADAPTER_FILE)
            model.merge_lora()
        if self.arguments.mixed_precision:
            model = with_dtype(model, config["dtype"])
        if model.lora is None:
            # What was frozen was frozen for this training only.
            freezing.unfreeze(model)
            freezing.set_frozen_layers(model, config.get("frozen_layers", ()))
        model.save_to_preset(output)
        print(
            f"saved to {output}; try it:\n  {PROGRAM} generate --preset {shlex.quote(str(output))}"
        )

    def judge(self) -> None:
        """Says in a line, if the model has not learnt to answer, what usually helps."""
        arguments, samples = self.arguments, self.samples
        if self.held_out is None:
            return
        rows = []
        if samples is not None:
            try:
                rows = samples.read(self.epoch)
            except (OSError, Damaged) as error:
                complain(f"what was generated is not judged: {error}")
        problem = diagnosis.find_problem(
            self.data,
            self.held_out,
            self.results,
            arguments.monitor or "loss",
            label_smoothing=arguments.label_smoothing,
            samples=rows,
            **({} if samples is None else samples.options),
        )
        if problem is not None:
            helps = ["more --steps" if arguments.steps else "more --epochs", "more pairs"]
            if not arguments.preset and arguments.cross_attention != "self_attention":
                helps.append("--cross-attention self_attention")
            complain(f"{problem}; what usually helps: {', '.join(helps)}")


@contextlib.contextmanager
def _errors(replicas: finetuning.Replicas) -> Iterator[None]:
    try:
        with finetuning.together(replicas):
            yield
    except finetuning.Diverged as error:
        raise UserError(
            f"training diverged, nothing was saved: {error}; lower --learning-rate"
        ) from error
    except finetuning.WorkerLost as error:
        raise UserError(f"{error}, with --resume") from error
    except OtherModel as error:
        raise UserError(f"{error} --overwrite starts anew") from error
    except Damaged as error:
        raise UserError(in_flags(str(error))) from error
    except tf.errors.ResourceExhaustedError as error:
        raise UserError(
            "there is not enough memory for a step: lower --batch-size, with "
            "--gradient-accumulation for the same updates, or --max-source-length"
        ) from error
    except finetuning.Interrupted as error:
        raise KeyboardInterrupt(
            f"interrupted after step {error.step:,}, which is saved: the same command with "
            "--resume continues"
        ) from error
