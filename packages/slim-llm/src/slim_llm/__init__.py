"""modelslim_v1 recipes: large language models quantized layer by layer for Ascend engines."""
