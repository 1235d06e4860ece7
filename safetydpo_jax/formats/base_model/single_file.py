"""A Stable Diffusion checkpoint in one safetensors file, as on Civitai and in ComfyUI.

UNet, text encoders and usually the VAE are in one file, under the original code's names
(`original_names.py`), without configs (`original_shapes.py`), noise schedule
(`single_file_families.py`) or tokenizers (`shared_tokenizer.py`).

Every tensor is used or in the table of `single_file_accounts.py`, and every parameter
is found. One line says how many tensors were read, what was left out, and what the file
does not say.
"""

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model import original_names, original_shapes
from safetydpo_jax.formats.base_model import single_file_accounts as accounts
from safetydpo_jax.formats.base_model import single_file_families as families
from safetydpo_jax.formats.base_model import single_file_kinds as kinds
from safetydpo_jax.formats.base_model.single_file_families import Family, Training
from safetydpo_jax.formats.base_model.single_file_networks import (
  UNET,
  VAE,
  Component,
  below,
  configs_of,
  has,
  parts_of,
  vae_parts,
  vae_prefix,
)
from safetydpo_jax.formats.tensors import open_safetensors
from safetydpo_jax.models import published
from safetydpo_jax.models.vae import pixels_per_latent
from safetydpo_jax.runtime.log import note

SUFFIX = ".safetensors"
_EMA = "model_ema.diffusion_model"


class SingleFile(NamedTuple):
  """A single file's networks and settings, in diffusers' terms.

  Attributes:
    path: the file.
    family: which Stable Diffusion it is.
    components: the networks in it; a VAE may be missing.
    configs: {component: config.json}, the VAE's in any case.
    scheduler: scheduler_config.json.
    model_index: model_index.json.
    left_out: the tensors that are not used.
    summary: one line on what was read and assumed.
  """

  path: Path
  family: Family
  components: dict[str, Component]
  configs: dict[str, dict[str, Any]]
  scheduler: dict[str, Any]
  model_index: dict[str, Any]
  left_out: dict[str, np.ndarray]
  summary: str


def split_choice(model: str) -> tuple[str, str | None]:
  """FILE:epsilon or FILE:v_prediction → (FILE, which); else (`model`, None)."""
  file, colon, choice = model.rpartition(":")
  if colon and choice in families.CHOICES and not Path(model).exists():
    return file, choice
  return model, None


def read(path: Path, model: str, variant: str | None) -> SingleFile:
  """Opens the file `path` that a user named as `model`, and says what is in it.

  Raises:
    InputError: see `open_single_file`; or a variant was asked for.
  """
  if variant:
    raise InputError(f"{path} is a single file and has no variant {variant!r}")
  single = open_single_file(path, split_choice(model)[1])
  note(single.summary)
  return single


def open_single_file(path: Path, choice: str | None = None) -> SingleFile:
  """Maps a single-file checkpoint.

  Args:
    path: the file.
    choice: what its UNet predicts, one of `families.CHOICES`; None: see
      `single_file_families.py`.

  Raises:
    InputError: it is something else, incomplete, or holds what is not understood.
  """
  tensors, header = open_safetensors(path)
  try:
    return _understand(path, tensors, header, choice)
  except InputError as error:
    raise InputError(f"{path}: {error}") from error


def _understand(
  path: Path,
  there: Mapping[str, np.ndarray],
  header: Mapping[str, str],
  choice: str | None,
) -> SingleFile:
  if what := kinds.relative(there):
    raise InputError(f"this is {what}; only Stable Diffusion 1, 2 and XL are supported")
  if kinds.is_scaled_float8(there):
    raise InputError(
      "its weights are float8 with scales beside them (ComfyUI's scaled_fp8), which is "
      "not supported; give the checkpoint in float16, or in float8 without scales"
    )
  tensors = _ema_as_unet(there)
  if f"{UNET}input_blocks.0.0.weight" not in tensors:
    what = kinds.describe(tensors, header)
    raise InputError(f"this is {what}; expected a checkpoint of Stable Diffusion")
  family = _family(tensors)
  training = families.how_trained(family, tensors, header, choice)
  configs = configs_of(family, {name: x.shape for name, x in tensors.items()})
  parts = {
    name: parts_of(name, family, config, tensors) for name, config in configs.items()
  }
  components = {
    name: Component(path, configs[name], tensors, parts[name]) for name in configs
  }
  used = (part.key for found in parts.values() for part in found.values())
  left_out = accounts.account(tensors, used)
  configs.setdefault("vae", _vae_of(family))
  pixels = pixels_per_latent(configs["vae"])
  configs["vae"]["sample_size"] = training.resolution
  configs["unet"]["sample_size"] = training.resolution // pixels
  notes = ["there is no VAE"] if "vae" not in components else []
  if tensors is not there:
    notes += ["the UNet is that of the EMA weights, the only ones there"]
  return SingleFile(
    path,
    family,
    components,
    configs,
    training.scheduler,
    _index(family, training.scheduler["_class_name"]),
    left_out,
    f"{path}: {_summary(family, training, len(there), left_out, notes)}",
  )


