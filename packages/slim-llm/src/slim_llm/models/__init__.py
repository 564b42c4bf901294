"""Model families: how a transformers model is opened without its weights, and what it is called."""
