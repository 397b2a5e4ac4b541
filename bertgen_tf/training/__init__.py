"""What a model's `compile` and `fit` need; the training loop is in `bertgen_tf.finetuning`."""
