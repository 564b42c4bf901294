"""Pruning that lets the remaining weights make up for what is gone."""
