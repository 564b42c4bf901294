"""The pipeline of a model folder: what is in it, what it is told, and running it."""
