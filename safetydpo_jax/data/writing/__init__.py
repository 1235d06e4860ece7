"""Pairs of prompts written by a language model."""
