"""Captured calls of a transformer: recording, keeping and reading them, safely and without holding them."""
