"""The families of single-file checkpoints, and what their files leave unsaid.

A file does not say what its UNet predicts, nor at which size it was trained. In this
order, the first that says it counts:

  1  the user: FILE:epsilon or FILE:v_prediction
  2  the tensors `v_pred` and `ztsnr`, as ComfyUI reads them
  3  the header: modelspec.prediction_type ("epsilon", "v"), modelspec.resolution
  4  diffusers' rule: SD 2 predicts v, unless `global_step` is 875,000 (SD 2-base); SD 1
     and SDXL predict noise

Source of 4: diffusers' loaders/single_file_utils.py, where SD 2's config is that of
stable-diffusion-2-1, and `_legacy_load_scheduler`.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from safetydpo_jax.models import published

CHOICES = ("epsilon", "v_prediction")
_SD2_LAYERS = 23  # of the 24 of OpenCLIP ViT-H
_SD2_BASE_STEP = 875_000
_MODELSPEC_TYPES = {"epsilon": "epsilon", "v": "v_prediction"}
# Tensors that say something by being there; they are read here and nowhere else.
MARKERS = ("v_pred", "ztsnr")


class Encoder(NamedTuple):
  """A text encoder in a single file.

  Attributes:
    component: its name in a diffusers directory.
    prefixes: of its tensors; the first is the one we write.
    open_clip: whether they have OpenCLIP's names; else they have transformers'.
    layers: how many of its layers are used; None: all.
    pad_token: of its tokenizer.
  """

  component: str
  prefixes: tuple[str, ...]
  open_clip: bool
  layers: int | None
  pad_token: str


class Family(NamedTuple):
  """What all checkpoints of a family have in common."""

  name: str
  pipeline: str  # diffusers' class
  encoders: tuple[Encoder, ...]
  scheduler: dict[str, Any]
  scaling_factor: float  # of the VAE
  resolution: int


_END = "<|endoftext|>"
SD1 = Family(
  "Stable Diffusion 1",
  "StableDiffusionPipeline",
  (Encoder("text_encoder", ("cond_stage_model.transformer.",), False, None, _END),),
  published.SCHEDULERS["sd1"],
  0.18215,
  512,
)
SD2 = Family(
  "Stable Diffusion 2",
  "StableDiffusionPipeline",
  (
    Encoder(
      "text_encoder",
      ("cond_stage_model.model.", "conditioner.embedders.0.model."),  # SD Turbo's
      True,
      _SD2_LAYERS,
      "!",
    ),
  ),
  published.SCHEDULERS["sd2"],
  0.18215,
  768,
)
SDXL = Family(
  "Stable Diffusion XL",
  "StableDiffusionXLPipeline",
  (
    Encoder(
      "text_encoder", ("conditioner.embedders.0.transformer.",), False, None, _END
    ),
    Encoder("text_encoder_2", ("conditioner.embedders.1.model.",), True, None, "!"),
  ),
  published.SCHEDULERS["sdxl"],
  0.13025,
  1024,
)
FAMILIES = (SDXL, SD2, SD1)
_SD2_BASE = SD2._replace(scheduler=published.SCHEDULERS["sd1"], resolution=512)


class Training(NamedTuple):
  """How the UNet was trained.

  Attributes:
    scheduler: scheduler_config.json.
    resolution: pixels per side.
    assumed: what nothing in the file says, "" if it says everything.
  """

  scheduler: dict[str, Any]
  resolution: int
  assumed: str


def how_trained(
  family: Family,
  tensors: Mapping[str, np.ndarray],
  header: Mapping[str, str],
  choice: str | None,
) -> Training:
  """What the UNet predicts and at which size; see the module's docstring.

  Args:
    family: of the file.
    tensors: the file's.
    header: its metadata.
    choice: one of `CHOICES`, the user's, or None.
  """
  said = choice or ("v_prediction" if "v_pred" in tensors else None)
  said = said or _MODELSPEC_TYPES.get(header.get("modelspec.prediction_type", ""))
  if said is None and family is SD2 and _is_sd2_base(tensors):
    said = "epsilon"
  predicted = said or family.scheduler["prediction_type"]
  if family is SD2 and predicted == "epsilon":
    family = _SD2_BASE
  scheduler = {**family.scheduler, "prediction_type": predicted}
  if "ztsnr" in tensors:
    # Without signal at the last step, sampling has to start there.
    scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
  size = re.fullmatch(r"(\d{1,5})x(\d{1,5})", header.get("modelspec.resolution", ""))
  resolution = max(map(int, size.groups())) if size else 0
  assumed = [] if said else [predicted]
  assumed += [] if resolution else [f"{family.resolution} pixels"]
  return Training(scheduler, resolution or family.resolution, " at ".join(assumed))


def _is_sd2_base(tensors: Mapping[str, np.ndarray]) -> bool:
  step = tensors.get("global_step")
  return step is not None and step.size == 1 and step.reshape(()) == _SD2_BASE_STEP
