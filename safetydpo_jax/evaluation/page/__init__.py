"""Chapters of the report of `evaluate`."""
