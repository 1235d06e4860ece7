"""How the tiny Stable Diffusion was trained on the toy world."""
