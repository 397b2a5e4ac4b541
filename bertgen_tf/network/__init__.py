"""Layers and the two stacks that are made of them, and what their weights are called."""
