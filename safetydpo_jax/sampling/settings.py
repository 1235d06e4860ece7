"""How prompts are rendered: the settings that every command that renders takes.

This is the one place for such an option: a field here, with its default, its help and
its check, is a flag of `generate` and of `evaluate --suite`. `render_csv.py` says in
`make_folder` what of it is written to the manifest.
"""

import dataclasses
import math
from typing import Any, Literal

from safetydpo_jax.errors import InputError
from safetydpo_jax.sampling import methods
from safetydpo_jax.sampling.text_settings import TextSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class RenderSettings(TextSettings):
  """Settings of rendering, whatever the model and the prompts."""

  sampler: methods.Name | None = None
  """sampler (default: that of the checkpoint's scheduler)"""
  steps: int = 50
  """sampling steps"""
  guidance: float = 7.5
  """guidance scale of rows without an evaluation_guidance; 1 or less is none"""
  no_row_guidance: bool = False
  """use --guidance for every row, also for those with a guidance of their own"""
  guidance_rescale: float = 0.0
  """share of rescaled guidance, 0 to 1"""
  negative_prompt: str | None = None
  """negative prompt of rows that have none of their own in the CSV"""
  fix_text: bool = False
  """repair prompts with ftfy (curly quotes, broken encodings), as transformers did
  before version 5"""
  height: int | None = None
  """height in pixels (default: the model's own)"""
  width: int | None = None
  """width in pixels (default: the model's own)"""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """number type of weights and computations"""
  variant: str | None = None
  """variant of the model's weight files, such as fp16"""
  vae: str | None = None
  """another VAE's folder, file or hub id (default: the model's own)"""

  def __post_init__(self):
    super().__post_init__()
    if not math.isfinite(self.guidance):
      raise InputError(f"--guidance is {self.guidance}; expected a finite number")
    if not 0 <= self.guidance_rescale <= 1:
      raise InputError(
        f"--guidance_rescale is {self.guidance_rescale}; expected 0 to 1"
      )


def settings_of(options: RenderSettings) -> dict[str, Any]:
  """The settings among options that are more than settings, by name."""
  names = [field.name for field in dataclasses.fields(RenderSettings)]
  return {name: getattr(options, name) for name in names}