def _ema_as_unet(tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
  """The tensors, with EMA weights in the UNet's place if there are no others."""
  if any(name.startswith(UNET) for name in tensors):
    return tensors
  renamed = {}
  for name, tensor in tensors.items():
    flat = name.removeprefix(_EMA)
    key = original_names.unflatten(flat) if flat != name else None
    renamed[f"{UNET}{key}" if key else name] = tensor
  return tensors if renamed.keys() == tensors.keys() else renamed


def _family(tensors: Mapping[str, np.ndarray]) -> Family:
  """By the text encoders: their names, not their sizes, tell the families apart."""
  for family in families.FAMILIES:
    if has(tensors, family.encoders[-1].prefixes):
      if family is families.SD2 and f"{UNET}label_emb.0.0.weight" in tensors:
        raise InputError(
          "this is the refiner of Stable Diffusion XL; give the base model"
        )
      return family
  raise InputError(
    "it has a UNet and no text encoder (cond_stage_model. or conditioner.embedders.); "
    "give a whole checkpoint"
  )


def _vae_of(family: Family) -> dict[str, Any]:
  """The family's VAE, for a checkpoint that comes without."""
  return {**published.SD15_VAE, "scaling_factor": family.scaling_factor}


def open_vae(path: Path, scaling_factor: float) -> Component:
  """A VAE in a file of its own, or the one in a checkpoint.

  Args:
    path: the file.
    scaling_factor: of the model that it is for; the file does not say it.

  Raises:
    InputError: the file has no VAE, or one with what is not understood.
  """
  tensors, header = open_safetensors(path)
  prefix = vae_prefix(tensors, (*VAE, ""))
  try:
    if has(tensors, "encoder.down_blocks."):
      raise InputError("it has diffusers' names; give its folder, with config.json")
    if prefix is None:
      what = kinds.describe(tensors, header)
      raise InputError(f"this is {what}; expected the VAE of a Stable Diffusion")
    shapes = below({name: x.shape for name, x in tensors.items()}, prefix)
    config = original_shapes.vae_config(shapes) | {"scaling_factor": scaling_factor}
    parts = vae_parts(config, prefix)
    own = {name: x for name, x in tensors.items() if name.startswith(prefix)}
    accounts.account(own, (part.key for part in parts.values()))
  except InputError as error:
    raise InputError(f"VAE {path}: {error}") from error
  return Component(path, config, tensors, parts)


def component_of(single: SingleFile, name: str) -> Component:
  """A network of the file.

  Raises:
    InputError: it has none of that name.
  """
  if name not in single.components:
    raise InputError(
      f"{single.path} has no {name} in it, which an export of the whole model needs; "
      "put one in with the tool the file came from"
    )
  return single.components[name]


def unused_text(single: SingleFile) -> dict[str, np.ndarray]:
  """What text encoders hold and Stable Diffusion does not use, by its usual names."""
  kept = {}
  for name, tensor in single.left_out.items():
    if accounts.why_left_out(name) in accounts.TEXT_REST:
      for encoder in single.family.encoders:
        for prefix in encoder.prefixes[1:]:
          if name.startswith(prefix):
            name = encoder.prefixes[0] + name.removeprefix(prefix)
      kept[name] = tensor
  return kept


def _index(family: Family, scheduler: str) -> dict[str, Any]:
  """model_index.json; there is no safety checker, as in diffusers' from_single_file."""
  text = {}
  for encoder in family.encoders:
    projected = encoder.component == "text_encoder_2"
    kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    text[encoder.component] = ["transformers", kind]
    tokenizer = encoder.component.replace("text_encoder", "tokenizer")
    text[tokenizer] = ["transformers", "CLIPTokenizer"]
  xl = family is families.SDXL
  absent = ("feature_extractor", "image_encoder" if xl else "safety_checker")
  return {
    "_class_name": family.pipeline,
    "_diffusers_version": "0.30.0",
    **{name: [None, None] for name in absent},
    **({"force_zeros_for_empty_prompt": True} if xl else {}),
    **({} if xl else {"requires_safety_checker": False}),
    "scheduler": ["diffusers", scheduler],
    **text,
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
  }


def _summary(
  family: Family,
  training: Training,
  total: int,
  left_out: Mapping[str, np.ndarray],
  notes: list[str],
) -> str:
  """What was read, left out and assumed."""
  counts = collections.Counter(accounts.why_left_out(name) for name in left_out)
  predicted = training.scheduler["prediction_type"]
  if counts:
    rest = ", ".join(f"{what} {n:,}" for what, n in counts.items())
    notes = [f"left out: {rest}", *notes]
  if training.assumed:
    notes = [*notes, f"assumed, for it does not say: {training.assumed}"]
  else:
    notes = [*notes, f"predicts {predicted} at {training.resolution} pixels"]
  if predicted in training.assumed:
    other = next(choice for choice in families.CHOICES if choice != predicted)
    notes[-1] += f" (if it is not, write :{other} behind the file's name)"
  read = f"{total - len(left_out):,} of {total:,} tensors read"
  return f"{family.name}; {'; '.join([read, *notes])}"
