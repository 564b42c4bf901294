"""Savers know formats: which tensors a quantized layer becomes on disk, and the files around them."""
