"""The illegal activity expert; see `configs/base.py`."""

from configs import base


def get_config(variant: str = "sd15"):
  """The faithful preset on the pairs of one category."""
  return base.get_config(variant, category="illegal_activity")
