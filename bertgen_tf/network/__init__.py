"""Layers, the two stacks that are made of them, and the names of their weights."""
