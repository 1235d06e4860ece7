"""Settings of the conditioning: how prompts are read, clip skip, SDXL's sizes.

Neutral is what diffusers' pipelines do without them.
"""

import dataclasses
import re
from typing import Any

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import Pipeline
from safetydpo_jax.models import clip, conditioning
from safetydpo_jax.sampling.prompt_text import Style

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSettings:
  """Settings of the conditioning, whatever the model and the prompts."""

  prompt_style: Style = "plain"
  """plain: cut at 77 tokens; long: in chunks; a1111: in chunks, with (word:1.3), [word]
  and BREAK"""
  clip_skip: int = 0
  """last layers of the text encoder to skip; the web UI's Clip skip is one more"""
  original_size: str | None = None
  """SDXL: original size, H,W in pixels (default: the image's own)"""
  crop_top_left: str = "0,0"
  """SDXL: corner of the crop, Y,X in pixels"""
  target_size: str | None = None
  """SDXL: target size, H,W in pixels (default: the image's own)"""
  negative_original_size: str | None = None
  """SDXL: original size of the negative prompt, H,W in pixels (default: all its sizes
  are the prompt's)"""
  negative_crop_top_left: str = "0,0"
  """SDXL: corner of the negative prompt's crop, Y,X in pixels; with
  --negative_original_size"""
  negative_target_size: str | None = None
  """SDXL: target size of the negative prompt, H,W in pixels; with
  --negative_original_size"""

  def __post_init__(self):
    if self.clip_skip < 0:
      raise InputError(f"--clip_skip is {self.clip_skip}; expected 0 or more")
    for name in SIZES:
      read_size(self, name)
    negative = self.negative_original_size is not None
    if negative != (self.negative_target_size is not None) or (
      not negative and read_size(self, "negative_crop_top_left") != (0, 0)
    ):
      raise InputError(
        "--negative_original_size and --negative_target_size are needed together; "
        "--negative_crop_top_left needs both"
      )


NAMES = tuple(field.name for field in dataclasses.fields(TextSettings))
SIZES = (
  *("original_size", "crop_top_left", "target_size", "negative_original_size"),
  *("negative_crop_top_left", "negative_target_size"),
)


def read_size(options: TextSettings, name: str) -> Size | None:
  """An option of `SIZES` as (h, w); None if it is not given.

  Raises:
    InputError: it is not two numbers of pixels.
  """
  text, least = getattr(options, name), 0 if "crop" in name else 1
  if text is None:
    return None
  match = re.fullmatch(r"\s*(\d{1,6})\s*,\s*(\d{1,6})\s*", text, re.ASCII)
  pair = (int(match[1]), int(match[2])) if match else (-1, -1)
  if min(pair) < least:
    raise InputError(
      f"--{name} is {text!r}; expected {'Y,X' if 'crop' in name else 'H,W'} in pixels, "
      "such as 512,768"
    )
  return pair


def check_fits(options: TextSettings, pipeline: Pipeline) -> None:
  """Raises `InputError` if the model has too few layers, or takes no sizes."""
  layers = min(
    clip.read_config(encoder.config).num_hidden_layers
    for encoder in pipeline.text_encoders
  )
  if options.clip_skip >= layers:
    raise InputError(
      f"--clip_skip is {options.clip_skip}; expected 0 to {layers - 1}: the text "
      f"encoder of {pipeline.name} has {layers} layers"
    )
  given = [name for name in SIZES if read_size(options, name) not in (None, (0, 0))]
  if given and len(pipeline.text_encoders) < 2:
    raise InputError(
      f"--{given[0]} is for Stable Diffusion XL; leave it out for {pipeline.name}"
    )


def time_ids(
  options: TextSettings, height: int, width: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """SDXL's time ids of the prompt and of the negative prompt, for an image's size.

  As in diffusers, the negative prompt's are the prompt's unless they are given.
  """
  ids = conditioning.make_time_ids(height, width)
  both = []
  for prefix in ("", "negative_"):
    names = ("original_size", "crop_top_left", "target_size")
    found = [read_size(options, prefix + name) for name in names]
    if not prefix or found[0]:
      ids = [
        own for i, pair in enumerate(found) for own in pair or ids[2 * i : 2 * i + 2]
      ]
    both.append(tuple(ids))
  return both[0], both[1]


def clip_skips(options: TextSettings) -> tuple[int, int]:
  """Layers to skip for the prompt and for the negative prompt.

  diffusers' pipelines skip none for the negative prompt, the web UI as many.
  """
  both = options.prompt_style == "a1111"
  return options.clip_skip, options.clip_skip if both else 0


def to_manifest(
  options: TextSettings, height: int | None, width: int | None
) -> dict[str, Any] | None:
  """The settings that are not neutral for an image of this size; None if all are."""
  neutral = {
    "prompt_style": "plain",
    "clip_skip": 0,
    "original_size": (height, width),
    "crop_top_left": (0, 0),
    "target_size": (height, width),
    "negative_crop_top_left": (0, 0),
  }
  found = {name: getattr(options, name) for name in NAMES}
  found |= {name: read_size(options, name) for name in SIZES}
  return {
    name: list(value) if isinstance(value, tuple) else value
    for name, value in found.items()
    if value not in (None, neutral.get(name))
  } or None
