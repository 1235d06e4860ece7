"""Datasets of preference pairs in the layouts people have them in."""
