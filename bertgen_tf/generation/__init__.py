"""From a model and texts to hypotheses: inputs, settings, compiled functions, streams."""
