"""The illegal_activity preset of `safetydpo_jax/presets.py`."""

from safetydpo_jax import presets


def get_config(variant: str = "sd15"):
  return presets.get_config("illegal_activity", variant)
