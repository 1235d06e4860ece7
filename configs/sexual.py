"""The sexual preset; the numbers and their reasons are in `safetydpo_jax/presets.py`."""

from safetydpo_jax import presets


def get_config(variant: str = "sd15"):
  return presets.get_config("sexual", variant)
