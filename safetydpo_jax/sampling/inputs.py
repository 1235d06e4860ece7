"""What rows of a prompts CSV are rendered from: noise, token ids, guidance."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from safetydpo_jax.data import cleaning
from safetydpo_jax.data.prompts import Row
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.parts import class_of
from safetydpo_jax.formats.base_model.pipeline import Pipeline
from safetydpo_jax.sampling import prompt_text
from safetydpo_jax.sampling.renderer import Inputs, initial_noise, key_words


def read_latents(file: Path, rows: int, shape: tuple[int, int, int]) -> np.ndarray:
  """Reads initial noise (n, c, h, w), PyTorch's layout, as (n, h, w, c) float32.

  Raises:
    InputError: the file is not such an array, with one (c, h, w) for each row, or has a
      number that is not finite.
  """
  try:
    # Mapped, for the header may name more numbers than there are.
    latents = np.lib.format.open_memmap(file, mode="r")
  except Exception as error:  # numpy raises anything for a damaged header
    raise InputError(f"cannot read {file} as a .npy file: {error}") from error
  if latents.dtype.kind != "f":
    raise InputError(f"{file} is not a .npy file of floating point numbers")
  height, width, channels = shape
  if latents.shape != (rows, channels, height, width):
    raise InputError(
      f"{file} has shape {latents.shape}; expected ({rows}, {channels}, {height}, "
      f"{width}), one (c, h, w) for each prompt"
    )
  with np.errstate(over="ignore"):
    found = latents.transpose(0, 2, 3, 1).astype(np.float32)
  if not np.isfinite(found).all():
    raise InputError(f"{file} holds NaN, infinity or what is too large for float32")
  return found


def read_index(pipeline: Pipeline) -> dict[str, Any]:
  """model_index.json; its scheduler's class comes before scheduler_config.json's.

  DDIM if neither names one.
  """
  named = pipeline.schedule.config.get("_class_name", "DDIMScheduler")
  if "scheduler" in pipeline.index:
    named = class_of(pipeline.index, "scheduler")
  return {**pipeline.index, "scheduler": ["diffusers", named]}


class Wanted(NamedTuple):
  """What a row's image is rendered from, besides noise.

  Attributes:
    prompt: its text.
    negative: the negative prompt; "" if there is none, or it has no effect.
    has_negative: whether there is one, be it "".
    guidance: scale.
  """

  prompt: str
  negative: str
  has_negative: bool
  guidance: float


def wanted_of(row: Row, guidance: float, negative_prompt: str | None) -> Wanted:
  """A row's own guidance and negative prompt, or where it has none, these."""
  negative = negative_prompt if row.negative_prompt is None else row.negative_prompt
  scale = guidance if row.guidance is None else row.guidance
  # At a scale of 1 the negative prompt has no effect, so its length must have none.
  used = negative if negative and scale > 1 else ""
  return Wanted(row.prompt, used, negative is not None, scale)


def make_inputs(
  rows: list[Row],
  *,
  pipeline: Pipeline,
  shape: tuple[int, int, int],
  latents: np.ndarray | None = None,
  guidance: float,
  negative_prompt: str | None,
  style: prompt_text.Style = "plain",
) -> Inputs:
  """What determines the images of a batch.

  Args:
    rows: the batch; a row's own guidance and negative prompt win.
    pipeline: for its tokenizers.
    shape: (h, w, c) of one image's latents.
    latents: initial noise of the whole CSV (n, h, w, c); None: from the rows' seeds.
    guidance: scale of rows without one.
    negative_prompt: of rows without one; None is none.
    style: how prompts are read, see `prompt_text.py`; all rows have as many chunks.
  """
  wanted = [wanted_of(row, guidance, negative_prompt) for row in rows]
  tokens, negative_tokens = prompt_text.tokenize(
    pipeline, [w.prompt for w in wanted], [w.negative for w in wanted], style
  )
  # diffusers' StableDiffusionXLPipeline: no negative prompt means embeddings of zeros.
  zeros = len(pipeline.text_encoders) > 1 and read_index(pipeline).get(
    "force_zeros_for_empty_prompt", True
  )
  scales = np.array([w.guidance for w in wanted], np.float32)
  if not pipeline.unet.config.get("time_cond_proj_dim"):
    scales = np.maximum(scales, 1.0)  # as diffusers: 1 is none
  seeds = [row.seed for row in rows]
  return Inputs(
    latents=initial_noise(seeds, shape)
    if latents is None
    else latents[np.array([row.number for row in rows])],
    words=key_words(seeds),
    token_ids=tokens.ids,
    negative_ids=negative_tokens.ids,
    negative=np.array([w.has_negative or not zeros for w in wanted], np.float32),
    guidance=scales,
    weights=tokens.weights,
    negative_weights=negative_tokens.weights,
  )


def fix_prompts(
  prepare: Callable[[list[Row]], Inputs],
) -> Callable[[list[Row]], Inputs]:
  """`prepare` for rows whose prompts are repaired first.

  Elsewhere rows keep their prompts: the hash of them is that of the CSV.
  """
  return lambda rows: prepare(cleaning.fix_rows(rows)[0])
