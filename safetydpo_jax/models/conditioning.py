"""What the UNet is conditioned on besides the timestep: text, and sizes for SDXL.

  context      (n, l, d)   the text encoders' states, see `models/clip.py`
  text_embeds  (n, e)      SDXL: the second encoder's pooled text
  time_ids     (n, 6)      SDXL: original size, crop's corner, target size, (h, w) each

In sampling the sizes may be others: with an `original_size` below the target's SDXL
draws as from small pictures scaled up, with a crop's corner as from cropped ones.

In training the time ids are those of SafetyDPO's SDXL launcher, (R, R, 0, 0, R, R) for
every image at resolution R, whatever size its file has. Images are generated with these
values, and the images of a pair must share them: a different size would give away which
one is preferred.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from safetydpo_jax.models import clip


def make_time_ids(height: int, width: int) -> list[int]:
  """SDXL's time ids of an image made at this size, neither resized nor cropped."""
  return [height, width, 0, 0, height, width]


def encode(
  text_encoders: Sequence[clip.CLIPText],
  params: Mapping[str, Any],
  token_ids: Sequence[jax.Array | np.ndarray],
  time_ids: jax.Array | None,
  weights: Sequence[jax.Array | np.ndarray] = (),
  clip_skip: int = 0,
) -> tuple[jax.Array, dict[str, jax.Array] | None]:
  """The UNet's `context` and `added_cond`; pure, so it can be jitted.

  Args:
    text_encoders: one (SD 1, SD 2) or two (SDXL).
    params: holds their parameters under 'text_encoder' and 'text_encoder_2'.
    token_ids: one (n, l) int array for each encoder.
    time_ids: (n, 6), or None with one encoder.
    weights, clip_skip: see `clip.encode_text`.

  Returns:
    (context (n, l, d), added_cond): None with one encoder, with two the dict of
    `text_embeds` and `time_ids`.
  """
  context, pooled = clip.encode_text(
    text_encoders, params, token_ids, weights, clip_skip
  )
  if pooled is None:
    return context, None
  assert time_ids is not None, "two text encoders are SDXL's, whose UNet reads time ids"
  return context, {"text_embeds": pooled, "time_ids": time_ids}
