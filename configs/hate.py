"""The hate preset of `safetydpo_jax/presets.py`."""

from safetydpo_jax import presets


def get_config(variant: str = "sd15"):
  return presets.get_config("hate", variant)
