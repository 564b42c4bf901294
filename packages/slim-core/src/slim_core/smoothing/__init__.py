"""Scales that move outliers from activations into weights, exactly."""
