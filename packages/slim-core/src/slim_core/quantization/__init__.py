"""Number formats, scale and offset maths, statistics, weight methods and quantized layers."""
