"""Adam as used to fine-tune BERT, and its learning-rate schedules.

Throughout, steps are weight updates: with gradient accumulation, several batches make one.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from bertgen_tf.checks import check_integer, check_number, check_positive


@keras.saving.register_keras_serializable("bertgen_tf", "LinearWarmup")
class LinearWarmup(keras.optimizers.schedules.LearningRateSchedule):
    """Rises linearly over `warmup_steps`, then stays, or falls linearly to 0 at `total_steps`.

    BERT's fine-tuning schedule (`google-research/bert` `optimization.py`).
    """

    def __init__(self, learning_rate: float, warmup_steps: int = 0, total_steps: int | None = None):
        check_positive("learning_rate", learning_rate)
        check_number("warmup_steps", warmup_steps, 0)
        if total_steps is not None and total_steps <= warmup_steps:
            raise ValueError(
                f"total_steps must be above warmup_steps ({warmup_steps}), "
                f"received {total_steps!r}."
            )
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps

    def __call__(self, step: Any) -> Any:
        step = tf.cast(step, tf.float32)
        # Step 0 already learns.
        rate = tf.minimum(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.total_steps is not None:
            left = (self.total_steps - step) / (self.total_steps - self.warmup_steps)
            rate = tf.minimum(rate, tf.maximum(left, 0.0))
        return self.learning_rate * rate

    def get_config(self) -> dict[str, Any]:
        return {
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.total_steps,
        }


@keras.saving.register_keras_serializable("bertgen_tf", "InverseSquareRoot")
class InverseSquareRoot(keras.optimizers.schedules.LearningRateSchedule):
    """`learning_rate / sqrt(hidden_size) * min(step / warmup, 1) / sqrt(max(step, warmup))`.

    The schedule of Rothe, Narayan, Severyn 2020, who give it in words; the formula is that of the
    Transformer in `tensorflow/models`, whose step counts from 0. The highest value, at the end of
    the warm-up, is 9.0e-6 with the defaults and a hidden size of 768.
    """

    def __init__(self, hidden_size: int, learning_rate: float = 0.05, warmup_steps: int = 40_000):
        check_positive("learning_rate", learning_rate)
        for name, value in (("hidden_size", hidden_size), ("warmup_steps", warmup_steps)):
            check_number(name, value, 1)
        self.hidden_size = hidden_size
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps

    def __call__(self, step: Any) -> Any:
        step = tf.cast(step, tf.float32)
        warmup = float(self.warmup_steps)
        rate = self.learning_rate / self.hidden_size**0.5
        return rate * tf.minimum(step / warmup, 1.0) * tf.math.rsqrt(tf.maximum(step, warmup))

    def get_config(self) -> dict[str, Any]:
        return {
            "hidden_size": self.hidden_size,
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
        }


@keras.saving.register_keras_serializable("bertgen_tf", "BertAdamW")
class BertAdamW(keras.optimizers.AdamW):
    """AdamW without weight decay on biases and layer normalisation, even after reloading.

    With `weight_decay=0` it is Adam. Differences from Keras's `AdamW`:

    - New weights may have a learning rate of their own, which follows the same schedule.
    - Schedules and the moving average count updates, not the batches accumulated for each.
    - Clipping by norm applies to the gradient of the whole batch: accumulated, and summed over the
      replicas of a `tf.distribute` strategy. Keras clips each replica's part, and cannot accumulate
      under a strategy.
    - A variable that is unfrozen late starts as if at step 0: the bias correction of its moments
      counts its own updates.

    Args:
        *args, **kwargs: as for Keras's `AdamW`.
        new_weights_factor: multiplies the learning rate of new weights.
        new_weights: the paths of these variables; by default `EncoderDecoderModel.compile` fills
            in those of `bertgen_tf.training.freezing.new_variables`.
    """

    def __init__(
        self,
        *args: Any,
        new_weights_factor: float = 1.0,
        new_weights: Sequence[str] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        check_positive("new_weights_factor", new_weights_factor)
        self.new_weights_factor = new_weights_factor
        self.new_weights = None if new_weights is None else tuple(new_weights)
        self.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])

    @property
    def needs_new_weights(self) -> bool:
        """True if `new_weights` is unset although new weights have their own learning rate."""
        return self.new_weights is None and self.new_weights_factor != 1

    def build(self, variables: Sequence[Any]) -> None:
        if self.built:
            return
        super().build(variables)
        # How often each variable was updated: less often than others if it was frozen for a time.
        self._updates = self.add_variable(
            (len(variables),), dtype="int64", aggregation="only_first_replica", name="updates"
        )
        new = set(self.new_weights or ())
        self._factors = [self.new_weights_factor if v.path in new else 1.0 for v in variables]
        self._decays = [bool(self.weight_decay) and self._use_weight_decay(v) for v in variables]

    def _get_current_learning_rate(self) -> Any:
        if isinstance(self._learning_rate, keras.optimizers.schedules.LearningRateSchedule):
            return self._learning_rate(self.iterations)
        return super()._get_current_learning_rate()

    def _backend_apply_gradients(self, grads: Sequence[Any], trainable_variables: Any) -> None:
        variables = [getattr(variable, "value", variable) for variable in trainable_variables]
        grads = [
            tf.cast(tf.convert_to_tensor(grad), variable.dtype)  # looked-up rows become a matrix
            for grad, variable in zip(grads, variables, strict=True)
        ]
        # Within a replica, the sum over all; otherwise unchanged.
        grads = [
            grad for grad, _ in self._all_reduce_sum_gradients(zip(grads, variables, strict=True))
        ]
        totals = grads
        if self.gradient_accumulation_steps:
            totals = [
                (grad + self._accumulator(variable)) / self.gradient_accumulation_steps
                for grad, variable in zip(grads, variables, strict=True)
            ]
        tf.__internal__.distribute.interim.maybe_merge_call(
            self._step,
            self._distribution_strategy,
            variables,
            grads,
            self._clip_gradients(totals),
            tf.convert_to_tensor(self.learning_rate),
        )

    def _step(
        self, strategy: Any, variables: Any, grads: Any, totals: Any, learning_rate: Any
    ) -> None:
        """On all replicas: updates, or accumulates one more batch."""

        def each(function: Any, variables: Any, *values: Any) -> None:
            for variable, *others in zip(variables, *values, strict=True):
                strategy.extended.update(variable, function, args=tuple(others), group=False)

        def update() -> None:
            indices = [self._get_variable_index(variable) for variable in variables]
            trained = np.isin(np.arange(len(self._trainable_variables)), indices)
            self._updates.assign_add(tf.constant(trained, "int64"))
            # One tensor for all, so that the variable is read only once.
            counts = tf.unstack(tf.convert_to_tensor(self._updates), len(trained))
            rates = [learning_rate] * len(indices)
            each(self._update, variables, totals, rates, [counts[i] for i in indices], indices)
            if self.gradient_accumulation_steps:
                each(self._reset_accumulator, variables)
            if self.use_ema:
                self._average(each)

        if not self.gradient_accumulation_steps:
            update()
            return
        batches = tf.convert_to_tensor(self._iterations) + 1
        tf.cond(
            tf.equal(batches % self.gradient_accumulation_steps, 0),
            update,
            lambda: each(lambda v, grad: self._accumulator(v).assign_add(grad), variables, grads),
        )

    def _update(self, variable: Any, grad: Any, learning_rate: Any, count: Any, index: int) -> None:
        rate = tf.cast(learning_rate * self._factors[index], variable.dtype)
        if self._decays[index]:
            variable.assign_sub(variable * self.weight_decay * rate)
        # In float32, the first differences from 1 would have only four digits.
        corrections = [
            tf.cast(1 - tf.constant(beta, tf.float64) ** tf.cast(count, tf.float64), variable.dtype)
            for beta in (self.beta_1, self.beta_2)
        ]
        momentum, velocity = (list_[index].value for list_ in (self._momentums, self._velocities))
        momentum.assign_add((grad - momentum) * (1 - self.beta_1))
        velocity.assign_add((tf.square(grad) - velocity) * (1 - self.beta_2))
        if self.amsgrad:
            largest = self._velocity_hats[index].value
            largest.assign(tf.maximum(largest, velocity))
            velocity = largest
        rate *= tf.sqrt(corrections[1]) / corrections[0]
        variable.assign_sub(momentum * rate / (tf.sqrt(velocity) + self.epsilon))

    def _average(self, each: Any) -> None:
        # Frozen variables are averaged too, to no effect, to be ready when they are unfrozen.
        variables = [variable.value for variable in self._trainable_variables]
        is_first = tf.equal(tf.convert_to_tensor(self.iterations), 0)
        share = tf.where(is_first, 1.0, 1.0 - self.ema_momentum)

        def average(variable: Any, mean: Any) -> None:
            mean.assign_add((variable - mean) * tf.cast(share, variable.dtype))

        means = [mean.value for mean in self._model_variables_moving_average]
        each(average, variables, means)
        if self.ema_overwrite_frequency:
            updates = tf.convert_to_tensor(self.iterations) + 1
            tf.cond(
                tf.equal(updates % self.ema_overwrite_frequency, 0),
                lambda: each(lambda variable, mean: variable.assign(mean), variables, means),
                lambda: None,
            )

    def _accumulator(self, variable: Any) -> Any:
        return self._accumulated_gradients[self._get_variable_index(variable)].value

    def _reset_accumulator(self, variable: Any) -> None:
        accumulator = self._accumulator(variable)
        accumulator.assign(tf.zeros_like(accumulator))

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        # Keras does not expect variables that have an average and do not train. Before the first
        # update there are no averages.
        if self.use_ema and self.built and int(self.iterations):
            super().finalize_variable_values(self._trainable_variables)

    def get_config(self) -> dict[str, Any]:
        new = None if self.new_weights is None else list(self.new_weights)
        return {
            **super().get_config(),
            "new_weights_factor": self.new_weights_factor,
            "new_weights": new,
        }


def default_optimizer(
    learning_rate: float = 1e-4,
    *,
    warmup_steps: int | float = 0,
    total_steps: int | None = None,
    weight_decay: float = 0.01,
    new_weights_learning_rate: float | None = None,
    global_clipnorm: float | None = 1.0,
    gradient_accumulation_steps: int = 1,
    ema_momentum: float | None = None,
) -> keras.optimizers.Optimizer:
    """AdamW as used to fine-tune BERT: no decay on biases and norms, clipped to norm 1.

    Args:
        learning_rate: its peak.
        warmup_steps: steps of linear warm-up; a number below 1 is a share of `total_steps`.
        total_steps: where the rate reaches 0; by default it stays at its peak. Callbacks that set
            the rate, such as `ReduceLROnPlateau`, need it constant: without warm-up and decay.
        weight_decay: decoupled, for kernels and embeddings only.
        new_weights_learning_rate: the peak for weights that no checkpoint provided, see
            `bertgen_tf.training.freezing.new_variables`; by default the same.
        global_clipnorm: gradients whose global norm is greater are scaled down to it; None does
            not clip.
        gradient_accumulation_steps: batches per update. Their gradients are averaged, so a token
            in a batch of few target tokens counts more than one in a batch of many; with equal
            numbers the update is that of one large batch. Steps of the schedule are updates.
        ema_momentum: such as 0.999, keeps an exponential moving average of the weights. `fit`
            leaves it in the model when it ends; until then it is in the optimizer, see
            `averaged_weights`. None keeps none.
    """
    if 0 < warmup_steps < 1:
        if total_steps is None:
            raise ValueError(
                f"warmup_steps={warmup_steps!r} is a share of total_steps, which is None. Pass "
                "total_steps, or a number of steps."
            )
        warmup_steps = round(warmup_steps * total_steps)
    # Always built, because it checks the values.
    schedule = LinearWarmup(learning_rate, int(warmup_steps), total_steps)
    return BertAdamW(
        schedule if warmup_steps or total_steps else learning_rate,
        weight_decay=weight_decay,
        global_clipnorm=global_clipnorm,
        **_options(
            learning_rate, new_weights_learning_rate, gradient_accumulation_steps, ema_momentum
        ),
    )


def paper_optimizer(
    hidden_size: int,
    *,
    learning_rate: float = 0.05,
    warmup_steps: int = 40_000,
    new_weights_learning_rate: float | None = None,
    global_clipnorm: float | None = None,
    gradient_accumulation_steps: int = 1,
    ema_momentum: float | None = None,
) -> keras.optimizers.Optimizer:
    """Adam with the schedule of Rothe, Narayan, Severyn 2020, see `InverseSquareRoot`.

    The paper does not state Adam's betas and epsilon (here Keras's: 0.9, 0.999, 1e-7), nor whether
    it clips, decays, smooths labels or averages weights: none of that is done here by default. Its
    batches have 256 pairs, or 128 for CNN/DailyMail and XSum.

    Args:
        hidden_size: of the model.
        learning_rate: before it is divided by `sqrt(hidden_size)` and `sqrt(warmup_steps)`.
        warmup_steps: steps of linear warm-up. Runs shorter than the paper's (200k to 500k steps)
            need fewer.
        new_weights_learning_rate: replaces `learning_rate` for weights that no checkpoint provided;
            by default the same, as in the paper.
        global_clipnorm, gradient_accumulation_steps, ema_momentum: as for `default_optimizer`.
    """
    return BertAdamW(
        InverseSquareRoot(hidden_size, learning_rate, warmup_steps),
        weight_decay=0.0,
        global_clipnorm=global_clipnorm,
        **_options(
            learning_rate, new_weights_learning_rate, gradient_accumulation_steps, ema_momentum
        ),
    )


@contextlib.contextmanager
def averaged_weights(model: keras.Model) -> Iterator[None]:
    """During training: gives the model the moving average of its weights, then its own back.

    For what is generated, evaluated or saved between two steps; the optimizer's average is not
    touched. Both swaps are exact, unlike those of Keras's `SwapEMAWeights`. Without an average, or
    before the first step, the model is unchanged.

    Args:
        model: compiled, with an optimizer such as `default_optimizer(ema_momentum=0.999)`.
    """
    optimizer = getattr(model, "optimizer", None)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    has_average = getattr(optimizer, "use_ema", False) and optimizer.built
    if not has_average or not int(optimizer.iterations):
        yield
        return
    variables = optimizer._trainable_variables
    own = [np.array(variable.numpy()) for variable in variables]
    try:
        for variable, mean in zip(
            variables, optimizer._model_variables_moving_average, strict=True
        ):
            variable.assign(mean.numpy())
        yield
    finally:
        for variable, value in zip(variables, own, strict=True):
            variable.assign(value)


def _options(
    learning_rate: float, new: float | None, accumulation: int, momentum: float | None
) -> dict[str, Any]:
    """What the two optimizers have in common, as Keras and `BertAdamW` take it."""
    check_integer("gradient_accumulation_steps", accumulation)
    if momentum is not None and not 0 < momentum < 1:
        raise ValueError(f"ema_momentum must be between 0 and 1, received {momentum!r}.")
    if new is not None:
        check_positive("new_weights_learning_rate", new)
    options: dict[str, Any] = {"new_weights_factor": 1.0 if new is None else new / learning_rate}
    if accumulation > 1:  # Keras does not accept 1
        options["gradient_accumulation_steps"] = accumulation
    if momentum is not None:
        options.update(use_ema=True, ema_momentum=momentum)
    return options
