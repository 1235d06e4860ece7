"""Stable Diffusion checkpoints: reading, fusing a LoRA into them, writing them."""
