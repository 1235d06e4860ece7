"""What rows of a prompts CSV are rendered from: noise, token ids, guidance."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from safetydpo_jax.data import cleaning
from safetydpo_jax.data.prompts import Row
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import Pipeline
from safetydpo_jax.sampling.renderer import Inputs, initial_noise, key_words


def read_latents(file: Path, rows: int, shape: tuple[int, int, int]) -> np.ndarray:
  """Reads initial noise (n, c, h, w), PyTorch's layout, as (n, h, w, c) float32.

  Raises:
    InputError: the file is not such an array, with one (c, h, w) for each row.
  """
  try:
    latents = np.load(file, allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    raise InputError(f"cannot read {file} as a .npy file: {error}") from error
  if not isinstance(latents, np.ndarray) or latents.dtype.kind != "f":
    raise InputError(f"{file} is not a .npy file of floating point numbers")
  height, width, channels = shape
  if latents.shape != (rows, channels, height, width):
    raise InputError(
      f"{file} has shape {latents.shape}; expected ({rows}, {channels}, {height}, "
      f"{width}), one (c, h, w) for each prompt"
    )
  return latents.transpose(0, 2, 3, 1).astype(np.float32)


def read_index(pipeline: Pipeline) -> dict[str, Any]:
  """model_index.json; its scheduler's class comes before scheduler_config.json's.

  DDIM if neither names one.
  """
  named = pipeline.schedule.config.get("_class_name", "DDIMScheduler")
  return {"scheduler": ["diffusers", named], **pipeline.index}


def make_inputs(
  rows: list[Row],
  *,
  pipeline: Pipeline,
  shape: tuple[int, int, int],
  latents: np.ndarray | None = None,
  guidance: float,
  negative_prompt: str | None,
) -> Inputs:
  """What determines the images of a batch.

  Args:
    rows: the batch; a row's own guidance and negative prompt win.
    pipeline: for its tokenizers.
    shape: (h, w, c) of one image's latents.
    latents: initial noise of the whole CSV (n, h, w, c); None: from the rows' seeds.
    guidance: scale of rows without one.
    negative_prompt: of rows without one; None is none.
  """
  negatives = [
    negative_prompt if row.negative_prompt is None else row.negative_prompt
    for row in rows
  ]
  # diffusers' StableDiffusionXLPipeline: no negative prompt means embeddings of zeros.
  zeros = len(pipeline.text_encoders) > 1 and read_index(pipeline).get(
    "force_zeros_for_empty_prompt", True
  )
  scales = np.array(
    [guidance if row.guidance is None else row.guidance for row in rows], np.float32
  )
  if not pipeline.unet.config.get("time_cond_proj_dim"):
    scales = np.maximum(scales, 1.0)  # as diffusers: 1 is none
  seeds = [row.seed for row in rows]
  return Inputs(
    latents=initial_noise(seeds, shape)
    if latents is None
    else latents[np.array([row.number for row in rows])],
    words=key_words(seeds),
    token_ids=pipeline.tokenize([row.prompt for row in rows]),
    negative_ids=pipeline.tokenize([text or "" for text in negatives]),
    negative=np.array([not (zeros and t is None) for t in negatives], np.float32),
    guidance=scales,
  )


def fix_prompts(
  prepare: Callable[[list[Row]], Inputs],
) -> Callable[[list[Row]], Inputs]:
  """`prepare` for rows whose prompts are repaired first.

  Elsewhere rows keep their prompts: the hash of them is that of the CSV.
  """
  return lambda rows: prepare(cleaning.fix_rows(rows)[0])
