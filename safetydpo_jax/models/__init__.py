"""Flax Linen models of Stable Diffusion, parametrised by a checkpoint's config.json."""
