"""Config files of older libraries, corrected as the libraries correct them.

  unet/config.json           a whole `sample_size` below 64, saved by diffusers before
                             0.9, is 64 in SD 1 and 2                              (1)
  unet/, vae/config.json     block types "UNetRes…" are those without the prefix   (2)
  text_encoder*/config.json  a whole CLIP's: the encoder's is in `text_config`     (3)
                             model_index.json knows the class, not `architectures` (4)
  scheduler_config.json      `predict_epsilon` without a `prediction_type`         (5)
                             for sampling with SD 1 and 2: `steps_offset` is 1,
                             `clip_sample` is false                                (6)

(1) and (6) are from diffusers' StableDiffusionPipeline, which its XL pipeline does not
do; (2) from its `get_down_block` and `get_up_block`; (3) and (4) from transformers'
`PreTrainedConfig.from_pretrained` and `from_pretrained` of the model. (5) is from the
schedulers of diffusers 0.10 to 0.12; later ones ignore the field with a warning, which
would take a model that predicts the image for one that predicts the noise.

The schedule of (6) is for sampling alone: training reads neither field, in diffusers'
scripts as here. Older names of weights are in `weights.py`.

Each function returns a new dict; what it changes is printed.
"""

import re
from collections.abc import Mapping
from typing import Any

from safetydpo_jax.models.clip import PROJECTED
from safetydpo_jax.models.config import as_json
from safetydpo_jax.runtime.log import note

Config = Mapping[str, Any]

_BLOCKS = ("down_block_types", "up_block_types")
_BEFORE_0_9 = re.compile(r"0(\.[0-8](\.|\D|$)|$)")
# Classes whose `clip_sample` is true where the file does not say.
_CLIPPING = (None, "DDIMScheduler", "DDPMScheduler")


def correct_unet(config: Config, where: str, *, xl: bool) -> dict[str, Any]:
  """Corrections (1) and (2).

  Args:
    config: unet/config.json.
    where: names the file in what is printed.
    xl: whether the checkpoint is of SDXL's family.
  """
  changes = _without_prefix(config)
  size, version = config.get("sample_size"), str(config.get("_diffusers_version"))
  if not xl and type(size) is int and size < 64 and _BEFORE_0_9.match(version):
    changes["sample_size"] = 64
  return _apply(config, changes, where)


def correct_vae(config: Config, where: str) -> dict[str, Any]:
  """Correction (2)."""
  return _apply(config, _without_prefix(config), where)


def _without_prefix(config: Config) -> dict[str, Any]:
  """Correction (2), of the fields that need it."""
  changes = {}
  for field in _BLOCKS:
    types = config.get(field)
    if isinstance(types, list | tuple) and any(
      isinstance(kind, str) and kind.startswith("UNetRes") for kind in types
    ):
      changes[field] = [str(kind).removeprefix("UNetRes") for kind in types]
  return changes


def correct_text_encoder(config: Config, where: str, kind: str) -> dict[str, Any]:
  """Corrections (3) and (4); `kind` is the class in model_index.json."""
  if isinstance(config.get("text_config"), Mapping):
    config = config["text_config"]
    note(f"{where} is for a whole CLIP; its text_config is read, as in transformers")
  named = config.get("architectures")
  # A projection that model_index.json's class does not use may be there nonetheless.
  known = isinstance(named, list | tuple) and list(named) in map(list, PROJECTED)
  if known and not PROJECTED[(kind,)]:
    return dict(config)
  return {**config, "architectures": [kind]}


def correct_scheduler(config: Config, where: str) -> dict[str, Any]:
  """Correction (5)."""
  changes = {}
  if config.get("predict_epsilon") is False and "prediction_type" not in config:
    changes["prediction_type"] = "sample"
  return _apply(config, changes, where)


def correct_sampling(config: Config, where: str, *, xl: bool) -> dict[str, Any]:
  """Correction (6) of a scheduler_config.json; nothing for SDXL."""
  if xl:
    return dict(config)
  right = {"steps_offset": 1, "clip_sample": False}
  clips = config.get("_class_name") in _CLIPPING
  meant = {"steps_offset": 0, "clip_sample": clips, **config}
  wrong = {field: value for field, value in right.items() if meant[field] != value}
  return {**_apply(config, wrong, where), **right}


def _apply(config: Config, changes: Config, where: str) -> dict[str, Any]:
  """`config` with the changes, each of which is printed."""
  for field, value in changes.items():
    old = as_json(config[field]) if field in config else "missing"
    note(
      f"{where}: {field} is {old} and read as {as_json(value)}, as diffusers does "
      "with files of that age"
    )
  return {**config, **changes}
