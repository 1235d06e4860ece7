"""One LoRA on all categories, the paper's "All-single" baseline for merged experts."""

from configs import base


def get_config(variant: str = "sd15"):
  """`configs/base.py` on the pairs of every category."""
  return base.get_config(variant, category="all")
