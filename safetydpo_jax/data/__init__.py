"""Preference pairs: source layouts, pair records on disk, the Grain pipeline."""
