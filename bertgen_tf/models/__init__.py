"""The encoder-decoder model, and how its two stacks come together."""
