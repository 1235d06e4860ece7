"""CLIP models of transformers and open_clip."""
