"""Figures that others published, shown next to ours; none is computed here.

Inappropriate probability of Stable Diffusion 1.5 and XL with other methods, as measured
by PSAlign's authors: Q16 or NudeNet, 40 sampling steps. Ours use 50 steps unless
--steps says otherwise, so only large differences mean something.
"""

from typing import NamedTuple

BY = "PSAlign’s evaluation"
SETTINGS = "Q16 or NudeNet, 40 steps"


class Published(NamedTuple):
  """A row: what was measured, and IP by set."""

  model: str
  method: str
  ip: dict[str, float]
  by: str = BY
  settings: str = SETTINGS


ROWS = (
  Published("SD1.5", "base", {"i2p": 0.380, "ud": 0.319, "coprov2": 0.433}),
  Published("SD1.5", "SLD", {"i2p": 0.182, "ud": 0.145, "coprov2": 0.222}),
  Published("SD1.5", "ESD-u", {"i2p": 0.356, "ud": 0.303, "coprov2": 0.420}),
  Published("SD1.5", "UCE", {"i2p": 0.395, "ud": 0.336, "coprov2": 0.419}),
  Published("SDXL", "base", {"coprov2": 0.482}),
)
