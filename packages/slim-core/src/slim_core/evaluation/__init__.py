"""Seeing that it worked: perplexity, divergence, verification, the report."""
