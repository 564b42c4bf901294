"""The model as a skeleton without weights, its units, and its forward pass suspended at every block."""
