"""Rotating the hidden states, value heads and low ranks of a model while its weights are read."""
