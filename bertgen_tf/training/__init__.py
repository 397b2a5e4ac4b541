"""What `compile` and `fit` of a model need; the training loop is in `bertgen_tf.finetuning`."""
