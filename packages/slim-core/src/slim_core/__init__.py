"""Streaming post-training quantization: recipes, checkpoints, algorithms, runners and savers of Slim."""
